"""Signals, for a command that waits in greenlets.

Python's own way would raise KeyboardInterrupt anywhere, in the hub, too, which reports it with a traceback.
"""

from __future__ import annotations

import contextlib
import functools
import signal
from collections.abc import Callable, Iterator, Mapping

import gevent

__all__ = ["interruptible", "on_signals"]


@contextlib.contextmanager
def on_signals(actions: Mapping[int, Callable[[], object]]) -> Iterator[None]:
    """Call these, each in a greenlet of its own, when their signals come."""
    watchers = [gevent.signal_handler(number, action) for number, action in actions.items()]
    try:
        yield
    finally:
        for watcher in watchers:
            watcher.cancel()


@contextlib.contextmanager
def interruptible(*numbers: int) -> Iterator[None]:
    """Let Ctrl-C, and the signals `numbers`, raise KeyboardInterrupt where the caller's greenlet waits."""
    interrupt = functools.partial(gevent.kill, gevent.getcurrent(), KeyboardInterrupt)
    with on_signals(dict.fromkeys((signal.SIGINT, *numbers), interrupt)):
        yield
