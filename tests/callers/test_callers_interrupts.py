"""Signal handlers and finalisers that act, or raise, in the middle of the package's own code.

A handler that raises may take any callback of the loop with it, gevent's own included: what waited for that waits on
until a clock ticks or its own time limit passes. That is allowed here; wrong bytes, or half a body that looks whole, are
not.

Each runs in a process of its own: `strike_every_line` tries chosen statements one by one, `alarm_storm` random instants
with real signals. Both can be run by hand for every statement, and for as long as one likes; what they do stands there.
"""

from __future__ import annotations

import os
import pathlib
import random
import sys

import pytest
from gevent import subprocess

TESTS = pathlib.Path(__file__).resolve().parents[1]
ACTIONS = ("close", "reset", "close session", "abort", "raise")
#: About seventy statements of each run; other ones in each.
STEP = 307
FIRST = random.randrange(1, STEP)


def run_module(name: str, *args: object, timeout: float = 60) -> tuple[str, str, int]:
    """Run it in an interpreter of its own, while this hub goes on."""

    path = os.pathsep.join((str(TESTS), str(TESTS.parent), os.environ.get("PYTHONPATH", "")))
    # gevent's: once anything in this process has used that, the standard library's loses exit codes in threads.
    done = subprocess.run(
        [sys.executable, "-m", f"callers.{name}", *map(str, args)],
        env={**os.environ, "PYTHONPATH": path},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
    return done.stdout, done.stderr, done.returncode


@pytest.mark.slow
@pytest.mark.timeout(90)
@pytest.mark.parametrize("action", ACTIONS)
def test_whatever_statement_is_interrupted_nobody_else_is_harmed(action: str) -> None:
    """A stream or session ended by a handler or a finaliser; an exception out of a handler."""
    out, err, code = run_module("strike_every_line", action, STEP, FIRST)
    assert code == 0, out[-3000:]
    # Where a handler raises in a greenlet or a finaliser, gevent or the interpreter says so.
    assert not err or action == "raise", err


@pytest.mark.slow
@pytest.mark.timeout(60)
@pytest.mark.parametrize("action", ACTIONS)
def test_real_signals_at_random_instants_harm_nobody_else(action: str) -> None:
    out, err, code = run_module("alarm_storm", action, 1.0)
    assert code == 0, out[-3000:]
    # Where a handler raises in a finaliser, the interpreter itself says so.
    assert not err or action == "raise", err


def test_the_judge_sees_harm_where_there_is_some() -> None:
    """So that the tests above can fail: a package that delivers other bytes is found out."""
    script = (
        "import geyamux.duplex as d; read = d.Duplex._read\n"
        "d.Duplex._read = lambda self, size: read(self, size)[::-1]\n"
        "from callers.scene import Scene\n"
        "scene = Scene(); scene.run(); print(list(scene.faults((), may_end=False))); list(scene.end())\n"
    )
    path = os.pathsep.join((str(TESTS), str(TESTS.parent), os.environ.get("PYTHONPATH", "")))
    done = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=20,
        check=False,
    )
    assert "other bytes than were written" in done.stdout, done.stderr
