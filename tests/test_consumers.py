"""Code that was written for sockets and files, unchanged, with a stream in its hands; both ends are real.

Every test runs over a stream opened by either side. What a consumer expects is left to the consumer: nothing
here knows how it uses the stream.
"""

from __future__ import annotations

import csv
import gzip
import http.client
import http.server
import io
import json
import pickle
import shutil
import socket
import socketserver
import tarfile
import wsgiref.simple_server
import xmlrpc.client
import xmlrpc.server
import zipfile
from collections.abc import Callable, Iterator
from typing import Any

import gevent
import pytest
from gevent import pywsgi

from support.links import stream_pair

LATE = 20.0

BIG = bytes(range(256)) * 4000
"""A megabyte: four windows."""


@pytest.fixture(params=["client", "server"])
def ends(request: pytest.FixtureRequest) -> Iterator[tuple[Any, Any]]:
    """The stream that one side opened, and the same stream as the other side accepted it."""
    with stream_pair("socketpair", swap=request.param == "server") as both:
        yield both


@pytest.fixture
def spawn() -> Iterator[Callable[..., gevent.Greenlet]]:
    """Run the other end in a greenlet; the test ends when it has, and fails if it did."""
    started = []

    def start(function: Callable[..., Any], *args: Any) -> gevent.Greenlet:
        started.append(gevent.spawn(function, *args))
        return started[-1]

    yield start
    for greenlet in started:
        greenlet.get(timeout=LATE)


# --- files ---


def test_pickle_reads_objects_one_after_the_other(ends, spawn):
    a, b = ends
    things = [1, "two", {"three": [4.0]}, BIG, bytearray(BIG), None]

    def write():
        for thing in things:
            pickle.dump(thing, a, protocol=5)
        a.close()

    spawn(write)
    assert [pickle.load(b) for _ in things] == things
    with pytest.raises(EOFError):
        pickle.load(b)


def test_pickle_of_a_stream_that_dribbles_is_whole(ends, spawn):
    a, b = ends
    data = pickle.dumps(list(range(300)))

    def write():
        for number in range(len(data)):
            a.send(data[number : number + 1])
            a.flush()

    spawn(write)
    assert pickle.load(b) == list(range(300))


def test_json_lines_are_a_conversation(ends, spawn):
    a, b = ends

    def answer():
        for line in b:
            request = json.loads(line)
            b.write(json.dumps({"answer": request["question"] * 2}).encode() + b"\n")
        b.close()

    spawn(answer)
    for number in range(20):
        a.write(json.dumps({"question": number}).encode() + b"\n")
        assert json.loads(a.readline()) == {"answer": number * 2}
    a.shutdown(socket.SHUT_WR)
    assert a.readline() == b""


def test_csv_goes_through_text_files(ends, spawn):
    a, b = ends
    rows = [["name", "colour"], ["leaf", "grün"], ["a,b", 'say "hi"\nthere']]

    def write():
        with a.makefile("w", encoding="utf-8", newline="") as file:
            csv.writer(file).writerows(rows)
        a.close()

    spawn(write)
    with b.makefile("r", encoding="utf-8", newline="") as file:
        assert list(csv.reader(file)) == rows


def test_a_text_wrapper_around_a_stream_talks_line_by_line(ends, spawn):
    a, b = ends

    def answer():
        with io.TextIOWrapper(b, encoding="utf-8", write_through=True) as text:
            for line in text:
                text.write(line.upper())

    spawn(answer)
    text = io.TextIOWrapper(a, encoding="utf-8", write_through=True)
    for word in ("grün\n", "blau\n"):
        text.write(word)
        assert text.readline() == word.upper()
    # Detached, so that the wrapper does not close what it was given.
    assert text.detach() is a
    a.close()


def test_copyfileobj_copies_to_the_end_and_back(ends, spawn):
    a, b = ends

    def echo():
        shutil.copyfileobj(b, b)
        b.close()

    def send():
        shutil.copyfileobj(io.BytesIO(BIG), a)
        a.shutdown(socket.SHUT_WR)

    spawn(echo)
    spawn(send)
    target = io.BytesIO()
    shutil.copyfileobj(a, target)
    assert target.getvalue() == BIG


@pytest.mark.parametrize("compression", ["", "gz"])
def test_tar_archives_stream_in_both_directions(ends, spawn, compression):
    a, b = ends
    files = {"small": b"x", "empty": b"", "big": BIG}

    def write():
        with tarfile.open(fileobj=a, mode=f"w|{compression}") as archive:
            for name, content in files.items():
                member = tarfile.TarInfo(name)
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
        a.close()

    spawn(write)
    found = {}
    with tarfile.open(fileobj=b, mode=f"r|{compression}") as archive:
        for member in archive:
            content = archive.extractfile(member)
            assert content is not None
            found[member.name] = content.read()
    assert found == files


@pytest.mark.parametrize("through", ["stream", "makefile"])
def test_a_zip_archive_is_written_without_seeking(ends, spawn, through):
    a, b = ends

    def write():
        target = a.makefile("wb") if through == "makefile" else a
        with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("big", BIG)
            archive.writestr("small", b"x")
        target.close()
        a.close()

    spawn(write)
    with zipfile.ZipFile(io.BytesIO(b.read())) as archive:
        assert archive.testzip() is None
        assert archive.read("big") == BIG
        assert archive.read("small") == b"x"


@pytest.mark.parametrize("through", ["stream", "makefile"])
def test_gzip_compresses_into_and_out_of_a_stream(ends, spawn, through):
    a, b = ends

    def write():
        target = a.makefile("wb") if through == "makefile" else a
        with gzip.GzipFile(fileobj=target, mode="wb") as file:
            file.write(BIG)
        target.close()
        a.close()

    spawn(write)
    source = b.makefile("rb") if through == "makefile" else b
    with source, gzip.GzipFile(fileobj=source) as file:
        assert file.read() == BIG


def test_a_buffered_reader_around_a_raw_file_talks_line_by_line(ends, spawn):
    a, b = ends

    def answer():
        raw = b.makefile("rwb", buffering=0)
        with io.BufferedReader(raw) as reader:
            while line := reader.readline():
                raw.write(line[::-1])
        b.close()

    spawn(answer)
    a.write(b"abc\n")
    assert a.read(4) == b"\ncba"
    a.write(b"def\n")
    assert a.read(4) == b"\nfed"
    a.close()


# --- servers' handlers, clients' connections ---


class Echo(socketserver.StreamRequestHandler):
    timeout = LATE

    def handle(self):
        for line in self.rfile:
            self.wfile.write(b"echo " + line)


class Files(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        self.send_response(200)
        self.send_header("Content-Length", str(len(BIG)))
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(BIG)

    def do_PUT(self):
        answer = b"%d" % len(self.rfile.read(int(self.headers["Content-Length"])))
        self.send_response(200)
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, *args):
        """Say nothing."""


def serve(handler: Callable[..., Any], stream: Any, server: Any = None) -> None:
    """What socketserver does with an accepted connection."""
    try:
        handler(stream, ("127.0.0.1", 0), server)
    finally:
        socketserver.TCPServer.shutdown_request(_Requests, stream)  # type: ignore[arg-type]


class _Requests:
    """The part of a socketserver that ends a request: a half-close, then a close."""

    close_request = staticmethod(lambda request: request.close())


def connection(stream: Any) -> http.client.HTTPConnection:
    """An HTTP connection that has its socket already."""
    found = http.client.HTTPConnection("127.0.0.1", timeout=LATE)
    found.sock = stream
    return found


def test_a_socketserver_handler_serves_a_stream(ends, spawn):
    a, b = ends
    spawn(serve, Echo, b)
    a.sendall(b"one\ntwo\n")
    a.shutdown(socket.SHUT_WR)
    assert a.read() == b"echo one\necho two\n"


def test_http_client_and_server_keep_a_connection(ends, spawn):
    a, b = ends
    spawn(serve, Files, b)
    http_connection = connection(a)
    for _ in range(3):
        http_connection.request("GET", "/")
        assert http_connection.getresponse().read() == BIG
        http_connection.request("PUT", "/", body=BIG)
        assert int(http_connection.getresponse().read()) == len(BIG)
    http_connection.close()


def test_http_client_reads_the_whole_body_of_a_connection_that_closes(ends, spawn):
    a, b = ends
    spawn(serve, Files, b)
    http_connection = connection(a)
    http_connection.request("GET", "/", headers={"Connection": "close"})
    response = http_connection.getresponse()
    # The connection has let go of the socket by now; the response still reads from it.
    assert http_connection.sock is None
    assert response.read() == BIG
    assert a.closed


def test_http_client_reads_a_body_that_only_the_end_ends(ends, spawn):
    a, b = ends

    def serve_http_1_0():
        with b.makefile("rb") as requests:
            while requests.readline().strip():
                pass
        b.sendall(b"HTTP/1.0 200 OK\r\n\r\n" + BIG)
        b.close()

    spawn(serve_http_1_0)
    http_connection = connection(a)
    http_connection.request("GET", "/")
    with http_connection.getresponse() as response:
        assert response.read() == BIG


def test_an_http_client_learns_that_a_body_was_cut_off(ends, spawn):
    a, b = ends

    def serve_half():
        b.recv(65536)
        b.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nhalf")
        b.reset()

    spawn(serve_half)
    http_connection = connection(a)
    http_connection.request("GET", "/")
    with pytest.raises((ConnectionResetError, http.client.HTTPException)):
        http_connection.getresponse().read()
    http_connection.close()


def application(environ: dict[str, Any], start_response: Callable[..., Any]) -> list[bytes]:
    """Answer with what was asked for and sent."""
    body = environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
    answer = f"{environ['REQUEST_METHOD']} {environ['PATH_INFO']} {len(body)} ".encode() + body
    start_response("200 OK", [("Content-Type", "text/plain"), ("Content-Length", str(len(answer)))])
    return [answer[:10], answer[10:]]


def test_a_wsgiref_handler_serves_a_stream(ends, spawn):
    a, b = ends

    class Handler(wsgiref.simple_server.WSGIRequestHandler):
        def log_message(self, *args):
            """Say nothing."""

        def address_string(self):
            return "127.0.0.1"

    class Server:
        def __init__(self):
            self.base_environ = {"SERVER_NAME": "127.0.0.1", "SERVER_PORT": "0"}

        def get_app(self):
            return application

    spawn(serve, Handler, b, Server())
    http_connection = connection(a)
    http_connection.request("POST", "/path", body=BIG)
    assert http_connection.getresponse().read() == f"POST /path {len(BIG)} ".encode() + BIG
    http_connection.close()


@pytest.fixture
def wsgi_server() -> pywsgi.WSGIServer:
    """A server of gevent that listens nowhere: it handles what it is given."""
    server = pywsgi.WSGIServer(("127.0.0.1", 0), application, log=None)
    server.set_environ({"SERVER_NAME": "127.0.0.1", "SERVER_PORT": "0"})
    return server


def test_pywsgi_serves_a_stream_and_keeps_it(ends, spawn, wsgi_server):
    a, b = ends
    spawn(wsgi_server.handle, b, ("127.0.0.1", 1))
    http_connection = connection(a)
    for number in range(3):
        http_connection.request("PUT", f"/{number}", body=BIG)
        assert http_connection.getresponse().read() == f"PUT /{number} {len(BIG)} ".encode() + BIG
    http_connection.close()


def test_pywsgi_closes_a_stream_when_it_is_told_to(ends, spawn, wsgi_server):
    a, b = ends
    spawn(wsgi_server.handle, b, ("127.0.0.1", 1))
    a.sendall(b"GET /x HTTP/1.1\r\nHost: h\r\nConnection: close\r\n\r\n")
    assert a.read().endswith(b"\r\n\r\nGET /x 0 ")


def test_pywsgi_answers_in_chunks_with_the_buffer_that_it_reuses(ends, spawn, wsgi_server):
    a, b = ends

    def chunks(environ, start_response):
        start_response("200 OK", [("Content-Type", "text/plain")])
        for number in range(200):
            yield bytes([number]) * number * 50

    wsgi_server.application = chunks
    spawn(wsgi_server.handle, b, ("127.0.0.1", 1))
    http_connection = connection(a)
    http_connection.request("GET", "/")
    expected = b"".join(bytes([number]) * number * 50 for number in range(200))
    assert http_connection.getresponse().read() == expected
    http_connection.close()


def test_pywsgi_is_quiet_about_a_peer_that_leaves(ends, spawn, wsgi_server, capsys):
    a, b = ends

    def endless(environ, start_response):
        start_response("200 OK", [("Content-Type", "text/plain")])
        while True:
            yield bytes(65536)

    wsgi_server.application = endless
    spawn(wsgi_server.handle, b, ("127.0.0.1", 1))
    a.sendall(b"GET / HTTP/1.1\r\nHost: h\r\n\r\n")
    assert a.recv(100).startswith(b"HTTP/1.1 200 OK\r\n")
    a.reset()
    gevent.idle()
    assert "Traceback" not in capsys.readouterr().err


class StreamTransport(xmlrpc.client.Transport):
    """XML-RPC over a connection that is there already."""

    def __init__(self, stream: Any) -> None:
        super().__init__()
        self.stream = stream

    def make_connection(self, host: Any) -> http.client.HTTPConnection:
        if self._connection[1] is None:  # type: ignore[has-type]
            self._connection = host, connection(self.stream)
        return self._connection[1]  # type: ignore[return-value]


def test_xmlrpc_calls_functions_through_a_stream(ends, spawn):
    a, b = ends

    class Handler(xmlrpc.server.SimpleXMLRPCRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *args):
            """Say nothing."""

    dispatcher = xmlrpc.server.SimpleXMLRPCDispatcher()
    dispatcher.logRequests = False  # type: ignore[attr-defined]
    dispatcher.register_function(divmod)
    spawn(serve, Handler, b, dispatcher)
    with xmlrpc.client.ServerProxy("http://127.0.0.1", transport=StreamTransport(a)) as proxy:
        assert proxy.divmod(17, 5) == [3, 2]
        assert proxy.divmod(9, 2) == [4, 1]
