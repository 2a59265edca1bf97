"""Pings, the round trip, keepalive and the clock of a session. Short real times; the outbox is played by the test.

Longer than other modules because all tests of one subject stand together, each short and by itself.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import gevent
import pytest
from gevent.hub import get_hub

from geyamux import liveness
from geyamux.config import Config
from geyamux.errors import KeepaliveTimeout, SessionClosed
from geyamux.liveness import Liveness
from geyamux.waking import Waker
from support.rawpeer import settle

SOON = 0.03
PATIENCE = 5.0


class FakeOutbox:
    """Lets pings leave when it is told to."""

    def __init__(self) -> None:
        self.lane = Waker.of(get_hub()).lane()
        self.pings: list[int] = []
        self.ping_offered = (0, 0.0)

    def ping(self, value):
        self.pings.append(value)


class Bench:
    def __init__(self, **settings) -> None:
        settings.setdefault("keepalive_interval", None)
        self.outbox = FakeOutbox()
        self.heard = time.monotonic()
        self.next_moment: float | None = None
        self.silences: list[Exception] = []
        self.ticks: list[float] = []
        self.liveness = Liveness(
            self.outbox,
            get_hub(),
            Config(**settings),
            owner=self,
            heard=lambda: self.heard,
            next_moment=lambda: self.next_moment,
        )

    # what the session does

    def _on_silence(self, reason):
        self.silences.append(reason)
        self.liveness.end(reason)

    def _on_tick(self, now):
        self.ticks.append(now)

    # what the connection and the peer do

    def leaves(self) -> float:
        """The latest ping leaves now."""
        now = time.monotonic()
        self.liveness._on_ping_left(self.outbox.pings[-1], now)
        return now

    def answers(self, value: int | None = None) -> None:
        self.heard = time.monotonic()
        self.liveness.on_pong(self.outbox.pings[-1] if value is None else value)

    def until(self, condition: Callable[[], object], step: Callable[[], object] = lambda: None) -> float:
        """Seconds until it is so."""
        began = time.monotonic()
        while not condition():
            assert time.monotonic() - began < PATIENCE, "it never came"
            gevent.sleep(SOON / 6)
            step()
        return time.monotonic() - began


@pytest.fixture
def make() -> Iterator[Callable[..., Bench]]:
    made = []

    def make(**settings) -> Bench:
        made.append(Bench(**settings))
        return made[-1]

    yield make
    for bench in made:
        if bench.liveness.reason is None:
            bench.liveness.end(SessionClosed("the test is over"))
    settle()


@pytest.fixture
def bench(make) -> Bench:
    return make()


def ask(bench: Bench, timeout: float | None) -> float | Exception:
    try:
        return bench.liveness.ping(timeout)
    except Exception as error:
        return error


def pinging(bench: Bench, timeout: float | None = PATIENCE) -> gevent.Greenlet:
    """A greenlet that asks; its value is the round trip, or the error."""
    started = gevent.spawn(ask, bench, timeout)
    settle()
    return started


# --- ping ---


def test_a_ping_returns_the_round_trip_from_the_moment_it_left(bench):
    asking = pinging(bench)
    gevent.sleep(SOON)  # in the queue
    bench.leaves()
    gevent.sleep(SOON)
    bench.answers()
    rtt = asking.get(timeout=PATIENCE)
    assert SOON * 0.9 <= rtt < SOON * 1.9
    assert bench.liveness.rtt == bench.liveness.min_rtt == rtt


def test_an_answer_before_the_ping_has_left_is_none(bench):
    asking = pinging(bench)
    bench.answers()
    settle()
    assert not asking.ready()
    bench.leaves()
    bench.answers()
    assert asking.get(timeout=PATIENCE) >= 0


def test_an_answer_while_the_send_has_not_returned_is_measured_from_its_beginning(bench):
    asking = pinging(bench)
    bench.outbox.ping_offered = (bench.outbox.pings[-1], time.monotonic() - 0.5)
    bench.answers()
    assert asking.get(timeout=PATIENCE) == pytest.approx(0.5, abs=0.1)


def test_a_ping_that_was_never_answered_is_not_shared_for_ever(make):
    bench = make(keepalive_timeout=SOON)
    patient = pinging(bench, None)
    bench.leaves()
    gevent.sleep(SOON * 2)
    asking = pinging(bench)
    assert len(set(bench.outbox.pings)) == 2
    bench.leaves()
    bench.answers()
    assert asking.get(timeout=PATIENCE) == patient.get(timeout=PATIENCE)


def test_the_leaving_of_a_ping_that_was_given_up_says_nothing_of_the_next(bench):
    assert isinstance(ask(bench, SOON), TimeoutError)
    asking = pinging(bench)
    bench.liveness._on_ping_left(bench.outbox.pings[0], time.monotonic())
    bench.answers()
    settle()
    assert not asking.ready()
    bench.leaves()
    bench.answers()
    assert asking.get(timeout=PATIENCE) >= 0


def test_callers_share_one_ping(bench):
    asking = [pinging(bench) for _ in range(5)]
    assert len(bench.outbox.pings) == 1
    bench.leaves()
    bench.answers()
    settle()
    assert len({greenlet.get(timeout=0) for greenlet in asking}) == 1


def test_the_next_ping_has_another_value(bench):
    for _ in range(3):
        asking = pinging(bench)
        bench.leaves()
        bench.answers()
        asking.get(timeout=PATIENCE)
    assert len(set(bench.outbox.pings)) == 3


def test_values_stay_within_32_bits(bench):
    bench.liveness._value = 0xFFFFFFFF
    pinging(bench, SOON)
    assert bench.outbox.pings == [0]


def test_pongs_that_nobody_waits_for_are_ignored(bench):
    bench.liveness.on_pong(0)
    asking = pinging(bench)
    bench.leaves()
    bench.answers(bench.outbox.pings[0] + 1)
    settle()
    assert not asking.ready()
    bench.answers()
    assert asking.get(timeout=PATIENCE) >= 0
    bench.answers()
    assert bench.liveness.rtt is not None


def test_a_ping_times_out_and_the_next_is_a_fresh_one(bench):
    with pytest.raises(TimeoutError) as caught:
        bench.liveness.ping(SOON)
    assert caught.value.args == ("timed out",)
    asking = pinging(bench)
    assert len(set(bench.outbox.pings)) == 2
    bench.leaves()
    bench.answers(bench.outbox.pings[0])
    settle()
    assert not asking.ready()
    bench.answers()
    assert asking.get(timeout=PATIENCE) >= 0


def test_one_that_times_out_leaves_the_ping_to_the_others(bench):
    patient = pinging(bench)
    with pytest.raises(TimeoutError):
        bench.liveness.ping(SOON)
    bench.leaves()
    bench.answers()
    assert patient.get(timeout=PATIENCE) >= 0
    assert len(bench.outbox.pings) == 1


@pytest.mark.parametrize("way", ["kill", "foreign timeout"])
def test_what_strikes_a_ping_leaves_nothing_behind(bench, way):
    if way == "kill":
        pinging(bench).kill()
    else:
        with gevent.Timeout(SOON, False):
            bench.liveness.ping(None)
    assert bench.liveness._current is None
    asking = pinging(bench)
    bench.leaves()
    bench.answers()
    assert asking.get(timeout=PATIENCE) >= 0


def test_the_end_of_the_session_ends_every_ping(bench):
    asking = [pinging(bench, None) for _ in range(3)]
    reason = SessionClosed("it ended")
    bench.liveness.end(reason)
    settle()
    for greenlet in asking:
        error = greenlet.get(timeout=0)
        assert type(error) is SessionClosed
        assert error is not reason
        assert error.__cause__ is reason
    assert len({id(greenlet.value) for greenlet in asking}) == 3


# --- the round trip ---


def answered_after(bench: Bench, seconds: float) -> None:
    bench.liveness.measure()
    bench.liveness._on_ping_left(bench.outbox.pings[-1], time.monotonic() - seconds)
    bench.answers()


def test_the_round_trip_is_smoothed_and_the_shortest_is_kept(bench):
    assert bench.liveness.rtt is None
    assert bench.liveness.min_rtt is None
    answered_after(bench, 0.8)
    assert bench.liveness.rtt == pytest.approx(0.8, abs=0.01)
    answered_after(bench, 0.4)
    assert bench.liveness.rtt == pytest.approx(0.75, abs=0.01)  # an eighth of the way
    assert bench.liveness.min_rtt == pytest.approx(0.4, abs=0.01)
    answered_after(bench, 2.0)
    assert bench.liveness.min_rtt == pytest.approx(0.4, abs=0.01)


def test_measuring_shares_the_ping_that_is_under_way(bench):
    pinging(bench)
    bench.liveness.measure()
    assert len(bench.outbox.pings) == 1


def test_while_data_comes_the_round_trip_is_measured_anew_only_where_windows_grow(make):
    growing, fixed = make(window_auto_tune=True), make()
    now = time.monotonic()
    for bench in (growing, fixed):
        bench.liveness.measure_while_busy(now)
    assert len(growing.outbox.pings) == 1
    assert fixed.outbox.pings == []
    growing.leaves()
    growing.answers()
    growing.liveness.measure_while_busy(now + 9)
    assert len(growing.outbox.pings) == 1
    growing.liveness.measure_while_busy(now + 11)
    assert len(growing.outbox.pings) == 2


# --- keepalive ---


def test_into_silence_goes_a_ping(make):
    bench = make(keepalive_interval=SOON * 2, keepalive_timeout=PATIENCE)
    took = bench.until(lambda: bench.outbox.pings)
    assert took >= SOON * 2 * 0.85
    assert bench.silences == []


def test_any_byte_puts_the_ping_off(make):
    bench = make(keepalive_interval=SOON * 2, keepalive_timeout=PATIENCE)
    ends = time.monotonic() + SOON * 8

    def hear():
        bench.heard = time.monotonic()

    bench.until(lambda: time.monotonic() > ends, hear)
    assert bench.outbox.pings == []


def test_without_keepalive_silence_is_fine(bench):
    bench.heard -= 10_000
    bench.liveness.rearm()
    gevent.sleep(SOON)
    assert bench.outbox.pings == []
    assert bench.silences == []


def test_silence_after_the_ping_ends_the_session(make):
    bench = make(keepalive_interval=SOON, keepalive_timeout=SOON * 3)
    bench.until(lambda: bench.outbox.pings)
    left = bench.leaves()
    bench.until(lambda: bench.silences)
    assert time.monotonic() - left >= SOON * 3
    [reason] = bench.silences
    assert type(reason) is KeepaliveTimeout
    assert reason.message.startswith("heard nothing for ")
    assert len(bench.outbox.pings) == 1


def test_the_time_of_a_ping_in_the_queue_is_not_charged_to_the_peer(make):
    bench = make(keepalive_interval=SOON, keepalive_timeout=SOON)
    bench.until(lambda: bench.outbox.pings)
    gevent.sleep(SOON * 5)
    assert bench.silences == []
    bench.leaves()
    bench.until(lambda: bench.silences)


def test_any_byte_after_the_ping_proves_life_even_if_it_is_never_answered(make):
    bench = make(keepalive_interval=SOON, keepalive_timeout=SOON * 2)

    def hear_once():
        if len(bench.outbox.pings) > seen[-1]:
            seen.append(len(bench.outbox.pings))
            bench.leaves()
            gevent.sleep(SOON / 6)
            bench.heard = time.monotonic()

    seen = [0]
    bench.until(lambda: len(bench.outbox.pings) >= 4, hear_once)
    assert bench.silences == []
    assert len(set(bench.outbox.pings)) == len(bench.outbox.pings)


def test_an_answered_ping_is_followed_by_the_next_in_the_next_silence(make):
    bench = make(keepalive_interval=SOON, keepalive_timeout=SOON * 2)
    for count in (1, 2, 3):
        bench.until(lambda count=count: len(bench.outbox.pings) == count)
        bench.leaves()
        bench.answers()
    assert bench.silences == []
    assert bench.liveness.rtt is not None


def test_who_waits_for_a_ping_learns_that_the_peer_is_gone(make):
    bench = make(keepalive_interval=SOON * 2, keepalive_timeout=SOON * 3)
    asking = pinging(bench, None)
    left: set[int] = set()

    def leave():
        if bench.outbox.pings[-1] not in left:
            left.add(bench.outbox.pings[-1])
            bench.leaves()

    bench.until(lambda: bench.silences, leave)
    settle()
    assert isinstance(asking.value, KeepaliveTimeout)
    assert len(bench.outbox.pings) <= 2


def test_pings_of_the_application_that_time_out_do_not_put_the_end_off(make):
    """Each gives up before `keepalive_timeout`; the peer has been silent all the same since the first of them."""
    bench = make(keepalive_interval=SOON, keepalive_timeout=SOON * 4)
    sent = 0

    def ask_and_give_up():
        nonlocal sent
        if bench.silences:
            return
        asking = gevent.spawn(ask, bench, SOON)
        gevent.sleep(0)
        if len(bench.outbox.pings) > sent:
            sent = len(bench.outbox.pings)
            bench.leaves()
        asking.join()

    began = time.monotonic()
    while not bench.silences and time.monotonic() - began < SOON * 40:
        ask_and_give_up()
    assert [type(reason) for reason in bench.silences] == [KeepaliveTimeout]


def test_intervals_are_shortened_at_random_so_that_clients_do_not_ping_in_step(make):
    intervals = {make(keepalive_interval=100.0).liveness._interval for _ in range(20)}
    assert len(intervals) > 1
    assert all(90.0 <= interval <= 100.0 for interval in intervals)


# --- the clock ---


def test_the_clock_ticks_at_the_moment_that_was_asked_for(bench):
    began = time.monotonic()
    bench.liveness.arm(began + SOON)
    bench.until(lambda: bench.ticks)
    assert bench.ticks[0] - began >= SOON * 0.9


def test_the_earliest_of_several_moments_counts(bench):
    began = time.monotonic()
    bench.liveness.arm(began + SOON)
    bench.liveness.arm(began + 100)
    bench.until(lambda: bench.ticks)
    assert time.monotonic() - began < PATIENCE


def test_after_a_tick_the_next_moment_of_the_owner_is_waited_for(bench):
    bench.liveness.arm(time.monotonic() + SOON / 3)
    bench.next_moment = time.monotonic() + SOON * 2
    bench.until(lambda: bench.ticks)
    bench.next_moment, expected = None, bench.next_moment
    bench.until(lambda: len(bench.ticks) == 2)
    assert bench.ticks[1] >= expected - 0.002


def test_it_ticks_every_few_seconds_at_least(monkeypatch, make):
    monkeypatch.setattr(liveness, "_TICK", SOON)
    bench = make()
    bench.until(lambda: len(bench.ticks) >= 3)


def block(seconds: float) -> None:
    ends = time.monotonic() + seconds
    while time.monotonic() < ends:
        pass


def test_time_during_which_our_hub_was_blocked_is_not_charged_to_the_peer(make):
    bench = make(keepalive_interval=SOON, keepalive_timeout=0.1)
    bench.until(lambda: bench.outbox.pings)
    bench.leaves()
    bench.ticks.clear()
    block(0.7)
    bench.until(lambda: bench.ticks)
    assert bench.silences == []
    bench.until(lambda: bench.silences)


def test_after_the_end_the_clock_stands_still(bench):
    bench.liveness.arm(time.monotonic() + SOON)
    bench.liveness.end(SessionClosed("it ended"))
    bench.liveness.arm(time.monotonic())
    gevent.sleep(SOON * 3)
    assert bench.ticks == []


def test_an_owner_that_ends_it_in_a_tick_is_not_asked_again(bench):
    bench._on_tick = lambda now: bench.liveness.end(SessionClosed("time is over"))
    bench.liveness.arm(time.monotonic())
    gevent.sleep(SOON)
    bench.liveness._on_timer()
    assert bench.liveness.reason is not None


def test_bytes_that_came_while_the_hub_was_blocked_are_read_before_the_peer_is_judged(make):
    bench = make(keepalive_interval=0.1, keepalive_timeout=0.1)
    bench.until(lambda: bench.outbox.pings)
    bench.leaves()
    gevent.sleep(0.05)
    # They arrive in the block, shorter than what is called one; reading them is a callback of this turn.
    get_hub().loop.run_callback(lambda: (block(0.2), get_hub().loop.run_callback(bench.answers)))
    gevent.sleep(0.02)
    assert bench.silences == []
