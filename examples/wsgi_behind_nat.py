"""How do I serve my WSGI app from behind NAT?

Serve a WSGI application from a machine that nobody can connect to: it dials out, and serves what comes back.

    python wsgi_behind_nat.py

The script starts a second process, the agent, which connects to it and serves. The script opens a stream to the agent for
a plain HTTP connection. flask_behind_nat.py is the whole of it, with a relay for browsers.
"""

import http.client
import sys

from gevent import socket, subprocess

import geyamux
from geyamux.pywsgi import WSGIServer


def app(environ, start_response):
    start_response("200 OK", [("Content-Type", "text/plain")])
    return [f"{environ['PATH_INFO']} on stream {environ['geyamux.stream'].stream_id}".encode()]


def agent(port):
    with geyamux.connect(("127.0.0.1", port), timeout=10) as session:
        WSGIServer(session, app, log=None).serve_forever()


def main():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        listener.settimeout(10)
        command = [sys.executable, __file__, "agent", str(listener.getsockname()[1])]
        with subprocess.Popen(command), geyamux.Server(listener.accept()[0]) as session:
            for _ in range(2):
                connection = http.client.HTTPConnection("behind-nat")
                connection.sock = session.open(timeout=10)
                for path in "/one", "/two":
                    connection.request("GET", path)
                    print(connection.getresponse().read().decode())
                connection.close()


if __name__ == "__main__":
    agent(int(sys.argv[2])) if sys.argv[1:2] == ["agent"] else main()
