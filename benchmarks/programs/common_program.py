"""What the two gevent programs share: the services of a stream, the workloads, the command line, life and death.

It knows no Yamux: a stream is anything with the methods of a socket, and a `Link` is where the driver gets streams
from. So geyamux and raw sockets are measured by the very same loops.

Two rules: nothing but the work itself happens between the two readings of a clock, and a program never outlives the
one that started it.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import resource
import ssl
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import gevent
import gevent.os
import gevent.ssl
from gevent import socket
from gevent.event import Event
from gevent.queue import Queue
from gevent.server import StreamServer

ECHO, SINK, COUNTED_SINK, IDLE, HELD, SOURCE = b"e", b"s", b"n", b"i", b"h", b"f"
ECHO_PIECE = 64 << 10
BULK_PIECE = 256 << 10
COUNT_SIZE = 8
IDLE_BATCH = 100
# What a kernel queues of connections that are not accepted yet, at most, by default.
LISTEN_BACKLOG = 4096
# More than anybody reads while it is measured.
ENDLESS = 1 << 50
DEFAULTS: dict[str, Any] = {"window": 262144, "auto_tune": False, "max_frame": None, "write": 65536, "streams": 0}

Command = dict[str, Any]
Answer = dict[str, Any]


class Conn(Protocol):
    """A stream, or a connection that stands for one."""

    def recv(self, bufsize: int, /) -> bytes: ...

    def sendall(self, data: Any, /) -> Any: ...

    def shutdown(self, how: int, /) -> None: ...

    def close(self) -> None: ...


class Link(Protocol):
    """The driver's side of one command: a session, or just an address."""

    #: A stream can say that no more comes, and go on receiving.
    has_half_close: bool

    def open(self, first: bytes, /) -> Conn:
        """Return a new stream on which `first`, its kind and perhaps more, is written, in one write where that can be."""

    def close(self) -> None: ...


#: From what makes connections, whether those are TLS, and the command.
LinkMaker = Callable[[Callable[[], Any], bool, Command], Link]


# --- the server's side of a stream ---


def serve_stream(conn: Conn, data: bytes, write: int, held: list[Conn]) -> None:
    """Do what the first byte of `data` says. A driver that leaves in the middle has got what it wanted."""
    kind, rest = data[:1], data[1:]
    if kind == HELD:
        held.append(conn)
        return
    try:
        if kind == ECHO:
            _echo(conn, rest)
        elif kind == SINK:
            _sink(conn, rest, None)
        elif kind == COUNTED_SINK:
            rest += read_exactly(conn, COUNT_SIZE - len(rest))
            _sink(conn, rest[COUNT_SIZE:], int.from_bytes(rest[:COUNT_SIZE], "big"))
        elif kind == IDLE:
            while conn.recv(ECHO_PIECE):
                pass
        elif kind == SOURCE:
            _source(conn, rest, write)
    except OSError:
        pass
    finally:
        conn.close()


def _echo(conn: Conn, data: bytes) -> None:
    if not data:
        data = conn.recv(ECHO_PIECE)
    while data:
        conn.sendall(data)
        data = conn.recv(ECHO_PIECE)


def _sink(conn: Conn, rest: bytes, expected: int | None) -> None:
    count = len(rest)
    while count != expected and (data := conn.recv(BULK_PIECE)):
        count += len(data)
    conn.sendall(count.to_bytes(COUNT_SIZE, "big"))


def _source(conn: Conn, rest: bytes, write: int) -> None:
    head = rest + read_exactly(conn, COUNT_SIZE - len(rest))
    left = int.from_bytes(head, "big")
    block = bytes(write)
    while left >= write:
        conn.sendall(block)
        left -= write
    if left:
        conn.sendall(block[:left])


def read_exactly(conn: Conn, size: int) -> bytes:
    data = b""
    while len(data) < size:
        piece = conn.recv(size - len(data))
        if not piece:
            raise EOFError(f"the stream ended {size - len(data)} bytes early")
        data += piece
    return data


def read_settings(conn: Conn) -> tuple[dict[str, Any], bytes]:
    """Read the line of settings that a connection begins with; return it, and what came behind it."""
    data = b""
    while b"\n" not in data:
        piece = conn.recv(ECHO_PIECE)
        if not piece:
            raise EOFError("no settings")
        data += piece
    line, _, rest = data.partition(b"\n")
    return json.loads(line), rest


def settings_line(command: Command) -> bytes:
    settings = {name: command.get(name, default) for name, default in DEFAULTS.items()}
    return json.dumps(settings).encode() + b"\n"


# --- the workloads ---


def bulk(link: Link, command: Command) -> Answer:
    streams, total, write = command["streams"], command["bytes"], command.get("write", DEFAULTS["write"])
    if warmup := command.get("warmup", 0):
        _send_bulk(link, streams, warmup, write)
    seconds, sent = _send_bulk(link, streams, total, write)
    return {"seconds": seconds, "operations": sent // write, "bytes": sent}


def _send_bulk(link: Link, streams: int, total: int, write: int) -> tuple[float, int]:
    block = bytes(write)
    writes = max(1, total // streams // write)
    first = SINK if link.has_half_close else COUNTED_SINK + (writes * write).to_bytes(COUNT_SIZE, "big")
    conns = [link.open(first) for _ in range(streams)]

    def send(conn: Conn) -> None:
        for _ in range(writes):
            conn.sendall(block)
        if link.has_half_close:
            conn.shutdown(socket.SHUT_WR)
        counted = int.from_bytes(read_exactly(conn, COUNT_SIZE), "big")
        if counted != writes * write:
            raise ValueError(f"{writes * write} bytes were sent and {counted} have arrived")
        conn.close()

    start = time.perf_counter()
    _all_at_once([gevent.spawn(send, conn) for conn in conns])
    return time.perf_counter() - start, streams * writes * write


def echo_latency(link: Link, command: Command) -> Answer:
    conn = link.open(ECHO)
    payload = bytes(command.get("size", 64))
    _trips(conn, payload, command.get("warmup", 0))
    times = list(_timed_trips(conn, payload, range(command["count"])))
    conn.close()
    return {"seconds": sum(times) / 1e9, "operations": len(times), "latencies": _latencies(times)}


def _trips(conn: Conn, payload: bytes, count: int) -> None:
    size = len(payload)
    for _ in range(count):
        conn.sendall(payload)
        got = len(conn.recv(size))
        if got < size:
            read_exactly(conn, size - got)


def _timed_trips(conn: Conn, payload: bytes, rounds: Any) -> Iterator[int]:
    """Make a trip for each of `rounds`; yield what it took, in nanoseconds."""
    clock, size = time.perf_counter_ns, len(payload)
    for _ in rounds:
        start = clock()
        conn.sendall(payload)
        got = len(conn.recv(size))
        if got < size:
            read_exactly(conn, size - got)
        yield clock() - start


def _latencies(times: list[int]) -> dict[str, float]:
    """The median and the 99th percentile, in microseconds."""
    if not times:
        return {}
    times = sorted(times)
    return {f"p{p}": times[min(len(times) - 1, len(times) * p // 100)] / 1e3 for p in (50, 99)}


def echo_rate(link: Link, command: Command) -> Answer:
    streams, count = command["streams"], command["count"]
    payload = bytes(command.get("size", 64))
    ready, gate = Event(), Event()
    waiting = streams

    def client(conn: Conn) -> None:
        nonlocal waiting
        _trips(conn, payload, 1)
        waiting -= 1
        if not waiting:
            ready.set()
        gate.wait()
        _trips(conn, payload, count)

    conns = [link.open(ECHO) for _ in range(streams)]
    clients = [gevent.spawn(client, conn) for conn in conns]
    _wait_for(ready, clients)
    start = time.perf_counter()
    gate.set()
    _all_at_once(clients)
    seconds = time.perf_counter() - start
    for conn in conns:
        conn.close()
    return {"seconds": seconds, "operations": streams * count}


def churn(link: Link, command: Command) -> Answer:
    openers, count = command["openers"], command["count"]
    payload = bytes(command.get("size", 64))
    _churn(link, min(openers, 64), command.get("warmup", 0), payload)
    return {"seconds": _churn(link, openers, count, payload), "operations": count}


def _churn(link: Link, openers: int, count: int, payload: bytes) -> float:
    first, size = ECHO + payload, len(payload)
    turns = iter(range(count))

    def opener() -> None:
        for _ in turns:
            conn = link.open(first)
            got = len(conn.recv(size))
            if got < size:
                read_exactly(conn, size - got)
            conn.close()

    start = time.perf_counter()
    _all_at_once([gevent.spawn(opener) for _ in range(openers)])
    return time.perf_counter() - start


def idle(link: Link, command: Command) -> Answer:
    """Open streams and leave them; the answer holds them, under a name that is not sent."""
    kind = IDLE if command.get("reader") else HELD
    conns: list[Conn] = []
    while len(conns) < command["streams"]:
        conns += [link.open(kind) for _ in range(min(IDLE_BATCH, command["streams"] - len(conns)))]
        # The server has accepted all before this one. In one go, what piled up unread would be measured as well.
        last = link.open(ECHO)
        _trips(last, b"!", 1)
        last.close()
    return {"operations": len(conns), "rss": _rss(), "held": conns}


def _rss() -> int:
    with open("/proc/self/statm", encoding="ascii") as statm:
        return int(statm.read().split()[1]) * resource.getpagesize()


def mixed(link: Link, command: Command) -> Answer:
    echo, sink = link.open(ECHO), link.open(SINK)
    payload, block = bytes(command.get("size", 64)), bytes(command.get("write", DEFAULTS["write"]))
    _trips(echo, payload, command.get("warmup", 100))
    sent = 0
    times: list[int] = []
    start = time.perf_counter()
    end = start + command["seconds"]

    def ping() -> None:
        times.extend(_timed_trips(echo, payload, iter(lambda: time.perf_counter() < end, False)))

    def pour() -> None:
        nonlocal sent
        while time.perf_counter() < end:
            sink.sendall(block)
            sent += len(block)

    _all_at_once([gevent.spawn(ping), gevent.spawn(pour)])
    sink.shutdown(socket.SHUT_WR)
    arrived = int.from_bytes(read_exactly(sink, COUNT_SIZE), "big")
    seconds = time.perf_counter() - start
    if arrived != sent:
        raise ValueError(f"{sent} bytes were sent and {arrived} have arrived")
    echo.close()
    sink.close()
    return {"seconds": seconds, "operations": len(times), "bytes": sent, "latencies": _latencies(times)}


def paced_bulk(link: Link, command: Command) -> Answer:
    """Receive for so many seconds, and count what comes after the first `skip` of them."""
    start = time.perf_counter()
    conn = link.open(SOURCE + ENDLESS.to_bytes(COUNT_SIZE, "big"))
    counted_from, end = start + command["skip"], start + command["seconds"]
    received, began, now = 0, start, start
    while now < end:
        data = conn.recv(BULK_PIECE)
        if not data:
            raise EOFError("the source has ended")
        now = time.perf_counter()
        if now < counted_from:
            began = now
        else:
            received += len(data)
    conn.close()
    return {"seconds": now - began, "operations": 1, "bytes": received}


WORKLOADS: dict[str, Callable[[Link, Command], Answer]] = {
    function.__name__: function for function in (bulk, echo_latency, echo_rate, churn, idle, mixed, paced_bulk)
}


def _wait_for(event: Event, greenlets: list[Any]) -> None:
    """Wait for the event, or raise what one of the greenlets has died of."""
    failed: list[Any] = []

    def note(greenlet: Any) -> None:
        failed.append(greenlet)
        event.set()

    for greenlet in greenlets:
        greenlet.link_exception(note)
    event.wait()
    if failed:
        gevent.killall(greenlets)
        raise failed[0].exception


def _all_at_once(greenlets: list[Any]) -> None:
    try:
        gevent.joinall(greenlets, raise_error=True)
    finally:
        gevent.killall(greenlets)


# --- the program ---


class Server(StreamServer):
    """gevent's server, on a free port; its handlers close what they are given, so that a held connection stays."""

    def __init__(self, handle: Callable[[Any], None], certificate: str | None) -> None:
        more: dict[str, Any] = {}
        if certificate is not None:
            context = gevent.ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(certificate)
            more["ssl_context"] = context
        super().__init__(("127.0.0.1", 0), backlog=LISTEN_BACKLOG, **more)
        self.handle_conn = handle

    def handle(self, conn: Any, _address: Any) -> None:
        conn.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        try:
            self.handle_conn(conn)
        except (OSError, EOFError):
            conn.close()

    def do_close(self, *args: Any) -> None:
        """Leave it to the handler."""


def connector(port: int, authority: str | None) -> Callable[[], Any]:
    """Return what makes connections to the server of that port."""
    context = None
    if authority is not None:
        context = gevent.ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.load_verify_locations(authority)

    def connect() -> Any:
        conn = socket.create_connection(("127.0.0.1", port))
        conn.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if context is not None:
            conn = context.wrap_socket(conn, server_hostname="localhost")
        return conn

    return connect


def main(handle: Callable[[Any], None], make_link: LinkMaker) -> None:
    """Be the server, whose connections go to `handle`, or the driver, whose links come from `make_link`."""
    parser = argparse.ArgumentParser()
    parser.add_argument("role", choices=("serve", "drive"))
    parser.add_argument("--port", type=int)
    parser.add_argument("--tls", metavar="PEM", help="serve: certificate and key; drive: whom to trust")
    arguments = parser.parse_args()
    # Connections are descriptors, and the workloads with many of them go beyond the usual limit.
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    commands: Queue[Command | None] = Queue()
    gevent.spawn(_read_commands, commands)
    if arguments.role == "serve":
        server = Server(handle, arguments.tls)
        server.start()
        _say({"port": server.server_port})
        while commands.get() is not None:
            pass
    elif arguments.port is None:
        parser.error("drive needs --port")
    else:
        connect = connector(arguments.port, arguments.tls)
        _drive(commands, functools.partial(make_link, connect, arguments.tls is not None))
    sys.stdout.flush()
    # Not by way of the interpreter's end: thousands of streams would be taken apart first.
    os._exit(0)


def _read_commands(commands: Queue[Command | None]) -> None:
    """Put what comes on the standard input into the queue, and None at its end; go at once if the parent is gone."""
    parent = os.getppid()
    gevent.os.make_nonblocking(0)
    data = b""
    while piece := gevent.os.nb_read(0, ECHO_PIECE):
        *lines, data = (data + piece).split(b"\n")
        for line in lines:
            if line.strip():
                commands.put(json.loads(line))
    if os.getppid() != parent:
        os._exit(1)
    commands.put(None)


def _drive(commands: Queue[Command | None], make_link: Callable[[Command], Link]) -> None:
    while (command := commands.get()) is not None:
        if command["workload"] == "release":
            _say({})
            continue
        held: list[Conn] = []
        try:
            link = make_link(command)
            answer = WORKLOADS[command["workload"]](link, command)
            held = answer.pop("held", [])
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        _say(answer)
        if held:
            _hold_until_released(commands, held)
        link.close()


def _hold_until_released(commands: Queue[Command | None], held: list[Conn]) -> None:
    released = commands.get()
    if released is None:
        os._exit(0)
    for conn in held:
        conn.close()
    _say({})


def _say(message: dict[str, Any]) -> None:
    print(json.dumps(message), flush=True)
