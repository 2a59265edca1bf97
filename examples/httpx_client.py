"""How do I use httpx over a session?

Give its transport a network backend that opens streams. httpx waits in locks and events of ``threading``, so greenlets
need ``monkey.patch_all()``: without it, the one that has to wait for a connection (there are 100) blocks all others.
This is for ``http://``; TLS belongs below the session (``geyamux.connect``). Needs httpx (``pip install httpx``). Run it
with ``python httpx_client.py``; it brings its own server.
"""

from gevent import monkey

monkey.patch_all()

import gevent  # noqa: E402
import httpcore  # noqa: E402
import httpx  # noqa: E402

import geyamux  # noqa: E402
from geyamux.pywsgi import WSGIServer  # noqa: E402


class StreamBackend(httpcore.NetworkBackend):
    def __init__(self, session):
        self.session = session

    def connect_tcp(self, host, port, timeout=None, local_address=None, socket_options=None):
        return NetworkStream(attempt(httpcore.ConnectTimeout, httpcore.ConnectError, self.session.open, timeout))


class NetworkStream(httpcore.NetworkStream):
    def __init__(self, stream):
        self.stream = stream
        self.close = stream.close

    def read(self, max_bytes, timeout=None):
        self.stream.settimeout(timeout)
        return attempt(httpcore.ReadTimeout, httpcore.ReadError, self.stream.recv, max_bytes)

    def write(self, buffer, timeout=None):
        self.stream.settimeout(timeout)
        attempt(httpcore.WriteTimeout, httpcore.WriteError, self.stream.sendall, buffer)

    def get_extra_info(self, info):
        # An idle stream on which something came, its end for one, is not used again.
        return self.stream.ready() if info == "is_readable" else None


def attempt(too_late, failed, function, *args):
    """Call it; raise what httpx knows."""
    try:
        return function(*args)
    except TimeoutError as error:
        raise too_late(str(error)) from error
    except OSError as error:
        raise failed(str(error)) from error


class YamuxTransport(httpx.HTTPTransport):
    def __init__(self, session):
        super().__init__()
        self._pool = httpcore.ConnectionPool(network_backend=StreamBackend(session), max_connections=100)


def application(environ, start_response):
    start_response("200 OK", [("Content-Type", "text/plain")])
    if environ["PATH_INFO"] == "/slow":
        gevent.sleep(0.2)
    elif environ["PATH_INFO"] == "/late":
        gevent.sleep(0.4)
    elif environ["PATH_INFO"] == "/large":
        return (b"x" * 65536 for _ in range(100))
    return [f"{environ['PATH_INFO']} for {environ['HTTP_HOST']}".encode()]


def main():
    with WSGIServer(("127.0.0.1", 0), application, log=None) as server:
        server.start()
        session = geyamux.connect(("127.0.0.1", server.server_port))
        with (
            session,
            httpx.Client(transport=YamuxTransport(session), base_url="http://backend", trust_env=False) as client,
        ):
            talk(client, session)


def talk(client, session):
    for path in ("/a", "/b", "/c"):
        print(client.get(path).text)
    with client.stream("GET", "/large") as response:
        print("downloaded:", sum(len(piece) for piece in response.iter_bytes()), "bytes")
    print("streams opened so far:", session.stats().opened)

    requested = [gevent.spawn(client.get, "/slow") for _ in range(150)]
    gevent.joinall(requested, raise_error=True)
    print("answered:", sum(greenlet.value.is_success for greenlet in requested), "of 150")

    try:
        client.get("/late", timeout=0.1)
    except httpx.ReadTimeout as error:
        print("too late:", error)


if __name__ == "__main__":
    main()
