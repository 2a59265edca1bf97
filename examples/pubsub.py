"""How do I build pub/sub, and what happens to a subscriber that is too slow?

Publish and subscribe: a broker with topics, where a subscription is a stream.

    python pubsub.py

The broker is a process of its own. To subscribe, open a stream and send `subscribe TOPIC`; messages come as lines.
To unsubscribe, close it. To publish, send `publish TOPIC MESSAGE` on a stream; the answer is how many got it.

A slow subscriber is dropped. What it has not read fills first the window of its stream, then its queue at the broker;
when that is full, its stream is reset with a code that says why. Publishers and other subscribers never wait for it.
(To make publishers wait instead, let the broker use `put` where it uses `put_nowait`.)
"""

import contextlib
import sys
from collections import defaultdict

import gevent
from gevent import subprocess
from gevent.queue import Full, Queue

import geyamux
from geyamux.server import StreamServer

LONGEST_LINE = 100_000
QUEUED_MESSAGES = 100
TOO_SLOW = 1  # codes of resets
BAD_REQUEST = 2


class Broker:
    def __init__(self):
        self.topics = defaultdict(dict)  # for each topic the queue of each subscriber, by its stream

    def handle(self, stream, address):
        """Serve one stream. The server closes it afterwards, and knows that clients may vanish at any time."""
        match stream.readline(LONGEST_LINE).split(maxsplit=2):
            case [b"publish", topic, message] if message.endswith(b"\n"):
                stream.sendall(b"%d\n" % self.publish(topic, message))
            case [b"subscribe", topic]:
                self.subscribe(topic, stream)
            case _:
                stream.reset(BAD_REQUEST)

    def publish(self, topic, message):
        subscribers = self.topics.get(topic, {})
        for stream, queue in list(subscribers.items()):
            try:
                queue.put_nowait(message)
            except Full:
                del subscribers[stream]
                stream.reset(TOO_SLOW)
        return len(subscribers)

    def subscribe(self, topic, stream):
        queue = self.topics[topic][stream] = Queue(QUEUED_MESSAGES)
        queue.put(b"subscribed\n")
        sender = gevent.spawn(self.send, queue, stream)
        try:
            stream.recv(1)  # whatever comes from a subscriber, its end above all, is the end of the subscription
        finally:
            sender.kill()
            self.topics[topic].pop(stream, None)
            if not self.topics[topic]:
                del self.topics[topic]

    def send(self, queue, stream):
        try:
            for message in queue:
                stream.sendall(message)
        except (geyamux.StreamError, geyamux.SessionError):
            pass  # `subscribe` hears of it too


def subscribe(session, topic):
    """A stream of messages, of which none is missed from now on. Close it to unsubscribe."""
    stream = session.open()
    stream.sendall(f"subscribe {topic}\n".encode())
    stream.readline()
    return stream


def publish(session, topic, message):
    with session.open() as stream:
        stream.sendall(f"publish {topic} {message}\n".encode())
        return int(stream.readline())


def broker():
    server = StreamServer(("127.0.0.1", 0), Broker().handle)
    server.start()
    print(server.server_port, flush=True)
    with contextlib.suppress(KeyboardInterrupt):
        server.serve_forever()


def demo(address):
    with geyamux.connect(address, timeout=10) as session, geyamux.connect(address, timeout=10) as other:
        alice, bob, carol = subscribe(session, "news"), subscribe(session, "news"), subscribe(session, "sport")
        print("news reaches", publish(other, "news", "rain tomorrow"), "subscribers")
        print("sport reaches", publish(other, "sport", "one all"), "subscriber")
        for name, stream in ("alice", alice), ("bob", bob), ("carol", carol):
            print(f"  {name} reads:", stream.readline().decode().strip())

        bob.close_write()  # close() does it too; after this the broker's own end tells when it is done
        print("bob unsubscribes; then he reads:", bob.read())
        print("news reaches", publish(other, "news", "rain again"), "subscriber")

        slow, fast = subscribe(session, "numbers"), subscribe(session, "numbers")
        reader = gevent.spawn(lambda: [int(fast.readline().split()[0]) for _ in range(500)])
        for number in range(500):
            publish(other, "numbers", f"{number} {'x' * 5000}")
        print("500 numbers published; the fast reader has them all:", reader.get() == list(range(500)))
        kept = []
        try:
            kept.extend(slow)
        except geyamux.StreamReset as reset:
            print(f"the one that read nothing was dropped: code {reset.code}, after {len(kept)} numbers")


if __name__ == "__main__":
    if sys.argv[1:] == ["broker"]:
        broker()
    else:
        with subprocess.Popen([sys.executable, __file__, "broker"], stdout=subprocess.PIPE) as process:
            try:
                demo(("127.0.0.1", int(process.stdout.readline())))
            finally:
                process.terminate()
