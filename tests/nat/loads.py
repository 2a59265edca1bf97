"""What many browsers do to a web server at once, and worse: a program, run as `loads.py HOST PORT` at the visitor's.

The server's /list has a line for each file, its SHA-256 and its size; a file's path is its digest, and so is that of an
upload. All clients connect first, and go at it together. Each says what was wrong with what it got; a body of another
length or digest, a connection that ends early and any error are wrong. Prints an object of JSON. It is no test.
"""

from __future__ import annotations

from gevent import monkey

monkey.patch_all()

import hashlib  # noqa: E402
import http.client  # noqa: E402
import itertools  # noqa: E402
import json  # noqa: E402
import os  # noqa: E402
import socket  # noqa: E402
import sys  # noqa: E402
import time  # noqa: E402
from collections.abc import Callable, Sequence  # noqa: E402

import gevent  # noqa: E402
from gevent.event import Event  # noqa: E402
from gevent.pool import Pool  # noqa: E402

TIMEOUT = 40.0
SMALL = 65536
UPLOAD = 262144
#: So slow, a reader of the 256 KiB that follow takes more than a second; and its system's buffer is soon full.
SLOW_PIECE, SLOW_PAUSE, SLOW_BUFFER = 16384, 0.08, 32768


class Client:
    """A connection, and what came over it. `files` are (digest, size)."""

    def __init__(self, address: tuple[str, int], files: Sequence[tuple[str, int]], number: int) -> None:
        self.small = [digest for digest, size in files if size <= SMALL]
        self.large = [digest for digest, size in files if size > SMALL]
        self.number = number
        self.received = 0
        self.conn = http.client.HTTPConnection(*address, timeout=TIMEOUT)

    def connect(self, *, buffer: int | None = None) -> None:
        if buffer is None:
            self.conn.connect()
            return
        sock = socket.socket()
        sock.settimeout(TIMEOUT)
        # Before it connects: the window is agreed on then.
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)
        sock.connect((self.conn.host, self.conn.port))
        self.conn.sock = sock

    @property
    def sock(self) -> socket.socket:
        """It is connected when this is asked for."""
        sock = self.conn.sock
        assert isinstance(sock, socket.socket)
        return sock

    def get(self, digest: str, piece: int = 262144, pause: float | None = None) -> None:
        """Get a file, on the connection that stays."""
        self.conn.request("GET", f"/{digest}")
        response = self.conn.getresponse()
        found = hashlib.sha256()
        while chunk := response.read(piece):
            found.update(chunk)
            self.received += len(chunk)
            if pause is not None:
                gevent.sleep(pause)
        self.check(response.status == 200, f"status {response.status}")
        self.check(response.length == 0, f"cut {response.length} bytes before its end")
        self.check(found.hexdigest() == digest, f"not what {digest} is")

    def read_all(self) -> tuple[bytes, bytes]:
        """Head and body of all that comes until the end."""
        data = b""
        while chunk := self.sock.recv(65536):
            data += chunk
        self.received += len(data)
        head, _, body = data.partition(b"\r\n\r\n")
        return head, body

    def check(self, condition: bool, what: str) -> None:
        if not condition:
            raise ValueError(what)


def browse(client: Client) -> None:
    """Several files over one connection."""
    for digest in client.small:
        client.get(digest)


def download(client: Client) -> None:
    """A large file, as fast as it comes."""
    client.get(client.large[client.number % len(client.large)])


def dawdle(client: Client) -> None:
    """A large file, much slower than it could come."""
    client.get(client.large[0], SLOW_PIECE, SLOW_PAUSE)


def ask_and_shut(client: Client) -> None:
    """Ask, say at once that nothing more will be sent, and read to the end."""
    digest = client.small[client.number % len(client.small)]
    client.sock.sendall(f"GET /{digest} HTTP/1.0\r\nHost: here\r\n\r\n".encode())
    client.sock.shutdown(socket.SHUT_WR)
    head, body = client.read_all()
    client.check(head.startswith(b"HTTP/1.1 200 "), f"{head!r}")
    client.check(hashlib.sha256(body).hexdigest() == digest, f"not what {digest} is")


def upload_and_shut(client: Client) -> None:
    """Upload, say at once that nothing more will be sent, and read the answer to the end."""
    body = os.urandom(UPLOAD)
    digest = hashlib.sha256(body).hexdigest()
    fields = f"Host: here\r\nContent-Length: {len(body)}\r\nConnection: close"
    client.sock.sendall(f"PUT /up/{digest} HTTP/1.1\r\n{fields}\r\n\r\n".encode() + body)
    client.sock.shutdown(socket.SHUT_WR)
    head, _ = client.read_all()
    client.check(head.startswith(b"HTTP/1.1 201 "), f"{head!r}")


#: How many of each kind there are; 100 in all.
CROWD: dict[Callable[[Client], None], int] = {
    browse: 40,
    download: 10,
    dawdle: 10,
    ask_and_shut: 20,
    upload_and_shut: 20,
}


def run(address: tuple[str, int]) -> dict[str, object]:
    """All of the crowd at once; what came of it."""
    files = list_files(address)
    tasks = [task for task, count in CROWD.items() for _ in range(count)]
    numbers = itertools.count()
    clients = [Client(address, files, next(numbers)) for _ in tasks]
    go, wrong = Event(), []
    ready = itertools.count(1)

    def one(task: Callable[[Client], None], client: Client) -> None:
        try:
            client.connect(buffer=SLOW_BUFFER if task is dawdle else None)
            if next(ready) == len(tasks):
                go.set()
            client.check(go.wait(TIMEOUT), "not all could connect")
            task(client)
        except (OSError, ValueError, http.client.HTTPException) as error:
            wrong.append(f"{task.__name__} {client.number}: {error!r}")
        finally:
            client.conn.close()

    pool, began = Pool(len(tasks)), time.monotonic()
    for task, client in zip(tasks, clients, strict=True):
        pool.spawn(one, task, client)
    pool.join()
    received = sum(client.received for client in clients)
    return {"clients": len(tasks), "wrong": wrong, "received": received, "seconds": time.monotonic() - began}


def list_files(address: tuple[str, int]) -> list[tuple[str, int]]:
    """Digest and size of each file there is."""
    conn = http.client.HTTPConnection(*address, timeout=TIMEOUT)
    conn.request("GET", "/list")
    lines = conn.getresponse().read().decode().splitlines()
    conn.close()
    return [(digest, int(size)) for digest, size in (line.split() for line in lines)]


if __name__ == "__main__":
    print(json.dumps(run((sys.argv[1], int(sys.argv[2])))))
