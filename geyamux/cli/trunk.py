"""The trunk: the connection that carries a session, and TLS on it."""

from __future__ import annotations

import argparse
import contextlib
import errno
import re
import ssl
from collections.abc import Callable
from typing import Any

import gevent
import gevent.socket
import gevent.ssl
from gevent import subprocess

from ..config import Config
from ..connect import begin_tls
from ..connect import connect as geyamux_connect
from ..errors import YamuxError
from ..session import Client, Server, Session
from . import values
from .address import Address, host_name
from .ends import dial as dial_end
from .errors import CommandError, UsageError
from .logs import OUT_OF_DESCRIPTORS

__all__ = ["Trust", "accept", "add_tls_arguments", "await_answer", "connect", "dial", "meet", "why"]

#: For connecting, for a TLS handshake, and for the first answer.
_PATIENCE = 10.0
#: For a child process to answer: ssh asks for passwords.
_CHILD_PATIENCE = 120.0


def add_tls_arguments(parser: argparse.ArgumentParser) -> None:
    """What says whom to trust."""
    group = parser.add_argument_group("TLS", "mutual TLS is the authentication: give both ends --cert and --ca")
    for name, text in (
        ("--cert", "our certificate, with its chain (PEM)"),
        ("--key", "its private key, where --cert does not hold it"),
        ("--ca", "authorities of the peer's certificate; a listener demands one then"),
    ):
        group.add_argument(name, metavar="FILE", type=values.file, help=text)
    group.add_argument(
        "--server-name",
        metavar="NAME",
        type=host_name,
        help="what the listener's certificate is for, if not the host dialled",
    )


class Trust:
    """The TLS arguments, checked; `context` is None for no TLS. With an `address`: whether they make sense for that."""

    def __init__(self, options: argparse.Namespace, *, is_server: bool, address: Address | None = None) -> None:
        self.server_name: str | None = options.server_name
        #: The peer must show who it is.
        self.is_mutual = bool(options.cert and options.ca)
        self.context: ssl.SSLContext | None = None
        if not (options.cert or options.ca or options.key or options.server_name):
            return
        if options.key and not options.cert:
            raise UsageError("--key is for a certificate: give --cert, too")
        if is_server and not options.cert:
            raise UsageError("who listens with TLS needs a certificate: give --cert")
        if is_server and options.server_name:
            raise UsageError("--server-name is for who dials: the name that the other end's certificate must have")
        if address is not None and address.kind not in ("tcp", "unix"):
            raise UsageError(f"TLS does not go over {address}")
        if address is not None and not (is_server or self.server_name or address.host):
            raise UsageError(f"give --server-name: the name in the certificate of {address}")
        self.context = gevent.ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER if is_server else ssl.PROTOCOL_TLS_CLIENT)
        _load(self.context.load_verify_locations, "--ca", options.ca)
        _check_readable("--key", options.key)
        _load(self.context.load_cert_chain, "--cert", options.cert, options.key, _no_passphrase)
        if is_server and options.ca:
            self.context.verify_mode = ssl.CERT_REQUIRED
        elif not options.ca and not is_server:
            self.context.load_default_certs()


def _check_readable(name: str, file: str | None) -> None:
    """OpenSSL does not say which file it was."""
    try:
        if file is not None:
            open(file, "rb").close()
    except OSError as error:
        raise CommandError(f"{name} {file}: {error.strerror or error}") from None


def _no_passphrase() -> str:
    """OpenSSL would ask the terminal for it, and hold up the process meanwhile."""
    raise CommandError("the private key has a passphrase: give --key without one, in a file that only you can read")


def _load(load: Any, name: str, file: str | None, *more: Any) -> None:
    if file is None:
        return
    _check_readable(name, file)
    try:
        load(file, *more)
    except ssl.SSLError as error:
        raise CommandError(
            f"{name} {file}: {error.reason or error}: a PEM file is wanted, and the key that belongs to it"
        ) from None


def connect(address: Address, trust: Trust, config: Config | None = None, timeout: float = _PATIENCE) -> Client:
    """Dial, and be the client. Raises OSError."""
    if address.kind in ("tcp", "unix"):
        target = address.what or (address.host or "localhost", address.port)
        return geyamux_connect(
            target, timeout=timeout, ssl_context=trust.context, server_hostname=trust.server_name, config=config
        )
    sock = dial_end(address, timeout)
    child = getattr(sock, "child", None)
    session = Client(sock, config)
    if child is not None:
        # One that runs is no peer yet.
        await_answer(session, lambda _: _what_became_of(child), _CHILD_PATIENCE)
    return session


def _what_became_of(child: Any) -> str:
    with contextlib.suppress(subprocess.TimeoutExpired):
        child.wait(1.0)
    ended = "does not answer" if child.returncode is None else f"ended with status {child.returncode}"
    return f"the command {ended}: it must run geyamux, or speak Yamux, on its standard input and output"


def meet(address: Address, trust: Trust, config: Config) -> Client:
    """`connect` to one who answers: a listener may speak no Yamux, or refuse our certificate behind its handshake."""
    session = connect(address, trust, config)
    if address.kind in ("tcp", "unix"):
        wants = "TLS (--ca, --server-name)" if trust.context is None else "another certificate (--cert)"
        await_answer(session, lambda reason: f"{reason}; does it speak Yamux, and want {wants}?")
    return session


def accept(conn: Any, trust: Trust, config: Config) -> Server:
    """Be the server on a connection that has come. Raises OSError."""
    if trust.context is not None:
        conn.settimeout(_PATIENCE)
        conn = begin_tls(conn, trust.context, server_side=True)
    try:
        return Server(conn, config)
    except BaseException:
        conn.close()
        raise


def await_answer(
    session: Session, explain: Callable[[str], str] = "{}; does it speak Yamux?".format, patience: float = _PATIENCE
) -> None:
    """Wait until the peer has answered a ping; abort the session where it does not. Raises OSError, with that text."""
    try:
        session.ping(patience)
    except BaseException as error:
        session.abort()
        if not isinstance(error, OSError):
            raise
        raise ConnectionError(error.errno, explain(error.strerror or "no answer to a ping")) from None


def dial(
    address: Address, options: argparse.Namespace, config: Config | None = None, timeout: float = _PATIENCE
) -> Client:
    """`connect` for a command that needs it once: CommandError where it can't."""
    try:
        return connect(address, Trust(options, is_server=False, address=address), config, timeout)
    except OSError as error:
        raise CommandError(f"can't connect to {address}: {why(error)}") from None


#: What OpenSSL calls an alert about certificates that came from the peer.
_ALERT = re.compile(r"ALERT_((?:\w*CERTIFICATE\w*|UNKNOWN_CA))")


def why(error: BaseException) -> str:
    """What happened, and what to do where that is known."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"its certificate is not trusted ({error.verify_message}): look at --ca, or --server-name where you dial"
    alert = _ALERT.search(str(getattr(error, "reason", None) or error))
    if alert is not None:
        what = alert[1].lower().replace("_", " ")
        if what == "certificate required":
            return "the other end wants a certificate: give --cert"
        return f"the other end does not trust our certificate ({what}): look at --cert here, and at --ca there"
    if isinstance(error, ssl.SSLError):
        return f"no TLS ({error.reason or error}): does the other end speak TLS, and want a certificate (--cert)?"
    if isinstance(error, YamuxError):
        return str(getattr(error, "strerror", error))
    if isinstance(error, ConnectionRefusedError):
        return "connection refused: does the other end run, and listen there?"
    if isinstance(error, TimeoutError):
        return "no answer in time: is the address right, and does a firewall let it through?"
    if isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE):
        return OUT_OF_DESCRIPTORS
    return getattr(error, "strerror", None) or str(error) or type(error).__name__
