"""The command line, run to its end as a user would; for commands that go on there is `tunnels.running.Child`."""

from __future__ import annotations

from typing import NamedTuple

from gevent import subprocess

from support.waiting import PATIENCE
from tunnels.running import ENVIRONMENT, GEYAMUX, Child, Children


class Done(NamedTuple):
    """What it wrote."""

    out: str
    err: str


def run(*words: str, code: int = 0) -> Done:
    """Run `geyamux` with these words; it must end with that exit code."""
    done = subprocess.run(
        [*GEYAMUX, *words], env=ENVIRONMENT, stdin=subprocess.DEVNULL, capture_output=True, timeout=PATIENCE
    )
    out, err = done.stdout.decode(), done.stderr.decode()
    assert done.returncode == code, f"exit code {done.returncode}\n{out}\n{err}"
    return Done(out, err)


def start(children: Children, *words: str) -> Child:
    """Start `geyamux` with these words; what it writes to both outputs are the child's lines."""
    return children.start(Child, [*GEYAMUX, *words], log="stdout", stderr=subprocess.STDOUT)
