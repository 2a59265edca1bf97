"""How do two programs call each other, and how does a caller stop work that it no longer wants?

JSON-RPC 2.0 in both directions over one connection, with a stream for each call.

    python json_rpc.py

The script starts a second process, its worker, and calls it; the worker calls back over the same connection. A call is
a stream: a line with the request, a line with the answer. So calls do not wait for each other, and nothing has to match
answers to requests. A caller that gives up, by a timeout, a kill or any other exception, leaves `with stream:` by that
exception, and this resets the stream. The other side sees it at once, and kills the greenlet that works on the call.
"""

import contextlib
import json
import sys
import time

import gevent
from gevent import socket, subprocess
from gevent.event import AsyncResult

import geyamux

LONGEST_LINE = 1 << 20
INVALID, UNKNOWN, FAILED = -32600, -32601, -32000  # codes of JSON-RPC; the last is ours


class Fault(Exception):
    """An error of JSON-RPC: what a call raises when the method at the other side failed, or when there is none."""

    def __init__(self, code, message):
        super().__init__(message)
        self.code = code


class Peer:
    """One end: calls the methods of the other end, and serves its own."""

    def __init__(self, session, **methods):
        self.session, self.methods = session, methods

    def call(self, method, *params, timeout=None):
        """Return the result. Raises Fault, TimeoutError, or what geyamux raises when the other side is gone."""
        with self.session.open(timeout) as stream:
            stream.settimeout(timeout)
            # The id need not differ from call to call: each has its stream to itself.
            request = {"jsonrpc": "2.0", "method": method, "params": params, "id": stream.stream_id}
            stream.sendall(json.dumps(request).encode() + b"\n")
            line = stream.readline()
            if not line.endswith(b"\n"):
                raise ConnectionAbortedError(f"the other side ended the call of {method} without an answer")
        answer = json.loads(line)
        if "error" in answer:
            raise Fault(answer["error"]["code"], answer["error"]["message"])
        return answer["result"]

    def serve(self):
        """Answer calls until the session ends in good order."""
        for stream in self.session:
            gevent.spawn(self.handle, stream)

    def handle(self, stream):
        try:
            with stream:
                work = gevent.spawn(self.answer, stream.readline(LONGEST_LINE))
                try:
                    # The caller has said all: if there is more to read, it is the news that it has given up.
                    gevent.wait([work, stream], count=1)
                    if work.ready():
                        stream.sendall(work.value)
                finally:
                    work.kill()
        except (geyamux.StreamError, geyamux.SessionError):
            pass  # nobody wants the answer any more

    def answer(self, line):
        """The line that answers a line."""
        answer = {"jsonrpc": "2.0", "id": None}
        try:
            request = json.loads(line)
            answer["id"] = request["id"]
            answer["result"] = self.run(request["method"], request.get("params", []))
        except Fault as fault:
            answer["error"] = {"code": fault.code, "message": str(fault)}
        except (ValueError, TypeError, KeyError, AttributeError):
            answer["error"] = {"code": INVALID, "message": "not a request"}
        return json.dumps(answer).encode() + b"\n"

    def run(self, name, params):
        if name not in self.methods:
            raise Fault(UNKNOWN, f"there is no method {name}")
        try:
            result = self.methods[name](**params) if isinstance(params, dict) else self.methods[name](*params)
            json.dumps(result)  # here, where it can still be said that it is impossible
        except Exception as error:
            raise Fault(FAILED, f"{type(error).__name__}: {error}") from error
        return result


def worker(port):
    def count(limit):
        """Count slowly, and tell the caller each number: a call in the other direction."""
        number = 0
        try:
            while number < limit:
                number += 1
                peer.call("progress", number)
                gevent.sleep(0.05)
        finally:
            peer.call("stopped", number)
        return number

    with geyamux.connect(("127.0.0.1", port), timeout=10) as session:
        peer = Peer(session, add=lambda a, b: a + b, divide=lambda a, b: a / b, sleep=gevent.sleep, count=count)
        peer.serve()


def demo(session):
    def progress(number):
        if number == 3:
            caller.kill()  # the greenlet below that called `count`, and waits for it

    stopped = AsyncResult()
    peer = Peer(session, progress=progress, stopped=stopped.set)
    gevent.spawn(peer.serve)

    print("2 + 3 =", peer.call("add", 2, 3))
    for method, *params in ("divide", 1, 0), ("fly",):
        try:
            peer.call(method, *params)
        except Fault as fault:
            print(f"{method}: error {fault.code}, {fault}")
    began = time.monotonic()
    calls = [gevent.spawn(peer.call, "sleep", 0.2) for _ in range(100)]
    try:
        gevent.joinall(calls, raise_error=True)
    finally:
        gevent.killall(calls)  # where one has failed, or Ctrl-C came, the others are not wanted any more
    print(f"100 calls of 0.2 seconds took {time.monotonic() - began:.1f} seconds together")
    try:
        peer.call("sleep", 60, timeout=0.1)
    except TimeoutError:
        print("sleep: no answer within 0.1 seconds")
    caller = gevent.spawn(peer.call, "count", 1_000_000)
    print("count to a million: the caller was killed, the work has stopped at", stopped.get(timeout=10))


def main():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        listener.settimeout(10)
        command = [sys.executable, __file__, "worker", str(listener.getsockname()[1])]
        with subprocess.Popen(command), geyamux.Server(listener.accept()[0]) as session:
            demo(session)


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        if sys.argv[1:2] == ["worker"]:
            worker(int(sys.argv[2]))
        else:
            main()
