"""The life of a stream: a handshake and two halves, as one table.

Rule 1: everything that decides what state a stream is in stands in this file.
Rule 2: this file sends nothing, wakes nobody and counts nothing; it says what is so, others act on it.

A state is one of a few shared objects, so that a stream pays one reference for it. It has three parts:

* the handshake: ``SYN_SENT`` (we opened, nothing heard yet), ``SYN_RECEIVED`` (the peer opened, not yet accepted here)
  or ``ESTABLISHED``;
* the receiving half: open until the peer's FIN;
* the sending half: open until our FIN.

``RESET`` ends both halves at once, whoever did it. See ``spec.md`` R2, R6, R7, R16-R18.

======================  ======================================================================
event                   next state
======================  ======================================================================
frame from the peer     SYN_SENT becomes ESTABLISHED, whatever the frame is
... with FIN            the receiving half ends
... with RST            RESET, whatever else the frame says
accept() here           SYN_RECEIVED becomes ESTABLISHED
our FIN is queued       the sending half ends
reset here              RESET
======================  ======================================================================
"""

from __future__ import annotations

import itertools

from .frame import FIN, RST

__all__ = ["Lifecycle"]

_SYN_SENT = "SYN_SENT"
_SYN_RECEIVED = "SYN_RECEIVED"
_ESTABLISHED = "ESTABLISHED"


class Lifecycle:
    """One state of a stream. Compare with ``is``; never make one yourself."""

    __slots__ = (
        "_on_flags",
        "accepted",
        "acknowledged",
        "can_receive",
        "can_send",
        "ended",
        "finished",
        "is_granted",
        "is_reset",
        "name",
    )

    #: What we opened starts here.
    SYN_SENT: Lifecycle
    #: What the peer opened starts here.
    SYN_RECEIVED: Lifecycle
    #: Both know it and nothing has ended: the state of nearly every frame.
    ESTABLISHED: Lifecycle
    #: Where a reset leads, from everywhere.
    RESET: Lifecycle

    def __init__(self, handshake: str, *, can_receive: bool, can_send: bool, is_reset: bool = False) -> None:
        halves = {(True, True): "", (False, True): ", peer finished", (True, False): ", finished here"}
        #: For people.
        self.name = "RESET" if is_reset else handshake + halves.get((can_receive, can_send), ", ended")
        #: False while an own stream has not heard from the peer yet: it takes a place in the backlog.
        self.acknowledged = handshake != _SYN_SENT
        #: Our SYN or ACK has told the peer how large our window is beyond the initial one.
        self.is_granted = handshake != _SYN_RECEIVED
        #: The peer has not ended its half: data may still come.
        self.can_receive = can_receive
        #: Our FIN has not been queued: data may still go.
        self.can_send = can_send
        #: Given up by one side.
        self.is_reset = is_reset
        #: Nothing more goes either way; the id is free again.
        self.ended = not can_receive and not can_send
        self._on_flags: tuple[Lifecycle, ...] = ()
        self.accepted: Lifecycle = self
        self.finished: Lifecycle = self

    def on_frame(self, flags: int) -> Lifecycle:
        """The state after a frame of the peer with these flags. SYN is checked elsewhere; unknown bits say nothing."""
        return self._on_flags[flags & 0xF]

    def __repr__(self) -> str:
        return f"<Lifecycle {self.name}>"


def _build_table() -> dict[tuple[str, bool, bool], Lifecycle]:
    """Make every state and tie them together."""
    both = (True, False)
    states = {
        key: Lifecycle(key[0], can_receive=key[1], can_send=key[2])
        for key in itertools.product((_SYN_SENT, _SYN_RECEIVED, _ESTABLISHED), both, both)
    }
    reset = Lifecycle(_ESTABLISHED, can_receive=False, can_send=False, is_reset=True)
    reset._on_flags = (reset,) * 16
    for (handshake, can_receive, can_send), state in states.items():
        heard = _ESTABLISHED if handshake == _SYN_SENT else handshake
        state._on_flags = tuple(
            reset if flags & RST else states[heard, can_receive and not flags & FIN, can_send] for flags in range(16)
        )
        state.accepted = states[_ESTABLISHED, can_receive, can_send]
        state.finished = states[handshake, can_receive, False]
    Lifecycle.SYN_SENT = states[_SYN_SENT, True, True]
    Lifecycle.SYN_RECEIVED = states[_SYN_RECEIVED, True, True]
    Lifecycle.ESTABLISHED = states[_ESTABLISHED, True, True]
    Lifecycle.RESET = reset
    return states


_build_table()
