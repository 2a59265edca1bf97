"""The settings of a session: one frozen record, checked when it is made.

It only holds and checks them; what each limit does when it is reached is said beside it. Sizes are bytes, times seconds.
"""

from __future__ import annotations

import enum
import math
from dataclasses import dataclass, fields
from typing import Final

from .errors import ConfigError
from .frame import INITIAL_WINDOW

__all__ = ["Config"]

_KIB = 1 << 10
_MIB = 1 << 20
_MAX_WINDOW = (1 << 31) - 1
#: Growth of a window ends here when `window_auto_tune` is True: what go-yamux and QUIC stacks settled on.
AUTO_TUNE_LIMIT = 16 * _MIB


class Unset(enum.Enum):
    """The value of an argument that was not given, where None means something else."""

    UNSET = "unset"

    def __repr__(self) -> str:
        return "<unset>"


UNSET: Final = Unset.UNSET


@dataclass(frozen=True, kw_only=True)
class Config:
    """How a session behaves. Make one, share it among as many sessions as you like; it never changes.

    Raises :class:`~geyamux.ConfigError` for a value that makes no sense.
    """

    #: Inbound streams that wait for ``accept``; one more is refused with a reset. The same number of own streams may
    #: wait for the peer's acknowledgement; ``open`` waits beyond it (the public specification, "ACK backlog").
    accept_backlog: int = 256
    #: Inbound streams at once, until the application has closed them; one more is refused with a reset. None: no limit.
    max_incoming_streams: int | None = 4096
    #: Own streams at once; ``open`` waits beyond it. None: no limit.
    max_outgoing_streams: int | None = None
    #: An inbound stream that nobody accepts for so long is reset. None: never.
    accept_timeout: float | None = 60.0
    #: Silence after which a ping goes out, to prove that the peer lives and to keep middleboxes awake. None: never.
    keepalive_interval: float | None = 30.0
    #: Silence after such a ping that ends the session with :class:`~geyamux.KeepaliveTimeout`.
    keepalive_timeout: float = 10.0
    #: Bytes wait and the connection takes none for so long: the session ends with :class:`~geyamux.WriteTimeout`.
    connection_write_timeout: float | None = 10.0
    #: The peer has not acknowledged a stream for so long: that stream is reset. None, because some peers (js-yamux,
    #: rust-yamux) acknowledge only with their first answer.
    stream_open_timeout: float | None = None
    #: After a full close: the peer has not ended its side for so long: the stream is reset. None: never,
    #: however many there are of them; else those beyond 4,096 are reset after 10 seconds.
    stream_close_timeout: float | None = 300.0
    #: What ``Session.close`` may take before it gives up being polite. None: for ever. (A peer that broke the protocol
    #: is given five seconds then.)
    close_timeout: float | None = 5.0
    #: The receive window of each stream: what a peer may send before the application has read it.
    max_stream_window: int = INITIAL_WINDOW
    #: Let windows grow with the measured need: True up to 16 MiB, an int up to that. Growth draws on `receive_budget`.
    window_auto_tune: bool | int = False
    #: Unread bytes of all streams of the session; beyond it the stream that hoards most is reset.
    receive_budget: int = 64 * _MIB
    #: The body of a Data frame that we send, at most. None: the larger of 64 KiB and a quarter of the peer's window,
    #: up to 1 MiB (rust-yamux ends the connection above that).
    max_frame_size: int | None = None
    #: Bytes waiting for the connection above which writes, opens and accepts wait.
    outbox_limit: int = 256 * _KIB
    #: The ``settimeout`` value of new streams. Left out: ``socket.getdefaulttimeout()``, as for new sockets.
    stream_timeout: float | Unset | None = UNSET

    def __post_init__(self) -> None:
        for field in fields(self):
            self._check(field.name, getattr(self, field.name))
        if self.window_limit < self.max_stream_window:
            raise ConfigError(
                f"window_auto_tune={self.window_auto_tune!r} is below max_stream_window={self.max_stream_window}"
            )
        if self.receive_budget < self.max_stream_window:
            raise ConfigError(
                f"receive_budget={self.receive_budget} is below max_stream_window={self.max_stream_window}: "
                "one unread stream would be over it"
            )

    def _check(self, name: str, value: object) -> None:
        if name == "window_auto_tune" and isinstance(value, bool):
            return
        if name in _COUNTS:
            low, high, optional = _COUNTS[name]
            if value is None and optional:
                return
            if isinstance(value, bool) or not isinstance(value, int):
                raise ConfigError(f"{name} must be an int{' or None' if optional else ''}, not {value!r}")
            if not low <= value <= high:
                raise ConfigError(f"{name}={value} is outside {low} .. {high}")
            return
        if value is UNSET or (value is None and name != "keepalive_timeout"):
            return
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            raise ConfigError(f"{name} must be a number of seconds, not {value!r}")
        if value < 0 or (value == 0 and name not in ("close_timeout", "stream_timeout")):
            raise ConfigError(f"{name}={value} must be more than 0 seconds")

    @property
    def window_limit(self) -> int:
        """What a receive window may grow to."""
        if self.window_auto_tune is True:
            return max(AUTO_TUNE_LIMIT, self.max_stream_window)
        return int(self.window_auto_tune) or self.max_stream_window


#: Every setting that counts something: lowest and highest value, and whether None is one.
_COUNTS: dict[str, tuple[int, int, bool]] = {
    "accept_backlog": (1, 1 << 20, False),
    "max_incoming_streams": (0, 1 << 31, True),
    "max_outgoing_streams": (1, 1 << 31, True),
    "max_stream_window": (INITIAL_WINDOW, _MAX_WINDOW, False),
    "window_auto_tune": (INITIAL_WINDOW, _MAX_WINDOW, False),
    "receive_budget": (INITIAL_WINDOW, 1 << 62, False),
    "max_frame_size": (_KIB, _MIB, True),
    "outbox_limit": (4 * _KIB, 1 << 40, False),
}
