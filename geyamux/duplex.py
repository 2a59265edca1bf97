"""The two directions of a stream: what waits, what is charged, how each ends.

:class:`Duplex` is the working half of :class:`geyamux.Stream`; the methods that users call, with their many names, stand
in :mod:`geyamux.stream`. It knows the outbox, and an owner to whom it tells three things: acknowledged, ended, released.

Between two waits nothing else runs, so state is changed without locks: first the state, then the wake. A reader or writer
that can't go on at once stands in line; the first in line keeps its turn until its call ends, so each call reads or
writes contiguous bytes. Every wait may be left by a kill, a foreign Timeout or the deadline; what a call holds then goes
back in a ``finally`` or ``except BaseException``: bytes to the buffer, credit to the window, the place in line.

Who reads alone and without a limit takes a straight road: it parks on the stream itself, without a line or a waiter, and
is given the next message without a buffer. A round trip takes 8 % less so (25.9 to 23.9 microseconds on one processor).

Longer than other modules because both directions share the state, the marks and the ends: cut apart, each half would
have to know the other.
"""

from __future__ import annotations

import errno
import io
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol

from gevent import getcurrent

from .config import Config
from .errors import ProtocolError, SessionError, StreamClosed, StreamReset
from .flow import ReceiveBudget, ReceiveBuffer, add_piece, widen
from .frame import ACK, DATA, FIN, HEADER, INITIAL_WINDOW, WINDOW_UPDATE
from .lifecycle import Lifecycle
from .outbox import BURST, LARGE, LargeFrame, Outbox
from .stats import Account, Ledger
from .waiting import Deadline, earlier, get_thread, run_links, timed_out
from .waking import Waiter, WaitList

if TYPE_CHECKING:
    from .session import Session

__all__ = ["Duplex", "StreamOwner"]

_pack = HEADER.pack
_ESTABLISHED, _SYN_SENT = Lifecycle.ESTABLISHED, Lifecycle.SYN_SENT

#: Frames are as large as this even where a quarter of the window is less: smaller ones cost half the throughput.
_FRAME_AT_LEAST = 65536
#: rust-yamux ends the connection at a larger one.
_FRAME_AT_MOST = 1 << 20
#: What a read counts as, in bytes written: a reader of single bytes may never have to wait, nor one of lines, which cost
#: more.
_READ_WORK = 512
_FULL_READ_WORK = 1536
#: The piece that waits is counted in the budget, since nobody waited for it.
_COUNTED = -1
#: The deadline of calls after settimeout(0): they raise BlockingIOError where others wait.
_NEVER_WAIT = Deadline(0.0)
#: A shutdown(SHUT_RD) drops any amount.
_UNBOUNDED = 1 << 62

# Bits of `_marks`. A stream that has none set is open in the eyes of the application.
#: close() was called; makefile() objects may still use the stream.
CLOSED = 0x1
#: ... and none of those is left: the application is done with it.
RELEASED = 0x2
#: shutdown(SHUT_RD): reads say EOF.
SHUT_RD = 0x4
#: The peer's FIN came: reads end in EOF, whatever happens later.
EOF = 0x8
#: The session has ended.
ORPHANED = 0x10
#: The application has no claim on it any more, and the session does not count it.
UNCLAIMED = 0x20

Link = Callable[[Any], object]


class StreamOwner(Protocol):
    """What a stream tells its session's table. None of these may wait."""

    config: Config
    session: Session
    budget: ReceiveBudget
    ledger: Ledger
    #: The thread whose hub the session belongs to.
    thread: int
    #: A small message may be one frame up to here.
    largest_small: int
    #: The full receive window of an established stream.
    window: int
    #: Why the session ended; None while it lives.
    reason: SessionError | None

    def on_acknowledged(self, stream: Any) -> None:
        """An own stream has been heard of, or given up: its place among the unacknowledged is free."""

    def on_ended(self, stream: Any) -> None:
        """Nothing more goes either way."""

    def on_released(self, stream: Any) -> None:
        """The application is done with it."""

    def on_unread(self, stream: Any) -> None:
        """It has ended, and bytes wait in it again."""

    def is_unborn(self, stream: Any) -> bool:
        """Its SYN has not left: the peer need never hear of it."""


class Rare:
    """What few streams have: four references less for all others. Who has one takes no straight road."""

    __slots__ = ("account", "followers", "links", "reset")

    def __init__(self) -> None:
        #: Who waits for what becomes of the stream, in flush and wait_established; None while nobody does.
        self.followers: WaitList | None = None
        #: Callbacks of gevent.wait.
        self.links: list[Link] = []
        #: (code, by the peer) of the reset; None where the end of the session did it.
        self.reset: tuple[int, bool] | None = None
        #: What the ledger knew when the stream or the session ended; None where that was nothing.
        self.account: Account | None = None


class Duplex(io.BufferedIOBase):
    """Receive and send sides of one stream."""

    __slots__ = (
        "_awaits",
        "_buffer",
        "_credit",
        "_greenlet",
        "_io_refs",
        "_life",
        "_marks",
        "_outbox",
        "_owner",
        "_piece",
        "_position",
        "_rare",
        "_readers",
        "_taken",
        "_timeout",
        "_writers",
        "stream_id",
    )

    def __init__(
        self,
        stream_id: int,
        owner: StreamOwner,
        outbox: Outbox,
        life: Lifecycle,
        timeout: float | None,
    ) -> None:
        #: The id on the wire: odd where the client opened it.
        self.stream_id = stream_id
        self._owner = owner
        self._outbox = outbox
        self._life = life
        #: Unread bytes and window; None while nothing waits, so that an idle stream is small, or one piece alone.
        self._buffer: ReceiveBuffer | None = None
        #: So many bytes may be given to the greenlet that reads alone, without counting them; 0: none. `_COUNTED`: they
        #: are there and counted.
        self._awaits = 0
        #: What waits to be read, if that came in one piece, as most messages do, and there is no buffer.
        self._piece: bytes | None = None
        #: While there is none: what was taken of the window and not granted anew.
        self._taken = 0
        #: What we may send before the peer grants more.
        self._credit = INITIAL_WINDOW
        #: Of its last ordered frame in the outbox.
        self._position = 0
        #: Of every blocking call, seconds; None waits for ever, 0 never.
        self._timeout = timeout
        #: makefile() objects that are open.
        self._io_refs = 0
        self._marks = 0
        #: The only one who waits to read; it parks here, without a line.
        self._greenlet: Any = None
        #: Who waits to read besides, and to write; None while nobody does.
        self._readers: WaitList | None = None
        self._writers: WaitList | None = None
        #: What few streams have, and not for long.
        self._rare: Rare | None = None

    @property
    def session(self) -> Session:
        """The session that carries it."""
        return self._owner.session

    # -- frames of the peer

    def _on_header(self, length: int) -> None:
        """Raise ProtocolError where the window does not allow so many bytes. Changes nothing."""
        buffer = self._buffer
        window = self._receive_limit() - self._taken - len(self._piece or b"") if buffer is None else buffer.window
        if length > window:
            raise ProtocolError(
                f"stream {self.stream_id}: the peer sent {length} bytes into a window of {window}. Known causes: "
                "hashicorp/yamux retrying a write after a timeout; go-yamux with parallel writers on one stream"
            )

    def _on_data(self, payload: bytes) -> None:
        """Take in bytes that the window allows; they belong to the reader, or to nobody."""
        if len(payload) <= self._awaits:
            # The straight road of a message that is waited for.
            self._awaits = 0
            self._piece = payload
            lane = self._outbox.lane
            if not lane.is_ready:
                lane.get_ready()
            lane.due.append(self)
            return
        if not self._life.acknowledged:
            self._on_flags(0)
        size = len(payload)
        if (
            self._buffer is None
            and self._piece is None
            and self._life.can_receive
            and not self._marks
            and size <= self._receive_limit() - self._taken
        ):
            self._piece, self._awaits = payload, _COUNTED
            budget = self._owner.budget
            budget.unread += size
            budget.received += size
            self._wake_reader()
        else:
            self._add_data(payload)
        if self._rare is not None:
            self._schedule_links()

    def _add_data(self, payload: bytes) -> None:
        """Take in bytes behind others, or such as nobody will read."""
        buffer = self._make_buffer()
        if len(payload) > buffer.window:
            self._on_header(len(payload))
        if not self._life.can_receive:
            # After its own FIN or RST: a write of the peer that raced its close.
            buffer.window -= len(payload)
        elif not buffer.append(payload):
            self._abandon(0, "data_after_close")
            self._outbox.on_provoked()
        else:
            self._wake_reader()
        if self._marks:
            # Closed or shut down here: what is dropped is credited.
            self._grant(buffer)

    def _on_credit(self, delta: int) -> None:
        """The peer lets us send more."""
        self._credit = widen(self._credit, delta, self.stream_id)
        if self._writers is not None:
            self._writers.wake_first()

    def _on_flags(self, flags: int, code: int = 0) -> None:
        """A frame of the peer with these flags, after its payload or credit was taken in."""
        before = self._life
        life = before.on_frame(flags)
        if life is before:
            return
        if life.is_reset:
            self._owner.ledger.resets["received"] += 1
            self._have_rare().reset = (code, True)
            self._take_back()
            self._outbox.forget(self.stream_id)
        elif before.can_receive and not life.can_receive:
            self._marks |= EOF
            self._outbox.forget_grant(self.stream_id)
        self._become(life)
        if life.is_reset or not life.can_receive:
            self._wake_all()

    def _on_session_end(self) -> None:
        """The session ended: everyone who waits learns why."""
        self._keep_account()
        self._marks |= ORPHANED
        if self._buffer is not None:
            self._buffer.release()
        self._wake_all()

    def _become(self, life: Lifecycle) -> None:
        """The one place where the state changes: tell the owner what that means."""
        before, self._life = self._life, life
        if not before.acknowledged and life.acknowledged:
            self._owner.on_acknowledged(self)
            if self._greenlet is not None and life is _ESTABLISHED and not self._marks and self._rare is None:
                self._awaits = self._owner.window
            if self._rare is not None and self._rare.followers is not None:
                self._rare.followers.wake_all()
        if life.ended and not before.ended:
            self._keep_account()
            if self._buffer is not None:
                self._buffer.release()
            if self._rare is not None and self._rare.followers is not None:
                self._rare.followers.wake_all()
            self._owner.on_ended(self)

    # -- receiving

    def _receive_limit(self) -> int:
        """The full receive window: a peer's stream has what we grant only once it was acknowledged."""
        return self._owner.window if self._life.is_granted else INITIAL_WINDOW

    @property
    def _unread(self) -> int:
        """Bytes that wait to be read."""
        if self._piece is not None:
            return len(self._piece)
        return 0 if self._buffer is None else self._buffer.unread

    def _make_buffer(self) -> ReceiveBuffer:
        """The buffer, now that there must be one: with what was given to the reader and not taken."""
        buffer = self._buffer
        if buffer is None:
            buffer = self._buffer = ReceiveBuffer.with_taken(self._owner.budget, self._receive_limit(), self._taken)
            piece, awaits = self._piece, self._awaits
            self._piece, self._awaits = None, 0
            if piece is not None:
                buffer.append(piece, is_counted=awaits == _COUNTED)
            if self._marks & RELEASED:
                buffer.discard(buffer.limit)
        return buffer

    def _accepted(self) -> None:
        """The application has taken the stream: acknowledge it, with what its window is larger than the initial one."""
        extra = self._owner.window - INITIAL_WINDOW
        if self._buffer is not None:
            self._buffer.extend_limit(extra)
        self._become(self._life.accepted)
        if self._marks & ORPHANED:
            return
        extra = extra if self._life.can_receive else 0
        if self._outbox.is_easy:
            # Nothing waits that it would have to pass.
            self._position = self._outbox.append(_pack(0, WINDOW_UPDATE, ACK, self.stream_id, extra))
        else:
            self._outbox.acknowledge(self.stream_id, extra)

    def _read(self, size: int) -> bytes:
        """Return 1 to `size` bytes, or b"" at EOF."""
        outbox, owner = self._outbox, self._owner
        if get_thread() != owner.thread:
            self._check_thread()
        if (
            self._piece is None
            and self._buffer is None
            and self._greenlet is None
            and self._readers is None
            and self._timeout is None
            and not self._marks
            and (self._life is _ESTABLISHED or self._life is _SYN_SENT)
            and self._rare is None
        ):
            # The straight road of who waits for a message, alone and without a limit.
            if self._life is _ESTABLISHED:
                self._awaits = owner.window - self._taken
            self._greenlet = getcurrent()
            try:
                outbox.lane.switch()
            except BaseException:
                self._await_nothing()
                raise
            finally:
                self._greenlet = None
                if self._readers is not None:
                    self._readers.wake_first()
        elif self._readers is not None or self._greenlet is not None or outbox.pace.burst >= BURST:
            return self._read_in_line(size)
        piece = self._piece
        if piece is not None and len(piece) <= size:
            if self._awaits:
                # Nobody had waited for it.
                owner.budget.unread -= len(piece)
                self._awaits = 0
                outbox.pace.burst += _READ_WORK
            else:
                owner.budget.received += len(piece)
            self._piece = None
            self._taken = taken = self._taken + len(piece)
            if taken * 2 >= owner.window:
                self._grant_taken()
            return piece
        if self._awaits > 0:
            # Woken for nothing. In the line bytes are given to nobody.
            self._awaits = 0
        if self._unread:
            return self._take(size)
        return self._read_in_line(size)

    def _await_nothing(self) -> None:
        """Whoever waited alone is gone, or may not be given bytes any more. What it was given is unread."""
        if self._awaits > 0:
            self._awaits = 0
        elif self._piece is not None:
            self._make_buffer()

    def _read_in_line(self, size: int) -> bytes:
        deadline = self._deadline()
        turn = self._enter_readers()
        try:
            self._outbox.take_turns(0)
            if not self._wait_readable(turn, deadline):
                return b""
            return self._take(size)
        finally:
            self._leave_readers(turn)

    def _read_full(self, size: int, pull: Callable[[ReceiveBuffer, int], bytes]) -> bytes:
        """Pull pieces until `size` bytes are there, or EOF (-1: only that), or `pull` returned a line's end.

        When anything strikes in a wait the pieces go back: they are first in line again.
        """
        deadline = self._deadline()
        pieces: list[bytes | bytearray] = []
        missing = _UNBOUNDED if size < 0 else size
        turn = self._enter_readers()
        try:
            self._outbox.take_turns(_FULL_READ_WORK)
            while missing > 0 and self._wait_readable(turn, deadline):
                buffer = self._make_buffer()
                piece = pull(buffer, missing)
                add_piece(pieces, piece)
                missing -= len(piece)
                self._grant(buffer)
                if pull is _take_line and piece.endswith(b"\n"):
                    break
        except BaseException:
            if pieces:
                assert self._buffer is not None
                self._buffer.put_back(b"".join(pieces))
                if self._life.ended:
                    self._owner.on_unread(self)
            raise
        finally:
            self._leave_readers(turn)
        if self._buffer is not None:
            self._settle(self._buffer)
        return pieces[0] if len(pieces) == 1 and type(pieces[0]) is bytes else b"".join(pieces)

    def _take(self, size: int) -> bytes:
        """Take up to `size` bytes; there must be some."""
        self._outbox.count_work(_READ_WORK)
        buffer = self._make_buffer()
        data = buffer.take(size)
        self._settle(buffer)
        return data

    def _settle(self, buffer: ReceiveBuffer) -> None:
        """After a read: put the buffer away if it is empty, or grant credit that is due."""
        taken = -1 if buffer.unread else buffer.taken_alone()
        if taken >= 0:
            self._taken, self._buffer = taken, None
            buffer.put_away()
        elif buffer.grant_is_due:
            self._grant(buffer)

    def _grant(self, buffer: ReceiveBuffer) -> None:
        if not buffer.grant_is_due or not self._may_grant():
            return
        outbox = self._outbox
        if outbox.is_easy and self._position > outbox.loaded and not outbox.has_grant(self.stream_id):
            # It must not pass the acknowledgement, which may wait there. A grant that waits already does not.
            credit = outbox.take_grant(self.stream_id, buffer)
            self._position = outbox.enqueue(_pack(0, WINDOW_UPDATE, 0, self.stream_id, credit))
        else:
            outbox.grant(self.stream_id, buffer)

    def _grant_taken(self) -> None:
        """Half of the window was taken, and there is no buffer. One is made only where the window may grow."""
        if self._owner.budget.window_limit > self._owner.window or self._position > self._outbox.loaded:
            self._grant(self._make_buffer())
        elif self._may_grant():
            self._outbox.add_credit(self.stream_id, self._taken)
            self._taken = 0

    def _may_grant(self) -> bool:
        """Credit makes sense. A peer may have guessed the id of a stream whose SYN has not left: it would pass that."""
        return self._life.can_receive and not self._marks & ORPHANED and not self._owner.is_unborn(self)

    def _wait_readable(self, turn: Waiter, deadline: Deadline | None) -> bool:
        """Wait for this call's turn and for bytes: True; False at EOF. Raises what else ends a read."""
        readers = self._readers
        assert readers is not None
        while True:
            if self._unread:
                if self._greenlet is None and readers.is_first(turn):
                    return True
            elif self._is_read_over():
                return False
            self._wait(turn, deadline)

    def _is_read_over(self) -> bool:
        """Whether reads say EOF, now that nothing is buffered; raises where that would be a lie."""
        if self._marks & RELEASED:
            raise StreamClosed(f"stream {self.stream_id} is closed")
        if self._marks & (SHUT_RD | EOF):
            return True
        if self._life.is_reset:
            raise self._reset_error()
        if self._marks & ORPHANED:
            raise self._session_error()
        return False

    def _enter_readers(self) -> Waiter:
        self._check_thread()
        if self._readers is None:
            self._readers = WaitList(self._outbox.lane)
        return self._readers.enter()

    def _leave_readers(self, turn: Waiter) -> None:
        assert self._readers is not None
        if not self._readers.leave(turn):
            self._readers = None

    def _wake_reader(self) -> None:
        """Let the reader look whose turn it is."""
        if self._greenlet is not None:
            self._outbox.lane.wake_parked(self)
        elif self._readers is not None:
            self._readers.wake_first()

    # -- sending

    def _write(self, data: memoryview, deadline: Deadline | None, *, partial: bool = False) -> int:
        """Send all bytes, or with `partial` what goes without another wait; return how many.

        A TimeoutError carries them as `bytes_sent`.
        """
        self._check_thread()
        turn: Waiter | None = None
        sent, total = 0, len(data)
        try:
            while sent < total:
                size = 0 if turn is not None or deadline is _NEVER_WAIT else self._free_size(total - sent)
                if not size:
                    turn = turn or self._enter_writers()
                    size = self._wait_writable(turn, deadline, total - sent)
                header = _pack(0, DATA, 0, self.stream_id, size)
                with data[sent : sent + size] as piece:
                    if size <= LARGE or deadline is _NEVER_WAIT:
                        self._credit -= size
                        self._position = self._outbox.append(b"".join((header, piece)))
                        sent += size
                    else:
                        frame = LargeFrame(self.stream_id, header, piece, turn)
                        if self._outbox.send_large(frame):
                            self._credit -= size
                            self._position = self._outbox.appended
                            sent += size
                        else:
                            turn = frame.waiter = turn or self._enter_writers()
                            sent += self._send_large(frame, turn, deadline)
                if not self._outbox.is_easy:
                    self._outbox.catch_breath()
                if partial and (turn is not None or not self._free_size(total - sent)):
                    break
        except _Unfinished as unfinished:
            raise self._with_count(unfinished.cause, sent + unfinished.sent) from None
        except (TimeoutError, BlockingIOError) as error:
            raise self._with_count(error, sent) from None
        finally:
            if turn is not None:
                self._leave_writers(turn)
        return sent

    def _free_size(self, wanted: int) -> int:
        """How large the next frame may be where nobody stands in line and nothing has to be waited for; else 0.

        Standing in a line for each write costs a bulk transfer a twentieth.
        """
        if self._writers is None and self._credit and self._outbox.is_easy and self._life.can_send:
            return min(wanted, self._credit, self._frame_size())
        return 0

    def _send_large(self, frame: LargeFrame, turn: Waiter, deadline: Deadline | None) -> int:
        """Send a frame whose payload is not copied, and wait until it is taken; return how many bytes go to the peer."""
        size = len(frame.payload)
        self._credit -= size
        try:
            self._outbox.append_large(frame)
            self._position = self._outbox.appended
            while not frame.is_done:
                if self._life.is_reset or self._marks & ORPHANED:
                    self._check_usable()
                if not turn.park(deadline):
                    raise timed_out()
        except BaseException as error:
            if self._outbox.withdraw(frame):
                self._credit += size
                size = 0
            if isinstance(error, TimeoutError):
                raise _Unfinished(error, size) from None
            raise
        if self._life.is_reset or self._marks & ORPHANED:
            self._check_usable()
        if frame.is_lost:
            raise self._session_error()
        return size

    def _with_count(self, error: BaseException, sent: int) -> BaseException:
        if isinstance(error, BlockingIOError):
            error.characters_written = sent
        error.bytes_sent = sent  # type: ignore[attr-defined]  # the promise of rule 14
        return error

    def _wait_writable(self, turn: Waiter, deadline: Deadline | None, wanted: int) -> int:
        """Wait for this call's turn, for credit and for room; return how large the next frame may be."""
        outbox, writers = self._outbox, self._writers
        assert writers is not None
        hopeless: Deadline | None = None
        while True:
            self._check_writable()
            if not writers.is_first(turn):
                self._wait(turn, deadline)
                continue
            if not self._credit:
                if hopeless is None and self._marks & EOF:
                    hopeless = Deadline.after(self._owner.config.stream_close_timeout)
                self._wait_for_credit(turn, deadline, hopeless)
                continue
            size = min(wanted, self._credit, self._frame_size())
            if deadline is _NEVER_WAIT:
                # It is copied, however large; so no more of it than there is room.
                if not outbox.has_room:
                    raise _would_block()
                return min(size, outbox.room)
            if size <= LARGE and not outbox.has_room:
                outbox.wait_room(turn, deadline, self._is_write_pointless)
                self._check_writable()
            return size

    def _is_write_pointless(self) -> bool:
        return not self._life.can_send or bool(self._marks & (RELEASED | ORPHANED))

    def _wait_for_credit(self, turn: Waiter, deadline: Deadline | None, hopeless: Deadline | None) -> None:
        """A peer that has ended its side and grants nothing for long does not read any more, and will never say so."""
        if deadline is _NEVER_WAIT:
            raise _would_block()
        self._owner.ledger.begin_wait(self)
        try:
            self._wait(turn, earlier(deadline, hopeless))
        except TimeoutError:
            if hopeless is None or hopeless.left() > 0:
                raise
            self._abandon(0, "no_credit")
        finally:
            self._count_blocked(self._owner.ledger.end_wait(self))

    def _count_blocked(self, seconds: float) -> None:
        if self._life.ended or self._marks & ORPHANED:
            # Its id may be another stream's by now.
            rare = self._have_rare()
            rare.account = rare.account or Account()
            rare.account.blocked += seconds
        else:
            blocked = self._owner.ledger.blocked
            blocked[self.stream_id] = blocked.get(self.stream_id, 0.0) + seconds

    def _frame_size(self) -> int:
        """The largest frame to send now: parts of a window, so that credit comes back while the rest is sent."""
        chosen = self._owner.config.max_frame_size
        if chosen is not None:
            return chosen
        return min(max(self._credit >> 2, _FRAME_AT_LEAST), _FRAME_AT_MOST)

    def _check_writable(self) -> None:
        """Raise what keeps this side from sending."""
        self._check_usable()
        if not self._life.can_send:
            raise StreamClosed(f"stream {self.stream_id} is shut down for writing", errno.EPIPE)

    def _check_usable(self) -> None:
        """Raise what keeps this side from doing anything."""
        if self._marks & RELEASED:
            raise StreamClosed(f"stream {self.stream_id} is closed")
        if self._life.is_reset:
            raise self._reset_error()
        if self._marks & ORPHANED:
            raise self._session_error()

    def _enter_writers(self) -> Waiter:
        self._check_thread()
        self._check_writable()
        if self._writers is None:
            self._writers = WaitList(self._outbox.lane)
        return self._writers.enter()

    def _leave_writers(self, turn: Waiter) -> None:
        assert self._writers is not None
        if not self._writers.leave(turn):
            self._writers = None

    # -- ends

    def _finish(self) -> None:
        """Send our FIN behind all data, once; nothing where it makes no sense any more."""
        if self._life.can_send and not self._marks & ORPHANED:
            self._position = self._outbox.append(_pack(0, WINDOW_UPDATE, FIN, self.stream_id, 0))
            self._become(self._life.finished)
            if self._writers is not None:
                self._writers.wake_all()

    def _shut_read(self) -> None:
        """Drop what is buffered and what comes, and let the peer go on."""
        buffer = self._make_buffer()
        buffer.discard(_UNBOUNDED)
        self._marks |= SHUT_RD
        self._grant(buffer)
        self._wake_all()

    def _release(self) -> None:
        """The application is done with both directions (R17)."""
        if self._piece is not None:
            self._make_buffer()  # now: of a released stream it would drop the piece uncounted
        self._marks |= CLOSED | RELEASED
        self._finish()
        if self._buffer is not None:
            self._drop_unread()
        self._wake_all()
        self._drop_claim()

    def _drop_unread(self) -> None:
        """Nobody will read what waits. A stream that has nothing does this when something comes: `_make_buffer`."""
        if not self._life.can_receive or self._marks & ORPHANED:
            self._make_buffer().discard(_UNBOUNDED)
            return
        buffer = self._make_buffer()
        if not buffer.discard(buffer.limit):
            self._abandon(0, "data_after_close")
        else:
            self._grant(buffer)

    def _drop_claim(self) -> None:
        """The application will not use it any more."""
        if not self._marks & UNCLAIMED:
            self._marks |= UNCLAIMED
            self._owner.on_released(self)

    def _abandon(self, code: int, why: str) -> None:
        """RST in place of all that this stream has queued. If its SYN has not left, both vanish.

        What was received stays readable: not every reset is the application's own wish. `why` is one of RESET_REASONS.
        """
        if self._life.ended:
            return
        self._owner.ledger.resets[why] += 1
        # The end of the session resets what is unfinished; that end is then the reason to give, not this.
        if self._owner.reason is None:
            self._have_rare().reset = (code, False)
        is_unborn = self._owner.is_unborn(self)
        self._take_back()
        if is_unborn:
            self._outbox.forget(self.stream_id)
        elif not self._marks & ORPHANED:
            self._outbox.reset(self.stream_id, code)
        self._become(Lifecycle.RESET)
        self._wake_all()

    def _take_back(self) -> None:
        """Nothing of what this stream has queued makes sense any more."""
        if self._position > self._outbox.loaded:
            self._outbox.withdraw_stream(self.stream_id)

    def _lose_unread(self) -> None:
        """Drop what waits to be read: reads fail from now on, even where the peer had ended its side."""
        had_unread = self._unread > 0
        if had_unread or self._buffer is not None:
            self._make_buffer().discard(_UNBOUNDED)
        if had_unread and not self._life.is_reset:
            self._have_rare().reset, self._life = (0, False), Lifecycle.RESET
        if self._life.is_reset:
            self._marks &= ~EOF
            self._wake_all()

    # -- what is counted

    def _account(self) -> Account:
        """What the ledger knows, or knew when the stream ended."""
        if self._life.ended or self._marks & ORPHANED:
            kept = None if self._rare is None else self._rare.account
            return kept or Account()
        return self._owner.ledger.account(self.stream_id)

    def _keep_account(self) -> None:
        """The stream or the session ends: another stream may have its id from now on."""
        account = self._owner.ledger.close(self.stream_id)
        if account is not None:
            self._have_rare().account = account

    # -- common

    def _follow(self, condition: Callable[[], bool], deadline: Deadline | None, position: int | None = None) -> None:
        """Wait for a condition of the stream's state, or of what was taken up to a position in the outbox.

        Until the deadline, and not beyond the end of the session.
        """
        rare = self._have_rare()
        line = rare.followers
        if line is None:
            line = rare.followers = WaitList(self._outbox.lane)
        turn = line.enter()
        milestone = None if position is None else self._outbox.milestones.enter(position, turn)
        try:
            while not (condition() or self._outbox.is_closed):
                if not turn.park(deadline):
                    return
        finally:
            if milestone is not None:
                self._outbox.milestones.leave(milestone)
            if not line.leave(turn):
                rare.followers = None
                self._drop_rare()

    def _is_broken(self) -> bool:
        return self._life.is_reset or bool(self._marks & (ORPHANED | RELEASED))

    def _has_ended(self) -> bool:
        return self._life.ended or bool(self._marks & ORPHANED)

    def _wait(self, turn: Waiter, deadline: Deadline | None) -> None:
        if deadline is _NEVER_WAIT:
            raise _would_block()
        if not turn.park(deadline):
            raise timed_out()

    def _deadline(self) -> Deadline | None:
        """The limit of a call that begins now; it keeps it, whatever `settimeout` says meanwhile."""
        return _NEVER_WAIT if self._timeout == 0 else Deadline.after(self._timeout)

    def _check_thread(self) -> None:
        if get_thread() != self._owner.thread:
            raise RuntimeError(
                "a session and its streams belong to the thread whose gevent hub made them; only close(), reset() and "
                "abort() may be called from another"
            )

    def _reset_error(self) -> StreamReset | SessionError:
        if self._rare is None or self._rare.reset is None:
            # The end of the session reset it; that is the reason to give.
            return self._session_error()
        code, remote = self._rare.reset
        by = "the peer" if remote else "this side"
        return StreamReset(f"stream {self.stream_id} was reset by {by} (code {code})", code, remote=remote)

    def _session_error(self) -> SessionError:
        assert self._owner.reason is not None
        return self._owner.reason.again()

    def _is_ready(self) -> bool:
        """A read would not wait."""
        return bool(self._unread or self._marks & (EOF | SHUT_RD | ORPHANED | RELEASED) or self._life.is_reset)

    def _wake_all(self) -> None:
        """Let all look who wait with this stream; nobody else: a peer can bring this about by one frame."""
        if self._greenlet is not None:
            self._awaits = min(self._awaits, 0)
            self._outbox.lane.wake_parked(self)
        if self._readers is not None:
            self._readers.wake_all()
        if self._writers is not None:
            self._writers.wake_all()
        if self._rare is not None:
            if self._rare.followers is not None:
                self._rare.followers.wake_all()
            self._schedule_links()

    def _schedule_links(self) -> None:
        if self._links:
            self._outbox.lane.hub.loop.run_callback(self._run_links)

    def _run_links(self) -> None:
        """In the hub: call those of gevent.wait, once each."""
        if self._rare is None or not self._links or not self._is_ready():
            return
        links, self._rare.links = self._rare.links, []
        self._drop_rare()
        run_links(self._outbox.lane.hub, links, self)

    @property
    def _links(self) -> list[Link]:
        return [] if self._rare is None else self._rare.links

    def _have_rare(self) -> Rare:
        if self._rare is None:
            self._rare = Rare()
        return self._rare

    def _drop_rare(self) -> None:
        rare = self._rare
        if rare is None or rare.followers is not None or rare.links:
            return
        if rare.reset is None and rare.account is None:
            self._rare = None


class _Unfinished(Exception):
    """A time limit passed inside a large frame; `sent` says whether it goes all the same."""

    def __init__(self, cause: TimeoutError, sent: int) -> None:
        super().__init__()
        self.cause = cause
        self.sent = sent


def _take(buffer: ReceiveBuffer, size: int) -> bytes:
    return buffer.take(size)


def _take_line(buffer: ReceiveBuffer, size: int) -> bytes:
    return buffer.take_line(size)


def _would_block() -> BlockingIOError:
    return BlockingIOError(errno.EAGAIN, "the operation would have to wait")
