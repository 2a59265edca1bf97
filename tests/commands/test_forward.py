"""Each option of `geyamux forward` makes the difference that it promises; test_forward_tls.py has those of TLS."""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import signal
import stat

import pytest
from gevent import socket, subprocess

from commands.running import (
    ANYWHERE,
    QUICK,
    entries,
    events,
    expose,
    raw_dial,
    raw_listener,
    snapshot,
    wait_streams,
    works,
)
from interop.peers import Job, pattern
from support.waiting import wait_for
from support.wire import ACK, DATA, FIN, GO_AWAY, INITIAL_WINDOW, PING, RST, SYN, WINDOW_UPDATE, data, ping, window_update
from tunnels.running import GEYAMUX, Child, Children, Forward
from tunnels.service import Service, check, connect, refused, under_way

# --- --dial, --listen, --to, --from ---


def test_who_dials_may_connect_the_streams_and_who_listens_open_them(children: Children, service: Service):
    tunnel = expose(children, service.address)
    works(tunnel.near)
    tunnel.agent.stop()
    tunnel.relay.stop()


def test_who_dials_may_open_the_streams_and_who_listens_connect_them(children: Children, service: Service):
    there = children.forward("--listen", ANYWHERE, "--to", service.address)
    here = children.forward("--dial", there.listening("trunk"), "--from", ANYWHERE)
    here.event("connected")
    works(here.listening("from"))
    here.stop()
    there.stop()


def test_one_trunk_carries_streams_of_both_ends(children: Children, service: Service):
    with Service() as other:
        left = children.forward("--listen", ANYWHERE, "--from", ANYWHERE, "--to", service.address)
        right = children.forward("--dial", left.listening("trunk"), "--from", ANYWHERE, "--to", other.address)
        left.event("connected")
        right.event("connected")
        job = Job("digest", 1000, 3)
        check(left.listening("from"), [job])
        assert (len(service.uploads), len(other.uploads)) == (0, 1)
        check(right.listening("from"), [job])
        assert (len(service.uploads), len(other.uploads)) == (1, 1)
        right.stop()
        left.stop()


@pytest.mark.parametrize("far", ["--to", "--from"])
def test_streams_that_the_peer_may_not_open_are_refused(children: Children, service: Service, far: str):
    """Who was given --from alone connects nothing for its peer."""
    forward = children.forward("--listen", ANYWHERE, far, service.address if far == "--to" else ANYWHERE)
    with raw_dial(forward.listening("trunk")) as peer:
        peer.send(window_update(1, 0, SYN))
        peer.expect(WINDOW_UPDATE, ACK if far == "--to" else RST, 1)


# --- addresses ---


def test_addresses_may_be_of_ip_6_a_port_alone_or_of_all_interfaces(children: Children, service: Service):
    target = service.address.rpartition(":")[2]
    relay = children.forward("--listen", "[::1]:0", "--from", ":0")
    trunk = relay.listening("trunk")
    assert re.fullmatch(r"\[::1\]:\d+", trunk)
    agent = children.forward("--dial", trunk, "--to", target)
    relay.event("connected")
    assert agent.event("connected")["peer"] == trunk
    port = relay.listening("from").removeprefix("[::]:")
    works(f"127.0.0.1:{port}", f"::1:{port}")


def test_a_port_alone_is_for_this_machine_and_a_colon_before_it_dials_this_machine(children: Children, service: Service):
    relay = children.forward("--listen", "0", "--from", "0")
    trunk, near = relay.listening("trunk"), relay.listening("from")
    assert trunk.startswith("127.0.0.1:") and near.startswith("127.0.0.1:")
    children.forward("--dial", trunk.removeprefix("127.0.0.1"), "--to", f"localhost:{service.address.rpartition(':')[2]}")
    relay.event("connected")
    works(near)


def start_with_pipes(children: Children, *words: str) -> Forward:
    return children.forward(*words, stdin=subprocess.PIPE, stdout=subprocess.PIPE)


def far_end(children: Children, target: str) -> str:
    """The trunk of one who listens and connects to it."""
    return children.forward("--listen", ANYWHERE, "--to", target).listening("trunk")


def test_standard_input_and_output_are_one_stream_and_the_command_ends_with_it(children: Children, service: Service):
    here = start_with_pipes(children, "--dial", far_end(children, service.address), "--from", "stdio:")
    job = Job("echo", 300_000, 5, half=True)
    payload = b"".join(pattern(job.size, job.seed))
    with here.process.stdin as to, here.process.stdout as back:
        to.write(job.request_line() + payload)
        to.close()
        assert back.read() == payload
    here.wait()


def test_standard_input_and_output_may_be_one_socket(children: Children, service: Service):
    near, far = socket.socketpair()
    with near, far:
        trunk = far_end(children, service.address)
        here = children.forward("--dial", trunk, "--from", "stdio:", stdin=far.fileno(), stdout=far.fileno())
        far.close()
        near.sendall(b"echo *\nhello")
        near.shutdown(socket.SHUT_WR)
        with near.makefile("rb") as file:
            assert file.read() == b"hello"
    here.wait()


def test_a_reset_stream_ends_a_command_whose_standard_input_goes_on(children: Children, nobody: str):
    here = start_with_pipes(children, "--dial", far_end(children, nobody), "--from", "stdio:", "-v")
    with here.process.stdin, here.process.stdout as back:
        assert back.read() == b""
        assert here.event("stream_failed")["stream"] == 1
        here.wait(1)


def test_one_stream_of_the_peer_gets_standard_input_and_output(children: Children):
    there = start_with_pipes(children, "--listen", ANYWHERE, "--to", "stdio:")
    with raw_dial(there.listening("trunk")) as peer, there.process.stdin as to, there.process.stdout as back:
        peer.send(window_update(1, 0, SYN) + data(1, b"question\n"))
        peer.expect(WINDOW_UPDATE, ACK, 1)
        assert back.readline() == b"question\n"
        peer.send(window_update(3, 0, SYN))
        peer.expect(WINDOW_UPDATE, ACK, 3)
        peer.expect(WINDOW_UPDATE, RST, 3)
        peer.send(window_update(1, 0, FIN))
        assert back.read() == b""
        to.write(b"answer")
        to.close()
        peer.expect_data(1, b"answer")
        peer.expect(WINDOW_UPDATE, FIN, 1)
        peer.expect(GO_AWAY, 0, 0, 0)
    there.wait()


# --- several agents ---


def test_connections_go_round_the_agents_and_past_those_that_died(children: Children):
    with contextlib.ExitStack() as stack:
        services = [stack.enter_context(Service()) for _ in range(3)]
        relay = children.forward("--listen", ANYWHERE, "--from", ANYWHERE)
        trunk, near = relay.listening("trunk"), relay.listening("from")
        agents = [children.forward("--dial", trunk, "--to", service.address) for service in services]
        for _ in agents:
            relay.event("connected")
        for _ in range(6):
            check(near, [Job("digest", 10)])
        assert [len(service.uploads) for service in services] == [2, 2, 2]
        agents[1].kill()
        relay.event("disconnected")
        for _ in range(4):
            check(near, [Job("digest", 10)])
        assert [len(service.uploads) for service in services] == [4, 2, 4]


# --- --keepalive ---


def test_keepalive_is_the_silence_before_a_ping_and_0_means_none(children: Children, nobody: str):
    with raw_listener() as listener:
        # A window that grows needs pings, too.
        words = ("--dial", listener.address, "--to", nobody, "--window=256K")
        children.forward(*words, "--keepalive=0")
        with listener.accept() as silent:
            # There is one in any case: whether it has found a peer.
            silent.send(ping(ACK, silent.expect(PING, SYN).length))
            asking = children.forward(*words, "--keepalive=0.5")
            with listener.accept() as peer:
                for _ in range(2):
                    peer.send(ping(ACK, peer.expect(PING, SYN).length))
                # The one that would not is older.
                silent.expect_nothing()
                reason = asking.event("disconnected")["reason"]
        assert re.search("ping|heard|silen|answer", reason), reason


def test_a_peer_that_is_frozen_is_noticed_and_comes_back(children: Children, service: Service):
    tunnel = expose(children, service.address, relay=["--keepalive=0.5"], agent=[QUICK])
    tunnel.agent.process.send_signal(signal.SIGSTOP)
    try:
        tunnel.relay.event("disconnected")
        assert refused(tunnel.near)
    finally:
        tunnel.agent.process.send_signal(signal.SIGCONT)
    tunnel.relay.event("connected")
    works(tunnel.near)


# --- --window ---


@pytest.mark.parametrize(
    ("words", "more"),
    [([], 0), (["--window=auto"], 0), (["--window=1M"], (1 << 20) - INITIAL_WINDOW), (["--window", "300000"], 37856)],
    ids=["left out", "auto", "1M", "in bytes"],
)
def test_the_window_is_offered_with_the_first_frame_of_a_stream(
    children: Children, service: Service, words: list[str], more: int
):
    both = children.forward("--listen", ANYWHERE, "--to", service.address, "--from", ANYWHERE, *words)
    with raw_dial(both.listening("trunk")) as peer:
        peer.send(window_update(1, 0, SYN))
        peer.expect(WINDOW_UPDATE, ACK, 1, more)
        both.event("connected")
        with connect(both.listening("from")):
            peer.expect(WINDOW_UPDATE, SYN, 2, more)


def test_a_window_that_is_no_auto_does_not_grow(children: Children, service: Service, tmp_path):
    words = ["--window=512K", f"--control={tmp_path}/control"]
    tunnel = expose(children, service.address, relay=words)
    download = under_way(service, tunnel.near)
    (stream,) = wait_streams(tmp_path / "control", 1)
    assert stream["receive_limit"] == 512 << 10
    service.gate.set()
    download.get()


# --- --max-streams ---


def test_one_stream_of_the_peer_more_than_max_streams_is_refused(children: Children, service: Service):
    forward = children.forward("--listen", ANYWHERE, "--to", service.address, "--max-streams=2")
    with raw_dial(forward.listening("trunk")) as peer:
        for number, answer in ((1, ACK), (3, ACK), (5, RST)):
            peer.send(window_update(number, 0, SYN))
            peer.expect(WINDOW_UPDATE, answer, number)
        peer.send(window_update(1, 0, RST))
        numbers = itertools.count(7, 2)

        def is_accepted() -> bool:
            peer.send(window_update(number := next(numbers), 0, SYN))
            return peer.next()[2:4] == (ACK, number)

        wait_for(is_accepted, "room for another")


def test_one_connection_more_than_max_streams_waits_for_its_turn(children: Children):
    relay = children.forward("--listen", ANYWHERE, "--from", ANYWHERE, "--max-streams=1")
    near = relay.listening("from")
    with raw_dial(relay.listening("trunk")) as peer:
        peer.answer_ping()
        relay.event("connected")
        with connect(near), connect(near) as second:
            peer.expect(WINDOW_UPDATE, SYN, 2)
            second.sendall(b"later")
            peer.send(ping(SYN, 1))
            peer.expect(PING, ACK)
            peer.send(window_update(2, 0, ACK) + window_update(2, 0, RST))
            peer.expect(WINDOW_UPDATE, SYN, 4)
            peer.expect_data(4, b"later")
    told = relay.event("warning")["message"]
    assert "1 streams (--max-streams)" in told, told


# --- --retry-max-interval, --max-retries ---


def test_it_dials_again_after_ever_longer_waits_up_to_the_longest(children: Children, nobody: str):
    forward = children.forward("--dial", nobody, "--to", nobody, "--retry-max-interval=0.6", "--max-retries=3")
    waits = [forward.event("retrying", attempt=attempt)["seconds"] for attempt in (1, 2, 3)]
    assert 0.25 <= waits[0] <= 0.5
    assert all(0.3 <= wait <= 0.6 for wait in waits[1:])
    last = forward.wait_line(lambda line: line.startswith("geyamux forward: gave up on "), "giving up")
    assert nobody in last and "3 retries" in last
    forward.wait(1)


def test_without_retries_the_first_failure_is_the_end(children: Children, nobody: str):
    forward = children.forward("--dial", nobody, "--to", nobody, "--max-retries=0")
    forward.wait(1)
    assert len(forward.lines) == 1 and "connection refused" in forward.lines[0], forward


def test_it_never_gives_up_unless_told_and_finds_who_comes_late(children: Children, service: Service, nobody: str):
    agent = children.forward("--dial", nobody, "--to", service.address, "--retry-max-interval=0.02")
    agent.event("retrying", attempt=20)
    relay = children.forward("--listen", nobody, "--from", ANYWHERE)
    agent.event("connected")
    relay.event("connected")
    works(relay.listening("from"))


# --- --quiet-go-away ---


@pytest.mark.parametrize("words", [[], ["--quiet-go-away"]], ids=["announced", "quiet"])
def test_go_away_comes_before_the_last_bytes_or_with_quiet_behind_them(
    children: Children, service: Service, words: list[str]
):
    forward = children.forward("--listen", ANYWHERE, "--to", service.address, *words)
    with raw_dial(forward.listening("trunk")) as peer:
        peer.send(window_update(1, 0, SYN) + data(1, b"echo *\n"))
        peer.expect(WINDOW_UPDATE, ACK, 1)
        forward.terminate()
        forward.event("draining", streams=1)
        if not words:
            peer.expect(GO_AWAY, 0, 0, 0)
        peer.send(window_update(3, 0, SYN))
        peer.expect(WINDOW_UPDATE, RST, 3)
        peer.send(data(1, b"the rest", FIN))
        frames = [(found.type, found.flags, found.body) for found in peer.rest()]
        goodbye = [(GO_AWAY, 0, b"")] if words else []
        assert frames == [(DATA, 0, b"the rest"), (WINDOW_UPDATE, FIN, b""), *goodbye]
    forward.wait()


# --- --control ---


def test_a_control_socket_tells_its_user_alone_and_leaves_nothing_behind(children: Children, service: Service, tmp_path):
    path = tmp_path / "control"
    tunnel = expose(children, service.address, relay=["--control", str(path)])
    found = path.stat().st_mode
    assert stat.S_ISSOCK(found) and stat.S_IMODE(found) == 0o600
    told = snapshot(path)
    assert (told["pid"], told["state"], told["from"]) == (tunnel.relay.pid, "open", tunnel.near)
    assert len(told["sessions"]) == 1
    tunnel.relay.stop()
    assert not path.exists()


def test_a_control_socket_tells_that_it_dials_again(children: Children, nobody: str, tmp_path):
    path = tmp_path / "control"
    forward = children.forward("--dial", nobody, "--to", nobody, "--control", str(path))
    forward.event("retrying")
    told = snapshot(path)
    assert told["state"] == "retrying" and 0 <= told["retry"] <= 30 and "refused" in told["reason"]


# --- -v, --json ---


@pytest.fixture
def verbose(request: pytest.FixtureRequest, children: Children, service: Service) -> Forward:
    """Who has connected a stream, and ended; with these words."""
    there = children.forward("--listen", ANYWHERE, "--to", service.address, *request.param)
    with raw_dial(there.listening("trunk")) as peer:
        peer.send(window_update(1, 0, SYN) + data(1, b"digest *\n12345", FIN))
        peer.expect(WINDOW_UPDATE, ACK, 1)
        assert peer.expect(DATA, 0, 1).body.startswith(b"5 ")
        peer.expect(WINDOW_UPDATE, FIN, 1)
    there.event("disconnected")
    there.stop()
    return there


@pytest.mark.parametrize("verbose", [[]], indirect=True)
def test_single_streams_are_not_logged_without_being_asked_for(verbose: Forward):
    assert events(verbose) == ["listening", "connected", "disconnected", "draining", "stopped"]


@pytest.mark.parametrize("verbose", [["-v"]], indirect=True)
def test_verbose_tells_of_each_stream(verbose: Forward):
    told = {entry["event"]: entry for entry in entries(verbose)}
    session = told["connected"]["session"]
    opened, closed = told["stream_opened"], told["stream_closed"]
    assert (opened["session"], opened["stream"]) == (closed["session"], closed["stream"]) == (session, 1)
    assert re.fullmatch(r"127\.0\.0\.1:\d+", opened["peer"])
    assert closed["received"] == len(b"digest *\n12345")
    assert closed["sent"] > 64
    assert 0 <= closed["seconds"] < 20


@pytest.mark.parametrize("verbose", [["-vv"]], indirect=True)
def test_twice_verbose_tells_of_each_frame(verbose: Forward):
    # The library's own lines.
    frames = [entry["message"] for entry in entries(verbose) if entry["level"] == "debug"]
    assert any("SYN" in line for line in frames) and any("FIN" in line for line in frames), verbose


@pytest.mark.parametrize("verbose", [["-v"]], indirect=True)
def test_each_line_of_json_has_a_time_a_level_an_event_and_a_message(verbose: Forward):
    for entry in entries(verbose):
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}\+00:00", entry["time"])
        assert entry["level"] in ("info", "warning")
        assert entry["message"] and "\n" not in entry["message"]
    assert {"what", "address"} <= entries(verbose)[0].keys()


def test_lines_are_words_without_json(children: Children, service: Service):
    child = children.start(Child, [*GEYAMUX, "forward", "--listen", ANYWHERE, "--to", service.address])
    line = child.wait_line(lambda line: "listening" in line, "its address")
    assert re.fullmatch(r"\d\d:\d\d:\d\d listening for trunks at 127\.0\.0\.1:\d+", line)
    child.stop()


def test_nothing_is_written_to_standard_output(children: Children, service: Service):
    words = [*GEYAMUX, "forward", "--listen", ANYWHERE, "--to", service.address, "-vv"]
    reading, writing = os.pipe()
    with open(reading, "rb") as output:
        try:
            child = children.start(Child, words, stdout=writing)
        finally:
            os.close(writing)
        line = child.wait_line(lambda line: "listening" in line, "its address")
        with raw_dial(line.split()[-1]) as peer:
            peer.send(window_update(1, 0, SYN))
            peer.expect(WINDOW_UPDATE, ACK, 1)
        child.stop()
        assert output.read() == b""
