"""Deadlines, parking and waking, lines and their turns; whatever strikes in a wait leaves nothing behind.

Longer than other modules because all tests of one subject stand together, each short and by itself.
"""

from __future__ import annotations

import gc
import threading
import time
import weakref
from collections.abc import Iterator

import gevent
import pytest
from gevent.exceptions import BlockingSwitchOutError
from gevent.hub import get_hub
from greenlet import greenlet as RawGreenlet
from hypothesis import given
from hypothesis import strategies as st

from geyamux import waiting
from geyamux.waiting import Deadline, Expiry, Milestones, StallTimer, Waiter, WaitList, Waker, earlier, timed_out
from support.rawpeer import settle

SOON = 0.02
"""Seconds; for time limits that pass in a test."""


@pytest.fixture
def waker() -> Waker:
    return Waker.of(get_hub())


@pytest.fixture
def callbacks() -> tuple[Waker, list]:
    """A waker, and the callbacks that it schedules."""
    scheduled = []

    class Loop:
        def run_callback(self, callback):
            scheduled.append(callback)
            get_hub().loop.run_callback(callback)

    class Hub:
        loop = Loop()

    return Waker(Hub()), scheduled


def run_in_thread(function) -> None:
    """Run it in a thread of its own, which has a hub of its own and has ended afterwards."""
    thread = threading.Thread(target=function)
    thread.start()
    thread.join()


def wait_out(waiter: Waiter, deadline: Deadline) -> int:
    """Park until the deadline; return how often. A wake is a hint: a timer of libuv may be early by a millisecond."""
    count = 1
    while waiter.park(deadline):
        count += 1
    return count


def clean(waker: Waker) -> bool:
    return not waker._due and not waker._is_scheduled


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


# --- parking and waking ---


def test_there_is_one_waker_for_each_hub(waker):
    assert Waker.of(get_hub()) is waker
    assert waker.hub is get_hub()
    others = []

    def in_another_thread():
        others.append(Waker.of(get_hub()))
        get_hub().destroy(destroy_loop=True)

    run_in_thread(in_another_thread)
    assert others[0] is not waker
    assert others[0].hub is not waker.hub


def test_who_parks_runs_on_when_woken(waker):
    waiter = Waiter(waker)
    parked = gevent.spawn(waiter.park)
    settle()
    assert not parked.ready()
    waker.wake(waiter)
    assert not parked.ready()
    settle()
    assert parked.get(block=False) is True
    assert waiter.greenlet is None
    assert clean(waker)


def test_waking_never_switches(waker):
    waiter, trace = Waiter(waker), []
    parked = gevent.spawn(lambda: (waiter.park(), trace.append("woken")))
    settle()
    get_hub().loop.run_callback(lambda: (waker.wake(waiter), trace.append("in the hub")))
    settle()
    assert parked.ready()
    assert trace == ["in the hub", "woken"]


def test_waking_nobody_does_nothing(waker):
    waker.wake(Waiter(waker))
    assert clean(waker)


def test_all_that_become_ready_in_a_turn_are_woken_by_one_callback(callbacks):
    waker, scheduled = callbacks
    order = []
    waiters = [Waiter(Waker.of(get_hub())) for _ in range(40)]
    for index, waiter in enumerate(waiters):
        gevent.spawn(lambda waiter=waiter, index=index: (waiter.park(), order.append(index)))
    settle()
    for waiter in waiters:
        waker.wake(waiter)
        waker.wake(waiter)
    assert len(scheduled) == 1
    settle()
    assert order == list(range(40))
    assert len(scheduled) == 1
    assert clean(waker)


def test_a_crowd_is_woken_in_portions_so_that_timers_get_their_turn(callbacks):
    waker, scheduled = callbacks
    woken, seen = [], []
    waiters = [Waiter(Waker.of(get_hub())) for _ in range(200)]
    for waiter in waiters:
        gevent.spawn(lambda waiter=waiter: (waiter.park(), woken.append(waiter)))
    settle()
    for waiter in waiters:
        waker.wake(waiter)
    # A callback scheduled now runs after the first portion and before the second.
    get_hub().loop.run_callback(lambda: seen.append(len(woken)))
    settle()
    assert woken == waiters
    assert seen == [64]
    assert len(scheduled) == 4
    assert clean(waker)


def test_who_parks_again_at_once_is_woken_again(waker):
    waiter, count = Waiter(waker), []

    def park_often():
        while len(count) < 3:
            waiter.park()
            count.append(1)
            waker.wake(waiter)

    parked = gevent.spawn(park_often)
    for _ in range(3):
        settle()
        waker.wake(waiter)
    settle()
    assert parked.ready()
    assert clean(waker)


def test_a_wake_in_the_same_turn_as_the_deadline_counts(waker):
    waiter = Waiter(waker)
    parked = gevent.spawn(waiter.park, Deadline(SOON))
    settle()
    ends = time.monotonic() + SOON * 2
    while time.monotonic() < ends:
        pass  # the hub is busy: the timer passes meanwhile
    waker.wake(waiter)
    assert parked.get(timeout=5) is True
    settle()
    assert clean(waker)


def test_at_the_deadline_a_park_ends_with_false(waker):
    waiter = Waiter(waker)
    began = time.monotonic()
    wait_out(waiter, Deadline(SOON))
    assert SOON <= time.monotonic() - began < SOON + 2
    assert waiter.greenlet is None


def test_a_deadline_that_has_passed_is_not_waited_for(waker):
    waiter = Waiter(waker)
    switched = []
    get_hub().loop.run_callback(switched.append, 1)
    assert waiter.park(Deadline(0)) is False
    assert waiter.park(Deadline(-1)) is False
    assert not switched
    assert waiter.greenlet is None
    settle()


def test_a_wake_before_the_deadline_stops_its_timer(waker):
    waiter = Waiter(waker)
    parked = gevent.spawn(waiter.park, Deadline(SOON))
    settle()
    waker.wake(waiter)
    assert parked.get(timeout=5) is True
    # Who parks next must not be struck by the timer of the first.
    assert wait_out(waiter, Deadline(SOON * 3)) <= 2


def test_a_kill_leaves_nothing_behind(waker):
    waiter = Waiter(waker)
    for deadline in (None, Deadline(30)):
        parked = gevent.spawn(waiter.park, deadline)
        settle()
        parked.kill()
        assert waiter.greenlet is None
    waker.wake(waiter)
    assert clean(waker)


def test_a_kill_between_the_wake_and_the_switch_leaves_nothing_behind(waker):
    waiter, other = Waiter(waker), Waiter(waker)
    struck, unharmed = gevent.spawn(waiter.park), gevent.spawn(other.park)
    settle()
    waker.wake(waiter)
    waker.wake(other)
    struck.kill(block=False)
    settle()
    assert isinstance(struck.value, gevent.GreenletExit) or struck.value is True
    assert unharmed.value is True
    assert clean(waker)


def test_a_foreign_timeout_leaves_nothing_behind(waker):
    waiter = Waiter(waker)
    for deadline in (None, Deadline(30)):
        with pytest.raises(gevent.Timeout), gevent.Timeout(SOON):
            waiter.park(deadline)
        assert waiter.greenlet is None
    assert clean(waker)


def test_parking_in_the_hub_itself_is_an_error_and_leaves_nothing_behind(waker):
    waiter, raised = Waiter(waker), []

    def in_the_hub():
        for deadline in (None, Deadline(30)):
            try:
                waiter.park(deadline)
            except BlockingSwitchOutError as error:
                raised.append(error)

    get_hub().loop.run_callback(in_the_hub)
    settle()
    assert len(raised) == 2
    assert waiter.greenlet is None
    assert clean(waker)


def test_a_raw_greenlet_that_dies_does_not_keep_the_others_from_waking(waker, monkeypatch):
    reported = []
    monkeypatch.setattr(waker.hub, "handle_error", lambda *args: reported.append(args), raising=False)
    waiters = [Waiter(waker) for _ in range(3)]
    woken = []

    def die():
        waiters[1].park()
        raise RuntimeError("a raw greenlet died")

    others = [gevent.spawn(lambda w=w: (w.park(), woken.append(w))) for w in (waiters[0], waiters[2])]
    dying = RawGreenlet(die, parent=get_hub())
    get_hub().loop.run_callback(dying.switch)
    settle()
    for waiter in waiters:
        waker.wake(waiter)
    settle()
    assert woken == [waiters[0], waiters[2]]
    assert all(greenlet.ready() for greenlet in others)
    [(context, kind, error, traceback)] = reported
    assert context is waiters[1]
    assert kind is RuntimeError
    assert str(error) == "a raw greenlet died"
    assert traceback is not None
    assert dying.dead
    assert clean(waker)


def test_a_waker_ends_with_its_hub():
    gone = []

    def in_another_thread():
        gone.append(weakref.ref(Waker.of(get_hub())))
        gone.append(weakref.ref(get_hub()))
        get_hub().destroy(destroy_loop=True)

    run_in_thread(in_another_thread)
    gc.collect()
    assert [reference() for reference in gone] == [None, None]


# --- lines ---


class Queueing:
    """Greenlets that stand in one line until each was served."""

    def __init__(self, waker: Waker) -> None:
        self.line = WaitList(waker)
        self.supply = 0
        self.served: list[str] = []

    def start(self, name: str, deadline: Deadline | None = None) -> gevent.Greenlet:
        started = gevent.spawn(self.take, name, deadline)
        settle()
        return started

    def take(self, name: str, deadline: Deadline | None) -> None:
        turn = self.line.enter()
        try:
            while not (self.line.is_first(turn) and self.supply):
                if not turn.park(deadline):
                    raise timed_out()
            self.supply -= 1
            self.served.append(name)
        finally:
            self.line.leave(turn)

    def deliver(self, count: int = 1) -> None:
        self.supply += count
        self.line.wake_first()
        settle()


@pytest.fixture
def queueing(waker: Waker) -> Queueing:
    return Queueing(waker)


def test_a_line_is_served_in_the_order_of_coming(queueing):
    for name in "abc":
        queueing.start(name)
    assert len(queueing.line) == 3
    queueing.deliver()
    assert queueing.served == ["a"]
    queueing.deliver(2)
    assert queueing.served == ["a", "b", "c"]
    assert not queueing.line
    assert clean(queueing.line._waker)


def test_nobody_overtakes_who_came_before(queueing):
    queueing.start("a")
    queueing.supply = 1  # it is there, and nobody was told
    queueing.start("b")
    assert queueing.served == []
    queueing.deliver(0)
    assert queueing.served == ["a"]


def test_a_kill_gives_the_turn_to_the_next(queueing):
    first = queueing.start("a")
    queueing.start("b")
    queueing.supply = 1
    first.kill()
    settle()
    assert queueing.served == ["b"]
    assert not queueing.line


def test_a_kill_of_the_one_that_was_just_woken_gives_the_turn_to_the_next(queueing):
    first = queueing.start("a")
    queueing.start("b")
    first.kill(block=False)
    queueing.deliver()
    assert queueing.served == ["b"]
    assert (queueing.supply, len(queueing.line)) == (0, 0)


def test_a_kill_in_the_middle_of_the_line_leaves_the_order(queueing):
    queueing.start("a")
    second = queueing.start("b")
    queueing.start("c")
    second.kill()
    queueing.deliver(2)
    assert queueing.served == ["a", "c"]
    assert not queueing.line


def test_a_deadline_gives_the_turn_to_the_next(queueing):
    first = queueing.start("a", Deadline(SOON))
    queueing.start("b")
    with pytest.raises(TimeoutError):
        first.get(timeout=5)
    queueing.deliver()
    assert queueing.served == ["b"]
    assert not queueing.line


def test_a_foreign_timeout_gives_the_turn_to_the_next(queueing):
    def limited():
        with gevent.Timeout(SOON, False):
            queueing.take("a", None)

    first = gevent.spawn(limited)
    settle()
    queueing.start("b")
    first.get(timeout=5)
    queueing.deliver()
    assert queueing.served == ["b"]
    assert not queueing.line


def test_waking_all_lets_everyone_look(queueing):
    started = [queueing.start(name, Deadline(30)) for name in "abc"]
    queueing.line.wake_all()
    settle()
    assert len(queueing.line) == 3  # nothing was there for them
    queueing.supply = 3
    queueing.line.wake_all()
    settle()
    assert queueing.served == ["a", "b", "c"]
    gevent.joinall(started, raise_error=True)


def test_waking_an_empty_line_does_nothing(waker):
    line = WaitList(waker)
    line.wake_first()
    line.wake_all()
    assert clean(waker)


@given(st.lists(st.sampled_from(["come", "serve", "kill first", "kill last", "time passes"]), max_size=25))
def test_whatever_strikes_everybody_is_served_in_order_or_struck(events):
    queueing = Queueing(Waker.of(get_hub()))
    standing: list[gevent.Greenlet] = []
    names: dict[gevent.Greenlet, str] = {}
    expected: list[str] = []
    for event in events:
        if event == "come":
            name = f"{len(names)}"
            greenlet = queueing.start(name)
            names[greenlet] = name
            standing.append(greenlet)
        elif event == "serve":
            queueing.deliver()
        elif standing and event.startswith("kill"):
            standing.pop(0 if event == "kill first" else -1).kill()
            settle()
        while standing and len(expected) < len(queueing.served):
            expected.append(names[standing.pop(0)])
        assert queueing.served == expected
        assert len(queueing.line) == len(standing)
        assert not (standing and queueing.supply)
    gevent.killall(standing)
    assert not queueing.line


# --- a count that grows ---


def test_a_milestone_wakes_those_it_reaches_and_nobody_else(waker):
    milestones, passed = Milestones(waker), []

    def wait(number):
        waiter = Waiter(waker)
        entry = milestones.enter(number, waiter)
        try:
            waiter.park()
            passed.append(number)
        finally:
            milestones.leave(entry)

    waiting = [gevent.spawn(wait, number) for number in (7, 3, 5, 3, 9)]
    settle()
    for count, expected in ((2, []), (3, [3, 3]), (6, [3, 3, 5]), (8, [3, 3, 5, 7])):
        milestones.reach(count)
        settle()
        assert passed == expected
    assert len(milestones) == 1
    milestones.wake_all()
    settle()
    assert passed == [3, 3, 5, 7, 9]
    assert not milestones
    gevent.joinall(waiting, raise_error=True)


def test_who_leaves_a_milestone_is_forgotten_and_others_of_the_same_number_are_not(waker):
    milestones = Milestones(waker)
    entries = [milestones.enter(4, Waiter(waker)) for _ in range(3)]
    milestones.leave(entries[1])
    assert len(milestones) == 2
    milestones.reach(4)
    assert not milestones
    for entry in entries:
        milestones.leave(entry)  # fine for one that was reached, too
    assert clean(waker)


# --- progress that does not come ---


class Stalling:
    """A stall timer, and what it told."""

    def __init__(self, timeout: float | None) -> None:
        self.told: list[object] = []
        self.timer = StallTimer(
            get_hub(), timeout, on_stalled=lambda: self.told.append("stalled"), on_hub_blocked=self.told.append
        )

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
    assert stalling.told == [7.0]
    assert stalling.timer.is_armed
    now[0] = 117.0
    stalling.timer._on_timer()
    settle()
    assert stalling.told == [7.0, "stalled"]
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
