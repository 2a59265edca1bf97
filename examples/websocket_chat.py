"""How do I serve WebSockets from behind NAT? With gevent-websocket, over a session that the server itself has dialled.

``python websocket_chat.py`` plays all parts in one process: a chat server that dials out to a relay, and three people
whose WebSockets are streams that the relay opens. It needs gevent-websocket and websocket-client.
"""

import gevent
import gevent.event
import gevent.server
import websocket
from geventwebsocket.handler import WebSocketHandler

import geyamux
from geyamux.pywsgi import WSGIServer


class OneOfManyStreams(WebSocketHandler):
    """gevent-websocket keeps its clients by their addresses, and all streams of a session come from one address."""

    def __init__(self, stream, address, server):
        super().__init__(stream, (*address[:2], stream.stream_id), server)


present = {}


def chat(environ, start_response):
    """What the server behind NAT serves: everybody hears what anybody says."""
    name, own = environ["PATH_INFO"].strip("/"), environ["wsgi.websocket"]
    present[name] = own
    try:
        while (words := own.receive()) is not None:
            for other in list(present.values()):
                other.send(f"{name}: {words}")
    finally:
        del present[name]
    return []


def serve_from_behind_nat(relay_address):
    with geyamux.connect(relay_address) as session:
        WSGIServer(session, chat, handler_class=OneOfManyStreams, log=None).serve_forever()


def join(session, name):
    # Code that wants a connected socket gets a stream.
    return websocket.create_connection(f"ws://chat/{name}", socket=session.open())


def shortened(text):
    return text if len(text) < 50 else f"{len(text):,} characters"


def main():
    dialled_in = gevent.event.AsyncResult()
    # The relay: whoever dials in is asked to serve.
    with gevent.server.StreamServer(("127.0.0.1", 0), lambda conn, _: dialled_in.set(geyamux.Server(conn))) as relay:
        relay.start()
        gevent.spawn(serve_from_behind_nat, ("127.0.0.1", relay.server_port))
        with dialled_in.get(timeout=10) as session:
            people = {name: join(session, name) for name in ("ann", "bob", "eve")}
            for speaker, words in [("ann", "hello"), ("bob", "hello, ann"), ("eve", "x" * 100_000)]:
                people[speaker].send(words)
                for name, connection in people.items():
                    print(name, "heard", shortened(connection.recv()))
            print(f"{session.num_streams} WebSockets in one connection")
            for connection in people.values():
                connection.close()


if __name__ == "__main__":
    main()
