"""``geyamux forward``: a tunnel, from arguments to the last stream.

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
from ..server import StreamServer
from ..session import Session
from ..stream import Stream
from ..tunnel import Forwarder, Reconnector, RoundRobin, Splice, why_unusable
from ..waiting import Deadline
from . import ends, logs, trunk, values
from .address import Address, address
from .control import Control
from .errors import CommandError, UsageError
from .logs import event
from .signals import on_signals
from .snapshot import snapshot
from .stdio import take_standard_io, wait_for_children

SUMMARY = "forward connections through a tunnel"
DESCRIPTION = """\
Forward connections over one other, the trunk, which either end may dial. One end accepts what comes to --from and
opens a stream for it, the other connects each stream to --to. A trunk that is dialled is dialled again whenever it is
lost. Several may dial one listener: streams go to them in turn. SIGTERM lets streams finish (--drain), a second one
does not."""
EXAMPLES = """\
  expose a web server behind NAT, on port 8080 of a public host:
    public$ geyamux forward --listen :7000 --from :8080
    behind$ geyamux forward --dial public.example:7000 --to 127.0.0.1:8000
  reach a database that only the other host can, as on port 5432 here:
    there$  geyamux forward --listen :7000 --to 127.0.0.1:5432 --cert there.pem --ca ca.pem
    here$   geyamux forward --dial there.example:7000 --from 5432 --cert here.pem --ca ca.pem
  the same over ssh, with nothing that listens there:
    here$   geyamux forward --from 5432 \\
              --dial 'exec:ssh there.example geyamux forward --listen stdio: --to 5432'"""

_FOREVER = "never gives up"

#: A trunk that takes no bytes is given up after so many seconds, or after the time of two keepalives.
_WRITE_TIMEOUT = 10.0

#: A connection is made within so many seconds, or not.
_PATIENCE = 10.0

#: What is left is closed within so many seconds after the drain.
_LAST = 2.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """All of ``geyamux forward``."""
    group = parser.add_argument_group("what is forwarded")
    side = group.add_mutually_exclusive_group(required=True)
    side.add_argument("--dial", metavar="ADDR", type=address, help="connect the trunk to ADDR, and again when it is lost")
    side.add_argument("--listen", metavar="ADDR", type=address, help="wait for trunks at ADDR")
    group.add_argument("--to", metavar="ADDR", type=address, help="connect each stream of the peer to ADDR")
    group.add_argument(
        "--from",
        metavar="ADDR",
        type=address,
        dest="origin",
        help="listen at ADDR, and open a stream for each connection",
    )
    trunk.add_tls_arguments(parser)
    group = parser.add_argument_group("limits and times")
    group.add_argument(
        "--keepalive", metavar="SECONDS", type=values.seconds, default=30.0,
        help="of silence before a ping, and again for its answer (default: 30, and 10; 0: no pings)",
    )  # fmt: skip
    group.add_argument(
        "--window", metavar="SIZE", type=values.window, default="auto",
        help="receive window of a stream, as in 4M (default: auto, from 256K to 16M as the link needs)",
    )  # fmt: skip
    group.add_argument(
        "--max-streams",
        metavar="N",
        type=values.positive,
        default=4096,
        help="at once, each way and trunk (default: 4096)",
    )
    group.add_argument(
        "--retry-max-interval", metavar="SECONDS", type=values.interval, default=30.0,
        help="longest wait before dialling again (default: 30)",
    )  # fmt: skip
    group.add_argument("--max-retries", metavar="N", type=values.count, help=f"in a row (default: {_FOREVER})")
    group.add_argument(
        "--drain", metavar="SECONDS", type=values.seconds, default=30.0,
        help="for streams to finish after SIGTERM (default: 30)",
    )  # fmt: skip
    group.add_argument(
        "--quiet-go-away", action="store_true",
        help="tell the peer of a drain when its last stream has ended: some drop all streams when they are told",
    )  # fmt: skip
    group = parser.add_argument_group("watching it")
    group.add_argument("--control", metavar="PATH", type=values.file, help="Unix socket for `geyamux top`")
    group.add_argument("-v", "--verbose", action="count", default=0, help="log each stream (-vv: each frame)")
    group.add_argument("--json", action="store_true", help="log lines as JSON objects")


def run(options: argparse.Namespace) -> int:
    """Forward until a signal comes, the retries are used up, or the one stream of ``stdio:`` has ended."""
    _check(options)
    logs.set_up(options.verbose, options.json)
    return Forward(options).run()


def _check(options: argparse.Namespace) -> None:
    """What the parser can't see: whether the addresses make sense together."""
    if options.to is None and options.origin is None:
        raise UsageError("one of the arguments --to --from is required")
    named = {"--dial": options.dial, "--listen": options.listen, "--to": options.to, "--from": options.origin}
    given = {name: where for name, where in named.items() if where is not None}
    for name, where in given.items():
        if where.kind == "exec" and name != "--dial":
            raise UsageError(f"{name}: exec: is for --dial")
        if where.kind == "tcp" and not where.port and name in ("--dial", "--to"):
            raise UsageError(f"{name}: port 0 is for who listens, and stands for any that is free")
    if sum(where.kind == "stdio" for where in given.values()) > 1:
        raise UsageError("stdio: can be one end only")


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
            receive_budget=max(initial, Config.receive_budget),
            window_auto_tune=growth,
            max_incoming_streams=options.max_streams if options.to else 0,
            max_outgoing_streams=options.max_streams,
        )
        #: The sessions that are there, those that finish their last streams included.
        self.sessions: set[Session] = set()
        self.round = RoundRobin()
        #: A session has come.
        self.arrival = Event()
        self.forwarders: list[Forwarder] = []
        #: Once they are one end of a stream.
        self.standard_io: Any = None
        if options.to:
            is_stdio = options.to.kind == "stdio"
            self.to = self._forwarder(self._take_standard_io if is_stdio else lambda: ends.dial(options.to, _PATIENCE))
        if options.origin:
            self.origin = self._forwarder(self.round.open)
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
        #: The exit status, or what went wrong.
        self.outcome: AsyncResult[int] = AsyncResult()

    def _forwarder(self, connect: Callable[[], Any]) -> Forwarder:
        forwarder = Forwarder(connect, on_open=self._on_open, on_end=self._on_end, on_failure=self._on_failure)
        self.forwarders.append(forwarder)
        return forwarder

    def run(self) -> int:
        """Until the end; return the exit status. Raises CommandError."""
        _raise_limit_of_descriptors()
        with on_signals(dict.fromkeys((signal.SIGTERM, signal.SIGINT), self._on_signal)):
            return self._run()

    def _run(self) -> int:
        control = Control(self.options.control, self.snapshot) if self.options.control else None
        try:
            if control is not None:
                control.start()
            self._start()
            status: int = self.outcome.get()  # type: ignore[assignment]  # never None
            return status
        finally:
            for server in self.servers:
                ends.close_listener(server)
            self._cut()
            if control is not None:
                control.stop()
            wait_for_children()

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
            raise CommandError(f"gave up on {dial} after {retries} retries: {trunk.why(error)}") from None

    def _on_retry(self, error: OSError, seconds: float, attempt: int) -> None:
        reason = trunk.why(error)
        self.retry = (time.monotonic() + seconds, reason)
        text = f"no trunk to {self.options.dial}: {reason}; trying again in {seconds:.1f} s"
        event("retrying", text, level=logging.WARNING, seconds=round(seconds, 3), reason=reason, attempt=attempt)

    def _on_trunk(self, conn: Any, address: Any) -> None:
        """A connection has come that should be a trunk."""
        try:
            session = trunk.accept(conn, self.trust, self.config)
        except OSError as error:
            text = f"a trunk from {ends.name_of(address)} was refused: {trunk.why(error)}"
            event("refused", text, level=logging.WARNING, peer=ends.name_of(address), reason=trunk.why(error))
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
            text = f"{end.session.name}: stream {end.stream_id} was refused, {self.options.to} can't be reached: {reason}"
            event(
                "stream_failed",
                text,
                level=logging.WARNING,
                session=end.session.name,
                stream=end.stream_id,
                reason=reason,
            )
        else:
            text = f"a connection to {self.options.origin} was refused: {reason}"
            event("stream_failed", text, level=logging.WARNING, session=None, stream=None, reason=reason)

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
        streams = sum(len(forwarder.splices) for forwarder in self.forwarders)
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
        cut = sum(len(forwarder.splices) for forwarder in self.forwarders)
        for forwarder in self.forwarders:
            forwarder.stop(0)
        gevent.joinall([gevent.spawn(session.close, _LAST) for session in list(self.sessions)])
        event("stopped", f"ended; {cut} streams were cut" if cut else "ended", streams=cut)
        self.outcome.set(status)

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
