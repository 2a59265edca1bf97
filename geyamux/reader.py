"""The way in: one greenlet that receives, cuts the bytes into frames and hands each to the session at once.

It waits for nobody but the connection: not for a writer, an acceptor or an application. On a descriptor one watcher stays
started for the life of the session. Its callback, in the hub, does one receive that is known to be ready, so that
everybody else gets a turn after each, and then lets those run who wait for what came. (Starting and stopping a watcher
around each receive costs half of a round trip; a switch to the greenlet and a callback for each wake a tenth.) The
greenlet has the rest: frames that are left for another turn, a TLS connection that wants to send first, the end. Other
connections block in their own ``recv``, in the greenlet.

Headers are checked here before anything changes: version, type, and for Data whether the window allows it. A payload is
handed on as it arrives, so a frame as large as a whole window needs no buffer. See ``spec.md`` R4, R7, R10, R29.

Longer than other modules because receiving and cutting share the place in the frame, and most frames take a road of their
own: one whole message, small frames one behind the other, large payloads one behind the other.
"""

from __future__ import annotations

import logging
import ssl
import struct
from collections.abc import Callable, Mapping
from time import monotonic
from typing import Any, Protocol

import gevent
from gevent.hub import Hub

from .errors import ProtocolError
from .frame import ACK, DATA, FIN, GO_AWAY, HEADER_SIZE, PING, RST, SYN, WINDOW_UPDATE, describe
from .logs import log
from .transport import ANY_FAILURE, PAYLOAD_SIZE, RECEIVE_SIZE, Transport
from .waiting import is_libuv
from .waking import Waker

__all__ = ["FrameSink", "Inbound", "Reader", "StreamFrames"]

#: So many frames are handled before everybody else has a turn. 64 KiB of SYNs would be 30 ms of work; of one payload they
#: are 20 microseconds.
_FRAMES_A_TURN = 128

#: A header as three words: the first is 0 for a Data frame without flags, the most frequent by far.
_unpack_words = struct.Struct(">III").unpack_from
_NO_HEADER = (1, 0, 0)
#: That of a WindowUpdate without flags.
_CREDIT = WINDOW_UPDATE << 16
#: So much in one receive is taken for a part of a bulk transfer.
_BULK = 32768
_STATE_FLAGS = SYN | ACK | FIN | RST

logger = logging.getLogger("geyamux.frames")


class FrameSink(Protocol):
    """What a frame of Data for an open stream is handed to."""

    def _on_data(self, payload: bytes) -> None:
        """Take in a frame's payload, or a part of it. ProtocolError where the window does not allow it."""

    def _on_header(self, length: int) -> None:
        """Raise ProtocolError where the window does not allow so many bytes. Changes nothing. For a payload in parts."""


class StreamFrames(Protocol):
    """What the reader tells the table of streams. None of these may wait. ProtocolError ends the session."""

    @property
    def streams(self) -> Mapping[int, FrameSink]:
        """Open streams by id: Data without flags goes straight there. Always the same mapping."""

    def on_data_header(self, stream_id: int, flags: int, length: int) -> FrameSink | None:
        """Data with flags, or for a stream that is not open: where its payload goes, None to drop it."""

    def on_data_end(self, stream_id: int, flags: int) -> None:
        """The payload of such a frame is complete: FIN and RST take effect now."""

    def on_window_update(self, stream_id: int, flags: int, delta: int) -> None:
        """A WindowUpdate."""

    def on_taken_in(self) -> None:
        """All of one receive was handed on."""


class Inbound(Protocol):
    """What the reader tells its session. None of these may wait. ProtocolError ends the session."""

    def _on_ping(self, flags: int, value: int) -> None:
        """A Ping or its answer."""

    def _on_go_away(self, code: int) -> None:
        """A GoAway."""

    def _on_protocol_error(self, error: ProtocolError) -> None:
        """The peer broke the protocol. What still comes is thrown away."""

    def _on_input_end(self, *, inside_frame: bool, error: BaseException | None) -> None:
        """No more comes: the connection ended or broke, or this greenlet was killed."""

    def _on_received(self) -> None:
        """The connection was read, and what it gave was taken in."""


class Reader:
    """The receiving greenlet of one session, and the frame that it is in the middle of."""

    def __init__(
        self,
        transport: Transport,
        hub: Hub,
        inbound: Inbound,
        frames: StreamFrames,
        initial: bytes = b"",
        name: str = "",
        *,
        tells_received: bool = True,
    ) -> None:
        self._transport = transport
        self._hub = hub
        self._inbound = inbound
        #: The session wants to hear of each receive; a call costs a hundredth of a round trip.
        self._tells_received = tells_received
        self._frames = frames
        self._streams = frames.streams
        #: Bytes of the peer that the caller had read already; taken in first.
        self._initial = initial
        #: Bytes of a frame whose header is not complete, or of frames that are left for the next turn.
        self._rest = b""
        #: How much to ask the connection for.
        self._asks = RECEIVE_SIZE
        #: Nothing of a frame is here: the next byte begins one. False also where frames are logged.
        self._is_between = False
        #: Frames are left for the next turn.
        self._is_behind = False
        #: Bytes of the current frame's payload that have not come yet.
        self._missing = 0
        self._sink: FrameSink | None = None
        #: What to do at the end of the current frame: its stream id and flags, None for nothing.
        self._pending: tuple[int, int] | None = None
        #: From now on what comes is thrown away: the session is ending.
        self.is_discarding = False
        self._is_stopped = False
        self._name = name
        self._is_debug = logger.isEnabledFor(logging.DEBUG)
        #: When something was received last, on the monotonic clock.
        self.heard = monotonic()
        self.bytes_received = 0
        self.frames_received = 0
        self._watcher = None if transport.fileno is None else hub.loop.io(transport.fileno, 1)
        #: While TLS has to send before it can receive.
        self._write_watcher: Any = None
        #: What the greenlet ends by: the connection has ended, or broken by the cause of this.
        self._ended_by: _Broken | None = None
        # libuv stops a watcher for good when the connection has an error, even if there is still something to receive.
        self._is_restarted = is_libuv(hub)
        #: After a receive there is something to see to.
        self._needs_care = self._is_restarted or transport.has_more is not None
        self._lane = Waker.of(hub).lane()
        self._greenlet = gevent.spawn(self._run)
        self._greenlet.link(self._on_greenlet_end)

    @property
    def is_inside_frame(self) -> bool:
        """A frame has begun and not ended."""
        return bool(self._missing or self._rest)

    def stop(self) -> None:
        """Receive no more. Never waits; call it before the descriptor closes."""
        if self._is_stopped:
            return
        self._is_stopped = self.is_discarding = True
        self._close_watchers()
        self._forget_frame()
        if self._greenlet is not gevent.getcurrent():
            self._greenlet.kill(block=False)

    def discard(self) -> None:
        """From now on what comes is thrown away: the session is ending."""
        self.is_discarding = True
        self._forget_frame()

    def _forget_frame(self) -> None:
        """Whoever keeps a dead session must not keep what was under way in it."""
        self._rest, self._missing, self._sink, self._pending = b"", 0, None, None
        self._is_behind = False

    def give_up_watchers(self) -> list[Any]:
        """Its watchers, for somebody else to keep; they are neither stopped nor closed here any more."""
        watchers = [self._watcher, self._write_watcher]
        self._watcher = self._write_watcher = None
        return watchers

    def _close_watchers(self) -> None:
        self._close_write_watcher()
        if self._watcher is not None:
            self._watcher.stop()
            self._watcher.close()

    # -- for who watches

    def watch(self, watcher: Callable[[bytes], None] | None) -> None:
        """Show all that is received from now on, before it is taken in; None: no more. It may neither wait nor raise.

        The one reader that is watched gets a method of its own for it, so the others pay nothing.
        """
        if watcher is None:
            self.__dict__.pop("_take_in", None)
            return

        def take_in(data: bytes) -> None:
            if data:
                watcher(data)
            Reader._take_in(self, data)

        self.__dict__["_take_in"] = take_in

    @property
    def place(self) -> tuple[int, bytes] | None:
        """Bytes of a payload that are still to come, and bytes that came and are not handled, from a header on.

        None where nobody looks at frames any more.
        """
        return None if self.is_discarding else (self._missing, self._rest)

    # -- the greenlet

    def _run(self) -> None:
        error: BaseException | None = None
        try:
            if self._initial:
                data, self._initial = self._initial, b""
                self._feed(data)
                self._catch_up()
            if self._is_stopped:
                return
            if self._watcher is None:
                self._receive_blocking()
            else:
                self._watcher.start(self._on_readable)
                self._attend()
        except _Broken as broken:
            error = broken.__cause__
        self._end(error)

    def _attend(self) -> None:
        """On a descriptor: do what the hub must not, when it switches here; return at the end of the connection."""
        while not self._is_stopped:
            self._look_again()
            self._hub.switch()
            if self._ended_by is not None:
                raise self._ended_by
            if self._is_behind:
                self._catch_up()
            elif self._transport.read_wants_write and not self._is_stopped:
                self._wait_writable()

    def _on_readable(self) -> None:
        """In the hub: one receive that is known to be ready; then those run who waited for what came."""
        if self._is_stopped:
            return
        if self._is_behind:
            # More comes than is handled: go on with it, so that a flood is found out before it is served.
            self._greenlet.switch()
            return
        waker = self._lane.waker
        now = monotonic()
        waker.hold()
        try:
            try:
                # Inside a payload exactly what is left of it: its bytes are handed on as they are.
                missing = self._missing
                data = self._transport.recv(min(missing, PAYLOAD_SIZE) if missing else self._asks)
            except ANY_FAILURE as error:
                self._on_failure(error)
            else:
                if type(data) is not bytes or not data:
                    data = self._checked(data)
                if data:
                    self.heard = now
                    self.bytes_received += len(data)
                    if len(data) < _BULK and self._asks != HEADER_SIZE:
                        self._take_in(data)
                    else:
                        self._take_in_bulk(data)
            if self._needs_care or self._is_behind:
                self._take_care()
        except BaseException as error:
            # A signal handler raised, or memory is short: nobody knows what was taken in. The greenlet dies of it.
            self._greenlet.throw(error)
        finally:
            waker.release(now)

    def _take_in_bulk(self, data: bytes) -> None:
        """Where large payloads come one behind the other, ask for each header alone, and then for just its payload.

        Its bytes are then handed on as they are. To cut 64 KiB out of a larger piece is a copy, and takes longer than the
        whole of a second receive.
        """
        frames = self.frames_received
        self._take_in(data)
        if len(data) > HEADER_SIZE:
            is_large = len(data) >= _BULK and self.frames_received - frames <= 1
            self._asks = HEADER_SIZE if is_large and self._is_between else RECEIVE_SIZE
            return
        if self._missing < _BULK:
            self._asks = RECEIVE_SIZE
        if self._missing and not self._is_stopped:
            self._receive_payload()

    def _receive_payload(self) -> None:
        """A second receive, behind a header."""
        try:
            data = self._transport.recv(min(self._missing, PAYLOAD_SIZE))
        except ANY_FAILURE as error:
            self._on_failure(error)
            return
        if type(data) is not bytes or not data:
            data = self._checked(data)
        if data:
            self.bytes_received += len(data)
            self._take_in(data)

    def _on_failure(self, error: BaseException) -> None:
        if isinstance(error, BlockingIOError):
            # TLS may have taken in records of its own, and one that wants to send may have waited for them.
            self._inbound._on_received()
        else:
            self._end_by(error)

    def _end_by(self, cause: BaseException | None) -> None:
        """Let the greenlet end: the connection has, or broke by the cause."""
        self._ended_by = _Broken()
        self._ended_by.__cause__ = cause
        self._needs_care = True

    def _checked(self, data: object) -> bytes:
        """What a receive returned that is not plainly some bytes."""
        try:
            data = _checked(data)
        except OSError as error:
            self._end_by(error)
            return b""
        if not data:
            self._end_by(None)
        return data

    def _take_care(self) -> None:
        """After a receive: what the hub can't do, and what the watcher does not tell."""
        if self._transport.write_wants_read:
            self._inbound._on_received()
        if self._is_behind or self._ended_by is not None or self._transport.read_wants_write:
            self._greenlet.switch()
        else:
            self._look_again()

    def _look_again(self) -> None:
        """See to it that what has come already is received, where the watcher alone would not tell."""
        if self._is_stopped:
            return
        if self._transport.has_more is not None and self._transport.has_more():
            self._hub.loop.run_callback(self._on_readable)
        elif self._is_restarted:
            self._restart_watcher()

    def _restart_watcher(self) -> None:
        assert self._watcher is not None
        self._watcher.stop()
        self._watcher.start(self._on_readable)

    def _wait_writable(self) -> None:
        """TLS wants to send before it can receive on."""
        assert self._watcher is not None and self._transport.fileno is not None
        self._watcher.stop()
        self._write_watcher = self._hub.loop.io(self._transport.fileno, 2)
        self._write_watcher.start(gevent.getcurrent().switch)
        try:
            self._hub.switch()
        finally:
            self._close_write_watcher()
        if not self._is_stopped:
            self._watcher.start(self._on_readable)

    def _close_write_watcher(self) -> None:
        if self._write_watcher is not None:
            self._write_watcher.stop()
            self._write_watcher.close()
            self._write_watcher = None

    def _receive_blocking(self) -> None:
        receive = self._transport.recv
        while not self._is_stopped:
            try:
                data = _checked(receive(min(self._missing, RECEIVE_SIZE) if self._missing else RECEIVE_SIZE))
            except ANY_FAILURE as error:
                raise _Broken from error
            if not data:
                return
            self._feed(data)
            self._catch_up()
            # What is always ready never switches; everybody else gets a turn here.
            gevent.sleep(0)

    def _end(self, error: BaseException | None) -> None:
        self.catch_up()
        if not self._is_stopped:
            self._is_stopped = True
            self._close_watchers()
            is_inside_frame = self.is_inside_frame
            self._forget_frame()
            self._inbound._on_input_end(inside_frame=is_inside_frame, error=error)

    def _on_greenlet_end(self, greenlet: gevent.Greenlet[..., None]) -> None:
        """It ends with the connection only; else somebody killed it, and nothing would ever be heard again."""
        self._end(greenlet.exception or OSError("the reader greenlet was killed"))

    # -- frames

    def _feed(self, data: bytes) -> None:
        self.heard = monotonic()
        self.bytes_received += len(data)
        self._take_in(data)

    def catch_up(self) -> None:
        """Handle the frames that were left at once: the connection is over, and they came before."""
        while self._is_behind and not self._is_stopped:
            self._take_in(b"")

    def _catch_up(self) -> None:
        """Handle the frames that were left, a turn of everybody else before each portion."""
        while self._is_behind and not self._is_stopped:
            # What was received more meanwhile may end this early: its watcher switches here, too.
            self._lane.breathe()
            self._take_in(b"")

    def _take_in(self, data: bytes) -> None:
        self._is_behind = False
        if not self.is_discarding:
            try:
                if self._missing:
                    data = self._continue_payload(data)
                    if self.is_discarding:
                        return
                is_new = self._is_between and len(data) >= HEADER_SIZE
                word, stream_id, length = _unpack_words(data) if is_new else _NO_HEADER
                sink = self._streams.get(stream_id)
                if not word and length == len(data) - HEADER_SIZE and length and sink is not None:
                    # The straight road of one message: without it a round trip takes a twentieth longer.
                    self.frames_received += 1
                    sink._on_data(data[HEADER_SIZE:])
                elif not word and len(data) == HEADER_SIZE and length and sink is not None:
                    # That of a large payload, which comes next.
                    self.frames_received += 1
                    sink._on_header(length)
                    self._missing, self._sink, self._is_between = length, sink, False
                elif word == _CREDIT and len(data) == HEADER_SIZE:
                    self.frames_received += 1
                    self._frames.on_window_update(stream_id, 0, length)
                elif data or self._rest:
                    self._cut(data)
                self._frames.on_taken_in()
            except ProtocolError as error:
                self.discard()
                # Its traceback leads only here, and would keep what was received alive as long as the error.
                self._inbound._on_protocol_error(error.with_traceback(None))
        if self._tells_received:
            self._inbound._on_received()

    def drain(self) -> bool:
        """Take in a part of what was received already, without waiting: sending failed, and the peer may have said why.

        False when that was all.
        """
        if self._watcher is None or self._is_stopped or self._greenlet is gevent.getcurrent():
            return False
        if self._is_behind:
            self._take_in(b"")
            return not self._is_stopped
        try:
            data = _checked(self._transport.recv(RECEIVE_SIZE))
        except ssl.SSLError as error:
            # An alert: the peer's TLS has said why before it closed.
            self._end_drained(error)
            return False
        except ANY_FAILURE:
            return False  # nothing more, or the same error that sending met
        if not data:
            # The connection had ended in good order before we sent into it.
            self._end_drained(None)
            return False
        self._feed(data)
        return not self._is_stopped

    def _end_drained(self, error: BaseException | None) -> None:
        self._end(error)
        self._greenlet.kill(block=False)

    def _cut(self, data: bytes) -> None:
        """Cut what was received into frames. The straight road is a whole Data frame without flags."""
        if self._rest:
            data = self._rest + data
        position, end, left = 0, len(data), _FRAMES_A_TURN
        streams, is_debug = self._streams, self._is_debug
        try:
            while end - position >= HEADER_SIZE:
                if not left:
                    self._is_behind = True
                    break
                left -= 1
                word, stream_id, length = _unpack_words(data, position)
                position += HEADER_SIZE
                after = position + length
                sink = streams.get(stream_id)
                if not word and sink is not None and length and after <= end and not is_debug:
                    # The straight road: a whole Data frame without flags.
                    sink._on_data(data[position:after])
                    position = after
                elif word >> 16 == WINDOW_UPDATE and not is_debug:
                    self._frames.on_window_update(stream_id, word & 0xFFFF, length)
                else:
                    position = self._take_frame(data, position, word, stream_id, length)
                if self.is_discarding:
                    return
        finally:
            self.frames_received += _FRAMES_A_TURN - left
        self._rest = data[position:] if position < end else b""
        self._is_between = not (self._rest or self._missing or self._is_debug)

    def _take_frame(self, data: bytes, position: int, word: int, stream_id: int, length: int) -> int:
        """Any frame; `word` is the first of its header. Return where it ends, or what there is of it."""
        version, kind, flags = word >> 24, word >> 16 & 0xFF, word & 0xFFFF
        if self._is_debug:
            log(logger, logging.DEBUG, "%s: received %s", self._name, describe(kind, flags, stream_id, length))
        if version:
            raise ProtocolError(f"the peer sent a frame of version {version}, this is version 0")
        if kind != DATA:
            self._on_control(kind, flags, stream_id, length)
            return position
        sink = self._streams.get(stream_id)
        if flags & _STATE_FLAGS or sink is None or not length:
            sink = self._frames.on_data_header(stream_id, flags, length)
            # Judged at its header: a stream that is opened while its payload trickles in is another one.
            self._pending = (stream_id, flags) if stream_id in self._streams else None
        end, after = len(data), position + length
        if after <= end:
            if sink is not None and length:
                sink._on_data(data[position:after])
            if self._pending is not None:
                self._end_payload()
            return after
        if sink is not None:
            sink._on_header(length)
        self._missing = after - end
        self._sink = sink
        if sink is not None and position < end:
            sink._on_data(data[position:end])
        return end

    def _on_control(self, kind: int, flags: int, stream_id: int, length: int) -> None:
        if kind == WINDOW_UPDATE:
            self._frames.on_window_update(stream_id, flags, length)
        elif kind == PING:
            self._inbound._on_ping(flags, length)
        elif kind == GO_AWAY:
            self._inbound._on_go_away(length)
        else:
            raise ProtocolError(f"the peer sent a frame of the unknown type {kind}")

    def _continue_payload(self, data: bytes) -> bytes:
        """Hand on the payload that was missing; return what follows it."""
        payload, rest = data, b""
        if len(data) > self._missing:
            payload, rest = data[: self._missing], data[self._missing :]
        self._missing -= len(payload)
        if self._sink is not None:
            self._sink._on_data(payload)
        if not self._missing:
            self._sink = None
            self._is_between = not self._is_debug
            if self._pending is not None:
                self._end_payload()
        return rest

    def _end_payload(self) -> None:
        assert self._pending is not None
        (stream_id, flags), self._pending = self._pending, None
        self._frames.on_data_end(stream_id, flags)


class _Broken(Exception):
    """The connection raised its cause, or ended."""


def _checked(data: object) -> bytes:
    """What a receive returned, as bytes; OSError for nonsense."""
    if not isinstance(data, (bytes, bytearray)):
        raise OSError(f"recv() of the connection returned {type(data).__name__}, not bytes")
    return bytes(data)
