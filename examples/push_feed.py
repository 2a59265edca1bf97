"""How does a server push to its clients, and what if one of them is slow?

Push from a server to the clients that dialled in, each at its own pace.

    python push_feed.py

The script is the server, and starts four clients as processes. Each opens a stream to say who it is; the server opens
one in the other direction, and sends every new picture down that.

Nothing is queued for a client. `sendall` waits for the client's own room, in a greenlet of that client, and a client
that was behind gets the newest picture next. So the slow one misses pictures, and delays neither the others nor the
feed. A client that leaves is an error in its own greenlet, and in nobody else's.
"""

import functools
import os
import struct
import sys
import time

import gevent
from gevent import subprocess
from gevent.event import Event
from gevent.server import StreamServer

import geyamux

CLIENTS = ["desk", "laptop", "phone", "tablet"]
PICTURES = 60
PICTURE_SIZE = 65536
HEADER = struct.Struct("!II")  # number and size


class Feed:
    """The newest picture, and how far each client is."""

    def __init__(self):
        self.number, self.picture, self.is_over = 0, b"", False
        self.sent = {}  # by client: the number of the picture that it was sent last
        self._change = Event()

    def publish(self, picture, is_last=False):
        self.number, self.picture, self.is_over = self.number + 1, picture, is_last
        self._changed()

    def push(self, name, stream):
        """Send what is new until the feed is over."""
        self.move(name, 0)
        while True:
            self.wait(lambda: self.is_over or self.sent[name] < self.number)
            if self.sent[name] == self.number:
                return
            number, picture = self.number, self.picture
            stream.sendall(HEADER.pack(number, len(picture)) + picture)
            self.move(name, number)

    def move(self, name, number):
        self.sent[name] = number
        self._changed()

    def forget(self, name):
        self.sent.pop(name, None)
        self._changed()

    def wait(self, condition):
        while not condition():
            self._change.wait()

    def _changed(self):
        change, self._change = self._change, Event()
        change.set()


def serve(feed, conn, address):
    """One client, from its connection to its end."""
    name = "somebody"
    with geyamux.Server(conn) as session:
        try:
            with session.accept(timeout=10) as hello:
                name = hello.read(100).decode()
            with session.open() as stream:
                feed.push(name, stream)
                stream.close_write()
                stream.read()  # comes to its end when the client has everything, and closes
        except TimeoutError:
            print("a client did not say who it is")
        except (geyamux.StreamError, geyamux.SessionError):
            print(f"{name} has left")
            feed.forget(name)


def client(port, name):
    seen, began = [], time.monotonic()
    with geyamux.connect(("127.0.0.1", port), timeout=10) as session:
        with session.open() as hello:
            hello.sendall(name.encode())
        with session.accept(timeout=10) as stream:
            while header := stream.read(HEADER.size):
                number, size = HEADER.unpack(header)
                assert len(stream.read(size)) == size
                seen.append(number)
                if name == "phone":
                    gevent.sleep(0.2)  # slow: it still looks at this picture
                if name == "tablet" and len(seen) == 3:
                    stream.reset()  # it has seen enough
                    break
    print(f"{name} got {len(seen)} pictures in {time.monotonic() - began:.1f} s, the last of them number {seen[-1]}")


def demo():
    feed = Feed()
    with StreamServer(("127.0.0.1", 0), functools.partial(serve, feed)) as server:
        server.start()
        command = [sys.executable, __file__, "client", str(server.server_port)]
        clients = [subprocess.Popen([*command, name], stdout=subprocess.PIPE, text=True) for name in CLIENTS]
        feed.wait(lambda: len(feed.sent) == len(CLIENTS))
        began = time.monotonic()
        for number in range(1, PICTURES + 1):
            feed.publish(os.urandom(PICTURE_SIZE), is_last=number == PICTURES)
            # As fast as two of the clients take them. If the phone held them up, this would never end.
            feed.wait(lambda: feed.sent["desk"] == feed.sent["laptop"] == feed.number)
        feed.wait(lambda: "tablet" not in feed.sent)
        print(f"{PICTURES} pictures pushed in {time.monotonic() - began:.1f} s")
        for process in clients:
            print(process.communicate()[0], end="")


if __name__ == "__main__":
    if sys.argv[1:2] == ["client"]:
        client(int(sys.argv[2]), sys.argv[3])
    else:
        demo()
