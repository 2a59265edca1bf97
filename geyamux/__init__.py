"""geyamux: the Yamux stream multiplexer for gevent.

Thousands of cheap bidirectional streams over one connection. ::

    session = geyamux.connect(("127.0.0.1", 7000))
    with session.open() as stream:
        stream.sendall(b"hello\\n")
        print(stream.readline())

    for stream in geyamux.Server(conn):       # the other end
        gevent.spawn(handle, stream)

Either side opens and accepts; a :class:`Stream` is a file and a socket at once. The wire protocol is that of
hashicorp/yamux and of libp2p; ``spec.md`` describes it.
"""

import logging

from .config import Config
from .connect import connect, pair
from .errors import (
    ConfigError,
    KeepaliveTimeout,
    ProtocolError,
    RemoteError,
    RemoteGoAway,
    SessionClosed,
    SessionError,
    StreamClosed,
    StreamError,
    StreamReset,
    StreamsExhausted,
    TransportError,
    WriteTimeout,
    YamuxError,
)
from .frame import INITIAL_WINDOW, GoAwayCode
from .listener import Listener
from .session import Client, Server, Session
from .splicing import splice
from .stats import SessionStats, StreamStats
from .stream import Stream

__version__ = "0.1.0"

__all__ = [
    "INITIAL_WINDOW",
    "Client",
    "Config",
    "ConfigError",
    "GoAwayCode",
    "KeepaliveTimeout",
    "Listener",
    "ProtocolError",
    "RemoteError",
    "RemoteGoAway",
    "Server",
    "Session",
    "SessionClosed",
    "SessionError",
    "SessionStats",
    "Stream",
    "StreamClosed",
    "StreamError",
    "StreamReset",
    "StreamStats",
    "StreamsExhausted",
    "TransportError",
    "WriteTimeout",
    "YamuxError",
    "__version__",
    "connect",
    "pair",
    "splice",
]

logging.getLogger("geyamux").addHandler(logging.NullHandler())
