"""A real HAProxy, or a real nginx, before servers of the test: started, reloaded, hung and killed.

Each runs in the foreground, as a child of the test, on a free port of 127.0.0.1, with its files in a directory of the
test. Whether it is ready is read from /proc: a connection made to find out would be a session for the servers behind.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import string
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import ClassVar

import gevent

from support.links import free_port

HERE = Path(__file__).resolve().parent
PATIENCE = 10.0
#: Debian keeps servers where only root looks.
_PATH = os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/local/sbin", "/usr/sbin"])
_LISTENS = "0A"


class Balancer:
    """One that runs, before servers on these ports of 127.0.0.1.

    `idle` is how long it keeps a connection on which nothing passes, `grace` how long it keeps the connections that it
    had before a reload (None: as long as they last); both in seconds. With `proxy_protocol` it tells servers who the
    client is.
    """

    #: Its name, which is that of its program.
    name: ClassVar[str]
    #: The file that its configuration is made of.
    template: ClassVar[str]

    def __init__(
        self,
        directory: Path,
        servers: Sequence[int],
        *,
        idle: float = 60.0,
        grace: float | None = None,
        proxy_protocol: bool = False,
    ) -> None:
        self.directory = directory
        self.port = free_port()
        self.idle = idle
        #: What was started, in that order; the last one takes new connections.
        self._started: list[subprocess.Popen[bytes]] = []
        words = {"port": str(self.port), "idle": milliseconds(idle), "directory": str(directory)}
        words |= self.words(servers, grace=grace, proxy_protocol=proxy_protocol)
        text = (HERE / self.template).read_text(encoding="utf-8")
        self._configuration = directory / self.template
        self._configuration.write_text(_Template(text).substitute(words), encoding="utf-8")

    def words(self, servers: Sequence[int], *, grace: float | None, proxy_protocol: bool) -> dict[str, str]:
        """What the template needs besides what every one needs."""
        raise NotImplementedError

    def command(self) -> list[str]:
        """How to start it."""
        raise NotImplementedError

    def reload(self) -> None:
        """Let it read its configuration anew; return when new connections go to what has."""
        raise NotImplementedError

    @property
    def address(self) -> tuple[str, int]:
        return "127.0.0.1", self.port

    @property
    def process(self) -> subprocess.Popen[bytes]:
        """What takes new connections."""
        return self._started[-1]

    def __enter__(self) -> Balancer:
        try:
            self.start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *exc: object) -> None:
        self.stop()

    def start(self) -> None:
        """Start it, again where it ran before; return when it listens."""
        self._launch(self.command())

    def _launch(self, command: list[str]) -> None:
        with open(self.directory / "log", "ab") as log:
            process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        self._started.append(process)
        self.wait_until(lambda: any(listens(pid, self.port) for pid in family(process.pid)))

    def wait_until(self, condition: Callable[[], bool]) -> None:
        """Look again and again; say what it logged where that is in vain, or where it is gone."""
        limit = time.monotonic() + PATIENCE
        while not condition():
            if self.process.poll() is not None or time.monotonic() > limit:
                log = (self.directory / "log").read_text(errors="replace")
                raise AssertionError(f"{self.name} (exit code {self.process.poll()}): {log}")
            gevent.sleep(0.005)

    def signal(self, number: int) -> None:
        """To all its processes at once. Does not wait for what they do."""
        pids = [pid for process in self._started if process.poll() is None for pid in family(process.pid)]
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    def kill(self) -> None:
        """As a crash would: the system closes its connections."""
        self.signal(signal.SIGKILL)

    @contextlib.contextmanager
    def hung(self) -> Iterator[None]:
        """All its processes are stopped meanwhile: connections stay open, and nothing passes."""
        self.signal(signal.SIGSTOP)
        try:
            yield
        finally:
            self.signal(signal.SIGCONT)

    def stop(self) -> None:
        """End every process of it at once, and wait until they are gone."""
        for process in self._started:
            # The master of nginx collects its workers then; killed, it would leave them to the system.
            process.terminate()
        try:
            for process in self._started:
                process.wait(PATIENCE)
        finally:
            self.kill()


class HAProxy(Balancer):
    """In TCP mode. A reload is a second one, which takes the port and tells the first to end with its connections."""

    name = "haproxy"
    template = "haproxy.cfg"

    def words(self, servers: Sequence[int], *, grace: float | None, proxy_protocol: bool) -> dict[str, str]:
        suffix = " send-proxy" * proxy_protocol
        lines = [f"    server server{number} 127.0.0.1:{port}{suffix}" for number, port in enumerate(servers)]
        return {"servers": "\n".join(lines), "grace": "" if grace is None else f"hard-stop-after {milliseconds(grace)}"}

    def command(self) -> list[str]:
        return [program(self.name), "-db", "-f", str(self._configuration)]

    def reload(self) -> None:
        before = self.process.pid
        self._launch([*self.command(), "-sf", str(before)])
        self.wait_until(lambda: not listens(before, self.port))


class Nginx(Balancer):
    """With its module for streams. A reload is a new worker; the old one ends when its connections have."""

    name = "nginx"
    template = "nginx.conf"

    def words(self, servers: Sequence[int], *, grace: float | None, proxy_protocol: bool) -> dict[str, str]:
        module = stream_module()
        return {
            "servers": "\n".join(f"        server 127.0.0.1:{port};" for port in servers),
            "grace": "" if grace is None else f"worker_shutdown_timeout {milliseconds(grace)};",
            "module": "" if module is None else f"load_module {module};",
            "proxy_protocol": "on" if proxy_protocol else "off",
        }

    def command(self) -> list[str]:
        # Without -e it complains of the log that it was built to have.
        return [program(self.name), "-e", "stderr", "-p", str(self.directory), "-c", str(self._configuration)]

    def reload(self) -> None:
        before = set(family(self.process.pid))
        self.process.send_signal(signal.SIGHUP)
        self.wait_until(lambda: self._has_reloaded(before))

    def _has_reloaded(self, before: set[int]) -> bool:
        """A new worker is there, and the old one takes no more connections."""
        after = set(family(self.process.pid))
        old = (before & after) - {self.process.pid}
        return bool(after - before) and not any(listens(pid, self.port) for pid in old)


BALANCERS: dict[str, type[Balancer]] = {kind.name: kind for kind in (HAProxy, Nginx)}


class _Template(string.Template):
    # $ is a character of both languages.
    delimiter = "@"


def missing(name: str) -> str:
    """Why that balancer can't be used here, "" where it can."""
    if shutil.which(name, path=_PATH) is None:
        return f"needs {name} (apt-get install {'haproxy' if name == 'haproxy' else 'nginx-light libnginx-mod-stream'})"
    if name == "nginx" and stream_module() is None and "--with-stream " not in _nginx_build():
        return "needs nginx with its module for streams (apt-get install libnginx-mod-stream)"
    return ""


def program(name: str) -> str:
    """The path of the program."""
    path = shutil.which(name, path=_PATH)
    assert path is not None, f"{name} is not installed"
    return path


def stream_module() -> Path | None:
    """The file that gives nginx its streams; None where they are built in, or missing."""
    words = dict(word.partition("=")[::2] for word in _nginx_build().split())
    path = Path(words.get("--modules-path", "modules"), "ngx_stream_module.so")
    return path if path.exists() else None


def _nginx_build() -> str:
    return subprocess.run([program("nginx"), "-V"], capture_output=True, text=True, check=True).stderr + " "


def milliseconds(seconds: float) -> str:
    return f"{seconds * 1000:.0f}ms"


def family(pid: int) -> list[int]:
    """The process and its children; empty where it is gone."""
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text()
    except FileNotFoundError:
        return []
    return [pid, *map(int, children.split())]


def listens(pid: int, port: int) -> bool:
    """Whether that process has that port of 127.0.0.1 to take connections from."""
    wanted = set()
    for line in Path("/proc/net/tcp").read_text().splitlines()[1:]:
        words = line.split()
        if words[1] == f"0100007F:{port:04X}" and words[3] == _LISTENS:
            wanted.add(f"socket:[{words[9]}]")
    held = set()
    with contextlib.suppress(FileNotFoundError):
        for name in os.listdir(f"/proc/{pid}/fd"):
            with contextlib.suppress(FileNotFoundError):
                held.add(os.readlink(f"/proc/{pid}/fd/{name}"))
    return bool(wanted & held)
