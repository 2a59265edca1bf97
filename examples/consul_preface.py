"""How do I put Yamux behind a preface, as Consul and Nomad do?

One port for several protocols: a first byte says which, and what follows it is Yamux.

    python consul_preface.py

A Consul server reads one byte from each connection; 4 means that Yamux follows. (In Nomad it is 6.) The client sends its
byte on the plain socket, and makes it a session then. The server may read as much as comes: what it has read beyond the
byte it hands to the session as `initial`. The script is the client, and starts the server as a process.
"""

import contextlib
import sys

import gevent
from gevent import socket, subprocess
from gevent.server import StreamServer

import geyamux

YAMUX = b"\x04"
STATUS = b"?"


def serve(conn, address):
    conn.settimeout(10)  # a connection that says nothing is dropped; a session has timeouts of its own
    try:
        first = conn.recv(4096)
    except OSError:
        return
    if first[:1] == STATUS:
        conn.sendall(b"the server is up\n")
    elif first[:1] == YAMUX:
        with geyamux.Server(conn, initial=first[1:]) as session:
            for stream in session:
                gevent.spawn(answer, stream)


def answer(stream):
    with stream:
        question = stream.readline().decode().strip()
        stream.sendall(f"{question}: answered on stream {stream.stream_id}\n".encode())


def server():
    listening = StreamServer(("127.0.0.1", 0), serve)
    listening.start()
    print(listening.server_port, flush=True)
    with contextlib.suppress(KeyboardInterrupt):
        listening.serve_forever()


def demo(address):
    with socket.create_connection(address, timeout=10) as conn:
        conn.sendall(STATUS)
        print("plain:", conn.makefile().readline().strip())

    conn = socket.create_connection(address, timeout=10)
    conn.sendall(YAMUX)
    with geyamux.Client(conn) as session:
        for question in "members", "leader":
            with session.open() as stream:
                stream.settimeout(10)
                stream.sendall(f"{question}\n".encode())
                print("yamux:", stream.readline().decode().strip())

    with socket.create_connection(address, timeout=10) as conn:
        conn.sendall(b"\x7f")
        print("another byte:", conn.recv(1) or "the server hangs up")


if __name__ == "__main__":
    if sys.argv[1:] == ["server"]:
        server()
    else:
        with subprocess.Popen([sys.executable, __file__, "server"], stdout=subprocess.PIPE) as process:
            try:
                demo(("127.0.0.1", int(process.stdout.readline())))
            finally:
                process.terminate()
