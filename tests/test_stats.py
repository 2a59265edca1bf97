"""What stats() returns: frozen records of numbers."""

from __future__ import annotations

import dataclasses

import pytest

from geyamux.stats import SessionStats, StreamStats

SESSION = {
    "streams": 1,
    "opened": 2,
    "incoming": 3,
    "backlog": 4,
    "unacknowledged": 5,
    "bytes_sent": 6,
    "bytes_received": 7,
    "frames_sent": 8,
    "frames_received": 9,
    "queued": 10,
    "unread": 11,
    "rtt": 0.25,
    "min_rtt": None,
    "idle": 1.5,
}

STREAM = {
    "stream_id": 1,
    "state": "ESTABLISHED",
    "unread": 2,
    "receive_window": 3,
    "receive_limit": 4,
    "send_credit": 5,
    "readers": 6,
    "writers": 7,
}

RECORDS = [(SessionStats, SESSION), (StreamStats, STREAM)]


@pytest.mark.parametrize(("kind", "values"), RECORDS)
def test_a_record_holds_what_it_was_given_and_nothing_else(kind, values):
    assert dataclasses.asdict(kind(**values)) == values


@pytest.mark.parametrize(("kind", "values"), RECORDS)
def test_a_record_never_changes(kind, values):
    record = kind(**values)
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(record, next(iter(values)), 0)
    assert record == kind(**values)


@pytest.mark.parametrize(("kind", "values"), RECORDS)
def test_no_number_may_be_left_out_or_given_without_its_name(kind, values):
    for name in values:
        with pytest.raises(TypeError, match=name):
            kind(**{key: value for key, value in values.items() if key != name})
    with pytest.raises(TypeError):
        kind(*values.values())
