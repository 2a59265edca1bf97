"""What joins each end that comes with another one, and what chooses the session for it."""

from __future__ import annotations

import contextlib
import errno
import struct
from collections.abc import Callable, Iterator
from typing import Any

import gevent
import gevent.event
import gevent.server
import pytest
from gevent import socket as gsocket

from geyamux import Config, SessionError, StreamReset, tunnel
from geyamux.server import StreamServer
from geyamux.tunnel import Forwarder, RoundRobin, Splice
from support.facing import outcome, start
from support.links import make_link, sessions
from support.rawpeer import settle
from support.waiting import wait_for


@contextlib.contextmanager
def echo() -> Iterator[tuple[str, int]]:
    """The address of a service that answers what it hears."""

    def handle(sock: Any, address: object) -> None:
        with contextlib.suppress(OSError):
            while data := sock.recv(65536):
                sock.sendall(data)

    server = gevent.server.StreamServer(("127.0.0.1", 0), handle)
    server.start()
    try:
        yield server.address
    finally:
        server.stop()


def connecting(address: tuple[str, int]) -> Callable[[], Any]:
    return lambda: gsocket.create_connection(address, timeout=5)


def refuse() -> Any:
    raise ConnectionRefusedError(errno.ECONNREFUSED, "nobody is there")


def ask(end: Any, question: bytes = b"question") -> None:
    """A round trip, to the end of file."""
    end.sendall(question)
    end.shutdown(gsocket.SHUT_WR)
    answer = b""
    while data := end.recv(65536):
        answer += data
    assert answer == question


# --- as a handler ---


def test_connections_of_a_gevent_server_become_streams_and_streams_connections():
    with echo() as service, sessions() as (client, server):
        streams = StreamServer(server, Forwarder(connecting(service)).handle)
        streams.start()
        forwarder = Forwarder(client.open)
        near = gevent.server.StreamServer(("127.0.0.1", 0), forwarder.handle)
        near.start()
        askers = []
        for number in range(20):
            sock = gsocket.create_connection(near.address)
            askers.append((sock, start(ask, sock, b"%d" % number * 10_000)))
        for sock, asker in askers:
            assert outcome(asker) is None
            sock.close()
        assert forwarder.join(5)
        assert forwarder.splices == ()
        near.stop()
        streams.stop()


def test_what_is_joined_is_listed_oldest_first_and_gone_at_its_end():
    with echo() as service:
        forwarder = Forwarder(connecting(service))
        links = [make_link("tcp") for _ in range(3)]
        calls = []
        for link in links:
            calls.append(start(forwarder.handle, link.b, "address"))
            wait_for(lambda: len(forwarder.splices) == len(calls))
        assert [one.a for one in forwarder.splices] == [link.b for link in links]
        assert not forwarder.join(0)
        for link, call in zip(links, calls, strict=True):
            ask(link.a)
            outcome(call)
            link.close()
        assert forwarder.splices == ()
        assert forwarder.join(0)
        assert forwarder.join()


def test_callbacks_hear_of_each_end_and_how_it_ended():
    heard = []
    with echo() as service, sessions() as (client, server):
        forwarder = Forwarder(
            connecting(service),
            on_open=lambda one: heard.append(("open", one)),
            on_end=lambda one: heard.append(("end", one, one.error, one.sent, one.received)),
            on_failure=lambda end, error: heard.append("failure"),
        )
        streams = StreamServer(server, forwarder.handle)
        streams.start()
        ask(client.open())
        second = client.open()
        second.sendall(b"half")
        assert second.recv(10) == b"half"
        second.reset()
        assert forwarder.join(5)
        streams.stop()
    (_, one), (_, other) = [entry for entry in heard if entry[0] == "open"]
    assert isinstance(one, Splice)
    ends = {entry[1]: entry[2:] for entry in heard if entry[0] == "end"}
    assert ends[one] == (None, 8, 8)
    assert isinstance(ends[other][0], StreamReset) and ends[other][1:] == (4, 4)
    assert "failure" not in heard


# --- where there is no other end ---


@pytest.mark.parametrize("kind", ["tcp", "stream"])
def test_what_cannot_be_connected_is_reset(kind):
    failures = []
    forwarder = Forwarder(refuse, on_failure=lambda end, error: failures.append((end, error)))
    with make_link(kind) as link:
        forwarder.handle(link.b)
        with pytest.raises(ConnectionResetError):
            link.a.recv(1)
        assert [(end, type(error)) for end, error in failures] == [(link.b, ConnectionRefusedError)]
    assert forwarder.join(0)


def test_an_error_that_is_no_oserror_is_raised_after_the_reset():
    failures = []
    forwarder = Forwarder(lambda: 1 // 0, on_failure=lambda *args: failures.append(args))
    with make_link("tcp") as link:
        with pytest.raises(ZeroDivisionError):
            forwarder.handle(link.b)
        with pytest.raises(ConnectionResetError):
            link.a.recv(1)
    assert failures == []
    assert forwarder.join(0)


def test_who_is_killed_while_connecting_resets_what_came():
    forwarder = Forwarder(gevent.event.Event().wait)
    with make_link("tcp") as link:
        call = start(forwarder.handle, link.b)
        assert not forwarder.join(0)
        call.kill()
        with pytest.raises(ConnectionResetError):
            link.a.recv(1)
    assert forwarder.join(0)


def test_a_callback_that_fails_when_two_are_joined_breaks_both():
    def fail(_: object) -> None:
        raise RuntimeError("on purpose")

    ended = []
    with make_link("tcp") as link, make_link("tcp") as other:
        forwarder = Forwarder(lambda: other.a, on_open=fail, on_end=ended.append)
        with pytest.raises(RuntimeError, match="on purpose"):
            forwarder.handle(link.b)
        for end in (link.a, other.b):
            with pytest.raises(ConnectionResetError):
                end.recv(1)
    assert len(ended) == 1
    assert forwarder.join(0)


def test_a_handler_that_is_killed_breaks_both_and_is_counted_out():
    with make_link("tcp") as link, make_link("stream") as other:
        forwarder = Forwarder(lambda: other.a)
        call = start(forwarder.handle, link.b)
        call.kill()
        with pytest.raises(ConnectionResetError):
            link.a.recv(1)
        with pytest.raises(StreamReset):
            other.b.recv(1)
        assert forwarder.join(0)
        assert forwarder.splices == ()


# --- its end ---


def test_stop_waits_for_what_is_joined():
    with echo() as service, make_link("tcp") as link:
        forwarder = Forwarder(connecting(service))
        start(forwarder.handle, link.b)
        stopping = start(forwarder.stop)
        assert not stopping.ready()
        ask(link.a)
        assert outcome(stopping) is True
        assert forwarder.stop(0) is True


@pytest.mark.parametrize("timeout", [0, 0.02])
def test_stop_cuts_what_is_left_after_its_time(timeout):
    with echo() as service:
        forwarder = Forwarder(connecting(service))
        links = [make_link(kind) for kind in ("tcp", "stream", "tcp")]
        for link in links:
            start(forwarder.handle, link.b)
        wait_for(lambda: len(forwarder.splices) == len(links))
        assert forwarder.stop(timeout) is False
        for link in links:
            with pytest.raises(ConnectionResetError):
                link.a.recv(1)
            link.close()
        assert forwarder.join(5)


def test_stop_gives_up_what_is_still_being_connected():
    forwarder = Forwarder(gevent.event.Event().wait)
    with make_link("tcp") as link:
        call = start(forwarder.handle, link.b)
        assert forwarder.stop(0) is False
        with pytest.raises(ConnectionResetError):
            link.a.recv(1)
        assert forwarder.join(5)
        call.join(5)


def test_a_client_that_is_gone_before_its_service_is_connected_resets_that():
    connected = gevent.event.Event()
    with make_link("tcp") as link, make_link("tcp") as other:

        def connect() -> Any:
            connected.wait()
            return other.a

        forwarder = Forwarder(connect)
        start(forwarder.handle, link.b)
        link.a.setsockopt(gsocket.SOL_SOCKET, gsocket.SO_LINGER, struct.pack("ii", 1, 0))
        link.a.close()
        connected.set()
        with pytest.raises(ConnectionResetError):
            other.b.recv(1)
        assert forwarder.join(5)


# --- sessions in turn ---


@contextlib.contextmanager
def agents(count: int, config: Config | None = None) -> Iterator[tuple[RoundRobin, list[Any], list[Any]]]:
    """Sessions that take turns, and their peers."""
    with contextlib.ExitStack() as stack:
        both = [stack.enter_context(sessions(client_config=config)) for _ in range(count)]
        turns = RoundRobin()
        for client, _ in both:
            turns.add(client)
        yield turns, [client for client, _ in both], [server for _, server in both]


def test_streams_go_round_the_sessions_in_the_order_of_their_coming():
    with agents(3) as (turns, clients, _):
        assert turns.sessions == tuple(clients)
        assert [turns.open().session for _ in range(6)] == clients * 2
        turns.open()
        assert turns.sessions == (clients[1], clients[2], clients[0])


def test_one_that_ends_or_goes_away_or_is_discarded_is_left_out():
    with agents(4) as (turns, clients, servers):
        servers[0].go_away()
        assert clients[0].wait_go_away(5)
        clients[1].abort()
        turns.discard(clients[2])
        turns.discard(clients[2])
        assert turns.sessions == (clients[3],)
        assert [turns.open().session for _ in range(3)] == [clients[3]] * 3
        clients[3].close()
        with pytest.raises(SessionError, match="no session"):
            turns.open(timeout=5)
        wait_for(lambda: clients[1] not in turns._sessions)


def test_one_that_is_added_twice_has_one_turn_and_can_come_back():
    with agents(2) as (turns, clients, _):
        turns.add(clients[0])
        assert turns.sessions == tuple(clients)
        turns.discard(clients[0])
        assert turns.sessions == (clients[1],)
        turns.add(clients[0])
        assert turns.sessions == (clients[1], clients[0])


def test_without_a_session_an_open_fails_at_once():
    with pytest.raises(SessionError, match="no session"):
        RoundRobin().open()


@pytest.mark.parametrize("config", [Config(max_outgoing_streams=1), Config(accept_backlog=1)], ids=["max", "backlog"])
def test_a_full_session_is_passed_over(config):
    with agents(2, config) as (turns, clients, _):
        turns.discard(clients[1])
        turns.open()
        turns.add(clients[1])
        assert turns.open().session is clients[1]
        with pytest.raises(TimeoutError, match="timed out"):
            turns.open(timeout=0.03)
        with pytest.raises(TimeoutError):
            turns.open(timeout=0)


@pytest.mark.parametrize("which", [0, 1])
def test_where_all_are_full_the_first_that_has_room_is_taken(which):
    with agents(2, Config(max_outgoing_streams=1)) as (turns, clients, _):
        streams = {stream.session: stream for stream in (turns.open(), turns.open())}
        waiting = start(turns.open)
        assert not waiting.ready()
        streams[clients[which]].reset()
        assert outcome(waiting).session is clients[which]


def test_who_waits_for_room_learns_that_all_sessions_have_ended():
    with agents(2, Config(max_outgoing_streams=1)) as (turns, clients, _):
        turns.open(), turns.open()
        waiting = start(turns.open)
        for client in clients:
            client.abort()
        assert isinstance(outcome(waiting), SessionError)


def test_a_session_without_ids_is_left_out_for_good():
    with agents(2) as (turns, clients, _):
        clients[0]._table._next_id = 2**32 + 1
        assert turns.open().session is clients[1]
        assert turns.sessions == (clients[1],)


def turns_of(turns: RoundRobin, count: int) -> list[Any]:
    """Which sessions get the next streams. Their peers have time to answer."""
    found = []
    for _ in range(count):
        found.append(turns.open(0).session)
        settle()
    return found


def test_one_whose_peer_has_refused_comes_after_the_others_for_a_while(monkeypatch):
    with agents(3) as (turns, near, _):
        turns.doubt(near[0])
        assert turns_of(turns, 4) == [near[1], near[2], near[1], near[2]]
        for session in near[1:]:
            session.abort()
        assert turns_of(turns, 2) == [near[0]] * 2, "there is no better"
    monkeypatch.setattr(tunnel, "_DOUBT", 0.0)
    with agents(2) as (turns, near, _):
        turns.doubt(near[0])
        assert turns_of(turns, 2) == near, "it is forgotten"


def test_one_that_owes_an_answer_and_is_silent_comes_after_the_others(monkeypatch):
    monkeypatch.setattr(tunnel, "_SILENCE", 0.02)
    with agents(2) as (turns, near, far):
        accepting = gevent.spawn(lambda: [stream.close() for stream in far[1]])
        assert turns_of(turns, 2) == near
        gevent.sleep(0.03)
        assert turns_of(turns, 3) == [near[1]] * 3
        far[0].accept(timeout=0)
        settle()
        assert near[0] in turns_of(turns, 2), "it has answered"
        accepting.kill()


def test_who_waits_for_room_is_served_in_turn_and_nobody_overtakes():
    with agents(1, Config(max_outgoing_streams=1)) as (turns, near, _):
        held = turns.open(0)
        waiting = [gevent.spawn(turns.open, 5) for _ in range(3)]
        settle()
        with pytest.raises(TimeoutError):
            turns.open(0)
        for first in waiting:
            held.reset()
            held = first.get(timeout=5)
            assert [one.ready() for one in waiting[waiting.index(first) + 1 :]] == [False] * (2 - waiting.index(first))
        held.reset()
        assert turns.open(5).session is near[0]
