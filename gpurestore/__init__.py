"""Dump a running process tree that uses accelerators, and restore it fast.

``dump`` and ``restore`` are async (trio); ``dump_sync`` and ``restore_sync`` are the same for callers without a loop.
Names are loaded when they are first used, so that importing the package costs next to nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gpurestore.errors import (
        CallFailedError,
        CancelledError,
        CoreError,
        Finding,
        FindingsError,
        GpurestoreError,
        ImageError,
        LazyPagesError,
        NeedsPersonError,
        NoSuchTaskError,
        PrivilegeError,
        RestoreCheckError,
        TaskDiedError,
        TracedError,
        UnsupportedResourceError,
        UsageError,
    )
    from gpurestore.pipeline.dump import DumpResult, dump, dump_sync
    from gpurestore.pipeline.restore import RestoreResult, restore, restore_sync

__version__ = "0.1.0"

_HOME = {
    **dict.fromkeys(("DumpResult", "dump", "dump_sync"), "gpurestore.pipeline.dump"),
    **dict.fromkeys(("RestoreResult", "restore", "restore_sync"), "gpurestore.pipeline.restore"),
    **dict.fromkeys(
        (
            "CallFailedError",
            "CancelledError",
            "CoreError",
            "Finding",
            "FindingsError",
            "GpurestoreError",
            "ImageError",
            "LazyPagesError",
            "NeedsPersonError",
            "NoSuchTaskError",
            "PrivilegeError",
            "RestoreCheckError",
            "TaskDiedError",
            "TracedError",
            "UnsupportedResourceError",
            "UsageError",
        ),
        "gpurestore.errors",
    ),
}

__all__ = [
    "CallFailedError",
    "CancelledError",
    "CoreError",
    "DumpResult",
    "Finding",
    "FindingsError",
    "GpurestoreError",
    "ImageError",
    "LazyPagesError",
    "NeedsPersonError",
    "NoSuchTaskError",
    "PrivilegeError",
    "RestoreCheckError",
    "RestoreResult",
    "TaskDiedError",
    "TracedError",
    "UnsupportedResourceError",
    "UsageError",
    "__version__",
    "dump",
    "dump_sync",
    "include_dir",
    "restore",
    "restore_sync",
]


def include_dir() -> str:
    """The folder of ``gpurestore-plugin.h``, for compiling device plugins written in C."""
    import os

    return os.path.join(os.path.dirname(__file__), "include")


def __getattr__(name: str) -> Any:
    home = _HOME.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    value = getattr(importlib.import_module(home), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
