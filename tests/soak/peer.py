"""One of the two processes under load in a soak run: a client that reconnects after each cut, or a server.

Both hold sessions, serve the streams that come and open streams themselves; the client opens more. Sessions live until
the link is cut or this side ends them, in one of the ways there are. At a quiet moment the load stops, what is left must
become nothing, and a census is sent. What may happen is counted, anything else is a fault.

Run by the soak itself: ``python -m tests.soak.peer SETTINGS``, with orders on stdin; the settings are JSON.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import random
import ssl
import sys
import time
from collections.abc import Callable
from typing import Any

import gevent
from gevent import socket as gsocket
from gevent.event import Event
from gevent.ssl import SSLContext

import geyamux
from geyamux import (
    Config,
    ProtocolError,
    RemoteError,
    RemoteGoAway,
    Server,
    Session,
    SessionError,
    StreamReset,
)

from . import load
from .channel import Channel
from .guard import Guard

#: What a stream or a session may raise here. StreamClosed is not among it: that would be a bug of the load.
EXPECTED = (SessionError, StreamReset, RemoteGoAway, TimeoutError)
#: Everything a dead link may cost, in seconds: short, so that it is noticed soon and the run sees many of them.
LIMITS: dict[str, Any] = {
    "keepalive_interval": 1.0,
    "keepalive_timeout": 2.0,
    "connection_write_timeout": 3.0,
    "stream_close_timeout": 6.0,
    "accept_timeout": 5.0,
    "close_timeout": 2.0,
    "receive_budget": 16 << 20,
}
#: In which a quiet session must have come to nothing: the longest stream, and its close.
CALM = load.LONGEST + 10.0
#: And in which all sessions must have ended, and a process must hold what it held before.
_SETTLED = 15.0


class Peer:
    """The process: its settings, its sessions and its load."""

    def __init__(self, settings: dict[str, Any]) -> None:
        self.settings = settings
        self.is_client = settings["side"] == "client"
        self.rng = random.Random(settings["seed"])
        self.channel = Channel()
        self.guard = Guard(self.channel.send)
        self.faults = frozenset(settings["faults"])
        load.Talk.faults = self.faults
        #: Set while load is wanted.
        self.busy = Event()
        #: Set while sessions are wanted.
        self.connected = Event()
        self.lives: set[Life] = set()
        self._context = _tls_context(settings) if settings["tls"] else None

    def run(self) -> None:
        """Do as ordered until stdin ends."""
        self.guard.start()
        if self.is_client:
            for _ in range(self.settings["connections"]):
                gevent.spawn(self._keep_connected)
            self.channel.send(kind="ready", port=0)
        else:
            listener = gsocket.socket()
            listener.bind(("127.0.0.1", 0))
            listener.listen(64)
            gevent.spawn(self._accept, listener)
            self.channel.send(kind="ready", port=listener.getsockname()[1])
        for fault in sorted(self.faults):
            gevent.spawn(FAULTS[fault], self)
        # What takes long does not hold up the next order.
        orders: dict[str, Callable[[], object]] = {
            "load": self._begin,
            "calm": lambda: gevent.spawn(self._calm_down),
            "part": lambda: gevent.spawn(self._part),
            "counts": self._send_counts,
        }
        for order in self.channel.orders():
            orders[order["do"]]()
        self.channel.flush()

    # -- orders

    def _begin(self) -> None:
        self.connected.set()
        self.busy.set()

    def _calm_down(self) -> None:
        """No new streams; what is under way ends, and then every live session is empty."""
        self.busy.clear()
        deadline = time.monotonic() + CALM
        while any(not life.is_calm for life in self.lives) and time.monotonic() < deadline:
            gevent.sleep(0.05)
        left = [life.describe() for life in self.lives if not life.is_calm]
        self.channel.send(kind="calm", left=left)

    def _part(self) -> None:
        """No sessions; then the census, as soon as it is what it was, or after a while."""
        self.connected.clear()
        deadline = time.monotonic() + (_SETTLED if not self.faults else 2.0)
        expected = self.settings.get("census")
        while True:
            census = self.guard.census()
            if (not self.lives and (expected is None or census == expected)) or time.monotonic() > deadline:
                break
            gevent.sleep(0.1)
        if expected is None:
            self.settings["census"] = census
        self.channel.send(kind="census", census=census, expected=expected)

    def _send_counts(self) -> None:
        self.channel.send(
            kind="counts", counts=dict(self.guard.counts), faults=dict(self.guard.faults), lag=self.guard.worst_lag
        )

    # -- sessions

    def _keep_connected(self) -> None:
        """The client's: connect, live, back off a little, again."""
        rng = random.Random(self.rng.random())
        failures = 0
        while True:
            self.connected.wait()
            self.busy.wait()
            try:
                # Nothing here may hold the session when it has ended: the census would find it.
                Life(self, self._connect(rng), rng, self.settings["workers"]).run()
                failures = 0
            except OSError as error:
                failures += 1
                self.guard.count(f"connect: {type(error).__name__}")
            gevent.sleep(min(0.05 * 2**failures, 1.0) * rng.uniform(0.2, 1))

    def _connect(self, rng: random.Random) -> Session:
        with self.guard.limit("connect", 5.0):
            session = geyamux.connect(
                ("127.0.0.1", self.settings["port"]),
                timeout=5.0,
                ssl_context=self._context,
                server_hostname="localhost",
                config=_config(rng),
            )
        self.guard.count("connected")
        return session

    def _accept(self, listener: Any) -> None:
        while True:
            conn, _ = listener.accept()
            gevent.spawn(self._serve, conn, random.Random(self.rng.random()))

    def _serve(self, conn: Any, rng: random.Random) -> None:
        try:
            conn.setsockopt(gsocket.IPPROTO_TCP, gsocket.TCP_NODELAY, 1)
            if self._context is not None:
                conn.settimeout(5.0)
                # Raises for a connection that was reset already: gevent's wrap_socket raises then, too, but leaves its
                # new socket unclosed.
                conn.getpeername()
                conn = self._context.wrap_socket(conn, server_side=True, do_handshake_on_connect=False)
            with self.guard.limit("TLS handshake", 5.0):
                session = Server(conn, _config(rng))
        except OSError as error:
            self.guard.count(f"accept: {type(error).__name__}")
            conn.close()
            return
        self.guard.count("accepted")
        Life(self, session, rng, self.settings["workers"]).run()


class Life:
    """A session and the load on it, until it ends."""

    def __init__(self, peer: Peer, session: Session, rng: random.Random, workers: int) -> None:
        self.peer = peer
        self.guard = peer.guard
        self.session = session
        self.rng = rng
        #: What was accepted before may be lost.
        self.was_aborted = False
        self.helpers: list[gevent.Greenlet[..., Any]] = []
        self.workers = [gevent.spawn(self._work) for _ in range(workers)]
        #: Handlers of streams that came.
        self.handlers: set[gevent.Greenlet[..., Any]] = set()
        self.guard.objects.add(session)

    @property
    def is_calm(self) -> bool:
        """Nothing is under way; of a session that lives, nothing is left in it either."""
        if self.handlers or not all(worker.ready() for worker in self.workers):
            return False
        stats = self.session.stats()
        return self.session.closed or not (
            stats.streams or stats.backlog or stats.unacknowledged or stats.unread or stats.queued
        )

    def describe(self) -> str:
        alive = sum(not worker.ready() for worker in self.workers)
        return f"{self.session!r}, {len(self.handlers)} handlers, {alive} workers, {self.session.stats()}"

    def run(self) -> None:
        self.peer.lives.add(self)
        try:
            self.helpers = [gevent.spawn(self._serve), gevent.spawn(self._ping)]
            mean = 8.0 if self.peer.is_client else 40.0
            ends_at = time.monotonic() + self.rng.expovariate(1 / mean)
            while not self.session.join(timeout=0.1):
                is_wanted = self.peer.connected.is_set()
                if not is_wanted or (self.peer.busy.is_set() and time.monotonic() > ends_at):
                    self._end()
                    break
            self._check_end()
            everyone = [*self.helpers, *self.workers, *self.handlers]
            with self.guard.limit("what waited in a session that has ended", 5.0):
                gevent.joinall(everyone)
        finally:
            self.peer.lives.discard(self)

    def _check_end(self) -> None:
        with self.guard.limit("the end of a session", LIMITS["close_timeout"]):
            self.session.join()
        error = self.session.exception
        self.guard.count(f"session ended: {type(error).__name__ if error else 'in order'}")
        if error is not None or self.was_aborted:
            self.peer.channel.send(kind="cut", session=self.session.name)
        if isinstance(error, (ProtocolError, RemoteError)):
            self.guard.unexpected(error, "a session: the link changes no byte")

    # -- how this side ends it

    def _end(self) -> None:
        ways = (self._close, self._close, self._leave, self._abort, self._closed_by_victim)
        way = self.rng.choice(ways)
        self.guard.count(f"end: {way.__name__.strip('_')}")
        way()

    def _close(self) -> None:
        with self.guard.limit("close", LIMITS["close_timeout"]):
            self.session.close()

    def _abort(self) -> None:
        self.was_aborted = True
        with self.guard.limit("abort", 0.0):
            self.session.abort()

    def _leave(self) -> None:
        """No new streams from the peer; a moment for those that are there; then the end."""
        with contextlib.suppress(SessionError):
            self.session.go_away(announce=self.rng.random() < 0.5)
            self.session.join(self.rng.uniform(0.1, 1.5))
        self._close()

    def _closed_by_victim(self) -> None:
        """Whoever closes is killed: the end goes on."""
        closing = gevent.spawn(self.session.close)
        gevent.sleep(self.rng.uniform(0, 0.05))
        closing.kill()
        self.guard.count("kills")

    # -- load

    def _serve(self) -> None:
        try:
            for stream in self.session:
                handler = gevent.spawn(self._attempt, "serve", load.serve_one, stream)
                self.handlers.add(handler)
                handler.rawlink(self.handlers.discard)
        except SessionError as error:
            self.guard.count(f"accept loop: {type(error).__name__}")

    def _ping(self) -> None:
        try:
            while True:
                with self.guard.limit("ping", 5.0):
                    self.session.ping(timeout=5.0)
                self.guard.count("pings")
                self.session.join(self.rng.uniform(0.05, 0.5))
        except EXPECTED as error:
            self.guard.count(f"ping: {type(error).__name__}")

    def _work(self) -> None:
        """One stream after the other; one in ten is struck while it is at work."""
        while self.peer.busy.is_set() and not self.session.closed:
            share = self.rng.random()
            if share < 0.1:
                self._struck()
            elif share < 0.13:
                for _ in range(self.rng.randint(20, 60)):
                    self._attempt("churn", load.open_one, number=load.SHORT)
            else:
                self._attempt("open", load.open_one)
            gevent.sleep(self.rng.uniform(0, 0.02))

    def _struck(self) -> None:
        victim = gevent.spawn(self._attempt, "victim", load.open_one)
        after = 10 ** self.rng.uniform(-4, -0.3)
        victim.join(after)
        if victim.ready():
            return
        if self.rng.random() < 0.5:
            victim.kill(block=False)
            self.guard.count("kills")
        else:
            victim.kill(gevent.Timeout(), block=False)
            self.guard.count("gevent.Timeouts")
        with self.guard.limit("a greenlet that was struck", 0.0):
            victim.join()

    def _attempt(self, what: str, do: Callable[..., None], stream: Any = None, **options: Any) -> None:
        """Use a stream for something; tell the errors that may come from those that may not."""
        target = self.session if stream is None else stream
        try:
            do(self.guard, self.rng, target, self.peer.channel.send, **options)
        except EXPECTED as error:
            self.guard.count(f"error: {type(error).__name__}")
        except gevent.Timeout:
            self.guard.count("error: gevent.Timeout")
        except Exception as error:
            self.guard.unexpected(error, what)


def _config(rng: random.Random) -> Config:
    """Settings with short limits; sizes differ from session to session."""
    return Config(
        **LIMITS,
        window_auto_tune=rng.choice((False, 1 << 20)),
        outbox_limit=rng.choice((16384, 262144)),
        max_frame_size=rng.choice((None, None, 4096)),
        accept_backlog=rng.choice((32, 256)),
    )


def _tls_context(settings: dict[str, Any]) -> SSLContext:
    where = settings["tls"]
    if settings["side"] == "client":
        context = SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.load_verify_locations(os.path.join(where, "authority.pem"))
        return context
    context = SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(os.path.join(where, "server.pem"))
    return context


# --- seeded faults ---


def _leak_descriptors(peer: Peer) -> None:
    while True:
        os.dup(0)
        gevent.sleep(1.0)


def _leak_greenlets(peer: Peer) -> None:
    while True:
        gevent.spawn(Event().wait)
        gevent.sleep(1.0)


def _be_stuck(peer: Peer) -> None:
    gevent.sleep(0.5)
    with peer.guard.limit("a call that is stuck", 0.1):
        Event().wait()


def _log_an_error(peer: Peer) -> None:
    logging.getLogger("geyamux").error("seeded")


def _fail_in_the_hub(peer: Peer) -> None:
    raise ValueError("seeded")


def _nothing(peer: Peer) -> None:
    """The load does it."""


FAULTS: dict[str, Callable[[Peer], None]] = {
    "leak": _nothing,
    "flip": _nothing,
    "truncate": _nothing,
    "descriptors": _leak_descriptors,
    "greenlets": _leak_greenlets,
    "stuck": _be_stuck,
    "log": _log_an_error,
    "hub": _fail_in_the_hub,
}
"""What the server can be told to do wrong, to show that the run notices."""


if __name__ == "__main__":
    Peer(json.loads(sys.argv[1])).run()
