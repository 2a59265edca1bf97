"""Through real NAT, when something breaks: what is under way fails in a way that nobody takes for success, and soon; then
it works again by itself, and nothing of before is left.

Requests under way are slow because of who sends: no part of what is to come waits anywhere.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time

import gevent
import pytest

from nat.lab import OTHER_WEB, URL, NatLab, missing
from support.waiting import wait_for

pytestmark = pytest.mark.interop

MEBIBYTE = 1 << 20
#: The forwarders look after the trunk when nothing came for a second, and wait no longer than that before a new attempt.
ALERT = ("--keepalive", "1", "--retry-max-interval", "1")
#: So long it may take until a silent trunk is given up: the silence, as much again for an answer, and a slow machine.
NOTICED = 4.0
#: So long it may take from then on, or from when it is possible again, until there is a new trunk.
RECONNECTED = 4.0
#: Of curl: a body that was cut, no answer at all, nothing can be sent, nothing more comes.
CUT_SHORT = {18, 52, 55, 56}
RESET = 56
#: The reset may be there before curl has looked whether it is connected.
REFUSED = {7, RESET}
AT_ONCE = 2.0


def fetched(program):
    """What curl got."""
    assert program.wait() == 0, program.err
    return program.out


class UnderWay:
    """Two downloads and an upload that have begun and will take long.

    Nobody is told how long `unmeasured` is: a clean end of the connection is the end of the file.
    """

    def __init__(self, lab):
        large = lab.file("large", 64 * MEBIBYTE)
        self.received = lab.files / "up" / "large"
        self.download = lab.curl("--no-buffer", f"{URL}/slow/large")
        self.unmeasured = lab.curl("--no-buffer", "--http1.0", f"{URL}/unmeasured/large")
        self.upload = lab.curl("--limit-rate", "1M", "--upload-file", str(large), f"{URL}/up/large")
        self.download.wait_for_output()
        self.unmeasured.wait_for_output()
        self.upload.wait_until(lambda: any((lab.directory / "body").rglob("*")), "nginx to receive")

    def fails_within(self, seconds, *, tells_the_truth=True):
        """All are cut. Where it is the system that closes connections of a dead process, it may call that a clean end."""
        limit = time.monotonic() + seconds
        codes = {
            self.download: CUT_SHORT,
            self.upload: CUT_SHORT,
            self.unmeasured: {RESET} if tells_the_truth else {RESET, 0},
        }
        for program, wanted in codes.items():
            code = program.wait(max(0.0, limit - time.monotonic()))
            assert code in wanted, f"{program.name}: exit code {code}: {program.err}"
        assert not self.received.exists(), "an upload that was cut has been taken for a whole one"


def refused_at_once(lab):
    """What a new visitor gets when nobody can serve him."""
    began = time.monotonic()
    attempt = lab.curl(f"{URL}/page")
    assert attempt.wait() in REFUSED, attempt.err
    assert time.monotonic() - began < AT_ONCE


def begin(lab, *words):
    """A tunnel that has been used; the page, both forwarders, and what they have open."""
    page = lab.file("page", 10_000).read_bytes()
    forwarders = lab.tunnel(*words)
    assert fetched(lab.curl(f"{URL}/page")) == page
    return page, forwarders, [program.descriptors() for program in forwarders]


@pytest.mark.slow
def test_when_the_nat_forgets_the_connection_the_agent_makes_a_new_one(lab):
    page, forwarders, open_before = begin(lab, *ALERT)
    under_way = UnderWay(lab)
    lab.flush_nat()
    under_way.fails_within(NOTICED)
    for program in forwarders:
        program.wait_for_event("connected", 2, RECONNECTED)
    assert fetched(lab.curl(f"{URL}/page")) == page
    for program, descriptors in zip(forwarders, open_before, strict=True):
        assert len(program.events("disconnected")) == 1
        program.wait_for_descriptors(descriptors)


@pytest.mark.slow
@pytest.mark.timeout(60)
@pytest.mark.parametrize("seconds", [3, 20])
def test_when_the_link_was_down_the_agent_comes_back(lab, seconds):
    page, forwarders, open_before = begin(lab, *ALERT)
    under_way = UnderWay(lab)
    # The NAT forgets, too, what went over a link that is down.
    with lab.down("wan"):
        began = time.monotonic()
        under_way.fails_within(NOTICED)
        refused_at_once(lab)
        gevent.sleep(began + seconds - time.monotonic())
    for program in forwarders:
        program.wait_for_event("connected", 2, RECONNECTED)
    assert fetched(lab.curl(f"{URL}/page")) == page
    for program, descriptors in zip(forwarders, open_before, strict=True):
        program.wait_for_descriptors(descriptors)


@pytest.mark.slow
def test_a_short_break_of_a_link_is_no_end_of_anything(lab):
    forwarders = lab.tunnel()
    lab.file("page", 10)
    large = lab.file("large", 4 * MEBIBYTE).read_bytes()
    download = lab.curl("--no-buffer", f"{URL}/slow/large")
    download.wait_for_output()
    with lab.down("home"):
        # What had passed the wire may still be on its way.
        gevent.sleep(0.3)
        received = len(download.out)
        gevent.sleep(1.2)
        assert len(download.out) == received < len(large)
    assert fetched(download) == large
    assert all(len(program.events("connected")) == 1 for program in forwarders)


@pytest.mark.slow
def test_when_the_relay_was_killed_the_agent_finds_the_next_one(lab):
    page, (agent, relay), (agent_before, relay_before) = begin(lab, *ALERT)
    under_way = UnderWay(lab)
    relay.kill()
    under_way.fails_within(AT_ONCE, tells_the_truth=False)
    # By now it waits as long as it may.
    agent.wait_for_event("retrying", 4)
    relay = lab.relay(*ALERT)
    began = time.monotonic()
    relay.wait_for_event("connected")
    assert time.monotonic() - began < 1.5, "an interval, and a slow machine"
    assert fetched(lab.curl(f"{URL}/page")) == page
    agent.wait_for_descriptors(agent_before)
    relay.wait_for_descriptors(relay_before)


@pytest.mark.slow
def test_when_the_server_behind_is_killed_visitors_are_reset_until_it_is_back(lab):
    page, forwarders, open_before = begin(lab, *ALERT)
    under_way = UnderWay(lab)
    lab.web.kill()
    under_way.fails_within(AT_ONCE, tells_the_truth=False)
    refused_at_once(lab)
    lab.nginx()
    assert fetched(lab.curl(f"{URL}/page")) == page
    for program, descriptors in zip(forwarders, open_before, strict=True):
        program.wait_for_descriptors(descriptors)
        assert len(program.events("connected")) == 1


@pytest.mark.slow
@pytest.mark.parametrize("words", [(), ("--quiet-go-away",)], ids=["announced", "quiet"])
def test_an_agent_that_is_told_to_end_finishes_what_is_under_way(lab, words):
    large = lab.file("large", 3 * MEBIBYTE).read_bytes()
    relay, agent = lab.relay(), lab.agent(*words)
    relay.wait_for_event("connected")
    download = lab.curl("--no-buffer", f"{URL}/slow/large")
    download.wait_for_output()
    agent.process.send_signal(signal.SIGTERM)
    assert agent.wait_for_event("draining")["streams"] == 1
    refused_at_once(lab)
    assert len(download.out) < len(large), "it is still under way"
    assert fetched(download) == large
    assert agent.wait() == 0, agent.err


@pytest.mark.slow
def test_a_killed_agent_cuts_its_visitors_and_the_other_serves_the_next(lab):
    page = lab.file("page", 10_000).read_bytes()
    relay, agent = lab.tunnel()[::-1]
    under_way = UnderWay(lab)
    lab.agent(to=OTHER_WEB)
    relay.wait_for_event("connected", 2)
    agent.kill()
    under_way.fails_within(AT_ONCE)
    relay.wait_for_event("disconnected")
    assert fetched(lab.curl(f"{URL}/page")) == page


def namespaces():
    return subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True).stdout


def is_running(pid):
    # One that has ended has no program any more, even where nobody has asked yet how it ended.
    return os.path.exists(f"/proc/{pid}/exe")


@pytest.mark.skipif(missing() != "", reason=missing())
def test_a_lab_leaves_nothing_behind_when_what_is_tried_in_it_fails():
    with pytest.raises(ZeroDivisionError), NatLab() as lab:
        web = lab.nginx()
        parent = lab.start("public", "sh", "-c", "sleep 60 & echo $!; wait")
        parent.wait_for_output()
        child = int(parent.out)
        assert all(name in namespaces() for name in lab.names.values())
        1 / 0  # noqa: B018
    assert not any(name in namespaces() for name in lab.names.values())
    assert not is_running(web.process.pid)
    wait_for(lambda: not is_running(child), "its child to be gone")
    assert not lab.directory.exists()
