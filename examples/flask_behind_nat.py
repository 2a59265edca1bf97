"""How do I serve my Flask app from behind NAT?

The relay runs on a public host; the app dials out to it, serves what comes back, and dials again when the relay is lost.

    public$ geyamux forward --listen :7000 --from :8080
    behind$ python flask_behind_nat.py public.example 7000

An app that listens on a port, in whatever language, needs no code at all:

    behind$ geyamux forward --dial public.example:7000 --to 127.0.0.1:8000

Needs Flask; any other WSGI app is served just so. visitors_behind_nat.py tells the app who its visitors are.
"""

import contextlib
import sys

import flask

import geyamux
from geyamux.pywsgi import WSGIServer
from geyamux.tunnel import Reconnector

app = flask.Flask(__name__)


@app.get("/")
def hello():
    return "Hello from behind NAT\n"


def connect():
    return geyamux.connect((sys.argv[1], int(sys.argv[2])), timeout=10)


def serve(session):
    WSGIServer(session, app).serve_forever()


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    with contextlib.suppress(KeyboardInterrupt):
        Reconnector(connect, serve, on_retry=lambda error, *_: print("again:", error, flush=True)).run()
