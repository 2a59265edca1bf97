"""gevent's server over sessions: over one that exists, and over a port whose connections become sessions.

Handlers and streams are real. What is asked of both kinds is asked twice.
"""

from __future__ import annotations

import gc
import socket as stdlib_socket
import ssl
import time
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import gevent
import gevent.server
import pytest
from gevent import socket as gsocket
from gevent.event import Event
from gevent.pool import Pool
from gevent.ssl import SSLContext

import geyamux
from geyamux import Config, RemoteGoAway, SessionClosed, SessionError, StreamReset
from geyamux.server import StreamServer
from support.links import authority, sessions
from support.rawpeer import RawPeer, settle
from support.waiting import wait_for
from support.wire import data

LATE = 5.0


class Rig:
    """A server of one of the two kinds, and a client of it."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.server: Any = None
        self.client: Any = None
        self._pair: Any = sessions("tcp") if kind == "session" else None
        self._ends: Any = self._pair.__enter__() if self._pair else None

    def start(self, handle: Callable[..., Any] | None = None, **more: Any) -> Any:
        server_class = more.pop("server_class", StreamServer)
        if self.kind == "session":
            self.client = self._ends[0]
            self.server = server_class(self._ends[1], handle, **more)
            self.server.start()
        else:
            self.server = server_class(("127.0.0.1", 0), handle, **more)
            self.server.start()
            self.client = geyamux.connect(self.server.address)
        return self.client

    def close(self) -> None:
        # First the client: a server waits for the streams that are open at the other end.
        if self.client is not None:
            self.client.abort()
        if self.server is not None:
            self.server.stop(0)
        if self._pair:
            self._pair.__exit__(None, None, None)


@pytest.fixture(params=["session", "port"])
def rig(request: pytest.FixtureRequest) -> Iterator[Rig]:
    made = Rig(request.param)
    yield made
    made.close()


@pytest.fixture
def session_rig() -> Iterator[Rig]:
    made = Rig("session")
    yield made
    made.close()


@pytest.fixture
def port_rig() -> Iterator[Rig]:
    made = Rig("port")
    yield made
    made.close()


def upper(stream: Any, address: Any) -> None:
    for line in stream:
        stream.sendall(line.upper())


class Handlers:
    """Handlers that say they have begun, and end when they are told to."""

    def __init__(self) -> None:
        self.begun: list[int] = []
        self.ended: list[int] = []
        self.killed: list[int] = []
        self.go = Event()

    def __call__(self, stream: Any, address: Any) -> None:
        self.begun.append(stream.stream_id)
        try:
            self.go.wait()
            stream.sendall(b"done")
            self.ended.append(stream.stream_id)
        except gevent.GreenletExit:
            self.killed.append(stream.stream_id)
            raise


# --- handling ---


def test_it_is_a_stream_server_of_gevent(rig):
    rig.start(upper)
    assert isinstance(rig.server, gevent.server.StreamServer)
    assert rig.server.started and not rig.server.closed


def test_each_stream_is_handled_in_a_greenlet_of_its_own(rig):
    client = rig.start(upper)
    streams = [client.open() for _ in range(20)]
    for number, stream in enumerate(streams):
        stream.sendall(b"line %d\n" % number)
    assert [stream.readline() for stream in streams] == [b"LINE %d\n" % number for number in range(20)]


def test_the_handler_gets_the_address_of_the_peer(rig):
    addresses: list[Any] = []
    client = rig.start(lambda stream, address: addresses.append(address))
    assert client.open().read() == b""
    assert addresses == [client.getsockname()]


def test_a_subclass_may_be_the_handler(rig):
    class Greeter(StreamServer):
        def handle(self, stream: Any, address: Any) -> None:
            stream.sendall(b"hello")

    client = rig.start(server_class=Greeter)
    assert client.open().read() == b"hello"


def test_a_server_without_a_handler_is_refused_and_harms_nothing(session_rig):
    with pytest.raises(TypeError, match="handle"):
        StreamServer(session_rig._ends[1])
    client = session_rig.start(upper)
    with client.open() as stream:
        stream.sendall(b"it lives\n")
        assert stream.readline() == b"IT LIVES\n"


def test_the_stream_is_closed_when_its_handler_returns(rig):
    client = rig.start(lambda stream, address: stream.sendall(b"all"))
    stream = client.open()
    assert stream.read() == b"all"
    stream.close()
    wait_for(lambda: client.num_streams == 0)


def test_the_stream_is_reset_when_its_handler_raises(rig, monkeypatch):
    """The peer must not take half an answer for a whole one."""
    reported: list[Any] = []
    monkeypatch.setattr(gevent.get_hub(), "handle_error", lambda *args: reported.append(args[2]))

    def half(stream: Any, address: Any) -> None:
        stream.sendall(b"half")
        raise LookupError("no other half")

    client = rig.start(half)
    stream = client.open()
    with pytest.raises(StreamReset):
        stream.read()
    wait_for(lambda: reported)
    assert isinstance(reported[0], LookupError)
    assert client.ping() > 0


def test_a_handler_may_open_streams_to_its_peer(rig):
    def answer(stream: Any, address: Any) -> None:
        with stream.session.open() as back:
            back.sendall(stream.readline())

    client = rig.start(answer)
    client.open().sendall(b"the other way round\n")
    assert client.accept(timeout=LATE).readline() == b"the other way round\n"


def test_raw_greenlets_do_as_well(rig):
    client = rig.start(upper, spawn=gevent.spawn_raw)
    with client.open() as stream:
        stream.sendall(b"raw\n")
        assert stream.readline() == b"RAW\n"
    wait_for(lambda: rig.server._servings and all(one.idle.is_set() for one in rig.server._servings.values()))


def test_handlers_in_the_hub_are_refused(session_rig):
    """They could never wait."""
    with pytest.raises(ValueError, match="spawn=None"):
        StreamServer(session_rig._ends[1], upper, spawn=None)


def test_a_spawn_that_fails_costs_its_stream_and_nothing_else(rig, monkeypatch):
    reported: list[Any] = []
    monkeypatch.setattr(gevent.get_hub(), "handle_error", lambda *args: reported.append(args[2]))
    failures = [MemoryError("no greenlet"), None]

    def spawn(function: Callable[..., Any]) -> Any:
        error = failures.pop(0)
        if error is not None:
            raise error
        return gevent.spawn(function)

    client = rig.start(upper, spawn=spawn)
    first, second = client.open(), client.open()
    second.sendall(b"second\n")
    assert second.readline() == b"SECOND\n"
    with pytest.raises(StreamReset):
        first.read()
    assert [type(error) for error in reported] == [MemoryError]


# --- how many ---


@pytest.mark.parametrize("spawn", [2, Pool(2)], ids=["a number", "a pool"])
def test_no_more_streams_are_accepted_than_the_pool_has_room_for(rig, spawn):
    """The others wait in the backlog, unacknowledged."""
    handlers = Handlers()
    client = rig.start(handlers, spawn=spawn)
    streams = [client.open() for _ in range(5)]
    wait_for(lambda: len(handlers.begun) == 2)
    client.ping()
    settle()
    assert [stream.established for stream in streams] == [True, True, False, False, False]
    (session,) = rig.server.sessions
    assert session.stats().backlog == 3
    handlers.go.set()
    assert [stream.read() for stream in streams] == [b"done"] * 5
    assert handlers.ended == [stream.stream_id for stream in streams]


def test_what_the_backlog_cannot_hold_is_refused():
    handlers = Handlers()
    with StreamServer(("127.0.0.1", 0), handlers, spawn=1, config=Config(accept_backlog=3)) as server:
        server.start()
        with geyamux.connect(server.address) as client:
            streams = [client.open()]
            wait_for(lambda: handlers.begun)
            streams += [client.open() for _ in range(5)]
            for stream in streams[4:]:
                with pytest.raises(StreamReset):
                    stream.read()
            handlers.go.set()
            assert [stream.read() for stream in streams[:4]] == [b"done"] * 4


def test_a_pool_may_be_shared_by_sessions(port_rig):
    handlers = Handlers()
    clients = [port_rig.start(handlers, spawn=3)]
    clients.append(geyamux.connect(port_rig.server.address))
    streams = [client.open() for client in clients for _ in range(4)]
    wait_for(lambda: len(handlers.begun) == 3)
    for client in clients:
        client.ping()
    assert len(handlers.begun) == 3
    handlers.go.set()
    assert [stream.read() for stream in streams] == [b"done"] * 8
    clients[1].close()


def test_a_shared_pool_accepts_no_more_than_it_has_room_for(port_rig):
    """Though each session waits for its streams by itself."""
    handlers = Handlers()
    clients = [port_rig.start(handlers, spawn=1)]
    clients += [geyamux.connect(port_rig.server.address) for _ in range(4)]
    wait_for(lambda: len(port_rig.server.sessions) == 5)
    settle()
    streams = [client.open() for client in clients]
    for client in clients:
        client.ping()
    settle()
    assert sum(stream.established for stream in streams) == len(handlers.begun) == 1
    handlers.go.set()
    assert [stream.read() for stream in streams] == [b"done"] * 5
    for client in clients[1:]:
        client.abort()


def test_the_end_of_a_session_is_noticed_though_the_pool_is_full(session_rig):
    handlers = Handlers()
    client = session_rig.start(handlers, spawn=1)
    client.open()
    wait_for(lambda: handlers.begun)
    client.abort()
    wait_for(lambda: session_rig.server.closed)


def test_what_came_before_its_session_ended_is_served_when_there_is_room(port_rig):
    """Who opens, sends, closes and leaves has done all there is to do."""
    read: list[bytes] = []
    begun, go = Event(), Event()

    def handle(stream: Any, address: Any) -> None:
        begun.set()
        go.wait()
        read.append(stream.read())

    client = port_rig.start(handle, spawn=1)
    client.open()
    assert begun.wait(LATE)
    leaving = geyamux.connect(port_rig.server.address)
    with leaving.open() as stream:
        stream.sendall(b"the last words")
    leaving.close(timeout=0.05)
    client.abort()
    go.set()
    wait_for(lambda: b"the last words" in read)


def test_sessions_that_ended_do_not_pile_up_before_a_full_pool(port_rig, monkeypatch):
    monkeypatch.setattr("geyamux.server._LONGEST_LINE", 3)
    handlers = Handlers()
    client = port_rig.start(handlers, spawn=1)
    client.open()
    wait_for(lambda: handlers.begun)
    for _ in range(10):
        leaving = geyamux.connect(port_rig.server.address)
        leaving.open().sendall(b"x")
        leaving.ping()
        leaving.abort()
    wait_for(lambda: len(port_rig.server._servings) <= 4)
    assert len(port_rig.server._in_line) == 3
    handlers.go.set()


def test_full_pools_keep_no_connection_out(port_rig):
    handlers = Handlers()
    client = port_rig.start(handlers, spawn=1)
    client.open()
    wait_for(lambda: handlers.begun)
    with geyamux.connect(port_rig.server.address) as another:
        assert another.ping(timeout=LATE) > 0
    handlers.go.set()


def test_after_max_accept_streams_others_get_their_turn(session_rig):
    """Handlers are spawned in the order of their streams, and the first have run before the last is accepted."""
    ran: list[int] = []
    accepted_before_first_ran: list[int] = []

    def handle(stream: Any, address: Any) -> None:
        if not ran:
            accepted_before_first_ran.append(sum(one.established for one in opened))
        ran.append(stream.stream_id)

    class Polite(StreamServer):
        max_accept = 5

    opened: list[Any] = []
    client, end = session_rig._ends
    opened += [client.open() for _ in range(50)]
    wait_for(lambda: end.stats().backlog == 50)
    session_rig.start(handle, server_class=Polite)
    wait_for(lambda: len(ran) == 50)
    assert accepted_before_first_ran[0] <= 5


# --- accepting no more, and again ---


def test_accepting_can_be_stopped_and_started(session_rig):
    client = session_rig.start(upper)
    session_rig.server.stop_accepting()
    settle()
    stream = client.open()
    stream.sendall(b"later\n")
    client.ping()
    settle()
    assert not stream.established
    session_rig.server.start_accepting()
    session_rig.server.start_accepting()  # a second time changes nothing
    assert stream.readline() == b"LATER\n"


def test_accepting_can_be_stopped_and_started_in_one_breath(session_rig):
    client = session_rig.start(upper)
    session_rig.server.stop_accepting()
    session_rig.server.start_accepting()
    stream = client.open()
    stream.sendall(b"still there\n")
    assert stream.readline() == b"STILL THERE\n"


def test_a_handler_and_a_pool_may_be_set_while_it_serves(session_rig):
    handlers = Handlers()
    client = session_rig.start(upper)
    with client.open() as stream:
        stream.sendall(b"before\n")
        assert stream.readline() == b"BEFORE\n"
    session_rig.server.set_handle(handlers)
    session_rig.server.set_spawn(1)
    streams = [client.open() for _ in range(3)]
    wait_for(lambda: handlers.begun)
    client.ping()
    settle()
    assert handlers.begun == [streams[0].stream_id]
    handlers.go.set()
    assert [stream.read() for stream in streams] == [b"done"] * 3


def test_a_server_over_a_session_serves_once(session_rig):
    session_rig.start(upper)
    session_rig.server.stop()
    with pytest.raises(RuntimeError, match="can't be started again"):
        session_rig.server.start()


def test_a_listener_of_a_session_may_be_given(session_rig):
    client, end = session_rig._ends
    with StreamServer(end.listener(), upper) as server:
        server.start()
        with client.open() as stream:
            stream.sendall(b"x\n")
            assert stream.readline() == b"X\n"


def test_do_close_may_keep_a_stream_past_its_handler(rig):
    """As users of gevent keep connections."""
    kept: list[Any] = []

    class Keeping(StreamServer):
        def do_close(self, *args: Any) -> None:
            kept.append(args)

    client = rig.start(lambda stream, address: stream.sendall(b"a"), server_class=Keeping)
    stream = client.open()
    assert stream.recv(10) == b"a"
    wait_for(lambda: kept)
    ((held, address),) = kept
    assert address == client.getsockname()
    held.sendall(b"b")
    held.close()
    assert stream.read() == b"b"


def test_a_port_that_accepts_no_connections_still_serves_its_sessions(port_rig):
    client = port_rig.start(upper)
    wait_for(lambda: port_rig.server.sessions)
    port_rig.server.stop_accepting()
    with client.open() as stream:
        stream.sendall(b"old\n")
        assert stream.readline() == b"OLD\n"
    port_rig.server.start_accepting()
    with geyamux.connect(port_rig.server.address) as another, another.open() as stream:
        stream.sendall(b"new\n")
        assert stream.readline() == b"NEW\n"


# --- stop ---


@pytest.mark.parametrize("spawn", ["default", 5], ids=["greenlets", "a pool"])
def test_stop_lets_handlers_finish(rig, spawn):
    handlers = Handlers()
    client = rig.start(handlers, spawn=spawn)
    streams = [client.open() for _ in range(3)]
    wait_for(lambda: len(handlers.begun) == 3)
    stopping = gevent.spawn(rig.server.stop, LATE)
    settle()
    assert not stopping.ready() and not rig.server.started
    client.ping()
    with pytest.raises(RemoteGoAway):
        client.open()
    handlers.go.set()
    assert [stream.read() for stream in streams] == [b"done"] * 3
    for stream in streams:
        stream.close()
    stopping.get(timeout=LATE)
    assert handlers.killed == []


def test_streams_that_came_before_stop_are_still_served(rig):
    handlers = Handlers()
    client = rig.start(handlers, spawn=1)
    streams = [client.open() for _ in range(4)]
    wait_for(lambda: handlers.begun)
    client.ping()
    stopping = gevent.spawn(rig.server.stop, LATE)
    settle()
    handlers.go.set()
    assert [stream.read() for stream in streams] == [b"done"] * 4
    for stream in streams:
        stream.close()
    stopping.get(timeout=LATE)


def test_handlers_in_a_pool_are_killed_when_the_time_is_over(rig):
    handlers = Handlers()
    client = rig.start(handlers, spawn=2)
    streams = [client.open() for _ in range(4)]
    wait_for(lambda: len(handlers.begun) == 2)
    client.ping()
    rig.server.stop(0.01)
    assert sorted(handlers.killed) == [streams[0].stream_id, streams[1].stream_id]
    for stream in streams:
        with pytest.raises((StreamReset, SessionError)):
            stream.read()
    assert sorted(handlers.begun) == sorted(handlers.killed), "none of those that waited began"


def test_handlers_without_a_pool_run_on_when_the_time_is_over(rig):
    """As with gevent's own."""
    handlers = Handlers()
    client = rig.start(handlers)
    stream = client.open()
    wait_for(lambda: handlers.begun)
    rig.server.stop(0.01)
    settle()
    handlers.go.set()
    assert stream.read() == b"done"


def test_a_handler_killed_before_it_began_leaves_no_stream_behind(rig):
    def spawn(function: Callable[..., Any]) -> Any:
        greenlet = gevent.spawn(function)
        greenlet.kill(block=False)
        return greenlet

    client = rig.start(upper, spawn=spawn)
    stream = client.open()
    with pytest.raises(StreamReset):
        stream.read()
    wait_for(lambda: client.num_streams == 0)


def test_the_pool_of_others_is_left_alone(session_rig):
    """gevent's kills all of it; one pool may serve many sessions, one after the other."""
    pool = Pool(5)
    other = pool.spawn(gevent.sleep, 60)
    handlers = Handlers()
    client = session_rig.start(handlers, spawn=pool)
    client.open()
    wait_for(lambda: handlers.begun)
    session_rig.server.stop(0)
    assert handlers.killed
    assert not other.ready()
    other.kill()


def test_a_handler_may_stop_its_server(rig):
    def handle(stream: Any, address: Any) -> None:
        rig.server.stop(0.01)
        stream.sendall(b"stopped")

    client = rig.start(handle, spawn=3)
    assert client.open().read() == b"stopped"


@pytest.mark.parametrize("spawn", ["default", 5], ids=["greenlets", "a pool"])
def test_a_handler_that_stops_its_server_does_not_wait_for_itself(rig, spawn):
    took: list[float] = []

    def handle(stream: Any, address: Any) -> None:
        begin = time.monotonic()
        rig.server.stop(LATE)
        took.append(time.monotonic() - begin)

    stream = rig.start(handle, spawn=spawn).open()
    wait_for(lambda: took)
    stream.close()
    assert took[0] < 2.0


def test_stop_in_the_hub_starts_and_returns(rig):
    """Signal handlers of an idle process run there."""
    handlers = Handlers()
    client = rig.start(handlers, spawn=5)
    stream = client.open()
    wait_for(lambda: handlers.begun)
    serving = gevent.spawn(rig.server.serve_forever, LATE)
    settle()
    gevent.get_hub().loop.run_callback(rig.server.stop, LATE)
    wait_for(lambda: not rig.server.started)
    handlers.go.set()
    assert stream.read() == b"done"
    stream.close()
    serving.get(timeout=LATE)


def test_serve_forever_waits_as_long_as_the_stop_that_ended_it(rig):
    class Impatient(StreamServer):
        stop_timeout = 0.01

    handlers = Handlers()
    client = rig.start(handlers, spawn=5, server_class=Impatient)
    stream = client.open()
    wait_for(lambda: handlers.begun)
    serving = gevent.spawn(rig.server.serve_forever)
    settle()
    stopping = gevent.spawn(rig.server.stop, LATE)
    gevent.sleep(0.05)
    handlers.go.set()
    assert stream.read() == b"done"
    stream.close()
    gevent.joinall([serving, stopping], timeout=LATE, raise_error=True)
    assert handlers.killed == []


def test_a_connection_that_comes_while_it_is_closed_is_no_session_of_nobody(contexts):
    server_context, client_context = contexts
    server = StreamServer(("127.0.0.1", 0), upper, ssl_context=server_context)
    server.start()
    making = server._make_session

    def slowly(conn: Any) -> Any:
        session = making(conn)
        server.close()
        return session

    server._make_session = slowly
    client = geyamux.connect(server.address, ssl_context=client_context, server_hostname="localhost")
    assert client.join(timeout=LATE)
    server.stop()


def test_stop_may_come_twice(rig):
    rig.start(upper)
    rig.server.stop()
    rig.server.stop()
    with pytest.raises(ConnectionError):  # RemoteGoAway, or the session is closed
        rig.client.ping(timeout=1)
        rig.client.open()


def test_a_server_that_was_never_started_leaves_the_session_alone(session_rig):
    client, end = session_rig._ends
    StreamServer(end, upper).stop()
    client.open().sendall(b"x")
    client.ping()
    assert end.accept(timeout=LATE).recv(1) == b"x"


def test_the_session_stays_with_its_owner(session_rig):
    """Stop says GoAway and no more: what this side opens still works."""
    client = session_rig.start(upper)
    session_rig.server.stop()
    stream = session_rig._ends[1].open()
    stream.sendall(b"still")
    assert client.accept(timeout=LATE).recv(5) == b"still"


def test_sessions_of_a_port_are_closed_when_their_handlers_have_ended(port_rig):
    handlers = Handlers()
    client = port_rig.start(handlers)
    idle = geyamux.connect(port_rig.server.address)
    stream = client.open()
    wait_for(lambda: handlers.begun and len(port_rig.server.sessions) == 2)
    stopping = gevent.spawn(port_rig.server.stop, LATE)
    assert idle.join(timeout=LATE), "nobody needs it any more"
    assert not client.closed
    handlers.go.set()
    assert stream.read() == b"done"
    stream.close()
    assert client.join(timeout=LATE)
    stopping.get(timeout=LATE)
    assert client.exception is None
    assert port_rig.server.sessions == ()


def test_stop_can_be_quiet(rig):
    """Some peers drop every stream when they hear GoAway; so it comes behind the last one."""
    handlers = Handlers()
    client = rig.start(handlers, announce=False)
    stream = client.open()
    wait_for(lambda: handlers.begun)
    stopping = gevent.spawn(rig.server.stop, LATE)
    settle()
    client.ping()
    refused = client.open()
    with pytest.raises(StreamReset):
        refused.read()
    handlers.go.set()
    assert stream.read() == b"done"
    stream.close()
    stopping.get(timeout=LATE)
    client.join(timeout=LATE) if rig.kind == "port" else client.ping()
    with pytest.raises((RemoteGoAway, SessionClosed)):
        client.open()


def test_the_end_of_a_with_block_stops_it(rig):
    client = rig.start(upper)
    with rig.server, client.open() as stream:
        stream.sendall(b"x\n")
        assert stream.readline() == b"X\n"
    assert rig.server.closed


# --- serve_forever ---


@pytest.mark.parametrize("how", ["close", "abort", "go_away"])
def test_serve_forever_returns_when_the_session_takes_no_more(session_rig, how):
    client = session_rig.start(upper)
    serving = gevent.spawn(session_rig.server.serve_forever)
    settle()
    if how == "go_away":
        session_rig._ends[1].go_away()
    else:
        getattr(client, how)()
    serving.get(timeout=LATE)
    assert session_rig.server.closed


def test_serve_forever_waits_for_the_handlers_of_a_session_that_ended(session_rig):
    ended: list[Any] = []

    def handle(stream: Any, address: Any) -> None:
        try:
            stream.read()
        finally:
            gevent.sleep(0.02)
            ended.append(stream)

    client = session_rig.start(handle, spawn=3)
    stream = client.open()
    stream.close_write()
    wait_for(lambda: stream.established)
    serving = gevent.spawn(session_rig.server.serve_forever)
    settle()
    client.abort()
    serving.get(timeout=LATE)
    assert ended


def test_serve_forever_returns_when_it_is_stopped(rig):
    rig.start(upper)
    serving = gevent.spawn(rig.server.serve_forever)
    settle()
    assert not serving.ready()
    rig.server.stop()
    serving.get(timeout=LATE)


def test_a_port_serves_on_when_a_session_ends(port_rig):
    client = port_rig.start(upper)
    client.open().sendall(b"x")
    client.abort()
    wait_for(lambda: not port_rig.server.sessions)
    with geyamux.connect(port_rig.server.address) as another, another.open() as stream:
        stream.sendall(b"next\n")
        assert stream.readline() == b"NEXT\n"


def test_a_peer_that_breaks_the_protocol_costs_its_own_session_alone(port_rig):
    client = port_rig.start(upper)
    with gsocket.create_connection(port_rig.server.address) as conn:
        peer = RawPeer(conn)
        peer.send(b"GET / HTTP/1.1\r\n\r\n")
        while conn.recv(4096):
            pass
    with client.open() as stream:
        stream.sendall(b"unharmed\n")
        assert stream.readline() == b"UNHARMED\n"


def test_a_server_that_is_over_is_collected(session_rig):
    session_rig.start(upper)
    with session_rig.client.open() as stream:
        stream.sendall(b"x\n")
        stream.readline()
    session_rig.server.stop()
    server, session_rig.server = weakref.ref(session_rig.server), None
    settle()
    gc.collect()
    assert server() is None


# --- listening ---


def test_a_listening_socket_may_be_given(port_rig):
    listener = gsocket.socket()
    listener.bind(("127.0.0.1", 0))
    listener.listen()
    with StreamServer(listener, upper) as server:
        server.start()
        with geyamux.connect(server.address) as client, client.open() as stream:
            stream.sendall(b"mine\n")
            assert stream.readline() == b"MINE\n"


def test_a_unix_socket_may_be_given(tmp_path):
    listener = gsocket.socket(stdlib_socket.AF_UNIX)
    listener.bind(str(tmp_path / "socket"))
    listener.listen()
    with StreamServer(listener, upper) as server:
        server.start()
        with geyamux.connect(str(tmp_path / "socket")) as client, client.open() as stream:
            stream.sendall(b"unix\n")
            assert stream.readline() == b"UNIX\n"


def test_sessions_of_a_port_have_its_config(port_rig):
    config = Config(max_stream_window=1 << 20)
    client = port_rig.start(upper, config=config)
    client.open().sendall(b"x")
    client.ping()
    assert [session.config for session in port_rig.server.sessions] == [config]


def test_a_session_has_its_own_config_and_connection(session_rig):
    for more in ({"config": Config()}, {"ssl_context": SSLContext(ssl.PROTOCOL_TLS_SERVER)}):
        with pytest.raises(TypeError, match="a session has its settings"):
            StreamServer(session_rig._ends[1], upper, **more)
    session_rig.start(upper)


def test_connections_of_a_port_send_without_delay(port_rig):
    port_rig.start(upper)
    wait_for(lambda: port_rig.server.sessions)
    (session,) = port_rig.server.sessions
    assert session.conn.getsockopt(stdlib_socket.IPPROTO_TCP, stdlib_socket.TCP_NODELAY)


# --- TLS ---


@pytest.fixture
def contexts() -> tuple[SSLContext, SSLContext]:
    server, client = SSLContext(ssl.PROTOCOL_TLS_SERVER), SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    authority().issue_cert("localhost").configure_cert(server)
    authority().configure_trust(client)
    return server, client


def test_tls_is_that_of_the_connection(contexts):
    server_context, client_context = contexts
    with StreamServer(("127.0.0.1", 0), upper, ssl_context=server_context) as server:
        assert server.ssl_enabled
        server.start()
        with (
            geyamux.connect(server.address, ssl_context=client_context, server_hostname="localhost") as client,
            client.open() as stream,
        ):
            stream.sendall(b"secret\n")
            assert stream.readline() == b"SECRET\n"
            assert client.conn.version() == "TLSv1.3"


def test_who_does_no_handshake_is_let_go_of(contexts, caplog):
    class Hasty(StreamServer):
        handshake_timeout = 0.05

    with Hasty(("127.0.0.1", 0), upper, ssl_context=contexts[0]) as server:
        server.start()
        with gsocket.create_connection(server.address) as silent:
            silent.settimeout(LATE)
            assert silent.recv(1) == b""
        wait_for(lambda: not server._arriving)


def test_plain_text_where_tls_should_be_harms_nobody(contexts):
    server_context, client_context = contexts
    with StreamServer(("127.0.0.1", 0), upper, ssl_context=server_context) as server:
        server.start()
        with gsocket.create_connection(server.address) as plain:
            plain.sendall(data(1, b"no TLS") * 10)
            plain.settimeout(LATE)
            while True:
                try:
                    if not plain.recv(4096):
                        break
                except ConnectionResetError:
                    break
        with geyamux.connect(server.address, ssl_context=client_context, server_hostname="localhost") as client:
            assert client.ping() > 0


def test_a_context_that_blocks_the_process_is_refused_at_once():
    with pytest.raises(TypeError, match=r"gevent\.ssl"):
        StreamServer(("127.0.0.1", 0), upper, ssl_context=ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER))


def test_stop_ends_a_handshake_that_is_under_way(contexts):
    server = StreamServer(("127.0.0.1", 0), upper, ssl_context=contexts[0])
    server.start()
    with gsocket.create_connection(server.address) as silent:
        wait_for(lambda: server._arriving)
        server.stop(0)
        silent.settimeout(LATE)
        assert silent.recv(1) == b""


# --- about it ---


def test_repr_says_what_it_is_over(session_rig):
    session_rig.start(upper)
    assert repr(session_rig._ends[1]) in repr(session_rig.server)


def test_repr_of_a_port_says_how_many_sessions_it_has(port_rig):
    port_rig.start(upper)
    wait_for(lambda: port_rig.server.sessions)
    assert "sessions=1" in repr(port_rig.server)
    assert str(port_rig.server.server_port) in repr(port_rig.server)
