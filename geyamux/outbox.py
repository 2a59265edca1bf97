"""The way out: everything that waits for the connection, in one order, and the greenlet that waits with it.

Three kinds of things wait here:

* *ordered* frames (SYN, Data, FIN, GoAway): one queue, so the order of every stream is kept. Small frames are copied.
  A large payload stays with its writer, who waits until it is taken; since a writer has one frame here at a time,
  streams take turns, a frame each;
* *urgent* ones, which go ahead of the queue at the next frame boundary: pings, pongs, resets, acknowledgements, credit.
  They are kept by stream id, so that they merge, vanish with their stream, and can't pile up;
* the *wire*: what was handed to the connection and not taken yet. It is never torn or withdrawn.

Frames leave at the end of the turn of the loop in which the first of them was queued, right behind the greenlets that
were woken with its writer, or as soon as 2 KiB are there, by one non-blocking send. What the connection does not take
belongs to the writer greenlet. A connection without a descriptor always goes through the writer greenlet. See ``spec.md``
R13, R14, R25-R27.

Where nothing waits (`is_easy`) there are straight roads: all small frames are joined and sent, and a large one goes past
the queue. A round trip takes a tenth less so, a bulk transfer an eighth.

This module knows frames, not streams: no windows of the peer, no states.

Longer than other modules because the order of everything that leaves, and what may be withdrawn from it, is one decision.
"""

from __future__ import annotations

import logging
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from typing import Any, Protocol, cast

import gevent
from gevent.hub import Hub

from .errors import SessionError, TransportError, WriteTimeout
from .frame import HEADER, HEADER_SIZE, describe
from .logs import log
from .transport import ANY_FAILURE, Transport
from .urgent import UrgentLane
from .waiting import Deadline, StallTimer, timed_out
from .waking import Milestones, Waiter, WaitList, Waker

__all__ = ["BURST", "LARGE", "LargeFrame", "Outbox"]

logger = logging.getLogger("geyamux.frames")

#: A payload above this is not copied into the queue; copying 4 KiB costs less than a wait or a second buffer to send.
LARGE = 4096
#: So much collected leaves at once: both ends work at the same time (241 against 133 thousand requests a second).
_FLUSH_AT = 2048
#: Small frames joined for one send.
_BATCH = 65536
#: After so many bytes the writers of a hub let the loop look around, so that timers are not late.
BURST = 262144
#: So long after it would block, a send is tried again even where the connection is not reported writable, in seconds.
_RETRY_AFTER = 1.0
#: The queue is swept when so much was withdrawn, and half of it or more.
_LITTER = 64
#: What a small frame counts towards it: the work is in the frames then, not in the bytes.
_BURST_FRAME = 256


class OutboxOwner(Protocol):
    """What the outbox tells its session. None of these may wait."""

    def _on_send_error(self, reason: SessionError) -> None:
        """The connection broke, or stalled for too long."""

    def _on_ping_left(self, value: int, now: float) -> None:
        """The ping is on its way, since then."""


class LargeFrame:
    """A frame whose payload stays with its writer until the connection has taken it."""

    __slots__ = ("header", "is_done", "is_lost", "payload", "stream_id", "waiter")

    def __init__(self, stream_id: int, header: bytes, payload: memoryview, waiter: Waiter | None) -> None:
        self.stream_id = stream_id
        self.header = header
        self.payload = payload
        #: Where its writer parks; None while it has not come to that.
        self.waiter = waiter
        #: The payload is not needed any more: taken, copied or given up.
        self.is_done = False
        #: ... because the session ended first.
        self.is_lost = False


class Outbox(UrgentLane):
    """Everything on its way out of one session."""

    #: Frames ever queued, how many of those are on the wire or gone, and gone: a position is such a count.
    appended = 0
    loaded = 0
    taken = 0
    bytes_sent = 0
    frames_sent = 0
    #: The session ended: nothing goes any more.
    is_closed = False
    #: What sending failed by; the session will end in this turn.
    _failure: BaseException | None = None
    #: A flush at the end of this turn is under way.
    _is_scheduled = False
    #: The writer greenlet is at work; nobody else sends.
    _is_busy = False
    #: The connection said that it would block.
    _would_block = False
    #: The writer greenlet is inside a send that waits by itself.
    _is_inside_send = False

    def __init__(
        self,
        transport: Transport,
        hub: Hub,
        *,
        owner: OutboxOwner,
        limit: int,
        write_timeout: float | None,
        name: str = "",
    ) -> None:
        super().__init__()
        self._transport = transport
        self._hub = hub
        self._owner = owner
        self._limit = limit
        self._name = name
        self._is_debug = logger.isEnabledFor(logging.DEBUG)
        #: Counts the work of all writers and readers of this hub.
        self.pace = Waker.of(hub)
        #: Wakes the greenlets of this session; streams use it, too.
        self.lane = self.pace.lane()

        #: Bytes of the small frames that are queued, and how many other entries there are.
        self._queued = self._odd = 0
        #: Frames in order, those withdrawn included until the queue is swept. A number stands for so many of those.
        self._queue: deque[bytes | LargeFrame | int] = deque()
        #: Streams whose frames up to a position were taken back, in the order of those.
        self._withdrawn: OrderedDict[int, int] = OrderedDict()
        #: How often something was taken back since the queue was swept.
        self._litter = 0

        #: On the wire, what the connection was offered and has not taken: small frames and, at the end, the header of a
        #: large one, whose payload is the tail; once that header has left, the rest of the payload alone.
        self._wire: bytes | memoryview = b""
        self._wire_tail: memoryview | None = None
        self._wire_large: LargeFrame | None = None
        #: The last ping that the connection was offered, and when.
        self.ping_offered = (0, 0.0)

        #: Those who wait for room, and those who wait for a position to be taken.
        self._room = WaitList(self.lane)
        self.milestones = Milestones(self.lane)
        #: Who ends the session: waits for all kinds of changes. Few, or every send would wake many.
        self._enders = WaitList(self.lane)

        self._watcher = None if transport.fileno is None else hub.loop.io(transport.fileno, 2)
        #: Bytes wait, and the connection takes none (R25).
        self._stall = StallTimer(hub, write_timeout, on_stalled=self._on_stalled)
        self._retry_after = min(_RETRY_AFTER, (write_timeout or _RETRY_AFTER) / 4)
        self._waiter = Waiter(self.lane)
        #: What is queued leaves in the same turn, unless the writer greenlet is at work; so it never comes to the limit.
        self._can_be_easy = transport.fileno is not None and limit >= 2 * LARGE and not self._is_debug
        #: A small frame may be queued, and leaves in this turn: `has_room`, for who has no time to ask.
        self.is_easy = self._can_be_easy
        self._greenlet = gevent.spawn(self._run)
        self._greenlet.link(self._on_greenlet_end)

    # -- what goes out

    def append(self, frame: bytes) -> int:
        """Queue a small frame in order; return its position. Never waits."""
        self._queue.append(frame)
        self._queued = queued = self._queued + len(frame)
        self.appended = position = self.appended + 1
        if not self._is_scheduled:
            if self.pace.is_running:
                self.pace.at_end.append(self._on_turn)
            else:
                self._hub.loop.run_callback(self._on_turn)
            self._is_scheduled = True
        if queued >= _FLUSH_AT:
            self._on_many(len(frame))
        return position

    def _on_many(self, size: int) -> None:
        """More was queued than shall wait for the end of the turn; `size` of it now."""
        is_first = self._queued - size < _FLUSH_AT
        self.pace.burst += max(self._queued, _BURST_FRAME * len(self._queue)) if is_first else max(size, _BURST_FRAME)
        if not (self._is_busy or self._watcher is None):
            self._step()
        if self.pace.burst >= BURST:
            # Who writes next catches its breath.
            self.is_easy = False

    def enqueue(self, frame: bytes) -> int:
        """`append` for the reader, which never sends."""
        self._queue.append(frame)
        self._queued += len(frame)
        self.appended += 1
        self._schedule()
        return self.appended

    def send_large(self, frame: LargeFrame) -> bool:
        """Send a large frame at once where nothing waits before it; True if the connection took all of it now.

        Else go on with `append_large`. A straight road around the queue: an eighth of the time of a bulk transfer.
        """
        if not self.is_easy or self._queue or self._is_urgent or self._transport.sendmsg is None:
            return False
        size = HEADER_SIZE + len(frame.payload)
        try:
            sent = self._transport.sendmsg((frame.header, frame.payload))
            # As in `_step`: where a signal handler raises before it is noted what has left, nothing may follow that.
            self.appended = self.loaded = self.appended + 1
            self.frames_sent += 1
            self.pace.burst += size
            if sent != size or type(sent) is not int:
                self._go_on_with(frame, sent)
                return frame.is_done
            self.taken = self.loaded
            self.bytes_sent += size
        except BlockingIOError:
            return False
        except BaseException as error:
            self._fail(error)
            if isinstance(error, ANY_FAILURE):
                return False
            raise
        if self.milestones.entries or self._enders.waiters:
            self._wake_waiting()
        if self.pace.burst >= BURST:
            # Who writes next catches its breath.
            self.is_easy = False
        return True

    def _go_on_with(self, frame: LargeFrame, sent: object) -> None:
        """The connection took a part of the frame: try the rest, which is on the wire."""
        self._wire, self._wire_tail, self._wire_large = frame.header, frame.payload, frame
        try:
            self._on_partly_taken(sent)
        except OSError as error:
            self._fail(error)
            return
        while not (frame.is_done or self._is_busy):
            self._step()

    def append_large(self, frame: LargeFrame) -> None:
        """Queue a large frame in order, and send at once if the connection takes it. `frame.is_done` tells.

        Fine for one that `send_large` has begun.
        """
        if frame is self._wire_large:
            return
        self._queue.append(frame)
        self._odd += 1
        self.appended += 1
        if self._is_busy or self._watcher is None:
            self._schedule()
            return
        self.pace.burst += len(frame.payload)
        while not (frame.is_done or self._is_busy):
            self._step()

    def withdraw(self, frame: LargeFrame) -> bool:
        """Its writer leaves. True: none of it had left and none will; False: it goes, from a copy where needed."""
        if frame.is_done:
            return False
        frame.is_done = True
        if frame is self._wire_large:
            tail, self._wire_tail, self._wire_large = self._wire_tail, None, None
            if tail is None or len(self._wire) < HEADER_SIZE:
                self._wire = b"".join((self._wire, tail or b""))
                return False
            self._wire = self._wire[:-HEADER_SIZE]
            self.frames_sent -= 1
        self._on_withdrawn()
        return True

    def withdraw_stream(self, stream_id: int) -> None:
        """Take back all frames of a stream that have not begun to leave. They are left out when their turn comes."""
        self._withdrawn[stream_id] = self.appended
        self._withdrawn.move_to_end(stream_id)
        large = self._wire_large
        if large is not None and large.stream_id == stream_id:
            self.withdraw(large)
            self._wake_writer(large)
        self._on_withdrawn()

    def _on_withdrawn(self) -> None:
        """Nothing may be left that waits; then it is no stall that the connection takes nothing."""
        if not self._wire:
            while self._queue and self._is_withdrawn(self._queue[0], self.loaded + 1):
                self._pop()
            self.taken = self.loaded
            if self.is_empty:
                self._stall.disarm()
        self._litter += 1
        if self._litter > _LITTER and self._litter * 2 > len(self._queue):
            self._sweep()
        self._wake_waiting()

    def _sweep(self) -> None:
        """Leave out what was withdrawn. Who writes and gives up again and again must not fill the queue with it."""
        queue: deque[bytes | LargeFrame | int] = deque()
        position, gap, self._queued = self.loaded, 0, 0
        for entry in self._queue:
            places = entry if isinstance(entry, int) else 1
            position += places
            if self._is_withdrawn(entry, position):
                gap += places
                continue
            if gap:
                queue.append(gap)
                gap = 0
            queue.append(entry)
            if isinstance(entry, bytes):
                self._queued += len(entry)
        if gap:
            queue.append(gap)
        self._queue, self._litter = queue, 0
        self._odd = sum(not isinstance(entry, bytes) for entry in queue)
        self._withdrawn.clear()

    def _is_withdrawn(self, entry: bytes | LargeFrame | int, position: int) -> bool:
        if isinstance(entry, int):
            return True
        if isinstance(entry, LargeFrame):
            return entry.is_done or position <= self._withdrawn.get(entry.stream_id, 0)
        return bool(self._withdrawn) and position <= self._withdrawn.get(HEADER.unpack_from(entry)[3], 0)

    def _pop(self) -> bytes | LargeFrame | int:
        entry = self._queue.popleft()
        self.loaded += entry if isinstance(entry, int) else 1
        if isinstance(entry, bytes):
            self._queued -= len(entry)
        else:
            self._odd -= 1
        withdrawn = self._withdrawn
        while withdrawn and next(iter(withdrawn.values())) <= self.loaded:
            withdrawn.popitem(last=False)
        return entry

    # -- waiting

    @property
    def has_room(self) -> bool:
        """A small frame may be queued: less than the limit waits and nobody stands in line."""
        return not self._room.waiters and self._waiting_bytes() < self._limit

    def _set_easy(self) -> None:
        """Find out anew: whoever changes what it depends on calls this."""
        self.is_easy = self._can_be_easy and not (self._is_busy or self._room.waiters or self.is_closed)

    @property
    def room(self) -> int:
        """Bytes that may be queued before the limit is reached."""
        return self._limit - self._waiting_bytes()

    def wait_room(self, waiter: Waiter, deadline: Deadline | None, is_pointless: Callable[[], bool]) -> None:
        """Wait in line for room, or until it is pointless; TimeoutError at the deadline.

        Who returns has had its turn: it may queue one frame without asking `has_room`, which others in line deny it.
        Whoever makes it pointless wakes the waiter: that of the caller, who has it from a line of its own.
        """
        self._room.enter(waiter)
        self._set_easy()
        try:
            while not (self.is_closed or is_pointless()):
                if self._room.is_first(waiter) and self._waiting_bytes() < self._limit:
                    return
                if not waiter.park(deadline):
                    raise timed_out()
        finally:
            self._room.leave(waiter)
            self._set_easy()

    def wait_empty(self, deadline: Deadline | None) -> bool:
        """Wait until the connection has taken everything; False at the deadline."""
        return self.wait_until(lambda: self.is_empty, deadline)

    def wait_until(self, condition: Callable[[], bool], deadline: Deadline | None) -> bool:
        """For who ends the session: wait for a condition whose change is told by sends and by `wake_enders`.

        False at the deadline or the end of the session.
        """
        if condition():
            return True
        waiter = self._enders.enter()
        try:
            while not self.is_closed and not condition():
                if not waiter.park(deadline):
                    # If the hub was blocked, that is found out now, and moves the deadline.
                    self.breathe()
                    if deadline is None or deadline.left() <= 0:
                        return False
        finally:
            self._enders.leave(waiter)
        return condition()

    def wake_enders(self) -> None:
        """Something changed that `wait_until` may wait for."""
        self._enders.wake_all()

    @property
    def is_breathless(self) -> bool:
        """Writers have been busy for long and may never have had to wait: `breathe`."""
        # What waits for the end of the turn is counted when it leaves.
        uncounted = _BURST_FRAME * len(self._queue) if self._queued < _FLUSH_AT else 0
        return self.pace.burst + uncounted >= BURST

    def catch_breath(self) -> None:
        """Breathe if it is time to."""
        if self.is_breathless:
            self.breathe()
        self._set_easy()

    def count_work(self, work: int) -> None:
        """Work is done without a wait, as much as writing so many bytes."""
        self.pace.burst += work

    def take_turns(self, work: int) -> None:
        """Count work, and breathe first where there was too much of it."""
        if self.is_breathless:
            self.breathe()
        self.count_work(work)

    def breathe(self) -> None:
        """Let the loop look around, and others have their turn. In the hub itself nobody else waits."""
        if gevent.getcurrent() is not self._hub:
            self.lane.breathe()

    @property
    def is_empty(self) -> bool:
        """The connection has taken everything."""
        return not (self._wire or self._queue or self._is_urgent)

    @property
    def waiting_bytes(self) -> int:
        """Bytes that wait here, those of large frames not counted: they are with their writers."""
        return self._waiting_bytes()

    def _waiting_bytes(self) -> int:
        # The payload of a large frame is with its writer; were it counted, a bulk stream would keep all others waiting.
        is_payload = self._wire_large is not None and self._wire_tail is None
        return self._queued + (0 if is_payload else len(self._wire)) + self._urgent_frames() * HEADER_SIZE

    @property
    def next_frame_at(self) -> int:
        """The place, among all bytes ever sent, of the first frame that is known not to have begun to leave."""
        size = len(self._wire)
        if self._wire_tail is not None:
            # A large frame may still be withdrawn until its header begins to leave.
            size += -HEADER_SIZE if size >= HEADER_SIZE else len(self._wire_tail)
        return self.bytes_sent + size

    # -- sending

    def _schedule(self) -> None:
        if not self._is_scheduled and not self.is_closed:
            self._schedule_turn()

    def _schedule_turn(self) -> None:
        if self.pace.is_running:
            self.pace.at_end.append(self._on_turn)
        else:
            self._hub.loop.run_callback(self._on_turn)
        self._is_scheduled = True

    def _on_turn(self) -> None:
        """In the hub, at the end of a turn: one non-blocking send."""
        self._is_scheduled = False
        if self.is_easy:
            self._step()
        elif self.is_closed:
            return
        elif self._failure is not None:
            self._tell_failure()
        elif self._is_busy:
            # What came waits behind a connection that may have stood still since before.
            self._stall.arm()
        elif self._watcher is None:
            self._hand_to_writer()
        else:
            self._step()

    def heal(self) -> None:
        """Nothing waits for ever because a signal handler raised where its turn was to come."""
        if not (self.is_empty or self._is_busy or self.is_closed):
            self._hub.loop.run_callback(self._on_turn)

    def flush_nowait(self) -> None:
        """One non-blocking attempt to send what waits, where the connection has a descriptor."""
        if self._watcher is not None and self._failure is None and not self.is_closed:
            self._step()

    def flush_at_exit(self) -> None:
        """The same, and where there is no descriptor, by whatever way the connection has to send without waiting."""
        send_now = self._transport.send_now
        if send_now is None or self._is_inside_send:
            self.flush_nowait()
        elif not self.is_closed:
            if not self._wire:
                self._load()
            send_now(self._wire)

    def poke(self) -> None:
        """Something was received: a TLS send that waited for that may go on."""
        if self._transport.write_wants_read and self._is_busy:
            # The writer may not have begun to wait yet.
            self._would_block = False
            self.lane.wake(self._waiter)

    def _hand_to_writer(self) -> None:
        self._is_busy = True
        self.is_easy = False
        self.lane.wake(self._waiter)

    def _step(self) -> None:
        """One send of what comes first; what is left over belongs to the writer greenlet."""
        try:
            if self.is_easy and self._queue and not (self._is_urgent or self._odd or self._withdrawn):
                # The straight road of requests and answers: small frames, and all of them.
                queue: Any = self._queue
                count = len(queue)
                wire = self._wire = queue[0] if count == 1 else b"".join(queue)
                queue.clear()
                self._queued = 0
                self.loaded += count
                self.frames_sent += count
                sent = self._transport.send(wire)
                if sent == len(wire) and type(sent) is int:
                    self._wire = b""
                    self.taken = self.loaded
                    self.bytes_sent += sent
                    if self.milestones.entries or self._enders.waiters:
                        self._wake_waiting()
                    return
                self._on_partly_taken(sent)
            else:
                self._send_some()
        except BlockingIOError:
            self._would_block = True
            self._stall.arm()
        except ANY_FAILURE as error:
            self._fail(error)
            return
        except BaseException as error:
            # A signal handler raised in the middle of it: nobody knows what has left.
            self._fail(error)
            raise
        if (self._wire or self._queue or self._is_urgent) and not self._is_busy and not self.is_closed:
            self._hand_to_writer()

    def _send_some(self) -> None:
        if not self._wire:
            self._load()
            if not self._wire:
                self._on_wire_taken()
                return
        if self._wire_tail is None and self._loaded_ping is None:
            sent = self._transport.send(self._wire)
        else:
            sent = self._send_with_care()
        if self.is_closed:
            return  # while the send waited
        if sent == len(self._wire) and type(sent) is int and self._wire_tail is None:
            self._wire = b""
            self.bytes_sent += sent
            if self._stall.moment is not None:
                self._stall.disarm()
            self._on_wire_taken()
        else:
            self._on_partly_taken(sent)

    def _send_with_care(self) -> int:
        """One send of a ping, or of a large payload with what comes before it."""
        transport, tail, ping = self._transport, self._wire_tail, self._loaded_ping
        if ping is not None:
            # The answer may be there before the send returns.
            self.ping_offered = (ping, time.monotonic())
        if tail is None:
            sent = transport.send(self._wire)
        else:
            assert transport.sendmsg is not None
            sent = transport.sendmsg([self._wire, tail])
        if ping is not None and not self.is_closed:
            # A send that waits by itself may have waited for long.
            self._owner._on_ping_left(ping, self.ping_offered[1] if self._watcher is not None else time.monotonic())
            self._loaded_ping = None
        return sent

    def _on_partly_taken(self, sent: object) -> None:
        """Keep what the connection did not take, or all of the tail."""
        wire, tail = self._wire, self._wire_tail
        size = len(wire) + (0 if tail is None else len(tail))
        if not isinstance(sent, int) or not 0 < sent <= size:
            raise OSError(f"send() of the connection returned {sent!r} for {size} bytes")
        self.bytes_sent += sent
        self._stall.disarm()
        if tail is not None and sent >= len(wire):
            self._wire = tail[sent - len(wire) :] if sent < size else b""
            self._wire_tail = None
            self.taken = self.loaded - 1
            self._wake_waiting()
        else:
            self._wire = wire[sent:]
        if not self._wire:
            self._on_wire_taken()

    def _load(self) -> None:
        """Move what comes next to the wire: all that is urgent, then small frames, up to and with a large one."""
        frames: list[bytes] = self._take_urgent() if self._is_urgent else []
        self.frames_sent += len(frames)
        queue, size, is_copied = self._queue, 0, False
        while queue and size < _BATCH:
            if self._is_withdrawn(queue[0], self.loaded + 1):
                self._pop()
                continue
            if frames and isinstance(queue[0], LargeFrame) and self._transport.sendmsg is None:
                # It would have to be joined with what belongs to others, who would wait for it.
                break
            entry = cast("bytes | LargeFrame", self._pop())
            self.frames_sent += 1
            if isinstance(entry, LargeFrame):
                frames.append(entry.header)
                if self._transport.sendmsg is None:
                    frames.append(bytes(entry.payload))
                    is_copied = True
                    self._done(entry)
                else:
                    self._wire_large, self._wire_tail = entry, entry.payload
                break
            size += len(entry)
            frames.append(entry)
        if self._is_debug:
            self._log(frames[:-1] if is_copied else frames)
        self._wire = frames[0] if len(frames) == 1 else b"".join(frames)

    def _log(self, frames: Sequence[bytes | memoryview]) -> None:
        for frame in frames:
            _, kind, flags, stream_id, length = HEADER.unpack_from(frame)
            log(logger, logging.DEBUG, "%s: sending %s", self._name, describe(kind, flags, stream_id, length))

    def _on_wire_taken(self) -> None:
        self.taken = self.loaded
        if self._wire_large is not None:
            large, self._wire_large = self._wire_large, None
            self._done(large)
        if self._room.waiters or self.milestones.entries or self._enders.waiters:
            self._wake_waiting()

    def _done(self, large: LargeFrame) -> None:
        large.is_done = True
        self._wake_writer(large)

    def _wake_writer(self, large: LargeFrame) -> None:
        if large.waiter is not None:
            self.lane.wake(large.waiter)

    def _lose(self, large: LargeFrame) -> None:
        large.is_lost = True
        self._done(large)

    def _wake_waiting(self) -> None:
        if self._room.waiters:
            self._room.wake_first()
        self.milestones.reach(self.taken)
        if self._enders.waiters:
            self._enders.wake_all()

    # -- the writer greenlet

    def _run(self) -> None:
        """Wait with the connection for what it did not take at once."""
        while not self.is_closed:
            if self._failure is not None:
                self._waiter.park()
            elif self.is_empty:
                self._is_busy = False
                self._set_easy()
                self._stall.disarm()
                self._waiter.park()
            elif self._watcher is None:
                self._send_blocking()
            elif self._would_block:
                self._wait_writable()
            else:
                sent = self.bytes_sent
                self._step()
                self.pace.burst += self.bytes_sent - sent
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
            # A connection may take bytes although it is not reported writable: Linux waits for a third of the buffer.
            self._waiter.park(Deadline.after(self._retry_after))
        finally:
            if not self.is_closed:
                self._watcher.stop()

    def _on_writable(self) -> None:
        self.lane.wake(self._waiter)

    def _send_blocking(self) -> None:
        """A send that waits by itself; the stall timer watches it from outside."""
        self._is_busy = True
        self._stall.arm()
        self._is_inside_send = True
        try:
            self._step()
        finally:
            self._is_inside_send = False
            self._stall.disarm()
        if self._would_block:
            self._fail(OSError("send() of the connection would block, and there is no descriptor to wait for"))

    def _on_stalled(self) -> None:
        if self._watcher is not None:
            sent = self.bytes_sent
            self._step()
            if self.bytes_sent > sent or self._failure is not None:
                return
        self._owner._on_send_error(WriteTimeout(f"the connection took no bytes for {self._stall.timeout} s"))

    # -- the end

    def _fail(self, error: BaseException) -> None:
        """Sending failed. The owner hears of it in the hub: it must not act in the middle of a caller's `append`."""
        if self._failure is not None or self.is_closed:
            return
        # First what can't fail: near the limit of recursion the next line does, and then the next turn tells.
        self._failure, self._is_busy, self.is_easy = error, True, False
        self._hub.loop.run_callback(self._tell_failure)

    def _tell_failure(self) -> None:
        error = self._failure
        if error is not None and not self.is_closed:
            reason = TransportError(f"the connection broke while sending: {error}")
            # Its traceback leads only here, and would keep what was on the wire alive.
            reason.__cause__ = error.with_traceback(None)
            self._owner._on_send_error(reason)

    def end_streams(self) -> None:
        """No stream may queue anything from now on; what is queued still goes."""
        self.is_easy = self._can_be_easy = False

    def drop(self) -> None:
        """Forget everything that has not begun to leave."""
        for entry in self._queue:
            if isinstance(entry, LargeFrame):
                self._lose(entry)
        self._queue.clear()
        self._withdrawn.clear()
        self._queued = self._odd = 0
        self.loaded = self.appended
        self._clear_urgent()
        self._wake_waiting()

    def give_up_watchers(self) -> list[Any]:
        """Its watcher, for somebody else to keep; it is neither stopped nor closed here any more."""
        watcher, self._watcher = self._watcher, None
        return [watcher]

    def close(self) -> None:
        """The session ended: drop all, wake all, let go of the descriptor. Never waits."""
        if self.is_closed:
            return
        self.is_closed = True
        self.is_easy = False
        self.drop()
        if self._wire_large is not None:
            self._lose(self._wire_large)
        self._wire, self._wire_tail, self._wire_large = b"", None, None
        self._stall.close()
        if self._watcher is not None:
            self._watcher.stop()
            self._watcher.close()
        self._room.wake_all()
        self.milestones.wake_all()
        self._enders.wake_all()
        if self._is_inside_send and self._greenlet is not gevent.getcurrent():
            self._greenlet.kill(block=False)
        else:
            self.lane.wake(self._waiter)
