"""The process under attack: `geyamux.Server` with default settings over TCP, and a typical application on it.

One greenlet serves each stream; the first byte that arrives on it says what it does (`ROLES`). A second port has an
application that never accepts. Run as ``python -m attacks.server``; it prints its two ports as JSON, and answers each
line on its standard input with a line of JSON that counts what it holds.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import json
import logging
import os
import sys
from collections.abc import Callable
from typing import Any
from weakref import WeakSet

import gevent
from gevent import socket
from gevent.event import Event as OneEvent
from gevent.fileobject import FileObject
from gevent.server import StreamServer

import geyamux

PIECE = 16384
#: What `send` sends, again and again: one object, however many send it.
BLOB = bytes(1 << 20)
EVENT = b"event: tick\n"

greenlets: WeakSet[gevent.Greenlet[..., Any]] = WeakSet()
sessions: set[geyamux.Server] = set()


class Log(logging.Handler):
    """Counts lines, and keeps apart how many say that a peer broke the protocol."""

    lines = 0
    protocol_errors = 0
    last_error = ""

    def emit(self, record: logging.LogRecord) -> None:
        self.lines += 1
        message = record.getMessage()
        if "protocol error" in message:
            self.protocol_errors += 1
            self.last_error = message


class Event:
    """Told to thousands a few at a time: gevent's own switches to all who wait in one go, 49 ms for 4,096."""

    def __init__(self) -> None:
        self._is_set = False
        self._parts: list[OneEvent] = []
        self._count = 0

    def wait(self, timeout: float | None = None) -> bool:
        if not self._is_set:
            if self._count % 64 == 0:
                self._parts.append(OneEvent())
            self._count += 1
            self._parts[-1].wait(timeout)
        return self._is_set

    def set(self) -> None:
        self._is_set = True
        for part in self._parts:
            part.set()
            gevent.sleep(0.001)


# --- what a stream does ---


def echo(stream: geyamux.Stream, ended: Event) -> None:
    while data := stream.recv(PIECE):
        stream.sendall(data)


def discard(stream: geyamux.Stream, ended: Event) -> None:
    while stream.recv(PIECE):
        pass


def hold(stream: geyamux.Stream, ended: Event) -> None:
    """Never read, never close: an application that is busy with something else."""
    ended.wait()


def send(stream: geyamux.Stream, ended: Event) -> None:
    while True:
        stream.sendall(BLOB)


def tick(stream: geyamux.Stream, ended: Event) -> None:
    """Small messages, as fast as they leave."""
    while True:
        stream.sendall(EVENT)


def flush(stream: geyamux.Stream, ended: Event) -> None:
    """The same for one who wants to know that they have left."""
    while True:
        stream.write(EVENT)
        stream.flush()


def read_lines(stream: geyamux.Stream, ended: Event) -> None:
    for _ in stream:
        pass


def read_bytes(stream: geyamux.Stream, ended: Event) -> None:
    """One at a time, as a careless parser does."""
    while stream.recv(1):
        pass


def read_line(stream: geyamux.Stream, ended: Event) -> None:
    """Take one line, then be busy with something else."""
    stream.readline()
    ended.wait()


def read_slowly(stream: geyamux.Stream, ended: Event) -> None:
    while stream.recv(1) and not ended.wait(1):
        pass


def close(stream: geyamux.Stream, ended: Event) -> None:
    """Done at once."""


ROLES: dict[bytes, Callable[[geyamux.Stream, Event], None]] = {
    b"e": echo,
    b"d": discard,
    b"h": hold,
    b"s": send,
    b"t": tick,
    b"f": flush,
    b"l": read_line,
    b"L": read_lines,
    b"1": read_bytes,
    b"r": read_slowly,
    b"c": close,
}


def handle(stream: geyamux.Stream, ended: Event) -> None:
    try:
        with stream:
            role = ROLES.get(stream.recv(1))
            if role is not None:
                role(stream, ended)
    except OSError:
        pass  # the peer reset it, or its session is over; both are ordinary here


# --- sessions ---


def serve(connection: Any, address: Any) -> None:
    run_session(connection, accept_all)


def serve_never(connection: Any, address: Any) -> None:
    run_session(connection, lambda session, ended: session.join())


def run_session(connection: Any, application: Callable[[geyamux.Server, Event], object]) -> None:
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    session = geyamux.Server(connection)
    sessions.add(session)
    ended = Event()
    with contextlib.suppress(OSError):  # so sessions under attack end
        application(session, ended)
    ended.set()
    session.join()
    sessions.discard(session)


def accept_all(session: geyamux.Server, ended: Event) -> None:
    for stream in session:
        gevent.spawn(handle, stream, ended)


# --- the report ---


def report(log: Log) -> dict[str, Any]:
    snapshots = [session.stats() for session in sessions]
    return {
        "sessions": len(sessions),
        "streams": sum(snapshot.streams for snapshot in snapshots),
        "unread": sum(snapshot.unread for snapshot in snapshots),
        "queued": sum(snapshot.queued for snapshot in snapshots),
        "greenlets": sum(not greenlet.dead for greenlet in list(greenlets)),
        "descriptors": len(os.listdir("/proc/self/fd")),
        "log_lines": log.lines,
        "protocol_errors": log.protocol_errors,
        "last_error": log.last_error,
    }


def collect() -> None:
    """Give back to the system what is free: what remains is held."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)


def main() -> None:
    # As a server should that meets hostile peers: full runs of the garbage collector leave out what was imported.
    gc.collect()
    gc.freeze()
    log = Log(logging.INFO)
    logging.getLogger("geyamux").setLevel(logging.INFO)
    logging.getLogger("geyamux").addHandler(log)
    gevent.Greenlet.add_spawn_callback(greenlets.add)
    servers = [StreamServer(("127.0.0.1", 0), serving) for serving in (serve, serve_never)]
    for server in servers:
        # gevent takes up to 100 connections in one go: 10 ms of work before anybody else has a turn.
        server.max_accept = 8
        server.start()
    print(json.dumps([server.server_port for server in servers]), flush=True)
    for line in FileObject(sys.stdin.fileno(), "rb", close=False):
        if line.strip() == b"collect":
            collect()
        print(json.dumps(report(log)), flush=True)


if __name__ == "__main__":
    main()
