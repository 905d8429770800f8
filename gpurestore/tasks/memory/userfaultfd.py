"""A task's userfaultfd: the task makes it and registers memory with it, this process works with a duplicate."""

from __future__ import annotations

import os
import struct
from collections.abc import Sequence
from typing import Final

from gpurestore import core
from gpurestore.batch import Call, InOut, Ref
from gpurestore.syscalls import NR

# linux/userfaultfd.h
USER_MODE_ONLY = 1
EVENT_FORK, EVENT_REMAP, EVENT_REMOVE, MISSING_SHMEM, EVENT_UNMAP, THREAD_ID = 2, 4, 8, 32, 64, 256
MOVE = 1 << 16
MISSING, WRITE_PROTECT = 1, 2
UFFDIO_API: Final = 0xC018AA3F
_UFFDIO_REGISTER: Final = 0xC020AA00
_UFFD_API: Final = 0xAA
_API: Final = struct.Struct("=QQQ")  # api, features, ioctls
_REGISTER: Final = struct.Struct("=QQQQ")  # start, bytes, mode, ioctls


def plan_open(flags: int) -> list[Call]:
    """The result is its number. With USER_MODE_ONLY no right is needed, and faults of the kernel are not reported."""
    return [Call(NR.USERFAULTFD, (flags,), "making a userfaultfd")]


def api(features: int) -> bytes:
    """The argument of UFFDIO_API, which fails where the kernel lacks one of the ``features``."""
    return _API.pack(_UFFD_API, features, 0)


def plan_api(uffd: int | Ref, features: int) -> list[Call]:
    """Has to come first, and once."""
    what = f"asking userfaultfd for the features {features:#x}"
    return [Call(NR.IOCTL, (uffd, UFFDIO_API, InOut(api(features))), what, want=0)]


def plan_register(uffd: int, ranges: Sequence[tuple[int, int]], mode: int) -> list[Call]:
    """Register mappings, from start to end."""
    return [
        Call(
            NR.IOCTL,
            (uffd, _UFFDIO_REGISTER, InOut(_REGISTER.pack(start, end - start, mode, 0))),
            f"registering {start:x}-{end:x} with userfaultfd",
            want=0,
        )
        for start, end in ranges
    ]


def plan_close(uffd: int) -> list[Call]:
    """Once nobody has it open, the registrations are off all mappings, which are joined again as they were."""
    return [Call(NR.CLOSE, (uffd,), "closing the userfaultfd", want=0)]


def take(pid: int, uffd: int) -> int:
    """A duplicate for this process, to be closed by the caller. Raises OSError, CoreError."""
    pidfd = os.pidfd_open(pid)
    try:
        return core.pidfd_getfd(pidfd, uffd)
    finally:
        os.close(pidfd)
