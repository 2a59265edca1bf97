"""The garbage collector at any time and place: finalisers that end streams, cycles, frozen heaps, other threads.

A finaliser runs where the collector happens to run: inside a read, in the hub, in a thread that knows no session.
"""

from __future__ import annotations

import contextlib
import gc
import hashlib
import os
import random
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import gevent
import pytest

from geyamux import Config, SessionError, StreamError
from support.links import sessions
from support.rawpeer import settle

PATIENCE = 10.0
CONFIG = Config(accept_backlog=64, close_timeout=1.0)


class Bystander:
    """A stream with traffic both ways for as long as it is wanted; judged at the end."""

    def __init__(self, client: Any, server: Any) -> None:
        self.near, self.far = client.open(), server.accept(timeout=PATIENCE)
        self.is_over = False
        self.total = 0
        self.sending = gevent.spawn(self._send)
        self.reading = gevent.spawn(self._read)

    def _send(self) -> bytes:
        rng, digest = random.Random(7), hashlib.sha256()
        with self.near:
            while not self.is_over:
                data = rng.randbytes(rng.choice((10, 700, 9000, 70_000)))
                digest.update(data)
                self.near.sendall(data)
                self.total += len(data)
                gevent.sleep(0)
        return digest.digest()

    def _read(self) -> bytes:
        digest = hashlib.sha256()
        with self.far:
            while data := self.far.recv(30_000):
                digest.update(data)
        return digest.digest()

    def check(self) -> None:
        self.is_over = True
        assert self.sending.get(timeout=PATIENCE) == self.reading.get(timeout=PATIENCE)
        assert self.total > 50_000


class Holder:
    """A user's object that ends something when it is collected; in a cycle, so that only the collector finds it."""

    def __init__(self, end: Callable[[], Any]) -> None:
        self.end = end
        self.me = self

    def __del__(self) -> None:
        self.end()


@contextlib.contextmanager
def collecting(*threshold: int) -> Iterator[None]:
    before = gc.get_threshold()
    gc.set_threshold(*threshold)
    try:
        yield
    finally:
        gc.set_threshold(*before)


@contextlib.contextmanager
def traffic() -> Iterator[tuple[Any, Any]]:
    with sessions("socketpair", CONFIG, CONFIG) as (client, server):
        bystanders = [Bystander(client, server), Bystander(server, client)]
        yield client, server
        with gevent.Timeout(PATIENCE, AssertionError("the bystanders stand still")):
            while min(bystander.total for bystander in bystanders) < 100_000:
                gevent.sleep(0.001)
        for bystander in bystanders:
            bystander.check()
        assert client.ping(PATIENCE) > 0
        settle()
        assert client.num_streams == server.num_streams == 0
        assert (client.stats().unread, server.stats().unread) == (0, 0)


@pytest.mark.parametrize("threshold", [(1, 1, 1), (3, 2, 2), (50, 5, 5)])
def test_a_collection_at_every_allocation_changes_nothing(threshold: tuple[int, ...]) -> None:
    with collecting(*threshold), traffic() as (client, server):
        for _ in range(20):
            near, far = client.open(), server.accept(timeout=PATIENCE)
            with far:
                with near:
                    near.sendall(b"hello" * 500)
                assert far.read() == b"hello" * 500


ENDS: dict[str, Callable[[Any], Callable[[], Any]]] = {
    "close": lambda stream: stream.close,
    "reset": lambda stream: lambda: stream.reset(9),
    "close and reset": lambda stream: lambda: (stream.close(), stream.reset()),
    "leave a with-block": lambda stream: lambda: stream.__exit__(KeyError, KeyError(), None),
    "close a file": lambda stream: stream.makefile("rb").close,
}


@pytest.mark.parametrize("end", ENDS.values(), ids=ENDS)
def test_finalisers_may_end_streams_wherever_they_happen_to_run(end: Any) -> None:
    """Collected in the middle of traffic, in whatever greenlet it was that allocated last."""
    with collecting(40, 3, 3), traffic() as (client, server):
        for number in range(150):
            near, far = client.open(), server.accept(timeout=PATIENCE)
            near.sendall(b"unread" * (number % 300))
            far.sendall(b"unread as well")
            Holder(end(near))
            Holder(end(far))
            del near, far
            if number % 8 == 0:
                gevent.sleep(0)
        gc.collect()
        for session in (client, server):
            for stream in list(session._table.streams.values()):
                if stream.stream_id > 2:  # not those of the bystanders
                    stream.close()  # what was closed through a file is still open itself


@pytest.mark.parametrize("phase", ["start", "stop"])
def test_callbacks_of_the_collector_may_end_streams(phase: str) -> None:
    doomed: list[Any] = []

    def on_collection(which: str, info: dict[str, int]) -> None:
        if which == phase and doomed:
            doomed.pop().reset()

    gc.callbacks.append(on_collection)
    try:
        with collecting(30, 2, 2), traffic() as (client, server):
            for _ in range(100):
                # One that is reset before its SYN has left would never arrive.
                stream = client.open()
                doomed.append(server.accept(timeout=PATIENCE))
                doomed.append(stream)
            while doomed:
                gc.collect(0)
                gevent.sleep(0)
    finally:
        gc.callbacks.remove(on_collection)


@pytest.mark.parametrize("method", ["close", "abort"])
@pytest.mark.parametrize("when", [5, 20, 77, 300])
def test_a_finaliser_may_end_the_session_in_the_middle_of_traffic(method: str, when: int) -> None:
    """Nobody hangs, and what was read is a beginning of what was written."""
    with sessions("socketpair", CONFIG, CONFIG) as (client, server):
        near, far = client.open(), server.accept(timeout=PATIENCE)
        reading, writing = gevent.spawn(read_all, far), gevent.spawn(write_on, near)
        for _ in range(when):
            gevent.sleep(0)
        # Not in the main greenlet: in whichever allocates next.
        Holder(lambda: gevent.spawn(client.close) if method == "close" else client.abort())
        with collecting(1, 1, 1):
            for _ in range(20):
                gevent.sleep(0)
        gc.collect()
        wrote, read = writing.get(timeout=PATIENCE), reading.get(timeout=PATIENCE)
        assert bytes(wrote[: len(read)]) == read
        assert client.join(PATIENCE) and server.join(PATIENCE)


def read_all(stream: Any) -> bytes:
    read = bytearray()
    with contextlib.suppress(StreamError, SessionError):
        while data := stream.recv(20_000):
            read += data
        raise AssertionError("an end of file of a stream that was cut")
    return bytes(read)


def write_on(stream: Any) -> bytes:
    wrote = bytearray()
    with contextlib.suppress(StreamError, SessionError):
        while True:
            data = os.urandom(5000)
            wrote += data
            stream.sendall(data)
    return bytes(wrote)


def test_a_thread_that_collects_all_the_time_ends_streams_through_finalisers() -> None:
    """The finalisers run in a thread that the session does not belong to, while its own thread is at work."""
    over = threading.Event()
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-4)  # else each wait of the hub ends as late as the collecting thread lets it
    # The young generations: a full collection of all that a test run holds would leave no time for anything else.
    collector = threading.Thread(target=lambda: [gc.collect(1) for _ in iter(over.is_set, True)])
    gc.disable()
    collector.start()
    try:
        with traffic() as (client, server):
            for number in range(150):
                near, far = client.open(), server.accept(timeout=PATIENCE)
                near.sendall(b"unread" * (number % 50))
                Holder(near.reset if number % 2 else near.close)
                Holder(far.close)
                del near, far
                gevent.sleep(0.001)
            with gevent.Timeout(PATIENCE, AssertionError(f"{client.num_streams} streams are left")):
                while client.num_streams > 2:
                    gevent.sleep(0.01)
    finally:
        over.set()
        collector.join()
        gc.enable()
        sys.setswitchinterval(interval)


def test_a_frozen_heap_changes_nothing() -> None:
    """`gc.freeze`, as servers call it before they fork."""
    with sessions("socketpair", CONFIG, CONFIG) as (client, server):
        near, far = client.open(), server.accept(timeout=PATIENCE)
        gc.collect()
        gc.freeze()
        near.sendall(b"x" * 100_000)
        near.close()
        assert far.read() == b"x" * 100_000
        far.close()
        gc.unfreeze()
        gc.collect()
        assert client.ping(PATIENCE) > 0
        settle()
        assert client.num_streams == 0
    gc.freeze()  # as the run began: later tests look at all objects, or collect


def test_streams_in_cycles_are_collected_once_their_session_has_ended() -> None:
    gone: list[int] = []
    watching = []
    with sessions("socketpair", CONFIG, CONFIG) as (client, server):
        for number in range(20):
            near, far = client.open(), server.accept(timeout=PATIENCE)
            for stream in (near, far):
                ring: list[Any] = [stream, stream.makefile("rb")]
                ring.append(ring)
                # The stream holds the callback, the callback the ring, the ring the stream.
                stream.rawlink(lambda _, ring=ring: None)
                watching.append(weakref.ref(stream, lambda _, number=number: gone.append(number)))
                del ring, stream
            del near, far
        gc.collect()
        assert not gone, "a live session holds its streams"
    settle()
    del client, server
    gc.collect()
    settle()
    gc.collect()
    assert len(gone) == 40 and not [ref for ref in watching if ref() is not None]


def test_a_weak_reference_may_end_the_session_when_its_stream_is_collected() -> None:
    ended = []
    with sessions("socketpair", CONFIG, CONFIG) as (client, server):
        near, far = client.open(), server.accept(timeout=PATIENCE)

        def end(_: Any) -> None:
            ended.append(1)
            client.abort()

        watch = weakref.ref(near, end)
        near.reset()
        far.close()
        del near
        settle()
        gc.collect()
        assert ended and watch() is None
        assert client.join(PATIENCE) and server.join(PATIENCE)


@pytest.mark.parametrize("kind", ["socketpair", "tcp", "tls13", "memory", "stream"])
def test_sessions_that_are_thrown_away_half_made_or_at_work_leave_nothing(kind: str) -> None:
    """One end is ended, the other learns it, and of both nothing stays."""
    before = live_sessions()
    for _ in range(10):
        with sessions(kind, CONFIG, CONFIG) as (client, server):
            client.open().sendall(b"x" * 1000)
            reading = gevent.spawn(read_all, server.accept(timeout=PATIENCE))
            client.abort()
            assert (b"x" * 1000).startswith(reading.get(timeout=PATIENCE))
        del client, server, reading
    settle()
    gc.collect()
    settle()
    gc.collect()
    assert live_sessions() <= before


def live_sessions() -> int:
    gc.collect()
    return sum(
        1 for found in gc.get_objects() if type(found).__name__ in ("Client", "Server") and hasattr(found, "config")
    )
