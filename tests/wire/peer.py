"""The client's end of a connection to the server under test: blocking sockets, raw frames, and an audit of every answer.

A `Peer` sends what it is told, however wrong. What it receives is held against the promises that bind any server all the
time: known versions, types and flags; ACK once; FIN once and no payload behind it; nothing behind RST; no byte beyond
the credit; no pong that was not asked for. A check in which one of them is broken has failed, whatever it looks for.
"""

from __future__ import annotations

import contextlib
import dataclasses
import socket
import time
from collections import Counter
from collections.abc import Callable

from .frames import (
    ACK,
    DATA,
    FIN,
    GO_AWAY,
    HEADER,
    MOST,
    PING,
    RST,
    SYN,
    UPDATE,
    WINDOW,
    Frame,
    data,
    describe,
    pattern,
    ping,
    update,
)

_CHUNK = 256 * 1024
#: Questions of `barrier` bear values from here on; checks use smaller ones.
_BARRIERS = 0x5EED0000


class Failed(Exception):
    """The server did something else; the text says what was seen."""


class NotApplicable(Exception):
    """The check cannot be made with this server; the text says why."""


class Silent(Exception):
    """Nothing came in time."""


@dataclasses.dataclass(frozen=True)
class Setting:
    """Where the server is, and how long to wait: `timeout` for what must come, `silence` for what must not."""

    host: str
    port: int
    timeout: float = 5.0
    silence: float = 0.3


@dataclasses.dataclass
class Ledger:
    """What is known of one stream. `credit` is what the server may still send, `allowed` what we may."""

    credit: int = WINDOW
    allowed: int = WINDOW
    most_allowed: int = WINDOW
    ack_delta: int = 0
    frames: list[Frame] = dataclasses.field(default_factory=list)
    received: int = 0
    acks: int = 0
    fins: int = 0
    reset: bool = False
    #: We have reset it: what comes may be late, and is not judged.
    reset_here: bool = False

    def payload(self) -> bytes:
        return b"".join(frame.payload for frame in self.frames)


class Peer:
    """One connection, as client. Not for use by several threads."""

    def __init__(self, setting: Setting, *, receive_buffer: int = 0) -> None:
        self.setting = setting
        self.streams: dict[int, Ledger] = {}
        #: Everything received, in order, without the answers to `barrier`.
        self.frames: list[Frame] = []
        #: Promises broken by the server.
        self.broken: list[str] = []
        #: How the connection ended; empty while it lives.
        self.end = ""
        self._others: list[Peer] = []
        self._asked: Counter[int] = Counter()
        self._next_id = 1
        self._next_barrier = _BARRIERS
        self._input = bytearray()
        self._output = bytearray()
        self._skip = 0
        self._went_away = False
        self._socket = socket.socket(_family(setting))
        if receive_buffer:
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        self._socket.settimeout(setting.timeout)
        self._socket.connect((setting.host, setting.port))
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    # -- connections

    def another(self, *, receive_buffer: int = 0) -> Peer:
        """One more connection to the same server; it is closed with this one."""
        other = Peer(self.setting, receive_buffer=receive_buffer)
        self._others.append(other)
        return other

    def close(self) -> None:
        for other in self._others:
            other.close()
        self._socket.close()

    def half_close(self) -> None:
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_WR)

    def judge(self) -> None:
        """Fail if the server broke a promise on this connection or on another of the same check."""
        for peer in (self, *self._others):
            if peer.broken:
                raise Failed(f"{peer.broken[0]}{f' (and {len(peer.broken) - 1} more)' if peer.broken[1:] else ''}")

    # -- sending

    def send(self, *frames: bytes) -> None:
        """Send all of it. Where the server has ended the connection, that is for reading to find."""
        whole = b"".join(frames)
        self._note(whole)
        self._socket.settimeout(self.setting.timeout)
        try:
            self._socket.sendall(whole)
        except TimeoutError:
            raise Failed(f"the server stopped reading the connection, within {len(whole)} bytes") from None
        except OSError:
            return

    def pour(self, whole: bytes, stalled_after: float = 2.0) -> int:
        """Send without reading until all is taken, or the server takes nothing more; return how much it took."""
        self._note(whole)
        self._socket.settimeout(stalled_after)
        view, taken = memoryview(whole), 0
        while taken < len(whole):
            try:
                taken += self._socket.send(view[taken : taken + _CHUNK])
            except OSError:  # a timeout, too
                break
        return taken

    def open(self, payload: bytes = b"", *, credit: int = 0, flags: int = 0) -> int:
        """Open the next stream by WindowUpdate, with payload in a frame of its own; return its id."""
        stream = self.new_id()
        self.send(update(stream, credit, SYN | flags), data(stream, payload) if payload else b"")
        return stream

    def new_id(self) -> int:
        self._next_id += 2
        return self._next_id - 2

    def _note(self, sent: bytes) -> None:
        """Keep the books of what we send, from the bytes as they leave, cut anywhere."""
        skipped = min(self._skip, len(sent))
        self._skip -= skipped
        self._output += sent[skipped:]
        position = 0
        while len(self._output) - position >= HEADER.size:
            _, kind, flags, stream, length = HEADER.unpack_from(self._output, position)
            position += HEADER.size
            self._note_frame(Frame(kind, flags, stream, length))
            if kind == DATA:
                position += length
        self._skip += max(0, position - len(self._output))
        del self._output[:position]

    def _note_frame(self, frame: Frame) -> None:
        if frame.kind == PING and frame.flags & SYN:
            self._asked[frame.length] += 1
        if frame.kind not in (DATA, UPDATE):
            return
        if frame.flags & SYN:
            self.streams[frame.stream] = Ledger()
        ledger = self.streams.get(frame.stream)
        if ledger is None:
            return
        if frame.kind == DATA:
            ledger.allowed -= frame.length
        elif not frame.flags & RST:
            ledger.credit += frame.length
        ledger.reset_here |= bool(frame.flags & RST)

    # -- receiving

    def receive(self, until: float) -> Frame | None:
        """The next frame, None where the connection has ended; `Silent` when none is complete at that moment."""
        while True:
            frame = self._cut()
            if frame is not None:
                self._audit(frame)
                return frame
            if self.end:
                return None
            self._fill(until)

    def _fill(self, until: float) -> None:
        # At 0 it does not wait; anything above would be rounded up to a millisecond.
        self._socket.settimeout(max(until - time.monotonic(), 0))
        try:
            piece = self._socket.recv(_CHUNK)
        except (TimeoutError, BlockingIOError):
            raise Silent from None
        except OSError as error:
            self.end = f"broken: {error}"
            return
        self._input += piece
        if not piece:
            self.end = "ended inside a frame" if self._input else "ended"

    def _cut(self) -> Frame | None:
        if len(self._input) < HEADER.size:
            return None
        version, kind, flags, stream, length = HEADER.unpack_from(self._input)
        size = HEADER.size + (length if kind == DATA else 0)
        if version or kind > GO_AWAY:
            raise Failed(f"the server sent a header of version {version} and type {kind}")
        if len(self._input) < size:
            return None
        frame = Frame(kind, flags, stream, length, bytes(self._input[HEADER.size : size]))
        del self._input[:size]
        return frame

    def collect(self, seconds: float) -> list[Frame]:
        """All frames of that time, or up to the end of the connection."""
        until, found = time.monotonic() + seconds, list[Frame]()
        with contextlib.suppress(Silent):
            while (frame := self.receive(until)) is not None:
                found.append(frame)
        return found

    def until(self, wanted: Callable[[Frame], bool], what: str) -> Frame:
        """Read up to a frame like that."""
        moment, skipped = time.monotonic() + self.setting.timeout, list[Frame]()
        try:
            while (frame := self.receive(moment)) is not None:
                if wanted(frame):
                    return frame
                skipped.append(frame)
        except Silent:
            raise Failed(f"no {what} in {self.setting.timeout:g} s, but {describe(skipped)}") from None
        raise Failed(f"no {what}: the connection {self.end} after {describe(skipped)}")

    def pump(self, done: Callable[[], bool], what: str) -> None:
        """Read until something is so."""
        if not done():
            self.until(lambda frame: done(), what)

    def barrier(self) -> None:
        """Return when the server has answered a ping, and so handled all that was sent before."""
        value = self._next_barrier
        self._next_barrier += 1
        self.send(ping(value))
        pong = self.until(lambda frame: frame.kind == PING and frame.length == value, "answer to a ping")
        self.frames.remove(pong)

    def quiet(self) -> list[Frame]:
        """What came until the server has handled everything and has said nothing more for a while."""
        before = len(self.frames)
        # A pong may overtake what the first question found waiting.
        self.barrier()
        self.barrier()
        self.collect(self.setting.silence)
        return self.frames[before:]

    def read_to_end(self) -> list[Frame]:
        """Everything up to the end of the connection, which must come."""
        before = len(self.frames)
        until = time.monotonic() + self.setting.timeout
        try:
            while self.receive(until) is not None:
                pass
        except Silent:
            what = describe(self.frames[before:])
            raise Failed(f"the connection is open after {self.setting.timeout:g} s; seen: {what}") from None
        return self.frames[before:]

    # -- streams

    def await_ack(self, stream: int) -> None:
        self.pump(lambda: self.streams[stream].acks > 0, f"ACK on stream {stream}")

    def await_fin(self, stream: int) -> None:
        self.pump(lambda: self.streams[stream].fins > 0, f"FIN on stream {stream}")

    def await_bytes(self, stream: int, count: int) -> None:
        ledger = self.streams[stream]
        try:
            self.pump(lambda: ledger.received >= count or ledger.reset, "more payload")
        except Failed as error:
            raise Failed(f"{ledger.received} of {count} bytes on stream {stream}, then {error}") from None
        if ledger.reset:
            raise Failed(f"stream {stream} was reset after {ledger.received} of {count} bytes")

    def write(self, stream: int, payload: bytes, *, largest: int = 32768, grant: bool = False) -> None:
        """Send within what the server allows, reading meanwhile; with `grant` what comes is credited again."""
        ledger, sent = self.streams[stream], 0
        taken = ledger.received
        while sent < len(payload):
            self.pump(lambda: ledger.allowed > 0 or ledger.reset, f"credit on stream {stream} after {sent} bytes")
            if ledger.reset:
                raise Failed(f"stream {stream} was reset after {sent} of {len(payload)} bytes")
            piece = payload[sent : sent + min(largest, ledger.allowed)]
            back, taken = (ledger.received - taken, ledger.received) if grant else (0, taken)
            self.send(update(stream, back) if back else b"", data(stream, piece))
            sent += len(piece)
            self.collect(0)

    def expect_echo(self, stream: int, payload: bytes) -> None:
        """All that was ever received on the stream must come to be these bytes, and no more."""
        self.await_bytes(stream, len(payload))
        got = self.streams[stream].payload()
        if got != payload:
            first = next((n for n, (a, b) in enumerate(zip(got, payload, strict=False)) if a != b), len(payload))
            raise Failed(f"stream {stream}: {len(got)} bytes, which differ from those sent at {first}")

    def check_echo(self, payload: bytes = b"are you there") -> None:
        """A new stream must work from its open to its end: so nothing else on the connection has been damaged."""
        stream = self.open(payload)
        self.expect_echo(stream, payload)
        self.send(update(stream, 0, FIN))
        self.await_fin(stream)

    def block(self, extra: int = 40_000, *, credit: int = 0) -> tuple[int, bytes]:
        """A stream on which the server has echoed all that we allow, and holds `extra` bytes more of the payload.

        That is below half a window: a server may have taken as much without having granted it yet.
        """
        payload = pattern(WINDOW + credit + extra)
        stream = self.open(credit=credit)
        self.write(stream, payload)
        self.await_bytes(stream, WINDOW + credit)
        return stream, payload

    def congested(self, *, credit: int = 0) -> Peer:
        """A connection more, whose client reads nothing, with 16 MiB of echo: more than systems hold for a connection."""
        other = self.another(receive_buffer=16384)
        streams = [other.open(credit=credit) for _ in range(64)]
        for stream in streams:
            other.pump(lambda stream=stream: bool(other.streams[stream].frames), "answer to SYN")  # type: ignore[misc]
        other.pour(b"".join(data(stream, bytes(WINDOW)) for stream in streams))
        self.pause()
        return other

    def pause(self) -> None:
        """Let the server take in what other connections have sent, which can't be asked on one that nobody reads."""
        self.barrier()
        self.collect(self.setting.silence)
        self.barrier()

    # -- the audit

    def _audit(self, frame: Frame) -> None:
        self.frames.append(frame)
        if self._went_away:
            self._blame(frame, "behind a GoAway that ends the session")
        if frame.flags & ~15:
            self._blame(frame, f"with unknown flags {frame.flags:#x}")
        if frame.kind == PING:
            self._audit_ping(frame)
        elif frame.kind == GO_AWAY:
            self._went_away = frame.length != 0
            if frame.stream or frame.flags:
                self._blame(frame, "a GoAway with a stream id or flags")
        elif frame.stream in self.streams:
            self._audit_stream(frame, self.streams[frame.stream])
        elif frame.stream & 1 or not frame.stream:
            self._blame(frame, "on a stream that was never opened")

    def _audit_ping(self, frame: Frame) -> None:
        if frame.stream or frame.flags not in (SYN, ACK):
            self._blame(frame, "a ping must be on stream 0 and have SYN or ACK")
        if frame.flags & ACK:
            self._asked[frame.length] -= 1
            if self._asked[frame.length] < 0:
                self._blame(frame, "an answer that was not asked for")
        else:
            # The server measures or keeps alive. Nothing to do with the check, so it is just answered.
            self.frames.pop()
            self.send(ping(frame.length, ACK))

    def _audit_stream(self, frame: Frame, ledger: Ledger) -> None:
        ledger.frames.append(frame)
        if ledger.reset_here:
            return
        if ledger.reset:
            self._blame(frame, "behind the RST of its stream")
        ledger.acks += bool(frame.flags & ACK)
        if frame.flags & ACK and ledger.acks > 1:
            self._blame(frame, "a second ACK")
        if ledger.fins and (frame.flags & FIN or frame.payload):
            self._blame(frame, "FIN or payload behind the FIN of its stream")
        ledger.fins += bool(frame.flags & FIN)
        ledger.reset |= bool(frame.flags & RST)
        if frame.kind == DATA:
            self._audit_payload(frame, ledger)
        elif not frame.flags & RST:
            ledger.allowed += frame.length
            ledger.ack_delta += frame.length if frame.flags & ACK else 0
            ledger.most_allowed = max(ledger.most_allowed, ledger.allowed)
            if ledger.allowed > MOST:
                self._blame(frame, "credit adds up to more than 2**32-1")

    def _audit_payload(self, frame: Frame, ledger: Ledger) -> None:
        if frame.length > ledger.credit:
            self._blame(frame, f"beyond the {ledger.credit} bytes that we allow")
        ledger.credit -= frame.length
        ledger.received += frame.length

    def _blame(self, frame: Frame, why: str) -> None:
        self.broken.append(f"the server sent {frame}: {why}")


def _family(setting: Setting) -> int:
    return socket.getaddrinfo(setting.host, setting.port, type=socket.SOCK_STREAM)[0][0]
