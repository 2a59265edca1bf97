"""Network namespaces joined by wires of their own, made and removed by a test that wants to cut or throttle them.

`Lab` has two, `Namespaces` any number. It needs root, `ip`, and for some wishes `tc` or `iptables`; `missing()` says what
is not there. Nothing of the machine's own network is touched. The sockets that a `Lab` makes stay in their namespace,
whatever process or greenlet uses them.
"""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import os
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from gevent import socket as gsocket

if TYPE_CHECKING:
    from typing_extensions import Self

_CLONE_NEWNET = 0x40000000
_NAMED = "/run/netns"
_numbers = itertools.count(1)
_libc = ctypes.CDLL(None, use_errno=True)


def missing(*tools: str) -> str:
    """Why no lab can be made here, "" where one can; `tools` are needed besides `ip`."""
    absent = [tool for tool in ("ip", *tools) if shutil.which(tool) is None]
    if absent:
        return f"not installed: {', '.join(absent)}"
    if os.geteuid() != 0:
        return "network namespaces need root"
    name = f"gy{os.getpid()}-try"
    try:
        run("ip", "netns", "add", name)
    except subprocess.CalledProcessError as error:
        return f"no network namespace can be made: {error.stderr.strip()}"
    run("ip", "netns", "del", name)
    return ""


class Namespaces:
    """One for each name in `sides`, with nothing but loopback in it; use it in a ``with``."""

    def __init__(self, *sides: str) -> None:
        number = next(_numbers)
        #: Names of the namespaces, unlike those of every other process.
        self.names = {side: f"gy{os.getpid()}-{number}{side}" for side in sides}

    def __enter__(self) -> Self:
        try:
            self._build()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _build(self) -> None:
        for side, name in self.names.items():
            run("ip", "netns", "add", name)
            self.ip(side, "link", "set", "lo", "up")

    def command(self, side: str, *words: str) -> list[str]:
        """The command line that runs `words` on that side."""
        return ["ip", "netns", "exec", self.names[side], *words]

    def ip(self, side: str, *words: str) -> None:
        """Run ip(8) with `words` for that side."""
        run("ip", "-n", self.names[side], *words)

    def join(self, device: str, ends: Mapping[str, str]) -> None:
        """A wire between two sides, as `device` on both; `ends` has the address of each, with its prefix length."""
        near, far = (("name", device, "netns", self.names[side]) for side in ends)
        run("ip", "link", "add", *near, "type", "veth", "peer", *far)
        for side, address in ends.items():
            self.ip(side, "addr", "add", address, "dev", device)
            self.ip(side, "link", "set", device, "up")

    def remove(self, side: str) -> None:
        """Remove that namespace; what runs or is open there keeps it in existence, without a name."""
        subprocess.run(["ip", "netns", "del", self.names[side]], capture_output=True, check=False)

    def close(self) -> None:
        """Remove them, whatever state they are in."""
        for side in self.names:
            self.remove(side)


class Lab(Namespaces):
    """The namespaces `a` and `b`, with `wires` veth pairs between them; use it in a ``with``."""

    def __init__(self, wires: int = 1) -> None:
        super().__init__("a", "b")
        self.wires = wires

    def _build(self) -> None:
        super()._build()
        for wire in range(self.wires):
            self.join(f"wire{wire}", {side: f"{self.address(side, wire)}/24" for side in "ab"})

    def address(self, side: str, wire: int = 0) -> str:
        """The address of that side on that wire."""
        return f"10.99.{wire}.{1 if side == 'a' else 2}"

    def socket(self, side: str, buffers: int | None = None) -> Any:
        """A new TCP socket that lives on that side."""
        with self._inside(side):
            sock = gsocket.socket()
        if buffers is not None:
            sock.setsockopt(gsocket.SOL_SOCKET, gsocket.SO_SNDBUF, buffers)
            sock.setsockopt(gsocket.SOL_SOCKET, gsocket.SO_RCVBUF, buffers)
        return sock

    def connect(self, wire: int = 0, buffers: int | None = None) -> tuple[Any, Any]:
        """Both ends of a new TCP connection over that wire."""
        near = self.socket("a", buffers)
        with contextlib.closing(self.socket("b", buffers)) as listener:
            listener.bind((self.address("b", wire), 0))
            listener.listen(1)
            near.connect(listener.getsockname())
            far, _ = listener.accept()
        for end in (near, far):
            end.setsockopt(gsocket.IPPROTO_TCP, gsocket.TCP_NODELAY, 1)
        return near, far

    @contextlib.contextmanager
    def _inside(self, side: str) -> Iterator[None]:
        """This thread in that namespace. Nothing in the block may switch to another greenlet."""
        with _opened("/proc/thread-self/ns/net") as own, _opened(f"{_NAMED}/{self.names[side]}") as other:
            _enter(other)
            try:
                yield
            finally:
                _enter(own)

    # -- faults

    def throttle(self, bytes_a_second: int, wire: int = 0) -> None:
        """Let no more pass over that wire, in either direction."""
        for side in "ab":
            words = ("root", "tbf", "rate", f"{bytes_a_second * 8}bit", "burst", "16kb", "latency", "400ms")
            run("tc", "-n", self.names[side], "qdisc", "add", "dev", f"wire{wire}", *words)

    def drop_all(self) -> None:
        """Both sides throw away whatever comes: the way it is when a machine has lost its power."""
        for side in "ab":
            run(*self.command(side, "iptables", "-w", "-A", "INPUT", "-j", "DROP"))

    def set_down(self, side: str, wire: int = 0) -> None:
        """Take the interface of that side down."""
        self.ip(side, "link", "set", f"wire{wire}", "down")

    def cut(self, wire: int = 0) -> None:
        """Remove the wire altogether, with its interfaces and their addresses."""
        self.ip("b", "link", "del", f"wire{wire}")


def run(*words: str) -> None:
    """Run a command to its end; what it wrote is in the error where it failed."""
    subprocess.run(words, capture_output=True, check=True, text=True)


@contextlib.contextmanager
def _opened(path: str) -> Iterator[int]:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _enter(descriptor: int) -> None:
    if _libc.setns(descriptor, _CLONE_NEWNET) != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
