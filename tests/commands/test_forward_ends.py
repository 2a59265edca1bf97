"""How `geyamux forward` ends, and what it does when something fails: nothing torn looks whole, nothing is left behind."""

from __future__ import annotations

import os
import shlex
import signal
import socket as stdlib_socket
import sys
from pathlib import Path

import gevent
import pytest
from gevent import subprocess

from commands.running import ANYWHERE, QUICK, expose, raw_dial, wait_streams, works
from interop.peers import check_opened
from support.waiting import wait_for
from support.wire import ACK, SYN, WINDOW_UPDATE, window_update
from tunnels.running import ENVIRONMENT, GEYAMUX, Child, Children, alive, descendants
from tunnels.service import DOWNLOAD, Service, connect, refused, under_way

BOTH_SIGNALS = pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
BOTH_ENDS = pytest.mark.parametrize("end", ["relay", "agent"])

# --- signals ---


@BOTH_SIGNALS
@BOTH_ENDS
def test_a_signal_lets_a_stream_finish_takes_no_new_ones_and_ends_with_0(
    children: Children, service: Service, number: signal.Signals, end: str
):
    tunnel = expose(children, service.address)
    download = under_way(service, tunnel.near)
    child = getattr(tunnel, end)
    child.process.send_signal(number)
    assert child.event("draining")["streams"] == 1
    if end == "relay":
        with pytest.raises(ConnectionRefusedError):
            connect(tunnel.near)
    else:
        wait_for(lambda: refused(tunnel.near), "the relay knows")
    assert child.process.poll() is None
    service.gate.set()
    check_opened([DOWNLOAD], [download.get()])
    assert child.event("stopped")["streams"] == 0
    child.wait(0)


@BOTH_ENDS
def test_a_stream_that_outlasts_the_drain_is_cut_and_does_not_look_whole(children: Children, service: Service, end: str):
    tunnel = expose(children, service.address, **{end: ["--drain=0.2"]})
    download = under_way(service, tunnel.near)
    child = getattr(tunnel, end)
    child.terminate()
    assert child.event("draining")["seconds"] == 0.2
    assert download.get().end == "reset"
    assert child.event("stopped")["streams"] == 1
    child.wait(0)


def test_a_visitor_who_reads_late_is_told_that_it_was_cut_although_the_process_is_gone(
    children: Children, service: Service
):
    tunnel = expose(children, service.address, relay=["--drain=0.1"])
    with connect(tunnel.near) as visitor:
        visitor.sendall(b"source 40000000 1\n")
        gevent.socket.wait_read(visitor.fileno())
        tunnel.relay.stop()
        with pytest.raises(ConnectionResetError):
            while visitor.recv(65536):
                pass


@BOTH_SIGNALS
def test_a_second_signal_ends_it_at_once_with_1(children: Children, service: Service, number: signal.Signals):
    tunnel = expose(children, service.address)
    download = under_way(service, tunnel.near)
    tunnel.relay.process.send_signal(signal.SIGTERM)
    tunnel.relay.event("draining")
    tunnel.relay.process.send_signal(number)
    tunnel.relay.wait(1)
    assert download.get().end == "reset"
    assert "Traceback" not in str(tunnel.relay)


def test_a_relay_that_is_killed_leaves_nothing_that_looks_whole(children: Children, service: Service):
    tunnel = expose(children, service.address)
    download = under_way(service, tunnel.near)
    tunnel.relay.kill()
    assert download.get().end == "reset"


def test_a_signal_ends_one_that_waits_to_dial_again(children: Children, nobody: str):
    forward = children.forward("--dial", nobody, "--to", nobody)
    forward.event("retrying", attempt=2)
    forward.stop()


def test_a_signal_ends_one_whose_child_says_nothing_and_the_child(children: Children, nobody: str):
    sleeper = shlex.join([sys.executable, "-c", "import sys; print('up', file=sys.stderr); sys.stdin.read()"])
    forward = children.forward("--dial", f"exec:{sleeper}", "--to", nobody)
    forward.wait_line(lambda line: line == "up", "the child")
    (child,) = descendants(forward.pid)
    forward.stop()
    assert not alive(child)


def test_a_signal_cuts_standard_input_and_output_at_the_end_of_the_drain(children: Children):
    there = children.forward(
        "--listen", ANYWHERE, "--to", "stdio:", "--drain=0.1", stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    with raw_dial(there.listening("trunk")) as peer, there.process.stdin, there.process.stdout as back:
        peer.send(window_update(1, 0, SYN))
        peer.expect(WINDOW_UPDATE, ACK, 1)
        there.terminate()
        assert back.read() == b""
    there.wait(0)


# --- failures of others ---


def test_a_target_that_refuses_resets_the_visitor_and_is_told(children: Children, nobody: str):
    tunnel = expose(children, nobody)
    assert refused(tunnel.near)
    told = tunnel.agent.event("stream_failed", level="warning")
    assert nobody in told["message"] and "refused" in told["reason"] and told["stream"] == 2
    assert refused(tunnel.near), "it goes on"


def test_a_target_that_resets_resets_the_visitor(children: Children):
    with stdlib_socket.create_server(("127.0.0.1", 0)) as listener:
        tunnel = expose(children, f"127.0.0.1:{listener.getsockname()[1]}", agent=["-v"])
        with connect(tunnel.near) as visitor:
            visitor.sendall(b"x")
            gevent.socket.wait_read(listener.fileno())
            conn, _ = listener.accept()
            conn.setsockopt(stdlib_socket.SOL_SOCKET, stdlib_socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
            conn.close()
            with pytest.raises(ConnectionResetError):
                visitor.recv(1)
        assert tunnel.agent.event("stream_failed")["stream"] == 2


def test_without_an_agent_a_visitor_is_reset_at_once(children: Children):
    relay = children.forward("--listen", ANYWHERE, "--from", ANYWHERE)
    assert refused(relay.listening("from"))
    told = relay.event("stream_failed", level="warning")
    assert (told["session"], told["stream"]) == (None, None) and told["reason"]


def test_an_agent_that_dies_resets_the_visitor(children: Children, service: Service):
    tunnel = expose(children, service.address)
    download = under_way(service, tunnel.near)
    tunnel.agent.kill()
    assert download.get().end == "reset"
    tunnel.relay.event("disconnected")


def test_a_listener_that_dies_resets_who_came_through_the_dialling_end(children: Children, service: Service):
    there = children.forward("--listen", ANYWHERE, "--to", service.address)
    here = children.forward("--dial", there.listening("trunk"), "--from", ANYWHERE)
    here.event("connected")
    download = under_way(service, here.listening("from"))
    there.kill()
    assert download.get().end == "reset"


def test_a_visitor_that_resets_resets_the_target(children: Children, tmp_path: Path):
    with stdlib_socket.create_server(("127.0.0.1", 0)) as listener:
        tunnel = expose(children, f"127.0.0.1:{listener.getsockname()[1]}", relay=[f"--control={tmp_path}/control"])
        visitor = connect(tunnel.near)
        gevent.socket.wait_read(listener.fileno())
        conn, _ = listener.accept()
        with gevent.socket.socket(fileno=conn.detach()) as target:
            wait_streams(tmp_path / "control", 1)
            visitor.setsockopt(stdlib_socket.SOL_SOCKET, stdlib_socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
            visitor.close()
            with pytest.raises(ConnectionResetError):
                target.recv(1)


def test_a_relay_that_comes_back_is_found_again(children: Children, service: Service):
    tunnel = expose(children, service.address, agent=[QUICK])
    trunk = tunnel.relay.command[tunnel.relay.command.index("--listen") + 1]
    assert trunk == ANYWHERE
    name = tunnel.agent.command[tunnel.agent.command.index("--dial") + 1]
    tunnel.relay.kill()
    tunnel.agent.event("disconnected")
    relay = children.forward("--listen", name, "--from", tunnel.near)
    relay.event("connected")
    works(tunnel.near)


def test_a_name_that_is_not_known_is_asked_for_again(children: Children, nobody: str):
    env = {**ENVIRONMENT, "RES_OPTIONS": "timeout:1 attempts:1"}
    forward = children.forward("--dial", "no-such-host.invalid:7000", "--to", nobody, QUICK, env=env)
    told = forward.event("retrying", attempt=2)
    assert "no-such-host.invalid:7000" in told["message"] and "ame" in told["reason"]
    forward.stop()


def test_a_visitor_in_line_for_a_stream_who_leaves_gets_none(children: Children, service: Service, tmp_path: Path):
    tunnel = expose(children, service.address, relay=["--max-streams=1", f"--control={tmp_path}/control"])
    download = under_way(service, tunnel.near)
    connect(tunnel.near).close()
    service.gate.set()
    check_opened([DOWNLOAD], [download.get()])
    works(tunnel.near)
    wait_streams(tmp_path / "control", 0)


def test_who_reads_the_log_no_more_does_not_end_it(children: Children, service: Service, tmp_path: Path):
    reading, writing = os.pipe()
    words = ("forward", "--listen", f"unix:{tmp_path}/trunk", "--from", f"unix:{tmp_path}/near", "-vv")
    child = children.start(Child, [*GEYAMUX, *words], log="stdout", stderr=writing)
    os.close(writing)
    with gevent.fileobject.FileObjectPosix(reading, "rb") as log:
        assert b"listening" in log.readline()
    agent = children.forward("--dial", f"unix:{tmp_path}/trunk", "--to", service.address)
    agent.event("connected")
    works(f"{tmp_path}/near")
    child.stop()


# --- what can't be done is told in one line ---


def test_what_can_not_be_listened_at_is_one_line(children: Children, nobody: str, tmp_path: Path):
    file = tmp_path / "file"
    file.write_text("keep me")
    with stdlib_socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        cases = [
            ((f"127.0.0.1:{port}", ANYWHERE), f"can't listen at 127.0.0.1:{port}: Address already in use: end what"),
            ((ANYWHERE, f"127.0.0.1:{port}"), f"can't listen at 127.0.0.1:{port}: Address already in use: end what"),
            ((f":{port}", ANYWHERE), f"can't listen at :{port}: Address already in use: end what"),
            ((f"unix:{file}", ANYWHERE), f"can't listen at unix:{file}: there is a file that is no socket"),
            ((f"unix:{tmp_path}/no/place", ANYWHERE), "No such file or directory"),
            # Not even root may make files there.
            (("unix:/sys/socket", ANYWHERE), "can't listen at unix:/sys/socket: Operation not permitted"),
            ((f"unix:{'x' * 200}", ANYWHERE), "path too long"),
            (("192.0.2.1:0", ANYWHERE), "can't listen at 192.0.2.1:0: Cannot assign requested address"),
        ]
        started = [children.forward("--listen", trunk, "--from", near) for (trunk, near), _ in cases]
        started.append(children.forward("--listen", ANYWHERE, "--to", nobody, "--control", str(file)))
        for child, why in zip(started, [*(why for _, why in cases), str(file)], strict=True):
            child.wait(1)
            line = child.lines[-1]
            assert line.startswith("geyamux forward: ") and why in line, child
            assert "Traceback" not in str(child) and not [line for line in child.lines[:-1] if line[0] != "{"], child
    assert file.read_text() == "keep me"


def test_standard_input_that_is_closed_is_one_line(children: Children, service: Service):
    there = children.forward("--listen", ANYWHERE, "--to", service.address)
    trunk = there.listening("trunk")
    for words in (["--listen", "stdio:", "--to", service.address], ["--dial", trunk, "--from", "stdio:"]):
        command = shlex.join([*GEYAMUX, "forward", "--json", *words])
        child = children.start(Child, ["/bin/sh", "-c", f"exec {command} <&- >&-"])
        child.wait(1)
        assert child.lines[-1] == "geyamux forward: stdio: Bad file descriptor", child
