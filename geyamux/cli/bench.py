"""``geyamux bench``: how fast Yamux is here, in a handful of figures.

The other end echoes each stream: ``bench --serve``, or any Yamux server that does so. Every byte that comes back is
compared with what was sent. The figures are those of this machine, this Python and this moment; to compare two
programs, run both on the same machine in turn.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import gevent
from gevent.fileobject import FileObject

from .. import Config, Session, Stream, __version__
from ..server import StreamServer
from .address import Address, address
from .ends import listen, name_of
from .errors import CommandError, UsageError
from .signals import interruptible
from .stdio import take_standard_io
from .trunk import Trust, accept, add_tls_arguments, dial
from .values import interval, positive

SUMMARY = "measure latency and throughput"
DESCRIPTION = """\
Measure round trips, echoes and throughput against a Yamux server that echoes each stream: one that `bench --serve`
runs, or with --local one in a child process over the loopback interface."""
EXAMPLES = """\
  geyamux bench --local                        this machine alone
  geyamux bench --serve :7000                  on one machine, and on the other:
  geyamux bench relay.example:7000 --seconds 10
  geyamux bench 'exec:ssh relay.example geyamux bench --serve stdio:'
  geyamux bench --local --json | jq .echo_one_stream_mb_per_second"""

#: What is sent over and over, from another place on in each stream. Its length is prime, so that a piece of a frame that
#: is lost, doubled or moved shows.
_PERIOD = 65521
_PATTERN = bytes((x * x * 31 + x * 17 + (x >> 8)) & 0xFF for x in range(_PERIOD)) * 2
_MESSAGE = _PATTERN[:64]
_IDLE_STREAMS = 1000
#: So long, in seconds, the first echo may take, and so long one of many streams may get nothing over a slow link.
_FIRST_PATIENCE = 5.0
_PATIENCE = 60.0
#: As `geyamux forward` has it, so that the delay of a link does not limit what goes over it.
_CONFIG = Config(window_auto_tune=True)
_IN_PLACE_OF_ECHO = "other bytes came back than were sent"
#: What the child process of --local runs.
_CHILD = "from geyamux.cli.bench import serve_parent; serve_parent()"


class Figure(NamedTuple):
    """One result; `key` names it, and its unit, for programs."""

    key: str
    label: str
    value: float
    unit: str


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what the command takes."""
    # argparse would not show the address as one of the three.
    parser.usage = "%(prog)s (ADDR | --local | --serve ADDR) [options]"
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("address", metavar="ADDR", type=address, nargs="?", help="the server that echoes")
    where.add_argument("--local", action="store_true", help="start one in a child process, over loopback")
    where.add_argument("--serve", metavar="ADDR", type=address, help="be that server, until a signal ends it")
    parser.add_argument("--seconds", metavar="S", type=interval, default=2.0, help="for each measure (default: 2)")
    parser.add_argument("--streams", metavar="N", type=positive, default=100, help="that echo at once (default: 100)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    add_tls_arguments(parser)


def run(options: argparse.Namespace) -> int:
    """Measure, or serve those who do."""
    if options.serve is not None:
        return _serve(options)
    if options.local and Trust(options, is_server=False).context is not None:
        raise UsageError("--local is without TLS: run --serve with --cert for that")
    if options.address is not None and options.address.kind == "stdio":
        raise UsageError("standard output is for the figures: stdio: can only be served")
    server = _local_server() if options.local else contextlib.nullcontext(options.address)
    with interruptible(), server as target, dial(target, options, _CONFIG) as session:
        _report(target, _measure(target, session, options), options)
    return 0


def _measure(target: Address, session: Session, options: argparse.Namespace) -> Iterator[Figure]:
    try:
        yield from measure(session, options.seconds, options.streams)
    except OSError as error:
        raise CommandError(
            f"{target}: {error.strerror or error}; this needs a Yamux server that takes {_IDLE_STREAMS:,} streams at "
            "once and sends back what comes in each, such as `geyamux bench --serve ADDR`"
        ) from error


def _report(target: Address, figures: Iterator[Figure], options: argparse.Namespace) -> None:
    facts = {
        "address": str(target),
        "geyamux": __version__,
        "python": f"{platform.python_implementation()} {platform.python_version()}",
        "gevent": gevent.__version__,
        "seconds": options.seconds,
        "streams": options.streams,
    }
    if options.json:
        print(json.dumps(facts | {figure.key: float(f"{figure.value:.6g}") for figure in figures}))
        return
    print("{address}: geyamux {geyamux}, {python}, gevent {gevent}".format(**facts), flush=True)
    for figure in figures:
        decimals = {"ms": 3, "MB/s": 1}.get(figure.unit, 0)
        print(f"{figure.label:<34}{figure.value:>12,.{decimals}f} {figure.unit}", flush=True)


# --- the measures ---


def measure(session: Session, seconds: float, streams: int) -> Iterator[Figure]:
    """Yield each figure as soon as it is known. OSError where the other end does not echo, or not any more."""
    with _open(session) as stream:
        # Says soon where nobody echoes.
        stream.settimeout(_FIRST_PATIENCE)
        _echo_message(stream)
        stream.settimeout(_PATIENCE)
        yield from _latency("round_trip", "round trip", seconds, lambda: session.ping(_PATIENCE))
        yield from _latency("echo_64_bytes", "echo of 64 bytes", seconds, lambda: _echo_message(stream))
    yield Figure("echo_one_stream_mb_per_second", "echo, 1 stream", _throughput(session, seconds, 1), "MB/s")
    many = _throughput(session, seconds, streams)
    yield Figure("echo_many_streams_mb_per_second", f"echo, {streams:,} streams at once", many, "MB/s")
    yield Figure("open_echo_close_per_second", "open, echo of 64 bytes, close", _rate(session, seconds), "streams/s")
    yield Figure("open_1000_idle_streams_ms", f"{_IDLE_STREAMS:,} idle streams opened at once", _open_idle(session), "ms")


def _latency(key: str, label: str, seconds: float, call: Callable[[], object]) -> Iterator[Figure]:
    times: list[float] = []
    began = now = time.perf_counter()
    while now - began < seconds:
        before = now
        call()
        now = time.perf_counter()
        times.append((now - before) * 1000)
    times.sort()
    for percent in (50, 99):
        yield Figure(f"{key}_p{percent}_ms", f"{label}, p{percent}", times[len(times) * percent // 100], "ms")


def _throughput(session: Session, seconds: float, count: int) -> float:
    """Megabytes that came back in a second, of all streams together."""
    began = time.perf_counter()
    echoes = [gevent.spawn(_echo_until, session, began + seconds, number * 251 % _PERIOD) for number in range(count)]
    try:
        outcomes = [echo.get() for echo in echoes]
    finally:
        gevent.killall(echoes)
    took, size = time.perf_counter() - began, 0
    for outcome in outcomes:
        if isinstance(outcome, OSError):
            raise outcome
        size += outcome
    return size / took / 1e6


def _echo_until(session: Session, end: float, place: int) -> int | OSError:
    """Write and read at once; return the size of what came back, as it had been sent.

    An error is returned: of one that is raised in a greenlet gevent prints the traceback.
    """
    received = 0
    try:
        with _open(session) as stream:
            writer = gevent.spawn(_write_until, stream, end, place)
            while data := stream.recv(_PERIOD):
                # This compares in place: a slice would be a copy.
                if not _PATTERN.startswith(data, (place + received) % _PERIOD):
                    raise OSError(_IN_PLACE_OF_ECHO)
                received += len(data)
            writer.join(_PATIENCE)
            if received != writer.value:
                raise OSError("fewer bytes came back than were sent")
    except OSError as error:
        return error
    return received


def _write_until(stream: Stream, end: float, place: int) -> int:
    block, sent = _PATTERN[place : place + _PERIOD], 0
    # What breaks the stream the reader is told, too.
    with contextlib.suppress(OSError):
        while time.perf_counter() < end:
            stream.sendall(block)
            sent += len(block)
        stream.close_write()
    return sent


def _rate(session: Session, seconds: float) -> float:
    """Streams in a second, one after the other."""
    count, began = 0, time.perf_counter()
    while (took := time.perf_counter() - began) < seconds:
        with _open(session) as stream:
            _echo_message(stream)
        count += 1
    return count / took


def _open_idle(session: Session) -> float:
    """Milliseconds until they are open on both sides: each has sent a byte and has it back."""
    began = time.perf_counter()
    with contextlib.ExitStack() as stack:
        # Each with its byte at once: some servers acknowledge a stream only with their first answer.
        streams = [stack.enter_context(_open(session, b"x")) for _ in range(_IDLE_STREAMS)]
        if any(stream.recv(1) != b"x" for stream in streams):
            raise OSError(_IN_PLACE_OF_ECHO)
        return (time.perf_counter() - began) * 1000


def _open(session: Session, first: bytes = b"") -> Stream:
    stream = session.open(_PATIENCE)
    stream.settimeout(_PATIENCE)
    stream.sendall(first)
    return stream


def _echo_message(stream: Stream) -> None:
    stream.sendall(_MESSAGE)
    if stream.read(len(_MESSAGE)) != _MESSAGE:
        raise OSError(_IN_PLACE_OF_ECHO)


# --- the other end ---


def echo(stream: Stream, _address: object = None) -> None:
    """Send back what comes, to its end."""
    while data := stream.recv(_PERIOD):
        stream.sendall(data)


def _serve(options: argparse.Namespace) -> int:
    """Until SIGINT or SIGTERM, or the end of standard input where that is the connection."""
    if options.serve.kind == "exec":
        raise UsageError("exec: is for who dials")
    trust = Trust(options, is_server=True, address=options.serve)
    if options.serve.kind == "stdio":
        server = StreamServer(accept(take_standard_io(), trust, _CONFIG), echo)
    else:
        listener = listen(options.serve)
        # Any: they are arguments of many types.
        tls: dict[str, Any] = {} if trust.context is None else {"ssl_context": trust.context}
        server = StreamServer(listener, echo, config=_CONFIG, **tls)
        print(f"serving at {name_of(listener.getsockname())}", flush=True)
    for number in (signal.SIGINT, signal.SIGTERM):
        gevent.signal_handler(number, server.stop)
    server.serve_forever()
    return 0


def serve_parent() -> None:
    """Serve on a free port, tell it on standard output, and end with standard input, whatever happens to the parent."""
    with StreamServer(("127.0.0.1", 0), echo, config=_CONFIG) as server:
        server.start()
        print(server.server_port, flush=True)
        FileObject(0, "rb", closefd=False).read()


@contextlib.contextmanager
def _local_server() -> Iterator[Address]:
    # Ctrl-C is for this process: the child hears of it by the end of its input.
    command, pipe = [sys.executable, "-c", _CHILD], subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, start_new_session=True) as child:
        port = child.stdout.readline() if child.stdout else b""
        if not port:
            raise CommandError("the child process that was to echo did not start: see above")
        yield address(f"127.0.0.1:{int(port)}")
