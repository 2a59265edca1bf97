"""Several of backend.py, seen from the test."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import geyamux

_ENVIRONMENT = {**os.environ, "PYTHONPATH": str(Path(geyamux.__file__).parent.parent)}
_SCRIPT = str(Path(__file__).with_name("backend.py"))


class Backends:
    """Processes that listen, by their names."""

    def __init__(self) -> None:
        self.processes: dict[str, subprocess.Popen[str]] = {}
        self.ports: dict[str, int] = {}

    def start(self, *words: str) -> None:
        """One more; `words` are its arguments, its name first. Does not wait for it."""
        command = [sys.executable, _SCRIPT, *words]
        self.processes[words[0]] = subprocess.Popen(
            command, env=_ENVIRONMENT, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True
        )

    def wait(self) -> None:
        """Return when all of them listen."""
        for name, process in self.processes.items():
            if name not in self.ports:
                assert process.stdout is not None
                line = process.stdout.readline()
                assert line, f"{name} ended with exit code {process.wait()}"
                self.ports[name] = int(line)

    def end(self) -> None:
        for process in self.processes.values():
            process.kill()
        for process in self.processes.values():
            process.communicate()


@contextlib.contextmanager
def started(count: int) -> Iterator[Backends]:
    """So many, each on a port of its own."""
    backends = Backends()
    try:
        for number in range(count):
            backends.start(f"backend{number}", "0")
        backends.wait()
        yield backends
    finally:
        backends.end()


@contextlib.contextmanager
def sharing_a_port(count: int) -> Iterator[tuple[int, Backends]]:
    """So many, all on one port, which is returned too."""
    backends = Backends()
    try:
        backends.start("backend0", "0", "--share")
        backends.wait()
        port = backends.ports["backend0"]
        for number in range(1, count):
            backends.start(f"backend{number}", str(port), "--share")
        backends.wait()
        yield port, backends
    finally:
        backends.end()
