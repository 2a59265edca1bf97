"""Links that die: over real kernels, real processes and transports of every kind, with everyone waiting.

Whoever waits gets the reason within the configured time, what had come stays readable, truncation is never an EOF, and
nothing is left behind. How each single call ends is the subject of ``test_session_ends``; here it is how links die.
"""

from __future__ import annotations

import contextlib
import errno
import gc
import os
import resource
import signal
import socket
import ssl
import struct
import time
import weakref

import gevent
import pytest
from gevent import socket as gsocket

from faults.netns import Lab, missing
from faults.peer import KINDS as PROCESS_KINDS
from faults.peer import peer_process
from faults.relay import Relay
from faults.waiters import TOLERANCE, Cast, config
from geyamux import (
    Client,
    KeepaliveTimeout,
    Server,
    SessionClosed,
    SessionError,
    StreamReset,
    TransportError,
    WriteTimeout,
)
from support.facing import outcome, start
from support.links import KINDS, PATIENCE, authority, make_link, tls_contexts
from support.rawpeer import settle
from support.transports import FaultyTransport
from support.wire import FIN, SYN, data, ping, window_update

INTERVAL, SILENCE, STALL = 0.8, 0.4, 1.2
#: How long a silent peer is waited for: the ping, then the answer. The interval is shortened by up to a tenth.
PATIENT = INTERVAL + SILENCE
IMPATIENT = INTERVAL * 0.9 + SILENCE - 0.1


def listening(**changes):
    """Settings with which silence ends a session soon, and nothing else does."""
    return config(keepalive_interval=INTERVAL, keepalive_timeout=SILENCE, connection_write_timeout=None, **changes)


def writing(**changes):
    """Settings with which a connection that takes nothing ends a session soon, and nothing else does."""
    return config(keepalive_interval=None, connection_write_timeout=STALL, **changes)


class Party:
    """Sessions whose links die together, half of them with an outbox that is full."""

    def __init__(self):
        self.idle = {}
        self.clogged = {}
        self._sessions = []

    def join(self, name, conn, *, clogged, settings=None):
        session = Client(conn, settings or (writing() if clogged else listening()))
        self._sessions.append(session)
        (self.clogged if clogged else self.idle)[name] = Cast(session)
        # Its streams are known to the peer, which then has nothing to say any more.
        session.ping(PATIENCE)

    def start(self):
        """Everybody begins to wait, after the peer fell silent."""
        for cast in self.idle.values():
            cast.start()
        gevent.joinall([gevent.spawn(cast.clog) for cast in self.clogged.values()], raise_error=True)

    def check_silent(self, since, silencing=0.0):
        """Each ended by the limit that is its own. `since`: when the silence began, which took so long to make."""
        for name, cast in self.idle.items():
            took = cast.check(KeepaliveTimeout, since=since, within=PATIENT + silencing, not_before=IMPATIENT)
            print(f"{name}, idle: everyone told after {took:.2f} s of {PATIENT:.2f}")
        for name, cast in self.clogged.items():
            took = cast.check(WriteTimeout, since=cast.clogged_at, within=STALL, not_before=STALL - 0.1)
            print(f"{name}, full: everyone told after {took:.2f} s of {STALL:.2f}")

    def check_broken(self, since, cause=OSError):
        for name, cast in (self.idle | self.clogged).items():
            took = cast.check(TransportError, since=since, within=0.0, cause=cause)
            print(f"{name}: everyone told after {took:.3f} s")

    def close(self):
        for cast in (self.idle | self.clogged).values():
            cast.close()
        for session in self._sessions:
            session.abort()
            session.join(PATIENCE)
            with contextlib.suppress(OSError):
                session.conn.close()


@pytest.fixture
def party():
    everyone = Party()
    yield everyone
    everyone.close()


# --- processes that stop, and that die ---


def invite(party, peer, kinds, socket_of=lambda: None):
    for kind in kinds:
        for clogged in (False, True):
            party.join(kind, peer.connect(kind, socket_of(), buffers=16384 if clogged else None), clogged=clogged)


@pytest.mark.slow
def test_everyone_is_told_in_time_when_the_peer_process_is_stopped(party):
    with peer_process() as peer:
        invite(party, peer, PROCESS_KINDS)
        os.kill(peer.pid, signal.SIGSTOP)
        since = time.monotonic()
        party.start()
        party.check_silent(since)


@pytest.mark.slow
def test_a_peer_process_that_is_stopped_and_goes_on_in_time_is_forgiven(party):
    with peer_process() as peer:
        for kind in PROCESS_KINDS:
            party.join(kind, peer.connect(kind), clogged=False)
        os.kill(peer.pid, signal.SIGSTOP)
        pings = [start(cast.session.ping, None) for cast in party.idle.values()]
        gevent.sleep(INTERVAL + SILENCE / 2)
        os.kill(peer.pid, signal.SIGCONT)
        assert all(isinstance(outcome(call), float) for call in pings)
        gevent.sleep(SILENCE)
        assert not any(cast.session.closed for cast in party.idle.values())


@pytest.mark.slow
def test_everyone_is_told_at_once_when_the_peer_process_is_killed(party):
    with peer_process() as peer:
        for kind in PROCESS_KINDS:
            for clogged in (False, True):
                conn = peer.connect(kind, buffers=16384 if clogged else None)
                party.join(kind, conn, clogged=clogged, settings=config(connection_write_timeout=None))
        # Stopped first, so that pings are under way, which is also what makes of its end a reset.
        os.kill(peer.pid, signal.SIGSTOP)
        party.start()
        since = time.monotonic()
        peer.kill()
        party.check_broken(since)


# --- machines that are gone: a kernel of their own behind a wire ---


def power_failure(lab, peer):
    lab.drop_all()


def far_interface_down(lab, peer):
    lab.set_down("b")


def near_interface_down(lab, peer):
    lab.set_down("a")


def machine_removed(lab, peer):
    lab.cut()
    peer.kill()
    lab.remove("b")


@pytest.mark.slow
@pytest.mark.parametrize("die", [power_failure, far_interface_down, near_interface_down, machine_removed])
def test_everyone_is_told_in_time_when_the_machine_of_the_peer_is_gone(party, die):
    """Half-open: no FIN and no RST ever comes."""
    if reason := missing("iptables"):
        pytest.skip(reason)
    with Lab() as lab, peer_process(lab.address("b"), lab.command("b")) as peer:
        invite(party, peer, ("tcp", "tls"), lambda: lab.socket("a"))
        since = time.monotonic()
        die(lab, peer)
        silencing = time.monotonic() - since
        party.start()
        party.check_silent(since, silencing)


@pytest.mark.slow
def test_a_cut_wire_ends_nothing_that_has_no_limits(party):
    """With every limit off, waiting for ever is what was asked for; `close` is bounded all the same."""
    if reason := missing("iptables"):
        pytest.skip(reason)
    forever = config(keepalive_interval=None, connection_write_timeout=None, close_timeout=0.3)
    with Lab() as lab, peer_process(lab.address("b"), lab.command("b")) as peer:
        party.join("tcp", peer.connect("tcp", lab.socket("a")), clogged=False, settings=forever)
        cast = party.idle["tcp"]
        lab.drop_all()
        cast.start()
        gevent.sleep(PATIENT)
        assert not cast.results
        since = time.monotonic()
        cast.session.close()
        assert time.monotonic() - since < 0.3 + TOLERANCE
        settle()
        values = [value for _, value in cast.results.values()]
        assert len(values) == cast.count and all(value in (True, []) or type(value) is SessionClosed for value in values)


# --- in the middle of a connection: a box that goes silent ---


def through(relay, kind, settings):
    """A client through the relay and the server behind it, over TCP or TLS."""
    if kind == "tcp":
        return Client(relay.near, settings), Server(relay.far)
    near_context, far_context = tls_contexts(ssl.TLSVersion.TLSv1_3)
    accepting = gevent.spawn(far_context.wrap_socket, relay.far, server_side=True)
    near = near_context.wrap_socket(relay.near, server_hostname="localhost")
    return Client(near, settings), Server(accepting.get(timeout=PATIENCE))


@contextlib.contextmanager
def relayed(kind, settings, *, buffers=None):
    with Relay(buffers=buffers) as relay:
        client, server = through(relay, kind, settings)
        try:
            yield relay, client, server
        finally:
            for session in (client, server):
                session.abort()
                session.join(PATIENCE)
                session.conn.close()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["tcp", "tls"])
def test_everyone_is_told_in_time_when_a_middle_box_swallows_everything(kind):
    with relayed(kind, listening()) as (relay, client, _):
        cast = Cast(client)
        client.ping(PATIENCE)
        relay.swallow()
        since = time.monotonic()
        cast.start()
        cast.check(KeepaliveTimeout, since=since, within=PATIENT, not_before=IMPATIENT)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["tcp", "tls"])
def test_everyone_is_told_in_time_when_a_middle_box_takes_nothing(kind):
    with relayed(kind, writing(), buffers=16384) as (relay, client, _):
        cast = Cast(client)
        client.ping(PATIENCE)
        relay.stall()
        cast.clog()
        cast.check(WriteTimeout, since=cast.clogged_at, within=STALL, not_before=STALL - 0.1)


@pytest.mark.slow
def test_the_side_that_hears_nothing_gives_up_and_the_other_is_told():
    """One direction is lost: that our own bytes arrive proves nothing to us."""
    with relayed("tcp", listening()) as (relay, client, server):
        cast = Cast(client)
        ends = [server.accept(PATIENCE) for _ in range(8)]
        client.ping(PATIENCE)
        relay.back.swallows = True
        since = time.monotonic()
        cast.start()
        reading = start(ends[0].read)
        cast.check(KeepaliveTimeout, since=since, within=PATIENT, not_before=IMPATIENT)
        assert isinstance(outcome(reading), (SessionError, StreamReset))
        assert server.join(TOLERANCE)


# --- resets, over every kind of link that has them ---


def reset_socket(ours, theirs):
    theirs.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    theirs.close()


def close_unread(ours, theirs):
    """A Unix socket has no RST: closing it with bytes unread says the same."""
    theirs.close()


def reset_stream(ours, theirs):
    theirs.reset()


def break_object(ours, theirs):
    said = ping(SYN, 1)
    ours.break_after("recv", len(said), ConnectionResetError(errno.ECONNRESET, "the object broke"))
    theirs.sendall(said)


RESETS = {
    "tcp": reset_socket,
    "tls12": reset_socket,
    "tls13": reset_socket,
    "unix": close_unread,
    "stream": reset_stream,
    "memory": break_object,
}


class Drained:
    """A raw peer that reads and says nothing."""

    def __init__(self, transport):
        self.transport = transport
        self._reading = gevent.spawn(self._read)

    def _read(self):
        part = self.transport[0] if isinstance(self.transport, tuple) else self.transport
        with contextlib.suppress(OSError, ValueError):
            while (part.read if isinstance(self.transport, tuple) else part.recv)(1 << 16):
                pass

    def send(self, chunk):
        if isinstance(self.transport, tuple):
            rest = chunk
            while rest:
                rest = rest[self.transport[1].write(rest) :]
        else:
            self.transport.sendall(chunk)

    def stop(self):
        """Read no more."""
        self._reading.kill()

    def end(self):
        """The end without another word: a TLS connection says no close_notify."""
        if isinstance(self.transport, tuple):
            self.transport[1].close()
        elif hasattr(self.transport, "close_write"):
            self.transport.close_write()
        else:
            self.transport.shutdown(socket.SHUT_WR)


@contextlib.contextmanager
def drained(kind, settings=None, *, wrap=lambda end: end):
    with make_link(kind) as link:
        ours = wrap(link.a)
        session, peer = Client(ours, settings), Drained(link.b)
        try:
            yield session, peer
        finally:
            session.abort()
            session.join(PATIENCE)
            peer.stop()
            settle()


@pytest.mark.parametrize("kind", RESETS)
def test_everyone_is_told_at_once_when_the_link_is_reset(kind):
    wrap = FaultyTransport if kind == "memory" else lambda end: end
    with drained(kind, config(), wrap=wrap) as (session, peer):
        cast = Cast(session)
        peer.stop()
        cast.start()
        since = time.monotonic()
        RESETS[kind](session.conn, peer.transport)
        cast.check(TransportError, since=since, within=0.0, cause=ConnectionResetError)
        cast.close()


# --- cut, at every kind of place ---

FRAME = bytes.fromhex("0000 0000 00000001 00000010") + b"sixteen bytes it"
PLACES = [*range(1, 12), 12, 13, 20, 27]


@pytest.mark.parametrize("kind", KINDS)
def test_a_link_cut_at_any_place_in_a_frame_is_no_eof_and_loses_nothing_that_came(kind):
    for place in PLACES:
        with drained(kind) as (session, peer):
            stream, finished = session.open(), session.open()
            stream.sendall(b"x")
            finished.sendall(b"x")
            full = start(stream.read, 100)
            accepting, serving = start(session.accept), start(lambda session=session: list(session))
            peer.send(data(1, b"whole") + data(3, b"done") + window_update(3, 0, FIN) + FRAME[:place])
            peer.end()
            assert session.join(PATIENCE)
            came = b"whole" + FRAME[12:place]
            assert isinstance(outcome(full), TransportError), place
            assert isinstance(outcome(accepting), SessionClosed) and outcome(serving) == [], place
            assert stream.recv(100) == came, "what a read had collected is first in line again"
            for method in (stream.recv, stream.read, stream.readline):
                with pytest.raises(TransportError, match="inside a frame"):
                    method(1)
            assert finished.read() == b"done", "it had its FIN"


@pytest.mark.parametrize("kind", KINDS)
def test_a_link_cut_between_frames_is_no_eof_either(kind):
    with drained(kind, config()) as (session, peer):
        cast = Cast(session)
        peer.send(data(cast.idle.stream_id, b"whole"))
        settle()
        cast.start()
        since = time.monotonic()
        peer.end()
        gevent.sleep(0.01)
        assert cast.idle.recv(100) == b"whole"
        cast.check(SessionClosed, since=since, within=0.0)
        cast.close()


@pytest.mark.parametrize("place", [3, 12, 20])
@pytest.mark.parametrize("kind", KINDS)
def test_everyone_is_told_at_once_when_the_link_ends_inside_a_frame(kind, place):
    with drained(kind, config()) as (session, peer):
        cast = Cast(session)
        cast.start()
        since = time.monotonic()
        # Of a stream in which nobody waits: else its bytes would be read.
        peer.send(data(cast.idle.stream_id, b"sixteen bytes it")[:place])
        settle()
        peer.end()
        gevent.sleep(0.01)
        if place > 12:
            assert cast.idle.recv(100) == b"sixteen bytes it"[: place - 12]
        cast.check(TransportError, SessionClosed, since=since, within=0.0)
        cast.close()


@pytest.mark.parametrize("resets", [False, True], ids=["end", "reset"])
def test_a_tls_connection_cut_inside_a_record_is_no_eof_and_loses_nothing_that_came(resets):
    """The cut is below the encryption: in a record's header, its body, its tag, and behind it."""
    for place in (1, 4, 5, 6, 40, 75, 82):
        with Relay() as relay:
            near_context, far_context = tls_contexts(ssl.TLSVersion.TLSv1_3)
            accepting = gevent.spawn(far_context.wrap_socket, relay.far, server_side=True)
            near = near_context.wrap_socket(relay.near, server_hostname="localhost")
            far = accepting.get(timeout=PATIENCE)
            session = Client(near)
            stream = session.open()
            stream.sendall(b"x")
            far.sendall(data(1, b"first"))
            assert stream.peek() == b"first"
            reading, pinging = start(stream.read, 200), start(session.ping, None)
            relay.back.cut_after(place, resets=resets)
            far.sendall(data(1, b"second" * 8))
            error = outcome(reading)
            assert isinstance(error, (TransportError,) if resets else (TransportError, SessionClosed)), place
            assert isinstance(outcome(pinging), type(error)) or not resets, place
            # 5 bytes of header, 60 of ours, 1 of type, 16 of tag.
            came = b"first" + (b"second" * 8 if place >= 82 else b"")
            assert stream.recv(100) == came, place
            with pytest.raises(SessionError):
                stream.recv(1)
            assert session.join(PATIENCE)
            far.close()
            near.close()


# --- what a transport may come up with ---


class Odd(FaultyTransport):
    """A transport in memory whose calls do or return what they are told to, once told."""

    def __init__(self, inner):
        super().__init__(inner)
        self.odd = {}

    def go_mad(self, call, does):
        """From now on that call does this; the receiver is woken, so that it calls again."""
        self.odd[call] = does

    def recv(self, size):
        chunk = super().recv(size)
        return self.odd["recv"](chunk) if "recv" in self.odd else chunk

    def send(self, chunk):
        return self.odd["send"](chunk) if "send" in self.odd else super().send(chunk)

    def shutdown(self, how):
        return self.odd["shutdown"](how) if "shutdown" in self.odd else super().shutdown(how)

    def close(self):
        super().close()
        if "close" in self.odd:
            self.odd["close"](None)


class OddSocket(gsocket.socket):
    """The same with a descriptor."""

    def __init__(self, sock):
        super().__init__(sock.family, sock.type, fileno=sock.detach())
        self.odd = {}

    def go_mad(self, call, does):
        self.odd[call] = does

    def recv(self, *args):
        chunk = super().recv(*args)
        return self.odd["recv"](chunk) if "recv" in self.odd else chunk

    def send(self, chunk, *args):
        return self.odd["send"](chunk) if "send" in self.odd else super().send(chunk, *args)

    def sendmsg(self, chunks, *args):
        return self.odd["send"](b"".join(chunks)) if "send" in self.odd else super().sendmsg(chunks, *args)

    def shutdown(self, how):
        return self.odd["shutdown"](how) if "shutdown" in self.odd else super().shutdown(how)

    def close(self):
        super().close()
        if "close" in self.odd:
            self.odd["close"](None)


def raising(error):
    def call(chunk):
        raise error

    return call


def returning(value):
    return lambda chunk: value


RECEIVED = {
    "None": returning(None),
    "0": returning(0),
    "-1": returning(-1),
    "a text": returning("text of some length"),
    "a list": returning([1, 2]),
    "an object": returning(object()),
    "True": returning(True),
}
SENT = {
    "None": returning(None),
    "0": returning(0),
    "-1": returning(-1),
    "more than all": lambda chunk: len(chunk) + 1,
    "far more than all": returning(1 << 70),
    "a text": returning("12"),
    "a fraction": returning(1.5),
    "not a number": returning(float("nan")),
    "bytes": returning(b""),
}
RAISED = {
    "RuntimeError": RuntimeError("odd"),
    "KeyError": KeyError("odd"),
    "MemoryError": MemoryError("odd"),
    "gevent.Timeout": gevent.Timeout(None),
    "GreenletExit": gevent.GreenletExit("odd"),
    "OSError": OSError(errno.EIO, "odd"),
}
ODD = {"object": ("memory", Odd), "socket": ("tcp", OddSocket)}
both_ways_to_be_odd = pytest.mark.parametrize("odd", ODD)


@contextlib.contextmanager
def odd_session(odd, settings=None):
    kind, wrap = ODD[odd]
    with drained(kind, settings or config(), wrap=wrap) as (session, peer):
        try:
            yield session, peer
        finally:
            session.conn.odd.clear()


def everyone_told_of(session, peer, call, does, capfd):
    """Everyone waits while that call goes mad; all are told, and nothing is printed."""
    cast = Cast(session)
    cast.start()
    since = time.monotonic()
    session.conn.go_mad(call, does)
    # Bytes to receive, which also want an answer sent.
    peer.send(ping(SYN, 1))
    cast.check(TransportError, since=since, within=0.0)
    cast.close()
    assert capfd.readouterr().err == "", "nothing is printed: the error itself goes to everyone"


@both_ways_to_be_odd
@pytest.mark.parametrize("what", RECEIVED)
def test_everyone_is_told_when_recv_returns_nonsense(odd, what, capfd):
    with odd_session(odd) as (session, peer):
        everyone_told_of(session, peer, "recv", RECEIVED[what], capfd)
        assert "recv" in str(session.exception)


@both_ways_to_be_odd
@pytest.mark.parametrize("what", SENT)
def test_everyone_is_told_when_send_returns_nonsense(odd, what, capfd):
    with odd_session(odd) as (session, peer):
        everyone_told_of(session, peer, "send", SENT[what], capfd)
        assert "send" in str(session.exception)


@both_ways_to_be_odd
@pytest.mark.parametrize("call", ["recv", "send"])
@pytest.mark.parametrize("what", RAISED)
def test_everyone_is_told_when_a_call_raises_what_no_socket_raises(odd, call, what, capfd):
    with odd_session(odd) as (session, peer):
        everyone_told_of(session, peer, call, raising(RAISED[what]), capfd)
        if what != "GreenletExit":  # that is a kill, and told as one
            assert session.exception.__cause__ is RAISED[what]


@both_ways_to_be_odd
@pytest.mark.parametrize("what", RAISED)
def test_a_caller_that_sends_itself_gets_the_reason_and_nothing_odd(odd, what):
    """A large write is sent from inside the caller's call, where there is a descriptor."""
    with odd_session(odd) as (session, _):
        stream = session.open()
        settle()
        session.conn.go_mad("send", raising(RAISED[what]))
        # Who kills itself in its own call has asked for it.
        told = gevent.GreenletExit if what == "GreenletExit" and odd == "socket" else TransportError
        assert isinstance(outcome(start(stream.sendall, bytes(100_000))), told)
        assert session.join(PATIENCE)
        assert isinstance(session.exception, TransportError)


def test_an_interrupt_in_the_middle_of_a_send_goes_through_and_ends_the_session():
    """Nobody knows what has left: the session can't go on, and the interrupt is not ours to keep."""
    with odd_session("socket") as (session, _):
        stream = session.open()
        waiting = [start(stream.recv, 1), start(session.accept), start(session.ping, None)]
        session.conn.go_mad("send", raising(KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            stream.sendall(bytes(100_000))
        assert all(isinstance(outcome(call), TransportError) for call in waiting)
        assert session.join(PATIENCE)
        assert isinstance(session.exception.__cause__, KeyboardInterrupt)


@both_ways_to_be_odd
@pytest.mark.parametrize("call", ["close", "shutdown"])
@pytest.mark.parametrize("what", RAISED)
@pytest.mark.parametrize("how", ["close", "abort"])
def test_a_session_ends_in_time_though_letting_go_of_its_connection_raises(odd, call, what, how, capfd):
    with odd_session(odd, config(close_timeout=0.1)) as (session, _):
        waiting = [start(session.open().recv, 1), start(session.accept), start(session.ping, None)]
        session.conn.go_mad(call, raising(RAISED[what]))
        began = time.monotonic()
        with contextlib.suppress(gevent.GreenletExit):  # a kill goes through, to whom it was meant for
            getattr(session, how)()
        assert session.join(TOLERANCE)
        assert time.monotonic() - began < 0.1 + TOLERANCE
        assert all(isinstance(outcome(call), SessionClosed) for call in waiting)
        settle()
        assert capfd.readouterr().err == ""


def test_a_receive_that_gives_more_than_was_asked_for_loses_nothing():
    body = bytes(range(256)) * 700
    with odd_session("object") as (session, peer):
        stream = session.open()
        pieces = [data(1, body[:100_000]) + data(1, body[100_000:])[:5000], data(1, body[100_000:])[5000:] + FRAME[:12]]
        session.conn.go_mad("recv", lambda chunk: pieces.pop(0) if pieces else b"")
        peer.send(b"xx")
        peer.end()
        assert outcome(start(stream.read, len(body))) == body
        with pytest.raises(TransportError):
            stream.recv(1)


@pytest.mark.parametrize("call", ["recv", "send"])
def test_what_a_call_gives_after_the_end_is_taken_by_nobody(call, capfd):
    """It can't be interrupted, and returns long after the session has ended: with bytes, nonsense, or an error."""
    late_news = window_update(2, 0, SYN) + data(1, b"late")
    for late in (returning(late_news), returning(None), returning(1 << 40), raising(KeyError("late"))):
        mercy = gevent.event.Event()

        def call_late(chunk, mercy=mercy, late=late):
            while not mercy.is_set():
                with contextlib.suppress(BaseException):
                    mercy.wait()
            return late(chunk)

        with odd_session("object") as (session, peer):
            stream = session.open()
            settle()
            session.conn.go_mad(call, call_late)
            peer.send(ping(SYN, 1))
            settle()
            reading = start(stream.recv, 1)
            session.abort()
            assert isinstance(outcome(reading), SessionClosed)
            mercy.set()
            settle()
            assert session.exception is None and session.num_streams == 0
            for late_call in (session.accept, lambda stream=stream: stream.recv(1)):
                with pytest.raises(SessionClosed):
                    late_call()
    assert capfd.readouterr().err == ""


@pytest.mark.slow
@pytest.mark.parametrize("call", ["recv", "send"])
def test_everyone_is_told_in_time_when_a_call_never_returns(call):
    settings = listening() if call == "recv" else writing()
    with drained("memory", settings, wrap=FaultyTransport) as (session, _):
        cast = Cast(session)
        session.conn.stall(call)
        since = time.monotonic()
        cast.start()
        if call == "recv":
            cast.check(KeepaliveTimeout, since=since, within=PATIENT, not_before=IMPATIENT)
        else:
            cast.check(WriteTimeout, since=since, within=STALL, not_before=STALL / 2)
        cast.close()


def test_a_close_that_never_returns_keeps_nobody_waiting():
    mercy = gevent.event.Event()
    with odd_session("object") as (session, peer):
        cast = Cast(session)
        cast.start()
        session.conn.go_mad("close", lambda chunk: mercy.wait())
        since = time.monotonic()
        peer.end()
        cast.check(SessionClosed, since=since, within=0.0)
        cast.close()
        mercy.set()
        settle()


# --- nothing is left behind ---


def resident():
    """Bytes of memory that this process has."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


def die_once(kind, number):
    """A link on which much is under way dies in one of three ways; returns what must not live on."""
    settings = config(outbox_limit=65536)
    with drained(kind, settings) as (session, peer):
        cast = Cast(session)
        peer.send(data(cast.idle.stream_id, bytes(200_000)))
        cast.start()
        if number % 3 == 0 and kind in ("tcp", "tls13"):
            reset_socket(session.conn, peer.transport)
        else:
            peer.send(FRAME[: 5 + number % 20])
            peer.end()
        assert session.join(PATIENCE)
        cast.close()
        return [weakref.ref(session), weakref.ref(cast.idle), weakref.ref(cast.bulk)]


@pytest.mark.slow
@pytest.mark.timeout(90)
@pytest.mark.parametrize("kind", ["tcp", "tls13", "memory", "stream"])
def test_two_hundred_links_that_died_leave_no_memory_no_descriptor_and_no_session(kind):
    authority()
    for number in range(200):
        die_once(kind, number)
    gc.collect()
    before, descriptors = resident(), len(os.listdir("/proc/self/fd"))
    left = [ref for number in range(200) for ref in die_once(kind, number)]
    settle()
    gc.collect()
    grown = resident() - before
    print(f"\n{kind}: 200 links died, {grown / 1024:.0f} KiB more than before")
    assert [ref for ref in left if ref() is not None] == []
    assert len(os.listdir("/proc/self/fd")) == descriptors
    # Each held 200,000 unread bytes and eight streams; 200 of them would be 40 MB.
    assert grown < 3 << 20


def test_the_reason_of_a_death_can_be_kept_without_keeping_the_session():
    """A log that keeps the last thousand reasons must not keep a thousand sessions and what was unread in them."""
    reasons, sessions = [], []
    for _ in range(20):
        with drained("tcp") as (session, peer):
            stream = session.open()
            settle()
            peer.send(data(stream.stream_id, bytes(100_000)))
            peer.stop()
            settle()
            start(session.ping, None)
            reset_socket(session.conn, peer.transport)
            assert session.join(PATIENCE)
            reasons.append(session.exception)
            sessions.append(weakref.ref(session))
        del session, peer, stream
    settle()
    gc.collect()
    assert all(isinstance(reason, TransportError) for reason in reasons)
    assert [ref for ref in sessions if ref() is not None] == []
