"""What stands at the far end of a tunnel, a TCP or Unix service, and its client at the near end.

The first line of a connection says what is wanted, in the words of tests/interop: `echo SIZE`, `digest SIZE`,
`source SIZE SEED`, where a SIZE of `*` means: until EOF. What comes out is an `Outcome`, which `check` compares.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import gevent
import gevent.pool
from gevent import socket
from gevent.event import Event
from gevent.server import StreamServer

from interop.peers import EMPTY_DIGEST, Job, Outcome, check_opened, pattern
from support.waiting import wait_for

CHUNK = 65536

#: More than a window of most, in either half.
DOWNLOAD = Job("source", 4_000_000, 11)


def connect(address: str) -> Any:
    """A connection to `host:port`, or to the path of a Unix socket."""
    if address.startswith("/"):
        sock = socket.socket(socket.AF_UNIX)
        sock.connect(address)
        return sock
    host, _, port = address.rpartition(":")
    return socket.create_connection((host, int(port)))


class Service:
    """Use it in a ``with``. While `gate` is cleared, every `source` halts in the middle."""

    def __init__(self, path: str | None = None) -> None:
        self.gate = Event()
        self.gate.set()
        #: How many wait at the gate.
        self.halted = 0
        #: (bytes, digest) of each upload that came to its end.
        self.uploads: list[tuple[int, str]] = []
        self._listener = _unix_listener(path) if path else ("127.0.0.1", 0)
        self._handlers = gevent.pool.Pool()
        self._server = StreamServer(self._listener, self._serve, spawn=self._handlers)
        self._server.start()
        self.address = path or f"127.0.0.1:{self._server.server_port}"

    @property
    def busy(self) -> int:
        """How many connections it has."""
        return len(self._handlers)

    def __enter__(self) -> Service:
        return self

    def __exit__(self, *exc: object) -> None:
        self._server.stop(timeout=0)
        if isinstance(self._listener, socket.socket):
            self._listener.close()

    def _serve(self, sock: Any, _address: object) -> None:
        try:
            with sock, sock.makefile("rb") as file:
                verb, *words = file.readline().decode().split()
                getattr(self, f"_{verb}")(sock, file, *words)
        except OSError:
            pass  # a client that went away, or whose tunnel did

    def _source(self, sock: Any, _file: Any, size: str, seed: str) -> None:
        pieces = list(pattern(int(size), int(seed)))
        for number, piece in enumerate(pieces):
            if number == len(pieces) // 2:
                self.halted += 1
                self.gate.wait()
                self.halted -= 1
            sock.sendall(piece)

    def _echo(self, sock: Any, file: Any, size: str) -> None:
        for piece in _pieces(file, size):
            sock.sendall(piece)

    def _digest(self, sock: Any, file: Any, size: str) -> None:
        received, digest = 0, hashlib.sha256()
        for piece in _pieces(file, size):
            received += len(piece)
            digest.update(piece)
        self.uploads.append((received, digest.hexdigest()))
        sock.sendall(b"%d %s\n" % (received, digest.hexdigest().encode()))


def _unix_listener(path: str) -> Any:
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(path)
    listener.listen(128)
    return listener


def _pieces(file: Any, size: str) -> Any:
    left = None if size == "*" else int(size)
    while left is None or left > 0:
        data = file.read1(CHUNK if left is None else min(CHUNK, left))
        if not data:
            return
        left = None if left is None else left - len(data)
        yield data


def run(address: str, job: Job) -> Outcome:
    """Do the job over a connection to that address."""
    try:
        sock = connect(address)
    except ConnectionResetError:
        # Accepted by the system, and given up by who listens before the call could return.
        return Outcome(job.verb, 0, 0, EMPTY_DIGEST, "reset")
    with sock:
        writer = gevent.spawn(_write, sock, job)
        received, digest, end = 0, hashlib.sha256(), "eof"
        try:
            while data := sock.recv(CHUNK):
                received += len(data)
                digest.update(data)
        except ConnectionResetError:
            end = "reset"
        return Outcome(job.verb, writer.get(), received, digest.hexdigest(), end)


def _write(sock: Any, job: Job) -> int:
    sent = 0
    try:
        sock.sendall(job.request_line())
        for piece in () if job.verb == "source" else pattern(job.size, job.seed, job.chunk):
            sock.sendall(piece)
            sent += len(piece)
        if job.half:
            sock.shutdown(socket.SHUT_WR)
    except OSError:
        pass  # what the reader sees of it is the outcome
    return sent


def check(address: str, jobs: Sequence[Job]) -> None:
    """Do the jobs all at once; each must come to the end that it should."""
    pool = gevent.pool.Pool(len(jobs))
    try:
        check_opened(jobs, list(pool.imap(run, [address] * len(jobs), jobs)))
    finally:
        pool.kill()


def under_way(service: Service, address: str) -> gevent.Greenlet[..., Outcome]:
    """The DOWNLOAD as it is done, of which the service holds back the second half until its gate is opened."""
    service.gate.clear()
    download = gevent.spawn(run, address, DOWNLOAD)
    wait_for(lambda: service.halted == 1, "half of the download")
    return download


def refused(address: str) -> bool:
    """Whether a connection there is reset. Nothing is written: the system tells of a reset once, to who asks first."""
    try:
        with connect(address) as sock:
            sock.recv(1)
    except ConnectionResetError:
        return True
    return False


def many_jobs(*, half: bool = False) -> list[Job]:
    """Small ones and large ones, in both directions. With `half` the end of what is sent is told by EOF alone."""
    small = [Job(verb, 100 + 997 * n, n, half=half) for n in range(10) for verb in ("echo", "digest")]
    large = [Job("source", 3_000_000, 5), Job("digest", 3_000_000, 6, half=half), Job("echo", 1_000_000, 7, half=half)]
    return [*small, *(Job("source", 10_000, n) for n in range(10)), *large]
