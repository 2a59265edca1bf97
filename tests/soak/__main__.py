"""Soak: mixed load between two processes, for as long as you like, through a link that is cut at random.

From the root of the repository::

    python -m tests.soak --minutes 30                       # the long run
    python -m tests.soak --minutes 30 --tls --json soak.json
    python -m tests.soak --minutes 2 --seed 7               # another one; a seed repeats the load, not its timing

Three processes: a client that reconnects with a small back-off, a server, and a relay between them. The relay resets,
ends, half closes, cuts inside a frame, goes silent, deaf in one direction, stops taking anything, or is slow or pauses
for a while, a few seconds after each connection began. Over it both ends open streams: bulk in both directions, calls on
short and on long streams, churn, half-closed streams, slow readers, resets with codes by either side, readers that
close under a writer; greenlets are killed and timed out in the middle of all that; sessions are closed, drained and
aborted while they are at it.

The run fails where

- a stream that ended with EOF was not exactly what its writer wrote and finished (SHA-256 of both ends, compared out of
  band), or one that was cut or given up looked complete, or one that was finished was reset for no reason;
- anything took longer than its configured limit, or an end did not notice in time that its link is dead;
- an error came that the API does not promise, a session ended with a protocol error (the link changes no byte), something
  was logged as an error, printed, or failed in the hub;
- at a quiet moment, once a minute, a live session was not empty, or, after all sessions had ended, a process held more
  sessions, streams, greenlets or descriptors than before the first;
- memory grew: after a warm-up (a tenth of the time, at least a minute or a third) neither the median of the last fifth of
  the samples may be more than 4 MiB above that of the first, nor may their trend rise by more; in runs of less than ten
  minutes it is 16 MiB.

Every ten seconds a line of progress is printed, at the end a report; the exit status is 0 where nothing failed. With
``--fault`` the server does something wrong, to show that the run notices.

It runs on Linux alone: memory and descriptors are read from /proc.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from .peer import FAULTS
from .run import Run, Settings

_MIB = 1 << 20


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.soak", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--minutes", type=float, default=30.0, help="how long; 30 left out")
    parser.add_argument("--seed", type=int, default=1, help="of all that is random")
    parser.add_argument("--tls", action="store_true", help="TLS between the two")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the report there")
    parser.add_argument("--connections", type=int, default=4, help="at once")
    parser.add_argument("--fault", action="append", default=[], choices=sorted(FAULTS), help="what the server does wrong")
    options = parser.parse_args()
    settings = Settings(
        minutes=options.minutes,
        seed=options.seed,
        tls=options.tls,
        # A short run needs each kind of cut, too.
        mean=min(4.0, options.minutes * 5),
        connections=options.connections,
        faults=tuple(options.fault),
        echo=lambda line: print(line, flush=True),
    )
    report = Run(settings).run()
    if options.json:
        options.json.write_text(json.dumps(report, indent=1) + "\n")
    print_report(report)
    return 1 if report["faults"] else 0


def print_report(report: dict[str, Any]) -> None:
    """For people."""
    counts = report["counts"]

    def total(prefix: str) -> str:
        found = {name[len(prefix) :]: number for name, number in counts.items() if name.startswith(prefix)}
        return ", ".join(f"{name} {number}" for name, number in sorted(found.items())) or "none"

    print(f"\nran {report['seconds']:.0f} s, seed {report['seed']}{', TLS' if report['tls'] else ''}")
    print(
        f"moved     {counts.get('bytes read', 0) / _MIB:.0f} MiB read, "
        f"{report['bytes forwarded'] / _MIB:.0f} MiB forwarded"
    )
    names = (
        "streams opened",
        "streams ended",
        "resets by the opener",
        "resets by the acceptor",
        "calls answered",
        "pings",
    )
    print("counted   " + ", ".join(f"{name} {counts.get(name, 0)}" for name in names))
    struck = ("kills", "gevent.Timeouts", "writes timed out and resumed", "reads struck by a timeout and repeated")
    print("struck    " + ", ".join(f"{name} {counts.get(name, 0)}" for name in struck))
    print("cuts      " + ", ".join(f"{name} {number}" for name, number in sorted(report["cuts"].items())))
    print(
        f"connected {counts.get('connected', 0)} times; sessions ended: {total('session ended: ')}; "
        f"by choice: {total('end: ')}"
    )
    print(f"uses      {total('done: ')}")
    print(f"errors    {total('error: ')}")
    print("ledger    " + ", ".join(f"{name} {number}" for name, number in sorted(report["streams compared"].items())))
    for name, series in report["memory"].items():
        files = report["descriptors"][name]
        print(
            f"{name:9} memory {series['first'] / _MIB:.1f} first, {series['last'] / _MIB:.1f} last, "
            f"{series['peak'] / _MIB:.1f} MiB peak; descriptors {files['first']:.0f} first, {files['last']:.0f} last, "
            f"{files['peak']:.0f} peak"
        )
    print(f"quiet     {report['quiet moments']} moments; held at the last: {report['census']}")
    print(f"lag       {report['worst lag']}")
    if not report["faults"]:
        print("PASSED")
    for what, number in report["faults"].items():
        print(f"FAILED    {number} x {what}")


if __name__ == "__main__":
    sys.exit(main())
