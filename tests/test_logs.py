"""Lines of the log are written in order, by a greenlet of their own, and no handler holds up anybody."""

from __future__ import annotations

import logging
import subprocess
import sys
from collections.abc import Iterator

import gevent
import pytest

from geyamux import logs
from geyamux.logs import log
from support.rawpeer import settle

logger = logging.getLogger("geyamux.tests.logs")


class Handler(logging.Handler):
    """Keeps lines and who wrote them; each line waits as long as the test says."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []
        self.by: set[object] = set()
        self.seconds: float | None = None
        self.error: Exception | None = None

    def handle(self, record: logging.LogRecord) -> bool:
        self.by.add(gevent.getcurrent())
        if self.seconds is not None:
            gevent.sleep(self.seconds)
        if self.error is not None:
            raise self.error
        self.lines.append(record.getMessage())
        return True


@pytest.fixture
def handler() -> Iterator[Handler]:
    found = Handler()
    logger.addHandler(found)
    logger.setLevel(logging.INFO)
    logger.propagate = False
    yield found
    logger.removeHandler(found)
    logger.propagate = True
    logger.setLevel(logging.NOTSET)


def test_lines_are_written_in_order_by_one_greenlet_of_their_own(handler):
    for number in range(100):
        log(logger, logging.INFO, "line %d", number)
    assert handler.lines == []
    settle()
    assert handler.lines == [f"line {number}" for number in range(100)]
    assert len(handler.by) == 1
    assert not handler.by & {gevent.getcurrent(), gevent.get_hub()}


def test_a_line_below_the_level_costs_nothing(handler):
    log(logger, logging.DEBUG, "line %d", 1)
    settle()
    assert handler.lines == []
    assert handler.by == set()


def test_lines_may_be_logged_in_the_hub_even_where_the_handler_waits(handler):
    handler.seconds = 0.001
    gevent.get_hub().loop.run_callback(log, logger, logging.INFO, "from the hub")
    gevent.sleep(0.05)
    assert handler.lines == ["from the hub"]


def test_a_slow_handler_costs_lines_and_not_memory(handler, monkeypatch):
    monkeypatch.setattr(logs, "_MOST_LINES", 10)
    handler.seconds = 0.0
    for number in range(100):
        log(logger, logging.INFO, "line %d", number)
    for _ in range(50):
        gevent.sleep(0)
    assert handler.lines == [
        "90 lines were left out: the handlers of the log are slow",
        *[f"line {n}" for n in range(10)],
    ]
    log(logger, logging.INFO, "later")
    for _ in range(5):
        gevent.sleep(0)
    assert handler.lines[-1] == "later"


def test_a_handler_that_raises_keeps_no_other_line_from_being_written(handler, monkeypatch):
    reported = []
    monkeypatch.setattr(gevent.get_hub(), "handle_error", lambda *args: reported.append(args[2]), raising=False)
    handler.error = RuntimeError("no disk")
    log(logger, logging.INFO, "first")
    settle()
    assert [str(error) for error in reported] == ["no disk"]
    handler.error = None
    log(logger, logging.INFO, "second")
    settle()
    assert handler.lines == ["second"]


def test_what_waits_at_the_end_of_the_program_is_written():
    program = (
        "import logging; logging.basicConfig(level=logging.INFO)\nimport geyamux; a, b = geyamux.pair(); a.abort()\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=20, check=True)
    assert "client-1: session begins" in done.stderr
    assert "client-1: session ends" in done.stderr
