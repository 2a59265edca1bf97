"""The examples of this kind run, as a user runs them, and say what they should."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

import geyamux
from balancers.balancer import family, listens, missing, program
from support.links import free_port

ROOT = Path(geyamux.__file__).parent.parent
EXAMPLES = ROOT / "examples"
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT)}
PATIENCE = 20


def run(name, directory, *arguments):
    return subprocess.run(
        [sys.executable, str(EXAMPLES / name), *arguments],
        cwd=directory,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )


@contextlib.contextmanager
def running(*command):
    with subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


def test_with_mutual_tls_the_agent_is_greeted_by_its_name_and_nobody_else_gets_in(tmp_path):
    done = run("mutual_tls.py", tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        "agent: server.example says hello agent-7.example",
        "nobody: the session ended: TLSV13_ALERT_CERTIFICATE_REQUIRED",
        "stranger: the session ended: TLSV1_ALERT_UNKNOWN_CA",
        "lost: refused in the handshake: CERTIFICATE_VERIFY_FAILED",
    ]
    assert done.stderr == ""


@pytest.mark.interop
def test_the_echo_client_gets_its_line_back_through_haproxy_while_one_of_the_two_servers_is_there(tmp_path):
    if missing("haproxy"):
        pytest.skip(missing("haproxy"))
    ports = {old: free_port() for old in ("7000", "7001", "7002")}
    text = (EXAMPLES / "behind_haproxy.cfg").read_text(encoding="utf-8")
    for old, new in ports.items():
        assert f"127.0.0.1:{old}" in text
        text = text.replace(f"127.0.0.1:{old}", f"127.0.0.1:{new}")
    (tmp_path / "behind_haproxy.cfg").write_text(text, encoding="utf-8")
    script = str(EXAMPLES / "echo_server.py")
    with (
        running(sys.executable, script, str(ports["7001"])) as one,
        running(sys.executable, script, str(ports["7002"])) as two,
        running(program("haproxy"), "-db", "-f", str(tmp_path / "behind_haproxy.cfg")) as balancer,
    ):
        for server in (one, two):
            assert "listening" in server.stdout.readline()
        while not any(listens(pid, ports["7000"]) for pid in family(balancer.pid)):
            assert balancer.poll() is None
        for _ in range(2):
            done = run("echo_client.py", tmp_path, str(ports["7000"]))
            assert (done.returncode, done.stdout) == (0, "b'hello\\n'\n"), done.stderr
        one.kill()
        one.wait(PATIENCE)
        done = run("echo_client.py", tmp_path, str(ports["7000"]))
        assert (done.returncode, done.stdout) == (0, "b'hello\\n'\n"), done.stderr
