"""Waking: a greenlet parks, is woken in its turn, and leaves no trace.

Every wait of geyamux that may be hot goes through here, and every one is level triggered::

    while not condition:
        if not waiter.park(deadline):
            raise timed_out()

A wake is a hint, never a fact: the one who is woken looks again. So a spurious wake is harmless, and a kill or a foreign
``gevent.Timeout`` may strike in ``park`` at any time; it undoes itself.

gevent's own Event costs three to four times as much for a round trip (4 against 1 microseconds) and 140 bytes before
anybody waits. What parks here is woken by *one* callback for all that became ready in a turn of the loop: 100 streams of
ping-pong are a third faster so than with a callback each.

Who reads a descriptor holds the waker meanwhile (`hold`, `release`): those who became ready by what was received run at
once, without a callback, and what they write leaves right after them. That is a fifth of a round trip.

One peer can make thousands of greenlets ready by one packet. So each session has a lane, lanes take turns, and after two
milliseconds of it the loop looks at descriptors and timers before it goes on. (gevent by itself looks at the clock after
fifty callbacks, however long they take.) See ``spec.md`` R27.
"""

from __future__ import annotations

import sys
from bisect import bisect_left, insort
from collections import deque
from collections.abc import Callable
from time import monotonic
from typing import Any, Protocol

from gevent import getcurrent
from gevent.hub import Hub

from .waiting import Deadline, Pulse, start_timer

__all__ = ["Lane", "Milestones", "WaitList", "Waiter", "Waker"]

#: So many greenlets of one lane are switched to before the next lane has its turn.
_WAKES_A_TURN = 8
#: So long greenlets are switched to before the loop looks at descriptors and timers, in seconds.
_SLICE = 0.002


class Waker:
    """Switches to all greenlets of a hub that became ready, lane by lane, and lets the loop breathe in between."""

    def __init__(self, hub: Hub) -> None:
        self.hub = hub
        #: Work that writers did without a wait since the last pause. Theirs to count, and to ask for a pause.
        self.burst = 0
        #: Lanes in which somebody is due, in the order of their turns.
        self.ready: deque[Lane] = deque()
        #: Somebody will look at them: a callback that is under way, or who holds.
        self.is_scheduled = False
        #: Greenlets are being switched to; `at_end` will be called.
        self.is_running = False
        #: What to do when they have had their turns, once: send what they wrote.
        self.at_end: list[Callable[[], None]] = []
        #: What is left of the slice, in seconds.
        self._left = _SLICE
        #: When the loop looked last, by its own clock.
        self._looked_at = 0.0
        #: Nobody is woken until the loop has looked around; the timer says when.
        self.is_paused = False
        self._timer: Any = None
        #: The pause that the last beat found; nothing can pause for so long.
        self._seen_pause: Any = None

    @classmethod
    def of(cls, hub: Hub) -> Waker:
        """The one of this hub."""
        waker = getattr(hub, "_geyamux_waker", None)
        if not isinstance(waker, cls):
            waker = cls(hub)
            Pulse.of(hub).heal = waker.heal
            hub._geyamux_waker = waker  # type: ignore[attr-defined]  # a hub takes attributes; so both end together
        return waker

    def lane(self) -> Lane:
        """A new one, for a session."""
        return Lane(self)

    def pause(self) -> None:
        """Wake nobody before the loop has looked at descriptors and timers. Work is counted anew from there."""
        if not self.is_paused:
            # Without a delay it passes in the next iteration of the loop.
            self._timer = self.hub.loop.timer(0)
            self._timer.start(self._on_looked)
            self.is_paused = True

    def _on_looked(self) -> None:
        # Its timer must not be closed in its own callback.
        self._timer.stop()
        self.hub.loop.run_callback(self._go_on)

    def _go_on(self) -> None:
        self.is_paused = False
        self.looked()
        self._timer.close()
        self._run()

    # In what follows, where a signal handler raises between two steps, somebody is woken twice, but nobody never.

    def heal(self) -> None:
        """Nobody stays due for ever because a signal handler raised in a callback."""
        if self.is_paused and self._seen_pause is self._timer:
            self.is_paused = False
        self._seen_pause = self._timer if self.is_paused else None
        if self.ready and not self.is_paused:
            self.hub.loop.run_callback(self._run)

    def looked(self) -> None:
        """The loop has looked at descriptors and timers: work is counted anew."""
        self.burst = 0
        self._left = _SLICE

    def hold(self) -> None:
        """For a watcher's callback: whoever becomes ready now runs at `release`. Call that in a ``finally``.

        All callbacks of one turn of the loop share a slice, or a thousand sessions would have a thousand.
        """
        now = self.hub.loop.now()
        if now != self._looked_at:
            self._looked_at = now
            self.burst = 0
            self._left = _SLICE
        self.is_scheduled = True

    def release(self, now: float) -> None:
        """Switch to those who became ready since then. More run in a callback where it takes long."""
        if self.ready and not self.is_paused:
            self._run(now)
        else:
            self.is_scheduled = False

    def _run(self, now: float | None = None) -> None:
        """Switch to those who are due, lane by lane. One function: a call more for each is a fiftieth of a round trip."""
        ready = self.ready
        if now is None:
            now = monotonic()
        until = now + self._left
        self.is_running = True
        try:
            while ready and not self.is_paused:
                lane = ready[0]
                due = lane.due
                for _ in range(min(len(due), _WAKES_A_TURN)):
                    greenlet = due[0]._greenlet
                    if greenlet is not None:
                        try:
                            greenlet.switch()
                        except BaseException:
                            self._on_raised(due[0], due)
                    due.popleft()
                    now = monotonic()
                    if now >= until:
                        self.pause()
                    if self.is_paused:
                        break
                if not due:
                    lane.is_ready = False
                    ready.popleft()
                elif len(ready) > 1:
                    ready.rotate(-1)
        finally:
            self._left = until - now
            self.is_running = self.is_scheduled = False
            if ready and not self.is_paused:
                self.hub.loop.run_callback(self._run)
                self.is_scheduled = True
            at_end = self.at_end
            while at_end:
                at_end.pop()()

    def _on_raised(self, parked: Parked, due: deque[Parked]) -> None:
        """A raw greenlet that dies raises in whoever switched to it; the others must be woken still."""
        self.hub.handle_error(parked, *sys.exc_info())
        if parked._greenlet is not None and not parked._greenlet.dead:
            # A signal handler raised before the switch.
            due.append(parked)


class Parked(Protocol):
    """Where a greenlet parks. A stream is one for the only one who reads it, and so saves both a line and a waiter."""

    #: Who parks here; None while nobody does.
    _greenlet: Any


class Lane:
    """The greenlets of one session that became ready, in order. Lines and waiters are made with it."""

    __slots__ = ("due", "hub", "is_ready", "switch", "waker")

    def __init__(self, waker: Waker) -> None:
        self.waker = waker
        self.hub = waker.hub
        #: To the hub, until something switches back.
        self.switch = waker.hub.switch
        #: Who will be switched to.
        self.due: deque[Parked] = deque()
        #: It stands among the lanes that take turns.
        self.is_ready = False

    def wake(self, waiter: Waiter) -> None:
        """Let the greenlet that parks there run soon. Never switches, so it may be called from anywhere in the hub."""
        waiter.is_late = False
        if waiter._greenlet is not None and not waiter.is_due:
            self.wake_parked(waiter)
            waiter.is_due = True

    def wake_parked(self, parked: Parked) -> None:
        """The same where somebody parks for certain; if that is said twice, it may be woken twice."""
        if not self.is_ready:
            self.get_ready()
        self.due.append(parked)

    def get_ready(self) -> None:
        """Somebody is about to be due, and nobody was."""
        waker = self.waker
        if not (waker.is_scheduled or waker.is_paused):
            waker.hub.loop.run_callback(waker._run)
            waker.is_scheduled = True
        waker.ready.append(self)
        self.is_ready = True

    def breathe(self) -> None:
        """Go on when the loop has looked around and those had their turn who are due. Not for the hub itself."""
        self.waker.pause()
        waiter = Waiter(self)
        waiter._greenlet = getcurrent()
        try:
            self.wake(waiter)
            self.switch()
        finally:
            waiter._greenlet = None


class Waiter:
    """One greenlet's place to park, for the length of one operation."""

    __slots__ = ("_greenlet", "_lane", "is_due", "is_late")

    def __init__(self, lane: Lane) -> None:
        self._lane = lane
        #: Who parks here; None while nobody does.
        self._greenlet: Any = None
        #: A wake is under way.
        self.is_due = False
        #: ... because the deadline passed, and for nothing else.
        self.is_late = False

    def park(self, deadline: Deadline | None = None) -> bool:
        """Switch to the hub until woken, True, or until the deadline, False. BlockingSwitchOutError in the hub itself."""
        lane, timer = self._lane, None
        self._greenlet = getcurrent()
        self.is_due = self.is_late = False
        try:
            if deadline is None:
                lane.switch()
                return True
            if deadline.left() <= 0:
                return False
            timer = start_timer(lane.hub, deadline.left(), self._on_timer)
            lane.switch()
            return not self.is_late or deadline.left() > 0
        finally:
            self._greenlet = None
            if timer is not None:
                timer.stop()
                timer.close()

    def _on_timer(self) -> None:
        # Not a switch from here: the greenlet would close the timer inside its own callback. A wake counts, if it comes.
        if not self.is_due:
            self._lane.wake(self)
            self.is_late = True


class WaitList:
    """Greenlets that want the same thing, first come first served. Who is first keeps the turn until it leaves."""

    __slots__ = ("_lane", "waiters")

    def __init__(self, lane: Lane) -> None:
        self._lane = lane
        #: Who stands in line. A list: an empty deque costs ten times as much, and most lines are short.
        self.waiters: list[Waiter] = []

    def __len__(self) -> int:
        return len(self.waiters)

    def enter(self, waiter: Waiter | None = None) -> Waiter:
        """Stand at the end of the line, with a waiter that may stand in others, too. Leave it in a ``finally``."""
        if waiter is None:
            waiter = Waiter(self._lane)
        self.waiters.append(waiter)
        return waiter

    def leave(self, waiter: Waiter) -> bool:
        """Give up the place; who is first now is woken. False: nobody stands here any more."""
        self.waiters.remove(waiter)
        if self.waiters:
            self._lane.wake(self.waiters[0])
            return True
        return False

    def is_first(self, waiter: Waiter) -> bool:
        """It is this one's turn."""
        return self.waiters[0] is waiter

    def wake_first(self) -> None:
        """What is wanted may be there: let the first look."""
        if self.waiters:
            self._lane.wake(self.waiters[0])

    def wake_all(self) -> None:
        """Something ended or changed for everyone: let all look."""
        for waiter in self.waiters:
            self._lane.wake(waiter)


class Milestones:
    """Greenlets that wait for a growing count to reach numbers of their own. Growth costs nothing for the others."""

    __slots__ = ("_lane", "_serial", "entries")

    def __init__(self, lane: Lane) -> None:
        self._lane = lane
        #: (number, serial, waiter) in this order; the serial tells equal numbers apart.
        self.entries: list[tuple[int, int, Waiter]] = []
        self._serial = 0

    def __len__(self) -> int:
        return len(self.entries)

    def enter(self, number: int, waiter: Waiter) -> tuple[int, int, Waiter]:
        """Have it woken when the count reaches the number; returns what to `leave` with, in a ``finally``."""
        self._serial += 1
        entry = (number, self._serial, waiter)
        insort(self.entries, entry)
        return entry

    def leave(self, entry: tuple[int, int, Waiter]) -> None:
        """Wait no more; fine also for one that was woken."""
        index = bisect_left(self.entries, entry[:2])
        if index < len(self.entries) and self.entries[index] is entry:
            del self.entries[index]

    def reach(self, count: int) -> None:
        """Wake those whose number is `count` or less."""
        entries = self.entries
        if entries and entries[0][0] <= count:
            passed = bisect_left(entries, (count + 1,))
            for _, _, waiter in entries[:passed]:
                self._lane.wake(waiter)
            del entries[:passed]

    def wake_all(self) -> None:
        """The count will grow no more."""
        for _, _, waiter in self.entries:
            self._lane.wake(waiter)
