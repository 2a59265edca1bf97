"""Time and threads: deadlines, timers of the loop, limits that pass, and who may act at once.

Greenlets that wait for each other are the matter of :mod:`~geyamux.waking`; here nothing is woken. The monotonic clock
everywhere; a timer that is late blames our own hub, never the peer. A callback of the loop that raises must not keep
others from being called.
"""

from __future__ import annotations

import itertools
import sys
import time
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any, Generic, TypeVar

from gevent import monkey
from gevent.hub import Hub

__all__ = [
    "LATE",
    "Deadline",
    "Expiry",
    "Pulse",
    "StallTimer",
    "get_thread",
    "is_libuv",
    "may_act",
    "run_links",
    "start_timer",
    "timed_out",
]

#: A timer so many seconds late means that our own hub was blocked, not that the peer was silent.
LATE = 0.5

#: Longer than any program runs, in seconds; libuv takes no infinity.
_NEVER = 1e9

#: How often a hub is seen to be alive, in seconds: what the length of a block may be wrong by, half of it either way.
_BEAT = 0.25

#: The identity of a thread. After monkey-patching, ``threading.get_ident`` is that of a greenlet.
get_thread: Callable[[], int] = monkey.get_original("_thread", "get_ident")

Key = TypeVar("Key", bound=Hashable)


#: The modules whose work must not be interrupted by itself.
_AT_WORK = frozenset(
    "geyamux." + name
    for name in (
        *("duplex", "flow", "lifecycle", "liveness", "outbox", "reader"),
        *("session", "stream", "table", "urgent", "waiting", "waking"),
    )
)


def may_act(thread: int) -> bool:
    """Whether the caller of the caller's caller may change state at once; else it must be handed over to the hub.

    Between two waits nothing else runs, so state is changed without locks. But a finaliser or a signal handler runs in
    the middle of anything, our own work included, and so would its ``close()`` of a stream or a session; and another
    thread runs at any time.
    """
    if get_thread() != thread:
        return False
    frame = sys._getframe(2).f_back
    while frame is not None:
        if frame.f_globals.get("__name__") in _AT_WORK:
            return False
        frame = frame.f_back
    return True


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
    # Never is far away for libuv, too; who is woken early looks again.
    seconds = min(max(seconds, 0.001), _NEVER)
    timer = hub.loop.timer(seconds + 0.001 if is_libuv(hub) else seconds, ref=ref)
    timer.start(callback, update=True)
    return timer


class Deadline:
    """A moment on the monotonic clock, made once for each operation from its timeout in seconds."""

    __slots__ = ("moment",)

    def __init__(self, timeout: float) -> None:
        self.moment = time.monotonic() + timeout

    def postpone(self, seconds: float) -> None:
        """Move it: time that was nobody's to use does not count."""
        self.moment += seconds

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


def run_links(hub: Hub, links: list[Callable[[Any], object]], source: Any) -> None:
    """Call the callbacks of gevent.wait, in the hub; one that fails does not keep the others from being called."""
    for link in links:
        try:
            link(source)
        except BaseException:
            hub.handle_error((link, source), *sys.exc_info())


class Pulse:
    """Notices that the hub was blocked, and tells all who listen for how long. One for each hub.

    It beats while somebody listens. That is the only way to know when the hub was seen alive last.
    """

    def __init__(self, hub: Hub) -> None:
        self._hub = hub
        #: A dict, so that one of ten thousand leaves at once.
        self._listeners: dict[Callable[[float], None], None] = {}
        #: Called at each beat: see to it that nothing was left undone by a signal handler that raised.
        self.heal: Callable[[], None] = lambda: None
        self._timer: Any = None
        #: When the last beat was, on the monotonic clock.
        self._beat_at = 0.0

    @classmethod
    def of(cls, hub: Hub) -> Pulse:
        """The one of this hub."""
        pulse = getattr(hub, "_geyamux_pulse", None)
        if not isinstance(pulse, cls):
            pulse = cls(hub)
            hub._geyamux_pulse = pulse  # type: ignore[attr-defined]  # a hub takes attributes; so both end together
        return pulse

    def enter(self, listener: Callable[[float], None]) -> None:
        """Call ``listener(seconds)`` after each block, until it leaves."""
        self._listeners[listener] = None
        if self._timer is None:
            self._beat_at = time.monotonic()
            self._timer = self._hub.loop.timer(_BEAT, repeat=_BEAT, ref=False)
            self._timer.start(self._on_beat, update=True)

    def leave(self, listener: Callable[[float], None]) -> None:
        """Listen no more; fine for one that does not."""
        self._listeners.pop(listener, None)
        if not self._listeners and self._timer is not None:
            # Perhaps from a beat: its timer must not be closed in its own callback.
            timer, self._timer = self._timer, None
            timer.stop()
            if self._hub.loop is not None:
                self._hub.loop.run_callback(timer.close)

    def _on_beat(self) -> None:
        now = time.monotonic()
        silent, self._beat_at = now - self._beat_at, now
        self.heal()
        if silent - _BEAT > LATE:
            for listener in list(self._listeners):
                try:
                    listener(silent - _BEAT / 2)
                except BaseException:
                    self._hub.handle_error(listener, *sys.exc_info())


class StallTimer:
    """Watches for progress that does not come. A timer that is late itself blames our own hub, and begins anew.

    Disarming leaves the timer of the loop running: arming and disarming happen with every send of a busy connection.
    """

    def __init__(self, hub: Hub, timeout: float | None, *, on_stalled: Callable[[], None]) -> None:
        self.timeout = timeout
        self._hub = hub
        self._on_stalled = on_stalled
        #: The loop's timer; None while none runs. One serves once: started again it would go on with what was left.
        self._timer: Any = None
        #: When it will pass, on the monotonic clock; None while nothing waits.
        self.moment: float | None = None
        self._is_closed = False

    @property
    def is_armed(self) -> bool:
        """Progress is being waited for."""
        return self.moment is not None

    def arm(self) -> None:
        """Something waits now; nothing changes where something waited before."""
        if self.moment is None and self.timeout is not None and not self._is_closed:
            self.moment = time.monotonic() + self.timeout
            if self._timer is None:
                self._start(self.timeout)

    def disarm(self) -> None:
        """There was progress, or nothing waits."""
        self.moment = None

    def close(self) -> None:
        """Never pass."""
        self._is_closed = True
        self.moment = None
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
        if self.moment is None:
            return
        late = time.monotonic() - self.moment
        if late < 0:
            self._start(-late)
            return
        if late > LATE:
            self.moment = None
            self.arm()
        else:
            # The loop runs timers before what came in at the same time, and that wakes the one who would make progress.
            self._hub.loop.run_callback(self._hub.loop.run_callback, self._decide, self.moment)

    def _decide(self, moment: float) -> None:
        if self.moment == moment:
            self.moment = None
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

    def first_older(self, age: float, count: int) -> list[Key]:
        """Those among the first `count` that have waited for longer than `age` seconds."""
        latest = time.monotonic() - age + (self._timeout or 0.0)
        return [key for key, moment in itertools.islice(self._moments.items(), count) if moment <= latest]

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
