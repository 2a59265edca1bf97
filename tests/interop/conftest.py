from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TypeAlias

import pytest

# Before the modules are imported, so that their assertions tell what differed.
pytest.register_assert_rewrite("interop.peers", "interop.suite")

from interop.peers import Link, LinkMaker  # noqa: E402
from support.programs import build_go, place_js  # noqa: E402

HERE = Path(__file__).parent

Command: TypeAlias = Sequence[str]


@pytest.fixture(params=["client", "server"])
def role(request: pytest.FixtureRequest) -> str:
    """What geyamux is; the other implementation is the opposite."""
    value: str = request.param
    return value


@pytest.fixture
def link(make_link: LinkMaker) -> Iterator[Link]:
    """A session with the peer of the test's module, both ends serving what the other opens."""
    with make_link() as made:
        yield made


@pytest.fixture
def silent_link(make_link: LinkMaker) -> Iterator[Link]:
    """A session whose inbound streams the test accepts by itself."""
    with make_link(serve=False) as made:
        yield made


@pytest.fixture(scope="session")
def hashicorp_command(tmp_path_factory: pytest.TempPathFactory) -> Command:
    """The hashicorp peer, built here, or the one that GEYAMUX_HASHICORP_PEER names."""
    if built := os.environ.get("GEYAMUX_HASHICORP_PEER"):
        return [built]
    return [build_go(HERE / "gopeer", tmp_path_factory.mktemp("hashicorp"))]


@pytest.fixture(scope="session")
def libp2p_command() -> Command:
    """py-libp2p's peer, in the Python that GEYAMUX_LIBP2P_PYTHON names, or in this one."""
    python = os.environ.get("GEYAMUX_LIBP2P_PYTHON", sys.executable)
    probe = [python, "-c", "import libp2p.stream_muxer.yamux.yamux"]
    if subprocess.run(probe, capture_output=True, timeout=60).returncode:
        pytest.skip(f"no libp2p in {python} (pip install libp2p; GEYAMUX_LIBP2P_PYTHON)")
    return [python, str(HERE / "libp2p_peer.py")]


@pytest.fixture(scope="session")
def js_command(tmp_path_factory: pytest.TempPathFactory) -> Command:
    """The js-libp2p peer, beside the node_modules of GEYAMUX_JS_PEER_DIR or of js/."""
    return place_js(HERE / "js/peer.mjs", tmp_path_factory.mktemp("js"))
