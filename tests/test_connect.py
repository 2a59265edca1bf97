"""Dialling: the addresses, the time limit, TLS, and what is left when it fails. And both ends at once."""

from __future__ import annotations

import contextlib
import os
import socket as stdlib_socket
import ssl as stdlib_ssl
import tempfile
import time
from collections.abc import Iterator
from typing import Any

import gevent
import gevent.ssl
import pytest
from gevent import socket as gsocket

from geyamux import Client, Config, Server
from geyamux.connect import connect, pair
from support.links import tls_contexts

SOON = 0.05
PATIENCE = 10.0


@contextlib.contextmanager
def listening(address: Any = ("127.0.0.1", 0), backlog: int = 5) -> Iterator[gsocket.socket]:
    family = gsocket.AF_UNIX if isinstance(address, str) else gsocket.AF_INET
    with gsocket.socket(family, gsocket.SOCK_STREAM) as listener:
        listener.bind(address)
        listener.listen(backlog)
        yield listener


@contextlib.contextmanager
def serving(listener: gsocket.socket, wrap=lambda sock: sock) -> Iterator[None]:
    """Answer one stream of one session with what it sent."""

    def serve():
        sock, _ = listener.accept()
        with Server(wrap(sock)) as session:
            for stream in session:
                with stream:
                    stream.sendall(stream.read())

    greenlet = gevent.spawn(serve)
    try:
        yield
        greenlet.get(timeout=PATIENCE)
    finally:
        greenlet.kill()


def echo(client: Client, data: bytes) -> bytes:
    with client.open() as stream:
        stream.settimeout(PATIENCE)
        stream.sendall(data)
        stream.close_write()
        return stream.read()


def test_a_host_and_port_are_dialled():
    with listening() as listener, serving(listener), connect(listener.getsockname()) as client:
        assert type(client) is Client
        assert client.getpeername() == listener.getsockname()
        assert echo(client, b"over TCP") == b"over TCP"


def test_the_nagle_algorithm_is_off():
    with listening() as listener, serving(listener), connect(listener.getsockname()) as client:
        assert client.conn.getsockopt(gsocket.IPPROTO_TCP, gsocket.TCP_NODELAY)


def test_a_path_is_that_of_a_unix_socket():
    with tempfile.TemporaryDirectory() as directory:
        path = os.path.join(directory, "yamux")
        with listening(path) as listener, serving(listener), connect(path, timeout=PATIENCE) as client:
            assert client.family == stdlib_socket.AF_UNIX
            assert echo(client, b"over a path") == b"over a path"


def test_the_config_is_that_of_the_session():
    config = Config(accept_backlog=7)
    with listening() as listener, serving(listener), connect(listener.getsockname(), config=config) as client:
        assert client.config is config


def test_the_time_limit_says_nothing_of_the_session():
    with listening() as listener, serving(listener), connect(listener.getsockname(), timeout=SOON) as client:
        gevent.sleep(SOON * 2)
        assert echo(client, b"later") == b"later"
        with client.open() as stream:
            assert stream.gettimeout() is None


def test_a_refused_connection_raises_what_the_socket_raises():
    with listening() as listener:
        address = listener.getsockname()
    with pytest.raises(ConnectionRefusedError):
        connect(address)


def test_a_path_where_nobody_listens_raises_what_the_socket_raises():
    with tempfile.TemporaryDirectory() as directory, pytest.raises(FileNotFoundError):
        connect(os.path.join(directory, "nobody"))


def test_connecting_has_a_time_limit():
    with tempfile.TemporaryDirectory() as directory:
        path = os.path.join(directory, "full")
        with listening(path, backlog=0), contextlib.ExitStack() as waiting:
            # Connections that nobody accepts fill the backlog.
            for _ in range(2):
                sock = waiting.enter_context(gsocket.socket(gsocket.AF_UNIX, gsocket.SOCK_STREAM))
                sock.settimeout(0)
                with contextlib.suppress(BlockingIOError):
                    sock.connect(path)
            began = time.monotonic()
            with pytest.raises((TimeoutError, BlockingIOError)):
                connect(path, timeout=SOON)
            assert time.monotonic() - began < PATIENCE


# --- TLS ---


@pytest.fixture(params=[stdlib_ssl.TLSVersion.TLSv1_2, stdlib_ssl.TLSVersion.TLSv1_3], ids=["tls12", "tls13"])
def contexts(request: pytest.FixtureRequest) -> tuple[Any, Any]:
    return tls_contexts(request.param)


def test_with_a_context_the_connection_is_tls(contexts):
    near, far = contexts
    with (
        listening() as listener,
        serving(listener, lambda sock: far.wrap_socket(sock, server_side=True)),
        connect(listener.getsockname(), ssl_context=near, server_hostname="localhost", timeout=PATIENCE) as client,
    ):
        assert isinstance(client.conn, gevent.ssl.SSLSocket)
        assert client.conn.getpeercert()["subjectAltName"] == (("DNS", "localhost"),)
        assert echo(client, b"secret" * 10_000) == b"secret" * 10_000


def test_the_certificate_must_be_for_the_host_that_was_dialled():
    near, far = tls_contexts(stdlib_ssl.TLSVersion.TLSv1_3)

    def accept(listener):
        sock, _ = listener.accept()
        with contextlib.suppress(OSError), far.wrap_socket(sock, server_side=True) as wrapped:
            wrapped.recv(1)
        sock.close()

    with listening() as listener:
        accepting = gevent.spawn(accept, listener)
        with pytest.raises(stdlib_ssl.SSLCertVerificationError, match=r"127\.0\.0\.1"):
            connect(listener.getsockname(), ssl_context=near)
        accepting.get(timeout=PATIENCE)


def test_the_time_limit_includes_the_handshake():
    near, _ = tls_contexts(stdlib_ssl.TLSVersion.TLSv1_3)
    with listening() as listener:
        began = time.monotonic()
        with pytest.raises(TimeoutError):
            connect(listener.getsockname(), ssl_context=near, server_hostname="localhost", timeout=SOON)
        assert time.monotonic() - began < PATIENCE


def test_a_peer_that_speaks_no_tls_raises_what_tls_raises():
    near, _ = tls_contexts(stdlib_ssl.TLSVersion.TLSv1_3)

    def answer(listener):
        sock, _ = listener.accept()
        with sock:
            sock.recv(1)
            sock.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")
            sock.recv(1 << 16)

    with listening() as listener:
        answering = gevent.spawn(answer, listener)
        with pytest.raises(stdlib_ssl.SSLError):
            connect(listener.getsockname(), ssl_context=near, server_hostname="localhost")
        answering.get(timeout=PATIENCE)


def test_a_context_of_the_unpatched_module_is_refused_and_the_text_says_what_to_do():
    context = stdlib_ssl.create_default_context()
    with listening() as listener, pytest.raises(TypeError) as caught:
        connect(listener.getsockname(), ssl_context=context)
    for hint in ("block the whole process", "gevent.ssl.SSLContext", "monkey.patch_all()"):
        assert hint in str(caught.value)


def test_a_kill_in_the_handshake_leaves_no_descriptor():
    near, _ = tls_contexts(stdlib_ssl.TLSVersion.TLSv1_3)
    with listening() as listener:
        dialling = gevent.spawn(connect, listener.getsockname(), ssl_context=near, server_hostname="localhost")
        accepted, _ = listener.accept()
        assert accepted.recv(1 << 16)
        dialling.kill()
        accepted.settimeout(1)
        with accepted:
            assert accepted.recv(1) == b""


# --- both ends at once ---


def test_a_pair_is_a_client_and_a_server_that_are_connected():
    client, server = pair()
    with client, server:
        assert (type(client), type(server)) == (Client, Server)
        near = client.open()
        near.sendall(b"to oneself")
        assert server.accept(timeout=PATIENCE).read1() == b"to oneself"
        assert server.open().stream_id == 2


def test_a_pair_shares_its_config():
    config = Config(accept_backlog=7)
    client, server = pair(config)
    with client, server:
        assert client.config is server.config is config
