"""A stream as a file and as a socket: every method, attribute and error that code written for those may meet.

The file face is held against `io.BytesIO` wherever the two can be compared. What a connected socket and a stream
have in common is in `test_stream_conformance.py`.

====  ====================================================================================
R8    the contract of `io.BufferedIOBase` for reading
R13   ... and for writing; what may be sent
R19   files made of a stream; what raises what after close
12.3  every error's class, `errno` and first argument
====  ====================================================================================

Longer than other modules because all tests of one subject stand together, each short and by itself.
"""

from __future__ import annotations

import array
import copy
import ctypes
import errno
import io
import mmap
import pickle
import socket
from collections.abc import Callable, Iterator
from typing import Any

import gevent
import gevent.hub
import pytest
from gevent.exceptions import BlockingSwitchOutError
from hypothesis import given, settings
from hypothesis import strategies as st

import geyamux
from geyamux import Config, SessionClosed, SessionError, StreamClosed, StreamError, StreamReset, YamuxError
from support import scenes
from support.facing import start
from support.links import KINDS, sessions, stream_pair
from support.rawpeer import settle
from support.scenes import Scene, scene_of

SOON = 0.02
"""A time limit that a test waits for."""
LATE = 10.0
"""A time limit that no passing test waits for."""


@pytest.fixture(params=["client-opened", "server-accepted"])
def scene(request: pytest.FixtureRequest) -> Iterator[Scene]:
    """A stream whose peer the test plays."""
    with scene_of(request.param) as found:
        yield found


@pytest.fixture(params=[f"{kind}-{side}" for kind in KINDS for side in ("opened", "accepted")])
def ends(request: pytest.FixtureRequest) -> Iterator[tuple[Any, Any]]:
    """Two connected streams over every kind of link, in both directions."""
    kind, side = request.param.split("-")
    with stream_pair(kind) as (opened, accepted):
        yield (opened, accepted) if side == "opened" else (accepted, opened)


def kind_of(value: object) -> str:
    """A name for a parameter whose repr has an address: a test is called the same in every process."""
    return type(value).__name__


def holding(scene: Scene, body: bytes, *, ended: bool = True) -> Any:
    """The stream, with these bytes in its buffer."""
    for begin in range(0, len(body), 7000):
        scene.data(body[begin : begin + 7000])
    if ended:
        scene.send("00 01 0004 ID 00000000")
    while scene.stream.stats().unread < len(body):
        gevent.sleep(0.001)
    settle()
    return scene.stream


# --- the file face: reading ---


def test_a_stream_is_a_buffered_binary_file(scene):
    """R8: for every test of types that readers and writers make."""
    stream = scene.stream
    assert isinstance(stream, io.BufferedIOBase)
    assert isinstance(stream, io.IOBase)
    assert not isinstance(stream, (io.RawIOBase, io.TextIOBase))
    assert (stream.readable(), stream.writable(), stream.seekable(), stream.isatty()) == (True, True, False, False)
    assert stream.closed is False


TEXT = b"one\n\ntwo three\r\nfour\rstill four\n" + b"x" * 20_000 + b"\nno newline at the end"

READS: list[tuple[str, Callable[[Any], Any]]] = [
    ("read()", lambda f: f.read()),
    ("read(-1)", lambda f: f.read(-1)),
    ("read(-7)", lambda f: f.read(-7)),
    ("read(None)", lambda f: f.read(None)),
    ("read(0)", lambda f: f.read(0)),
    ("read(1)", lambda f: f.read(1)),
    ("read(9)", lambda f: f.read(9)),
    ("read(100000)", lambda f: f.read(100_000)),
    ("read1(0)", lambda f: f.read1(0)),
    ("read1(1)", lambda f: f.read1(1)),
    ("readinto", lambda f: _into(f.readinto, bytearray(11))),
    ("readinto of nothing", lambda f: _into(f.readinto, bytearray())),
    ("readinto an array", lambda f: _into(f.readinto, array.array("H", bytes(12)))),
    ("readinto a slice", lambda f: _into(f.readinto, memoryview(bytearray(20))[3:9])),
    ("readinto more", lambda f: _into(f.readinto, bytearray(100_000))),
    ("readline()", lambda f: f.readline()),
    ("readline(-1)", lambda f: f.readline(-1)),
    ("readline(None)", lambda f: f.readline(None)),
    ("readline(0)", lambda f: f.readline(0)),
    ("readline(2)", lambda f: f.readline(2)),
    ("readline(30000)", lambda f: f.readline(30_000)),
    ("readlines()", lambda f: f.readlines()),
    ("readlines(-1)", lambda f: f.readlines(-1)),
    ("readlines(0)", lambda f: f.readlines(0)),
    ("readlines(None)", lambda f: f.readlines(None)),
    ("readlines(5)", lambda f: f.readlines(5)),
    ("readlines(4)", lambda f: f.readlines(4)),
    ("next", lambda f: next(f, "the end")),
    ("a loop", lambda f: list(f)),
    ("closed", lambda f: f.closed),
]


def _into(read: Callable[[Any], int], buffer: Any) -> tuple[int, bytes]:
    count = read(buffer)
    return count, bytes(buffer)


@pytest.mark.parametrize(("read", "after"), [(read, after) for read in READS for after in (0, 1, 4, 9)])
def test_each_read_gives_what_a_file_gives(read, after):
    """R8: from any place, and what is left is the same, too."""
    with scene_of("server-accepted") as scene:
        stream, file = holding(scene, TEXT), io.BytesIO(TEXT)
        assert stream.read(after) == file.read(after)
        assert read[1](stream) == read[1](file)
        assert stream.read() == file.read()
        assert read[1](stream) == read[1](file)


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.sampled_from([b"a", b"\n", b"bc\nd", b"e" * 300, b"", b"\r\n"]), max_size=30),
    st.lists(st.sampled_from(READS), max_size=12),
)
def test_any_sequence_of_reads_gives_what_a_file_gives(pieces, reads):
    """R8: whatever frames the bytes came in."""
    body = b"".join(pieces)
    with scene_of("server-accepted", kind="memory") as scene:
        for piece in pieces:
            scene.data(piece)
        scene.send("00 01 0004 ID 00000000")
        file = io.BytesIO(body)
        for name, read in reads:
            assert read(scene.stream) == read(file), name
        assert scene.stream.read() == file.read()


def test_read1_gives_what_is_there_and_does_not_wait_for_more(scene):
    """R8: all that is there without a size, at most so many with one."""
    stream = holding(scene, b"abcdef", ended=False)
    assert stream.read1(2) == b"ab"
    assert stream.read1(-1) == b"cdef"
    waiting = start(stream.read1)
    assert not waiting.ready()
    scene.data(b"ghi")
    assert waiting.get(timeout=LATE) == b"ghi"
    scene.send("00 01 0004 ID 00000000")
    assert (stream.read1(), stream.read1(5)) == (b"", b"")


def test_readinto1_fills_with_what_is_there(scene):
    """R8."""
    stream = holding(scene, b"abc", ended=False)
    buffer = bytearray(b"......")
    assert stream.readinto1(buffer) == 3
    assert buffer == b"abc..."
    assert stream.readinto1(bytearray()) == 0
    waiting = start(stream.readinto1, buffer)
    assert not waiting.ready()
    scene.data(b"xy")
    assert waiting.get(timeout=LATE) == 2
    assert buffer == b"xyc..."
    scene.send("00 01 0004 ID 00000000")
    assert stream.readinto1(buffer) == 0


def test_peek_shows_and_takes_nothing(scene):
    """R8: at least a byte, at most so many as asked for, none at the end only."""
    stream = holding(scene, b"abcdef", ended=False)
    for size in (0, -1, 1, 3, 100):
        seen = stream.peek(size)
        assert seen
        assert b"abcdef".startswith(seen)
        assert size <= 0 or len(seen) <= size
    assert stream.peek() == b"abcdef"
    assert stream.read(6) == b"abcdef"
    waiting = start(stream.peek, 10)
    assert not waiting.ready()
    scene.data(b"ghi")
    assert waiting.get(timeout=LATE) == b"ghi"
    assert stream.read1() == b"ghi"
    scene.send("00 01 0004 ID 00000000")
    assert (stream.peek(), stream.peek(5)) == (b"", b"")


@pytest.mark.parametrize("method", ["readinto", "readinto1", "recv_into"])
@pytest.mark.parametrize("buffer", [b"fixed", memoryview(b"fixed"), "text", None, 5, [1, 2]], ids=kind_of)
def test_a_buffer_that_cannot_be_filled_is_refused_before_a_byte_is_taken(scene, method, buffer):
    """R8."""
    stream = holding(scene, b"abc")
    with pytest.raises((TypeError, BufferError)):
        getattr(stream, method)(buffer)
    assert stream.read() == b"abc"


@pytest.mark.parametrize("method", ["readinto", "readinto1", "recv_into"])
def test_a_buffer_with_gaps_is_refused_before_a_byte_is_taken(scene, method):
    """R8."""
    stream = holding(scene, b"abc")
    with pytest.raises((BufferError, ValueError)):
        getattr(stream, method)(memoryview(bytearray(10))[::2])
    assert stream.read() == b"abc"


@pytest.mark.parametrize("method", ["readinto", "readinto1", "recv_into"])
@pytest.mark.parametrize(
    "make",
    [
        lambda: bytearray(4),
        lambda: memoryview(bytearray(4)),
        lambda: array.array("B", bytes(4)),
        lambda: array.array("I", [0]),
        lambda: memoryview(bytearray(4)).cast("B", (2, 2)),
        lambda: (ctypes.c_char * 4)(),
    ],
    ids=["bytearray", "memoryview", "array", "wide", "two dimensions", "ctypes"],
)
def test_any_writable_buffer_is_filled(scene, method, make):
    """R8: counted in bytes, and released on return."""
    stream = holding(scene, b"abcdef")
    buffer = make()
    assert getattr(stream, method)(buffer) == 4
    assert bytes(buffer) == b"abcd"
    assert stream.read() == b"ef"
    if isinstance(buffer, bytearray):
        buffer.append(1)


def test_readinto_a_map_of_memory(scene):
    """R8."""
    stream = holding(scene, b"abcdef")
    with mmap.mmap(-1, 6) as target:
        assert stream.readinto(target) == 6
        assert target[:] == b"abcdef"


def test_a_size_that_is_no_number_is_refused(scene):
    """R8."""
    stream = holding(scene, b"abc")
    for read in (stream.read, stream.readline, stream.recv, stream.read1, stream.peek):
        with pytest.raises(TypeError):
            read("3")
    assert stream.read() == b"abc"


def test_lines_come_one_by_one_as_they_arrive(scene):
    """R8: a loop does not wait for the next line before it gives the last."""
    lines = iter(scene.stream)
    assert iter(lines) is scene.stream
    waiting = start(next, lines)
    scene.data(b"on")
    settle()
    assert not waiting.ready()
    scene.data(b"e\ntw")
    assert waiting.get(timeout=LATE) == b"one\n"
    scene.data(b"o\n")
    assert next(lines) == b"two\n"
    scene.send("00 01 0004 ID 00000000")
    with pytest.raises(StopIteration):
        next(lines)


def test_text_and_binary_wrappers_fit(scene):
    """R8, R13: the standard library's own, around the stream itself."""
    stream = holding(scene, "grün\r\nblau\n".encode())
    text = io.TextIOWrapper(stream, encoding="utf-8", newline="")
    assert text.readline() == "grün\r\n"
    assert text.read() == "blau\n"
    text.write("weiß")
    text.flush()
    assert text.detach() is stream
    assert not stream.closed
    scene.expect_data("weiß".encode())
    pickle.dump({"a": [1, b"x" * 10_000]}, stream)
    stream.flush()
    assert pickle.loads(b"".join(found.body for found in scene.frames_there())) == {"a": [1, b"x" * 10_000]}


# --- the file face: writing ---


@pytest.mark.parametrize(
    "data", [b"", bytearray(), memoryview(b""), array.array("I"), memoryview(b"abc")[:0]], ids=kind_of
)
def test_writing_nothing_says_nothing_on_the_wire(scene, data):
    """R13: and returns at once, with credit or without."""
    for _ in range(2):
        assert scene.stream.write(data) == 0
        assert scene.stream.send(data) == 0
        assert scene.stream.sendall(data) is None
        assert scene.stream.flush() is None
        scene.expect_nothing()
        credit = scene.stream.stats().send_credit
        writing = start(scene.stream.sendall, bytes(credit))
        scene.expect_data(bytes(credit))
        writing.get(timeout=LATE)


def test_write_returns_the_size_in_bytes(scene):
    """R13: always all of it."""
    assert scene.stream.write(b"abc") == 3
    assert scene.stream.write(array.array("I", [1, 2])) == 8
    assert scene.stream.write(memoryview(b"abcdef").cast("B", (3, 2))) == 6
    scene.expect_data(b"abc" + array.array("I", [1, 2]).tobytes() + b"abcdef")


def test_writelines_writes_each_of_any_iterable(scene):
    """R13: with no newlines of its own."""
    scene.stream.writelines(part for part in (b"one\n", bytearray(b"two"), memoryview(b"three")))
    scene.stream.writelines([])
    scene.expect_data(b"one\ntwothree")
    scene.expect_nothing()


@pytest.mark.parametrize("data", ["text", None, 5, 1.5, [b"x"], object()], ids=lambda data: type(data).__name__)
@pytest.mark.parametrize("method", ["write", "send", "sendall"])
def test_what_has_no_buffer_cannot_be_written(scene, method, data):
    """R13: TypeError, and nothing goes."""
    with pytest.raises(TypeError):
        getattr(scene.stream, method)(data)
    scene.expect_nothing()


@pytest.mark.parametrize("method", ["write", "send", "sendall"])
def test_what_is_not_contiguous_cannot_be_written(scene, method):
    """R13: BufferError, and nothing goes."""
    with pytest.raises(BufferError):
        getattr(scene.stream, method)(memoryview(b"abcdef")[::2])
    with pytest.raises(TypeError):
        scene.stream.writelines([b"before", "text"])
    scene.expect_data(b"before")
    scene.expect_nothing()


def test_a_map_of_memory_can_be_written(scene):
    """R13: and closed afterwards, since no view of it is kept."""
    with mmap.mmap(-1, 10_000) as source:
        source[:3] = b"abc"
        assert scene.stream.write(source) == 10_000
    scene.expect_data(b"abc" + bytes(9997))


@pytest.mark.parametrize(
    "use",
    [
        lambda stream: stream.seek(0),
        lambda stream: stream.tell(),
        lambda stream: stream.truncate(),
        lambda stream: stream.truncate(5),
        lambda stream: stream.detach(),
        lambda stream: stream.fileno(),
    ],
    ids=["seek", "tell", "truncate", "truncate to", "detach", "fileno"],
)
def test_what_a_stream_cannot_do_is_an_unsupported_operation(scene, use):
    """R8: which is an OSError and a ValueError, as for every file; and it does no harm."""
    with pytest.raises(io.UnsupportedOperation) as caught:
        use(scene.stream)
    assert isinstance(caught.value, OSError)
    assert isinstance(caught.value, ValueError)
    scene.stream.sendall(b"x")
    scene.expect_data(b"x")


FILE_USES: dict[str, Callable[[Any], Any]] = {
    "read": lambda f: f.read(),
    "read of one": lambda f: f.read(1),
    "read of nothing": lambda f: f.read(0),
    "read1": lambda f: f.read1(),
    "read1 of nothing": lambda f: f.read1(0),
    "readinto": lambda f: f.readinto(bytearray(1)),
    "readinto of nothing": lambda f: f.readinto(bytearray()),
    "readinto1": lambda f: f.readinto1(bytearray(1)),
    "readinto1 of nothing": lambda f: f.readinto1(bytearray()),
    "readline": lambda f: f.readline(),
    "readline of nothing": lambda f: f.readline(0),
    "readlines": lambda f: f.readlines(),
    "peek": lambda f: f.peek(),
    "iter": lambda f: iter(f),
    "next": lambda f: next(f),
    "write": lambda f: f.write(b"x"),
    "write of nothing": lambda f: f.write(b""),
    "writelines": lambda f: f.writelines([b"x"]),
    "writelines of nothing": lambda f: f.writelines([]),
    "flush": lambda f: f.flush(),
    "readable": lambda f: f.readable(),
    "writable": lambda f: f.writable(),
    "seekable": lambda f: f.seekable(),
    "isatty": lambda f: f.isatty(),
    "with": lambda f: f.__enter__(),
}


@pytest.mark.parametrize("use", FILE_USES.values(), ids=FILE_USES)
def test_after_close_every_method_of_a_file_is_a_value_error(scene, use):
    """R19: and nothing goes out."""
    stream = holding(scene, b"unread", ended=False)
    stream.close()
    assert stream.closed is True
    assert scene.peer.next()
    with pytest.raises(ValueError, match="closed") as caught:
        use(stream)
    assert not isinstance(caught.value, OSError)
    scene.expect_nothing()


SOCKET_USES: dict[str, Callable[[Any], Any]] = {
    "recv": lambda s: s.recv(1),
    "recv of nothing": lambda s: s.recv(0),
    "recv peeking": lambda s: s.recv(1, socket.MSG_PEEK),
    "recv_into": lambda s: s.recv_into(bytearray(1)),
    "recv_into of nothing": lambda s: s.recv_into(bytearray()),
    "recvfrom": lambda s: s.recvfrom(1),
    "send": lambda s: s.send(b"x"),
    "send of nothing": lambda s: s.send(b""),
    "sendall": lambda s: s.sendall(b"x"),
    "sendall of nothing": lambda s: s.sendall(b""),
    "sendall of much": lambda s: s.sendall(bytes(100_000)),
    "shutdown": lambda s: s.shutdown(socket.SHUT_WR),
    "shutdown for reading": lambda s: s.shutdown(socket.SHUT_RD),
    "shutdown of both": lambda s: s.shutdown(socket.SHUT_RDWR),
    "close_write": lambda s: s.close_write(),
    "makefile": lambda s: s.makefile(),
}


@pytest.mark.parametrize("use", SOCKET_USES.values(), ids=SOCKET_USES)
def test_after_close_every_method_of_a_socket_is_a_bad_descriptor(scene, use):
    """R19, 12.3: EBADF, as the first argument, too."""
    stream = holding(scene, b"unread", ended=False)
    stream.close()
    assert scene.peer.next()
    with pytest.raises(StreamClosed) as caught:
        use(stream)
    assert caught.value.errno == caught.value.args[0] == errno.EBADF
    scene.expect_nothing()


def test_what_can_be_asked_of_a_closed_stream(scene):
    """R19: all that a log line or a clean-up may look at."""
    stream = scene.stream
    stream.close()
    assert (stream.closed, stream._closed) == (True, True)
    assert stream.stream_id == scene.id
    assert stream.session is scene.session
    assert stream.gettimeout() is None
    stream.settimeout(3)
    assert stream.timeout == 3.0
    assert str(scene.id) in repr(stream)
    assert "closed" in repr(stream)
    assert stream.getsockname() is not None
    assert stream.getpeername() is not None
    assert stream.stats().stream_id == scene.id
    assert stream.getsockopt(socket.SOL_SOCKET, socket.SO_TYPE) == socket.SOCK_STREAM
    assert stream.ready() is True


# --- the socket face ---

SURFACE = [
    "recv",
    "recv_into",
    "recvfrom",
    "send",
    "sendall",
    "shutdown",
    "close",
    "makefile",
    "settimeout",
    "gettimeout",
    "setblocking",
    "getblocking",
    "timeout",
    "family",
    "type",
    "proto",
    "getsockname",
    "getpeername",
    "setsockopt",
    "getsockopt",
    "fileno",
    "dup",
    "detach",
    "__enter__",
    "__exit__",
    "closed",
    "_closed",
    "_io_refs",
    "_decref_socketios",
]

ABSENT = [
    "_sock",
    "_accept",
    "bind",
    "listen",
    "accept",
    "connect",
    "connect_ex",
    "__len__",
    "do_handshake",
    "__getattr__",
    "unwrap",
    "recvmsg",
    "sendmsg",
    "sendfile",
    "sendto",
    "ioctl",
    "__getitem__",
    "__bool__",
]


@pytest.mark.parametrize("name", SURFACE)
def test_the_surface_of_a_socket_is_there(scene, name):
    """12.3: each name that a consumer was seen to use."""
    assert hasattr(type(scene.stream), name)
    if name not in ("timeout", "family", "type", "proto", "closed", "_closed", "_io_refs"):
        assert callable(getattr(scene.stream, name))


@pytest.mark.parametrize("name", ABSENT)
def test_what_would_mislead_is_absent(scene, name):
    """12.3: code that probes for it goes another way."""
    assert not hasattr(scene.stream, name)


def test_a_stream_is_true_with_bytes_or_without(scene):
    """12.3: `if stream` asks whether there is one."""
    assert bool(scene.stream) is True
    assert bool(holding(scene, b"abc")) is True
    scene.stream.close()
    assert bool(scene.stream) is True


def test_a_stream_says_what_kind_of_socket_it_is(scene):
    """12.3: no address family, so nobody sets TCP options."""
    stream = scene.stream
    assert (stream.family, stream.type, stream.proto) == (socket.AF_UNSPEC, socket.SOCK_STREAM, 0)
    assert all(type(value) is int for value in (stream.family, stream.type, stream.proto))
    assert (stream._closed, stream._io_refs) == (False, 0)


def test_options_are_taken_and_forgotten(scene):
    """12.3."""
    stream = scene.stream
    stream.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    stream.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    assert stream.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, None, 4) is None
    assert stream.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY) == 0
    assert stream.getsockopt(socket.SOL_SOCKET, socket.SO_LINGER, 8) == bytes(8)
    assert stream.getsockopt(socket.SOL_SOCKET, socket.SO_TYPE) == socket.SOCK_STREAM
    assert stream.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) == 0
    scene.expect_nothing()


@pytest.mark.parametrize("how", ["reset by the peer", "reset here", "end of the session"])
def test_the_error_option_is_honest(scene, how):
    """12.3: SO_ERROR."""
    if how == "reset by the peer":
        scene.send("00 01 0008 ID 00000000")
        settle()
    elif how == "reset here":
        scene.stream.reset()
    else:
        scene.session.abort()
    assert scene.stream.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) == errno.ECONNRESET


def test_a_stream_cannot_be_duplicated(scene):
    """12.3: NotImplementedError exactly, which code that tries it expects."""
    with pytest.raises(NotImplementedError) as caught:
        scene.stream.dup()
    assert type(caught.value) is NotImplementedError


@pytest.mark.parametrize("use", [pickle.dumps, copy.copy, copy.deepcopy])
def test_a_stream_cannot_be_pickled_or_copied(scene, use):
    """12.3."""
    with pytest.raises(TypeError, match="pickle"):
        use(scene.stream)


def test_streams_are_compared_by_identity_and_can_be_kept_in_sets(scene):
    """12.3."""
    other = scene.session.open()
    assert scene.stream != other
    assert len({scene.stream, other, scene.stream}) == 2


@pytest.mark.parametrize("kind", KINDS)
def test_addresses_are_those_of_the_connection_or_speak_of_the_stream(kind):
    """12.3: never None, never an empty string."""
    with sessions(kind) as (client, server):
        near = client.open()
        far = server.accept(timeout=LATE)
        if kind in ("tcp", "tls12", "tls13"):
            assert near.getsockname() == far.getpeername() == client.getsockname()
            assert near.getpeername() == far.getsockname()
            assert near.getpeername()[0] == "127.0.0.1"
        else:
            for stream in (near, far):
                for address in (stream.getsockname(), stream.getpeername()):
                    assert address
                    assert kind in ("unix", "stream") or address == ("yamux", stream.stream_id)


@pytest.mark.parametrize("flags", [socket.MSG_OOB, socket.MSG_DONTWAIT, socket.MSG_WAITALL, 1 << 20])
def test_flags_that_a_stream_does_not_know_are_refused(scene, flags):
    """12.3: rather than ignored; nothing is taken or sent."""
    stream = holding(scene, b"abc")
    for use in (
        lambda: stream.recv(1, flags),
        lambda: stream.recv_into(bytearray(1), 0, flags),
        lambda: stream.send(b"x", flags),
        lambda: stream.sendall(b"x", flags),
    ):
        with pytest.raises(OSError) as caught:
            use()
        assert caught.value.args[0] == caught.value.errno == errno.EOPNOTSUPP
    assert stream.recv(10) == b"abc"
    scene.expect_nothing()


def test_recvfrom_has_no_address_to_tell(scene):
    """12.3."""
    stream = holding(scene, b"abc")
    assert stream.recvfrom(2) == (b"ab", None)
    assert stream.recvfrom(2, socket.MSG_PEEK) == (b"c", None)
    assert stream.recvfrom(2) == (b"c", None)
    assert stream.recvfrom(2) == (b"", None)


def test_reading_nothing_takes_nothing_and_never_waits(scene):
    """R8: on an empty stream, a full one, at its end."""
    for _ in range(2):
        stream = scene.stream
        assert stream.recv(0) == stream.read(0) == stream.read1(0) == stream.readline(0) == b""
        assert stream.recv_into(bytearray()) == stream.readinto(bytearray()) == stream.readinto1(bytearray()) == 0
        stream = holding(scene, b"abc")
    assert stream.read() == b"abc"
    assert stream.recv(0) == b""


@pytest.mark.parametrize("size", [-1, -100])
def test_a_negative_size_is_refused_by_the_socket_face(scene, size):
    """R8: where a file would read all."""
    with pytest.raises(ValueError, match="negative"):
        scene.stream.recv(size)
    with pytest.raises(ValueError, match="negative"):
        scene.stream.recv_into(bytearray(5), size)


def test_one_byte_at_a_time_costs_no_frame(scene):
    """R8: some handshakes are read so."""
    stream = holding(scene, b"x" * 5000, ended=False)
    assert b"".join(stream.recv(1) for _ in range(5000)) == b"x" * 5000
    scene.expect_nothing()


# --- timeouts ---


@pytest.mark.parametrize("timeout", [None, 0, 0.5, 3, True])
def test_a_timeout_is_what_was_set(scene, timeout):
    """12.3."""
    stream = scene.stream
    assert stream.settimeout(timeout) is None
    assert stream.gettimeout() == stream.timeout == timeout
    assert stream.gettimeout() is None or type(stream.gettimeout()) is float
    assert stream.getblocking() is (timeout != 0)


def test_the_timeout_cannot_be_assigned(scene):
    """12.3: as with a socket, there is a method for it."""
    with pytest.raises(AttributeError):
        scene.stream.timeout = 5
    assert scene.stream.timeout is None


@pytest.mark.parametrize("timeout", [-1, -0.001, float("-inf"), float("nan")])
def test_a_timeout_out_of_range_is_refused(scene, timeout):
    """12.3."""
    scene.stream.settimeout(3)
    with pytest.raises(ValueError):
        scene.stream.settimeout(timeout)
    assert scene.stream.gettimeout() == 3


@pytest.mark.parametrize("timeout", ["soon", "5", [], object()], ids=kind_of)
def test_a_timeout_that_is_no_number_is_refused(scene, timeout):
    """12.3: TypeError, as with a socket."""
    scene.stream.settimeout(3)
    with pytest.raises(TypeError):
        scene.stream.settimeout(timeout)
    assert scene.stream.gettimeout() == 3


def test_new_streams_take_the_default_of_sockets_or_the_configured_one():
    """12.3: `socket.setdefaulttimeout`, and `Config.stream_timeout` above it."""
    before = socket.getdefaulttimeout()
    try:
        for default, config, expected in [
            (7.0, Config(), 7.0),
            (None, Config(), None),
            (7.0, Config(stream_timeout=None), None),
            (None, Config(stream_timeout=0), 0.0),
            (7.0, Config(stream_timeout=2.5), 2.5),
        ]:
            with sessions("socketpair", config, config) as (client, server):
                socket.setdefaulttimeout(default)
                near = client.open()
                far = server.accept(timeout=LATE)
                assert near.gettimeout() == far.gettimeout() == expected
            socket.setdefaulttimeout(before)
    finally:
        socket.setdefaulttimeout(before)


WAITS: dict[str, Callable[[Any], Any]] = {
    "recv": lambda s: s.recv(1),
    "recv peeking": lambda s: s.recv(1, socket.MSG_PEEK),
    "recv_into": lambda s: s.recv_into(bytearray(1)),
    "recvfrom": lambda s: s.recvfrom(1),
    "read": lambda s: s.read(),
    "read of one": lambda s: s.read(1),
    "read1": lambda s: s.read1(),
    "readinto": lambda s: s.readinto(bytearray(1)),
    "readinto1": lambda s: s.readinto1(bytearray(1)),
    "readline": lambda s: s.readline(),
    "readlines": lambda s: s.readlines(),
    "next": lambda s: next(s),
    "peek": lambda s: s.peek(),
    "send": lambda s: s.send(b"x"),
    "sendall": lambda s: s.sendall(b"x"),
    "write": lambda s: s.write(b"x"),
    "writelines": lambda s: s.writelines([b"x"]),
}
"""Every call that waits, on a stream with nothing to read and no credit."""


@pytest.fixture
def stuck(scene: Scene) -> Scene:
    """A stream on which nothing moves."""
    credit = scene.stream.stats().send_credit
    writing = start(scene.stream.sendall, bytes(credit))
    scene.expect_data(bytes(credit))
    writing.get(timeout=LATE)
    return scene


@pytest.mark.parametrize("use", WAITS.values(), ids=WAITS)
def test_every_wait_times_out_with_the_error_of_sockets(stuck, use):
    """12.3: exactly `TimeoutError("timed out")`, which is `socket.timeout`; the stream is as it was."""
    stuck.stream.settimeout(SOON)
    with pytest.raises(socket.timeout) as caught:
        use(stuck.stream)
    assert type(caught.value) is TimeoutError
    assert caught.value.args == ("timed out",)
    assert (stuck.stream.stats().readers, stuck.stream.stats().writers) == (0, 0)
    stuck.expect_nothing()
    assert stuck.stream.ready() is False


@pytest.mark.parametrize("use", WAITS.values(), ids=WAITS)
def test_every_wait_would_block_where_blocking_is_off(stuck, use):
    """12.3: `BlockingIOError` with EAGAIN, without a switch to the hub."""
    stuck.stream.setblocking(False)
    ran = []
    gevent.get_hub().loop.run_callback(ran.append, 1)
    with pytest.raises(BlockingIOError) as caught:
        use(stuck.stream)
    assert ran == []
    assert caught.value.args[0] == caught.value.errno == errno.EAGAIN
    settle()


@pytest.mark.parametrize("use", WAITS.values(), ids=WAITS)
def test_every_wait_can_be_killed(stuck, use):
    """R8, R14: and nothing stays behind."""
    waiting = start(use, stuck.stream)
    assert not waiting.ready()
    waiting.kill()
    assert (stuck.stream.stats().readers, stuck.stream.stats().writers) == (0, 0)
    stuck.expect_nothing()


@pytest.mark.parametrize("use", WAITS.values(), ids=WAITS)
def test_every_wait_in_the_hub_itself_is_refused(stuck, use):
    """12.3: as gevent's own calls refuse it."""
    outcome = []

    def call() -> None:
        try:
            use(stuck.stream)
        except BaseException as error:
            outcome.append(error)

    gevent.get_hub().loop.run_callback(call)
    settle()
    assert isinstance(outcome[0], BlockingSwitchOutError)
    assert (stuck.stream.stats().readers, stuck.stream.stats().writers) == (0, 0)


IN_THREADS = {**WAITS, "flush": lambda s: s.flush(), "shutdown": lambda s: s.shutdown(socket.SHUT_WR)}


@pytest.mark.parametrize("use", IN_THREADS.values(), ids=IN_THREADS)
def test_use_from_another_thread_is_refused(stuck, use):
    """12.3, R30."""

    def call() -> BaseException | None:
        try:
            use(stuck.stream)
        except BaseException as error:
            return error
        return None

    error = gevent.get_hub().threadpool.apply(call)
    assert type(error) is RuntimeError
    assert "thread" in str(error)
    stuck.expect_nothing()


# --- every error, its class and its errno ---


def _errors(use: Callable[[Any], Any], stream: Any) -> OSError:
    with pytest.raises(OSError) as caught:
        use(stream)
    error = caught.value
    assert error.errno == error.args[0]
    assert error.strerror
    assert str(error.errno) in str(error)
    return error


@pytest.mark.parametrize("use", WAITS.values(), ids=WAITS)
def test_after_the_peers_reset_every_call_is_a_reset(stuck, use):
    """12.3: `StreamReset`, ECONNRESET; also for one that waited."""
    waiting = start(use, stuck.stream)
    stuck.send("00 01 0008 ID 00000011")
    assert isinstance(waiting.get(timeout=LATE), StreamReset)
    error = _errors(use, stuck.stream)
    assert isinstance(error, (StreamReset, ConnectionResetError))
    assert isinstance(error, (StreamError, YamuxError))
    assert (error.errno, error.code, error.remote) == (errno.ECONNRESET, 17, True)


@pytest.mark.parametrize("use", WAITS.values(), ids=WAITS)
def test_after_the_end_of_the_session_every_call_says_why(stuck, use):
    """12.3: `SessionError`, ECONNRESET, with the reason chained; also for one that waited; each time a fresh one."""
    waiting = start(use, stuck.stream)
    stuck.peer.close()
    first = waiting.get(timeout=LATE)
    assert isinstance(first, SessionError)
    error = _errors(use, stuck.stream)
    assert isinstance(error, SessionClosed)
    assert error.errno == errno.ECONNRESET
    assert error.__cause__ is not None
    assert error is not first


@pytest.mark.parametrize("use", [name for name in WAITS if name.startswith(("send", "write"))])
def test_after_our_fin_every_write_is_a_broken_pipe(stuck, use):
    """12.3: `StreamClosed`, EPIPE."""
    stuck.stream.close_write()
    error = _errors(WAITS[use], stuck.stream)
    assert isinstance(error, StreamClosed)
    assert isinstance(error, BrokenPipeError)
    assert error.errno == errno.EPIPE


@pytest.mark.parametrize(
    ("make", "number", "classes"),
    [
        (lambda: geyamux.StreamReset("text", 5, remote=True), errno.ECONNRESET, (ConnectionResetError, StreamError)),
        (lambda: geyamux.StreamClosed("text"), errno.EBADF, (BrokenPipeError, StreamError)),
        (lambda: geyamux.SessionClosed("text"), errno.ECONNRESET, (ConnectionError, SessionError)),
        (lambda: geyamux.TransportError("text"), errno.ECONNRESET, (ConnectionError, SessionError)),
        (lambda: geyamux.RemoteGoAway(), errno.ECONNREFUSED, (ConnectionRefusedError, YamuxError)),
        (lambda: geyamux.StreamsExhausted(), errno.EADDRNOTAVAIL, (OSError, YamuxError)),
    ],
)
def test_errors_are_the_standard_kinds_with_their_numbers(make, number, classes):
    """12.3."""
    error = make()
    assert error.errno == error.args[0] == number
    assert all(isinstance(error, cls) for cls in classes)


# --- makefile ---


@pytest.mark.parametrize(
    ("mode", "buffering", "cls"),
    [
        ("r", None, io.TextIOWrapper),
        ("w", None, io.TextIOWrapper),
        ("rw", None, io.TextIOWrapper),
        ("", None, io.TextIOWrapper),
        ("rb", None, io.BufferedReader),
        ("rb", -1, io.BufferedReader),
        ("rb", 512, io.BufferedReader),
        ("b", None, io.BufferedReader),
        ("wb", None, io.BufferedWriter),
        ("rwb", None, io.BufferedRWPair),
        ("rb", 0, socket.SocketIO),
        ("wb", 0, socket.SocketIO),
        ("rwb", 0, socket.SocketIO),
    ],
)
def test_a_file_is_of_the_class_that_a_sockets_file_is(scene, mode, buffering, cls):
    """R19: by mode and buffering."""
    file = scene.stream.makefile(mode, buffering)
    assert isinstance(file, cls)
    a, b = socket.socketpair()
    with a, b, a.makefile(mode, buffering) as expected:
        assert isinstance(expected, cls)
        assert (file.readable(), file.writable()) == (expected.readable(), expected.writable())
        assert getattr(file, "mode", None) == getattr(expected, "mode", None)
    assert scene.stream._io_refs == 1
    file.close()
    assert scene.stream._io_refs == 0
    assert not scene.stream.closed


@pytest.mark.parametrize(
    ("mode", "buffering"), [("a", None), ("rb+", None), ("x", None), ("U", None), ("r", 0), ("w", 0)]
)
def test_a_file_that_cannot_be_is_refused_and_not_counted(scene, mode, buffering):
    """R19."""
    with pytest.raises(ValueError):
        scene.stream.makefile(mode, buffering)
    assert scene.stream._io_refs == 0
    scene.stream.close()
    scene.expect("00 01 0004 ID 00000000")


def test_a_text_file_has_the_encoding_errors_and_newlines_it_was_given(scene):
    """R19."""
    stream = holding(scene, "grün\r\n".encode("latin-1") + b"x\r\n")
    text = stream.makefile("r", encoding="ascii", errors="replace", newline="\r\n")
    assert (text.encoding, text.errors) == ("ascii", "replace")
    assert text.readline() == "gr\ufffdn\r\n"
    with pytest.raises(TypeError):
        stream.makefile("r", None, "ascii")


def test_what_digs_for_the_socket_below_a_file_finds_the_stream(scene):
    """R19: `rfile.raw._sock`; and a name that is a number, as a socket's."""
    file = scene.stream.makefile("rb")
    assert file.raw._sock is scene.stream
    assert file.raw.name == scene.id
    assert type(file.raw.name) is int
    with pytest.raises(io.UnsupportedOperation):
        file.fileno()
    raw = file.raw
    file.close()
    assert raw.name == scene.id


def test_references_are_counted_as_urllib3_counts_them(scene):
    """R19: it adds to `_io_refs` itself and calls `_decref_socketios`."""
    scene.stream._io_refs += 1
    scene.stream._io_refs += 1
    scene.stream.close()
    scene.expect_nothing()
    scene.stream._decref_socketios()
    scene.expect_nothing()
    scene.stream._decref_socketios()
    scene.expect("00 01 0004 ID 00000000")
    # One too many is no fault that would show.
    scene.stream._decref_socketios()
    scene.expect_nothing()
    assert scene.stream._io_refs == 0


def test_a_closed_stream_with_files_left_says_closed_to_its_own_file_methods(scene):
    """R19: and serves the files."""
    file = scene.stream.makefile("rb", buffering=0)
    scene.stream.close()
    assert scene.stream.closed
    with pytest.raises(ValueError, match="closed"):
        scene.stream.read(1)
    with pytest.raises(ValueError, match="closed"):
        scene.stream.write(b"x")
    scene.data(b"abc")
    assert file.read(3) == b"abc"
    file.close()
    with pytest.raises(StreamClosed):
        scene.stream.recv(1)


def test_a_file_times_out_as_its_stream_does(scene):
    """R19: after that it is of no more use, as a socket's; the stream itself is."""
    scene.stream.settimeout(SOON)
    with scene.stream.makefile("rb", buffering=0) as file:
        with pytest.raises(TimeoutError):
            file.read(1)
        with pytest.raises(OSError, match="timed out object"):
            file.read(1)
    scene.data(b"line\n")
    assert scene.stream.readline() == b"line\n"


def test_an_unbuffered_file_says_none_where_a_read_would_block(scene):
    """R19: as RawIOBase does."""
    scene.stream.settimeout(0)
    with scene.stream.makefile("rwb", buffering=0) as file:
        assert file.read(1) is None


def test_files_of_one_stream_share_its_bytes(ends):
    """R19, R8: what one has not taken the other reads, over every link."""
    a, b = ends
    a.sendall(b"first\nsecond\nthird")
    a.close_write()
    with b.makefile("rb", buffering=0) as raw:
        got = b""
        while len(got) < 3:
            got += raw.read(3 - len(got))
        assert got == b"fir"
    assert b.readline() == b"st\n"
    with b.makefile("rb") as file:
        assert file.readline() == b"second\n"
        assert file.read() == b"third"


# --- gevent's own waiting ---


@pytest.mark.parametrize("what", ["data", "FIN", "RST", "end of the session", "close", "shutdown"])
def test_gevent_can_wait_for_a_stream(scene, what):
    """`ready`, `rawlink` and `unlink`: readable, at its end, or broken."""
    stream = scene.stream
    other = scene.session.open()
    assert stream.ready() is False
    waiting = start(lambda: gevent.wait([other, stream], count=1))
    assert not waiting.ready()
    {
        "data": lambda: scene.data(b"x"),
        "FIN": lambda: scene.send("00 01 0004 ID 00000000"),
        "RST": lambda: scene.send("00 01 0008 ID 00000000"),
        "end of the session": scene.session.abort,
        "close": stream.close,
        "shutdown": lambda: stream.shutdown(socket.SHUT_RD),
    }[what]()
    found = waiting.get(timeout=LATE)
    assert stream in found
    assert stream.ready() is True
    assert gevent.wait([stream], timeout=LATE) == [stream]


def test_a_callback_is_called_once_in_the_hub_with_the_stream(scene):
    """And not at all when it was taken back."""
    calls = []

    def called(stream: Any) -> None:
        calls.append((stream, gevent.getcurrent() is gevent.get_hub()))

    def never(stream: Any) -> None:
        calls.append("never")

    scene.stream.rawlink(called)
    scene.stream.rawlink(never)
    scene.stream.unlink(never)
    scene.stream.unlink(never)
    scene.data(b"x")
    settle()
    scene.data(b"y")
    settle()
    assert calls == [(scene.stream, True)]
    scene.stream.rawlink(called)
    assert len(calls) == 1
    settle()
    assert len(calls) == 2


def test_a_stream_that_was_read_empty_is_not_ready(scene):
    """A wait that ended is no promise for the next."""
    scene.data(b"x")
    settle()
    assert scene.stream.ready() is True
    scene.stream.recv(1)
    assert scene.stream.ready() is False
    assert gevent.wait([scene.stream], timeout=SOON) == []


@pytest.mark.parametrize("name", scenes.KINDS)
def test_a_stream_tells_about_itself(name):
    """Its id, its session, whether it is established, and how it stands."""
    with scene_of(name) as scene:
        stream = scene.stream
        settle()
        assert stream.stream_id == scene.id
        assert stream.session is scene.session
        assert stream.established is True
        assert stream.wait_established(timeout=0) is True
        scene.data(b"abc")
        settle()
        stats = stream.stats()
        assert (stats.stream_id, stats.unread, stats.receive_window) == (scene.id, 3, 262141)
        assert (stats.send_credit, stats.readers, stats.writers) == (262144, 0, 0)
        assert repr(stream).startswith(f"<geyamux.Stream {scene.id} of ")
