"""Transports without a network: one in memory, and a wrapper that fails on command.

Both are cooperative objects with `recv`, `send`, `sendall`, `shutdown` and `close`, and no descriptor.
"""

from __future__ import annotations

import errno
import socket
from collections import Counter
from collections.abc import Callable
from typing import Any, Protocol

from gevent.event import Event

from .wire import Audit, BytesLike


class Transport(Protocol):
    def recv(self, size: int, /) -> bytes: ...
    def sendall(self, data: BytesLike, /) -> object: ...
    def close(self) -> object: ...


class _Pipe:
    """One direction: a bounded buffer with an event for either end."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.buffer = bytearray()
        self.writer_done = False
        self.reader_gone = False
        self.readable = Event()
        self.writable = Event()
        self.writable.set()

    def update(self) -> None:
        """Make the events say what is so."""
        for event, true in (
            (self.readable, self.buffer or self.writer_done or self.reader_gone),
            (self.writable, len(self.buffer) < self.limit or self.writer_done or self.reader_gone),
        ):
            if true:
                event.set()
            else:
                event.clear()


class MemoryTransport:
    """One end of an in-memory connection. `recv` waits for bytes, `send` for room."""

    def __init__(self, incoming: _Pipe, outgoing: _Pipe) -> None:
        self._incoming = incoming
        self._outgoing = outgoing
        self.closed = False

    def recv(self, size: int) -> bytes:
        pipe = self._incoming
        while not pipe.buffer:
            self._check_open()
            if pipe.writer_done:
                return b""
            pipe.readable.wait()
        self._check_open()
        chunk = bytes(pipe.buffer[:size])
        del pipe.buffer[:size]
        pipe.update()
        return chunk

    def send(self, data: BytesLike) -> int:
        pipe = self._outgoing
        while True:
            self._check_open()
            if pipe.writer_done or pipe.reader_gone:
                raise BrokenPipeError(errno.EPIPE, "the other end is closed")
            room = pipe.limit - len(pipe.buffer)
            if room > 0:
                break
            pipe.writable.wait()
        with memoryview(data) as view:
            taken = bytes(view[:room])
        pipe.buffer += taken
        pipe.update()
        return len(taken)

    def sendall(self, data: BytesLike) -> None:
        rest = bytes(data)
        while rest:
            rest = rest[self.send(rest) :]

    def shutdown(self, how: int) -> None:
        self._check_open()
        if how in (socket.SHUT_WR, socket.SHUT_RDWR):
            self._outgoing.writer_done = True
            self._outgoing.update()
        if how in (socket.SHUT_RD, socket.SHUT_RDWR):
            self._incoming.writer_done = True
            self._incoming.update()

    def close(self) -> None:
        self.closed = True
        self._outgoing.writer_done = True
        self._incoming.reader_gone = True
        self._outgoing.update()
        self._incoming.update()

    def _check_open(self) -> None:
        if self.closed:
            raise OSError(errno.EBADF, "closed")


def memory_pair(limit: int = 65536) -> tuple[MemoryTransport, MemoryTransport]:
    """Two connected transports; each direction holds `limit` bytes."""
    there, back = _Pipe(limit), _Pipe(limit)
    return MemoryTransport(there, back), MemoryTransport(back, there)


class FaultyTransport:
    """Any transport, with faults, and with a record of all that passed.

    `max_send` and `max_recv` cut every call; `stall` and `release` hold one direction back; `break_after`
    ends it with an error once so many bytes have passed; `answer_sends` and `answer_recvs` make up what the
    calls return. `log` holds what passed in the order in which it did, and `audit` judges it.
    """

    def __init__(self, inner: Any, *, max_send: int | None = None, max_recv: int | None = None) -> None:
        # Any: what the wrapped transports have in common differs from test to test.
        self.inner = inner
        self.max_send = max_send
        self.max_recv = max_recv
        self.answer_sends: Callable[[BytesLike], Any] | None = None
        self.answer_recvs: Callable[[int], Any] | None = None
        self.calls: Counter[str] = Counter()
        self.log: list[tuple[str, bytes]] = []
        self._passing = {"send": Event(), "recv": Event()}
        self._left: dict[str, int | None] = {"send": None, "recv": None}
        self._error: OSError = ConnectionResetError(errno.ECONNRESET, "broken by the test")
        for event in self._passing.values():
            event.set()

    # what the test does

    def stall(self, *directions: str) -> None:
        """Let `send`, `recv` or (without arguments) both wait."""
        for direction in directions or ("send", "recv"):
            self._passing[direction].clear()

    def release(self, *directions: str) -> None:
        for direction in directions or ("send", "recv"):
            self._passing[direction].set()

    def break_after(self, direction: str, count: int, error: OSError | None = None) -> None:
        """Let `count` more bytes pass in one direction, then fail every call in it."""
        self._left[direction] = count
        if error is not None:
            self._error = error

    @property
    def sent(self) -> bytes:
        return b"".join(chunk for direction, chunk in self.log if direction == "send")

    @property
    def received(self) -> bytes:
        return b"".join(chunk for direction, chunk in self.log if direction == "recv")

    def audit(self, *, client: bool, max_window: int = 262144, finish: bool = False) -> Audit:
        """Judge all that has passed so far as the traffic of that side; see `Audit`."""
        judge = Audit(client=client, max_window=max_window)
        for direction, chunk in self.log:
            if direction == "send":
                judge.sent(chunk)
            else:
                judge.received(chunk)
        if finish:
            judge.finish()
        return judge

    # what the session does

    def recv(self, size: int) -> Any:
        self.calls["recv"] += 1
        self._passing["recv"].wait()
        if self.answer_recvs is not None:
            return self.answer_recvs(size)
        # Bytes may have arrived while a stall began: they are given out all the same, as a kernel would.
        chunk = self.inner.recv(self._allowed("recv", min(size, self.max_recv or size)))
        self._passed("recv", chunk)
        return chunk

    def recv_into(self, buffer: bytearray | memoryview, size: int = 0) -> int:
        chunk = self.recv(size or len(buffer))
        buffer[: len(chunk)] = chunk
        return len(chunk)

    def send(self, data: BytesLike) -> Any:
        self.calls["send"] += 1
        self._passing["send"].wait()
        if self.answer_sends is not None:
            return self.answer_sends(data)
        with memoryview(data) as view:
            chunk = bytes(view[: self._allowed("send", min(len(view), self.max_send or len(view)))])
        taken = self.inner.send(chunk)
        self._passed("send", chunk[:taken])
        return taken

    def sendall(self, data: BytesLike) -> None:
        rest = bytes(data)
        while rest:
            rest = rest[self.send(rest) :]

    def shutdown(self, how: int) -> None:
        self.calls["shutdown"] += 1
        self.inner.shutdown(how)

    def close(self) -> None:
        self.calls["close"] += 1
        # A call that waits in a stall would never learn that the transport is gone.
        self.release()
        self.inner.close()

    def _allowed(self, direction: str, size: int) -> int:
        left = self._left[direction]
        if left is None:
            return size
        if left == 0:
            raise type(self._error)(*self._error.args)
        return min(size, left)

    def _passed(self, direction: str, chunk: bytes) -> None:
        left = self._left[direction]
        if left is not None:
            self._left[direction] = left - len(chunk)
        if chunk:
            self.log.append((direction, chunk))
