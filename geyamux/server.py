"""gevent's ``StreamServer``, for the streams of sessions instead of connections.

What it serves comes from one of two places:

- a session that exists: an agent behind NAT has dialled out, and serves whoever holds the other end;
- a listening socket or an address, as gevent's servers take: every connection becomes a session of its own.

Handlers, ``spawn``, ``stop`` and the rest are gevent's. A handler gets ``(stream, address)``; its stream is closed when
it returns and reset when it raises, so that nobody takes half an answer for a whole one. What it raises is reported as
gevent does; but that its own stream or session is gone is one line in the log. While the pool is full no stream is
accepted: they wait, unacknowledged, in the backlogs of their sessions (``Config.accept_backlog``, ``accept_timeout``).
"""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import Callable
from typing import Any

import gevent
import gevent.server
import gevent.ssl
from gevent.event import Event

from .config import UNSET, Config, Unset
from .connect import check_cooperative
from .errors import SessionError, StreamReset
from .listener import Listener
from .logs import log
from .session import Server, Session
from .stream import Stream
from .waiting import Deadline

__all__ = ["StreamServer"]

logger = logging.getLogger("geyamux")

#: The sessions of a port that have ended, but whose last streams still wait for room: more of them are given up.
_LONGEST_LINE = 128

#: So long `stop` waits for killed handlers to end, in seconds; as gevent's servers do.
_DYING = 1.0


class Unowned(Listener):
    """A session as gevent's servers want to see it. Closing a server does not close what it was given."""

    def close(self) -> None:
        """Nothing: what happens to the session is said in `SessionServer.close`."""


class Handling:
    """A stream in the hands of a handler, from its accept to its end, whether the handler ever begins or not."""

    __slots__ = ("_has_begun", "_serving", "_stream", "greenlet")

    def __init__(self, serving: Serving, stream: Stream) -> None:
        self._serving = serving
        self._stream = stream
        self._has_begun = False
        #: What `spawn` returned; a Greenlet can be waited for and killed.
        self.greenlet: Any = None

    def run(self) -> None:
        """What the handler's greenlet runs."""
        self._has_begun = True
        stream, address = self._stream, self._stream.getpeername()
        try:
            self._handle(stream, address)
        except BaseException:
            stream.reset()
            raise
        else:
            self._serving.close(stream, address)
        finally:
            self._serving.leave(self)

    def _handle(self, stream: Stream, address: Any) -> None:
        try:
            self._serving.handle(stream, address)
        except (SessionError, StreamReset) as error:
            # A connection that is lost may take a thousand handlers with it: no traceback for each.
            if not (stream.session.closed or stream.stats().state == "RESET"):
                raise
            log(
                logger,
                logging.INFO,
                "%s: the handler of stream %d ended: %s",
                stream.session.name,
                stream.stream_id,
                error,
            )

    def give_up(self, _greenlet: object = None) -> None:
        """Its greenlet is over, or there was none. If nothing of the handler ran, nothing has closed the stream."""
        if not self._has_begun:
            self._stream.reset()
            self._serving.leave(self)

    def __repr__(self) -> str:
        return f"<handling of {self._stream!r}>"


class Serving:
    """A session whose streams are handled, and its handlers. These go on when the server has let go of everything."""

    def __init__(self, server: SessionServer, session: Session) -> None:
        self.session = session
        self._server = server
        self._handlings: set[Handling] = set()
        #: The greenlet that closes the session in the end; None where it is somebody else's.
        self.connection: Any = None
        #: No handler runs.
        self.idle = Event()
        self.idle.set()
        self._look()
        self.resume()

    def _look(self) -> None:
        """A server that is closed forgets all of this, and streams that came before are still served."""
        server = self._server
        self.handle: Callable[..., object] = server._handle
        self.close: Callable[..., object] = server.do_close
        self._spawn: Callable[..., Any] = server._spawn  # type: ignore[attr-defined]  # gevent's, not in its stubs
        self._pool: Any = server.pool

    def resume(self) -> None:
        """Accept, until `pause` or until the session takes no more streams."""
        #: Whether it is meant to accept; a greenlet that was killed takes a turn to end.
        self.is_accepting = True
        #: Its value is True where the session takes no more streams.
        self.acceptor: gevent.Greenlet[..., bool] = gevent.spawn(self._accept_all)
        self.acceptor.rawlink(self._server._on_acceptor_end)

    def pause(self) -> None:
        """Accept nothing until `resume`."""
        self.is_accepting = False
        self.acceptor.kill(block=False)

    def _accept_all(self) -> bool:
        while True:
            for _ in range(self._server.max_accept):
                # First a stream, then room for it: one that waits must not be acknowledged before it has room.
                self.session._wait_arrival()
                self._wait_for_room()
                try:
                    stream = self.session.accept()
                except SessionError:
                    return True
                self._begin(stream)
            gevent.sleep(0)

    def _wait_for_room(self) -> None:
        # Pools of others may have neither.
        is_full, wait = getattr(self._pool, "full", None), getattr(self._pool, "wait_available", None)
        if is_full is None or wait is None or not is_full():
            return
        self._server._wait_in_line(self)
        try:
            while is_full() and self.session.stats().backlog:
                wait()
        finally:
            self._server._leave_line(self)

    def _begin(self, stream: Stream) -> None:
        if self._server.started:
            self._look()
        handling = Handling(self, stream)
        self._handlings.add(handling)
        self.idle.clear()
        try:
            handling.greenlet = self._spawn(handling.run)
            if hasattr(handling.greenlet, "rawlink"):
                handling.greenlet.rawlink(handling.give_up)
        except BaseException as error:
            handling.give_up()
            if not isinstance(error, Exception):
                raise
            # As with gevent's servers: it is reported, and the next one gets its chance a little later.
            gevent.get_hub().handle_error(self._server, *sys.exc_info())
            gevent.sleep(self._server.min_delay)

    def leave(self, handling: Handling) -> None:
        """A handler has ended."""
        self._handlings.discard(handling)
        if not self._handlings:
            self.idle.set()

    def _others(self) -> list[Any]:
        """The greenlets of handlers, but for the one that asks: it may be who stops the server."""
        return [one.greenlet for one in self._handlings if one.greenlet is not gevent.getcurrent()]

    def wait(self, deadline: Deadline | None = None) -> None:
        """Until all that was accepted, and all that waits to be, is done."""
        self.acceptor.join(_left(deadline))
        others = self._others()
        if len(others) == len(self._handlings):
            self.idle.wait(_left(deadline))
        else:
            gevent.joinall(others, timeout=_left(deadline))

    def cut(self, *, kill: bool) -> None:
        """Refuse what still waits; kill the handlers that run, or leave them alone."""
        self.acceptor.kill()
        with contextlib.suppress(SessionError, TimeoutError):
            while True:
                self.session.accept(timeout=0).reset()
        if kill:
            others = self._others()
            gevent.killall(others, block=False)
            gevent.joinall(others, timeout=_DYING)


def _left(deadline: Deadline | None) -> float | None:
    return None if deadline is None else deadline.left()


class SessionServer(gevent.server.StreamServer):
    """What the servers over sessions have in common: where streams come from, and how it ends."""

    #: How long the TLS handshake of a connection may take, in seconds.
    handshake_timeout = 10.0

    #: What a connection is served as.
    session_class: type[Session] = Server

    #: The session that it was made with; None where it listens.
    _session: Session | None = None
    #: Settings of the sessions that it makes itself.
    _config: Config | None = None
    #: Whether peers are told when it stops.
    _announce = True

    #: When the stop that is under way gives up waiting; None: never.
    _stop_deadline: Deadline | Unset | None = UNSET

    def _use(self, listener: Any, config: Config | None, announce: bool, ssl_args: dict[str, Any]) -> Any:
        """Before gevent's part is set up: return what that shall take for the listener."""
        if isinstance(listener, Listener):
            listener = listener._session
        if isinstance(listener, Session):
            if config is not None or ssl_args:
                raise TypeError("a session has its settings and its connection: neither config nor TLS applies to it")
            self._session = listener
        elif "ssl_context" in ssl_args:
            check_cooperative(ssl_args["ssl_context"])
        self._config = config
        self._announce = announce
        #: The sessions served now.
        self._servings: dict[Session, Serving] = {}
        #: Greenlets, each with a connection that is no session yet.
        self._arriving: set[gevent.Greenlet[..., Any]] = set()
        #: Those whose streams wait for room.
        self._in_line: set[Serving] = set()
        return listener if self._session is None else Unowned(listener)

    @property
    def sessions(self) -> tuple[Session, ...]:
        """The sessions that are served now: the one it was made with, or one for each connection."""
        return tuple(session for session in self._servings if not session.ready())

    @property
    def ssl_enabled(self) -> bool:
        """The connections below are TLS."""
        if self._session is not None:
            return isinstance(self._session.conn, gevent.ssl.SSLSocket)
        return self.ssl_args is not None

    # -- what gevent's servers are made of

    def set_spawn(self, spawn: Any) -> None:
        if spawn is None:
            raise ValueError("spawn=None would run handlers in the hub, where nothing may wait, and streams wait")
        super().set_spawn(spawn)
        # A full pool is no reason to keep connections out: it is streams that it limits.
        self.__dict__.pop("full", None)

    def init_socket(self) -> None:
        if self._session is not None and self.closed:
            raise RuntimeError("a server over a session can't be started again: its session takes no more streams")
        super().init_socket()
        # Not the one that would do a TLS handshake with a stream.
        self._handle = self.handle
        self._stop_deadline = UNSET

    def start_accepting(self) -> None:
        if self._session is None:
            super().start_accepting()
        elif self._session not in self._servings:
            self._servings[self._session] = Serving(self, self._session)
        elif not self._servings[self._session].is_accepting:
            self._servings[self._session].resume()

    def stop_accepting(self) -> None:
        """Accept no connections, or no streams of the session, until :meth:`start_accepting`."""
        super().stop_accepting()
        # A server that is closed serves what came before; then its acceptor ends by itself.
        if self._session in self._servings and self.started:
            self._servings[self._session].pause()

    def do_handle(self, *args: Any) -> None:
        """A connection has come. (Streams do not come through here.)"""
        conn, _ = args
        greenlet = gevent.Greenlet(self._serve_connection, *args)
        self._arriving.add(greenlet)
        greenlet.rawlink(self._arriving.discard)
        greenlet.rawlink(lambda _: conn.close())
        greenlet.start()

    def _formatinfo(self) -> str:
        """What `repr` and `str` say."""
        if self._session is not None:
            return f"over {self._session!r}"
        return f"{super()._formatinfo()} sessions={len(self.sessions)}"  # type: ignore[misc]  # not in the stubs

    # -- sessions

    def _on_acceptor_end(self, acceptor: gevent.Greenlet[..., bool]) -> None:
        """In the hub. When the session that it was made with takes no more streams, `serve_forever` returns."""
        if self._session is not None and acceptor.value is True:
            self.close()

    def _serve_connection(self, conn: Any, address: Any) -> None:
        """Make it a session, serve that until it ends or the server is closed, let the handlers finish, close it."""
        try:
            session = self._make_session(conn)
        except (OSError, ValueError) as error:
            log(logger, logging.INFO, "the connection of %r did not become a session: %s", address, error)
            return
        if not self.started:
            session.close()
            return
        serving = self._servings[session] = Serving(self, session)
        serving.connection = gevent.getcurrent()
        self._arriving.discard(serving.connection)
        try:
            serving.wait()
        finally:
            session.close()
            del self._servings[session]

    def _wait_in_line(self, serving: Serving) -> None:
        """A stream waits for room. If its session ends meanwhile, what came before is served still, within a limit."""
        self._in_line.add(serving)
        serving.session.rawlink(self._on_end_in_line)

    def _leave_line(self, serving: Serving) -> None:
        self._in_line.discard(serving)
        serving.session.unlink(self._on_end_in_line)

    def _on_end_in_line(self, session: Session) -> None:
        """In the hub. Peers that come, open and leave must not pile up before a full pool."""
        if sum(one.session.ready() for one in self._in_line) > _LONGEST_LINE:
            self._servings[session].acceptor.kill(block=False)

    def _make_session(self, conn: Any) -> Session:
        if self.ssl_args is not None:
            conn.settimeout(self.handshake_timeout)
            # Of a connection that was reset already, wrap_socket would leave an open socket behind.
            conn.getpeername()
            # The session does the handshake when it adopts the socket.
            wrap: Any = self.wrap_socket  # type: ignore[misc]  # that of the SSLContext, not a method of ours
            conn = wrap(conn, **{**self.ssl_args, "do_handshake_on_connect": False})
        try:
            return self.session_class(conn, self._config)
        except BaseException:
            conn.close()
            raise

    # -- its end

    def close(self) -> None:
        """Take no new connections and no new streams; what was there before goes on. Never blocks."""
        was_started = self.started
        super().close()
        if was_started:
            gevent.killall(list(self._arriving), block=False)
            for session in self.sessions:
                session.go_away(self._announce)

    def stop(self, timeout: float | None = None) -> None:
        """Take nothing new, and wait until the handlers have ended, `timeout` seconds (left out: ``stop_timeout``, 1).

        The peers are told with GoAway, or not before their last stream has ended, with ``announce=False``: some drop all
        streams when they hear it (``Session.go_away``). Streams that they opened before are served. When the time is
        over what was not accepted is refused; handlers in a pool are killed and their streams reset, others run on until
        they end by themselves. Sessions that this server made are closed when their last handler has ended; a session
        that it was made with stays with its owner.

        Blocks for the time said, and a little longer where sessions are closed or handlers die. A second call without
        `timeout`, such as that of ``serve_forever``, waits as long as the first. In the hub it starts and returns.
        """
        self.close()
        if timeout is not None or self._stop_deadline is UNSET:
            self._stop_deadline = Deadline.after(self.stop_timeout if timeout is None else timeout)
        if gevent.getcurrent() is gevent.get_hub():
            gevent.spawn(self._finish, self._stop_deadline)
        else:
            self._finish(self._stop_deadline)

    def _finish(self, deadline: Any) -> None:
        servings = list(self._servings.values())
        for serving in servings:
            serving.wait(deadline)
        for serving in servings:
            serving.cut(kill=self.pool is not None)
        ending = [one.connection for one in servings if one.connection is not None and one.idle.is_set()]
        gevent.joinall([*ending, *self._arriving], timeout=None if deadline is None else max(deadline.left(), _DYING))


class StreamServer(SessionServer):
    """``gevent.server.StreamServer`` for the streams of sessions.

    `listener` is a :class:`~geyamux.Session`, whose peer's streams are served, or an address or a listening socket, whose
    connections become sessions; for these `config` are the settings and `backlog` and the TLS arguments are gevent's
    (``ssl_context``). `handle` is called with ``(stream, address)`` in a greenlet made by `spawn`: a Pool, its size, or a
    function like ``gevent.spawn``, the default. With a pool no more streams are accepted than it has room for. At most
    ``max_accept`` (100) streams of a session are accepted before other greenlets get their turn. Of gevent's hooks
    ``handle`` and ``do_close`` are called with streams, ``do_handle`` with connections, ``wrap_socket_and_handle`` never.

    ``serve_forever()`` returns when :meth:`stop` is called and, over a session, when that takes no more streams:
    ``session.exception`` says why. The server is a context manager; it stops at the end of the block. A server over a
    session serves it once: stopping says GoAway for the whole session, to another server of it, too.

    Raises ``TypeError`` where `config` or TLS is given for a session, ``ValueError`` for ``spawn=None``.
    """

    def __init__(
        self,
        listener: Any,
        handle: Callable[[Any, Any], object] | None = None,
        backlog: int | None = None,
        spawn: Any = "default",
        *,
        config: Config | None = None,
        announce: bool = True,
        **ssl_args: Any,
    ) -> None:
        listener = self._use(listener, config, announce, ssl_args)
        super().__init__(listener, handle, backlog, spawn, **ssl_args)
