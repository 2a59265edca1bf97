"""A peer in a process of its own, over TCP, TLS and a Unix socket at once; to be stopped, killed and cut off.

`python peer.py HOST DIRECTORY` prints its two ports and serves; the Unix socket and the certificate are in the directory.
What a stream's first byte says is done with it: Echo, Read, Send, or Hold and never read again.
"""

from __future__ import annotations

import contextlib
import os
import ssl
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from typing import Any

import gevent
import gevent.ssl
from gevent import socket as gsocket

from geyamux import Server, SessionError
from support.links import authority

KINDS = ("tcp", "tls", "unix")


class Peer:
    """The process, seen from the test."""

    def __init__(self, process: subprocess.Popen[bytes], directory: str, host: str) -> None:
        self.process = process
        self.pid = process.pid
        self._directory = directory
        assert process.stdout is not None
        self._ports = [int(word) for word in process.stdout.readline().split()]
        self._host = host

    def connect(self, kind: str, sock: Any = None, buffers: int | None = None) -> Any:
        """A connected socket of one of `KINDS`; `sock` is one to be used for it."""
        if kind == "unix":
            sock = gsocket.socket(gsocket.AF_UNIX)
        elif sock is None:
            sock = gsocket.socket()
        if buffers is not None:
            sock.setsockopt(gsocket.SOL_SOCKET, gsocket.SO_SNDBUF, buffers)
        if kind == "unix":
            sock.connect(os.path.join(self._directory, "unix"))
            return sock
        sock.connect((self._host, self._ports[kind == "tls"]))
        sock.setsockopt(gsocket.IPPROTO_TCP, gsocket.TCP_NODELAY, 1)
        if kind == "tls":
            context = gevent.ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
            authority().configure_trust(context)
            return context.wrap_socket(sock, server_hostname="localhost")
        return sock

    @property
    def address(self) -> tuple[str, int]:
        """Where it listens without encryption."""
        return self._host, self._ports[0]

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


@contextlib.contextmanager
def peer_process(host: str = "127.0.0.1", prefix: list[str] | None = None) -> Iterator[Peer]:
    """Start one; `prefix` are words before its command. Killed at the end, though it be stopped."""
    with tempfile.TemporaryDirectory() as directory:
        authority().issue_cert("localhost").private_key_and_cert_chain_pem.write_to_path(f"{directory}/pem")
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(os.path.abspath, sys.path))}
        command = [*(prefix or []), sys.executable, os.path.abspath(__file__), host, directory]
        process = subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0)
        try:
            yield Peer(process, directory, host)
        finally:
            process.kill()
            process.wait()
            for pipe in (process.stdin, process.stdout):
                assert pipe is not None
                pipe.close()


# --- inside that process ---


def _do(stream: Any) -> None:
    with contextlib.suppress(SessionError):
        job = stream.recv(1)
        while job == b"S":
            stream.sendall(bytes(65536))
        while job in (b"E", b"R") and (data := stream.recv(65536)):
            if job == b"E":
                stream.sendall(data)
        if job != b"H":
            stream.close()


def _serve(conn: Any) -> None:
    with contextlib.suppress(OSError):
        for stream in Server(conn):
            gevent.spawn(_do, stream)


def _listen(sock: Any, address: Any, context: Any = None) -> Any:
    sock.setsockopt(gsocket.SOL_SOCKET, gsocket.SO_RCVBUF, 65536)
    sock.bind(address)
    sock.listen(50)

    def serve(conn: Any) -> None:
        _serve(conn if context is None else context.wrap_socket(conn, server_side=True))

    def accept() -> None:
        while True:
            conn, _ = sock.accept()
            gevent.spawn(serve, conn)

    gevent.spawn(accept)
    return sock.getsockname()


def main(host: str, directory: str) -> None:
    context = gevent.ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(f"{directory}/pem")
    _listen(gsocket.socket(gsocket.AF_UNIX), f"{directory}/unix")
    plain = _listen(gsocket.socket(), (host, 0))
    encrypted = _listen(gsocket.socket(), (host, 0), context)
    print(plain[1], encrypted[1], flush=True)
    gevent.spawn(_end_with_parent)
    gevent.wait()


def _end_with_parent() -> None:
    """The parent may have been killed itself: its end of our input closes then."""
    gevent.get_hub().threadpool.apply(os.read, (0, 1))
    os._exit(0)


if __name__ == "__main__":
    main(*sys.argv[1:])
