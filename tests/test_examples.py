"""Every example runs, as a user runs it: in a process of its own, from somewhere else, and says what it should."""

from __future__ import annotations

import ast
import contextlib
import http.client
import json
import os
import pty
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import gevent
import pytest
from gevent import socket as gsocket

import geyamux

TESTS = Path(__file__).parent
README = TESTS.parent / "README.md"
EXAMPLES = TESTS.parent / "examples"
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


# What an example prints that is run without arguments.
OUTPUTS = {
    "consul_preface.py": r"""plain: the server is up
yamux: members: answered on stream 1
yamux: leader: answered on stream 3
another byte: the server hangs up
""",
    "file_transfer.py": r"""one file could not be sent: the disk is broken
20 others arrived: True
the one is there: False
""",
    "job_queue.py": r"""bob has failed with job [0-4]
1\d of 20 jobs were done when the queue had room for the last
all results are right: True
they come from ann eve
""",
    "json_rpc.py": r"""2 \+ 3 = 5
divide: error -32000, ZeroDivisionError: division by zero
fly: error -32601, there is no method fly
100 calls of 0\.2 seconds took [0-4]\.\d seconds together
sleep: no answer within 0\.1 seconds
count to a million: the caller was killed, the work has stopped at 3
""",
    "pubsub.py": r"""news reaches 2 subscribers
sport reaches 1 subscriber
  alice reads: rain tomorrow
  bob reads: rain tomorrow
  carol reads: one all
bob unsubscribes; then he reads: b''
news reaches 1 subscriber
500 numbers published; the fast reader has them all: True
the one that read nothing was dropped: code 1, after 52 numbers
""",
    "push_feed.py": r"""tablet has left
60 pictures pushed in \d\.\d s
desk got 60 pictures in \d+\.\d s, the last of them number 60
laptop got 60 pictures in \d+\.\d s, the last of them number 60
phone got [1-5]?\d pictures in (?!0\.[0-3])\d+\.\d s, the last of them number 60
tablet got 3 pictures in \d+\.\d s, the last of them number \d+
""",
    "wsgi_behind_nat.py": r"""/one on stream 2
/two on stream 2
/one on stream 4
/two on stream 4
""",
}
FLASK_OUTPUT = r"""before there is an agent: 503
an agent has come
a browser connects from port (\d+)
  Hello 127\.0\.0\.1, port \1, on stream 2
  Hello 127\.0\.0\.1, port \1, on stream 2
  it sends 1,000,000 bytes, the app got 1000000
  it is streamed tick 0 to tick 4, which comes (?!0\.[0-2])\d\.\d seconds later
"""


def run(script: Path, directory: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a script to its end; it must have ended the processes that it began."""
    command = [sys.executable, str(script), *arguments]
    with subprocess.Popen(
        command,
        cwd=directory,
        env=ENVIRONMENT,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        try:
            stdout, stderr = process.communicate(timeout=PATIENCE)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            stdout, stderr = process.communicate()
            pytest.fail(f"{script.name} did not end; it said:\n{stdout}{stderr}")
    with pytest.raises(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    return subprocess.CompletedProcess(command, process.returncode, stdout, stderr)


@contextlib.contextmanager
def running(directory: Path, name: str, *arguments: str) -> Iterator[Iterator[str]]:
    """The lines that an example prints, which is a part that goes on until it is ended."""
    command = [sys.executable, str(EXAMPLES / name), *arguments]
    with subprocess.Popen(command, cwd=directory, env=ENVIRONMENT, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield process.stdout
            assert process.poll() is None, f"{name} {arguments} ended by itself"
        finally:
            process.terminate()


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
    with running(tmp_path, "echo_server.py", "0") as lines:
        line = next(lines)
        match = re.fullmatch(r"listening on port (\d+)\n", line)
        assert match is not None, line
        yield int(match[1])


def test_every_example_is_run_by_a_test():
    tests = "\n".join(path.read_text(encoding="utf-8") for path in TESTS.rglob("test_*.py"))
    untested = [path.name for path in EXAMPLES.glob("*.py") if not re.search(rf"(?<!\w){path.stem}\.py", tests)]
    assert untested == []


def test_the_readme_lists_every_example_by_the_question_that_it_answers():
    section = re.search(r"^## Examples\n(.*?)^## ", README.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    assert section is not None
    rows = re.findall(r"^\| ([^|]+) \| ([^|]+) \|$", section[1], re.MULTILINE)[1:]
    assert all(question.endswith("?") for question, _ in rows)
    listed = [name for _, cell in rows for name in re.findall(r"\[`(\w+\.py)`\]\(examples/\1\)", cell)]
    assert sorted(listed) == sorted(path.name for path in EXAMPLES.glob("*.py"))


@pytest.mark.parametrize("name", OUTPUTS)
def test_an_example_prints_what_it_shows(tmp_path, name):
    done = run(EXAMPLES / name, tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert re.fullmatch(OUTPUTS[name], done.stdout), done.stdout


@pytest.mark.interop
def test_a_flask_app_behind_nat_learns_who_its_visitors_are(tmp_path):
    pytest.importorskip("flask", reason="needs Flask (pip install flask)")
    done = run(EXAMPLES / "visitors_behind_nat.py", tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert re.fullmatch(FLASK_OUTPUT, done.stdout), done.stdout


@contextlib.contextmanager
def relaying(directory: Path, trunk: str) -> Iterator[tuple[str, int]]:
    """The command line's relay: where agents dial, and the port for visitors."""
    command = [sys.executable, "-m", "geyamux", "forward", "--json", "--listen", trunk, "--from", "0"]
    with subprocess.Popen(command, cwd=directory, env=ENVIRONMENT, stderr=subprocess.PIPE, text=True) as process:
        try:
            events = [json.loads(process.stderr.readline()) for _ in range(2)]
            addresses = {event["what"]: event["address"] for event in events}
            yield addresses["trunk"], int(addresses["from"].rpartition(":")[2])
        finally:
            process.terminate()


@pytest.mark.interop
def test_a_flask_app_is_served_from_behind_nat_and_dials_again(tmp_path):
    pytest.importorskip("flask", reason="needs Flask (pip install flask)")
    with relaying(tmp_path, "127.0.0.1:0") as (trunk, _):
        pass
    with running(tmp_path, "flask_behind_nat.py", *trunk.split(":")) as said:
        assert "Connection refused" in next(said)
        for _ in range(2):
            with relaying(tmp_path, trunk) as (_, port):
                assert visit_soon(port) == b"Hello from behind NAT\n"


def visit_soon(port: int) -> bytes:
    """The page, as soon as there is an agent to ask."""
    deadline = time.monotonic() + PATIENCE
    while True:
        visited = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
        try:
            visited.request("GET", "/")
            return visited.getresponse().read()
        except ConnectionError:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        finally:
            visited.close()


@pytest.mark.interop
def test_the_agent_of_the_visitors_dials_again_when_its_relay_comes_back(tmp_path):
    pytest.importorskip("flask", reason="needs Flask (pip install flask)")
    name = "visitors_behind_nat.py"
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = str(unused.getsockname()[1])
    with running(tmp_path, name, "agent", "127.0.0.1", port) as said:
        assert "Connection refused" in next(said)
        for _ in range(2):
            with running(tmp_path, name, "relay", "127.0.0.1", port, "0") as lines:
                visited = http.client.HTTPConnection("127.0.0.1", int(next(lines).split()[1]), timeout=10)
                assert next(lines) == "an agent has come\n"
                visited.request("GET", "/")
                assert visited.getresponse().read().startswith(b"Hello 127.0.0.1, port ")
                visited.close()


@pytest.mark.interop
def test_the_flask_relay_turns_to_the_newest_agent_that_is_there(tmp_path):
    pytest.importorskip("flask", reason="needs Flask (pip install flask)")

    def serve(name, session):
        for stream in session:
            with stream:
                stream.readline()
                stream.sendall(name)

    def visit():
        with gsocket.create_connection(("127.0.0.1", int(web_port)), timeout=10) as conn:
            return conn.recv(100)

    def visit_until(wanted):
        # The relay hears a little later that an agent has left.
        deadline = time.monotonic() + 10
        while (answer := visit()) != wanted and time.monotonic() < deadline:
            gevent.sleep(0.01)
        assert answer == wanted

    with running(tmp_path, "visitors_behind_nat.py", "relay", "127.0.0.1", "0", "0") as lines:
        agent_port, web_port = next(lines).split()
        agents = []
        for name in b"older", b"newer":
            agents.append(geyamux.connect(("127.0.0.1", int(agent_port)), timeout=10))
            gevent.spawn(serve, name, agents[-1])
            assert next(lines) == "an agent has come\n"
        assert visit() == b"newer"
        agents[1].close()
        visit_until(b"older")
        agents[0].close()
        visit_until(b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("flask_behind_nat.py", []),
        ("visitors_behind_nat.py", ["foo"]),
        ("visitors_behind_nat.py", ["relay"]),
        ("visitors_behind_nat.py", ["agent", "127.0.0.1"]),
        ("gunicorn_backend.py", []),
    ],
)
@pytest.mark.interop
def test_wrong_arguments_are_answered_by_how_to_run_it(tmp_path, name, arguments):
    if "behind_nat" in name:
        pytest.importorskip("flask", reason="needs Flask (pip install flask)")
    done = run(EXAMPLES / name, tmp_path, *arguments)
    assert (done.returncode, done.stdout) == (1, "")
    assert f"python {name}" in done.stderr and "Traceback" not in done.stderr


@contextlib.contextmanager
def on_a_terminal(directory: Path, name: str, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    """An example that can be sent Ctrl-C, with its children, as a terminal does it."""
    with subprocess.Popen(
        [sys.executable, "-u", str(EXAMPLES / name), *arguments],
        cwd=directory,
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        # What a shell starts in the background ignores it.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def wait_until_asleep(pid: int) -> None:
    """Return when a process waits: Python raises KeyboardInterrupt wherever it is, in a callback of the hub, too."""
    deadline = time.monotonic() + 10
    while Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0] != "S":
        assert time.monotonic() < deadline
        time.sleep(0.001)


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")
@pytest.mark.parametrize(
    ("name", "arguments", "preface"),
    [
        ("echo_server.py", ["0"], b""),
        ("consul_preface.py", ["server"], b"\x04"),
        ("file_transfer.py", ["receiver", "."], b""),
        ("pubsub.py", ["broker"], b""),
        ("gunicorn_backend.py", ["0"], b""),
    ],
)
def test_ctrl_c_ends_a_server_without_a_traceback(tmp_path, name, arguments, preface):
    with on_a_terminal(tmp_path, name, *arguments) as process:
        port = int(process.stdout.readline().split()[-1])
        with socket.create_connection(("127.0.0.1", port), timeout=10) as conn:
            # The answer to a ping tells that it serves.
            conn.sendall(preface + bytes.fromhex("00 02 0001 00000000 00000007"))
            assert conn.recv(12)
            wait_until_asleep(process.pid)
            os.killpg(process.pid, signal.SIGINT)
            _, stderr = process.communicate(timeout=PATIENCE)
    # gevent may report where the interrupt was raised, in a callback of its own; the script does not end in one.
    assert process.returncode == 0 and str(EXAMPLES / name) not in stderr, stderr


def test_ctrl_c_does_not_let_every_call_of_the_rpc_complain(tmp_path):
    with on_a_terminal(tmp_path, "json_rpc.py") as process:
        while not process.stdout.readline().startswith("fly"):
            pass
        time.sleep(0.1)  # in the middle of 100 calls, which take 0.2 seconds
        os.killpg(process.pid, signal.SIGINT)
        _, stderr = process.communicate(timeout=PATIENCE)
    # gevent may report where the interrupt was raised, in each of the two processes.
    assert stderr.count("Traceback") < 10, stderr


def test_what_a_peer_sends_with_its_first_byte_reaches_the_session(tmp_path):
    """In one piece: the byte, a stream opened with its first data, and that stream's end."""
    opening = bytes.fromhex("00 01 0001 00000001 00000000") + bytes.fromhex("00 00 0000 00000001 00000006") + b"peers\n"
    with (
        running(tmp_path, "consul_preface.py", "server") as lines,
        socket.create_connection(("127.0.0.1", int(next(lines))), timeout=10) as conn,
    ):
        conn.sendall(b"\x04" + opening)
        came = b""
        while b"peers: answered on stream 1\n" not in came:
            data = conn.recv(4096)
            assert data, came
            came += data


def test_the_broker_refuses_what_it_does_not_understand(tmp_path):
    with (
        running(tmp_path, "pubsub.py", "broker") as lines,
        geyamux.connect(("127.0.0.1", int(next(lines))), timeout=10) as session,
    ):
        for line in b"shout\n", b"publish topic\n", b"\n", b"publish topic cut off":
            stream = session.open()
            stream.settimeout(10)
            stream.sendall(line)
            stream.close_write()
            with pytest.raises(geyamux.StreamReset) as raised:
                stream.read()
            assert raised.value.code == 2


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
    told = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    assert re.match(r"[A-Z].+[.?]$", told, re.MULTILINE)
    assert re.search(rf"\b(python|gunicorn) .*\b{path.stem}\b", told)
