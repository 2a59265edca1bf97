"""Lines of JSON between the processes of a soak run: orders come in on stdin, reports go out on stdout.

It carries and counts; it judges nothing. Reports are collected and written a few times a second, so that a busy process
does not pay for a system call with each. The end of stdin means that whoever started the process is gone: it ends too.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from typing import Any

import gevent
from gevent.fileobject import FileObjectPosix

Message = dict[str, Any]

#: Seconds for which reports are collected.
_COLLECT = 0.2


class Channel:
    """The end of a process that was started by the run."""

    def __init__(self) -> None:
        self._orders = FileObjectPosix(0, "rb", close=False)
        self._waiting: list[str] = []
        self._writer = gevent.spawn(self._write)

    def orders(self) -> Iterator[Message]:
        """What is asked for, as it comes; ends with stdin."""
        for line in self._orders:
            yield json.loads(line)

    def send(self, **message: Any) -> None:
        """Report something; never waits."""
        self._waiting.append(json.dumps(message))

    def flush(self) -> None:
        """Write all that was reported."""
        waiting, self._waiting = self._waiting, []
        data = "".join(line + "\n" for line in waiting).encode()
        while data:
            data = data[os.write(1, data) :]

    def _write(self) -> None:
        while True:
            gevent.sleep(_COLLECT)
            self.flush()
