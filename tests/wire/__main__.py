"""Check a Yamux server over TCP: `python -m tests.wire HOST:PORT`, from the directory above `tests`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from .peer import Setting
from .registry import FAIL
from .runner import run_all, select, summary, tell, write_json

DESCRIPTION = """Check a Yamux server at the level of bytes. Each check makes a connection of its own, as client.

The server must echo each stream, and end its half (FIN) behind ours. Checks that look at payload are n/a where a first
probe finds no echo. Exit status: 0 where none failed, 1 where some did, 2 where there is no server."""


def main(arguments: list[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    checks = select(options.k)
    if options.list:
        for entry in checks:
            print(f"{entry.level:6}  {entry.name}\n        {entry.purpose} [{entry.source}]")
        return 0
    if options.server is None:
        print("HOST:PORT is missing", file=sys.stderr)
        return 2
    host, port = options.server
    results = []
    try:
        for result in run_all(checks, Setting(host, port, options.timeout, options.silence), options.jobs):
            print(tell(result), flush=True)
            results.append(result)
    except OSError as error:
        print(f"no server at {host}:{port}: {error}", file=sys.stderr)
        return 2
    print(summary(results))
    if options.json:
        write_json(results, options.json)
    return int(any(result.outcome == FAIL for result in results))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tests.wire", description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("server", nargs="?", type=_address, metavar="HOST:PORT")
    parser.add_argument(
        "-k", action="append", default=[], metavar="WORD", help="checks with WORD in name, level or source"
    )
    parser.add_argument("--list", action="store_true", help="tell what the checks are for, and run none")
    parser.add_argument("--timeout", type=float, default=5.0, help="seconds for what must come (%(default)g)")
    parser.add_argument("--silence", type=float, default=0.3, help="seconds for what must not come (%(default)g)")
    parser.add_argument("--jobs", type=int, default=8, help="checks at the same time (%(default)d)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results there, too")
    return parser


def _address(text: str) -> tuple[str, int]:
    host, _, port = text.rpartition(":")
    if not host or not port.isdigit():
        raise argparse.ArgumentTypeError(f"not HOST:PORT: {text!r}")
    return host.strip("[]"), int(port)


if __name__ == "__main__":
    sys.exit(main())
