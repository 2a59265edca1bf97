"""Two ends that are joined: what one side says or suffers, the other hears.

The test holds the two outer ends, `x` and `y`; the splice joins the inner ones. Sockets are real connections on loopback.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import resource
import select
import ssl
import struct
import time
from collections.abc import Iterator
from typing import Any

import gevent
import gevent.event
import pytest
from gevent import socket as gsocket

from geyamux import Client, Config, KeepaliveTimeout, SessionError, Stream, StreamReset, splice
from geyamux.tunnel import Splice
from support.facing import facing, narrow_pair, outcome, start
from support.links import Link, make_link, sessions
from support.rawpeer import settle
from support.transports import FaultyTransport, memory_pair
from support.waiting import wait_for

#: A reset that passes on at once takes no longer than this, in seconds; on a busy machine.
PROMPT = 0.8

#: Ends that can say a reset, and those that join any two kinds of them.
BREAKABLE = ("tcp", "stream")
PAIRS = [(one, other) for one in BREAKABLE for other in BREAKABLE]
ANY_PAIRS = [*PAIRS, ("unix", "stream"), ("socketpair", "tcp"), ("memory", "stream"), ("tcp", "memory")]
TLS_PAIRS = [("tls13", "stream"), ("tcp", "tls12"), ("tls13", "tls13")]

of_each_pair = pytest.mark.parametrize("kinds", PAIRS, ids="-".join)
of_any_pair = pytest.mark.parametrize("kinds", ANY_PAIRS, ids="-".join)
of_tls_pairs = pytest.mark.parametrize("kinds", TLS_PAIRS, ids="-".join)
from_either_side = pytest.mark.parametrize("swap", [False, True], ids=["there", "back"])


class Joined:
    """Outer ends `x` and `y`, and the splice of the inner ones."""

    def __init__(self, left: Link, right: Link) -> None:
        self.x, self.y = left.a, right.b
        self.splice = Splice(left.b, right.a)
        self.call = start(self.splice.run)


@contextlib.contextmanager
def joined(kinds: tuple[str, str], swap: bool = False) -> Iterator[Joined]:
    """A splice at work; `swap` exchanges what the test calls x and y."""
    with make_link(kinds[0]) as left, make_link(kinds[1]) as right:
        both = Joined(left, right)
        if swap:
            both.x, both.y = both.y, both.x
        try:
            yield both
        finally:
            both.call.kill()


def tcp_pair(size: int | None = None) -> tuple[Any, Any]:
    """A connection; with buffers of about that size."""
    listener = gsocket.socket()
    if size is not None:
        listener.setsockopt(gsocket.SOL_SOCKET, gsocket.SO_RCVBUF, size)
    listener.bind(("127.0.0.1", 0))
    listener.listen(1)
    near = gsocket.socket()
    if size is not None:
        near.setsockopt(gsocket.SOL_SOCKET, gsocket.SO_SNDBUF, size)
    near.connect(listener.getsockname())
    far, _ = listener.accept()
    listener.close()
    return near, far


def read_all(end: Any) -> bytes:
    """All to the end of file."""
    pieces = []
    while piece := end.recv(65536):
        pieces.append(piece)
    return b"".join(pieces)


def read_to_the_error(end: Any) -> tuple[bytes, BaseException | None]:
    """All that comes, and what it ends with; None is an end of file."""
    pieces = []
    try:
        while piece := end.recv(65536):
            pieces.append(piece)
    except OSError as error:
        return b"".join(pieces), error
    return b"".join(pieces), None


def promptly(end: Any) -> tuple[bytes, BaseException | None]:
    with gevent.Timeout(PROMPT):
        return read_to_the_error(end)


def break_off(end: Any) -> None:
    """As one who is gone: a reset of the stream or of the connection."""
    if isinstance(end, Stream):
        end.reset()
    else:
        end.setsockopt(gsocket.SOL_SOCKET, gsocket.SO_LINGER, struct.pack("ii", 1, 0))
        end.close()


def shut(end: Any) -> None:
    end.shutdown(gsocket.SHUT_WR)


def block(end: Any, splicing: Splice) -> gevent.Greenlet[..., Any]:
    """Send without end, until nothing moves any more. The greenlet returns the error."""
    sender = start(lambda: [end.sendall(bytes(65536)) for _ in range(2000)])
    while True:
        before = splicing.sent + splicing.received
        gevent.sleep(0.02)
        if before and before == splicing.sent + splicing.received:
            assert not sender.ready()
            return sender


# --- bytes ---


@of_any_pair
def test_bytes_of_any_size_arrive_in_order_both_ways_and_are_counted(kinds):
    sizes = (1, 1000, 65536, 700_001)
    bodies = [os.urandom(size) for size in sizes]
    with joined(kinds) as both:

        def say(end: Any) -> None:
            for body in bodies:
                end.sendall(body)
            shut(end)

        readers = [start(read_all, end) for end in (both.x, both.y)]
        senders = [start(say, end) for end in (both.x, both.y)]
        whole = hashlib.sha256(b"".join(bodies)).digest()
        assert [hashlib.sha256(outcome(reader)).digest() for reader in readers] == [whole, whole]
        gevent.joinall(senders)
        assert outcome(both.call) == (sum(sizes), sum(sizes))
        assert both.splice.error is None


def test_counts_can_be_read_meanwhile():
    with joined(("tcp", "stream")) as both:
        both.x.sendall(b"12345")
        assert both.y.recv(10) == b"12345"
        both.y.sendall(b"123")
        assert both.x.recv(10) == b"123"
        wait_for(lambda: (both.splice.sent, both.splice.received) == (5, 3))
        assert "5 sent, 3 received" in repr(both.splice)
        assert 0 <= time.monotonic() - both.splice.began < 60


def test_a_buffer_of_one_byte_is_enough_and_of_none_is_refused():
    near, a = tcp_pair()
    b, far = tcp_pair()
    with pytest.raises(ValueError, match="bufsize"):
        splice(a, b, bufsize=0)
    call = start(splice, a, b, bufsize=1)
    near.sendall(b"slowly")
    shut(near)
    assert read_all(far) == b"slowly"
    far.close()
    assert outcome(call) == (6, 0)
    near.close()


# --- ends in good order ---


@of_any_pair
@from_either_side
def test_one_direction_ends_and_the_other_lives_on(kinds, swap):
    with joined(kinds, swap) as both:
        both.x.sendall(b"question")
        shut(both.x)
        assert read_all(both.y) == b"question"
        for part in (b"a long", b" answer"):
            gevent.sleep(0.06)  # the watch looks after x meanwhile
            both.y.sendall(part)
            assert both.x.recv(100) == part
        shut(both.y)
        assert both.x.recv(100) == b""
        assert sorted(outcome(both.call)) == [8, 13]


@of_any_pair
def test_both_sides_may_end_without_a_word(kinds):
    with joined(kinds) as both:
        shut(both.x)
        shut(both.y)
        assert (read_all(both.x), read_all(both.y)) == (b"", b"")
        assert outcome(both.call) == (0, 0)


@of_any_pair
def test_the_ends_are_closed_when_it_returns(kinds):
    with joined(kinds) as both:
        shut(both.x)
        shut(both.y)
        outcome(both.call)
        for end in (both.splice.a, both.splice.b):
            with pytest.raises((OSError, ValueError)):
                end.sendall(b"more")


def test_a_stream_that_ends_while_its_session_is_being_closed_has_not_broken():
    near, a = tcp_pair()
    with sessions() as (client, server):
        stream = client.open()
        accepted = server.accept()
        call = start(splice, a, stream)
        accepted.sendall(b"answer")
        shut(accepted)
        assert near.recv(10) == b"answer"
        assert near.recv(10) == b""
        gevent.sleep(0.15)  # the watch looks after the stream
        shut(near)
        closing = gevent.spawn(client.close)
        assert outcome(call) in [(0, 6)] or isinstance(outcome(call), SessionError)
        closing.join()
    near.close()


@pytest.mark.parametrize("kind", ["tcp", "unix"])
def test_a_timeout_that_a_socket_came_with_does_not_end_it(kind):
    with make_link(kind) as left, make_link("stream") as right:
        left.b.settimeout(0.01)
        right.a.settimeout(0.01)
        call = start(splice, left.b, right.a)
        gevent.sleep(0.05)
        assert not call.ready()
        left.a.sendall(b"late")
        assert right.b.recv(10) == b"late"
        shut(left.a)
        shut(right.b)
        assert outcome(call) == (4, 0)


# --- TLS ---


@of_tls_pairs
@from_either_side
def test_a_tls_socket_ends_in_good_order_with_what_it_is_joined_with(kinds, swap):
    with joined(kinds, swap) as both:
        for end in (both.x, both.y):
            if isinstance(end, gevent.ssl.SSLSocket):
                end.suppress_ragged_eofs = False
        both.x.sendall(b"hello")
        assert both.y.recv(10) == b"hello"
        both.y.sendall(b"and bye")
        assert both.x.recv(10) == b"and bye"
        ending = start(both.y.unwrap) if isinstance(both.y, gevent.ssl.SSLSocket) else start(both.y.close)
        # Strictly: without close_notify this would be an error.
        assert both.x.recv(10) == b""
        both.x.close()
        outcome(ending)
        assert sorted(outcome(both.call)) == [5, 7]


def test_large_bodies_go_through_tls_both_ways():
    body = os.urandom(1_500_000)
    with joined(("tls13", "tcp")) as both:
        senders = [start(end.sendall, body) for end in (both.x, both.y)]

        def read(end: Any) -> bytes:
            data = b""
            while len(data) < len(body):
                data += end.recv(1 << 20)
            return data

        readers = [start(read, end) for end in (both.x, both.y)]
        assert all(outcome(reader) == body for reader in readers)
        gevent.joinall(senders)


def test_a_tls_connection_that_ends_without_close_notify_is_a_break():
    with joined(("tls13", "stream")) as both:
        both.x.sendall(b"half a ")
        assert both.y.recv(10) == b"half a "
        both.x.close()  # Python's says nothing
        data, error = promptly(both.y)
        assert (data, type(error)) == (b"", StreamReset)
        # With what TLS 1.3 sends behind its handshake still unread, the system may make a reset of it.
        assert isinstance(outcome(both.call), (ssl.SSLError, ConnectionResetError))


@from_either_side
def test_a_reset_passes_through_tls(swap):
    with joined(("tls13", "stream"), swap) as both:
        both.x.sendall(b"hello")
        assert both.y.recv(10) == b"hello"
        break_off(both.x)
        if isinstance(both.y, gevent.ssl.SSLSocket):
            both.y.suppress_ragged_eofs = False
        data, error = promptly(both.y)
        assert data == b"" and isinstance(error, OSError)
        assert isinstance(outcome(both.call), OSError)


# --- what breaks ---


@of_each_pair
@from_either_side
@pytest.mark.parametrize("before", [b"", b"half a body"], ids=["before_the_first_byte", "after_some"])
def test_a_reset_on_one_side_resets_the_other_behind_what_came_before(kinds, swap, before):
    with joined(kinds, swap) as both:
        if before:
            both.x.sendall(before)
            settle()
        break_off(both.x)
        data, error = promptly(both.y)
        assert data == before
        assert isinstance(error, ConnectionResetError)
        assert isinstance(outcome(both.call), ConnectionResetError)
        assert both.splice.error is not None


@of_each_pair
@from_either_side
def test_a_reset_after_a_half_close_passes_on_while_the_other_side_is_silent(kinds, swap):
    with joined(kinds, swap) as both:
        both.x.sendall(b"question")
        shut(both.x)
        assert read_all(both.y) == b"question"
        break_off(both.x)
        with gevent.Timeout(PROMPT):
            error = outcome(both.call)
        assert isinstance(error, ConnectionResetError)
        with pytest.raises(OSError), gevent.Timeout(PROMPT):
            while True:
                both.y.sendall(b"answer")
                gevent.sleep(0.001)


def test_a_unix_peer_that_is_gone_after_its_half_close_is_noticed():
    with joined(("unix", "stream")) as both:
        shut(both.x)
        assert read_all(both.y) == b""
        both.x.close()
        with gevent.Timeout(PROMPT):
            assert isinstance(outcome(both.call), ConnectionResetError)
        settle()
        with pytest.raises(StreamReset):
            both.y.sendall(b"answer")


@from_either_side
def test_a_session_that_is_aborted_resets_the_connection_and_not_ends_it(swap):
    with joined(("stream", "tcp")) as both:
        both.x.sendall(b"half")
        assert both.y.recv(10) == b"half"
        (both.splice.a if swap else both.x).session.abort()
        data, error = promptly(both.y)
        assert (data, type(error)) == (b"", ConnectionResetError)
        # The peer's abort says so for each stream before it ends all.
        assert isinstance(outcome(both.call), SessionError if swap else StreamReset)


def test_a_session_that_is_aborted_after_a_half_close_is_the_reason_given():
    with joined(("stream", "tcp")) as both:
        shut(both.x)
        assert read_all(both.y) == b""
        both.splice.a.session.abort()
        with gevent.Timeout(PROMPT):
            assert isinstance(outcome(both.call), SessionError)
        settle()
        with pytest.raises(OSError):
            both.y.sendall(b"answer")


def test_a_session_that_dies_of_silence_resets_the_connection():
    config = Config(keepalive_interval=0.05, keepalive_timeout=0.05)
    near, a = tcp_pair()
    with facing(config=config) as (session, _):
        call = start(splice, a, session.open())
        data, error = promptly(near)
        assert (data, type(error)) == (b"", ConnectionResetError)
        assert isinstance(outcome(call), KeepaliveTimeout)
    near.close()


@of_each_pair
@from_either_side
def test_a_sink_that_is_reset_while_it_takes_nothing_resets_the_source(kinds, swap):
    with joined(kinds, swap) as both:
        sender = block(both.x, both.splice)
        break_off(both.y)
        with gevent.Timeout(PROMPT):
            assert isinstance(outcome(sender), OSError)
        assert isinstance(outcome(both.call), OSError)


@of_each_pair
def test_a_source_that_is_reset_while_the_sink_takes_nothing_is_noticed_behind_its_bytes(kinds):
    with joined(kinds) as both:
        sender = block(both.x, both.splice)
        sender.kill()
        break_off(both.x)
        settle()
        assert not both.call.ready()
        data, error = read_to_the_error(both.y)
        assert isinstance(error, ConnectionResetError)
        assert len(data) >= both.splice.sent > 0
        assert isinstance(outcome(both.call), ConnectionResetError)


@pytest.mark.parametrize("kind", ["tcp", "stream"])
def test_an_answer_that_was_given_before_the_break_arrives_though_a_write_fails_first(kind):
    # A server that refuses a body answers, and closes with the rest unread, which is a reset.
    with joined((kind, "tcp")) as both:
        # A write of its own that fails would take the error away from the read.
        block(both.x, both.splice).kill()
        both.y.sendall(b"413 too large")
        both.y.close()
        data, error = promptly(both.x)
        assert data == b"413 too large"
        assert isinstance(error, ConnectionResetError)
        assert isinstance(outcome(both.call), OSError)


def test_what_came_before_a_reset_leaves_before_the_connection_is_reset():
    # More than the receiver's system takes at once; the rest is still in the sender's when the stream breaks.
    far, b = tcp_pair(4096)
    with sessions() as (client, server):
        stream = client.open()
        accepted = server.accept()
        call = start(splice, accepted, b)
        stream.sendall(bytes(150_000))
        stream.flush()
        wait_for(lambda: len(_peek(far)) > 0)
        gevent.sleep(0.02)
        stream.reset()
        gevent.sleep(0.1)
        data, error = read_to_the_error(far)
        assert (len(data), type(error)) == (150_000, ConnectionResetError)
        assert isinstance(outcome(call), StreamReset)
    far.close()


def _peek(sock: Any) -> bytes:
    return sock.recv(1, gsocket.MSG_PEEK)


def test_who_reads_nothing_holds_up_a_reset_for_a_second_at_most():
    far, b = tcp_pair(4096)
    near, a = tcp_pair()
    call = start(splice, a, b)
    near.sendall(bytes(100_000))
    gevent.sleep(0.05)
    began = time.monotonic()
    break_off(near)
    assert isinstance(outcome(call), ConnectionResetError)
    assert time.monotonic() - began < 2.0
    far.close()


def test_an_end_of_file_after_the_break_is_no_end():
    # The half-closed side breaks while the other's last bytes have not left: its stream must be reset, not finished.
    link = make_link("socketpair")
    faulty = FaultyTransport(link.a)
    near, a = tcp_pair()
    with link:
        client = Client(faulty)
        stream = client.open()
        settle()
        faulty.stall("send")
        call = start(splice, a, stream)
        near.sendall(b"torn")
        settle()
        break_off(near)
        settle()
        call.kill()
        assert stream.stats().state == "RESET"
        client.abort()
        client.join()


@pytest.mark.parametrize("how", ["kill", "timeout", "cut"])
@of_each_pair
def test_who_is_interrupted_breaks_both_ends(kinds, how):
    with make_link(kinds[0]) as left, make_link(kinds[1]) as right:
        one = Splice(left.b, right.a)

        def run() -> Any:
            with gevent.Timeout(0.03 if how == "timeout" else None):
                return one.run()

        call = gevent.spawn(run)
        left.a.sendall(b"some")
        assert right.b.recv(10) == b"some"
        if how == "kill":
            call.kill(block=False)
        elif how == "cut":
            gevent.get_hub().loop.run_callback(one.cut)  # not even the hub has to wait
        for end in (left.a, right.b):
            data, error = promptly(end)
            assert (data, isinstance(error, ConnectionResetError)) == (b"", True)
        call.join(5)
        kind = {"kill": gevent.GreenletExit, "timeout": gevent.Timeout, "cut": ConnectionAbortedError}[how]
        assert isinstance(one.error, kind)
        if how != "kill":
            assert isinstance(call.exception, kind)


def test_a_cut_after_the_end_changes_nothing():
    with joined(("tcp", "tcp")) as both:
        shut(both.x)
        shut(both.y)
        outcome(both.call)
        both.splice.cut()
        assert both.splice.error is None


@from_either_side
def test_any_exception_breaks_both_ends_and_is_raised(swap):
    class Poor:
        def __init__(self) -> None:
            self.was_closed = False

        def recv(self, size: int) -> bytes:
            gevent.sleep(0.01)
            raise MemoryError

        def sendall(self, data: bytes) -> None: ...
        def shutdown(self, how: int) -> None: ...
        def close(self) -> None:
            self.was_closed = True

    near, a = tcp_pair()
    poor = Poor()
    call = start(splice, *((poor, a) if swap else (a, poor)))
    data, error = promptly(near)
    assert (data, type(error)) == (b"", ConnectionResetError)
    assert isinstance(outcome(call), MemoryError)
    assert poor.was_closed
    near.close()


def test_an_object_that_never_wakes_a_reader_when_it_is_closed_holds_nothing_up():
    class Deaf:
        def recv(self, size: int) -> bytes:
            gevent.event.Event().wait()
            return b""

        def sendall(self, data: bytes) -> None: ...
        def shutdown(self, how: int) -> None: ...
        def close(self) -> None: ...

    near, a = tcp_pair()
    call = start(splice, Deaf(), a)
    break_off(near)
    with gevent.Timeout(PROMPT):
        assert isinstance(outcome(call), ConnectionResetError)


def test_without_descriptors_for_the_watch_all_else_works(monkeypatch):
    def refuse() -> None:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    monkeypatch.setattr(select, "epoll", refuse)
    with joined(("tcp", "stream")) as both:
        shut(both.x)
        assert read_all(both.y) == b""
        gevent.sleep(0.15)
        both.y.sendall(b"answer")
        assert both.x.recv(10) == b"answer"
        shut(both.y)
        assert outcome(both.call) == (0, 6)


def test_ends_that_are_gone_before_it_begins_are_an_error():
    near, a = tcp_pair()
    b, far = tcp_pair()
    a.close()
    assert isinstance(outcome(start(splice, a, b)), OSError)
    assert isinstance(promptly(far)[1], ConnectionResetError)
    near.close()
    far.close()


# --- many, and much ---


def test_a_slow_reader_bounds_what_is_held_and_holds_up_nobody_else():
    with sessions() as (client, server):
        slow_near, slow_a = narrow_pair(65536)
        near, a = narrow_pair(65536)
        slow = Splice(slow_a, client.open())
        calls = [start(slow.run), start(splice, a, client.open())]
        accepted, other = server.accept(), server.accept()
        sender = block(slow_near, slow)
        # The peer's window, and one portion that waits.
        assert 0 < slow.sent <= 262144
        near.sendall(b"quick")
        assert other.recv(10) == b"quick"
        other.sendall(b"answer")
        assert near.recv(10) == b"answer"
        assert len(accepted.recv(65536)) == 65536
        sender.kill()
        for end in (slow_near, near):
            end.close()
        gevent.killall(calls)


def test_two_ends_that_never_wait_leave_timers_their_time():
    class Endless:
        def recv(self, size: int) -> bytes:
            return bytes(size)

        def sendall(self, data: bytes) -> None: ...
        def shutdown(self, how: int) -> None: ...
        def close(self) -> None: ...

    one = Splice(Endless(), Endless())
    late = []

    def tick() -> None:
        for _ in range(10):
            before = time.monotonic()
            gevent.sleep(0.005)
            late.append(time.monotonic() - before - 0.005)
        one.cut()

    gevent.spawn(tick)
    with pytest.raises(ConnectionAbortedError):
        one.run()
    assert sorted(late)[len(late) // 2] < 0.02
    assert one.sent > 0 and one.received > 0


@pytest.mark.timeout(60)
def test_a_thousand_at_once_leave_nothing_behind():
    count = 1000
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 8192), hard))
    descriptors = len(os.listdir("/proc/self/fd"))
    try:
        with sessions() as (client, server):
            # Of each three one ends in good order, one is reset, one is killed.
            near, calls, accepted = [], [], []
            accepting = start(lambda: [accepted.append(server.accept()) for _ in range(count)])
            for _ in range(count):
                outer, inner = gsocket.socketpair()
                near.append(outer)
                calls.append(start_quietly(splice, inner, client.open()))
            outcome(accepting)
            for number, end in enumerate(near):
                end.sendall(b"%d" % number)
            # Not necessarily in the order of opening.
            assert sorted(int(stream.recv(10)) for stream in accepted) == list(range(count))
            for stream in accepted:
                stream.sendall(b"answer")
                stream.close_write()
            assert all(read_all(end) == b"answer" for end in near)
            for end in near[::3]:
                end.close()
            for stream in accepted[1::3]:
                stream.reset()
            gevent.killall(calls[2::3])
            for end in near:
                end.close()
            gevent.joinall(calls)
            for stream in accepted:
                stream.close()
            wait_for(lambda: client.num_streams == server.num_streams == 0)
        wait_for(lambda: len(os.listdir("/proc/self/fd")) <= descriptors)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def start_quietly(function: Any, *args: Any) -> gevent.Greenlet[..., Any]:
    """Without a look around: a thousand of those take seconds."""

    def call() -> Any:
        try:
            return function(*args)
        except OSError as error:
            return error

    return gevent.spawn(call)


@of_each_pair
def test_it_always_ends_when_both_peers_vanish_at_any_moment(kinds):
    for turns in range(12):
        with joined(kinds) as both:
            both.x.sendall(b"question" * 1000)
            shut(both.y)
            for _ in range(turns):
                gevent.sleep(0)
            both.x.close()
            both.y.close()
            with gevent.Timeout(PROMPT * 2):
                outcome(both.call)


def test_memory_ends_join_too():
    near, a = memory_pair()
    b, far = memory_pair()
    call = start(splice, a, b)
    near.sendall(b"hello")
    assert far.recv(10) == b"hello"
    near.close()
    far.close()
    assert isinstance(outcome(call), (tuple, OSError))


def test_an_end_of_file_behind_a_failed_write_is_not_passed_on_as_one():
    class Gone:
        """As a socket whose write has taken the error away: what came is still read, and then an end."""

        def __init__(self) -> None:
            self._failed = gevent.event.Event()
            self._left = [b"", b"answer"]

        def recv(self, size: int) -> bytes:
            self._failed.wait()
            return self._left.pop()

        def sendall(self, data: bytes) -> None:
            self._failed.set()
            raise ConnectionResetError(errno.ECONNRESET, "gone")

        def shutdown(self, how: int) -> None: ...
        def close(self) -> None: ...

    with make_link("stream") as link:
        call = start(splice, link.b, Gone())
        link.a.sendall(b"question")
        data, error = promptly(link.a)
        assert (data, type(error)) == (b"answer", StreamReset)
        assert isinstance(outcome(call), ConnectionResetError)
