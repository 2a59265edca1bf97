"""pymemcache and pg8000 as they are, over streams: what a test plays here it judges there."""

from __future__ import annotations

import hashlib
import os
import signal
import socket
from typing import Any

import gevent

from consumers import real_scene
from consumers.real_scene import Facts, error_of, results, stopwatch, wait_for_no_streams

# --- pymemcache ---


class ConnectedStream:
    """A stream that is told to connect, as a new socket is, and needs not: a stream has no `connect`."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def connect(self, address: Any) -> None:
        """The stream is connected since it was opened."""

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


class StreamSockets:
    """The part of the module `socket` that pymemcache uses for a Unix socket: its `socket_module`."""

    AF_UNIX = socket.AF_UNIX
    SOCK_STREAM = socket.SOCK_STREAM

    def __init__(self, session: Any) -> None:
        self._session = session

    def socket(self, *args: Any) -> ConnectedStream:
        """A stream in the place of a new socket."""
        return ConnectedStream(self._session.open())


def memcache(session: Any, options: dict[str, Any]) -> Facts:
    """Values in and out, a big one, a pool of clients, a timeout, and a reset."""
    from pymemcache.client.base import Client, PooledClient

    sockets = StreamSockets(session)
    client = Client("/stream", socket_module=sockets, timeout=10, connect_timeout=5)
    client.flush_all(noreply=False)
    big = bytes(range(256)) * 3900
    client.set("big", big, noreply=False)
    client.set_many({f"key-{n}": str(n) for n in range(200)}, noreply=False)
    found = client.get_many([f"key-{n}" for n in range(0, 200, 2)])
    client.set("count", "0", noreply=False)

    pooled = PooledClient("/stream", socket_module=sockets, timeout=10, max_pool_size=200)
    counters = [gevent.spawn(pooled.incr, "count", 1) for _ in range(100)]
    gevent.joinall(counters, raise_error=True)
    pooled.close()

    os.kill(options["relay"], signal.SIGUSR1)
    wait_for_no_streams(session)
    return {
        "big": hashlib.sha256(client_get_after_reset(client, "big")).digest() == hashlib.sha256(big).digest(),
        "found": len(found),
        "count": int(client.get("count")),
    }


def client_get_after_reset(client: Any, key: str) -> bytes:
    """pymemcache drops a connection that failed, and the next call makes a new one."""
    failure = error_of(client.get, key)
    assert failure == "StreamReset", failure
    value: bytes = client.get(key)
    return value


# --- pg8000 ---


def postgres(session: Any, options: dict[str, Any]) -> Facts:
    """Rows, a big value, a transaction, an error, and many connections that wait at the same time."""
    import pg8000.dbapi

    def connect() -> Any:
        return pg8000.dbapi.connect(user="postgres", sock=session.open())

    def ask(connection: Any, query: str, *args: Any) -> Any:
        cursor = connection.cursor()
        cursor.execute(query, args)
        return cursor.fetchall() if cursor.description else []

    a, b = connect(), connect()
    blob = bytes(range(256)) * 12000
    ask(a, "CREATE TABLE things (id INT PRIMARY KEY, body BYTEA)")
    ask(a, "INSERT INTO things VALUES (1, %s)", blob)
    wrong = error_of(ask, b, "SELECT * FROM things")
    a.commit()
    b.rollback()
    body = ask(b, "SELECT body FROM things")[0][0]
    rows = ask(b, "SELECT n, repeat('x', 100) FROM generate_series(1, 10000) AS n")

    calls, wait = options["calls"], options["wait"]
    connections = [connect() for _ in range(calls)]
    with stopwatch() as seconds:
        jobs = [gevent.spawn(ask, each, f"SELECT {n} FROM pg_sleep({wait})") for n, each in enumerate(connections)]
        answers = [rows[0][0] for rows in results(jobs)]
        took = seconds()
    for connection in (a, b, *connections):
        connection.close()
    return {
        "wrong": wrong,
        "blob": hashlib.sha256(bytes(body)).digest() == hashlib.sha256(blob).digest(),
        "rows": len(rows),
        "answers": answers,
        "took": took,
    }


def postgres_tls(session: Any, options: dict[str, Any]) -> Facts:
    """pg8000 asked to encrypt inside of its own protocol."""
    import ssl

    import pg8000.dbapi

    stream = session.open()
    failure = error_of(pg8000.dbapi.connect, user="postgres", sock=stream, ssl_context=ssl.create_default_context())
    return {"error": failure, "session": session.ping() > 0}


if __name__ == "__main__":
    real_scene.main(globals())
