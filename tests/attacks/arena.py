"""Where an attack is fought: server, other client, plain echo and attacker, a process each; and the bounds.

Everything here is plain blocking code: what is measured runs in the children.
"""

from __future__ import annotations

import importlib.util
import json
import os
import select
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from .catalogue import Attack

MIB = 1 << 20
#: What a server may use above its idle size, and besides where nobody reads what comes.
MEMORY = 64 * MIB
RECEIVE_BUDGET = 64 * MIB
#: Of the honest client, at the 99th percentile.
ROUND_TRIP = 0.020
#: Fewer say nothing about a percentile.
ROUND_TRIPS = 200
#: Of the honest client, at all: a stall of the hub that a percentile would hide.
STALL = 0.250
#: An attack is kept up for so long at least.
SECONDS = 1.0
#: ... where it is attacked once more.
SECONDS_AGAIN = 5.0
#: After it everything must be as before within so long: a session that ends waits up to 5 s for its peer.
RECOVERY = 8.0
#: Above the idle size, when the attacker has gone and free memory was given back. What pins it is scattered, not held.
LEFT_OVER = 16 * MIB
#: The other client gets its round trips within so long, or there are too few of them.
LONGEST = 6.0
PATIENCE = 60.0

TESTS = Path(__file__).resolve().parent.parent


class Child:
    """A process of ours that answers lines with lines of JSON."""

    def __init__(self, module: str, *arguments: object) -> None:
        found = importlib.util.find_spec("geyamux")
        assert found is not None and found.origin is not None
        path = os.pathsep.join([str(TESTS), str(Path(found.origin).parent.parent)])
        self.process = subprocess.Popen(
            [sys.executable, "-m", f"attacks.{module}", *map(str, arguments)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": path},
        )
        self._rest = b""

    def __enter__(self) -> Child:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.process.kill()
        self.process.wait()
        assert self.process.stdin is not None and self.process.stdout is not None
        with suppress(BrokenPipeError):
            self.process.stdin.close()
        self.process.stdout.close()

    def ask(self, line: str) -> Any:
        assert self.process.stdin is not None
        self.process.stdin.write(line.encode() + b"\n")
        self.process.stdin.flush()
        return self.hear()

    def hear(self) -> Any:
        assert self.process.stdout is not None
        deadline = time.monotonic() + PATIENCE
        while b"\n" not in self._rest:
            left = max(0.0, deadline - time.monotonic())
            if not select.select([self.process.stdout], [], [], left)[0]:
                raise TimeoutError(f"{self.process.args!r} says nothing")
            data = os.read(self.process.stdout.fileno(), 65536)
            if not data:
                raise EOFError(f"{self.process.args!r} has ended, code {self.process.wait()}")
            self._rest += data
        line, _, self._rest = self._rest.partition(b"\n")
        return json.loads(line)

    # -- memory

    def rss(self) -> int:
        return self._status("VmRSS")

    def peak(self) -> int:
        """Since `forget_peak`."""
        return self._status("VmHWM")

    def forget_peak(self) -> None:
        Path(f"/proc/{self.process.pid}/clear_refs").write_text("5")

    def _status(self, name: str) -> int:
        for line in Path(f"/proc/{self.process.pid}/status").read_text().splitlines():
            key, _, value = line.partition(":")
            if key == name:
                return int(value.split()[0]) * 1024
        raise KeyError(name)


@dataclass
class Result:
    """What came of one attack, in bytes and seconds."""

    attack: Attack
    reads: bool
    memory: int
    rise: int
    left_over: int
    p50: float
    p99: float
    worst: float
    noise_p99: float
    noise_worst: float
    round_trips: int
    seen: dict[str, Any]
    before: dict[str, Any]
    after: dict[str, Any]
    recovered_in: float
    honest_error: str
    seconds: float

    @property
    def memory_bound(self) -> int:
        return MEMORY + (RECEIVE_BUDGET if self.attack.is_unread else 0)

    @property
    def protocol_errors(self) -> int:
        return int(self.after["protocol_errors"] - self.before["protocol_errors"])

    def faults(self) -> list[str]:
        """What is not as it must be; empty when all is well."""
        return [*self._bound_faults(), *self._end_faults(), *self._rest_faults()]

    def _bound_faults(self) -> Iterator[str]:
        if self.memory > self.memory_bound:
            yield f"memory: {self.memory / MIB:.1f} MiB above idle, {self.memory_bound / MIB:.0f} are allowed"
        if self.attack.rise is not None and self.rise > self.attack.rise * MIB:
            yield f"memory: {self.rise / MIB:.1f} MiB more than before, {self.attack.rise} are allowed here"
        if self.round_trips < ROUND_TRIPS:
            yield f"only {self.round_trips} round trips of the other client"
        if self.p99 > ROUND_TRIP:
            noise = self.noise_p99 * 1e3
            yield f"the other client's p99 is {self.p99 * 1e3:.1f} ms (the machine's own noise: {noise:.1f} ms)"
        if self.worst > STALL:
            yield f"the other client waited {self.worst * 1e3:.0f} ms once (noise: {self.noise_worst * 1e3:.0f} ms)"
        if self.left_over > LEFT_OVER:
            yield f"memory: {self.left_over / MIB:.1f} MiB above idle are still held after it"
        if self.honest_error:
            yield f"the other client failed: {self.honest_error}"

    def _end_faults(self) -> Iterator[str]:
        last, errors = self.seen["last"], self.protocol_errors
        if self.attack.ends is None:
            return
        if not self.attack.ends:
            if last["end"]:
                yield f"the session should live, but the attacker saw its end: {last}"
            if errors:
                yield f"the session should live: {self.after['last_error']}"
            if self.reads and self.attack.proves and self.seen["unproven"]:
                yield f"{self.seen['unproven']} of {self.seen['rounds']} sessions do not answer any more: {last}"
        elif errors < self.seen["rounds"]:
            yield f"{errors} protocol errors in {self.seen['rounds']} rounds"
        elif self.reads and set(self.seen["lasts"]) != {"GoAway 1"}:
            yield f"the last frames were {self.seen['lasts']}"
        elif self.reads and set(self.seen["ends"]) - {"end", "ConnectionResetError"}:
            yield f"the connections ended so: {self.seen['ends']}"

    def _rest_faults(self) -> Iterator[str]:
        for name in ("sessions", "greenlets", "descriptors", "streams", "unread", "queued"):
            allowed = self.before[name] + SLACK.get(name, 0)
            if self.after[name] > allowed:
                yield f"left over: {name} {self.after[name]}, before {self.before[name]}"


#: The honest client may have a stream or two under way.
SLACK = {"greenlets": 2, "streams": 2, "unread": 1024, "queued": 1024}


class Arena:
    """A server with an honest client, ready for attacks, one after the other."""

    def __init__(self, server: Child, honest: Child, ports: list[int]) -> None:
        self.server = server
        self.honest = honest
        self.ports = ports
        self.idle = server.rss()

    @classmethod
    @contextmanager
    def open(cls) -> Iterator[Arena]:
        with ExitStack() as stack:
            server = stack.enter_context(Child("server"))
            echo = stack.enter_context(Child("echo"))
            ports = server.hear()
            honest = stack.enter_context(Child("honest", ports[0], echo.hear()))
            honest.hear()
            time.sleep(0.3)  # the honest client's own traffic is part of the idle size
            server.ask("collect")
            yield cls(server, honest, ports)

    def fight(self, attack: Attack, reads: bool, seconds: float = SECONDS) -> Result:
        """Let it be attacked. Where a bound is broken, once more and for longer: that counts.

        The 99th percentile of 200 round trips is two of them; one full run of the garbage collector is more.
        """
        result = self._fight(attack, reads, seconds)
        return self._fight(attack, reads, SECONDS_AGAIN) if result.faults() else result

    def _fight(self, attack: Attack, reads: bool, seconds: float) -> Result:
        begun = time.monotonic()
        before = self.server.ask("report")
        rss = self.server.rss()
        self.server.forget_peak()
        self.honest.ask("begin")
        port = self.ports[1 if attack.never_accepts else 0]
        with Child("attacker", attack.name, port, "reads" if reads else "never") as attacker:
            self._keep_up(seconds)
            measured = self.honest.ask("end")
            seen = attacker.ask("stop")
        over = time.monotonic()
        after = self._recover(before)
        recovered_in = time.monotonic() - over
        peak = self.server.peak()
        self.server.ask("collect")
        rtt = sorted(measured["rtt"])
        return Result(
            attack=attack,
            reads=reads,
            memory=peak - self.idle,
            rise=peak - rss,
            left_over=self.server.rss() - self.idle,
            p50=percentile(rtt, 50),
            p99=percentile(rtt, 99),
            worst=rtt[-1] if rtt else float("inf"),
            noise_p99=percentile(sorted(measured["noise"]), 99),
            noise_worst=max(measured["noise"], default=float("inf")),
            round_trips=len(rtt),
            seen=seen,
            before=before,
            after=after,
            recovered_in=recovered_in,
            honest_error=measured["error"],
            seconds=time.monotonic() - begun,
        )

    def _keep_up(self, seconds: float) -> None:
        begun = time.monotonic()
        while True:
            passed = time.monotonic() - begun
            if passed > LONGEST or (passed > seconds and self.honest.ask("count") >= ROUND_TRIPS):
                return
            time.sleep(0.05)

    def _recover(self, before: dict[str, Any]) -> dict[str, Any]:
        deadline = time.monotonic() + RECOVERY
        while True:
            after: dict[str, Any] = self.server.ask("report")
            is_back = all(
                after[name] <= before[name] + SLACK.get(name, 0)
                for name in ("sessions", "greenlets", "descriptors", "streams")
            )
            if is_back or time.monotonic() > deadline:
                return after
            time.sleep(0.02)


def percentile(ordered: list[float], which: int) -> float:
    if len(ordered) < 2:
        return float("inf")
    return statistics.quantiles(ordered, n=100, method="inclusive")[which - 1]
