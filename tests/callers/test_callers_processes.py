"""Programs that end, fork and start others with open sessions: what the peer sees, what is printed, how long it takes.

Warnings are errors in all of them (``-W error``, and ``-X dev`` where it says so): no ResourceWarning is ours.
"""

from __future__ import annotations

import contextlib
import os
import pathlib
import socket
import sys
import time
from collections.abc import Iterator
from typing import Any

import gevent
import gevent.event
import gevent.pool
import gevent.ssl
import pytest
from gevent import socket as gsocket
from gevent import subprocess

import geyamux
from support.links import authority
from support.wire import Decoder

HERE = pathlib.Path(__file__).resolve().parent
PATIENCE = 20.0
STRICTLY = ("-W", "error", "-W", "ignore:libuv only supports millisecond timer resolution:UserWarning")
#: Of a program that blocks nowhere; starting the interpreter is the most of it.
SOON = 10.0


def run(script: str, *args: object, options: tuple[str, ...] = STRICTLY, pass_fds: Any = ()) -> tuple[bytes, bytes, int]:
    """Run a script of this directory while this hub goes on."""

    path = os.pathsep.join((str(HERE.parents[1]), os.environ.get("PYTHONPATH", "")))
    command = [sys.executable, *options, str(HERE / script), *map(str, args)]
    # gevent's: once anything in this process has used that, the standard library's loses exit codes in threads.
    done = subprocess.run(
        command,
        env={**os.environ, "PYTHONPATH": path},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        pass_fds=pass_fds,
        timeout=PATIENCE,
        check=False,
    )
    return done.stdout, done.stderr, done.returncode


# --- the end of a program ---


@contextlib.contextmanager
def connection(transport: str, load: str) -> Iterator[tuple[Any, Any]]:
    """Our end, of the test, and the program's."""
    near, far = gsocket.socketpair()
    if load == "many":
        near.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        far.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    with near, far:
        yield near, far


def hear(near: Any, transport: str, load: str, over: Any) -> bytes:
    """All that the program said; of one that is to be stuck, only once it is over."""
    try:
        if transport == "tls":
            context = gevent.ssl.SSLContext(gevent.ssl.PROTOCOL_TLS_SERVER)
            authority().issue_cert("localhost").configure_cert(context)
            near = context.wrap_socket(near, server_side=True, suppress_ragged_eofs=True)
        if load == "many":
            over.wait()
        heard = b""
        while chunk := near.recv(65536):
            heard += chunk
        return heard
    finally:
        if transport == "tls":
            near.close()


#: How, and what it says on stderr, its status, and whether what was queued still leaves.
ENDS = {
    "normal": (b"", 0, True),
    "globals": (b"", 0, True),
    "exit": (b"", 3, True),
    "os._exit": (b"", 3, False),
    "unhandled": (b"Boom", 1, True),
    "SIGTERM": (b"", -15, False),
    "SIGINT": (b"KeyboardInterrupt", -2, True),
    "atexit": (b"", 0, True),
    "atexit close": (b"", 0, True),
    "daemon thread": (b"", 0, True),
    "hub callback": (b"", 3, True),
    "greenlet": (b"", 3, True),
    "waiters": (b"", 0, True),
    "in a with-block": (b"", 3, False),  # which an exception leaves with a reset
}
#: Those of a connection that takes nothing; a close may take its `close_timeout`.
STUCK = ("normal", "exit", "unhandled", "atexit close", "waiters", "in a with-block", "SIGTERM")
CASES = [
    *((how, transport, "few", ()) for how in ENDS for transport in ("plain", "tls")),
    *((how, transport, "many", ()) for how in STUCK for transport in ("plain", "tls")),
    *((how, "plain", "few", ("patched",)) for how in ENDS),
    *((how, "tls", "few", ("dev",)) for how in ("normal", "exit", "waiters", "atexit", "in a with-block")),
    *((how, "plain", "few", ("dev",)) for how in ("normal", "exit", "waiters", "atexit", "in a with-block")),
]


def end_a_program(how: str, transport: str, load: str, more: tuple[str, ...]) -> list[str]:
    """What went wrong."""
    expected_error, expected_code, is_flushed = ENDS[how]
    faults = []
    options = ("-X", "dev", *STRICTLY) if "dev" in more else STRICTLY
    with connection(transport, load) as (near, far):
        over = gevent.event.Event()
        hearing = gevent.spawn(hear, near, transport, load, over)
        began = time.monotonic()
        out, err, code = run(
            "exits.py", far.fileno(), how, transport, load, *more, options=options, pass_fds=[far.fileno()]
        )
        took = time.monotonic() - began
        far.close()
        over.set()
        heard = hearing.get(timeout=PATIENCE)
    if out or (err and not expected_error) or expected_error not in err or err.count(b"Traceback") > 1:
        faults.append(f"printed {(out + err).decode()[-800:]}")
    if code != expected_code and not (how == "SIGINT" and code == 1):
        faults.append(f"ended with {code}")
    if took > SOON:
        faults.append(f"took {took:.1f} s")
    if load == "few" and is_flushed:
        decoder = Decoder()
        frames = decoder.feed(heard)
        decoder.finish()
        if b"last words" not in b"".join(frame.body for frame in frames):
            faults.append(f"the last words are lost: {[str(frame) for frame in frames]}")
    return faults


@pytest.mark.slow
@pytest.mark.timeout(90)
def test_a_program_may_end_in_any_way_with_open_sessions() -> None:
    """Nothing printed but its own error, no delay, whole frames, and what was queued has left where that is possible."""
    group = gevent.pool.Pool(4)
    running = {case: group.spawn(end_a_program, *case) for case in CASES}
    faults = {case: greenlet.get(timeout=80) for case, greenlet in running.items()}
    assert not {case: found for case, found in faults.items() if found}


# --- children ---


@pytest.mark.slow
@pytest.mark.parametrize("patched", [(), ("patched",)], ids=["", "patched"])
@pytest.mark.parametrize(
    "how",
    [
        "fork",
        "fork in a greenlet",
        "fork in a callback",
        "fork in a thread",
        "fork twice",
        "multiprocessing fork",
        "multiprocessing spawn",
        "subprocess",
    ],
)
def test_children_leave_the_session_of_their_parent_alone(how: str, patched: tuple[str, ...]) -> None:
    assert run("children.py", how, *patched) == (b"unharmed\n", b"", 0)


def test_the_socket_of_a_session_is_closed_by_exec() -> None:
    """However it came to be: dialled, accepted, of a pair, and through TLS."""
    listener = gsocket.socket()
    listener.bind(("127.0.0.1", 0))
    listener.listen()
    client = geyamux.connect(listener.getsockname())
    conn, _ = listener.accept()
    server = geyamux.Server(conn)
    pair = geyamux.pair()
    for session in (client, server, *pair):
        assert not os.get_inheritable(session.conn.fileno())
        session.abort()
    listener.close()
