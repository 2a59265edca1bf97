"""How does my app behind NAT learn who its visitors are?

Serve a Flask app from a machine that nobody can connect to, through a relay of your own that tells it who has come.

    python visitors_behind_nat.py                             all of it: a relay, an agent and a visitor
    python visitors_behind_nat.py relay 0.0.0.0 7000 8000     on a public host: agents dial port 7000, browsers port 8000
    python visitors_behind_nat.py agent relay.example 7000    where the app is; it dials again when it loses the relay

Needs Flask. `geyamux forward` passes bytes alone, so the app takes the agent for the visitor (flask_behind_nat.py). This
relay begins each stream with a line that says who it is: the PROXY protocol, as HAProxy speaks it. It knows nothing of
HTTP: keep-alive, uploads and streamed answers work as they would without it. Anyone may be the agent here; in real life
have the relay ask agents for a certificate, as mutual_tls.py does. Of several agents the one that came last serves, as
long as it is there.
"""

import contextlib
import http.client
import sys
import time

import flask
import gevent
from gevent import subprocess
from gevent.server import StreamServer

import geyamux
from geyamux.pywsgi import WSGIServer
from geyamux.tunnel import Reconnector

UNAVAILABLE = b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"

# --- the agent: your app ---

app = flask.Flask(__name__)


@app.get("/")
def hello():
    port, stream = flask.request.environ["REMOTE_PORT"], flask.request.environ["geyamux.stream"]
    return f"Hello {flask.request.remote_addr}, port {port}, on stream {stream.stream_id}"


@app.post("/length")
def length():
    return str(len(flask.request.get_data()))


@app.get("/ticks")
def ticks():
    def body():
        for number in range(5):
            yield f"tick {number}\n"
            gevent.sleep(0.1)

    return app.response_class(body(), mimetype="text/plain")


class Server(WSGIServer):
    def handle(self, stream, address):
        _, _, visitor, _, port, _ = stream.readline(108).decode().split()
        super().handle(stream, (visitor, port))


def agent(host, port):
    def report(error, *_):
        print("agent:", error, flush=True)

    Reconnector(
        lambda: geyamux.connect((host, port), timeout=10),
        lambda session: Server(session, app, log=None).serve_forever(),
        on_retry=report,
    ).run()


# --- the relay ---


class Relay:
    def __init__(self):
        self.agents = []  # their sessions, the one that came last at the end

    def on_agent(self, conn, address):
        with geyamux.Server(conn) as session:
            self.agents.append(session)
            print("an agent has come", flush=True)
            session.join()
            self.agents.remove(session)

    def open(self):
        for agent in reversed(self.agents):
            # Errors of geyamux say that it has just left or takes no more.
            with contextlib.suppress(OSError):
                return agent.open(timeout=10)
        return None

    def on_visitor(self, conn, address):
        stream = self.open()
        if stream is None:
            conn.sendall(UNAVAILABLE)
            return
        (visitor, port), (host, own_port) = address[:2], conn.getsockname()[:2]
        stream.sendall(f"PROXY TCP4 {visitor} {host} {port} {own_port}\r\n".encode())
        with contextlib.suppress(OSError):
            geyamux.splice(conn, stream)


def relay(host, agent_port, web_port):
    to = Relay()
    with StreamServer((host, agent_port), to.on_agent) as agents, StreamServer((host, web_port), to.on_visitor) as web:
        agents.start()
        web.start()
        print(agents.server_port, web.server_port, flush=True)
        web.serve_forever()


# --- a visitor, with nothing but the standard library ---


def visit(port):
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    connection.connect()
    print("a browser connects from port", connection.sock.getsockname()[1])
    for _ in range(2):
        connection.request("GET", "/")
        print(" ", connection.getresponse().read().decode())
    connection.request("POST", "/length", body=bytes(1_000_000))
    print("  it sends 1,000,000 bytes, the app got", connection.getresponse().read().decode())
    connection.request("GET", "/ticks")
    came = [(line.decode().strip(), time.monotonic()) for line in connection.getresponse()]
    print(f"  it is streamed {came[0][0]} to {came[-1][0]}, which comes {came[-1][1] - came[0][1]:.1f} seconds later")
    connection.close()


def demo():
    command = [sys.executable, __file__]
    processes = [subprocess.Popen([*command, "relay", "127.0.0.1", "0", "0"], stdout=subprocess.PIPE, text=True)]
    try:
        agent_port, web_port = processes[0].stdout.readline().split()
        early = http.client.HTTPConnection("127.0.0.1", int(web_port), timeout=10)
        early.request("GET", "/")
        print("before there is an agent:", early.getresponse().status)
        processes.append(subprocess.Popen([*command, "agent", "127.0.0.1", agent_port]))
        print(processes[0].stdout.readline().strip())
        visit(int(web_port))
    finally:
        for process in reversed(processes):
            process.terminate()
            process.wait()


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        match sys.argv[1:]:
            case ["relay", host, agent_port, web_port]:
                relay(host, int(agent_port), int(web_port))
            case ["agent", host, port]:
                agent(host, int(port))
            case []:
                demo()
            case _:
                sys.exit(__doc__)
