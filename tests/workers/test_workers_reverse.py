"""gunicorn's application served the other way round: its workers dial out, a relay opens streams to them."""

from __future__ import annotations

import itertools
import signal

import gevent
import gevent.server
import pytest

import geyamux

pytest.importorskip("gunicorn", reason="needs gunicorn (pip install gunicorn)")

from support.waiting import wait_for
from workers.fleet import PATIENCE, Callers, ask, connection, gunicorn

pytestmark = [pytest.mark.interop, pytest.mark.timeout(60)]

ARGUMENTS = ("-c", "gunicorn_reverse.py", "reverse_app:application")


class Relay:
    """What a public address would run: it holds the sessions that dial in, and opens streams on them in turn."""

    def __init__(self):
        self.sessions = []
        self.server = gevent.server.StreamServer(("127.0.0.1", 0), self.serve)
        self.server.start()
        self.address = f"127.0.0.1:{self.server.server_port}"
        self._turn = itertools.count()

    def serve(self, conn, _):
        session = geyamux.Server(conn)
        self.sessions.append(session)
        session.join()

    def living(self):
        return [session for session in self.sessions if not session.closed]

    def open(self):
        """A stream to whichever worker takes one."""
        with gevent.Timeout(PATIENCE, AssertionError("nobody takes a stream")):
            while True:
                living = self.living()
                start = next(self._turn)
                for number in range(len(living)):
                    try:
                        stream = living[(start + number) % len(living)].open()
                        # Until it is taken, nobody has read from it, and another one may be asked.
                        stream.wait_established()
                        return stream
                    except (geyamux.RemoteGoAway, geyamux.SessionError, geyamux.StreamReset):
                        continue
                gevent.sleep(0.005)

    def ask(self, **how):
        """One request, sent once, and answered: pid, whence, size."""
        with connection(self.open()) as client:
            client.request("POST", "/", **how)
            return words_of(client.getresponse().read())

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self.server.stop()
        for session in self.sessions:
            session.abort()


def words_of(body):
    pid, came_over, size = body.split()
    return int(pid), came_over.decode(), int(size)


def pids_of(relay):
    """Who answers, on all sessions."""
    return {relay.ask(body=b"")[0] for _ in range(2 * len(relay.living()))}


def test_every_worker_serves_its_application_over_the_session_that_it_dialled(tmp_path):
    with Relay() as relay, gunicorn(tmp_path / "log", *ARGUMENTS, RELAY=relay.address) as front:
        wait_for(lambda: len(relay.sessions) == 2, "both workers")
        pids = pids_of(relay)
        assert len(pids) == 2
        assert relay.ask(body=bytes(1_000_000))[1:] == ("stream", 1_000_000)
        # Its own listener works beside it.
        pid, came_over, _ = words_of(ask(front.port, "/").body)
        assert pid in pids
        assert came_over == "connection"

        front.signal(signal.SIGTERM)
        assert front.wait() == 0
        for session in relay.sessions:
            assert session.join(PATIENCE)
            assert session.exception is None
        assert front.log() == ""


def test_a_graceful_reload_loses_no_request_of_the_relay(tmp_path):
    with Relay() as relay, gunicorn(tmp_path / "log", *ARGUMENTS, RELAY=relay.address) as front:
        wait_for(lambda: len(relay.sessions) == 2, "both workers")
        old, old_pids = list(relay.sessions), pids_of(relay)
        # A request on each, of which half is still to come when the worker leaves.
        with connection(old[0].open()) as first, connection(old[1].open()) as second:
            for client in (first, second):
                client.putrequest("POST", "/")
                client.putheader("Content-Length", "2000")
                client.endheaders(bytes(1000))

            callers = Callers(lambda: relay.ask(body=bytes(1000)), number=2)
            front.signal(signal.SIGHUP)
            callers.wait_until(lambda: all(has_left(session) for session in old), "the workers to leave")
            for client in (first, second):
                client.send(bytes(1000))
                pid, *rest = words_of(client.getresponse().read())
                assert pid in old_pids
                assert rest == ["stream", 2000]
        callers.wait_until(lambda: not old_pids & pids_of(relay), "new workers alone")
        callers.stop()
        for session in old:
            assert session.join(PATIENCE)
            assert session.exception is None
        assert front.log() == ""


def has_left(session):
    """The worker has said GoAway, and is still there."""
    try:
        session.open().close()
    except geyamux.RemoteGoAway:
        return True
    return False


def test_a_worker_dials_again_when_its_session_has_ended(tmp_path):
    with Relay() as relay, gunicorn(tmp_path / "log", *ARGUMENTS, "-w1", RELAY=relay.address) as front:
        wait_for(lambda: relay.sessions, "the worker")
        pid, *_ = relay.ask(body=b"")
        relay.sessions[0].abort()
        wait_for(lambda: len(relay.sessions) == 2, "the worker again")
        assert relay.ask(body=b"x") == (pid, "stream", 1)
        assert front.log() == ""
