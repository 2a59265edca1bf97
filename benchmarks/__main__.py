"""The command line: `python -m benchmarks run` measures, `python -m benchmarks list` tells what there is."""

from __future__ import annotations

import argparse
import signal
import sys
from pathlib import Path
from typing import Any

from . import processes, report, workloads
from .peers import PEERS, ROOT
from .runner import Run

ROUNDS = 5


def main() -> int:
    parser = _parser()
    arguments = parser.parse_args()
    if arguments.action == "list":
        return _list()
    # An end in good order, that takes the processes along.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("terminated"))
    try:
        return _run(arguments)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="Measure geyamux and its peers.")
    actions = parser.add_subparsers(dest="action", required=True)
    actions.add_parser("list", help="show the workloads and the peers")
    run = actions.add_parser("run", help="measure, and print figures, ratios and goals")
    run.add_argument("--peers", type=_peers, default=list(PEERS), help="the first one is the baseline (%(default)s)")
    run.add_argument("--workloads", type=_workloads, default=list(workloads.WORKLOADS), help="names, by commas (all)")
    run.add_argument("--rounds", type=_count, default=ROUNDS, help="beside the one that is thrown away (%(default)s)")
    run.add_argument("--pin", choices=("same", "split", "none"), help="the processors, for all (each has its own)")
    run.add_argument("--random-layout", action="store_true", help="memory at random addresses, as usual; less steady")
    run.add_argument("--scale", type=_scale, default=1.0, help="part of the work, or `small`: only to see it work")
    run.add_argument("--json", type=Path, metavar="FILE", help="write all samples there")
    run.add_argument("--plot", type=Path, metavar="FILE.svg", help="draw the ratios")
    run.add_argument("--readme", action="store_true", help="put the table between the marks in README.md")
    return parser


def _peers(text: str) -> list[str]:
    names = text.split(",")
    for name in names:
        if name not in PEERS:
            raise argparse.ArgumentTypeError(f"no peer {name!r}; there are {', '.join(PEERS)}")
    return list(dict.fromkeys(names))


def _workloads(text: str) -> list[workloads.Workload]:
    try:
        return workloads.select(text.split(","))
    except KeyError as unknown:
        raise argparse.ArgumentTypeError(f"no workload {unknown}; `list` shows them") from None


def _count(text: str) -> int:
    if (value := int(text)) < 1:
        raise argparse.ArgumentTypeError("at least 1")
    return value


def _scale(text: str) -> float:
    value = workloads.SMALL_SCALE if text == "small" else float(text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError("more than 0, up to 1")
    return value


def _list() -> int:
    for workload in workloads.WORKLOADS:
        print(f"{workload.name:<14} {workload.title:<50} pin {workload.pin}")
    for peer in PEERS.values():
        print(f"{peer.name:<14} {peer.label}")
    return 0


def _run(arguments: Any) -> int:
    if arguments.plot:
        # Before the measuring: what is missing shall be known then.
        from . import plot
    processes.has_random_layout = arguments.random_layout
    with Run(arguments.peers, arguments.rounds, arguments.scale, arguments.pin) as run:
        rows = run.run(arguments.workloads)
    result = report.Report.of(run, rows)
    print(result.text())
    if arguments.json:
        arguments.json.write_text(result.json() + "\n", encoding="utf-8")
    if arguments.plot:
        plot.draw(result, arguments.plot)
    if arguments.readme:
        report.put_into(ROOT / "README.md", result.markdown())
    return 0


if __name__ == "__main__":
    sys.exit(main())
