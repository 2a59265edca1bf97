"""TLS over a stream without urllib3: the twenty lines that `ssl.SSLContext.wrap_bio` leaves to its user."""

from __future__ import annotations

import ssl
from collections.abc import Callable
from typing import Any, TypeVar

Result = TypeVar("Result")


class TlsEnd:
    """One end of TLS over anything with `recv` and `sendall`."""

    def __init__(self, stream: Any, context: ssl.SSLContext, *, server_hostname: str | None = None) -> None:
        self._stream = stream
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        server_side = context.protocol == ssl.PROTOCOL_TLS_SERVER
        self.tls = context.wrap_bio(self._incoming, self._outgoing, server_side, server_hostname)
        self._pump(self.tls.do_handshake)

    def recv(self, size: int) -> bytes:
        """Some of the peer's bytes; b"" when it has ended TLS; ``ssl.SSLEOFError`` when just the stream ends."""
        try:
            return self._pump(self.tls.read, size)
        except ssl.SSLZeroReturnError:
            return b""

    def read(self) -> bytes:
        """Everything until the peer ends TLS."""
        return b"".join(iter(lambda: self.recv(65536), b""))

    def sendall(self, data: bytes) -> None:
        """All of `data`."""
        view = memoryview(data)
        while view:
            view = view[self._pump(self.tls.write, view) :]

    def unwrap(self) -> None:
        """End TLS, and wait until the peer has."""
        self._pump(self.tls.unwrap)

    def _pump(self, step: Callable[..., Result], *args: Any) -> Result:
        while True:
            try:
                result = step(*args)
            except ssl.SSLWantReadError:
                self._flush()
                if data := self._stream.recv(65536):
                    self._incoming.write(data)
                else:
                    self._incoming.write_eof()
            except ssl.SSLError:
                self._flush()  # the alert that tells the peer
                raise
            else:
                self._flush()
                return result

    def _flush(self) -> None:
        self._stream.sendall(self._outgoing.read())
