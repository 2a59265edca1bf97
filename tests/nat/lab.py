"""A network behind NAT, a public host and a visitor, in network namespaces of their own, with programs that run there.

    lan 192.168.7.2 ──home── nat ──wan── 203.0.113.2 public 198.51.100.1 ──street── 198.51.100.2 visitor

What is to be reached runs in `lan`, with the agent; the relay runs on `public`. `nat` masquerades, and lets nothing in
from the public side that its connection tracking does not know: also no packet in the middle of a connection whose state
it has lost, whoever sends it. Each program writes to files, which are read when one wants to know how it is. When the lab
closes, its programs are ended with their children, and its files and namespaces removed.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import string
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gevent

from faults import netns

HERE = Path(__file__).resolve().parent
CHECKOUT = HERE.parents[1]
PATIENCE = 10.0
#: The namespaces have nobody else's ports in them.
TRUNK, PUBLISHED, WEB, OTHER_WEB = 7000, 8080, 8000, 8001
LAN, NAT, RELAY, PUBLIC = "192.168.7.2", "203.0.113.1", "203.0.113.2", "198.51.100.1"
URL = f"http://{PUBLIC}:{PUBLISHED}"
#: Debian keeps servers and tools for networks where only root looks.
_PATH = os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/local/sbin", "/usr/sbin", "/sbin"])

_FIREWALL = """\
*nat
-A POSTROUTING -o wan -j MASQUERADE
COMMIT
*filter
:FORWARD DROP
-A FORWARD -m conntrack --ctstate ESTABLISHED,RELATED -j ACCEPT
-A FORWARD -i home -m conntrack --ctstate NEW -j ACCEPT
-A INPUT -i wan -m conntrack --ctstate ESTABLISHED,RELATED -j ACCEPT
-A INPUT -i wan -j DROP
COMMIT
"""


def missing(*tools: str) -> str:
    """Why no lab can be made here, "" where one can; `tools` are needed besides its own."""
    absent = [tool for tool in ("conntrack", "nginx", "curl", *tools) if shutil.which(tool, path=_PATH) is None]
    if absent:
        return f"not installed: {', '.join(absent)}"
    return netns.missing("iptables-restore")


class Program:
    """One that runs in a namespace. What it writes goes to files, so that it never waits for who reads."""

    def __init__(self, name: str, command: list[str], files: Path, stdin: Path | None = None) -> None:
        self.name = name
        self._out, self._err = files.with_suffix(".out"), files.with_suffix(".err")
        environment = {**os.environ, "PATH": _PATH, "PYTHONPATH": str(CHECKOUT)}
        with open(stdin or os.devnull, "rb") as source, open(self._out, "wb") as out, open(self._err, "wb") as err:
            # A session of its own: its children are ended with it.
            self.process = subprocess.Popen(
                command, stdin=source, stdout=out, stderr=err, env=environment, start_new_session=True
            )

    @property
    def out(self) -> bytes:
        """What it has written to standard output so far."""
        return self._out.read_bytes()

    @property
    def err(self) -> str:
        """What it has written to standard error so far."""
        return self._err.read_text(errors="replace")

    # Any: what an event tells depends on the event.
    def events(self, *names: str) -> list[dict[str, Any]]:
        """The log lines with one of these names, or all. It logs nothing but JSON: a traceback is an error here."""
        events = [json.loads(line) for line in self.err.splitlines(keepends=True) if line.endswith("\n")]
        return [event for event in events if not names or event["event"] in names]

    def wait_for_event(self, name: str, count: int = 1, patience: float = PATIENCE) -> dict[str, Any]:
        """Return the `count`th event of that name, when it is there."""
        self.wait_until(lambda: len(self.events(name)) >= count, f"event {name}, number {count}", patience)
        return self.events(name)[count - 1]

    def wait_for_output(self) -> None:
        """Return when it has written something to standard output."""
        self.wait_until(lambda: self._out.stat().st_size, "its first bytes")

    def wait_until(self, condition: Callable[[], object], what: str, patience: float = PATIENCE) -> None:
        """Look again and again; say what it wrote where that is in vain, or where it is gone."""
        limit = time.monotonic() + patience
        while not condition():
            if self.process.poll() is not None or time.monotonic() > limit:
                raise AssertionError(f"{self.name} (exit code {self.process.poll()}), waiting for {what}: {self.err}")
            gevent.sleep(0.01)

    def wait(self, patience: float = PATIENCE) -> int:
        """Its exit code, when it has ended, which must be within the patience."""
        try:
            return self.process.wait(patience)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"{self.name} has not ended: {self.err}") from None

    def terminate(self) -> None:
        """Ask it to end, and wait until it has."""
        self.process.terminate()
        self.wait()

    def kill(self) -> None:
        """At once and with its children, also when it has ended by itself; as a crash would."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def descriptors(self) -> list[str]:
        """What it has open besides what it was started with, by kind: a socket is a socket, whatever its number."""
        found = []
        for link in Path(f"/proc/{self.process.pid}/fd").iterdir():
            with contextlib.suppress(FileNotFoundError):
                if int(link.name) > 2:
                    found.append(os.readlink(link).partition(":[")[0])
        return sorted(found)

    def wait_for_descriptors(self, wanted: list[str]) -> None:
        """Return when it has these open and no others."""
        self.wait_until(lambda: self.descriptors() == wanted, f"{wanted} alone to be open")

    def memory(self) -> int:
        """Resident bytes."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(status.partition("VmRSS:")[2].split()[0]) * 1024


class NatLab(netns.Namespaces):
    """The namespaces, joined, and what runs in them; use it in a ``with``."""

    def __init__(self) -> None:
        super().__init__("lan", "nat", "public", "visitor")
        self._cleanup = contextlib.ExitStack()
        #: Files of the lab; gone with it.
        self.directory = Path(self._cleanup.enter_context(tempfile.TemporaryDirectory(prefix="geyamux-nat-")))
        #: What nginx serves.
        self.files = self.directory / "files"
        #: All that was started, in that order; and those of them that are ours.
        self.programs: list[Program] = []
        self.forwarders: list[Program] = []
        #: The nginx that was started last.
        self.web: Program

    def _build(self) -> None:
        self.files.mkdir()
        super()._build()
        self.join("home", {"lan": f"{LAN}/24", "nat": "192.168.7.1/24"})
        self.join("wan", {"nat": f"{NAT}/24", "public": f"{RELAY}/24"})
        self.join("street", {"public": f"{PUBLIC}/24", "visitor": "198.51.100.2/24"})
        self.ip("lan", "route", "add", "default", "via", "192.168.7.1")
        settings = "echo 1 > /proc/sys/net/ipv4/ip_forward; echo 0 > /proc/sys/net/netfilter/nf_conntrack_tcp_loose"
        # Connection tracking, and with it its settings, begins with the first rule that asks for it.
        subprocess.run(self.command("nat", "iptables-restore", "-w"), input=_FIREWALL, text=True, check=True)
        netns.run(*self.command("nat", "sh", "-e", "-c", settings))

    def close(self) -> None:
        """End all and remove all, whatever state it is in."""
        try:
            self._cleanup.close()
        finally:
            super().close()

    # -- programs

    def start(self, side: str, *words: str, stdin: Path | None = None) -> Program:
        """Start a program there. It has `stdin` as its standard input, or none."""
        files = self.directory / f"{len(self.programs)}-{Path(words[0]).name}"
        program = Program(" ".join(words), self.command(side, *words), files, stdin)
        self._cleanup.callback(program.kill)
        self.programs.append(program)
        return program

    def nginx(self) -> Program:
        """nginx in the LAN, on `WEB` and `OTHER_WEB`: it serves `files`, and takes uploads below /up/. It listens."""
        text = (HERE / "nginx.conf").read_text(encoding="utf-8")
        configuration = self.directory / "nginx.conf"
        words = {"directory": str(self.directory), "web": str(WEB), "other": str(OTHER_WEB)}
        configuration.write_text(_Template(text).substitute(words), encoding="utf-8")
        # Without -e it complains of the log that it was built to have.
        self.web = self.start("lan", "nginx", "-e", "stderr", "-p", str(self.directory), "-c", str(configuration))
        # It collects its workers then; killed, it would leave them to the system.
        self._cleanup.callback(self.web.terminate)
        self.web.wait_until(lambda: "start worker process " in self.web.err, "its workers")
        return self.web

    def curl(self, *words: str) -> Program:
        """curl, which the visitor runs; it ends by itself."""
        return self.start("visitor", "curl", "-q", "--silent", "--show-error", "--max-time", "60", *words)

    def forward(self, side: str, *words: str) -> Program:
        """`geyamux forward` there."""
        program = self.start(side, sys.executable, "-m", "geyamux", "forward", "--json", *words)
        self.forwarders.append(program)
        return program

    def relay(self, *words: str) -> Program:
        """The one on the public host, which listens for agents and for visitors. It listens."""
        program = self.forward("public", "--listen", f":{TRUNK}", "--from", f":{PUBLISHED}", *words)
        program.wait_for_event("listening", 2)
        return program

    def agent(self, *words: str, to: int = WEB) -> Program:
        """The one behind the NAT, which dials the relay. It may not have connected yet."""
        return self.forward("lan", "--dial", f"{RELAY}:{TRUNK}", "--to", f"127.0.0.1:{to}", *words)

    def tunnel(self, *words: str, to: int = WEB) -> tuple[Program, Program]:
        """An agent and a relay, connected; both with these options."""
        relay = self.relay(*words)
        agent = self.agent(*words, to=to)
        agent.wait_for_event("connected")
        relay.wait_for_event("connected")
        return agent, relay

    # -- files

    def file(self, name: str, size: int) -> Path:
        """A new file that nginx serves, of random bytes: what comes in another order is seen."""
        path = self.files / name
        path.write_bytes(os.urandom(size))
        return path

    # -- faults

    def flush_nat(self) -> None:
        """The NAT forgets all connections: it has been restarted, or its table was full, or they were idle too long."""
        netns.run(*self.command("nat", "conntrack", "-F"))

    @contextlib.contextmanager
    def down(self, device: str) -> Iterator[None]:
        """That wire of the NAT carries nothing meanwhile."""
        self.ip("nat", "link", "set", device, "down")
        try:
            yield
        finally:
            self.ip("nat", "link", "set", device, "up")


class _Template(string.Template):
    # $ is a character of nginx's language.
    delimiter = "@"
