"""The table of workloads, and the goals for geyamux: the one place that knows sizes.

It only describes; runner.py runs what stands here, and report.py judges it. Commands are in the words of the contract in
README.md. The sizes are chosen so that a measured command takes a quarter of a second to a few seconds with every peer:
py-libp2p gets a part of the work, because it takes ten to fifty times as long and rates are what is compared.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

Sample = Mapping[str, Any]

GIB = 1 << 30
MIB = 1 << 20
#: The link of W8, in bits and seconds for a round trip.
LINK_RATE = 200_000_000
LINK_ROUND_TRIP = 0.1
GROWTH = (1, 10, 100, 1_000, 10_000)
GROWTH_BASE = "10"
#: What is measured when the scale is "small": enough to see that everything works.
SMALL_SCALE = 0.01
#: Of the work of a round, in the round that is thrown away.
WARMUP_SHARE = 0.2


@dataclass(frozen=True)
class Figure:
    """A number that is read from a sample."""

    name: str
    unit: str
    read: Callable[[Sample], float]
    higher_is_better: bool = False
    #: Its ratio to other peers says something.
    is_compared: bool = True


RATE = Figure("rate", "MB/s", lambda sample: sample["bytes"] / sample["seconds"] / 1e6, higher_is_better=True)
REQUESTS = Figure("rate", "1/s", lambda sample: sample["operations"] / sample["seconds"], higher_is_better=True)
P50 = Figure("p50", "µs", lambda sample: sample["latencies"]["p50"])
P99 = Figure("p99", "µs", lambda sample: sample["latencies"]["p99"])
COST = Figure("cost", "µs", lambda sample: sample["seconds"] / sample["operations"] * 1e6)
DRIVER_BYTES = Figure("driver", "B/stream", lambda sample: sample["grown"]["driver"] / sample["operations"])
SERVER_BYTES = Figure("server", "B/stream", lambda sample: sample["grown"]["server"] / sample["operations"])
GROWN = Figure(
    "grown", "MiB", lambda sample: (sample["peak"]["driver"] - sample["base"]["driver"]) / MIB, is_compared=False
)


@dataclass(frozen=True)
class Case:
    """One command of a workload; `label` tells it from the others of the same workload."""

    label: str
    command: Mapping[str, Any]
    #: Peers that can't, and why.
    cannot: Mapping[str, str] = field(default_factory=dict)

    def sized(self, scale: float) -> Case:
        """Return the same with that part of the work."""
        command = dict(self.command)
        for name, least in (("bytes", 1), ("count", 2), ("warmup", 0)):
            if name in command:
                command[name] = max(least, math.ceil(command[name] * scale))
        for name in ("seconds", "skip"):
            if name in command:
                command[name] = round(command[name] * max(scale, 0.1), 3)
        if command["workload"] == "idle":
            command["streams"] = max(10, int(command["streams"] * scale))
        return replace(self, command=command)


@dataclass(frozen=True)
class Workload:
    """What is run with each peer in each round, and what is read from the answers."""

    name: str
    title: str
    figures: tuple[Figure, ...]
    cases: tuple[Case, ...]
    #: Where the two processes run unless `--pin` says otherwise: "same", "split" or "none".
    pin: str = "none"
    tls: bool = False
    #: Through the relay, which is the link of W8.
    relay: bool = False
    #: New processes in each round, for what they keep of the round before would be taken for nothing.
    fresh: bool = False
    #: The part of the work that a peer gets.
    shares: Mapping[str, float] = field(default_factory=dict)
    #: Peers that can't, and why.
    cannot: Mapping[str, str] = field(default_factory=dict)

    def scaled(self, scale: float) -> Workload:
        if scale == 1:
            return self
        # Opening many streams costs as much at every scale.
        cases = [case for case in self.cases if not case.label or int(case.label) <= GROWTH[-1] * scale * 10]
        return replace(self, cases=tuple(case.sized(scale) for case in cases))


def _one(workload: str, **parameters: Any) -> tuple[Case, ...]:
    return (Case("", {"workload": workload, **parameters}),)


def _echo_rate_at(streams: int) -> Case:
    # Few streams take longer for each trip.
    trips = 30_000 if streams >= 100 else 10_000
    command = {"workload": "echo_rate", "streams": streams, "count": max(2, trips // streams)}
    return Case(str(streams), command, _cannot_at(streams))


def _churn_at(openers: int) -> Case:
    count = 3_000 if openers == 1 else max(10_000, 2 * openers)
    command = {"workload": "churn", "openers": openers, "count": count, "warmup": 200}
    return Case(str(openers), command, _cannot_at(openers))


def _cannot_at(streams: int) -> dict[str, str]:
    return {"libp2p": "ten seconds for a round of so many streams"} if streams > 1_000 else {}


_BULK = {"streams": 1, "bytes": GIB, "warmup": 16 * MIB}
_NO_TLS = {"libp2p": "its security is not TLS"}
_NO_WINDOW = {"libp2p": "its window can't be set, it tunes itself"}
_NO_TUNING = {"hashicorp": "has no auto-tuning", "libp2p": "tunes always, as in W8"}
_TOO_MANY = {
    "raw": "a connection for each is beyond the ports of an address",
    "libp2p": "minutes to open so many streams",
}

WORKLOADS: tuple[Workload, ...] = (
    Workload("W1", "bulk, 1 stream, 64 KiB writes", (RATE,), _one("bulk", **_BULK), shares={"libp2p": 0.1}),
    Workload(
        "W1-1MiB",
        "bulk, 1 stream, 1 MiB writes, window 1 MiB",
        (RATE,),
        _one("bulk", **_BULK, write=MIB, window=MIB),
        cannot=_NO_WINDOW,
    ),
    Workload(
        "W1-4MiB",
        "bulk, 1 stream, 1 MiB writes, window 4 MiB",
        (RATE,),
        _one("bulk", **_BULK, write=MIB, window=4 * MIB),
        cannot=_NO_WINDOW,
    ),
    Workload(
        "W2",
        "bulk, 100 streams",
        (RATE,),
        _one("bulk", **{**_BULK, "streams": 100}),
        shares={"libp2p": 0.1},
    ),
    Workload(
        "W3",
        "ping-pong of 64 B",
        (P50, P99),
        _one("echo_latency", count=20_000, warmup=500),
        pin="same",
        shares={"libp2p": 0.1},
    ),
    Workload(
        "W4",
        "100 streams of ping-pong",
        (REQUESTS,),
        _one("echo_rate", streams=100, count=400),
        pin="same",
        shares={"libp2p": 0.05},
    ),
    Workload(
        "W4-free",
        "100 streams of ping-pong, both processes free",
        (REQUESTS,),
        _one("echo_rate", streams=100, count=400),
        shares={"libp2p": 0.05},
    ),
    Workload(
        "W5",
        "open, 64 B echo, close",
        (REQUESTS,),
        _one("churn", openers=1, count=5_000, warmup=200),
        pin="same",
        shares={"libp2p": 0.1},
    ),
    Workload(
        "W5c",
        "open, 64 B echo, close, 64 openers",
        (REQUESTS,),
        _one("churn", openers=64, count=12_000, warmup=500),
        pin="same",
        shares={"libp2p": 0.1},
    ),
    Workload(
        "W6-10k",
        "10,000 idle streams",
        (DRIVER_BYTES, SERVER_BYTES),
        _one("idle", streams=10_000),
        pin="same",
        fresh=True,
    ),
    Workload(
        "W6-10k-reader",
        "10,000 idle streams, a reader waiting on each",
        (DRIVER_BYTES, SERVER_BYTES),
        _one("idle", streams=10_000, reader=True),
        pin="same",
        fresh=True,
    ),
    Workload(
        "W6-100k",
        "100,000 idle streams",
        (DRIVER_BYTES, SERVER_BYTES),
        _one("idle", streams=100_000),
        pin="same",
        fresh=True,
        cannot=_TOO_MANY,
    ),
    Workload(
        "W7",
        "64 B ping-pong beside bulk",
        (P50, P99, RATE),
        _one("mixed", seconds=1.5, warmup=200),
        pin="none",
    ),
    Workload(
        "W8",
        "100 ms, 200 Mbit/s, defaults",
        (RATE,),
        _one("paced_bulk", seconds=5.0, skip=3.0),
        relay=True,
    ),
    Workload(
        "W8-tuned",
        "100 ms, 200 Mbit/s, auto-tuning",
        (RATE, GROWN),
        _one("paced_bulk", seconds=5.0, skip=3.0, auto_tune=True),
        relay=True,
        cannot=_NO_TUNING,
    ),
    Workload(
        "TLS-W1",
        "bulk over TLS",
        (RATE,),
        _one("bulk", **{**_BULK, "bytes": GIB // 2}),
        tls=True,
        cannot=_NO_TLS,
    ),
    Workload(
        "TLS-W3",
        "ping-pong of 64 B over TLS",
        (P50, P99),
        _one("echo_latency", count=15_000, warmup=500),
        pin="same",
        tls=True,
        cannot=_NO_TLS,
    ),
    Workload(
        "TLS-W5",
        "open, 64 B echo, close over TLS",
        (REQUESTS,),
        _one("churn", openers=1, count=1_500, warmup=100),
        pin="same",
        tls=True,
        # A handshake for each.
        shares={"raw": 0.25},
        cannot=_NO_TLS,
    ),
    Workload(
        "growth-W4",
        "ping-pong on so many streams",
        (COST,),
        tuple(_echo_rate_at(streams) for streams in GROWTH),
        pin="same",
        shares={"libp2p": 0.05},
    ),
    Workload(
        "growth-W5",
        "open, 64 B echo, close by so many openers",
        (COST,),
        tuple(_churn_at(openers) for openers in GROWTH),
        pin="same",
        shares={"libp2p": 0.05},
    ),
)


def select(names: Iterable[str]) -> list[Workload]:
    """Return the workloads of those names, in the order of the table; `W6` stands for all that begin with `W6-`.

    Raises KeyError for a name that stands for none.
    """
    wanted = list(names)
    known = {workload.name for workload in WORKLOADS}
    for name in wanted:
        if name not in known and not any(other.startswith(f"{name}-") for other in known):
            raise KeyError(name)
    return [
        workload
        for workload in WORKLOADS
        if any(workload.name == name or (name not in known and workload.name.startswith(f"{name}-")) for name in wanted)
    ]


@dataclass(frozen=True)
class Goal:
    """What geyamux has to reach: `must`, and `aim` where there is one.

    Against a peer it is a ratio of the same round; against nobody it is the figure itself.
    """

    workload: str
    figure: str
    against: str | None
    must: float
    aim: float | None = None
    at_most: bool = False
    #: Where the two processes have to run for the goal to count. None: wherever.
    pin: str | None = None
    #: Of the case with the most streams, against the case GROWTH_BASE of the same peer.
    growth: bool = False


GOALS: tuple[Goal, ...] = (
    Goal("W1", "rate", "raw", 0.70, 0.85),
    Goal("W1", "rate", "hashicorp", 1.5),
    Goal("W1", "rate", "libp2p", 10),
    Goal("W1-1MiB", "rate", "raw", 0.85, 1.0),
    Goal("W2", "rate", "raw", 0.55, 0.8),
    Goal("W2", "rate", "hashicorp", 1.5),
    Goal("W3", "p50", "raw", 0.95, 0.8, at_most=True, pin="same"),
    Goal("W3", "p50", "hashicorp", 0.65, at_most=True, pin="same"),
    Goal("W4", "rate", "raw", 5, 7, pin="same"),
    Goal("W4", "rate", "hashicorp", 4, pin="same"),
    Goal("W4-free", "rate", "raw", 3, pin="none"),
    Goal("W5", "rate", "raw", 2, 3, pin="same"),
    Goal("W5", "rate", "hashicorp", 1.0, pin="same"),
    Goal("W5c", "rate", "raw", 4, 6, pin="same"),
    Goal("W5c", "rate", "hashicorp", 2, pin="same"),
    Goal("W6-10k", "driver", None, 350, 250, at_most=True),
    Goal("W6-10k", "server", None, 350, 250, at_most=True),
    Goal("W6-100k", "driver", None, 350, 250, at_most=True),
    Goal("W6-100k", "server", None, 350, 250, at_most=True),
    Goal("W7", "p50", "hashicorp", 0.8, 0.5, at_most=True),
    Goal("W7", "rate", "hashicorp", 1.5, 2),
    # MB/s: four fifths of the link, and all of it but what a measurement of two seconds leaves open.
    Goal("W8-tuned", "rate", None, 0.8 * LINK_RATE / 8e6, 0.98 * LINK_RATE / 8e6),
    # MiB: the receive budget of a session, against all that the receiving process grew by.
    Goal("W8-tuned", "grown", None, 64, at_most=True),
    Goal("TLS-W1", "rate", "raw", 0.6, 0.8),
    Goal("TLS-W3", "p50", "raw", 0.9, 0.75, at_most=True),
    Goal("TLS-W5", "rate", "raw", 8, 14),
    Goal("growth-W4", "cost", None, 1.5, 1.1, at_most=True, growth=True),
    Goal("growth-W5", "cost", None, 1.5, 1.1, at_most=True, growth=True),
)
