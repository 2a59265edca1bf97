"""gunicorn as it is run in earnest, its backend, and clients: what the tests of this directory stage.

The backend runs in the process of the tests, gunicorn and its workers in processes of their own. gunicorn gets its
listening socket from here, so that a client may connect at any time, before the first worker is up, too.
"""

from __future__ import annotations

import contextlib
import http.client
import io
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import gevent
from gevent import socket as gsocket

from geyamux.pywsgi import WSGIServer
from support.waiting import wait_for

HERE = pathlib.Path(__file__).resolve().parent
ROOT = HERE.parents[1]
PATIENCE = 20.0


class Gunicorn:
    """A running gunicorn."""

    def __init__(self, process: subprocess.Popen[bytes], port: int, log: pathlib.Path) -> None:
        self.process = process
        self.port = port
        self._log = log

    def signal(self, number: int) -> None:
        """Tell the master."""
        os.kill(self.process.pid, number)

    def wait(self) -> int | None:
        """The exit code; None if it does not end."""
        deadline = time.monotonic() + PATIENCE
        while (code := self.process.poll()) is None and time.monotonic() < deadline:
            gevent.sleep(0.01)
        return code

    def log(self) -> str:
        """What it and its workers have said, warnings and worse."""
        return self._log.read_text()


@contextlib.contextmanager
def gunicorn(log: pathlib.Path, *arguments: str, **environment: str) -> Iterator[Gunicorn]:
    """Run it with two gevent workers from the directory of the examples, until the end of the block.

    At the end it is told to hurry. A worker that is just beginning hears nothing of that, and is killed by its master
    after the graceful timeout.
    """
    with socket.create_server(("127.0.0.1", 0), backlog=256) as listener, log.open("wb") as output:
        number, port = listener.fileno(), listener.getsockname()[1]
        process = subprocess.Popen(
            [
                *(sys.executable, "-W", "ignore", "-m", "gunicorn", "--bind", f"fd://{number}", "-k", "gevent"),
                *("--workers", "2", "--log-level", "warning", "--graceful-timeout", "3", "--no-control-socket"),
                *arguments,
            ],
            cwd=ROOT / "examples",
            env={**os.environ, "PYTHONPATH": os.pathsep.join((str(ROOT), str(HERE))), **environment},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            pass_fds=(number,),
        )
    running = Gunicorn(process, port, log)
    try:
        yield running
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.send_signal(signal.SIGINT)
        if running.wait() is None:
            process.kill()
            process.wait()


class Answer:
    """What a client got."""

    def __init__(self, response: http.client.HTTPResponse, body: bytes) -> None:
        self.status = response.status
        self.reason = response.reason
        self.headers = response.headers
        self.body = body


@contextlib.contextmanager
def connection(sock: Any) -> Iterator[http.client.HTTPConnection]:
    """An HTTP connection over a socket or stream that is there."""
    made = http.client.HTTPConnection("127.0.0.1")
    made.sock = sock
    try:
        yield made
    finally:
        made.close()
        sock.close()


def dial(port: int) -> Any:
    """A gevent socket, connected."""
    return gsocket.create_connection(("127.0.0.1", port), timeout=PATIENCE)


def ask(port: int, path: str, method: str = "GET", **how: Any) -> Answer:
    """One request on a connection of its own."""
    with connection(dial(port)) as client:
        client.request(method, path, **how)
        response = client.getresponse()
        return Answer(response, response.read())


class Backend:
    """A WSGI application that is served over sessions, and what it saw."""

    def __init__(self, application: Callable[..., Iterable[bytes]]) -> None:
        self._application = application
        #: Of each session that brought a request, the ids of its streams.
        self.streams: dict[Any, list[int]] = {}
        self.errors = io.StringIO()
        self.server = WSGIServer(("127.0.0.1", 0), self.serve, log=None, error_log=self.errors)
        self.server.start()
        self.address = f"127.0.0.1:{self.server.server_port}"

    def serve(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        """Note whose request it is."""
        self.streams.setdefault(environ["geyamux.session"], []).append(environ["geyamux.stream"].stream_id)
        return self._application(environ, start_response)

    def living(self) -> set[Any]:
        """Sessions that have not ended."""
        return {session for session in self.streams if not session.closed}

    def __enter__(self) -> Backend:
        return self

    def __exit__(self, *exc: object) -> None:
        self.server.stop(timeout=PATIENCE)


class Callers:
    """Clients that ask one after the other, each request on a connection of its own; every answer must be right."""

    def __init__(self, ask_once: Callable[[], object], number: int = 4) -> None:
        self.answered = 0
        self._ask_once = ask_once
        self._stopping = False
        self._greenlets = [gevent.spawn(self._run) for _ in range(number)]

    def _run(self) -> None:
        while not self._stopping:
            self._ask_once()
            self.answered += 1
            gevent.sleep(0.005)

    def check(self) -> None:
        """Raise what one of them met."""
        for greenlet in self._greenlets:
            if greenlet.exception is not None:
                raise greenlet.exception

    def wait_until(self, true: Callable[[], object], what: str) -> None:
        """While they go on."""

        def is_true() -> object:
            self.check()
            return true()

        wait_for(is_true, what)

    def stop(self) -> None:
        """Let each finish what it began."""
        self._stopping = True
        gevent.joinall(self._greenlets, timeout=PATIENCE, raise_error=True)
        assert all(greenlet.dead for greenlet in self._greenlets)
