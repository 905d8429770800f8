"""Character devices without state of their own: null, zero, full, random, urandom.

They are regular entries in files.img (path, flags, position). All others - terminals, GPUs, tun, kvm, ... - have state
behind the device number that only a device plugin could carry, so a dump refuses them.
"""

from __future__ import annotations

import os
import stat

from gpurestore.errors import Finding
from gpurestore.tasks.fdinfo import OpenFile

_MEM_MAJOR = 1
_STATELESS = {3: "null", 5: "zero", 7: "full", 8: "random", 9: "urandom"}
_TTY_MAJORS = frozenset({4, 5, *range(136, 144)})


def refuse(file: OpenFile) -> Finding | None:
    """Why ``file``, a character device, cannot be dumped; None if it can."""
    major, minor = os.major(file.stat.st_rdev), os.minor(file.stat.st_rdev)
    if major == _MEM_MAJOR and minor in _STATELESS:
        return None
    if major in _TTY_MAJORS:
        why = "terminals are not carried yet; redirect the job's input and output to files"
        return Finding(file.where, f"terminal {file.link}", why)
    why = "no handler knows the state behind this device"
    return Finding(file.where, f"character device {file.link} ({major}:{minor})", why)


def mismatch(have: os.stat_result, rdev: int | None) -> str | None:
    """What is wrong with a device found at restore; ``rdev`` is the dumped number where the images tell it."""
    if not stat.S_ISCHR(have.st_mode):
        return "is not a character device any more"
    if rdev is not None and have.st_rdev != rdev:
        return f"is device {os.major(have.st_rdev)}:{os.minor(have.st_rdev)}, not {os.major(rdev)}:{os.minor(rdev)}"
    if os.major(have.st_rdev) != _MEM_MAJOR or os.minor(have.st_rdev) not in _STATELESS:
        return "is another device than null, zero, full, random or urandom"
    return None
