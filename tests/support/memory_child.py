"""A child process with memory of known content, for tests that look at it from outside."""

from __future__ import annotations

import ctypes
import os
import signal
from array import array
from collections.abc import Callable
from typing import Self

from gpurestore.images import pb
from gpurestore.images.folder import ImageFolder
from gpurestore.images.pagemap import read_pagemap
from gpurestore.images.writer import ImageWriter
from gpurestore.tasks.memory import PagePlan, filling
from gpurestore.tasks.memory.hugepages import HugeBlocks

PAGE = 4096
PROT_NONE, PROT_READ, PROT_RW = 0, 1, 3
MAP_SHARED, MAP_PRIVATE, MAP_ANONYMOUS, MAP_NORESERVE, MAP_GROWSDOWN = 1, 2, 0x20, 0x4000, 0x100

libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.restype = ctypes.c_void_p
libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
libc.mlock.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]


def map_memory(
    size: int, prot: int = PROT_RW, flags: int = MAP_PRIVATE | MAP_ANONYMOUS, fd: int = -1, offset: int = 0, at: int = 0
) -> int:
    """mmap; returns the address."""
    address = libc.mmap(at or None, size, prot, flags, fd, offset)
    if address in (None, ctypes.c_void_p(-1).value):
        raise OSError(ctypes.get_errno(), "mmap")
    return int(address)


def pattern(address: int, nr_pages: int = 1) -> bytes:
    """Content that differs from page to page."""
    return b"".join((address + i * PAGE).to_bytes(8, "little") * (PAGE // 8) for i in range(nr_pages))


def fill(address: int, nr_pages: int = 1) -> None:
    """Write the pattern of ``address`` there."""
    ctypes.memmove(address, pattern(address, nr_pages), nr_pages * PAGE)


class MemoryChild:
    """Forks; the child runs ``prepare``, then sleeps until the end of the ``with`` block.

    ``prepare`` returns numbers (addresses) that become ``values`` here.
    """

    def __init__(self, prepare: Callable[[], list[int]]) -> None:
        self._prepare = prepare
        self.pid = 0
        self.values: list[int] = []

    def __enter__(self) -> Self:
        reader, writer = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            try:
                os.close(reader)
                values = self._prepare()
                os.write(writer, " ".join(map(str, values)).encode())
                os.close(writer)
                while True:
                    signal.pause()
            finally:
                os._exit(1)
        os.close(writer)
        with os.fdopen(reader, "rb") as pipe:
            self.values = [int(value) for value in pipe.read().split()]
        assert self.values, "the child could not prepare its memory"
        return self

    def __exit__(self, *_: object) -> None:
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)


def plan_offsets(
    found: ImageFolder, size: int, huge: HugeBlocks | None = None, chunk_bytes: int = filling.CHUNK_BYTES
) -> PagePlan:
    """Plan the pages of task 1 as those of an object of ``size`` bytes: its addresses are offsets."""
    kind = b"\0" if huge is None else b"\3"
    ranges = array("Q", [0]), array("Q", [size]), kind
    return filling._plan(found, read_pagemap(found, "pagemap", 1), "pagemap-1.img", ranges, chunk_bytes, huge)


def commit_images(writer: ImageWriter) -> None:
    """Make ``writer``'s folder one that can be read."""
    writer.write("inventory", [pb.inventory_entry(img_version=2, fdinfo_per_id=True, ns_per_id=True)])
    writer.commit(sync=False)
