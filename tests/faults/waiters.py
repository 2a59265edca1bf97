"""Every call that can wait, under way in one session, and what became of each.

`Cast` opens the streams while the peer is there, `start` begins the calls once it is silent, and `check` says that each
of them got the reason, in time. It decides nothing about how the link dies.
"""

from __future__ import annotations

import contextlib
import errno
import socket
import time
from collections.abc import Callable
from typing import Any

import gevent

from geyamux import Config, SessionClosed, SessionError
from support.rawpeer import settle

TOLERANCE = 1.0
"""Seconds after its time limit within which a call must return: the machine is shared."""

OWN_STREAMS = 8
#: A connection that took nothing for so long, and was asked meanwhile, is full.
_QUIET = 0.5
#: Calls that wait for the connection alone; it may take a little more after all, and some of them succeed.
_IN_OUTBOX = {"sendall, no room", "write, no room", "flush, not taken"}
_IN_SESSION = {
    "open at the limit",
    "accept",
    "accept of the listener",
    "iteration over the session",
    "ping",
    "ping, shared",
}


def config(**changes: Any) -> Config:
    """Settings under which `Cast` can make everyone wait: an open is one too many, the outbox is small."""
    return Config(**{"max_outgoing_streams": OWN_STREAMS, "outbox_limit": 8192, "close_timeout": 1.0, **changes})


class Cast:
    """The streams of a session, and the calls that wait in it."""

    def __init__(self, session: Any) -> None:
        self.session = session
        opened = [session.open() for _ in range(OWN_STREAMS)]
        for stream in opened:
            stream.sendall(b"H")  # a peer that listens holds them, and reads no more
        self.reading, self.lines, self.text, self.watched, self.spent, self.spent_file, self.idle, self.bulk = opened
        for stream in (self.spent, self.spent_file):
            stream.sendall(bytes(stream.stats().send_credit))
        self.results: dict[str, tuple[float, Any]] = {}
        #: When the connection began to take nothing.
        self.clogged_at = 0.0
        self._calls: dict[str, gevent.Greenlet[..., None]] = {}
        settle()

    def start(self) -> None:
        """Begin every call that waits for the peer; each must find that it has to wait."""
        self._read()
        self._write()
        self._ask_session()
        settle()
        assert not self.results.keys() - _IN_OUTBOX, f"did not wait: {self.results}"

    def begin(self, name: str, function: Callable[..., Any], *args: Any) -> None:
        def call() -> None:
            try:
                result = function(*args)
            except Exception as error:
                result = error
            self.results[name] = (time.monotonic(), result)

        assert name not in self._calls
        self._calls[name] = gevent.spawn(call)

    @property
    def count(self) -> int:
        """Calls begun."""
        return len(self._calls)

    def _read(self) -> None:
        for method, args in (
            ("recv", (10,)),
            ("recv_into", (bytearray(10),)),
            ("recvfrom", (10,)),
            ("read", (10,)),
            ("read1", (10,)),
            ("readinto", (bytearray(10),)),
            ("readline", ()),
            ("readlines", ()),
            ("peek", ()),
            ("__next__", ()),
        ):
            self.begin(method, getattr(self.reading, method), *args)
        self.begin("MSG_PEEK", self.reading.recv, 10, socket.MSG_PEEK)
        self.begin("read to the end", self.reading.read)
        self.begin("readline of a file", self.lines.makefile("rb").readline)
        self.begin("iteration over a text file", lambda: list(self.text.makefile("r", encoding="ascii")))
        self.begin("wait for a stream", lambda: gevent.wait([self.watched]) == [self.watched])

    def _write(self) -> None:
        for name, method, value in (
            ("sendall without credit", "sendall", b"small"),
            ("send without credit", "send", b"small"),
            ("write without credit", "write", bytes(100_000)),
            ("writelines without credit", "writelines", [b"small", b"small"]),
        ):
            self.begin(name, getattr(self.spent, method), value)
        file = self.spent_file.makefile("wb")
        file.write(b"kept in the file")
        self.begin("flush of a file", file.flush)

    def _ask_session(self) -> None:
        session = self.session
        self.begin("open at the limit", session.open, None)
        self.begin("accept", session.accept)
        self.begin("accept of the listener", session.listener().accept)
        self.begin("iteration over the session", lambda: list(session))
        self.begin("ping", session.ping, None)
        self.begin("ping, shared", session.ping, None)
        self.begin("join", session.join)
        self.begin("wait for the session", lambda: gevent.wait([session]) == [session])

    def clog(self) -> None:
        """Fill the connection, and begin the calls that wait because it takes nothing any more; then the others."""
        self.idle.setblocking(False)
        taken, self.clogged_at = -1, time.monotonic()
        # Kernels take a little more now and then, and are asked again when some time has passed.
        while time.monotonic() - self.clogged_at < _QUIET:
            self._fill()
            if taken != (taken := self.session.stats().bytes_sent):
                self.clogged_at = time.monotonic()
            gevent.sleep(0.01)
        self.idle.setblocking(True)
        self.begin("sendall, large", self.bulk.sendall, bytes(262_000))
        self.begin("sendall, no room", self.idle.sendall, bytes(1000))
        self.begin("write, no room", self.idle.write, bytes(1000))
        self.begin("flush, not taken", self.idle.flush)
        self.start()

    def _fill(self) -> None:
        """Fill the outbox."""
        assert self.idle.stats().send_credit > 1000, "the connection takes more than a window"
        with contextlib.suppress(BlockingIOError):
            while True:
                self.idle.send(bytes(1000))

    # -- what became of them

    def check(
        self,
        streams: type[SessionError],
        session: type[SessionError] | None = None,
        *,
        since: float,
        within: float,
        not_before: float = 0.0,
        cause: type[BaseException] | tuple[type[BaseException], ...] = BaseException,
    ) -> float:
        """All returned within that time: `streams` raised in streams, `session` in the session itself.

        Each error is a fresh one, and all of them name the same reason. Returns the seconds until the last.
        """
        session = session or streams
        moments = self._join(since, within)
        assert min(moments) >= not_before, f"the first gave up after {min(moments):.2f} s"
        assert max(moments) - min(moments) < TOLERANCE, "some learnt it later than others"
        self._check_values(session)
        errors = []
        for name, (_, result) in self.results.items():
            if result is True or result == []:
                continue
            expected = session if name in _IN_SESSION else streams
            assert type(result) is expected, (name, result)
            assert isinstance(result, SessionError) and result.errno == result.args[0] == errno.ECONNRESET, name
            assert result.__cause__ is not None, name
            errors.append(result)
        assert len({id(error) for error in errors}) == len(errors), "one object was raised twice"
        for kind in {streams, session}:
            reasons = {id(error.__cause__) for error in errors if type(error) is kind}
            assert len(reasons) <= 1, "one death has one reason"
        assert any(isinstance(error.__cause__, cause) for error in errors), [error.__cause__ for error in errors]
        self._check_after(streams, session)
        return max(moments)

    def _join(self, since: float, within: float) -> list[float]:
        """Wait for all calls; seconds after which each returned. What was sent after all is progress: it counts anew."""
        gevent.joinall(list(self._calls.values()), timeout=max(0.0, since + within + 2 * TOLERANCE - time.monotonic()))
        missing = self._calls.keys() - self.results.keys()
        assert not missing, f"still waiting after {time.monotonic() - since:.2f} s: {sorted(missing)}"
        sent = {name for name in _IN_OUTBOX & self.results.keys() if self.results[name][1] in (None, 1000)}
        assert sent != _IN_OUTBOX, "the connection was not full"
        since = max([since, *(self.results.pop(name)[0] for name in sent)])
        moments = [moment - since for moment, _ in self.results.values()]
        assert max(moments) <= within + TOLERANCE, f"the last returned after {max(moments):.2f} s"
        return moments

    def _check_values(self, session: type[SessionError]) -> None:
        for name in ("join", "wait for a stream", "wait for the session"):
            assert self.results[name][1] is True, name
        if session is SessionClosed:
            assert self.results["iteration over the session"][1] == [], "an orderly end ends it quietly"

    def _check_after(self, streams: type[SessionError], session: type[SessionError]) -> None:
        """Later calls say the same at once, and closing raises nothing."""
        for late in (lambda: self.watched.recv(1), lambda: self.idle.sendall(b"x")):
            assert type(_raised(late)) is streams
        for late in (self.session.open, self.session.accept, self.session.ping):
            assert type(_raised(late)) is session
        began = time.monotonic()
        for stream in (self.reading, self.spent, self.watched):
            stream.close()
        self.session.close()
        assert self.session.join(0) and self.session.ready()
        assert time.monotonic() - began < TOLERANCE
        expected = None if session is SessionClosed else session
        assert (None if self.session.exception is None else type(self.session.exception)) is expected

    def close(self) -> None:
        gevent.killall(list(self._calls.values()))


def _raised(call: Callable[[], Any]) -> BaseException | None:
    try:
        with gevent.Timeout(TOLERANCE, AssertionError("waits though the session is gone")):
            call()
    except SessionError as error:
        return error
    return None
