"""The fault points of the tool, read off its source, so that a new one cannot be forgotten."""

from __future__ import annotations

import ast
from pathlib import Path

import gpurestore
import gpurestore.pipeline


def _points() -> list[str]:
    found: set[str] = set()
    for package in (gpurestore, gpurestore.pipeline):
        assert package.__file__ is not None
        for path in Path(package.__file__).parent.rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Call) and _is_point(node.func) and isinstance(node.args[0], ast.Constant):
                    found.add(str(node.args[0].value))
    return sorted(found)


def _is_point(function: ast.expr) -> bool:
    match function:
        case ast.Attribute(value=ast.Name(id="faults"), attr="point"):
            return True
    return False


POINTS = _points()
DUMP_POINTS = [name for name in POINTS if name.startswith("dump.")]
RESTORE_POINTS = [name for name in POINTS if name.startswith("restore.")]
