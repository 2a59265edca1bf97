"""The examples that need a real server, run as a user runs them, against one that is started here."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from .real_runner import ENVIRONMENT, PATIENCE, need_library
from .real_servers import redis_server

pytestmark = pytest.mark.interop

EXAMPLES = Path(__file__).parents[2] / "examples"
#: One after the other the calls of the example would take 20.
FEW_SECONDS = 5


def run(name, *arguments):
    return subprocess.run(
        [sys.executable, str(EXAMPLES / name), *arguments],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )


def test_redis_over_stream_says_in_one_line_that_there_is_no_redis(tmp_path):
    need_library("redis")
    path = str(tmp_path / "nobody")
    done = run("redis_over_stream.py", path)
    assert (done.returncode, done.stdout) == (1, "")
    assert re.fullmatch(rf"no Redis at {re.escape(path)}: .*No such file or directory\n", done.stderr), done.stderr


def test_redis_over_stream_waits_for_two_hundred_calls_at_a_time():
    need_library("redis")
    with redis_server() as path:
        done = run("redis_over_stream.py", path)
    assert (done.returncode, done.stderr) == (0, "")
    waited, heard = done.stdout.splitlines()
    took = re.fullmatch(r"200 calls that wait 0\.1 s each: (\d+\.\d\d) s over one session", waited)
    assert took is not None and 0.1 <= float(took[1]) < FEW_SECONDS, waited
    assert heard == "redis-py talks over streams"
