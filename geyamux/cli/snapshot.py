"""What a forwarder tells of itself: sessions, streams, and who holds each of them up, as one JSON object.

It reads what every user can read (`Session.stats`, `Stream.stats`) and changes nothing. It keeps nothing from one time to
the next either: rates are for the one who asks twice to work out. The forwarder's traffic goes on meanwhile, between two
slices of the list, so that the numbers of two streams may be some milliseconds apart.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Iterator
from itertools import chain
from typing import Any, TypeVar

import gevent

from .. import __version__
from ..session import Session
from ..stats import StreamStats
from ..stream import Stream
from ..tunnel import Splice
from .ends import name_of

__all__ = ["FORMAT", "snapshot"]

#: Of what is told; another one means other keys.
FORMAT = 1

#: More streams are not listed, only counted: nobody reads them all, and each is 400 bytes.
MOST_STREAMS = 500

#: So many streams or sessions are looked at before others have their turn: one or two milliseconds.
_SLICE = 500

#: A turn, in seconds: with 0 only other greenlets would have it, but no descriptor. libuv knows no shorter one.
_TURN = 0.001

_Item = TypeVar("_Item")

_began = time.monotonic()


def snapshot(sessions: Iterable[Session], splices: Iterable[Splice], **facts: object) -> dict[str, Any]:
    """Return what there is to know now, ready for JSON. Lets others run every 500 streams or sessions.

    `facts` are of the forwarder as a whole and go in as they are: trunk, to, from, state ("open", "retrying",
    "draining"), retry (seconds, where it waits to dial again) and reason.

    Of the streams at most 500 are listed: those that stand still first, longest without credit before others, then those
    with the most bytes per second of their life. `num_streams` counts all. A stream that has ended on both sides is still
    one while a splice has bytes of it.
    """
    sessions, splices = tuple(sessions), tuple(splices)
    spliced = {id(splice.a): (splice, splice.b) for splice in splices}
    spliced.update((id(splice.b), (splice, splice.a)) for splice in splices)
    ends = chain.from_iterable((splice.a, splice.b) for splice in splices)
    streams = dict.fromkeys(chain(*(session.streams for session in sessions), (e for e in ends if isinstance(e, Stream))))
    now = time.monotonic()
    rows = []
    for number, stream in enumerate(_in_turns(streams)):
        splice, other = spliced.get(id(stream), (None, None))
        stats = stream.stats()
        age = None if splice is None else now - splice.began
        rows.append((_rank(stats, age), number, stream, other, age, stats))
    # The number decides between equals: nothing behind it can be compared.
    rows.sort()
    return {
        "format": FORMAT,
        "version": __version__,
        "pid": os.getpid(),
        "uptime": now - _began,
        **facts,
        "sessions": [_of_session(session) for session in _in_turns(sessions)],
        "num_streams": len(rows),
        "streams": [_of_stream(*row[2:]) for row in rows[:MOST_STREAMS]],
    }


def _in_turns(items: Iterable[_Item]) -> Iterator[_Item]:
    """Each of them, with a pause after many."""
    for number, item in enumerate(items, 1):
        yield item
        if number % _SLICE == 0:
            gevent.sleep(_TURN)


def who_stalls(stats: StreamStats) -> str:
    """Who holds a stream up, judged from this side of the trunk; "" where nobody does.

    "link": the connection to the peer does not take what is written. "peer": bytes wait here for credit, so the peer does
    not read. "here": bytes wait that nobody takes, so the local connection is slow. A stream that makes use of all it is
    given has such moments, too: only one that stays there without a byte moving stands still.
    """
    if stats.is_queued:
        return "link"
    if stats.writers and not stats.send_credit:
        return "peer"
    if stats.unread and not stats.readers:
        return "here"
    return ""


def _rank(stats: StreamStats, age: float | None) -> tuple[bool, float, float]:
    """The lower the more it is worth a look."""
    stall = who_stalls(stats)
    moved = stats.bytes_sent + stats.bytes_received
    return not stall, -stats.blocked if stall else 0.0, -moved / max(age or 0.0, 1.0)


def _of_session(session: Session) -> dict[str, Any]:
    stats = session.stats()
    return {
        "name": session.name,
        "peer": name_of(session.getpeername()),
        "age": stats.age,
        "rtt": stats.rtt,
        "idle": stats.idle,
        "streams": stats.streams,
        "backlog": stats.backlog,
        "blocked_streams": stats.blocked_streams,
        "bytes_sent": stats.bytes_sent,
        "bytes_received": stats.bytes_received,
        "queued": stats.queued,
        "unread": stats.unread,
        "resets": {reason: count for reason, count in stats.resets.items() if count},
    }


def _of_stream(stream: Stream, other: Any, age: float | None, stats: StreamStats) -> dict[str, Any]:
    return {
        "session": stream.session.name,
        "id": stats.stream_id,
        "state": stats.state,
        "peer": _where(other),
        "age": age,
        "bytes_sent": stats.bytes_sent,
        "bytes_received": stats.bytes_received,
        "unread": stats.unread,
        "receive_window": stats.receive_window,
        "receive_limit": stats.receive_limit,
        "send_credit": stats.send_credit,
        "blocked": stats.blocked,
        "is_queued": stats.is_queued,
        "stall": who_stalls(stats),
    }


def _where(end: Any) -> str:
    """Where the other half of a splice goes; "" where nobody knows."""
    if isinstance(end, Stream):
        return f"{end.session.name}/{end.stream_id}"
    try:
        # Who comes to a Unix socket has no name; the one he came to has.
        return name_of(end.getpeername() or end.getsockname())
    except (AttributeError, OSError):  # a child's pipes, or closed by now
        return ""
