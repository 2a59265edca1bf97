"""`makefile()`: the raw file object over anything that looks like a socket.

The standard library's own ``socket.SocketIO`` does the work, so that code which digs (``rfile.raw._sock``) finds what it
knows. Only the name differs: the original asks for a descriptor, and ``zipfile`` and ``tarfile`` ask for the name.
"""

from __future__ import annotations

import io
import socket
from typing import Any

__all__ = ["StreamIO", "makefile"]


class StreamIO(socket.SocketIO):
    """A raw file over one stream. It counts as a user of the stream until it is closed."""

    def __init__(self, stream: Any, mode: Any) -> None:
        super().__init__(stream, mode)
        self._stream_id = stream.stream_id

    @property
    def name(self) -> int:
        """The id of the stream: an int, as for a socket. A str would leak into the headers of archives."""
        return int(self._stream_id)


def makefile(
    stream: Any, mode: str, buffering: int | None, encoding: str | None, errors: str | None, newline: str | None
) -> Any:
    """Make the file object that ``socket.makefile`` would make."""
    if not set(mode) <= {"r", "w", "b"}:
        raise ValueError(f"invalid mode {mode!r} (only r, w, b allowed)")
    writing = "w" in mode
    reading = "r" in mode or not writing
    raw = StreamIO(stream, ("r" if reading else "") + ("w" if writing else ""))
    stream._io_refs += 1
    if buffering is None or buffering < 0:
        buffering = io.DEFAULT_BUFFER_SIZE
    if buffering == 0:
        if "b" not in mode:
            raw.close()
            raise ValueError("unbuffered streams must be binary")
        return raw
    buffer: Any
    if reading and writing:
        buffer = io.BufferedRWPair(raw, raw, buffering)
    elif reading:
        buffer = io.BufferedReader(raw, buffering)
    else:
        buffer = io.BufferedWriter(raw, buffering)
    if "b" in mode:
        return buffer
    text = io.TextIOWrapper(buffer, encoding, errors, newline)
    text.mode = mode  # type: ignore[misc]  # as socket.makefile does
    return text
