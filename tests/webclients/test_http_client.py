"""http.client over streams, by the recipe in examples/http_client.py."""

from __future__ import annotations

import hashlib
import http.client
import json

import gevent
import pytest

from geyamux import StreamReset
from support.waiting import wait_for
from webclients.backend import LATE, PIECE
from webclients.recipes import recipe

Connection = recipe("http_client.py").Connection

BIG = PIECE * 64


@pytest.fixture
def connection(backend):
    connection = Connection(backend.session, "backend")
    yield connection
    connection.close()


def ask(connection, *args, **settings):
    connection.request(*args, **settings)
    return connection.getresponse()


def test_requests_one_after_the_other_share_a_stream(backend, connection):
    for path in ("/a", "/b", "/c"):
        about = json.loads(ask(connection, "GET", path).read())
        assert (about["PATH_INFO"], about["HTTP_HOST"]) == (path, "backend")
    assert backend.opened == 1


def test_bodies_of_many_windows_go_both_ways(backend, connection):
    sent = ask(connection, "PUT", "/digest", body=(PIECE for _ in range(64)), encode_chunked=True)
    assert sent.read().decode() == f"chunked {hashlib.sha256(BIG).hexdigest()}"
    assert ask(connection, "GET", "/big?64").read() == BIG


def test_a_server_that_closes_gets_a_new_stream_for_the_next_request(backend, connection):
    for _ in range(2):
        # http.client closes its connection before the body is read.
        assert ask(connection, "GET", "/last").read() == b"the last one"
    assert backend.opened == 2


def test_the_time_limit_of_the_stream_is_that_of_the_answer(backend, connection):
    connection.connect()
    connection.sock.settimeout(0.02)
    with pytest.raises(TimeoutError, match="timed out"):
        ask(connection, "GET", "/never")


@pytest.mark.parametrize("framing", ["chunked", "length"])
def test_a_reset_in_the_middle_of_an_answer_is_an_error_and_not_its_end(backend, connection, framing):
    with pytest.raises(StreamReset):
        ask(connection, "GET", f"/torn?{framing}").read()


def test_fifty_connections_talk_at_once(backend):
    backend.expected = 50

    def talk():
        connection = Connection(backend.session, "backend")
        try:
            return ask(connection, "GET", "/together").read()
        finally:
            connection.close()

    greenlets = [gevent.spawn(talk) for _ in range(50)]
    gevent.joinall(greenlets, raise_error=True, timeout=LATE)
    assert [greenlet.value for greenlet in greenlets] == [b"together"] * 50
    wait_for(lambda: backend.session.num_streams == 0)


def test_a_session_that_is_gone_is_an_error_of_the_connection(backend, connection):
    backend.session.close()
    with pytest.raises(ConnectionError):
        ask(connection, "GET", "/about")
    assert isinstance(connection, http.client.HTTPConnection)
