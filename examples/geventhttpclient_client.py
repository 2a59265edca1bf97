"""How do I use geventhttpclient over a session?

Give its client a pool that opens streams. Works without monkey-patching. Needs geventhttpclient
(``pip install geventhttpclient``). Run it with ``python geventhttpclient_client.py``; it brings its own server.
"""

import gevent
from geventhttpclient import HTTPClient
from geventhttpclient.connectionpool import ConnectionPool

import geyamux
from geyamux.pywsgi import WSGIServer


class StreamPool(ConnectionPool):
    def __init__(self, session, host, **settings):
        super().__init__(host, 80, host, 80, **settings)
        self.session = session

    def _create_socket(self):
        stream = self.session.open(self.connection_timeout)
        stream.settimeout(self.network_timeout)
        return stream

    def _is_socket_alive(self, sock):
        # An idle stream on which something came, its end for one, is not used again.
        return not sock.ready()


def application(environ, start_response):
    body = environ["wsgi.input"].read()
    gevent.sleep(0.2 if environ["PATH_INFO"] == "/slow" else 0)
    answer = f"{environ['REQUEST_METHOD']} {environ['PATH_INFO']} for {environ['HTTP_HOST']}, {len(body)} bytes"
    start_response("200 OK", [("Content-Type", "text/plain")])
    return [answer.encode()]


def main():
    with WSGIServer(("127.0.0.1", 0), application, log=None) as server:
        server.start()
        with geyamux.connect(("127.0.0.1", server.server_port)) as session:
            client = HTTPClient("backend", concurrency=20)
            client._connection_pool = StreamPool(session, "backend", size=20)
            talk(client, session)
            client.close()


def talk(client, session):
    print(client.get("/orders").read().decode())
    print(client.post("/orders", body=b"x" * 1_000_000).read().decode())
    print("streams opened so far:", session.stats().opened)

    requested = [gevent.spawn(lambda: client.get("/slow").read()) for _ in range(40)]
    gevent.joinall(requested, raise_error=True)
    print("answered:", len(requested), "on", session.stats().opened, "streams")


if __name__ == "__main__":
    main()
