"""Makes figures, ratios and verdicts of the samples, and writes them as text, as JSON and as a Markdown table.

Ratios are made within a round and then summed up: what slowed the machine down in a round slowed down both. A ratio is
figure by figure, so 2.0 is good for a rate and bad for a time.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from . import processes
from .peers import PEERS
from .runner import Row, Run
from .workloads import GOALS, GROWTH_BASE, MIB, Figure, Goal, Workload

SUBJECT = "geyamux"
BEGIN, END = "<!-- benchmarks: begin -->", "<!-- benchmarks: end -->"
MISSING = "missing"


@dataclass(frozen=True)
class Spread:
    """The median of what the rounds gave, the least and the most."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Iterable[float]) -> Spread | None:
        known = list(values)
        return cls(statistics.median(known), min(known), max(known)) if known else None

    def __str__(self) -> str:
        return f"{number(self.median)} ({number(self.low)}-{number(self.high)})"


def number(value: float) -> str:
    """Write three digits or more, never as a power."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}" if abs(value) < 100 else f"{value:.0f}"


def values_of(row: Row, figure: Figure) -> dict[int, float]:
    """Return the figure of each round."""
    return {index: figure.read(sample) for index, sample in row.samples.items()}


def ratios(row: Row, other: Row, figure: Figure) -> Spread | None:
    """Return the figure of a row over that of another one, over the rounds that both have."""
    ours, theirs = values_of(row, figure), values_of(other, figure)
    return Spread.of(ours[index] / theirs[index] for index in ours if theirs.get(index))


@dataclass(frozen=True)
class Line:
    """A figure of a workload's case, with every peer."""

    workload: Workload
    case: str
    figure: Figure
    pin: str
    values: dict[str, Spread]
    ratios: dict[str, Spread]
    #: Growth: the ratio to the case GROWTH_BASE of the same peer.
    growth: dict[str, Spread]
    missing: dict[str, str]

    @property
    def name(self) -> str:
        parts = [self.workload.name, self.case, self.figure.name if len(self.workload.figures) > 1 else ""]
        return " ".join(part for part in parts if part)


@dataclass(frozen=True)
class Verdict:
    """What became of a goal: "aim", "must", "missed" or "not measured"."""

    goal: Goal
    state: str
    spread: Spread | None = None
    reason: str = ""

    def __str__(self) -> str:
        goal, sign = self.goal, "≤" if self.goal.at_most else "≥"
        against = f"{GROWTH_BASE} streams" if goal.growth else goal.against
        what = f"{goal.workload} {goal.figure}" + (f" / {against}" if against else "")
        bounds = f"must {sign} {number(goal.must)}" + ("" if goal.aim is None else f", aim {sign} {number(goal.aim)}")
        found = str(self.spread) if self.spread else self.reason
        words = {"aim": "met, with the aim" if goal.aim is not None else "met", "must": "met", "missed": "MISSED"}
        return f"{what:<30} {bounds:<28} {words.get(self.state, self.state):<18} {found}"


def judge(goal: Goal, rows: Sequence[Row]) -> Verdict:
    """Hold the goal against the rows, by the median."""
    mine = [row for row in rows if row.workload.name == goal.workload and row.peer == SUBJECT]
    if not mine:
        return Verdict(goal, "not measured", reason="not among the workloads and peers of this run")
    row = mine[-1]
    figure = next(figure for figure in row.workload.figures if figure.name == goal.figure)
    if goal.pin is not None and row.pin != goal.pin:
        return Verdict(goal, "not measured", reason=f"counts with --pin {goal.pin}")
    if goal.growth:
        others = [other for other in mine if other.case.label == GROWTH_BASE]
    else:
        others = [other for other in rows if other.workload is row.workload and other.peer == goal.against]
    if goal.against is None and not goal.growth:
        spread = Spread.of(values_of(row, figure).values())
    else:
        spread = ratios(row, others[0], figure) if others else None
    if spread is None:
        without = next((each.peer for each in (row, *others) if not each.samples), goal.against)
        return Verdict(goal, "not measured", reason=f"nothing of {without}")
    return Verdict(goal, _state(goal, spread.median), spread)


def _state(goal: Goal, value: float) -> str:
    def reached(bound: float) -> bool:
        return value <= bound if goal.at_most else value >= bound

    if not reached(goal.must):
        return "missed"
    return "aim" if goal.aim is None or reached(goal.aim) else "must"


@dataclass(frozen=True)
class Report:
    """A run, in figures."""

    about: dict[str, Any]
    peers: list[str]
    rows: list[Row]
    lines: list[Line]
    verdicts: list[Verdict]

    @classmethod
    def of(cls, run: Run, rows: list[Row]) -> Report:
        measured = {row.workload.name for row in rows}
        verdicts = [judge(goal, rows) for goal in GOALS if goal.workload in measured]
        return cls(_about(run), run.peers, rows, _lines(run.peers, rows), verdicts)

    # -- as text

    def text(self) -> str:
        parts = [self._heading(), self._table(), self._costs(), self._missing()]
        if self.verdicts:
            parts.append("Goals (median)\n" + "\n".join(f"  {verdict}" for verdict in self.verdicts))
        return "\n\n".join(part for part in parts if part)

    def _heading(self) -> str:
        about = self.about
        lines = [f"{about['time']}  {about['machine']}", f"{about['rounds']} rounds, scale {about['scale']}"]
        lines[1] += f", {about['layout']} memory layout"
        lines += [f"  {PEERS[peer].label}: {version}" for peer, version in about["versions"].items()]
        return "\n".join(lines)

    def _table(self) -> str:
        """Each cell has the figure, below it the ratio to the first peer, below that the growth, where there are such."""
        table = [["workload", *(PEERS[peer].label for peer in self.peers)]]
        for line in self.lines:
            heads = [f"{line.name} [{line.figure.unit}]", f"  {line.workload.title[:48]}"]
            cells = [self._cell(line, peer) for peer in self.peers]
            for index in range(max(2, *(len(cell) for cell in cells))):
                head = heads[index] if index < len(heads) else ""
                table.append([head, *(cell[index] if index < len(cell) else "" for cell in cells)])
        return "Median (min-max), and the ratio to the first\n" + _aligned(table)

    def _cell(self, line: Line, peer: str) -> list[str]:
        if peer not in line.values:
            return [MISSING]
        cell = [str(line.values[peer])]
        if peer in line.ratios and peer != self.peers[0]:
            cell.append(f"{line.ratios[peer]}x")
        if peer in line.growth:
            cell.append(f"{line.growth[peer]}x of {GROWTH_BASE}")
        return cell

    def _costs(self) -> str:
        table = [["workload", *(PEERS[peer].label for peer in self.peers)]]
        for rows in _by_case(self.rows):
            cells = [_cost(row) for row in rows]
            table.append([f"{rows[0].workload.name} {rows[0].case.label}", *cells])
        note = "Processor seconds of driver + server for each round of its share of the work, and their largest RSS"
        return f"{note}\n{_aligned(table)}"

    def _missing(self) -> str:
        reasons: dict[tuple[str, str], list[str]] = {}
        for row in self.rows:
            if row.missing:
                name = f"{row.workload.name} {row.case.label}".strip()
                reasons.setdefault((row.peer, row.missing), []).append(name)
        every = len(_by_case(self.rows))
        lines = [
            f"  {PEERS[peer].label}, {'everything' if len(names) == every else ', '.join(names)}: {reason}"
            for (peer, reason), names in reasons.items()
        ]
        return "Missing\n" + "\n".join(lines) if lines else ""

    # -- for programs

    def json(self) -> str:
        return json.dumps(
            {
                **self.about,
                "peers": self.peers,
                "results": [_row_record(row) for row in self.rows],
                "figures": [_line_record(line) for line in self.lines],
                "goals": [{**asdict(verdict.goal), **asdict(verdict), "goal": str(verdict)} for verdict in self.verdicts],
            },
            indent=1,
            ensure_ascii=False,
        )

    # -- for the README

    def markdown(self) -> str:
        about = self.about
        versions = "; ".join(about["versions"].values())
        lines = [
            f"{about['machine']}. {versions}. {about['rounds']} rounds; medians, in brackets the ratio to the first.",
            "",
            "| | " + " | ".join(PEERS[peer].label for peer in self.peers) + " |",
            "|---" * (1 + len(self.peers)) + "|",
        ]
        for line in self.lines:
            name = f"**{line.name}** {line.workload.title}, {line.figure.unit}"
            lines.append(f"| {name} | " + " | ".join(self._markdown_cell(line, peer) for peer in self.peers) + " |")
        return "\n".join(lines)

    def _markdown_cell(self, line: Line, peer: str) -> str:
        if peer not in line.values:
            return MISSING
        cell = number(line.values[peer].median)
        if peer in line.ratios and peer != self.peers[0]:
            cell += f" ({number(line.ratios[peer].median)})"
        return cell


def put_into(path: Path, table: str, marks: tuple[str, str] = (BEGIN, END)) -> None:
    """Write the table between the marks of that file. Raises ValueError where the marks are not."""
    text = path.read_text(encoding="utf-8")
    before, begin, rest = text.partition(marks[0])
    _, end, after = rest.partition(marks[1])
    if not begin or not end:
        raise ValueError(f"{path} has no lines {marks[0]} and {marks[1]}")
    path.write_text(f"{before}{begin}\n{table}\n{end}{after}", encoding="utf-8")


# --- how the pieces are made ---


def _lines(peers: Sequence[str], rows: list[Row]) -> list[Line]:
    cases = _by_case(rows)
    return [_line(peers, case, figure, cases) for case in cases for figure in case[0].workload.figures]


def _by_case(rows: list[Row]) -> list[list[Row]]:
    """Return the rows of each case together, one for each peer."""
    cases: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        cases.setdefault((row.workload.name, row.case.label), []).append(row)
    return list(cases.values())


def _line(peers: Sequence[str], rows: list[Row], figure: Figure, cases: list[list[Row]]) -> Line:
    workload, first = rows[0].workload, next((row for row in rows if row.peer == peers[0]), None)
    base: dict[str, Row] = {}
    for case in cases:
        if case[0].workload is workload and case[0].case.label == GROWTH_BASE != rows[0].case.label:
            base = {row.peer: row for row in case}

    def each(measure: Callable[[Row], Spread | None]) -> dict[str, Spread]:
        found = {row.peer: measure(row) for row in rows}
        return {peer: spread for peer, spread in found.items() if spread is not None}

    return Line(
        workload,
        rows[0].case.label,
        figure,
        rows[0].pin,
        each(lambda row: Spread.of(values_of(row, figure).values())),
        each(lambda row: ratios(row, first, figure) if first and figure.is_compared else None),
        each(lambda row: ratios(row, base[row.peer], figure) if row.peer in base else None),
        {row.peer: row.missing for row in rows if row.missing},
    )


def _cost(row: Row) -> str:
    if not row.samples:
        return MISSING
    samples = row.samples.values()
    seconds = [statistics.median(sample["cpu"][side] for sample in samples) for side in ("driver", "server")]
    memory = [max(sample["peak"][side] for sample in samples) / MIB for side in ("driver", "server")]
    return f"{seconds[0]:.2f}+{seconds[1]:.2f} s {memory[0]:.0f}/{memory[1]:.0f} MiB"


def _row_record(row: Row) -> dict[str, Any]:
    return {
        "workload": row.workload.name,
        "case": row.case.label,
        "peer": row.peer,
        "pin": row.pin,
        "command": dict(row.case.command),
        "missing": row.missing,
        "rounds": [row.samples[index] for index in sorted(row.samples)],
    }


def _line_record(line: Line) -> dict[str, Any]:
    def plain(spreads: dict[str, Spread]) -> dict[str, dict[str, float]]:
        return {peer: asdict(spread) for peer, spread in spreads.items()}

    return {
        "workload": line.workload.name,
        "case": line.case,
        "title": line.workload.title,
        "figure": line.figure.name,
        "unit": line.figure.unit,
        "higher_is_better": line.figure.higher_is_better,
        "pin": line.pin,
        "values": plain(line.values),
        "ratios": plain(line.ratios),
        "growth": plain(line.growth),
        "missing": line.missing,
    }


def _about(run: Run) -> dict[str, Any]:
    versions = {peer: program.version for peer, program in run.programs.items()}
    versions |= {peer: f"missing: {reason}" for peer, reason in run.missing.items()}
    return {
        "time": time.strftime("%Y-%m-%d %H:%M"),
        "machine": _machine(),
        "rounds": run.rounds,
        "scale": run.scale,
        "pin": run.pin or "by workload",
        "layout": "random" if processes.has_random_layout else "fixed",
        "versions": {peer: versions[peer] for peer in run.peers},
    }


def _machine() -> str:
    model = platform.machine()
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("model name"):
            model = " ".join(line.partition(":")[2].split())
            break
    return f"{len(os.sched_getaffinity(0))} processors of {model}, Linux {platform.release()}"


def _aligned(table: list[list[str]]) -> str:
    widths = [max(len(row[column]) for row in table) for column in range(len(table[0]))]
    return "\n".join(
        "  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip() for row in table
    )
