"""What goes ahead of the queue, at the next frame boundary: pings, pongs, resets, acknowledgements, credit.

None of it is data, and none of it belongs to the order of a stream, but for one thing: a reset takes the place of the
acknowledgement and the credit that wait for its stream. They are kept by stream id, so that they merge, vanish with their
stream, and can't pile up. Each has a cap (`spec.md` R26, R28): there are 32 pongs at most, one entry for each open
stream, and a peer that provokes resets and does not fetch them is cut off.

This module makes frames. It sends nothing and waits for nothing; :class:`geyamux.outbox.Outbox` does.
"""

from __future__ import annotations

from collections import deque

from .errors import ProtocolError
from .flow import ReceiveBuffer
from .frame import ACK, HEADER, PING, RST, SYN, WINDOW_UPDATE

__all__ = ["UrgentLane"]

#: Pongs that wait; what a peer asks beyond is not answered (the number of go-yamux).
_MAX_PONGS = 32
#: Resets that the peer provoked and does not fetch.
_MAX_RESETS = 8192

_pack = HEADER.pack


class UrgentLane:
    """The part of an outbox that goes ahead."""

    def __init__(self) -> None:
        self._ping: int | None = None
        self._pongs: deque[int] = deque()
        #: Reset code by stream id.
        self._resets: dict[int, int] = {}
        #: Credit that travels on the acknowledgement, by stream id.
        self._acks: dict[int, int] = {}
        #: Where credit may be due, by stream id. The amount is read when the frame is made, so grants merge.
        self._grants: dict[int, ReceiveBuffer] = {}
        #: Credit of streams that have no buffer now, by stream id.
        self._credits: dict[int, int] = {}
        #: Bytes that were taken and granted anew, by stream id. Who counts them gives its own, and forgets what ended.
        self.granted: dict[int, int] = {}

        #: How many of the resets the peer provoked.
        self._provoked = 0
        #: Some of these may wait.
        self._is_urgent = False
        #: The ping that is first on the wire and has not left; None when it has.
        self._loaded_ping: int | None = None

    def _schedule(self) -> None:
        """Something waits: see that it leaves at the end of this turn."""
        raise NotImplementedError

    def ping(self, value: int) -> None:
        """Send a ping ahead of what waits; the owner is told when it has left."""
        self._ping = value
        self._is_urgent = True
        self._schedule()

    def pong(self, value: int) -> None:
        """Answer a ping ahead of what waits, unless too many answers wait already."""
        if len(self._pongs) < _MAX_PONGS:
            self._pongs.append(value)
            self._is_urgent = True
            self._schedule()

    def acknowledge(self, stream_id: int, extra: int) -> None:
        """Acknowledge a stream of the peer, with the credit beyond the initial window."""
        self._acks[stream_id] = extra
        self._is_urgent = True
        self._schedule()

    def reset(self, stream_id: int, code: int = 0) -> None:
        """Reset a stream, in place of the acknowledgement and credit that wait for it."""
        self.forget(stream_id)
        self._resets[stream_id] = code
        self._is_urgent = True
        self._schedule()

    def refuse(self, stream_id: int) -> None:
        """Reset a stream because of what the peer sent."""
        self.on_provoked()
        self.reset(stream_id)

    def on_provoked(self) -> None:
        """The peer made us queue a reset; ProtocolError when it does so and does not fetch them."""
        self._provoked += 1
        if self._provoked > _MAX_RESETS:
            raise ProtocolError(f"the peer provoked {_MAX_RESETS} resets and did not fetch them")

    def grant(self, stream_id: int, buffer: ReceiveBuffer) -> None:
        """Send what credit is due, merged with what waits."""
        self._grants[stream_id] = buffer
        self._is_urgent = True
        self._schedule()

    def has_grant(self, stream_id: int) -> bool:
        """Credit of this stream waits, and will be counted when its frame is made."""
        return stream_id in self._grants

    def add_credit(self, stream_id: int, credit: int) -> None:
        """Send so much credit for what was taken, with what waits."""
        self.granted[stream_id] = self.granted.get(stream_id, 0) + credit
        self._credits[stream_id] = self._credits.get(stream_id, 0) + credit
        self._is_urgent = True
        self._schedule()

    def take_grant(self, stream_id: int, buffer: ReceiveBuffer) -> int:
        """Return the credit to send now, counted."""
        limit, credit = buffer.limit, buffer.grant()
        if credit:
            # What the window has grown by was not taken.
            self.granted[stream_id] = self.granted.get(stream_id, 0) + credit - (buffer.limit - limit)
        return credit

    def forget(self, stream_id: int) -> None:
        """Neither acknowledgement nor credit makes sense for this stream any more."""
        self._acks.pop(stream_id, None)
        self.forget_grant(stream_id)

    def forget_grant(self, stream_id: int) -> None:
        """The peer has ended its side: credit makes no sense for this stream any more."""
        self._grants.pop(stream_id, None)
        self._credits.pop(stream_id, None)

    def _urgent_frames(self) -> int:
        """How many wait that the application or the peer can make many of."""
        return len(self._resets) + len(self._acks)

    def _take_urgent(self) -> list[bytes]:
        """Make the frames that go ahead. Resets come first: a stream id may have been taken anew since."""
        frames = []
        if self._ping is not None:
            frames.append(_pack(0, PING, SYN, 0, self._ping))
            self._loaded_ping = self._ping
        frames += [_pack(0, PING, ACK, 0, value) for value in self._pongs]
        frames += [_pack(0, WINDOW_UPDATE, RST, stream_id, code) for stream_id, code in self._resets.items()]
        frames += [_pack(0, WINDOW_UPDATE, ACK, stream_id, extra) for stream_id, extra in self._acks.items()]
        for stream_id, buffer in self._grants.items():
            credit = self.take_grant(stream_id, buffer) + self._credits.pop(stream_id, 0)
            if credit:
                frames.append(_pack(0, WINDOW_UPDATE, 0, stream_id, credit))
        frames += [_pack(0, WINDOW_UPDATE, 0, stream_id, credit) for stream_id, credit in self._credits.items()]
        self._clear_urgent()
        return frames

    def _clear_urgent(self) -> None:
        self._is_urgent = False
        self._ping = None
        self._pongs.clear()
        self._resets.clear()
        self._provoked = 0
        self._acks.clear()
        self._grants.clear()
        self._credits.clear()
