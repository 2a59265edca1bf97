"""Random sequences of calls on both ends of a pair of sessions, compared after each step with a plain model.

    python -m tests.fuzz.fuzz_calls [--seed N] [--minutes M] [--steps K] [--jobs J]

Between the two sessions the fuzzer moves the bytes itself, in random pieces, and stalls, cuts or half-closes the link.
Time is virtual: a limit of 300 s passes when an operation says so, and the same case always runs alike. A case is a
`Case` of literals (how the link is, two configurations, a list of operations), so it can be printed, shrunk and replayed.

What is known of a run comes from two sources that share nothing with the package: what the calls were given and what they
returned (`End`, `Call`), and what passed on the wire, read by the naive codec of `support.wire` (`View`). From these two
`Model` says for each call whether its result is right, and for each call that waits whether it has a reason to.

It does not play a peer that breaks the protocol, and it measures nothing. Longer than other modules because operations
and the model of what each may do stand together.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import faulthandler
import gc
import heapq
import itertools
import os
import pprint
import random
import signal
import socket
import subprocess
import sys
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gevent
import gevent.event
from gevent import socket as gsocket

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import geyamux.session
from geyamux import Client, Config, Server
from geyamux import errors as kinds
from support.rawpeer import settle
from support.wire import DATA, FIN, GO_AWAY, RST, SYN, WINDOW_UPDATE, Audit, Frame, WireError

__all__ = ["Case", "Fault", "find", "generate", "replay", "run", "shrink"]

INITIAL_WINDOW = 262144
#: Virtual seconds that pass with each step: what the package puts off by a turn of the loop is done then.
TURN = 0.003
#: How late a limit may be noticed.
SLACK = 0.05
#: Moves of a pump that keep to the size of its pieces; the rest goes in large ones.
SMALL_MOVES = 40
LARGE_MOVE = 65536

Op = tuple[Any, ...]


class Fault(AssertionError):
    """The package did what the model does not allow. `kind` names the check."""

    def __init__(self, kind: str, text: str) -> None:
        super().__init__(f"{kind}: {text}")
        self.kind = kind


class Interrupt(Exception):
    """What somebody may throw into a greenlet."""


@dataclass
class Case:
    """A run, in literals: everything that happens follows from it."""

    link: dict[str, Any]
    configs: tuple[dict[str, Any], dict[str, Any]]
    ops: list[Op]


# --- virtual time ---


class _Timer:
    """What the package takes for a timer of the loop."""

    def __init__(self, callback: Callable[[], object]) -> None:
        self.callback: Callable[[], object] | None = callback

    def stop(self) -> None:
        self.callback = None

    close = stop


class Clock:
    """The clock of both sessions. It moves by steps of `advance`, and a little with each look at it."""

    def __init__(self, tick: float) -> None:
        self.now = 1000.0
        #: What passes with each look.
        self.tick = tick
        self._timers: list[tuple[float, int, _Timer]] = []
        self._numbers = itertools.count()

    def monotonic(self) -> float:
        # Round trips must take time, windows grow by comparing them; and work must, or nobody would pause for others.
        self.now += self.tick
        return self.now

    def start_timer(self, hub: Any, seconds: float, callback: Callable[[], object], *, ref: bool = True) -> _Timer:
        timer = _Timer(callback)
        heapq.heappush(self._timers, (self.now + max(seconds, 0.001), next(self._numbers), timer))
        return timer

    def advance(self, seconds: float) -> None:
        """Let time pass; each timer is called when it is due, in the hub."""
        end = self.now + seconds
        while self._timers and self._timers[0][0] <= end:
            moment, _, timer = heapq.heappop(self._timers)
            if timer.callback is not None:
                self.now = max(self.now, moment)
                gevent.get_hub().loop.run_callback(timer.callback)
                settle()
        self.now = max(self.now, end)

    def block(self, seconds: float) -> None:
        """Let time pass as if the hub had been blocked: every timer is late."""
        self.now += seconds
        self.advance(0)

    def __enter__(self) -> Clock:
        clock = self

        class VirtualGreenlet(gevent.Greenlet):  # type: ignore[type-arg]
            def join(self, timeout: float | None = None) -> None:
                over = gevent.event.Event()
                self.link(lambda _: over.set())
                timer = None if timeout is None else clock.start_timer(None, timeout, over.set)
                over.wait()
                if timer is not None:
                    timer.stop()

        class VirtualGevent:
            spawn = VirtualGreenlet.spawn

            @staticmethod
            def spawn_later(seconds: float, function: Callable[..., object], *args: Any) -> None:
                clock.start_timer(None, seconds, lambda: gevent.spawn(function, *args))

            def __getattr__(self, name: str) -> Any:
                return getattr(gevent, name)

        self._saved: list[tuple[Any, str, Any]] = []
        for name, module in list(sys.modules.items()):
            if name.startswith("geyamux."):
                self._patch(module, "time", self)
                self._patch(module, "monotonic", self.monotonic)
                self._patch(module, "start_timer", self.start_timer)
                self._patch(module, "random", random.Random(1))
        self._patch(geyamux.session, "gevent", VirtualGevent())
        return self

    def _patch(self, module: Any, name: str, value: object) -> None:
        if hasattr(module, name):
            self._saved.append((module, name, getattr(module, name)))
            setattr(module, name, value)

    def __exit__(self, *exc: object) -> None:
        for module, name, value in reversed(self._saved):
            setattr(module, name, value)


# --- what passes ---


class Flow:
    """What one end has sent and received on one stream, in bytes and frames."""

    def __init__(self) -> None:
        self.sent = self.received = 0
        self.credit = INITIAL_WINDOW
        self.granted = INITIAL_WINDOW
        self.syn_sent = self.fin_sent = self.fin_received = False
        self.rst_sent: int | None = None
        self.rst_received: int | None = None
        self.is_heard = False


class View(Audit):
    """The wire as one end sees it. Judges what that end sends, and counts."""

    def __init__(self, model: Model, side: int, max_window: int) -> None:
        super().__init__(client=side == 0, max_window=max_window)
        self.model = model
        self.side = side
        self.flows: dict[int, Flow] = {}
        self.went_away_received = self.went_away_sent = False
        #: The input ended: inside a frame, or between two; it broke, or sending failed.
        self.eof: str | None = None
        self.broke = False
        self.bytes_received = 0

    def flow(self, stream_id: int) -> Flow:
        return self.flows.setdefault(stream_id, Flow())

    def received_of(self, stream_id: int) -> int:
        """Bytes of Data received, those of a frame that has only begun included."""
        return self.flow(stream_id).received + self._in.begun(stream_id)

    def on_sent(self, chunk: bytes) -> None:
        try:
            self.sent(chunk)
        except WireError as error:
            self.model.blame("wire", f"side {self.side} sent {error}")
        self.frames.clear()

    def on_received(self, chunk: bytes) -> None:
        self.bytes_received += len(chunk)
        self.received(chunk)
        if not chunk:
            self.eof = "inside" if self._in.pending else "between"

    def _check(self, found: Frame) -> None:
        super()._check(found)
        if found.type == GO_AWAY:
            self.went_away_sent = True
            self._require(found.length == 0, f"GoAway {found.length} for a peer that did nothing wrong")
        elif found.stream_id:
            flow = self.flow(found.stream_id)
            if found.type == DATA:
                flow.sent += found.length
            elif found.flags & RST:
                flow.rst_sent = found.length
                self.model.on_reset_sent(self.side, found.stream_id, found.length)
            else:
                flow.granted += found.length
            flow.syn_sent = flow.syn_sent or bool(found.flags & SYN)
            flow.fin_sent = flow.fin_sent or bool(found.flags & FIN)

    def _note(self, found: Frame) -> None:
        super()._note(found)
        if found.type == GO_AWAY:
            self.went_away_received = True
        elif found.stream_id:
            flow = self.flow(found.stream_id)
            flow.is_heard = True
            if found.type == DATA:
                flow.received += found.length
            elif found.flags & RST:
                flow.rst_received = found.length if flow.rst_received is None else flow.rst_received
                self.model.backlogs[self.side].pop(found.stream_id, None)
            elif found.type == WINDOW_UPDATE:
                flow.credit += found.length
            flow.fin_received = flow.fin_received or bool(found.flags & FIN)
            if found.flags & SYN:
                self.model.on_syn(self.side, found.stream_id)


class _Tap:
    """Cuts what a session sends and receives, and shows it to the view in the order in which it happens."""

    def __init__(self, view: View, cuts: tuple[int, ...], seed: int) -> None:
        self.view = view
        self.cuts = cuts
        self.rng = random.Random(seed)
        self.is_broken = False

    def cut(self, size: int) -> int:
        most = self.rng.choice(self.cuts)
        return min(size, most if most > 9 else self.rng.randint(1, most))

    def check(self) -> None:
        if self.is_broken:
            self.view.broke = True
            raise ConnectionResetError(errno.ECONNRESET, "the link broke")


class _TapSocket(gsocket.socket):
    """A session's end of a link with a descriptor."""

    tap: _Tap

    def send(self, data: Any, flags: int = 0) -> int:
        self.tap.check()
        if len(self.tap.cuts) > 1 and self.tap.rng.random() < 0.05:
            raise BlockingIOError
        with memoryview(data) as view, view[: self.tap.cut(len(view))] as part:
            try:
                sent = super().send(part)
            except BlockingIOError:
                raise
            except OSError:
                self.tap.view.broke = True
                raise
            self.tap.view.on_sent(bytes(part[:sent]))
        return sent

    def sendmsg(self, buffers: Any, *rest: Any) -> int:
        return self.send(b"".join(buffers))

    def recv(self, size: int, flags: int = 0) -> bytes:
        self.tap.check()
        data = super().recv(self.tap.cut(size))
        self.tap.view.on_received(data)
        return data


class SocketPort:
    """One end of the link, over a socketpair: the session has `near`, the fuzzer moves bytes at the other."""

    def __init__(self, tap: _Tap, buffer: int | None) -> None:
        near, self._far = gsocket.socketpair()
        if buffer:
            near.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, buffer)
            self._far.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, buffer)
        self._far.settimeout(0)
        self.near = _TapSocket(near.family, near.type, fileno=near.detach())
        self.near.tap = tap

    def take(self, size: int) -> bytes | None:
        """What the session has sent; None where nothing waits, b"" at its end."""
        try:
            return self._far.recv(size)
        except BlockingIOError:
            return None
        except OSError:
            return b""

    def give(self, data: bytes) -> int | None:
        """Let the session receive some of it; None where it does not any more."""
        try:
            return self._far.send(data)
        except BlockingIOError:
            return 0
        except OSError:
            return None

    def finish(self) -> None:
        """The session receives the end."""
        with contextlib.suppress(OSError):
            self._far.shutdown(socket.SHUT_WR)

    def refuse(self) -> None:
        """What the session sends fails."""
        with contextlib.suppress(OSError):
            self._far.shutdown(socket.SHUT_RD)

    def break_off(self) -> None:
        self.near.tap.is_broken = True
        self._far.close()

    close = break_off


class ObjectPort:
    """One end of the link, an object without a descriptor whose calls wait; the session has it itself."""

    def __init__(self, tap: _Tap, buffer: int | None) -> None:
        self.near = self
        self.tap = tap
        self._limit = buffer or 65536
        self._in, self._out = bytearray(), bytearray()
        self._changed = gevent.event.Event()
        self._is_finished = self._is_refused = self._is_shut = self._is_closed = False

    # the session's side

    def recv(self, size: int) -> bytes:
        while True:
            self.tap.check()
            if self._is_closed:
                raise OSError(errno.EBADF, "closed")
            if self._in or self._is_finished:
                size = self.tap.cut(size)
                data = bytes(self._in[:size])
                del self._in[:size]
                self.tap.view.on_received(data)
                return data
            self._wait()

    def send(self, data: Any) -> int:
        while True:
            self.tap.check()
            if self._is_refused or self._is_shut or self._is_closed:
                self.tap.view.broke = True
                raise BrokenPipeError(errno.EPIPE, "the other end is closed")
            if len(self._out) < self._limit:
                with memoryview(data) as view:
                    part = bytes(view[: self.tap.cut(min(len(view), self._limit - len(self._out)))])
                self._out += part
                self.tap.view.on_sent(part)
                return len(part)
            self._wait()

    def _wait(self) -> None:
        self._changed.clear()
        self._changed.wait()

    def shutdown(self, how: int) -> None:
        self._is_shut = True
        self._changed.set()

    def close(self) -> None:
        self._is_closed = True
        self._changed.set()

    # the fuzzer's side

    def take(self, size: int) -> bytes | None:
        data = bytes(self._out[:size])
        del self._out[:size]
        self._changed.set()
        return data if data or self._is_shut or self._is_closed or self.tap.is_broken else None

    def give(self, data: bytes) -> int | None:
        if self._is_closed or self.tap.is_broken:
            return None
        taken = data[: self._limit - len(self._in)]
        self._in += taken
        self._changed.set()
        return len(taken)

    def finish(self) -> None:
        self._is_finished = True
        self._changed.set()

    def refuse(self) -> None:
        self._is_refused = True
        self._changed.set()

    def break_off(self) -> None:
        self.tap.is_broken = True
        self._changed.set()


PORTS: dict[str, Callable[[_Tap, int | None], Any]] = {"socket": SocketPort, "object": ObjectPort}


class Lane:
    """One direction of the link."""

    def __init__(self, source: Any, target: Any) -> None:
        self.source = source
        self.target = target
        self.waiting = bytearray()
        self.is_stalled = False
        #: The source has ended; the target knows; the target takes no more.
        self.is_over = self.is_told = self.is_refused = False
        #: Everything that was there has been moved.
        self.is_drained = False

    def move(self, size: int) -> bool:
        """Move up to so many bytes; False when there was nothing to do."""
        self.is_drained = False
        has_moved = False
        if len(self.waiting) < size and not self.is_over:
            chunk = self.source.take(size - len(self.waiting))
            has_moved = chunk is not None
            self.is_over = chunk == b""
            if not self.is_refused:
                self.waiting += chunk or b""
        if self.waiting:
            taken = self.target.give(bytes(self.waiting[:size]))
            if taken is None:
                self.refuse()
            else:
                del self.waiting[:taken]
                has_moved = has_moved or bool(taken)
        if self.is_over and not self.waiting and not self.is_told:
            self.is_told = has_moved = True
            self.target.finish()
        self.is_drained = not has_moved and not self.waiting
        return has_moved

    def refuse(self) -> None:
        """The target is gone."""
        self.waiting.clear()
        self.is_refused = True
        self.source.refuse()

    def cut(self) -> None:
        """The target receives the end here, whatever the source goes on to say."""
        self.waiting.clear()
        self.is_refused = self.is_told = True
        self.target.finish()


# --- the model ---


READS = ("recv", "recv_into", "read", "read1", "readline", "readinto", "readall", "peek", "file_read")
WRITES = ("send", "sendall", "write", "file_write")
#: These wait for more than the first byte.
FULL_READS = ("read", "readline", "readinto", "readall")
FILE_CALLS = ("read", "read1", "readline", "readinto", "readall", "peek", "write", "flush")

_NOISE = random.Random(20_261_122).randbytes(1 << 21)
#: Each writing call marks its bytes in their upper four bits, so what was cut short is told from what follows.
_MARKS = [bytes(byte & 0x0F | tag << 4 for byte in range(256)) for tag in range(16)]


def content(number: int, size: int) -> bytes:
    """What the writing call of this number on its stream writes."""
    start = number * 7919 % (1 << 20)
    return _NOISE[start : start + size].translate(_MARKS[number % 16])


class Call:
    """One call that may wait, in a greenlet of its own."""

    def __init__(self, model: Model, op: Op, kind: str, side: int, end: End | None, size: int = 0) -> None:
        self.model = model
        self.op = op
        self.kind = kind
        self.side = side
        self.end = end
        self.size = size
        self.has_begun = self.is_done = False
        #: How long it may wait, and since when.
        self.timeout: float | None = None
        self.began = 0.0
        self.is_struck = False
        self.value: Any = None
        self.error: BaseException | None = None
        #: Of a write: the bytes, and how many of them were accepted, at least and at most.
        self.body = b""
        self.least, self.most = 0, size
        self.seen = 0
        self.is_passed = False
        #: Of a flush: what must have left when it returns.
        self.target = 0
        #: What it was made for, where that is known to the caller only.
        self.file: Any = None
        self.greenlet: Any = None

    @property
    def is_pending(self) -> bool:
        return self.has_begun and not self.is_done

    def run(self, function: Callable[[], Any], judge: Callable[[Call], None]) -> None:
        self.has_begun = True
        self.began = self.model.clock.now
        try:
            self.value = function()
        except BaseException as error:
            self.error = error
            # Kept for long; its tracebacks would hold streams that are forgotten.
            link: BaseException | None = error
            while link is not None:
                link.__traceback__ = None
                link = link.__context__
        self.is_done = True
        self.model.count(self)
        try:
            judge(self)
        except Fault as fault:
            self.model.faults.append(fault)
        self.greenlet = None

    def __str__(self) -> str:
        return f"{self.op}"


class End:
    """One end of a stream, as its application knows it."""

    def __init__(self, side: int, name: int, stream_id: int) -> None:
        self.side = side
        self.name = name
        self.stream_id = stream_id
        self.stream: Any = None
        self.was_held = False
        self.is_closed = self.is_shut_rd = self.is_shut_wr = False
        #: reset() was called, be it too late to reset anything: what was unread is lost.
        self.is_lossy = False
        self.files: list[Any] = []
        self.reset: int | None = None
        self.timeout: float | None = None
        #: Bytes that reads have returned.
        self.consumed = 0
        #: What was written here, call by call in the order in which they got their turn.
        self.log: list[Call] = []
        #: How much of the other end's log was read: a call, and bytes of it.
        self.at = 0
        self.calls: list[Call] = []

    @property
    def is_released(self) -> bool:
        return self.is_closed and not self.files

    @property
    def is_given_up(self) -> bool:
        return self.is_released or self.is_lossy or self.stream is None

    def pending(self, names: tuple[str, ...]) -> list[Call]:
        return [call for call in self.calls if call.is_pending and call.kind in names]

    def __str__(self) -> str:
        return f"end {self.side} of stream {self.name} (id {self.stream_id})"


def match(end: End, log: list[Call], data: bytes, *, is_peek: bool) -> str | None:
    """Find what was read in what was written; say what is wrong."""
    at, rest = end.at, data
    saved = [(call, call.seen, call.is_passed) for call in log[at:]]
    problem = None
    while rest and problem is None:
        if at >= len(log):
            problem = f"{len(rest)} bytes that nobody wrote: {rest[:20].hex()}"
            break
        call = log[at]
        found = _common(rest, call.body[call.seen : call.most])
        call.seen += found
        rest = rest[found:]
        if rest:
            if call.seen < call.least or call.is_pending:
                problem = f"after {call.seen} of the bytes of {call} came {rest[:20].hex()}"
            call.is_passed = True
            at += 1
    if is_peek:
        for call, seen, is_passed in saved:
            call.seen, call.is_passed = seen, is_passed
    else:
        end.at = at
    return problem


def _common(one: bytes, other: bytes) -> int:
    """How long the common beginning is."""
    size = min(len(one), len(other))
    if one[:size] == other[:size]:
        return size
    low, high = 0, size
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if one[:middle] == other[:middle] else (low, middle)
    return low


class Model:
    """Both sessions, the link, and what must be so."""

    def __init__(self, case: Case, clock: Clock) -> None:
        self.case = case
        self.clock = clock
        self.faults: list[Fault] = []
        self.outcomes: Counter[str] = Counter()
        self.configs = [Config(**settings) for settings in case.configs]
        self.views = [View(self, side, self.configs[side].window_limit) for side in (0, 1)]
        link = case.link
        self.taps = [_Tap(self.views[side], tuple(link["cuts"]), link["seed"] + side) for side in (0, 1)]
        self.ports = [PORTS[link["kind"]](tap, link["buffer"]) for tap in self.taps]
        self.lanes = [Lane(self.ports[0], self.ports[1]), Lane(self.ports[1], self.ports[0])]
        self.sessions: list[Any] = [Client(self.ports[0].near, self.configs[0])]
        self.sessions.append(Server(self.ports[1].near, self.configs[1]))
        self.ends: dict[tuple[int, int], End] = {}
        #: Names of streams by their ids.
        self.names: dict[int, int] = {}
        self.calls: dict[int, Call] = {}
        #: Streams that wait for accept, in order.
        self.backlogs: list[OrderedDict[int, float]] = [OrderedDict(), OrderedDict()]
        #: Whether a stream was refused can't be told any more: a reset that made room waits behind a stall.
        self.is_vague = [False, False]
        self.is_closing = [False, False]
        #: ... without the time to say everything.
        self.is_abrupt = [False, False]
        self.is_refusing = [False, False]
        #: The link has stood still, or was cut: then limits of time may pass.
        self.was_disturbed = False

    # -- small things

    def blame(self, kind: str, text: str) -> None:
        self.faults.append(Fault(kind, text))

    def count(self, call: Call) -> None:
        result = "ok" if call.error is None else type(call.error).__name__
        self.outcomes[f"{call.kind} {result}"] += 1

    def twin(self, end: End) -> End:
        return self.ends[1 - end.side, end.name]

    def flow(self, end: End) -> Flow:
        return self.views[end.side].flow(end.stream_id)

    def is_flowing(self, side: int) -> bool:
        """What this side sends reaches the other, and everything has."""
        lane = self.lanes[side]
        return lane.is_drained and not (lane.is_stalled or lane.is_refused or lane.is_over)

    @property
    def is_quiet(self) -> bool:
        return self.is_flowing(0) and self.is_flowing(1)

    def add_stream(self, side: int, name: int, stream: Any) -> End:
        for each in (0, 1):
            self.ends[each, name] = End(each, name, stream.stream_id)
        self.names[stream.stream_id] = name
        return self.hold(side, name, stream)

    def hold(self, side: int, name: int, stream: Any) -> End:
        end = self.ends[side, name]
        end.stream, end.was_held = stream, True
        return end

    # -- what passes on the wire

    def on_syn(self, side: int, stream_id: int) -> None:
        config, backlog = self.configs[side], self.backlogs[side]
        if self.is_refusing[side]:
            return
        limit = config.max_incoming_streams
        if len(backlog) < config.accept_backlog and (limit is None or self.incoming(side) < limit):
            backlog[stream_id] = self.clock.now
        elif any(self.has_expired(side, since) for since in backlog.values()) or self._may_have_reset_one(side):
            self.is_vague[side] = True

    def _may_have_reset_one(self, side: int) -> bool:
        """A stream that the application has closed may have been reset by the session, and the reset may still wait."""
        ends = (end for (each, _), end in self.ends.items() if each == side and end.was_held and not self.has_ended(end))
        return any(end.is_closed or self.may_be_given_up(end) for end in ends)

    def has_expired(self, side: int, since: float) -> bool:
        """What came then and was not accepted may have been reset, and the reset may wait behind a stall."""
        limit = self.configs[side].accept_timeout
        return limit is not None and self.clock.now - since >= limit

    def incoming(self, side: int) -> int:
        """Streams of the peer that count: until they have ended and the application is done with them."""
        return len(self.backlogs[side]) + sum(
            end.was_held and end.stream_id % 2 != 1 - side % 2 and not (self.has_ended(end) and end.is_given_up)
            for (each, _), end in self.ends.items()
            if each == side
        )

    def on_reset_sent(self, side: int, stream_id: int, code: int) -> None:
        self.backlogs[side].pop(stream_id, None)
        end = self.ends.get((side, self.names.get(stream_id, -1)))
        if end is None or not end.was_held:
            return
        if end.reset is not None:
            is_overtaken = code == 0 and (self.is_closing[side] or end.is_closed or self.may_be_given_up(end))
            if end.reset != code and not is_overtaken:
                self.blame("reset code", f"{end} was reset with {end.reset}, and {code} went")
        elif code:
            self.blame("reset code", f"nobody reset {end}, and a reset with {code} went")
        elif not (end.is_closed or self.is_closing[side] or self.may_be_given_up(end)):
            self.blame("reset", f"a reset of {end} went, for which nobody gave a reason")

    def may_be_given_up(self, end: End) -> bool:
        """The session itself may reset a stream: at a limit of time, or of memory."""
        config = self.configs[end.side]
        is_hopeless = config.stream_close_timeout is not None and self.flow(end).fin_received
        return is_hopeless or config.stream_open_timeout is not None or config.receive_budget < 1 << 25

    def has_ended(self, end: End) -> bool:
        flow = self.flow(end)
        if end.reset is not None or flow.rst_received is not None or flow.rst_sent is not None:
            return True
        return (end.is_shut_wr or end.is_released) and flow.fin_received

    # -- judging what a call returned

    def judge(self, call: Call) -> None:
        """Raise a Fault where this is no right result."""
        if call.error is not None:
            self._judge_error(call)
        if call.kind in READS:
            self._judge_read(call)
        elif call.kind in WRITES:
            self._judge_write(call)
        elif call.kind == "flush" and call.error is None:
            assert call.end is not None
            if self.flow(call.end).sent < call.target and call.end.reset is None:
                raise Fault("flush", f"{call} returned, and {self.flow(call.end).sent} of {call.target} bytes have left")

    def _judge_read(self, call: Call) -> None:
        end, data = call.end, call.value
        assert end is not None
        if call.error is not None or data is None:
            if call.error is not None and call.kind not in FULL_READS and not call.is_struck:
                self._check_nothing_is_left(call)
            if isinstance(call.error, kinds.SessionError) and self._was_finished(end):
                raise Fault("fin", f"{call} raised {call.error!r}, and {self.twin(end)} was shut down in time")
            return
        if len(data) > call.size >= 0:
            raise Fault("length", f"{call} returned {len(data)} bytes")
        if data:
            problem = match(end, self.twin(end).log, data, is_peek=call.kind == "peek")
            if problem is not None:
                raise Fault("bytes", f"{call} at {end.consumed} of {end}: {problem}")
            end.consumed += 0 if call.kind == "peek" else len(data)
        is_short = len(data) < call.size and call.kind in FULL_READS
        if call.kind == "readline":
            is_short = is_short and not data.endswith(b"\n")
            if b"\n" in data[:-1]:
                raise Fault("line", f"{call} read past the end of a line")
        if call.size and (not data or is_short or call.kind == "readall"):
            self._check_eof(call, end)

    def _was_finished(self, end: End) -> bool:
        """The peer shut it down before all ended in good order, and nothing kept the FIN from coming."""
        twin = self.twin(end)
        is_finished = twin.is_shut_wr and not (twin.is_closed or twin.is_lossy or self.flow(twin).rst_sent is not None)
        is_given_up = self.flow(end).rst_sent is not None or self.may_be_given_up(end) or self.may_be_given_up(twin)
        is_orderly = not (self.was_disturbed or self.is_closing[end.side] or self.is_abrupt[twin.side])
        return is_finished and is_orderly and not is_given_up and not self.views[end.side].broke

    def _check_nothing_is_left(self, call: Call) -> None:
        """An error of the stream or the session comes behind what was received."""
        end = call.end
        assert end is not None
        if not isinstance(call.error, (kinds.StreamReset, kinds.SessionError)) or end.reset is not None or end.is_closed:
            return
        unread = end.stream.stats().unread if end.stream is not None else 0
        if unread:
            raise Fault("buffered", f"{call} raised {call.error!r} over {unread} unread bytes")

    def _check_eof(self, call: Call, end: End) -> None:
        if end.is_shut_rd:
            return
        flow, twin = self.flow(end), self.twin(end)
        if not flow.fin_received:
            raise Fault("eof", f"{call} says EOF, and no FIN has come for {end}")
        if end.consumed != flow.received:
            raise Fault("eof", f"{call} says EOF after {end.consumed} of {flow.received} bytes of {end}")
        if not (twin.is_shut_wr or twin.is_closed):
            raise Fault("eof", f"{call} says EOF, and {twin} was not shut down")
        for write in twin.log[end.at :]:
            if write.seen < write.least:
                raise Fault("lost", f"{call} says EOF after {write.seen} of {write.least} bytes of {write}")

    def _judge_write(self, call: Call) -> None:
        error, value = call.error, call.value
        if error is None and value is not None:
            call.least = call.most = value
            if (call.size and not 0 < value <= call.size) or (call.kind == "write" and value != call.size):
                raise Fault("count", f"{call} returned {value}")
        elif error is None:
            call.least = call.most = 0 if call.kind == "file_write" else call.size
        elif isinstance(error, (TimeoutError, BlockingIOError)) and not call.is_struck:
            count = getattr(error, "bytes_sent", None)
            if call.kind in ("sendall", "write") and count is None:
                raise Fault("count", f"{call}: {error!r} tells no bytes_sent")
            if isinstance(error, BlockingIOError) and count is not None and error.characters_written != count:
                raise Fault("count", f"{call}: {error.characters_written} characters_written, {count} bytes_sent")
            call.least = call.most = count or 0
        if call.seen > call.most or (call.is_passed and call.seen < call.least):
            raise Fault("count", f"{call} says {call.least} bytes, and {call.seen} of them were read")

    def _judge_error(self, call: Call) -> None:
        error, end = call.error, call.end
        waited = self.clock.now - call.began
        if isinstance(error, (gevent.GreenletExit, Interrupt, gevent.Timeout)):
            is_right = call.is_struck
        elif isinstance(error, TimeoutError):
            # What is called on a session has no BlockingIOError; with a limit of 0 it times out at once.
            is_limited = call.timeout is not None and (call.timeout > 0 or end is None)
            is_right = is_limited and waited >= (call.timeout or 0) - 1e-3 and error.args == ("timed out",)
        elif isinstance(error, BlockingIOError):
            is_right = call.timeout == 0
        elif isinstance(error, kinds.SessionError):
            is_right = self._is_right_end(call, error)
        elif isinstance(error, kinds.RemoteGoAway):
            is_right = call.kind == "open" and self.views[call.side].went_away_received
        elif end is None:
            is_right = False
        elif isinstance(error, kinds.StreamClosed):
            is_right = self._is_right_closed(call, end, error)
        elif isinstance(error, kinds.StreamReset):
            is_right = self._is_right_reset(end, error)
        elif isinstance(error, ValueError):
            is_right = end.is_closed if call.kind in FILE_CALLS else call.file is not None and call.file.closed
        else:
            is_right = isinstance(error, OSError) and "timed out object" in str(error) and call.kind == "file_read"
        if not is_right:
            raise Fault("error", f"{call} raised {error!r} after {waited:.3f} s, limit {call.timeout}, at {end}")

    def _is_right_closed(self, call: Call, end: End, error: kinds.StreamClosed) -> bool:
        if error.errno == errno.EPIPE:
            return call.kind in (*WRITES, "flush") and (end.is_shut_wr or end.is_closed)
        return error.errno == errno.EBADF and end.is_released

    def _is_right_reset(self, end: End, error: kinds.StreamReset) -> bool:
        flow = self.flow(end)
        if error.remote:
            return flow.rst_received == error.code
        if end.reset is None:
            return (self.may_be_given_up(end) or end.is_lossy) and error.code == 0
        return error.code == end.reset or (self.may_be_given_up(end) and error.code == 0)

    def _is_right_end(self, call: Call, error: kinds.SessionError) -> bool:
        session, view = self.sessions[call.side], self.views[call.side]
        if isinstance(error, (kinds.ProtocolError, kinds.RemoteError)):
            return False
        if call.kind == "accept" and self.is_refusing[call.side] and isinstance(error, kinds.SessionClosed):
            return True
        if isinstance(error, kinds.TransportError) and not (view.broke or view.eof == "inside"):
            return False
        if isinstance(error, (kinds.KeepaliveTimeout, kinds.WriteTimeout)) and not self.was_disturbed:
            return False
        return bool(session.closed) and (error.__cause__ is not None or session.closed)

    # -- judging what waits, and the counts

    def check(self) -> None:
        """Everything has settled: is what is so what must be so?"""
        for side in (0, 1):
            self._check_session(side)
        for end in self.ends.values():
            if end.stream is not None:
                self._check_end(end)
        for call in self.calls.values():
            if call.is_pending:
                reason = self._overdue(call)
                if reason is not None:
                    self.blame("stuck", f"{call} at {call.end or call.side} waits, and {reason}")
        if self.faults:
            raise self.faults[0]

    def _check_session(self, side: int) -> None:
        session, view = self.sessions[side], self.views[side]
        if session.closed:
            error = session.exception
            if isinstance(error, (kinds.ProtocolError, kinds.RemoteError)):
                self.blame("session", f"side {side} ended: {error!r}")
            elif isinstance(error, (kinds.KeepaliveTimeout, kinds.WriteTimeout)):
                if not self.was_disturbed:
                    self.blame("session", f"side {side} ended on a link that moved: {error!r}")
            elif isinstance(error, kinds.TransportError):
                if not view.broke:
                    self.blame("session", f"side {side} ended, and nothing broke: {error!r}")
            elif not (self.is_closing[side] or view.eof or view.broke or self._is_drained(side)):
                self.blame("session", f"side {side} ended for no reason")
            return
        if view.eof or view.broke:
            self.blame("session", f"side {side} lives, and its connection ended")
        if not self.is_flowing(side) or self.is_vague[side]:
            return
        stats = session.stats()
        mine = [end for (each, _), end in self.ends.items() if each == side and not self._has_vanished(end)]
        expected = {
            "backlog": len(self.backlogs[side]),
            "queued": 0,
            "streams": sum(end.was_held and not self.has_ended(end) for end in mine) + len(self.backlogs[side]),
            "unread": sum(self._unread(end) for end in mine)
            + sum(view.received_of(each) for each in self.backlogs[side]),
        }
        if self.configs[side].stream_open_timeout is None:  # it gives the place back, though the stream may live on
            opened = (end for end in mine if end.stream_id % 2 == 1 - side)
            expected["unacknowledged"] = sum(
                not self.flow(end).is_heard and end.reset is None and self.flow(end).rst_sent is None for end in opened
            )
        was_given_up = any(self.may_be_given_up(end) and self.flow(end).rst_sent is not None for end in mine)
        if was_given_up or any(call.is_pending and call.kind in READS for call in self.calls.values()):
            del expected["unread"]  # what the session resets by itself may still be read
        found = {name: getattr(stats, name) for name in expected}
        if found != expected:
            self.blame("counts", f"side {side}: {found}, expected {expected}")

    def _has_vanished(self, end: End) -> bool:
        """Everything has left, and its SYN was not among it: it was given up before the peer heard of it."""
        if end.stream_id % 2 != 1 - end.side or self.flow(end).syn_sent:
            return False
        may_be_given_up = self.configs[end.side].stream_open_timeout is not None
        if end.reset is None and not (end.is_closed or may_be_given_up or self.is_closing[end.side]):
            self.blame("open", f"{end} was opened, and no SYN has left")
        return True

    def _is_drained(self, side: int) -> bool:
        view = self.views[side]
        return self.is_refusing[side] and view.went_away_received

    def _unread(self, end: End) -> int:
        """Bytes that wait for this application."""
        flow = self.flow(end)
        if not end.was_held or end.is_released or end.is_shut_rd or end.is_lossy or flow.rst_sent is not None:
            return 0
        if end.stream is None and self.has_ended(end):
            return 0  # it was collected
        return self.views[end.side].received_of(end.stream_id) - end.consumed

    def _check_end(self, end: End) -> None:
        """A stream's own figures, where nothing is under way."""
        stats, flow, session = end.stream.stats(), self.flow(end), self.sessions[end.side]
        readers, writers = end.pending(READS), end.pending(WRITES)
        if session.closed:
            return
        if (stats.readers, stats.writers) != (len(readers), len(writers)):
            self.blame("waiters", f"{end}: {stats}, and {len(readers)} read and {len(writers)} write")
        unread = 0 if readers else self._unread(end)
        if stats.unread != unread and not self.may_be_given_up(end):
            self.blame("unread", f"{end} holds {stats.unread} unread bytes, expected {unread}")
        if self.has_ended(end) or not self.is_flowing(end.side) or self._has_vanished(end):
            return
        if stats.send_credit != flow.credit - flow.sent:
            self.blame("credit", f"{end} has a credit of {stats.send_credit}, expected {flow.credit - flow.sent}")
        if not (flow.fin_received or end.is_closed or end.is_shut_rd):
            taken = stats.receive_limit - stats.receive_window - unread
            window = flow.granted - self.views[end.side].received_of(end.stream_id)
            if window != stats.receive_window:
                self.blame("window", f"{end} has granted a window of {window}, and knows of {stats.receive_window}")
            if taken * 2 >= stats.receive_limit:
                self.blame("window", f"{end} has taken {taken} of {stats.receive_limit} bytes and not granted them anew")

    def _overdue(self, call: Call) -> str | None:
        """Why this call must not wait any more; None where it may."""
        session, view = self.sessions[call.side], self.views[call.side]
        if session.ready():
            return "its session has ended"
        if call.timeout is not None and self.clock.now - call.began > call.timeout + SLACK:
            return f"its limit of {call.timeout} s passed {self.clock.now - call.began - call.timeout:.3f} s ago"
        if call.kind in READS:
            return self._overdue_read(call)
        if call.kind in WRITES:
            return self._overdue_write(call)
        if call.kind == "flush" and self.is_flowing(call.side):
            return "everything has left"
        if call.kind == "ping" and self.is_quiet:
            return "the link has carried everything"
        if call.kind == "open":
            if session.closed or view.went_away_received:
                return "no stream may be opened any more"
            if self.is_flowing(call.side) and session.stats().unacknowledged < self.configs[call.side].accept_backlog:
                return "there is a place"
        if call.kind == "accept" and (self.is_refusing[call.side] or self.backlogs[call.side]):
            return "a stream waits, or none will come" if self.is_flowing(call.side) else None
        return None

    def _overdue_read(self, call: Call) -> str | None:
        end = call.end
        assert end is not None
        flow, stream_session = self.flow(end), self.sessions[end.side]
        if end.is_released or end.is_shut_rd or end.reset is not None:
            return "this side has ended it"
        if flow.fin_received or flow.rst_received is not None:
            return "the peer has ended it"
        waiting = self.views[end.side].received_of(end.stream_id) - end.consumed
        is_first = end.pending(READS)[0] is call
        enough = call.size if call.kind in ("read", "readinto") else 1
        if is_first and call.kind in ("readline", "readall"):
            enough = call.size if call.size >= 0 else 1 << 62
        if is_first and waiting >= enough and not stream_session.closed:
            return f"{waiting} bytes have come"
        twin = self.twin(end)
        if self.is_quiet and not stream_session.closed and not self.sessions[twin.side].closed:
            if twin.is_shut_wr or twin.is_released or twin.reset is not None:
                return f"{twin} was ended"
            if sum(write.least for write in twin.log) > flow.received and not twin.pending(WRITES):
                return f"of what {twin} wrote only {flow.received} bytes have come"
        return None

    def _overdue_write(self, call: Call) -> str | None:
        end = call.end
        assert end is not None
        flow = self.flow(end)
        has_said_all = (end.is_shut_wr or end.is_released) and flow.fin_received
        if end.reset is not None or (flow.rst_received is not None and not has_said_all):
            return "it was reset"
        if not self.is_flowing(end.side):
            return None  # a frame that it has queued goes, also where FIN was queued behind it
        if end.is_shut_wr or end.is_released:
            return "this side has ended it"
        if flow.credit > flow.sent:
            return f"there is a credit of {flow.credit - flow.sent}"
        twin = self.twin(end)
        if self.is_quiet and (twin.is_released or twin.is_shut_rd) and not self.sessions[twin.side].closed:
            return f"{twin} takes and drops everything"
        return None


# --- operations ---


class Run:
    """Carries out the operations of a case. What can't be done (any more) is left out, so any part of a case is one."""

    def __init__(self, case: Case, clock: Clock) -> None:
        self.case = case
        self.clock = clock
        self.model = Model(case, clock)
        self.hurry = 0
        self.done = 0

    def perform(self, op: Op) -> None:
        """Carry out one operation, and check."""
        getattr(self, f"_{op[0]}")(op, *op[2:])
        if op[0] not in ("pump", "advance"):
            for lane in self.model.lanes:
                lane.is_drained = False
        self.done += 1
        if self.hurry > 0:
            self.hurry -= 1
        else:
            self._settle(op)

    def _settle(self, op: Op | None = None) -> None:
        settle()
        self.clock.advance(TURN)
        self.model.check()

    def _hurry(self, op: Op, steps: int) -> None:
        self.hurry = steps + 1

    def _turn(self, op: Op) -> None:
        gevent.sleep(0)

    # -- calls that may wait

    def _spawn(self, call: Call, function: Callable[[], Any], judge: Callable[[Call], None] | None = None) -> None:
        self.model.calls[call.op[1]] = call
        if call.end is not None:
            call.end.calls = [each for each in call.end.calls if not each.is_done]
            call.end.calls.append(call)
        call.greenlet = gevent.spawn(call.run, function, judge or self.model.judge)

    def _end(self, side: int, name: int) -> End | None:
        end = self.model.ends.get((side, name))
        return end if end is not None and end.stream is not None else None

    def _open(self, op: Op, side: int, timeout: float | None) -> None:
        call = Call(self.model, op, "open", side, None)
        call.timeout = timeout
        session = self.model.sessions[side]

        def judge(call: Call) -> None:
            if call.error is None:
                stream, call.value = call.value, None
                self.model.add_stream(side, op[1], stream)
            self.model.judge(call)

        self._spawn(call, lambda: session.open(timeout), judge)

    def _accept(self, op: Op, side: int, timeout: float | None) -> None:
        call = Call(self.model, op, "accept", side, None)
        call.timeout = timeout
        session, backlog = self.model.sessions[side], self.model.backlogs[side]

        def judge(call: Call) -> None:
            if call.error is None:
                stream, call.value = call.value, None
                while backlog and self.model.has_expired(side, next(iter(backlog.values()))):
                    if backlog.popitem(last=False)[0] == stream.stream_id:
                        backlog[stream.stream_id] = self.clock.now
                        backlog.move_to_end(stream.stream_id, last=False)
                        break
                first = next(iter(backlog), None)
                if stream.stream_id != first and not (session.closed or self.model.is_vague[side]):
                    raise Fault("accept", f"{call} returned stream {stream.stream_id}, and {first} is the first")
                backlog.pop(stream.stream_id, None)
                self.model.hold(side, self.model.names[stream.stream_id], stream)
            self.model.judge(call)

        self._spawn(call, lambda: session.accept(timeout), judge)

    def _ping(self, op: Op, side: int, timeout: float | None) -> None:
        call = Call(self.model, op, "ping", side, None)
        call.timeout = timeout
        session = self.model.sessions[side]
        self._spawn(call, lambda: session.ping(timeout))

    def _session_close(self, op: Op, side: int, timeout: float | None) -> None:
        call = Call(self.model, op, "session_close", side, None)
        call.timeout = timeout
        model, session = self.model, self.model.sessions[side]

        def close() -> None:
            model.is_closing[side] = model.is_refusing[side] = True
            model.is_abrupt[side] = model.is_abrupt[side] or timeout == 0
            session.close(timeout)

        self._spawn(call, close)

    def _join(self, op: Op, side: int, timeout: float | None) -> None:
        call = Call(self.model, op, "join", side, None)
        call.timeout = timeout
        session = self.model.sessions[side]
        self._spawn(call, lambda: session.join(timeout))

    def _read_call(self, op: Op, side: int, name: int, size: int) -> None:
        end = self._end(side, name)
        kind = op[0]
        if end is None or (kind == "file_read" and not end.files):
            return
        call = Call(self.model, op, kind, side, end, size)
        stream = end.stream
        file: Any = end.files[-1] if kind == "file_read" else None
        call.file = file

        def read() -> bytes | None:
            call.timeout = end.timeout
            if kind in ("recv_into", "readinto"):
                buffer = bytearray(size)
                return bytes(buffer[: getattr(stream, kind)(buffer)])
            if kind == "readall":
                return bytes(stream.read())
            data: bytes | None = file.read(size) if kind == "file_read" else getattr(stream, kind)(size)
            return data[:size] if kind == "peek" and data else data

        if kind == "readall":
            call.size = -1
        self._spawn(call, read)

    _recv = _recv_into = _read = _read1 = _readline = _readinto = _readall = _peek = _file_read = _read_call

    def _write_call(self, op: Op, side: int, name: int, size: int, shape: str) -> None:
        end = self._end(side, name)
        kind = op[0]
        if end is None or (kind == "file_write" and not end.files):
            return
        call = Call(self.model, op, kind, side, end, size)
        stream = end.stream
        file: Any = end.files[-1] if kind == "file_write" else None
        call.file = file

        def write() -> int | None:
            call.timeout = end.timeout
            call.body = content(len(end.log), size)
            end.log.append(call)
            owned = bytearray(call.body)
            data = {"bytes": call.body, "bytearray": owned, "memoryview": memoryview(owned)}[shape]
            method = file.write if kind == "file_write" else getattr(stream, kind)
            try:
                value: int | None = method(data)
                return value
            finally:
                # What was given may be changed as soon as the call has ended, however it ended.
                owned[:] = b"\xff" * size
                if shape == "bytearray":
                    owned.clear()

        self._spawn(call, write)

    _send = _sendall = _write = _file_write = _write_call

    def _flush(self, op: Op, side: int, name: int) -> None:
        end = self._end(side, name)
        if end is None:
            return
        call = Call(self.model, op, "flush", side, end)
        stream = end.stream

        def flush() -> None:
            call.timeout = end.timeout
            call.target = sum(write.least for write in end.log if write.is_done)
            stream.flush()

        self._spawn(call, flush)

    def _strike(self, op: Op, target: int, what: str) -> None:
        call = self.model.calls.get(target)
        if call is None or not call.is_pending or call.greenlet is None:
            return
        call.is_struck = True
        blow = {"kill": gevent.GreenletExit, "timeout": gevent.Timeout(), "interrupt": Interrupt}[what]
        call.greenlet.kill(blow, block=False)

    # -- calls that never wait

    def _at_once(self, call: Callable[[], object], where: str) -> None:
        if where == "hub":
            gevent.get_hub().loop.run_callback(call)
            gevent.sleep(0)
        else:
            call()

    def _shutdown(self, op: Op, side: int, name: int, how: int) -> None:
        end = self._end(side, name)
        if end is None:
            return
        try:
            end.stream.shutdown(how)
        except kinds.StreamError as error:
            if not end.is_released:
                raise Fault("error", f"{op} raised {error!r}") from None
            return
        end.is_shut_rd = end.is_shut_rd or how != socket.SHUT_WR
        end.is_shut_wr = end.is_shut_wr or how != socket.SHUT_RD

    def _close(self, op: Op, side: int, name: int, where: str) -> None:
        end = self._end(side, name)
        if end is not None:
            end.is_closed = True
            self._at_once(end.stream.close, where)

    def _reset(self, op: Op, side: int, name: int, code: int, where: str) -> None:
        end = self._end(side, name)
        if end is not None:
            if not self.model.has_ended(end) and not self.model.sessions[side].ready():
                end.reset = code
            end.is_lossy = True
            self._at_once(lambda: end.stream.reset(code), where)

    def _with(self, op: Op, side: int, name: int, is_raising: bool) -> None:
        end = self._end(side, name)
        if end is None or end.is_closed:
            return
        if is_raising:
            end.is_lossy = True
            if not self.model.has_ended(end) and not self.model.sessions[side].ready():
                end.reset = 0
        with contextlib.suppress(Interrupt), end.stream:
            end.is_closed = True
            if is_raising:
                raise Interrupt

    def _file(self, op: Op, side: int, name: int) -> None:
        end = self._end(side, name)
        if end is not None and not end.is_closed:
            end.files.append(end.stream.makefile("rwb", 0))

    def _file_close(self, op: Op, side: int, name: int) -> None:
        end = self._end(side, name)
        if end is not None and end.files:
            end.files.pop(0).close()

    def _settimeout(self, op: Op, side: int, name: int, seconds: float | None) -> None:
        end = self._end(side, name)
        if end is not None:
            end.timeout = seconds
            end.stream.settimeout(seconds)

    def _forget(self, op: Op, side: int, name: int) -> None:
        """Let go of a stream; its session holds it while it lives."""
        end = self._end(side, name)
        if end is not None and not end.files and not any(call.greenlet is not None for call in end.calls):
            end.calls.clear()
            end.stream = None
            if op[1] % 4 == 0:
                gc.collect(1)

    def _go_away(self, op: Op, side: int, announce: bool) -> None:
        self.model.is_refusing[side] = True
        self.model.sessions[side].go_away(announce)

    def _abort(self, op: Op, side: int) -> None:
        self.model.is_closing[side] = self.model.is_refusing[side] = self.model.is_abrupt[side] = True
        self.model.sessions[side].abort()

    # -- the link, and time

    def _stall(self, op: Op, lane: int) -> None:
        self.model.lanes[lane].is_stalled = True
        self.model.lanes[lane].is_drained = False

    def _release(self, op: Op, lane: int) -> None:
        self.model.lanes[lane].is_stalled = False

    def _move(self, op: Op, lane: int, size: int) -> None:
        if not self.model.lanes[lane].is_stalled:
            self.model.lanes[lane].move(size)

    def _pump(self, op: Op, size: int) -> None:
        """Move until nothing is left to move."""
        for number in itertools.count():
            step = size if number < SMALL_MOVES else LARGE_MOVE
            moved = [not lane.is_stalled and lane.move(step) for lane in self.model.lanes]
            settle()
            if not any(moved):
                self.clock.advance(TURN)
                if not any(not lane.is_stalled and lane.move(step) for lane in self.model.lanes):
                    return

    def _advance(self, op: Op, seconds: float) -> None:
        for lane in self.model.lanes:
            if lane.is_stalled or not lane.is_drained:
                self.model.was_disturbed = True
        # The link goes on meanwhile, or every ping would be lost.
        step = min(seconds, 1.0)
        for _ in range(round(seconds / step)):
            self.clock.advance(step)
            self._pump(op, LARGE_MOVE)

    def _block(self, op: Op, seconds: float) -> None:
        self.clock.block(seconds)
        for call in self.model.calls.values():
            if call.is_pending and call.kind == "session_close":
                call.began += seconds  # that time is added to its limit

    def _cut(self, op: Op, lane: int) -> None:
        self.model.was_disturbed = True
        self.model.lanes[lane].cut()

    def _break(self, op: Op) -> None:
        self.model.was_disturbed = True
        for lane, port in zip(self.model.lanes, self.model.ports, strict=True):
            port.break_off()
            lane.waiting.clear()
            lane.is_over = lane.is_told = lane.is_refused = True

    # -- the end of a run

    def finish(self) -> None:
        """Let every stream come to its end, then the sessions; nothing may be left."""
        ids = itertools.count(1_000_000)
        for lane in self.model.lanes:
            lane.is_stalled = False
        self.hurry = 0
        self.perform(("pump", next(ids), LARGE_MOVE))
        if self.case.link["end"] == "drain":
            self._drain(ids)
        closing = [("session_close", next(ids), side, 5.0) for side in self.case.link["closers"]]
        self.hurry = len(closing) if self.case.link["seed"] % 2 else 0
        for op in closing:
            self.perform(op)
        self.hurry = 0
        self.perform(("pump", next(ids), LARGE_MOVE))
        for _ in range(12):
            if all(session.ready() for session in self.model.sessions):
                break
            self.perform(("advance", next(ids), 60.0))
        self._check_the_end()

    def _drain(self, ids: Iterator[int]) -> None:
        model = self.model
        for side in (0, 1):
            while model.backlogs[side] and not model.sessions[side].closed:
                before = len(model.backlogs[side])
                self.perform(("accept", next(ids), side, 5.0))
                self.perform(("pump", next(ids), LARGE_MOVE))
                if len(model.backlogs[side]) >= before:
                    break
        for verb in ("readall", "shutdown", "close"):
            for (side, name), end in list(model.ends.items()):
                if end.stream is None or (verb == "readall" and end.is_closed):
                    continue
                while verb == "close" and end.files:
                    self._file_close((), side, name)
                if verb == "readall":
                    self._settimeout((), side, name, None)
                last = {"readall": -1, "shutdown": socket.SHUT_WR, "close": "here"}[verb]
                self.perform((verb, next(ids), side, name, last))
            self.perform(("pump", next(ids), LARGE_MOVE))
        self._check_drained()

    def _check_drained(self) -> None:
        """Every stream has been ended by both applications: nothing is counted any more."""
        model = self.model
        if not model.is_quiet or any(session.closed for session in model.sessions):
            return
        for name in {name for _, name in model.ends}:
            ends = [model.ends[side, name] for side in (0, 1)]
            if any(end.was_held and end.stream is None for end in ends) or not all(end.was_held for end in ends):
                return
        for side, session in enumerate(model.sessions):
            stats = session.stats()
            left = {name: getattr(stats, name) for name in ("streams", "backlog", "unacknowledged", "queued", "unread")}
            left["incoming"] = session._table._incoming
            left["grown"] = session._table.budget.grown
            if any(left.values()):
                raise Fault("left", f"side {side} is done with every stream, and {left}")

    def _check_the_end(self) -> None:
        model = self.model
        for side, session in enumerate(model.sessions):
            if not session.ready():
                raise Fault("end", f"side {side} does not end: {session!r}")
        for call in model.calls.values():
            if call.is_pending:
                raise Fault("stuck", f"{call} waits after the end")
        for end in model.ends.values():
            for file in end.files:
                file.close()
            if end.stream is not None:
                end.stream.close()
        for side, session in enumerate(model.sessions):
            while session._table.backlog:
                session.accept(0).close()
            table, outbox = session._table, session._outbox
            left = {
                "unread": table.budget.unread,
                "incoming": table._incoming,
                "streams": len(table.streams),
                "queued": outbox.waiting_bytes,
            }
            for part in (session, outbox):
                for name, value in vars(part).items():
                    if type(value).__name__ == "WaitList":
                        left[name] = len(value)
            if any(left.values()):
                raise Fault("left", f"side {side} has ended, and {left}")

    def close(self) -> None:
        """Let go of everything, whatever state it is in."""
        for session in self.model.sessions:
            session.abort()
        for port in self.model.ports:
            port.close()
        for call in self.model.calls.values():
            if call.greenlet is not None:
                call.greenlet.kill(block=False)
        for end in self.model.ends.values():
            end.files.clear()
        settle()
        self.clock.advance(1.0)
        settle()


@contextlib.contextmanager
def _running(case: Case) -> Iterator[Run]:
    """A run in virtual time. What fails in a greenlet or callback of the package is a fault."""
    hub = gevent.get_hub()
    with Clock(case.link["tick"]) as clock:
        run = Run(case, clock)

        def record(context: Any, kind: Any, value: Any, trace: Any) -> None:
            run.model.blame("hub", f"{context!r}: {value!r}")

        hub.handle_error = record  # type: ignore[method-assign, assignment]
        try:
            yield run
        finally:
            try:
                run.close()
            finally:
                del hub.handle_error


@dataclass
class Result:
    """What came of a case."""

    case: Case
    fault: Fault | None = None
    operations: int = 0
    outcomes: Counter[str] = field(default_factory=Counter)


def _carry_out(case: Case, source: Callable[[Run], Iterator[Op]]) -> Result:
    result = Result(case)
    with _running(case) as run:
        try:
            for op in source(run):
                run.perform(op)
            run.finish()
        except Fault as fault:
            result.fault = fault
        except Exception as error:
            # No call of the fuzzer's own may fail.
            trace = error.__traceback__
            while trace is not None and trace.tb_next is not None:
                trace = trace.tb_next
            where = f"{trace.tb_frame.f_code.co_filename}:{trace.tb_lineno}" if trace is not None else "?"
            result.fault = Fault("raised", f"{error!r} at {where}")
        result.operations, result.outcomes = run.done, run.model.outcomes
    return result


def replay(case: Case) -> Result:
    """Run a case again."""
    return _carry_out(case, lambda run: iter(case.ops))


def run(seed: int, steps: int = 80) -> Result:
    """Make up a case and run it."""
    rng = random.Random(seed)
    case = generate(rng, seed)

    def invent(run: Run) -> Iterator[Op]:
        inventor = Inventor(rng, run)
        for _ in range(rng.randint(steps // 4, steps)):
            case.ops.append(inventor.next())
            yield case.ops[-1]

    return _carry_out(case, invent)


# --- making up cases ---


def generate(rng: random.Random, seed: int) -> Case:
    """A link and two configurations, and no operations yet."""
    link = {
        "kind": rng.choice(("socket", "socket", "object")),
        "buffer": rng.choice((2048, 16384, None)),
        "cuts": rng.choice(((1 << 20,), (1 << 20,), (1, 13, 700, 5000, 70_000), (70_000, 4108))),
        "tick": rng.choice((1e-6, 1e-6, 1e-4, 5e-4)),
        "seed": seed,
        "end": rng.choice(("drain", "drain", "drain", "close")),
        "closers": rng.choice(([0, 1], [1, 0], [0], [1])),
    }
    return Case(link, (_settings(rng), _settings(rng)), [])


def _settings(rng: random.Random) -> dict[str, Any]:
    """Literal arguments of a Config; what is left out has its default."""
    choices: dict[str, tuple[Any, ...]] = {
        "accept_backlog": (1, 2, 4, 256),
        "max_incoming_streams": (1, 3, 8, 4096),
        "max_stream_window": (262144, 300_000, 1 << 20),
        "max_frame_size": (1024, 5000, 65536, 1 << 20),
        "outbox_limit": (4096, 10_000, 65536),
        "accept_timeout": (5.0, 60.0, None),
        "stream_close_timeout": (5.0, 300.0, None),
        "stream_open_timeout": (5.0, None, None),
        "keepalive_interval": (30.0, 3.0, None),
        "connection_write_timeout": (10.0, None),
        "close_timeout": (0.0, 1.0, 5.0),
        "window_auto_tune": (1 << 20, 1 << 22, True),
    }
    settings = {name: rng.choice(values) for name, values in choices.items() if rng.random() < 0.35}
    if settings.get("max_stream_window", 0) > (settings.get("window_auto_tune") or 1 << 30):
        del settings["window_auto_tune"]
    return settings


SIZES = (0, 1, 2, 10, 100, 1000, 4096, 4097, 10_000, 65536, 100_000, 262143, 262144, 262145, 400_000, 700_000)

#: What is done, and how often.
WEIGHTS = {
    "open": 8,
    "accept": 9,
    "read": 24,
    "write": 24,
    "flush": 2,
    "ping": 2,
    "shutdown": 4,
    "close": 4,
    "reset": 2,
    "with": 1,
    "file": 2,
    "file_close": 1,
    "settimeout": 3,
    "forget": 1,
    "strike": 7,
    "go_away": 0.4,
    "session_close": 0.5,
    "abort": 0.2,
    "join": 0.3,
    "stall": 2,
    "release": 3,
    "move": 12,
    "pump": 8,
    "advance": 2,
    "block": 0.2,
    "cut": 0.15,
    "break": 0.15,
    "hurry": 4,
    "turn": 2,
}


class Inventor:
    """Chooses the next operation by what there is."""

    def __init__(self, rng: random.Random, run: Run) -> None:
        self.rng = rng
        self.run = run
        self.ids = itertools.count(1)
        # Each case does some things more often than others.
        self.names = list(WEIGHTS)
        self.weights = [weight * rng.choice((0.3, 1.0, 1.0, 3.0)) for weight in WEIGHTS.values()]
        self.left = 4 << 20

    def next(self) -> Op:
        while True:
            name = self.rng.choices(self.names, self.weights)[0]
            arguments = getattr(self, f"_{name}")()
            if arguments is not None:
                kind = arguments[0] if name in ("read", "write") else name
                rest = arguments[1:] if name in ("read", "write") else arguments
                return (kind, next(self.ids), *rest)

    def _side(self) -> int:
        return self.rng.randrange(2)

    def _on_end(self, *rest: Any) -> tuple[Any, ...] | None:
        ends = [key for key, end in self.run.model.ends.items() if end.stream is not None]
        # The latest are the likeliest: most others have ended.
        return (*self.rng.choice(ends[-8:]), *rest) if ends else None

    def _limit(self) -> float | None:
        return self.rng.choice((None, None, 0.0, 1.0, 5.0))

    def _open(self) -> tuple[Any, ...] | None:
        return (self._side(), self._limit())

    _accept = _open
    _join = _open

    def _ping(self) -> tuple[Any, ...] | None:
        return (self._side(), self.rng.choice((1.0, 10.0, None)))

    def _read(self) -> tuple[Any, ...] | None:
        kind = self.rng.choice((*READS, "recv", "recv", "read"))
        size = self.rng.choice(SIZES)
        if kind == "readall":
            size = -1
        elif kind == "peek":
            size = max(size, 1)
        elif kind in ("read1", "readline") and self.rng.random() < 0.2:
            size = -1
        end = self._on_end(size)
        return end and (kind, *end)

    def _write(self) -> tuple[Any, ...] | None:
        size = min(self.rng.choice(SIZES), self.left)
        self.left -= size
        end = self._on_end(size, self.rng.choice(("bytes", "bytearray", "memoryview")))
        return end and (self.rng.choice((*WRITES, "sendall", "sendall")), *end)

    def _flush(self) -> tuple[Any, ...] | None:
        return self._on_end()

    _file = _file_close = _forget = _flush

    def _shutdown(self) -> tuple[Any, ...] | None:
        return self._on_end(int(self.rng.choice((socket.SHUT_WR, socket.SHUT_WR, socket.SHUT_RD, socket.SHUT_RDWR))))

    def _close(self) -> tuple[Any, ...] | None:
        return self._on_end(self.rng.choice(("here", "hub")))

    def _reset(self) -> tuple[Any, ...] | None:
        return self._on_end(self.rng.choice((0, 1, 7, 0xFFFF_FFFF)), self.rng.choice(("here", "hub")))

    def _with(self) -> tuple[Any, ...] | None:
        return self._on_end(self.rng.random() < 0.5)

    def _settimeout(self) -> tuple[Any, ...] | None:
        return self._on_end(self._limit())

    def _strike(self) -> tuple[Any, ...] | None:
        pending = [
            number for number, call in self.run.model.calls.items() if call.is_pending and call.kind != "session_close"
        ]
        return (self.rng.choice(pending), self.rng.choice(("kill", "timeout", "interrupt"))) if pending else None

    def _go_away(self) -> tuple[Any, ...] | None:
        return (self._side(), self.rng.random() < 0.5)

    def _session_close(self) -> tuple[Any, ...] | None:
        return (self._side(), self.rng.choice((0.0, 1.0, 5.0, None)))

    def _abort(self) -> tuple[Any, ...] | None:
        return (self._side(),)

    _stall = _release = _cut = _abort

    def _move(self) -> tuple[Any, ...] | None:
        return (self._side(), self.rng.choice((1, 5, 12, 13, 100, 4096, 65536, 1 << 20)))

    def _pump(self) -> tuple[Any, ...] | None:
        return (self.rng.choice((1, 11, 1000, 5000, 65536, 1 << 20)),)

    def _advance(self) -> tuple[Any, ...] | None:
        return (self.rng.choice((0.1, 1.0, 1.0, 6.0, 6.0, 70.0)),)

    def _block(self) -> tuple[Any, ...] | None:
        return (12.0,)

    def _break(self) -> tuple[Any, ...] | None:
        return ()

    _turn = _break

    def _hurry(self) -> tuple[Any, ...] | None:
        return (self.rng.randint(1, 5),)


# --- findings ---


def shrink(case: Case, kind: str, *, seconds: float = 60.0) -> Case:
    """Leave out operations as long as the same check still fails: halves first, then single ones."""
    until = time.monotonic() + seconds
    ops, chunk = list(case.ops), max(1, len(case.ops) // 2)
    while True:
        start, has_shrunk = 0, False
        while start < len(ops) and time.monotonic() < until:
            shorter = ops[:start] + ops[start + chunk :]
            fault = replay(Case(case.link, case.configs, shorter)).fault
            if fault is not None and fault.kind == kind:
                ops, has_shrunk = shorter, True
            else:
                start += chunk
        if time.monotonic() >= until or (chunk == 1 and not has_shrunk):
            return _simplify(Case(case.link, case.configs, ops), kind)
        chunk = max(1, chunk // 2)


def _simplify(case: Case, kind: str) -> Case:
    """Leave out settings, too."""
    for side in (0, 1):
        for name in list(case.configs[side]):
            settings = [dict(each) for each in case.configs]
            del settings[side][name]
            simpler = Case(case.link, (settings[0], settings[1]), case.ops)
            fault = replay(simpler).fault
            if fault is not None and fault.kind == kind:
                case = simpler
    plain = {"kind": "socket", "cuts": (1 << 20,), "tick": 1e-6, "buffer": None, "end": "close", "closers": [0]}
    for name, value in plain.items():
        simpler = Case({**case.link, name: value}, case.configs, case.ops)
        fault = replay(simpler).fault
        if fault is not None and fault.kind == kind:
            case = simpler
    return case


def find(seeds: Iterator[int], *, steps: int = 80, seconds: float | None = None) -> Result | None:
    """The first of these seeds whose case fails; None where none does, within the time."""
    until = None if seconds is None else time.monotonic() + seconds
    for seed in seeds:
        if until is not None and time.monotonic() > until:
            return None
        result = run(seed, steps)
        if result.fault is not None:
            return result
    return None


# --- the command ---


class Tally:
    """What one process has done so far."""

    def __init__(self) -> None:
        self.began = self.told = time.monotonic()
        self.sequences = self.operations = 0
        self.outcomes: Counter[str] = Counter()

    def add(self, result: Result) -> None:
        self.sequences += 1
        self.operations += result.operations
        self.outcomes += result.outcomes

    def tell(self, *, every: float = 0.0) -> None:
        now = time.monotonic()
        if now - self.told >= every:
            self.told = now
            rate = self.operations / max(now - self.began, 1e-9)
            print(
                f"{now - self.began:7.1f} s  {self.sequences} sequences  {self.operations} operations  {rate:.0f}/s  "
                f"{len(self.outcomes)} distinct outcomes",
                flush=True,
            )


def _report(result: Result, seed: int, steps: int) -> None:
    assert result.fault is not None
    print(f"\nFAULT at seed {seed}: {result.fault}", flush=True)
    small = shrink(result.case, result.fault.kind)
    fault = replay(small).fault
    print(f"shrunk from {len(result.case.ops)} to {len(small.ops)} operations: {fault}")
    print("case = " + pprint.pformat(small, width=116, sort_dicts=False))
    print("replay the shrunk case:  replay(case).fault   (tests/fuzz/fuzz_calls.py; PYTHONPATH=.:tests)")
    print(
        f"replay the whole one:    python -m tests.fuzz.fuzz_calls --seed {seed} --steps {steps} --minutes 0", flush=True
    )


def _watch(seed: int) -> None:
    """A case that spins for ever ends the process, and says where."""

    def on_alarm(number: int, frame: Any) -> None:
        print(f"\nFAULT at seed {seed}: does not come to its end", flush=True)
        faulthandler.dump_traceback()
        os._exit(3)

    signal.signal(signal.SIGALRM, on_alarm)
    signal.alarm(60)


def fuzz(first: int, *, minutes: float, steps: int, stride: int, is_patient: bool) -> int:
    """Run cases from this seed on; return how many failed."""
    tally, failed = Tally(), 0
    for seed in itertools.count(first, stride):
        _watch(seed)
        result = run(seed, steps)
        tally.add(result)
        if result.fault is not None:
            signal.alarm(0)
            failed += 1
            _report(result, seed, steps)
            if not is_patient:
                break
        tally.tell(every=10.0)
        if time.monotonic() - tally.began >= minutes * 60:
            break
    signal.alarm(0)
    tally.tell()
    for name, number in sorted(tally.outcomes.items()):
        print(f"{number:10} {name}")
    return failed


def main() -> int:
    parser = argparse.ArgumentParser(description="Random calls on a pair of sessions, compared with a model.")
    parser.add_argument("--seed", type=int, default=None, help="of the first sequence (fresh where left out)")
    parser.add_argument("--minutes", type=float, default=1.0, help="how long; 0 for one sequence")
    parser.add_argument("--steps", type=int, default=80, help="operations of a sequence, at most")
    parser.add_argument("--jobs", type=int, default=1, help="processes, each with seeds of its own")
    parser.add_argument("--keep-going", action="store_true", help="go on after a fault")
    parser.add_argument("--stride", type=int, default=1, help=argparse.SUPPRESS)
    options = parser.parse_args()
    seed = options.seed if options.seed is not None else int.from_bytes(os.urandom(4), "big")
    if options.jobs > 1:
        return _run_jobs(options, seed)
    print(f"first seed {seed}", flush=True)
    gc.collect()
    gc.freeze()
    failed = fuzz(
        seed, minutes=options.minutes, steps=options.steps, stride=options.stride, is_patient=options.keep_going
    )
    return min(failed, 1)


def _run_jobs(options: argparse.Namespace, seed: int) -> int:
    common = ["--minutes", str(options.minutes), "--steps", str(options.steps), "--stride", str(options.jobs)]
    common += ["--keep-going"] if options.keep_going else []
    command = [sys.executable, "-m", "tests.fuzz.fuzz_calls", *common]
    root = Path(__file__).resolve().parents[2]
    jobs = [subprocess.Popen([*command, "--seed", str(seed + number)], cwd=root) for number in range(options.jobs)]
    try:
        return max(job.wait() for job in jobs)
    finally:
        for job in jobs:
            job.kill()
            job.wait()


if __name__ == "__main__":
    sys.exit(main())
