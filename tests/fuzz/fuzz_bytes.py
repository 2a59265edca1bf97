"""Any bytes against a session: a fuzzer that is led by coverage.

An input is a little program (`Play`): which side and which settings, then steps. A step feeds bytes of the peer, right
ones, wrong ones or any, in pieces of some size; or it is a call of the application; or the connection takes so much, time
passes, a waiting call is killed. Everything happens in memory (`rig.py`), so an input takes less than a millisecond, and
the same input always does the same.

What must hold, whatever the input: `rig.Watched` compares each piece that is received with the model, and judges each
frame that is sent; here it is checked that calls raise only what is promised, that reads return what was delivered, that
an end of the connection ends everything, and that nothing is left.

    python -m tests.fuzz.fuzz_bytes [options of libFuzzer] [directory of inputs]
    python -m tests.fuzz.fuzz_bytes FILE

needs atheris; `run`, which tries one input, needs nothing. This module is not about timers, sockets and TLS.
"""

from __future__ import annotations

import contextlib
import errno
import importlib
import logging
import sys
from collections.abc import Callable
from typing import Any

import gevent

from .rig import Watched, require, settle


def _counting() -> Any:
    """Run as a program, the package is imported so that its branches are counted."""
    if __name__ != "__main__":
        return contextlib.nullcontext()
    return importlib.import_module("atheris").instrument_imports(include=["geyamux"])


with _counting():
    from geyamux import Client, Config, Server, SessionError, YamuxError
    from geyamux.session import _live

WINDOW = 262144
CONFIGS = (
    Config(),
    Config(
        accept_backlog=2,
        max_incoming_streams=3,
        max_outgoing_streams=3,
        outbox_limit=4096,
        receive_budget=WINDOW,
        max_frame_size=1024,
    ),
    Config(max_stream_window=1 << 19, window_auto_tune=1 << 20, receive_budget=1 << 20),
    Config(stream_timeout=0.0, accept_backlog=1),
)
CUTS = (1 << 20, 1, 5, 11, 12, 13, 100, 4096)
TYPES = (0, 1, 0, 1, 0, 1, 2, 3)
IDS = (1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 0, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFE, 0xFFFFFFFF, 11)
LENGTHS = (
    *(0, 1, 5, 12, 100, 1000, 5000, 65536),
    *(WINDOW - 1, WINDOW, WINDOW + 1, WINDOW // 2, 1 << 20),
    *(1 << 31, 0xFFFFFFFF, 0xFFFFFFFF - WINDOW),
)
AMOUNTS = (1, 5, 12, 100, 1000, 5000, 70000, 400000)
ROOMS = (0, 1, 5, 12, 13, 500, 5000, 70000)
#: Waiting calls at once, and steps: an input is small, what it makes happen is, too.
MOST_CALLS = 24
MOST_STEPS = 200
#: Never the same at two places near each other.
FILLER = b"".join(number.to_bytes(3, "big") for number in range(400_000 // 3))


class Play:
    """One input, played."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._position = 0
        mode, self._ending = self._byte(), self._byte()
        kind = Client if mode & 1 else Server
        self.watched = Watched(kind, CONFIGS[mode >> 1 & 3], as_socket=bool(mode & 8))
        self.session = self.watched.session
        self.link = self.watched.link
        self.streams: list[Any] = []
        self.waiting: list[gevent.Greenlet[..., Any]] = []
        self.calls = 0
        self.written = 0
        self._fed = 0
        #: What reads have returned; streams whose reads said EOF; streams that drop what comes.
        self.read: dict[Any, bytearray] = {}
        self.at_eof: set[Any] = set()
        self.unread: set[Any] = set()
        if mode & 16:
            self.link.room = 0

    def run(self) -> None:
        steps = 0
        while self._position < len(self._data) and steps < MOST_STEPS:
            steps += 1
            STEPS[self._byte() % len(STEPS)](self)
            self._settle()
        self._end()
        self._check_end()

    def _byte(self) -> int:
        self._position += 1
        return self._data[self._position - 1] if self._position <= len(self._data) else 0

    def _settle(self) -> None:
        self.watched.settle()
        self._check_reads()

    def _stream(self) -> Any:
        number = self._byte()
        return self.streams[number % len(self.streams)] if self.streams else None

    # -- the peer

    def feed_frame(self) -> None:
        """A frame whose length is true, or nearly."""
        kind, flags, place, size = self._byte(), self._byte(), self._byte(), self._byte()
        length = LENGTHS[size & 15]
        body = b""
        if TYPES[kind & 7] == 0:
            most = 64 if length > len(FILLER) else length if kind & 8 else max(length - 1, 0)
            most = length if length <= len(FILLER) and kind & 16 == 0 else most
            body = FILLER[self._fed % 999 :][:most]
            self._fed += most
        header = bytes((0, TYPES[kind & 7], flags >> 7, flags & 15))
        self._feed(header + IDS[place & 15].to_bytes(4, "big") + length.to_bytes(4, "big") + body, size >> 5)

    def feed_bytes(self) -> None:
        size, cut = self._byte(), self._byte()
        piece = self._data[self._position : self._position + size]
        self._position += len(piece)
        self._feed(piece, cut)

    def feed_opening(self) -> None:
        """The peer opens its next streams in good order."""
        first = 2 if self.session.is_client else 1
        count = 1 + self._byte() % 4
        self._feed(
            b"".join(b"\0\1\0\1" + (first + 2 * number).to_bytes(4, "big") + bytes(4) for number in range(count)), 0
        )

    def _feed(self, data: bytes, cut: int) -> None:
        if not self.link.is_closed:
            # What is large is not cut small: that is time, and no news.
            self.link.cut = CUTS[cut & 7] if len(data) < 3000 else max(CUTS[cut & 7], 4096)
            self.link.put(data)

    def take(self) -> None:
        """The connection takes more of what is sent, or all."""
        size = self._byte()
        self.link.allow(None if size & 8 else ROOMS[size & 7])

    def refuse(self) -> None:
        """It takes no more for now."""
        self.link.room = 0

    # -- the application

    def _call(
        self, function: Callable[..., Any], *args: Any, then: Callable[[Any], object] = lambda result: None
    ) -> None:
        """Begin a call that may wait."""
        if len(self.waiting) >= MOST_CALLS:
            return
        self.calls += 1

        def call() -> None:
            try:
                then(function(*args))
            except (YamuxError, TimeoutError, BlockingIOError):
                pass  # as promised
            except ValueError as error:
                if "closed file" not in str(error):
                    raise

        self.waiting.append(gevent.spawn(call))

    def open(self) -> None:
        self._call(self.session.open, 0 if self._byte() & 1 else None, then=self._got)

    def accept(self) -> None:
        self._call(self.session.accept, 0 if self._byte() & 3 else None, then=self._got)

    def _got(self, stream: Any) -> None:
        self.streams.append(stream)
        self.read[stream] = bytearray()

    def _reading(self, name: str, *args: Any) -> None:
        stream = self._stream()
        if stream is not None:
            self._call(getattr(stream, name), *args, then=lambda data: self._on_read(stream, data))

    def _on_read(self, stream: Any, data: bytes) -> None:
        self.read[stream] += data
        if not data:
            self.at_eof.add(stream)

    def receive(self) -> None:
        self._reading("recv", AMOUNTS[self._byte() & 7])

    def read_full(self) -> None:
        self._reading("read", AMOUNTS[self._byte() & 7])

    def read_line(self) -> None:
        self._reading("readline")

    def write(self) -> None:
        stream, size = self._stream(), self._byte()
        if stream is not None:
            amount = AMOUNTS[size & 7]
            self.written += amount
            self._call(stream.send if size & 8 else stream.sendall, FILLER[:amount])

    def finish(self) -> None:
        self._on_stream("close_write")

    def flush(self) -> None:
        stream = self._stream()
        if stream is not None:
            self._call(stream.flush)

    def shut_read(self) -> None:
        self.unread.add(self._on_stream("shutdown", 0))

    def close(self) -> None:
        self.unread.add(self._on_stream("close"))

    def reset(self) -> None:
        self.unread.add(self._on_stream("reset", self._byte() << 24))

    def _on_stream(self, name: str, *args: Any) -> Any:
        stream = self._stream()
        self.calls += 1
        if stream is not None:
            with contextlib.suppress(YamuxError):
                getattr(stream, name)(*args)
        return stream

    def set_timeout(self) -> None:
        stream, seconds = self._stream(), self._byte()
        if stream is not None:
            stream.settimeout(0 if seconds & 1 else None)

    def ping(self) -> None:
        self._call(self.session.ping)

    def go_away(self) -> None:
        self.calls += 1
        self.session.go_away(announce=bool(self._byte() & 1))

    def close_session(self) -> None:
        self._call(self.session.close)

    def pass_time(self) -> None:
        """More than any limit of a stream."""
        self.calls += len(self.session._table.streams)
        self.session._table.expire(1e12)

    def kill(self) -> None:
        """A call ends in the middle. What it had taken is first in line again."""
        if self.waiting:
            self.waiting[self._byte() % len(self.waiting)].kill(block=False)

    # -- what must hold

    def _check_reads(self) -> None:
        for stream, data in self.read.items():
            delivered = self.watched.delivered.get(stream, b"")
            require(len(data) <= len(delivered), f"{stream!r} returned more than was delivered")
            require(delivered.startswith(data), f"{stream!r} returned other bytes than were delivered")
        for stream in self.at_eof - self.unread:
            require(stream in self.watched.finished, f"{stream!r} said EOF, the peer has not")
            require(self.read[stream] == self.watched.delivered.get(stream), f"{stream!r} said EOF before all was read")
        for call in [call for call in self.waiting if call.ready()]:
            self.waiting.remove(call)
            if call.exception is not None:
                raise call.exception

    def _end(self) -> None:
        """The connection ends, one way or another; or the application ends it."""
        way = self._ending & 7
        is_stuck = bool(self._ending & 8)
        if not is_stuck:
            self.link.allow(None)
        if way == 1:
            self.session.abort()
        elif way == 2:
            self._call(self.session.close)
        elif way == 3:
            self.link.send_error = BrokenPipeError(errno.EPIPE, "broken")
            self.link.writes.poke()
        self._settle()
        self.link.finish(ConnectionResetError(errno.ECONNRESET, "reset") if self._ending & 16 else b"")
        self._settle()
        if is_stuck and not self.session.ready():
            require(self.session.closed, "lives after the end of its connection")
            self.session.abort()
            self._settle()
        if self.link.send_error is not None:
            # Without a descriptor the loop looks once more before the end.
            self.session.join(2)

    def _check_end(self) -> None:
        session = self.session
        require(session.ready(), f"does not end: {session!r}, {session._reason!r}")
        self._settle()
        require(not self.waiting, f"calls wait after the end: {self.waiting}")
        for call in (session.open, session.ping, session.accept):
            self._drain(call)
        for stream in self.streams:
            self._check_stream_end(stream)
        table, outbox = session._table, session._outbox
        counts = (table.budget.unread, table.budget.grown, table.unacknowledged, table._incoming, table._outgoing)
        require(not any(counts), f"counted after the end: {counts}")
        require(not table.streams and not table.backlog and not table._syn_positions, "streams are left")
        require(not any(map(len, _lines(session) + _lines(outbox))), "somebody stands in line")
        require(outbox.is_empty and outbox.waiting_bytes == 0, "something waits to leave")
        require(session not in _live, "the session is held")
        greenlets = (session._reader._greenlet, outbox._greenlet)
        require(all(greenlet.dead for greenlet in greenlets), "a greenlet is left")
        self._check_bounds()

    def _drain(self, call: Callable[[], Any]) -> None:
        """After the end a call raises; what came before may still be accepted first."""
        while True:
            try:
                stream = call()
            except SessionError:
                return
            require(call == self.session.accept, f"{call} succeeded after the end")
            self._got(stream)

    def _check_stream_end(self, stream: Any) -> None:
        """What was delivered is still there, and then no call waits."""
        with contextlib.suppress(YamuxError):
            while data := stream.recv(1 << 20):
                self._on_read(stream, data)
            self._on_read(stream, b"")
        self._check_reads()
        if stream not in self.unread and not stream._life.is_reset:
            require(self.read[stream] == self.watched.delivered.get(stream, b""), f"{stream!r} lost what it had")
        require(not _lines(stream), f"somebody stands in line for {stream!r}")
        stream.close()

    def _check_bounds(self) -> None:
        """What leaves is bounded by what came and by what the application did."""
        stats = self.session.stats()
        caused = stats.frames_received + stats.bytes_received // 4096 + 6 * self.calls + self.written // 1000
        require(len(self.watched.sent) <= 2 * caused + 10, f"{len(self.watched.sent)} frames for {caused}")
        require(self.link.receives <= 6 * self.link.pieces + 100, f"{self.link.receives} receives for {self.link.pieces}")


STEPS: tuple[Callable[[Play], None], ...] = (
    *(Play.feed_frame,) * 8,
    *(Play.feed_bytes,) * 2,
    *(Play.feed_opening,) * 2,
    *(Play.open, Play.accept) * 2,
    *(Play.receive, Play.read_full, Play.read_line, Play.write, Play.write),
    *(Play.finish, Play.flush, Play.shut_read, Play.close, Play.reset, Play.set_timeout),
    *(Play.ping, Play.go_away, Play.close_session, Play.pass_time, Play.kill),
    *(Play.take, Play.take, Play.refuse),
)


def _lines(part: Any) -> list[Any]:
    """Where greenlets may stand in line in a part of a session: the attributes that come from that module."""
    names = {*getattr(part, "__dict__", ()), *getattr(type(part).__mro__[1], "__slots__", ())}
    found = (getattr(part, name, None) for name in names)
    return [line for line in found if type(line).__module__ == "geyamux.waiting" and hasattr(line, "__len__")]


def run(data: bytes) -> None:
    """Play one input; AssertionError where something did not hold, and whatever else was raised that should not be."""
    hub: Any = gevent.get_hub()
    failures: list[BaseException] = []
    hub.handle_error = lambda context, kind, value, trace: failures.append(value)
    play = Play(data)
    try:
        play.run()
        settle()
    finally:
        if not play.session.ready():
            play.session.abort()
        for call in play.waiting:
            call.kill(block=False)
        settle()
        del hub.handle_error
    wrong = [error for error in failures if not isinstance(error, gevent.GreenletExit)]
    if wrong:
        raise wrong[0]


def main() -> None:
    atheris = importlib.import_module("atheris")
    # Thousands of sessions end badly here, and each says so.
    logging.getLogger("geyamux").disabled = True
    atheris.Setup(sys.argv, run)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
