"""Run every attack and print what came of it as a table: ``python -m tests.attacks [-k NAME] [--json FILE]``."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from .arena import MIB, SECONDS, Arena, Result
from .catalogue import ATTACKS

HEAD = ("attack", "what happens", "memory above idle (MiB)", "other client's p99 (ms)", "test")

OUTCOMES = {
    True: "GoAway(1), then the end",
    False: "the session lives",
    None: "the session lives, or GoAway(1) where it outpaces the accepts",
}


def row(result: Result) -> tuple[str, ...]:
    happens = OUTCOMES[result.attack.ends]
    reading = "reads" if result.reads else "never reads"
    return (
        f"{result.attack.title}; attacker {reading}",
        happens,
        f"{max(0, result.memory) / MIB:.1f}",
        f"{result.p99 * 1e3:.1f}",
        f"`tests/attacks/ -k {result.attack.name}`",
    )


def line(cells: tuple[str, ...]) -> str:
    return "| " + " | ".join(cells) + " |"


def figures(result: Result) -> dict[str, object]:
    """For --json: everything that was measured, MiB and milliseconds."""
    return {
        "attack": result.attack.name,
        "title": result.attack.title,
        "reads": result.reads,
        "ends": result.attack.ends,
        "memory_mib": round(result.memory / MIB, 2),
        "memory_left_mib": round(result.left_over / MIB, 2),
        "p50_ms": round(result.p50 * 1e3, 2),
        "p99_ms": round(result.p99 * 1e3, 2),
        "worst_ms": round(result.worst * 1e3, 2),
        "noise_p99_ms": round(result.noise_p99 * 1e3, 2),
        "noise_worst_ms": round(result.noise_worst * 1e3, 2),
        "round_trips": result.round_trips,
        "rounds": result.seen["rounds"],
        "log_lines": result.after["log_lines"] - result.before["log_lines"],
        "last_error": result.after["last_error"] if result.protocol_errors else "",
        "recovered_in_s": round(result.recovered_in, 2),
        "seconds": round(result.seconds, 2),
        "seen": result.seen["last"],
        "faults": result.faults(),
    }


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.attacks", description=__doc__)
    parser.add_argument("-k", metavar="NAME", default="", help="only attacks whose name contains this")
    parser.add_argument("--json", metavar="FILE", type=Path, help="write all figures there")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="keep each attack up for so long, at least")
    parser.add_argument("--verbose", action="store_true", help="a line of all figures for each, as it ends")
    options = parser.parse_args()
    results: list[Result] = []
    print(line(HEAD), line(("---",) * len(HEAD)), sep="\n", flush=True)
    with Arena.open() as arena:
        for attack in ATTACKS.values():
            for reads in (True, False):
                if options.k not in attack.name:
                    continue
                result = arena.fight(attack, reads, options.seconds)
                results.append(result)
                print(line(row(result)), flush=True)
                if options.verbose:
                    print(json.dumps(figures(result)), file=sys.stderr, flush=True)
    if options.json is not None:
        options.json.write_text(json.dumps([figures(result) for result in results], indent=1) + "\n")
    failed = [(result, fault) for result in results for fault in result.faults()]
    for result, fault in failed:
        print(f"{result.attack.name}, {'reads' if result.reads else 'never reads'}: {fault}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
