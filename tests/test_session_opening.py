"""Opening and accepting streams: rules 1 to 6, and what of rule 7 belongs to a stream's beginning.

Longer than other modules because all tests of one subject stand together, each short and by itself.
"""

from __future__ import annotations

import errno
import itertools

import gevent
import pytest

import geyamux
from geyamux import Config, RemoteGoAway, SessionClosed, StreamReset, StreamsExhausted
from support.facing import OWN, PEERS, ROLES, facing, narrow_pair, outcome, start
from support.links import sessions
from support.rawpeer import settle
from support.wire import ACK, DATA, FIN, GO_AWAY, RST, SYN, WINDOW_UPDATE, data, go_away, window_update

SOON = 0.02
"""A timeout that a test waits for."""

both_roles = pytest.mark.parametrize("role", ROLES)
both_directions = pytest.mark.parametrize("swap", [False, True], ids=["client-opens", "server-opens"])


def opener_and_acceptor(both, swap):
    return reversed(both) if swap else both


# --- rule 1: open ---


def test_a_client_opens_odd_ids_in_order_from_1():
    """Rule 1."""
    with facing("client") as (session, peer):
        assert [session.open().stream_id for _ in range(3)] == [1, 3, 5]
        settle()
        assert peer.transport.recv(100) == bytes.fromhex(
            "0001 0001 00000001 00000000  0001 0001 00000003 00000000  0001 0001 00000005 00000000"
        )


def test_a_server_opens_even_ids_in_order_from_2():
    """Rule 1."""
    with facing("server") as (session, peer):
        assert [session.open().stream_id for _ in range(3)] == [2, 4, 6]
        settle()
        assert peer.transport.recv(100) == bytes.fromhex(
            "0001 0001 00000002 00000000  0001 0001 00000004 00000000  0001 0001 00000006 00000000"
        )


def test_the_syn_carries_the_credit_beyond_the_initial_window():
    """Rule 1: 1 MiB less 256 KiB is 0xc0000."""
    with facing("client", Config(max_stream_window=1 << 20)) as (session, peer):
        session.open()
        settle()
        assert peer.transport.recv(100) == bytes.fromhex("0001 0001 00000001 000c0000")


@both_roles
def test_open_returns_and_writing_may_follow_without_a_word_from_the_peer(role):
    """Rule 1."""
    with facing(role) as (session, peer):
        stream = session.open(timeout=0)
        assert not stream.established
        stream.sendall(b"x" * 100_000)
        own = OWN[role][0]
        peer.expect(WINDOW_UPDATE, SYN, own, 0)
        peer.expect_data(own, b"x" * 100_000)


@both_roles
def test_open_waits_at_the_backlog_until_one_is_acknowledged(role):
    """Rule 1."""
    with facing(role, Config(accept_backlog=3)) as (session, peer):
        for own in OWN[role][:3]:
            session.open()
            peer.expect(WINDOW_UPDATE, SYN, own)
        opening = start(session.open)
        assert not opening.ready()
        peer.expect_nothing()
        peer.send(window_update(OWN[role][1], 0, ACK))
        assert outcome(opening).stream_id == OWN[role][3]
        peer.expect(WINDOW_UPDATE, SYN, OWN[role][3])


def test_256_opens_may_be_unacknowledged_and_not_257():
    """Rule 1: the default, which is what hashicorp's acceptor holds."""
    with facing() as (session, peer):
        for number in range(256):
            assert session.open(timeout=0).stream_id == 2 * number + 1
        with pytest.raises(TimeoutError) as caught:
            session.open(timeout=SOON)
        assert caught.value.args == ("timed out",)
        assert session.stats().unacknowledged == 256
        settle()
        assert len(peer.transport.recv(10_000)) == 256 * 12


def test_open_waits_for_stream_open_timeout_where_no_timeout_is_given():
    """Rule 1."""
    with facing(config=Config(accept_backlog=1, stream_open_timeout=60.0)) as (session, _):
        session.open()
        waiting = start(session.open)
        assert not waiting.ready()
        with pytest.raises(TimeoutError):
            session.open(timeout=SOON)
        waiting.kill()


def test_open_waits_at_max_outgoing_streams_until_one_has_ended():
    """Rule 1: acknowledged or not."""
    with facing(config=Config(max_outgoing_streams=2)) as (session, peer):
        first, second = session.open(), session.open()
        peer.send(window_update(1, 0, ACK) + window_update(3, 0, ACK))
        assert first.wait_established(5) and second.wait_established(5)
        opening = start(session.open)
        assert not opening.ready()
        first.close()
        settle()
        assert not opening.ready(), "a close alone does not end a stream"
        peer.send(window_update(1, 0, FIN))
        assert outcome(opening).stream_id == 5


def test_open_waits_while_the_outbox_is_full():
    """Rules 1 and 13."""
    with facing(config=Config(outbox_limit=4096), ends=narrow_pair()) as (session, peer):
        first = session.open()
        settle()
        writers = [start(first.sendall, b"x" * 4096) for _ in range(40)]
        assert not writers[-1].ready(), "the outbox can't have taken all of it"
        opening = start(session.open)
        assert not opening.ready()
        frames = [peer.next() for _ in range(42)]
        assert outcome(opening).stream_id == 3
        updates = [(found.flags, found.stream_id) for found in frames if found.type == WINDOW_UPDATE]
        assert updates == [(SYN, 1), (SYN, 3)]
        assert sum(found.length for found in frames if found.type == DATA) == 40 * 4096
        gevent.joinall(writers, timeout=5, raise_error=True)


def test_waiting_opens_are_served_in_the_order_of_their_calls():
    """Rule 1."""
    with facing(config=Config(accept_backlog=1)) as (session, peer):
        session.open()
        waiting = [start(session.open) for _ in range(4)]
        for number in range(4):
            peer.send(window_update(2 * number + 1, 0, ACK))
            assert outcome(waiting[number]).stream_id == 2 * number + 3
            settle()
            assert [greenlet.ready() for greenlet in waiting] == [True] * (number + 1) + [False] * (3 - number)


@pytest.mark.parametrize("leave", ["kill", "timeout", "gevent.Timeout"])
def test_an_open_that_is_given_up_takes_no_place(leave):
    """Rule 1: neither a place nor an id is lost."""
    with facing(config=Config(accept_backlog=1)) as (session, peer):
        session.open()
        if leave == "kill":
            waiting = start(session.open)
            waiting.kill()
        elif leave == "timeout":
            with pytest.raises(TimeoutError):
                session.open(timeout=SOON)
        else:
            with pytest.raises(gevent.Timeout), gevent.Timeout(SOON):
                session.open()
        next_one = start(session.open)
        peer.send(window_update(1, 0, ACK))
        assert outcome(next_one).stream_id == 3
        assert session.stats().unacknowledged == 1
        peer.expect(WINDOW_UPDATE, SYN, 1)
        peer.expect(WINDOW_UPDATE, SYN, 3)
        peer.expect_nothing()


def kill_before_the_wake(victim, session):
    """Kill the greenlet in the turn in which the session wakes it for a WindowUpdate, so that it never sees the wake."""
    on_window_update = session._table.on_window_update

    def go_on_then_kill(*args):
        on_window_update(*args)
        assert gevent.getcurrent() is gevent.get_hub()
        victim.throw(gevent.GreenletExit)

    session._table.on_window_update = go_on_then_kill


def test_an_open_killed_just_as_its_place_came_leaves_it_to_the_next():
    """Rule 1: the wake that the dead one got is passed on."""
    with facing(config=Config(accept_backlog=1)) as (session, peer):
        session.open()
        first, second = start(session.open), start(session.open)
        kill_before_the_wake(first, session)
        peer.send(window_update(1, 0, ACK))
        assert outcome(second).stream_id == 3
        assert isinstance(first.value, gevent.GreenletExit)
        assert session.stats().unacknowledged == 1


@both_roles
def test_the_last_id_is_used_and_the_next_open_says_that_none_is_left(role):
    """Rule 1: StreamsExhausted is an OSError with an errno, and the session lives."""
    last = 0xFFFFFFFF if role == "client" else 0xFFFFFFFE
    with facing(role) as (session, peer):
        session._table._next_id = last  # two thousand million opens would take a while
        assert session.open().stream_id == last
        peer.expect(WINDOW_UPDATE, SYN, last)
        with pytest.raises(StreamsExhausted) as caught:
            session.open()
        assert isinstance(caught.value, OSError) and caught.value.errno == errno.EADDRNOTAVAIL
        peer.send(window_update(PEERS[role][0], 0, SYN))
        assert session.accept(timeout=5).stream_id == PEERS[role][0]


@pytest.mark.slow
@pytest.mark.timeout(120)
@both_directions
def test_the_100_000th_open_works_like_the_first(swap):
    """Rule 1: nothing is used up and nothing is left behind on the way."""
    with sessions("socketpair") as both:
        opener, acceptor = opener_and_acceptor(both, swap)

        def serve():
            for stream in acceptor:
                stream.sendall(stream.recv(10))
                stream.close()

        server = gevent.spawn(serve)
        for number in range(100_000):
            stream = opener.open()
            stream.sendall(b"x")
            if number % 1000 == 999:
                assert stream.recv(10) == b"x"
            stream.close()
        settle()
        with opener.open() as last:
            assert last.stream_id == 200_001 + swap
            last.sendall(b"last")
            assert last.recv(10) == b"last"
        settle()
        assert (opener.num_streams, acceptor.num_streams) == (0, 0)
        assert opener.stats().unacknowledged == 0
        server.kill()


# --- rule 2: places among the unacknowledged ---

FIRST_FRAMES = {
    "an ACK": window_update(1, 0, ACK),
    "an ACK on Data": data(1, b"x", ACK),
    "credit": window_update(1, 1000),
    "credit of nothing": window_update(1, 0),
    "Data": data(1, b"x"),
    "empty Data": data(1, b""),
    "FIN": window_update(1, 0, FIN),
    "FIN on Data": data(1, b"x", FIN),
    "ACK and FIN": window_update(1, 0, ACK | FIN),
    "RST": window_update(1, 0, RST),
    "RST on Data": data(1, b"x", RST),
}


@pytest.mark.parametrize("frame", FIRST_FRAMES.values(), ids=FIRST_FRAMES.keys())
def test_the_first_frame_of_any_kind_acknowledges(frame):
    """Rule 2."""
    with facing(config=Config(accept_backlog=1)) as (session, peer):
        stream = session.open()
        established = start(stream.wait_established)
        opening = start(session.open)
        peer.send(frame)
        assert outcome(opening).stream_id == 3
        result = outcome(established)
        assert isinstance(result, StreamReset) if frame[3] & RST else result is True
        assert stream.established


@pytest.mark.parametrize("first", FIRST_FRAMES.values(), ids=FIRST_FRAMES.keys())
def test_a_place_is_given_back_once_however_many_frames_come(first):
    """Rule 2."""
    with facing(config=Config(accept_backlog=2)) as (session, peer):
        session.open(), session.open()
        peer.send(
            first + window_update(1, 0, ACK) * 3 + data(1, b"") + window_update(1, 5, FIN) + window_update(1, 0, RST)
        )
        settle()
        assert session.stats().unacknowledged == 1
        session.open(timeout=0)
        with pytest.raises(TimeoutError):
            session.open(timeout=0)


def test_a_reset_here_gives_the_place_back_once():
    """Rule 2."""
    with facing(config=Config(accept_backlog=2)) as (session, peer):
        first, _ = session.open(), session.open()
        settle()
        first.reset()
        first.reset()
        assert session.stats().unacknowledged == 1
        peer.send(window_update(1, 0, RST) + window_update(1, 0, ACK))
        settle()
        assert session.stats().unacknowledged == 1


@pytest.mark.parametrize("end", ["close", "close_write"])
def test_our_own_end_does_not_give_the_place_back(end):
    """Rule 2: many quick open-send-close would make an acceptor's backlog overflow."""
    with facing(config=Config(accept_backlog=1)) as (session, peer):
        stream = session.open()
        stream.sendall(b"x")
        getattr(stream, end)()
        settle()
        with pytest.raises(TimeoutError):
            session.open(timeout=SOON)
        peer.send(window_update(1, 0, FIN))
        settle()
        session.open(timeout=0)


def test_2000_quick_streams_never_overflow_an_acceptor_that_holds_256():
    """Rule 2: open, send, close without waiting; the acceptor takes its time. Nothing is refused."""
    with sessions("socketpair") as (opener, acceptor):
        taken = []

        def serve():
            for stream in acceptor:
                taken.append(stream.read())
                stream.close()

        server = gevent.spawn_later(0.01, serve)
        for number in range(2000):
            stream = opener.open(timeout=10)
            stream.sendall(b"%d" % number)
            stream.close()
        while len(taken) < 2000:
            gevent.sleep(0.001)
        assert sorted(taken, key=int) == [b"%d" % number for number in range(2000)]
        server.kill()


# --- rule 3: time limits ---


def test_a_silent_stream_stays_open_for_ever_by_default():
    """Rule 3: some peers acknowledge with their first answer only."""
    assert Config().stream_open_timeout is None
    assert Config().accept_timeout == 60.0


def test_a_stream_not_acknowledged_in_time_is_reset_and_the_session_lives():
    """Rule 3."""
    with facing(config=Config(stream_open_timeout=SOON, accept_backlog=1)) as (session, peer):
        stream = session.open()
        reading = start(stream.recv, 1)
        peer.expect(WINDOW_UPDATE, SYN, 1)
        peer.expect(WINDOW_UPDATE, RST, 1)
        error = outcome(reading)
        assert isinstance(error, StreamReset) and not error.remote
        assert session.open(timeout=0).stream_id == 3
        assert not session.closed


def test_an_unacknowledged_stream_that_is_finished_here_keeps_what_it_sent():
    """Rule 3: its place is given back, but the peer may still take it."""
    with facing(config=Config(stream_open_timeout=SOON, accept_backlog=1)) as (session, peer):
        stream = session.open()
        stream.sendall(b"x")
        stream.close_write()
        assert session.open(timeout=5).stream_id == 3
        peer.expect(WINDOW_UPDATE, SYN, 1)
        peer.expect(DATA, 0, 1)
        peer.expect(WINDOW_UPDATE, FIN, 1)
        peer.expect(WINDOW_UPDATE, SYN, 3)
        peer.send(data(1, b"answer", ACK))
        assert stream.recv(100) == b"answer"


def test_an_acknowledged_stream_is_not_reset_by_the_time_limit():
    """Rule 3."""
    with facing(config=Config(stream_open_timeout=SOON)) as (session, peer):
        stream = session.open()
        peer.send(window_update(1, 0, ACK))
        gevent.sleep(SOON * 2)
        peer.send(data(1, b"x"))
        assert stream.recv(1) == b"x"
        peer.expect(WINDOW_UPDATE, SYN, 1)
        peer.expect_nothing()


@both_roles
def test_a_stream_nobody_accepts_in_time_is_reset(role):
    """Rule 3."""
    with facing(role, Config(accept_timeout=SOON)) as (session, peer):
        theirs = PEERS[role][0]
        peer.send(window_update(theirs, 0, SYN) + data(theirs, b"x"))
        peer.expect(WINDOW_UPDATE, RST, theirs)
        assert (session.num_streams, session.stats().backlog) == (0, 0)
        with pytest.raises(TimeoutError):
            session.accept(timeout=0)
        assert not session.closed


def test_a_stream_that_its_peer_has_finished_waits_for_accept_without_limit():
    """Rule 3: nothing of it can change any more."""
    with facing(config=Config(accept_timeout=SOON)) as (session, peer):
        peer.send(data(2, b"all of it", SYN | FIN))
        gevent.sleep(SOON * 2)
        peer.expect_nothing()
        assert session.accept(timeout=0).read() == b"all of it"


def test_an_accepted_stream_is_not_reset_by_the_time_limit():
    """Rule 3."""
    with facing(config=Config(accept_timeout=SOON)) as (session, peer):
        peer.send(window_update(2, 0, SYN))
        stream = session.accept(timeout=5)
        gevent.sleep(SOON * 2)
        peer.send(data(2, b"x"))
        assert stream.recv(1) == b"x"


# --- rule 4: ids of the peer ---


@both_roles
def test_ids_of_the_peer_need_no_order(role):
    """Rule 4: opens of some peers race; they are accepted in the order in which they came."""
    ids = [PEERS[role][0] + offset for offset in (600, 2, 0xFFFF0000, 4, 598)]
    with facing(role) as (session, peer):
        peer.send(b"".join(window_update(stream_id, 0, SYN) for stream_id in ids))
        assert [session.accept(timeout=5).stream_id for _ in ids] == ids


@both_roles
@pytest.mark.parametrize("end", ["FINs", "RST of the peer", "RST of ours"])
def test_an_id_that_has_ended_may_come_again(role, end):
    """Rule 4: as a stream with nothing of the first one in it."""
    theirs = PEERS[role][0]
    with facing(role) as (session, peer):
        peer.send(window_update(theirs, 0, SYN) + data(theirs, b"old"))
        first = session.accept(timeout=5)
        if end == "FINs":
            first.close()
            peer.send(window_update(theirs, 0, FIN))
        elif end == "RST of ours":
            first.reset()
        else:
            peer.send(window_update(theirs, 0, RST))
        settle()
        peer.send(window_update(theirs, 0, SYN) + data(theirs, b"new", FIN))
        second = session.accept(timeout=5)
        assert (second.stream_id, second.read()) == (theirs, b"new")
        assert session.num_streams == 1


# --- rule 5: what is refused ---


@both_roles
def test_beyond_the_backlog_a_stream_is_refused_and_the_session_lives(role):
    """Rule 5."""
    with facing(role, Config(accept_backlog=2)) as (session, peer):
        first, second, third, fourth, _ = PEERS[role]
        for theirs in (first, second, third):
            peer.send(window_update(theirs, 0, SYN))
        peer.expect(WINDOW_UPDATE, RST, third, 0)
        assert (session.num_streams, session.stats().backlog) == (2, 2)
        assert session.accept(timeout=0).stream_id == first
        peer.expect(WINDOW_UPDATE, ACK, first)
        peer.send(window_update(fourth, 0, SYN))
        peer.expect_nothing()
        assert [session.accept(timeout=0).stream_id for _ in range(2)] == [second, fourth]


def test_what_follows_a_refused_syn_is_dropped_without_an_answer():
    """Rule 5: its frames are on the wire before the peer hears of the RST."""
    with facing(config=Config(accept_backlog=1)) as (session, peer):
        peer.send(window_update(2, 0, SYN))
        peer.send(data(4, b"x" * 1000, SYN) + data(4, b"y" * 1000) + window_update(4, 99) + window_update(4, 0, FIN))
        peer.expect(WINDOW_UPDATE, RST, 4)
        peer.expect_nothing()
        peer.send(data(2, b"z"))
        assert session.accept(timeout=0).recv(10) == b"z"
        assert session.num_streams == 1


def test_at_max_incoming_streams_a_stream_is_refused_until_the_application_has_released_one():
    """Rule 5: an RST of the peer is no release; the application may still be at work for it."""
    with facing(config=Config(max_incoming_streams=2)) as (session, peer):
        peer.send(window_update(2, 0, SYN) + window_update(4, 0, SYN))
        first, second = session.accept(timeout=5), session.accept(timeout=5)
        peer.expect(WINDOW_UPDATE, ACK, 2)
        peer.expect(WINDOW_UPDATE, ACK, 4)
        peer.send(window_update(2, 0, RST) + window_update(6, 0, SYN))
        peer.expect(WINDOW_UPDATE, RST, 6)
        first.close()
        peer.send(window_update(8, 0, SYN))
        peer.expect_nothing()
        assert session.accept(timeout=5).stream_id == 8
        assert second.stats().state == "ESTABLISHED"


def test_a_stream_released_but_not_ended_counts_until_its_end():
    """Rule 5: and once both is so, it is counted down once."""
    with facing(config=Config(max_incoming_streams=1)) as (session, peer):
        peer.send(window_update(2, 0, SYN))
        session.accept(timeout=5).close()
        peer.expect(WINDOW_UPDATE, ACK, 2)
        peer.expect(WINDOW_UPDATE, FIN, 2)
        peer.send(window_update(4, 0, SYN))
        peer.expect(WINDOW_UPDATE, RST, 4)
        peer.send(window_update(2, 0, FIN) + window_update(6, 0, SYN) + window_update(8, 0, SYN))
        peer.expect(WINDOW_UPDATE, RST, 8)
        assert session.accept(timeout=5).stream_id == 6


def test_a_forgotten_stream_that_has_ended_does_not_count():
    """Rule 5: the application has no hold on it any more, so it can't be at work for it."""
    with facing(config=Config(max_incoming_streams=1)) as (session, peer):
        for theirs in (2, 4, 6):
            peer.send(window_update(theirs, 0, SYN))
            assert session.accept(timeout=5).stream_id == theirs
            peer.send(window_update(theirs, 0, RST))
            settle()


def test_with_max_incoming_streams_0_every_stream_is_refused():
    """Rule 5."""
    with facing(config=Config(max_incoming_streams=0)) as (session, peer):
        peer.send(window_update(2, 0, SYN))
        peer.expect(WINDOW_UPDATE, RST, 2)
        assert session.num_streams == 0


def test_after_go_away_a_stream_is_refused():
    """Rules 5 and 21."""
    with facing() as (session, peer):
        session.go_away()
        peer.expect(GO_AWAY, 0, 0, 0)
        peer.send(window_update(2, 0, SYN))
        peer.expect(WINDOW_UPDATE, RST, 2)
        assert session.num_streams == 0


def test_a_refused_id_may_come_again():
    """Rules 4 and 5: a refusal keeps nothing."""
    with facing(config=Config(accept_backlog=1)) as (session, peer):
        peer.send(window_update(2, 0, SYN) + window_update(4, 0, SYN))
        peer.expect(WINDOW_UPDATE, RST, 4)
        session.accept(timeout=0)
        peer.expect(WINDOW_UPDATE, ACK, 2)
        peer.send(window_update(4, 0, SYN) + data(4, b"x"))
        assert session.accept(timeout=5).recv(10) == b"x"


# --- rule 6: ACK ---


@both_roles
def test_accept_acknowledges_once_in_a_frame_of_its_own(role):
    """Rule 6."""
    theirs = PEERS[role][0]
    with facing(role) as (session, peer):
        peer.send(window_update(theirs, 0, SYN))
        settle()
        peer.expect_nothing()
        stream = session.accept(timeout=0)
        stream.sendall(b"hello")
        stream.close()
        settle()
        number = b"\0\0\0" + bytes([theirs])
        assert peer.transport.recv(100) == b"".join(
            (
                bytes.fromhex("0001 0002") + number + bytes.fromhex("00000000"),
                bytes.fromhex("0000 0000") + number + bytes.fromhex("00000005") + b"hello",
                bytes.fromhex("0001 0004") + number + bytes.fromhex("00000000"),
            )
        )


def test_the_ack_carries_the_credit_beyond_the_initial_window():
    """Rule 6: and that much more the peer may then send."""
    with facing("server", Config(max_stream_window=1 << 20)) as (session, peer):
        peer.send(bytes.fromhex("0001 0001 00000001 00000000") + data(1, b"x" * 262144))
        stream = session.accept(timeout=5)
        peer.expect(WINDOW_UPDATE, ACK, 1, 0xC0000)
        peer.send(data(1, b"y" * 0xC0000, FIN))
        assert stream.read() == b"x" * 262144 + b"y" * 0xC0000


def test_before_its_accept_a_stream_has_the_initial_window_alone():
    """Rule 6: what the ACK will grant has not been granted yet."""
    with facing("server", Config(max_stream_window=1 << 20)) as (session, peer):
        peer.send(window_update(1, 0, SYN) + data(1, b"x" * 262144) + data(1, b"y"))
        peer.expect(WINDOW_UPDATE, RST, 1)
        peer.expect(GO_AWAY, 0, 0, 1)
        assert isinstance(session.exception, geyamux.ProtocolError)


@pytest.mark.parametrize("syn", [data(2, b"all", SYN | FIN), window_update(2, 0, SYN | FIN)], ids=["Data", "update"])
def test_a_fin_before_the_accept_does_not_suppress_the_ack(syn):
    """Rule 6."""
    with facing(config=Config(max_stream_window=1 << 20)) as (session, peer):
        peer.send(syn)
        session.accept(timeout=5)
        peer.expect(WINDOW_UPDATE, ACK, 2, 0)
        peer.expect_nothing()


def test_there_is_no_ack_for_a_stream_reset_in_the_same_turn():
    """Rule 6: never after our RST, and never in one frame with it."""
    with facing() as (session, peer):
        peer.send(window_update(2, 0, SYN))
        settle()
        session.accept(timeout=0).reset(7)
        peer.expect(WINDOW_UPDATE, RST, 2, 7)
        peer.expect_nothing()


def test_there_is_no_ack_for_a_stream_that_the_peer_reset_in_the_same_turn():
    """Rule 6: the peer has forgotten it."""
    with facing() as (session, peer):
        accepting = start(session.accept)
        peer.send(window_update(2, 0, SYN) + data(2, b"x") + window_update(2, 0, RST))
        settle()
        peer.expect_nothing()
        assert not accepting.ready()
        peer.send(window_update(4, 0, SYN))
        assert outcome(accepting).stream_id == 4


def test_a_stream_reset_before_its_accept_leaves_the_backlog_at_once():
    """Rule 6: its place is free for the next."""
    with facing(config=Config(accept_backlog=2)) as (session, peer):
        peer.send(window_update(2, 0, SYN) + window_update(4, 0, SYN) + data(2, b"x") + window_update(2, 0, RST))
        peer.send(window_update(6, 0, SYN))
        settle()
        assert [session.accept(timeout=0).stream_id for _ in range(2)] == [4, 6]
        with pytest.raises(TimeoutError):
            session.accept(timeout=0)
        peer.expect(WINDOW_UPDATE, ACK, 4)
        peer.expect(WINDOW_UPDATE, ACK, 6)
        peer.expect_nothing()


# --- accept ---


@both_roles
def test_streams_are_accepted_in_the_order_of_their_syns(role):
    """Rule 4."""
    with facing(role) as (session, peer):
        waiting = [start(session.accept) for _ in range(3)]
        for theirs in PEERS[role][:3]:
            peer.send(window_update(theirs, 0, SYN))
        assert [outcome(greenlet).stream_id for greenlet in waiting] == list(PEERS[role][:3])


def test_accept_takes_no_longer_than_its_timeout():
    """The error is exactly that of a socket."""
    with facing() as (session, _):
        for timeout in (0, SOON):
            with pytest.raises(TimeoutError) as caught:
                session.accept(timeout=timeout)
            assert caught.value.args == ("timed out",)


@pytest.mark.parametrize("leave", ["kill", "gevent.Timeout"])
def test_an_accept_that_is_given_up_loses_no_stream(leave):
    """Rule 6: neither the stream nor its ACK."""
    with facing() as (session, peer):
        if leave == "kill":
            waiting = start(session.accept)
            peer.send(window_update(2, 0, SYN))
            waiting.kill()
        else:
            with pytest.raises(gevent.Timeout), gevent.Timeout(SOON):
                session.accept()
            peer.send(window_update(2, 0, SYN))
        assert session.accept(timeout=5).stream_id == 2
        peer.expect(WINDOW_UPDATE, ACK, 2)
        peer.expect_nothing()


def test_an_accept_killed_with_its_wake_under_way_leaves_the_stream_to_the_next():
    """Rule 6: no stream is lost with the greenlet that was to get it."""
    with facing() as (session, peer):
        first, second = start(session.accept), start(session.accept)
        kill_before_the_wake(first, session)
        peer.send(window_update(2, 0, SYN))
        assert outcome(second).stream_id == 2
        assert isinstance(first.value, gevent.GreenletExit)


def test_a_syn_may_bring_credit():
    """Rule 7: a length is a delta, on top of the initial window."""
    with facing() as (session, peer):
        peer.send(window_update(2, 100_000, SYN))
        stream = session.accept(timeout=5)
        peer.expect(WINDOW_UPDATE, ACK, 2)
        writing = start(stream.sendall, b"x" * 400_000)
        peer.expect_data(2, b"x" * 362_144)
        peer.expect_nothing()
        writing.kill()


def test_a_syn_may_bring_payload_and_the_end():
    """Rule 7."""
    with facing() as (session, peer):
        peer.send(bytes.fromhex("0000 0005 00000002 00000005") + b"hello")
        stream = session.accept(timeout=5)
        assert stream.read() == b"hello"
        stream.sendall(b"answer")
        peer.expect(WINDOW_UPDATE, ACK, 2)
        peer.expect_data(2, b"answer")


def test_an_ack_brings_credit_and_may_bring_the_end():
    """Rule 7: js-yamux answers so."""
    with facing() as (session, peer):
        stream = session.open()
        peer.expect(WINDOW_UPDATE, SYN, 1)
        writing = start(stream.sendall, b"x" * 300_000)
        peer.expect_data(1, b"x" * 262_144)
        peer.send(window_update(1, 37_856, ACK | FIN))
        peer.expect_data(1, b"x" * 37_856)
        assert outcome(writing) is None
        assert stream.recv(1) == b""


# --- races ---


@both_directions
def test_opens_and_accepts_of_many_greenlets_pair_up(link_kind, swap):
    """Rules 1 to 6, over every kind of link: every stream arrives once, with what was written to it."""
    with sessions(link_kind) as both:
        opener, acceptor = opener_and_acceptor(both, swap)

        def opens(name):
            with opener.open(timeout=10) as stream:
                stream.sendall(b"%d" % name)
                stream.close_write()
                assert stream.read() == b"answer to %d" % name

        def accepts():
            with acceptor.accept(timeout=10) as stream:
                asked = stream.read()
                stream.sendall(b"answer to " + asked)
                return int(asked)

        accepting = [gevent.spawn(accepts) for _ in range(60)]
        opening = [gevent.spawn(opens, name) for name in range(60)]
        gevent.joinall([*accepting, *opening], timeout=20, raise_error=True)
        assert sorted(greenlet.get(timeout=0) for greenlet in accepting) == list(range(60))
        settle()
        assert (opener.num_streams, acceptor.num_streams) == (0, 0)


def test_both_sides_open_at_once(link_kind):
    """Rule 4: the ids of the two sides can't meet."""
    with sessions(link_kind) as both:

        def talk(here, there):
            opened = [here.open() for _ in range(20)]
            for number, stream in enumerate(opened):
                stream.sendall(b"%d" % number)
            accepted = [here.accept(timeout=10) for _ in range(20)]
            return [stream.recv(10) for stream in accepted], {stream.stream_id for stream in opened}

        client, server = both
        near, far = gevent.spawn(talk, client, server), gevent.spawn(talk, server, client)
        (seen_here, odd), (seen_there, even) = near.get(timeout=20), far.get(timeout=20)
        assert seen_here == seen_there == [b"%d" % number for number in range(20)]
        assert odd == set(range(1, 40, 2)) and even == set(range(2, 41, 2))


def test_a_storm_of_opens_beyond_the_backlog_only_waits():
    """Rules 1 and 5: both sides count to the same number, so nothing is refused."""
    with sessions("socketpair", Config(accept_backlog=8), Config(accept_backlog=8)) as (opener, acceptor):
        opening = [gevent.spawn(opener.open, timeout=10) for _ in range(100)]
        settle()
        assert (opener.stats().opened, acceptor.stats().backlog) == (8, 8)
        accepted = [acceptor.accept(timeout=10) for _ in range(100)]
        gevent.joinall(opening, timeout=10, raise_error=True)
        assert [stream.stream_id for stream in accepted] == list(range(1, 200, 2))
        assert all(greenlet.value.wait_established(5) for greenlet in opening)
        assert opener.stats().unacknowledged == 0


def test_opens_resets_and_accepts_at_random_leave_every_count_at_zero():
    """Rules 1, 2, 5 and 6: whatever order the ends come in."""
    with sessions("socketpair", Config(accept_backlog=4), Config(accept_backlog=4)) as (opener, acceptor):
        ways = itertools.cycle(("close", "reset", "close_write", "finish"))

        def use(session, way):
            try:
                stream = session.open(timeout=10)
                stream.sendall(b"x")
                if way == "finish":
                    stream.read(1)
                    stream.close()
                else:
                    getattr(stream, way)()
                    gevent.sleep(0)
                    stream.close()
            except StreamReset:
                pass

        def serve(session, way):
            for stream in session:
                try:
                    stream.sendall(b"y")
                    getattr(stream, next(way))()
                except geyamux.StreamError:
                    pass
                stream.close()

        serving = [
            gevent.spawn(serve, session, itertools.cycle(("close", "reset", "close"))) for session in (opener, acceptor)
        ]
        using = [gevent.spawn(use, session, next(ways)) for _ in range(300) for session in (opener, acceptor)]
        gevent.joinall(using, timeout=20, raise_error=True)
        settle()
        for session in (opener, acceptor):
            stats = session.stats()
            assert (stats.streams, stats.backlog, stats.unacknowledged, stats.unread) == (0, 0, 0, 0)
            assert not session.closed
        gevent.killall(serving)


# --- at the end of the session ---


def test_streams_that_came_before_the_end_are_still_accepted_and_read():
    """Rules 9 and 22: then the end."""
    with facing() as (session, peer):
        peer.send(data(2, b"whole", SYN | FIN) + data(4, b"cut", SYN))
        peer.close()
        settle()
        whole, cut = session.accept(timeout=0), session.accept(timeout=0)
        assert whole.read() == b"whole"
        assert cut.recv(100) == b"cut"
        with pytest.raises(SessionClosed):
            cut.recv(100)
        with pytest.raises(SessionClosed):
            session.accept()


def test_open_after_go_away_of_the_peer_is_refused_by_name():
    """Rule 21: as a connection that is refused."""
    with facing() as (session, peer):
        peer.send(go_away(0))
        settle()
        with pytest.raises(RemoteGoAway) as caught:
            session.open()
        assert isinstance(caught.value, ConnectionRefusedError) and caught.value.errno == errno.ECONNREFUSED
