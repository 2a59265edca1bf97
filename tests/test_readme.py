"""The documents say what is so: snippets run, tables equal the code, links lead somewhere, rules exist."""

from __future__ import annotations

import ast
import builtins
import dataclasses
import errno
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import trustme

import geyamux
from attacks.catalogue import ATTACKS
from geyamux import errors

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # pytest brings it where the standard library has none

ROOT = Path(__file__).parent.parent
PACKAGE = Path(geyamux.__file__).parent
README = ROOT / "README.md"
CONTRIBUTING = ROOT / "CONTRIBUTING.md"
SPEC = (ROOT / "spec.md").read_text(encoding="utf-8")
OURS = ("*.md", "tests/*.md", "tests/*/*.md", "examples/*.md", "benchmarks/*.md")
DOCUMENTS = sorted(path for pattern in OURS for path in ROOT.glob(pattern))
# Below the time limit of a test, so that a snippet that hangs is ended and what it said is shown.
PATIENCE = 25

every_document = pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))


class Snippet(NamedTuple):
    document: Path
    line: int
    language: str
    text: str

    def __str__(self) -> str:
        return f"{self.document.name}:{self.line}"


def snippets(*languages: str) -> list[Snippet]:
    fence = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
    return [
        Snippet(document, text.count("\n", 0, match.start()) + 1, match[1], match[2])
        for document in DOCUMENTS
        for text in [document.read_text(encoding="utf-8")]
        for match in fence.finditer(text)
        if match[1] in languages
    ]


def section(heading: str, document: Path = README) -> str:
    """What stands below a heading, up to the next one of the same level."""
    text = document.read_text(encoding="utf-8")
    level = heading.partition(" ")[0]
    found = re.search(rf"^{re.escape(heading)}\n(.*?)(?=^{level} |\Z)", text, re.MULTILINE | re.DOTALL)
    assert found is not None, heading
    return found[1]


def table(heading: str) -> list[dict[str, str]]:
    """The table below a heading of the README, a row each, by the names of its columns."""
    lines = [line for line in section(heading).splitlines() if line.startswith("|")]
    names, rule, *rows = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]
    assert all(re.fullmatch("-+", cell) for cell in rule)
    assert all(len(row) == len(names) for row in rows), heading
    return [dict(zip(names, row, strict=True)) for row in rows]


def codes(cell: str) -> list[str]:
    return re.findall("`([^`]+)`", cell)


def code(cell: str) -> str:
    (found,) = codes(cell)
    return found


# --- snippets ---


@pytest.fixture
def workplace(tmp_path: Path) -> Path:
    """Where snippets run: with the files of the section on TLS, a certificate for example.org and its authority."""
    authority = trustme.CA()
    authority.cert_pem.write_to_path(tmp_path / "ca.pem")
    certificate = authority.issue_cert("example.org")
    certificate.private_key_and_cert_chain_pem.write_to_path(tmp_path / "server.pem")
    return tmp_path


@pytest.mark.parametrize("snippet", snippets("python"), ids=str)
def test_a_snippet_runs_and_prints_what_it_says(snippet, workplace):
    """A comment behind a `print` is what it prints. A snippet that names an example is that file: it is run there."""
    if example := re.match(r"# (examples/\w+\.py)\n", snippet.text):
        assert snippet.text[example.end() :] == without_docstring(ROOT / example[1])
        return
    script = workplace / "snippet.py"
    script.write_text(snippet.text, encoding="utf-8")
    done = subprocess.run(
        [sys.executable, str(script)],
        cwd=workplace,
        env={**os.environ, "PYTHONPATH": str(PACKAGE.parent), "PYTHONIOENCODING": "utf-8"},
        capture_output=True,
        encoding="utf-8",
        timeout=PATIENCE,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout.splitlines() == re.findall(r"^ *print\(.*\)  # (.+)$", snippet.text, re.MULTILINE)


def without_docstring(path: Path) -> str:
    source = path.read_text(encoding="utf-8")
    first = ast.parse(source).body[0]
    return "".join(source.splitlines(keepends=True)[first.end_lineno or 0 :]).lstrip("\n")


def test_the_usage_is_shown_by_snippets_that_print():
    printing = [snippet for snippet in snippets("python") if "print(" in snippet.text]
    assert len([snippet for snippet in printing if snippet.document == README]) >= 9


# --- commands ---


@pytest.mark.parametrize("snippet", [snippet for snippet in snippets("sh") if snippet.document.parent == ROOT], ids=str)
def test_a_command_names_files_and_extras_that_are_there(snippet):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert set(re.findall(r"\.\[(\w+)\]", snippet.text)) <= set(project["optional-dependencies"])
    for name in re.findall(r"(?<![\w./])((?:examples|scripts|tests|benchmarks|\.ci)/[\w./]+)", snippet.text):
        assert (ROOT / name).is_file(), name


def test_two_commands_do_everything():
    first, second = re.findall(r"^```sh\n(.+)\n```$", section("## Two commands"), re.MULTILINE)
    environment = "python3 -m venv .venv && .venv/bin/python -m pip install "
    assert first == environment + ". && .venv/bin/python examples/quickstart.py"
    assert second == environment + "-e '.[test]' && .venv/bin/python -m pytest"


def test_what_python_and_gevent_it_needs_is_what_the_metadata_say():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    needs = re.search(r"needs CPython (\S+) or later and gevent (\S+) or later", README.read_text(encoding="utf-8"))
    assert needs is not None
    assert project["requires-python"] == f">={needs[1]}"
    assert project["dependencies"] == [f"gevent>={needs[2]}"]


# --- tables ---


def test_the_table_of_settings_is_that_of_the_code():
    rows = table("## Configuration")
    fields = {field.name: field.default for field in dataclasses.fields(geyamux.Config)}
    told: dict[str, Any] = {
        code(row["name"]): "left out" if row["default"] == "left out" else ast.literal_eval(code(row["default"]))
        for row in rows
    }
    assert list(told) == list(fields)
    for name, default in fields.items():
        expected = "left out" if repr(default) == "<unset>" else default
        assert (told[name], type(told[name])) == (expected, type(expected)), name


def test_every_setting_has_its_unit_and_says_what_happens_at_its_limit():
    for row in table("## Configuration"):
        name = code(row["name"])
        if name.endswith(("_timeout", "_interval")):
            unit = "seconds"
        else:
            unit = "streams" if name.endswith(("_streams", "_backlog")) else "bytes"
        assert row["unit"] == unit, name
        assert row["what happens at the limit"], name


def public_errors() -> dict[str, type[Exception]]:
    return {name: getattr(errors, name) for name in errors.__all__}


def test_the_table_of_errors_has_each_with_the_builtin_that_it_is():
    rows = {code(row["error"]): code(row["is also a"]) for row in table("## Errors")}
    builtin = {
        name: next(kind.__name__ for kind in error.__mro__ if kind.__module__ == builtins.__name__)
        for name, error in public_errors().items()
    }
    assert rows == builtin


def test_the_table_of_errors_goes_down_the_tree_and_says_what_to_do():
    tree = re.findall(r"^ {4,}(\w+)(?:\(\w+\))? ", errors.__doc__ or "", re.MULTILINE)
    rows = table("## Errors")
    assert [code(row["error"]) for row in rows[1:]] == tree
    assert all(row["what happened"] and row["what to do"] for row in rows)


def test_the_errno_of_an_error_is_the_one_in_the_table():
    special: dict[type[Exception], Exception] = {
        geyamux.RemoteError: geyamux.RemoteError("why", 2),
        geyamux.StreamReset: geyamux.StreamReset("why", remote=True),
    }
    for row in table("## Errors"):
        kind = public_errors()[code(row["error"])]
        number = getattr(special.get(kind) or kind("why"), "errno", None)
        assert codes(row["errno"])[:1] == ([errno.errorcode[number]] if number else []), kind


def test_every_module_stands_in_the_table_of_files_and_no_other():
    rows = table("## Where things are")
    files = {path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py")}
    assert sorted(code(row["file"]) for row in rows) == sorted(files)
    for row in rows:
        assert f"(geyamux/{code(row['file'])})" in row["file"]
        assert row["what it is"]


# --- guarantees ---


def modules_of_rules() -> dict[str, set[str]]:
    """The test modules of each rule, as spec.md names them."""
    found = re.findall(r"^\| (R\d+) \| (.+) \|$", SPEC, re.MULTILINE)
    return {rule: set(codes(modules)) for rule, modules in found}


@pytest.mark.parametrize("row", table("## What is guaranteed"), ids=lambda row: row["rule"])
def test_a_guarantee_names_its_rule_and_tests_that_are_there(row):
    rules = row["rule"].split(", ")
    modules = set(codes(row["tested in"]))
    assert modules
    assert modules <= set.union(*(modules_of_rules()[rule] for rule in rules))
    assert [name for name in sorted(modules) if not (ROOT / "tests" / name).is_file()] == []


# --- what it withstands ---


def test_every_attack_stands_in_the_table_of_what_it_withstands_and_within_the_bounds():
    named: list[str] = []
    for row in table("## What it withstands"):
        names = [name for name in codes(row["test"]) if not name.endswith(".py")]
        named += names
        if names:
            allowed = 128 if any(ATTACKS[name].is_unread for name in names) else 64
            assert float(row["memory (MiB)"]) <= allowed, row
            assert float(row["p99 (ms)"]) <= 20.0, row
    assert sorted(named) == sorted(ATTACKS)


def test_the_test_modules_that_the_readme_and_the_specification_name_are_there():
    there = {path.name for path in (ROOT / "tests").rglob("test_*.py")}
    named = set.union(*modules_of_rules().values())
    for row in table("## What it withstands"):
        named |= {name for name in codes(row["test"]) if name.endswith(".py")}
    assert sorted(named - there) == []


@every_document
def test_a_rule_that_is_cited_exists(document):
    rules = set(re.findall(r"^- \*\*(R\d+)\*\*", SPEC, re.MULTILINE))
    assert len(rules) == 32
    assert set(re.findall(r"\bR\d+\b", document.read_text(encoding="utf-8"))) <= rules


@every_document
def test_a_section_of_the_specification_that_is_cited_exists(document):
    sections = set(re.findall(r"^## (\d+)\. ", SPEC, re.MULTILINE))
    assert len(sections) >= 16
    assert set(re.findall(r"section (\d+) of \[spec\.md\]", document.read_text(encoding="utf-8"))) <= sections


def test_only_peers_with_tests_are_called_tested():
    rows = table("## Other implementations")
    kinds = {row["how it is known"].partition(":")[0] for row in rows}
    assert kinds == {"tested", "tried", "read"}
    linked = {
        name
        for row in rows
        if row["how it is known"].startswith("tested")
        for name in re.findall(r"\]\(tests/interop/(\w+\.py)\)", row["how it is known"])
    }
    assert len(linked) == sum(row["how it is known"].startswith("tested") for row in rows)
    for name in linked:
        assert "pytest.mark.interop" in (ROOT / "tests" / "interop" / name).read_text(encoding="utf-8")


def test_the_version_of_js_is_the_one_that_is_installed_for_the_tests():
    package = json.loads((ROOT / "tests" / "interop" / "js" / "package.json").read_text(encoding="utf-8"))
    (row,) = [row for row in table("## Other implementations") if row["implementation"].startswith("@chainsafe")]
    major = re.search(r"\d+", package["dependencies"][row["implementation"]])
    assert major is not None
    assert row["version"] == f"{major[0]}.x"


# --- links ---


@every_document
def test_a_link_leads_to_a_file_and_to_a_heading_in_it(document):
    for target in re.findall(r"\]\(([^)\s]+)\)", document.read_text(encoding="utf-8")):
        if re.match(r"https?://", target):
            continue
        name, _, anchor = target.partition("#")
        path = (document.parent / name).resolve() if name else document
        assert path.exists(), target
        if anchor:
            assert anchor in headings(path), target


def headings(path: Path) -> set[str]:
    """The anchors of a document: its headings in lower case, with dashes for blanks, without what is no word."""
    text = re.sub(r"^```.*?^```$", "", path.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    titles = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def test_the_documents_that_are_checked_are_all_that_there_are():
    left_out = {".venv", "node_modules", "build", "dist"}
    found = {
        path
        for path in ROOT.rglob("*.md")
        if not any(part in left_out or part.startswith(".") for part in path.relative_to(ROOT).parts)
    }
    assert found == set(DOCUMENTS)
    assert {README, CONTRIBUTING} <= found


def test_the_names_in_the_contributing_guide_exist():
    text = CONTRIBUTING.read_text(encoding="utf-8")
    for name in re.findall(r"`((?:tests/)?test_\w+\.py)`", text):
        assert (ROOT / "tests" / name.removeprefix("tests/")).is_file(), name
    for name in re.findall(r"`(\w+\.py)`", section("## Tests", CONTRIBUTING)):
        assert (ROOT / "tests" / name).is_file() or (ROOT / "tests" / "support" / name).is_file(), name
