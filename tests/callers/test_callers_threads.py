"""Use from other threads: told so, or handed over, and never harmful; with traffic going on in the session's own.

Threads are plain ones, those of gevent's pool, and those with a hub of their own.
"""

from __future__ import annotations

import hashlib
import random
import socket
import threading
import time
from collections.abc import Callable
from typing import Any

import gevent
import gevent.threadpool
import pytest

import geyamux
from geyamux import Config, SessionError
from support.links import sessions
from support.rawpeer import settle

PATIENCE = 10.0
CONFIG = Config(accept_backlog=64, close_timeout=1.0, outbox_limit=65536)


def in_plain_thread(call: Callable[[], Any]) -> Any:
    result: list[Any] = []
    thread = threading.Thread(target=lambda: result.append(attempt(call)))
    thread.start()
    while thread.is_alive():
        gevent.sleep(0.001)
    return result[0]


def in_pool(call: Callable[[], Any]) -> Any:
    return gevent.get_hub().threadpool.apply(attempt, (call,))


def in_thread_with_hub(call: Callable[[], Any]) -> Any:
    def run() -> Any:
        try:
            return gevent.spawn(attempt, call).get()
        finally:
            gevent.get_hub().destroy(destroy_loop=True)

    return in_plain_thread(run)


def attempt(call: Callable[[], Any]) -> Any:
    try:
        return call()
    except BaseException as error:
        return error


THREADS = {"plain": in_plain_thread, "pool": in_pool, "with a hub": in_thread_with_hub}
every_kind_of_thread = pytest.mark.parametrize("run", THREADS.values(), ids=THREADS)

REFUSED: dict[str, Callable[[Any, Any], Any]] = {
    "Session.open": lambda session, _: session.open(),
    "Session.accept": lambda session, _: session.accept(timeout=0.1),
    "Session.__iter__": lambda session, _: next(iter(session)),
    "Session.ping": lambda session, _: session.ping(0.1),
    "Session.join": lambda session, _: session.join(0.1),
    "Session.go_away": lambda session, _: session.go_away(),
    "Session.rawlink": lambda session, _: session.rawlink(print),
    "Listener.accept": lambda session, _: session.listener().accept(),
    "Listener.close": lambda session, _: session.listener().close(),
    "Listener.__exit__": lambda session, _: session.listener().__exit__(None, None, None),
    "Stream.recv": lambda _, stream: stream.recv(1),
    "Stream.recv, peeking": lambda _, stream: stream.recv(1, socket.MSG_PEEK),
    "Stream.recv_into": lambda _, stream: stream.recv_into(bytearray(1)),
    "Stream.recvfrom": lambda _, stream: stream.recvfrom(1),
    "Stream.read": lambda _, stream: stream.read(1),
    "Stream.read1": lambda _, stream: stream.read1(1),
    "Stream.readinto": lambda _, stream: stream.readinto(bytearray(1)),
    "Stream.readinto1": lambda _, stream: stream.readinto1(bytearray(1)),
    "Stream.readline": lambda _, stream: stream.readline(),
    "Stream.readlines": lambda _, stream: stream.readlines(),
    "Stream.__next__": lambda _, stream: next(stream),
    "Stream.peek": lambda _, stream: stream.peek(),
    "Stream.send": lambda _, stream: stream.send(b"x"),
    "Stream.sendall": lambda _, stream: stream.sendall(b"x"),
    "Stream.sendall, much": lambda _, stream: stream.sendall(bytes(100_000)),
    "Stream.write": lambda _, stream: stream.write(b"x"),
    "Stream.writelines": lambda _, stream: stream.writelines([b"x"]),
    "Stream.flush": lambda _, stream: stream.flush(),
    "Stream.shutdown": lambda _, stream: stream.shutdown(socket.SHUT_RDWR),
    "Stream.close_write": lambda _, stream: stream.close_write(),
    "Stream.wait_established": lambda _, stream: stream.wait_established(0.1),
    "Stream.rawlink": lambda _, stream: stream.rawlink(print),
    "a file's read": lambda _, stream: stream.makefile("rb").read(1),
    "a file's flush": lambda _, stream: stream.makefile("wb", buffering=0).write(b"x"),
}
TELLING: dict[str, Callable[[Any, Any], Any]] = {
    "Session.stats": lambda session, _: session.stats(),
    "Session.num_streams": lambda session, _: session.num_streams,
    "Session.closed": lambda session, _: session.closed,
    "Session.ready": lambda session, _: session.ready(),
    "Session.rtt": lambda session, _: session.rtt,
    "Session.getpeername": lambda session, _: session.getpeername(),
    "Session.__repr__": lambda session, _: repr(session),
    "Session.unlink": lambda session, _: session.unlink(print),
    "Session.listener": lambda session, _: session.listener().getsockname(),
    "Stream.stats": lambda _, stream: stream.stats(),
    "Stream.ready": lambda _, stream: stream.ready(),
    "Stream.__repr__": lambda _, stream: repr(stream),
    "Stream.settimeout": lambda _, stream: stream.settimeout(None),
    "Stream.getsockopt": lambda _, stream: stream.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR),
    "Stream.unlink": lambda _, stream: stream.unlink(print),
}


@every_kind_of_thread
def test_what_waits_or_sends_is_refused_in_another_thread_and_changes_nothing(run: Any) -> None:
    """With much to read, and with nothing: what need not wait is refused, too."""
    with sessions("socketpair", CONFIG, CONFIG) as (client, server):
        near, far = client.open(), server.accept(timeout=PATIENCE)
        far.sendall(b"line\n" * 10)
        settle()
        before = (client.stats().bytes_sent, near.stats())

        def try_all() -> list[Any]:
            return [(name, attempt(lambda use=use: use(client, near))) for name, use in REFUSED.items()]

        for name, result in run(try_all):
            assert isinstance(result, RuntimeError) and "thread" in str(result), (name, result)
        assert (client.stats().bytes_sent, near.stats()) == before
        assert near.read(50) == b"line\n" * 10


@every_kind_of_thread
def test_what_only_tells_works_in_another_thread(run: Any) -> None:
    with sessions("socketpair", CONFIG, CONFIG) as (client, server):
        near = client.open()
        server.accept(timeout=PATIENCE)

        def try_all() -> list[Any]:
            return [(name, attempt(lambda use=use: use(client, near))) for name, use in TELLING.items()]

        for name, result in run(try_all):
            assert not isinstance(result, BaseException), (name, result)
        assert client.ping(PATIENCE) > 0


@every_kind_of_thread
@pytest.mark.parametrize("method", ["close", "reset", "__del__", "__exit__"])
def test_the_end_of_a_stream_is_handed_over_with_its_bytes(run: Any, method: str) -> None:
    with sessions("socketpair", CONFIG, CONFIG) as (client, server):
        near, far = client.open(), server.accept(timeout=PATIENCE)
        near.sendall(b"before")
        arguments = (None, None, None) if method == "__exit__" else ()
        assert run(lambda: getattr(near, method)(*arguments)) is None
        if method == "reset":
            with pytest.raises(geyamux.StreamReset):
                while far.recv(10):
                    pass
        else:
            assert far.read() == b"before"
        far.close()
        settle()
        assert client.num_streams == server.num_streams == 0


@every_kind_of_thread
@pytest.mark.parametrize("method", ["close", "abort", "__exit__"])
def test_the_end_of_a_session_is_handed_over_and_the_thread_does_not_wait(run: Any, method: str) -> None:
    with sessions("socketpair", CONFIG, CONFIG) as (client, server):
        reading = gevent.spawn(attempt, client.open().read)
        settle()
        arguments = (None, None, None) if method == "__exit__" else ()
        assert run(lambda: getattr(client, method)(*arguments)) is None
        assert isinstance(reading.get(timeout=PATIENCE), SessionError)
        assert client.join(PATIENCE) and server.join(PATIENCE)


@pytest.mark.slow
def test_many_threads_that_end_streams_at_once_disturb_no_traffic() -> None:
    """Eight threads close, reset and finalise streams as fast as they can, twice each."""
    doomed: list[Any] = []
    over = threading.Event()

    def end_streams(seed: int) -> None:
        rng = random.Random(seed)
        while not over.is_set() or doomed:
            try:
                stream = doomed.pop()
            except IndexError:
                time.sleep(0.0005)
                continue
            for _ in range(2):
                rng.choice((stream.close, stream.reset, stream.__del__))()

    with sessions("tcp", CONFIG, CONFIG) as (client, server):
        threads = [threading.Thread(target=end_streams, args=(seed,)) for seed in range(8)]
        for thread in threads:
            thread.start()
        try:
            wrote, read = talk(client, server, doomed)
        finally:
            over.set()
            for thread in threads:
                while thread.is_alive():
                    gevent.sleep(0.001)
        assert wrote == read
        assert client.ping(PATIENCE) > 0
        with gevent.Timeout(PATIENCE, AssertionError(f"left: {client.num_streams}, {server.num_streams}")):
            while client.num_streams or server.num_streams:
                gevent.sleep(0.001)


def talk(client: Any, server: Any, doomed: list[Any]) -> tuple[bytes, bytes]:
    """Traffic on one stream, and 600 others given to the threads; the digests of both ends."""
    near, far = client.open(), server.accept(timeout=PATIENCE)

    def receive() -> bytes:
        digest = hashlib.sha256()
        with far:
            while data := far.recv(40_000):
                digest.update(data)
        return digest.digest()

    reading = gevent.spawn(receive)
    rng, digest = random.Random(3), hashlib.sha256()
    with near:
        for _ in range(300):
            stream = client.open()
            stream.sendall(b"in the way")
            doomed.append(server.accept(timeout=PATIENCE))
            doomed.append(stream)
            data = rng.randbytes(rng.randint(1, 20_000))
            digest.update(data)
            near.sendall(data)
    return digest.digest(), reading.get(timeout=PATIENCE)


@pytest.mark.parametrize("method", ["close", "abort"])
def test_many_threads_that_end_one_session_at_once_end_it_once(method: str) -> None:
    with sessions("tcp", CONFIG, CONFIG) as (client, server):
        near, far = client.open(), server.accept(timeout=PATIENCE)
        # Nobody reads it: it waits for credit.
        writing = gevent.spawn(attempt, lambda: near.sendall(bytes(10_000_000)))
        reading = gevent.spawn(attempt, near.read)
        settle()
        assert not writing.ready() and far.stats().unread > 0
        start = threading.Barrier(8)
        threads = [
            threading.Thread(target=lambda: (start.wait(), getattr(client, method)(), getattr(server, method)()))
            for _ in range(8)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            while thread.is_alive():
                gevent.sleep(0.001)
        for greenlet in (writing, reading):
            assert isinstance(greenlet.get(timeout=PATIENCE), (SessionError, geyamux.StreamError))
        assert client.join(PATIENCE) and server.join(PATIENCE)
        assert client.exception is None or method == "abort"


@pytest.mark.skipif(
    "libuv" in type(gevent.get_hub().loop).__module__, reason="gevent's hub.destroy hangs in a thread there"
)
def test_a_session_outlived_by_the_thread_that_refused_to_run_its_hub_can_be_let_go_of() -> None:
    """Its thread has ended, and its hub is destroyed: to end it from another is harmless, and waits for nobody."""
    made: list[Any] = []

    def make() -> None:
        made.extend(geyamux.pair())
        made.append(made[0].open())
        gevent.sleep(0)
        gevent.get_hub().destroy(destroy_loop=True)

    thread = threading.Thread(target=make)
    thread.start()
    thread.join()
    client, server, stream = made
    for call in (stream.close, stream.reset, client.close, client.abort, server.close, server.abort, stream.__del__):
        assert call() is None
    with pytest.raises(RuntimeError, match="thread"):
        client.ping()
    for session in (client, server):
        session.conn._sock.close()
