"""A session that is kept alive: when it is made anew, after how long, and what ends that.

Sessions are made over socketpairs; the peer is the other end. Intervals are milliseconds, or are only noted.
"""

from __future__ import annotations

import contextlib
import errno
import random
import time
from collections.abc import Iterator
from typing import Any

import gevent
import gevent.event
import gevent.hub
import pytest

from geyamux import Client, Config, RemoteGoAway, SessionClosed, SessionError, pair, tunnel
from geyamux.tunnel import Reconnector
from support.facing import outcome, start
from support.rawpeer import settle
from support.waiting import wait_for

FAST = {"min_interval": 0.001, "max_interval": 0.004}


class Relay:
    """What is dialled: each time it gives a session, or refuses."""

    def __init__(self, *script: Any) -> None:
        #: What the next dials meet: an exception to raise, or None for a session; then sessions for ever.
        self.script = list(script)
        self.clients: list[Client] = []
        self.peers: list[Any] = []
        self.dials = 0

    def connect(self) -> Client:
        self.dials += 1
        if self.script:
            error = self.script.pop(0)
            if error is not None:
                raise error
        client, server = pair(Config(close_timeout=1.0))
        self.clients.append(client)
        self.peers.append(server)
        return client


def refused() -> OSError:
    return ConnectionRefusedError(errno.ECONNREFUSED, "nobody is there")


@contextlib.contextmanager
def running(relay: Relay, *args: Any, **settings: Any) -> Iterator[Reconnector]:
    """One that runs, with all of its sessions aborted in the end."""
    reconnector = Reconnector(relay.connect, *args, **{**FAST, **settings})
    reconnector.start()
    try:
        yield reconnector
    finally:
        reconnector.stop()
        assert reconnector._greenlet is not None
        reconnector._greenlet.join(5)
        for session in (*relay.clients, *relay.peers):
            session.abort()
        settle()


class Impatient(gevent.event.Event):
    """The wait for the next try is over at once."""

    def wait(self, timeout: float | None = None) -> bool:
        return self.is_set()


def intervals(**settings: Any) -> list[float]:
    """What it would wait after each of eight refusals, without waiting."""
    waits: list[float] = []

    def on_retry(error: OSError, seconds: float, attempt: int) -> None:
        waits.append(seconds)
        if attempt == 8:
            reconnector.stop()

    relay = Relay(*[refused() for _ in range(8)])
    reconnector = Reconnector(relay.connect, on_retry=on_retry, **settings)
    reconnector._stopped = Impatient()
    reconnector.run()
    return waits


# --- how long it waits ---


def test_waits_double_up_to_the_longest(monkeypatch):
    monkeypatch.setattr(random, "uniform", lambda least, most: most)
    assert intervals() == [0.5, 1, 2, 4, 8, 16, 30, 30]
    assert intervals(min_interval=3, max_interval=10) == [3, 6, 10, 10, 10, 10, 10, 10]


def test_chance_shortens_a_wait_to_half_of_it_at_most():
    longest = [0.5, 1, 2, 4, 8, 16, 30, 30]
    several = [intervals() for _ in range(5)]
    assert all(most / 2 <= wait <= most for waits in several for wait, most in zip(waits, longest, strict=True))
    assert len({tuple(waits) for waits in several}) == 5


@pytest.mark.parametrize("settings", [{"min_interval": 0}, {"min_interval": 2, "max_interval": 1}, {"min_interval": -1}])
def test_intervals_that_make_no_sense_are_refused(settings):
    with pytest.raises(ValueError, match="min_interval"):
        Reconnector(Relay().connect, **settings)


def test_a_session_that_is_lost_at_once_is_no_success_and_one_that_lived_is(monkeypatch):
    now = [1000.0]
    ages = [0.1, 0.1, 0.1, 3.0, 0.1]
    retries: list[tuple[float, int]] = []
    monkeypatch.setattr(random, "uniform", lambda least, most: most)
    relay = Relay()

    def lose(session: Any) -> None:
        now[0] += ages.pop(0)
        session.abort()

    def on_retry(error: OSError, seconds: float, attempt: int) -> None:
        retries.append((seconds, attempt))
        if not ages:
            reconnector.stop()

    reconnector = Reconnector(relay.connect, on_connect=lose, on_retry=on_retry)
    reconnector._stopped = Impatient()
    monkeypatch.setattr("geyamux.tunnel.time.monotonic", lambda: now[0])
    reconnector.run()
    # The third waited 1 s; the fourth outlived its 2 s; the last did not outlive that half second.
    assert retries == [(0.5, 1), (1.0, 2), (2.0, 3), (0.5, 1), (1.0, 2)]
    for peer in relay.peers:
        peer.abort()


# --- whether it gives up ---


def test_it_never_gives_up_by_itself():
    relay = Relay(*[refused() for _ in range(50)])
    attempts: list[int] = []
    with running(relay, on_retry=lambda error, seconds, attempt: attempts.append(attempt)) as reconnector:
        wait_for(lambda: reconnector.session)
    assert attempts == list(range(1, 51))


@pytest.mark.parametrize("retries", [0, 2])
def test_after_so_many_retries_in_vain_it_raises_the_last_error(retries):
    errors = [refused() for _ in range(5)]
    relay = Relay(*errors)
    reconnector = Reconnector(relay.connect, max_retries=retries, **FAST)
    with pytest.raises(ConnectionRefusedError) as caught:
        reconnector.run()
    assert caught.value is errors[retries]
    assert relay.dials == retries + 1
    with pytest.raises(SessionError):
        reconnector.open()


def test_a_success_gives_back_the_retries():
    # The loss itself is the first failure of the second row.
    relay = Relay(refused(), refused(), None, refused(), None, refused(), None)
    with running(relay, max_retries=2) as reconnector:
        for count in (1, 2, 3):
            wait_for(lambda count=count: len(relay.clients) == count and reconnector.session)
            gevent.sleep(0.02)  # longer than the wait before it
            relay.peers[-1].abort()
        wait_for(lambda: len(relay.clients) == 4)


@pytest.mark.parametrize("error", [OSError(errno.EMFILE, "Too many open files"), TimeoutError("timed out")])
def test_a_lack_of_descriptors_and_a_time_limit_pass_like_any_refusal(error):
    with running(Relay(error)) as reconnector:
        wait_for(lambda: reconnector.session)


@pytest.mark.parametrize("error", [ValueError("wrong"), MemoryError(), gevent.Timeout(1)], ids=type)
def test_what_is_no_oserror_ends_it_and_is_raised(error):
    relay = Relay(error)
    reconnector = Reconnector(relay.connect, **FAST)
    with pytest.raises(type(error)) as caught:
        reconnector.run()
    assert caught.value is error
    with pytest.raises(SessionError, match="nobody connects"):
        reconnector.open()


def test_a_connect_that_returns_no_session_is_a_mistake():
    with pytest.raises(TypeError, match="None"):
        Reconnector(lambda: None, **FAST).run()


# --- sessions, and who opens ---


def test_a_lost_session_is_replaced_and_callbacks_hear_of_it():
    relay = Relay(refused())
    heard: list[Any] = []
    with running(
        relay,
        on_connect=lambda session: heard.append(("connect", session)),
        on_disconnect=lambda session, error: heard.append(("disconnect", session, type(error))),
        on_retry=lambda error, seconds, attempt: heard.append(("retry", type(error), attempt)),
    ) as reconnector:
        wait_for(lambda: reconnector.session)
        first = reconnector.session
        relay.peers[0].close()
        wait_for(lambda: reconnector.session not in (None, first))
        assert reconnector.sessions == {reconnector.session}
        assert heard[:3] == [("retry", ConnectionRefusedError, 1), ("connect", first), ("disconnect", first, heard[2][2])]
        assert issubclass(heard[2][2], (SessionClosed, RemoteGoAway))
        assert heard[-1] == ("connect", reconnector.session)


def test_open_waits_for_a_session_and_across_a_reconnect():
    relay = Relay(refused(), refused())
    with running(relay) as reconnector:
        stream = reconnector.open(5)
        assert stream.session is relay.clients[0]
        relay.clients[0].abort()
        assert reconnector.session is None
        again = [start(reconnector.open) for _ in range(5)]
        assert {outcome(one).session for one in again} == {relay.clients[1]}


def test_open_keeps_its_time_limit():
    never = gevent.event.Event()
    reconnector = Reconnector(never.wait, **FAST)
    reconnector.start()
    for timeout in (0, 0.02):
        with pytest.raises(TimeoutError, match="timed out"):
            reconnector.open(timeout)
    waiting = start(reconnector.open)
    reconnector.stop()
    assert isinstance(outcome(waiting), SessionError)
    reconnector.close()


def test_open_on_a_full_session_times_out_too():
    with running(Relay()) as reconnector:
        wait_for(lambda: reconnector.session)
        for _ in range(reconnector.session.config.accept_backlog):
            reconnector.open()
        with pytest.raises(TimeoutError):
            reconnector.open(0.02)


def test_who_waits_in_a_full_session_gets_a_stream_of_the_next_one():
    with running(Relay()) as reconnector:
        wait_for(lambda: reconnector.session)
        first = reconnector.session
        for _ in range(first.config.accept_backlog):
            reconnector.open()
        waiting = start(reconnector.open)
        first.abort()
        assert outcome(waiting).session not in (None, first)


def test_a_peer_that_goes_away_gets_its_streams_served_to_the_end_beside_a_new_session():
    relay = Relay()
    served: list[Any] = []

    def serve(session: Any) -> None:
        served.append(session)
        session.join()

    reasons: list[OSError] = []
    with running(relay, serve, on_disconnect=lambda session, error: reasons.append(error)) as reconnector:
        stream = reconnector.open(5)
        accepted = relay.peers[0].accept()
        relay.peers[0].go_away()
        wait_for(lambda: len(relay.clients) == 2 and reconnector.session is relay.clients[1])
        assert [type(reason) for reason in reasons] == [RemoteGoAway]
        assert reconnector.sessions == set(relay.clients) == set(served)
        stream.sendall(b"still here")
        assert accepted.recv(20) == b"still here"
        assert not relay.clients[0].closed


# --- what serves ---


def test_when_serve_returns_its_session_is_closed_and_another_one_made():
    relay = Relay()
    served: list[Any] = []
    with running(relay, served.append):
        wait_for(lambda: len(served) == 3)
        wait_for(lambda: relay.clients[0].ready())
        assert relay.clients[0].exception is None
        assert served == relay.clients[: len(served)]


def test_when_serve_raises_its_session_is_closed_and_it_is_reported(monkeypatch):
    reports: list[str] = []
    monkeypatch.setattr(gevent.hub.Hub, "handle_error", lambda hub, *error: reports.append(str(error[2])))
    relay = Relay()
    done = gevent.event.Event()

    def serve(session: Any) -> None:
        if session is relay.clients[0]:
            raise RuntimeError("on purpose")
        done.wait()

    with running(relay, serve):
        wait_for(lambda: len(relay.clients) == 2 and relay.clients[0].ready())
        done.set()
    assert reports == ["on purpose"]


@pytest.mark.parametrize("name", ["on_connect", "on_disconnect", "on_retry"])
def test_a_callback_that_fails_ends_it_and_is_raised(name):
    def fail(*args: object) -> None:
        raise RuntimeError("on purpose")

    relay = Relay(refused()) if name == "on_retry" else Relay()
    serve = None if name == "on_connect" else lambda session: None
    reconnector = Reconnector(relay.connect, serve, **FAST, **{name: fail})
    with pytest.raises(RuntimeError, match="on purpose"):
        reconnector.run()
    reconnector.close()
    for peer in relay.peers:
        peer.abort()
    assert not reconnector.sessions or all(session.closed for session in reconnector.sessions)


# --- its end ---


def test_stop_while_it_connects_does_not_wait_for_that():
    never = gevent.event.Event()
    reconnector = Reconnector(never.wait, **FAST)
    running = start(reconnector.run)
    reconnector.stop()
    assert outcome(running) is None
    assert reconnector.session is None


def test_stop_while_it_waits_ends_that_wait():
    relay = Relay(*[refused() for _ in range(9)])
    reconnector = Reconnector(relay.connect, min_interval=1000, max_interval=1000)
    running = start(reconnector.run)
    assert relay.dials == 1
    reconnector.stop()
    assert outcome(running) is None
    assert relay.dials == 1


@pytest.mark.parametrize("from_hub", [False, True])
def test_stop_while_it_serves_lets_the_session_go_on(from_hub):
    relay = Relay()
    reconnector = Reconnector(relay.connect, lambda session: session.join(), **FAST)
    running = start(reconnector.run)
    stream = reconnector.open()
    if from_hub:
        gevent.get_hub().loop.run_callback(reconnector.stop)
    else:
        reconnector.stop()
    assert outcome(running) is None
    accepted = relay.peers[0].accept()
    stream.sendall(b"goes on")
    assert accepted.recv(10) == b"goes on"
    assert reconnector.open().session is relay.clients[0]
    reconnector.stop()
    relay.peers[0].close()
    wait_for(lambda: not reconnector.sessions)
    assert reconnector.session is None
    with pytest.raises(SessionError):
        reconnector.open()


def test_a_connect_that_returns_after_the_stop_has_its_session_aborted():
    relay = Relay()

    def connect() -> Client:
        session = relay.connect()
        reconnector.stop()
        return session

    reconnector = Reconnector(connect, **FAST)
    reconnector.run()
    assert reconnector.session is None
    assert relay.clients[0].join(5)
    assert relay.peers[0].join(5)


def test_a_run_that_is_killed_leaves_no_greenlet_and_no_new_session():
    relay = Relay()
    for connect in (relay.connect, gevent.event.Event().wait):
        reconnector = Reconnector(connect, **FAST)
        running = start(reconnector.run)
        running.kill()
        assert isinstance(running.value, gevent.GreenletExit)
        reconnector.close()
    assert relay.clients[0].ready()
    relay.peers[0].join(5)
    assert relay.dials == 1


@pytest.mark.parametrize("timeout", [None, 0.5])
def test_close_ends_the_sessions_in_good_order(timeout):
    relay = Relay()
    reconnector = Reconnector(relay.connect, lambda session: session.join(), **FAST)
    reconnector.start()
    reconnector.start()
    wait_for(lambda: reconnector.session)
    reconnector.close(timeout)
    reconnector.close(timeout)
    assert relay.clients[0].ready()
    assert relay.peers[0].join(5)
    assert relay.peers[0].exception is None
    assert reconnector.session is None and not reconnector.sessions
    assert relay.dials == 1


def test_close_keeps_its_time_where_a_stream_never_ends():
    relay = Relay()
    reconnector = Reconnector(relay.connect, **FAST)
    reconnector.start()
    reconnector.open().sendall(b"half")
    relay.peers[0].accept().close_write()
    began = time.monotonic()
    reconnector.close(0.05)
    assert time.monotonic() - began < 1
    relay.peers[0].abort()


def test_stop_before_the_start_and_a_callback_that_stops():
    relay = Relay()
    reconnector = Reconnector(relay.connect, **FAST)
    reconnector.stop()
    reconnector.run()
    assert relay.dials == 0
    relay = Relay(*[refused() for _ in range(9)])
    reconnector = Reconnector(relay.connect, on_retry=lambda *args: reconnector.stop(), **FAST)
    reconnector.run()
    assert relay.dials == 1


def test_a_peer_that_went_away_and_leaves_the_connection_open_does_not_make_sessions_pile_up(monkeypatch):
    monkeypatch.setattr(tunnel, "_PARTING", 0.01)
    relay = Relay()
    with running(relay, lambda session: [stream.close() for stream in session]) as reconnector:
        while len(relay.peers) < 6:
            wait_for(lambda: reconnector.session is not None)
            relay.peers[-1].go_away()
            wait_for(lambda: reconnector.session is not relay.clients[-1])
        wait_for(lambda: len(reconnector.sessions) <= 1)
        assert all(session.closed for session in relay.clients[:5])
