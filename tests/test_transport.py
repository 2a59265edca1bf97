"""What may carry a session, what is refused, and how each kind behaves once adopted.

Longer than other modules because all tests of one subject stand together, each short and by itself.
"""

from __future__ import annotations

import io
import os
import socket as stdlib_socket
import ssl as stdlib_ssl
import subprocess
import sys
import textwrap
import time
from collections import deque

import gevent
import gevent.socket
import gevent.ssl
import pytest
from gevent.fileobject import FileObjectPosix, FileObjectThread

from geyamux.transport import (
    RECEIVE_SIZE,
    FilesTransport,
    SocketTransport,
    TLSTransport,
    Transport,
    adopt,
)
from support.links import Link, make_link, tls_contexts
from support.rawpeer import settle
from support.transports import memory_pair

EXPECTED_TYPES = {
    "memory": Transport,
    "socketpair": SocketTransport,
    "tcp": SocketTransport,
    "unix": SocketTransport,
    "tls12": TLSTransport,
    "tls13": TLSTransport,
    "stream": Transport,
    "files": FilesTransport,
}
WITH_DESCRIPTOR = ["socketpair", "tcp", "unix", "tls12", "tls13"]
TLS = ["tls12", "tls13"]


def receive(transport: Transport, size: int = RECEIVE_SIZE) -> bytes:
    """Receive, waiting where the transport itself does not."""
    with gevent.Timeout(10):
        while True:
            try:
                return transport.recv(size)
            except BlockingIOError:
                gevent.sleep(0.001)


def send_all(transport: Transport, data: bytes) -> None:
    with gevent.Timeout(10):
        while data:
            try:
                data = data[transport.send(data) :]
            except BlockingIOError:
                gevent.sleep(0.001)


def receive_exactly(transport: Transport, count: int) -> bytes:
    data = b""
    while len(data) < count:
        piece = receive(transport)
        assert piece, "the connection ended"
        data += piece
    return data


# --- every kind ---


def test_each_kind_is_adopted_as_what_it_is(link_kind):
    with make_link(link_kind) as link:
        transport = adopt(link.a)
        assert type(transport) is EXPECTED_TYPES[link_kind]
        assert transport.conn is link.a


@pytest.mark.parametrize("kind", ["tcp", "tls12", "tls13"])
def test_a_tcp_connection_sends_at_once_whoever_made_it(kind):
    """An accepted one, too: its first answer would wait 40 ms for the peer's delayed acknowledgement."""
    with make_link(kind) as link:
        for end in link:
            end.setsockopt(stdlib_socket.IPPROTO_TCP, stdlib_socket.TCP_NODELAY, 0)
            adopt(end)
            assert end.getsockopt(stdlib_socket.IPPROTO_TCP, stdlib_socket.TCP_NODELAY)


def test_bytes_pass_in_both_directions(link_kind):
    with make_link(link_kind) as link:
        near, far = adopt(link.a), adopt(link.b)
        send_all(near, b"question")
        assert receive_exactly(far, 8) == b"question"
        send_all(far, b"answer")
        assert receive_exactly(near, 6) == b"answer"


def test_a_megabyte_arrives_unchanged(link_kind):
    data = bytes(range(256)) * 4096
    with make_link(link_kind) as link:
        near, far = adopt(link.a), adopt(link.b)
        sending = gevent.spawn(send_all, near, data)
        assert receive_exactly(far, len(data)) == data
        sending.get(timeout=5)


@pytest.mark.parametrize("kind", sorted(set(EXPECTED_TYPES) - set(TLS)))
def test_a_half_close_is_the_end_for_the_peer_and_not_for_its_answer(kind):
    with make_link(kind) as link:
        near, far = adopt(link.a), adopt(link.b)
        send_all(near, b"last words")
        near.shutdown_write()
        assert receive_exactly(far, 10) == b"last words"
        assert receive(far) == b""
        send_all(far, b"answer")
        assert receive_exactly(near, 6) == b"answer"


def test_a_closed_socket_is_refused():
    left, right = gevent.socket.socketpair()
    left.close()
    with right, pytest.raises(OSError, match="closed"):
        adopt(left)


def test_close_ends_the_connection(link_kind):
    with make_link(link_kind) as link:
        near, far = adopt(link.a), adopt(link.b)
        far.close()
        assert receive(near) == b""


@pytest.mark.parametrize("kind", WITH_DESCRIPTOR)
def test_a_socket_is_made_non_blocking_whatever_timeout_it_had(kind):
    with make_link(kind) as link:
        link.a.settimeout(5)
        transport = adopt(link.a)
        assert link.a.gettimeout() == 0
        assert transport.fileno == link.a.fileno()
        with pytest.raises(BlockingIOError):
            transport.recv(10)


@pytest.mark.parametrize("kind", WITH_DESCRIPTOR)
def test_a_full_connection_refuses_instead_of_waiting(kind):
    with make_link(kind) as link:
        transport = adopt(link.a)
        with pytest.raises(BlockingIOError):
            for _ in range(10_000):
                transport.send(b"x" * 65536)


@pytest.mark.parametrize("kind", sorted(set(EXPECTED_TYPES) - set(WITH_DESCRIPTOR)))
def test_what_has_no_descriptor_for_us_waits_by_itself(kind):
    with make_link(kind) as link:
        near, far = adopt(link.a), adopt(link.b)
        assert near.fileno is None
        assert near.sendmsg is None
        assert near.has_more is None
        receiving = gevent.spawn(near.recv, 10)
        settle()
        assert not receiving.ready()
        send_all(far, b"x")
        assert receiving.get(timeout=5) == b"x"


@pytest.mark.parametrize("kind", ["socketpair", "tcp", "unix"])
def test_a_plain_socket_gathers_pieces_in_one_send(kind):
    with make_link(kind) as link:
        near, far = adopt(link.a), adopt(link.b)
        assert near.sendmsg is not None
        assert near.sendmsg([b"head", memoryview(b"body")]) == 8
        assert receive_exactly(far, 8) == b"headbody"
        assert near.has_more is None


@pytest.mark.parametrize(
    ("kind", "family"),
    [
        ("tcp", stdlib_socket.AF_INET),
        ("unix", stdlib_socket.AF_UNIX),
        ("tls13", stdlib_socket.AF_INET),
        ("memory", stdlib_socket.AF_UNSPEC),
        ("files", stdlib_socket.AF_UNSPEC),
        ("stream", stdlib_socket.AF_UNSPEC),
    ],
)
def test_the_family_is_that_of_the_connection(kind, family):
    with make_link(kind) as link:
        found = adopt(link.a).family
        assert found == family
        assert type(found) is int


def test_addresses_are_those_of_the_connection():
    with make_link("tcp") as link:
        near, far = adopt(link.a), adopt(link.b)
        assert near.address("getsockname") == far.address("getpeername") == link.a.getsockname()
        assert near.address("getpeername")[0] == "127.0.0.1"


@pytest.mark.parametrize("kind", ["memory", "files"])
def test_where_there_are_no_addresses_they_are_none(kind):
    with make_link(kind) as link:
        transport = adopt(link.a)
        assert transport.address("getsockname") is None
        assert transport.address("getpeername") is None


def test_the_address_of_a_broken_connection_is_none():
    with make_link("tcp") as link:
        transport = adopt(link.a)
        link.a.close()
        assert transport.address("getpeername") is None


# --- TLS ---


@pytest.mark.parametrize("version", [stdlib_ssl.TLSVersion.TLSv1_2, stdlib_ssl.TLSVersion.TLSv1_3])
def test_a_handshake_that_was_left_out_is_made_up_for(version):
    near_context, far_context = tls_contexts(version)
    with make_link("tcp") as link:
        near = near_context.wrap_socket(link.a, server_hostname="localhost", do_handshake_on_connect=False)
        far = far_context.wrap_socket(link.b, server_side=True, do_handshake_on_connect=False)
        with Link(near, far):
            adopting = gevent.spawn(adopt, far)
            transport, other = adopt(near), adopting.get(timeout=5)
            assert near.version() == far.version()
            send_all(transport, b"hello")
            assert receive_exactly(other, 5) == b"hello"


def test_a_handshake_made_up_for_keeps_the_timeout_of_the_socket():
    near_context, _ = tls_contexts(stdlib_ssl.TLSVersion.TLSv1_3)
    with make_link("tcp") as link:
        near = near_context.wrap_socket(link.a, server_hostname="localhost", do_handshake_on_connect=False)
        near.settimeout(0.02)
        with near, pytest.raises(OSError, match="timed out"):
            adopt(near)


@pytest.mark.parametrize("kind", TLS)
def test_tls_has_no_gathering_send(kind):
    with make_link(kind) as link:
        assert adopt(link.a).sendmsg is None


@pytest.mark.parametrize("kind", TLS)
def test_the_records_that_are_there_come_in_one_receive(kind):
    with make_link(kind) as link:
        near, far = adopt(link.a), adopt(link.b)
        for _ in range(3):
            send_all(near, b"x" * 10_000)
        settle()
        assert receive(far, 40_000) == b"x" * 30_000


@pytest.mark.parametrize("kind", TLS)
def test_what_waits_above_the_descriptor_is_told(kind):
    with make_link(kind) as link:
        near, far = adopt(link.a), adopt(link.b)
        send_all(near, b"x" * 1000)
        assert receive(far, 400) == b"x" * 400
        assert far.has_more()
        assert receive(far, 600) == b"x" * 600
        assert not far.has_more()


@pytest.mark.parametrize("kind", TLS)
def test_after_our_end_what_comes_is_still_drained_without_waiting(kind):
    with make_link(kind) as link:
        near, far = adopt(link.a), adopt(link.b)
        near.shutdown_write()
        assert receive(far) == b""
        with pytest.raises(BlockingIOError):
            near.recv(100)
        assert not near.has_more()
        far.shutdown_write()
        far.close()
        with gevent.Timeout(5):
            while receive(near):
                pass


@pytest.mark.parametrize("kind", TLS)
def test_a_tls_connection_cut_without_close_notify_ends(kind):
    with make_link(kind) as link:
        near, far = adopt(link.a), adopt(link.b)
        send_all(near, b"x")
        link.a._sock.shutdown(stdlib_socket.SHUT_WR)
        assert receive(far) == b"x"
        assert receive(far) == b""


class ScriptedTLS:
    """A TLS socket that answers what the test says."""

    def __init__(self, *script):
        self.script = deque(script)
        self.timeout = None
        self.suppress_ragged_eofs = True

    def version(self):
        return "TLSv1.3"

    def settimeout(self, timeout):
        self.timeout = timeout

    def gettimeout(self):
        return self.timeout

    def fileno(self):
        return 0

    def _answer(self, _):
        answer = self.script.popleft()
        if isinstance(answer, BaseException):
            raise answer
        return answer

    recv = write = _answer


def scripted(*script) -> TLSTransport:
    return TLSTransport(ScriptedTLS(*script))


def test_a_receive_that_waits_to_write_says_so_until_the_next():
    transport = scripted(stdlib_ssl.SSLWantWriteError(), b"x", stdlib_ssl.SSLWantReadError())
    with pytest.raises(BlockingIOError):
        transport.recv(10)
    assert transport.read_wants_write
    assert transport.recv(10) == b"x"
    assert not transport.read_wants_write


def test_a_receive_that_waits_to_read_says_nothing_of_writing():
    transport = scripted(stdlib_ssl.SSLWantReadError())
    with pytest.raises(BlockingIOError):
        transport.recv(10)
    assert not transport.read_wants_write


def test_what_came_before_a_want_of_writing_is_delivered():
    transport = scripted(b"ab", stdlib_ssl.SSLWantWriteError(), stdlib_ssl.SSLWantWriteError())
    assert transport.recv(10) == b"ab"
    with pytest.raises(BlockingIOError):
        transport.recv(10)
    assert transport.read_wants_write


def test_a_send_that_waits_to_read_says_so_until_the_next():
    transport = scripted(stdlib_ssl.SSLWantReadError(), stdlib_ssl.SSLWantWriteError(), 3)
    with pytest.raises(BlockingIOError):
        transport.send(b"abc")
    assert transport.write_wants_read
    with pytest.raises(BlockingIOError):
        transport.send(b"abc")
    assert not transport.write_wants_read
    assert transport.send(b"abc") == 3


def test_what_came_before_an_error_is_delivered_and_the_error_comes_next():
    transport = scripted(b"ab", ConnectionResetError("gone"), ConnectionResetError("gone"))
    assert transport.recv(10) == b"ab"
    with pytest.raises(ConnectionResetError):
        transport.recv(10)


def test_what_came_before_the_end_is_delivered_and_the_end_comes_next():
    transport = scripted(b"ab", b"")
    assert transport.recv(10) == b"ab"
    # The descriptor will not be readable again for it.
    assert transport.has_more is not None
    assert transport.has_more()
    assert transport.recv(10) == b""


def test_a_crowd_of_tiny_records_is_taken_in_portions():
    transport = scripted(*[b"x"] * 100, stdlib_ssl.SSLWantReadError())
    assert transport.recv(65548) == b"x" * 64
    assert transport.recv(65548) == b"x" * 36


def ragged(reason: str | None) -> stdlib_ssl.SSLEOFError:
    error = stdlib_ssl.SSLEOFError(8, "EOF occurred in violation of protocol")
    error.reason = reason
    return error


def test_an_end_without_close_notify_is_an_end():
    assert scripted(ragged("UNEXPECTED_EOF_WHILE_READING")).recv(10) == b""
    transport = scripted(b"ab", ragged("UNEXPECTED_EOF_WHILE_READING"), b"")
    assert transport.recv(10) == b"ab"


@pytest.mark.skipif(stdlib_ssl.OPENSSL_VERSION_INFO < (3,), reason="OpenSSL before 3 says the same of both")
def test_a_reset_below_tls_is_not_an_end():
    with pytest.raises(ConnectionResetError):
        scripted(ragged(None)).recv(10)
    transport = scripted(b"ab", ragged(None), ragged(None))
    assert transport.recv(10) == b"ab"
    with pytest.raises(ConnectionResetError):
        transport.recv(10)


def test_no_more_is_received_than_was_asked_for():
    transport = scripted(b"ab", b"cd", b"never asked for")
    assert transport.recv(4) == b"abcd"
    assert list(transport.conn.script) == [b"never asked for"]


# --- files ---


def run_alone(script: str) -> str:
    """Run it in an interpreter of its own; return what it printed."""
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, timeout=25)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_pipes_of_a_subprocess_carry_bytes():
    # In a process of its own: once gevent has watched one child, it reaps the children of all other tests, too.
    output = run_alone(
        """
        import sys
        from gevent import subprocess
        from geyamux.transport import adopt
        echo = "import sys; [sys.stdout.buffer.write(l) and sys.stdout.buffer.flush() for l in sys.stdin.buffer]"
        with subprocess.Popen([sys.executable, "-c", echo], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
            transport = adopt((process.stdout, process.stdin))
            assert transport.send(b"through a child\\n") == 16
            received = b""
            while len(received) < 16:
                received += transport.recv(16 - len(received))
            transport.shutdown_write()
            print(received, transport.recv(1))
            transport.close()
            print(process.wait(timeout=10))
        """
    )
    assert output == "b'through a child\\n' b''\n0\n"


@pytest.mark.parametrize("kind", [FileObjectPosix, FileObjectThread])
@pytest.mark.parametrize("buffering", [0, 8192])
def test_gevent_files_of_either_kind_are_adopted(kind, buffering):
    reading, writing = os.pipe()
    reader, writer = kind(reading, "rb", buffering=buffering), kind(writing, "wb", buffering=buffering)
    transport = adopt((reader, writer))
    try:
        assert transport.send(b"abc") == 3
        assert receive(transport) == b"abc"
        transport.shutdown_write()
        assert receive(transport) == b""
    finally:
        transport.close()
    assert reader.closed
    assert writer.closed


class Recorder:
    """A custom file of either kind."""

    def __init__(self, written=None):
        self.calls = []
        self.written = written

    def read(self, size):
        self.calls.append(("read", size))
        return b"bytes"

    def write(self, data):
        self.calls.append(("write", bytes(data)))
        return self.written

    def flush(self):
        self.calls.append(("flush",))

    def close(self):
        self.calls.append(("close",))


def test_custom_files_are_read_written_flushed_and_closed():
    reader, writer = Recorder(), Recorder()
    transport = adopt((reader, writer))
    assert transport.recv(100) == b"bytes"
    assert transport.send(b"abc") == 3
    transport.close()
    assert reader.calls == [("read", 100), ("close",)]
    assert writer.calls == [("write", b"abc"), ("flush",), ("close",)]


def test_a_raw_file_may_take_less_than_all():
    assert adopt((Recorder(), Recorder(written=2))).send(b"abc") == 2


def test_the_reader_is_closed_even_if_closing_the_writer_fails():
    reader, writer = Recorder(), Recorder()

    def fail():
        raise OSError("broken")

    writer.close = fail
    with pytest.raises(OSError, match="broken"):
        adopt((reader, writer)).close()
    assert reader.calls == [("close",)]


def test_a_buffered_file_is_asked_for_what_is_there():
    class Buffered(Recorder):
        def read1(self, size):
            return b"what is there"

    assert adopt((Buffered(), Recorder())).recv(10) == b"what is there"


# --- custom objects ---


class Custom:
    """The least that carries a session."""

    def __init__(self):
        self.calls = []

    def recv(self, size):
        return b"x"[:size]

    def sendall(self, data):
        self.calls.append(("sendall", bytes(data)))

    def close(self):
        self.calls.append(("close",))


def test_sendall_serves_where_there_is_no_send():
    conn = Custom()
    transport = adopt(conn)
    assert transport.recv(1) == b"x"
    assert transport.send(b"abc") == 3
    transport.shutdown_write()  # it has no way to; that is no error
    transport.close()
    assert conn.calls == [("sendall", b"abc"), ("close",)]


def test_the_timeout_of_a_custom_object_is_taken_off():
    class WithTimeout(Custom):
        timeout: float | None = 5.0

        def settimeout(self, timeout):
            self.timeout = timeout

    conn = WithTimeout()
    adopt(conn)
    assert conn.timeout is None


def test_close_write_is_preferred_to_shutdown():
    class HalfClosing(Custom):
        def close_write(self):
            self.calls.append(("close_write",))

        def shutdown(self, how):
            self.calls.append(("shutdown", how))

    conn, other = HalfClosing(), HalfClosing()
    adopt(conn).shutdown_write()
    del HalfClosing.close_write
    adopt(other).shutdown_write()
    assert conn.calls == [("close_write",)]
    assert other.calls == [("shutdown", stdlib_socket.SHUT_WR)]


def test_memory_transports_are_custom_objects_like_any_other():
    near, far = memory_pair()
    transport = adopt(near)
    assert transport.send(b"abc") == 3
    assert far.recv(10) == b"abc"
    near.close()
    far.close()


# --- what is refused ---


def test_an_unpatched_socket_is_refused_and_the_text_says_what_to_do():
    left, right = stdlib_socket.socketpair()
    with left, right, pytest.raises(TypeError) as caught:
        adopt(left)
    for hint in ("not cooperative", "block the whole process", "gevent.socket", "monkey.patch_all()"):
        assert hint in str(caught.value)


def test_an_unpatched_tls_socket_is_refused_and_the_text_says_what_to_do():
    left, right = stdlib_socket.socketpair()
    context = stdlib_ssl.SSLContext(stdlib_ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    with right, context.wrap_socket(left, do_handshake_on_connect=False) as wrapped, pytest.raises(TypeError) as caught:
        adopt(wrapped)
    for hint in ("not cooperative", "gevent.ssl", "monkey.patch_all()"):
        assert hint in str(caught.value)


@pytest.mark.parametrize("buffering", [0, 8192])
@pytest.mark.parametrize("place", ["reader", "writer"])
def test_a_plain_file_is_refused_and_the_text_says_what_to_do(place, buffering):
    reading, writing = os.pipe()
    with open(reading, "rb", buffering=buffering) as reader, open(writing, "wb", buffering=buffering) as writer:
        pair = (reader, Recorder()) if place == "reader" else (Recorder(), writer)
        with pytest.raises(TypeError) as caught:
            adopt(pair)
    for hint in ("not cooperative", "block the whole process", "gevent.fileobject.FileObject"):
        assert hint in str(caught.value)


@pytest.mark.parametrize("kind", [FileObjectPosix, FileObjectThread])
def test_a_cooperative_text_file_is_refused(kind):
    """It would wait for so many characters, and never hand on a frame."""
    reading, writing = os.pipe()
    reader, writer = kind(reading), kind(writing, "wb")
    try:
        with pytest.raises(TypeError, match="'rb' or 'wb'"):
            adopt((reader, writer))
    finally:
        reader.close()
        writer.close()


def test_a_text_file_is_refused():
    with pytest.raises(TypeError, match="not cooperative"):
        adopt((io.StringIO(), Recorder()))


@pytest.mark.parametrize(
    "pair", [(), (Recorder(),), (Recorder(), Recorder(), Recorder()), (1, Recorder()), (Recorder(), 1)]
)
def test_a_tuple_that_is_no_pair_of_files_is_refused(pair):
    with pytest.raises(TypeError, match=r"\(reader, writer\)"):
        adopt(pair)


@pytest.mark.parametrize("missing", ["recv", "sendall", "close"])
def test_an_object_that_lacks_a_method_is_refused_and_the_text_says_which_it_needs(missing):
    class Lacking:
        pass

    for name in {"recv", "sendall", "close"} - {missing}:
        setattr(Lacking, name, lambda self: None)
    with pytest.raises(TypeError) as caught:
        adopt(Lacking())
    for hint in ("can't carry a session", "recv()", "send() or sendall()", "close()"):
        assert hint in str(caught.value)


@pytest.mark.parametrize("nonsense", [None, 7, "127.0.0.1:80", b"bytes", object()])
def test_what_is_no_connection_at_all_is_refused(nonsense):
    with pytest.raises(TypeError, match="can't carry a session"):
        adopt(nonsense)


# --- with monkey-patching, which is for a process of its own ---


def run_patched(body: str) -> str:
    script = "import socket as early\nunpatched = early.socket\nfrom gevent import monkey\nmonkey.patch_all()\n"
    script += "import socket, ssl, subprocess, sys\nfrom geyamux.transport import adopt\n" + textwrap.dedent(body)
    return run_alone(script)


def test_sockets_of_a_patched_standard_library_are_adopted():
    output = run_patched(
        """
        left, right = socket.socketpair()
        near, far = adopt(left), adopt(right)
        near.send(b"hello")
        print(type(near).__name__, far.recv(10))
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname = False
        a, b = socket.socketpair()
        wrapped = context.wrap_socket(a, do_handshake_on_connect=False)
        b.close()
        try:
            adopt(wrapped)
        except OSError as error:
            print("handshake tried")
        """
    )
    assert output == "SocketTransport b'hello'\nhandshake tried\n"


def test_pipes_of_a_patched_subprocess_are_adopted():
    output = run_patched(
        """
        with subprocess.Popen([sys.executable, "-c", "import sys; sys.stdout.write(input())"],
                              stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
            transport = adopt((child.stdout, child.stdin))
            transport.send(b"hello\\n")
            print(type(transport).__name__, transport.recv(10))
            transport.close()
        """
    )
    assert output == "FilesTransport b'hello'\n"


def test_a_socket_made_before_patching_is_still_refused():
    output = run_patched(
        """
        with unpatched() as sock:
            try:
                adopt(sock)
            except TypeError as error:
                print("monkey.patch_all() before anything imports socket" in str(error))
        """
    )
    assert output == "True\n"


def test_a_handshake_that_drips_ends_with_the_sockets_timeout_all_the_same():
    _, context = tls_contexts(stdlib_ssl.TLSVersion.TLSv1_3)
    ours, theirs = gevent.socket.socketpair()

    def drip():
        # The beginning of a record of 512 bytes, of which one comes now and then.
        for byte in b"\x16\x03\x01\x02\x00" + bytes(507):
            theirs.sendall(bytes([byte]))
            gevent.sleep(0.02)

    dripping = gevent.spawn(drip)
    conn = context.wrap_socket(ours, server_side=True, do_handshake_on_connect=False)
    conn.settimeout(0.1)
    began = time.monotonic()
    with conn, theirs, pytest.raises(TimeoutError, match="timed out"):
        adopt(conn)
    assert time.monotonic() - began < 1  # not five seconds
    dripping.kill()
