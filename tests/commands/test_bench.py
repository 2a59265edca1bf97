"""`geyamux bench`: its figures, its own server, and others that echo, that don't, and that cheat."""

from __future__ import annotations

import contextlib
import json
import re
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import trustme
from gevent import subprocess

import geyamux
from commands.program import run, start
from geyamux.cli import bench
from geyamux.server import StreamServer
from support.links import free_port
from support.programs import build_go
from support.waiting import wait_for
from tunnels.running import GEYAMUX, Child, alive, descendants

ROOT = Path(__file__).parent.parent.parent

SHORT = ("--seconds", "0.05", "--streams", "10")
LABELS = [
    ("round trip, p50", "ms"),
    ("round trip, p99", "ms"),
    ("echo of 64 bytes, p50", "ms"),
    ("echo of 64 bytes, p99", "ms"),
    ("echo, 1 stream", "MB/s"),
    ("echo, 10 streams at once", "MB/s"),
    ("open, echo of 64 bytes, close", "streams/s"),
    ("1,000 idle streams opened at once", "ms"),
]
KEYS = [
    "round_trip_p50_ms",
    "round_trip_p99_ms",
    "echo_64_bytes_p50_ms",
    "echo_64_bytes_p99_ms",
    "echo_one_stream_mb_per_second",
    "echo_many_streams_mb_per_second",
    "open_echo_close_per_second",
    "open_1000_idle_streams_ms",
]
NEEDS = "this needs a Yamux server that takes 1,000 streams at once and sends back what comes in each"


@contextlib.contextmanager
def serving(handle: Callable[[Any], object], config: geyamux.Config | None = None) -> Iterator[str]:
    """A server that handles each stream so; its address."""
    server = StreamServer(("127.0.0.1", 0), lambda stream, _: handle(stream), config=config)
    server.start()
    try:
        yield f"127.0.0.1:{server.server_port}"
    finally:
        server.stop(timeout=5)


def check_lines(out: str, address: str) -> None:
    heading, *lines = out.splitlines()
    assert heading.startswith(f"{address}: geyamux {geyamux.__version__}, CPython 3.")
    found = [re.fullmatch(r"(.+?) +([\d,.]+) (\S+)", line) for line in lines]
    assert [(match[1], match[3]) for match in found] == LABELS
    assert all(float(match[2].replace(",", "")) > 0 for match in found), out
    # Figures end in one column.
    assert len({match.end(2) for match in found}) == 1


def test_local_prints_every_figure_with_its_unit():
    done = run("bench", "--local", *SHORT)
    check_lines(done.out, re.match(r"127\.0\.0\.1:\d+", done.out)[0])
    assert done.err == ""


def test_json_is_one_object_with_the_units_in_its_keys():
    (line,) = run("bench", "--local", "--json", *SHORT).out.splitlines()
    told = json.loads(line)
    assert list(told) == ["address", "geyamux", "python", "gevent", "seconds", "streams", *KEYS]
    assert (told["seconds"], told["streams"]) == (0.05, 10)
    assert all(told[key] > 0 for key in KEYS)
    assert told["round_trip_p50_ms"] <= told["round_trip_p99_ms"]
    assert told["echo_64_bytes_p50_ms"] <= told["echo_64_bytes_p99_ms"]


def test_any_server_that_echoes_will_do():
    sizes = []

    def echo(stream):
        size = 0
        while data := stream.recv(4096):
            stream.sendall(data)
            size += len(data)
        sizes.append(size)

    with serving(echo) as address:
        check_lines(run("bench", address, *SHORT).out, address)
    # In this order: messages on one stream, all the throughput, a stream for each message, idle ones.
    assert sizes.pop(0) % 64 == 0
    loads, messages, idle = sizes[:11], sizes[11:-1000], sizes[-1000:]
    assert all(size and size % 65521 == 0 for size in loads)
    assert messages and set(messages) == {64}
    assert set(idle) == {1}


@pytest.mark.interop
@pytest.mark.timeout(150)
def test_hashicorp_echoes(children, tmp_path):
    program = build_go(ROOT / "tests/wire/goecho", tmp_path)
    server = children.start(Child, [program], log="stdout", stdin=subprocess.PIPE)
    address = f"127.0.0.1:{server.wait_line(str.isdigit, 'its port')}"
    check_lines(run("bench", address, *SHORT).out, address)
    server.process.stdin.close()
    server.wait()


def test_seconds_are_those_of_each_measure():
    def told(seconds):
        messages = []

        def echo(stream):
            while data := stream.recv(65536):
                stream.sendall(data)
                messages.append(1)

        with serving(echo) as address:
            run("bench", address, "--seconds", seconds, "--streams", "1")
        return len(messages) - 1000

    assert told("0.2") > 2 * told("0.02")


def test_the_serving_side_serves_until_a_signal(children):
    for number in (signal.SIGTERM, signal.SIGINT):
        child = start(children, "bench", "--serve", "127.0.0.1:0")
        address = child.wait_line(lambda line: line.startswith("serving at "), "its address").rpartition(" ")[2]
        check_lines(run("bench", address, *SHORT).out, address)
        child.process.send_signal(number)
        child.wait(0)
        assert child.lines == [f"serving at {address}"]


def test_it_serves_on_a_unix_socket(children, tmp_path):
    address = f"unix:{tmp_path}/bench"
    child = start(children, "bench", "--serve", address)
    child.wait_line(lambda line: line == f"serving at {tmp_path}/bench", "its address")
    check_lines(run("bench", address, *SHORT).out, address)
    child.stop()


def test_it_serves_on_standard_input_and_output():
    address = f"exec:{' '.join(GEYAMUX)} bench --serve stdio:"
    check_lines(run("bench", address, *SHORT).out, address)


def test_it_serves_with_tls(children, tmp_path):
    authority = trustme.CA()
    authority.cert_pem.write_to_path(tmp_path / "ca.pem")
    authority.issue_cert("127.0.0.1").private_key_and_cert_chain_pem.write_to_path(tmp_path / "server.pem")
    child = start(children, "bench", "--serve", "127.0.0.1:0", "--cert", str(tmp_path / "server.pem"))
    address = child.wait_line(lambda line: line.startswith("serving at "), "its address").rpartition(" ")[2]
    check_lines(run("bench", address, "--ca", str(tmp_path / "ca.pem"), *SHORT).out, address)
    assert f"geyamux bench: {address}: " in run("bench", address, *SHORT, code=1).err
    child.stop()


def test_the_child_ends_with_its_parent_however_that_ends(children):
    child = start(children, "bench", "--local", "--seconds", "60")
    child.wait_line(lambda line: line.startswith("127.0.0.1:"), "the heading")
    (server,) = descendants(child.pid)
    child.process.send_signal(signal.SIGKILL)
    child.wait(-signal.SIGKILL)
    wait_for(lambda: not alive(server), "the end of the child")


def test_ctrl_c_ends_both_without_a_traceback(children):
    child = start(children, "bench", "--local", "--seconds", "60")
    child.wait_line(lambda line: line.startswith("127.0.0.1:"), "the heading")
    (server,) = descendants(child.pid)
    child.process.send_signal(signal.SIGINT)
    child.wait(130)
    assert not alive(server)
    assert len(child.lines) == 1, child


# --- servers that do not echo ---


def drain(stream):
    while stream.recv(65536):
        pass


def change(stream):
    while data := stream.recv(65536):
        stream.sendall(data[::-1])


@pytest.mark.slow
def test_a_server_that_is_silent_is_told():
    with serving(drain) as address:
        done = run("bench", address, *SHORT, code=1)
    assert done.err.startswith(f"geyamux bench: {address}: timed out; {NEEDS}")
    assert done.err.count("\n") == 1


def test_a_server_that_refuses_streams_is_told():
    with serving(drain, geyamux.Config(max_incoming_streams=0)) as address:
        done = run("bench", address, *SHORT, code=1)
    assert done.err.startswith(f"geyamux bench: {address}: ") and NEEDS in done.err
    assert "reset" in done.err and done.err.count("\n") == 1


def test_a_server_that_sends_something_else_is_told():
    with serving(change) as address:
        done = run("bench", address, *SHORT, code=1)
    assert done.err.startswith(f"geyamux bench: {address}: other bytes came back than were sent; {NEEDS}")


def test_a_server_that_takes_fewer_streams_is_told_after_the_other_figures():
    with serving(bench.echo, geyamux.Config(max_incoming_streams=500)) as address:
        done = run("bench", address, *SHORT, code=1)
    assert done.out.count("\n") == len(LABELS)  # the heading, and all figures but the last
    assert NEEDS in done.err and done.err.count("\n") == 1


@pytest.mark.parametrize("streams", [1, 7])
def test_a_byte_that_is_changed_in_much_traffic_is_found(streams):
    def spoil(stream):
        total = 0
        while data := stream.recv(65536):
            if total < 1_000_000 <= total + len(data):
                data = bytes([data[0] ^ 1]) + data[1:]
            stream.sendall(data)
            total += len(data)

    with measured(spoil) as session, pytest.raises(OSError, match="other bytes came back"):
        bench._throughput(session, 0.5, streams)


@pytest.mark.parametrize("change", [lambda data: data[1:], lambda data: data + b"\n"])
def test_a_byte_that_is_lost_or_added_is_found(change):
    def spoil(stream):
        data = stream.read(65521)
        stream.sendall(change(data))
        bench.echo(stream)

    with measured(spoil) as session, pytest.raises(OSError, match="other bytes came back"):
        bench._throughput(session, 0.1, 1)


def test_an_echo_that_ends_early_is_found():
    def stop(stream):
        stream.sendall(stream.read(65521))
        stream.close_write()
        drain(stream)

    with measured(stop) as session, pytest.raises(OSError, match="fewer bytes came back"):
        bench._throughput(session, 0.1, 1)


@contextlib.contextmanager
def measured(handle: Callable[[Any], object]) -> Iterator[geyamux.Session]:
    """A session whose other end, in this process, handles each stream so."""
    client, server = geyamux.pair()
    with client, server, StreamServer(server, lambda stream, _: handle(stream)) as serving:
        serving.start()
        yield client


def test_the_echoes_of_one_stream_for_another_are_found():
    streams = []

    def swap(stream):
        streams.append(stream)
        wait_for(lambda: len(streams) == 2, "the other stream")
        other = streams[1 - streams.index(stream)]
        # They are given up when it is found out.
        with contextlib.suppress(OSError):
            while data := stream.recv(65536):
                other.sendall(data)

    with measured(swap) as session, pytest.raises(OSError, match="other bytes came back"):
        bench._throughput(session, 0.05, 2)


def test_a_port_where_nobody_listens_is_one_line():
    address = f"127.0.0.1:{free_port()}"
    done = run("bench", address, code=1)
    assert done.err.startswith(f"geyamux bench: can't connect to {address}: connection refused")
    assert done.err.count("\n") == 1


@pytest.mark.parametrize(
    ("words", "why"),
    [
        ([], "one of the arguments ADDR --local --serve is required"),
        (["--local", "7000"], "not allowed with argument"),
        (["stdio:"], "standard output is for the figures"),
        (["--serve", "exec:true"], "exec: is for who dials"),
        (["--local", "--server-name", "x"], "--local is without TLS"),
        (["--local", "--streams", "0"], "must be at least 1"),
        (["--local", "--seconds", "0"], "must be more than 0 seconds"),
    ],
)
def test_words_that_make_no_sense_are_told(words, why):
    done = run("bench", *words, code=2)
    assert why in done.err
    assert done.out == ""


def test_the_help_has_examples():
    assert "\nexamples:\n  geyamux bench --local" in run("bench", "--help").out
