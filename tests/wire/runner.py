"""Run checks against a server, several at a time, and tell what came of it."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from . import check_closing, check_ending, check_framing, check_opening, check_pings, check_windows
from .frames import FIN, update
from .peer import Failed, Peer, Setting
from .registry import CHECKS, FAIL, LEVELS, NOT_APPLICABLE, PASS, Check, Result, run

#: Importing them fills the list.
MODULES = (check_framing, check_opening, check_windows, check_closing, check_pings, check_ending)


def select(words: Sequence[str] = ()) -> list[Check]:
    """The checks whose name or source has one of the words; all, without words."""
    return [
        entry
        for entry in CHECKS.values()
        if not words or any(word.lower() in f"{entry.name} {entry.source} {entry.level}".lower() for word in words)
    ]


def find_echo(setting: Setting) -> bool:
    """Whether the server sends back what it gets and ends its half behind ours. OSError where there is no server."""
    peer = Peer(setting)
    try:
        stream = peer.open(b"echo?")
        peer.expect_echo(stream, b"echo?")
        peer.send(update(stream, 0, FIN))
        peer.await_fin(stream)
    except Failed:
        return False
    finally:
        peer.close()
    return True


def run_all(checks: Sequence[Check], setting: Setting, jobs: int) -> Iterator[Result]:
    """Run them in threads; results come in the order of the checks."""
    has_echo = find_echo(setting)

    def one(entry: Check) -> Result:
        begin = time.monotonic()
        outcome, seen = run(entry, setting, has_echo=has_echo)
        seconds = round(time.monotonic() - begin, 3)
        return Result(entry.name, entry.level, entry.purpose, entry.source, outcome, seen, seconds)

    with ThreadPoolExecutor(jobs) as pool:
        yield from pool.map(one, checks)


def tell(result: Result) -> str:
    lines = [f"{result.outcome:4}  {result.level:6}  {result.name}", f"      {result.purpose} [{result.source}]"]
    if result.seen:
        lines.append(f"      {'seen' if result.outcome == FAIL else 'why'}: {result.seen}")
    return "\n".join(lines)


def summary(results: Sequence[Result]) -> str:
    lines = [f"{'':8}{PASS:>6}{FAIL:>6}{NOT_APPLICABLE:>6}"]
    for level in (*LEVELS, "all"):
        counts = [
            sum(result.outcome == outcome and level in (result.level, "all") for result in results)
            for outcome in (PASS, FAIL, NOT_APPLICABLE)
        ]
        lines.append(f"{level:8}" + "".join(f"{count:6}" for count in counts))
    return "\n".join(lines)


def write_json(results: Iterable[Result], path: Path) -> None:
    path.write_text(json.dumps([dataclasses.asdict(result) for result in results], indent=1) + "\n")
