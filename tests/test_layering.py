"""The shape of the package: layers, what may be imported, and how long things may be."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import geyamux
from geyamux import waiting

PACKAGE = Path(geyamux.__file__).parent
MODULES = sorted(PACKAGE.rglob("*.py"))

LAYERS: dict[str, int] = {
    "errors": 0,
    "frame": 0,
    "waiting": 0,
    "logs": 0,
    "config": 1,
    "lifecycle": 1,
    "flow": 1,
    "transport": 1,
    "waking": 1,
    "urgent": 2,
    "reader": 2,
    "fileobj": 2,
    "stats": 2,
    "listener": 2,
    "outbox": 3,
    "duplex": 4,
    "liveness": 4,
    "stream": 5,
    "table": 6,
    "session": 7,
    "connect": 8,
    "splicing": 6,
    "tunnel": 8,
    "__init__": 9,
    "server": 9,
    "requests": 9,
    "pcapng": 9,
    "trace": 10,
    "prometheus": 10,
    "pywsgi": 10,
    "cli.__init__": 0,
    "cli.errors": 0,
    "cli.address": 0,
    "cli.values": 2,
    "cli.logs": 0,
    "cli.signals": 0,
    "cli.stdio": 0,
    "cli.ends": 1,
    "cli.trunk": 9,
    "cli.snapshot": 10,
    "cli.control": 11,
    "cli.forwarding": 12,
    "cli.forward": 13,
    "cli.ping": 12,
    "cli.bench": 13,
    "cli.top": 12,
    "cli.parser": 14,
    "cli.main": 15,
    "__main__": 16,
}
"""Each module imports only modules of lower layers. A new module gets its line here."""

ALLOWED = {"gevent", "greenlet", *sys.stdlib_module_names}
"""What may be imported besides the package itself."""

OPTIONAL = {"requests": {"requests", "urllib3"}, "prometheus": {"prometheus_client"}, "cli.top": {"rich"}}
"""Modules that need more, and that nothing else imports: they serve those who have it."""

FOR_ANNOTATIONS = {("duplex", "session"), ("table", "session")}
"""Imports of a higher layer for type checkers alone: `stream.session` is an attribute for the user, and typed."""

LONGEST_FUNCTION = 50
"""Code lines, the docstring not among them."""

LONGEST_MODULE = 500
"""Lines. A longer module says in its docstring why: a paragraph that starts with `LENGTH_REASON`."""

LENGTH_REASON = "Longer than other modules because"


def name_of(path: Path) -> str:
    """The name of a module, without that of the package."""
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts)


every_module = pytest.mark.parametrize("path", MODULES, ids=name_of)


def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """Line and dotted name of each import, wherever it stands; relative names made absolute."""
    own = ["geyamux", *path.relative_to(PACKAGE).parts[:-1]]
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            above = own[: len(own) + 1 - node.level] if node.level else []
            base = ".".join([*above, *filter(None, [node.module])])
            if base in ("geyamux", "geyamux.cli"):
                # `from geyamux import frame` names a module where there is one of that name.
                for alias in node.names:
                    name = f"{base}.{alias.name}"
                    yield node.lineno, name if name.removeprefix("geyamux.") in LAYERS else f"{base}.__init__"
            else:
                yield node.lineno, base


def own_imports(path: Path) -> Iterator[tuple[int, str]]:
    """Line and name of each imported module of this package."""
    for line, name in imports(path):
        head, _, rest = name.partition(".")
        if head == "geyamux":
            yield line, rest or "__init__"


def for_type_checkers_alone(path: Path) -> set[int]:
    """The lines below `if TYPE_CHECKING:`, which no running program sees."""
    found: set[int] = set()
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            found.update(range(node.lineno, (node.body[-1].end_lineno or 0) + 1))
    return found


def code_lines(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    body = function.body[1:] if ast.get_docstring(function) is not None else function.body
    return (function.end_lineno or 0) - body[0].lineno + 1 if body else 0


def test_every_module_has_a_layer_and_every_layer_its_modules():
    assert {name_of(path) for path in MODULES} == set(LAYERS)


@every_module
def test_a_module_imports_only_modules_of_lower_layers(path):
    own = LAYERS[name_of(path)]
    unseen = for_type_checkers_alone(path)
    wrong = [
        f"line {line}: {name}"
        for line, name in own_imports(path)
        if LAYERS[name] >= own and not (line in unseen and (name_of(path), name) in FOR_ANNOTATIONS)
    ]
    assert not wrong, f"{path.name}, of layer {own}, imports: {wrong}"


@every_module
def test_a_module_imports_nothing_but_gevent_and_the_standard_library(path):
    names = {name.partition(".")[0] for _, name in imports(path)}
    assert names - ALLOWED - {"geyamux"} == OPTIONAL.get(name_of(path), set())


@every_module
def test_no_function_is_longer_than_one_can_read_at_once(path):
    functions = [node for node in ast.walk(tree(path)) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))]
    long = {node.name: code_lines(node) for node in functions if code_lines(node) > LONGEST_FUNCTION}
    assert long == {}


@every_module
def test_a_long_module_gives_its_reason(path):
    docstring = ast.get_docstring(tree(path)) or ""
    lines = len(path.read_text(encoding="utf-8").splitlines())
    reasons = [text for text in docstring.split("\n\n") if text.startswith(LENGTH_REASON)]
    assert lines <= LONGEST_MODULE or any(len(text) > len(LENGTH_REASON) + 20 for text in reasons), (
        f"{path.name} has {lines} lines; split it, or say why not: {LENGTH_REASON} ..."
    )


@every_module
def test_a_module_says_what_it_is(path):
    assert len(ast.get_docstring(tree(path)) or "") > 20


def test_only_the_modules_for_waking_and_reading_know_how_greenlets_park():
    """A switch anywhere else could strike in a place that is not ready for a kill. A stream's only reader parks on it."""
    parking = {"waking", "reader", "duplex"}
    for path in MODULES:
        calls = [
            node
            for node in ast.walk(tree(path))
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "switch"
        ]
        assert not calls or path.stem in parking, f"{path.name}: line {calls[0].lineno}"


def test_every_module_with_state_is_known_to_be_at_work():
    """A finaliser that interrupts one of them must hand over what it does (`may_act`)."""
    without_state = {
        "__init__",
        "config",
        "connect",
        "errors",
        "fileobj",
        "frame",
        "listener",
        "logs",
        "stats",
        "transport",
        # These call what everyone may call, or are called by what is at work.
        "pcapng",
        "prometheus",
        "pywsgi",
        "requests",
        "server",
        "trace",
        "splicing",
        "tunnel",
        "__main__",
    }
    without_state |= {name for name in LAYERS if name.startswith("cli.")}
    assert {f"geyamux.{name}" for name in LAYERS.keys() - without_state} == waiting._AT_WORK


def test_nobody_is_patched():
    """A library must not change what others import; asking whether they did is another matter."""
    for path in MODULES:
        names = {node.attr for node in ast.walk(tree(path)) if isinstance(node, ast.Attribute)}
        assert not [name for name in names if name.startswith("patch_")], path.name


def test_only_the_command_line_prints():
    for path in MODULES:
        if path.parent.name == "cli":
            continue
        names = [node for node in ast.walk(tree(path)) if isinstance(node, ast.Name) and node.id == "print"]
        assert not names, f"{path.name}: line {names[0].lineno}"
