"""The control socket: how another process of the same user learns what a forwarder does.

A Unix socket of mode 0600. For each line that comes, whatever it says, one line goes back: the snapshot, a JSON object;
so ``echo | socat - UNIX:PATH`` will do. It is for looking alone: nothing that comes changes the forwarder.

Nor may it hold the forwarder up. What a client can make grow is limited: how many there are, for how long one may be
silent or read slowly, the length of a line, and how often a new snapshot is made, which all clients share.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import time
from collections.abc import Callable
from typing import Any

import gevent
from gevent import socket
from gevent.lock import BoundedSemaphore
from gevent.pool import Pool
from gevent.server import StreamServer

from .ends import bound, remove_stale
from .errors import CommandError
from .snapshot import FORMAT

__all__ = ["Control", "Gone", "RemoteControl", "connect"]

#: More clients wait until one of these has gone.
MOST_CLIENTS = 8

#: A line has to come and its answer to be taken within so many seconds.
PATIENCE = 30.0

#: A longer line ends the connection. There is nothing to say yet.
LONGEST_LINE = 1024

#: Who asks again sooner, in seconds, gets the same answer: asking must not cost the forwarder all its time.
FRESH = 0.1

#: After each answer others have so many seconds: for one who asks and reads fast enough nothing else would wait.
_TURN = 0.001

#: An answer is far below this: 500 streams of 400 bytes, and the sessions.
_LONGEST_ANSWER = 1 << 24

#: A forwarder that answers later than this, in seconds, is stopped or hangs.
_ANSWER_WITHIN = 5.0


class Gone(CommandError):
    """Nobody listens at the path: the forwarder was not started, or has ended."""


class Control:
    """A socket at `path` that tells `snapshot()` to whoever asks. Nothing is there before :meth:`start`."""

    def __init__(self, path: str, snapshot: Callable[[], dict[str, Any]]) -> None:
        self._path = path
        self._snapshot = snapshot
        self._server: StreamServer | None = None
        #: Which file is ours: somebody may have put another in its place.
        self._file: tuple[int, int] | None = None
        self._making = BoundedSemaphore()
        self._answer = b""
        self._answered = -FRESH

    def start(self) -> None:
        """Listen. A socket file that was left behind is replaced. Does not block.

        Raises :class:`CommandError` where another process listens, where something else has that name, and where no
        file can be made.
        """
        listener = _listen(self._path)
        self._file = _identity(self._path)
        self._server = StreamServer(listener, self._serve, spawn=Pool(MOST_CLIENTS))
        self._server.start()

    def stop(self) -> None:
        """Cut the clients, and take the file away. May be called again, and without a start."""
        server, self._server = self._server, None
        if server is None:
            return
        server.stop(timeout=0)
        with contextlib.suppress(OSError):
            if _identity(self._path) == self._file:
                os.unlink(self._path)

    def _serve(self, conn: Any, _address: object) -> None:
        """One client, until it goes, or is silent or slow for too long."""
        with contextlib.suppress(OSError), conn.makefile("rb") as lines:
            while True:
                with gevent.Timeout(PATIENCE, TimeoutError):
                    if not lines.readline(LONGEST_LINE).endswith(b"\n"):
                        return
                    conn.sendall(self._newest())
                gevent.sleep(_TURN)

    def _newest(self) -> bytes:
        """The answer; those who ask while it is made get the same."""
        with self._making:
            if time.monotonic() - self._answered >= FRESH:
                try:
                    told = json.dumps(self._snapshot(), default=str)
                except Exception as error:  # a fault of ours must not end in the forwarder's log once a second
                    told = json.dumps({"format": FORMAT, "error": repr(error)})
                self._answer = told.encode() + b"\n"
                self._answered = time.monotonic()
            return self._answer


def _listen(path: str) -> Any:
    """A listening socket at the path that nobody but its user may use."""
    try:
        remove_stale(path)
        return _bind(path)
    except OSError as error:
        advice = "; end what listens there, or give another path" if error.errno == errno.EADDRINUSE else ""
        raise CommandError(f"can't listen at {path}: {error.strerror or error}{advice}") from None


def _bind(path: str) -> Any:
    # Not a chmod behind it: the file would be there for everybody in between.
    mask = os.umask(0o177)
    try:
        return bound(socket.AF_UNIX, path)
    finally:
        os.umask(mask)


def _identity(path: str) -> tuple[int, int]:
    found = os.lstat(path)
    return found.st_dev, found.st_ino


class RemoteControl:
    """The forwarder that listens at a path. Each question has a connection of its own, so it may be a new one."""

    def __init__(self, path: str) -> None:
        self._path = path

    def ask(self) -> dict[str, Any]:
        """Return a snapshot. Waits for 5 seconds at most.

        Raises :class:`Gone` where nobody listens, and :class:`CommandError` where no answer comes, or a strange one. Each
        says what to do about it.
        """
        try:
            with gevent.Timeout(_ANSWER_WITHIN, TimeoutError), self._connect() as conn:
                conn.sendall(b"\n")
                with conn.makefile("rb") as lines:
                    line = lines.readline(_LONGEST_ANSWER)
        except TimeoutError:
            raise CommandError(f"no answer at {self._path} for {_ANSWER_WITHIN:g} s; is its forwarder stopped?") from None
        except ConnectionError:
            line = b""
        if not line.endswith(b"\n"):
            raise Gone(f"the forwarder at {self._path} has ended; start it again")
        return self._understand(line)

    def _connect(self) -> Any:
        conn = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        conn.settimeout(_ANSWER_WITHIN)
        try:
            conn.connect(self._path)
        except (FileNotFoundError, ConnectionRefusedError):
            conn.close()
            raise Gone(f"nobody listens at {self._path}; start a forwarder with --control {self._path}") from None
        except PermissionError:
            conn.close()
            raise CommandError(f"{self._path} is another user's; run this as the user of the forwarder") from None
        except OSError as error:
            conn.close()
            raise CommandError(f"can't connect to {self._path}: {error.strerror or error}") from None
        return conn

    def _understand(self, line: bytes) -> dict[str, Any]:
        try:
            told = json.loads(line)
        except ValueError:
            told = None
        if not isinstance(told, dict) or "format" not in told:
            raise CommandError(f"what listens at {self._path} is no forwarder; give the path that --control was given")
        if told["format"] != FORMAT:
            raise CommandError(
                f"the forwarder at {self._path} is of geyamux {told.get('version')}; use that one's command"
            )
        if "error" in told:
            raise CommandError(f"the forwarder at {self._path} could not tell: {told['error']}; please report this")
        return told


def connect(path: str) -> RemoteControl:
    """Return the forwarder at `path`, who must be there: raises as :meth:`RemoteControl.ask`, but does not ask."""
    control = RemoteControl(path)
    control._connect().close()
    return control
