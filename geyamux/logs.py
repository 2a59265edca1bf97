"""Lines for the log, from the middle of our own work, written by a greenlet of their own.

A handler may wait: for its lock, after monkey-patching, or for a network. In the hub it could not, and in the reader the
next byte would break its wait. So lines stand in a queue, one for each hub, which one greenlet empties; it ends when the
queue is empty. A handler that waits for long costs lines, not memory: those beyond a limit are counted, and the count is
logged.

Which lines there are is not decided here.
"""

from __future__ import annotations

import logging
import sys
from collections import deque
from weakref import WeakSet

import gevent
from gevent.hub import Hub

__all__ = ["log", "write_waiting"]

#: Lines that may wait for one hub's handlers.
_MOST_LINES = 4096

_queues: WeakSet[_Queue] = WeakSet()


class _Queue:
    """The lines of one hub that are not written yet."""

    def __init__(self, hub: Hub) -> None:
        self._hub = hub
        self._lines: deque[tuple[logging.Logger, int, str, tuple[object, ...]]] = deque()
        #: Lines left out since the last one that was written.
        self._dropped = 0
        self._greenlet: gevent.Greenlet[[], None] | None = None

    @classmethod
    def of(cls, hub: Hub) -> _Queue:
        """The one of this hub."""
        queue = getattr(hub, "_geyamux_log", None)
        if not isinstance(queue, cls):
            queue = cls(hub)
            hub._geyamux_log = queue  # type: ignore[attr-defined]  # a hub takes attributes; so both end together
            _queues.add(queue)
        return queue

    def put(self, logger: logging.Logger, level: int, message: str, args: tuple[object, ...]) -> None:
        if len(self._lines) >= _MOST_LINES:
            self._dropped += 1
            return
        self._lines.append((logger, level, message, args))
        if self._greenlet is None or self._greenlet.ready():
            self._greenlet = gevent.spawn(self.write)

    def write(self) -> None:
        """Write all that waits."""
        while self._lines:
            logger, level, message, args = self._lines.popleft()
            try:
                if self._dropped:
                    dropped, self._dropped = self._dropped, 0
                    logger.warning("%d lines were left out: the handlers of the log are slow", dropped)
                logger.log(level, message, *args)
            except Exception:
                # A filter's, or a handler's that does not mind its own errors: its affair, not that of the other lines.
                self._hub.handle_error((logger, message), *sys.exc_info())


def log(logger: logging.Logger, level: int, message: str, *args: object) -> None:
    """Have the line written soon. Never waits, never raises what a handler raises."""
    if logger.isEnabledFor(level):
        _Queue.of(gevent.get_hub()).put(logger, level, message, args)


def write_waiting() -> None:
    """At interpreter exit: write what waits, in whatever greenlet this is."""
    for queue in list(_queues):
        queue.write()
