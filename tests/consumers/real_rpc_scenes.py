"""xmlrpc.client, thriftpy2 and py-amqp as they are, over streams: what a test plays here it judges there."""

from __future__ import annotations

import hashlib
import http.client
import xmlrpc.client
from pathlib import Path
from typing import Any

import gevent

from consumers import real_scene
from consumers.real_scene import Facts, error_of, stopwatch

BIG = bytes(range(256)) * 8000


# --- xmlrpc.client ---


class StreamHTTPConnection(http.client.HTTPConnection):
    """A connection of http.client that opens a stream when it is told to connect."""

    def __init__(self, session: Any) -> None:
        super().__init__("stream")
        self._session = session

    def connect(self) -> None:
        """Open a stream."""
        self.sock = self._session.open()


class StreamTransport(xmlrpc.client.Transport):
    """xmlrpc.client's transport with such connections."""

    def __init__(self, session: Any) -> None:
        super().__init__(use_builtin_types=True)
        self._session = session

    def make_connection(self, host: Any) -> http.client.HTTPConnection:
        """The connection that is kept, or a new one."""
        kept = self._connection[1]
        if kept is None:
            kept = StreamHTTPConnection(self._session)
            self._connection = host, kept
        return kept


def xml_rpc(session: Any, options: dict[str, Any]) -> Facts:
    """Calls over one kept connection, a large one, a fault, a batch."""
    server: Any
    with xmlrpc.client.ServerProxy("http://stream/", transport=StreamTransport(session)) as server:
        sums = [server.add(number, number) for number in range(20)]
        turned = server.turn(BIG)
        fault = error_of(server.nonsense)
        batch = xmlrpc.client.MultiCall(server)
        for number in range(3):
            batch.add(number, 1)
        answers = batch()
        return {
            "sums": sums,
            "turned": turned == BIG[::-1],
            "fault": fault,
            "batch": [answers[number] for number in range(3)],
            "streams": session.num_streams,
        }


# --- thriftpy2 ---


def thrift(session: Any, options: dict[str, Any]) -> Facts:
    """Calls over one stream, and many clients at a time."""
    import thriftpy2
    from thriftpy2.protocol import TBinaryProtocol
    from thriftpy2.thrift import TClient
    from thriftpy2.transport import TBufferedTransport, TSocket

    path = Path(__file__).with_name("real_echo.thrift")
    service = thriftpy2.load(str(path), module_name="real_echo_thrift").Echo

    def client() -> Any:
        connection = TSocket()
        connection.set_handle(session.open())
        connection.set_timeout(10000)
        return TClient(service, TBinaryProtocol(TBufferedTransport(connection)))

    one = client()
    sums = [one.add(number, number) for number in range(20)]
    turned = one.turn(BIG)
    one.close()

    def call(number: int) -> Any:
        own = client()
        try:
            return own.add(number, 1)
        finally:
            own.close()

    jobs = [gevent.spawn(call, number) for number in range(50)]
    gevent.joinall(jobs, raise_error=True)
    return {"sums": sums, "turned": turned == BIG[::-1], "many": [job.value for job in jobs]}


# --- py-amqp ---


def amqp(session: Any, options: dict[str, Any]) -> Facts:
    """A queue of a real broker: publish, consume, a large message, waiting with a timeout, heartbeats."""
    from amqp import Connection, Message
    from amqp.transport import TCPTransport

    class StreamTransport(TCPTransport):  # type: ignore[misc]  # without types
        def _connect(self, host: Any, port: Any, timeout: Any) -> None:
            self.sock = session.open()

    class StreamConnection(Connection):  # type: ignore[misc]  # without types
        def Transport(self, *args: Any, **kwargs: Any) -> Any:
            return StreamTransport(self.host, self.connect_timeout, **kwargs)

    heard: list[bytes] = []
    with StreamConnection("stream", heartbeat=60) as connection:
        channel = connection.channel()
        queue = channel.queue_declare("", exclusive=True).queue
        channel.basic_consume(queue, callback=lambda message: heard.append(bytes(message.body)), no_ack=True)
        with stopwatch() as seconds:
            nothing = error_of(connection.drain_events, timeout=0.1)
            waited = seconds()
        for number in range(20):
            channel.basic_publish(Message(str(number).encode()), routing_key=queue)
        channel.basic_publish(Message(BIG), routing_key=queue)
        while len(heard) < 21:
            connection.drain_events(timeout=10)
        connection.heartbeat_tick()
    return {
        "nothing": nothing,
        "waited": waited,
        "heard": [int(body) for body in heard[:20]],
        "big": hashlib.sha256(heard[20]).digest() == hashlib.sha256(BIG).digest(),
    }


if __name__ == "__main__":
    real_scene.main(globals())
