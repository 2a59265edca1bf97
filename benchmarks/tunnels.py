"""Tunnels compared: the same connections through each, between one server and one driver on this machine.

    python -m benchmarks.tunnels [--rounds N] [--scale X] [--json FILE] [--readme]

Each takes its turn in each round, after one that is thrown away; ratios are to the first, a plain TCP proxy written
with gevent, which is one process where a tunnel is two. What encrypts (`ssh`, TLS) should be compared with its like. A
tunnel whose program is missing is said to be missing.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import os
import pwd
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gevent
from gevent import socket
from gevent.pool import Pool
from gevent.server import StreamServer

from .peers import ROOT, MissingPeer, build_go
from .report import put_into

MIB = 1 << 20
CHUNK = 256 * 1024
PATIENCE = 20.0
MARKS = ("<!-- tunnels: begin -->", "<!-- tunnels: end -->")
GO_TUNNEL = ROOT / "tests/tunnels/go/gotunnel"
_PAYLOAD = bytes(CHUNK)


# --- the server and the driver ---


def serve() -> None:
    """Until standard input ends answer connections: `D<n>` is a download of so many bytes, all else is echoed."""

    def handle(conn: Any, _: Any) -> None:
        conn.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        with contextlib.suppress(ConnectionError):
            while data := conn.recv(65536):
                if data[:1] != b"D":
                    conn.sendall(data)
                    continue
                left = int(data[1:])
                while left:
                    piece = min(left, CHUNK)
                    conn.sendall(_PAYLOAD[:piece])
                    left -= piece

    server = StreamServer(("127.0.0.1", 0), handle)
    server.start()
    print(server.server_port, flush=True)
    gevent.get_hub().threadpool.apply(sys.stdin.read)


def _connect(port: int) -> Any:
    conn = socket.create_connection(("127.0.0.1", port), PATIENCE)
    conn.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return conn


def _download(port: int, size: int) -> None:
    with contextlib.closing(_connect(port)) as conn:
        conn.sendall(b"D%d" % size)
        buffer = bytearray(CHUNK)
        while size:
            count = conn.recv_into(buffer)
            if not count:
                raise ConnectionError("the download ended early")
            size -= count


def _echo(conn: Any, message: bytes) -> None:
    conn.sendall(message)
    left = len(message)
    while left:
        data = conn.recv(left)
        if not data:
            raise ConnectionError("the echo ended early")
        left -= len(data)


def bulk(port: int, scale: float, connections: int) -> float:
    """MB/s of downloads at once."""
    size = int(512 * MIB * scale) // connections
    began = time.perf_counter()
    for download in gevent.joinall([gevent.spawn(_download, port, size) for _ in range(connections)], raise_error=True):
        download.get()
    return size * connections / (time.perf_counter() - began) / 1e6


def ping_pong(port: int, scale: float) -> float:
    """The median of a round trip of 64 bytes, in microseconds."""
    times = []
    with contextlib.closing(_connect(port)) as conn:
        for _ in range(max(20, int(4000 * scale))):
            began = time.perf_counter()
            _echo(conn, b"p" * 64)
            times.append(time.perf_counter() - began)
    return statistics.median(times) * 1e6


def short_connections(port: int, scale: float) -> float:
    """Connections a second: connect, 64 bytes there and back, close; 16 at once."""

    def one() -> None:
        with contextlib.closing(_connect(port)) as conn:
            _echo(conn, b"p" * 64)

    count, pool = max(32, int(4000 * scale)), Pool(16)
    began = time.perf_counter()
    for greenlet in [pool.spawn(one) for _ in range(count)]:
        greenlet.get()
    return count / (time.perf_counter() - began)


WORKLOADS: dict[str, tuple[str, Callable[[int, float], float]]] = {
    "download, MB/s": ("one connection", functools.partial(bulk, connections=1)),
    "50 downloads, MB/s": ("50 connections at once", functools.partial(bulk, connections=50)),
    "round trip, µs": ("64 bytes on one connection", ping_pong),
    "short connections, 1/s": ("16 at once: connect, 64 bytes there and back, close", short_connections),
}

# --- the tunnels ---


class Processes(contextlib.ExitStack):
    """What was started for one tunnel, and its files; ended with the block."""

    def __init__(self) -> None:
        super().__init__()
        self.directory = Path(self.enter_context(tempfile.TemporaryDirectory()))

    def start(self, *argv: str, **options: Any) -> subprocess.Popen[str]:
        process = subprocess.Popen(argv, cwd=ROOT, text=True, stdin=subprocess.PIPE, **options)
        self.callback(self._stop, process)
        return process

    def _stop(self, process: subprocess.Popen[str]) -> None:
        process.terminate()
        try:
            process.communicate(timeout=5)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()

    def forward(self, *arguments: str) -> Iterator[dict[str, Any]]:
        """Start `geyamux forward`, and return its events."""
        argv = [sys.executable, "-m", "geyamux", "forward", "--json", *arguments]
        process = self.start(*argv, stderr=subprocess.PIPE)
        assert process.stderr is not None
        return map(json.loads, process.stderr)


def _address(events: Iterator[dict[str, Any]], what: str) -> str:
    return next(str(event["address"]) for event in events if event["event"] == "listening" and event["what"] == what)


def _await_trunk(events: Iterator[dict[str, Any]]) -> None:
    next(event for event in events if event["event"] == "connected")


def _port(address: str) -> int:
    return int(address.rpartition(":")[2])


def direct(processes: Processes, port: int) -> int:
    return port


def proxy(processes: Processes, port: int) -> int:
    process = processes.start(sys.executable, "-m", "benchmarks.tunnels", "proxy", str(port), stdout=subprocess.PIPE)
    assert process.stdout is not None
    return int(process.stdout.readline())


def run_proxy(target: int) -> None:
    """A TCP proxy as one writes it with gevent: two loops for each connection."""

    def copy(source: Any, sink: Any) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                sink.sendall(data)
            sink.shutdown(socket.SHUT_WR)

    def handle(conn: Any, _: Any) -> None:
        conn.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        with contextlib.closing(_connect(target)) as other:
            other.settimeout(None)
            back = gevent.spawn(copy, other, conn)
            copy(conn, other)
            back.join()

    server = StreamServer(("127.0.0.1", 0), handle)
    server.start()
    print(server.server_port, flush=True)
    gevent.get_hub().threadpool.apply(sys.stdin.read)


def geyamux(processes: Processes, port: int, ours: tuple[str, ...] = (), theirs: tuple[str, ...] = ()) -> int:
    listening = processes.forward("--listen", "127.0.0.1:0", "--from", "127.0.0.1:0", *theirs)
    visitors = _address(listening, "from")
    trunk = _address(listening, "trunk")
    _await_trunk(processes.forward("--dial", trunk, "--to", f"127.0.0.1:{port}", *ours))
    return _port(visitors)


def geyamux_tls(processes: Processes, port: int) -> int:
    import trustme

    authority = trustme.CA()
    ca = processes.directory / "ca.pem"
    authority.cert_pem.write_to_path(ca)
    ends = []
    for name in ("listener", "agent"):
        path = processes.directory / f"{name}.pem"
        authority.issue_cert("127.0.0.1").private_key_and_cert_chain_pem.write_to_path(path)
        ends.append(("--cert", str(path), "--ca", str(ca)))
    return geyamux(processes, port, ours=ends[1], theirs=ends[0])


def hashicorp(processes: Processes, port: int) -> int:
    program = build_go(GO_TUNNEL, processes.directory / "go").argv[0]
    trunk, visitors = _free_port(), _free_port()
    silent = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    processes.start(program, "relay", f"127.0.0.1:{trunk}", f"127.0.0.1:{visitors}", **silent)
    _await_port(trunk)
    processes.start(program, "agent", f"127.0.0.1:{trunk}", f"127.0.0.1:{port}", **silent)
    return visitors


def ssh(processes: Processes, port: int) -> int:
    sshd = shutil.which("sshd", path=f"{os.environ.get('PATH', '')}:/usr/sbin")
    if sshd is None or shutil.which("ssh") is None:
        raise MissingPeer("sshd or ssh is not installed")
    if os.geteuid():
        raise MissingPeer("sshd needs root")
    directory, sshd_port, visitors = processes.directory, _free_port(), _free_port()
    Path("/run/sshd").mkdir(mode=0o755, exist_ok=True)
    for name in ("host", "user"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(directory / name)], check=True)
    settings = {
        "ListenAddress": "127.0.0.1", "Port": sshd_port, "HostKey": directory / "host", "PidFile": "none",
        "AuthorizedKeysFile": directory / "user.pub", "StrictModes": "no", "UsePAM": "no", "PermitRootLogin": "yes",
    }  # fmt: skip
    config = directory / "sshd_config"
    config.write_text("".join(f"{name} {value}\n" for name, value in settings.items()))
    processes.start(sshd, "-D", "-f", str(config), stderr=subprocess.DEVNULL)
    _await_port(sshd_port)
    options = {
        "IdentityFile": directory / "user", "IdentitiesOnly": "yes", "IdentityAgent": "none", "BatchMode": "yes",
        "StrictHostKeyChecking": "no", "UserKnownHostsFile": "/dev/null", "LogLevel": "ERROR",
    }  # fmt: skip
    given = [word for name, value in options.items() for word in ("-o", f"{name}={value}")]
    forward = f"127.0.0.1:{visitors}:127.0.0.1:{port}"
    user = pwd.getpwuid(os.geteuid()).pw_name
    processes.start("ssh", "-F", "/dev/null", "-N", "-p", str(sshd_port), *given, "-L", forward, f"{user}@127.0.0.1")
    return visitors


TUNNELS: dict[str, Callable[[Processes, int], int]] = {
    "a TCP proxy with gevent": proxy,
    "no tunnel": direct,
    "geyamux": geyamux,
    "hashicorp/yamux (Go)": hashicorp,
    "geyamux, mutual TLS": geyamux_tls,
    "ssh -L": ssh,
}


def _free_port() -> int:
    with contextlib.closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _await_port(port: int) -> None:
    """Until somebody listens there."""
    with gevent.Timeout(PATIENCE):
        while True:
            with contextlib.suppress(OSError), contextlib.closing(_connect(port)):
                return
            gevent.sleep(0.02)


def _await_echo(port: int) -> None:
    """Until the tunnel carries something."""
    with gevent.Timeout(PATIENCE):
        while True:
            with contextlib.suppress(OSError), contextlib.closing(_connect(port)) as conn:
                _echo(conn, b"hello")
                return
            gevent.sleep(0.02)


# --- the run ---


def measure(rounds: int, scale: float) -> tuple[dict[str, dict[str, list[float]]], dict[str, str]]:
    """Figures by workload and tunnel, and why a tunnel is missing."""
    figures: dict[str, dict[str, list[float]]] = {name: {} for name in WORKLOADS}
    missing: dict[str, str] = {}
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(Processes()).start(
            sys.executable, "-m", "benchmarks.tunnels", "serve", stdout=subprocess.PIPE
        )
        assert server.stdout is not None
        target, ports = int(server.stdout.readline()), {}
        for name, start in TUNNELS.items():
            try:
                ports[name] = start(stack.enter_context(Processes()), target)
                _await_echo(ports[name])
            except (MissingPeer, ImportError) as reason:
                missing[name] = str(reason)
        for number in range(rounds + 1):
            for workload, (_, work) in WORKLOADS.items():
                for name in [name for name in TUNNELS if name not in missing]:
                    figure = work(ports[name], scale)
                    if number:
                        figures[workload].setdefault(name, []).append(figure)
            print(f"round {number} of {rounds}", file=sys.stderr)
    return figures, missing


def table(figures: dict[str, dict[str, list[float]]], missing: dict[str, str]) -> str:
    """Medians, with the ratio to the first tunnel, in Markdown."""
    names = list(TUNNELS)
    lines = [f"| | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|"]
    for workload, by_tunnel in figures.items():
        base, cells = by_tunnel[names[0]], []
        for name in names:
            if name in missing:
                cells.append("missing")
                continue
            ratio = statistics.median(ours / its for ours, its in zip(by_tunnel[name], base, strict=True))
            median = statistics.median(by_tunnel[name])
            cells.append(f"{median:,.0f}" if name == names[0] else f"{median:,.0f} ({ratio:.2g})")
        lines.append(f"| **{workload}** {WORKLOADS[workload][0]} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> int:
    if sys.argv[1:2] == ["serve"]:
        serve()
        return 0
    if sys.argv[1:2] == ["proxy"]:
        run_proxy(int(sys.argv[2]))
        return 0
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tunnels", description="Compare tunnels.")
    parser.add_argument("--rounds", type=int, default=5, help="beside the one that is thrown away (%(default)s)")
    parser.add_argument("--scale", type=float, default=1.0, help="part of the work (%(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all samples there")
    parser.add_argument("--readme", action="store_true", help="put the table between the marks in README.md")
    options = parser.parse_args()
    figures, missing = measure(options.rounds, options.scale)
    text = table(figures, missing)
    print(text)
    for name, reason in missing.items():
        print(f"{name} is missing: {reason}")
    if options.json:
        options.json.write_text(json.dumps({"figures": figures, "missing": missing}, indent=1) + "\n")
    if options.readme:
        put_into(ROOT / "README.md", text, MARKS)
    return 0


if __name__ == "__main__":
    sys.exit(main())
