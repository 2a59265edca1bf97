"""PyMySQL, pymemcache and pg8000 against real servers, over streams: each test plays a scene of a program."""

from __future__ import annotations

import pytest

from .real_runner import need_library, play, relay
from .real_servers import mariadb_server, memcached_server, postgres_server

pytestmark = pytest.mark.interop

CALLS = 20
WAIT = 0.3
#: What PyMySQL says where the connection ended in the middle of a query.
LOST_CONNECTION = 2013
UNKNOWN_COLUMN = 1054
ROWS = 20000


@pytest.fixture(scope="module")
def mysql():
    need_library("pymysql")
    with mariadb_server() as path, relay(f"tcp=unix:{path}") as running:
        yield running.options


@pytest.fixture(scope="module")
def postgres():
    need_library("pg8000")
    with postgres_server() as path, relay(f"tcp=unix:{path}") as running:
        yield running.options


def scene(name, options, **more):
    return play("real_mysql_scenes.py", name, **options, **more)


# The first test of a server waits for it to be set up.
@pytest.mark.timeout(90)
def test_pymysql_stores_and_reads_rows_and_blobs(mysql):
    facts = scene("queries", mysql)
    assert (facts["stored"], facts["wrong"]) == (500, UNKNOWN_COLUMN)
    assert facts["names"] == ["grün 0", "grün 1", "grün 2"]
    assert facts["blob"]


def test_pymysql_reads_big_results_at_once_and_row_by_row(mysql):
    facts = scene("big_results", mysql)
    total = 100 * ROWS * (ROWS + 1) // 2
    assert (facts["rows"], facts["sum"], facts["one by one"]) == (ROWS, total, total)
    assert (facts["beside"], facts["first"], facts["afterwards"]) == (4, [1], 42)


def test_pymysql_keeps_transactions_apart(mysql):
    assert scene("transactions", mysql) == {"unseen": 0, "seen": 1, "blocked": True, "amount": 200}


def test_pymysql_gives_up_at_its_read_timeout_and_leaves_no_stream(mysql):
    facts = scene("timeouts", mysql)
    assert facts["code"] == LOST_CONNECTION
    assert 0.19 < facts["waited"] < 1
    assert facts["open"] is False


def test_twenty_queries_of_pymysql_wait_together_over_one_session(mysql):
    facts = scene("concurrent", mysql, calls=CALLS, wait=WAIT)
    assert facts["answers"] == list(range(CALLS))
    assert WAIT <= facts["took"] < WAIT * CALLS / 3


def test_pymysql_hears_of_a_reset_and_goes_on_over_a_new_stream(mysql):
    assert scene("reset", mysql) == {"code": LOST_CONNECTION, "revived": 1}


def test_pymemcache_works_with_a_socket_module_that_opens_streams():
    need_library("pymemcache")
    with memcached_server() as path, relay(f"tcp=unix:{path}") as running:
        assert play("real_databases_scenes.py", "memcache", **running.options) == {
            "big": True,
            "found": 100,
            "count": 100,
        }


@pytest.mark.timeout(90)
def test_pg8000_works_with_a_stream_in_the_place_of_its_socket(postgres):
    facts = play("real_databases_scenes.py", "postgres", **postgres, calls=CALLS, wait=WAIT)
    assert facts["wrong"] == "DatabaseError"
    assert (facts["blob"], facts["rows"]) == (True, 10000)
    assert facts["answers"] == list(range(CALLS))
    assert WAIT <= facts["took"] < WAIT * CALLS / 3


@pytest.mark.timeout(90)
def test_pg8000_cannot_encrypt_inside_a_stream_and_says_so(postgres):
    facts = play("real_databases_scenes.py", "postgres_tls", **postgres)
    assert facts["error"] == "InterfaceError"
    assert facts["session"]
