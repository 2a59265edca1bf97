"""Other implementations of Yamux as child processes, and geyamux behind the same commands.

A `Side` opens streams and serves those of the other side: `RemoteSide` is a child process that is told
so on its standard input, `LocalSide` is a geyamux session in this process. What a stream does is said by
the line that it begins with; README.md has the table. Both sides report an `Outcome` for each stream,
and `check_*` compare it with what the `Job` must come to.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import random
import signal
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol, TypeAlias

import gevent
import gevent.pool
from gevent import socket, subprocess
from gevent.event import AsyncResult, Event
from gevent.lock import BoundedSemaphore

import geyamux

# Prime, so that a piece of a frame that is lost, doubled or moved shows in the digest.
PATTERN_PERIOD = 65521
DEFAULT_CHUNK = 65536
LARGEST_CHUNK = 1 << 20
# For one step of a test; below the time limit of a test, so that a hang is told with its place.
PATIENCE = 20.0


def _pattern_block() -> bytes:
    block = bytearray()
    x = 1
    for _ in range(PATTERN_PERIOD):
        x = (x * 1664525 + 1013904223) & 0xFFFFFFFF
        block.append(x >> 24)
    return bytes(block)


_PATTERN = memoryview(_pattern_block() * (LARGEST_CHUNK // PATTERN_PERIOD + 2))


def pattern(size: int, seed: int, chunk: int = DEFAULT_CHUNK) -> Iterator[memoryview]:
    """Yield `size` bytes of the endlessly repeated pattern, from offset `seed` on, in pieces of `chunk`."""
    for position in range(0, size, chunk):
        start = (seed + position) % PATTERN_PERIOD
        yield _PATTERN[start : start + min(chunk, size - position)]


def pattern_digest(size: int, seed: int) -> str:
    digest = hashlib.sha256()
    for piece in pattern(size, seed, LARGEST_CHUNK):
        digest.update(piece)
    return digest.hexdigest()


EMPTY_DIGEST = pattern_digest(0, 0)


@dataclasses.dataclass(frozen=True)
class Job:
    """One stream to open. `half`: the payload's end is told by FIN, and the answer is read after it."""

    verb: str
    size: int
    seed: int = 0
    chunk: int = DEFAULT_CHUNK
    half: bool = False

    def request_line(self) -> bytes:
        size = b"*" if self.half else b"%d" % self.size
        if self.verb in ("echo", "digest"):
            return b"%s %s\n" % (self.verb.encode(), size)
        if self.verb == "source":
            return b"source %d %d\n" % (self.size, self.seed)
        if self.verb == "reset":
            return b"reset %d\n" % self.size
        if self.verb == "abandon":
            return b"abandon\n"
        if self.verb in ("push", "desert", "hold"):
            return b"drain\n"
        raise ValueError(self.verb)

    def digest(self) -> str:
        return pattern_digest(self.size, self.seed)

    def digest_answer(self) -> bytes:
        return b"%d %s\n" % (self.size, self.digest().encode())


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What one side saw of one stream; `end` is "eof", "reset", "done" or "error: ..."."""

    verb: str
    sent: int
    received: int
    sha256: str
    end: str


class Side(Protocol):
    def run(self, jobs: Sequence[Job], at_once: int = 32) -> list[Outcome]: ...

    def served(self, count: int) -> list[Outcome]: ...


# --- what must come out ---


def check_opened(jobs: Sequence[Job], outcomes: Sequence[Outcome]) -> None:
    assert len(outcomes) == len(jobs)
    for job, outcome in zip(jobs, outcomes, strict=True):
        if job.verb == "reset":
            # How far the writer had come when the RST struck is a matter of time.
            assert (outcome.received, outcome.end) == (0, "reset"), (job, outcome)
        else:
            assert outcome == _expected_opened(job), job


def _expected_opened(job: Job) -> Outcome:
    if job.verb == "echo":
        return Outcome("echo", job.size, job.size, job.digest(), "eof")
    if job.verb == "digest":
        answer = job.digest_answer()
        return Outcome("digest", job.size, len(answer), hashlib.sha256(answer).hexdigest(), "eof")
    if job.verb == "source":
        return Outcome("source", 0, job.size, job.digest(), "eof")
    return Outcome(job.verb, job.size, 0, "", "done")


def check_served(jobs: Sequence[Job], outcomes: Sequence[Outcome]) -> None:
    """Compare without order. Of a stream that was reset it is only certain that its end was not a clean one."""
    reset = [job for job in jobs if job.verb in ("abandon", "desert")]
    assert sum(outcome.end == "reset" for outcome in outcomes) == len(reset)
    whole = Counter(outcome for outcome in outcomes if outcome.end != "reset")
    assert whole == Counter(_expected_served(job) for job in jobs if job not in reset)


def _expected_served(job: Job) -> Outcome:
    if job.verb == "echo":
        return Outcome("echo", job.size, job.size, job.digest(), "eof")
    if job.verb == "digest":
        return Outcome("digest", len(job.digest_answer()), job.size, job.digest(), "eof")
    if job.verb == "source":
        return Outcome("source", job.size, 0, EMPTY_DIGEST, "eof")
    if job.verb == "reset":
        return Outcome("reset", 0, job.size, job.digest(), "eof")
    return Outcome("drain", 0, job.size, job.digest(), "eof")


def transfer(opener: Side, acceptor: Side, jobs: Sequence[Job], at_once: int = 32, timeout: float = PATIENCE) -> None:
    """Run the jobs from one side to the other and check what both saw."""
    with gevent.Timeout(timeout, TimeoutError(f"{len(jobs)} jobs not done after {timeout} s")):
        check_opened(jobs, opener.run(jobs, at_once))
        check_served(jobs, acceptor.served(len(jobs)))


def at_the_same_time(*calls: Callable[[], Any]) -> None:
    """Call each in a greenlet and wait for all; the first error ends the others and is raised."""
    greenlets = [gevent.spawn(call) for call in calls]
    try:
        gevent.joinall(greenlets, raise_error=True)
    finally:
        gevent.killall(greenlets)


def random_jobs(seed: str, count: int, verbs: Sequence[str]) -> list[Job]:
    """Jobs with sizes around everything that matters: nothing, single bytes, a frame, and beyond a window."""
    rng = random.Random(seed)
    jobs = []
    for _ in range(count):
        verb, _, half = rng.choice(verbs).partition("+")
        limit = rng.choices((1, 16, 4096, 65536, 700_000), (5, 20, 45, 25, 5))[0]
        chunk = rng.choice((1024, 5000, 65536, 300_000))
        jobs.append(Job(verb, rng.randint(0, limit), rng.randrange(PATTERN_PERIOD), chunk, half == "half"))
    return jobs


# --- geyamux ---


class LocalSide:
    """A geyamux session that serves what the other side opens, until the session ends or takes no more."""

    def __init__(self, session: geyamux.Session, *, serve: bool = True) -> None:
        self.session = session
        self.acceptor = gevent.spawn(self._accept_all) if serve else None
        self._handlers = gevent.pool.Group()
        self._served: list[Outcome] = []
        self._served_more = Event()

    def run(self, jobs: Sequence[Job], at_once: int = 32) -> list[Outcome]:
        pool = gevent.pool.Pool(at_once)
        try:
            return list(pool.imap(self.run_one, jobs))
        finally:
            pool.kill()

    def run_one(self, job: Job) -> Outcome:
        stream = self.session.open()
        writer = gevent.spawn(_write_request, stream, job)
        if job.verb in ("push", "abandon", "desert", "hold"):
            sent = writer.get()
            if job.verb == "push":
                stream.close()
            elif job.verb != "hold":
                # A stream whose SYN has not left yet would vanish, and the other side would never know of it.
                stream.flush()
                stream.reset()
            return Outcome(job.verb, sent, 0, "", "done")
        received, digest, end = _read_to_end(stream)
        stream.close()
        return Outcome(job.verb, writer.get(), received, digest, end)

    def served(self, count: int) -> list[Outcome]:
        while len(self._served) < count:
            self._served_more.clear()
            self._served_more.wait()
        taken, self._served = self._served, []
        return taken

    def stop(self) -> None:
        self._handlers.kill()
        if self.acceptor is not None:
            self.acceptor.kill()

    def _accept_all(self) -> None:
        for stream in self.session:
            self._handlers.spawn(self._serve, stream)

    def _serve(self, stream: geyamux.Stream) -> None:
        outcome = serve(stream)
        self._served.append(outcome)
        self._served_more.set()


def _write_request(stream: geyamux.Stream, job: Job) -> int:
    """Write the line and the payload; an RST that comes before the end is for the reader to report."""
    sent = 0
    try:
        stream.sendall(job.request_line())
        if job.verb == "abandon":
            assert stream.read(1) == b"+"
        for piece in () if job.verb == "source" else pattern(job.size, job.seed, job.chunk):
            stream.sendall(piece)
            sent += len(piece)
        if job.half:
            stream.close_write()
    except geyamux.StreamReset:
        pass
    return sent


def _read_to_end(stream: geyamux.Stream) -> tuple[int, str, str]:
    digest = hashlib.sha256()
    received = 0
    try:
        while data := stream.recv(DEFAULT_CHUNK):
            digest.update(data)
            received += len(data)
    except (geyamux.StreamReset, geyamux.SessionError) as error:
        return received, digest.hexdigest(), _end_of(error)
    return received, digest.hexdigest(), "eof"


def serve(stream: geyamux.Stream) -> Outcome:
    """Do what the first line of a stream asks for, and close it."""
    verb, sent, received, digest = "", 0, 0, hashlib.sha256()
    try:
        with contextlib.closing(stream):
            words = stream.readline().decode().split()
            verb = words[0]
            if verb == "abandon":
                stream.sendall(b"+")
            left = None if words[1:2] in ([], ["*"]) else int(words[1])
            while verb != "source" and left != 0:
                data = stream.recv(DEFAULT_CHUNK if left is None else min(DEFAULT_CHUNK, left))
                if not data:
                    break
                left = None if left is None else left - len(data)
                received += len(data)
                digest.update(data)
                if verb == "echo":
                    stream.sendall(data)
                    sent += len(data)
            if verb == "digest":
                answer = b"%d %s\n" % (received, digest.hexdigest().encode())
                stream.sendall(answer)
                sent = len(answer)
            elif verb == "source":
                for piece in pattern(int(words[1]), int(words[2])):
                    stream.sendall(piece)
                    sent += len(piece)
            elif verb == "reset":
                stream.reset()
    except (geyamux.StreamReset, geyamux.SessionError) as error:
        return Outcome(verb, sent, received, digest.hexdigest(), _end_of(error))
    return Outcome(verb, sent, received, digest.hexdigest(), "eof")


def _end_of(error: Exception) -> str:
    if isinstance(error, geyamux.StreamReset) and error.remote:
        return "reset"
    return f"error: {error!r}"


# --- the other implementation ---


class RemoteSide:
    """A peer program: one JSON object a line each way. Its standard error is kept, as a list of lines."""

    def __init__(self, command: Sequence[str]) -> None:
        self.log: list[str] = []
        self._replies: dict[int, AsyncResult[dict[str, Any]]] = {}
        self._events: dict[str, AsyncResult[dict[str, Any]]] = {}
        pipe = subprocess.PIPE
        self._process = process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe)
        assert process.stdin and process.stdout and process.stderr
        self._input, self._input_turn = process.stdin, BoundedSemaphore()
        self._output, self._errors = process.stdout, process.stderr
        self._readers = [gevent.spawn(self._read_replies), gevent.spawn(self._read_log)]

    def event(self, name: str) -> dict[str, Any]:
        """Wait for what the peer tells without being asked: "listening", with its port, and "connected"."""
        return _answer(self._events.setdefault(name, AsyncResult()), PATIENCE)

    def ask(self, do: str, **arguments: Any) -> dict[str, Any]:
        """Send a command and wait for its answer. Several greenlets may ask at once."""
        number = len(self._replies)
        reply = self._replies[number] = AsyncResult()
        with self._input_turn:
            self._input.write(json.dumps({"id": number, "do": do, **arguments}).encode() + b"\n")
            self._input.flush()
        answer = _answer(reply)
        if "error" in answer:
            raise PeerError(answer["error"])
        return answer

    def run(self, jobs: Sequence[Job], at_once: int = 32) -> list[Outcome]:
        wire = [dataclasses.asdict(job) for job in jobs]
        return _outcomes(self.ask("run", jobs=wire, at_once=at_once))

    def served(self, count: int) -> list[Outcome]:
        return _outcomes(self.ask("served", count=count))

    def stop(self) -> None:
        """Let it end by itself, and end it if it does not."""
        with contextlib.suppress(BrokenPipeError):
            self._input.close()
        try:
            code = self._process.wait(timeout=PATIENCE)
        except BaseException:
            self._process.send_signal(signal.SIGKILL)
            self._process.wait()
            raise
        finally:
            gevent.joinall(self._readers, timeout=PATIENCE)
            self._output.close()
            self._errors.close()
        assert code == 0, (code, self.log)

    def _read_replies(self) -> None:
        for line in self._output:
            message = json.loads(line)
            if "id" in message:
                self._replies[message["id"]].set(message)
            else:
                self._events.setdefault(message["event"], AsyncResult()).set(message)
        gone = PeerError("the peer program has ended")
        for waiting in (*self._replies.values(), *self._events.values()):
            if not waiting.ready():
                waiting.set_exception(gone)

    def _read_log(self) -> None:
        for line in self._errors:
            self.log.append(line.decode(errors="replace").rstrip())


class PeerError(Exception):
    """A command failed, by the peer's own words, or the peer program has ended."""


def _answer(waiting: AsyncResult[dict[str, Any]], timeout: float | None = None) -> dict[str, Any]:
    answer = waiting.get(timeout=timeout)
    assert answer is not None
    return answer


def _outcomes(answer: dict[str, Any]) -> list[Outcome]:
    return [Outcome(**outcome) for outcome in answer["outcomes"]]


# --- both ---


@dataclasses.dataclass
class Link:
    """A session with a peer program: `session` and `local` are geyamux, `peer` is the other end."""

    session: geyamux.Session
    local: LocalSide
    peer: RemoteSide

    def settle(self) -> None:
        """Return when each side has handled all that the other had sent."""
        # A ping may overtake what waits to be sent, but not what the round trip before it took along.
        self.session.ping(timeout=PATIENCE)
        self.session.ping(timeout=PATIENCE)

    def end(self) -> None:
        """Close the session in good order and return when the peer has seen its end."""
        self.session.close()
        with gevent.Timeout(PATIENCE, TimeoutError("the peer does not see the end of the session")):
            self.peer.ask("ended")


LinkMaker: TypeAlias = Callable[..., contextlib.AbstractContextManager[Link]]


@contextlib.contextmanager
def linked(
    command: Sequence[str],
    role: str,
    config: geyamux.Config | None = None,
    *,
    serve: bool = True,
) -> Iterator[Link]:
    """Start a peer program and a geyamux session with it; `role` is what geyamux is, "client" or "server"."""
    with contextlib.ExitStack() as cleanup:
        session: geyamux.Session
        if role == "client":
            peer = RemoteSide([*command, "-listen"])
            cleanup.callback(peer.stop)
            address = ("127.0.0.1", peer.event("listening")["port"])
            session = geyamux.connect(address, timeout=PATIENCE, config=config)
        else:
            # Not create_server: gevent's makes a socket of the standard library.
            with socket.socket() as listener:
                listener.bind(("127.0.0.1", 0))
                listener.listen(1)
                host, port = listener.getsockname()
                peer = RemoteSide([*command, "-dial", f"{host}:{port}"])
                cleanup.callback(peer.stop)
                listener.settimeout(PATIENCE)
                session = geyamux.Server(listener.accept()[0], config)
        cleanup.callback(session.close)
        peer.event("connected")
        local = LocalSide(session, serve=serve)
        cleanup.callback(local.stop)
        yield Link(session, local, peer)
