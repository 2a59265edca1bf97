"""`geyamux forward` through ssh and a real sshd: as `ssh -L`, as `ssh -R`, and as ssh's own ProxyCommand."""

from __future__ import annotations

import hashlib
import os
import shlex
import signal
from pathlib import Path
from typing import Any

import pytest
from gevent import subprocess

from interop.peers import check_opened, pattern
from support.waiting import wait_for
from tunnels.running import ENVIRONMENT, GEYAMUX, Children, Forward, alive, descendants
from tunnels.service import DOWNLOAD, Service, check, many_jobs, refused, under_way
from tunnels.sshd import HOST, Sshd

pytestmark = pytest.mark.interop

QUICK = "--retry-max-interval=0.1"


def remote(sshd: Sshd, *words: str) -> str:
    """The address of a `geyamux forward` that ssh starts on the host, with its trunk on standard input and output."""
    return " ".join([f"exec:{sshd.ssh} geyamux forward --listen stdio:", *words])


def reach(children: Children, sshd: Sshd, to: str) -> tuple[Forward, str]:
    """A forwarder that reaches a service from the host, and where it listens here."""
    forward = children.forward("--dial", remote(sshd, "--to", to), "--from", "127.0.0.1:0", QUICK)
    forward.event("connected")
    return forward, forward.listening("from")


def ssh_of(forward: Forward) -> int:
    """The pid of the ssh that it has started."""
    (pid,) = descendants(forward.pid)
    return pid


def wait_until_the_host_is_idle(sshd: Sshd) -> None:
    wait_for(lambda: not sshd.running(), "the end of the command on the host")


def test_a_service_of_the_host_is_reached_from_here(children: Children, sshd: Sshd, service: Service):
    forward, near = reach(children, sshd, service.address)
    check(near, many_jobs(half=True))
    forward.stop()
    wait_until_the_host_is_idle(sshd)


def test_a_service_from_here_is_exposed_on_the_host(children: Children, sshd: Sshd, service: Service):
    forward = children.forward("--dial", remote(sshd, "--json", "--from", "127.0.0.1:0"), "--to", service.address)
    # The log of the command on the host comes through ssh, too.
    check(forward.listening("from"), many_jobs(half=True))
    forward.stop()
    wait_until_the_host_is_idle(sshd)


def test_a_target_refused_on_the_host_resets_the_connection_here(children: Children, sshd: Sshd, nobody: str):
    forward, near = reach(children, sshd, nobody)
    assert refused(near)
    assert refused(near), "the tunnel is still there"
    forward.stop()


def test_when_ssh_is_killed_another_is_started(children: Children, sshd: Sshd, service: Service):
    forward, near = reach(children, sshd, service.address)
    download = under_way(service, near)
    os.kill(ssh_of(forward), signal.SIGKILL)
    forward.event("disconnected")
    assert download.get().end == "reset"
    service.gate.set()
    forward.event("connected")
    wait_for(lambda: len(sshd.running()) == 1, "the end of the old command on the host")
    check(near, [DOWNLOAD])
    forward.stop()


def test_a_command_that_the_host_does_not_have_is_told_in_a_line_and_tried_again(children: Children, sshd: Sshd):
    address = f"exec:{sshd.ssh} no-such-command forward --listen stdio: --to 1"
    forward = children.forward("--dial", address, "--from", "127.0.0.1:0", QUICK)
    for attempt in (1, 2):
        event = forward.event("retrying", attempt=attempt)
        assert "127" in event["reason"] and "\n" not in event["reason"], event
    assert any("no-such-command: command not found" in line for line in forward.lines)
    forward.stop()


def test_it_gives_up_on_a_host_that_lets_nobody_in(children: Children, sshd: Sshd):
    address = f"exec:{sshd.ssh.replace('ssh ', 'ssh -l nobody-of-that-name ')} geyamux forward --listen stdio: --to 1"
    forward = children.forward("--dial", address, "--from", "127.0.0.1:0", "--max-retries=1", QUICK)
    forward.wait(1)
    assert any("Permission denied" in line for line in forward.lines)
    assert forward.lines[-1].startswith("geyamux forward: "), forward.lines[-1]


# --- the end of it ---


def test_sigterm_lets_a_download_finish_and_ends_both_ends(children: Children, sshd: Sshd, service: Service):
    forward, near = reach(children, sshd, service.address)
    started = descendants(forward.pid)
    download = under_way(service, near)
    forward.terminate()
    forward.event("draining")
    service.gate.set()
    check_opened([DOWNLOAD], [download.get()])
    forward.wait()
    assert started and not any(Path(f"/proc/{pid}").exists() for pid in started)
    wait_until_the_host_is_idle(sshd)


def test_sigterm_on_the_host_lets_a_download_finish_and_it_connects_again(
    children: Children, sshd: Sshd, service: Service
):
    forward, near = reach(children, sshd, service.address)
    download = under_way(service, near)
    os.kill(sshd.running()[0], signal.SIGTERM)
    forward.event("connected")
    service.gate.set()
    check_opened([DOWNLOAD], [download.get()])
    check(near, [DOWNLOAD])
    forward.stop()


def test_sigkill_of_the_forwarder_ends_the_command_on_the_host(children: Children, sshd: Sshd, service: Service):
    forward, _ = reach(children, sshd, service.address)
    started = descendants(forward.pid)
    forward.kill()
    wait_until_the_host_is_idle(sshd)
    wait_for(lambda: not any(map(alive, started)), "the end of ssh")


# --- as ProxyCommand ---


@pytest.fixture
def proxied(children: Children, sshd: Sshd) -> list[str]:
    """Options of ssh and scp: the way to the host is a tunnel, one more for each call."""
    serve = children.forward("--listen", "127.0.0.1:0", "--to", f"127.0.0.1:{sshd.port}")
    proxy = [*GEYAMUX, "forward", "--dial", serve.listening("trunk"), "--from", "stdio:"]
    return ["-F", str(sshd.config), "-o", f"ProxyCommand={' '.join(proxy)}"]


def command(*words: str, **options: Any) -> bytes:
    done = subprocess.run(words, capture_output=True, env=ENVIRONMENT, timeout=20, **options)
    assert done.returncode == 0, done.stderr.decode()
    return bytes(done.stdout)


def test_ssh_runs_a_command_through_the_tunnel(proxied: list[str]):
    data = b"".join(pattern(3_000_000, 21))
    answer = command("ssh", *proxied, HOST, "cat", input=data)
    assert hashlib.sha256(answer).hexdigest() == hashlib.sha256(data).hexdigest()


def test_scp_copies_a_file_through_the_tunnel(proxied: list[str], tmp_path: Path):
    data = b"".join(pattern(3_000_000, 22))
    (tmp_path / "here").write_bytes(data)
    command("scp", *proxied, str(tmp_path / "here"), f"{HOST}:{tmp_path}/there")
    command("scp", *proxied, f"{HOST}:{tmp_path}/there", str(tmp_path / "back"))
    assert (tmp_path / "back").read_bytes() == data


def test_ssh_goes_through_a_tunnel_that_another_ssh_carries(sshd: Sshd):
    # As a jump host.
    words = [*GEYAMUX, "forward", "--dial", remote(sshd, "--to", f"127.0.0.1:{sshd.port}"), "--from", "stdio:"]
    proxy = f"ProxyCommand={shlex.join(words)}"
    assert command("ssh", "-F", str(sshd.config), "-o", proxy, HOST, "echo I am there") == b"I am there\n"
    wait_until_the_host_is_idle(sshd)
