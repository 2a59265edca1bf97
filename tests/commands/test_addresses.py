"""What users write, and what it is taken for: addresses, times, counts, sizes, names of files."""

from __future__ import annotations

import argparse
import ipaddress
import shlex
from typing import Any

import pytest
from gevent import socket
from hypothesis import assume, given
from hypothesis import strategies as st

from geyamux.cli.address import Address, address, host_name
from geyamux.cli.ends import is_open, name_of
from geyamux.cli.values import count, file, interval, positive, seconds, window
from geyamux.frame import INITIAL_WINDOW

PORTS = st.integers(0, 65535)
LABELS = st.from_regex(r"[a-z]([a-z0-9-]{0,8}[a-z0-9])?", fullmatch=True)
NAMES = st.lists(LABELS, min_size=1, max_size=4).map(".".join)


def refusal(read: Any, text: str) -> str:
    """What is said of words that are not taken."""
    with pytest.raises(argparse.ArgumentTypeError) as caught:
        read(text)
    return str(caught.value)


@given(st.one_of(NAMES, st.ip_addresses(v=4).map(str)), PORTS)
def test_a_host_and_a_port_are_tcp(host: str, port: int):
    text = f"{host}:{port}"
    assert address(text) == Address(text, "tcp", host, port)


@given(st.ip_addresses(v=6).map(str), PORTS)
def test_an_address_of_ip_6_stands_in_brackets(host: str, port: int):
    text = f"[{host}]:{port}"
    assert address(text) == Address(text, "tcp", host, port)
    assert "in brackets" in refusal(address, f"{host}:{port}")


@given(PORTS)
def test_a_port_alone_is_of_this_machine_and_with_a_colon_of_all_interfaces(port: int):
    assert address(str(port))[1:4] == ("tcp", "127.0.0.1", port)
    assert address(f":{port}")[1:4] == ("tcp", "", port)


@given(st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), min_size=1))
def test_whatever_follows_unix_is_a_path(path: str):
    assert address(f"unix:{path}") == Address(f"unix:{path}", "unix", what=path)


@given(st.lists(st.text(st.characters(exclude_categories=["Cs"])), min_size=1))
def test_a_command_is_taken_as_a_shell_would_quote_it(words: list[str]):
    found = address(f"exec:{shlex.join(words)}")
    assert found.kind == "exec" and shlex.split(found.what) == words


def test_standard_input_and_output_have_a_colon():
    assert address("stdio:") == Address("stdio:", "stdio")


@given(st.text())
def test_any_words_are_an_address_or_are_refused_in_one_line(text: str):
    try:
        found = address(text)
    except argparse.ArgumentTypeError as error:
        assert "\n" not in str(error) and str(error).isprintable()
    else:
        assert found.kind in ("tcp", "unix", "exec", "stdio") and str(found) == text
        assert 0 <= found.port <= 65535


@given(st.ip_addresses(), st.integers(1, 65535))
def test_the_name_of_a_socket_is_an_address(host: ipaddress.IPv4Address | ipaddress.IPv6Address, port: int):
    assume(not str(host).startswith("::ffff:"))
    found = address(name_of((str(host), port)))
    assert (found.host, found.port) == (str(host), port)


def test_a_visitor_of_the_older_kind_is_named_so_where_both_are_served():
    assert name_of(("::ffff:192.0.2.7", 80, 0, 0)) == "192.0.2.7:80"
    assert name_of("") == "a local process"
    assert name_of(b"/run/x") == "/run/x"


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "'' is no address: give HOST:PORT, unix:/path or stdio:, as in 127.0.0.1:7000"),
        ("localhost", "'localhost' is no address"),
        ("localhost:", "'localhost:' is no address"),
        ("localhost:http", "'localhost:http' is no address"),
        ("localhost:65536", "'localhost:65536' is no address"),
        ("localhost:-1", "'localhost:-1' is no address"),
        ("localhost: 80", "'localhost: 80' is no address"),
        ("localhost:٣", "is no address"),
        ("localhost:" + "9" * 5000, "is no address"),
        ("[::1]", "'[::1]' is no address"),
        ("::1:80", "give an IPv6 address in brackets, as in [::1]:7000"),
        ("[]:80", "what stands in brackets is no IPv6 address"),
        ("[localhost]:80", "what stands in brackets is no IPv6 address"),
        ("a..b:80", "'a..b' is no name of a host"),
        (".a:80", "'.a' is no name of a host"),
        (f"{'a' * 64}:80", "is no name of a host"),
        ("\udcff:80", "'\\udcff' is no name of a host"),
        ("http://localhost:80", "give an IPv6 address in brackets"),
        ("stdio", "'stdio' is no address"),
        ("unix:", "'unix:': there is no path"),
        ("exec:", "'exec:': there is no command"),
        ("exec:  ", "'exec:': there is no command"),
        ("exec:'ls", "No closing quotation"),
    ],
)
def test_what_is_no_address_is_told_so(text: str, why: str):
    said = refusal(address, text)
    assert why in said and "\n" not in said


def test_a_link_may_be_named_in_brackets():
    assert address("[fe80::1%lo]:80").host == "fe80::1%lo"


@pytest.mark.parametrize("name", ["relay.example", "relay.example.", "192.0.2.7", "::1", "bücher.example", "a_b"])
def test_a_name_of_a_host_is_taken_as_it_is(name: str):
    assert host_name(name) == name


@pytest.mark.parametrize("name", ["", ".", ".relay", "a..b", "a" * 64])
def test_what_is_no_name_of_a_host_is_told_so(name: str):
    assert "is no name of a host" in refusal(host_name, name)


@pytest.mark.parametrize(
    ("where", "open_to_others"),
    [("127.0.0.1", False), ("127.1.2.3", False), ("0.0.0.0", True), ("::1", False), ("::", True)],
)
def test_who_listens_beyond_loopback_is_open(where: str, open_to_others: bool):
    with socket.socket(socket.AF_INET6 if ":" in where else socket.AF_INET) as sock:
        sock.bind((where, 0))
        assert is_open(sock) is open_to_others


def test_a_unix_socket_is_not_open_to_other_machines(tmp_path):
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(tmp_path / "socket"))
        assert is_open(sock) is False


# --- times, counts, sizes ---


@given(st.floats(0, 1e9))
def test_a_time_is_any_number_that_is_not_negative(value: float):
    assert seconds(repr(value)) == value
    if value:
        assert interval(repr(value)) == value


@given(st.integers(0, 1 << 31))
def test_a_count_is_any_number_up_to_the_largest(value: int):
    assert count(str(value)) == value
    if value:
        assert positive(str(value)) == value


@given(st.integers(INITIAL_WINDOW, (1 << 31) - 1))
def test_a_window_is_a_number_of_bytes_that_does_not_grow(size: int):
    assert window(str(size)) == (size, False)


@pytest.mark.parametrize(("text", "size"), [("256K", 1 << 18), ("512k", 1 << 19), ("4M", 1 << 22), ("1g", 1 << 30)])
def test_a_window_may_have_a_unit(text: str, size: int):
    assert window(text) == (size, False)


def test_a_window_that_grows_begins_with_the_one_of_the_protocol():
    assert window("auto") == (INITIAL_WINDOW, True)


@given(st.text())
def test_any_words_are_a_value_or_are_refused(text: str):
    for read in (seconds, interval, count, positive, window):
        try:
            read(text)
        except ValueError:
            pass  # argparse knows what to say
        except argparse.ArgumentTypeError as error:
            assert "\n" not in str(error)


@pytest.mark.parametrize(
    ("read", "text", "why"),
    [
        (seconds, "-1", "'-1' is no number of seconds"),
        (seconds, "nan", "'nan' is no number of seconds"),
        (seconds, "inf", "'inf' is no number of seconds"),
        (seconds, "1e999", "'1e999' is no number of seconds"),
        (seconds, "30s", "'30s' is no number of seconds"),
        (interval, "0", "must be more than 0 seconds"),
        (count, "-1", "'-1' is no count"),
        (count, "1.5", "'1.5' is no count"),
        (count, "²", "is no count"),
        (count, "2147483649", "must be at most 2147483648"),
        (count, "9" * 5000, "must be at most 2147483648"),
        (positive, "0", "must be at least 1"),
        (window, "", "'' is no size"),
        (window, "K", "'K' is no size"),
        (window, "4MB", "'4MB' is no size: give bytes, as in 1048576, 512K or 4M, or auto"),
        (window, "1.5M", "'1.5M' is no size"),
        (window, "255K", "must be at least 256K, where the protocol starts, and below 2G"),
        (window, "2G", "below 2G"),
        (file, "", "no file is named"),
    ],
)
def test_what_is_no_value_is_told_so(read: Any, text: str, why: str):
    assert why in refusal(read, text)
