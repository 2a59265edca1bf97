"""A session in the shape of a listening socket."""

from __future__ import annotations

import socket

import pytest

from geyamux.listener import Listener


class FakeStream:
    def getpeername(self):
        return ("192.0.2.1", 4242)


class FakeSession:
    family = socket.AF_INET

    def __init__(self, address=("192.0.2.2", 80)):
        self.address = address
        self.waiting = [FakeStream()]
        self.went_away = 0

    def accept(self):
        if not self.waiting:
            raise ConnectionResetError("no more will come")
        return self.waiting.pop(0)

    def getsockname(self):
        return self.address

    def go_away(self):
        self.went_away += 1

    def __repr__(self):
        return "<a session>"


def test_accept_returns_a_stream_and_the_address_of_its_peer():
    session = FakeSession()
    stream = session.waiting[0]
    assert Listener(session).accept() == (stream, ("192.0.2.1", 4242))


def test_accept_raises_what_the_session_raises():
    session = FakeSession()
    session.waiting.clear()
    with pytest.raises(ConnectionResetError, match="no more will come"):
        Listener(session).accept()


def test_family_and_name_are_those_of_the_connection():
    listener = Listener(FakeSession())
    assert listener.family == socket.AF_INET
    assert type(listener.family) is int
    assert listener.getsockname() == ("192.0.2.2", 80)


@pytest.mark.parametrize("address", [None, ""])
def test_where_the_connection_has_no_name_it_is_yamux(address):
    assert Listener(FakeSession(address)).getsockname() == ("yamux", 0)


def test_close_takes_no_new_streams():
    session = FakeSession()
    Listener(session).close()
    assert session.went_away == 1


def test_leaving_the_with_block_closes():
    session = FakeSession()
    with Listener(session) as listener:
        assert isinstance(listener, Listener)
        assert session.went_away == 0
    assert session.went_away == 1


def test_it_shows_its_session():
    assert repr(Listener(FakeSession())) == "<geyamux.Listener of <a session>>"
