"""Open a stream to echo_server.py, send a line, print the line that comes back: the shortest useful client.

    python echo_client.py [port]

Prints b'hello\\n'.
"""

import sys

import geyamux

address = ("127.0.0.1", int(sys.argv[1]) if sys.argv[1:] else 7000)
with geyamux.connect(address) as session, session.open() as stream:
    stream.sendall(b"hello\n")
    print(stream.readline())
