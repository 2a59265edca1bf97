"""`geyamux top`: what it works out of two snapshots, how it fits a terminal, and the command itself."""

from __future__ import annotations

import contextlib
import fcntl
import io
import os
import pty
import re
import signal
import struct
import sys
import termios

import gevent
import gevent.os
import pytest
from gevent import socket as gsocket
from gevent import subprocess

import geyamux
from commands.program import run
from commands.running import AnsweringPeer
from geyamux.cli import top
from geyamux.cli.control import Control
from support.waiting import PATIENCE, wait_for
from support.wire import ACK, window_update
from tunnels.running import ENVIRONMENT, GEYAMUX, Forward

pytest.importorskip("rich", reason="needs rich (pip install rich)")

from rich.console import Console  # behind the skip

SESSION = {
    "name": "client-1",
    "peer": "192.0.2.1:7000",
    "age": 12.0,
    "rtt": 0.0123,
    "idle": 0.1,
    "streams": 1,
    "backlog": 0,
    "blocked_streams": 0,
    "bytes_sent": 0,
    "bytes_received": 0,
    "queued": 0,
    "unread": 0,
    "resets": {"received": 2, "application": 1},
}
STREAM = {
    "session": "client-1",
    "id": 1,
    "state": "ESTABLISHED",
    "peer": "127.0.0.1:8000",
    "age": 100.0,
    "bytes_sent": 0,
    "bytes_received": 0,
    "unread": 0,
    "receive_window": 131072,
    "receive_limit": 262144,
    "send_credit": 262144,
    "blocked": 0.0,
    "is_queued": False,
    "stall": "",
}


def told(uptime, streams=(), sessions=({},), **facts):
    """A snapshot with these differences from an ordinary one."""
    rows = [{**STREAM, "id": 2 * number + 1, **stream} for number, stream in enumerate(streams)]
    return {
        "format": 1,
        "version": "1.2.3",
        "pid": 4321,
        "uptime": uptime,
        "trunk": "dial relay:7000",
        "to": "127.0.0.1:8000",
        "from": None,
        "state": "open",
        "retry": None,
        "reason": None,
        "num_streams": len(rows),
        "sessions": [{**SESSION, **session} for session in sessions],
        "streams": rows,
        **facts,
    }


def shown(*snapshots, width=200, height=None):
    """The lines on a screen of that size after these snapshots."""
    screen = top.Screen()
    for snapshot in snapshots:
        screen.take(snapshot)
    console = Console(file=io.StringIO(), width=width, height=height, color_system=None)
    for part in [screen] if height else screen.parts(width, None):
        console.print(part)
    return [line.rstrip() for line in console.file.getvalue().splitlines()]


#: Columns of words begin below their titles, those of numbers end there. Two spaces are in between.
WORDS = {"SESSION", "STREAM", "PEER", "LOCAL", "STATE", "STALL"}


def table(lines, first="STREAM"):
    """The rows of a table, by its titles."""
    start = next(number for number, line in enumerate(lines) if line.startswith(first))
    rows = []
    for line in lines[start + 1 :]:
        if not line.strip() or line.startswith("..."):
            break
        rows.append({})
        for title in re.finditer(r"\S+", lines[start]):
            cell = line[title.start() :].partition("  ") if title[0] in WORDS else line[: title.end()].rpartition("  ")
            rows[-1][title[0]] = cell[0 if title[0] in WORDS else 2].strip()
    return rows


def column(lines, title, first="STREAM"):
    return [row[title] for row in table(lines, first)]


# --- what follows from two snapshots


def test_rates_are_differences_by_the_clock_of_the_forwarder():
    lines = shown(
        told(10.0, [{"bytes_sent": 1000, "bytes_received": 0}], [{"bytes_sent": 5000}]),
        told(12.0, [{"bytes_sent": 5096, "bytes_received": 20}], [{"bytes_sent": 9096, "bytes_received": 1 << 21}]),
    )
    assert (column(lines, "OUT/s"), column(lines, "IN/s")) == (["2.0K"], ["10"])
    assert (column(lines, "OUT/s", "SESSION"), column(lines, "IN/s", "SESSION")) == (["2.0K"], ["1.0M"])
    assert lines[1] == "in 1.0M/s, out 2.0K/s; 1 session, 1 stream; open"


def test_a_first_snapshot_has_no_rates():
    lines = shown(told(10.0, [{}]))
    assert (column(lines, "IN/s"), column(lines, "IN/s", "SESSION")) == (["-"], ["-"])
    assert lines[1].startswith("in -/s, out -/s;")


def test_a_stream_that_began_in_between_counts_from_nothing_and_one_that_was_not_listed_has_no_rate():
    new, unlisted = {"age": 0.5, "bytes_sent": 200}, {"age": 50.0, "bytes_sent": 1 << 30}
    lines = shown(told(10.0), told(12.0, [new, unlisted]))
    assert dict(zip(column(lines, "STREAM"), column(lines, "OUT/s"), strict=True)) == {
        "client-1/1": "100",
        "client-1/3": "-",
    }


def test_a_session_that_began_in_between_counts_from_nothing():
    lines = shown(told(10.0, sessions=()), told(12.0, sessions=[{"age": 1.0, "bytes_received": 4096}]))
    assert column(lines, "IN/s", "SESSION") == ["2.0K"]


def test_a_forwarder_that_was_started_anew_has_no_rates_yet():
    lines = shown(told(100.0, [{"bytes_sent": 1 << 20}]), told(1.0, [{"bytes_sent": 10}], pid=99))
    assert column(lines, "OUT/s") == ["-"]


def test_the_same_snapshot_again_changes_nothing():
    first, second = told(10.0, [{}]), told(11.0, [{"bytes_sent": 100}])
    again = told(11.0, [{"bytes_sent": 100}])
    assert shown(first, second, again) == shown(told(10.0, [{}]), told(11.0, [{"bytes_sent": 100}]))


@pytest.mark.parametrize(
    ("stall", "moves"),
    [
        ("peer", {"bytes_sent": 10}),
        ("link", {"bytes_sent": 10}),
        ("here", {"bytes_received": 10}),
    ],
)
def test_a_stream_stands_still_for_as_long_as_nothing_passes_its_way(stall, moves):
    still = {"stall": stall, "bytes_sent": 5, "bytes_received": 500, "unread": 400}
    times = [told(second, [still]) for second in (10.0, 11.5, 13.0)]
    assert column(shown(*times[:1]), "STALL") == [f"({stall})"]
    assert column(shown(*[told(second, [still]) for second in (10.0, 11.5, 13.0)]), "STALL") == [f"{stall} 3.0s"]
    moved = {**still, **{key: still[key] + more for key, more in moves.items()}}
    assert column(shown(told(10.0, [still]), told(11.5, [still]), told(13.0, [moved])), "STALL") == [f"({stall})"]


def test_bytes_that_come_but_are_not_taken_do_not_count_as_passing():
    first = {"stall": "here", "bytes_received": 500, "unread": 400}
    lines = shown(told(10.0, [first]), told(12.0, [{**first, "bytes_received": 600, "unread": 500}]))
    assert column(lines, "STALL") == ["here 2.0s"]


def test_another_reason_to_stand_still_begins_anew():
    lines = shown(told(10.0, [{"stall": "peer"}]), told(12.0, [{"stall": "link"}]))
    assert column(lines, "STALL") == ["(link)"]


def test_streams_that_stand_still_come_first_then_the_busiest_then_those_with_most_bytes():
    before = [{"bytes_sent": 50}, {}, {"stall": "peer"}, {}, {"stall": "link"}]
    after = [{"bytes_sent": 50}, {"bytes_sent": 10}, {"stall": "peer"}, {"bytes_received": 30}, {"stall": "link"}]
    lines = shown(told(9.0, [*before[:4], {}]), told(10.0, before), told(12.0, after))
    assert [name.partition("/")[2] for name in column(lines, "STREAM")] == ["5", "9", "7", "3", "1"]


# --- the header


def test_the_header_says_what_it_forwards_and_how_it_goes():
    assert shown(told(3725.0))[0] == "geyamux 1.2.3, pid 4321, up 1h02m: dial relay:7000, to 127.0.0.1:8000"
    retrying = shown(told(5.0, sessions=(), state="retrying", retry=2.51, reason="[Errno 111] Connection refused"))
    assert retrying[1] == "in -/s, out -/s; 0 sessions, 0 streams; retrying in 2.5s ([Errno 111] Connection refused)"


def test_a_session_is_shown_with_its_peer_and_round_trip():
    (row,) = table(shown(told(10.0)), "SESSION")
    assert (row["SESSION"], row["PEER"], row["RTT"], row["RESETS"], row["AGE"]) == (
        "client-1",
        "192.0.2.1:7000",
        "12.3ms",
        "3",
        "12s",
    )


def test_what_is_not_known_is_a_dash():
    lines = shown(told(10.0, [{"age": None, "peer": ""}], [{"rtt": None, "age": None}]))
    (row,) = table(lines, "SESSION")
    assert (row["RTT"], row["AGE"]) == ("-", "-")
    assert column(lines, "AGE") == ["-"]


def test_windows_and_states_are_in_words():
    (row,) = table(shown(told(10.0, [{"state": "ESTABLISHED, peer finished", "unread": 1536}])))
    assert (row["WINDOW"], row["CREDIT"], row["STATE"], row["UNREAD"]) == (
        "128K/256K",
        "256K",
        "peer finished",
        "1.5K",
    )
    assert column(shown(told(10.0, [{}, {"state": "SYN_SENT"}])), "STATE") == ["open", "SYN_SENT"]


def test_nothing_from_elsewhere_steers_the_terminal_or_is_taken_for_markup():
    evil = "\x1b]0;owned\x07[red]x[/red]\u202e\n"
    lines = shown(
        told(10.0, [{"peer": evil}], [{"peer": evil, "name": evil}], reason=evil * 2, to=evil, state=evil), width=400
    )
    text = "\n".join(lines)
    assert all(character.isprintable() for character in text.replace("\n", ""))
    assert text.count(r"\x1b]0;owned\x07[red]x[/red]") >= 2
    assert len(lines) == 8


@pytest.mark.parametrize(
    ("number", "words"),
    [(None, "-"), (0, "0"), (999, "999"), (1000, "1.0K"), (10_239, "10K"), (1 << 20, "1.0M"), (1 << 50, "1024T")],
)
def test_sizes_are_short(number, words):
    assert top._size(number) == words


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(None, "-"), (0, "0.0s"), (9.94, "9.9s"), (10.2, "10s"), (61, "1m01s"), (3599.7, "1h00m"), (90_000, "1d01h")],
)
def test_durations_are_short(seconds, words):
    assert top._duration(seconds) == words


# --- the size of the terminal


@pytest.mark.parametrize("height", [9, 10, 24, 60])
@pytest.mark.parametrize("width", [30, 60, 80, 100, 250])
def test_the_screen_fits_the_terminal(width, height):
    streams = [{"stall": "peer", "bytes_sent": 10**12, "bytes_received": 10**11}] * 100
    snapshots = [told(second, streams, [{"name": f"client-{n}"} for n in range(30)]) for second in (10.0, 4000.0)]
    lines = shown(*snapshots, width=width, height=height)
    assert (len(lines), max(map(len, lines)) <= width) == (height, True)


def test_what_there_is_no_room_for_is_counted():
    snapshot = told(10.0, [{}] * 100, [{"name": f"client-{n}"} for n in range(30)], num_streams=4000)
    lines = shown(snapshot, height=24)
    sessions, streams = len(table(lines, "SESSION")), len(table(lines))
    assert f"... and {30 - sessions} sessions more" in lines
    assert f"... and {4000 - streams:,} streams more" in lines
    assert sessions + streams == 24 - 7


def test_room_that_streams_do_not_need_is_for_sessions():
    sessions = [{"name": f"client-{n}"} for n in range(30)]
    assert len(table(shown(told(10.0, [{}] * 2, sessions), height=24), "SESSION")) == 24 - 7 - 2


def test_on_a_narrow_terminal_what_matters_less_goes_and_the_rest_is_whole():
    still = [{"stall": "peer"}]
    wide, narrow = (shown(told(10.0, still), told(11.0, still), width=width) for width in (200, 70))
    left = {"STREAM", "IN/s", "OUT/s", "STALL", "LOCAL"}
    assert left < set(table(narrow)[0]) < set(table(wide)[0])
    for title in left:
        assert column(narrow, title) == column(wide, title)


# --- the command


@contextlib.contextmanager
def controlled(path, snapshots):
    """A control socket that tells one of these after the other, and the last for ever."""
    left = list(snapshots)
    control = Control(str(path), lambda: left.pop(0) if len(left) > 1 else left[0])
    control.start()
    try:
        yield str(path)
    finally:
        control.stop()


@contextlib.contextmanager
def forwarding(path):
    """A real forwarder with that control socket; its trunk's and its visitors' address."""
    child = Forward("--listen", "127.0.0.1:0", "--from", "127.0.0.1:0", "--keepalive", "0", "--control", str(path))
    try:
        addresses = [child.listening(what).rpartition(":") for what in ("trunk", "from")]
        yield child, *((host, int(port)) for host, _, port in addresses)
    finally:
        child.kill()


def dialled(child, trunk):
    """An agent that the forwarder has taken."""
    session = geyamux.connect(trunk, timeout=PATIENCE)
    child.event("connected")
    return session


@contextlib.contextmanager
def visitor(address):
    with gsocket.create_connection(address) as conn:
        conn.settimeout(PATIENCE)
        yield conn


@contextlib.contextmanager
def going(*tasks):
    greenlets = [gevent.spawn(*task) for task in tasks]
    try:
        yield
    finally:
        gevent.killall(greenlets)


def once(path, *words):
    return [line.rstrip() for line in run("top", str(path), "--once", *words).out.splitlines()]


def pour(conn, seconds=0.0, size=65536):
    """Write for ever."""
    with contextlib.suppress(OSError):
        while True:
            conn.sendall(bytes(size))
            gevent.sleep(seconds)


def drain(conn):
    with contextlib.suppress(OSError):
        while conn.recv(65536):
            pass


@pytest.mark.slow
def test_a_real_forwarders_streams_are_shown_with_their_rates_and_with_who_stalls_them(tmp_path):
    path = tmp_path / "control"
    with forwarding(path) as (child, trunk, entry), contextlib.ExitStack() as stack:
        session = stack.enter_context(dialled(child, trunk))
        conns, streams = [], []
        for _ in range(4):
            conns.append(stack.enter_context(visitor(entry)))
            conns[-1].sendall(b"?")
            streams.append(session.accept(timeout=PATIENCE))
        # The peer reads nothing of the first; the visitor nothing of the second; the third has 100,000 bytes a second.
        tasks = [(pour, conns[0]), (pour, streams[1]), (pour, streams[2], 0.01, 1000), (drain, conns[2])]
        with going(*tasks):
            wait_for(lambda: not streams[0].stats().receive_window and not streams[1].stats().send_credit)
            started = streams[2].stats().bytes_sent
            wait_for(lambda: streams[2].stats().bytes_sent > started + 20_000)
            lines = once(path)
        rows = {row["LOCAL"]: row for row in table(lines)}
        first, second, third, idle = (rows["{}:{}".format(*conn.getsockname())] for conn in conns)
        assert re.fullmatch(r"peer \d\.\ds", first["STALL"]) and first["CREDIT"] == "0"
        assert re.fullmatch(r"here \d\.\ds", second["STALL"]) and second["WINDOW"].startswith("0/")
        assert (third["STALL"], idle["STALL"]) == ("", "")
        assert third["OUT/s"] == "0" and 30 < float(third["IN/s"].removesuffix("K")) < 150
        assert lines[0].startswith(f"geyamux {geyamux.__version__}, pid ") and ", from 127.0.0.1:" in lines[0]
        (session_row,) = table(lines, "SESSION")
        assert session_row["STREAMS"] == "4" and session_row["PEER"] == "{}:{}".format(*session.getsockname())
        session.abort()


@pytest.mark.slow
def test_a_trunk_that_takes_nothing_is_shown_as_the_link(tmp_path):
    path = tmp_path / "control"
    with forwarding(path) as (child, trunk, entry), gsocket.socket() as conn:
        conn.setsockopt(gsocket.SOL_SOCKET, gsocket.SO_RCVBUF, 4096)
        conn.connect(trunk)
        peer = AnsweringPeer(conn)
        peer.answer_ping()
        child.event("connected")
        with visitor(entry) as local, going((pour, local)):
            # A ping may come before the stream.
            stream_id = next(frame.stream_id for frame in iter(peer.next, None) if frame.stream_id)
            peer.send(window_update(stream_id, 1 << 28, ACK))
            # Until the buffers of the system are full it has its moments.
            wait_for(lambda: column(once(path, "--interval", "0.2"), "STALL")[0].startswith("link "))
            (row,) = table(once(path, "--interval", "0.2"))
            assert row["STREAM"].endswith(f"/{stream_id}") and row["OUT/s"] == "0"


def test_without_a_terminal_it_prints_one_table_after_an_interval(tmp_path):
    snapshots = [told(10.0, [{}] * 50), told(12.0, [{"bytes_sent": 2048}] * 50)]
    with controlled(tmp_path / "control", snapshots) as path:
        done = run("top", path, "--interval", "0.2")
    assert "\x1b" not in done.out
    assert column(done.out.splitlines(), "OUT/s") == ["1.0K"] * 50
    assert done.err == ""


def test_a_name_that_the_output_has_no_letters_for_is_shown_all_the_same(tmp_path):
    with controlled(tmp_path / "control", [told(10.0, [{"peer": "/run/\xfc\u65e5"}])]) as path:
        done = subprocess.run(
            [*GEYAMUX, "top", path, "--interval", "0.2"],
            env={**ENVIRONMENT, "PYTHONIOENCODING": "latin-1"},
            capture_output=True,
        )
    assert (done.returncode, done.stderr) == (0, b"")
    assert rb"/run/" + b"\xfc" + rb"\u65e5" in done.stdout


@pytest.mark.parametrize("words", [(), ("--once",)])
def test_where_nobody_listens_it_fails_in_one_line(tmp_path, words):
    path = tmp_path / "control"
    done = run("top", str(path), *words, code=1)
    assert done.out == ""
    assert done.err == f"geyamux top: nobody listens at {path}; start a forwarder with --control {path}\n"


@pytest.mark.parametrize("interval", ["0", "0.1", "-1", "nan", "1e9", "soon"])
def test_an_interval_that_makes_no_sense_is_a_wrong_argument(interval):
    done = run("top", "x", f"--interval={interval}", code=2)
    assert "argument --interval: " in done.err


def test_without_rich_it_says_what_to_install(tmp_path):
    code = "import sys; sys.modules['rich'] = None; from geyamux.cli.main import main; sys.exit(main())"
    done = subprocess.run([sys.executable, "-c", code, "top", "x"], env=ENVIRONMENT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "geyamux top: needs rich: pip install 'geyamux[top]'\n"


# --- on a terminal


class Terminal:
    """`geyamux top` on a terminal of its own, and what it has shown there."""

    def __init__(self, path, *words, columns=100, lines=24, **environment):
        self._end, theirs = pty.openpty()
        self.resize(columns, lines)
        self._settings = termios.tcgetattr(theirs)
        kept = {name: value for name, value in ENVIRONMENT.items() if name not in ("COLUMNS", "LINES", "NO_COLOR")}
        self.process = subprocess.Popen(
            [*GEYAMUX, "top", str(path), *words],
            env={**kept, "TERM": "xterm-256color", **environment},
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            # So that it gets what is typed there, and hears of another size.
            preexec_fn=lambda: (os.setsid(), fcntl.ioctl(0, termios.TIOCSCTTY, 0)),
        )
        self._theirs = theirs
        self.output = ""
        gevent.os.make_nonblocking(self._end)
        self._reading = gevent.spawn(self._read)

    def _read(self):
        # EIO: nobody has it open any more.
        with contextlib.suppress(OSError):
            while data := gevent.os.nb_read(self._end, 65536):
                self.output += data.decode()

    @property
    def screens(self):
        """What was shown one after the other: lines without colours. The last may still be on its way."""
        text = re.sub(r"\x1b\[[0-9;]*m", "", self.output.partition("\x1b[?1049h")[2])
        return [screen.split("\r\n") for screen in text.split("\x1b[H")[2:]]

    def wait_screen(self, condition):
        """Wait until it has shown a whole screen that is so; return that."""
        found = []
        wait_for(lambda: found.extend(s for s in self.screens[:-1] if condition(s)) or found, f"in\n{self.output}")
        return found[-1]

    def resize(self, columns, lines):
        fcntl.ioctl(self._end, termios.TIOCSWINSZ, struct.pack("HHHH", lines, columns, 0, 0))

    def type(self, keys):
        gevent.os.nb_write(self._end, keys)

    def wait_end(self):
        """Its exit code; it must leave the terminal as it was."""
        code = self.process.wait(timeout=PATIENCE)
        assert termios.tcgetattr(self._theirs) == self._settings
        os.close(self._theirs)
        self._theirs = None
        self._reading.join(PATIENCE)
        assert self.output.count("\x1b[?1049h") == self.output.count("\x1b[?1049l")
        assert self.output.count("\x1b[?25l") == self.output.count("\x1b[?25h")
        assert "Traceback" not in self.output
        return code

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        self._reading.kill()
        os.close(self._end)
        if self._theirs is not None:
            os.close(self._theirs)


def test_on_a_terminal_it_is_shown_anew_after_each_interval_until_ctrl_c(tmp_path):
    snapshots = [told(10.0 + second, [{"bytes_sent": 1024 * second}]) for second in range(100)]
    with (
        controlled(tmp_path / "control", snapshots) as path,
        Terminal(path, "--interval", "0.2", columns=120) as terminal,
    ):
        terminal.wait_screen(lambda screen: column(screen, "OUT/s") == ["-"])
        second = terminal.wait_screen(lambda screen: column(screen, "OUT") == ["2.0K"])
        third = terminal.wait_screen(lambda screen: column(screen, "OUT") == ["3.0K"])
        assert column(second, "OUT/s") == column(third, "OUT/s") == ["1.0K"]
        terminal.type(b"\x03")
        assert terminal.wait_end() == 0


def test_a_plain_kill_leaves_the_terminal_in_order_too(tmp_path):
    with controlled(tmp_path / "control", [told(10.0)]) as path, Terminal(path) as terminal:
        terminal.wait_screen(lambda screen: table(screen, "SESSION"))
        terminal.process.send_signal(signal.SIGTERM)
        assert terminal.wait_end() == 0


def test_ctrl_c_is_heard_while_the_forwarder_does_not_answer(tmp_path):
    def hang():
        asked.append(1)
        if len(asked) > 1:
            gevent.sleep(60)
        return told(10.0)

    asked = []
    control = Control(str(tmp_path / "control"), hang)
    control.start()
    try:
        with Terminal(tmp_path / "control", "--interval", "0.2") as terminal:
            wait_for(lambda: len(asked) > 1)
            terminal.type(b"\x03")
            with gevent.Timeout(3, AssertionError("it waits for the answer")):
                assert terminal.wait_end() == 0
    finally:
        control.stop()


def test_another_size_of_the_terminal_is_filled_at_once(tmp_path):
    snapshot = told(10.0, [{}] * 100)
    with (
        controlled(tmp_path / "control", [snapshot]) as path,
        Terminal(path, "--interval", "60") as terminal,
    ):
        wait_for(lambda: "\x1b[?1049h" in terminal.output and "streams more" in terminal.output)
        for columns, lines in (60, 12), (120, 40):
            terminal.resize(columns, lines)
            wait_for(
                lambda lines=lines, columns=columns: (
                    len(terminal.screens[-1]) == lines and {len(line) for line in terminal.screens[-1]} == {columns}
                ),
                f"{columns} x {lines}",
            )
        terminal.type(b"\x03")
        assert terminal.wait_end() == 0


def test_the_end_of_the_forwarder_ends_it_with_a_word_and_without_an_error(tmp_path):
    with controlled(tmp_path / "control", [told(10.0)]) as path, Terminal(path, "--interval", "0.2") as terminal:
        wait_for(lambda: "client-1" in terminal.output)
        # Leaving the block takes the socket away.
        with contextlib.ExitStack() as stack:
            stack.callback(os.unlink, path)
        assert terminal.wait_end() == 0
        assert terminal.output.endswith("\x1b[?1049lthe forwarder has ended\r\n")


def test_an_answer_that_is_none_ends_it_with_an_error_behind_a_terminal_in_order(tmp_path):
    with controlled(tmp_path / "control", [told(10.0), {"format": 7, "version": "9"}]) as path:
        with Terminal(path, "--interval", "0.2") as terminal:
            assert terminal.wait_end() == 1
        assert terminal.output.endswith(f"the forwarder at {path} is of geyamux 9; use that one's command\r\n")


@pytest.mark.parametrize(
    ("words", "environment"), [(("--once",), {}), ((), {"TERM": "dumb"}), ((), {"TTY_COMPATIBLE": "0"})]
)
def test_a_terminal_gets_a_plain_table_where_that_is_asked_for_or_it_can_do_no_more(tmp_path, words, environment):
    snapshots = [told(10.0, [{}] * 40), told(11.0, [{}] * 40)]
    with controlled(tmp_path / "control", snapshots) as path:
        with Terminal(path, *words, "--interval", "0.2", columns=70, lines=10, **environment) as terminal:
            assert terminal.wait_end() == 0
        lines = re.sub(r"\x1b\[[0-9;]*m", "", terminal.output).split("\r\n")
        assert "\x1b[?1049h" not in terminal.output
        assert len(table(lines)) == 40 and max(map(len, lines)) <= 80


@pytest.mark.slow
def test_a_real_forwarder_is_watched_on_a_terminal_until_it_ends(tmp_path):
    path = tmp_path / "control"
    with forwarding(path) as (child, trunk, entry), Terminal(path, "--interval", "0.2") as terminal:
        terminal.wait_screen(lambda screen: "0 sessions, 0 streams; open" in screen[1])
        with (
            dialled(child, trunk) as session,
            visitor(entry) as conn,
            going((pour, conn, 0.01, 5000)),
        ):
            stream = session.accept(timeout=PATIENCE)
            with going((drain, stream)):
                screen = terminal.wait_screen(lambda screen: column(screen, "OUT/s")[:1] > ["-"])
                assert column(screen, "LOCAL") == ["{}:{}".format(*conn.getsockname())]
            session.abort()
        terminal.wait_screen(lambda screen: "0 sessions, 0 streams; open" in screen[1] and len(terminal.screens) > 5)
        child.stop()
        assert terminal.wait_end() == 0
        assert terminal.output.endswith("the forwarder has ended\r\n")
