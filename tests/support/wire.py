"""A second, naive Yamux codec, and an auditor for what a session sends.

It shares no code with the package, so that an error in one is not repeated by the other. `Decoder` accepts
nothing it cannot name. `Audit` follows one end of a connection and fails at the first frame which that end
must not send.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import NamedTuple, TypeAlias

BytesLike: TypeAlias = bytes | bytearray | memoryview

VERSION = 0

DATA = 0x0
WINDOW_UPDATE = 0x1
PING = 0x2
GO_AWAY = 0x3

SYN = 0x1
ACK = 0x2
FIN = 0x4
RST = 0x8

NORMAL = 0x0
PROTOCOL_ERROR = 0x1
INTERNAL_ERROR = 0x2

HEADER_SIZE = 12
INITIAL_WINDOW = 262144
LARGEST_FRAME = 1 << 20
"""What no sender of Data exceeds: some peers end the session beyond it."""

_TYPES = {DATA: "Data", WINDOW_UPDATE: "WindowUpdate", PING: "Ping", GO_AWAY: "GoAway"}
_FLAGS = {SYN: "SYN", ACK: "ACK", FIN: "FIN", RST: "RST"}


class WireError(AssertionError):
    """The bytes are no Yamux, or not what a correct sender sends."""


class Frame(NamedTuple):
    version: int
    type: int
    flags: int
    stream_id: int
    length: int
    body: bytes = b""

    def __str__(self) -> str:
        flags = "+".join(name for bit, name in _FLAGS.items() if self.flags & bit) or "-"
        return f"{_TYPES[self.type]} {flags} stream {self.stream_id} length {self.length}"


def frame(type: int, flags: int, stream_id: int, length: int, body: BytesLike = b"") -> bytes:
    """The bytes of one frame; whatever is asked for, right or wrong."""
    header = bytes([VERSION, type])
    header += flags.to_bytes(2, "big") + stream_id.to_bytes(4, "big") + length.to_bytes(4, "big")
    return header + bytes(body)


def data(stream_id: int, body: BytesLike, flags: int = 0) -> bytes:
    """A Data frame whose length is true."""
    body = bytes(body)
    return frame(DATA, flags, stream_id, len(body), body)


def window_update(stream_id: int, credit: int, flags: int = 0) -> bytes:
    return frame(WINDOW_UPDATE, flags, stream_id, credit)


def ping(flags: int, value: int) -> bytes:
    return frame(PING, flags, 0, value)


def go_away(code: int = NORMAL) -> bytes:
    return frame(GO_AWAY, 0, 0, code)


class Decoder:
    """Bytes in any pieces in, whole frames out."""

    def __init__(self) -> None:
        self.pending = b""

    def feed(self, chunk: BytesLike) -> list[Frame]:
        self.pending += bytes(chunk)
        frames = []
        start = 0
        while len(self.pending) - start >= HEADER_SIZE:
            header = self.pending[start : start + HEADER_SIZE]
            found = _parse(header)
            end = start + HEADER_SIZE
            if found.type == DATA:
                end += found.length
                if len(self.pending) < end:
                    break
                found = found._replace(body=self.pending[start + HEADER_SIZE : end])
            frames.append(found)
            start = end
        self.pending = self.pending[start:]
        return frames

    def begun(self, stream_id: int) -> int:
        """Bytes that have come of the body of a frame, for this stream, that has not come whole."""
        if len(self.pending) < HEADER_SIZE:
            return 0
        found = _parse(self.pending[:HEADER_SIZE])
        return len(self.pending) - HEADER_SIZE if found.stream_id == stream_id else 0

    def finish(self) -> None:
        """Fail if the stream of bytes ended inside a frame."""
        if self.pending:
            raise WireError(f"ended inside a frame, after {self.pending[:HEADER_SIZE].hex()}")


def _parse(header: bytes) -> Frame:
    found = Frame(
        header[0],
        header[1],
        int.from_bytes(header[2:4], "big"),
        int.from_bytes(header[4:8], "big"),
        int.from_bytes(header[8:12], "big"),
    )
    if found.version != VERSION:
        raise WireError(f"version {found.version} in {header.hex()}")
    if found.type not in _TYPES:
        raise WireError(f"type {found.type} in {header.hex()}")
    if found.flags & ~(SYN | ACK | FIN | RST):
        raise WireError(f"unknown flags in {header.hex()}")
    if found.type in (PING, GO_AWAY) and found.stream_id != 0:
        raise WireError(f"{found}: belongs to the session")
    if found.type in (DATA, WINDOW_UPDATE) and found.stream_id == 0:
        raise WireError(f"{found}: belongs to a stream")
    return found


@dataclass
class _Audited:
    """What the audited end has done on one stream, and what it may still do."""

    ours: bool
    opened: bool = False  # our SYN or ACK has gone
    fin: bool = False
    rst: bool = False
    peer_ended: bool = False
    send_credit: int = INITIAL_WINDOW
    granted: int = INITIAL_WINDOW
    taken: int = 0  # bytes of Data that arrived


@dataclass
class Audit:
    """One end of a connection, watched from the outside.

    Tell it in the order in which it happened what that end `sent` and what it `received`; it raises
    `WireError` at the first frame sent that breaks a rule: one SYN or ACK and that first, data within the
    credit that had arrived, FIN once and alone, after it nothing but credit and RST, after RST nothing, never
    more window granted than there can be, pongs only for pings.
    The other end is believed, so that a test may play it badly.
    """

    client: bool
    max_window: int = INITIAL_WINDOW
    frames: list[Frame] = field(default_factory=list)
    streams: dict[int, _Audited] = field(default_factory=dict)
    _out: Decoder = field(default_factory=Decoder)
    _in: Decoder = field(default_factory=Decoder)
    _pings: Counter[int] = field(default_factory=Counter)
    _ended: bool = False

    def sent(self, chunk: BytesLike) -> None:
        for found in self._out.feed(chunk):
            try:
                self._check(found)
            except WireError as error:
                raise WireError(f"frame {len(self.frames)}, {found}: {error}") from None
            self.frames.append(found)

    def received(self, chunk: BytesLike) -> None:
        for found in self._in.feed(chunk):
            self._note(found)

    def finish(self) -> None:
        """The connection is over: what was sent must end at the end of a frame."""
        self._out.finish()

    def _require(self, condition: object, otherwise: str) -> None:
        if not condition:
            raise WireError(otherwise)

    def _check(self, found: Frame) -> None:
        self._require(not self._ended, "sent after a GoAway with an error code")
        if found.type == PING:
            self._check_ping(found)
        elif found.type == GO_AWAY:
            self._require(found.flags == 0, "GoAway has no flags")
            self._ended = found.length != NORMAL
        else:
            self._check_stream(found)

    def _check_ping(self, found: Frame) -> None:
        self._require(found.flags in (SYN, ACK), "a ping has SYN or ACK and nothing else")
        if found.flags == ACK:
            self._require(self._pings[found.length] > 0, "a pong that answers no ping, or a second one")
            self._pings[found.length] -= 1

    def _check_stream(self, found: Frame) -> None:
        ours = (found.stream_id % 2 == 1) == self.client
        stream = self.streams.get(found.stream_id)
        if stream is None:
            self._require(ours, "on a stream that the peer has not opened")
            stream = self.streams[found.stream_id] = _Audited(ours)
        self._require(not stream.rst, "sent after RST")
        if found.type == DATA:
            self._check_data(found, stream)
        elif found.flags == 0:
            self._check_credit(found, stream)
        elif found.flags in (SYN, ACK):
            self._check_opening(found, stream)
        else:
            self._check_ending(found, stream)

    def _check_data(self, found: Frame, stream: _Audited) -> None:
        self._require(found.flags == 0, "Data with flags: some peers lose its payload")
        self._require(found.length > 0, "an empty Data frame")
        self._require(found.length <= LARGEST_FRAME, "a Data frame that no sender may make so large")
        self._require(stream.opened, "Data before SYN or ACK")
        self._require(not stream.fin, "Data after FIN")
        stream.send_credit -= found.length
        self._require(stream.send_credit >= 0, f"{-stream.send_credit} bytes beyond the credit")

    def _check_credit(self, found: Frame, stream: _Audited) -> None:
        self._require(found.length > 0, "a WindowUpdate that says nothing")
        self._require(stream.opened, "credit before SYN or ACK")
        self._check_grant(found, stream)

    def _check_opening(self, found: Frame, stream: _Audited) -> None:
        expected = SYN if stream.ours else ACK
        self._require(found.flags == expected, "SYN on a stream of the peer, or ACK on one of ours")
        self._require(not stream.opened, "a second SYN or ACK")
        stream.opened = True
        self._check_grant(found, stream)

    def _check_grant(self, found: Frame, stream: _Audited) -> None:
        stream.granted += found.length
        # A session may hand on, and credit, the beginning of a frame whose end is still to come.
        window = stream.granted - stream.taken - self._in.begun(found.stream_id)
        self._require(window <= self.max_window, f"a window of {window}, of {self.max_window} at most")

    def _check_ending(self, found: Frame, stream: _Audited) -> None:
        self._require(found.flags in (FIN, RST), "FIN or RST together with another flag")
        if found.flags == RST:
            self._require(stream.opened or not stream.ours, "RST for a stream that never had a SYN")
            stream.rst = True
            return
        self._require(found.length == 0, "FIN with credit")
        self._require(stream.opened, "FIN before SYN or ACK")
        self._require(not stream.fin, "a second FIN")
        stream.fin = True

    def _note(self, found: Frame) -> None:
        if found.type == PING:
            if found.flags & SYN:
                self._pings[found.length] += 1
            return
        if found.type == GO_AWAY:
            return
        stream = self.streams.get(found.stream_id)
        opening = found.flags & SYN and (found.stream_id % 2 == 0) == self.client
        if opening and (stream is None or stream.peer_ended or stream.rst):
            stream = self.streams[found.stream_id] = _Audited(ours=False)
        if stream is None:
            return
        if found.type == DATA:
            stream.taken += found.length
        elif not found.flags & RST:
            stream.send_credit += found.length
        if found.flags & (FIN | RST):
            stream.peer_ended = True
