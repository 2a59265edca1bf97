"""Programs of other languages, made ready to run: a Go program is built, a Node.js one put beside its libraries.

Nothing is downloaded. What is not installed skips the test that asks for it, with the name of what would help.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

# Where Debian's golang-*-dev packages put their sources.
DEBIAN_GOPATH = Path("/usr/share/gocode")
GO_BUILD_SECONDS = 120


def build_go(source: Path, place: Path) -> str:
    """Build the Go program of that directory in `place`, with Debian's hashicorp/yamux, and return its path."""
    go = shutil.which("go")
    if go is None:
        pytest.skip("no Go compiler (Debian: golang-go)")
    if not (DEBIAN_GOPATH / "src/github.com/hashicorp/yamux").is_dir():
        pytest.skip("no source of hashicorp/yamux (Debian: golang-github-hashicorp-yamux-dev)")
    program = str(place / source.name)
    env = {**os.environ, "GO111MODULE": "off", "GOPATH": str(DEBIAN_GOPATH), "GOFLAGS": ""}
    subprocess.run([go, "build", "-o", program, "."], cwd=source, env=env, check=True, timeout=GO_BUILD_SECONDS)
    return program


def place_js(script: Path, place: Path) -> list[str]:
    """Copy the script to `place`, beside the node_modules of GEYAMUX_JS_PEER_DIR or its own; return how to run it."""
    node = shutil.which("node")
    if node is None:
        pytest.skip("no Node.js (Debian: nodejs)")
    modules = Path(os.environ.get("GEYAMUX_JS_PEER_DIR", script.parent)).resolve() / "node_modules"
    if not (modules / "@chainsafe/libp2p-yamux").is_dir():
        pytest.skip(f"no @chainsafe/libp2p-yamux in {modules} (npm install in js/; GEYAMUX_JS_PEER_DIR)")
    # A module finds its imports from where its own file lies.
    shutil.copy(script, place)
    (place / "node_modules").symlink_to(modules)
    return [node, str(place / script.name)]
