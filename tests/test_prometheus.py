"""Sessions as metrics, judged by the real prometheus_client: its registry, its text format and its parser."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import threading
import warnings
import weakref
from pathlib import Path

import gevent
import pytest
from gevent import monkey
from gevent import socket as gsocket
from gevent.pywsgi import WSGIServer

import geyamux
from geyamux import Client, Config, KeepaliveTimeout
from geyamux.stats import RESET_REASONS
from support.facing import start
from support.links import sessions
from support.rawpeer import settle

prometheus_client = pytest.importorskip("prometheus_client", reason="needs prometheus_client (pip install it)")

from prometheus_client.parser import text_string_to_metric_families  # noqa: E402

from geyamux import prometheus  # noqa: E402
from geyamux.prometheus import SessionCollector  # noqa: E402

pytestmark = pytest.mark.interop

ROOT = Path(geyamux.__file__).parent.parent
PATIENCE = 10.0
WINDOW = 262144


class Scraper:
    """A registry with the collector in it, and what it tells."""

    def __init__(self, label=None) -> None:
        self.registry = prometheus_client.CollectorRegistry()
        self.collector = SessionCollector(self.registry, label=label)

    def families(self):
        text = prometheus_client.generate_latest(self.registry).decode()
        return {family.name: family for family in text_string_to_metric_families(text)}

    def value(self, name, **labels):
        return self.registry.get_sample_value(name, labels)

    def counters(self):
        """Every sample of a counter, by name and labels."""
        return {
            (sample.name, *sorted(sample.labels.items())): sample.value
            for family in self.families().values()
            if family.type == "counter"
            for sample in family.samples
        }


@pytest.fixture
def scraper():
    # Sessions of tests before this one may not be gone yet.
    gc.collect()
    return Scraper()


def exchange(client, server, size=1000):
    """A stream that passes bytes both ways, and is still open."""
    near = client.open()
    far = server.accept(timeout=PATIENCE)
    near.sendall(bytes(size))
    far.sendall(far.read(size))
    assert near.read(size) == bytes(size)
    client.ping()
    return near, far


def test_without_sessions_there_are_zeros(scraper):
    assert scraper.value("geyamux_sessions") == 0
    assert scraper.value("geyamux_sent_bytes_total") == 0
    assert scraper.value("geyamux_rtt_seconds") is None
    assert scraper.value("geyamux_reset_streams_total", reason="received") == 0


def test_every_metric_has_its_type_its_help_and_its_unit_at_the_end(scraper, pair):
    exchange(*pair)
    pair[0].abort()
    families = scraper.families()
    assert all(family.documentation.endswith(".") for family in families.values())
    counters = {name for name, family in families.items() if family.type == "counter"}
    gauges = {name for name, family in families.items() if family.type == "gauge"}
    assert counters | gauges == set(families) and len(counters) == 10 and len(gauges) == 9
    assert all(sample.name.endswith("_total") for name in counters for sample in families[name].samples)
    units = ("bytes", "frames", "streams", "seconds", "sessions")
    assert all(name.startswith("geyamux_") and name.endswith(units) for name in families)


def test_the_numbers_are_those_of_the_sessions(scraper, pair):
    near, far = exchange(*pair)
    pair[0].open()
    pair[0].ping()
    writing = start(near.sendall, bytes(WINDOW + 1))
    both = [session.stats() for session in pair]
    for name, field in (
        ("geyamux_sent_bytes_total", "bytes_sent"),
        ("geyamux_received_bytes_total", "bytes_received"),
        ("geyamux_sent_frames_total", "frames_sent"),
        ("geyamux_received_frames_total", "frames_received"),
        ("geyamux_opened_streams_total", "opened"),
        ("geyamux_incoming_streams_total", "incoming"),
        ("geyamux_accepted_streams_total", "accepted"),
        ("geyamux_streams", "streams"),
        ("geyamux_backlog_streams", "backlog"),
        ("geyamux_unacknowledged_streams", "unacknowledged"),
        ("geyamux_blocked_streams", "blocked_streams"),
        ("geyamux_queued_bytes", "queued"),
        ("geyamux_unread_bytes", "unread"),
    ):
        assert scraper.value(name) == sum(getattr(stats, field) for stats in both), name
    assert scraper.value("geyamux_sessions") == 2
    assert scraper.value("geyamux_blocked_streams") == scraper.value("geyamux_backlog_streams") == 1
    assert scraper.value("geyamux_unread_bytes") == far.stats().unread == WINDOW - 1000
    assert scraper.value("geyamux_rtt_seconds") == pair[0].rtt
    assert scraper.value("geyamux_idle_seconds") >= 0
    first = scraper.value("geyamux_credit_wait_seconds_total")
    settle()
    assert 0 < first < scraper.value("geyamux_credit_wait_seconds_total")
    writing.kill()


def test_resets_have_their_reason(scraper, pair):
    for _ in range(3):
        pair[0].open()
        pair[1].accept(timeout=PATIENCE).reset()
    pair[1].ping()
    found = {sample.labels["reason"]: sample.value for sample in scraper.families()["geyamux_reset_streams"].samples}
    assert set(found) == set(RESET_REASONS)
    assert {reason: number for reason, number in found.items() if number} == {"application": 3, "received": 3}


def test_counters_never_go_down_when_sessions_end_and_are_gone(scraper):
    before = scraper.counters()
    for _ in range(3):
        with sessions("socketpair") as (client, server):
            near, _ = exchange(client, server)
            writing = start(near.sendall, bytes(WINDOW + 1))
            during = scraper.counters()
            assert all(during[key] >= value for key, value in before.items())
            writing.kill()
            near.reset()
            final = [session.stats() for session in (client, server)]
        del near, client, server
        gc.collect()
        after = scraper.counters()
        assert all(after[key] >= value for key, value in during.items())
        sent = sum(stats.bytes_sent for stats in final)
        assert after["geyamux_sent_bytes_total",] >= before["geyamux_sent_bytes_total",] + sent
        assert scraper.value("geyamux_sessions") == 0
        before = after
    assert scraper.value("geyamux_opened_streams_total") == 3
    assert scraper.value("geyamux_ended_sessions_total", reason="SessionClosed") == 6


def test_a_session_that_begins_and_ends_between_two_scrapes_is_counted(scraper):
    with sessions("socketpair") as (client, server):
        exchange(client, server)
    assert scraper.value("geyamux_accepted_streams_total") == 1


def test_a_session_that_began_before_the_collector_is_found(pair):
    exchange(*pair)
    assert Scraper().value("geyamux_opened_streams_total") == 1


def test_why_sessions_ended_is_told(scraper):
    left, right = gsocket.socketpair()
    session = Client(left, Config(keepalive_interval=0.02, keepalive_timeout=0.02))
    assert session.join(PATIENCE)
    right.close()
    assert isinstance(session.exception, KeepaliveTimeout)
    assert scraper.value("geyamux_ended_sessions_total", reason="KeepaliveTimeout") == 1


def test_neither_keeps_the_other_alive(scraper):
    with sessions("socketpair") as (client, server):
        exchange(client, server)
        scraper.counters()
        held = weakref.ref(client)
    del client, server
    settle()
    gc.collect()
    assert held() is None
    collector = weakref.ref(scraper.collector)
    scraper.registry.unregister(scraper.collector)
    scraper.collector = None
    gc.collect()
    assert collector() is None
    with sessions("socketpair"):
        """Ends without anybody to hear of it."""


def test_a_label_sums_up_the_sessions_with_the_same_value():
    scraper = Scraper(label=lambda session: session.name)
    ends = [gsocket.socketpair() for _ in range(3)]
    named = [Client(ends[0][0], name="relay"), Client(ends[1][0], name="relay"), Client(ends[2][0], name="backup")]
    named[0].open()
    named[1].open()
    named[2].open()
    assert scraper.value("geyamux_opened_streams_total", session="relay") == 2
    assert scraper.value("geyamux_sessions", session="relay") == 2
    named[0].abort()
    named[1].abort()
    assert scraper.value("geyamux_opened_streams_total", session="relay") == 2
    assert scraper.value("geyamux_sessions", session="relay") is None
    assert scraper.value("geyamux_opened_streams_total", session="backup") == 1
    assert scraper.value("geyamux_reset_streams_total", session="relay", reason="session_end") == 2
    named[2].abort()
    for pair in ends:
        pair[1].close()


def test_labels_without_end_and_labels_that_fail_become_other(monkeypatch):
    monkeypatch.setattr(prometheus, "_MOST_LABELS", 2)

    def label(session):
        if session.name == "bad":
            raise RuntimeError
        return session.name

    scraper = Scraper(label)
    ends = [gsocket.socketpair() for _ in range(4)]
    named = []
    for (near, _), name in zip(ends, ("one", "two", "three", "bad"), strict=True):
        named.append(Client(near, name=name))
        named[-1].open()
        scraper.counters()
    opened = {sample.labels["session"]: sample.value for sample in scraper.families()["geyamux_opened_streams"].samples}
    assert opened == {"one": 1, "two": 1, "other": 2}
    for session, (_, far) in zip(named, ends, strict=True):
        session.abort()
        far.close()
    assert scraper.value("geyamux_opened_streams_total", session="other") == 2
    assert scraper.value("geyamux_opened_streams_total", session="one") == 1


def test_registering_collects_nothing_and_a_second_time_is_refused(scraper):
    described = {family.name for family in scraper.collector.describe()}
    assert described == {family.name for family in scraper.collector.collect()}
    assert all(not family.samples for family in scraper.collector.describe())
    with pytest.raises(ValueError, match="Duplicated"):
        scraper.registry.register(scraper.collector)


def test_a_collector_may_be_in_no_registry(pair):
    exchange(*pair)
    found = {family.name: family for family in SessionCollector(None).collect()}
    assert found["geyamux_opened_streams"].samples[0].value == 1


def test_any_thread_may_scrape_while_sessions_work_and_end(scraper):
    """As `start_http_server` of prometheus_client does, whose threads are real ones."""
    failures: list[object] = []
    is_over = False

    def scrape():
        before = {}
        while not is_over:
            try:
                now = scraper.counters()
                down = {key: (value, now.get(key)) for key, value in before.items() if now.get(key, -1) < value}
                if down:
                    failures.append(down)
                before = now
            except Exception as error:
                failures.append(error)

    thread = monkey.get_original("threading", "Thread")(target=scrape)
    thread.start()
    try:
        for _ in range(20):
            with sessions("socketpair") as (client, server):
                near, _ = exchange(client, server)
                writing = start(near.sendall, bytes(WINDOW + 1))
                gevent.sleep(0.001)
                writing.kill()
    finally:
        is_over = True
        while thread.is_alive():
            gevent.sleep(0.005)
    assert failures == []
    assert scraper.value("geyamux_ended_sessions_total", reason="SessionClosed") == 40


def test_a_scrape_over_http_by_a_server_of_gevent(scraper, pair):
    exchange(*pair)
    server = WSGIServer(("127.0.0.1", 0), prometheus_client.make_wsgi_app(scraper.registry), log=None)
    server.start()
    try:
        with gsocket.create_connection(("127.0.0.1", server.server_port), timeout=PATIENCE) as sock:
            sock.sendall(b"GET /metrics HTTP/1.0\r\nHost: localhost\r\n\r\n")
            answer = b"".join(iter(lambda: sock.recv(65536), b""))
    finally:
        server.stop()
    head, _, body = answer.decode().partition("\r\n\r\n")
    assert head.startswith("HTTP/1.1 200 OK")
    assert "\ngeyamux_sessions 2.0\n" in body
    assert "\ngeyamux_opened_streams_total 1.0\n" in body
    assert {family.name for family in text_string_to_metric_families(body)} >= {"geyamux_sent_bytes"}


def test_nothing_else_imports_the_library():
    code = "import sys, geyamux, geyamux.trace; print('prometheus_client' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=25, check=True)
    assert done.stdout == "False\n"


def test_the_lock_is_one_of_threads():
    assert isinstance(SessionCollector(None)._lock, type(threading.RLock()))


def test_a_child_that_was_forked_while_a_thread_scraped_can_scrape(scraper):
    thread, event = (monkey.get_original("threading", name) for name in ("Thread", "Event"))
    is_held, is_over = event(), event()

    def hold():
        with scraper.collector._lock:
            is_held.set()
            is_over.wait(PATIENCE)

    holding = thread(target=hold)
    holding.start()
    try:
        assert is_held.wait(PATIENCE)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # newer Pythons warn of forks beside threads
            child = os.fork()
        if not child:
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            signal.alarm(5)
            list(scraper.collector.collect())
            os._exit(0)
        _, status = os.waitpid(child, 0)
    finally:
        is_over.set()
        holding.join()
    assert status == 0
