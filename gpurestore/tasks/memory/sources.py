"""Pages images as sources of reads: through the page cache, or past it where they are not in there."""

from __future__ import annotations

import fcntl
import mmap
import os
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Final, Self

from gpurestore.core import ffi, lib
from gpurestore.tasks.maps import PAGE_BYTES

# Reads in flight that keep a disk busy, and their size. Larger ones are not faster (docs/performance.md), and a task
# that is killed waits for what is in flight.
COLD_WORKERS: Final = 8
COLD_CHUNK_BYTES: Final = 2 << 20
# An image with less than this outside of the page cache is read through it.
_MIN_COLD_BYTES: Final = 4 << 20


class Reading(StrEnum):
    """How pages images are read. AUTO: chunk by chunk, whichever is better."""

    AUTO = "auto"
    CACHED = "cached"
    DIRECT = "direct"


@dataclass(slots=True)
class PagesSource:
    """An open pages image. ``direct_fd`` is the same file with O_DIRECT, or -1. To be closed by whoever opened it."""

    fd: int
    direct_fd: int = -1
    always_direct: bool = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close both."""
        for fd in (self.fd, self.direct_fd):
            if fd >= 0:
                os.close(fd)
        self.fd = self.direct_fd = -1

    @property
    def handle(self) -> Any:
        """The ``struct gr_pump_source *``."""
        return ffi.new("struct gr_pump_source *", (self.fd, self.direct_fd, int(self.always_direct)))

    def move_above(self, lowest_fd: int) -> None:
        """Give it numbers from ``lowest_fd`` on."""
        for name in ("fd", "direct_fd"):
            fd = getattr(self, name)
            if fd >= 0:
                setattr(self, name, fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, lowest_fd))
                os.close(fd)


def open_source(fd: int, reading: Reading) -> PagesSource:
    """The source behind ``fd``, which it takes over. Direct reads are left out where the file system has none."""
    source = PagesSource(fd, always_direct=reading is Reading.DIRECT)
    if reading is Reading.DIRECT or (reading is Reading.AUTO and cold_bytes(fd) >= _MIN_COLD_BYTES):
        source.direct_fd = _open_direct(fd)
    return source


def cold_bytes(fd: int) -> int:
    """How much of a file is not in the page cache."""
    size = os.fstat(fd).st_size
    return max(0, size - int(lib.gr_cached_bytes(fd, 0, size)))


def _open_direct(fd: int) -> int:
    """The same file with O_DIRECT; -1 unless it can be read that way in whole pages at any page's offset."""
    try:
        direct = os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_DIRECT | os.O_CLOEXEC)
    except OSError:
        return -1
    try:
        with mmap.mmap(-1, PAGE_BYTES) as page:
            offset = PAGE_BYTES if os.fstat(fd).st_size >= 2 * PAGE_BYTES else 0
            if os.preadv(direct, [page], offset) == PAGE_BYTES:
                return direct
    except OSError:
        pass  # told by what follows
    os.close(direct)
    return -1
