"""What a peer may send, wrong or strange: rules 4, 7, 15, 23 and 29.

Either a frame is a protocol error, then nothing of it takes effect, every unfinished stream gets RST and GoAway(1) is the
last frame; or it is not, then the session goes on as if nothing had been. There is no third way.

Longer than other modules because all tests of one subject stand together, each short and by itself.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
from typing import NamedTuple

import gevent
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from geyamux import Config, ProtocolError, RemoteError, RemoteGoAway, SessionError, StreamReset, YamuxError
from support.facing import OWN, PEERS, ROLES, facing, narrow_pair, outcome, session_over, start
from support.rawpeer import RawPeer, WireError, settle
from support.transports import FaultyTransport, memory_pair
from support.wire import (
    ACK,
    DATA,
    FIN,
    GO_AWAY,
    PING,
    RST,
    SYN,
    WINDOW_UPDATE,
    Decoder,
    data,
    frame,
    go_away,
    ping,
    window_update,
)

WINDOW = 262144

both_roles = pytest.mark.parametrize("role", ROLES)


def expect_go_away(peer, *resets):
    """RST for these streams in any order, then GoAway(1), and nothing behind it to the end of the connection."""
    ids = {peer.expect(WINDOW_UPDATE, RST, length=0).stream_id for _ in resets}
    assert ids == set(resets)
    peer.expect(GO_AWAY, 0, 0, 1)
    peer.expect_eof()


# --- every type, with all flags, on every kind of id ---

KINDS = (
    "zero",
    "own unused",
    "own live",
    "own ended",
    "peer's unused",
    "peer's live",
    "peer's, finished by it",
    "peer's, finished here",
    "peer's, closed here",
    "peer's ended",
    "peer's refused",
)
UNHELD = ("zero", "own unused", "own ended", "peer's unused", "peer's ended", "peer's refused")
#: Where our FIN has gone, a protocol error resets nothing.
FINISHED_HERE = ("peer's, finished here", "peer's, closed here")


class Scene(NamedTuple):
    session: object
    peer: RawPeer
    kind: str
    stream_id: int
    stream: object


def set_up(session, peer, role, kind):
    """Bring a stream into the state that `kind` says."""
    own, theirs = OWN[role][0], PEERS[role][0]
    if kind in ("zero", "own unused", "peer's unused"):
        return Scene(session, peer, kind, {"z": 0, "o": own + 1000, "p": theirs + 1000}[kind[0]], None)
    if kind.startswith("own"):
        stream = session.open()
        peer.expect(WINDOW_UPDATE, SYN, own)
        if kind == "own ended":
            stream.reset()
            peer.expect(WINDOW_UPDATE, RST, own)
        return Scene(session, peer, kind, own, stream)
    if kind == "peer's refused":
        session._table.is_refusing = True
        peer.send(window_update(theirs, 0, SYN))
        peer.expect(WINDOW_UPDATE, RST, theirs)
        session._table.is_refusing = False
        return Scene(session, peer, kind, theirs, None)
    peer.send(window_update(theirs, 0, SYN | (FIN if kind == "peer's, finished by it" else 0)))
    stream = session.accept(timeout=5)
    peer.expect(WINDOW_UPDATE, ACK, theirs)
    if kind == "peer's ended":
        peer.send(window_update(theirs, 0, RST))
    elif kind in FINISHED_HERE:
        stream.close() if kind == "peer's, closed here" else stream.close_write()
        peer.expect(WINDOW_UPDATE, FIN, theirs)
    settle()
    return Scene(session, peer, kind, theirs, stream)


def judge(kind, flags):
    """What Data and WindowUpdate mean for an id, in the words of the specification's tables."""
    if flags & SYN:
        if kind not in UNHELD or kind == "zero" or kind.startswith("own"):
            return "error"
        return "nothing" if flags & RST else "opens"
    if kind in UNHELD:
        return "nothing"
    return "resets" if flags & RST else "taken"


def check_nothing(scene):
    with pytest.raises(TimeoutError):
        scene.session.accept(timeout=0)
    if scene.stream is None:
        assert scene.session.num_streams == 0


def check_opens(scene, frame_type, flags, length):
    assert scene.session.num_streams == 1
    stream = scene.session.accept(timeout=0)
    assert stream.stream_id == scene.stream_id
    scene.peer.expect(WINDOW_UPDATE, ACK, scene.stream_id)
    assert stream.stats().send_credit == WINDOW + (length if frame_type == WINDOW_UPDATE else 0)
    check_reads(stream, b"hello" if frame_type == DATA and length else b"", flags & FIN)


def check_reads(stream, expected, fin):
    if expected:
        assert stream.recv(100) == expected
    if fin:
        assert stream.recv(100) == b""
    else:
        assert not stream.ready()


def check_resets(scene, frame_type, length):
    assert scene.session.num_streams == 0
    if scene.stream.closed:
        return
    code = length if frame_type == WINDOW_UPDATE else 0
    for call in (scene.stream.recv, scene.stream.send):
        if call == scene.stream.recv and scene.kind == "peer's, finished by it":
            assert call(10) == b"", "an EOF that was there stays"
            continue
        with pytest.raises(StreamReset) as caught:
            call(b"x" if call == scene.stream.send else 10)
        assert (caught.value.code, caught.value.remote, caught.value.errno) == (code, True, errno.ECONNRESET)


def check_taken(scene, frame_type, flags, length):
    stream, has_ended_here = scene.stream, scene.kind in FINISHED_HERE
    ends = bool(flags & FIN) and has_ended_here
    assert scene.session.num_streams == (0 if ends else 1)
    assert stream.established
    if stream.closed:
        return
    if not has_ended_here:
        assert stream.stats().send_credit == WINDOW + (length if frame_type == WINDOW_UPDATE else 0)
    was_finished = scene.kind == "peer's, finished by it"
    delivered = b"hello" if frame_type == DATA and length and not was_finished else b""
    check_reads(stream, delivered, was_finished or flags & FIN)


@both_roles
@pytest.mark.parametrize("flags", [*range(16), 0xFFF0, 0xFFF1, 0xFFF2, 0xFFF4, 0xFFF8])
@pytest.mark.parametrize("frame_type", [DATA, WINDOW_UPDATE], ids=["Data", "WindowUpdate"])
def test_every_stream_frame_on_every_id_does_what_the_tables_say(role, frame_type, flags):
    """Rules 4, 7 and 29; unknown flag bits say nothing."""
    for kind, length in itertools.product(KINDS, (0, 5)):
        with facing(role) as (session, peer):
            scene = set_up(session, peer, role, kind)
            verdict = judge(kind, flags)
            body = b"hello" if frame_type == DATA and length else b""
            peer.send(frame(frame_type, flags, scene.stream_id, length, body))
            if verdict == "error":
                settle()
                assert isinstance(session.exception, ProtocolError), kind
                with pytest.raises(ProtocolError):
                    session.accept(timeout=0)
                is_unfinished = kind not in UNHELD and kind not in FINISHED_HERE
                peer.transport.shutdown(1)
                expect_go_away(peer, *([scene.stream_id] if is_unfinished else []))
                continue
            peer.send(bytes.fromhex("0002 0001 00000000 0000abcd"))
            peer.expect(PING, ACK, 0, 0xABCD)
            if verdict == "nothing":
                check_nothing(scene)
            elif verdict == "opens":
                check_opens(scene, frame_type, flags, length)
            elif verdict == "resets":
                check_resets(scene, frame_type, length)
            else:
                check_taken(scene, frame_type, flags, length)
            peer.expect_nothing()


@both_roles
@pytest.mark.parametrize("flags", [*range(16), 0xFFF0, 0xFFF1, 0xFFFF])
def test_a_ping_with_syn_asks_and_any_other_answers_whatever_its_stream_id(role, flags):
    """Rules 26 and 29: our answer bears stream 0 and exactly ACK."""
    for stream_id in (0, 1, 2, 3, 4, 0xFFFFFFFF):
        with facing(role) as (session, peer):
            session.open()
            peer.expect(WINDOW_UPDATE, SYN, OWN[role][0])
            peer.send(frame(PING, flags, stream_id, 0xFEDCBA98))
            if flags & SYN:
                settle()
                assert peer.transport.recv(100) == bytes.fromhex("0002 0002 00000000 fedcba98")
            peer.expect_nothing()
            assert (session.num_streams, session.closed) == (1, False)


@both_roles
@pytest.mark.parametrize("flags", [*range(16), 0xFFF0, 0xFFFF])
def test_flags_and_stream_id_of_go_away_are_ignored(role, flags):
    """Rule 29."""
    for stream_id, code in itertools.product((0, 1, 2, 5), (0, 1, 2, 77, 0xFFFFFFFF)):
        with facing(role) as (session, peer):
            stream = session.open()
            peer.send(frame(GO_AWAY, flags, stream_id, code))
            settle()
            if code == 0:
                assert not session.closed
                with pytest.raises(RemoteGoAway):
                    session.open()
                stream.sendall(b"still")
            else:
                assert isinstance(session.exception, RemoteError) and session.exception.code == code
                with pytest.raises(RemoteError) as caught:
                    stream.recv(1)
                assert caught.value.code == code


# --- headers that can't be ---


def bad_headers(role):
    """Whole frames, each of them a protocol error in a session whose first own and first peer's stream are live."""
    own, theirs, fresh = OWN[role][0], PEERS[role][0], PEERS[role][4]
    for version, kind in itertools.product((1, 2, 0x7F, 0xFF), (DATA, WINDOW_UPDATE, PING, GO_AWAY)):
        yield f"version {version} type {kind}", bytes([version, kind]) + bytes.fromhex("0000 00000000 00000000")
    for kind in (4, 5, 0x7F, 0xFF):
        yield f"type {kind}", bytes([0, kind]) + bytes.fromhex("0000 00000000 00000000")
        yield f"type {kind} on a live stream", frame(kind, SYN | ACK | FIN | RST, theirs, 5)
    for flags in (SYN, SYN | ACK, SYN | FIN, SYN | RST, 0xFFF1):
        for name, stream_id in (("0", 0), ("of ours", own + 100), ("of ours, live", own), ("live", theirs)):
            yield f"SYN {flags:#x} on Data, id {name}", data(stream_id, b"hello", flags)
            yield f"SYN {flags:#x} on WindowUpdate, id {name}", window_update(stream_id, 7, flags)
    for flags in (0, ACK, FIN, RST, ACK | FIN | RST):
        yield f"beyond the window, flags {flags}", data(theirs, bytes(WINDOW + 1), flags)
        yield f"beyond the window of ours, flags {flags}", data(own, bytes(WINDOW + 1), flags)
        yield f"beyond any window, flags {flags}", data(fresh, bytes(WINDOW + 1), flags)
    for flags in (SYN, SYN | FIN, SYN | RST):
        yield f"beyond the window of a new stream, flags {flags}", data(fresh, bytes(WINDOW + 1), flags)
    for flags in (0, ACK, FIN):
        yield f"credit overflow, flags {flags}", window_update(theirs, 0xFFFC0000, flags)
        yield f"credit overflow on ours, flags {flags}", window_update(own, 0xFFFFFFFF, flags)
    yield "credit overflow with SYN", window_update(fresh, 0xFFFC0000, SYN)
    yield "credit overflow with SYN and FIN", window_update(fresh, 0xFFFFFFFF, SYN | FIN)


BAD = [pytest.param(role, wire, id=f"{role}: {name}") for role in ROLES for name, wire in bad_headers(role)]


def two_streams(session, peer, role):
    """One stream of each side, live, each with unread bytes."""
    own = session.open()
    peer.send(window_update(PEERS[role][0], 0, SYN) + data(PEERS[role][0], b"before"))
    peer.send(data(OWN[role][0], b"before"))
    theirs = session.accept(timeout=5)
    peer.expect(WINDOW_UPDATE, SYN, own.stream_id)
    peer.expect(WINDOW_UPDATE, ACK, theirs.stream_id)
    # So that a frame beyond the window is not beyond it by those bytes alone.
    return own, theirs


@pytest.mark.parametrize(("role", "wire"), BAD)
def test_a_bad_header_ends_the_session_with_rst_then_go_away_1(role, wire):
    """Rules 23 and 29: the header alone is enough; what comes behind it is thrown away, whatever it is."""
    with facing(role) as (session, peer):
        own, theirs = two_streams(session, peer, role)
        before = session.stats()
        reading, accepting = start(own.read), start(session.accept)
        peer.send(wire[:12])
        settle()
        after = session.stats()
        assert isinstance(session.exception, ProtocolError)
        assert session.closed and session.exception.errno == errno.ECONNRESET
        assert isinstance(outcome(reading), ProtocolError) and isinstance(outcome(accepting), ProtocolError)
        assert (after.opened, after.incoming, after.backlog) == (before.opened, before.incoming, before.backlog)
        peer.send(wire[12:4096] + window_update(PEERS[role][3], 0, SYN) + b"rubbish" * 100)
        peer.transport.shutdown(1)
        expect_go_away(peer, own.stream_id, theirs.stream_id)
        assert session.join(5)
        for stream in (own, theirs):
            assert stream.stats().send_credit == WINDOW
            assert stream.recv(100) == b"before", "what was buffered stays readable"
            with pytest.raises(ProtocolError) as caught:
                stream.recv(100)
            assert caught.value is not session.exception and caught.value.__cause__ is session.exception


@pytest.mark.parametrize(("role", "wire"), BAD)
def test_nothing_of_a_bad_frame_takes_effect_when_it_comes_whole(role, wire):
    """Rule 29: no byte is delivered, no stream begins or ends, also of the frames behind it."""
    with facing(role) as (session, peer):
        own, theirs = two_streams(session, peer, role)
        sending = start(peer.send, wire + window_update(own.stream_id, 0, FIN) + window_update(PEERS[role][3], 0, SYN))
        settle()
        assert outcome(sending) is None
        for stream in (own, theirs):
            assert stream.recv(1 << 20) == b"before"
            with pytest.raises(ProtocolError):
                stream.recv(1)
        with pytest.raises(ProtocolError):
            session.accept()
        assert session.stats().incoming == 1
        peer.transport.shutdown(1)
        expect_go_away(peer, own.stream_id, theirs.stream_id)


@pytest.mark.parametrize(("role", "wire"), BAD)
def test_a_bad_header_is_found_however_the_bytes_are_cut(role, wire):
    """Rule 29: byte by byte, and with good frames in front in the same receive."""
    own, theirs = OWN[role][0], PEERS[role][0]
    front = window_update(theirs, 0, SYN) + data(theirs, b"before") + data(own, b"before") + ping(SYN, 5)
    for max_recv in (1, 5, 12, 1 << 20):
        near, far = memory_pair(1 << 20)
        session, peer = session_over(FaultyTransport(near, max_recv=max_recv), role), RawPeer(far)
        stream = session.open()
        settle()
        peer.send(front + wire[:40])
        settle()
        assert isinstance(session.exception, ProtocolError)
        assert stream.recv(100) == b"before"
        with pytest.raises(ProtocolError):
            stream.recv(100)
        peer.transport.shutdown(1)
        frames = [(found.type, found.flags, found.stream_id, found.length) for found in peer.rest()]
        assert set(frames[:-1]) == {
            (WINDOW_UPDATE, SYN, own, 0),
            (PING, ACK, 0, 5),
            (WINDOW_UPDATE, RST, own, 0),
            (WINDOW_UPDATE, RST, theirs, 0),
        }
        assert frames[-1] == (GO_AWAY, 0, 0, 1)
        assert session.join(5)


# --- what is reset, and what is not ---


def test_only_streams_whose_fin_has_not_gone_are_reset():
    """Rule 23: a stream that was finished here may still be read to its end by the peer."""
    with facing("client") as (session, peer):
        live, finished, closed = session.open(), session.open(), session.open()
        peer.send(b"".join(window_update(stream_id, 0, SYN) for stream_id in (2, 4, 6, 8)))
        accepted, half, done = (session.accept(timeout=5) for _ in range(3))  # 8 is never accepted
        finished.close_write()
        closed.close()
        done.close()
        peer.send(window_update(4, 0, FIN) + window_update(6, 0, FIN))
        settle()
        assert len(peer.transport.recv(1000)) == 12 * (3 + 3 + 3)
        peer.send(bytes.fromhex("01000000 00000000 00000000"))
        peer.transport.shutdown(1)
        expect_go_away(peer, live.stream_id, accepted.stream_id, half.stream_id, 8)


def test_a_stream_whose_syn_has_not_left_vanishes():
    """Rules 18 and 23: the peer never hears of it."""
    with facing("client") as (session, peer):
        _on_protocol_error = session._on_protocol_error

        def open_first(error):
            session.open()
            _on_protocol_error(error)

        session._on_protocol_error = open_first
        peer.send(bytes.fromhex("01000000 00000000 00000000"))
        peer.transport.shutdown(1)
        expect_go_away(peer)


def test_go_away_is_the_last_frame_even_where_much_waits():
    """Rule 23: behind the rest of a frame that had begun; what had not is dropped with its stream."""
    near, far = narrow_pair()
    with facing("client", ends=(near, far)) as (session, peer):
        streams = [session.open() for _ in range(3)]
        writing = [start(stream.sendall, b"x" * 100_000) for stream in streams]
        peer.send(bytes.fromhex("01000000 00000000 00000000"))
        settle()
        for greenlet in writing:
            assert isinstance(outcome(greenlet), ProtocolError)
        peer.transport.shutdown(1)
        frames = peer.rest()
        assert (frames[-1].type, frames[-1].length) == (GO_AWAY, 1)
        resets = [found.stream_id for found in frames if found.flags == RST]
        assert sorted(resets) == [1, 3, 5]
        for stream_id in (1, 3, 5):
            assert [found.flags for found in frames if found.stream_id == stream_id][-1] == RST


def test_a_peer_that_reads_nothing_does_not_hold_up_the_end():
    """Rule 23: within close_timeout, from the error on."""
    with facing("client", Config(close_timeout=0.05), ends=narrow_pair()) as (session, peer):
        stream = session.open()
        writing = start(stream.sendall, b"x" * 200_000)
        peer.send(bytes.fromhex("00ff0000 00000000 00000000"))
        assert isinstance(outcome(writing), ProtocolError)
        with gevent.Timeout(2):
            assert session.join()


def test_a_peer_that_goes_on_sending_does_not_hold_up_the_end():
    """Rule 23: its bytes are thrown away, for as long as close_timeout reaches."""
    with facing("client", Config(close_timeout=0.05)) as (session, peer):
        peer.send(bytes.fromhex("00ff0000 00000000 00000000"))

        def flood():
            with contextlib.suppress(OSError):
                while True:
                    peer.send(data(2, b"x" * 10_000, SYN))
                    gevent.sleep(0)

        flooding = gevent.spawn(flood)
        with gevent.Timeout(2):
            assert session.join()
        flooding.join(5)
        assert flooding.ready()
        assert session.stats().incoming == 0


def test_a_protocol_error_while_closing_ends_the_wait_with_go_away_1():
    """Rules 20 and 23: a FIN that close() waits for can't be believed any more."""
    with facing("client", Config(close_timeout=30.0)) as (session, peer):
        session.open().close_write()
        closing = start(session.close)
        peer.expect(WINDOW_UPDATE, SYN, 1)
        peer.expect(WINDOW_UPDATE, FIN, 1)
        peer.expect_nothing()
        peer.send(bytes.fromhex("01000000 00000000 00000000"))
        peer.expect(GO_AWAY, 0, 0, 1)
        peer.close()
        assert outcome(closing) is None


def test_the_error_says_what_the_peer_did():
    """Rules 10 and 23: an excess names the known causes of it."""
    for wire, words in (
        (bytes.fromhex("07000000 00000000 00000000"), ("version 7",)),
        (bytes.fromhex("00090000 00000000 00000000"), ("type 9",)),
        (bytes.fromhex("00010001 00000003 00000000"), ("stream 3",)),
        (bytes.fromhex("00000001 00000002 00040001"), ("stream 2", "262145")),
        (bytes.fromhex("00010001 00000002 00000000 00000000 00000002 00040001"), ("262145", "262144", "hashicorp")),
        (bytes.fromhex("00010001 00000002 fffc0000"), ("stream 2", "overflow")),
    ):
        with facing("client") as (session, peer):
            peer.send(wire)
            settle()
            assert all(word in str(session.exception) for word in words), session.exception


# --- windows and credit at their edges ---


def test_a_frame_as_large_as_the_whole_window_is_taken_piecemeal():
    """Rule 29: bytes can be read before the frame is complete."""
    with facing("server") as (session, peer):
        peer.send(window_update(1, 0, SYN) + data(1, b"x" * WINDOW)[: 12 + 5])
        stream = session.accept(timeout=5)
        assert stream.recv(100) == b"xxxxx"
        peer.send(b"x" * (WINDOW - 5))
        assert stream.read(WINDOW - 5) == b"x" * (WINDOW - 5)


def test_a_first_frame_with_syn_may_fill_the_initial_window():
    """Rule 7."""
    with facing("server") as (session, peer):
        peer.send(data(1, b"x" * WINDOW, SYN | FIN))
        assert session.accept(timeout=5).read() == b"x" * WINDOW


@pytest.mark.parametrize(
    ("config", "largest"),
    [
        (Config(), WINDOW),
        (Config(max_stream_window=1 << 20), 1 << 20),
        (Config(window_auto_tune=True), 16 << 20),
        (Config(window_auto_tune=1 << 21), 1 << 21),
    ],
    ids=["default", "1 MiB", "tuned", "tuned to 2 MiB"],
)
def test_data_for_an_unheld_id_is_drained_up_to_the_largest_window_there_could_be(config, largest):
    """Rule 29: one byte more is a protocol error, found from the header."""
    with facing("server", config) as (session, peer):
        header = frame(DATA, 0, 99, largest)
        sending = start(peer.send, header + bytes(largest) + ping(SYN, 1))
        if config.window_auto_tune:
            peer.expect(PING, SYN)  # the round trip is measured from the beginning
        peer.expect(PING, ACK, 0, 1)
        assert outcome(sending) is None
        assert (session.num_streams, session.stats().unread) == (0, 0)
        peer.send(frame(DATA, 0, 99, largest + 1))
        peer.transport.shutdown(1)
        expect_go_away(peer)


def test_credit_may_reach_2_to_the_32_less_1():
    """Rule 15: and not one more."""
    with facing("server") as (session, peer):
        peer.send(window_update(1, 0xFFFBFFFF, SYN) + window_update(3, 0, SYN) + window_update(3, 0xFFFBFFFE))
        first, second = session.accept(timeout=5), session.accept(timeout=5)
        settle()
        assert (first.stats().send_credit, second.stats().send_credit) == (0xFFFFFFFF, 0xFFFFFFFE)
        peer.send(window_update(3, 1) + ping(SYN, 1))
        settle()
        assert not session.closed
        peer.send(window_update(3, 1))
        settle()
        assert "overflow" in str(session.exception)


def test_a_length_on_rst_is_a_code_whatever_its_value():
    """Rule 18: never credit, so it can't overflow."""
    with facing("server") as (session, peer):
        peer.send(window_update(1, 0, SYN))
        stream = session.accept(timeout=5)
        peer.send(window_update(1, 0xFFFFFFFF, RST) + window_update(3, 0xFFFFFFFF, SYN | RST))
        with pytest.raises(StreamReset) as caught:
            stream.recv(1)
        assert caught.value.code == 0xFFFFFFFF
        assert (session.closed, session.num_streams) == (False, 0)


def test_data_behind_the_fin_of_its_sender_is_drained():
    """Rule 7: some peers' writes race their close."""
    with facing("server") as (session, peer):
        peer.send(data(1, b"all", SYN | FIN) + data(1, b"late" * 1000) + window_update(1, 0, FIN) + ping(SYN, 1))
        stream = session.accept(timeout=5)
        assert stream.read() == b"all"
        assert stream.read() == b""
        peer.expect(PING, ACK, 0, 1)
        peer.expect(WINDOW_UPDATE, ACK, 1, 0)
        peer.expect_nothing()
        assert session.stats().unread == 0


def test_what_data_behind_a_fin_takes_is_still_held_to_the_window():
    """Rules 7 and 10: drained, not unlimited."""
    with facing("server") as (session, peer):
        peer.send(data(1, b"all", SYN | FIN) + data(1, bytes(WINDOW - 3)) + ping(SYN, 1))
        peer.expect(PING, ACK, 0, 1)
        assert not session.closed
        peer.send(data(1, b"x"))
        peer.transport.shutdown(1)
        expect_go_away(peer, 1)


def test_payload_then_credit_then_fin_take_effect_before_anyone_is_woken():
    """Rule 29 and 2.6: nobody sees the FIN before the payload of the same frame."""
    with facing("client") as (session, peer):
        stream = session.open()
        reading = start(stream.read)
        peer.send(data(1, b"payload", ACK | FIN))
        assert outcome(reading) == b"payload"


def test_a_payload_that_comes_in_pieces_is_followed_by_its_fin_only_at_its_end():
    """Rule 29."""
    with facing("client") as (session, peer):
        stream = session.open()
        wire = data(1, b"payload", FIN)
        reading = start(stream.read)
        for position in range(len(wire)):
            peer.send(wire[position : position + 1])
            settle()
            assert reading.ready() == (position == len(wire) - 1)
        assert outcome(reading) == b"payload"


def test_a_reset_on_data_takes_effect_at_the_end_of_its_payload_and_the_payload_is_lost():
    """Rules 7 and 29: RST wins over all else in the frame."""
    with facing("client") as (session, peer):
        stream = session.open()
        peer.send(data(1, b"kept") + data(1, b"lost", ACK | FIN | RST) + data(1, b"late") + ping(SYN, 1))
        peer.expect(WINDOW_UPDATE, SYN, 1)
        peer.expect(PING, ACK, 0, 1)
        assert stream.recv(100) == b"kept"
        with pytest.raises(StreamReset):
            stream.recv(100)


# --- the same however it is cut ---

#: A little of everything that is allowed, towards a server.
SCRIPT = b"".join(
    (
        bytes.fromhex("0001 0001 00000001 00001000"),  # opens 1 with credit
        bytes.fromhex("0000 0000 00000001 00000005") + b"hello",
        bytes.fromhex("0000 0005 00000003 00000003") + b"end",  # opens 3, all of it
        bytes.fromhex("0001 0009 00000005 00000007"),  # SYN and RST: nothing
        bytes.fromhex("0000 0000 0000000b 00000004") + b"lost",  # never opened
        bytes.fromhex("0000 0000 00000001 00000000"),
        bytes.fromhex("0001 0000 00000001 00000000"),
        bytes.fromhex("0002 0001 00000000 01020304"),
        bytes.fromhex("0002 0002 00000000 deadbeef"),  # an answer nobody asked for
        bytes.fromhex("0001 0001 00000009 00000000"),
        bytes.fromhex("0001 0008 00000009 0000002a"),  # opened and reset: gone
        bytes.fromhex("0000 0000 00000003 00000004") + b"late",
        bytes.fromhex("0001 0002 00000001 00000000"),  # an ACK from the opener means nothing
        bytes.fromhex("0001 0000 00000001 00000100"),
        bytes.fromhex("0000 fff4 00000001 00000007") + b" world\n",
        bytes.fromhex("0003 0000 00000000 00000000"),
    )
)


def check_script(session, peer):
    first, second = session.accept(timeout=5), session.accept(timeout=5)
    settle()
    assert first.stats().send_credit == WINDOW + 0x1000 + 0x100
    assert (first.read(), second.read()) == (b"hello world\n", b"end")
    assert session.stats().backlog == 0
    with pytest.raises(RemoteGoAway):
        session.open()
    frames = sorted((peer.next() for _ in range(3)), key=lambda found: (found.type, found.stream_id))
    assert [(found.type, found.flags, found.stream_id, found.length) for found in frames] == [
        (WINDOW_UPDATE, ACK, 1, 0),
        (WINDOW_UPDATE, ACK, 3, 0),
        (PING, ACK, 0, 0x01020304),
    ]
    peer.expect_nothing()


@pytest.mark.parametrize("max_recv", [1, 2, 3, 7, 11, 12, 13, 17, 64, 100_000])
def test_a_script_has_the_same_effect_in_pieces_of_every_size(max_recv):
    """Rule 29."""
    with facing("server", kind="memory", wrap=lambda end: FaultyTransport(end, max_recv=max_recv)) as (session, peer):
        peer.send(SCRIPT)
        check_script(session, peer)


def test_a_script_has_the_same_effect_cut_in_two_anywhere():
    """Rule 29: on a descriptor, too."""
    for cut in range(1, len(SCRIPT)):
        with facing("server") as (session, peer):
            peer.send(SCRIPT[:cut])
            settle()
            peer.send(SCRIPT[cut:])
            check_script(session, peer)


@pytest.mark.parametrize("cut", [0, 1, 11, 12, 13, 20, 29, 100, len(SCRIPT)])
def test_bytes_that_were_read_before_the_session_began_are_taken_in_first(cut):
    """`initial`: what a caller has peeked at."""
    with facing("server", kind="socketpair") as (unused, _):
        unused.abort()
    near, far = memory_pair()
    session, peer = session_over(near, "server", initial=SCRIPT[:cut]), RawPeer(far)
    try:
        peer.send(SCRIPT[cut:])
        check_script(session, peer)
    finally:
        session.abort()
        session.join(5)


def test_a_protocol_error_in_the_initial_bytes_is_like_any_other():
    """Rule 23: such bytes are often the beginning of another protocol altogether."""
    near, far = memory_pair()
    session, peer = session_over(near, "server", initial=b"GET / HTTP/1.1\r\n\r\n"), RawPeer(far)
    accepting = start(session.accept)
    assert isinstance(outcome(accepting), ProtocolError)
    peer.transport.shutdown(1)
    expect_go_away(peer)
    assert session.join(5)


# --- anything at all ---

frames_of_any_kind = st.builds(
    lambda kind, flags, stream_id, length: frame(
        kind, flags, stream_id, length, bytes(length) if kind == DATA and length <= 64 else b""
    ),
    kind=st.integers(0, 3),
    flags=st.integers(0, 15),
    stream_id=st.integers(0, 6),
    length=st.sampled_from((0, 1, 5, 64)),
)


def play(wire, max_recv):
    """What a server does with these bytes: what it sends, what it gives out, how it ends."""
    near, far = memory_pair(1 << 20)
    session, peer = session_over(FaultyTransport(near, max_recv=max_recv), "server", Config(close_timeout=0.001)), far
    streams = [session.open(), session.open()]
    settle()
    peer.sendall(wire)
    settle()
    peer.shutdown(1)
    assert session.join(5)
    accepted = []
    while session.stats().backlog:
        accepted.append(session.accept())
    heard = []
    for stream in (*streams, *accepted):
        try:
            heard.append((stream.stream_id, stream.read(), "EOF"))
        except (YamuxError, OSError) as error:
            heard.append((stream.stream_id, stream.stats().unread and stream.read1(), type(error)))
    decoder = Decoder()
    sent = sorted({found[:5] for found in decoder.feed(bytes(peer._incoming.buffer))})
    decoder.finish()
    assert session.exception is None or isinstance(session.exception, SessionError)
    if isinstance(session.exception, RemoteError):
        sent = []  # a peer that says so hears nothing more; what was on its way depends on the moment
    return type(session.exception), sent, heard


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.lists(frames_of_any_kind, max_size=12), st.sampled_from((1, 3, 12, 13)))
def test_any_frames_are_taken_or_end_the_session_the_same_way_however_they_are_cut(wires, max_recv):
    """Rule 29: one way or the other, never an error of another kind."""
    wire = b"".join(wires)
    assert play(wire, max_recv) == play(wire, 1 << 20)


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.binary(max_size=80))
def test_any_bytes_are_taken_or_end_the_session(wire):
    """Rule 29."""
    assert play(wire, 1) == play(wire, 1 << 20)


def test_the_independent_codec_refuses_what_this_module_takes_for_bad():
    """The corpus is bad by another's judgement, too: where the codec is strict at all."""
    refused = 0
    for _, wire in bad_headers("client"):
        try:
            Decoder().feed(wire[:12])
        except WireError:
            refused += 1
    assert refused >= 16 + 8 + 10


def test_go_away_with_an_error_code_is_not_answered():
    """Rule 21: the session is over."""
    for code in (1, 2, 3):
        with facing("client") as (session, peer):
            session.open()
            peer.expect(WINDOW_UPDATE, SYN, 1)
            peer.send(go_away(code) + window_update(2, 0, SYN))
            peer.expect_eof()
            assert session.stats().incoming == 0
