"""The byte fuzzer in short: inputs that once found something, random ones, and seconds of the search itself.

`python -m tests.fuzz.fuzz_bytes` is the long run; see README.md here.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from fuzz.fuzz_bytes import STEPS, Play, run
from fuzz.rig import Fault
from geyamux import table
from support.wire import WireError

HERE = Path(__file__).resolve().parent
CORPUS = sorted((HERE / "corpus").iterdir())
SECONDS = 15


@pytest.fixture(autouse=True)
def _quiet(monkeypatch):
    """Thousands of sessions end badly here, and each says so."""
    monkeypatch.setattr(logging.getLogger("geyamux"), "disabled", True)


def step(name, *args):
    """The bytes of one step."""
    return bytes((STEPS.index(getattr(Play, name)), *args))


@pytest.mark.parametrize("path", CORPUS, ids=lambda path: path.name)
def test_an_input_of_the_corpus_finds_nothing(path):
    run(path.read_bytes())


@settings(max_examples=250, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.binary(max_size=200))
@example(b"")
def test_any_bytes_find_nothing(data):
    run(data)


def test_random_inputs_find_nothing():
    """Longer ones than hypothesis likes, the same in each run."""
    rng = random.Random(20)
    for _ in range(600):
        run(rng.randbytes(rng.randint(10, 400)))


def test_an_input_always_does_the_same():
    """What the fuzzer finds can be played again."""
    rng = random.Random(21)
    for _ in range(30):
        data = rng.randbytes(150)
        sent = []
        for _ in range(2):
            play = Play(data)
            play.run()
            sent.append(play.watched.sent)
        assert sent[0] == sent[1]


# --- the fuzzer sees what is wrong ---


def test_it_sees_a_stream_with_an_id_that_is_not_the_peers(monkeypatch):
    monkeypatch.setattr(table.StreamTable, "_is_own", lambda self, stream_id: False)
    syn_on_ours = step("feed_frame", 1, 1, 2, 0)
    with pytest.raises((Fault, WireError)):
        run(b"\x01\x00" + syn_on_ours)


def test_it_sees_credit_that_overflows(monkeypatch):
    monkeypatch.setattr("geyamux.duplex.widen", lambda credit, delta, stream_id: credit + delta)
    overflow = step("feed_frame", 1, 0, 0, 14)
    with pytest.raises((Fault, WireError)):
        run(b"\x01\x00" + step("open", 0) + overflow)


# --- the search ---


@pytest.mark.slow
@pytest.mark.timeout(90)
def test_seconds_of_the_search_find_nothing(tmp_path):
    """Led by coverage, from the corpus on, in a process of its own."""
    if importlib.util.find_spec("atheris") is None:
        pytest.skip("atheris is not installed: there are no wheels of it for every Python")
    found = tmp_path / "found"
    found.mkdir()
    command = [sys.executable, "-m", "tests.fuzz.fuzz_bytes", f"-max_total_time={SECONDS}", "-max_len=400", "-timeout=20"]
    # The peak of this process counts as the child's own, so its memory can't be judged as a whole.
    command += ["-rss_limit_mb=0", "-malloc_limit_mb=512"]
    command += [f"-artifact_prefix={tmp_path}/", str(found), str(HERE / "corpus")]
    search = subprocess.Popen(
        command, cwd=HERE.parents[1], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True
    )
    try:
        output = search.communicate(timeout=SECONDS + 60)[0].decode(errors="replace")
    finally:
        if search.poll() is None:
            os.killpg(search.pid, signal.SIGKILL)
            search.wait()
    crashes = [f"{path.name}: {path.read_bytes().hex()}" for path in tmp_path.iterdir() if path.is_file()]
    assert search.returncode == 0 and not crashes, f"{crashes}\n{output[-3000:]}"
    assert "DONE" in output and "Done" in output, output[-3000:]
