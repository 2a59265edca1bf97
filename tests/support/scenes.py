"""One stream of a session whose peer the test plays, and the literal bytes that pass between them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from geyamux import Client, Config, Server, Session

from .facing import start
from .links import PATIENCE, make_link
from .rawpeer import RawPeer
from .transports import FaultyTransport
from .wire import BytesLike, Frame, WireError, frame

KINDS = ("client-opened", "client-accepted", "server-opened", "server-accepted")
"""Which side of the session is ours, and who opened the stream."""


def literal(text: str, stream_id: int) -> bytes:
    """The bytes of a header written in hexadecimal, `ID` being the stream's."""
    return bytes.fromhex(text.replace("ID", f"{stream_id:08x}"))


class FilePair:
    """A pair of files in the shape of a socket, for a peer that is played."""

    # Any: gevent's file objects have no common type.
    def __init__(self, reader: Any, writer: Any) -> None:
        self.reader = reader
        self.writer = writer

    def recv(self, size: int) -> bytes:
        return bytes(self.reader.read(size))

    def sendall(self, data: BytesLike) -> None:
        rest = memoryview(bytes(data))
        while rest:
            rest = rest[self.writer.write(rest) :]

    def close(self) -> None:
        self.reader.close()
        self.writer.close()


class Scene:
    """A session and its peer. `stream` is set once there is one; `id` is its number."""

    def __init__(self, session: Session, peer: RawPeer, transport: Any) -> None:
        self.session = session
        self.peer = peer
        #: What the session was made over; it has a `log` where it is a FaultyTransport.
        self.transport = transport
        self.stream: Any = None
        self.id = 0

    def send(self, text: str, body: BytesLike = b"") -> None:
        """Send a frame of the peer's: a literal header, a body."""
        self.peer.send(literal(text, self.id) + bytes(body))

    def data(self, body: BytesLike, flags: str = "0000") -> None:
        """Send a Data frame of the peer's."""
        self.send(f"00 00 {flags} ID {len(body):08x}", body)

    def expect(self, text: str, body: BytesLike = b"") -> None:
        """The next frame of the session must be exactly this."""
        wanted = literal(text, self.id) + bytes(body)
        found = self.peer.next()
        if frame(*found[1:]) != wanted:
            raise WireError(f"expected {wanted[:12].hex(' ')}, {len(body)} bytes; got {found}")

    def expect_data(self, body: BytesLike) -> None:
        """The next frames must be Data without flags with these bytes."""
        self.peer.expect_data(self.id, body)

    def expect_nothing(self) -> None:
        self.peer.expect_nothing()

    def frames_there(self) -> list[Frame]:
        """All frames that come without time passing."""
        found = []
        while (reading := start(self.peer.next, PATIENCE)).ready():
            found.append(reading.get())
        reading.kill()
        return found

    def open(self) -> Any:
        """Open a stream here, see its SYN leave, and acknowledge it."""
        self.stream = self.session.open()
        self.id = self.stream.stream_id
        extra = self.session.config.max_stream_window - 262144
        self.expect(f"00 01 0001 ID {extra:08x}")
        self.send("00 01 0002 ID 00000000")
        return self.stream

    def accept(self) -> Any:
        """Let the peer open a stream, take it, and see its ACK leave."""
        self.id = (2 if self.session.is_client else 1) if not self.id else self.id + 2
        self.send("00 01 0001 ID 00000000")
        self.stream = self.session.accept(timeout=PATIENCE)
        extra = self.session.config.max_stream_window - 262144
        self.expect(f"00 01 0002 ID {extra:08x}")
        return self.stream


@contextlib.contextmanager
def played(
    kind: str = "socketpair", config: Config | None = None, *, client: bool = False, faulty: bool = False
) -> Iterator[Scene]:
    """A session over a new link of that kind, and its peer; no stream yet. `faulty`: over a FaultyTransport."""
    with make_link(kind) as link:
        ours, theirs = link
        if isinstance(theirs, tuple):
            theirs = FilePair(*theirs)
        if faulty:
            ours = FaultyTransport(ours)
        session = (Client if client else Server)(ours, config)
        try:
            yield Scene(session, RawPeer(theirs), ours)
        finally:
            session.abort()
            session.join(PATIENCE)


@contextlib.contextmanager
def scene_of(
    name: str, config: Config | None = None, kind: str = "socketpair", *, faulty: bool = False
) -> Iterator[Scene]:
    """`played`, with a stream: `name` is one of `KINDS`."""
    side, by = name.split("-")
    with played(kind, config, client=side == "client", faulty=faulty) as scene:
        if by == "opened":
            scene.open()
        else:
            scene.accept()
        yield scene
