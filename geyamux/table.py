"""The streams of a session: their ids, their counts, their time limits, and what is remembered of those that ended.

The reader hands every frame with a stream id to it, but for Data without flags, which goes to its stream. What a peer may
waste or hoard is counted here. Each count is changed in one place: a stream enters in `open` or `admit`;
`on_acknowledged`, `on_ended` and `on_released` are called once each for every stream. Opening, ending and every frame
cost the same however many streams there are.

It sends resets through the outbox, wakes nobody, and knows nothing of the connection. See ``spec.md`` R1-R7, R28, R29.
"""

from __future__ import annotations

import heapq
import itertools
import socket
import time
import weakref
from collections import OrderedDict
from collections.abc import Callable
from typing import TYPE_CHECKING

from .config import UNSET, Config
from .duplex import UNCLAIMED
from .errors import ProtocolError, SessionError, StreamsExhausted
from .flow import ReceiveBudget, widen
from .frame import HEADER, INITIAL_WINDOW, MAX_STREAM_ID, RST, SYN, WINDOW_UPDATE
from .lifecycle import Lifecycle
from .outbox import LARGE, Outbox
from .stats import Ledger
from .stream import Stream
from .waiting import Expiry, get_thread

if TYPE_CHECKING:
    from .session import Session

__all__ = ["StreamTable"]

#: Frames that move nothing and that a peer may send before it has to send payload, too (R28).
_USELESS_BUDGET = 10_000
#: It is refilled by one for so many bytes of payload that somebody may read, and by so many for each full minute: a
#: session of weeks may see many refused or cancelled streams.
_USELESS_REFILL = 1024
_USELESS_A_MINUTE = 600
#: When unread bytes pass their limit, so many of the streams that hoard most are looked up at once.
_HOARDERS = 32
#: Streams that the application is done with and the peer has not ended. Beyond, those are reset that wait for longer
#: than `_CROWDED_TIMEOUT` seconds: a peer that acknowledges and never says FIN could have all the memory.
_MAX_CLOSING = 4096
_CROWDED_TIMEOUT = 10.0
#: Ended streams whose late frames are expected: they cross with our FIN or RST on the wire.
_REMEMBERED = 4096


class StreamTable:
    """Every stream of one session. It is what a stream calls its owner."""

    def __init__(
        self,
        session: Session,
        outbox: Outbox,
        config: Config,
        *,
        is_client: bool,
        arrived: Callable[[], None],
        changed: Callable[[], None],
    ) -> None:
        self.config = config
        self.budget = ReceiveBudget(config.receive_budget, min(config.window_limit, config.receive_budget))
        self.thread = get_thread()
        #: A small message may be one frame up to here.
        self.largest_small = min(LARGE, config.max_frame_size or LARGE)
        #: The full receive window of an established stream.
        self.window = config.max_stream_window
        #: Why the session ended; None while it lives.
        self.reason: SessionError | None = None
        #: Streams that have not ended on both sides, by id.
        self.streams: dict[int, Stream] = {}
        #: Streams of the peer that wait for accept, in order. A dict, so that a reset one leaves at once.
        self.backlog: OrderedDict[int, Stream] = OrderedDict()
        #: What carries them.
        self.session = session
        self._outbox = outbox
        #: Tells the session that a stream of the peer came.
        self._arrived = arrived
        #: Tells the session that a place became free or a stream ended.
        self._changed = changed
        self._next_id = 1 if is_client else 2
        #: Own streams the peer has not acknowledged.
        self.unacknowledged = 0
        #: Where in the outbox their SYNs are.
        self._syn_positions: dict[int, int] = {}
        #: Own streams that have not ended.
        self._outgoing = 0
        #: Streams of the peer that have not ended, or that the application has not released.
        self._incoming = 0
        #: Streams ever opened here, ever taken in, and ever accepted.
        self.opened = self.admitted = self.accepted = 0
        #: What is counted of streams, for `stats`.
        self.ledger = Ledger()
        outbox.granted = self.ledger.granted
        #: The session has ended: nothing is counted any more.
        self._is_over = False
        #: New streams of the peer are refused.
        self.is_refusing = False
        #: Ended ids with the bytes of late Data that are nobody's fault.
        self._remembered: OrderedDict[int, int] = OrderedDict()
        #: Streams that have ended, unread; the application may have forgotten them.
        self._unread_ended: weakref.WeakSet[Stream] = weakref.WeakSet()
        self._useless_left = float(_USELESS_BUDGET)
        self._useful_seen = 0
        self._refilled_at = time.monotonic()
        #: Asks for a tick of the clock at a moment.
        self.arm: Callable[[float], None] = lambda moment: None
        self._accepting: Expiry[Stream] = Expiry(config.accept_timeout)
        self._opening: Expiry[Stream] = Expiry(config.stream_open_timeout)
        self._closing: Expiry[Stream] = Expiry(config.stream_close_timeout)

    # -- own streams

    @property
    def may_open(self) -> bool:
        """There is a place among the unacknowledged, and among all."""
        limit = self.config.max_outgoing_streams
        return self.unacknowledged < self.config.accept_backlog and (limit is None or self._outgoing < limit)

    def open(self) -> Stream:
        """Make a stream and queue its SYN, with the credit beyond the initial window."""
        stream_id = self._next_id
        if stream_id > MAX_STREAM_ID:
            raise StreamsExhausted
        self._next_id += 2
        stream = Stream(stream_id, self, self._outbox, Lifecycle.SYN_SENT, self._timeout())
        self.streams[stream_id] = stream
        self.unacknowledged += 1
        self._outgoing += 1
        self.opened += 1
        self._arm(self._opening.add(stream))
        extra = self.config.max_stream_window - INITIAL_WINDOW
        position = self._outbox.append(HEADER.pack(0, WINDOW_UPDATE, SYN, stream_id, extra))
        stream._position = self._syn_positions[stream_id] = position
        return stream

    def is_unborn(self, stream: Stream) -> bool:
        """Its SYN has not left: the peer need never hear of it."""
        return self._syn_positions.get(stream.stream_id, 0) > self._outbox.loaded

    def _timeout(self) -> float | None:
        timeout = self.config.stream_timeout
        return socket.getdefaulttimeout() if timeout is UNSET else timeout

    def _is_own(self, stream_id: int) -> bool:
        return (stream_id ^ self._next_id) & 1 == 0

    # -- frames of the peer

    def on_data_header(self, stream_id: int, flags: int, length: int) -> Stream | None:
        """Data with flags, without payload, or for a stream that is not open: where its payload goes."""
        if flags & SYN:
            if length > INITIAL_WINDOW:
                raise ProtocolError(
                    f"stream {stream_id}: the peer sent {length} bytes with its SYN, into {INITIAL_WINDOW}"
                )
            return self.admit(stream_id, flags, 0)
        stream = self.streams.get(stream_id)
        if stream is None:
            self.on_unknown(stream_id, length)
            return None
        stream._on_header(length)
        if not length:
            self._charge_if_useless(stream, flags)
        return None if flags & RST else stream

    def on_data_end(self, stream_id: int, flags: int) -> None:
        """The payload is complete: its flags take effect."""
        stream = self.streams.get(stream_id)
        if stream is not None:
            self._on_flags(stream, flags, 0)

    def on_window_update(self, stream_id: int, flags: int, delta: int) -> None:
        """Credit, flags, or both."""
        stream = self.streams.get(stream_id)
        if flags & (SYN | RST) or stream is None:
            self._on_opening_or_reset(stream, stream_id, flags, delta)
            return
        if delta:
            stream._on_credit(delta)
            credited = self.ledger.credited
            credited[stream_id] = credited.get(stream_id, 0) + delta
        if stream._life.on_frame(flags) is not stream._life:
            stream._on_flags(flags)
        elif not delta:
            self.charge_useless()

    def _on_opening_or_reset(self, stream: Stream | None, stream_id: int, flags: int, delta: int) -> None:
        """A WindowUpdate whose length may be no credit: the length beside an RST is a code."""
        if flags & SYN:
            stream = self.admit(stream_id, flags, 0 if flags & RST else delta)
        elif stream is None:
            self.on_unknown(stream_id, 0)
        if stream is not None:
            self._on_flags(stream, flags, delta)

    def on_taken_in(self) -> None:
        """All of one receive was handed on."""
        if self.budget.unread > self.budget.limit:
            self._relieve()

    def _on_flags(self, stream: Stream, flags: int, code: int) -> None:
        was_waiting = bool(flags & RST) and stream.stream_id in self.backlog
        stream._on_flags(flags, code)
        if was_waiting:
            self.charge_useless()

    # -- streams of the peer

    def admit(self, stream_id: int, flags: int, delta: int) -> Stream | None:
        """A SYN came, with this much credit beyond the initial window. None: refused, or over at once.

        Every check comes before any change: a bad SYN leaves no trace.
        """
        if not stream_id or self._is_own(stream_id):
            raise ProtocolError(f"the peer opened stream {stream_id}, an id that is not its to use")
        if stream_id in self.streams:
            raise ProtocolError(f"the peer opened stream {stream_id}, which is open already")
        credit = widen(INITIAL_WINDOW, delta, stream_id)
        if flags & RST:
            self.charge_useless()
            return None
        limit = self.config.max_incoming_streams
        if (
            self.is_refusing
            or len(self.backlog) >= self.config.accept_backlog
            or (limit is not None and self._incoming >= limit)
        ):
            self.ledger.resets[self._why_refused()] += 1
            self.charge_useless()
            self._remember(stream_id, INITIAL_WINDOW)
            self._outbox.refuse(stream_id)
            return None
        stream = Stream(stream_id, self, self._outbox, Lifecycle.SYN_RECEIVED, self._timeout())
        stream._credit = credit
        if delta:
            self.ledger.add_credit(stream_id, delta)
        self._remembered.pop(stream_id, None)
        self.streams[stream_id] = self.backlog[stream_id] = stream
        self._incoming += 1
        self.admitted += 1
        self._arm(self._accepting.add(stream))
        self._arrived()
        return stream

    def _why_refused(self) -> str:
        if self.is_refusing:
            return "refused_going_away"
        return "refused_backlog" if len(self.backlog) >= self.config.accept_backlog else "refused_limit"

    def next_accepted(self) -> Stream:
        """Take the oldest from the backlog and acknowledge it; there must be one."""
        _, stream = self.backlog.popitem(last=False)
        self.accepted += 1
        self._accepting.remove(stream)
        stream._accepted()
        return stream

    # -- what streams tell

    def on_acknowledged(self, stream: Stream) -> None:
        if self._is_over:
            return
        # A peer may guess the id of one whose SYN has not left.
        if not self.is_unborn(stream):
            del self._syn_positions[stream.stream_id]
        self.unacknowledged -= 1
        self._opening.remove(stream)
        self._changed()

    def on_ended(self, stream: Stream) -> None:
        stream_id = stream.stream_id
        self._closing.remove(stream)
        if self.streams.get(stream_id) is not stream:
            return
        del self.streams[stream_id]
        self._syn_positions.pop(stream_id, None)
        self._remember(stream_id, self._window_of(stream))
        if self._is_own(stream_id):
            self._outgoing -= 1
        elif self.backlog.get(stream_id) is stream:
            # Reset before its accept: the application will never see it.
            del self.backlog[stream_id]
            self._accepting.remove(stream)
            stream._release()
        else:
            self._release_incoming(stream)
        if _unread(stream):
            self.on_unread(stream)
        self._changed()

    def on_unread(self, stream: Stream) -> None:
        self._unread_ended.add(stream)

    def on_released(self, stream: Stream) -> None:
        if not stream._life.ended:
            if self.reason is None:
                self._arm(self._closing.add(stream))
                if len(self._closing) > _MAX_CLOSING:
                    self._make_room()
        elif not self._is_own(stream.stream_id):
            self._release_incoming(stream)
            self._changed()

    def _make_room(self) -> None:
        """Too many wait for the peer's end: those that have waited for long are given up, two for each that comes."""
        for stream in self._closing.first_older(_CROWDED_TIMEOUT, 2):
            stream._abandon(0, "close_timeout")

    def _release_incoming(self, stream: Stream) -> None:
        """It counts until it has ended *and* the application is done with it: a handler may still be at work."""
        if stream._marks & UNCLAIMED and stream._life.ended and not self._is_over:
            self._incoming -= 1

    # -- late and useless frames

    def _window_of(self, stream: Stream) -> int:
        buffer = stream._buffer
        return self.config.max_stream_window if buffer is None else max(buffer.limit, self.config.max_stream_window)

    def _remember(self, stream_id: int, allowance: int) -> None:
        remembered = self._remembered
        remembered[stream_id] = allowance
        remembered.move_to_end(stream_id)
        if len(remembered) > _REMEMBERED:
            remembered.popitem(last=False)

    def on_unknown(self, stream_id: int, length: int) -> None:
        """Data for a stream that we don't hold: it is dropped. ProtocolError where no window could allow it."""
        if length > self.budget.window_limit:
            raise ProtocolError(f"the peer announced {length} bytes for stream {stream_id}, which is not open")
        # Even an empty frame costs us a header.
        allowance = self._remembered.get(stream_id, 0) - (length or HEADER.size)
        if allowance >= 0:
            self._remembered[stream_id] = allowance
        else:
            self.charge_useless()

    def _charge_if_useless(self, stream: Stream, flags: int) -> None:
        """A frame without bytes or credit moves something only if it changes the stream's state."""
        if stream._life.on_frame(flags) is stream._life:
            self.charge_useless()

    def charge_useless(self) -> None:
        """A frame moved nothing. ProtocolError when a peer sends too many of them for its payload (R28)."""
        useful = self.budget.received
        minutes = int((time.monotonic() - self._refilled_at) / 60.0)
        self._refilled_at += minutes * 60.0
        refill = (useful - self._useful_seen) / _USELESS_REFILL + minutes * _USELESS_A_MINUTE
        self._useful_seen = useful
        self._useless_left = min(_USELESS_BUDGET, self._useless_left + refill) - 1
        if self._useless_left < 0:
            raise ProtocolError(f"the peer sent {_USELESS_BUDGET} frames that move nothing")

    def _relieve(self) -> None:
        """Unread bytes are over the session's budget: reset the streams that hoard most, until they are not."""
        budget = self.budget
        while budget.unread > budget.limit:
            streams = itertools.chain(self.streams.values(), self._unread_ended)
            hoarders = heapq.nlargest(_HOARDERS, streams, key=_unread)
            if not hoarders:
                return  # one that was forgotten holds them, and is about to be closed
            for hoarder in hoarders:
                if budget.unread <= budget.limit or not _unread(hoarder):
                    return
                was_live = not hoarder._life.ended
                hoarder._abandon(0, "over_budget")
                hoarder._lose_unread()
                if was_live:
                    self._outbox.on_provoked()
                else:
                    self.ledger.resets["over_budget"] += 1

    # -- time limits

    def next_moment(self) -> float | None:
        """When the next time limit of a stream passes, on the monotonic clock."""
        moments = [expiry.next_moment() for expiry in (self._accepting, self._opening, self._closing)]
        return min((moment for moment in moments if moment is not None), default=None)

    def _arm(self, moment: float | None) -> None:
        if moment is not None:
            self.arm(moment)

    def expire(self, now: float) -> None:
        """Act on the limits that have passed."""
        for stream in self._accepting.pop_passed(now):
            if stream._life.can_receive:
                stream._abandon(0, "accept_timeout")
        for stream in self._opening.pop_passed(now):
            # Its place is given back; what has been finished here already may still be taken by the peer.
            if stream._life.can_send:
                stream._abandon(0, "open_timeout")
            else:
                stream._on_flags(0)
        for stream in self._closing.pop_passed(now):
            stream._abandon(0, "close_timeout")

    def postpone(self, seconds: float) -> None:
        """Time during which our own hub was blocked is nobody's fault."""
        for expiry in (self._accepting, self._opening, self._closing):
            expiry.postpone(seconds)

    # -- the end

    def orphan(self, reason: SessionError) -> None:
        """The session has ended: every stream learns why. What waits for accept may still be taken and read."""
        self.reason = reason
        self._is_over = True
        for stream in list(self.streams.values()):
            stream._on_session_end()
        # Who keeps a dead session must not keep all its streams alive.
        self.streams.clear()
        self._syn_positions.clear()
        self.unacknowledged = self._outgoing = self._incoming = 0
        for expiry in (self._accepting, self._opening, self._closing):
            expiry.clear()

    def reset_unfinished(self) -> None:
        """Reset every stream whose FIN has not gone: its end must not look like an EOF to the peer."""
        for stream in list(self.streams.values()):
            if stream._life.can_send:
                stream._abandon(0, "session_end")


def _unread(stream: Stream) -> int:
    return stream._unread
