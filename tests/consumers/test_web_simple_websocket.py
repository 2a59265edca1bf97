"""What is written with threads, monkey-patched and with streams in its hands: flask-sock and simple-websocket,
Flask-SocketIO, and the client of websockets.sync. Each scene of `web_scenes` runs in a program of its own.
"""

from __future__ import annotations

from typing import Any

import pytest

from consumers.real_runner import need_library, play

pytestmark = pytest.mark.interop


LIBRARIES = (
    *("Flask", "flask-sock", "Flask-SocketIO", "gevent-websocket"),
    *("simple-websocket", "websocket-client", "websockets"),
)


def scene(name: str) -> dict[str, Any]:
    for library in LIBRARIES:
        need_library(library)
    return play("web_scenes.py", name)


def test_flask_sock_serves_websockets_and_pages_over_streams():
    assert scene("flask_sock_talks") == {
        "came_back": True,
        # The server heard the code of the client's close, and the client the server's.
        "ended": [3000],
        "farewell": [8, 4001, "that was all"],
        "late": [[None], "still here"],
        "meeting": [f"{number} of 20" for number in range(20)],
        "page": "a page\n",
        "errors": "",
        "streams": 0,
    }


def test_simple_websocket_sends_messages_that_fit_a_window_and_larger_ones_with_sendall():
    assert scene("simple_websocket_is_big") == {"came_back": [True, True]}


def test_simple_websocket_pings_with_a_selector_for_streams():
    assert scene("simple_websocket_pings") == {"pings": 3, "came_back": True}


def test_simple_websocket_hears_nothing_with_a_ping_interval_and_a_selector_for_descriptors():
    assert scene("simple_websocket_pings_without_a_selector") == {"heard": False}


def test_flask_socketio_answers_calls_over_polling_and_websockets():
    assert scene("socketio_calls") == {
        "upgrades": ["websocket"],
        "answers": ["431[0]", "431[2]", "431[4]"],
        "errors": "",
    }


def test_websockets_sync_talks_through_a_socketpair_and_fails_at_once_without():
    assert scene("websockets_sync_talks") == {
        "alone": "ConnectionClosedError",
        "came_back": [True, True, True],
        "ended": "ConnectionClosedOK",
        "errors": "",
    }
