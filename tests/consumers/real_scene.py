"""The common part of the programs that use a consumer as it is: dial the relay, play one scene, report what came out.

A program of scenes is run monkey-patched by gevent itself (``python -m gevent.monkey SCRIPT OPTIONS``), as an
application of blocking code is. Each scene is a function of the session and of the options that the test gave; it
returns facts, which are printed as one line of JSON. The test judges them: nothing is asserted here.
"""

from __future__ import annotations

import contextlib
import json
import ssl
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import gevent
import gevent.ssl

import geyamux

#: Below the patience of the test, so that the traceback of a scene that hangs is shown.
SCENE_SECONDS = 20.0

Facts = dict[str, Any]
Scene = Callable[[Any, dict[str, Any]], Facts]


def main(scenes: Mapping[str, Any]) -> None:
    """Play the scene that the options name, in a session to the trunk that they name.

    Where they name none both ends are here: the other one is then ``options["server"]``.
    """
    options = json.loads(sys.argv[1])
    scene: Scene = scenes[options["scene"]]
    with gevent.Timeout(SCENE_SECONDS), contextlib.ExitStack() as stack:
        session: geyamux.Client
        if "trunk" in options:
            session = dial(options["trunk"], options.get("authority"))
        else:
            session, server = geyamux.pair()
            options["server"] = stack.enter_context(server)
        facts = scene(stack.enter_context(session), options)
    print(json.dumps(facts))


def dial(trunk: str, authority: str | None = None) -> geyamux.Client:
    """A session to ``unix:PATH``, ``tcp:PORT`` or ``tls:PORT``; `authority` is the file of certificates to trust."""
    kind, _, where = trunk.partition(":")
    if kind == "unix":
        return geyamux.connect(where)
    context = None
    if kind == "tls":
        context = gevent.ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.load_verify_locations(authority)
    name = "localhost" if context is not None else None
    return geyamux.connect(("127.0.0.1", int(where)), ssl_context=context, server_hostname=name)


def error_of(function: Callable[..., Any], *args: Any, **kwargs: Any) -> str:
    """The class of the exception that a call ends with, "" where it ends well."""
    try:
        function(*args, **kwargs)
    except Exception as error:
        return type(error).__name__
    return ""


def chain_of(error: BaseException | None) -> list[str]:
    """The classes of an exception and of what it was raised from."""
    found = []
    while error is not None:
        found.append(type(error).__name__)
        error = error.__cause__ or error.__context__
    return found


def results(jobs: Sequence[gevent.Greenlet[..., Any]]) -> list[Any]:
    """What greenlets return, in their order; the first that fails raises here."""
    gevent.joinall(jobs, raise_error=True)
    return [job.value for job in jobs]


def wait_for_no_streams(session: geyamux.Client) -> None:
    """Wait until all that were open have ended on both sides."""
    while session.num_streams:
        gevent.sleep(0.001)


@contextlib.contextmanager
def stopwatch() -> Iterator[Callable[[], float]]:
    """Seconds since the block began."""
    began = time.perf_counter()
    yield lambda: time.perf_counter() - began
