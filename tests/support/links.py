"""Connections of every kind that may carry a session, and sessions over them."""

from __future__ import annotations

import contextlib
import functools
import os
import ssl
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

import gevent
import trustme
from gevent import socket as gsocket
from gevent.fileobject import FileObjectPosix
from gevent.ssl import SSLContext

import geyamux
from geyamux import Client, Config, Server

from .transports import memory_pair

PATIENCE = 10.0


class Link:
    """Two connected transports, `a, b = link`, and what has to be closed with them."""

    # Any: the ends are of as many types as there are kinds.
    def __init__(self, a: Any, b: Any, cleanup: Callable[[], None] | None = None) -> None:
        self.a = a
        self.b = b
        self._cleanup = cleanup

    def __iter__(self) -> Iterator[Any]:
        return iter((self.a, self.b))

    def close(self) -> None:
        for end in (self.a, self.b):
            for part in end if isinstance(end, tuple) else (end,):
                with contextlib.suppress(OSError):
                    part.close()
        if self._cleanup is not None:
            self._cleanup()

    def __enter__(self) -> Link:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def make_link(kind: str) -> Link:
    """A new link of one of `KINDS`; the caller closes it."""
    return _MAKERS[kind]()


@contextlib.contextmanager
def sessions(
    kind: str = "socketpair",
    client_config: Config | None = None,
    server_config: Config | None = None,
    swap: bool = False,
) -> Iterator[tuple[Client, Server]]:
    """A client and a server over a new link; `swap` exchanges their ends of it. Aborted at the end."""
    with make_link(kind) as link:
        a, b = reversed(tuple(link)) if swap else link
        client = Client(a, client_config)
        server = Server(b, server_config)
        try:
            yield client, server
        finally:
            client.abort()
            server.abort()
            client.join(PATIENCE)
            server.join(PATIENCE)


@contextlib.contextmanager
def stream_pair(kind: str = "socketpair", swap: bool = False) -> Iterator[tuple[Any, Any]]:
    """An opened and an accepted stream, connected; `swap` lets the server open."""
    with sessions(kind) as (client, server):
        opener, acceptor = (server, client) if swap else (client, server)
        opened = opener.open()
        accepted = acceptor.accept(timeout=PATIENCE)
        yield opened, accepted


# --- one maker for each kind ---


def _memory() -> Link:
    return Link(*memory_pair())


def _socketpair() -> Link:
    return Link(*gsocket.socketpair())


def _connected(listener: Any, address: Any) -> Link:
    near = gsocket.socket(listener.family, gsocket.SOCK_STREAM)
    try:
        near.connect(address)
        far, _ = listener.accept()
    finally:
        listener.close()
    if listener.family == gsocket.AF_INET:
        for end in (near, far):
            end.setsockopt(gsocket.IPPROTO_TCP, gsocket.TCP_NODELAY, 1)
    return Link(near, far)


def _tcp() -> Link:
    listener = gsocket.socket()
    listener.bind(("127.0.0.1", 0))
    listener.listen(1)
    return _connected(listener, listener.getsockname())


def _unix() -> Link:
    with tempfile.TemporaryDirectory() as directory:
        listener = gsocket.socket(gsocket.AF_UNIX, gsocket.SOCK_STREAM)
        listener.bind(os.path.join(directory, "yamux"))
        listener.listen(1)
        return _connected(listener, listener.getsockname())


def free_port() -> int:
    """A port on which nobody listens, for a program that must be told one."""
    with gsocket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@functools.lru_cache(maxsize=1)
def authority() -> trustme.CA:
    """The certificate authority of this test run."""
    return trustme.CA()


@functools.lru_cache(maxsize=2)
def tls_contexts(version: ssl.TLSVersion) -> tuple[SSLContext, SSLContext]:
    """A client's and a server's context, of that TLS version alone."""
    near = SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    far = SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority().configure_trust(near)
    authority().issue_cert("localhost").configure_cert(far)
    for context in (near, far):
        context.minimum_version = version
        context.maximum_version = version
    return near, far


def _tls(version: ssl.TLSVersion) -> Link:
    near_context, far_context = tls_contexts(version)
    near, far = _tcp()
    # Both ends must move for a handshake.
    accepting = gevent.spawn(far_context.wrap_socket, far, server_side=True)
    near = near_context.wrap_socket(near, server_hostname="localhost")
    return Link(near, accepting.get(timeout=PATIENCE))


def _stream() -> Link:
    client, server = geyamux.pair()

    def cleanup() -> None:
        client.abort()
        server.abort()
        client.join(PATIENCE)
        server.join(PATIENCE)

    near = client.open()
    return Link(near, server.accept(timeout=PATIENCE), cleanup)


def _files() -> Link:
    ends = []
    for reading, writing in (os.pipe(), os.pipe()):
        ends.append(FileObjectPosix(reading, "rb", buffering=0))
        ends.append(FileObjectPosix(writing, "wb", buffering=0))
    near_in, far_out, far_in, near_out = ends
    return Link((near_in, near_out), (far_in, far_out))


_MAKERS: dict[str, Callable[[], Link]] = {
    "memory": _memory,
    "socketpair": _socketpair,
    "tcp": _tcp,
    "unix": _unix,
    "tls12": functools.partial(_tls, ssl.TLSVersion.TLSv1_2),
    "tls13": functools.partial(_tls, ssl.TLSVersion.TLSv1_3),
    "stream": _stream,
    "files": _files,
}

KINDS = tuple(_MAKERS)
"""Every kind of link there is."""
