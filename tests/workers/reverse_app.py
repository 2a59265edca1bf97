"""The application that gunicorn serves in the tests: it says which process answers, over what, and what came."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from typing import Any


def application(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
    """Answer in one line: the process, "stream" or "connection", the size of the body."""
    size = len(environ["wsgi.input"].read())
    came_over = "stream" if "geyamux.stream" in environ else "connection"
    start_response("200 OK", [("Content-Type", "text/plain")])
    return [f"{os.getpid()} {came_over} {size}\n".encode()]
