"""geyamux: one session for each command, a greenlet for each stream that the server accepts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import gevent

import geyamux
from benchmarks.programs.common_program import (
    ECHO_PIECE,
    Command,
    Conn,
    main,
    read_settings,
    serve_stream,
    settings_line,
)


class SessionLink:
    """Opens streams of one session."""

    has_half_close = True

    def __init__(self, connect: Callable[[], Any], _has_tls: bool, command: Command) -> None:
        conn = connect()
        conn.sendall(settings_line(command))
        self.session = geyamux.Client(conn, _config(command))

    def open(self, first: bytes) -> Conn:
        stream = self.session.open()
        stream.sendall(first)
        return stream

    def close(self) -> None:
        # A paced command leaves its source pouring; there is no good order to wait for.
        self.session.abort()
        self.session.join(5)


def handle(conn: Any) -> None:
    settings, rest = read_settings(conn)
    held: list[Conn] = []
    session = geyamux.Server(conn, _config(settings), initial=rest)

    def serve(stream: geyamux.Stream) -> None:
        try:
            data = stream.recv(ECHO_PIECE)
        except OSError:
            data = b""
        serve_stream(stream, data, settings["write"], held)

    try:
        for stream in session:
            gevent.spawn(serve, stream)
    except OSError:
        pass  # the driver aborts when it has measured
    finally:
        session.abort()


def _config(settings: dict[str, Any]) -> geyamux.Config:
    streams = settings.get("streams", 0)
    ours = geyamux.Config()
    return geyamux.Config(
        max_stream_window=settings.get("window", ours.max_stream_window),
        window_auto_tune=settings.get("auto_tune", False),
        max_frame_size=settings.get("max_frame"),
        accept_backlog=max(ours.accept_backlog, streams),
        # Streams of a warm-up may not have ended yet when the next begin.
        max_incoming_streams=max(4096, 2 * streams),
        keepalive_interval=None,
    )


if __name__ == "__main__":
    main(handle, SessionLink)
