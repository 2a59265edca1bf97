"""How do I speak HTTP over a stream with the standard library?

Give http.client a stream instead of a connection: three lines. It is opened when a request needs it, kept alive for the
next, and opened anew when the server has closed it. Needs neither monkey-patching nor anything else that is not in the
standard library. Run it with ``python http_client.py``; it brings its own server.
"""

import http.client
import sys

import geyamux
from geyamux.pywsgi import WSGIServer


class Connection(http.client.HTTPConnection):
    def __init__(self, session, host):
        super().__init__(host)
        self.session = session

    def connect(self):
        self.sock = self.session.open()


def application(environ, start_response):
    body = f"{environ['REQUEST_METHOD']} {environ['PATH_INFO']} for {environ['HTTP_HOST']}\n".encode()
    start_response("200 OK", [("Content-Length", str(len(body)))])
    return [body]


def main():
    with WSGIServer(("127.0.0.1", 0), application, log=None) as server:
        server.start()
        with geyamux.connect(("127.0.0.1", server.server_port)) as session:
            connection = Connection(session, "backend")
            for method, path in (("GET", "/"), ("POST", "/orders"), ("DELETE", "/orders/1")):
                connection.request(method, path)
                response = connection.getresponse()
                print(response.status, response.read().decode(), end="")
            connection.close()
            print("streams opened:", session.stats().opened)


if __name__ == "__main__":
    sys.exit(main())
