"""geventhttpclient over streams, by the recipe in examples/geventhttpclient_client.py."""

from __future__ import annotations

import hashlib
import json

import gevent
import pytest

from support.waiting import wait_for
from webclients.backend import LATE, PIECE
from webclients.recipes import recipe

geventhttpclient = pytest.importorskip("geventhttpclient", reason="needs geventhttpclient (pip install geventhttpclient)")

StreamPool = recipe("geventhttpclient_client.py").StreamPool

pytestmark = pytest.mark.interop

BIG = PIECE * 64


@pytest.fixture
def client(backend):
    client = geventhttpclient.HTTPClient("backend", concurrency=50)
    client._connection_pool = StreamPool(backend.session, "backend", size=50)
    yield client
    client.close()


def test_requests_one_after_the_other_share_a_stream(backend, client):
    for path in ("/a", "/b", "/c"):
        about = json.loads(client.get(path).read())
        assert (about["PATH_INFO"], about["HTTP_HOST"]) == (path, "backend")
    assert (backend.opened, backend.session.num_streams) == (1, 1)


def test_bodies_of_many_windows_go_both_ways(backend, client):
    answer = client.put("/digest", body=BIG).read().decode()
    assert answer == f"{len(BIG)} {hashlib.sha256(BIG).hexdigest()}"
    assert bytes(client.get("/big?64").read()) == BIG


def test_an_idle_stream_that_ended_is_replaced(backend, client):
    client.get("/about").read()
    backend.streams[0].close_write()
    backend.session.ping()
    assert client.post("/about").read()
    assert (backend.requests, backend.opened) == (["GET /about", "POST /about"], 2)


def test_an_answer_that_does_not_come_is_a_timeout(backend, client):
    client._connection_pool.network_timeout = 0.02
    with pytest.raises(TimeoutError):
        client.get("/never").read()


def test_a_reset_in_the_middle_of_an_answer_is_an_error_and_not_its_end(backend, client):
    response = client.get("/torn?length")
    with pytest.raises(ConnectionResetError):
        response.read()


def test_fifty_requests_are_in_the_server_at_once(backend, client):
    backend.expected = 50
    greenlets = [gevent.spawn(lambda: client.get("/together").read()) for _ in range(50)]
    gevent.joinall(greenlets, raise_error=True, timeout=LATE)
    assert {bytes(greenlet.value) for greenlet in greenlets} == {b"together"}


def test_closing_the_client_closes_its_idle_streams(backend, client):
    client.get("/about").read()
    client.close()
    wait_for(lambda: backend.session.num_streams == 0)
