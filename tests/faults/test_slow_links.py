"""Links that are slow, late, or that stall, and hubs that are blocked: none of that is death.

All of it runs at the same time, once, for one minute: over wires between two network namespaces that let 200 kB a second
pass, over relays that delay and stall, and in a process whose hub is blocked. Each test looks at what became of one.
Where no namespace can be made a relay of our own takes the place of the wire; the log says why.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import ssl
import subprocess
import sys
import time

import gevent
import pytest

from faults import blocked
from faults.netns import Lab, missing
from faults.peer import peer_process
from faults.relay import Relay
from geyamux import Client, Config, Server, SessionError
from support.links import PATIENCE, tls_contexts

pytestmark = [pytest.mark.slow, pytest.mark.timeout(150)]
logger = logging.getLogger(__name__)

MIB = 1 << 20
KIB = 1 << 10
#: The whole run, and how long a hub is blocked in it, in seconds.
MINUTE = float(os.environ.get("GEYAMUX_SLOW_LINK_SECONDS", "60"))
BLOCK = 12.0
#: Nothing slows down the link with tiny buffers: it needs a whole processor.
TINY = 4.0
#: Bytes a second, in either direction.
RATE = 200_000
#: Limits that are short, and fair to a link that moves or answers within a second.
SHORT = Config(keepalive_interval=0.5, keepalive_timeout=2.0, connection_write_timeout=2.0, stream_open_timeout=5.0)
PATTERN = bytes(number * number % 251 for number in range(251 * 400))


class Flow:
    """Bytes without end from one stream to another; what arrives is compared with what was sent, as it comes."""

    def __init__(self, source, sink):
        self.arrived = 0
        self.is_exact = True
        self.greenlets = [gevent.spawn(self._send, source), gevent.spawn(self._receive, sink)]

    def _send(self, stream):
        with contextlib.suppress(SessionError):
            while True:
                stream.sendall(PATTERN)

    def _receive(self, stream):
        with contextlib.suppress(SessionError):
            while data := stream.recv(65536):
                start = self.arrived % len(PATTERN)
                whole = PATTERN[start:] + PATTERN
                self.is_exact = self.is_exact and data == whole[: len(data)]
                self.arrived += len(data)


class Traffic:
    """Two sessions over a link with flows, pings and opens for a while, and what is to be said of them afterwards."""

    def __init__(self, near, far, config, *, streams, asks=False, seconds=MINUTE, patience=None):
        self.sessions = (Client(near, config), Server(far, config))
        self.asks = asks
        self._limit = seconds
        #: Of a ping, where the default is not fair.
        self._patience = config.keepalive_timeout if patience is None else patience
        self.pings = []
        self.opens = 0
        self.failures = []
        self.alive = False
        self.seconds = 0.0
        self._streams = streams
        self.flows = []

    def run(self):
        client, server = self.sessions
        began = time.monotonic()
        try:
            pairs = [(client.open(), server.accept(PATIENCE)) for _ in range(self._streams)]
            self.flows = [flow for one, other in pairs for flow in (Flow(one, other), Flow(other, one))]
            answering = gevent.spawn(self._answer, server) if self.asks else None
            asking = [gevent.spawn(self._ask, client), gevent.spawn(self._ping, client)] if self.asks else []
            while time.monotonic() - began < self._limit and not (client.closed or server.closed):
                gevent.sleep(0.1)
            self.seconds = time.monotonic() - began
            self.alive = not (client.closed or server.closed)
            self.failures += [repr(side.exception) for side in self.sessions if side.exception]
            gevent.killall([*asking, *([answering] if answering else [])])
        except (OSError, AssertionError) as error:
            self.failures.append(f"setting up: {error!r}")
        finally:
            for session in self.sessions:
                session.abort()
                session.join(PATIENCE)
                session.conn.close()
            gevent.killall([greenlet for flow in self.flows for greenlet in flow.greenlets])
        return self

    def _ping(self, session):
        try:
            while True:
                self.pings.append(session.ping(self._patience))
                gevent.sleep(0.5)
        except (SessionError, TimeoutError) as error:
            self.failures.append(f"ping: {error!r}")

    def _ask(self, session):
        """Open a stream, ask and be answered, again and again."""
        try:
            while True:
                with session.open() as stream:
                    stream.sendall(b"a question")
                    assert stream.read(10) == b"a question"
                self.opens += 1
                gevent.sleep(0.2)
        except (OSError, AssertionError) as error:
            self.failures.append(f"open: {error!r}")

    def _answer(self, session):
        with contextlib.suppress(SessionError):
            for stream in session:
                stream.sendall(stream.recv(100))
                stream.close_write()

    def check(self):
        assert self.failures == []
        assert self.alive
        assert all(flow.is_exact for flow in self.flows)
        arrived = [sum(flow.arrived for flow in self.flows[side::2]) for side in (0, 1)]
        return arrived


class Minute:
    """What ran at the same time."""

    def __init__(self):
        self._cleanup = contextlib.ExitStack()
        self.outcomes = {}

    def run(self):
        with self._cleanup:
            blocking = self._start_blocked()
            wires = self._wires(4)
            scenes = {
                "plain": Traffic(*wires[0](4 * MIB), Config(), streams=100),
                "tls": Traffic(*encrypted(*wires[1](4 * MIB)), Config(), streams=10),
                "many streams, short limits": Traffic(*wires[2](4 * MIB), self._short_for_full_buffers(), streams=200),
                "asking": Traffic(*wires[3](32 * KIB), SHORT, streams=2, asks=True),
                "late": Traffic(*self._relayed(delay=0.25), SHORT, streams=4, asks=True),
                "stalling": Traffic(*self._stalling(), SHORT, streams=4, asks=True, patience=10.0),
                "tiny buffers": Traffic(*self._tiny(), SHORT, streams=4, asks=True, seconds=TINY),
            }
            running = {name: gevent.spawn(scene.run) for name, scene in scenes.items()}
            for name, greenlet in running.items():
                self.outcomes[name] = greenlet.get(timeout=MINUTE + 30)
            printed, _ = blocking.communicate()
            self.outcomes["blocked"] = json.loads(printed)
        return self.outcomes

    def _short_for_full_buffers(self):
        """4 MiB in front of every byte are 20 s: an answer can't come sooner, but some byte always does."""
        # TCP that lost packets may be silent for two seconds of its own. And Linux opens a window that was full only when
        # a sixteenth of the buffer is free: half a megabyte, 2.6 s, in which a link that moves takes nothing.
        return Config(
            keepalive_interval=1.0, keepalive_timeout=4.0, connection_write_timeout=5.0, stream_open_timeout=60.0
        )

    def _wires(self, count):
        """So many makers of a connection, each over a wire of its own that passes `RATE`."""
        reason = missing("tc")
        if reason:
            logger.warning("no wires between namespaces, a relay instead: %s", reason)
            print(f"no wires between namespaces, a relay instead: {reason}")
            return [lambda buffers: self._relayed(rate=RATE, buffers=buffers)] * count
        lab = self._cleanup.enter_context(Lab(wires=count + 1))
        self._lab = lab
        for wire in range(count):
            lab.throttle(RATE, wire)
        return [lambda buffers, wire=wire: lab.connect(wire, buffers) for wire in range(count)]

    def _tiny(self):
        lab = getattr(self, "_lab", None)
        return self._relayed(buffers=4 * KIB) if lab is None else lab.connect(lab.wires - 1, 4 * KIB)

    def _relayed(self, **settings):
        relay = self._cleanup.enter_context(Relay(**settings))
        return relay.near, relay.far

    def _stalling(self):
        relay = self._cleanup.enter_context(Relay(rate=2_000_000, buffers=16 * KIB))

        def stall_again_and_again():
            while True:
                relay.stall()
                gevent.sleep(1.2)
                relay.go_on()
                gevent.sleep(0.3)

        stalling = gevent.spawn(stall_again_and_again)
        self._cleanup.callback(stalling.kill)
        return relay.near, relay.far

    def _start_blocked(self):
        peer = self._cleanup.enter_context(peer_process())
        host, port = peer.address
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(os.path.abspath, sys.path))}
        command = [sys.executable, blocked.__file__, str(BLOCK), host, str(port)]
        child = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE)
        self._cleanup.callback(child.stdout.close)
        self._cleanup.callback(child.wait)
        self._cleanup.callback(child.kill)
        return child


def encrypted(near, far):
    near_context, far_context = tls_contexts(ssl.TLSVersion.TLSv1_3)
    accepting = gevent.spawn(far_context.wrap_socket, far, server_side=True)
    return near_context.wrap_socket(near, server_hostname="localhost"), accepting.get(timeout=PATIENCE)


@pytest.fixture(scope="module")
def minute():
    return Minute().run()


@pytest.mark.parametrize("name", ["plain", "tls", "many streams, short limits"])
def test_a_link_full_both_ways_is_not_taken_for_dead(minute, name):
    """Twenty seconds of bytes are in the buffers, in either direction, for a minute."""
    scene = minute[name]
    arrived = scene.check()
    print(f"\n{name}: {arrived} bytes arrived in {scene.seconds:.0f} s")
    assert scene.seconds >= MINUTE
    # What is on its way at the end has not arrived; what the wire passes is frames, packets and their headers.
    assert min(arrived) > RATE * MINUTE * 0.75


def test_pings_and_opens_on_a_full_slow_link_are_answered_within_short_limits(minute):
    scene = minute["asking"]
    arrived = scene.check()
    print(f"\nasking: {arrived} bytes, {scene.opens} opens, pings {min(scene.pings):.2f} to {max(scene.pings):.2f} s")
    assert min(arrived) > RATE * MINUTE * 0.5
    assert scene.opens > MINUTE / 4 and len(scene.pings) > MINUTE / 4


def test_a_link_with_half_a_second_of_delay_works_within_short_limits(minute):
    scene = minute["late"]
    arrived = scene.check()
    print(f"\nlate: {arrived} bytes, {scene.opens} opens, pings {min(scene.pings):.3f} to {max(scene.pings):.3f} s")
    assert min(scene.pings) >= 0.5
    # A window a stream each round trip is what the delay allows.
    assert min(arrived) > 4 * 256 * KIB * MINUTE * 0.5
    assert scene.opens > MINUTE / 2


def test_a_link_that_stalls_again_and_again_for_less_than_the_limits_lives(minute):
    scene = minute["stalling"]
    arrived = scene.check()
    print(f"\nstalling: {arrived} bytes, {scene.opens} opens, pings up to {max(scene.pings):.2f} s")
    assert min(arrived) > 100 * KIB and scene.opens > 5


def test_a_link_with_tiny_socket_buffers_works_within_short_limits(minute):
    scene = minute["tiny buffers"]
    arrived = scene.check()
    print(f"\ntiny buffers: {arrived} bytes, {scene.opens} opens, pings up to {max(scene.pings):.2f} s")
    assert min(arrived) > MIB and scene.opens > TINY


@pytest.mark.parametrize("name", blocked.SITUATIONS)
def test_a_hub_blocked_for_long_is_no_death_on_our_side(minute, name):
    assert minute["blocked"]["blocked"] >= BLOCK
    assert minute["blocked"]["wrong"][name] == ""


def test_a_blocked_hub_is_logged_once_by_each_session_with_its_length(minute):
    lines = [line for line in minute["blocked"]["lines"] if "blocked" in line]
    print("\n" + "\n".join(lines))
    for name in blocked.SITUATIONS:
        (line,) = [line for line in lines if line.startswith(f"{name}:")]
        found = re.search(r"blocked for (\d+\.\d) s", line)
        assert found and abs(float(found[1]) - BLOCK) <= 1.0, line
    assert [line for line in minute["blocked"]["lines"] if "blocked" not in line] == [], "nothing else went wrong"
