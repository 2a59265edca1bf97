"""hashicorp/yamux, the library that the protocol comes from, at its window of 256 KiB and at 1 MiB.

It cannot reset a stream (its only RSTs answer a full backlog and streams after its GoAway), and its
version of 2019 reads end of file after its own Close. So it neither resets streams, nor half-closes one
before the answer.
"""

from __future__ import annotations

import contextlib
import functools
import re
from collections.abc import Callable, Iterator, Sequence

import gevent
import pytest

import geyamux
from interop.peers import (
    Job,
    Link,
    LinkMaker,
    Outcome,
    at_the_same_time,
    check_opened,
    check_served,
    linked,
    random_jobs,
    serve,
    transfer,
)
from interop.suite import HALF_CLOSING, MEBIBYTE, PLAIN, Basics, PeerCuts

pytestmark = pytest.mark.interop

# Frames that crossed with the last one of their stream.
LATE_FRAME = re.compile(r" \[WARN\] yamux: (frame for missing stream|Discarding data for stream): ")
# It logs a refusal, and the SYN once more as a frame without a stream.
REFUSAL = re.compile(rf"{LATE_FRAME.pattern}| \[WARN\] yamux: backlog exceeded, forcing connection reset$")
BULK = 256 * MEBIBYTE


@pytest.fixture(params=[256 * 1024, MEBIBYTE], ids=["256KiB", "1MiB"])
def window(request: pytest.FixtureRequest) -> int:
    value: int = request.param
    return value


@pytest.fixture
def make_link(hashicorp_command: Sequence[str], role: str, window: int) -> LinkMaker:
    """Sessions after whose orderly end the log of the peer has no complaint."""

    @contextlib.contextmanager
    def make(*options: str, serve: bool = True, harmless: re.Pattern[str] = LATE_FRAME) -> Iterator[Link]:
        command = [*hashicorp_command, "-window", str(window), *options]
        with linked(command, role, geyamux.Config(max_stream_window=window), serve=serve) as link:
            yield link
            link.end()
        assert [line for line in link.peer.log if not harmless.search(line)] == []

    return make


class TestHashicorp(Basics, PeerCuts):
    @pytest.mark.timeout(120)
    def test_a_thousand_streams_of_every_kind_are_byte_exact(self, link: Link) -> None:
        ours = random_jobs("five hundred of ours", 500, [*PLAIN, *HALF_CLOSING, "abandon", "desert"])
        theirs = random_jobs("five hundred of theirs", 500, [*PLAIN, "reset"])
        at_the_same_time(
            functools.partial(transfer, link.local, link.peer, ours, timeout=90),
            functools.partial(transfer, link.peer, link.local, theirs, timeout=90),
        )
        link.settle()
        assert link.session.num_streams == 0
        assert link.peer.ask("streams")["count"] == 0

    def test_streams_live_on_after_our_go_away(self, silent_link: Link) -> None:
        session, peer = silent_link.session, silent_link.peer
        old = Job("echo", 300_000, seed=1)
        running = gevent.spawn(peer.run, [old])
        theirs = session.accept(timeout=10)
        ours = session.open()
        ours.sendall(b"echo *\nbefore")
        assert ours.read(6) == b"before"

        session.go_away()
        silent_link.settle()
        (refused,) = peer.run([Job("digest", 10)])
        assert refused.end == "error: remote end is not accepting connections"

        finish_both(old, theirs, running.get, ours)

    def test_streams_live_on_after_the_peers_go_away(self, silent_link: Link) -> None:
        """hashicorp/yamux may open streams after its own GoAway, and they are served."""
        session, peer = silent_link.session, silent_link.peer
        old = Job("echo", 300_000, seed=2)
        running = gevent.spawn(peer.run, [old])
        theirs = session.accept(timeout=10)
        ours = session.open()
        ours.sendall(b"echo *\nbefore")
        assert ours.read(6) == b"before"

        peer.ask("go_away")
        silent_link.settle()
        with pytest.raises(geyamux.RemoteGoAway):
            session.open()
        new = Job("digest", 5000, seed=3)
        late = gevent.spawn(peer.run, [new])
        check_served([new], [serve(session.accept(timeout=10))])
        check_opened([new], late.get(timeout=10))

        finish_both(old, theirs, running.get, ours)

    def test_a_full_backlog_of_the_peer_resets_what_is_beyond(self, make_link: LinkMaker) -> None:
        with make_link("-no-accept", "-backlog", "4", harmless=REFUSAL) as link:
            streams = [link.session.open() for _ in range(10)]
            for stream in streams[4:]:
                with pytest.raises(geyamux.StreamReset) as caught:
                    stream.recv(1)
                assert caught.value.remote
            link.settle()
            assert not any(stream.ready() for stream in streams[:4])

    def test_streams_opened_and_closed_without_waiting_all_arrive(self, link: Link) -> None:
        """It acknowledges none whose FIN came before its accept: its own FIN must free the place."""
        jobs = [Job("push", n % 100, seed=n) for n in range(2000)]
        transfer(link.local, link.peer, jobs, at_once=2000)
        link.settle()
        assert link.session.num_streams == 0

    @pytest.mark.slow
    @pytest.mark.timeout(180)
    def test_bulk_streams_of_256_mib_go_both_ways_at_once(self, link: Link) -> None:
        ours = [Job("digest", BULK, seed=4), Job("source", BULK, seed=5)]
        transfer(link.local, link.peer, ours, timeout=150)

    @pytest.mark.slow
    @pytest.mark.timeout(180)
    def test_bulk_streams_that_the_peer_opens_go_both_ways_at_once(self, link: Link) -> None:
        theirs = [Job("digest", BULK, seed=6), Job("source", BULK, seed=7)]
        transfer(link.peer, link.local, theirs, timeout=150)


def finish_both(job: Job, theirs: geyamux.Stream, outcomes: Callable[[], list[Outcome]], ours: geyamux.Stream) -> None:
    """Carry the stream of each side, open since before a GoAway, to its end in both directions."""
    check_served([job], [serve(theirs)])
    check_opened([job], outcomes())
    ours.sendall(b"after")
    ours.close_write()
    assert ours.read() == b"after"
    ours.close()
