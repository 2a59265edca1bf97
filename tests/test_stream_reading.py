"""What comes in on a stream, and how it is read.

Each test names the rules of `spec.md` that it holds the package to. The wire tests play the peer with literal
bytes; the others run over every kind of link, in both directions.

====  ====================================================================================
R7    how a stream may begin, what is ignored, and data behind the peer's own end
R8    what a read returns, and what one that is cut short leaves behind
R9    an end that the peer did not announce is an error, after everything that did arrive
R10   credit: how much, when, and never too much
R11   many small frames are cheap
R12   several readers take turns
====  ====================================================================================

Longer than other modules because all tests of one subject stand together, each short and by itself.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import socket
import time
import tracemalloc
from collections.abc import Iterator
from typing import Any

import gevent
import pytest
from gevent import socket as gsocket
from hypothesis import given, settings
from hypothesis import strategies as st

from geyamux import Config, ProtocolError, SessionClosed, SessionError, StreamReset, TransportError
from support import scenes
from support.facing import start
from support.links import KINDS, stream_pair
from support.rawpeer import settle
from support.scenes import Scene, literal, played, scene_of
from support.waiting import wait_for

WINDOW = 262144
SOON = 0.02
"""A time limit that a test waits for."""
LATE = 10.0
"""A time limit that no passing test waits for."""


@pytest.fixture(params=scenes.KINDS)
def scene(request: pytest.FixtureRequest) -> Iterator[Scene]:
    """A stream whose peer the test plays: of either side, opened by either."""
    with scene_of(request.param) as found:
        yield found


@pytest.fixture(params=[f"{kind}-{reader}" for kind in KINDS for reader in ("opened", "accepted")])
def ends(request: pytest.FixtureRequest) -> Iterator[tuple[Any, Any]]:
    """A stream that writes and one that reads, over every kind of link and in both directions."""
    kind, reader = request.param.split("-")
    with stream_pair(kind) as (opened, accepted):
        yield (accepted, opened) if reader == "opened" else (opened, accepted)


def pattern(size: int) -> bytes:
    """Bytes in which a lost, repeated or moved piece shows."""
    return b"".join(number.to_bytes(4, "big") for number in range(size // 4 + 1))[:size]


def receive_all(stream: Any) -> bytes:
    chunks = []
    while chunk := stream.recv(70_000):
        chunks.append(chunk)
    return b"".join(chunks)


READERS = {
    "recv": receive_all,
    "recv of one": lambda stream: b"".join(iter(lambda: stream.recv(1), b"")),
    "read": lambda stream: stream.read(),
    "read of some": lambda stream: b"".join(iter(lambda: stream.read(4), b"")),
    "read1": lambda stream: b"".join(iter(lambda: stream.read1(3), b"")),
    "lines": lambda stream: b"".join(stream),
    "makefile": lambda stream: stream.makefile("rb").read(),
}
"""Ways to read a stream to its end."""


# --- R7, and the order of payload and end: everything, then the end ---

BY_THE_PEER = {
    "SYN, Data, WindowUpdate+FIN": "00 01 0001 ID 00000000|00 00 0000 ID 00000006 BODY|00 01 0004 ID 00000000",
    "SYN, Data+FIN": "00 01 0001 ID 00000000|00 00 0004 ID 00000006 BODY",
    "SYN, Data, Data+FIN": "00 01 0001 ID 00000000|00 00 0000 ID 00000002 BO|00 00 0004 ID 00000004 DY",
    "SYN, Data, empty Data+FIN": "00 01 0001 ID 00000000|00 00 0000 ID 00000006 BODY|00 00 0004 ID 00000000",
    "SYN+Data, WindowUpdate+FIN": "00 00 0001 ID 00000006 BODY|00 01 0004 ID 00000000",
    "SYN+Data, Data+FIN": "00 00 0001 ID 00000002 BO|00 00 0004 ID 00000004 DY",
    "SYN+Data+FIN": "00 00 0005 ID 00000006 BODY",
    "SYN, empty Data, Data, FIN with credit": "00 01 0001 ID 00000000|00 00 0000 ID 00000000"
    "|00 00 0000 ID 00000006 BODY|00 01 0004 ID 0000ffff",
    "SYN+ACK+Data+FIN": "00 00 0007 ID 00000006 BODY",
    "SYN, unknown flags": "00 01 ff01 ID 00000000|00 00 fff0 ID 00000006 BODY|00 01 0014 ID 00000000",
}
BY_US = {
    "ACK, Data, WindowUpdate+FIN": "00 01 0002 ID 00000000|00 00 0000 ID 00000006 BODY|00 01 0004 ID 00000000",
    "ACK, Data+FIN": "00 01 0002 ID 00000000|00 00 0004 ID 00000006 BODY",
    "ACK+Data, WindowUpdate+FIN": "00 00 0002 ID 00000006 BODY|00 01 0004 ID 00000000",
    "ACK+Data+FIN": "00 00 0006 ID 00000006 BODY",
    "Data, WindowUpdate+ACK+FIN": "00 00 0000 ID 00000006 BODY|00 01 0006 ID 00000000",
    "no ACK": "00 00 0000 ID 00000006 BODY|00 01 0004 ID 00000000",
    "no ACK, Data+FIN": "00 00 0004 ID 00000006 BODY",
    "ACK, Data, ACK again with FIN": "00 01 0002 ID 00000000|00 00 0000 ID 00000006 BODY|00 01 0006 ID 00000005",
}
EMPTY = {
    "SYN, WindowUpdate+FIN": "00 01 0001 ID 00000000|00 01 0004 ID 00000000",
    "SYN, empty Data+FIN": "00 01 0001 ID 00000000|00 00 0004 ID 00000000",
    "SYN+FIN": "00 01 0005 ID 00000000",
    "SYN+FIN with credit": "00 01 0005 ID 00000100",
    "SYN+FIN on Data": "00 00 0005 ID 00000000",
    "SYN+ACK+FIN": "00 01 0007 ID 00000000",
}
EMPTY_BY_US = {
    "ACK, WindowUpdate+FIN": "00 01 0002 ID 00000000|00 01 0004 ID 00000000",
    "ACK+FIN": "00 01 0006 ID 00000000",
    "ACK+FIN on Data": "00 00 0006 ID 00000000",
    "FIN": "00 01 0004 ID 00000000",
    "FIN on Data": "00 00 0004 ID 00000000",
}
BODY = b"one\ntw"


def frames(text: str, stream_id: int) -> list[bytes]:
    """The frames of one entry of the tables above."""
    bodies = {"BODY": BODY, "BO": BODY[:2], "DY": BODY[2:]}
    found = []
    for part in text.split("|"):
        words = part.split(" ")
        body = bodies.get(words[-1], b"")
        found.append(literal(" ".join(words[:5]), stream_id) + body)
    return found


def in_pieces(parts: list[bytes], cut: str) -> list[bytes]:
    whole = b"".join(parts)
    return {"at once": [whole], "frame by frame": parts, "byte by byte": [bytes([byte]) for byte in whole]}[cut]


def feed(scene: Scene, pieces: list[bytes]) -> None:
    for piece in pieces:
        scene.peer.send(piece)
        if len(pieces) > 1:
            settle()


on_any_cut = pytest.mark.parametrize("cut", ["at once", "frame by frame", "byte by byte"])
on_either_side = pytest.mark.parametrize("client", [True, False], ids=["client", "server"])


@on_either_side
@on_any_cut
@pytest.mark.parametrize("how", [*BY_THE_PEER, *EMPTY])
def test_all_bytes_come_before_the_end_however_the_peer_opens_and_ends(how, cut, client):
    """R7, R8: with SYN, payload and FIN split over frames in any way, the FIN before the accept."""
    with played(client=client) as scene:
        parts = frames({**BY_THE_PEER, **EMPTY}[how], 2 if client else 1)
        feed(scene, in_pieces(parts, cut))
        settle()
        stream = scene.session.accept(timeout=LATE)
        assert receive_all(stream) == (BODY if how in BY_THE_PEER else b"")
        assert stream.recv(1) == b""


@on_either_side
@on_any_cut
@pytest.mark.parametrize("how", [*BY_THE_PEER, *EMPTY])
def test_a_reader_that_accepted_at_the_syn_gets_all_bytes_then_the_end(how, cut, client):
    """R7, R8: the acceptor waits before the first byte comes."""
    with played(client=client) as scene:
        reading = start(lambda: receive_all(scene.session.accept()))
        feed(scene, in_pieces(frames({**BY_THE_PEER, **EMPTY}[how], 2 if client else 1), cut))
        assert reading.get(timeout=LATE) == (BODY if how in BY_THE_PEER else b"")


@on_either_side
@on_any_cut
@pytest.mark.parametrize("how", [*BY_US, *EMPTY_BY_US])
@pytest.mark.parametrize("reader", READERS)
def test_a_reader_already_blocked_gets_all_bytes_then_the_end(how, cut, client, reader):
    """R7, R8: on a stream that was opened here, for every split of ACK, payload and FIN."""
    with played(client=client) as scene:
        stream = scene.session.open()
        reading = start(READERS[reader], stream)
        feed(scene, in_pieces(frames({**BY_US, **EMPTY_BY_US}[how], stream.stream_id), cut))
        assert reading.get(timeout=LATE) == (BODY if how in BY_US else b"")
        assert stream.recv(1) == b""


@on_either_side
@pytest.mark.parametrize("how", [*BY_US, *EMPTY_BY_US])
@pytest.mark.parametrize("reader", READERS)
def test_a_reader_that_comes_late_gets_all_bytes_then_the_end(how, client, reader):
    """R7, R8."""
    with played(client=client) as scene:
        stream = scene.session.open()
        feed(scene, [b"".join(frames({**BY_US, **EMPTY_BY_US}[how], stream.stream_id))])
        settle()
        assert READERS[reader](stream) == (BODY if how in BY_US else b"")


@st.composite
def splits(draw: st.DrawFn) -> tuple[bytes, list[bytes], list[bytes]]:
    """A body, the frames of a peer that opens, sends it and ends, and the same bytes in other pieces."""
    body = draw(st.binary(max_size=300))
    cuts = sorted(draw(st.lists(st.integers(0, len(body)), max_size=5)))
    parts = [body[a:b] for a, b in itertools.pairwise([0, *cuts, len(body)])]
    syn_alone, fin_alone = draw(st.booleans()), draw(st.booleans())
    sent = [bytes.fromhex("00 01 0001 00000001 00000000")] if syn_alone else []
    for index, part in enumerate(parts):
        flags = 0x1 if index == 0 and not syn_alone else 0
        flags |= 0x4 if index == len(parts) - 1 and not fin_alone else 0
        sent.append(bytes([0, 0]) + flags.to_bytes(2, "big") + b"\0\0\0\1" + len(part).to_bytes(4, "big") + part)
    if fin_alone:
        sent.append(bytes.fromhex("00 01 0004 00000001 00000000"))
    whole = b"".join(sent)
    places = sorted(draw(st.lists(st.integers(0, len(whole)), max_size=6)))
    return body, sent, [whole[a:b] for a, b in itertools.pairwise([0, *places, len(whole)])]


@settings(max_examples=150, deadline=None)
@given(splits(), st.booleans(), st.sampled_from(sorted(READERS)))
def test_no_split_of_payload_and_end_loses_a_byte_or_the_end(split, early, reader):
    """R7, R8: any frames, received in any pieces, by a reader that waits already or comes later."""
    body, _, pieces = split
    with played("memory") as scene:
        reading = start(lambda: READERS[reader](scene.session.accept())) if early else None
        feed(scene, [piece for piece in pieces if piece])
        settle()
        if reading is None:
            reading = start(lambda: READERS[reader](scene.session.accept()))
        assert reading.get(timeout=LATE) == body


def test_the_end_of_a_frame_announces_the_end_not_its_header(scene):
    """R7: a FIN on Data takes effect behind the payload, also when that comes in parts."""
    reading = start(receive_all, scene.stream)
    scene.send("00 00 0004 ID 00000006", b"abc")
    settle()
    assert not reading.ready()
    scene.peer.send(b"def")
    assert reading.get(timeout=LATE) == b"abcdef"


@pytest.mark.parametrize(
    ("flags", "length", "credit"),
    [("0001", "00000000", 262144), ("0001", "00000064", 262244), ("0005", "00000064", 262244)],
)
def test_credit_on_a_syn_is_added_to_the_initial_window(flags, length, credit):
    """R7: the length of a SYN is a delta, with FIN, too."""
    with played() as scene:
        scene.peer.send(bytes.fromhex(f"00 01 {flags} 00000001 {length}"))
        stream = scene.session.accept(timeout=LATE)
        assert stream.stats().send_credit == credit
        scene.peer.expect(1, 2, 1, 0)
        writing = start(stream.sendall, pattern(credit + 1))
        scene.peer.expect_data(1, pattern(credit))
        scene.expect_nothing()
        writing.kill()


@pytest.mark.parametrize("flags", ["0002", "0000", "0006", "0004"])
def test_credit_on_an_ack_or_a_fin_is_added_to_what_is_left(flags):
    """R7: so is that of an ACK, an ACK+FIN and a FIN."""
    with played(client=True) as scene:
        stream = scene.session.open()
        stream.sendall(b"x" * 44)
        scene.peer.expect(1, 1, 1, 0)
        scene.peer.expect_data(1, b"x" * 44)
        scene.peer.send(bytes.fromhex(f"00 01 {flags} 00000001 00000064"))
        settle()
        assert stream.stats().send_credit == 262144 - 44 + 100
        assert stream.established


@pytest.mark.parametrize("client", [True, False])
@pytest.mark.parametrize("stream_id", ["00000001", "00000002", "7fffffff", "fffffffe", "00000000"])
@pytest.mark.parametrize(
    "text",
    [
        "00 01 0002 ID 00000000",
        "00 01 0002 ID 00040000",
        "00 01 0004 ID 00000000",
        "00 01 0006 ID 00000000",
        "00 01 0008 ID 00000000",
        "00 01 0008 ID ffffffff",
        "00 01 0000 ID 00001000",
        "00 01 0000 ID ffffffff",
        "00 00 0002 ID 00000000",
        "00 00 0004 ID 00000000",
        "00 00 000a ID 00000000",
    ],
)
def test_what_concerns_a_stream_we_do_not_hold_is_dropped_without_an_answer(client, stream_id, text):
    """R7: ACK, FIN, RST and credit."""
    with played(client=client) as scene:
        scene.peer.send(bytes.fromhex(text.replace("ID", stream_id)))
        scene.expect_nothing()
        # It came as far as that, and lives.
        scene.peer.send(bytes.fromhex("00 02 0001 00000000 00000007"))
        scene.peer.expect(2, 2, 0, 7)
        assert scene.session.num_streams == 0


@pytest.mark.parametrize("stream_id", ["00000001", "00000002"])
def test_data_for_a_stream_we_do_not_hold_is_drained(stream_id):
    """R7: to its last byte, then the next frame is found."""
    with played() as scene:
        scene.peer.send(bytes.fromhex(f"00 00 0000 {stream_id} 00010000") + bytes(0x10000))
        scene.peer.send(bytes.fromhex("00 02 0001 00000000 00000007"))
        scene.peer.expect(2, 2, 0, 7)


def test_data_after_the_peers_own_end_is_drained(scene):
    """R7: not delivered, not credited, no error; up to one window of it."""
    scene.data(b"all there is")
    scene.send("00 01 0004 ID 00000000")
    for _ in range(4):
        scene.data(bytes(60_000))
    scene.data(b"")
    scene.send("00 01 0004 ID 00000000")
    assert receive_all(scene.stream) == b"all there is"
    scene.expect_nothing()
    # The other direction is as it was.
    scene.stream.sendall(b"answer")
    scene.expect_data(b"answer")


def test_data_after_the_peers_own_reset_is_drained(scene):
    """R7."""
    scene.data(b"all there is")
    scene.send("00 01 0008 ID 00000000")
    for _ in range(4):
        scene.data(bytes(60_000))
    settle()
    assert scene.stream.recv(100) == b"all there is"
    with pytest.raises(StreamReset):
        scene.stream.recv(100)
    scene.expect_nothing()


@pytest.mark.parametrize("end", ["00 01 0004 ID 00000000", "00 01 0008 ID 00000000"], ids=["FIN", "RST"])
def test_late_data_up_to_a_window_is_not_held_against_the_peer(scene, end):
    """R7: 26,214 frames of ten bytes; ten thousand useless ones would end the session."""
    scene.send(end)
    late = literal("00 00 0000 ID 0000000a", scene.id) + bytes(10)
    for _ in range(26):
        scene.peer.send(late * 1000)
    scene.peer.send(late * 214)
    scene.peer.send(bytes.fromhex("00 02 0001 00000000 00000007"))
    scene.peer.expect(2, 2, 0, 7)
    assert scene.session.exception is None


# --- R8: what a read returns ---


def test_recv_returns_as_soon_as_a_part_of_a_frame_is_there(scene):
    """R8: it does not wait for the frame, still less for bufsize bytes."""
    reading = start(scene.stream.recv, 100)
    scene.send("00 00 0000 ID 00010000", b"abc")
    assert reading.get(timeout=LATE) == b"abc"
    scene.peer.send(b"def")
    settle()
    assert scene.stream.recv(2) == b"de"
    assert scene.stream.recv(2) == b"f"


def test_recv_returns_no_more_than_asked_for_across_frames(scene):
    """R8."""
    for body in (b"abc", b"defgh", b"i" * 5000, b"jk"):
        scene.data(body)
    settle()
    assert scene.stream.recv(2) == b"ab"
    got = b"ab"
    while len(got) < 5010:
        chunk = scene.stream.recv(4)
        assert 1 <= len(chunk) <= 4
        got += chunk
    assert got == b"abcdefgh" + b"i" * 5000 + b"jk"


@pytest.mark.parametrize(
    "frame",
    [
        "00 00 0000 ID 00000000",
        "00 00 0002 ID 00000000",
        "00 01 0000 ID 00000000",
        "00 01 0000 ID 00001000",
        "00 01 0002 ID 00000000",
        "00 02 0001 00000000 00000001",
        "00 03 0000 00000000 00000000",
    ],
    ids=["empty Data", "ACK on Data", "no credit", "credit", "ACK", "Ping", "GoAway"],
)
@pytest.mark.parametrize("reader", ["recv", "read1", "read", "peek", "readline"])
def test_nothing_but_a_fin_is_an_end(scene, frame, reader):
    """R8: a reader that waits is not deceived by frames without bytes."""
    reading = start(getattr(scene.stream, reader), 5)
    scene.send(frame)
    settle()
    assert not reading.ready()
    scene.data(b"abcde")
    assert reading.get(timeout=LATE) == b"abcde"


def test_the_end_comes_again_at_every_read(scene):
    """R8."""
    scene.data(b"x")
    scene.send("00 01 0004 ID 00000000")
    assert scene.stream.read() == b"x"
    stream = scene.stream
    reads = [stream.recv(1), stream.read(), stream.read(5), stream.read1(), stream.peek(), stream.readline()]
    assert reads == [b""] * 6
    assert [stream.readinto(bytearray(1)), stream.recv_into(bytearray(1)), stream.readlines()] == [0, 0, []]


@pytest.mark.parametrize("count", [1, 2, 7, 100, 5000])
def test_a_read_of_some_waits_for_all_of_them(scene, count):
    """R8: `read(n)` and `readinto` of n."""
    body = pattern(2 * count)
    reading = start(scene.stream.read, count)
    for index in range(count - 1):
        if count <= 100 or index % 1000 == 0:
            assert not reading.ready()
            settle()
        scene.data(body[index : index + 1])
    settle()
    assert not reading.ready()
    scene.data(body[count - 1 : count + 3])
    assert reading.get(timeout=LATE) == body[:count]
    buffer = bytearray(count)
    filling = start(scene.stream.readinto, buffer)
    scene.data(body[count + 3 :])
    assert filling.get(timeout=LATE) == count if count > 3 else True
    if count > 3:
        assert buffer == body[count:]


@pytest.mark.parametrize("read", [lambda s: s.read(10), lambda s: s.read(-1), lambda s: s.read(None)])
def test_a_read_gets_less_at_the_end_only(scene, read):
    """R8."""
    reading = start(read, scene.stream)
    scene.data(b"abc")
    settle()
    assert not reading.ready()
    scene.send("00 01 0004 ID 00000000")
    assert reading.get(timeout=LATE) == b"abc"


def test_readinto_gets_less_at_the_end_only(scene):
    """R8."""
    buffer = bytearray(b"......")
    reading = start(scene.stream.readinto, buffer)
    scene.data(b"abc")
    scene.send("00 01 0004 ID 00000000")
    assert reading.get(timeout=LATE) == 3
    assert buffer == b"abc..."


CUT_SHORT = {
    "read": lambda stream: stream.read(100),
    "read of all": lambda stream: stream.read(),
    "readinto": lambda stream: stream.readinto(bytearray(100)),
    "readline": lambda stream: stream.readline(),
    "iteration": lambda stream: next(stream),
    "readlines": lambda stream: stream.readlines(),
}


@pytest.mark.parametrize("how", ["timeout", "kill", "foreign timeout"])
@pytest.mark.parametrize("reader", [name for name in CUT_SHORT if name != "readlines"])
def test_what_a_read_had_when_it_was_cut_short_is_first_in_line_again(scene, reader, how):
    """R8: a timeout or kill in the middle loses no byte."""
    stream = scene.stream
    if how == "timeout":
        stream.settimeout(SOON)
    reading = gevent.spawn(_outcome, CUT_SHORT[reader], stream, SOON if how == "foreign timeout" else None)
    settle()
    scene.data(b"abc")
    scene.data(b"def")
    settle()
    scene.data(b"ghi")
    settle()
    if how == "kill":
        reading.kill()
    else:
        outcome = reading.get(timeout=LATE)
        assert outcome == ("TimeoutError", ("timed out",)) if how == "timeout" else outcome[0] == "Timeout"
    stream.settimeout(None)
    scene.data(b"jkl\n")
    scene.send("00 01 0004 ID 00000000")
    assert receive_all(stream) == b"abcdefghijkl\n"


def _outcome(function: Any, stream: Any, seconds: float | None) -> tuple[str, Any]:
    """What came of it: kind and arguments of the error."""
    try:
        with gevent.Timeout(seconds):
            function(stream)
    except (gevent.Timeout, OSError) as error:
        return type(error).__name__, error.args
    return "returned", ()


@pytest.mark.parametrize("reader", ["read", "readline"])
def test_bytes_put_back_stand_before_those_that_came_in_the_same_turn(reader):
    """R8: the kill strikes when the reader has been woken for more and has not run."""
    with played() as scene:
        first = scene.accept()
        second = scene.accept()
        reading = start(getattr(second, reader), 100)
        scene.data(b"abc")
        settle()
        first.rawlink(lambda _: reading.throw(gevent.GreenletExit))
        scene.peer.send(bytes.fromhex("00 00 0000 00000001 00000001 78 00 00 0000 00000003 00000003 646566"))
        reading.join(LATE)
        assert isinstance(reading.value, gevent.GreenletExit)
        assert second.stats().unread == 6
        assert second.recv(2) + second.recv(100) == b"abcdef"


def test_lines_read_before_a_timeout_are_not_repeated(scene):
    """R8: `readlines` gives up what it has; what was not a line yet stays."""
    scene.stream.settimeout(SOON)
    scene.data(b"one\ntwo\nthr")
    assert next(scene.stream) == b"one\n"
    assert next(scene.stream) == b"two\n"
    with pytest.raises(TimeoutError):
        next(scene.stream)
    assert scene.stream.recv(10) == b"thr"


def test_bytes_put_back_beyond_the_window_earn_no_credit_until_they_are_below_it(scene):
    """R8, R10: more than a window may be unread after a long read was killed."""
    half = pattern(131072)
    reading = start(scene.stream.read, 1 << 20)
    for _ in range(3):
        scene.data(half)
        scene.expect("00 01 0000 ID 00020000")
    reading.kill()
    settle()
    # 393,216 unread, and the peer may send 262,144 more: it was told so.
    scene.data(half)
    scene.data(half)
    assert scene.stream.read(131072 * 3 - 1) == (half * 3)[:-1]
    scene.expect_nothing()
    # Now 262,145 are unread; half a window below the limit is still far.
    assert scene.stream.read(131072) == half[-1:] + half[:-1]
    scene.expect_nothing()
    assert scene.stream.read(1) == half[-1:]
    scene.expect("00 01 0000 ID 00020000")
    assert scene.stream.read(131072) == half
    scene.expect("00 01 0000 ID 00020000")
    scene.expect_nothing()


def test_without_blocking_a_long_read_keeps_its_bytes(scene):
    """R8: `BlockingIOError`, and nothing is lost."""
    scene.stream.settimeout(0)
    scene.data(b"abc")
    settle()
    with pytest.raises(BlockingIOError) as caught:
        scene.stream.read(4)
    assert caught.value.errno == errno.EAGAIN
    with pytest.raises(BlockingIOError):
        scene.stream.readline()
    assert scene.stream.recv(10) == b"abc"


def test_reads_say_end_of_file_after_our_own_shutdown(scene):
    """R8, R16: shutdown(SHUT_RD) is the other way to get b""."""
    scene.data(b"unread")
    settle()
    scene.stream.shutdown(socket.SHUT_RD)
    assert [scene.stream.recv(10), scene.stream.read(), scene.stream.read(5)] == [b"", b"", b""]


def test_all_kinds_of_reads_take_from_one_buffer(ends):
    """R8: over every link, `readline`, `recv`, `read`, `peek` and `readinto` mix."""
    a, b = ends
    a.sendall(b"line\nabcdefghijkl")
    a.shutdown(socket.SHUT_WR)
    buffer = bytearray(3)
    assert b.readline() == b"line\n"
    assert b.recv(1) == b"a"
    assert b.read(2) == b"bc"
    assert b.peek(2)[:1] == b"d"
    assert b.readinto(buffer) == 3
    assert buffer == b"def"
    assert b.recv(1, socket.MSG_PEEK) == b"g"
    assert b.read(100) == b"ghijkl"
    assert b.read(100) == b""


@pytest.mark.parametrize("reader", READERS)
def test_a_blocked_reader_gets_everything_then_the_end_over_every_link(ends, reader):
    """R8."""
    a, b = ends
    body = pattern(3000)
    reading = start(READERS[reader], b)
    a.sendall(body[:1000])
    settle()
    a.sendall(body[1000:])
    a.close_write()
    assert reading.get(timeout=LATE) == body


# --- R9: truncation is an error ---


def _cut_close(theirs: Any) -> None:
    theirs.close()


def _cut_reset(theirs: Any) -> None:
    if isinstance(theirs, gsocket.socket) and theirs.family == gsocket.AF_INET:
        theirs.setsockopt(gsocket.SOL_SOCKET, gsocket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    theirs.close()


TRUNCATIONS = {
    "between frames": b"",
    "inside a header": bytes.fromhex("00 00 0000 00"),
    "inside a payload": bytes.fromhex("00 00 0000 00000001 00000064") + b"more",
    "behind a GoAway": bytes.fromhex("00 03 0000 00000000 00000000"),
    "behind a GoAway with an error": bytes.fromhex("00 03 0000 00000000 00000002"),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("blocked", [True, False], ids=["blocked", "late"])
@pytest.mark.parametrize("where", TRUNCATIONS)
def test_a_link_that_ends_without_fin_is_never_an_end_of_file(kind, reader, blocked, where):
    """R9: all links, TLS without close_notify among them, cut anywhere; what came can still be read."""
    with played(kind) as scene:
        scene.id = 1
        scene.send("00 01 0001 ID 00000000")
        scene.data(b"abc\ndef")
        stream = scene.session.accept(timeout=LATE)
        settle()
        reading = start(READERS[reader], stream) if blocked else None
        if TRUNCATIONS[where]:
            scene.peer.send(TRUNCATIONS[where])
        settle()
        _cut_reset(scene.peer.transport) if where == "between frames" else _cut_close(scene.peer.transport)
        assert scene.session.join(LATE)
        outcome = (reading or start(READERS[reader], stream)).get(timeout=LATE)
        assert isinstance(outcome, SessionError)
        assert outcome.errno == outcome.args[0] == errno.ECONNRESET
        assert outcome.__cause__ is not None
        for _ in range(2):
            with contextlib.suppress(SessionError):
                assert stream.recv(100) != b""
            with pytest.raises(SessionError):
                stream.recv(100)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("where", [name for name in TRUNCATIONS if "payload" not in name])
def test_every_byte_before_the_cut_can_be_read_and_then_comes_the_error(kind, where):
    """R9: nothing buffered is lost, in whatever pieces it is read."""
    with played(kind) as scene:
        scene.id = 1
        scene.send("00 01 0001 ID 00000000")
        body = pattern(100_000)
        scene.data(body)
        if TRUNCATIONS[where]:
            scene.peer.send(TRUNCATIONS[where])
        stream = scene.session.accept(timeout=LATE)
        wait_for(lambda: stream.stats().unread >= len(body))
        scene.peer.transport.close()
        assert scene.session.join(LATE)
        assert stream.read(1000) + stream.recv(10) + stream.read1(10) == body[:1020]
        # More than there is: an error, and the bytes stay.
        with pytest.raises(SessionError):
            stream.read(len(body))
        assert stream.read(len(body) - 1020) == body[1020:]
        with pytest.raises(SessionError):
            stream.recv(1)


@pytest.mark.parametrize("kind", KINDS)
def test_a_fin_before_the_cut_is_an_end_all_the_same(kind):
    """R9: the stream was whole; what became of the connection then does not matter."""
    with played(kind) as scene:
        scene.id = 1
        scene.send("00 01 0001 ID 00000000")
        scene.data(b"whole")
        scene.send("00 01 0004 ID 00000000")
        stream = scene.session.accept(timeout=LATE)
        settle()
        scene.peer.transport.close()
        assert scene.session.join(LATE)
        assert receive_all(stream) == b"whole"
        with pytest.raises(SessionError):
            stream.sendall(b"x")


def test_an_unaccepted_stream_can_be_accepted_and_read_after_the_cut():
    """R9: what came is there, then the error."""
    with played() as scene:
        scene.peer.send(bytes.fromhex("00 00 0001 00000001 00000003") + b"abc")
        scene.peer.send(bytes.fromhex("00 00 0005 00000003 00000003") + b"def")
        settle()
        scene.peer.close()
        assert scene.session.join(LATE)
        cut, whole = scene.session.accept(timeout=LATE), scene.session.accept(timeout=LATE)
        assert cut.recv(10) == b"abc"
        with pytest.raises(SessionError):
            cut.recv(10)
        assert receive_all(whole) == b"def"


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("text", ["00 01 0008 ID 0000002a", "00 01 000c ID 0000002a", "00 01 000a ID 0000002a"])
def test_a_reset_is_never_an_end_of_file(scene, reader, text):
    """R9: what is buffered is read, then the error; FIN in the same frame does not help."""
    scene.data(b"abc\ndef")
    settle()
    reading = start(READERS[reader], scene.stream)
    scene.send(text)
    outcome = reading.get(timeout=LATE)
    assert isinstance(outcome, StreamReset)
    assert (outcome.code, outcome.remote, outcome.errno) == (42, True, errno.ECONNRESET)
    with contextlib.suppress(StreamReset):
        assert scene.stream.recv(100) != b""
    with pytest.raises(StreamReset):
        scene.stream.recv(100)


def test_bytes_stay_readable_after_a_reset(scene):
    """R9."""
    body = pattern(WINDOW)
    scene.data(body)
    scene.send("00 01 0008 ID 00000000")
    wait_for(lambda: scene.stream.stats().state == "RESET")
    with pytest.raises(StreamReset):
        scene.stream.read(WINDOW + 1)
    assert scene.stream.read(WINDOW - 1) == body[:-1]
    assert scene.stream.recv(2) == body[-1:]
    for read in (lambda: scene.stream.recv(1), lambda: scene.stream.read(1), lambda: scene.stream.readline()):
        with pytest.raises(StreamReset):
            read()
    scene.expect_nothing()


def test_payload_of_the_resetting_frame_is_discarded(scene):
    """R9, R18: a Data frame with RST resets; its length is no code."""
    scene.data(b"abc")
    scene.data(b"not this", flags="0008")
    settle()
    assert scene.stream.recv(100) == b"abc"
    with pytest.raises(StreamReset) as caught:
        scene.stream.recv(100)
    assert caught.value.code == 0


def test_bytes_stay_readable_after_a_protocol_error(scene):
    """R9, R23: the session dies, what had come is there."""
    scene.data(b"abc")
    settle()
    scene.peer.send(bytes.fromhex("01 00 0000 00000000 00000000"))
    settle()
    assert scene.stream.recv(100) == b"abc"
    with pytest.raises(ProtocolError):
        scene.stream.recv(100)


@pytest.mark.parametrize("how", ["abort", "close"])
def test_bytes_stay_readable_after_the_session_was_ended_here(scene, how):
    """R9: the end of a session by our own hand takes nothing that had come."""
    scene.data(b"abc")
    settle()
    ending = gevent.spawn(scene.session.abort if how == "abort" else scene.session.close)
    settle()
    scene.peer.close()
    ending.get(timeout=LATE)
    assert scene.stream.recv(100) == b"abc"
    with pytest.raises(SessionClosed):
        scene.stream.recv(100)


@pytest.mark.parametrize("reader", READERS)
def test_a_reset_over_every_link_is_an_error_behind_the_bytes(ends, reader):
    """R9, R18."""
    a, b = ends
    a.sendall(b"abc\ndef")
    a.flush()
    wait_for(b.ready)
    reading = start(READERS[reader], b)
    a.reset(7)
    outcome = reading.get(timeout=LATE)
    assert isinstance(outcome, StreamReset)
    assert (outcome.code, outcome.remote) == (7, True)


@pytest.mark.parametrize("reader", READERS)
def test_the_end_of_the_other_session_is_an_error_behind_the_bytes(ends, reader):
    """R9: an abort on one side is no end of file on the other, whatever carries them."""
    a, b = ends
    a.sendall(b"abc\ndef")
    a.flush()
    wait_for(b.ready)
    reading = start(READERS[reader], b)
    a.session.abort()
    outcome = reading.get(timeout=LATE)
    assert isinstance(outcome, (SessionError, StreamReset))


@pytest.mark.parametrize("kind", ["tls12", "tls13"])
def test_an_error_inside_tls_is_told_apart_from_an_orderly_end(kind):
    """R9: with close_notify or without, a stream without FIN raises; none of it is an end of file."""
    with played(kind) as scene:
        scene.id = 1
        scene.send("00 01 0001 ID 00000000")
        scene.data(b"abc")
        stream = scene.session.accept(timeout=LATE)
        settle()
        closing = gevent.spawn(scene.peer.transport.unwrap)
        assert scene.session.join(LATE)
        assert stream.recv(10) == b"abc"
        with pytest.raises(SessionError):
            stream.recv(10)
        closing.kill()
        scene.peer.close()


def test_a_broken_transport_is_the_cause_that_the_reader_sees():
    """R9, R22."""
    with scene_of("server-accepted", kind="memory", faulty=True) as scene:
        scene.data(b"abc")
        settle()
        scene.transport.break_after("recv", 15, ConnectionResetError(errno.ECONNRESET, "broken by the test"))
        scene.data(b"def")
        assert scene.session.join(LATE)
        assert scene.stream.read(6) == b"abcdef"
        with pytest.raises(TransportError) as caught:
            scene.stream.recv(1)
        assert isinstance(caught.value.__cause__, ConnectionResetError)


# --- R10: credit ---


def test_credit_is_granted_at_half_a_window_and_for_all_that_was_taken(scene):
    """R10: not a byte earlier."""
    scene.data(bytes(200_000))
    settle()
    scene.expect_nothing()
    scene.stream.read(131071)
    scene.expect_nothing()
    scene.stream.read(1)
    scene.expect("00 01 0000 ID 00020000")
    scene.stream.read(200_000 - 131072)
    scene.expect_nothing()


def test_one_large_read_earns_one_grant_of_all_of_it(scene):
    """R10."""
    scene.data(bytes(200_001))
    wait_for(lambda: scene.stream.stats().unread == 200_001)
    assert len(scene.stream.recv(200_001)) == 200_001
    scene.expect("00 01 0000 ID 00030d41")
    scene.expect_nothing()


def test_grants_that_wait_are_merged(scene):
    """R10: two halves taken in one turn of the loop are one frame."""
    scene.data(bytes(WINDOW))
    wait_for(lambda: scene.stream.stats().unread >= WINDOW)
    scene.stream.read(131072)
    scene.stream.read(131072)
    scene.expect("00 01 0000 ID 00040000")
    scene.expect_nothing()


def test_credit_is_granted_once_whatever_is_written_between_the_reads(scene):
    """R10: what was taken, to the byte; else the peer sends too much one day, and pays for it."""
    pieces = (bytes(70_000), bytes(70_000), bytes(1_000))
    for piece in pieces:
        scene.data(piece)
    wait_for(lambda: scene.stream.stats().unread == 141_000)
    taken = len(scene.stream.recv(70_000)) + len(scene.stream.recv(69_900))  # credit is due, and waits
    scene.stream.sendall(b"ok")
    taken += len(scene.stream.recv(50))
    while scene.stream.stats().unread:
        taken += len(scene.stream.recv(1 << 20))
    granted, frame = 0, scene.peer.next()
    while frame.type == 1:
        granted, frame = granted + frame.length, scene.peer.next()
    assert frame.body == b"ok"
    scene.stream.sendall(b"end")
    while (frame := scene.peer.next()).type == 1:
        granted += frame.length
    stats = scene.stream.stats()
    assert taken == 141_000
    assert stats.receive_window == WINDOW - taken + granted
    assert granted <= taken


def test_a_reader_that_is_woken_for_nothing_gets_what_comes_later(scene):
    """R12: a wake is a hint."""
    reading = start(scene.stream.recv, 10)
    scene.stream._outbox.lane.wake_parked(scene.stream)
    settle()
    assert not reading.ready()
    scene.data(b"at last")
    assert reading.get(timeout=LATE) == b"at last"
    again = start(scene.stream.recv, 10)
    scene.data(b"and again")
    assert again.get(timeout=LATE) == b"and again"


def test_what_a_killed_reader_was_given_is_read_by_the_next(scene):
    """R14: it was handed to the greenlet, which did not come to take it."""
    reading = start(scene.stream.recv, 10)
    reading.kill(block=False)
    scene.stream._on_data(b"given")
    settle()
    assert reading.ready()
    assert scene.stream.stats().unread == 5
    assert scene.session.stats().unread == 5
    assert scene.stream.recv(10) == b"given"
    assert scene.session.stats().unread == 0


def test_what_is_unread_earns_no_credit(scene):
    """R10: that is the back-pressure."""
    scene.data(bytes(WINDOW))
    scene.expect_nothing()
    scene.stream.peek(1000)
    scene.stream.recv(1000, socket.MSG_PEEK)
    scene.expect_nothing()
    assert scene.stream.stats().unread == WINDOW


def test_a_blocked_read_of_more_than_a_window_keeps_granting(scene):
    """R10: or it would wait for ever."""
    body = pattern(1 << 20)
    reading = start(scene.stream.read, 1 << 20)
    sent, credit = 0, WINDOW
    while sent < len(body):
        if not credit:
            frame = scene.peer.next()
            assert (frame.type, frame.flags, frame.stream_id) == (1, 0, scene.id)
            assert frame.length >= 4096
            credit += frame.length
        piece = body[sent : sent + min(credit, 50_000)]
        scene.data(piece)
        sent, credit = sent + len(piece), credit - len(piece)
    assert reading.get(timeout=LATE) == body


def test_a_line_longer_than_a_window_arrives(scene):
    """R10."""
    line = b"x" * (WINDOW + 5000) + b"\n"
    reading = start(scene.stream.readline)
    scene.data(line[:WINDOW])
    credit = 0
    while credit < 5001:
        credit += scene.peer.next().length
    scene.data(line[WINDOW:])
    assert reading.get(timeout=LATE) == line


def test_nothing_is_granted_after_the_peers_fin(scene):
    """R10: neither for what is read then, nor for what was due before."""
    scene.data(bytes(WINDOW))
    wait_for(lambda: scene.stream.stats().unread == WINDOW)
    scene.stream.read(131071)
    scene.send("00 01 0004 ID 00000000")
    settle()
    assert scene.stream.read() == bytes(131073)
    scene.expect_nothing()


def test_a_grant_that_waits_is_taken_back_at_the_peers_fin():
    """R10: it had not left when the FIN came."""
    with scene_of("server-accepted", kind="memory", faulty=True) as scene:
        scene.transport.stall("send")
        scene.data(bytes(WINDOW))
        settle()
        # The first one is with the transport already; that it cannot be taken back is no fault.
        first = scene.session.open()
        settle()
        assert scene.stream.read(WINDOW) == bytes(WINDOW)
        settle()
        scene.send("00 01 0004 ID 00000000")
        settle()
        scene.transport.release("send")
        scene.peer.expect(1, 1, first.stream_id, 0)
        scene.expect_nothing()


@pytest.mark.parametrize("window", [262145, 1 << 20, 16 << 20])
@pytest.mark.parametrize("name", scenes.KINDS)
def test_a_larger_window_is_told_once_and_then_used_whole(name, window):
    """R10, R1, R6: on SYN or ACK; the grants come at half of it."""
    with scene_of(name, Config(max_stream_window=window)) as scene:
        half = (window + 1) // 2
        rest = window
        while rest:
            piece = min(rest, 1 << 20)
            scene.data(bytes(piece))
            rest -= piece
        scene.expect_nothing()
        wait_for(lambda: scene.stream.stats().unread >= window)
        scene.stream.read(half - 1)
        scene.expect_nothing()
        scene.stream.read(1)
        scene.expect(f"00 01 0000 ID {half:08x}")


CAUSES = "hashicorp.*go-yamux"


def overrun(scene: Scene, header: str) -> None:
    """A header beyond the window ends the session at once: RST, GoAway(1), and no word of the body was needed."""
    reading = start(scene.stream.read, 1 << 22)
    scene.send(header)
    frame = scene.peer.next()
    while (frame.type, frame.flags) == (1, 0):
        frame = scene.peer.next()
    assert (frame.type, frame.flags, frame.stream_id) == (1, 8, scene.id)
    scene.peer.expect(3, 0, 0, 1)
    outcome = reading.get(timeout=LATE)
    assert isinstance(outcome, ProtocolError)
    assert isinstance(scene.session.exception, ProtocolError)
    with pytest.raises(ProtocolError, match=CAUSES):
        raise outcome


def test_one_byte_more_than_the_window_in_one_frame_ends_the_session(scene):
    """R10: found from the header; 262,145 of 262,144."""
    overrun(scene, "00 00 0000 ID 00040001")


def test_one_byte_more_than_the_window_in_all_ends_the_session(scene):
    """R10: 262,143 came; two more are one too many."""
    scene.data(bytes(262143))
    settle()
    scene.send("00 00 0000 ID 00000002")
    scene.expect("00 01 0008 ID 00000000")
    scene.peer.expect(3, 0, 0, 1)


@pytest.mark.parametrize("flags", ["0002", "0004", "0006"])
def test_flags_on_the_frame_do_not_widen_the_window(scene, flags):
    """R10, R29: Data with ACK, FIN."""
    overrun(scene, f"00 00 {flags} ID 00040001")


@pytest.mark.parametrize("length", ["00100001", "7fffffff", "ffffffff"])
def test_absurd_lengths_end_the_session(scene, length):
    """R10."""
    overrun(scene, f"00 00 0000 ID {length}")


def test_bytes_taken_but_not_granted_do_not_count_as_window(scene):
    """R10: the peer was not told, so it must not send."""
    scene.data(bytes(WINDOW))
    settle()
    scene.stream.read(131071)
    scene.expect_nothing()
    scene.send("00 00 0000 ID 00000001")
    scene.expect("00 01 0008 ID 00000000")
    scene.peer.expect(3, 0, 0, 1)


def test_a_grant_is_usable_to_its_last_byte_and_no_further(scene):
    """R10."""
    scene.data(bytes(WINDOW))
    wait_for(lambda: scene.stream.stats().unread >= WINDOW)
    scene.stream.read(131072)
    scene.expect("00 01 0000 ID 00020000")
    scene.data(bytes(131072))
    settle()
    assert scene.session.exception is None
    scene.send("00 00 0000 ID 00000001")
    scene.expect("00 01 0008 ID 00000000")
    scene.peer.expect(3, 0, 0, 1)


def test_a_syn_may_bring_a_window_and_not_a_byte_more():
    """R10, R29."""
    with played() as scene:
        scene.peer.send(bytes.fromhex("00 00 0001 00000001 00040000") + bytes(WINDOW))
        assert scene.session.accept(timeout=LATE).read(WINDOW) == bytes(WINDOW)
        scene.peer.expect(1, 2, 1, 0)
        scene.peer.expect(1, 0, 1)
        scene.peer.send(bytes.fromhex("00 00 0001 00000003 00040001"))
        scene.peer.expect(1, 8, 1)
        scene.peer.expect(3, 0, 0, 1)
        assert scene.session.num_streams == 0


def test_before_our_ack_the_peer_has_the_initial_window_only():
    """R10, R6: however large it will be."""
    with played(config=Config(max_stream_window=1 << 20)) as scene:
        scene.peer.send(bytes.fromhex("00 01 0001 00000001 00000000"))
        scene.peer.send(bytes.fromhex("00 00 0000 00000001 00040000") + bytes(WINDOW))
        settle()
        assert scene.session.exception is None
        scene.peer.send(bytes.fromhex("00 00 0000 00000001 00000001"))
        scene.peer.expect(1, 8, 1)
        scene.peer.expect(3, 0, 0, 1)


def test_a_frame_as_large_as_the_window_is_taken_piecemeal(scene):
    """R10, R29: the reader gets its parts while it is under way."""
    body = pattern(WINDOW)
    reading = start(scene.stream.read, 1000)
    scene.send("00 00 0000 ID 00040000", body[:1000])
    assert reading.get(timeout=LATE) == body[:1000]
    scene.peer.send(body[1000:])
    assert scene.stream.read(WINDOW - 1000) == body[1000:]


class Ledger:
    """The peer's own account of one stream: what it may send, what was consumed, what it was granted."""

    def __init__(self, scene: Scene, window: int, body: Iterator[int]) -> None:
        self.scene = scene
        self.window = window
        self.body = body
        self.sent = bytearray()
        self.read = bytearray()
        self.granted = 0

    @property
    def credit(self) -> int:
        return self.window + self.granted - len(self.sent)

    def send(self, size: int) -> None:
        """Send so many bytes, or what the credit allows."""
        size = min(size, self.credit)
        piece = bytes(next(self.body) for _ in range(min(size, 64))) * (size // 64 + 1)
        self.scene.data(piece[:size])
        self.sent += piece[:size]

    def check(self) -> None:
        """After every step: what was granted was consumed, half a window is never withheld."""
        settle()
        frames = self.scene.frames_there()
        for found in frames:
            assert (found.type, found.flags, found.stream_id) == (1, 0, self.scene.id), str(found)
            assert found.length >= 4096
            self.granted += found.length
        unread = len(self.sent) - len(self.read)
        assert self.granted <= len(self.read)
        assert self.credit + unread <= self.window
        assert 2 * (len(self.read) - self.granted) < self.window
        assert self.scene.stream.stats().unread == unread


def _step(ledger: Ledger, act: str, size: int) -> None:
    stream = ledger.scene.stream
    there = len(ledger.sent) - len(ledger.read)
    if act == "send":
        ledger.send(size)
    elif act == "recv" and there:
        ledger.read += stream.recv(size)
    elif act == "read" and there:
        ledger.read += stream.read(min(size, there))
    elif act == "readinto" and there:
        buffer = bytearray(min(size, there))
        assert stream.readinto(buffer) == len(buffer)
        ledger.read += buffer
    elif act == "readline" and there:
        ledger.read += stream.readline(min(size, there))
    elif act == "peek" and there:
        assert stream.peek(size)
    elif act == "small frames":
        for _ in range(min(size, 200)):
            ledger.send(1)


@settings(max_examples=200, deadline=None)
@given(
    st.sampled_from(scenes.KINDS),
    st.sampled_from([262144, 262145, 400_000]),
    st.lists(
        st.tuples(
            st.sampled_from(["send", "send", "recv", "read", "readinto", "readline", "peek", "small frames"]),
            st.one_of(st.integers(1, 100), st.integers(1, 400_000), st.sampled_from([131071, 131072, 262144])),
        ),
        min_size=3,
        max_size=25,
    ),
)
def test_over_any_reads_the_account_is_exact(name, window, steps):
    """R10: granted never exceeds consumed, unread and credit never exceed the window, half is never withheld."""
    with scene_of(name, Config(max_stream_window=window), kind="memory", faulty=True) as scene:
        ledger = Ledger(scene, window, itertools.cycle(range(251)))
        for act, size in steps:
            _step(ledger, act, size)
            ledger.check()
        while len(ledger.read) < len(ledger.sent):
            ledger.read += scene.stream.recv(65536)
        ledger.check()
        assert ledger.read == ledger.sent
        # What is left may be used to the last byte; the next one ends the session.
        ledger.send(ledger.credit)
        settle()
        assert scene.session.exception is None
        scene.send("00 00 0000 ID 00000001")
        scene.expect("00 01 0008 ID 00000000")
        scene.peer.expect(3, 0, 0, 1)
        scene.transport.audit(client=name.startswith("client"), max_window=window)


@settings(max_examples=100, deadline=None)
@given(
    st.sampled_from(scenes.KINDS),
    st.lists(st.tuples(st.integers(1, 300_000), st.integers(1, 600_000), st.booleans()), min_size=1, max_size=8),
)
def test_reads_that_are_killed_do_not_disturb_the_account(name, rounds):
    """R8, R10: bytes put back are neither lost, nor repeated, nor credited twice."""
    with scene_of(name, kind="memory", faulty=True) as scene:
        ledger = Ledger(scene, WINDOW, itertools.cycle(range(251)))
        for amount, wanted, by_line in rounds:
            reading = start(scene.stream.readline if by_line else scene.stream.read, len(ledger.sent) + wanted)
            ledger.send(amount)
            settle()
            for found in scene.frames_there():
                ledger.granted += found.length
            reading.kill()
            if reading.value is not None and isinstance(reading.value, bytes):
                ledger.read += reading.value
        ledger.granted += sum(found.length for found in scene.frames_there())
        while len(ledger.read) < len(ledger.sent):
            ledger.read += scene.stream.recv(65536)
        assert ledger.read == ledger.sent
        settle()
        ledger.granted += sum(found.length for found in scene.frames_there())
        assert ledger.granted <= len(ledger.read)
        assert ledger.credit <= WINDOW
        assert 2 * (len(ledger.read) - ledger.granted) < WINDOW
        scene.transport.audit(client=name.startswith("client"))


def test_many_windows_pass_over_every_link_with_reads_of_any_size(ends):
    """R10: 1.5 MiB, and the account never stops the writer."""
    a, b = ends
    body = pattern(3 << 19)
    writing = start(a.sendall, body)
    got = bytearray()
    sizes = itertools.cycle([1, 10_000, 4096, 262144, 131071, 3, 70_000])
    while len(got) < len(body):
        size = next(sizes)
        got += b.read(min(size, len(body) - len(got))) if size % 2 else b.recv(size)
    assert bytes(got) == body
    assert writing.get(timeout=LATE) is None


# --- R11: small frames ---


def _feed_single_bytes(scene: Scene, count: int) -> None:
    body = b"".join(literal("00 00 0000 ID 00000001", scene.id) + bytes([number % 251]) for number in range(4096))
    for _ in range(count // 4096):
        scene.peer.send(body)
    wait_for(lambda: scene.stream.stats().unread >= count)


def test_a_window_of_single_bytes_takes_less_than_two_megabytes():
    """R11: 262,144 frames of one byte."""
    with scene_of("server-accepted") as scene:
        _feed_single_bytes(scene, 4096)
        scene.stream.read(4096)
        tracemalloc.start()
        try:
            before, _ = tracemalloc.get_traced_memory()
            _feed_single_bytes(scene, WINDOW - 4096)
            after, _ = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        assert after - before < 2 << 20
        assert len(scene.stream.read(WINDOW - 4096)) == WINDOW - 4096


def _seconds_to_read_back(count: int) -> float:
    with scene_of("server-accepted") as scene:
        _feed_single_bytes(scene, count)
        begin = time.perf_counter()
        got = b"".join(scene.stream.recv(1) for _ in range(count))
        seconds = time.perf_counter() - begin
        assert got == bytes(number % 251 for number in range(4096)) * (count // 4096)
        return seconds


def test_single_bytes_are_read_back_in_linear_time():
    """R11: four times as many take about four times as long, not sixteen; one attempt in three must show it."""
    ratios = []
    for _ in range(3):
        ratios.append(_seconds_to_read_back(WINDOW) / _seconds_to_read_back(WINDOW // 4))
        if ratios[-1] < 8:
            return
    pytest.fail(f"four times the bytes took {ratios} times as long")


# --- R12: several readers ---


def test_each_reader_keeps_its_turn_until_it_has_all(scene):
    """R12: first come, first served, and contiguous bytes for each."""
    first = start(scene.stream.read, 6)
    second = start(scene.stream.read, 4)
    third = start(scene.stream.recv, 100)
    scene.data(b"abc")
    settle()
    assert not first.ready() and not second.ready() and not third.ready()
    scene.data(b"defgh")
    assert first.get(timeout=LATE) == b"abcdef"
    settle()
    assert not second.ready()
    scene.data(b"ijkl")
    assert second.get(timeout=LATE) == b"ghij"
    assert third.get(timeout=LATE) == b"kl"


def test_nobody_overtakes_a_reader_that_waits(scene):
    """R12: a read that comes while bytes are there and others wait stands behind them."""
    first = start(scene.stream.read, 4)
    scene.data(b"ab")
    settle()
    late = start(scene.stream.recv, 10)
    assert not late.ready()
    scene.data(b"cdef")
    assert first.get(timeout=LATE) == b"abcd"
    assert late.get(timeout=LATE) == b"ef"


def test_in_the_very_turn_in_which_bytes_come_nobody_overtakes():
    """R12: the bytes are there, and who waits for them has been woken but has not run yet."""
    with played() as scene:
        first = scene.accept()
        second = scene.accept()
        order = []

        def read_both() -> None:
            first.recv(1)
            order.append(("late", second.recv(3)))

        late = start(read_both)
        waiting = start(lambda: order.append(("early", second.recv(3))))
        # Both wake in one turn, and the one that is late runs first.
        scene.peer.send(bytes.fromhex("00 00 0000 00000001 00000001 78 00 00 0000 00000003 00000003 616263"))
        settle()
        scene.data(b"def")
        gevent.joinall([late, waiting], timeout=LATE)
        assert order == [("early", b"abc"), ("late", b"def")]


@pytest.mark.parametrize("how", ["kill", "timeout"])
def test_a_reader_that_leaves_gives_its_place_and_its_bytes_to_the_next(scene, how):
    """R12, R8."""
    scene.stream.settimeout(SOON if how == "timeout" else None)
    first = start(scene.stream.read, 100)
    scene.stream.settimeout(None)
    second = start(scene.stream.read, 5)
    scene.data(b"abcdefg")
    settle()
    if how == "kill":
        first.kill()
    else:
        assert isinstance(first.get(timeout=LATE), TimeoutError)
    assert second.get(timeout=LATE) == b"abcde"
    assert scene.stream.recv(10) == b"fg"


def test_one_that_leaves_the_middle_of_the_line_harms_nobody(scene):
    """R12."""
    readers = [start(scene.stream.read, 2) for _ in range(5)]
    readers[2].kill()
    scene.data(b"aabbcc")
    settle()
    scene.data(b"dd")
    got = [reader.get(timeout=LATE) for index, reader in enumerate(readers) if index != 2]
    assert got == [b"aa", b"bb", b"cc", b"dd"]


def test_the_end_reaches_every_reader(scene):
    """R12, R8: the first gets the rest, the others the end."""
    readers = [start(scene.stream.read, 5) for _ in range(4)]
    scene.data(b"abc")
    scene.send("00 01 0004 ID 00000000")
    assert [reader.get(timeout=LATE) for reader in readers] == [b"abc", b"", b"", b""]


def test_a_reset_reaches_every_reader(scene):
    """R12, R9."""
    readers = [start(scene.stream.read, 5) for _ in range(4)]
    scene.send("00 01 0008 ID 00000000")
    assert all(isinstance(reader.get(timeout=LATE), StreamReset) for reader in readers)


def test_many_readers_share_a_body_without_loss(ends):
    """R12: over every link; each byte goes to one of them, in the order in which they asked."""
    a, b = ends
    body = pattern(40_000)
    pieces: dict[int, bytes] = {}

    def take(number: int) -> None:
        pieces[number] = b.read(400)

    readers = [gevent.spawn(take, number) for number in range(100)]
    settle()
    for start_at in range(0, len(body), 777):
        a.sendall(body[start_at : start_at + 777])
        gevent.sleep(0)
    gevent.joinall(readers, timeout=LATE, raise_error=True)
    assert b"".join(pieces[number] for number in range(100)) == body
