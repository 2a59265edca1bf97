"""The wire format, byte for byte."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from geyamux import frame
from geyamux.frame import (
    ACK,
    DATA,
    FIN,
    GO_AWAY,
    HEADER,
    HEADER_SIZE,
    INITIAL_WINDOW,
    MAX_LENGTH,
    MAX_STREAM_ID,
    PING,
    RST,
    SYN,
    WINDOW_UPDATE,
    GoAwayCode,
    describe,
)

LITERALS = [
    ((0, DATA, 0, 1, 5), "00 00 0000 00000001 00000005"),
    ((0, DATA, FIN, 3, 0), "00 00 0004 00000003 00000000"),
    ((0, WINDOW_UPDATE, SYN, 1, 0), "00 01 0001 00000001 00000000"),
    ((0, WINDOW_UPDATE, ACK, 2, 0x40000), "00 01 0002 00000002 00040000"),
    ((0, WINDOW_UPDATE, RST, 0xFFFFFFFF, 0), "00 01 0008 ffffffff 00000000"),
    ((0, WINDOW_UPDATE, 0, 0x01020304, 0x05060708), "00 01 0000 01020304 05060708"),
    ((0, PING, SYN, 0, 0xDEADBEEF), "00 02 0001 00000000 deadbeef"),
    ((0, PING, ACK, 0, 0xDEADBEEF), "00 02 0002 00000000 deadbeef"),
    ((0, GO_AWAY, 0, 0, GoAwayCode.NORMAL), "00 03 0000 00000000 00000000"),
    ((0, GO_AWAY, 0, 0, GoAwayCode.PROTOCOL_ERROR), "00 03 0000 00000000 00000001"),
    ((0, GO_AWAY, 0, 0, GoAwayCode.INTERNAL_ERROR), "00 03 0000 00000000 00000002"),
]

fields = st.tuples(
    st.integers(0, 0xFF),
    st.integers(0, 0xFF),
    st.integers(0, 0xFFFF),
    st.integers(0, 0xFFFFFFFF),
    st.integers(0, 0xFFFFFFFF),
)


@pytest.mark.parametrize(("header", "literal"), LITERALS)
def test_a_header_is_these_bytes(header, literal):
    assert HEADER.pack(*header) == bytes.fromhex(literal)
    assert HEADER.unpack(bytes.fromhex(literal)) == header


@given(fields)
def test_any_header_is_read_back_as_it_was_written(header):
    packed = HEADER.pack(*header)
    assert len(packed) == 12
    assert HEADER.unpack(packed) == header


def test_a_header_has_twelve_bytes():
    assert HEADER_SIZE == 12


def test_the_numbers_are_those_of_the_protocol():
    assert (DATA, WINDOW_UPDATE, PING, GO_AWAY) == (0, 1, 2, 3)
    assert (SYN, ACK, FIN, RST) == (1, 2, 4, 8)
    assert INITIAL_WINDOW == 262144
    assert MAX_LENGTH == MAX_STREAM_ID == 4294967295


def test_the_constants_of_the_hot_path_are_plain_integers():
    names = ("DATA", "WINDOW_UPDATE", "PING", "GO_AWAY", "SYN", "ACK", "FIN", "RST")
    assert {type(getattr(frame, name)) for name in names} == {int}


@pytest.mark.parametrize(
    ("header", "text"),
    [
        ((DATA, FIN, 3, 17), "Data stream 3 FIN length 17"),
        ((DATA, 0, 1, 0), "Data stream 1 length 0"),
        ((WINDOW_UPDATE, SYN | ACK | FIN | RST, 2, 1), "WindowUpdate stream 2 SYN|ACK|FIN|RST length 1"),
        ((PING, ACK, 0, 9), "Ping stream 0 ACK length 9"),
        ((GO_AWAY, 0, 0, 1), "GoAway stream 0 length 1"),
        ((4, 0, 5, 6), "type 4 stream 5 length 6"),
        ((0xFF, SYN, 5, 6), "type 255 stream 5 SYN length 6"),
        ((DATA, SYN | 0x8010, 1, 2), "Data stream 1 SYN|unknown flags 0x8010 length 2"),
        ((DATA, 0x40, 1, 2), "Data stream 1 unknown flags 0x40 length 2"),
    ],
)
def test_a_header_is_described_in_words(header, text):
    assert describe(*header) == text


@given(fields)
def test_any_header_can_be_described(header):
    _, kind, flags, stream_id, length = header
    text = describe(kind, flags, stream_id, length)
    assert f"stream {stream_id} " in text
    assert text.endswith(f"length {length}")
