"""What the protocol says that every frame does in every state: a plain model of a receiver, to compare a session with.

It is written after the tables of ``spec.md`` (2.6, 3.1, 3.3 and 12) and shares no code with the package. A model holds a
`Row` for each live stream; `take` says what must have become of them when some bytes were received, which frames must be
the answer, and whether the session lives. It judges what arrives: what the application does meanwhile is not its concern,
so who compares puts the rows right (`rows`) before each piece that is received.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

DATA, WINDOW_UPDATE, PING, GO_AWAY = range(4)
SYN, ACK, FIN, RST = 1, 2, 4, 8

HEADER_SIZE = 12
WINDOW = 262144
LARGEST_CREDIT = 0xFFFFFFFF
#: Questions that wait for their answer, at most.
MOST_PONGS = 32

Answer = tuple[int, int, int, int]
"""Type, flags, stream id, length of a frame that must be sent."""


@dataclass
class Row:
    """A live stream."""

    stream_id: int
    is_own: bool
    #: Own ones: the peer has been heard on it.
    is_acknowledged: bool = False
    #: It waits for `accept`.
    is_waiting: bool = False
    peer_fin: bool = False
    our_fin: bool = False
    #: The application is done with it.
    is_released: bool = False
    unread: int = 0
    #: What the peer may send, and what we may.
    window: int = WINDOW
    credit: int = WINDOW
    #: None: what comes is kept for the application. Else nobody will read it: how much may still be dropped.
    allowance: int | None = None
    #: Bytes for the application that came in the piece under way.
    delivered: bytearray = field(default_factory=bytearray, compare=False)
    #: Whatever the one who compares knows the stream by.
    stream: Any = field(default=None, compare=False, repr=False)


@dataclass
class Receiver:
    """A session as its peer's bytes make it."""

    is_client: bool
    backlog: int = 256
    most_incoming: int | None = 4096
    #: No window grows beyond this.
    widest: int = WINDOW
    rows: dict[int, Row] = field(default_factory=dict)
    #: New streams are refused.
    is_refusing: bool = False
    #: Places of inbound streams taken, those that have ended and are still used included.
    incoming: int = 0
    #: Streams that came into being, ever.
    admitted: int = 0
    peer_went_away: bool = False
    #: Why the session has ended: "protocol error", or the peer's code; None while it lives.
    end: str | int | None = None
    answers: list[Answer] = field(default_factory=list)
    #: Live streams that ended in the piece under way, as they were then, with the peer's code or None where we gave up.
    ended: list[tuple[Row, str, int | None]] = field(default_factory=list)
    pongs: int = 0
    #: Frames that moved nothing, ever; they are limited (R28), which the model leaves to others.
    useless: int = 0
    frames: int = 0
    _rest: bytes = b""
    _missing: int = 0
    #: Whose payload is under way, None where it is dropped; and the flags that take effect at its end.
    _sink: int | None = None
    _flags: int = 0

    @property
    def is_inside_frame(self) -> bool:
        return bool(self._rest or self._missing)

    def take(self, piece: bytes) -> None:
        """The session received this at once."""
        self.answers, self.ended, self.pongs = [], [], 0
        for row in self.rows.values():
            row.delivered = bytearray()
        data = self._take_payload(piece)
        while self.end is None and len(data) >= HEADER_SIZE:
            header, data = data[:HEADER_SIZE], data[HEADER_SIZE:]
            self.frames += 1
            self._take_header(header)
            if self._missing:
                data = self._take_payload(data)
        self._rest = data if self.end is None else b""

    def _take_payload(self, data: bytes) -> bytes:
        if self.end is not None:
            return b""
        if not self._missing:
            return self._rest + data
        part, data = data[: self._missing], data[self._missing :]
        self._missing -= len(part)
        if part and self._sink is not None and self._sink in self.rows and not self._flags & RST:
            self._deliver(self.rows[self._sink], part)
        if not self._missing:
            self._end_data()
        return data

    # -- headers: first every check, then what it does

    def _take_header(self, header: bytes) -> None:
        version, kind = header[0], header[1]
        flags, stream_id, length = (int.from_bytes(header[a:b], "big") for a, b in ((2, 4), (4, 8), (8, 12)))
        flags &= SYN | ACK | FIN | RST
        if version != 0 or kind > GO_AWAY:
            self._break()
        elif kind == PING:
            if flags & SYN and self.pongs < MOST_PONGS:
                self.pongs += 1
                self.answers.append((PING, ACK, 0, length))
        elif kind == GO_AWAY:
            if length:
                self.end = length
            else:
                self.peer_went_away = True
        elif self._is_wrong(kind, flags, stream_id, length):
            self._break()
        else:
            self._take_stream_frame(kind, flags, stream_id, length)

    def _is_wrong(self, kind: int, flags: int, stream_id: int, length: int) -> bool:
        row = self.rows.get(stream_id)
        if flags & SYN and (row is not None or stream_id == 0 or stream_id % 2 == self.is_client):
            return True
        if kind == DATA:
            window = row.window if row is not None else WINDOW if flags & SYN else self.widest
            return length > window
        credit = row.credit if row is not None else WINDOW if flags & SYN else 0
        return not flags & RST and credit + length > LARGEST_CREDIT

    def _take_stream_frame(self, kind: int, flags: int, stream_id: int, length: int) -> None:
        if flags & SYN:
            self._take_syn(flags, stream_id)
        row = self.rows.get(stream_id)
        if kind == DATA:
            self._missing = length
            self._sink, self._flags = (stream_id if row is not None else None), flags
            self.useless += row is None or not length
            if not length:
                self._end_data()
        elif row is None:
            self.useless += 1
        else:
            self.useless += not length
            if not flags & RST:
                row.credit += length
            self._take_flags(row, flags, length)

    def _take_syn(self, flags: int, stream_id: int) -> None:
        if flags & RST:
            return
        waiting = sum(row.is_waiting for row in self.rows.values())
        is_full = self.most_incoming is not None and self.incoming >= self.most_incoming
        if self.is_refusing or waiting >= self.backlog or is_full:
            self.answers.append((WINDOW_UPDATE, RST, stream_id, 0))
            return
        self.rows[stream_id] = Row(stream_id, is_own=False, is_acknowledged=True, is_waiting=True)
        self.incoming += 1
        self.admitted += 1

    # -- what a frame of a live stream does

    def _deliver(self, row: Row, part: bytes) -> None:
        row.is_acknowledged = True
        row.window -= len(part)
        if row.peer_fin:
            return
        if row.allowance is None:
            row.unread += len(part)
            row.delivered += part
            return
        row.allowance -= len(part)
        if row.allowance < 0:
            self.answers.append((WINDOW_UPDATE, RST, row.stream_id, 0))
            self._remove(row, "reset here", None)

    def _end_data(self) -> None:
        if self._sink is not None and self._sink in self.rows:
            self._take_flags(self.rows[self._sink], self._flags, 0)
        self._sink, self._flags = None, 0

    def _take_flags(self, row: Row, flags: int, code: int) -> None:
        row.is_acknowledged = True
        if flags & RST:
            self._remove(row, "reset", code)
        elif flags & FIN and not row.peer_fin:
            row.peer_fin = True
            if row.our_fin:
                self._remove(row, "closed", None)

    def _remove(self, row: Row, how: str, code: int | None) -> None:
        del self.rows[row.stream_id]
        self.ended.append((row, how, code))
        if not row.is_own and (row.is_waiting or row.is_released):
            self.incoming -= 1

    def _break(self) -> None:
        """Nothing of the frame takes effect; what we had not finished is reset, and GoAway(1) is the last word."""
        self.end = "protocol error"
        self.answers += [(WINDOW_UPDATE, RST, row.stream_id, 0) for row in self.rows.values() if not row.our_fin]
        self.answers.append((GO_AWAY, 0, 0, 1))
