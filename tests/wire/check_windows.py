"""Payload and flow control: what the server may send, and what it grants."""

from __future__ import annotations

from .frames import FIN, MOST, UPDATE, WINDOW, data, pattern, update
from .peer import Failed, Peer
from .registry import MUST, ROBUST, STRICT, Check, add, check

FLOW = "Yamux spec, Flow Control"


def _echo_of(size: int) -> None:
    def function(peer: Peer) -> None:
        payload, stream = pattern(size), peer.open()
        peer.write(stream, payload, grant=True)
        peer.send(update(stream, WINDOW, FIN))
        peer.await_fin(stream)
        peer.expect_echo(stream, payload)

    purpose = f"{size:,} bytes there and back, then FIN."
    add(Check(f"echo_of_{size}_bytes", MUST, purpose, "Yamux spec, Data", True, function))


for _size in (0, 1, 13, 4_096, 65_536, 262_143, 262_144, 262_145, 2_000_000):
    _echo_of(_size)


@check(MUST, FLOW)
def one_frame_as_large_as_the_window(peer: Peer) -> None:
    """A Data frame of 262,144 bytes is legal; hashicorp and js-yamux send them."""
    payload, stream = pattern(WINDOW), peer.open()
    peer.send(data(stream, payload))
    peer.expect_echo(stream, payload)


@check(MUST, FLOW)
def the_server_stops_at_zero_credit(peer: Peer) -> None:
    """With 302,144 bytes to echo exactly 262,144 come, and then nothing."""
    stream, payload = peer.block()
    peer.quiet()
    peer.expect_echo(stream, payload[:WINDOW])


@check(MUST, FLOW)
def the_server_goes_on_with_credit(peer: Peer) -> None:
    """Each grant brings exactly so much more."""
    stream, payload = peer.block()
    total = WINDOW
    for grant in (1_000, 20_000):
        total += grant
        peer.send(update(stream, grant))
        peer.await_bytes(stream, total)
        peer.quiet()
        peer.expect_echo(stream, payload[:total])
    peer.send(update(stream, 100_000))
    peer.expect_echo(stream, payload)


@check(MUST, FLOW)
def credit_before_any_payload_counts(peer: Peer) -> None:
    """A WindowUpdate right behind SYN adds to the initial window."""
    payload = pattern(WINDOW + 80_000)
    stream = peer.open()
    peer.send(update(stream, 50_000), update(stream, 30_000))
    peer.write(stream, payload)
    peer.expect_echo(stream, payload)


@check(MUST, FLOW)
def credit_on_data_is_none(peer: Peer) -> None:
    """The length of Data is a size: what we send does not let the server send more."""
    stream, payload = peer.block()
    peer.send(data(stream, b"more"))
    peer.quiet()
    peer.expect_echo(stream, payload[:WINDOW])


@check(ROBUST, "CVE-2019-9511, tiny windows")
def credit_in_single_bytes_is_used(peer: Peer) -> None:
    """100 grants of one byte bring 100 bytes: all that is allowed and no more."""
    stream, payload = peer.block()
    for _ in range(100):
        peer.send(update(stream, 1))
    peer.await_bytes(stream, WINDOW + 100)
    peer.quiet()
    peer.expect_echo(stream, payload[: WINDOW + 100])


@check(ROBUST, "spec.md R15")
def the_highest_credit_is_taken(peer: Peer) -> None:
    """Credit may reach 2**32-1, though not pass it."""
    stream = peer.open(credit=MOST - WINDOW)
    payload = pattern(WINDOW + 100_000)
    peer.write(stream, payload)
    peer.expect_echo(stream, payload)


@check(MUST, FLOW)
def the_server_grants_as_it_reads(peer: Peer) -> None:
    """Payload that has been echoed is credited, so that four windows pass through a stream."""
    stream, payload = peer.open(credit=8 * WINDOW), pattern(4 * WINDOW)
    peer.write(stream, payload)
    peer.expect_echo(stream, payload)


@check(STRICT, "spec.md 6.1, R10")
def the_server_grants_no_more_than_it_took(peer: Peer) -> None:
    """At no time may we send more than the initial window and what ACK added: grants only give back."""
    stream, payload = peer.open(credit=8 * WINDOW), pattern(4 * WINDOW)
    peer.write(stream, payload, largest=10_000)
    peer.expect_echo(stream, payload)
    peer.quiet()
    ledger = peer.streams[stream]
    if ledger.most_allowed > WINDOW + ledger.ack_delta:
        raise Failed(f"{ledger.most_allowed} bytes were allowed at once, in a window of {WINDOW + ledger.ack_delta}")


@check(ROBUST, "rust-libp2p#1257: credit on receipt has no bound")
def a_stalled_stream_gets_no_credit(peer: Peer) -> None:
    """A stream whose echo is not taken must stop to grant: else a peer fills the server's memory."""
    stream, ledger = peer.open(), peer.streams[1]
    sent = 0
    while sent < 8 * WINDOW:
        if not ledger.allowed:
            peer.quiet()
        if not ledger.allowed or ledger.reset:
            return
        piece = min(ledger.allowed, 32768)
        peer.send(data(stream, bytes(piece)))
        sent += piece
        peer.collect(0)
    raise Failed(f"{sent} bytes were taken while {WINDOW} of their echo were allowed")


@check(MUST, "Yamux spec, Closing a stream")
def credit_is_granted_to_no_ended_stream(peer: Peer) -> None:
    """Behind the FINs of both sides no credit comes."""
    stream, payload = peer.open(credit=4 * WINDOW), pattern(3 * WINDOW)
    peer.write(stream, payload)
    peer.send(update(stream, 0, FIN))
    peer.await_fin(stream)
    behind = len(peer.streams[stream].frames)
    peer.quiet()
    grants = [frame for frame in peer.streams[stream].frames[behind:] if frame.kind == UPDATE]
    if grants:
        raise Failed(f"behind both FINs: {grants[0]}")


@check(MUST, FLOW)
def streams_have_windows_of_their_own(peer: Peer) -> None:
    """A window used up on one stream takes nothing from another."""
    stream, _ = peer.block()
    other, payload = peer.open(), pattern(WINDOW, 9)
    peer.write(other, payload)
    peer.expect_echo(other, payload)
    if peer.streams[stream].received != WINDOW:
        raise Failed(f"the blocked stream sent {peer.streams[stream].received} bytes")


# --- several streams ---


@check(MUST, "Yamux spec, Framing")
def interleaved_streams_keep_their_bytes(peer: Peer) -> None:
    """50 streams written in turns, 700 bytes at a time, each get their own payload back."""
    payloads = {peer.open(): pattern(7_000, seed) for seed in range(50)}
    for begin in range(0, 7_000, 700):
        peer.send(*(data(stream, payload[begin : begin + 700]) for stream, payload in payloads.items()))
    for stream, payload in payloads.items():
        peer.expect_echo(stream, payload)


@check(MUST, FLOW)
def a_stalled_stream_stalls_itself_alone(peer: Peer) -> None:
    """With ten streams waiting for credit others open, echo and end."""
    for _ in range(10):
        peer.block(extra=1_000)
    for _ in range(5):
        peer.check_echo()


@check(ROBUST, "spec.md R27; smux#18")
def a_small_request_passes_bulk(peer: Peer) -> None:
    """A stream opened when 16 MiB on 64 others wait for a slow reader has its answer before the last of them."""
    slow = peer.congested()
    small = slow.open(b"quick")
    # The server must see it before there is room for all the payload.
    peer.pause()
    slow.expect_echo(small, b"quick")
    if all(ledger.received == WINDOW for stream, ledger in slow.streams.items() if stream != small):
        raise Failed("the answer came behind all the bulk")


@check(ROBUST, "CVE-2019-9517")
def a_client_that_does_not_read_harms_no_other(peer: Peer) -> None:
    """16 MiB wait for a client that grants 2 GiB to each stream and reads nothing: another connection is served."""
    peer.congested(credit=2**31)
    peer.check_echo()
    peer.another().check_echo()
