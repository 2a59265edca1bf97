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

One peer can make thousands of greenlets ready by one packet. So each session has a lane, lanes take turns, and after two
milliseconds of it the loop looks at descriptors and timers before it goes on. (gevent by itself looks at the clock after
fifty callbacks, however long they take.) See ``spec.md`` R27.
"""

from __future__ import annotations

import sys
from bisect import bisect_left, insort
from collections import deque
from time import monotonic
from typing import Any

import gevent
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
        self._ready: deque[Lane] = deque()
        #: A callback that will look at them is under way.
        self._is_scheduled = False
        #: What is left of the slice, in seconds.
        self._left = _SLICE
        #: Nobody is woken until the loop has looked around; the timer says when.
        self._is_paused = False
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
        if not self._is_paused:
            # Without a delay it passes in the next iteration of the loop.
            self._timer = self.hub.loop.timer(0)
            self._timer.start(self._on_looked)
            self._is_paused = True

    def _on_looked(self) -> None:
        # Its timer must not be closed in its own callback.
        self._timer.stop()
        self.hub.loop.run_callback(self._go_on)

    def _go_on(self) -> None:
        self._is_paused = False
        self.looked()
        self._timer.close()
        self._run()

    # In what follows, where a signal handler raises between two steps, somebody is woken twice, but nobody never.

    def schedule(self, lane: Lane) -> None:
        """Somebody is due in a lane that had nobody."""
        if not (self._is_scheduled or self._is_paused):
            self.hub.loop.run_callback(self._run)
            self._is_scheduled = True
        self._ready.append(lane)

    def heal(self) -> None:
        """Nobody stays due for ever because a signal handler raised in a callback."""
        if self._is_paused and self._seen_pause is self._timer:
            self._is_paused = False
        self._seen_pause = self._timer if self._is_paused else None
        if self._ready and not self._is_paused:
            self.hub.loop.run_callback(self._run)

    def looked(self) -> None:
        """The loop has looked at descriptors and timers: work is counted anew."""
        self.burst = 0
        self._left = _SLICE

    def _run(self) -> None:
        ready = self._ready
        until = monotonic() + self._left
        try:
            while ready and not self._is_paused:
                lane = ready[0]
                self._give_turn(lane, until)
                if not lane.due:
                    lane.is_ready = False
                    ready.popleft()
                elif len(ready) > 1:
                    ready.rotate(-1)
        finally:
            self._left = until - monotonic()
            self._is_scheduled = False
            if self._left <= 0.0:
                self.pause()
            elif ready and not self._is_paused:
                self.hub.loop.run_callback(self._run)
                self._is_scheduled = True

    def _give_turn(self, lane: Lane, until: float) -> None:
        due = lane.due
        for _ in range(min(len(due), _WAKES_A_TURN)):
            waiter = due[0]
            if waiter.greenlet is not None:
                try:
                    waiter.greenlet.switch()
                except BaseException:
                    # A raw greenlet that dies raises here, in whoever switched to it; the others must be woken still.
                    self.hub.handle_error(waiter, *sys.exc_info())
                    if waiter.greenlet is not None and not waiter.greenlet.dead:
                        # A signal handler raised before the switch.
                        due.append(waiter)
            due.popleft()
            if self._is_paused:
                return
            if monotonic() >= until:
                self.pause()
                return


class Lane:
    """The greenlets of one session that became ready, in order. Lines and waiters are made with it."""

    __slots__ = ("due", "hub", "is_ready", "waker")

    def __init__(self, waker: Waker) -> None:
        self.waker = waker
        self.hub = waker.hub
        #: Who will be switched to.
        self.due: deque[Waiter] = deque()
        #: It stands among the lanes that take turns.
        self.is_ready = False

    def wake(self, waiter: Waiter) -> None:
        """Let the greenlet that parks there run soon. Never switches, so it may be called from anywhere in the hub."""
        waiter.is_late = False
        if waiter.greenlet is None or waiter.is_due:
            return
        if not self.is_ready:
            self.waker.schedule(self)
            self.is_ready = True
        self.due.append(waiter)
        waiter.is_due = True

    def breathe(self) -> None:
        """Go on when the loop has looked around and those had their turn who are due. Not for the hub itself."""
        self.waker.pause()
        waiter = Waiter(self)
        waiter.greenlet = gevent.getcurrent()
        try:
            self.wake(waiter)
            self.hub.switch()
        finally:
            waiter.greenlet = None


class Waiter:
    """One greenlet's place to park, for the length of one operation."""

    __slots__ = ("_lane", "greenlet", "is_due", "is_late")

    def __init__(self, lane: Lane) -> None:
        self._lane = lane
        #: Who parks here; None while nobody does.
        self.greenlet: Any = None
        #: A wake is under way.
        self.is_due = False
        #: ... because the deadline passed, and for nothing else.
        self.is_late = False

    def park(self, deadline: Deadline | None = None) -> bool:
        """Switch to the hub until woken, True, or until the deadline, False. BlockingSwitchOutError in the hub itself."""
        hub = self._lane.hub
        timer = None
        self.greenlet = gevent.getcurrent()
        self.is_due = self.is_late = False
        try:
            if deadline is None:
                hub.switch()
                return True
            if deadline.left() <= 0:
                return False
            timer = start_timer(hub, deadline.left(), self._on_timer)
            hub.switch()
            return not self.is_late or deadline.left() > 0
        finally:
            self.greenlet = None
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

    def leave(self, waiter: Waiter) -> None:
        """Give up the place; who is first now is woken."""
        self.waiters.remove(waiter)
        self.wake_first()

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

    __slots__ = ("_entries", "_lane", "_serial")

    def __init__(self, lane: Lane) -> None:
        self._lane = lane
        #: (number, serial, waiter) in this order; the serial tells equal numbers apart.
        self._entries: list[tuple[int, int, Waiter]] = []
        self._serial = 0

    def __len__(self) -> int:
        return len(self._entries)

    def enter(self, number: int, waiter: Waiter) -> tuple[int, int, Waiter]:
        """Have it woken when the count reaches the number; returns what to `leave` with, in a ``finally``."""
        self._serial += 1
        entry = (number, self._serial, waiter)
        insort(self._entries, entry)
        return entry

    def leave(self, entry: tuple[int, int, Waiter]) -> None:
        """Wait no more; fine also for one that was woken."""
        index = bisect_left(self._entries, entry[:2])
        if index < len(self._entries) and self._entries[index] is entry:
            del self._entries[index]

    def reach(self, count: int) -> None:
        """Wake those whose number is `count` or less."""
        entries = self._entries
        if entries and entries[0][0] <= count:
            passed = bisect_left(entries, (count + 1,))
            for _, _, waiter in entries[:passed]:
                self._lane.wake(waiter)
            del entries[:passed]

    def wake_all(self) -> None:
        """The count will grow no more."""
        for _, _, waiter in self._entries:
            self._lane.wake(waiter)
