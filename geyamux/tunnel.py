"""What a tunnel is made of.

- :func:`splice` joins two ends; :class:`Splice` is the same, to be watched while it goes on.
- :class:`Forwarder` makes the other end for each that comes, and joins them: a handler for the servers of gevent and of
  :mod:`geyamux.server`.
- :class:`RoundRobin` opens streams on several sessions in turn.
- :class:`Reconnector` keeps one session alive.
"""

from __future__ import annotations

import contextlib
import logging
import random
import time
from collections.abc import Callable
from typing import Any

import gevent
from gevent.event import Event
from gevent.lock import BoundedSemaphore

from .errors import RemoteGoAway, SessionError, StreamsExhausted
from .logs import log
from .session import Session
from .splicing import BUFSIZE, Splice, reset, splice
from .stream import Stream
from .waiting import Deadline, timed_out

__all__ = ["Forwarder", "Reconnector", "RoundRobin", "Splice", "splice"]

logger = logging.getLogger("geyamux.tunnel")

#: So long a session comes last whose peer has refused a stream; and one that owes an answer and is silent for so long.
_DOUBT, _SILENCE = 30.0, 1.0

#: A peer that went away may go on opening streams for so long, in seconds; then the session ends with its last one.
_PARTING = 30.0

#: Where all sessions are full, they are looked at so often, in seconds.
_GLANCE = 0.02


class Forwarder:
    """For each end that comes: make the other one, and join them until both are done.

    It is a handler for servers. ``Forwarder(session.open)`` serves the connections of a ``gevent.server.StreamServer``;
    ``Forwarder(lambda: gevent.socket.create_connection(address))`` the streams of a
    :class:`geyamux.server.StreamServer`.

    `connect` is called without arguments for each end, in that end's greenlet, and returns the other one. Where it raises
    an ``OSError``, what came is reset.

    `on_open(splice)` and `on_end(splice)` are called when two ends are joined and when they have ended (``splice.error``
    says how), `on_failure(end, error)` where there was no other end. They may wait, and hold up that end alone.
    """

    def __init__(
        self,
        connect: Callable[[], Any],
        *,
        bufsize: int = BUFSIZE,
        on_open: Callable[[Splice], object] | None = None,
        on_end: Callable[[Splice], object] | None = None,
        on_failure: Callable[[Any, OSError], object] | None = None,
    ) -> None:
        if bufsize < 1:
            raise ValueError(f"bufsize={bufsize}: nothing can be read into that")
        self._connect = connect
        self._bufsize = bufsize
        self._on_open, self._on_end, self._on_failure = on_open, on_end, on_failure
        #: In the order in which they began.
        self._splices: dict[Splice, None] = {}
        #: Nothing is joined, and nothing is about to be.
        self._idle = Event()
        self._idle.set()
        self._at_work = 0
        #: Those who wait for the other end.
        self._connecting: set[Any] = set()

    @property
    def splices(self) -> tuple[Splice, ...]:
        """What is joined now, the oldest first."""
        return tuple(self._splices)

    def handle(self, end: Any, address: object = None) -> None:
        """Join `end` with another one; return when both have ended. `end` is closed then. Raises no ``OSError``."""
        self._at_work += 1
        self._idle.clear()
        try:
            self._handle(end)
        finally:
            self._at_work -= 1
            if not self._at_work:
                self._idle.set()

    def _handle(self, end: Any) -> None:
        try:
            other = self._call_connect()
        except BaseException as error:
            if not isinstance(error, OSError):
                # Perhaps a kill: who is killed is in a hurry.
                reset(end, patience=0.0)
                raise
            reset(end)
            log(logger, logging.INFO, "%r was given up, it could not be connected: %s", end, error)
            if self._on_failure is not None:
                self._on_failure(end, error)
            return
        one = Splice(end, other, bufsize=self._bufsize)
        self._splices[one] = None
        try:
            if self._on_open is not None:
                self._on_open(one)
            with contextlib.suppress(OSError):
                one.run()
        except BaseException:
            # Perhaps from on_open, and nobody else knows the other end.
            for each in (end, other):
                reset(each, patience=0.0)
            raise
        finally:
            del self._splices[one]
            if self._on_end is not None:
                self._on_end(one)

    def _call_connect(self) -> Any:
        greenlet = gevent.getcurrent()
        self._connecting.add(greenlet)
        try:
            return self._connect()
        finally:
            self._connecting.discard(greenlet)

    def join(self, timeout: float | None = None) -> bool:
        """Wait until nothing is joined; False when `timeout` seconds pass first."""
        return self._idle.wait(timeout)

    def stop(self, timeout: float | None = None) -> bool:
        """Wait until nothing is joined, `timeout` seconds at most, then cut what is left. True: nothing was.

        What still waits for its other end is given up. Does not wait for what it cut: :meth:`join` does. It does not keep
        new ends from coming: stop the server first.
        """
        if self.join(timeout):
            return True
        for one in self.splices:
            one.cut()
        for greenlet in self._connecting:
            gevent.kill(greenlet)
        return False


class RoundRobin:
    """Open streams on several sessions in turn. One that ends, or whose peer goes away, is left out by itself.

    One that has not answered to a stream, and said nothing else either for a second, comes after all others, and so does
    one in :meth:`doubt`: a peer that hangs, or takes no streams, gets the next one only where there is no better.
    """

    def __init__(self) -> None:
        self._sessions: list[Session] = []
        #: Who waits for room: the first looks, the others stand behind it.
        self._line = BoundedSemaphore()
        #: Those in doubt, and until when on the monotonic clock.
        self._doubts: dict[Session, float] = {}

    @property
    def sessions(self) -> tuple[Session, ...]:
        """Those that take streams now; who is next stands first."""
        return tuple(session for session in self._sessions if not (session.closed or session.peer_went_away))

    def add(self, session: Session) -> None:
        """Let it take its turns from now on, until it ends; fine for one that is there."""
        if session not in self._sessions:
            self._sessions.append(session)
            session.rawlink(self.discard)

    def discard(self, session: Session) -> None:
        """Leave it out; fine for one that is not there."""
        if session in self._sessions:
            self._sessions.remove(session)
            self._doubts.pop(session, None)
            session.unlink(self.discard)

    def doubt(self, session: Session) -> None:
        """Its peer has refused a stream: for half a minute it comes after all others."""
        if session in self._sessions:
            self._doubts[session] = time.monotonic() + _DOUBT

    def _is_doubtful(self, session: Session) -> bool:
        stats = session.stats()
        hangs = stats.unacknowledged > 0 and stats.idle > _SILENCE
        return hangs or self._doubts.get(session, 0.0) > time.monotonic()

    def open(self, timeout: float | None = None) -> Stream:
        """Open a stream on the next session.

        One that has as many streams as it may is passed over. Waits only where all have, `timeout` seconds at most: then
        TimeoutError. Raises :class:`~geyamux.SessionError` where there is no session.
        """
        deadline = Deadline.after(timeout)
        # Nobody overtakes those who wait already.
        stream = None if self._line.locked() else self._open_now()
        if stream is not None:
            return stream
        if not self._line.acquire(timeout=None if deadline is None else deadline.left()):
            raise timed_out()
        try:
            while (stream := self._open_now()) is None:
                if deadline is not None and not deadline.left():
                    raise timed_out()
                # All are full, and which one has room first nobody can say.
                gevent.sleep(_GLANCE if deadline is None else min(_GLANCE, deadline.left()))
            return stream
        finally:
            self._line.release()

    def _open_now(self) -> Stream | None:
        """A stream of the first that has room; None where all are full."""
        sessions = self.sessions
        if not sessions:
            raise SessionError("no session is there to open a stream on")
        doubtful = []
        for session in sessions:
            if self._is_doubtful(session):
                doubtful.append(session)
            elif (stream := self._try_to_open(session)) is not None:
                return stream
        for session in doubtful:
            if (stream := self._try_to_open(session)) is not None:
                return stream
        return None

    def _try_to_open(self, session: Session) -> Stream | None:
        try:
            stream = session.open(timeout=0)
        except StreamsExhausted:
            self.discard(session)
            return None
        except (SessionError, RemoteGoAway, TimeoutError):
            return None
        if session in self._sessions:
            self._sessions.remove(session)
            self._sessions.append(session)
        return stream


class Reconnector:
    """Keep a session alive: when it is lost, or its peer goes away, make another one.

    `connect` returns a new session, or raises an ``OSError``, after which it is called again: after half to all of
    `min_interval` seconds, then of twice as many each time, up to `max_interval`. (The chance in it keeps a thousand
    agents from coming back in the same moment.) A session that outlived the wait before it was a success: the next
    wait is short again. So one that a balancer accepts and drops at once is none. What `connect` raises besides is a
    mistake of the caller, and raised by :meth:`run`.

    `serve(session)` is called in a greenlet of its own for each session; when it returns or raises, that is closed.
    When the peer goes away the next session is made while this one still serves its last streams; after half a minute
    it takes no new ones either, and ends with the last.

    It never gives up, unless `max_retries` in a row were in vain: then :meth:`run` raises the last error.
    `on_connect(session)`, `on_disconnect(session, error)` (no new stream can be opened there) and `on_retry(error,
    seconds, attempt)` tell what happens; an exception in one of them ends :meth:`run`.
    """

    def __init__(
        self,
        connect: Callable[[], Session],
        serve: Callable[[Session], object] | None = None,
        *,
        min_interval: float = 0.5,
        max_interval: float = 30.0,
        max_retries: int | None = None,
        on_connect: Callable[[Session], object] | None = None,
        on_disconnect: Callable[[Session, OSError], object] | None = None,
        on_retry: Callable[[OSError, float, int], object] | None = None,
    ) -> None:
        if not 0 < min_interval <= max_interval:
            raise ValueError(f"min_interval={min_interval} must be more than 0 and at most max_interval={max_interval}")
        self._connect, self._serve = connect, serve
        self._min_interval, self._max_interval, self._max_retries = min_interval, max_interval, max_retries
        self._on_connect, self._on_disconnect, self._on_retry = on_connect, on_disconnect, on_retry
        #: The newest one, whether it lives or not.
        self._session: Session | None = None
        #: Those that have not ended: that one, and older ones with streams to finish.
        self.sessions: set[Session] = set()
        self._stopped = Event()
        #: There is another session, or there will be none.
        self._changed = Event()
        self._greenlet: gevent.Greenlet[..., None] | None = None

    @property
    def session(self) -> Session | None:
        """The session that takes new streams; None while there is none."""
        session = self._session
        return None if session is None or session.closed or session.peer_went_away else session

    def start(self) -> None:
        """Run in a greenlet of its own. What ends it besides :meth:`stop` is reported by the hub."""
        if self._greenlet is None:
            self._greenlet = gevent.spawn(self.run)

    def run(self) -> None:
        """Connect, and connect again, until :meth:`stop`. Blocks."""
        try:
            self._run()
        finally:
            self.stop()

    def stop(self) -> None:
        """Connect no more. Sessions that live go on, and are served. Never blocks, may be called again and in the hub."""
        self._stopped.set()
        self._changed.set()

    def close(self, timeout: float | None = None) -> None:
        """Stop, and close all sessions in good order; `timeout` seconds for each at most, None: its ``close_timeout``."""
        self.stop()
        if self._greenlet is not None and self._greenlet is not gevent.getcurrent():
            self._greenlet.join()
        limit = () if timeout is None else (timeout,)
        gevent.joinall([gevent.spawn(session.close, *limit) for session in self.sessions])

    def open(self, timeout: float | None = None) -> Stream:
        """Open a stream on the session, and wait for one where there is none; `timeout` seconds at most.

        Raises TimeoutError then, and :class:`~geyamux.SessionError` once it has stopped and there is no session.
        """
        deadline = Deadline.after(timeout)
        while True:
            session = self.session
            if session is not None:
                with contextlib.suppress(SessionError, RemoteGoAway):
                    return session.open(None if deadline is None else deadline.left())
                continue
            self._changed.clear()
            if self._stopped.is_set():
                raise SessionError("there is no session, and nobody connects any more")
            if not self._changed.wait(None if deadline is None else deadline.left()):
                raise timed_out()

    def _run(self) -> None:
        retries, delay = 0, 0.0
        while not self._stopped.is_set():
            session, error = self._dial()
            if session is not None:
                began = time.monotonic()
                error = self._use(session)
                if time.monotonic() - began > delay:
                    retries, delay = 0, 0.0
            if error is None:
                return
            if retries == self._max_retries:
                raise error
            retries += 1
            delay = min(max(2 * delay, self._min_interval), self._max_interval)
            seconds = delay * random.uniform(0.5, 1.0)
            if self._on_retry is not None:
                self._on_retry(error, seconds, retries)
            self._stopped.wait(seconds)

    def _dial(self) -> tuple[Session | None, OSError | None]:
        """A session, or why there is none; neither after a stop, which does not wait for `connect`."""
        dialling = gevent.spawn(self._try_to_connect)
        try:
            _wait_for_either(dialling, self._stopped)
        except BaseException:
            _give_up(dialling)
            raise
        if self._stopped.is_set():
            _give_up(dialling)
            return None, None
        outcome = dialling.value
        if isinstance(outcome, Session):
            return outcome, None
        if isinstance(outcome, OSError):
            return None, outcome
        raise outcome if isinstance(outcome, BaseException) else TypeError(f"connect returned {outcome!r}, no session")

    def _try_to_connect(self) -> Session | BaseException:
        try:
            return self._connect()
        except BaseException as error:
            # A gevent.Timeout is one, too.
            return error

    def _use(self, session: Session) -> OSError | None:
        """Until it takes no new streams; return why that is. None: it lives, and we stop."""
        self._session = session
        self.sessions.add(session)
        session.rawlink(self.sessions.discard)
        self._changed.set()
        if self._serve is not None:
            gevent.spawn(self._serve_and_close, session)
        if self._on_connect is not None:
            self._on_connect(session)
        going = gevent.spawn(session.wait_go_away)
        try:
            _wait_for_either(going, self._stopped)
        finally:
            going.kill()
        error = why_unusable(session)
        if session.peer_went_away and not session.closed:
            gevent.spawn(_retire, session)
        if error is not None and self._on_disconnect is not None:
            self._on_disconnect(session, error)
        return None if self._stopped.is_set() else error

    def _serve_and_close(self, session: Session) -> None:
        assert self._serve is not None
        try:
            self._serve(session)
        finally:
            session.close()


def _retire(session: Session) -> None:
    """Its peer went away. One that leaves the connection open all the same must not make sessions pile up."""
    if not session.join(_PARTING):
        session.go_away(announce=False)


def _wait_for_either(*objects: Any) -> None:
    gevent.wait(objects, count=1)


def _give_up(dialling: Any) -> None:
    """Nobody wants its session, if it made one."""
    dialling.kill()
    if isinstance(dialling.value, Session):
        dialling.value.abort()


def why_unusable(session: Session) -> OSError | None:
    """Why no new stream can be opened; None where one can."""
    if not (session.closed or session.peer_went_away):
        return None
    try:
        session.open(timeout=0).reset()
    except OSError as error:
        return error
    return None
