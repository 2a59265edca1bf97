"""Unread bytes and the window of the peer as one object, against plain models."""

from __future__ import annotations

import itertools
import time
import tracemalloc

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from geyamux import flow
from geyamux.errors import ProtocolError
from geyamux.flow import ReceiveBudget, ReceiveBuffer, widen

WINDOW = 262144

# Long and short pieces, with and without newlines: joined or kept apart.
payloads = st.one_of(
    st.binary(min_size=1, max_size=40),
    st.sampled_from([b"\n", b"a\n", b"\n\n", b"x"]),
    st.integers(4090, 4100).map(lambda size: (b"0123456789abcde\n" * 257)[:size]),
    st.integers(16380, 16390).map(lambda size: b"y" * size),
)
sizes = st.one_of(st.integers(1, 50), st.integers(4000, 40000))


class Clock:
    """The monotonic clock, moved by the test."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(flow.time, "monotonic", clock)
    return clock


def make(limit: int = WINDOW, budget: int = 1 << 30, window_limit: int | None = None) -> ReceiveBuffer:
    return ReceiveBuffer(ReceiveBudget(budget, window_limit or limit), limit)


# --- a stream against a model ---


class Receiving(RuleBasedStateMachine):
    """A peer that keeps to its window, and an application that reads in every way there is.

    The model is plain: the unread bytes, what may still be sent, and what was taken and not granted anew.
    """

    @initialize(extra=st.sampled_from([0, 0, 100_000]))
    def begin(self, extra):
        self.budget = ReceiveBudget(1 << 30, WINDOW + extra)
        self.buffer = ReceiveBuffer(self.budget)
        self.buffer.extend_limit(extra)
        self.limit = self.window = WINDOW + extra
        self.data = b""
        self.taken = 0
        self.given = 0  # taken from the model in all, minus what was put back
        self.granted = 0

    @rule(payload=payloads)
    def the_peer_sends(self, payload):
        payload = payload[: self.window]
        if payload:
            assert self.buffer.append(payload)
            self.data += payload
            self.window -= len(payload)

    @precondition(lambda self: self.data)
    @rule(size=sizes)
    def take(self, size):
        self._taken(self.buffer.take(size), self.data[:size])

    @precondition(lambda self: self.data)
    @rule(size=sizes)
    def take_a_line(self, size):
        end = self.data.find(b"\n") + 1 or len(self.data)
        self._taken(self.buffer.take_line(size), self.data[: min(size, end)])

    @rule(size=sizes)
    def peek(self, size):
        assert self.buffer.peek(size) == self.data[:size]

    @precondition(lambda self: self.data)
    @rule(sizes=st.lists(sizes, min_size=1, max_size=4), grants=st.booleans())
    def a_read_fails_half_way(self, sizes, grants):
        pieces = b""
        for size in sizes:
            if len(pieces) == len(self.data):
                break
            pieces += self.buffer.take(size)
        assert pieces == self.data[: len(pieces)]
        if grants:
            self.taken += len(pieces)
            self._grant()
            self.taken -= len(pieces)
        self.buffer.put_back(pieces)

    @rule()
    def put_nothing_back(self):
        self.buffer.put_back(b"")

    @rule()
    def grant(self):
        self._grant()

    @rule()
    def forget_what_is_unread(self):
        assert self.buffer.clear() == len(self.data)
        self.taken += len(self.data)
        self.data = b""

    def _grant(self):
        due = max(0, self.taken)
        assert self.buffer.grant() == due
        self.taken -= due
        self.window += due

    def _taken(self, found, expected):
        assert type(found) is bytes
        assert found == expected
        self.data = self.data[len(expected) :]
        self.taken += len(expected)

    @invariant()
    def window_unread_and_taken_make_the_limit(self):
        buffer = self.buffer
        assert buffer.window == self.window
        assert buffer.unread == len(self.data)
        assert buffer.due == self.taken
        assert buffer.limit == self.limit
        assert buffer.window + buffer.unread + self.taken == buffer.limit

    @invariant()
    def the_budget_counts_what_is_unread(self):
        assert self.budget.unread == len(self.data)
        assert self.budget.grown == 0

    @invariant()
    def credit_is_due_from_half_a_window_on(self):
        assert self.buffer.grant_is_due == (self.taken >= self.limit / 2)


TestReceiving = Receiving.TestCase
TestReceiving.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)


class Growing(RuleBasedStateMachine):
    """Several streams whose windows grow, on one budget, with clock and round trip at will."""

    LIMIT = 4 * WINDOW
    BUDGET = 6 * WINDOW

    @initialize()
    def begin(self):
        self.patch = pytest.MonkeyPatch()
        self.clock = Clock()
        self.patch.setattr(flow.time, "monotonic", self.clock)
        self.budget = ReceiveBudget(self.BUDGET, self.LIMIT)
        self.buffers = [ReceiveBuffer(self.budget) for _ in range(3)]
        self.taken = [0, 0, 0]
        self.grown = [0, 0, 0]
        self.released = [False] * 3

    def teardown(self):
        if hasattr(self, "patch"):
            self.patch.undo()

    @rule(rtt=st.sampled_from([0.001, 0.1, 10.0]))
    def a_round_trip_is_measured(self, rtt):
        self.budget.min_rtt = rtt

    @rule(seconds=st.sampled_from([0.0005, 0.05, 5.0]))
    def time_passes(self, seconds):
        self.clock.now += seconds

    @rule(index=st.integers(0, 2), share=st.sampled_from([0.1, 0.5, 1.0]))
    def the_peer_sends(self, index, share):
        size = int(self.buffers[index].window * share)
        if size and not self.released[index]:
            self.buffers[index].append(b"x" * size)

    @rule(index=st.integers(0, 2), share=st.sampled_from([0.1, 0.5, 1.0]))
    def the_application_reads(self, index, share):
        size = int(self.buffers[index].unread * share)
        if size:
            self.taken[index] += len(self.buffers[index].take(size))

    @rule(index=st.integers(0, 2))
    def credit_is_granted(self, index):
        buffer, before = self.buffers[index], self.buffers[index].limit
        spare = max(0, self.BUDGET - self.budget.unread - self.budget.grown)
        if self.released[index]:
            return
        credit = buffer.grant()
        growth = buffer.limit - before
        if not self.taken[index]:
            assert (credit, growth) == (0, 0)
        assert credit == self.taken[index] + growth
        assert growth <= min(before, self.LIMIT - before, spare)
        assert self.budget.min_rtt is not None or not growth
        self.taken[index] = 0
        self.grown[index] += growth

    @rule(index=st.integers(0, 2))
    def the_stream_ends(self, index):
        self.buffers[index].release()
        self.grown[index] = 0
        self.released[index] = True

    @invariant()
    def growth_is_drawn_from_the_budget_and_given_back(self):
        assert self.budget.grown == sum(self.grown)
        assert self.budget.unread == sum(buffer.unread for buffer in self.buffers)
        assert self.budget.grown <= self.BUDGET
        assert self.budget.room_to_grow == max(0, self.BUDGET - self.budget.grown - self.budget.unread)

    @invariant()
    def window_unread_and_taken_make_the_limit(self):
        for buffer, taken in zip(self.buffers, self.taken, strict=True):
            assert buffer.window + buffer.unread + taken == buffer.limit <= self.LIMIT


TestGrowing = Growing.TestCase
TestGrowing.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)


# --- growth, told as stories ---


def read_all(buffer: ReceiveBuffer) -> None:
    buffer.append(b"x" * buffer.window)
    buffer.take(buffer.unread)


def test_a_window_doubles_while_half_of_it_is_taken_within_a_round_trip(clock):
    buffer = make(window_limit=1 << 20)
    buffer._budget.min_rtt = 0.1
    read_all(buffer)
    assert buffer.grant() == 262144  # nothing was granted before: there is no time to compare
    limits = []
    for _ in range(4):
        clock.now += 0.05
        read_all(buffer)
        buffer.grant()
        limits.append(buffer.limit)
    assert limits == [524288, 1048576, 1048576, 1048576]
    assert buffer.window == 1048576


def test_a_window_does_not_grow_where_reading_takes_longer_than_a_round_trip(clock):
    buffer = make(window_limit=1 << 20)
    buffer._budget.min_rtt = 0.1
    for _ in range(5):
        clock.now += 0.1
        read_all(buffer)
        assert buffer.grant() == 262144
    assert buffer.limit == 262144


def test_a_window_does_not_grow_before_a_round_trip_was_measured(clock):
    buffer = make(window_limit=1 << 20)
    for _ in range(3):
        read_all(buffer)
        assert buffer.grant() == 262144


def test_a_stream_nobody_reads_never_grows(clock):
    buffer = make(window_limit=1 << 20)
    buffer._budget.min_rtt = 10.0
    for _ in range(100):
        clock.now += 0.001
        if buffer.window:
            buffer.append(b"x" * min(buffer.window, 5000))
        assert buffer.grant() == 0
    assert (buffer.limit, buffer._budget.grown) == (262144, 0)


def test_growth_stops_where_the_budget_ends_and_goes_on_when_it_is_given_back(clock):
    budget = ReceiveBudget(3 * WINDOW, 4 * WINDOW)
    budget.min_rtt = 1.0
    first, second = ReceiveBuffer(budget), ReceiveBuffer(budget)
    for _ in range(4):
        read_all(first)
        first.grant()
    assert (first.limit, budget.grown, budget.room_to_grow) == (4 * WINDOW, 3 * WINDOW, 0)
    for _ in range(2):
        read_all(second)
        assert second.grant() == WINDOW
    first.release()
    assert (budget.grown, budget.room_to_grow) == (0, 3 * WINDOW)
    read_all(second)
    assert second.grant() == 2 * WINDOW
    first.release()
    assert budget.grown == WINDOW


# --- what nobody reads ---


def test_what_is_dropped_is_due_as_if_it_had_been_taken():
    buffer = make()
    buffer.append(b"x" * 1000)
    assert buffer.discard(WINDOW)
    assert (buffer.unread, buffer.due, buffer.peek(10)) == (0, 1000, b"")
    assert buffer.append(b"y" * 130072)
    assert (buffer.unread, buffer.due, buffer.window) == (0, 131072, 131072)
    assert buffer.grant_is_due
    assert buffer.grant() == 131072
    assert buffer._budget.unread == 0


def test_dropping_ends_when_the_allowance_is_used_up():
    buffer = make()
    assert buffer.discard(1000)
    assert buffer.append(b"x" * 1000)
    assert not buffer.append(b"y")


def test_dropping_may_be_refused_at_once():
    buffer = make()
    buffer.append(b"x" * 1001)
    assert not buffer.discard(1000)
    assert buffer.unread == buffer._budget.unread == 0


@given(st.lists(st.integers(1, 3000), max_size=20), st.integers(0, 30000), st.integers(0, 5000))
def test_dropping_lasts_exactly_as_long_as_the_allowance(lengths, allowance, unread):
    buffer = make()
    buffer.append(b"u" * unread)
    left = allowance - unread
    assert buffer.discard(allowance) == (left >= 0)
    for length in lengths:
        left -= length
        assert buffer.append(b"x" * length) == (left >= 0)
    assert buffer.unread == buffer._budget.unread == 0


# --- putting back ---


def test_bytes_put_back_are_first_in_line_and_hold_credit_up():
    buffer = make()
    buffer.append(b"x" * WINDOW)
    head = buffer.take(200_000)
    assert buffer.grant() == 200_000
    buffer.put_back(head)
    assert (buffer.unread, buffer.due) == (WINDOW, -200_000)
    buffer.append(b"y" * 200_000)
    assert buffer.take(WINDOW) == b"x" * WINDOW
    assert (buffer.grant(), buffer.due) == (62144, 0)
    assert buffer.take(WINDOW) == b"y" * 200_000
    assert buffer.grant() == 200_000


def test_putting_back_into_the_middle_of_a_piece_keeps_the_order():
    buffer = make()
    buffer.append(b"abcdef" * 1000)
    head = buffer.take(4)
    buffer.put_back(head)
    assert buffer.take(6000) == b"abcdef" * 1000
    buffer.put_back(b"gone")
    assert buffer.peek(10) == b"gone"


def test_putting_back_before_a_whole_piece_keeps_the_order():
    buffer = make()
    buffer.append(b"a" * 5000)
    buffer.append(b"b" * 5000)
    buffer.put_back(buffer.take(5000))
    assert buffer.take(10000) == b"a" * 5000 + b"b" * 5000


def test_what_nobody_will_read_is_not_put_back():
    buffer = make()
    buffer.append(b"x" * 1000)
    head = buffer.take(400)
    assert buffer.discard(WINDOW)
    buffer.put_back(head)
    assert buffer.unread == buffer._budget.unread == 0
    assert buffer.due == 1000


# --- cost ---


def fill_with_single_bytes(buffer: ReceiveBuffer, count: int) -> None:
    for _ in range(count):
        buffer.append(b"z")


def test_a_window_of_single_bytes_costs_less_than_two_mebibytes():
    buffer = make()
    tracemalloc.start()
    try:
        before, _ = tracemalloc.get_traced_memory()
        fill_with_single_bytes(buffer, WINDOW)
        after, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert after - before < 1 << 20
    assert peak - before < 2 << 20
    assert buffer.unread == WINDOW
    assert buffer.take(WINDOW) == b"z" * WINDOW


@pytest.mark.parametrize("size", [1, 7, 4096, 1 << 20])
def test_a_window_of_single_bytes_reads_back_whole_in_any_size(size):
    buffer = make()
    fill_with_single_bytes(buffer, WINDOW)
    pieces = []
    while buffer.unread:
        pieces.append(buffer.take(size))
    assert {len(piece) for piece in pieces[:-1]} <= {size}
    assert b"".join(pieces) == b"z" * WINDOW


def _seconds_for(work, count: int) -> float:
    """The least of several measurements: whatever disturbs can only lengthen one."""
    best = float("inf")
    for _ in range(5):
        buffer = make(limit=count)
        began = time.perf_counter()
        work(buffer, count)
        best = min(best, time.perf_counter() - began)
    return best


def _bytes_out_of_one_piece(buffer: ReceiveBuffer, count: int) -> None:
    buffer.append(b"z" * count)
    while buffer.unread:
        buffer.take(1)


def _bytes_in_and_out(buffer: ReceiveBuffer, count: int) -> None:
    fill_with_single_bytes(buffer, count)
    while buffer.unread:
        buffer.take(1)


def _bytes_in_and_all_out(buffer: ReceiveBuffer, count: int) -> None:
    fill_with_single_bytes(buffer, count)
    buffer.take(count)


def _lines_out(buffer: ReceiveBuffer, count: int) -> None:
    buffer.append(b"z\n" * (count // 2))
    while buffer.unread:
        buffer.take_line(1 << 20)


def _a_read_behind_by_one(buffer: ReceiveBuffer, count: int) -> None:
    buffer.append(b"z")
    for _ in range(count - 1):
        buffer.append(b"z")
        buffer.take(1)


@pytest.mark.parametrize(
    "work",
    [_bytes_out_of_one_piece, _bytes_in_and_out, _bytes_in_and_all_out, _lines_out, _a_read_behind_by_one],
    ids=lambda work: work.__name__.strip("_"),
)
def test_twice_as_many_bytes_take_about_twice_as_long(work):
    small, large = _seconds_for(work, 40_000), _seconds_for(work, 160_000)
    # Four times as much: linear is a factor of 4, quadratic 16.
    assert large < small * 9


# --- the peer's credit ---


def test_credit_is_added():
    assert widen(262144, 5, 1) == 262149
    assert widen(0, 0xFFFFFFFF, 1) == 0xFFFFFFFF
    assert widen(0xFFFFFFFF, 0, 1) == 0xFFFFFFFF


@pytest.mark.parametrize(("credit", "delta"), [(0xFFFFFFFF, 1), (1, 0xFFFFFFFF), (262144, 0xFFFFFFFF - 262143)])
def test_credit_beyond_32_bits_breaks_the_protocol(credit, delta):
    with pytest.raises(ProtocolError, match=rf"stream 7.*overflows 32 bits \({credit + delta}\)"):
        widen(credit, delta, 7)


@given(st.integers(0, 0xFFFFFFFF), st.integers(0, 0xFFFFFFFF))
def test_credit_is_the_sum_or_an_error(credit, delta):
    if credit + delta <= 0xFFFFFFFF:
        assert widen(credit, delta, 1) == credit + delta
    else:
        with pytest.raises(ProtocolError):
            widen(credit, delta, 1)


# --- buffers that are put away ---


def test_an_empty_buffer_is_put_away_and_its_successor_knows_what_was_taken():
    budget = ReceiveBudget(1 << 20, WINDOW)
    buffer = ReceiveBuffer(budget, WINDOW)
    buffer.append(b"x" * 100)
    assert buffer.take(100) == b"x" * 100
    assert buffer.taken_alone() == 100
    buffer.put_away()
    again = ReceiveBuffer.with_taken(budget, WINDOW, 100)
    assert again is buffer
    assert (again.window, again.due, again.unread) == (WINDOW - 100, 100, 0)
    assert ReceiveBuffer.with_taken(budget, 2 * WINDOW, 7).window == 2 * WINDOW - 7


@pytest.mark.parametrize("why", ["credit is due", "bytes are dropped", "the window may grow", "the window has grown"])
def test_a_buffer_that_has_more_to_remember_is_kept(why):
    budget = ReceiveBudget(1 << 20, 2 * WINDOW if why == "the window may grow" else WINDOW)
    buffer = ReceiveBuffer(budget, WINDOW)
    size = WINDOW // 2 if why == "credit is due" else 100
    buffer.append(b"x" * size)
    buffer.take(size)
    if why == "bytes are dropped":
        buffer.discard(100)
    if why == "the window has grown":
        buffer._grown = 1
    assert buffer.taken_alone() == -1


def test_only_so_many_buffers_are_kept_for_others():
    budget = ReceiveBudget(1 << 20, WINDOW)
    for buffer in [ReceiveBuffer(budget, WINDOW) for _ in range(100)]:
        buffer.put_away()
    assert len(budget.spare) == 64


# --- what is taken makes room ---


def test_a_byte_that_is_left_of_a_large_piece_does_not_hold_the_piece():
    buffer = ReceiveBuffer(ReceiveBudget(1 << 20, WINDOW), WINDOW)
    buffer.append(b"x" * 60_000 + b"yz")
    assert buffer.take(60_000) == b"x" * 60_000
    assert buffer._chunks is not None
    assert sum(map(len, buffer._chunks)) == 2
    assert buffer.take(5) == b"yz"


@given(st.lists(st.integers(1, 40_000), min_size=1, max_size=30), st.lists(st.integers(1, 30_000), min_size=1))
def test_what_a_buffer_holds_is_less_than_twice_what_is_unread(sizes, takes):
    buffer = ReceiveBuffer(ReceiveBudget(1 << 30, 1 << 30), 1 << 30)
    body = bytes(range(256)) * (sum(sizes) // 256 + 1)
    sent = taken = 0
    for size, take in itertools.zip_longest(sizes, takes):
        if size:
            buffer.append(body[sent : sent + size])
            sent += size
        if take and buffer.unread:
            piece = buffer.take(take)
            assert piece == body[taken : taken + len(piece)]
            taken += len(piece)
        held = sum(map(len, buffer._chunks or ()))
        assert held <= 2 * buffer.unread + 16384
    assert buffer.unread == sent - taken
