"""Every attack: what a hostile client sends, and what must come of it.

A script yields bytes to send and seconds to pause. It opens streams with odd ids, as a client does, and says with the
first byte on each what the application (`attacks.server`) does with it. What a server may use of memory and of time is
in `attacks.arena`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TypeAlias

from .wire import ACK, DATA, FIN, GO_AWAY, LARGEST, PING, RST, SYN, WINDOW, data, header, update

Step: TypeAlias = "bytes | float"
Script: TypeAlias = "Iterator[Step]"

FULL = 1_000_000
#: All the streams that a session takes, and what its backlog takes at once.
STREAMS = 4096
BATCH = 200
#: A server that is not overwhelmed has accepted what came before.
MOMENT = 0.015
HUGE = 1 << 30


@dataclass(frozen=True)
class Attack:
    name: str
    #: For people.
    title: str
    script: Callable[[], Script]
    #: The session ends with GoAway(1), or lives on. None: which of them is a matter of speed.
    ends: bool | None
    #: What is attacked has an application that never accepts.
    never_accepts: bool = False
    #: Data that nobody reads: the receive budget may be used besides.
    is_unread: bool = False
    #: MiB by which memory may rise above what it was just before, where a defence keeps it far below the bound of all.
    rise: int | None = None
    #: Played again, on a new connection, until its time is over.
    repeats: bool = True
    #: The script has no end of its own.
    is_endless: bool = False
    connections: int = 1
    #: Of the attacker's socket, bytes.
    receive_buffer: int | None = None
    #: In the end it asks whether the session lives; not where it stops inside a frame.
    proves: bool = True


ATTACKS: dict[str, Attack] = {}


def attack(title: str, *, ends: bool | None, **more: object) -> Callable[[Callable[[], Script]], Callable[[], Script]]:
    """Enter a script into `ATTACKS`, under its own name."""

    def enter(script: Callable[[], Script]) -> Callable[[], Script]:
        ATTACKS[script.__name__] = Attack(script.__name__, title, script, ends, **more)  # type: ignore[arg-type]
        return script

    return enter


def ids(count: int, first: int = 1) -> range:
    """Stream ids of a client."""
    return range(first, first + 2 * count, 2)


def joined(frames: Iterable[bytes], size: int = 2000) -> Script:
    """In blocks, so that sending them costs less than taking them in."""
    block: list[bytes] = []
    for frame in frames:
        block.append(frame)
        if len(block) == size:
            yield b"".join(block)
            block = []
    yield b"".join(block)


def repeated(frame: bytes, count: int = FULL) -> Script:
    """The same frames again and again."""
    block = frame * 5000
    for _ in range(count // 5000):
        yield block


def opening(role: bytes, count: int = 1, *, credit: int = 0, first: int = 1) -> Script:
    """Open streams that do this, no faster than they are accepted."""
    for start in range(0, count, BATCH):
        batch = ids(min(BATCH, count - start), first + 2 * start)
        yield b"".join(update(each, SYN, credit) + data(each, role) for each in batch)
        yield MOMENT


# --- pings and session frames ---


@attack("ping flood, 1 M (CVE-2019-9512)", ends=False, rise=8)
def ping_flood() -> Script:
    yield from joined(header(PING, SYN, 0, each) for each in range(FULL))


@attack("ping flood on 4 connections at once", ends=False, connections=4)
def ping_floods() -> Script:
    yield from repeated(header(PING, SYN, 0, 7), FULL // 4)


@attack("1 M answers to pings never sent", ends=True)
def pong_flood() -> Script:
    yield from repeated(header(PING, ACK, 0, 7))


@attack("1 M GoAway(0)", ends=True)
def go_away_flood() -> Script:
    yield from repeated(header(GO_AWAY, 0, 0, 0))


@attack("GoAway(0) flood while 4,096 greenlets wait to write", ends=True, receive_buffer=4096)
def go_away_flood_with_writers() -> Script:
    yield from opening(b"t", STREAMS, credit=HUGE)
    yield from repeated(header(GO_AWAY, 0, 0, 0), 300_000)


# --- opening and resetting ---


@attack("SYN+RST in one frame, 1 M (CVE-2023-44487)", ends=True)
def syn_with_rst() -> Script:
    yield from joined(update(each, SYN | RST) for each in ids(FULL))


@attack("SYN, then RST, 1 M pairs (CVE-2023-44487)", ends=True)
def syn_then_rst() -> Script:
    yield from joined(update(each, SYN) + update(each, RST) for each in ids(FULL))


@attack("SYN, accepted, then RST, as fast as it can", ends=None, is_endless=True)
def rapid_reset_of_accepted() -> Script:
    for first in range(1, LARGEST, 2 * BATCH):
        batch = ids(BATCH, first)
        yield b"".join(data(each, b"h", SYN) for each in batch)
        yield 0.004
        yield b"".join(update(each, RST) for each in batch)


@attack("streams reset while the server has much to send on them", ends=None, is_endless=True, receive_buffer=4096)
def reset_of_senders() -> Script:
    for first in range(1, LARGEST, 2 * BATCH):
        batch = ids(BATCH, first)
        yield b"".join(data(each, b"s", SYN) for each in batch)
        yield 0.006
        yield b"".join(update(each, RST) for each in batch)


@attack("4,096 streams reset while each waits for its flush", ends=False, repeats=False, receive_buffer=4096)
def reset_of_flushers() -> Script:
    yield from opening(b"s", 8, credit=HUGE)
    yield from opening(b"f", STREAMS - 8, first=17)
    yield from joined((update(each, RST) for each in ids(STREAMS - 8, 17)), STREAMS)


@attack("4,096 streams reset while each waits to write", ends=False, repeats=False, receive_buffer=4096)
def reset_of_writers() -> Script:
    yield from opening(b"t", STREAMS, credit=HUGE)
    yield from joined((update(each, RST) for each in ids(STREAMS)), STREAMS)


@attack("SYNs without end, application accepts and holds", ends=True)
def endless_syns() -> Script:
    yield from joined(update(each, SYN) for each in ids(FULL))


@attack("SYNs without end, application never accepts (provoked resets, CVE-2025-8671)", ends=True, never_accepts=True)
def endless_syns_never_accepted() -> Script:
    yield from joined(update(each, SYN) for each in ids(FULL))


@attack("4,096 streams held, then SYNs without end", ends=True)
def syns_beyond_all_streams() -> Script:
    yield from opening(b"h", STREAMS)
    yield from joined(update(each, SYN) for each in ids(FULL, 2 * STREAMS + 1))


@attack("4,096 streams, then an error: all end at once, again and again", ends=True)
def error_with_many_streams() -> Script:
    yield from opening(b"h", STREAMS)
    yield update(2, SYN)


@attack("4,096 waiting writers, then an error", ends=True, receive_buffer=4096)
def error_with_many_writers() -> Script:
    yield from opening(b"t", STREAMS, credit=HUGE)
    yield update(2, SYN)


@attack("open, echo, close at full speed", ends=None, is_endless=True)
def churn() -> Script:
    for first in range(1, LARGEST, 2 * BATCH):
        batch = ids(BATCH, first)
        yield b"".join(data(each, b"e", SYN) + data(each, b"x" * 64) + update(each, FIN) for each in batch)
        yield 0.002


@attack("64 KiB of bulk, then 64 KiB of SYN+RST pairs, in turn", ends=None, is_endless=True)
def bulk_then_resets() -> Script:
    yield from opening(b"d")
    pairs = b"".join(update(each, SYN) + update(each, RST) for each in ids(2700, 3))
    while True:
        yield data(1, bytes(65536)) * 2 + pairs


@attack("the same stream id opened and reset, 1 M", ends=True)
def one_id_again_and_again() -> Script:
    yield from repeated(update(1, SYN) + update(1, RST))


@attack("4,096 streams opened and finished, application never accepts", ends=True, never_accepts=True)
def syn_fin_never_accepted() -> Script:
    yield from joined(data(each, b"x", SYN | FIN) for each in ids(FULL))


# --- frames that move nothing ---


@attack("empty Data, 1 M (CVE-2019-9518)", ends=True)
def empty_data() -> Script:
    yield from opening(b"d")
    yield from repeated(header(DATA, 0, 1, 0))


@attack("zero credit, 1 M", ends=True)
def zero_credit() -> Script:
    yield from opening(b"d")
    yield from repeated(update(1))


@attack("FIN flood, 1 M on one stream", ends=True)
def fin_flood() -> Script:
    yield from opening(b"h")
    yield from repeated(update(1, FIN))


@attack("RST for streams that are not there, 1 M", ends=True)
def rst_unknown() -> Script:
    yield from joined(update(each, RST) for each in ids(FULL))


@attack("credit for streams that are not there, 1 M", ends=True)
def credit_unknown() -> Script:
    yield from joined(update(each, 0, 9) for each in ids(FULL))


@attack("Data for streams that are not there, 1 M", ends=True)
def data_unknown() -> Script:
    yield from joined(data(each, b"x") for each in ids(FULL))


@attack("useless frames, paid for with payload", ends=False, is_endless=True)
def useless_but_paid() -> Script:
    yield from opening(b"d")
    block = data(1, bytes(16384)) + update(1) * 15
    while True:
        yield block * 8
        yield 0.002


# --- credit ---


@attack("one-byte credits, 1 M, for a stream with much to send (CVE-2019-9511)", ends=False)
def one_byte_credits() -> Script:
    yield from opening(b"s")
    yield from repeated(update(1, 0, 1))


@attack("one-byte credits for 4,096 streams in turn", ends=False, is_endless=True)
def one_byte_credits_everywhere() -> Script:
    yield from opening(b"s", STREAMS)
    block = b"".join(update(each, 0, 1) for each in ids(STREAMS))
    while True:
        yield block


@attack("credit beyond 2**32-1 (CVE-2026-31814)", ends=True)
def credit_overflow() -> Script:
    yield from opening(b"h")
    yield update(1, 0, LARGEST - WINDOW + 1)


@attack("credit beyond 2**32-1 on SYN (rust-yamux 228)", ends=True)
def credit_overflow_on_syn() -> Script:
    yield update(1, SYN, LARGEST - WINDOW + 1)


@attack("credit that overflows little by little", ends=True)
def credit_overflow_in_parts() -> Script:
    yield from opening(b"h")
    yield update(1, 0, HUGE) * 4


@attack("4,096 streams that the server sends on, 256 KiB each", ends=False, repeats=False)
def streams_never_read() -> Script:
    yield from opening(b"s", STREAMS)


@attack("4,096 streams with a huge window (CVE-2019-9517)", ends=False, repeats=False)
def huge_window() -> Script:
    yield from opening(b"s", STREAMS, credit=HUGE)


@attack("4,096 streams with a huge window and small messages", ends=False, repeats=False)
def huge_window_small_messages() -> Script:
    yield from opening(b"t", STREAMS, credit=HUGE)


# --- data ---


@attack("one-byte frames, 1 M, application reads", ends=False)
def one_byte_frames_read() -> Script:
    yield from opening(b"d")
    yield from repeated(data(1, b"x"))


@attack("empty lines in large frames, application reads line by line", ends=None)
def newlines() -> Script:
    yield from opening(b"L")
    for _ in range(100):
        yield data(1, b"\n" * 30_000)
        yield 0.01


@attack("large frames, application reads byte by byte", ends=None)
def bytes_one_by_one() -> Script:
    yield from opening(b"1")
    for _ in range(100):
        yield data(1, bytes(30_000))
        yield 0.01


@attack("one-byte frames, 16 whole windows, application reads nothing", ends=False, repeats=False, rise=16)
def one_byte_frames_unread() -> Script:
    yield from opening(b"h", 16)
    for each in ids(16):
        yield data(each, b"x") * (WINDOW - 1)


@attack("one-byte frames in turn on 4,096 streams that echo", ends=False, is_endless=True)
def one_byte_frames_everywhere() -> Script:
    yield from opening(b"e", STREAMS)
    block = b"".join(data(each, b"x") for each in ids(STREAMS))
    while True:
        yield block


@attack("unread data on 4,096 streams, 256 KiB each", ends=False, repeats=False, is_unread=True)
def unread_whole_windows() -> Script:
    yield from opening(b"h", STREAMS)
    for each in ids(STREAMS):
        yield data(each, bytes(WINDOW - 1))


@attack("unread data spread evenly over 4,096 streams, more opened", ends=False, repeats=False, is_unread=True)
def unread_spread() -> Script:
    yield from opening(b"h", STREAMS)
    for _ in range(15):
        yield b"".join(data(each, bytes(4099)) for each in ids(STREAMS))
    yield from opening(b"h", STREAMS, first=2 * STREAMS + 1)
    for _ in range(15):
        yield b"".join(data(each, bytes(4099)) for each in ids(STREAMS, 2 * STREAMS + 1))


@attack("unread data spread evenly, those reset replaced", ends=False, is_unread=True, repeats=False)
def unread_replaced() -> Script:
    waves, new = 6, 1024
    for wave in range(waves):
        yield from opening(b"r", new, first=1 + 2 * wave * new)
        oldest = 1 + 2 * new * max(0, wave - 3)
        for _ in range(6):
            yield b"".join(data(each, bytes(4099)) for each in range(oldest, 1 + 2 * (wave + 1) * new, 2))


@attack("unread data in pieces of every size", ends=False, repeats=False, is_unread=True)
def unread_small_pieces() -> Script:
    yield from opening(b"h", 2048)
    for size in (1, 15, 100, 513, 4095, 1, 4097, 3, 8191, 2, 4000):
        yield b"".join(data(each, bytes(size)) for each in ids(2048))


@attack("unread data: a byte left of every 60,000", ends=False, is_unread=True, repeats=False)
def unread_rests() -> Script:
    yield from opening(b"l", STREAMS)
    for each in ids(STREAMS):
        yield data(each, bytes(60_000) + b"\ny")


@attack("Data beyond the window", ends=True)
def data_beyond_window() -> Script:
    yield from opening(b"h")
    yield data(1, bytes(WINDOW - 1)) + data(1, b"x")


@attack("SYN+Data beyond the window (CVE-2026-32314)", ends=True)
def syn_data_beyond_window() -> Script:
    yield data(1, bytes(WINDOW + 1), SYN)


@attack("a header of 2**32-1 bytes on an open stream", ends=True)
def huge_length() -> Script:
    yield from opening(b"h")
    yield header(DATA, 0, 1, LARGEST) + bytes(1 << 20)


@attack("a header of 2**32-1 bytes for a stream that is not there", ends=True)
def huge_length_unknown() -> Script:
    yield header(DATA, 0, 1, LARGEST) + bytes(1 << 20)


@attack("Data for streams that the server has closed", ends=True)
def data_after_close() -> Script:
    yield from opening(b"c", 32)
    for each in ids(32):
        yield data(each, b"x" * 1000) * 300
    yield from repeated(data(1, b"x"))


@attack("resets provoked by Data after close (CVE-2025-8671)", ends=False, is_endless=True)
def provoked_resets() -> Script:
    for first in range(1, LARGEST, 16):
        yield from opening(b"c", 8, first=first)
        for each in ids(8, first):
            yield data(each, bytes(WINDOW // 2)) * 2
            yield data(each, bytes(WINDOW // 2))


@attack("Data after the peer's own FIN", ends=True)
def data_after_fin() -> Script:
    yield from opening(b"h")
    yield update(1, FIN)
    yield data(1, bytes(1024)) * 300


# --- slowness ---


@attack("bodies that trickle, on 64 connections", ends=False, connections=64, is_endless=True, proves=False)
def trickling_bodies() -> Script:
    yield from opening(b"e", 8)
    for each in ids(1 << 20):
        stream = each % 16
        yield header(DATA, 0, stream if stream % 2 else 1, 1000)
        for _ in range(1000):
            yield b"x"


@attack("300 connections that send nothing, or half a header", ends=False, repeats=False, connections=300)
def slow_drip() -> Script:
    yield b""
    yield header(PING, SYN, 0, 7)[:5]
    yield 0.001
    yield header(PING, SYN, 0, 7)[5:]


@attack("connections opened and closed at full speed", ends=False, repeats=True)
def connection_churn() -> Script:
    yield update(1, SYN)


# --- what no peer sends ---


@attack("SYN with an id of the wrong parity", ends=True)
def wrong_parity() -> Script:
    yield update(2, SYN)


@attack("SYN with id 0", ends=True)
def id_zero() -> Script:
    yield data(0, b"x", SYN)


@attack("SYN with an id in use", ends=True)
def id_in_use() -> Script:
    yield update(1, SYN) * 2


@attack("an unknown type", ends=True)
def unknown_type() -> Script:
    yield header(4, 0, 0, 0)


@attack("HTTP where Yamux should be", ends=True)
def http() -> Script:
    yield b"GET / HTTP/1.1\r\nHost: example.com\r\n\r\n"
