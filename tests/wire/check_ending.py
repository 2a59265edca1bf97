"""How a session ends: GoAway, the end of the connection, and what a server says when the client breaks the protocol."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from .frames import ACK, DATA, FIN, GO_AWAY, MOST, RST, SYN, WINDOW, data, describe, go_away, pattern, ping, raw, update
from .peer import Failed, Peer
from .registry import MUST, ROBUST, STRICT, Check, add, check

TERMINATION = "Yamux spec, Session termination"
FLOW = "Yamux spec, Flow Control"
IDS = "Yamux spec, StreamID Field"


@check(STRICT, "spec.md R21; go-yamux, js, rust and py-libp2p end every stream")
def go_away_0_lets_streams_live(peer: Peer) -> None:
    """After our GoAway(0) an open stream still echoes, ends, and pings are answered."""
    stream = peer.open(b"before ")
    peer.expect_echo(stream, b"before ")
    peer.send(go_away(0), data(stream, b"after"))
    peer.expect_echo(stream, b"before after")
    peer.barrier()
    peer.send(update(stream, 0, FIN))
    peer.await_fin(stream)


@check(STRICT, "spec.md R21")
def go_away_0_lets_its_sender_open(peer: Peer) -> None:
    """Who said GoAway(0) takes no streams, but may still open some."""
    peer.send(go_away(0))
    peer.check_echo()


@check(STRICT, "spec.md 9")
def go_away_0_may_be_repeated(peer: Peer) -> None:
    """A second and third GoAway(0) say nothing new."""
    peer.send(go_away(0), go_away(0))
    peer.check_echo()
    peer.send(go_away(0))
    peer.check_echo()


@check(STRICT, "spec.md R29")
def go_away_has_no_flags_and_no_stream(peer: Peer) -> None:
    """GoAway(0) with flags and a stream id is a GoAway(0)."""
    stream = peer.open(b"x")
    peer.expect_echo(stream, b"x")
    peer.send(go_away(0, 0xFFFF, stream))
    peer.check_echo()


def _go_away(code: int) -> None:
    def function(peer: Peer) -> None:
        stream = peer.open(b"x")
        peer.expect_echo(stream, b"x")
        peer.send(go_away(code))
        peer.read_to_end()

    purpose = f"GoAway({code}), an error, ends the connection, although a stream is open."
    add(Check(f"go_away_{code}_ends_the_connection", ROBUST, purpose, TERMINATION, True, function))


for _code in (1, 2, 77):
    _go_away(_code)


@check(ROBUST, "spec.md 10")
def the_server_closes_when_we_have_closed(peer: Peer) -> None:
    """With all streams ended, our half-close of TCP makes the server end the connection."""
    peer.check_echo()
    peer.send(go_away(0))
    peer.half_close()
    peer.read_to_end()


@check(ROBUST, "spec.md 10; hashicorp says no GoAway")
def the_server_closes_without_our_go_away(peer: Peer) -> None:
    """The same without a GoAway from us, and with a stream left open."""
    peer.open(b"left open")
    peer.barrier()
    peer.half_close()
    peer.read_to_end()


# --- what breaks the protocol ---

Attack = Callable[[Peer], bytes]


def _version(peer: Peer) -> bytes:
    """A header of version 1."""
    return raw(1, 2, SYN, 0, 0)


def _type(peer: Peer) -> bytes:
    """A header of type 4."""
    return raw(0, 4, 0, 0, 0)


def _window(peer: Peer) -> bytes:
    """One Data frame of a byte more than the window."""
    stream = peer.open()
    peer.await_ack(stream)
    return data(stream, bytes(peer.streams[stream].allowed + 1))


def _window_in_the_end(peer: Peer) -> bytes:
    """One byte more on a stream whose window has been used up."""
    stream = peer.open()
    ledger = peer.streams[stream]
    while ledger.allowed:
        while ledger.allowed:
            peer.send(data(stream, bytes(min(ledger.allowed, 65536))))
            peer.collect(0)
        peer.quiet()
    return data(stream, b"!")


def _window_on_syn(peer: Peer) -> bytes:
    """Data+SYN of 262,145 bytes."""
    return data(peer.new_id(), bytes(WINDOW + 1), SYN)


def _length(peer: Peer) -> bytes:
    """A Data header of 2**32-1 bytes on an open stream, and no payload."""
    stream = peer.open()
    peer.await_ack(stream)
    return raw(0, DATA, 0, stream, MOST)


def _length_on_syn(peer: Peer) -> bytes:
    """A Data+SYN header of 2**32-1 bytes, and no payload."""
    return raw(0, DATA, SYN, peer.new_id(), MOST)


def _length_unknown(peer: Peer) -> bytes:
    """A Data header of 2**32-1 bytes on a stream that is not open, and no payload."""
    return raw(0, DATA, 0, 4_001, MOST)


def _credit(peer: Peer) -> bytes:
    """Credit of 2**32-1 on top of the initial window."""
    return update(peer.open(), MOST)


def _credit_in_steps(peer: Peer) -> bytes:
    """Credit that passes 2**32-1 in three steps."""
    return update(peer.open(), 2**31) + update(1, 2**31 - WINDOW - 1) + update(1, 1)


def _credit_on_syn(peer: Peer) -> bytes:
    """WindowUpdate+SYN of 2**32-1, on top of the initial window."""
    return update(peer.new_id(), MOST, SYN)


def _id_0(peer: Peer) -> bytes:
    """SYN with stream id 0, which is the session's."""
    return update(0, 0, SYN)


def _id_even(peer: Peer) -> bytes:
    """SYN with an even id, which is the server's to use."""
    return update(2, 0, SYN)


def _id_even_with_rst(peer: Peer) -> bytes:
    """SYN+RST with an even id: the id is judged first."""
    return update(2, 0, SYN | RST)


def _id_in_use(peer: Peer) -> bytes:
    """SYN for a stream that is open."""
    stream = peer.open(b"x")
    peer.expect_echo(stream, b"x")
    return update(stream, 0, SYN)


def _not_at_all(peer: Peer) -> None:
    raise Failed("the session goes on as if nothing had happened")


def _if_not_taken(peer: Peer) -> None:
    """A server may overlook a SYN with a wrong id, but not open the stream."""
    taken = [stream for stream, ledger in peer.streams.items() if not stream & 1 and ledger.acks]
    if taken:
        raise Failed(f"the server took stream {taken[0]}")


def _if_not_wrapped(peer: Peer) -> None:
    """A server may hold the sum at its highest value, but not let it wrap."""
    payload = pattern(WINDOW + 50_000)
    try:
        peer.write(1, payload)
        peer.expect_echo(1, payload)
    except Failed:
        raise Failed(f"the credit has wrapped: the server stops after {peer.streams[1].received} bytes") from None


@dataclasses.dataclass(frozen=True)
class Breach:
    name: str
    level: str
    source: str
    attack: Attack
    #: What is forgiven where neither the session ends nor a stream is reset.
    forgiven: Callable[[Peer], None] = _not_at_all


BREACHES = [
    Breach("a_wrong_version", MUST, "Yamux spec, Version Field", _version),
    Breach("an_unknown_type", MUST, "Yamux spec, Type Field", _type),
    Breach("data_beyond_the_window", MUST, FLOW, _window),
    Breach("one_byte_beyond_a_used_up_window", MUST, FLOW, _window_in_the_end),
    Breach("syn_with_data_beyond_the_window", MUST, "CVE-2026-32314", _window_on_syn),
    Breach("a_header_of_4_gib", ROBUST, "GHSA-hmj8-5xmh-5573", _length),
    Breach("a_header_of_4_gib_with_syn", ROBUST, "GHSA-hmj8-5xmh-5573, CVE-2026-32314", _length_on_syn),
    Breach("a_header_of_4_gib_for_no_stream", ROBUST, "GHSA-hmj8-5xmh-5573", _length_unknown),
    Breach("credit_beyond_32_bits", ROBUST, "CVE-2026-31814", _credit, _if_not_wrapped),
    Breach("credit_beyond_32_bits_in_steps", ROBUST, "CVE-2026-31814", _credit_in_steps, _if_not_wrapped),
    Breach("credit_beyond_32_bits_with_syn", ROBUST, "rust-yamux#228", _credit_on_syn, _if_not_wrapped),
    Breach("an_id_of_0", MUST, IDS, _id_0, _if_not_taken),
    Breach("an_even_id", ROBUST, IDS, _id_even, _if_not_taken),
    Breach("an_even_id_with_rst", STRICT, "spec.md 3.1", _id_even_with_rst, _if_not_taken),
    Breach("an_id_in_use", MUST, IDS, _id_in_use),
]


def _is_repelled(breach: Breach) -> Callable[[Peer], None]:
    """The connection ends, or the stream alone is reset or not taken; and then a client that behaves is served."""

    def function(peer: Peer) -> None:
        other = peer.another()
        peer.send(breach.attack(peer))
        try:
            peer.quiet()
        except Failed as reason:
            if not peer.end:
                raise Failed(f"the session hangs: {reason}") from None
        else:
            if not any(frame.flags & RST for frame in peer.frames):
                breach.forgiven(peer)
        other.check_echo()

    return function


def _is_told(breach: Breach) -> Callable[[Peer], None]:
    """GoAway(1) is the last frame before the connection ends in good order."""

    def function(peer: Peer) -> None:
        peer.send(breach.attack(peer))
        seen = peer.read_to_end()
        if not seen or (seen[-1].kind, seen[-1].length) != (GO_AWAY, 1):
            raise Failed(f"the connection {peer.end} after {describe(seen)}")
        if peer.end != "ended":
            raise Failed(f"GoAway(1) came, but the connection was {peer.end}")

    return function


for _breach in BREACHES:
    _what = (_breach.attack.__doc__ or "").rstrip(".")
    _ends = f"{_what}: ends the session, or that stream."
    add(Check(f"{_breach.name}_is_repelled", _breach.level, _ends, _breach.source, True, _is_repelled(_breach)))
    _says = f"{_what}: said with GoAway(1), the last frame."
    add(Check(f"{_breach.name}_is_told", STRICT, _says, f"spec.md R23; {TERMINATION}", True, _is_told(_breach)))


@check(STRICT, "spec.md R23; hashicorp and js take a cut stream for a finished one")
def a_protocol_error_resets_open_streams_first(peer: Peer) -> None:
    """Streams whose FIN the server has not sent get RST before GoAway(1), ended ones don't."""
    done = peer.open(b"done")
    peer.send(update(done, 0, FIN))
    peer.await_fin(done)
    streams = [peer.open(b"open") for _ in range(3)]
    for stream in streams:
        peer.expect_echo(stream, b"open")
    peer.send(raw(1, 0, 0, 0, 0))
    peer.read_to_end()
    lost = [stream for stream in streams if not peer.streams[stream].reset]
    if lost or peer.streams[done].reset:
        raise Failed(f"without RST: {lost}; RST on the ended stream: {peer.streams[done].reset}")


@check(ROBUST, "spec.md R23: flushed, while input is discarded")
def a_protocol_error_ends_a_client_that_goes_on(peer: Peer) -> None:
    """The connection ends although the client goes on sending, and does not close."""
    peer.send(raw(1, 0, 0, 0, 0))
    for _ in range(50):
        peer.send(ping(1) * 100)
        peer.collect(0.01)
        if peer.end:
            return
    peer.read_to_end()


@check(MUST, "Yamux spec, Session termination")
def a_protocol_error_is_one_sessions_own(peer: Peer) -> None:
    """Other connections go on, with the streams that they had."""
    other = peer.another()
    stream = other.open(b"before ")
    other.expect_echo(stream, b"before ")
    peer.send(raw(1, 0, 0, 0, 0))
    peer.read_to_end()
    other.send(data(stream, b"after"))
    other.expect_echo(stream, b"before after")


# --- floods ---


def _empty_data(peer: Peer) -> bytes:
    """Empty Data frames"""
    return data(peer.open())


def _zero_credit(peer: Peer) -> bytes:
    """Credits of zero"""
    return update(peer.open())


def _unknown_streams(peer: Peer) -> bytes:
    """Empty Data frames for a stream that is not open"""
    return data(40_001)


def _stray_credit(peer: Peer) -> bytes:
    """Credits for a stream that is not open"""
    return update(40_001, 1)


def _resets(peer: Peer) -> bytes:
    """Pairs of SYN and RST on one id"""
    return update(4_001, 0, SYN) + update(4_001, 0, RST)


def _opened_and_reset(peer: Peer) -> bytes:
    """Frames with SYN+RST"""
    return update(4_001, 0, SYN | RST)


def _repeated_ack(peer: Peer) -> bytes:
    """ACKs on an open stream"""
    return update(peer.open(), 0, ACK)


def _repeated_fin(peer: Peer) -> bytes:
    """FINs on a stream whose other half is open"""
    return update(peer.block()[0], 0, FIN)


def _pongs(peer: Peer) -> bytes:
    """Answers to pings that nobody sent"""
    return ping(1, ACK)


def _go_aways(peer: Peer) -> bytes:
    """GoAway(0)"""
    return go_away(0)


@dataclasses.dataclass(frozen=True)
class Flood:
    name: str
    source: str
    attack: Attack
    #: It draws on geyamux's budget of useless frames, and so has an end.
    ends: bool = True


FLOODS = [
    Flood("empty_data", "CVE-2019-9518", _empty_data),
    Flood("zero_credit", "CVE-2019-9515", _zero_credit),
    Flood("frames_for_no_stream", "CVE-2019-9518", _unknown_streams),
    Flood("credit_for_no_stream", "CVE-2019-9518", _stray_credit),
    Flood("opens_and_resets", "CVE-2023-44487", _resets),
    Flood("opens_that_are_resets", "CVE-2023-44487", _opened_and_reset),
    Flood("repeated_ack", "CVE-2019-9518", _repeated_ack),
    Flood("repeated_fin", "CVE-2019-9518", _repeated_fin),
    Flood("pongs", "CVE-2019-9512", _pongs, ends=False),
    Flood("go_aways", "CVE-2019-9515", _go_aways, ends=False),
]
FLOOD_SIZE = 30_000


def _is_survived(flood: Flood) -> Callable[[Peer], None]:
    def function(peer: Peer) -> None:
        other = peer.another()
        peer.pour(flood.attack(peer) * FLOOD_SIZE)
        other.check_echo()
        peer.collect(peer.setting.silence)
        if not peer.end:
            peer.quiet()

    return function


def _is_ended(flood: Flood) -> Callable[[Peer], None]:
    def function(peer: Peer) -> None:
        peer.pour(flood.attack(peer) * FLOOD_SIZE)
        seen = peer.read_to_end()
        if not any((frame.kind, frame.length) == (GO_AWAY, 1) for frame in seen):
            raise Failed(f"the connection {peer.end} after {describe(seen)}")

    return function


for _flood in FLOODS:
    _what = f"{FLOOD_SIZE:,} times: {_flood.attack.__doc__}"
    _lives = f"{_what}. The session lives or ends; others are served."
    add(Check(f"a_flood_of_{_flood.name}_is_survived", ROBUST, _lives, _flood.source, True, _is_survived(_flood)))
    if _flood.ends:
        _why = f"spec.md R28; {_flood.source}"
        _ends = f"{_what}. GoAway(1): a budget of 10,000 is spent."
        add(Check(f"a_flood_of_{_flood.name}_is_ended", STRICT, _ends, _why, True, _is_ended(_flood)))


@check(ROBUST, "spec.md 13: limits are a session's own")
def fifty_connections_at_once(peer: Peer) -> None:
    """50 clients are each served, all of them connected."""
    for other in [peer.another() for _ in range(50)]:
        other.check_echo()
