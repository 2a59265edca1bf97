"""gevent's ``WSGIServer``, for the streams of sessions instead of connections.

All of HTTP is gevent's. An agent behind NAT that has dialled out serves its application to whoever holds the other end;
or a port serves HTTP to those who speak Yamux to it. A stream is what a connection is otherwise, with keep-alive.
"""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Callable
from typing import Any

import gevent
import gevent.pywsgi

from .config import Config
from .server import SessionServer

__all__ = ["WSGIServer"]


class WSGIServer(SessionServer, gevent.pywsgi.WSGIServer):
    """``gevent.pywsgi.WSGIServer`` for the streams of sessions.

    `listener`, `config`, `announce`, `spawn`, ``serve_forever`` and ``stop`` are those of
    :class:`geyamux.server.StreamServer`; the rest is gevent's: `log` and `error_log`, `handler_class`, `environ`.

    The environ of a request has its ``geyamux.stream`` and ``geyamux.session`` besides. ``REMOTE_ADDR`` and the access
    log have the address of the connection's peer: through a relay, that is the relay. ``wsgi.url_scheme`` is "https" if
    the connection below is TLS. ``SERVER_NAME`` is the address as it is; no name is looked up. A response that has begun
    when the application fails, or is killed, ends in a reset: nobody takes half of it for the whole.
    """

    def __init__(
        self,
        listener: Any,
        application: Callable[..., Any] | None = None,
        backlog: int | None = None,
        spawn: Any = "default",
        log: Any = "default",
        error_log: Any = "default",
        handler_class: type[Any] | None = None,
        environ: dict[str, Any] | None = None,
        *,
        config: Config | None = None,
        announce: bool = True,
        **ssl_args: Any,
    ) -> None:
        listener = self._use(listener, config, announce, ssl_args)
        #: The streams that are handled, by greenlet.
        self._handled: dict[Any, Any] = {}
        #: Those of them that wait for another request.
        self._kept: set[Any] = set()
        super().__init__(listener, application, backlog, spawn, log, error_log, handler_class, environ, **ssl_args)

    def update_environ(self) -> None:
        """gevent's looks up the name of the address, which may wait for a name server, and means little for a stream."""
        if isinstance(self.address, tuple):
            self.environ.setdefault("SERVER_NAME", str(self.address[0]))
            self.environ.setdefault("SERVER_PORT", str(self.address[1]))
        super().update_environ()

    def close(self) -> None:
        """Take nothing new. Streams that are kept for further requests end; requests that have begun go on."""
        super().close()
        for stream in list(self._kept):
            if not stream.stats().unread:
                stream.shutdown(socket.SHUT_RD)

    def get_environ(self) -> Any:
        """Return a new environ for a request; called in the greenlet that handles its stream."""
        environ = super().get_environ()
        stream = self._handled.get(gevent.getcurrent())
        if stream is not None:
            environ["geyamux.stream"] = stream
            environ["geyamux.session"] = stream.session
        return environ

    def handle(self, sock: Any, address: Any) -> None:
        """Handle the requests of one stream."""
        handler: Any = self.handler_class(sock, address, self)
        is_known = isinstance(handler, gevent.pywsgi.WSGIHandler)
        if is_known:
            self._fit(handler, sock)
        rfile = getattr(handler, "rfile", None)
        current = gevent.getcurrent()
        self._handled[current] = sock
        try:
            handler.handle()
        finally:
            del self._handled[current]
            if is_known:
                # They refer to the handler, and it to them.
                del handler.handle_error, handler.read_requestline
            # Somebody may have kept the environ (a traceback, a websocket object), and with it this file. gevent cuts
            # the connection all the same; a stream goes on as long as one of its files is open.
            if rfile is not None:
                with contextlib.suppress(OSError):
                    rfile.close()

    def _fit(self, handler: Any, stream: Any) -> None:
        """Change what a handler of gevent does, whatever made it: when an answer is torn, and between two requests."""
        handle_error, read_requestline = handler.handle_error, handler.read_requestline
        is_first = True

        def report(*error: Any) -> None:
            has_begun = bool(handler.response_length)
            handle_error(*error)
            if has_begun:
                # Of an answer without length or chunks, its end would make it look whole.
                stream.reset()

        def read_next() -> Any:
            nonlocal is_first
            if is_first:
                is_first = False
                return read_requestline()
            if not self.started:
                return ""
            self._kept.add(stream)
            try:
                return read_requestline()
            finally:
                self._kept.discard(stream)

        handler.handle_error, handler.read_requestline = report, read_next
