"""The way out: everything that waits for the connection, in one order, and the greenlet that waits with it.

Three kinds of things wait here:

* *ordered* frames (SYN, Data, FIN, GoAway): one queue, so the order of every stream is kept. Small frames are copied.
  A large payload stays with its writer, who waits until it is taken; since a writer has one frame here at a time,
  streams take turns, a frame each;
* *urgent* ones, which go ahead of the queue at the next frame boundary: pings, pongs, resets, acknowledgements, credit.
  They are kept by stream id, so that they merge, vanish with their stream, and can't pile up;
* the *wire*: what was handed to the connection and not taken yet. It is never torn or withdrawn.

Frames leave at the end of the turn of the loop in which the first of them was queued, or as soon as 2 KiB are there, by
one non-blocking send. What the connection does not take belongs to the writer greenlet. A connection without a descriptor
always goes through the writer greenlet. See ``spec.md`` R13, R14, R25-R27.

This module knows frames, not streams: no windows of the peer, no states.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from typing import Protocol

import gevent
from gevent.hub import Hub

from .errors import ProtocolError, SessionError, TransportError, WriteTimeout
from .flow import ReceiveBuffer
from .frame import ACK, HEADER, HEADER_SIZE, PING, RST, SYN, WINDOW_UPDATE
from .transport import Transport
from .waiting import Deadline, Waiter, WaitList, Waker, timed_out

__all__ = ["LARGE", "LargeFrame", "Outbox"]

#: A payload above this is not copied into the queue; copying 4 KiB costs less than a wait or a second buffer to send.
LARGE = 4096
#: So much collected leaves at once: both ends work at the same time (241 against 133 thousand requests a second).
_FLUSH_AT = 2048
#: Small frames joined for one send.
_BATCH = 65536
#: After so many bytes without a switch to the hub there is one, so that timers are not late.
_BURST = 262144
#: What a small frame counts towards it at least: the work is in the frames then, not in the bytes.
_BURST_FRAME = 256
#: Pongs that wait; what a peer asks beyond is not answered (the number of go-yamux).
_MAX_PONGS = 32
#: Resets that the peer provoked and does not fetch.
_MAX_RESETS = 8192
#: A timer this late means that our own hub was blocked, not that the peer was silent.
_LATE = 0.5

_pack = HEADER.pack


class OutboxOwner(Protocol):
    """What the outbox tells its session. None of these may wait."""

    def on_send_error(self, reason: SessionError) -> None:
        """The connection broke, or stalled for too long."""

    def on_ping_left(self, now: float) -> None:
        """The ping is on its way."""

    def on_hub_blocked(self, seconds: float) -> None:
        """A timer was late by so much."""


class LargeFrame:
    """A frame whose payload stays with its writer until the connection has taken it."""

    __slots__ = ("header", "is_begun", "is_done", "payload", "stream_id", "waiter")

    def __init__(self, stream_id: int, header: bytes, payload: memoryview, waiter: Waiter) -> None:
        self.stream_id = stream_id
        self.header = header
        self.payload = payload
        self.waiter = waiter
        #: Part of it may be on the wire: it can't be withdrawn any more.
        self.is_begun = False
        #: The payload is not needed any more: taken, copied or given up.
        self.is_done = False


class Outbox:
    """Everything on its way out of one session."""

    def __init__(
        self, transport: Transport, hub: Hub, *, owner: OutboxOwner, limit: int, write_timeout: float | None
    ) -> None:
        self._transport = transport
        self._hub = hub
        self._owner = owner
        self._limit = limit
        self._write_timeout = write_timeout
        #: Wakes greenlets of this hub; streams use it, too.
        self.waker = Waker.of(hub)

        #: Frames in order; an empty one stands where a withdrawn frame was, so that counting them stays right.
        self._queue: deque[bytes | LargeFrame] = deque()
        #: Bytes of the small frames among them.
        self._queued = 0
        #: Frames ever queued, and how many of those are on the wire or gone, and gone: a position is such a count.
        self.appended = 0
        self._loaded = 0
        self.taken = 0

        self._ping: int | None = None
        self._pongs: deque[int] = deque()
        #: Reset code by stream id.
        self._resets: dict[int, int] = {}
        #: Credit that travels on the acknowledgement, by stream id.
        self._acks: dict[int, int] = {}
        #: Where credit may be due, by stream id. The amount is read when the frame is made, so grants merge.
        self._grants: dict[int, ReceiveBuffer] = {}

        #: Some of these may wait.
        self._is_urgent = False

        #: On the wire: what the connection was offered and has not taken, then the payload of a large frame.
        self._wire: bytes | memoryview = b""
        self._wire_large: LargeFrame | None = None
        self._wire_has_ping = False
        #: When the send began that is to take the ping.
        self._ping_moment = 0.0

        #: Writers that wait for room, and those that wait for their bytes to be taken.
        self._room = WaitList(self.waker)
        self._flushing = WaitList(self.waker)

        #: The session ended: nothing goes any more.
        self.is_closed = False
        #: A flush at the end of this turn is under way.
        self._is_scheduled = False
        #: The writer greenlet is at work; nobody else sends.
        self._is_busy = False
        #: The connection said that it would block.
        self._would_block = False
        #: The writer greenlet is inside a send that waits by itself.
        self._is_inside_send = False
        #: Work since the last switch to the hub that we know of.
        self._burst = 0

        self.bytes_sent = 0
        self.frames_sent = 0

        self._watcher = None if transport.fileno is None else hub.loop.io(transport.fileno, 2)
        self._stall_timer = hub.loop.timer(write_timeout or 0.0, ref=False)
        self._stall_moment: float | None = None
        self._waiter = Waiter(self.waker)
        self._greenlet = gevent.spawn(self._run)
        self._greenlet.link(self._on_greenlet_end)

    # -- what goes out

    def append(self, frame: bytes) -> int:
        """Queue a small frame in order; return its position. Never waits."""
        self._queue.append(frame)
        self._queued += len(frame)
        self.appended += 1
        if not self._is_scheduled:
            self._is_scheduled = True
            self._hub.loop.run_callback(self._on_turn)
        elif self._queued >= _FLUSH_AT and not self._is_busy and self._watcher is not None:
            self._burst += max(self._queued, _BURST_FRAME)
            self._step()
        return self.appended

    def append_large(self, frame: LargeFrame) -> None:
        """Queue a large frame in order, and send at once if the connection takes it. `frame.is_done` tells."""
        self._queue.append(frame)
        self.appended += 1
        if self._is_busy or self._watcher is None:
            self._schedule()
            return
        self._burst += len(frame.payload)
        while not (frame.is_done or self._is_busy or self.is_closed):
            self._step()

    def withdraw(self, frame: LargeFrame) -> bool:
        """Its writer leaves. True: none of it had left and none will; False: it goes, from a copy where needed."""
        if frame.is_done:
            return False
        if frame.is_begun:
            self._wire = bytes(self._wire)
            self._wire_large = None
            frame.is_done = True
            return False
        frame.is_done = True
        self._queue = deque(b"" if entry is frame else entry for entry in self._queue)
        return True

    def purge(self, stream_id: int) -> bool:
        """Take back all frames of a stream that have not begun to leave. True when its SYN was among them."""
        syn = False
        kept: deque[bytes | LargeFrame] = deque()
        for entry in self._queue:
            if isinstance(entry, LargeFrame):
                if entry.stream_id == stream_id:
                    entry.is_done = True
                    self.waker.wake(entry.waiter)
                    entry = b""
            elif entry and HEADER.unpack_from(entry)[3] == stream_id:
                syn = syn or bool(HEADER.unpack_from(entry)[2] & SYN)
                self._queued -= len(entry)
                entry = b""
            kept.append(entry)
        self._queue = kept
        self._wake_waiting()
        return syn

    def ping(self, value: int) -> None:
        """Send a ping ahead of what waits; the owner is told when it has left."""
        self._ping = value
        self._is_urgent = True
        self._schedule()

    def pong(self, value: int) -> None:
        """Answer a ping ahead of what waits, unless too many answers wait already."""
        if len(self._pongs) < _MAX_PONGS:
            self._pongs.append(value)
            self._is_urgent = True
            self._schedule()

    def acknowledge(self, stream_id: int, extra: int) -> None:
        """Acknowledge a stream of the peer, with the credit beyond the initial window."""
        self._acks[stream_id] = extra
        self._is_urgent = True
        self._schedule()

    def reset(self, stream_id: int, code: int = 0) -> None:
        """Reset a stream, in place of the acknowledgement and credit that wait for it."""
        self.forget(stream_id)
        self._resets[stream_id] = code
        self._is_urgent = True
        self._schedule()

    def refuse(self, stream_id: int) -> None:
        """Reset a stream because of what the peer sent; ProtocolError when it makes us but does not fetch them."""
        if len(self._resets) >= _MAX_RESETS:
            raise ProtocolError(f"the peer provoked {_MAX_RESETS} resets and did not fetch them")
        self.reset(stream_id)

    def grant(self, stream_id: int, buffer: ReceiveBuffer) -> None:
        """Send what credit is due, merged with what waits."""
        self._grants[stream_id] = buffer
        self._is_urgent = True
        self._schedule()

    def forget(self, stream_id: int) -> None:
        """Neither acknowledgement nor credit makes sense for this stream any more."""
        self._acks.pop(stream_id, None)
        self._grants.pop(stream_id, None)

    # -- waiting

    @property
    def has_room(self) -> bool:
        """A small frame may be queued: less than the limit waits and nobody stands in line."""
        return not self._room.waiters and self._waiting_bytes() < self._limit

    def wait_room(self, deadline: Deadline | None) -> None:
        """Wait in line for room, or for the end of the session; TimeoutError at the deadline."""
        waiter = self._room.enter()
        try:
            while not self.is_closed and not (self._room.is_first(waiter) and self._waiting_bytes() < self._limit):
                if not waiter.park(deadline):
                    raise timed_out()
        finally:
            self._room.leave(waiter)

    def wake_all(self) -> None:
        """Something changed that one of those who wait here may wait for: let all of them look."""
        self._room.wake_all()
        self._flushing.wake_all()

    def wait_taken(self, position: int, deadline: Deadline | None) -> bool:
        """Wait until the connection has taken all frames up to this position; False at the deadline."""
        return self.wait_until(lambda: self.taken >= position, deadline)

    def wait_empty(self, deadline: Deadline | None) -> bool:
        """Wait until the connection has taken everything; False at the deadline."""
        return self.wait_until(lambda: self.is_empty, deadline)

    def wait_until(self, condition: Callable[[], bool], deadline: Deadline | None) -> bool:
        """Wait for a condition whose change is told by `wake_all`; False at the deadline or the end of the session."""
        if condition():
            return True
        waiter = self._flushing.enter()
        try:
            while not self.is_closed and not condition():
                if not waiter.park(deadline):
                    return False
        finally:
            self._flushing.leave(waiter)
        return condition()

    @property
    def is_breathless(self) -> bool:
        """Writers have been busy for long and may never have had to wait: `breathe`."""
        return self._burst >= _BURST

    def breathe(self) -> None:
        """Switch to the hub once, so that timers and others get their turn."""
        self._burst = 0
        gevent.sleep(0)

    @property
    def is_empty(self) -> bool:
        """The connection has taken everything."""
        return not (self._wire or self._queue or self._is_urgent)

    @property
    def waiting_bytes(self) -> int:
        """Bytes that wait here, those of large frames not counted: they are with their writers."""
        return self._waiting_bytes()

    def _waiting_bytes(self) -> int:
        return self._queued + len(self._wire) + (len(self._resets) + len(self._acks)) * HEADER_SIZE

    # -- sending

    def _schedule(self) -> None:
        if not self._is_scheduled and not self.is_closed:
            self._is_scheduled = True
            self._hub.loop.run_callback(self._on_turn)

    def _on_turn(self) -> None:
        """In the hub, at the end of a turn: one non-blocking send."""
        self._is_scheduled = False
        self._burst = 0
        if self._is_busy or self.is_closed:
            return
        if self._watcher is None:
            self._hand_to_writer()
        else:
            self._step()

    def flush_nowait(self) -> None:
        """One non-blocking attempt to send what waits, where the connection has a descriptor."""
        if self._watcher is not None and not self.is_closed:
            self._step()

    def poke(self) -> None:
        """Something was received: a TLS send that waited for that may go on."""
        if self._transport.write_wants_read and self._is_busy:
            self.waker.wake(self._waiter)

    def _hand_to_writer(self) -> None:
        self._is_busy = True
        self.waker.wake(self._waiter)

    def _step(self) -> None:
        """One send of what comes first; what is left over belongs to the writer greenlet."""
        try:
            self._send_some()
        except BlockingIOError:
            self._would_block = True
            self._arm_stall_timer()
        except (OSError, ValueError) as error:
            self._fail(error)
            return
        if not self._is_busy and not self.is_closed and not self.is_empty:
            self._hand_to_writer()

    def _send_some(self) -> None:
        if not self._wire:
            self._load()
            if not self._wire:
                return
        wire, large = self._wire, self._wire_large
        if self._wire_has_ping:
            # Before the send: on a fast link the answer may be there when it returns.
            self._ping_moment = time.monotonic()
        if large is not None and not large.is_begun:
            large.is_begun = True
            sendmsg = self._transport.sendmsg
            assert sendmsg is not None
            self._wire = large.payload
            try:
                sent = sendmsg([wire, large.payload])
            except BlockingIOError:
                sent = 0
                self._would_block = True
                self._arm_stall_timer()
            sent = self._checked(sent, len(wire) + len(large.payload), at_least=0)
            if sent < len(wire):
                self._wire = b"".join((wire[sent:], large.payload))
                self._wire_large = None
                self._done(large)
            else:
                self._wire = large.payload[sent - len(wire) :]
        else:
            sent = self._checked(self._transport.send(wire), len(wire), at_least=1)
            self._wire = wire[sent:] if sent < len(wire) else b""
        self.bytes_sent += sent
        if sent and self._stall_moment is not None:
            self._disarm_stall_timer()
        if not self._wire:
            self._on_wire_taken()

    def _checked(self, sent: object, offered: int, *, at_least: int) -> int:
        """What a transport claims to have sent, if that can be."""
        if not isinstance(sent, int) or not at_least <= sent <= offered:
            raise OSError(f"send() of the connection returned {sent!r} for {offered} bytes")
        return sent

    def _load(self) -> None:
        """Move what comes next to the wire: all that is urgent, then small frames, up to and with a large one."""
        frames: list[bytes] = self._take_urgent() if self._is_urgent else []
        queue, size = self._queue, 0
        while queue and size < _BATCH:
            entry = queue.popleft()
            self._loaded += 1
            if isinstance(entry, LargeFrame):
                frames.append(entry.header)
                if self._transport.sendmsg is None:
                    entry.is_begun = True
                    frames.append(bytes(entry.payload))
                    self._done(entry)
                else:
                    self._wire_large = entry
                break
            size += len(entry)
            frames.append(entry)
        self._queued -= size
        self.frames_sent += len(frames)
        self._wire = frames[0] if len(frames) == 1 else b"".join(frames)
        if not self._wire:
            self._on_wire_taken()

    def _take_urgent(self) -> list[bytes]:
        """Make the frames that go ahead. Resets come first: a stream id may have been taken anew since."""
        frames = []
        self._is_urgent = False
        if self._ping is not None:
            frames.append(_pack(0, PING, SYN, 0, self._ping))
            self._ping, self._wire_has_ping = None, True
        frames += [_pack(0, PING, ACK, 0, value) for value in self._pongs]
        frames += [_pack(0, WINDOW_UPDATE, RST, stream_id, code) for stream_id, code in self._resets.items()]
        frames += [_pack(0, WINDOW_UPDATE, ACK, stream_id, extra) for stream_id, extra in self._acks.items()]
        for stream_id, buffer in self._grants.items():
            credit = buffer.grant()
            if credit:
                frames.append(_pack(0, WINDOW_UPDATE, 0, stream_id, credit))
        self._pongs.clear()
        self._resets.clear()
        self._acks.clear()
        self._grants.clear()
        return frames

    def _on_wire_taken(self) -> None:
        self.taken = self._loaded
        if self._wire_large is not None:
            large, self._wire_large = self._wire_large, None
            self._done(large)
        if self._wire_has_ping:
            self._wire_has_ping = False
            self._owner.on_ping_left(self._ping_moment)
        self._wake_waiting()

    def _done(self, large: LargeFrame) -> None:
        large.is_done = True
        self.waker.wake(large.waiter)

    def _wake_waiting(self) -> None:
        if self._room.waiters:
            self._room.wake_first()
        if self._flushing.waiters:
            self._flushing.wake_all()

    # -- the writer greenlet

    def _run(self) -> None:
        """Wait with the connection for what it did not take at once."""
        while not self.is_closed:
            if self.is_empty:
                self._is_busy = False
                self._waiter.park()
            elif self._watcher is None:
                self._send_blocking()
            elif self._would_block:
                self._wait_writable()
            else:
                self._burst += len(self._wire)
                self._step()
                if self.is_breathless:
                    self.breathe()

    def _on_greenlet_end(self, greenlet: gevent.Greenlet[..., None]) -> None:
        """It ends with the session only; else somebody killed it, and nothing would ever leave again."""
        if not self.is_closed:
            self._fail(greenlet.exception or OSError("the writer greenlet was killed"))

    def _wait_writable(self) -> None:
        self._would_block = False
        assert self._watcher is not None
        if not self._transport.write_wants_read:
            self._watcher.start(self._on_writable)
        try:
            self._waiter.park()
        finally:
            if not self.is_closed:
                self._watcher.stop()

    def _on_writable(self) -> None:
        self.waker.wake(self._waiter)

    def _send_blocking(self) -> None:
        """A send that waits by itself; the stall timer watches it from outside."""
        self._is_busy = True
        self._arm_stall_timer()
        self._is_inside_send = True
        try:
            self._step()
        finally:
            self._is_inside_send = False
            self._disarm_stall_timer()

    def _arm_stall_timer(self) -> None:
        if self._stall_moment is None and self._write_timeout is not None and not self.is_closed:
            self._stall_moment = time.monotonic() + self._write_timeout
            self._stall_timer.start(self._on_stalled, update=True)

    def _disarm_stall_timer(self) -> None:
        if self._stall_moment is not None:
            self._stall_moment = None
            self._stall_timer.stop()

    def _on_stalled(self) -> None:
        """Bytes wait, and the connection took none for the whole time (R25), unless the time was our own hub's."""
        if self._stall_moment is None or self.is_closed:
            return
        late = time.monotonic() - self._stall_moment
        self._stall_moment = None
        self._stall_timer.stop()
        if late > _LATE:
            self._owner.on_hub_blocked(late)
            self._arm_stall_timer()
            return
        self._owner.on_send_error(
            WriteTimeout(f"the connection took no bytes for {self._write_timeout} s, {self._waiting_bytes()} bytes wait")
        )

    # -- the end

    def _fail(self, error: BaseException) -> None:
        reason = TransportError(f"the connection broke while sending: {error}")
        reason.__cause__ = error
        self._owner.on_send_error(reason)

    def drop(self) -> None:
        """Forget everything that has not begun to leave."""
        for entry in self._queue:
            if isinstance(entry, LargeFrame):
                self._done(entry)
        self._queue.clear()
        self._queued = 0
        self._loaded = self.appended
        self._ping = None
        for waiting in (self._pongs, self._resets, self._acks, self._grants):
            waiting.clear()
        self._wake_waiting()

    def close(self) -> None:
        """The session ended: drop all, wake all, let go of the descriptor. Never waits."""
        if self.is_closed:
            return
        self.is_closed = True
        self.drop()
        if self._wire_large is not None:
            self._done(self._wire_large)
        self._wire, self._wire_large = b"", None
        self._disarm_stall_timer()
        self._stall_timer.close()
        if self._watcher is not None:
            self._watcher.stop()
            self._watcher.close()
        self._room.wake_all()
        self._flushing.wake_all()
        if self._is_inside_send and self._greenlet is not gevent.getcurrent():
            self._greenlet.kill(block=False)
        else:
            self.waker.wake(self._waiter)
