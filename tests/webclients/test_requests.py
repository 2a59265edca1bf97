"""requests over streams, by YamuxAdapter: what it does over TCP it does here, on the streams of a session."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import pickle
import warnings
from urllib.parse import quote

import gevent
import pytest
from gevent.event import Event

import geyamux
from geyamux import Config
from geyamux.pywsgi import WSGIServer
from support.links import sessions
from support.waiting import wait_for
from webclients.backend import KINDS, LATE, PIECE, serving, ticking

requests = pytest.importorskip("requests", reason="needs requests (pip install requests)")

from urllib3.exceptions import NewConnectionError  # noqa: E402
from urllib3.util.retry import Retry  # noqa: E402

from geyamux.requests import YamuxAdapter  # noqa: E402

pytestmark = pytest.mark.interop

BIG = PIECE * 64
"""A megabyte: four windows."""

PREFIXES = {
    "yamux://": "yamux://backend",
    "http+yamux://": "http+yamux://backend",
    "http://backend/": "http://backend",
    "agent-7://": "agent-7://backend",
}


@pytest.fixture(params=KINDS)
def any_backend(request):
    with serving(request.param) as backend:
        yield backend


@pytest.fixture
def backend():
    with serving() as backend:
        yield backend


@pytest.fixture
def mounted():
    """Make a requests session with an adapter mounted; it is closed after the test."""
    made = []

    def make(source, prefix="yamux://", **settings):
        made.append(requests.Session())
        made[-1].mount(prefix, YamuxAdapter(source, **settings))
        return made[-1]

    yield make
    for one in made:
        one.close()


@pytest.fixture
def http(backend, mounted):
    return mounted(backend.session)


# --- requests and answers


@pytest.mark.parametrize("prefix", PREFIXES)
def test_a_request_says_what_it_would_say_over_tcp(any_backend, mounted, prefix):
    http = mounted(any_backend.session, prefix)
    about = http.post(f"{PREFIXES[prefix]}/some/päth?a=1&b=ü#part", data=b"body").json()
    assert about["REQUEST_METHOD"] == "POST"
    assert about["PATH_INFO"].encode("latin-1").decode() == "/some/päth"
    assert about["QUERY_STRING"] == "a=1&b=%C3%BC"
    assert about["HTTP_HOST"] == "backend"
    assert about["body"] == "body"
    assert any_backend.opened == 1


def test_an_agent_that_dialled_out_serves_whoever_holds_the_other_end(mounted):
    with serving("tcp", swap=True) as backend:
        assert not backend.session.is_client
        assert mounted(backend.session).get("yamux://agent/about").status_code == 200
        assert backend.requests == ["GET /about"]


@pytest.mark.parametrize(
    ("url", "host"),
    [
        ("http://backend/", "backend"),
        ("http://backend:80/", "backend"),
        ("http://BACKEND:8080/", "backend:8080"),
        ("yamux://agent_7.example:1234/", "agent_7.example:1234"),
        ("yamux://user:secret@backend/", "backend"),
        ("yamux://backend?no=path", "backend"),
        ("yamux://[::1]:8080/", "[::1]:8080"),
    ],
)
def test_the_host_header_is_the_host_of_the_url(backend, mounted, url, host):
    about = mounted(backend.session, url[: url.index("//") + 2]).get(url).json()
    assert (about["HTTP_HOST"], about["PATH_INFO"]) == (host, "/")


def test_a_host_header_of_the_caller_is_kept(backend, http):
    assert http.get("yamux://backend/", headers={"Host": "www.example.org"}).json()["HTTP_HOST"] == "www.example.org"


def test_a_url_without_a_host_is_refused(http):
    with pytest.raises(requests.exceptions.InvalidURL):
        http.get("yamux:///about")


@pytest.mark.parametrize("prefix", ["http://backend/", "http+yamux://"])
def test_params_work_where_the_scheme_begins_with_http(backend, mounted, prefix):
    about = mounted(backend.session, prefix).get(PREFIXES[prefix] + "/a", params={"q": "ä b", "n": [1, 2]}).json()
    assert about["QUERY_STRING"] == "q=%C3%A4+b&n=1&n=2"


def test_params_are_lost_before_the_adapter_sees_them_where_it_does_not(backend, http):
    assert http.get("yamux://backend/a?q=1", params={"n": 2}).json()["QUERY_STRING"] == "q=1"


def test_name_and_password_in_the_url_are_sent_as_ever(backend, http):
    about = http.get("yamux://user:secret@backend/").json()
    assert about["HTTP_AUTHORIZATION"] == requests.auth._basic_auth_str("user", "secret")


def test_cookies_come_back(backend, http):
    http.get("yamux://backend.example/bake")
    assert http.get("yamux://backend.example/").json()["HTTP_COOKIE"] == "flavour=vanilla"
    assert "HTTP_COOKIE" not in http.get("yamux://other.example/").json()


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("kind", ["relative", "absolute"])
def test_redirects_lead_back_into_the_session(backend, mounted, prefix, kind):
    http = mounted(backend.session, prefix)
    response = http.get(f"{PREFIXES[prefix]}/{kind}")
    assert response.url == f"{PREFIXES[prefix]}/landed?by={kind}"
    assert response.json()["QUERY_STRING"] == f"by={kind}"
    assert backend.opened == 1


@pytest.mark.parametrize(
    "location",
    [
        "http://elsewhere/",
        "http://backend:8080/",
        "ftp://backend/",
        "http://backend:port/",
        "mailto:someone@example.org",
    ],
)
def test_a_redirect_to_somewhere_else_is_left_as_it_is(http, location):
    response = http.get(f"yamux://backend/away?{quote(location)}", allow_redirects=False)
    assert response.headers["location"] == location


@pytest.mark.parametrize("prefix", ["yamux://", "http+yamux://"])
def test_a_server_that_takes_itself_for_https_because_of_tls_below_redirects_into_the_session(mounted, prefix):
    with serving("tls13") as backend:
        response = mounted(backend.session, prefix).get(f"{prefix}backend/absolute")
        assert response.history[0].raw.headers["location"].startswith("https://backend/")
        assert response.url == f"{prefix}backend/landed?by=absolute"


def test_a_redirect_from_http_to_https_is_what_it_says(backend, mounted):
    response = mounted(backend.session, "http://").get("http://backend/away?https://backend/", allow_redirects=False)
    assert response.headers["location"] == "https://backend/"


def test_proxies_of_the_environment_are_not_used(backend, mounted, monkeypatch):
    monkeypatch.setenv("http_proxy", "http://user:secret@127.0.0.1:9")
    monkeypatch.setenv("all_proxy", "http://127.0.0.1:9")
    about = mounted(backend.session, "http://").get("http://backend/about").json()
    assert about["PATH_INFO"] == "/about"


def test_head_and_answers_without_a_body_leave_the_stream_fit_for_the_next(backend, http):
    assert http.head("yamux://backend/about").headers["Content-Type"] == "application/json"
    assert http.get("yamux://backend/bake").content == b""
    assert http.get("yamux://backend/about").ok
    assert backend.opened == 1


# --- bodies


@pytest.mark.parametrize("body", ["bytes", "generator", "file"])
def test_a_large_body_arrives_whole(any_backend, mounted, body, tmp_path):
    (tmp_path / "body").write_bytes(BIG)
    with (tmp_path / "body").open("rb") as file:
        data = {"bytes": BIG, "generator": (PIECE for _ in range(64)), "file": file}[body]
        response = mounted(any_backend.session).put("yamux://backend/digest", data=data)
    how = "chunked" if body == "generator" else len(BIG)
    assert response.text == f"{how} {hashlib.sha256(BIG).hexdigest()}"


def test_a_large_answer_arrives_whole(any_backend, mounted):
    http = mounted(any_backend.session)
    assert http.get("yamux://backend/big?64").content == BIG
    with http.get("yamux://backend/big?64", stream=True) as response:
        assert b"".join(response.iter_content(5000)) == BIG
    assert any_backend.opened == 1


def test_a_reader_that_pauses_holds_the_server_back(backend, http):
    with http.get("yamux://backend/endless", stream=True) as response:
        pieces = response.iter_content(1000)
        assert len(next(pieces)) == 1000
        before = -1
        while before != backend.sent:
            before = backend.sent
            gevent.sleep(0.02)
        # A window, and what lies in the buffers of the two ends.
        assert geyamux.INITIAL_WINDOW // 2 < backend.sent < 2 * geyamux.INITIAL_WINDOW
        for _ in range(1000):
            next(pieces)
        wait_for(lambda: backend.sent > 1_000_000)


def test_an_answer_that_is_left_in_the_middle_ends_its_stream_and_no_other(backend, http):
    with http.get("yamux://backend/endless", stream=True) as response:
        pieces = response.iter_content(1000)
        next(pieces)
        assert not backend.was_ended.wait(0.02)
    assert backend.was_ended.wait(LATE)
    wait_for(lambda: backend.session.num_streams == 0)
    assert http.get("yamux://backend/about").ok
    assert backend.opened == 2


def test_an_answer_before_the_end_of_the_body_is_read(backend, http):
    """The server ends the stream without having read what comes."""
    response = http.post("yamux://backend/early", data=(PIECE for _ in range(16)))
    assert (response.status_code, response.text) == (413, "too large")


# --- idle streams


def test_requests_one_after_the_other_share_a_stream(any_backend, mounted):
    http = mounted(any_backend.session)
    for _ in range(5):
        assert http.get("yamux://backend/about").ok
    assert (any_backend.opened, any_backend.session.num_streams) == (1, 1)


def test_a_server_that_closes_gets_a_new_stream_for_the_next_request(backend, http):
    for _ in range(2):
        assert http.get("yamux://backend/last").text == "the last one"
    assert backend.opened == 2


@pytest.mark.parametrize(
    "strike",
    [
        pytest.param(lambda stream: stream.close_write(), id="ended"),
        pytest.param(lambda stream: stream.reset(), id="reset"),
        pytest.param(lambda stream: stream.sendall(b"unasked for"), id="readable"),
    ],
)
def test_an_idle_stream_on_which_something_came_is_replaced(backend, http, strike):
    assert http.get("yamux://backend/about").ok
    strike(backend.streams[0])
    backend.session.ping()  # what the server sent is here when the answer is
    # Nothing is tried again: a stream that is not fit must not be taken in the first place.
    assert http.post("yamux://backend/about").json()["REQUEST_METHOD"] == "POST"
    assert backend.requests == ["GET /about", "POST /about"]
    assert backend.opened == 2


def test_an_idle_stream_of_a_peer_that_goes_away_is_not_used_again(backend, mounted):
    """`source` has another session by then; on the old one it would keep the server from stopping."""
    with sessions("socketpair") as (another, end), serving_on(end) as other:
        current = [backend.session]
        http = mounted(lambda: current[0])
        assert http.get("yamux://backend/about").ok
        # Not the way a WSGIServer stops, which ends idle streams besides.
        backend.streams[0].session.go_away()
        backend.session.ping()
        current[0] = another
        assert http.post("yamux://backend/about").ok
        assert (backend.requests, other) == (["GET /about"], ["POST /about"])


@contextlib.contextmanager
def serving_on(end):
    """Serve on that end; a list of what was asked."""
    asked = []

    def app(environ, start_response):
        asked.append(f"{environ['REQUEST_METHOD']} {environ['PATH_INFO']}")
        start_response("200 OK", [("Content-Length", "0")])
        return []

    with WSGIServer(end, app, log=None) as server:
        server.start()
        yield asked


def test_closing_the_adapter_closes_its_idle_streams_and_not_the_session(backend, http):
    kept = [http.get("yamux://one/about"), http.get("yamux://two/about")]
    assert backend.session.num_streams == 2
    http.close()
    wait_for(lambda: backend.session.num_streams == 0)
    kept.append(http.get("yamux://one/about"))
    assert [response.ok for response in kept] == [True] * 3


def test_an_answer_in_hand_outlives_the_closing_of_the_adapter(backend, http):
    with http.get("yamux://backend/big?64", stream=True) as response:
        http.close()
        assert response.content == BIG
    wait_for(lambda: backend.session.num_streams == 0)


def test_a_greenlet_that_waits_for_a_stream_gets_one_though_the_adapter_is_closed(backend, mounted):
    backend.expected = 2
    http = mounted(backend.session, pool_maxsize=1, pool_block=True)
    first = gevent.spawn(get, http, "yamux://backend/together")
    wait_for(lambda: backend.at_once == 1)
    second = gevent.spawn(get, http, "yamux://backend/about")
    gevent.idle()
    http.close()
    backend.all_are_here.set()
    gevent.joinall([first, second], raise_error=True)
    assert (first.value, backend.opened) == ("together", 2)
    wait_for(lambda: backend.session.num_streams == 0)


# --- many at once


def get(http, url):
    return http.get(url).text


def test_two_hundred_requests_are_in_the_server_at_once(any_backend, mounted):
    any_backend.expected = 200
    http = mounted(any_backend.session)
    greenlets = [gevent.spawn(get, http, "yamux://backend/together") for _ in range(200)]
    gevent.joinall(greenlets, raise_error=True)
    assert {greenlet.value for greenlet in greenlets} == {"together"}
    assert any_backend.most_at_once == 200
    # Ten of them stay for later.
    wait_for(lambda: any_backend.session.num_streams == 10)


def test_pool_maxsize_is_how_many_idle_streams_are_kept(backend, mounted):
    backend.expected = 6
    http = mounted(backend.session, pool_maxsize=4)
    gevent.joinall([gevent.spawn(get, http, "yamux://backend/together") for _ in range(6)], raise_error=True)
    wait_for(lambda: backend.session.num_streams == 4)


def test_a_pool_that_blocks_lets_the_others_run_and_uses_no_more_streams_than_it_may(backend, mounted):
    http = mounted(backend.session, pool_maxsize=2, pool_block=True)
    greenlets = [gevent.spawn(get, http, "yamux://backend/turn") for _ in range(10)]
    gevent.joinall(greenlets, raise_error=True)
    assert [greenlet.value for greenlet in greenlets] == ["done"] * 10
    assert (backend.most_at_once, backend.opened) == (2, 2)


def test_pool_connections_is_for_how_many_hosts_idle_streams_are_kept(backend, mounted):
    http = mounted(backend.session, pool_connections=2)
    for host in "abc":
        http.get(f"yamux://{host}/about")
    wait_for(lambda: backend.session.num_streams == 2)


# --- time limits


def test_an_answer_that_does_not_come_is_a_read_timeout(any_backend, mounted):
    http = mounted(any_backend.session)
    with pytest.raises(requests.ReadTimeout):
        http.get("yamux://backend/never", timeout=(LATE, 0.02))
    wait_for(lambda: any_backend.session.num_streams == 0)
    assert http.get("yamux://backend/about", timeout=LATE).ok


def test_a_stream_that_cannot_be_opened_in_time_is_a_connect_timeout(mounted):
    with sessions(client_config=Config(accept_backlog=1)) as (client, _server), client.open() as waiting:
        http = mounted(client)
        with pytest.raises(requests.ConnectTimeout):
            http.get("yamux://backend/", timeout=(0.02, LATE))
        assert client.num_streams == 1
        waiting.reset()


def test_the_limit_of_the_session_for_opening_is_a_connect_timeout_too(mounted):
    config = Config(max_outgoing_streams=1, stream_open_timeout=0.02)
    with sessions(client_config=config) as (client, server), client.open() as taken, server.accept(timeout=LATE):
        assert taken.wait_established(LATE)
        with pytest.raises(requests.ConnectTimeout):
            mounted(client).get("yamux://backend/")


def test_a_source_that_takes_too_long_is_a_connect_timeout(mounted):
    with pytest.raises(requests.ConnectTimeout):
        mounted(Event().wait).get("yamux://backend/", timeout=(0.02, LATE))


def test_a_source_that_says_so_itself_is_a_connect_timeout(mounted):
    def source():
        raise TimeoutError("no answer from the other end")

    with pytest.raises(requests.ConnectTimeout, match="no answer from the other end"):
        mounted(source).get("yamux://backend/")


@pytest.mark.parametrize("page", ["never", "endless"])
def test_a_gevent_timeout_of_the_caller_passes_through_and_ends_the_stream(backend, http, page):
    limit = gevent.Timeout(0.05)
    with pytest.raises(gevent.Timeout) as caught, limit:
        http.get(f"yamux://backend/{page}")
    assert caught.value is limit
    wait_for(lambda: backend.session.num_streams == 0)
    assert http.get("yamux://backend/about").ok


def test_a_gevent_timeout_strikes_while_the_source_waits(mounted):
    limit = gevent.Timeout(0.02)
    with pytest.raises(gevent.Timeout) as caught, limit:
        mounted(Event().wait).get("yamux://backend/", timeout=LATE)
    assert caught.value is limit


def test_sending_is_limited_by_the_connect_timeout(mounted):
    with sessions() as (client, server):
        http = mounted(client)
        with pytest.raises(requests.ConnectionError, match="timed out"):
            http.post("yamux://backend/", data=BIG, timeout=(0.05, LATE))
        with server.accept(timeout=LATE) as stream:
            assert stream.read(4) == b"POST"


# --- errors and retries


class Source:
    """What a function that reconnects would do: it fails so many times, then returns a session."""

    def __init__(self, session, failures=0):
        self.session = session
        self.failures = failures
        self.calls = 0

    def __call__(self):
        self.calls += 1
        if self.calls <= self.failures:
            raise ConnectionRefusedError("nobody listens")
        return self.session


@pytest.mark.parametrize("method", ["GET", "POST"])
def test_a_failure_to_connect_is_tried_again_whatever_the_method(backend, mounted, method):
    source = Source(backend.session, failures=2)
    response = mounted(source, max_retries=2).request(method, "yamux://backend/about", data=b"x")
    assert response.json()["body"] == "x"
    assert (source.calls, backend.requests) == (3, [f"{method} /about"])


def test_a_failure_to_connect_is_a_connection_error_when_no_try_is_left(backend, mounted):
    source = Source(backend.session, failures=2)
    with pytest.raises(requests.ConnectionError, match="nobody listens") as caught:
        mounted(source, max_retries=1).get("yamux://backend/")
    assert not isinstance(caught.value, requests.Timeout)
    assert isinstance(caught.value.args[0].reason, NewConnectionError)
    assert source.calls == 2


def test_nothing_is_tried_again_by_default(backend, mounted):
    source = Source(backend.session, failures=1)
    with pytest.raises(requests.ConnectionError):
        mounted(source).get("yamux://backend/")
    assert source.calls == 1


def test_a_closed_session_is_a_connection_error(backend, http):
    http.get("yamux://backend/about")
    backend.session.close()
    with pytest.raises(requests.ConnectionError, match="closed on this side"):
        http.get("yamux://backend/about")


def test_a_peer_that_goes_away_is_a_connection_error_once_a_stream_is_needed(mounted):
    with sessions() as (client, server):
        server.go_away()
        client.ping()
        with pytest.raises(requests.ConnectionError, match="takes no new streams"):
            mounted(client).get("yamux://backend/")


def test_a_source_that_reconnects_is_asked_for_each_stream(mounted):
    with serving() as first, serving() as second:
        source = Source(first.session)
        http = mounted(source)
        http.get("yamux://backend/about")
        http.get("yamux://backend/about")
        assert source.calls == 1
        source.session = second.session
        first.session.abort()
        assert http.post("yamux://backend/about").ok
        assert (first.requests, second.requests) == (["GET /about"] * 2, ["POST /about"])


@pytest.mark.parametrize(
    ("method", "retries", "tries"),
    [
        ("GET", 0, 1),
        ("GET", 3, 3),
        ("POST", 0, 1),
        ("POST", 3, 1),
        ("POST", Retry(3, allowed_methods=None), 3),
    ],
)
def test_a_request_that_may_have_been_heard_is_repeated_only_as_retry_says(backend, mounted, method, retries, tries):
    backend.spoils = 2
    http = mounted(backend.session, max_retries=retries)
    if tries == 3:
        assert http.request(method, "yamux://backend/reset").text == "fine"
    else:
        with pytest.raises(requests.ConnectionError, match="Connection aborted"):
            http.request(method, "yamux://backend/reset")
    assert backend.requests == [f"{method} /reset"] * tries


@pytest.mark.parametrize("framing", ["chunked", "length"])
def test_a_reset_in_the_middle_of_an_answer_is_an_error_and_not_its_end(any_backend, mounted, framing):
    http = mounted(any_backend.session, max_retries=3)
    with http.get(f"yamux://backend/torn?{framing}", stream=True) as response:
        assert response.status_code == 200
        with pytest.raises(requests.exceptions.ChunkedEncodingError, match="Connection broken"):
            response.content  # noqa: B018
    assert any_backend.requests == ["GET /torn"]


def test_a_session_that_breaks_in_the_middle_of_an_answer_is_an_error(any_backend, mounted):
    with mounted(any_backend.session).get("yamux://backend/endless", stream=True) as response:
        pieces = response.iter_content(1000)
        next(pieces)
        any_backend.streams[0].session.abort()
        with pytest.raises(requests.exceptions.ChunkedEncodingError):
            list(pieces)


def test_a_session_that_breaks_before_the_answer_is_a_connection_error(any_backend, mounted):
    waiting = gevent.spawn(mounted(any_backend.session).get, "yamux://backend/never")
    wait_for(lambda: bool(any_backend.requests))
    any_backend.streams[0].session.abort()
    with pytest.raises(requests.ConnectionError):
        waiting.get(timeout=LATE)


def test_what_is_no_failure_of_the_network_is_raised_as_it_is(mounted):
    def source():
        raise LookupError("no such agent")

    with pytest.raises(LookupError, match="no such agent"):
        mounted(source, max_retries=3).get("yamux://backend/")


# --- the hub goes on


def test_others_run_while_a_retry_waits_for_its_next_try(backend, mounted):
    source = Source(backend.session, failures=3)
    with ticking() as ticks:
        assert mounted(source, max_retries=Retry(3, backoff_factor=0.02)).get("yamux://backend/about").ok
    assert len(ticks) >= 4  # of 0.12 s


def test_others_run_while_a_server_wants_to_be_left_alone(backend, mounted):
    backend.spoils = 1
    with ticking() as ticks:
        assert mounted(backend.session, max_retries=1).get("yamux://backend/busy").text == "fine"
    assert len(ticks) >= 40  # of a second


def test_a_retry_of_a_class_of_its_own_stays_what_it_is(backend):
    class Own(Retry):
        pass

    adapter = YamuxAdapter(backend.session, max_retries=Own(2))
    assert type(adapter.max_retries) is Own
    shared = Retry(5)
    adapter.max_retries = shared
    assert adapter.max_retries.total == 5
    assert type(shared) is Retry


# --- the adapter itself


@pytest.mark.parametrize("source", [None, "yamux://backend", ("127.0.0.1", 7000)])
def test_a_source_that_is_neither_session_nor_function_is_refused(source):
    with pytest.raises(TypeError, match="a geyamux session or a function"):
        YamuxAdapter(source)


def nobody():
    raise ConnectionRefusedError("nobody is there")


def test_an_adapter_with_a_function_of_a_module_can_be_pickled():
    adapter = YamuxAdapter(nobody, pool_maxsize=3, max_retries=2, pool_block=True)
    with requests.Session() as http:
        http.mount("yamux://", pickle.loads(pickle.dumps(adapter)))
        copied = http.get_adapter("yamux://backend/")
        assert (copied._pool_maxsize, copied._pool_block, copied.max_retries.total) == (3, True, 2)
        with pytest.raises(requests.ConnectionError, match="nobody is there"):
            http.get("yamux://backend/")


def test_an_adapter_with_a_session_cannot_be_pickled_and_says_why(backend):
    with pytest.raises(TypeError, match="cannot pickle or copy <geyamux"):
        pickle.dumps(YamuxAdapter(backend.session))


def test_a_pool_of_no_size_and_other_settings_of_requests_are_taken(backend):
    class Small(YamuxAdapter):
        def init_poolmanager(self, *args, **kwargs):
            super().init_poolmanager(*args, **kwargs, blocksize=1000)

    with requests.Session() as http, warnings.catch_warnings():
        warnings.simplefilter("error")
        http.mount("yamux://", Small(backend.session, 1, 0, 0, False))
        data = functools.reduce(lambda a, b: a + b, [PIECE] * 2)
        assert http.post("yamux://backend/digest", data=data).text.endswith(hashlib.sha256(data).hexdigest())
