"""Clients of remote calls and of a message broker against real servers, over streams: each test plays a scene."""

from __future__ import annotations

import pytest

from .real_runner import need_library, play, relay
from .real_servers import python_servers, rabbitmq_server

pytestmark = pytest.mark.interop

DOUBLES = [number + number for number in range(20)]


@pytest.fixture(scope="module")
def servers():
    with python_servers("xmlrpc", "thrift") as running:
        yield running


def scene(name, options):
    return play("real_rpc_scenes.py", name, **options)


def test_xmlrpc_client_keeps_one_stream_for_all_its_calls(servers):
    assert scene("xml_rpc", servers.trunk("xmlrpc")) == {
        "sums": DOUBLES,
        "turned": True,
        "fault": "Fault",
        "batch": [1, 2, 3],
        "streams": 1,
    }


def test_thriftpy2_calls_over_the_handle_that_it_is_given(servers):
    facts = scene("thrift", servers.trunk("thrift"))
    assert facts == {"sums": DOUBLES, "turned": True, "many": [number + 1 for number in range(50)]}


@pytest.mark.timeout(90)
def test_py_amqp_publishes_and_consumes_with_a_real_broker():
    need_library("amqp")
    with rabbitmq_server() as port, relay(f"tcp=tcp:{port}") as running:
        facts = scene("amqp", running.options)
    assert facts["nothing"] == "TimeoutError"
    assert 0.09 < facts["waited"] < 5
    assert facts["heard"] == list(range(20))
    assert facts["big"]
