"""The restore's half: a checked queue of reads that brings pages back to their places."""

from __future__ import annotations

import bisect
import errno
import mmap
import os
from array import array
from collections.abc import Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, TypeAlias

from gpurestore.core import Cancel, Region, check, ffi, lib, new_error
from gpurestore.errors import CoreError, ImageError
from gpurestore.images import pb
from gpurestore.images.chunked import PagesImage, find_pages
from gpurestore.images.magic import KINDS
from gpurestore.images.pagemap import Pagemap, read_pagemap
from gpurestore.tasks import vmaflags
from gpurestore.tasks.maps import PAGE_BYTES
from gpurestore.tasks.memory import hugepages
from gpurestore.tasks.memory.compressed import CompressedPages
from gpurestore.tasks.memory.hugepages import HugeBlocks, HugePages
from gpurestore.tasks.memory.placing import Placing
from gpurestore.tasks.memory.runs import default_jobs, u64
from gpurestore.tasks.memory.sources import (
    COLD_CHUNK_BYTES,
    COLD_WORKERS,
    PagesSource,
    Reading,
    cold_bytes,
    open_source,
)

if TYPE_CHECKING:
    from gpurestore.images.folder import ImageFolder

_FILL, _SKIP, _REFUSE, _FILL_HUGE, _FILL_EMPTY = range(5)  # enum gr_pump_kind
_MOVED, _PLACED = 2, 4  # enum gr_pump_touch

# What one preadv of a restore brings in: large enough to forget the cost of a call, small enough to share and cancel.
CHUNK_BYTES: Final = 4 << 20


@dataclass(frozen=True, slots=True)
class Ways:
    """What the user chose about the way that memory comes in."""

    hugepages: HugePages = HugePages.AUTO
    reading: Reading = Reading.AUTO


DEFAULT_WAYS: Final = Ways()


@dataclass(frozen=True, slots=True)
class Worker:
    """A thread of a task that serves ``slot``.

    With a ``uffd`` of the task, huge pages go through ``staging``; with a ``placing``, small ones are put there.
    """

    tid: int
    slot: int
    uffd: int = -1
    staging: int = 0
    placing: Placing | None = None

    @property
    def handle(self) -> Any:
        """The ``struct gr_pump_worker *``, valid for as long as ``placing`` is open."""
        placing = self.placing.handle if self.placing is not None else ffi.NULL
        return ffi.new("struct gr_pump_worker *", (self.slot, self.tid, self.uffd, 0, self.staging, placing))


@dataclass(frozen=True, slots=True)
class PagePlan:
    """A queue of reads that fills memory from one pages image; checked, not started. Any thread may use it."""

    pages_name: str
    filled: frozenset[int]  # starts of the mappings that it writes to
    huge: tuple[tuple[int, int], ...]  # mappings that get huge pages, from start to end
    placed: tuple[tuple[int, int], ...]  # mappings in which small pages may be placed
    cold_bytes: int  # of the pages image: not in the page cache when this was planned
    total_bytes: int
    handle: Any
    pagemap: Pagemap  # as it was read
    compressed: CompressedPages | None = None  # then :meth:`run` is not for this plan: use this instead

    @property
    def counts(self) -> Any:
        """A ``struct gr_pump_counts *``: what is planned and what is done."""
        return _counts(self.handle)

    @property
    def done_bytes(self) -> int:
        """How much is in place."""
        if self.compressed is not None:
            return self.compressed.done_bytes
        return int(self.counts.done_bytes)

    @property
    def placed_bytes(self) -> int:
        """How much of that was placed as whole pages."""
        if self.compressed is not None:
            return self.compressed.placed_bytes
        return int(self.counts.placed_bytes)

    @property
    def nr_chunks(self) -> int:
        """How many threads can possibly work on it at once."""
        if self.compressed is not None:
            return self.compressed.nr_chunks
        return int(self.counts.nr_chunks)

    def populate(self, region: Region, worker: Worker, cancel: Cancel | None = None) -> None:
        """Have ``worker`` put empty huge pages where :attr:`compressed` is to write, as far as that works. Blocks.

        To be called once per worker that takes part, and before anything is written.
        """
        err = new_error()
        flag = cancel.flag if cancel else ffi.NULL
        check(lib.gr_pump_populate(region.handle, worker.handle, self.handle, flag, err), err)

    def run(self, region: Region, worker: Worker, source: PagesSource, cancel: Cancel | None = None) -> None:
        """Have ``worker`` fill its own task until nothing is left to do. Blocks.

        The task has the descriptors of ``source`` under the same numbers. To be called once per worker that takes part.
        """
        err = new_error()
        flag = cancel.flag if cancel else ffi.NULL
        check(lib.gr_pump_run(region.handle, worker.handle, source.handle, self.handle, flag, err), err)

    def fill(
        self, base: int, size: int, source: PagesSource, jobs: int | None = None, cancel: Cancel | None = None
    ) -> None:
        """Fill an object of ``size`` bytes that this process has mapped, shared and writable, at ``base``. Blocks."""
        if self.compressed is not None:
            self.compressed.fill(base, size, source.fd, jobs or default_jobs(), cancel)
            return
        err = new_error()
        flag = cancel.flag if cancel else ffi.NULL
        nr_threads = jobs or default_jobs()
        if source.direct_fd >= 0 and nr_threads > 1:
            nr_threads = max(nr_threads, COLD_WORKERS)
        alias = ffi.new("struct gr_stage_alias *")
        if self.counts.huge_bytes:
            check(lib.gr_stage_alias_create(base, size, alias, err), err)
        try:
            target = ffi.new("struct gr_pump_memory *", (base, size, alias.address))
            check(lib.gr_pump_fill(self.handle, target, source.handle, nr_threads, flag, err), err)
        finally:
            lib.gr_stage_alias_destroy(alias)


def plan_pages(
    folder: ImageFolder,
    pid: int,
    mm: pb.mm_entry,
    chunk_bytes: int = CHUNK_BYTES,
    huge: HugeBlocks | None = None,
    later: Collection[int] = (),
    kept: Collection[int] = (),
    pagemap: Pagemap | None = None,
) -> PagePlan:
    """Check the pagemap of a task against its mappings and its pages image. Raises ImageError; changes nothing.

    ``mm`` went through :func:`gpurestore.tasks.mm.validate`. What lies in the mappings whose starts are in ``later`` is
    checked, but left out. In those in ``kept`` there are pages from the parent already: none can be moved or placed
    there. ``pagemap`` is the task's, for callers that have it.
    """
    vmas = [vma for vma in mm.vmas if not vmaflags.is_guard(vma) and not vma.status & vmaflags.VSYSCALL]
    if mm.thp_disabled:
        huge = None
    kinds = bytes(
        _SKIP if vma.start in later else _pump_kind(vma, huge is not None, vma.start not in kept) for vma in vmas
    )
    starts, ends = array("Q", [vma.start for vma in vmas]), array("Q", [vma.end for vma in vmas])
    pagemap = read_pagemap(folder, "pagemap", pid) if pagemap is None else pagemap
    return _plan(folder, pagemap, KINDS["pagemap"].file_name(pid), (starts, ends, kinds), chunk_bytes, huge)


def plan_object(
    folder: ImageFolder, ident: int, size: int, chunk_bytes: int = CHUNK_BYTES, huge: HugeBlocks | None = None
) -> PagePlan:
    """The same for an object of ``size`` bytes: shared anonymous memory or a memfd."""
    nr_pages = -(-size // PAGE_BYTES)
    if not 0 < nr_pages < 1 << 50:
        raise ImageError(f"{folder.path}: shared memory {ident} has the impossible size {size}")
    if not hugepages.shared_are_available():
        huge = None
    ends = array("Q", [nr_pages * PAGE_BYTES])
    kinds = bytes([_FILL if huge is None else _FILL_HUGE])
    pagemap = read_pagemap(folder, "pagemap-shmem", ident)
    name = KINDS["pagemap-shmem"].file_name(ident)
    return _plan(folder, pagemap, name, (array("Q", [0]), ends, kinds), chunk_bytes, huge)


def fill_file(
    folder: ImageFolder,
    ident: int,
    fd: int,
    size: int,
    *,
    ways: Ways = DEFAULT_WAYS,
    jobs: int | None = None,
    cancel: Cancel | None = None,
) -> None:
    """Bring the content of an object into the file (a memfd of ``size`` bytes, not sealed) behind ``fd``."""
    if size == 0:
        return
    plan = plan_object(folder, ident, size, huge=hugepages.blocks_of_object(ways.hugepages))
    if plan.total_bytes == 0:
        return
    with open_pages(folder, plan, ways.reading) as source, mmap.mmap(fd, size) as memory:
        address = ffi.from_buffer(memory)
        try:
            plan.fill(int(ffi.cast("uintptr_t", address)), size, source, jobs, cancel)
        finally:
            ffi.release(address)


def open_pages(folder: ImageFolder, plan: PagePlan, reading: Reading = Reading.AUTO) -> PagesSource:
    """The pages image of ``plan``, open for reading."""
    return open_source(folder.open_raw(plan.pages_name), reading if plan.compressed is None else Reading.CACHED)


def read_page_bytes(folder: ImageFolder, pagemap: Pagemap, start: int, end: int) -> bytes:
    """Stored pages of a task from ``start`` to ``end``, which one entry of its pagemap must cover; else nothing.

    For a pagemap that :func:`plan_pages` accepted: every entry is stored here, in ascending order.
    """
    at = bisect.bisect(pagemap.vaddrs, start) - 1
    if at < 0 or end > pagemap.vaddrs[at] + pagemap.nr_pages[at] * PAGE_BYTES:
        return b""
    offset = sum(pagemap.nr_pages[:at]) * PAGE_BYTES + start - pagemap.vaddrs[at]
    image = find_pages(folder, pagemap.pages_id)
    with open(folder.open_raw(image.name), "rb", buffering=0) as pages:
        if image.index is not None:
            return image.index.read(pages.fileno(), offset, end - start)
        return os.pread(pages.fileno(), end - start, offset)


def _pump_kind(vma: pb.vma_entry, huge: bool, is_empty: bool) -> int:
    if vmaflags.is_kernels(vma):
        return _SKIP
    if not vmaflags.is_private(vma):
        return _REFUSE
    # In a private mapping of a file the pages that are not stored are the file's.
    if not is_empty or not vma.status & vmaflags.ANON_PRIVATE:
        return _FILL
    return _FILL_HUGE if huge and not vma.madv >> vmaflags.MADV_NOHUGEPAGE & 1 else _FILL_EMPTY


Ranges: TypeAlias = "tuple[array[int], array[int], bytes]"  # starts, ends, kinds


def _plan(
    folder: ImageFolder,
    pagemap: Pagemap,
    pagemap_name: str,
    ranges: Ranges,
    chunk_bytes: int,
    huge: HugeBlocks | None,
) -> PagePlan:
    image = find_pages(folder, pagemap.pages_id) if len(pagemap) else PagesImage("", 0, 0)
    nr_cold_bytes = _cold_bytes(folder, image.name) if image.name else 0
    if nr_cold_bytes:
        chunk_bytes = min(chunk_bytes, COLD_CHUNK_BYTES)
    name = f"{folder.path}/{pagemap_name}"
    handle, touched = _create_queue(pagemap, ranges, huge, image.stream_bytes, chunk_bytes, name)
    starts, ends, kinds = ranges

    def touched_as(what: int) -> tuple[tuple[int, int], ...]:
        return tuple((start, end) for start, end, bits in zip(starts, ends, touched, strict=True) if bits & what)

    skips = [(start, end) for start, end, what in zip(starts, ends, kinds, strict=True) if what == _SKIP]
    return PagePlan(
        pages_name=image.name,
        filled=frozenset(start for start, bits in zip(starts, touched, strict=True) if bits),
        huge=touched_as(_MOVED),
        placed=touched_as(_PLACED),
        cold_bytes=nr_cold_bytes,
        total_bytes=int(_counts(handle).total_bytes),
        handle=handle,
        pagemap=pagemap,
        compressed=CompressedPages(image.index, pagemap, skips) if image.index is not None else None,
    )


def _cold_bytes(folder: ImageFolder, name: str) -> int:
    with open(folder.open_raw(name), "rb", buffering=0) as pages:
        return cold_bytes(pages.fileno())


def _counts(handle: Any) -> Any:
    counts = ffi.new("struct gr_pump_counts *")
    lib.gr_pump_queue_counts(handle, counts)
    return counts


def _create_queue(
    pagemap: Pagemap, ranges: Ranges, huge: HugeBlocks | None, file_bytes: int, chunk_bytes: int, name: str
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
    c_huge = ffi.new("struct gr_pump_huge *")
    if huge is not None:
        c_huge.min_pages = huge.min_pages
        if huge.ranges is not None:
            kept_starts, kept_ends = (u64(values) for values in huge.ranges)
            c_huge.starts, c_huge.ends, c_huge.nr = kept_starts, kept_ends, len(huge.ranges[0])
    err, out = new_error(), ffi.new("struct gr_pump_queue **")
    try:
        check(lib.gr_pump_queue_create(c_pagemap, c_ranges, c_huge, file_bytes, chunk_bytes, out, err), err)
    except CoreError as error:
        if error.errno == errno.EINVAL:
            raise ImageError(f"{name}: {error.context}") from error
        raise
    return ffi.gc(out[0], lib.gr_pump_queue_destroy), bytes(touched)
