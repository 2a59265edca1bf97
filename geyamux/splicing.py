"""Join two ends, so that what comes from one goes to the other.

An end is a :class:`~geyamux.Stream`, a gevent socket, or anything with ``recv``, ``sendall``, ``shutdown`` and ``close``.
What ends on one side in good order ends so on the other; what breaks on one side is broken on the other: never is a torn
connection taken for a whole one.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import select
import socket as stdlib_socket
import struct
import termios
import time
from typing import Any

import gevent
import gevent.socket
import gevent.ssl
from gevent.event import Event

from .stream import Stream
from .waiting import Deadline

__all__ = ["BUFSIZE", "Splice", "reset", "splice"]

#: Of what is read at once, in bytes.
BUFSIZE = 65536

#: So many portions go between two sockets before others have their turn; gevent looks at timers after fifty such turns.
_TURN = 4

#: What was sent before a reset may take so long to leave, in seconds.
_LAST_BYTES = 1.0

#: A direction that goes on for longer than this after the other's end is worth looking after; most don't. In seconds.
_SOON = 0.1

#: How often the system is asked meanwhile, in seconds.
_GLANCE = 0.005

#: TCP_INFO of a connection that is no more: nothing leaves it.
_TCP_CLOSE = 7

#: SO_LINGER: close with a reset; close in good order.
_RESET, _FINISH = struct.pack("ii", 1, 0), struct.pack("ii", 0, 0)

#: A TCP peer that is gone without a word is asked after so many silent seconds; the system gives it up minutes later.
_TCP_KEEPALIVE = 60


def splice(a: Any, b: Any, *, bufsize: int = BUFSIZE) -> tuple[int, int]:
    """Pass bytes between `a` and `b` until both directions have ended; return how many went from `a` to `b`, and back.

    Both ends belong to it: they are closed when it returns or raises. Each direction ends by itself: an end of file
    goes on as a half-close, and the other direction lives as long as it likes. (Only a TLS socket can't be told of one:
    what would end towards it alone ends both directions.) What breaks on one side is broken on the other, behind the
    bytes that came before, if they leave within a second: a stream is reset, a TCP connection too. (A Unix socket knows
    no reset: its peer reads an end of file.)

    Blocks, for as long as both ends live. Raises what broke first: an ``OSError`` of a socket or of a stream
    (:class:`~geyamux.StreamReset`, :class:`~geyamux.SessionError`). A kill or a ``gevent.Timeout`` breaks both at once.

    Not guaranteed: that what was passed on has been read; that a source that breaks while its bytes wait for a slow
    reader is noticed before they have gone. Timeouts of the ends are set to None.
    """
    return Splice(a, b, bufsize=bufsize).run()


class Splice:
    """Two ends that are joined by :meth:`run`, with counts that may be read meanwhile. See :func:`splice`."""

    __slots__ = ("_back", "_bufsize", "_over", "_there", "_watch", "a", "b", "began", "error")

    def __init__(self, a: Any, b: Any, *, bufsize: int = BUFSIZE) -> None:
        if bufsize < 1:
            raise ValueError(f"bufsize={bufsize}: nothing can be read into that")
        #: The ends, as they were given.
        self.a, self.b = a, b
        self._bufsize = bufsize
        self._there, self._back = _Direction(a, b), _Direction(b, a)
        #: Looks after the end that has said all while the other goes on.
        self._watch: gevent.Greenlet[..., None] | None = None
        #: Both directions have ended, or something broke. What follows is the work of `run` alone.
        self._over = Event()
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
        there, back = self._there, self._back
        try:
            for end in (self.a, self.b):
                _prepare(end)
            there.greenlet = gevent.spawn(self._pass, there, back)
            back.greenlet = gevent.spawn(self._pass, back, there)
            self._over.wait()
        except BaseException as error:
            self._fail(error)
            raise
        finally:
            self._let_go()
        if self.error is not None:
            raise self.error
        return self.sent, self.received

    def cut(self) -> None:
        """Break both ends, as if one had broken: :meth:`run` raises ConnectionAbortedError. Never blocks."""
        if not self._over.is_set():
            self._fail(ConnectionAbortedError(errno.ECONNABORTED, "the tunnel was cut on this side"))

    def _pass(self, direction: _Direction, other: _Direction) -> None:
        """One direction to its end."""
        try:
            direction.copy(self._bufsize)
            if self.error is None:
                # Else it may be no end: a write that failed takes the error away from the reads after it.
                direction.end()
        except BaseException as error:
            if self._over.is_set():
                return
            if direction.is_sending and self.error is None:
                # What came from there before it broke can still be read.
                self.error = error
                _join(other.greenlet, _LAST_BYTES)
            self._fail(error)
            return
        if other.has_ended or self.error is not None or _is_tls(direction.sink):
            self._over.set()
        else:
            self._watch = gevent.spawn_later(_SOON, self._look_after, direction, other)

    def _look_after(self, ended: _Direction, other: _Direction) -> None:
        """Nobody reads from its source any more, and perhaps nobody writes there for long: notice if it breaks."""
        error = _wait_broken(ended.source)
        if error is not None and not other.has_ended:
            self._fail(error)

    def _fail(self, error: BaseException) -> None:
        self.error = self.error or error
        self._over.set()

    def _let_go(self) -> None:
        """Close both ends, so that nobody takes for whole what was cut."""
        greenlets = (self._there.greenlet, self._back.greenlet, self._watch)
        # Who is killed is in a hurry.
        patience = _LAST_BYTES if self.error is None or isinstance(self.error, OSError) else 0.0
        try:
            gevent.killall([greenlet for greenlet in greenlets if greenlet is not None and not greenlet.ready()])
        finally:
            try:
                self._let_go_of_sink(self._there, patience)
            finally:
                self._let_go_of_sink(self._back, patience)

    def _let_go_of_sink(self, direction: _Direction, patience: float) -> None:
        if self.error is None and not direction.is_sending:
            _close(direction.sink)
        else:
            reset(direction.sink, patience)

    def __repr__(self) -> str:
        return f"<geyamux.tunnel.Splice of {self.a!r} and {self.b!r}: {self.sent} sent, {self.received} received>"


class _Direction:
    """What goes from one end to the other."""

    __slots__ = ("greenlet", "has_ended", "is_sending", "passed", "sink", "source")

    def __init__(self, source: Any, sink: Any) -> None:
        self.source, self.sink = source, sink
        self.passed = 0
        #: All was passed.
        self.has_ended = False
        #: It works at its sink, or stopped there.
        self.is_sending = False
        self.greenlet: gevent.Greenlet[..., None] | None = None

    def copy(self, bufsize: int) -> None:
        """Pass all that comes."""
        recv, sendall, turn = self.source.recv, self.sink.sendall, 0
        # Two fast sockets never wait; a stream sees to it by itself that others have their turn.
        is_greedy = not (isinstance(self.source, Stream) or isinstance(self.sink, Stream))
        while data := recv(bufsize):
            self.is_sending = True
            sendall(data)
            self.is_sending = False
            self.passed += len(data)
            turn += 1
            if is_greedy and not turn % _TURN:
                gevent.sleep(0)

    def end(self) -> None:
        """Pass on that this was all."""
        self.has_ended = self.is_sending = True
        if not _is_tls(self.sink):
            self.sink.shutdown(stdlib_socket.SHUT_WR)
        self.is_sending = False


def _is_tls(end: Any) -> bool:
    return isinstance(end, gevent.ssl.SSLSocket)


def _is_tcp(end: Any) -> bool:
    return getattr(end, "family", None) in (stdlib_socket.AF_INET, stdlib_socket.AF_INET6)


def _prepare(end: Any) -> None:
    """Let it wait for as long as it takes; of a TCP connection, send at once and notice a peer that has vanished.

    Until it ends in good order a TCP connection is one to be reset: if this process is killed the system closes it, and
    what was cut must not look whole.
    """
    if hasattr(end, "settimeout"):
        end.settimeout(None)
    if _is_tls(end):
        # Else a connection that was cut reads like one that ended.
        end.suppress_ragged_eofs = False
    if _is_tcp(end):
        # A connection that is gone is found out when it is used; a system may lack one of them.
        with contextlib.suppress(OSError):
            end.setsockopt(stdlib_socket.SOL_SOCKET, stdlib_socket.SO_LINGER, _RESET)
            end.setsockopt(stdlib_socket.IPPROTO_TCP, stdlib_socket.TCP_NODELAY, 1)
            end.setsockopt(stdlib_socket.SOL_SOCKET, stdlib_socket.SO_KEEPALIVE, 1)
            if hasattr(stdlib_socket, "TCP_KEEPIDLE"):
                end.setsockopt(stdlib_socket.IPPROTO_TCP, stdlib_socket.TCP_KEEPIDLE, _TCP_KEEPALIVE)


def _close(end: Any) -> None:
    """Close what has ended in good order."""
    try:
        if _is_tls(end):
            # close_notify, and the peer's: closed before its last bytes came, the connection would be reset.
            with contextlib.suppress(OSError, ValueError), _limit(_LAST_BYTES):
                end.unwrap()
    finally:
        if _is_tcp(end):
            with contextlib.suppress(OSError):
                end.setsockopt(stdlib_socket.SOL_SOCKET, stdlib_socket.SO_LINGER, _FINISH)
        with contextlib.suppress(OSError):
            end.close()


def reset(end: Any, patience: float = _LAST_BYTES) -> None:
    """Close an end so that its peer sees that it broke: RST, of the stream or of the TCP connection.

    What was written before has `patience` seconds to leave, so this may wait.
    """
    if hasattr(end, "reset"):
        try:
            with contextlib.suppress(OSError, ValueError), _limit(patience):
                end.flush()
        finally:
            end.reset()
        return
    try:
        with contextlib.suppress(OSError, AttributeError):
            _wait_sent(end, Deadline(patience))
            end.setsockopt(stdlib_socket.SOL_SOCKET, stdlib_socket.SO_LINGER, _RESET)
    finally:
        with contextlib.suppress(OSError):
            end.close()


def _limit(seconds: float) -> gevent.Timeout:
    """A silent one."""
    return gevent.Timeout(seconds, False)  # type: ignore[arg-type]


def _join(greenlet: gevent.Greenlet[..., None] | None, seconds: float) -> None:
    if greenlet is not None:
        greenlet.join(seconds)


def _wait_sent(sock: Any, deadline: Deadline) -> None:
    """A reset drops what the peer's system has not acknowledged. The system tells nobody when it has, so it is asked."""
    while _has_unsent(sock) and deadline.left():
        gevent.sleep(min(_GLANCE, deadline.left()))


def _has_unsent(sock: Any) -> bool:
    # Only Linux tells.
    if not _is_tcp(sock) or not hasattr(stdlib_socket, "TCP_INFO"):
        return False
    if sock.getsockopt(stdlib_socket.IPPROTO_TCP, stdlib_socket.TCP_INFO, 1)[0] == _TCP_CLOSE:
        return False
    return any(fcntl.ioctl(sock.fileno(), termios.TIOCOUTQ, bytes(4)))


def _wait_broken(end: Any) -> OSError | None:
    """Wait for the end of what has nothing more to say; return what broke it. None, and soon, where nobody can tell."""
    if isinstance(end, Stream):
        end.join()
        try:
            end.wait_established(0)
        except OSError as error:
            return error
        return None
    if not isinstance(end, gevent.socket.socket) or not hasattr(select, "epoll"):
        return None
    # A socket that has come to its end is readable for ever. Without an interest epoll tells of the end of both
    # directions alone, and a descriptor of epoll is readable when it has something to tell.
    with contextlib.suppress(OSError), select.epoll() as epoll:
        epoll.register(end.fileno(), 0)
        gevent.socket.wait_read(epoll.fileno())
        return ConnectionResetError(errno.ECONNRESET, os.strerror(errno.ECONNRESET))
    return None
