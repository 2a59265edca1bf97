"""paramiko as it is, both its client and its server, on the two ends of one stream: what is played here a test judges."""

from __future__ import annotations

import hashlib
import io
import os
import tempfile
import threading
from typing import Any

import gevent
import paramiko

from consumers import real_scene
from consumers.real_scene import Facts, error_of, results, stopwatch, wait_for_no_streams

BIG = bytes(range(256)) * 8000
HOST_KEY = paramiko.ECDSAKey.generate()


class Host(paramiko.ServerInterface):  # type: ignore[misc]  # without types
    """A host of one user, whose commands are made up."""

    def __init__(self) -> None:
        self.asked = threading.Event()

    def check_auth_password(self, username: str, password: str) -> int:
        """Let in whoever knows the word."""
        return int(paramiko.AUTH_SUCCESSFUL if password == "sesame" else paramiko.AUTH_FAILED)

    def get_allowed_auths(self, username: str) -> str:
        """Passwords alone."""
        return "password"

    def check_channel_request(self, kind: str, chanid: int) -> int:
        """Sessions alone."""
        return int(paramiko.OPEN_SUCCEEDED if kind == "session" else paramiko.OPEN_FAILED_ADMINISTRATIVELY_PROHIBITED)

    def check_channel_exec_request(self, channel: Any, command: bytes) -> bool:
        """Run a command in a thread."""
        threading.Thread(target=self.run, args=(channel, command.decode()), daemon=True).start()
        return True

    def check_global_request(self, kind: str, msg: Any) -> bool:
        """Notice the keepalives."""
        if kind.startswith("keepalive@"):
            self.asked.set()
        return False

    @staticmethod
    def run(channel: Any, command: str) -> None:
        """``turn`` answers with its input backwards, ``hold`` with nothing, others fail."""
        if command == "turn":
            with channel.makefile("rb") as stdin:
                channel.sendall(stdin.read()[::-1])
            channel.send_exit_status(0)
        elif command == "hold":
            channel.recv(1)
        else:
            channel.sendall_stderr(b"no such command\n")
            channel.send_exit_status(127)
        channel.close()


class Files(paramiko.SFTPServerInterface):  # type: ignore[misc]  # without types
    """The files of one directory."""

    root = ""

    def list_folder(self, path: str) -> Any:
        """Their names and sizes."""
        return [paramiko.SFTPAttributes.from_stat(entry.stat(), entry.name) for entry in os.scandir(self.root + path)]

    def stat(self, path: str) -> Any:
        """The size of one."""
        return paramiko.SFTPAttributes.from_stat(os.stat(self.root + path))

    lstat = stat

    def open(self, path: str, flags: int, attr: Any) -> Any:
        """One to read or to write, made where it is not there."""
        handle = paramiko.SFTPHandle(flags)
        file = os.fdopen(os.open(self.root + path, flags, 0o600), "wb" if flags & os.O_WRONLY else "rb")
        handle.readfile = handle.writefile = file
        return handle


def connect(session: Any, options: dict[str, Any]) -> tuple[Any, Any, Host]:
    """A client of paramiko over a new stream, the transport at its other end, and the host there."""
    host = Host()

    def serve() -> Any:
        transport = paramiko.Transport(options["server"].accept(timeout=10))
        transport.add_server_key(HOST_KEY)
        transport.set_subsystem_handler("sftp", paramiko.SFTPServer, Files)
        transport.start_server(event=threading.Event(), server=host)
        return transport

    serving = gevent.spawn(serve)
    client = paramiko.SSHClient()
    client.set_missing_host_key_policy(paramiko.AutoAddPolicy())
    client.connect(
        "host", sock=session.open(), username="user", password="sesame", allow_agent=False, look_for_keys=False
    )
    return client, serving.get(timeout=10), host


def run(client: Any, command: str, given: bytes = b"") -> tuple[int, bytes, bytes]:
    """The status and the outputs of a command."""
    stdin, stdout, stderr = client.exec_command(command, timeout=10)
    stdin.write(given)
    stdin.channel.shutdown_write()
    return stdout.channel.recv_exit_status(), stdout.read(), stderr.read()


# --- scenes ---


def execute(session: Any, options: dict[str, Any]) -> Facts:
    """Commands one by one and side by side over one stream, then the end of both transports."""
    client, server, _ = connect(session, options)
    status, turned, _ = run(client, "turn", BIG)
    failed = run(client, "nonsense")
    jobs = [gevent.spawn(run, client, "turn", b"%d" % number) for number in range(10)]
    turned_numbers = [int(answer[::-1]) for _, answer, _ in results(jobs)]
    held = client.get_transport().open_session()
    held.exec_command("hold")
    held.settimeout(0.1)
    with stopwatch() as seconds:
        timed_out = error_of(held.recv, 1)
        waited = seconds()
    with stopwatch() as seconds:
        closing = [error_of(client.get_transport().close), error_of(client.close)]
        server.join(10)
        closing.append(error_of(server.close))
        wait_for_no_streams(session)
        took = seconds()
    return {
        "turned": (status, turned == BIG[::-1]),
        "failed": (failed[0], failed[2].decode()),
        "side by side": turned_numbers,
        "timed out": timed_out,
        "waited": waited,
        "closing": closing,
        "took": took,
        "ended": not server.is_active(),
    }


def files(session: Any, options: dict[str, Any]) -> Facts:
    """SFTP: a large file there and back, and what lies there."""
    client, _, _ = connect(session, options)
    with tempfile.TemporaryDirectory() as directory:
        Files.root = directory
        with client.open_sftp() as sftp:
            sent = sftp.putfo(io.BytesIO(BIG), "/big").st_size
            back = io.BytesIO()
            sftp.getfo("/big", back)
            listed = sftp.listdir("/")
    client.close()
    same = hashlib.sha256(back.getvalue()).digest() == hashlib.sha256(BIG).digest()
    return {"sent": sent == len(BIG), "same": same, "listed": listed}


def keepalive(session: Any, options: dict[str, Any]) -> Facts:
    """An idle transport asks whether its peer is there."""
    client, _, host = connect(session, options)
    client.get_transport().set_keepalive(1)
    asked = host.asked.wait(10)
    alive = run(client, "turn", b"abc")[1]
    client.close()
    return {"asked": asked, "alive": alive.decode()}


def reset(session: Any, options: dict[str, Any]) -> Facts:
    """The stream is reset in the middle of a command: an error in the client's own terms, and a close that is quiet."""
    client, server, _ = connect(session, options)
    held = client.get_transport().open_session()
    held.exec_command("hold")
    server.sock.reset()
    ended = held.recv(1)
    client.get_transport().join(10)
    return {
        "ended": ended.decode(),
        "status": held.recv_exit_status(),
        "active": client.get_transport().is_active(),
        "next": error_of(client.exec_command, "turn"),
        "closing": (error_of(client.close), error_of(server.close)),
        "session": session.ping() > 0,
    }


if __name__ == "__main__":
    real_scene.main(globals())
