"""The loop that clients need whose connection may end at any time: dial again, ask again.

It is for what may be asked twice: an answer that got lost was perhaps given.
"""

from __future__ import annotations

import gevent
from gevent.lock import RLock

import geyamux

from .service import PATIENCE, ask

_FIRST_DELAY = 0.01
_LONGEST_DELAY = 0.5


class Reconnecting:
    """A session to an address, and another one when that is gone. Greenlets share it."""

    def __init__(self, address: tuple[str, int], config: geyamux.Config | None = None) -> None:
        self.address = address
        self.config = config
        #: What went wrong so far.
        self.errors: list[OSError] = []
        self._session: geyamux.Session | None = None
        self._dialling = RLock()

    def session(self) -> geyamux.Session:
        """The one that lives, or a new one. Raises what connecting raises."""
        with self._dialling:
            if self._session is None or self._session.closed:
                self._session = geyamux.connect(self.address, timeout=PATIENCE, config=self.config)
            return self._session

    def ask(self, line: bytes) -> bytes:
        """The answer, however many sessions that takes."""
        delay = _FIRST_DELAY
        while True:
            try:
                answer = ask(self.session(), line)
                if answer.endswith(b"\n"):
                    return answer
            except geyamux.RemoteGoAway as error:
                # It lives for the sake of its last streams, and takes no new ones.
                self.errors.append(error)
                self._session = None
            except OSError as error:
                self.errors.append(error)
            # A balancer takes connections for which it has no server: to be connected is no success yet.
            gevent.sleep(delay)
            delay = min(2 * delay, _LONGEST_DELAY)

    def close(self) -> None:
        if self._session is not None:
            self._session.close()
