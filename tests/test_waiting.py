"""Deadlines, timers that find no progress, limits that pass, and who may act at once."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import gevent
import pytest
from gevent.hub import get_hub
from hypothesis import given
from hypothesis import strategies as st

from geyamux import waiting
from geyamux.waiting import Deadline, Expiry, Pulse, StallTimer, earlier, get_thread, may_act, timed_out
from support.rawpeer import settle

SOON = 0.02
"""Seconds; for time limits that pass in a test."""


def run_in_thread(function) -> None:
    """Run it in a thread of its own, which has a hub of its own and has ended afterwards."""
    thread = threading.Thread(target=function)
    thread.start()
    thread.join()


# --- deadlines ---


def test_a_time_limit_that_passes_is_exactly_the_timeout_of_a_socket():
    error = timed_out()
    assert type(error) is TimeoutError
    assert error.args == ("timed out",)
    assert timed_out() is not error


def test_without_a_timeout_there_is_no_deadline():
    assert Deadline.after(None) is None


def test_a_deadline_counts_down_to_nothing(monkeypatch):
    now = 100.0
    monkeypatch.setattr(waiting.time, "monotonic", lambda: now)
    deadline = Deadline.after(2.5)
    assert deadline is not None
    assert deadline.left() == 2.5
    now = 102.0
    assert deadline.left() == 0.5
    now = 102.5
    assert deadline.left() == 0.0
    now = 999.0
    assert deadline.left() == 0.0


@given(st.none() | st.floats(0, 1e6), st.none() | st.floats(0, 1e6))
def test_the_earlier_of_two_deadlines_is_that_of_the_shorter_timeout(first, second):
    one, other = Deadline.after(first), Deadline.after(second)
    found = earlier(one, other)
    assert found is earlier(other, one) or first == second
    if first is None or second is None:
        assert found is (one if second is None else other)
    else:
        assert found is not None
        assert one is not None
        assert other is not None
        assert found.moment == min(one.moment, other.moment)


# --- progress that does not come ---


class Stalling:
    """A stall timer, and what it told."""

    def __init__(self, timeout: float | None) -> None:
        self.told: list[object] = []
        self.timer = StallTimer(get_hub(), timeout, on_stalled=lambda: self.told.append("stalled"))

    def wait(self, seconds: float) -> list[object]:
        """What it tells meanwhile."""
        gevent.sleep(seconds)
        told, self.told = self.told, []
        return told


@pytest.fixture
def stalling() -> Iterator[Stalling]:
    stalling = Stalling(SOON)
    yield stalling
    stalling.timer.close()


def test_a_stall_is_told_once(stalling):
    stalling.timer.arm()
    assert stalling.timer.is_armed
    assert stalling.wait(SOON * 4) == ["stalled"]
    assert not stalling.timer.is_armed


def test_where_nothing_waits_nothing_stalls(stalling):
    assert not stalling.timer.is_armed
    assert stalling.wait(SOON * 2) == []


def test_progress_in_time_is_no_stall(stalling):
    stalling.timer.arm()
    stalling.timer.disarm()
    stalling.timer.disarm()
    assert not stalling.timer.is_armed
    assert stalling.wait(SOON * 2) == []


def test_arming_again_does_not_begin_anew(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(waiting.time, "monotonic", lambda: now[0])
    stalling = Stalling(5.0)
    stalling.timer.arm()
    now[0] = 103.0
    stalling.timer.arm()
    now[0] = 105.1
    stalling.timer._on_timer()
    settle()
    assert stalling.told == ["stalled"]
    stalling.timer.close()


def test_a_timer_armed_again_waits_for_the_whole_time_again():
    stalling = Stalling(SOON * 5)
    for _ in range(4):
        stalling.timer.arm()
        assert stalling.wait(SOON * 2) == []
        stalling.timer.disarm()
    stalling.timer.arm()
    assert stalling.wait(SOON * 10) == ["stalled"]
    stalling.timer.arm()
    assert stalling.wait(SOON * 2) == []
    stalling.timer.close()


def test_a_timer_that_is_late_blames_our_own_hub_and_begins_anew(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(waiting.time, "monotonic", lambda: now[0])
    stalling = Stalling(5.0)
    stalling.timer.arm()
    now[0] = 112.0
    stalling.timer._on_timer()
    assert stalling.told == []
    assert stalling.timer.is_armed
    now[0] = 117.0
    stalling.timer._on_timer()
    settle()
    assert stalling.told == ["stalled"]
    stalling.timer.close()


def test_a_timer_that_fires_after_it_was_disarmed_tells_nothing(stalling):
    stalling.timer.arm()
    stalling.timer.disarm()
    stalling.timer._on_timer()
    assert stalling.told == []


def test_progress_that_is_made_in_the_same_turn_counts(stalling):
    stalling.timer.arm()
    stalling.timer._moment = time.monotonic()
    stalling.timer._on_timer()
    get_hub().loop.run_callback(stalling.timer.disarm)
    settle()
    assert stalling.told == []


def test_without_a_timeout_nothing_ever_stalls():
    stalling = Stalling(None)
    stalling.timer.arm()
    assert not stalling.timer.is_armed
    assert stalling.wait(SOON) == []
    stalling.timer.close()


def test_a_closed_timer_never_passes(stalling):
    stalling.timer.arm()
    stalling.timer.close()
    stalling.timer.arm()
    assert not stalling.timer.is_armed
    assert stalling.wait(SOON * 2) == []


# --- deadlines of one kind ---


@pytest.fixture
def moments(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The clock: a list whose last entry is now."""
    clock = [100.0]
    monkeypatch.setattr(waiting.time, "monotonic", lambda: clock[-1])
    return clock


def test_entries_pass_in_the_order_of_entry(moments):
    expiry: Expiry[str] = Expiry(5.0)
    assert expiry.next_moment() is None
    assert expiry.add("a") == 105.0
    moments.append(101.0)
    assert expiry.add("b") == 106.0
    assert expiry.next_moment() == 105.0
    assert len(expiry) == 2
    assert expiry.pop_passed(104.9) == []
    assert expiry.pop_passed(105.0) == ["a"]
    assert expiry.next_moment() == 106.0
    assert expiry.pop_passed(1000.0) == ["b"]
    assert len(expiry) == 0


def test_without_a_timeout_nothing_ever_passes(moments):
    expiry: Expiry[str] = Expiry(None)
    assert expiry.add("a") is None
    assert len(expiry) == 0
    assert expiry.next_moment() is None
    assert expiry.pop_passed(1e9) == []


def test_an_entry_whose_reason_is_gone_does_not_pass(moments):
    expiry: Expiry[str] = Expiry(5.0)
    expiry.add("a")
    expiry.add("b")
    expiry.remove("a")
    expiry.remove("a")
    expiry.remove("never there")
    assert expiry.pop_passed(1000.0) == ["b"]


def test_all_entries_are_postponed_together(moments):
    expiry: Expiry[str] = Expiry(5.0)
    expiry.add("a")
    moments.append(101.0)
    expiry.add("b")
    expiry.postpone(60.0)
    assert expiry.next_moment() == 165.0
    assert expiry.pop_passed(165.5) == ["a"]
    assert expiry.pop_passed(166.0) == ["b"]


@given(st.lists(st.tuples(st.sampled_from(["add", "remove", "pop", "postpone"]), st.integers(0, 5)), max_size=40))
def test_expiry_agrees_with_a_plain_dict(steps):
    now = [0.0]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(waiting.time, "monotonic", lambda: now[0])
        expiry: Expiry[int] = Expiry(3.0)
        model: dict[int, float] = {}
        for step, number in steps:
            if step == "add" and number not in model:
                expiry.add(number)
                model[number] = now[0] + 3.0
            elif step == "remove":
                expiry.remove(number)
                model.pop(number, None)
            elif step == "postpone":
                now[0] += number  # the hub was blocked for so long
                expiry.postpone(number)
                model = {key: moment + number for key, moment in model.items()}
            else:
                now[0] += number
                passed = [key for key, moment in model.items() if moment <= now[0]]
                assert expiry.pop_passed(now[0]) == passed
                for key in passed:
                    del model[key]
            assert len(expiry) == len(model)
            assert expiry.next_moment() == min(model.values(), default=None)


def test_entries_among_the_first_that_are_older_than_an_age_are_found(monkeypatch):
    now = 100.0
    monkeypatch.setattr(waiting.time, "monotonic", lambda: now)
    expiry = Expiry(30.0)
    for key in "abcd":
        expiry.add(key)
        now += 1.0
    assert expiry.first_older(3.0, 4) == ["a", "b"]
    assert expiry.first_older(3.0, 1) == ["a"]
    assert expiry.first_older(5.0, 4) == []
    assert Expiry(None).first_older(0.0, 4) == []


# --- a hub that was blocked ---


@pytest.fixture
def pulse() -> Iterator[Pulse]:
    pulse = Pulse(get_hub())
    yield pulse
    for listener in list(pulse._listeners):
        pulse.leave(listener)
    settle()


def block(seconds: float) -> None:
    ends = time.monotonic() + seconds
    while time.monotonic() < ends:
        pass


def test_all_who_listen_are_told_once_how_long_the_hub_was_blocked(pulse):
    first, second = [], []
    pulse.enter(first.append)
    pulse.enter(second.append)
    gevent.sleep(0.1)
    block(1.6)
    gevent.sleep(0.7)
    assert first == second
    [seconds] = first
    assert 1.6 - 0.25 <= seconds < 1.6 + 0.35


def test_a_hub_that_lives_tells_nothing(pulse):
    told = []
    pulse.enter(told.append)
    for _ in range(12):
        gevent.sleep(0.1)
    block(0.3)
    gevent.sleep(0.6)
    assert told == []


def test_a_pulse_beats_only_while_somebody_listens(pulse):
    assert pulse._timer is None
    told = []
    pulse.enter(told.append)
    assert pulse._timer is not None
    pulse.leave(told.append)
    pulse.leave(told.append)
    assert pulse._timer is None
    block(1.2)
    pulse.enter(told.append)
    gevent.sleep(0.6)
    assert told == []


def test_who_leaves_when_told_leaves_nothing_behind(pulse):
    told = []

    def once(seconds):
        told.append(seconds)
        pulse.leave(once)

    pulse.enter(once)
    gevent.sleep(0.01)
    pulse._beat_at -= 10.0
    pulse._on_beat()
    pulse._on_beat()
    assert len(told) == 1
    assert pulse._timer is None


def test_there_is_one_pulse_for_each_hub():
    assert Pulse.of(get_hub()) is Pulse.of(get_hub())


# --- who may act ---


def calling(thread: int) -> bool:
    """Like a public method: its caller is the one who asks."""
    return asking(thread)


def asking(thread: int) -> bool:
    return may_act(thread)


def test_a_caller_may_act_in_its_own_thread_only():
    assert calling(get_thread())
    found = []
    here = get_thread()
    run_in_thread(lambda: found.append(calling(here)))
    assert found == [False]


def test_who_interrupts_the_package_at_its_work_may_not_act():
    scope = {"__name__": "geyamux.outbox", "calling": calling}
    exec("def work(thread):\n    return calling(thread)", scope)
    assert not scope["work"](get_thread())
    assert not (lambda: scope["work"](get_thread()))()
    scope["__name__"] = "geyamuxed.outbox"
    exec("def work(thread):\n    return calling(thread)", scope)
    assert scope["work"](get_thread())
