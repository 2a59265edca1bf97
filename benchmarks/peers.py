"""The table of peers: what each is, how its program is built and started, and what is missing where it can't be.

It starts nothing that is measured, it only prepares; runner.py does the rest.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parent
#: Where Debian's golang-*-dev packages put their sources.
DEBIAN_GOPATH = Path("/usr/share/gocode")
YAMUX_IN_GO = "github.com/hashicorp/yamux"
BUILD_SECONDS = 180
PROBE_SECONDS = 60


class MissingPeer(Exception):
    """A peer can't be measured here; the text says why, and what would help."""


@dataclass(frozen=True)
class Program:
    """How to start a peer's program, and which version of what it is."""

    argv: tuple[str, ...]
    version: str
    env: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Peer:
    name: str
    label: str
    #: Makes the program, in a directory that lives as long as the run. Raises MissingPeer.
    prepare: Callable[[Path], Program]


def prepare_python(module: str) -> Callable[[Path], Program]:
    def prepare(_directory: Path) -> Program:
        versions = f"Python {platform.python_version()}, gevent {metadata.version('gevent')}"
        if module == "geyamux_program":
            from geyamux import __version__

            versions = f"geyamux {__version__}, {versions}"
        return Program((sys.executable, "-m", f"benchmarks.programs.{module}"), versions)

    return prepare


def prepare_hashicorp(directory: Path) -> Program:
    return build_go(HERE / "programs" / "hashicorp", directory / "hashicorp")


def build_go(sources: Path, place: Path) -> Program:
    """Build a Go program that uses hashicorp/yamux, in a new directory."""
    go = shutil.which("go")
    if go is None:
        raise MissingPeer("no Go compiler (Debian: golang-go)")
    place.mkdir()
    for source in sources.glob("*.go"):
        shutil.copy(source, place)
    program = place / "program"
    build = [go, "build", "-o", str(program), "."]
    if (DEBIAN_GOPATH / "src" / YAMUX_IN_GO).is_dir():
        env = {"GO111MODULE": "off", "GOPATH": str(DEBIAN_GOPATH), "GOFLAGS": ""}
        _run(build, place, env)
        return Program((str(program),), f"hashicorp/yamux of Debian{_debian_version()}, {_go_version(go)}")
    env = {"GO111MODULE": "on", "GOFLAGS": "-mod=mod"}
    _run([go, "mod", "init", "benchmark"], place, env)
    _run([go, "get", YAMUX_IN_GO], place, env)
    _run(build, place, env)
    module = _run([go, "list", "-m", YAMUX_IN_GO], place, env).split()
    return Program((str(program),), f"hashicorp/yamux {module[-1]}, {_go_version(go)}")


def _run(argv: list[str], place: Path, env: dict[str, str]) -> str:
    try:
        done = subprocess.run(
            argv, cwd=place, env={**os.environ, **env}, capture_output=True, text=True, timeout=BUILD_SECONDS
        )
    except subprocess.TimeoutExpired:
        raise MissingPeer(f"`{' '.join(argv[1:3])}` took more than {BUILD_SECONDS} s") from None
    if done.returncode:
        last = (done.stderr.strip() or "no output").splitlines()[-1]
        raise MissingPeer(
            f"`go {argv[1]}` failed: {last} (Debian: golang-github-hashicorp-yamux-dev, or a Go module proxy)"
        )
    return done.stdout


def _go_version(go: str) -> str:
    words = subprocess.run([go, "version"], capture_output=True, text=True, timeout=PROBE_SECONDS).stdout.split()
    return words[2].replace("go", "Go ") if len(words) > 2 else "Go"


def _debian_version() -> str:
    query = ["dpkg-query", "-W", "-f", " ${Version}", "golang-github-hashicorp-yamux-dev"]
    if shutil.which(query[0]) is None:
        return ""
    return subprocess.run(query, capture_output=True, text=True, timeout=PROBE_SECONDS).stdout


def prepare_libp2p(_directory: Path) -> Program:
    python = os.environ.get("GEYAMUX_LIBP2P_PYTHON", sys.executable)
    probe = (
        "import json, platform, sys; from importlib import metadata; import libp2p.stream_muxer.yamux.yamux;"
        "print(json.dumps([metadata.version('libp2p'), platform.python_version()]))"
    )
    missing = MissingPeer(f"no libp2p in {python} (pip install libp2p; GEYAMUX_LIBP2P_PYTHON)")
    try:
        done = subprocess.run([python, "-c", probe], capture_output=True, text=True, timeout=PROBE_SECONDS)
    except (OSError, subprocess.TimeoutExpired):
        raise missing from None
    if done.returncode:
        raise missing
    version, python_version = json.loads(done.stdout.splitlines()[-1])
    program = str(HERE / "programs" / "libp2p_program.py")
    return Program((python, program), f"py-libp2p {version}, Python {python_version}")


PEERS: dict[str, Peer] = {
    peer.name: peer
    for peer in (
        Peer("raw", "raw gevent sockets", prepare_python("raw_program")),
        Peer("geyamux", "geyamux", prepare_python("geyamux_program")),
        Peer("hashicorp", "hashicorp/yamux (Go)", prepare_hashicorp),
        Peer("libp2p", "py-libp2p", prepare_libp2p),
    )
}
