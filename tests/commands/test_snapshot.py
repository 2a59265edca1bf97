"""What a forwarder tells of itself, over real sessions and splices."""

from __future__ import annotations

import contextlib
import os

import gevent
import pytest
from gevent import socket as gsocket

import geyamux
from geyamux.cli import snapshot as module
from geyamux.cli.snapshot import snapshot
from geyamux.tunnel import Splice
from support.facing import facing, narrow_pair
from support.links import sessions
from support.rawpeer import settle
from support.waiting import wait_for
from support.wire import ACK, window_update

WINDOW = 262144


@contextlib.contextmanager
def running(*tasks):
    """These calls go on meanwhile."""
    greenlets = [gevent.spawn(*task) for task in tasks]
    settle()
    try:
        yield
    finally:
        gevent.killall(greenlets)


@contextlib.contextmanager
def connection(family=gsocket.AF_INET, address=("127.0.0.1", 0)):
    """Two ends of a connection to a listening socket, the one that dialled first."""
    with gsocket.socket(family) as listener:
        listener.bind(address)
        listener.listen()
        with gsocket.socket(family) as near:
            near.connect(listener.getsockname())
            far, _ = listener.accept()
            with far:
                yield near, far


def only_stream(session, *splices):
    (told,) = snapshot([session], splices)["streams"]
    return told


def test_facts_of_the_forwarder_go_in_as_they_are_beside_those_of_the_process():
    told = snapshot([], [], **{"trunk": "dial a:1", "from": None, "state": "retrying", "retry": 2.5})
    assert told.pop("uptime") > 0
    assert told == {
        "format": 1,
        "version": geyamux.__version__,
        "pid": os.getpid(),
        "trunk": "dial a:1",
        "from": None,
        "state": "retrying",
        "retry": 2.5,
        "sessions": [],
        "num_streams": 0,
        "streams": [],
    }


def test_a_session_is_told_with_its_peer_and_its_counts():
    with sessions("tcp") as (client, server):
        kept, refused = client.open(), client.open()
        kept.sendall(b"hello")
        server.accept(), server.accept()
        refused.reset()
        wait_for(lambda: server.stats().resets["received"])
        server.ping()
        (told,) = snapshot([server], [])["sessions"]
        stats = server.stats()
        host, port = server.getpeername()
        assert (told["name"], told["peer"]) == (server.name, f"{host}:{port}")
        assert told["rtt"] > 0 and told["idle"] >= 0 and told["age"] > 0
        assert (told["streams"], told["backlog"], told["unread"], told["queued"]) == (1, 0, 5, 0)
        assert (told["bytes_sent"], told["bytes_received"]) == (stats.bytes_sent, stats.bytes_received)
        assert told["resets"] == {"received": 1}


def test_a_stream_is_told_with_what_it_is_joined_with_and_the_bytes_of_both_ways(pair):
    client, server = pair
    stream = client.open()
    with connection() as (near, far):
        accepted = server.accept()
        splice = Splice(accepted, near)
        with running((splice.run,)):
            stream.sendall(b"12345")
            assert far.recv(10) == b"12345"
            far.sendall(b"123")
            assert stream.recv(10) == b"123"
            told = only_stream(server, splice)
        assert 0 < told.pop("age") < 20
        assert told == {
            "session": server.name,
            "id": 1,
            "state": "ESTABLISHED",
            "peer": f"127.0.0.1:{far.getsockname()[1]}",
            "bytes_sent": 3,
            "bytes_received": 5,
            "unread": 0,
            "receive_window": WINDOW - 5,
            "receive_limit": WINDOW,
            "send_credit": WINDOW - 3,
            "blocked": 0.0,
            "is_queued": False,
            "stall": "",
        }


def test_it_does_not_matter_which_end_of_a_splice_is_the_stream(pair):
    client, _ = pair
    stream = client.open()
    with connection() as (near, far):
        assert only_stream(client, Splice(near, stream))["peer"] == f"127.0.0.1:{far.getsockname()[1]}"


def test_a_stream_that_is_joined_with_nothing_yet_has_neither_peer_nor_age(pair):
    client, _ = pair
    client.open()
    told = only_stream(client)
    assert (told["peer"], told["age"]) == ("", None)


def test_a_stream_joined_with_a_stream_tells_that_ones_name(pair):
    client, server = pair
    splice = Splice(client.open(), server.open())
    told = snapshot([client], [splice])["streams"]
    assert {(row["session"], row["id"], row["peer"]) for row in told} == {
        (client.name, 1, f"{server.name}/2"),
        (server.name, 2, f"{client.name}/1"),
    }


def test_a_visitor_of_a_unix_socket_is_told_by_the_name_of_that_socket(pair, tmp_path):
    path = str(tmp_path / "door")
    stream = pair[0].open()
    with connection(gsocket.AF_UNIX, path) as (near, far):
        assert only_stream(pair[0], Splice(far, stream))["peer"] == path
        assert only_stream(pair[0], Splice(near, stream))["peer"] == path


def test_an_end_that_is_closed_or_has_no_address_has_no_name(pair):
    class Pipes:
        pass

    stream = pair[0].open()
    closed = gsocket.socket()
    closed.close()
    assert only_stream(pair[0], Splice(closed, stream))["peer"] == ""
    assert only_stream(pair[0], Splice(Pipes(), stream))["peer"] == ""


# --- who stalls


def test_a_stream_without_credit_waits_for_the_peer(pair):
    client, server = pair
    stream = client.open()
    server.accept()
    with running((stream.sendall, bytes(3 * WINDOW))):
        wait_for(lambda: not stream.stats().send_credit)
        settle()
        told = only_stream(client)
        assert (told["stall"], told["send_credit"], told["is_queued"]) == ("peer", 0, False)
        wait_for(lambda: only_stream(client)["blocked"] > told["blocked"])


def test_a_stream_whose_bytes_nobody_takes_waits_for_the_local_connection(pair):
    client, server = pair
    stream = client.open()
    with connection() as (near, _far), running((stream.sendall, bytes(100 * WINDOW))):
        splice = Splice(server.accept(), near)
        with running((splice.run,)):
            # Whoever is at the other end of the connection reads nothing, so at some time nothing moves.
            wait_for(
                lambda: only_stream(server, splice)["stall"] == "here" and not server.streams[0].stats().receive_window
            )
            assert only_stream(server, splice)["unread"] > 0


def test_a_stream_whose_frames_the_connection_does_not_take_waits_for_the_link():
    with facing("client", ends=narrow_pair()) as (session, peer):
        stream = session.open()
        peer.send(window_update(1, 1 << 24, ACK))
        wait_for(lambda: stream.stats().send_credit > WINDOW)
        with running((stream.sendall, bytes(1 << 20))):
            told = only_stream(session)
            assert (told["stall"], told["is_queued"]) == ("link", True)
            stream.reset()


def test_a_stream_at_rest_stalls_nobody(pair):
    client, server = pair
    stream = client.open()
    accepted = server.accept()
    with running((accepted.recv, 1), (stream.recv, 1)):
        assert [only_stream(session)["stall"] for session in pair] == ["", ""]


# --- many


def test_of_many_streams_those_that_stand_still_are_told_first_then_the_busiest(monkeypatch):
    monkeypatch.setattr(module, "MOST_STREAMS", 4)
    with sessions() as (client, server):
        streams = [client.open() for _ in range(8)]
        accepted = [server.accept() for _ in range(8)]
        for number, stream in enumerate(streams, 1):
            stream.sendall(bytes(100 * number))
        wait_for(lambda: server.stats().unread == 3600)
        for stream in accepted:
            stream.recv(WINDOW)
        accepted[0].sendall(b"nobody reads this")
        wait_for(lambda: streams[0].stats().unread)
        with running((streams[2].sendall, bytes(2 * WINDOW))):
            wait_for(lambda: not streams[2].stats().send_credit)
            with running((streams[1].sendall, bytes(2 * WINDOW))):
                wait_for(lambda: not streams[1].stats().send_credit)
                settle()
                told = snapshot([client], [])
        assert [row["id"] for row in told["streams"]] == [5, 3, 1, 15]
        assert told["num_streams"] == 8


def test_a_stream_that_has_ended_is_told_while_its_last_bytes_are_passed_on(pair):
    client, server = pair
    stream = client.open()
    stream.sendall(b"last words")
    stream.close_write()
    accepted = server.accept()
    accepted.close_write()
    wait_for(lambda: not server.num_streams)
    with connection() as (near, _):
        told = only_stream(server, Splice(accepted, near))
    assert (told["state"], told["unread"]) == ("ESTABLISHED, ended", 10)


@pytest.mark.slow
def test_while_thousands_of_streams_are_looked_at_others_have_their_turns():
    config = geyamux.Config(accept_backlog=4000, max_incoming_streams=4000)
    with sessions(client_config=config, server_config=config) as (client, server):
        taking = gevent.spawn(lambda: [server.accept() for _ in range(4000)])
        for _ in range(4000):
            client.open()
        taking.get(timeout=10)
        looking = gevent.spawn(snapshot, [server], [])
        turns = 0
        while not looking.ready():
            gevent.sleep(0.001)
            turns += 1
        assert turns >= 8
        assert (looking.get()["num_streams"], len(looking.get()["streams"])) == (4000, module.MOST_STREAMS)
