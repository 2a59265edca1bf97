"""What asks its socket for a descriptor, over streams, which have none: what a test plays here it judges there.

Each fails at once, alone with a stream; and each works with a socket of `real_bridge`, or with what replaces its polling.
Programs that take no socket at all connect to a local port, whose connections are joined to streams.
"""

from __future__ import annotations

import select
import selectors
import ssl
import subprocess
import warnings
from typing import Any

import gevent
from gevent.server import StreamServer

from consumers import real_scene
from consumers.real_bridge import bridged
from consumers.real_relay import copy
from consumers.real_scene import Facts, error_of, results, stopwatch, wait_for_no_streams

BIG = bytes(range(256)) * 8000


def error_and_text(function: Any, *args: Any, **kwargs: Any) -> list[str]:
    """The class and the text of the exception that a call ends with."""
    try:
        function(*args, **kwargs)
    except Exception as error:
        return [type(error).__name__, str(error)]
    return []


# --- the standard library ---


def polling(session: Any, options: dict[str, Any]) -> Facts:
    """select, selectors and poll with a stream."""
    stream = session.open()
    return {
        "select": error_and_text(select.select, [stream], [], [], 0),
        "selectors": error_and_text(selectors.DefaultSelector().register, stream, selectors.EVENT_READ),
        "poll": error_and_text(select.poll().register, stream, select.POLLIN),
        "session": session.ping() > 0,
    }


def telnet_alone(session: Any, options: dict[str, Any]) -> Facts:
    """telnetlib with the stream itself: what reads without polling works, what polls says what is missing."""
    telnet = new_telnet()
    telnet.sock = session.open()
    waited = error_and_text(telnet.read_until, b"login: ", 5)
    telnet.write(b"world\n")
    return {"waited": waited, "all": telnet.read_all().decode()}


def telnet_bridged(session: Any, options: dict[str, Any]) -> Facts:
    """telnetlib as it is with one end of a socketpair."""
    telnet = new_telnet()
    with bridged(session.open()) as conn:
        telnet.sock = conn
        prompt = telnet.read_until(b"login: ", 5).decode()
        with stopwatch() as seconds:
            nothing = telnet.read_until(b"more", 0.1).decode()
            waited = seconds()
        telnet.write(b"world\n")
        return {"prompt": prompt, "nothing": nothing, "waited": waited, "all": telnet.read_all().decode()}


def new_telnet() -> Any:
    """A client that is not connected yet. The library is there up to Python 3.12, and says that it will go."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import telnetlib

        return telnetlib.Telnet()


def tls(session: Any, options: dict[str, Any]) -> Facts:
    """A context that is to wrap a stream, and the stream afterwards."""
    stream = session.open()
    error = error_and_text(ssl.create_default_context().wrap_socket, stream, server_hostname="localhost")
    stream.sendall(b"POST / HTTP/1.0\r\nContent-Length: 0\r\n\r\n")
    return {"error": error, "status": stream.readline().decode().split()[0]}


# --- dnspython ---


def dns_alone(session: Any, options: dict[str, Any]) -> Facts:
    """dnspython with a stream that waits by itself, whose own timeout counts, and with one that may not wait."""
    import dns.query

    stream = session.open()
    answers = [dns.query.tcp(query(name), "", sock=stream) for name in ("one.", "big.", "two.")]
    stream.settimeout(0.1)
    with stopwatch() as seconds:
        silent = error_of(dns.query.tcp, query("silent."), "", sock=stream, timeout=10)
        waited = seconds()
    stream.settimeout(0)
    return {
        "addresses": [len(answer.answer[0]) for answer in answers],
        "silent": silent,
        "waited": waited,
        "non-blocking": error_and_text(dns.query.tcp, query("silent."), "", sock=stream),
        "session": session.ping() > 0,
    }


def dns_bridged(session: Any, options: dict[str, Any]) -> Facts:
    """dnspython as its manual has it: a non-blocking socket, and the timeout of the call."""
    import dns.query

    with bridged(session.open()) as conn:
        conn.setblocking(False)
        answers = [dns.query.tcp(query(name), "", sock=conn) for name in ("one.", "big.", "two.")]
        with stopwatch() as seconds:
            silent = error_of(dns.query.tcp, query("silent."), "", sock=conn, timeout=0.1)
            waited = seconds()
    return {"addresses": [len(answer.answer[0]) for answer in answers], "silent": silent, "waited": waited}


def query(name: str) -> Any:
    """A question for the addresses of a name."""
    import dns.message

    return dns.message.make_query(name, "A")


# --- rpyc ---


def rpyc_alone(session: Any, options: dict[str, Any]) -> Facts:
    """rpyc with the stream itself: it polls a descriptor, which a stream has not."""
    import rpyc
    from rpyc.core.stream import SocketStream

    stream = session.open()
    connection = rpyc.connect_stream(SocketStream(stream))
    error = error_and_text(lambda: connection.root.turn(b"abc"))
    return {"error": error, "session": session.ping() > 0}


def rpyc_with_a_poll(session: Any, options: dict[str, Any]) -> Facts:
    """rpyc with another poll: the one method that needs a descriptor."""
    import rpyc
    from rpyc.core.stream import SocketStream
    from rpyc.lib import Timeout

    class StreamStream(SocketStream):  # type: ignore[misc]  # without types
        def poll(self, timeout: Any) -> bool:
            return bool(gevent.wait([self.sock], timeout=Timeout(timeout).timeleft(), count=1))

    return use_rpyc(rpyc.connect_stream(StreamStream(session.open())))


def rpyc_bridged(session: Any, options: dict[str, Any]) -> Facts:
    """rpyc as it is with one end of a socketpair, whose other end is joined to the stream."""
    import rpyc
    from rpyc.core.stream import SocketStream

    with bridged(session.open()) as conn:
        return use_rpyc(rpyc.connect_stream(SocketStream(conn)))


def use_rpyc(connection: Any) -> Facts:
    """Calls in both directions, a large one, one at a time and several."""
    turned = bytes(connection.root.turn(BIG))
    called = connection.root.call(lambda number: number * 2, 21)
    connection.poll_all(0.1)  # that the server is done with the function
    with stopwatch() as seconds:
        nothing = connection.poll(0.1)
        waited = seconds()
    connection.close()
    return {"turned": turned == BIG[::-1], "called": called, "nothing": nothing, "waited": waited}


# --- programs in C ---


def local_port(session: Any, options: dict[str, Any]) -> Facts:
    """Programs that connect by themselves, side by side, to a local port: each connection is joined to a stream."""
    joined = 0

    def join(conn: Any, _: Any) -> None:
        nonlocal joined
        joined += 1
        with session.open() as stream:

            def give_up() -> None:
                stream.reset()
                conn.close()

            there = gevent.spawn(copy, conn, stream, give_up)
            copy(stream, conn, give_up)
            there.join()

    port = StreamServer(("127.0.0.1", 0), join)
    port.start()
    try:
        commands = [[word.replace("PORT", str(port.server_port)) for word in command] for command in options["commands"]]
        printed = results([gevent.spawn(print_of, command) for command in commands])
        wait_for_no_streams(session)
    finally:
        port.stop()
    return {"printed": printed, "joined": joined}


def print_of(command: list[str]) -> str:
    """What a program prints; where it fails, its complaint."""
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    return done.stdout if done.returncode == 0 else done.stderr


if __name__ == "__main__":
    real_scene.main(globals())
