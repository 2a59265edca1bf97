from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

# Before the modules are imported, so that their assertions tell what differed.
pytest.register_assert_rewrite("interop.peers", "tunnels.running", "tunnels.service")

from support.programs import build_go, place_js  # noqa: E402
from tunnels.fixtures import children, nobody, service  # noqa: E402
from tunnels.sshd import Sshd  # noqa: E402

__all__ = ["children", "gotunnel", "js_command", "nobody", "service", "sshd"]

HERE = Path(__file__).parent


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
