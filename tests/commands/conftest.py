from __future__ import annotations

from collections.abc import Iterator

import pytest

# Before the modules are imported, so that their assertions tell what differed.
pytest.register_assert_rewrite(
    "commands.program", "commands.running", "interop.peers", "tunnels.running", "tunnels.service"
)

from support.links import free_port  # noqa: E402
from tunnels.running import Children  # noqa: E402
from tunnels.service import Service  # noqa: E402


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
