"""Servers that are Python libraries, each as its library runs it: with threads, not monkey-patched, on a Unix socket.

    python real_python_servers.py DIRECTORY NAME ...

Serves the named ones in one process, each at DIRECTORY/NAME, and prints a line of JSON when all of them listen: the
targets by name, as `real_relay` takes them. What they leave behind (mails) is in DIRECTORY too. Ends when its standard
input does.
"""

from __future__ import annotations

import json
import os
import socket
import socketserver
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
NOBODY = 65534
ZONE_SIZE = 2000


class _Threading(socketserver.ThreadingMixIn, socketserver.UnixStreamServer):
    daemon_threads = True
    request_queue_size = 128


def _serve(path: str, handler: Any) -> None:
    server = _Threading(path, handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()


def smtp(path: str) -> None:
    """aiosmtpd, which keeps each mail as a file, and knows STARTTLS where a certificate is there."""
    from aiosmtpd.controller import UnixSocketController

    mails = Path(path).parent / "mails"
    mails.mkdir()

    class Keep:
        async def handle_DATA(self, server: Any, session: Any, envelope: Any) -> str:
            number = len(list(mails.iterdir()))
            (mails / str(number)).write_bytes(envelope.content)
            return f"250 kept as {number} for {','.join(envelope.rcpt_tos)}"

    UnixSocketController(Keep(), unix_socket=path).start()


def imap(path: str) -> None:
    """Dovecot's imap, one process for each connection, which takes who comes as logged in already."""
    directory = Path(path).parent
    settings = directory / "dovecot.conf"
    user = os.getuid() or NOBODY
    lines = [f"mail_location = maildir:{directory}/maildir", f"base_dir = {directory}/dovecot", "ssl = no"]
    lines += [f"mail_uid = {user}", f"mail_gid = {user}", "first_valid_uid = 1", "log_path = /dev/null"]
    lines += ["default_internal_user = nobody", "default_login_user = nobody"]
    settings.write_text("\n".join(lines) + "\n", encoding="utf-8")
    other: dict[str, Any] = {}
    if os.getuid() == 0:
        # Dovecot refuses to read mail as root.
        other = {"user": user, "group": user, "extra_groups": []}
        os.chown(directory, user, user)

    class Handler(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            environment = {"HOME": str(directory), "USER": "nobody", "PATH": os.defpath}
            command = ["/usr/lib/dovecot/imap", "-c", str(settings)]
            subprocess.run(command, stdin=self.request, stdout=self.request, env=environment, check=False, **other)

    _serve(path, Handler)


def xmlrpc(path: str) -> None:
    """The standard library's handler of XML-RPC, which keeps connections."""
    from xmlrpc.server import SimpleXMLRPCDispatcher, SimpleXMLRPCRequestHandler

    class Handler(SimpleXMLRPCRequestHandler):
        disable_nagle_algorithm = False  # a Unix socket knows none
        protocol_version = "HTTP/1.1"
        rpc_paths = ()

        def log_request(self, code: Any = "-", size: Any = "-") -> None:
            """Say nothing."""

    class Server(_Threading, SimpleXMLRPCDispatcher):
        logRequests = False

        def __init__(self, path: str) -> None:
            SimpleXMLRPCDispatcher.__init__(self, use_builtin_types=True)
            super().__init__(path, Handler)

    server = Server(path)
    server.register_multicall_functions()
    server.register_function(lambda a, b: a + b, "add")
    server.register_function(lambda data: data[::-1], "turn")
    threading.Thread(target=server.serve_forever, daemon=True).start()


def thrift(path: str) -> None:
    """A threaded server of thriftpy2."""
    import thriftpy2
    from thriftpy2.rpc import make_server

    service = thriftpy2.load(str(HERE / "real_echo.thrift"), module_name="real_echo_thrift").Echo

    class Handler:
        def turn(self, data: bytes) -> bytes:
            return data[::-1]

        def add(self, a: int, b: int) -> int:
            return a + b

    server = make_server(service, Handler(), unix_socket=path)
    threading.Thread(target=server.serve, daemon=True).start()


def rpyc(path: str) -> None:
    """A threaded server of rpyc."""
    import rpyc
    from rpyc.utils.server import ThreadedServer

    class Service(rpyc.Service):  # type: ignore[misc]  # without types
        def exposed_turn(self, data: bytes) -> bytes:
            return data[::-1]

        def exposed_call(self, function: Callable[[int], int], number: int) -> int:
            return function(number)

    server = ThreadedServer(Service, socket_path=path)
    threading.Thread(target=server.start, daemon=True).start()


def dns(path: str) -> None:
    """A name server for one zone: every name has an address, `big.` many of them, `silent.` no answer."""
    import dns.flags
    import dns.message
    import dns.rrset

    class Handler(socketserver.StreamRequestHandler):
        def handle(self) -> None:
            while head := self.rfile.read(2):
                query = dns.message.from_wire(self.rfile.read(int.from_bytes(head, "big")))
                answer = dns.message.make_response(query)
                name = query.question[0].name
                if str(name) == "silent.":
                    continue
                count = ZONE_SIZE if str(name) == "big." else 1
                addresses = [f"10.0.{number >> 8}.{number & 255}" for number in range(count)]
                answer.answer.append(dns.rrset.from_text(name, 60, "IN", "A", *addresses))
                self.wfile.write(answer.to_wire(prepend_length=True, max_size=65535))

    _serve(path, Handler)


def telnet(path: str) -> None:
    """A host that asks for a name, greets, and hangs up; it offers an option as telnet servers do."""

    class Handler(socketserver.StreamRequestHandler):
        def handle(self) -> None:
            self.wfile.write(b"\xff\xfb\x01login: ")  # IAC WILL ECHO
            # The refusal of the option comes before the name.
            name = self.rfile.readline().removeprefix(b"\xff\xfe\x01").strip()
            self.wfile.write(b"hello " + name + b"\r\n")
            self.connection.shutdown(socket.SHUT_WR)
            # Else a refusal that comes late would break the connection, and what was said be lost with it.
            self.rfile.read()

    _serve(path, Handler)


def main() -> None:
    """Serve until the standard input ends."""
    directory, names = sys.argv[1], sys.argv[2:]
    for name in names:
        globals()[name](f"{directory}/{name}")
    for name in names:
        while not Path(f"{directory}/{name}").exists():
            threading.Event().wait(0.01)
    print(json.dumps({name: f"unix:{directory}/{name}" for name in names}), flush=True)
    os.read(0, 1)
    # Not by way of the servers' own ends: some of them have none.
    os._exit(0)


if __name__ == "__main__":
    main()
