"""The test plays the peer, frame by frame, over one end of a connection."""

from __future__ import annotations

import gevent
from gevent.hub import get_hub

from .transports import Transport
from .wire import BytesLike, Decoder, Frame, WireError

PATIENCE = 10.0
"""Seconds for what must come. Long, because it is used up only by a test that fails."""


def settle() -> None:
    """Return when nothing is left that this hub could do without time passing."""
    # libuv serves its idle watchers in every turn of the loop, so there turns are counted instead.
    turns = 50 if "libuv" in type(get_hub().loop).__module__ else 5
    for _ in range(turns):
        gevent.idle()


class RawPeer:
    """A peer that sends exactly what it is told to, and must be told what it shall hear."""

    def __init__(self, transport: Transport, patience: float = PATIENCE) -> None:
        self.transport = transport
        self.patience = patience
        self.received = bytearray()
        self._decoder = Decoder()
        self._frames: list[Frame] = []

    def send(self, data: BytesLike) -> None:
        self.transport.sendall(data)

    def next(self, timeout: float | None = None) -> Frame:
        """The next frame, of any kind."""
        seconds = self.patience if timeout is None else timeout
        with gevent.Timeout(seconds, WireError(f"no frame within {seconds} s")):
            while not self._frames:
                if not self._receive():
                    raise WireError("the connection ended where a frame was expected")
        return self._frames.pop(0)

    def expect(self, type: int, flags: int, stream_id: int | None = None, length: int | None = None) -> Frame:
        """The next frame, which must be this one."""
        found = self.next()
        wanted = (type, flags, found.stream_id if stream_id is None else stream_id)
        if (found.type, found.flags, found.stream_id) != wanted:
            raise WireError(f"expected type {type}, flags {flags}, stream {stream_id}; got {found}")
        if length is not None and found.length != length:
            raise WireError(f"expected length {length}; got {found}")
        return found

    def expect_data(self, stream_id: int, body: BytesLike) -> None:
        """Exactly these bytes on the stream, in Data frames of any size."""
        wanted, body = bytes(body), b""
        while len(body) < len(wanted):
            body += self.expect(0x0, 0, stream_id).body
        if body != wanted:
            raise WireError(f"expected {wanted[:60]!r}; got {body[:60]!r}")

    def expect_nothing(self) -> None:
        """Fail if a frame is there, or part of one, or the end, once all is quiet."""
        reader = gevent.spawn(self._receive)
        try:
            settle()
            if reader.ready():
                raise WireError("the connection ended" if not reader.get() else "bytes came")
        except WireError as error:
            raise WireError(f"expected nothing: {error}; {[str(found) for found in self._frames]}") from None
        finally:
            reader.kill()
        if self._frames:
            raise WireError(f"expected nothing; got {[str(found) for found in self._frames]}")

    def expect_eof(self) -> None:
        """The connection must end here, at the end of a frame."""
        rest = self.rest()
        if rest:
            raise WireError(f"expected the end; got {[str(found) for found in rest]}")

    def rest(self) -> list[Frame]:
        """All frames to the end of the connection."""
        seconds = self.patience
        with gevent.Timeout(seconds, WireError(f"the connection did not end within {seconds} s")):
            while self._receive():
                pass
        self._decoder.finish()
        frames, self._frames = self._frames, []
        return frames

    def close(self) -> None:
        self.transport.close()

    def _receive(self) -> bool:
        """Take what comes next; False at the end."""
        chunk = self.transport.recv(65536)
        self.received += chunk
        self._frames += self._decoder.feed(chunk)
        return bool(chunk)

    def __enter__(self) -> RawPeer:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()
