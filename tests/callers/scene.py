"""Two sessions at work, and a judge of what became of each stream: for what happens to a program from outside.

The scripts of this directory let something happen in the middle of it: a signal, a finaliser, an exception. Then
nobody may hang, no byte may be other than it was written, no stream may look whole that is not, and other sessions of
the hub must work as before. It knows nothing of pytest, and takes whatever package is importable as ``geyamux``.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import gevent
from gevent import socket as gsocket

import geyamux

__all__ = ["PATIENCE", "Scene", "Strike", "Talk", "fresh_faults"]

#: Seconds for a run that takes milliseconds: used up only by what hangs.
PATIENCE = 1.0
#: More than a window, so that the writer waits for credit; and what small messages consist of.
BULK = bytes(range(256)) * 1200
WORDS = [b"%05d" % number * (1 + number % 400) for number in range(60)]


class Strike(Exception):
    """What a signal handler raises."""


OURS = (geyamux.YamuxError, Strike, ValueError)


class Talk:
    """One stream with a writer and a reader, and what became of both."""

    def __init__(self, ends: tuple[Any, Any], pieces: Sequence[bytes]) -> None:
        self.near, self.far = ends
        self.pieces = pieces
        self.read = bytearray()
        self.is_finished = False
        self.errors: list[BaseException] = []
        self.greenlets: list[Any] = [gevent.spawn(self._guard, self._write), gevent.spawn(self._guard, self._read)]

    def _guard(self, run: Callable[[], None]) -> None:
        try:
            run()
        except Exception as error:
            self.errors.append(error)

    def _write(self) -> None:
        try:
            with self.near:
                for piece in self.pieces:
                    self.near.sendall(piece)
        except BaseException:
            self.near.reset()  # the beginning or the end of the block may have been interrupted itself
            raise

    def _read(self) -> None:
        with self.far:
            while data := self.far.recv(20_000):
                self.read += data
        self.is_finished = True

    def faults(self, name: str, *, may_break: bool, may_hang: bool) -> Iterator[str]:
        wanted = b"".join(self.pieces)
        if not may_hang and not all(greenlet.ready() for greenlet in self.greenlets):
            yield f"{name}: hangs, {len(self.read)} of {len(wanted)} bytes read, {self.errors}"
        for error in self.errors:
            if not may_hang and not isinstance(error, OURS):
                yield f"{name}: an error that no caller could expect: {error!r}"
        if not wanted.startswith(bytes(self.read)):
            yield f"{name}: other bytes than were written"
        elif self.is_finished and len(self.read) != len(wanted):
            yield f"{name}: ends after {len(self.read)} of {len(wanted)} bytes as if it were whole"
        elif not self.is_finished and not may_break and all(greenlet.ready() for greenlet in self.greenlets):
            yield f"{name}: broken: {self.errors}"


class Scene:
    """Two sessions over a small connection, and four streams at work."""

    def __init__(self) -> None:
        ends = gsocket.socketpair()
        for end in ends:
            end.setsockopt(gsocket.SOL_SOCKET, gsocket.SO_SNDBUF, 16384)
        config = geyamux.Config(keepalive_interval=None, close_timeout=1.0)
        self.client = geyamux.Client(ends[0], config)
        self.server = geyamux.Server(ends[1], config)
        self.victims = [self._join(self.client, self.server) for _ in range(2)]
        pairs = [self._join(self.client, self.server), self._join(self.server, self.client)]
        self.talks: dict[str, Talk] = {
            "bulk": Talk(pairs[0], [BULK]),
            "words": Talk(pairs[1], WORDS),
            "victim": Talk(self.victims[0], [BULK[:100_000], *WORDS[:20]]),
            "other victim": Talk(self.victims[1][::-1], [BULK]),
        }
        self.pinging = gevent.spawn(self._ping)

    def _join(self, opener: Any, acceptor: Any) -> tuple[Any, Any]:
        return opener.open(), acceptor.accept(timeout=PATIENCE)

    def _ping(self) -> None:
        with contextlib.suppress(*OURS):
            self.client.ping(PATIENCE)

    def run(self) -> None:
        everyone: list[Any] = [self.pinging]
        for talk in self.talks.values():
            everyone += talk.greenlets
        gevent.joinall(everyone, timeout=PATIENCE)

    def faults(self, may_break: Sequence[str], *, may_end: bool, may_hang: bool = False) -> Iterator[str]:
        """What went wrong. With `may_hang` only what is worse: wrong bytes, half a body that looks whole."""
        has_ended = self.client.closed or self.server.closed
        if has_ended and not may_end:
            yield f"the session ended: {self.client.exception!r}, {self.server.exception!r}"
        for name, talk in self.talks.items():
            struck = any(isinstance(error, Strike) for error in talk.errors)
            yield from talk.faults(name, may_break=has_ended or struck or name in may_break, may_hang=may_hang)
        if may_hang:
            return
        if not self.pinging.ready():
            yield "ping: hangs"
        if not has_ended:
            yield from self._faults_after(may_end=may_end)

    def _faults_after(self, *, may_end: bool) -> Iterator[str]:
        """The session says that it lives: so it does."""
        try:
            with gevent.Timeout(PATIENCE, AssertionError("hangs")):
                self.client.ping(PATIENCE)
                near, far = self._join(self.client, self.server)
                near.sendall(b"afterwards")
                if far.recv(100) != b"afterwards":
                    yield "afterwards: other bytes"
        except (OSError, AssertionError) as error:
            # Its end may have begun just then.
            if not (may_end and isinstance(error, geyamux.SessionError)):
                yield f"afterwards: {error!r}"

    def end(self) -> Iterator[str]:
        for name, session in (("client", self.client), ("server", self.server)):
            try:
                with gevent.Timeout(PATIENCE, AssertionError("hangs")):
                    session.close(0.2)
            except (OSError, AssertionError) as error:
                yield f"close of the {name}: {error!r}"
            session.abort()
            session.conn.close()
        for talk in self.talks.values():
            gevent.killall(talk.greenlets)
        self.pinging.kill()


def fresh_faults() -> Iterator[str]:
    """Other sessions of the hub, which share its callbacks."""
    client, server = geyamux.pair()
    try:
        with gevent.Timeout(PATIENCE, AssertionError("hangs")):
            client.open().sendall(b"fresh")
            if server.accept().recv(10) != b"fresh":
                yield "another session: other bytes"
    except AssertionError as error:
        yield f"another session: {error!r}"
    client.abort()
    server.abort()
