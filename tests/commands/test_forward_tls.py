"""`geyamux forward` with TLS: who is let in, and what both ends say of who is not."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import trustme
from cryptography.hazmat.primitives import serialization

from commands.running import ANYWHERE, QUICK, events, works
from tunnels.running import ENVIRONMENT, Children, Forward
from tunnels.service import Service


@pytest.fixture(scope="module")
def papers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Certificates of ours, each in a file with its key, and a stranger's; agent.crt and agent.key are apart."""
    place = tmp_path_factory.mktemp("papers")
    ours, others = trustme.CA(), trustme.CA()
    ours.cert_pem.write_to_path(place / "ca.pem")
    others.cert_pem.write_to_path(place / "other.pem")
    ours.issue_cert("relay.test", "127.0.0.1").private_key_and_cert_chain_pem.write_to_path(place / "relay.pem")
    agent = ours.issue_cert("agent.test")
    agent.private_key_and_cert_chain_pem.write_to_path(place / "agent.pem")
    agent.private_key_pem.write_to_path(place / "agent.key")
    agent.cert_chain_pems[0].write_to_path(place / "agent.crt")
    others.issue_cert("agent.test").private_key_and_cert_chain_pem.write_to_path(place / "stranger.pem")
    return place


def words(papers: Path, **files: str) -> list[str]:
    """`--cert FILE` and so on."""
    return [word for name, file in files.items() for word in (f"--{name}", str(papers / file))]


class Relay:
    """Who listens, for all agents of a module; the service is theirs."""

    def __init__(self, children: Children, *more: str) -> None:
        self.forward: Forward = children.forward("--listen", ANYWHERE, "--from", ANYWHERE, *more)
        self.trunk, self.near = self.forward.listening("trunk"), self.forward.listening("from")


@pytest.fixture(scope="module")
def module_children() -> Iterator[Children]:
    started = Children()
    try:
        yield started
    finally:
        started.end()


@pytest.fixture(scope="module")
def relay(module_children: Children, papers: Path) -> Relay:
    """It wants certificates of ours."""
    return Relay(module_children, *words(papers, cert="relay.pem", ca="ca.pem"))


@pytest.fixture(scope="module")
def careless(module_children: Children, papers: Path) -> Relay:
    """It has a certificate, and wants none."""
    return Relay(module_children, *words(papers, cert="relay.pem"))


@pytest.fixture(scope="module")
def plain(module_children: Children) -> Relay:
    return Relay(module_children)


def let_in(children: Children, relay: Relay, service: Service, *more: str, **options: object) -> None:
    agent = children.forward("--dial", relay.trunk, "--to", service.address, *more, **options)
    agent.event("connected")
    relay.forward.event("connected")
    works(relay.near)
    agent.stop()
    relay.forward.event("disconnected")


def kept_out(children: Children, relay: Relay, nobody: str, *more: str) -> str:
    """Why, as it is told by who dials, each time it tries."""
    agent = children.forward("--dial", relay.trunk, "--to", nobody, *more, QUICK)
    reason = agent.event("retrying", attempt=2)["reason"]
    assert "Traceback" not in str(agent)
    return str(reason)


@pytest.mark.parametrize("files", [{"cert": "agent.pem"}, {"cert": "agent.crt", "key": "agent.key"}], ids=["one", "two"])
def test_both_ends_with_certificates_of_one_authority_get_on(
    children: Children, relay: Relay, papers: Path, service: Service, files: dict[str, str]
):
    let_in(children, relay, service, *words(papers, ca="ca.pem", **files))


@pytest.mark.parametrize("files", [{}, {"cert": "stranger.pem"}], ids=["without", "with a stranger's"])
def test_who_comes_without_a_certificate_of_ours_is_refused_and_both_ends_say_why(
    children: Children, relay: Relay, papers: Path, nobody: str, files: dict[str, str]
):
    reason = kept_out(children, relay, nobody, *words(papers, ca="ca.pem", **files))
    assert "--cert" in reason, reason
    told = relay.forward.event("refused")
    assert "certificate" in told["reason"].lower() and told["peer"] in told["message"]


def test_a_listener_that_is_not_of_our_authority_is_not_trusted(
    children: Children, relay: Relay, papers: Path, nobody: str
):
    reason = kept_out(children, relay, nobody, *words(papers, cert="agent.pem", ca="other.pem"))
    assert reason.startswith("its certificate is not trusted (") and "--ca" in reason


def test_a_server_name_is_what_the_certificate_of_the_listener_is_for(
    children: Children, relay: Relay, papers: Path, service: Service, nobody: str
):
    mutual = words(papers, cert="agent.pem", ca="ca.pem")
    let_in(children, relay, service, *mutual, "--server-name=relay.test")
    reason = kept_out(children, relay, nobody, *mutual, "--server-name=mail.test")
    assert reason.startswith("its certificate is not trusted (") and "--server-name" in reason and "mail.test" in reason


def test_a_listener_with_a_certificate_alone_lets_everybody_in(
    children: Children, careless: Relay, papers: Path, service: Service
):
    let_in(children, careless, service, *words(papers, ca="ca.pem"))


def test_without_an_authority_those_of_the_system_count(
    children: Children, careless: Relay, papers: Path, service: Service, nobody: str
):
    named = "--server-name=relay.test"
    let_in(children, careless, service, named, env={**ENVIRONMENT, "SSL_CERT_FILE": str(papers / "ca.pem")})
    assert "not trusted" in kept_out(children, careless, nobody, named)


def test_a_name_is_given_where_the_address_has_none(children: Children, papers: Path, service: Service, tmp_path: Path):
    path = f"unix:{tmp_path}/trunk"
    relay = children.forward("--listen", path, "--from", ANYWHERE, *words(papers, cert="relay.pem"))
    relay.listening("trunk")
    agent_words = ("--dial", path, "--to", service.address, *words(papers, ca="ca.pem"))
    children.forward(*agent_words, "--server-name=relay.test").event("connected")
    relay.event("connected")
    works(relay.listening("from"))
    nameless = children.forward(*agent_words)
    nameless.wait(2)
    assert "--server-name" in nameless.lines[-1], nameless


def test_a_plain_agent_and_a_listener_with_tls_both_say_what_is_wrong(children: Children, careless: Relay, nobody: str):
    reason = kept_out(children, careless, nobody)
    careless.forward.wait_line(lambda line: '"refused"' in line and "no TLS" in line, "the plain agent")
    assert "TLS" in reason and "--ca" in reason, reason


def test_an_agent_with_tls_and_a_plain_listener_both_say_what_is_wrong(
    children: Children, plain: Relay, papers: Path, nobody: str
):
    reason = kept_out(children, plain, nobody, *words(papers, ca="ca.pem"))
    assert "TLS" in reason, reason
    told = plain.forward.event("refused")["reason"]
    assert "TLS" in told or "version 22" in told, told


# --- who may come is warned of ---


@pytest.mark.parametrize(
    ("where", "files", "warned"),
    [
        ("127.0.0.1:0", {}, False),
        ("127.0.0.2:0", {}, False),
        ("[::1]:0", {}, False),
        ("localhost:0", {}, False),
        (":0", {}, True),
        ("0.0.0.0:0", {}, True),
        ("[::]:0", {}, True),
        (":0", {"cert": "relay.pem"}, True),
        (":0", {"cert": "relay.pem", "ca": "ca.pem"}, False),
    ],
)
def test_whoever_listens_to_the_world_without_asking_for_certificates_is_warned(
    children: Children, papers: Path, nobody: str, where: str, files: dict[str, str], warned: bool
):
    forward = children.forward("--listen", where, "--to", nobody, *words(papers, **files))
    forward.listening("trunk")
    # It would have come before.
    assert events(forward) == (["warning", "listening"] if warned else ["listening"])
    if warned:
        message = forward.event("warning", level="warning")["message"]
        assert all(word in message for word in (where, nobody, "--cert", "--ca"))


# --- files of no use ---


def lock(key: Path, passphrase: bytes) -> bytes:
    loaded = serialization.load_pem_private_key(key.read_bytes(), None)
    encryption = serialization.BestAvailableEncryption(passphrase)
    return loaded.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.TraditionalOpenSSL, encryption)


@pytest.fixture(scope="module")
def spoilt(papers: Path) -> Path:
    (papers / "empty.pem").write_bytes(b"")
    (papers / "locked.key").write_bytes(lock(papers / "agent.key", b"secret"))
    return papers


BAD_FILES = [
    ({"cert": "missing.pem"}, "--cert", "missing.pem: No such file"),
    ({"cert": "agent.crt", "key": "missing.key"}, "--key", "missing.key: No such file"),
    ({"ca": "missing.pem"}, "--ca", "missing.pem: No such file"),
    ({"cert": "."}, "--cert", "Is a directory"),
    ({"cert": "empty.pem"}, "--cert", "PEM"),
    ({"ca": "empty.pem"}, "--ca", "PEM"),
    ({"cert": "agent.crt"}, "--cert", "key"),
    ({"cert": "relay.pem", "key": "agent.key"}, "--cert", "KEY_VALUES_MISMATCH"),
    ({"cert": "agent.crt", "key": "locked.key"}, "--key", "passphrase"),
]


def test_files_of_no_use_are_told_in_one_line(children: Children, spoilt: Path, nobody: str):
    started = [children.forward("--dial", nobody, "--to", nobody, *words(spoilt, **files)) for files, _, _ in BAD_FILES]
    for child, (_, option, why) in zip(started, BAD_FILES, strict=True):
        child.wait(1)
        (line,) = child.lines
        assert line.startswith("geyamux forward: ") and option in line and why in line, child
