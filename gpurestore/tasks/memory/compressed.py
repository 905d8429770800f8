"""Pages that are stored compressed: chunks are moved and (de)compressed by several threads of this process.

A dump reads a chunk of a frozen task, compresses it, and gives it its place in the file once the chunk before has one.
A restore decompresses chunks in any order and puts their pages into the task with process_vm_writev. What a chunk needs
is a few system calls and the compressor, and all of them let go of the GIL.
"""

from __future__ import annotations

import os
import threading
import time
from array import array
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import count
from typing import TYPE_CHECKING, Any

from gpurestore.core import Cancel, check, ffi, lib, new_error
from gpurestore.errors import CancelledError
from gpurestore.images.chunked import ChunkIndex, IndexWriter, checksum, compressed_name
from gpurestore.images.compression import BUFFER_BYTES, Crew, codec
from gpurestore.images.hashing import run_in_threads
from gpurestore.images.pagemap import Pagemap
from gpurestore.tasks.maps import PAGE_BYTES
from gpurestore.tasks.memory.pagesfile import AnyPagesFile
from gpurestore.tasks.memory.runs import PageRuns, Progress, WorkerTimes, u64

if TYPE_CHECKING:
    from gpurestore.images.writer import ImageWriter


class CompressedPagesFile(AnyPagesFile):
    """A compressed one."""

    def __init__(
        self, writer: ImageWriter, pages_id: int, crew: Crew, cancel: Cancel | None, progress: Progress | None
    ) -> None:
        self._crew, self._compression = crew, crew.compression
        name = compressed_name(pages_id, self._compression.algorithm)
        super().__init__(writer, pages_id, name, writer.open_raw(name), cancel, progress)
        self._index = IndexWriter(self._compression.algorithm, self._compression.chunk_bytes)
        self._write(self._index.head, 0)

    def _add(self, pid: int, fd: int, runs: PageRuns, kept: Sequence[tuple[int, int]]) -> PageRuns:
        stream = _Stream(pid, fd, runs, kept, self._compression.chunk_bytes)
        stored = PageRuns.made_by(partial(self._store, stream))
        self.size += stored.total_bytes
        return stored

    def _store(self, stream: _Stream, stored: Any, _err: Any) -> int:
        """All chunks, by several threads; ``stored`` becomes the list of their pages."""
        order = _Order()
        work = partial(self._compress, stream, order, count(), stored)
        nr_threads = min(self._crew.nr_places, stream.nr_chunks)
        try:
            run_in_threads([work] * nr_threads, nr_threads)
        except BaseException:
            lib.gr_page_runs_destroy(stored)
            raise
        return 0

    def _compress(self, stream: _Stream, order: _Order, numbers: Iterator[int], stored: Any) -> None:
        """One thread's part: chunks until there are none left."""
        left = ffi.gc(ffi.new("struct gr_page_runs *"), lib.gr_page_runs_destroy)
        try:
            with self._crew.place(partial(_stop_if, self._cancel)), self._timed() as moved:
                own_codec = self._compression.codec()
                buffer = bytearray(self._compression.chunk_bytes)
                while (number := next(numbers)) < stream.nr_chunks and not order.failed:
                    _stop_if(self._cancel)
                    chunk = stream.read(number, buffer, left)
                    frame = own_codec.compress(chunk) if chunk else b""
                    digest = checksum(frame)
                    with order.turn(number) as mine:
                        if not mine:
                            return
                        stream.append(number, left, stored)
                        offset = self._index.add(len(frame), len(chunk), digest) if chunk else 0
                    self._write(frame, offset)
                    moved[0] += len(chunk)
                    with order.lock:
                        if self._progress:
                            self._progress.counter[0] += len(chunk)
        except BaseException:
            order.fail()
            raise

    @contextmanager
    def _timed(self) -> Iterator[list[int]]:
        """Note when a thread was at work; it counts its bytes in what it gets."""
        begin_ns, moved = time.monotonic_ns(), [0]
        yield moved
        if self._progress and moved[0]:
            self._progress.workers.append(WorkerTimes(begin_ns, time.monotonic_ns(), moved[0]))

    def _write(self, data: Any, offset: int) -> None:
        view = memoryview(data)
        try:
            while view:
                written = os.pwrite(self._fd, view, offset)
                view, offset = view[written:], offset + written
        except OSError as error:
            raise self._writer.disk_error(error, self._name, len(view)) from error

    def _end(self) -> None:
        offset, tail = self._index.tail()
        self._write(tail, offset)


class _Order:
    """Lets threads pass one after another, by number, until one of them has failed."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self._moved = threading.Condition(self.lock)
        self._next = 0
        self.failed = False

    @contextmanager
    def turn(self, number: int) -> Iterator[bool]:
        """Wait until everybody below ``number`` has been here. False: one of them never will."""
        with self._moved:
            self._moved.wait_for(lambda: self._next == number or self.failed)
            yield not self.failed
            self._next += 1
            self._moved.notify_all()

    def fail(self) -> None:
        """Let nobody wait any more."""
        with self._moved:
            self.failed = True
            self._moved.notify_all()


class _Stream:
    """Runs of pages as chunks that any thread may read."""

    def __init__(self, pid: int, fd: int, runs: PageRuns, kept: Sequence[tuple[int, int]], chunk_bytes: int) -> None:
        starts, ends = u64(array("Q", [start for start, _ in kept])), u64(array("Q", [end for _, end in kept]))
        view, runs_keep = runs.view()
        self._keep = starts, ends, view, runs_keep
        source = ffi.new("struct gr_pages_source *", (pid, fd, starts, ends, len(kept)))
        err, out = new_error(), ffi.new("struct gr_chunk_reader **")
        check(lib.gr_chunk_reader_create(source, view, chunk_bytes // PAGE_BYTES, out, err), err)
        self._handle = ffi.gc(out[0], lib.gr_chunk_reader_destroy)
        self.nr_chunks = int(lib.gr_chunk_reader_nr_chunks(self._handle))

    def read(self, number: int, buffer: bytearray, left: Any) -> memoryview:
        """What is left of a chunk without zeros, in ``buffer``; ``left`` (struct gr_page_runs) says what that is."""
        err = new_error()
        size = check(lib.gr_chunk_read(self._handle, number, ffi.from_buffer(buffer), left, err), err)
        return memoryview(buffer)[:size]

    def append(self, number: int, left: Any, stored: Any) -> None:
        """Add what is left of a chunk to what is left of those before it."""
        err = new_error()
        check(lib.gr_chunk_append(self._handle, number, left, stored, err), err)


class CompressedPages:
    """A queue of chunks that are to be decompressed into place; checked, not started. Any thread may use it."""

    def __init__(self, index: ChunkIndex, pagemap: Pagemap, skips: Sequence[tuple[int, int]]) -> None:
        """``skips``: ascending ranges whose pages are in the stream but are not to be written."""
        self._index = index
        starts, ends = array("Q", [start for start, _ in skips]), array("Q", [end for _, end in skips])
        err, out = new_error(), ffi.new("struct gr_scatter **")
        runs = u64(pagemap.vaddrs), u64(pagemap.nr_pages), len(pagemap)
        check(lib.gr_scatter_create(*runs, u64(starts), u64(ends), len(skips), out, err), err)
        self._scatter = ffi.gc(out[0], lib.gr_scatter_destroy)
        self._numbers = count()
        self._stopped = False

    @property
    def nr_chunks(self) -> int:
        """How many there are, taken or not."""
        return len(self._index)

    @property
    def done_bytes(self) -> int:
        """How much is in place."""
        return int(lib.gr_scatter_done_bytes(self._scatter))

    @property
    def placed_bytes(self) -> int:
        """How much of that was put there as whole pages."""
        return int(lib.gr_scatter_placed_bytes(self._scatter))

    def nr_workers(self, jobs: int) -> int:
        """How many threads may work at once, of ``jobs`` that are wanted."""
        return max(1, min(jobs, self.nr_chunks, BUFFER_BYTES // max(1, self._index.room_bytes)))

    def run(self, pid: int, base: int, fd: int, cancel: Cancel | None = None) -> None:
        """Take chunks of the file behind ``fd`` until none is left, and put them into task ``pid``. Blocks.

        ``pid`` 0 is this process, and addresses are relative to ``base``. To be called once per thread that takes part.
        """
        decoder = codec(self._index.algorithm)
        room = bytearray(self._index.room_bytes)
        try:
            while not self._stopped and (number := next(self._numbers)) < len(self._index):
                _stop_if(cancel)
                self._put(pid, base, number, self._index.chunk(fd, number, decoder, room))
        except BaseException:
            self._stopped = True
            raise

    def _put(self, pid: int, base: int, number: int, chunk: Any) -> None:
        err = new_error()
        offset = self._index.stream_offsets[number]
        view = ffi.from_buffer(chunk)
        check(lib.gr_scatter_put(self._scatter, pid, base, offset, view, len(view), err), err)

    def fill(self, base: int, size: int, fd: int, jobs: int, cancel: Cancel | None = None) -> None:
        """Fill an object of ``size`` bytes that this process has mapped with ``jobs`` threads at most. Blocks."""
        nr_threads = self.nr_workers(jobs)
        lib.gr_scatter_begin_object(self._scatter, base, size)
        try:
            run_in_threads([partial(self.run, 0, base, fd, cancel)] * nr_threads, nr_threads)
        finally:
            lib.gr_scatter_end_object(self._scatter)


def _stop_if(cancel: Cancel | None) -> None:
    if cancel and cancel.is_set:
        raise CancelledError("cancelled: moving compressed pages")
