"""A lab for each test, and what holds after each: the forwarders wrote events and nothing else."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from nat.lab import NatLab, missing


@pytest.fixture
def lab() -> Iterator[NatLab]:
    """nginx runs in its LAN."""
    reason = missing()
    if reason:
        pytest.skip(reason)
    with NatLab() as lab:
        lab.nginx()
        yield lab
        for program in lab.forwarders:
            assert program.out == b"", f"{program.name} wrote to standard output: {program.out[:200]!r}"
            # A traceback is no JSON.
            assert all("event" in event for event in program.events()), program.err
