"""WebSocket servers over the streams of a session, for the tests: one that echoes, and who is connected to it.

gevent-websocket needs two lines of help, `OwnAddress`. Nothing here is monkey-patched.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Iterator
from typing import Any

from geventwebsocket.exceptions import WebSocketError
from geventwebsocket.handler import WebSocketHandler

from geyamux.pywsgi import WSGIServer
from support.links import sessions

PATIENCE = 10.0


class OwnAddress(WebSocketHandler):  # type: ignore[misc]  # gevent-websocket has no types
    """gevent-websocket keeps its clients by their addresses, and all streams of a session come from one address."""

    def __init__(self, sock: Any, address: Any, server: Any) -> None:
        super().__init__(sock, (*address[:2], sock.stream_id), server)


class EchoServer:
    """Sends every message back. "close" makes it close instead, "ping" makes it send a ping first."""

    def __init__(self, session: Any) -> None:
        self.connected: list[Any] = []
        self.errors = io.StringIO()
        self.server = WSGIServer(session, self.application, handler_class=OwnAddress, log=None, error_log=self.errors)

    def application(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> list[bytes]:
        """One WebSocket from its beginning to its end."""
        websocket = environ["wsgi.websocket"]
        self.connected.append(websocket)
        try:
            with contextlib.suppress(WebSocketError):
                while (message := websocket.receive()) is not None:
                    if message == "close":
                        websocket.close()
                        break
                    if message == "ping":
                        websocket.send_frame("are you there?", websocket.OPCODE_PING)
                    websocket.send(message)
        finally:
            self.connected.remove(websocket)
        return []


@contextlib.contextmanager
def echo_server(*, dialled_out: bool = False) -> Iterator[tuple[Any, EchoServer]]:
    """A session whose peer serves WebSockets; the server is the one that dialled, or the one that was dialled."""
    with sessions("tcp") as (client, server):
        asking, serving = (server, client) if dialled_out else (client, server)
        echo = EchoServer(serving)
        echo.server.start()
        try:
            yield asking, echo
        finally:
            echo.server.stop(timeout=PATIENCE)
