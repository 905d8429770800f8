"""The order of layers in docs/architecture.md: imports run downwards only."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# From the top down. What stands in one line may import each other and whatever lies below.
LAYERS = (
    {"cli", "check", "namespaces", "demo", "__main__"},
    {"pipeline"},
    {"devplugins", "tasks"},
    {"images"},
    {"core", "faults"},
    {"batch", "capabilities", "errors", "syscalls", "units", "_core"},
)


def modules() -> Iterator[tuple[Path, str]]:
    """Every module of the package, and the layer's member that it belongs to."""
    for top in ("gpurestore", "pipeline", "devplugins"):
        for path in sorted((ROOT / top).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            if not (ROOT.joinpath(*parts[:2])).is_symlink() and parts[1] != "__init__":
                yield path, parts[1] if top == "gpurestore" else top


def imported(path: Path) -> set[str]:
    """Members of the package that a module imports, anywhere in it."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module == "gpurestore":
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("gpurestore."):
            names.add(node.module.split(".")[1])
    return names


def layer_of(member: str) -> int:
    return next(number for number, members in enumerate(LAYERS) if member in members)


def test_every_module_belongs_to_a_layer() -> None:
    found = {member for _, member in modules()}
    assert found | {"_core"} == set().union(*LAYERS)


@pytest.mark.parametrize("member", sorted(set().union(*LAYERS) - {"_core"}))
def test_imports_run_downwards(member: str) -> None:
    for path, own in modules():
        if own != member:
            continue
        for name in imported(path) & set().union(*LAYERS):
            assert layer_of(name) >= layer_of(own), f"{path} imports {name} from above"
            assert {own, name} != {"devplugins", "tasks"}, f"{path} imports {name} from beside"
