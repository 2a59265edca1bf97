"""A program that ends with open sessions, in one of the ways in which programs end.

Run as a process of its own: ``python exits.py DESCRIPTOR HOW TRANSPORT LOAD [patched]``. The descriptor is one end of a
socket; its peer is the test. TRANSPORT is ``plain`` or ``tls``; LOAD is ``few`` (some bytes are queued when it ends) or
``many`` (the peer reads nothing, and the connection is full). It prints nothing by itself; what stands on stderr comes
from the end.
"""

from __future__ import annotations

import sys

if "patched" in sys.argv[5:]:
    import gevent.monkey

    gevent.monkey.patch_all()

import atexit
import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable
from typing import Any

import gevent
import gevent.ssl
from gevent import socket as gsocket

import geyamux

CODE = 3


class Boom(Exception):
    """What nobody handles."""


def unhandled() -> None:
    raise Boom


def in_atexit(client: Any, stream: Any) -> None:
    def last() -> None:
        stream.sendall(b", and more")
        client.open().sendall(b"another")
        stream.close()
        client.stats()
        client.go_away()

    atexit.register(last)


def close_in_atexit(client: Any) -> None:
    atexit.register(client.close, 0.2)


def with_daemon_thread(client: Any, stream: Any) -> None:
    def use() -> None:
        while True:
            stream.close()
            client.stats()
            time.sleep(0.0001)

    threading.Thread(target=use, daemon=True).start()


def in_callback(function: Callable[[], Any]) -> None:
    gevent.get_hub().loop.run_callback(function)
    gevent.sleep(5)


def forever(function: Callable[..., Any], *args: Any) -> None:
    def wait() -> None:
        with contextlib.suppress(geyamux.YamuxError):
            function(*args)

    gevent.spawn(wait)


def fill(stream: Any) -> None:
    with contextlib.suppress(geyamux.YamuxError):
        stream.sendall(bytes(200_000))


def end(how: str, client: Any, stream: Any) -> None:
    """End so; a way that returns ends by itself."""
    if how == "exit":
        sys.exit(CODE)
    elif how == "os._exit":
        os._exit(CODE)
    elif how == "unhandled":
        unhandled()
    elif how == "SIGTERM":
        os.kill(os.getpid(), signal.SIGTERM)
    elif how == "SIGINT":
        os.kill(os.getpid(), signal.SIGINT)
        gevent.sleep(5)
    elif how == "atexit":
        in_atexit(client, stream)
    elif how == "atexit close":
        close_in_atexit(client)
    elif how == "daemon thread":
        with_daemon_thread(client, stream)
    elif how == "hub callback":
        in_callback(lambda: sys.exit(CODE))
    elif how == "greenlet":
        gevent.spawn(sys.exit, CODE)
        gevent.sleep(5)
    elif how == "waiters":
        for call in (stream.read, client.accept, client.join, client.ping, client.close):
            forever(call)
        gevent.sleep(0)
    elif how == "in a with-block":
        with client, stream:
            sys.exit(CODE)
    elif how == "globals":
        globals().update(kept=[client, stream, stream.makefile("rwb")])
    else:
        assert how == "normal", how


def main(descriptor: int, how: str, transport: str, load: str) -> None:
    conn: Any = gsocket.socket(fileno=descriptor)
    if transport == "tls":
        context = gevent.ssl.SSLContext(gevent.ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname, context.verify_mode = False, gevent.ssl.CERT_NONE
        conn = context.wrap_socket(conn)
    client = geyamux.Client(conn, geyamux.Config(close_timeout=0.3))
    stream = client.open()
    gevent.sleep(0.01)
    if load == "many":
        gevent.spawn(fill, stream)
        gevent.sleep(0.01)
        client.open().sendall(b"behind it")
    else:
        stream.sendall(b"last words")
    end(how, client, stream)


main(int(sys.argv[1]), *sys.argv[2:5])
