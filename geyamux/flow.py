"""Flow control: what a stream holds unread together with what its peer may still send, and the peer's credit to us.

Buffer and receive window are one object because one invariant ties them::

    window + unread + taken since the last grant == limit

``window`` is what the peer may still send, ``unread`` what waits here, ``limit`` the full size. Credit is due for what
the application took, never for what merely arrived: that is the back-pressure (``spec.md`` R8-R12). A read that fails
half-way puts its bytes back; ``unread`` may then exceed the invariant, and nothing is granted until it holds again.

Nothing here waits, sends or looks at the wire.
"""

from __future__ import annotations

import time
from collections import deque

from .errors import ProtocolError
from .frame import INITIAL_WINDOW, MAX_LENGTH

__all__ = ["ReceiveBudget", "ReceiveBuffer", "add_piece", "widen"]

#: Pieces below this are joined with their neighbour: 262,144 frames of one byte must not become 262,144 objects.
_JOIN_BELOW = 4096
#: ... until the joined piece has this size.
_JOINED_SIZE = 16384


def widen(credit: int, delta: int, stream_id: int) -> int:
    """Add the peer's grant to the credit we hold; ProtocolError where the sum is no window any more (R15)."""
    credit += delta
    if credit > MAX_LENGTH:
        raise ProtocolError(f"stream {stream_id}: the peer's credit overflows 32 bits ({credit})")
    return credit


def add_piece(pieces: deque[bytes | bytearray] | list[bytes | bytearray], piece: bytes) -> None:
    """Add bytes at the end, joined with what is there while both are small."""
    if pieces and len(piece) < _JOIN_BELOW and len(pieces[-1]) < _JOINED_SIZE:
        last = pieces[-1]
        if type(last) is not bytearray:
            last = pieces[-1] = bytearray(last)
        last += piece
    else:
        pieces.append(piece)


#: Empty buffers kept for reuse, at most.
_MAX_SPARE = 64


class ReceiveBudget:
    """What all streams of one session hold unread, and what their windows have grown by, against one limit (R28)."""

    __slots__ = ("grown", "limit", "min_rtt", "received", "spare", "unread", "window_limit")

    def __init__(self, limit: int, window_limit: int) -> None:
        self.limit = limit
        #: No receive window grows beyond this.
        self.window_limit = window_limit
        #: Bytes that arrived and that nobody has read.
        self.unread = 0
        #: Bytes that ever arrived for somebody to read.
        self.received = 0
        #: By how much windows are larger than they began.
        self.grown = 0
        #: The shortest round trip measured, in seconds; windows do not grow before there is one.
        self.min_rtt: float | None = None
        #: Empty buffers for the next streams that need one.
        self.spare: list[ReceiveBuffer] = []

    @property
    def room_to_grow(self) -> int:
        """What is left for windows to grow."""
        return max(0, self.limit - self.unread - self.grown)


class ReceiveBuffer:
    """The unread bytes of a stream and the window of its peer."""

    __slots__ = ("_allowance", "_budget", "_chunks", "_granted_at", "_grown", "_start", "limit", "unread", "window")

    def __init__(self, budget: ReceiveBudget, limit: int = INITIAL_WINDOW) -> None:
        self._budget = budget
        #: The pieces in order; None while there are none (an empty deque costs 600 bytes).
        self._chunks: deque[bytes | bytearray] | None = None
        #: How much of the first piece has been taken.
        self._start = 0
        #: Bytes that wait to be read.
        self.unread = 0
        #: Bytes that the peer may still send.
        self.window = limit
        #: The full size of the window.
        self.limit = limit
        #: None: bytes are kept. Else nobody will read them: how many may still be dropped.
        self._allowance: int | None = None
        #: By how much the limit has grown, to be given back to the budget.
        self._grown = 0
        #: When credit was last granted, where windows grow.
        self._granted_at = 0.0

    @classmethod
    def with_taken(cls, budget: ReceiveBudget, limit: int, taken: int) -> ReceiveBuffer:
        """An empty buffer whose window lacks what was taken and not granted anew: `taken_alone`."""
        buffer = budget.spare.pop() if budget.spare else cls(budget)
        buffer.limit = limit
        buffer.window = limit - taken
        return buffer

    def taken_alone(self) -> int:
        """What was taken and not granted anew, if that is all there is to remember of an empty buffer; else -1.

        An idle stream needs no buffer then; that saves 130 bytes of 430.
        """
        limit = self.limit
        taken = limit - self.window
        if taken * 2 >= limit or self._budget.window_limit != limit or self._grown or self._allowance is not None:
            return -1
        return taken

    def put_away(self) -> None:
        """Keep it for the next stream that needs one. Nobody may hold it any more: they would share it."""
        spare = self._budget.spare
        if len(spare) < _MAX_SPARE:
            spare.append(self)

    # -- the peer's side

    def extend_limit(self, extra: int) -> None:
        """Enlarge the window by what a SYN or ACK of ours grants beyond the initial one."""
        self.limit += extra
        self.window += extra

    def append(self, payload: bytes, *, is_counted: bool = False) -> bool:
        """Take in bytes that the window allowed, and that the budget may have counted already.

        False when they had to be dropped beyond all patience (R17).
        """
        size = len(payload)
        self.window -= size
        if self._allowance is not None:
            self._allowance -= size
            return self._allowance >= 0
        if self._chunks is None:
            self._chunks = deque((payload,))
        else:
            add_piece(self._chunks, payload)
        self.unread += size
        if not is_counted:
            budget = self._budget
            budget.unread += size
            budget.received += size
        return True

    @property
    def due(self) -> int:
        """Bytes that were taken and not granted anew."""
        return self.limit - self.window - self.unread

    @property
    def grant_is_due(self) -> bool:
        """Half of the window has been taken. Waiting that long halves the updates and never stops a sender.

        A peer that stands still has an empty window; then either bytes wait here, or all of the window has been taken
        and credit is due: no smaller grant is ever needed.
        """
        return (self.limit - self.window - self.unread) * 2 >= self.limit

    def grant(self) -> int:
        """Return the credit to send now, all that is due and what the window grows by; 0 for none."""
        due = self.limit - self.window - self.unread
        if due <= 0:
            return 0
        if due * 2 >= self.limit < self._budget.window_limit and self._allowance is None:
            due += self._grow()
        self.window += due
        return due

    def _grow(self) -> int:
        """Double the window where half of it was taken within one round trip.

        A link that is full delivers half of a window W in W/2 divided by its rate; that takes as long as the round trip
        when W is twice the bandwidth-delay product, so growth ends there.
        """
        budget = self._budget
        now = time.monotonic()
        elapsed, self._granted_at = now - self._granted_at, now
        if budget.min_rtt is None or elapsed >= budget.min_rtt:
            return 0
        extra = min(self.limit, budget.window_limit - self.limit, budget.room_to_grow)
        self.limit += extra
        self._grown += extra
        budget.grown += extra
        return extra

    # -- the application's side

    def take(self, size: int) -> bytes:
        """Remove and return `size` bytes, or all where there are fewer; there must be some."""
        chunks = self._chunks
        assert chunks is not None
        head, start = chunks[0], self._start
        left = len(head) - start
        if size < left:
            data = bytes(head[start : start + size])
            self._start = start + size
            if self._start >= _JOINED_SIZE:
                self._cut_head()
        elif size == left or len(chunks) == 1:
            data = bytes(head[start:] if start else head)
            self._drop_head()
        else:
            data = self._take_pieces(min(size, self.unread))
        self.unread -= len(data)
        self._budget.unread -= len(data)
        return data

    def _take_pieces(self, size: int) -> bytes:
        """Join pieces until there are `size` bytes. The counts are the caller's."""
        joined = bytearray()
        while (missing := size - len(joined)) > 0:
            assert self._chunks is not None
            head, start = self._chunks[0], self._start
            with memoryview(head) as view:
                joined += view[start : start + missing]
            if missing < len(head) - start:
                self._start = start + missing
                self._cut_head()
            else:
                self._drop_head()
        return bytes(joined)

    def _cut_head(self) -> None:
        """Let go of what was taken of the first piece, where that is half of it: else one byte could hold 64 KiB."""
        assert self._chunks is not None
        head = self._chunks[0]
        if self._start * 2 >= len(head):
            self._chunks[0] = head[self._start :]
            self._start = 0

    def _drop_head(self) -> None:
        assert self._chunks is not None
        self._chunks.popleft()
        self._start = 0
        if not self._chunks:
            self._chunks = None

    def take_line(self, size: int) -> bytes:
        """Remove and return up to `size` bytes, to the first newline at most."""
        chunks = self._chunks
        assert chunks is not None
        seen = -self._start
        for index, chunk in enumerate(chunks):
            start = self._start if index == 0 else 0
            found = chunk.find(b"\n", start, start + size - max(seen, 0))
            if found >= 0:
                return self.take(min(size, seen + found + 1))
            seen += len(chunk)
            if seen >= size:
                break
        return self.take(size)

    def peek(self, size: int) -> bytes:
        """Return up to `size` bytes and leave them where they are."""
        pieces: list[bytes | bytearray] = []
        start, missing = self._start, size
        for chunk in self._chunks or ():
            piece = chunk[start : start + missing]
            pieces.append(piece)
            missing -= len(piece)
            start = 0
            if missing <= 0:
                break
        return b"".join(pieces)

    def put_back(self, data: bytes) -> None:
        """Return bytes that a read took and can't deliver: first in line again, unless nobody will read any more."""
        if not data or self._allowance is not None:
            return
        self.unread += len(data)
        self._budget.unread += len(data)
        if self._chunks is None:
            self._chunks = deque()
        elif self._start:
            self._chunks[0] = self._chunks[0][self._start :]
        self._start = 0
        self._chunks.appendleft(data)

    def discard(self, allowance: int) -> bool:
        """Drop what is unread and what comes, up to `allowance` bytes. False when that is passed already."""
        self._allowance = allowance - self.clear()
        return self._allowance >= 0

    def clear(self) -> int:
        """Forget the unread bytes; return how many there were."""
        dropped, self.unread = self.unread, 0
        self._budget.unread -= dropped
        self._chunks, self._start = None, 0
        return dropped

    def release(self) -> None:
        """Give back to the budget what the window grew by: nothing more will come."""
        self._budget.grown -= self._grown
        self._grown = 0
