"""What goes ahead of the queue: how it merges, vanishes, and is capped. How it leaves is told in test_outbox.py."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from geyamux.errors import ProtocolError
from geyamux.flow import ReceiveBudget, ReceiveBuffer
from geyamux.urgent import UrgentLane
from support.wire import ACK, RST, SYN, Decoder, ping, window_update


class Lane(UrgentLane):
    def __init__(self) -> None:
        super().__init__()
        self.schedules = 0

    def _schedule(self):
        self.schedules += 1

    def made(self) -> bytes:
        return b"".join(self._take_urgent())


@pytest.fixture
def lane() -> Lane:
    return Lane()


def taken_buffer(taken: int, unread: int = 0) -> ReceiveBuffer:
    buffer = ReceiveBuffer(ReceiveBudget(1 << 30, 262144))
    if taken + unread:
        buffer.append(b"x" * (taken + unread))
    if taken:
        buffer.take(taken)
    return buffer


def test_each_makes_its_frame_and_sees_that_it_leaves(lane):
    for count, (do, made) in enumerate(
        [
            (lambda: lane.ping(7), "000200010000000000000007"),
            (lambda: lane.pong(8), "000200020000000000000008"),
            (lambda: lane.reset(3, 9), "000100080000000300000009"),
            (lambda: lane.refuse(3), "000100080000000300000000"),
            (lambda: lane.acknowledge(2, 5), "000100020000000200000005"),
            (lambda: lane.grant(1, taken_buffer(1000)), "0001000000000001000003e8"),
        ],
        start=1,
    ):
        do()
        assert lane.schedules == count
        assert lane._is_urgent
        assert lane.made().hex() == made
        assert not lane._is_urgent
        assert lane.made() == b""


def test_pings_come_first_then_pongs_resets_acknowledgements_and_credit(lane):
    lane.grant(9, taken_buffer(10))
    lane.acknowledge(7, 0)
    lane.reset(5)
    lane.pong(1)
    lane.ping(2)
    assert lane.made() == ping(SYN, 2) + ping(ACK, 1) + window_update(5, 0, RST) + window_update(
        7, 0, ACK
    ) + window_update(9, 10)


def test_credit_is_counted_when_the_frame_is_made(lane):
    buffer = taken_buffer(10, unread=100)
    lane.grant(9, buffer)
    buffer.take(100)
    lane.grant(9, buffer)
    assert lane.made() == window_update(9, 110)
    lane.grant(9, buffer)
    assert lane.made() == b""


def test_only_the_latest_ping_is_made(lane):
    lane.ping(1)
    lane.ping(2)
    assert lane.made() == ping(SYN, 2)


def test_thirty_two_pongs_wait_and_no_more(lane):
    for value in range(50):
        lane.pong(value)
    assert lane.schedules == 32
    assert lane.made() == b"".join(ping(ACK, value) for value in range(32))


def test_a_peer_may_provoke_8192_resets_that_wait_and_no_more(lane):
    for stream_id in range(8192):
        lane.refuse(stream_id)
    with pytest.raises(ProtocolError, match="8192"):
        lane.refuse(9000)
    lane.reset(9000)  # our own are not its fault
    assert lane.made().count(window_update(9000, 0, RST)) == 1
    lane.refuse(9000)


def test_a_reset_takes_the_place_of_what_waits_for_its_stream(lane):
    lane.acknowledge(2, 0)
    lane.grant(2, taken_buffer(10))
    lane.reset(2, 1)
    lane.reset(2, 2)
    assert lane.made() == window_update(2, 2, RST)


def test_an_id_used_anew_is_reset_first(lane):
    lane.reset(2)
    lane.acknowledge(2, 0)
    assert lane.made() == window_update(2, 0, RST) + window_update(2, 0, ACK)


def test_what_is_forgotten_is_not_made(lane):
    lane.acknowledge(2, 0)
    lane.grant(2, taken_buffer(10))
    lane.forget(2)
    lane.forget(4)
    assert lane.made() == b""


def test_credit_may_be_forgotten_alone(lane):
    lane.acknowledge(2, 0)
    lane.grant(2, taken_buffer(10))
    lane.forget_grant(2)
    lane.forget_grant(4)
    assert lane.made() == window_update(2, 0, ACK)


def test_resets_and_acknowledgements_are_counted(lane):
    lane.reset(1)
    lane.reset(1)
    lane.acknowledge(2, 0)
    lane.pong(3)
    assert lane._urgent_frames() == 2
    lane.made()
    assert lane._urgent_frames() == 0


def test_what_is_cleared_is_not_made(lane):
    lane.ping(1)
    lane.pong(1)
    lane.reset(1)
    lane.acknowledge(2, 0)
    lane.grant(3, taken_buffer(10))
    lane._clear_urgent()
    assert not lane._is_urgent
    assert lane.made() == b""


def test_it_is_no_outbox_by_itself():
    with pytest.raises(NotImplementedError):
        UrgentLane().ping(1)


actions = st.lists(
    st.tuples(st.sampled_from(["ack", "reset", "grant", "forget", "forget grant"]), st.sampled_from([1, 2, 3])),
    max_size=30,
)


@given(actions)
def test_a_stream_has_one_frame_of_a_kind_at_most_and_none_but_an_acknowledgement_after_its_reset(steps):
    lane = Lane()
    acks, resets, grants = set(), set(), set()
    for action, stream_id in steps:
        if action == "ack":
            lane.acknowledge(stream_id, 0)
            acks.add(stream_id)
        elif action == "grant":
            lane.grant(stream_id, taken_buffer(5))
            grants.add(stream_id)
        else:
            grants.discard(stream_id)
            if action == "forget grant":
                lane.forget_grant(stream_id)
                continue
            acks.discard(stream_id)
            if action == "reset":
                lane.reset(stream_id)
                resets.add(stream_id)
            else:
                lane.forget(stream_id)
    frames = Decoder().feed(lane.made())
    assert sorted((frame.flags, frame.stream_id) for frame in frames) == sorted(
        [(ACK, stream_id) for stream_id in acks]
        + [(RST, stream_id) for stream_id in resets]
        + [(0, stream_id) for stream_id in grants]
    )
