"""A session and its surroundings: the hub, threads, forks, exit, logs, what carries it. Rules 20, 22, 27, 30 to 32.

Longer than other modules because all tests of one subject stand together, each short and by itself.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import socket
import ssl
import subprocess
import sys
import textwrap
import time
import weakref

import gevent
import gevent.event
import gevent.server
import pytest
from gevent import socket as gsocket
from gevent.exceptions import BlockingSwitchOutError
from gevent.fileobject import FileObjectPosix

import geyamux
from geyamux import Client, Config, Server, SessionClosed, SessionError
from support.facing import PATIENCE, facing, narrow_pair, outcome, session_over, start
from support.links import make_link, sessions, tls_contexts
from support.rawpeer import RawPeer, settle
from support.transports import memory_pair
from support.wire import ACK, FIN, GO_AWAY, PING, RST, SYN, WINDOW_UPDATE, data, go_away, ping, window_update

SOON = 0.03
#: Warnings are errors in scripts, too; gevent says that one of any short timer.
STRICTLY = ("-W", "error", "-W", "ignore:libuv only supports millisecond timer resolution:UserWarning")
both_directions = pytest.mark.parametrize("swap", [False, True], ids=["client", "server"])


def run_script(text, *args, pass_fds=(), timeout=20, **more):
    """Run it in an interpreter of its own while this hub goes on; return what it printed and how it ended."""
    command = [sys.executable, *STRICTLY, "-c", textwrap.dedent(text), *map(str, args)]
    pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **more}

    def run():
        with subprocess.Popen(command, pass_fds=pass_fds, **pipes) as child:
            try:
                out, err = child.communicate(timeout=timeout)
            except subprocess.TimeoutExpired:
                child.kill()
                out, err = child.communicate()
                err += b"killed after %d seconds" % timeout
            return out, err, child.returncode

    return in_thread(run)


def in_hub(function, *args):
    """Call it in the hub, where nothing may wait; return what it returned or raised."""
    done = gevent.event.AsyncResult()

    def call():
        try:
            done.set(function(*args))
        except BaseException as error:
            done.set(error)

    gevent.get_hub().loop.run_callback(call)
    return done.get(timeout=PATIENCE)


def in_thread(function, *args):
    """Call it in another thread; return what it returned, raise what it raised."""

    def call():
        try:
            return function(*args), None
        except Exception as error:
            return None, error

    result, error = gevent.get_hub().threadpool.apply(call)
    if error is not None:
        raise error
    return result


# --- in the hub ---


def test_a_call_that_would_have_to_wait_in_the_hub_raises_and_leaves_nothing_behind():
    """Rule 30: as gevent's own do. Afterwards everything works."""
    with facing(config=Config(accept_backlog=2)) as (session, peer):
        stream, full = session.open(), session.open()
        filling = start(full.sendall, b"x" * 262_144)
        peer.expect(WINDOW_UPDATE, SYN, 1)
        peer.expect(WINDOW_UPDATE, SYN, 3)
        peer.expect_data(3, b"x" * 262_144)
        assert outcome(filling) is None
        for call in (stream.recv_into, stream.readinto):
            assert isinstance(in_hub(call, bytearray(5)), BlockingSwitchOutError)
        for call, args in (
            (session.open, ()),
            (session.accept, ()),
            (session.ping, ()),
            (session.join, ()),
            (stream.recv, (1,)),
            (stream.read, ()),
            (stream.readline, ()),
            (stream.peek, ()),
            (stream.wait_established, ()),
            (full.sendall, (b"x",)),
            (full.send, (b"x" * 100_000,)),
        ):
            assert isinstance(in_hub(call, *args), BlockingSwitchOutError), call
        peer.send(window_update(1, 0, ACK) + window_update(3, 5, ACK) + data(1, b"hello") + window_update(2, 0, SYN))
        settle()
        assert session.open(timeout=0).stream_id == 5
        assert session.accept(timeout=0).stream_id == 2
        assert stream.recv(10) == b"hello"
        full.sendall(b"12345")
        assert (stream.stats().readers, full.stats().writers) == (0, 0)


def test_what_need_not_wait_works_in_the_hub():
    """Rule 30."""
    with facing() as (session, peer):
        peer.send(window_update(2, 0, SYN) + data(2, b"hello"))
        settle()
        accepted = in_hub(session.accept)
        assert in_hub(accepted.recv, 10) == b"hello"
        assert in_hub(accepted.sendall, b"small") is None
        assert in_hub(accepted.sendall, b"x" * 100_000) is None
        stream = in_hub(session.open)
        assert in_hub(stream.sendall, b"x") is None
        peer.expect(WINDOW_UPDATE, ACK, 2)
        peer.expect_data(2, b"small" + b"x" * 100_000)
        peer.expect(WINDOW_UPDATE, SYN, 1)
        peer.expect_data(1, b"x")


def test_much_that_need_not_wait_works_in_the_hub():
    """Rules 27 and 30: the pauses that a busy writer makes are for others, no reason to fail in the hub."""
    with facing(config=Config(outbox_limit=1 << 20), kind="tcp") as (session, peer):
        stream = session.open()
        peer.send(window_update(1, 1 << 20, ACK))
        settle()

        def write():
            for _ in range(200):
                stream.sendall(b"x" * 3000)

        assert in_hub(write) is None
        peer.expect(WINDOW_UPDATE, SYN, 1)
        peer.expect_data(1, b"x" * 600_000)


def test_ends_may_begin_in_the_hub():
    """Rules 17, 18, 20 and 21: none of them waits."""
    with facing() as (session, peer):
        first, second, third = session.open(), session.open(), session.open()
        settle()
        assert in_hub(first.close) is None
        assert in_hub(second.reset, 5) is None
        assert in_hub(third.shutdown, socket.SHUT_RDWR) is None
        assert in_hub(session.go_away) is None
        for own in (1, 3, 5):
            peer.expect(WINDOW_UPDATE, SYN, own)
        seen = [peer.next() for _ in range(4)]
        assert sorted((found.type, found.flags, found.stream_id) for found in seen) == [
            (WINDOW_UPDATE, FIN, 1),
            (WINDOW_UPDATE, FIN, 5),
            (WINDOW_UPDATE, RST, 3),
            (GO_AWAY, 0, 0),
        ]
        peer.send(window_update(1, 0, FIN) + window_update(5, 0, FIN))
        assert in_hub(session.close) is None
        assert session.closed
        peer.expect_eof()
        peer.close()
        assert session.join(5)


def test_abort_in_the_hub_ends_at_once():
    """Rule 20."""
    with facing() as (session, peer):
        assert in_hub(session.abort) is None
        assert session.ready()
        peer.expect_eof()


# --- gevent.wait ---


def test_gevent_wait_takes_a_session():
    """It is ready when it has ended."""
    with facing() as (session, peer):
        assert gevent.wait([session], timeout=0.001) == []
        waiting = start(gevent.wait, [session], None)
        peer.transport.shutdown(socket.SHUT_WR)
        assert outcome(waiting) == [session]
        assert gevent.wait([session]) == [session]


def test_gevent_wait_on_streams_is_select_without_descriptors():
    """Each of bytes, EOF, a reset and the end of the session makes a stream ready."""
    with facing() as (session, peer):
        streams = [session.open() for _ in range(4)]
        assert gevent.wait(streams, timeout=0.001) == []
        waiting = start(gevent.wait, streams, None, 1)
        peer.send(data(3, b"x"))
        assert outcome(waiting) == [streams[1]]
        peer.send(window_update(1, 0, FIN) + window_update(7, 0, RST))
        settle()
        assert set(gevent.wait(streams, timeout=1, count=3)) == {streams[0], streams[1], streams[3]}
        assert [stream.ready() for stream in streams] == [True, True, False, True]
        everything = start(gevent.wait, streams)
        assert not everything.ready()
        peer.transport.shutdown(socket.SHUT_WR)
        assert set(outcome(everything)) == set(streams)


def test_a_stream_is_ready_again_when_there_is_more():
    """After each read it is waited for anew; a mere WindowUpdate is not readiness."""
    with facing() as (session, peer):
        stream = session.open()
        for _ in range(3):
            waiting = start(gevent.wait, [stream], None, 1)
            peer.send(window_update(1, 10))
            settle()
            assert not waiting.ready()
            peer.send(data(1, b"x"))
            assert outcome(waiting) == [stream]
            assert stream.recv(10) == b"x"
            assert not stream.ready()


def test_streams_sessions_and_greenlets_may_be_waited_for_together():
    """gevent.iwait gives them in the order in which they became ready."""
    with facing() as (session, peer):
        stream, greenlet = session.open(), gevent.spawn_later(SOON, int)
        seen = []

        def wait():
            seen.extend(gevent.iwait([session, stream, greenlet], timeout=5))

        waiting = start(wait)
        peer.send(data(1, b"x"))
        settle()
        greenlet.join()
        settle()
        peer.transport.shutdown(socket.SHUT_WR)
        outcome(waiting)
        assert seen == [stream, greenlet, session]


def test_a_wait_that_is_given_up_leaves_no_callback_behind():
    """Neither in a stream nor in a session."""
    with facing() as (session, _):
        stream = session.open()
        gevent.wait([session, stream], timeout=0.001)
        waiting = start(gevent.wait, [session, stream])
        waiting.kill()
        assert not session._links and not stream._links


# --- killed greenlets ---


def every_greenlet():
    """All that live in this hub, whoever spawned them."""
    alive = [found for found in gc.get_objects() if isinstance(found, gevent.Greenlet) and not found.dead]
    return [greenlet for greenlet in alive if greenlet is not gevent.getcurrent()]


@pytest.mark.parametrize("moment", ["idle", "busy", "closing", "lingering"])
def test_killing_every_greenlet_ends_the_session_instead_of_hanging_it(moment):
    """Rules 20 and 22: as some test suites and servers do at their end."""
    near, far = narrow_pair()
    with facing(config=Config(close_timeout=1.0), ends=(near, far)) as (session, peer):
        stream = session.open()
        settle()
        if moment == "busy":
            start(stream.sendall, b"x" * 200_000)
            start(stream.recv, 1)
        elif moment == "closing":
            stream.close_write()
            start(session.close)
        elif moment == "lingering":
            peer.send(bytes.fromhex("01000000 00000000 00000000"))
            settle()
        gevent.killall(every_greenlet(), timeout=5)
        with gevent.Timeout(5):
            assert session.join()
        assert session.closed and session.conn.fileno() == -1
        for call in (session.accept, session.open, session.ping, stream.read):
            with pytest.raises(SessionError):
                call()
        session.close()
        stream.close()


def test_other_sessions_of_the_hub_are_untouched_by_the_death_of_one():
    """Rule 30: they share no more than a callback."""
    with sessions() as (client, server), sessions() as (other_client, other_server):
        stream, other = client.open(), other_client.open()
        reading, other_reading = start(stream.recv, 1), start(other.recv, 1)
        server.abort()
        assert isinstance(outcome(reading), (SessionError, geyamux.StreamReset))
        assert not other_reading.ready()
        other_server.accept(timeout=5).sendall(b"x")
        assert outcome(other_reading) == b"x"


def test_a_greenlet_that_dies_in_a_wait_does_not_take_the_others_with_it():
    """Rule 30: those that were to be woken in the same turn are woken."""
    with facing() as (session, peer):
        streams = [session.open() for _ in range(3)]
        reading = [start(stream.recv, 10) for stream in streams]
        reading[0].kill(block=False)
        peer.send(data(1, b"one") + data(3, b"two") + data(5, b"three"))
        assert [outcome(greenlet) for greenlet in reading[1:]] == [b"two", b"three"]
        assert streams[0].recv(10) == b"one"


# --- other threads ---


def test_methods_called_from_another_thread_raise_and_say_why():
    """Rule 30."""
    with facing() as (session, peer):
        stream = session.open()
        peer.send(data(1, b"hello\n"))
        settle()
        for call, args in (
            (session.open, ()),
            (session.accept, ()),
            (session.ping, ()),
            (session.join, (0,)),
            (session.go_away, ()),
            (session.listener().accept, ()),
            (session.rawlink, (print,)),
            (list, (session,)),
            (stream.recv, (1,)),
            (stream.recv, (1, socket.MSG_PEEK)),
            (stream.recv_into, (bytearray(1),)),
            (stream.read, (1,)),
            (stream.read1, (1,)),
            (stream.readline, ()),
            (stream.peek, ()),
            (stream.send, (b"x",)),
            (stream.sendall, (b"x",)),
            (stream.sendall, (b"x" * 100_000,)),
            (stream.write, (b"x",)),
            (stream.flush, ()),
            (stream.shutdown, (socket.SHUT_WR,)),
            (stream.close_write, ()),
            (stream.wait_established, ()),
            (stream.rawlink, (print,)),
        ):
            with pytest.raises(RuntimeError, match="thread"):
                in_thread(call, *args)
        assert stream.readline() == b"hello\n"
        peer.expect(WINDOW_UPDATE, SYN, 1)
        peer.expect_nothing()


def test_close_of_a_stream_is_handed_over_from_another_thread():
    """Rule 30: what was written goes, then FIN."""
    with facing() as (session, peer):
        stream = session.open()
        stream.sendall(b"x")
        in_thread(stream.close)
        in_thread(stream.close)
        peer.expect(WINDOW_UPDATE, SYN, 1)
        peer.expect_data(1, b"x")
        peer.expect(WINDOW_UPDATE, FIN, 1)
        peer.expect_nothing()


def test_reset_of_a_stream_is_handed_over_from_another_thread():
    """Rule 30."""
    with facing() as (session, peer):
        stream = session.open()
        reading = start(stream.recv, 1)
        in_thread(stream.reset, 7)
        assert isinstance(outcome(reading), geyamux.StreamReset)
        peer.expect(WINDOW_UPDATE, SYN, 1)
        peer.expect(WINDOW_UPDATE, RST, 1, 7)


@pytest.mark.parametrize("method", ["close", "abort"])
def test_the_end_of_a_session_is_handed_over_from_another_thread(method):
    """Rule 30: it starts there and returns."""
    with facing() as (session, peer):
        in_thread(getattr(session, method))
        if method == "close":
            peer.expect(GO_AWAY, 0, 0, 0)
        peer.expect_eof()
        peer.close()
        assert session.join(5)


def test_a_thread_that_sleeps_in_the_loop_hears_a_close_at_once():
    """Rule 30: the hub that owns the session is woken, though nothing else would wake it."""
    with facing() as (session, _):
        reading = start(session.accept)
        began = time.monotonic()
        in_thread(session.abort)
        assert isinstance(outcome(reading), SessionClosed)
        assert time.monotonic() - began < 2


def test_a_session_works_in_the_thread_that_made_it():
    """Rule 30: any thread with a hub."""

    def use():
        client, server = geyamux.pair()
        with client, server:
            stream = client.open()
            stream.sendall(b"from a thread")
            stream.close_write()
            result = server.accept(timeout=5).read()
            assert client.ping(5) > 0
            server.go_away()
        return result

    def use_and_tidy_up():
        try:
            return use()
        finally:
            gevent.get_hub().destroy(destroy_loop=True)

    assert in_thread(use_and_tidy_up) == b"from a thread"


# --- who holds whom ---


def test_a_forgotten_stream_lives_until_its_session_ends():
    """Rule 30: the session holds it; a program that loses track of streams has a leak, not a surprise."""
    with facing() as (session, _):
        forgotten = weakref.ref(session.open())
        gc.collect()
        assert forgotten() is not None and session.num_streams == 1
        session.abort()
        settle()
        gc.collect()
        assert forgotten() is None


def test_a_session_that_nobody_holds_lives_and_is_let_go_when_it_has_ended():
    """Rule 30: nothing else need hold one that only serves."""
    near, far = gsocket.socketpair()
    session = weakref.ref(Client(near))
    peer = RawPeer(far)
    gc.collect()
    peer.send(ping(SYN, 5))
    peer.expect(PING, ACK, 0, 5)
    peer.send(go_away(1))
    peer.expect_eof()
    peer.close()
    settle()
    gc.collect()
    assert session() is None


# --- exit ---

LAST_WORDS = """
    import sys
    import gevent
    from gevent import socket
    import geyamux

    conn = socket.socket(fileno=int(sys.argv[1]))
    client = geyamux.Client(conn)
    stream = client.open()
    stream.sendall(b"last words")
    sys.stdout.write("done")
"""


def test_at_exit_what_waits_is_sent():
    """Rule 27: one non-blocking flush of each live session, though the hub never ran again."""
    near, far = socket.socketpair()
    with near, far:
        out, err, code = run_script(LAST_WORDS, near.fileno(), pass_fds=[near.fileno()])
        near.close()
        assert (out, err, code) == (b"done", b"", 0)
        wire = b""
        while chunk := far.recv(1000):
            wire += chunk
    assert wire == (
        bytes.fromhex("0001 0001 00000001 00000000") + bytes.fromhex("0000 0000 00000001 0000000a") + b"last words"
    )


def test_at_exit_a_connection_that_takes_nothing_holds_up_nobody():
    """Rule 27: the flush is non-blocking."""
    near, far = socket.socketpair()
    with near, far:
        near.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            while True:
                near.send(b"x" * 65536)
        began = time.monotonic()
        out, err, code = run_script(LAST_WORDS, near.fileno(), pass_fds=[near.fileno()])
        assert (out, err, code) == (b"done", b"", 0)
        assert time.monotonic() - began < 10


def test_at_exit_a_session_over_files_is_flushed_too():
    """Rule 27: a child that answers over its stdout and ends has said what it said."""
    script = """
        import sys
        import geyamux
        from gevent.fileobject import FileObject

        server = geyamux.Server((FileObject(0, "rb", 0, closefd=False), FileObject(1, "wb", 0, closefd=False)))
        stream = server.open()
        stream.sendall(b"last words")
    """
    out, err, code = run_script(script, stdin=subprocess.PIPE)
    assert (err, code) == (b"", 0)
    assert out == (
        bytes.fromhex("0001 0001 00000002 00000000") + bytes.fromhex("0000 0000 00000002 0000000a") + b"last words"
    )


# --- forks ---

FORK = """
    import os
    import sys
    import warnings
    import gevent
    from gevent import socket
    import geyamux

    how = sys.argv[2]
    conn = socket.socket(fileno=int(sys.argv[1]))
    client = geyamux.Client(conn, geyamux.Config(keepalive_interval=0.05, keepalive_timeout=60.0))
    stream = client.open()
    gevent.sleep(0)

    def accept():
        try:
            client.accept()
        except geyamux.SessionError:
            pass

    idle = gevent.spawn(accept)  # in the child it is told that this is the child
    gevent.sleep(0)
    stream.sendall(b"queued before the fork")
    ready, go = os.pipe()
    pid = os.fork()
    if pid == 0:
        warnings.simplefilter("ignore")  # the descriptor is the parent's: nobody closes it here
        assert client.closed and client.ready()
        for call in (client.open, client.accept, client.ping, stream.read, stream.flush):
            try:
                call()
            except geyamux.SessionError as error:
                assert "process" in str(error), error
            else:
                raise AssertionError("it works in the child")
        try:
            stream.sendall(b"of the child")
        except geyamux.SessionError:
            pass
        else:
            raise AssertionError("it works in the child")
        stream.close()
        client.go_away()
        client.close()
        client.abort()
        os.write(go, b"x")
        if how == "hub":
            gevent.reinit()
            gevent.sleep(0.2)
        if how == "os._exit":
            os._exit(0)
        sys.exit(0)
    os.close(go)
    os.read(ready, 1)
    os.waitpid(pid, 0)
    assert not client.closed
    stream.sendall(b", after it")
    sys.stdout.write(stream.read(5).decode())
    client.abort()
    idle.kill()
"""


@pytest.mark.parametrize("how", ["os._exit", "exit", "hub"])
def test_a_forked_child_reads_nothing_sends_nothing_and_the_parent_goes_on(how):
    """Rule 30: whether the child leaves at once, through its exit handlers, or runs a hub of its own."""
    near, far = gsocket.socketpair()
    with near, far:
        peer = RawPeer(far)
        running = gevent.spawn(run_script, FORK, near.fileno(), how, pass_fds=[near.fileno()])
        peer.expect(WINDOW_UPDATE, SYN, 1)
        # It is on the wire while only the child runs; whoever reads it, it must be the parent.
        peer.send(data(1, b"hello"))
        heard = b""
        while len(heard) < len(b"queued before the fork, after it"):
            found = peer.next()
            assert found.type == PING or (found.type, found.flags, found.stream_id) == (0, 0, 1), str(found)
            heard += found.body
        assert running.get(timeout=20) == (b"hello", b"", 0)
        assert heard == b"queued before the fork, after it"
        near.close()
        assert all(found.type == PING or found.flags == RST for found in peer.rest())


def test_sessions_made_after_the_fork_work_in_the_child():
    """Rule 30: only what the parent had is dead there."""
    script = """
        import os
        import gevent
        import geyamux

        before = geyamux.pair()
        pid = os.fork()
        if pid == 0:
            gevent.reinit()
        client, server = geyamux.pair() if pid == 0 else before
        stream = client.open()
        stream.sendall(b"x")
        assert server.accept(timeout=5).recv(10) == b"x"
        assert client.ping(5) > 0
        client.abort()
        server.abort()
        if pid == 0:
            os._exit(7)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7
    """
    assert run_script(script) == (b"", b"", 0)


# --- what carries it ---


def test_every_kind_of_link_carries_everything(link_kind):
    """Rule 31: bulk and small, both ways, at once, and an orderly end."""
    with sessions(link_kind) as (client, server):

        def serve():
            for stream in server:
                gevent.spawn(echo, stream)

        def echo(stream):
            with stream:
                while chunk := stream.recv(65536):
                    stream.sendall(chunk)

        def ask(number):
            body = b"%d," % number * 20_000
            with client.open(timeout=10) as stream:
                writing = gevent.spawn(lambda: (stream.sendall(body), stream.close_write()))
                assert stream.read() == body
                writing.get(timeout=10)

        serving = gevent.spawn(serve)
        gevent.joinall([gevent.spawn(ask, number) for number in range(20)], timeout=20, raise_error=True)
        client.close()
        serving.get(timeout=5)
        assert client.exception is None and server.exception is None


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_sessions_nest_in_streams(depth):
    """Rule 31: the end of the inner one is the end of that stream and of nothing else."""
    with contextlib.ExitStack() as stack:
        near, far = stack.enter_context(make_link("socketpair"))
        made = []
        for _ in range(depth + 1):
            client, server = Client(near), Server(far)
            made += [client, server]
            stack.callback(server.abort)
            stack.callback(client.abort)
            near = client.open()
            far = server.accept(timeout=5)
        near.sendall(b"x" * 200_000)
        near.close_write()
        assert far.read() == b"x" * 200_000
        far.close()
        innermost = made[-2:]
        innermost[0].close()
        assert innermost[1].join(5)
        assert [session.closed for session in made] == [False] * (2 * depth) + [True, True]
        settle()
        assert made[-4].num_streams == 0, "the stream that carried it has ended"


CHILD = """
    import gevent
    import geyamux
    from gevent.fileobject import FileObject

    server = geyamux.Server((FileObject(0, "rb", 0), FileObject(1, "wb", 0)))

    def shout(stream):
        with stream:
            for line in stream:
                stream.write(line.upper())

    handlers = [gevent.spawn(shout, stream) for stream in server]
    gevent.joinall(handlers, raise_error=True)
"""


def test_a_child_process_serves_over_its_stdin_and_stdout():
    """Rule 31: what a plugin or an ssh command does."""
    command = [sys.executable, *STRICTLY, "-c", textwrap.dedent(CHILD)]
    child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    pipes = (
        FileObjectPosix(os.dup(child.stdout.fileno()), "rb", 0),
        FileObjectPosix(os.dup(child.stdin.fileno()), "wb", 0),
    )
    child.stdout.close()
    child.stdin.close()
    try:
        with Client(pipes) as session:
            streams = [session.open() for _ in range(10)]
            for number, stream in enumerate(streams):
                stream.write(b"hello %d\n" % number * 1000)
                stream.close_write()
            for number, stream in enumerate(streams):
                assert stream.read() == b"HELLO %d\n" % number * 1000
                stream.close()
        assert session.exception is None
        assert in_thread(child.wait) == 0
        assert child.stderr.read() == b""
    finally:
        child.kill()
        child.wait()
        child.stderr.close()


def test_a_child_process_that_dies_breaks_its_streams():
    """Rules 9 and 22: the end of a pipe is no EOF of a stream."""
    script = "import sys; sys.exit(len(sys.stdin.buffer.read(12)) != 12)"
    child = subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    reader, writer = (
        FileObjectPosix(os.dup(child.stdout.fileno()), "rb", 0),
        FileObjectPosix(os.dup(child.stdin.fileno()), "wb", 0),
    )
    child.stdout.close()
    child.stdin.close()
    session = Client((reader, writer))
    stream = session.open()
    with pytest.raises(SessionError):
        stream.recv(1)
    assert session.join(5)
    assert child.wait(timeout=10) == 0


def test_a_patched_standard_library_carries_sessions():
    """Rule 31: in programs that patch, its sockets are gevent's."""
    script = """
        from gevent import monkey

        unpatched = __import__("socket").socketpair()
        monkey.patch_all()
        import socket
        import threading
        import geyamux

        left, right = socket.socketpair()
        left.settimeout(0.01)  # has no effect on the session
        client, server = geyamux.Client(left), geyamux.Server(right)

        def serve():
            for stream in server:
                with stream:
                    stream.sendall(stream.readline())

        serving = threading.Thread(target=serve)
        serving.start()
        with client.open() as stream:
            threading.Event().wait(0.05)
            stream.sendall(b"hello\\n")
            assert stream.makefile("r").readline() == "hello\\n"
        client.close()
        serving.join()
        assert client.exception is None and server.exception is None
        for end in unpatched:
            try:
                geyamux.Client(end)
            except TypeError as error:
                assert "patch_all" in str(error)
            else:
                raise AssertionError("a socket that blocks the process was taken")
            end.close()
    """
    assert run_script(script) == (b"", b"", 0)


def test_a_timeout_that_the_socket_was_given_before_has_no_effect():
    """Rule 31: as `create_connection(timeout=5)` leaves one."""
    near, far = gsocket.socketpair()
    near.settimeout(0.01)
    with facing(ends=(near, far)) as (session, peer):
        reading = start(session.open().recv, 10)
        gevent.sleep(SOON)
        assert not session.closed
        peer.send(data(1, b"x"))
        assert outcome(reading) == b"x"


def test_an_unpatched_socket_is_refused_before_anything_is_read_from_it():
    """Rule 31: and it stays the caller's."""
    near, far = socket.socketpair()
    with near, far:
        far.sendall(b"untouched")
        with pytest.raises(TypeError, match="patch_all"):
            Client(near)
        assert near.recv(100) == b"untouched"


# --- the log ---


@pytest.fixture
def logged(caplog):
    caplog.set_level(logging.DEBUG, logger="geyamux")
    return caplog


def of_level(caplog, level):
    return [record for record in caplog.records if record.levelno == level]


def test_no_line_is_logged_in_the_hub_or_by_a_greenlet_of_the_session(monkeypatch):
    """R32: a handler may wait, for its lock or a network; that must hold up nothing."""
    by = []

    class Slow(logging.Handler):
        def emit(self, record):
            by.append(gevent.getcurrent())
            gevent.sleep(0.01)

    logger = logging.getLogger("geyamux")
    handler = Slow()
    monkeypatch.setattr(logger, "level", logging.INFO)
    logger.addHandler(handler)
    try:
        for wire in ("07000000 00000000 00000000", "00030000 00000000 00000002"):
            with facing() as (session, peer):
                own = {gevent.get_hub(), gevent.getcurrent(), session._reader._greenlet, session._outbox._greenlet}
                peer.send(bytes.fromhex(wire))
                settle()
                peer.transport.shutdown(socket.SHUT_WR)
                assert session.join(5)
                gevent.sleep(0.05)
                assert by and not own & set(by)
    finally:
        logger.removeHandler(handler)


def test_a_session_whose_hub_was_destroyed_can_be_let_go_of():
    """R30: by abort, from any thread. In a program of its own: greenlets of a dead hub stay."""
    program = """
        import os, threading, gevent, geyamux
        found = []
        def work():
            found.extend(geyamux.pair())
            gevent.get_hub().destroy(destroy_loop=True)
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
        while len(os.listdir("/proc/self/task")) > 1:
            pass  # joined, but not gone for the system: a fork warns of that
        for session in found:
            assert not session.ready()
            session.abort()
            assert session.ready() and session.closed
            assert session.conn._sock.fileno() == -1
        if os.fork() == 0:
            os._exit(0)
        assert os.wait()[1] == 0
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True, timeout=20)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_a_session_in_good_order_logs_its_begin_and_its_end_and_warns_of_nothing(logged):
    """Rule 32."""
    with sessions() as (client, server):
        stream = client.open()
        stream.sendall(b"x")
        stream.close()
        server.accept(timeout=5).close()
        client.close()
        assert server.join(5)
    settle()
    told = [record.getMessage() for record in of_level(logged, logging.INFO)]
    for session in (client, server):
        begin, end = [message for message in told if message.startswith(session.name)]
        assert "begins" in begin and "ends" in end
        assert len(end) > len(f"{session.name}: session ends: "), "the reason is there"
    assert {record.levelno for record in logged.records} <= {logging.DEBUG, logging.INFO}


def test_what_a_busy_peer_does_on_a_close_is_no_warning_either(logged):
    """Rules 22 and 32: the end inside a frame."""
    with facing() as (session, peer):
        peer.send(b"\0\0\0")
        settle()
        peer.close()
        assert session.join(5)
    assert not of_level(logged, logging.WARNING)


@pytest.mark.parametrize("how", ["GoAway 1", "connection reset"])
def test_a_broken_session_is_one_warning_with_its_reason(logged, how):
    """Rule 32: an operator should see it, once."""
    with facing(kind="tcp") as (session, peer):
        session.open()
        settle()
        if how == "GoAway 1":
            peer.send(go_away(1))
        else:
            peer.close()  # with unread bytes: a reset
        assert session.join(5)
        settle()
        (record,) = of_level(logged, logging.WARNING)
        assert session.name in record.getMessage()
        assert session.exception.message in record.getMessage()


def test_a_protocol_error_is_one_line_that_says_what_the_peer_did(logged):
    """Rules 23 and 32: not a warning for the error and one more for the end."""
    with facing() as (session, peer):
        peer.send(bytes.fromhex("07000000 00000000 00000000"))
        settle()
        peer.transport.shutdown(socket.SHUT_WR)
        assert session.join(5)
        (record,) = of_level(logged, logging.WARNING)
        assert session.name in record.getMessage() and "version 7" in record.getMessage()


def test_frames_are_logged_at_debug_only(logged):
    """Rule 32: both ways, in words."""
    with facing() as (session, peer):
        session.open().sendall(b"hello")
        peer.send(window_update(1, 0, ACK))
        settle()
        told = " / ".join(record.getMessage() for record in of_level(logged, logging.DEBUG))
        for words in ("WindowUpdate stream 1 SYN", "Data stream 1 length 5", "WindowUpdate stream 1 ACK"):
            assert words in told


def test_without_debug_no_frame_is_logged(caplog):
    """Rule 32."""
    caplog.set_level(logging.INFO, logger="geyamux")
    with facing() as (session, peer):
        session.open().sendall(b"hello")
        peer.send(window_update(1, 0, ACK))
        settle()
    assert not of_level(caplog, logging.DEBUG)


def test_nothing_is_printed_whatever_happens():
    """Rule 32: no handler is set up in this script, and each way to break is tried."""
    script = """
        import socket as stdlib
        import gevent
        from gevent import socket
        import geyamux

        def session(wire=b""):
            near, far = socket.socketpair()
            client = geyamux.Client(near, geyamux.Config(close_timeout=0.01))
            stream = client.open()
            reading = gevent.spawn(stream.recv, 1)
            gevent.sleep(0)
            far.sendall(wire)
            return client, far, reading

        def read(greenlet):
            try:
                greenlet.get(timeout=5)
            except geyamux.SessionError:
                return
            raise AssertionError

        import sys
        gevent.get_hub().NOT_ERROR += (geyamux.SessionError,)  # of the readers above, which are ours
        for wire in (b"", bytes(3), b"HTTP/1.1 400 Bad Request", bytes.fromhex("000300000000000000000001")):
            client, far, reading = session(wire)
            far.close()
            client.join(5)
            read(reading)
        client, far, reading = session()
        gevent.killall([client._reader._greenlet, client._outbox._greenlet])
        client.join(5)
        read(reading)
        far.close()
        client, far, reading = session()
        client.close()
        read(reading)
        far.close()
    """
    assert run_script(script) == (b"", b"", 0)


def test_the_logger_has_a_handler_that_says_nothing():
    """Rule 32: so that logging's last resort prints nothing."""
    assert any(isinstance(handler, logging.NullHandler) for handler in logging.getLogger("geyamux").handlers)


def test_the_name_of_a_session_is_in_its_lines_and_its_repr(logged):
    """Rule 32: whose session it was should not have to be guessed."""
    near, far = memory_pair()
    session = session_over(near, name="to the relay")
    assert "to the relay" in repr(session) and "open" in repr(session)
    session.abort()
    assert "ended" in repr(session)
    assert all(record.getMessage().startswith("to the relay: ") for record in of_level(logged, logging.INFO))
    far.close()


@both_directions
def test_an_abort_at_one_end_leaves_the_other_end_clean(link_kind, swap):
    """Rules 20 and 22, over every kind of link: descriptors, greenlets and timers are gone afterwards."""
    with make_link(link_kind) as link:
        near, far = reversed(tuple(link)) if swap else link
        client, server = Client(near), Server(far)
        stream = client.open()
        reading = start(stream.recv, 1)
        server.abort()
        assert isinstance(outcome(reading), (SessionError, geyamux.StreamReset))
        client.abort()
        assert client.join(5) and server.join(5)
        assert client.closed and server.closed


# --- inside gevent's own server, which closes the socket when the handler returns ---


TLS_VERSIONS = {"tls12": ssl.TLSVersion.TLSv1_2, "tls13": ssl.TLSVersion.TLSv1_3}


@contextlib.contextmanager
def served(kind: str, handler):
    """gevent's StreamServer with a handler that makes a session of each connection; yields a client and the sessions."""
    made: list[Server] = []

    def handle(conn, address):
        session = Server(conn)
        made.append(session)
        handler(session)

    client_context, server_context = tls_contexts(TLS_VERSIONS[kind]) if kind in TLS_VERSIONS else (None, None)
    more = {} if server_context is None else {"ssl_context": server_context}
    server = gevent.server.StreamServer(("127.0.0.1", 0), handle, **more)
    server.start()
    try:
        client = geyamux.connect(
            ("127.0.0.1", server.server_port), timeout=10, ssl_context=client_context, server_hostname="localhost"
        )
        try:
            yield client, made
        finally:
            client.abort()
            for session in made:
                session.abort()
    finally:
        server.stop()


def accept_all(session):
    for stream in session:
        gevent.spawn(echo, stream)


def echo(stream):
    with stream:
        for line in stream:
            stream.sendall(line)


@pytest.mark.parametrize("kind", ["tcp", "tls12", "tls13"])
def test_a_stream_goes_on_after_go_away_although_the_handler_has_returned(kind):
    """R21, R31: the accept loop ends at our own GoAway, the handler returns, and the server closes the socket."""
    with served(kind, accept_all) as (client, made):
        stream = client.open()
        stream.sendall(b"before\n")
        assert stream.readline() == b"before\n"
        made[0].go_away()
        settle()
        stream.sendall(b"after\n")
        assert stream.readline() == b"after\n"
        stream.close_write()
        assert stream.read() == b""
        assert made[0].exception is None


@pytest.mark.parametrize("kind", ["tcp", "tls12", "tls13"])
def test_a_handler_that_returns_at_once_leaves_the_session_alive(kind):
    """R31: the connection belongs to the session, whoever closes the socket."""
    with served(kind, lambda session: gevent.spawn(accept_all, session)) as (client, made):
        settle()
        with client.open() as stream:
            stream.sendall(b"hello\n")
            assert stream.readline() == b"hello\n"
        client.close()
        assert made[0].join(5)
        assert made[0].exception is None


@pytest.mark.parametrize("kind", ["tcp", "tls12", "tls13"])
def test_close_delivers_what_waits_although_the_handler_has_returned(kind):
    """R20: closing ends the accept loop first, and the handler with it."""

    def push(session):
        stream = session.accept()
        gevent.spawn(send_and_close, session, stream)
        for _ in session:
            pass

    def send_and_close(session, stream):
        stream.sendall(bytes(200_000))
        stream.close()
        session.close()

    with served(kind, push) as (client, made):
        with client.open() as stream:
            stream.close_write()
            settle()
            assert len(stream.read()) == 200_000
        assert made[0].join(5)
        assert made[0].exception is None
