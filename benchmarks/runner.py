"""Runs workloads: prepares the peers, starts their pairs, goes round among them, collects the samples.

The peers are measured in turn within each round, and each round begins with another one: what the machine does in the
meantime strikes all of them. What it returns are samples; report.py makes figures and ratios of them.
"""

from __future__ import annotations

import contextlib
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .peers import PEERS, MissingPeer, Program
from .processes import Pair, PeerFailed
from .workloads import WARMUP_SHARE, Case, Workload

#: A new pair imports and compiles at its first command, and that shall not count as memory of streams.
FIRST_COMMAND = {"workload": "echo_latency", "count": 3, "size": 64, "warmup": 0}


@dataclass
class Row:
    """The samples of one case of a workload with one peer, by round; or why there are none."""

    workload: Workload
    case: Case
    peer: str
    pin: str
    samples: dict[int, dict[str, Any]] = field(default_factory=dict)
    missing: str | None = None


class Progress:
    """Says on the standard error what is being measured: on a terminal in one line, else once for each workload."""

    def __init__(self) -> None:
        self._is_terminal = sys.stderr.isatty()
        self._said = ""

    def say(self, headline: str, detail: str) -> None:
        if self._is_terminal:
            text = f"{headline}  {detail}"[:118]
            print(f"\r{text:<{len(self._said)}}", end="", file=sys.stderr, flush=True)
            self._said = text
        elif headline != self._said:
            print(headline, file=sys.stderr, flush=True)
            self._said = headline

    def end(self) -> None:
        if self._is_terminal and self._said:
            print(f"\r{'':<{len(self._said)}}\r", end="", file=sys.stderr, flush=True)


class Run:
    """One run of the suite. Make it in a `with` block: the programs and certificates live in a temporary directory."""

    def __init__(self, peers: Sequence[str], rounds: int, scale: float = 1.0, pin: str | None = None) -> None:
        self.peers = list(peers)
        self.rounds = rounds
        self.scale = scale
        self.pin = pin
        self.programs: dict[str, Program] = {}
        self.missing: dict[str, str] = {}
        self.progress = Progress()
        self._cleanup = contextlib.ExitStack()

    def __enter__(self) -> Run:
        with contextlib.ExitStack() as cleanup:
            self._directory = Path(cleanup.enter_context(tempfile.TemporaryDirectory(prefix="geyamux-benchmarks-")))
            self._prepare()
            self._cleanup = cleanup.pop_all()
        return self

    def __exit__(self, *exc: object) -> None:
        self._cleanup.close()
        self.progress.end()

    def _prepare(self) -> None:
        for name in self.peers:
            self.progress.say("preparing the peers", PEERS[name].label)
            try:
                self.programs[name] = PEERS[name].prepare(self._directory)
            except MissingPeer as missing:
                self.missing[name] = str(missing)
        try:
            self._certificates: tuple[Path, Path] | None = _make_certificates(self._directory)
        except ImportError:
            self._certificates = None

    def run(self, workloads: Iterable[Workload]) -> list[Row]:
        """Measure them one after the other."""
        chosen = list(workloads)
        rows = []
        for number, workload in enumerate(chosen, 1):
            headline = f"[{number}/{len(chosen)}] {workload.name}: {workload.title}"
            rows += self._run_workload(workload.scaled(self.scale), headline)
        return rows

    def _run_workload(self, workload: Workload, headline: str) -> list[Row]:
        pin = self.pin or workload.pin
        rows = [Row(workload, case, peer, pin) for case in workload.cases for peer in self.peers]
        for row in rows:
            row.missing = self._why_missing(row)
        pairs: dict[str, Pair] = {}
        try:
            for number, row in self._turns(workload, rows):
                which = "warm-up" if number < 0 else f"round {number + 1} of {self.rounds}"
                self.progress.say(headline, f"{which}, {row.peer} {row.case.label}")
                self._measure(row, number, pairs)
        finally:
            for pair in pairs.values():
                pair.stop()
        return rows

    def _why_missing(self, row: Row) -> str | None:
        workload, peer = row.workload, row.peer
        if peer in self.missing:
            return self.missing[peer]
        if peer in workload.cannot:
            return workload.cannot[peer]
        if workload.tls and self._certificates is None:
            return "no certificates: trustme is not installed (the extra `bench`)"
        return row.case.cannot.get(peer)

    def _turns(self, workload: Workload, rows: list[Row]) -> Iterator[tuple[int, Row]]:
        """Yield what to measure in which round; -1 is the warm-up."""
        for number in range(0 if workload.fresh else -1, self.rounds):
            shift = (number + 1) % len(self.peers)
            order = self.peers[shift:] + self.peers[:shift]
            for row in sorted(rows, key=lambda row: order.index(row.peer)):
                if row.missing is None:
                    yield number, row

    def _measure(self, row: Row, number: int, pairs: dict[str, Pair]) -> None:
        workload, share = row.workload, row.workload.shares.get(row.peer, 1.0)
        case = row.case.sized(share * (WARMUP_SHARE if number < 0 else 1.0))
        # Memory is not counted in shares, and a warm-up of it there is not.
        command = row.case.command if workload.fresh else case.command
        try:
            if row.peer not in pairs:
                certificates = self._certificates if workload.tls else None
                pairs[row.peer] = Pair(self.programs[row.peer], row.pin, certificates, workload.relay)
                pairs[row.peer].driver.ask(FIRST_COMMAND)
            sample = pairs[row.peer].measure(command)
            if number >= 0:
                row.samples[number] = sample
        except PeerFailed as failure:
            row.missing = f"failed: {failure}"
            row.samples.clear()
            self._let_go(row.peer, pairs)
        if workload.fresh:
            self._let_go(row.peer, pairs)

    @staticmethod
    def _let_go(peer: str, pairs: dict[str, Pair]) -> None:
        pair = pairs.pop(peer, None)
        if pair is not None:
            pair.stop()


def _make_certificates(directory: Path) -> tuple[Path, Path]:
    """Write a certificate with its key, and its authority; return the two paths."""
    import trustme

    authority = trustme.CA()
    own, trusted = directory / "server.pem", directory / "authority.pem"
    authority.issue_cert("localhost", "127.0.0.1").private_key_and_cert_chain_pem.write_to_path(str(own))
    authority.cert_pem.write_to_path(str(trusted))
    return own, trusted
