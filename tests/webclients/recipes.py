"""The examples as modules, so that more can be asked of their recipes than they show."""

from __future__ import annotations

import types
from pathlib import Path

EXAMPLES = Path(__file__).parent.parent.parent / "examples"
PATCHING = "monkey.patch_all()\n"


def recipe(name: str) -> types.ModuleType:
    """An example, loaded without being run, and without patching the process that it is loaded in."""
    path = EXAMPLES / name
    module = types.ModuleType(path.stem)
    exec(compile(path.read_text(encoding="utf-8").replace(PATCHING, "\n"), str(path), "exec"), module.__dict__)
    return module
