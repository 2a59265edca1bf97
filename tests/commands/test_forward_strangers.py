"""`geyamux forward` among strangers, peers that hang, readers that stop and systems that have nothing left to give."""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import functools
import json
import os
import re
import resource
import shlex
import signal
import sys
import termios
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gevent
import gevent.pool
import pytest
import trustme
from gevent import socket
from gevent.fileobject import FileObjectPosix

import geyamux
from commands.running import ANYWHERE, entries, events, expose, snapshot, works
from geyamux.cli import trunk
from interop.peers import Job, check_opened, pattern
from support.waiting import wait_for
from tunnels.running import GEYAMUX, Child, Children, Forward, descendants
from tunnels.service import DOWNLOAD, Service, connect, refused, run, under_way

VISIT = Job("digest", 1000, 3, half=True)


def visit(address: str) -> str:
    """How a short visit has ended: "eof", "reset", or "hung" where there was no answer within a second."""
    with gevent.Timeout(1.0, False):
        outcome = run(address, VISIT)
        if outcome.end == "eof" and not outcome.received:
            return "reset"  # the write was told of it: the system tells once
        if outcome.end == "eof":
            check_opened([VISIT], [outcome])
        return outcome.end
    return "hung"


def visits(address: str, count: int) -> Counter[str]:
    """So many, one after the other."""
    return Counter(visit(address) for _ in range(count))


# --- who comes to the port of the trunks ---


def relay_of(children: Children, *words: str, **options: Any) -> tuple[Forward, str, str]:
    """One that listens, and the addresses for trunks and for visitors."""
    relay = children.forward("--listen", ANYWHERE, "--from", ANYWHERE, *words, **options)
    return relay, relay.listening("trunk"), relay.listening("from")


def test_who_only_connects_gets_no_visitors(children: Children, service: Service):
    relay, where, near = relay_of(children)
    with connect(where):
        children.forward("--dial", where, "--to", service.address)
        relay.event("connected")
        assert visits(near, 20) == {"eof": 20}
        assert events(relay).count("connected") == 1


def test_who_answers_pings_and_refuses_streams_costs_one_visitor_at_most(children: Children, service: Service):
    relay, where, near = relay_of(children)
    stranger = geyamux.Client(connect(where), geyamux.Config(max_incoming_streams=0, keepalive_interval=0.05))
    with contextlib.closing(stranger):
        name = relay.event("connected")["session"]
        children.forward("--dial", where, "--to", service.address)
        relay.event("connected")
        found = visits(near, 20)
        assert found["eof"] >= 19 and found["hung"] == 0, found
        told = relay.event("stream_failed", session=name)
        assert "refused" in told["reason"] and told["level"] == "warning"


def test_an_agent_that_is_frozen_costs_one_visitor_and_takes_its_turns_again_when_it_goes_on(children: Children):
    with Service() as good, Service() as other:
        relay, where, near = relay_of(children)
        children.forward("--dial", where, "--to", good.address)
        frozen = children.forward("--dial", where, "--to", other.address)
        for _ in range(2):
            relay.event("connected")
        assert visits(near, 4) == {"eof": 4}
        frozen.process.send_signal(signal.SIGSTOP)
        try:
            found = visits(near, 20)
            assert found["hung"] <= 1 and found["reset"] == 0, found
            assert len(other.uploads) == 2
        finally:
            frozen.process.send_signal(signal.SIGCONT)
        # The one that hung is served, too.
        wait_for(lambda: visit(near) == "eof" and len(other.uploads) >= 2 + found["hung"] + 3, "its turns")
        before = len(good.uploads), len(other.uploads)
        assert visits(near, 6) == {"eof": 6}
        assert (len(good.uploads), len(other.uploads)) == (before[0] + 3, before[1] + 3)


# --- signals ---


def test_a_hangup_drains(children: Children, service: Service):
    # The tests themselves may have been started by nohup.
    heed = functools.partial(signal.signal, signal.SIGHUP, signal.SIG_DFL)
    relay, where, near = relay_of(children, preexec_fn=heed)
    children.forward("--dial", where, "--to", service.address)
    relay.event("connected")
    download = under_way(service, near)
    relay.process.send_signal(signal.SIGHUP)
    assert relay.event("draining")["streams"] == 1
    service.gate.set()
    check_opened([DOWNLOAD], [download.get()])
    assert relay.event("stopped")["streams"] == 0
    relay.wait(0)


def test_a_hangup_that_was_ignored_when_it_began_changes_nothing(children: Children, service: Service):
    ignore = functools.partial(signal.signal, signal.SIGHUP, signal.SIG_IGN)
    relay, where, near = relay_of(children, preexec_fn=ignore)
    children.forward("--dial", where, "--to", service.address)
    relay.event("connected")
    download = under_way(service, near)
    relay.process.send_signal(signal.SIGHUP)
    works(near)
    # Had it seen the other one, this would be the second.
    relay.terminate()
    relay.event("draining")
    service.gate.set()
    check_opened([DOWNLOAD], [download.get()])
    relay.wait(0)


def test_the_last_line_after_a_second_signal_tells_how_many_streams_were_cut(children: Children, service: Service):
    tunnel = expose(children, service.address)
    download = under_way(service, tunnel.near)
    tunnel.relay.terminate()
    tunnel.relay.event("draining")
    tunnel.relay.terminate()
    tunnel.relay.wait(1)
    last = entries(tunnel.relay)[-1]
    assert (last["event"], last["streams"]) == ("stopped", 1)
    assert "1 streams were cut" in last["message"]
    assert download.get().end == "reset"


#: It ends with an interrupt, as programs do that were not told to ignore it.
PIPE = """
import sys
from gevent import socket
from geyamux.tunnel import splice
splice(socket.socket(fileno=0), socket.create_connection((sys.argv[1], int(sys.argv[2]))))
"""


def test_an_interrupt_from_the_terminal_leaves_the_child_to_the_drain(children: Children, service: Service):
    there = children.forward("--listen", ANYWHERE, "--to", service.address)
    child = shlex.join([sys.executable, "-c", PIPE, *there.listening("trunk").split(":")])
    here = children.forward("--dial", f"exec:{child}", "--from", ANYWHERE, start_new_session=True)
    here.event("connected")
    download = under_way(service, here.listening("from"))
    assert [os.getpgid(pid) for pid in descendants(here.pid)] == [here.pid]
    os.killpg(here.pid, signal.SIGINT)
    assert here.event("draining")["streams"] == 1
    service.gate.set()
    check_opened([DOWNLOAD], [download.get()])
    assert here.event("stopped")["streams"] == 0
    here.wait(0)


# --- a log that nobody reads ---


class Unread:
    """A relay whose standard error is a pipe, with an agent; the pipe is full."""

    def __init__(self, children: Children, service: Service, place: Path, reading: int, writing: int) -> None:
        self.reading = reading
        self.near = f"{place}/near"
        words = ("forward", "--listen", f"unix:{place}/trunk", "--from", f"unix:{self.near}", "-v", "--json")
        self.child = children.start(Child, [*GEYAMUX, *words], log="stdout", stderr=writing)
        wait_for(lambda: os.path.exists(f"{place}/trunk") and os.path.exists(self.near), "its sockets")
        children.forward("--dial", f"unix:{place}/trunk", "--to", service.address).event("connected")
        wait_for(lambda: visit(self.near) == "eof", "the trunk")
        assert visits(self.near, 299) == {"eof": 299}
        size = fcntl.fcntl(self.reading, fcntl.F_GETPIPE_SZ)
        assert self.waiting() > size * 3 // 4, "there was room for all lines"

    def waiting(self) -> int:
        """How many bytes are in the pipe."""
        return int.from_bytes(fcntl.ioctl(self.reading, termios.FIONREAD, bytes(4)), sys.byteorder)

    def lines(self) -> list[str]:
        """What is in the pipe now."""
        return os.read(self.reading, self.waiting()).decode().splitlines()


@pytest.fixture
def unread(children: Children, service: Service, tmp_path: Path) -> Iterator[Unread]:
    reading, writing = os.pipe()
    with open(reading, "rb", closefd=True):
        with open(writing, "wb"):
            relay = Unread(children, service, tmp_path, reading, writing)
        yield relay


def test_a_log_that_nobody_reads_holds_up_neither_visitors_nor_the_end(unread: Unread):
    unread.child.stop()


def test_who_reads_the_log_again_is_told_how_many_lines_were_left_out(unread: Unread):
    before = unread.lines()
    assert visit(unread.near) == "eof"
    unread.child.stop()
    with FileObjectPosix(os.dup(unread.reading), "rb") as rest:
        after = rest.read().decode().splitlines()
    told = [(entry["event"], entry["message"]) for entry in map(json.loads, [*before, *after])]
    (left_out,) = [int(found[1]) for _, text in told if (found := re.match(r"(\d+) lines were left out", text))]
    streams = [event for event, _ in told if event in ("stream_opened", "stream_closed")]
    assert left_out > 0 and "left out" in told[len(before)][1], told[len(before)]
    # Each visit has two lines, and those that failed while there was no trunk yet were told before.
    assert len(streams) + left_out == 2 * 301


def refusals(child: Child) -> list[str]:
    """What it has told of streams that failed."""
    return [entry["message"] for entry in entries(child) if entry["event"] == "stream_failed"]


def count(message: str) -> int:
    """How many of a kind a line stands for."""
    found = re.search(r" \((\d+) more of these\)$", message)
    return 1 + (int(found[1]) if found else 0)


def test_the_same_refusal_is_told_once_a_second_with_the_number_of_those_left_out(children: Children, nobody: str):
    tunnel = expose(children, nobody)
    pool = gevent.pool.Pool(50)
    assert list(pool.imap_unordered(refused, [tunnel.near] * 50)) == [True] * 50
    both, done = (tunnel.agent, tunnel.relay), 50
    assert all(1 <= len(refusals(child)) <= 2 for child in both), tunnel
    before = [len(refusals(child)) for child in both]
    deadline = time.monotonic() + 5.0
    while any(len(refusals(child)) == then for child, then in zip(both, before, strict=True)):
        assert time.monotonic() < deadline, tunnel
        assert refused(tunnel.near)
        done += 1
        gevent.sleep(0.05)
    # The ends need not have begun their seconds at once: what is told last is perhaps not the last one.
    for child in both:
        told = refusals(child)
        assert count(told[0]) == 1 and count(told[1]) > 1, child
        assert 51 <= sum(map(count, told)) <= done, child


# --- when there is nothing left ---


@pytest.mark.parametrize("agents", [0, 1])
def test_without_descriptors_connections_wait_and_it_goes_on(children: Children, service: Service, agents: int):
    few = functools.partial(resource.setrlimit, resource.RLIMIT_NOFILE, (40, 40))
    relay, where, near = relay_of(children, preexec_fn=few)
    words = ("--dial", where, "--to", service.address)
    if agents:
        children.forward(*words)
        relay.event("connected")
    with contextlib.ExitStack() as stack:
        relay.process.send_signal(signal.SIGSTOP)
        try:
            for _ in range(100):
                stack.enter_context(connect(near))
        finally:
            relay.process.send_signal(signal.SIGCONT)
        told = relay.event("warning", level="warning")["message"]
        assert "out of file descriptors" in told and "ulimit -n" in told
    if not agents:
        wait_for(lambda: refused(near), "its turn")
        children.forward(*words)
        relay.event("connected")
    wait_for(lambda: visit(near) == "eof", "a descriptor for it")
    relay.stop()
    # Each line is an object, which this reads.
    assert events(relay)[-1] == "stopped"


@pytest.mark.slow
def test_visitors_who_stop_reading_all_get_their_downloads_in_the_end(
    children: Children, service: Service, tmp_path: Path
):
    # The system itself takes less of a download on a Unix socket.
    near, control = f"{tmp_path}/near", tmp_path / "control"
    relay = children.forward("--listen", ANYWHERE, "--from", f"unix:{near}", f"--control={control}", "--window=384K")
    children.forward("--dial", relay.listening("trunk"), "--to", service.address)
    relay.event("connected")
    whole = b"".join(pattern(1 << 20, 7))
    visitors: list[Any] = []
    with contextlib.ExitStack() as stack:
        for _ in range(300):
            visitors.append(stack.enter_context(connect(near)))
            visitors[-1].sendall(b"source %d 7\n" % len(whole))

        def session() -> dict[str, Any]:
            (found,) = snapshot(control)["sessions"]
            return dict(found)

        def is_over() -> bool:
            return bool(session()["resets"]) or session()["unread"] > geyamux.Config.receive_budget

        wait_for(is_over, "more unread bytes than the library's own limit")
        for visitor in visitors:
            with visitor.makefile("rb") as file:
                assert file.read() == whole
        assert not session()["resets"]


@pytest.fixture
def trust(tmp_path: Path) -> trunk.Trust:
    """Of one that listens with TLS."""
    path = tmp_path / "cert.pem"
    trustme.CA().issue_cert("relay.test").private_key_and_cert_chain_pem.write_to_path(path)
    return trunk.Trust(argparse.Namespace(cert=str(path), key=None, ca=None, server_name=None), is_server=True)


def test_a_handshake_that_drips_is_given_up_in_time(trust: trunk.Trust, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(trunk, "_PATIENCE", 0.3)
    ours, theirs = socket.socketpair()

    def drip() -> None:
        # The beginning of a record of 512 bytes, a ClientHello.
        for byte in bytes.fromhex("1603010200010001fc0303") + bytes(500):
            theirs.send(bytes([byte]))
            gevent.sleep(0.02)

    began = time.monotonic()
    with theirs:
        client = gevent.spawn(drip)
        try:
            with pytest.raises(TimeoutError):
                trunk.accept(ours, trust, geyamux.Config())
        finally:
            client.kill()
    assert 0.3 <= time.monotonic() - began < 2.0
