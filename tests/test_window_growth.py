"""Growth of receive windows: when they grow, on whose account, and that all of it is given back.

First the buffers and the budget alone, then sessions whose peer the test plays. Growth has a clock of its own here,
which the test moves. A session's round trip is measured for real: while that clock stands still every read is within a
round trip, and after an hour none is. Windows without growth, and its arithmetic, are in `test_flow.py`.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator
from typing import Any

import gevent
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from geyamux import Config, ProtocolError, StreamReset, flow
from geyamux.flow import ReceiveBudget, ReceiveBuffer
from support.facing import ROLES, facing, outcome, start
from support.links import sessions
from support.rawpeer import settle
from support.wire import ACK, FIN, PING, RST, SYN, WINDOW_UPDATE, data, go_away, ping, window_update

WINDOW = 262144
MIB = 1 << 20
HOUR = 3600.0


class Clock:
    """What growth takes for the monotonic clock."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


@contextlib.contextmanager
def own_clock() -> Iterator[Clock]:
    clock = Clock()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(flow, "time", clock)
        yield clock


@pytest.fixture
def clock() -> Iterator[Clock]:
    with own_clock() as clock:
        yield clock


# --- buffers and the budget ---


class Receiver:
    """One stream as its buffer sees it, and what a plain model knows of it."""

    def __init__(self, budget: ReceiveBudget, extra: int) -> None:
        self.buffer = ReceiveBuffer(budget)
        if extra:
            self.buffer.extend_limit(extra)
        #: The full size of the window, what of it has grown, and what the peer may send.
        self.limit = self.credit = WINDOW + extra
        self.grown = 0
        self.unread = 0
        #: Taken and not granted anew.
        self.taken = 0
        #: (moment, bytes) of what was taken since the last grant; negative where it was put back.
        self.reads: list[tuple[float, int]] = []
        self.is_dropped = False
        self.has_ended = False
        #: A grant waits to be sent.
        self.is_granting = False

    def read(self, size: int, now: float) -> bytes:
        found = self.buffer.take(size)
        self.note(len(found), now)
        return found

    def put_back(self, piece: bytes, now: float) -> None:
        self.buffer.put_back(piece)
        self.note(-len(piece), now)

    def note(self, size: int, now: float) -> None:
        self.unread -= size
        self.taken += size
        self.reads.append((now, size))
        # As a stream does: it asks when half is due; how much there is shows when the grant is sent.
        self.is_granting = self.is_granting or self.buffer.grant_is_due


class Growth(RuleBasedStateMachine):
    """Streams that come, grow and end on one budget; their peers keep to their credit, and grants leave when they may."""

    @initialize(
        window_limit=st.sampled_from([WINDOW, WINDOW + 1, 3 * WINDOW // 2, 4 * WINDOW, 64 * WINDOW]),
        budget=st.sampled_from([WINDOW, 2 * WINDOW + 7, 5 * WINDOW, 100 * WINDOW]),
        rtt=st.sampled_from([None, 0.1, 10.0]),
    )
    def begin(self, window_limit, budget, rtt):
        self.patches = contextlib.ExitStack()
        self.clock = self.patches.enter_context(own_clock())
        self.budget = ReceiveBudget(budget, window_limit)
        self.budget.min_rtt = rtt
        self.receivers = [Receiver(self.budget, 0) for _ in range(3)]

    def teardown(self):
        if hasattr(self, "patches"):
            self.patches.close()

    def chosen(self, number: int) -> Receiver:
        return self.receivers[number % len(self.receivers)]

    @rule(rtt=st.sampled_from([1e-6, 0.1, 10.0]))
    def a_shorter_round_trip_is_measured(self, rtt):
        self.budget.min_rtt = min(rtt, self.budget.min_rtt or rtt)

    @rule(seconds=st.sampled_from([1e-7, 0.02, 0.1, 4.0, 10.0]))
    def time_passes(self, seconds):
        self.clock.now += seconds

    @precondition(lambda self: len(self.receivers) < 6)
    @rule(is_larger=st.booleans())
    def a_stream_begins(self, is_larger):
        extra = min(WINDOW // 3, self.budget.window_limit - WINDOW) if is_larger else 0
        self.receivers.append(Receiver(self.budget, extra))

    @precondition(lambda self: self.receivers)
    @rule(number=st.integers(0, 5), share=st.sampled_from([0.01, 0.3, 0.5, 1.0]))
    def the_peer_sends(self, number, share):
        receiver = self.chosen(number)
        size = int(receiver.credit * share)
        if not size or receiver.has_ended:
            return
        limit = receiver.buffer.limit
        receiver.credit -= size
        receiver.unread += size
        assert receiver.buffer.append(bytes(size))
        assert receiver.buffer.limit == limit
        if receiver.is_dropped:
            receiver.note(size, self.clock.now)

    @precondition(lambda self: any(receiver.unread for receiver in self.receivers))
    @rule(number=st.integers(0, 5), share=st.sampled_from([0.01, 0.3, 0.5, 1.0]))
    def the_application_reads(self, number, share):
        receiver = self.chosen(number)
        if size := int(receiver.unread * share):
            receiver.read(size, self.clock.now)

    @precondition(lambda self: self.receivers)
    @rule(number=st.integers(0, 5), shares=st.lists(st.sampled_from([0.5, 1.0]), min_size=1, max_size=6))
    def bulk_arrives_and_is_read(self, number, shares):
        for share in shares:
            self.the_peer_sends(number, 1.0)
            self.the_application_reads(number, share)
            self.grants_leave()

    @precondition(lambda self: any(receiver.unread for receiver in self.receivers))
    @rule(number=st.integers(0, 5), share=st.sampled_from([0.3, 1.0]), leaves=st.booleans())
    def a_read_fails(self, number, share, leaves):
        """What it took is first in line again; the grant may have left before."""
        receiver = self.chosen(number)
        if size := int(receiver.unread * share):
            piece = receiver.read(size, self.clock.now)
            if leaves:
                self.grants_leave()
            receiver.put_back(piece, self.clock.now)

    @rule()
    def grants_leave(self):
        for receiver in self.receivers:
            if receiver.is_granting and not receiver.has_ended:
                self.grant(receiver)

    def grant(self, receiver: Receiver) -> None:
        buffer, now = receiver.buffer, self.clock.now
        credit = buffer.grant()
        growth = buffer.limit - receiver.limit
        assert credit == max(0, receiver.taken) + growth
        if growth:
            rtt = self.budget.min_rtt
            assert rtt is not None and not receiver.is_dropped
            within = sum(size for moment, size in receiver.reads if now - moment < rtt)
            assert within * 2 >= receiver.limit
            assert 0 < growth <= receiver.limit
            assert self.budget.grown + self.budget.unread <= self.budget.limit
        receiver.limit += growth
        receiver.grown += growth
        receiver.credit += credit
        receiver.taken = min(0, receiver.taken)
        receiver.is_granting = False
        if credit:
            receiver.reads.clear()

    @precondition(lambda self: self.receivers)
    @rule(number=st.integers(0, 5))
    def nobody_will_read(self, number):
        receiver = self.chosen(number)
        if not receiver.is_dropped:
            receiver.is_dropped = True
            assert receiver.buffer.discard(1 << 62)
            receiver.note(receiver.unread, self.clock.now)

    @precondition(lambda self: self.receivers)
    @rule(number=st.integers(0, 5))
    def a_stream_ends(self, number):
        """What is unread may still be read; nothing more comes, and nothing is granted."""
        receiver = self.chosen(number)
        receiver.buffer.release()
        receiver.has_ended, receiver.grown = True, 0

    @precondition(lambda self: any(receiver.has_ended for receiver in self.receivers))
    @rule()
    def ended_streams_are_forgotten(self):
        for receiver in self.receivers:
            if receiver.has_ended:
                receiver.buffer.clear()
        self.receivers = [receiver for receiver in self.receivers if not receiver.has_ended]

    @invariant()
    def window_unread_and_taken_make_the_limit(self):
        for receiver in self.receivers:
            buffer = receiver.buffer
            assert (buffer.limit, buffer.window, buffer.unread) == (receiver.limit, receiver.credit, receiver.unread)
            assert buffer.window + buffer.unread + receiver.taken == buffer.limit
            assert 0 <= buffer.window <= buffer.limit <= max(self.budget.window_limit, WINDOW)

    @invariant()
    def the_budget_holds_what_has_grown_and_what_is_unread(self):
        assert self.budget.grown == sum(receiver.grown for receiver in self.receivers) <= self.budget.limit
        assert self.budget.unread == sum(receiver.unread for receiver in self.receivers)

    @invariant()
    def a_peer_without_credit_has_something_to_wait_for(self):
        """Bytes that the application may read, or a grant that is about to leave."""
        for receiver in self.receivers:
            if not receiver.credit and not receiver.has_ended:
                assert receiver.unread or receiver.is_granting


TestGrowth = Growth.TestCase
TestGrowth.settings = settings(max_examples=150, stateful_step_count=50, deadline=None)


@given(
    turns=st.lists(st.tuples(st.integers(0, 2), st.sampled_from([1, 1000, WINDOW // 2, MIB])), min_size=1, max_size=60),
    window_limit=st.integers(WINDOW, 8 * WINDOW),
    budget=st.integers(WINDOW, 8 * WINDOW),
    seconds=st.sampled_from([0.0, 0.05, 1.0]),
)
@settings(max_examples=60, deadline=None)
def test_a_sender_that_obeys_its_grants_is_never_stopped_for_good(turns, window_limit, budget, seconds):
    """After whatever reads in whatever order, emptying the buffer frees the sender, and all bytes arrive."""
    with own_clock() as clock:
        account = ReceiveBudget(budget, window_limit)
        account.min_rtt = 0.1
        receivers = [Receiver(account, 0) for _ in range(3)]
        for number, size in turns:
            receiver = receivers[number]
            send_all_that_is_allowed(receiver)
            clock.now += seconds
            receiver.read(size, clock.now)
            grant_what_is_due(receiver)
        for receiver in receivers:
            for _ in range(20):
                send_all_that_is_allowed(receiver)
                receiver.read(receiver.unread, clock.now)
                grant_what_is_due(receiver)
                assert receiver.credit * 2 >= receiver.buffer.limit
                assert account.grown <= budget


def send_all_that_is_allowed(receiver: Receiver) -> None:
    if receiver.credit:
        receiver.buffer.append(bytes(receiver.credit))
        receiver.unread += receiver.credit
        receiver.credit = 0


def grant_what_is_due(receiver: Receiver) -> None:
    if receiver.is_granting:
        receiver.credit += receiver.buffer.grant()
        receiver.is_granting = False


@given(st.randoms(use_true_random=False))
def test_all_growth_is_given_back_in_whatever_order_streams_end(random_order):
    with own_clock():
        budget = ReceiveBudget(64 * WINDOW, 16 * WINDOW)
        budget.min_rtt = 1.0
        receivers = [Receiver(budget, 0) for _ in range(8)]
        for receiver in random_order.choices(receivers, k=40):
            send_all_that_is_allowed(receiver)
            receiver.read(receiver.unread, 0.0)
            grant_what_is_due(receiver)
        random_order.shuffle(receivers)
        for number, receiver in enumerate(receivers):
            before, grown = budget.grown, receiver.buffer.limit - WINDOW
            receiver.buffer.release()
            receiver.buffer.release()
            assert budget.grown == before - grown
            assert sum(other.buffer.limit - WINDOW for other in receivers[number + 1 :]) == budget.grown
        assert (budget.grown, budget.room_to_grow) == (0, 64 * WINDOW)


@pytest.mark.parametrize(
    ("reads", "limit"),
    [
        # Each is (seconds since the last, bytes); the round trip is 0.125 s. The first grant begins the measurement.
        ([(0, 131072), (0.124, 131072)], 524288),
        ([(0, 131072), (0.125, 131072)], 262144),
        ([(0, 131072), (0.0625, 65536), (0.0624, 65536)], 524288),
        ([(0, 131072), (0.0625, 65536), (0.0625, 65536)], 262144),
        ([(0, 131072), (0.01, 131071), (9.0, 1)], 262144),
        ([(0, 131072), (9.0, 131072), (0.01, 131072)], 524288),
        ([(0, 131072), (0.01, 131072), (0.01, 262143), (9.0, 1)], 524288),
        ([(0, 131072), (0.01, 131072), (0.01, 262144)], 1048576),
    ],
)
def test_a_window_grows_just_where_half_of_it_is_read_within_the_shortest_round_trip(clock, reads, limit):
    budget = ReceiveBudget(64 * MIB, 16 * MIB)
    budget.min_rtt = 0.125
    receiver = Receiver(budget, 0)
    for seconds, size in reads:
        clock.now += seconds
        send_all_that_is_allowed(receiver)
        receiver.read(size, clock.now)
        grant_what_is_due(receiver)
    assert (receiver.buffer.limit, budget.grown) == (limit, limit - WINDOW)


def test_unread_bytes_of_other_streams_leave_less_to_grow(clock):
    budget = ReceiveBudget(3 * WINDOW, 16 * MIB)
    budget.min_rtt = 0.1
    hoard, receiver = Receiver(budget, 0), Receiver(budget, 0)
    hoard.buffer.append(bytes(WINDOW))
    limits = []
    for _ in range(4):
        send_all_that_is_allowed(receiver)
        receiver.read(receiver.unread, clock.now)
        grant_what_is_due(receiver)
        limits.append(receiver.buffer.limit)
    assert limits == [262144, 524288, 786432, 786432]
    hoard.buffer.clear()
    send_all_that_is_allowed(receiver)
    receiver.read(receiver.unread, clock.now)
    grant_what_is_due(receiver)
    assert (receiver.buffer.limit, budget.room_to_grow) == (1048576, 0)


# --- sessions ---


class Far:
    """The peer, played: it knows of each stream what it may send, from the frames alone."""

    def __init__(self, session: Any, peer: Any) -> None:
        self.session = session
        self.peer = peer
        self.budget = session._table.budget
        #: What may be sent, by stream id.
        self.credit: dict[int, int] = {}
        #: Grants in the order in which they came, by stream id.
        self.grants: dict[int, list[int]] = {}
        self.resets: list[int] = []
        self._next_id = 2 if session.is_client else 1

    def answer_the_ping(self) -> None:
        """The first frame of a session that lets windows grow asks for the round trip."""
        self.peer.send(ping(ACK, self.peer.expect(PING, SYN, 0).length))
        settle()
        assert self.budget.min_rtt is not None

    def stream(self, *, is_ours: bool = True) -> Any:
        """A stream that either side opened, with nothing in it."""
        if is_ours:
            stream = self.session.open()
            found = self.peer.expect(WINDOW_UPDATE, SYN, stream.stream_id)
            self.peer.send(window_update(stream.stream_id, 0, ACK))
        else:
            self.peer.send(window_update(self._next_id, 0, SYN))
            self._next_id += 2
            stream = self.session.accept(timeout=5)
            found = self.peer.expect(WINDOW_UPDATE, ACK, stream.stream_id)
        self.credit[stream.stream_id] = WINDOW + found.length
        self.grants[stream.stream_id] = []
        settle()
        return stream

    def send(self, stream: Any, size: int | None = None, frame: int = 65536) -> None:
        """Send so many bytes, or all that may be sent."""
        stream_id = stream.stream_id
        rest = self.credit[stream_id] if size is None else size
        self.credit[stream_id] -= rest
        while rest:
            self.peer.send(data(stream_id, bytes(min(frame, rest))))
            rest -= min(frame, rest)
        settle()

    def read(self, stream: Any, size: int) -> None:
        """Let the application take so many bytes, which are there, in one call."""
        assert len(stream.recv(size)) == size
        self.hear()

    def hear(self) -> None:
        """Take all frames that are there."""
        settle()
        while (hearing := start(self.peer.next)).ready():
            found = hearing.get()
            assert found.type in (WINDOW_UPDATE, PING), found
            if found.type == WINDOW_UPDATE and not found.flags:
                self.credit[found.stream_id] += found.length
                self.grants[found.stream_id].append(found.length)
            elif found.flags & RST:
                self.resets.append(found.stream_id)
        hearing.kill()

    def round(self, stream: Any) -> None:
        """A window full of bytes comes, and is read."""
        size = self.credit[stream.stream_id]
        self.send(stream)
        self.read(stream, size)

    def grow(self, stream: Any, rounds: int = 2) -> int:
        """Read as fast as can be; the limit that comes of it. The first round only begins the measurement."""
        for _ in range(rounds):
            self.round(stream)
        return stream.stats().receive_limit


@contextlib.contextmanager
def growing(role: str = "client", *, answered: bool = True, **config: Any) -> Iterator[Far]:
    settings = {"window_auto_tune": True, "keepalive_interval": None, **config}
    with facing(role, Config(**settings), kind="memory") as (session, peer):
        far = Far(session, peer)
        if answered:
            far.answer_the_ping()
        yield far


@pytest.mark.parametrize("is_ours", [True, False], ids=["ours", "theirs"])
@pytest.mark.parametrize("role", ROLES)
def test_a_grant_that_lets_a_window_grow_is_literally_this(clock, role, is_ours):
    """spec.md, 6.5: 131,072 were taken, and 262,144 are new."""
    with growing(role) as far:
        stream = far.stream(is_ours=is_ours)
        far.round(stream)
        assert far.grants[stream.stream_id] == [262144]
        far.send(stream)
        assert stream.recv(131072) == bytes(131072)
        found = far.peer.next()
        assert (found.type, found.flags, found.stream_id, found.length) == (1, 0, stream.stream_id, 393216)
        stats = stream.stats()
        assert (stats.unread, stats.receive_window, stats.receive_limit) == (131072, 393216, 524288)
        assert far.budget.grown == 262144
        far.peer.expect_nothing()


@pytest.mark.parametrize(
    ("setting", "limits"),
    [
        (False, [262144] * 4),
        (262144, [262144] * 4),
        (262145, [262144, 262145, 262145, 262145]),
        (1 << 20, [262144, 524288, 1048576, 1048576]),
        (True, [262144, 524288, 1048576, 2097152]),
    ],
)
def test_a_window_grows_as_far_as_the_setting_says(clock, setting, limits):
    with growing(answered=False, window_auto_tune=setting) as far:
        if setting:
            far.answer_the_ping()
        stream = far.stream()
        assert stream.stats().receive_limit == 262144
        assert [far.grow(stream, 1) for _ in range(4)] == limits
        assert far.budget.grown == limits[-1] - 262144


def test_the_largest_window_is_sixteen_mebibytes(clock):
    with growing() as far:
        stream = far.stream()
        assert far.grow(stream, 9) == 16 * MIB
        assert far.credit[stream.stream_id] == 16 * MIB


def test_no_window_grows_before_the_peer_has_answered_a_ping(clock):
    with growing(answered=False) as far:
        question = far.peer.expect(PING, SYN, 0)
        stream = far.stream()
        assert far.grow(stream, 4) == 262144
        assert set(far.grants[stream.stream_id]) == {262144}
        far.peer.send(ping(ACK, question.length))
        settle()
        assert far.grow(stream, 1) == 524288


def test_an_answer_that_was_not_asked_for_lets_no_window_grow(clock):
    with growing(answered=False) as far:
        question = far.peer.expect(PING, SYN, 0)
        far.peer.send(ping(ACK, (question.length + 1) & 0xFFFFFFFF))
        stream = far.stream()
        assert far.grow(stream, 3) == 262144


def test_a_stream_that_is_read_slowly_does_not_grow(clock):
    with growing() as far:
        stream = far.stream()
        for _ in range(5):
            clock.now += HOUR
            far.round(stream)
        assert stream.stats().receive_limit == 262144
        assert far.budget.grown == 0


@pytest.mark.parametrize("is_ours", [True, False], ids=["ours", "theirs"])
@pytest.mark.parametrize("frame", [262144, 65536, 1024])
def test_a_stream_that_nobody_reads_never_grows(clock, is_ours, frame):
    """Nor by others that do, nor because somebody looks without taking."""
    with growing() as far:
        unread, busy = far.stream(is_ours=is_ours), far.stream()
        for part in (65536, 131072, 65536):
            far.send(unread, part, frame)
            assert unread.peek(10)[:10] == bytes(10)
            far.round(busy)
        far.hear()
        assert far.grants[unread.stream_id] == []
        stats = unread.stats()
        assert (stats.unread, stats.receive_window, stats.receive_limit) == (262144, 0, 262144)
        assert far.budget.grown == busy.stats().receive_limit - 262144 > 0


def test_a_stream_that_nobody_accepts_never_grows(clock):
    with growing() as far:
        far.peer.send(window_update(2, 0, SYN) + data(2, bytes(262144)))
        far.hear()
        assert far.grants == {}
        assert far.budget.grown == 0
        assert far.session.accept(timeout=5).stats().receive_limit == 262144


@pytest.mark.parametrize("way", ["close", "shutdown"])
def test_a_stream_whose_bytes_are_dropped_never_grows(clock, way):
    """Dropped bytes are credited, and nobody reads them."""
    with growing() as far:
        stream = far.stream()
        far.round(stream)
        if way == "shutdown":
            stream.shutdown(0)
        else:
            stream.close()
            settle()
            far.peer.expect(WINDOW_UPDATE, FIN, stream.stream_id)
        for _ in range(4):
            far.send(stream, 65536)
            far.hear()
        assert sum(far.grants[stream.stream_id]) == 2 * 262144
        assert (stream.stats().receive_limit, far.budget.grown) == (262144, 0)


def test_reads_that_take_nothing_new_let_no_window_grow(clock):
    """They time out half-way again and again: what they took is unread again."""
    with growing() as far:
        stream = far.stream()
        far.round(stream)
        far.send(stream, 131072 - 1)
        stream.settimeout(0.0)
        for _ in range(20):
            with pytest.raises(BlockingIOError):
                stream.read(262144)
            far.hear()
        assert stream.stats().unread == 131071
        assert (stream.stats().receive_limit, far.budget.grown) == (262144, 0)


def test_a_grant_that_a_failed_read_left_little_of_lets_no_window_grow(clock):
    """Half was taken, a grant was on its way, and all but 1,000 bytes were put back before it left."""
    with growing() as far:
        stream = far.stream()
        far.round(stream)
        far.send(stream, 1000 + 131072)
        far.read(stream, 1000)
        reading = gevent.spawn(stream.read, MIB)
        gevent.sleep(0)
        reading.kill()
        far.hear()
        stats = stream.stats()
        assert stats.unread == 131072
        assert (stats.receive_limit, far.budget.grown) == (262144, 0)


# --- a window that has grown ---


@pytest.mark.parametrize("budget", [262144, 300_000, MIB, 3 * MIB])
def test_a_single_stream_never_grows_beyond_what_the_session_holds_unread(clock, budget):
    """Its peer does what it was granted; it must not be reset for it."""
    with growing(receive_budget=budget) as far:
        stream = far.stream()
        assert far.grow(stream, 7) <= budget
        far.send(stream)
        assert stream.stats().unread == far.session.stats().unread > 0
        assert far.resets == []


@pytest.mark.parametrize("is_ours", [True, False], ids=["ours", "theirs"])
@pytest.mark.parametrize("role", ROLES)
def test_a_window_that_has_grown_outlives_its_buffer_being_empty(clock, role, is_ours):
    """The peer may use every byte of it, at any later time, whether anybody waits for them or not."""
    with growing(role, window_auto_tune=MIB) as far:
        stream = far.stream(is_ours=is_ours)
        assert far.grow(stream, 3) == MIB
        stats = stream.stats()
        assert (stats.unread, stats.receive_window) == (0, MIB)
        for seconds in (HOUR, 0.0):
            clock.now += seconds
            for size in (1, 100, 30000):
                reading = start(stream.recv, 65536)
                far.send(stream, size)
                assert outcome(reading) == bytes(size)
            far.hear()
            allowed = far.credit[stream.stream_id]
            assert allowed > MIB // 2
            far.send(stream, allowed, frame=MIB)
            assert stream.stats().unread == allowed
            far.read(stream, allowed)
        assert far.session.closed is False
        assert far.budget.grown == MIB - WINDOW


def test_one_byte_more_than_a_grown_window_breaks_the_protocol(clock):
    with growing(window_auto_tune=MIB) as far:
        stream = far.stream()
        far.grow(stream, 3)
        far.send(stream)
        far.peer.send(data(stream.stream_id, b"x"))
        settle()
        assert stream.recv(MIB) == bytes(MIB)
        with pytest.raises(ProtocolError, match=r"sent 1 bytes into a window of 0"):
            stream.recv(1)


def test_late_bytes_up_to_a_grown_window_are_nobodys_fault(clock):
    """They cross with our reset; the peer was allowed to send them."""
    with growing(window_auto_tune=MIB) as far:
        stream = far.stream()
        far.grow(stream, 3)
        before = far.session._table._useless_left
        stream.reset()
        far.send(stream, MIB)
        assert far.session.closed is False
        assert far.session._table._useless_left == before


# --- giving back ---


def both_finish(far: Far, stream: Any) -> None:
    stream.close()
    far.peer.send(window_update(stream.stream_id, 0, FIN))


def peer_finishes_first(far: Far, stream: Any) -> None:
    far.peer.send(window_update(stream.stream_id, 0, FIN))
    settle()
    assert stream.recv(1) == b""
    stream.close()


def unread_and_forgotten(far: Far, stream: Any) -> None:
    far.send(stream, 1000)
    stream.close()
    far.peer.send(window_update(stream.stream_id, 0, FIN))


def peer_goes_on_after_close(far: Far, stream: Any) -> None:
    """... by more than a window: it is reset."""
    stream.close()
    far.hear()
    far.send(stream)
    far.hear()
    far.send(stream)


def hoards_too_much(far: Far, stream: Any) -> None:
    """Unread bytes alone pass the budget of the session: the one that hoards most is reset."""
    others = [far.stream() for _ in range(2)]
    far.send(stream)
    for other in others:
        far.send(other)
    with pytest.raises(StreamReset):
        stream.recv(1)
    for other in others:
        far.read(other, 262144)


STREAM_ENDS = {
    "both finish": both_finish,
    "the peer finishes first": peer_finishes_first,
    "reset here": lambda far, stream: stream.reset(5),
    "reset by the peer": lambda far, stream: far.peer.send(window_update(stream.stream_id, 5, RST)),
    "reset by the peer, bytes unread": lambda far, stream: (
        far.send(stream, 1000),
        far.peer.send(window_update(stream.stream_id, 5, RST)),
    ),
    "closed with unread bytes": unread_and_forgotten,
    "the peer goes on after a close": peer_goes_on_after_close,
    "reset for hoarding": hoards_too_much,
}


@pytest.mark.parametrize("is_ours", [True, False], ids=["ours", "theirs"])
@pytest.mark.parametrize("end", STREAM_ENDS.values(), ids=STREAM_ENDS.keys())
def test_what_a_window_grew_by_is_given_back_when_its_stream_ends(clock, end, is_ours):
    with growing(receive_budget=MIB, window_auto_tune=786432) as far:
        stream = far.stream(is_ours=is_ours)
        assert far.grow(stream, 3) == 786432
        assert far.budget.grown == 524288
        end(far, stream)
        settle()
        assert far.budget.grown == 0
        assert far.session.closed is False
        # Nothing that comes later takes it away once more, or brings it back.
        stream.close()
        far.hear()
        assert far.budget.grown == 0
        assert far.grow(far.stream(), 3) == 786432


def test_another_stream_grows_by_what_was_given_back(clock):
    with growing(receive_budget=MIB, window_auto_tune=786432) as far:
        first, second, third = (far.stream() for _ in range(3))
        assert far.grow(first, 6) == far.grow(second, 6) == 786432
        assert far.budget.room_to_grow == 0
        assert far.grow(third, 4) == 262144
        first.reset()
        assert far.grow(third, 1) == 524288
        assert far.grow(third, 2) == 786432
        assert far.budget.room_to_grow == 0


def finished_here(far: Far, stream: Any) -> None:
    stream.close_write()
    settle()


def finished_by_the_peer(far: Far, stream: Any) -> None:
    far.peer.send(window_update(stream.stream_id, 0, FIN))
    settle()


STATES = {
    "open": lambda far, stream: None,
    "finished here": finished_here,
    "finished by the peer": finished_by_the_peer,
    "closed": lambda far, stream: (stream.close(), settle()),
    "bytes unread": lambda far, stream: far.send(stream, 1000),
    "finished here, bytes unread": lambda far, stream: (finished_here(far, stream), far.send(stream, 1000)),
}
SESSION_ENDS = {
    "abort": lambda far: far.session.abort(),
    "close": lambda far: start(far.session.close),
    "the connection ends": lambda far: far.peer.close(),
    "the peer breaks the protocol": lambda far: far.peer.send(b"\xff" * 12),
    "the peer reports an error": lambda far: far.peer.send(go_away(2)),
}


@pytest.mark.parametrize("state", STATES.values(), ids=STATES.keys())
@pytest.mark.parametrize("end", SESSION_ENDS.values(), ids=SESSION_ENDS.keys())
def test_what_windows_grew_by_is_given_back_when_the_session_ends(clock, end, state):
    with growing(close_timeout=0.05) as far:
        streams = [far.stream(is_ours=is_ours) for is_ours in (True, False)]
        for stream in streams:
            assert far.grow(stream) == 524288
            state(far, stream)
        end(far)
        far.peer.close()
        assert far.session.join(5)
        settle()
        assert far.budget.grown == 0
        for stream in streams:
            stream.close()
        assert (far.budget.grown, far.budget.unread) == (0, 0)


# --- many at once ---


def test_many_streams_that_grow_at_once_stay_within_the_budget(clock):
    with growing(receive_budget=8 * MIB) as far:
        streams = [far.stream(is_ours=number % 2 == 0) for number in range(20)]
        order = random.Random(11)
        for _ in range(4):
            order.shuffle(streams)
            for stream in streams:
                before = far.budget.grown
                far.round(stream)
                if far.budget.grown > before:
                    assert far.budget.grown + far.budget.unread <= 8 * MIB
                assert far.budget.grown == sum(other.stats().receive_limit - WINDOW for other in streams) <= 8 * MIB
        assert far.budget.grown == 8 * MIB
        assert len({stream.stats().receive_limit for stream in streams}) > 1
        for count, stream in enumerate(streams, 1):
            stream.reset()
            assert far.budget.grown == sum(other.stats().receive_limit - WINDOW for other in streams[count:])
        assert far.budget.grown == 0


steps = st.lists(
    st.tuples(
        st.sampled_from(["send", "send", "read", "read", "both", "both", "wait", "reset", "finish"]),
        st.integers(0, 3),
        st.sampled_from([0.1, 0.5, 1.0]),
    ),
    max_size=25,
)


@given(steps, st.sampled_from([262144, MIB, 3 * MIB]), st.sampled_from([262144, 300_000, MIB]))
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_credit_and_limits_agree_on_both_sides_whatever_happens(steps, budget, start_window):
    """The peer's count of its credit, from frames alone, is the window; with what is unread it makes the limit."""
    limit = max(MIB, start_window)
    with (
        own_clock() as clock,
        growing(receive_budget=max(budget, start_window), window_auto_tune=limit, max_stream_window=start_window) as far,
    ):
        streams = [far.stream(is_ours=number % 2 == 0) for number in range(4)]
        live = dict.fromkeys(streams, 0)
        for what, number, share in steps:
            stream = streams[number]
            if what == "wait":
                clock.now += HOUR
            elif stream not in live:
                continue
            if what in ("send", "both"):
                far.send(stream, min(int(far.credit[stream.stream_id] * share), far.budget.limit - far.budget.unread))
            if what in ("read", "both") and (size := int(stream.stats().unread * share)):
                before = far.budget.grown
                far.read(stream, size)
                live[stream] += size
                growth = far.budget.grown - before
                assert not growth or far.budget.grown + far.budget.unread <= far.budget.limit
            if what in ("reset", "finish"):
                stream.reset() if what == "reset" else both_finish(far, stream)
                far.resets.clear()
                del live[stream]
                drain(far)
            check(far, live, start_window, limit)
        assert far.session.closed is False


def drain(far: Far) -> None:
    """Let what the end of a stream sends go by."""
    settle()
    while (hearing := start(far.peer.next)).ready():
        assert hearing.get().flags & (RST | FIN)
    hearing.kill()


def check(far: Far, live: dict[Any, int], start_window: int, limit: int) -> None:
    grown = 0
    for stream, taken in live.items():
        stats = stream.stats()
        assert stats.receive_window == far.credit[stream.stream_id]
        assert start_window <= stats.receive_limit <= limit
        growth = stats.receive_limit - start_window
        granted = sum(far.grants[stream.stream_id]) - growth
        assert 0 <= (taken - granted) * 2 < stats.receive_limit
        assert stats.receive_window + stats.unread + taken - granted == stats.receive_limit
        grown += growth
    assert far.budget.grown == grown <= far.budget.limit
    assert far.budget.unread == sum(stream.stats().unread for stream in live)


# --- two sessions ---


@pytest.mark.parametrize("budget", [262144, 600_000, 8 * MIB])
def test_bulk_arrives_whole_on_streams_that_grow_and_end_all_the_time(clock, budget):
    """Readers of every pace, on a budget that is too small for all of them to grow, and no byte or stream is lost."""
    config = Config(window_auto_tune=True, receive_budget=max(budget, 8 * 262144), stream_timeout=20)
    grown = []

    def write(stream, size):
        with stream:
            stream.sendall(bytes(size))

    def read(stream, pace):
        total = 0
        with stream:
            while piece := stream.recv(pace):
                total += len(piece)
                grown.append(server._table.budget.grown)
                assert server._table.budget.grown <= config.receive_budget
        return total

    with sessions("socketpair", None, config) as (client, server):
        client.ping(5)
        assert server.ping(5) > 0
        sizes = [1, 262144, 262145, 3 * MIB, 2 * MIB, MIB, 524288, 3 * MIB]
        writers = [gevent.spawn(write, client.open(), size) for size in sizes]
        readers = [
            gevent.spawn(read, server.accept(timeout=5), pace)
            for pace in (65536, 4096, MIB, 262144, 131072, 100_000, 16384, 65536)
        ]
        assert sorted(reader.get(timeout=20) for reader in readers) == sorted(sizes)
        gevent.joinall(writers, timeout=20, raise_error=True)
        settle()
        assert max(grown) > 0
        assert (server._table.budget.grown, server._table.budget.unread) == (0, 0)
