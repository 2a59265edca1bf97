"""A session: many streams over one connection, and how it begins, lives and ends.

It ties the parts together: :mod:`~geyamux.reader` hands it frames, :mod:`~geyamux.table` keeps its streams,
:mod:`~geyamux.outbox` sends, :mod:`~geyamux.liveness` watches the peer. The public methods come first, then what the
parts tell it (none of that may wait), then the ways to end, which may.

Longer than other modules because a session is the one place where all of them meet; nothing here is a second concept.
"""

from __future__ import annotations

import atexit
import contextlib
import itertools
import logging
import os
import time
import weakref
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Any, ClassVar, NoReturn, Protocol

import gevent

from .config import UNSET, Config, Unset
from .errors import (
    ProtocolError,
    RemoteError,
    RemoteGoAway,
    SessionClosed,
    SessionError,
    TransportError,
)
from .frame import GO_AWAY, HEADER, SYN, GoAwayCode
from .listener import Listener
from .liveness import Liveness
from .logs import log, write_waiting
from .outbox import Outbox
from .reader import Reader
from .stats import SessionStats
from .stream import Stream
from .table import StreamTable
from .transport import ANY_FAILURE, adopt
from .waiting import Deadline, Pulse, get_thread, is_libuv, may_act, run_links, timed_out
from .waking import WaitList

__all__ = ["Client", "Server", "Session"]

logger = logging.getLogger("geyamux")

#: So long is waited at once, in seconds: libuv takes no infinity.
_LONG = 3600.0
#: The steps to a good end see by themselves that their time is over, and take the last of them; so long, in seconds.
_LAST_STEPS = 0.02
#: How long a peer that broke the protocol may take to hear of it where `close_timeout` is None, in seconds.
_LONGEST_LINGER = 5.0

#: After sending has failed so many portions of frames are looked at for the peer's reason: a mebibyte of the smallest.
_DRAINED_PORTIONS = 180

#: What an accept counts as, in bytes written: a loop that accepts may never have to wait.
_ACCEPT_WORK = 16384

#: A silence before an end that is worth a word, in seconds.
_NOTABLE_SILENCE = 1.0

#: A time after which the loop has looked at every descriptor, in seconds.
_ONE_TURN = 0.001

_numbers = itertools.count(1)
#: Every session of this process that has not ended. It keeps them alive: nothing else need hold a session that only
#: accepts, and a live one must not be collected.
_live: set[Session] = set()


class EndWatcher(Protocol):
    """Who sums up all sessions of the process."""

    def on_session_end(self, session: Session) -> None:
        """Its counts are final; `live_sessions` is about to lose it. Must not wait."""


_end_watchers: weakref.WeakSet[EndWatcher] = weakref.WeakSet()


def live_sessions() -> list[Session]:
    """Every session of this process that has not ended, those of other threads included."""
    return list(_live)


def watch_ends(watcher: EndWatcher) -> None:
    """Tell it of each session that ends, as long as somebody else holds it."""
    _end_watchers.add(watcher)


#: In a forked child: what must be neither stopped nor collected.
_watchers_of_the_parent: list[Any] = []


class Session:
    """Many streams over one connection. Make a :class:`Client` on one end and a :class:`Server` on the other.

    The two differ only in the ids they use; either opens and accepts streams. `conn` is a gevent socket, a gevent TLS
    socket, a Stream, a ``(reader, writer)`` pair of gevent file objects, or any cooperative object with ``recv``,
    ``send`` or ``sendall``, and ``close``. It belongs to the session from now on (TCP_NODELAY is set). A TLS handshake
    that has not been done is done first, which blocks within the socket's own timeout, 30 seconds where it has none;
    where it fails, what the socket raised is raised (``ssl.SSLError``, TimeoutError, OSError), and the socket is still
    the caller's to close. `initial` are bytes of the peer that were read from it before; `name` is for logs.

    Raises ``TypeError`` for a connection that would block the whole process or can't carry a session, ``ValueError`` for
    one that carries a session already.

    Methods may be called by any greenlet of the hub that made it; from another thread only :meth:`close` and
    :meth:`abort`. When the session ends, for whatever reason, every call that waits in it or in one of its streams
    raises a :class:`~geyamux.SessionError` within one turn of the loop, its ``__cause__`` the reason.
    """

    #: True for a Client.
    is_client: ClassVar[bool]

    #: Why no call can go on; None while they can.
    _reason: SessionError | None = None
    #: close() was called: nothing new begins.
    _is_closing = False
    #: The connection is being let go of.
    _is_finishing = False
    #: The connection is closed: nothing is left to wait for.
    _has_ended = False
    #: The peer has said GoAway(0).
    _peer_went_away = False
    #: We have said it, or will when the last stream ends.
    _said_go_away = False
    _announces_go_away = False
    #: No more input will come.
    _input_ended = False

    def __init__(self, conn: Any, config: Config | None = None, *, initial: bytes = b"", name: str | None = None) -> None:
        if not hasattr(self, "is_client"):
            raise TypeError("make a Client or a Server")
        #: The connection, as it was given.
        self.conn = conn
        #: The settings; never changes.
        self.config = config if config is not None else Config()
        #: For logs and repr.
        self.name = name or f"{'client' if self.is_client else 'server'}-{next(_numbers)}"
        self._transport = adopt(conn)
        self._transport.hold()
        self._addresses = {name: self._transport.address(name) for name in ("getsockname", "getpeername")}
        hub = gevent.get_hub()
        self._hub, self._thread = hub, get_thread()
        self._began = time.monotonic()
        self._outbox = Outbox(
            self._transport,
            hub,
            owner=self,
            limit=self.config.outbox_limit,
            write_timeout=self.config.connection_write_timeout,
            name=self.name,
        )
        self._table = StreamTable(
            self,
            self._outbox,
            self.config,
            is_client=self.is_client,
            arrived=self._on_arrival,
            changed=self._on_change,
        )
        self._acceptors = WaitList(self._outbox.lane)
        self._openers = WaitList(self._outbox.lane)
        self._joiners = WaitList(self._outbox.lane)
        self._links: list[Callable[[Any], object]] = []
        #: When a close in good order is given up, by each who asked for one.
        self._end_deadlines: list[Deadline] = []
        self._reader = self._make_reader(initial)
        self._liveness = Liveness(
            self._outbox, hub, self.config, owner=self, heard=self._when_heard, next_moment=self._table.next_moment
        )
        self._table.arm = self._liveness.arm
        self._pulse = Pulse.of(hub)
        self._pulse.enter(self._on_hub_blocked)
        _live.add(self)
        if self.config.window_auto_tune:
            self._liveness.measure()
        # The name of a Unix socket is whatever its owner likes.
        log(logger, logging.INFO, "%s: session begins, peer %r", self.name, self.getpeername())

    def _make_reader(self, initial: bytes) -> Reader:
        return Reader(
            self._transport,
            self._hub,
            self,
            self._table,
            initial=initial,
            name=self.name,
            tells_received=bool(self.config.window_auto_tune),
        )

    # -- streams

    def open(self, timeout: float | Unset | None = UNSET) -> Stream:
        """Open a stream and return it at once, without waiting for the peer: writing may follow immediately.

        Waits only while ``accept_backlog`` own streams are unacknowledged, at ``max_outgoing_streams``, and while the
        outbox is full; `timeout` seconds at most (left out: ``config.stream_open_timeout``).

        Raises :class:`~geyamux.RemoteGoAway` (the peer takes no new streams: reconnect),
        :class:`~geyamux.StreamsExhausted` (reconnect), :class:`~geyamux.SessionError`, TimeoutError.
        """
        self._check_thread()
        self._check_may_open()
        if self._openers.waiters or not (self._table.may_open and self._outbox.has_room):
            seconds = self.config.stream_open_timeout if timeout is UNSET else timeout
            self._wait_to_open(Deadline.after(seconds))
        return self._table.open()

    def _wait_to_open(self, deadline: Deadline | None) -> None:
        waiter = self._openers.enter()
        try:
            while True:
                self._check_may_open()
                if not (self._openers.is_first(waiter) and self._table.may_open):
                    if not waiter.park(deadline):
                        raise timed_out()
                    continue
                if not self._outbox.has_room:
                    self._outbox.wait_room(waiter, deadline, self._is_open_pointless)
                    self._check_may_open()
                    if not self._table.may_open:
                        continue
                return
        finally:
            self._openers.leave(waiter)

    def _is_open_pointless(self) -> bool:
        return self.closed or self._peer_went_away

    def _check_may_open(self) -> None:
        self._check_alive()
        if self._is_closing:
            raise SessionClosed("the session is being closed on this side")
        if self._peer_went_away:
            raise RemoteGoAway

    def accept(self, timeout: float | None = None) -> Stream:
        """Wait for the next stream of the peer, and for room in the outbox; acknowledge the stream and return it.

        Raises TimeoutError after `timeout` seconds, and a :class:`~geyamux.SessionError` when no more will come:
        :class:`~geyamux.SessionClosed` after an orderly end or our own :meth:`go_away`, another one says what broke.
        Streams that came before the peer ended the session are still returned first.
        """
        self._check_thread()
        self._outbox.take_turns(_ACCEPT_WORK)
        if self._table.backlog and not self._acceptors.waiters and self._outbox.has_room:
            return self._table.next_accepted()
        deadline = Deadline.after(timeout)
        waiter = self._acceptors.enter()
        try:
            while True:
                if not self._table.backlog:
                    self._check_alive()
                    if self._table.is_refusing:
                        raise SessionClosed("no new streams are taken any more on this side")
                elif self._acceptors.is_first(waiter):
                    if self._outbox.has_room or self._reason is not None:
                        return self._table.next_accepted()
                    # A peer that fetches nothing would make acknowledgements and answers pile up.
                    self._outbox.wait_room(waiter, deadline, self._is_accept_pointless)
                    if self._table.backlog:
                        return self._table.next_accepted()
                    continue
                if not waiter.park(deadline):
                    raise timed_out()
        finally:
            self._acceptors.leave(waiter)

    def _wait_arrival(self) -> None:
        """Wait until `accept` would not have to wait for a stream: one is there, or none will come."""
        waiter = self._acceptors.enter()
        try:
            while not (self._table.backlog or self._table.is_refusing or self._reason is not None):
                waiter.park(None)
        finally:
            self._acceptors.leave(waiter)

    def _is_accept_pointless(self) -> bool:
        return not self._table.backlog

    def __iter__(self) -> Iterator[Stream]:
        """Accept streams until the session ends in good order; raise where it broke."""
        while True:
            try:
                stream = self.accept()
            except SessionClosed:
                return
            yield stream

    def listener(self) -> Listener:
        """The session in the shape of a listening socket: ``accept()`` returns ``(stream, address)``."""
        return Listener(self)

    @property
    def num_streams(self) -> int:
        """Streams that have not ended on both sides, those not yet accepted included."""
        return len(self._table.streams)

    @property
    def streams(self) -> tuple[Stream, ...]:
        """Those streams, as they are now, for watching; do not use the ones among them that nobody has accepted yet."""
        return tuple(self._table.streams.values())

    # -- liveness

    def ping(self, timeout: float | Unset | None = UNSET) -> float:
        """Wait for one round trip to the peer, from the moment the ping leaves; return it in seconds.

        Greenlets that ask at once share one ping. Raises TimeoutError after `timeout` seconds (left out:
        ``config.keepalive_timeout``): the peer may live all the same, some answer not every ping.
        """
        self._check_thread()
        self._check_alive()
        return self._liveness.ping(self.config.keepalive_timeout if timeout is UNSET else timeout)

    @property
    def rtt(self) -> float | None:
        """The smoothed round trip in seconds; None until one was measured."""
        return self._liveness.rtt

    # -- ends

    def go_away(self, announce: bool = True) -> None:
        """Take no new streams from the peer; everything open goes on, and so does :meth:`open`. Never blocks.

        The peer is told at once, or with ``announce=False`` when the last stream has ended: go-yamux, rust-yamux, js and
        py-libp2p drop every stream when they are told. The session ends when both sides have said so and no stream is
        left.
        """
        self._check_thread()
        self._table.is_refusing = True
        self._announces_go_away = self._announces_go_away or announce
        self._acceptors.wake_all()
        self._check_drained(is_going_away=True)

    def close(self, timeout: float | Unset | None = UNSET) -> None:
        """End the session in good order, within `timeout` seconds (left out: ``config.close_timeout``).

        No new streams; what was written is flushed; streams that were not finished are reset; those that were may still
        get the peer's end; GoAway; the connection is half-closed, drained and closed. When the time is over it is cut.
        Returns when the session has ended, whatever the peer or the connection does, and does not raise for it. In the
        hub it starts and returns; so it does from another thread, and from a finaliser or signal handler that
        interrupted this package at its work. May be called again.
        """
        self._close(timeout)

    def _close(self, timeout: float | Unset | None) -> None:
        seconds = self.config.close_timeout if timeout is UNSET else timeout
        if not may_act(self._thread):
            self._hand_over(self._begin_close, seconds)
            return
        deadline = Deadline.after(seconds)
        last_steps = 2 * _LAST_STEPS if self._begin_close(seconds, deadline) else 0.0
        if gevent.getcurrent() is self._hub or self._has_ended:
            return
        if deadline is not None and deadline not in self._end_deadlines:
            self._end_deadlines.append(deadline)
        while not self._wait_ended(deadline):
            # If the hub was blocked, that is found out now, and moves the deadline.
            self._outbox.lane.breathe()
            if (deadline is None or deadline.left() <= 0) and not self._wait_ended(Deadline(last_steps)):
                self._abort()

    def abort(self) -> None:
        """End the session at once; unsent bytes are lost. Never blocks, may be called again and from any thread.

        From where :meth:`close` only starts, it is done in the hub's next turn.
        """
        self._do(self._abort)

    def _do(self, step: Callable[[], None]) -> None:
        if may_act(self._thread):
            step()
        else:
            self._hand_over(step)

    def _abort(self) -> None:
        if not self._is_finishing:
            reason = SessionClosed("the session was aborted on this side")
            self._end_streams(reason)
            self._outbox.flush_nowait()
            self._finish(reason)

    def _hand_over(self, method: Callable[..., object], *args: Any) -> None:
        """From another thread, or from the middle of our own work: let the session's hub do it."""
        if self._hub.loop is not None:
            self._hub.loop.run_callback_threadsafe(method, *args)
        elif not self._has_ended:
            self._let_go()

    def _let_go(self) -> None:
        """Its hub was destroyed: nobody runs any more who could end it in any order."""
        self._is_finishing = self._has_ended = True
        self._reason = self._reason or SessionClosed("the hub of the session was destroyed")
        self._table.reason = self._reason
        self._retire()
        with contextlib.suppress(*ANY_FAILURE):
            self._transport.drop()

    def join(self, timeout: float | None = None) -> bool:
        """Wait until the session has ended; False when `timeout` seconds pass first.

        Its socket is closed then; files and other objects that may wait in their ``close`` are being closed.
        """
        self._check_thread()
        return self._wait_ended(Deadline.after(timeout))

    def _wait_ended(self, deadline: Deadline | None) -> bool:
        return self._wait_as_joiner(self.ready, deadline)

    def _wait_as_joiner(self, condition: Callable[[], bool], deadline: Deadline | None) -> bool:
        """Wait for a step to the end; False at the deadline."""
        if condition():
            return True
        waiter = self._joiners.enter()
        try:
            while not condition():
                if not waiter.park(deadline):
                    return False
        finally:
            self._joiners.leave(waiter)
        return True

    @property
    def peer_went_away(self) -> bool:
        """The peer has said GoAway: :meth:`open` fails, streams that are open go on."""
        return self._peer_went_away

    def wait_go_away(self, timeout: float | None = None) -> bool:
        """Wait until the peer has said GoAway, or the session is ending: :meth:`open` can only fail from now on.

        Then it is time to connect anew, while what is open here may go on. False when `timeout` seconds pass first.
        """
        self._check_thread()
        return self._wait_as_joiner(lambda: self._peer_went_away or self.closed, Deadline.after(timeout))

    @property
    def closed(self) -> bool:
        """It has ended, or is ending on this side: nothing new begins."""
        return self._is_closing or self._reason is not None

    @property
    def exception(self) -> BaseException | None:
        """Why it ended; None while it lives and after an orderly end."""
        return None if isinstance(self._reason, SessionClosed) else self._reason

    def ready(self) -> bool:
        """It has ended."""
        return self._has_ended

    def rawlink(self, callback: Callable[[Any], object]) -> None:
        """Call ``callback(session)`` in the hub, once, when it has ended. For ``gevent.wait`` and ``iwait``."""
        self._check_thread()
        self._links.append(callback)
        if self._has_ended:
            self._hub.loop.run_callback(self._run_links)

    def unlink(self, callback: Callable[[Any], object]) -> None:
        """Take back a ``rawlink``; unknown callbacks are fine."""
        if callback in self._links:
            self._links.remove(callback)

    def __enter__(self) -> Session:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """:meth:`close`, on an exception, too."""
        self._close(UNSET)

    # -- about it

    @property
    def family(self) -> int:
        """The address family of the connection, AF_UNSPEC where it has none."""
        return self._transport.family

    def getsockname(self) -> Any:
        """The connection's own address when the session began; None where it has none."""
        return self._addresses["getsockname"]

    def getpeername(self) -> Any:
        """The address of the connection's peer when the session began; None where it has none."""
        return self._addresses["getpeername"]

    def stats(self) -> SessionStats:
        """A snapshot of counts and sizes, for watching. Any thread may ask, also when all is over."""
        table, reader = self._table, self._reader
        return SessionStats(
            age=time.monotonic() - self._began,
            streams=len(table.streams),
            opened=table.opened,
            incoming=table.admitted,
            accepted=table.accepted,
            resets=table.ledger.resets.copy(),
            backlog=len(table.backlog),
            unacknowledged=table.unacknowledged,
            bytes_sent=self._outbox.bytes_sent,
            bytes_received=reader.bytes_received,
            frames_sent=self._outbox.frames_sent,
            frames_received=reader.frames_received,
            queued=self._outbox.waiting_bytes,
            unread=table.budget.unread,
            rtt=self._liveness.rtt,
            min_rtt=self._liveness.min_rtt,
            idle=time.monotonic() - reader.heard,
            blocked=table.ledger.all_blocked(),
            blocked_streams=len(table.ledger.waits),
        )

    def __reduce__(self) -> NoReturn:
        """A session can be neither pickled nor copied: its connection has one owner."""
        raise TypeError(f"cannot pickle or copy {self!r}")

    def __repr__(self) -> str:
        """Peer, state with its reason, and how many streams there are and wait for accept."""
        try:
            return f"<geyamux.{type(self).__name__} {self.name}{self._peer_in_words()}: {', '.join(self._facts())}>"
        except AttributeError:
            return f"<geyamux.{type(self).__name__}, not made yet>"

    def _peer_in_words(self) -> str:
        # The peer of a Unix socket has no name as a rule.
        peer = self.getpeername()
        return f" to {peer!r}" if peer else ""

    def _facts(self) -> list[str]:
        if self._has_ended or self._reason is not None:
            state = "ended" if self._has_ended else "ending"
            return [state if self._reason is None else f"{state} ({type(self._reason).__name__}: {self._reason.message})"]
        facts = ["ending" if self._is_closing else "open", f"{self.num_streams} streams"]
        if self._table.backlog:
            facts.append(f"{len(self._table.backlog)} to accept")
        if self._table.is_refusing and not self._is_closing:
            facts.append("takes no new ones")
        if self._peer_went_away:
            facts.append("the peer takes no new ones")
        return facts

    # -- what the reader tells

    def _on_ping(self, flags: int, value: int) -> None:
        if flags & SYN:
            self._outbox.pong(value)
        elif self._liveness.on_pong(value):
            self._table.budget.min_rtt = self._liveness.min_rtt
        else:
            self._table.charge_useless()

    def _on_go_away(self, code: int) -> None:
        if code == GoAwayCode.NORMAL and self._peer_went_away:
            self._table.charge_useless()
        elif code == GoAwayCode.NORMAL:
            self._peer_went_away = True
            self._openers.wake_all()
            self._joiners.wake_all()
            self._check_drained()
        else:
            self._finish(RemoteError(f"the peer ended the session with GoAway code {code}", code))

    def _on_received(self) -> None:
        if self._transport.write_wants_read:
            self._outbox.poke()
        if self.config.window_auto_tune:
            self._liveness.measure_while_busy(self._reader.heard)

    def _on_protocol_error(self, error: ProtocolError) -> None:
        """Tell the callers at once, and the peer within ``close_timeout``. The reader throws away what still comes."""
        log(logger, logging.WARNING, "%s: protocol error: %s", self.name, error.message)
        if self._reason is not None:
            return
        self._end_streams(error)
        self._say_go_away(GoAwayCode.PROTOCOL_ERROR)
        self._fail(error, error)
        self._joiners.wake_all()
        if self._is_closing:
            self._outbox.wake_enders()
        else:
            # A peer that never stops sending must not be listened to for ever.
            seconds = self.config.close_timeout
            self._begin_ending(self._linger, error, Deadline(_LONGEST_LINGER if seconds is None else seconds))

    def _on_input_end(self, *, inside_frame: bool, error: BaseException | None) -> None:
        self._input_ended = True
        self._outbox.wake_enders()
        if self._is_closing or self._reason is not None:
            return  # the greenlet that closes sees it
        if error is not None:
            reason = TransportError(f"the connection broke: {error}")
            reason.__cause__ = error.with_traceback(None)
            self._finish(reason)
        elif inside_frame and not self._said_go_away:
            cut = TransportError("the connection ended inside a frame")
            self._finish(SessionClosed("the peer closed the connection, inside a frame"), cut)
        else:
            self._finish(SessionClosed(f"the peer closed the connection{self._after_silence()}"))

    def _after_silence(self) -> str:
        """What helps where a balancer or NAT that knows no Yamux ended an idle connection, in good order for TCP."""
        silence = time.monotonic() - self._reader.heard
        if self._peer_went_away or silence < _NOTABLE_SILENCE:
            return ""
        off = ", and keepalive is off" if self.config.keepalive_interval is None else ""
        return f" without a GoAway, {silence:.1f} s after it was last heard{off}"

    # -- what the outbox, the table and the clock tell

    def _on_send_error(self, reason: SessionError) -> None:
        if not isinstance(reason, TransportError):
            self._finish_after_input(reason)
        elif self._transport.fileno is None:
            # There the reader finds that out by itself, as soon as the loop has looked once more.
            gevent.spawn_later(_ONE_TURN, self._finish_after_input, reason)
        elif self._reader.drain():
            gevent.spawn(self._finish_after_drain, reason)
        else:
            self._finish_broken(reason)

    def _finish_after_input(self, reason: SessionError) -> None:
        self._reader.catch_up()
        self._finish(reason)

    def _finish_after_drain(self, reason: SessionError) -> None:
        """The peer may have said why before it closed, or closed in good order; but it may also go on for ever."""
        for _ in range(_DRAINED_PORTIONS):
            self._outbox.lane.breathe()
            if not self._reader.drain():
                break
        self._finish_broken(reason)

    def _finish_broken(self, reason: SessionError) -> None:
        self._reader.catch_up()
        if self._is_closing and self._input_ended:
            reason = SessionClosed("the session was closed on both sides")
        self._finish(self._reason or reason)

    def _on_ping_left(self, value: int, now: float) -> None:
        self._liveness._on_ping_left(value, now)

    def _on_silence(self, reason: SessionError) -> None:
        self._finish(reason)

    def _on_hub_blocked(self, seconds: float) -> None:
        """Nobody is charged for that time."""
        self._table.postpone(seconds)
        for deadline in self._end_deadlines:
            deadline.postpone(seconds)
        text = "%s: the event loop was blocked for %.1f s; a peer may give this session up"
        log(logger, logging.WARNING, text, self.name, seconds)

    def _on_tick(self, now: float) -> None:
        self._table.expire(now)
        self._outbox.heal()

    def _when_heard(self) -> float:
        return self._reader.heard

    def _on_arrival(self) -> None:
        """A stream of the peer waits for accept."""
        self._acceptors.wake_first()

    def _on_change(self) -> None:
        """A place became free, or a stream ended."""
        if self._openers.waiters:
            self._openers.wake_first()
        if self._is_closing:
            self._outbox.wake_enders()
        if self._table.is_refusing or self._peer_went_away:
            self._check_drained()

    def _check_drained(self, *, is_going_away: bool = False) -> None:
        """Say GoAway when it is time, and close when both sides have said it and nothing is left."""
        if self._table.reason is not None or self._is_closing:
            return
        if (is_going_away or self._table.is_refusing) and (self._announces_go_away or not self._table.streams):
            self._say_go_away(GoAwayCode.NORMAL)
        if self._said_go_away and self._peer_went_away and not self._table.streams:
            self._begin_close(self.config.close_timeout)

    def _say_go_away(self, code: GoAwayCode) -> None:
        # An error is said even where we have announced a good end before.
        if code != GoAwayCode.NORMAL or not self._said_go_away:
            self._said_go_away = True
            self._outbox.enqueue(HEADER.pack(0, GO_AWAY, 0, 0, code))

    # -- how it ends

    def _check_alive(self) -> None:
        if self._reason is not None:
            raise self._reason.again()

    def _check_thread(self) -> None:
        if get_thread() != self._thread:
            raise RuntimeError(
                "a session belongs to the thread whose gevent hub made it; only close() and abort() may be called from "
                "another"
            )

    def _begin_close(self, timeout: float | None, deadline: Deadline | None = None) -> bool:
        """False where an end has begun already."""
        if self._is_closing or self._reason is not None:
            return False
        self._is_closing = True
        self._table.is_refusing = True
        self._acceptors.wake_all()
        self._openers.wake_all()
        self._joiners.wake_all()
        reason = SessionClosed("the session was closed on this side")
        self._begin_ending(self._close_in_order, reason, deadline or Deadline.after(timeout))
        return True

    def _begin_ending(
        self, steps: Callable[[SessionError, Deadline | None], None], reason: SessionError, deadline: Deadline | None
    ) -> None:
        """Take the steps to a good end in a greenlet; the end comes at the deadline, wherever they are."""
        if deadline is not None:
            self._end_deadlines.append(deadline)

        def end() -> None:
            worker = gevent.spawn(steps, reason, deadline)
            if deadline is None:
                worker.join()
            while deadline is not None and not worker.ready():
                worker.join(min(deadline.left(), _LONG))
                # If the hub was blocked, that is found out now, and moves the deadline.
                self._outbox.lane.breathe()
                if deadline.left() <= 0:
                    worker.join(_LAST_STEPS)
                    break
            worker.kill(block=False)
            self._finish(reason)

        gevent.spawn(end)

    def _close_in_order(self, reason: SessionError, deadline: Deadline | None) -> None:
        """What `close` promises, step by step."""
        # What was accepted up to now; writers go on adding to it until their streams are ended.
        position = self._outbox.appended
        self._outbox.wait_until(lambda: self._outbox.taken >= position, deadline)
        self._end_streams(reason)
        # go-yamux, js and py-libp2p lose what they have not sent or read yet when they hear GoAway.
        self._outbox.wait_until(self._nothing_more_will_come, deadline)
        if self._reason is None:
            self._say_go_away(GoAwayCode.NORMAL)
        self._linger(reason, deadline)

    def _nothing_more_will_come(self) -> bool:
        return not self._table.streams or self._input_ended or self._reader.is_discarding

    def _linger(self, reason: SessionError, deadline: Deadline | None) -> None:
        """Flush, half-close, and read to the end: closing at once would let the system throw away what was sent."""
        if self._outbox.wait_empty(deadline) and not self._is_finishing:
            self._reader.discard()
            can_end = False
            with contextlib.suppress(*ANY_FAILURE):
                can_end = self._transport.shutdown_write()
            if can_end:
                self._outbox.wait_until(lambda: self._input_ended, deadline)

    def _end_streams(self, reason: SessionError) -> None:
        """Reset the streams that were not finished: a cut stream must not look complete to the peer."""
        if self._table.reason is None:
            self._table.reason = reason
        self._table.reset_unfinished()

    def _fail(self, reason: SessionError, stream_reason: SessionError) -> None:
        """From now on every call raises, and those that wait are woken."""
        if self._reason is not None:
            return
        self._reason = reason
        self._liveness.end(reason)
        self._outbox.end_streams()
        self._table.orphan(stream_reason)
        self._acceptors.wake_all()
        self._openers.wake_all()

    def _finish(self, reason: SessionError, stream_reason: SessionError | None = None) -> None:
        """Let go of the connection and of everyone who waits. Never waits itself."""
        if self._is_finishing:
            return
        self._is_finishing = True
        self._fail(reason, stream_reason or reason)
        self._retire()
        self._pulse.leave(self._on_hub_blocked)
        self._reader.stop()
        self._outbox.close()
        # What broke the protocol was logged when it came.
        is_news = not isinstance(reason, (SessionClosed, ProtocolError))
        level = logging.WARNING if is_news else logging.INFO
        log(logger, level, "%s: session ends: %s", self.name, reason.message)
        self._has_ended = True
        self._joiners.wake_all()
        self._hub.loop.run_callback(self._run_links)
        if self._transport.fileno is None:
            # Closing a file may flush, and so wait; nobody waits with it.
            gevent.spawn(self._close_transport)
        else:
            self._close_transport()

    def _retire(self) -> None:
        """Nothing is counted any more. It may be forgotten when those have heard of it who sum up all sessions."""
        for watcher in list(_end_watchers):
            with contextlib.suppress(Exception):
                watcher.on_session_end(self)
        _live.discard(self)

    def _close_transport(self) -> None:
        with contextlib.suppress(*ANY_FAILURE):
            self._transport.close()

    def _run_links(self) -> None:
        """In the hub: call those of gevent.wait, once each."""
        links, self._links = self._links, []
        run_links(self._hub, links, self)

    def _die_in_child(self) -> None:
        """In a forked child: the connection is the parent's. Not a byte is read or sent."""
        reason = SessionClosed("the session belongs to the process that made it, this is a child of it")
        self._has_ended = self._is_finishing = True
        if is_libuv(self._hub):
            # Stopping one would take the parent's interest from the descriptor of its loop, which is still shared.
            _watchers_of_the_parent.extend([*self._reader.give_up_watchers(), *self._outbox.give_up_watchers()])
        steps: list[Callable[[], object]] = [
            lambda: self._fail(reason, reason),
            lambda: self._pulse.leave(self._on_hub_blocked),
            self._reader.stop,
            self._outbox.close,
            self._joiners.wake_all,
        ]
        for step in steps:
            # The hub of another thread may have been destroyed.
            with contextlib.suppress(Exception):
                step()


class Client(Session):
    """The side that uses odd stream ids; by convention the one that dialled."""

    is_client = True


class Server(Session):
    """The side that uses even stream ids; by convention the one that was dialled."""

    is_client = False


def _flush_at_exit() -> None:
    """At interpreter exit: one attempt to send what waits, for each session."""
    for session in list(_live):
        with contextlib.suppress(Exception):
            session._outbox.flush_at_exit()
    with contextlib.suppress(Exception):
        write_waiting()


def _die_in_child() -> None:
    for session in list(_live):
        session._die_in_child()
    _live.clear()


atexit.register(_flush_at_exit)
os.register_at_fork(after_in_child=_die_in_child)
