"""urllib3 without requests: the pools of an adapter, which are urllib3's, used directly."""

from __future__ import annotations

import pytest

from webclients.backend import LATE, PIECE

pytest.importorskip("requests", reason="needs requests (pip install requests)")

import urllib3

from geyamux.requests import YamuxAdapter

pytestmark = pytest.mark.interop


@pytest.fixture
def pools(backend):
    adapter = YamuxAdapter(backend.session)
    yield adapter.poolmanager
    adapter.close()


def test_requests_one_after_the_other_share_a_stream(backend, pools):
    for _ in range(3):
        assert pools.request("GET", "http://backend/about", fields={"q": "1"}).json()["QUERY_STRING"] == "q=1"
    assert pools.request("GET", "http://backend/big?64").data == PIECE * 64
    assert backend.opened == 1


def test_redirects_are_followed_in_the_session(backend, pools):
    assert pools.request("GET", "http://backend/absolute").json()["PATH_INFO"] == "/landed"


def test_an_idle_stream_that_ended_is_replaced(backend, pools):
    pools.request("GET", "http://backend/about")
    backend.streams[0].close_write()
    backend.session.ping()
    assert pools.request("POST", "http://backend/about", retries=False).status == 200
    assert backend.opened == 2


def test_errors_are_those_of_urllib3(backend, pools):
    with pytest.raises(urllib3.exceptions.ReadTimeoutError):
        pools.request("GET", "http://backend/never", timeout=urllib3.Timeout(connect=LATE, read=0.02), retries=False)
    with pytest.raises(urllib3.exceptions.ProtocolError):
        pools.request("GET", "http://backend/torn?length", retries=False)
    backend.session.close()
    with pytest.raises(urllib3.exceptions.NewConnectionError):
        pools.request("GET", "http://backend/about", retries=False)
