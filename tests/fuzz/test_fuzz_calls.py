"""The operation fuzzer: a short run, what it has found before, and that it finds what is broken on purpose."""

from __future__ import annotations

import itertools
import os
import pprint
from collections.abc import Callable
from typing import Any

import pytest

from fuzz.fuzz_calls import Case, Fault, Result, find, replay, run, shrink
from geyamux.duplex import ORPHANED, Duplex
from geyamux.flow import ReceiveBuffer
from geyamux.outbox import Outbox
from geyamux.table import StreamTable
from geyamux.urgent import UrgentLane

#: Seconds of each of the two runs.
SECONDS = 7.0
#: A fault that was put in must be found within so many sequences.
ENOUGH = 400

SOCKET = {"kind": "socket", "buffer": None, "cuts": (1 << 20,), "tick": 1e-6, "seed": 0, "end": "close", "closers": [0]}
OBJECT = {**SOCKET, "kind": "object"}


def explain(result: Result) -> str:
    assert result.fault is not None
    case = shrink(result.case, result.fault.kind, seconds=10.0)
    return (
        f"seed {result.case.link['seed']}: {result.fault}\n{replay(case).fault}\n{pprint.pformat(case, sort_dicts=False)}"
    )


# --- a short run ---


@pytest.mark.slow
@pytest.mark.timeout(60)
def test_sequences_of_calls_do_what_the_model_says():
    result = find(itertools.count(1), seconds=SECONDS)
    assert result is None, explain(result)


@pytest.mark.slow
@pytest.mark.timeout(60)
def test_fresh_sequences_of_calls_do_what_the_model_says():
    first = int.from_bytes(os.urandom(4), "big")
    result = find(itertools.count(first), seconds=SECONDS, steps=120)
    assert result is None, explain(result)


def test_a_sequence_runs_alike_every_time():
    for seed in range(40):
        first = run(seed)
        again = replay(first.case)
        assert (first.outcomes, first.operations) == (again.outcomes, again.operations)


# --- what it has found ---

FINDINGS = {
    "a stream closed after the end is not counted below nothing": Case(
        SOCKET,
        ({}, {}),
        [("open", 1, 1, None), ("pump", 2, 1000), ("accept", 3, 0, 0.0), ("abort", 4, 1)],
    ),
    "nor one that both sides had finished": Case(
        SOCKET,
        ({}, {}),
        [
            ("accept", 1, 1, 5.0),
            ("open", 2, 0, None),
            ("shutdown", 3, 0, 2, 2),
            ("pump", 4, 1000),
            ("shutdown", 5, 1, 2, 1),
            ("break", 6),
        ],
    ),
    "the reader of an ended session lets go of the stream it was at": Case(
        SOCKET,
        ({}, {}),
        [
            ("open", 1, 1, 5.0),
            ("sendall", 2, 1, 1, 262143, "bytearray"),
            ("move", 3, 1, 4096),
            ("session_close", 4, 0, 5.0),
        ],
    ),
    "a send under way at the end puts nothing back": Case(
        {**OBJECT, "buffer": 2048},
        ({}, {}),
        [("open", 1, 0, 5.0), ("sendall", 2, 0, 1, 10000, "memoryview"), ("cut", 3, 0)],
    ),
    "a writer whose close left FIN behind its frame waits for the frame": Case(
        SOCKET,
        ({"stream_close_timeout": 5.0}, {}),
        [
            ("accept", 1, 0, None),
            ("open", 2, 1, None),
            ("pump", 3, 5000),
            ("close", 4, 0, 2, "hub"),
            ("stall", 5, 1),
            ("sendall", 6, 1, 2, 262145, "bytearray"),
            ("close", 7, 1, 2, "hub"),
            ("advance", 8, 6.0),
        ],
    ),
    "a flush of a stream that is over ends with the session": Case(
        SOCKET,
        ({}, {}),
        [
            ("open", 1, 0, 1.0),
            ("shutdown", 2, 0, 1, 2),
            ("pump", 3, 1),
            ("accept", 4, 1, None),
            ("sendall", 5, 1, 1, 262143, "bytearray"),
            ("flush", 6, 1, 1),
            ("shutdown", 7, 1, 1, 1),
            ("abort", 8, 1),
        ],
    ),
    "a second close keeps to a limit of its own": Case(
        SOCKET,
        ({}, {}),
        [("stall", 1, 1), ("session_close", 2, 1, 5.0), ("session_close", 3, 1, 0.0), ("move", 4, 1, 100)],
    ),
}


@pytest.mark.parametrize("name", FINDINGS)
def test_what_was_found_stays_mended(name):
    assert replay(FINDINGS[name]).fault is None


# --- that it finds something ---


def lose_a_byte(patch: Callable[..., None]) -> None:
    take_in = Duplex._on_data
    patch(Duplex, "_on_data", lambda self, payload: take_in(self, payload[:-1] if len(payload) > 5000 else payload))


def keep_the_credit(patch: Callable[..., None]) -> None:
    withdraw = Outbox.withdraw

    def forgetful(self: Outbox, frame: Any) -> bool:
        withdraw(self, frame)
        return False

    patch(Outbox, "withdraw", forgetful)


def wake_no_reader_at_the_end(patch: Callable[..., None]) -> None:
    on_flags = Duplex._on_flags

    def silently(self: Duplex, flags: int, code: int = 0) -> None:
        (readers, self._readers), (alone, self._greenlet) = (self._readers, None), (self._greenlet, None)
        on_flags(self, flags, code)
        self._readers, self._greenlet = readers, alone

    patch(Duplex, "_on_flags", silently)


def call_a_cut_an_eof(patch: Callable[..., None]) -> None:
    is_over = Duplex._is_read_over
    patch(Duplex, "_is_read_over", lambda self: bool(self._marks & ORPHANED) or is_over(self))


def grant_nothing(patch: Callable[..., None]) -> None:
    patch(UrgentLane, "grant", lambda self, stream_id, buffer: None)


def lose_what_a_kill_interrupts(patch: Callable[..., None]) -> None:
    patch(ReceiveBuffer, "put_back", lambda self, data: None)


def say_another_code(patch: Callable[..., None]) -> None:
    reset = UrgentLane.reset
    patch(UrgentLane, "reset", lambda self, stream_id, code=0: reset(self, stream_id, 0))


def keep_the_place_of_an_acknowledged_stream(patch: Callable[..., None]) -> None:
    patch(StreamTable, "on_acknowledged", lambda self, stream: None)


def drop_what_waits_at_a_reset(patch: Callable[..., None]) -> None:
    on_flags = Duplex._on_flags

    def hasty(self: Duplex, flags: int, code: int = 0) -> None:
        if flags & 0x8 and self._buffer is not None:
            self._buffer.clear()
        on_flags(self, flags, code)

    patch(Duplex, "_on_flags", hasty)


BREAKAGES = {
    lose_a_byte: {"bytes", "eof", "lost", "unread", "counts", "window", "stuck"},
    keep_the_credit: {"credit", "bytes", "lost", "eof", "stuck", "count"},
    wake_no_reader_at_the_end: {"stuck"},
    call_a_cut_an_eof: {"eof"},
    grant_nothing: {"window", "stuck"},
    lose_what_a_kill_interrupts: {"bytes", "unread", "counts", "stuck", "eof", "window", "lost"},
    say_another_code: {"reset code", "error"},
    keep_the_place_of_an_acknowledged_stream: {"counts", "stuck"},
    drop_what_waits_at_a_reset: {"unread", "counts", "bytes", "left"},
}


@pytest.mark.timeout(60)
@pytest.mark.parametrize("breakage", BREAKAGES, ids=lambda breakage: breakage.__name__)
def test_what_is_broken_on_purpose_is_found(breakage, monkeypatch):
    breakage(monkeypatch.setattr)
    result = find(iter(range(ENOUGH)))
    assert result is not None, f"{ENOUGH} sequences, and nothing was found"
    assert isinstance(result.fault, Fault)
    assert result.fault.kind in BREAKAGES[breakage]


@pytest.mark.timeout(60)
def test_what_is_found_shrinks_to_a_few_operations(monkeypatch):
    lose_a_byte(monkeypatch.setattr)
    result = find(iter(range(ENOUGH)))
    assert result is not None and result.fault is not None
    small = shrink(result.case, result.fault.kind, seconds=20.0)
    assert len(small.ops) <= 6
    again = replay(small).fault
    assert again is not None and again.kind == result.fault.kind
