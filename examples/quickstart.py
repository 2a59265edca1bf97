"""What geyamux is for, with real files: a thousand streams, both ways, over one TCP connection.

    python quickstart.py

This process is the client. It starts a second one, the server, and connects to it over loopback. The files are the
sources of the installed geyamux package.

* The client opens 1,000 streams, all at once, and sends a file through each. The server checks its digest and sends the
  file back on the same stream; the client compares it.
* Meanwhile the server opens 100 streams of its own and pushes a file through each. The client checks the digest, and
  answers with the one that it computed; the server compares that.

Prints what was done and how long it took. Exits with 0 when every byte was right on both sides; otherwise with 1, and a
line on standard error that says what was not.
"""

import hashlib
import importlib.resources
import itertools
import json
import statistics
import sys
import time

import gevent
from gevent import socket, subprocess

import geyamux

STREAMS = 1000
PUSHES = 100
PINGS = 101
#: Seconds for all of it. Long, because only what hangs uses them up.
PATIENCE = 120


class Difference(Exception):
    """Something did not arrive as it was sent."""


def main():
    if sys.argv[1:] == ["--server"]:
        server()
        return
    try:
        with gevent.Timeout(PATIENCE, Difference(f"not done after {PATIENCE} seconds")):
            client()
    except (Difference, OSError) as error:
        sys.exit(f"quickstart failed: {error}")


# --- the client ---


def client():
    files = sources()
    with subprocess.Popen([sys.executable, __file__, "--server"], stdout=subprocess.PIPE) as process:
        try:
            port = int(process.stdout.readline())
            began = time.perf_counter()
            with geyamux.connect(("127.0.0.1", port), timeout=10) as session:
                sent, at_once, pushed = exchange(session, files)
                seconds = time.perf_counter() - began
                round_trip = median_round_trip(session)
            report = json.loads(process.stdout.readline() or "{}")
        except BaseException:
            process.kill()
            raise
    check_report(report, sent, pushed)

    print(f"geyamux {geyamux.__version__}: one TCP connection on port {port}, {len(files)} files")
    print(f"{STREAMS:,} streams of the client, {at_once:,} of them open at once: {size(sent)} sent, and echoed")
    print(f"{PUSHES:,} streams of the server: {size(pushed)} pushed")
    print("every digest is right on both sides")
    print(f"{seconds:.2f} seconds; round trip afterwards {round_trip * 1000:.2f} ms (median of {PINGS})")


def exchange(session, files):
    """Everything that goes through the session, both ways at the same time."""
    wrong = []
    pushes = gevent.spawn(take_pushes, session, wrong)
    streams = [session.open() for _ in range(STREAMS)]
    at_once = session.num_streams
    senders = [gevent.spawn(send_file, stream, *file, wrong) for stream, file in zip(streams, itertools.cycle(files))]
    progress = gevent.spawn(show_progress, [*senders, pushes]) if sys.stdout.isatty() else None
    try:
        gevent.joinall([*senders, pushes], raise_error=True)
    finally:
        if progress is not None:
            progress.kill()
            print(end="\r\x1b[K", flush=True)
    if wrong:
        raise Difference(f"{wrong[0]} (the first of {len(wrong)})")
    return sum(sender.value for sender in senders), min(at_once, STREAMS), pushes.value


def send_file(stream, name, data, wrong):
    """Send a file, half-close, and read the echo to its end."""
    with stream:
        stream.sendall(f"{name} {digest(data)}\n".encode())
        stream.sendall(data)
        stream.close_write()
        if stream.read() != data:
            wrong.append(f"the echo of {name} on stream {stream.stream_id} is not what was sent")
    return len(data)


def take_pushes(session, wrong):
    """Accept the streams of the server, and answer each with the digest of what came."""
    total = 0
    for _ in range(PUSHES):
        with session.accept() as stream:
            name, expected = stream.readline().decode().split()
            data = stream.read()
            stream.sendall(digest(data).encode())
        if digest(data) != expected:
            wrong.append(f"{name}, pushed on stream {stream.stream_id}, is not what the server sent")
        total += len(data)
    return total


def check_report(report, sent, pushed):
    if not report:
        raise Difference("the server ended without a report")
    if wrong := report["wrong"]:
        raise Difference(f"the server says: {wrong[0]} (the first of {len(wrong)})")
    if (report["received"], report["pushed"]) != (sent, pushed):
        raise Difference(f"the client sent {sent} bytes and was pushed {pushed}; the server says: {report}")


def median_round_trip(session):
    """As the caller sees it, the time for two switches of greenlets included."""
    times = []
    for _ in range(PINGS):
        began = time.perf_counter()
        session.ping()
        times.append(time.perf_counter() - began)
    return statistics.median(times)


def show_progress(greenlets):
    while True:
        done = sum(greenlet.ready() for greenlet in greenlets[:STREAMS])
        print(f"\r{done:5,} of {STREAMS:,} streams", end="", flush=True)
        gevent.sleep(0.05)


# --- the server ---


def server():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        print(listener.getsockname()[1], flush=True)
        listener.settimeout(30)
        conn, _ = listener.accept()

    report = {"received": 0, "pushed": 0, "wrong": []}
    with geyamux.Server(conn) as session:
        handlers = [gevent.spawn(push_files, session, report)]
        handlers += [gevent.spawn(echo_file, stream, report) for stream in session]
        gevent.joinall(handlers, raise_error=True)
    print(json.dumps(report), flush=True)


def echo_file(stream, report):
    with stream:
        name, expected = stream.readline().decode().split()
        data = stream.read()
        stream.sendall(data)
    report["received"] += len(data)
    if digest(data) != expected:
        report["wrong"].append(f"{name} on stream {stream.stream_id} is not what the client sent")


def push_files(session, report):
    for name, data in itertools.islice(itertools.cycle(sources()), PUSHES):
        with session.open() as stream:
            stream.sendall(f"{name} {digest(data)}\n".encode())
            stream.sendall(data)
            stream.close_write()
            if stream.read() != digest(data).encode():
                report["wrong"].append(f"{name} came to the client as something else")
        report["pushed"] += len(data)


# --- both ---


def sources():
    """Name and content of each source file of the installed package, wherever it is."""
    package = importlib.resources.files("geyamux")
    return [(file.name, file.read_bytes()) for file in package.iterdir() if file.name.endswith(".py")]


def digest(data):
    return hashlib.sha256(data).hexdigest()


def size(number):
    return f"{number / 1e6:.1f} MB"


if __name__ == "__main__":
    main()
