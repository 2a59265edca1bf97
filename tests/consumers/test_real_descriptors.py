"""Consumers that ask their socket for a descriptor: with a stream alone they fail at once, in words, and nothing breaks.

And what makes each of them work: a blocking stream, another way to poll, or a socketpair. Clients that take no socket at
all but connect by themselves are given a local port.
"""

from __future__ import annotations

import ssl
import sys

import pytest

from .real_runner import need_program, play, relay
from .real_servers import mariadb_server, postgres_server, python_servers

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


CLIENTS = 5
BIG = 1_000_000
#: Programs around the C libraries of psycopg and of mysqlclient: the server, Debian's package, the command.
C_CLIENTS = {
    "psql": (
        postgres_server,
        "postgresql-client",
        ["--no-psqlrc", "--host=127.0.0.1", "--port=PORT", "--username=postgres", "--tuples-only", "--no-align", "-c"],
    ),
    "mariadb": (
        mariadb_server,
        "mariadb-client",
        ["--no-defaults", "--skip-ssl", "--host=127.0.0.1", "--port=PORT", "--user=root", "--skip-column-names", "-e"],
    ),
}


# It waits for the server to be set up.
@pytest.mark.timeout(90)
@pytest.mark.parametrize("name", C_CLIENTS)
def test_a_client_that_connects_by_itself_goes_through_a_local_port(name):
    server, package, words = C_CLIENTS[name]
    program = need_program(name, package)
    commands = [[program, *words, f"SELECT repeat('{number}', {BIG})"] for number in range(CLIENTS)]
    with server() as path, relay(f"tcp=unix:{path}") as running:
        facts = scene("local_port", {**running.options, "commands": commands})
    assert facts["joined"] == CLIENTS
    for number, printed in enumerate(facts["printed"]):
        assert printed == str(number) * BIG + "\n", printed[:500]


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
