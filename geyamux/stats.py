"""What `stats()` returns: frozen records, a snapshot of one moment; and the ledger behind them.

The ledger keeps what no stream can hold, since an idle one must stay small: only those streams have an entry that were
granted credit, or whose writers had to wait for it. It is written where credit comes or goes, never where a message does:
the bytes that a stream has moved follow from the credit it had and the credit it has left.

So a stream has neither a count of frames nor a time of the last one, as a session has: they would cost each message on
its way.

Nothing here sends, waits, or decides anything.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass

__all__ = ["RESET_REASONS", "Ledger", "SessionStats", "StreamStats"]

RESET_REASONS: Mapping[str, str] = {
    "received": "the peer reset it",
    "application": "given up here: `Stream.reset`, or an exception in `with stream:`",
    "refused_backlog": "refused: `accept_backlog` streams wait for accept",
    "refused_limit": "refused: the peer has `max_incoming_streams`",
    "refused_going_away": "refused: after `go_away` or `close` here",
    "accept_timeout": "nobody accepted it for `accept_timeout`",
    "open_timeout": "the peer did not acknowledge it for `stream_open_timeout`",
    "close_timeout": "closed here, and the peer did not end its side for `stream_close_timeout`, or 10 s in a crowd",
    "data_after_close": "closed here, and the peer sent more than a window besides",
    "no_credit": "the peer had ended its side, and granted a writer nothing for `stream_close_timeout`",
    "over_budget": "it hoarded most of the unread bytes when they passed `receive_budget`",
    "session_end": "not finished when the session was closed or aborted here, or the peer broke the protocol",
}
"""Why streams are reset, in the words of `SessionStats.resets`, and what each means."""


@dataclass(frozen=True, kw_only=True)
class SessionStats:
    """A session at one moment. Sizes are bytes, times seconds; counts are since it began unless said."""

    #: Since it began, until now.
    age: float
    #: Streams that have not ended on both sides, now.
    streams: int
    #: Streams opened here, streams of the peer that were taken in, and those of them that ``accept`` returned.
    opened: int
    incoming: int
    accepted: int
    #: Streams that were reset or refused, by reason: every name of `RESET_REASONS`, which says what it means.
    resets: Mapping[str, int]
    #: Streams of the peer that wait for ``accept``, now.
    backlog: int
    #: Own streams that the peer has not acknowledged, now.
    unacknowledged: int
    #: Of whole frames, headers included; below TLS, if there is any, it is a little more.
    bytes_sent: int
    bytes_received: int
    frames_sent: int
    frames_received: int
    #: Bytes that wait for the connection, now. Payloads above 4 KiB are with their writers and not counted.
    queued: int
    #: Bytes received that nobody has read, now.
    unread: int
    #: Smoothed round trip and the shortest one; None until measured.
    rtt: float | None
    min_rtt: float | None
    #: Since the peer was heard.
    idle: float
    #: For how long writers waited for credit, summed over all streams, those that ended included; waits that go on count
    #: up to now.
    blocked: float
    #: Streams with a writer that waits for credit, now.
    blocked_streams: int


@dataclass(frozen=True, kw_only=True)
class StreamStats:
    """A stream at one moment. Sizes are bytes, times seconds; counts are since it began.

    Asked by another thread than the session's, a count may be off by what is just changing, and need not be monotonic.
    """

    stream_id: int
    #: For people; see :mod:`geyamux.lifecycle`.
    state: str
    #: Payload that was taken from writers here, what waits for the connection or was lost by a reset included.
    bytes_sent: int
    #: Payload that came, what nobody has read yet or ever will included.
    bytes_received: int
    #: Received and not read.
    unread: int
    #: What the peer may still send, of how much.
    receive_window: int
    receive_limit: int
    #: What this side may still send.
    send_credit: int
    #: The last frame of this stream waits for the connection.
    is_queued: bool
    #: For how long writers waited because there was no credit; a wait that goes on counts up to now.
    blocked: float
    #: Greenlets that wait to read, and to write.
    readers: int
    writers: int


class Account:
    """What the ledger knows of one stream."""

    __slots__ = ("blocked", "credited", "granted")

    def __init__(self, credited: int = 0, granted: int = 0, blocked: float = 0.0) -> None:
        #: Credit of the peer's beyond the initial window.
        self.credited = credited
        #: Bytes that were taken here and granted anew.
        self.granted = granted
        #: Seconds of waits for credit that are over.
        self.blocked = blocked


class Ledger:
    """Credit and waits by stream id, and resets by reason. One for each session."""

    __slots__ = ("blocked", "blocked_in_all", "credited", "granted", "resets", "waits")

    def __init__(self) -> None:
        #: The parts of an `Account`, of streams that live and have any.
        self.credited: dict[int, int] = {}
        self.granted: dict[int, int] = {}
        self.blocked: dict[int, float] = {}
        #: The same of all streams there ever were.
        self.blocked_in_all = 0.0
        #: Since when a stream has no credit for its first writer, on the monotonic clock.
        self.waits: dict[object, float] = {}
        self.resets = dict.fromkeys(RESET_REASONS, 0)

    def account(self, stream_id: int) -> Account:
        """What is known of a stream that lives."""
        return Account(self.credited.get(stream_id, 0), self.granted.get(stream_id, 0), self.blocked.get(stream_id, 0.0))

    def close(self, stream_id: int) -> Account | None:
        """The stream has ended: forget its id. Return what was known of it, None for nothing."""
        credited = self.credited.pop(stream_id, 0)
        granted = self.granted.pop(stream_id, 0)
        blocked = self.blocked.pop(stream_id, 0.0)
        return Account(credited, granted, blocked) if credited or granted or blocked else None

    def add_credit(self, stream_id: int, credit: int) -> None:
        """The peer lets the stream send so much more than the initial window."""
        self.credited[stream_id] = self.credited.get(stream_id, 0) + credit

    def begin_wait(self, stream: object) -> None:
        """The first writer of the stream waits for credit from now on."""
        self.waits[stream] = time.monotonic()

    def end_wait(self, stream: object) -> float:
        """It does not any more; return how long it did."""
        seconds = time.monotonic() - self.waits.pop(stream)
        self.blocked_in_all += seconds
        return seconds

    def waiting(self, stream: object) -> float:
        """How long the wait lasts that goes on; 0.0 where none does."""
        since = self.waits.get(stream)
        return 0.0 if since is None else time.monotonic() - since

    def all_blocked(self) -> float:
        """Seconds of all waits, those that go on included. Any thread may ask."""
        now = time.monotonic()
        return self.blocked_in_all + sum(now - since for since in list(self.waits.values()))
