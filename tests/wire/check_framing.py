"""Headers and payloads however TCP delivers them, and what they may carry."""

from __future__ import annotations

import random

from .frames import ACK, DATA, FIN, HEADER, SYN, UPDATE, data, go_away, pattern, ping, raw, update
from .peer import Failed, Peer
from .registry import MUST, ROBUST, STRICT, check

FRAMING = "Yamux spec, Framing"


@check(MUST, "Yamux spec, Message Flow", needs_echo=False)
def nothing_is_needed_before_the_first_frame(peer: Peer) -> None:
    """There is no greeting: the server says nothing unasked, and a ping may be the first frame."""
    seen = [frame for frame in peer.collect(peer.setting.silence) if frame.flags != SYN]
    if seen:
        raise Failed(f"unasked: {seen[0]}")
    peer.barrier()


@check(MUST, FRAMING)
def a_header_may_come_byte_by_byte(peer: Peer) -> None:
    """A frame is put together from whatever pieces TCP delivers, one byte each at the worst."""
    for byte in update(1, 0, SYN) + data(1, b"piece by piece") + update(1, 0, FIN):
        peer.send(bytes([byte]))
    peer.expect_echo(1, b"piece by piece")
    peer.await_fin(1)


@check(MUST, FRAMING)
def a_payload_may_come_in_many_pieces(peer: Peer) -> None:
    """64 KiB in one frame, cut at 500 random places, are echoed whole."""
    payload, rng = pattern(65536), random.Random(7)
    stream = peer.open()
    whole = data(stream, payload)
    cuts = sorted(rng.sample(range(1, len(whole)), 500))
    for begin, end in zip([0, *cuts], [*cuts, len(whole)], strict=True):
        peer.send(whole[begin:end])
    peer.expect_echo(stream, payload)


@check(MUST, FRAMING)
def many_frames_may_come_in_one_packet(peer: Peer) -> None:
    """Open, payload, FIN and pings of three streams in one segment are all acted upon."""
    streams = [peer.new_id() for _ in range(3)]
    opens = [update(stream, 0, SYN) + data(stream, b"one") + data(stream, b"two") for stream in streams]
    peer.send(*opens, ping(1), *(update(stream, 0, FIN) for stream in streams), ping(2))
    for stream in streams:
        peer.expect_echo(stream, b"onetwo")
        peer.await_fin(stream)
    peer.barrier()
    pongs = sorted(frame.length for frame in peer.frames if frame.flags == ACK and not frame.stream)
    if pongs != [1, 2]:
        raise Failed(f"answers to pings 1 and 2: {pongs}")


@check(MUST, FRAMING)
def a_payload_may_look_like_headers(peer: Peer) -> None:
    """Payload is never parsed: one made of GoAway and bad headers comes back as it is."""
    payload = go_away(1) * 50 + raw(9, 9, 65535, 1, 2**32 - 1) * 50 + b"\x00" * 30
    stream = peer.open(payload)
    peer.expect_echo(stream, payload)


@check(MUST, "Yamux spec, Length Field")
def the_length_of_a_window_update_is_no_size(peer: Peer) -> None:
    """Only Data has a payload: behind a WindowUpdate of length 12 the next header follows at once."""
    stream = peer.open()
    peer.send(update(stream, HEADER.size))
    peer.barrier()
    peer.send(data(stream, b"still framed"))
    peer.expect_echo(stream, b"still framed")


@check(MUST, "Yamux spec, Type Field: may transmit zero length payloads")
def empty_data_is_harmless(peer: Peer) -> None:
    """Data of length 0, a hundred times, is no end of file and no error."""
    stream = peer.open()
    peer.send(data(stream) * 100, data(stream, b"behind"))
    peer.expect_echo(stream, b"behind")


@check(MUST, "Yamux spec, Flow Control")
def empty_data_is_legal_without_credit(peer: Peer) -> None:
    """A frame without payload takes no credit, so a window of 0 allows it."""
    payload = pattern(262_144)
    stream = peer.open()
    peer.send(data(stream, payload), data(stream))
    peer.expect_echo(stream, payload)


@check(ROBUST, "spec.md 12.2")
def zero_credit_is_harmless(peer: Peer) -> None:
    """WindowUpdate of length 0 without flags, a hundred times, does nothing."""
    stream = peer.open()
    peer.send(update(stream) * 100, data(stream, b"behind"))
    peer.expect_echo(stream, b"behind")


@check(ROBUST, "CVE-2019-9511, tentacle#477")
def payload_in_frames_of_one_byte(peer: Peer) -> None:
    """10,000 frames of one byte arrive whole and in order."""
    payload = pattern(10_000)
    stream = peer.open()
    for begin in range(0, len(payload), 500):
        peer.send(*(data(stream, bytes([byte])) for byte in payload[begin : begin + 500]))
    peer.expect_echo(stream, payload)


@check(STRICT, "spec.md R29")
def unknown_flags_are_ignored(peer: Peer) -> None:
    """Bits above RST have no meaning on Data and WindowUpdate, and do no harm."""
    stream = peer.new_id()
    peer.send(raw(0, UPDATE, 0xFFF0 | SYN, stream, 0), raw(0, DATA, 0xFFF0, stream, 4) + b"bits")
    peer.send(raw(0, UPDATE, 0x8000, stream, 1))
    peer.expect_echo(stream, b"bits")
    peer.barrier()


def _cut(peer: Peer, *begun: bytes) -> None:
    """Connections that end there; then the server must serve the next."""
    for piece in begun:
        other = peer.another()
        other.send(piece)
        other.close()
    peer.check_echo()
    peer.another().check_echo()


@check(ROBUST, "spec.md 10: a connection that ends inside a frame")
def a_connection_cut_inside_a_header(peer: Peer) -> None:
    """Connections that die within a header, at each of its bytes, disturb no other."""
    whole = update(1, 0, SYN)
    _cut(peer, *(whole[:size] for size in range(len(whole))))


@check(ROBUST, "spec.md 10: a connection that ends inside a frame")
def a_connection_cut_inside_a_payload(peer: Peer) -> None:
    """Connections that die within a payload disturb no other."""
    whole = update(1, 0, SYN) + data(1, pattern(50_000))
    _cut(peer, whole[:24], whole[:25], whole[:20_000], whole[:-1])


@check(ROBUST, "GHSA-hmj8-5xmh-5573: a body that trickles")
def an_unfinished_payload_holds_up_no_other_connection(peer: Peer) -> None:
    """A frame whose payload never comes stalls its own connection alone."""
    other = peer.another()
    other.send(update(1, 0, SYN), raw(0, DATA, 0, 1, 1000), b"x")
    peer.check_echo()
    other.send(b"x" * 999)
    other.expect_echo(1, b"x" * 1000)
