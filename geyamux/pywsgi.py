"""gevent's ``WSGIServer``, for the streams of sessions instead of connections.

All of HTTP is gevent's. An agent behind NAT that has dialled out serves its application to whoever holds the other end;
or a port serves HTTP to those who speak Yamux to it. A stream is what a connection is otherwise, with keep-alive.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import Any

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
        self._use(listener, config, announce, ssl_args)
        super().__init__(listener, application, backlog, spawn, log, error_log, handler_class, environ, **ssl_args)

    def update_environ(self) -> None:
        """gevent's looks up the name of the address, which may wait for a name server, and means little for a stream."""
        if isinstance(self.address, tuple):
            self.environ.setdefault("SERVER_NAME", str(self.address[0]))
            self.environ.setdefault("SERVER_PORT", str(self.address[1]))
        super().update_environ()

    def handle(self, sock: Any, address: Any) -> None:
        """Handle the requests of one stream."""
        handler = _telling(self.handler_class)(sock, address, self)  # type: ignore[arg-type]  # classes can be hashed
        rfile = handler.rfile
        try:
            handler.handle()
        finally:
            # Somebody may have kept the environ (a traceback, a websocket object), and with it this file. gevent cuts
            # the connection all the same; a stream goes on as long as one of its files is open.
            with contextlib.suppress(OSError):
                rfile.close()


@functools.cache
def _telling(handler_class: type[Any]) -> type[Any]:
    """The class of handlers, with our part of the environ, and a reset where gevent's would end half an answer well."""

    class Handler(handler_class):  # type: ignore[misc]
        def get_environ(self) -> Any:
            environ = super().get_environ()
            environ["geyamux.stream"] = self.socket
            environ["geyamux.session"] = self.socket.session
            return environ

        def handle_error(self, *error: Any) -> None:
            has_begun = bool(self.response_length)
            super().handle_error(*error)
            if has_begun:
                # Of an answer without length or chunks, its end would make it look whole.
                self.socket.reset()

    Handler.__name__ = Handler.__qualname__ = handler_class.__name__
    return Handler
