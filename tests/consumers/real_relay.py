"""A relay in front of real servers, as a program: every stream of its sessions is joined to a connection of its own.

    python real_relay.py TRUNK=TARGET ...

TRUNK says where sessions come in: ``tcp`` (a free port of loopback), ``unix:PATH``, or ``tls:FILE`` (a free port; the
certificate and its key are in FILE). TARGET is what a stream is joined to: ``unix:PATH`` or ``tcp:PORT``. Prints the
addresses of all trunks as one line of JSON, in the form in which `real_scene.dial` takes them. Ends when its standard
input does. At SIGUSR1 every stream that is open is reset, as a relay does that loses its servers.

A half-close goes on as a half-close, and what breaks on one side is broken on the other: never is a torn connection
taken for one that ended.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import ssl
import sys
from typing import Any

import gevent
import gevent.ssl
from gevent import socket
from gevent.server import StreamServer

import geyamux

RELAY_BACKLOG = 512
"""Streams that may come at once: the servers behind are quick to take them, this process shares its core."""


class Relay:
    """What one trunk accepts, joined to one target."""

    def __init__(self, target: str) -> None:
        self._kind, _, self._where = target.partition(":")
        self._open: set[Any] = set()

    def serve(self, conn: Any, _: Any) -> None:
        """Serve one session to its end."""
        with contextlib.suppress(geyamux.SessionError):
            for stream in geyamux.Server(conn, geyamux.Config(accept_backlog=RELAY_BACKLOG)):
                gevent.spawn(self._join, stream)

    def reset_all(self) -> None:
        """Reset every stream that is joined now."""
        for stream in self._open:
            stream.reset()

    def _join(self, stream: Any) -> None:
        try:
            conn = self._connect()
        except OSError:
            stream.reset()
            return
        self._open.add(stream)

        def give_up() -> None:
            stream.reset()
            conn.close()

        try:
            there = gevent.spawn(copy, stream, conn, give_up)
            copy(conn, stream, give_up)
            there.join()
        finally:
            self._open.discard(stream)
            stream.close()
            conn.close()

    def _connect(self) -> Any:
        if self._kind == "tcp":
            return socket.create_connection(("127.0.0.1", int(self._where)))
        conn = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        conn.connect(self._where)
        return conn


def copy(source: Any, sink: Any, give_up: Any) -> None:
    """Copy to the end, and pass the end on; when one of them breaks, so does the other."""
    try:
        while data := source.recv(65536):
            sink.sendall(data)
        sink.shutdown(socket.SHUT_WR)
    except OSError:
        give_up()


def listen(trunk: str, relay: Relay) -> str:
    """Take sessions on a trunk from now on; return its address."""
    kind, _, where = trunk.partition(":")
    if kind == "unix":
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        listener.bind(where)
        listener.listen()
        StreamServer(listener, relay.serve).start()
        return trunk
    if kind == "tls":
        context = gevent.ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(where)
        server = StreamServer(("127.0.0.1", 0), relay.serve, ssl_context=context)
    else:
        server = StreamServer(("127.0.0.1", 0), relay.serve)
    server.start()
    return f"{kind}:{server.server_port}"


def main() -> None:
    """Run until the standard input ends."""
    relays, addresses = [], []
    for route in sys.argv[1:]:
        trunk, _, target = route.partition("=")
        relays.append(Relay(target))
        addresses.append(listen(trunk, relays[-1]))

    def reset_all() -> None:
        for relay in relays:
            relay.reset_all()

    gevent.signal_handler(signal.SIGUSR1, reset_all)
    print(json.dumps(addresses), flush=True)
    gevent.get_hub().threadpool.apply(os.read, (0, 1))


if __name__ == "__main__":
    main()
