"""A session that faces a peer played by hand, and calls that wait while the test goes on."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import gevent
from gevent import socket as gsocket

from geyamux import Client, Config, Server

from .links import Link, make_link
from .rawpeer import RawPeer, settle

ROLES = ("client", "server")
PATIENCE = 5.0
#: Ids that the session uses itself, and that its peer uses, by the session's role.
OWN = {"client": (1, 3, 5, 7, 9), "server": (2, 4, 6, 8, 10)}
PEERS = {"client": (2, 4, 6, 8, 10), "server": (1, 3, 5, 7, 9)}


def session_over(conn: Any, role: str = "client", config: Config | None = None, **more: Any) -> Client | Server:
    return Client(conn, config, **more) if role == "client" else Server(conn, config, **more)


@contextlib.contextmanager
def facing(
    role: str = "client",
    config: Config | None = None,
    *,
    kind: str = "socketpair",
    ends: tuple[Any, Any] | None = None,
    wrap: Callable[[Any], Any] = lambda end: end,
    patience: float = PATIENCE,
) -> Iterator[tuple[Client | Server, RawPeer]]:
    """A session of that role, and the peer at the other end of a new link, or of `ends`. `wrap` may wrap its own end."""
    with Link(*ends) if ends is not None else make_link(kind) as link:
        session = session_over(wrap(link.a), role, config)
        try:
            yield session, RawPeer(link.b, patience)
        finally:
            session.abort()
            session.join(PATIENCE)


def start(function: Callable[..., Any], *args: Any, **kwargs: Any) -> gevent.Greenlet[..., Any]:
    """Begin the call and let it come to its wait. The greenlet returns what the call returned, or the error."""

    def call() -> Any:
        try:
            return function(*args, **kwargs)
        except Exception as error:
            return error

    greenlet = gevent.spawn(call)
    settle()
    return greenlet


def outcome(greenlet: gevent.Greenlet[..., Any]) -> Any:
    """What the call begun by `start` returned or raised, which must come soon."""
    return greenlet.get(timeout=PATIENCE)


def narrow_pair(size: int = 4096) -> tuple[gsocket.socket, gsocket.socket]:
    """A socketpair that takes little before it is full."""
    near, far = gsocket.socketpair()
    for end in (near, far):
        end.setsockopt(gsocket.SOL_SOCKET, gsocket.SO_SNDBUF, size)
        end.setsockopt(gsocket.SOL_SOCKET, gsocket.SO_RCVBUF, size)
    return near, far
