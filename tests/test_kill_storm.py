"""Thousands of kills and timeouts, at random points of every call that waits: frames stay whole, nothing leaks.

Two sessions are joined by connections that take and give a random part of what they are offered, sometimes nothing,
so that frames are cut everywhere. Victims make one call again and again until they are struck: by a kill, a foreign
exception, a `gevent.Timeout` or a time limit of the call itself. What both ends put on the wire is judged as it
passes. The bytes of every stream are accounted for: what a writer was promised arrives, once and in order; of a call
that was struck, a beginning arrives.

Longer than other modules because all tests of one subject stand together, each short and by itself.
"""

from __future__ import annotations

import contextlib
import gc
import hashlib
import random
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import gevent
import greenlet
import pytest
from gevent import socket as gsocket
from gevent.event import Event

from geyamux import Client, Config, Server, SessionError, StreamError
from support.cutting import CUTTERS, cut_sessions
from support.rawpeer import RawPeer, settle

SEED = 20_261_122
PATIENCE = 20.0
#: Streams under attack at once; the oldest is finished when there are more.
CROWD = 16
#: Greenlets that each drive one victim after the other.
WORKERS = 40
#: Each writing victim marks its bytes in their upper four bits, so a stream has as many of them.
TAGS = 16

CONFIG = Config(
    accept_backlog=24, outbox_limit=16384, keepalive_interval=None, stream_close_timeout=None, close_timeout=5.0
)


class Interrupt(Exception):
    """What somebody may throw into a greenlet."""


STRUCK = (gevent.GreenletExit, gevent.Timeout, Interrupt, TimeoutError)


def _patterns() -> list[bytes]:
    """For each tag the bytes that its victim writes, from the first on."""
    rng = random.Random(SEED)
    return [bytes(byte & 0x0F | tag << 4 for byte in rng.randbytes(1 << 18)) * 4 for tag in range(TAGS)]


PATTERNS = _patterns()
OTHER_TAGS = [bytes(byte for byte in range(256) if byte >> 4 != tag) for tag in range(TAGS)]


# --- streams under attack ---


class Run:
    """What one writing victim sent: so many bytes of its pattern certainly, so many at most."""

    def __init__(self, tag: int) -> None:
        self.tag = tag
        self.certain = 0
        self.possible = 0


class Lane:
    """One direction of a stream: who writes, who reads, and what both saw."""

    def __init__(self, writer: Any, reader: Any) -> None:
        self.writer = writer
        self.reader = reader
        self.runs: list[Run] = []
        self.read = bytearray()

    def new_run(self) -> Run:
        run = Run(len(self.runs))
        self.runs.append(run)
        return run

    def check(self, *, is_broken: bool) -> None:
        total = 0
        for run in self.runs:
            found = self.read.translate(None, OTHER_TAGS[run.tag])
            total += len(found)
            least = 0 if is_broken else run.certain
            assert least <= len(found) <= run.possible, (self.writer, run.tag, least, len(found), run.possible)
            assert PATTERNS[run.tag].startswith(found), (self.writer, run.tag)
        assert total == len(self.read), "bytes that nobody wrote"


class Pair:
    """Both ends of a stream under attack."""

    def __init__(self, near: Any, far: Any) -> None:
        self.ends = (near, far)
        self.lanes = (Lane(near, far), Lane(far, near))
        #: Victims at work on it.
        self.active = 0
        #: No new victims; it is finished when the last has gone.
        self.is_retired = False
        #: One side has given it up: errors are due.
        self.is_broken = False

    @property
    def is_used_up(self) -> bool:
        return any(len(lane.runs) >= TAGS for lane in self.lanes)


class Victim:
    """Makes one kind of call, over and over, until it is struck."""

    def __init__(self, storm: Storm, kind: str) -> None:
        self.storm = storm
        self.rng = storm.rng
        self.kind = kind
        #: The call it is in.
        self.doing: str | None = None
        self.pair: Pair | None = None

    def run(self, seconds: float | None) -> None:
        try:
            with gevent.Timeout(seconds) if seconds is not None else contextlib.nullcontext():
                CALLS[self.kind](self)
        except STRUCK:
            if self.doing is not None:
                self.storm.landed[self.doing] += 1
        except (StreamError, ValueError) as error:
            if self.pair is None or not self.pair.is_broken:
                self.storm.failures.append(f"{self.doing}: {error!r}")
        except BaseException as error:
            self.storm.failures.append(f"{self.doing}: {error!r}")
        finally:
            if self.pair is not None:
                self.storm.leave(self.pair)

    def call(self, name: str, function: Callable[..., Any], *args: Any) -> Any:
        """One call that may be struck; between its return and ours nothing else runs."""
        self.doing = name
        result = function(*args)
        self.doing = None
        return result

    def lane(self) -> Lane | None:
        pair = self.pair = self.storm.enter()
        return None if pair is None else self.rng.choice(pair.lanes)

    # the calls

    def write(self, name: str, method: str, least: int, most: int) -> None:
        lane = self.lane()
        if lane is None or len(lane.runs) == TAGS:
            return
        run = lane.new_run()
        for _ in range(30):
            size = self.rng.randint(least, most)
            run.possible = run.certain + size
            if run.possible > len(PATTERNS[0]):
                run.possible = run.certain
                return
            data = PATTERNS[run.tag][run.certain : run.possible]
            try:
                sent = self.call(name, getattr(lane.writer, method), data)
            except TimeoutError as error:
                run.certain = run.possible = run.certain + error.bytes_sent  # type: ignore[attr-defined]
                raise
            run.certain += size if sent is None else sent
            run.possible = run.certain
            if name == "flush":
                self.call("flush", lane.writer.flush)

    def read(self, name: str, method: str, most: int) -> None:
        lane = self.lane()
        for _ in range(30 if lane is not None else 0):
            assert lane is not None
            size = self.rng.randint(1, most)
            data = self.call(name, getattr(lane.reader, method), size)
            assert 0 < len(data) <= size, f"{len(data)} of {size} bytes"
            lane.read += data

    def recv_into(self) -> None:
        lane = self.lane()
        for _ in range(30 if lane is not None else 0):
            assert lane is not None
            buffer = bytearray(self.rng.randint(1, 9000))
            size = self.call("recv_into", lane.reader.recv_into, buffer)
            assert size
            lane.read += buffer[:size]

    def open(self) -> None:
        for _ in range(5):
            session = self.rng.choice(self.storm.sessions)
            timeout = self.rng.choice((None, 0.003))
            self.storm.on_opened(self.call("open", session.open, timeout))

    def accept(self) -> None:
        for _ in range(5):
            session = self.rng.choice(self.storm.sessions)
            timeout = self.rng.choice((None, 0.003))
            self.storm.on_accepted(session, self.call("accept", session.accept, timeout))

    def ping(self) -> None:
        for _ in range(10):
            assert self.call("ping", self.rng.choice(self.storm.sessions).ping, None) >= 0

    def wait_established(self) -> None:
        session = self.rng.choice(self.storm.sessions)
        stream = self.call("open", session.open, None)
        self.storm.on_opened(stream)
        assert self.call("wait_established", stream.wait_established)


CALLS: dict[str, Callable[[Victim], None]] = {
    "sendall small": lambda victim: victim.write("sendall small", "sendall", 1, 4096),
    "sendall large": lambda victim: victim.write("sendall large", "sendall", 4097, 200_000),
    "send": lambda victim: victim.write("send", "send", 1, 100_000),
    "write": lambda victim: victim.write("write", "write", 1, 50_000),
    "flush": lambda victim: victim.write("flush", "sendall", 1, 3000),
    "recv": lambda victim: victim.read("recv", "recv", 9000),
    "read": lambda victim: victim.read("read", "read", 60_000),
    "readline": lambda victim: victim.read("readline", "readline", 30_000),
    "recv_into": Victim.recv_into,
    "open": Victim.open,
    "accept": Victim.accept,
    "ping": Victim.ping,
    "wait_established": Victim.wait_established,
}


#: Calls of streams twice: they wait less often than those of sessions.
CALLS_IN_TURN = [*CALLS, *(name for name in CALLS if name not in ("open", "accept", "ping"))]


class Storm:
    """Two sessions, their streams under attack, and the accounts of both."""

    def __init__(self, client: Client, server: Server, seed: int) -> None:
        self.rng = random.Random(seed)
        self.sessions = (client, server)
        #: Strikes that met a call inside a wait.
        self.landed: Counter[str] = Counter()
        self.failures: list[str] = []
        #: Opened, and not seen by an acceptor yet.
        self.opened: dict[int, Any] = {}
        self.pairs: list[Pair] = []
        self.finishers: list[gevent.Greenlet] = []
        self.finished = 0

    # what victims tell

    def on_opened(self, stream: Any) -> None:
        stream.settimeout(self.rng.choice((None, None, 0.004, 0.02)))
        self.opened[stream.stream_id] = stream

    def on_accepted(self, session: Any, stream: Any) -> None:
        stream.settimeout(self.rng.choice((None, None, 0.004, 0.02)))
        self.pairs.append(Pair(self.opened.pop(stream.stream_id), stream))
        if len(self.pairs) > CROWD:
            self.retire(self.pairs[0])

    def enter(self) -> Pair | None:
        """A stream for one more victim, if there is one."""
        if not self.pairs:
            return None
        pair = self.rng.choice(self.pairs)
        pair.active += 1
        return pair

    def leave(self, pair: Pair) -> None:
        pair.active -= 1
        if pair.is_retired:
            if not pair.active:
                self.finishers.append(gevent.spawn(self._finish, pair))
        elif pair.is_used_up:
            self.retire(pair)

    def retire(self, pair: Pair) -> None:
        """No new victims. A third of the streams is given up by one side, with victims still inside."""
        self.pairs.remove(pair)
        pair.is_retired = True
        if self.rng.random() < 0.3:
            pair.is_broken = True
            self.rng.choice(pair.ends).reset(7)
        if not pair.active:
            self.finishers.append(gevent.spawn(self._finish, pair))

    def _finish(self, pair: Pair) -> None:
        """In peace: end both directions, read what is left, and settle the accounts."""
        for end in pair.ends:
            end.settimeout(None)
        if not pair.is_broken:
            self._check_credit(pair)
            for end in pair.ends:
                end.close_write()
        readers = [gevent.spawn(self._read_rest, lane) for lane in pair.lanes]
        gevent.joinall(readers, timeout=PATIENCE, raise_error=True)
        assert all(reader.ready() for reader in readers), f"{pair.ends} did not come to their ends"
        for lane in pair.lanes:
            lane.check(is_broken=pair.is_broken)
        for end in pair.ends:
            end.close()
        self.finished += 1

    def _check_credit(self, pair: Pair) -> None:
        """Once nothing is under way, what one end may send is what the other lets it."""
        for end in pair.ends:
            end.flush()
        # Others share a ping: only one that began after this one is surely behind all that was flushed.
        for _ in range(3):
            for session in self.sessions:
                session.ping(PATIENCE)
        for lane in pair.lanes:
            credit, window = lane.writer.stats().send_credit, lane.reader.stats().receive_window
            assert credit == window, (lane.writer, credit, window)

    def _read_rest(self, lane: Lane) -> None:
        try:
            while data := lane.reader.recv(65536):
                lane.read += data
        except StreamError:
            pass  # of a broken pair; of another the accounts would not balance

    # the storm

    def rage(self, strikes: int) -> None:
        workers = [gevent.spawn(self._strike_until, strikes) for _ in range(WORKERS)]
        gevent.joinall(workers, raise_error=True)

    def _strike_until(self, strikes: int) -> None:
        while self.landed.total() < strikes and not self.failures:
            victim = Victim(self, self.rng.choice(CALLS_IN_TURN))
            how = self.rng.choice(("kill", "throw", "timeout"))
            moment = self.rng.choice((0, 0.0005, 0.003, 0.01, 0.03))
            running = gevent.spawn(victim.run, moment or 0.0001 if how == "timeout" else None)
            if how != "timeout":
                for _ in range(self.rng.randint(1, 12)):
                    gevent.sleep(0)
                gevent.sleep(moment)
                running.kill(Interrupt if how == "throw" else gevent.GreenletExit, block=False)
            running.join()

    def calm(self) -> None:
        """Finish all streams that are left."""
        acceptors = [gevent.spawn(self._accept_rest, session) for session in self.sessions]
        with gevent.Timeout(PATIENCE, AssertionError(f"nobody accepted {self.opened}")):
            while self.opened and not self.failures:
                gevent.sleep(0.001)
        gevent.killall(acceptors)
        while self.pairs:
            self.retire(self.pairs[0])
        gevent.joinall(self.finishers, raise_error=True)

    def _accept_rest(self, session: Any) -> None:
        while True:
            self.on_accepted(session, session.accept())


class Bystander:
    """A stream that nobody strikes, busy all the time."""

    def __init__(self, opener: Any, acceptor: Any, rng: random.Random) -> None:
        self.rng = rng
        self.over = Event()
        self.writer = opener.open()
        self.reader = acceptor.accept(timeout=PATIENCE)
        self.total = 0
        self.sending = gevent.spawn(self._send)
        self.receiving = gevent.spawn(self._receive)

    def _send(self) -> bytes:
        digest = hashlib.sha256()
        with self.writer:
            # Paced, so that it lasts as long as the storm.
            while not self.over.wait(0.003):
                data = self.rng.randbytes(self.rng.randint(1, 20_000))
                digest.update(data)
                self.writer.sendall(data)
                self.total += len(data)
        return digest.digest()

    def _receive(self) -> bytes:
        digest = hashlib.sha256()
        with self.reader:
            while data := self.reader.recv(65536):
                digest.update(data)
        return digest.digest()

    def check(self) -> None:
        self.over.set()
        assert self.sending.get(timeout=PATIENCE) == self.receiving.get(timeout=PATIENCE)
        assert self.total > 0


# --- what must be gone afterwards ---


def _census() -> Counter[str]:
    """How many there are of everything that may leak."""
    probe = gevent.get_hub().loop.timer(1.0, ref=False)
    timers = type(probe)
    probe.close()  # libuv goes on using the memory of one that was only forgotten
    settle()
    gc.collect()
    found: Counter[str] = Counter()
    for thing in gc.get_objects():
        kind = type(thing)
        if str(kind.__module__).startswith("geyamux"):
            found[f"{kind.__module__}.{kind.__qualname__}"] += 1
        elif isinstance(thing, timers) and thing.active:
            found["active timer"] += 1
        elif isinstance(thing, gevent.Timeout):
            found["Timeout"] += 1
        elif isinstance(thing, greenlet.greenlet) and not thing.dead:
            found["greenlet"] += 1
    found["active watchers"] = gevent.get_hub().loop.activecnt
    return found


def _spare_buffers(*ends: Any) -> int:
    return sum(len(session._table.budget.spare) for session in ends)


def _check_nothing_is_held(session: Any) -> None:
    stats = session.stats()
    counts = (stats.streams, stats.backlog, stats.unacknowledged, stats.queued, stats.unread)
    assert counts == (0, 0, 0, 0, 0), stats
    assert session.num_streams == 0
    table, outbox = session._table, session._outbox
    assert (table.budget.unread, table.budget.grown, table._incoming, table._outgoing) == (0, 0, 0, 0)
    assert not (table._accepting or table._opening or table._closing)
    assert not (session._openers or session._acceptors or session._joiners)
    assert outbox.is_empty and not (outbox._room or outbox._enders or outbox.milestones), outbox
    assert session._liveness._current is None


def _storm(client: Client, server: Server, strikes: int) -> Counter[str]:
    """All of it; returns how many strikes met which call."""
    storm = Storm(client, server, SEED)
    bystanders = [Bystander(client, server, storm.rng) for _ in range(3)]
    bystanders += [Bystander(server, client, storm.rng) for _ in range(3)]
    storm.rage(strikes)
    assert not storm.failures, storm.failures[:5]
    storm.calm()
    for bystander in bystanders:
        bystander.check()
    assert not storm.failures, storm.failures[:5]
    assert storm.finished > 10
    assert not [name for name in CALLS if storm.landed[name] < strikes / 200], storm.landed
    settle()
    return storm.landed


@pytest.mark.slow
@pytest.mark.timeout(90)
@pytest.mark.parametrize(("kind", "strikes"), [("sockets", 10_000), ("objects", 10_000), ("tls", 10_000)])
def test_ten_thousand_strikes_tear_no_frame_and_leave_nothing_behind(kind: str, strikes: int) -> None:
    with cut_sessions(kind, SEED, CONFIG) as (client, server, taps):
        assert client.ping(PATIENCE) and server.ping(PATIENCE)
        before, spare_before = _census(), _spare_buffers(client, server)
        landed = _storm(client, server, strikes)
        _check_nothing_is_held(client)
        _check_nothing_is_held(server)
        after = _census()
        # A session has a clock and, for a while after it was busy, a watch on its connection.
        assert after.pop("active timer") <= before.pop("active timer") + 2
        # Nor is a buffer held by a stream: those that are there wait for the next stream.
        more = _spare_buffers(client, server) - spare_before
        assert after.pop("geyamux.flow.ReceiveBuffer", 0) == before.pop("geyamux.flow.ReceiveBuffer", 0) + more
        assert after == before

        assert client.ping(PATIENCE) and server.ping(PATIENCE)
        client.close()
        assert server.join(PATIENCE)
    for tap in taps:
        assert not tap.faults, tap.faults[:3]
        tap.audit.finish()
        assert tap.cuts > strikes / 10
    print(f"\n{kind}: {dict(landed)}, cuts {[tap.cuts for tap in taps]}, {client.stats()}")


# --- who stands behind a victim ---

#: A call that waits, and the frames of the peer that let it go on, once.
Scene = tuple[Callable[[], Any], bytes]


def _reading(client: Client, peer: RawPeer) -> Scene:
    stream = client.open()
    return lambda: stream.read(3), bytes.fromhex("00 00 0000 00000001 00000003") + b"abc"


def _writing(client: Client, peer: RawPeer) -> Scene:
    stream = client.open()
    writing = gevent.spawn(stream.sendall, bytes(262_144))
    peer.expect(0x1, 0x1, 1)
    peer.expect_data(1, bytes(262_144))
    writing.get(timeout=PATIENCE)
    return lambda: stream.send(b"x"), bytes.fromhex("00 01 0000 00000001 00000001")


def _opening(client: Client, peer: RawPeer) -> Scene:
    for _ in range(CONFIG.accept_backlog):
        client.open()
    return client.open, bytes.fromhex("00 01 0002 00000001 00000000")


def _accepting(client: Client, peer: RawPeer) -> Scene:
    return client.accept, bytes.fromhex("00 01 0001 00000002 00000000")


@pytest.mark.parametrize("scene", [_reading, _writing, _opening, _accepting])
def test_who_stands_behind_a_victim_gets_the_wake_up_that_the_victim_lost(scene: Callable[..., Scene]) -> None:
    near, far = gsocket.socketpair()
    with RawPeer(far) as peer, contextlib.closing(Client(near, CONFIG)) as client:
        call, frames = scene(client, peer)
        leading, following = gevent.spawn(call), gevent.spawn(call)
        settle()
        assert not leading.ready() and not following.ready()

        def strike() -> None:
            client.ping(PATIENCE)
            # Switches at once, and never back: the victim dies between its wake-up and its turn.
            leading.throw(gevent.GreenletExit)

        striking = gevent.spawn(strike)
        while (probe := peer.next()).type != 0x2:
            pass
        # In one piece: the wake-ups of the ping and of the call come in one turn, in this order.
        peer.send(bytes.fromhex("00 02 0002 00000000") + probe.length.to_bytes(4, "big") + frames)
        assert following.get(timeout=PATIENCE)
        assert isinstance(leading.value, gevent.GreenletExit)
        striking.kill()
        client.abort()


def test_a_killed_read_leaves_its_bytes_to_the_reader_behind_it() -> None:
    with cut_sessions("sockets", SEED, CONFIG) as (client, server, _):
        near, far = client.open(), server.accept(timeout=PATIENCE)
        leading, following = gevent.spawn(far.read, 50), gevent.spawn(far.read, 10)
        near.sendall(b"0123456789")
        settle()
        assert not leading.ready() and not following.ready()
        leading.kill()
        assert following.get(timeout=PATIENCE) == b"0123456789"


# --- the end of a session ---


def _read_and_close(stream: Any) -> bytes:
    with stream:
        return stream.read()


def _write_until_cut(stream: Any, size: int) -> None:
    with contextlib.suppress(SessionError, StreamError):
        stream.sendall(bytes(size))


def _close_under_fire(rng: random.Random, client: Client, server: Server) -> None:
    """Streams at work, then close() and join() in greenlets that get killed at any point of it."""
    promised = b"accepted before the close" * rng.randint(1, 3000)
    finished = client.open()
    reading = gevent.spawn(_read_and_close, server.accept(timeout=PATIENCE))
    finished.sendall(promised)
    finished.close_write()
    writing = gevent.spawn(_write_until_cut, client.open(), rng.randint(1, 600_000))
    waiting = [gevent.spawn(call) for call in (client.close, client.close, client.join, server.join)]
    for waiter in waiting:
        for _ in range(rng.randint(0, 6)):
            gevent.sleep(0)
        waiter.kill(block=False)
    gevent.joinall(waiting)
    begun = time.monotonic()
    client.close()
    assert server.join(PATIENCE)
    assert time.monotonic() - begun < CONFIG.close_timeout / 2, "nothing had to be waited for"
    assert reading.get(timeout=PATIENCE) == promised
    writing.get(timeout=PATIENCE)


@pytest.mark.slow
@pytest.mark.timeout(60)
@pytest.mark.parametrize("kind", CUTTERS)
def test_a_close_that_is_killed_goes_on_and_ends_the_session(kind: str) -> None:
    rng = random.Random(SEED)
    for number in range(200):
        with cut_sessions(kind, SEED + number, CONFIG) as (client, server, taps):
            _close_under_fire(rng, client, server)
            assert client.exception is None and server.exception is None
        for tap in taps:
            assert not tap.faults, (number, tap.faults[:3])
        taps[0].audit.finish()
