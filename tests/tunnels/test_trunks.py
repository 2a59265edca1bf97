"""`geyamux forward` over trunks other than TCP: standard input and output, a child process, Unix sockets."""

from __future__ import annotations

import hashlib
import os
import re
import shlex
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
from gevent import subprocess

from interop.peers import Job, check_opened, pattern
from tunnels.running import ENVIRONMENT, GEYAMUX, Children, Forward, alive, descendants
from tunnels.service import DOWNLOAD, Service, check, many_jobs, under_way

QUICK = "--retry-max-interval=0.1"
ANYWHERE = "127.0.0.1:0"


def pipes() -> tuple[tuple[int, int], tuple[int, int]]:
    """Standard input and output of one process, and of the other."""
    (there_read, there_write), (back_read, back_write) = os.pipe(), os.pipe()
    return (back_read, there_write), (there_read, back_write)


def socketpair() -> tuple[tuple[int, int], tuple[int, int]]:
    near, far = (end.detach() for end in socket.socketpair())
    return (near, near), (far, far)


@pytest.fixture(params=[pipes, socketpair])
def joined(request: pytest.FixtureRequest, children: Children, service: Service) -> Iterator[tuple[Forward, Forward]]:
    """Who dials and who listens, each on its own standard input and output."""
    near, far = request.param()
    try:
        serve = children.forward("--listen", "stdio:", "--to", service.address, stdin=far[0], stdout=far[1])
        reach = children.forward("--dial", "stdio:", "--from", ANYWHERE, stdin=near[0], stdout=near[1])
    finally:
        # What the processes have is theirs alone, or neither would see the end of the other.
        for fd in {*near, *far}:
            os.close(fd)
    reach.event("connected")
    yield reach, serve


def test_standard_input_and_output_carry_a_tunnel(joined: tuple[Forward, Forward]):
    reach, serve = joined
    check(reach.listening("from"), many_jobs(half=True))
    reach.stop()
    serve.wait()


def test_sigterm_of_one_end_of_standard_io_lets_a_download_finish_and_ends_both(
    joined: tuple[Forward, Forward], service: Service
):
    reach, serve = joined
    download = under_way(service, reach.listening("from"))
    serve.terminate()
    serve.event("draining")
    service.gate.set()
    check_opened([DOWNLOAD], [download.get()])
    serve.wait()
    reach.wait()


# --- standard input and output as the one connection ---


@pytest.fixture
def serve(children: Children, service: Service) -> str:
    """The trunk of a forwarder that connects to the service."""
    return children.forward("--listen", ANYWHERE, "--to", service.address).listening("trunk")


def through_standard_io(trunk: str, data: bytes, *words: str) -> subprocess.CompletedProcess[bytes]:
    command = [*GEYAMUX, "forward", "--dial", trunk, "--from", "stdio:", *words]
    return subprocess.run(command, input=data, capture_output=True, env=ENVIRONMENT, timeout=20)


def test_standard_input_is_sent_to_its_end_and_the_answer_is_all_of_the_output(serve: str):
    job = Job("digest", 3_000_000, 4, half=True)
    done = through_standard_io(serve, job.request_line() + b"".join(pattern(job.size, job.seed)))
    assert (done.stdout, done.returncode) == (job.digest_answer(), 0), done.stderr.decode()


def test_standard_io_may_be_files(serve: str, tmp_path: Path):
    job = Job("echo", 1_000_000, 5, half=True)
    (tmp_path / "in").write_bytes(job.request_line() + b"".join(pattern(job.size, job.seed)))
    with (tmp_path / "in").open("rb") as source, (tmp_path / "out").open("wb") as sink:
        command = [*GEYAMUX, "forward", "--dial", serve, "--from", "stdio:"]
        subprocess.run(command, stdin=source, stdout=sink, env=ENVIRONMENT, timeout=20, check=True)
    assert hashlib.sha256((tmp_path / "out").read_bytes()).hexdigest() == job.digest()


def test_a_connection_of_standard_io_that_is_refused_is_a_failure(children: Children, nobody: str):
    trunk = children.forward("--listen", ANYWHERE, "--to", nobody).listening("trunk")
    done = through_standard_io(trunk, b"hello")
    assert (done.stdout, done.returncode) == (b"", 1), done.stderr.decode()


def test_standard_io_without_a_trunk_is_a_failure_where_no_retries_are_wanted(nobody: str):
    done = through_standard_io(nobody, b"hello", "--max-retries=0")
    assert (done.stdout, done.returncode) == (b"", 1), done.stderr.decode()
    assert re.fullmatch(r"geyamux forward: .*connection refused.*\n", done.stderr.decode())


# --- a child process ---


def child_address(*words: str) -> str:
    return "exec:" + shlex.join([*GEYAMUX, "forward", "--listen", "stdio:", *words])


def test_a_child_process_carries_a_tunnel_and_ends_with_it(children: Children, service: Service):
    reach = children.forward("--dial", child_address("--to", service.address), "--from", ANYWHERE)
    reach.event("connected")
    (child,) = descendants(reach.pid)
    check(reach.listening("from"), many_jobs(half=True))
    reach.stop()
    assert not alive(child)


def test_a_child_that_ends_is_started_again(children: Children, service: Service):
    reach = children.forward("--dial", child_address("--to", service.address), "--from", ANYWHERE, QUICK)
    near = reach.listening("from")
    for _ in range(2):
        reach.event("connected")
        (child,) = descendants(reach.pid)
        check(near, [DOWNLOAD])
        os.kill(child, 9)
        reach.event("disconnected")
    reach.stop()


@pytest.mark.parametrize(
    ("command", "told"),
    [
        ("no-such-command", "no-such-command"),
        ("false", "status 1"),
        ("'", "'"),
        ("sh -c 'echo hello, world; exec sleep 60'", "Yamux"),
    ],
    ids=["that is not there", "that fails", "with a quote too few", "that speaks another language"],
)
def test_a_command_of_no_use_is_told_in_one_line(children: Children, command: str, told: str):
    reach = children.forward("--dial", f"exec:{command}", "--from", ANYWHERE, "--max-retries=0")
    reach.wait_line(lambda line: line.startswith("geyamux forward: ") and told in line, "the command")
    reach.wait(1 if command != "'" else 2)
    assert "Traceback" not in str(reach)
    assert not descendants(reach.pid)


# --- Unix sockets ---


def test_all_ends_may_be_unix_sockets(children: Children, tmp_path: Path):
    trunk, near = tmp_path / "trunk", tmp_path / "near"
    with Service(str(tmp_path / "service")) as service:
        relay = children.forward("--listen", f"unix:{trunk}", "--from", f"unix:{near}")
        relay.listening("trunk")
        agent = children.forward("--dial", f"unix:{trunk}", "--to", f"unix:{service.address}")
        agent.event("connected")
        relay.event("connected")
        check(str(near), many_jobs(half=True))
        agent.stop()
        relay.stop()
    assert not trunk.exists() and not near.exists(), "left behind"


def test_a_relay_that_was_killed_takes_over_the_unix_socket_that_it_left(
    children: Children, service: Service, tmp_path: Path
):
    words = ("--listen", f"unix:{tmp_path}/trunk", "--from", f"unix:{tmp_path}/near")
    relay = children.forward(*words)
    relay.listening("trunk")
    agent = children.forward("--dial", f"unix:{tmp_path}/trunk", "--to", service.address, QUICK)
    agent.event("connected")
    relay.kill()
    relay = children.forward(*words)
    agent.event("connected")
    relay.event("connected")
    check(f"{tmp_path}/near", [DOWNLOAD])
    agent.stop()
    relay.stop()


def test_a_unix_socket_of_another_is_not_taken_away(children: Children, tmp_path: Path):
    words = ("--listen", f"unix:{tmp_path}/trunk", "--from", ANYWHERE)
    first = children.forward(*words)
    first.listening("trunk")
    second = children.forward(*words)
    second.wait(1)
    assert second.lines[-1].startswith("geyamux forward: ") and f"{tmp_path}/trunk" in second.lines[-1], second
    first.stop()
