"""A server as users write one, in the process of the test, and how a client asks it for something.

Every line of every stream is sent back, until one says ``hold``: nothing is read from that stream then. What it saw is
kept: its sessions, and why a connection did not become one.
"""

from __future__ import annotations

import contextlib
from typing import Any

import gevent
import gevent.server
from gevent import socket as gsocket
from gevent.queue import Queue
from gevent.ssl import SSLContext

from geyamux import Config, Server, Session, SessionError, Stream

PATIENCE = 10.0
#: The longest line of the PROXY protocol, its end included.
_LONGEST_PROXY_LINE = 107


class Service:
    """It listens on a free port of 127.0.0.1; use it in a ``with``."""

    def __init__(
        self,
        config: Config | None = None,
        *,
        ssl_context: SSLContext | None = None,
        handshake_timeout: float = PATIENCE,
    ) -> None:
        self.config = config
        self.handshake_timeout = handshake_timeout
        #: Each session as it begins, and each error of a connection that did not become one.
        self.begun: Queue[Session] = Queue()
        self.refused: Queue[OSError] = Queue()
        self._sessions: list[Session] = []
        # The session does the handshake, within the socket's timeout: gevent's own has none.
        tls: Any = {} if ssl_context is None else {"ssl_context": ssl_context, "do_handshake_on_connect": False}
        self._server = gevent.server.StreamServer(("127.0.0.1", 0), self._serve, **tls)

    def __enter__(self) -> Service:
        self._server.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._server.stop()
        for session in self._sessions:
            session.abort()

    @property
    def port(self) -> int:
        return int(self._server.address[1])

    @property
    def address(self) -> tuple[str, int]:
        return "127.0.0.1", self.port

    # Any: what gevent's servers hand over.
    def _serve(self, conn: Any, _address: Any) -> None:
        conn.settimeout(self.handshake_timeout)
        try:
            session = Server(conn, self.config)
        except OSError as error:
            self.refused.put(error)
            return
        self._sessions.append(session)
        self.begun.put(session)
        with contextlib.suppress(SessionError):
            for stream in session:
                gevent.spawn(self._echo, stream)

    def _echo(self, stream: Stream) -> None:
        with contextlib.suppress(OSError), stream:
            for line in stream:
                if line == b"hold\n":
                    stream.session.join()
                stream.sendall(line)


# Any: a gevent socket.
def read_proxy_line(conn: Any) -> tuple[bytes, bytes]:
    """The line that a balancer sends ahead of all (PROXY protocol, version 1), and what came with it of what follows."""
    data = b""
    while b"\r\n" not in data[:_LONGEST_PROXY_LINE]:
        chunk = conn.recv(4096) if len(data) < _LONGEST_PROXY_LINE else b""
        if not chunk:
            raise OSError(f"no line of the PROXY protocol: {data!r}")
        data += chunk
    line, _, rest = data.partition(b"\r\n")
    return line, rest


def ask(session: Session, line: bytes = b"hello\n") -> bytes:
    """Send a line on a new stream and return the one that comes back."""
    with session.open() as stream:
        stream.settimeout(PATIENCE)
        stream.sendall(line)
        return stream.readline()


def wait_for_bytes(conn: Any, more_than: int) -> None:
    """Return when more bytes than that wait in the connection. None is taken."""
    with gevent.Timeout(PATIENCE):
        while len(conn.recv(4096, gsocket.MSG_PEEK)) <= more_than:
            gevent.sleep(0.005)
