"""Log lines of a command, on standard error: words for people, or an object of JSON a line."""

from __future__ import annotations

import datetime
import errno
import json
import logging
import select
import sys
import time
from typing import Any

import gevent

__all__ = ["OUT_OF_DESCRIPTORS", "Repeated", "event", "printable", "set_up", "streams"]

logger = logging.getLogger("geyamux.cli")
#: Of single streams: only when asked for.
streams = logging.getLogger("geyamux.cli.streams")

#: Messages and facts are cut here, in characters: a pipe that takes anything takes a page at once.
_LONGEST_MESSAGE, _LONGEST_FACT, _LONGEST_TRACEBACK = 600, 200, 2000
#: The same warning comes once in so many seconds, and so many kinds of them are told apart.
_ONCE_IN, _MOST_KINDS = 1.0, 1000

OUT_OF_DESCRIPTORS = "out of file descriptors: raise `ulimit -n`, or LimitNOFILE= of systemd"

_LEVELS = (logging.WARNING, logging.INFO, logging.DEBUG)


def set_up(verbosity: int, as_json: bool, is_quiet: bool = False) -> None:
    """Let the package's lines come: what its commands do, and with more verbosity what sessions do, and their frames."""
    handler = _Handler(sys.stderr)
    handler.setFormatter(_JSONFormatter() if as_json else _TextFormatter("%(asctime)s %(message)s", "%H:%M:%S"))
    root = logging.getLogger("geyamux")
    root.addHandler(handler)
    root.setLevel(_LEVELS[min(verbosity, 2)])
    gevent.get_hub().print_exception = report  # type: ignore[assignment]
    logger.setLevel(logging.WARNING if is_quiet and not verbosity else logging.INFO)
    streams.setLevel(logging.INFO if verbosity else logging.WARNING)


def event(name: str, message: str, *, to: logging.Logger = logger, level: int = logging.INFO, **fields: object) -> None:
    """Something happened that a program may want to know: its name, words for people, and the facts."""
    to.log(level, "%s", message, extra={"event": name, "facts": fields})


class Repeated:
    """Warnings that strangers can bring about as often as they like: the same one once a second."""

    def __init__(self) -> None:
        #: When each was told last, on the monotonic clock, and how many were left out since.
        self._told: dict[str, tuple[float, int]] = {}

    def warn(self, name: str, message: str, reason: str, **fields: Any) -> None:
        """As `event`; the same is what has the same name and reason."""
        key, now = f"{name}: {reason}", time.monotonic()
        told, left_out = self._told.get(key, (0.0, 0))
        if now - told < _ONCE_IN:
            self._told[key] = told, left_out + 1
            return
        if len(self._told) >= _MOST_KINDS:
            self._told.clear()
        self._told[key] = now, 0
        more = f" ({left_out} more of these)" if left_out else ""
        event(name, message + more, level=logging.WARNING, reason=reason, **fields)


def printable(text: str) -> str:
    """Of what a peer, a name server or a child process has said nothing may steer the terminal."""
    return "".join(character if character.isprintable() else repr(character)[1:-1] for character in text)


def report(context: object, kind: Any, error: Any, traceback: Any) -> None:
    """In place of `Hub.print_exception`: what nobody has caught is a line as every other."""
    if isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE):
        _repeated.warn("warning", f"{OUT_OF_DESCRIPTORS}; connections wait", OUT_OF_DESCRIPTORS)
    else:
        logger.error("%r failed: %r", context, error, exc_info=(kind, error, traceback))


_repeated = Repeated()


class _Handler(logging.StreamHandler):  # type: ignore[type-arg]  # since Python 3.11
    """One that never waits: a reader of the log that stops must not stop the tunnel. What is left out is counted."""

    _left_out = 0

    def emit(self, record: logging.LogRecord) -> None:
        if not self._can_write():
            self._left_out += 1
            return
        if self._left_out:
            text, self._left_out = f"{self._left_out} lines were left out: nobody read them", 0
            super().emit(logger.makeRecord(logger.name, logging.WARNING, "", 0, text, (), None))
        super().emit(record)

    def _can_write(self) -> bool:
        """Of a pipe: a page of it."""
        poll = select.poll()
        try:
            poll.register(self.stream.fileno(), select.POLLOUT)
        except (AttributeError, OSError, ValueError):
            return False
        return bool(poll.poll(0))


class _TextFormatter(logging.Formatter):
    """For people, on a terminal perhaps."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        record.message = printable(record.message)[:_LONGEST_MESSAGE]
        return super().formatMessage(record)


class _JSONFormatter(logging.Formatter):
    """An object a line. Lines of the library have the event "log"."""

    def format(self, record: logging.LogRecord) -> str:
        moment = datetime.datetime.fromtimestamp(record.created, datetime.timezone.utc)
        line = {
            "time": moment.isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "event": getattr(record, "event", "log"),
            "message": record.getMessage()[:_LONGEST_MESSAGE],
            **{name: _short(fact) for name, fact in getattr(record, "facts", {}).items()},
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)[-_LONGEST_TRACEBACK:]
        return json.dumps(line, default=str)


def _short(fact: object) -> object:
    return fact[:_LONGEST_FACT] if isinstance(fact, str) else fact
