"""Standard input and output as one connection, and those of a child process.

The descriptors 0 and 1 are pointed to /dev/null once they are taken: whatever else is written there would harm what they
carry.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shlex
import signal
import socket as stdlib_socket
import stat
import sys
from typing import Any

import gevent
import gevent.socket
from gevent import subprocess
from gevent.fileobject import FileObjectPosix, FileObjectThread

__all__ = ["StandardIO", "start_child", "take_standard_io", "wait_for_children"]

#: A child whose connection has ended may take so long to end, and again so long after it was told to, in seconds.
_CHILD_PATIENCE = 2.0


def take_standard_io() -> Any:
    """Standard input and output as a socket-like object. Where both are one socket (sshd, inetd, a parent), a socket.

    Raises OSError where one of them is closed.
    """
    if sys.stdin is None or sys.stdout is None:
        # The descriptor may be somebody else's by now.
        raise OSError(errno.EBADF, os.strerror(errno.EBADF))
    reading, writing = os.dup(0), os.dup(1)
    with open(os.devnull, "r+b") as nothing:
        os.dup2(nothing.fileno(), 0)
        os.dup2(nothing.fileno(), 1)
    read_status, write_status = os.fstat(reading), os.fstat(writing)
    if stat.S_ISSOCK(read_status.st_mode) and read_status.st_ino == write_status.st_ino:
        os.close(writing)
        return gevent.socket.socket(fileno=reading)
    return StandardIO(reading, writing)


def _open(fd: int, mode: str) -> Any:
    # The first wakes whoever waits in it when it is closed; a file is never waited for, and not every loop takes one.
    kind = FileObjectThread if stat.S_ISREG(os.fstat(fd).st_mode) else FileObjectPosix
    return kind(fd, mode, buffering=0)


class StandardIO:
    """Two descriptors, one to read from and one to write to, with the methods of a socket."""

    def __init__(self, reading: int, writing: int) -> None:
        # Others may have them, too (a shell, a terminal), and want them as they were.
        self._was_blocking = {fd: os.get_blocking(fd) for fd in (reading, writing)}
        self._reader = _open(reading, "rb")
        self._writer = _open(writing, "wb")

    def recv(self, bufsize: int) -> bytes:
        """Wait for bytes; b"" at the end."""
        data: bytes = self._reader.read(bufsize)
        return data

    def sendall(self, data: Any) -> None:
        """Wait until all were taken."""
        with memoryview(data) as view:
            sent = 0
            while sent < len(view):
                sent += self._writer.write(view[sent:])

    def shutdown(self, how: int) -> None:
        """Of writing: close the output, which is all that its reader can be told."""
        if how != stdlib_socket.SHUT_RD:
            self._let_go(self._writer)

    def close(self) -> None:
        """Close both. Who waits for them gets an OSError."""
        self._let_go(self._writer)
        self._let_go(self._reader)

    def _let_go(self, file: Any) -> None:
        if not file.closed:
            fd = file.fileno()
            with contextlib.suppress(OSError):
                os.set_blocking(fd, self._was_blocking[fd])
            file.close()


#: Greenlets that wait for the end of a child.
_reaping: set[Any] = set()


class ChildSocket(gevent.socket.socket):
    """A connection to a child process, which ends with it."""

    child: Any = None

    def close(self) -> None:
        """The child reads the end of its input, and gets some time to end by itself."""
        super().close()
        if self.child is not None:
            greenlet = gevent.spawn(_reap, self.child)
            self.child = None
            _reaping.add(greenlet)
            greenlet.rawlink(_reaping.discard)


def start_child(command: str) -> ChildSocket:
    """Run a command line, without a shell. Raises OSError where there is no such command."""
    ours, theirs = stdlib_socket.socketpair()
    with ours, theirs:
        words = shlex.split(command)
        try:
            # Ctrl-C is for us, who drain first, although the terminal sends it to both; ssh keeps to that.
            child = subprocess.Popen(words, stdin=theirs.fileno(), stdout=theirs.fileno(), preexec_fn=_ignore_interrupts)
        except FileNotFoundError as error:
            raise FileNotFoundError(error.errno, f"there is no command {words[0]!r}") from None
        sock = ChildSocket(fileno=ours.detach())
    sock.child = child
    return sock


def _ignore_interrupts() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _reap(child: Any) -> None:
    for end in (None, child.terminate, child.kill):
        if end is not None:
            end()
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(_CHILD_PATIENCE)
            return


def wait_for_children() -> None:
    """Until all children are gone whose connections were closed."""
    gevent.joinall(list(_reaping))
