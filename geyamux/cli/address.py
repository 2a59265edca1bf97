"""Addresses as users write them. What is there is reached in :mod:`.trunk` and :mod:`.ends`."""

from __future__ import annotations

import argparse
import ipaddress
import shlex
from typing import NamedTuple

__all__ = ["HELP", "Address", "address", "host_name"]

HELP = """\
addresses:
  host:port, [v6]:port   TCP
  port                   TCP, on 127.0.0.1
  :port                  TCP, on all interfaces where it listens
  unix:/path             a Unix socket
  stdio:                 standard input and output of this process
  exec:COMMAND           standard input and output of a child process, where it dials"""


class Address(NamedTuple):
    """Where to dial or to listen."""

    #: What was given.
    text: str
    #: tcp, unix, stdio or exec.
    kind: str
    #: Of tcp; "" stands for all interfaces, or for this machine.
    host: str = ""
    port: int = 0
    #: Of unix the path, of exec the command.
    what: str = ""

    def __str__(self) -> str:
        return self.text


def host_name(text: str) -> str:
    """A name or an IP address, as TLS and the resolver take it."""
    try:
        encoded = text.encode("idna")
    except UnicodeError:
        encoded = b""
    if not encoded:
        raise argparse.ArgumentTypeError(f"{text!r} is no name of a host")
    return text


def _check_command(command: str) -> None:
    try:
        words = shlex.split(command)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"the command {command!r} can't be read: {error}") from None
    if not words:
        raise argparse.ArgumentTypeError("'exec:': there is no command")


def address(text: str) -> Address:
    """Read an address; for `type=` of argparse."""
    if text == "stdio:":
        return Address(text, "stdio")
    for kind in ("unix", "exec"):
        if text.startswith(f"{kind}:"):
            what = text.removeprefix(f"{kind}:")
            if kind == "exec":
                _check_command(what)
            elif not what:
                raise argparse.ArgumentTypeError("'unix:': there is no path")
            return Address(text, kind, what=what)
    host, colon, port = text.rpartition(":")
    if not (port.isascii() and port.isdigit() and len(port) <= 5 and int(port) <= 65535):
        raise argparse.ArgumentTypeError(
            f"{text!r} is no address: give HOST:PORT, unix:/path or stdio:, as in 127.0.0.1:7000"
        )
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
        try:
            ipaddress.IPv6Address(host)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r}: what stands in brackets is no IPv6 address") from None
    elif ":" in host:
        raise argparse.ArgumentTypeError(f"{text!r}: give an IPv6 address in brackets, as in [::1]:7000")
    elif host:
        host_name(host)
    return Address(text, "tcp", host if colon else "127.0.0.1", int(port))
