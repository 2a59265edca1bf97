"""Mutual TLS below a session: who the peer is, who is refused, and what both sides are told then.

Over gevent's own StreamServer, whose handler makes a Server, and over the package's. With TLS 1.3 a client is done before
the server has looked at its certificate: it is told by the end of its session, not by `connect`.
"""

from __future__ import annotations

import contextlib
import logging
import re
import ssl
import time
from collections.abc import Iterator
from typing import Any

import gevent
import gevent.server
import pytest
from gevent import socket as gsocket
from gevent.queue import Queue

import geyamux
import geyamux.server
from balancers.trust import SERVER, VERSIONS, certificate, client_context, server_context

PATIENCE = 5.0
AGENT = "agent-7.test"


class Door:
    """A server that wants certificates. `refused` has a line for each connection that did not become a session."""

    def __init__(self, handshake_timeout: float) -> None:
        self.handshake_timeout = handshake_timeout
        self.refused: Queue[str] = Queue()
        self.sessions: list[geyamux.Session] = []
        self.address: Any = None

    def greet(self, stream, _address=None):
        with stream:
            self.sessions.append(stream.session)
            stream.sendall(f"hello {name_of_peer(stream.session)}\n".encode())

    def serve(self, conn, _address):
        """What a user writes around a Server, for gevent's own server."""
        conn.settimeout(self.handshake_timeout)
        try:
            session = geyamux.Server(conn)
        except OSError as error:
            self.refused.put(str(error))
            return
        with contextlib.suppress(geyamux.SessionError):
            for stream in session:
                gevent.spawn(self.greet, stream)


class Refusals(logging.Handler):
    """The package's server says in its log why a connection did not become a session."""

    def __init__(self, lines: Queue[str]) -> None:
        super().__init__(logging.INFO)
        self.lines = lines

    def emit(self, record):
        if "did not become a session" in record.getMessage():
            self.lines.put(record.getMessage())


@contextlib.contextmanager
def a_door_of_gevent(context, handshake_timeout) -> Iterator[Door]:
    door = Door(handshake_timeout)
    # The session does the handshake, within the socket's timeout: gevent's server has none.
    server = gevent.server.StreamServer(("127.0.0.1", 0), door.serve, ssl_context=context, do_handshake_on_connect=False)
    server.start()
    door.address = server.address
    try:
        yield door
    finally:
        server.stop()


@contextlib.contextmanager
def a_door_of_the_package(context, handshake_timeout) -> Iterator[Door]:
    door = Door(handshake_timeout)
    logger, handler = logging.getLogger("geyamux"), Refusals(door.refused)
    level = logger.level
    logger.setLevel(logging.INFO)
    logger.addHandler(handler)
    server = geyamux.server.StreamServer(("127.0.0.1", 0), door.greet, ssl_context=context)
    server.handshake_timeout = handshake_timeout
    server.start()
    door.address = server.address
    try:
        yield door
    finally:
        server.stop()
        logger.removeHandler(handler)
        logger.setLevel(level)


DOORS = {"gevent": a_door_of_gevent, "geyamux": a_door_of_the_package}


@pytest.fixture(params=VERSIONS, ids=lambda version: version.name)
def version(request):
    return request.param


@pytest.fixture(params=DOORS)
def open_door(request, version):
    """Opens a server of each kind, which is closed after the test."""
    with contextlib.ExitStack() as stack:

        def open_one(shown=None, handshake_timeout=PATIENCE) -> Door:
            context = server_context(shown or certificate(SERVER), version)
            door: Door = stack.enter_context(DOORS[request.param](context, handshake_timeout))
            # Before its end, so that a session that lingers is a fault of the test.
            stack.callback(end_all, door.sessions)
            return door

        yield open_one


def end_all(sessions):
    for session in sessions:
        assert session.join(PATIENCE), session


def name_of_peer(session):
    """Whom the certificate of the other side names: how a handler finds out."""
    return session.conn.getpeercert()["subjectAltName"][0][1]


def connect(door, version, shown=None, **more):
    context = client_context(shown, version)
    return geyamux.connect(door.address, timeout=PATIENCE, ssl_context=context, **{"server_hostname": SERVER, **more})


def works(door, version):
    """Those who may come in still can."""
    with connect(door, version, certificate(AGENT)) as session, session.open() as stream:
        stream.settimeout(PATIENCE)
        return stream.readline() == b"hello agent-7.test\n"


def test_each_side_learns_from_the_certificate_who_the_other_is(open_door, version):
    door = open_door()
    for name in (AGENT, "somebody-else.test"):
        with connect(door, version, certificate(name)) as session:
            streams = [session.open() for _ in range(20)]
            for stream in streams:
                stream.settimeout(PATIENCE)
                assert stream.read() == f"hello {name}\n".encode()
            assert name_of_peer(session) == SERVER
            assert session.conn.version() == version.name.replace("_", ".")
    assert door.refused.empty()


REFUSED_CLIENTS = {
    "without a certificate": (None, "peer did not return a certificate", "certificate required|handshake failure"),
    "with one of another authority": (
        {"signed_by": "a stranger"},
        "certificate verify failed: unable to get local issuer certificate",
        "alert unknown ca",
    ),
    "with an expired one": (
        {"expired": True},
        "certificate verify failed: certificate has expired",
        "alert certificate expired",
    ),
}


@pytest.mark.parametrize("case", REFUSED_CLIENTS)
def test_a_client_that_cannot_show_who_it_is_gets_refused_and_both_sides_say_why(open_door, version, case):
    how, said_there, said_here = REFUSED_CLIENTS[case]
    door = open_door()
    began = time.monotonic()
    if version is ssl.TLSVersion.TLSv1_2:
        with pytest.raises(ssl.SSLError, match=said_here):
            connect(door, version, None if how is None else certificate(AGENT, **how))
    else:
        session = connect(door, version, None if how is None else certificate(AGENT, **how))
        assert session.join(PATIENCE)
        assert isinstance(session.exception, geyamux.TransportError)
        assert re.search(f"the connection broke: .*{said_here}", str(session.exception))
        assert isinstance(session.exception.__cause__, ssl.SSLError)
    assert re.search(said_there, door.refused.get(timeout=PATIENCE))
    assert time.monotonic() - began < 2
    assert works(door, version)


def test_a_refused_client_that_talks_at_once_fails_in_time(open_door, version):
    door = open_door()
    with (
        pytest.raises((ssl.SSLError, geyamux.SessionError)),
        gevent.Timeout(PATIENCE),
        connect(door, version) as session,
        session.open() as stream,
    ):
        stream.sendall(b"let me in\n" * 1000)
        stream.readline()
        pytest.fail("the stream of a refused client ended as if all were well")
    assert "peer did not return a certificate" in door.refused.get(timeout=PATIENCE)
    assert works(door, version)


WRONG_SERVERS = {
    "for another name": ({"name": "elsewhere.test"}, "Hostname mismatch, certificate is not valid for 'server.test'"),
    "of another authority": ({"signed_by": "a stranger"}, "unable to get local issuer certificate"),
    "that has expired": ({"expired": True}, "certificate has expired"),
}


@pytest.mark.parametrize("case", WRONG_SERVERS)
def test_a_server_with_a_certificate_is_refused(open_door, version, case):
    how, said_here = WRONG_SERVERS[case]
    door = open_door(certificate(**{"name": SERVER, **how}))
    began = time.monotonic()
    with pytest.raises(ssl.SSLCertVerificationError, match=said_here):
        connect(door, version, certificate(AGENT))
    assert re.search(r"\[SSL: \w+_ALERT_\w+\]", door.refused.get(timeout=PATIENCE))
    assert time.monotonic() - began < 2


BEGINNINGS = {"nothing": b"", "half a record": b"\x16\x03\x01\x02\x00\x01"}


@pytest.mark.parametrize("beginning", BEGINNINGS)
def test_a_client_that_does_not_go_on_with_the_handshake_is_let_go_of_and_holds_up_nobody(open_door, version, beginning):
    door = open_door(handshake_timeout=0.3)
    with contextlib.closing(gsocket.create_connection(door.address, timeout=PATIENCE)) as conn:
        conn.sendall(BEGINNINGS[beginning])
        began = time.monotonic()
        assert works(door, version)
        assert conn.recv(1) == b""
        assert 0.1 < time.monotonic() - began < 1.5
    assert "timed out" in door.refused.get(timeout=PATIENCE)


def test_a_client_that_hangs_up_in_the_handshake_is_let_go_of(open_door, version):
    door = open_door()
    gsocket.create_connection(door.address).close()
    door.refused.get(timeout=PATIENCE)
    assert works(door, version)


def test_a_client_without_tls_is_refused(open_door, version):
    door = open_door()
    began = time.monotonic()
    with contextlib.closing(geyamux.connect(door.address, timeout=PATIENCE)) as session:
        stream = session.open()
        stream.settimeout(PATIENCE)
        stream.sendall(b"hello\n")
        with pytest.raises(geyamux.SessionError):
            stream.readline()
    assert "[SSL: " in door.refused.get(timeout=PATIENCE)
    assert time.monotonic() - began < 2
    assert works(door, version)


def test_a_client_with_tls_of_a_server_without_learns_so(version):
    with geyamux.server.StreamServer(("127.0.0.1", 0), lambda stream, address: None) as server:
        server.start()
        with pytest.raises(ssl.SSLError) as refused:
            geyamux.connect(server.address, timeout=PATIENCE, ssl_context=client_context(None, version))
    assert refused.value.reason in ("WRONG_VERSION_NUMBER", "UNEXPECTED_MESSAGE"), refused.value
