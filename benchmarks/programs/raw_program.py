"""Raw gevent sockets, the baseline: a connection for each stream, served by gevent's own server.

The line of settings goes out with the first bytes of the connection, in one write, and is not parsed where nobody asks
for it.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from benchmarks.programs.common_program import DEFAULTS, ECHO_PIECE, SOURCE, Command, main, serve_stream, settings_line

_held: list[Any] = []


class RawLink:
    """Makes a connection for each stream."""

    def __init__(self, connect: Callable[[], Any], has_tls: bool, command: Command) -> None:
        self.connect = connect
        # A TLS connection of Python ends as a whole.
        self.has_half_close = not has_tls
        self.settings = settings_line(command)

    def open(self, first: bytes) -> Any:
        conn = self.connect()
        conn.sendall(self.settings + first)
        return conn

    def close(self) -> None:
        """There is nothing but its connections."""


def handle(conn: Any) -> None:
    data = conn.recv(ECHO_PIECE)
    line, _, rest = data.partition(b"\n")
    while not rest:
        piece = conn.recv(ECHO_PIECE)
        if not piece:
            conn.close()
            return
        data += piece
        line, _, rest = data.partition(b"\n")
    write = json.loads(line)["write"] if rest[:1] == SOURCE else DEFAULTS["write"]
    serve_stream(conn, rest, write, _held)


if __name__ == "__main__":
    main(handle, RawLink)
