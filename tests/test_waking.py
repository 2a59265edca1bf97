"""Parking and waking, lines and their turns, lanes and pauses; whatever strikes in a wait leaves nothing behind.

Longer than other modules because all tests of one subject stand together, each short and by itself.
"""

from __future__ import annotations

import gc
import threading
import time
import weakref

import gevent
import pytest
from gevent.exceptions import BlockingSwitchOutError
from gevent.hub import get_hub
from greenlet import greenlet as RawGreenlet
from hypothesis import given
from hypothesis import strategies as st

from geyamux import waking
from geyamux.waiting import Deadline, timed_out
from geyamux.waking import Lane, Milestones, Waiter, WaitList, Waker
from support.rawpeer import settle

SOON = 0.02
"""Seconds; for time limits that pass in a test."""


@pytest.fixture
def lane() -> Lane:
    return Waker.of(get_hub()).lane()


@pytest.fixture
def callbacks() -> tuple[Lane, list]:
    """A lane of a waker, and the callbacks that it schedules."""
    scheduled = []

    class Loop:
        timer = get_hub().loop.timer

        def run_callback(self, callback):
            scheduled.append(callback)
            get_hub().loop.run_callback(callback)

    class Hub:
        loop = Loop()
        switch = get_hub().switch

    return Waker(Hub()).lane(), scheduled


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


def clean(lane: Lane) -> bool:
    settle()
    waker = lane.waker
    return not (lane.due or lane.is_ready or waker.ready or waker.is_scheduled or waker.is_paused)


# --- parking and waking ---


def test_there_is_one_waker_for_each_hub():
    waker = Waker.of(get_hub())
    assert Waker.of(get_hub()) is waker
    assert waker.hub is get_hub()
    others = []

    def in_another_thread():
        others.append(Waker.of(get_hub()))
        get_hub().destroy(destroy_loop=True)

    run_in_thread(in_another_thread)
    assert others[0] is not waker
    assert others[0].hub is not waker.hub


def test_who_parks_runs_on_when_woken(lane):
    waiter = Waiter(lane)
    parked = gevent.spawn(waiter.park)
    settle()
    assert not parked.ready()
    lane.wake(waiter)
    assert not parked.ready()
    settle()
    assert parked.get(block=False) is True
    assert waiter._greenlet is None
    assert clean(lane)


def test_waking_never_switches(lane):
    waiter, trace = Waiter(lane), []
    parked = gevent.spawn(lambda: (waiter.park(), trace.append("woken")))
    settle()
    get_hub().loop.run_callback(lambda: (lane.wake(waiter), trace.append("in the hub")))
    settle()
    assert parked.ready()
    assert trace == ["in the hub", "woken"]


def test_waking_nobody_does_nothing(lane):
    lane.wake(Waiter(lane))
    assert clean(lane)


def test_all_that_become_ready_in_a_turn_are_woken_by_one_callback(callbacks):
    lane, scheduled = callbacks
    order = []
    waiters = [Waiter(lane) for _ in range(40)]
    for index, waiter in enumerate(waiters):
        gevent.spawn(lambda waiter=waiter, index=index: (waiter.park(), order.append(index)))
    settle()
    for waiter in waiters:
        lane.wake(waiter)
        lane.wake(waiter)
    assert len(scheduled) == 1
    settle()
    assert order == list(range(40))
    assert len(scheduled) == 1
    assert clean(lane)


def crowd(lane: Lane, count: int, run) -> list[Waiter]:
    """So many greenlets that park in the lane and then run that, by their number."""
    waiters = [Waiter(lane) for _ in range(count)]
    for index, waiter in enumerate(waiters):
        gevent.spawn(lambda waiter=waiter, index=index: (waiter.park(), run(index)))
    settle()
    return waiters


def test_lanes_take_turns_so_that_one_session_does_not_keep_another_waiting(lane):
    other, order = lane.waker.lane(), []
    many = crowd(lane, 100, lambda index: order.append("many"))
    few = crowd(other, 10, lambda index: order.append("few"))
    lane.waker._left = 10.0  # seconds: no pause, however slow the machine is
    for waiter in many + few:
        waiter._lane.wake(waiter)
    settle()
    lane.waker.looked()
    assert order == ["many"] * 8 + ["few"] * 8 + ["many"] * 8 + ["few"] * 2 + ["many"] * 84
    assert clean(lane)


def test_a_crowd_that_takes_long_lets_the_loop_look_around_in_between(lane, monkeypatch):
    now, ticks = 0.0, []
    monkeypatch.setattr(waking, "monotonic", lambda: now)

    def work(index):
        nonlocal now
        now += 0.0005
        ticks.append(f"{index}")

    waiters = crowd(lane, 12, work)
    for waiter in waiters:
        lane.wake(waiter)
    timer = get_hub().loop.timer(0)
    timer.start(lambda: ticks.append("timer"))
    settle()
    timer.close()
    assert [tick for tick in ticks if tick != "timer"] == [f"{index}" for index in range(12)]
    # The first slice may end early, with what others have used up of it.
    assert ticks.index("timer") <= 4
    assert clean(lane)


def test_who_breathes_goes_on_when_the_loop_has_looked_and_the_others_had_their_turn(lane):
    order = []
    [waiter] = crowd(lane, 1, lambda index: order.append("due before"))
    timer = get_hub().loop.timer(0)
    timer.start(lambda: order.append("timer"))
    lane.waker.burst = 12345
    lane.wake(waiter)
    lane.breathe()
    order.append("on")
    timer.close()
    assert order == ["timer", "due before", "on"]
    assert lane.waker.burst == 0
    assert clean(lane)


def test_a_kill_while_breathing_leaves_nothing_behind(lane):
    breathing = gevent.spawn(lane.breathe)
    gevent.sleep(0)
    breathing.kill()
    assert clean(lane)


def test_who_parks_again_at_once_is_woken_again(lane):
    waiter, count = Waiter(lane), []

    def park_often():
        while len(count) < 3:
            waiter.park()
            count.append(1)
            lane.wake(waiter)

    parked = gevent.spawn(park_often)
    for _ in range(3):
        settle()
        lane.wake(waiter)
    settle()
    assert parked.ready()
    assert clean(lane)


def test_a_wake_in_the_same_turn_as_the_deadline_counts(lane):
    waiter = Waiter(lane)
    parked = gevent.spawn(waiter.park, Deadline(SOON))
    settle()
    ends = time.monotonic() + SOON * 2
    while time.monotonic() < ends:
        pass  # the hub is busy: the timer passes meanwhile
    lane.wake(waiter)
    assert parked.get(timeout=5) is True
    settle()
    assert clean(lane)


def test_at_the_deadline_a_park_ends_with_false(lane):
    waiter = Waiter(lane)
    began = time.monotonic()
    wait_out(waiter, Deadline(SOON))
    assert SOON <= time.monotonic() - began < SOON + 2
    assert waiter._greenlet is None


def test_a_deadline_that_has_passed_is_not_waited_for(lane):
    waiter = Waiter(lane)
    switched = []
    get_hub().loop.run_callback(switched.append, 1)
    assert waiter.park(Deadline(0)) is False
    assert waiter.park(Deadline(-1)) is False
    assert not switched
    assert waiter._greenlet is None
    settle()


def test_a_wake_before_the_deadline_stops_its_timer(lane):
    waiter = Waiter(lane)
    parked = gevent.spawn(waiter.park, Deadline(SOON))
    settle()
    lane.wake(waiter)
    assert parked.get(timeout=5) is True
    # Who parks next must not be struck by the timer of the first.
    assert wait_out(waiter, Deadline(SOON * 3)) <= 2


def test_a_kill_leaves_nothing_behind(lane):
    waiter = Waiter(lane)
    for deadline in (None, Deadline(30)):
        parked = gevent.spawn(waiter.park, deadline)
        settle()
        parked.kill()
        assert waiter._greenlet is None
    lane.wake(waiter)
    assert clean(lane)


def test_a_kill_between_the_wake_and_the_switch_leaves_nothing_behind(lane):
    waiter, other = Waiter(lane), Waiter(lane)
    struck, unharmed = gevent.spawn(waiter.park), gevent.spawn(other.park)
    settle()
    lane.wake(waiter)
    lane.wake(other)
    struck.kill(block=False)
    settle()
    assert isinstance(struck.value, gevent.GreenletExit) or struck.value is True
    assert unharmed.value is True
    assert clean(lane)


def test_a_foreign_timeout_leaves_nothing_behind(lane):
    waiter = Waiter(lane)
    for deadline in (None, Deadline(30)):
        with pytest.raises(gevent.Timeout), gevent.Timeout(SOON):
            waiter.park(deadline)
        assert waiter._greenlet is None
    assert clean(lane)


def test_parking_in_the_hub_itself_is_an_error_and_leaves_nothing_behind(lane):
    waiter, raised = Waiter(lane), []

    def in_the_hub():
        for deadline in (None, Deadline(30)):
            try:
                waiter.park(deadline)
            except BlockingSwitchOutError as error:
                raised.append(error)

    get_hub().loop.run_callback(in_the_hub)
    settle()
    assert len(raised) == 2
    assert waiter._greenlet is None
    assert clean(lane)


def test_a_raw_greenlet_that_dies_does_not_keep_the_others_from_waking(lane, monkeypatch):
    reported = []
    monkeypatch.setattr(lane.hub, "handle_error", lambda *args: reported.append(args), raising=False)
    waiters = [Waiter(lane) for _ in range(3)]
    woken = []

    def die():
        waiters[1].park()
        raise RuntimeError("a raw greenlet died")

    others = [gevent.spawn(lambda w=w: (w.park(), woken.append(w))) for w in (waiters[0], waiters[2])]
    dying = RawGreenlet(die, parent=get_hub())
    get_hub().loop.run_callback(dying.switch)
    settle()
    for waiter in waiters:
        lane.wake(waiter)
    settle()
    assert woken == [waiters[0], waiters[2]]
    assert all(greenlet.ready() for greenlet in others)
    [(context, kind, error, traceback)] = reported
    assert context is waiters[1]
    assert kind is RuntimeError
    assert str(error) == "a raw greenlet died"
    assert traceback is not None
    assert dying.dead
    assert clean(lane)


def test_a_waker_ends_with_its_hub():
    gone = []

    def in_another_thread():
        gone.append(weakref.ref(Waker.of(get_hub())))
        gone.append(weakref.ref(get_hub()))
        get_hub().destroy(destroy_loop=True)

    run_in_thread(in_another_thread)
    gc.collect()
    assert [reference() for reference in gone] == [None, None]


def test_a_pause_whose_end_was_lost_is_healed_by_two_beats(lane):
    woken = []
    [waiter] = crowd(lane, 1, woken.append)
    waker = lane.waker
    waker.pause()
    waker._timer.stop()  # as if a signal handler had raised in its callback
    lane.wake(waiter)
    settle()
    assert not woken
    waker.heal()
    settle()
    assert not woken
    waker.heal()
    settle()
    assert woken == [0]
    waker._timer.close()
    assert clean(lane)


def test_a_run_that_was_lost_is_healed_by_a_beat(lane):
    woken = []
    [waiter] = crowd(lane, 1, woken.append)
    lane.waker.is_scheduled = True  # and nothing is
    lane.wake(waiter)
    settle()
    assert not woken
    lane.waker.heal()
    settle()
    assert woken == [0]
    assert clean(lane)


# --- lines ---


class Queueing:
    """Greenlets that stand in one line until each was served."""

    def __init__(self, lane: Lane) -> None:
        self.line = WaitList(lane)
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
def queueing(lane: Lane) -> Queueing:
    return Queueing(lane)


def test_a_line_is_served_in_the_order_of_coming(queueing):
    for name in "abc":
        queueing.start(name)
    assert len(queueing.line) == 3
    queueing.deliver()
    assert queueing.served == ["a"]
    queueing.deliver(2)
    assert queueing.served == ["a", "b", "c"]
    assert not queueing.line
    assert clean(queueing.line._lane)


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


def test_waking_an_empty_line_does_nothing(lane):
    line = WaitList(lane)
    line.wake_first()
    line.wake_all()
    assert clean(lane)


@given(st.lists(st.sampled_from(["come", "serve", "kill first", "kill last", "time passes"]), max_size=25))
def test_whatever_strikes_everybody_is_served_in_order_or_struck(events):
    queueing = Queueing(Waker.of(get_hub()).lane())
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


def test_a_milestone_wakes_those_it_reaches_and_nobody_else(lane):
    milestones, passed = Milestones(lane), []

    def wait(number):
        waiter = Waiter(lane)
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


def test_who_leaves_a_milestone_is_forgotten_and_others_of_the_same_number_are_not(lane):
    milestones = Milestones(lane)
    entries = [milestones.enter(4, Waiter(lane)) for _ in range(3)]
    milestones.leave(entries[1])
    assert len(milestones) == 2
    milestones.reach(4)
    assert not milestones
    for entry in entries:
        milestones.leave(entry)  # fine for one that was reached, too
    assert clean(lane)
