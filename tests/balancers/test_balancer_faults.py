"""A balancer is reloaded, killed, hung, or has nobody behind it: what streams in flight are told, and what comes after.

What each error takes to come is printed: `pytest -s` shows it.
"""

from __future__ import annotations

import contextlib
import itertools
import signal
import time

import gevent
import pytest
from gevent.event import Event

import geyamux
from balancers import backends
from balancers.balancer import BALANCERS, missing
from balancers.reconnecting import Reconnecting
from balancers.service import PATIENCE, Service, ask
from geyamux import Config, KeepaliveTimeout, SessionClosed, SessionError, TransportError

pytestmark = pytest.mark.interop

#: Within what an end must be noticed that the system tells of, in seconds.
AT_ONCE = 1.0
ASKERS = 10
#: Lines of 60,000 bytes that have passed when what flows is cut.
BULK = 20
SERVERS = 3


@pytest.fixture(params=sorted(BALANCERS))
def kind(request):
    reason = missing(request.param)
    if reason:
        pytest.skip(reason)
    return BALANCERS[request.param]


class InFlight:
    """A session, and calls that wait in it: to read an answer, to write to somebody who does not read."""

    def __init__(self, session):
        self.session = session
        self.reader = self.stream_after(b"hello\n")
        self.writer = self.stream_after(b"hello\n")
        self.writer.sendall(b"hold\n")
        self.waiting = {
            "read": gevent.spawn(self._outcome, self.reader.readline),
            "write": gevent.spawn(self._outcome, self.writer.sendall, bytes(2_000_000)),
            "accept": gevent.spawn(self._outcome, session.accept),
        }
        session.ping(timeout=PATIENCE)
        self.began = time.monotonic()

    def stream_after(self, line):
        stream = self.session.open()
        stream.settimeout(PATIENCE)
        stream.sendall(line)
        assert stream.readline() == line
        stream.settimeout(None)
        return stream

    def _outcome(self, call, *args):
        """How long from now on it waited, and for what."""
        try:
            result = call(*args)
        except OSError as error:
            result = error
        return time.monotonic() - self.began, result

    def begin_bulk(self):
        """As much as passes goes to the server and back, without end; return in the middle of it."""
        stream = self.stream_after(b"hello\n")
        is_flowing = Event()
        self.waiting["bulk"] = gevent.spawn(self._outcome, self._send_without_end, stream, is_flowing)
        assert is_flowing.wait(PATIENCE)
        self.began = time.monotonic()

    def _send_without_end(self, stream, is_flowing):
        for count in itertools.count():
            stream.sendall(b"x" * 60_000 + b"\n")
            stream.readline()
            if count == BULK:
                is_flowing.set()

    def fails(self, within, *kinds):
        """All that waited end with such an error, and so does what is tried then; the longest time that took."""
        outcomes = {name: greenlet.get(timeout=within + PATIENCE) for name, greenlet in self.waiting.items()}
        for name, (seconds, error) in outcomes.items():
            assert isinstance(error, kinds), (name, error)
            assert seconds < within, (name, seconds)
        with pytest.raises(SessionError):
            self.session.open()
        assert self.session.join(within)
        print({name: f"after {seconds:.3f} s: {error!r}" for name, (seconds, error) in outcomes.items()})
        return max(seconds for seconds, _ in outcomes.values())

    def is_alive(self):
        """Nothing has ended, and what is asked is answered."""
        return not any(greenlet.ready() for greenlet in self.waiting.values()) and ask(self.session) == b"hello\n"


@contextlib.contextmanager
def in_flight(balancer, config=None):
    with geyamux.connect(balancer.address, timeout=PATIENCE, config=config) as session:
        flight = InFlight(session)
        try:
            yield flight
        finally:
            gevent.killall([*flight.waiting.values()])


def end_of(service):
    """The next session of the server, which has ended or is about to; why."""
    session = service.begun.get(timeout=PATIENCE)
    assert session.join(AT_ONCE), session
    return session.exception


# --- reloads ---


def test_a_reload_leaves_sessions_as_they_are_and_new_ones_come_through(kind, tmp_path):
    with Service() as service, kind(tmp_path, [service.port]) as balancer, in_flight(balancer) as before:
        balancer.reload()
        with in_flight(balancer) as after:
            assert after.is_alive()
            assert before.is_alive()
            before.session.close()
            assert end_of(service) is None
            assert after.is_alive()


def test_what_a_reload_ends_when_its_patience_is_over_is_told_so_and_asked_anew(kind, tmp_path):
    with Service() as service, kind(tmp_path, [service.port], grace=0.3) as balancer:
        client = Reconnecting(balancer.address)
        with contextlib.closing(client), in_flight(balancer) as before:
            assert client.ask(b"before\n") == b"before\n"
            first = client.session()
            balancer.reload()
            assert before.fails(AT_ONCE + 0.3, SessionClosed, TransportError) > 0.2
            assert first.join(AT_ONCE)
            with gevent.Timeout(PATIENCE):
                assert client.ask(b"after\n") == b"after\n"
            for _ in range(2):
                end_of(service)


# --- a balancer that dies, hangs, or has nobody behind it ---


def test_a_balancer_that_is_killed_is_noticed_at_once_on_both_sides(kind, tmp_path):
    with Service() as service, kind(tmp_path, [service.port]) as balancer, in_flight(balancer) as flight:
        flight.begin_bulk()
        balancer.kill()
        flight.fails(AT_ONCE, SessionClosed, TransportError)
        end_of(service)


def test_clients_that_dial_again_get_their_answers_when_the_balancer_is_back(kind, tmp_path):
    answers = []

    def go_on_asking(number):
        for count in range(20):
            line = b"%d of %d\n" % (count, number)
            assert client.ask(line) == line
            answers.append(line)
            if len(answers) == 5 * ASKERS:
                balancer.kill()
            gevent.sleep(0.005)

    with Service() as service, kind(tmp_path, [service.port]) as balancer:
        client = Reconnecting(balancer.address)
        with contextlib.closing(client):
            askers = [gevent.spawn(go_on_asking, number) for number in range(ASKERS)]
            service.begun.get(timeout=PATIENCE).join(PATIENCE)
            balancer.process.wait(PATIENCE)
            with gevent.Timeout(PATIENCE):
                while not any(isinstance(error, ConnectionRefusedError) for error in client.errors):
                    gevent.sleep(0.01)
            balancer.start()
            gevent.joinall(askers, timeout=PATIENCE, raise_error=True)
        assert len(answers) == 20 * ASKERS
        # None of what was in flight was taken for answered, and nothing ended in another way.
        assert all(isinstance(error, (SessionError, ConnectionError)) for error in client.errors), client.errors
        end_of(service)


def test_a_balancer_that_hangs_is_found_out_by_keepalive_on_both_sides(kind, tmp_path):
    config = Config(keepalive_interval=0.2, keepalive_timeout=0.3)
    with Service(config) as service, kind(tmp_path, [service.port]) as balancer, in_flight(balancer, config) as flight:
        with balancer.hung():
            assert flight.fails(0.5 + AT_ONCE, KeepaliveTimeout) > 0.3
            assert isinstance(end_of(service), KeepaliveTimeout)
        with gevent.Timeout(PATIENCE), geyamux.connect(balancer.address) as session:
            assert ask(session) == b"hello\n"


def test_where_nobody_is_behind_the_balancer_a_client_connects_and_its_session_ends_soon(kind, tmp_path):
    with Service() as service:
        port = service.port
    with kind(tmp_path, [port]) as balancer:
        session = geyamux.connect(balancer.address, timeout=PATIENCE)
        began = time.monotonic()
        with contextlib.closing(session), pytest.raises(SessionError):
            session.ping(timeout=PATIENCE)
        print(f"noticed after {time.monotonic() - began:.3f} s: {session.exception!r}")
        assert time.monotonic() - began < AT_ONCE


# --- a server that dies ---


def test_sessions_of_a_server_that_is_killed_end_and_new_ones_go_to_the_others(kind, tmp_path):
    with backends.started(SERVERS) as servers, kind(tmp_path, list(servers.ports.values())) as balancer:
        clients = [Reconnecting(balancer.address) for _ in range(3 * SERVERS)]
        with contextlib.ExitStack() as stack:
            for client in clients:
                stack.enter_context(contextlib.closing(client))
            first = {client: client.ask(b"who\n") for client in clients}
            sessions = {client: client.session() for client in clients}
            dead = "backend1"
            servers.processes[dead].send_signal(signal.SIGKILL)
            theirs = [client for client in clients if first[client].startswith(dead.encode())]
            assert len(theirs) == 3
            for client in theirs:
                assert sessions[client].join(AT_ONCE)
            with gevent.Timeout(PATIENCE):
                second = {client: client.ask(b"who\n") for client in clients}
            assert {line.split()[0] for line in second.values()} == {b"backend0", b"backend2"}
            for client in clients:
                if client not in theirs:
                    assert client.session() is sessions[client]
