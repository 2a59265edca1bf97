"""A link with a delay and a rate: a TCP relay in a process of its own, since kernels that can't delay are common.

`python -m benchmarks.relay --port N --rate BITS --delay SECONDS` prints {"port": M}; what connects there is connected to
N, with that delay each way. It ends with its standard input. All connections share the rate, each direction has its own.

It is no model of TCP on a long path: nothing is lost, and each end talks TCP to the relay, beside it. A sender feels
the link by the relay not reading; the relay keeps what is on its way, and a short queue before that.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections import deque
from typing import Any

import gevent
import gevent.os
from gevent import socket
from gevent.event import Event
from gevent.server import StreamServer

#: Small enough that a piece takes about a millisecond at 200 Mbit/s.
PIECE = 32 << 10
#: What may wait before the link, beside what is on it. Routers have more.
QUEUE = 256 << 10


class Direction:
    """One way of the link, for all connections: when it is free again."""

    def __init__(self, rate: float, delay: float) -> None:
        self.bytes_per_second = rate / 8
        self.delay = delay
        self.free_at = 0.0
        #: Of one connection, on the link and before it.
        self.capacity = int(self.bytes_per_second * delay) + QUEUE

    def arrival(self, size: int) -> float:
        """Put so many bytes on the link; return when the last of them will be at the other end."""
        self.free_at = max(self.free_at, time.monotonic()) + size / self.bytes_per_second
        return self.free_at + self.delay


class Pipe:
    """The bytes of one connection in one direction."""

    def __init__(self, source: Any, target: Any, direction: Direction) -> None:
        self.source = source
        self.target = target
        self.direction = direction
        self.pieces: deque[tuple[float, bytes]] = deque()
        self.size = 0
        self.changed = Event()
        self.greenlets = [gevent.spawn(self._take), gevent.spawn(self._give)]

    def _take(self) -> None:
        data = b"more"
        while data:
            while self.size >= self.direction.capacity:
                self._wait()
            try:
                data = self.source.recv(PIECE)
            except OSError:
                data = b""
            self.pieces.append((self.direction.arrival(len(data)), data))
            self.size += len(data)
            self.changed.set()

    def _give(self) -> None:
        while True:
            while not self.pieces:
                self._wait()
            due, data = self.pieces[0]
            gevent.sleep(max(0.0, due - time.monotonic()))
            try:
                if not data:
                    self.target.shutdown(socket.SHUT_WR)
                    return
                self.target.sendall(data)
            except OSError:
                # Whoever still sends to that end shall notice.
                self.source.close()
                return
            self.pieces.popleft()
            self.size -= len(data)
            self.changed.set()

    def _wait(self) -> None:
        self.changed.clear()
        self.changed.wait()


def relay_server(port: int, rate: float, delay: float) -> StreamServer:
    """Return a server, not started, on a free port; `rate` in bits a second, `delay` in seconds each way."""
    there, back = Direction(rate, delay), Direction(rate, delay)

    def handle(near: Any, _address: Any) -> None:
        far = socket.create_connection(("127.0.0.1", port))
        for conn in (near, far):
            conn.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        pipes = [Pipe(near, far, there), Pipe(far, near, back)]
        greenlets = [greenlet for pipe in pipes for greenlet in pipe.greenlets]
        try:
            gevent.joinall([pipe.greenlets[1] for pipe in pipes])
        finally:
            gevent.killall(greenlets)
            far.close()

    return StreamServer(("127.0.0.1", 0), handle)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.relay")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--rate", type=float, required=True, help="bits a second")
    parser.add_argument("--delay", type=float, required=True, help="seconds, each way")
    arguments = parser.parse_args()
    server = relay_server(arguments.port, arguments.rate, arguments.delay)
    server.start()
    print(json.dumps({"port": server.server_port}), flush=True)
    gevent.os.make_nonblocking(0)
    while gevent.os.nb_read(0, 4096):
        pass
    os._exit(0)


if __name__ == "__main__":
    main()
