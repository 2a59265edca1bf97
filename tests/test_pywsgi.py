"""gevent's WSGI server over sessions: HTTP as it is spoken over connections, and what its applications are told."""

from __future__ import annotations

import io
import ssl
from collections.abc import Iterable, Iterator
from http.client import HTTPConnection, HTTPResponse
from typing import Any

import gevent
import gevent.pywsgi
import pytest
from gevent import socket as gsocket
from gevent.event import Event

import geyamux
from geyamux import RemoteGoAway, StreamReset
from geyamux.pywsgi import WSGIServer
from support.links import sessions, tls_contexts
from support.rawpeer import settle

LATE = 5.0


def application(environ: Any, start_response: Any) -> Iterable[bytes]:
    body = environ["wsgi.input"].read()
    start_response("200 OK", [("Content-Type", "text/plain")])
    return [environ["REQUEST_METHOD"].encode(), b" ", environ["PATH_INFO"].encode(), b" ", body]


def gated() -> tuple[Event, Event, Any]:
    """An application that says when it has begun, and answers when it may."""
    inside, go = Event(), Event()

    def app(environ: Any, start_response: Any) -> Iterable[bytes]:
        inside.set()
        go.wait()
        return application(environ, start_response)

    return inside, go, app


class OverStream(HTTPConnection):
    """An HTTP connection over a stream of a session."""

    def __init__(self, session: Any) -> None:
        super().__init__("example.org")
        self.sock = session.open()

    def get(self, path: str = "/", **more: Any) -> bytes:
        self.request(more.pop("method", "GET"), path, **more)
        return self.getresponse().read()


class Site:
    """A session whose peer serves an application over it."""

    def __init__(self, kind: str = "tcp") -> None:
        self._sessions = sessions(kind)
        self.client, self.end = self._sessions.__enter__()
        self.log = io.StringIO()
        self.errors = io.StringIO()
        self.server: Any = None

    def serve(self, app: Any = application, **more: Any) -> OverStream:
        self.server = WSGIServer(self.end, app, log=self.log, error_log=self.errors, **more)
        self.server.start()
        return OverStream(self.client)

    def environ(self, **more: Any) -> dict[str, Any]:
        """What an application is told of a request."""
        told: list[dict[str, Any]] = []

        def app(environ: Any, start_response: Any) -> Iterable[bytes]:
            told.append(dict(environ))
            start_response("204 No Content", [])
            return []

        connection = self.serve(app, **more)
        connection.get()
        connection.close()
        return told[0]

    def close(self) -> None:
        if self.server is not None:
            self.server.stop(0)
        self._sessions.__exit__(None, None, None)


@pytest.fixture
def site() -> Iterator[Site]:
    made = Site()
    yield made
    made.close()


# --- requests ---


def test_it_is_a_wsgi_server_of_gevent(site):
    site.serve().close()
    assert isinstance(site.server, gevent.pywsgi.WSGIServer)


def test_a_stream_is_a_connection_with_keep_alive(site):
    connection = site.serve()
    for number in range(3):
        assert (
            connection.get(f"/{number}", method="PUT", body=b"x" * number) == f"PUT /{number} ".encode() + b"x" * number
        )
    assert site.client.stats().opened == 1
    connection.close()


def test_many_requests_run_at_once(site):
    together = Event()
    inside: list[Any] = []

    def app(environ: Any, start_response: Any) -> Iterable[bytes]:
        inside.append(environ)
        if len(inside) == 20:
            together.set()
        assert together.wait(LATE)
        return application(environ, start_response)

    connections = [site.serve(app), *(OverStream(site.client) for _ in range(19))]
    requests = [gevent.spawn(connection.get, f"/{number}") for number, connection in enumerate(connections)]
    assert [request.get(timeout=LATE) for request in requests] == [f"GET /{number} ".encode() for number in range(20)]
    for connection in connections:
        connection.close()


def test_large_bodies_go_in_both_directions(site):
    piece = bytes(range(256)) * 256

    def mirror(environ: Any, start_response: Any) -> Iterable[bytes]:
        """Half-way through its answer before it has read all of the question."""
        start_response("200 OK", [("Content-Type", "application/octet-stream")])
        while chunk := environ["wsgi.input"].read(65536):
            yield bytes(reversed(chunk))

    connection = site.serve(mirror)
    connection.putrequest("POST", "/")
    connection.putheader("Transfer-Encoding", "chunked")
    sending = gevent.spawn(connection.endheaders, iter([piece] * 40), encode_chunked=True)
    # Both at once: whoever writes all first may wait for ever, as on a connection.
    response = HTTPResponse(connection.sock, method="POST")
    response.begin()
    assert response.getheader("Transfer-Encoding") == "chunked"
    assert response.read() == bytes(reversed(piece)) * 40
    sending.get(timeout=LATE)
    response.close()
    connection.close()


def test_an_application_that_fails_answers_500_and_the_stream_ends(site, monkeypatch):
    def broken(environ: Any, start_response: Any) -> Iterable[bytes]:
        raise LookupError("nothing there")

    monkeypatch.setattr(gevent.get_hub(), "handle_error", lambda *args: None)
    connection = site.serve(broken)
    connection.request("GET", "/")
    response = connection.getresponse()
    assert response.status == 500
    assert response.read() == b"Internal Server Error"
    assert connection.sock is None, "it was told that the connection ends"


def test_an_application_that_fails_in_the_middle_is_no_whole_answer(site, monkeypatch):
    """Nothing but the end of the stream says where an answer of HTTP/1.0 ends."""

    def broken(environ: Any, start_response: Any) -> Iterable[bytes]:
        start_response("200 OK", [("Content-Type", "text/plain")])
        yield b"half"
        raise LookupError("no other half")

    monkeypatch.setattr(gevent.get_hub(), "handle_error", lambda *args: None)
    stream = site.serve(broken).sock
    stream.sendall(b"GET / HTTP/1.0\r\n\r\n")
    with pytest.raises(StreamReset):
        stream.read()


def test_a_client_that_leaves_is_no_error(site):
    started = Event()

    def endless(environ: Any, start_response: Any) -> Iterable[bytes]:
        start_response("200 OK", [("Content-Type", "text/plain")])
        while True:
            started.set()
            yield bytes(65536)

    connection = site.serve(endless)
    connection.request("GET", "/")
    assert started.wait(LATE)
    connection.sock.reset()
    settle()
    connection.close()
    assert "Traceback" not in site.errors.getvalue()


def test_a_stream_ends_with_its_requests_whoever_keeps_the_environ(site):
    """A traceback, a debugger or a websocket object may; a client that reads to the end must not wait for them."""
    kept: list[Any] = []

    def app(environ: Any, start_response: Any) -> Iterable[bytes]:
        kept.append(environ)
        return application(environ, start_response)

    stream = site.serve(app).sock
    stream.settimeout(LATE)
    stream.sendall(b"GET /kept HTTP/1.0\r\n\r\n")
    assert stream.read().endswith(b"GET /kept ")
    assert kept


# --- what it is told, and what it says ---


def test_the_environ_has_the_stream_and_the_session(site):
    environ = site.environ()
    assert environ["geyamux.session"] is site.end
    assert environ["geyamux.stream"].session is site.end
    assert environ["geyamux.stream"].stream_id == 1


def test_an_application_may_open_streams_to_its_client(site):
    def push(environ: Any, start_response: Any) -> Iterable[bytes]:
        with environ["geyamux.session"].open() as stream:
            stream.sendall(b"pushed")
        return application(environ, start_response)

    connection = site.serve(push)
    connection.get()
    assert site.client.accept(timeout=LATE).read() == b"pushed"
    connection.close()


def test_the_remote_address_is_that_of_the_connection(site):
    environ = site.environ()
    host, port = site.client.getsockname()
    assert (environ["REMOTE_ADDR"], environ["REMOTE_PORT"]) == (host, str(port))
    assert site.log.getvalue().startswith(f"{host} - - [")
    assert '"GET / HTTP/1.1" 204' in site.log.getvalue()


def test_a_connection_without_address_is_named(site):
    other = Site("socketpair")
    environ = other.environ()
    other.close()
    assert (environ["REMOTE_ADDR"], environ["REMOTE_PORT"]) == ("yamux", "1")
    assert other.log.getvalue().startswith("yamux - - [")


def test_the_server_name_is_the_address_and_nobody_is_asked_for_it(site, monkeypatch):
    def ask(*args: Any) -> Any:
        raise AssertionError("a name server was asked")

    monkeypatch.setattr(gevent.pywsgi.socket, "getfqdn", ask)
    environ = site.environ()
    host, port = site.end.getsockname()
    assert (environ["SERVER_NAME"], environ["SERVER_PORT"]) == (host, str(port))


def test_the_environ_may_be_given(site):
    environ = site.environ(environ={"SERVER_NAME": "app.example.org", "my.own": "thing"})
    assert (environ["SERVER_NAME"], environ["my.own"]) == ("app.example.org", "thing")


def test_a_handler_class_may_be_given(site):
    class Handler(gevent.pywsgi.WSGIHandler):
        def get_environ(self) -> Any:
            return {**super().get_environ(), "handler": type(self).__name__}

    environ = site.environ(handler_class=Handler)
    assert environ["handler"] == "Handler"
    assert environ["geyamux.session"] is site.end


def test_a_handler_class_may_be_anything_that_makes_something_with_a_handle(site):
    """gevent asks for no more."""

    class Greeter:
        __slots__ = ("stream",)

        def __init__(self, stream: Any, address: Any, server: Any) -> None:
            self.stream = stream

        def handle(self) -> None:
            self.stream.sendall(b"hello")

    assert site.serve(handler_class=Greeter).sock.read() == b"hello"


def test_a_handler_class_may_be_a_function(site):
    """gevent only calls it."""
    environ = site.environ(handler_class=lambda *args: gevent.pywsgi.WSGIHandler(*args))
    assert environ["geyamux.session"] is site.end


def test_a_handler_class_sees_the_stream_in_the_environ_that_it_extends(site):
    class Handler(gevent.pywsgi.WSGIHandler):
        def get_environ(self) -> Any:
            environ = super().get_environ()
            environ["my.stream"] = environ["geyamux.stream"].stream_id
            return environ

    assert site.environ(handler_class=Handler)["my.stream"] == 1


@pytest.mark.parametrize(("kind", "scheme"), [("tcp", "http"), ("tls13", "https")])
def test_the_scheme_is_that_of_the_connection(kind, scheme):
    made = Site(kind)
    environ = made.environ()
    made.close()
    assert environ["wsgi.url_scheme"] == scheme


# --- how it ends ---


def test_stop_lets_requests_finish(site):
    inside, go, app = gated()
    connection = site.serve(app, spawn=5)
    request = gevent.spawn(connection.get, "/last", headers={"Connection": "close"})
    assert inside.wait(LATE)
    stopping = gevent.spawn(site.server.stop, LATE)
    settle()
    site.client.ping()
    with pytest.raises(RemoteGoAway):
        site.client.open()
    go.set()
    assert request.get(timeout=LATE) == b"GET /last "
    stopping.get(timeout=LATE)
    connection.close()


def test_stop_does_not_wait_for_streams_that_are_kept_for_further_requests(site):
    connection = site.serve(spawn=5)
    assert connection.get("/first") == b"GET /first "
    settle()
    with gevent.Timeout(LATE):
        site.server.stop(60)
    assert connection.sock.recv(1) == b"", "a client that keeps it sees so, and takes another"
    connection.close()


def test_a_request_under_way_is_answered_and_is_the_last_of_its_stream(site):
    inside, go, app = gated()
    connection = site.serve(app, spawn=5)
    request = gevent.spawn(connection.get, "/last")
    assert inside.wait(LATE)
    stopping = gevent.spawn(site.server.stop, 60)
    settle()
    go.set()
    assert request.get(timeout=LATE) == b"GET /last "
    assert connection.sock.recv(1) == b""
    connection.close()
    stopping.get(timeout=LATE)


def test_a_request_that_takes_too_long_is_cut_and_looks_cut(site):
    inside = Event()

    def app(environ: Any, start_response: Any) -> Iterable[bytes]:
        start_response("200 OK", [("Content-Type", "text/plain")])
        yield b"half"
        inside.set()
        gevent.sleep(60)

    stream = site.serve(app, spawn=5).sock
    # HTTP/1.0: nothing but the end of the stream says where the answer ends.
    stream.sendall(b"GET / HTTP/1.0\r\n\r\n")
    assert inside.wait(LATE)
    site.server.stop(0)
    with pytest.raises(StreamReset):
        stream.read()


def test_serve_forever_returns_when_the_session_ends(site):
    site.serve().close()
    serving = gevent.spawn(site.server.serve_forever)
    settle()
    site.client.close()
    serving.get(timeout=LATE)


# --- a port ---


def test_a_port_serves_http_over_yamux():
    with WSGIServer(("127.0.0.1", 0), application, log=None) as server:
        server.start()
        with geyamux.connect(server.address) as client:
            connection = OverStream(client)
            assert connection.get("/port") == b"GET /port "
            connection.close()


def test_a_port_serves_http_over_yamux_over_tls():
    client_context, server_context = tls_contexts(ssl.TLSVersion.TLSv1_3)
    told: list[Any] = []

    def app(environ: Any, start_response: Any) -> Iterable[bytes]:
        told.append(environ["wsgi.url_scheme"])
        return application(environ, start_response)

    with WSGIServer(("127.0.0.1", 0), app, log=None, ssl_context=server_context) as server:
        server.start()
        with geyamux.connect(server.address, ssl_context=client_context, server_hostname="localhost") as client:
            connection = OverStream(client)
            assert connection.get("/tls") == b"GET /tls "
            connection.close()
    assert told == ["https"]


def test_those_who_speak_http_to_it_are_sent_away():
    """They have the wrong port; it costs nobody else anything."""
    with WSGIServer(("127.0.0.1", 0), application, log=None) as server:
        server.start()
        with gsocket.create_connection(server.address) as conn:
            conn.sendall(b"GET / HTTP/1.1\r\nHost: h\r\n\r\n")
            conn.settimeout(LATE)
            answer = b""
            while piece := conn.recv(4096):
                answer += piece
        assert b"HTTP" not in answer
        with geyamux.connect(server.address) as client:
            connection = OverStream(client)
            assert connection.get() == b"GET / "
            connection.close()


def test_a_certificate_for_the_wrong_name_is_refused():
    """By the client; the server serves on."""
    client_context, server_context = tls_contexts(ssl.TLSVersion.TLSv1_3)
    with WSGIServer(("127.0.0.1", 0), application, log=None, ssl_context=server_context) as server:
        server.start()
        with pytest.raises(ssl.SSLCertVerificationError):
            geyamux.connect(server.address, ssl_context=client_context, server_hostname="example.org")
        with geyamux.connect(server.address, ssl_context=client_context, server_hostname="localhost") as client:
            assert client.ping() > 0
