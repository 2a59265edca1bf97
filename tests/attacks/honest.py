"""The other client: small round trips on a session of its own, all the time, each timed.

Beside each it times one to a plain echo in a process that nobody attacks: the noise of the machine. Run as
``python -m attacks.honest PORT ECHO_PORT``. A line ``begin`` on its standard input forgets what was measured, ``count``
prints how many there are since, ``end`` all of them, as JSON.
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any

import gevent
from gevent import socket
from gevent.fileobject import FileObject

import geyamux

MESSAGE = b"the other client"
PAUSE = 0.001
#: So many round trips on one stream; then a fresh one is opened.
PER_STREAM = 25


class Honest:
    def __init__(self, port: int, echo_port: int) -> None:
        self.session = geyamux.connect(("127.0.0.1", port), timeout=5)
        self.echo = socket.create_connection(("127.0.0.1", echo_port))
        self.echo.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.begin()

    def begin(self) -> None:
        self.round_trips: list[float] = []
        self.noise: list[float] = []
        self.error = ""

    def run(self) -> None:
        try:
            while True:
                with self.session.open() as stream:
                    stream.sendall(b"e")
                    for _ in range(PER_STREAM):
                        self.measure(stream, self.round_trips)
                        self.measure(self.echo, self.noise)
                        gevent.sleep(PAUSE)
        except OSError as error:
            self.error = repr(error)

    def measure(self, connection: Any, into: list[float]) -> None:
        begun = time.perf_counter()
        connection.sendall(MESSAGE)
        missing = len(MESSAGE)
        while missing:
            data = connection.recv(missing)
            if not data:
                raise EOFError("the echo ended early")
            missing -= len(data)
        into.append(time.perf_counter() - begun)


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
