"""A tunnel, from its arguments to the last stream.

The trunk is dialled (and dialled again whenever it is lost) or listened for; streams of the peer are connected to
``--to``, connections to ``--from`` get streams. This module puts the parts of :mod:`geyamux.tunnel` together and tells
the log what they do.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import logging
import resource
import signal
import time
from collections.abc import Callable
from typing import Any

import gevent
import gevent.server
from gevent.event import AsyncResult, Event

from ..config import Config
from ..errors import SessionError, StreamReset
from ..server import StreamServer
from ..session import Session
from ..stream import Stream
from ..tunnel import Forwarder, Reconnector, RoundRobin, Splice, why_unusable
from ..waiting import Deadline
from . import ends, logs, trunk
from .address import Address
from .control import Control
from .errors import CommandError
from .logs import event
from .signals import on_signals
from .snapshot import snapshot
from .stdio import take_standard_io, wait_for_children

#: A trunk that takes no bytes is given up after so many seconds, or after the time of two keepalives.
_WRITE_TIMEOUT = 10.0

#: A connection is made within so many seconds, or not.
_PATIENCE = 10.0

#: Where all trunks are full, a connection waits for so many seconds.
_IN_LINE = 60.0

#: What is left is closed within so many seconds after the drain.
_LAST = 2.0


class Forward:
    """One run of the command."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.trust = trunk.Trust(options, is_server=options.listen is not None, address=options.listen or options.dial)
        initial, growth = options.window
        self.config = Config(
            keepalive_interval=options.keepalive or None,
            # A trunk that dies while it is busy is noticed by what it does not take, and as soon.
            keepalive_timeout=min(options.keepalive or Config.keepalive_timeout, Config.keepalive_timeout),
            connection_write_timeout=min(2 * options.keepalive or _WRITE_TIMEOUT, _WRITE_TIMEOUT),
            max_stream_window=initial,
            # Those who read slowly must not cost one of them its download.
            receive_budget=max(initial * options.max_streams, Config.receive_budget),
            window_auto_tune=growth,
            max_incoming_streams=options.max_streams if options.to else 0,
            max_outgoing_streams=options.max_streams,
        )
        #: The sessions that are there, those that finish their last streams included.
        self.sessions: set[Session] = set()
        self.round = RoundRobin()
        #: What strangers can bring about.
        self.repeated = logs.Repeated()
        #: A session has come.
        self.arrival = Event()
        self.forwarders: list[Forwarder] = []
        #: Once they are one end of a stream.
        self.standard_io: Any = None
        if options.to:
            is_stdio = options.to.kind == "stdio"
            self.to = self._forwarder(self._take_standard_io if is_stdio else lambda: ends.dial(options.to, _PATIENCE))
        if options.origin:
            self.origin = self._forwarder(self._open_stream)
        self.reconnector: Reconnector | None = None
        #: What runs that one: it may have a child to end.
        self.dialling: list[gevent.Greenlet[..., None]] = []
        #: What accepts connections, of the trunk and of ``--from``.
        self.servers: list[gevent.server.StreamServer] = []
        #: Where they listen, by "trunk" and "from".
        self.names: dict[str, str] = {}
        self.state = "open"
        #: When it dials again, on the monotonic clock, and why it has to.
        self.retry: tuple[float, str] | None = None
        #: Streams that did not finish within the drain.
        self.cut = 0
        #: The exit status, or what went wrong.
        self.outcome: AsyncResult[int] = AsyncResult()

    def _forwarder(self, connect: Callable[[], Any]) -> Forwarder:
        forwarder = Forwarder(connect, on_open=self._on_open, on_end=self._on_end, on_failure=self._on_failure)
        self.forwarders.append(forwarder)
        return forwarder

    def run(self) -> int:
        """Until the end; return the exit status. Raises CommandError."""
        _raise_limit_of_descriptors()
        numbers = [signal.SIGTERM, signal.SIGINT]
        if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # as nohup sets it
            numbers.append(signal.SIGHUP)
        with on_signals(dict.fromkeys(numbers, self._on_signal)):
            return self._run()

    def _run(self) -> int:
        control = Control(self.options.control, self.snapshot) if self.options.control else None
        try:
            if control is not None:
                control.start()
            self._start()
            status: int = self.outcome.get()  # type: ignore[assignment]  # never None
            self._note_cut()
        finally:
            for server in self.servers:
                ends.close_listener(server)
            self._cut()
            if control is not None:
                control.stop()
            wait_for_children()
        event("stopped", f"ended; {self.cut} streams were cut" if self.cut else "ended", streams=self.cut)
        return status

    def _cut(self) -> None:
        """Let go of what is left. A connection that the system closes with the process would look whole."""
        if self.reconnector is not None:
            self.reconnector.stop()
        gevent.joinall(self.dialling, _LAST)
        for forwarder in self.forwarders:
            forwarder.stop(0)
        for session in list(self.sessions):
            session.abort()
        gevent.joinall([gevent.spawn(forwarder.join, _LAST) for forwarder in self.forwarders])

    def _start(self) -> None:
        options = self.options
        if options.origin:
            if options.origin.kind == "stdio":
                self._spawn(self._forward_standard_io)
            else:
                self._listen(options.origin, "from", lambda conn, _: self.origin.handle(conn))
        if options.listen and options.listen.kind != "stdio":
            self._listen(options.listen, "trunk", self._on_trunk)
        elif options.listen:
            self._spawn(
                self._use_standard_io, lambda: trunk.accept(ends.dial(options.listen, 0.0), self.trust, self.config)
            )
        elif options.dial.kind == "stdio":
            self._spawn(self._use_standard_io, lambda: trunk.connect(options.dial, self.trust, self.config))
        else:
            self.dialling.append(self._spawn(self._reconnect))

    def _spawn(self, function: Callable[..., object], *args: Any) -> gevent.Greenlet[..., None]:
        """Run what the command can't do without: it ends with whatever goes wrong there."""

        def attempt() -> None:
            try:
                function(*args)
            except Exception as error:
                self.outcome.set_exception(error)

        return gevent.spawn(attempt)

    def _listen(self, where: Address, what: str, handle: Callable[[Any, Any], object]) -> None:
        server = gevent.server.StreamServer(ends.listen(where), handle)
        server.start()
        self.servers.append(server)
        if what == "trunk" and ends.is_open(server.socket) and not self.trust.is_mutual:
            self._warn_of_strangers()
        name = ends.name_of(server.socket.getsockname())
        purpose = "trunks" if what == "trunk" else "connections"
        self.names[what] = name
        event("listening", f"listening for {purpose} at {name}", what=what, address=name)

    def _warn_of_strangers(self) -> None:
        options = self.options
        may = "offer its own service to your visitors" if options.origin else f"use {options.to}"
        event(
            "warning",
            f"whoever can reach {options.listen} may {may}: give --cert and --ca on both ends to know who it is",
            level=logging.WARNING,
        )

    # -- trunks

    def _reconnect(self) -> None:
        dial, retries = self.options.dial, self.options.max_retries
        event("dialling", f"dialling {dial}", to=logs.streams, address=str(dial))
        longest = self.options.retry_max_interval
        self.reconnector = Reconnector(
            lambda: trunk.meet(dial, self.trust, self.config),
            self._serve,
            min_interval=min(0.5, longest),
            max_interval=longest,
            max_retries=retries,
            on_retry=self._on_retry,
        )
        try:
            self.reconnector.run()
        except OSError as error:
            times = "1 retry" if retries == 1 else f"{retries} retries"
            raise CommandError(f"gave up on {dial} after {times}: {trunk.why(error)}") from None

    def _on_retry(self, error: OSError, seconds: float, attempt: int) -> None:
        reason = trunk.why(error)
        self.retry = (time.monotonic() + seconds, reason)
        text = f"no trunk to {self.options.dial}: {reason}; trying again in {seconds:.1f} s"
        event("retrying", text, level=logging.WARNING, seconds=round(seconds, 3), reason=reason, attempt=attempt)

    def _on_trunk(self, conn: Any, address: Any) -> None:
        """A connection has come that should be a trunk."""
        try:
            session = trunk.accept(conn, self.trust, self.config)
            if self.options.origin:
                # Who only connects must not get the streams of visitors.
                trunk.await_answer(session)
        except OSError as error:
            peer, reason = ends.name_of(address), trunk.why(error)
            self.repeated.warn("refused", f"a trunk from {peer} was refused: {reason}", reason, peer=peer)
            return
        self._serve(session)

    def _use_standard_io(self, make: Callable[[], Session]) -> None:
        """The one trunk there is: the command ends with it."""
        try:
            session = make()
        except OSError as error:
            raise CommandError(f"stdio: {trunk.why(error)}") from None
        self._serve(session)
        self._stop(0 if session.exception is None else 1)

    def _serve(self, session: Session) -> None:
        """Use a session until it ends."""
        peer = str(self.options.dial) if self.options.dial else ends.name_of(session.getpeername())
        self.sessions.add(session)
        self.retry = None
        event("connected", f"connected with {peer}", peer=peer, session=session.name)
        try:
            if self.state == "draining":
                return
            if self.options.origin:
                self.round.add(session)
                self.arrival.set()
            if self.options.to:
                server = StreamServer(session, self.to.handle, announce=not self.options.quiet_go_away)
                server.serve_forever()
            session.join()
        finally:
            session.close()
            self.sessions.discard(session)
            self._on_disconnect(session, peer)

    def _on_disconnect(self, session: Session, peer: str) -> None:
        error = why_unusable(session)
        reason = "it was closed" if error is None else trunk.why(error)
        text = f"the trunk with {peer} has ended: {reason}"
        event("disconnected", text, peer=peer, session=session.name, reason=reason)

    # -- streams

    def _take_standard_io(self) -> Any:
        """Standard input and output are for one stream, and the command ends with it."""
        if self.standard_io is not None:
            raise ConnectionRefusedError(errno.ECONNREFUSED, "standard input and output are in use")
        self.standard_io = take_standard_io()
        return self.standard_io

    def _forward_standard_io(self) -> None:
        while not self.round.sessions:
            self.arrival.wait()
            self.arrival.clear()
        try:
            standard_io = self._take_standard_io()
        except OSError as error:
            raise CommandError(f"stdio: {trunk.why(error)}") from None
        self.origin.handle(standard_io)

    def _on_open(self, splice: Splice) -> None:
        if not logs.streams.isEnabledFor(logging.INFO):
            return
        stream, other = _sides(splice)
        self._log_stream("stream_opened", f"opened for {_peer_of(other)}", stream, peer=_peer_of(other))

    def _on_end(self, splice: Splice) -> None:
        stream, other = _sides(splice)
        facts = {"sent": splice.sent, "received": splice.received, "seconds": round(time.monotonic() - splice.began, 3)}
        if splice.a is stream:
            facts["sent"], facts["received"] = splice.received, splice.sent
        if splice.error is None:
            self._log_stream(
                "stream_closed", "closed; {sent} bytes sent, {received} received".format(**facts), stream, **facts
            )
        elif splice.b is stream and _is_refused(splice):
            self._on_refused(stream)
        else:
            reason = trunk.why(splice.error)
            self._log_stream("stream_failed", f"broken: {reason}", stream, reason=reason, **facts)
        if other is self.standard_io:
            self._stop(0 if splice.error is None else 1)

    def _log_stream(self, name: str, text: str, stream: Stream, **facts: Any) -> None:
        text = f"{stream.session.name}: stream {stream.stream_id} {text}"
        event(name, text, to=logs.streams, session=stream.session.name, stream=stream.stream_id, **facts)

    def _on_failure(self, end: Any, error: OSError) -> None:
        reason = trunk.why(error)
        if isinstance(end, Stream):
            name, number = end.session.name, end.stream_id
            text = f"{name}: stream {number} was refused, {self.options.to} can't be reached: {reason}"
            self.repeated.warn("stream_failed", text, reason, session=name, stream=number)
        else:
            reason = "there is no trunk" if isinstance(error, SessionError) else reason
            text = f"a connection to {self.options.origin} was refused: {reason}"
            self.repeated.warn("stream_failed", text, reason, session=None, stream=None)

    def _on_refused(self, stream: Stream) -> None:
        """By the peer, before it has said anything: others may do better."""
        self.round.doubt(stream.session)
        name, number = stream.session.name, stream.stream_id
        reason = "the other end refused it; does its service run, has it --to, and room (--max-streams)?"
        self.repeated.warn("stream_failed", f"{name}: stream {number}: {reason}", reason, session=name, stream=number)

    def _open_stream(self) -> Stream:
        with contextlib.suppress(TimeoutError):
            return self.round.open(timeout=0)
        reason = f"connections wait: each trunk has its {self.options.max_streams} streams (--max-streams)"
        self.repeated.warn("warning", reason, reason)
        return self.round.open(_IN_LINE)

    # -- the end

    def _on_signal(self) -> None:
        if self.state == "draining":
            self.outcome.set(1)
        else:
            self._stop(0)

    def _stop(self, status: int) -> None:
        if self.state != "draining":
            self.state = "draining"
            gevent.spawn(self._drain, status)

    def _drain(self, status: int) -> None:
        """No new streams; those that are there may finish; then end with that status."""
        deadline = Deadline(self.options.drain)
        if self.reconnector is not None:
            self.reconnector.stop()
        for server in self.servers:
            ends.close_listener(server)
        streams = self._count_streams()
        event(
            "draining",
            f"ending; {streams} streams may finish within {self.options.drain:g} s",
            streams=streams,
            seconds=self.options.drain,
        )
        for session in self.sessions:
            session.go_away(announce=not self.options.quiet_go_away)
        for forwarder in self.forwarders:
            forwarder.join(deadline.left())
        self._note_cut()
        for forwarder in self.forwarders:
            forwarder.stop(0)
        gevent.joinall([gevent.spawn(session.close, _LAST) for session in list(self.sessions)])
        self.outcome.set(status)

    def _note_cut(self) -> None:
        """What is there now will not finish."""
        self.cut = max(self.cut, self._count_streams())

    def _count_streams(self) -> int:
        return sum(len(forwarder.splices) for forwarder in self.forwarders)

    def snapshot(self) -> dict[str, Any]:
        """What `geyamux top` shows."""
        state, retry = self.state, None
        if self.retry is not None:
            state, retry = "retrying" if state == "open" else state, max(0.0, self.retry[0] - time.monotonic())
        options = self.options
        return snapshot(
            self.sessions,
            [splice for forwarder in self.forwarders for splice in forwarder.splices],
            **{
                "trunk": f"dial {options.dial}" if options.dial else f"listen {self.names.get('trunk', options.listen)}",
                "to": options.to and str(options.to),
                "from": options.origin and self.names.get("from", str(options.origin)),
                "state": state,
                "retry": retry,
                "reason": self.retry and self.retry[1],
            },
        )


def _sides(splice: Splice) -> tuple[Stream, Any]:
    """The stream, and what it is joined with."""
    return (splice.a, splice.b) if isinstance(splice.a, Stream) else (splice.b, splice.a)


def _is_refused(splice: Splice) -> bool:
    """The peer has reset the stream that we opened, before it has said anything."""
    return isinstance(splice.error, StreamReset) and splice.error.remote and not splice.received


def _peer_of(end: Any) -> str:
    try:
        return ends.name_of(end.getpeername())
    except (AttributeError, OSError):
        return "a connection without a name"


def _raise_limit_of_descriptors() -> None:
    """Each stream is a connection; the usual soft limit of 1,024 is for programs that call `select`."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
