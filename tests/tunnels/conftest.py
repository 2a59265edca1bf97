from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

# Before the modules are imported, so that their assertions tell what differed.
pytest.register_assert_rewrite("interop.peers", "tunnels.running", "tunnels.service")

from support.links import free_port  # noqa: E402
from support.programs import build_go, place_js  # noqa: E402
from tunnels.running import Children  # noqa: E402
from tunnels.service import Service  # noqa: E402
from tunnels.sshd import Sshd  # noqa: E402

HERE = Path(__file__).parent


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


@pytest.fixture(scope="session")
def gotunnel(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The path of the program of go/."""
    return build_go(HERE / "go/gotunnel", tmp_path_factory.mktemp("go"))


@pytest.fixture(scope="session")
def js_command(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The js-libp2p peer of tests/interop."""
    return place_js(HERE.parent / "interop/js/peer.mjs", tmp_path_factory.mktemp("js"))


@pytest.fixture(scope="module")
def sshd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sshd]:
    """An sshd of the test's own, and the configuration of a client for it."""
    with Sshd.start(tmp_path_factory.mktemp("sshd")) as sshd:
        yield sshd
