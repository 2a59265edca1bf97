"""Draws the ratios of a report as an SVG chart, with pygal (the extra `bench`): dots, with the rounds as error bars.

Everything is turned so that further right is better: a time that is half as long is drawn as twice as fast. What grows
with the number of streams is a table, not a dot, and is left out.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pygal  # type: ignore[import-untyped]  # it has no types, and is an extra
from pygal.style import Style  # type: ignore[import-untyped]

from .peers import PEERS
from .report import Line, Report, Spread

# Its finder of plugins knows only the protocol that Python has left: from then on every failed import warns.
sys.meta_path[:] = [finder for finder in sys.meta_path if type(finder).__name__ != "PluginImportFixer"]

ROW_HEIGHT = 26
MARGINS = 170
WIDTH = 1000
MARKS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100)
#: Told apart also by who sees no red or no green.
COLORS = ("#555555", "#0072b2", "#e69f00", "#cc79a7")


def draw(report: Report, path: Path) -> None:
    lines = [line for line in report.lines if not line.growth and not line.case and _drawn(report, line)]
    spreads = [spread for line in lines for spread in _better(line).values()]
    chart = pygal.HorizontalLine(
        style=Style(
            colors=COLORS,
            background="#ffffff",
            plot_background="#ffffff",
            guide_stroke_dasharray="2,4",
            font_family="sans-serif",
            label_font_size=12,
            legend_font_size=13,
            title_font_size=16,
        ),
        title=f"{PEERS[report.peers[0]].label} = 1, further right is better",
        width=WIDTH,
        height=MARGINS + ROW_HEIGHT * len(lines),
        # An image runs no scripts, and none are to be fetched.
        js=(),
        stroke=False,
        dots_size=5,
        logarithmic=True,
        legend_at_bottom=True,
        legend_at_bottom_columns=2,
        truncate_label=-1,
        truncate_legend=-1,
        show_y_guides=True,
    )
    chart.x_labels = [f"{line.workload.title} ({line.name})" for line in lines]
    chart.y_labels = _marks(spreads)
    for peer in report.peers:
        chart.add(PEERS[peer].label, [_dot(_better(line).get(peer)) for line in lines])
    path.write_bytes(chart.render())


def _drawn(report: Report, line: Line) -> bool:
    return any(peer in line.ratios for peer in report.peers[1:])


def _better(line: Line) -> dict[str, Spread]:
    """Return the ratios of each peer, so that more is better."""
    if line.figure.higher_is_better:
        return line.ratios
    return {peer: Spread(1 / r.median, 1 / r.high, 1 / r.low) for peer, r in line.ratios.items() if r.low > 0}


def _dot(spread: Spread | None) -> dict[str, Any] | None:
    if spread is None:
        return None
    return {"value": spread.median, "ci": {"low": spread.low, "high": spread.high}}


def _marks(spreads: list[Spread]) -> list[float]:
    low, high = min((s.low for s in spreads), default=1), max((s.high for s in spreads), default=1)
    below = max((mark for mark in MARKS if mark <= low), default=MARKS[0])
    above = min((mark for mark in MARKS if mark >= high), default=MARKS[-1])
    return [mark for mark in MARKS if below <= mark <= above]
