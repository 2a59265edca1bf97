"""A WSGI application under gunicorn, both its code and its configuration: a session in the master, one in each worker.

``gunicorn -c gunicorn_app.py gunicorn_app:application`` with ``GEYAMUX_TEST_PEER`` naming the port where the test plays
the peer of all these sessions. The master makes its session before it forks (``preload_app``); a worker its own at its
first request, and answers what its peer answered. The first line of each stream tells who it is of.
"""

from __future__ import annotations

import os

import gevent.monkey

gevent.monkey.patch_all()

from collections.abc import Callable, Iterable  # noqa: E402  # after patching
from typing import Any  # noqa: E402

import gevent  # noqa: E402

import geyamux  # noqa: E402

# --- the configuration ---

bind = os.environ.get("GEYAMUX_TEST_BIND", "127.0.0.1:0")
worker_class = "gevent"
workers = 2
preload_app = True
graceful_timeout = 5
loglevel = "error"
max_requests = int(os.environ.get("GEYAMUX_TEST_MAX_REQUESTS", "0"))
control_socket_disable = True

# --- the application ---

ADDRESS = ("127.0.0.1", int(os.environ["GEYAMUX_TEST_PEER"]))
_sessions: dict[int, Any] = {}


def session_of_the_master() -> Any:
    """Made when the module is first imported in the master, whichever of its two names gunicorn gives it."""
    session = getattr(geyamux, "_test_master", None)
    if session is None:
        session = geyamux._test_master = geyamux.connect(ADDRESS)  # type: ignore[attr-defined]
        gevent.spawn(answer, session)
        with session.open() as stream:
            stream.sendall(b"master %d\n" % os.getpid())
    return session


def answer(session: Any) -> None:
    """The peer asks the master now and then whether its session works."""
    try:
        for stream in session:
            with stream:
                stream.sendall(b"master %d lives\n" % os.getpid())
    except geyamux.YamuxError:
        pass  # in a worker


def own_session() -> Any:
    pid = os.getpid()
    if pid not in _sessions:
        _sessions[pid] = geyamux.connect(ADDRESS)
    return _sessions[pid]


def application(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
    """Ask the peer through the worker's own session; say what it answered, and how the master's looks from here."""
    with own_session().open() as stream:
        stream.sendall(b"worker %d\n" % os.getpid())
        answered = stream.readline()
    start_response("200 OK", [("Content-Type", "text/plain")])
    state = b"dead" if session_of_the_master().ready() else b"alive"
    return [b"%d %s %s" % (os.getpid(), state, answered)]


session_of_the_master()
