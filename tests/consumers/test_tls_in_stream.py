"""TLS inside a stream: what works (anything over `wrap_bio`), and that `wrap_socket` can't, and says so."""

from __future__ import annotations

import http.server
import io
import ssl

import gevent
import gevent.ssl
import pytest

from consumers.tls_ends import TlsEnd
from geyamux import StreamReset
from support.links import authority, sessions, stream_pair

LATE = 20.0
BIG = bytes(range(256)) * 4096
"""A mebibyte: four windows."""


@pytest.fixture
def ends():
    with stream_pair("socketpair") as both:
        yield both


@pytest.fixture
def contexts():
    """A client's, that trusts our authority, and a server's. Of the standard library: nothing blocks over memory."""
    client, server = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT), ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority().configure_trust(client)
    authority().issue_cert("inside.example").configure_cert(server)
    return client, server


def both(client_stream, server_stream, contexts):
    """TLS on both ends; each handshake needs the other."""
    client, server = contexts
    accepting = gevent.spawn(TlsEnd, server_stream, server)
    near = TlsEnd(client_stream, client, server_hostname="inside.example")
    return near, accepting.get(timeout=LATE)


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3], ids=["1.2", "1.3"])
def test_tls_carries_bulk_both_ways_at_once_and_ends_cleanly(ends, contexts, version):
    for context in contexts:
        context.minimum_version = context.maximum_version = version
    near, far = both(*ends, contexts)
    assert near.tls.version() == version.name.replace("_", ".")
    assert near.tls.getpeercert()["subjectAltName"] == (("DNS", "inside.example"),)

    jobs = [gevent.spawn(end.sendall, BIG) for end in (near, far)]
    received = [gevent.spawn(take, end, len(BIG)) for end in (near, far)]
    gevent.joinall(jobs + received, timeout=LATE, raise_error=True)
    assert [job.value == BIG for job in received] == [True, True]

    ending = gevent.spawn(far.unwrap)
    near.unwrap()
    ending.get(timeout=LATE)
    # The stream below goes on.
    ends[0].sendall(b"in the clear")
    assert ends[1].recv(100) == b"in the clear"


def take(end, size):
    data = bytearray()
    while len(data) < size:
        data += end.recv(65536)
    return bytes(data)


def test_an_end_of_the_stream_is_no_end_of_tls(ends, contexts):
    near, far = both(*ends, contexts)
    near.sendall(b"half")
    ends[0].close()
    assert far.recv(100) == b"half"
    with pytest.raises(ssl.SSLEOFError):
        far.recv(100)


def test_a_reset_of_the_stream_passes_through_tls(ends, contexts):
    _, far = both(*ends, contexts)
    reading = gevent.spawn(take, far, 1)
    gevent.idle()
    ends[0].reset(7)
    with pytest.raises(StreamReset) as caught:
        reading.get(timeout=LATE)
    assert caught.value.code == 7


def test_a_timeout_of_the_stream_passes_through_tls_and_leaves_it_whole(ends, contexts):
    near, far = both(*ends, contexts)
    ends[0].settimeout(0.01)
    with pytest.raises(TimeoutError):
        near.recv(100)
    far.sendall(b"late")
    ends[0].settimeout(LATE)
    assert near.recv(100) == b"late"


def test_a_certificate_for_another_name_is_refused_and_both_ends_know(ends, contexts):
    client, server = contexts
    accepting = gevent.spawn(outcome_of, TlsEnd, ends[1], server)
    with pytest.raises(ssl.SSLCertVerificationError, match=r"another\.example"):
        TlsEnd(ends[0], client, server_hostname="another.example")
    ends[0].close()
    # In TLS 1.3 the server has finished its part by then, and hears of it at its first read.
    outcome = accepting.get(timeout=LATE)
    with pytest.raises(ssl.SSLError, match=r"(?i)alert"):
        raise outcome if isinstance(outcome, Exception) else outcome_of(outcome.recv, 1)


def outcome_of(function, *args):
    try:
        return function(*args)
    except Exception as error:
        return error


def test_a_server_may_ask_for_the_client_certificate(ends, contexts):
    client, server = contexts
    authority().issue_cert("agent-7.example").configure_cert(client)
    authority().configure_trust(server)
    server.verify_mode = ssl.CERT_REQUIRED
    near, far = both(*ends, contexts)
    near.sendall(b"it is me")
    assert far.recv(100) == b"it is me"
    assert far.tls.getpeercert()["subjectAltName"] == (("DNS", "agent-7.example"),)


# --- urllib3 ---


class ServerSide:
    """Of a context, what SSLTransport uses of it; as a server. (urllib3 itself is only ever the client.)"""

    def __init__(self, context):
        self._context = context

    def wrap_bio(self, incoming, outgoing, server_hostname):
        return self._context.wrap_bio(incoming, outgoing, server_side=True)


@pytest.fixture
def transport():
    return pytest.importorskip("urllib3.util.ssltransport", reason="needs urllib3 (pip install urllib3)").SSLTransport


@pytest.mark.interop
def test_ssltransport_of_urllib3_is_tls_over_a_stream_at_both_ends(ends, contexts, transport):
    client, server = contexts
    accepting = gevent.spawn(transport, ends[1], ServerSide(server))
    near = transport(ends[0], client, server_hostname="inside.example")
    far = accepting.get(timeout=LATE)

    def answer():
        with far, far.makefile("rb") as requests:
            for line in requests:
                far.sendall(line.upper())
            far.unwrap()

    answering = gevent.spawn(answer)
    with near, near.makefile("rwb") as file:
        for line in (b"one\n", BIG[:100000].replace(b"\n", b"") + b"\n"):
            file.write(line)
            file.flush()
            assert file.readline() == line.upper()
        near.unwrap()
    answering.get(timeout=LATE)
    # Closed with the last of its files.
    assert ends[0].closed
    assert ends[1].closed


@pytest.mark.interop
def test_urllib3_speaks_https_inside_streams_of_one_session(contexts, transport):
    urllib3 = pytest.importorskip("urllib3", reason="needs urllib3 (pip install urllib3)")
    client_context, server_context = contexts

    with sessions("socketpair") as (client, server):
        opened = []

        class Connection(urllib3.connection.HTTPSConnection):
            def connect(self):
                opened.append(client.open())
                self.sock = transport(opened[-1], client_context, server_hostname=self.host)
                self.is_verified = True

            @property
            def is_connected(self):
                # The original asks the descriptor whether the peer has closed a connection that should be idle.
                return self.sock is not None and not self.sock.socket.ready()

        def serve():
            for stream in server:
                gevent.spawn(serve_https, transport, stream, server_context)

        serving = gevent.spawn(serve)
        with urllib3.connectionpool.HTTPSConnectionPool("inside.example", maxsize=4) as pool:
            pool.ConnectionCls = Connection
            for size in (0, 10, len(BIG)):
                response = pool.request("POST", "/", body=BIG[:size], timeout=LATE, retries=False)
                assert response.status == 200
                assert response.data == BIG[:size]
            assert len(opened) == 1, "the connection was not kept"
            jobs = [gevent.spawn(pool.request, "POST", "/", body=b"%d" % n, retries=False) for n in range(4)]
            gevent.joinall(jobs, timeout=LATE, raise_error=True)
            assert [job.value.data for job in jobs] == [b"0", b"1", b"2", b"3"]
        serving.kill()


class Echo(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args):
        """Say nothing."""


def serve_https(transport, stream, context):
    with stream:
        Echo(transport(stream, ServerSide(context)), ("inside", 0), None)


# --- what needs a descriptor ---


@pytest.mark.parametrize("module", [ssl, gevent.ssl], ids=["ssl", "gevent.ssl"])
@pytest.mark.parametrize("server_side", [False, True], ids=["client", "server"])
def test_wrap_socket_says_that_a_stream_has_no_descriptor_and_leaves_it_whole(ends, module, server_side):
    a, b = ends
    context = module.SSLContext(ssl.PROTOCOL_TLS_SERVER if server_side else ssl.PROTOCOL_TLS_CLIENT)
    name = None if server_side else "inside.example"
    with pytest.raises(io.UnsupportedOperation, match="a stream has no descriptor"):
        context.wrap_socket(a, server_side=server_side, server_hostname=name)
    assert not a.closed
    b.sendall(b"not torn")
    assert a.recv(100) == b"not torn"
    a.sendall(b"at all")
    assert b.recv(100) == b"at all"
