"""The measured processes: a server, a driver and perhaps the relay between them, pinned, asked, read from outside, ended.

It knows how to talk to a peer's program (the contract in README.md) and what Linux tells of a process, and nothing of
workloads. A process that hangs is a failure with a time, and none outlives the run: each ends with its standard input.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import selectors
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from .peers import ROOT, Program
from .workloads import LINK_RATE, LINK_ROUND_TRIP

START_SECONDS = 30.0
COMMAND_SECONDS = 120.0
#: After its standard input is closed.
LAST_SECONDS = 1.0
#: Of what a process said on its standard error, in the text of a failure.
LAST_WORDS = 300

Cpus = frozenset[int] | None


#: For personality(2).
_ADDR_NO_RANDOMIZE = 0x0040000
_libc = ctypes.CDLL(None)
#: Whether processes get memory at random addresses, as is usual. The branch predictor of a processor goes by addresses,
#: so two processes on one processor drive each other out of it, by more or by less as chance has it: up to a fifth of a
#: round trip, differently in each start. On two machines, where such programs run, that does not happen.
has_random_layout = False


def _prepare(cpus: Cpus) -> None:
    """In the child, before its program begins: Go takes the number of its threads from the processors."""
    if cpus is not None:
        os.sched_setaffinity(0, cpus)
    if not has_random_layout:
        _libc.personality(_ADDR_NO_RANDOMIZE)


class PeerFailed(Exception):
    """A program ended, hung, or answered with an error."""


class Child:
    """One process that talks in lines of JSON."""

    def __init__(self, argv: Iterable[str], env: Mapping[str, str], cpus: Cpus) -> None:
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115
        self._process = subprocess.Popen(
            list(argv),
            cwd=ROOT,
            env={**os.environ, **env},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            preexec_fn=lambda: _prepare(cpus),
            # An interrupt from the terminal is for the runner, which then ends this one.
            start_new_session=True,
        )
        self.pid = self._process.pid
        self._lines = b""

    def ask(self, command: Mapping[str, Any], timeout: float = COMMAND_SECONDS) -> dict[str, Any]:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(command).encode() + b"\n")
            self._process.stdin.flush()
        except OSError:
            raise PeerFailed(self._epitaph()) from None
        answer = self.answer(timeout)
        if "error" in answer:
            raise PeerFailed(answer["error"])
        return answer

    def answer(self, timeout: float) -> dict[str, Any]:
        """Return the next line that the program prints."""
        assert self._process.stdout is not None
        deadline = time.monotonic() + timeout
        with selectors.DefaultSelector() as selector:
            selector.register(self._process.stdout, selectors.EVENT_READ)
            while b"\n" not in self._lines:
                if not selector.select(max(0.0, deadline - time.monotonic())):
                    raise PeerFailed(f"no answer within {timeout:.0f} s")
                piece = os.read(self._process.stdout.fileno(), 65536)
                if not piece:
                    raise PeerFailed(self._epitaph())
                self._lines += piece
        line, _, self._lines = self._lines.partition(b"\n")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def _epitaph(self) -> str:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(LAST_SECONDS)
        self._errors.seek(0)
        words = self._errors.read().decode(errors="replace").strip()[-LAST_WORDS:]
        return f"the program ended with {self._process.poll()}: {words or 'no word'}"

    def cpu_seconds(self) -> float:
        """What its threads have run until now."""
        total = 0
        for thread in Path(f"/proc/{self.pid}/task").iterdir():
            with contextlib.suppress(OSError):  # it has just ended
                total += int((thread / "schedstat").read_text().split()[0])
        return total / 1e9

    def rss(self) -> int:
        return self._status("VmRSS")

    def peak_rss(self) -> int:
        return self._status("VmHWM")

    def _status(self, name: str) -> int:
        for line in Path(f"/proc/{self.pid}/status").read_text().splitlines():
            if line.startswith(f"{name}:"):
                return int(line.split()[1]) * 1024
        raise PeerFailed(self._epitaph())

    def stop(self) -> None:
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()
        try:
            self._process.wait(LAST_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._errors.close()


class Pair:
    """A server and a driver of one peer, with nothing or the relay between them."""

    def __init__(self, program: Program, pin: str, certificates: tuple[Path, Path] | None, relay: bool) -> None:
        self._children: list[Child] = []
        server_cpus, driver_cpus = placement(pin)
        of_server, of_driver = ([], []) if certificates is None else (["--tls", str(p)] for p in certificates)
        try:
            self.server = self._start([*program.argv, "serve", *of_server], program.env, server_cpus)
            port = self.server.answer(START_SECONDS)["port"]
            if relay:
                port = self._start(_relay_argv(port), {}, None).answer(START_SECONDS)["port"]
            drive = [*program.argv, "drive", "--port", str(port), *of_driver]
            self.driver = self._start(drive, program.env, driver_cpus)
            self.base = {"driver": 0, "server": 0}
        except BaseException:
            self.stop()
            raise

    def _start(self, argv: list[str], env: Mapping[str, str], cpus: Cpus) -> Child:
        child = Child(argv, env, cpus)
        self._children.append(child)
        return child

    def measure(self, command: Mapping[str, Any]) -> dict[str, Any]:
        """Run the command; return the answer, and what the two processes used of processor and memory."""
        before, rss = self._read(Child.cpu_seconds), self._read(Child.rss)
        if not self.base["server"]:
            self.base = rss
        answer = self.driver.ask(command)
        # While idle streams are held; elsewhere it makes no difference.
        after, rss_after = self._read(Child.cpu_seconds), self._read(Child.rss)
        return {
            **answer,
            "cpu": {side: round(after[side] - before[side], 6) for side in after},
            "grown": {side: rss_after[side] - rss[side] for side in rss},
            "rss": rss_after,
            "peak": self._read(Child.peak_rss),
            "base": self.base,
        }

    def _read(self, what: Any) -> dict[str, Any]:
        return {"driver": what(self.driver), "server": what(self.server)}

    def stop(self) -> None:
        for child in reversed(self._children):
            child.stop()


def placement(pin: str) -> tuple[Cpus, Cpus]:
    """Return where the server and the driver may run. With one processor there is no splitting."""
    if pin == "none":
        return None, None
    first, *others = sorted(os.sched_getaffinity(0))
    second = others[0] if pin == "split" and others else first
    return frozenset({first}), frozenset({second})


def _relay_argv(port: int) -> list[str]:
    arguments = ["--port", str(port), "--rate", str(LINK_RATE), "--delay", str(LINK_ROUND_TRIP / 2)]
    return [sys.executable, "-m", "benchmarks.relay", *arguments]
