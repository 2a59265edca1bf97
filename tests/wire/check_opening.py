"""Opening streams, acknowledging and refusing them, and their ids."""

from __future__ import annotations

from .frames import ACK, DATA, FIN, RST, SYN, UPDATE, WINDOW, Frame, data, describe, pattern, update
from .peer import Failed, NotApplicable, Peer
from .registry import MUST, ROBUST, STRICT, check

OPENING = "Yamux spec, Opening a stream"
FLAGS = "Yamux spec, Flag Field"
IDS = "Yamux spec, StreamID Field"


def _serves(peer: Peer, stream: int, payload: bytes) -> None:
    """A stream that is open here works to its end."""
    peer.send(data(stream, payload), update(stream, 0, FIN))
    peer.expect_echo(stream, payload)
    peer.await_fin(stream)


@check(MUST, OPENING)
def open_by_window_update(peer: Peer) -> None:
    """WindowUpdate+SYN opens a stream."""
    peer.send(update(1, 0, SYN))
    _serves(peer, 1, b"opened")


@check(MUST, OPENING)
def open_by_data(peer: Peer) -> None:
    """Data+SYN opens a stream, and its payload is the first of it."""
    peer.send(data(1, b"first ", SYN), data(1, b"second"), update(1, 0, FIN))
    peer.expect_echo(1, b"first second")
    peer.await_fin(1)


@check(MUST, OPENING)
def open_by_empty_data(peer: Peer) -> None:
    """Data+SYN of length 0 opens a stream."""
    peer.send(data(1, b"", SYN))
    _serves(peer, 1, b"opened")


@check(MUST, OPENING)
def payload_need_not_wait_for_the_ack(peer: Peer) -> None:
    """A whole window may follow SYN in the same packet."""
    payload = pattern(WINDOW)
    peer.send(update(1, 0, SYN) + data(1, payload))
    peer.expect_echo(1, payload)


@check(MUST, OPENING)
def open_by_data_as_large_as_the_window(peer: Peer) -> None:
    """Data+SYN may bring the whole initial window."""
    payload = pattern(WINDOW)
    peer.send(data(1, payload, SYN))
    peer.expect_echo(1, payload)


@check(MUST, "Yamux spec, Flow Control: a window update as part of the SYN")
def credit_on_syn_is_a_delta(peer: Peer) -> None:
    """The length of SYN is added to the initial 256 KiB: so much comes back without further credit, and no more."""
    stream, payload = peer.block(credit=100_000)
    peer.quiet()
    peer.expect_echo(stream, payload[: WINDOW + 100_000])


@check(MUST, FLAGS)
def open_with_fin(peer: Peer) -> None:
    """WindowUpdate+SYN+FIN: a stream without payload, acknowledged and ended."""
    stream = peer.open(flags=FIN)
    peer.await_fin(stream)
    peer.expect_echo(stream, b"")


@check(MUST, FLAGS)
def open_with_payload_and_fin(peer: Peer) -> None:
    """Data+SYN+FIN: a whole request in one frame, echoed and ended."""
    peer.send(data(1, b"all in one", SYN | FIN))
    peer.expect_echo(1, b"all in one")
    peer.await_fin(1)


@check(STRICT, "spec.md 3.1")
def open_with_ack_is_open(peer: Peer) -> None:
    """SYN+ACK: an opener has nothing to acknowledge, the flag means nothing."""
    peer.send(update(1, 0, SYN | ACK))
    _serves(peer, 1, b"opened")


@check(STRICT, "spec.md 3.1")
def open_with_rst_opens_nothing(peer: Peer) -> None:
    """WindowUpdate+SYN+RST: no stream, no answer."""
    peer.open(flags=RST)
    seen = peer.quiet()
    if seen:
        raise Failed(f"answered with {describe(seen)}")


@check(STRICT, "spec.md 3.1, 2.6")
def open_by_data_with_rst_opens_nothing(peer: Peer) -> None:
    """Data+SYN+RST: no stream, no answer, and its payload is read off the connection."""
    peer.send(data(1, b"x" * 500, SYN | RST))
    seen = peer.quiet()
    if seen:
        raise Failed(f"answered with {describe(seen)}")


@check(MUST, OPENING, needs_echo=False)
def each_open_is_answered(peer: Peer) -> None:
    """Each SYN is answered with ACK or with RST."""
    streams = [peer.open(b"?") for _ in range(20)]
    for stream in streams:
        ledger = peer.streams[stream]
        peer.pump(lambda ledger=ledger: bool(ledger.acks or ledger.reset), f"ACK or RST on stream {stream}")  # type: ignore[misc]


@check(MUST, OPENING)
def the_first_frame_of_the_server_has_ack(peer: Peer) -> None:
    """Nothing comes on a stream ahead of its ACK: the first frame bears it, or is the RST that refuses."""
    for stream in [peer.open(b"?") for _ in range(20)]:
        peer.expect_echo(stream, b"?")
        first = peer.streams[stream].frames[0]
        if not first.flags & (ACK | RST):
            raise Failed(f"the first frame is {first}")


@check(MUST, OPENING + "; hashicorp sends no ACK where FIN came before its accept")
def a_stream_that_ends_at_once_is_acknowledged(peer: Peer) -> None:
    """SYN, payload and FIN in one frame get an ACK, too, 50 times of 50: some openers time it."""
    streams = [peer.new_id() for _ in range(50)]
    for stream in streams:
        peer.send(data(stream, b"quick", SYN | FIN))
        peer.await_fin(stream)
    missing = [stream for stream in streams if not peer.streams[stream].frames[0].flags & (ACK | RST)]
    if missing:
        raise Failed(f"{len(missing)} of 50 streams were answered without ACK")


@check(MUST, OPENING)
def ack_comes_once(peer: Peer) -> None:
    """One ACK for a stream that moves 600,000 bytes each way; a second would free another stream's place."""
    stream, payload = peer.open(), pattern(600_000)
    peer.write(stream, payload, grant=True)
    peer.send(update(stream, WINDOW, FIN))
    peer.await_fin(stream)
    peer.expect_echo(stream, payload)
    acks = [frame for frame in peer.streams[stream].frames if frame.flags & ACK]
    if len(acks) != 1:
        raise Failed(f"{len(acks)} frames with ACK")


@check(STRICT, "spec.md R6; js-yamux and rust-yamux acknowledge with their first payload", needs_echo=False)
def a_silent_stream_is_acknowledged(peer: Peer) -> None:
    """ACK comes although neither side has said anything on the stream."""
    peer.await_ack(peer.open())


@check(STRICT, "spec.md R6; py-libp2p loses flags beside ACK")
def ack_is_a_frame_of_its_own(peer: Peer) -> None:
    """The first frame of the server is a WindowUpdate with ACK and no other flag, even if FIN came with SYN."""
    peer.send(data(1, b"early", SYN | FIN), update(3, 0, SYN | FIN))
    for stream in (1, 3):
        peer.await_fin(stream)
        first = peer.streams[stream].frames[0]
        if (first.kind, first.flags) != (UPDATE, ACK):
            raise Failed(f"the first frame is {first}")


@check(ROBUST, "spec.md 3.1")
def an_ack_from_the_opener_means_nothing(peer: Peer) -> None:
    """ACK, twice, on a stream that we opened does no harm."""
    stream = peer.open()
    peer.await_ack(stream)
    peer.send(update(stream, 0, ACK), data(stream, b"acked", ACK))
    peer.expect_echo(stream, b"acked")


@check(STRICT, "spec.md R7; js-yamux sends ACK+FIN in one frame")
def ack_and_fin_in_one_frame(peer: Peer) -> None:
    """ACK+FIN on WindowUpdate and on Data with payload ends our half, with the payload."""
    first, second = peer.open(b"x"), peer.open(b"x")
    peer.send(update(first, 0, ACK | FIN), data(second, b"!", ACK | FIN))
    for stream, payload in ((first, b"x"), (second, b"x!")):
        peer.await_fin(stream)
        peer.expect_echo(stream, payload)


# --- ids ---


@check(MUST, IDS)
def ids_may_have_gaps(peer: Peer) -> None:
    """Any odd id may be the next, the highest one too."""
    for stream in (7, 101, 2**31 + 1, 2**32 - 1):
        peer.send(update(stream, 0, SYN))
        _serves(peer, stream, b"here")


@check(STRICT, "spec.md R4; the opens of hashicorp and go-yamux race")
def ids_may_come_out_of_order(peer: Peer) -> None:
    """A lower id than the last one opens a stream, too."""
    for stream in (601, 599, 1, 315):
        peer.send(update(stream, 0, SYN), data(stream, b"here"))
    for stream in (1, 315, 599, 601):
        peer.expect_echo(stream, b"here")


@check(STRICT, "spec.md R4; fine with all peers known")
def an_id_may_come_again_after_both_fins(peer: Peer) -> None:
    """The id of a stream that both sides have ended opens a new one, with nothing left over from the old."""
    for payload in (b"first life", b"second life", pattern(WINDOW)):
        peer.send(update(5, 0, SYN))
        _serves(peer, 5, payload)
        peer.barrier()


@check(STRICT, "spec.md R4; fine with all peers known")
def an_id_may_come_again_after_rst(peer: Peer) -> None:
    """The id of a stream that was reset opens a new one, with a window of its own."""
    stream, _ = peer.block()
    peer.send(update(stream, 0, RST))
    peer.quiet()
    peer.send(update(stream, 0, SYN))
    _serves(peer, stream, pattern(WINDOW, 3))


@check(STRICT, "spec.md 3.3: behind RST, either way, the id is free")
def an_id_may_come_again_at_once(peer: Peer) -> None:
    """SYN, payload, RST and SYN on one id in one packet: the second stream is served, without what the first had."""
    peer.send(update(5, 0, SYN) + data(5, b"gone") + update(5, 0, RST) + update(5, 0, SYN))
    _serves(peer, 5, b"here")


# --- too many ---


def _answers(peer: Peer, streams: list[int]) -> list[int]:
    """Wait for an answer to each; return those refused. The session must have lived through it."""
    waiting, refused = set(streams), list[int]()

    def done() -> bool:
        for stream in list(waiting):
            ledger = peer.streams[stream]
            if ledger.reset:
                refused.append(stream)
            if ledger.acks or ledger.reset:
                waiting.discard(stream)
        return not waiting

    def answered(frame: Frame) -> bool:
        return bool(frame.flags & (ACK | RST)) and done()

    if not done():
        try:
            peer.until(answered, "answer to each SYN")
        except Failed as error:
            raise Failed(f"{len(waiting)} of {len(streams)} opens were not answered: {error}") from None
    return refused


@check(ROBUST, "spec.md R5; yamux accept backlog of 256", needs_echo=False)
def a_burst_of_opens_is_answered_one_by_one(peer: Peer) -> None:
    """2,000 SYNs in one go: each gets ACK or RST, and the session lives."""
    streams = [peer.new_id() for _ in range(2000)]
    peer.send(*(update(stream, 0, SYN) + data(stream, b"?") for stream in streams))
    _answers(peer, streams)
    peer.barrier()


@check(ROBUST, "spec.md R5")
def a_refused_stream_leaves_nothing_behind(peer: Peer) -> None:
    """What follows on a stream refused by RST is drained; what was not refused works."""
    streams = [peer.new_id() for _ in range(2000)]
    peer.send(*(update(stream, 0, SYN) + data(stream, b"x" * 20) for stream in streams))
    refused = _answers(peer, streams)
    if not refused:
        raise NotApplicable("the server took 2,000 streams at once and refused none")
    for stream in refused[:100]:
        peer.send(data(stream, b"late" * 100), update(stream, 5), update(stream, 0, FIN))
    taken = next((stream for stream in streams if not peer.streams[stream].reset), None)
    if taken is not None:
        peer.expect_echo(taken, b"x" * 20)
    peer.check_echo()


@check(STRICT, "spec.md R28, max_incoming_streams; CVE-2022-23492", needs_echo=False)
def streams_without_end_are_refused_some_day(peer: Peer) -> None:
    """Of 8,000 streams that are never ended some are refused by RST, and the session lives."""
    for _ in range(80):
        batch = [peer.open(b"?") for _ in range(100)]
        if _answers(peer, batch):
            peer.barrier()
            return
    raise Failed("8,000 streams are open and none was refused")


@check(ROBUST, "hard behaviour 19")
def a_thousand_streams_at_once(peer: Peer) -> None:
    """1,000 open streams are echoed each, and ended each."""
    streams: list[int] = []
    while len(streams) < 1000:
        # An opener has at most 256 streams unacknowledged.
        batch = [peer.open(b"stream %d" % n) for n in range(len(streams), len(streams) + 100)]
        if _answers(peer, batch):
            raise Failed(f"a stream was refused with {len(streams)} open")
        streams += batch
    peer.send(*(update(stream, 0, FIN) for stream in streams))
    for number, stream in enumerate(streams):
        peer.expect_echo(stream, b"stream %d" % number)
        peer.await_fin(stream)


@check(ROBUST, "CVE-2023-44487, rapid reset")
def opens_and_resets_by_the_hundred(peer: Peer) -> None:
    """500 pairs of SYN and RST: no frame of those streams is left afterwards, and the session serves the next."""
    for _ in range(5):
        streams = [peer.new_id() for _ in range(100)]
        peer.send(*(update(stream, 0, SYN) + update(stream, 0, RST) for stream in streams))
        peer.barrier()
    peer.quiet()
    late = len(peer.frames)
    peer.check_echo()
    stray = [frame for frame in peer.frames[late:] if frame.kind in (DATA, UPDATE) and frame.stream in streams]
    if stray:
        raise Failed(f"after the resets: {describe(stray)}")
