"""The list of checks: what a check is, how one gets onto the list, and how one of them is run.

A check is a function that gets a fresh `Peer` and returns where all is well; the first line of its docstring says what
it is for. It raises `Failed` with what was seen, or `NotApplicable` with why.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from typing import TypeAlias

from .peer import Failed, NotApplicable, Peer, Setting

#: The public specification says so, or nothing works without it.
MUST = "MUST"
#: A server on the open network should, whoever its peers are: bounded, alive, and clear about what it refuses.
ROBUST = "ROBUST"
#: A rule of geyamux (its spec.md) where the public specification is silent.
STRICT = "STRICT"
LEVELS = (MUST, ROBUST, STRICT)

PASS, FAIL, NOT_APPLICABLE = "pass", "FAIL", "n/a"

Function: TypeAlias = Callable[[Peer], None]


@dataclasses.dataclass(frozen=True)
class Check:
    name: str
    level: str
    #: One line: what it is for.
    purpose: str
    #: The section, advisory or quirk that it comes from.
    source: str
    #: It looks at payload that comes back.
    needs_echo: bool
    function: Function


@dataclasses.dataclass(frozen=True)
class Result:
    name: str
    level: str
    purpose: str
    source: str
    outcome: str
    seen: str
    seconds: float


CHECKS: dict[str, Check] = {}


def check(level: str, source: str, *, needs_echo: bool = True) -> Callable[[Function], Function]:
    """Put a function onto the list, under its own name."""

    def register(function: Function) -> Function:
        purpose = (inspect.getdoc(function) or "").partition("\n")[0]
        add(Check(function.__name__, level, purpose, source, needs_echo, function))
        return function

    return register


def add(entry: Check) -> None:
    if entry.name in CHECKS or not entry.purpose or entry.level not in LEVELS:
        raise ValueError(f"{entry.name}: a name of its own, a purpose and a level are needed")
    CHECKS[entry.name] = entry


def run(entry: Check, setting: Setting, *, has_echo: bool) -> tuple[str, str]:
    """Return the outcome and what was seen."""
    if entry.needs_echo and not has_echo:
        return NOT_APPLICABLE, "the server does not echo"
    try:
        peer = Peer(setting)
    except OSError as error:
        return FAIL, f"no connection: {error}"
    try:
        entry.function(peer)
        peer.judge()
    except NotApplicable as reason:
        return NOT_APPLICABLE, str(reason)
    except (Failed, OSError) as error:
        return FAIL, f"{error}"
    except Exception as error:
        # A server that nobody foresaw; the other checks shall still tell about it.
        return FAIL, f"unforeseen: {error!r}"
    finally:
        peer.close()
    return PASS, ""
