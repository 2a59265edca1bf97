"""One of several server processes behind a balancer, or beside each other on one port.

    python backend.py NAME PORT [--share]

Listens on that port of 127.0.0.1 (0: a free one; --share: one that others listen on, too), prints the port, and answers
each line of each stream with NAME and the line.
"""

import sys
from typing import Any

import gevent
from gevent import socket
from gevent.server import StreamServer

import geyamux

name, port, share = sys.argv[1].encode(), int(sys.argv[2]), "--share" in sys.argv


def serve(conn: Any, _address: Any) -> None:
    for stream in geyamux.Server(conn):
        gevent.spawn(answer, stream)


def answer(stream: geyamux.Stream) -> None:
    with stream:
        for line in stream:
            stream.sendall(name + b" " + line)


listener = socket.socket()
listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
if share:
    # The system spreads connections over the sockets that were bound so.
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
listener.bind(("127.0.0.1", port))
listener.listen(128)
print(listener.getsockname()[1], flush=True)
StreamServer(listener, serve).serve_forever()
