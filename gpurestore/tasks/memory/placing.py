"""Small pages for a task's private memory, put there from outside and straight from the page cache (``UFFDIO_COPY``).

The kernel then need not clear them first, nor take a fault for each.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from gpurestore.batch import Call
from gpurestore.core import ffi, lib
from gpurestore.tasks.memory import userfaultfd


def plan_open() -> list[Call]:
    """The task gets a userfaultfd that handles no fault; the result is its number."""
    return userfaultfd.plan_open(os.O_CLOEXEC | userfaultfd.USER_MODE_ONLY)


def plan_register(uffd: int, ranges: Sequence[tuple[int, int]], features: int = 0) -> list[Call]:
    """Let pages of mappings be placed or, with the feature MOVE, moved there."""
    # Write protection is never used. Of all modes it is the one in which an untouched page costs nothing extra.
    register = userfaultfd.plan_register(uffd, ranges, userfaultfd.WRITE_PROTECT)
    return [*userfaultfd.plan_api(uffd, features), *register]


class Placing:
    """Puts pages of the file behind ``pages_fd`` into the memory of the task ``pid``, whose userfaultfd is ``uffd``.

    Raises OSError, CoreError where that is not to be had.
    """

    def __init__(self, pid: int, uffd: int, pages_fd: int) -> None:
        handle = ffi.new("struct gr_placing *")
        if ret := lib.gr_placing_of_task(userfaultfd.take(pid, uffd), pages_fd, handle):
            raise OSError(-ret, os.strerror(-ret))
        # A restore that fails has nobody to close it.
        self._handle = ffi.gc(handle, lib.gr_placing_destroy)

    @property
    def handle(self) -> Any:
        """The ``struct gr_placing *``."""
        return self._handle

    def close(self) -> None:
        """No thread uses it any more."""
        ffi.release(self._handle)
