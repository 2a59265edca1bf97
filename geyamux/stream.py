"""What users hold: one stream of a session, a file and a socket at once, on one buffer.

So ``readline()`` and ``recv()`` mix safely, which they do not on a socket and its ``makefile()``. The work is done in
:mod:`geyamux.duplex`; here are the names, the arguments and what is promised.

Longer than other modules because a file and a socket have that many methods, each with its promise.
"""

from __future__ import annotations

import errno
import io
import socket
from collections.abc import Callable, Iterable
from types import TracebackType
from typing import Any, NoReturn

from . import fileobj
from .duplex import (
    _NEVER_WAIT,
    CLOSED,
    ORPHANED,
    RELEASED,
    Duplex,
    Link,
    _pack,
    _take,
    _take_line,
)
from .frame import DATA, INITIAL_WINDOW
from .stats import StreamStats
from .waiting import Deadline, get_thread, may_act, timed_out

__all__ = ["Stream"]

_ErrorType = type[BaseException]  # `type` is a property inside the class
_NO_FLAGS_TEXT = "only 0 and MSG_PEEK make sense as flags of a stream"


class Stream(Duplex):
    """One bidirectional byte stream of a session. Made by ``Session.open`` and ``Session.accept``.

    It is an ``io.BufferedIOBase`` whose methods have the whole contract (``read(n)`` gives n bytes or all up to EOF),
    and it has the methods of a socket. Both work on the same buffer.

    *Blocking.* Reads wait for bytes, the peer's FIN, a reset or the end of the session; writes wait for the peer's
    credit and for room in the session. Every wait honours ``settimeout``, and may be ended by a kill or a
    ``gevent.Timeout``, which leaves nothing behind. Several greenlets may read or write one stream: each call gets or
    sends contiguous bytes, first come first served.

    *Errors.* ``TimeoutError`` (the stream is fine: try again), ``BlockingIOError`` after ``settimeout(0)``,
    :class:`~geyamux.StreamReset` (given up by one side: open another), :class:`~geyamux.StreamClosed` (used after close
    or shutdown here: a bug of the caller) and :class:`~geyamux.SessionError` (the connection is gone: reconnect). A
    connection that ends without the peer's FIN is never an EOF: what was buffered is still read, then the error comes.

    *Not guaranteed.* That bytes written have reached the peer's application; only its answer tells.
    """

    __slots__ = ()

    # -- about it

    @property
    def established(self) -> bool:
        """The peer has answered to the stream, if only with a refusal, or has opened it.

        Some peers do so only with their first data. Whether it took the stream, :meth:`wait_established` tells.
        """
        return self._life.acknowledged

    @property
    def family(self) -> int:
        """AF_UNSPEC: a stream has no address family of its own, so code that sets TCP options leaves it alone."""
        return int(socket.AF_UNSPEC)

    @property
    def type(self) -> int:
        """SOCK_STREAM."""
        return int(socket.SOCK_STREAM)

    @property
    def proto(self) -> int:
        """0."""
        return 0

    @property
    def closed(self) -> bool:
        """``close`` was called here."""
        return bool(self._marks & CLOSED)

    @property
    def _closed(self) -> bool:
        # paramiko and others look at this attribute of sockets.
        return bool(self._marks & CLOSED)

    def getsockname(self) -> Any:
        """The connection's own address, or ``("yamux", stream_id)`` where it has none."""
        return self._address("getsockname")

    def getpeername(self) -> Any:
        """The address of the connection's peer, or ``("yamux", stream_id)`` where it has none."""
        return self._address("getpeername")

    def _address(self, name: str) -> Any:
        # A Unix socket without a name says "", which tells nobody anything.
        return getattr(self.session, name)() or ("yamux", self.stream_id)

    def stats(self) -> StreamStats:
        """Return a snapshot of counts, sizes and waits, for watching. Never blocks.

        Any thread may ask, also when all is over. In another thread than the session's a count may be off by what is just
        changing, and need not be monotonic.
        """
        buffer, account = self._buffer, self._account()
        limit = self._receive_limit() if buffer is None else buffer.limit
        window = limit - self._taken - self._unread if buffer is None else buffer.window
        return StreamStats(
            stream_id=self.stream_id,
            state=self._life.name,
            bytes_sent=INITIAL_WINDOW + account.credited - self._credit,
            bytes_received=account.granted + limit - window,
            unread=self._unread,
            receive_window=window,
            receive_limit=limit,
            send_credit=self._credit,
            is_queued=self._position > self._outbox.taken and not self._life.is_reset and not self._marks & ORPHANED,
            blocked=account.blocked + self._owner.ledger.waiting(self),
            readers=len(self._readers or ()) + (self._greenlet is not None),
            writers=len(self._writers or ()),
        )

    def __repr__(self) -> str:
        """State and what is unusual: unread bytes, no credit, who waits, that it was closed."""
        try:
            return f"<geyamux.Stream {self.stream_id} of {self.session.name}: {', '.join(self._facts())}>"
        except AttributeError:
            return "<geyamux.Stream, not made yet>"

    def _facts(self) -> list[str]:
        facts = [self._life.name]
        reset = None if self._rare is None else self._rare.reset
        if reset is not None:
            facts[0] += f" by {'the peer' if reset[1] else 'this side'} (code {reset[0]})"
        elif self._life.is_reset:
            facts[0] += " by the end of the session"
        if self._unread:
            facts.append(f"{self._unread} unread")
        if self._writers:
            facts.append(f"{len(self._writers)} writing")
        if not self._credit and self._life.can_send:
            facts.append("no credit")
        if self._marks & ORPHANED:
            facts.append("session ended")
        if self._marks & CLOSED:
            facts.append("closed")
        return facts

    # -- reading as a file

    def readable(self) -> bool:
        """True; ValueError after close, as for every file."""
        self._check_file()
        return True

    def read(self, size: int | None = -1, /) -> bytes:
        """Return exactly `size` bytes, fewer only at EOF; without a size, all up to EOF.

        When a timeout or a kill strikes before that, the bytes stay first in line for the next read.
        """
        self._check_file()
        size = -1 if size is None else size
        return b"" if size == 0 else self._read_full(size, _take)

    def read1(self, size: int = -1, /) -> bytes:
        """Return 1 to `size` bytes as soon as any are there; b"" at EOF."""
        self._check_file()
        return b"" if size == 0 else self._read(_limit(size))

    def readinto(self, buffer: Any, /) -> int:
        """Fill `buffer`, less only at EOF; return how many bytes came."""
        self._check_file()
        with _writable_view(buffer) as view:
            data = self._read_full(len(view), _take) if len(view) else b""
            view[: len(data)] = data
        return len(data)

    def readinto1(self, buffer: Any, /) -> int:
        """Put bytes into `buffer` as soon as any are there; return how many, 0 at EOF."""
        self._check_file()
        return self.recv_into(buffer)

    def peek(self, size: int = 0, /) -> bytes:
        """Return bytes without taking them, as soon as any are there; b"" at EOF. At most `size` where that is given."""
        self._check_file()
        return self._peek(_limit(size or -1))

    def readline(self, size: int | None = -1, /) -> bytes:
        """Return bytes to the next newline, `size` at most, or to EOF. What a timeout cuts short stays first in line."""
        self._check_file()
        size = -1 if size is None else size
        return b"" if size == 0 else self._read_full(size, _take_line)

    def readlines(self, hint: int | None = -1, /) -> list[bytes]:
        """Return lines up to EOF, or until they have `hint` bytes."""
        lines: list[bytes] = []
        total = 0
        for line in self:
            lines.append(line)
            total += len(line)
            if hint is not None and 0 < hint <= total:
                break
        return lines

    def __iter__(self) -> Stream:
        self._check_file()
        return self

    def __next__(self) -> bytes:
        line = self.readline()
        if not line:
            raise StopIteration
        return line

    # -- writing as a file

    def writable(self) -> bool:
        """True; ValueError after close, as for every file."""
        self._check_file()
        return True

    def write(self, data: Any, /) -> int:
        """Send all of `data` as ``sendall`` does; return its size in bytes."""
        self._check_file()
        with _view(data) as view:
            size = len(view)
            self._sendall(view)
        return size

    def writelines(self, lines: Iterable[Any], /) -> None:
        """Write each of `lines`."""
        self._check_file()
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        """Return when the connection has taken all that was written here before.

        Nothing has to be flushed for it to leave: it leaves by itself at the next switch to the hub. Raises as a write
        does where the bytes can't go any more.
        """
        self._check_file()
        self._check_thread()
        position = self._position
        if self._is_taken(position):
            return
        self._outbox.flush_nowait()
        deadline = self._deadline()
        if deadline is not _NEVER_WAIT:
            self._follow(lambda: self._is_taken(position) or self._is_broken(), deadline, position)
        if not self._is_taken(position):
            self._check_usable()
            if self._owner.reason is not None:
                raise self._session_error()
            if deadline is _NEVER_WAIT:
                raise BlockingIOError(errno.EAGAIN, "the connection has not taken everything yet")
            raise timed_out()

    def _is_taken(self, position: int) -> bool:
        return position <= self._outbox.taken and not self._life.is_reset

    # -- what files have and a stream can't

    def seekable(self) -> bool:
        """False."""
        self._check_file()
        return False

    def isatty(self) -> bool:
        """False."""
        self._check_file()
        return False

    def fileno(self) -> NoReturn:
        """A stream has no descriptor. For ``select`` and selectors, pass its bytes through a socketpair."""
        raise io.UnsupportedOperation("fileno: a stream has no descriptor of its own")

    def detach(self) -> NoReturn:
        """There is nothing below a stream that could be detached."""
        raise io.UnsupportedOperation("detach")

    def dup(self) -> NoReturn:
        """A stream can't be duplicated. (simple-websocket goes on without, on just this error.)"""
        raise NotImplementedError("a stream can't be duplicated")

    def __reduce__(self) -> NoReturn:
        raise TypeError(f"cannot pickle {self!r}")

    # -- reading as a socket

    def recv(self, bufsize: int, flags: int = 0) -> bytes:
        """Return 1 to `bufsize` bytes as soon as any are there; b"" only at EOF. MSG_PEEK leaves them in place."""
        if bufsize <= 0:
            if bufsize < 0:
                raise ValueError("negative buffersize in recv")
            self._check_socket()
            return b""
        if flags:
            if flags != socket.MSG_PEEK:
                raise OSError(errno.EOPNOTSUPP, _NO_FLAGS_TEXT)
            return self._peek(bufsize)
        return self._read(bufsize)

    def recv_into(self, buffer: Any, nbytes: int = 0, flags: int = 0) -> int:
        """Put 1 to `nbytes` bytes (0: as many as fit) into `buffer` as soon as any are there; 0 only at EOF."""
        with _writable_view(buffer) as view:
            if nbytes < 0 or nbytes > len(view):
                raise ValueError("buffer too small for requested bytes" if nbytes > 0 else "negative buffersize")
            data = self.recv(nbytes or len(view), flags)
            view[: len(data)] = data
        return len(data)

    def recvfrom(self, bufsize: int, flags: int = 0) -> tuple[bytes, None]:
        """``recv``, with no address: a stream has one peer."""
        return self.recv(bufsize, flags), None

    def _peek(self, size: int) -> bytes:
        deadline = self._deadline()
        turn = self._enter_readers()
        try:
            if not self._wait_readable(turn, deadline):
                return b""
            return self._make_buffer().peek(size)
        finally:
            self._leave_readers(turn)

    # -- writing as a socket

    def send(self, data: Any, flags: int = 0) -> int:
        """Send some of `data`: what goes without waiting, and at least one byte where it has any. Return how many."""
        self._check_flags(flags)
        with _view(data) as view:
            if not len(view):
                self._check_socket()
                return 0
            return self._write(view, self._deadline(), partial=True)

    def sendall(self, data: Any, flags: int = 0) -> None:
        """Send all of `data`.

        Returns when every byte is copied or taken by the connection: the buffer may be changed at once. Waits for the
        peer's credit and for room. A ``TimeoutError`` carries ``bytes_sent``: so many of the bytes go to the peer, the
        others do not. After a kill the count is not known; the session and other streams are unharmed either way.
        """
        if flags:
            self._check_flags(flags)
        size = len(data) if type(data) is bytes else 0
        outbox, owner = self._outbox, self._owner
        if (
            0 < size <= owner.largest_small
            and size <= self._credit
            and outbox.is_easy
            and self._life.can_send
            and self._writers is None
            and get_thread() == owner.thread
        ):
            # The straight road of a small message: no wait, no view.
            self._credit -= size
            self._position = outbox.append(_pack(0, DATA, 0, self.stream_id, size) + data)
            return
        with _view(data) as view:
            self._sendall(view)

    def _sendall(self, view: memoryview) -> None:
        if len(view):
            self._write(view, self._deadline())
        else:
            self._check_socket()

    # -- the socket's settings

    @property
    def timeout(self) -> float | None:
        """What ``gettimeout`` returns."""
        return self._timeout

    def settimeout(self, timeout: float | None) -> None:
        """Let blocking calls raise ``TimeoutError`` after so many seconds; None: never; 0: BlockingIOError at once.

        Calls that wait already keep the limit they began with.
        """
        if timeout is not None:
            if not hasattr(timeout, "__float__"):
                raise TypeError("a float is required")
            timeout = float(timeout)
            if not timeout >= 0:
                raise ValueError("Timeout value out of range")
        self._timeout = timeout

    def gettimeout(self) -> float | None:
        """The limit of blocking calls in seconds; None where there is none."""
        return self._timeout

    def setblocking(self, flag: bool) -> None:
        """True is ``settimeout(None)``, False ``settimeout(0)``."""
        self._timeout = None if flag else 0.0

    def getblocking(self) -> bool:
        """False after ``settimeout(0)``."""
        return self._timeout != 0

    def setsockopt(self, *args: Any) -> None:
        """Nothing: a stream has no options, and code that sets TCP_NODELAY must not fail."""

    def getsockopt(self, *args: Any) -> int | bytes:
        """0, but SO_TYPE and SO_ERROR are answered truly; zero bytes where a buffer size is given."""
        if args[:2] == (socket.SOL_SOCKET, socket.SO_TYPE):
            return int(socket.SOCK_STREAM)
        if args[:2] == (socket.SOL_SOCKET, socket.SO_ERROR):
            broken = self._life.is_reset or self._owner.reason is not None
            return errno.ECONNRESET if broken else 0
        return bytes(args[2]) if len(args) > 2 else 0

    # -- ends

    def shutdown(self, how: int) -> None:
        """SHUT_WR: send FIN behind all data, reading goes on. SHUT_RD: drop what is unread and what comes. Never blocks.

        Raises :class:`~geyamux.StreamClosed` after close.
        """
        if how not in (socket.SHUT_RD, socket.SHUT_WR, socket.SHUT_RDWR):
            raise ValueError(f"shutdown takes SHUT_RD, SHUT_WR or SHUT_RDWR, not {how!r}")
        self._check_thread()
        self._check_socket()
        if how != socket.SHUT_RD:
            self._finish()
        if how != socket.SHUT_WR:
            self._shut_read()

    def close_write(self) -> None:
        """Half-close: ``shutdown(SHUT_WR)``. The peer reads EOF behind all data; reading goes on as long as it likes."""
        self.shutdown(socket.SHUT_WR)

    def close(self) -> None:
        """Be done with both directions. Never blocks, may be called again, from the hub, and from any thread.

        What was written still goes, then FIN; what is unread is dropped. A peer that goes on sending gets a reset after
        one window more. While files from ``makefile`` are open the stream stays open for them. After it, file methods
        raise ValueError and socket methods :class:`~geyamux.StreamClosed` (EBADF).

        From another thread, and from a finaliser or signal handler that interrupted this package at its work, it is
        handed to the hub and done in its next turn.
        """
        self._do(self._close)
        if not self._marks & CLOSED and get_thread() == self._owner.thread:
            self._marks |= CLOSED  # the rest is done in the next turn

    def _close(self) -> None:
        self._marks |= CLOSED
        if self._io_refs <= 0 and not self._marks & RELEASED:
            self._release()

    def reset(self, code: int = 0) -> None:
        """Give the stream up: what is queued is dropped, the peer's reads and writes fail at once. Never blocks.

        `code` (0 to 2**32-1) travels along; most peers ignore it. Afterwards reads and writes here raise
        :class:`~geyamux.StreamReset`. Of a stream that has ended already the peer hears nothing. May be called from
        wherever :meth:`close` may.
        """
        if not 0 <= code <= 0xFFFF_FFFF:
            raise ValueError(f"a reset code is 0 .. 2**32-1, not {code}")
        self._do(self._give_up, code)

    def _give_up(self, code: int) -> None:
        self._abandon(code, "application")
        self._lose_unread()
        self._drop_claim()

    def _give_up_and_close(self) -> None:
        self._give_up(0)
        self._close()

    def _do(self, step: Callable[..., None], *args: Any) -> None:
        """At once, or where that is not safe, in the hub's next turn."""
        if may_act(self._owner.thread):
            step(*args)
            return
        loop = self._outbox.lane.hub.loop
        if loop is not None:  # else the hub was destroyed, and the session with it
            loop.run_callback_threadsafe(step, *args)

    def __enter__(self) -> Stream:
        self._check_file()
        return self

    def __exit__(self, kind: _ErrorType | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        """``close``; on an exception ``reset``, so that nobody takes a torn body for a whole one."""
        self._do(self._close if kind is None else self._give_up_and_close)

    def __del__(self) -> None:
        # IOBase's own finaliser would call close(). A stream is only collected when its session has let go of it, so
        # nothing is left to send; but it may still be counted.
        try:
            if not self._marks & RELEASED:
                self._do(self._close)
        except AttributeError:  # __init__ did not come to its end
            pass

    # -- makefile

    def makefile(
        self,
        mode: str = "r",
        buffering: int | None = None,
        *,
        encoding: str | None = None,
        errors: str | None = None,
        newline: str | None = None,
    ) -> Any:
        """A file object with a life of its own, as ``socket.makefile``: the stream closes when it and all of them have.

        Its buffer is its own; the stream's file methods need none.
        """
        self._check_socket()
        return fileobj.makefile(self, mode, buffering, encoding, errors, newline)

    def _decref_socketios(self) -> None:
        # socket.SocketIO and urllib3's SSLTransport call this.
        if self._io_refs > 0:
            self._io_refs -= 1
        if self._marks & CLOSED:
            self._do(self._close)

    # -- gevent

    def wait_established(self, timeout: float | None = None) -> bool:
        """Wait until the peer has acknowledged the stream; False when `timeout` seconds pass first.

        Raises what ended the stream or the session. Do not wait for it before writing: some peers acknowledge only
        with their first answer.
        """
        self._check_thread()
        self._follow(lambda: self._life.acknowledged or self._is_broken(), Deadline.after(timeout))
        self._check_usable()
        return self._life.acknowledged

    def join(self, timeout: float | None = None) -> bool:
        """Wait until the stream has ended: in good order on both sides, by a reset, or with its session.

        False when `timeout` seconds pass first. Who has read to EOF and works on the answer learns only so that nobody
        wants it any more.
        """
        self._check_thread()
        self._follow(self._has_ended, Deadline.after(timeout))
        return self._has_ended()

    def ready(self) -> bool:
        """A read would not wait: bytes, EOF or an error are there."""
        return self._is_ready()

    def rawlink(self, callback: Link) -> None:
        """Call ``callback(stream)`` in the hub, once, when the stream is ready. For ``gevent.wait`` and ``iwait``."""
        self._check_thread()
        self._await_nothing()
        self._have_rare().links.append(callback)
        if self._is_ready():
            self._schedule_links()

    def unlink(self, callback: Link) -> None:
        """Take back a ``rawlink``; unknown callbacks are fine."""
        if callback in self._links:
            self._links.remove(callback)
            self._drop_rare()

    # -- checks

    def _check_file(self) -> None:
        if self._marks & CLOSED:
            raise ValueError("I/O operation on closed file.")

    def _check_socket(self) -> None:
        if self._marks & RELEASED:
            self._check_usable()

    def _check_flags(self, flags: int) -> None:
        # MSG_NOSIGNAL is meant well, and a stream sends no signals.
        if flags & ~getattr(socket, "MSG_NOSIGNAL", 0):
            raise OSError(errno.EOPNOTSUPP, "no flags make sense when sending on a stream")


def _limit(size: int) -> int:
    return size if size > 0 else 1 << 62


def _view(data: Any) -> memoryview:
    """The bytes of any C-contiguous buffer."""
    view = memoryview(data)
    if not view.c_contiguous:
        view.release()
        raise BufferError("the buffer is not C-contiguous")
    return view if view.format == "B" and view.ndim == 1 else _cast(view)


def _writable_view(buffer: Any) -> memoryview:
    view = _view(buffer)
    if view.readonly:
        view.release()
        raise TypeError(f"a read-write bytes-like object is required, not {type(buffer).__name__!r}")
    return view


def _cast(view: memoryview) -> memoryview:
    if view.nbytes == 0:
        return memoryview(bytearray())
    return view.cast("B")
