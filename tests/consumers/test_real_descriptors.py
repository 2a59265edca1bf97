"""Consumers that ask their socket for a descriptor: with a stream alone they fail at once, in words, and nothing breaks.

And what makes each of them work: a blocking stream, another way to poll, or a socketpair.
"""

from __future__ import annotations

import ssl
import sys

import pytest

from .real_runner import play
from .real_servers import python_servers

pytestmark = pytest.mark.interop

NO_DESCRIPTOR = "fileno: a stream has no descriptor of its own"
#: What `selectors` makes of it.
INVALID_FILE = "Invalid file object: <geyamux.Stream "
ADDRESSES = [1, 2000, 1]


@pytest.fixture(scope="module")
def servers():
    telnet = ["telnet"] if sys.version_info < (3, 13) else []
    with python_servers("xmlrpc", "rpyc", "dns", *telnet) as running:
        yield running


def scene(name, options):
    return play("real_descriptor_scenes.py", name, **options)


def test_select_poll_and_selectors_refuse_a_stream_at_once(servers):
    facts = scene("polling", servers.trunk("xmlrpc"))
    assert facts["select"] == ["UnsupportedOperation", NO_DESCRIPTOR]
    for kind in ("poll", "selectors"):
        assert facts[kind][0] == "ValueError"
        assert facts[kind][1].startswith(INVALID_FILE)
    assert facts["session"]


def test_a_tls_context_refuses_a_stream_and_leaves_it_usable(servers):
    facts = scene("tls", servers.trunk("xmlrpc"))
    assert facts["error"] == ["UnsupportedOperation", NO_DESCRIPTOR]
    assert facts["status"] == "HTTP/1.1"


def test_a_tls_context_that_is_not_patched_refuses_a_stream_too(pair):
    client, server = pair
    stream = client.open()
    with pytest.raises(OSError, match=NO_DESCRIPTOR):
        ssl.create_default_context().wrap_socket(stream, server_hostname="localhost")
    stream.sendall(b"still here")
    assert server.accept(timeout=5).recv(100) == b"still here"


def test_rpyc_polls_a_descriptor_and_says_that_there_is_none(servers):
    facts = scene("rpyc_alone", servers.trunk("rpyc"))
    assert facts["error"] == ["OSError", NO_DESCRIPTOR]
    assert facts["session"]


@pytest.mark.parametrize("way", ["rpyc_with_a_poll", "rpyc_bridged"])
def test_rpyc_works_with_a_poll_of_its_own_or_through_a_socketpair(servers, way):
    facts = scene(way, servers.trunk("rpyc"))
    assert (facts["turned"], facts["called"], facts["nothing"]) == (True, 42, False)
    assert 0.09 < facts["waited"] < 5


def test_dnspython_works_with_a_stream_that_waits_and_not_with_one_that_may_not(servers):
    facts = scene("dns_alone", servers.trunk("dns"))
    assert facts["addresses"] == ADDRESSES
    assert facts["silent"] == "TimeoutError"
    assert 0.09 < facts["waited"] < 5
    assert facts["non-blocking"][0] == "ValueError"
    assert facts["non-blocking"][1].startswith(INVALID_FILE)
    assert facts["session"]


def test_dnspython_works_as_it_is_through_a_socketpair(servers):
    facts = scene("dns_bridged", servers.trunk("dns"))
    assert facts["addresses"] == ADDRESSES
    assert facts["silent"] == "Timeout"
    assert 0.09 < facts["waited"] < 5


if sys.version_info < (3, 13):  # which has no telnetlib any more

    def test_telnetlib_reads_a_stream_to_its_end_and_cannot_wait_for_a_prompt(servers):
        facts = scene("telnet_alone", servers.trunk("telnet"))
        assert facts["waited"][0] == "ValueError"
        assert facts["all"] == "login: hello world\r\n"

    def test_telnetlib_works_as_it_is_through_a_socketpair(servers):
        facts = scene("telnet_bridged", servers.trunk("telnet"))
        assert (facts["prompt"], facts["nothing"]) == ("login: ", "")
        assert 0.09 < facts["waited"] < 5
        assert facts["all"] == "hello world\r\n"
