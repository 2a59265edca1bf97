"""Pings: which are answered, how, and when."""

from __future__ import annotations

from .frames import ACK, FIN, MOST, PING, RST, SYN, WINDOW, Frame, describe, ping
from .peer import Failed, Peer
from .registry import MUST, ROBUST, STRICT, check

LENGTH = "Yamux spec, Length Field: an opaque value, echoed back"


def _pongs(frames: list[Frame]) -> list[int]:
    return [frame.length for frame in frames if frame.kind == PING and frame.flags & ACK]


def _answered(peer: Peer, *values: int) -> None:
    """Exactly those, in any order."""
    seen = _pongs(peer.quiet())
    if sorted(seen) != sorted(values):
        raise Failed(f"answers {sorted(seen)[:20]}, for {sorted(values)[:20]}")


@check(MUST, LENGTH, needs_echo=False)
def a_ping_is_answered_with_its_value(peer: Peer) -> None:
    """Ping+SYN is answered once, with ACK and the same value, be it 0 or 2**32-1."""
    peer.send(ping(0), ping(1), ping(0xCAFE), ping(MOST))
    _answered(peer, 0, 1, 0xCAFE, MOST)


@check(MUST, "Yamux spec, StreamID Field", needs_echo=False)
def an_answer_is_on_stream_0_with_ack_alone(peer: Peer) -> None:
    """js-yamux ends the session over a pong with a stream id or more flags than ACK."""
    peer.send(ping(7))
    pong = peer.until(lambda frame: frame.kind == PING, "answer")
    if (pong.flags, pong.stream, pong.length) != (ACK, 0, 7):
        raise Failed(f"answered with {pong}")


@check(ROBUST, "go-yamux answers 42 of 100", needs_echo=False)
def twenty_pings_at_once_are_answered_each(peer: Peer) -> None:
    """20 questions in one packet get 20 answers, equal values too: none are merged."""
    values = [*range(100, 115), 500, 500, 500, 500, 500]
    peer.send(*map(ping, values))
    _answered(peer, *values)


@check(MUST, "Yamux spec, Flag Field: ACK on a ping indicates a response", needs_echo=False)
def a_pong_is_not_answered(peer: Peer) -> None:
    """Ping+ACK that nobody asked for gets no answer, and no error."""
    peer.send(ping(5, ACK), ping(6, ACK))
    seen = peer.quiet()
    if seen:
        raise Failed(f"answered with {describe(seen)}")
    peer.barrier()


@check(STRICT, "spec.md 3.2", needs_echo=False)
def a_ping_without_syn_is_an_answer(peer: Peer) -> None:
    """Ping with no flag, or with FIN or RST, is not answered."""
    peer.send(ping(5, 0), ping(6, FIN), ping(7, RST))
    _answered(peer)


@check(STRICT, "spec.md 3.2", needs_echo=False)
def a_ping_with_syn_and_more_is_a_question(peer: Peer) -> None:
    """Ping with SYN+ACK or SYN+FIN+RST is answered as one with SYN."""
    peer.send(ping(5, SYN | ACK), ping(6, SYN | FIN | RST))
    _answered(peer, 5, 6)


@check(STRICT, "spec.md R29", needs_echo=False)
def the_stream_id_of_a_ping_is_not_looked_at(peer: Peer) -> None:
    """A ping with a stream id, known or not, is answered on stream 0."""
    stream = peer.open()
    peer.send(ping(5, SYN, 99), ping(6, SYN, stream))
    _answered(peer, 5, 6)


@check(ROBUST, "spec.md R26; go-yamux 6c2bbc3")
def an_answer_passes_a_stalled_stream(peer: Peer) -> None:
    """A ping is answered while five streams wait for credit with payload in hand."""
    for _ in range(5):
        peer.block(extra=50_000)
    peer.send(ping(11))
    _answered(peer, 11)


@check(STRICT, "spec.md R26: ahead of waiting data")
def an_answer_passes_waiting_payload(peer: Peer) -> None:
    """A client that has 16 MiB to read gets the answer before the last of it."""
    slow = peer.congested()
    slow.send(ping(12))
    # The server must see it before there is room for all the payload.
    peer.pause()
    slow.until(lambda frame: frame.kind == PING, "answer")
    if all(ledger.received == WINDOW for ledger in slow.streams.values()):
        raise Failed("the answer came behind all payload")


@check(ROBUST, "CVE-2019-9512, ping flood")
def a_ping_flood_from_who_does_not_read(peer: Peer) -> None:
    """100,000 pings behind 16 MiB of echo that nobody reads: the session lives or ends, and other clients are served."""
    flooder = _flooding(peer)
    peer.check_echo()
    peer.another().check_echo()
    _drain(flooder)


@check(STRICT, "spec.md R26, R28: 32 answers may wait")
def answers_that_wait_are_bounded(peer: Peer) -> None:
    """Of 100,000 pings, sent while nothing is read, half are answered at most: the others were dropped, not kept.

    Those that a busy server takes in only when it is read again are answered rightly; so are those whose answers the
    system holds.
    """
    flooder = _flooding(peer)
    peer.pause()
    _drain(flooder)
    answers = len(_pongs(flooder.frames))
    if answers > 50_000:
        raise Failed(f"{answers} answers had been kept")


def _flooding(peer: Peer) -> Peer:
    flooder = peer.congested()
    flooder.pour(b"".join(ping(value) for value in range(100_000)))
    return flooder


def _drain(flooder: Peer) -> None:
    """Read all that waits, to the last; then the session must have ended, or live."""
    while flooder.collect(flooder.setting.silence) and not flooder.end:
        continue
    if not flooder.end:
        flooder.barrier()
