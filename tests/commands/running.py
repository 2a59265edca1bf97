"""Tunnels of two `geyamux forward`, and peers of one that the test plays by hand."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from gevent import socket

from geyamux.cli.control import RemoteControl
from interop.peers import Job
from support.rawpeer import PATIENCE, RawPeer
from support.waiting import wait_for
from support.wire import ACK, PING, SYN, Frame, ping
from tunnels.running import Child, Children, Forward
from tunnels.service import check, connect

ANYWHERE = "127.0.0.1:0"
QUICK = "--retry-max-interval=0.1"


class Tunnel(NamedTuple):
    """Who listens and takes the connections at `near`, and who has dialled and connects them."""

    relay: Forward
    agent: Forward
    near: str


def expose(children: Children, target: str, *, relay: Sequence[str] = (), agent: Sequence[str] = ()) -> Tunnel:
    """The tunnel that makes `target` reachable, with more words for either end."""
    listening = children.forward("--listen", ANYWHERE, "--from", ANYWHERE, *relay)
    dialling = children.forward("--dial", listening.listening("trunk"), "--to", target, *agent)
    listening.event("connected")
    dialling.event("connected")
    return Tunnel(listening, dialling, listening.listening("from"))


def works(*addresses: str) -> None:
    """A connection there goes through, both ways and to both ends."""
    for address in addresses:
        check(address, [Job("echo", 100_000, 7, half=True)])


def entries(child: Child) -> list[dict[str, Any]]:
    """What it has logged so far: each line must be an object."""
    return [json.loads(line) for line in child.lines]


def events(child: Child) -> list[str]:
    """The names of what has happened to it so far."""
    return [entry["event"] for entry in entries(child)]


def snapshot(path: object) -> dict[str, Any]:
    """What it tells at its control socket."""
    return RemoteControl(str(path)).ask()


def wait_streams(path: object, count: int) -> list[dict[str, Any]]:
    """Wait until so many streams are there; what is told of them."""
    wait_for(lambda: len(snapshot(path)["streams"]) == count, f"{count} streams")
    streams: list[dict[str, Any]] = snapshot(path)["streams"]
    return streams


# --- peers by hand ---


class AnsweringPeer(RawPeer):
    """It answers pings, and does not tell of them: with windows that grow there may be one at any time."""

    def next(self, timeout: float | None = None) -> Frame:
        while (found := super().next(timeout))[1:3] == (PING, SYN):
            self.send(ping(ACK, found.length))
        return found

    def answer_ping(self) -> None:
        """The one by which a listener learns that it is a peer."""
        found = super().next()
        assert found[1:3] == (PING, SYN), found
        self.send(ping(ACK, found.length))


def raw_dial(address: str) -> RawPeer:
    """The client of that trunk; its streams have odd numbers."""
    return AnsweringPeer(connect(address))


class RawListener:
    """Where a command can dial; each trunk that comes is played by hand, with even numbers for its streams."""

    def __init__(self) -> None:
        self._listener = socket.socket()
        self._listener.settimeout(PATIENCE)
        self._listener.bind(("127.0.0.1", 0))
        self._listener.listen()
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"

    def accept(self) -> RawPeer:
        conn, _ = self._listener.accept()
        return RawPeer(conn)

    def close(self) -> None:
        self._listener.close()


@contextlib.contextmanager
def raw_listener() -> Iterator[RawListener]:
    with contextlib.closing(RawListener()) as listener:
        yield listener
