"""Sessions through a real HAProxy and a real nginx: idle ones, encrypted ones, many over several servers."""

from __future__ import annotations

import contextlib
import hashlib
import re
import time
from collections import Counter

import gevent
import pytest
from gevent import socket as gsocket
from gevent.ssl import SSLContext

import geyamux
from balancers import backends
from balancers.balancer import BALANCERS, missing
from balancers.service import PATIENCE, Service, read_proxy_line, wait_for_bytes
from balancers.trust import SERVER, certificate, client_context, server_context
from geyamux import Config

pytestmark = pytest.mark.interop

SILENT = Config(keepalive_interval=None)
#: How late a limit may be noticed on a busy machine, in seconds.
LATE = 1.0
#: What a session says that ended out of silence, and how long that has to be, in seconds.
SAID = r"the peer closed the connection without a GoAway, [12]\.\d s after it was last heard, and keepalive is off"
QUICK = 1.0
#: nginx sets a timer anew only where that moves it by 0.3 s.
EARLY = 0.35
SESSIONS = 30
SERVERS = 3


def present(name):
    reason = missing(name)
    if reason:
        pytest.skip(reason)
    return BALANCERS[name]


@pytest.fixture(params=sorted(BALANCERS))
def kind(request):
    return present(request.param)


@pytest.fixture
def both_kinds():
    return [present(name) for name in sorted(BALANCERS)]


@pytest.fixture(scope="module")
def three_servers():
    with backends.started(SERVERS) as servers:
        yield servers


@pytest.fixture
def end_of_test():
    """What is to be closed then."""
    with contextlib.ExitStack() as stack:
        yield stack


def directory(tmp_path, name):
    path = tmp_path / name
    path.mkdir()
    return path


# --- idle sessions ---


class Idler:
    """A session with one stream on which nothing passes, through a balancer of its own."""

    def __init__(self, stack, kind, path, idle, *, client=SILENT, server=SILENT, encrypted=False):
        self.idle = idle
        contexts = (None, None)
        if encrypted:
            contexts = server_context(certificate(SERVER)), client_context(certificate("agent.test"))
        self.service = stack.enter_context(Service(server, ssl_context=contexts[0]))
        balancer = stack.enter_context(kind(path, [self.service.port], idle=idle))
        self.session = stack.enter_context(connect(balancer, client, contexts[1]))
        self.stream = self.session.open()
        assert self.is_alive()
        self.began = time.monotonic()
        self.reader = gevent.spawn(self._read)

    def is_alive(self):
        self.stream.settimeout(PATIENCE)
        self.stream.sendall(b"hello\n")
        return self.stream.readline() == b"hello\n"

    def _read(self):
        """Wait for what never comes; return after how long that ended, and with which error."""
        self.stream.settimeout(None)
        try:
            return 0.0, self.stream.readline()
        except OSError as error:
            return time.monotonic() - self.began, error


def connect(balancer, config: Config = SILENT, context: SSLContext | None = None):
    return geyamux.connect(
        balancer.address, timeout=PATIENCE, ssl_context=context, server_hostname=context and SERVER, config=config
    )


def lives_and_dies(stack, kinds, tmp_path, idle, times, **more):
    """By keepalive, of either side, a session lives; without, the balancer ends it and both sides learn so."""
    asking = Config(keepalive_interval=idle / 5)
    alive, doomed = [], []
    for kind in kinds:
        for name, configs in {"client": {"client": asking}, "server": {"server": asking}}.items():
            path = directory(tmp_path, f"{kind.name}-{name}")
            alive.append(Idler(stack, kind, path, idle, **configs, **more))
        doomed.append(Idler(stack, kind, directory(tmp_path, f"{kind.name}-silent"), idle, **more))

    for idler in doomed:
        seconds, error = idler.reader.get(timeout=idle + PATIENCE)
        print(f"an idle session without keepalive lived {seconds:.2f} s of {idle} s: {error!r}")
        assert idle - EARLY < seconds < idle + LATE
        assert isinstance(error, geyamux.SessionError)
        assert re.search(SAID if idle > QUICK else "the peer closed the connection", str(error))
        assert idler.service.begun.get_nowait().join(LATE), "the server was not told"
        with pytest.raises(geyamux.SessionError, match="the peer closed the connection"):
            idler.session.open()

    longest = times * idle - (time.monotonic() - alive[0].began)
    ended = gevent.wait([idler.session for idler in alive], timeout=longest, count=1)
    assert not ended, [session.exception for session in ended]
    for idler in alive:
        idler.reader.kill()
        assert idler.is_alive()


@pytest.mark.slow
@pytest.mark.timeout(60)
def test_an_idle_session_lives_ten_times_as_long_as_a_balancer_lets_it_and_without_keepalive_it_dies(
    both_kinds, tmp_path, end_of_test
):
    lives_and_dies(end_of_test, both_kinds, tmp_path, idle=2.0, times=10)


def test_an_idle_session_over_tls_lives_and_dies_just_so(both_kinds, tmp_path, end_of_test):
    lives_and_dies(end_of_test, both_kinds, tmp_path, idle=0.8, times=5, encrypted=True)


# --- what passes ---


def test_mutual_tls_passes_through_from_end_to_end(kind, tmp_path):
    context = server_context(certificate(SERVER))
    body = bytes(range(256)) * 1000 + b"\n"
    with (
        Service(ssl_context=context) as service,
        kind(tmp_path, [service.port]) as balancer,
        connect(balancer, Config(), client_context(certificate("agent.test"))) as session,
    ):
        greenlets = [gevent.spawn(exchange, session, body) for _ in range(20)]
        gevent.joinall(greenlets, timeout=PATIENCE, raise_error=True)
        assert {greenlet.value for greenlet in greenlets} == {hashlib.sha256(body).digest()}
        there = service.begun.get(timeout=PATIENCE)
        assert ("DNS", "agent.test") in there.conn.getpeercert()["subjectAltName"]
        assert ("DNS", SERVER) in session.conn.getpeercert()["subjectAltName"]


def exchange(session, body):
    """Send it and half-close at the same time as it comes back; the digest of that."""
    with session.open() as stream:
        stream.settimeout(PATIENCE)
        sender = gevent.spawn(send, stream, body)
        digest = hashlib.sha256(stream.read()).digest()
        sender.get(timeout=PATIENCE)
    return digest


def send(stream, body):
    stream.sendall(body)
    stream.close_write()


def test_a_close_in_good_order_is_one_on_the_other_side_too_and_loses_nothing(kind, tmp_path):
    body = b"x" * 100_000 + b"\n"
    with Service() as service, kind(tmp_path, [service.port]) as balancer:
        session = connect(balancer, Config())
        stream = session.open()
        send(stream, body)
        there = service.begun.get(timeout=PATIENCE)
        began = time.monotonic()
        session.close()
        assert time.monotonic() - began < LATE
        assert there.join(LATE)
        assert stream.read() == body
        assert session.exception is None
        assert there.exception is None


def test_the_proxy_protocol_tells_the_server_who_the_client_is_and_what_came_with_it_is_not_lost(kind, tmp_path):
    with contextlib.closing(gsocket.socket()) as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        listener.settimeout(PATIENCE)
        with kind(tmp_path, [listener.getsockname()[1]], proxy_protocol=True) as balancer:
            client = connect(balancer)
            with client, client.open() as stream:
                stream.sendall(b"hello\n")
                stream.flush()
                conn, _ = listener.accept()
                host, port = client.getsockname()
                expected = f"PROXY TCP4 {host} 127.0.0.1 {port} {balancer.port}".encode()
                wait_for_bytes(conn, len(expected + b"\r\n"))
                line, rest = read_proxy_line(conn)
                assert line == expected
                assert rest
                with geyamux.Server(conn, initial=rest) as server:
                    assert server.accept(timeout=PATIENCE).readline() == b"hello\n"


# --- several servers ---


def ask_thirty(address):
    """That many sessions side by side, each asking on three streams; how many of them each server had."""
    with contextlib.ExitStack() as stack:
        sessions = [stack.enter_context(geyamux.connect(address, timeout=PATIENCE)) for _ in range(SESSIONS)]
        greenlets = [gevent.spawn(who_answers, session) for session in sessions]
        gevent.joinall(greenlets, timeout=PATIENCE, raise_error=True)
        return Counter(greenlet.value for greenlet in greenlets)


def who_answers(session):
    """The name of the one server that all streams of the session come to."""
    streams = [session.open() for _ in range(3)]
    names = set()
    for number, stream in enumerate(streams):
        stream.settimeout(PATIENCE)
        stream.sendall(b"stream %d\n" % number)
    for number, stream in enumerate(streams):
        name, _, echo = stream.readline().partition(b" ")
        assert echo == b"stream %d\n" % number
        stream.close()
        names.add(name.decode())
    (name,) = names
    return name


def test_sessions_spread_over_the_servers_and_each_stays_where_it_is(kind, tmp_path, three_servers):
    with kind(tmp_path, list(three_servers.ports.values())) as balancer:
        share = SESSIONS // SERVERS
        assert ask_thirty(balancer.address) == dict.fromkeys(three_servers.ports, share)


def test_processes_that_listen_on_the_same_port_share_the_sessions():
    with backends.sharing_a_port(SERVERS) as (port, servers):
        counts = ask_thirty(("127.0.0.1", port))
    assert counts.keys() == servers.ports.keys()
    assert counts.total() == SESSIONS
