"""py-libp2p's Yamux on trio, without the rest of py-libp2p: one connection for each command, a task for each stream.

It runs in a Python that has libp2p and need not have gevent or geyamux, so it shares no code with the other programs,
only the contract in ../README.md. Of that contract it leaves out what the library can't do, and answers so: TLS (its
security is another), a window of the caller's choice (it begins with 256 KiB and tunes itself, always), and more streams
at once than it can open in a sensible time.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import resource
import time
from collections.abc import Awaitable, Callable
from typing import Any

import trio
from libp2p.abc import ISecureConn
from libp2p.connection_types import ConnectionType
from libp2p.io.exceptions import IOException
from libp2p.io.trio import TrioTCPStream
from libp2p.network.connection.exceptions import RawConnError
from libp2p.network.connection.raw_connection import RawConnection
from libp2p.peer.id import ID
from libp2p.stream_muxer.exceptions import MuxedConnUnavailable, MuxedStreamEOF, MuxedStreamError
from libp2p.stream_muxer.yamux.yamux import DEFAULT_WINDOW_SIZE, Yamux, YamuxStream

ECHO, SINK, IDLE, HELD, SOURCE = b"e", b"s", b"i", b"h", b"f"
ECHO_PIECE = 64 << 10
BULK_PIECE = 256 << 10
COUNT_SIZE = 8
# More than anybody reads while it is measured.
ENDLESS = 1 << 50
MOST_STREAMS = 20_000
DEFAULTS: dict[str, Any] = {
    "window": DEFAULT_WINDOW_SIZE,
    "auto_tune": False,
    "max_frame": None,
    "write": 65536,
    "streams": 0,
}

Command = dict[str, Any]
Answer = dict[str, Any]


class Refused(Exception):
    """The library can't do that."""


class PlainConnection(RawConnection, ISecureConn):
    """Bare TCP where py-libp2p wants a secured connection with identities, which its Yamux never asks for."""

    def get_local_peer(self) -> ID:
        raise NotImplementedError

    def get_local_private_key(self) -> Any:
        raise NotImplementedError

    def get_remote_peer(self) -> ID:
        raise NotImplementedError

    def get_remote_public_key(self) -> Any:
        raise NotImplementedError


def make_yamux(conn: trio.SocketStream, is_client: bool, streams: int) -> Yamux:
    """trio has set TCP_NODELAY on the connection."""
    plain = PlainConnection(TrioTCPStream(conn), is_client, connection_type=ConnectionType.DIRECT)
    connection = Yamux(plain, ID(b"peer"), is_initiator=is_client)
    # The library allows that many streams that it has opened at once, and takes no other number.
    if streams >= connection.stream_backlog_limit:
        connection.stream_backlog_semaphore = trio.Semaphore(streams + 1)
    return connection


# --- the server ---


async def serve() -> None:
    (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
    say({"port": listener.socket.getsockname()[1]})
    await trio.serve_listeners(handle, [listener])


async def handle(conn: trio.SocketStream) -> None:
    settings = await read_settings(conn)
    connection = make_yamux(conn, False, settings["streams"])
    async with trio.open_nursery() as nursery:
        nursery.start_soon(connection.start)
        await connection.event_started.wait()
        try:
            while True:
                nursery.start_soon(serve_stream, await connection.accept_stream(), settings["write"])
        except MuxedConnUnavailable:
            nursery.cancel_scope.cancel()


async def read_settings(conn: trio.SocketStream) -> dict[str, Any]:
    """Read byte by byte, since Yamux begins right behind the line."""
    line = bytearray()
    while not line.endswith(b"\n"):
        piece = await conn.receive_some(1)
        if not piece:
            return DEFAULTS
        line += piece
    settings: dict[str, Any] = json.loads(line)
    return settings


async def serve_stream(stream: YamuxStream, write: int) -> None:
    """Do what the first byte says. A driver that leaves in the middle has got what it wanted."""
    try:
        data = await receive(stream, ECHO_PIECE)
        kind, rest = data[:1], data[1:]
        if kind == HELD:
            return  # the connection keeps it
        if kind == ECHO:
            await echo(stream, rest)
        elif kind == SINK:
            await sink(stream, rest)
        elif kind == IDLE:
            while await receive(stream, ECHO_PIECE):
                pass
        elif kind == SOURCE:
            await source(stream, rest, write)
        await stream.close()
    except (EOFError, MuxedStreamError, RawConnError, IOException):
        pass


async def echo(stream: YamuxStream, data: bytes) -> None:
    if not data:
        data = await receive(stream, ECHO_PIECE)
    while data:
        await stream.write(data)
        data = await receive(stream, ECHO_PIECE)


async def sink(stream: YamuxStream, rest: bytes) -> None:
    count = len(rest)
    while data := await receive(stream, BULK_PIECE):
        count += len(data)
    await stream.write(count.to_bytes(COUNT_SIZE, "big"))


async def source(stream: YamuxStream, rest: bytes, write: int) -> None:
    head = rest + await read_exactly(stream, COUNT_SIZE - len(rest))
    left = int.from_bytes(head, "big")
    block = bytes(write)
    while left >= write:
        await stream.write(block)
        left -= write
    if left:
        await stream.write(block[:left])


# --- what the two sides share ---


async def receive(stream: YamuxStream, size: int) -> bytes:
    """Return what has come, up to so many bytes; nothing at the end."""
    try:
        return await stream.read(size)
    except MuxedStreamEOF:
        return b""


async def read_exactly(stream: YamuxStream, size: int) -> bytes:
    data = b""
    while len(data) < size:
        piece = await receive(stream, size - len(data))
        if not piece:
            raise EOFError(f"the stream ended {size - len(data)} bytes early")
        data += piece
    return data


def say(message: dict[str, Any]) -> None:
    print(json.dumps(message), flush=True)


# --- the workloads ---


async def bulk(connection: Yamux, command: Command) -> Answer:
    streams, total, write = command["streams"], command["bytes"], command["write"]
    if warmup := command.get("warmup", 0):
        await send_bulk(connection, streams, warmup, write)
    seconds, sent = await send_bulk(connection, streams, total, write)
    return {"seconds": seconds, "operations": sent // write, "bytes": sent}


async def send_bulk(connection: Yamux, streams: int, total: int, write: int) -> tuple[float, int]:
    block = bytes(write)
    writes = max(1, total // streams // write)
    opened = [await open_stream(connection, SINK) for _ in range(streams)]

    async def send(stream: YamuxStream) -> None:
        for _ in range(writes):
            await stream.write(block)
        await finish_sink(stream, writes * write)

    start = time.perf_counter()
    async with trio.open_nursery() as nursery:
        for stream in opened:
            nursery.start_soon(send, stream)
    return time.perf_counter() - start, streams * writes * write


async def finish_sink(stream: YamuxStream, sent: int) -> None:
    await stream.close()
    arrived = int.from_bytes(await read_exactly(stream, COUNT_SIZE), "big")
    if arrived != sent:
        raise ValueError(f"{sent} bytes were sent and {arrived} have arrived")


async def echo_latency(connection: Yamux, command: Command) -> Answer:
    stream, payload = await open_stream(connection, ECHO), bytes(command["size"])
    await make_trips(stream, payload, command.get("warmup", 0))
    times = [await timed_trip(stream, payload) for _ in range(command["count"])]
    await stream.close()
    return {"seconds": sum(times) / 1e9, "operations": len(times), "latencies": latencies(times)}


async def make_trips(stream: YamuxStream, payload: bytes, count: int) -> None:
    size = len(payload)
    for _ in range(count):
        await stream.write(payload)
        got = len(await receive(stream, size))
        if got < size:
            await read_exactly(stream, size - got)


async def timed_trip(stream: YamuxStream, payload: bytes) -> int:
    start = time.perf_counter_ns()
    await make_trips(stream, payload, 1)
    return time.perf_counter_ns() - start


def latencies(times: list[int]) -> dict[str, float]:
    """The median and the 99th percentile, in microseconds."""
    if not times:
        return {}
    times = sorted(times)
    return {f"p{p}": times[len(times) * p // 100] / 1e3 for p in (50, 99)}


async def echo_rate(connection: Yamux, command: Command) -> Answer:
    streams, count, payload = command["streams"], command["count"], bytes(command["size"])
    opened = [await open_stream(connection, ECHO) for _ in range(streams)]
    async with trio.open_nursery() as nursery:
        for stream in opened:
            nursery.start_soon(make_trips, stream, payload, 1)
    start = time.perf_counter()
    async with trio.open_nursery() as nursery:
        for stream in opened:
            nursery.start_soon(make_trips, stream, payload, count)
    return {"seconds": time.perf_counter() - start, "operations": streams * count}


async def churn(connection: Yamux, command: Command) -> Answer:
    openers, count, payload = command["openers"], command["count"], bytes(command["size"])
    await call_all(connection, min(openers, 64), command.get("warmup", 0), payload)
    return {"seconds": await call_all(connection, openers, count, payload), "operations": count}


async def call_all(connection: Yamux, openers: int, count: int, payload: bytes) -> float:
    first, size = ECHO + payload, len(payload)
    turns = iter(range(count))

    async def opener() -> None:
        for _ in turns:
            stream = await open_stream(connection, first)
            got = len(await receive(stream, size))
            if got < size:
                await read_exactly(stream, size - got)
            await stream.close()

    start = time.perf_counter()
    async with trio.open_nursery() as nursery:
        for _ in range(openers):
            nursery.start_soon(opener)
    return time.perf_counter() - start


async def idle(connection: Yamux, command: Command) -> Answer:
    """Open streams, which the connection keeps; the echo is accepted after all of them."""
    kind = IDLE if command.get("reader") else HELD
    for _ in range(command["streams"]):
        await open_stream(connection, kind)
    last = await open_stream(connection, ECHO)
    await make_trips(last, b"!", 1)
    await last.close()
    return {"operations": command["streams"], "rss": resident_bytes()}


def resident_bytes() -> int:
    with open("/proc/self/statm", encoding="ascii") as statm:
        return int(statm.read().split()[1]) * resource.getpagesize()


async def mixed(connection: Yamux, command: Command) -> Answer:
    echoes, bulky = await open_stream(connection, ECHO), await open_stream(connection, SINK)
    payload, block = bytes(command["size"]), bytes(command["write"])
    await make_trips(echoes, payload, command.get("warmup", 100))
    sent, seconds = 0, 0.0
    times: list[int] = []
    start = time.perf_counter()
    end = start + command["seconds"]

    async def ping() -> None:
        while time.perf_counter() < end:
            times.append(await timed_trip(echoes, payload))

    async def pour() -> None:
        nonlocal sent, seconds
        while time.perf_counter() < end:
            await bulky.write(block)
            sent += len(block)
        await finish_sink(bulky, sent)
        seconds = time.perf_counter() - start

    async with trio.open_nursery() as nursery:
        nursery.start_soon(ping)
        nursery.start_soon(pour)
    return {"seconds": seconds, "operations": len(times), "bytes": sent, "latencies": latencies(times)}


async def paced_bulk(connection: Yamux, command: Command) -> Answer:
    """Receive for so many seconds, and count what comes after the first `skip` of them."""
    start = time.perf_counter()
    stream = await open_stream(connection, SOURCE + ENDLESS.to_bytes(COUNT_SIZE, "big"))
    counted_from, end = start + command["skip"], start + command["seconds"]
    received, began, now = 0, start, start
    while now < end:
        data = await receive(stream, BULK_PIECE)
        if not data:
            raise EOFError("the source has ended")
        now = time.perf_counter()
        if now < counted_from:
            began = now
        else:
            received += len(data)
    return {"seconds": now - began, "operations": 1, "bytes": received}


async def open_stream(connection: Yamux, first: bytes) -> YamuxStream:
    stream = await connection.open_stream()
    await stream.write(first)
    return stream


WORKLOADS: dict[str, Callable[[Yamux, Command], Awaitable[Answer]]] = {
    function.__name__: function for function in (bulk, echo_latency, echo_rate, churn, idle, mixed, paced_bulk)
}


# --- the driver ---


class Driver:
    """Obeys the commands on the standard input."""

    def __init__(self, commands: Commands, port: int, tls: bool) -> None:
        self.commands = commands
        self.port = port
        self.tls = tls

    async def run(self) -> None:
        while (command := await self.commands.next()) is not None:
            if command["workload"] == "release":
                say({})
                continue
            try:
                await self.obey({**DEFAULTS, "size": 64, **command})
            except Exception as error:
                say({"error": describe(error)})

    async def obey(self, command: Command) -> None:
        """Do the work of one command on a connection of its own, and answer."""
        self.refuse(command)
        command["streams"] = max(command["streams"], command.get("openers", 0))
        conn = await trio.open_tcp_stream("127.0.0.1", self.port)
        async with conn, trio.open_nursery() as nursery:
            await conn.send_all(json.dumps({name: command[name] for name in DEFAULTS}).encode() + b"\n")
            connection = make_yamux(conn, True, command["streams"])
            nursery.start_soon(connection.start)
            await connection.event_started.wait()
            answer = await WORKLOADS[command["workload"]](connection, command)
            say(answer)
            if command["workload"] == "idle":
                if await self.commands.next() is None:
                    os._exit(0)
                say({})
            # A paced command leaves its source pouring; there is no good order to wait for.
            nursery.cancel_scope.cancel()

    def refuse(self, command: Command) -> None:
        if self.tls:
            raise Refused("py-libp2p's security is not TLS")
        if command["workload"] not in WORKLOADS:
            raise Refused(f"unknown workload {command['workload']!r}")
        if command["window"] != DEFAULT_WINDOW_SIZE:
            raise Refused("py-libp2p's window can't be set: it begins with 256 KiB and tunes itself")
        if max(command["streams"], command.get("openers", 0)) > MOST_STREAMS:
            raise Refused(f"py-libp2p takes too long to open more than {MOST_STREAMS:,} streams")


def describe(error: BaseException) -> str:
    """Say what the first of a nursery's tasks that failed has raised."""
    while nested := getattr(error, "exceptions", None):
        error = nested[0]
    return str(error) if isinstance(error, Refused) else f"{type(error).__name__}: {error}"


class Commands:
    """The lines of the standard input."""

    def __init__(self) -> None:
        self._input = trio.lowlevel.FdStream(os.dup(0))
        self._data = b""

    async def next(self) -> Command | None:
        """Wait for the next; None at the end, which comes too when whoever started this program dies."""
        while b"\n" not in self._data:
            piece = await self._input.receive_some()
            if not piece:
                return None
            self._data += piece
        line, _, self._data = self._data.partition(b"\n")
        command: Command = json.loads(line)
        return command


async def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("role", choices=("serve", "drive"))
    parser.add_argument("--port", type=int)
    parser.add_argument("--tls", metavar="PEM", help="accepted, but every command is then refused")
    arguments = parser.parse_args()
    # What the library has to say of a driver that leaves is of no interest, nor is its time.
    logging.disable(logging.CRITICAL)
    commands = Commands()
    if arguments.role == "drive":
        if arguments.port is None:
            parser.error("drive needs --port")
        await Driver(commands, arguments.port, arguments.tls is not None).run()
    else:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(serve)
            while await commands.next() is not None:
                pass
            os._exit(0)


if __name__ == "__main__":
    trio.run(main)
