"""Run what the tests of real consumers need beside them: servers, the relay, and scenes; and end each by its own pid.

A `Process` is a server; `relay` starts `real_relay.py` in front of one or more of them; `play` runs a scene of a script
to its end and returns what it reports. Nothing here is monkey-patched, and nothing here knows a consumer.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

import geyamux

HERE = Path(__file__).parent
#: Below the time limit of a test, so that what a process said is shown.
PATIENCE = 25.0
#: Servers that Debian installs where no user's PATH leads.
SERVER_PATH = os.pathsep.join((os.environ.get("PATH", ""), "/usr/sbin", "/usr/local/sbin"))
ENVIRONMENT = {
    **os.environ,
    "PYTHONPATH": os.pathsep.join((str(Path(geyamux.__file__).parent.parent), str(HERE.parent))),
    # Of the libraries under test; what is to be seen here is seen by what they do.
    "PYTHONWARNINGS": "ignore",
}


def need_program(name: str, package: str, path: str = SERVER_PATH) -> str:
    """The path of a server's program; the test is skipped where it is not installed."""
    found = shutil.which(name, path=path)
    if found is None:
        pytest.skip(f"no {name} (Debian: {package})")
    return found


def has_library(distribution: str) -> bool:
    """Whether a library is installed. It is not imported here: this process is not monkey-patched."""
    try:
        importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def need_library(distribution: str) -> None:
    """Skip the test where a library is not installed."""
    if not has_library(distribution):
        pytest.skip(f"needs {distribution} (pip install {distribution})")


class Process:
    """A program that runs until the block is left. What it prints is kept for the message of a failure."""

    def __init__(
        self,
        command: Sequence[str],
        user: str | None = None,
        talks: bool = False,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        #: `talks`: its standard output is for us to read, and it ends when its standard input does.
        self._talks = talks
        self._log = tempfile.TemporaryFile()  # noqa: SIM115  # closed in __exit__
        self._process = subprocess.Popen(
            command,
            user=user,
            env={**ENVIRONMENT, **(environment or {})},
            stdin=subprocess.PIPE if talks else subprocess.DEVNULL,
            stdout=subprocess.PIPE if talks else self._log,
            stderr=self._log,
        )
        self.pid = self._process.pid

    def wait_until(self, ready: Callable[[], bool]) -> None:
        """Wait until a condition holds; fail with what was printed where it does not, or the process ends."""
        deadline = time.monotonic() + PATIENCE
        while not ready():
            if self._process.poll() is not None or time.monotonic() > deadline:
                pytest.fail(f"{self._process.args!r} is not ready:\n{self.printed()}")
            time.sleep(0.01)

    def read_json(self) -> Any:
        """The line that it says when it is ready."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line, f"{self._process.args!r} ended:\n{self.printed()}"
        return json.loads(line)

    def printed(self) -> str:
        """What went to its log."""
        self._log.seek(0)
        return self._log.read().decode(errors="replace")

    def __enter__(self) -> Process:
        return self

    def __exit__(self, *exc: object) -> None:
        if self._process.stdin is not None and self._process.stdout is not None:
            self._process.stdin.close()
            self._process.stdout.close()
        else:
            self._process.send_signal(signal.SIGTERM)
        try:
            self._process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._log.close()


class Relay:
    """A running relay; `options` are what a scene needs to know of it."""

    def __init__(self, pid: int, trunks: list[str]) -> None:
        self.trunks = trunks
        self.pid = pid

    @property
    def options(self) -> dict[str, Any]:
        """For `play`: the first trunk."""
        return {"trunk": self.trunks[0], "relay": self.pid}


@contextlib.contextmanager
def relay(*routes: str) -> Iterator[Relay]:
    """A relay process with these routes (see `real_relay`)."""
    command = [sys.executable, str(HERE / "real_relay.py"), *routes]
    with Process(command, talks=True) as process:
        yield Relay(process.pid, process.read_json())


def play(script: str, scene: str, **options: Any) -> dict[str, Any]:
    """Play one scene in a monkey-patched program of its own; return the facts that it reports."""
    settings = json.dumps({"scene": scene, **options})
    done = subprocess.run(
        [sys.executable, "-m", "gevent.monkey", str(HERE / script), settings],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )
    # A greenlet or thread that failed beside the scene says so there alone.
    assert done.returncode == 0 and "Traceback" not in done.stderr, f"{script}, {scene}: {done.returncode}\n{done.stderr}"
    facts: dict[str, Any] = json.loads(done.stdout)
    return facts


def connects(path: str) -> Callable[[], bool]:
    """A condition: something listens on the Unix socket."""
    return lambda: _is_open(socket.AF_UNIX, path)


def listens(port: int) -> Callable[[], bool]:
    """A condition: something listens on the port of loopback."""
    return lambda: _is_open(socket.AF_INET, ("127.0.0.1", port))


def _is_open(family: socket.AddressFamily, address: Any) -> bool:
    with contextlib.suppress(OSError), socket.socket(family) as probe:
        probe.connect(address)
        return True
    return False
