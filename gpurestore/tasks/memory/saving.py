"""The dump's half: which pages are stored, and how they get into a pages image."""

from __future__ import annotations

import errno
import os
from array import array
from collections.abc import Sequence
from typing import TYPE_CHECKING

from gpurestore.core import Cancel, ffi, lib
from gpurestore.errors import CoreError
from gpurestore.images import pb
from gpurestore.images.magic import pages_file_name
from gpurestore.tasks import vmaflags
from gpurestore.tasks.maps import PAGE_BYTES
from gpurestore.tasks.memory.compressed import CompressedPagesFile
from gpurestore.tasks.memory.pagesfile import AnyPagesFile
from gpurestore.tasks.memory.runs import PageRuns, Progress, WorkerTimes, default_jobs, u64

if TYPE_CHECKING:
    from gpurestore.images.writer import ImageWriter

STORED, GUARD, HUGE = 0, 1, 2  # enum gr_scan_what
AUTO, IOCTL, READ = 0, 1, 2  # enum gr_scan_how


def scan(
    pid: int, ranges: Sequence[pb.vma_entry], what: int, cancel: Cancel | None = None, how: int = AUTO
) -> PageRuns:
    """The pages of a frozen task that are ``what`` (STORED, GUARD, HUGE) in ``ranges``, which must be ascending."""
    starts, ends = u64(array("Q", [r.start for r in ranges])), u64(array("Q", [r.end for r in ranges]))
    flag = cancel.flag if cancel else ffi.NULL
    return PageRuns.made_by(lambda out, err: lib.gr_pagescan(pid, starts, ends, len(ranges), what, how, flag, out, err))


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
    runs: PageRuns | None = None,
    kind: str = "pagemap",
    ident: int | None = None,
) -> PageRuns:
    """Write ``pagemap-PID.img`` and ``pages-PAGES_ID.img`` of a frozen task; returns what its pagemap holds.

    Pages of anonymous memory that are all zero are not stored: that is what a new mapping shows anyway.
    ``runs``: the pages to write, where they are not those that :func:`select` finds. ``kind`` and ``ident``: of another
    image than the pagemap of this task.
    """
    if runs is None:
        runs = select(pid, mm, cancel)
    pages = pages_file(writer, pages_id, jobs, cancel, progress)
    stored = pages.add_from_task(pid, runs, zeros_matter(mm))
    pages.finish(kind, pid if ident is None else ident, stored)
    return stored


def weigh(pid: int, mm: pb.mm_entry, runs: PageRuns, *, jobs: int | None = None, cancel: Cancel | None = None) -> int:
    """The bytes that :func:`dump` would store of ``runs``, found by reading them: pages of zeros do not count."""
    nowhere = os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC)
    try:
        stored, _ = _write(nowhere, 0, (pid, -1), runs, zeros_matter(mm), jobs or default_jobs(), cancel)
        return stored.total_bytes
    finally:
        os.close(nowhere)


def zeros_matter(mm: pb.mm_entry) -> list[tuple[int, int]]:
    """Where a page that is not stored is no page of zeros after a restore: all but anonymous private memory."""
    return [(vma.start, vma.end) for vma in mm.vmas if not vmaflags.is_guard(vma) and not _starts_as_zeros(vma)]


def _starts_as_zeros(vma: pb.vma_entry) -> bool:
    return vmaflags.is_private(vma) and bool(vma.status & vmaflags.ANON_PRIVATE)


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
    """Write an object of shared memory that lies behind ``fd``, without holes and zeros; returns the bytes stored.

    An object without any bytes has no images, as with CRIU.
    """
    if size == 0:
        return 0
    runs = file_extents(fd, size)
    pages = pages_file(writer, pages_id, jobs, cancel, progress)
    pages.finish("pagemap-shmem", ident, pages.add_from_file(fd, runs))
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


def pages_file(
    writer: ImageWriter, pages_id: int, jobs: int | None, cancel: Cancel | None, progress: Progress | None
) -> AnyPagesFile:
    """A pages image in the making, in the form that the dump wants."""
    if writer.crew is not None:
        return CompressedPagesFile(writer, pages_id, writer.crew, cancel, progress)
    return PagesFile(writer, pages_id, jobs, cancel, progress)


class PagesFile(AnyPagesFile):
    """A plain one. It is summed on its way, so that nobody has to read it again."""

    def __init__(
        self, writer: ImageWriter, pages_id: int, jobs: int | None, cancel: Cancel | None, progress: Progress | None
    ) -> None:
        name = pages_file_name(pages_id)
        super().__init__(writer, pages_id, name, writer.open_pages(name), cancel, progress)
        self._jobs = jobs or default_jobs()
        self._crc64 = 0

    def _add(self, pid: int, fd: int, runs: PageRuns, kept: Sequence[tuple[int, int]]) -> PageRuns:
        try:
            stored, crc64 = _write(self._fd, self.size, (pid, fd), runs, kept, self._jobs, self._cancel, self._progress)
        except CoreError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                cause = OSError(error.errno, os.strerror(error.errno))
                raise self._writer.disk_error(cause, self._name, runs.total_bytes) from error
            raise
        written = stored.total_bytes
        self._crc64 = int(lib.gr_crc64_combine(self._crc64, crc64, written))
        self.size += written
        return stored

    def _end(self) -> None:
        self._writer.summed(self._name, self.size, self._crc64)


def _write(
    out_fd: int,
    offset: int,
    source: tuple[int, int],
    runs: PageRuns,
    kept: Sequence[tuple[int, int]],
    jobs: int,
    cancel: Cancel | None,
    progress: Progress | None = None,
) -> tuple[PageRuns, int]:
    """Write pages of ``source``, a pid or (behind -1) a descriptor; returns which were stored, and their checksum."""
    starts = u64(array("Q", [start for start, _ in kept]))
    ends = u64(array("Q", [end for _, end in kept]))
    times = ffi.new("struct gr_worker_times[]", jobs)
    done = progress.counter if progress else ffi.NULL
    c_source = ffi.new("struct gr_pages_source *", (*source, starts, ends, len(kept)))
    target = ffi.new("struct gr_pages_target *", (out_fd, offset, jobs, 0, done, times, jobs, 0))
    flag = cancel.flag if cancel else ffi.NULL
    view, _keep = runs.view()
    stored = PageRuns.made_by(lambda out, err: lib.gr_pages_out(c_source, view, target, flag, out, err))
    if progress:
        progress.workers += [WorkerTimes(t.begin_ns, t.end_ns, t.bytes) for t in times[0 : target.nr_times]]
    return stored, int(target.crc64)
