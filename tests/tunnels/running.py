"""Tunnels as child processes: `geyamux forward` and the program of go/, both known by the lines that they write.

A `Child` is ended by whoever started it, at the latest by `Children.end()`; a test that fails finds its log there.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import gevent
from gevent import subprocess
from gevent.event import Event

import geyamux
from support.waiting import PATIENCE

GEYAMUX = (sys.executable, "-m", "geyamux")
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(Path(geyamux.__file__).parent.parent)}

ChildType = TypeVar("ChildType", bound="Child")


class Child:
    """A process whose log, lines on `standard error` or another of its outputs, is read as it comes."""

    def __init__(self, command: Sequence[str], *, log: str = "stderr", **options: Any) -> None:
        options = {"stdin": subprocess.DEVNULL, "env": ENVIRONMENT, **options, log: subprocess.PIPE}
        self.command = list(command)
        self.lines: list[str] = []
        self.process = subprocess.Popen(self.command, **options)
        self.pid: int = self.process.pid
        self._untaken: list[str] = []
        self._more = Event()
        self._reader = gevent.spawn(self._read, getattr(self.process, log))
        self._reader.rawlink(lambda _: self._more.set())

    def wait_line(self, wanted: Callable[[str], object], what: str) -> str:
        """Wait for a line that `wanted` is true of. Each line is taken once, in whatever order they come."""
        with contextlib.suppress(gevent.Timeout), gevent.Timeout(PATIENCE):
            ended = False
            while not ended:
                ended = self._reader.dead
                for line in self._untaken:
                    if wanted(line):
                        self._untaken.remove(line)
                        return line
                self._more.clear()
                if not ended:
                    self._more.wait()
        raise AssertionError(f"no line about {what}\n{self}")

    def terminate(self) -> None:
        self.process.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """End it at once, if it has not ended."""
        if self.process.poll() is None:
            self.process.kill()
        self._leave()

    def wait(self, code: int = 0) -> None:
        """Wait for its end, which must be with that exit code."""
        with gevent.Timeout(PATIENCE, AssertionError(f"it does not end\n{self}")):
            self._leave()
        assert self.process.returncode == code, f"exit code {self.process.returncode}\n{self}"

    def stop(self) -> None:
        """End it in good order."""
        self.terminate()
        self.wait()

    def _leave(self) -> None:
        self.process.wait()
        self._reader.join()

    def _read(self, output: Any) -> None:
        with output:
            for line in output:
                text = line.decode(errors="replace").rstrip()
                self.lines.append(text)
                self._untaken.append(text)
                self._more.set()

    def __str__(self) -> str:
        return "\n    ".join([f"log of {' '.join(self.command)}:", *self.lines])


class Forward(Child):
    """`geyamux forward` with these options."""

    def __init__(self, *words: str, **options: Any) -> None:
        super().__init__([*GEYAMUX, "forward", "--json", *words], **options)

    def event(self, name: str, **fields: object) -> dict[str, Any]:
        """Wait for the next event of that name with these fields."""

        def wanted(line: str) -> bool:
            entry = json.loads(line) if line.startswith("{") else {}
            return entry.get("event") == name and fields.items() <= entry.items()

        found: dict[str, Any] = json.loads(self.wait_line(wanted, f"{name} {fields or ''}"))
        return found

    def listening(self, what: str) -> str:
        """The address of its "trunk", or of its "from". To be asked once for each."""
        return str(self.event("listening", what=what)["address"])


class GoTunnel(Child):
    """The program of go/: its path, what it is to be, the trunk's address, that of the connections."""

    def __init__(self, program: str, command: str, trunk: str, address: str) -> None:
        super().__init__([program, command, trunk, address], log="stdout")

    def event(self, name: str) -> list[str]:
        """Wait for the next line that begins so, and return its words."""
        return self.wait_line(lambda line: f"{line} ".startswith(f"{name} "), name).split()

    def listening(self, what: str) -> str:
        return self.event(f"listening {what}")[2]


class Children:
    """All that a test has started."""

    def __init__(self) -> None:
        self._all: list[Child] = []

    def start(self, kind: Callable[..., ChildType], *words: Any, **options: Any) -> ChildType:
        child = kind(*words, **options)
        self._all.append(child)
        return child

    def forward(self, *words: str, **options: Any) -> Forward:
        return self.start(Forward, *words, **options)

    def end(self) -> None:
        for child in reversed(self._all):
            child.kill()
            print(child)


def descendants(pid: int) -> set[int]:
    """The processes that this one has started, and those that they have."""
    try:
        children = {int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()}
    except FileNotFoundError:
        return set()
    return children.union(*map(descendants, children))


def alive(pid: int) -> bool:
    """Whether there is such a process, and not just its exit code."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False
