"""websocket-client on streams, and gevent-websocket behind our WSGIServer: WebSockets inside one session."""

from __future__ import annotations

import gevent
import pytest

import geyamux
from support.waiting import wait_for

websocket = pytest.importorskip("websocket", reason="needs websocket-client (pip install websocket-client)")
pytest.importorskip("geventwebsocket", reason="needs gevent-websocket (pip install gevent-websocket)")

from consumers.web_sockets import PATIENCE, echo_server  # noqa: E402

pytestmark = pytest.mark.interop

BIG = bytes(range(256)) * 1200
"""300 kB: more than a window, and a frame of WebSocket's longest kind."""


def dial(session, **options):
    return websocket.create_connection("ws://inside.example/chat", socket=session.open(), timeout=PATIENCE, **options)


@pytest.mark.parametrize("dialled_out", [False, True], ids=["the listener serves", "the dialler serves"])
def test_messages_of_every_size_come_back_as_they_went(dialled_out):
    with echo_server(dialled_out=dialled_out) as (session, echo):
        connection = dial(session)
        for text in ("", "grüß dich", "x" * 125, "x" * 126, "ü" * 40000):
            connection.send(text)
            assert connection.recv() == text
        for size in (0, 1, 65535, 65536, len(BIG)):
            connection.send_binary(BIG[:size])
            assert connection.recv() == BIG[:size]
        connection.close()
        wait_for(lambda: not session.num_streams, "the end of the stream")
        assert not echo.errors.getvalue()


def test_pings_are_answered_on_both_sides():
    with echo_server() as (session, _):
        connection = dial(session)
        connection.ping("hello")
        assert connection.recv_data(control_frame=True) == (websocket.ABNF.OPCODE_PONG, b"hello")
        connection.send("ping")
        # Answered on the way to the message behind it, and the server goes on.
        assert connection.recv() == "ping"
        connection.send("still here")
        assert connection.recv() == "still here"
        connection.close()


def test_the_close_of_either_side_is_a_handshake():
    with echo_server() as (session, echo):
        connection = dial(session)
        connection.send("close")
        # gevent-websocket sends no code.
        assert connection.recv_data() == (websocket.ABNF.OPCODE_CLOSE, b"")
        connection.shutdown()

        connection = dial(session)
        wait_for(lambda: echo.connected, "the server's side")
        connection.send_close(3000)
        assert connection.recv_data() == (websocket.ABNF.OPCODE_CLOSE, b"")
        wait_for(lambda: not echo.connected, "the server's side to leave")
        connection.shutdown()
        wait_for(lambda: not session.num_streams, "the end of the streams")
        assert not echo.errors.getvalue()


def test_a_timeout_is_raised_in_time_and_leaves_the_connection_whole():
    with echo_server() as (session, _):
        connection = dial(session)
        connection.settimeout(0.01)
        with pytest.raises(websocket.WebSocketTimeoutException):
            connection.recv()
        connection.settimeout(PATIENCE)
        connection.send("late")
        assert connection.recv() == "late"
        connection.close()


def test_fifty_websockets_live_in_one_session_at_once():
    with echo_server() as (session, echo):

        def talk(number):
            connection = dial(session)
            for turn in range(3):
                connection.send(f"{number} {turn}")
                assert connection.recv() == f"{number} {turn}"
            everybody.append(number)
            # All of them are there before one of them goes, and each hears what is said to all.
            assert connection.recv() == "to all"
            connection.close()

        everybody: list[int] = []
        talking = [gevent.spawn(talk, number) for number in range(50)]
        wait_for(lambda: len(everybody) == 50, "fifty conversations")
        assert len(echo.connected) == session.num_streams == 50
        for server_side in echo.connected:
            server_side.send("to all")
        gevent.joinall(talking, timeout=PATIENCE, raise_error=True)
        wait_for(lambda: not echo.connected and not session.num_streams, "the end of all")
        assert not echo.errors.getvalue()


def test_reading_and_writing_may_go_on_in_two_greenlets():
    with echo_server() as (session, _):
        connection = dial(session)

        def write():
            for number in range(40):
                connection.send_binary(BIG[: number * 1000])

        writing = gevent.spawn(write)
        assert [len(connection.recv()) for _ in range(40)] == [number * 1000 for number in range(40)]
        writing.get(timeout=PATIENCE)
        connection.close()


def test_the_end_of_the_session_ends_a_websocket_with_its_reason():
    with echo_server() as (session, echo):
        connection = dial(session)
        wait_for(lambda: echo.connected, "the server's side")
        reading = gevent.spawn(connection.recv)
        gevent.idle()
        session.abort()
        with pytest.raises(geyamux.SessionError, match="aborted on this side"):
            reading.get(timeout=PATIENCE)
        connection.shutdown()
        wait_for(lambda: not echo.connected, "the server's side to leave")
