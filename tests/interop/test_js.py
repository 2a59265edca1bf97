"""@chainsafe/libp2p-yamux on Node.js, over a plain socket.

It ends every stream, as if by FIN, on GoAway(0), and leaves TCP open; so only quiet drains and closes
are tried. When it closes a session it sends FIN on each open stream first, so no stream is cut by it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import pytest

from interop.peers import Link, LinkMaker, linked
from interop.suite import Basics, PeerHalfCloses, PeerResets

pytestmark = pytest.mark.interop


@pytest.fixture
def make_link(js_command: Sequence[str], role: str) -> LinkMaker:
    @contextlib.contextmanager
    def make(*, serve: bool = True) -> Iterator[Link]:
        with linked(js_command, role, serve=serve) as link:
            yield link
            link.end()
        # What its muxer and streams log as errors, but for the resets that were asked for.
        assert link.peer.log == []

    return make


class TestJs(Basics, PeerResets, PeerHalfCloses):
    pass
