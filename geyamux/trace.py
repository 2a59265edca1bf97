"""Watch the frames of one session: :class:`Log` says them in words, :class:`Pcapng` writes them for Wireshark. ::

    with geyamux.trace.Log(session):
        ...
    with geyamux.trace.Pcapng(session, "session.pcapng"):
        ...

A trace may begin and end at any time in the life of a session, and there may be several of one. It shows both directions,
above TLS, from the next frame on: what is under way in the middle of a frame when it begins is left out. A sent frame is
shown when the connection has taken its bytes, a received one as it arrives, each with the time of that.

Sessions that nobody watches pay nothing: what a trace needs is put in the way of one session, and taken away again.

Two rules hold. A trace never harms its session: whatever it writes to is written by a greenlet of its own, and if that
fails, or falls behind by more than about 64 MiB, the trace ends with one warning in the log. And a trace never leaves
anything out: it is whole up to its end.
"""

from __future__ import annotations

import contextlib
import errno
import io
import logging
import os
import stat
import time
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import IO, Any, NamedTuple

import gevent

from .frame import DATA, GO_AWAY, HEADER, HEADER_SIZE, describe
from .logs import log
from .pcapng import MOST_PAYLOAD, Conversation, packet_block, section
from .session import Session

__all__ = ["Log", "Pcapng", "Trace"]

_own_logger = logging.getLogger("geyamux")
#: Where a `Log` goes that was given nothing else.
logger = logging.getLogger("geyamux.trace")

#: About so many bytes, of words characters, may wait to be written: a file that is slower than the session for long must
#: not take all memory.
_MOST_WAITING = 64 << 20
#: So many frames are joined for one write, so that what waits is not copied as a whole.
_MOST_JOINED = 64

#: What shows the bytes of a session to its traces, while it has any.
_taps: dict[Session, _Tap] = {}


class _Part(NamedTuple):
    """Bytes of one frame, or of none."""

    #: Type, flags, stream id and length; None where the bytes are no frame of Yamux.
    header: tuple[int, int, int, int] | None
    data: bytes
    #: Where they begin in their frame, header included, and the size of all of it.
    offset: int
    size: int

    def __str__(self) -> str:
        if self.header is None:
            return f"no frame of Yamux ({len(self.data)} bytes)"
        text = describe(*self.header)
        is_whole = len(self.data) == self.size
        return text if is_whole else f"{text} (bytes {self.offset} to {self.offset + len(self.data)} of {self.size})"


class _Cutter:
    """Cuts the bytes of one direction into frames. A header that is not complete is kept until it is."""

    def __init__(self, skip: int, rest: bytes, *, is_lost: bool) -> None:
        #: Bytes of a frame that began before.
        self._skip = skip
        self._rest = rest
        #: Nobody knows where the next frame begins.
        self._is_lost = is_lost
        self._header = (0, 0, 0, 0)
        #: Bytes of the current frame that have not come, and all of them.
        self._left = self._size = 0

    def cut(self, data: bytes) -> list[_Part]:
        skipped = min(self._skip, len(data))
        self._skip -= skipped
        data = self._rest + data[skipped:]
        self._rest = b""
        parts: list[_Part] = []
        position = 0
        while position < len(data):
            if not self._left and not self._is_lost:
                if len(data) - position < HEADER_SIZE:
                    self._rest = data[position:]
                    break
                self._begin(data, position)
            if self._is_lost:
                parts.append(_Part(None, data[position:], 0, len(data) - position))
                break
            piece = data[position : position + self._left]
            parts.append(_Part(self._header, piece, self._size - self._left, self._size))
            self._left -= len(piece)
            position += len(piece)
        return parts

    def _begin(self, data: bytes, position: int) -> None:
        version, kind, flags, stream_id, length = HEADER.unpack_from(data, position)
        self._is_lost = bool(version) or kind > GO_AWAY
        self._header = (kind, flags, stream_id, length)
        self._left = self._size = HEADER_SIZE + (length if kind == DATA else 0)

    def end(self) -> list[_Part]:
        """What is left: the beginning of a header."""
        rest, self._rest = self._rest, b""
        return [_Part(None, rest, 0, len(rest))] if rest else []


class Trace:
    """What the two kinds of traces have in common. Begin one with ``with`` or :meth:`start`."""

    def __init__(self, session: Session) -> None:
        self._session = session
        #: What ended it, where that was no :meth:`stop` and no end of the session.
        self.error: BaseException | None = None
        #: It has begun and not ended.
        self.is_running = False
        self._received = self._sent = _Cutter(0, b"", is_lost=True)
        #: What is sent before this position began before the trace did.
        self._begins_at = 0
        self._waiting: list[Any] = []
        self._waiting_bytes = 0
        self._greenlet: gevent.Greenlet[..., None] | None = None
        self._process = 0

    def start(self) -> None:
        """Begin with the next frame. Does nothing where it runs. Never blocks, but for opening a file.

        Raises what ended the session, OSError for a file that can't be opened, ValueError for a path that is not of a
        regular file (see `Pcapng`), RuntimeError in another thread and where it was stopped in the hub and has not
        written everything yet.
        """
        session = self._session
        session._check_thread()
        session._check_alive()
        if self.is_running:
            return
        if self._greenlet is not None and not self._greenlet.ready():
            raise RuntimeError("what was traced before is still being written")
        self._open()
        self.error, self._process = None, os.getpid()
        outbox, place = session._outbox, session._reader.place
        self._received = _Cutter(*(place or (0, b"")), is_lost=place is None)
        self._sent, self._begins_at = _Cutter(0, b"", is_lost=False), outbox.next_frame_at
        self.is_running = True
        if session not in _taps:
            _taps[session] = _Tap(session)
        _taps[session].traces.append(self)
        session.rawlink(self._on_session_end)
        self._take(self._received.cut(b""), is_outgoing=False)

    def stop(self) -> None:
        """End it, and return when all that was traced is written; fine for one that has ended.

        Waits for what it writes to, without limit: use gevent.Timeout where an `emit` or a file may never return. In the
        hub it does not wait, and the rest is written soon.
        """
        self._end()
        current = gevent.getcurrent()
        if self._greenlet is not None and current is not self._greenlet and current is not self._session._hub:
            self._greenlet.join()

    def __enter__(self) -> Any:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()

    def __repr__(self) -> str:
        state = "running" if self.is_running else "not running" if self.error is None else f"ended by {self.error!r}"
        return f"<geyamux.trace.{type(self).__name__} of {self._session!r}: {state}>"

    # -- what a kind of trace does

    def _open(self) -> None:
        """It begins."""

    def _render(self, part: _Part, time_ns: int, *, is_outgoing: bool) -> tuple[Any, int] | None:
        """What to write of these bytes, and its size; None for nothing."""
        raise NotImplementedError

    def _write(self, items: Sequence[Any]) -> None:
        """Write them. May wait and raise."""
        raise NotImplementedError

    def _close(self) -> None:
        """It has ended, and all is written. May wait and raise."""

    # -- what passes

    def _on_received(self, data: bytes) -> None:
        self._take(self._received.cut(data), is_outgoing=False)

    def _on_sent(self, data: bytes, position: int) -> None:
        """Bytes that stand at a position among all that the session ever sent."""
        self._take(self._sent.cut(data[max(0, self._begins_at - position) :]), is_outgoing=True)

    def _take(self, parts: list[_Part], *, is_outgoing: bool) -> None:
        """Keep what there is to write. May be called in the hub, or inside a write: it neither waits nor raises."""
        if not self.is_running:
            return
        now = time.time_ns()
        try:
            for part in parts:
                rendered = self._render(part, now, is_outgoing=is_outgoing)
                if rendered is not None:
                    self._put(*rendered)
        except Exception as error:
            self._fail(error)

    def _put(self, item: Any, size: int) -> None:
        self._waiting.append(item)
        self._waiting_bytes += size
        if self._waiting_bytes > _MOST_WAITING:
            raise OSError(f"{self._waiting_bytes} bytes wait to be written")
        self._wake_writer()

    # -- the greenlet that writes

    def _wake_writer(self) -> None:
        if self._greenlet is None or self._greenlet.ready():
            self._greenlet = gevent.spawn(self._run)

    def _run(self) -> None:
        try:
            while self._waiting and os.getpid() == self._process:
                items, self._waiting = self._waiting, []
                self._write(items)
                self._waiting_bytes = sum(map(len, self._waiting))
            if not self.is_running and self.error is None and os.getpid() == self._process:
                self._close()
        except Exception as error:
            self._fail(error)
        except BaseException as error:
            self._fail(error)
            raise

    # -- how it ends

    def _on_session_end(self, session: Session) -> None:
        self._end()

    def _end(self) -> None:
        if not self.is_running:
            return
        self._take(self._received.end(), is_outgoing=False)
        self._take(self._sent.end(), is_outgoing=True)
        self._detach()
        self._wake_writer()

    def _detach(self) -> None:
        self.is_running = False
        self._session.unlink(self._on_session_end)
        tap = _taps.get(self._session)
        if tap is not None and self in tap.traces:
            tap.traces = [trace for trace in tap.traces if trace is not self]
            if not tap.traces:
                del _taps[self._session]
                tap.close()

    def _fail(self, error: BaseException) -> None:
        """What it writes to is broken; the session goes on."""
        if self.error is not None:
            return
        self.error = error
        self._detach()
        self._waiting, self._waiting_bytes = [], 0
        log(_own_logger, logging.WARNING, "%s: the trace has ended: %s", self._session.name, error)
        with contextlib.suppress(Exception):
            self._close()


class Log(Trace):
    """Say each frame in words: ``12:30:05.123456 client-1 sent Data stream 1 length 6``.

    The words go to the logger ``geyamux.trace``, level INFO, or to ``emit(line)`` where that is given, in the order of
    the frames, by a greenlet of the trace: either may wait. Payload is not shown. A frame is said once, when its header
    has passed.

    Raising in `emit` ends the trace. An `emit` that causes frames of the same session, for one by sending its lines over
    it, feeds itself: each line causes others.
    """

    def __init__(self, session: Session, emit: Callable[[str], object] | None = None) -> None:
        super().__init__(session)
        self._emit = emit if emit is not None else _log_line

    def _render(self, part: _Part, time_ns: int, *, is_outgoing: bool) -> tuple[str, int] | None:
        if part.offset:
            return None
        seconds, rest = divmod(time_ns, 1_000_000_000)
        clock = time.strftime("%H:%M:%S", time.localtime(seconds))
        words = str(part) if part.header is None else describe(*part.header)
        text = f"{clock}.{rest // 1000:06d} {self._session.name} {'sent' if is_outgoing else 'received'} {words}"
        return text, len(text)

    def _write(self, items: Sequence[str]) -> None:
        for line in items:
            self._emit(line)


def _log_line(line: str) -> None:
    logger.info("%s", line)


class Pcapng(Trace):
    """Write each frame, payload included, to a pcapng file, which Wireshark and tshark open.

    `file` is a path, whose file is made anew, or a binary file, which is flushed and stays open: a regular one, or
    gevent's where it may have to wait (a FIFO that Wireshark reads). The path of a FIFO is refused, since to open it
    would stop the whole process until somebody reads; a raw file that is non-blocking, and full, ends the trace. Started
    again, a trace goes on behind what it wrote.

    Each packet is a frame or a part of one, and says so in its comment (``frame.comment`` in a column or filter of
    Wireshark; no dissector is needed). Packets are those of TCP, made up: with the addresses of the connection, or
    127.0.0.1 where it has none. Over TLS they show what is inside the encryption: treat the file as a secret.
    """

    def __init__(self, session: Session, file: str | os.PathLike[str] | IO[bytes]) -> None:
        super().__init__(session)
        self._given = file
        self._mode = "wb"
        self._file: Any = None
        self._conversation = Conversation(session.getsockname(), session.getpeername(), is_client=session.is_client)

    def _open(self) -> None:
        if isinstance(self._given, (str, os.PathLike)):
            _check_path(self._given)
            # Without a buffer: nothing is left in it for a fork to write twice.
            self._file = io.FileIO(self._given, self._mode)
            self._mode = "ab"
        else:
            self._file = self._given
        head = section(f"Yamux session {self._session.name}", self._session.name)
        self._waiting, self._waiting_bytes = [head], len(head)

    def _render(self, part: _Part, time_ns: int, *, is_outgoing: bool) -> tuple[bytes, int]:
        blocks = []
        for start in range(0, len(part.data), MOST_PAYLOAD):
            piece = part._replace(data=part.data[start : start + MOST_PAYLOAD], offset=part.offset + start)
            packet = self._conversation.packet(piece.data, is_outgoing=is_outgoing)
            blocks.append(packet_block(packet, time_ns, str(piece), is_outgoing=is_outgoing))
        block = b"".join(blocks)
        return block, len(block)

    def _write(self, items: Sequence[bytes]) -> None:
        for start in range(0, len(items), _MOST_JOINED):
            self._write_all(b"".join(items[start : start + _MOST_JOINED]))
        self._file.flush()

    def _write_all(self, data: bytes) -> None:
        # A raw file may take less than all.
        rest = memoryview(data)
        while rest:
            written = self._file.write(rest)
            if written is None and isinstance(self._file, io.RawIOBase):
                # It took nothing. None of a file that is not of `io` means that it has all.
                raise BlockingIOError(errno.EAGAIN, "the file takes no more now, and can't wait as gevent's can")
            rest = rest[len(rest) if written is None else written :]

    def _close(self) -> None:
        if self._file is not self._given:
            self._file.close()


def _check_path(path: str | os.PathLike[str]) -> None:
    """Raise ValueError for what could block all greenlets when it is opened or written, a FIFO above all."""
    try:
        mode = os.stat(path).st_mode
    except OSError:
        return  # to make it, or to open it, says more
    # To open a directory fails at once, and says what it is.
    if not (stat.S_ISREG(mode) or stat.S_ISCHR(mode) or stat.S_ISDIR(mode)):
        raise ValueError(
            f"{os.fspath(path)!r} is no regular file: opening or writing it could block all greenlets; "
            "give a gevent.fileobject.FileObjectPosix of a descriptor of it"
        )


class _Tap:
    """Stands in the way of what a session sends and receives, and shows it to its traces."""

    def __init__(self, session: Session) -> None:
        self.traces: list[Trace] = []
        self._outbox = session._outbox
        self._reader = session._reader
        transport = self._transport = session._transport
        self._plain_send, self._plain_sendmsg = transport.send, transport.sendmsg
        transport.send = self._send
        if transport.sendmsg is not None:
            transport.sendmsg = self._sendmsg
        self._reader.watch(self._on_received)

    def close(self) -> None:
        """Get out of the way."""
        self._transport.send = self._plain_send
        if self._plain_sendmsg is not None:
            self._transport.sendmsg = self._plain_sendmsg
        self._reader.watch(None)

    def _on_received(self, data: bytes) -> None:
        for trace in self.traces:
            trace._on_received(data)

    def _send(self, data: Any) -> int:
        position = self._outbox.bytes_sent
        sent = self._plain_send(data)
        self._on_sent(sent, (data,), position)
        return sent

    def _sendmsg(self, buffers: Sequence[Any]) -> int:
        assert self._plain_sendmsg is not None
        position = self._outbox.bytes_sent
        sent = self._plain_sendmsg(buffers)
        self._on_sent(sent, buffers, position)
        return sent

    def _on_sent(self, sent: object, buffers: Sequence[Any], position: int) -> None:
        # The outbox judges what a connection of somebody else's says.
        if not isinstance(sent, int) or not 0 < sent <= sum(map(len, buffers)):
            return
        data = b"".join(buffers)[:sent]
        for trace in self.traces:
            trace._on_sent(data, position)
