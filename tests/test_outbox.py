"""The way out: the order of what leaves, when it leaves, what may be withdrawn, and what stalls or breaks.

Longer than other modules because all tests of one subject stand together, each short and by itself.
"""

from __future__ import annotations

import contextlib
import time
from collections import Counter, deque
from collections.abc import Iterator

import gevent
import pytest
from gevent import socket as gsocket
from gevent.event import Event
from gevent.hub import get_hub
from hypothesis import given, settings
from hypothesis import strategies as st

from geyamux.errors import ProtocolError, TransportError, WriteTimeout
from geyamux.flow import ReceiveBudget, ReceiveBuffer
from geyamux.outbox import LargeFrame, Outbox
from geyamux.waiting import Deadline
from geyamux.waking import Waiter, Waker
from support.rawpeer import settle
from support.wire import ACK, RST, SYN, Decoder, data, frame, go_away, ping, window_update

SOON = 0.03
PATIENCE = 5.0


class ScriptedTransport:
    """A connection with a descriptor that takes what the test says.

    `answers` are used up first: a number of bytes, an error, or any other value to be returned as it is. Then all is
    taken, or nothing while it stalls; the descriptor is writable or not accordingly.
    """

    read_wants_write = False
    write_wants_read = False
    has_more = None

    def __init__(self, *, gathers: bool = True) -> None:
        self._near, self._far = gsocket.socketpair()
        self._near.setblocking(False)
        self._far.setblocking(False)
        self.fileno = self._near.fileno()
        self.sendmsg = self._sendmsg if gathers else None
        self.answers: deque[object] = deque()
        self.is_stalled = False
        self.sent = b""
        #: The sizes of the pieces of each call that took something.
        self.calls: list[tuple[int, ...]] = []
        #: The objects behind the pieces of the last gathering call.
        self.gathered: list[object] = []

    def send(self, piece):
        return self._take([piece])

    def _sendmsg(self, pieces):
        self.gathered = [piece.obj if isinstance(piece, memoryview) else piece for piece in pieces]
        return self._take(pieces)

    def _take(self, pieces):
        offered = b"".join(bytes(piece) for piece in pieces)
        answer = self.answers.popleft() if self.answers else self._usual(len(offered))
        if answer is BlockingIOError:
            raise BlockingIOError  # one that is kept nowhere: its traceback holds the pieces
        if isinstance(answer, BaseException):
            raise answer
        if type(answer) is int and 0 <= answer <= len(offered):
            self.sent += offered[:answer]
            self.calls.append(tuple(len(piece) for piece in pieces))
        return answer

    def _usual(self, size):
        if not self.is_stalled:
            return size
        self._fill()
        return BlockingIOError

    def _fill(self):
        with contextlib.suppress(BlockingIOError):
            while True:
                self._near.send(b"x" * 65536)

    def _drain(self):
        with contextlib.suppress(BlockingIOError):
            while True:
                self._far.recv(1 << 20)

    def stall(self):
        self.is_stalled = True
        self._fill()

    def allow(self, count):
        """Let so many bytes through the stall."""
        self.answers.append(count)
        self._drain()
        settle()

    def release(self):
        self.is_stalled = False
        self._drain()
        settle()

    def close(self):
        self._near.close()
        self._far.close()


class WaitingTransport:
    """A connection without a descriptor: `send` waits by itself."""

    fileno = None
    sendmsg = None
    has_more = None
    read_wants_write = False
    write_wants_read = False

    def __init__(self) -> None:
        self.passing = Event()
        self.passing.set()
        self.sent = b""
        self.calls: list[tuple[int, ...]] = []
        self.senders: set[object] = set()
        self.at_most = 1 << 30

    def send(self, piece):
        self.senders.add(gevent.getcurrent())
        self.passing.wait()
        taken = bytes(piece[: self.at_most])
        self.sent += taken
        self.calls.append((len(taken),))
        return len(taken)

    def stall(self):
        self.passing.clear()

    def release(self):
        self.passing.set()
        settle()

    def close(self):
        self.passing.set()


class Owner:
    """The session's place; it ends at the first error, as a session does."""

    def __init__(self) -> None:
        self.outbox: Outbox | None = None
        self.errors: list[Exception] = []
        #: Of each ping its value and when it left.
        self.pings_left: list[tuple[int, float]] = []

    def _on_send_error(self, reason):
        self.errors.append(reason)
        if self.outbox is not None:
            self.outbox.close()

    def _on_ping_left(self, value, now):
        self.pings_left.append((value, now))


class Bench:
    """An outbox over a transport that obeys the test."""

    def __init__(self, transport, *, limit: int = 262144, write_timeout: float | None = None) -> None:
        self.transport = transport
        self.owner = Owner()
        self.outbox = Outbox(transport, get_hub(), owner=self.owner, limit=limit, write_timeout=write_timeout)
        self.owner.outbox = self.outbox
        settle()

    @property
    def sent(self) -> bytes:
        return self.transport.sent

    @property
    def frames(self):
        decoder = Decoder()
        found = decoder.feed(self.sent)
        decoder.finish()
        return found

    def append(self, *frames: bytes) -> int:
        for each in frames:
            position = self.outbox.append(each)
        return position

    def large(self, stream_id: int, payload) -> LargeFrame:
        return LargeFrame(
            stream_id, frame(0, 0, stream_id, len(payload)), memoryview(payload)[:], Waiter(self.outbox.lane)
        )

    def close(self) -> None:
        self.outbox.close()
        self.transport.close()
        settle()


@contextlib.contextmanager
def benched(transport=None, **settings) -> Iterator[Bench]:
    bench = Bench(ScriptedTransport() if transport is None else transport, **settings)
    try:
        yield bench
    finally:
        bench.close()


@pytest.fixture
def bench() -> Iterator[Bench]:
    with benched() as bench:
        yield bench


@pytest.fixture
def tls_like() -> Iterator[Bench]:
    """A descriptor, no gathering send."""
    with benched(ScriptedTransport(gathers=False)) as bench:
        yield bench


@pytest.fixture
def waiting() -> Iterator[Bench]:
    """No descriptor."""
    with benched(WaitingTransport()) as bench:
        yield bench


def taken_buffer(taken: int, unread: int = 0) -> ReceiveBuffer:
    """A receive buffer from which so much was taken."""
    buffer = ReceiveBuffer(ReceiveBudget(1 << 30, 262144))
    buffer.append(b"x" * (taken + unread))
    if taken:
        buffer.take(taken)
    return buffer


def never() -> bool:
    return False


def taken_up_to(bench: Bench, position: int, timeout: float = PATIENCE) -> bool:
    return bench.outbox.wait_until(lambda: bench.outbox.taken >= position, Deadline(timeout))


A, B, C = data(1, b"a"), data(3, b"bb"), data(5, b"ccc")


# --- when frames leave ---


def test_frames_leave_in_order_at_the_end_of_the_turn_by_one_send(bench):
    bench.append(A, B, C)
    assert bench.sent == b""
    settle()
    assert bench.sent == A + B + C
    assert bench.transport.calls == [(42,)]


def test_each_turn_has_a_send_of_its_own(bench):
    for each in (A, B):
        bench.append(each)
        settle()
    assert bench.transport.calls == [(13,), (14,)]


def test_frames_of_two_kibibytes_together_leave_at_once_by_one_send(bench):
    piece = data(1, b"x" * 500)
    bench.append(piece, piece, piece)
    assert bench.transport.calls == []
    bench.append(piece)
    assert bench.transport.calls == [(2048,)]
    settle()
    assert bench.sent == piece * 4
    assert len(bench.transport.calls) == 1


def test_a_flush_sends_at_once(bench):
    bench.append(A)
    bench.outbox.flush_nowait()
    assert bench.sent == A
    settle()
    assert bench.transport.calls == [(13,)]


def test_a_flush_with_nothing_to_send_or_after_the_end_does_nothing(bench):
    bench.outbox.flush_nowait()
    bench.outbox.close()
    bench.append(A)
    bench.outbox.flush_nowait()
    assert bench.transport.calls == []


@pytest.mark.parametrize(
    "provoke",
    [
        lambda outbox, number: outbox.pong(number),
        lambda outbox, number: outbox.reset(number),
        lambda outbox, number: outbox.refuse(number),
        lambda outbox, number: outbox.acknowledge(number, 0),
        lambda outbox, number: outbox.grant(number, taken_buffer(1)),
        lambda outbox, number: outbox.ping(number),
    ],
    ids=["pong", "reset", "refuse", "acknowledge", "grant", "ping"],
)
def test_what_the_reader_provokes_never_sends_in_the_caller(bench, provoke):
    for number in range(1, 600, 2):
        provoke(bench.outbox, number)
    assert bench.transport.calls == []
    settle()
    assert len(bench.transport.calls) == 1
    assert bench.frames


def test_more_than_a_batch_leaves_in_several_sends(bench):
    bench.transport.stall()
    piece = data(1, b"x" * 4084)
    bench.append(*[piece] * 40)
    bench.transport.release()
    assert bench.sent == piece * 40
    assert max(sum(sizes) for sizes in bench.transport.calls) <= 65536 + 4096


def test_counts_are_those_of_what_left(bench):
    bench.append(A, B)
    settle()
    bench.outbox.append_large(bench.large(7, b"x" * 5000))
    bench.outbox.pong(1)
    settle()
    assert bench.outbox.bytes_sent == len(bench.sent) == 13 + 14 + 5012 + 12
    assert bench.outbox.frames_sent == len(bench.frames) == 4


def test_a_large_frame_counts_once_without_a_gathering_send(tls_like):
    tls_like.outbox.append_large(tls_like.large(7, b"x" * 5000))
    settle()
    assert tls_like.outbox.frames_sent == len(tls_like.frames) == 1


def test_withdrawn_and_purged_frames_are_not_counted_as_sent(bench):
    bench.transport.stall()
    bench.append(A)
    settle()
    withdrawn = bench.large(3, b"x" * 5000)
    bench.outbox.append_large(withdrawn)
    bench.append(C, A)
    assert bench.outbox.withdraw(withdrawn)
    bench.outbox.withdraw_stream(5)
    bench.transport.release()
    assert bench.sent == A + A
    assert bench.outbox.frames_sent == 2


# --- large frames ---


def test_a_large_payload_is_sent_at_once_and_not_copied(bench):
    payload = b"p" * 5000
    large = bench.large(3, payload)
    bench.append(A)
    bench.outbox.append_large(large)
    assert large.is_done
    assert bench.sent == A + data(3, payload)
    assert bench.transport.calls == [(13 + 12, 5000)]
    assert bench.transport.gathered[1] is payload


def test_without_a_gathering_send_a_large_payload_is_copied_and_done_with(tls_like):
    payload = bytearray(b"p" * 5000)
    large = tls_like.large(3, payload)
    tls_like.transport.answers += [100, BlockingIOError]
    tls_like.outbox.append_large(large)
    assert large.is_done
    payload[:] = b"!" * 5000
    settle()
    assert tls_like.sent == data(3, b"p" * 5000)


def test_writers_of_large_frames_take_turns(bench):
    bench.transport.stall()
    bench.append(A)
    settle()
    first, second = bench.large(3, b"f" * 5000), bench.large(5, b"s" * 5000)
    bench.outbox.append_large(first)
    bench.outbox.append_large(second)
    bench.append(B)
    assert not first.is_done
    bench.transport.release()
    assert first.is_done
    assert second.is_done
    assert bench.sent == A + data(3, b"f" * 5000) + data(5, b"s" * 5000) + B


def test_the_writer_of_a_large_frame_is_woken_when_it_was_taken(bench):
    bench.transport.stall()
    bench.append(A)
    settle()
    large = bench.large(3, b"x" * 5000)

    def write():
        bench.outbox.append_large(large)
        while not large.is_done:
            large.waiter.park()

    writing = gevent.spawn(write)
    settle()
    assert not writing.ready()
    bench.transport.release()
    assert writing.ready()
    assert bench.sent == A + data(3, b"x" * 5000)


BODY = b"0123456789"
WHOLE = data(3, BODY)
OFFSETS = range(len(WHOLE) + 1)


def interrupted(bench: Bench, offset: int, payload: bytearray) -> LargeFrame:
    """Append a large frame, of which the connection takes so many bytes and then stalls."""
    with memoryview(payload) as view:
        large = LargeFrame(3, WHOLE[:12], view[:], Waiter(bench.outbox.lane))
    bench.transport.is_stalled = True
    bench.transport.answers.append(offset or BlockingIOError)
    bench.outbox.append_large(large)
    settle()
    return large


@pytest.mark.parametrize("offset", OFFSETS)
def test_a_frame_that_was_begun_is_finished_wherever_it_was_interrupted(bench, offset):
    interrupted(bench, offset, bytearray(BODY))
    bench.transport.release()
    assert bench.sent == WHOLE
    assert bench.outbox.taken == bench.outbox.appended == 1


@pytest.mark.parametrize("offset", OFFSETS)
def test_a_frame_whose_writer_leaves_is_finished_from_a_copy_if_any_of_it_has_left(bench, offset):
    payload = bytearray(BODY)
    large = interrupted(bench, offset, payload)
    assert bench.outbox.withdraw(large) is (offset == 0)
    assert large.is_done
    large.payload.release()
    payload[:] = b"!!!!!!!!!!"
    bench.append(A)
    bench.transport.release()
    assert bench.sent == (WHOLE if offset else b"") + A
    assert bench.outbox.taken == bench.outbox.appended == 2


@pytest.mark.parametrize("offset", range(len(A + B + WHOLE) + 1))
@pytest.mark.parametrize("way", ["withdraw", "withdraw stream", "wait"])
def test_small_frames_before_a_large_one_leave_whatever_becomes_of_it(bench, way, offset):
    before = A + data(5, b"bb")
    bench.append(A, data(5, b"bb"))
    payload = bytearray(BODY)
    large = interrupted(bench, offset, payload)
    if way == "withdraw":
        assert bench.outbox.withdraw(large) is (offset <= len(before))
    elif way == "withdraw stream":
        bench.outbox.withdraw_stream(3)
    bench.append(C)
    bench.transport.release()
    vanishes = way != "wait" and offset <= len(before)
    assert bench.sent == before + (b"" if vanishes else WHOLE) + C
    assert large.is_done
    assert bench.outbox.taken == bench.outbox.appended == 4
    large.payload.release()
    payload += b"grows"


def test_a_frame_taken_back_from_the_wire_is_not_counted_as_sent(bench):
    bench.outbox.withdraw(interrupted(bench, 0, bytearray(BODY)))
    bench.append(A)
    bench.transport.release()
    assert bench.sent == A
    assert bench.outbox.frames_sent == 1


@pytest.mark.parametrize("way", ["withdraw", "withdraw stream"])
def test_when_the_last_frame_is_taken_back_from_the_wire_everything_is_taken(bench, way):
    large = interrupted(bench, 0, bytearray(BODY))
    empty = gevent.spawn(bench.outbox.wait_empty, Deadline(PATIENCE))
    taken = gevent.spawn(taken_up_to, bench, 1)
    settle()
    if way == "withdraw":
        assert bench.outbox.withdraw(large) is True
    else:
        bench.outbox.withdraw_stream(3)
    bench.transport.release()
    assert bench.sent == b""
    assert empty.ready()
    assert taken.ready()


@pytest.mark.parametrize("offset", OFFSETS)
def test_the_view_of_a_payload_is_let_go_of_when_its_writer_leaves(bench, offset):
    payload = bytearray(BODY)
    large = interrupted(bench, offset, payload)
    bench.outbox.withdraw(large)
    large.payload.release()
    payload += b"grows"  # BufferError while anybody holds a view
    bench.transport.release()
    assert bench.sent == (WHOLE if offset else b"")


def test_an_error_of_the_connection_lets_go_of_the_payload(bench):
    payload = bytearray(BODY)
    bench.transport.answers.append(ConnectionResetError("reset"))
    with memoryview(payload) as view:
        large = LargeFrame(3, WHOLE[:12], view[:], Waiter(bench.outbox.lane))
    bench.outbox.append_large(large)
    settle()
    assert type(bench.owner.errors[0]) is TransportError
    bench.outbox.close()  # what the session does about it
    assert large.is_done and large.is_lost
    large.payload.release()
    payload += b"grows"


def test_a_connection_that_takes_bytes_though_it_is_not_reported_writable_is_tried_again():
    with benched(write_timeout=SOON * 4) as bench:
        bench.transport.stall()
        bench.append(A)
        settle()
        bench.transport.is_stalled = False  # and the descriptor stays full
        gevent.sleep(SOON * 3)
        assert bench.sent == A
        assert bench.owner.errors == []


def test_the_view_of_a_payload_is_let_go_of_when_it_was_taken(bench):
    payload = bytearray(BODY)
    large = interrupted(bench, 15, payload)
    bench.transport.release()
    assert large.is_done
    large.payload.release()
    payload += b"grows"


def test_a_frame_that_was_not_begun_is_withdrawn_and_nothing_of_it_leaves(bench):
    bench.transport.stall()
    bench.append(A)
    settle()
    large = bench.large(3, BODY)
    bench.outbox.append_large(large)
    bench.append(B)
    assert bench.outbox.withdraw(large) is True
    assert large.is_done
    bench.transport.release()
    assert bench.sent == A + B
    assert bench.outbox.taken == bench.outbox.appended == 3


def test_a_frame_that_was_taken_can_not_be_withdrawn(bench):
    large = bench.large(3, BODY)
    bench.outbox.append_large(large)
    assert bench.outbox.withdraw(large) is False
    assert bench.sent == WHOLE


# --- what goes ahead ---


def test_what_is_urgent_goes_ahead_at_the_next_frame_boundary_and_not_before(bench):
    interrupted(bench, 15, bytearray(BODY))
    bench.append(A)
    bench.outbox.grant(21, taken_buffer(200_000))
    bench.outbox.acknowledge(19, 5)
    bench.outbox.reset(17, 6)
    bench.outbox.pong(7)
    bench.outbox.ping(8)
    settle()
    assert bench.sent == WHOLE[:15]
    bench.transport.release()
    assert (
        bench.sent
        == WHOLE
        + ping(SYN, 8)
        + ping(ACK, 7)
        + window_update(17, 6, RST)
        + window_update(19, 5, ACK)
        + window_update(21, 200_000)
        + A
    )


def test_credit_that_waits_is_merged_and_counted_when_it_leaves(bench):
    bench.transport.stall()
    bench.append(A)
    settle()
    buffer = taken_buffer(100, unread=1000)
    bench.outbox.grant(3, buffer)
    buffer.take(1000)
    bench.outbox.grant(3, buffer)
    bench.transport.release()
    assert bench.sent == A + window_update(3, 1100)


def test_credit_that_is_not_due_any_more_sends_nothing(bench):
    bench.outbox.grant(3, taken_buffer(0))
    settle()
    assert bench.transport.calls == []
    assert bench.outbox.is_empty
    bench.append(A)
    settle()
    assert bench.sent == A


def test_pongs_beyond_thirty_two_that_wait_are_dropped(bench):
    bench.transport.stall()
    bench.append(A)
    settle()
    for value in range(100):
        bench.outbox.pong(value)
    bench.transport.release()
    assert bench.sent == A + b"".join(ping(ACK, value) for value in range(32))
    bench.outbox.pong(200)
    settle()
    assert bench.sent.endswith(ping(ACK, 200))


def test_pongs_are_never_merged(bench):
    for _ in range(3):
        bench.outbox.pong(5)
    settle()
    assert bench.sent == ping(ACK, 5) * 3


def test_a_reset_takes_the_place_of_acknowledgement_and_credit(bench):
    bench.outbox.acknowledge(3, 0)
    bench.outbox.grant(3, taken_buffer(10))
    bench.outbox.acknowledge(5, 0)
    bench.outbox.reset(3, 9)
    settle()
    assert bench.sent == window_update(3, 9, RST) + window_update(5, 0, ACK)


def test_an_id_that_is_used_anew_is_reset_before_it_is_acknowledged(bench):
    bench.outbox.reset(3)
    bench.outbox.acknowledge(3, 0)
    settle()
    assert bench.sent == window_update(3, 0, RST) + window_update(3, 0, ACK)


def test_forgotten_acknowledgement_and_credit_never_leave(bench):
    bench.outbox.acknowledge(3, 0)
    bench.outbox.grant(3, taken_buffer(10))
    bench.outbox.forget(3)
    bench.outbox.forget(99)
    settle()
    assert bench.sent == b""
    assert bench.outbox.is_empty


def test_a_peer_that_provokes_resets_and_does_not_fetch_them_breaks_the_protocol(bench):
    for stream_id in range(1, 2 * 8192, 2):
        bench.outbox.refuse(stream_id)
    with pytest.raises(ProtocolError, match="8192 resets"):
        bench.outbox.refuse(20001)
    settle()
    bench.outbox.refuse(20001)
    settle()
    assert len(bench.frames) == 8193


def test_a_ping_leaves_when_the_send_began_that_took_it(bench):
    """On a fast link the answer may be there when the send returns."""
    began = []
    send = bench.transport.send
    bench.transport.send = lambda piece: (began.append((time.monotonic(), bench.outbox.ping_offered)), send(piece))[1]
    before = time.monotonic()
    bench.outbox.ping(9)
    settle()
    assert bench.sent == ping(SYN, 9)
    [(value, moment)] = bench.owner.pings_left
    [(began_at, offered)] = began
    assert value == 9
    assert before <= moment <= began_at
    assert offered == (9, moment)


def test_a_ping_that_the_connection_does_not_take_has_not_left(bench):
    bench.transport.stall()
    bench.outbox.ping(9)
    settle()
    assert bench.owner.pings_left == []
    released = time.monotonic()
    bench.transport.release()
    assert bench.sent == ping(SYN, 9)
    [(value, moment)] = bench.owner.pings_left
    assert value == 9
    assert moment >= released


def test_a_ping_that_waits_behind_other_bytes_has_not_left(bench):
    bench.transport.stall()
    bench.append(A)
    settle()
    bench.outbox.ping(9)
    settle()
    bench.transport.allow(5)
    assert bench.owner.pings_left == []
    bench.transport.release()
    assert [value for value, _ in bench.owner.pings_left] == [9]


def test_a_ping_leaves_once_even_if_it_is_taken_in_parts(bench):
    bench.transport.is_stalled = True
    bench.transport.answers.append(5)
    bench.outbox.ping(9)
    settle()
    bench.transport.release()
    assert bench.sent == ping(SYN, 9)
    assert [value for value, _ in bench.owner.pings_left] == [9]


def test_a_ping_in_a_send_that_waits_leaves_when_it_returns(waiting):
    waiting.transport.stall()
    waiting.outbox.ping(9)
    settle()
    assert waiting.owner.pings_left == []
    released = time.monotonic()
    waiting.transport.release()
    [(value, moment)] = waiting.owner.pings_left
    assert value == 9
    assert moment >= released


def test_only_the_latest_of_pings_that_wait_leaves(bench):
    bench.outbox.ping(1)
    bench.outbox.ping(2)
    settle()
    assert bench.sent == ping(SYN, 2)
    assert [value for value, _ in bench.owner.pings_left] == [2]


# --- taking back ---


def test_what_one_stream_has_queued_is_taken_back(bench):
    bench.transport.stall()
    bench.append(A)
    settle()
    large = bench.large(3, b"x" * 5000)
    bench.append(window_update(3, 0, SYN), B, C)
    bench.outbox.append_large(large)
    bench.append(window_update(3, 0, 4), C)
    bench.outbox.withdraw_stream(3)
    bench.outbox.withdraw_stream(3)
    bench.transport.release()
    assert bench.sent == A + C + C
    assert bench.outbox.taken == bench.outbox.appended == 7
    assert bench.outbox.waiting_bytes == 0


def test_a_position_that_was_not_loaded_is_that_of_a_frame_that_has_not_begun_to_leave(bench):
    first = bench.append(window_update(1, 0, SYN))
    settle()
    second = bench.append(window_update(3, 0, SYN))
    assert first <= bench.outbox.loaded < second
    settle()
    assert second <= bench.outbox.loaded
    bench.transport.stall()
    third = bench.append(A)
    settle()
    fourth = bench.append(B)
    assert third <= bench.outbox.loaded < fourth


def test_of_a_stream_whose_id_is_used_anew_only_the_old_frames_are_taken_back(bench):
    bench.append(B)
    bench.outbox.withdraw_stream(3)
    anew = data(3, b"anew")
    bench.append(A, anew)
    settle()
    assert bench.sent == A + anew
    bench.append(B)
    settle()
    assert bench.sent == A + anew + B


def test_what_was_taken_back_is_not_remembered_for_ever(bench):
    bench.transport.stall()
    for stream_id in range(1, 2001, 2):
        bench.append(data(stream_id, b"x"))
        bench.outbox.withdraw_stream(stream_id)
    bench.transport.release()
    bench.append(A)
    settle()
    assert bench.sent == A
    assert not bench.outbox._withdrawn


def test_taking_back_leaves_a_frame_that_was_begun_whole(bench):
    interrupted(bench, 15, bytearray(BODY))
    bench.append(B)
    bench.outbox.withdraw_stream(3)
    bench.transport.release()
    assert bench.sent == WHOLE


def test_taking_back_leaves_frames_of_the_session_alone(bench):
    bench.append(go_away(0), B)
    bench.outbox.withdraw_stream(3)
    settle()
    assert bench.sent == go_away(0)


@pytest.mark.parametrize("offset", [0, 15])
def test_taking_back_wakes_the_writer_of_what_is_on_the_wire(bench, offset):
    large = interrupted(bench, offset, bytearray(BODY))
    parked = gevent.spawn(large.waiter.park)
    settle()
    bench.outbox.withdraw_stream(3)
    settle()
    assert parked.ready()
    assert large.is_done


@pytest.mark.parametrize("way", ["withdraw stream", "withdraw"])
def test_who_waits_for_everything_to_be_taken_learns_that_the_rest_was_taken_back(bench, way):
    bench.append(A)
    settle()
    if way == "withdraw stream":
        position = bench.append(B)
        bench.outbox.withdraw_stream(3)
    else:
        bench.transport.stall()
        bench.append(A)
        settle()
        large = bench.large(3, BODY)
        bench.outbox.append_large(large)
        position = bench.outbox.appended
        bench.outbox.withdraw(large)
    empty = gevent.spawn(bench.outbox.wait_empty, Deadline(PATIENCE))
    taken = gevent.spawn(taken_up_to, bench, position)
    settle()
    bench.transport.release()
    assert empty.ready()
    assert taken.ready()
    assert empty.value is taken.value is True


def test_dropping_forgets_what_was_not_begun_and_finishes_what_was(bench):
    interrupted(bench, 15, bytearray(BODY))
    large = bench.large(5, b"x" * 5000)
    bench.append(A)
    bench.outbox.append_large(large)
    bench.outbox.ping(1)
    bench.outbox.pong(1)
    bench.outbox.reset(9)
    bench.outbox.drop()
    assert large.is_done
    bench.transport.release()
    assert bench.sent == WHOLE
    assert bench.outbox.is_empty
    assert bench.outbox.taken == bench.outbox.appended == 3
    assert bench.owner.pings_left == []


# --- room ---


def test_there_is_room_until_the_limit_waits():
    with benched(limit=4096) as bench:
        bench.transport.stall()
        piece = data(1, b"x" * 2036)  # 2048 with its header
        bench.append(piece)
        settle()
        assert bench.outbox.has_room
        assert bench.outbox.waiting_bytes == 2048
        bench.append(piece)
        assert not bench.outbox.has_room
        bench.transport.release()
        assert bench.outbox.has_room
        assert bench.outbox.waiting_bytes == 0


def test_what_is_partly_taken_makes_room_by_that_much():
    with benched(limit=4096) as bench:
        bench.transport.stall()
        bench.append(data(1, b"x" * 4084))
        settle()
        assert not bench.outbox.has_room
        bench.transport.allow(100)
        assert bench.outbox.has_room
        assert bench.outbox.waiting_bytes == 3996


def test_resets_and_acknowledgements_that_wait_take_room():
    with benched(limit=4096) as bench:
        bench.transport.stall()
        for stream_id in range(200):
            bench.outbox.reset(stream_id)
        for stream_id in range(200, 342):
            assert bench.outbox.has_room
            bench.outbox.acknowledge(stream_id, 0)
        assert not bench.outbox.has_room


def test_who_waits_for_room_gets_it_in_order():
    with benched(limit=4096) as bench:
        bench.transport.stall()
        bench.append(data(1, b"x" * 5000))
        settle()
        order = []

        def enter(name):
            bench.outbox.wait_room(Waiter(bench.outbox.lane), None, never)
            order.append(name)
            bench.append(data(1, b"x" * 5000))

        waiting = [gevent.spawn(enter, name) for name in "abc"]
        settle()
        assert order == []
        assert not bench.outbox.has_room
        bench.transport.allow(5012)
        assert order == ["a"]
        bench.transport.release()
        assert order == ["a", "b", "c"]
        gevent.joinall(waiting, raise_error=True)
        assert len(bench.frames) == 4


def test_while_somebody_waits_for_room_nobody_overtakes():
    with benched(limit=4096) as bench:
        bench.transport.stall()
        bench.append(data(1, b"x" * 5000))
        settle()
        waiting = gevent.spawn(bench.outbox.wait_room, Waiter(bench.outbox.lane), None, never)
        settle()
        bench.outbox.drop()
        bench.transport.answers.append(4000)
        assert not bench.outbox.has_room
        bench.transport.release()
        assert waiting.ready()
        assert bench.outbox.has_room


def test_waiting_for_room_has_a_deadline_and_leaves_nothing_behind():
    with benched(limit=4096) as bench:
        bench.transport.stall()
        bench.append(data(1, b"x" * 5000))
        settle()
        with pytest.raises(TimeoutError) as caught:
            bench.outbox.wait_room(Waiter(bench.outbox.lane), Deadline(SOON), never)
        assert caught.value.args == ("timed out",)
        with gevent.Timeout(SOON, False):
            bench.outbox.wait_room(Waiter(bench.outbox.lane), None, never)
        killed = gevent.spawn(bench.outbox.wait_room, Waiter(bench.outbox.lane), None, never)
        settle()
        killed.kill()
        bench.transport.release()
        assert bench.outbox.has_room


def test_waiting_for_room_ends_when_it_becomes_pointless():
    with benched(limit=4096) as bench:
        bench.transport.stall()
        bench.append(data(1, b"x" * 5000))
        settle()
        reasons = []
        waiter = Waiter(bench.outbox.lane)
        waiting = gevent.spawn(bench.outbox.wait_room, waiter, None, lambda: bool(reasons))
        settle()
        reasons.append("reset")
        bench.outbox.lane.wake(waiter)
        settle()
        assert waiting.ready()
        bench.outbox.wait_room(waiter, None, lambda: True)


def test_waiting_for_room_ends_with_the_session():
    with benched(limit=4096) as bench:
        bench.transport.stall()
        bench.append(data(1, b"x" * 5000))
        settle()
        waiting = [gevent.spawn(bench.outbox.wait_room, Waiter(bench.outbox.lane), None, never) for _ in range(3)]
        settle()
        bench.outbox.close()
        settle()
        assert all(greenlet.ready() for greenlet in waiting)
        gevent.joinall(waiting, raise_error=True)


# --- waiting until it was taken ---


def test_a_position_is_reached_when_its_frame_was_taken(bench):
    bench.transport.stall()
    first, second = bench.append(A), bench.append(B)
    settle()
    third = bench.append(C)
    waiting = {position: gevent.spawn(taken_up_to, bench, position) for position in (first, second, third)}
    settle()
    bench.transport.allow(len(A + B) - 1)
    assert not any(greenlet.ready() for greenlet in waiting.values())
    bench.transport.allow(1)
    assert [waiting[position].ready() for position in (first, second, third)] == [True, True, False]
    bench.transport.release()
    assert waiting[third].get(block=False) is True


def test_who_waits_for_a_position_is_woken_when_it_was_taken_and_not_before(bench):
    bench.transport.stall()
    positions = [bench.append(frame) for frame in (A, B, C)]
    woken = []

    def wait(position):
        waiter = Waiter(bench.outbox.lane)
        bench.outbox.milestones.enter(position, waiter)
        waiter.park()
        woken.append(position)

    waiting = [gevent.spawn(wait, position) for position in reversed(positions)]
    settle()
    bench.transport.allow(len(A) + len(B) + len(C) - 1)
    assert woken == []
    bench.transport.release()
    assert sorted(woken) == positions
    assert not bench.outbox.milestones
    gevent.joinall(waiting, raise_error=True)


def test_waiting_until_it_was_taken_returns_at_once_where_it_was(bench):
    position = bench.append(A)
    settle()
    assert taken_up_to(bench, position) is True
    assert bench.outbox.wait_empty(None) is True


def test_waiting_until_it_was_taken_has_a_deadline(bench):
    bench.transport.stall()
    position = bench.append(A)
    assert taken_up_to(bench, position, SOON) is False
    assert bench.outbox.wait_empty(Deadline(SOON)) is False
    killed = gevent.spawn(bench.outbox.wait_empty, None)
    settle()
    killed.kill()
    assert not bench.outbox._enders.waiters


def test_waiting_until_it_was_taken_ends_with_the_session(bench):
    bench.transport.stall()
    position = bench.append(A)
    waiting = gevent.spawn(bench.outbox.wait_until, lambda: False, None)
    settle()
    assert position == 1
    bench.outbox.close()
    settle()
    assert waiting.get(block=False) is False


def test_a_condition_is_looked_at_when_somebody_says_so(bench):
    conditions = []
    waiting = gevent.spawn(bench.outbox.wait_until, lambda: bool(conditions), None)
    settle()
    conditions.append(True)
    settle()
    assert not waiting.ready()
    bench.outbox.wake_enders()
    settle()
    assert waiting.get(block=False) is True


def test_everything_includes_what_is_urgent(bench):
    bench.transport.stall()
    bench.outbox.pong(1)
    assert not bench.outbox.is_empty
    waiting = gevent.spawn(bench.outbox.wait_empty, Deadline(PATIENCE))
    settle()
    assert not waiting.ready()
    bench.transport.release()
    assert waiting.get(block=False) is True


# --- what breaks ---


@pytest.mark.parametrize("nonsense", [None, -1, 0, 14, "13", 13.0, b"x"])
def test_nonsense_returned_by_send_breaks_the_connection(bench, nonsense):
    bench.transport.answers.append(nonsense)
    bench.append(A)
    settle()
    [reason] = bench.owner.errors
    assert type(reason) is TransportError
    assert (
        reason.message
        == f"the connection broke while sending: send() of the connection returned {nonsense!r} for 13 bytes"
    )
    assert isinstance(reason.__cause__, OSError)


@pytest.mark.parametrize("nonsense", [None, -1, 0, 23, "22"])
def test_nonsense_returned_by_a_gathering_send_breaks_the_connection(bench, nonsense):
    bench.transport.answers.append(nonsense)
    large = bench.large(3, BODY)
    bench.outbox.append_large(large)
    assert bench.owner.errors == []  # it must not act in the middle of its own call
    settle()
    [reason] = bench.owner.errors
    assert type(reason) is TransportError
    assert f"returned {nonsense!r} for 22 bytes" in reason.message


@pytest.mark.parametrize("nonsense", [None, -1, 0, 14])
def test_nonsense_returned_by_a_send_that_waits_breaks_the_connection(waiting, nonsense):
    waiting.transport.send = lambda piece: nonsense
    waiting.append(A)
    settle()
    [reason] = waiting.owner.errors
    assert type(reason) is TransportError


@pytest.mark.parametrize("error", [ConnectionResetError("reset"), BrokenPipeError("pipe"), ValueError("closed file")])
@pytest.mark.parametrize("size", [1, 5000])
def test_an_error_of_the_connection_is_the_cause_of_the_reason(bench, error, size):
    bench.transport.answers.append(error)
    if size == 1:
        bench.append(A)
    else:
        bench.outbox.append_large(bench.large(1, b"x" * size))
    settle()
    [reason] = bench.owner.errors
    assert type(reason) is TransportError
    assert reason.__cause__ is error
    assert str(error) in reason.message


def test_an_error_in_the_writer_greenlet_is_told_as_well(bench):
    bench.transport.answers += [5, ConnectionResetError("reset")]
    bench.append(A)
    settle()
    [reason] = bench.owner.errors
    assert isinstance(reason.__cause__, ConnectionResetError)
    assert bench.sent == A[:5]


@pytest.mark.parametrize("transport", [ScriptedTransport, WaitingTransport])
def test_a_killed_writer_greenlet_ends_the_session(transport):
    with benched(transport()) as bench:
        bench.outbox._greenlet.kill()
        settle()
        [reason] = bench.owner.errors
        assert type(reason) is TransportError
        assert "killed" in reason.message


# --- what stalls ---


def test_a_connection_that_takes_nothing_for_the_write_timeout_is_given_up():
    with benched(write_timeout=SOON) as bench:
        bench.transport.stall()
        bench.append(A)
        began = time.monotonic()
        while not bench.owner.errors and time.monotonic() - began < PATIENCE:
            gevent.sleep(SOON / 4)
        [reason] = bench.owner.errors
        assert type(reason) is WriteTimeout
        assert reason.message == f"the connection took no bytes for {SOON} s"
        assert time.monotonic() - began >= SOON * 0.9


def test_a_slow_connection_that_moves_is_not_dead():
    with benched(write_timeout=SOON * 4) as bench:
        bench.transport.stall()
        bench.append(A)
        for _ in range(12):  # three times the limit in all
            gevent.sleep(SOON)
            bench.transport.allow(1)
        assert bench.owner.errors == []
        assert bench.sent == A[:12]
        bench.transport.release()
        assert bench.sent == A


def test_where_nothing_waits_nothing_stalls():
    with benched(write_timeout=SOON) as bench:
        bench.append(A)
        gevent.sleep(SOON * 3)
        assert bench.owner.errors == []


def test_a_stalled_large_frame_counts_as_well():
    with benched(write_timeout=SOON) as bench:
        bench.transport.stall()
        large = bench.large(3, b"x" * 5000)
        bench.outbox.append_large(large)
        gevent.sleep(SOON * 4)
        assert [type(reason) for reason in bench.owner.errors] == [WriteTimeout]
        assert large.is_done


def test_a_send_that_waits_by_itself_is_watched_from_outside():
    with benched(WaitingTransport(), write_timeout=SOON) as bench:
        bench.transport.stall()
        bench.append(A)
        gevent.sleep(SOON * 4)
        assert [type(reason) for reason in bench.owner.errors] == [WriteTimeout]
        assert bench.outbox._greenlet.dead


def test_sends_that_wait_less_each_than_the_limit_do_not_stall():
    with benched(WaitingTransport(), write_timeout=SOON * 4) as bench:
        bench.transport.at_most = 1

        def slowly(piece):
            gevent.sleep(SOON)
            return WaitingTransport.send(bench.transport, piece)

        bench.transport.send = slowly
        bench.append(A)
        gevent.sleep(SOON * 14)
        assert bench.owner.errors == []


def test_a_block_of_our_own_hub_is_not_charged_to_the_connection():
    with benched(write_timeout=0.05) as bench:
        bench.transport.stall()
        bench.append(A)
        settle()
        ends = time.monotonic() + 0.7
        while time.monotonic() < ends:
            pass  # nothing else runs meanwhile
        settle()
        assert bench.owner.errors == []
        bench.transport.release()
        assert bench.sent == A


# --- TLS: a send that waits for something to be received ---


def tls_wants_read(bench: Bench) -> None:
    bench.transport.write_wants_read = True
    bench.transport.answers.append(BlockingIOError)


def now_it_may(bench: Bench) -> None:
    bench.transport.write_wants_read = False


def test_a_send_that_waits_for_input_is_tried_again_when_some_came(tls_like):
    tls_wants_read(tls_like)
    tls_like.append(A)
    settle()
    assert tls_like.sent == b""
    tls_like.outbox.poke()
    settle()
    assert tls_like.sent == A


def test_a_send_that_waits_for_input_does_not_spin_while_the_descriptor_is_writable(tls_like):
    tls_wants_read(tls_like)
    tls_like.append(A)
    settle()
    gevent.sleep(SOON)
    assert tls_like.sent == b""
    tls_like.outbox.poke()
    settle()


def test_input_that_comes_before_the_writer_has_begun_to_wait_is_not_missed(tls_like):
    tls_wants_read(tls_like)
    tls_like.append(A)
    # The send is tried at the end of this turn; input comes at once after it, before the writer greenlet runs.
    get_hub().loop.run_callback(tls_like.outbox.poke)
    settle()
    assert tls_like.sent == A


def test_a_poke_where_nothing_waits_does_nothing(tls_like):
    tls_like.outbox.poke()
    tls_like.transport.write_wants_read = True
    tls_like.outbox.poke()
    now_it_may(tls_like)
    tls_like.append(A)
    settle()
    assert tls_like.sent == A


# --- without a descriptor ---


def test_without_a_descriptor_only_the_writer_greenlet_sends(waiting):
    waiting.append(A)
    waiting.append(*[data(1, b"x" * 1000)] * 10)
    large = waiting.large(3, b"x" * 5000)
    waiting.outbox.append_large(large)
    waiting.outbox.flush_nowait()
    waiting.outbox.pong(1)
    assert waiting.transport.calls == []
    settle()
    assert waiting.transport.senders == {waiting.outbox._greenlet}
    assert large.is_done
    assert len(waiting.frames) == 13
    # The large one by itself: who waits for a small one must not have to wait for it.
    assert [sum(sizes) for sizes in waiting.transport.calls] == [12 + 13 + 10 * 1012, 5012]


def test_without_a_descriptor_what_was_not_taken_is_sent_again(waiting):
    waiting.transport.at_most = 5
    waiting.append(A, B, C)
    settle()
    assert waiting.sent == A + B + C


def test_what_comes_while_a_send_waits_leaves_by_the_next(waiting):
    waiting.transport.stall()
    waiting.append(A)
    settle()
    waiting.append(B)
    waiting.outbox.pong(1)
    settle()
    waiting.transport.release()
    assert waiting.sent == A + ping(ACK, 1) + B
    assert len(waiting.transport.calls) == 2


def test_closing_ends_a_send_that_waits(waiting):
    waiting.transport.stall()
    waiting.append(A)
    settle()
    waiting.outbox.close()
    settle()
    assert waiting.outbox._greenlet.dead
    assert waiting.owner.errors == []


# --- fairness to the hub ---


def looked_around(seen):
    """A timer that passes when the loop looks at timers next."""
    timer = get_hub().loop.timer(0)
    timer.start(lambda: seen.append("timer"))
    return timer


@pytest.mark.parametrize(("kind", "most"), [("large", 4), ("small", 1024)])
def test_a_writer_that_never_waits_becomes_breathless_and_lets_the_loop_look_around(bench, kind, most):
    bench.outbox.breathe()  # what others did before does not count
    count = 0
    while not bench.outbox.is_breathless:
        if kind == "large":
            bench.outbox.append_large(bench.large(1, b"x" * 65536))
        else:
            bench.append(A)
        count += 1
        assert count <= most
    assert count == most
    seen = []
    timer = looked_around(seen)
    bench.outbox.breathe()
    timer.close()
    assert seen == ["timer"]
    assert not bench.outbox.is_breathless


def test_all_writers_of_a_hub_share_one_breath(bench):
    bench.outbox.breathe()
    with benched() as other:
        bench.outbox.append_large(bench.large(1, b"x" * 200_000))
        assert not bench.outbox.is_breathless
        other.outbox.append_large(other.large(1, b"x" * 100_000))
        assert bench.outbox.is_breathless
        assert other.outbox.is_breathless


@pytest.mark.parametrize("kind", ["small", "large"])
def test_the_writer_greenlet_lets_others_run_while_it_sends_much(bench, kind):
    bench.transport.stall()
    bench.append(A)
    settle()
    if kind == "small":
        bench.append(*[data(1, b"x" * 4000)] * 1000)
    else:
        for _ in range(60):
            bench.outbox.append_large(bench.large(1, b"x" * 65536))
    turns = [0]
    sent_in_turn: Counter[int] = Counter()

    def count_turns():
        while True:
            gevent.sleep(0)
            turns[0] += 1

    take = bench.transport._take

    def take_and_note(pieces):
        count = take(pieces)
        sent_in_turn[turns[0]] += count
        return count

    bench.transport._take = take_and_note
    counting = gevent.spawn(count_turns)
    bench.transport.is_stalled = False
    bench.transport._drain()
    assert bench.outbox.wait_empty(Deadline(PATIENCE))
    counting.kill()
    assert len(bench.sent) > 3_900_000
    assert max(sent_in_turn.values()) < 1 << 19


# --- the end ---


def test_closing_drops_all_wakes_all_and_may_be_repeated(bench):
    interrupted(bench, 15, bytearray(BODY))
    large = bench.large(5, b"x" * 5000)
    bench.outbox.append_large(large)
    bench.append(A)
    parked = gevent.spawn(large.waiter.park)
    settle()
    bench.outbox.close()
    bench.outbox.close()
    settle()
    assert large.is_done
    assert parked.ready()
    assert bench.outbox.is_closed
    assert bench.outbox._greenlet.dead
    assert bench.sent == WHOLE[:15]
    assert bench.owner.errors == []


def test_closing_in_the_turn_in_which_it_was_made_leaves_nothing_behind():
    transport = ScriptedTransport()
    outbox = Outbox(transport, get_hub(), owner=Owner(), limit=262144, write_timeout=1.0)
    outbox.append(A)
    outbox.close()
    settle()
    transport.close()
    assert outbox._greenlet.dead
    assert transport.calls == []


def test_nothing_is_sent_after_the_end(bench):
    bench.append(A)
    bench.outbox.close()
    bench.outbox.pong(1)
    bench.append(B)
    settle()
    assert bench.sent == b""


def test_each_session_has_a_lane_of_its_own_and_the_waker_of_its_hub(bench):
    assert bench.outbox.lane.waker is Waker.of(get_hub())
    with benched() as other:
        assert other.outbox.lane.waker is bench.outbox.lane.waker
        assert other.outbox.lane is not bench.outbox.lane


# --- what was taken back does not pile up ---


def test_frames_that_are_given_up_again_and_again_do_not_fill_the_queue(bench):
    bench.transport.stall()
    bench.append(A)
    settle()
    kept = [bench.append(B)]
    for count in range(10_000):
        large = bench.large(1, b"x" * 5000)
        bench.outbox.append_large(large)
        assert bench.outbox.withdraw(large)
        if count % 2000 == 0:
            kept.append(bench.append(C))
        assert len(bench.outbox._queue) < 200
    bench.transport.release()
    assert bench.sent == A + B + C * 5
    assert bench.outbox.taken == bench.outbox.appended == 10_000 + 2 + 5
    assert kept == sorted(set(kept))


def test_streams_that_are_reset_again_and_again_do_not_fill_the_queue(bench):
    bench.transport.stall()
    bench.append(A)
    settle()
    for number in range(5_000):
        stream_id = 101 + 2 * number
        bench.append(data(stream_id, b"answer"))
        bench.outbox.withdraw_stream(stream_id)
        assert len(bench.outbox._queue) < 200
        assert len(bench.outbox._withdrawn) < 200
        assert bench.outbox.waiting_bytes < 200 * 18 + 1000
    last = bench.append(B)
    milestone = gevent.spawn(taken_up_to, bench, last)
    settle()
    bench.transport.release()
    assert bench.sent == A + B
    assert milestone.get(timeout=5) is True


# --- any sequence of operations ---

operations = st.one_of(
    st.tuples(st.just("small"), st.sampled_from([1, 3, 5]), st.integers(1, 1500)),
    st.tuples(st.just("large"), st.sampled_from([1, 3, 5]), st.integers(4097, 9000)),
    st.tuples(st.just("withdraw"), st.just(0), st.integers(0, 3)),
    st.tuples(st.just("withdraw_stream"), st.sampled_from([1, 3, 5]), st.just(0)),
    st.tuples(st.just("pong"), st.just(0), st.integers(0, 9)),
    st.tuples(st.just("answer"), st.just(0), st.integers(0, 6000)),
    st.tuples(st.just("turn"), st.just(0), st.just(0)),
)


class Story:
    """Frames that were queued, and which of them may have vanished."""

    def __init__(self, bench: Bench) -> None:
        self.bench = bench
        self.queued: dict[int, list[bytes]] = {1: [], 3: [], 5: []}
        self.may_vanish: set[bytes] = set()
        self.must_vanish: set[bytes] = set()
        self.large: list[LargeFrame] = []
        #: Those whose writers their streams had to tell.
        self.lost: list[LargeFrame] = []
        self.pongs = 0
        self.number = 0

    def body(self, size: int) -> bytes:
        self.number += 1
        return self.number.to_bytes(4, "big").ljust(size, b".")

    def play(self, operation: str, stream_id: int, value: int) -> None:
        getattr(self, f"on_{operation}")(stream_id, value)

    def on_small(self, stream_id: int, size: int) -> None:
        body = self.body(size + 4)
        self.queued[stream_id].append(body)
        self.bench.outbox.append(data(stream_id, body))

    def on_large(self, stream_id: int, size: int) -> None:
        body = self.body(size)
        self.queued[stream_id].append(body)
        found = self.bench.large(stream_id, body)
        self.large.append(found)
        self.bench.outbox.append_large(found)

    def on_withdraw(self, _: int, index: int) -> None:
        waiting = [each for each in self.large if not each.is_done and each not in self.lost]
        if waiting:
            found = waiting[index % len(waiting)]
            body = bytes(found.payload)
            if self.bench.outbox.withdraw(found):
                self.must_vanish.add(body)

    def on_withdraw_stream(self, stream_id: int, _: int) -> None:
        self.may_vanish.update(self.queued[stream_id])
        self.lost += [each for each in self.large if each.stream_id == stream_id]
        self.bench.outbox.withdraw_stream(stream_id)

    def on_pong(self, _: int, value: int) -> None:
        self.pongs += 1
        self.bench.outbox.pong(value)

    def on_answer(self, _: int, count: int) -> None:
        self.bench.transport.answers.append(_AtMost(count))

    def on_turn(self, _: int, __: int) -> None:
        settle()


class _AtMost(int):
    """So many bytes, or all where there are fewer; none means that it would block."""


class AtMostTransport(ScriptedTransport):
    def _take(self, pieces):
        if self.answers and isinstance(self.answers[0], _AtMost):
            count = min(self.answers.popleft(), sum(len(piece) for piece in pieces))
            self.answers.appendleft(int(count) or BlockingIOError)
        return super()._take(pieces)


@settings(max_examples=200, deadline=None)
@given(st.lists(operations, max_size=40))
def test_whatever_happens_whole_frames_leave_in_the_order_of_their_streams(story):
    with benched(AtMostTransport()) as bench:
        told = Story(bench)
        for operation in story:
            told.play(*operation)
        bench.transport.answers.clear()
        settle()
        assert bench.outbox.is_empty
        assert bench.outbox.taken == bench.outbox.appended
        assert bench.outbox.waiting_bytes == 0
        frames = bench.frames
        assert bench.outbox.bytes_sent == len(bench.sent)
        assert bench.outbox.frames_sent == len(frames)
        for stream_id, queued in told.queued.items():
            left = [each.body for each in frames if each.type == 0 and each.stream_id == stream_id]
            assert left == [body for body in queued if body in left]
            missing = {body for body in queued if body not in left}
            assert told.must_vanish & set(queued) <= missing <= told.must_vanish | told.may_vanish
        assert sum(each.type == 2 for each in frames) <= told.pongs
        assert all(each.is_done or each in told.lost for each in told.large)
