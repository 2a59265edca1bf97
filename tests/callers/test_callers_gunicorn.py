"""gunicorn with its gevent worker, preloaded, with a session in the master and one in each worker: `fork` as it is met.

Workers are killed, replaced, reloaded and stopped. The peer of each worker's session sees its end, the master's session
does not notice, and nobody writes a byte into a connection of somebody else.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import pathlib
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import gevent
import gevent.server
import pytest
from gevent import socket as gsocket

from geyamux import Config, ProtocolError, Server, SessionError, StreamError

HERE = pathlib.Path(__file__).resolve().parent
PATIENCE = 20.0


class Peer:
    """Serves the sessions of all processes, and knows which is whose."""

    def __init__(self) -> None:
        self.sessions: dict[str, Any] = {}
        self.ended: dict[str, BaseException | None] = {}
        self.everyone: list[Any] = []
        self.server = gevent.server.StreamServer(("127.0.0.1", 0), self.serve)
        self.server.start()

    def serve(self, conn: Any, _: Any) -> None:
        session = Server(conn, Config(keepalive_interval=None))
        self.everyone.append(session)
        name = ""
        with contextlib.suppress(SessionError):
            for stream in session:
                with contextlib.suppress(StreamError, SessionError), stream:
                    name = stream.readline().decode().strip()
                    self.sessions[name] = session
                    stream.sendall(b"hello " + name.encode() + b"\n")
        self.ended[name] = session.exception

    def master(self) -> Any:
        [name] = [name for name in self.sessions if name.startswith("master")]
        return self.sessions[name]

    def ask_the_master(self) -> None:
        """Its session works in both directions, and is still the one it was."""
        master = self.master()
        assert not master.closed, master.exception
        with gevent.Timeout(PATIENCE), master.open() as stream:
            stream.close_write()
            assert stream.read().startswith(b"master ")
            assert master.ping(PATIENCE) > 0

    def check(self) -> None:
        for session in self.everyone:
            assert not isinstance(session.exception, ProtocolError), session.exception

    def close(self) -> None:
        self.server.stop()
        for session in self.everyone:
            session.abort()


def ask(port: int) -> tuple[int, str, str]:
    """One request; the worker's pid, how the master's session looks there, what the peer answered."""
    with contextlib.closing(gsocket.create_connection(("127.0.0.1", port), timeout=PATIENCE)) as conn:
        conn.sendall(b"GET / HTTP/1.0\r\n\r\n")
        answer = b""
        while chunk := conn.recv(65536):
            answer += chunk
    head, _, body = answer.decode().partition("\r\n\r\n")
    assert head.split(" ")[1] == "200", answer
    pid, state, heard = body.split(" ", 2)
    return int(pid), state, heard.strip()


def ask_until(port: int, wanted: Any) -> set[int]:
    """Ask until the pids that answered are as wanted; in between a worker may be away."""
    pids: set[int] = set()
    with gevent.Timeout(PATIENCE, AssertionError(f"only {pids} answered")):
        while not wanted(pids):
            try:
                pid, state, heard = ask(port)
            except (OSError, AssertionError):
                gevent.sleep(0.02)
                continue
            assert (state, heard) == ("dead", f"hello worker {pid}")
            pids.add(pid)
    return pids


def wait(child: Any) -> int | None:
    """Its status; None where it does not end. gevent's own subprocess would reap the children of other tests, too."""
    with gevent.Timeout(PATIENCE, False):
        while child.poll() is None:
            gevent.sleep(0.01)
    return int(child.poll()) if child.poll() is not None else None


@contextlib.contextmanager
def gunicorn(peer: Peer, **environment: str) -> Iterator[tuple[Any, int]]:
    if importlib.util.find_spec("gunicorn") is None:
        pytest.skip("gunicorn is not installed")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    path = os.pathsep.join((str(HERE), str(HERE.parents[1]), os.environ.get("PYTHONPATH", "")))
    child = subprocess.Popen(
        [sys.executable, "-m", "gunicorn", "-c", str(HERE / "gunicorn_app.py"), "gunicorn_app:application"],
        env={
            **os.environ,
            "PYTHONPATH": path,
            "GEYAMUX_TEST_PEER": str(peer.server.server_port),
            "GEYAMUX_TEST_BIND": f"127.0.0.1:{port}",
            **environment,
        },
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    try:
        yield child, port
    finally:
        with contextlib.suppress(ProcessLookupError):
            child.terminate()
        if wait(child) is None:
            child.kill()
            child.wait()
        child.stdout.close()


def wait_for_the_end_of(peer: Peer, pid: int) -> BaseException | None:
    name = f"worker {pid}"
    with gevent.Timeout(PATIENCE, AssertionError(f"the session of {name} goes on")):
        while name not in peer.ended:
            gevent.sleep(0.01)
    return peer.ended[name]


@pytest.mark.slow
@pytest.mark.timeout(90)
def test_workers_come_and_go_and_the_masters_session_does_not_notice() -> None:
    peer = Peer()
    with contextlib.closing(peer), gunicorn(peer) as (child, port):
        first = ask_until(port, lambda pids: len(pids) == 2)
        peer.ask_the_master()

        victim = min(first)
        os.kill(victim, signal.SIGKILL)
        ended = wait_for_the_end_of(peer, victim)
        assert ended is None or isinstance(ended, SessionError)
        peer.ask_the_master()
        second = ask_until(port, lambda pids: len(pids - {victim}) == 2) - {victim}

        os.kill(child.pid, signal.SIGHUP)
        third = ask_until(port, lambda pids: len(pids - second) == 2) - second
        for pid in second:
            assert wait_for_the_end_of(peer, pid) is None
        peer.ask_the_master()

        os.kill(child.pid, signal.SIGTERM)
        assert wait(child) == 0
        for pid in third:
            assert wait_for_the_end_of(peer, pid) is None
        assert peer.master().join(PATIENCE)
        assert peer.master().exception is None
        peer.check()
        printed = child.stdout.read().decode()
        assert not [line for line in printed.splitlines() if "SIGKILL" not in line], printed


@pytest.mark.slow
@pytest.mark.timeout(60)
def test_workers_that_retire_after_some_requests_leave_in_good_order() -> None:
    peer = Peer()
    with contextlib.closing(peer), gunicorn(peer, GEYAMUX_TEST_MAX_REQUESTS="5") as (child, port):
        pids = ask_until(port, lambda pids: len(pids) >= 5)
        for pid in sorted(pids)[:3]:
            assert wait_for_the_end_of(peer, pid) is None
        peer.ask_the_master()
        peer.check()
        os.kill(child.pid, signal.SIGTERM)
        assert wait(child) == 0
        assert not child.stdout.read()
