"""`geyamux ping`: what it prints, how it ends, against servers that answer, that don't, and that are none."""

from __future__ import annotations

import contextlib
import re
import signal
import struct
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gevent
import gevent.server
import gevent.ssl
import pytest
import trustme
from gevent import socket as gsocket

import geyamux
from commands.program import run, start
from geyamux.cli.ping import Tally
from interop.peers import RemoteSide
from support.links import free_port
from support.programs import build_go
from support.waiting import wait_for
from tunnels.running import GEYAMUX

ROOT = Path(__file__).parent.parent.parent
PONG = re.compile(r"pong from (\S+): seq=(\d+) time=(\d+\.\d{3}) ms")
ADVICE = "answers no Yamux ping: check that a Yamux server listens there, and give --ca or --server-name if it wants TLS"


@contextlib.contextmanager
def listening(handle: Callable[[Any], object], **options: Any) -> Iterator[str]:
    """A server that hands each connection to `handle` and closes it afterwards; its address."""

    def serve(conn, _address):
        with conn, contextlib.suppress(OSError):
            handle(conn)

    server = gevent.server.StreamServer(("127.0.0.1", 0), serve, spawn=10, **options)
    server.start()
    try:
        yield f"127.0.0.1:{server.server_port}"
    finally:
        server.stop(timeout=0)


def hold(conn):
    """Read for as long as there is somebody."""
    while conn.recv(4096):
        pass


def be_yamux(conn):
    with geyamux.Server(conn) as session:
        session.join()


@pytest.fixture
def server() -> Iterator[str]:
    with listening(be_yamux) as address:
        yield address


class Answering:
    """A peer by hand: of the pings it answers those whose number is in `numbers`, and notes when each came."""

    def __init__(self, *numbers: int) -> None:
        self.numbers = numbers
        self.times: list[float] = []
        self.frames: list[bytes] = []

    def __call__(self, conn):
        while (header := conn.recv(12, gsocket.MSG_WAITALL)) and len(header) == 12:
            self.frames.append(header)
            if header.startswith(bytes.fromhex("00 02 0001 00000000")):
                self.times.append(time.monotonic())
                if len(self.times) in self.numbers:
                    conn.sendall(bytes.fromhex("00 02 0002 00000000") + header[8:])


class Vanishing(Answering):
    """Closes the connection after that many pongs."""

    def __call__(self, conn):
        for _ in self.numbers:
            header = conn.recv(12, gsocket.MSG_WAITALL)
            conn.sendall(bytes.fromhex("00 02 0002 00000000") + header[8:])


def test_three_pings_give_a_header_three_pongs_and_statistics(server):
    header, *pongs, rule, counts, trip = run("ping", "-c", "3", "-i", "0.01", server).out.splitlines()
    assert header == f"PING {server}: Yamux"
    found = [PONG.fullmatch(line) for line in pongs]
    assert [(match[1], match[2]) for match in found] == [(server, "1"), (server, "2"), (server, "3")]
    assert rule == f"--- {server} ping statistics ---"
    assert re.fullmatch(r"3 sent, 3 received, 0% loss, time \d+\.\d s", counts)
    shortest, mean, longest, deviation = map(float, re.findall(r"\d+\.\d{3}", trip))
    assert trip.startswith("round trip min/avg/max/mdev = ") and trip.endswith(" ms")
    times = [float(match[3]) for match in found]
    assert (shortest, longest) == (min(times), max(times))
    assert mean == pytest.approx(sum(times) / 3, abs=0.001)
    assert deviation == pytest.approx((sum((one - mean) ** 2 for one in times) / 3) ** 0.5, abs=0.002)


def test_the_statistics_are_those_of_ping():
    tally = Tally()
    tally.sent, tally.times = 8, [1.0, 2.0, 3.0, 4.0, 5.0]
    counts, trip = str(tally).splitlines()
    assert counts == "8 sent, 5 received, 37.5% loss, time 0.0 s"
    assert trip == "round trip min/avg/max/mdev = 1.000/3.000/5.000/1.414 ms"


def test_the_time_is_the_round_trip():
    def answer_late(conn):
        header = conn.recv(12, gsocket.MSG_WAITALL)
        gevent.sleep(0.2)
        conn.sendall(bytes.fromhex("00 02 0002 00000000") + header[8:])
        hold(conn)

    with listening(answer_late) as address:
        out = run("ping", "-c", "1", address).out
    assert 200 <= float(PONG.search(out)[3]) < 5000


def test_no_stream_is_opened():
    peer = Answering(1, 2)
    with listening(peer) as address:
        run("ping", "-c", "2", "-i", "0.01", address)
    types = [(frame[1], struct.unpack(">H", frame[2:4])[0]) for frame in peer.frames]
    assert types == [(2, 1), (2, 1), (3, 0)]  # two pings, GoAway


def test_nothing_is_waited_for_behind_the_last_ping(server):
    run("ping", "-c", "1", "-i", "60", server)  # which is given less time than that


def test_the_interval_lies_between_two_pings():
    peer = Answering(1, 2, 3)
    with listening(peer) as address:
        run("ping", "-c", "3", "-i", "0.3", address)
    first, second, third = peer.times
    assert second - first >= 0.29
    assert third - second >= 0.29


def test_a_ping_without_an_answer_is_a_loss_and_the_next_one_goes_out():
    peer = Answering(1, 3)
    with listening(peer) as address:
        done = run("ping", "-c", "3", "-i", "0.01", "-W", "0.5", address)
    assert f"no answer from {address}: seq=2 after 0.5 s\npong from {address}: seq=3 " in done.out
    assert "\n3 sent, 2 received, 33.3% loss, " in done.out
    assert done.err == ""


def test_ctrl_c_prints_the_statistics(children, server):
    child = start(children, "ping", "-i", "0.01", server)
    child.wait_line(lambda line: "seq=3 " in line, "the third pong")
    child.process.send_signal(signal.SIGINT)
    child.wait(0)
    # Both outputs: no traceback is among the lines.
    blank, rule, counts, trip = child.lines[-4:]
    assert (blank, rule) == ("", f"--- {server} ping statistics ---")
    sent, received = map(int, re.match(r"(\d+) sent, (\d+) received", counts).groups())
    assert sent >= received == len(child.lines) - 5 >= 3
    assert trip.startswith("round trip ")


def test_ctrl_c_before_any_answer_is_a_failure(children):
    peer = Answering()
    with listening(peer) as address:
        child = start(children, "ping", address)
        wait_for(lambda: peer.times, "a ping")
        child.process.send_signal(signal.SIGINT)
        child.wait(1)
    assert child.lines[-1].startswith("1 sent, 0 received, 100% loss, ")


def test_a_connection_that_is_lost_ends_it_with_a_line_and_the_statistics():
    with listening(Vanishing(1, 2)) as address:
        done = run("ping", "-i", "0.01", address, code=1)
    *_, last_pong, lost, rule, counts, _trip = done.out.splitlines()
    assert last_pong.startswith(f"pong from {address}: seq=2 ")
    assert lost == "connection lost: the peer closed the connection"
    assert rule == f"--- {address} ping statistics ---"
    assert re.match(r"[23] sent, 2 received, ", counts)
    assert done.err == ""


def test_a_lost_connection_is_noticed_before_the_next_ping_is_due():
    with listening(Vanishing(1)) as address:
        began = time.monotonic()
        done = run("ping", "-i", "60", address, code=1)
    assert "\n1 sent, 1 received, 0% loss, " in done.out
    assert time.monotonic() - began < 20


def assert_advised(done, address):
    """One line with what to check, and in brackets what happened."""
    assert done.err.startswith(f"geyamux ping: {address} takes the connection but {ADVICE} (")
    assert done.err.endswith(")\n") and done.err.count("\n") == 1


def test_a_server_of_ssh_is_told_from_one_of_yamux():
    def greet(conn):
        conn.sendall(b"SSH-2.0-OpenSSH_9.2p1 Debian-2\r\n")
        hold(conn)

    with listening(greet) as address:
        done = run("ping", address, code=1)
    assert_advised(done, address)


def test_a_server_of_http_is_told_from_one_of_yamux():
    def refuse(conn):
        conn.recv(12, gsocket.MSG_WAITALL)
        conn.sendall(b"HTTP/1.1 400 Bad Request\r\nConnection: close\r\n\r\n")

    with listening(refuse) as address:
        done = run("ping", address, code=1)
    assert_advised(done, address)


def test_a_server_that_closes_is_told_from_one_of_yamux():
    with listening(lambda conn: conn.recv(12)) as address:
        done = run("ping", address, code=1)
    assert_advised(done, address)


def test_at_the_first_silence_it_says_what_to_check_and_goes_on():
    with listening(hold) as address:
        done = run("ping", "-c", "3", "-i", "0.01", "-W", "0.1", address, code=1)
    assert done.err == f"geyamux ping: {address} takes the connection but {ADVICE}\n"
    lost = [f"no answer from {address}: seq={number} after 0.1 s" for number in (1, 2, 3)]
    _header, *lines, _rule, counts = done.out.splitlines()
    assert lines == lost
    assert counts.startswith("3 sent, 0 received, 100% loss, ")


def test_a_port_where_nobody_listens_is_one_line():
    address = f"127.0.0.1:{free_port()}"
    done = run("ping", address, code=1)
    assert done.err.startswith(f"geyamux ping: can't connect to {address}: connection refused")
    assert done.err.count("\n") == 1
    assert done.out == ""


def test_a_name_is_shown_with_its_number(server):
    port = server.rpartition(":")[2]
    assert run("ping", "-c", "1", f"localhost:{port}").out.startswith(f"PING localhost:{port} (127.0.0.1): Yamux\n")


def test_a_unix_socket_is_an_address(tmp_path):
    path = tmp_path / "yamux"
    listener = gsocket.socket(gsocket.AF_UNIX)
    listener.bind(str(path))
    listener.listen()
    server = gevent.server.StreamServer(listener, lambda conn, _: be_yamux(conn))
    server.start()
    try:
        assert f"pong from unix:{path}: seq=1 time=" in run("ping", "-c", "1", f"unix:{path}").out
    finally:
        server.stop()


def test_a_child_process_is_an_address():
    command = f"exec:{' '.join(GEYAMUX)} bench --serve stdio:"
    assert "\n1 sent, 1 received, 0% loss, " in run("ping", "-c", "1", command).out


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (["stdio:"], "standard output is for the answers"),
        (["-c", "0", "7000"], "must be at least 1"),
        (["-i", "0", "7000"], "must be more than 0 seconds"),
        (["-W", "never", "7000"], "'never' is no number of seconds"),
        ([], "required: ADDR"),
    ],
)
def test_words_that_make_no_sense_are_told(words, why):
    done = run("ping", *words, code=2)
    assert why in done.err
    assert done.out == ""


def test_the_help_has_examples():
    assert "\nexamples:\n  geyamux ping " in run("ping", "--help").out


# --- TLS ---


@pytest.fixture(scope="module")
def trust(tmp_path_factory) -> Path:
    """A directory with ca.pem, server.pem and client.pem, and other.pem of another authority."""
    place = tmp_path_factory.mktemp("trust")
    authority = trustme.CA()
    authority.cert_pem.write_to_path(place / "ca.pem")
    trustme.CA().cert_pem.write_to_path(place / "other.pem")
    authority.issue_cert("relay.test", "127.0.0.1").private_key_and_cert_chain_pem.write_to_path(place / "server.pem")
    authority.issue_cert("agent.test").private_key_and_cert_chain_pem.write_to_path(place / "client.pem")
    return place


@contextlib.contextmanager
def listening_with_tls(trust: Path, *, wants_certificate: bool = False) -> Iterator[str]:
    context = gevent.ssl.SSLContext(gevent.ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(trust / "server.pem")
    if wants_certificate:
        context.verify_mode = gevent.ssl.CERT_REQUIRED
        context.load_verify_locations(trust / "ca.pem")
    with listening(be_yamux, ssl_context=context, do_handshake_on_connect=False) as address:
        yield address


def test_it_goes_over_tls(trust):
    with listening_with_tls(trust) as address:
        assert "1 received" in run("ping", "-c", "1", "--ca", str(trust / "ca.pem"), address).out
        named = ["--ca", str(trust / "ca.pem"), "--server-name", "relay.test"]
        assert "1 received" in run("ping", "-c", "1", *named, address).out


def test_it_shows_its_certificate(trust):
    with listening_with_tls(trust, wants_certificate=True) as address:
        words = ["--ca", str(trust / "ca.pem"), "--cert", str(trust / "client.pem")]
        assert "1 received" in run("ping", "-c", "1", *words, address).out
        run("ping", "-c", "1", "--ca", str(trust / "ca.pem"), address, code=1)


def test_a_server_that_is_not_trusted_is_told_and_not_pinged(trust):
    with listening_with_tls(trust) as address:
        for words in (["--ca", str(trust / "other.pem")], ["--ca", str(trust / "ca.pem"), "--server-name", "x.test"]):
            done = run("ping", "-c", "1", *words, address, code=1)
            assert done.err.startswith(f"geyamux ping: can't connect to {address}: its certificate is not trusted (")
            assert done.err.count("\n") == 1 and done.out == ""


def test_without_tls_the_advice_is_to_use_it(trust):
    with listening_with_tls(trust) as address:
        done = run("ping", "-c", "1", address, code=1)
    assert ADVICE in done.err and done.err.count("\n") == 1


# --- another implementation ---


@pytest.mark.interop
@pytest.mark.timeout(150)
def test_hashicorp_answers(tmp_path):
    peer = RemoteSide([build_go(ROOT / "tests/interop/gopeer", tmp_path), "-listen"])
    try:
        port = peer.event("listening")["port"]
        done = run("ping", "-c", "5", "-i", "0.01", f"127.0.0.1:{port}")
        peer.ask("ended")
    finally:
        peer.stop()
    assert "\n5 sent, 5 received, 0% loss, " in done.out
    # Of streams that nobody has closed, of frames that it does not understand, it would write.
    assert peer.log == []
