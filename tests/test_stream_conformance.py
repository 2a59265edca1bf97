"""The contract of a connected socket, held against a real gevent socketpair and against streams alike.

Each test gets two connected ends, `a` and `b`, and does not know what they are. What only streams
promise is at the end.

Longer than other modules because all tests of one subject stand together, each short and by itself.
"""

from __future__ import annotations

import array
import errno
import functools
import io
import socket
from collections.abc import Iterator
from typing import Any

import gevent
import pytest
from gevent import socket as gsocket

from support.links import stream_pair
from support.rawpeer import settle

SOON = 0.02
"""A timeout that a test waits for."""

LATE = 20.0
"""A timeout that no passing test waits for."""

STREAMS = [
    f"{kind}-{opener}-{view}"
    for kind in ("socketpair", "tcp")
    for opener in ("client", "server")
    for view in ("opened", "accepted")
]


@pytest.fixture
def ends(request: pytest.FixtureRequest) -> Iterator[tuple[Any, Any]]:
    """Two connected ends: sockets, or streams in one of their arrangements."""
    if request.param == "sockets":
        a, b = gsocket.socketpair()
        yield a, b
        a.close()
        b.close()
        return
    kind, opener, view = request.param.split("-")
    with stream_pair(kind, swap=opener == "server") as (opened, accepted):
        yield (opened, accepted) if view == "opened" else (accepted, opened)


on_sockets_and_streams = pytest.mark.parametrize("ends", ["sockets", *STREAMS], indirect=True)
on_streams = pytest.mark.parametrize("ends", STREAMS, indirect=True)


def start(function: Any, *args: Any) -> gevent.Greenlet:
    """Call it in a greenlet that returns the error, if there is one, so that nothing is printed."""

    def call() -> Any:
        try:
            return function(*args)
        except Exception as error:
            return error

    greenlet = gevent.spawn(call)
    settle()
    return greenlet


def receive(end: Any, count: int) -> bytes:
    """Exactly so many bytes, by as many calls as it takes."""
    chunks = []
    while count:
        chunk = end.recv(min(count, 65536))
        assert chunk, f"the end, {count} bytes early"
        chunks.append(chunk)
        count -= len(chunk)
    return b"".join(chunks)


def receive_all(end: Any) -> bytes:
    chunks = []
    while chunk := end.recv(65536):
        chunks.append(chunk)
    return b"".join(chunks)


@functools.cache
def pattern(size: int, step: int = 7) -> bytes:
    """Bytes in which a lost, repeated or moved piece shows: no two aligned blocks of 4 are alike."""
    return b"".join((step * number & 0xFFFFFFFF).to_bytes(4, "big") for number in range(size // 4))


# --- receiving ---


@on_sockets_and_streams
def test_recv_gives_what_is_there_and_does_not_wait_for_more(ends):
    a, b = ends
    a.sendall(b"abc")
    assert b.recv(100) == b"abc"


@on_sockets_and_streams
def test_recv_gives_no_more_than_asked_for_and_keeps_the_rest(ends):
    a, b = ends
    a.sendall(b"abcdef")
    assert [b.recv(1), b.recv(2), b.recv(3)] == [b"a", b"bc", b"def"]


@on_sockets_and_streams
def test_recv_waits_until_bytes_come(ends):
    a, b = ends
    waiting = start(b.recv, 10)
    assert not waiting.ready()
    a.sendall(b"x")
    assert waiting.get(timeout=LATE) == b"x"


@on_sockets_and_streams
def test_recv_into_fills_from_the_start_and_returns_the_count(ends):
    a, b = ends
    a.sendall(b"abc")
    buffer = bytearray(b"......")
    assert b.recv_into(buffer) == 3
    assert buffer == b"abc..."


@on_sockets_and_streams
def test_recv_into_takes_no_more_than_nbytes(ends):
    a, b = ends
    a.sendall(b"abcdef")
    buffer = bytearray(6)
    assert b.recv_into(buffer, 2) == 2
    assert buffer == b"ab\0\0\0\0"
    assert b.recv(10) == b"cdef"


@on_sockets_and_streams
def test_recv_into_an_array_counts_bytes(ends):
    a, b = ends
    a.sendall(array.array("i", [1, 2, 3]).tobytes())
    numbers = array.array("i", [0, 0, 0, 0])
    assert b.recv_into(numbers) == 12
    assert numbers.tolist() == [1, 2, 3, 0]


@on_sockets_and_streams
def test_recv_into_a_slice_leaves_the_rest_alone(ends):
    a, b = ends
    a.sendall(b"xy")
    buffer = bytearray(b"......")
    assert b.recv_into(memoryview(buffer)[2:4]) == 2
    assert buffer == b"..xy.."


@on_sockets_and_streams
@pytest.mark.parametrize(
    ("buffer", "nbytes", "error"),
    [(bytearray(3), 4, ValueError), (bytearray(3), -1, ValueError), (b"fixed", 0, (TypeError, BufferError))],
    ids=["too many", "negative", "read-only"],
)
def test_recv_into_refuses_what_it_cannot_fill(ends, buffer, nbytes, error):
    a, b = ends
    a.sendall(b"abcdef")
    with pytest.raises(error):
        b.recv_into(buffer, nbytes)
    assert b.recv(10) == b"abcdef"


@on_sockets_and_streams
def test_a_negative_size_is_a_value_error(ends):
    with pytest.raises(ValueError, match="negative"):
        ends[0].recv(-1)


@on_sockets_and_streams
def test_peeking_leaves_the_bytes_in_place(ends):
    a, b = ends
    a.sendall(b"abcdef")
    assert b.recv(3, socket.MSG_PEEK) == b"abc"
    assert b.recv(10, socket.MSG_PEEK) == b"abcdef"
    buffer = bytearray(2)
    assert b.recv_into(buffer, 0, socket.MSG_PEEK) == 2
    assert buffer == b"ab"
    assert b.recv(10) == b"abcdef"


@on_sockets_and_streams
def test_peeking_waits_for_the_first_byte(ends):
    a, b = ends
    waiting = start(b.recv, 10, socket.MSG_PEEK)
    assert not waiting.ready()
    a.sendall(b"abc")
    assert waiting.get(timeout=LATE) == b"abc"
    assert b.recv(10) == b"abc"


@on_sockets_and_streams
def test_peeking_sees_the_end(ends):
    a, b = ends
    a.shutdown(socket.SHUT_WR)
    assert b.recv(10, socket.MSG_PEEK) == b""
    assert b.recv(10) == b""


# --- sending ---


@on_sockets_and_streams
@pytest.mark.parametrize(
    "data",
    [b"abcdef", bytearray(b"abcdef"), memoryview(b"..abcdef")[2:], array.array("B", b"abcdef")],
    ids=["bytes", "bytearray", "memoryview", "array"],
)
@pytest.mark.parametrize("method", ["send", "sendall"])
def test_anything_with_a_contiguous_buffer_can_be_sent(ends, data, method):
    a, b = ends
    assert getattr(a, method)(data) == (6 if method == "send" else None)
    assert receive(b, 6) == b"abcdef"


@on_sockets_and_streams
def test_wide_items_are_counted_in_bytes(ends):
    a, b = ends
    numbers = array.array("i", [1, 2, 3])
    assert a.send(numbers) == 12
    a.sendall(numbers)
    assert receive(b, 24) == numbers.tobytes() * 2


@on_sockets_and_streams
@pytest.mark.parametrize("method", ["send", "sendall"])
def test_a_buffer_with_gaps_is_refused(ends, method):
    a, b = ends
    with pytest.raises(BufferError):
        getattr(a, method)(memoryview(b"abcdef")[::2])
    a.sendall(b"after")
    assert b.recv(10) == b"after"


@on_sockets_and_streams
@pytest.mark.parametrize("method", ["send", "sendall"])
@pytest.mark.parametrize("data", ["text", None, 5], ids=repr)
def test_what_has_no_buffer_is_a_type_error(ends, method, data):
    with pytest.raises(TypeError):
        getattr(ends[0], method)(data)


@on_sockets_and_streams
@pytest.mark.parametrize("method", ["send", "sendall"])
def test_a_buffer_may_be_changed_and_resized_once_it_is_sent(ends, method):
    a, b = ends
    data = bytearray(b"first!")
    getattr(a, method)(data)
    data[:] = b"second and longer"
    assert receive(b, 6) == b"first!"


@on_sockets_and_streams
def test_send_takes_a_part_when_not_all_fits(ends):
    a, b = ends
    data = pattern(8 << 20)
    a.settimeout(LATE)
    taken = a.send(data)
    assert 0 < taken < len(data)
    assert receive(b, taken) == data[:taken]


@on_sockets_and_streams
def test_sendall_waits_until_the_reader_has_made_room(ends):
    a, b = ends
    data = pattern(4 << 20)
    sending = start(a.sendall, data)
    assert not sending.ready()
    assert receive(b, len(data)) == data
    assert sending.get(timeout=LATE) is None


# --- nothing at all ---


@on_sockets_and_streams
def test_nothing_can_be_sent_and_received_at_any_time(ends):
    a, b = ends
    assert a.recv(0) == b""
    assert a.recv_into(bytearray(0)) == 0
    assert a.send(b"") == 0
    a.sendall(b"")
    a.sendall(b"x")
    assert b.recv(0) == b""
    assert b.recv(1) == b"x"


# --- shutdown ---


@on_sockets_and_streams
def test_after_shutdown_for_writing_the_peer_reads_all_then_the_end_for_good(ends):
    a, b = ends
    a.sendall(b"last words")
    a.shutdown(socket.SHUT_WR)
    assert receive_all(b) == b"last words"
    assert [b.recv(1), b.recv(1), b.recv_into(bytearray(1))] == [b"", b"", 0]


@on_sockets_and_streams
def test_after_shutdown_for_writing_a_write_is_a_broken_pipe(ends):
    a, _ = ends
    a.shutdown(socket.SHUT_WR)
    for method in (a.send, a.sendall):
        with pytest.raises(BrokenPipeError) as caught:
            method(b"x")
        assert caught.value.args[0] == caught.value.errno == errno.EPIPE


@on_sockets_and_streams
def test_after_shutdown_for_writing_the_other_direction_goes_on(ends):
    a, b = ends
    a.shutdown(socket.SHUT_WR)
    data = pattern(1 << 20)
    sending = start(b.sendall, data)
    assert receive(a, len(data)) == data
    assert sending.get(timeout=LATE) is None
    b.shutdown(socket.SHUT_WR)
    assert a.recv(1) == b""


@on_sockets_and_streams
def test_shutdown_for_writing_may_be_repeated(ends):
    a, b = ends
    a.shutdown(socket.SHUT_WR)
    a.shutdown(socket.SHUT_WR)
    assert b.recv(1) == b""


@on_sockets_and_streams
def test_shutdown_wakes_the_peer_that_reads(ends):
    a, b = ends
    waiting = start(b.recv, 10)
    a.shutdown(socket.SHUT_WR)
    assert waiting.get(timeout=LATE) == b""


@on_sockets_and_streams
def test_after_shutdown_for_reading_there_is_nothing_to_read(ends):
    a, _ = ends
    a.shutdown(socket.SHUT_RD)
    assert a.recv(10) == b""


@on_sockets_and_streams
def test_after_shutdown_for_reading_writing_goes_on(ends):
    a, b = ends
    a.shutdown(socket.SHUT_RD)
    a.sendall(b"still here")
    assert b.recv(100) == b"still here"


@on_sockets_and_streams
def test_shutdown_of_both_directions_ends_both(ends):
    a, b = ends
    a.shutdown(socket.SHUT_RDWR)
    assert a.recv(1) == b""
    assert b.recv(1) == b""
    with pytest.raises(BrokenPipeError):
        a.sendall(b"x")


@on_sockets_and_streams
def test_there_is_no_other_direction_to_shut_down(ends):
    a, b = ends
    with pytest.raises((OSError, ValueError)):
        a.shutdown(77)
    a.sendall(b"unharmed")
    assert b.recv(10) == b"unharmed"


# --- close ---


@on_sockets_and_streams
def test_close_sends_what_was_written_before_it(ends):
    a, b = ends
    a.sendall(b"last words")
    a.close()
    assert receive_all(b) == b"last words"


@on_sockets_and_streams
def test_close_may_be_repeated(ends):
    a, _ = ends
    a.close()
    a.close()


@on_sockets_and_streams
def test_close_wakes_the_peer_that_reads(ends):
    a, b = ends
    waiting = start(b.recv, 10)
    a.close()
    assert waiting.get(timeout=LATE) == b""


@on_sockets_and_streams
def test_close_wakes_a_reader_of_the_same_end(ends):
    a, _ = ends
    waiting = start(a.recv, 10)
    assert not waiting.ready()
    a.close()
    assert waiting.get(timeout=LATE).errno == errno.EBADF


@on_sockets_and_streams
def test_the_end_of_a_with_block_closes(ends):
    a, b = ends
    with a as entered:
        assert entered is a
        a.sendall(b"x")
    assert receive_all(b) == b"x"
    with pytest.raises(OSError) as caught:
        a.recv(1)
    assert caught.value.errno == errno.EBADF


@on_sockets_and_streams
@pytest.mark.parametrize(
    "use",
    [
        lambda end: end.recv(1),
        lambda end: end.recv(0),
        lambda end: end.recv(1, socket.MSG_PEEK),
        lambda end: end.recv_into(bytearray(1)),
        lambda end: end.send(b"x"),
        lambda end: end.send(b""),
        lambda end: end.sendall(b"x"),
        lambda end: end.shutdown(socket.SHUT_WR),
    ],
    ids=["recv", "recv of nothing", "peek", "recv_into", "send", "send of nothing", "sendall", "shutdown"],
)
def test_a_closed_end_is_a_bad_descriptor(ends, use):
    a, _ = ends
    a.close()
    with pytest.raises(OSError) as caught:
        use(a)
    assert caught.value.args[0] == caught.value.errno == errno.EBADF


@on_sockets_and_streams
def test_writing_to_a_peer_that_has_closed_fails_before_long(ends):
    a, b = ends
    b.close()
    with pytest.raises(OSError) as caught:
        for _ in range(64):
            a.sendall(bytes(65536))
    assert caught.value.args[0] in (errno.EPIPE, errno.ECONNRESET)


@on_sockets_and_streams
def test_timeouts_can_be_set_and_asked_for_after_close(ends):
    a, _ = ends
    a.close()
    a.settimeout(1)
    assert a.gettimeout() == 1.0


# --- timeouts ---


@on_sockets_and_streams
def test_a_new_end_waits_for_ever(ends):
    a, _ = ends
    assert a.gettimeout() is None
    assert a.timeout is None
    assert a.getblocking() is True


@on_sockets_and_streams
@pytest.mark.parametrize(("timeout", "blocking"), [(None, True), (5, True), (0.5, True), (0, False), (0.0, False)])
def test_a_timeout_is_kept_and_says_whether_calls_block(ends, timeout, blocking):
    a, _ = ends
    a.settimeout(timeout)
    assert a.gettimeout() == a.timeout == timeout
    assert a.getblocking() is blocking


@on_sockets_and_streams
def test_setblocking_is_a_timeout_of_none_or_zero(ends):
    a, _ = ends
    a.setblocking(False)
    assert a.gettimeout() == 0.0
    a.setblocking(True)
    assert a.gettimeout() is None


@on_sockets_and_streams
def test_a_timeout_is_not_negative_and_a_number(ends):
    a, _ = ends
    a.settimeout(3)
    with pytest.raises(ValueError, match="out of range"):
        a.settimeout(-1)
    with pytest.raises(TypeError):
        a.settimeout("soon")
    assert a.gettimeout() == 3


@on_sockets_and_streams
@pytest.mark.parametrize(
    "receive",
    [
        lambda end: end.recv(1),
        lambda end: end.recv_into(bytearray(1)),
        lambda end: end.recv(1, socket.MSG_PEEK),
    ],
    ids=["recv", "recv_into", "peek"],
)
def test_a_read_that_takes_too_long_times_out_and_harms_nothing(ends, receive):
    a, b = ends
    b.settimeout(SOON)
    with pytest.raises(TimeoutError) as caught:
        receive(b)
    assert type(caught.value) is TimeoutError
    assert caught.value.args == ("timed out",)
    a.sendall(b"late")
    b.settimeout(LATE)
    assert b.recv(10) == b"late"


@on_sockets_and_streams
def test_a_timeout_does_not_strike_when_the_bytes_are_there(ends):
    a, b = ends
    a.sendall(b"abc")
    settle()
    b.settimeout(1e-9)
    assert b.recv(10) == b"abc"


@on_sockets_and_streams
def test_a_timeout_as_good_as_past_strikes_at_once(ends):
    b = ends[1]
    b.settimeout(1e-9)
    with gevent.Timeout(LATE), pytest.raises(TimeoutError):
        b.recv(10)


@on_sockets_and_streams
def test_a_timeout_to_come_does_not_disturb_what_is_in_time(ends):
    a, b = ends
    b.settimeout(LATE)
    waiting = start(b.recv, 10)
    a.sendall(b"abc")
    assert waiting.get(timeout=LATE) == b"abc"


@on_sockets_and_streams
def test_sendall_to_a_peer_that_does_not_read_times_out(ends):
    a, b = ends
    data = pattern(8 << 20)
    a.settimeout(SOON)
    with pytest.raises(TimeoutError) as caught:
        a.sendall(data)
    assert caught.value.args == ("timed out",)
    # The other direction is as it was.
    b.sendall(b"unharmed")
    a.settimeout(LATE)
    assert a.recv(10) == b"unharmed"


@on_sockets_and_streams
def test_without_blocking_a_read_of_nothing_would_block(ends):
    a, b = ends
    b.settimeout(0)
    for read in (lambda: b.recv(1), lambda: b.recv_into(bytearray(1)), lambda: b.recv(1, socket.MSG_PEEK)):
        with pytest.raises(BlockingIOError) as caught:
            read()
        assert caught.value.args[0] == caught.value.errno == errno.EAGAIN
    a.sendall(b"abc")
    settle()
    assert b.recv(10) == b"abc"
    a.shutdown(socket.SHUT_WR)
    settle()
    assert b.recv(10) == b""


@on_sockets_and_streams
def test_without_blocking_just_what_was_taken_arrives(ends):
    a, b = ends
    data = pattern(8 << 20)
    a.settimeout(0)
    taken = 0
    with pytest.raises(BlockingIOError) as caught:
        while True:
            taken += a.send(data[taken : taken + 100_000])
    assert caught.value.args[0] == errno.EAGAIN
    assert taken > 0
    a.shutdown(socket.SHUT_WR)
    assert receive_all(b) == data[:taken]


# --- greenlets ---


@on_sockets_and_streams
def test_a_killed_reader_takes_nothing_with_it(ends):
    a, b = ends
    waiting = start(b.recv, 10)
    waiting.kill()
    a.sendall(b"abc")
    assert b.recv(10) == b"abc"


@on_sockets_and_streams
def test_a_foreign_timeout_passes_through_a_read_and_harms_nothing(ends):
    a, b = ends
    with pytest.raises(gevent.Timeout) as caught, gevent.Timeout(SOON) as timeout:
        b.recv(10)
    assert caught.value is timeout
    a.sendall(b"abc")
    assert b.recv(10) == b"abc"


@on_sockets_and_streams
def test_one_greenlet_may_write_while_another_reads(ends):
    a, b = ends
    reading = start(a.recv, 10)
    a.sendall(b"question")
    assert b.recv(10) == b"question"
    b.sendall(b"answer")
    assert reading.get(timeout=LATE) == b"answer"


@on_sockets_and_streams
def test_much_may_go_both_ways_at_once(ends):
    a, b = ends
    there, back = pattern(3 << 20, step=7), pattern(3 << 20, step=11)
    receiving = [start(receive_all, b), start(receive_all, a)]
    sending = [start(a.sendall, there), start(b.sendall, back)]
    gevent.joinall(sending, timeout=LATE)
    a.shutdown(socket.SHUT_WR)
    b.shutdown(socket.SHUT_WR)
    got_there, got_back = (greenlet.get(timeout=LATE) for greenlet in receiving)
    assert got_there == there
    assert got_back == back


@on_sockets_and_streams
def test_much_in_small_and_odd_pieces_arrives_whole(ends):
    a, b = ends
    data = pattern(400_000)
    sizes = [1, 2, 3, 5, 8, 13, 1000, 4096, 4097, 70_000]

    def send_pieces():
        start = turn = 0
        while start < len(data):
            size = sizes[turn % len(sizes)]
            a.sendall(data[start : start + size])
            start, turn = start + size, turn + 1
        a.shutdown(socket.SHUT_WR)

    sending = start(send_pieces)
    got = bytearray()
    while chunk := b.recv(sizes[len(got) % len(sizes)]):
        got += chunk
    assert bytes(got) == data
    assert sending.get(timeout=LATE) is None


# --- makefile ---


@on_sockets_and_streams
def test_a_file_reads_lines_and_then_the_rest(ends):
    a, b = ends
    a.sendall(b"one\ntwo\nthree")
    a.shutdown(socket.SHUT_WR)
    with b.makefile("rb") as file:
        assert file.readline() == b"one\n"
        assert file.read(2) == b"tw"
        assert list(file) == [b"o\n", b"three"]
        assert file.read(10) == b""


@on_sockets_and_streams
def test_a_file_waits_for_all_that_read_asks_for(ends):
    a, b = ends
    with b.makefile("rb") as file:
        a.sendall(b"abc")
        reading = start(file.read, 6)
        assert not reading.ready()
        a.sendall(b"def")
        assert reading.get(timeout=LATE) == b"abcdef"


@on_sockets_and_streams
def test_a_written_file_sends_at_flush_and_at_close(ends):
    a, b = ends
    file = a.makefile("wb")
    file.write(b"abc")
    file.flush()
    assert b.recv(10) == b"abc"
    file.write(b"def")
    file.close()
    assert b.recv(10) == b"def"
    with pytest.raises(ValueError, match="closed"):
        file.write(b"x")


@on_sockets_and_streams
def test_a_file_for_both_reads_and_writes(ends):
    a, b = ends
    with a.makefile("rwb") as here, b.makefile("rwb") as there:
        here.write(b"ping\n")
        here.flush()
        assert there.readline() == b"ping\n"
        there.write(b"pong\n")
        there.flush()
        assert here.readline() == b"pong\n"


@on_sockets_and_streams
def test_a_text_file_has_an_encoding_and_newlines(ends):
    a, b = ends
    with a.makefile("w", encoding="utf-16-le", newline="\r\n") as file:
        file.write("grün\nblau\n")
    a.shutdown(socket.SHUT_WR)
    with b.makefile("r", encoding="utf-16-le", newline="") as file:
        assert file.read() == "grün\r\nblau\r\n"


@on_sockets_and_streams
def test_a_text_file_passes_errors_on_to_its_decoder(ends):
    a, b = ends
    a.sendall(b"gr\xfcn\n")
    with b.makefile("r", encoding="ascii", errors="replace") as file:
        assert file.readline() == "gr\ufffdn\n"


@on_sockets_and_streams
def test_a_file_without_a_buffer_is_a_raw_one_of_this_end(ends):
    a, b = ends
    with b.makefile("rb", buffering=0) as file:
        assert isinstance(file, socket.SocketIO)
        assert file._sock is b
        a.sendall(b"abc")
        assert file.read(100) == b"abc"


@on_sockets_and_streams
def test_files_are_of_the_kinds_that_open_makes(ends):
    a, _ = ends
    kinds = {
        "rb": io.BufferedReader,
        "wb": io.BufferedWriter,
        "rwb": io.BufferedRWPair,
        "r": io.TextIOWrapper,
        "w": io.TextIOWrapper,
    }
    for mode, kind in kinds.items():
        with a.makefile(mode) as file:
            assert type(file) is kind


@on_sockets_and_streams
@pytest.mark.parametrize(("mode", "buffering"), [("q", None), ("a", None), ("r", 0)])
def test_a_file_of_no_known_kind_is_a_value_error(ends, mode, buffering):
    a, b = ends
    with pytest.raises(ValueError, match=r"mode|binary"):
        a.makefile(mode, buffering)
    # What failed holds nothing open.
    a.close()
    assert b.recv(1) == b""


@on_sockets_and_streams
def test_an_end_stays_open_until_its_last_file_is_closed(ends):
    a, b = ends
    reader, writer = a.makefile("rb"), a.makefile("wb")
    a.close()
    b.sendall(b"question\n")
    assert reader.readline() == b"question\n"
    reader.close()
    writer.write(b"answer\n")
    writer.flush()
    assert b.recv(100) == b"answer\n"
    waiting = start(b.recv, 10)
    assert not waiting.ready()
    writer.close()
    assert waiting.get(timeout=LATE) == b""


@on_sockets_and_streams
def test_closing_its_files_does_not_close_an_end(ends):
    a, b = ends
    with a.makefile("rb"), a.makefile("wb"):
        pass
    a.sendall(b"still here")
    assert b.recv(100) == b"still here"


# --- what only streams promise ---


@on_streams
def test_several_readers_get_distinct_bytes_in_the_order_in_which_they_came(ends):
    a, b = ends
    readers = [start(b.recv, 2) for _ in range(3)]
    a.sendall(b"aabbcc")
    assert [reader.get(timeout=LATE) for reader in readers] == [b"aa", b"bb", b"cc"]


@on_streams
def test_several_readers_lose_and_repeat_nothing(ends):
    a, b = ends
    data = pattern(1 << 20)
    pieces: list[bytes] = []

    def read():
        while piece := b.read(64):
            pieces.append(piece)

    readers = [start(read) for _ in range(5)]
    a.sendall(data)
    a.shutdown(socket.SHUT_WR)
    gevent.joinall(readers, timeout=LATE)
    expected = [data[at : at + 64] for at in range(0, len(data), 64)]
    assert sorted(pieces) == sorted(expected)


@on_streams
def test_each_of_several_writers_stays_in_one_piece(ends):
    a, b = ends
    size = 600_000
    writers = [start(a.sendall, bytes([letter]) * size) for letter in b"abcd"]
    got = receive(b, 4 * size)
    assert [writer.get(timeout=LATE) for writer in writers] == [None] * 4
    assert sorted(got[at : at + size] for at in range(0, len(got), size)) == [
        bytes([letter]) * size for letter in b"abcd"
    ]


@on_streams
def test_a_read_that_times_out_in_the_middle_keeps_its_bytes(ends):
    a, b = ends
    a.sendall(b"abc")
    b.settimeout(SOON)
    with pytest.raises(TimeoutError):
        b.read(6)
    a.sendall(b"def")
    assert b.read(6) == b"abcdef"


@on_streams
def test_sendall_that_times_out_tells_how_much_was_taken(ends):
    a, b = ends
    data = pattern(2 << 20)
    a.settimeout(SOON)
    with pytest.raises(TimeoutError) as caught:
        a.sendall(data)
    taken = caught.value.bytes_sent
    assert 0 < taken < len(data)
    a.shutdown(socket.SHUT_WR)
    assert receive_all(b) == data[:taken]


@on_streams
def test_the_two_faces_share_one_buffer(ends):
    a, b = ends
    a.sendall(b"line\nrest")
    assert b.readline() == b"line\n"
    assert b.recv(2) == b"re"
    assert b.peek() == b"st"
    assert b.read1(10) == b"st"
