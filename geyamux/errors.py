"""The exceptions of geyamux, in one tree.

::

    YamuxError(Exception)
        ConfigError(ValueError)                  what the caller set makes no sense: correct it
        SessionError(ConnectionError)            the session is gone: reconnect
            SessionClosed                        closed here, or by the peer in good order
            ProtocolError                        the peer broke the protocol: report it to its authors
            RemoteError                          the peer said GoAway with another code than 0; see .code
            KeepaliveTimeout                     nothing was heard from the peer
            WriteTimeout                         the connection took no bytes
            TransportError                       the connection broke
        RemoteGoAway(ConnectionRefusedError)     the peer takes no new streams: use what is open, or reconnect
        StreamsExhausted(OSError)                every stream id of this side is used up: reconnect
        StreamError(ConnectionError)             this stream is gone, its session may live on
            StreamReset(ConnectionResetError)    given up by one side; see .code and .remote
            StreamClosed(BrokenPipeError)        used after close or shutdown on this side: a bug of the caller

Every class but the first two is an ``OSError`` whose first argument is an ``errno``, so that code written for sockets
(and gevent.pywsgi, which looks at ``args[0]``) treats it as it treats the errors of a socket. A time limit that passes
is the built-in ``TimeoutError("timed out")``.

Each raise makes a fresh object, chained (``__cause__``) to the reason why the session ended: one object raised many
times would collect the tracebacks of them all.
"""

from __future__ import annotations

import errno
from typing import Any

__all__ = [
    "ConfigError",
    "KeepaliveTimeout",
    "ProtocolError",
    "RemoteError",
    "RemoteGoAway",
    "SessionClosed",
    "SessionError",
    "StreamClosed",
    "StreamError",
    "StreamReset",
    "StreamsExhausted",
    "TransportError",
    "WriteTimeout",
    "YamuxError",
]


class YamuxError(Exception):
    """The root of every error that geyamux defines."""

    def __reduce__(self) -> tuple[Any, ...]:
        # The arguments of the constructors are not those of OSError, which copy and pickle would pass.
        return _rebuild, (type(self), self.args, self.__dict__)


class ConfigError(YamuxError, ValueError):
    """A value in :class:`geyamux.Config` makes no sense; the text names it and says why."""


class SessionError(YamuxError, ConnectionError):
    """The session is gone and all its streams with it. ``__cause__`` says why; open a new connection."""

    def __init__(self, message: str) -> None:
        super().__init__(errno.ECONNRESET, message)

    @property
    def message(self) -> str:
        """The text without the errno."""
        return str(self.strerror)

    def again(self) -> SessionError:
        """A fresh error that says the same, chained to the root cause."""
        fresh = type(self)(self.message)
        fresh.__cause__ = self.__cause__ or self
        return fresh


class SessionClosed(SessionError):
    """The session was closed on this side, or by the peer in good order."""


class ProtocolError(SessionError):
    """The peer broke the protocol; the text says how. The connection has been told GoAway(1) and closed."""


class RemoteError(SessionError):
    """The peer ended the session with GoAway and a code other than 0."""

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        #: The code of the GoAway frame: 1 is a protocol error, 2 an internal error, others are the peer's own.
        self.code = code

    def again(self) -> RemoteError:
        fresh = RemoteError(self.message, self.code)
        fresh.__cause__ = self
        return fresh


class KeepaliveTimeout(SessionError):
    """Nothing was heard from the peer for ``keepalive_timeout`` after a keepalive ping had left."""


class WriteTimeout(SessionError):
    """Bytes waited, and the connection took none of them for ``connection_write_timeout``."""


class TransportError(SessionError):
    """The connection below broke; ``__cause__`` is its own error where it had one."""


class RemoteGoAway(YamuxError, ConnectionRefusedError):
    """The peer has said GoAway: it takes no new streams, those that are open live on."""

    def __init__(self, message: str = "the peer takes no new streams") -> None:
        super().__init__(errno.ECONNREFUSED, message)


class StreamsExhausted(YamuxError, OSError):
    """Every stream id of this side (2**31 of them) has been used on this session."""

    def __init__(self, message: str = "no stream id is left on this session") -> None:
        super().__init__(errno.EADDRNOTAVAIL, message)


class StreamError(YamuxError, ConnectionError):
    """This stream can't go on; its session may."""


class StreamReset(StreamError, ConnectionResetError):
    """The stream was given up: what was on its way in either direction may be lost."""

    def __init__(self, message: str, code: int = 0, *, remote: bool) -> None:
        super().__init__(errno.ECONNRESET, message)
        #: The code that travelled with the reset; 0 from most peers.
        self.code = code
        #: True when the peer did it, False when this side did.
        self.remote = remote


class StreamClosed(StreamError, BrokenPipeError):
    """The stream was used after ``close`` (errno EBADF), or written to after ``shutdown`` (errno EPIPE), on this side."""

    def __init__(self, message: str, code: int = errno.EBADF) -> None:
        super().__init__(code, message)


def _rebuild(kind: type[YamuxError], args: tuple[Any, ...], facts: dict[str, Any]) -> YamuxError:
    """Make an error anew from what it says, for copy and pickle."""
    error = kind.__new__(kind, *args)
    (OSError if isinstance(error, OSError) else Exception).__init__(error, *args)
    error.__dict__.update(facts)
    return error
