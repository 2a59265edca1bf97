"""httpx over streams, by the recipe in examples/httpx_client.py; here without monkey-patching."""

from __future__ import annotations

import hashlib

import gevent
import pytest

import geyamux
from geyamux import Config
from support.links import sessions
from support.waiting import wait_for
from webclients.backend import LATE, PIECE
from webclients.recipes import recipe

httpx = pytest.importorskip("httpx", reason="needs httpx (pip install httpx)")

YamuxTransport = recipe("httpx_client.py").YamuxTransport

pytestmark = pytest.mark.interop

BIG = PIECE * 64


def client_of(session, **settings):
    return httpx.Client(
        transport=YamuxTransport(session), base_url="http://backend", trust_env=False, timeout=LATE, **settings
    )


@pytest.fixture
def client(backend):
    with client_of(backend.session) as client:
        yield client


def test_requests_one_after_the_other_share_a_stream(backend, client):
    for _ in range(3):
        about = client.get("/about", params={"q": "ü"}).json()
        assert (about["HTTP_HOST"], about["QUERY_STRING"]) == ("backend", "q=%C3%BC")
    assert backend.opened == 1


def test_bodies_of_many_windows_go_both_ways(backend, client):
    answer = client.put("/digest", content=(PIECE for _ in range(64)))
    assert answer.text == f"chunked {hashlib.sha256(BIG).hexdigest()}"
    assert client.get("/big?64").content == BIG


def test_a_reader_that_pauses_holds_the_server_back(backend, client):
    with client.stream("GET", "/endless") as response:
        pieces = response.iter_raw()
        next(pieces)
        before = -1
        while before != backend.sent:
            before = backend.sent
            gevent.sleep(0.02)
        assert geyamux.INITIAL_WINDOW // 2 < backend.sent < 2 * geyamux.INITIAL_WINDOW
    assert backend.was_ended.wait(LATE)


def test_redirects_are_followed_in_the_session(backend):
    with client_of(backend.session, follow_redirects=True) as client:
        for kind in ("relative", "absolute"):
            assert client.get(f"/{kind}").json()["QUERY_STRING"] == f"by={kind}"
    assert backend.opened == 1


@pytest.mark.parametrize(
    "strike",
    [
        pytest.param(lambda stream: stream.close_write(), id="ended"),
        pytest.param(lambda stream: stream.reset(), id="reset"),
    ],
)
def test_an_idle_stream_on_which_something_came_is_replaced(backend, client, strike):
    assert client.get("/about").is_success
    strike(backend.streams[0])
    backend.session.ping()
    assert client.post("/about").is_success
    assert (backend.requests, backend.opened) == (["GET /about", "POST /about"], 2)


def test_an_answer_that_does_not_come_is_a_read_timeout(backend, client):
    with pytest.raises(httpx.ReadTimeout, match="timed out"):
        client.get("/never", timeout=0.02)
    wait_for(lambda: backend.session.num_streams == 0)
    assert client.get("/about").is_success


def test_a_peer_that_takes_nothing_is_a_write_timeout():
    with sessions() as (session, _), client_of(session) as client, pytest.raises(httpx.WriteTimeout):
        client.post("/about", content=BIG, timeout=0.02)


def test_a_stream_that_cannot_be_opened_in_time_is_a_connect_timeout():
    with sessions(client_config=Config(accept_backlog=1)) as (session, _), client_of(session) as client:
        waiting = session.open()
        with pytest.raises(httpx.ConnectTimeout):
            client.get("/about", timeout=0.02)
        waiting.reset()


def test_a_session_that_is_gone_is_a_connect_error(backend, client):
    backend.session.close()
    with pytest.raises(httpx.ConnectError, match="closed on this side"):
        client.get("/about")


@pytest.mark.parametrize("framing", ["chunked", "length"])
def test_a_reset_in_the_middle_of_an_answer_is_an_error_and_not_its_end(backend, client, framing):
    with pytest.raises(httpx.ReadError):
        client.get(f"/torn?{framing}")


def test_fifty_requests_are_in_the_server_at_once(backend, client):
    backend.expected = 50
    greenlets = [gevent.spawn(client.get, "/together") for _ in range(50)]
    gevent.joinall(greenlets, raise_error=True)
    assert {greenlet.value.text for greenlet in greenlets} == {"together"}
