"""paramiko's client and server on the two ends of a stream: each test plays a scene of real_paramiko_scenes.py."""

from __future__ import annotations

import pytest

from .real_runner import need_library, play

pytestmark = pytest.mark.interop


def scene(name):
    need_library("paramiko")
    return play("real_paramiko_scenes.py", name)


def test_commands_run_over_one_stream_and_closing_the_transports_raises_nothing():
    facts = scene("execute")
    assert facts["turned"] == [0, True]
    assert facts["failed"] == [127, "no such command\n"]
    assert facts["side by side"] == list(range(10))
    assert facts["timed out"] == "TimeoutError"
    assert 0.09 < facts["waited"] < 5
    assert facts["closing"] == ["", "", ""]
    assert facts["took"] < 5
    assert facts["ended"]


def test_sftp_carries_a_large_file_there_and_back():
    assert scene("files") == {"sent": True, "same": True, "listed": ["big"]}


def test_an_idle_transport_sends_its_keepalives():
    assert scene("keepalive") == {"asked": True, "alive": "cba"}


def test_a_reset_ends_the_transport_and_closing_it_raises_nothing():
    facts = scene("reset")
    assert (facts["ended"], facts["status"], facts["active"]) == ("", -1, False)
    assert facts["next"] == "SSHException"
    assert facts["closing"] == ["", ""]
    assert facts["session"]
