"""Files that Wireshark opens: blocks of pcapng, and inside them TCP packets made up for bytes that had none of their own.

What is traced is the stream of bytes above TCP (and above TLS, or where there is no TCP at all), so packets are made for
it: with the addresses of the connection, sequence numbers that follow from the bytes, and right checksums. There is no
handshake and no end, since a trace begins and ends in the middle of a conversation.

This module knows nothing of sessions and frames, and does no input or output.
"""

from __future__ import annotations

import socket
import struct
from typing import Any

__all__ = ["MOST_PAYLOAD", "Conversation", "packet_block", "section"]

#: Payload of one packet, at most: with its headers it fits into the 16 bits of a length, whatever the kind of address.
MOST_PAYLOAD = 61440

_SECTION_HEADER = 0x0A0D0D0A
_INTERFACE = 0x1
_PACKET = 0x6
_BYTE_ORDER = 0x1A2B3C4D
#: Options of blocks.
_END, _COMMENT = 0x0, 0x1
_USER_APPLICATION = 0x4
_INTERFACE_NAME, _TIME_RESOLUTION = 0x2, 0x9
_FLAGS, _INBOUND, _OUTBOUND = 0x2, 0x1, 0x2
#: Packets begin with their IP header.
_LINKTYPE_RAW = 101
#: A length of a section or comment that is not told, or does not fit.
_UNKNOWN_LENGTH = 0xFFFF_FFFF_FFFF_FFFF
_MOST_TEXT = 0xFFFF

_TCP = 6
_PUSH_ACK = 0x18
_HOPS = 64
#: Addresses for a connection that has none: ports that no program has registered.
_NOWHERE = socket.inet_pton(socket.AF_INET, "127.0.0.1")
_NO_PORTS = (49152, 49153)


def _option(code: int, value: bytes) -> bytes:
    return struct.pack("<HH", code, len(value)) + value + bytes(-len(value) % 4)


def _text(code: int, text: str) -> bytes:
    return _option(code, text.encode("utf-8", "backslashreplace")[:_MOST_TEXT])


def _block(kind: int, body: bytes, *options: bytes) -> bytes:
    content = b"".join((body, *options, _option(_END, b"")))
    size = struct.pack("<I", len(content) + 12)
    return b"".join((struct.pack("<I", kind), size, content, size))


def section(comment: str, interface: str) -> bytes:
    """The blocks before the first packet. A file may have several sections, one behind the other."""
    head = struct.pack("<IHHQ", _BYTE_ORDER, 1, 0, _UNKNOWN_LENGTH)
    link = struct.pack("<HHI", _LINKTYPE_RAW, 0, 0)
    return _block(_SECTION_HEADER, head, _text(_COMMENT, comment), _text(_USER_APPLICATION, "geyamux")) + _block(
        _INTERFACE, link, _text(_INTERFACE_NAME, interface), _option(_TIME_RESOLUTION, b"\x09")
    )


def packet_block(packet: bytes, time_ns: int, comment: str, *, is_outgoing: bool) -> bytes:
    """A packet that passed at a moment, in nanoseconds since 1970, and what to say of it."""
    head = struct.pack("<IIIII", 0, time_ns >> 32, time_ns & 0xFFFF_FFFF, len(packet), len(packet))
    padding = bytes(-len(packet) % 4)
    flags = struct.pack("<I", _OUTBOUND if is_outgoing else _INBOUND)
    return _block(_PACKET, b"".join((head, packet, padding)), _text(_COMMENT, comment), _option(_FLAGS, flags))


class Conversation:
    """The packets of one TCP connection that may not exist, between the addresses of one that may."""

    def __init__(self, own: Any, peer: Any, *, is_client: bool) -> None:
        """`own` and `peer` are what ``getsockname`` and ``getpeername`` say, whatever that is."""
        ends = [_endpoint(own), _endpoint(peer)]
        if None in ends or len({len(end[0]) for end in ends if end}) != 1:
            ports = _NO_PORTS if is_client else _NO_PORTS[::-1]
            ends = [(_NOWHERE, port) for port in ports]
        #: Address and port of this side and of the other.
        self._ends = [end for end in ends if end is not None]
        #: Of the next byte of this side, and of the other.
        self._sequence = [1, 1]
        self._number = 0

    def packet(self, payload: bytes, *, is_outgoing: bool) -> bytes:
        """The next packet in a direction, with `MOST_PAYLOAD` bytes of payload at most."""
        near = 0 if is_outgoing else 1
        (source, source_port), (target, target_port) = self._ends[near], self._ends[1 - near]
        sequence, acknowledged = self._sequence[near], self._sequence[1 - near]
        self._sequence[near] = (sequence + len(payload)) & 0xFFFF_FFFF
        ports = struct.pack(">HHII", source_port, target_port, sequence, acknowledged)
        pseudo = source + target + struct.pack(">II", 20 + len(payload), _TCP)
        unsummed = ports + struct.pack(">BBHHH", 5 << 4, _PUSH_ACK, 0xFFFF, 0, 0) + payload
        tcp = unsummed[:16] + _checksum(pseudo + unsummed) + unsummed[18:]
        return self._ip_header(source, target, len(tcp)) + tcp

    def _ip_header(self, source: bytes, target: bytes, size: int) -> bytes:
        if len(source) == 16:
            return struct.pack(">IHBB", 6 << 28, size, _TCP, _HOPS) + source + target
        self._number = self._number + 1 & 0xFFFF
        head = struct.pack(">BBHHHBB", 0x45, 0, 20 + size, self._number, 0x4000, _HOPS, _TCP)
        return head + _checksum(head + source + target) + source + target


def _endpoint(address: Any) -> tuple[bytes, int] | None:
    """Address in bytes and port; None for what is no address of the internet."""
    if not isinstance(address, tuple) or len(address) < 2:
        return None
    host, port = address[:2]
    if not isinstance(host, str) or not isinstance(port, int) or not 0 <= port <= 0xFFFF:
        return None
    for family in (socket.AF_INET, socket.AF_INET6):
        try:
            return socket.inet_pton(family, host.partition("%")[0]), port
        except (OSError, ValueError):
            continue
    return None


def _checksum(data: bytes) -> bytes:
    """That of IP and TCP. The sum of words with end-around carry is the remainder by 65535, where 0 is 65535, too."""
    if len(data) % 2:
        data += b"\x00"
    return struct.pack(">H", 0xFFFF - (int.from_bytes(data, "big") % 0xFFFF or 0xFFFF))
