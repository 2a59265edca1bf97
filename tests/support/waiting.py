"""Waits of tests for what tells nobody that it has happened."""

from __future__ import annotations

from collections.abc import Callable

import gevent

PATIENCE = 20.0


def wait_for(condition: Callable[[], object], what: str = "what it waited for") -> None:
    """Let the hub run until it is so, which must be soon."""
    with gevent.Timeout(PATIENCE, AssertionError(f"in vain: {what}")):
        while not condition():
            gevent.sleep(0.001)
