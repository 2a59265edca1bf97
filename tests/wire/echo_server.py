"""A geyamux server with default settings that echoes each stream: what test_wire.py checks. Prints its port.

The only file here that knows geyamux; the suite itself shares nothing with it.
"""

from __future__ import annotations

import contextlib
import logging

import gevent
from gevent.server import StreamServer

import geyamux


def echo(stream: geyamux.Stream) -> None:
    """Send back what comes, and end behind the peer's end."""
    with contextlib.suppress(OSError), stream:
        while data := stream.recv(65536):
            stream.sendall(data)


def serve(connection: gevent.socket.socket, address: object) -> None:
    with contextlib.suppress(OSError):
        for stream in geyamux.Server(connection):
            gevent.spawn(echo, stream)


def main() -> None:
    # What a hostile client makes it log is not what is looked at.
    logging.getLogger("geyamux").setLevel(logging.CRITICAL)
    server = StreamServer(("127.0.0.1", 0), serve)
    server.start()
    print(server.server_port, flush=True)
    server.serve_forever()


if __name__ == "__main__":
    main()
