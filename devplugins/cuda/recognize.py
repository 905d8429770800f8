"""Which tasks use CUDA, found from outside in microseconds, and what is left of its devices in a task."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

PROC = Path("/proc")
DEVICE_PREFIX = "/dev/nvidia"
_LIBRARY = b"/libcuda.so"
_GPU_NODE = re.compile(r"/dev/nvidia(\d+)$")


@dataclass(frozen=True, slots=True)
class Traces:
    """What a task has of the driver."""

    library: bool  # libcuda is mapped
    devices: tuple[str, ...]  # device files that it holds open

    @property
    def minors(self) -> frozenset[int]:
        """Numbers of the GPUs whose files are open."""
        return frozenset(int(found[1]) for path in self.devices if (found := _GPU_NODE.search(path)))

    def __bool__(self) -> bool:
        return self.library or bool(self.devices)


def traces(pid: int, proc: Path = PROC) -> Traces:
    """Look at a task's mappings and descriptors. A task that is gone has none."""
    return Traces(_has_library(pid, proc), _devices(pid, proc))


def _has_library(pid: int, proc: Path) -> bool:
    # A process that was checkpointed by somebody else has no device open any more, but still this.
    try:
        maps = (proc / str(pid) / "maps").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return False
    return _LIBRARY in maps or DEVICE_PREFIX.encode() in maps


def _devices(pid: int, proc: Path) -> tuple[str, ...]:
    found = set()
    folder = f"{proc}/{pid}/fd"
    try:
        names = os.listdir(folder)
    except (FileNotFoundError, ProcessLookupError):
        return ()
    for name in names:
        try:
            target = os.readlink(f"{folder}/{name}")
        except OSError:
            continue
        if target.startswith(DEVICE_PREFIX):
            found.add(target)
    return tuple(sorted(found))


def device_path(fd: int) -> str | None:
    """The device file behind one of our descriptors if it is NVIDIA's."""
    target = os.readlink(f"/proc/self/fd/{fd}")
    return target if target.startswith(DEVICE_PREFIX) else None


def thread_is_stopped(pid: int, tid: int, proc: Path = PROC) -> bool:
    """Whether a thread is held by a tracer or a stop signal."""
    try:
        text = (proc / str(pid) / "task" / str(tid) / "stat").read_text(errors="replace")
    except OSError:
        return False
    return text.rpartition(")")[2].split()[0] in "tT"


def exists(pid: int, proc: Path = PROC) -> bool:
    """Whether the task is there and no zombie."""
    try:
        text = (proc / str(pid) / "stat").read_text(errors="replace")
    except OSError:
        return False
    return text.rpartition(")")[2].split()[0] not in "ZX"
