"""Real signals, at random instants of traffic, whose handler raises, or ends a stream or a session.

As a program that uses ``signal.setitimer`` for time limits, or that closes in its handler of SIGTERM. The handler acts
only where the package's own code was interrupted: gevent's own is not ours to judge. Run it as a process of its own::

    cd tests && python -m callers.alarm_storm ACTION SECONDS [SEED]

ACTION is a name from `ACTIONS`. It prints a line for each round in which somebody was harmed, and ends with the status 1
if there was any. It knows nothing of pytest.
"""

from __future__ import annotations

import random
import signal
import sys
import time
from collections.abc import Callable, Sequence
from types import FrameType
from typing import Any

import gevent

from callers.scene import Scene, Strike, fresh_faults

#: After a signal that met other code, so long until the next.
AGAIN = 0.00005


def _raise(scene: Scene) -> None:
    raise Strike


#: By name: what the handler does; the talks that may break; whether the session may end.
ACTIONS: dict[str, tuple[Callable[[Scene], Any], Sequence[str], bool]] = {
    "raise": (_raise, (), True),
    "close": (lambda scene: [end.close() for end in scene.victims[0]], ("victim",), False),
    "reset": (lambda scene: [pair[0].reset(7) for pair in scene.victims], ("victim", "other victim"), False),
    "close session": (lambda scene: scene.client.close(1.0) if _is_in_hub() else None, (), True),
    "abort": (lambda scene: scene.client.abort(), (), True),
}


def _is_in_hub() -> bool:
    """A close that waits belongs to no signal handler; in the hub it starts and returns."""
    return gevent.getcurrent() is gevent.get_hub()


class Storm:
    """Rounds of traffic, each with one signal that acts."""

    def __init__(self, action: str, seed: int) -> None:
        self.do, self.may_break, self.may_end = ACTIONS[action]
        self.rng = random.Random(seed)
        self.scene: Scene | None = None
        self.where = ""
        self.acted = 0
        signal.signal(signal.SIGALRM, self.on_signal)

    def on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.scene is None:
            return
        if frame is None or not str(frame.f_globals.get("__name__")).startswith("geyamux"):
            signal.setitimer(signal.ITIMER_REAL, AGAIN)
            return
        scene, self.scene = self.scene, None
        self.acted += 1
        self.where = f"{frame.f_code.co_name}:{frame.f_lineno}"
        self.do(scene)

    def round(self) -> list[str]:
        scene = Scene()
        self.scene = scene
        signal.setitimer(signal.ITIMER_REAL, self.rng.uniform(0.0002, 0.004))
        scene.run()
        self.scene = None
        signal.setitimer(signal.ITIMER_REAL, 0)
        faults = list(scene.faults(self.may_break, may_end=self.may_end, may_hang=self.do is _raise))
        return [*faults, *scene.end(), *fresh_faults()]


def _be_quiet(context: Any, kind: Any, value: Any, traceback: Any) -> None:
    """What is raised in the hub is ours, and would be printed."""
    if not issubclass(kind, (Strike, gevent.GreenletExit)):
        sys.excepthook(kind, value, traceback)


def main(action: str, seconds: float, seed: int = 1) -> int:
    vars(gevent.get_hub())["handle_error"] = _be_quiet
    storm = Storm(action, seed)
    end, rounds, harmed = time.monotonic() + seconds, 0, 0
    while time.monotonic() < end:
        rounds += 1
        faults = storm.round()
        harmed += bool(faults)
        for fault in faults:
            print(f"{action} in round {rounds}, at {storm.where}: {fault}", flush=True)
        if any("another session" in fault for fault in faults):
            vars(gevent.get_hub()).pop("_geyamux_waker", None)
    print(f"{action}: {storm.acted} signals acted in {rounds} rounds, {harmed} of them did harm")
    return 1 if harmed or not storm.acted else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], float(sys.argv[2]), *map(int, sys.argv[3:])))
