"""Run the command that the arguments name."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from .errors import CommandError, UsageError
from .logs import printable
from .parser import make_parser

__all__ = ["main"]

#: What a shell says of a process that was interrupted.
_INTERRUPTED = 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what the arguments say; return the exit status. Raises SystemExit for arguments that make no sense."""
    options = make_parser().parse_args(arguments)
    parser: argparse.ArgumentParser = options.parser
    try:
        return int(options.run(options))
    except UsageError as error:
        parser.error(str(error))
    except CommandError as error:
        print(f"geyamux {options.command}: {printable(str(error))}", file=sys.stderr)
        return 1
    except BrokenPipeError:
        # Who read the output has seen enough.
        sys.stderr.close()
        return 1
    except KeyboardInterrupt:
        return _INTERRUPTED
