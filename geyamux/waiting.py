"""Waiting: a timeout becomes a deadline once; a greenlet parks, is woken, and leaves no trace.

Every wait of geyamux that may be hot goes through here, and every one is level triggered::

    while not condition:
        if not waiter.park(deadline):
            raise timed_out()

A wake is a hint, never a fact: the one who is woken looks again. So a spurious wake is harmless, and a kill or a foreign
``gevent.Timeout`` may strike in ``park`` at any time; it undoes itself.

gevent's own Event costs three to four times as much for a round trip (4 against 1 microseconds) and 140 bytes before
anybody waits. What parks here is woken by *one* callback for all that became ready in a turn of the loop: 100 streams of
ping-pong are a third faster so than with a callback each.
"""

from __future__ import annotations

import sys
import time
from bisect import bisect_left, insort
from collections import OrderedDict, deque
from collections.abc import Callable, Hashable
from typing import Any, Generic, TypeVar

import gevent
from gevent import monkey
from gevent.hub import Hub

__all__ = [
    "LATE",
    "Deadline",
    "Expiry",
    "Milestones",
    "StallTimer",
    "WaitList",
    "Waiter",
    "Waker",
    "get_thread",
    "is_libuv",
    "run_links",
    "start_timer",
    "timed_out",
]

#: So many greenlets are switched to in one callback; the rest waits for the next, so that timers get their turn.
_WAKES_A_CALLBACK = 64

#: A timer so many seconds late means that our own hub was blocked, not that the peer was silent.
LATE = 0.5

#: The identity of a thread. After monkey-patching, ``threading.get_ident`` is that of a greenlet.
get_thread: Callable[[], int] = monkey.get_original("_thread", "get_ident")

Key = TypeVar("Key", bound=Hashable)


def timed_out() -> TimeoutError:
    """The error of every time limit that passes: exactly that of a socket."""
    return TimeoutError("timed out")


def is_libuv(hub: Hub) -> bool:
    """gevent runs on libuv here, not on libev."""
    return "libuv" in type(hub.loop).__module__


def start_timer(hub: Hub, seconds: float, callback: Callable[[], None], *, ref: bool = True) -> Any:
    """A started timer of the loop, to be stopped and closed; without `ref` it does not keep the loop alive.

    libuv counts whole milliseconds and drops what is over: there it gets one more. It warns of less than one, and makes a
    watcher of another kind for no time at all.
    """
    seconds = max(seconds, 0.001)
    timer = hub.loop.timer(seconds + 0.001 if is_libuv(hub) else seconds, ref=ref)
    timer.start(callback, update=True)
    return timer


class Deadline:
    """A moment on the monotonic clock, made once for each operation from its timeout in seconds."""

    __slots__ = ("moment",)

    def __init__(self, timeout: float) -> None:
        self.moment = time.monotonic() + timeout

    @classmethod
    def after(cls, timeout: float | None) -> Deadline | None:
        """The deadline in `timeout` seconds; None stays None: never."""
        return None if timeout is None else cls(timeout)

    def left(self) -> float:
        """Seconds until then, 0.0 when it has passed."""
        return max(0.0, self.moment - time.monotonic())


def earlier(first: Deadline | None, second: Deadline | None) -> Deadline | None:
    """The one that comes first; None never comes."""
    if first is None or second is None:
        return first or second
    return first if first.moment <= second.moment else second


class Waker:
    """Switches to all greenlets that became ready in a turn of the loop, by one callback. One for each hub."""

    def __init__(self, hub: Hub) -> None:
        self.hub = hub
        self._due: deque[Waiter] = deque()
        #: A callback that will look at them is under way.
        self._is_scheduled = False

    @classmethod
    def of(cls, hub: Hub) -> Waker:
        """The one of this hub."""
        waker = getattr(hub, "_geyamux_waker", None)
        if not isinstance(waker, cls):
            waker = cls(hub)
            hub._geyamux_waker = waker  # type: ignore[attr-defined]  # a hub takes attributes; so both end together
        return waker

    def wake(self, waiter: Waiter) -> None:
        """Let the greenlet that parks there run soon. Never switches, so it may be called from anywhere in the hub."""
        waiter.is_late = False
        if waiter.greenlet is None or waiter.is_due:
            return
        waiter.is_due = True
        self._due.append(waiter)
        if not self._is_scheduled:
            self._is_scheduled = True
            self.hub.loop.run_callback(self._run)

    def _run(self) -> None:
        due = self._due
        for _ in range(min(len(due), _WAKES_A_CALLBACK)):
            waiter = due.popleft()
            if waiter.greenlet is not None:
                try:
                    waiter.greenlet.switch()
                except BaseException:
                    # A raw greenlet that dies raises here, in whoever switched to it; the others must be woken still.
                    self.hub.handle_error(waiter, *sys.exc_info())
        self._is_scheduled = bool(due)
        if due:
            self.hub.loop.run_callback(self._run)


class Waiter:
    """One greenlet's place to park, for the length of one operation."""

    __slots__ = ("_waker", "greenlet", "is_due", "is_late")

    def __init__(self, waker: Waker) -> None:
        self._waker = waker
        #: Who parks here; None while nobody does.
        self.greenlet: Any = None
        #: A wake is under way.
        self.is_due = False
        #: ... because the deadline passed, and for nothing else.
        self.is_late = False

    def park(self, deadline: Deadline | None = None) -> bool:
        """Switch to the hub until woken, True, or until the deadline, False. BlockingSwitchOutError in the hub itself."""
        hub = self._waker.hub
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
            self._waker.wake(self)
            self.is_late = True


class WaitList:
    """Greenlets that want the same thing, first come first served. Who is first keeps the turn until it leaves."""

    __slots__ = ("_waker", "waiters")

    def __init__(self, waker: Waker) -> None:
        self._waker = waker
        #: Who stands in line. A list: an empty deque costs ten times as much, and most lines are short.
        self.waiters: list[Waiter] = []

    def __len__(self) -> int:
        return len(self.waiters)

    def enter(self, waiter: Waiter | None = None) -> Waiter:
        """Stand at the end of the line, with a waiter that may stand in others, too. Leave it in a ``finally``."""
        if waiter is None:
            waiter = Waiter(self._waker)
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
            self._waker.wake(self.waiters[0])

    def wake_all(self) -> None:
        """Something ended or changed for everyone: let all look."""
        for waiter in self.waiters:
            self._waker.wake(waiter)


class Milestones:
    """Greenlets that wait for a growing count to reach numbers of their own. Growth costs nothing for the others."""

    __slots__ = ("_entries", "_serial", "_waker")

    def __init__(self, waker: Waker) -> None:
        self._waker = waker
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
                self._waker.wake(waiter)
            del entries[:passed]

    def wake_all(self) -> None:
        """The count will grow no more."""
        for _, _, waiter in self._entries:
            self._waker.wake(waiter)


def run_links(hub: Hub, links: list[Callable[[Any], object]], source: Any) -> None:
    """Call the callbacks of gevent.wait, in the hub; one that fails does not keep the others from being called."""
    for link in links:
        try:
            link(source)
        except BaseException:
            hub.handle_error((link, source), *sys.exc_info())


class StallTimer:
    """Watches for progress that does not come. A timer that is late itself blames our own hub, and begins anew.

    Disarming leaves the timer of the loop running: arming and disarming happen with every send of a busy connection.
    """

    def __init__(
        self,
        hub: Hub,
        timeout: float | None,
        *,
        on_stalled: Callable[[], None],
        on_hub_blocked: Callable[[float], None],
    ) -> None:
        self.timeout = timeout
        self._hub = hub
        self._on_stalled = on_stalled
        self._on_hub_blocked = on_hub_blocked
        #: The loop's timer; None while none runs. One serves once: started again it would go on with what was left.
        self._timer: Any = None
        #: When it will pass, on the monotonic clock; None while nothing waits.
        self._moment: float | None = None
        self._is_closed = False

    @property
    def is_armed(self) -> bool:
        """Progress is being waited for."""
        return self._moment is not None

    def arm(self) -> None:
        """Something waits now; nothing changes where something waited before."""
        if self._moment is None and self.timeout is not None and not self._is_closed:
            self._moment = time.monotonic() + self.timeout
            if self._timer is None:
                self._start(self.timeout)

    def disarm(self) -> None:
        """There was progress, or nothing waits."""
        self._moment = None

    def close(self) -> None:
        """Never pass."""
        self._is_closed = True
        self._moment = None
        self._stop()

    def _start(self, seconds: float) -> None:
        self._timer = start_timer(self._hub, seconds, self._on_timer, ref=False)

    def _stop(self) -> None:
        if self._timer is not None:
            self._timer.stop()
            self._timer.close()
            self._timer = None

    def _on_timer(self) -> None:
        self._timer.stop()
        self._hub.loop.run_callback(self._timer.close)
        self._timer = None
        if self._moment is None:
            return
        late = time.monotonic() - self._moment
        if late < 0:
            self._start(-late)
            return
        if late > LATE:
            self._moment = None
            self._on_hub_blocked(late)
            self.arm()
        else:
            # The loop runs timers before what came in at the same time, and that wakes the one who would make progress.
            self._hub.loop.run_callback(self._hub.loop.run_callback, self._decide, self._moment)

    def _decide(self, moment: float) -> None:
        if self._moment == moment:
            self._moment = None
            self._on_stalled()


class Expiry(Generic[Key]):
    """Deadlines of one kind. All have the same length, so the order of entry is the order of passing: no heap."""

    __slots__ = ("_moments", "_timeout")

    def __init__(self, timeout: float | None) -> None:
        self._timeout = timeout
        self._moments: OrderedDict[Key, float] = OrderedDict()

    def __len__(self) -> int:
        return len(self._moments)

    def add(self, key: Key) -> float | None:
        """Let it pass after the timeout, and return when that is; with the timeout None, never."""
        if self._timeout is None:
            return None
        moment = self._moments[key] = time.monotonic() + self._timeout
        return moment

    def remove(self, key: Key) -> None:
        """Its reason is gone; unknown keys are fine."""
        self._moments.pop(key, None)

    def clear(self) -> None:
        """Nothing is waited for any more."""
        self._moments.clear()

    def next_moment(self) -> float | None:
        """When the first passes, on the monotonic clock."""
        return next(iter(self._moments.values()), None)

    def pop_passed(self, now: float) -> list[Key]:
        """Remove and return all that have passed."""
        passed = []
        while self._moments and next(iter(self._moments.values())) <= now:
            passed.append(self._moments.popitem(last=False)[0])
        return passed

    def postpone(self, seconds: float) -> None:
        """Move all of them: time during which our own hub was blocked is nobody's fault."""
        for key in self._moments:
            self._moments[key] += seconds
