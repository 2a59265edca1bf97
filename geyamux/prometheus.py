"""Sessions as metrics of Prometheus. Needs prometheus_client, which nothing else of geyamux imports. ::

    geyamux.prometheus.SessionCollector()  # registers itself
    app = prometheus_client.make_wsgi_app()  # for gevent.pywsgi

Every session of the process is found, those that exist already included, and none is kept alive. Counters sum up sessions
that live and sessions that have ended since the collector was made, so they never go down. Gauges are of those that live.
"""

from __future__ import annotations

import contextlib
import os
import weakref
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

from gevent import monkey
from prometheus_client import REGISTRY, CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from .session import Session, live_sessions, watch_ends
from .stats import RESET_REASONS, SessionStats

__all__ = ["SessionCollector"]

#: Different values of the label, at most: each of them is kept for ever, here and by Prometheus.
_MOST_LABELS = 1000
_OTHER = "other"

#: Name without its ``_total``, attribute of SessionStats, help.
_COUNTERS = (
    ("geyamux_sent_bytes", "bytes_sent", "Bytes that connections have taken, headers included."),
    ("geyamux_received_bytes", "bytes_received", "Bytes received, headers included."),
    ("geyamux_sent_frames", "frames_sent", "Frames sent."),
    ("geyamux_received_frames", "frames_received", "Frames received."),
    ("geyamux_opened_streams", "opened", "Streams opened here."),
    ("geyamux_incoming_streams", "incoming", "Streams opened by peers and taken in."),
    ("geyamux_accepted_streams", "accepted", "Streams of peers that were accepted."),
    ("geyamux_credit_wait_seconds", "blocked", "Time for which writers waited because a peer did not read."),
)
#: The same for what is counted by reason, as labels.
_RESETS = ("geyamux_reset_streams", "resets", "Streams reset or refused, by reason.")
_ENDS = ("geyamux_ended_sessions", "ends", "Sessions that have ended, by the error that says why.")
_GAUGES = (
    ("geyamux_sessions", "sessions", "Sessions that live."),
    ("geyamux_streams", "streams", "Streams that have not ended on both sides."),
    ("geyamux_backlog_streams", "backlog", "Streams of peers that wait for accept."),
    ("geyamux_unacknowledged_streams", "unacknowledged", "Own streams that peers have not acknowledged."),
    ("geyamux_blocked_streams", "blocked_streams", "Streams with a writer that waits because the peer does not read."),
    ("geyamux_queued_bytes", "queued", "Bytes that wait for connections."),
    ("geyamux_unread_bytes", "unread", "Bytes received that nobody has read."),
)
#: Of these the largest is shown.
_MAXIMA = (
    ("geyamux_rtt_seconds", "rtt", "The longest smoothed round trip of a session."),
    ("geyamux_idle_seconds", "idle", "The longest time for which a session has not heard from its peer."),
)

#: Those of this process, whose locks a fork may have left with a thread that is not there any more.
_collectors: weakref.WeakSet[SessionCollector] = weakref.WeakSet()

#: By metric and reason, where there are reasons. Zeros stay: `+` of two would drop them, `update` adds and keeps.
_Sums = Counter[tuple[str, str]]


class SessionCollector(Collector):
    """All sessions of this process as metrics.

    Registers itself with `registry`; None registers nowhere. `label` gives each session a value for the label
    ``session``, and sessions with the same value are summed up: ``label=lambda session: session.name`` suits sessions
    that were given names, few and the same ones after a reconnect, since values are kept for ever. Without it there is
    one sum for the process. Values beyond 1,000, and where `label` raises, are ``other``.

    ``collect`` may be called by any thread, and does not wait.
    """

    def __init__(
        self, registry: CollectorRegistry | None = REGISTRY, *, label: Callable[[Session], str] | None = None
    ) -> None:
        self._label = label
        self._labels: set[str] = set()
        self._renew_lock()
        _collectors.add(self)
        #: Counters of sessions that have ended, by the value of the label; and those sessions, while somebody keeps them.
        self._ended: dict[str, _Sums] = {}
        self._counted: weakref.WeakSet[Session] = weakref.WeakSet()
        #: What was told last: a thread may look in the middle of a change.
        self._told: dict[str, _Sums] = {}
        watch_ends(self)
        if registry is not None:
            registry.register(self)

    def on_session_end(self, session: Session) -> None:
        """Called by each session that ends."""
        with self._lock:
            if session not in self._counted:
                value = self._value_of(session)
                self._counted.add(session)
                sums = self._ended.setdefault(value, Counter())
                sums.update(_counters_of(session.stats()))
                sums[_ENDS[0], _end_of(session)] += 1

    def describe(self) -> Iterable[Metric]:
        """The metrics without values."""
        return self._families({}, {})

    def collect(self) -> Iterable[Metric]:
        """The metrics as they are now."""
        with self._lock:
            counters = {value: sums.copy() for value, sums in self._ended.items()}
            gauges: dict[str, dict[str, float]] = {}
            if self._label is None:
                counters.setdefault("", Counter({(_RESETS[0], reason): 0 for reason in RESET_REASONS}))
                gauges[""] = _no_gauges()
            for session in live_sessions():
                if session in self._counted:
                    continue
                value, stats = self._value_of(session), session.stats()
                counters.setdefault(value, Counter()).update(_counters_of(stats))
                _add_gauges(gauges.setdefault(value, _no_gauges()), stats)
            for value, sums in counters.items():
                told = self._told.setdefault(value, Counter())
                told.update({key: max(0, number - told[key]) for key, number in sums.items()})
            return self._families(self._told, gauges)

    def _renew_lock(self) -> None:
        # Of threads, also after monkey-patching; taken again by another greenlet of the same one, should `label` switch.
        self._lock: Any = monkey.get_original("threading", "RLock")()

    def _value_of(self, session: Session) -> str:
        if self._label is None:
            return ""
        value = _OTHER
        with contextlib.suppress(Exception):
            value = str(self._label(session))
        if value not in self._labels and len(self._labels) >= _MOST_LABELS:
            return _OTHER
        self._labels.add(value)
        return value

    def _families(self, counters: dict[str, _Sums], gauges: dict[str, dict[str, float]]) -> list[Metric]:
        own = [] if self._label is None else ["session"]
        families: list[Metric] = []
        for name, _, text in _COUNTERS:
            counter = CounterMetricFamily(name, text, labels=own)
            for value, sums in counters.items():
                counter.add_metric([value] if own else [], sums[name, ""])
            families.append(counter)
        for name, _, text in (_RESETS, _ENDS):
            counter = CounterMetricFamily(name, text, labels=[*own, "reason"])
            for value, sums in counters.items():
                for (metric, reason), number in sorted(sums.items()):
                    if metric == name:
                        counter.add_metric([*([value] if own else []), reason], number)
            families.append(counter)
        for name, field, text in (*_GAUGES, *_MAXIMA):
            gauge = GaugeMetricFamily(name, text, labels=own)
            for value, numbers in gauges.items():
                if field in numbers:
                    gauge.add_metric([value] if own else [], numbers[field])
            families.append(gauge)
        return families


def _counters_of(stats: SessionStats) -> _Sums:
    sums: _Sums = Counter({(name, ""): getattr(stats, field) for name, field, _ in _COUNTERS})
    sums.update({(_RESETS[0], reason): number for reason, number in stats.resets.items()})
    return sums


def _end_of(session: Session) -> str:
    return "SessionClosed" if session.exception is None else type(session.exception).__name__


def _no_gauges() -> dict[str, float]:
    return {field: 0 for _, field, _ in _GAUGES}


def _add_gauges(numbers: dict[str, float], stats: SessionStats) -> None:
    numbers["sessions"] += 1
    for _, field, _ in _GAUGES[1:]:
        numbers[field] += getattr(stats, field)
    for _, field, _ in _MAXIMA:
        value = getattr(stats, field)
        if value is not None:
            numbers[field] = max(numbers.get(field, 0.0), value)


def _renew_locks() -> None:
    """In a forked child: a thread that was scraping is not there to release its lock."""
    for collector in list(_collectors):
        collector._renew_lock()


os.register_at_fork(after_in_child=_renew_locks)
