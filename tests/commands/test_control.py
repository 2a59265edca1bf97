"""The control socket: who may listen and ask, and that no client holds the forwarder up."""

from __future__ import annotations

import contextlib
import json
import os
import stat

import gevent
import pytest
from gevent import socket as gsocket
from gevent.server import StreamServer

from geyamux.cli import control as module
from geyamux.cli.control import Control, Gone, connect
from geyamux.cli.errors import CommandError
from support.rawpeer import settle
from support.waiting import PATIENCE

TOLD = {"format": 1, "state": "open"}
NOBODY = 65534


@pytest.fixture
def path(tmp_path):
    return str(tmp_path / "control")


@contextlib.contextmanager
def listening(path, snapshot=lambda: TOLD):
    control = Control(path, snapshot)
    control.start()
    try:
        yield control
    finally:
        control.stop()


@contextlib.contextmanager
def client(path):
    """A connection, and its lines."""
    with gsocket.socket(gsocket.AF_UNIX) as conn:
        conn.settimeout(PATIENCE)
        conn.connect(path)
        with conn.makefile("rb") as lines:
            yield conn, lines


# --- the socket


def test_each_line_is_answered_by_one_object_in_one_line(path):
    with listening(path), client(path) as (conn, lines):
        conn.sendall(b"\nwhatever\r\n")
        assert [json.loads(lines.readline()) for _ in range(2)] == [TOLD, TOLD]
        conn.sendall(b"\n")
        assert json.loads(lines.readline()) == TOLD


def test_only_its_user_may_connect_and_files_made_later_are_as_before(path, tmp_path):
    before = os.umask(0o022)
    try:
        with listening(path):
            assert stat.S_IMODE(os.stat(path).st_mode) == 0o600
            (tmp_path / "other").touch()
            assert stat.S_IMODE((tmp_path / "other").stat().st_mode) == 0o644
    finally:
        os.umask(before)


def test_stop_takes_the_file_away_and_cuts_the_clients(path):
    with listening(path) as control, client(path) as (conn, lines):
        conn.sendall(b"\n")
        assert lines.readline()
        control.stop()
        assert not os.path.exists(path)
        assert lines.readline() == b""
        control.stop()


def test_stop_without_a_start_does_nothing(path):
    with open(path, "w"):
        Control(path, dict).stop()
    assert os.path.exists(path)


def test_it_may_start_again_after_a_stop(path):
    with listening(path) as control:
        control.stop()
        control.start()
        assert connect(path).ask() == TOLD


def test_a_socket_that_was_left_behind_is_replaced(path):
    with gsocket.socket(gsocket.AF_UNIX) as left:
        left.bind(path)
    with listening(path):
        assert connect(path).ask() == TOLD


def test_a_socket_at_which_somebody_answers_is_left_alone(path):
    with listening(path):
        with pytest.raises(CommandError, match=rf"can't listen at {path}: .*give another path"):
            Control(path, dict).start()
        assert connect(path).ask() == TOLD


def test_a_file_that_is_no_socket_is_left_alone(path):
    with open(path, "w") as file:
        file.write("precious")
    with pytest.raises(CommandError, match="no socket"):
        Control(path, dict).start()
    with open(path) as file:
        assert file.read() == "precious"


@pytest.mark.parametrize("name", ["missing/control", "x" * 200])
def test_where_no_file_can_be_made_it_says_so(tmp_path, name):
    with pytest.raises(CommandError, match=f"can't listen at .*{name}: .+"):
        Control(str(tmp_path / name), dict).start()


def test_what_another_has_put_in_place_of_the_file_stays(path):
    with listening(path):
        os.unlink(path)
        with listening(path):
            pass
        with open(path, "w"):
            pass
    assert os.path.exists(path)


# --- clients that would hold it up


def test_a_silent_client_is_let_go_of(path, monkeypatch):
    monkeypatch.setattr(module, "PATIENCE", 0.05)
    with listening(path), client(path) as (conn, lines):
        conn.sendall(b"not a whole line")
        assert lines.readline() == b""


def test_a_client_that_reads_nothing_is_let_go_of_and_others_are_answered(path, monkeypatch):
    monkeypatch.setattr(module, "PATIENCE", 0.2)
    large = {"format": 1, "padding": "x" * 2_000_000}
    with listening(path, lambda: large), client(path) as (conn, lines):
        conn.sendall(b"\n" * 100)
        settle()
        assert connect(path).ask() == large
        gevent.sleep(0.3)
        # What the system has kept of the first answer still comes.
        with contextlib.suppress(ConnectionResetError):
            assert len(lines.read()) < 2_000_000


def test_a_client_that_never_stops_asking_lets_others_run(path, monkeypatch):
    monkeypatch.setattr(module, "FRESH", 0.0)
    made = []
    with listening(path, lambda: made.append(1) or TOLD), client(path) as (conn, _):
        conn.sendall(b"\n" * 1000)
        for turn in range(1, 21):
            gevent.sleep(0.001)
            assert len(made) <= 5 * turn
        assert made


def test_a_line_without_end_ends_the_connection(path):
    with listening(path), client(path) as (conn, lines):
        conn.sendall(b"x" * module.LONGEST_LINE)
        with contextlib.suppress(ConnectionResetError):
            assert lines.readline() == b""


def test_clients_beyond_the_limit_wait_until_one_has_gone(path, monkeypatch):
    monkeypatch.setattr(module, "MOST_CLIENTS", 2)
    with listening(path), contextlib.ExitStack() as stack:
        served = [stack.enter_context(client(path)) for _ in range(2)]
        for conn, lines in served:
            conn.sendall(b"\n")
            assert lines.readline()
        conn, lines = stack.enter_context(client(path))
        conn.sendall(b"\n")
        conn.settimeout(0.05)
        with pytest.raises(TimeoutError):
            conn.recv(1)
        conn.settimeout(PATIENCE)
        served[0][0].shutdown(gsocket.SHUT_RDWR)
        assert conn.recv(1) == b"{"


def test_those_who_ask_at_once_or_again_too_soon_share_a_snapshot(path, monkeypatch):
    monkeypatch.setattr(module, "FRESH", 60.0)
    made = []

    def slow():
        made.append(1)
        gevent.sleep(0.02)
        return TOLD

    with listening(path, slow):
        control = connect(path)
        asking = [gevent.spawn(control.ask) for _ in range(3)]
        assert [greenlet.get(timeout=PATIENCE) for greenlet in asking] == [TOLD] * 3
        assert control.ask() == TOLD
    assert len(made) == 1


def test_a_snapshot_is_new_when_the_last_one_is_old_enough(path, monkeypatch):
    monkeypatch.setattr(module, "FRESH", 0.0)
    numbers = iter(range(10))
    with listening(path, lambda: {"format": 1, "number": next(numbers)}):
        assert [connect(path).ask()["number"] for _ in range(3)] == [0, 1, 2]


@pytest.mark.parametrize("snapshot", [lambda: 1 / 0, lambda: {"format": 1, (): "no key of JSON"}], ids=["fails", "odd"])
def test_a_snapshot_that_fails_is_told_to_the_client_alone(path, snapshot):
    with listening(path, snapshot), pytest.raises(CommandError, match=r"could not tell: (Zero|Type).*report"):
        connect(path).ask()


def test_what_json_does_not_know_is_told_in_words(path, tmp_path):
    with listening(path, lambda: {"format": 1, "to": tmp_path}):
        assert connect(path).ask()["to"] == str(tmp_path)


# --- the client


def test_who_asks_where_nobody_listens_is_told_how_to_start(path):
    with pytest.raises(Gone, match=f"nobody listens at {path}; start a forwarder with --control {path}"):
        connect(path)


def test_a_forwarder_that_has_ended_since_is_gone_and_a_new_one_answers(path):
    with listening(path):
        control = connect(path)
    with pytest.raises(Gone):
        control.ask()
    with listening(path, lambda: {"format": 1, "state": "new"}):
        assert control.ask()["state"] == "new"


def test_a_forwarder_that_ends_before_its_answer_is_gone(path):
    def end():
        gevent.spawn(control.stop)
        gevent.sleep(60)

    with listening(path, end) as control, pytest.raises(Gone, match="has ended"):
        connect(path).ask()


def test_a_forwarder_that_hangs_is_told_from_one_that_is_gone(path, monkeypatch):
    monkeypatch.setattr(module, "_ANSWER_WITHIN", 0.05)
    with listening(path, lambda: gevent.sleep(60)):
        with pytest.raises(CommandError, match=r"no answer .* is its forwarder stopped") as raised:
            connect(path).ask()
        assert not isinstance(raised.value, Gone)


def test_another_users_socket_is_named_so(tmp_path):
    path = str(tmp_path / "control")
    with listening(path):
        is_root = os.geteuid() == 0
        if is_root:
            for directory in (tmp_path, *tmp_path.parents[:2]):
                directory.chmod(0o755)
            os.seteuid(NOBODY)
        else:
            os.chmod(path, 0)
        try:
            with pytest.raises(CommandError, match="another user's"):
                connect(path)
        finally:
            if is_root:
                os.seteuid(0)


@pytest.mark.parametrize(
    ("answer", "complaint"),
    [
        (b"HTTP/1.1 400 Bad Request\r\n", "no forwarder"),
        (b"[1]\n", "no forwarder"),
        (b"{}\n", "no forwarder"),
        (b'{"format": 2, "version": "9.9"}\n', r"of geyamux 9\.9"),
        (b'{"format": 1', "ended"),
        (b"", "ended"),
    ],
)
def test_a_strange_answer_is_an_error_of_one_line(path, answer, complaint):
    listener = gsocket.socket(gsocket.AF_UNIX)
    listener.bind(path)
    listener.listen()

    def serve(conn, _address):
        conn.recv(10)
        conn.sendall(answer)

    server = StreamServer(listener, serve)
    server.start()
    try:
        with pytest.raises(CommandError, match=complaint) as raised:
            connect(path).ask()
        assert "\n" not in str(raised.value)
    finally:
        server.stop(timeout=0)
