"""PyMySQL as it is, over streams: what a test plays here it judges there.

The whole adapter is `connect`: PyMySQL takes a connected socket by itself where it is told not to connect.
"""

from __future__ import annotations

import hashlib
import os
import signal
from typing import Any

import gevent
import pymysql
import pymysql.cursors

from consumers import real_scene
from consumers.real_scene import Facts, results, stopwatch, wait_for_no_streams

ROWS = 20000
BLOB = bytes(range(256)) * 12000


def connect(session: Any, **kwargs: Any) -> Any:
    """A connection of PyMySQL over a stream of its own."""
    connection = pymysql.connect(defer_connect=True, user="root", database="mysql", **kwargs)
    connection.connect(session.open())
    return connection


def ask(connection: Any, query: str, *args: Any) -> Any:
    """All rows of the answer."""
    with connection.cursor() as cursor:
        cursor.execute(query, args or None)
        return cursor.fetchall()


def error_code(function: Any, *args: Any) -> int:
    """The number of the error that a call ends with, 0 where it ends well."""
    try:
        function(*args)
    except pymysql.err.MySQLError as error:
        return int(error.args[0])
    return 0


# --- scenes ---


def queries(session: Any, options: dict[str, Any]) -> Facts:
    """Rows in, rows out, an error in between, a blob of many windows."""
    connection = connect(session, autocommit=True)
    ask(connection, "CREATE OR REPLACE TABLE things (id INT PRIMARY KEY, name VARCHAR(40), body LONGBLOB)")
    with connection.cursor() as cursor:
        stored = cursor.executemany(
            "INSERT INTO things (id, name) VALUES (%s, %s)", [(n, f"grün {n}") for n in range(500)]
        )
    ask(connection, "UPDATE things SET body = %s WHERE id = 7", BLOB)
    wrong = error_code(ask, connection, "SELECT nonsense FROM things")
    body = ask(connection, "SELECT body FROM things WHERE id = 7")[0][0]
    names = [row[0] for row in ask(connection, "SELECT name FROM things WHERE id < %s ORDER BY id", 3)]
    connection.close()
    wait_for_no_streams(session)
    return {
        "stored": stored,
        "wrong": wrong,
        "names": names,
        "blob": hashlib.sha256(body).digest() == hashlib.sha256(BLOB).digest(),
    }


def big_results(session: Any, options: dict[str, Any]) -> Facts:
    """Some megabytes of rows: all at once, and one by one while another connection works."""
    query = f"SELECT seq, REPEAT('x', 100) FROM seq_1_to_{ROWS}"
    connection = connect(session)
    rows = ask(connection, query)
    other = connect(session)
    one_by_one, beside = 0, 0
    with connection.cursor(pymysql.cursors.SSCursor) as cursor:
        cursor.execute(query)
        for number, text in cursor:
            one_by_one += number * len(text)
            if number % 5000 == 0:
                beside += ask(other, "SELECT 1")[0][0]
    # An unbuffered cursor that is closed half-way reads to its end by itself.
    with connection.cursor(pymysql.cursors.SSCursor) as cursor:
        cursor.execute(query)
        first = cursor.fetchone()
    return {
        "rows": len(rows),
        "sum": sum(number * len(text) for number, text in rows),
        "one by one": one_by_one,
        "beside": beside,
        "first": list(first)[:1],
        "afterwards": ask(connection, "SELECT 42")[0][0],
    }


def transactions(session: Any, options: dict[str, Any]) -> Facts:
    """Two connections see each other's rows when they may, and one waits for the other's lock."""
    a, b = connect(session), connect(session)
    ask(a, "CREATE OR REPLACE TABLE accounts (id INT PRIMARY KEY, amount INT) ENGINE=InnoDB")
    ask(a, "INSERT INTO accounts VALUES (1, 100)")
    unseen = len(ask(b, "SELECT * FROM accounts"))
    a.commit()
    b.rollback()
    seen = len(ask(b, "SELECT * FROM accounts"))
    b.rollback()
    ask(a, "UPDATE accounts SET amount = amount - 30 WHERE id = 1")
    waiting = gevent.spawn(ask, b, "UPDATE accounts SET amount = amount * 2 WHERE id = 1")
    gevent.sleep(0.1)
    blocked = not waiting.ready()
    a.rollback()
    waiting.get(timeout=10)
    b.commit()
    return {
        "unseen": unseen,
        "seen": seen,
        "blocked": blocked,
        "amount": ask(a, "SELECT amount FROM accounts")[0][0],
    }


def timeouts(session: Any, options: dict[str, Any]) -> Facts:
    """An answer that does not come within `read_timeout`."""
    connection = connect(session, read_timeout=0.2)
    with stopwatch() as seconds:
        code = error_code(ask, connection, "SELECT SLEEP(1)")
        waited = seconds()
    # The server answers into a stream that is closed, then ends its side: nothing is left of it.
    wait_for_no_streams(session)
    return {"code": code, "waited": waited, "open": connection.open}


def concurrent(session: Any, options: dict[str, Any]) -> Facts:
    """Many connections that wait in the server at the same time."""
    calls, wait = options["calls"], options["wait"]
    connections = [connect(session) for _ in range(calls)]
    with stopwatch() as seconds:
        jobs = [gevent.spawn(ask, each, f"SELECT {n}, SLEEP({wait})") for n, each in enumerate(connections)]
        answers = [rows[0][0] for rows in results(jobs)]
        took = seconds()
    return {"took": took, "answers": answers}


def reset(session: Any, options: dict[str, Any]) -> Facts:
    """The relay resets the streams in the middle of a query; a new stream revives the connection."""
    connection = connect(session)
    waiting = gevent.spawn(error_code, ask, connection, "SELECT SLEEP(10)")
    watcher = connect(session)
    while not [row for row in ask(watcher, "SHOW PROCESSLIST") if "SLEEP(10)" in str(row[7])]:
        gevent.sleep(0.001)
    os.kill(options["relay"], signal.SIGUSR1)
    code = waiting.get(timeout=5)
    connection.connect(session.open())
    return {"code": code, "revived": ask(connection, "SELECT 1")[0][0]}


if __name__ == "__main__":
    real_scene.main(globals())
