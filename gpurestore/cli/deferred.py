"""Modules that our libraries import and a dump or restore never uses: loaded when they are first touched, if ever.

trio brings DTLS and international host names, protobuf its implementation in pure Python beside the compiled one:
together they would be a tenth of a small restore. ``importlib.util.LazyLoader`` is the interpreter's own means for
this. Only for a process that is all ours: a module that is broken would fail later than its importer expects.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec, PathFinder
from importlib.util import LazyLoader
from types import ModuleType

NAMES = frozenset({"google.protobuf.internal.python_message", "hmac", "idna"})


class _Finder:
    """Stands in front of the other finders for :data:`NAMES`."""

    @staticmethod
    def find_spec(name: str, path: Sequence[str] | None, _target: ModuleType | None = None) -> ModuleSpec | None:
        spec = PathFinder.find_spec(name, path) if name in NAMES else None
        if spec is not None and spec.loader is not None:
            spec.loader = LazyLoader(spec.loader)
        return spec


def defer() -> None:
    """From now on. What was imported already stays as it is."""
    sys.meta_path.insert(0, _Finder)
