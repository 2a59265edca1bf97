"""Does something unforeseen at any statement of the package: raises there, or does what a finaliser may do there.

The interpreter runs signal handlers between any two instructions, and finalisers nearly so: what they do happens in the
middle of whatever runs, in a caller, in the hub, or in a greenlet of the package. To try all those places and not only
those that chance finds, this script loads the package with a call before each of its statements; the call counts, and
at the chosen one it strikes. Then it looks whether everyone else is unharmed.

Run it as a process of its own::

    cd tests && python -m callers.strike_every_line ACTION [STEP [FIRST]]

ACTION is a name from `ACTIONS`; it strikes at the statement FIRST and at each STEP-th after it (left out: at all). It
prints a line for each strike that did harm, and ends with the status 1 if any did. It knows nothing of pytest.
"""

from __future__ import annotations

import ast
import collections
import importlib.abc
import importlib.machinery
import importlib.util
import itertools
import pathlib
import sys
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import gevent

PACKAGE = "geyamux"
ROOT = pathlib.Path(__file__).resolve().parents[2]


class Point:
    """Counts statements of the package, and strikes at one of them."""

    def __init__(self) -> None:
        self.count = 0
        self.target = -1
        self.where = ""
        self.act: Callable[[], None] = lambda: None

    def pass_by(self, where: str) -> None:
        self.count += 1
        if self.count == self.target:
            self.where = where
            self.act()


point = Point()


class _Instrument(ast.NodeTransformer):
    """Puts a call before each statement of each function."""

    def __init__(self, module: str) -> None:
        self.module = module

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.FunctionDef:
        self.generic_visit(node)
        node.body = self._with_calls(node.body)
        return node

    def _with_calls(self, body: Sequence[ast.stmt]) -> list[ast.stmt]:
        return list(itertools.chain.from_iterable(self._with_call(statement) for statement in body))

    def _with_call(self, statement: ast.stmt) -> list[ast.stmt]:
        for name in ("body", "orelse", "finalbody"):
            block = getattr(statement, name, None)
            if block and not isinstance(statement, (ast.FunctionDef, ast.ClassDef)):
                setattr(statement, name, self._with_calls(block))
        for handler in getattr(statement, "handlers", ()):
            handler.body = self._with_calls(handler.body)
        if isinstance(statement, (ast.FunctionDef, ast.ClassDef, ast.Nonlocal)) or _is_docstring(statement):
            return [statement]
        where = f"{self.module}:{statement.lineno} [{ast.unparse(statement).splitlines()[0][:60]}]"
        call = ast.parse(f"__pass_by__({where!r})").body[0]
        return [ast.fix_missing_locations(ast.copy_location(call, statement)), statement]


def _is_docstring(statement: ast.stmt) -> bool:
    return isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)


class _Loader(importlib.machinery.SourceFileLoader):
    def get_code(self, fullname: str) -> Any:
        tree = ast.parse(pathlib.Path(self.path).read_text(encoding="utf-8"), self.path)
        tree = ast.fix_missing_locations(_Instrument(fullname.rpartition(".")[2]).visit(tree))
        return compile(tree, self.path, "exec")

    def exec_module(self, module: ModuleType) -> None:
        module.__dict__["__pass_by__"] = point.pass_by
        super().exec_module(module)


class _Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, fullname: str, path: Any, target: Any = None) -> Any:
        if fullname != PACKAGE and not fullname.startswith(PACKAGE + "."):
            return None
        parts = fullname.split(".")
        place = ROOT.joinpath(*parts)
        file = place / "__init__.py" if place.is_dir() else place.with_suffix(".py")
        inside = [str(place)] if place.is_dir() else None
        return importlib.util.spec_from_file_location(
            fullname, file, loader=_Loader(fullname, str(file)), submodule_search_locations=inside
        )


sys.meta_path.insert(0, _Finder())

from callers.scene import Scene, Strike, fresh_faults  # noqa: E402  # it must import the package so


def _raise() -> None:
    raise Strike(point.where)


#: By name: what happens at the point; the talks that may break; whether the session may end.
ACTIONS: dict[str, tuple[Callable[[Scene], Any], Sequence[str], bool]] = {
    "raise": (lambda scene: _raise(), (), True),
    "close": (lambda scene: [end.close() for end in scene.victims[0]], ("victim",), False),
    "reset": (lambda scene: [pair[0].reset(7) for pair in scene.victims], ("victim", "other victim"), False),
    "close session": (lambda scene: scene.client._begin_close(1.0), (), True),
    "abort": (lambda scene: scene.client.abort(), (), True),
}


def strike(action: str, target: int) -> tuple[list[str], int]:
    """One run: its faults, and how many statements it had."""
    do, may_break, may_end = ACTIONS[action]
    scene = Scene()

    def act() -> None:
        point.target = -1
        do(scene)

    point.count, point.where, point.act, point.target = 0, "", act, target
    scene.run()
    total, point.target = point.count, -1
    faults = list(scene.faults(may_break, may_end=may_end, may_hang=action == "raise"))
    faults += [*scene.end(), *fresh_faults()]
    return faults, total


def _be_quiet(context: Any, kind: Any, value: Any, traceback: Any) -> None:
    """What is raised in the hub is ours, and would be printed."""
    if not issubclass(kind, (Strike, gevent.GreenletExit)):
        sys.excepthook(kind, value, traceback)


def main(action: str, step: int = 1, first: int = 1) -> int:
    vars(gevent.get_hub())["handle_error"] = _be_quiet
    _, total = strike(action, -1)
    harm: collections.Counter[str] = collections.Counter()
    tried = 0
    for target in range(first, total, step):
        faults, _ = strike(action, target)
        tried += 1
        for fault in faults:
            harm[point.where] += 1
            print(f"{action} at statement {target}, {point.where}: {fault}", flush=True)
        if any("another session" in fault for fault in faults):
            # What all sessions of the hub share is broken: a new one for the next run.
            vars(gevent.get_hub()).pop("_geyamux_waker", None)
    print(f"{action}: {tried} strikes at {total} statements, harm at {len(harm)} places")
    return 1 if harm or not tried else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], *map(int, sys.argv[2:])))
