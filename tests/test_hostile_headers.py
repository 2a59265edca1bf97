"""Every header in every state of a stream: it does exactly what the protocol says, or nothing, or ends the session.

The protocol is `fuzz/receiver.py`, a model written after the tables of ``spec.md`` that shares no code with the package
(R4, R5, R7, R10, R15, R17, R18, R21, R23, R26, R29). Here sessions are brought into each state there is, with two streams
that have nothing to do with it; then one header comes, whole or cut, and *everything* is compared: every stream, every
count, every frame of the answer. `test_protocol_errors.py` tells the same stories one by one, as callers see them.
"""

from __future__ import annotations

import logging

import gevent
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from fuzz.receiver import Receiver, Row
from fuzz.rig import Watched, rows_of, settle
from geyamux import Client, Config, ProtocolError, RemoteError, Server, SessionError
from support.wire import ACK, DATA, FIN, GO_AWAY, PING, RST, SYN, WINDOW_UPDATE, data, frame, go_away, window_update

WINDOW = 262144
FLAGS = (*range(16), 0x0010, 0xFFF1, 0xFFF8)
#: Those that a right frame may have, and any other.
COMMON = (0, SYN, ACK, FIN, SYN | FIN, RST)
SOME_FLAGS = {"common": COMMON, "any": tuple(flags for flags in FLAGS if flags not in COMMON)}
LENGTHS = {
    DATA: (0, 1, WINDOW - 1, WINDOW, WINDOW + 1, 1 << 31, 0xFFFFFFFF),
    WINDOW_UPDATE: (0, 1, WINDOW, 1 << 31, 0xFFFFFFFF - WINDOW, 0xFFFFFFFF - WINDOW + 1, 0xFFFFFFFF),
}
BODY = bytes(range(256)) * 1025
CONFIG = Config()

both_roles = pytest.mark.parametrize("kind", [Client, Server], ids=["client", "server"])


@pytest.fixture(autouse=True)
def _quiet(monkeypatch):
    """Thousands of sessions end badly here, and each says so."""
    monkeypatch.setattr(logging.getLogger("geyamux"), "disabled", True)


class Scene:
    """A session in some state, with the stream that the state is of, if there is one, and two bystanders."""

    def __init__(self, kind, state, as_socket=True):
        self.watched = watched = Watched(kind, CONFIG, as_socket=as_socket)
        self.session = watched.session
        #: The bystanders' ids are the first of either side, the stream's own comes next.
        self.ours, self.theirs = (3, 4) if kind is Client else (4, 3)
        bystander = self.session.open()
        settle()
        watched.feed(
            window_update(self.theirs - 2, 0, SYN) + data(self.theirs - 2, b"unread") + data(self.ours - 2, b"too")
        )
        self.bystanders = [bystander, self.session.accept(timeout=0)]
        self.calls = []
        self.stream = None
        self.stream_id = STATES[state](self) or self.stream.stream_id
        settle()
        watched.sent.clear()

    def close(self):
        self.session.abort()
        settle()
        gevent.killall(self.calls)
        for stream in [*self.bystanders, self.stream]:
            if stream is not None:
                stream.close()

    def feed(self, *frames):
        self.watched.feed(b"".join(frames))

    def accepted(self, flags=0, body=b"unread"):
        """A stream of the peer."""
        self.feed(data(self.theirs, body, SYN | flags))
        self.stream = self.session.accept(timeout=0)
        settle()
        return self.stream

    def opened(self, *answer):
        """One of ours; the flags of what the peer answered."""
        self.stream = self.session.open()
        settle()
        self.feed(*(window_update(self.ours, 0, flags) for flags in answer))
        return self.stream

    def refused(self):
        self.session._table.is_refusing = True
        self.feed(window_update(self.theirs, 0, SYN))
        self.session._table.is_refusing = False
        return self.theirs

    def closing(self):
        """The session waits for the peer's FIN on the one stream that was finished here."""
        for stream in self.bystanders:
            stream.reset()
        self.accepted().close_write()
        self.calls.append(gevent.spawn(self.session.close))

    def going_away(self, stream_id=0):
        self.accepted()
        self.session.go_away()
        return stream_id

    def peer_gone(self, stream_id=0):
        self.accepted()
        self.feed(go_away(0))
        return stream_id


#: By name: what brings a scene there. Returns the id to speak of where it is not that of the stream.
STATES = {
    "id zero": lambda scene: -1,
    "ours, never opened": lambda scene: scene.ours + 100,
    "the peer's, never opened": lambda scene: scene.theirs + 100,
    "the largest id of the client": lambda scene: 0xFFFFFFFF,
    "the largest id of the server": lambda scene: 0xFFFFFFFE,
    "in the backlog": lambda scene: scene.feed(data(scene.theirs, b"unread", SYN)) or scene.theirs,
    "in the backlog, empty": lambda scene: scene.feed(window_update(scene.theirs, 7, SYN)) or scene.theirs,
    "in the backlog, the peer finished": lambda scene: scene.feed(data(scene.theirs, b"all", SYN | FIN)) or scene.theirs,
    "reset in the backlog": lambda scene: (
        scene.feed(window_update(scene.theirs, 0, SYN), window_update(scene.theirs, 9, RST)) or scene.theirs
    ),
    "refused": Scene.refused,
    "accepted": lambda scene: scene.accepted() and None,
    "accepted, the window full": lambda scene: scene.accepted(body=BODY[:WINDOW]) and None,
    "accepted, read": lambda scene: scene.accepted().recv(100) and None,
    "accepted, the peer finished": lambda scene: scene.accepted(FIN) and None,
    "accepted, finished here": lambda scene: scene.accepted().close_write(),
    "accepted, not read any more": lambda scene: scene.accepted().shutdown(0),
    "accepted, closed here": lambda scene: scene.accepted().close(),
    "accepted, finished by both": lambda scene: scene.accepted(FIN).close_write(),
    "accepted, reset by us": lambda scene: scene.accepted().reset(),
    "accepted, reset by the peer": lambda scene: scene.accepted() and scene.feed(window_update(scene.theirs, 0, RST)),
    "ours, not acknowledged": lambda scene: scene.opened() and None,
    "ours, not acknowledged, finished here": lambda scene: scene.opened().close_write(),
    "ours, not acknowledged, closed here": lambda scene: scene.opened().close(),
    "ours, acknowledged": lambda scene: scene.opened(ACK) and None,
    "ours, the peer finished": lambda scene: scene.opened(ACK | FIN) and None,
    "ours, finished here": lambda scene: scene.opened(ACK).close_write(),
    "ours, closed here": lambda scene: scene.opened(ACK).close(),
    "ours, finished by both": lambda scene: scene.opened(ACK | FIN).close(),
    "ours, reset by us": lambda scene: scene.opened(ACK).reset(),
    "ours, reset by the peer": lambda scene: scene.opened(RST) and None,
    "gone away": lambda scene: scene.going_away() or None,
    "gone away, a new id": lambda scene: scene.going_away(scene.theirs + 100),
    "the peer gone away": lambda scene: scene.peer_gone() or None,
    "the peer gone away, a new id": lambda scene: scene.peer_gone(scene.theirs + 100),
    "closing": Scene.closing,
    "closing, a new id": lambda scene: scene.closing() or scene.theirs + 100,
}


def snapshot(scene):
    """All that a bad header must not change: every stream, every count."""
    session, stats = scene.session, scene.session.stats()
    seen = [stream.stats() for stream in scene.bystanders]
    counts = (stats.opened, stats.incoming, stats.streams, stats.backlog, stats.unacknowledged, stats.unread)
    return rows_of(session), counts, seen, session._table._incoming, dict(session._table._remembered)


def answers_of(scene):
    """The frames sent since the state was reached; credit apart, its frames and how much for whom."""
    sent = [(found.type, found.flags, found.stream_id, found.length) for found in scene.watched.sent]
    credit = [found for found in sent if found[:2] == (WINDOW_UPDATE, 0)]
    return sorted(found for found in sent if found not in credit), credit, sent


def check(scene, before):
    """Compare with the model all that the frame has done. The frame came since `before`."""
    model = scene.watched.model
    session = scene.session
    rows, counts, seen, *_ = before
    answers, credit, sent = answers_of(scene)
    expected = sorted(scene.answers)
    if model.end is None:
        if session._is_closing and not model.rows:
            # What it waited for has come: it says so, and reads no more.
            expected = sorted([*expected, (GO_AWAY, 0, 0, 0)])
        assert answers == expected
        check_rows(session, model, sent[scene.seen :])
        assert session.exception is None
        assert session.stats().unread == sum(row.unread for row in rows_of(session).values()) + unread_elsewhere(scene)
        return
    assert (answers, credit) == (expected, [])
    assert session.closed
    assert session.stats().opened == counts[0] and session.stats().incoming == counts[1]
    assert rows_of(session).keys() <= rows.keys(), "no stream is created by a bad header"
    for stream, stats in zip(scene.bystanders, seen, strict=True):
        after = stream.stats()
        assert (after.unread, after.send_credit) == (stats.unread, stats.send_credit)
    if model.end == "protocol error":
        assert sent[-1] == (GO_AWAY, 0, 0, 1)
        assert session._table.reason is not None
    if not session._is_closing:
        assert isinstance(session.exception, ProtocolError if model.end == "protocol error" else RemoteError)
        with pytest.raises(SessionError):
            session.open()
        while session._table.backlog:
            session.accept(timeout=0).close()
        with pytest.raises(SessionError):
            session.accept(timeout=0)


def check_rows(session, model: Receiver, sent):
    found = rows_of(session)
    assert found.keys() == model.rows.keys()
    for stream_id, row in found.items():
        right: Row = model.rows[stream_id]
        granted = sum(length for *kind, of, length in sent if kind == [WINDOW_UPDATE, 0] and of == stream_id)
        assert not granted or right.allowance is not None, "credit for bytes that nobody took"
        right.window += granted
        assert row == right


def unread_elsewhere(scene):
    """In streams that have ended and are still held."""
    table = scene.session._table
    held = [stream for stream in (*scene.bystanders, scene.stream) if stream is not None]
    return sum(stream.stats().unread for stream in held if table.streams.get(stream.stream_id) is not stream)


def send(scene, wire, cut):
    """Feed a frame, its header cut so; collect the answers that the model demands, whatever the pieces were."""
    scene.answers = []
    watched = scene.watched
    take = watched.model.take

    def collect(piece):
        # The rows of the model were put right for this piece: credit that was sent before is in them.
        scene.seen = len(watched.sent)
        take(piece)
        scene.answers += watched.model.answers

    watched.model.take = collect
    watched.feed(wire[:12], cut)
    if len(wire) > 12:
        watched.feed(wire[12:])


def wires(frame_type, flags, stream_id, length):
    """One frame; of a body that can't be right, only the beginning."""
    body = BODY[:length] if length <= WINDOW + 1 else BODY[:64]
    return frame(frame_type, flags, stream_id, length, body if frame_type == DATA else b"")


def try_frame(kind, state, frame_type, flags, length, *, stream_id=None, cuts=(1 << 20,)):
    """In this state this frame comes, its header cut in these ways: all are right, and the same."""
    ends = []
    for cut in cuts:
        scene = Scene(kind, state)
        try:
            target = max(scene.stream_id, 0) if stream_id is None else stream_id
            before = snapshot(scene)
            send(scene, wires(frame_type, flags, target, length), cut)
            check(scene, before)
            ends.append((answers_of(scene)[0], snapshot(scene)[:3]))
        except AssertionError as error:
            where = f"{state}: type {frame_type}, flags {flags:#x}, length {length}, cut {cut}"
            raise AssertionError(f"{where}: {error}") from error
        finally:
            scene.close()
    assert ends == ends[:1] * len(cuts)


@both_roles
@pytest.mark.parametrize("frame_type", [DATA, WINDOW_UPDATE], ids=["Data", "WindowUpdate"])
@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("some", ["common", pytest.param("any", marks=pytest.mark.slow)])
def test_a_frame_of_a_stream_does_what_the_model_says_in_every_state(kind, state, frame_type, some):
    for flags in SOME_FLAGS[some]:
        for length in LENGTHS[frame_type]:
            # Byte by byte, too, where it is cheap.
            try_frame(kind, state, frame_type, flags, length, cuts=(1 << 20, 1) if length < 2 else (1 << 20,))


@both_roles
@pytest.mark.parametrize("state", STATES)
def test_a_frame_of_the_session_does_what_the_model_says_in_every_state(kind, state):
    """And what is no frame at all: a version or a type that there is not."""
    for flags in (0, SYN, ACK, FIN, RST, 0xFFFF):
        for length in (0, 1, 0xFFFFFFFF):
            for frame_type in (PING, GO_AWAY, 4, 0xFF):
                try_frame(kind, state, frame_type, flags, length)


@both_roles
@pytest.mark.parametrize("state", STATES)
def test_a_frame_of_another_version_changes_nothing_in_any_state(kind, state):
    for version, frame_type in ((1, DATA), (1, WINDOW_UPDATE), (0x80, PING), (0xFF, GO_AWAY)):
        scene = Scene(kind, state)
        try:
            before = snapshot(scene)
            send(scene, bytes((version, frame_type)) + wires(DATA, SYN, 99 + scene.ours, 0)[2:], 1 << 20)
            assert scene.watched.model.end == "protocol error"
            check(scene, before)
        finally:
            scene.close()


# --- more than one frame ---

SELECTED = ("target", "ours + 100", "theirs + 100", "theirs + 102", "bystander", "zero")


@st.composite
def some_frames(draw):
    """Frames as a peer gone mad sends them; most of them right by themselves."""
    frames = []
    for _ in range(draw(st.integers(1, 12))):
        frame_type = draw(st.sampled_from((DATA, DATA, WINDOW_UPDATE, WINDOW_UPDATE, PING, GO_AWAY, 4)))
        flags = draw(st.sampled_from(FLAGS))
        whose = draw(st.sampled_from(SELECTED))
        length = draw(st.sampled_from((0, 0, 0, 1, 100, 131072, WINDOW, WINDOW + 1, 0xFFFFFFFF - WINDOW, 0xFFFFFFFF)))
        frames.append((frame_type, flags, whose, length))
    return frames


def wire_of(scene, frames):
    ids = {
        "target": max(scene.stream_id, 0),
        "ours + 100": scene.ours + 100,
        "theirs + 100": scene.theirs + 100,
        "theirs + 102": scene.theirs + 102,
        "bystander": scene.theirs - 2,
        "zero": 0,
    }
    return b"".join(wires(frame_type, flags, ids[whose], length) for frame_type, flags, whose, length in frames)


@both_roles
@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(frames=some_frames(), state=st.sampled_from(sorted(STATES)), cut=st.integers(1, 40), as_socket=st.booleans())
@example(frames=[(DATA, 0xFFF8, "target", 0), (DATA, 0, "target", 0)], state="closing", cut=1, as_socket=True)
def test_any_frames_one_after_the_other_do_what_the_model_says_however_they_are_cut(kind, frames, state, cut, as_socket):
    """Each piece is compared by itself, and the end of it all is the same, in one piece and in many."""
    ends = []
    for size in (1 << 20, cut):
        scene = Scene(kind, state, as_socket)
        try:
            wire = wire_of(scene, frames)
            # What is long is not cut as small.
            scene.watched.feed(wire, size if len(wire) < 4000 else max(size * 997, 4096))
            answers, credit, _ = answers_of(scene)
            assert len(answers) <= len(frames) + 2 + 3, "an answer for each frame, RST for each stream, GoAway"
            # How answers are merged depends on when they can leave; what ends the session, on what has left before.
            given = sum(length for *_, length in credit)
            told = (set(answers), given) if scene.session.exception is None else None
            *all_else, remembered = snapshot(scene)
            # Once the last stream of a closing session has ended it reads no more: what came in the same piece
            # is still charged to the ended stream, what comes after it is not.
            ends.append((told, all_else, None if scene.session.closed else remembered))
        finally:
            scene.close()
    assert ends[0] == ends[1]


# --- the model itself ---


@given(frames=some_frames(), cuts=st.lists(st.integers(1, 600), min_size=1))
def test_the_model_does_not_depend_on_how_its_bytes_are_cut(frames, cuts):
    """It would prove nothing otherwise."""
    wire = b"".join(wires(kind, flags, 2 + len(whose), min(length, 1000)) for kind, flags, whose, length in frames)
    whole, cut = (
        Receiver(is_client=True, rows={8: Row(8, is_own=False, unread=5), 11: Row(11, is_own=True)}) for _ in range(2)
    )
    whole.take(wire)
    for number in range(len(wire)):
        size = cuts[number % len(cuts)]
        cut.take(wire[:size])
        wire = wire[size:]
    assert (whole.rows, whole.end, whole.admitted) == (cut.rows, cut.end, cut.admitted)
