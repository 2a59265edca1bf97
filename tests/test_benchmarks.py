"""The benchmark suite: that every workload works, and the arithmetic that its figures rest on."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import gevent
import pytest
from gevent import socket
from gevent.server import StreamServer

ROOT = Path(__file__).parent.parent
sys.path.append(str(ROOT))

from benchmarks import peers, processes, relay, report, workloads  # noqa: E402
from benchmarks.peers import MissingPeer  # noqa: E402
from benchmarks.processes import Child, PeerFailed  # noqa: E402
from benchmarks.report import Line, Report, Spread, judge  # noqa: E402
from benchmarks.runner import Row  # noqa: E402
from benchmarks.workloads import Case, Goal, Workload  # noqa: E402

LABELS = ("raw", "geyamux")


def rates(*rounds: float) -> dict[int, dict[str, Any]]:
    """Samples of so many operations a second, one for each round."""
    return {
        index: {
            "seconds": 1.0,
            "operations": rate,
            "cpu": {"driver": 0.5, "server": 0.25},
            "peak": {"driver": 1 << 20, "server": 2 << 20},
        }
        for index, rate in enumerate(rounds)
    }


def workload(*labels: str, figure: workloads.Figure = workloads.REQUESTS, name: str = "W4") -> Workload:
    return Workload(name, "ping-pong", (figure,), tuple(Case(label, {"workload": "echo_rate"}) for label in labels))


def rows(of: Workload, pin: str = "same", **samples: dict[int, dict[str, Any]]) -> list[Row]:
    return [Row(of, case, peer, pin, measured) for case in of.cases for peer, measured in samples.items()]


def made_report(measured: list[Row], verdicts: list[report.Verdict] | None = None) -> Report:
    about = {"time": "now", "machine": "this", "rounds": 3, "scale": 1.0, "layout": "fixed"}
    about["versions"] = {"raw": "1", "geyamux": "2"}
    return Report(about, list(LABELS), measured, report._lines(LABELS, measured), verdicts or [])


# --- figures, ratios, goals ---


def test_a_ratio_is_made_within_each_round_before_it_is_summed_up() -> None:
    raw, ours = rows(workload(""), raw=rates(100, 10, 50), geyamux=rates(200, 40, 50))
    assert report.ratios(ours, raw, workloads.REQUESTS) == Spread(2.0, 1.0, 4.0)


def test_a_round_that_only_one_of_two_has_makes_no_ratio() -> None:
    raw, ours = rows(workload(""), raw=rates(100), geyamux=rates(300, 1))
    assert report.ratios(ours, raw, workloads.REQUESTS) == Spread(3.0, 3.0, 3.0)
    assert report.ratios(ours, rows(workload(""), raw={})[0], workloads.REQUESTS) is None


@pytest.mark.parametrize(
    ("must", "aim", "at_most", "state"),
    [
        (2.0, 3.0, False, "aim"),
        (2.0, 3.5, False, "must"),
        (3.5, 4.0, False, "missed"),
        (3.0, None, False, "aim"),
        (3.0, 2.0, True, "must"),
        (2.9, 2.0, True, "missed"),
        (4.0, 3.0, True, "aim"),
    ],
)
def test_a_goal_is_met_with_its_aim_met_or_missed(must: float, aim: float | None, at_most: bool, state: str) -> None:
    measured = rows(workload(""), raw=rates(10, 10, 10), geyamux=rates(20, 30, 90))
    assert judge(Goal("W4", "rate", "raw", must, aim, at_most=at_most), measured).state == state


def test_a_goal_against_nobody_is_about_the_figure_itself() -> None:
    measured = rows(workload(""), raw=rates(10), geyamux=rates(20))
    verdict = judge(Goal("W4", "rate", None, 15), measured)
    assert (verdict.state, verdict.spread) == ("aim", Spread(20, 20, 20))


def test_a_goal_that_counts_on_one_processor_is_not_judged_elsewhere() -> None:
    measured = rows(workload(""), pin="none", raw=rates(10), geyamux=rates(20))
    verdict = judge(Goal("W4", "rate", "raw", 1, pin="same"), measured)
    assert verdict.state == "not measured"
    assert "--pin same" in str(verdict)


def test_a_goal_against_a_peer_that_is_missing_is_not_measured() -> None:
    measured = rows(workload(""), raw=rates(10), geyamux=rates(20), hashicorp={})
    assert judge(Goal("W4", "rate", "hashicorp", 1), measured).state == "not measured"
    assert judge(Goal("W4", "rate", "libp2p", 1), measured).state == "not measured"
    assert judge(Goal("W9", "rate", "raw", 1), measured).state == "not measured"


def test_growth_is_the_cost_with_the_most_streams_over_that_with_ten() -> None:
    grown = workload("1", "10", "1000", figure=workloads.COST, name="growth-W4")
    measured = [
        Row(grown, case, "geyamux", "same", rates(rate)) for case, rate in zip(grown.cases, (9, 50, 40), strict=True)
    ]
    verdict = judge(Goal("growth-W4", "cost", None, 1.5, 1.1, at_most=True, growth=True), measured)
    assert verdict.spread is not None
    assert verdict.spread.median == pytest.approx(1.25)
    assert verdict.state == "must"


def test_every_goal_is_about_a_figure_that_its_workload_has() -> None:
    for goal in workloads.GOALS:
        (found,) = workloads.select([goal.workload])
        assert goal.figure in [figure.name for figure in found.figures], goal
        assert goal.pin in (None, found.pin), goal
        assert not goal.growth or workloads.GROWTH_BASE in [case.label for case in found.cases]


# --- what is written ---


def test_the_text_has_figures_ratios_costs_goals_and_who_is_missing() -> None:
    measured = rows(workload(""), raw=rates(100, 100, 100), geyamux=rates(200, 300, 250))
    measured[0].missing = None
    verdicts = [judge(Goal("W4", "rate", "raw", 2, 4), measured)]
    text = made_report(measured, verdicts).text()
    assert "250 (200-300)" in text
    assert "2.5 (2-3)x" in text
    assert "0.50+0.25 s 1/2 MiB" in text
    assert "must ≥ 2, aim ≥ 4            met " in text
    measured[0].samples.clear()
    measured[0].missing = "no such thing"
    assert "raw gevent sockets, everything: no such thing" in made_report(measured).text()


def test_the_markdown_table_has_a_row_for_each_figure_and_goes_between_the_marks(tmp_path: Path) -> None:
    measured = rows(workload(""), raw=rates(100), geyamux=rates(250))
    table = made_report(measured).markdown()
    assert table.splitlines()[-1] == "| **W4** ping-pong, 1/s | 100 | 250 (2.5) |"
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n")
    for _ in range(2):
        report.put_into(readme, table)
        assert readme.read_text() == f"before\n{report.BEGIN}\n{table}\n{report.END}\nafter\n"
    readme.write_text("no marks")
    with pytest.raises(ValueError, match="has no lines"):
        report.put_into(readme, table)


def test_the_chart_turns_times_so_that_more_is_better(tmp_path: Path) -> None:
    plot = pytest.importorskip("benchmarks.plot", reason="pygal is not installed (the extra `bench`)")
    measured = rows(workload("", figure=workloads.COST), raw=rates(100, 100), geyamux=rates(200, 400))
    made = made_report(measured)
    better: dict[str, Spread] = plot._better(made.lines[0])
    assert (better["geyamux"].low, better["geyamux"].high) == (2.0, 4.0)
    plot.draw(made, tmp_path / "chart.svg")
    chart = (tmp_path / "chart.svg").read_text()
    assert chart.count('class="ci"') == len(LABELS)
    assert "href" not in chart  # it fetches nothing


@pytest.mark.parametrize(("value", "text"), [(0.12345, "0.123"), (12.345, "12.3"), (123.4, "123"), (12345.6, "12,346")])
def test_numbers_have_three_digits_or_more(value: float, text: str) -> None:
    assert report.number(value) == text


# --- the table of workloads ---


def test_a_name_selects_a_workload_or_all_that_begin_with_it() -> None:
    assert [found.name for found in workloads.select(["W5", "W1"])] == ["W1", "W5"]
    assert [found.name for found in workloads.select(["W6"])] == ["W6-10k", "W6-10k-reader", "W6-100k"]
    assert [found.name for found in workloads.select(["growth"])] == ["growth-W4", "growth-W5"]
    with pytest.raises(KeyError):
        workloads.select(["W10"])


def test_a_small_scale_is_less_of_the_same_work() -> None:
    for found in workloads.WORKLOADS:
        small = found.scaled(workloads.SMALL_SCALE)
        for case, less in zip(found.cases, small.cases, strict=False):
            assert case.command.keys() == less.command.keys()
            assert less.command.get("count", 2) >= 2
            assert all(not isinstance(size, int) or size <= case.command[name] for name, size in less.command.items())


# --- peers and processes ---


def test_a_peer_that_cannot_be_built_is_missing_with_the_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(MissingPeer, match="no Go compiler"):
        peers.prepare_hashicorp(tmp_path)
    monkeypatch.setenv("GEYAMUX_LIBP2P_PYTHON", str(tmp_path / "python"))
    with pytest.raises(MissingPeer, match="no libp2p in"):
        peers.prepare_libp2p(tmp_path)


def test_pinning_puts_both_on_one_processor_or_each_on_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _pid: {3, 5, 7})
    assert processes.placement("none") == (None, None)
    assert processes.placement("same") == ({3}, {3})
    assert processes.placement("split") == ({3}, {5})
    monkeypatch.setattr(os, "sched_getaffinity", lambda _pid: {3})
    assert processes.placement("split") == ({3}, {3})


def child(code: str) -> Child:
    return Child([sys.executable, "-c", code], {}, None)


def test_a_program_that_ends_or_hangs_or_reports_an_error_has_failed() -> None:
    for code, words in [
        ("import sys; sys.exit('out of paper')", "ended with 1: out of paper"),
        ('input(); print(\'{"error": "no idea"}\', flush=True); input()', "no idea"),
        ("input(); input()", "no answer within 0 s"),
    ]:
        started = child(code)
        try:
            with pytest.raises(PeerFailed, match=words):
                started.ask({"workload": "any"}, timeout=0.3 if "no answer" in words else 10)
        finally:
            started.stop()


def test_processor_time_and_memory_of_a_program_are_read_from_outside() -> None:
    started = child("for _ in range(300_000): pass\nprint('{}', flush=True); input()")
    try:
        started.answer(10)
        assert started.cpu_seconds() > 0.005
        assert started.peak_rss() >= started.rss() > 1 << 20
    finally:
        started.stop()


@pytest.mark.parametrize("name", ["raw", "geyamux"])
def test_a_program_ends_with_its_standard_input_and_says_what_it_cannot(name: str, tmp_path: Path) -> None:
    program = peers.PEERS[name].prepare(tmp_path)
    server = Child([*program.argv, "serve"], {}, None)
    driver = Child([*program.argv, "drive", "--port", str(server.answer(10)["port"])], {}, None)
    try:
        with pytest.raises(PeerFailed, match="KeyError"):
            driver.ask({"workload": "none"}, 10)
        answer = driver.ask({"workload": "echo_latency", "count": 20, "warmup": 1}, 10)
        assert answer["operations"] == 20
        assert 0 < answer["latencies"]["p50"] <= answer["latencies"]["p99"]
        for process in (driver._process, server._process):
            assert process.stdin is not None
            process.stdin.close()
            assert process.wait(10) == 0
    finally:
        driver.stop()
        server.stop()


# --- the link of W8 ---


@pytest.fixture
def echo_port() -> Any:
    def echo(conn: Any, _address: Any) -> None:
        while data := conn.recv(65536):
            conn.sendall(data)

    server = StreamServer(("127.0.0.1", 0), echo)
    server.start()
    yield server.server_port
    server.stop()


def through_relay(port: int, rate: float, delay: float) -> tuple[StreamServer, Any]:
    server = relay.relay_server(port, rate, delay)
    server.start()
    return server, socket.create_connection(("127.0.0.1", server.server_port))


def test_the_relay_delays_each_way(echo_port: int) -> None:
    server, conn = through_relay(echo_port, 1e9, 0.05)
    for _ in range(2):
        start = time.monotonic()
        conn.sendall(b"x")
        assert conn.recv(1) == b"x"
        # A timer of libuv may be a millisecond early, since it counts whole ones.
        assert 0.098 <= time.monotonic() - start < 0.3
    conn.shutdown(socket.SHUT_WR)
    assert conn.recv(1) == b""
    conn.close()
    server.stop()


def test_the_relay_keeps_to_its_rate_and_loses_nothing(echo_port: int) -> None:
    size = 2_000_000
    data = bytes(itertools.islice(itertools.cycle(range(251)), size))
    server, conn = through_relay(echo_port, 80e6, 0.01)
    start = time.monotonic()
    gevent.spawn(conn.sendall, data)
    received = bytearray()
    while len(received) < size:
        received += conn.recv(65536)
    # 10 MB a second.
    assert 0.2 <= time.monotonic() - start < 0.8
    assert received == data
    conn.close()
    server.stop()


# --- all of it ---


@pytest.mark.slow
@pytest.mark.timeout(200)
def test_every_workload_works_with_every_peer_that_is_there(tmp_path: Path) -> None:
    file = tmp_path / "results.json"
    command = [sys.executable, "-m", "benchmarks", "run", "--scale", "small", "--rounds", "1", "--json", str(file)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stderr
    results = json.loads(file.read_text())
    there = [peer for peer, version in results["versions"].items() if not version.startswith("missing")]
    assert {"raw", "geyamux"} <= set(there)
    assert {result["workload"] for result in results["results"]} == {each.name for each in workloads.WORKLOADS}
    for result in results["results"]:
        assert not (result["missing"] or "").startswith("failed"), result
        if result["missing"] is None:
            (sample,) = result["rounds"]
            assert sample["operations"] > 0, result
            assert sample["cpu"].keys() == sample["peak"].keys() == {"driver", "server"}
    known = {(result["workload"], result["case"], result["peer"]) for result in results["results"] if result["rounds"]}
    named: list[Line] = results["figures"]
    for figure in named:
        assert set(figure["values"]) == {peer for peer in there if (figure["workload"], figure["case"], peer) in known}
    assert len(results["goals"]) == len(workloads.GOALS)
    assert "Goals (median)" in done.stdout


@pytest.mark.slow
@pytest.mark.interop
def test_every_tunnel_is_compared(tmp_path):
    """At a size that shows only that it works. What is not installed is missing, and said to be."""
    samples = tmp_path / "samples.json"
    command = [sys.executable, "-m", "benchmarks.tunnels", "--rounds", "1", "--scale", "0.002", "--json", str(samples)]
    done = subprocess.run(
        command,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=28,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(samples.read_text())
    names = {"a TCP proxy with gevent", "no tunnel", "geyamux", "hashicorp/yamux (Go)", "geyamux, mutual TLS", "ssh -L"}
    for workload, figures in result["figures"].items():
        assert workload in done.stdout
        assert figures.keys() | result["missing"].keys() == names
        assert all(len(rounds) == 1 and rounds[0] > 0 for rounds in figures.values())
    if "GEYAMUX_NO_SKIP" in os.environ:
        assert not result["missing"]
