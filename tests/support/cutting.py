"""Connections that take and give a random part of what they are offered, sometimes nothing, and judge what passes.

With a `Tap` at each end frames are cut everywhere, and the first one that an end must not send is kept as a fault.
"""

from __future__ import annotations

import contextlib
import random
import ssl
from collections.abc import Callable, Iterator
from typing import Any

import gevent
import gevent.ssl
from gevent import socket as gsocket

from geyamux import Client, Config, Server

from .links import PATIENCE, authority
from .transports import memory_pair
from .wire import Audit, WireError


class Tap:
    """Follows one end of a connection; what that end must not send is kept as a fault."""

    def __init__(self, *, client: bool, rng: random.Random) -> None:
        self.rng = rng
        self.audit = Audit(client=client)
        self.faults: list[WireError] = []
        self.cuts = 0

    def sent(self, chunk: bytes) -> None:
        self._judge(self.audit.sent, chunk)

    def received(self, chunk: bytes) -> None:
        self._judge(self.audit.received, chunk)

    def _judge(self, judge: Callable[[bytes], None], chunk: bytes) -> None:
        try:
            judge(chunk)
        except WireError as fault:
            self.faults.append(fault)
        self.audit.frames.clear()

    def cut(self, size: int) -> int:
        """How much of so many bytes passes this time; at least one does."""
        most = self.rng.choice((1, 13, 700, 5000, 70_000, 70_000))
        if most < size:
            self.cuts += 1
        return min(size, self.rng.randint(1, most))

    def is_stubborn(self) -> bool:
        return self.rng.random() < 0.1


class CutSocket(gsocket.socket):
    """A gevent socket that cuts."""

    tap: Tap

    def send(self, data: Any, flags: int = 0) -> int:
        if self.tap.is_stubborn():
            raise BlockingIOError
        with memoryview(data) as view, view[: self.tap.cut(len(view))] as part:
            sent = super().send(part)
            self.tap.sent(bytes(part[:sent]))
        return sent

    def sendmsg(self, buffers: Any, *rest: Any) -> int:
        return self.send(b"".join(buffers))

    def recv(self, size: int, flags: int = 0) -> bytes:
        data = super().recv(self.tap.cut(size))
        self.tap.received(data)
        return data


class CutTLSSocket(gevent.ssl.SSLSocket):
    """A gevent TLS socket that cuts; the tap sees what is inside the encryption."""

    tap: Tap
    #: OpenSSL wants a write that would have blocked repeated with no less: so much of it.
    owed: int | None = None

    def write(self, data: Any) -> int:
        if self.owed is None:
            self.owed = self.tap.cut(len(data))
        with memoryview(data) as view, view[: self.owed] as part:
            sent = super().write(part)
            self.owed = None
            self.tap.sent(bytes(part[:sent]))
        return sent

    def recv(self, size: int = 1024, flags: int = 0) -> bytes:
        is_encrypted = self.version() is not None
        data = super().recv(self.tap.cut(size))
        # After its end nothing is decrypted any more, only drained.
        if is_encrypted:
            self.tap.received(data)
        return data


class CutObject:
    """A cooperative object with no descriptor that cuts."""

    def __init__(self, inner: Any, tap: Tap) -> None:
        self.inner = inner
        self.tap = tap
        self.shutdown = inner.shutdown
        self.close = inner.close

    def send(self, data: Any) -> int:
        with memoryview(data) as view:
            part = bytes(view[: self.tap.cut(len(view))])
        sent: int = self.inner.send(part)
        self.tap.sent(part[:sent])
        return sent

    def recv(self, size: int) -> bytes:
        data: bytes = self.inner.recv(self.tap.cut(size))
        self.tap.received(data)
        return data


def _sockets() -> Iterator[Any]:
    for end in gsocket.socketpair():
        end.setsockopt(gsocket.SOL_SOCKET, gsocket.SO_SNDBUF, 4096)
        yield end


def _cut_sockets(taps: list[Tap]) -> list[Any]:
    ends = [CutSocket(end.family, end.type, fileno=end.detach()) for end in _sockets()]
    for end, tap in zip(ends, taps, strict=True):
        end.tap = tap
    return ends


def _cut_tls(taps: list[Tap]) -> list[Any]:
    near = gevent.ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    far = gevent.ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority().configure_trust(near)
    authority().issue_cert("localhost").configure_cert(far)
    near.sslsocket_class = far.sslsocket_class = CutTLSSocket
    left, right = _sockets()
    shaking = gevent.spawn(far.wrap_socket, right, server_side=True)
    ends: list[Any] = [near.wrap_socket(left, server_hostname="localhost"), shaking.get(timeout=PATIENCE)]
    for end, tap in zip(ends, taps, strict=True):
        end.tap = tap
    return ends


def _cut_objects(taps: list[Tap]) -> list[Any]:
    return [CutObject(end, tap) for end, tap in zip(memory_pair(8192), taps, strict=True)]


CUTTERS: dict[str, Callable[[list[Tap]], list[Any]]] = {"sockets": _cut_sockets, "objects": _cut_objects, "tls": _cut_tls}
"""By kind: makes the two connected ends for two taps."""


@contextlib.contextmanager
def cut_sessions(kind: str, seed: int, config: Config | None = None) -> Iterator[tuple[Client, Server, list[Tap]]]:
    """A client and a server over such a connection, and what judges the two. Aborted at the end."""
    taps = [Tap(client=True, rng=random.Random(seed)), Tap(client=False, rng=random.Random(seed + 1))]
    left, right = CUTTERS[kind](taps)
    client, server = Client(left, config), Server(right, config)
    try:
        yield client, server, taps
    finally:
        client.abort()
        server.abort()
        client.join(PATIENCE)
        server.join(PATIENCE)
