"""The other client: a small request every few milliseconds on a session of its own, each answer timed.

It keeps to the clock, whatever became of the request before, and times each from the moment when it was due: a server
that stands still for long spoils all requests of that time, not one. Beside each it sends one to a plain echo in a
process that nobody attacks: the noise of the machine. Run as ``python -m attacks.honest PORT ECHO_PORT``. A line
``begin`` on its standard input forgets what was measured, ``count`` prints how many there are since, ``end`` all of them,
as JSON.
"""

from __future__ import annotations

import json
import struct
import sys
import time
from typing import Any

import gevent
from gevent import socket
from gevent.fileobject import FileObject

import geyamux

#: Seconds between two requests.
PERIOD = 0.005
#: So many on one stream; then a fresh one is opened.
PER_STREAM = 50

_moment = struct.Struct(">d")


class Honest:
    def __init__(self, port: int, echo_port: int) -> None:
        self.session = geyamux.connect(("127.0.0.1", port), timeout=5)
        self.echo = socket.create_connection(("127.0.0.1", echo_port))
        self.echo.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.begin()

    def begin(self) -> None:
        self.begun = time.monotonic()
        self.round_trips: list[float] = []
        self.noise: list[float] = []
        self.error = ""

    def run(self) -> None:
        gevent.spawn(self.receive, self.echo, "noise")
        due = time.monotonic()
        try:
            while True:
                stream = self.session.open()
                gevent.spawn(self.receive, stream, "round_trips")
                stream.sendall(b"e")
                for _ in range(PER_STREAM):
                    due += PERIOD
                    gevent.sleep(max(0.0, due - time.monotonic()))
                    for connection in (stream, self.echo):
                        connection.sendall(_moment.pack(due))
                stream.close_write()
        except OSError as error:
            self.error = repr(error)

    def receive(self, connection: Any, name: str) -> None:
        """Time the answers until the connection ends. What was due before the last `begin` does not count."""
        received = b""
        try:
            while data := connection.recv(4096):
                now = time.monotonic()
                received += data
                whole = len(received) // _moment.size * _moment.size
                into = getattr(self, name)
                into.extend(now - due for (due,) in _moment.iter_unpack(received[:whole]) if due >= self.begun)
                received = received[whole:]
        except OSError as error:
            self.error = repr(error)
        if connection is not self.echo:
            connection.close()


def main() -> None:
    honest = Honest(int(sys.argv[1]), int(sys.argv[2]))
    gevent.spawn(honest.run)
    print(json.dumps("ready"), flush=True)
    for line in FileObject(sys.stdin.fileno(), "rb", close=False):
        command = line.strip()
        if command == b"begin":
            honest.begin()
        if command == b"end":
            answer: Any = {"rtt": honest.round_trips, "noise": honest.noise, "error": honest.error}
        else:
            answer = len(honest.round_trips)
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
