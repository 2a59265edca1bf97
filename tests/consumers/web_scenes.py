"""Scenes of WebSocket servers and clients that are written with threads, and therefore want to be monkey-patched.

flask-sock and simple-websocket, Flask-SocketIO, and the client of websockets.sync; both ends are in this program. See
`real_scene` for how a scene is played.
"""

from __future__ import annotations

import contextlib
import http.client
import io
import json
from collections.abc import Callable, Iterator
from typing import Any

import flask
import flask_sock
import flask_socketio
import gevent
import gevent.event
import simple_websocket
import websocket
import websockets.exceptions
import websockets.sync.client

from consumers.real_bridge import bridged
from consumers.real_scene import Facts, main, wait_for_no_streams
from consumers.web_sockets import EchoServer, OwnAddress
from geyamux.pywsgi import WSGIServer

PATIENCE = 10.0
BIG = bytes(range(256)) * 1200
"""300 kB, more than a window."""


@contextlib.contextmanager
def served(
    session: Any, application: Callable[..., Any], patience: float = PATIENCE, **how: Any
) -> Iterator[io.StringIO]:
    """A WSGI application over the streams of `session`; what went wrong in the server comes with it."""
    errors = io.StringIO()
    server = WSGIServer(session, application, log=None, error_log=errors, **how)
    server.start()
    try:
        yield errors
    finally:
        server.stop(timeout=patience)


def dial(session: Any, path: str = "/") -> Any:
    """A connected WebSocket of websocket-client on a new stream."""
    return websocket.create_connection(f"ws://inside.example{path}", socket=session.open(), timeout=PATIENCE)


def talk(connection: Any, messages: list[Any]) -> bool:
    """Whether each message comes back as it went."""
    for message in messages:
        connection.send_binary(message) if isinstance(message, bytes) else connection.send(message)
        if connection.recv() != message:
            return False
    return True


class Site:
    """A Flask application with a page and with WebSockets, as its documentation shows it."""

    def __init__(self, **options: Any) -> None:
        self.ended: list[int] = []
        self.late: list[Any] = []
        self.everybody = 0
        self.all_there = gevent.event.Event()
        self.flask = flask.Flask(__name__)
        self.flask.config["SOCK_SERVER_OPTIONS"] = options
        sock = flask_sock.Sock(self.flask)
        self.flask.get("/")(lambda: "a page\n")
        for handler in (self.echo, self.sizes, self.patience, self.farewell, self.meeting):
            sock.route(f"/{handler.__name__}")(handler)

    def echo(self, ws: simple_websocket.Server) -> None:
        """Send back what comes."""
        try:
            while True:
                ws.send(ws.receive())
        except simple_websocket.ConnectionClosed as closed:
            self.ended.append(int(closed.reason))
            raise

    def sizes(self, ws: simple_websocket.Server) -> None:
        """Send back what goes into a window, and then as much as came."""
        size = len(ws.receive() or b"")
        ws.send(BIG[:200_000])
        ws.sock = SendsAll(ws.sock)
        ws.send(BIG[:size])
        ws.receive()

    def patience(self, ws: simple_websocket.Server) -> None:
        """Wait for something that does not come in time."""
        self.late.append(ws.receive(timeout=0.01))
        ws.send("still here")
        ws.receive()

    def farewell(self, ws: simple_websocket.Server) -> None:
        """Close."""
        ws.close(4001, "that was all")

    def meeting(self, ws: simple_websocket.Server) -> None:
        """Wait until twenty are there."""
        self.everybody += 1
        if self.everybody == 20:
            self.all_there.set()
        self.all_there.wait(PATIENCE)
        ws.send(f"{ws.receive()} of {self.everybody}")


class SendsAll:
    """simple-websocket calls `send` and takes it for granted that all went: beyond the window, or the buffer of a socket,
    the rest would be lost.
    """

    def __init__(self, stream: Any) -> None:
        self.recv, self.send, self.close = stream.recv, stream.sendall, stream.close


def flask_sock_talks(session: Any, options: dict[str, Any]) -> Facts:
    """Messages, both closes, a timeout, many at once; and a page of the same application."""
    site = Site()
    with served(options["server"], site.flask) as errors:
        echo = dial(session, "/echo")
        came_back = talk(echo, ["grüß dich", b"", BIG[:1], BIG[:125], BIG[:126], BIG[:60000]])
        echo.close(status=3000)
        farewell = dial(session, "/farewell")
        opcode, reason = farewell.recv_data()
        patience = dial(session, "/patience")
        still_here = patience.recv()
        patience.close()

        def meet(number: int) -> str:
            with contextlib.closing(dial(session, "/meeting")) as connection:
                connection.send(str(number))
                return str(connection.recv())

        meeting = [gevent.spawn(meet, number) for number in range(20)]
        gevent.joinall(meeting, timeout=PATIENCE, raise_error=True)
        page = http.client.HTTPConnection("inside.example")
        page.sock = session.open()
        page.request("GET", "/")
        body = page.getresponse().read().decode()
        page.close()
        for connection in (echo, farewell, patience):
            connection.shutdown()
    # What the server has closed, this end hears of a little later.
    wait_for_no_streams(session)
    return {
        "came_back": came_back,
        "ended": site.ended,
        "farewell": [opcode, int.from_bytes(reason[:2], "big"), reason[2:].decode()],
        "late": [site.late, still_here],
        "meeting": [greenlet.value for greenlet in meeting],
        "page": body,
        "errors": errors.getvalue(),
        "streams": session.num_streams,
    }


def simple_websocket_is_big(session: Any, options: dict[str, Any]) -> Facts:
    """Messages larger than a frame, and larger than a window."""
    with served(options["server"], Site().flask):
        connection = dial(session, "/sizes")
        connection.send_binary(BIG)
        came_back = [connection.recv() == BIG[:200_000], connection.recv() == BIG]
        connection.close()
    return {"came_back": came_back}


class StreamSelector:
    """As much of a selector as simple-websocket uses to wait for one connection, for streams."""

    def __init__(self) -> None:
        self._streams: list[Any] = []

    def register(self, stream: Any, events: int, data: Any = None) -> None:
        """Watch it for input."""
        self._streams.append(stream)

    def select(self, timeout: float | None = None) -> list[Any]:
        """Those that can be read."""
        return list(gevent.wait(self._streams, timeout=timeout, count=1))

    def close(self) -> None:
        """Nothing is held."""


def simple_websocket_pings(session: Any, options: dict[str, Any]) -> Facts:
    """With a `ping_interval` it polls, which needs a descriptor or another selector."""
    site = Site(ping_interval=0.02, selector_class=StreamSelector)
    with served(options["server"], site.flask):
        connection = dial(session, "/echo")
        # Each is answered in passing.
        frames = [connection.recv_data_frame(control_frame=True)[0] for _ in range(3)]
        came_back = talk(connection, ["after the pings"])
        connection.close()
    return {"pings": frames.count(websocket.ABNF.OPCODE_PING), "came_back": came_back}


def simple_websocket_pings_without_a_selector(session: Any, options: dict[str, Any]) -> Facts:
    """The same with the selector of the standard library, which wants a descriptor: it gives up silently."""
    with served(options["server"], Site(ping_interval=0.02).flask, patience=0):
        connection = dial(session, "/echo")
        connection.settimeout(0.2)
        connection.send("is anybody there?")
        try:
            connection.recv()
        except (websocket.WebSocketTimeoutException, websocket.WebSocketConnectionClosedException):
            return {"heard": False}  # whether it ends depends on what its handler does
        finally:
            connection.shutdown()
    return {"heard": True}


def socketio_calls(session: Any, options: dict[str, Any]) -> Facts:
    """Flask-SocketIO: long polling and WebSocket, told as its protocol has it (a packet is a type and JSON)."""
    application = flask.Flask(__name__)
    server = flask_socketio.SocketIO(application, async_mode="gevent")
    server.on_event("double", lambda number: 2 * number)
    with served(options["server"], application, handler_class=OwnAddress) as errors:
        polling = http.client.HTTPConnection("inside.example")
        polling.sock = session.open()
        polling.request("GET", "/socket.io/?EIO=4&transport=polling")
        opened = json.loads(polling.getresponse().read()[1:])
        polling.close()

        answers = []
        connections = [dial(session, "/socket.io/?EIO=4&transport=websocket") for _ in range(3)]
        for number, connection in enumerate(connections):
            connection.recv()
            connection.send("40")
            connection.recv()
            connection.send(f'421["double",{number}]')
        for connection in connections:
            answers.append(connection.recv())
            connection.close()
    return {"upgrades": opened["upgrades"], "answers": answers, "errors": errors.getvalue()}


def websockets_sync_talks(session: Any, options: dict[str, Any]) -> Facts:
    """The client polls: it can't over a stream, over a socket that is joined to the stream it can."""
    echo = EchoServer(options["server"])
    echo.server.start()
    uri = "ws://inside.example/"
    try:
        with websockets.sync.client.connect(uri, sock=session.open(), proxy=None, open_timeout=PATIENCE):
            alone = "connected"
    except websockets.exceptions.ConnectionClosed as closed:
        alone = type(closed).__name__
    with (
        session.open() as stream,
        bridged(stream) as sock,
        websockets.sync.client.connect(uri, sock=sock, proxy=None, compression=None, max_size=None) as connection,
    ):
        came_back = []
        for message in ("grüß dich", b"", BIG):
            connection.send(message)
            came_back.append(connection.recv(PATIENCE) == message)
        connection.send("close")
        try:
            connection.recv(PATIENCE)
        except websockets.exceptions.ConnectionClosed as closed:
            ended = type(closed).__name__
    echo.server.stop(timeout=PATIENCE)
    return {"alone": alone, "came_back": came_back, "ended": ended, "errors": echo.errors.getvalue()}


if __name__ == "__main__":
    main(
        {
            scene.__name__: scene
            for scene in (
                flask_sock_talks,
                simple_websocket_is_big,
                simple_websocket_pings,
                simple_websocket_pings_without_a_selector,
                socketio_calls,
                websockets_sync_talks,
            )
        }
    )
