"""The connection between the two ends of a soak run: a relay, in a process of its own, that forwards and cuts.

Every connection through it gets, after a random time, the next kind of cut from a shuffled deck; so each kind comes,
however short the run is. What it forwards it never changes, reorders or loses, except that after a cut nothing more
comes. For cuts inside a frame it follows where frames begin and end: those of Yamux, or the records of TLS.

Run by the soak itself: ``python -m tests.soak.relay PORT SEED TLS MEAN``, with orders on stdin.
"""

from __future__ import annotations

import contextlib
import random
import socket
import struct
import sys
from collections import Counter, deque
from collections.abc import Callable
from typing import Any

import gevent
from gevent import socket as gsocket
from gevent.event import Event

from .channel import Channel

#: Seconds after which both ends of a silent connection must have noticed; their settings say 3.
HOLD = 20.0
#: The same where the relay takes nothing: both ends are gone then, though it can't be seen.
STALL = 10.0
_CHUNK = 65536
_LINGER_NOT = struct.pack("ii", 1, 0)


class Boundaries:
    """Follows where in the frames of one direction its bytes are."""

    def __init__(self, *, tls: bool) -> None:
        self._size = 5 if tls else 12
        self._tls = tls
        self._header = b""
        self._body = 0

    @property
    def between(self) -> bool:
        """The next byte begins a frame."""
        return not self._header and not self._body

    def feed(self, data: bytes) -> None:
        position = 0
        while position < len(data):
            if self._body:
                step = min(self._body, len(data) - position)
                self._body -= step
            else:
                step = min(self._size - len(self._header), len(data) - position)
                self._header += data[position : position + step]
                if len(self._header) == self._size:
                    self._body, self._header = self._length(self._header), b""
            position += step

    def inside(self, data: bytes, position: int) -> int:
        """The nearest position in `data`, not after `position`, that is no boundary; 0 where there is none."""
        probe = Boundaries(tls=self._tls)
        probe._header, probe._body = self._header, self._body
        probe.feed(data[:position])
        return position - 1 if probe.between else position

    def _length(self, header: bytes) -> int:
        if self._tls:
            return int.from_bytes(header[3:5], "big")
        return int.from_bytes(header[8:12], "big") if header[1] == 0 else 0


class Crossing:
    """One connection through the relay."""

    def __init__(self, relay: Relay, near: Any, far: Any) -> None:
        self.relay = relay
        self.rng = relay.rng
        self.ends = (near, far)
        self.open_gate = Event()
        self.open_gate.set()
        #: Seconds for each byte.
        self.delay = 0.0
        #: Directions whose bytes vanish: 0 is from the near end.
        self.lost: set[int] = set()
        #: The next chunk is cut in the middle of a frame.
        self.cut_inside = False
        self.was_cut = False
        self.over = Event()
        self.pumps = [gevent.spawn(self._pump, direction) for direction in (0, 1)]

    def run(self) -> None:
        """Forward until an end closes or the cut comes."""
        cutter = gevent.spawn(self._cut_in_time)
        for pump in gevent.iwait(self.pumps):
            if pump.value is True:
                break
        if self.was_cut:
            self.over.wait()
        else:
            cutter.kill()
            self.close(reset=any(pump.value is True for pump in self.pumps))
            gevent.killall(self.pumps)
        cutter.join()

    def close(self, *, reset: bool) -> None:
        for end in self.ends:
            with contextlib.suppress(OSError):
                if reset:
                    end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _LINGER_NOT)
                end.close()

    def _pump(self, direction: int) -> bool:
        """Forward one direction; True when it broke rather than ended."""
        source, target = self.ends[direction], self.ends[1 - direction]
        boundaries = Boundaries(tls=self.relay.tls)
        try:
            while True:
                self.open_gate.wait()
                data = source.recv(_CHUNK)
                self.open_gate.wait()
                if not data:
                    target.shutdown(socket.SHUT_WR)
                    return False
                if self.delay:
                    gevent.sleep(self.delay * len(data))
                if direction in self.lost:
                    continue
                if self.cut_inside:
                    position = boundaries.inside(data, self.rng.randint(1, len(data)))
                    if position:
                        self.cut_inside = False
                        target.sendall(data[:position])
                        gevent.spawn(self._after_inside)
                        return False
                boundaries.feed(data)
                target.sendall(data)
                self.relay.forwarded += len(data)
        except OSError:
            return True

    def _cut_in_time(self) -> None:
        while not self.was_cut:
            gevent.sleep(self.rng.expovariate(1 / self.relay.mean))
            kind = self.relay.deck_next()
            done = False
            self.relay.cuts[kind] += 1
            try:
                done = CUTS[kind](self)
            finally:
                if not done:
                    # The connection ended before; the next one gets it.
                    self.relay.cuts[kind] -= 1
                    self.relay.deck.appendleft(kind)

    def _stop(self) -> None:
        """From here on it is a cut: nothing is forwarded any more."""
        self.was_cut = True
        gevent.killall(self.pumps)

    # -- the kinds

    def cut_reset(self) -> bool:
        self._stop()
        self.close(reset=True)
        self.over.set()
        return True

    def cut_fin(self) -> bool:
        self._stop()
        self._end_in_order()
        return True

    def cut_half(self) -> bool:
        """One direction ends; the other goes on until its end closes."""
        direction = self.rng.randrange(2)
        self.was_cut = True
        self.pumps[direction].kill()
        with contextlib.suppress(OSError):
            self.ends[1 - direction].shutdown(socket.SHUT_WR)
        self._discard_until_closed("half closed", (direction,))
        return True

    def cut_inside_frame(self) -> bool:
        self.cut_inside = True
        return self.over.wait(HOLD) and self.was_cut

    def _after_inside(self) -> None:
        self._stop()
        if self.rng.random() < 0.5:
            self.close(reset=True)
            self.over.set()
        else:
            self._end_in_order()

    def cut_silent(self) -> bool:
        """Everything is taken and vanishes."""
        self.was_cut = True
        gevent.killall(self.pumps)
        self._discard_until_closed("silent", (0, 1))
        return True

    def cut_deaf(self) -> bool:
        """One direction is taken and vanishes, the other goes on."""
        self.was_cut = True
        self.lost.add(self.rng.randrange(2))
        with gevent.Timeout(HOLD, False):  # type: ignore[arg-type]  # False: end in silence
            gevent.joinall(self.pumps)
        self._finish_hold("deaf", all(pump.dead for pump in self.pumps))
        return True

    def cut_stalled(self) -> bool:
        """Nothing is taken any more: the buffers of the system fill.

        An end that has closed can't say so past what fills them; so after its time is over everything is taken, and the
        end of it must be there.
        """
        self._stop()
        gevent.sleep(STALL)
        self._discard_until_closed("stalled", (0, 1), seconds=1.5)
        return True

    def slow_down(self) -> bool:
        """Slow for a while: no cut."""
        self.delay = 1 / self.rng.uniform(100_000, 1_000_000)
        gevent.sleep(self.rng.uniform(1, 3))
        self.delay = 0.0
        return True

    def pause(self) -> bool:
        """Nothing for less than the ends have to put up with: no cut."""
        self.open_gate.clear()
        gevent.sleep(self.rng.uniform(0.1, 1.0))
        self.open_gate.set()
        return True

    # -- their ends

    def _end_in_order(self) -> None:
        """FIN both ways. Closing with unread bytes would be a reset, so those are read first."""
        for end in self.ends:
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_WR)
        self._discard_until_closed("ended", (0, 1))

    def _discard_until_closed(self, what: str, directions: tuple[int, ...], seconds: float = HOLD) -> None:
        readers = [gevent.spawn(_discard, self.ends[direction]) for direction in directions]
        everyone = readers + [pump for pump in self.pumps if not pump.dead]
        gevent.joinall(everyone, timeout=seconds)
        done = all(one.dead for one in everyone)
        gevent.killall(readers)
        self._finish_hold(what, done)

    def _finish_hold(self, what: str, done: bool) -> None:
        if not done:
            self.relay.channel.send(kind="fault", what=f"an end did not notice a {what} connection", detail=f"{HOLD} s")
        gevent.killall(self.pumps)
        self.close(reset=True)
        self.over.set()


CUTS: dict[str, Callable[[Crossing], bool]] = {
    "reset": Crossing.cut_reset,
    "fin": Crossing.cut_fin,
    "half": Crossing.cut_half,
    "inside a frame": Crossing.cut_inside_frame,
    "silent": Crossing.cut_silent,
    "deaf": Crossing.cut_deaf,
    "stalled": Crossing.cut_stalled,
    "slow": Crossing.slow_down,
    "pause": Crossing.pause,
}
"""What may happen to a connection. The last two leave it alive."""


class Relay:
    """Listens, and connects every connection through."""

    def __init__(self, port: int, seed: int, *, tls: bool, mean: float) -> None:
        self.target = ("127.0.0.1", port)
        self.rng = random.Random(seed)
        self.tls = tls
        #: Mean time of a connection until its next cut.
        self.mean = mean
        self.deck: deque[str] = deque()
        self.cuts: Counter[str] = Counter()
        self.forwarded = 0
        self.channel = Channel()

    def deck_next(self) -> str:
        if not self.deck:
            kinds = list(CUTS)
            self.rng.shuffle(kinds)
            self.deck.extend(kinds)
        return self.deck.popleft()

    def run(self) -> None:
        listener = gsocket.socket()
        listener.bind(("127.0.0.1", 0))
        listener.listen(64)
        gevent.spawn(self._accept, listener)
        self.channel.send(kind="ready", port=listener.getsockname()[1])
        for order in self.channel.orders():
            if order["do"] == "counts":
                self.channel.send(kind="counts", cuts=dict(self.cuts), forwarded=self.forwarded)
        self.channel.flush()

    def _accept(self, listener: Any) -> None:
        while True:
            near, _ = listener.accept()
            gevent.spawn(self._cross, near)

    def _cross(self, near: Any) -> None:
        try:
            far = gsocket.create_connection(self.target, timeout=5)
        except OSError:
            near.close()
            return
        far.settimeout(None)
        for end in (near, far):
            end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if self.rng.random() < 0.03:
            self.cuts["at once"] += 1
            for end in (near, far):
                end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _LINGER_NOT)
                end.close()
            return
        Crossing(self, near, far).run()


def _discard(end: Any) -> None:
    with contextlib.suppress(OSError):
        while end.recv(_CHUNK):
            pass


if __name__ == "__main__":
    Relay(int(sys.argv[1]), int(sys.argv[2]), tls=sys.argv[3] == "tls", mean=float(sys.argv[4])).run()
