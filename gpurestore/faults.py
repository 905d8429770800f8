"""Named fault points: tests make an operation fail, or the tool die, at exactly one of them.

``GPURESTORE_FAULT=dump.frozen:fail`` raises GpurestoreError there, ``...:kill`` sends SIGKILL to this process,
``...:interrupt`` SIGINT. Without the variable a point costs one look-up. docs/architecture.md lists the points.
"""

from __future__ import annotations

import os
import signal

from gpurestore.errors import GpurestoreError

_VARIABLE = "GPURESTORE_FAULT"


def point(name: str) -> None:
    """Do here what the environment asks for at point ``name``."""
    wanted = os.environ.get(_VARIABLE)
    if not wanted or not wanted.startswith(f"{name}:"):
        return
    match wanted.removeprefix(f"{name}:"):
        case "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        case "interrupt":
            os.kill(os.getpid(), signal.SIGINT)
        case "fail":
            raise GpurestoreError(f"fault injected at {name} by {_VARIABLE}")
        case action:
            raise GpurestoreError(f"{_VARIABLE} asks for {action!r} at {name}; known: kill, interrupt, fail")
