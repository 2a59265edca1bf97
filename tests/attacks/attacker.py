"""The hostile peer: raw bytes over TCP, none of the package's code. It reads what is sent to it, or never does.

Run as ``python -m attacks.attacker NAME PORT READS``; it plays that attack of the catalogue until a line comes on its
standard input, and prints what it saw as JSON. It has a low priority: a real attacker has a machine of its own, this one
must not take the server's.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import select
import socket
import sys
import time
from collections import Counter, deque
from collections.abc import Iterator
from typing import Any

from .catalogue import ATTACKS, Attack, Step
from .wire import ACK, DATA, GO_AWAY, HEADER_SIZE, PING, SYN, header, parse

#: A server takes what is sent to it at some time; else the attack has blocked it.
PATIENCE = 15.0
#: A connection that is not read stays open for so long beside the next: the server may not get rid of its last words.
FADING = 0.15
#: The value of the ping that asks, in the end, whether the session lives.
PROOF = 0x600D600D
MIB = 1 << 20


class Ended(Exception):
    """The connection is over."""


def is_over() -> bool:
    """We were told to stop."""
    return bool(select.select([sys.stdin], [], [], 0)[0])


class Connection:
    """One hostile connection, and what came back on it."""

    def __init__(self, port: int, *, reads: bool, receive_buffer: int | None) -> None:
        self.reads = reads
        self.socket = socket.socket()
        if receive_buffer is not None:
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        self.socket.connect(("127.0.0.1", port))
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.socket.setblocking(False)
        #: Tells the server's end of the connection, also where nothing is read.
        self._end = select.poll()
        self._end.register(self.socket, select.POLLRDHUP)
        self.frames: Counter[tuple[int, int]] = Counter()
        self.last = ""
        self.proven = False
        self._rest = b""
        self._body = 0

    def send(self, data: bytes) -> None:
        view = memoryview(data)
        while view:
            readable, writable, _ = select.select([self.socket] if self.reads else [], [self.socket], [], PATIENCE)
            if not readable and not writable:
                raise TimeoutError("the server takes nothing any more")
            if readable:
                self.receive()
            if not self.reads and self._end.poll(0):
                raise Ended("end")
            if writable:
                view = view[self._send_some(view[:MIB]) :]

    def _send_some(self, view: memoryview) -> int:
        try:
            return self.socket.send(view)
        except BlockingIOError:
            return 0
        except OSError as error:
            self.wait_end()  # what came before it
            raise Ended(type(error).__name__) from None

    def pause(self, seconds: float) -> None:
        """Let time pass; where it reads, reading."""
        if not self.reads:
            time.sleep(seconds)
            return
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0 and not self.proven:
            if select.select([self.socket], [], [], left)[0]:
                self.receive()

    def wait_end(self) -> None:
        """Wait until the server has ended it. Without reading that may never show, so not for long."""
        if self.reads:
            self.pause(PATIENCE)
            return
        if self._end.poll(20):
            raise Ended("end")

    def receive(self) -> None:
        try:
            data = self.socket.recv(MIB)
        except BlockingIOError:
            return
        except OSError as error:
            raise Ended(type(error).__name__) from None
        if not data:
            raise Ended("end")
        self._take(data)

    def _take(self, data: bytes) -> None:
        position, data = 0, self._rest + data if self._rest else data
        while True:
            skipped = min(self._body, len(data) - position)
            position += skipped
            self._body -= skipped
            if len(data) - position < HEADER_SIZE:
                break
            kind, flags, _, length = parse(data, position)
            position += HEADER_SIZE
            self.frames[kind, flags] += 1
            self.last = f"GoAway {length}" if kind == GO_AWAY else f"type {kind} flags {flags}"
            if kind == DATA:
                self._body = length
            elif (kind, flags, length) == (PING, ACK, PROOF):
                self.proven = True
        self._rest = data[position:]

    def prove(self) -> bool:
        """Whether the session still answers."""
        deadline = time.monotonic() + PATIENCE
        while self.reads and not self.proven and time.monotonic() < deadline:
            # One that comes behind 32 others is not answered.
            self.send(header(PING, SYN, 0, PROOF))
            self.pause(0.2)
        return self.proven


def play(attack: Attack, connections: list[Connection]) -> None:
    """One round: the script on all connections in turn; an endless one until its time is over."""
    scripts: list[tuple[Connection, Iterator[Step]]] = [(each, attack.script()) for each in connections]
    while scripts and not (attack.is_endless and is_over()):
        for pair in list(scripts):
            connection, script = pair
            step = next(script, None)
            if step is None:
                scripts.remove(pair)
            elif isinstance(step, bytes):
                connection.send(step)
            else:
                connection.pause(step)


class Fading:
    """Connections that are left open for a while when all is said."""

    def __init__(self) -> None:
        self._connections: deque[tuple[float, Connection]] = deque()

    def add(self, connection: Connection) -> None:
        self._connections.append((time.monotonic() + FADING, connection))
        self.close(time.monotonic())

    def close(self, now: float) -> None:
        while self._connections and self._connections[0][0] < now:
            with contextlib.suppress(OSError):
                self._connections.popleft()[1].socket.close()


def play_round(attack: Attack, port: int, reads: bool, fading: Fading) -> dict[str, Any]:
    connections = [Connection(port, reads=reads, receive_buffer=attack.receive_buffer) for _ in range(attack.connections)]
    first = connections[0]
    end = ""
    try:
        play(attack, connections)
        if attack.ends:
            first.wait_end()
        else:
            hold(attack, first)
    except Ended as ended:
        end = str(ended)
    except TimeoutError as error:
        end = f"stuck: {error}"
    finally:
        for connection in connections:
            if attack.ends and not (reads or end):
                fading.add(connection)
            else:
                with contextlib.suppress(OSError):
                    connection.socket.close()
    frames = {f"{kind}/{flags}": count for (kind, flags), count in first.frames.items()}
    return {"end": end, "last": first.last, "proven": first.proven, "frames": frames}


def hold(attack: Attack, connection: Connection) -> None:
    """Stay as long as it takes, then see whether the session still answers."""
    while not (attack.repeats or is_over()):
        connection.pause(0.02)
    if attack.proves:
        connection.prove()


def main() -> None:
    name, port, reads = sys.argv[1], int(sys.argv[2]), sys.argv[3] == "reads"
    os.nice(10)
    attack = ATTACKS[name]
    fading = Fading()
    rounds = [play_round(attack, port, reads, fading)]
    while attack.repeats and not is_over():
        rounds.append(play_round(attack, port, reads, fading))
    while not is_over():
        time.sleep(0.02)
    time.sleep(FADING if attack.ends and not reads else 0.0)
    fading.close(math.inf)
    seen = {
        "rounds": len(rounds),
        "last": rounds[-1],
        "ends": Counter(each["end"] for each in rounds),
        "lasts": Counter(each["last"] for each in rounds),
        "unproven": sum(not each["proven"] for each in rounds),
    }
    print(json.dumps(seen), flush=True)


if __name__ == "__main__":
    main()
