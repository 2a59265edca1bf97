"""What multiplexers get wrong under load: deadlocks, false alarms, stalls, unfair turns, TLS, and the price of a stream.

Most of it needs real sockets, real time or a process of its own; such a process runs a function of this file:
``python test_hard_behaviours.py NAME ARGUMENT...``.

Longer than other modules because all tests of one subject stand together, each short and by itself.
"""

from __future__ import annotations

import contextlib
import gc
import os
import random
import signal
import ssl
import subprocess
import sys
import time
import tracemalloc
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import gevent
import gevent.ssl
import greenlet
import pytest
from gevent import socket as gsocket
from gevent.event import Event

import geyamux
from geyamux import Client, Config, KeepaliveTimeout, Server, SessionError, StreamReset, WriteTimeout
from support.cutting import cut_sessions
from support.links import authority, sessions
from support.rawpeer import settle
from support.transports import memory_pair

SEED = 20_261_122
PATIENCE = 25.0
KIB = 1 << 10
MIB = 1 << 20


def _within(attempts: int, measure: Callable[[], tuple[bool, str]]) -> None:
    """Bounds on time, on a machine that others use, too: one attempt has to keep them."""
    reports = []
    for _ in range(attempts):
        is_kept, report = measure()
        reports.append(report)
        if is_kept:
            print(f"\n{report}")
            return
    pytest.fail("; ".join(reports))


def _sink(stream: Any) -> int:
    """Read to the end; the checksum of all."""
    checksum = 0
    while data := stream.recv(65536):
        checksum = zlib.crc32(data, checksum)
    return checksum


def _joined(greenlets: list[gevent.Greenlet], timeout: float = PATIENCE) -> list[Any]:
    gevent.joinall(greenlets, timeout=timeout)
    return [running.get(block=False) for running in greenlets]


# --- no mutual write deadlock ---


def _is_taking_in() -> bool:
    """Somewhere below, a reader is at work on what it has received."""
    frame = sys._getframe()
    while frame is not None:
        if frame.f_code.co_name == "_take_in":
            return True
        frame = frame.f_back
    return False


class WatchedSocket(gsocket.socket):
    """A gevent socket that knows who receives from it, and whether that sends."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.receivers: set[Any] = set()
        self.has_reader_sent = False

    def recv(self, *args: Any) -> bytes:
        self.receivers.add(gevent.getcurrent())
        return super().recv(*args)

    def send(self, *args: Any) -> int:
        self.has_reader_sent |= _is_taking_in()
        return super().send(*args)

    def sendmsg(self, *args: Any) -> int:
        self.has_reader_sent |= _is_taking_in()
        return super().sendmsg(*args)


class WatchedTransport:
    """The same around an object without a descriptor."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner
        self.receivers: set[Any] = set()
        self.has_reader_sent = False
        self.shutdown, self.close = inner.shutdown, inner.close

    def recv(self, size: int) -> bytes:
        self.receivers.add(gevent.getcurrent())
        return self.inner.recv(size)

    def send(self, data: Any) -> int:
        self.has_reader_sent |= _is_taking_in() or gevent.getcurrent() in self.receivers
        return self.inner.send(data)


def _narrow_socketpair() -> list[Any]:
    ends = [WatchedSocket(end.family, end.type, fileno=end.detach()) for end in gsocket.socketpair()]
    for end in ends:
        end.setsockopt(gsocket.SOL_SOCKET, gsocket.SO_SNDBUF, 4096)
        end.setsockopt(gsocket.SOL_SOCKET, gsocket.SO_RCVBUF, 4096)
    return ends


def _narrow_tcp() -> list[Any]:
    listener = gsocket.socket()
    listener.setsockopt(gsocket.SOL_SOCKET, gsocket.SO_RCVBUF, 4096)
    listener.bind(("127.0.0.1", 0))
    listener.listen(1)
    near = gsocket.socket()
    near.setsockopt(gsocket.SOL_SOCKET, gsocket.SO_RCVBUF, 4096)
    near.connect(listener.getsockname())
    far, _ = listener.accept()
    listener.close()
    ends = [WatchedSocket(end.family, end.type, fileno=end.detach()) for end in (near, far)]
    for end in ends:
        end.setsockopt(gsocket.SOL_SOCKET, gsocket.SO_SNDBUF, 4096)
    return ends


def _narrow_memory() -> list[Any]:
    return [WatchedTransport(end) for end in memory_pair(4096)]


def _ping_until(session: Any, over: Event) -> int:
    count = 0
    while not over.is_set():
        session.ping(PATIENCE)
        count += 1
    return count


@pytest.mark.slow
@pytest.mark.timeout(85)
@pytest.mark.parametrize(
    ("ends", "size"), [(_narrow_socketpair, MIB), (_narrow_tcp, 128 * KIB), (_narrow_memory, 128 * KIB)]
)
def test_two_peers_that_only_write_do_not_wait_for_each_other(ends: Callable[[], list[Any]], size: int) -> None:
    near, far = ends()
    begun = time.monotonic()
    with contextlib.closing(Client(near)) as client, contextlib.closing(Server(far)) as server:
        streams = []
        for _ in range(100):
            streams.append((client.open(), server.accept(timeout=PATIENCE)))
        payloads = [random.Random(number).randbytes(size) for number in range(2)]
        over = Event()
        pinging = [gevent.spawn(_ping_until, session, over) for session in (client, server)]
        reading = [gevent.spawn(_sink, end) for pair in streams for end in pair]
        writing = [gevent.spawn(end.sendall, payloads[n % 2]) for n, pair in enumerate(streams) for end in pair]
        _joined(writing, 60.0)
        for pair in streams:
            for end in pair:
                end.close_write()
        wanted = [zlib.crc32(payloads[n % 2]) for n, pair in enumerate(streams) for _ in pair]
        assert _joined(reading) == wanted
        over.set()
        counts = _joined(pinging)
        assert min(counts) > 3
        assert client.closed is server.closed is False
    for end in (near, far):
        assert len(end.receivers) == 1, "one greenlet receives"
        assert not end.has_reader_sent, "and it never sends"
    print(f"\n{ends.__name__}: {2 * 100 * size >> 20} MiB in {time.monotonic() - begun:.1f} s, pings {counts}")


# --- busy is not dead ---


class Throttle:
    """A relay between two TCP connections that lets so many bytes a second pass in either direction."""

    def __init__(self, rate: int, buffers: int) -> None:
        self.rate = rate
        self.passed = [0, 0]
        self.near, left = self._connection(buffers)
        right, self.far = self._connection(buffers)
        self._ends = (left, right)
        self._relaying = [gevent.spawn(self._relay, left, right, 0), gevent.spawn(self._relay, right, left, 1)]

    def _connection(self, buffers: int) -> tuple[Any, Any]:
        listener = gsocket.socket()
        self._widen(listener, buffers)
        listener.bind(("127.0.0.1", 0))
        listener.listen(1)
        dialled = gsocket.socket()
        self._widen(dialled, buffers)
        dialled.connect(listener.getsockname())
        accepted, _ = listener.accept()
        self._widen(accepted, buffers)
        listener.close()
        return dialled, accepted

    def _widen(self, sock: Any, buffers: int) -> None:
        sock.setsockopt(gsocket.SOL_SOCKET, gsocket.SO_SNDBUF, buffers)
        sock.setsockopt(gsocket.SOL_SOCKET, gsocket.SO_RCVBUF, buffers)

    def _relay(self, source: Any, sink: Any, direction: int) -> None:
        begun = time.monotonic()
        with contextlib.suppress(OSError):
            while data := source.recv(self.rate // 50):
                sink.sendall(data)
                self.passed[direction] += len(data)
                gevent.sleep(max(0.0, begun + self.passed[direction] / self.rate - time.monotonic()))

    def close(self) -> None:
        gevent.killall(self._relaying)
        for end in self._ends:
            end.close()


def _pour(stream: Any) -> None:
    with contextlib.suppress(SessionError):
        while True:
            stream.sendall(bytes(65536))


def _drain(stream: Any) -> None:
    with contextlib.suppress(SessionError):
        while stream.recv(65536):
            pass


def _saturate(throttle: Throttle, config: Config, seconds: float) -> tuple[Any, Any]:
    """Both directions full for so long; the sessions must live through it. Returns their stats."""
    client, server = Client(throttle.near, config), Server(throttle.far, config)
    try:
        streams = [(client.open(), server.accept(timeout=PATIENCE)) for _ in range(100)]
        busy = [gevent.spawn(work, end) for pair in streams for end in pair for work in (_pour, _drain)]
        over = time.monotonic() + seconds
        while time.monotonic() < over and not (client.closed or server.closed):
            gevent.sleep(0.2)
        left = over - time.monotonic()
        assert not client.closed, f"{client.exception!r} with {left:.1f} s to go"
        assert not server.closed, f"{server.exception!r} with {left:.1f} s to go"
        assert all(not work.ready() for work in busy)
        return client.stats(), server.stats()
    finally:
        client.abort()
        server.abort()
        client.join(PATIENCE)
        server.join(PATIENCE)
        throttle.close()


@pytest.mark.slow
@pytest.mark.timeout(89)
def test_a_link_full_both_ways_with_large_buffers_is_not_taken_for_dead() -> None:
    throttle = Throttle(200_000, 4 * MIB)
    stats = _saturate(throttle, Config(), 60.0)
    print(f"\n60 s at 200 kB/s: relayed {throttle.passed}, {stats[0]}")
    for passed in throttle.passed:
        assert passed > 200_000 * 60 * 0.8
    # So much was under way that the sessions had to wait for the link, not for each other.
    for side in stats:
        assert side.bytes_sent > passed + 4 * MIB


@pytest.mark.slow
@pytest.mark.timeout(40)
def test_a_slow_link_is_not_taken_for_dead_within_any_of_its_time_limits() -> None:
    config = Config(keepalive_interval=1.0, keepalive_timeout=1.0, connection_write_timeout=1.0, stream_open_timeout=10.0)
    throttle = Throttle(100_000, 32 * KIB)
    _saturate(throttle, config, 8.0)
    for passed in throttle.passed:
        assert passed > 100_000 * 8 * 0.8


# --- processes of their own ---


@contextlib.contextmanager
def _child(*arguments: str) -> Iterator[Any]:
    # It imports what this process imports.
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(os.path.abspath, sys.path))}
    command = [sys.executable, __file__, *arguments]
    child = subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0)
    try:
        yield child
    finally:
        child.kill()
        child.wait()
        child.stdin.close()
        child.stdout.close()


def _report_of(*arguments: str) -> dict[str, float]:
    """Run a child to its end; the `name=value` words that it printed."""
    with _child(*arguments) as child:
        printed = child.stdout.read().decode()
        assert child.wait() == 0, printed
    print(f"\n{' '.join(arguments)}: {printed.strip()}")
    return {name: float(value) for name, value in (word.split("=") for word in printed.split())}


@contextlib.contextmanager
def _peer_process(buffers: int | None = None) -> Iterator[tuple[Any, Any]]:
    """A server in a process of its own, and a socket connected to it."""
    with _child("peer", str(buffers or 0)) as child:
        port = int(child.stdout.readline())
        sock = gsocket.socket()
        if buffers is not None:
            sock.setsockopt(gsocket.SOL_SOCKET, gsocket.SO_SNDBUF, buffers)
        sock.connect(("127.0.0.1", port))
        sock.setsockopt(gsocket.IPPROTO_TCP, gsocket.TCP_NODELAY, 1)
        yield child, sock


def _serve_as_peer(buffers: str) -> None:
    """Child: for one connection, do on each stream what its first byte says: Send, Read or Echo."""
    listener = gsocket.socket()
    if int(buffers):
        listener.setsockopt(gsocket.SOL_SOCKET, gsocket.SO_RCVBUF, int(buffers))
    listener.bind(("127.0.0.1", 0))
    listener.listen(1)
    print(listener.getsockname()[1], flush=True)
    conn, _ = listener.accept()
    conn.setsockopt(gsocket.IPPROTO_TCP, gsocket.TCP_NODELAY, 1)
    jobs = {b"S": _pour, b"R": _drain, b"E": _echo}
    for stream in Server(conn):
        gevent.spawn(lambda stream: jobs[stream.recv(1)](stream), stream)


def _echo(stream: Any) -> None:
    with stream:
        while data := stream.recv(65536):
            stream.sendall(data)


def _failure_of_writing(stream: Any) -> BaseException | None:
    try:
        stream.sendall(bytes(MIB))
    except SessionError as error:
        return error
    return None


def _echo_all(session: Any) -> None:
    for stream in session:
        gevent.spawn(_echo, stream)


def _time_to_end(session: Any) -> float:
    begun = time.monotonic()
    assert session.join(PATIENCE)
    return time.monotonic() - begun


def test_an_idle_session_whose_peer_is_stopped_ends_in_time() -> None:
    config = Config(keepalive_interval=1.0, keepalive_timeout=0.5)
    with _peer_process() as (child, sock), contextlib.closing(Client(sock, config)) as client:
        assert client.ping(PATIENCE)
        os.kill(child.pid, signal.SIGSTOP)
        seconds = _time_to_end(client)
        assert isinstance(client.exception, KeepaliveTimeout)
        assert 1.3 <= seconds <= 2.5, f"{seconds:.2f} s"
        print(f"\nidle, keepalive 1.0 s + 0.5 s: ended after {seconds:.2f} s")


def test_a_session_that_waits_for_credit_of_a_stopped_peer_ends_in_time() -> None:
    config = Config(keepalive_interval=1.0, keepalive_timeout=0.5, connection_write_timeout=1.0)
    with _peer_process() as (child, sock), contextlib.closing(Client(sock, config)) as client:
        stream = client.open()
        stream.sendall(b"R")
        assert client.ping(PATIENCE)
        os.kill(child.pid, signal.SIGSTOP)
        assert isinstance(_failure_of_writing(stream), KeepaliveTimeout)
        assert isinstance(client.exception, KeepaliveTimeout)


def test_a_writing_session_whose_peer_is_stopped_ends_in_time() -> None:
    config = Config(keepalive_interval=None, connection_write_timeout=1.0)
    with _peer_process(32 * KIB) as (child, sock), contextlib.closing(Client(sock, config)) as client:
        stream = client.open()
        stream.sendall(b"R")
        assert client.ping(PATIENCE)
        os.kill(child.pid, signal.SIGSTOP)
        writing = gevent.spawn(_failure_of_writing, stream)
        seconds = _time_to_end(client)
        assert isinstance(writing.get(timeout=PATIENCE), WriteTimeout)
        assert isinstance(client.exception, WriteTimeout)
        assert 0.9 <= seconds <= 2.5, f"{seconds:.2f} s"
        print(f"\nwriting, connection_write_timeout 1.0 s: ended after {seconds:.2f} s")


# --- one dead reader stalls nobody ---


def _bulk_seconds(streams: list[tuple[Any, Any]], size: int) -> float:
    """How long it takes to move so much on each of these streams."""
    begun = time.monotonic()
    working = [gevent.spawn(near.sendall, bytes(size)) for near, _ in streams]
    working += [gevent.spawn(far.read, size) for _, far in streams]
    _joined(working)
    return time.monotonic() - begun


def _refused(stream: Any) -> bool:
    """Whether the peer reset it; a stream in its backlog stays silent."""
    stream.settimeout(0)
    try:
        stream.recv(1)
    except StreamReset:
        return True
    except BlockingIOError:
        return False
    raise AssertionError("bytes on a stream that nobody has accepted")


@pytest.mark.alone
@pytest.mark.slow
@pytest.mark.timeout(60)
@pytest.mark.parametrize("kind", ["tcp", "tls13"])
def test_a_dead_reader_and_a_full_backlog_stall_nobody(kind: str) -> None:
    patient = Config(accept_backlog=1000)

    def measure() -> tuple[bool, str]:
        with sessions(kind, patient) as (free, free_peer), sessions(kind, patient) as (loaded, loaded_peer):
            streams = [(free.open(), free_peer.accept(timeout=PATIENCE)) for _ in range(4)]
            others = [(loaded.open(), loaded_peer.accept(timeout=PATIENCE)) for _ in range(4)]
            unread = loaded.open()
            dead = loaded_peer.accept(timeout=PATIENCE)
            stuck = gevent.spawn(_failure_of_writing, unread)
            waiting = [loaded.open() for _ in range(300)]
            loaded.ping(PATIENCE)
            settle()
            assert dead.stats().unread == 262_144 and not stuck.ready()
            assert loaded_peer.stats().backlog == 256
            assert sum(map(_refused, waiting)) == 44

            over = Event()
            pinging = gevent.spawn(_slowest_ping, loaded, over)
            size = 24 * MIB
            alone, beside = 9e9, 9e9
            for _ in range(4):
                alone = min(alone, _bulk_seconds(streams, size))
                beside = min(beside, _bulk_seconds(others, size))
            over.set()
            slowest = pinging.get(timeout=PATIENCE)
            assert not stuck.ready()
            stuck.kill()
            rate = 4 * size / MIB
            report = f"{kind}: {rate / alone:.0f} MiB/s free, {rate / beside:.0f} beside, slowest ping {slowest:.3f} s"
            return beside * 0.9 <= alone and slowest < 1.0, report

    _within(2, measure)


def _slowest_ping(session: Any, over: Event) -> float:
    slowest = 0.0
    while not over.wait(0.01):
        slowest = max(slowest, session.ping(PATIENCE))
    return slowest


# --- fairness ---


def _lateness(over: Event) -> tuple[float, float]:
    """How late a timer of 5 ms is at most: by the clock, and by the processor time that this thread used meanwhile.

    Both are bounds of what the hub is to blame for; the second leaves out time that went to other processes.
    """
    by_clock = by_blame = 0.0
    while not over.is_set():
        begun, used = time.monotonic(), time.thread_time()
        gevent.sleep(0.005)
        late = time.monotonic() - begun - 0.005
        by_clock = max(by_clock, late)
        by_blame = max(by_blame, min(late, time.thread_time() - used))
    return by_clock, by_blame


@pytest.mark.alone
@pytest.mark.slow
@pytest.mark.timeout(40)
@pytest.mark.parametrize("piece", [65536, 1000])
def test_full_speed_both_ways_keeps_no_timer_waiting(piece: int) -> None:
    def measure() -> tuple[bool, str]:
        with _peer_process() as (_, sock), contextlib.closing(Client(sock)) as client:
            sending, receiving = client.open(), client.open()
            sending.sendall(b"R")
            receiving.sendall(b"S")
            busy = [gevent.spawn(_pour_pieces, sending, piece), gevent.spawn(_drain, receiving)]
            over = Event()
            timing = gevent.spawn(_lateness, over)
            gevent.sleep(4.0)
            over.set()
            by_clock, by_blame = timing.get(timeout=PATIENCE)
            stats = client.stats()
            assert not any(work.ready() for work in busy)
            assert min(stats.bytes_sent, stats.bytes_received) > 4 * MIB
            client.abort()
        report = (
            f"pieces of {piece}: 5 ms timer late by {by_blame * 1e3:.1f} ms (clock {by_clock * 1e3:.1f} ms), "
            f"{stats.bytes_sent >> 22} MiB/s out, {stats.bytes_received >> 22} MiB/s in"
        )
        return by_blame <= 0.020, report

    _within(2, measure)


def _pour_pieces(stream: Any, piece: int) -> None:
    data = bytes(piece)
    with contextlib.suppress(SessionError):
        while True:
            stream.sendall(data)


def _count(stream: Any, counts: list[int], number: int) -> None:
    with contextlib.suppress(SessionError):
        while data := stream.recv(65536):
            counts[number] += len(data)


@pytest.mark.alone
@pytest.mark.slow
@pytest.mark.timeout(40)
@pytest.mark.parametrize("kind", ["tcp", "memory", "tls13"])
@pytest.mark.parametrize("piece", [1000, 16384, 262_144])
def test_a_hundred_equal_streams_get_equal_shares(kind: str, piece: int) -> None:
    def measure() -> tuple[bool, str]:
        counts = [0] * 100
        with sessions(kind) as (client, server):
            for number in range(100):
                gevent.spawn(_pour_pieces, client.open(), piece)
                gevent.spawn(_count, server.accept(timeout=PATIENCE), counts, number)
            gevent.sleep(0.3)
            before = counts[:]
            over = time.monotonic() + 6.0
            # Long enough for each to have had its window many times.
            while sum(counts) - sum(before) < 100 * MIB and time.monotonic() < over:
                gevent.sleep(0.05)
        shares = [after - start for after, start in zip(counts, before, strict=True)]
        mean = sum(shares) / len(shares)
        least, most = min(shares) / mean, max(shares) / mean
        report = f"{kind}, pieces of {piece}: shares {least:.3f} .. {most:.3f} of the mean, {mean / KIB:.0f} KiB"
        return least >= 0.8 and most <= 1.2, report

    _within(2, measure)


# --- TLS ---


class StarvedTLSSocket(gevent.ssl.SSLSocket):
    """A TLS socket that now and then must receive before it can send on, as in a renegotiation."""

    rng: random.Random
    is_starving = False
    is_hungry = False
    starved = 0

    def write(self, data: Any) -> int:
        if self.is_hungry and not self.is_starving and self.rng.random() < 0.3:
            self.is_starving = True
            self.starved += 1
        if self.is_starving:
            raise gevent.ssl.SSLWantReadError
        return super().write(data)

    def recv(self, *args: Any) -> bytes:
        data = super().recv(*args)
        self.is_starving = False
        return data


def _starved_link() -> tuple[Any, Any]:
    near = gevent.ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    far = gevent.ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority().configure_trust(near)
    authority().issue_cert("localhost").configure_cert(far)
    near.sslsocket_class = StarvedTLSSocket
    left, right = gsocket.socketpair()
    shaking = gevent.spawn(far.wrap_socket, right, server_side=True)
    left = near.wrap_socket(left, server_hostname="localhost")
    left.rng = random.Random(SEED)
    return left, shaking.get(timeout=PATIENCE)


def _tick(stream: Any, over: Event) -> None:
    while not over.wait(0.0005):
        stream.sendall(b".")


@pytest.mark.slow
def test_a_tls_write_that_must_wait_for_input_loses_and_repeats_nothing() -> None:
    left, right = _starved_link()
    with contextlib.closing(Client(left)) as client, contextlib.closing(Server(right)) as server:
        ticking, ticks = server.open(), client.accept(timeout=PATIENCE)
        streams = [(client.open(), server.accept(timeout=PATIENCE)) for _ in range(4)]
        over = Event()
        left.is_hungry = True
        helping = [gevent.spawn(_tick, ticking, over), gevent.spawn(_drain, ticks)]
        payload = random.Random(SEED).randbytes(2 * MIB)
        reading = [gevent.spawn(_sink, end) for pair in streams for end in pair]
        writing = [gevent.spawn(end.sendall, payload) for pair in streams for end in pair]
        _joined(writing)
        for pair in streams:
            for end in pair:
                end.close_write()
        assert _joined(reading) == [zlib.crc32(payload)] * 8
        assert left.starved > 20
        left.is_hungry = False
        over.set()
        ticking.close()
        _joined(helping)
    print(f"\n16 MiB over TLS, {left.starved} writes that had to wait for input")


@pytest.mark.slow
@pytest.mark.timeout(60)
@pytest.mark.parametrize("kind", ["tls12", "tls13"])
def test_bulk_both_ways_over_tls_arrives_whole(kind: str) -> None:
    begun = time.monotonic()
    with sessions(kind) as (client, server):
        streams = [(client.open(), server.accept(timeout=PATIENCE)) for _ in range(4)]
        payload = random.Random(SEED).randbytes(16 * MIB)
        reading = [gevent.spawn(_sink, end) for pair in streams for end in pair]
        writing = [gevent.spawn(end.sendall, payload) for pair in streams for end in pair]
        _joined(writing)
        for pair in streams:
            for end in pair:
                end.close_write()
        assert _joined(reading) == [zlib.crc32(payload)] * 8
    print(f"\n{kind}: 128 MiB in {time.monotonic() - begun:.1f} s")


# --- a thousand streams at random ---


class Meeting:
    """One stream whose two ends send, half-close and give up as a seed says."""

    def __init__(self, seed: int, near: Any) -> None:
        self.rng = random.Random(seed)
        self.near = near
        #: What each end will send, unless it gives up before its end.
        self.payloads = [self.rng.randbytes(int(2 ** self.rng.uniform(0, 17))) for _ in range(2)]
        #: The end that resets, if one does.
        self.quitter = self.rng.choice((None, None, None, 0, 1))
        self.received = [b"", b""]
        #: The end of each direction as its reader saw it.
        self.saw_eof = [False, False]

    def run(self, end: int, stream: Any) -> None:
        reading = gevent.spawn(self._read, end, stream)
        try:
            self._write(end, stream)
        except StreamReset:
            assert self.quitter is not None
        reading.get(timeout=PATIENCE)
        stream.close()

    def _write(self, end: int, stream: Any) -> None:
        payload = self.payloads[end]
        stop = self.rng.randrange(len(payload)) if self.quitter == end else len(payload)
        position = 0
        while position < stop:
            size = min(stop - position, int(2 ** self.rng.uniform(0, 16)))
            stream.sendall(payload[position : position + size])
            position += size
        if self.quitter == end:
            # A stream that is reset before its accept would never be seen there.
            stream.wait_established(PATIENCE)
            stream.reset(99)
        else:
            stream.close_write()

    def _read(self, end: int, stream: Any) -> None:
        pieces = []
        try:
            while data := stream.recv(int(2 ** self.rng.uniform(0, 16)) + 1):
                pieces.append(data)
            self.saw_eof[end] = True
        except StreamReset as error:
            assert self.quitter is not None
            assert error.remote == (self.quitter != end)
            assert error.code == 99
        self.received[end] = b"".join(pieces)

    def check(self) -> None:
        for end in range(2):
            expected = self.payloads[1 - end]
            if self.saw_eof[end]:
                assert self.received[end] == expected
                assert self.quitter != 1 - end, "an EOF of a stream that was given up"
            else:
                assert self.quitter is not None
                assert expected.startswith(self.received[end])


def _meet_all(opener: Any, acceptor: Any, numbers: range) -> None:
    meetings: dict[int, Meeting] = {}
    running: list[gevent.Greenlet] = []

    def serve() -> None:
        for _ in numbers:
            stream = acceptor.accept(timeout=PATIENCE)
            running.append(gevent.spawn(meetings[stream.stream_id].run, 1, stream))

    serving = gevent.spawn(serve)
    # No more of them at once than the peer has places for.
    for number in numbers:
        stream = opener.open(timeout=PATIENCE)
        meetings[stream.stream_id] = meeting = Meeting(SEED + number, stream)
        running.append(gevent.spawn(meeting.run, 0, stream))
    serving.get(timeout=PATIENCE)
    _joined(running)
    assert len(meetings) == len(numbers)
    for meeting in meetings.values():
        meeting.check()


@pytest.mark.slow
@pytest.mark.timeout(80)
@pytest.mark.parametrize("kind", ["sockets", "objects", "tls"])
def test_a_thousand_streams_with_random_ends_are_exact_both_ways(kind: str) -> None:
    with cut_sessions(kind, SEED) as (client, server, taps):
        _joined(
            [
                gevent.spawn(_meet_all, client, server, range(500)),
                gevent.spawn(_meet_all, server, client, range(500, 1000)),
            ],
            70.0,
        )
        assert client.ping(PATIENCE)
        for session in (client, server):
            stats = session.stats()
            assert (stats.opened, stats.incoming) == (500, 500)
            assert (stats.streams, stats.backlog, stats.unacknowledged, stats.unread, stats.queued) == (0, 0, 0, 0, 0)
        client.close()
        assert server.join(PATIENCE)
    for tap in taps:
        assert not tap.faults, tap.faults[:3]
        tap.audit.finish()


# --- what a stream costs ---

ROOMY = Config(accept_backlog=1 << 20, max_incoming_streams=None, keepalive_interval=None, accept_timeout=None)
BATCH = 200


def _resident() -> int:
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _memory() -> int:
    """Bytes in use: by Python's own account where it keeps one, else those of the process."""
    settle()
    gc.collect()
    return tracemalloc.get_traced_memory()[0] if tracemalloc.is_tracing() else _resident()


def _receive_exactly(sock: Any, size: int) -> None:
    while size:
        data = sock.recv(size)
        assert data, "the connection ended"
        size -= len(data)


def _idle_clients(raw: Any, conn: Any, streams: list[Any]) -> Iterator[None]:
    """Streams opened here; the peer is played by hand, so that all memory is that of one side."""
    session = Client(conn, ROOMY)
    yield
    for start in range(0, len(streams), BATCH):
        for number in range(start, start + BATCH):
            streams[number] = session.open()
        _receive_exactly(raw, 12 * BATCH)
        raw.sendall(b"".join(b"\x00\x01\x00\x02" + (2 * n + 1).to_bytes(4, "big") + bytes(4) for n in _batch(start)))
    assert streams[-1].wait_established(PATIENCE)
    yield


def _idle_servers(raw: Any, conn: Any, streams: list[Any]) -> Iterator[None]:
    """The same for streams accepted here."""
    session = Server(conn, ROOMY)
    yield
    for start in range(0, len(streams), BATCH):
        raw.sendall(b"".join(b"\x00\x01\x00\x01" + (2 * n + 1).to_bytes(4, "big") + bytes(4) for n in _batch(start)))
        for number in range(start, start + BATCH):
            streams[number] = session.accept(PATIENCE)
        _receive_exactly(raw, 12 * BATCH)
    yield


def _batch(start: int) -> range:
    return range(start, start + BATCH)


def _use_once(raw: Any, streams: list[Any]) -> None:
    """A short message each way on every stream."""
    for start in range(0, len(streams), BATCH):
        ids = [streams[number].stream_id.to_bytes(4, "big") for number in _batch(start)]
        raw.sendall(b"".join(b"\x00\x00\x00\x00" + stream_id + b"\x00\x00\x00\x05hello" for stream_id in ids))
        for number in _batch(start):
            assert streams[number].read(5) == b"hello"
            streams[number].sendall(b"world")
        _receive_exactly(raw, 17 * BATCH)


def _idle(side: str, count: str, how: str) -> None:
    """Child: what an idle stream costs on one side, before and after it was used."""
    if how == "traced":
        tracemalloc.start()
    raw, conn = gsocket.socketpair()
    streams: list[Any] = [None] * int(count)
    steps = (_idle_clients if side == "client" else _idle_servers)(raw, conn, streams)
    next(steps)
    before = _memory()
    next(steps)
    unused = (_memory() - before) / len(streams)
    _use_once(raw, streams)
    used = (_memory() - before) / len(streams)
    print(f"unused={unused:.0f} used={used:.0f}")


@pytest.mark.slow
@pytest.mark.timeout(80)
@pytest.mark.parametrize("how", ["traced", "resident"])
@pytest.mark.parametrize("count", [10_000, 100_000])
@pytest.mark.parametrize("side", ["client", "server"])
def test_an_idle_stream_costs_at_most_350_bytes_used_or_not(side: str, count: int, how: str) -> None:
    report = _report_of("idle", side, str(count), how)
    assert 100 < report["unused"] <= 350
    assert 100 < report["used"] <= 350


def _many() -> None:
    """Child: 100,000 streams open at once, every one of which works."""
    count = 100_000
    client, server = geyamux.pair(ROOMY)
    accepting = gevent.spawn(lambda: [server.accept(PATIENCE) for _ in range(count)])
    before = _things()
    near = []
    for _ in range(count):
        near.append(client.open())
        if len(near) % BATCH == 0:
            gevent.sleep(0)
    far = accepting.get(timeout=60)
    more = [after - start for after, start in zip(_things(), before, strict=True)]
    assert client.num_streams == server.num_streams == count
    right = 0
    for start in range(0, count, BATCH):
        for number in _batch(start):
            near[number].sendall(b"%06d" % number)
        for number in _batch(start):
            far[number].sendall(far[number].read(6)[::-1])
        right += sum(near[number].read(6)[::-1] == b"%06d" % number for number in _batch(start))
    print(f"right={right} greenlets={more[0]} descriptors={more[1]} watchers={more[2]}")


def _things() -> tuple[int, int, int]:
    """Living greenlets but the one that accepts, open descriptors, active watchers."""
    settle()
    gc.collect()
    living = sum(isinstance(thing, greenlet.greenlet) and not thing.dead for thing in gc.get_objects())
    return living, len(os.listdir("/proc/self/fd")), gevent.get_hub().loop.activecnt


@pytest.mark.slow
@pytest.mark.timeout(80)
def test_a_hundred_thousand_streams_at_once_work_and_need_neither_greenlets_nor_descriptors() -> None:
    report = _report_of("many")
    assert report["right"] == 100_000
    # The one that accepted, and its time limit, are gone.
    assert report["greenlets"] <= 0
    assert report["descriptors"] == 0
    assert report["watchers"] <= 0


def _cost(already: str) -> None:
    """Child: microseconds to open, echo on and close a stream, with so many others open."""
    client, server = geyamux.pair(ROOMY)
    others: list[Any] = []
    while len(others) < 2 * int(already):
        others += (client.open(), server.accept(PATIENCE))
    gevent.spawn(_echo_all, server)
    best = float("inf")
    for _ in range(5):
        gc.collect()
        begun = time.perf_counter()
        for _ in range(1000):
            with client.open() as stream:
                stream.sendall(b"x" * 64)
                assert len(stream.read(64)) == 64
                stream.close_write()
                assert stream.read() == b""
        best = min(best, time.perf_counter() - begun)
    print(f"microseconds={best * 1e3:.1f}")


@pytest.mark.alone
@pytest.mark.slow
@pytest.mark.timeout(80)
def test_a_stream_costs_the_same_among_few_and_among_many() -> None:
    def measure() -> tuple[bool, str]:
        few, many = (_report_of("cost", count)["microseconds"] for count in ("100", "20000"))
        return many <= 1.5 * few, f"open, echo, close: {few:.0f} µs among 100, {many:.0f} µs among 20,000"

    _within(2, measure)


def _churn() -> None:
    """Child: what 90,000 streams leave behind, after the first 10,000."""
    client, server = geyamux.pair(ROOMY)
    gevent.spawn(_echo_all, server)
    begun = time.perf_counter()
    before = 0
    for number in range(100_000):
        if number == 10_000:
            before = _memory()
        with client.open() as stream:
            stream.sendall(b"hello")
            assert stream.read(5) == b"hello"
    seconds = time.perf_counter() - begun
    client.ping(PATIENCE)
    grown = (_memory() - before) / KIB
    print(f"grown={grown:.0f} seconds={seconds:.1f} streams={client.num_streams + server.num_streams}")


@pytest.mark.slow
@pytest.mark.timeout(85)
def test_a_hundred_thousand_streams_opened_and_closed_leave_memory_as_it_was() -> None:
    report = _report_of("churn")
    assert report["streams"] == 0
    assert report["grown"] <= 1024, "KiB"


CHILDREN: dict[str, Callable[..., None]] = {
    "peer": _serve_as_peer,
    "idle": _idle,
    "many": _many,
    "cost": _cost,
    "churn": _churn,
}

if __name__ == "__main__":
    CHILDREN[sys.argv[1]](*sys.argv[2:])
