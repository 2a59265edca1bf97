"""Every example runs, as a user runs it: in a process of its own, from somewhere else, and says what it should."""

from __future__ import annotations

import os
import pty
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import geyamux

EXAMPLES = Path(__file__).parent.parent / "examples"
# Below the time limit of a test, so that a process that hangs is ended and what it said is shown.
PATIENCE = 25
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(Path(geyamux.__file__).parent.parent)}
QUICKSTART_SUMMARY = re.compile(
    rf"""geyamux {re.escape(geyamux.__version__)}: one TCP connection on port \d+, \d+ files
1,000 streams of the client, 1,000 of them open at once: \d+\.\d MB sent, and echoed
100 streams of the server: \d+\.\d MB pushed
every digest is right on both sides
\d+\.\d\d seconds; round trip afterwards \d+\.\d\d ms \(median of \d+\)
"""
)
PROGRESS = re.compile(r"\r *[\d,]+ of 1,000 streams")


def run(script: Path, directory: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(script), *arguments],
        cwd=directory,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )


def run_on_a_terminal(script: Path, directory: Path) -> tuple[int, str]:
    """Exit code and output of a script whose standard output is a terminal."""
    ours, theirs = pty.openpty()
    try:
        with subprocess.Popen(
            [sys.executable, str(script)], cwd=directory, env=ENVIRONMENT, stdin=subprocess.DEVNULL, stdout=theirs
        ) as process:
            os.close(theirs)
            output = bytearray()
            try:
                while chunk := os.read(ours, 65536):
                    output += chunk
            except OSError:
                pass  # EIO: how a terminal says that nobody writes to it any more
            except BaseException:
                process.kill()
                raise
    finally:
        os.close(ours)
    return process.returncode, output.decode().replace("\r\n", "\n")


@pytest.fixture
def echo_server(tmp_path: Path) -> Iterator[int]:
    """The port of a running echo_server.py."""
    command = [sys.executable, str(EXAMPLES / "echo_server.py"), "0"]
    with subprocess.Popen(command, cwd=tmp_path, env=ENVIRONMENT, stdout=subprocess.PIPE, text=True) as process:
        try:
            line = process.stdout.readline()
            match = re.fullmatch(r"listening on port (\d+)\n", line)
            assert match is not None, line
            yield int(match[1])
            assert process.poll() is None, "the server ended by itself"
        finally:
            process.terminate()


def test_every_example_has_its_test_here():
    assert {path.name for path in EXAMPLES.glob("*.py")} == {"echo_client.py", "echo_server.py", "quickstart.py"}


def test_the_quickstart_needs_nothing_but_the_package_and_sums_up_what_it_did(tmp_path):
    alone = Path(shutil.copy(EXAMPLES / "quickstart.py", tmp_path))
    done = run(alone, tmp_path)
    assert done.returncode == 0, done.stderr
    assert QUICKSTART_SUMMARY.fullmatch(done.stdout), done.stdout


def test_the_quickstart_shows_progress_on_a_terminal_and_wipes_it_away(tmp_path):
    code, output = run_on_a_terminal(EXAMPLES / "quickstart.py", tmp_path)
    assert code == 0, output
    progress, wiped, summary = output.partition("\r\x1b[K")
    assert wiped
    assert re.fullmatch(f"(?:{PROGRESS.pattern})+", progress), progress
    assert QUICKSTART_SUMMARY.fullmatch(summary), summary


@pytest.mark.parametrize(
    ("right", "wrong", "complaint"),
    [
        pytest.param(
            'data = stream.read()\n        stream.sendall(data)\n    report["received"]',
            'data = stream.read()\n        stream.sendall(data[1:])\n    report["received"]',
            r"the echo of \w+\.py on stream \d+ is not what was sent \(the first of 1000\)",
            id="an echo",
        ),
        pytest.param(
            'stream.sendall(f"{name} {digest(data)}\\n".encode())\n        stream.sendall(data)',
            'stream.sendall(f"{name} {digest(data[1:])}\\n".encode())\n        stream.sendall(data)',
            r"the server says: \w+\.py on stream \d+ is not what the client sent \(the first of 1000\)",
            id="a file of the client",
        ),
        pytest.param(
            'stream.sendall(f"{name} {digest(data)}\\n".encode())\n            stream.sendall(data)',
            'stream.sendall(f"{name} {digest(data)}\\n".encode())\n            stream.sendall(data[::-1])',
            r"\w+\.py, pushed on stream \d+, is not what the server sent \(the first of 100\)",
            id="a file of the server",
        ),
        pytest.param(
            "stream.sendall(digest(data).encode())",
            "stream.sendall(digest(data[1:]).encode())",
            r"the server says: \w+\.py came to the client as something else \(the first of 100\)",
            id="an answer",
        ),
        pytest.param(
            "print(json.dumps(report), flush=True)",
            "pass",
            r"the server ended without a report",
            id="the report",
        ),
    ],
)
def test_the_quickstart_fails_and_says_why_when_something_differs(tmp_path, right, wrong, complaint):
    source = (EXAMPLES / "quickstart.py").read_text(encoding="utf-8")
    assert source.count(right) == 1
    script = tmp_path / "quickstart.py"
    script.write_text(source.replace(right, wrong), encoding="utf-8")
    done = run(script, tmp_path)
    assert done.returncode == 1
    assert "every digest is right" not in done.stdout
    assert "Traceback" not in done.stderr
    assert re.fullmatch(f"quickstart failed: {complaint}", done.stderr.splitlines()[-1]), done.stderr


def test_the_echo_client_gets_its_line_back_from_the_echo_server(tmp_path, echo_server):
    for _ in range(2):
        done = run(EXAMPLES / "echo_client.py", tmp_path, str(echo_server))
        assert (done.returncode, done.stdout) == (0, "b'hello\\n'\n"), done.stderr


def test_the_echo_server_serves_clients_and_streams_side_by_side(echo_server):
    sessions = [geyamux.connect(("127.0.0.1", echo_server), timeout=10) for _ in range(3)]
    streams = [session.open() for session in sessions for _ in range(20)]
    try:
        for number, stream in enumerate(streams):
            stream.settimeout(10)
            stream.sendall(b"line %d\nlast" % number)
        for number, stream in enumerate(reversed(streams), 1):
            stream.close_write()
            assert stream.read() == b"line %d\nlast" % (len(streams) - number)
    finally:
        for session in sessions:
            session.close()


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.name)
def test_an_example_says_what_it_shows_and_how_to_run_it(path):
    first, _, rest = path.read_text(encoding="utf-8").partition("\n")
    assert re.fullmatch(r'"""[A-Z].+[.:]?', first) and first.endswith(".")
    assert f"\n    python {path.name}" in rest
