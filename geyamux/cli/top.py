"""``geyamux top``: a forwarder's sessions and streams as a live table.

It asks the control socket for one snapshot after the other. Rates are the differences of two of them, by the clock of the
forwarder; so a first table has none. What the snapshots say comes from far in part (names of peers, reasons), and a
terminal obeys what it is shown: all of it is made harmless first.
"""

from __future__ import annotations

import argparse
import io
import signal
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import gevent

from .control import Gone, connect
from .errors import CommandError
from .logs import printable
from .signals import interruptible, on_signals
from .values import seconds

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, JustifyMethod, RenderableType
    from rich.table import Table
    from rich.text import Text

SUMMARY = "watch the sessions and streams of a forwarder"
DESCRIPTION = """\
Show what a forwarder that was started with --control does: its sessions, and its streams with their rates, windows, and
who holds them up. Streams that stand still come first, those longest so at the top; then the busiest. IN is from the
peer, OUT is to it; UNREAD bytes have come and wait here; WINDOW is what the peer may still send, of how much; CREDIT is
what may still be sent to it, and WAITED for how long there was none, in all; LOCAL is what the stream is joined with.

STALL says who is waited for, and for how long not a byte has passed since this command looks; in brackets, some do:
  peer  the other side of the trunk does not read: bytes wait here, and there is no credit left
  here  the local connection does not take what has come
  link  the trunk does not take what is written

Ctrl-C ends it, and so does the end of the forwarder; both with exit code 0. Needs rich: pip install 'geyamux[top]'."""
EXAMPLES = """\
  geyamux forward --dial relay.example:7000 --to 127.0.0.1:8000 --control /run/user/1000/forward.sock
  geyamux top /run/user/1000/forward.sock
  geyamux top --interval 0.5 /run/user/1000/forward.sock
  geyamux top --once /run/user/1000/forward.sock      one table after a second, all of it, for scripts"""

#: A forwarder tells nothing new more often than each 0.1 s, and rates of less than two of these would jump.
_SHORTEST_INTERVAL = 0.2
_LONGEST_INTERVAL = 3600

#: The widest a name is shown on a terminal.
_LONGEST_NAME = 32

#: Of a table that does not go to a terminal: nothing is left out.
_UNLIMITED = 1000

#: What there was of a session or stream before it began.
_NEWBORN: dict[str, Any] = {"bytes_received": 0, "bytes_sent": 0, "unread": 0, "stall": "", "stalled": 0.0}

_Row = dict[str, Any]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what the command takes."""
    parser.add_argument("path", metavar="CONTROL-PATH", help="the forwarder's --control")
    parser.add_argument(
        "--interval", metavar="SECONDS", type=_interval, default=1.0, help="between two looks (default: 1; at least 0.2)"
    )
    parser.add_argument(
        "--once", action="store_true", help="print one plain table after one interval, as where there is no terminal"
    )


def run(options: argparse.Namespace) -> int:
    """Show tables until Ctrl-C or until the forwarder ends; 0."""
    try:
        from rich.console import Console
    except ImportError:
        raise CommandError("needs rich: pip install 'geyamux[top]'") from None
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a name that its encoding lacks is no reason to fail
    if not sys.stdout.isatty():
        return _show_once(options, Console(width=_UNLIMITED))
    console = Console()
    is_plain = options.once or not console.is_terminal or console.is_dumb_terminal
    return (_show_once if is_plain else _show_live)(options, console)


def _interval(text: str) -> float:
    value = seconds(text)
    if not _SHORTEST_INTERVAL <= value <= _LONGEST_INTERVAL:
        raise argparse.ArgumentTypeError(f"must be {_SHORTEST_INTERVAL} to {_LONGEST_INTERVAL} seconds")
    return value


# -- two ways to show


def _show_once(options: argparse.Namespace, console: Console) -> int:
    control = connect(options.path)
    screen = Screen()
    screen.take(control.ask())
    with interruptible():
        gevent.sleep(options.interval)
    screen.take(control.ask())
    for part in screen.parts(console.width, None):
        console.print(part, highlight=False)
    return 0


def _show_live(options: argparse.Namespace, console: Console) -> int:
    from rich.live import Live

    control = connect(options.path)
    screen = Screen()
    screen.take(control.ask())
    # No threads of rich's, and sys.stdout stays what it is.
    live = Live(screen, console=console, screen=True, auto_refresh=False, redirect_stdout=False, redirect_stderr=False)
    try:
        with interruptible(signal.SIGTERM), on_signals({signal.SIGWINCH: live.refresh}), live:
            while True:
                live.refresh()
                gevent.sleep(options.interval)
                screen.take(control.ask())
    except KeyboardInterrupt:
        return 0
    except Gone:
        console.print("the forwarder has ended")
        return 0


# -- what is shown


class Screen:
    """The newest snapshot, with what follows from the one before; something that rich can print at any size."""

    def __init__(self) -> None:
        self._told: _Row = {}

    def take(self, told: _Row) -> None:
        """Show this one from now on."""
        before = self._told
        if before.get("pid") != told["pid"]:
            before = {}
        elif told["uptime"] <= before["uptime"]:
            return  # the same as before: somebody has asked a moment ago
        _compare(before, told)
        self._told = told

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        yield from self.parts(options.max_width, options.height or console.height)

    def parts(self, width: int, height: int | None) -> Iterator[RenderableType]:
        """Header and tables, for so many columns and lines; None: as many as it takes."""
        told = self._told
        sessions = sorted(told["sessions"], key=lambda row: (-_rate(row), row["name"]))
        streams = sorted(told["streams"], key=lambda row: (-row["stalled"], -_rate(row), -_moved(row)))
        # Seven lines are no rows: two of header and an empty one, and of each table its titles and what is left out.
        room = None if height is None else max(height - 7, 2)
        num_sessions = len(sessions) if room is None else min(len(sessions), max(room // 3, room - len(streams), 1))
        num_streams = len(streams) if room is None else max(room - num_sessions, 1)
        yield from _header(told)
        yield _line("")
        yield _table(_SESSIONS, sessions[:num_sessions], width)
        yield _line(_left_out(len(sessions) - num_sessions, "session"))
        yield _table(_STREAMS, streams[:num_streams], width)
        if left_out := told["num_streams"] - len(streams[:num_streams]):
            yield _line(_left_out(left_out, "stream"))


def _compare(old: _Row, new: _Row) -> None:
    """Put into the rows of the new one what follows from both: rates, and for how long a stream stands still."""
    passed = new["uptime"] - old.get("uptime", 0.0)
    sessions = {row["name"]: row for row in old.get("sessions", ())}
    streams = {(row["session"], row["id"]): row for row in old.get("streams", ())}

    def earlier(known: dict[Any, _Row], key: object, row: _Row) -> _Row | None:
        is_new = bool(old) and row["age"] is not None and row["age"] < passed
        return known.get(key, _NEWBORN if is_new else None)

    for row in new["sessions"]:
        _add_rates(row, earlier(sessions, row["name"], row), passed)
    for row in new["streams"]:
        before = earlier(streams, (row["session"], row["id"]), row)
        _add_rates(row, before, passed)
        stands = before is not None and before["stall"] == row["stall"] != "" and _passed(before) == _passed(row)
        row["stalled"] = before["stalled"] + passed if before is not None and stands else 0.0


def _add_rates(row: _Row, before: _Row | None, passed: float) -> None:
    for rate, count in (("in", "bytes_received"), ("out", "bytes_sent")):
        row[rate] = None if before is None else (row[count] - before[count]) / passed


def _passed(row: _Row) -> int:
    """What grows while nobody holds the stream up."""
    passed: int = row["bytes_received"] - row["unread"] if row["stall"] == "here" else row["bytes_sent"]
    return passed


def _rate(row: _Row) -> float:
    return (row["in"] or 0.0) + (row["out"] or 0.0)


def _moved(row: _Row) -> int:
    moved: int = row["bytes_received"] + row["bytes_sent"]
    return moved


# -- tables


@dataclass(frozen=True)
class Column:
    """What a table may show of each row."""

    title: str
    text: Callable[[_Row], str]
    #: Where the width does not suffice those of the highest go first; 0 stays.
    rank: int = 0
    is_number: bool = True
    #: What it is usually filled by: columns that come and go are hard to read.
    width: int = 4


_RATES = (Column("IN/s", lambda row: _size(row["in"])), Column("OUT/s", lambda row: _size(row["out"])))
_COUNTS = (
    Column("IN", lambda row: _size(row["bytes_received"]), rank=7),
    Column("OUT", lambda row: _size(row["bytes_sent"]), rank=7),
    Column("UNREAD", lambda row: _size(row["unread"]), rank=2),
)
_SESSIONS = (
    Column("SESSION", lambda row: _name(row["name"]), is_number=False),
    Column("STREAMS", lambda row: str(row["streams"])),
    *_RATES,
    *_COUNTS,
    Column("QUEUED", lambda row: _size(row["queued"]), rank=3),
    Column("BLOCKED", lambda row: str(row["blocked_streams"]), rank=4),
    Column("RESETS", lambda row: str(sum(row["resets"].values())), rank=5),
    Column("RTT", lambda row: "-" if row["rtt"] is None else f"{row['rtt'] * 1000:.1f}ms", rank=1),
    Column("AGE", lambda row: _duration(row["age"]), rank=6),
    Column("PEER", lambda row: _name(row["peer"]), is_number=False),
)
_STREAMS = (
    Column("STREAM", lambda row: _name(f"{row['session']}/{row['id']}"), is_number=False),
    *_RATES,
    *_COUNTS,
    Column("WINDOW", lambda row: f"{_size(row['receive_window'])}/{_size(row['receive_limit'])}", rank=4, width=9),
    Column("CREDIT", lambda row: _size(row["send_credit"]), rank=3),
    Column("WAITED", lambda row: _duration(row["blocked"]), rank=5),
    Column("AGE", lambda row: _duration(row["age"]), rank=6),
    Column("STATE", lambda row: row["state"].removeprefix("ESTABLISHED").lstrip(", ") or "open", rank=8, is_number=False),
    Column("STALL", lambda row: _stall(row), is_number=False, width=9),
    Column("LOCAL", lambda row: _name(row["peer"]), rank=0, is_number=False),
)


def _table(columns: Sequence[Column], rows: Sequence[_Row], width: int) -> Table:
    """As many of the columns as there is room for."""
    from rich.table import Table
    from rich.text import Text

    cells = {column: [column.text(row) for row in rows] for column in columns}
    widths = {column: max(column.width, *map(len, [column.title, *texts])) for column, texts in cells.items()}
    while sum(widths.values()) + 2 * (len(widths) - 1) > width and (highest := max(column.rank for column in widths)):
        widths = {column: least for column, least in widths.items() if column.rank < highest}
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for column, least in widths.items():
        justify: JustifyMethod = "right" if column.is_number else "left"
        # Of the two names the one at the end gives way first.
        table.add_column(column.title, justify=justify, no_wrap=True, min_width=0 if column is columns[-1] else least)
    for number, row in enumerate(rows):
        style = "yellow" if row.get("stalled") else ""
        # A Text is shown as it is: no brackets in it mean anything.
        table.add_row(*(Text(cells[column][number], style) for column in widths))
    return table


def _header(told: _Row) -> Iterator[Text]:
    """What it is, and how it goes."""
    ways = [told.get("trunk"), *(told.get(word) and f"{word} {told[word]}" for word in ("to", "from"))]
    what = ", ".join(filter(None, ways))
    yield _line(f"geyamux {told['version']}, pid {told['pid']}, up {_duration(told['uptime'])}: {what}")
    state = str(told.get("state") or "open")
    if told.get("retry") is not None:
        state += f" in {_duration(told['retry'])}"
    if told.get("reason"):
        state += f" ({told['reason']})"
    rates = ", ".join(f"{word} {_size(_total(told['sessions'], word))}/s" for word in ("in", "out"))
    counts = f"{_count(len(told['sessions']), 'session')}, {_count(told['num_streams'], 'stream')}"
    yield _line(f"{rates}; {counts}; {state}")


def _total(rows: Iterable[_Row], rate: str) -> float | None:
    """The sum of what is known; None where nothing is."""
    known = [row[rate] for row in rows if row[rate] is not None]
    return sum(known) if known else None


def _line(text: str) -> Text:
    from rich.text import Text

    return Text(printable(text), no_wrap=True, overflow="ellipsis")


# -- in words


def _count(number: int, thing: str) -> str:
    return f"{number:,} {thing}{'' if number == 1 else 's'}"


def _left_out(number: int, thing: str) -> str:
    return f"... and {_count(number, thing)} more" if number else ""


def _name(text: str) -> str:
    text = printable(text)
    return text if len(text) <= _LONGEST_NAME else f"{text[: _LONGEST_NAME - 3]}..."


def _stall(row: _Row) -> str:
    """Who is waited for, and for how long nothing has passed; in brackets where something does."""
    if not row["stall"]:
        return ""
    return f"{row['stall']} {_duration(row['stalled'])}" if row["stalled"] else f"({row['stall']})"


def _size(number: float | None) -> str:
    """Bytes in four or five characters; K is 1024."""
    if number is None:
        return "-"
    unit = ""
    for unit in ("", "K", "M", "G", "T"):
        if number < 999.5 or unit == "T":
            break
        number /= 1024
    return f"{number:.0f}{unit}" if number >= 9.95 or not unit else f"{number:.1f}{unit}"


def _duration(time: float | None) -> str:
    """Seconds in two units."""
    if time is None:
        return "-"
    if time < 60:
        return f"{time:.1f}s" if time < 9.95 else f"{time:.0f}s"
    minutes, rest = divmod(round(time), 60)
    if minutes < 60:
        return f"{minutes}m{rest:02}s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02}m" if hours < 24 else f"{hours // 24}d{hours % 24:02}h"
