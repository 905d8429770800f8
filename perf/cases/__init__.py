"""The cases of the suite, one module each, in the order in which they run."""

from __future__ import annotations

from importlib import import_module
from typing import cast

from suite import Case

NAMES = (
    "startup",
    "eager",
    "cold",
    "dump",
    "fragmented",
    "tasks",
    "shared",
    "forked",
    "lazy",
    "compressed",
    "cancel",
    "overhead",
    "overlap",
    "gpu",
)


def load(name: str) -> Case:
    """The case ``name``."""
    return cast(Case, import_module(f"cases.{name}"))
