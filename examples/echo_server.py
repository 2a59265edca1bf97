"""Echo lines on every stream of every connection: the shortest useful server.

    python echo_server.py [port]

Then run echo_client.py beside it. Ctrl-C ends it.
"""

import contextlib
import sys

import gevent
from gevent.server import StreamServer

import geyamux


def echo(stream):
    with stream:
        for line in stream:
            stream.sendall(line)


def serve(conn, address):
    for stream in geyamux.Server(conn):
        gevent.spawn(echo, stream)


server = StreamServer(("127.0.0.1", int(sys.argv[1]) if sys.argv[1:] else 7000), serve)
server.start()
print("listening on port", server.server_port, flush=True)
with contextlib.suppress(KeyboardInterrupt):
    server.serve_forever()
