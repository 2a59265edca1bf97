"""Log lines of a command, on standard error: words for people, or an object of JSON a line."""

from __future__ import annotations

import datetime
import json
import logging
import sys

__all__ = ["event", "set_up"]

logger = logging.getLogger("geyamux.cli")
#: Of single streams: only when asked for.
streams = logging.getLogger("geyamux.cli.streams")

_LEVELS = (logging.WARNING, logging.INFO, logging.DEBUG)


def set_up(verbosity: int, as_json: bool) -> None:
    """Let the package's lines come: what its commands do, and with more verbosity what sessions do, and their frames."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_JSONFormatter() if as_json else logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
    root = logging.getLogger("geyamux")
    root.addHandler(handler)
    root.setLevel(_LEVELS[min(verbosity, 2)])
    logger.setLevel(logging.INFO)
    streams.setLevel(logging.INFO if verbosity else logging.WARNING)


def event(name: str, message: str, *, to: logging.Logger = logger, level: int = logging.INFO, **fields: object) -> None:
    """Something happened that a program may want to know: its name, words for people, and the facts."""
    to.log(level, "%s", printable(message), extra={"event": name, "facts": fields})


def printable(text: str) -> str:
    """Of what a peer, a name server or a child process has said nothing may steer the terminal."""
    return "".join(character if character.isprintable() else repr(character)[1:-1] for character in text)


class _JSONFormatter(logging.Formatter):
    """An object a line. Lines of the library have the event "log"."""

    def format(self, record: logging.LogRecord) -> str:
        moment = datetime.datetime.fromtimestamp(record.created, datetime.timezone.utc)
        line = {
            "time": moment.isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "event": getattr(record, "event", "log"),
            "message": record.getMessage(),
            **getattr(record, "facts", {}),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)
