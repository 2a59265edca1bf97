"""A session in the shape of a listening socket, for code that expects ``(conn, address)``."""

from __future__ import annotations

from typing import Any

__all__ = ["Listener"]


class Listener:
    """What ``Session.listener()`` returns. It has no descriptor: servers that poll one can't use it."""

    def __init__(self, session: Any) -> None:
        self._session = session

    @property
    def family(self) -> int:
        """The address family of the connection below."""
        return int(self._session.family)

    def accept(self) -> tuple[Any, Any]:
        """Wait for a stream as ``Session.accept`` does; return it with its peer's address."""
        stream = self._session.accept()
        return stream, stream.getpeername()

    def getsockname(self) -> Any:
        """The own address of the connection below, ("yamux", 0) where it has none."""
        return self._session.getsockname() or ("yamux", 0)

    def close(self) -> None:
        """Take no new streams: ``Session.go_away``. Streams and session live on."""
        self._session.go_away()

    def __enter__(self) -> Listener:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<geyamux.Listener of {self._session!r}>"
