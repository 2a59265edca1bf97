"""The streams of a session: ids, counts, limits, and what is remembered of those that ended. The outbox is a record.

Longer than other modules because all tests of one subject stand together, each short and by itself.
"""

from __future__ import annotations

import socket
import time
import weakref
from collections.abc import Callable

import pytest
from gevent.hub import get_hub
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from geyamux import table as table_module
from geyamux.config import Config
from geyamux.errors import ProtocolError, SessionClosed, StreamClosed, StreamReset, StreamsExhausted
from geyamux.table import StreamTable
from geyamux.waking import Waker

SYN, ACK, FIN, RST = 1, 2, 4, 8
WINDOW = 262144


class FakeOutbox:
    """Keeps what it is given; all is on the wire at once unless it stalls."""

    def __init__(self) -> None:
        self.pace = Waker.of(get_hub())
        self.lane = self.pace.lane()
        self.log: list[tuple] = []
        self.queue: list[bytes] = []
        self.appended = 0
        self.has_room = True
        self.is_easy = False
        #: Where it stalled; None while all that is appended is on the wire at once.
        self.stalled_at: int | None = None

    def stall(self):
        self.stalled_at = self.appended

    @property
    def loaded(self):
        return self.appended if self.stalled_at is None else self.stalled_at

    taken = loaded

    def append(self, frame):
        self.log.append(("append", frame.hex()))
        self.queue.append(frame)
        self.appended += 1
        return self.appended

    def withdraw_stream(self, stream_id):
        self.queue = [frame for frame in self.queue if int.from_bytes(frame[4:8], "big") != stream_id]

    def reset(self, stream_id, code=0):
        self.log.append(("reset", stream_id, code))

    def refuse(self, stream_id):
        self.log.append(("refuse", stream_id))

    is_breathless = False

    def take_turns(self, work):
        """Fairness is the outbox's own matter."""

    count_work = take_turns

    def on_provoked(self):
        self.log.append(("provoked",))

    def acknowledge(self, stream_id, extra):
        self.log.append(("acknowledge", stream_id, extra))

    def grant(self, stream_id, buffer):
        self.log.append(("grant", stream_id))

    def forget(self, stream_id):
        """Acknowledgements and credit are not kept here."""

    forget_grant = forget


class FakeSession:
    name = "a session"


class Bench:
    def __init__(self, *, is_client: bool = True, **settings) -> None:
        self.outbox = FakeOutbox()
        self.changes = 0
        self.armed: list[float] = []
        self.arrivals = 0
        self.table = StreamTable(
            FakeSession(),
            self.outbox,
            Config(**settings),
            is_client=is_client,
            arrived=self._on_arrival,
            changed=self._on_change,
        )
        self.table.arm = self.armed.append

    def _on_arrival(self) -> None:
        self.arrivals += 1

    def _on_change(self) -> None:
        self.changes += 1

    @property
    def log(self) -> list[tuple]:
        return self.outbox.log

    def admit(self, stream_id: int, flags: int = SYN, delta: int = 0):
        return self.table.admit(stream_id, flags, delta)

    def accepted(self, stream_id: int):
        self.admit(stream_id)
        return self.table.next_accepted()

    def resets(self) -> list[int]:
        return [entry[1] for entry in self.log if entry[0] in ("reset", "refuse")]


@pytest.fixture
def bench() -> Bench:
    return Bench()


def finish(stream) -> None:
    """End a stream on both sides."""
    stream._on_flags(FIN)
    stream.close()


# --- opening ---


@pytest.mark.parametrize(("is_client", "ids"), [(True, [1, 3, 5]), (False, [2, 4, 6])])
def test_a_client_opens_odd_ids_and_a_server_even_ones(is_client, ids):
    bench = Bench(is_client=is_client)
    assert [bench.table.open().stream_id for _ in range(3)] == ids
    assert list(bench.table.streams) == ids
    assert bench.table.opened == 3


def test_opening_queues_a_window_update_with_syn(bench):
    bench.table.open()
    assert bench.log == [("append", "000100010000000100000000")]


def test_the_syn_grants_what_the_window_is_larger_than_the_initial_one():
    bench = Bench(max_stream_window=WINDOW + 0x12345)
    bench.table.open()
    assert bench.log == [("append", "000100010000000100012345")]


def test_every_id_is_used_once_and_then_no_more(bench):
    bench.table._next_id = 0xFFFFFFFF
    assert bench.table.open().stream_id == 0xFFFFFFFF
    for _ in range(2):
        with pytest.raises(StreamsExhausted):
            bench.table.open()
    assert bench.table.opened == 1
    assert len(bench.log) == 1


def test_the_last_even_id_is_used_as_well():
    bench = Bench(is_client=False)
    bench.table._next_id = 0xFFFFFFFE
    assert bench.table.open().stream_id == 0xFFFFFFFE
    with pytest.raises(StreamsExhausted):
        bench.table.open()


def test_new_streams_have_the_timeout_of_the_config(monkeypatch):
    assert Bench(stream_timeout=2.5).table.open().gettimeout() == 2.5
    assert Bench(stream_timeout=None).table.open().gettimeout() is None
    monkeypatch.setattr(socket, "getdefaulttimeout", lambda: 7.0)
    assert Bench().table.open().gettimeout() == 7.0


def test_streams_of_the_peer_have_the_timeout_of_the_config():
    assert Bench(stream_timeout=2.5).accepted(2).gettimeout() == 2.5


def test_unacknowledged_streams_have_places():
    bench = Bench(accept_backlog=2)
    first, second = bench.table.open(), bench.table.open()
    assert bench.table.unacknowledged == 2
    assert not bench.table.may_open
    first._on_flags(ACK)
    assert bench.table.unacknowledged == 1
    assert bench.table.may_open
    assert bench.changes == 1
    second._on_data(b"the first frame of any kind")
    assert bench.table.unacknowledged == 0


@pytest.mark.parametrize(
    "end",
    [
        lambda stream: stream._on_flags(ACK),
        lambda stream: stream._on_flags(0),
        lambda stream: stream._on_data(b"x"),
        lambda stream: stream._on_flags(FIN),
        lambda stream: stream._on_flags(RST),
        lambda stream: stream.reset(),
    ],
    ids=["ack", "credit", "data", "fin", "rst", "reset here"],
)
def test_a_place_is_given_back_exactly_once(bench, end):
    stream = bench.table.open()
    other = bench.table.open()
    end(stream)
    assert bench.table.unacknowledged == 1
    stream._on_flags(ACK)
    stream._on_flags(RST)
    stream.reset()
    stream.close()
    assert bench.table.unacknowledged == 1
    assert other.session.name == "a session"


def test_closing_and_finishing_do_not_give_the_place_back(bench):
    stream = bench.table.open()
    stream.close()
    assert bench.table.unacknowledged == 1
    stream._on_flags(ACK)
    assert bench.table.unacknowledged == 0


def test_open_streams_have_places():
    bench = Bench(max_outgoing_streams=2)
    first, _ = bench.table.open(), bench.table.open()
    first._on_flags(ACK)
    assert not bench.table.may_open
    first.close()
    assert not bench.table.may_open
    first._on_flags(FIN)
    assert bench.table.may_open


def test_streams_of_the_peer_take_no_place_among_the_own():
    bench = Bench(max_outgoing_streams=1, accept_backlog=1)
    bench.admit(2)
    assert bench.table.may_open


def test_a_stream_whose_syn_has_not_left_vanishes_with_it(bench):
    bench.outbox.stall()
    bench.table.open().reset()
    assert bench.outbox.queue == []
    assert bench.resets() == []
    assert bench.table.streams == {}
    assert bench.table.unacknowledged == 0


# --- admitting ---


def test_a_syn_of_the_peer_waits_in_the_backlog(bench):
    stream = bench.admit(2)
    assert list(bench.table.streams) == list(bench.table.backlog) == [2]
    assert bench.table.admitted == 1
    assert stream.stats().send_credit == WINDOW
    assert bench.log == []


def test_the_credit_of_the_syn_is_beyond_the_initial_window(bench):
    assert bench.admit(2, SYN, 1000).stats().send_credit == WINDOW + 1000
    assert bench.admit(4, SYN, 0xFFFFFFFF - WINDOW).stats().send_credit == 0xFFFFFFFF


def test_accepting_acknowledges_the_oldest(bench):
    for stream_id in (6, 2, 4):
        bench.admit(stream_id)
    assert [bench.table.next_accepted().stream_id for _ in range(3)] == [6, 2, 4]
    assert bench.log == [("acknowledge", 6, 0), ("acknowledge", 2, 0), ("acknowledge", 4, 0)]
    assert not bench.table.backlog


def test_accepting_grants_what_the_window_is_larger_than_the_initial_one():
    bench = Bench(max_stream_window=WINDOW + 7)
    assert bench.accepted(2).stats().receive_window == WINDOW + 7
    assert bench.log == [("acknowledge", 2, 7)]


def snapshot(bench: Bench) -> tuple:
    table = bench.table
    counts = (table.unacknowledged, table._outgoing, table._incoming, table.opened, table.admitted)
    return list(table.streams), list(table.backlog), counts, dict(table._remembered), list(bench.log), bench.changes


@pytest.mark.parametrize(
    ("stream_id", "delta", "text"),
    [
        (0, 0, "stream 0, an id that is not its to use"),
        (3, 0, "stream 3, an id that is not its to use"),
        (1, 0, "stream 1, an id that is not its to use"),
        (2, 0, "stream 2, which is open already"),
        (4, 0xFFFFFFFF, "overflows 32 bits"),
        (4, 0xFFFFFFFF - WINDOW + 1, "overflows 32 bits"),
    ],
)
@pytest.mark.parametrize("flags", [SYN, SYN | FIN, SYN | RST])
def test_a_bad_syn_breaks_the_protocol_and_leaves_no_trace(bench, stream_id, delta, text, flags):
    bench.table.open()
    bench.admit(2)
    before = snapshot(bench)
    with pytest.raises(ProtocolError, match=text):
        bench.admit(stream_id, flags, delta)
    assert snapshot(bench) == before


def test_a_server_admits_odd_ids_and_no_even_ones():
    bench = Bench(is_client=False)
    bench.admit(1)
    with pytest.raises(ProtocolError):
        bench.admit(2)


def test_ids_need_not_arrive_in_order_and_may_come_again_when_they_have_ended(bench):
    bench.admit(10)
    bench.admit(2)
    first = bench.table.next_accepted()
    finish(first)
    again = bench.admit(10)
    assert again is not first
    assert list(bench.table.backlog) == [2, 10]


def test_a_syn_with_rst_is_over_at_once(bench):
    assert bench.admit(2, SYN | RST) is None
    assert bench.table.streams == {}
    assert bench.log == []


@pytest.mark.parametrize("why", ["backlog", "incoming", "refusing"])
def test_a_stream_that_is_not_wanted_is_refused_and_nothing_is_kept(why):
    bench = Bench(accept_backlog=1) if why == "backlog" else Bench(max_incoming_streams=1)
    if why == "refusing":
        bench.table.is_refusing = True
    else:
        bench.admit(2)
    assert bench.admit(4) is None
    assert 4 not in bench.table.streams
    assert bench.log == [("refuse", 4)]
    assert 4 in bench.table._remembered


def test_without_a_limit_any_number_is_admitted():
    bench = Bench(max_incoming_streams=None, accept_backlog=10_000)
    for stream_id in range(2, 10_002, 2):
        assert bench.admit(stream_id) is not None
    assert bench.table._incoming == 5000


def test_no_stream_of_the_peer_is_admitted_where_none_may_be():
    bench = Bench(max_incoming_streams=0)
    assert bench.admit(2) is None
    assert bench.resets() == [2]


@pytest.mark.parametrize(
    ("first", "then"),
    [
        (lambda stream: stream._on_flags(RST), lambda stream: stream.close()),
        (lambda stream: stream.close(), lambda stream: stream._on_flags(FIN)),
        (lambda stream: stream.close(), lambda stream: stream._on_flags(RST)),
        (lambda stream: stream._on_flags(FIN), lambda stream: stream.close()),
    ],
    ids=["reset, released", "released, finished", "released, reset", "finished, released"],
)
def test_a_stream_of_the_peer_counts_until_it_has_ended_and_was_released(first, then):
    bench = Bench(max_incoming_streams=1)
    stream = bench.accepted(2)
    first(stream)
    assert bench.admit(4) is None
    then(stream)
    assert bench.table._incoming == 0
    assert bench.admit(6) is not None
    stream.close()
    stream.reset()
    assert bench.table._incoming == 1


def test_a_reset_here_ends_and_releases_at_once():
    bench = Bench(max_incoming_streams=1)
    bench.accepted(2).reset()
    assert bench.table._incoming == 0


def test_a_stream_reset_before_its_accept_leaves_the_backlog_and_does_not_count():
    bench = Bench(accept_backlog=1, max_incoming_streams=1)
    bench.admit(2)._on_flags(RST)
    assert not bench.table.backlog
    assert bench.table._incoming == 0
    assert bench.admit(4) is not None


def test_a_stream_finished_before_its_accept_waits_all_the_same(bench):
    bench.admit(2)._on_flags(FIN)
    assert bench.table.next_accepted().recv(1) == b""
    assert bench.log == [("acknowledge", 2, 0)]


def test_a_forgotten_stream_that_has_ended_does_not_count_for_ever():
    bench = Bench(max_incoming_streams=1)
    stream = bench.accepted(2)
    stream._on_flags(RST)
    assert bench.table._incoming == 1
    gone = weakref.ref(stream)
    del stream
    assert gone() is None
    assert bench.table._incoming == 0


# --- ends ---


def test_the_end_of_a_stream_frees_its_id_and_is_told(bench):
    stream = bench.table.open()
    stream._on_flags(ACK)
    bench.changes = 0
    finish(stream)
    assert bench.table.streams == {}
    assert bench.changes == 1
    assert 1 in bench.table._remembered
    assert 3 not in bench.table._remembered


def test_only_so_many_ended_streams_are_remembered(bench, monkeypatch):
    monkeypatch.setattr(table_module, "_REMEMBERED", 3)
    for _ in range(5):
        finish(bench.table.open())
    assert [stream_id in bench.table._remembered for stream_id in (1, 3, 5, 7, 9)] == [False, False, True, True, True]


def test_an_id_that_is_opened_again_is_not_remembered_any_more(bench):
    finish(bench.accepted(2))
    assert 2 in bench.table._remembered
    bench.admit(2)
    assert 2 not in bench.table._remembered


# --- late and useless frames ---


@pytest.fixture
def strict(monkeypatch: pytest.MonkeyPatch) -> Bench:
    """One useless frame is one too many."""
    monkeypatch.setattr(table_module, "_USELESS_BUDGET", 0)
    return Bench()


def test_late_data_of_an_ended_stream_is_free_up_to_one_window(strict):
    finish(strict.table.open())
    strict.table.on_unknown(1, 200_000)
    strict.table.on_unknown(1, 62_144)
    with pytest.raises(ProtocolError, match="move nothing"):
        strict.table.on_unknown(1, 1)


def test_late_frames_without_payload_cost_their_header(strict):
    finish(strict.table.open())
    for _ in range(WINDOW // 12):
        strict.table.on_unknown(1, 0)
    with pytest.raises(ProtocolError):
        strict.table.on_unknown(1, 0)


def test_a_stream_with_a_larger_window_has_a_larger_allowance(monkeypatch):
    monkeypatch.setattr(table_module, "_USELESS_BUDGET", 0)
    bench = Bench(max_stream_window=1 << 20)
    finish(bench.table.open())
    bench.table.on_unknown(1, 1 << 20)
    with pytest.raises(ProtocolError):
        bench.table.on_unknown(1, 1)


def test_frames_for_streams_that_never_were_are_useless(strict):
    with pytest.raises(ProtocolError):
        strict.table.on_unknown(99, 0)


def test_a_length_beyond_any_window_breaks_the_protocol_at_once(bench):
    bench.table.on_unknown(99, WINDOW)
    with pytest.raises(ProtocolError, match=f"announced {WINDOW + 1} bytes for stream 99"):
        bench.table.on_unknown(99, WINDOW + 1)


@pytest.mark.parametrize(
    "useless",
    [
        lambda bench, number: bench.table.charge_useless(),
        lambda bench, number: bench.table.on_unknown(1, 0),
        lambda bench, number: bench.admit(2 + 2 * number, SYN | RST),
    ],
    ids=["as the session says", "unknown stream", "syn with rst"],
)
def test_ten_thousand_useless_frames_are_borne_and_no_more(bench, useless):
    for number in range(10_000):
        useless(bench, number)
    with pytest.raises(ProtocolError, match="10000 frames that move nothing"):
        useless(bench, 10_000)


def test_refused_streams_are_useless_frames_too():
    bench = Bench(max_incoming_streams=0)
    for number in range(10_000):
        bench.admit(2 + 2 * number)
    with pytest.raises(ProtocolError):
        bench.admit(50_000)


def test_payload_makes_up_for_useless_frames_a_kibibyte_for_each(bench):
    for _ in range(10_000):
        bench.table.charge_useless()
    bench.table.budget.received += 2048
    bench.table.charge_useless()
    bench.table.charge_useless()
    with pytest.raises(ProtocolError):
        bench.table.charge_useless()


def test_payload_is_not_saved_up_beyond_the_budget(bench):
    bench.table.budget.received = 1 << 40
    for _ in range(10_000):
        bench.table.charge_useless()
    with pytest.raises(ProtocolError):
        bench.table.charge_useless()


# --- unread bytes ---


def test_when_unread_bytes_pass_the_budget_the_stream_that_hoards_most_is_reset():
    bench = Bench(receive_budget=WINDOW)
    streams = [bench.accepted(stream_id) for stream_id in (2, 4, 6)]
    for stream, size in zip(streams, (100_000, 150_000, 12_000), strict=True):
        stream._on_data(b"x" * size)
        bench.table.on_taken_in()
    assert bench.resets() == []
    streams[2]._on_data(b"y" * 145)
    bench.table.on_taken_in()
    assert bench.resets() == [4]
    assert bench.table.budget.unread == 112_145
    with pytest.raises(StreamReset):
        streams[1].recv(1)
    assert streams[0].recv(5) == b"xxxxx"


def test_a_stream_that_has_ended_unread_may_be_the_one_that_hoards_most():
    bench = Bench(receive_budget=WINDOW)
    hoarder, other = bench.accepted(2), bench.accepted(4)
    hoarder._on_data(b"x" * 200_000)
    hoarder._on_flags(FIN)
    hoarder.close_write()
    assert 2 not in bench.table.streams
    other._on_data(b"y" * 100_000)
    bench.table.on_taken_in()
    assert bench.table.budget.unread == 100_000
    assert 4 in bench.table.streams
    with pytest.raises(StreamReset):
        hoarder.recv(1)


# --- time limits ---


class Limit:
    """A stream under one limit."""

    def __init__(self, name: str) -> None:
        self.bench = Bench(
            accept_timeout=10.0 if name == "accept" else None,
            stream_open_timeout=10.0 if name == "open" else None,
            stream_close_timeout=10.0 if name == "close" else None,
        )
        if name == "accept":
            self.stream = self.bench.admit(2)
        else:
            self.stream = self.bench.table.open()
        if name == "close":
            self.stream._on_flags(ACK)
            self.stream.close()

    def pass_time(self, seconds: float) -> None:
        self.bench.table.expire(time.monotonic() + seconds)


LIMITS = ["accept", "open", "close"]


@pytest.mark.parametrize("name", LIMITS)
def test_a_limit_that_passes_resets_the_stream(name):
    limit = Limit(name)
    assert 9 < limit.bench.armed[-1] - time.monotonic() <= 10
    assert limit.bench.table.next_moment() == limit.bench.armed[-1]
    limit.pass_time(9)
    assert limit.bench.resets() == []
    limit.pass_time(10)
    assert limit.bench.resets() == [limit.stream.stream_id]
    assert limit.bench.table.streams == {}
    assert limit.bench.table.next_moment() is None
    assert limit.bench.table.unacknowledged == limit.bench.table._incoming == limit.bench.table._outgoing == 0


@pytest.mark.parametrize("name", LIMITS)
def test_time_of_a_blocked_hub_is_not_charged(name):
    limit = Limit(name)
    limit.bench.table.postpone(100)
    limit.pass_time(109)
    assert limit.bench.resets() == []
    limit.pass_time(110)
    assert limit.bench.resets() == [limit.stream.stream_id]


@pytest.mark.parametrize(
    ("name", "reason_goes"),
    [
        ("accept", lambda limit: limit.bench.table.next_accepted()),
        ("accept", lambda limit: limit.stream._on_flags(RST)),
        ("open", lambda limit: limit.stream._on_flags(ACK)),
        ("open", lambda limit: limit.stream._on_flags(RST)),
        ("close", lambda limit: limit.stream._on_flags(FIN)),
        ("close", lambda limit: limit.stream._on_flags(RST)),
    ],
)
def test_a_limit_goes_when_its_reason_goes(name, reason_goes):
    limit = Limit(name)
    keep = reason_goes(limit)
    assert limit.bench.table.next_moment() is None
    limit.pass_time(1000)
    assert limit.bench.resets() == []
    del keep


def test_a_stream_nobody_accepts_stays_if_the_peer_has_finished():
    limit = Limit("accept")
    limit.stream._on_data(b"all of it")
    limit.stream._on_flags(FIN)
    limit.pass_time(1000)
    assert limit.bench.table.next_accepted().read() == b"all of it"


def test_an_unacknowledged_stream_that_is_finished_here_gives_its_place_back_and_is_not_reset():
    limit = Limit("open")
    limit.stream.close_write()
    limit.pass_time(10)
    assert limit.bench.resets() == []
    assert limit.bench.table.unacknowledged == 0
    assert list(limit.bench.table.streams) == [1]


def test_a_half_close_is_under_no_limit():
    bench = Bench(stream_close_timeout=10.0)
    stream = bench.table.open()
    stream._on_flags(ACK)
    stream.close_write()
    assert bench.table.next_moment() is None


def test_the_next_moment_is_that_of_the_limit_that_passes_first():
    bench = Bench(accept_timeout=50.0, stream_open_timeout=20.0, stream_close_timeout=5.0)
    bench.admit(2)
    assert 49 < bench.table.next_moment() - time.monotonic() <= 50
    stream = bench.table.open()
    assert 19 < bench.table.next_moment() - time.monotonic() <= 20
    stream.close()
    assert 4 < bench.table.next_moment() - time.monotonic() <= 5


# --- the end of the session ---


def test_when_the_session_ends_every_stream_learns_why(bench):
    own, theirs = bench.table.open(), bench.accepted(2)
    theirs._on_data(b"buffered")
    reason = SessionClosed("it ended")
    bench.table.orphan(reason)
    assert theirs.recv(100) == b"buffered"
    for stream in (own, theirs):
        with pytest.raises(SessionClosed) as caught:
            stream.recv(1)
        assert caught.value.__cause__ is reason


def test_what_waits_for_accept_may_still_be_taken_and_read(bench):
    bench.admit(2)._on_data(b"buffered")
    bench.table.orphan(SessionClosed("it ended"))
    stream = bench.table.next_accepted()
    assert stream.recv(100) == b"buffered"
    assert ("acknowledge", 2, 0) not in bench.log


def test_after_the_end_closing_a_stream_sets_no_limit():
    bench = Bench(stream_close_timeout=10.0)
    stream = bench.table.open()
    bench.table.orphan(SessionClosed("it ended"))
    stream.close()
    assert bench.table.next_moment() is None
    with pytest.raises(StreamClosed):
        stream.send(b"x")


def test_streams_whose_fin_has_not_gone_are_reset_and_the_others_are_not(bench):
    cut, finished, answered = bench.table.open(), bench.table.open(), bench.accepted(2)
    finished.close_write()
    answered._on_flags(FIN)
    bench.table.reset_unfinished()
    assert bench.resets() == [1, 2]
    assert list(bench.table.streams) == [3]
    assert cut.stream_id == 1


def test_of_streams_that_can_not_leave_only_the_unborn_need_no_reset(bench):
    born = bench.table.open()
    bench.outbox.stall()
    unborn = bench.table.open()
    assert not bench.table.is_unborn(born)
    assert bench.table.is_unborn(unborn)
    for stream in (born, unborn):
        stream.reset(5)
    assert bench.log[-1] == ("reset", 1, 5)
    assert bench.resets() == [1]


def test_unfinished_streams_whose_syn_has_not_left_vanish(bench):
    bench.outbox.stall()
    bench.table.open()
    bench.table.reset_unfinished()
    assert bench.resets() == []
    assert bench.outbox.queue == []
    assert bench.table.unacknowledged == 0


# --- counts, whatever happens ---


class Life(RuleBasedStateMachine):
    """Streams opened, admitted, accepted, finished, reset and released in any order: the counts are what they count."""

    @initialize(is_client=st.booleans())
    def begin(self, is_client):
        self.bench = Bench(is_client=is_client, accept_backlog=4, max_incoming_streams=6, max_outgoing_streams=5)
        self.table = self.bench.table
        self.first_of_peer = 2 if is_client else 1
        self.known: list = []
        self.released: set[int] = set()

    def pick(self, index: int):
        return self.known[index % len(self.known)]

    @rule()
    def open(self):
        if self.table.may_open:
            self.known.append(self.table.open())

    @rule(number=st.integers(0, 9))
    def syn(self, number):
        stream_id = self.first_of_peer + 2 * number
        if stream_id in self.table.streams:
            with pytest.raises(ProtocolError):
                self.table.admit(stream_id, SYN, 0)
            return
        room = len(self.table.backlog) < 4 and self.table._incoming < 6
        stream = self.table.admit(stream_id, SYN, 0)
        assert (stream is not None) == room
        if stream is not None:
            self.known.append(stream)

    @precondition(lambda self: self.table.backlog)
    @rule()
    def accept(self):
        oldest = next(iter(self.table.backlog.values()))
        assert self.table.next_accepted() is oldest

    @precondition(lambda self: self.known)
    @rule(index=st.integers(0, 50), flags=st.sampled_from([0, ACK, FIN, RST, FIN | RST]))
    def frame(self, index, flags):
        stream = self.pick(index)
        if self.table.streams.get(stream.stream_id) is stream:
            stream._on_flags(flags)

    @precondition(lambda self: self.known)
    @rule(index=st.integers(0, 50), how=st.sampled_from(["close", "reset", "close_write"]))
    def application(self, index, how):
        stream = self.pick(index)
        if stream.stream_id in self.table.backlog or (how == "close_write" and id(stream) in self.released):
            return
        try:
            getattr(stream, how)()
        except (StreamReset, StreamClosed):
            assert how == "close_write"
        if how != "close_write":
            self.released.add(id(stream))

    def theirs(self) -> list:
        parity = self.first_of_peer % 2
        return [stream for stream in self.known if stream.stream_id % 2 == parity]

    def owns(self) -> list:
        return [stream for stream in self.known if stream not in self.theirs()]

    @invariant()
    def counts_are_what_they_count(self):
        table = self.table
        assert table.unacknowledged == sum(not stream.established for stream in self.owns())
        assert table._outgoing == sum(not stream._life.ended for stream in self.owns())
        assert {id(stream) for stream in table.streams.values()} == {
            id(stream) for stream in self.known if not stream._life.ended
        }
        never_seen = {id(stream) for stream in self.theirs() if stream._life.ended and stream._marks & 0x20}
        held = [
            stream
            for stream in self.theirs()
            if not (stream._life.ended and (id(stream) in self.released or id(stream) in never_seen))
        ]
        assert table._incoming == len(held)
        assert table._incoming <= 6
        assert len(table.backlog) <= 4
        assert set(table.backlog) <= set(table.streams)


TestLife = Life.TestCase
TestLife.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)


def test_the_cost_of_a_stream_does_not_depend_on_how_many_there_are():
    def seconds_for(count: int, work: Callable[[Bench, list], None]) -> float:
        best = float("inf")
        for _ in range(3):
            bench = Bench(accept_backlog=1 << 20, max_incoming_streams=None)
            streams = [bench.table.open() for _ in range(count)]
            began = time.perf_counter()
            work(bench, streams)
            best = min(best, time.perf_counter() - began)
        return best

    def churn(bench: Bench, streams: list) -> None:
        for stream in streams[-500:]:
            stream._on_flags(ACK)
            finish(stream)
            bench.table.open()

    assert seconds_for(20_000, churn) < 5 * seconds_for(500, churn)
