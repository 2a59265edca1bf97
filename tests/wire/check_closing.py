"""How a stream ends: FIN from either side, RST, and the frames that come late."""

from __future__ import annotations

from .frames import ACK, DATA, FIN, MOST, RST, SYN, UPDATE, WINDOW, data, describe, pattern, raw, update
from .peer import Failed, Peer
from .registry import MUST, ROBUST, STRICT, check

CLOSING = "Yamux spec, Closing a stream"


def _silent_on(peer: Peer, stream: int, *frames: bytes) -> None:
    """Those frames bring no answer on their stream, and no harm to the connection."""
    behind = len(peer.streams[stream].frames)
    peer.send(*frames)
    peer.quiet()
    seen = peer.streams[stream].frames[behind:]
    if seen:
        raise Failed(f"answered with {describe(seen)}")
    peer.check_echo()


def _ended(peer: Peer) -> int:
    """A stream that both sides have ended."""
    stream = peer.open(b"done")
    peer.send(update(stream, 0, FIN))
    peer.await_fin(stream)
    peer.barrier()
    return stream


# --- FIN ---


@check(MUST, CLOSING)
def fin_on_a_window_update(peer: Peer) -> None:
    """WindowUpdate+FIN ends our half: the server echoes what came before, and ends its own."""
    stream = peer.open(b"before the end")
    peer.send(update(stream, 0, FIN))
    peer.await_fin(stream)
    peer.expect_echo(stream, b"before the end")


@check(MUST, CLOSING + "; smux#82, js-yamux loses that payload")
def fin_on_data_comes_behind_its_payload(peer: Peer) -> None:
    """Data+FIN: the payload of the same frame is echoed, 50 times of 50."""
    for number in range(50):
        stream = peer.open(b"a")
        peer.send(data(stream, b"last %d" % number, FIN))
        peer.await_fin(stream)
        peer.expect_echo(stream, b"alast %d" % number)


@check(MUST, CLOSING)
def fin_on_a_large_data_frame(peer: Peer) -> None:
    """Data+FIN with a whole window of payload loses none of it."""
    stream, payload = peer.open(), pattern(WINDOW)
    peer.send(data(stream, payload, FIN))
    peer.await_fin(stream)
    peer.expect_echo(stream, payload)


@check(MUST, CLOSING)
def fin_on_empty_data(peer: Peer) -> None:
    """Data+FIN of length 0 ends our half."""
    stream = peer.open(b"before")
    peer.send(data(stream, b"", FIN))
    peer.await_fin(stream)
    peer.expect_echo(stream, b"before")


@check(MUST, CLOSING)
def fin_on_credit_counts_both(peer: Peer) -> None:
    """WindowUpdate+FIN with a length: our half ends, and the server may send so much more."""
    stream, payload = peer.block()
    peer.send(update(stream, 15_000, FIN))
    peer.await_bytes(stream, WINDOW + 15_000)
    peer.send(update(stream, 25_000))
    peer.await_fin(stream)
    peer.expect_echo(stream, payload)


@check(MUST, CLOSING)
def the_server_writes_on_after_our_fin(peer: Peer) -> None:
    """A half-close ends one direction: what waits for credit still comes, behind it FIN."""
    stream, payload = peer.block()
    peer.send(update(stream, 0, FIN))
    peer.quiet()
    if peer.streams[stream].fins:
        raise Failed(f"FIN after {peer.streams[stream].received} of {len(payload)} bytes")
    peer.send(update(stream, WINDOW))
    peer.await_fin(stream)
    peer.expect_echo(stream, payload)


@check(MUST, CLOSING)
def the_server_ends_its_half_by_fin(peer: Peer) -> None:
    """After our FIN the server's echo ends with FIN, not with RST; it comes once, and nothing behind it."""
    stream = _ended(peer)
    behind = len(peer.streams[stream].frames)
    peer.quiet()
    ledger = peer.streams[stream]
    if ledger.reset or ledger.fins != 1 or len(ledger.frames) != behind:
        raise Failed(f"{describe(ledger.frames)}")


@check(MUST, CLOSING)
def no_fin_before_ours(peer: Peer) -> None:
    """The server does not end a stream while we may still send."""
    stream = peer.open(b"wait")
    peer.quiet()
    peer.expect_echo(stream, b"wait")
    if peer.streams[stream].fins or peer.streams[stream].reset:
        raise Failed(f"{describe(peer.streams[stream].frames)}")


@check(STRICT, "spec.md 3.3; hashicorp ends the session")
def a_second_fin_is_ignored(peer: Peer) -> None:
    """FIN again, while the server's half is open, changes nothing."""
    stream, payload = peer.block()
    peer.send(update(stream, 0, FIN), update(stream, 0, FIN), data(stream, b"", FIN))
    peer.barrier()
    peer.send(update(stream, WINDOW))
    peer.await_fin(stream)
    peer.expect_echo(stream, payload)


@check(STRICT, "spec.md R7; hashicorp and go-yamux send it when Write races Close")
def data_behind_our_fin_is_dropped(peer: Peer) -> None:
    """Payload behind FIN is read off the connection, not echoed, and no error."""
    stream, payload = peer.block()
    peer.send(update(stream, 0, FIN), data(stream, b"too late"))
    peer.barrier()
    peer.send(update(stream, WINDOW))
    peer.await_fin(stream)
    peer.expect_echo(stream, payload)
    peer.check_echo()


# --- what comes for a stream that has ended ---


@check(ROBUST, "js-libp2p#2505: a late WindowUpdate")
def late_credit_is_ignored(peer: Peer) -> None:
    """Credit for a stream that both sides have ended: it crossed with the server's FIN."""
    stream = _ended(peer)
    _silent_on(peer, stream, update(stream, 1_000), update(stream, MOST))


@check(ROBUST, "spec.md 3.3")
def late_flags_are_ignored(peer: Peer) -> None:
    """ACK, FIN and RST for a stream that both sides have ended."""
    stream = _ended(peer)
    _silent_on(peer, stream, update(stream, 0, ACK), update(stream, 0, FIN), update(stream, 0, RST))


@check(ROBUST, "nim-libp2p#3090: the framing was lost")
def late_data_is_drained(peer: Peer) -> None:
    """Payload for a stream that has ended is read off the connection; the next frame is understood."""
    stream = _ended(peer)
    _silent_on(peer, stream, data(stream, b"late" * 5_000), data(stream, b"late", FIN))


@check(ROBUST, "spec.md R7")
def data_for_a_stream_never_opened_is_drained(peer: Peer) -> None:
    """Data for an id that nobody has used, within a window, brings no answer and no stream."""
    peer.send(data(77, b"?" * WINDOW), data(78, b"?"), data(0, b"?"))
    _nothing(peer)


@check(ROBUST, "spec.md R7")
def frames_for_a_stream_never_opened_are_ignored(peer: Peer) -> None:
    """Credit, ACK, FIN and RST for an id that nobody has used bring no answer and no stream."""
    for stream in (77, 78, 0):
        peer.send(update(stream, 100), *(update(stream, 0, flags) for flags in (ACK, FIN, RST, ACK | FIN, FIN | RST)))
    _nothing(peer)


def _nothing(peer: Peer) -> None:
    seen = peer.quiet()
    if seen:
        raise Failed(f"answered with {describe(seen)}")
    peer.check_echo()


# --- RST ---


@check(MUST, "Yamux spec, Flag Field: RST")
def rst_ends_both_directions(peer: Peer) -> None:
    """After our RST what waited for credit never comes, even with credit, and FIN neither."""
    stream, _ = peer.block()
    peer.send(update(stream, 0, RST))
    peer.quiet()
    _silent_on(peer, stream, update(stream, WINDOW))


@check(MUST, "Yamux spec, Flag Field: RST may be sent with a data message")
def rst_on_data(peer: Peer) -> None:
    """Data+RST ends the stream; its payload is read off the connection and not echoed."""
    stream, _ = peer.block()
    peer.send(data(stream, b"not for you" * 100, RST))
    peer.quiet()
    _silent_on(peer, stream, update(stream, WINDOW))


@check(MUST, "Yamux spec, Closing a stream")
def rst_harms_no_other_stream(peer: Peer) -> None:
    """A stream lives on when others are reset around it."""
    stream = peer.open(b"one ")
    for _ in range(20):
        other = peer.open(b"reset me")
        peer.send(update(other, 0, RST))
    peer.send(data(stream, b"two"))
    peer.expect_echo(stream, b"one two")


@check(STRICT, "spec.md R18; go-yamux sends a code there")
def the_length_of_rst_is_no_credit(peer: Peer) -> None:
    """WindowUpdate+RST with length 2**32-1 is a code: no overflow, no error."""
    stream = peer.open(b"x")
    peer.expect_echo(stream, b"x")
    peer.send(update(stream, MOST, RST))
    peer.barrier()
    peer.check_echo()


@check(STRICT, "spec.md 3.1")
def rst_wins_over_other_flags(peer: Peer) -> None:
    """FIN+RST and ACK+FIN+RST reset the stream."""
    for flags in (FIN | RST, ACK | FIN | RST):
        stream, _ = peer.block()
        peer.send(update(stream, 0, flags))
        peer.quiet()
        _silent_on(peer, stream, update(stream, WINDOW))


@check(ROBUST, "all peers send such frames for a while")
def frames_behind_our_rst_are_ignored(peer: Peer) -> None:
    """Data, credit, ACK, FIN and RST that follow our own RST bring no answer and no error."""
    stream = peer.open(b"x")
    peer.expect_echo(stream, b"x")
    peer.send(update(stream, 0, RST))
    peer.barrier()
    frames = [data(stream, b"late"), update(stream, 9), *(update(stream, 0, flags) for flags in (ACK, FIN, RST))]
    _silent_on(peer, stream, *frames)


@check(STRICT, "spec.md R23")
def a_reset_stream_does_not_swallow_a_header(peer: Peer) -> None:
    """Directly behind Data+RST with payload the next header is understood."""
    stream = peer.open(b"x")
    peer.expect_echo(stream, b"x")
    peer.send(raw(0, DATA, RST, stream, 5) + b"12345" + raw(0, UPDATE, SYN, 99, 0) + data(99, b"framed"))
    peer.expect_echo(99, b"framed")
