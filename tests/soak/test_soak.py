"""Tests of the soak run: a short form of it, and that what it watches for is noticed."""

from __future__ import annotations

import json
import random
import subprocess
import sys

import pytest

from soak.ledger import PATIENCE, Ledger
from soak.load import USES
from soak.relay import CUTS, Boundaries
from soak.run import LONG_GROWTH, ROOT
from soak.trend import judge, warmed_up

MIB = 1 << 20


def run_soak(tmp_path, *arguments):
    """The run as a process of its own, as users start it; returns its exit status and its report."""
    report = tmp_path / "soak.json"
    command = [sys.executable, "-m", "tests.soak", "--json", str(report), *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert report.exists(), done.stdout + done.stderr
    return done.returncode, json.loads(report.read_text()), done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.timeout(110)
def test_a_short_soak_passes_and_everything_in_it_has_happened(tmp_path):
    status, report, output = run_soak(tmp_path, "--minutes", "0.4")
    assert report["faults"] == {} and status == 0, output
    counts = report["counts"]
    assert not [use.name for use in USES if not counts.get(f"done: {use.name}")], output
    for happened in (
        "resets by the opener", "resets by the acceptor", "writers to a closed stream reset", "calls answered", "pings",
        "kills", "gevent.Timeouts", "writes timed out and resumed", "reads struck by a timeout and repeated",
        "session ended: in order", "session ended: KeepaliveTimeout", "error: StreamReset",
    ):  # fmt: skip
        assert counts.get(happened), f"{happened} never happened\n{output}"
    assert set(CUTS) <= set(report["cuts"]), output
    assert counts["connected"] > 10
    assert report["streams compared"]["directions complete"] > 1000
    assert report["streams compared"]["reset codes heard"] > 10
    assert report["quiet moments"] >= 2


@pytest.mark.slow
@pytest.mark.timeout(60)
def test_a_soak_notices_every_seeded_fault(tmp_path):
    seeded = ("leak", "flip", "truncate", "descriptors", "greenlets", "stuck", "log", "hub")
    status, report, output = run_soak(tmp_path, "--minutes", "0.1", *(f"--fault={fault}" for fault in seeded))
    assert status == 1
    found = "\n".join(report["faults"])
    for noticed in (
        "server: memory grows", "ledger: wrong bytes", "ledger: a cut stream looked complete",
        "server: holds more when quiet", "server: a call that is stuck took longer", "server: logged as ERROR",
        "server: error in the hub",
    ):  # fmt: skip
        assert noticed in found, output
    held = next(detail for detail in report["details"] if "holds more when quiet" in detail)
    now, first = (json.loads(part[part.index("{") :].replace("'", '"')) for part in held.split(", at first"))
    assert now["descriptors"] > first["descriptors"] and now["greenlets"] > first["greenlets"]
    # The link and the client do nothing wrong, and are not blamed.
    assert "client: memory" not in found and "relay: " not in found


# --- memory ---


def noisy(level, slope=0.0, spread=2 * MIB, seconds=1800):
    rng = random.Random(5)
    return [(float(second), level + slope * second + rng.uniform(0, spread)) for second in range(seconds)]


def test_memory_that_only_wavers_is_flat():
    assert judge("memory", noisy(30 * MIB), LONG_GROWTH) == []


def test_memory_that_rises_slowly_is_noticed():
    assert judge("memory", noisy(30 * MIB, slope=8 * MIB / 1800), LONG_GROWTH)


def test_growth_while_warming_up_is_no_leak():
    samples = [(second, value if second > 100 else value / 2) for second, value in noisy(30 * MIB)]
    assert judge("memory", warmed_up(samples, 0.1), LONG_GROWTH) == []
    assert judge("memory", warmed_up(samples, 0.0), MIB)


def test_a_run_without_samples_has_not_passed():
    assert judge("memory", [], LONG_GROWTH)


# --- the ledger ---


def one_end(side, **facts):
    record = {
        "label": "ab", "session": f"{side}-1", "side": side, "what": "upload", "wrote": 0, "wrote_digest": "e3",
        "read": 0, "read_digest": "e3", "finished": True, "late": False, "end": "eof", "code": None, "gave_up": None,
    }  # fmt: skip
    return {**record, **facts}


def verdict(opener, acceptor, *cut):
    """What the ledger says about a stream of which the ends report so."""
    ledger = Ledger()
    found = ledger.add(opener, 0.0) + ledger.add(acceptor, 0.0)
    for session in cut:
        ledger.cut(session, 0.0)
    return "\n".join(found + ledger.expire(1.0))


def test_a_stream_read_as_it_was_written_is_right():
    opener = one_end("opener", wrote=5, wrote_digest="aa")
    assert verdict(opener, one_end("acceptor", read=5, read_digest="aa")) == ""


@pytest.mark.parametrize("facts", [{"read": 4, "read_digest": "aa"}, {"read": 5, "read_digest": "ab"}])
def test_other_bytes_than_were_written_are_noticed(facts):
    opener = one_end("opener", wrote=5, wrote_digest="aa")
    assert "wrong bytes" in verdict(opener, one_end("acceptor", **facts))


def test_an_eof_that_nobody_sent_is_noticed():
    opener = one_end("opener", finished=False, gave_up=0, wrote=5, wrote_digest="aa", end=None)
    acceptor = one_end("acceptor", read=5, read_digest="aa", finished=False)
    assert "a cut stream looked complete" in verdict(opener, acceptor)


def test_a_cut_stream_that_raises_is_right():
    opener = one_end("opener", finished=False, gave_up=0, end="KeepaliveTimeout")
    assert verdict(opener, one_end("acceptor", finished=False, gave_up=0, end="TransportError")) == ""


def test_an_eof_of_a_stream_whose_writer_never_reports_is_noticed():
    ledger = Ledger()
    assert ledger.add(one_end("acceptor"), 0.0) == []
    assert ledger.expire(PATIENCE - 1) == []
    assert "EOF of what nobody wrote" in ledger.expire(PATIENCE + 1)[0]
    assert len(ledger) == 0


def test_a_reset_of_what_was_finished_needs_a_cut_session():
    opener = one_end("opener", wrote=5, wrote_digest="aa", end=None)
    acceptor = one_end("acceptor", end="StreamReset", code=0, finished=False, gave_up=0)
    assert "a reset that nobody asked for" in verdict(opener, acceptor)
    assert "a reset that nobody asked for" in verdict(opener, acceptor, "acceptor-1")
    assert verdict(opener, acceptor, "opener-1") == ""
    assert verdict({**opener, "late": True}, acceptor) == ""


def test_another_code_than_was_sent_is_noticed():
    opener = one_end("opener", finished=False, gave_up=77, end=None)
    acceptor = one_end("acceptor", end="StreamReset", code=78, finished=False, gave_up=0)
    assert "reset with code 77, heard 78" in verdict(opener, acceptor)


# --- the relay ---

DATA_OF_3 = b"\x00\x00\x00\x00\x00\x00\x00\x01\x00\x00\x00\x03abc"
CREDIT = b"\x00\x01\x00\x00\x00\x00\x00\x01\x00\x01\x00\x00"
RECORD_OF_2 = b"\x17\x03\x03\x00\x02xy"


@pytest.mark.parametrize(
    "data, ends, tls",
    [(DATA_OF_3 + CREDIT + DATA_OF_3, {15, 27, 42}, False), (RECORD_OF_2 * 2, {7, 14}, True)],
    ids=["yamux", "tls"],
)
def test_the_relay_knows_where_frames_end_however_they_come(data, ends, tls):
    for step in (1, 2, 5, len(data)):
        boundaries = Boundaries(tls=tls)
        for begin in range(0, len(data), step):
            boundaries.feed(data[begin : begin + step])
            assert boundaries.between == (min(begin + step, len(data)) in ends)
    for position in range(1, len(data) + 1):
        chosen = Boundaries(tls=tls).inside(data, position)
        assert chosen in (position, position - 1)
        assert chosen not in ends and chosen > 0
