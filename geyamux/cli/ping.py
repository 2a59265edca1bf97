"""``geyamux ping``: round trips to any Yamux server, in the way of ping(8).

It opens no stream and asks nothing of the other end but what every Yamux peer does: answer pings. One ping is under way
at a time. What is measured is the session, so a server that is busy answers late here, however short the way to it is.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
import time

from ..config import Config
from ..errors import SessionError
from ..session import Session
from .address import Address, address
from .errors import CommandError, UsageError
from .signals import interruptible
from .trunk import add_tls_arguments, dial
from .values import interval, positive

SUMMARY = "measure round trips to a Yamux server"
DESCRIPTION = """\
Connect to a Yamux server, send it pings and print how long each took. No stream is opened. At the end, or on Ctrl-C, a
summary: pings sent and answered, and the shortest, mean and longest round trip with their standard deviation."""
EXAMPLES = """\
  geyamux ping relay.example:7000
  geyamux ping -c 3 -W 2 127.0.0.1:7000               three pings, two seconds for each answer
  geyamux ping -i 0.1 --ca ca.pem relay.example:7443  ten a second, over TLS
  geyamux ping unix:/run/relay.sock"""

#: No keepalive: it would end the session of a peer that is late, which is what ping is there to show. The other end of a
#: connection that takes no part in Yamux would be waited for at the end. A relay that takes us for an agent is refused.
_CONFIG = Config(keepalive_interval=None, close_timeout=1.0, max_incoming_streams=0)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what the command takes."""
    parser.add_argument("address", metavar="ADDR", type=address, help="the server: host:port, [v6]:port, unix:/path")
    parser.add_argument("-c", dest="count", metavar="N", type=positive, help="stop after N pings (default: never)")
    parser.add_argument(
        "-i", dest="interval", metavar="SECONDS", type=interval, default=1.0, help="between two pings (default: 1)"
    )
    parser.add_argument(
        "-W", dest="patience", metavar="SECONDS", type=interval, default=5.0, help="for one answer (default: 5)"
    )
    add_tls_arguments(parser)


def run(options: argparse.Namespace) -> int:
    """Ping until the count is reached, Ctrl-C, or the end of the connection; 0 if any answer came, and it held."""
    if options.address.kind == "stdio":
        raise UsageError("standard output is for the answers: stdio: can't be pinged")
    tally = Tally()
    with interruptible(), dial(options.address, options, _CONFIG) as session:
        print(f"PING {options.address}{_resolved(options.address, session)}: Yamux", flush=True)
        try:
            _ping(session, options, tally)
        except KeyboardInterrupt:
            print()
        except SessionError as error:
            if not tally.times:
                raise CommandError(f"{_advice(options.address)} ({error.message})") from error
            tally.is_broken = True
            print(f"connection lost: {error.message}")
    print(f"--- {options.address} ping statistics ---\n{tally}", flush=True)
    return 1 if tally.is_broken or not tally.times else 0


class Tally:
    """What has been sent, and how long the answers took."""

    def __init__(self) -> None:
        self.began = time.monotonic()
        self.sent = 0
        #: Round trips in milliseconds.
        self.times: list[float] = []
        #: The connection was lost.
        self.is_broken = False

    def __str__(self) -> str:
        lost = 100 * (1 - len(self.times) / self.sent) if self.sent else 0
        seconds = time.monotonic() - self.began
        text = f"{self.sent} sent, {len(self.times)} received, {lost:.3g}% loss, time {seconds:.1f} s"
        if self.times:
            figures = min(self.times), statistics.fmean(self.times), max(self.times), statistics.pstdev(self.times)
            text += "\nround trip min/avg/max/mdev = " + "/".join(f"{figure:.3f}" for figure in figures) + " ms"
        return text


def _ping(session: Session, options: argparse.Namespace, tally: Tally) -> None:
    """Raise what ends the session."""
    numbers = itertools.count(1) if options.count is None else range(1, options.count + 1)
    for number in numbers:
        due = time.monotonic() + options.interval
        tally.sent = number
        try:
            milliseconds = session.ping(options.patience) * 1000
        except TimeoutError:
            print(f"no answer from {options.address}: seq={number} after {options.patience:g} s", flush=True)
            if not session.stats().bytes_received and number == 1:
                # Many servers of other protocols wait in silence for more: it may be long before they end it.
                print(f"geyamux ping: {_advice(options.address)}", file=sys.stderr)
        else:
            tally.times.append(milliseconds)
            print(f"pong from {options.address}: seq={number} time={milliseconds:.3f} ms", flush=True)
        if number != options.count and session.join(max(0.0, due - time.monotonic())):
            session.ping()


def _resolved(target: Address, session: Session) -> str:
    """The numbers behind a name."""
    peer = session.getpeername()
    is_name = target.kind == "tcp" and isinstance(peer, tuple) and peer[0] != target.host
    return f" ({peer[0]})" if is_name else ""


def _advice(target: Address) -> str:
    return (
        f"{target} takes the connection but answers no Yamux ping: check that a Yamux server listens there, "
        "and give --ca or --server-name if it wants TLS"
    )
