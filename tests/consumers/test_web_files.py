"""Of code for sockets what tests/test_consumers.py has not: gunicorn's parser, an application that keeps its environ, and
what needs a descriptor and must say so: ``select``, selectors, asyncio, multiprocessing.
"""

from __future__ import annotations

import asyncio
import io
import multiprocessing.connection
import multiprocessing.reduction
import select
import selectors

import gevent
import gevent.select
import gevent.selectors
import pytest

from geyamux.pywsgi import WSGIServer
from support.links import sessions, stream_pair

LATE = 10.0
BIG = bytes(range(256)) * 4000


@pytest.fixture(params=["client", "server"])
def ends(request):
    with stream_pair("socketpair", swap=request.param == "server") as both:
        yield both


# --- gunicorn's own ---


@pytest.mark.interop
@pytest.mark.parametrize("version", ["1.1", "1.0"])
def test_gunicorn_parses_requests_from_a_stream_and_answers_on_it(ends, version):
    config = pytest.importorskip("gunicorn.config", reason="needs gunicorn (pip install gunicorn)").Config()
    from gunicorn.http import RequestParser, wsgi

    a, b = ends

    def serve():
        answered = 0
        for request in RequestParser(config, b, ("127.0.0.1", 1)):
            response, environ = wsgi.create(request, b, ("127.0.0.1", 1), ("127.0.0.1", 80), config)
            body = environ["wsgi.input"].read()
            response.start_response("200 OK", [("X-Path", environ["PATH_INFO"])])
            for start in range(0, len(body), 10000):
                response.write(body[start : start + 10000])
            response.close()
            answered += 1
            if response.should_close():
                break
        b.close()
        return answered

    serving = gevent.spawn(serve)
    connection = "keep-alive" if version == "1.1" else "close"
    with a.makefile("rb") as answers:
        for number in range(2 if version == "1.1" else 1):
            head = f"POST /{number} HTTP/{version}\r\nConnection: {connection}\r\nContent-Length: {len(BIG)}\r\n\r\n"
            sending = gevent.spawn(a.sendall, head.encode() + BIG)
            assert answers.readline() == f"HTTP/{version} 200 OK\r\n".encode()
            headers = b"".join(iter(answers.readline, b"\r\n"))
            assert b"X-Path: /%d\r\n" % number in headers
            assert (chunks_of(answers) if version == "1.1" else answers.read()) == BIG
            sending.get(timeout=LATE)
    a.close()
    assert serving.get(timeout=LATE) == number + 1


def chunks_of(file):
    body = b""
    while size := int(file.readline(), 16):
        body += file.read(size)
        assert file.readline() == b"\r\n"
    assert file.readline() == b"\r\n"
    return body


# --- gevent's own ---


def test_a_stream_ends_with_its_request_whoever_keeps_the_environ():
    kept = []

    def application(environ, start_response):
        kept.append(environ)
        start_response("200 OK", [])
        return [b"the whole answer"]

    with sessions() as (client, server), WSGIServer(server, application, log=None) as serving:
        serving.start()
        with client.open() as stream:
            stream.settimeout(LATE)
            stream.sendall(b"GET / HTTP/1.0\r\n\r\n")
            assert stream.read().endswith(b"\r\n\r\nthe whole answer")


# --- what needs a descriptor ---


def run_asyncio(stream):
    async def receive():
        await asyncio.get_running_loop().sock_recv(stream, 1)

    stream.setblocking(False)
    try:
        asyncio.run(receive())
    finally:
        stream.setblocking(True)


@pytest.mark.parametrize(
    "use",
    [
        pytest.param(lambda stream: select.select([stream], [], [], 0), id="select.select"),
        pytest.param(lambda stream: gevent.select.select([stream], [], [], 0), id="gevent.select.select"),
        pytest.param(lambda stream: select.poll().register(stream), id="select.poll"),
        pytest.param(lambda stream: register(selectors.DefaultSelector, stream), id="selectors"),
        pytest.param(lambda stream: register(gevent.selectors.GeventSelector, stream), id="gevent.selectors"),
        pytest.param(lambda stream: multiprocessing.connection.wait([stream], 0), id="multiprocessing.connection.wait"),
        pytest.param(lambda stream: multiprocessing.connection.Connection(stream.fileno()), id="Connection"),
        pytest.param(run_asyncio, id="asyncio"),
    ],
)
def test_what_needs_a_descriptor_is_told_so_at_once_and_the_stream_is_whole(ends, use):
    a, b = ends
    with pytest.raises((io.UnsupportedOperation, ValueError)) as caught:
        use(a)
    told = [caught.value, caught.value.__context__, caught.value.__cause__]
    assert any("a stream has no descriptor" in str(error) for error in told), told
    b.sendall(b"not torn")
    assert a.recv(100) == b"not torn"
    assert a.gettimeout() is None


def register(selector_class, stream):
    with selector_class() as selector:
        selector.register(stream, selectors.EVENT_READ)


def test_a_stream_is_not_passed_to_another_process(ends):
    with pytest.raises(TypeError, match="cannot pickle"):
        multiprocessing.reduction.ForkingPickler.dumps(ends[0])


def test_gevent_wait_does_for_streams_what_select_does_for_descriptors():
    with sessions() as (client, server):
        mine = [client.open() for _ in range(3)]
        theirs = [server.accept(timeout=LATE) for _ in mine]
        assert gevent.wait(mine, timeout=0) == []
        theirs[1].sendall(b"x")
        assert gevent.wait(mine, timeout=LATE, count=1) == [mine[1]]
        assert mine[1].recv(10) == b"x"
        theirs[2].close()
        assert gevent.wait(mine, timeout=LATE, count=1) == [mine[2]]
        assert mine[2].recv(10) == b""
