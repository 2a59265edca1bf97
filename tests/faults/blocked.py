"""A process whose hub is blocked for long while its sessions are at all kinds of work; it reports what became of them.

`python blocked.py SECONDS HOST PORT` connects its sessions to a peer process, sets up the situations, computes for so
long without ever switching, and prints one line of JSON: what went wrong in each situation, and the log lines.
"""

from __future__ import annotations

import contextlib
import json
import logging
import sys
import time
from collections.abc import Callable
from typing import Any

import gevent
from gevent import socket as gsocket

from faults.relay import Relay
from geyamux import Client, Config, Server, Session, Stream
from support.rawpeer import settle
from support.transports import memory_pair

SHORT = Config(
    keepalive_interval=1.0,
    keepalive_timeout=1.5,
    connection_write_timeout=1.5,
    accept_timeout=3.0,
    stream_close_timeout=3.0,
    stream_open_timeout=3.0,
)
"""Every limit is shorter than the block, and fair to a peer that answers."""
MIB = 1 << 20


class Situation:
    """One session to the peer, what it does during the block, and what is true of it afterwards."""

    def __init__(self, name: str, session: Session, check: Callable[[], Any]) -> None:
        self.name = name
        self.session = session
        #: Raises AssertionError with what is wrong.
        self.check = check


def _idle(session: Session) -> Callable[[], Any]:
    session.ping(5)
    return lambda: session.ping(5)


def _waiting_for_a_pong(session: Session) -> Callable[[], Any]:
    pinging = gevent.spawn(session.ping, None)
    gevent.idle()
    return lambda: pinging.get(timeout=5)


def _echo(stream: Stream, payload: bytes) -> Callable[[], Any]:
    """Send it all and read it back: half of it may be anywhere when the hub is blocked."""
    stream.sendall(b"E")
    writing = gevent.spawn(stream.sendall, payload)
    reading = gevent.spawn(stream.read, len(payload))
    gevent.sleep(0)

    def check() -> None:
        writing.get(timeout=20)
        assert reading.get(timeout=20) == payload, "the bytes came back changed"

    return check


def _sending(session: Session) -> Callable[[], Any]:
    return _echo(session.open(), bytes(range(256)) * (8 * MIB // 256))


def _stalled_from_before(session: Session) -> Callable[[], Any]:
    """The connection takes nothing when the block begins: its time had begun to run."""
    stream = session.open()
    stream.sendall(b"E")
    writing = gevent.spawn(stream.sendall, bytes(4 * MIB))
    gevent.sleep(0.2)
    assert not writing.ready()
    reading = gevent.spawn(stream.read, 4 * MIB)
    return lambda: (writing.get(timeout=20), reading.get(timeout=20))


def _opening(session: Session) -> Callable[[], Any]:
    """Opened in the turn before the block, the answer comes in it."""
    stream = session.open()
    gevent.idle()

    def check() -> None:
        assert stream.wait_established(5), "not established"
        _echo(stream, b"still of use")()

    return check


def _closing_stream(session: Session) -> Callable[[], Any]:
    """Closed in full just before; the peer's FIN comes in the block."""
    stream = session.open()
    stream.sendall(b"E" + b"x" * 1000)
    stream.close()
    gevent.idle()

    def check() -> None:
        with gevent.Timeout(5, AssertionError("the stream did not end")):
            while session.num_streams:
                gevent.sleep(0.01)

    return check


def _unaccepted(session: Session) -> Callable[[], Any]:
    """A peer in this same hub has opened a stream that was about to be accepted."""
    near, far = memory_pair()
    opener, acceptor = Client(near), Server(far, SHORT)
    stream = opener.open()
    stream.sendall(b"accepted after the block")
    settle()

    def check() -> None:
        assert acceptor.accept(5).recv(24) == b"accepted after the block"
        opener.abort()
        acceptor.abort()

    return check


def _closing_session(session: Session) -> Callable[[], Any]:
    """close() has begun; what was accepted before it must get to a peer that takes it, and GoAway behind it."""
    near, raw = gsocket.socketpair()
    sender = Client(near, Config(close_timeout=2.0))
    stream = sender.open()
    stream.setblocking(False)
    accepted = 0
    with contextlib.suppress(BlockingIOError):
        while True:
            accepted += stream.send(bytes(4000))
    stream.close_write()
    closing = gevent.spawn(sender.close)
    gevent.sleep(0)
    received = bytearray()

    def read() -> None:
        with contextlib.suppress(OSError):
            while chunk := raw.recv(65536):
                received.extend(chunk)

    reading = gevent.spawn(read)

    def check() -> None:
        closing.get(timeout=5)
        reading.join(5)
        raw.close()
        assert len(received) >= accepted, f"{len(received)} of {accepted} bytes left that close() was to flush"
        assert received.endswith(bytes.fromhex("0003 0000 00000000 00000000")), "no GoAway was said"

    return check


def _probing_a_late_peer(session: Session) -> Callable[[], Any]:
    """A keepalive ping has left, and its answer needs time of this hub: it can't be there when the block is over."""
    relay = Relay(delay=0.4)
    near, far = Client(relay.near, SHORT), Server(relay.far, Config())
    while near.stats().idle < 1.1:
        gevent.sleep(0.02)

    def check() -> None:
        near.ping(5)
        near.abort()
        far.abort()
        gevent.sleep(0.01)
        relay.close()

    return check


def _writing_to_a_late_peer(session: Session) -> Callable[[], Any]:
    """The connection is full, and who empties it lives in this hub."""
    near, raw = gsocket.socketpair()
    sender = Client(near, SHORT)
    writing = gevent.spawn(sender.open().sendall, bytes(262_144))
    gevent.sleep(0.2)
    assert not writing.ready()

    def empty() -> None:
        gevent.sleep(0.5)  # over when the block is
        gevent.sleep(0.3)
        with contextlib.suppress(OSError):
            while raw.recv(65536):
                pass

    emptying = gevent.spawn(empty)
    gevent.sleep(0)

    def check() -> None:
        writing.get(timeout=5)
        sender.abort()
        emptying.join(5)
        raw.close()

    return check


SITUATIONS: dict[str, tuple[Callable[[Session], Callable[[], Any]], Config]] = {
    "idle, default settings": (_idle, Config()),
    "idle, short limits": (_idle, SHORT),
    "waiting for a pong": (_waiting_for_a_pong, SHORT),
    "sending, default settings": (_sending, Config()),
    "sending, short limits": (_sending, SHORT),
    "stalled when it began": (_stalled_from_before, SHORT),
    "opening": (_opening, SHORT),
    "closing a stream": (_closing_stream, SHORT),
    "not accepted yet": (_unaccepted, SHORT),
    "probing a late peer": (_probing_a_late_peer, SHORT),
    "writing to a late peer": (_writing_to_a_late_peer, SHORT),
    "closing the session": (_closing_session, SHORT),
}


def main(seconds: str, host: str, port: str) -> None:
    lines: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("geyamux").addHandler(handler)
    situations = [_set_up(name, host, int(port)) for name in SITUATIONS]
    began = time.monotonic()
    time.sleep(float(seconds))  # not gevent's: nothing else runs
    blocked = time.monotonic() - began
    gevent.sleep(0.1)
    wrong = {situation.name: _wrong_with(situation) for situation in situations}
    gevent.sleep(2.0)  # a limit that was moved too little would pass now
    for situation in situations:
        if situation.session.closed:
            wrong[situation.name] += f" and then {situation.session.exception!r}"
    print(json.dumps({"blocked": blocked, "wrong": wrong, "lines": lines}), flush=True)


def _set_up(name: str, host: str, port: int) -> Situation:
    begin, config = SITUATIONS[name]
    sock = gsocket.create_connection((host, port))
    sock.setsockopt(gsocket.SOL_SOCKET, gsocket.SO_SNDBUF, 65536)
    session = Client(sock, config, name=name)
    return Situation(name, session, begin(session))


def _wrong_with(situation: Situation) -> str:
    """What is not as it should be; "" where nothing is."""
    try:
        situation.check()
        situation.session.ping(5)
    except Exception as error:
        return f"{error!r}"
    return ""


if __name__ == "__main__":
    main(*sys.argv[1:])
