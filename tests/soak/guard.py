"""What watches from inside a process of a soak run: calls that take too long, errors that nobody expects, and a census.

A fault is reported once for each place, with its traceback. Time for which the process itself did not get to run is
charged to no call. Whether the run has passed is decided elsewhere, from the reports.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any
from weakref import WeakSet

import gevent
import gevent.hub
import greenlet

from geyamux import Session, Stream

#: Seconds beyond its limit that a call may take: the machine is busy, and that is no fault of the call.
GRACE = 5.0
_LOOK = 0.25


class Guard:
    """Counts what happens, and reports what must not."""

    def __init__(self, send: Callable[..., None]) -> None:
        self._send = send
        #: What happened, by name.
        self.counts: Counter[str] = Counter()
        #: What must not happen, by name.
        self.faults: Counter[str] = Counter()
        #: Calls under way: what, since when, how much of the lag was before, for how long, whose.
        self._running: dict[int, tuple[str, float, float, float, Any]] = {}
        self._next = 0
        self._late: set[int] = set()
        #: For how long the hub was not looked at, in all, and at most.
        self.lag = 0.0
        self.worst_lag = 0.0
        self._greenlets: WeakSet[gevent.Greenlet[..., Any]] = WeakSet()
        self.objects: WeakSet[Session | Stream] = WeakSet()

    def start(self) -> None:
        """Begin to watch this process."""
        gevent.Greenlet.add_spawn_callback(self._greenlets.add)
        handler = logging.Handler(logging.WARNING)
        handler.emit = self._on_log  # type: ignore[method-assign]
        logging.getLogger().addHandler(handler)
        sys.unraisablehook = self._on_unraisable
        hub = gevent.get_hub()
        hub.handle_error = self._on_hub_error  # type: ignore[method-assign,assignment]  # a hub of ours, for the run
        gevent.spawn(self._watch)

    def count(self, what: str, number: int = 1) -> None:
        self.counts[what] += number

    def fault(self, what: str, detail: str = "") -> None:
        """Something that must not happen has happened."""
        self.faults[what] += 1
        if self.faults[what] <= 3:
            self._send(kind="fault", what=what, detail=detail[-4000:])

    def unexpected(self, error: BaseException, where: str) -> None:
        """An error of a kind that no caller is told to expect."""
        self.fault(f"unexpected {type(error).__name__} in {where}", "".join(traceback.format_exception(error)))

    @contextlib.contextmanager
    def limit(self, what: str, seconds: float) -> Iterator[None]:
        """The calls within may not take longer."""
        self._next += 1
        number = self._next
        self._running[number] = (what, time.monotonic(), self.lag, seconds, greenlet.getcurrent())
        try:
            yield
        finally:
            del self._running[number]
            self._late.discard(number)

    def census(self) -> dict[str, int]:
        """What this process holds, now: everything that must be the same at each quiet moment."""
        gc.collect()
        sessions = [thing for thing in self.objects if isinstance(thing, Session)]
        return {
            "sessions": len(sessions),
            "streams": len(self.objects) - len(sessions),
            "greenlets": sum(not one.dead for one in list(self._greenlets)),
            "descriptors": len(os.listdir("/proc/self/fd")),
        }

    def _watch(self) -> None:
        while True:
            before = time.monotonic()
            gevent.sleep(_LOOK)
            now = time.monotonic()
            late = now - before - _LOOK
            self.lag += late
            self.worst_lag = max(self.worst_lag, late)
            for number, (what, since, lag, seconds, who) in list(self._running.items()):
                if now - since - (self.lag - lag) > seconds + GRACE and number not in self._late:
                    self._late.add(number)
                    stack = "".join(traceback.format_stack(who.gr_frame)) if who.gr_frame else ""
                    self.fault(f"{what} took longer than {seconds:g} s", stack)

    def _on_log(self, record: logging.LogRecord) -> None:
        if record.levelno >= logging.ERROR:
            self.fault(f"logged as {record.levelname}", record.getMessage())
        else:
            self.count("warnings")

    def _on_unraisable(self, event: Any) -> None:
        self.fault("unraisable error", f"{event.err_msg} {event.object!r}: {event.exc_value!r}")

    def _on_hub_error(self, context: Any, kind: Any, value: Any, tb: Any) -> None:
        if not issubclass(kind, (*gevent.hub.Hub.NOT_ERROR, *gevent.hub.Hub.SYSTEM_ERROR)):
            self.fault("error in the hub", f"{context!r}\n" + "".join(traceback.format_exception(kind, value, tb)))
        elif issubclass(kind, gevent.hub.Hub.SYSTEM_ERROR):
            parent: Any = gevent.get_hub().parent
            parent.throw(kind, value, tb)
