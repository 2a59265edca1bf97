"""py-libp2p's Yamux, on trio.

Its session ends, with every stream, on any GoAway, and it has no call for one that leaves the session
alive; so only quiet drains and closes are tried. It pings by itself, half a second after the start.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import pytest

from interop.peers import Link, LinkMaker, linked
from interop.suite import Basics, PeerCuts, PeerHalfCloses, PeerResets

pytestmark = pytest.mark.interop


@pytest.fixture
def make_link(libp2p_command: Sequence[str], role: str) -> LinkMaker:
    @contextlib.contextmanager
    def make(*, serve: bool = True) -> Iterator[Link]:
        with linked(libp2p_command, role, serve=serve) as link:
            yield link
            link.end()
        # Its warnings and errors go to standard error where nobody has set up its logging.
        assert link.peer.log == []

    return make


class TestLibp2p(Basics, PeerResets, PeerHalfCloses, PeerCuts):
    pass
