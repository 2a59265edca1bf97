"""The real servers, each on a Unix socket in a temporary directory of its own, so that no port can be taken twice.

They are started here and ended here; one that an installation may have started on its own is left alone. Files are
kept as small and as little synced as the server allows: none of them outlives the test.
"""

from __future__ import annotations

import contextlib
import getpass
import glob
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from typing import Any

import pytest

from support.links import free_port

from .real_runner import HERE, Process, connects, has_library, listens, need_library, need_program, relay

_SETUP_SECONDS = 60


@contextlib.contextmanager
def redis_server() -> Iterator[str]:
    """A redis-server without files; the path of its socket."""
    program = need_program("redis-server", "redis-server")
    with tempfile.TemporaryDirectory() as directory:
        path = f"{directory}/redis"
        # 500 looks a second at the clock, so that a wait of 20 ms does not take 100.
        command = [program, "--port", "0", "--unixsocket", path, "--save", "", "--dir", directory, "--hz", "500"]
        with Process(command) as process:
            process.wait_until(connects(path))
            yield path


@contextlib.contextmanager
def memcached_server() -> Iterator[str]:
    """A memcached; the path of its socket."""
    program = need_program("memcached", "memcached")
    with tempfile.TemporaryDirectory() as directory:
        path = f"{directory}/memcached"
        with Process([program, "-s", path, "-m", "16", "-u", getpass.getuser()]) as process:
            process.wait_until(connects(path))
            yield path


@contextlib.contextmanager
def mariadb_server() -> Iterator[str]:
    """A MariaDB with an empty database `test` and a root without password; the path of its socket."""
    program = need_program("mariadbd", "mariadb-server")
    install = need_program("mariadb-install-db", "mariadb-server")
    user = getpass.getuser()
    with tempfile.TemporaryDirectory() as directory:
        data, path = f"{directory}/data", f"{directory}/socket"
        where = ["--no-defaults", f"--datadir={data}", f"--user={user}", "--innodb-log-file-size=4M"]
        _set_up([install, *where, "--auth-root-authentication-method=normal", "--skip-name-resolve"])
        small = ["--innodb-buffer-pool-size=16M", "--innodb-flush-log-at-trx-commit=0", "--performance-schema=off"]
        with Process([program, *where, *small, f"--socket={path}", "--skip-networking"]) as process:
            process.wait_until(connects(path))
            yield path


@contextlib.contextmanager
def postgres_server() -> Iterator[str]:
    """A PostgreSQL whose user `postgres` needs no password; the path of its socket."""
    places = os.pathsep.join([*sorted(glob.glob("/usr/lib/postgresql/*/bin"), reverse=True), os.environ["PATH"]])
    initdb = need_program("initdb", "postgresql", places)
    program = need_program("postgres", "postgresql", places)
    # It refuses to run as root.
    user = "postgres" if os.geteuid() == 0 else None
    with tempfile.TemporaryDirectory() as directory:
        if user is not None:
            shutil.chown(directory, user)
        data = f"{directory}/data"
        _set_up([initdb, "-D", data, "-U", "postgres", "--auth=trust", "--no-sync", "--locale=C", "-E", "UTF8"], user)
        settings = ["listen_addresses=", f"unix_socket_directories={directory}", "fsync=off", "shared_buffers=16MB"]
        command = [program, "-D", data, *(word for setting in settings for word in ("-c", setting))]
        with Process(command, user=user) as process:
            path = f"{directory}/.s.PGSQL.5432"
            process.wait_until(connects(path))
            yield path


def _set_up(command: list[str], user: str | None = None) -> None:
    done = subprocess.run(
        command, user=user, stdin=subprocess.DEVNULL, capture_output=True, timeout=_SETUP_SECONDS, check=False
    )
    if done.returncode:
        pytest.fail(f"{command} failed:\n{(done.stdout + done.stderr).decode(errors='replace')}")


#: What each of `real_python_servers` needs besides the standard library.
LIBRARIES = {"smtp": "aiosmtpd", "thrift": "thriftpy2", "rpyc": "rpyc", "dns": "dnspython"}


class PythonServers:
    """Servers of `real_python_servers` in one process, and one relay in front of them."""

    def __init__(self, directory: str, trunks: dict[str, dict[str, Any]]) -> None:
        #: What they leave behind is here.
        self.directory = directory
        self._trunks = trunks

    def trunk(self, name: str) -> dict[str, Any]:
        """The options for `play` of the trunk to a server; the test is skipped where its library is missing."""
        if name in LIBRARIES:
            need_library(LIBRARIES[name])
        return self._trunks[name]


@contextlib.contextmanager
def python_servers(*names: str) -> Iterator[PythonServers]:
    """The named servers, as far as their libraries are there."""
    names = tuple(name for name in names if name not in LIBRARIES or has_library(LIBRARIES[name]))
    with tempfile.TemporaryDirectory() as directory:
        command = [sys.executable, str(HERE / "real_python_servers.py"), directory, *names]
        with Process(command, talks=True) as process:
            targets = process.read_json()
            with relay(*(f"tcp={targets[name]}" for name in names)) as running:
                trunks = zip(names, running.trunks, strict=True)
                yield PythonServers(directory, {name: {**running.options, "trunk": trunk} for name, trunk in trunks})


@contextlib.contextmanager
def rabbitmq_server() -> Iterator[int]:
    """A RabbitMQ broker of its own node, without plugins; its port."""
    program = need_program("rabbitmq-server", "rabbitmq-server", "/usr/lib/rabbitmq/bin")
    mapper = need_program("epmd", "erlang-base")
    port, distribution, mapping = free_port(), free_port(), free_port()
    with tempfile.TemporaryDirectory() as directory:
        settings = {
            "HOME": directory,
            "RABBITMQ_NODENAME": f"geyamux{port}@localhost",
            "RABBITMQ_NODE_IP_ADDRESS": "127.0.0.1",
            "RABBITMQ_NODE_PORT": str(port),
            "RABBITMQ_DIST_PORT": str(distribution),
            "RABBITMQ_MNESIA_BASE": f"{directory}/data",
            "RABBITMQ_LOG_BASE": f"{directory}/log",
            "RABBITMQ_ENABLED_PLUGINS_FILE": f"{directory}/plugins",
            "ERL_EPMD_PORT": str(mapping),
        }
        # A port mapper that the broker started by itself would outlive it.
        with Process([mapper, "-port", str(mapping), "-address", "127.0.0.1"]) as naming:
            naming.wait_until(listens(mapping))
            with Process([program], environment=settings) as process:
                process.wait_until(listens(port))
                yield port
