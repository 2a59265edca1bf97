"""What may carry a session, and how it is adopted.

The session needs little: receive some, send some, half-close, close. `adopt` finds out which of the ways applies:

* a gevent socket (TCP, Unix) becomes non-blocking, so that no call of ours ever waits inside it: the reader parks on the
  descriptor by itself, and so does the writer;
* a ``gevent.ssl`` socket likewise; "would block" may then mean the other direction, which is passed on as a fact;
* everything else that is cooperative has no descriptor for us and blocks in its own calls: a Stream (a session inside a
  stream), a pair of gevent file objects, any object with ``recv``, ``send`` or ``sendall``, and ``close``.

A socket that would block the whole process is refused. Nothing here knows Yamux.
"""

from __future__ import annotations

import contextlib
import errno
import io
import os
import socket as stdlib_socket
import ssl as stdlib_ssl
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import gevent
import gevent.socket
import gevent.ssl
from gevent import monkey

__all__ = ["ANY_FAILURE", "PAYLOAD_SIZE", "RECEIVE_SIZE", "Transport", "adopt"]

#: What a call of somebody else's connection may raise, and what its end is then. A kill is not among it.
ANY_FAILURE = (Exception, gevent.Timeout)

#: Bytes asked for in one receive: a frame of 64 KiB with its header. 256 KiB and more are slower (large fresh blocks).
RECEIVE_SIZE = 65536 + 12
#: The same for what is left of one payload, which is not cut: frames of 256 KiB pass a quarter faster so.
PAYLOAD_SIZE = 262144

#: A record of TLS that holds as much as it may.
_FULL_RECORD = 16384
_ASK_AGAIN_AFTER = 16
#: TLS records decrypted in one receive. Five full ones are a receive's worth; 65,000 of one byte would hold the hub for
#: 170 ms.
_MOST_RECORDS = 64

#: A peer that begins a handshake and never ends it must not hold a greenlet and a descriptor for ever, in seconds.
_HANDSHAKE_TIMEOUT = 30.0

_UNPATCHED_HINT = (
    "it would block the whole process. Make it with gevent.socket / gevent.ssl, or call gevent.monkey.patch_all() "
    "before anything imports socket"
)


#: What carries a session now, by its identity: two sessions would tear each other's frames.
_carriers: weakref.WeakValueDictionary[int, Transport] = weakref.WeakValueDictionary()


class Transport:
    """An adopted connection. The base class serves objects that block cooperatively in their own calls."""

    #: What to watch for readiness; None: `recv` and `send` wait by themselves.
    fileno: int | None = None
    #: A scatter-gather send that copies nothing, where there is one.
    sendmsg: Callable[[Sequence[Any]], int] | None = None
    #: Sends what can be sent without waiting, where `send` waits; for the exit of the process.
    send_now: Callable[[Any], int] | None = None
    #: Tells whether received bytes wait above the descriptor, where no watcher sees them (TLS).
    has_more: Callable[[], bool] | None = None
    #: `recv` would block until the connection is writable (TLS).
    read_wants_write = False
    #: `send` would block until something was received (TLS).
    write_wants_read = False

    def __init__(self, conn: Any) -> None:
        self.conn = conn
        #: Receive up to n bytes; b"" at the end.
        self.recv: Callable[[int], bytes] = conn.recv
        #: Send some of the bytes; return how many.
        self.send: Callable[[Any], int] = conn.send if hasattr(conn, "send") else self._send_all
        settimeout = getattr(conn, "settimeout", None)
        if settimeout is not None:
            settimeout(None)

    def _send_all(self, data: Any) -> int:
        self.conn.sendall(data)
        return len(data)

    def hold(self) -> None:
        """Keep the connection open until `close`: gevent's servers close a socket when their handler returns, and the
        session may have streams to finish then.
        """

    def shutdown_write(self) -> bool:
        """Tell the peer that no more comes. False where the connection has no way to: its end is all there is."""
        if hasattr(self.conn, "close_write"):
            self.conn.close_write()
        elif hasattr(self.conn, "shutdown"):
            self.conn.shutdown(stdlib_socket.SHUT_WR)
        else:
            return False
        return True

    def close(self) -> None:
        """Close the connection."""
        self._release()
        self.conn.close()

    def drop(self) -> None:
        """Close it where no hub runs any more."""
        self.close()

    def _release(self) -> None:
        for carrier in _parts(self.conn):
            _carriers.pop(id(carrier), None)

    @property
    def family(self) -> int:
        """The address family, AF_UNSPEC where there is none."""
        return int(getattr(self.conn, "family", stdlib_socket.AF_UNSPEC))

    def address(self, name: str) -> Any:
        """What the connection's ``getsockname`` or ``getpeername`` says; None where it has none."""
        try:
            return getattr(self.conn, name)()
        except (AttributeError, OSError):
            return None


class SocketTransport(Transport):
    """A plain gevent socket."""

    def __init__(self, conn: Any) -> None:
        super().__init__(conn)
        conn.settimeout(0)
        self.fileno = conn.fileno()
        self.sendmsg = getattr(conn, "sendmsg", None)
        if type(conn) is gevent.socket.socket:
            # What gevent adds to these three is waiting, which never happens here: a microsecond of each round trip.
            below: Any = conn
            self.recv, self.send, self.sendmsg = below._sock.recv, below._sock.send, below._sock.sendmsg
        self._claim: Any = None

    def hold(self) -> None:
        # While a file is open on it a socket stays open, whoever closes it.
        self._claim = self.conn.makefile("rb", 0)

    def shutdown_write(self) -> bool:
        self.conn.shutdown(stdlib_socket.SHUT_WR)
        return True

    def drop(self) -> None:
        self._release()
        # gevent's own close waits for the loop to let go of the descriptor; there is none. This one is below it.
        self.conn._sock.close()

    def close(self) -> None:
        self._release()
        try:
            self.conn.close()
        finally:
            if self._claim is not None:
                self._claim.close()


class TLSTransport(SocketTransport):
    """A gevent TLS socket. Its handshake is completed here, within the socket's own timeout or ours."""

    def __init__(self, conn: Any) -> None:
        if conn.version() is None:
            if conn.gettimeout() is None:
                conn.settimeout(_HANDSHAKE_TIMEOUT)
            # The socket's limit is for each of its waits: for a peer that sends a byte now and then it would be none.
            with gevent.Timeout(conn.gettimeout() or None, TimeoutError("timed out")):
                conn.do_handshake()
        super().__init__(conn)
        self.recv = self._recv
        self.send = self._send
        self.sendmsg = None  # SSL sockets have none that works
        # Else a connection that was reset reads like one that ended.
        conn.suppress_ragged_eofs = False
        self._is_shut = False
        #: What the connection ended with, and whether that is more than an end.
        self._end: OSError | None = None
        self._end_is_error = False
        self.has_more = self._has_more
        #: So many receives ask in vain for another record, then as many do not ask.
        self._hope = _ASK_AGAIN_AFTER
        self._read, self._write, self._pending = conn.recv, conn.write, getattr(conn, "pending", lambda: 0)
        if type(conn) is gevent.ssl.SSLSocket:
            # What gevent adds is waiting, which never happens here: a sixth of a round trip.
            below: Any = conn
            self._read, self._write, self._pending = below._sslobj.read, below._sslobj.write, below._sslobj.pending

    def _recv(self, size: int) -> bytes:
        """Receive the records that are there, a receive's worth at most: OpenSSL gives out one at a time."""
        if self._is_shut or self._end is not None:
            return self._recv_ended(size)
        self.read_wants_write = False
        try:
            piece: bytes = self._read(size)
        except stdlib_ssl.SSLWantReadError:
            raise BlockingIOError from None
        except stdlib_ssl.SSLWantWriteError:
            self.read_wants_write = True
            raise BlockingIOError from None
        except OSError as error:
            self._end_by(error)
            return self._recv_ended(size)
        if not piece or (len(piece) < _FULL_RECORD and not self._is_hopeful()):
            return piece
        return self._recv_more(piece, size)

    def _is_hopeful(self) -> bool:
        """Whether to ask for a record behind one that is not full, which costs as much as a receive where there is none.

        Peers that write header and payload one by one send two each time, most send one.
        """
        self._hope -= 1
        if self._hope <= -_ASK_AGAIN_AFTER:
            self._hope = 1
        return self._hope > 0

    def _recv_more(self, piece: bytes, size: int) -> bytes:
        pieces, missing, records = [piece], size - len(piece), 1
        with contextlib.suppress(stdlib_ssl.SSLWantReadError, stdlib_ssl.SSLWantWriteError):
            while missing > 0 and records < _MOST_RECORDS:
                try:
                    piece = self._read(missing)
                except (stdlib_ssl.SSLWantReadError, stdlib_ssl.SSLWantWriteError):
                    raise
                except OSError as error:
                    self._end_by(error)
                    break
                if not piece:
                    # close_notify behind data: the next receive says so, and nothing else would.
                    self._end = OSError("close_notify")
                    break
                pieces.append(piece)
                missing -= len(piece)
                records += 1
        if records > 1:
            self._hope = _ASK_AGAIN_AFTER
        return b"".join(pieces)

    def _end_by(self, error: OSError) -> None:
        """OpenSSL tells it truly only once; what was received before it is delivered first."""
        self._end_is_error = not _is_end_without_notify(error)
        is_reset = self._end_is_error and isinstance(error, stdlib_ssl.SSLEOFError)
        self._end = ConnectionResetError(errno.ECONNRESET, "the connection was reset") if is_reset else error

    def _recv_ended(self, size: int) -> bytes:
        if self._is_shut:
            return self._recv_raw(size)
        if self._end is not None and self._end_is_error:
            raise self._end
        return b""

    def _recv_raw(self, size: int) -> bytes:
        """After close_notify nothing is decrypted any more; what still comes is only drained, to be thrown away."""
        data: bytes = self.conn.recv(size)
        return data

    def _send(self, data: Any) -> int:
        self.write_wants_read = False
        try:
            sent: int = self._write(data)  # send() hides which direction it waits for
        except stdlib_ssl.SSLWantWriteError:
            raise BlockingIOError from None
        except stdlib_ssl.SSLWantReadError:
            self.write_wants_read = True
            raise BlockingIOError from None
        return sent

    @staticmethod
    def _wants_write(step: Callable[[], Any]) -> bool:
        try:
            step()
        except stdlib_ssl.SSLWantWriteError:
            return True
        return False

    def _has_more(self) -> bool:
        return not self._is_shut and (self._end is not None or self._pending() > 0)

    def shutdown_write(self) -> bool:
        # close_notify; the peer's is not waited for. May wait until the connection takes it.
        with contextlib.suppress(OSError, ValueError):
            while self._wants_write(self.conn.unwrap):
                gevent.socket.wait_write(self.conn.fileno())
        self._is_shut = True
        self.conn.shutdown(stdlib_socket.SHUT_WR)
        return True


def _is_end_without_notify(error: OSError) -> bool:
    """The peer closed without close_notify: no news to a multiplexer. OpenSSL before 3 says the same of a reset."""
    if not isinstance(error, stdlib_ssl.SSLEOFError):
        return False
    return error.reason == "UNEXPECTED_EOF_WHILE_READING" or stdlib_ssl.OPENSSL_VERSION_INFO < (3,)


class FilesTransport(Transport):
    """A pair of cooperative file objects: one to read from, one to write to."""

    def __init__(self, pair: tuple[Any, Any]) -> None:
        self.reader, self.writer = pair
        self.conn = pair
        # A buffered file has read1; the read of a raw one returns what is there.
        self.recv = getattr(self.reader, "read1", None) or self.reader.read
        self.send = self._send_all
        self.send_now = self._send_now

    def _send_now(self, data: Any) -> int:
        # gevent's files are in non-blocking mode, and nothing is left in their buffers between two sends.
        return os.write(self.writer.fileno(), data)

    def _send_all(self, data: Any) -> int:
        # A raw file (buffering off) may take less than all.
        written = self.writer.write(data)
        self.writer.flush()
        return len(data) if written is None else int(written)

    def shutdown_write(self) -> bool:
        self.writer.close()
        return True

    def close(self) -> None:
        self._release()
        try:
            self.writer.close()
        finally:
            self.reader.close()


def adopt(conn: Any) -> Transport:
    """Make a transport of what the user has.

    TypeError, with what to do, where it would block the whole process or is no byte stream; ValueError where it carries a
    session already.
    """
    if any(id(carrier) in _carriers for carrier in _parts(conn)):
        raise ValueError(f"{conn!r} carries a session already")
    transport = _adopt(conn)
    for carrier in _parts(conn):
        _carriers[id(carrier)] = transport
    return transport


def _parts(conn: Any) -> tuple[Any, ...]:
    return conn if isinstance(conn, tuple) else (conn,)


def _adopt(conn: Any) -> Transport:
    if isinstance(conn, (gevent.ssl.SSLSocket, gevent.socket.socket)):
        _refuse_unfit_socket(conn)
        _send_at_once(conn)
        return TLSTransport(conn) if isinstance(conn, gevent.ssl.SSLSocket) else SocketTransport(conn)
    if isinstance(conn, tuple):
        if len(conn) != 2 or not hasattr(conn[0], "read") or not hasattr(conn[1], "write"):
            raise TypeError("a pair of files is (reader, writer): something with read() and something with write()")
        for file in conn:
            _refuse_unfit_file(file)
        return FilesTransport(conn)
    if isinstance(conn, monkey.get_original("socket", "socket")):
        raise TypeError(f"{conn!r} is not cooperative: {_UNPATCHED_HINT}")
    if not hasattr(conn, "recv") or not (hasattr(conn, "send") or hasattr(conn, "sendall")) or not hasattr(conn, "close"):
        raise TypeError(
            f"{conn!r} can't carry a session: give a gevent socket, a gevent TLS socket, a Stream, a pair of gevent file "
            "objects, or an object with recv(), send() or sendall(), and close()"
        )
    return Transport(conn)


def _send_at_once(conn: Any) -> None:
    """An acceptor's answer follows its acknowledgement, and would wait 40 ms for the peer's delayed ACK of that.

    The outbox collects small frames by itself.
    """
    if conn.family in (stdlib_socket.AF_INET, stdlib_socket.AF_INET6):
        # A connection that has ended already is found out when it is used.
        with contextlib.suppress(OSError):
            conn.setsockopt(stdlib_socket.IPPROTO_TCP, stdlib_socket.TCP_NODELAY, 1)


def _refuse_unfit_socket(conn: Any) -> None:
    if conn.fileno() < 0:
        raise OSError(errno.EBADF, "the socket is closed already")
    if conn.getsockopt(stdlib_socket.SOL_SOCKET, stdlib_socket.SO_TYPE) != stdlib_socket.SOCK_STREAM:
        raise TypeError(f"{conn!r} is no stream socket (SOCK_STREAM): it would tear or lose what is written")
    if conn.getsockopt(stdlib_socket.SOL_SOCKET, stdlib_socket.SO_ACCEPTCONN):
        raise TypeError(f"{conn!r} listens: give what its accept() returns")


def _refuse_unfit_file(file: Any) -> None:
    blocking = (io.FileIO, io.BufferedReader, io.BufferedWriter, io.BufferedRandom, io.TextIOBase)
    if isinstance(file, blocking):
        raise TypeError(
            f"{file!r} is not cooperative: it would block the whole process. Wrap its descriptor in "
            "gevent.fileobject.FileObject(..., 'rb') or (..., 'wb')"
        )
    if hasattr(file, "encoding"):
        raise TypeError(f"{file!r} is a text file, Yamux is bytes: open it with the mode 'rb' or 'wb'")
