"""What goes out on a stream: which bytes, in which frames, and when.

Each test names the rules of `spec.md` that it holds the package to.

====  ====================================================================================
R13   each call's bytes together; buffers free on return; send, settimeout(0), outbox_limit
R14   credit at queueing; what a kill or a timeout in the middle leaves behind
R15   the peer's credit, its overflow, and many small credits at once
R27   when a frame leaves
====  ====================================================================================

Longer than other modules because all tests of one subject stand together, each short and by itself.
"""

from __future__ import annotations

import array
import ctypes
import errno
import itertools
import socket
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import gevent
import pytest
from gevent import socket as gsocket
from hypothesis import given, settings
from hypothesis import strategies as st

from geyamux import Config, ProtocolError, SessionError, StreamReset
from geyamux.waking import Lane
from support import scenes
from support.facing import facing, narrow_pair, start
from support.links import KINDS, stream_pair
from support.rawpeer import RawPeer, settle
from support.scenes import Scene, literal, played, scene_of
from support.wire import DATA, Decoder

WINDOW = 262144
SOON = 0.02
"""A time limit that a test waits for."""
LATE = 10.0
"""A time limit that no passing test waits for."""


@pytest.fixture(params=[f"{name}-{kind}" for name in scenes.KINDS for kind in ("socketpair", "memory")])
def scene(request: pytest.FixtureRequest) -> Iterator[Scene]:
    """A stream whose peer the test plays; over a descriptor, and over a connection without one."""
    name, _, kind = request.param.rpartition("-")
    with scene_of(name, kind=kind) as found:
        yield found


@pytest.fixture
def stalled() -> Iterator[Scene]:
    """A stream over a connection that takes nothing until `transport.release`."""
    with scene_of("server-accepted", Config(connection_write_timeout=None), kind="memory", faulty=True) as found:
        found.transport.stall("send")
        yield found


@pytest.fixture(params=[f"{kind}-{writer}" for kind in KINDS for writer in ("opened", "accepted")])
def ends(request: pytest.FixtureRequest) -> Iterator[tuple[Any, Any]]:
    """A stream that writes and one that reads, over every kind of link and in both directions."""
    kind, writer = request.param.split("-")
    with stream_pair(kind) as (opened, accepted):
        yield (opened, accepted) if writer == "opened" else (accepted, opened)


def pattern(size: int) -> bytes:
    """Bytes in which a lost, repeated or moved piece shows."""
    return b"".join(number.to_bytes(4, "big") for number in range(size // 4 + 1))[:size]


def spend_credit(scene: Scene, leave: int = 0) -> None:
    """Write until so much of the peer's credit is left."""
    size = scene.stream.stats().send_credit - leave
    writing = start(scene.stream.sendall, bytes(size))
    scene.expect_data(bytes(size))
    assert writing.get(timeout=LATE) is None
    assert scene.stream.stats().send_credit == leave


def arrived(transport: Any) -> bytes:
    """What a socket has received, found out without a switch to the hub."""
    transport.settimeout(0)
    try:
        return transport.recv(1 << 20)
    except BlockingIOError:
        return b""
    finally:
        transport.settimeout(None)


# --- what goes out ---


def test_a_small_write_is_one_data_frame_without_flags(scene):
    """R13: its length and its bytes, nothing else."""
    scene.stream.sendall(b"hello")
    scene.expect("00 00 0000 ID 00000005", b"hello")
    scene.expect_nothing()


@pytest.mark.parametrize("size", [1, 4095, 4096, 4097, 65535, 65536])
def test_a_write_of_up_to_64_kib_is_one_frame(scene, size):
    """R13."""
    body = pattern(size)
    writing = start(scene.stream.sendall, body)
    scene.expect(f"00 00 0000 ID {size:08x}", body)
    assert writing.get(timeout=LATE) is None
    scene.expect_nothing()


def test_a_large_write_is_cut_into_frames_of_64_kib(scene):
    """R13: at the initial window, a quarter of which they are."""
    body = pattern(200_000)
    writing = start(scene.stream.sendall, body)
    for index in range(3):
        scene.expect("00 00 0000 ID 00010000", body[index * 65536 : (index + 1) * 65536])
    scene.expect("00 00 0000 ID 00000d40", body[3 * 65536 :])
    assert writing.get(timeout=LATE) is None


@pytest.mark.parametrize(("limit", "sizes"), [(1024, [1024, 1024, 952]), (100_000, [3000])])
def test_no_frame_is_larger_than_configured(limit, sizes):
    """R13: `max_frame_size`."""
    with scene_of("client-opened", Config(max_frame_size=limit)) as scene:
        body = pattern(3000)
        scene.stream.sendall(body)
        for size in sizes:
            scene.expect(f"00 00 0000 ID {size:08x}", body[:size])
            body = body[size:]


@pytest.mark.parametrize("name", scenes.KINDS)
def test_no_frame_is_larger_than_a_mebibyte_however_much_credit_there_is(name):
    """R13: some peers end the connection at a larger one."""
    with scene_of(name) as scene:
        scene.send("00 01 0000 ID 7fffffff")
        settle()
        body = bytes(3 << 20)
        writing = start(scene.stream.sendall, body)
        got = 0
        while got < len(body):
            found = scene.peer.next()
            assert (found.type, found.flags, found.stream_id) == (0, 0, scene.id)
            assert 65536 <= found.length <= 1 << 20 or found.length == len(body) - got
            got += found.length
        assert writing.get(timeout=LATE) is None


def test_data_may_follow_the_syn_at_once_and_never_precedes_it():
    """R13, R1: no ACK is waited for, and the order stays."""
    with played(client=True) as scene:
        stream = scene.session.open()
        stream.sendall(b"first")
        writing = start(stream.sendall, pattern(100_000))
        scene.peer.expect(1, 1, 1, 0)
        scene.peer.expect_data(1, b"first" + pattern(100_000))
        assert writing.get(timeout=LATE) is None


# --- R13 ---


@pytest.mark.parametrize("size", [10, 3000, 50_000, 300_000])
def test_what_several_greenlets_write_is_not_mixed(scene, size):
    """R13: each call's bytes are together, in the order of the calls, though credit comes in odd pieces."""
    letters = b"abcdef"
    writers = [start(scene.stream.sendall, bytes([letter]) * size) for letter in letters]
    got = bytearray()
    for step in itertools.cycle([1, 70_000, 13, 262_144]):
        for found in scene.frames_there():
            assert (found.type, found.flags, found.stream_id) == (0, 0, scene.id)
            got += found.body
        if len(got) >= size * len(letters):
            break
        scene.send(f"00 01 0000 ID {step:08x}")
    assert bytes(got) == b"".join(bytes([letter]) * size for letter in letters)
    gevent.joinall(writers, timeout=LATE, raise_error=True)
    assert [writer.value for writer in writers] == [None] * len(writers)


def test_what_several_greenlets_write_is_not_mixed_over_any_link(ends):
    """R13: both faces of the stream, large and small calls."""
    a, b = ends
    calls = [(bytes([65 + number]) * size) for number, size in enumerate([100_000, 1, 5000, 400_000, 20, 65_537])]
    methods = itertools.cycle([a.sendall, a.write])
    writers = [start(next(methods), call) for call in calls]
    expected = b"".join(calls)
    assert b.read(len(expected)) == expected
    gevent.joinall(writers, timeout=LATE, raise_error=True)
    assert [writer.value for writer in writers[1::2]] == [len(call) for call in calls[1::2]]


@pytest.mark.parametrize("size", [5, 4096, 4097, 60_000])
@pytest.mark.parametrize("method", ["send", "sendall", "write"])
def test_a_buffer_may_be_changed_and_resized_as_soon_as_it_was_written(scene, size, method):
    """R13: what arrives is what was there at the call, and no view is left."""
    body = pattern(size)
    buffer = bytearray(body)
    writing = start(getattr(scene.stream, method), buffer)
    wanted = min(size, 65536) if method == "send" else size
    assert writing.get(timeout=LATE) == {"send": wanted, "sendall": None, "write": size}[method]
    buffer[:] = b"!" * size
    buffer += b"grown"
    scene.expect_data(body[:wanted])


@pytest.mark.parametrize("how", ["kill", "timeout", "reset", "end of the session"])
def test_no_view_is_left_after_a_write_that_failed(stalled, how):
    """R13: the buffer can be resized, whatever ended the call."""
    stalled.stream.settimeout(SOON if how == "timeout" else None)
    buffer = bytearray(pattern(300_000))
    writing = start(stalled.stream.sendall, buffer)
    assert not writing.ready()
    with pytest.raises(BufferError):
        buffer.append(1)
    if how == "kill":
        writing.kill()
    elif how == "reset":
        stalled.stream.reset()
    elif how == "end of the session":
        stalled.session.abort()
    writing.join(LATE)
    # The error's traceback holds the frames, and with them nothing of the buffer.
    buffer.append(1)


def test_a_large_write_returns_only_when_its_bytes_are_not_needed_any_more(ends_of_a_small_socket):
    """R13: the connection has taken them all; a part is not enough."""
    scene = ends_of_a_small_socket
    buffer = bytearray(pattern(60_000))
    writing = start(scene.stream.sendall, buffer)
    assert not writing.ready()
    with pytest.raises(BufferError):
        buffer.append(1)
    scene.expect_data(pattern(60_000))
    assert writing.get(timeout=LATE) is None
    buffer.append(1)


def test_send_says_how_much_it_took(scene):
    """R13: what credit allows, at least one byte."""
    spend_credit(scene, leave=5)
    assert scene.stream.send(b"0123456789") == 5
    scene.expect("00 00 0000 ID 00000005", b"01234")
    waiting = start(scene.stream.send, b"56789")
    assert not waiting.ready()
    scene.send("00 01 0000 ID 00000001")
    assert waiting.get(timeout=LATE) == 1
    scene.expect("00 00 0000 ID 00000001", b"5")
    scene.expect_nothing()


def test_send_of_much_takes_what_goes_without_waiting(scene):
    """R13: a partial send is no error. Code that ignores what it returns works as long as it would on a socket."""
    body = pattern(1 << 20)
    sending = start(scene.stream.send, body)
    scene.expect("00 00 0000 ID 00010000", body[:65536])
    more = scene.frames_there()  # a frame that is begun is finished first, which may need more room
    taken = sending.get(timeout=LATE)
    scene.expect_nothing()
    assert all((found.type, found.flags, found.stream_id) == (DATA, 0, scene.id) for found in more)
    assert b"".join(found.body for found in more) == body[65536:taken]
    if hasattr(scene.session.conn, "fileno"):
        assert 65536 < taken <= WINDOW, "it takes more where it can see that there is room"
    else:
        assert taken == 65536


def test_without_blocking_a_write_without_credit_would_block(scene):
    """R13: `BlockingIOError`, with the count."""
    spend_credit(scene, leave=5)
    scene.stream.settimeout(0)
    with pytest.raises(BlockingIOError) as caught:
        scene.stream.sendall(b"0123456789")
    assert caught.value.errno == caught.value.args[0] == errno.EAGAIN
    assert caught.value.characters_written == 5
    scene.expect("00 00 0000 ID 00000005", b"01234")
    for method in (scene.stream.send, scene.stream.sendall, scene.stream.write):
        with pytest.raises(BlockingIOError) as caught:
            method(b"x")
        assert caught.value.errno == errno.EAGAIN
        assert caught.value.characters_written == 0
    scene.send("00 01 0000 ID 00000003")
    settle()
    assert scene.stream.send(b"56789") == 3
    scene.expect("00 00 0000 ID 00000003", b"567")


def test_without_blocking_writes_stop_at_a_full_outbox(stalled):
    """R13: what was taken goes, and no more."""
    stalled.send("00 01 0000 ID 00100000")
    settle()
    stalled.stream.settimeout(0)
    taken = 0
    body = pattern(1 << 20)
    with pytest.raises(BlockingIOError):
        while True:
            taken += stalled.stream.send(body[taken : taken + 1000])
    assert WINDOW <= taken + stalled.session.stats().queued - taken <= WINDOW + 2000
    with pytest.raises(BlockingIOError) as caught:
        stalled.stream.sendall(b"x" * 100)
    assert caught.value.characters_written == 0
    stalled.transport.release("send")
    stalled.expect_data(body[:taken])
    stalled.expect_nothing()


@pytest.mark.parametrize("limit", [10_000, 262144])
def test_writes_and_opens_wait_above_the_limit_of_the_outbox(limit):
    """R13: `outbox_limit`; one frame more at most is held."""
    config = Config(outbox_limit=limit, connection_write_timeout=None)
    with scene_of("server-accepted", config, kind="memory", faulty=True) as scene:
        scene.send("00 01 0000 ID 00100000")
        settle()
        scene.transport.stall("send")
        written = 0

        def write() -> None:
            nonlocal written
            while written < limit + 100_000:
                scene.stream.sendall(bytes(1000))
                written += 1000

        writing = start(write)
        assert not writing.ready()
        assert limit <= scene.session.stats().queued <= limit + 1012
        opening = start(scene.session.open)
        other = start(lambda: opening.get().sendall(b"from the other"))
        assert not opening.ready()
        held = scene.session.stats().queued
        settle()
        assert scene.session.stats().queued == held
        scene.transport.release("send")
        got = 0
        while got < limit + 100_000:
            found = scene.peer.next()
            got += found.length if found.stream_id == scene.id else 0
        writing.get(timeout=LATE)
        assert opening.get(timeout=LATE).stream_id == 2
        assert other.get(timeout=LATE) is None


def test_large_writes_hold_no_copies_of_what_waits(stalled):
    """R13: a hundred writers of large frames do not fill the outbox."""
    stalled.send("00 01 0000 ID 01000000")
    settle()
    streams = [stalled.stream, *(stalled.session.open() for _ in range(10))]
    writers = [start(stream.sendall, bytes(60_000)) for stream in streams]
    assert stalled.session.stats().queued < 65536 + 2000
    for writer in writers:
        writer.kill()


@pytest.mark.parametrize(
    "data",
    [
        b"abcdef",
        bytearray(b"abcdef"),
        memoryview(b"..abcdef..")[2:8],
        array.array("B", b"abcdef"),
        array.array("H", b"abcdef"),
        memoryview(array.array("H", b"abcdef")),
        memoryview(b"abcdef").cast("B", (2, 3)),
        (ctypes.c_char * 6)(*[bytes([byte]) for byte in b"abcdef"]),
    ],
    ids=["bytes", "bytearray", "slice", "array", "wide items", "wide view", "two dimensions", "ctypes"],
)
@pytest.mark.parametrize("method", ["send", "sendall", "write"])
def test_any_contiguous_buffer_goes_out_as_its_bytes(method, data):
    """R13: sizes are counted in bytes."""
    with scene_of("client-opened") as scene:
        assert getattr(scene.stream, method)(data) == (None if method == "sendall" else 6)
        scene.expect("00 00 0000 ID 00000006", b"abcdef")


# --- R14 ---


def test_credit_is_charged_when_a_frame_is_queued(stalled):
    """R14: not when it has left."""
    stalled.stream.sendall(b"x" * 1000)
    assert stalled.stream.stats().send_credit == WINDOW - 1000
    writing = start(stalled.stream.sendall, bytes(10_000))
    assert stalled.stream.stats().send_credit == WINDOW - 11_000
    writing.kill()


def test_a_killed_writer_of_a_frame_not_begun_takes_it_back(stalled):
    """R14: withdrawn, and its credit returned."""
    stalled.stream.sendall(b"small, at the connection")
    settle()
    writing = start(stalled.stream.sendall, pattern(50_000))
    assert stalled.stream.stats().send_credit == WINDOW - 24 - 50_000
    writing.kill()
    assert stalled.stream.stats().send_credit == WINDOW - 24
    stalled.transport.release("send")
    stalled.expect("00 00 0000 ID 00000018", b"small, at the connection")
    stalled.stream.sendall(b"next")
    stalled.expect("00 00 0000 ID 00000004", b"next")
    stalled.expect_nothing()


@pytest.mark.parametrize("name", scenes.KINDS)
@pytest.mark.parametrize("passed", [1, 11, 12, 13, 5000, 65547])
def test_a_killed_writer_of_a_frame_begun_leaves_a_copy_that_finishes_it(name, passed):
    """R14: the wire is never torn, wherever the frame was cut, though its buffer is overwritten then."""
    config = Config(connection_write_timeout=None)
    with scene_of(name, config, kind="memory", faulty=True) as scene:
        scene.transport.max_send = passed
        body = bytearray(pattern(200_000))
        passing = scene.transport.send

        def send_once(data: Any) -> int:
            scene.transport.send = passing
            taken = passing(data)
            scene.transport.stall("send")
            return taken

        scene.transport.send = send_once
        writing = start(scene.stream.sendall, body)
        assert not writing.ready()
        writing.kill()
        body[:] = bytes(len(body))
        scene.transport.max_send = None
        other = scene.session.open()
        other.sendall(b"unharmed")
        scene.transport.release("send")
        scene.expect("00 00 0000 ID 00010000", pattern(65536))
        scene.peer.expect(1, 1, other.stream_id, 0)
        scene.peer.expect_data(other.stream_id, b"unharmed")
        scene.expect_nothing()
        assert scene.stream.stats().send_credit == WINDOW - 65536


def test_a_killed_writer_on_a_socket_tears_no_frame(ends_of_a_small_socket):
    """R14: over a descriptor that took a part of the frame."""
    scene = ends_of_a_small_socket
    body = bytearray(pattern(200_000))
    writing = start(scene.stream.sendall, body)
    assert not writing.ready()
    writing.kill()
    body[:] = bytes(len(body))
    sent = WINDOW - scene.stream.stats().send_credit
    assert 0 < sent < 200_000
    assert sent % 65536 == 0
    scene.stream.close_write()
    scene.expect_data(pattern(200_000)[:sent])
    scene.expect("00 01 0004 ID 00000000")


@pytest.fixture(params=scenes.KINDS)
def ends_of_a_small_socket(request: pytest.FixtureRequest) -> Iterator[Scene]:
    """A stream over sockets whose buffers hold little."""
    with scene_of(request.param, Config(connection_write_timeout=None)) as found:
        for end in (found.transport, found.peer.transport):
            end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
            end.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        yield found


def test_a_timeout_says_how_many_bytes_go(ends_of_a_small_socket):
    """R14: exactly those arrive that `bytes_sent` counts, be the frame begun or not."""
    scene = ends_of_a_small_socket
    scene.stream.settimeout(SOON)
    body = pattern(400_000)
    with pytest.raises(TimeoutError) as caught:
        scene.stream.sendall(body)
    assert caught.value.args == ("timed out",)
    assert type(caught.value) is TimeoutError
    sent = caught.value.bytes_sent
    assert 0 < sent < len(body)
    scene.stream.close_write()
    scene.expect_data(body[:sent])
    scene.expect("00 01 0004 ID 00000000")


@pytest.mark.parametrize("method", ["sendall", "write"])
def test_a_timeout_for_want_of_credit_says_how_many_bytes_went(scene, method):
    """R14: and the rest can be sent later."""
    spend_credit(scene, leave=1000)
    scene.stream.settimeout(SOON)
    with pytest.raises(TimeoutError) as caught:
        getattr(scene.stream, method)(pattern(5000))
    assert caught.value.bytes_sent == 1000
    scene.expect_data(pattern(5000)[:1000])
    with pytest.raises(TimeoutError) as caught:
        getattr(scene.stream, method)(b"x")
    assert caught.value.bytes_sent == 0
    scene.send("00 01 0000 ID 00001000")
    scene.stream.settimeout(LATE)
    scene.stream.sendall(pattern(5000)[1000:])
    scene.expect_data(pattern(5000)[1000:])


@pytest.mark.parametrize("how", ["kill", "timeout", "foreign timeout"])
def test_one_that_gives_up_waiting_for_credit_leaves_the_others_in_order(scene, how):
    """R14, R13: no credit, no place in line, no byte."""
    spend_credit(scene)
    scene.stream.settimeout(SOON if how == "timeout" else None)
    if how == "foreign timeout":

        def limited() -> None:
            with gevent.Timeout(SOON, False):
                scene.stream.sendall(b"given up")

        first = start(limited)
    else:
        first = start(scene.stream.sendall, b"given up")
    scene.stream.settimeout(None)
    second = start(scene.stream.sendall, b"second")
    third = start(scene.stream.sendall, b"third")
    if how == "kill":
        first.kill()
    first.join(LATE)
    scene.send("00 01 0000 ID 0000000b")
    scene.expect_data(b"secondthird")
    gevent.joinall([second, third], timeout=LATE, raise_error=True)
    assert scene.stream.stats().send_credit == 0
    assert scene.stream.stats().writers == 0


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.integers(1, 150_000),
            st.sampled_from(["finish", "kill", "timeout"]),
            st.integers(0, 80_000),
        ),
        min_size=1,
        max_size=6,
    ),
    st.integers(1, 70_000),
)
def test_whatever_ends_the_calls_frames_stay_whole_and_credit_exact(calls, piece):
    """R14: over kills and timeouts at any byte of the wire; what arrives is a prefix of each call's bytes."""
    with scene_of("server-accepted", Config(connection_write_timeout=None), kind="memory", faulty=True) as scene:
        scene.send("00 01 0000 ID 01000000")
        settle()
        credit = scene.stream.stats().send_credit
        expected: list[tuple[bytes, int | None]] = []
        receiving = gevent.spawn(_drain, scene)
        for number, (size, how, passed) in enumerate(calls):
            body = bytes([65 + number]) * size
            transport = scene.transport
            transport.max_send = piece
            _let_pass(transport, passed)
            scene.stream.settimeout(0.002 if how == "timeout" else None)
            writing = start(scene.stream.sendall, body)
            if how == "kill":
                writing.kill()
            elif how == "timeout":
                writing.join(LATE)
            transport.release("send")
            outcome = writing.get(timeout=LATE)
            if isinstance(outcome, TimeoutError):
                expected.append((body, outcome.bytes_sent))
            else:
                expected.append((body, None if how == "kill" and outcome is not None else size))
        scene.stream.settimeout(None)
        scene.stream.close_write()
        got = receiving.get(timeout=LATE)
        position = 0
        for body, sent in expected:
            run = 0
            while position + run < len(got) and got[position + run] == body[0]:
                run += 1
            assert run <= len(body)
            assert sent is None or run == sent
            position += run
        assert position == len(got)
        assert scene.stream.stats().send_credit == credit - len(got)
        scene.transport.audit(client=False)


def _let_pass(transport: Any, count: int) -> None:
    """Let so many bytes pass, about, then stall."""
    inner = type(transport).send
    left = count

    def send(data: Any) -> int:
        nonlocal left
        if left <= 0:
            transport.stall("send")
            transport.__dict__.pop("send", None)
            return inner(transport, data)
        taken = inner(transport, data[:left] if left < len(data) else data)
        left -= taken
        return taken

    transport.send = send


def _drain(scene: Scene) -> bytes:
    """All Data of the stream to its FIN."""
    got = bytearray()
    while (found := scene.peer.next(LATE)).flags != 4:
        assert (found.type, found.flags, found.stream_id) == (0, 0, scene.id)
        got += found.body
    return bytes(got)


def test_bytes_once_accepted_that_cannot_go_reset_the_stream(stalled):
    """R14: what waits here when we give up is not followed by a FIN: the peer sees a reset, never a short body."""
    stalled.stream.sendall(b"at the connection")
    settle()
    stalled.stream.sendall(b"accepted")
    stalled.stream.close_write()
    stalled.stream.reset()
    stalled.transport.release("send")
    stalled.expect("00 00 0000 ID 00000011", b"at the connection")
    stalled.expect("00 01 0008 ID 00000000")
    stalled.expect_nothing()


def test_a_writer_whose_stream_is_reset_meanwhile_gets_the_error_not_success(scene):
    """R14, R18: in the middle of a call."""
    writing = start(scene.stream.sendall, bytes(2 * WINDOW))
    scene.expect_data(bytes(WINDOW))
    scene.send("00 01 0008 ID 00000005")
    outcome = writing.get(timeout=LATE)
    assert isinstance(outcome, StreamReset)
    assert (outcome.code, outcome.remote) == (5, True)
    scene.expect_nothing()


def test_a_writer_of_a_large_frame_that_the_peer_resets_gets_the_error(stalled):
    """R14: its frame waits here; it is purged, not counted as sent."""
    stalled.session.open()
    settle()
    writing = start(stalled.stream.sendall, bytes(50_000))
    stalled.send("00 01 0008 ID 00000000")
    assert isinstance(writing.get(timeout=LATE), StreamReset)
    stalled.transport.release("send")
    assert stalled.peer.next().flags == 1
    stalled.expect_nothing()


def test_writers_learn_at_once_that_the_session_ended(ends):
    """R14: those that wait for credit and those in line behind them, over every link."""
    a, _ = ends
    writers = [start(a.sendall, bytes(2 << 20)) for _ in range(3)]
    a.session.abort()
    for writer in writers:
        assert isinstance(writer.get(timeout=LATE), SessionError)


# --- R15 ---


@pytest.mark.parametrize("flags", ["0000", "0002", "0004", "0006"])
def test_credit_may_fill_32_bits(scene, flags):
    """R15: 2**32 - 1 in all is allowed, on any frame."""
    scene.send(f"00 01 {flags} ID fffbffff")
    settle()
    assert scene.stream.stats().send_credit == 0xFFFFFFFF
    scene.stream.sendall(b"x")
    scene.expect("00 00 0000 ID 00000001", b"x")


@pytest.mark.parametrize("flags", ["0000", "0002", "0004", "0006"])
def test_credit_beyond_32_bits_is_a_protocol_error(scene, flags):
    """R15: with one byte too many; nothing is added before the check."""
    scene.send(f"00 01 {flags} ID fffc0000")
    scene.expect("00 01 0008 ID 00000000")
    scene.peer.expect(3, 0, 0, 1)
    assert isinstance(scene.session.exception, ProtocolError)
    with pytest.raises((ProtocolError, StreamReset)):
        scene.stream.sendall(b"x")


def test_credit_overflows_by_many_small_grants_too(scene):
    """R15."""
    scene.send("00 01 0000 ID fffbfffe")
    scene.send("00 01 0000 ID 00000001")
    settle()
    assert scene.session.exception is None
    scene.send("00 01 0000 ID 00000001")
    scene.expect("00 01 0008 ID 00000000")
    scene.peer.expect(3, 0, 0, 1)


def test_credit_that_was_used_may_be_granted_again(scene):
    """R15: the check is on what is left, not on what was ever granted."""
    scene.send("00 01 0000 ID fffbffff")
    settle()
    scene.stream.sendall(b"abc")
    scene.expect_data(b"abc")
    scene.send("00 01 0000 ID 00000003")
    settle()
    assert scene.session.exception is None
    assert scene.stream.stats().send_credit == 0xFFFFFFFF


@pytest.mark.parametrize("flags", ["0001", "0005"])
def test_credit_on_a_syn_may_fill_32_bits_and_no_more(flags):
    """R15: on the SYN path; nothing comes into being by a bad one."""
    with played() as scene:
        scene.peer.send(bytes.fromhex(f"00 01 {flags} 00000001 fffbffff"))
        assert scene.session.accept(timeout=LATE).stats().send_credit == 0xFFFFFFFF
        scene.peer.expect(1, 2, 1, 0)
        scene.peer.send(bytes.fromhex(f"00 01 {flags} 00000003 fffc0000"))
        scene.peer.expect(1, 8, 1)
        scene.peer.expect(3, 0, 0, 1)
        assert isinstance(scene.session.exception, ProtocolError)
        assert scene.session.stats().incoming == 1


def test_credits_that_arrive_together_are_used_together(scene):
    """R15: a hundred grants of one byte are one frame of a hundred."""
    spend_credit(scene)
    writing = start(scene.stream.sendall, pattern(100))
    scene.peer.send(literal("00 01 0000 ID 00000001", scene.id) * 100)
    scene.expect("00 00 0000 ID 00000064", pattern(100))
    assert writing.get(timeout=LATE) is None


def test_a_write_goes_on_with_each_credit_that_comes(scene):
    """R15: exactly so much, at once."""
    spend_credit(scene)
    body = pattern(300)
    writing = start(scene.stream.sendall, body)
    for size in (1, 2, 7, 90, 200):
        scene.send(f"00 01 0000 ID {size:08x}")
        scene.expect(f"00 00 0000 ID {size:08x}", body[:size])
        scene.expect_nothing()
        body = body[size:]
    assert body == b""
    assert writing.get(timeout=LATE) is None


def test_credit_comes_after_the_peers_fin_too(scene):
    """R15, R7: the peer has ended its side only."""
    spend_credit(scene)
    scene.send("00 01 0004 ID 00000000")
    writing = start(scene.stream.sendall, b"answer")
    assert not writing.ready()
    scene.send("00 01 0000 ID 00000006")
    scene.expect("00 00 0000 ID 00000006", b"answer")
    assert writing.get(timeout=LATE) is None


def test_one_stream_without_credit_does_not_hold_another(scene):
    """R15, R27: only the writer waits."""
    spend_credit(scene)
    waiting = start(scene.stream.sendall, b"x")
    other = scene.session.open()
    other.sendall(b"goes on")
    scene.peer.expect(1, 1, other.stream_id, 0)
    scene.peer.expect_data(other.stream_id, b"goes on")
    waiting.kill()


# --- R27: when a frame leaves ---


@pytest.mark.parametrize("name", scenes.KINDS)
def test_a_write_leaves_at_the_next_switch_to_the_hub_and_not_before(name):
    """R27: no timer, no answer of the peer is needed."""
    with scene_of(name) as scene:
        socket_of_peer = scene.peer.transport
        assert arrived(socket_of_peer) == b""
        scene.stream.sendall(b"hello")
        assert arrived(socket_of_peer) == b""
        gevent.sleep(0)
        assert arrived(socket_of_peer) == literal("00 00 0000 ID 00000005", scene.id) + b"hello"


def test_an_open_leaves_at_the_next_switch_with_what_was_written():
    """R27: SYN, data and FIN of one turn are one send."""
    with played("memory", client=True, faulty=True) as scene:
        stream = scene.session.open()
        stream.sendall(b"hello")
        stream.close_write()
        assert scene.transport.calls["send"] == 0
        settle()
        assert scene.transport.calls["send"] == 1
        assert scene.transport.sent == (
            bytes.fromhex("00 01 0001 00000001 00000000")
            + bytes.fromhex("00 00 0000 00000001 00000005")
            + b"hello"
            + bytes.fromhex("00 01 0004 00000001 00000000")
        )


def test_small_writes_of_one_turn_leave_together():
    """R27: of one stream and of several."""
    with scene_of("server-accepted", kind="memory", faulty=True) as scene:
        other = scene.session.open()
        settle()
        calls = scene.transport.calls["send"]
        for _ in range(10):
            scene.stream.sendall(b"abc")
            other.sendall(b"def")
        settle()
        assert scene.transport.calls["send"] == calls + 1
        scene.peer.expect(1, 1, other.stream_id, 0)
        for _ in range(10):
            scene.expect("00 00 0000 ID 00000003", b"abc")
            scene.peer.expect_data(other.stream_id, b"def")


@pytest.mark.parametrize("name", scenes.KINDS)
def test_two_kibibytes_collected_leave_at_once(name):
    """R27: without a switch to the hub."""
    with scene_of(name) as scene:
        there = b""
        count = 0
        while not there:
            scene.stream.sendall(bytes(88))
            count += 1
            assert count <= 21, "more than 2 KiB are held back"
            there = arrived(scene.peer.transport)
        assert count >= 20
        decoder = Decoder()
        frames = decoder.feed(there)
        decoder.finish()
        assert [found.length for found in frames] == [88] * count


def test_flush_returns_when_the_connection_has_taken_all_of_it(stalled):
    """R27."""
    stalled.stream.flush()
    stalled.stream.sendall(b"hello")
    flushing = start(stalled.stream.flush)
    assert not flushing.ready()
    stalled.transport.release("send")
    assert flushing.get(timeout=LATE) is None
    assert stalled.transport.sent.endswith(literal("00 00 0000 ID 00000005", 1) + b"hello")


def test_flush_does_not_wait_for_other_streams(stalled):
    """R27: it waits for this stream's bytes, not for what was queued behind them; here without a descriptor."""
    stalled.transport.max_send = 17
    stalled.transport.release("send")
    other = stalled.session.open()
    settle()
    stalled.stream.sendall(b"hello")
    bulk = start(other.sendall, bytes(200_000))
    flushing = start(stalled.stream.flush)
    assert flushing.get(timeout=LATE) is None
    assert len(stalled.transport.sent) < 100_000
    bulk.kill()


def test_flush_does_not_wait_for_other_streams_on_a_socket(ends_of_a_small_socket):
    """R27: and the bulk that follows stands still, since the peer reads nothing."""
    scene = ends_of_a_small_socket
    other = scene.session.open()
    scene.stream.sendall(b"hello")
    bulk = start(other.sendall, bytes(200_000))
    assert not bulk.ready()
    flushing = start(scene.stream.flush)
    assert flushing.get(timeout=LATE) is None
    assert not bulk.ready()
    bulk.kill()


@pytest.mark.parametrize("name", scenes.KINDS)
def test_flush_leaves_at_once(name):
    """R27: without a switch to the hub where the connection takes it."""
    with scene_of(name) as scene:
        scene.stream.sendall(b"hello")
        scene.stream.flush()
        assert arrived(scene.peer.transport) == literal("00 00 0000 ID 00000005", scene.id) + b"hello"


def test_flush_times_out_and_can_be_repeated(stalled):
    """R27: the bytes go all the same."""
    stalled.stream.settimeout(SOON)
    stalled.stream.sendall(b"hello")
    with pytest.raises(TimeoutError) as caught:
        stalled.stream.flush()
    assert caught.value.args == ("timed out",)
    stalled.stream.settimeout(0)
    with pytest.raises(BlockingIOError) as blocking:
        stalled.stream.flush()
    assert blocking.value.errno == errno.EAGAIN
    stalled.transport.release("send")
    stalled.stream.settimeout(None)
    stalled.stream.flush()
    stalled.expect("00 00 0000 ID 00000005", b"hello")


@pytest.mark.parametrize("how", ["reset by the peer", "end of the session", "kill"])
def test_flush_ends_with_what_ends_the_stream(stalled, how):
    """R27: it does not claim what was not taken."""
    stalled.session.open()
    settle()
    stalled.stream.sendall(b"hello")
    flushing = start(stalled.stream.flush)
    if how == "reset by the peer":
        stalled.send("00 01 0008 ID 00000000")
        assert isinstance(flushing.get(timeout=LATE), StreamReset)
    elif how == "end of the session":
        stalled.session.abort()
        assert isinstance(flushing.get(timeout=LATE), SessionError)
    else:
        flushing.kill()
        stalled.transport.release("send")
        stalled.stream.flush()


def test_what_the_peer_provokes_never_makes_the_reader_wait_for_the_connection(stalled):
    """R27: it takes nothing, and all that comes is taken in all the same."""
    stalled.stream.sendall(b"wait")
    settle()
    for number in range(200):
        stalled.send(f"00 02 0001 00000000 {number:08x}")
        stalled.send(f"00 01 0001 {number * 2 + 3:08x} 00000000")
        stalled.data(bytes(100))
    settle()
    assert stalled.stream.read(20_000) == bytes(20_000)
    assert stalled.session.num_streams == 201


def test_frames_that_the_reader_provoked_leave_after_it_has_read_all():
    """R27: a hundred pings in one receive are answered by one send."""
    with scene_of("server-accepted", kind="memory", faulty=True) as scene:
        settle()
        calls = scene.transport.calls["send"]
        scene.peer.send(b"".join(bytes.fromhex(f"00 02 0001 00000000 {number:08x}") for number in range(20)))
        for number in range(20):
            scene.peer.expect(2, 2, 0, number)
        assert scene.transport.calls["send"] == calls + 1


LEAVING = """
import sys
from gevent import socket
import geyamux
session = geyamux.Client(socket.socket(fileno=int(sys.argv[1])))
stream = session.open()
stream.sendall(b"last words")
"""


def test_what_was_written_last_leaves_when_the_interpreter_exits():
    """R27: nobody switched to the hub after the write, and nobody closed."""
    near, far = gsocket.socketpair()
    with near, RawPeer(far) as peer:
        process = subprocess.Popen([sys.executable, "-c", LEAVING, str(near.fileno())], pass_fds=[near.fileno()])
        near.close()
        peer.expect(1, 1, 1, 0)
        peer.expect_data(1, b"last words")
        peer.expect_eof()
        assert process.wait(timeout=LATE) == 0


def test_bulk_writers_take_turns_a_frame_each(scene):
    """R27: one that came first does not finish first."""
    others = [scene.session.open() for _ in range(3)]
    for other in others:
        found = scene.peer.next()
        assert (found.flags, found.stream_id) == (1, other.stream_id)
    writers = [start(stream.sendall, bytes(WINDOW)) for stream in (scene.stream, *others)]
    order = []
    left = 4 * WINDOW
    while left:
        found = scene.peer.next()
        assert found.type == 0
        order.append(found.stream_id)
        left -= found.length
    gevent.joinall(writers, timeout=LATE, raise_error=True)
    # What the connection took before there was a second writer does not count.
    first = next(index for index, ids in enumerate(itertools.pairwise(order)) if ids[0] != ids[1])
    turns = order[first:]
    for index in range(0, len(turns) - 8, 4):
        seen = turns[index : index + 8]
        assert all(seen.count(stream_id) <= 4 for stream_id in set(seen)), order


def test_a_bulk_stream_with_all_the_credit_it_wants_does_not_starve_another(ends_of_a_small_socket):
    """R27: an open and a small write get their turn within a few frames, which are a mebibyte each here."""
    scene = ends_of_a_small_socket
    scene.send("00 01 0000 ID 00400000")
    settle()
    bulk = start(scene.stream.sendall, bytes(8 << 20))
    small = start(lambda: scene.session.open().sendall(b"small"))
    before = 0
    while (found := scene.peer.next()).body != b"small":
        if found.type == 0:
            before += found.length
            scene.send(f"00 01 0000 ID {found.length:08x}")
    # What had begun when it came, and a turn of the other before the SYN and before the data.
    assert before <= 3 << 20
    assert small.get(timeout=LATE) is None
    bulk.kill()


def test_a_send_that_may_not_wait_takes_no_more_than_there_is_room():
    """R13: after settimeout(0) large payloads are copied, too; the outbox keeps to its limit all the same."""
    with facing(config=Config(outbox_limit=4096), ends=narrow_pair()) as (session, _):
        stream = session.open()
        stream.setblocking(False)
        sent = 0
        with pytest.raises(BlockingIOError):
            while True:
                taken = stream.send(bytes(100_000))
                assert 0 < taken <= 4096
                sent += taken
        assert sent
        assert session.stats().queued <= 4096 + 12


def test_what_becomes_of_one_stream_wakes_no_writer_of_another(monkeypatch):
    """R28: a peer that fetches nothing and resets one stream after another must not make all writers look each time."""
    with facing(config=Config(outbox_limit=4096), ends=narrow_pair()) as (session, peer):
        streams = [session.open() for _ in range(50)]
        writers = [start(stream.sendall, bytes(4096)) for stream in streams]
        assert not writers[-1].ready() and not writers[-2].ready()
        woken = []
        wake = Lane.wake
        monkeypatch.setattr(Lane, "wake", lambda self, waiter: (woken.append(waiter), wake(self, waiter)))
        peer.send(bytes.fromhex(f"00 01 0008 {streams[-1].stream_id:08x} 00000000"))
        settle()
        assert isinstance(writers[-1].get(timeout=LATE), StreamReset)
        assert not writers[-2].ready()
        # Its own writer, and the next in line for room, to whom it may have left its turn.
        assert 1 <= len(set(woken)) <= 2
