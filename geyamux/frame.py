"""The wire: a header of 12 bytes, big-endian, before everything.

::

    +---------+------+-------+-----------+--------+
    | version | type | flags | stream id | length |
    |    1    |   1  |   2   |     4     |   4    |  bytes
    +---------+------+-------+-----------+--------+

What the length counts depends on the type: the bytes that follow (Data), credit (WindowUpdate), an opaque value (Ping),
a reason (GoAway). Only Data has a body. The constants are plain integers: the hot path compares millions of them.

This module does not know what is allowed when; see :mod:`geyamux.lifecycle` and :mod:`geyamux.reader`.
"""

from __future__ import annotations

import enum
import struct

__all__ = [
    "ACK",
    "DATA",
    "FIN",
    "GO_AWAY",
    "HEADER",
    "HEADER_SIZE",
    "PING",
    "RST",
    "SYN",
    "WINDOW_UPDATE",
    "GoAwayCode",
    "describe",
]

HEADER = struct.Struct(">BBHII")
HEADER_SIZE = HEADER.size

DATA = 0x0
WINDOW_UPDATE = 0x1
PING = 0x2
GO_AWAY = 0x3

SYN = 0x1
ACK = 0x2
FIN = 0x4
RST = 0x8

#: The largest value of a header's length, and so of any credit.
MAX_LENGTH = 0xFFFF_FFFF
#: The largest stream id.
MAX_STREAM_ID = 0xFFFF_FFFF
#: The receive window of every stream before anybody has said anything, in bytes.
INITIAL_WINDOW = 0x4_0000

_TYPE_NAMES = ("Data", "WindowUpdate", "Ping", "GoAway")
_FLAG_NAMES = ((SYN, "SYN"), (ACK, "ACK"), (FIN, "FIN"), (RST, "RST"))


class GoAwayCode(enum.IntEnum):
    """The reasons of a GoAway frame that the protocol names. Peers send others, too."""

    NORMAL = 0x0
    PROTOCOL_ERROR = 0x1
    INTERNAL_ERROR = 0x2


def describe(frame_type: int, flags: int, stream_id: int, length: int) -> str:
    """Say in words what a header says, for logs: ``Data stream 3 FIN length 17``."""
    name = _TYPE_NAMES[frame_type] if frame_type < len(_TYPE_NAMES) else f"type {frame_type}"
    words = [label for bit, label in _FLAG_NAMES if flags & bit]
    if flags & ~0xF:
        words.append(f"unknown flags {flags & ~0xF:#x}")
    marks = "|".join(words)
    return f"{name} stream {stream_id} {marks + ' ' if marks else ''}length {length}"
