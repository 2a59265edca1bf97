"""Is the peer there, and how far away: pings, the round trip, keepalive, and the clock of a session.

Any byte received proves life, so a keepalive ping goes out only into silence, and what counts against the peer begins
when that ping has left. A timer that is late by more than half a second means that our own hub was blocked; that time is
charged to nobody. See ``spec.md`` R24, R26.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from typing import Any, Protocol

from gevent.hub import Hub

from .config import Config
from .errors import KeepaliveTimeout, SessionError
from .outbox import Outbox
from .waiting import LATE, Deadline, start_timer, timed_out
from .waking import WaitList

__all__ = ["Liveness"]

#: The clock ticks at least so often: it finds out that the hub was blocked, too.
_TICK = 5.0
#: Weight of a new sample in the smoothed round trip: that of TCP.
_SMOOTHING = 0.125
#: The interval is shortened by up to this share at random: ten thousand clients must not ping in step.
_JITTER = 0.1
#: Where windows grow, the round trip is measured anew so often while data comes in.
_MEASURE_EVERY = 10.0


class LivenessOwner(Protocol):
    """What liveness tells and asks its session. None of these may wait."""

    def _on_silence(self, reason: SessionError) -> None:
        """The peer is gone."""

    def _on_tick(self, now: float) -> None:
        """Time passed: other limits may have, too."""


class Ping:
    """One ping under way, shared by all who ask meanwhile."""

    __slots__ = ("left_at", "rtt", "value", "waiting")

    def __init__(self, value: int, waiting: WaitList) -> None:
        self.value = value
        self.waiting = waiting
        #: When it left; None while it waits in the outbox.
        self.left_at: float | None = None
        self.rtt: float | None = None


class Liveness:
    """Pings and the clock of one session."""

    def __init__(
        self,
        outbox: Outbox,
        hub: Hub,
        config: Config,
        *,
        owner: LivenessOwner,
        heard: Callable[[], float],
        next_moment: Callable[[], float | None],
    ) -> None:
        self._outbox = outbox
        self._hub = hub
        self._config = config
        self._owner = owner
        #: When the peer was heard last, on the monotonic clock.
        self._heard = heard
        #: When the next limit passes that the owner looks after.
        self._next_moment = next_moment
        self._value = 0
        #: Pings of ours whose answers have not come; some peers leave some out.
        self._unanswered = 0
        self._current: Ping | None = None
        #: Smoothed, and the shortest, in seconds.
        self.rtt: float | None = None
        self.min_rtt: float | None = None
        self.reason: SessionError | None = None
        #: Silence after which to ask; drawn anew when the peer has answered.
        self._interval = self._next_interval()
        #: A ping that is to probe a long silence waits in the outbox; when the last such ping left.
        self._is_probing = False
        self._probed_at: float | None = None
        self._measured_at = time.monotonic()
        self._timer: Any = None
        self._moment: float | None = None
        self.rearm()

    # -- pings

    def ping(self, timeout: float | None) -> float:
        """Wait for one round trip; return it in seconds. TimeoutError, or what ended the session."""
        deadline = Deadline.after(timeout)
        ping = self._current
        if ping is None or self._is_stale(ping):
            ping = self._send()
        waiter = ping.waiting.enter()
        try:
            while ping.rtt is None:
                if self.reason is not None:
                    raise self.reason.again()
                if not waiter.park(deadline):
                    raise timed_out()
        finally:
            ping.waiting.leave(waiter)
            if ping is self._current and not ping.waiting.waiters:
                # Nobody waits for it any more, and it may never be answered: the next one is a fresh one.
                self._current = None
        return ping.rtt

    def _send(self) -> Ping:
        """Send a ping with a fresh value. Who waits for one that was never answered waits for this one."""
        self._value = (self._value + 1) & 0xFFFF_FFFF
        self._outbox.ping(self._value)
        self._unanswered += 1
        if self._current is None:
            self._current = Ping(self._value, WaitList(self._outbox.lane))
        else:
            self._current.value, self._current.left_at = self._value, None
        self._measured_at = time.monotonic()
        return self._current

    def measure(self) -> None:
        """Send a ping that nobody waits for."""
        if self.reason is None and (self._current is None or self._is_stale(self._current)):
            self._send()

    def _is_stale(self, ping: Ping) -> bool:
        """It left long ago: peers that answer not every ping have forgotten it."""
        return ping.left_at is not None and time.monotonic() - ping.left_at > self._config.keepalive_timeout

    def _on_ping_left(self, value: int, now: float) -> None:
        """The outbox says when the ping left."""
        if self._current is not None and self._current.value == value:
            self._current.left_at = now
        if self._is_probing:
            self._is_probing = False
            self._probed_at = now
            self.rearm()

    def _probe(self) -> float | None:
        """When the ping left that the present silence began to be measured by; None where none has.

        Later pings do not move it: an application that pings a dead peer all the time must not keep it alive.
        """
        return self._probed_at if self._probed_at is not None and self._probed_at >= self._heard() else None

    def on_pong(self, value: int) -> bool:
        """An answer; False for more of them than there were pings.

        Those nobody waits for are ignored: hashicorp's come out of order, go-yamux leaves some out.
        """
        was_asked = self._unanswered > 0
        self._unanswered -= was_asked
        ping = self._current
        if ping is not None and ping.value == value:
            offered, offered_at = self._outbox.ping_offered
            # One that has not left can't have an answer; the peer guesses.
            if ping.left_at is not None or offered == value:
                self._on_answer(ping, offered_at if ping.left_at is None else ping.left_at)
        return was_asked

    def _on_answer(self, ping: Ping, left_at: float) -> None:
        self._current = None
        rtt = ping.rtt = time.monotonic() - left_at
        self.rtt = rtt if self.rtt is None else self.rtt + (rtt - self.rtt) * _SMOOTHING
        self.min_rtt = rtt if self.min_rtt is None else min(self.min_rtt, rtt)
        ping.waiting.wake_all()
        if self._probed_at is not None:
            # The clock was set for the end; now the next silence counts.
            self._end_probe()
            self.rearm()

    def _end_probe(self) -> None:
        """The peer was heard after all."""
        self._probed_at = None
        self._interval = self._next_interval()

    # -- the clock

    def rearm(self) -> None:
        """Set the timer to the next moment at which something may be due."""
        moment = time.monotonic() + _TICK
        for other in (self._silence_moment(), self._next_moment()):
            if other is not None:
                moment = min(moment, other)
        self.arm(moment)

    def arm(self, moment: float) -> None:
        """Let the clock tick at this moment of the monotonic clock, or before."""
        if self.reason is None and (self._moment is None or moment < self._moment):
            self._moment = moment
            self._stop_timer()
            self._timer = start_timer(self._hub, moment - time.monotonic(), self._on_timer, ref=False)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.stop()
            self._timer.close()
            self._timer = None

    def _silence_moment(self) -> float | None:
        """When a keepalive ping, or the end, is due if nothing is heard until then."""
        if self._config.keepalive_interval is None:
            return None
        due = self._heard() + self._interval
        probed_at = self._probe()
        if probed_at is not None:
            # Anything may be heard meanwhile, and begin the next silence.
            return min(probed_at + self._config.keepalive_timeout, time.monotonic() + self._interval)
        # While the ping waits in the outbox nothing is due: the outbox tells when it leaves, and has its own limit.
        return None if self._is_probing else due

    def _on_timer(self) -> None:
        if self.reason is not None or self._moment is None:
            return
        late, self._moment = time.monotonic() - self._moment, None
        self._timer.stop()
        # The loop runs timers before what came in at the same time: judge after that was read.
        self._hub.loop.run_callback(self._on_tick, late)

    def _on_tick(self, late: float) -> None:
        if self.reason is None:
            self._check_silence(time.monotonic(), late)
        if self.reason is None:
            self._owner._on_tick(time.monotonic())
            self.rearm()

    def _check_silence(self, now: float, late: float) -> None:
        """Ping into silence, and give up when that stays unanswered."""
        interval = self._config.keepalive_interval
        if interval is None or now - self._heard() < self._interval:
            return
        probed_at = self._probe()
        if probed_at is None:
            if self._probed_at is not None:
                self._end_probe()
            if not self._is_probing:
                self._is_probing = True
                self._send()
        elif late > LATE:
            self._probed_at = now
        elif now - probed_at >= self._config.keepalive_timeout:
            self._owner._on_silence(
                KeepaliveTimeout(
                    f"heard nothing for {now - self._heard():.1f} s, {now - probed_at:.1f} s of it after a ping"
                )
            )

    def measure_while_busy(self, now: float) -> None:
        """Keep the round trip fresh where the growth of windows depends on it."""
        if self._config.window_auto_tune and (self.rtt is None or now - self._measured_at > _MEASURE_EVERY):
            self.measure()

    def _next_interval(self) -> float:
        return (self._config.keepalive_interval or 0.0) * random.uniform(1.0 - _JITTER, 1.0)

    def end(self, reason: SessionError) -> None:
        """The session ended: wake who waits, stop the clock. Never waits."""
        self.reason = reason
        self._stop_timer()
        if self._current is not None:
            self._current.waiting.wake_all()
