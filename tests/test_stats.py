"""What stats() and repr() tell: records, the ledger behind them, and that the numbers are those of what passed.

Longer than other modules because every reason for a reset has its scene.
"""

from __future__ import annotations

import dataclasses
import os
import re
import subprocess
import sys
from pathlib import Path

import gevent
import pytest
from gevent import socket as gsocket

import geyamux
from geyamux import Client, Config, Server, Stream, StreamReset, stats
from geyamux.stats import RESET_REASONS, Ledger, SessionStats, StreamStats
from support.facing import facing, narrow_pair, outcome, start
from support.links import sessions
from support.rawpeer import settle
from support.waiting import wait_for
from support.wire import FIN, RST, SYN, WINDOW_UPDATE, data, window_update

ROOT = Path(geyamux.__file__).parent.parent
WINDOW = 262144
PATIENCE = 10.0
#: Short, for limits that shall pass.
SOON = 0.05

SESSION = {
    "age": 12.5,
    "streams": 1,
    "opened": 2,
    "incoming": 3,
    "accepted": 3,
    "resets": {"received": 1},
    "backlog": 4,
    "unacknowledged": 5,
    "bytes_sent": 6,
    "bytes_received": 7,
    "frames_sent": 8,
    "frames_received": 9,
    "queued": 10,
    "unread": 11,
    "rtt": 0.25,
    "min_rtt": None,
    "idle": 1.5,
    "blocked": 2.5,
    "blocked_streams": 1,
}

STREAM = {
    "stream_id": 1,
    "state": "ESTABLISHED",
    "bytes_sent": 9,
    "bytes_received": 8,
    "unread": 2,
    "receive_window": 3,
    "receive_limit": 4,
    "send_credit": 5,
    "is_queued": False,
    "blocked": 0.5,
    "readers": 6,
    "writers": 7,
}

RECORDS = [(SessionStats, SESSION), (StreamStats, STREAM)]


@pytest.mark.parametrize(("kind", "values"), RECORDS)
def test_a_record_holds_what_it_was_given_and_nothing_else(kind, values):
    assert dataclasses.asdict(kind(**values)) == values


@pytest.mark.parametrize(("kind", "values"), RECORDS)
def test_a_record_never_changes(kind, values):
    record = kind(**values)
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(record, next(iter(values)), 0)
    assert record == kind(**values)


@pytest.mark.parametrize(("kind", "values"), RECORDS)
def test_no_number_may_be_left_out_or_given_without_its_name(kind, values):
    for name in values:
        with pytest.raises(TypeError, match=name):
            kind(**{key: value for key, value in values.items() if key != name})
    with pytest.raises(TypeError):
        kind(*values.values())


# --- the ledger ---


@pytest.fixture
def clock(monkeypatch):
    class Clock:
        now = 100.0

        def monotonic(self):
            return self.now

    clock = Clock()
    monkeypatch.setattr(stats, "time", clock)
    return clock


def test_the_ledger_adds_up_credit_by_stream():
    ledger = Ledger()
    ledger.add_credit(1, 10)
    ledger.add_credit(3, 5)
    ledger.add_credit(1, 7)
    assert (ledger.account(1).credited, ledger.account(3).credited, ledger.account(5).credited) == (17, 5, 0)


def test_the_ledger_forgets_a_stream_that_ended_and_returns_what_it_knew():
    ledger = Ledger()
    ledger.add_credit(1, 10)
    ledger.granted[1] = 20
    ledger.blocked[1] = 0.5
    account = ledger.close(1)
    assert (account.credited, account.granted, account.blocked) == (10, 20, 0.5)
    assert ledger.close(1) is None
    assert not (ledger.credited or ledger.granted or ledger.blocked)


def test_the_ledger_times_waits_that_go_on_and_sums_up_all(clock):
    ledger = Ledger()
    ledger.begin_wait("a")
    clock.now = 101.0
    ledger.begin_wait("b")
    clock.now = 103.0
    assert (ledger.waiting("a"), ledger.waiting("b"), ledger.waiting("c")) == (3.0, 2.0, 0.0)
    assert ledger.all_blocked() == 5.0
    assert ledger.end_wait("a") == 3.0
    clock.now = 104.0
    assert (ledger.waiting("a"), ledger.all_blocked()) == (0.0, 6.0)
    assert ledger.end_wait("b") == 3.0
    assert ledger.all_blocked() == 6.0


# --- bytes of a stream ---


def read_all(stream, size, how):
    left = size
    while left:
        got = len(how(stream, left))
        assert got
        left -= got


READS = {
    "recv": lambda stream, left: stream.recv(65536),
    "recv of little": lambda stream, left: stream.recv(1000),
    "read": lambda stream, left: stream.read(min(left, 50_000)),
    "recv_into": lambda stream, left: bytes(stream.recv_into(bytearray(7000))),
    "peek and read1": lambda stream, left: stream.peek() and stream.read1(),
}

CONFIGS = {
    "default": Config(),
    "large windows": Config(max_stream_window=1 << 20),
    "growing windows": Config(window_auto_tune=1 << 22),
}


@pytest.mark.parametrize("how", READS.values(), ids=READS)
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("swap", [False, True], ids=["opened", "accepted"])
def test_the_bytes_of_a_stream_are_those_that_passed(how, config, swap):
    """While it lives, when it has ended, and when the session has."""
    size = 3_000_001 if how is not READS["recv of little"] else 400_003
    with sessions("socketpair", config, config) as (client, server):
        client.ping()  # windows grow when there is a round trip to measure by
        opened = client.open()
        accepted = server.accept(timeout=PATIENCE)
        near, far = (accepted, opened) if swap else (opened, accepted)
        writing = gevent.spawn(near.sendall, bytes(size))
        read_all(far, size, how)
        writing.get(timeout=PATIENCE)
        far.sendall(b"answer")
        settle()
        assert (near.stats().bytes_sent, far.stats().bytes_received) == (size, size)
        assert (far.stats().bytes_sent, near.stats().bytes_received, near.stats().unread) == (6, 6, 6)
        near.read(6)
        for stream in (near, far):
            stream.close_write()
        assert near.read() == far.read() == b""
        settle()
        for _ in range(2):
            assert (near.stats().bytes_sent, near.stats().bytes_received) == (size, 6)
            assert (far.stats().bytes_sent, far.stats().bytes_received) == (6, size)
            client.close()
            server.join(PATIENCE)


def test_what_waits_to_be_read_counts_as_received_and_what_waits_for_credit_not_as_sent(pair):
    near = pair[0].open()
    far = pair[1].accept(timeout=PATIENCE)
    writing = start(near.sendall, bytes(WINDOW + 1))
    assert (near.stats().bytes_sent, near.stats().send_credit, near.stats().writers) == (WINDOW, 0, 1)
    assert (far.stats().bytes_received, far.stats().unread, far.stats().receive_window) == (WINDOW, WINDOW, 0)
    writing.kill()


def test_a_session_that_ended_in_the_middle_keeps_the_counts_of_its_streams(pair):
    near = pair[0].open()
    far = pair[1].accept(timeout=PATIENCE)
    writing = start(near.sendall, bytes(WINDOW * 3))
    read_all(far, WINDOW + 1000, READS["read"])
    settle()
    before = (near.stats(), far.stats())
    pair[0].abort()
    assert isinstance(outcome(writing), (geyamux.SessionClosed, StreamReset))
    pair[1].join(PATIENCE)
    for stream, earlier in zip((near, far), before, strict=True):
        now = stream.stats()
        assert (now.bytes_sent, now.bytes_received) == (earlier.bytes_sent, earlier.bytes_received)


def test_an_id_that_is_taken_again_begins_at_nothing():
    with facing("client") as (session, peer):
        peer.send(window_update(2, 1000, SYN))
        first = session.accept(timeout=PATIENCE)
        peer.send(data(2, b"four") + window_update(2, 500))
        assert first.read(4) == b"four"
        first.sendall(b"x" * 100)
        peer.send(window_update(2, 0, RST) + window_update(2, 0, SYN))
        second = session.accept(timeout=PATIENCE)
        assert (first.stats().bytes_sent, first.stats().bytes_received) == (100, 4)
        assert (second.stats().bytes_sent, second.stats().bytes_received) == (0, 0)


def test_a_session_remembers_nothing_of_streams_that_have_ended(pair):
    for _ in range(20):
        near = pair[0].open()
        far = pair[1].accept(timeout=PATIENCE)
        writing = gevent.spawn(near.sendall, bytes(WINDOW * 2))
        read_all(far, WINDOW * 2, READS["recv"])
        writing.get(timeout=PATIENCE)
        near.close()
        far.close()
    # A ping overtakes what waits.
    wait_for(lambda: not any(session.num_streams for session in pair))
    for session in pair:
        ledger = session._table.ledger
        assert not (ledger.credited or ledger.granted or ledger.blocked or ledger.waits)


def test_a_stream_that_was_never_granted_credit_has_no_entry(pair):
    streams = [pair[0].open() for _ in range(10)]
    for stream in streams:
        far = pair[1].accept(timeout=PATIENCE)
        stream.sendall(b"question")
        far.sendall(far.read(8))
        assert stream.read(8) == b"question"
    for session in pair:
        assert not (session._table.ledger.credited or session._table.ledger.granted)
    assert all(stream._rare is None for stream in streams)


def test_a_stream_says_whether_it_waits_for_the_connection():
    near, far = narrow_pair()
    with facing("client", ends=(near, far)) as (session, _):
        stream = session.open()
        assert stream.stats().is_queued  # its SYN leaves at the end of this turn
        settle()
        assert not stream.stats().is_queued
        writing = start(stream.sendall, bytes(100_000))
        assert stream.stats().is_queued
        assert (stream.stats().writers, stream.stats().blocked) == (1, 0.0)
        writing.kill()
        session.abort()
        assert not stream.stats().is_queued


# --- waits for credit ---


def test_time_without_credit_is_counted_while_it_passes_and_afterwards(pair, clock):
    near = pair[0].open()
    far = pair[1].accept(timeout=PATIENCE)
    writing = start(near.sendall, bytes(WINDOW + 1))
    session = near.session
    assert session.stats().blocked_streams == 1
    clock.now += 3.0
    assert (near.stats().blocked, session.stats().blocked) == (3.0, 3.0)
    assert far.read(WINDOW) == bytes(WINDOW)
    assert outcome(writing) is None
    clock.now += 5.0
    assert (near.stats().blocked, session.stats().blocked, session.stats().blocked_streams) == (3.0, 3.0, 0)
    near.reset()
    assert (near.stats().blocked, session.stats().blocked) == (3.0, 3.0)
    assert far.session.stats().blocked == 0.0


def test_waits_of_several_writers_of_a_stream_count_once_and_those_of_streams_add_up(pair, clock):
    first, second = pair[0].open(), pair[0].open()
    writers = [start(stream.sendall, bytes(WINDOW + 1)) for stream in (first, first, second)]
    clock.now += 2.0
    stats = pair[0].stats()
    assert (first.stats().blocked, second.stats().blocked) == (2.0, 2.0)
    assert (stats.blocked, stats.blocked_streams) == (4.0, 2)
    gevent.killall(writers)
    clock.now += 1.0
    stats = pair[0].stats()
    assert (first.stats().blocked, stats.blocked, stats.blocked_streams) == (2.0, 4.0, 0)


@pytest.mark.parametrize("how", ["reset", "peer's reset", "abort", "kill", "timeout"])
def test_a_wait_for_credit_that_ends_badly_is_counted_too(pair, clock, how):
    near = pair[0].open()
    far = pair[1].accept(timeout=PATIENCE)
    if how == "timeout":
        near.settimeout(0.02)
    writing = start(near.sendall, bytes(WINDOW + 1))
    clock.now += 2.0
    {
        "reset": near.reset,
        "peer's reset": far.reset,
        "abort": pair[0].abort,
        "kill": lambda: writing.kill(block=False),
        "timeout": lambda: None,
    }[how]()
    writing.join(PATIENCE)
    assert writing.ready()
    clock.now += 5.0
    assert (near.stats().blocked, pair[0].stats().blocked, pair[0].stats().blocked_streams) == (2.0, 2.0, 0)
    assert not pair[0]._table.ledger.waits


def test_who_does_not_wait_is_not_counted(pair, clock):
    stream = pair[0].open()
    stream.settimeout(0)
    with pytest.raises(BlockingIOError):
        stream.sendall(bytes(WINDOW + 1))
    assert (stream.stats().blocked, pair[0].stats().blocked_streams) == (0.0, 0)


# --- streams by what became of them ---


def reasons(session):
    """The reasons for which streams were reset, and how many."""
    found = session.stats().resets
    assert set(found) == set(RESET_REASONS)
    return {reason: number for reason, number in found.items() if number}


def test_streams_are_counted_when_they_come_and_when_they_are_accepted(pair):
    client, server = pair
    for _ in range(3):
        client.open()
    server.accept(timeout=PATIENCE)
    client.ping()
    assert (client.stats().opened, client.stats().incoming, client.stats().accepted) == (3, 0, 0)
    assert (server.stats().opened, server.stats().incoming, server.stats().accepted) == (0, 3, 1)
    assert server.stats().backlog == 2


def test_every_reason_of_a_reset_is_explained():
    assert all(len(text) > 10 for text in RESET_REASONS.values())


def test_a_reset_counts_here_as_the_application_s_and_there_as_received(pair):
    pair[0].open().reset()  # before it was heard of
    near = pair[0].open()
    pair[1].accept(timeout=PATIENCE)
    near.reset(5)
    near.reset(6)
    near.close()
    pair[0].ping()
    assert (reasons(pair[0]), reasons(pair[1])) == ({"application": 2}, {"received": 1})


def test_an_exception_in_a_with_block_is_the_application_s_reset(pair):
    with pytest.raises(ZeroDivisionError), pair[0].open():
        raise ZeroDivisionError
    assert reasons(pair[0]) == {"application": 1}


def test_streams_in_good_order_are_no_resets(pair):
    with pair[0].open() as near, pair[1].accept(timeout=PATIENCE) as far:
        near.close_write()
        assert far.read() == b""
    pair[0].ping()
    assert reasons(pair[0]) == reasons(pair[1]) == {}


@pytest.mark.parametrize(
    ("config", "reason"),
    [(Config(accept_backlog=2), "refused_backlog"), (Config(max_incoming_streams=2), "refused_limit")],
)
def test_a_stream_beyond_a_limit_is_counted_as_refused(config, reason):
    with facing("server", config) as (session, peer):
        peer.send(b"".join(window_update(stream_id, 0, SYN) for stream_id in (1, 3, 5)))
        peer.expect(WINDOW_UPDATE, RST, 5)
        assert reasons(session) == {reason: 1}
        assert session.stats().incoming == 2


def test_a_stream_that_comes_after_going_away_is_counted_as_refused():
    with facing("server") as (session, peer):
        session.go_away(announce=False)
        session.open()  # else it would end
        peer.send(window_update(1, 0, SYN))
        while peer.next().flags != RST:
            pass
        assert reasons(session) == {"refused_going_away": 1}


def until_reset(peer):
    """Wait for a RST of the session, whatever else comes."""
    while not peer.next().flags & RST:
        pass


def test_time_limits_of_streams_are_told_apart():
    config = Config(accept_timeout=SOON, stream_open_timeout=SOON, stream_close_timeout=SOON)
    with facing("server", config) as (session, peer):
        peer.send(window_update(1, 0, SYN))
        until_reset(peer)
        assert reasons(session) == {"accept_timeout": 1}
        session.open()
        until_reset(peer)
        assert reasons(session) == {"accept_timeout": 1, "open_timeout": 1}
        peer.send(window_update(3, 0, SYN))
        session.accept(timeout=PATIENCE).close()
        until_reset(peer)
        assert reasons(session) == {"accept_timeout": 1, "open_timeout": 1, "close_timeout": 1}


def test_a_write_that_will_never_get_credit_is_told_apart():
    with facing("server", Config(stream_close_timeout=SOON)) as (session, peer):
        peer.send(window_update(1, 0, SYN))
        stream = session.accept(timeout=PATIENCE)
        peer.send(window_update(1, 0, FIN))
        writing = start(stream.sendall, bytes(WINDOW + 1))
        until_reset(peer)
        assert isinstance(outcome(writing), StreamReset)
        assert reasons(session) == {"no_credit": 1}
        assert stream.stats().blocked >= SOON * 0.9


def test_data_beyond_a_window_after_close_is_told_apart():
    with facing("server") as (session, peer):
        peer.send(window_update(1, 0, SYN))
        session.accept(timeout=PATIENCE).close()
        for _ in range(5):
            peer.send(data(1, bytes(WINDOW // 2)))
            settle()
            if reasons(session):
                break
        assert reasons(session) == {"data_after_close": 1}


def test_a_hoarder_is_told_apart():
    with facing("server", Config(receive_budget=WINDOW)) as (session, peer):
        peer.send(window_update(1, 0, SYN) + window_update(3, 0, SYN))
        for _ in range(2):
            session.accept(timeout=PATIENCE)
        peer.send(data(1, bytes(200_000)) + data(3, bytes(100_000)))
        until_reset(peer)
        assert reasons(session) == {"over_budget": 1}


def test_what_was_not_finished_when_the_session_ended_is_told_apart(pair):
    finished, unfinished = pair[0].open(), pair[0].open()
    finished.close_write()
    assert [pair[1].accept(timeout=PATIENCE).stream_id for _ in range(2)] == [1, 3]
    assert unfinished.stats().state == "SYN_SENT"
    pair[0].abort()
    assert pair[1].join(PATIENCE)
    assert reasons(pair[0]) == {"session_end": 1}
    assert reasons(pair[1])["received"] == 1


# --- which streams there are ---


def test_a_session_lists_its_streams(pair):
    first, second = pair[0].open(), pair[0].open()
    assert pair[0].streams == (first, second)
    first.reset()
    assert pair[0].streams == (second,)
    pair[0].ping()
    (unaccepted,) = pair[1].streams
    assert unaccepted.stream_id == 3
    pair[0].abort()
    assert pair[0].streams == ()


# --- repr ---


def test_a_session_says_where_it_leads_what_it_does_and_how_it_ended():
    with sessions("tcp") as (client, server):
        address = client.getpeername()
        assert repr(client) == f"<geyamux.Client {client.name} to {address!r}: open, 0 streams>"
        client.open()
        client.ping()
        assert repr(server).endswith(": open, 1 streams, 1 to accept>")
        server.go_away()
        client.ping()
        assert repr(server).endswith(": open, 1 streams, 1 to accept, takes no new ones>")
        assert repr(client).endswith(": open, 1 streams, the peer takes no new ones>")
        client.close()
        assert repr(client).endswith(": ended (SessionClosed: the session was closed on this side)>")
        server.join(PATIENCE)
        assert re.search(r": ended \(SessionClosed: .+\)>$", repr(server))


def test_a_session_without_addresses_has_none_in_its_repr(pair):
    assert repr(pair[0]) == f"<geyamux.Client {pair[0].name}: open, 0 streams>"


def test_a_stream_says_what_is_unusual_about_it(pair):
    near = pair[0].open()
    name = pair[0].name
    assert repr(near) == f"<geyamux.Stream 1 of {name}: SYN_SENT>"
    far = pair[1].accept(timeout=PATIENCE)
    writing = start(near.sendall, bytes(WINDOW + 1))
    assert repr(near) == f"<geyamux.Stream 1 of {name}: ESTABLISHED, 1 writing, no credit>"
    assert repr(far) == f"<geyamux.Stream 1 of {pair[1].name}: ESTABLISHED, {WINDOW} unread>"
    far.reset(7)
    assert isinstance(outcome(writing), StreamReset)
    assert repr(near) == f"<geyamux.Stream 1 of {name}: RESET by the peer (code 7)>"
    assert repr(far) == f"<geyamux.Stream 1 of {pair[1].name}: RESET by this side (code 7)>"
    near.close()
    assert repr(near) == f"<geyamux.Stream 1 of {name}: RESET by the peer (code 7), closed>"
    other = pair[0].open()
    pair[0].abort()
    assert repr(other) == f"<geyamux.Stream 3 of {name}: RESET by the end of the session>"
    server_side = pair[1].open()
    server_side.close_write()
    pair[1].join(PATIENCE)
    assert repr(server_side).endswith(": SYN_SENT, finished here, session ended>")


@pytest.mark.parametrize("kind", [Stream, Client, Server])
def test_a_repr_does_not_fail_where_nothing_was_made_yet(kind):
    """As a debugger shows it that stands in the constructor."""
    assert repr(kind.__new__(kind)) == f"<geyamux.{kind.__name__}, not made yet>"


def test_a_repr_changes_nothing(pair):
    near = pair[0].open()
    far = pair[1].accept(timeout=PATIENCE)
    far.sendall(b"something")
    settle()
    before = (near.stats(), near._rare, near._buffer, near._piece)
    assert "9 unread" in repr(near)
    assert repr(pair[0])
    assert (near.stats(), near._rare, near._buffer, near._piece) == before


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (StreamReset("stream 1 was reset by the peer (code 5)", 5, remote=True), "code 5"),
        (geyamux.RemoteError("the peer ended the session with GoAway code 2", 2), "GoAway code 2"),
        (geyamux.KeepaliveTimeout("heard nothing for 40.1 s"), "40.1 s"),
        (geyamux.StreamClosed("stream 1 is closed"), "stream 1 is closed"),
        (geyamux.ConfigError("accept_backlog=0 is outside"), "accept_backlog=0"),
    ],
)
def test_the_repr_of_an_error_is_its_kind_and_all_it_has_to_say(error, text):
    assert repr(error).startswith(type(error).__name__)
    assert text in repr(error)


# --- finding a stalled stream ---

WATCHED = r"""client-1: peer heard 0\.\d s ago, answered a ping in \d+\.\d ms; 0 bytes queued
  stream 1: 262144 sent, 0 received: the peer does not read: no credit, writers waited 0\.[3-9] s for it
  stream 3: 0 sent, 0 received: the peer does not write
server-2: peer heard 0\.\d s ago, answered a ping in \d+\.\d ms; 0 bytes queued
  stream 1: 0 sent, 262144 received: nobody reads here: 262144 bytes wait
  stream 3: 0 sent, 0 received: nobody wants anything of it
<geyamux\.Stream 1 of server-2: ESTABLISHED, 262144 unread>
to nobody: peer heard \d\.\d s ago, did not answer a ping; \d+ bytes queued
  stream 1: 262144 sent, 0 received: the connection does not take what was written
to nobody: peer heard \d\.\d s ago, did not answer a ping; 0 bytes queued
  stream 1: 262144 sent, 0 received: the peer does not read: no credit, writers waited \d\.\d s for it
"""


def test_the_example_finds_what_each_stalled_stream_waits_for(tmp_path):
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples" / "watch_streams.py")],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=25,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert re.fullmatch(WATCHED, done.stdout), done.stdout


def test_a_peer_that_never_speaks_makes_the_session_look_idle():
    left, right = gsocket.socketpair()
    session = Client(left)
    try:
        session._reader.heard -= 42.0
        assert 42.0 <= session.stats().idle < 50.0
    finally:
        session.abort()
        right.close()
