"""Fixtures of the tests that run the command line."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from support.links import free_port
from tunnels.running import Children
from tunnels.service import Service


@pytest.fixture
def children() -> Iterator[Children]:
    """Starts processes, which are ended with the test."""
    started = Children()
    try:
        yield started
    finally:
        started.end()


@pytest.fixture
def service() -> Iterator[Service]:
    """A TCP service in this process."""
    with Service() as service:
        yield service


@pytest.fixture
def nobody() -> str:
    """An address of this machine where nobody listens."""
    return f"127.0.0.1:{free_port()}"
