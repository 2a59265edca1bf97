"""Programs of their own: the examples of HTTP clients, requests in a patched process, and what an import brings along."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import geyamux
from webclients.recipes import EXAMPLES

CHECKOUT = Path(geyamux.__file__).parent.parent
TESTS = Path(__file__).parent.parent
PATIENCE = 25

SAID = {
    "http_client.py": """\
200 GET / for backend
200 POST /orders for backend
200 DELETE /orders/1 for backend
streams opened: 1
""",
    "requests_client.py": """\
the server was told: {'host': 'backend', 'query': 'page=2'}
upload arrived: True
downloaded: 6553600 bytes
streams opened so far: 1
at once: 50 on 50 streams
after the connection broke: 200
""",
    "httpx_client.py": """\
/a for backend
/b for backend
/c for backend
downloaded: 6553600 bytes
streams opened so far: 1
answered: 150 of 150
too late: timed out
""",
    "geventhttpclient_client.py": """\
GET /orders for backend, 0 bytes
POST /orders for backend, 1000000 bytes
streams opened so far: 1
answered: 40 on 20 streams
""",
}
NEEDS = {"requests_client.py": "requests", "httpx_client.py": "httpx", "geventhttpclient_client.py": "geventhttpclient"}


def run(directory: Path, *arguments: str) -> str:
    """What a program said, when it ended well."""
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=directory,
        env={**os.environ, "PYTHONPATH": f"{CHECKOUT}{os.pathsep}{TESTS}"},
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    # With older versions of gevent, what is finalised after the end of a patched program may complain.
    assert done.stderr.partition("Exception ignored in")[0] == ""
    return done.stdout


@pytest.mark.interop
@pytest.mark.parametrize("example", SAID)
def test_an_example_says_what_it_should(tmp_path, example):
    if example in NEEDS:
        pytest.importorskip(NEEDS[example], reason=f"needs {NEEDS[example]} (pip install {NEEDS[example]})")
    assert run(tmp_path, str(EXAMPLES / example)) == SAID[example]


@pytest.mark.interop
def test_requests_over_streams_in_a_patched_process(tmp_path):
    pytest.importorskip("requests", reason="needs requests (pip install requests)")
    said = run(tmp_path, str(Path(__file__).parent / "patched_requests.py"))
    assert said.splitlines() == ["fine 3", "{'together'} 20 20", "1048576", "too late"]


@pytest.mark.interop
def test_importing_the_adapter_patches_nothing(tmp_path):
    pytest.importorskip("requests", reason="needs requests (pip install requests)")
    asked = (
        "import geyamux.requests; from gevent.monkey import is_module_patched;"
        "print([name for name in ('socket', 'ssl', 'threading', 'time', 'queue') if is_module_patched(name)])"
    )
    assert run(tmp_path, "-c", asked) == "[]\n"


def test_importing_geyamux_does_not_import_requests(tmp_path):
    asked = "import sys, geyamux; print([n for n in ('requests', 'urllib3') if n in sys.modules])"
    assert run(tmp_path, "-c", asked) == "[]\n"
