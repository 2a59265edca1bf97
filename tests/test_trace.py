"""Traces: every byte that passes is in the file, every frame in the words, and the session never hears of it.

Files are read by a parser of this module's own, and by the real tshark where there is one.

Longer than other modules because it has that parser.
"""

from __future__ import annotations

import contextlib
import errno
import io
import logging
import os
import re
import shutil
import socket
import struct
import subprocess
from collections.abc import Iterator
from typing import NamedTuple

import gevent
import pytest
from gevent.event import Event
from gevent.fileobject import FileObjectPosix
from gevent.hub import get_hub

from geyamux import Client, Config, SessionClosed, trace
from geyamux.pcapng import MOST_PAYLOAD, Conversation
from support.facing import facing, narrow_pair, outcome, session_over, start
from support.links import make_link, sessions
from support.rawpeer import settle
from support.transports import FaultyTransport
from support.wire import ACK, FIN, SYN, WINDOW_UPDATE, Decoder, data, go_away, ping, window_update

PATIENCE = 10.0
WINDOW = 262144


# --- a parser of pcapng, IP and TCP ---


class Packet(NamedTuple):
    source: tuple[str, int]
    target: tuple[str, int]
    sequence: int
    acknowledged: int
    payload: bytes
    comment: str
    time_ns: int
    is_outgoing: bool


class Capture(NamedTuple):
    comment: str
    interface: str
    packets: list[Packet]

    def bytes_of(self, *, outgoing: bool) -> bytes:
        """What passed in a direction, put together by sequence numbers."""
        found = b""
        for packet in self.packets:
            if packet.is_outgoing == outgoing:
                assert packet.sequence == 1 + len(found)
                found += packet.payload
        return found

    def comments(self, *, outgoing: bool) -> list[str]:
        return [packet.comment for packet in self.packets if packet.is_outgoing == outgoing]


def blocks_of(content: bytes) -> Iterator[tuple[int, bytes]]:
    while content:
        kind, size = struct.unpack_from("<II", content)
        assert size % 4 == 0 and struct.unpack_from("<I", content, size - 4) == (size,)
        yield kind, content[8 : size - 4]
        content = content[size:]


def options_of(content: bytes) -> dict[int, bytes]:
    found = {}
    while True:
        code, size = struct.unpack_from("<HH", content)
        if not code:
            assert content == bytes(4)
            return found
        found[code] = content[4 : 4 + size]
        content = content[4 + size + -size % 4 :]


def sum_of_words(content: bytes) -> int:
    """The one's complement sum, word by word as RFC 1071 has it: 0xFFFF where the checksum inside is right."""
    content += bytes(len(content) % 2)
    total = sum(struct.unpack(f">{len(content) // 2}H", content))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return total


def packet_of(body: bytes) -> Packet:
    interface, high, low, captured, original = struct.unpack_from("<IIIII", body)
    assert (interface, captured) == (0, original)
    options = options_of(body[20 + captured + -captured % 4 :])
    ip = body[20 : 20 + captured]
    if ip[0] >> 4 == 4:
        family, addresses, tcp = socket.AF_INET, (ip[12:16], ip[16:20]), ip[20:]
        assert ip[0] == 0x45 and struct.unpack_from(">H", ip, 2) == (len(ip),) and ip[9] == 6
        assert sum_of_words(ip[:20]) == 0xFFFF
    else:
        family, addresses, tcp = socket.AF_INET6, (ip[8:24], ip[24:40]), ip[40:]
        assert ip[:4] == b"\x60\0\0\0" and struct.unpack_from(">H", ip, 4) == (len(tcp),) and ip[6] == 6
    assert sum_of_words(b"".join(addresses) + struct.pack(">II", len(tcp), 6) + tcp) == 0xFFFF
    from_port, to_port, sequence, acknowledged, offset, flags = struct.unpack_from(">HHIIBB", tcp)
    assert (offset, flags) == (0x50, 0x18)
    near, far = (socket.inet_ntop(family, address) for address in addresses)
    direction = {1: False, 2: True}[struct.unpack("<I", options[2])[0]]
    when = high << 32 | low
    return Packet(
        (near, from_port), (far, to_port), sequence, acknowledged, tcp[20:], options[1].decode(), when, direction
    )


def captures_of(content: bytes) -> list[Capture]:
    """The sections of a file."""
    found: list[Capture] = []
    comment = ""
    for kind, body in blocks_of(content):
        if kind == 0x0A0D0D0A:
            assert struct.unpack_from("<IHHq", body) == (0x1A2B3C4D, 1, 0, -1)
            comment = options_of(body[16:])[1].decode()
        elif kind == 1:
            assert struct.unpack_from("<HHI", body) == (101, 0, 0)
            options = options_of(body[8:])
            assert options[9] == b"\x09"
            found.append(Capture(comment, options[2].decode(), []))
        else:
            assert kind == 6
            found[-1].packets.append(packet_of(body))
    return found


def capture_of(content: bytes) -> Capture:
    (capture,) = captures_of(content)
    return capture


def capture_in(path) -> Capture:
    return capture_of(path.read_bytes())


# --- what passes ---


def talk(client, server, size=200_000):
    """A conversation with every kind of frame in it, and frames larger than a packet both ways."""
    near = client.open()
    far = server.accept(timeout=PATIENCE)
    writing = gevent.spawn(near.sendall, bytes(range(250)) * (size // 250))
    assert len(far.read(size)) == size
    writing.get(timeout=PATIENCE)
    far.sendall(b"answer" * 20_000)
    far.close()
    assert len(near.read()) == 120_000
    near.close()
    client.ping()
    server.ping()
    client.open().reset()
    other = client.open()
    server.accept(timeout=PATIENCE)
    other.reset(3)
    client.ping()


def names_of(capture: Capture) -> set[str]:
    return {" ".join(word for word in packet.comment.split() if word.isalpha()) for packet in capture.packets}


@pytest.mark.parametrize("side", [0, 1], ids=["client", "server"])
def test_a_file_has_every_frame_of_both_directions_over_every_link(link_kind, side, tmp_path):
    path = tmp_path / "it.pcapng"
    with sessions(link_kind) as pair:
        traced, other = pair[side], pair[1 - side]
        with trace.Pcapng(traced, path), trace.Pcapng(other, tmp_path / "other.pcapng"):
            talk(*pair)
        stats = traced.stats()
    capture, mirror = capture_in(path), capture_in(tmp_path / "other.pcapng")
    assert capture.comment == f"Yamux session {traced.name}" and capture.interface == traced.name
    sent, received = (capture.bytes_of(outgoing=outgoing) for outgoing in (True, False))
    assert (len(sent), len(received)) == (stats.bytes_sent, stats.bytes_received)
    # Each of the two saw what the other did.
    assert (sent, received) == (mirror.bytes_of(outgoing=False), mirror.bytes_of(outgoing=True))
    assert {"Data stream length", "WindowUpdate stream SYN length", "Ping stream SYN length"} <= {
        name.removesuffix(" bytes to of") for name in names_of(capture)
    }


@pytest.mark.parametrize("kind", ["socketpair", "memory", "files"])
def test_what_a_file_says_is_what_the_connection_took_and_gave(kind, tmp_path):
    """By a record made below the session, on a connection that takes and gives little at a time."""
    with make_link(kind) as link:
        near = link.a if kind != "files" else _Files(link.a)
        faulty = FaultyTransport(near, max_send=5000, max_recv=7000)
        client = Client(faulty)
        server = session_over(link.b, "server")
        try:
            with trace.Pcapng(client, tmp_path / "it.pcapng"):
                talk(client, server, 50_000)
        finally:
            client.abort()
            server.abort()
            client.join(PATIENCE)
            server.join(PATIENCE)
    capture = capture_in(tmp_path / "it.pcapng")
    assert faulty.sent.startswith(sent := capture.bytes_of(outgoing=True)) and len(sent) > 50_000
    assert faulty.received.startswith(received := capture.bytes_of(outgoing=False)) and len(received) > 120_000


class _Files:
    def __init__(self, pair) -> None:
        self.reader, self.writer = pair

    def recv(self, size):
        return self.reader.read(size)

    def send(self, chunk):
        return self.writer.write(chunk)

    def shutdown(self, how):
        self.writer.close()

    def close(self):
        self.reader.close()
        self.writer.close()


def test_packets_have_the_addresses_of_the_connection_and_follow_one_another(tmp_path):
    with sessions("tcp") as (client, server):
        own, peer = client.getsockname(), client.getpeername()
        with trace.Pcapng(client, tmp_path / "it.pcapng"):
            talk(client, server)
    packets = capture_in(tmp_path / "it.pcapng").packets
    following = {True: 1, False: 1}
    for packet in packets:
        ends = (own, peer) if packet.is_outgoing else (peer, own)
        assert (packet.source, packet.target) == ends
        assert packet.sequence == following[packet.is_outgoing]
        assert packet.acknowledged == following[not packet.is_outgoing]
        following[packet.is_outgoing] += len(packet.payload)
    times = [packet.time_ns for packet in packets]
    assert times == sorted(times)


def test_a_large_frame_is_split_and_each_part_says_so(pair, tmp_path):
    client, server = pair
    near = client.open()
    far = server.accept(timeout=PATIENCE)
    client.ping()
    with trace.Pcapng(client, tmp_path / "it.pcapng"):
        writing = gevent.spawn(near.sendall, bytes(65536))
        far.read(65536)
        writing.get(timeout=PATIENCE)
    capture = capture_in(tmp_path / "it.pcapng")
    sizes = [len(packet.payload) for packet in capture.packets if packet.is_outgoing]
    assert sum(sizes) == 12 + 65536 and max(sizes) <= MOST_PAYLOAD and len(sizes) > 1
    place = 0
    for size, comment in zip(sizes, capture.comments(outgoing=True), strict=True):
        assert comment == f"Data stream 1 length 65536 (bytes {place} to {place + size} of 65548)"
        place += size


def test_each_small_frame_has_a_packet_of_its_own_even_when_they_come_together(tmp_path):
    with facing("client") as (session, peer), trace.Pcapng(session, tmp_path / "it.pcapng"):
        peer.send(window_update(2, 0, SYN) + data(2, b"one") + data(2, b"three") + ping(SYN, 7))
        assert session.accept(timeout=PATIENCE).read(8) == b"onethree"
    capture = capture_in(tmp_path / "it.pcapng")
    assert capture.comments(outgoing=False) == [
        "WindowUpdate stream 2 SYN length 0",
        "Data stream 2 length 3",
        "Data stream 2 length 5",
        "Ping stream 0 SYN length 7",
    ]
    assert [packet.payload for packet in capture.packets if not packet.is_outgoing][1] == data(2, b"one")


@pytest.mark.parametrize(
    ("own", "peer", "expected"),
    [
        (("10.1.2.3", 5), ("10.1.2.4", 6), (("10.1.2.3", 5), ("10.1.2.4", 6))),
        (("fe80::1%lo", 5, 0, 1), ("::1", 65535, 0, 0), (("fe80::1", 5), ("::1", 65535))),
        (("::ffff:1.2.3.4", 1), ("::1", 2), (("::ffff:1.2.3.4", 1), ("::1", 2))),
        (None, None, None),
        ("/run/x", "", None),
        (("127.0.0.1", 5), None, None),
        (("127.0.0.1", 5), ("::1", 6, 0, 0), None),
        (("yamux", 1), ("yamux", 1), None),
        (("1.2.3.4", 70_000), ("1.2.3.5", 1), None),
        (("1.2.3.4\0", 7), ("1.2.3.5", 1), None),
        (("1.2.3.4",), ("1.2.3.5", "http"), None),
    ],
)
@pytest.mark.parametrize("is_client", [True, False])
def test_whatever_an_address_is_there_are_two_ends(own, peer, expected, is_client):
    conversation = Conversation(own, peer, is_client=is_client)
    nowhere = [("127.0.0.1", 49152), ("127.0.0.1", 49153)]
    near, far = expected or (nowhere if is_client else nowhere[::-1])
    for payload, is_outgoing in ((b"odd", True), (b"", False), (b"even", False), (bytes(2001), True)):
        ip = conversation.packet(payload, is_outgoing=is_outgoing)
        # Code 1: a comment without text; code 2: the direction.
        options = struct.pack("<HHHHIHH", 1, 0, 2, 4, 2 if is_outgoing else 1, 0, 0)
        found = packet_of(struct.pack("<IIIII", 0, 0, 0, len(ip), len(ip)) + ip + bytes(-len(ip) % 4) + options)
        assert (found.source, found.target) == ((near, far) if is_outgoing else (far, near))
        assert found.payload == payload


def test_sequence_numbers_begin_anew_after_four_gibibytes():
    conversation = Conversation(None, None, is_client=True)
    conversation._sequence = [0xFFFF_FFFF, 1]
    conversation.packet(b"abc", is_outgoing=True)
    assert struct.unpack_from(">I", conversation.packet(b"", is_outgoing=True), 24) == (2,)


# --- beginning and ending in the middle ---


def test_a_trace_begins_with_the_next_frame_in_mid_life(link_kind, tmp_path):
    with sessions(link_kind) as (client, server):
        near = client.open()
        far = server.accept(timeout=PATIENCE)
        near.sendall(b"before")
        assert far.read(6) == b"before"
        client.ping()
        with trace.Pcapng(client, tmp_path / "it.pcapng"):
            near.sendall(b"during")
            far.sendall(far.read(6))
            assert near.read(6) == b"during"
        near.sendall(b"after")
        assert far.read(5) == b"after"
    capture = capture_in(tmp_path / "it.pcapng")
    assert capture.bytes_of(outgoing=True) == capture.bytes_of(outgoing=False) == data(1, b"during")


@pytest.mark.parametrize("cut", [1, 11, 12, 13, 50])
def test_a_received_frame_that_is_under_way_is_whole_or_left_out(cut, tmp_path):
    """Up to its header it is shown whole, since that is here; with a payload under way it is left out."""
    first = data(2, bytes(range(100)))
    with facing("client", Config(keepalive_interval=None)) as (session, peer):
        peer.send(window_update(2, 0, SYN))
        stream = session.accept(timeout=PATIENCE)
        peer.send(first[:cut])
        settle()
        with trace.Pcapng(session, tmp_path / "it.pcapng"):
            peer.send(first[cut:] + data(2, b"next"))
            assert stream.read(104) == bytes(range(100)) + b"next"
    shown = capture_in(tmp_path / "it.pcapng").bytes_of(outgoing=False)
    assert shown == (first if cut < 12 else b"") + data(2, b"next")


@pytest.mark.parametrize("size", [3000, 100_000], ids=["small frames", "large frames"])
def test_a_sent_frame_that_is_under_way_is_left_out_and_the_next_is_shown(size):
    """The connection stands still in the middle of a frame when the trace begins."""
    near, far = narrow_pair()
    session = Client(near, Config(keepalive_interval=None))
    file, passed = io.BytesIO(), b""
    try:
        writing = [gevent.spawn(session.open().sendall, bytes([number]) * size) for number in range(50)]
        settle()
        position = session._outbox.bytes_sent
        with trace.Pcapng(session, file):
            far.settimeout(1.0)
            while len(passed) < 50 * (12 + size):
                passed += far.recv(65536)
            gevent.joinall(writing, raise_error=True)
            settle()
            far.settimeout(0)
            with contextlib.suppress(BlockingIOError):
                passed += far.recv(65536)
    finally:
        session.abort()
        far.close()
    shown = capture_of(file.getvalue()).bytes_of(outgoing=True)
    assert passed.endswith(shown) and len(passed) - len(shown) > position > 0
    decoder = Decoder()
    frames = decoder.feed(shown)
    decoder.finish()
    assert len([found for found in frames if found.type == 0]) > 10


@pytest.mark.parametrize("kind", ["socketpair", "memory", "files"])
def test_after_a_frame_that_was_half_sent_the_trace_is_in_step(kind, tmp_path):
    with make_link(kind) as link:
        near = FaultyTransport(link.a if kind != "files" else _Files(link.a), max_send=1000)
        client, server = Client(near), session_over(link.b, "server")
        try:
            stream = client.open()
            far = server.accept(timeout=PATIENCE)
            client.ping()
            near.stall("send")
            writing = gevent.spawn(stream.sendall, b"a" * 2500)
            settle()
            near.max_send = 700  # the send that waits has its thousand
            with trace.Pcapng(client, tmp_path / "it.pcapng"):
                near.release("send")
                assert far.read(2500) == b"a" * 2500
                writing.get(timeout=PATIENCE)
                stream.sendall(b"next")
                assert far.read(4) == b"next"
                client.ping()
        finally:
            client.abort()
            server.abort()
            client.join(PATIENCE)
            server.join(PATIENCE)
    capture = capture_in(tmp_path / "it.pcapng")
    assert capture.bytes_of(outgoing=True) == data(1, b"next") + ping(SYN, 2)
    assert capture.comments(outgoing=True)[-2:] == ["Data stream 1 length 4", "Ping stream 0 SYN length 2"]


@pytest.mark.parametrize("kept", [0, 1])
def test_a_large_frame_that_is_withdrawn_before_its_header_left_does_not_put_the_trace_out_of_step(kept):
    """It stands on the wire, offered behind small frames that the connection took only in part."""
    near, far = narrow_pair()
    file, passed = io.BytesIO(), b""
    session = Client(near, Config(keepalive_interval=None))
    try:
        streams = [session.open() for _ in range(3)]
        settle()
        blocker = gevent.spawn(streams[0].sendall, bytes(60_000))
        settle()
        streams[1].settimeout(0)
        streams[1].sendall(bytes(4000) * 8)
        writing = gevent.spawn(streams[2].sendall, bytes(50_000))
        settle()
        far.settimeout(1.0)
        while session._outbox._wire_large is None or session._outbox._wire_large.stream_id != 5:
            passed += far.recv(2000)
            settle()
        assert len(session._outbox._wire) > 12 and session._outbox._wire_tail is not None
        with trace.Pcapng(session, file):
            if not kept:
                writing.kill()
            streams[1].sendall(b"next")
            while not passed.endswith(data(3, b"next")):
                passed += far.recv(65536)
            settle()
        gevent.joinall([blocker, writing])
    finally:
        session.abort()
        far.close()
    shown = capture_of(file.getvalue())
    large = ["Data stream 5 length 50000"] * kept
    assert [text.partition(" (")[0] for text in shown.comments(outgoing=True)][-1] == "Data stream 3 length 4"
    assert {text.partition(" (")[0] for text in shown.comments(outgoing=True)[:-1]} == set(large)
    assert passed.endswith(shown.bytes_of(outgoing=True))


def test_a_header_that_was_half_received_when_the_trace_ended_is_in_the_file(tmp_path):
    with facing("client") as (session, peer), trace.Pcapng(session, tmp_path / "it.pcapng"):
        peer.send(ping(ACK, 1) + b"\0\2\0")
        settle()
    capture = capture_in(tmp_path / "it.pcapng")
    assert capture.bytes_of(outgoing=False) == ping(ACK, 1) + b"\0\2\0"
    assert capture.comments(outgoing=False) == ["Ping stream 0 ACK length 1", "no frame of Yamux (3 bytes)"]


def test_bytes_that_are_no_yamux_are_shown_as_they_are(tmp_path):
    with facing("server", Config(close_timeout=0.1)) as (session, peer), trace.Pcapng(session, tmp_path / "it.pcapng"):
        peer.send(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
        session.join(PATIENCE)
    capture = capture_in(tmp_path / "it.pcapng")
    assert capture.bytes_of(outgoing=False) == b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"
    assert capture.comments(outgoing=False) == ["no frame of Yamux (27 bytes)"]
    assert capture.comments(outgoing=True) == ["GoAway stream 0 length 1"]


def test_a_trace_ends_with_its_session_and_has_all_up_to_there(pair, tmp_path):
    client, server = pair
    running = trace.Pcapng(client, tmp_path / "it.pcapng")
    running.start()
    stream = client.open()
    stream.sendall(b"x")
    client.close()
    server.join(PATIENCE)
    settle()
    assert not running.is_running and running.error is None
    running.stop()
    sent = capture_in(tmp_path / "it.pcapng").comments(outgoing=True)
    assert sent == [
        "WindowUpdate stream 1 SYN length 0",
        "Data stream 1 length 1",
        "WindowUpdate stream 1 RST length 0",
        "GoAway stream 0 length 0",
    ]
    with pytest.raises(SessionClosed):
        running.start()


def test_a_trace_that_is_started_again_goes_on_in_the_same_file(pair, tmp_path):
    client, _ = pair
    running = trace.Pcapng(client, tmp_path / "it.pcapng")
    for _ in range(2):
        with running:
            running.start()  # no harm
            client.ping()
        running.stop()
        client.ping()
    captures = captures_of((tmp_path / "it.pcapng").read_bytes())
    asked = [f"Ping stream 0 SYN length {number}" for number in (1, 3)]
    assert [capture.comments(outgoing=True)[0] for capture in captures] == asked
    assert [len(capture.packets) for capture in captures] == [2, 2]


def test_several_traces_of_one_session_end_in_any_order(pair, tmp_path):
    client, _ = pair
    lines: list[str] = []
    first, second, third = trace.Log(client, lines.append), trace.Pcapng(client, io.BytesIO()), trace.Log(client, print)
    for running in (first, second, third):
        running.start()
    third.stop()
    client.ping()
    first.stop()
    client.ping()
    second.stop()
    client.ping()
    assert len(lines) == 2
    assert len(capture_of(second._given.getvalue()).packets) == 4


def test_nothing_is_left_in_the_way_of_a_session_when_its_last_trace_has_ended(link_kind):
    with sessions(link_kind) as (client, _):
        transport, reader = client._transport, client._reader
        before = (transport.send, transport.sendmsg, dict(vars(reader)).keys())
        with trace.Log(client, print), trace.Pcapng(client, io.BytesIO()):
            assert transport.send != before[0]
        assert (transport.send, transport.sendmsg, dict(vars(reader)).keys()) == before
        assert not trace._taps


def test_other_sessions_are_not_touched(pair):
    with sessions("socketpair") as (other, _), trace.Log(pair[0], print):
        assert "_take_in" not in vars(other._reader)
        assert other._transport.send == other.conn._sock.send
        assert list(trace._taps) == [pair[0]]


# --- words ---


def test_the_words_of_frames_are_in_the_order_of_the_frames_and_say_the_direction():
    lines: list[str] = []
    with facing("client") as (session, peer), trace.Log(session, lines.append):
        stream = session.open()
        stream.sendall(b"12345")
        peer.expect(WINDOW_UPDATE, SYN, 1)
        peer.expect_data(1, b"12345")
        peer.send(window_update(1, 0, ACK) + data(1, bytes(100_000)) + window_update(1, 0, FIN))
        assert len(stream.read()) == 100_000
    words = [line[16:] for line in lines]
    assert all(re.match(r"\d\d:\d\d:\d\d\.\d{6} ", line) for line in lines)
    assert words == [
        f"{session.name} sent WindowUpdate stream 1 SYN length 0",
        f"{session.name} sent Data stream 1 length 5",
        f"{session.name} received WindowUpdate stream 1 ACK length 0",
        f"{session.name} received Data stream 1 length 100000",
        f"{session.name} received WindowUpdate stream 1 FIN length 0",
    ]


def test_words_go_to_a_logger_of_their_own_if_nothing_else_is_said(pair, caplog):
    with caplog.at_level(logging.INFO, "geyamux.trace"), trace.Log(pair[0]):
        pair[0].ping()
    lines = [record.getMessage() for record in caplog.records if record.name == "geyamux.trace"]
    assert [line[16:] for line in lines] == [
        f"{pair[0].name} sent Ping stream 0 SYN length 1",
        f"{pair[0].name} received Ping stream 0 ACK length 1",
    ]


def test_an_emit_that_waits_keeps_nobody_waiting(pair):
    gate, lines = Event(), []

    def emit(line):
        gate.wait()
        lines.append(line)

    running = trace.Log(pair[0], emit)
    running.start()
    for _ in range(3):
        pair[0].ping(timeout=PATIENCE)
    stopping = start(running.stop)
    assert not stopping.ready() and lines == []
    gate.set()
    assert outcome(stopping) is None
    assert len(lines) == 6


# --- what a trace can meet ---


class Broken(io.BytesIO):
    """A file that takes so many writes."""

    def __init__(self, writes: int, error: BaseException) -> None:
        super().__init__()
        self.left = writes
        self.error = error

    def write(self, chunk):
        if not self.left:
            raise self.error
        self.left -= 1
        return super().write(chunk)


@pytest.fixture
def warnings_of(caplog):
    caplog.set_level(logging.WARNING, "geyamux")
    return lambda: [record.getMessage() for record in caplog.records]


@pytest.mark.parametrize("writes", [0, 1, 2])
def test_a_file_that_breaks_ends_the_trace_with_one_warning_and_nothing_else(pair, writes, warnings_of):
    client, server = pair
    error = OSError(errno.ENOSPC, "No space left on device")
    running = trace.Pcapng(client, Broken(writes, error))
    running.start()
    for _ in range(5):
        client.ping()
        settle()
    assert not running.is_running and running.error is error
    assert warnings_of() == [f"{client.name}: the trace has ended: {error}"]
    assert "ended by OSError" in repr(running)
    running.stop()
    talk(client, server)
    assert len(warnings_of()) == 1 and not trace._taps


def test_a_full_disk_ends_the_trace_alone(pair, warnings_of):
    if not os.path.exists("/dev/full"):
        pytest.skip("there is no /dev/full here")
    with trace.Pcapng(pair[0], "/dev/full") as running:
        talk(*pair)
    assert running.error.errno == errno.ENOSPC
    assert len(warnings_of()) == 1


def test_a_file_that_was_closed_ends_the_trace_alone(pair, tmp_path, warnings_of):
    with open(tmp_path / "it.pcapng", "wb") as file:
        running = trace.Pcapng(pair[0], file)
        running.start()
        pair[0].ping()
        settle()
    talk(*pair)
    assert isinstance(running.error, ValueError) and not running.is_running
    assert len(warnings_of()) == 1


def test_an_emit_that_raises_ends_the_trace_alone(pair, warnings_of):
    running = trace.Log(pair[0], lambda line: 1 // 0)
    running.start()
    talk(*pair)
    assert isinstance(running.error, ZeroDivisionError)
    assert len(warnings_of()) == 1


def test_a_file_that_is_too_slow_ends_the_trace_before_it_takes_all_memory(pair, monkeypatch, warnings_of):
    monkeypatch.setattr(trace, "_MOST_WAITING", 100_000)
    gate = Event()

    class Slow(io.BytesIO):
        def write(self, chunk):
            gate.wait()
            return super().write(chunk)

    running = trace.Pcapng(pair[0], Slow())
    running.start()
    settle()
    talk(*pair)
    assert not running.is_running and "wait to be written" in str(running.error)
    assert len(warnings_of()) == 1
    gate.set()
    running.stop()


def test_a_file_that_cannot_be_opened_is_the_caller_s_to_hear_of(pair, tmp_path):
    with pytest.raises(FileNotFoundError), trace.Pcapng(pair[0], tmp_path / "nowhere" / "it.pcapng"):
        pass
    assert not trace._taps


def test_a_raw_file_that_takes_little_at_a_time_gets_everything(pair):
    class Raw(io.BytesIO):
        def write(self, chunk):
            return super().write(bytes(chunk[:100]))

    file = Raw()
    with trace.Pcapng(pair[0], file):
        pair[0].ping()
    assert len(capture_of(file.getvalue()).packets) == 2


def test_a_raw_file_that_is_non_blocking_and_full_ends_the_trace_with_one_warning(pair, warnings_of):
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    with open(reading, "rb", 0), open(writing, "wb", 0) as file:
        with trace.Pcapng(pair[0], file) as running:
            talk(*pair)
        assert isinstance(running.error, BlockingIOError) and not running.is_running
    assert warnings_of() == [f"{pair[0].name}: the trace has ended: {running.error}"]


def test_none_from_a_file_that_is_not_of_io_means_that_it_has_all(pair):
    class Collecting:
        def __init__(self) -> None:
            self.data = b""

        def write(self, chunk):
            self.data += chunk

        def flush(self):
            pass

    file = Collecting()
    with trace.Pcapng(pair[0], file):
        pair[0].ping()
    assert len(capture_of(file.data).packets) == 2


def test_the_path_of_a_fifo_is_refused_and_gevent_s_file_of_it_is_the_way(pair, tmp_path):
    path = tmp_path / "fifo"
    os.mkfifo(path)
    with pytest.raises(ValueError, match="FileObjectPosix"):
        trace.Pcapng(pair[0], path).start()
    assert not trace._taps
    with FileObjectPosix(os.open(path, os.O_RDWR), "r+b", 0) as file:
        with trace.Pcapng(pair[0], file):
            pair[0].ping()
        assert len(capture_of(file.read(65536)).packets) == 2


def test_a_directory_is_no_file(pair, tmp_path):
    with pytest.raises(IsADirectoryError):
        trace.Pcapng(pair[0], tmp_path).start()


def test_a_file_that_was_given_stays_open_and_one_that_was_named_does_not(pair, tmp_path):
    file = io.BytesIO()
    named = trace.Pcapng(pair[0], str(tmp_path / "it.pcapng"))
    with trace.Pcapng(pair[0], file), named:
        pair[0].ping()
    assert not file.closed and named._file.closed


def test_a_greenlet_of_a_trace_that_is_killed_ends_the_trace_alone(pair, warnings_of):
    gate = Event()
    running = trace.Log(pair[0], lambda line: gate.wait())
    running.start()
    pair[0].ping()
    settle()
    running._greenlet.kill()
    assert not running.is_running and isinstance(running.error, gevent.GreenletExit)
    pair[0].ping(timeout=PATIENCE)
    assert len(warnings_of()) == 1


def test_in_the_hub_a_trace_stops_without_waiting(pair):
    lines: list[str] = []
    running = trace.Log(pair[0], lines.append)
    running.start()
    stopped = Event()

    def stop():
        running.stop()
        stopped.set()

    pair[0].ping()
    get_hub().loop.run_callback(stop)
    assert stopped.wait(PATIENCE)
    settle()
    assert len(lines) == 2


def test_a_trace_can_be_stopped_by_what_it_writes_to(pair):
    lines: list[str] = []

    def emit(line):
        lines.append(line)
        running.stop()

    running = trace.Log(pair[0], emit)
    running.start()
    pair[0].ping()
    settle()
    assert not running.is_running and running.error is None
    assert 1 <= len(lines) <= 2


def test_another_thread_may_not_begin_a_trace(pair):
    error = get_hub().threadpool.apply(lambda: start_in_thread(pair[0]))
    assert isinstance(error, RuntimeError) and not trace._taps


def start_in_thread(session):
    try:
        trace.Log(session, print).start()
    except RuntimeError as error:
        return error
    return None


def test_a_session_that_is_ending_can_still_be_watched(tmp_path):
    """What the peer says is not looked at any more, so nobody knows where its frames begin."""
    with facing("client") as (session, peer):
        closing = gevent.spawn(session.close)
        while peer.next() != (0, 3, 0, 0, 0, b""):
            pass
        settle()
        with trace.Pcapng(session, tmp_path / "it.pcapng"):
            peer.send(ping(SYN, 1) + go_away())
            settle()
        peer.close()
        closing.get(timeout=PATIENCE)
    capture = capture_in(tmp_path / "it.pcapng")
    assert capture.bytes_of(outgoing=False) == ping(SYN, 1) + go_away()
    assert capture.comments(outgoing=False) == ["no frame of Yamux (24 bytes)"]


def test_the_repr_of_a_trace_says_of_what_it_is_and_whether_it_runs(pair):
    running = trace.Log(pair[0], print)
    assert repr(running) == f"<geyamux.trace.Log of {pair[0]!r}: not running>"
    with running:
        assert repr(running).endswith(": running>")


def test_a_child_process_writes_nothing_into_the_file(pair, tmp_path):
    path = tmp_path / "it.pcapng"
    with trace.Pcapng(pair[0], path) as running:
        pair[0].ping()
        settle()
        before = path.read_bytes()
        running._put(b"never", 5)
        child = os.fork()
        if not child:
            running._run()
            os._exit(0)
        os.waitpid(child, 0)
        assert path.read_bytes() == before
        running._waiting.clear()


# --- by the real thing ---


@pytest.mark.interop
@pytest.mark.parametrize("kind", ["tcp", "tls13", "socketpair", "memory"])
def test_tshark_reads_the_file_and_has_nothing_to_complain_about(kind, tmp_path):
    if shutil.which("tshark") is None:
        pytest.skip("needs tshark (Debian package tshark)")
    path = tmp_path / "it.pcapng"
    with sessions(kind) as (client, server), trace.Pcapng(client, path):
        talk(client, server)
    capture = capture_in(path)
    rows = tshark(
        path,
        *("-T", "fields", "-E", "separator=|", "-e", "frame.comment", "-e", "tcp.len", "-e", "ip.checksum.status"),
        *("-e", "tcp.checksum.status", "-e", "tcp.analysis.flags", "-e", "_ws.malformed", "-e", "frame.interface_name"),
    )
    assert rows.decode().splitlines() == [
        f"{packet.comment}|{len(packet.payload)}|1|1|||{capture.interface}" for packet in capture.packets
    ]
    for flow, outgoing in (("0", True), ("1", False)):
        assert followed(path, flow) == capture.bytes_of(outgoing=outgoing)
    closest = tshark(path, "-Y", 'frame.comment contains "RST"', "-T", "fields", "-e", "frame.comment")
    assert closest.decode().splitlines() == ["WindowUpdate stream 5 RST length 3"]


def tshark(path, *arguments: str) -> bytes:
    # Ports of tests may be those of other protocols: nothing may try to read those into the payload.
    done = subprocess.run(
        ["tshark", "-r", str(path), "-o", "tcp.check_checksum:TRUE", "-o", "ip.check_checksum:TRUE", *arguments],
        env={**os.environ, "HOME": str(path.parent), "LC_ALL": "C.UTF-8"},
        capture_output=True,
        timeout=25,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def followed(path, flow: str) -> bytes:
    """One direction of the conversation, as `Follow TCP stream` puts it together."""
    output = tshark(path, "-q", "-z", "follow,tcp,raw,0").decode()
    lines = output.split("===================================================================\n")[1].splitlines()[4:]
    return b"".join(bytes.fromhex(line.strip()) for line in lines if line.startswith("\t") == (flow == "1"))
