"""examples/websocket_chat.py, as a user runs it."""

from __future__ import annotations

import subprocess
import sys

import pytest

from consumers.real_runner import ENVIRONMENT, HERE, need_library

EXAMPLE = HERE.parents[1] / "examples" / "websocket_chat.py"


@pytest.mark.interop
def test_the_chat_behind_nat_is_heard_by_everybody(tmp_path):
    need_library("gevent-websocket")
    need_library("websocket-client")
    program = [sys.executable, str(EXAMPLE)]
    done = subprocess.run(program, cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True, timeout=25, check=False)
    assert done.returncode == 0, done.stderr
    assert not done.stderr
    said = ["ann: hello", "bob: hello, ann", "100,005 characters"]
    expected = [f"{name} heard {words}" for words in said for name in ("ann", "bob", "eve")]
    assert done.stdout.splitlines() == [*expected, "3 WebSockets in one connection"]
