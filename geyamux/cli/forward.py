"""``geyamux forward``: its arguments. What it does is in :mod:`.forwarding`."""

from __future__ import annotations

import argparse

from . import logs, trunk, values
from .address import address
from .errors import UsageError
from .forwarding import Forward

SUMMARY = "forward connections through a tunnel"
DESCRIPTION = """\
Forward connections over one other, the trunk, which either end may dial. One end accepts what comes to --from and
opens a stream for it, the other connects each stream to --to. A trunk that is dialled is dialled again whenever it is
lost. Several may dial one listener: streams go to them in turn. SIGTERM lets streams finish (--drain), a second one
does not."""
EXAMPLES = """\
  expose a web server behind NAT, on port 8080 of a public host:
    public$ geyamux forward --listen :7000 --from :8080
    behind$ geyamux forward --dial public.example:7000 --to 127.0.0.1:8000
  reach a database that only the other host can, as on port 5432 here:
    there$  geyamux forward --listen :7000 --to 127.0.0.1:5432 --cert there.pem --ca ca.pem
    here$   geyamux forward --dial there.example:7000 --from 5432 --cert here.pem --ca ca.pem
  the same over ssh, with nothing that listens there:
    here$   geyamux forward --from 5432 \\
              --dial 'exec:ssh there.example geyamux forward --listen stdio: --to 5432'"""

_FOREVER = "never gives up"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """All of ``geyamux forward``."""
    group = parser.add_argument_group("what is forwarded")
    side = group.add_mutually_exclusive_group(required=True)
    side.add_argument("--dial", metavar="ADDR", type=address, help="connect the trunk to ADDR, and again when it is lost")
    side.add_argument("--listen", metavar="ADDR", type=address, help="wait for trunks at ADDR")
    group.add_argument("--to", metavar="ADDR", type=address, help="connect each stream of the peer to ADDR")
    group.add_argument(
        "--from",
        metavar="ADDR",
        type=address,
        dest="origin",
        help="listen at ADDR, and open a stream for each connection",
    )
    trunk.add_tls_arguments(parser)
    group = parser.add_argument_group("limits and times")
    group.add_argument(
        "--keepalive", metavar="SECONDS", type=values.seconds, default=30.0,
        help="of silence before a ping, and again for its answer (default: 30, and 10; 0: no pings)",
    )  # fmt: skip
    group.add_argument(
        "--window", metavar="SIZE", type=values.window, default="auto",
        help="receive window of a stream, as in 4M (default: auto, from 256K to 16M as the link needs)",
    )  # fmt: skip
    group.add_argument(
        "--max-streams",
        metavar="N",
        type=values.positive,
        default=4096,
        help="at once, each way and trunk (default: 4096)",
    )
    group.add_argument(
        "--retry-max-interval", metavar="SECONDS", type=values.interval, default=30.0,
        help="longest wait before dialling again (default: 30)",
    )  # fmt: skip
    group.add_argument("--max-retries", metavar="N", type=values.count, help=f"in a row (default: {_FOREVER})")
    group.add_argument(
        "--drain", metavar="SECONDS", type=values.seconds, default=30.0,
        help="for streams to finish after SIGTERM (default: 30)",
    )  # fmt: skip
    group.add_argument(
        "--quiet-go-away", action="store_true",
        help="tell the peer of a drain when its last stream has ended: some drop all streams when they are told",
    )  # fmt: skip
    group = parser.add_argument_group("watching it")
    group.add_argument("--control", metavar="PATH", type=values.file, help="Unix socket for `geyamux top`")
    group.add_argument("-v", "--verbose", action="count", default=0, help="log each stream (-vv: each frame)")
    group.add_argument("--json", action="store_true", help="log lines as JSON objects")


def run(options: argparse.Namespace) -> int:
    """Forward until a signal comes, the retries are used up, or the one stream of ``stdio:`` has ended."""
    _check(options)
    ways = (options.to, options.origin)
    # What ssh runs as its ProxyCommand must not talk into the session.
    is_proxy = options.dial is not None and any(way is not None and way.kind == "stdio" for way in ways)
    logs.set_up(options.verbose, options.json, is_quiet=is_proxy and not options.json)
    return Forward(options).run()


def _check(options: argparse.Namespace) -> None:
    """What the parser can't see: whether the addresses make sense together."""
    if options.to is None and options.origin is None:
        raise UsageError("one of the arguments --to --from is required")
    named = {"--dial": options.dial, "--listen": options.listen, "--to": options.to, "--from": options.origin}
    given = {name: where for name, where in named.items() if where is not None}
    for name, where in given.items():
        if where.kind == "exec" and name != "--dial":
            raise UsageError(f"{name}: exec: is for --dial")
        if where.kind == "tcp" and not where.port and name in ("--dial", "--to"):
            raise UsageError(f"{name}: port 0 is for who listens, and stands for any that is free")
    if sum(where.kind == "stdio" for where in given.values()) > 1:
        raise UsageError("stdio: can be one end only")
