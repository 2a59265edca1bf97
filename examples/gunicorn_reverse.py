"""How do I serve a gunicorn application from behind NAT? Its workers dial out, and serve it over the sessions they made.

A configuration file for gunicorn, to be used with any application. Somebody with a public address holds the other end
(a ``geyamux.Server`` for each connection) and opens a stream for each HTTP connection::

    RELAY=relay.example.org:7000 gunicorn -c gunicorn_reverse.py myapplication:app

Each worker keeps one session, and makes it anew when it ends. gunicorn's own listener works beside it. A worker that is
told to leave goes on serving until the HTTP requests of its own listener are answered, as gunicorn wants it; then it says
GoAway, so that the relay turns to the workers that took its place, and lets those requests finish that came over the
session. A stream that the relay opened at that very moment is reset. A relay that wants to lose no request waits for
``stream.wait_established()`` before it sends one, and turns to another worker when that raises.

Requests that come over the session do not count for ``max_requests``, and are not in gunicorn's access log.
"""

import os

import gevent

import geyamux
from geyamux.pywsgi import WSGIServer

bind = os.environ.get("BIND", "127.0.0.1:8000")
worker_class = "gevent"
workers = 2

host, _, port = os.environ.get("RELAY", "127.0.0.1:7000").rpartition(":")
RELAY = (host, int(port))
#: Between two attempts to reach the relay, in seconds: at first, and at most.
PAUSE, LONGEST_PAUSE = 0.5, 30.0
#: So long the relay's requests may take to finish when a worker leaves, in seconds. Below gunicorn's graceful_timeout.
LEAVING = 10.0


class Reverse:
    """Serves a worker's application over a session that it dials, again and again."""

    def __init__(self, worker):
        self.worker = worker
        self.server = None
        self.greenlet = gevent.spawn(self.run)

    def run(self):
        pause = PAUSE
        while True:
            try:
                with geyamux.connect(RELAY, timeout=LONGEST_PAUSE) as session:
                    self.worker.log.info("serving the streams of %s:%s", *RELAY)
                    self.server = WSGIServer(session, self.worker.wsgi, log=None, error_log=self.worker.log)
                    self.server.start()
                    pause = PAUSE
                    # Not serve_forever: that returns as soon as the server is stopped, and requests may go on.
                    session.join()
                    self.worker.log.info("%s:%s has ended the session: %s", *RELAY, session.exception)
            except OSError as error:
                self.worker.log.warning("%s:%s can't be reached: %s", *RELAY, error)
            gevent.sleep(pause)
            pause = min(2 * pause, LONGEST_PAUSE)

    def stop(self):
        """Say GoAway, let the requests finish that are there, and end the session."""
        if self.server is not None:
            self.server.stop(timeout=LEAVING)
        self.greenlet.kill()


def post_worker_init(worker):
    """gunicorn calls this in each worker after the fork, when its application is loaded."""
    worker.reverse = Reverse(worker)


def worker_exit(server, worker):
    """gunicorn calls this in each worker when it has left its loop, one that never got so far included."""
    if hasattr(worker, "reverse"):
        worker.reverse.stop()
