"""The restore's half: a checked queue of reads that brings pages back to their places."""

from __future__ import annotations

import bisect
import errno
import mmap
import os
from array import array
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from gpurestore.core import Cancel, Region, check, ffi, lib, new_error
from gpurestore.errors import CoreError, ImageError
from gpurestore.images import pb
from gpurestore.images.chunked import PagesImage, find_pages
from gpurestore.images.magic import KINDS
from gpurestore.images.pagemap import Pagemap, read_pagemap
from gpurestore.tasks import vmaflags
from gpurestore.tasks.maps import PAGE_BYTES
from gpurestore.tasks.memory.compressed import CompressedPages
from gpurestore.tasks.memory.runs import default_jobs, u64

if TYPE_CHECKING:
    from gpurestore.images.folder import ImageFolder

_FILL, _SKIP, _REFUSE = 0, 1, 2  # enum gr_pump_kind

# What one preadv of a restore brings in: large enough to forget the cost of a call, small enough to share and cancel.
CHUNK_BYTES: Final = 4 << 20


@dataclass(frozen=True, slots=True)
class PagePlan:
    """A queue of reads that fills memory from one pages image; checked, not started. Any thread may use it."""

    pages_name: str
    filled: frozenset[int]  # starts of the mappings that it writes to
    total_bytes: int
    handle: Any
    compressed: CompressedPages | None = None  # then :meth:`run` is not for this plan: use this instead

    @property
    def done_bytes(self) -> int:
        """How much is in place."""
        if self.compressed is not None:
            return self.compressed.done_bytes
        return int(lib.gr_pump_queue_done_bytes(self.handle))

    @property
    def nr_chunks(self) -> int:
        """How many threads can possibly work on it at once."""
        if self.compressed is not None:
            return self.compressed.nr_chunks
        return int(lib.gr_pump_queue_nr_chunks(self.handle))

    def run(self, region: Region, slot: int, tid: int, pages_fd: int, cancel: Cancel | None = None) -> None:
        """Have thread ``tid``, which serves ``slot``, fill its own task until nothing is left to do. Blocks.

        ``pages_fd`` is the task's descriptor of the pages image. To be called once per slot that takes part.
        """
        err = new_error()
        flag = cancel.flag if cancel else ffi.NULL
        check(lib.gr_pump_run(region.handle, slot, tid, pages_fd, self.handle, flag, err), err)

    def fill(self, base: int, pages_fd: int, jobs: int | None = None, cancel: Cancel | None = None) -> None:
        """Fill memory of this process: offset 0 lies at ``base``. Blocks."""
        if self.compressed is not None:
            self.compressed.fill(base, pages_fd, jobs or default_jobs(), cancel)
            return
        err = new_error()
        flag = cancel.flag if cancel else ffi.NULL
        check(lib.gr_pump_fill(self.handle, base, pages_fd, jobs or default_jobs(), flag, err), err)


def plan_pages(folder: ImageFolder, pid: int, mm: pb.mm_entry, chunk_bytes: int = CHUNK_BYTES) -> PagePlan:
    """Check the pagemap of a task against its mappings and its pages image. Raises ImageError; changes nothing.

    ``mm`` went through :func:`gpurestore.tasks.mm.validate`.
    """
    vmas = [vma for vma in mm.vmas if not vmaflags.is_guard(vma) and not vma.status & vmaflags.VSYSCALL]
    kinds = bytes(_pump_kind(vma) for vma in vmas)
    starts, ends = array("Q", [vma.start for vma in vmas]), array("Q", [vma.end for vma in vmas])
    return _plan(folder, "pagemap", pid, starts, ends, kinds, chunk_bytes)


def plan_object(folder: ImageFolder, ident: int, size: int, chunk_bytes: int = CHUNK_BYTES) -> PagePlan:
    """The same for an object of ``size`` bytes: shared anonymous memory or a memfd."""
    nr_pages = -(-size // PAGE_BYTES)
    if not 0 < nr_pages < 1 << 50:
        raise ImageError(f"{folder.path}: shared memory {ident} has the impossible size {size}")
    ends = array("Q", [nr_pages * PAGE_BYTES])
    return _plan(folder, "pagemap-shmem", ident, array("Q", [0]), ends, bytes([_FILL]), chunk_bytes)


def fill_file(
    folder: ImageFolder, ident: int, fd: int, size: int, *, jobs: int | None = None, cancel: Cancel | None = None
) -> None:
    """Bring the content of an object into the file (a memfd of ``size`` bytes, not sealed) behind ``fd``."""
    if size == 0:
        return
    plan = plan_object(folder, ident, size)
    if plan.total_bytes == 0:
        return
    with open_pages(folder, plan) as pages, mmap.mmap(fd, size) as memory:
        address = ffi.from_buffer(memory)
        try:
            plan.fill(int(ffi.cast("uintptr_t", address)), pages.fileno(), jobs, cancel)
        finally:
            ffi.release(address)


def open_pages(folder: ImageFolder, plan: PagePlan) -> Any:
    """The pages image of ``plan`` as an open file."""
    return open(folder.open_raw(plan.pages_name), "rb", buffering=0)


def read_page_bytes(folder: ImageFolder, pid: int, start: int, end: int) -> bytes:
    """Stored pages of a task from ``start`` to ``end``, which one entry of its pagemap must cover; else nothing.

    For a pagemap that :func:`plan_pages` accepted: every entry is stored here, in ascending order.
    """
    pagemap = read_pagemap(folder, "pagemap", pid)
    at = bisect.bisect(pagemap.vaddrs, start) - 1
    if at < 0 or end > pagemap.vaddrs[at] + pagemap.nr_pages[at] * PAGE_BYTES:
        return b""
    offset = sum(pagemap.nr_pages[:at]) * PAGE_BYTES + start - pagemap.vaddrs[at]
    image = find_pages(folder, pagemap.pages_id)
    with open(folder.open_raw(image.name), "rb", buffering=0) as pages:
        if image.index is not None:
            return image.index.read(pages.fileno(), offset, end - start)
        return os.pread(pages.fileno(), end - start, offset)


def _pump_kind(vma: pb.vma_entry) -> int:
    if vmaflags.is_kernels(vma):
        return _SKIP
    return _FILL if vmaflags.is_private(vma) else _REFUSE


def _plan(
    folder: ImageFolder,
    kind: str,
    ident: int,
    starts: array[int],
    ends: array[int],
    kinds: bytes,
    chunk_bytes: int,
) -> PagePlan:
    pagemap = read_pagemap(folder, kind, ident)
    image = find_pages(folder, pagemap.pages_id) if len(pagemap) else PagesImage("", 0, 0)
    name = f"{folder.path}/{KINDS[kind].file_name(ident)}"
    handle, touched = _create_queue(pagemap, (starts, ends, kinds), image.stream_bytes, chunk_bytes, name)
    filled = frozenset(start for start, flag in zip(starts, touched, strict=True) if flag)
    skips = [(start, end) for start, end, what in zip(starts, ends, kinds, strict=True) if what == _SKIP]
    compressed = CompressedPages(image.index, pagemap, skips) if image.index is not None else None
    return PagePlan(image.name, filled, int(lib.gr_pump_queue_total_bytes(handle)), handle, compressed)


def _create_queue(
    pagemap: Pagemap, ranges: tuple[array[int], array[int], bytes], file_bytes: int, chunk_bytes: int, name: str
) -> tuple[Any, bytes]:
    starts, ends, kinds = ranges
    touched = bytearray(len(starts))
    keep = {
        "starts": u64(starts),
        "ends": u64(ends),
        "kinds": ffi.from_buffer("uint8_t[]", kinds),
        "touched": ffi.from_buffer("uint8_t[]", touched),
        "nr": len(starts),
    }
    c_ranges = ffi.new("struct gr_pump_ranges *", keep)
    c_pagemap = ffi.new(
        "struct gr_pump_pagemap *",
        {
            "vaddrs": u64(pagemap.vaddrs),
            "nr_pages": u64(pagemap.nr_pages),
            "flags": ffi.from_buffer("uint32_t[]", pagemap.flags),
            "nr": len(pagemap),
        },
    )
    err, out = new_error(), ffi.new("struct gr_pump_queue **")
    try:
        check(lib.gr_pump_queue_create(c_pagemap, c_ranges, file_bytes, chunk_bytes, out, err), err)
    except CoreError as error:
        if error.errno == errno.EINVAL:
            raise ImageError(f"{name}: {error.context}") from error
        raise
    return ffi.gc(out[0], lib.gr_pump_queue_destroy), bytes(touched)
