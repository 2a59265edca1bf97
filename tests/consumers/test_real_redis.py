"""redis-py against a real redis-server, over streams: each test plays a scene of real_redis_scenes.py."""

from __future__ import annotations

import contextlib
import tempfile
from pathlib import Path

import pytest
import trustme

from .real_runner import need_library, play, relay
from .real_servers import redis_server

pytestmark = pytest.mark.interop

CALLS = 200
WAIT = 0.01
#: Long enough for all of them to be seen waiting.
LONG_WAIT = 0.5
#: One after the other they take at least this; together about one wait and what the calls themselves cost.
ALL_WAITS = CALLS * WAIT
TIMES_FASTER = 4
DELAYED_ACKNOWLEDGEMENT = 0.04


@pytest.fixture(scope="module")
def server():
    need_library("redis")
    with redis_server() as path:
        yield path


@pytest.fixture(scope="module")
def trunk(server):
    with relay(f"tcp=unix:{server}") as running:
        yield running.options


@pytest.fixture(params=["tcp", "unix", "tls"])
def any_trunk(request, server):
    """The trunk of each kind in turn, for `play`."""
    with contextlib.ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        kinds = {"tcp": "tcp", "unix": f"unix:{directory / 'trunk'}", "tls": f"tls:{directory / 'server.pem'}"}
        authority = trustme.CA()
        authority.cert_pem.write_to_path(directory / "authority.pem")
        authority.issue_cert("localhost").private_key_and_cert_chain_pem.write_to_path(directory / "server.pem")
        running = stack.enter_context(relay(f"{kinds[request.param]}=unix:{server}"))
        yield {**running.options, "authority": str(directory / "authority.pem")}


def scene(name, options, **more):
    return play("real_redis_scenes.py", name, **options, **more)


def test_pipelines_transactions_and_big_values_are_answered_over_every_kind_of_trunk(any_trunk):
    facts = scene("pipelines", any_trunk)
    assert (facts["stored"], facts["read"], facts["big"]) == (1000, True, True)
    assert facts["transaction"] == [1, 2, "2"]
    assert "session=" in facts["peer"]


def test_a_subscriber_waits_as_long_as_it_said_and_hears_everything(trunk):
    facts = scene("publish_and_subscribe", trunk)
    assert (facts["nothing"], facts["at once"]) == (None, None)
    assert 0.09 < facts["waited"] < 2
    assert facts["heard"] == ["one", "two"]
    assert facts["in a thread"] == [str(number) for number in range(100)]
    assert facts["ended"]


def test_a_blocking_pop_ends_with_an_item_or_at_the_timeout_of_either_side(trunk):
    facts = scene("blocking_pop", trunk)
    assert facts["nothing"] is None
    assert 0.09 < facts["waited"] < 2
    assert facts["item"] == ["queue", "item"]
    assert facts["gave up"][0] == "TimeoutError"
    assert 0.09 < facts["hasty waited"] < 5
    assert facts["afterwards"] is True


def test_fifty_greenlets_share_the_five_connections_of_a_pool(trunk):
    assert scene("pool", trunk) == {"total": 500, "most": 5, "kept": 5, "left": 0}


def test_a_health_check_finds_out_that_a_connection_has_died(trunk):
    facts = scene("health_check", trunk)
    assert facts["asked"] >= 1
    assert facts["value"] == "value"
    assert facts["another"]


def test_a_reset_in_the_middle_is_a_connection_error_or_a_retry_over_a_new_stream(trunk):
    facts = scene("reset_and_reconnect", trunk)
    assert facts["idle"] == "value"
    assert facts["told"][0] == "ConnectionError"
    assert "StreamReset" in facts["told"]
    assert facts["tried again"] == "item"
    assert facts["session"]


def test_a_session_that_is_gone_is_a_connection_error(trunk):
    facts = scene("session_that_is_gone", trunk)
    assert facts["kind"] == "ConnectionError"
    assert "SessionClosed" in facts["told"]


def test_two_hundred_blocking_calls_wait_together_over_one_session_and_in_line_over_one_socket(trunk, server):
    facts = scene("by_the_clock", {**trunk, "long wait": LONG_WAIT}, socket=server, calls=CALLS, wait=WAIT)
    together, in_line, long = facts["session seconds"], facts["socket seconds"], facts["long seconds"]
    print(f"{CALLS} calls of {WAIT:g} s: {together:.2f} s over one session, {in_line:.2f} s over one socket")
    print(f"{CALLS} calls of {LONG_WAIT:g} s: {long:.2f} s over one session")
    assert (facts["session answers"], facts["socket answers"]) == (CALLS, CALLS)
    assert (facts["streams"], facts["waited at once"]) == (CALLS, CALLS)
    # Each connection greets the server with two small commands. Where the relay's answers wait for a delayed
    # acknowledgement of TCP (40 ms), this takes twice as long at the least.
    assert facts["connect seconds"] < CALLS * DELAYED_ACKNOWLEDGEMENT / 2
    assert in_line >= ALL_WAITS
    assert in_line > together * TIMES_FASTER
    assert LONG_WAIT <= long < LONG_WAIT * CALLS / TIMES_FASTER
