"""A program that puts py-libp2p's Yamux behind the commands that README.md lists.

It runs on trio, in a Python that has libp2p and not geyamux.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import trio
from libp2p.abc import ISecureConn
from libp2p.connection_types import ConnectionType
from libp2p.io.trio import TrioTCPStream
from libp2p.network.connection.exceptions import RawConnError
from libp2p.network.connection.raw_connection import RawConnection
from libp2p.peer.id import ID
from libp2p.stream_muxer.exceptions import (
    MuxedConnUnavailable,
    MuxedStreamEOF,
    MuxedStreamError,
    MuxedStreamReset,
)
from libp2p.stream_muxer.yamux.yamux import Yamux, YamuxStream

PATTERN_PERIOD = 65521
CHUNK = 65536


def pattern_block() -> bytes:
    block = bytearray()
    x = 1
    for _ in range(PATTERN_PERIOD):
        x = (x * 1664525 + 1013904223) & 0xFFFFFFFF
        block.append(x >> 24)
    return bytes(block)


PATTERN = pattern_block()


def pattern_piece(offset: int, size: int) -> bytes:
    start = offset % PATTERN_PERIOD
    repeats = (start + size) // PATTERN_PERIOD + 1
    return (PATTERN * repeats)[start : start + size]


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


class Tally:
    """What this side saw of one stream."""

    def __init__(self, verb: str = "") -> None:
        self.verb = verb
        self.sent = 0
        self.received = 0
        self.digest = hashlib.sha256()
        self.end = "eof"

    def take(self, data: bytes) -> None:
        self.received += len(data)
        self.digest.update(data)

    def outcome(self, *, read: bool = True) -> dict[str, Any]:
        return {
            "verb": self.verb,
            "sent": self.sent,
            "received": self.received,
            "sha256": self.digest.hexdigest() if read else "",
            "end": self.end,
        }


async def pieces(stream: YamuxStream) -> AsyncIterator[bytes]:
    """Yield what arrives until FIN; raise MuxedStreamReset on RST."""
    while True:
        try:
            data = await stream.read(CHUNK)
        except MuxedStreamEOF:
            # A reader that waits sees end of file on RST too; only this attribute tells them apart.
            if stream.reset_received:
                raise MuxedStreamReset from None
            return
        yield data


async def write_pattern(stream: YamuxStream, tally: Tally, size: int, seed: int, chunk: int = CHUNK) -> None:
    for position in range(0, size, chunk):
        piece = pattern_piece(seed + position, min(chunk, size - position))
        await stream.write(piece)
        tally.sent += len(piece)


def request_line(job: dict[str, Any]) -> bytes:
    verb, size = job["verb"], "*" if job["half"] else str(job["size"])
    if verb in ("echo", "digest"):
        return f"{verb} {size}\n".encode()
    if verb == "source":
        return f"source {job['size']} {job['seed']}\n".encode()
    if verb == "reset":
        return f"reset {job['size']}\n".encode()
    return b"abandon\n" if verb == "abandon" else b"drain\n"


async def run(connection: Yamux, job: dict[str, Any]) -> dict[str, Any]:
    """Open a stream and do one job on it."""
    tally = Tally(job["verb"])
    alone = tally.verb in ("push", "abandon", "desert", "hold")
    payload = 0 if tally.verb == "source" else job["size"]
    stream: YamuxStream | None = None

    async def write() -> None:
        assert stream is not None
        # A write that fails belongs to a stream that was reset; the reader says so.
        with contextlib.suppress(MuxedStreamError):
            await stream.write(request_line(job))
            if tally.verb == "abandon":
                await stream.read(1)
            await write_pattern(stream, tally, payload, job["seed"], job["chunk"])
            if job["half"]:
                await stream.close()

    try:
        stream = await connection.open_stream()
        if alone:
            await write()
            tally.end = "done"
            if tally.verb == "push":
                await stream.close()
            elif tally.verb in ("abandon", "desert"):
                await stream.reset()
            return tally.outcome(read=False)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(write)
            await read_to_end(stream, tally)
        await stream.close()
    except (MuxedStreamError, RawConnError) as error:
        tally.end = f"error: {error!r}"
    return tally.outcome()


async def read_to_end(stream: YamuxStream, tally: Tally) -> None:
    try:
        async for data in pieces(stream):
            tally.take(data)
    except MuxedStreamReset:
        tally.end = "reset"
    except (MuxedStreamError, RawConnError) as error:
        tally.end = f"error: {error!r}"


async def serve(stream: YamuxStream) -> dict[str, Any]:
    """Do what the first line of a stream asks for."""
    tally = Tally()
    incoming = pieces(stream)
    try:
        rest = b""
        while b"\n" not in rest:
            rest += await anext(incoming, b"\n")
        line, _, rest = rest.partition(b"\n")
        words = line.decode().split()
        tally.verb = words[0] if words else ""
        if tally.verb == "abandon":
            await stream.write(b"+")
        left = sys.maxsize if words[1:2] in ([], ["*"]) else int(words[1])
        while tally.verb != "source" and left > 0:
            data = rest or await anext(incoming, b"")
            if not data:
                break
            # A peer of ours sends nothing behind a sized payload.
            rest, left = b"", left - len(data)
            tally.take(data)
            if tally.verb == "echo":
                await stream.write(data)
                tally.sent += len(data)
        if tally.verb == "digest":
            answer = f"{tally.received} {tally.digest.hexdigest()}\n".encode()
            await stream.write(answer)
            tally.sent = len(answer)
        elif tally.verb == "source":
            await write_pattern(stream, tally, left, int(words[2]))
        elif tally.verb == "reset":
            await stream.reset()
            return tally.outcome()
        await stream.close()
    except MuxedStreamReset:
        tally.end = "reset"
    except (MuxedStreamError, RawConnError) as error:
        tally.end = f"error: {error!r}"
    return tally.outcome()


class Program:
    """One connection, its served streams, and the commands on standard input."""

    def __init__(self, connection: Yamux) -> None:
        self.connection = connection
        self.served: list[dict[str, Any]] = []
        self.served_more = trio.Event()
        # Streams of "hold" jobs and of failed ones are kept by the connection itself.
        self.commands: dict[str, Callable[[dict[str, Any]], Awaitable[dict[str, Any]]]] = {
            "run": self.run_all,
            "served": self.take_served,
            "ping": self.ping,
            "streams": self.streams,
            "close": self.close,
            "ended": self.ended,
        }

    async def accept_all(self) -> None:
        async with trio.open_nursery() as nursery:
            with contextlib.suppress(MuxedConnUnavailable):
                while True:
                    nursery.start_soon(self.serve_one, await self.connection.accept_stream())

    async def serve_one(self, stream: YamuxStream) -> None:
        self.served.append(await serve(stream))
        self.served_more.set()
        self.served_more = trio.Event()

    async def obey(self, command: dict[str, Any]) -> None:
        try:
            answer = await self.commands[command["do"]](command)
        except Exception as error:
            answer = {"error": repr(error)}
        reply({"id": command["id"], **answer})

    async def run_all(self, command: dict[str, Any]) -> dict[str, Any]:
        outcomes: list[dict[str, Any]] = [{}] * len(command["jobs"])
        limit = trio.CapacityLimiter(command["at_once"])

        async def run_one(number: int, job: dict[str, Any]) -> None:
            async with limit:
                outcomes[number] = await run(self.connection, job)

        async with trio.open_nursery() as nursery:
            for number, job in enumerate(command["jobs"]):
                nursery.start_soon(run_one, number, job)
        return {"outcomes": outcomes}

    async def take_served(self, command: dict[str, Any]) -> dict[str, Any]:
        while len(self.served) < command["count"]:
            await self.served_more.wait()
        taken, self.served = self.served, []
        return {"outcomes": taken}

    async def ping(self, _command: dict[str, Any]) -> dict[str, Any]:
        # There is no call for it: the connection pings by itself after half a second, then every 30, and
        # tells the mean (a wrong one where the pong was faster than its note of the time).
        while not self.connection.rtt():
            await trio.sleep(0.01)
        return {"rtts": [self.connection.rtt()]}

    async def streams(self, _command: dict[str, Any]) -> dict[str, Any]:
        return {"count": len(self.connection.streams)}

    async def close(self, _command: dict[str, Any]) -> dict[str, Any]:
        await self.connection.close()
        return {}

    async def ended(self, _command: dict[str, Any]) -> dict[str, Any]:
        await self.connection.event_closed.wait()
        return {}


def reply(message: dict[str, Any]) -> None:
    print(json.dumps(message), flush=True)


async def connect(arguments: argparse.Namespace) -> trio.SocketStream:
    if arguments.dial:
        host, _, port = arguments.dial.rpartition(":")
        return await trio.open_tcp_stream(host, int(port))
    (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
    async with listener:
        reply({"event": "listening", "port": listener.socket.getsockname()[1]})
        return await listener.accept()


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    role = parser.add_mutually_exclusive_group(required=True)
    role.add_argument("-listen", action="store_true")
    role.add_argument("-dial", metavar="HOST:PORT")
    arguments = parser.parse_args()

    is_client = arguments.dial is not None
    raw = TrioTCPStream(await connect(arguments))
    secured = PlainConnection(raw, is_client, connection_type=ConnectionType.DIRECT)
    connection = Yamux(secured, ID(b"peer"), is_initiator=is_client)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(connection.start)
        await connection.event_started.wait()
        program = Program(connection)
        nursery.start_soon(program.accept_all)
        reply({"event": "connected"})
        async for line in trio.wrap_file(sys.stdin):
            nursery.start_soon(program.obey, json.loads(line))
        nursery.cancel_scope.cancel()


if __name__ == "__main__":
    trio.run(main)
