"""A middle box between two TCP connections: slow, late, stalling, silent, or cut after so many bytes.

It moves bytes and knows nothing of frames or of TLS. It runs in the hub of the test.
"""

from __future__ import annotations

import contextlib
import socket
import struct
import time
from collections import deque
from collections.abc import Callable
from typing import Any

import gevent
from gevent import socket as gsocket
from gevent.event import Event

#: Bytes on their way where there is a delay; where there is none, one piece.
_LATE_AT_MOST = 16 << 20


class Lane:
    """One direction of a relay."""

    def __init__(self, source: Any, sink: Any, rate: float | None, delay: float) -> None:
        self._source = source
        self._sink = sink
        #: Bytes a second; None: as fast as it goes.
        self.rate = rate
        #: Seconds that every byte is late.
        self.delay = delay
        #: What comes is thrown away.
        self.swallows = False
        #: Bytes that may pass still, and whether RST, or only the end, follows them; None: all.
        self.left: int | None = None
        self.resets = False
        self.passed = 0
        self._moving = Event()
        self._moving.set()
        self._late: deque[tuple[float, bytes]] = deque()
        self._queued = 0
        self._changed = Event()
        self.greenlets = [gevent.spawn(self._receive), gevent.spawn(self._send)]

    def stall(self) -> None:
        """Take nothing and pass nothing on, until `go_on`."""
        self._moving.clear()

    def go_on(self) -> None:
        self._moving.set()

    def cut_after(self, size: int, *, resets: bool = False) -> None:
        """Let so many bytes more pass, then end the connection they go to."""
        self.left, self.resets = size, resets

    def _receive(self) -> None:
        piece = 16384 if self.rate is None else max(1, int(self.rate / 50))
        with contextlib.suppress(OSError):
            while True:
                self._moving.wait()
                self._wait_while(lambda: self._queued >= (_LATE_AT_MOST if self.delay else piece))
                data = self._source.recv(piece)
                self._moving.wait()
                if self.swallows and data:
                    continue
                self._late.append((time.monotonic() + self.delay, data))
                self._queued += len(data)
                self._changed.set()
                if not data:
                    return
                if self.rate is not None:
                    gevent.sleep(len(data) / self.rate)

    def _send(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                self._wait_while(lambda: not self._late)
                moment, data = self._late.popleft()
                gevent.sleep(max(0.0, moment - time.monotonic()))
                self._moving.wait()
                if not data or not self._pass(data):
                    return self._end()
                self._queued -= len(data)
                self._changed.set()

    def _wait_while(self, condition: Callable[[], bool]) -> None:
        while condition():
            self._changed.clear()
            self._changed.wait()

    def _pass(self, data: bytes) -> bool:
        """Send what may pass; False when that was the last."""
        part = data if self.left is None else data[: self.left]
        self._sink.sendall(part)
        self.passed += len(part)
        if self.left is not None:
            self.left -= len(part)
        return self.left != 0

    def _end(self) -> None:
        if self.resets:
            self._sink.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self._sink.close()
        else:
            self._sink.shutdown(socket.SHUT_WR)


class Relay:
    """`near` and `far` are the ends of a connection that goes through this process; `there` and `back` its lanes."""

    def __init__(self, *, rate: float | None = None, delay: float = 0.0, buffers: int | None = None) -> None:
        self.near, left = _connection(buffers)
        right, self.far = _connection(buffers)
        self._ends = (left, right)
        self.there = Lane(left, right, rate, delay)
        self.back = Lane(right, left, rate, delay)
        self.lanes = (self.there, self.back)

    def swallow(self) -> None:
        """Go silent: whatever comes vanishes, and neither end is told."""
        for lane in self.lanes:
            lane.swallows = True

    def stall(self) -> None:
        for lane in self.lanes:
            lane.stall()

    def go_on(self) -> None:
        for lane in self.lanes:
            lane.go_on()

    def close(self) -> None:
        for lane in self.lanes:
            gevent.killall(lane.greenlets)
        for end in (*self._ends, self.near, self.far):
            end.close()

    def __enter__(self) -> Relay:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def _connection(buffers: int | None) -> tuple[Any, Any]:
    with gsocket.socket() as listener:
        dialled = gsocket.socket()
        for sock in (listener, dialled):
            if buffers is not None:
                sock.setsockopt(gsocket.SOL_SOCKET, gsocket.SO_SNDBUF, buffers)
                sock.setsockopt(gsocket.SOL_SOCKET, gsocket.SO_RCVBUF, buffers)
        listener.bind(("127.0.0.1", 0))
        listener.listen(1)
        dialled.connect(listener.getsockname())
        accepted, _ = listener.accept()
    for sock in (dialled, accepted):
        sock.setsockopt(gsocket.IPPROTO_TCP, gsocket.TCP_NODELAY, 1)
    return dialled, accepted
