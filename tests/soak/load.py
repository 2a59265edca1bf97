"""What the two ends of a stream do with it in a soak run: one pair of functions for each kind of use.

Whoever opens says in a header what the stream is for; the acceptor plays the other part. Either process opens. Each end
keeps a record of what it wrote, finished, read and gave up, for the ledger. A function here raises what the stream
raises; who called it tells the expected from the rest.
"""

from __future__ import annotations

import contextlib
import hashlib
import random
import struct
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import gevent

from geyamux import Session, Stream, StreamReset

from .guard import Guard

#: Of a stream: its label, what it is for, a size, and a number that depends on that.
HEADER = struct.Struct("!8sBII")
#: Of a request and of an answer: its number, and how much follows.
CALL = struct.Struct("!II")
#: `settimeout` of every stream, and what `open` may take.
PATIENCE = 8.0
#: For one stream from its begin to its end.
LONGEST = 40.0
#: What a writer sends at least before it must hear that its reader is gone: more than any window here, twice.
_BEYOND_WINDOWS = 8 << 20
_BLOCK = random.Random(1).randbytes(1 << 20)
_DIGEST = 32


class Talk:
    """One end of a stream at work."""

    #: Seeded faults, by name: they show that the run notices.
    faults: frozenset[str] = frozenset()
    _leaked: ClassVar[list[bytes]] = []

    def __init__(self, guard: Guard, rng: random.Random, stream: Stream, side: str, label: bytes, what: str) -> None:
        self.guard = guard
        self.rng = rng
        self.stream = stream
        self.side = side
        self.label = label
        self.what = what
        self.wrote = self.read = 0
        self.wrote_digest, self.read_digest = hashlib.sha256(), hashlib.sha256()
        #: Our FIN is behind everything written.
        self.finished = False
        self.was_late = False
        #: How reading ended: "eof", the name of an error, or not at all.
        self.end: str | None = None
        #: The code of the peer's reset.
        self.code: int | None = None
        #: The code of our own reset; None while there was none.
        self.gave_up: int | None = None

    def record(self) -> dict[str, Any]:
        return {
            "label": self.label.hex(),
            "session": self.stream.session.name,
            "side": self.side,
            "what": self.what,
            "wrote": self.wrote,
            "wrote_digest": self.wrote_digest.hexdigest()[:_DIGEST],
            "read": self.read,
            "read_digest": self.read_digest.hexdigest()[:_DIGEST],
            "finished": self.finished,
            "late": self.was_late,
            "end": self.end,
            "code": self.code,
            "gave_up": self.gave_up,
        }

    # -- writing

    def send(self, data: Any) -> None:
        """All of `data`, now and then in many calls that each time out soon."""
        if self.rng.random() < 0.1:
            self._send_in_parts(data)
        else:
            with self.guard.limit("sendall", PATIENCE):
                self.stream.sendall(data)
        self.wrote += len(data)
        self.wrote_digest.update(data)

    def _send_in_parts(self, data: Any) -> None:
        view = memoryview(data)
        for _ in range(200):
            self.stream.settimeout(0.02)
            try:
                with self.guard.limit("sendall with a timeout", 0.02):
                    self.stream.sendall(view)
                return
            except TimeoutError as error:
                self.guard.count("writes timed out and resumed")
                view = view[error.bytes_sent :]  # type: ignore[attr-defined]
            finally:
                self.stream.settimeout(PATIENCE)
        with self.guard.limit("sendall", PATIENCE):
            self.stream.sendall(view)

    def send_bulk(self, size: int, pause: float = 0.0) -> None:
        while size:
            length = min(size, self.rng.choice((100, 5000, 65536, 300_000)))
            offset = self.rng.randrange(len(_BLOCK) - length)
            self.send(memoryview(_BLOCK)[offset : offset + length])
            size -= length
            if pause:
                gevent.sleep(self.rng.uniform(0, pause))

    def finish(self) -> None:
        # What is finished while its session is being closed may be cut with it.
        self.was_late = self.stream.session.closed
        self.stream.close_write()
        self.finished = True

    def reset(self, code: int) -> None:
        self.gave_up = code
        self.stream.reset(code)

    # -- reading

    def _receive(self, size: int) -> bytes:
        if self.rng.random() < 0.05:
            with gevent.Timeout(0.01, False):  # type: ignore[arg-type]  # False: end in silence
                return self.stream.recv(size)
            self.guard.count("reads struck by a timeout and repeated")
        with self.guard.limit("recv", PATIENCE):
            return self.stream.recv(size)

    def read_all(self, pause: float = 0.0) -> int:
        """Everything up to EOF; returns how much."""
        before = self.read
        with self._reading():
            while data := self._receive(self.rng.choice((65536,) if pause else (1000, 65536, 1 << 20))):
                self._take(data)
                if pause:
                    gevent.sleep(self.rng.uniform(0, pause))
        self.end = "eof"
        return self.read - before

    def read_exactly(self, size: int) -> bytes:
        with self._reading(), self.guard.limit("read", PATIENCE):
            data = self.stream.read(size)
            self._take(data)
        if len(data) == size:
            return data
        self.end = "eof"
        raise CutShort(f"EOF after {len(data)} bytes of {size}")

    @contextlib.contextmanager
    def _reading(self) -> Iterator[None]:
        try:
            yield
        except BaseException as error:
            self.end = type(error).__name__
            if isinstance(error, StreamReset) and error.remote:
                self.code = error.code
            if "truncate" in self.faults:
                self.end = "eof"
            raise

    def _take(self, data: bytes) -> None:
        if "leak" in self.faults:
            self._leaked.append(data)
        self.read += len(data)
        if "flip" in self.faults and self.rng.random() < 0.05:
            data = bytes([data[0] ^ 1]) + data[1:]
        self.read_digest.update(data)

    def expect_end(self) -> None:
        """Nothing more comes, in good order."""
        if self.read_all():
            raise CutShort("bytes behind the end")


class CutShort(Exception):
    """The two ends of a stream do not agree: always a fault."""


# --- the kinds of use: what the opener does, and what the acceptor ---


def _upload(talk: Talk, size: int, extra: int) -> None:
    talk.send_bulk(size)
    talk.finish()
    answer = talk.read_exactly(_DIGEST)
    if answer.decode() != talk.wrote_digest.hexdigest()[:_DIGEST]:
        raise CutShort("the acceptor has read something else")
    talk.expect_end()


def _on_upload(talk: Talk, size: int, extra: int) -> None:
    if talk.read_all(pause=extra / 1000) != size:
        raise CutShort(f"{talk.read} bytes of {size}, then EOF")
    talk.send(talk.read_digest.hexdigest()[:_DIGEST].encode())
    talk.finish()


def _download(talk: Talk, size: int, extra: int) -> None:
    talk.finish()
    if talk.read_all(pause=extra / 1000) != size:
        raise CutShort(f"{talk.read} bytes of {size}, then EOF")


def _on_download(talk: Talk, size: int, extra: int) -> None:
    talk.expect_end()
    talk.send_bulk(size)
    talk.finish()


def _on_drip(talk: Talk, size: int, extra: int) -> None:
    talk.expect_end()
    talk.send_bulk(size, pause=0.2)
    talk.finish()


def _both(talk: Talk, size: int, extra: int) -> None:
    """Both ends write and read at once."""
    writing = gevent.spawn(_write_one_side, talk, size)
    try:
        got = talk.read_all()
        writing.join(LONGEST)
    finally:
        writing.kill()
    if isinstance(writing.value, Exception):
        raise writing.value
    if got != size or writing.value is not None:
        raise CutShort(f"{got} bytes of {size}, then EOF; the writer: {writing.value!r}")


def _write_one_side(talk: Talk, size: int) -> Exception | None:
    """Give the error back: raised here, it would be one in the hub."""
    try:
        talk.send_bulk(size)
        talk.finish()
    except Exception as error:
        return error
    return None


def _call(talk: Talk, size: int, extra: int) -> None:
    """One request and its answer."""
    talk.send(_request(talk, extra, size))
    _check_answer(talk, extra)
    talk.finish()
    talk.expect_end()


def _calls(talk: Talk, size: int, extra: int) -> None:
    """Many of them on one stream, some on their way at once."""
    asked = answered = 0
    while answered < size:
        while asked < size and asked - answered < extra:
            asked += 1
            talk.send(_request(talk, asked, talk.rng.randrange(2000)))
        answered += 1
        _check_answer(talk, answered)
        if talk.rng.random() < 0.05:
            gevent.sleep(talk.rng.uniform(0, 0.05))
    talk.finish()
    talk.expect_end()


def _request(talk: Talk, number: int, size: int) -> bytes:
    return CALL.pack(number, size) + _BLOCK[number % 1000 : number % 1000 + size]


def _check_answer(talk: Talk, number: int) -> None:
    got, size = CALL.unpack(talk.read_exactly(CALL.size))
    body = talk.read_exactly(size)
    if got != number or body != _BLOCK[number % 1000 : number % 1000 + size][::-1]:
        raise CutShort(f"asked {number}, was answered {got}")
    talk.guard.count("calls answered")


def _on_calls(talk: Talk, size: int, extra: int) -> None:
    for _ in range(size):
        number, length = CALL.unpack(talk.read_exactly(CALL.size))
        talk.send(CALL.pack(number, length) + talk.read_exactly(length)[::-1])
    talk.expect_end()
    talk.finish()


def _on_call(talk: Talk, size: int, extra: int) -> None:
    _on_calls(talk, 1, extra)


def _reset_here(talk: Talk, size: int, extra: int) -> None:
    talk.send_bulk(size)
    gevent.sleep(talk.rng.uniform(0, 0.05))
    talk.reset(extra)
    talk.guard.count("resets by the opener")


def _on_reset_here(talk: Talk, size: int, extra: int) -> None:
    talk.read_all()


def _reset_there(talk: Talk, size: int, extra: int) -> None:
    with contextlib.suppress(StreamReset):
        talk.send_bulk(size)
        talk.send_bulk(_BEYOND_WINDOWS)
    talk.read_all()


def _on_reset_there(talk: Talk, size: int, extra: int) -> None:
    if size:
        talk.read_exactly(size)
    talk.reset(extra)
    talk.guard.count("resets by the acceptor")


def _abandon(talk: Talk, size: int, extra: int) -> None:
    """The reader closes while we write: that must become a reset, soon."""
    try:
        talk.send_bulk(_BEYOND_WINDOWS)
    except StreamReset:
        talk.guard.count("writers to a closed stream reset")
        raise
    raise CutShort("a closed stream has taken everything")


def _on_abandon(talk: Talk, size: int, extra: int) -> None:
    # What comes beyond a window more is answered with RST, code 0.
    talk.gave_up = 0
    talk.finished = True  # close() says FIN, too
    talk.stream.close()


def _short(talk: Talk, size: int, extra: int) -> None:
    """Opened, a little data, closed: the answer is not waited for."""
    if size:
        talk.send_bulk(size)
    talk.finish()


def _on_short(talk: Talk, size: int, extra: int) -> None:
    if talk.read_all() != size:
        raise CutShort(f"{talk.read} bytes of {size}, then EOF")


Part = Callable[[Talk, int, int], None]


class Use:
    """A kind of use: how often it is chosen, both parts, and the numbers in its header."""

    def __init__(
        self, name: str, weight: int, opener: Part, acceptor: Part, size: Callable[[random.Random], int],
        extra: Callable[[random.Random], int] = lambda rng: 0,
    ) -> None:  # fmt: skip
        self.name = name
        self.weight = weight
        self.opener = opener
        self.acceptor = acceptor
        self.size = size
        self.extra = extra


def _bulk(rng: random.Random) -> int:
    return int(10 ** rng.uniform(1, 6.4))


def _large(rng: random.Random) -> int:
    return rng.randrange(400_000, 800_000)


def _some(rng: random.Random) -> int:
    return rng.randrange(3000)


def _code(rng: random.Random) -> int:
    return rng.choice((0, 1, 77, rng.getrandbits(32)))


USES: tuple[Use, ...] = (
    Use("upload", 4, _upload, _on_upload, _bulk),
    Use("upload to a slow reader", 1, _upload, _on_upload, _large, lambda rng: 300),
    Use("download", 4, _download, _on_download, _bulk),
    Use("download by a slow reader", 1, _download, _on_download, _large, lambda rng: 300),
    Use("half closed", 2, _download, _on_drip, lambda rng: rng.randrange(50_000, 300_000)),
    Use("both ways", 3, _both, _both, _bulk),
    Use("call", 12, _call, _on_call, _some, lambda rng: rng.getrandbits(32)),
    Use("calls", 4, _calls, _on_calls, lambda rng: rng.randint(5, 200), lambda rng: rng.randint(1, 8)),
    Use("reset by the opener", 3, _reset_here, _on_reset_here, _bulk, _code),
    Use("reset by the acceptor", 3, _reset_there, _on_reset_there, _some, _code),
    Use("abandoned", 1, _abandon, _on_abandon, _some),
    Use("short", 3, _short, _on_short, _some),
)  # fmt: skip
SHORT = len(USES) - 1
_WEIGHTS = [use.weight for use in USES]


def open_one(
    guard: Guard, rng: random.Random, session: Session, send: Callable[..., None], number: int | None = None
) -> None:
    """Open a stream for something and do it. Raises what the stream raises."""
    if number is None:
        number = rng.choices(range(len(USES)), _WEIGHTS)[0]
    use = USES[number]
    with guard.limit("open", PATIENCE):
        stream = session.open(timeout=PATIENCE)
    guard.objects.add(stream)
    guard.count("streams opened")
    talk = Talk(guard, rng, stream, "opener", rng.randbytes(8), use.name)
    size, extra = use.size(rng), use.extra(rng)
    _play(talk, use.opener, size, extra, send, HEADER.pack(talk.label, number, size, extra))


def serve_one(guard: Guard, rng: random.Random, stream: Stream, send: Callable[..., None]) -> None:
    """Play the acceptor of a stream that has come. Raises what the stream raises."""
    guard.objects.add(stream)
    guard.count("streams accepted")
    stream.settimeout(PATIENCE)
    try:
        with guard.limit("read", PATIENCE):
            head = stream.read(HEADER.size)
        if 0 < len(head) < HEADER.size:
            raise CutShort(f"EOF inside the header, after {len(head)} bytes")
    except BaseException:
        stream.reset()
        raise
    if not head:
        guard.count("streams without a byte")
        stream.close()
        return
    label, number, size, extra = HEADER.unpack(head)
    use = USES[number]
    _play(Talk(guard, rng, stream, "acceptor", label, use.name), use.acceptor, size, extra, send)


def _play(talk: Talk, part: Part, size: int, extra: int, send: Callable[..., None], header: bytes = b"") -> None:
    try:
        with talk.guard.limit(f"a stream for {talk.what}", LONGEST), talk.stream:
            talk.stream.settimeout(PATIENCE)
            if header:
                with talk.guard.limit("sendall", PATIENCE):
                    talk.stream.sendall(header)
            part(talk, size, extra)
        talk.guard.count(f"done: {talk.what}")
    except BaseException:
        if talk.gave_up is None:
            talk.gave_up = 0  # `with stream` has reset it
        raise
    finally:
        talk.guard.count("streams ended")
        talk.guard.count("bytes written", talk.wrote)
        talk.guard.count("bytes read", talk.read)
        send(kind="stream", record=talk.record())
