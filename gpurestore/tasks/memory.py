"""The content of memory: which pages a dump stores, how they get into a pages image, and how they come back.

A pages image belongs to one pagemap: that of a task (its private memory) or that of an object (shared anonymous memory,
a memfd), whose "addresses" are offsets. All bytes move in C, several threads at a time, with the GIL released.
"""

from __future__ import annotations

import bisect
import errno
import mmap
import os
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

from gpurestore.core import Cancel, Region, check, ffi, lib, new_error
from gpurestore.errors import CoreError, ImageError
from gpurestore.images import pb
from gpurestore.images.magic import KINDS, pages_file_name
from gpurestore.images.pagemap import PRESENT, Pagemap, read_pagemap, write_pagemap
from gpurestore.tasks import vmaflags
from gpurestore.tasks.maps import PAGE_BYTES

if TYPE_CHECKING:
    from gpurestore.images.folder import ImageFolder
    from gpurestore.images.writer import ImageWriter

STORED, GUARD = 0, 1  # enum gr_scan_what
AUTO, IOCTL, READ = 0, 1, 2  # enum gr_scan_how
_FILL, _SKIP, _REFUSE = 0, 1, 2  # enum gr_pump_kind

# What one preadv of a restore brings in: large enough to forget the cost of a call, small enough to share and cancel.
CHUNK_BYTES: Final = 4 << 20


@dataclass(slots=True)
class PageRuns:
    """Runs of pages, ascending: ``nr_pages[i]`` of them from ``vaddrs[i]`` on."""

    vaddrs: array[int] = field(default_factory=lambda: array("Q"))
    nr_pages: array[int] = field(default_factory=lambda: array("Q"))

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return zip(self.vaddrs, self.nr_pages, strict=True)

    def __len__(self) -> int:
        return len(self.vaddrs)

    @property
    def total_bytes(self) -> int:
        return sum(self.nr_pages) * PAGE_BYTES

    def insert(self, address: int, nr_pages: int) -> None:
        """Add a run at its place; it must not overlap another."""
        at = bisect.bisect(self.vaddrs, address)
        self.vaddrs.insert(at, address)
        self.nr_pages.insert(at, nr_pages)


class Progress:
    """A count of bytes that C threads raise while they work and that anybody may read."""

    def __init__(self) -> None:
        self.counter: Any = ffi.new("uint64_t *")

    @property
    def done_bytes(self) -> int:
        return int(self.counter[0])


def default_jobs() -> int:
    """As many threads as there are processors for us."""
    return len(os.sched_getaffinity(0))


# ---- dump


def scan(
    pid: int, ranges: Sequence[pb.vma_entry], what: int, cancel: Cancel | None = None, how: int = AUTO
) -> PageRuns:
    """The pages of a frozen task that are ``what`` (STORED, GUARD) in ``ranges``, which must be ascending."""
    err, out = new_error(), ffi.new("struct gr_page_runs *")
    starts, ends = array("Q", [r.start for r in ranges]), array("Q", [r.end for r in ranges])
    flag = cancel.flag if cancel else ffi.NULL
    check(lib.gr_pagescan(pid, _u64(starts), _u64(ends), len(ranges), what, how, flag, out, err), err)
    try:
        runs = PageRuns()
        runs.vaddrs.frombytes(ffi.buffer(out.vaddrs, out.nr_runs * 8) if out.nr_runs else b"")
        runs.nr_pages.frombytes(ffi.buffer(out.nr_pages, out.nr_runs * 8) if out.nr_runs else b"")
        return runs
    finally:
        lib.gr_page_runs_destroy(out)


def select(pid: int, mm: pb.mm_entry, cancel: Cancel | None = None) -> PageRuns:
    """The pages of a frozen task that its images must hold: its private ones, and those of the vdso, as CRIU does."""
    private = [vma for vma in mm.vmas if vmaflags.is_private(vma) and not vma.flags & vmaflags.MAP_DROPPABLE]
    runs = scan(pid, private, STORED, cancel)
    for vma in mm.vmas:
        if vma.status & vmaflags.VDSO:
            runs.insert(vma.start, (vma.end - vma.start) // PAGE_BYTES)
    return runs


def dump(
    writer: ImageWriter,
    pid: int,
    mm: pb.mm_entry,
    pages_id: int,
    *,
    jobs: int | None = None,
    cancel: Cancel | None = None,
    progress: Progress | None = None,
) -> int:
    """Write ``pagemap-PID.img`` and ``pages-PAGES_ID.img`` of a frozen task; returns the bytes of its pages."""
    runs = select(pid, mm, cancel)
    pages = PagesFile(writer, pages_id, jobs, cancel, progress)
    pages.add_from_task(pid, runs)
    pages.finish("pagemap", pid, runs)
    return pages.size


def save_object(
    writer: ImageWriter,
    ident: int,
    fd: int,
    size: int,
    pages_id: int,
    *,
    jobs: int | None = None,
    cancel: Cancel | None = None,
    progress: Progress | None = None,
) -> int:
    """Write an object of shared memory that lies behind ``fd``, without its holes; returns the bytes stored.

    An object without any bytes has no images, as with CRIU.
    """
    if size == 0:
        return 0
    runs = file_extents(fd, size)
    pages = PagesFile(writer, pages_id, jobs, cancel, progress)
    pages.add_from_file(fd, runs)
    pages.finish("pagemap-shmem", ident, runs)
    return pages.size


def file_extents(fd: int, size: int) -> PageRuns:
    """The pages of an object that are there, in memory or swapped out. Moves the position of ``fd``."""
    runs = PageRuns()
    offset = 0
    while offset < size:
        try:
            start = os.lseek(fd, offset, os.SEEK_DATA) // PAGE_BYTES * PAGE_BYTES
        except OSError as error:
            if error.errno == errno.ENXIO:  # a hole up to the end
                break
            raise
        end = min(os.lseek(fd, start, os.SEEK_HOLE), size)
        if start >= end:
            break
        nr_pages = -(-(end - start) // PAGE_BYTES)
        runs.vaddrs.append(start)
        runs.nr_pages.append(nr_pages)
        offset = start + nr_pages * PAGE_BYTES
    return runs


class PagesFile:
    """A pages image in the making: runs are written one behind the other, each by several threads."""

    def __init__(
        self, writer: ImageWriter, pages_id: int, jobs: int | None, cancel: Cancel | None, progress: Progress | None
    ) -> None:
        self._writer, self._pages_id, self._jobs = writer, pages_id, jobs or default_jobs()
        self._cancel, self._progress = cancel, progress
        self._name = pages_file_name(pages_id)
        self._fd = writer.open_raw(self._name)
        self.size = 0

    def add_from_task(self, pid: int, runs: PageRuns) -> None:
        """Append pages of a frozen task."""
        self._add(pid, -1, runs)

    def add_from_file(self, fd: int, runs: PageRuns) -> None:
        """Append pages of an object, at the offsets that ``runs`` give."""
        self._add(0, fd, runs)

    def _add(self, pid: int, fd: int, runs: PageRuns) -> None:
        err = new_error()
        source = ffi.new("struct gr_pages_source *", {"pid": pid, "source_fd": fd})
        flag = self._cancel.flag if self._cancel else ffi.NULL
        done = self._progress.counter if self._progress else ffi.NULL
        runs_args = _u64(runs.vaddrs), _u64(runs.nr_pages), len(runs)
        result = lib.gr_pages_out(source, *runs_args, self._fd, self.size, self._jobs, flag, done, err)
        try:
            check(result, err)
        except CoreError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                cause = OSError(error.errno, os.strerror(error.errno))
                raise self._writer.disk_error(cause, self._name, runs.total_bytes) from error
            raise
        self.size += runs.total_bytes

    def finish(self, kind: str, ident: int, runs: PageRuns) -> None:
        """Write the pagemap that says where the pages belong. ``runs`` are all that were added, in that order."""
        flags = array("I", [PRESENT]) * len(runs)
        write_pagemap(self._writer, kind, ident, self._pages_id, runs.vaddrs, runs.nr_pages, flags)


# ---- restore


@dataclass(frozen=True, slots=True)
class PagePlan:
    """A queue of reads that fills memory from one pages image; checked, not started. Any thread may use it."""

    pages_name: str
    filled: frozenset[int]  # starts of the mappings that it writes to
    total_bytes: int
    handle: Any

    @property
    def done_bytes(self) -> int:
        """How much is in place."""
        return int(lib.gr_pump_queue_done_bytes(self.handle))

    @property
    def nr_chunks(self) -> int:
        """How many threads can possibly work on it at once."""
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
    with open(folder.open_raw(pages_file_name(pagemap.pages_id)), "rb", buffering=0) as pages:
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
    pages_name = pages_file_name(pagemap.pages_id)
    file_bytes = 0
    if len(pagemap):
        with open(folder.open_raw(pages_name), "rb", buffering=0) as pages:
            file_bytes = os.fstat(pages.fileno()).st_size
    name = f"{folder.path}/{KINDS[kind].file_name(ident)}"
    handle, touched = _create_queue(pagemap, (starts, ends, kinds), file_bytes, chunk_bytes, name)
    filled = frozenset(start for start, flag in zip(starts, touched, strict=True) if flag)
    return PagePlan(pages_name, filled, int(lib.gr_pump_queue_total_bytes(handle)), handle)


def _create_queue(
    pagemap: Pagemap, ranges: tuple[array[int], array[int], bytes], file_bytes: int, chunk_bytes: int, name: str
) -> tuple[Any, bytes]:
    starts, ends, kinds = ranges
    touched = bytearray(len(starts))
    keep = {
        "starts": _u64(starts),
        "ends": _u64(ends),
        "kinds": ffi.from_buffer("uint8_t[]", kinds),
        "touched": ffi.from_buffer("uint8_t[]", touched),
        "nr": len(starts),
    }
    c_ranges = ffi.new("struct gr_pump_ranges *", keep)
    c_pagemap = ffi.new(
        "struct gr_pump_pagemap *",
        {
            "vaddrs": _u64(pagemap.vaddrs),
            "nr_pages": _u64(pagemap.nr_pages),
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


def _u64(values: array[int]) -> Any:
    return ffi.from_buffer("uint64_t[]", values)
