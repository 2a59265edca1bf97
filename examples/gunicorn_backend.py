"""How do I let gunicorn's workers talk to a backend over Yamux? One session for each worker, one stream for each request.

The backend, which may be any WSGI application, and gunicorn in front of it::

    python gunicorn_backend.py 7000 &
    BACKEND=127.0.0.1:7000 gunicorn -k gevent -w 2 gunicorn_backend:application
    curl -i -d hello http://127.0.0.1:8000/shout

A session belongs to the process that made it, so a worker makes it, never before the fork: here at its first request.
When it has ended, or the backend takes no more streams on it, the next request makes another. Both bodies are passed on
as they come. What goes wrong before the answer is 502 or 504; an answer that breaks off is a connection that breaks off,
so that nobody takes half of it for the whole. A request that may have reached the backend is not tried again.
"""

import contextlib
import errno
import http.client
import os
import string
import sys
from urllib.parse import quote

import gevent
from gevent.lock import BoundedSemaphore

import geyamux

#: So many seconds may connecting take, and so long may the backend be silent while it is its turn.
TIMEOUT = float(os.environ.get("BACKEND_TIMEOUT", "30"))
PIECE = 65536
#: Between two neighbours only. gunicorn has answered `Expect` by the time when the body is read.
HOP_BY_HOP = {"connection", "keep-alive", "proxy-connection", "te", "trailer", "transfer-encoding", "upgrade", "expect"}
#: gunicorn says these itself.
OWN = {"date", "server"}


class Backend:
    """The session of this process to the backend."""

    def __init__(self, address):
        self.address = address
        self._session = None
        self._dialling = BoundedSemaphore()

    def open(self):
        """A new stream; where the session takes no more of them, of a new session."""
        for is_last in (False, True):
            session = self._session or self._connect()
            try:
                return session.open(timeout=TIMEOUT)
            except (geyamux.SessionError, geyamux.RemoteGoAway, geyamux.StreamsExhausted):
                if self._session is session:
                    self._session = None
                # Its streams go on; it ends with the last of them.
                session.go_away()
                if is_last:
                    raise

    def _connect(self):
        # Many requests may find that there is no session; one of them makes it.
        if not self._dialling.acquire(timeout=TIMEOUT):
            raise TimeoutError("timed out")
        try:
            if self._session is None:
                self._session = geyamux.connect(self.address, timeout=TIMEOUT)
            return self._session
        finally:
            self._dialling.release()


class Exchange:
    """A request and its answer on one stream. As an iterable it is the answer's body, and `close` ends the stream."""

    def __init__(self, stream, environ):
        stream.settimeout(TIMEOUT)
        self.stream = stream
        self.environ = environ
        self.connection = http.client.HTTPConnection("backend")
        self.connection.sock = stream
        self.response = None
        self.sender = None
        self.is_whole = False

    def answer(self):
        """Send the request; return status and headers of the answer."""
        environ, connection = self.environ, self.connection
        # As the client wrote it: PATH_INFO no longer tells %2F from a slash.
        target = quote(environ["RAW_URI"], safe=string.punctuation, encoding="latin-1")
        connection.putrequest(environ["REQUEST_METHOD"], target, skip_host=True, skip_accept_encoding=True)
        for name, value in request_headers(environ):
            connection.putheader(name, value)
        connection.endheaders()
        # The body goes in a greenlet of its own: the backend may answer before it has read everything.
        self.sender = gevent.spawn(self._send_body)
        # An upload may take as long as it likes; only after it is it the backend's turn.
        gevent.wait([self.sender, self.stream], count=1)
        self.response = connection.getresponse()
        headers = [(name, value) for name, value in self.response.getheaders() if name.lower() not in HOP_BY_HOP | OWN]
        return f"{self.response.status} {self.response.reason}", headers

    def _send_body(self):
        try:
            for piece in body_pieces(self.environ):
                self.stream.sendall(piece)
        except (geyamux.YamuxError, TimeoutError):
            pass  # whoever reads the answer hears of it, or the answer was there before
        except Exception:
            # The client broke off: the backend must not take what came for all there is.
            self.stream.reset()

    def __iter__(self):
        try:
            while piece := self.response.read1(PIECE):
                yield piece
            if self.response.length:
                raise http.client.IncompleteRead(b"", self.response.length)
        except (OSError, http.client.HTTPException) as error:
            complain(self.environ, error)
            # This errno means to gunicorn: just close the connection.
            raise ConnectionResetError(errno.ECONNRESET, "the answer of the backend broke off") from error
        self.is_whole = True

    def close(self):
        if self.sender is not None:
            self.sender.kill()
        if not self.is_whole:
            self.stream.reset()
        if self.response is not None:
            self.response.close()
        self.stream.close()


def request_headers(environ):
    for key, value in environ.items():
        name = key.removeprefix("HTTP_").replace("_", "-").title()
        if key in ("CONTENT_TYPE", "CONTENT_LENGTH") or (key.startswith("HTTP_") and name.lower() not in HOP_BY_HOP):
            yield name, value
    if is_chunked(environ):
        yield "Transfer-Encoding", "chunked"
    # A stream carries one request: opening another one costs nothing.
    yield "Connection", "close"


def is_chunked(environ):
    return environ.get("HTTP_TRANSFER_ENCODING", "").lower() == "chunked"


def body_pieces(environ):
    source = environ["wsgi.input"]
    if is_chunked(environ):
        while piece := source.read(PIECE):
            yield b"%x\r\n%b\r\n" % (len(piece), piece)
        yield b"0\r\n\r\n"
        return
    missing = int(environ.get("CONTENT_LENGTH") or 0)
    while missing:
        piece = source.read(min(missing, PIECE))
        if not piece:
            raise EOFError("the client has left")
        missing -= len(piece)
        yield piece


def complain(environ, error):
    print(f"backend: {error!r}", file=environ["wsgi.errors"], flush=True)


def application(environ, start_response):
    """What gunicorn serves."""
    try:
        exchange = Exchange(backend.open(), environ)
        try:
            start_response(*exchange.answer())
        except BaseException:
            exchange.close()
            raise
        return exchange
    except TimeoutError as error:
        reason, status = error, "504 Gateway Timeout"
    except (OSError, http.client.HTTPException) as error:
        reason, status = error, "502 Bad Gateway"
    complain(environ, reason)
    start_response(status, [("Content-Type", "text/plain")])
    return [status.encode() + b"\n"]


def address_of(text):
    host, _, port = text.rpartition(":")
    return host, int(port)


backend = Backend(address_of(os.environ.get("BACKEND", "127.0.0.1:7000")))


def shout(environ, start_response):
    """What the backend serves."""
    start_response("200 OK", [("Content-Type", "text/plain")])
    yield from (line.upper() for line in environ["wsgi.input"])


if __name__ == "__main__":
    from geyamux.pywsgi import WSGIServer

    if len(sys.argv) != 2:
        sys.exit(__doc__)
    server = WSGIServer(("127.0.0.1", int(sys.argv[1])), shout)
    server.start()
    print("listening on port", server.server_port, flush=True)
    with contextlib.suppress(KeyboardInterrupt):
        server.serve_forever()
