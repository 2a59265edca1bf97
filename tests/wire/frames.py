"""The Yamux wire format as the public specification gives it: frames as bytes, and bytes as frames.

Any header can be built, the forbidden ones too. It judges nothing; `peer.py` does.
"""

from __future__ import annotations

import struct
from typing import NamedTuple

HEADER = struct.Struct(">BBHII")
DATA, UPDATE, PING, GO_AWAY = range(4)
SYN, ACK, FIN, RST = 1, 2, 4, 8
#: What each side may send on a new stream before it has been granted anything.
WINDOW = 256 * 1024
#: The highest value of a length field.
MOST = 2**32 - 1

_KINDS = ("Data", "WindowUpdate", "Ping", "GoAway")
_FLAGS = {SYN: "SYN", ACK: "ACK", FIN: "FIN", RST: "RST"}


class Frame(NamedTuple):
    kind: int
    flags: int
    stream: int
    length: int
    payload: bytes = b""

    def __str__(self) -> str:
        name = _KINDS[self.kind] if self.kind < len(_KINDS) else f"type {self.kind}"
        flags = "+".join(word for bit, word in _FLAGS.items() if self.flags & bit)
        return f"{name}{' ' if flags else ''}{flags} on {self.stream}, {self.length}"


def raw(version: int, kind: int, flags: int, stream: int, length: int) -> bytes:
    """A header with any values."""
    return HEADER.pack(version, kind, flags, stream, length)


def data(stream: int, payload: bytes = b"", flags: int = 0) -> bytes:
    return HEADER.pack(0, DATA, flags, stream, len(payload)) + payload


def update(stream: int, delta: int = 0, flags: int = 0) -> bytes:
    return HEADER.pack(0, UPDATE, flags, stream, delta)


def ping(value: int, flags: int = SYN, stream: int = 0) -> bytes:
    return HEADER.pack(0, PING, flags, stream, value)


def go_away(code: int, flags: int = 0, stream: int = 0) -> bytes:
    return HEADER.pack(0, GO_AWAY, flags, stream, code)


def pattern(size: int, seed: int = 0) -> bytes:
    """Bytes in which a piece that is lost, doubled or moved shows."""
    block = b"".join(struct.pack(">I", (n * 2654435761 + seed) & MOST) for n in range(min(size, 65524) // 4 + 1))
    return (block * (size // len(block) + 1))[:size]


def describe(frames: list[Frame], most: int = 6) -> str:
    """For a report: the last few of them, and how many there were."""
    if not frames:
        return "nothing"
    shown = "; ".join(map(str, frames[-most:]))
    return shown if len(frames) <= most else f"{len(frames)} frames, the last: {shown}"
