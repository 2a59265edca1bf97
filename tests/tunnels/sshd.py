"""An sshd on a port of loopback, with keys and configuration of its own, and what a client needs for it.

Nothing in the home directory of the user is read or written, nor the machine's own configuration of ssh: all files are in
one temporary directory. Who logs in finds the command `geyamux` of this checkout on his PATH, and the pid of each run of
it is written down, so that a test can see them end.
"""

from __future__ import annotations

import contextlib
import os
import pwd
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.links import free_port
from tunnels.running import ENVIRONMENT, Child, alive

#: Where sshd must find an empty directory, by how it was built.
PRIVILEGE_SEPARATION = Path("/run/sshd")
#: What the client's configuration calls the host.
HOST = "box"

SERVER = """
ListenAddress 127.0.0.1
Port {port}
HostKey {directory}/host_key
AuthorizedKeysFile {directory}/user_key.pub
PidFile none
StrictModes no
PermitRootLogin yes
PasswordAuthentication no
KbdInteractiveAuthentication no
UsePAM no
PermitUserRC no
MaxStartups 100
Subsystem sftp internal-sftp
SetEnv HOME={directory} PATH={directory}/bin:/usr/bin:/bin PYTHONPATH={checkout}
"""

CLIENT = """
Host {host}
    HostName 127.0.0.1
    Port {port}
    User {user}
    IdentityFile {directory}/user_key
    IdentitiesOnly yes
    IdentityAgent none
    BatchMode yes
    UserKnownHostsFile {directory}/known_hosts
    GlobalKnownHostsFile /dev/null
    UpdateHostKeys no
    LogLevel ERROR
"""

GEYAMUX = """#!/bin/sh
echo $$ >> {directory}/pids
exec {python} -m geyamux "$@"
"""


class Sshd:
    """One that runs. `ssh` is the beginning of a command line, for a shell as well: nothing in it needs quotes."""

    def __init__(self, directory: Path, port: int) -> None:
        self.directory = directory
        self.port = port
        self.config = directory / "ssh_config"
        self.ssh = f"ssh -F {self.config} {HOST}"

    @classmethod
    @contextlib.contextmanager
    def start(cls, directory: Path) -> Iterator[Sshd]:
        """Run one, with its files in that directory, until the end of the block."""
        program = shutil.which("sshd", path=f"{os.environ.get('PATH', '')}:/usr/sbin")
        if program is None or shutil.which("ssh") is None:
            pytest.skip("no sshd or no ssh (Debian: openssh-server, openssh-client)")
        if os.geteuid() != 0:
            pytest.skip("sshd is run as root")
        PRIVILEGE_SEPARATION.mkdir(mode=0o755, exist_ok=True)
        port = free_port()
        _write_files(directory, port)
        # By its whole path, as it runs itself again for each connection.
        child = Child([program, "-D", "-e", "-f", str(directory / "sshd_config")])
        try:
            child.wait_line(lambda line: f"127.0.0.1 port {port}" in line, "its port")
            yield cls(directory, port)
        finally:
            child.kill()

    def running(self) -> list[int]:
        """The pids of the `geyamux` commands that run for somebody who logged in."""
        return [pid for pid in map(int, self._pids.read_text().split()) if alive(pid)]

    def runs(self) -> int:
        """How many such commands there have been."""
        return len(self._pids.read_text().split())

    @property
    def _pids(self) -> Path:
        return self.directory / "pids"


def _write_files(directory: Path, port: int) -> None:
    for name in ("host_key", "user_key"):
        command = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", name, "-f", str(directory / name)]
        subprocess.run(command, check=True, timeout=20)
    host_key = (directory / "host_key.pub").read_text()
    facts = {
        "directory": directory,
        "port": port,
        "host": HOST,
        "user": pwd.getpwuid(os.geteuid()).pw_name,
        "python": sys.executable,
        "checkout": ENVIRONMENT["PYTHONPATH"],
    }
    (directory / "known_hosts").write_text(f"[127.0.0.1]:{port} {host_key}")
    (directory / "sshd_config").write_text(SERVER.format(**facts))
    (directory / "ssh_config").write_text(CLIENT.format(**facts))
    (directory / "pids").touch()
    (directory / "bin").mkdir()
    command_file = directory / "bin/geyamux"
    command_file.write_text(GEYAMUX.format(**facts))
    command_file.chmod(0o755)
