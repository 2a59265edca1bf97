"""The way in: whatever the pieces in which bytes arrive, the same frames come out; nothing is kept that is not needed.

Longer than other modules because all tests of one subject stand together, each short and by itself.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import logging
import time
from collections import deque
from collections.abc import Iterator

import gevent
import pytest
from gevent import socket as gsocket
from gevent.event import Event
from gevent.hub import get_hub
from hypothesis import given, settings
from hypothesis import strategies as st

from geyamux.errors import ProtocolError
from geyamux.reader import Reader
from geyamux.transport import RECEIVE_SIZE, adopt
from support.rawpeer import settle
from support.wire import ACK, FIN, RST, SYN, data, frame, go_away, ping, window_update

WINDOW = 262144


class Sink:
    """An open stream: takes what its window allows."""

    def __init__(self, events: list, stream_id: int) -> None:
        self.events = events
        self.stream_id = stream_id
        self.window = WINDOW
        self.sizes: list[int] = []
        #: Lengths that were announced for a payload in parts.
        self.announced: list[int] = []

    def _on_header(self, length):
        self.announced.append(length)
        if length > self.window:
            raise ProtocolError(f"{length} bytes into a window of {self.window}")

    def _on_data(self, payload):
        assert type(payload) is bytes
        assert payload
        if len(payload) > self.window:
            raise ProtocolError(f"{len(payload)} bytes into a window of {self.window}")
        self.window -= len(payload)
        self.sizes.append(len(payload))
        if self.events and self.events[-1][:2] == ("data", self.stream_id):
            self.events[-1] = ("data", self.stream_id, self.events[-1][2] + payload)
        else:
            self.events.append(("data", self.stream_id, payload))


class Inbound:
    """The session's place: streams 1 and 3 are open, a SYN opens another."""

    def __init__(self) -> None:
        self.events: list[tuple] = []
        self.streams = {stream_id: Sink(self.events, stream_id) for stream_id in (1, 3)}
        self.errors: list[ProtocolError] = []
        self.ends: list[tuple] = []
        self.received = 0
        self.ended = Event()

    def on_data_header(self, stream_id, flags, length):
        sink = self.streams.get(stream_id)
        if flags & SYN:
            sink = self.streams[stream_id] = Sink(self.events, stream_id)
        if sink is not None and length > sink.window:
            raise ProtocolError(f"{length} bytes into a window of {sink.window}")
        self.events.append(("header", stream_id, flags, length))
        return None if flags & RST else sink

    def on_data_end(self, stream_id, flags):
        self.events.append(("end", stream_id, flags))

    def on_window_update(self, stream_id, flags, delta):
        self.events.append(("update", stream_id, flags, delta))

    def on_taken_in(self):
        """Nothing is hoarded here."""

    def _on_ping(self, flags, value):
        self.events.append(("ping", flags, value))

    def _on_go_away(self, code):
        if code == 99:
            raise ProtocolError("told by the session")
        self.events.append(("go away", code))

    def _on_protocol_error(self, error):
        self.errors.append(error)

    def _on_input_end(self, *, inside_frame, error):
        self.ends.append((inside_frame, error))
        self.ended.set()

    def _on_received(self):
        self.received += 1


class ScriptedTransport:
    """A connection that receives what the test says: bytes, errors, and then waits; without a descriptor or with one."""

    def __init__(self, *script, has_descriptor: bool = False) -> None:
        self.script = deque(script)
        self.asked: list[int] = []
        self.more = Event()
        self.read_wants_write = self.write_wants_read = False
        self.has_more = None
        self.fileno = None
        self._ends = gsocket.socketpair() if has_descriptor else ()
        if has_descriptor:
            self._ends[1].sendall(b"x")  # always readable
            self.fileno = self._ends[0].fileno()

    def recv(self, size):
        self.asked.append(size)
        while not self.script:
            if self.fileno is not None:
                raise BlockingIOError
            self.more.clear()
            self.more.wait()
        answer = self.script.popleft()
        if callable(answer):
            answer = answer(self)
        if isinstance(answer, BaseException):
            raise answer
        if isinstance(answer, bytes) and len(answer) > size:
            self.script.appendleft(answer[size:])
            answer = answer[:size]
        return answer

    def add(self, *script):
        self.script += script
        self.more.set()
        settle()

    def close(self):
        for end in self._ends:
            end.close()


class Bench:
    def __init__(self, transport, initial: bytes = b"") -> None:
        self.transport = transport
        self.inbound = Inbound()
        self.reader = Reader(transport, get_hub(), self.inbound, self.inbound, initial)

    @property
    def events(self):
        return self.inbound.events


@contextlib.contextmanager
def reading(*script, initial: bytes = b"", has_descriptor: bool = False) -> Iterator[Bench]:
    bench = Bench(ScriptedTransport(*script, has_descriptor=has_descriptor), initial)
    try:
        if not has_descriptor:
            settle()
        yield bench
    finally:
        bench.reader.stop()
        bench.transport.close()
        settle()


@contextlib.contextmanager
def connected() -> Iterator[tuple[Bench, gsocket.socket]]:
    """A reader on a real descriptor, and the socket of its peer."""
    near, far = gsocket.socketpair()
    bench = Bench(adopt(near))
    try:
        settle()
        yield bench, far
    finally:
        bench.reader.stop()
        bench.transport.close()
        far.close()
        settle()


def read_to_end(pieces, **options) -> Bench:
    with reading(*pieces, b"", **options) as bench:
        assert bench.inbound.ended.wait(5)
    return bench


# --- any frames in any pieces ---

known_flags = st.sampled_from([0, 0, 0, SYN, ACK, FIN, RST, ACK | FIN, SYN | FIN, FIN | RST, 0x10, 0x8000 | FIN])
small_bodies = st.binary(max_size=40)
data_frames = st.tuples(
    st.just("data"),
    st.sampled_from([1, 3, 5, 7]),
    known_flags,
    st.one_of(small_bodies, small_bodies, st.just(b"x" * 3000)),
)
other_frames = st.one_of(
    st.tuples(st.just("update"), st.sampled_from([1, 3, 5]), st.integers(0, 0xFFFF), st.integers(0, 0xFFFFFFFF)),
    st.tuples(st.just("ping"), st.integers(0, 0xFFFF), st.integers(0, 0xFFFFFFFF)),
    st.tuples(st.just("go away"), st.integers(0, 98)),
)
conversations = st.lists(st.one_of(data_frames, data_frames, other_frames), max_size=12)


def wire(conversation) -> bytes:
    makers = {
        "data": lambda stream_id, flags, body: data(stream_id, body, flags),
        "update": lambda stream_id, flags, delta: window_update(stream_id, delta, flags),
        "ping": ping,
        "go away": go_away,
    }
    return b"".join(makers[kind](*values) for kind, *values in conversation)


def expected_events(conversation) -> list[tuple]:
    """What a session must be told, from the conversation and not from its bytes."""
    events: list[tuple] = []
    is_open = {1, 3}
    for kind, *values in conversation:
        if kind != "data":
            events.append((kind, *values))
            continue
        stream_id, flags, body = values
        if flags & SYN:
            is_open.add(stream_id)
        is_plain = not flags & 0xF and stream_id in is_open and body
        if not is_plain:
            events.append(("header", stream_id, flags, len(body)))
        if body and stream_id in is_open and not flags & RST:
            if events and events[-1][:2] == ("data", stream_id):
                events[-1] = ("data", stream_id, events[-1][2] + body)
            else:
                events.append(("data", stream_id, body))
        if not is_plain and stream_id in is_open:
            events.append(("end", stream_id, flags))
    return events


def cut(whole: bytes, places: list[int]) -> list[bytes]:
    marks = sorted({0, len(whole), *(place % (len(whole) + 1) for place in places)})
    return [whole[start:end] for start, end in itertools.pairwise(marks)]


@settings(deadline=None, max_examples=150)
@given(conversations, st.lists(st.integers(0, 1 << 30), max_size=12), st.booleans())
def test_any_pieces_of_a_conversation_give_its_frames(conversation, places, has_descriptor):
    whole = wire(conversation)
    bench = read_to_end(cut(whole, places), has_descriptor=has_descriptor)
    assert bench.events == expected_events(conversation)
    assert bench.inbound.errors == []
    assert bench.inbound.ends == [(False, None)]
    assert bench.reader.bytes_received == len(whole)
    assert bench.reader.frames_received == len(conversation)


@settings(deadline=None, max_examples=50)
@given(conversations)
def test_a_conversation_byte_by_byte_gives_its_frames(conversation):
    whole = wire(conversation)[:4000]
    in_one, bytewise = read_to_end([whole] if whole else []), read_to_end([bytes([byte]) for byte in whole])
    assert bytewise.events == in_one.events
    assert bytewise.inbound.ends == in_one.inbound.ends
    assert bytewise.inbound.received == len(whole)


@settings(deadline=None, max_examples=100)
@given(conversations, st.integers(0, 1 << 30))
def test_bytes_read_before_are_taken_in_first(conversation, place):
    whole = wire(conversation)
    place %= len(whole) + 1
    bench = read_to_end([whole[place:]] if whole[place:] else [], initial=whole[:place])
    assert bench.events == expected_events(conversation)
    assert bench.reader.bytes_received == len(whole)


@settings(deadline=None, max_examples=200)
@given(st.binary(max_size=200), st.lists(st.integers(0, 1 << 30), max_size=5))
def test_any_bytes_are_read_or_break_the_protocol_alike_in_any_pieces(garbage, places):
    in_one, in_pieces = read_to_end([garbage] if garbage else []), read_to_end(cut(garbage, places))
    assert in_pieces.events == in_one.events
    assert [error.message for error in in_pieces.inbound.errors] == [error.message for error in in_one.inbound.errors]
    assert in_pieces.inbound.ends == in_one.inbound.ends


def test_frames_are_these_bytes():
    literal = bytes.fromhex(
        "00000000 00000001 00000002 6869"  # Data, stream 1, "hi"
        "00000004 00000003 00000001 21"  # Data with FIN, stream 3, "!"
        "00010002 00000001 00000007"  # WindowUpdate with ACK, stream 1
        "00020001 00000000 deadbeef"  # Ping
        "00030000 00000000 00000000"  # GoAway
    )
    assert read_to_end([literal]).events == [
        ("data", 1, b"hi"),
        ("header", 3, FIN, 1),
        ("data", 3, b"!"),
        ("end", 3, FIN),
        ("update", 1, ACK, 7),
        ("ping", SYN, 0xDEADBEEF),
        ("go away", 0),
    ]


# --- payloads ---


def test_a_frame_as_large_as_the_window_is_taken_piecemeal():
    body = bytes(range(256)) * 1024
    with reading(data(1, body)) as bench:
        sink = bench.inbound.streams[1]
        assert bench.events == [("data", 1, body)]
        assert len(sink.sizes) >= 4
        assert max(sink.sizes) <= RECEIVE_SIZE
        assert sink.announced == [WINDOW]
        assert not bench.reader.is_inside_frame


def test_inside_a_payload_exactly_what_is_left_of_it_is_received():
    body = b"x" * 100_000
    with reading(data(1, body)[:112]) as bench:
        assert bench.transport.asked[-1] == RECEIVE_SIZE
        bench.transport.add(body[:90_000])
        assert bench.reader.is_inside_frame
        assert bench.inbound.streams[1].sizes[0] == 100
        bench.transport.add(b"y" * 9_900 + ping(SYN, 1))
        assert bench.events[-1] == ("ping", SYN, 1)
        sizes = bench.transport.asked
        assert sizes[1] == RECEIVE_SIZE
        assert 9_900 in sizes
        assert not bench.reader.is_inside_frame


def test_small_frames_behind_large_ones_come_together_again():
    with connected() as (bench, far):
        receives = []
        receive = bench.transport.recv
        bench.transport.recv = lambda size: receives.append(size) or receive(size)
        for _ in range(3):
            far.sendall(data(1, b"x" * 65536))
            settle()
        assert sum(bench.inbound.streams[1].sizes) == 3 * 65536
        receives.clear()
        for _ in range(10):
            far.sendall(data(3, b"y" * 64) * 50)
            settle()
        assert sum(bench.inbound.streams[3].sizes) == 10 * 50 * 64
        assert len(receives) <= 25


def test_many_small_frames_in_one_receive_are_no_bulk():
    with connected() as (bench, far):
        receives = []
        receive = bench.transport.recv
        bench.transport.recv = lambda size: receives.append(size) or receive(size)
        for _ in range(4):
            far.sendall(data(3, b"y" * 64) * 800)  # 60,800 bytes
            settle()
            settle()
        wait_until = time.monotonic() + 5
        while sum(bench.inbound.streams[3].sizes) < 4 * 800 * 64 and time.monotonic() < wait_until:
            settle()
        assert len(receives) <= 20


def test_what_has_arrived_of_a_payload_is_handed_on_before_the_rest_comes():
    with reading(data(1, b"abcdef")[:15]) as bench:
        assert bench.events == [("data", 1, b"abc")]
        bench.transport.add(b"d")
        assert bench.events == [("data", 1, b"abcd")]
        bench.transport.add(b"ef")
        assert bench.events == [("data", 1, b"abcdef")]


def test_the_end_of_a_frame_with_flags_is_told_when_its_payload_is_complete():
    with reading(data(1, b"abc", FIN)[:14]) as bench:
        assert bench.events == [("header", 1, FIN, 3), ("data", 1, b"ab")]
        bench.transport.add(b"c")
        assert bench.events[-1] == ("end", 1, FIN)


def test_a_payload_for_a_stream_that_is_not_open_is_dropped_piecemeal():
    with reading(data(9, b"x" * 200_000), data(1, b"y")) as bench:
        assert bench.events == [("header", 9, 0, 200_000), ("data", 1, b"y")]
        assert max(bench.transport.asked) == RECEIVE_SIZE
        assert bench.reader._rest == b""


def test_the_payload_of_a_frame_with_rst_is_dropped():
    assert read_to_end([data(1, b"xyz", RST)]).events == [("header", 1, RST, 3), ("end", 1, RST)]


# --- hostile headers ---

GOOD = data(1, b"good")

HOSTILE = [
    (bytes.fromhex("01000000 00000001 00000000"), "version 1"),
    (bytes.fromhex("ff000000 00000001 00000000"), "version 255"),
    (bytes.fromhex("00040000 00000001 00000000"), "unknown type 4"),
    (bytes.fromhex("00ff0000 00000000 00000000"), "unknown type 255"),
    (bytes.fromhex("00000000 00000001 00040001"), "262145 bytes into a window"),
    (bytes.fromhex("00000000 00000001 ffffffff"), "4294967295 bytes into a window"),
    (bytes.fromhex("00000001 00000002 00040001"), "262145 bytes into a window"),
    (bytes.fromhex("00030000 00000000 00000063"), "told by the session"),
]


@pytest.mark.parametrize(("header", "text"), HOSTILE)
def test_a_hostile_header_breaks_the_protocol_before_its_body_comes(header, text):
    with reading(header) as bench:
        [error] = bench.inbound.errors
        assert text in error.message
        assert bench.events == []
        assert bench.inbound.streams[1].sizes == []


@pytest.mark.parametrize(("header", "text"), HOSTILE)
@pytest.mark.parametrize("split", [None, 4, 14, 17, 22])
def test_frames_before_a_hostile_header_count_and_those_after_it_do_not(header, text, split):
    whole = GOOD + header + b"body" * 10 + GOOD + ping(SYN, 1)
    pieces = [whole] if split is None else [whole[:split], whole[split:]]
    with reading(*pieces) as bench:
        [error] = bench.inbound.errors
        assert text in error.message
        assert bench.events == [("data", 1, b"good")]
        assert bench.reader.is_discarding
        assert not bench.reader.is_inside_frame
        bench.transport.add(GOOD)
        assert bench.events == [("data", 1, b"good")]
        assert len(bench.inbound.errors) == 1
        assert bench.reader.bytes_received == len(whole) + len(GOOD)


def test_an_error_inside_a_payload_forgets_the_rest_of_it():
    with reading(data(1, b"x" * 100)[:20]) as bench:
        bench.inbound.streams[1].window = 0
        bench.transport.add(b"x")
        assert len(bench.inbound.errors) == 1
        assert not bench.reader.is_inside_frame


def test_what_is_discarded_still_proves_life():
    with reading() as bench:
        bench.reader.is_discarding = True
        bench.reader.heard = 0.0
        bench.transport.add(GOOD)
        assert bench.events == []
        assert time.monotonic() - bench.reader.heard < 5
        assert bench.inbound.received == 1


def test_when_a_frame_makes_the_session_discard_the_rest_is_discarded():
    with reading() as bench:

        def discard(*args):
            bench.reader.is_discarding = True

        bench.inbound._on_ping = discard
        bench.transport.add(GOOD + ping(SYN, 1) + GOOD)
        assert bench.events == [("data", 1, b"good")]


def test_when_a_payload_makes_the_session_discard_the_rest_is_discarded():
    with reading() as bench:

        def discard(*args):
            bench.reader.is_discarding = True

        bench.inbound.streams[1]._on_data = discard
        bench.transport.add(GOOD + ping(SYN, 1))
        assert bench.events == []


# --- ends ---


@pytest.mark.parametrize("place", [0, 1, 11, 12, 13, 15])
def test_an_end_tells_whether_it_came_inside_a_frame(place):
    bench = read_to_end([GOOD + GOOD[:place]])
    assert bench.inbound.ends == [(place > 0, None)]


def test_an_end_at_a_frame_boundary_is_none_inside_a_frame():
    assert read_to_end([GOOD]).inbound.ends == [(False, None)]
    assert read_to_end([]).inbound.ends == [(False, None)]


@pytest.mark.parametrize("has_descriptor", [False, True])
@pytest.mark.parametrize("error", [ConnectionResetError(errno.ECONNRESET, "reset"), ValueError("closed file")])
def test_an_error_of_the_connection_is_handed_on(error, has_descriptor):
    with reading(GOOD[:5], error, has_descriptor=has_descriptor) as bench:
        assert bench.inbound.ended.wait(5)
        assert bench.inbound.ends == [(True, error)]


@pytest.mark.parametrize("nonsense", [None, "text", 5, memoryview(b"x"), [b"x"]])
def test_nonsense_returned_by_recv_is_an_error(nonsense):
    with reading(nonsense) as bench:
        [(inside, error)] = bench.inbound.ends
        assert not inside
        assert isinstance(error, OSError)
        assert f"recv() of the connection returned {type(nonsense).__name__}, not bytes" in str(error)


def test_a_bytearray_returned_by_recv_is_taken_as_bytes():
    with reading(bytearray(GOOD)) as bench:
        assert bench.events == [("data", 1, b"good")]


@pytest.mark.parametrize("has_descriptor", [False, True])
def test_a_killed_greenlet_is_an_end_with_an_error(has_descriptor):
    with reading(has_descriptor=has_descriptor) as bench:
        gevent.sleep(0)
        bench.reader._greenlet.kill()
        settle()
        [(inside, error)] = bench.inbound.ends
        assert not inside
        assert "killed" in str(error)


def test_after_stop_nothing_is_told_any_more():
    with reading(GOOD[:5]) as bench:
        bench.reader.stop()
        bench.reader.stop()
        settle()
        assert bench.inbound.ends == []
        assert bench.reader._greenlet.dead
        bench.transport.add(GOOD[5:])
        assert bench.events == []


def test_stopping_before_it_began_reads_nothing():
    transport = ScriptedTransport(GOOD)
    bench = Bench(transport, GOOD)
    bench.reader.stop()
    settle()
    assert bench.events == []
    assert transport.asked == []
    assert bench.inbound.ends == []


@pytest.mark.parametrize("has_descriptor", [False, True])
def test_it_may_be_stopped_by_what_it_tells(has_descriptor):
    with reading(has_descriptor=has_descriptor) as bench:
        bench.inbound._on_ping = lambda *args: bench.reader.stop()
        bench.transport.script += [GOOD + ping(SYN, 1), GOOD]
        bench.transport.more.set()
        bench.reader._greenlet.join(5)
        assert bench.reader._greenlet.dead
        assert bench.events == [("data", 1, b"good")]
        assert bench.inbound.ends == []
        assert list(bench.transport.script) == [GOOD]


def test_it_may_be_stopped_by_bytes_read_before():
    bench = Bench(ScriptedTransport(GOOD), ping(SYN, 1))
    bench.inbound._on_ping = lambda *args: bench.reader.stop()
    settle()
    assert bench.reader._greenlet.dead
    assert bench.transport.asked == []


def test_a_descriptor_may_be_closed_after_stop():
    with connected() as (bench, far):
        bench.reader.stop()
        bench.transport.close()
        settle()
        assert bench.inbound.ends == []
        assert far.recv(1) == b""


# --- descriptors ---


def test_frames_come_in_over_a_real_socket():
    body = bytes(range(256)) * 1024
    with connected() as (bench, far):
        far.sendall(GOOD + data(3, body) + ping(ACK, 5))
        far.shutdown(gsocket.SHUT_WR)
        assert bench.inbound.ended.wait(5)
        assert bench.events == [("data", 1, b"good"), ("data", 3, body), ("ping", ACK, 5)]
        assert bench.inbound.ends == [(False, None)]
        assert bench.reader.heard <= time.monotonic()


def test_there_is_one_receive_for_each_wake_so_that_others_get_their_turn():
    with connected() as (bench, far):
        turns = []

        def count(*args):
            turns.append(bench.inbound.received)

        far.sendall(data(1, b"x" * 1000) * 180)
        for _ in range(3):
            get_hub().loop.run_callback(count)
            gevent.sleep(0)
        assert turns[-1] <= 3
        settle()
        assert bench.inbound.received >= 3


def test_what_is_always_ready_lets_others_have_their_turn():
    bench = Bench(ScriptedTransport(*[GOOD] * 100))
    seen = []
    gevent.spawn(lambda: seen.append(bench.inbound.received)).join()
    assert seen[0] <= 2
    settle()
    bench.reader.stop()
    settle()
    assert bench.inbound.received == 100


def test_records_above_the_descriptor_are_received_without_a_wake_of_the_descriptor():
    near, far = gsocket.socketpair()
    transport = ScriptedTransport(GOOD, GOOD)
    transport.fileno = near.fileno()
    transport.has_more = lambda: bool(transport.script)  # never readable, as after a TLS record was half read
    bench = Bench(transport)
    settle()
    assert bench.inbound.received == 2
    bench.reader.stop()
    near.close()
    far.close()
    settle()


def wants_write(transport):
    transport.read_wants_write = True
    return BlockingIOError()


def wants_write_no_more(transport):
    transport.read_wants_write = False
    return GOOD


def test_a_receive_that_waits_to_write_goes_on_when_the_descriptor_is_writable():
    with reading(wants_write, wants_write, wants_write_no_more, has_descriptor=True) as bench:
        with gevent.Timeout(5):
            while not bench.events:
                gevent.sleep(0.001)
        assert bench.events == [("data", 1, b"good")]


def test_a_receive_that_would_block_after_all_is_tried_again():
    with reading(BlockingIOError(), GOOD, has_descriptor=True) as bench:
        with gevent.Timeout(5):
            while not bench.events:
                gevent.sleep(0.001)
        assert len(bench.transport.asked) >= 2


# --- drain ---


def test_draining_takes_in_one_receive_at_a_time_so_that_a_peer_that_goes_on_holds_nobody_up():
    with connected() as (bench, far):
        for _ in range(3):
            far.sendall(GOOD * 4096)
            assert bench.reader.drain() is True
        assert bench.inbound.received >= 3


def test_draining_takes_in_what_has_arrived_without_waiting():
    with connected() as (bench, far):
        far.sendall(GOOD + go_away(2))
        bench.reader.drain()
        assert bench.events == [("data", 1, b"good"), ("go away", 2)]
        assert bench.reader.drain() is False
        assert bench.inbound.received == 1


def test_draining_ends_where_it_makes_the_session_stop():
    with connected() as (bench, far):
        bench.inbound._on_go_away = lambda code: bench.reader.stop()
        far.sendall(go_away(2))
        bench.reader.drain()
        bench.reader.drain()
        assert bench.inbound.received == 1


def test_draining_finds_that_the_connection_had_ended():
    with connected() as (bench, far):
        far.sendall(GOOD)
        far.close()
        assert bench.reader.drain() is True
        assert bench.events == [("data", 1, b"good")]
        assert bench.reader.drain() is False
        assert bench.inbound.ends == [(False, None)]
        settle()
        assert bench.inbound.ends == [(False, None)]


def test_there_is_nothing_to_drain_without_a_descriptor():
    with reading() as bench:
        asked = len(bench.transport.asked)
        bench.transport.script.append(GOOD)
        bench.reader.drain()
        assert len(bench.transport.asked) == asked


def test_the_reader_does_not_drain_while_it_reads():
    with connected() as (bench, far):
        bench.inbound._on_ping = lambda *args: bench.reader.drain()
        far.sendall(ping(SYN, 1) + GOOD)
        settle()
        assert bench.events == [("data", 1, b"good")]


# --- logs ---


def test_frames_are_logged_where_debugging_was_on_when_it_began(caplog):
    with caplog.at_level(logging.DEBUG, "geyamux.frames"):
        read_to_end([GOOD + ping(SYN, 9)])
    assert [record.getMessage() for record in caplog.records] == [
        ": received Data stream 1 length 4",
        ": received Ping stream 0 SYN length 9",
    ]


def test_frames_are_not_logged_otherwise(caplog):
    with caplog.at_level(logging.INFO, "geyamux.frames"):
        read_to_end([GOOD])
    assert caplog.records == []


def test_a_header_that_lies_about_its_type_is_described_before_it_is_refused(caplog):
    with caplog.at_level(logging.DEBUG, "geyamux.frames"), reading(frame(7, 0, 1, 2)) as bench:
        assert len(bench.inbound.errors) == 1
    assert "type 7 stream 1 length 2" in caplog.records[0].getMessage()


# --- turns ---


def many(count: int) -> bytes:
    return b"".join(data(1, b"x") for _ in range(count))


@pytest.mark.parametrize("has_descriptor", [True, False])
@pytest.mark.parametrize("is_initial", [True, False])
def test_many_small_frames_are_handled_in_portions_without_another_receive(has_descriptor, is_initial, monkeypatch):
    portions = []
    take_in = Reader._take_in

    def counting(reader, received):
        before = reader.frames_received
        take_in(reader, received)
        portions.append(reader.frames_received - before)

    monkeypatch.setattr(Reader, "_take_in", counting)
    script, initial = ([], many(1200)) if is_initial else ([many(1200)], b"")
    with reading(*script, initial=initial, has_descriptor=has_descriptor) as bench:
        with gevent.Timeout(5):
            while bench.reader.frames_received < 1200:
                gevent.sleep(0.001)
        assert b"".join(body for _, _, body in bench.events) == b"x" * 1200
    assert [count for count in portions if count] == [128] * 9 + [48]


def test_frames_that_were_left_are_handled_when_the_connection_is_found_over(monkeypatch):
    with reading() as bench:
        bench.reader._feed(many(1200))
        assert bench.reader.frames_received == 128
        bench.reader.catch_up()
        assert bench.reader.frames_received == 1200
        bench.reader._feed(many(600))
        bench.reader._end(None)
        assert bench.reader.frames_received == 1800
        assert bench.inbound.ends == [(False, None)]
        bench.reader._greenlet.kill()
