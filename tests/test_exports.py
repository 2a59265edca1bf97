"""The public surface, name by name and signature by signature: what a program may rely on."""

from __future__ import annotations

import importlib
import inspect
import io
import pickle
import socket
from typing import Any

import pytest

import geyamux
from geyamux import Client, Config, Server, Session, Stream
from support.links import sessions

ERRORS = [
    "ConfigError",
    "KeepaliveTimeout",
    "ProtocolError",
    "RemoteError",
    "RemoteGoAway",
    "SessionClosed",
    "SessionError",
    "StreamClosed",
    "StreamError",
    "StreamReset",
    "StreamsExhausted",
    "TransportError",
    "WriteTimeout",
    "YamuxError",
]

NAMES = [
    *ERRORS,
    "Client",
    "Config",
    "GoAwayCode",
    "INITIAL_WINDOW",
    "Listener",
    "Server",
    "Session",
    "SessionStats",
    "Stream",
    "StreamStats",
    "__version__",
    "connect",
    "pair",
    "splice",
]

CONFIG = {
    "accept_backlog": 256,
    "max_incoming_streams": 4096,
    "max_outgoing_streams": None,
    "accept_timeout": 60.0,
    "keepalive_interval": 30.0,
    "keepalive_timeout": 10.0,
    "connection_write_timeout": 10.0,
    "stream_open_timeout": None,
    "stream_close_timeout": 300.0,
    "close_timeout": 5.0,
    "max_stream_window": 262144,
    "window_auto_tune": False,
    "receive_budget": 64 << 20,
    "max_frame_size": None,
    "outbox_limit": 262144,
    "stream_timeout": ...,
}

# A default of `...` stands for "left out": the default of the session, which None is not.
SIGNATURES = {
    "connect": "(address, *, timeout=None, ssl_context=None, server_hostname=None, config=None)",
    "pair": "(config=None)",
    "splice": "(a, b, *, bufsize=65536)",
    "Session": "(conn, config=None, *, initial=b'', name=None)",
    "Client": "(conn, config=None, *, initial=b'', name=None)",
    "Server": "(conn, config=None, *, initial=b'', name=None)",
    "Session.open": "(self, timeout=...)",
    "Session.accept": "(self, timeout=None)",
    "Session.__iter__": "(self)",
    "Session.listener": "(self)",
    "Session.ping": "(self, timeout=...)",
    "Session.go_away": "(self, announce=True)",
    "Session.close": "(self, timeout=...)",
    "Session.wait_go_away": "(self, timeout=None)",
    "Session.abort": "(self)",
    "Session.join": "(self, timeout=None)",
    "Session.ready": "(self)",
    "Session.rawlink": "(self, callback)",
    "Session.unlink": "(self, callback)",
    "Session.getsockname": "(self)",
    "Session.getpeername": "(self)",
    "Session.stats": "(self)",
    "Session.__enter__": "(self)",
    "Session.__exit__": "(self, kind, error, traceback)",
    "Stream.read": "(self, size=-1, /)",
    "Stream.read1": "(self, size=-1, /)",
    "Stream.peek": "(self, size=0, /)",
    "Stream.readinto": "(self, buffer, /)",
    "Stream.readinto1": "(self, buffer, /)",
    "Stream.readline": "(self, size=-1, /)",
    "Stream.readlines": "(self, hint=-1, /)",
    "Stream.write": "(self, data, /)",
    "Stream.writelines": "(self, lines, /)",
    "Stream.flush": "(self)",
    "Stream.readable": "(self)",
    "Stream.writable": "(self)",
    "Stream.recv": "(self, bufsize, flags=0)",
    "Stream.recv_into": "(self, buffer, nbytes=0, flags=0)",
    "Stream.send": "(self, data, flags=0)",
    "Stream.sendall": "(self, data, flags=0)",
    "Stream.shutdown": "(self, how)",
    "Stream.close": "(self)",
    "Stream.makefile": "(self, mode='r', buffering=None, *, encoding=None, errors=None, newline=None)",
    "Stream.settimeout": "(self, timeout)",
    "Stream.gettimeout": "(self)",
    "Stream.setblocking": "(self, flag)",
    "Stream.getblocking": "(self)",
    "Stream.getsockname": "(self)",
    "Stream.getpeername": "(self)",
    "Stream.getsockopt": "(self, *args)",
    "Stream.setsockopt": "(self, *args)",
    "Stream.fileno": "(self)",
    "Stream.dup": "(self)",
    "Stream.detach": "(self)",
    "Stream.close_write": "(self)",
    "Stream.reset": "(self, code=0)",
    "Stream.wait_established": "(self, timeout=None)",
    "Stream.ready": "(self)",
    "Stream.rawlink": "(self, callback)",
    "Stream.unlink": "(self, callback)",
    "Stream.join": "(self, timeout=None)",
    "Stream.stats": "(self)",
    "Stream.__enter__": "(self)",
    "Stream.__exit__": "(self, kind, error, traceback)",
}

ABSENT_FROM_STREAMS = {
    "_sock": "pywsgi and others would dig for a real socket in it",
    "_accept": "gevent's servers take it for a listening socket",
    "accept": "gevent's servers take it for a listening socket",
    "bind": "it is connected",
    "connect": "it is connected",
    "listen": "it is connected",
    "do_handshake": "gevent's servers take it for a TLS socket",
    "__len__": "an open stream with nothing to read would be false",
    "__bool__": "a stream is true, whatever state it is in",
    "__getattr__": "what is not there must be seen not to be there",
}


def resolve(dotted: str) -> Any:
    found: Any = geyamux
    for name in dotted.split("."):
        found = getattr(found, name)
    return found


def parameters(signature: inspect.Signature) -> list[tuple[str, Any, Any]]:
    found = []
    for parameter in signature.parameters.values():
        is_left_out = "unset" in type(parameter.default).__name__.lower()
        found.append((parameter.name, parameter.kind, ... if is_left_out else parameter.default))
    return found


def parsed(text: str) -> inspect.Signature:
    namespace: dict[str, Any] = {}
    exec(f"def function{text}: pass", namespace)
    return inspect.signature(namespace["function"])


def test_the_package_exports_these_names_and_no_others():
    assert sorted(geyamux.__all__) == sorted(NAMES)
    for name in geyamux.__all__:
        assert getattr(geyamux, name) is not None


def test_public_names_do_not_tell_where_they_are_kept_by_an_underscore():
    for name in set(NAMES) - {"__version__", "INITIAL_WINDOW"}:
        assert not resolve(name).__module__.rpartition(".")[2].startswith("_")


@pytest.mark.parametrize("name", ERRORS)
def test_every_error_is_a_yamux_error_of_the_module_for_errors(name):
    error = resolve(name)
    assert issubclass(error, geyamux.YamuxError)
    assert error is getattr(importlib.import_module("geyamux.errors"), name)


def test_no_error_of_the_package_is_kept_from_its_users():
    module = importlib.import_module("geyamux.errors")
    defined = {name for name, value in vars(module).items() if inspect.isclass(value)}
    assert {name for name in defined if issubclass(getattr(module, name), BaseException)} == set(ERRORS)


@pytest.mark.parametrize("name", SIGNATURES)
def test_a_signature_is_what_was_promised(name):
    assert parameters(inspect.signature(resolve(name))) == parameters(parsed(SIGNATURES[name]))


@pytest.mark.parametrize("name", SIGNATURES)
def test_what_is_public_is_typed_and_explained(name):
    found = resolve(name)
    assert inspect.getdoc(found) or name.endswith("__"), f"{name} has no docstring"
    function = found.__init__ if inspect.isclass(found) else found
    signature = inspect.signature(function)
    untyped = [
        parameter.name
        for parameter in signature.parameters.values()
        if parameter.name != "self" and parameter.annotation is inspect.Parameter.empty
    ]
    assert not untyped
    assert signature.return_annotation is not inspect.Signature.empty


@pytest.mark.parametrize("cls", [Session, Client, Server, Stream, geyamux.Listener], ids=lambda cls: cls.__name__)
def test_classes_have_no_other_public_names_than_those(cls):
    own = {name for base in cls.__mro__ if base.__module__.startswith("geyamux") for name in vars(base)}
    # What `on_` begins is how the parts of the package tell each other what happened.
    public = {name for name in own if not name.startswith(("_", "on_"))}
    assert (
        public
        <= {
            Session: PUBLIC_OF_SESSIONS,
            Client: PUBLIC_OF_SESSIONS,
            Server: PUBLIC_OF_SESSIONS,
            Stream: PUBLIC_OF_STREAMS,
            geyamux.Listener: {"accept", "getsockname", "family", "close"},
        }[cls]
    )


def test_the_settings_and_their_defaults():
    found = {name: ... if "unset" in type(value).__name__.lower() else value for name, value in vars(Config()).items()}
    assert found == CONFIG
    with pytest.raises(TypeError):
        Config(256)  # type: ignore[call-arg]


def test_the_initial_window_is_that_of_the_protocol():
    assert geyamux.INITIAL_WINDOW == 262144


PUBLIC_OF_SESSIONS = {
    *(name.partition(".")[2] for name in SIGNATURES if name.startswith("Session.")),
    *("num_streams", "streams", "rtt", "closed", "exception", "peer_went_away"),
    *("conn", "config", "is_client", "name", "family"),
}

PUBLIC_OF_STREAMS = {
    *(name.partition(".")[2] for name in SIGNATURES if name.startswith("Stream.")),
    *("stream_id", "session", "established", "closed", "timeout", "family", "type", "proto"),
    *("seekable", "isatty", "recvfrom"),
}


def test_what_a_session_tells_about_itself(pair):
    client, server = pair
    assert client.is_client is True
    assert server.is_client is False
    assert client.num_streams == 0
    assert client.closed is False
    assert client.exception is None
    assert client.ready() is False
    assert client.rtt is None or client.rtt > 0
    assert isinstance(client.config, Config)
    assert isinstance(client.name, str)
    assert client.family == client.conn.family == socket.AF_UNIX
    assert client.getsockname() == client.conn.getsockname()


def test_what_a_stream_tells_about_itself(pair):
    client, server = pair
    stream = client.open()
    assert stream.stream_id == 1
    assert server.open().stream_id == 2
    assert stream.session is client
    assert stream.closed is False
    assert (stream.family, stream.type, stream.proto) == (socket.AF_UNSPEC, socket.SOCK_STREAM, 0)
    assert (stream.readable(), stream.writable(), stream.seekable()) == (True, True, False)
    assert stream.isatty() is False
    assert isinstance(stream, io.BufferedIOBase)
    assert stream.established is False
    server.accept(timeout=5)
    assert stream.wait_established(timeout=5) is True
    assert stream.established is True


@pytest.mark.parametrize("name", ABSENT_FROM_STREAMS)
def test_a_stream_does_not_have(pair, name):
    assert not hasattr(pair[0].open(), name), ABSENT_FROM_STREAMS[name]


def test_an_idle_stream_is_true(pair):
    assert pair[0].open()


def test_a_stream_has_no_descriptor_and_says_so(pair):
    stream = pair[0].open()
    for method in (stream.fileno, stream.detach, stream.tell, lambda: stream.seek(0), stream.truncate):
        with pytest.raises(io.UnsupportedOperation):
            method()
    with pytest.raises(NotImplementedError):
        stream.dup()
    with pytest.raises(TypeError):
        pickle.dumps(stream)


def test_socket_options_are_harmless_and_two_of_them_honest(pair):
    stream = pair[0].open()
    assert stream.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1) is None
    assert stream.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY) == 0
    assert stream.getsockopt(socket.SOL_SOCKET, socket.SO_TYPE) == socket.SOCK_STREAM
    assert stream.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) == 0


def test_a_listener_gives_streams_with_addresses():
    with sessions("tcp") as (client, server):
        listener = server.listener()
        client.open().write(b"x")
        accepted, address = listener.accept()
        assert accepted.recv(1) == b"x"
        assert address == accepted.getpeername() == client.getsockname()
        assert listener.family == server.family == socket.AF_INET
        assert listener.getsockname() == server.getsockname()


def test_the_version_is_one_that_installers_understand():
    assert [part.isdigit() for part in geyamux.__version__.split(".")] == [True] * 3
