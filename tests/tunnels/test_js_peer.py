"""`geyamux forward` with js-libp2p-yamux at the other end of the trunk, which drops its streams on any GoAway."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import gevent
import pytest

from interop.peers import Job, Outcome, RemoteSide, check_opened
from support.waiting import wait_for
from tunnels.running import Children
from tunnels.service import DOWNLOAD, Service

pytestmark = pytest.mark.interop

JOBS = [Job(verb, size, 3) for verb in ("echo", "digest", "source") for size in (10, 50_000, 1_000_000)]


@contextlib.contextmanager
def js_peer(command: Sequence[str], *words: str) -> Iterator[RemoteSide]:
    peer = RemoteSide([*command, *words])
    try:
        yield peer
    finally:
        peer.stop()


@pytest.mark.parametrize("half", [False, True], ids=["whole", "half-closing"])
def test_streams_of_a_js_dialler_are_connected(children: Children, js_command: list[str], service: Service, half: bool):
    serve = children.forward("--listen", "127.0.0.1:0", "--to", service.address)
    jobs = [Job(job.verb, job.size, job.seed, half=half and job.verb != "source") for job in JOBS]
    with js_peer(js_command, "-dial", serve.listening("trunk")) as peer:
        peer.event("connected")
        check_opened(jobs, peer.run(jobs))
    serve.event("disconnected")
    serve.stop()


@pytest.mark.parametrize("option", ["--quiet-go-away", "--drain=0.2"], ids=["quiet", "announced"])
def test_a_js_relay_keeps_its_streams_through_a_drain_that_is_quiet(
    children: Children, js_command: list[str], service: Service, option: str
):
    with js_peer(js_command, "-listen") as peer:
        trunk = f"127.0.0.1:{peer.event('listening')['port']}"
        agent = children.forward("--dial", trunk, "--to", service.address, option)
        peer.event("connected")
        service.gate.clear()
        download: gevent.Greenlet[..., list[Outcome]] = gevent.spawn(peer.run, [DOWNLOAD])
        wait_for(lambda: service.halted == 1, "half of the download")
        agent.terminate()
        agent.event("draining")
        if option == "--quiet-go-away":
            service.gate.set()
            check_opened([DOWNLOAD], download.get())
        else:
            # It is cut while the service still holds back the rest.
            (outcome,) = download.get()
            assert outcome.received < DOWNLOAD.size
            service.gate.set()
        agent.wait()
