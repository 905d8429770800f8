"""What documents say of the tree is so: files that they name are there, lists that they give are whole."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from support.faults import POINTS

ROOT = Path(__file__).parents[2]
DOCUMENTS = [*sorted((ROOT / "docs").glob("*.md")), ROOT / "README.md", ROOT / "CHANGELOG.md"]
_FILE = re.compile(r"`([\w./*-]+\.(?:py|c|h|lds|md|proto|sh))`")
_LINK = re.compile(r"\]\((?!http)([^)#]+)\)")
_STANDS_FOR_MANY = re.compile(r"NAME|PID|\*")


def files() -> list[str]:
    folders = ("cext", "devplugins", "docs", "gpurestore", "perf", "pipeline", "tests")
    found = [path for folder in folders for path in (ROOT / folder).rglob("*.*")]
    return [str(path.relative_to(ROOT)) for path in (*found, *ROOT.iterdir())]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_file_that_a_document_names_is_there(document: Path) -> None:
    text = document.read_text()
    there = files()
    for name in set(_FILE.findall(text)):
        if not _STANDS_FOR_MANY.search(name):
            assert any(path == name or path.endswith(f"/{name}") for path in there), f"there is no {name}"
    for link in set(_LINK.findall(text)):
        assert (document.parent / link).exists(), f"a link leads to {link}"


def test_the_list_of_fault_points_is_whole() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text()
    section = text.split("### Fault points")[1].split("\n### ")[0]
    named = re.findall(r"`((?:dump|restore)?\.\w+)`", section)
    operation, points = "", []
    for name in named:
        operation = name.split(".")[0] or operation
        points.append(f"{operation}.{name.split('.')[1]}")
    assert sorted(points) == POINTS
