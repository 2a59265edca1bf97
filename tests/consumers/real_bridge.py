"""A descriptor for a stream: one end of a socketpair, whose other end is joined to the stream by two plain loops.

For code that polls by itself. What ends or breaks on one side does so on the other.
"""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator
from typing import Any

import gevent

from consumers.real_relay import copy


@contextlib.contextmanager
def bridged(stream: Any) -> Iterator[socket.socket]:
    """A real socket that reads and writes what the stream does; both are closed when the block is left.

    To be used monkey-patched: the socketpair is gevent's then.
    """
    ours, theirs = socket.socketpair()

    def give_up() -> None:
        stream.reset()
        ours.close()

    loops = [gevent.spawn(copy, stream, ours, give_up), gevent.spawn(copy, ours, stream, give_up)]
    try:
        yield theirs
    finally:
        theirs.close()
        gevent.joinall(loops, timeout=5)
        gevent.killall(loops)
        ours.close()
        stream.close()
