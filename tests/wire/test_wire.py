"""geyamux passes the wire conformance suite, hashicorp/yamux fails what README.md says, and the suite sees what is wrong.

The suite runs as its own program, once for each server, and the tests look at what it has written.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import socket
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import pytest

from support.programs import build_go
from wire.frames import ACK, FIN, RST, SYN, Frame, describe
from wire.peer import Failed, Peer, Setting
from wire.registry import CHECKS, LEVELS
from wire.runner import select

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
# Most of the time is silence; threads wait for it side by side.
JOBS = "16"

Results: TypeAlias = dict[str, dict[str, Any]]

# The limit counts what the first test of a server waits for: its start and the whole run.
pytestmark = pytest.mark.timeout(120)


@contextlib.contextmanager
def running(command: Sequence[str], env: dict[str, str] | None = None) -> Iterator[int]:
    """A server program that prints its port; it is ended afterwards."""
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT, env=env)
    assert process.stdin and process.stdout
    try:
        yield int(process.stdout.readline())
    finally:
        process.kill()
        process.wait()
        process.stdin.close()
        process.stdout.close()


def suite(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tests.wire", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100, check=False)


def run_suite(port: int, directory: Path, *arguments: str) -> tuple[subprocess.CompletedProcess[str], Results]:
    file = directory / "results.json"
    done = suite(f"127.0.0.1:{port}", "--jobs", JOBS, "--json", str(file), *arguments)
    assert done.returncode in (0, 1), done.stderr
    return done, {result["name"]: result for result in json.loads(file.read_text())}


@pytest.fixture(scope="module")
def geyamux_port() -> Iterator[int]:
    with running([sys.executable, str(HERE / "echo_server.py")], {**os.environ, "PYTHONPATH": str(ROOT)}) as port:
        yield port


@pytest.fixture(scope="module")
def of_geyamux(geyamux_port: int, tmp_path_factory: pytest.TempPathFactory) -> Results:
    done, results = run_suite(geyamux_port, tmp_path_factory.mktemp("geyamux"))
    assert (done.returncode == 0) == all(result["outcome"] != "FAIL" for result in results.values())
    return results


@pytest.mark.slow
@pytest.mark.parametrize("name", CHECKS)
def test_geyamux_passes(name: str, of_geyamux: Results):
    result = of_geyamux[name]
    assert (result["outcome"], result["seen"]) == ("pass", ""), result["purpose"]


# --- hashicorp/yamux ---


@pytest.fixture(scope="module")
def of_hashicorp(tmp_path_factory: pytest.TempPathFactory) -> Results:
    """Its failures wait for what never comes, so it gets less time for that."""
    directory = tmp_path_factory.mktemp("hashicorp")
    program = build_go(HERE / "goecho", directory)
    with running([program], {**os.environ, "GOMAXPROCS": "1"}) as port:
        return run_suite(port, directory, "--timeout", "3")[1]


def documented() -> dict[str, str]:
    """The rows of the table in README.md."""
    section = (HERE / "README.md").read_text().partition("## hashicorp/yamux of 2019")[2].partition("\n## ")[0]
    return dict(re.findall(r"^\| `(\w+)` \| (.+) \|$", section, re.MULTILINE))


@pytest.mark.interop
@pytest.mark.slow
def test_hashicorp_fails_what_the_readme_lists_and_nothing_else(of_hashicorp: Results):
    failed = {name: result["seen"] for name, result in of_hashicorp.items() if result["outcome"] != "pass"}
    assert sorted(failed) == sorted(documented()), failed
    assert of_hashicorp.keys() == CHECKS.keys()


def test_the_readme_lists_checks_that_there_are():
    assert documented().keys() <= CHECKS.keys()
    assert all(documented().values())


# --- the suite itself: it must see what is wrong ---


def header(kind: int, flags: int, stream: int, length: int, version: int = 0) -> bytes:
    return struct.pack(">BBHII", version, kind, flags, stream, length)


ACKED = header(1, 2, 1, 0)
ENDED = header(1, 4, 1, 0)
RESET = header(1, 8, 1, 0)
BROKEN = {
    "a second ACK": ACKED + ACKED,
    "a second FIN": ACKED + ENDED + ENDED,
    "payload behind FIN": ACKED + ENDED + header(0, 0, 1, 1) + b"x",
    "FIN behind RST": ACKED + RESET + ENDED,
    "credit behind RST": RESET + header(1, 0, 1, 5),
    "a byte beyond the credit": ACKED + header(0, 0, 1, 262_145) + bytes(262_145),
    "credit beyond 32 bits": ACKED + header(1, 0, 1, 2**32 - 1),
    "an unknown flag": header(1, 18, 1, 0),
    "a pong that nobody asked for": header(2, 2, 0, 9),
    "a ping with a stream id": header(2, 1, 3, 9),
    "a ping without flags": header(2, 0, 0, 9),
    "a stream that nobody opened": header(1, 2, 3, 0),
    "a frame on stream 0": header(0, 0, 0, 0),
    "a frame behind GoAway(1)": header(3, 0, 0, 1) + ACKED,
    "a GoAway with flags": header(3, 1, 0, 0),
}
FINE = {
    "an echo": ACKED + header(0, 0, 1, 2) + b"ab" + ENDED,
    "the whole credit": ACKED + header(0, 0, 1, 262_144) + bytes(262_144),
    "flags in one frame": header(0, 6, 1, 2) + b"ab",
    "credit behind FIN": ACKED + ENDED + header(1, 0, 1, 70_000),
    "a refusal": RESET,
    "frames behind GoAway(0)": header(3, 0, 0, 0) + ACKED + ENDED,
    "a ping, and a stream of its own": header(2, 1, 0, 9) + header(1, 1, 2, 0),
}


@contextlib.contextmanager
def scripted(answer: bytes = b"", *, end: bool = False) -> Iterator[tuple[Peer, socket.socket]]:
    """A peer that has opened stream 1, and a server that has said these bytes, whatever it was asked."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(1)
        peer = Peer(Setting(*listener.getsockname(), timeout=0.2, silence=0.05))
        server, _ = listener.accept()
    with server, contextlib.closing(peer):
        assert peer.open() == 1
        # In pieces, as the buffers of both ends may be small.
        for begin in range(0, len(answer), 65536):
            server.sendall(answer[begin : begin + 65536])
            peer.collect(0)
        if end:
            server.shutdown(socket.SHUT_WR)
        yield peer, server


@pytest.mark.parametrize("what", BROKEN)
def test_the_audit_sees(what: str):
    with scripted(BROKEN[what]) as (peer, _):
        peer.collect(0.05)
        with pytest.raises(Failed, match="the server sent"):
            peer.judge()


@pytest.mark.parametrize("what", FINE)
def test_the_audit_is_content_with(what: str):
    with scripted(FINE[what]) as (peer, _):
        assert peer.collect(0.05) or peer.frames
        peer.judge()


@pytest.mark.parametrize("bad", [header(1, 2, 1, 0, version=1), header(4, 0, 1, 0)])
def test_a_header_that_is_none_fails_at_once(bad: bytes):
    with pytest.raises(Failed, match="a header of version"), scripted(bad) as (peer, _):
        peer.collect(0.05)


def test_frames_of_a_stream_that_we_reset_are_not_judged():
    with scripted(ACKED) as (peer, server):
        peer.send(header(1, RST, 1, 0))
        server.sendall(ACKED + ENDED + ENDED)
        peer.collect(0.05)
        peer.judge()


def test_a_new_life_of_an_id_begins_anew():
    with scripted(ACKED + ENDED) as (peer, server):
        peer.collect(0.05)
        peer.send(header(1, FIN, 1, 0), header(1, SYN, 1, 0))
        server.sendall(ACKED + ENDED)
        peer.collect(0.05)
        peer.judge()
        assert [frame.flags for frame in peer.streams[1].frames] == [ACK, FIN]


def test_credit_is_counted_from_bytes_cut_anywhere():
    with scripted(ACKED) as (peer, _):
        for byte in header(1, 0, 1, 1000) + header(0, 0, 1, 14) + header(1, 0, 1, 9) + b"xx" + header(1, 0, 1, 5):
            peer.send(bytes([byte]))
        assert (peer.streams[1].credit, peer.streams[1].allowed) == (262_144 + 1005, 262_144 - 14)


@pytest.mark.parametrize(
    ("call", "reason"),
    [
        (lambda peer: peer.barrier(), "no answer to a ping in 0.2 s, but nothing"),
        (lambda peer: peer.read_to_end(), "the connection is open after 0.2 s"),
        (lambda peer: peer.await_fin(1), "no FIN on stream 1"),
        (lambda peer: peer.expect_echo(1, b"ab"), "0 of 2 bytes on stream 1, then no more payload in 0.2 s, but nothing"),
        (lambda peer: peer.write(1, bytes(300_000)), "no credit on stream 1 after 262144 bytes"),
    ],
)
def test_what_never_comes_is_a_failure_with_what_came(call: Callable[[Peer], None], reason: str):
    with scripted(ACKED) as (peer, server):
        server.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 20)
        with pytest.raises(Failed, match=re.escape(reason)):
            call(peer)


def test_an_echo_that_differs_is_a_failure():
    with (
        scripted(ACKED + header(0, 0, 1, 3) + b"abX") as (peer, _),
        pytest.raises(Failed, match="3 bytes, which differ from those sent at 2"),
    ):
        peer.expect_echo(1, b"abc")


@pytest.mark.parametrize(("cut", "end"), [(b"", "ended"), (ACKED[:5], "ended inside a frame")])
def test_how_the_connection_ended_is_told(cut: bytes, end: str):
    with scripted(ACKED + cut, end=True) as (peer, _):
        assert [frame.flags for frame in peer.read_to_end()] in ([ACK], [])
        assert peer.end == end


def test_a_report_names_the_frames():
    assert describe([Frame(1, SYN | FIN, 3, 7)]) == "WindowUpdate SYN+FIN on 3, 7"
    assert describe([Frame(0, 0, 1, n) for n in range(9)]).startswith("9 frames, the last: Data on 1, 3;")


# --- the command ---


def test_every_check_says_what_it_is_for():
    assert len(CHECKS) >= 60
    for entry in CHECKS.values():
        assert entry.level in LEVELS
        assert entry.purpose.endswith(".") and entry.source


def test_list_tells_them_all_and_runs_none():
    done = suite("--list")
    assert done.returncode == 0
    assert all(entry.name in done.stdout and entry.purpose in done.stdout for entry in CHECKS.values())


def test_words_select_checks():
    assert {entry.name for entry in select(["CVE-2026-31814"])} == {
        "credit_beyond_32_bits_is_repelled",
        "credit_beyond_32_bits_in_steps_is_repelled",
    }
    assert {entry.level for entry in select(["STRICT"])} == {"STRICT"}


def test_without_a_server_the_status_is_2():
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        done = suite(f"127.0.0.1:{closed.getsockname()[1]}")
    assert (done.returncode, "no server" in done.stderr) == (2, True)
    assert suite().returncode == 2


def test_a_server_that_says_nothing_fails_and_what_needs_echo_is_not_applicable():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(16)
        port = listener.getsockname()[1]
        done = suite(f"127.0.0.1:{port}", "-k", "a_ping_is_answered", "-k", "fin_on_empty_data", "--timeout", "0.2")
    assert done.returncode == 1
    assert "FAIL  MUST    a_ping_is_answered_with_its_value" in done.stdout
    assert "n/a   MUST    fin_on_empty_data" in done.stdout
    assert "the server does not echo" in done.stdout


def test_a_server_that_passes_gives_status_0(geyamux_port: int):
    done = suite(f"127.0.0.1:{geyamux_port}", "-k", "echo_of_13_bytes")
    assert done.returncode == 0
    assert "pass  MUST    echo_of_13_bytes" in done.stdout


def test_the_suite_needs_nothing_but_the_standard_library(tmp_path: Path, geyamux_port: int):
    copy = tmp_path / "anywhere"
    shutil.copytree(HERE, copy, ignore=shutil.ignore_patterns("__pycache__", "test_*", "echo_server.py", "goecho"))
    # -S: no site-packages.
    command = [sys.executable, "-S", "-E", "-m", "anywhere", f"127.0.0.1:{geyamux_port}", "-k", "echo_of_13_bytes"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, "")
