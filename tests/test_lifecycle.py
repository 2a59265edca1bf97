"""Every event in every state of a stream, against a table written by hand."""

from __future__ import annotations

import itertools

import pytest

from geyamux.lifecycle import Lifecycle

SYN, ACK, FIN, RST = 1, 2, 4, 8

# Each state by its name. Columns: after a frame of the peer without FIN and RST, after one with FIN, after accept()
# here, after our FIN; then whether it is acknowledged, granted, can receive, can send, is ended. RST leads to RESET.
TABLE = {
    "SYN_SENT": (
        ("ESTABLISHED", "ESTABLISHED, peer finished", "ESTABLISHED", "SYN_SENT, finished here"),
        (False, True, True, True, False),
    ),
    "SYN_SENT, finished here": (
        (
            "ESTABLISHED, finished here",
            "ESTABLISHED, ended",
            "ESTABLISHED, finished here",
            "SYN_SENT, finished here",
        ),
        (False, True, True, False, False),
    ),
    "SYN_RECEIVED": (
        ("SYN_RECEIVED", "SYN_RECEIVED, peer finished", "ESTABLISHED", "SYN_RECEIVED, finished here"),
        (True, False, True, True, False),
    ),
    "SYN_RECEIVED, peer finished": (
        (
            "SYN_RECEIVED, peer finished",
            "SYN_RECEIVED, peer finished",
            "ESTABLISHED, peer finished",
            "SYN_RECEIVED, ended",
        ),
        (True, False, False, True, False),
    ),
    "SYN_RECEIVED, finished here": (
        (
            "SYN_RECEIVED, finished here",
            "SYN_RECEIVED, ended",
            "ESTABLISHED, finished here",
            "SYN_RECEIVED, finished here",
        ),
        (True, False, True, False, False),
    ),
    "SYN_RECEIVED, ended": (
        ("SYN_RECEIVED, ended", "SYN_RECEIVED, ended", "ESTABLISHED, ended", "SYN_RECEIVED, ended"),
        (True, False, False, False, True),
    ),
    "ESTABLISHED": (
        ("ESTABLISHED", "ESTABLISHED, peer finished", "ESTABLISHED", "ESTABLISHED, finished here"),
        (True, True, True, True, False),
    ),
    "ESTABLISHED, peer finished": (
        (
            "ESTABLISHED, peer finished",
            "ESTABLISHED, peer finished",
            "ESTABLISHED, peer finished",
            "ESTABLISHED, ended",
        ),
        (True, True, False, True, False),
    ),
    "ESTABLISHED, finished here": (
        (
            "ESTABLISHED, finished here",
            "ESTABLISHED, ended",
            "ESTABLISHED, finished here",
            "ESTABLISHED, finished here",
        ),
        (True, True, True, False, False),
    ),
    "ESTABLISHED, ended": (
        ("ESTABLISHED, ended", "ESTABLISHED, ended", "ESTABLISHED, ended", "ESTABLISHED, ended"),
        (True, True, False, False, True),
    ),
    "RESET": (("RESET", "RESET", "RESET", "RESET"), (True, True, False, False, True)),
}


def reachable() -> dict[str, Lifecycle]:
    """Every state to which any chain of events leads."""
    found: dict[str, Lifecycle] = {}
    waiting = [Lifecycle.SYN_SENT, Lifecycle.SYN_RECEIVED, Lifecycle.RESET]
    while waiting:
        state = waiting.pop()
        if state.name not in found:
            found[state.name] = state
            waiting += [state.on_frame(flags) for flags in range(16)] + [state.accepted, state.finished]
    return found


STATES = reachable()


def expected_after_frame(name: str, flags: int) -> str:
    plain, with_fin, _, _ = TABLE[name][0]
    return "RESET" if flags & RST else with_fin if flags & FIN else plain


def test_the_states_are_exactly_those_of_the_table():
    assert set(STATES) == set(TABLE)


def test_there_is_one_object_for_each_state():
    for state in STATES.values():
        for flags in range(16):
            following = state.on_frame(flags)
            assert following is STATES[following.name]
        assert state.accepted is STATES[state.accepted.name]
        assert state.finished is STATES[state.finished.name]


@pytest.mark.parametrize(("name", "flags"), list(itertools.product(TABLE, range(16))))
def test_a_frame_of_the_peer_leads_where_the_table_says(name, flags):
    assert STATES[name].on_frame(flags).name == expected_after_frame(name, flags)


@pytest.mark.parametrize("name", TABLE)
def test_unknown_flag_bits_change_nothing(name):
    for bit, flags in itertools.product(range(4, 16), range(16)):
        assert STATES[name].on_frame(flags | 1 << bit).name == expected_after_frame(name, flags)
    assert STATES[name].on_frame(0xFFF0).name == expected_after_frame(name, 0)


@pytest.mark.parametrize("name", TABLE)
def test_what_happens_here_leads_where_the_table_says(name):
    _, _, accepted, finished = TABLE[name][0]
    assert STATES[name].accepted.name == accepted
    assert STATES[name].finished.name == finished


@pytest.mark.parametrize("name", TABLE)
def test_a_state_says_what_is_so(name):
    state = STATES[name]
    said = (state.acknowledged, state.is_granted, state.can_receive, state.can_send, state.ended)
    assert said == TABLE[name][1]
    assert state.is_reset is (name == "RESET")


def test_the_beginnings_and_the_reset_are_named():
    assert Lifecycle.SYN_SENT is STATES["SYN_SENT"]
    assert Lifecycle.SYN_RECEIVED is STATES["SYN_RECEIVED"]
    assert Lifecycle.RESET is STATES["RESET"]


def test_no_half_is_ever_opened_again():
    for state in STATES.values():
        for following in [state.on_frame(flags) for flags in range(16)] + [state.accepted, state.finished]:
            assert state.can_receive or not following.can_receive
            assert state.can_send or not following.can_send
            assert following.acknowledged or not state.acknowledged
            assert following.is_reset or not state.is_reset


@pytest.mark.parametrize("name", TABLE)
def test_a_state_shows_its_name(name):
    assert repr(STATES[name]) == f"<Lifecycle {name}>"
