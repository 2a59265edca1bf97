"""A soak run from begin to end: starts the three processes, watches them from outside, judges, and makes the report.

What the processes say about themselves comes in as messages; their memory and descriptors are read from /proc. From time
to time there is a quiet moment: the load stops, the sessions that live must become empty, then they are ended, and what
each process holds must be what it held in the beginning.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gevent
import trustme
from gevent import subprocess
from gevent.event import AsyncResult, Event

from .ledger import Ledger
from .trend import Sample, judge, warmed_up

ROOT = Path(__file__).resolve().parents[2]
_MIB = 1 << 20
_PAGE = os.sysconf("SC_PAGE_SIZE")
#: What a process may grow by in a long run, and in one that is too short to have warmed up.
LONG_GROWTH = 4 * _MIB
SHORT_GROWTH = 16 * _MIB
#: From here on a run is long, in minutes.
LONG = 10.0
#: The warm-up: so much of the time, but in a shorter run not less than this, in seconds, or a third.
WARM_UP = 0.1
LEAST_WARM_UP = 60.0
#: The middle number of descriptors may move by so many: connections come and go.
DESCRIPTOR_GROWTH = 8
#: In which a process must answer an order, beyond what it may take itself.
ANSWER = 90.0
_PROGRESS = 10.0


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What is run."""

    minutes: float
    seed: int = 1
    tls: bool = False
    #: Connections at once, greenlets that open streams on each, and the mean time until one is cut.
    connections: int = 4
    workers: int = 8
    mean: float = 4.0
    #: Seeded faults of the server.
    faults: tuple[str, ...] = ()
    echo: Callable[[str], None] = print


class Child:
    """One of the processes."""

    def __init__(self, run: Run, name: str, arguments: list[str]) -> None:
        self.name = name
        self._run = run
        #: (seconds, bytes) and (seconds, descriptors).
        self.memory: list[Sample] = []
        self.descriptors: list[Sample] = []
        #: What came last, by kind.
        self.last: dict[str, dict[str, Any]] = {}
        self._waited: dict[str, AsyncResult[dict[str, Any]]] = {}
        self.is_stopping = False
        self.process = subprocess.Popen(
            [sys.executable, "-W", "error", "-m", *arguments],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        # Any: pipes were asked for, so none of these is None.
        self._stdin: Any = self.process.stdin
        self._stdout: Any = self.process.stdout
        self._stderr: Any = self.process.stderr
        self._readers = [gevent.spawn(self._read), gevent.spawn(self._read_errors)]

    def order(self, do: str) -> None:
        with contextlib.suppress(OSError, ValueError):
            self._stdin.write(json.dumps({"do": do}).encode() + b"\n")
            self._stdin.flush()

    def ask(self, do: str, kind: str) -> dict[str, Any]:
        """Order something and wait for the answer."""
        waited = self.expect(kind)
        self.order(do)
        return self.answer(kind, waited)

    def expect(self, kind: str) -> AsyncResult[dict[str, Any]]:
        waited: AsyncResult[dict[str, Any]] = AsyncResult()
        self._waited[kind] = waited
        return waited

    def answer(self, kind: str, waited: AsyncResult[dict[str, Any]]) -> dict[str, Any]:
        try:
            return waited.get(timeout=ANSWER) or {}
        except gevent.Timeout:
            self._run.fault(f"{self.name}: no answer", kind)
            return {}

    def sample(self, now: float) -> None:
        """Note memory and descriptors, as the system sees them."""
        with contextlib.suppress(OSError):
            pages = Path(f"/proc/{self.process.pid}/statm").read_text().split()[1]
            self.memory.append((now, int(pages) * _PAGE))
            self.descriptors.append((now, len(os.listdir(f"/proc/{self.process.pid}/fd"))))

    def stop(self) -> None:
        """End it by the end of its stdin, and if that does not help, by force."""
        self.is_stopping = True
        with contextlib.suppress(OSError):
            self._stdin.close()
        try:
            code = self.process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self._run.fault(f"{self.name}: did not end")
            self.process.kill()
            code = self.process.wait()
        gevent.joinall(self._readers)
        self._stdout.close()
        self._stderr.close()
        if code:
            self._run.fault(f"{self.name}: exit status {code}")

    def _read(self) -> None:
        for line in self._stdout:
            message = json.loads(line)
            kind = message["kind"]
            if kind == "stream":
                self._run.on_stream(message["record"])
            elif kind == "cut":
                self._run.ledger.cut(message["session"], time.monotonic())
            elif kind == "fault":
                self._run.fault(f"{self.name}: {message['what']}", message["detail"])
            else:
                self.last[kind] = message
                if kind in self._waited:
                    self._waited.pop(kind).set(message)
        if not self.is_stopping:
            self._run.fault(f"{self.name}: ended by itself")
            self._run.over.set()
        for waited in self._waited.values():
            waited.set({})

    def _read_errors(self) -> None:
        for line in self._stderr:
            self._run.fault(f"{self.name}: printed on stderr", line.decode(errors="replace"))


class Run:
    """See the module."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.ledger = Ledger()
        self.faults: Counter[str] = Counter()
        #: The first details of each.
        self.details: list[str] = []
        #: Something ended that must not.
        self.over = Event()
        self.children: dict[str, Child] = {}
        self.quiet_moments = 0
        self._began = 0.0
        #: What samples and shows progress.
        self._helpers: list[gevent.Greenlet[..., Any]] = []

    def run(self) -> dict[str, Any]:
        """Everything; returns the report. A run has passed where ``report["faults"]`` is empty."""
        with self._started():
            self._began = time.monotonic()
            self._helpers = [gevent.spawn(self._sample), gevent.spawn(self._show_progress)]
            seconds = self.settings.minutes * 60
            every = min(max(seconds / 3, 5.0), 60.0)
            while (left := self._began + seconds - time.monotonic()) > 0 and not self.over.is_set():
                self._order_load()
                # A rest too short for a load of its own is part of this one.
                self.over.wait(left if left < every * 1.5 else every)
                self._be_quiet()
            for child in self.children.values():
                child.ask("counts", "counts")
            self._judge()
            report = self._report()
            gevent.killall(self._helpers)
        report["faults"] = dict(self.faults)
        report["details"] = self.details
        return report

    def fault(self, what: str, detail: str = "") -> None:
        """Something that must not happen has happened."""
        self.faults[what] += 1
        if self.faults[what] <= 3:
            self.details.append(f"{what}: {detail}")
            self.settings.echo(f"FAULT  {what}: {detail}".rstrip(": "))

    def on_stream(self, record: dict[str, Any]) -> None:
        for wrong in self.ledger.add(record, time.monotonic()):
            self._stream_fault(wrong)

    def _stream_fault(self, wrong: str) -> None:
        self.fault("ledger: " + wrong.split(": ")[1], wrong)

    # -- begin and end

    @contextlib.contextmanager
    def _started(self) -> Iterator[None]:
        settings = self.settings
        with tempfile.TemporaryDirectory() as directory:
            try:
                if settings.tls:
                    _make_certificates(directory)
                peer = {
                    "tls": directory if settings.tls else "", "connections": settings.connections, "faults": [],
                    "seed": settings.seed, "workers": settings.workers,
                }  # fmt: skip
                server = {**peer, "side": "server", "faults": settings.faults, "workers": max(settings.workers // 3, 1)}
                port = self._start("server", "tests.soak.peer", json.dumps(server))
                kind = "tls" if settings.tls else "plain"
                port = self._start("relay", "tests.soak.relay", str(port), str(settings.seed), kind, str(settings.mean))
                client = {**peer, "side": "client", "port": port, "seed": settings.seed + 1}
                self._start("client", "tests.soak.peer", json.dumps(client))
                for name in ("client", "server"):
                    self.children[name].ask("part", "census")
                yield
            finally:
                gevent.killall(self._helpers)
                for name in ("client", "relay", "server"):
                    if name in self.children:
                        self.children[name].stop()

    def _start(self, name: str, *arguments: str) -> int:
        child = self.children[name] = Child(self, name, list(arguments))
        port: int = child.answer("ready", child.expect("ready")).get("port", 0)
        return port

    def _order_load(self) -> None:
        for child in self._peers():
            child.order("load")

    def _peers(self) -> list[Child]:
        return [self.children["client"], self.children["server"]]

    def _be_quiet(self) -> None:
        """Stop the load; nothing may be left in what lives; end all sessions; nothing may be left at all."""
        self.quiet_moments += 1
        waited = [(child, child.expect("calm")) for child in self._peers()]
        for child in self._peers():
            child.order("calm")
        for child, result in waited:
            for left in child.answer("calm", result).get("left", ()):
                self.fault(f"{child.name}: left over when quiet", left)
        for child in self._peers():
            answer = child.ask("part", "census")
            if answer and answer["census"] != answer["expected"]:
                self.fault(f"{child.name}: holds more when quiet", f"{answer['census']}, at first {answer['expected']}")
        for wrong in self.ledger.expire(time.monotonic()):
            self._stream_fault(wrong)

    # -- watching

    def _sample(self) -> None:
        while True:
            now = time.monotonic() - self._began
            for child in self.children.values():
                child.sample(now)
            gevent.sleep(1.0)

    def _show_progress(self) -> None:
        while True:
            gevent.sleep(_PROGRESS)
            for child in self.children.values():
                child.order("counts")
            gevent.sleep(0.5)
            self.settings.echo(self._progress())

    def _progress(self) -> str:
        counts = self._counts()
        known = [child for child in self.children.values() if child.memory]
        memory = " ".join(f"{child.name} {child.memory[-1][1] / _MIB:.1f} MiB" for child in known)
        cuts = sum(self.children["relay"].last.get("counts", {}).get("cuts", {}).values())
        return (
            f"{time.monotonic() - self._began:6.0f} s  {counts['bytes read'] / _MIB:.0f} MiB  "
            f"{counts['streams ended']} streams  {counts['calls answered']} calls  {cuts} cuts  "
            f"{counts['connected']} connections  {memory}  "
            f"{sum(self.faults.values())} faults"
        )

    def _counts(self) -> Counter[str]:
        """Of both peers together."""
        counts: Counter[str] = Counter()
        for child in self._peers():
            counts.update(child.last.get("counts", {}).get("counts", {}))
        return counts

    # -- the end

    def _judge(self) -> None:
        is_long = self.settings.minutes >= LONG
        least = min(LEAST_WARM_UP, self.settings.minutes * 20)
        for child in self.children.values():
            memory = warmed_up(child.memory, WARM_UP, least)
            descriptors = warmed_up(child.descriptors, WARM_UP, least)
            for wrong in (
                *judge(f"{child.name}: memory", memory, LONG_GROWTH if is_long else SHORT_GROWTH),
                *judge(f"{child.name}: descriptors", descriptors, DESCRIPTOR_GROWTH),
            ):
                self.fault(wrong.split(" by ")[0], wrong)

    def _report(self) -> dict[str, Any]:
        counts = self._counts()
        relay = self.children["relay"].last.get("counts", {})
        return {
            "seconds": time.monotonic() - self._began,
            "seed": self.settings.seed,
            "tls": self.settings.tls,
            "cuts": relay.get("cuts", {}),
            "bytes forwarded": relay.get("forwarded", 0),
            "counts": dict(sorted(counts.items())),
            "streams compared": dict(self.ledger.counts),
            "quiet moments": self.quiet_moments,
            "worst lag": {child.name: child.last.get("counts", {}).get("lag") for child in self._peers()},
            "memory": {child.name: _series(child.memory) for child in self.children.values()},
            "descriptors": {child.name: _series(child.descriptors) for child in self.children.values()},
            "census": {child.name: child.last.get("census", {}).get("census") for child in self._peers()},
        }


def _series(samples: list[Sample]) -> dict[str, float]:
    """The first after the warm-up, the last, and the highest of all."""
    warm = warmed_up(samples, WARM_UP) or [(0.0, 0.0)]
    return {
        "first": warm[0][1],
        "last": warm[-1][1],
        "peak": max(value for _, value in samples or warm),
    }


def _make_certificates(directory: str) -> None:
    authority = trustme.CA()
    authority.cert_pem.write_to_path(os.path.join(directory, "authority.pem"))
    authority.issue_cert("localhost").private_key_and_cert_chain_pem.write_to_path(os.path.join(directory, "server.pem"))
