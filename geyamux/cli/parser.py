"""The arguments of all commands. From this comes the help, and the manual page."""

from __future__ import annotations

import argparse
from types import ModuleType

from .. import __version__
from . import bench, forward, ping, top
from .address import HELP

__all__ = ["COMMANDS", "make_parser"]

COMMANDS: dict[str, ModuleType] = {"forward": forward, "ping": ping, "bench": bench, "top": top}

_DESCRIPTION = (
    "Carry many TCP connections over one, through NAT and firewalls; the other end may be any program that speaks Yamux."
)
_STATUS = """\
exit status:
  0  a good end, or an answer to ping
  1  a failure, said in one line
  2  arguments that make no sense"""


def make_parser() -> argparse.ArgumentParser:
    """The parser of ``geyamux``; `options.run(options)` runs what was chosen."""
    parser = argparse.ArgumentParser(
        prog="geyamux", description=_DESCRIPTION, epilog=_STATUS, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--version", action="version", version=f"geyamux {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True, dest="command")
    for name, module in COMMANDS.items():
        command = commands.add_parser(
            name,
            help=module.SUMMARY,
            description=module.DESCRIPTION,
            epilog=f"examples:\n{module.EXAMPLES.rstrip()}\n\n{HELP}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        module.add_arguments(command)
        command.set_defaults(run=module.run, parser=command)
    return parser
