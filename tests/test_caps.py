"""Each cap bites at exactly its number and not one before, through a whole session whose peer the test plays.

What a peer, or a caller of ours, can make grow, and what bounds it. The caps of a single part are tested with that part
(the backlog and the places of streams in test_session_opening, the window of a stream in test_protocol_errors, writes and
opens above the outbox's limit in test_stream_writing); the attacks at full size and with their figures stand elsewhere.
"""

from __future__ import annotations

import contextlib
import errno
import gc
import logging
import tracemalloc

import gevent
import pytest
from gevent import socket as gsocket

from geyamux import Client, Config, ProtocolError, Server, table
from support.facing import PATIENCE, facing, narrow_pair, outcome, start
from support.links import make_link, sessions
from support.rawpeer import RawPeer, settle
from support.transports import FaultyTransport
from support.wire import ACK, FIN, GO_AWAY, HEADER_SIZE, PING, RST, SYN, WINDOW_UPDATE, data, go_away, ping, window_update

WINDOW = 262_144
USELESS = 10_000
REMEMBERED = 4_096


def odd(count: int, first: int = 1) -> range:
    """So many ids of a client."""
    return range(first, first + 2 * count, 2)


def syns(ids: range) -> bytes:
    return b"".join(window_update(stream_id, 0, SYN) for stream_id in ids)


def listen(peer: RawPeer) -> gevent.Greenlet:
    """Let the peer read all to the end; the greenlet returns the frames."""
    return start(peer.rest)


def take_all(session: Server, peer: RawPeer, ids: range) -> list:
    """Let the peer open streams with these ids, as many at a time as the backlog holds, and accept them."""
    taken = []
    step = session.config.accept_backlog
    for at in range(0, len(ids), step):
        peer.send(syns(ids[at : at + step]))
        taken += [session.accept(timeout=PATIENCE) for _ in ids[at : at + step]]
    return taken


@contextlib.contextmanager
def kept():
    """A function that says how many bytes are held more than at the beginning."""
    gc.collect()
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        yield lambda: tracemalloc.get_traced_memory()[0] - before
    finally:
        tracemalloc.stop()


@contextlib.contextmanager
def unfetched(config: Config):
    """A server whose connection takes nothing: one pong is on the wire, what else it has to say waits."""
    with facing("server", config, kind="memory", wrap=FaultyTransport) as (session, peer):
        faulty = session.conn
        faulty.stall("send")
        peer.send(ping(SYN, 99))
        settle()
        assert session.stats().queued == HEADER_SIZE
        yield session, peer, faulty


# --- inbound streams ---


def test_by_default_256_streams_wait_for_accept_and_not_257():
    with facing("server") as (session, peer):
        peer.send(syns(odd(256)))
        peer.expect_nothing()
        peer.send(syns(odd(1, 513)))
        peer.expect(WINDOW_UPDATE, RST, 513, 0)
        assert (session.stats().backlog, session.num_streams) == (256, 256)


def test_by_default_4096_streams_may_be_open_and_not_4097():
    with facing("server") as (session, peer):
        streams = take_all(session, peer, odd(4096))
        for stream in streams:
            peer.expect(WINDOW_UPDATE, ACK, stream.stream_id)
        peer.send(syns(odd(1, 8193)))
        peer.expect(WINDOW_UPDATE, RST, 8193)
        assert session.num_streams == 4096
        streams[7].close()
        peer.expect(WINDOW_UPDATE, FIN, 15)
        peer.send(window_update(15, 0, FIN) + syns(odd(2, 8195)))
        peer.expect(WINDOW_UPDATE, RST, 8197)
        assert session.accept(timeout=PATIENCE).stream_id == 8195


# --- replies that the peer provokes and does not fetch ---


def test_32_pongs_wait_for_a_peer_that_reads_nothing_and_no_more():
    with unfetched(Config()) as (session, peer, faulty):
        peer.send(b"".join(ping(SYN, value) for value in range(32)))
        settle()
        peer.send(b"".join(ping(SYN, value) for value in range(32, 5000)))
        settle()
        faulty.release("send")
        for value in (99, *range(32)):
            peer.expect(PING, ACK, 0, value)
        peer.expect_nothing()
        peer.send(ping(SYN, 7))
        peer.expect(PING, ACK, 0, 7)
        assert session.exception is None


def test_8192_provoked_resets_wait_for_a_peer_that_reads_nothing_and_the_next_ends_the_session():
    with unfetched(Config(max_incoming_streams=0)) as (session, peer, faulty):
        peer.send(syns(odd(8192)))
        settle()
        assert session.exception is None
        peer.send(syns(odd(1, 20_001)))
        settle()
        assert "8192 resets" in str(session.exception)
        faulty.release("send")
        frames = peer.rest()
        assert {(found.type, found.flags) for found in frames[1:-1]} == {(WINDOW_UPDATE, RST)}
        # The one that was too many may have been queued before it was counted.
        assert [found.stream_id for found in frames[1:-1] if found.stream_id != 20_001] == list(odd(8192))
        assert (frames[-1].type, frames[-1].length) == (GO_AWAY, 1)


# --- useless frames ---

#: name: what comes before and is not useless, then the number-th useless frame (or pair).
KINDS = {
    "credit for an unknown stream": (b"", lambda number: window_update(99, 5)),
    "no credit for an unknown stream": (b"", lambda number: window_update(99, 0)),
    "ack of an unknown stream": (b"", lambda number: window_update(99 + 2 * number, 0, ACK)),
    "fin of an unknown stream": (b"", lambda number: window_update(99 + 2 * number, 0, FIN)),
    "rst of an unknown stream": (b"", lambda number: window_update(99 + 2 * number, 0, RST)),
    "empty data for an unknown stream": (b"", lambda number: data(99, b"")),
    "a byte for an unknown stream": (b"", lambda number: data(99, b"x")),
    "a frame for stream 0": (b"", lambda number: window_update(0, 1)),
    "no credit": (b"", lambda number: window_update(1, 0)),
    "empty data": (b"", lambda number: data(1, b"")),
    "empty data behind a fin": (window_update(1, 0, FIN), lambda number: data(1, b"")),
    "a second fin": (window_update(1, 0, FIN), lambda number: window_update(1, 0, FIN)),
    "an ack of what the peer opened": (b"", lambda number: window_update(1, 0, ACK)),
    "syn with rst": (b"", lambda number: window_update(3 + 2 * number, 0, SYN | RST)),
    "syn then rst": (b"", lambda number: syns(odd(1, 3 + 2 * number)) + window_update(3 + 2 * number, 0, RST)),
    "one id opened and reset again and again": (b"", lambda number: syns(odd(1, 3)) + window_update(3, 0, RST)),
    "a second go away": (go_away(0), lambda number: go_away(0)),
    "an answer to no ping": (b"", lambda number: ping(ACK, number)),
}


@pytest.mark.parametrize("kind", KINDS)
def test_10_000_useless_frames_are_borne_and_the_next_ends_the_session(kind):
    """In full receives first, then one by one: it makes no difference how they come."""
    before, useless = KINDS[kind]
    with facing("server") as (session, peer):
        peer.send(syns(odd(1)) + before)
        stream = session.accept(timeout=PATIENCE)
        listening = listen(peer)
        peer.send(b"".join(useless(number) for number in range(USELESS - 3)))
        for number in range(USELESS - 3, USELESS):
            settle()
            peer.send(useless(number))
        settle()
        assert session.exception is None
        assert stream.session is session
        peer.send(useless(USELESS))
        frames = outcome(listening)
        assert isinstance(session.exception, ProtocolError)
        assert "10000 frames that move nothing" in str(session.exception)
        assert [(found.flags, found.stream_id) for found in frames[:-1]] == [(ACK, 1), (RST, 1)]
        assert (frames[-1].type, frames[-1].length) == (GO_AWAY, 1)


def test_refused_streams_are_useless_frames_also_for_a_peer_that_reads():
    with facing("server", Config(accept_backlog=1)) as (session, peer):
        peer.send(syns(odd(1)))
        listening = listen(peer)
        for at in range(0, USELESS, 1000):
            peer.send(syns(odd(1000, 3 + 2 * at)))
            settle()
        assert session.exception is None
        peer.send(syns(odd(1, 90_001)))
        frames = outcome(listening)
        assert "10000 frames that move nothing" in str(session.exception)
        # The last one is the stream that waited for accept: it has not been finished.
        refused = [found.stream_id for found in frames[:-1]]
        assert refused[:USELESS] == list(odd(USELESS, 3))
        assert refused[USELESS:] == [1]
        assert (frames[-1].type, frames[-1].length) == (GO_AWAY, 1)


def spend(peer: RawPeer) -> None:
    """Send so many useless frames as are borne."""
    peer.send(window_update(99, 0) * USELESS)
    settle()


def test_a_kibibyte_of_payload_makes_up_for_one_useless_frame():
    with facing("server") as (session, peer):
        peer.send(syns(odd(1)))
        stream = session.accept(timeout=PATIENCE)
        spend(peer)
        peer.send(data(1, b"x" * 2048) + window_update(99, 0) * 2)
        settle()
        peer.send(data(1, b"y" * 1023))
        settle()
        assert session.exception is None
        assert stream.recv(4096)[:1] == b"x"
        peer.send(window_update(99, 0))
        settle()
        assert "move nothing" in str(session.exception)


@pytest.mark.parametrize("stream_id", [1, 3, 5], ids=["closed here", "refused", "reset here"])
def test_payload_that_is_thrown_away_makes_up_for_nothing(stream_id):
    with facing("server", Config(max_incoming_streams=2)) as (session, peer):
        peer.send(syns(odd(1)) + syns(odd(1, 5)))
        session.accept(timeout=PATIENCE).close()
        reset = session.accept(timeout=PATIENCE)
        peer.send(syns(odd(1, 3)))
        settle()
        reset.reset()
        listening = listen(peer)
        # The refused stream was a useless frame already.
        peer.send(window_update(99, 0) * (USELESS - 1))
        settle()
        for _ in range(4):
            peer.send(data(stream_id, b"x" * 60_000))
        settle()
        assert session.exception is None
        peer.send(window_update(99, 0))
        settle()
        assert "move nothing" in str(session.exception)
        outcome(listening)


def test_of_4096_streams_that_have_ended_late_frames_are_free_and_of_one_more_they_are_not():
    """A refused stream has ended, too. Frames that bring nothing cost their header of the window they may fill."""
    with facing("server", Config(max_incoming_streams=0)) as (session, peer):
        listening = listen(peer)
        for at in range(0, REMEMBERED + 1, 1000):
            peer.send(syns(odd(min(1000, REMEMBERED + 1 - at), 1 + 2 * at)))
            settle()
        left = USELESS - (REMEMBERED + 1)
        peer.send(window_update(3, 0) * (WINDOW // HEADER_SIZE))
        peer.send(window_update(2 * REMEMBERED + 1, 0, FIN) * 10_000)
        peer.send(window_update(1, 0) * left)
        settle()
        assert session.exception is None
        peer.send(window_update(1, 0))
        settle()
        assert "move nothing" in str(session.exception)
        outcome(listening)


def until(condition) -> None:
    """Wait for what many frames bring about, which are handled in portions."""
    with gevent.Timeout(PATIENCE):
        while not condition():
            gevent.sleep(0.001)


def test_a_remembered_stream_is_forgiven_one_window_and_not_a_frame_more():
    with facing("server", Config(max_incoming_streams=0)) as (session, peer):
        listening = listen(peer)
        peer.send(syns(odd(1)))
        peer.send(window_update(1, 0) * (WINDOW // HEADER_SIZE))
        peer.send(window_update(1, 0) * (USELESS - 1))
        until(lambda: session.stats().frames_received == 1 + WINDOW // HEADER_SIZE + USELESS - 1)
        settle()
        assert session.exception is None
        peer.send(window_update(1, 0))
        until(lambda: session.closed)
        assert "move nothing" in str(session.exception)
        outcome(listening)


# --- past a budget: others do not notice ---


@pytest.mark.parametrize("reads", [True, False], ids=["reads", "does not read"])
def test_other_sessions_of_the_process_do_not_notice_that_one_is_cut_off(reads):
    with sessions("socketpair") as (client, server), facing("server", ends=narrow_pair()) as (session, peer):
        ours, theirs = client.open(), server.accept(timeout=PATIENCE)
        trips = 0

        def echo() -> None:
            while True:
                theirs.sendall(theirs.recv(100))

        def ask() -> None:
            nonlocal trips
            while True:
                ours.sendall(b"?")
                assert ours.recv(100) == b"?"
                trips += 1

        running = [gevent.spawn(echo), gevent.spawn(ask)]
        if reads:
            running.append(gevent.spawn(peer.rest))
        with gevent.Timeout(PATIENCE):
            while session.exception is None:
                before = trips
                with contextlib.suppress(OSError):
                    peer.send(syns(odd(1000)) + window_update(99, 0) * 1000)
                while trips < before + 2:
                    gevent.sleep(0)
        assert isinstance(session.exception, ProtocolError)
        before = trips
        with gevent.Timeout(PATIENCE):
            while trips < before + 10:
                gevent.sleep(0)
        assert not client.closed and not server.closed
        gevent.killall(running)


def test_the_error_of_the_session_holds_nothing_of_what_the_peer_sent():
    with facing("server") as (session, peer):
        peer.send(data(99, b"x" * 60_000) + b"\x09" * 12 + b"z" * 5000)
        settle()
        trace = session.exception.__traceback__
        held = []
        while trace is not None:
            held += [value for value in trace.tb_frame.f_locals.values() if isinstance(value, (bytes, bytearray))]
            trace = trace.tb_next
        assert [len(value) for value in held if len(value) > 100] == []


# --- what our own callers queue ---


def test_accepts_wait_above_the_limit_of_the_outbox():
    """An acknowledgement is 12 bytes: 341 and the pong on the wire are the first to reach 4,096."""
    with unfetched(Config(outbox_limit=4096, accept_backlog=400)) as (session, peer, faulty):
        peer.send(syns(odd(400)))
        for _ in range(341):
            session.accept(timeout=PATIENCE)
        assert session.stats().queued == 4104
        accepting = start(session.accept)
        assert not accepting.ready()
        faulty.release("send")
        assert outcome(accepting).stream_id == 683
        peer.expect(PING, ACK, 0, 99)
        for stream_id in odd(342):
            peer.expect(WINDOW_UPDATE, ACK, stream_id)


def test_answers_that_the_peer_had_us_take_back_do_not_pile_up(monkeypatch):
    """It opens, lets us answer, and resets; nothing of it is fetched, and nothing may be kept for each."""
    monkeypatch.setattr(table, "_REMEMBERED", 16)  # what is remembered of 4,096 streams is more than what is measured
    cycles = 2000
    with unfetched(Config(connection_write_timeout=None)) as (session, peer, faulty):
        answering: set[gevent.Greenlet] = set()

        def answer(stream) -> None:
            with contextlib.suppress(OSError):
                stream.sendall(b"x" * 5000)
            stream.close()

        def serve() -> None:
            for stream in session:
                worker = gevent.spawn(answer, stream)
                answering.add(worker)
                worker.rawlink(answering.discard)

        serving = start(serve)
        with kept() as held:
            for stream_id in odd(cycles):
                peer.send(syns(odd(1, stream_id)))
                settle()
                peer.send(window_update(stream_id, 0, RST))
                settle()
                faulty.log.clear()
            assert session.exception is None
            assert session.stats().incoming == cycles
            assert held() < 200_000
        serving.kill()
        gevent.killall(list(answering))


def test_large_writes_that_were_given_up_do_not_pile_up():
    """A caller that tries again and again, and a connection that takes nothing meanwhile."""
    with unfetched(Config(connection_write_timeout=None)) as (session, peer, _):
        peer.send(syns(odd(1)))
        stream = session.accept(timeout=PATIENCE)
        body = b"x" * 5000
        with kept() as held:
            for _ in range(4000):
                writing = gevent.spawn(stream.sendall, body)
                gevent.sleep(0)
                writing.kill()
            assert held() < 800_000
        assert stream.stats().send_credit == WINDOW


def test_4096_own_streams_wait_for_an_end_that_the_peer_never_sends_and_not_many_more(monkeypatch):
    """Closed here, acknowledged there, and no FIN ever. Those that have waited for long make room."""
    monkeypatch.setattr(table, "_CROWDED_TIMEOUT", 0.0)
    with facing("client") as (session, peer):
        listening = listen(peer)
        for at in range(0, 4500, 250):
            for _ in range(250):
                session.open().close()
            peer.send(b"".join(window_update(stream_id, 0, ACK) for stream_id in odd(250, 1 + 2 * at)))
            settle()
            assert session.num_streams == min(at + 250, 4096)
        session.abort()
        resets = [found.stream_id for found in outcome(listening) if found.flags == RST]
        assert resets == list(odd(4500 - 4096))


# --- unread bytes ---


def test_unread_bytes_are_never_more_than_the_budget_however_evenly_they_are_spread():
    """The peer spreads its bytes, so that each stream holds little, and opens a new one for each that was reset."""
    budget, count = 1 << 20, 256
    with facing("server", Config(receive_budget=budget)) as (session, peer):
        held = {stream.stream_id: stream for stream in take_all(session, peer, odd(count))}
        ring = list(held)
        peer.send(b"".join(data(stream_id, b"x" * (budget // count)) for stream_id in ring))
        settle()
        assert session.stats().unread == budget
        assert all(stream.stats().state == "ESTABLISHED" for stream in held.values())
        highest, following = 0, 2 * count + 1
        for _ in range(60):
            wire = b""
            for stream_id in [stream_id for stream_id in ring if held[stream_id].stats().state == "RESET"]:
                held.pop(stream_id).close()
                ring.remove(stream_id)
                wire += syns(odd(1, following))
                following += 2
            chosen, ring = ring[:16], ring[16:] + ring[:16]
            peer.send(wire + b"".join(data(stream_id, b"y" * 3600) for stream_id in chosen))
            settle()
            for _ in range(session.stats().backlog):
                stream = session.accept()
                held[stream.stream_id] = stream
                ring.append(stream.stream_id)
            highest = max(highest, session.stats().unread)
        assert highest <= budget
        assert session.exception is None


def test_a_byte_beyond_the_budget_costs_the_stream_that_hoards_most_and_no_other():
    with facing("server", Config(receive_budget=600_000)) as (session, peer):
        streams = take_all(session, peer, odd(3))
        for stream_id, size in ((1, 200_000), (3, 220_000), (5, 180_000)):
            peer.send(b"".join(data(stream_id, b"x" * 20_000) for _ in range(size // 20_000)))
        settle()
        assert session.stats().unread == 600_000
        assert [stream.stats().state for stream in streams] == ["ESTABLISHED"] * 3
        peer.send(data(5, b"y"))
        settle()
        assert [stream.stats().state for stream in streams] == ["ESTABLISHED", "RESET", "ESTABLISHED"]
        assert session.stats().unread == 380_001


def test_the_rest_of_a_chunk_does_not_hold_what_was_read_of_it():
    """A line of 60,000 bytes and the first byte of the next: that byte is all that may be kept."""
    with facing("server") as (session, peer):
        streams = take_all(session, peer, odd(32))
        with kept() as held:
            for stream in streams:
                peer.send(data(stream.stream_id, b"x" * 59_999 + b"\ny"))
                assert len(stream.readline()) == 60_000
            assert session.stats().unread == 32
            assert held() < 32 * 20_000
        assert [stream.recv(10) for stream in streams] == [b"y"] * 32


def test_bytes_for_a_read_that_waits_for_more_cost_little_more_than_their_number():
    """Two bytes in each turn: they are granted at once, and no window bounds them."""
    frames = 6000
    with facing("server") as (session, peer):
        (stream,) = take_all(session, peer, odd(1))
        reading = start(stream.read, 2 * frames)
        with kept() as held:
            for _ in range(frames - 1):
                peer.send(data(1, b"ab"))
                settle()
            assert held() < 100_000
        peer.send(data(1, b"yz"))
        assert outcome(reading) == b"ab" * (frames - 1) + b"yz"


def test_a_window_that_has_grown_to_its_full_size_keeps_it_when_all_was_read():
    with facing("client", Config(window_auto_tune=2 * WINDOW)) as (session, peer):
        stream = session.open()
        measuring = peer.next()
        opening = peer.next()
        assert (measuring.type, opening.flags) == (PING, SYN)
        gevent.sleep(0.2)
        peer.send(ping(ACK, measuring.length) + window_update(1, 0, ACK))
        granted, sent = WINDOW, 0
        for size in (140_000, 140_000, 240_000):
            peer.send(b"".join(data(1, b"x" * 20_000) for _ in range(size // 20_000)))
            assert len(stream.read(size)) == size
            settle()
            sent += size
        while granted - sent + session.stats().unread < 4 * WINDOW:
            try:
                granted += peer.next(0.2).length
            except AssertionError:
                break
        assert granted > 2 * WINDOW
        assert stream.stats().receive_limit == 2 * WINDOW
        assert stream.stats().receive_window == granted - sent
        peer.send(data(1, bytes(granted - sent)))
        settle()
        assert session.exception is None
        assert session.stats().unread == granted - sent


# --- the hub ---


def test_a_peer_that_reads_no_more_but_sends_for_ever_does_not_hold_the_hub():
    """A send that fails looks for the peer's reason in what has come, and there is always more of that."""
    with facing("server") as (session, peer):
        receives = 0

        def receive(size: int) -> bytes:
            nonlocal receives
            receives += 1
            if receives > 1000:
                raise BlockingIOError
            return ping(SYN, 1) * 5000

        def fail(data: bytes) -> int:
            raise BrokenPipeError(errno.EPIPE, "the peer reads no more")

        settle()
        session._transport.recv, session._transport.send = receive, fail
        peer.send(ping(SYN, 1))
        assert session.join(PATIENCE)
        assert 0 < receives <= 64


@pytest.mark.timeout(5)
def test_bytes_that_no_stream_holds_do_not_hold_the_hub():
    """A stream that another thread's collector has found is counted until the hub hears of it, and is nowhere."""
    with facing("server", Config(receive_budget=WINDOW)) as (session, peer):
        session._table.budget.unread += WINDOW + 1
        peer.send(ping(SYN, 7))
        with gevent.Timeout(PATIENCE):
            peer.expect(PING, ACK, 0, 7)
        session._table.budget.unread -= WINDOW + 1


def test_a_receive_takes_in_few_tls_records_however_small_they_are():
    """Each costs as much as one of 16 KiB: 65,000 of one byte would hold the hub for long."""
    with make_link("tls13") as link:
        session = Client(link.a)
        receive, sizes = session._transport.recv, []

        def watched(size: int) -> bytes:
            received = receive(size)
            sizes.append(len(received))
            return received

        session._transport.recv = watched
        for byte in ping(ACK, 5) * 250:
            link.b.send(bytes([byte]))
        with gevent.Timeout(PATIENCE):
            while session.stats().frames_received < 250:
                gevent.sleep(0.001)
        assert sum(sizes) == 3000
        assert max(sizes) <= 256
        session.abort()
        session.join(PATIENCE)


# --- the log ---


def test_the_name_of_a_peer_forges_no_log_line(tmp_path, caplog):
    """A Unix socket may be bound to a path with a line break in it."""
    caplog.set_level(logging.INFO, "geyamux")
    with (
        contextlib.closing(gsocket.socket(gsocket.AF_UNIX)) as listener,
        contextlib.closing(gsocket.socket(gsocket.AF_UNIX)) as near,
    ):
        listener.bind(str(tmp_path / "listener"))
        listener.listen()
        near.bind(str(tmp_path / "near\nWARNING forged"))
        near.connect(str(tmp_path / "listener"))
        far, _ = listener.accept()
        session = Server(far)
        session.abort()
        session.join(PATIENCE)
        settle()
    assert "session begins" in caplog.text
    assert not [record for record in caplog.records if "\n" in record.getMessage()]


@pytest.mark.parametrize(
    "more", [data(1, b"x" * 1000), bytes(12) * 1000, b"\xff" * 12_000], ids=["data", "zeros", "ones"]
)
def test_a_peer_that_breaks_the_protocol_again_and_again_has_one_line_in_the_log(more, caplog):
    """What comes behind the first offence is thrown away unread."""
    caplog.set_level(logging.INFO, "geyamux")
    with facing("server", Config(close_timeout=0.2)) as (session, peer):
        listening = listen(peer)
        for _ in range(50):
            with contextlib.suppress(OSError):
                peer.send(b"\x09" * 12 + more)
            settle()
        assert isinstance(session.exception, ProtocolError)
        peer.close()
        session.join(PATIENCE)
        outcome(listening)
    assert len([record for record in caplog.records if record.levelno >= logging.WARNING]) == 1
    assert len(caplog.records) <= 3
