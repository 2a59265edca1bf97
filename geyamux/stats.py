"""What `stats()` returns: frozen records, a snapshot of one moment. They only hold numbers."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["SessionStats", "StreamStats"]


@dataclass(frozen=True, kw_only=True)
class SessionStats:
    """A session at one moment. Sizes are bytes, times seconds; counts are since it began unless said."""

    #: Streams that have not ended on both sides, now.
    streams: int
    #: Streams opened here, and streams of the peer that were taken in.
    opened: int
    incoming: int
    #: Streams of the peer that wait for ``accept``, now.
    backlog: int
    #: Own streams that the peer has not acknowledged, now.
    unacknowledged: int
    bytes_sent: int
    bytes_received: int
    frames_sent: int
    frames_received: int
    #: Bytes that wait for the connection, now.
    queued: int
    #: Bytes received that nobody has read, now.
    unread: int
    #: Smoothed round trip and the shortest one; None until measured.
    rtt: float | None
    min_rtt: float | None
    #: Since the peer was heard.
    idle: float


@dataclass(frozen=True, kw_only=True)
class StreamStats:
    """A stream at one moment. Sizes are bytes."""

    stream_id: int
    #: For people; see :mod:`geyamux.lifecycle`.
    state: str
    #: Received and not read.
    unread: int
    #: What the peer may still send, of how much.
    receive_window: int
    receive_limit: int
    #: What this side may still send.
    send_credit: int
    #: Greenlets that wait to read, and to write.
    readers: int
    writers: int
