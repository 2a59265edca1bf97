"""Ways to get a session: dial one, or make both ends at once."""

from __future__ import annotations

import socket as stdlib_socket
import ssl
from typing import Any

import gevent.socket
import gevent.ssl

from .config import Config
from .session import Client, Server
from .waiting import Deadline

__all__ = ["connect", "pair"]


def connect(
    address: tuple[str, int] | str,
    *,
    timeout: float | None = None,
    ssl_context: ssl.SSLContext | None = None,
    server_hostname: str | None = None,
    config: Config | None = None,
) -> Client:
    """Connect to ``(host, port)``, or to the Unix socket at a path, and return a Client over it.

    `timeout` seconds may be spent on connecting and the TLS handshake together; it says nothing about the session. With
    an `ssl_context` (of ``gevent.ssl``, or of ``ssl`` after monkey-patching) the connection is TLS; `server_hostname` is
    what the certificate must be for, the host left out.

    Blocks until connected. Raises what the socket and TLS raise: ``ConnectionRefusedError``, ``TimeoutError``,
    ``ssl.SSLError``, ``socket.gaierror``.
    """
    if ssl_context is not None:
        check_cooperative(ssl_context)
    deadline = Deadline.after(timeout)
    sock = _dial(address, timeout)
    try:
        if ssl_context is not None:
            if deadline is not None:
                sock.settimeout(max(deadline.left(), 0.001))
            host = address[0] if isinstance(address, tuple) else None
            sock = begin_tls(sock, ssl_context, server_hostname=server_hostname or host)
        return Client(sock, config)
    except BaseException:
        sock.close()
        raise


def _dial(address: tuple[str, int] | str, timeout: float | None) -> Any:
    if isinstance(address, str):
        sock = gevent.socket.socket(stdlib_socket.AF_UNIX, stdlib_socket.SOCK_STREAM)
        sock.settimeout(timeout)
        try:
            sock.connect(address)
        except BaseException:
            sock.close()
            raise
        return sock
    return gevent.socket.create_connection(address, timeout=timeout)


def begin_tls(sock: Any, context: ssl.SSLContext, **options: Any) -> Any:
    """A TLS socket over a connected one, before its handshake; `options` are those of ``wrap_socket``.

    The session does the handshake when it adopts the socket: an end by a kill then still closes it.
    """
    # Of a connection that was reset already, wrap_socket would leave an open socket behind.
    sock.getpeername()
    return context.wrap_socket(sock, do_handshake_on_connect=False, **options)


def check_cooperative(context: ssl.SSLContext) -> None:
    """Raise TypeError for a context whose sockets would block the whole process."""
    if not isinstance(context, gevent.ssl.SSLContext):
        raise TypeError(
            f"{context!r} makes TLS sockets that block the whole process: make it with gevent.ssl.SSLContext, or call "
            "gevent.monkey.patch_all() before anything imports ssl"
        )


def pair(config: Config | None = None) -> tuple[Client, Server]:
    """Two sessions over a socketpair, in one hub: for tests, and for talking to oneself."""
    left, right = gevent.socket.socketpair()
    return Client(left, config), Server(right, config)
