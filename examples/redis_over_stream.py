"""Two hundred blocking calls of redis-py at a time, over one connection to a Redis that only an agent can reach.

    python redis_over_stream.py [port of a redis-server, or the path of its Unix socket]

redis-py is as it was installed, its calls block, and the program is monkey-patched: `StreamConnection` is all that it
takes to have each connection of its pool be a stream. The agent joins streams to Redis; it would run beside it, on a
machine that dials out, and here it is in the same process. What 200 calls wait for in Redis, 0.1 seconds each, they wait
for together.

Prints how long that took, and a message that came by pub/sub. Needs redis-py (pip install redis) and a redis-server.
"""

from gevent import monkey

monkey.patch_all()

import socket  # noqa: E402  # what follows is imported patched
import sys  # noqa: E402
import time  # noqa: E402

import gevent  # noqa: E402
import redis  # noqa: E402
from redis.connection import AbstractConnection  # noqa: E402

import geyamux  # noqa: E402

CALLS = 200
SECONDS = 0.1


# --- the application ---


class StreamConnection(AbstractConnection):
    """A connection of redis-py whose socket is a stream of a session."""

    def __init__(self, session, **kwargs):
        super().__init__(**kwargs)
        self.session = session

    def _connect(self):
        stream = self.session.open()
        stream.settimeout(self.socket_timeout)
        return stream

    def _host_error(self):
        return self.session.name

    def repr_pieces(self):
        return [("session", self.session.name), ("db", self.db)]


def client(session):
    pool = redis.ConnectionPool(connection_class=StreamConnection, session=session, max_connections=CALLS + 10)
    return redis.Redis(connection_pool=pool)


def wait_together(server):
    """Block in Redis for a while, in many greenlets, for lists into which nobody puts anything."""
    began = time.perf_counter()
    calls = [gevent.spawn(server.blpop, f"nobody puts into this {n}", timeout=SECONDS) for n in range(CALLS)]
    gevent.joinall(calls, raise_error=True)
    return time.perf_counter() - began


def hear(server):
    """Subscribe, publish, and return what was heard."""
    with server.pubsub() as subscriber:
        subscriber.subscribe("news")
        subscriber.get_message(timeout=5)  # that it is subscribed
        server.publish("news", "redis-py talks over streams")
        return subscriber.get_message(timeout=5)["data"].decode()


# --- the agent ---


def agent(session, redis_address):
    """Join each stream of the session to a connection of its own."""
    for stream in session:
        gevent.spawn(join, stream, redis_address)


def connect(redis_address):
    conn = socket.socket(socket.AF_UNIX if isinstance(redis_address, str) else socket.AF_INET)
    try:
        conn.connect(redis_address)
    except BaseException:
        conn.close()
        raise
    return conn


def join(stream, redis_address):
    """Copy both ways until both have ended; what breaks on one side is broken on the other."""
    with stream, connect(redis_address) as conn:

        def copy(source, sink):
            try:
                while data := source.recv(65536):
                    sink.sendall(data)
                sink.shutdown(socket.SHUT_WR)
            except OSError:
                stream.reset()
                conn.close()

        there = gevent.spawn(copy, stream, conn)
        copy(conn, stream)
        there.join()


def main():
    where = sys.argv[1] if sys.argv[1:] else "6379"
    redis_address = where if where.startswith("/") else ("127.0.0.1", int(where))
    try:
        connect(redis_address).close()
    except OSError as error:
        sys.exit(f"no Redis at {where}: {error}")
    near, far = geyamux.pair()
    with far, near:  # the side that opened the streams closes first
        gevent.spawn(agent, far, redis_address)
        server = client(near)
        took = wait_together(server)
        print(f"{CALLS} calls that wait {SECONDS:g} s each: {took:.2f} s over one session")
        print(hear(server))
        server.connection_pool.disconnect()


if __name__ == "__main__":
    main()
