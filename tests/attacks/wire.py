"""The few words of the wire that an attacker needs. Nothing here is checked: it is there to be wrong on purpose."""

from __future__ import annotations

import struct

DATA, WINDOW_UPDATE, PING, GO_AWAY = range(4)
SYN, ACK, FIN, RST = 1, 2, 4, 8
HEADER_SIZE = 12
WINDOW = 262144
LARGEST = 0xFFFFFFFF

_header = struct.Struct(">BBHII")


def header(kind: int, flags: int, stream_id: int, length: int, version: int = 0) -> bytes:
    return _header.pack(version, kind, flags, stream_id, length)


def update(stream_id: int, flags: int = 0, length: int = 0) -> bytes:
    return header(WINDOW_UPDATE, flags, stream_id, length)


def data(stream_id: int, body: bytes, flags: int = 0) -> bytes:
    return header(DATA, flags, stream_id, len(body)) + body


def parse(buffer: bytes, position: int) -> tuple[int, int, int, int]:
    """Type, flags, stream id, length."""
    _, kind, flags, stream_id, length = _header.unpack_from(buffer, position)
    return kind, flags, stream_id, length
