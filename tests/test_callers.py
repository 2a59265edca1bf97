"""What callers do to a session: strike a call in its wait, fail in a handler, kill all greenlets, pull the socket away.

Every public method that waits is put into its wait, each in its own way, and then everything is done to it that a program
may do, carelessly or not. Afterwards the peer has got whole frames and exact bytes, the call works when it is made again,
and nobody is left in a line. Finalisers, threads, processes and signals have modules of their own in
``tests/callers``; which waits end how at the end of a session is in ``test_session_ends.py``.

Longer than other modules because all tests of one subject stand together, each short and by itself.
"""

from __future__ import annotations

import contextlib
import copy
import gc
import inspect
import os
import pickle
import random
import signal
import socket
import sys
import threading
from collections.abc import Callable
from typing import Any

import gevent
import gevent.pool
import gevent.server
import pytest
from gevent import socket as gsocket

import geyamux
from geyamux import (
    Client,
    Config,
    Listener,
    Server,
    SessionError,
    Stream,
    StreamError,
    TransportError,
    duplex,
)
from geyamux.waking import Waiter
from support.cutting import CutSocket, Tap
from support.facing import narrow_pair, outcome, start
from support.links import make_link, sessions
from support.rawpeer import RawPeer, settle
from support.wire import ACK, FIN, PING, SYN, WINDOW_UPDATE, data, go_away, ping, window_update

PATIENCE = 5.0
WINDOW = bytes(262_144)
CONFIG = Config(accept_backlog=6, max_outgoing_streams=40, outbox_limit=8192, keepalive_interval=None, close_timeout=1.0)


class WholeTap(Tap):
    """Judges, and cuts nothing."""

    def cut(self, size: int) -> int:
        return size

    def is_stubborn(self) -> bool:
        return False


class Stage:
    """A session whose peer the test plays, a bystander on it, and one call that will wait."""

    def __init__(self) -> None:
        #: Greenlets in lines of others, such as hubs that were destroyed.
        self.parked_before = parked()
        near, far = narrow_pair()
        sock = CutSocket(near.family, near.type, fileno=near.detach())
        self.tap = sock.tap = WholeTap(client=True, rng=random.Random(0))
        self.conn = sock
        self.session = Client(sock, CONFIG)
        self.peer = RawPeer(far)
        self.frames: list[Any] = []
        self.helpers: list[gevent.Greenlet] = []
        self.bystander = self.open()
        self.bystander.sendall(b"before")
        self.peer.expect_data(1, b"before")

    def open(self) -> Any:
        """A stream that the peer has acknowledged."""
        stream = self.session.open()
        self.peer.expect(WINDOW_UPDATE, SYN, stream.stream_id)
        self.peer.send(window_update(stream.stream_id, 0, ACK))
        settle()
        return stream

    def open_without_credit(self) -> Any:
        stream = self.open()
        writing = gevent.spawn(stream.sendall, WINDOW)
        self.peer.expect_data(stream.stream_id, WINDOW)
        writing.get(timeout=PATIENCE)
        return stream

    def help(self, function: Callable[..., Any], *args: Any) -> None:
        """Something that waits in the background, whatever becomes of it."""
        self.helpers.append(start(function, *args))

    def jam(self) -> None:
        """Let the connection take no more, and the outbox neither."""
        stream = self.open()
        self.help(stream.sendall, WINDOW)
        self.help(self.open_and_fill)

    def open_and_fill(self) -> None:
        stream = self.session.open()
        while self.session.stats().queued < CONFIG.outbox_limit:
            stream.sendall(bytes(4000))

    def drain(self) -> None:
        """From now on the peer takes everything, and answers pings."""
        self.helpers.append(gevent.spawn(self._drain))

    def _drain(self) -> None:
        while True:
            found = self.peer.next(60.0)
            self.frames.append(found)
            if (found.type, found.flags) == (PING, SYN):
                self.peer.send(ping(ACK, found.length))

    def check_bystander(self) -> None:
        """Bytes pass both ways, exact, and everything on the wire is whole."""
        self.peer.send(data(1, b"hello"))
        assert outcome(start(self.bystander.recv, 100)) == b"hello"
        assert not isinstance(outcome(start(self.bystander.sendall, b"after")), BaseException)
        assert outcome(start(self.session.ping, PATIENCE)) > 0
        settle()
        heard = b"".join(found.body for found in self.frames if (found.type, found.stream_id) == (0, 1))
        assert heard == b"after"
        assert not self.tap.faults

    def end(self) -> None:
        gevent.killall(self.helpers)
        self.session.abort()
        assert self.session.join(PATIENCE)
        self.peer.close()
        self.conn.close()


@pytest.fixture
def stage():
    stage = Stage()
    yield stage
    stage.end()


def parked() -> int:
    """How many greenlets stand in any line of any session."""
    return sum(1 for found in gc.get_objects() if type(found) in (Waiter, Stream) and found._greenlet is not None)


# --- every call that waits ---

#: A call that waits now, and what lets it go on once the peer takes everything.
Wait = tuple[Callable[[], Any], Callable[[], None]]


def reads(use: Callable[[Any], Any], body: bytes = b"ab\n", flags: int = 0) -> Callable[[Stage], Wait]:
    def prepare(stage: Stage) -> Wait:
        stream = stage.open()
        return lambda: use(stream), lambda: stage.peer.send(data(stream.stream_id, body, flags))

    return prepare


def writes(use: Callable[[Any], Any], credit: int = 200_000) -> Callable[[Stage], Wait]:
    def prepare(stage: Stage) -> Wait:
        stream = stage.open_without_credit()
        return lambda: use(stream), lambda: stage.peer.send(window_update(stream.stream_id, credit))

    return prepare


def jammed(use: Callable[[Stage, Any], Any]) -> Callable[[Stage], Wait]:
    def prepare(stage: Stage) -> Wait:
        stream = stage.open()
        stage.peer.send(window_update(2, 0, SYN))
        stage.jam()
        return lambda: use(stage, stream), lambda: None

    return prepare


def flushing(stage: Stage) -> Wait:
    stream, other = stage.open(), stage.open()
    stage.help(other.sendall, WINDOW)
    stream.sendall(b"behind all that")
    return stream.flush, lambda: None


def second_reader(stage: Stage) -> Wait:
    stream = stage.open()
    stage.help(stream.read, 2)
    return lambda: stream.read(3), lambda: stage.peer.send(data(stream.stream_id, b"12345"))


def second_writer(stage: Stage) -> Wait:
    stream = stage.open_without_credit()
    stage.help(stream.sendall, b"first")
    return lambda: stream.sendall(b"second"), lambda: stage.peer.send(window_update(stream.stream_id, 100))


def through_file(mode: str, use: Callable[[Any], Any], **options: Any) -> Callable[[Stage], Wait]:
    def prepare(stage: Stage) -> Wait:
        stream = stage.open_without_credit() if "w" in mode else stage.open()
        file = stream.makefile(mode, **options)

        def release() -> None:
            credit = window_update(stream.stream_id, 200_000)
            stage.peer.send(credit if "w" in mode else data(stream.stream_id, b"ab\n"))

        return lambda: use(file), release

    return prepare


def write_and_flush(file: Any) -> None:
    file.write(b"abc")
    file.flush()


def establishing(stage: Stage) -> Wait:
    stream = stage.session.open()
    return stream.wait_established, lambda: stage.peer.send(window_update(stream.stream_id, 0, ACK))


def backlogged(stage: Stage) -> Wait:
    streams = [stage.session.open() for _ in range(CONFIG.accept_backlog)]

    def release() -> None:
        for stream in streams:
            stage.peer.send(window_update(stream.stream_id, 0, ACK))

    return lambda: stage.session.open(None), release


def too_many(stage: Stage) -> Wait:
    opened = [stage.open() for _ in range(CONFIG.max_outgoing_streams - 1)]
    return lambda: stage.session.open(None), opened[0].reset


def in_session(use: Callable[[Any], Any], wire: bytes = b"") -> Callable[[Stage], Wait]:
    return lambda stage: (lambda: use(stage.session), lambda: stage.peer.send(wire))


WAITS: dict[str, Callable[[Stage], Wait]] = {
    "Stream.recv": reads(lambda s: s.recv(3)),
    "Stream.recv, peeking": reads(lambda s: s.recv(3, socket.MSG_PEEK)),
    "Stream.recv_into": reads(lambda s: s.recv_into(bytearray(3))),
    "Stream.recvfrom": reads(lambda s: s.recvfrom(3)),
    "Stream.read": reads(lambda s: s.read(), flags=FIN),
    "Stream.read, some": reads(lambda s: s.read(3)),
    "Stream.read1": reads(lambda s: s.read1()),
    "Stream.readinto": reads(lambda s: s.readinto(bytearray(3))),
    "Stream.readinto1": reads(lambda s: s.readinto1(bytearray(3))),
    "Stream.peek": reads(lambda s: s.peek()),
    "Stream.readline": reads(lambda s: s.readline()),
    "Stream.readlines": reads(lambda s: s.readlines(), flags=FIN),
    "Stream.__next__": reads(next),
    "Stream.read, second in line": second_reader,
    "Stream.rawlink": reads(lambda s: gevent.wait([s])),
    "Stream.send": writes(lambda s: s.send(b"x")),
    "Stream.sendall": writes(lambda s: s.sendall(b"x")),
    "Stream.sendall, much": writes(lambda s: s.sendall(bytes(100_000))),
    "Stream.write": writes(lambda s: s.write(b"x")),
    "Stream.writelines": writes(lambda s: s.writelines([b"x", b"y"])),
    "Stream.sendall, second in line": second_writer,
    "Stream.sendall, jammed": jammed(lambda _, s: s.sendall(b"x")),
    "Stream.sendall, much, jammed": jammed(lambda _, s: s.sendall(bytes(100_000))),
    "Stream.flush": flushing,
    "Stream.wait_established": establishing,
    "file read": through_file("rb", lambda f: f.read(3)),
    "file readline": through_file("r", lambda f: f.readline()),
    "raw file readinto": through_file("rb", lambda f: f.readinto(bytearray(3)), buffering=0),
    "raw file write": through_file("wb", lambda f: f.write(b"abc"), buffering=0),
    "file flush": through_file("wb", write_and_flush),
    "Session.open": backlogged,
    "Session.open, too many": too_many,
    "Session.open, jammed": jammed(lambda stage, _: stage.session.open(None)),
    "Session.accept": in_session(lambda s: s.accept(), window_update(2, 0, SYN)),
    "Session.accept, jammed": jammed(lambda stage, _: stage.session.accept()),
    "Session.__iter__": in_session(lambda s: next(iter(s)), window_update(2, 0, SYN)),
    "Session.ping": in_session(lambda s: s.ping(None)),
    "Listener.accept": in_session(lambda s: s.listener().accept(), window_update(2, 0, SYN)),
}
"""By the name of the method: a way into its wait. Those that end the session have tests of their own."""

ENDING = {
    "Session.join": lambda session: session.join(),
    "Session.wait_go_away": lambda session: session.wait_go_away(),
    "Stream.join": lambda session: session.open().join(),
    "Session.close": lambda session: session.close(),
    "Session.__exit__": lambda session: session.__exit__(None, None, None),
    "Session.rawlink": lambda session: gevent.wait([session]),
}

NEVER_WAIT = {
    "Stream": "__enter__ __exit__ __iter__ __del__ __reduce__ __repr__ close close_write detach dup fileno getblocking "
    "getpeername getsockname getsockopt gettimeout isatty makefile readable ready reset seekable setblocking setsockopt "
    "settimeout shutdown stats unlink writable",
    "Session": "__enter__ __reduce__ __repr__ abort getpeername getsockname go_away listener ready stats unlink",
    "Listener": "__enter__ __exit__ __repr__ close getsockname",
}
every_wait = pytest.mark.parametrize("name", WAITS)


def test_every_public_method_either_waits_in_these_tests_or_never_waits() -> None:
    covered = {name.partition(",")[0] for name in (*WAITS, *ENDING)}
    for kind in (geyamux.Session, Stream, Listener):
        own = {n for base in kind.__mro__ if base.__module__.startswith("geyamux") for n in vars(base)}
        names = {n for n in own if callable(inspect.getattr_static(kind, n)) and (n[0] != "_" or n.endswith("__"))}
        names -= {"__init__", "__class__"}
        never = set(NEVER_WAIT[kind.__name__].split())
        waits = {name.partition(".")[2] for name in covered if name.startswith(f"{kind.__name__}.")}
        assert names == never | waits, f"{kind.__name__}: {names ^ (never | waits)}"


STRIKES: dict[str, Callable[[Any], Any]] = {
    "kill": lambda victim: victim.kill(block=False),
    "KeyError": lambda victim: victim.kill(KeyError("foreign"), block=False),
    "SystemExit": lambda victim: victim.kill(SystemExit(3), block=False),
    "KeyboardInterrupt": lambda victim: victim.kill(KeyboardInterrupt, block=False),
    "raw throw": lambda victim: gevent.get_hub().loop.run_callback(victim.throw, KeyError("foreign")),
    "Timeout": lambda victim: victim.kill(gevent.Timeout(1), block=False),
    "two at once": lambda victim: [victim.kill(error, block=False) for error in (KeyError, gevent.GreenletExit)],
}


def begin(call: Callable[[], Any]) -> gevent.Greenlet:
    """As `start`, and whatever is raised is returned: a SystemExit must not end the test run."""

    def run() -> Any:
        try:
            return call()
        except BaseException as error:
            return error

    greenlet = gevent.spawn(run)
    settle()
    return greenlet


@every_wait
def test_a_call_struck_in_its_wait_leaves_everything_as_it_was(stage: Stage, name: str) -> None:
    call, release = WAITS[name](stage)
    settle()
    before = parked()
    for strike in STRIKES.values():
        victim = begin(call)
        assert not victim.ready(), f"it does not wait: {victim.value!r}"
        strike(victim)
        ended = outcome(victim)
        assert isinstance(ended, (gevent.GreenletExit, KeyError, SystemExit, KeyboardInterrupt, gevent.Timeout)), ended
        settle()
        assert parked() == before
    again = begin(call)
    release()
    stage.drain()
    assert not isinstance(again.get(timeout=PATIENCE), BaseException), again.value
    stage.check_bystander()


@pytest.mark.parametrize("strike", STRIKES.values(), ids=STRIKES)
@pytest.mark.parametrize("name", ENDING)
def test_one_that_waits_for_the_end_and_is_struck_keeps_nobody_from_it(stage: Stage, name: str, strike: Any) -> None:
    victim = begin(lambda: ENDING[name](stage.session))
    assert not victim.ready()
    strike(victim)
    assert isinstance(outcome(victim), BaseException)
    waiting = begin(stage.session.join)
    closing = begin(stage.session.close)
    stage.peer.close()
    assert outcome(waiting) is True and outcome(closing) is None
    assert stage.session.exception is None


@contextlib.contextmanager
def interrupts(after: float = 0.01):
    """A real SIGINT, sent by a real thread, while the loop sleeps."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    sender = threading.Timer(after, os.kill, (os.getpid(), signal.SIGINT))
    try:
        sender.start()
        yield
    finally:
        with contextlib.suppress(KeyboardInterrupt):  # one that came too late for what it was to interrupt
            sender.join()
        signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("name", [*WAITS, *ENDING])
def test_ctrl_c_in_the_main_greenlet_ends_the_call_and_nothing_else(stage: Stage, name: str) -> None:
    def release() -> None: ...

    if name in WAITS:
        call, release = WAITS[name](stage)
    else:
        call = lambda: ENDING[name](stage.session)  # noqa: E731  # as those of WAITS
    with pytest.raises(KeyboardInterrupt), interrupts():  # it may strike as soon as it is under way
        call()
    if name in ("Session.close", "Session.__exit__"):
        stage.drain()
        stage.peer.transport.shutdown(socket.SHUT_WR)
        assert stage.session.join(PATIENCE)
    else:
        release()
        stage.drain()
        stage.check_bystander()


def own_greenlets() -> list[gevent.Greenlet]:
    """Those that run a function of the package."""
    alive = [found for found in gc.get_objects() if isinstance(found, gevent.Greenlet) and not found.dead]
    return [
        found for found in alive if str(getattr(getattr(found, "_run", None), "__module__", "")).startswith("geyamux")
    ]


@pytest.mark.parametrize(
    ("name", "error"),
    [
        *((name, gevent.GreenletExit) for name in (*WAITS, *ENDING)),
        *(
            (name, error)
            for name in ("Stream.read", "Stream.flush", "Session.close")
            for error in (KeyError, MemoryError)
        ),
    ],
)
def test_when_the_sessions_own_greenlets_are_killed_who_waits_gets_the_reason(
    stage: Stage, name: str, error: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gevent.get_hub(), "NOT_ERROR", (Exception, gevent.GreenletExit))
    call = WAITS[name](stage)[0] if name in WAITS else lambda: ENDING[name](stage.session)
    victim = begin(call)
    assert not victim.ready()
    ours = own_greenlets()
    assert len(ours) >= 2
    for greenlet in ours:
        greenlet.kill(error, block=False)
    ended = outcome(victim)
    if name in WAITS and name != "Stream.rawlink" and not isinstance(ended, Stream):
        assert isinstance(ended, SessionError), ended
    else:
        assert not isinstance(ended, BaseException), ended
    assert stage.session.join(PATIENCE) and stage.session.closed
    with pytest.raises(SessionError):
        while True:  # what came before the end is still given out
            stage.session.accept()
    for use in (stage.session.open, stage.session.ping, stage.bystander.read):
        with pytest.raises(SessionError):
            use()


def test_when_every_greenlet_of_the_process_is_killed_again_and_again_nothing_hangs() -> None:
    for _ in range(20):
        with sessions("tcp", CONFIG, CONFIG) as (client, server):
            streams = [client.open() for _ in range(3)]
            victims = [begin(stream.read) for stream in streams]
            victims += [begin(lambda s=stream: s.sendall(WINDOW * 2)) for stream in streams]
            victims += [begin(call) for call in (client.ping, server.accept, server.join, client.close)]
            gc.collect()
            everyone = [found for found in gc.get_objects() if isinstance(found, gevent.Greenlet) and not found.dead]
            gevent.killall([greenlet for greenlet in everyone if greenlet is not gevent.getcurrent()], timeout=PATIENCE)
            assert all(victim.ready() for victim in victims)
            assert client.join(PATIENCE) and server.join(PATIENCE)


# --- closing under a waiter ---


def detach_and_speak(stage: Stage) -> None:
    # Nobody can see that the descriptor has gone before something is to be received.
    descriptor = stage.conn.detach()
    stage.peer.send(data(1, b"x"))
    settle()
    os.close(descriptor)


def steal_a_byte(stage: Stage) -> None:
    """Somebody else reads from the socket: the first byte of a header is gone, and nothing fits any more."""
    stage.peer.send(data(1, b"\x77" * 30))
    os.read(stage.conn.fileno(), 5)  # nobody else had a turn


def write_between(stage: Stage) -> None:
    """Somebody else writes to the socket: the peer, a real one, would say so."""
    with contextlib.suppress(BlockingIOError, BrokenPipeError):
        os.write(stage.conn.fileno(), b"GET / HTTP/1.1")
    stage.peer.send(go_away(1))


HARD_ENDS: dict[str, Callable[[Stage], Any]] = {
    "shutdown of the socket": lambda stage: stage.conn.shutdown(socket.SHUT_RDWR),
    "shutdown of its reading side": lambda stage: stage.conn.shutdown(socket.SHUT_RD),
    "detach": detach_and_speak,
    "a thief of bytes": steal_a_byte,
    "foreign bytes": write_between,
    "abort": lambda stage: stage.session.abort(),
    "close": lambda stage: stage.session.close(0.01),
    "close in the hub": lambda stage: gevent.get_hub().loop.run_callback(stage.session.close, 0.01),
    "abort in the middle of a close": lambda stage: (start(stage.session.close), stage.session.abort()),
}


@pytest.mark.parametrize("end", HARD_ENDS.values(), ids=HARD_ENDS)
@pytest.mark.parametrize("name", [*WAITS, *ENDING])
def test_whoever_waits_is_told_when_the_connection_is_ended_under_it(stage: Stage, name: str, end: Any) -> None:
    call = WAITS[name](stage)[0] if name in WAITS else lambda: ENDING[name](stage.session)
    victim = begin(call)
    assert not victim.ready()
    end(stage)
    settle()
    if name in ENDING:
        stage.peer.close()
    ended = outcome(victim)
    if name in WAITS and name != "Stream.rawlink" and not isinstance(ended, Stream):
        # An accept loop ends quietly where the end was in good order.
        is_end = isinstance(ended, StopIteration) and name == "Session.__iter__" and stage.session.exception is None
        assert isinstance(ended, (SessionError, StreamError)) or is_end, ended
    else:
        assert not isinstance(ended, BaseException), ended
    stage.peer.close()
    assert outcome(start(stage.session.join)) is True
    settle()
    assert parked() == stage.parked_before


@every_wait
def test_closing_the_socket_object_under_a_session_changes_nothing(stage: Stage, name: str) -> None:
    """The session holds it open, as gevent's servers close what their handlers leave behind."""
    call, release = WAITS[name](stage)
    victim = begin(call)
    stage.conn.close()
    settle()
    assert not victim.ready()
    release()
    stage.drain()
    assert not isinstance(victim.get(timeout=PATIENCE), BaseException), victim.value
    stage.check_bystander()


STREAM_ENDS: dict[str, Callable[[Any], None]] = {
    "close": lambda stream: stream.close(),
    "reset": lambda stream: stream.reset(5),
    "shutdown": lambda stream: stream.shutdown(socket.SHUT_RDWR),
    "leaving a with-block": lambda stream: stream.__exit__(None, None, None),
    "failing in a with-block": lambda stream: stream.__exit__(KeyError, KeyError(), None),
    "finaliser": lambda stream: stream.__del__(),
}


@pytest.mark.parametrize("end", STREAM_ENDS.values(), ids=STREAM_ENDS)
@pytest.mark.parametrize("name", [name for name in WAITS if name.startswith("Stream.")])
def test_whoever_waits_in_a_stream_is_told_when_it_is_ended_under_it(stage: Stage, name: str, end: Any) -> None:
    """Where it waits for the connection alone, what was accepted still goes, as long as nobody resets the stream."""
    call, _ = WAITS[name](stage)
    victim = begin(call)
    stream = next(s for s in stage.session._table.streams.values() if is_used_by(s, call))
    end(stream)
    is_reset = end in (STREAM_ENDS["reset"], STREAM_ENDS["failing in a with-block"])
    if name in ("Stream.flush", "Stream.sendall, much, jammed") and not is_reset:
        stage.drain()
        assert not isinstance(victim.get(timeout=PATIENCE), SessionError)
        return
    if name == "Stream.wait_established" and end is STREAM_ENDS["shutdown"]:
        stage.peer.send(window_update(stream.stream_id, 0, ACK))
    ended = outcome(victim)
    is_eof = end is STREAM_ENDS["shutdown"] and (isinstance(ended, StopIteration) or not isinstance(ended, BaseException))
    assert isinstance(ended, (StreamError, ValueError)) or is_eof or name == "Stream.rawlink", ended
    stage.drain()
    stage.check_bystander()


def is_used_by(stream: Any, call: Any) -> bool:
    """Whether it is the stream that the call was made for."""
    found: list[Any] = [call]
    for function in found:
        owner = getattr(function, "__self__", None)
        if owner is stream:
            return True
        cells = [cell.cell_contents for cell in getattr(function, "__closure__", None) or ()]
        if any(content is stream for content in cells):
            return True
    return False


# --- exceptions in handlers ---


class Boom(Exception):
    """What goes wrong in an application."""


@pytest.mark.parametrize("how", ["with", "bare", "generator", "contextlib"])
def test_a_handler_that_fails_ends_its_stream_alone(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gevent.get_hub(), "NOT_ERROR", (Boom, gevent.GreenletExit))

    def handle(stream: Any) -> None:
        if how == "bare":
            raise Boom
        if how == "generator":
            for _ in (line for line in stream):
                raise Boom
        with stream if how == "with" else contextlib.closing(stream):
            stream.sendall(b"half of the ans")
            raise Boom

    with sessions("socketpair") as (client, server):
        bystander, other = client.open(), server.accept(timeout=PATIENCE)
        for _ in range(50):
            stream = client.open()
            stream.sendall(b"a line\n")
            handler = gevent.spawn(handle, server.accept(timeout=PATIENCE))
            handler.join(PATIENCE)
            assert isinstance(handler.exception, Boom)
            if how == "with":
                with pytest.raises(geyamux.StreamReset):
                    stream.read()
            elif how == "contextlib":
                assert stream.read() == b"half of the ans"
            stream.reset()
        bystander.sendall(b"still here")
        assert other.recv(100) == b"still here"
        settle()
        assert client.num_streams == server.num_streams == 1


def test_a_server_whose_handlers_fail_serves_on_and_its_pool_does_not_run_dry(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(gevent.get_hub(), "NOT_ERROR", (Boom, gevent.GreenletExit))
    pool = gevent.pool.Pool(3)

    def handle(stream: Any) -> None:
        with stream:
            if stream.readline() == b"fail\n":
                raise Boom
            stream.sendall(b"served")

    def serve(conn: Any, _: Any) -> None:
        with Server(conn) as session:
            for stream in session:
                pool.spawn(handle, stream)

    server = gevent.server.StreamServer(("127.0.0.1", 0), serve)
    server.start()
    try:
        with geyamux.connect(server.address) as client:
            for number in range(30):
                with client.open() as stream:
                    stream.sendall(b"fail\n" if number % 2 else b"do\n")
                    if number % 2:
                        with pytest.raises(geyamux.StreamReset):
                            stream.read()
                    else:
                        assert stream.read() == b"served"
        assert pool.free_count() == 3
    finally:
        server.stop(timeout=0.1)


def test_a_server_that_is_stopped_kills_its_handlers_and_their_clients_learn_it() -> None:
    """`StreamServer.stop` kills the greenlets that hold the sessions: `with` closes, and nobody waits for ever."""
    serving: list[Any] = []

    def serve(conn: Any, _: Any) -> None:
        with Server(conn, Config(close_timeout=0.2)) as session:
            serving.append(session)
            for stream in session:
                stream.sendall(b"half")

    server = gevent.server.StreamServer(("127.0.0.1", 0), serve, spawn=gevent.pool.Pool(10))
    server.start()
    client = geyamux.connect(server.address)
    stream = client.open()
    assert stream.recv(4) == b"half"
    reading = start(stream.read)
    server.stop(timeout=0)
    assert isinstance(outcome(reading), (SessionError, geyamux.StreamReset))
    assert serving[0].join(PATIENCE) and client.join(PATIENCE)


# --- in callbacks, and in the middle of itself ---


IN_CALLBACKS: dict[str, Callable[[Any], Any]] = {
    "close": lambda stream: stream.close(),
    "reset": lambda stream: stream.reset(3),
    "abort": lambda stream: stream.session.abort(),
    "close of the session": lambda stream: stream.session.close(),
    "go_away": lambda stream: stream.session.go_away(),
    "open": lambda stream: stream.session.open().sendall(b"from the hub"),
    "read what is there": lambda stream: stream.recv(100),
    "shutdown": lambda stream: stream.shutdown(socket.SHUT_RDWR),
    "everything": lambda stream: (stream.recv(1), stream.reset(), stream.close(), stream.session.abort()),
    "a wait": lambda stream: stream.read(1_000_000),
    "an error": lambda stream: 1 // 0,
    "exit": lambda stream: (_ for _ in ()).throw(gevent.GreenletExit),
}


@pytest.mark.parametrize("act", IN_CALLBACKS.values(), ids=IN_CALLBACKS)
def test_a_callback_may_do_anything_and_those_behind_it_are_called(act: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        gevent.get_hub(), "NOT_ERROR", (ZeroDivisionError, gevent.GreenletExit, gevent.exceptions.BlockingSwitchOutError)
    )
    with sessions("socketpair", CONFIG) as (client, server), sessions("socketpair") as (other, far_other):
        near, far = client.open(), server.accept(timeout=PATIENCE)
        bystander, called = other.open(), []
        near.rawlink(act)
        near.rawlink(called.append)
        client.rawlink(called.append)
        far.sendall(b"news")
        settle()
        assert near in called
        server.abort()
        assert client.join(PATIENCE)
        settle()
        assert client in called
        bystander.sendall(b"x")
        assert far_other.accept(timeout=PATIENCE).recv(1) == b"x"


def test_a_callback_that_links_itself_anew_starves_nobody(pair: Any) -> None:
    client, server = pair
    near, far = client.open(), server.accept(timeout=PATIENCE)
    turns = []

    def again(stream: Any) -> None:
        turns.append(1)
        if len(turns) < 100_000:
            stream.rawlink(again)

    near.rawlink(again)
    far.sendall(b"never read")
    gevent.sleep(0.01)
    assert client.ping(PATIENCE) < 1
    near.unlink(again)
    near.close()


def test_callbacks_of_a_sessions_end_may_begin_the_next_session(pair: Any) -> None:
    client, server = pair
    begun: list[Any] = []
    client.rawlink(lambda session: begun.append(geyamux.pair()))
    client.rawlink(lambda session: session.close())
    client.rawlink(lambda session: session.rawlink(begun.append))
    server.abort()
    assert client.join(PATIENCE)
    settle()
    assert len(begun) == 2 and begun[1] is client
    assert begun[0][0].ping(PATIENCE) > 0
    for session in begun[0]:
        session.abort()


@pytest.mark.parametrize("first", ["close", "reset", "abort"])
def test_ending_a_stream_inside_its_own_with_block_is_fine(pair: Any, first: str) -> None:
    client, _ = pair
    with client.open() as stream, stream, stream.makefile("rb") as file:
        if first == "abort":
            client.abort()
        else:
            getattr(stream, first)()
        with contextlib.suppress(OSError, ValueError):
            stream.settimeout(0)
            file.read(1)  # the file keeps a closed stream open
    assert stream.closed


def test_ending_a_session_inside_its_own_with_block_and_from_its_own_streams_is_fine(pair: Any) -> None:
    client, _ = pair
    with client, client, client.open() as stream:
        client.go_away()
        client.close(0.1)
        client.abort()
        with pytest.raises(SessionError):
            stream.read()
    assert client.exception is None


# --- odd buffers and odd arguments ---


class Evil:
    """An iterable of pieces of which one fails to be made."""

    def __iter__(self):
        yield b"one"
        raise MemoryError


class Rude:
    """A number that does something else meanwhile."""

    def __init__(self, act: Callable[[], Any]) -> None:
        self.act = act

    def __index__(self) -> int:
        self.act()
        return 5

    def __float__(self) -> float:
        self.act()
        raise MemoryError


def test_what_fails_while_arguments_are_looked_at_changes_nothing(stage: Stage) -> None:
    stream = stage.open()
    locked = bytearray(10)
    for call in (
        lambda: stream.writelines(Evil()),
        lambda: stream.sendall(object()),
        lambda: stream.write("text"),
        lambda: stream.send(memoryview(bytes(100))[::2]),
        lambda: stream.recv_into(b"constant"),
        lambda: stream.recv_into(bytearray(1), 5),
        lambda: stream.settimeout(Rude(lambda: None)),
        lambda: stream.recv("many"),
        lambda: stream.shutdown("how"),
        lambda: stream.reset("code"),
        lambda: stage.session.open("soon"),
        lambda: stage.session.ping("soon"),
        lambda: stream.makefile("x"),
    ):
        ended = begin(call)
        settle()
        if not ended.ready():  # a timeout that makes no sense, of a call that had no need to wait
            ended.kill()
        else:
            assert isinstance(ended.value, (Exception, Stream)), ended.value
    with memoryview(locked):
        stream.sendall(locked)
    locked.append(1)
    stage.drain()
    stage.check_bystander()


@pytest.mark.parametrize("size", [10, 5000, 100_000, 400_000])
def test_memory_that_runs_out_inside_a_write_tears_no_frame(
    stage: Stage, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The copy of a frame can't be made: the caller hears it, the wire does not."""
    stream = stage.open()
    stage.drain()
    failing = [True]

    pack = duplex._pack

    def unlucky(*fields: Any) -> bytes:
        if failing and fields[1] == 0:
            failing.clear()
            raise MemoryError
        return pack(*fields)

    monkeypatch.setattr(duplex, "_pack", unlucky)
    with pytest.raises(MemoryError):
        stream.write(bytearray(size))
    with gevent.Timeout(PATIENCE):
        stream.write(bytes(min(size, 5000)))
    stage.check_bystander()


@pytest.mark.parametrize("depth", range(2, 60, 3))
def test_near_the_limit_of_recursion_a_call_fails_as_a_whole_or_works(stage: Stage, depth: int) -> None:
    """RecursionError at any depth of the package's own calls: no frame is torn, and the session does not hang."""
    stream = stage.open()
    stage.drain()

    def deep(left: int) -> None:
        if left:
            deep(left - 1)
        else:
            stream.sendall(b"0123456789" * 10)
            stream.sendall(b"0123456789" * 1000)
            stream.settimeout(0)
            with contextlib.suppress(BlockingIOError):
                stream.recv(10)

    def used() -> int:
        frame, count = sys._getframe(), 0
        while frame is not None:
            frame, count = frame.f_back, count + 1
        return count

    def run() -> str:
        limit = sys.getrecursionlimit()
        gc.disable()  # else finalisers of other tests' garbage would run so near the limit, and be reported
        try:
            sys.setrecursionlimit(used() + 100)
            deep(100 - depth)
        except (RecursionError, TransportError):
            return "too deep"
        finally:
            sys.setrecursionlimit(limit)
            gc.enable()
        return "fine"

    greenlet = gevent.spawn(run)
    assert greenlet.get(timeout=PATIENCE) in ("fine", "too deep")
    if stage.session.closed:
        assert isinstance(stage.session.exception, TransportError)
    else:
        stage.check_bystander()
    assert not stage.tap.faults


@pytest.mark.parametrize("dump", ["pickle", "copy", "deepcopy"])
@pytest.mark.parametrize("kind", ["session", "stream", "listener"])
def test_sessions_and_streams_can_be_neither_pickled_nor_copied(pair: Any, kind: str, dump: str) -> None:
    """A copy would be a second owner of one connection."""
    client, _ = pair
    thing = {"session": client, "stream": client.open(), "listener": client.listener()}[kind]
    use = {"pickle": pickle.dumps, "copy": copy.copy, "deepcopy": copy.deepcopy}[dump]
    if (kind, dump) == ("listener", "copy"):
        assert copy.copy(thing).family == thing.family  # it holds nothing but a reference
        return
    with pytest.raises(TypeError):
        use(thing)
    assert client.ping(PATIENCE) > 0


# --- connections that are none ---


def test_two_sessions_over_one_socket_are_refused_or_end_with_a_reason() -> None:
    """Two readers on one descriptor would each get half of the bytes."""
    with make_link("socketpair") as (near, far):
        first = Client(near, Config(close_timeout=0.2))
        try:
            second = Client(near, Config(close_timeout=0.2))
        except (TypeError, ValueError, OSError):
            pass
        else:
            second.abort()
            pytest.fail("a second session was made over the same socket")
        peer = RawPeer(far)
        stream = first.open()
        stream.sendall(b"unharmed")
        peer.expect(WINDOW_UPDATE, SYN, 1)
        peer.expect_data(1, b"unharmed")
        first.abort()


def of_no_use(kind: str) -> Any:
    """A socket that can't carry a session, and what is to be closed with it."""
    if kind == "datagrams":
        return gsocket.socket(gsocket.AF_INET, gsocket.SOCK_DGRAM)
    if kind == "datagrams of a pair":
        near, far = gsocket.socketpair(type=gsocket.SOCK_DGRAM)
        far.close()
        return near
    if kind == "packets":
        near, far = gsocket.socketpair(type=gsocket.SOCK_SEQPACKET)
        far.close()
        return near
    conn = gsocket.socket()
    if kind == "listening":
        conn.bind(("127.0.0.1", 0))
        conn.listen()
    elif kind == "closed":
        conn.close()
    elif kind == "detached":
        os.close(conn.detach())
    return conn


@pytest.mark.parametrize(
    "kind", ["unconnected", "listening", "closed", "detached", "datagrams", "datagrams of a pair", "packets"]
)
def test_a_socket_that_is_no_connection_is_refused_or_ends_at_once_with_a_reason(kind: str) -> None:
    conn = of_no_use(kind)
    try:
        session = Client(conn)
    except (OSError, TypeError, ValueError):
        conn.close()
        return
    try:
        assert session.join(1), f"a session over a socket that is {kind} waits for ever"
        assert isinstance(session.exception, TransportError)
        with pytest.raises(SessionError):
            session.open()
    finally:
        session.abort()
        conn.close()


@pytest.mark.parametrize("side", ["ours", "the peer's", "both"])
def test_a_socket_that_is_half_closed_already_ends_with_a_reason(side: str) -> None:
    near, far = gsocket.socketpair()
    if side != "the peer's":
        near.shutdown(socket.SHUT_WR)
    if side != "ours":
        far.shutdown(socket.SHUT_WR)
    session = Client(near)
    with pytest.raises(SessionError):
        stream = session.open()
        stream.sendall(b"x")
        stream.read()
    assert session.join(PATIENCE)
    near.close()
    far.close()


def test_bytes_that_come_before_the_session_are_its_first(pair: Any) -> None:
    near, far = gsocket.socketpair()
    far.sendall(window_update(1, 0, SYN) + data(1, b"early"))
    session = Server(near, initial=window_update(3, 0, SYN) + data(3, b"read by a parser"))
    assert session.accept(timeout=PATIENCE).recv(100) == b"read by a parser"
    assert session.accept(timeout=PATIENCE).recv(100) == b"early"
    session.abort()
    far.close()


def test_a_session_that_was_refused_leaves_the_socket_to_its_owner() -> None:
    for conn in (socket.socket(), object(), None, 5, b"", (1, 2), "host:1"):
        with pytest.raises(TypeError):
            Client(conn)
        if isinstance(conn, socket.socket):
            assert conn.fileno() >= 0
            conn.close()
