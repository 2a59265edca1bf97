"""Through real NAT: an agent that nobody can reach shows nginx to visitors of a relay. All goes well here."""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
from pathlib import Path

import pytest

from balancers.trust import OURS, SERVER, authority, certificate
from nat.lab import LAN, NAT, OTHER_WEB, PUBLIC, PUBLISHED, URL, WEB

pytestmark = pytest.mark.interop

LOADS = Path(__file__).with_name("loads.py")
MEBIBYTE = 1 << 20
#: What a crowd downloads. All but the first kind are large; slow readers take the smallest of those.
SIZES = [900] * 3 + [20_000] * 3 + [60_000] * 2 + [MEBIBYTE // 2] + [2 * MEBIBYTE] * 2 + [4 * MEBIBYTE]
#: A process that has been busy keeps some of the memory that it was given.
MEMORY_SLACK = 8 * MEBIBYTE


def fetched(program):
    """What curl got."""
    assert program.wait() == 0, program.err
    return program.out


def sha256(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.slow
def test_nobody_reaches_the_agents_network_from_outside(lab):
    page = lab.file("page", 1000).read_bytes()
    # The public host even knows the way.
    lab.ip("public", "route", "add", "192.168.7.0/24", "via", NAT)
    address = f"http://{LAN}:{WEB}/page"
    attempts = [
        lab.start("public", "curl", "-q", "--silent", "--show-error", "--max-time", "1", url)
        for url in (address, f"http://{NAT}:{WEB}/page")
    ]
    assert fetched(lab.start("nat", "curl", "-q", "--silent", address)) == page
    for attempt in attempts:
        assert attempt.wait() == 28, "nobody answers, not even with a refusal: " + attempt.err


@pytest.mark.slow
def test_a_visitor_gets_pages_over_one_connection_and_uploads(lab):
    page = lab.file("page", 100_000)
    upload = lab.file("upload", 3 * MEBIBYTE)
    lab.tunnel()
    several = lab.curl("--write-out", "%{stderr}%{http_code} %{num_connects}\n", *[f"{URL}/page"] * 3)
    assert fetched(several) == page.read_bytes() * 3
    assert several.err.splitlines() == ["200 1", "200 0", "200 0"]

    put = lab.curl("--write-out", "%{http_code}", "--upload-file", str(upload), f"{URL}/up/copy")
    assert fetched(put) == b"201"
    assert sha256(lab.files / "up" / "copy") == sha256(upload)


@pytest.mark.slow
def test_a_large_file_comes_whole(lab):
    large = lab.file("large", 64 * MEBIBYTE)
    lab.tunnel()
    copy = lab.directory / "copy"
    assert fetched(lab.curl("--output", str(copy), f"{URL}/large")) == b""
    assert sha256(copy) == sha256(large)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("socat") is None, reason="needs socat")
def test_who_answers_only_after_the_end_of_the_question_is_heard(lab):
    server = lab.start("lan", "socat", "-d", "-d", "-t", "30", "TCP-LISTEN:9000,fork", "EXEC:sha256sum")
    server.wait_until(lambda: "listening on" in server.err, "its socket")
    lab.tunnel(to=9000)
    questions = [lab.file(f"question{number}", number * 700_001) for number in range(5)]
    asking = [lab.start("visitor", "socat", "-t", "30", "-", f"TCP:{PUBLIC}:{PUBLISHED}", stdin=q) for q in questions]
    answers = [fetched(program).split()[0].decode() for program in asking]
    assert answers == [sha256(question) for question in questions]


def publish(lab):
    """Files under their digests, and the list of them."""
    lines = []
    for size in SIZES:
        path = lab.file("new", size)
        lines.append(f"{sha256(path)} {size}\n")
        path.rename(lab.files / sha256(path))
    (lab.files / "list").write_text("".join(lines))


def crowd(lab):
    """Let a hundred visitors come at once; what went wrong."""
    load = lab.start("visitor", sys.executable, str(LOADS), PUBLIC, str(PUBLISHED))
    assert load.wait(60) == 0, load.err
    report = json.loads(load.out)
    assert report["clients"] == 100
    return report["wrong"]


@pytest.mark.slow
@pytest.mark.timeout(90)
def test_a_crowd_gets_all_it_asks_for_and_leaves_nothing_behind(lab):
    publish(lab)
    forwarders = lab.tunnel()
    # What a process needs but once, it has afterwards.
    assert crowd(lab) == []
    before = [(program.descriptors(), program.memory()) for program in forwarders]
    assert crowd(lab) == []

    uploads = list((lab.files / "up").iterdir())
    assert len(uploads) == 40
    assert all(sha256(path) == path.name for path in uploads)
    for program, (descriptors, memory) in zip(forwarders, before, strict=True):
        program.wait_for_descriptors(descriptors)
        assert program.memory() < memory + MEMORY_SLACK


@pytest.mark.slow
def test_visitors_go_round_two_agents_until_one_is_killed(lab):
    lab.file("page", 10)
    relay = lab.relay()
    first, second = lab.agent(to=WEB), lab.agent(to=OTHER_WEB)
    relay.wait_for_event("connected", 2)

    def served_at(count):
        urls = [f"{URL}/page"] * count
        # A connection of its own for each.
        answer = lab.curl("--header", "Connection: close", "--include", *urls)
        lines = fetched(answer).decode(errors="replace").splitlines()
        return [int(line.split()[1]) for line in lines if line.startswith("Served-At:")]

    assert sorted(served_at(6)) == [WEB] * 3 + [OTHER_WEB] * 3
    second.kill()
    relay.wait_for_event("disconnected")
    assert served_at(4) == [WEB] * 4
    assert first.process.poll() is None


def write_certificates(directory):
    """Files of certificates with their keys: the authority's, the relay's, an agent's, and one of a stranger."""
    authority(OURS).cert_pem.write_to_path(directory / "ca.pem")
    for name, issued in {
        "relay": certificate(SERVER),
        "agent": certificate("agent.test"),
        "stranger": certificate("agent.test", signed_by="a stranger"),
    }.items():
        issued.private_key_and_cert_chain_pem.write_to_path(directory / f"{name}.pem")


@pytest.mark.slow
def test_with_certificates_only_a_known_agent_gets_visitors(lab):
    write_certificates(lab.directory)
    page = lab.file("page", 5000).read_bytes()
    trust = ("--ca", str(lab.directory / "ca.pem"))
    relay = lab.relay("--cert", str(lab.directory / "relay.pem"), *trust)

    def agent(*words):
        return lab.agent(*trust, "--server-name", SERVER, "--retry-max-interval", "1", *words)

    for words in ((), ("--cert", str(lab.directory / "stranger.pem"))):
        refused = agent(*words)
        refused.wait_for_event("retrying")
        refused.kill()
    assert lab.curl(f"{URL}/page").wait() in {7, 56}, "a reset, before or after curl has looked whether it is connected"
    assert relay.events("connected") == []

    agent("--cert", str(lab.directory / "agent.pem"))
    relay.wait_for_event("connected")
    assert fetched(lab.curl(f"{URL}/page")) == page
