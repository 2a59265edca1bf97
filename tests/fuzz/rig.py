"""A session in memory, watched from all sides: no descriptor is read, no time passes, all is over when it is quiet.

`Link` is the connection as its peer sees it: put bytes in, look at what came out. `Watched` is a session over it. At each
receive it asks the model (`receiver.py`) what these bytes must do, and looks afterwards whether they did; what leaves is
judged by the auditor of ``support/wire.py``. A `Fault` is raised at the first difference.

It looks at private fields of sessions: a snapshot of all that may not change is more than a user can see.
"""

from __future__ import annotations

import errno
import io
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

import gevent
import gevent.socket

sys.path.append(str(Path(__file__).resolve().parents[1]))

from support.wire import DATA, GO_AWAY, HEADER_SIZE, SYN, Audit, Frame, _Audited

from .receiver import Receiver, Row

#: What a socket is asked about itself it answers for all; its descriptor is for watchers that are never started.
_REAL, _OTHER = gevent.socket.socketpair()
#: The mark of a stream that the application is done with.
_UNCLAIMED = 0x20
_RELEASED = 0x2


class Fault(AssertionError):
    """The session did what it must never do."""


def require(condition: object, otherwise: str) -> None:
    if not condition:
        raise Fault(otherwise)


def settle() -> None:
    """Return when this hub has nothing to do but to wait for time. In memory that is exact, and costs a microsecond."""
    hub = gevent.get_hub()
    callbacks: Any = hub.loop._callbacks  # type: ignore[attr-defined]
    while True:
        gevent.sleep(0)
        if callbacks:
            continue
        # Who wakes greenlets lets the loop look around now and then: after the next turn of the loop it goes on.
        waker: Any = getattr(hub, "_geyamux_waker", None)
        if waker is None or not waker.is_paused:
            return
        gevent.sleep(1e-6)


class Readiness:
    """Stands for a watcher of the loop: calls back in each turn in which it is started and what it watches is ready."""

    def __init__(self, is_ready: Callable[[], bool]) -> None:
        self._loop = gevent.get_hub().loop
        self._is_ready = is_ready
        self._callback: Callable[[], object] | None = None
        self._is_due = False

    def start(self, callback: Callable[[], object]) -> None:
        self._callback = callback
        self.poke()

    def stop(self) -> None:
        self._callback = None

    close = stop

    def poke(self) -> None:
        if self._callback is not None and not self._is_due and self._is_ready():
            self._is_due = True
            self._loop.run_callback(self._fire)

    def _fire(self) -> None:
        self._is_due = False
        if self._callback is not None and self._is_ready():
            self._callback()
            self.poke()


class Link:
    """A connection in memory. The peer's side is played by who made it."""

    def __init__(self) -> None:
        self.incoming = bytearray()
        #: A receive gets so many bytes at most.
        self.cut = 1 << 20
        #: What is raised where the connection breaks, b"" where it ends.
        self.end: OSError | bytes | None = None
        #: So much may still be sent; None: anything.
        self.room: int | None = None
        self.send_error: OSError | None = None
        self.on_recv: Callable[[bytes], None] = lambda piece: None
        self.on_send: Callable[[bytes], None] = lambda piece: None
        self.is_closed = False
        #: Receives that were made, and those that would have been enough for what was put in.
        self.receives = 0
        self.pieces = 0
        self.reads = Readiness(self.can_recv)
        self.writes = Readiness(self.can_send)

    def can_recv(self) -> bool:
        return bool(self.incoming) or self.end is not None or self.is_closed

    def can_send(self) -> bool:
        return self.room != 0 or self.send_error is not None or self.is_closed

    # what the peer does

    def put(self, data: bytes) -> None:
        self.incoming += data
        self.pieces += 1 + len(data) // min(self.cut, 4096)
        self.reads.poke()

    def finish(self, end: OSError | bytes = b"") -> None:
        self.end = end
        self.reads.poke()

    def allow(self, room: int | None) -> None:
        """Take so many bytes more."""
        self.room = None if room is None or self.room is None else self.room + room
        self.writes.poke()

    # what the session does

    def recv_now(self, size: int) -> bytes:
        self.receives += 1
        if self.is_closed:
            raise OSError(errno.EBADF, "closed")
        if self.incoming:
            piece = bytes(self.incoming[: min(size, self.cut)])
            del self.incoming[: len(piece)]
            self.on_recv(piece)
            return piece
        if isinstance(self.end, OSError):
            raise OSError(*self.end.args)
        if self.end is None:
            raise BlockingIOError(errno.EAGAIN, "nothing is there")
        self.on_recv(b"")
        return self.end

    def send_now(self, data: bytes) -> int:
        if self.is_closed:
            raise OSError(errno.EBADF, "closed")
        if self.send_error is not None:
            raise OSError(*self.send_error.args)
        part = data if self.room is None else data[: self.room]
        if not part:
            raise BlockingIOError(errno.EAGAIN, "no room")
        if self.room is not None:
            self.room -= len(part)
        self.on_send(part)
        return len(part)

    def close(self) -> None:
        self.is_closed = True
        self.reads.poke()
        self.writes.poke()


class ObjectEnd:
    """The session's side as a cooperative object without a descriptor."""

    def __init__(self, link: Link) -> None:
        self._link = link
        self.close = link.close

    def recv(self, size: int) -> bytes:
        self._wait(self._link.reads, self._link.can_recv)
        return self._link.recv_now(size)

    def send(self, data: Any) -> int:
        self._wait(self._link.writes, self._link.can_send)
        return self._link.send_now(bytes(data))

    def shutdown(self, how: int) -> None:
        if self._link.is_closed:
            raise OSError(errno.EBADF, "closed")

    def _wait(self, readiness: Readiness, is_ready: Callable[[], bool]) -> None:
        while not is_ready():
            readiness.start(gevent.getcurrent().switch)
            try:
                gevent.get_hub().switch()
            finally:
                readiness.stop()


class SocketEnd(gevent.socket.socket):
    """The session's side as a gevent socket: it has a descriptor, never waits, and sends from several buffers."""

    def __init__(self, link: Link) -> None:
        # Not the constructor of a socket: no byte goes through the one below.
        self._sock: Any = _REAL._sock  # type: ignore[attr-defined]  # the types do not know it
        self._link = link

    def settimeout(self, howlong: float | None) -> None:
        pass

    def fileno(self) -> int:
        return _REAL.fileno()

    def makefile(self, *args: Any, **kwargs: Any) -> Any:
        return io.BytesIO()  # something to close

    def recv(self, *args: Any) -> bytes:
        return self._link.recv_now(args[0])

    def send(self, data: Any, flags: int = 0) -> int:
        return self._link.send_now(bytes(data))

    def sendmsg(self, *args: Any) -> int:
        return self._link.send_now(b"".join(args[0]))

    def shutdown(self, how: int) -> None:
        if self._link.is_closed:
            raise OSError(errno.EBADF, "closed")

    def close(self) -> None:
        self._link.close()

    def __repr__(self) -> str:
        return "<SocketEnd>"


class LenientAudit(Audit):
    """The auditor, for a peer that breaks the rules.

    What a peer sends is not judged, only noted, and no more of it once it can't be Yamux. Where it opens an id anew
    before we have said our last word on the stream before, the two can't be told apart on the wire: nothing more is
    judged there.
    """

    def __init__(self, *, client: bool, max_window: int) -> None:
        super().__init__(client=client, max_window=max_window)
        self._muddled: set[int] = set()
        self._head = b""
        self._missing = 0
        self._current = 0
        self._is_deaf = False

    def received(self, chunk: Any) -> None:
        data = bytes(chunk)
        while data and not self._is_deaf:
            if self._missing:
                part, data = data[: self._missing], data[self._missing :]
                self._missing -= len(part)
                if self._current in self.streams:
                    self.streams[self._current].taken += len(part)
                continue
            self._head, data = self._head + data[: HEADER_SIZE - len(self._head)], data[HEADER_SIZE - len(self._head) :]
            if len(self._head) == HEADER_SIZE:
                head, self._head = self._head, b""
                self._note_header(head)

    def _note_header(self, head: bytes) -> None:
        flags, stream_id, length = (int.from_bytes(head[a:b], "big") for a, b in ((2, 4), (4, 8), (8, 12)))
        if head[0] or head[1] > GO_AWAY:
            self._is_deaf = True
            return
        before = self.streams.get(stream_id)
        is_opening = flags & SYN and head[1] < 2 and (stream_id % 2 == 0) == self.client
        if is_opening and before is not None and not (before.rst or (before.fin and before.peer_ended)):
            self._muddled.add(stream_id)
        if stream_id and head[1] < 2 and (stream_id % 2 == 1) == self.client:
            # A guess at an id of ours whose SYN has not left is noted, too.
            self.streams.setdefault(stream_id, _Audited(ours=True))
        if head[1] == DATA:
            self._missing, self._current = length, stream_id
        self._note(Frame(head[0], head[1], flags, stream_id, 0 if head[1] == DATA else length))

    def _check_stream(self, found: Frame) -> None:
        if found.stream_id not in self._muddled:
            super()._check_stream(found)


def rows_of(session: Any) -> dict[int, Row]:
    """The live streams of a session, as the model writes them down."""
    rows = {}
    for stream_id, stream in session._table.streams.items():
        life, stats = stream._life, stream.stats()
        rows[stream_id] = Row(
            stream_id,
            is_own=stream_id % 2 == session.is_client,
            is_acknowledged=life.acknowledged,
            is_waiting=stream_id in session._table.backlog,
            peer_fin=not life.can_receive,
            our_fin=not life.can_send,
            is_released=bool(stream._marks & _UNCLAIMED),
            unread=stats.unread,
            window=stats.receive_window,
            credit=stats.send_credit,
            allowance=_allowance(stream),
        )
    return rows


def _allowance(stream: Any) -> int | None:
    """How many bytes may still be dropped; a buffer that counts them is made when the first of them comes."""
    if stream._buffer is not None:
        allowance: int | None = stream._buffer._allowance
        return allowance
    return stream._receive_limit() if stream._marks & _RELEASED else None


class Watched:
    """A session over a link, with its model and its auditor."""

    def __init__(self, kind: type, config: Any, *, as_socket: bool) -> None:
        self.link = link = Link()
        self.session: Any = kind(SocketEnd(link) if as_socket else ObjectEnd(link), config)
        config = self.session.config
        if as_socket:
            for part, readiness in ((self.session._reader, link.reads), (self.session._outbox, link.writes)):
                part._watcher.close()
                part._watcher = readiness
        is_client = self.session.is_client
        self.model = Receiver(is_client, config.accept_backlog, config.max_incoming_streams, config.window_limit)
        self.audit = LenientAudit(client=is_client, max_window=config.window_limit)
        #: What a stream has been sent for its reader, of every stream there ever was.
        self.delivered: WeakKeyDictionary[Any, bytearray] = WeakKeyDictionary()
        #: Streams whose peer has ended its half.
        self.finished: WeakSet[Any] = WeakSet()
        #: Frames that left, in order.
        self.sent: list[Frame] = []
        #: What was found where nobody can be told.
        self.faults: list[AssertionError] = []
        self._is_under_way = False
        #: Before the piece: the next id of ours, and the streams where somebody waited to read, and to write.
        self._next_id = 0
        self._read: set[int] = set()
        self._written: set[int] = set()
        link.on_recv, link.on_send = self._on_recv, self._on_send

    def feed(self, data: bytes, cut: int = 1 << 20) -> None:
        """The peer sends this; return when the session has done all that it will do about it."""
        self.link.cut = cut
        self.link.put(data)
        self.settle()

    def settle(self) -> None:
        """Let the session do all that it will do by itself, and raise what was found."""
        settle()
        self.check()
        if self.faults:
            raise self.faults[0]

    # -- what passes

    def _on_send(self, part: bytes) -> None:
        try:
            self.audit.sent(part)
        except AssertionError as fault:
            self.faults.append(fault)
        self.sent += self.audit.frames
        self.audit.frames.clear()

    def _on_recv(self, piece: bytes) -> None:
        try:
            self.check()
            self._begin(piece)
        except AssertionError as fault:
            self.faults.append(fault)

    def _begin(self, piece: bytes) -> None:
        session = self.session
        self.audit.received(piece)
        if session._reader.is_discarding or not piece:
            return
        model = self.model
        model.rows = rows_of(session)
        for row in model.rows.values():
            row.stream = session._table.streams[row.stream_id]
        model.incoming = session._table._incoming
        model.admitted = session._table.admitted
        model.is_refusing = session._table.is_refusing
        self._note_streams()
        self._next_id = session._table._next_id
        streams = session._table.streams.items()
        self._read = {
            stream_id for stream_id, stream in streams if stream._readers is not None or stream._greenlet is not None
        }
        self._written = {stream_id for stream_id, stream in streams if stream._writers is not None}
        model.take(piece)
        self._is_under_way = True

    def _note_streams(self) -> None:
        for stream in self.session._table.streams.values():
            if stream not in self.delivered:
                self.delivered[stream] = bytearray()

    # -- what must have become of it

    def check(self) -> None:
        """Compare with the model what the piece that was received last has done."""
        if not self._is_under_way:
            return
        self._is_under_way = False
        session, model = self.session, self.model
        if model.end is not None:
            self._check_end()
        else:
            require(not session._reader.is_discarding or self._is_ending(), f"ended for nothing: {session._reason!r}")
        require(session._table.admitted == model.admitted, "a stream came into being, or did not, against the rules")
        self._note_delivered()
        if model.end is None and not self._is_ending():
            self._check_rows()

    def _is_ending(self) -> bool:
        """It ends for another reason than what was received: the application, or sending, which broke."""
        return self.session._is_closing or self.session._reason is not None

    def _check_end(self) -> None:
        session, end = self.session, self.model.end
        require(session._reader.is_discarding, f"lives after {end}")
        if not session._is_closing:
            name = "ProtocolError" if end == "protocol error" else "RemoteError"
            found = type(session._reason).__name__
            require(found == name or self.link.send_error, f"{end} ended it with {session._reason!r}")
        if end == "protocol error":
            require(session._table.reason is not None, "streams live after a protocol error")

    def _note_delivered(self) -> None:
        self._note_streams()
        table = self.session._table
        for row in [*self.model.rows.values(), *(row for row, _, _ in self.model.ended)]:
            stream = row.stream or table.streams.get(row.stream_id) or table.backlog.get(row.stream_id)
            if stream is not None:
                self.delivered.setdefault(stream, bytearray()).extend(row.delivered)
                if row.peer_fin:
                    self.finished.add(stream)
            # Streams that nobody can reach any more are collected, and no longer counted.
            row.delivered, row.stream = bytearray(), None

    def _check_rows(self) -> None:
        expected, found = self.model.rows, rows_of(self.session)
        given_up = expected.keys() - found.keys()
        # Who waited to open may have come to it.
        for stream_id in range(self._next_id, self.session._table._next_id, 2):
            found.pop(stream_id, None)
        is_over_budget = self.session.config.receive_budget < sum(row.unread for row in expected.values())
        require(found.keys() <= expected.keys(), f"there are {set(found)}, there should be {set(expected)}")
        require(len(given_up) <= is_over_budget, f"{given_up} ended for nothing")
        for stream_id, row in found.items():
            self._check_row(stream_id, row, expected[stream_id])

    def _check_row(self, stream_id: int, found: Row, expected: Row) -> None:
        for name in ("is_acknowledged", "peer_fin", "our_fin"):
            mine, right = getattr(found, name), getattr(expected, name)
            require(mine == right, f"stream {stream_id}: {name} is {mine}, should be {right}")
        # Somebody may have waited to accept it.
        require(found.is_waiting <= expected.is_waiting, f"stream {stream_id} waits for accept")
        require(
            found.unread == expected.unread or (stream_id in self._read and found.unread < expected.unread),
            f"stream {stream_id}: {found.unread} bytes unread, should be {expected.unread}",
        )
        require(
            found.credit == expected.credit or (stream_id in self._written and found.credit < expected.credit),
            f"stream {stream_id}: credit {found.credit}, should be {expected.credit}",
        )
        require(0 <= found.credit <= 0xFFFFFFFF, f"stream {stream_id}: credit {found.credit}")
        require(found.window >= expected.window, f"stream {stream_id}: window {found.window} < {expected.window}")
