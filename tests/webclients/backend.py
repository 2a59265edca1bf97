"""A small web application behind a session, for clients to talk to, and what came to it."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from http.cookies import SimpleCookie
from typing import Any
from urllib.parse import unquote

import gevent
from gevent.event import Event

from geyamux import Client, Config, Server, Stream
from geyamux.pywsgi import WSGIServer
from support.links import sessions

LATE = 10.0
PIECE = bytes(range(256)) * 64
"""16 KiB."""

KINDS = ("socketpair", "tcp")
"""The links that the sessions are over."""


class Backend:
    """An application with one page for each thing to try. `session` is the end that a client opens streams on."""

    def __init__(self, session: Client | Server) -> None:
        self.session = session
        #: Method and path of each request that came.
        self.requests: list[str] = []
        #: The stream of each.
        self.streams: list[Stream] = []
        #: Requests in hand now, and the most that ever were.
        self.at_once = self.most_at_once = 0
        #: How many of them /together waits for.
        self.expected = 1
        self.all_are_here = Event()
        #: Bytes that /endless has got rid of, and whether it was ended.
        self.sent = 0
        self.was_ended = Event()
        #: How many requests /reset and /busy spoil before they answer.
        self.spoils = 0

    @property
    def opened(self) -> int:
        """Streams that the client has opened."""
        return self.session.stats().opened

    def __call__(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        path = environ["PATH_INFO"]
        self.requests.append(f"{environ['REQUEST_METHOD']} {path}")
        self.streams.append(environ["geyamux.stream"])
        self.at_once += 1
        self.most_at_once = max(self.at_once, self.most_at_once)
        try:
            page = getattr(self, "page_" + path.strip("/").replace("/", "_"), self.page_about)
            status, headers, body = page(environ)
        finally:
            self.at_once -= 1
        start_response(status, headers)
        return body  # type: ignore[no-any-return]

    def page_about(self, environ: dict[str, Any]) -> Any:
        """What the server was told."""
        names = ("REQUEST_METHOD", "PATH_INFO", "QUERY_STRING", "wsgi.url_scheme")
        about = {name: environ[name] for name in names}
        about |= {name: value for name, value in environ.items() if name.startswith("HTTP_")}
        about["body"] = environ["wsgi.input"].read().decode("latin-1")
        body = json.dumps(about).encode()
        return "200 OK", [("Content-Type", "application/json"), ("Content-Length", str(len(body)))], [body]

    def page_digest(self, environ: dict[str, Any]) -> Any:
        """Of the body, and how that came."""
        digest = hashlib.sha256()
        while piece := environ["wsgi.input"].read(10000):
            digest.update(piece)
        how = environ.get("HTTP_TRANSFER_ENCODING") or environ.get("CONTENT_LENGTH")
        return text(f"{how} {digest.hexdigest()}")

    def page_big(self, environ: dict[str, Any]) -> Any:
        """So many pieces, one by one."""
        return "200 OK", [], (PIECE for _ in range(int(environ["QUERY_STRING"])))

    def page_endless(self, environ: dict[str, Any]) -> Any:
        return "200 OK", [], self._endless()

    def _endless(self) -> Iterator[bytes]:
        try:
            while True:
                yield PIECE
                self.sent += len(PIECE)
        finally:
            self.was_ended.set()

    def page_never(self, environ: dict[str, Any]) -> Any:
        """No answer, until the client is gone."""
        while environ["geyamux.stream"].recv(1):
            pass
        return text("nobody hears this")

    def page_together(self, environ: dict[str, Any]) -> Any:
        """No answer before so many ask at once."""
        if self.at_once == self.expected:
            self.all_are_here.set()
        assert self.all_are_here.wait(LATE)
        return text("together")

    def page_turn(self, environ: dict[str, Any]) -> Any:
        """Others get their turn meanwhile."""
        gevent.sleep(0.005)
        return text("done")

    def page_reset(self, environ: dict[str, Any]) -> Any:
        """No answer: the stream is given up."""
        if self.spoils:
            self.spoils -= 1
            environ["geyamux.stream"].reset()
        return text("fine")

    def page_busy(self, environ: dict[str, Any]) -> Any:
        if not self.spoils:
            return text("fine")
        self.spoils -= 1
        return "503 Busy", [("Retry-After", "1"), ("Content-Length", "0")], []

    def page_torn(self, environ: dict[str, Any]) -> Any:
        """Half of the body, then a reset."""
        headers = [("Content-Length", str(2 * len(PIECE)))] if environ["QUERY_STRING"] == "length" else []
        return "200 OK", headers, self._torn(environ["geyamux.stream"])

    def _torn(self, stream: Stream) -> Iterator[bytes]:
        yield PIECE
        stream.flush()
        stream.session.ping()
        stream.reset()

    def page_early(self, environ: dict[str, Any]) -> Any:
        """An answer, and the end, before the body was read."""
        _, headers, body = text("too large")
        return "413 Too Large", [*headers, ("Connection", "close")], body

    def page_last(self, environ: dict[str, Any]) -> Any:
        status, headers, body = text("the last one")
        return status, [*headers, ("Connection", "close")], body

    def page_relative(self, environ: dict[str, Any]) -> Any:
        return "302 Found", [("Location", "landed?by=relative"), ("Content-Length", "0")], []

    def page_absolute(self, environ: dict[str, Any]) -> Any:
        location = f"{environ['wsgi.url_scheme']}://{environ['HTTP_HOST']}/landed?by=absolute"
        return "302 Found", [("Location", location), ("Content-Length", "0")], []

    def page_away(self, environ: dict[str, Any]) -> Any:
        return "302 Found", [("Location", unquote(environ["QUERY_STRING"])), ("Content-Length", "0")], []

    def page_bake(self, environ: dict[str, Any]) -> Any:
        cookie = SimpleCookie({"flavour": "vanilla"})
        return "200 OK", [("Set-Cookie", cookie["flavour"].OutputString()), ("Content-Length", "0")], []


def text(body: str) -> tuple[str, list[tuple[str, str]], list[bytes]]:
    data = body.encode()
    return "200 OK", [("Content-Type", "text/plain"), ("Content-Length", str(len(data)))], [data]


@contextlib.contextmanager
def serving(kind: str = "socketpair", client_config: Config | None = None, swap: bool = False) -> Iterator[Backend]:
    """The application behind one end of new sessions; with `swap` it is the client that serves."""
    with sessions(kind, client_config) as (client, server):
        near, far = (server, client) if swap else (client, server)
        backend = Backend(near)
        with WSGIServer(far, backend, log=None) as wsgi_server:
            wsgi_server.start()
            yield backend
            near.abort()
            wsgi_server.stop(0)


@contextlib.contextmanager
def ticking() -> Iterator[list[None]]:
    """A greenlet that adds to the list 100 times a second, if it gets its turn."""
    ticks: list[None] = []

    def tick() -> None:
        while True:
            gevent.sleep(0.01)
            ticks.append(None)

    greenlet = gevent.spawn(tick)
    try:
        yield ticks
    finally:
        greenlet.kill()
