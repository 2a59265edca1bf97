"""How do I find out why a stream stands still?

Ask what it waits for: four streams stand still here, each for another reason, and their statistics tell which.

    python watch_streams.py

The first two streams are of a session whose other end is in this process, too, so both views of them are shown. The
third is over a connection whose other end takes nothing, the fourth to a peer that takes everything and says nothing.
"""

import gevent
import gevent.socket

import geyamux


def why(stream):
    """What a stream waits for, from the most telling number to the least."""
    stats = stream.stats()
    if stats.is_queued:
        return "the connection does not take what was written"
    if stats.writers and not stats.send_credit:
        return f"the peer does not read: no credit, writers waited {stats.blocked:.1f} s for it"
    if stats.unread and not stats.readers:
        return f"nobody reads here: {stats.unread} bytes wait"
    if stats.readers:
        return "the peer does not write"
    return "nobody wants anything of it"


def report(session):
    """All streams of a session, and whether its connection and its peer are alive."""
    try:
        answer = f"answered a ping in {session.ping(timeout=0.2) * 1000:.1f} ms"
    except TimeoutError:
        answer = "did not answer a ping"
    stats = session.stats()
    print(f"{session.name}: peer heard {stats.idle:.1f} s ago, {answer}; {stats.queued} bytes queued")
    for stream in session.streams:
        counts = stream.stats()
        print(f"  stream {stream.stream_id}: {counts.bytes_sent} sent, {counts.bytes_received} received: {why(stream)}")


def stall_by_the_other_side():
    client, server = geyamux.pair()
    writing, reading = client.open(), client.open()
    unread, _ = server.accept(), server.accept()
    tasks = [gevent.spawn(writing.sendall, bytes(1_000_000)), gevent.spawn(reading.recv, 1000)]
    gevent.sleep(0.3)
    for session in (client, server):
        report(session)
    print(unread)  # most of it is in the repr, too
    gevent.killall(tasks)
    client.abort()
    server.abort()


def stall_by_the_connection(*, takes_bytes):
    left, right = gevent.socket.socketpair()
    client = geyamux.Client(left, name="to nobody")
    swallowing = gevent.spawn(swallow, right) if takes_bytes else None
    stream = client.open()
    writing = gevent.spawn(stream.sendall, bytes(1_000_000))
    gevent.sleep(0.3)
    report(client)
    gevent.killall([writing, swallowing] if swallowing else [writing])
    client.abort()
    right.close()


def swallow(sock):
    while sock.recv(65536):
        pass


stall_by_the_other_side()
stall_by_the_connection(takes_bytes=False)
stall_by_the_connection(takes_bytes=True)
