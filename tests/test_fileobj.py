"""makefile(): the modes, the buffers and the counting, over a fake with the face of a socket."""

from __future__ import annotations

import gc
import io
import socket

import pytest

from geyamux.fileobj import StreamIO, makefile


class FakeStream:
    """What a file needs of a stream."""

    def __init__(self, incoming: bytes = b"") -> None:
        self.stream_id = 7
        self.incoming = incoming
        self.sent = b""
        self.sends: list[int] = []
        self.at_most = 1 << 30
        self._io_refs = 0

    def recv_into(self, buffer):
        size = min(len(buffer), len(self.incoming), self.at_most)
        buffer[:size], self.incoming = self.incoming[:size], self.incoming[size:]
        return size

    def send(self, data):
        taken = bytes(data)[: self.at_most]
        self.sent += taken
        self.sends.append(len(taken))
        return len(taken)

    def gettimeout(self):
        return None

    def _decref_socketios(self):
        self._io_refs -= 1


def make(stream, mode="r", buffering=None, encoding=None, errors=None, newline=None):
    return makefile(stream, mode, buffering, encoding, errors, newline)


@pytest.mark.parametrize(
    ("mode", "kind", "readable", "writable"),
    [
        ("rb", io.BufferedReader, True, False),
        ("b", io.BufferedReader, True, False),
        ("wb", io.BufferedWriter, False, True),
        ("rwb", io.BufferedRWPair, True, True),
        ("wrb", io.BufferedRWPair, True, True),
        ("r", io.TextIOWrapper, True, False),
        ("", io.TextIOWrapper, True, False),
        ("w", io.TextIOWrapper, False, True),
        ("rw", io.TextIOWrapper, True, True),
    ],
)
def test_a_mode_makes_the_file_that_a_socket_would_make(mode, kind, readable, writable):
    left, right = socket.socketpair()
    with left, right, left.makefile(mode) as expected, make(FakeStream(), mode) as found:
        assert type(found) is type(expected) is kind
        assert found.readable() == expected.readable() == readable
        assert found.writable() == expected.writable() == writable


@pytest.mark.parametrize("mode", ["a", "x", "r+", "rt", "U", "rb+"])
def test_other_modes_are_refused_and_not_counted(mode):
    stream = FakeStream()
    with pytest.raises(ValueError, match="invalid mode"):
        make(stream, mode)
    assert stream._io_refs == 0


def test_without_a_buffer_it_is_the_raw_file():
    with make(FakeStream(b"bytes"), "rb", 0) as raw:
        assert type(raw) is StreamIO
        assert isinstance(raw, socket.SocketIO)
        assert raw.read(3) == b"byt"


@pytest.mark.parametrize("mode", ["r", "w", "rw"])
def test_text_without_a_buffer_is_refused_and_not_counted(mode):
    stream = FakeStream()
    with pytest.raises(ValueError, match="unbuffered streams must be binary"):
        make(stream, mode, 0)
    assert stream._io_refs == 0


@pytest.mark.parametrize("buffering", [None, -1])
def test_by_default_the_buffer_is_of_the_usual_size(buffering):
    stream = FakeStream()
    with make(stream, "wb", buffering) as file:
        file.write(b"x" * (io.DEFAULT_BUFFER_SIZE - 1))
        assert stream.sends == []
        file.write(b"xx")
        assert sum(stream.sends) >= io.DEFAULT_BUFFER_SIZE - 1
    assert stream.sent == b"x" * (io.DEFAULT_BUFFER_SIZE + 1)


def test_the_buffer_may_be_of_another_size():
    stream = FakeStream()
    with make(stream, "wb", 4) as file:
        file.write(b"123")
        assert stream.sends == []
        file.write(b"45")
        assert stream.sent


def test_what_is_written_arrives_though_the_stream_takes_little_at_once():
    stream = FakeStream()
    stream.at_most = 3
    with make(stream, "wb") as file:
        file.write(b"0123456789")
    assert stream.sent == b"0123456789"
    assert max(stream.sends) == 3


def test_what_is_read_is_whole_though_the_stream_gives_little_at_once():
    stream = FakeStream(b"0123456789")
    stream.at_most = 3
    with make(stream, "rb") as file:
        assert file.read(7) == b"0123456"
        assert file.read() == b"789"
        assert file.read() == b""


def test_text_is_encoded_and_decoded_as_asked():
    stream = FakeStream("größe\r\n".encode("latin-1"))
    with make(stream, "rw", None, "latin-1", "strict", "\r\n") as file:
        assert file.mode == "rw"
        assert file.encoding == "latin-1"
        assert file.readline() == "größe\r\n"
        file.write("süß\n")
    assert stream.sent == "süß\r\n".encode("latin-1")


def test_errors_of_decoding_are_handled_as_asked():
    with make(FakeStream(b"\xff"), "r", None, "utf-8", "replace") as file:
        assert file.read() == "\ufffd"


@pytest.mark.parametrize("mode", ["rb", "wb", "rwb", "r", "w", "rw"])
@pytest.mark.parametrize("buffering", [None, 0])
def test_a_file_counts_until_it_is_closed(mode, buffering):
    if buffering == 0 and "b" not in mode:
        mode += "b"
    stream = FakeStream()
    first, second = make(stream, mode, buffering), make(stream, mode, buffering)
    assert stream._io_refs == 2
    first.close()
    first.close()
    assert stream._io_refs == 1
    second.close()
    assert stream._io_refs == 0


def test_a_forgotten_file_stops_counting():
    stream = FakeStream()
    file = make(stream, "rb")
    del file
    gc.collect()
    assert stream._io_refs == 0


def test_a_file_whose_making_fails_does_not_count():
    stream = FakeStream()
    with pytest.raises(LookupError):
        make(stream, "r", None, "no such encoding")
    gc.collect()
    assert stream._io_refs == 0


def test_the_name_is_an_int_as_that_of_a_socket_file():
    with make(FakeStream(), "rb") as file:
        assert file.name == 7
        assert type(file.name) is int
        assert file.raw.name == 7


def test_code_that_digs_finds_the_stream_where_a_socket_file_has_its_socket():
    stream = FakeStream()
    with make(stream, "rb") as file:
        assert file.raw._sock is stream
