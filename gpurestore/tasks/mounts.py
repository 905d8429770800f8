"""The mounts that this process sees, as far as files need them: which mount a file lies on, and of what kind."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import NamedTuple


class Mount(NamedTuple):
    """One line of /proc/self/mountinfo."""

    mnt_id: int
    dev: int
    mountpoint: str
    fs_type: str


def parse(text: str) -> dict[int, Mount]:
    """Parse mountinfo (proc(5)); the fields after the ``-`` are file system type, source and options."""
    mounts = {}
    for line in text.splitlines():
        left, _, right = line.partition(" - ")
        words = left.split(" ")
        if len(words) < 6 or not right:
            raise ValueError(f"mountinfo line {line!r}")
        major, _, minor = words[2].partition(":")
        mnt_id = int(words[0])
        mounts[mnt_id] = Mount(mnt_id, os.makedev(int(major), int(minor)), _unescape(words[4]), right.split(" ")[0])
    return mounts


def read() -> dict[int, Mount]:
    """The mounts of our own namespace."""
    with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as file:
        return parse(file.read())


def of_path(mounts: Mapping[int, Mount], path: str) -> Mount | None:
    """The mount that ``path`` lies on by its name: the longest mount point above it, the latest where several are."""
    best = None
    for mount in mounts.values():
        point = mount.mountpoint.rstrip("/")
        inside = path == mount.mountpoint or path.startswith(point + "/")
        if inside and (best is None or len(mount.mountpoint) >= len(best.mountpoint)):
            best = mount
    return best


def _unescape(name: str) -> str:
    """Blanks, tabs, line ends and backslashes are written as three octal digits."""
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), name)
