"""Telling without reading it whether a file was written to since a dump summed it.

Every write to a file and every change of its owner, mode, length or names sets its ctime, which nobody can set back. A
file of the same device, inode, size and ctime, on the same machine, still has the bytes that were written - as far as
programs go: what a disk or memory loses on its own is found by reading alone (``restore --verify``).

A ctime may be as coarse as the kernel's tick, so a stamp is taken only when the tick of the last change is over: then
any later change gets a later one. Where ctimes are made by somebody else (network file systems) there are no stamps.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Final

import xxhash

from gpurestore.images.hashing import FileRecord, Stamp

# Below this a file is summed faster than it is worth talking about.
MIN_BYTES: Final = 4 << 20
_LOCAL: Final = frozenset({"ext4", "xfs", "btrfs", "tmpfs"})
_CLOCK_REALTIME_COARSE: Final = 5  # linux/time.h: the clock that ctimes are taken from


def this_machine() -> str:
    """What tells this machine from others, across boots; empty where nothing does."""
    try:
        identity = Path("/etc/machine-id").read_bytes().strip()
    except OSError:
        return ""
    return str(xxhash.xxh3_64_hexdigest(b"gpurestore " + identity)) if identity else ""


def take(fds: Mapping[str, int]) -> dict[str, Stamp]:
    """Stamps of open files that nobody writes to any more, by name. Waits for the end of a tick, some milliseconds."""
    stamps = {}
    for name, fd in fds.items():
        if os.fstat(fd).st_size >= MIN_BYTES and _is_local(fd) and _has_settled(fd):
            stamps[name] = of(os.fstat(fd))
    return stamps


def of(state: os.stat_result) -> Stamp:
    """The stamp that a file has now."""
    return Stamp(state.st_dev, state.st_ino, state.st_ctime_ns)


def is_unchanged(record: FileRecord, state: os.stat_result) -> bool:
    """Whether a file of this machine is as it was when it was recorded."""
    return record.stamp is not None and record.bytes == state.st_size and record.stamp == of(state)


def _has_settled(fd: int) -> bool:
    """Whether a write from now on would show in the ctime. Waits for that if the last one was only just."""
    tick_s = time.clock_getres(_CLOCK_REALTIME_COARSE)
    for _ in range(4):
        age_s = time.clock_gettime(_CLOCK_REALTIME_COARSE) - os.fstat(fd).st_ctime_ns / 1e9
        if age_s > tick_s:
            return True
        time.sleep(tick_s)
    return False  # the clock was set back


def _is_local(fd: int) -> bool:
    """Whether the file lies on a file system whose ctimes this kernel makes."""
    with open(f"/proc/self/fdinfo/{fd}") as info:
        mount_id = next(line.split()[1] for line in info if line.startswith("mnt_id:"))
    with open("/proc/self/mountinfo") as mounts:
        for line in mounts:
            fields = line.split()
            if fields[0] == mount_id:
                return fields[fields.index("-") + 1] in _LOCAL
    return False
