"""How a session ends: rules 20 to 23. Whoever waits is told, with the reason; nobody waits longer than was promised.

Longer than other modules because all tests of one subject stand together, each short and by itself.
"""

from __future__ import annotations

import contextlib
import errno
import gc
import re
import socket
import ssl
import struct
import time
from typing import Any

import gevent
import gevent.ssl
import pytest
from gevent import socket as gsocket
from gevent.event import Event

import geyamux
from geyamux import (
    Config,
    KeepaliveTimeout,
    ProtocolError,
    RemoteError,
    RemoteGoAway,
    SessionClosed,
    SessionError,
    StreamReset,
    TransportError,
    WriteTimeout,
)
from support.facing import OWN, PEERS, ROLES, facing, narrow_pair, outcome, session_over, start
from support.links import authority, make_link, sessions, tls_contexts
from support.rawpeer import RawPeer, settle
from support.transports import FaultyTransport, memory_pair
from support.wire import ACK, DATA, FIN, GO_AWAY, PING, RST, SYN, WINDOW_UPDATE, data, go_away, ping, window_update

SOON = 0.05
both_roles = pytest.mark.parametrize("role", ROLES)
both_directions = pytest.mark.parametrize("swap", [False, True], ids=["client", "server"])


# --- everyone who waits, in every state ---


class Turns:
    """Counts the turns of the loop, so that a test can say in which of them something happened.

    libuv gives gevent no watcher for that: there every turn is the same, and only what happens is judged.
    """

    def __init__(self) -> None:
        self.count = 0
        self._watcher = None
        with contextlib.suppress(TypeError):
            self._watcher = gevent.get_hub().loop.prepare(ref=False)
            self._watcher.start(self._next)

    def _next(self) -> None:
        self.count += 1

    def close(self) -> None:
        if self._watcher is not None:
            self._watcher.stop()
            self._watcher.close()


class Waiting:
    """Calls under way, and in which turn of the loop each came back, with what."""

    def __init__(self) -> None:
        self.turns = Turns()
        self.calls: dict[str, gevent.Greenlet] = {}
        self.returned: dict[str, tuple[int, Any]] = {}
        self._draining: list[gevent.Greenlet] = []

    def start(self, name: str, function: Any, *args: Any) -> None:
        def call() -> None:
            try:
                result = function(*args)
            except Exception as error:
                result = error
            self.returned[name] = (self.turns.count, result)

        assert name not in self.calls
        self.calls[name] = gevent.spawn(call)
        settle()
        assert name not in self.returned, f"{name} did not wait but got {self.returned[name][1]!r}"

    def check(self, expected: type[BaseException], results: dict[str, Any] | None = None) -> None:
        """All came back, within one turn of each other, each with a fresh error chained to one reason."""
        gevent.joinall(list(self.calls.values()), timeout=5)
        missing = self.calls.keys() - self.returned.keys()
        assert not missing, f"still waiting: {missing}"
        turns = [turn for turn, _ in self.returned.values()]
        # One turn; but the wakes of so many may be cut in two or three, so that timers are not late (R27).
        assert max(turns) - min(turns) <= 3, {name: turn for name, (turn, _) in self.returned.items()}
        errors = []
        for name, (_, result) in self.returned.items():
            if results is not None and name in results:
                assert result == results[name], name
                continue
            assert isinstance(result, expected), (name, result)
            assert isinstance(result, SessionError) and result.errno == errno.ECONNRESET, name
            assert result.__cause__ is not None, name
            errors.append(result)
        assert len({id(error) for error in errors}) == len(errors), "one object was raised twice"
        assert len({id(error.__cause__) for error in errors}) == 1, "one death has one reason"

    def drain(self, peer: RawPeer) -> None:
        """Let the peer read, so that only what the test stalls stalls."""

        def read() -> None:
            with contextlib.suppress(OSError):
                while peer.transport.recv(1 << 16):
                    pass

        self._draining.append(gevent.spawn(read))

    def close(self) -> None:
        self.turns.close()
        gevent.killall([*self.calls.values(), *self._draining])


@pytest.fixture
def waiting():
    calls = Waiting()
    yield calls
    calls.close()


def wait_to_read(waiting, name, stream):
    """One greenlet in each reading method; all but the first stand in line."""
    for method, args in (
        ("recv", (10,)),
        ("recv_into", (bytearray(10),)),
        ("recvfrom", (10,)),
        ("read", (10,)),
        ("read1", (10,)),
        ("readinto", (bytearray(10),)),
        ("readinto1", (bytearray(10),)),
        ("readline", ()),
        ("readlines", ()),
        ("peek", ()),
        ("__next__", ()),
    ):
        waiting.start(f"{name}: {method}", getattr(stream, method), *args)
    waiting.start(f"{name}: MSG_PEEK", stream.recv, 10, socket.MSG_PEEK)
    waiting.start(f"{name}: read all", stream.read)


def wait_to_write(waiting, name, stream):
    """With no credit left: one greenlet in each writing method, small and large."""
    credit = stream.stats().send_credit
    if credit:
        stream.sendall(b"x" * credit)
    for method, value in (
        ("sendall", b"small"),
        ("send", b"small"),
        ("write", b"x" * 100_000),
        ("writelines", [b"small", b"small"]),
    ):
        waiting.start(f"{name}: {method}", getattr(stream, method), value)


def states(session, peer, role):
    """A stream in each state that its application can have in hands, by name."""
    own, theirs = OWN[role], PEERS[role]
    opened = [session.open() for _ in range(4)]
    peer.send(b"".join(window_update(stream_id, 0, SYN) for stream_id in theirs[:4]))
    accepted = [session.accept(timeout=5) for _ in range(4)]
    peer.send(window_update(own[1], 0, ACK) + window_update(own[2], 0, ACK | FIN))
    opened[3].close_write()
    accepted[1].close_write()
    peer.send(window_update(theirs[2], 0, FIN))
    accepted[3].shutdown(socket.SHUT_RD)
    settle()
    return {
        "SYN SENT": opened[0],
        "OPEN, opened": opened[1],
        "REMOTE CLOSED, opened": opened[2],
        "SYN SENT, LOCAL CLOSED": opened[3],
        "OPEN, accepted": accepted[0],
        "LOCAL CLOSED, accepted": accepted[1],
        "REMOTE CLOSED, accepted": accepted[2],
        "reading shut down": accepted[3],
    }


def everyone_waits(waiting, session, peer, role):
    """Every call that can wait, in every state in which it can."""
    waiting.drain(peer)
    streams = states(session, peer, role)
    for name, stream in streams.items():
        if not (name.startswith("REMOTE CLOSED") or name == "reading shut down"):
            wait_to_read(waiting, name, stream)
        if "LOCAL CLOSED" not in name:
            wait_to_write(waiting, name, stream)
        if name.startswith("SYN SENT"):
            waiting.start(f"{name}: wait_established", stream.wait_established)
    waiting.start("ping", session.ping, None)
    waiting.start("ping, shared", session.ping, None)
    wait_in_session(waiting, session)


def wait_in_session(waiting, session):
    while session.stats().unacknowledged < session.config.accept_backlog:
        session.open()
    settle()
    waiting.start("open", session.open, None)
    waiting.start("open, second in line", session.open, None)
    waiting.start("accept", session.accept)
    waiting.start("listener", session.listener().accept)
    waiting.start("join", session.join)
    waiting.start("gevent.wait", gevent.wait, [session])


def die_by_eof(session, peer):
    # A close with unread bytes would be a reset, for TCP and for Unix sockets.
    peer.transport.shutdown(socket.SHUT_WR)


def die_inside_a_header(session, peer):
    peer.send(bytes.fromhex("0001 0000 0000"))
    settle()
    die_by_eof(session, peer)


def die_inside_a_payload(session, peer):
    peer.send(bytes.fromhex("0000 0000 000003e7 00000010") + b"half")
    settle()
    die_by_eof(session, peer)


def die_by_reset(session, peer):
    """The way a crashed host does it: with nothing read and SO_LINGER 0 TCP sends RST."""
    peer.transport.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    peer.close()


def die_by_go_away(session, peer):
    peer.send(bytes.fromhex("0003 0000 00000000 00000002"))


def die_by_protocol_error(session, peer):
    peer.send(bytes.fromhex("0900 0000 00000000 00000000"))
    die_by_eof(session, peer)


def die_by_abort(session, peer):
    session.abort()


def die_by_a_killed_reader(session, peer):
    session._reader._greenlet.kill()


def die_by_a_killed_writer(session, peer):
    session._outbox._greenlet.kill()


DEATHS = [
    pytest.param(die_by_eof, SessionClosed, id="EOF"),
    pytest.param(die_by_reset, TransportError, id="connection reset"),
    pytest.param(die_by_go_away, RemoteError, id="GoAway 2"),
    pytest.param(die_by_protocol_error, ProtocolError, id="protocol error"),
    pytest.param(die_by_abort, SessionClosed, id="abort"),
    pytest.param(die_by_a_killed_reader, TransportError, id="reader killed"),
    pytest.param(die_by_a_killed_writer, TransportError, id="writer killed"),
]


@both_roles
@pytest.mark.parametrize(("die", "expected"), DEATHS)
def test_everyone_who_waits_gets_the_reason_within_one_turn_of_the_loop(waiting, role, die, expected):
    """Rule 22: in every call and every state of a stream, each a fresh error, all chained to one reason."""
    with facing(role, Config(accept_backlog=8), kind="tcp") as (session, peer):
        everyone_waits(waiting, session, peer, role)
        die(session, peer)
        if expected is ProtocolError:
            # The peer is told first; who joins waits for the end of that.
            for name in ("join", "gevent.wait"):
                waiting.calls.pop(name).join(5)
            assert (waiting.returned.pop("join")[1], waiting.returned.pop("gevent.wait")[1]) == (True, [session])
            waiting.check(expected)
            return
        waiting.check(expected, {"join": True, "gevent.wait": [session]})


@both_roles
@pytest.mark.parametrize("die", [die_inside_a_header, die_inside_a_payload])
def test_an_end_inside_a_frame_breaks_the_streams_and_ends_the_session_quietly(waiting, role, die):
    """Rule 22: a busy peer of some implementations ends so in an ordinary close."""
    with facing(role, Config(accept_backlog=8)) as (session, peer):
        waiting.drain(peer)
        streams = states(session, peer, role)
        wait_to_read(waiting, "OPEN", streams["OPEN, accepted"])
        wait_to_write(waiting, "REMOTE CLOSED", streams["REMOTE CLOSED, accepted"])
        accepting, serving = start(session.accept), start(lambda: list(session))
        die(session, peer)
        waiting.check(TransportError)
        assert isinstance(outcome(accepting), SessionClosed)
        assert outcome(serving) == []
        assert session.exception is None
        assert streams["REMOTE CLOSED, opened"].read() == b"", "it had its FIN"


@pytest.mark.parametrize("own_end", ["go_away", "close"])
def test_an_end_inside_a_frame_after_our_go_away_is_clean(own_end):
    """Rule 22."""
    with facing() as (session, peer):
        stream = session.open()
        if own_end == "go_away":
            session.go_away()
        else:
            stream.close_write()
            closing = start(session.close)
        reading = start(stream.recv, 10)
        peer.send(bytes.fromhex("0000 0000 00000001 00000010") + b"half")
        settle()
        die_by_eof(session, peer)
        assert outcome(reading) == b"half"
        with pytest.raises(SessionClosed):
            stream.recv(10)
        assert session.join(5) and session.exception is None
        if own_end == "close":
            assert outcome(closing) is None


def test_writers_that_wait_for_the_transport_are_woken(waiting):
    """Rule 22: with credit enough, but a connection that takes nothing: writers, a flush, an open."""
    with facing(config=Config(outbox_limit=4096), ends=narrow_pair()) as (session, peer):
        streams = [session.open() for _ in range(4)]
        settle()
        waiting.start("large, begun", streams[0].sendall, b"x" * 100_000)
        waiting.start("large, behind it", streams[1].sendall, b"x" * 100_000)
        waiting.start("large, second in line", streams[1].sendall, b"x" * 100_000)
        streams[2].setblocking(False)
        with pytest.raises(BlockingIOError):
            for _ in range(100):
                streams[2].sendall(b"x" * 1000)
        streams[2].setblocking(True)
        waiting.start("small", streams[2].sendall, b"x" * 1000)
        waiting.start("small of another", streams[3].sendall, b"x" * 1000)
        waiting.start("flush", streams[0].flush)
        waiting.start("open", session.open)
        peer.send(go_away(1))
        waiting.check(RemoteError)


def test_a_keepalive_that_fails_wakes_everyone(waiting):
    """Rules 22 and 24."""
    config = Config(accept_backlog=8, keepalive_interval=0.3, keepalive_timeout=SOON)
    with facing(config=config) as (session, peer):
        everyone_waits(waiting, session, peer, "client")
        waiting.check(KeepaliveTimeout, {"join": True, "gevent.wait": [session]})


def test_a_stalled_connection_wakes_everyone(waiting):
    """Rules 22 and 25."""
    config = Config(accept_backlog=8, connection_write_timeout=0.3)
    with facing(config=config, kind="memory", wrap=lambda end: FaultyTransport(end)) as (session, peer):
        everyone_waits(waiting, session, peer, "client")
        session.conn.stall("send")
        peer.send(ping(SYN, 1))
        waiting.check(WriteTimeout, {"join": True, "gevent.wait": [session]})


@pytest.mark.parametrize("direction", ["send", "recv"])
def test_a_broken_transport_wakes_everyone_and_its_own_error_is_the_cause(waiting, direction):
    """Rule 22."""
    with facing(config=Config(accept_backlog=8), kind="memory", wrap=FaultyTransport) as (session, peer):
        everyone_waits(waiting, session, peer, "client")
        session.conn.break_after(direction, len(ping(SYN, 1)) if direction == "recv" else 0, OSError(errno.EIO, "broken"))
        peer.send(ping(SYN, 1))
        waiting.check(TransportError, {"join": True, "gevent.wait": [session]})
        assert isinstance(session.exception, TransportError)
        cause = session.exception.__cause__
        assert isinstance(cause, OSError) and cause.errno == errno.EIO


@both_directions
def test_a_session_dropped_at_the_other_end_wakes_everyone(waiting, link_kind, swap):
    """Rule 22, over every kind of link."""
    config = Config(accept_backlog=8)
    with sessions(link_kind, config, config, swap=swap) as (client, server):
        here, there = (server, client) if swap else (client, server)
        streams = [here.open() for _ in range(3)]
        far = [there.accept(timeout=5) for _ in range(3)]
        far[1].close_write()
        streams[2].close_write()
        settle()
        wait_to_read(waiting, "OPEN", streams[0])
        wait_to_write(waiting, "REMOTE CLOSED", streams[1])
        wait_to_read(waiting, "LOCAL CLOSED", streams[2])
        wait_in_session(waiting, here)
        there.abort()
        gevent.joinall(list(waiting.calls.values()), timeout=5)
        kinds = {type(result) for _, result in waiting.returned.values() if isinstance(result, BaseException)}
        assert len(waiting.returned) == len(waiting.calls)
        # An abort resets what it can on the way out.
        assert kinds <= {SessionClosed, TransportError, StreamReset}


@pytest.mark.parametrize(("die", "expected"), DEATHS)
def test_after_the_end_nothing_waits_and_everything_says_why(die, expected):
    """Rule 22: a call that comes late gets what the waiting ones got, at once."""
    with facing(kind="tcp") as (session, peer):
        streams = states(session, peer, "client")
        die(session, peer)
        assert session.join(5)
        peer.transport.close()
        assert session.closed and session.ready()
        assert session.join(0) is True
        for call in (session.open, session.accept, session.ping, session.listener().accept):
            with pytest.raises(expected):
                call()
        for name, stream in streams.items():
            if name.startswith("REMOTE CLOSED") or name == "reading shut down":
                assert stream.read() == stream.recv(1) == b"", name
            else:
                for call in (stream.read, stream.readline, stream.peek, stream.wait_established):
                    with pytest.raises(expected):
                        call()
            if "LOCAL CLOSED" not in name:
                with pytest.raises(expected):
                    stream.sendall(b"x")
            assert stream.ready()
            stream.close()
        assert (session.exception is None) == (expected is SessionClosed)
        session.go_away()
        session.close()
        session.abort()
        assert gevent.wait([session], timeout=5) == [session]
        assert session.stats().unread == 0


@pytest.mark.parametrize(("die", "expected"), DEATHS)
def test_iteration_ends_quietly_on_an_orderly_end_and_raises_on_a_broken_one(die, expected):
    """Rule 22."""
    with facing(kind="tcp") as (session, peer):
        peer.send(window_update(2, 0, SYN))
        serving = start(lambda: [stream.stream_id for stream in session])
        die(session, peer)
        result = outcome(serving)
        if expected is SessionClosed:
            assert result == [2]
        else:
            assert isinstance(result, expected)
        assert session.join(5)


def test_buffered_bytes_are_read_before_the_error_and_no_eof_is_made_up():
    """Rules 9 and 22: whatever ended the session."""
    for die, expected in (parameter.values for parameter in DEATHS):
        with facing(kind="tcp") as (session, peer):
            stream = session.open()
            peer.send(data(1, b"buffered"))
            settle()
            die(session, peer)
            assert session.join(5)
            assert stream.recv(4) == b"buff"
            assert stream.recv(100) == b"ered"
            for _ in range(2):
                with pytest.raises(expected):
                    stream.recv(100)


def test_a_read_cut_short_by_the_end_leaves_its_bytes_to_the_next():
    """Rules 8 and 9: all of `read(n)` or nothing is taken."""
    with facing() as (session, peer):
        stream = session.open()
        reading = start(stream.read, 100)
        peer.send(data(1, b"some"))
        settle()
        die_by_eof(session, peer)
        assert isinstance(outcome(reading), SessionClosed)
        assert stream.recv(100) == b"some"


def test_the_main_greenlet_is_told_too():
    """Rule 22: never LoopExit."""
    for call in ("accept", "ping", "join"):
        with facing() as (session, peer):
            gevent.spawn_later(0.001, die_by_eof, session, peer)
            if call == "join":
                assert session.join()
            else:
                with pytest.raises(SessionClosed):
                    getattr(session, call)()


@pytest.mark.parametrize("kind", ["socketpair", "tcp"])
@pytest.mark.parametrize(
    ("last", "heard"),
    [(b"\0\0\0", b""), (data(1, b"last words"), b"last words")],
    ids=["part of a header", "a frame"],
)
def test_a_reset_behind_received_bytes_ends_the_session(kind, last, heard):
    """Rule 22: some loops tell of it together with the bytes, and once only."""
    with facing(kind=kind) as (session, peer):
        stream = session.open()
        settle()
        peer.send(last)
        peer.close()  # with unread bytes
        assert session.join(5)
        assert isinstance(session.exception, TransportError)
        if heard:
            assert stream.recv(100) == heard
        with pytest.raises(TransportError):
            stream.recv(1)


def test_many_more_waiters_than_are_woken_at_once_are_all_woken():
    """Rule 22: readers of 1,000 streams."""
    with facing(config=Config(accept_backlog=1000)) as (session, peer):
        streams = [session.open() for _ in range(1000)]

        def read(stream):
            try:
                return stream.recv(1)
            except SessionError as error:
                return error

        reading = [gevent.spawn(read, stream) for stream in streams]
        settle()
        die_by_eof(session, peer)
        assert {type(outcome(greenlet)) for greenlet in reading} == {SessionClosed}


# --- close ---


@both_roles
def test_close_flushes_then_resets_the_unfinished_then_says_go_away_and_half_closes(role):
    """Rule 20: in this order on the wire."""
    first, second, third = OWN[role][:3]
    with facing(role) as (session, peer):
        live, finished, closed = session.open(), session.open(), session.open()
        live.sendall(b"live")
        finished.sendall(b"finished")
        finished.close_write()
        closed.sendall(b"closed")
        closed.close()
        closing = start(session.close)
        for own in (first, second, third):
            peer.expect(WINDOW_UPDATE, SYN, own)
        peer.expect_data(first, b"live")
        peer.expect_data(second, b"finished")
        peer.expect(WINDOW_UPDATE, FIN, second)
        peer.expect_data(third, b"closed")
        peer.expect(WINDOW_UPDATE, FIN, third)
        peer.expect(WINDOW_UPDATE, RST, first, 0)
        peer.expect_nothing()
        assert not closing.ready(), "it waits for the peer's FINs"
        peer.send(data(second, b"answer", FIN))
        peer.expect_nothing()
        peer.send(window_update(third, 0, FIN))
        peer.expect(GO_AWAY, 0, 0, 0)
        peer.expect_eof()
        assert not closing.ready(), "it reads to the end"
        peer.close()
        assert outcome(closing) is None
        assert session.exception is None
        assert finished.read() == b"answer"
        with pytest.raises(SessionClosed):
            live.recv(1)


def test_close_returns_in_time_though_a_fin_never_comes():
    """Rule 20: GoAway is said then, and the stream that was finished is not reset."""
    with facing() as (session, peer):
        session.open().close_write()
        closing = start(session.close, SOON)
        began = time.monotonic()
        peer.expect(WINDOW_UPDATE, SYN, 1)
        peer.expect(WINDOW_UPDATE, FIN, 1)
        assert outcome(closing) is None
        assert time.monotonic() - began < 2
        assert [found for found in peer.rest() if found.flags & RST] == []


def test_close_of_an_idle_session_is_go_away_and_the_end():
    """Rule 20."""
    with facing() as (session, peer):
        closing = start(session.close)
        assert peer.transport.recv(100) == bytes.fromhex("0003 0000 00000000 00000000")
        assert peer.transport.recv(100) == b""
        peer.close()
        assert outcome(closing) is None


def test_close_refuses_what_is_new():
    """Rule 20: new streams of either side."""
    with facing() as (session, peer):
        session.open().close_write()
        accepting = start(session.accept)
        closing = start(session.close)
        assert session.closed and not session.ready()
        assert isinstance(outcome(accepting), SessionClosed)
        with pytest.raises(SessionClosed):
            session.open()
        peer.send(window_update(2, 0, SYN))
        peer.expect(WINDOW_UPDATE, SYN, 1)
        peer.expect(WINDOW_UPDATE, FIN, 1)
        peer.expect(WINDOW_UPDATE, RST, 2)
        peer.send(window_update(1, 0, FIN))
        peer.expect(GO_AWAY, 0, 0, 0)
        peer.close()
        assert outcome(closing) is None


def test_streams_that_nobody_accepted_are_reset_by_close():
    """Rule 20."""
    with facing() as (session, peer):
        peer.send(window_update(2, 0, SYN) + data(4, b"x", SYN | FIN))
        settle()
        closing = start(session.close)
        assert {peer.expect(WINDOW_UPDATE, RST).stream_id for _ in range(2)} == {2, 4}
        peer.expect(GO_AWAY, 0, 0, 0)
        peer.close()
        assert outcome(closing) is None


def test_those_who_wait_in_streams_are_told_when_close_resets_them(waiting):
    """Rules 20 and 22: by the session's reason, since its end is what reset them."""
    with facing(config=Config(accept_backlog=8)) as (session, peer):
        waiting.drain(peer)
        stream = session.open()
        wait_to_read(waiting, "OPEN", stream)
        wait_to_write(waiting, "OPEN", stream)
        waiting.start("ping", session.ping)
        waiting.start("established", stream.wait_established)
        closing = start(session.close)
        settle()
        peer.close()
        assert outcome(closing) is None
        gevent.joinall(list(waiting.calls.values()), timeout=5)
        assert {type(result) for _, result in waiting.returned.values()} == {SessionClosed}
        assert len(waiting.returned) == len(waiting.calls)


def test_everyone_may_close_and_join_at_once():
    """Rule 20: once on the wire; all return."""
    with facing() as (session, peer):
        closing = [start(session.close) for _ in range(3)] + [start(session.join), start(gevent.wait, [session])]
        peer.expect(GO_AWAY, 0, 0, 0)
        peer.expect_eof()
        peer.close()
        assert [outcome(greenlet) for greenlet in closing] == [None, None, None, True, [session]]
        session.close()


def test_a_close_that_is_killed_goes_on_without_its_caller():
    """Rule 20: it may be started in the hub, so it needs nobody."""
    with facing() as (session, peer):
        closing = start(session.close)
        closing.kill()
        peer.expect(GO_AWAY, 0, 0, 0)
        peer.expect_eof()
        peer.close()
        assert session.join(5)


def test_a_later_close_may_be_more_impatient():
    """Rule 20: it returns within its own timeout."""
    with facing() as (session, _):
        session.open().close_write()
        patient = start(session.close, None)
        with gevent.Timeout(2):
            session.close(timeout=SOON)
        assert outcome(patient) is None and session.ready()


@pytest.mark.parametrize("timeout", [0, SOON])
def test_close_returns_within_its_timeout_against_a_peer_that_never_reads(timeout):
    """Rule 20: with full buffers all the way, nothing can be flushed."""
    with facing(ends=narrow_pair()) as (session, _):
        stream = session.open()
        writing = start(stream.sendall, b"x" * 200_000)
        began = time.monotonic()
        session.close(timeout=timeout)
        assert time.monotonic() - began < 1
        assert session.ready()
        assert isinstance(outcome(writing), SessionClosed)


def test_close_uses_close_timeout_where_none_is_given():
    """Rule 20."""
    with facing(config=Config(close_timeout=SOON), ends=narrow_pair()) as (session, _):
        writing = start(session.open().sendall, b"x" * 200_000)
        with gevent.Timeout(2):
            session.close()
        assert isinstance(outcome(writing), SessionClosed)


def test_close_returns_though_the_peer_never_stops_sending(waiting):
    """Rule 20: what it sends is thrown away."""
    with facing(config=Config(close_timeout=SOON)) as (session, peer):
        waiting.drain(peer)

        def flood():
            with contextlib.suppress(OSError):
                while True:
                    peer.send(ping(SYN, 1) * 100)
                    gevent.sleep(0)

        flooding = gevent.spawn(flood)
        gevent.sleep(0.01)
        with gevent.Timeout(2):
            session.close()
        assert session.exception is None
        flooding.join(5)
        assert flooding.ready()


class Stubborn:
    """A transport one of whose calls waits on, whatever is done to it."""

    def __init__(self, stubborn: str) -> None:
        self.stubborn = stubborn
        self.mercy = Event()
        self.inside = Event()
        self.closed = False

    def _wait(self, name: str) -> None:
        if name != self.stubborn:
            return
        self.inside.set()
        while not self.mercy.is_set():
            # Not even a kill ends it: so does a greenlet that is inside a foreign library's retry loop.
            with contextlib.suppress(BaseException):
                self.mercy.wait()

    def recv(self, size: int) -> bytes:
        self._wait("recv")
        self.mercy.wait()
        return b""

    def sendall(self, data: bytes) -> None:
        self._wait("send")

    def shutdown(self, how: int) -> None:
        self._wait("shutdown")

    def close(self) -> None:
        self._wait("close")
        self.closed = True


@pytest.mark.parametrize("stubborn", ["recv", "send", "shutdown", "close"])
@pytest.mark.parametrize("how", ["close", "abort", "with"])
def test_the_end_does_not_wait_for_a_transport_that_can_not_be_interrupted(stubborn, how):
    """Rule 20: whatever the transport does."""
    transport = Stubborn(stubborn)
    session = session_over(transport, config=Config(close_timeout=SOON))
    try:
        stream = session.open()
        reading = start(stream.recv, 1)
        with gevent.Timeout(2):
            if how == "with":
                with session:
                    pass
            else:
                getattr(session, how)()
            assert session.join()
        assert isinstance(outcome(reading), SessionClosed)
        assert session.ready()
    finally:
        transport.mercy.set()
        settle()
    assert transport.closed


@pytest.mark.parametrize("loop", ["_reader", "_outbox"])
@pytest.mark.parametrize("moment", ["before", "during"])
def test_close_returns_though_a_loop_was_killed(loop, moment):
    """Rule 20: a killed reader or writer ends the session by itself, or lets close() end it."""
    with facing(config=Config(close_timeout=1.0)) as (session, peer):
        session.open().close_write()
        settle()
        if moment == "before":
            getattr(session, loop)._greenlet.kill()
            with gevent.Timeout(3):
                session.close()
        else:
            closing = start(session.close)
            getattr(session, loop)._greenlet.kill()
            peer.send(window_update(1, 0, FIN))
            peer.close()
            assert outcome(closing) is None
        assert session.ready()


def test_close_in_a_finaliser_starts_and_returns():
    """Rule 20: the collector runs it, wherever it pleases."""

    class Holder:
        def __init__(self, session):
            self.session = session

        def __del__(self):
            self.session.close()

    with facing() as (session, peer):
        holder = Holder(session)
        holder.itself = holder
        del holder
        done = Event()

        def collect():
            gc.collect()
            done.set()

        gevent.get_hub().loop.run_callback(collect)
        done.wait()
        assert session.closed
        peer.expect(GO_AWAY, 0, 0, 0)
        peer.close()
        assert session.join(5)


@pytest.mark.parametrize("error", [None, ValueError("of the body")])
def test_with_closes_in_order_also_on_an_exception(error):
    """Rule 20: unlike a stream's, whose torn body must not look whole."""
    with facing() as (session, peer):

        def body():
            with session as same:
                assert same is session
                stream = session.open()
                stream.sendall(b"x")
                stream.close()
                if error is not None:
                    raise error

        running = start(body)
        peer.expect(WINDOW_UPDATE, SYN, 1)
        peer.expect_data(1, b"x")
        peer.expect(WINDOW_UPDATE, FIN, 1)
        peer.send(window_update(1, 0, FIN))
        peer.expect(GO_AWAY, 0, 0, 0)
        peer.expect_eof()
        peer.close()
        assert outcome(running) is error


def test_close_does_not_raise_for_what_the_peer_does_meanwhile():
    """Rule 20."""
    for die, _ in (parameter.values for parameter in DEATHS):
        with facing(kind="tcp") as (session, peer):
            session.open().close_write()
            closing = start(session.close)
            settle()
            die(session, peer)
            settle()
            peer.close()
            assert outcome(closing) is None
            assert session.ready()


@both_directions
def test_after_close_both_ends_are_clean_and_all_bytes_are_there(link_kind, swap):
    """Rule 20, over every kind of link: what was written and finished before arrives whole."""
    with sessions(link_kind, swap=swap) as (client, server):
        here, there = (server, client) if swap else (client, server)
        opened = [here.open() for _ in range(5)]
        for number, stream in enumerate(opened):
            stream.sendall(b"%d" % number * 10_000)
            stream.close()
        far = [there.accept(timeout=5) for _ in range(5)]
        closing = start(here.close)
        for number, stream in enumerate(far):
            assert stream.read() == b"%d" % number * 10_000
            stream.close()
        assert outcome(closing) is None
        assert there.join(5)
        assert here.exception is None and there.exception is None


@both_directions
def test_a_cut_stream_is_no_eof_for_the_other_end(link_kind, swap):
    """Rule 20: close() resets what was not finished, behind its flushed data."""
    with sessions(link_kind, swap=swap) as (client, server):
        here, there = (server, client) if swap else (client, server)
        here.open().sendall(b"half of it")
        stream = there.accept(timeout=5)
        assert stream.read(10) == b"half of it"
        here.close()
        with pytest.raises((StreamReset, SessionError)):
            stream.recv(1)


def test_close_of_a_session_in_a_stream_leaves_the_carrying_session_alone():
    """Rule 20: the transport is half-closed by its own means."""
    with make_link("stream") as link:
        near, far = link
        inner, peer = session_over(near), RawPeer(far)
        closing = start(inner.close)
        peer.expect(GO_AWAY, 0, 0, 0)
        peer.expect_eof()
        assert not near.session.closed
        peer.close()
        assert outcome(closing) is None
        assert near.closed and not near.session.closed


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3], ids=["1.2", "1.3"])
def test_close_over_tls_says_close_notify(version):
    """Rule 20: a peer that insists on it gets a clean end."""
    near_context, far_context = tls_contexts(version)
    near, far = gsocket.socketpair()
    accepting = gevent.spawn(far_context.wrap_socket, far, server_side=True, suppress_ragged_eofs=False)
    session = session_over(near_context.wrap_socket(near, server_hostname="localhost"))
    peer = RawPeer(accepting.get(timeout=5))
    closing = start(session.close)
    peer.expect(GO_AWAY, 0, 0, 0)
    peer.expect_eof()
    peer.close()
    assert outcome(closing) is None


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3], ids=["1.2", "1.3"])
def test_the_end_over_tls_without_close_notify_is_no_eof_of_a_stream(version):
    """Rules 9 and 22: anybody on the way could cut it there."""
    near_context, far_context = tls_contexts(version)
    near, far = gsocket.socketpair()
    accepting = gevent.spawn(far_context.wrap_socket, far, server_side=True)
    session = session_over(near_context.wrap_socket(near, server_hostname="localhost"))
    peer = accepting.get(timeout=5)
    stream = session.open()
    peer.sendall(data(1, b"some"))
    settle()
    raw = gsocket.socket(fileno=peer.detach())
    raw.close()
    assert stream.recv(10) == b"some"
    with pytest.raises(SessionError):
        stream.recv(10)
    assert session.join(5)


# --- abort ---


@both_roles
def test_abort_resets_in_one_attempt_and_ends_at_once(role):
    """Rule 20: streams that were not finished; those that were are left alone."""
    with facing(role) as (session, peer):
        live, finished = session.open(), session.open()
        finished.close_write()
        settle()
        live.sendall(b"unsent bytes are lost")
        session.abort()
        assert session.ready() and session.join(0)
        peer.expect(WINDOW_UPDATE, SYN, OWN[role][0])
        peer.expect(WINDOW_UPDATE, SYN, OWN[role][1])
        peer.expect(WINDOW_UPDATE, FIN, OWN[role][1])
        peer.expect(WINDOW_UPDATE, RST, OWN[role][0])
        peer.expect_eof()
        with pytest.raises(SessionClosed):
            live.recv(1)


def test_a_stream_whose_syn_has_not_left_is_not_heard_of_at_an_abort():
    """Rules 18 and 20: an RST for it would be the first the peer hears."""
    with facing() as (session, peer):
        session.open()
        session.abort()
        peer.expect_eof()


def test_abort_against_a_peer_that_never_reads_ends_at_once():
    """Rule 20."""
    with facing(ends=narrow_pair()) as (session, _):
        writing = start(session.open().sendall, b"x" * 200_000)
        session.abort()
        assert session.ready()
        assert isinstance(outcome(writing), SessionClosed)


def test_abort_ends_a_close_that_waits():
    """Rule 20."""
    with facing() as (session, _):
        session.open().close_write()
        closing = start(session.close, None)
        session.abort()
        assert outcome(closing) is None and session.ready()


# --- join ---


def test_join_says_whether_it_has_ended():
    """Its connection is closed then, too."""
    with facing() as (session, peer):
        assert session.join(timeout=0) is False
        assert session.join(timeout=0.01) is False
        joining = start(session.join)
        peer.close()
        assert outcome(joining) is True
        assert session.conn.fileno() == -1


# --- going away ---


@both_roles
def test_go_away_is_said_once_and_refuses_new_streams_while_all_else_goes_on(role):
    """Rule 21: opening goes on, too."""
    own, theirs = OWN[role], PEERS[role]
    with facing(role) as (session, peer):
        peer.send(window_update(theirs[0], 0, SYN) + window_update(theirs[1], 0, SYN))
        stream = session.accept(timeout=5)
        session.go_away()
        session.go_away()
        peer.expect(WINDOW_UPDATE, ACK, theirs[0])
        peer.expect(GO_AWAY, 0, 0, 0)
        peer.send(window_update(theirs[2], 0, SYN) + data(theirs[0], b"still"))
        peer.expect(WINDOW_UPDATE, RST, theirs[2])
        assert stream.recv(10) == b"still"
        stream.sendall(b"answer")
        peer.expect_data(theirs[0], b"answer")
        assert session.open().stream_id == own[0]
        peer.expect(WINDOW_UPDATE, SYN, own[0])
        assert session.accept(timeout=0).stream_id == theirs[1], "it was there before"
        peer.expect(WINDOW_UPDATE, ACK, theirs[1])
        with pytest.raises(SessionClosed):
            session.accept()
        assert not session.closed
        peer.expect_nothing()


def test_go_away_wakes_those_who_accept():
    """Rule 21: no more will come."""
    with facing() as (session, _):
        accepting, serving = start(session.accept), start(lambda: list(session))
        session.go_away()
        assert isinstance(outcome(accepting), SessionClosed)
        assert outcome(serving) == []
        assert not session.closed


def test_a_quiet_drain_says_go_away_behind_the_last_stream():
    """Rule 21: some peers drop every stream when they hear it. A SYN is refused all the same."""
    with facing() as (session, peer):
        peer.send(window_update(2, 0, SYN))
        stream = session.accept(timeout=5)
        peer.expect(WINDOW_UPDATE, ACK, 2)
        own = session.open()
        session.go_away(announce=False)
        peer.expect(WINDOW_UPDATE, SYN, 1)
        peer.expect_nothing()
        peer.send(window_update(4, 0, SYN))
        peer.expect(WINDOW_UPDATE, RST, 4)
        stream.sendall(b"last words")
        stream.close()
        peer.expect_data(2, b"last words")
        peer.expect(WINDOW_UPDATE, FIN, 2)
        peer.send(window_update(2, 0, FIN))
        peer.expect_nothing()
        own.reset()
        peer.expect(WINDOW_UPDATE, RST, 1)
        peer.expect(GO_AWAY, 0, 0, 0)
        assert not session.closed, "the peer has not said it"


def test_a_quiet_drain_of_an_idle_session_says_go_away_at_once():
    """Rule 21."""
    with facing() as (session, peer):
        session.go_away(announce=False)
        peer.expect(GO_AWAY, 0, 0, 0)


def test_a_quiet_drain_may_be_announced_later():
    """Rule 21: and is not said twice."""
    with facing() as (session, peer):
        stream = session.open()
        session.go_away(announce=False)
        peer.expect(WINDOW_UPDATE, SYN, 1)
        peer.expect_nothing()
        session.go_away()
        peer.expect(GO_AWAY, 0, 0, 0)
        stream.reset()
        peer.expect(WINDOW_UPDATE, RST, 1)
        peer.expect_nothing()


@pytest.mark.parametrize(
    ("config", "goes_away", "text"),
    [
        (Config(), False, r"the peer closed the connection without a GoAway, 1\.[0-3] s after it was last heard"),
        (Config(keepalive_interval=None), False, r".*, 1\.[0-3] s after it was last heard, and keepalive is off"),
        (Config(keepalive_interval=None), True, "the peer closed the connection"),
    ],
    ids=["keepalive", "no keepalive", "a GoAway"],
)
def test_an_end_after_silence_says_so(monkeypatch, config, goes_away, text):
    """R22: balancers that know no Yamux end what is idle, in good order for TCP."""
    with facing("server", config) as (session, peer):
        if goes_away:
            peer.send(go_away(0))
            settle()
        session._reader.heard -= 1.2
        peer.close()
        with pytest.raises(SessionClosed) as caught:
            session.accept()
        assert re.fullmatch(text, caught.value.strerror)


@both_roles
def test_go_away_of_the_peer_ends_opening_and_nothing_else(role):
    """Rule 21: streams live on, and the peer may still open."""
    own, theirs = OWN[role][0], PEERS[role][0]
    with facing(role, Config(accept_backlog=1)) as (session, peer):
        stream = session.open()
        opening = start(session.open)
        peer.send(go_away(0) + data(own, b"before its FIN"))
        result = outcome(opening)
        assert isinstance(result, RemoteGoAway) and result.errno == errno.ECONNREFUSED
        with pytest.raises(ConnectionRefusedError):
            session.open()
        assert stream.recv(100) == b"before its FIN"
        stream.sendall(b"x")
        peer.send(window_update(theirs, 0, SYN))
        assert session.accept(timeout=5).stream_id == theirs
        assert not session.closed and session.exception is None


@both_roles
@pytest.mark.parametrize("first", ["ours", "theirs"])
@pytest.mark.parametrize("announce", [True, False])
def test_when_both_have_said_it_the_session_ends_with_its_last_stream(role, first, announce):
    """Rule 21: in good order."""
    own, theirs = OWN[role][0], PEERS[role][0]
    with facing(role) as (session, peer):
        mine = session.open()
        peer.send(window_update(theirs, 0, SYN))
        yours = session.accept(timeout=5)
        if first == "theirs":
            peer.send(go_away(0))
            settle()
        session.go_away(announce)
        if first == "ours":
            peer.send(go_away(0))
        settle()
        assert not session.closed
        mine.close()
        peer.send(window_update(own, 0, FIN))
        settle()
        assert not session.closed
        yours.sendall(b"the last")
        yours.close()
        peer.send(window_update(theirs, 0, FIN))
        frames = peer.rest()
        assert [found.body for found in frames if found.type == DATA] == [b"the last"]
        assert [found.length for found in frames if found.type == GO_AWAY] == [0]
        assert (frames[-1].type == GO_AWAY) or announce
        assert not [found for found in frames if found.flags & RST]
        peer.close()
        assert session.join(5) and session.exception is None


def test_when_both_have_said_it_and_nothing_is_open_the_session_ends_at_once():
    """Rule 21."""
    with facing() as (session, peer):
        peer.send(go_away(0))
        settle()
        assert not session.closed
        session.go_away()
        peer.expect(GO_AWAY, 0, 0, 0)
        peer.expect_eof()
        peer.close()
        assert session.join(5) and session.exception is None


def test_go_away_may_come_twice():
    """Rule 21: the second says nothing new."""
    with facing() as (session, peer):
        peer.send(go_away(0) * 2 + ping(SYN, 1))
        peer.expect(PING, ACK, 0, 1)
        assert not session.closed


@both_directions
def test_two_sessions_that_both_go_away_end_with_their_last_stream(link_kind, swap):
    """Rule 21, over every kind of link."""
    with sessions(link_kind, swap=swap) as (client, server):
        here, there = (server, client) if swap else (client, server)
        near = here.open()
        far = there.accept(timeout=5)
        here.go_away()
        there.go_away(announce=False)
        near.sendall(b"question")
        near.close_write()
        assert far.read() == b"question"
        far.sendall(b"answer")
        far.close()
        assert near.read() == b"answer"
        near.close()
        assert here.join(5) and there.join(5)
        assert here.exception is None and there.exception is None


# --- the reason ---


def test_the_last_word_of_the_peer_is_the_reason_though_sending_failed_first():
    """Rule 23 and field experience: "broken pipe" hides why."""
    near, far = gsocket.socketpair()
    with facing(ends=(near, far)) as (session, peer):
        stream = session.open()
        settle()
        peer.send(go_away(2))
        peer.transport.close()
        stream.sendall(b"x" * 3000)  # more than is collected: it is sent, and fails, at once
        gevent.sleep(0)
        assert session.join(5)
        assert isinstance(session.exception, RemoteError) and session.exception.code == 2


def test_the_exception_is_none_while_it_lives_and_after_an_orderly_end():
    """And what broke it otherwise; it is not cleared by a close afterwards."""
    with facing() as (session, peer):
        assert session.exception is None
        peer.send(go_away(1))
        assert session.join(5)
        reason = session.exception
        assert isinstance(reason, RemoteError) and reason.code == 1
        session.close()
        session.abort()
        assert session.exception is reason


def test_errors_are_fresh_so_that_tracebacks_do_not_pile_up():
    """Rule 22: one object raised many times would keep every frame it passed."""
    with facing() as (session, peer):
        stream = session.open()
        peer.send(go_away(1))
        assert session.join(5)
        errors = set()
        for _ in range(5):
            for call in (stream.read, session.accept, session.open, session.ping):
                with pytest.raises(RemoteError) as caught:
                    call()
                errors.add(caught.value)
        assert len(errors) == 20
        assert session.exception.__traceback__ is None


def test_a_dead_session_lets_go_of_its_connection(link_kind):
    """Rule 22: the descriptor is closed when the session has ended."""
    with sessions(link_kind) as (client, server):
        server.close()
        assert client.join(5) and server.join(5)
        settle()
        for session in (client, server):
            for part in session.conn if isinstance(session.conn, tuple) else (session.conn,):
                closed = getattr(part, "closed", None)
                assert part.fileno() == -1 if closed is None else closed


def test_memory_transports_and_their_sessions_end_together():
    """Rule 22: also where nothing has a descriptor."""
    near, far = memory_pair()
    client, server = geyamux.Client(near), geyamux.Server(far)
    stream = client.open()
    reading = start(stream.recv, 1)
    server.abort()
    assert isinstance(outcome(reading), SessionError)
    assert client.join(5) and server.join(5)


# --- an end that sending meets first: rule 22 ---

FIRE_AND_FORGET = bytes.fromhex(
    "00 01 0001 00000001 00000000"  # SYN
    "00 00 0000 00000001 00000005 68 65 6c 6c 6f"  # Data: hello
    "00 01 0004 00000001 00000000"  # FIN
)


def fire_and_forget(end: Any, tail: str) -> None:
    """Write it all and close, as a peer does that is done."""
    reader, writer = end if isinstance(end, tuple) else (None, end.makefile("wb"))
    writer.write(FIRE_AND_FORGET + bytes.fromhex(tail))
    writer.close()
    (reader or end).close()


@pytest.mark.parametrize("tail", ["", "00 02 0001 00000000 00000007", "00 00 0000 00000001 00000009 78"])
@pytest.mark.parametrize("kind", ["socketpair", "tcp", "files"])
def test_an_orderly_end_stays_one_where_our_answer_meets_it_first(kind, tail):
    """R22: the acknowledgement is sent into a connection that the peer has closed already; EPIPE comes before the end."""
    link = make_link(kind)
    session = geyamux.Server(link.a)
    bodies = []

    def accept() -> None:
        for stream in session:
            bodies.append(stream.read())

    accepting = gevent.spawn(accept)
    settle()
    fire_and_forget(link.b, tail)
    accepting.get(timeout=5)
    assert bodies == [b"hello"]
    assert session.exception is None
    assert session.join(5)
    link.close()


@pytest.mark.skipif(ssl.OPENSSL_VERSION_INFO < (3,), reason="OpenSSL before 3 tells a reset as an end")
@pytest.mark.skipif(ssl.OPENSSL_VERSION_INFO < (3,), reason="needs OpenSSL 3")
def test_the_alert_of_a_peer_that_wants_a_certificate_is_told_although_sending_failed_first():
    near_context, _ = tls_contexts(ssl.TLSVersion.TLSv1_3)
    demanding = gevent.ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority().issue_cert("localhost").configure_cert(demanding)
    demanding.verify_mode = ssl.CERT_REQUIRED

    def refuse(conn):
        with contextlib.closing(conn), pytest.raises(ssl.SSLError):
            demanding.wrap_socket(conn, server_side=True)

    with make_link("tcp") as link:
        refusing = gevent.spawn(refuse, link.b)
        # With TLS 1.3 the client is done before it is refused.
        near = near_context.wrap_socket(link.a, server_hostname="localhost")
        refusing.get(timeout=5)
        session = geyamux.Client(near)
        with pytest.raises(geyamux.SessionError):
            session.ping(timeout=5)
        assert session.join(5)
        assert "certificate required" in str(session.exception).replace("_", " ").lower()


@pytest.mark.parametrize("kind", ["tls12", "tls13"])
def test_a_reset_of_a_tls_connection_is_not_told_as_an_end(kind):
    """R9 and R22: the peer closes with bytes unread, so the system resets the connection."""
    near, far = make_link(kind)
    session = geyamux.Client(near)
    session.open().sendall(b"never read")
    settle()
    far.close()
    assert session.join(5)
    assert isinstance(session.exception, geyamux.TransportError)


def test_closing_into_a_connection_that_the_peer_has_closed_is_an_orderly_end():
    """R20, R22: what we still wanted to say meets EPIPE, after an end that was in good order on both sides."""
    near, far = make_link("socketpair")
    session = geyamux.Client(near)
    session.open()
    settle()
    far.recv(100)  # one that closes with bytes unread resets the connection
    far.close()
    session.open().sendall(b"too late")
    session.close()
    assert session.join(5)
    assert session.exception is None


@pytest.mark.parametrize("kind", ["unix", "tcp"])
def test_what_was_received_before_our_own_send_fails_is_all_delivered(kind):
    """R22: a peer that closes in good order behind many small frames, while we write."""
    with facing("server", kind=kind) as (session, peer):
        peer.send(bytes.fromhex("00 01 0001 00000001 00000000"))
        stream = session.accept(timeout=5)

        def write():
            with contextlib.suppress(OSError):
                while True:
                    stream.sendall(b"x" * 100)

        writing = gevent.spawn(write)
        settle()
        frame = bytes.fromhex("00 00 0000 00000001 00000001") + b"y"
        peer.send(frame * 4000 + bytes.fromhex("00 01 0004 00000001 00000000"))
        peer.close()
        assert stream.read() == b"y" * 4000
        writing.join(5)


# --- waiting for the moment from which nothing can be opened ---


@both_roles
def test_a_goaway_of_the_peer_ends_the_wait_for_it_and_lets_streams_live(role):
    with facing(role) as (session, peer):
        stream = session.open()
        waiting = [start(session.wait_go_away) for _ in range(3)]
        joining = start(session.join)
        assert not session.peer_went_away
        assert session.wait_go_away(0) is False
        assert session.wait_go_away(0.01) is False
        peer.send(go_away())
        assert [outcome(one) for one in waiting] == [True] * 3
        assert session.peer_went_away and not session.closed and not joining.ready()
        assert session.wait_go_away() is True
        with pytest.raises(RemoteGoAway):
            session.open()
        peer.send(data(stream.stream_id, b"lives on", ACK))
        assert stream.recv(20) == b"lives on"
        session.abort()
        assert outcome(joining) is True


@pytest.mark.parametrize(
    "end",
    [
        lambda session, peer: session.abort(),
        lambda session, peer: session.close(0.5),
        lambda session, peer: peer.close(),
        lambda session, peer: peer.send(go_away(2)),
        lambda session, peer: peer.send(b"\xff" * 12),
    ],
    ids=["abort", "close", "lost", "error_code", "protocol_error"],
)
def test_every_end_of_the_session_ends_the_wait_for_a_goaway(end):
    with facing() as (session, peer):
        waiting = start(session.wait_go_away)
        assert not waiting.ready()
        gevent.spawn(end, session, peer)
        assert outcome(waiting) is True
        assert session.closed and not session.peer_went_away
        assert session.wait_go_away(0) is True


def test_a_goaway_of_our_own_is_none_of_the_peer():
    with sessions() as (client, server):
        client.go_away()
        assert server.wait_go_away(5)
        assert server.peer_went_away and not client.peer_went_away
        assert client.wait_go_away(0.01) is False
        assert client.open().session is client


def test_a_kill_ends_the_wait_for_a_goaway_and_leaves_nothing():
    with sessions() as (client, server):
        waiting = start(client.wait_go_away)
        waiting.kill()
        server.go_away()
        assert client.wait_go_away(5)
        assert not client._joiners.waiters
