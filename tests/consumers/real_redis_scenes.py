"""redis-py as it is, over streams: what a test plays here it judges there.

The whole adapter is `StreamConnection`: a connection of redis-py that opens a stream where others connect a socket.
"""

from __future__ import annotations

import hashlib
import os
import signal
import threading
from typing import Any

import gevent
import redis
from redis.backoff import NoBackoff
from redis.connection import AbstractConnection
from redis.retry import Retry

from consumers import real_scene
from consumers.real_scene import Facts, chain_of, error_of, stopwatch, wait_for_no_streams


class StreamConnection(AbstractConnection):  # type: ignore[misc]  # without types
    """A connection of redis-py over a stream of its own."""

    def __init__(self, session: Any, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.session = session

    def _connect(self) -> Any:
        stream = self.session.open()
        stream.settimeout(self.socket_timeout)
        return stream

    def _host_error(self) -> str:
        return str(self.session.name)

    def repr_pieces(self) -> list[tuple[str, Any]]:
        return [("session", self.session.name), ("db", self.db)]


NO_RETRY = Retry(NoBackoff(), 0)
ONE_RETRY = Retry(NoBackoff(), 1)


def client(session: Any, pool: type[redis.ConnectionPool] = redis.ConnectionPool, **kwargs: Any) -> Any:
    """A client of redis-py whose pool opens streams."""
    kwargs.setdefault("retry", NO_RETRY)
    return redis.Redis(connection_pool=pool(connection_class=StreamConnection, session=session, **kwargs))


def transport_error(function: Any, *args: Any) -> list[str]:
    """The classes of the error that redis-py raises and of what it came from."""
    try:
        function(*args)
    except redis.RedisError as error:
        return chain_of(error)
    return []


# --- scenes ---


def pipelines(session: Any, options: dict[str, Any]) -> Facts:
    """A thousand commands in one go, a transaction, and a value of many windows."""
    server = client(session)
    server.flushall()
    pipe = server.pipeline(transaction=False)
    for number in range(1000):
        pipe.set(f"key {number}", number * number)
    for number in range(1000):
        pipe.get(f"key {number}")
    answers = pipe.execute()
    with server.pipeline() as transaction:
        transaction.incr("count").incr("count").get("count")
        counted = transaction.execute()
    big = bytes(range(256)) * 20000
    server.set("big", big)
    return {
        "stored": answers[:1000].count(True),
        "read": [int(answer) for answer in answers[1000:]] == [number * number for number in range(1000)],
        "transaction": [counted[0], counted[1], counted[2].decode()],
        "big": hashlib.sha256(server.get("big")).digest() == hashlib.sha256(big).digest(),
        "peer": repr(server.connection_pool),
    }


def publish_and_subscribe(session: Any, options: dict[str, Any]) -> Facts:
    """A subscriber that looks with timeouts, without waiting, and in a thread."""
    server = client(session)
    subscriber = server.pubsub(ignore_subscribe_messages=True)
    subscriber.subscribe("news")
    while not server.pubsub_numsub("news")[0][1]:
        gevent.sleep(0.001)
    subscriber.get_message(timeout=1)  # the confirmation, which is ignored
    with stopwatch() as seconds:
        nothing = subscriber.get_message(timeout=0.1)
        waited = seconds()
    at_once = subscriber.get_message(timeout=0)
    server.publish("news", "one")
    first = subscriber.get_message(timeout=5)
    gevent.spawn_later(0.05, server.publish, "news", "two")
    second = subscriber.get_message(timeout=None)

    heard: list[str] = []
    last = threading.Event()

    def hear(message: dict[str, Any]) -> None:
        heard.append(message["data"].decode())
        if message["data"] == b"99":
            last.set()

    subscriber.subscribe(news=hear)
    listener = subscriber.run_in_thread(sleep_time=0.05)
    for number in range(100):
        server.publish("news", number)
    last.wait(10)
    listener.stop()
    listener.join(10)
    return {
        "nothing": nothing,
        "waited": waited,
        "at once": at_once,
        "heard": [first["data"].decode(), second["data"].decode()],
        "in a thread": heard,
        "ended": not listener.is_alive(),
    }


def blocking_pop(session: Any, options: dict[str, Any]) -> Facts:
    """BLPOP that is answered after a while, that the server gives up, and that the client gives up."""
    server = client(session, socket_timeout=None)
    server.flushall()
    with stopwatch() as seconds:
        nothing = server.blpop("queue", timeout=0.1)
        waited = seconds()
    gevent.spawn_later(0.05, server.rpush, "queue", "item")
    item = server.blpop("queue", timeout=5)

    hasty = client(session, socket_timeout=0.1)
    with stopwatch() as seconds:
        gave_up = transport_error(hasty.blpop, "queue", 10)
        hasty_waited = seconds()
    # The stream of the answer that nobody waits for is gone: a later command must not read it.
    server.rpush("queue", "late")
    return {
        "nothing": nothing,
        "waited": waited,
        "item": [part.decode() for part in item],
        "gave up": gave_up,
        "hasty waited": hasty_waited,
        "afterwards": hasty.ping(),
    }


def pool(session: Any, options: dict[str, Any]) -> Facts:
    """Fifty greenlets share five connections."""
    server = client(session, redis.BlockingConnectionPool, max_connections=5, timeout=10)
    server.flushall()
    most = 0

    def count() -> None:
        nonlocal most
        for _ in range(10):
            server.incr("total")
            most = max(most, session.num_streams)

    gevent.joinall([gevent.spawn(count) for _ in range(50)], raise_error=True)
    total = int(server.get("total"))
    kept = session.num_streams
    server.connection_pool.disconnect()
    wait_for_no_streams(session)
    return {"total": total, "most": most, "kept": kept, "left": session.num_streams}


def health_check(session: Any, options: dict[str, Any]) -> Facts:
    """A connection that is used again after a while is asked first whether it lives."""
    server = client(session, health_check_interval=0.05, retry=ONE_RETRY)
    watcher = client(session)
    watcher.config_resetstat()
    server.set("key", "value")
    own = server.client_id()

    def pings() -> int:
        return int(watcher.info("commandstats").get("cmdstat_ping", {"calls": 0})["calls"])

    before = pings()
    gevent.sleep(0.1)
    server.get("key")
    asked = pings() - before
    # The server drops the connection while it is idle; the check finds out, and the command goes over another.
    watcher.client_kill_filter(_id=own)
    gevent.sleep(0.1)
    value = server.get("key").decode()
    return {"asked": asked, "value": value, "another": server.client_id() != own}


def reset_and_reconnect(session: Any, options: dict[str, Any]) -> Facts:
    """The relay resets every stream: while nobody waits, and in the middle of a command, with a retry and without."""
    plain = client(session, socket_timeout=None)
    stubborn = client(session, socket_timeout=None, retry=ONE_RETRY)
    plain.flushall()
    plain.set("key", "value")
    os.kill(options["relay"], signal.SIGUSR1)
    wait_for_no_streams(session)
    # The pool looks at a connection before it hands it out.
    idle = plain.get("key").decode()

    gave_up = gevent.spawn(transport_error, plain.blpop, "nothing", 10)
    tried_again = gevent.spawn(stubborn.blpop, "queue", 10)
    first = wait_for_blocked(session, 2)
    os.kill(options["relay"], signal.SIGUSR1)
    told = gave_up.get(timeout=5)
    wait_for_blocked(session, 1, first)
    plain.rpush("queue", "item")
    return {
        "idle": idle,
        "told": told,
        "tried again": tried_again.get(timeout=5)[1].decode(),
        "session": session.exception is None and session.ping() > 0,
    }


def wait_for_blocked(session: Any, count: int, earlier: set[str] | None = None) -> set[str]:
    """Wait until so many clients, and none of the earlier ones, wait in the server; return who they are."""
    with client(session) as watcher:
        while True:
            found = {known["id"] for known in watcher.client_list() if "b" in known["flags"]}
            if len(found) == count and not found & (earlier or set()):
                return found
            gevent.sleep(0.001)


def session_that_is_gone(session: Any, options: dict[str, Any]) -> Facts:
    """Without a session there is no new connection, and redis-py says so in its own words."""
    server = client(session, retry=ONE_RETRY)
    server.ping()
    session.abort()
    return {"told": transport_error(server.ping), "kind": error_of(server.ping)}


def by_the_clock(session: Any, options: dict[str, Any]) -> Facts:
    """So many blocking calls at once: each over a stream of the session, and all of them over one socket."""
    calls, wait, long_wait = options["calls"], options["wait"], options["long wait"]
    over_session = client(session, max_connections=calls, socket_timeout=None)
    over_socket = redis.Redis(
        connection_pool=redis.BlockingConnectionPool(
            connection_class=redis.UnixDomainSocketConnection,
            path=options["socket"],
            max_connections=1,
            timeout=None,
            socket_timeout=None,
        )
    )
    # What is measured is the waiting: everything is connected before.
    with stopwatch() as seconds:
        connect(over_session, calls)
        connect_seconds = seconds()
    connect(over_socket, 1)
    streams = session.num_streams
    session_seconds, session_answers = all_at_once(over_session, calls, wait)
    socket_seconds, socket_answers = all_at_once(over_socket, calls, wait)
    looking = gevent.spawn(wait_for_blocked, session, calls)
    long_seconds, _ = all_at_once(over_session, calls, long_wait)
    return {
        "streams": streams,
        "connect seconds": connect_seconds,
        "session seconds": session_seconds,
        "session answers": session_answers,
        "socket seconds": socket_seconds,
        "socket answers": socket_answers,
        "long seconds": long_seconds,
        "waited at once": len(looking.get(timeout=5)),
    }


def connect(server: Any, count: int) -> None:
    """Let the pool of a client open so many connections, and keep them."""
    pool = server.connection_pool
    for connection in [pool.get_connection() for _ in range(count)]:
        pool.release(connection)


def all_at_once(server: Any, calls: int, wait: float) -> tuple[float, int]:
    """Seconds until so many blocking calls are answered, and how many answers say that nothing came."""
    with stopwatch() as seconds:
        callers = [gevent.spawn(server.blpop, f"nothing {number}", timeout=wait) for number in range(calls)]
        gevent.joinall(callers, raise_error=True)
        return seconds(), [caller.value for caller in callers].count(None)


if __name__ == "__main__":
    real_scene.main(globals())
