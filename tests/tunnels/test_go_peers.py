"""`geyamux forward` with a plain program of hashicorp/yamux at the other end of the trunk, its defaults as they are."""

from __future__ import annotations

import pytest

from interop.peers import Job, check_opened
from support.links import free_port
from support.waiting import wait_for
from tunnels.running import Children, Forward, GoTunnel
from tunnels.service import DOWNLOAD, Service, check, connect, many_jobs, refused, run, under_way

pytestmark = pytest.mark.interop

QUICK = "--retry-max-interval=0.1"


class Tunnels:
    """The four ways to join a geyamux process with a Go one; `near` is where connections go in."""

    def __init__(self, children: Children, gotunnel: str, service: Service) -> None:
        self.children = children
        self.program = gotunnel
        self.service = service

    def go(self, command: str, trunk: str, address: str) -> GoTunnel:
        return self.children.start(GoTunnel, self.program, command, trunk, address)

    def geyamux_agent(self, to: str | None = None) -> tuple[Forward, GoTunnel, str]:
        """geyamux dials and connects, Go listens and opens."""
        relay = self.go("relay", "127.0.0.1:0", "127.0.0.1:0")
        trunk, target = relay.listening("trunk"), to or self.service.address
        agent = self.children.forward("--dial", trunk, "--to", target, QUICK)
        relay.event("connected")
        return agent, relay, relay.listening("from")

    def go_agent(self, to: str | None = None) -> tuple[Forward, GoTunnel, str]:
        """Go dials and connects, geyamux listens and opens."""
        relay = self.children.forward("--listen", "127.0.0.1:0", "--from", "127.0.0.1:0")
        agent = self.go("agent", relay.listening("trunk"), to or self.service.address)
        relay.event("connected")
        return relay, agent, relay.listening("from")

    def geyamux_reaches(self) -> tuple[Forward, GoTunnel, str]:
        """geyamux dials and opens, Go listens and connects."""
        serve = self.go("serve", "127.0.0.1:0", self.service.address)
        reach = self.children.forward("--dial", serve.listening("trunk"), "--from", "127.0.0.1:0")
        reach.event("connected")
        return reach, serve, reach.listening("from")

    def go_reaches(self) -> tuple[Forward, GoTunnel, str]:
        """Go dials and opens, geyamux listens and connects."""
        serve = self.children.forward("--listen", "127.0.0.1:0", "--to", self.service.address)
        reach = self.go("reach", serve.listening("trunk"), "127.0.0.1:0")
        reach.event("connected")
        return serve, reach, reach.listening("from")


@pytest.fixture
def tunnels(children: Children, gotunnel: str, service: Service) -> Tunnels:
    return Tunnels(children, gotunnel, service)


WAYS = ("geyamux_agent", "go_agent", "geyamux_reaches", "go_reaches")


@pytest.mark.parametrize("way", WAYS)
def test_many_connections_at_once_carry_small_and_large_bodies_whole(tunnels: Tunnels, way: str):
    forward, _, near = getattr(tunnels, way)()
    check(near, many_jobs())
    forward.stop()


@pytest.mark.parametrize("way", ["go_agent", "geyamux_reaches"])
def test_a_client_that_half_closes_gets_its_whole_answer(tunnels: Tunnels, way: str):
    # hashicorp passes on a FIN that it receives, and goes on writing.
    forward, _, near = getattr(tunnels, way)()
    check(near, many_jobs(half=True))
    forward.stop()


@pytest.mark.parametrize("way", ["geyamux_agent", "go_reaches"])
def test_a_service_sees_the_end_of_what_a_half_closing_client_sent(tunnels: Tunnels, way: str):
    # The hashicorp of 2019 reads no more once it has sent its FIN, so the answer may be lost on its side.
    forward, _, near = getattr(tunnels, way)()
    job = Job("digest", 1_000_000, 3, half=True)
    run(near, job)
    wait_for(lambda: tunnels.service.uploads, "the end of the upload")
    assert tunnels.service.uploads == [(job.size, job.digest())]
    forward.stop()


def test_a_refused_target_resets_the_connection_at_a_go_relay(tunnels: Tunnels, nobody: str):
    agent, _, public = tunnels.geyamux_agent(to=nobody)
    assert refused(public)
    agent.event("stream_failed")
    assert refused(public), "the agent serves on"
    agent.stop()


def test_a_target_refused_to_a_go_agent_ends_the_connection_and_not_the_tunnel(tunnels: Tunnels, nobody: str):
    relay, _, public = tunnels.go_agent(to=nobody)
    for _ in range(2):
        outcome = run(public, Job("source", 1))
        # hashicorp can't reset a stream: it closes it.
        assert (outcome.received, outcome.end) == (0, "eof")
    relay.stop()


def test_a_client_that_breaks_off_a_download_is_no_burden_to_a_go_agent(tunnels: Tunnels):
    relay, _, public = tunnels.go_agent()
    with connect(public) as sock:
        sock.sendall(DOWNLOAD.request_line())
        assert sock.recv(1)
        # What is unread makes it a reset.
    wait_for(lambda: not tunnels.service.busy, "the end of the connection to the service")
    check(public, [DOWNLOAD])
    relay.stop()


def test_connections_go_round_two_go_agents_until_one_is_killed(tunnels: Tunnels):
    relay, first, public = tunnels.go_agent()
    uploads = [Job("digest", 1000, n) for n in range(8)]
    with Service() as other:
        tunnels.go("agent", first.command[2], other.address)
        relay.event("connected")
        check(public, uploads)
        assert (len(tunnels.service.uploads), len(other.uploads)) == (4, 4)
        first.kill()
        relay.event("disconnected")
        check(public, uploads)
        assert (len(tunnels.service.uploads), len(other.uploads)) == (4, 12)
    relay.stop()


# --- an end in good order ---


@pytest.mark.parametrize("way", WAYS)
def test_sigterm_of_geyamux_lets_a_transfer_finish(tunnels: Tunnels, way: str):
    forward, _, near = getattr(tunnels, way)()
    download = under_way(tunnels.service, near)
    forward.terminate()
    assert forward.event("draining")["streams"] == 1
    tunnels.service.gate.set()
    check_opened([DOWNLOAD], [download.get()])
    forward.wait()


@pytest.mark.parametrize("way", WAYS)
def test_sigterm_of_the_go_program_lets_a_transfer_finish(tunnels: Tunnels, way: str):
    forward, go, near = getattr(tunnels, way)()
    download = under_way(tunnels.service, near)
    go.terminate()
    go.event("draining")
    tunnels.service.gate.set()
    check_opened([DOWNLOAD], [download.get()])
    go.wait()
    forward.event("disconnected")
    forward.stop()


def test_a_go_agent_that_says_go_away_gets_no_new_connections(tunnels: Tunnels):
    relay, agent, public = tunnels.go_agent()
    download = under_way(tunnels.service, public)
    agent.terminate()
    agent.event("draining")
    wait_for(lambda: refused(public), "the relay knows of the GoAway")
    tunnels.service.gate.set()
    check_opened([DOWNLOAD], [download.get()])
    agent.wait()
    relay.stop()


# --- a violent end ---


def test_a_geyamux_agent_connects_again_to_a_go_relay_that_was_killed(tunnels: Tunnels):
    trunk, public = (f"127.0.0.1:{free_port()}" for _ in range(2))
    relay = tunnels.go("relay", trunk, public)
    agent = tunnels.children.forward("--dial", trunk, "--to", tunnels.service.address, QUICK)
    relay.event("connected")
    download = under_way(tunnels.service, public)
    relay.kill()
    agent.event("disconnected")
    assert download.get().received < DOWNLOAD.size
    agent.event("retrying")
    tunnels.service.gate.set()
    tunnels.go("relay", trunk, public).event("connected")
    check(public, [DOWNLOAD])
    agent.stop()


def test_a_go_agent_that_was_killed_resets_its_connections_and_another_takes_over(tunnels: Tunnels):
    relay, agent, public = tunnels.go_agent()
    download = under_way(tunnels.service, public)
    agent.kill()
    relay.event("disconnected")
    assert download.get().end == "reset"
    assert refused(public), "there is no agent"
    tunnels.service.gate.set()
    tunnels.go("agent", agent.command[2], tunnels.service.address)
    relay.event("connected")
    check(public, [DOWNLOAD])
    relay.stop()


def test_a_go_agent_connects_again_to_a_geyamux_relay_that_was_killed(tunnels: Tunnels):
    relay, agent, public = tunnels.go_agent()
    trunk = agent.command[2]
    relay.kill()
    again = tunnels.children.forward("--listen", trunk, "--from", public)
    again.event("connected")
    check(public, [DOWNLOAD])
    again.stop()


def test_a_connection_cut_by_a_killed_geyamux_agent_is_closed_by_the_go_relay(tunnels: Tunnels):
    agent, relay, public = tunnels.geyamux_agent()
    download = under_way(tunnels.service, public)
    agent.kill()
    relay.event("disconnected")
    assert download.get().received < DOWNLOAD.size
