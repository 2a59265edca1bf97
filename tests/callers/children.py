"""Children of a program that has sessions: by fork, multiprocessing and subprocess. Run as a process of its own.

``python children.py HOW``. The session is over a socketpair within the program. It prints ``unharmed`` when the parent's
session works after the child has gone, and nothing else; what a child finds wrong stands on stderr, or is its status.
"""

from __future__ import annotations

import sys

if "patched" in sys.argv[2:]:
    import gevent.monkey

    gevent.monkey.patch_all()

import gc
import multiprocessing
import os
import subprocess
import threading
import warnings
from collections.abc import Callable
from typing import Any

import gevent

import geyamux

#: Prints how many sockets it has inherited.
SOCKETS = """
import os
found = [os.readlink(f"/proc/self/fd/{n}") for n in os.listdir("/proc/self/fd") if os.path.lexists(f"/proc/self/fd/{n}")]
print(sum("socket:" in name for name in found))
"""


def refused(call: Callable[[], Any]) -> None:
    """In a child every call says that the session is dead."""
    try:
        call()
    except geyamux.SessionError as error:
        assert "process" in str(error), error
    except RuntimeError as error:  # the thread that forked is the only one that the child has
        assert "thread" in str(error), error
    else:
        raise AssertionError("it works in the child")


def be_child(client: Any, stream: Any) -> None:
    warnings.simplefilter("ignore", ResourceWarning)  # the descriptors are the parent's
    for call in (client.open, client.accept, client.ping, lambda: stream.sendall(b"of the child"), stream.read):
        refused(call)
    stream.close()
    stream.reset()
    client.close()
    client.abort()
    gc.collect()


def begin(client: Any, stream: Any) -> int:
    pid = os.fork()
    if not pid:
        try:
            be_child(client, stream)
        except BaseException as error:
            os.write(2, repr(error).encode())
            os._exit(1)
        os._exit(0)
    return pid


def status(pid: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def fork(client: Any, stream: Any) -> int:
    return status(begin(client, stream))


def fork_in_greenlet(client: Any, stream: Any) -> int:
    return int(gevent.spawn(fork, client, stream).get())


def fork_in_callback(client: Any, stream: Any) -> int:
    done: list[int] = []
    gevent.get_hub().loop.run_callback(lambda: done.append(begin(client, stream)))
    while not done:
        gevent.sleep(0)
    return status(done[0])


def fork_in_thread(client: Any, stream: Any) -> int:
    done: list[int] = []
    thread = threading.Thread(target=lambda: done.append(fork(client, stream)))
    thread.start()
    thread.join()
    return done[0]


def fork_twice(client: Any, stream: Any) -> int:
    pid = os.fork()
    if not pid:
        os._exit(fork(client, stream))
    return status(pid)


def process(method: str, client: Any, stream: Any) -> int:
    context: Any = multiprocessing.get_context(method)
    if method == "spawn":
        try:
            context.Process(target=be_child, args=(client, stream)).start()
        except TypeError as error:
            assert "pickle" in str(error) or "serialize" in str(error), error
        else:
            raise AssertionError("a session went to another process")
        child = context.Process(target=os.getpid)
    else:
        child = context.Process(target=be_child, args=(client, stream))
    child.start()
    child.join()
    return int(child.exitcode or 0)


def run_without_closing(client: Any, stream: Any) -> int:
    """A session's descriptor is not inherited, even by a program that is started carelessly."""
    done = subprocess.run([sys.executable, "-c", SOCKETS], close_fds=False, capture_output=True, check=True)
    assert not os.get_inheritable(client.conn.fileno())
    return int(done.stdout)


WAYS: dict[str, Callable[[Any, Any], int]] = {
    "fork": fork,
    "fork in a greenlet": fork_in_greenlet,
    "fork in a callback": fork_in_callback,
    "fork in a thread": fork_in_thread,
    "fork twice": fork_twice,
    "multiprocessing fork": lambda client, stream: process("fork", client, stream),
    "multiprocessing spawn": lambda client, stream: process("spawn", client, stream),
    "subprocess": run_without_closing,
}


def read_all(stream: Any) -> bytes:
    try:
        with stream:
            return bytes(stream.read())
    except geyamux.YamuxError:
        return b""  # in a child, whose hub may run, too


def main(how: str) -> None:
    client, server = geyamux.pair()
    near, far = client.open(), server.accept()
    reading = gevent.spawn(read_all, far)
    gevent.spawn(client.join)
    near.sendall(b"queued before, ")
    code = WAYS[how](client, near)
    near.sendall(b"sent after")
    near.close()
    assert reading.get(timeout=5) == b"queued before, sent after"
    assert client.ping(5) > 0
    client.close()
    server.close()
    print("unharmed")
    sys.exit(code)


if __name__ == "__main__":
    main(sys.argv[1])
