"""Is the peer there? Keepalive, the write-stall timer and pings: rules 24 to 26.

Longer than other modules because all tests of one subject stand together, each short and by itself.
"""

from __future__ import annotations

import contextlib
import gc
import itertools
import logging
import re
import time

import gevent
import pytest
from gevent import socket as gsocket

from geyamux import Config, KeepaliveTimeout, SessionClosed, TransportError, WriteTimeout
from support.facing import ROLES, facing, narrow_pair, outcome, start
from support.links import sessions
from support.rawpeer import settle
from support.transports import FaultyTransport
from support.wire import ACK, DATA, PING, RST, SYN, WINDOW_UPDATE, data, ping, window_update

SOON = 0.03
"""A time limit that a test waits for."""
NEVER = 1000.0

both_roles = pytest.mark.parametrize("role", ROLES)
both_directions = pytest.mark.parametrize("swap", [False, True], ids=["client", "server"])


def keepalive(interval=SOON, timeout=NEVER, **more):
    return Config(keepalive_interval=interval, keepalive_timeout=timeout, **more)


# --- keepalive: rule 24 ---


@both_roles
def test_a_ping_goes_out_into_silence(role):
    """Rule 24: on stream 0, with exactly SYN, since some peers end the session at anything else."""
    with facing(role, keepalive()) as (_, peer):
        found = peer.next()
        assert peer.received[:8] == bytes.fromhex("0002 0001 00000000")
        assert (found.type, found.flags, len(peer.received)) == (PING, SYN, 12)


def test_pings_go_on_as_long_as_they_are_answered():
    """Rule 24: each with a value of its own."""
    with facing(config=keepalive(timeout=5.0)) as (session, peer):
        values = set()
        for _ in range(5):
            found = peer.expect(PING, SYN, 0)
            values.add(found.length)
            peer.send(ping(ACK, found.length))
        assert len(values) == 5
        assert not session.closed


def test_without_an_interval_there_is_no_keepalive():
    """Rule 24."""
    with facing(config=Config(keepalive_interval=None)) as (session, peer):
        gevent.sleep(SOON)
        peer.expect_nothing()
        assert not session.closed


@pytest.mark.parametrize("words", [window_update(99, 5), data(99, b"x"), ping(ACK, 77)], ids=["credit", "Data", "pong"])
def test_while_anything_is_heard_no_ping_goes_out(words):
    """Rule 24: any byte received proves life."""
    with facing(config=keepalive(interval=0.1)) as (_, peer):
        for _ in range(15):
            peer.send(words)
            gevent.sleep(0.02)
        peer.expect_nothing()


def test_a_trickle_of_single_bytes_proves_life():
    """Rule 24: not even a header has to be complete."""
    with facing(config=keepalive(interval=0.1, timeout=0.1)) as (session, peer):
        for byte in data(99, b"x" * 8):
            peer.send(bytes([byte]))
            gevent.sleep(0.02)
        peer.expect_nothing()
        assert not session.closed


@both_roles
def test_silence_after_the_ping_ends_the_session(role):
    """Rule 24."""
    with facing(role, keepalive(timeout=SOON)) as (session, peer):
        reading = start(session.open().recv, 1)
        peer.expect(WINDOW_UPDATE, SYN)
        peer.expect(PING, SYN, 0)
        asked = time.monotonic()
        assert session.join(5)
        assert time.monotonic() - asked >= SOON * 0.9
        assert isinstance(session.exception, KeepaliveTimeout)
        assert isinstance(outcome(reading), KeepaliveTimeout)


def test_any_byte_after_the_ping_saves_the_session():
    """Rule 24: the answer may be stuck behind bulk data, or never come."""
    with facing(config=keepalive(interval=SOON, timeout=0.2)) as (session, peer):
        for _ in range(3):
            peer.expect(PING, SYN, 0)
            gevent.sleep(0.1)
            peer.send(b"\0")
        assert not session.closed
        # And when nothing follows any more, it ends all the same.
        assert session.join(5)
        assert isinstance(session.exception, KeepaliveTimeout)


def test_time_before_the_ping_has_left_is_not_charged():
    """Rules 24 and 25: where the connection takes nothing, that is what ends the session."""
    config = keepalive(interval=SOON, timeout=SOON, connection_write_timeout=0.3)
    with facing(config=config, kind="memory", wrap=FaultyTransport) as (session, _):
        session.conn.stall("send")
        assert session.join(5)
        assert isinstance(session.exception, WriteTimeout)


def test_pings_of_many_sessions_are_not_in_step():
    """Rule 24: ten thousand clients of one server, all started by one deploy."""
    with contextlib.ExitStack() as stack:
        peers = [stack.enter_context(facing(config=keepalive(interval=0.2)))[1] for _ in range(24)]
        began = time.monotonic()

        def first_ping(peer):
            peer.expect(PING, SYN, 0)
            return time.monotonic() - began

        moments = [greenlet.get(timeout=5) for greenlet in [gevent.spawn(first_ping, peer) for peer in peers]]
        assert max(moments) - min(moments) > 0.005
        assert min(moments) > 0.1


def test_many_keepalives_leave_nothing_behind():
    """Rule 24: a leak of an object a tick would show after weeks only."""
    with facing(config=keepalive(interval=0.001, timeout=5.0)) as (session, peer):

        def answer(count):
            for _ in range(count):
                peer.send(ping(ACK, peer.expect(PING, SYN, 0).length))
            gc.collect()
            return len(gc.get_objects())

        before = answer(20)
        assert answer(200) - before < 100
        assert not session.closed


# --- a blocked hub: rule 24 ---


def blocked(caplog):
    return [record for record in caplog.records if "blocked" in record.getMessage()]


def test_time_during_which_our_own_hub_was_blocked_is_not_charged_to_the_peer(caplog):
    """Rule 24: it is logged once, with its length."""
    with facing(config=keepalive(timeout=0.2)) as (session, peer):
        found = peer.expect(PING, SYN, 0)
        time.sleep(0.8)  # as a computation that never switches
        gevent.sleep(0.05)
        assert not session.closed
        peer.send(ping(ACK, found.length))
        settle()
        assert not session.closed
        (record,) = blocked(caplog)
        assert record.levelno == logging.WARNING and record.name == "geyamux"
        assert session.name in record.getMessage()
        assert re.search(r"0\.[6789] s", record.getMessage())


def test_a_block_that_several_timers_find_is_logged_once(caplog):
    """Rule 24: keepalive, the write stall and a stream's limit are all late by it."""
    config = keepalive(timeout=0.2, connection_write_timeout=0.2, stream_open_timeout=0.3)
    with facing(config=config, ends=narrow_pair()) as (session, peer):
        writing = start(session.open().sendall, b"x" * 100_000)
        time.sleep(1.0)
        gevent.sleep(0.01)
        assert not session.closed and not writing.ready()
        assert len(blocked(caplog)) == 1
        while peer.next().type != DATA:
            pass


def test_after_a_block_the_peer_has_its_whole_time_again():
    """Rule 24: and is given up when that has passed."""
    with facing(config=keepalive(timeout=0.15)) as (session, peer):
        peer.expect(PING, SYN, 0)
        time.sleep(0.8)
        ended = time.monotonic()
        assert session.join(5)
        assert isinstance(session.exception, KeepaliveTimeout)
        assert 0.05 <= time.monotonic() - ended < 1.0


def test_a_short_block_is_not_charged_either():
    """Rule 24: the answer is in the socket's buffer when the timer and the reader wake in one turn."""
    with facing(config=keepalive(timeout=0.1)) as (session, peer):
        found = peer.expect(PING, SYN, 0)
        peer.send(ping(ACK, found.length))
        time.sleep(0.3)
        gevent.sleep(0.02)
        assert not session.closed
        assert session.rtt is not None


def test_a_short_block_does_not_make_a_connection_look_stalled():
    """Rules 24 and 25: the connection takes bytes again, but nobody has looked yet."""
    with facing(config=Config(connection_write_timeout=0.1), ends=narrow_pair()) as (session, peer):
        writing = start(session.open().sendall, b"x" * 100_000)
        peer.transport.recv(65536)
        time.sleep(0.3)
        gevent.sleep(0.02)
        assert not session.closed
        while not writing.ready():
            peer.transport.recv(65536)
        assert outcome(writing) is None


@pytest.mark.parametrize("seconds", [0.3, 0.8])
def test_a_block_does_not_reset_a_stream_whose_answer_has_come(seconds):
    """Rules 3 and 24."""
    with facing(config=Config(stream_open_timeout=0.1)) as (session, peer):
        stream = session.open()
        peer.expect(WINDOW_UPDATE, SYN, 1)
        peer.send(window_update(1, 0, ACK))
        time.sleep(seconds)
        gevent.sleep(0.02)
        assert stream.established
        peer.send(data(1, b"x"))
        assert stream.recv(1) == b"x"


# --- the write stall: rule 25 ---


@pytest.mark.parametrize("kind", ["narrow socketpair", "stalled transport"])
def test_a_connection_that_takes_nothing_ends_the_session(kind):
    """Rule 25."""
    config = Config(connection_write_timeout=SOON, outbox_limit=4096)
    more = {"ends": narrow_pair()} if kind == "narrow socketpair" else {"kind": "memory", "wrap": FaultyTransport}
    with facing(config=config, **more) as (session, _):
        if kind == "stalled transport":
            session.conn.stall("send")
        began = time.monotonic()
        writing = start(session.open().sendall, b"x" * 100_000)
        assert isinstance(outcome(writing), WriteTimeout)
        assert time.monotonic() - began >= SOON * 0.9
        assert isinstance(session.exception, WriteTimeout)
        assert session.join(5)


def test_without_a_limit_it_waits():
    """Rule 25."""
    with facing(config=Config(connection_write_timeout=None), ends=narrow_pair()) as (session, peer):
        writing = start(session.open().sendall, b"x" * 100_000)
        gevent.sleep(SOON)
        assert not session.closed and not writing.ready()
        gevent.spawn(peer.rest)
        assert outcome(writing) is None


def test_a_slow_link_that_moves_is_not_dead():
    """Rule 25: bytes wait for much longer than the limit, but never without progress."""
    with facing(config=Config(connection_write_timeout=0.15), ends=narrow_pair()) as (session, peer):
        writing = start(session.open().sendall, b"x" * 60_000)
        began = time.monotonic()
        while not writing.ready():
            peer.transport.recv(4000)
            gevent.sleep(0.02)
        assert time.monotonic() - began > 0.2
        assert outcome(writing) is None


def test_waiting_for_credit_is_no_stall():
    """Rule 25: nothing waits for the connection."""
    with facing(config=Config(connection_write_timeout=SOON)) as (session, peer):
        writing = start(session.open().sendall, b"x" * 300_000)
        peer.expect(WINDOW_UPDATE, SYN, 1)
        peer.expect_data(1, b"x" * 262_144)
        gevent.sleep(SOON * 3)
        assert not session.closed
        peer.send(window_update(1, 100_000))
        peer.expect_data(1, b"x" * (300_000 - 262_144))
        assert outcome(writing) is None


def test_an_idle_session_has_no_stall():
    """Rule 25: the limit runs while bytes wait, and not from the last send on."""
    with facing(config=Config(connection_write_timeout=SOON)) as (session, peer):
        stream = session.open()
        for _ in range(3):
            stream.sendall(b"x")
            gevent.sleep(SOON * 2)
        assert not session.closed
        peer.expect(WINDOW_UPDATE, SYN, 1)


def test_the_limit_starts_anew_with_each_byte_taken():
    """Rule 25: a stall that ends in time leaves no debt."""
    config = Config(connection_write_timeout=0.15)
    with facing(config=config, kind="memory", wrap=FaultyTransport) as (session, peer):
        stream = session.open()
        peer.expect(WINDOW_UPDATE, SYN, 1)
        for _ in range(3):
            session.conn.stall("send")
            stream.sendall(b"x")
            gevent.sleep(0.08)
            session.conn.release()
            peer.expect_data(1, b"x")
        assert not session.closed


# --- pings: rule 26 ---


@both_roles
def test_a_ping_is_answered_by_its_value(role):
    """Rule 26."""
    with facing(role) as (session, peer):
        pinging = start(session.ping)
        found = peer.next()
        assert peer.received[:8] == bytes.fromhex("0002 0001 00000000")
        assert not pinging.ready()
        peer.send(bytes.fromhex("0002 0002 00000000") + found.length.to_bytes(4, "big"))
        rtt = outcome(pinging)
        assert isinstance(rtt, float) and 0 < rtt < 5
        assert session.rtt == pytest.approx(rtt)


@both_directions
def test_both_ends_can_ping(link_kind, swap):
    """Rule 26, over every kind of link, beside data."""
    with sessions(link_kind, swap=swap) as (client, server):
        here, there = (server, client) if swap else (client, server)
        stream = here.open()
        stream.sendall(b"x" * 100_000)
        results = [outcome(greenlet) for greenlet in [start(here.ping), start(there.ping), start(here.ping)]]
        assert all(0 < rtt < 5 for rtt in results)
        assert there.accept(timeout=5).read(100_000) == b"x" * 100_000


def test_those_who_ask_at_once_share_one_ping():
    """Rule 26: go-yamux leaves most of many unanswered."""
    with facing() as (session, peer):
        pinging = [start(session.ping) for _ in range(5)]
        found = peer.expect(PING, SYN, 0)
        peer.expect_nothing()
        peer.send(ping(ACK, found.length))
        results = [outcome(greenlet) for greenlet in pinging]
        assert len(set(results)) == 1
        again = start(session.ping)
        assert peer.expect(PING, SYN, 0).length != found.length
        again.kill()


@pytest.mark.parametrize("leave", ["kill", "timeout"])
def test_one_that_leaves_does_not_take_the_ping_from_the_others(leave):
    """Rule 26."""
    with facing() as (session, peer):
        first = start(session.ping, SOON if leave == "timeout" else None)
        second = start(session.ping, None)
        found = peer.expect(PING, SYN, 0)
        if leave == "kill":
            first.kill()
        else:
            assert isinstance(outcome(first), TimeoutError)
        peer.send(ping(ACK, found.length))
        assert isinstance(outcome(second), float)


def test_a_ping_that_is_not_answered_in_time_raises_and_the_session_lives():
    """Rule 26: exactly the error of a socket. Some peers answer not every ping."""
    with facing(config=Config(keepalive_timeout=SOON)) as (session, peer):
        for timeout in ((), (0.001,), (0,)):
            with pytest.raises(TimeoutError) as caught:
                session.ping(*timeout)
            assert caught.value.args == ("timed out",)
        assert not session.closed
        assert session.rtt is None
        peer.expect(PING, SYN, 0)


def test_a_late_answer_belongs_to_the_ping_it_answers():
    """Rule 26: not to the one that is out now."""
    with facing() as (session, peer):
        with pytest.raises(TimeoutError):
            session.ping(SOON)
        late = peer.expect(PING, SYN, 0)
        pinging = start(session.ping, None)
        current = peer.expect(PING, SYN, 0)
        assert current.length != late.length
        peer.send(ping(ACK, late.length))
        settle()
        assert not pinging.ready()
        peer.send(ping(ACK, current.length) + ping(ACK, late.length))
        assert isinstance(outcome(pinging), float)


def test_answers_nobody_asked_for_are_ignored():
    """Rule 26: before, beside and after a ping, and twice."""
    with facing() as (session, peer):
        peer.send(b"".join(ping(ACK, value) for value in (0, 1, 2, 0xFFFFFFFF)))
        settle()
        pinging = start(session.ping, None)
        found = peer.expect(PING, SYN, 0)
        peer.send(ping(ACK, found.length ^ 1) + ping(ACK, found.length + 1))
        settle()
        assert not pinging.ready()
        peer.send(ping(ACK, found.length) * 3)
        assert isinstance(outcome(pinging), float)
        peer.expect_nothing()
        assert not session.closed


def test_the_round_trip_begins_when_the_frame_leaves():
    """Rule 26: time in our own queue is not the peer's."""
    with facing(kind="memory", wrap=FaultyTransport) as (session, peer):
        session.conn.stall("send")
        pinging = start(session.ping, None)
        gevent.sleep(0.2)
        session.conn.release()
        peer.send(ping(ACK, peer.expect(PING, SYN, 0).length))
        assert outcome(pinging) < 0.15


def test_the_round_trip_is_smoothed_and_the_shortest_is_kept():
    """Rule 26."""
    with facing() as (session, peer):
        assert session.rtt is None and session.stats().min_rtt is None
        results = []
        for pause in (0.05, 0.0, 0.0):
            pinging = start(session.ping, None)
            found = peer.expect(PING, SYN, 0)
            gevent.sleep(pause)
            peer.send(ping(ACK, found.length))
            results.append(outcome(pinging))
        assert results[1] < session.rtt < results[0]
        assert session.stats().min_rtt == min(results)
        assert session.stats().rtt == session.rtt


def test_a_ping_on_a_session_that_ended_raises_its_reason():
    """Rules 22 and 26."""
    with facing() as (session, _):
        session.abort()
        with pytest.raises(SessionClosed):
            session.ping()


def test_a_ping_that_waits_is_told_of_the_end():
    """Rules 22 and 26."""
    with facing(kind="tcp") as (session, peer):
        pinging = start(session.ping, None)
        peer.close()
        assert isinstance(outcome(pinging), (SessionClosed, TransportError))


# --- pongs: rule 26 ---


def test_a_pong_bears_stream_0_and_exactly_ack_and_the_value():
    """Rule 26: js-yamux ends the session otherwise."""
    with facing() as (_, peer):
        peer.send(bytes.fromhex("0002 0001 00000000 01234567"))
        settle()
        assert peer.transport.recv(100) == bytes.fromhex("0002 0002 00000000 01234567")


def test_every_ping_is_answered_once_and_answers_are_not_merged():
    """Rule 26: also where the values are the same."""
    values = [5, 5, 5, 0, 0xFFFFFFFF, 7, 5]
    with facing() as (_, peer):
        peer.send(b"".join(ping(SYN, value) for value in values))
        assert [peer.expect(PING, ACK, 0).length for _ in values] == values
        peer.expect_nothing()


def test_at_most_32_answers_wait_and_the_rest_is_dropped():
    """Rule 26: a peer that asks and does not read costs us no more. Later ones are answered again."""
    with facing(kind="memory", wrap=FaultyTransport) as (session, peer):
        session.conn.stall("send")
        peer.send(ping(SYN, 1000))  # this one is on its way already
        settle()
        for value in range(200):
            peer.send(ping(SYN, value))
        settle()
        session.conn.release()
        assert peer.expect(PING, ACK, 0).length == 1000
        assert [peer.expect(PING, ACK, 0).length for _ in range(32)] == list(range(32))
        peer.expect_nothing()
        peer.send(ping(SYN, 4711))
        assert peer.expect(PING, ACK, 0).length == 4711


def test_a_burst_of_pings_is_answered_up_to_the_limit_on_a_socket_too():
    """Rule 26: the reader does not send, however many come in one receive."""
    with facing() as (session, peer):
        peer.send(b"".join(ping(SYN, value) for value in range(100)))
        answered = []
        settle()
        while not session.closed and len(answered) < 32:
            answered.append(peer.expect(PING, ACK, 0).length)
        assert answered == list(range(32))
        peer.expect_nothing()


def test_answers_go_ahead_of_waiting_data():
    """Rule 26: so that a busy link does not look like a slow one. The frame under way is finished first."""
    with facing(kind="memory", wrap=FaultyTransport) as (session, peer):
        streams = [session.open() for _ in range(3)]
        for own in (1, 3, 5):
            peer.expect(WINDOW_UPDATE, SYN, own)
        session.conn.stall("send")
        writing = [start(stream.sendall, b"x" * 50_000) for stream in streams]
        peer.send(ping(SYN, 1))
        settle()
        session.conn.release()
        peer.expect(DATA, 0, 1)
        peer.expect(PING, ACK, 0, 1)
        peer.expect(DATA, 0, 3)
        peer.expect(DATA, 0, 5)
        gevent.joinall(writing, timeout=5, raise_error=True)


def test_own_pings_go_ahead_of_waiting_data():
    """Rules 24 and 26."""
    with facing(kind="memory", wrap=FaultyTransport) as (session, peer):
        streams = [session.open() for _ in range(2)]
        for own in (1, 3):
            peer.expect(WINDOW_UPDATE, SYN, own)
        session.conn.stall("send")
        writing = [start(stream.sendall, b"x" * 50_000) for stream in streams]
        pinging = start(session.ping, None)
        session.conn.release()
        peer.expect(DATA, 0, 1)
        found = peer.expect(PING, SYN, 0)
        peer.expect(DATA, 0, 3)
        peer.send(ping(ACK, found.length))
        assert isinstance(outcome(pinging), float)
        gevent.joinall(writing, timeout=5, raise_error=True)


def test_a_peer_that_asks_without_end_and_never_reads_stalls_only_itself():
    """Rules 25 and 26: nothing grows, and the stall timer ends it."""
    with facing(config=Config(connection_write_timeout=0.1), ends=narrow_pair()) as (session, peer):

        def ask():
            for value in itertools.count():
                peer.send(ping(SYN, value & 0xFFFFFFFF))

        with pytest.raises(OSError), gevent.Timeout(10):
            ask()
        assert isinstance(session.exception, WriteTimeout)
        assert session.stats().queued == 0


def test_where_windows_grow_the_round_trip_is_measured_at_once():
    """Rule 24: growth depends on it."""
    with facing(config=Config(window_auto_tune=True)) as (session, peer):
        peer.send(ping(ACK, peer.expect(PING, SYN, 0).length))
        settle()
        assert session.rtt is not None


def test_a_busy_connection_neither_starves_pings_nor_looks_dead():
    """Rules 24 and 27: while bulk data runs both ways."""
    config = Config(keepalive_interval=SOON, keepalive_timeout=0.5)
    with sessions("tcp", config, config) as (client, server):
        ends = client.open(), server.accept(timeout=5)
        total = 8 << 20

        def write(end):
            end.sendall(b"x" * total)
            end.close_write()

        def read(end):
            return len(end.read())

        pumps = [gevent.spawn(function, end) for function in (write, read) for end in ends]
        times = []
        while not all(greenlet.ready() for greenlet in pumps):
            times.append(client.ping(5))
        assert [greenlet.get(timeout=5) for greenlet in pumps] == [None, None, total, total]
        assert times and max(times) < 0.5
        assert not client.closed and not server.closed


def test_no_reset_and_no_frame_but_pings_leaves_an_idle_session():
    """Rule 24."""
    near, far = gsocket.socketpair()
    with facing(config=keepalive(timeout=5.0), ends=(near, far)) as (session, peer):
        seen = [peer.next() for _ in range(1)]
        peer.send(ping(ACK, seen[0].length))
        seen.append(peer.next())
        assert {(found.type, found.flags, found.stream_id) for found in seen} == {(PING, SYN, 0)}
        assert not [found for found in seen if found.flags & RST]
        assert session.num_streams == 0
