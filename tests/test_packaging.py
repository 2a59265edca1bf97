"""What is built, shipped and declared: wheel, source archive, metadata, and what an import brings along."""

from __future__ import annotations

import email
import os
import re
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import geyamux

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # pytest brings it where the standard library has none

ROOT = Path(__file__).parent.parent
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def run(code: str, cwd: Path, *options: str) -> str:
    """The output of a fresh interpreter that imports geyamux from where this one does."""
    environment = {**os.environ, "PYTHONPATH": str(Path(geyamux.__file__).parent.parent)}
    done = subprocess.run(
        [sys.executable, *options, "-c", code],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        timeout=25,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A directory with a wheel and a source archive, built as any installer would."""
    directory = tmp_path_factory.mktemp("dist")
    run(
        f"import hatchling.build as b; b.build_wheel({str(directory)!r}); b.build_sdist({str(directory)!r})",
        ROOT,
    )
    return directory


def only(directory: Path, pattern: str) -> Path:
    (found,) = directory.glob(pattern)
    return found


def test_the_wheel_holds_the_package_and_its_licence_and_nothing_else(built):
    with zipfile.ZipFile(only(built, "*.whl")) as wheel:
        names = set(wheel.namelist())
    info = f"geyamux-{geyamux.__version__}.dist-info"
    package = {str(path.relative_to(ROOT)) for path in (ROOT / "geyamux").rglob("*.py")}
    assert names == {
        *package,
        "geyamux/py.typed",
        f"{info}/METADATA",
        f"{info}/RECORD",
        f"{info}/WHEEL",
        f"{info}/entry_points.txt",
        f"{info}/licenses/LICENSE",
        f"geyamux-{geyamux.__version__}.data/data/share/man/man1/geyamux.1",
    }


def test_the_wheel_is_for_every_platform(built):
    assert only(built, "*.whl").name == f"geyamux-{geyamux.__version__}-py3-none-any.whl"


def test_the_wheel_says_what_it_needs(built):
    with zipfile.ZipFile(only(built, "*.whl")) as wheel:
        name = f"geyamux-{geyamux.__version__}.dist-info/METADATA"
        metadata = email.message_from_bytes(wheel.read(name))
    assert metadata["Version"] == geyamux.__version__
    assert metadata["Requires-Python"] == ">=3.10"
    assert metadata["License-Expression"] == "MIT"
    required = [line for line in metadata.get_all("Requires-Dist", []) if "extra ==" not in line]
    assert required == ["gevent>=24.10.1"]


def test_the_source_archive_can_be_built_and_tested(built):
    with tarfile.open(only(built, "*.tar.gz")) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md", "geyamux/py.typed"} <= names
    assert {str(path.relative_to(ROOT)) for path in (ROOT / "tests").rglob("*.py")} <= names


def test_the_source_archive_holds_nothing_that_a_run_leaves_behind(built):
    with tarfile.open(only(built, "*.tar.gz")) as archive:
        names = archive.getnames()
    leftovers = re.compile(r"__pycache__|node_modules|\.pyc$|/\.(git|hypothesis|venv|[a-z]+_cache)(/|$)")
    assert [name for name in names if leftovers.search(name)] == []


def test_the_version_stands_at_the_top_of_the_changelog():
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    newest = re.search(r"^## \[(?P<version>[^]]+)\]", changelog, re.MULTILINE)
    assert newest is not None
    assert newest["version"] == geyamux.__version__


def test_the_classifiers_begin_where_the_required_version_does():
    minors = [
        int(match[1])
        for line in PROJECT["project"]["classifiers"]
        if (match := re.fullmatch(r"Programming Language :: Python :: 3\.(\d+)", line))
    ]
    assert minors == list(range(10, 15))
    assert PROJECT["project"]["requires-python"] == f">=3.{minors[0]}"


def test_the_oldest_gevent_that_is_allowed_is_the_one_that_is_tested():
    (dependency,) = PROJECT["project"]["dependencies"]
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    tested = re.search(r"^oldest_gevent=(\S+)$", script, re.MULTILINE)
    assert tested is not None
    assert dependency == f"gevent>={tested[1]}"


def test_an_import_brings_along_gevent_and_the_standard_library_alone(tmp_path):
    code = """
import sys
import gevent.socket, gevent.ssl, gevent.event, gevent.queue, gevent.fileobject, gevent.server
before = set(sys.modules)
import geyamux
for name in sorted({name.partition(".")[0] for name in set(sys.modules) - before}):
    print(name)
"""
    names = set(run(code, tmp_path).split())
    assert names - set(sys.stdlib_module_names) <= {"geyamux", "gevent"}


def test_an_import_patches_nothing_starts_nothing_and_warns_of_nothing(tmp_path):
    code = """
import geyamux, socket, threading
from gevent import monkey
assert not monkey.is_module_patched("socket")
assert socket.socket.__module__ == "socket"
assert threading.active_count() == 1
"""
    assert run(code, tmp_path, "-W", "error") == ""


def test_an_import_says_nothing_to_the_log_unless_asked(tmp_path):
    code = """
import logging
import geyamux
(handler,) = logging.getLogger("geyamux").handlers
assert type(handler) is logging.NullHandler
assert not logging.getLogger().handlers
"""
    assert run(code, tmp_path) == ""
