"""https through a stream: TLS from the client to the web server behind the other end, which nobody between can read."""

from __future__ import annotations

import contextlib

import gevent
import pytest
from gevent import pywsgi
from gevent import socket as gsocket

from geyamux.server import StreamServer
from support.links import authority, sessions, tls_contexts
from webclients.backend import KINDS, PIECE

requests = pytest.importorskip("requests", reason="needs requests (pip install requests)")

import ssl  # noqa: E402

import trustme  # noqa: E402
from urllib3.exceptions import InsecureRequestWarning  # noqa: E402

from geyamux.requests import YamuxAdapter  # noqa: E402

pytestmark = pytest.mark.interop

BIG = PIECE * 64


def application(environ, start_response):
    body = environ["wsgi.input"].read() or environ["wsgi.url_scheme"].encode()
    if environ["PATH_INFO"] == "/absolute":
        start_response("302 Found", [("Location", f"https://{environ['HTTP_HOST']}/landed"), ("Content-Length", "0")])
        return [b""]
    start_response("200 OK", [("Content-Length", str(len(body)))])
    return [body]


def copy(source, target):
    with contextlib.suppress(OSError):
        while data := source.recv(65536):
            target.sendall(data)
        target.shutdown(gsocket.SHUT_WR)


def relay(port):
    """A handler that connects streams to the port."""

    def handle(stream, address):
        with gsocket.create_connection(("127.0.0.1", port)) as sock:
            gevent.joinall([gevent.spawn(copy, stream, sock), gevent.spawn(copy, sock, stream)])

    return handle


@contextlib.contextmanager
def https_backend(kind, context):
    """A client session behind whose other end every stream leads to a web server with TLS."""
    with (
        pywsgi.WSGIServer(("127.0.0.1", 0), application, log=None, error_log=None, ssl_context=context) as web_server,
        sessions(kind) as (client, server),
    ):
        web_server.start()
        with StreamServer(server, relay(web_server.server_port)) as streams:
            streams.start()
            yield client
            client.abort()


@pytest.fixture
def trusted(tmp_path):
    """The file with the certificate of the authority of this run."""
    path = tmp_path / "ca.pem"
    authority().cert_pem.write_to_path(str(path))
    return str(path)


@pytest.fixture
def client():
    with https_backend("socketpair", tls_contexts(ssl.TLSVersion.TLSv1_3)[1]) as client:
        yield client


@pytest.fixture
def http(client):
    with requests.Session() as http:
        http.mount("https://", YamuxAdapter(client))
        yield http


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
@pytest.mark.parametrize("scheme", ["https", "https+yamux"])
def test_a_verified_server_answers_and_its_stream_is_used_again(kind, version, scheme, trusted):
    with https_backend(kind, tls_contexts(version)[1]) as client, requests.Session() as http:
        http.mount(f"{scheme}://localhost/", YamuxAdapter(client))
        for body in (b"", b"some", BIG):
            assert http.post(f"{scheme}://localhost/", data=body, verify=trusted).content == (body or b"https")
        assert client.stats().opened == 1


def test_a_certificate_of_an_unknown_authority_is_refused(http, client):
    with pytest.raises(requests.exceptions.SSLError, match="CERTIFICATE_VERIFY_FAILED"):
        http.get("https://localhost/")
    assert client.stats().opened == 1


def test_a_certificate_for_another_host_is_refused(http, trusted):
    with pytest.raises(requests.exceptions.SSLError, match=r"doesn't match|not valid for 'backend'"):
        http.get("https://backend/", verify=trusted)


def test_a_failed_handshake_leaves_no_stream_behind(http, client):
    for _ in range(3):
        with pytest.raises(requests.exceptions.SSLError):
            http.get("https://localhost/")
    with gevent.Timeout(10):
        while client.num_streams:
            gevent.sleep(0.001)


def test_unverified_is_possible_and_warned_about_as_ever(http):
    with pytest.warns(InsecureRequestWarning):
        assert http.get("https://backend/", verify=False).text == "https"


def test_a_redirect_to_https_and_the_same_host_leads_back_into_the_session(client, trusted):
    with requests.Session() as http:
        http.mount("https+yamux://", YamuxAdapter(client))
        response = http.get("https+yamux://localhost/absolute", verify=trusted)
        assert (response.url, response.text) == ("https+yamux://localhost/landed", "https")


def test_a_handshake_that_is_not_answered_ends_at_the_connect_timeout():
    with sessions() as (client, server), requests.Session() as http:
        http.mount("https://", YamuxAdapter(client))
        with pytest.raises(requests.Timeout):
            http.get("https://localhost/", timeout=(0.05, 10))
        with server.accept(timeout=10) as stream:
            assert stream.recv(1) == b"\x16"  # a record of the handshake


def test_a_client_shows_its_certificate(tmp_path, trusted):
    context = gevent.ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority().issue_cert("localhost").configure_cert(context)
    context.verify_mode = ssl.CERT_REQUIRED
    clients = trustme.CA()
    clients.configure_trust(context)
    clients.issue_cert("someone@example.org").private_key_and_cert_chain_pem.write_to_path(str(tmp_path / "me.pem"))
    with https_backend("socketpair", context) as client, requests.Session() as http:
        http.mount("https://", YamuxAdapter(client))
        url = "https://localhost/"
        assert http.get(url, verify=trusted, cert=str(tmp_path / "me.pem")).text == "https"
        with pytest.raises(requests.ConnectionError):
            http.get(url, verify=trusted)
