"""What an address stands for: dial it, or listen there."""

from __future__ import annotations

import contextlib
import errno
import ipaddress
import os
import socket as stdlib_socket
import stat
from typing import Any

from gevent import socket

from .address import Address
from .errors import CommandError
from .stdio import start_child, take_standard_io

__all__ = ["bound", "close_listener", "dial", "is_open", "listen", "name_of", "remove_stale"]

_BACKLOG = 1024

#: What a system says that has no IPv6, or has it turned off.
_NO_IPV6 = (errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL)


def dial(address: Address, timeout: float) -> Any:
    """Connect, within `timeout` seconds; return a socket, or what is like one. Raises OSError."""
    if address.kind == "stdio":
        return take_standard_io()
    if address.kind == "exec":
        return start_child(address.what)
    if address.kind == "unix":
        return _connected(socket.AF_UNIX, address.what, timeout)
    host = address.host or "localhost"
    for family in (socket.AF_INET, socket.AF_INET6):
        with contextlib.suppress(OSError):
            stdlib_socket.inet_pton(family, host)
            break
    else:
        return socket.create_connection((host, address.port), timeout)
    # There is no name to ask a resolver for, which is done in a thread and costs more than all the rest.
    return _connected(family, (host, address.port), timeout)


def _connected(family: int, where: Any, timeout: float) -> Any:
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.settimeout(timeout)
        sock.connect(where)
    except BaseException:
        sock.close()
        raise
    return sock


def listen(address: Address) -> Any:
    """A listening socket, for tcp and unix. Raises CommandError where that can't be."""
    try:
        if address.kind == "unix":
            remove_stale(address.what)
            return bound(socket.AF_UNIX, address.what)
        return _listen_tcp(address)
    except OSError as error:
        advice = ": end what listens there, or give another address" if error.errno == errno.EADDRINUSE else ""
        raise CommandError(f"can't listen at {address}: {error.strerror or error}{advice}") from None


def _listen_tcp(address: Address) -> Any:
    if not address.host:
        try:
            return bound(socket.AF_INET6, ("::", address.port))
        except OSError as error:
            if error.errno not in _NO_IPV6:
                raise
        return bound(socket.AF_INET, ("0.0.0.0", address.port))
    found = socket.getaddrinfo(address.host, address.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    # Of a name that has both the older kind: that is what who dials tries by habit.
    family, *_, where = min(found, key=lambda one: one[0] != socket.AF_INET)
    return bound(family, where)


def bound(family: int, where: Any) -> Any:
    """A socket that listens there. Does not switch. Raises OSError."""
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            # "::" is for both kinds of addresses.
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, where[0] != "::")
        sock.bind(where)
        sock.listen(_BACKLOG)
    except BaseException:
        sock.close()
        raise
    return sock


def remove_stale(path: str) -> None:
    """Remove the socket that a process left behind which is gone; EADDRINUSE where somebody answers."""
    try:
        if not stat.S_ISSOCK(os.stat(path).st_mode):
            raise FileExistsError(errno.EEXIST, "there is a file that is no socket")
        with contextlib.closing(socket.socket(socket.AF_UNIX)) as probe:
            probe.settimeout(1.0)
            probe.connect(path)
    except FileNotFoundError:
        return
    except ConnectionRefusedError:
        os.unlink(path)
        return
    raise OSError(errno.EADDRINUSE, os.strerror(errno.EADDRINUSE))


def is_open(listener: Any) -> bool:
    """Others than this machine can reach what listens there."""
    where = listener.getsockname()
    return isinstance(where, tuple) and not ipaddress.ip_address(where[0].partition("%")[0]).is_loopback


def close_listener(server: Any) -> None:
    """Listen no more; what is served goes on. The path of a Unix socket is removed."""
    if not server.closed:
        where = server.socket.getsockname()
        server.close()
        if isinstance(where, str):
            with contextlib.suppress(OSError):
                os.unlink(where)


def name_of(where: Any) -> str:
    """An address of a socket in words."""
    if isinstance(where, tuple) and len(where) >= 2:
        # As a socket for both kinds of addresses says it of the older kind.
        host, port = str(where[0]).removeprefix("::ffff:"), where[1]
        return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    return os.fsdecode(where) if where else "a local process"
