"""gunicorn with gevent workers in front of a backend: a session for each worker, a stream for each request."""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import json
import signal
import socket
import subprocess
import sys

import gevent
import pytest
from gevent.event import Event

import geyamux
from geyamux.server import StreamServer

pytest.importorskip("gunicorn", reason="needs gunicorn (pip install gunicorn)")

from support.waiting import wait_for
from workers.fleet import PATIENCE, ROOT, Backend, Callers, ask, connection, dial, gunicorn

pytestmark = [pytest.mark.interop, pytest.mark.timeout(60)]

APPLICATION = "gunicorn_backend:application"
BIG = bytes(range(256)) * 8192
"""Two mebibytes: eight windows."""


def hello(environ, start_response):
    start_response("200 OK", [("Content-Type", "text/plain")])
    return [b"hello\n"]


def mirror(environ, start_response):
    """Tell what came, with a status and headers that nobody else uses."""
    told = {key: value for key, value in environ.items() if isinstance(value, str)}
    body = json.dumps(told).encode()
    headers = [("Content-Length", str(len(body))), ("Set-Cookie", "a=1"), ("Set-Cookie", "b=2"), ("X-Odd", "grün")]
    start_response("299 Quite Odd", headers)
    return [body]


def echo(environ, start_response):
    """Give back what comes, as it comes."""
    start_response("200 OK", [("Content-Type", "application/octet-stream")])
    while piece := environ["wsgi.input"].read(65536):
        yield piece


def digest(environ, start_response):
    sha = hashlib.sha256()
    while piece := environ["wsgi.input"].read(65536):
        sha.update(piece)
    start_response("200 OK", [("Content-Length", "64")])
    return [sha.hexdigest().encode()]


def test_each_worker_keeps_one_session_and_each_request_is_a_stream_of_it(tmp_path):
    with Backend(hello) as backend:
        with gunicorn(tmp_path / "log", APPLICATION, BACKEND=backend.address) as front:
            callers = Callers(lambda: ask(front.port, "/"))
            callers.wait_until(lambda: len(backend.streams) == 2, "a session for each worker")
            there = callers.answered
            callers.wait_until(lambda: callers.answered >= there + 50, "more answers")
            callers.stop()
            assert len(backend.streams) == 2
            numbers = list(backend.streams.values())
            assert sum(map(len, numbers)) == callers.answered
            assert all(len(set(ids)) == len(ids) for ids in numbers)
            assert ask(front.port, "/").body == b"hello\n"
            front.signal(signal.SIGTERM)
            assert front.wait() == 0
        for session in backend.streams:
            assert session.join(PATIENCE)
            assert session.exception is None
        assert front.log() == ""
        assert backend.errors.getvalue() == ""


def test_status_and_headers_and_target_are_kept(tmp_path):
    with Backend(mirror) as backend, gunicorn(tmp_path / "log", APPLICATION, "-w1", BACKEND=backend.address) as front:
        answer = ask(front.port, "/a%2Fb//c?x=1&y=%20%C3%BC", headers={"X-Own": "value", "Host": "shop.example"})
        assert (answer.status, answer.reason) == (299, "Quite Odd")
        assert answer.headers.get_all("Set-Cookie") == ["a=1", "b=2"]
        assert answer.headers["X-Odd"] == "grün"
        assert len(answer.headers.get_all("Date")) == 1
        told = json.loads(answer.body)
        assert told["QUERY_STRING"] == "x=1&y=%20%C3%BC"
        assert told["PATH_INFO"] == "/a/b//c"
        assert told["HTTP_X_OWN"] == "value"
        assert told["HTTP_HOST"] == "shop.example"
        assert told["REQUEST_METHOD"] == "GET"

        answer = ask(front.port, "/", "HEAD")
        assert (answer.status, answer.body) == (299, b"")
        assert int(answer.headers["Content-Length"]) > 0
        assert ask(front.port, "/", "DELETE").status == 299
        assert front.log() == ""


@pytest.mark.parametrize("headers", [{"Content-Length": str(len(BIG))}, {}], ids=["length", "chunks"])
def test_both_bodies_are_passed_on_as_they_come(tmp_path, headers):
    came_back = Event()

    def pieces():
        yield BIG[:65536]
        assert came_back.wait(PATIENCE), "nothing came back of the first piece"
        for start in range(65536, len(BIG), 65536):
            yield BIG[start : start + 65536]

    with Backend(echo) as backend, gunicorn(tmp_path / "log", APPLICATION, "-w1", BACKEND=backend.address) as front:
        with connection(dial(front.port)) as client:
            uploading = gevent.spawn(client.request, "POST", "/", body=pieces(), headers=headers)
            response = http.client.HTTPResponse(client.sock, method="POST")
            response.begin()
            body = response.read(1)
            came_back.set()
            body += response.read()
            uploading.get(timeout=PATIENCE)
            response.close()
        assert response.status == 200
        assert body == BIG
        # The connection that carried a body before carries another one.
        with connection(dial(front.port)) as client:
            for _ in range(2):
                client.request("PUT", "/", body=b"again", headers={"Expect": "100-continue"})
                assert client.getresponse().read() == b"again"
        assert front.log() == ""


def test_a_client_that_leaves_in_the_middle_of_its_upload_is_no_end_of_it(tmp_path):
    outcome: list[object] = []

    def swallow(environ, start_response):
        try:
            outcome.append(environ["wsgi.input"].read())
        except Exception as error:
            outcome.append(error)
            raise
        start_response("200 OK", [])
        return []

    with Backend(swallow) as backend, gunicorn(tmp_path / "log", APPLICATION, "-w1", BACKEND=backend.address) as front:
        with contextlib.closing(dial(front.port)) as sock:
            sock.sendall(b"POST / HTTP/1.1\r\nHost: h\r\nContent-Length: 1000\r\n\r\nhalf")
            wait_for(lambda: backend.streams, "the request at the backend")
        wait_for(lambda: outcome, "the end of it at the backend")
        assert isinstance(outcome[0], geyamux.StreamReset)


class Faults:
    """A backend that goes wrong in the way that the request's path says."""

    def __init__(self):
        self.asked = 0

    def serve(self):
        server = StreamServer(("127.0.0.1", 0), self.handle)
        server.start()
        return server

    def handle(self, stream, address):
        self.asked += 1
        with stream.makefile("rb") as requests:
            path = requests.readline().split()[1].decode().strip("/")
            while requests.readline().strip():
                pass
        getattr(self, path)(stream)

    def fine(self, stream):
        stream.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nfine")

    def reset(self, stream):
        stream.reset()

    def nothing(self, stream):
        """Just the end."""

    def nonsense(self, stream):
        stream.sendall(b"\0\1\2 what is this?\r\n\r\n")

    def silent(self, stream):
        stream.read()

    def short(self, stream):
        stream.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nhalf")

    def torn(self, stream):
        stream.sendall(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n4\r\nhalf\r\n")

    def stalls(self, stream):
        self.short(stream)
        stream.read()


def test_what_goes_wrong_at_the_backend_is_told_to_the_client(tmp_path):
    faults = Faults()
    with (
        faults.serve() as backend,
        gunicorn(
            tmp_path / "log", APPLICATION, "-w1", BACKEND=f"127.0.0.1:{backend.server_port}", BACKEND_TIMEOUT="0.5"
        ) as front,
    ):
        for path, status in [("reset", 502), ("nothing", 502), ("nonsense", 502), ("silent", 504), ("fine", 200)]:
            assert (path, ask(front.port, f"/{path}").status) == (path, status)
        for path in ("short", "torn", "stalls"):
            with pytest.raises((http.client.IncompleteRead, ConnectionResetError)):
                ask(front.port, f"/{path}")
        assert ask(front.port, "/fine").body == b"fine"
        # Nothing is tried twice.
        assert faults.asked == 9
        # The session is not to blame for its streams.
        assert len(backend.sessions) == 1
        said = front.log().splitlines()
        assert len(said) == 7, said
        assert all(line.startswith("backend: ") for line in said), said


def test_a_new_session_is_made_when_the_old_one_has_ended_or_takes_no_more(tmp_path):
    begun, released = Event(), Event()

    def wait(environ, start_response):
        if environ["PATH_INFO"] == "/slow":
            begun.set()
            assert released.wait(PATIENCE)
        return hello(environ, start_response)

    with Backend(wait) as backend, gunicorn(tmp_path / "log", APPLICATION, "-w1", BACKEND=backend.address) as front:
        assert ask(front.port, "/").status == 200
        [first] = backend.streams

        # It broke: the next request has a new one.
        first.abort()
        wait_for(first.ready, "the end of the session")
        callers = Callers(lambda: ask(front.port, "/").status in (200, 502), number=1)
        callers.wait_until(lambda: len(backend.streams) == 2, "another session")
        callers.stop()
        second = next(reversed(backend.streams))

        # It takes no more: what is open goes on, everything else goes over a new one.
        slow = gevent.spawn(ask, front.port, "/slow")
        assert begun.wait(PATIENCE)
        second.go_away()
        second.ping()
        assert ask(front.port, "/").status == 200
        assert len(backend.streams) == 3
        assert not second.closed
        released.set()
        assert slow.get(timeout=PATIENCE).status == 200
        assert second.join(PATIENCE)
        assert second.exception is None
        assert ask(front.port, "/").status == 200
        assert len(backend.streams) == 3


def test_no_backend_is_a_bad_gateway_until_there_is_one(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as nobody:
        address = nobody.getsockname()
    with gunicorn(tmp_path / "log", APPLICATION, "-w1", BACKEND=f"127.0.0.1:{address[1]}") as front:
        assert ask(front.port, "/").status == 502
        program = [sys.executable, "gunicorn_backend.py", str(address[1])]
        environment = {"PYTHONPATH": str(ROOT)}
        with subprocess.Popen(program, cwd=ROOT / "examples", env=environment, stdout=subprocess.PIPE) as backend:
            try:
                assert backend.stdout.readline() == b"listening on port %d\n" % address[1]
                answer = ask(front.port, "/shout", "POST", body=b"hello\nthere\n")
            finally:
                backend.terminate()
        assert (answer.status, answer.body) == (200, b"HELLO\nTHERE\n")


def test_a_graceful_reload_loses_no_request(tmp_path):
    body = BIG[:300000]
    expected = hashlib.sha256(body).hexdigest().encode()

    def upload():
        answer = ask(front.port, "/", "POST", body=body)
        assert (answer.status, answer.body) == (200, expected)

    with Backend(digest) as backend, gunicorn(tmp_path / "log", APPLICATION, BACKEND=backend.address) as front:
        callers = Callers(upload)
        callers.wait_until(lambda: len(backend.streams) == 2, "a session for each worker")
        old = set(backend.streams)
        front.signal(signal.SIGHUP)
        callers.wait_until(lambda: not old & backend.living() and len(backend.living()) == 2, "two new workers")
        callers.stop()
        assert {session.exception for session in old} == {None}
        assert front.log() == ""
        assert backend.errors.getvalue() == ""


def test_workers_that_retire_lose_no_request(tmp_path):
    def check_hello():
        assert ask(front.port, "/").body == b"hello\n"

    with (
        Backend(hello) as backend,
        gunicorn(tmp_path / "log", APPLICATION, "--max-requests", "10", BACKEND=backend.address) as front,
    ):
        callers = Callers(check_hello)
        callers.wait_until(lambda: len(backend.streams) >= 5, "more workers")
        callers.stop()
        ended = [session.exception for session in backend.streams if session.closed]
        assert len(ended) >= 2
        assert set(ended) == {None}
        assert front.log() == ""
        assert backend.errors.getvalue() == ""
