"""Join two ends, so that what comes from one goes to the other.

An end is a :class:`~geyamux.Stream`, a gevent socket, or anything with ``recv``, ``sendall``, ``shutdown`` and ``close``.
What ends on one side in good order ends so on the other; what breaks on one side is broken on the other: never is a torn
connection taken for a whole one.
"""

from __future__ import annotations

import contextlib
import errno
import os
import select
import socket as stdlib_socket
import struct
import time
from typing import Any

import gevent
import gevent.socket
import gevent.ssl

from .stream import Stream

__all__ = ["BUFSIZE", "Splice", "reset", "splice"]

#: Of what is read at once, in bytes.
BUFSIZE = 65536

#: What was sent before a reset may take so long to leave, in seconds.
_LAST_BYTES = 1.0

#: Close with a reset.
_NO_LINGER = struct.pack("ii", 1, 0)

#: A TCP peer that is gone without a word is asked after so many silent seconds, so often, and so many times.
_TCP_KEEPALIVE = {"TCP_KEEPIDLE": 60, "TCP_KEEPINTVL": 15, "TCP_KEEPCNT": 4}


def splice(a: Any, b: Any, *, bufsize: int = BUFSIZE) -> tuple[int, int]:
    """Pass bytes between `a` and `b` until both directions have ended; return how many went from `a` to `b`, and back.

    Both ends belong to it: they are closed when it returns or raises. Each direction ends by itself: an end of file
    goes on as a half-close, and the other direction lives as long as it likes. (A TLS socket can't be half-closed:
    with one, both directions end with the first.) What breaks on one side is broken on the other, behind the bytes
    that came before: a stream is reset, a TCP connection too.

    Blocks, for as long as both ends live. Raises what broke first: an ``OSError`` of a socket or of a stream
    (:class:`~geyamux.StreamReset`, :class:`~geyamux.SessionError`). A kill or a ``gevent.Timeout`` breaks both.

    Not guaranteed: that what was passed on has been read. Timeouts of the ends are set to None.
    """
    return Splice(a, b, bufsize=bufsize).run()


class Splice:
    """Two ends that are joined by :meth:`run`, with counts that may be read meanwhile. See :func:`splice`."""

    __slots__ = ("_back", "_bufsize", "_there", "_watch", "a", "b", "began", "error")

    def __init__(self, a: Any, b: Any, *, bufsize: int = BUFSIZE) -> None:
        #: The ends, as they were given.
        self.a, self.b = a, b
        self._bufsize = bufsize
        self._there, self._back = _Direction(a, b), _Direction(b, a)
        #: Looks after the end that has said all while the other goes on.
        self._watch: gevent.Greenlet[..., None] | None = None
        #: When it was made, on the monotonic clock.
        self.began = time.monotonic()
        #: What broke first; None while all is well.
        self.error: BaseException | None = None

    @property
    def sent(self) -> int:
        """Bytes passed from `a` to `b`."""
        return self._there.passed

    @property
    def received(self) -> int:
        """Bytes passed from `b` to `a`."""
        return self._back.passed

    def run(self) -> tuple[int, int]:
        """Pass bytes until both directions have ended; to be called once."""
        back = gevent.spawn(self._pass, self._back)
        try:
            for end in (self.a, self.b):
                _prepare(end)
            self._pass(self._there)
            back.join()
        except BaseException as error:
            self._break(error)
            raise
        finally:
            for greenlet in (back, self._watch):
                if greenlet is not None:
                    greenlet.kill(block=False)
            for end in (self.a, self.b):
                with contextlib.suppress(OSError):
                    end.close()
        if self.error is not None:
            raise self.error
        return self.sent, self.received

    def cut(self) -> None:
        """Break both ends, as if one had broken. Does not wait for :meth:`run`, which raises ConnectionAbortedError."""
        self._break(ConnectionAbortedError(errno.ECONNABORTED, "the tunnel was cut on this side"))

    def _pass(self, direction: _Direction) -> None:
        """One direction to its end."""
        try:
            direction.copy(self._bufsize)
        except OSError as error:
            self._break(error)
            return
        other = self._back if direction is self._there else self._there
        if other.has_ended:
            if self._watch is not None:
                self._watch.kill(block=False)
        elif _is_tls(self.a) or _is_tls(self.b):
            # That cannot be told to the peer alone: it is the end of all.
            for end in (self.a, self.b):
                end.close()
        else:
            self._watch = gevent.spawn(self._look_after, direction.source)

    def _look_after(self, end: Any) -> None:
        """Nobody reads from it any more, and perhaps nobody writes to it for long: notice if it breaks."""
        if _wait_broken(end):
            self._break(ConnectionResetError(errno.ECONNRESET, os.strerror(errno.ECONNRESET)))

    def _break(self, error: BaseException) -> None:
        if self.error is None:
            self.error = error
            for end in (self.a, self.b):
                reset(end)

    def __repr__(self) -> str:
        return f"<geyamux.tunnel.Splice of {self.a!r} and {self.b!r}: {self.sent} sent, {self.received} received>"


class _Direction:
    """What goes from one end to the other."""

    __slots__ = ("has_ended", "passed", "sink", "source")

    def __init__(self, source: Any, sink: Any) -> None:
        self.source, self.sink = source, sink
        self.passed = 0
        self.has_ended = False

    def copy(self, bufsize: int) -> None:
        """Pass all, and then the end of it."""
        recv, sendall = self.source.recv, self.sink.sendall
        while data := recv(bufsize):
            sendall(data)
            self.passed += len(data)
        self.has_ended = True
        if not _is_tls(self.sink):
            self.sink.shutdown(stdlib_socket.SHUT_WR)


def _is_tls(end: Any) -> bool:
    return isinstance(end, gevent.ssl.SSLSocket)


def _prepare(end: Any) -> None:
    """Let it wait for as long as it takes; of a TCP connection, send at once and notice a peer that has vanished."""
    if hasattr(end, "settimeout"):
        end.settimeout(None)
    if getattr(end, "family", None) in (stdlib_socket.AF_INET, stdlib_socket.AF_INET6):
        # A connection that is gone is found out when it is used; a system may lack one of them.
        with contextlib.suppress(OSError):
            end.setsockopt(stdlib_socket.IPPROTO_TCP, stdlib_socket.TCP_NODELAY, 1)
            end.setsockopt(stdlib_socket.SOL_SOCKET, stdlib_socket.SO_KEEPALIVE, 1)
            for name, value in _TCP_KEEPALIVE.items():
                if hasattr(stdlib_socket, name):
                    end.setsockopt(stdlib_socket.IPPROTO_TCP, getattr(stdlib_socket, name), value)


def reset(end: Any) -> None:
    """Close an end so that its peer sees that it broke: RST, of the stream or of the TCP connection.

    A stream has a second to send what was written before, so this may wait; a socket has sent it already.
    """
    if hasattr(end, "reset"):
        with contextlib.suppress(OSError, ValueError), gevent.Timeout(_LAST_BYTES, False):  # type: ignore[arg-type]
            end.flush()
        end.reset()
        return
    with contextlib.suppress(OSError, AttributeError):
        end.setsockopt(stdlib_socket.SOL_SOCKET, stdlib_socket.SO_LINGER, _NO_LINGER)
    with contextlib.suppress(OSError):
        end.close()


def _wait_broken(end: Any) -> bool:
    """Wait for the end of what has nothing more to say; True when it broke, False where nobody can tell."""
    if isinstance(end, Stream):
        end.join()
        return end.stats().state == "RESET" or end.session.closed
    if not isinstance(end, gevent.socket.socket) or not hasattr(select, "epoll"):
        return False
    # A socket that has come to its end is readable for ever. Without an interest epoll tells of errors alone, and a
    # descriptor of epoll is readable when it has something to tell.
    with contextlib.suppress(OSError), select.epoll() as epoll:
        epoll.register(end.fileno(), 0)
        gevent.socket.wait_read(epoll.fileno())
        # EPOLLHUP alone: both directions have ended in good order.
        return any(event & select.EPOLLERR for _, event in epoll.poll(0))
    return False
