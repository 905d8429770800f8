"""A part of a pages image that is put into a task from outside, over what is there: for pages that come and go.

Most memory comes in through threads of the task itself (:mod:`gpurestore.tasks.memory.filling`). This is for the few
pages of which a task has one content while its children are born and another one afterwards.
"""

from __future__ import annotations

import os
from array import array
from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

from gpurestore.core import Cancel, check, ffi, lib, new_error
from gpurestore.errors import CancelledError, ImageError
from gpurestore.images.chunked import find_pages
from gpurestore.images.pagemap import Pagemap
from gpurestore.tasks.maps import PAGE_BYTES
from gpurestore.tasks.memory.runs import PageRuns, u64

if TYPE_CHECKING:
    from gpurestore.images.folder import ImageFolder

# Pages are read together if they lie at most so far apart, and so much at once at the most.
_JOIN_PAGES, _WINDOW_PAGES = 16, 256


class Piece(NamedTuple):
    """Where ``nr_pages`` pages from address ``vaddr`` on are stored: from page ``page`` of a pages image on."""

    vaddr: int
    nr_pages: int
    page: int


def pieces(pagemap: Pagemap, wanted: PageRuns) -> Iterator[Piece]:
    """Where those of ``wanted`` lie that a pagemap has; all of its runs are stored, in ascending order."""
    at = page = 0
    for vaddr, nr_pages in PageRuns(pagemap.vaddrs, pagemap.nr_pages) & wanted:
        while pagemap.vaddrs[at] + pagemap.nr_pages[at] * PAGE_BYTES <= vaddr:
            page += pagemap.nr_pages[at]
            at += 1
        yield Piece(vaddr, nr_pages, page + (vaddr - pagemap.vaddrs[at]) // PAGE_BYTES)


class Patch:
    """Those pages of a task's image that are ``wanted``; checked, not started."""

    def __init__(self, folder: ImageFolder, pagemap: Pagemap, wanted: PageRuns) -> None:
        """Raises ImageError for a pages image that is too short."""
        stored = PageRuns(pagemap.vaddrs, pagemap.nr_pages)
        self._folder, self._image = folder, find_pages(folder, pagemap.pages_id)
        if stored.total_bytes > self._image.stream_bytes:
            raise ImageError(
                f"{folder.path}/{self._image.name}: truncated: {self._image.stream_bytes} bytes for "
                f"{stored.total_bytes // PAGE_BYTES} pages"
            )
        self.total_bytes = (stored & wanted).total_bytes
        self._windows = list(_windows(pieces(pagemap, wanted)))
        skipped = stored - wanted
        ends = array("Q", (start + nr_pages * PAGE_BYTES for start, nr_pages in skipped))
        err, out = new_error(), ffi.new("struct gr_scatter **")
        runs = u64(pagemap.vaddrs), u64(pagemap.nr_pages), len(pagemap)
        check(lib.gr_scatter_create(*runs, u64(skipped.vaddrs), u64(ends), len(skipped), out, err), err)
        self._scatter = ffi.gc(out[0], lib.gr_scatter_destroy)

    def run(self, pid: int, cancel: Cancel | None = None) -> None:
        """Write them into the memory of task ``pid``, whose mappings must be writable. Blocks."""
        fd = self._folder.open_raw(self._image.name) if self._windows else -1
        try:
            for offset, size in self._windows:
                if cancel and cancel.is_set:
                    raise CancelledError(f"cancelled: writing pages of task {pid}")
                self._put(pid, offset, self._read(fd, offset, size))
        finally:
            if fd >= 0:
                os.close(fd)

    def _read(self, fd: int, offset: int, size: int) -> bytes:
        if self._image.index is not None:
            return self._image.index.read(fd, offset, size)
        data = os.pread(fd, size, offset)
        if len(data) != size:
            raise ImageError(f"{self._folder.path}/{self._image.name}: became shorter while it was read")
        return data

    def _put(self, pid: int, offset: int, data: bytes) -> None:
        err = new_error()
        check(lib.gr_scatter_put(self._scatter, pid, 0, offset, ffi.from_buffer(data), len(data), err), err)


def _windows(found: Iterator[Piece]) -> Iterator[tuple[int, int]]:
    """Offset and size of what is read at once."""
    start = end = 0
    for piece in found:
        first, last = piece.page, piece.page + piece.nr_pages
        if end and (first - end > _JOIN_PAGES or last - start > _WINDOW_PAGES):
            yield start * PAGE_BYTES, (end - start) * PAGE_BYTES
            start = first
        elif not end:
            start = first
        end = last
        while end - start > _WINDOW_PAGES:
            yield start * PAGE_BYTES, _WINDOW_PAGES * PAGE_BYTES
            start += _WINDOW_PAGES
    if end:
        yield start * PAGE_BYTES, (end - start) * PAGE_BYTES
