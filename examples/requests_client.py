"""How do I use requests over a session, and what if its connection breaks?

Mount geyamux.requests.YamuxAdapter, with a function that returns the session and connects anew where the last one has
ended. Here: a request with parameters, an upload from a generator, a large download in pieces, fifty requests at once,
and one after the connection broke. Works without monkey-patching, as here, and with. Needs requests
(``pip install requests``). Run it with ``python requests_client.py``; it brings its own server.
"""

import hashlib
import json

import gevent
import requests
from gevent.lock import RLock

import geyamux
from geyamux.pywsgi import WSGIServer
from geyamux.requests import YamuxAdapter

PIECE = b"0123456789abcdef" * 4096


class Connected:
    """Call it for a live session."""

    def __init__(self, address):
        self.address = address
        self.session = None
        self.lock = RLock()

    def __call__(self):
        with self.lock:  # of many that need one at once, one connects
            if self.session is None or self.session.closed:
                self.session = geyamux.connect(self.address, timeout=10)
            return self.session


def application(environ, start_response):
    path, body = environ["PATH_INFO"], environ["wsgi.input"]
    if path == "/download":
        start_response("200 OK", [])
        return (PIECE for _ in range(100))
    if path == "/upload":
        answer = {"sha256": hashlib.sha256(body.read()).hexdigest()}
    elif path == "/slow":
        gevent.sleep(0.2)
        answer = {}
    else:
        answer = {"host": environ["HTTP_HOST"], "query": environ["QUERY_STRING"]}
    start_response("200 OK", [("Content-Type", "application/json")])
    return [json.dumps(answer).encode()]


def main():
    with WSGIServer(("127.0.0.1", 0), application, log=None) as server:
        server.start()
        source = Connected(("127.0.0.1", server.server_port))
        with requests.Session() as http:
            http.mount("http://backend/", YamuxAdapter(source, pool_maxsize=50, max_retries=2))
            talk(http, source)
        source().close()


def talk(http, source):
    about = http.get("http://backend/about", params={"page": 2}, timeout=(3, 10)).json()
    print("the server was told:", about)

    uploaded = http.post("http://backend/upload", data=(PIECE for _ in range(10))).json()
    print("upload arrived:", uploaded["sha256"] == hashlib.sha256(PIECE * 10).hexdigest())

    with http.get("http://backend/download", stream=True) as response:
        print("downloaded:", sum(len(piece) for piece in response.iter_content(65536)), "bytes")
    print("streams opened so far:", source().stats().opened)

    requested = [gevent.spawn(http.get, "http://backend/slow") for _ in range(50)]
    gevent.joinall(requested, raise_error=True)
    print("at once:", sum(greenlet.value.ok for greenlet in requested), "on", source().num_streams, "streams")

    source().abort()
    print("after the connection broke:", http.get("http://backend/about").status_code)


if __name__ == "__main__":
    main()
