"""Every attack of the catalogue, by a peer that reads and one that never does, against the bounds of `attacks.arena`."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import pytest

from .arena import Arena
from .catalogue import ATTACKS

pytestmark = [
    pytest.mark.slow,
    pytest.mark.alone,
    pytest.mark.timeout(90),
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="memory is measured in /proc"),
]


@pytest.fixture(scope="module")
def arena() -> Iterator[Arena]:
    with Arena.open() as opened:
        yield opened


@pytest.mark.parametrize("reads", [True, False], ids=["reads", "never_reads"])
@pytest.mark.parametrize("name", ATTACKS)
def test_a_server_withstands(arena: Arena, name: str, reads: bool) -> None:
    result = arena.fight(ATTACKS[name], reads)
    assert not result.faults(), "; ".join(result.faults())
