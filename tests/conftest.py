"""Fixtures for all tests, and what is checked after each: nothing leaked, nothing went wrong unseen.

With GEYAMUX_NO_SKIP=1 in the environment a skipped test counts as a failed one.
"""

from __future__ import annotations

import fcntl
import gc
import logging
import os
from collections.abc import Iterator
from weakref import WeakSet

import gevent
import gevent.hub
import pytest

import support
from geyamux import Client, Server
from support.links import KINDS, sessions
from support.rawpeer import settle

NO_SKIP = os.environ.get("GEYAMUX_NO_SKIP") == "1"
DESCRIPTORS = "/proc/self/fd"

_greenlets: WeakSet[gevent.Greenlet] = WeakSet()
gevent.Greenlet.add_spawn_callback(_greenlets.add)


@pytest.fixture(params=KINDS)
def link_kind(request: pytest.FixtureRequest) -> str:
    """Every kind of link in turn; for `make_link` and `sessions`."""
    return request.param


@pytest.fixture
def pair() -> Iterator[tuple[Client, Server]]:
    """A client and a server over a socketpair."""
    with sessions("socketpair") as both:
        yield both


# --- after each test ---


@pytest.fixture(autouse=True)
def _nothing_leaks(request: pytest.FixtureRequest) -> Iterator[None]:
    gevent.get_hub()  # its own descriptors are no leak of the first test
    before = _left_over()
    yield
    settle()
    leaked = _left_over() - before
    if leaked:
        # Closed sockets are let go by callbacks, abandoned ones by the collector.
        for _ in range(3):
            gc.collect()
            gevent.sleep(0.01)
        leaked = _left_over() - before
    if leaked:
        pytest.fail("leaked: " + "; ".join(sorted(leaked)))


@pytest.fixture(autouse=True)
def _no_error_is_logged() -> Iterator[None]:
    errors: list[str] = []
    handler = logging.Handler(logging.ERROR)
    handler.emit = lambda record: errors.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("geyamux")
    logger.addHandler(handler)
    yield
    logger.removeHandler(handler)
    assert not errors, f"logged as errors: {errors}"


@pytest.fixture(autouse=True)
def _no_callback_fails(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A session's greenlets and callbacks report to sessions; what reaches the hub instead is a fault."""
    failures: list[str] = []
    handle_error = gevent.hub.Hub.handle_error

    def record(hub, context, type, value, tb):  # type: ignore[no-untyped-def]
        ours = context is None or not isinstance(context, gevent.Greenlet) or _is_ours(context)
        if ours and not issubclass(type, (*hub.NOT_ERROR, *hub.SYSTEM_ERROR)):
            failures.append(f"{context!r}: {value!r}")
        return handle_error(hub, context, type, value, tb)

    monkeypatch.setattr(gevent.hub.Hub, "handle_error", record)
    yield
    assert not failures, f"failed in the hub: {failures}"


def _left_over() -> set[str]:
    """Open descriptors, and greenlets of sessions."""
    found = {repr(greenlet) for greenlet in list(_greenlets) if not greenlet.dead and _is_ours(greenlet)}
    for name in os.listdir(DESCRIPTORS):
        try:
            found.add(f"descriptor {name} of {os.readlink(f'{DESCRIPTORS}/{name}')}")
        except OSError:
            continue  # the one that listed the directory
    return found


def _is_ours(greenlet: gevent.Greenlet) -> bool:
    """Whether it runs, or is about to run, a function of the package."""
    function = getattr(greenlet, "_run", None)
    if (getattr(function, "__module__", None) or "").startswith("geyamux"):
        return True
    frame = greenlet.gr_frame
    while frame is not None:
        outermost, frame = frame, frame.f_back
        if frame is None:
            return str(outermost.f_globals.get("__name__")).startswith("geyamux")
    return False


# --- the run as a whole ---


if "PYTEST_XDIST_WORKER" in os.environ:

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_protocol(item):  # type: ignore[no-untyped-def]
        """Tests of several processes run side by side, but those marked ``alone``, which measure."""
        with open(__file__) as line, open(support.__file__) as machine:
            # Who comes while one waits to be alone stands in line behind it.
            fcntl.flock(line, fcntl.LOCK_EX)
            fcntl.flock(machine, fcntl.LOCK_EX if item.get_closest_marker("alone") else fcntl.LOCK_SH)
            fcntl.flock(line, fcntl.LOCK_UN)
            return (yield)


@pytest.fixture(scope="module", autouse=True)
def _collections_stay_short() -> None:
    """What is imported stays, and so do pytest's reports: the collector need not look at them after each test."""
    gc.collect()
    gc.freeze()


if NO_SKIP:

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(item, call):  # type: ignore[no-untyped-def]
        report = yield
        if report.skipped and not hasattr(report, "wasxfail"):
            report.outcome = "failed"
            report.longrepr = f"{item.nodeid} was skipped, and GEYAMUX_NO_SKIP is set: {report.longrepr}"
        return report

    @pytest.hookimpl(wrapper=True)
    def pytest_make_collect_report(collector):  # type: ignore[no-untyped-def]
        report = yield
        if report.skipped:
            report.outcome = "failed"
            report.longrepr = f"{collector.nodeid} was skipped, and GEYAMUX_NO_SKIP is set"
        return report
