"""Tests that run against every peer which can do what they need.

The module for a peer subclasses what applies to it. The fixtures `link` and `silent_link` give a session
with that peer, in both roles.
"""

from __future__ import annotations

import functools

import gevent
import pytest

import geyamux
from interop.peers import (
    Job,
    Link,
    at_the_same_time,
    check_opened,
    check_served,
    random_jobs,
    serve,
    transfer,
)

MEBIBYTE = 1 << 20
# What every peer can do as opener and as acceptor.
PLAIN = ("echo", "digest", "source", "push")
# The end of the payload is told by FIN, and the answer is read after it.
HALF_CLOSING = ("echo+half", "digest+half", "source+half")


class Basics:
    """For every peer. None of them half-closes or resets here."""

    def test_streams_open_from_each_side(self, link: Link) -> None:
        transfer(link.local, link.peer, [Job("echo", 5)])
        transfer(link.peer, link.local, [Job("echo", 5)])

    def test_streams_without_a_byte_end_in_order(self, link: Link) -> None:
        jobs = [Job(verb, 0) for verb in PLAIN]
        transfer(link.local, link.peer, jobs)
        transfer(link.peer, link.local, jobs)

    def test_a_mebibyte_comes_back_from_an_echo_of_the_peer(self, link: Link) -> None:
        transfer(link.local, link.peer, [Job("echo", MEBIBYTE, seed=7)])

    def test_a_mebibyte_goes_back_in_an_echo_of_ours(self, link: Link) -> None:
        transfer(link.peer, link.local, [Job("echo", MEBIBYTE, seed=8)])

    def test_the_peer_answers_after_our_half_close(self, link: Link) -> None:
        jobs = [Job(verb.removesuffix("+half"), 300_000, seed=9, half=True) for verb in HALF_CLOSING]
        transfer(link.local, link.peer, jobs)

    def test_the_peer_sees_our_reset(self, link: Link) -> None:
        jobs = [Job(verb, size, seed=size) for verb in ("abandon", "desert") for size in (1, 4096, 200_000)]
        transfer(link.local, link.peer, jobs)
        transfer(link.peer, link.local, [Job("reset", size, seed=size) for size in (1, 4096, 400_000)])

    def test_a_reset_stream_leaves_the_others_alone(self, link: Link) -> None:
        jobs = random_jobs("resets among others", 60, [*PLAIN, "abandon", "desert"])
        transfer(link.local, link.peer, jobs, at_once=20)

    def test_both_sides_open_streams_at_once(self, link: Link) -> None:
        ours = random_jobs("ours at once", 100, PLAIN)
        theirs = random_jobs("theirs at once", 100, PLAIN)
        at_the_same_time(
            functools.partial(transfer, link.local, link.peer, ours, at_once=50),
            functools.partial(transfer, link.peer, link.local, theirs, at_once=50),
        )
        link.settle()
        assert link.session.num_streams == 0

    def test_pings_go_both_ways(self, link: Link) -> None:
        assert all(link.session.ping(timeout=10) > 0 for _ in range(20))
        rtts = link.peer.ask("ping", count=20)["rtts"]
        assert rtts and min(rtts) >= 0

    def test_pings_are_answered_beside_a_bulk_stream_each_way(self, link: Link) -> None:
        bulk = [Job("echo", 16 * MEBIBYTE, seed=11)]
        done = gevent.spawn(transfer, link.local, link.peer, bulk)
        pings = 0
        while not done.ready():
            link.session.ping(timeout=10)
            pings += 1
        done.get()
        assert pings >= 3
        assert link.peer.ask("ping", count=1)["rtts"]

    def test_what_was_written_before_close_arrives(self, link: Link) -> None:
        """Peers drop what they have not read when the session ends, so close waits for their FINs."""
        jobs = [Job("push", 150_000, seed=n) for n in range(20)]
        check_opened(jobs, link.local.run(jobs))
        link.session.close()
        check_served(jobs, link.peer.served(len(jobs)))
        assert link.session.exception is None
        assert link.session.num_streams == 0

    def test_a_quiet_drain_lets_streams_end_and_refuses_new_ones(self, silent_link: Link) -> None:
        """Quiet, because js-yamux and py-libp2p end every stream on any GoAway."""
        session, peer = silent_link.session, silent_link.peer
        old = Job("echo", 300_000, seed=12)
        running = gevent.spawn(peer.run, [old])
        stream = session.accept(timeout=10)
        ours = session.open()
        ours.sendall(b"echo *\nbefore")
        assert ours.read(6) == b"before"

        session.go_away(announce=False)
        (refused,) = peer.run([Job("digest", 10)])
        assert refused.end == "reset"

        check_served([old], [serve(stream)])
        check_opened([old], running.get(timeout=20))
        ours.sendall(b"after")
        ours.close_write()
        assert ours.read() == b"after"
        ours.close()


class PeerResets:
    """For peers that can reset a stream."""

    def test_we_see_the_peers_reset(self, link: Link) -> None:
        transfer(link.local, link.peer, [Job("reset", size, seed=size) for size in (1, 4096, 400_000)])
        transfer(link.peer, link.local, [Job("abandon", size, seed=size) for size in (1, 4096, 200_000)])

    def test_streams_that_the_peer_resets_before_we_accept_leave_nothing(self, silent_link: Link) -> None:
        session, peer = silent_link.session, silent_link.peer
        deserted = [Job("desert", size, seed=size) for size in (0, 1, 4096, 200_000)]
        check_opened(deserted, peer.run(deserted))
        silent_link.settle()
        assert session.num_streams == 0

        good = Job("push", 1000, seed=16)
        check_opened([good], peer.run([good]))
        check_served([good], [serve(session.accept(timeout=10))])

    def test_resets_from_both_sides_leave_other_streams_alone(self, link: Link) -> None:
        verbs = [*PLAIN, "abandon", "reset"]
        at_the_same_time(
            functools.partial(transfer, link.local, link.peer, random_jobs("our resets", 60, verbs)),
            functools.partial(transfer, link.peer, link.local, random_jobs("their resets", 60, verbs)),
        )


class PeerHalfCloses:
    """For peers that can still read after they have sent FIN."""

    def test_we_answer_after_the_peers_half_close(self, link: Link) -> None:
        jobs = [Job(verb.removesuffix("+half"), 300_000, seed=13, half=True) for verb in HALF_CLOSING]
        transfer(link.peer, link.local, jobs)


class PeerCuts:
    """For peers whose session close says nothing on streams that are still open."""

    def test_a_stream_cut_by_the_peers_close_is_no_end_of_file(self, silent_link: Link) -> None:
        session, peer = silent_link.session, silent_link.peer
        peer.run([Job("hold", 1000, seed=14)])
        cut = session.accept(timeout=10)
        assert cut.readline() == b"drain\n"
        peer.run([Job("push", 2000, seed=15)])
        whole = session.accept(timeout=10)
        silent_link.settle()

        peer.ask("close")
        assert session.join(timeout=10)
        check_served([Job("push", 2000, seed=15)], [serve(whole)])
        assert len(cut.read(1000)) == 1000
        with pytest.raises(geyamux.SessionError):
            cut.recv(1)
        assert list(session) == []
