"""Types of arguments: sizes, times and counts as users write them."""

from __future__ import annotations

import argparse
import math

from ..config import AUTO_TUNE_LIMIT
from ..frame import INITIAL_WINDOW

__all__ = ["count", "file", "interval", "positive", "seconds", "window"]

_UNITS = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
_LARGEST_WINDOW = (1 << 31) - 1
#: Nobody counts further.
_MOST = 1 << 31


def seconds(text: str) -> float:
    """A time, zero included."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of seconds")
    return value


def interval(text: str) -> float:
    """A time of more than zero."""
    value = seconds(text)
    if not value:
        raise argparse.ArgumentTypeError("must be more than 0 seconds")
    return value


def count(text: str) -> int:
    """A number of things, zero included."""
    if not (text.isascii() and text.isdigit()):
        raise argparse.ArgumentTypeError(f"{text!r} is no count")
    if len(text) > len(str(_MOST)) or int(text) > _MOST:
        raise argparse.ArgumentTypeError(f"must be at most {_MOST}")
    return int(text)


def positive(text: str) -> int:
    """At least one thing."""
    value = count(text)
    if not value:
        raise argparse.ArgumentTypeError("must be at least 1")
    return value


def file(text: str) -> str:
    """The name of a file. An empty one, as of a variable that is not set, must not pass for an option not given."""
    if not text:
        raise argparse.ArgumentTypeError("no file is named")
    return text


def window(text: str) -> tuple[int, int | bool]:
    """A receive window: where it starts, and what it may grow to."""
    if text == "auto":
        return INITIAL_WINDOW, True
    digits, unit = (text[:-1], text[-1].upper()) if text[-1:].upper() in _UNITS else (text, "")
    if not (digits.isascii() and digits.isdigit()):
        raise argparse.ArgumentTypeError(f"{text!r} is no size: give bytes, as in 1048576, 512K or 4M, or auto")
    size = int(digits) * _UNITS.get(unit, 1)
    if not INITIAL_WINDOW <= size <= _LARGEST_WINDOW:
        raise argparse.ArgumentTypeError(
            f"must be at least 256K, where the protocol starts, and below 2G (auto: up to {AUTO_TUNE_LIMIT >> 20}M)"
        )
    return size, False
