"""Which pages a dump stores, and that every byte of them arrives."""

from __future__ import annotations

import ctypes
import os
import time
from pathlib import Path

import pytest
from support.memory_child import (
    MAP_ANONYMOUS,
    MAP_NORESERVE,
    MAP_PRIVATE,
    PAGE,
    PROT_NONE,
    PROT_READ,
    PROT_RW,
    MemoryChild,
    commit_images,
    fill,
    libc,
    map_memory,
    pattern,
)

from gpurestore.core import Cancel
from gpurestore.errors import CancelledError, CoreError, GpurestoreError, UsageError
from gpurestore.images import pb
from gpurestore.images.folder import ImageFolder
from gpurestore.images.pagemap import read_pagemap
from gpurestore.images.writer import ImageWriter
from gpurestore.tasks import memory, vmaflags

HOWS = pytest.mark.parametrize("how", [memory.IOCTL, memory.READ], ids=["ioctl", "read"])


def area(start: int, size: int, status: int = vmaflags.ANON_PRIVATE) -> pb.vma_entry:
    return pb.vma_entry(
        start=start, end=start + size, pgoff=0, shmid=0, prot=3, flags=0x22, status=vmaflags.REGULAR | status, fd=-1
    )


def scan(child: MemoryChild, start: int, size: int, how: int) -> list[tuple[int, int]]:
    return list(memory.scan(child.pid, [area(start, size)], memory.STORED, how=how))


def shows_frame_numbers() -> bool:
    page = ctypes.create_string_buffer(b"x", 1)
    with open("/proc/self/pagemap", "rb", buffering=0) as pagemap:
        entry = os.pread(pagemap.fileno(), 8, ctypes.addressof(page) // PAGE * 8)
    return int.from_bytes(entry, "little") & ((1 << 55) - 1) != 0


@HOWS
def test_only_pages_that_were_written_are_stored(how: int) -> None:
    def prepare() -> list[int]:
        start = map_memory(64 * PAGE)
        for page in (3, 4, 5, 9, 63):
            fill(start + page * PAGE)
        return [start]

    with MemoryChild(prepare) as child:
        (start,) = child.values
        assert scan(child, start, 64 * PAGE, how) == [
            (start + 3 * PAGE, 3),
            (start + 9 * PAGE, 1),
            (start + 63 * PAGE, 1),
        ]


@HOWS
def test_thousands_of_runs_are_each_found_once(how: int) -> None:
    """More than the kernel gathers at a time, more than we take at a time, and a rest."""
    nr = 10_100

    def prepare() -> list[int]:
        start = map_memory(nr * PAGE)
        for page in range(0, nr, 2):
            fill(start + page * PAGE)
        return [start]

    with MemoryChild(prepare) as child:
        (start,) = child.values
        assert scan(child, start, nr * PAGE, how) == [(start + page * PAGE, 1) for page in range(0, nr, 2)]


@HOWS
def test_pages_that_were_only_read_are_the_zero_page_and_not_stored(how: int) -> None:
    if how == memory.READ and not shows_frame_numbers():
        pytest.skip("frame numbers, by which the zero page is known, are for root of the first user namespace")

    def prepare() -> list[int]:
        start = map_memory(16 * PAGE)
        assert ctypes.string_at(start, 16 * PAGE) == bytes(16 * PAGE)
        fill(start + 7 * PAGE)
        return [start]

    with MemoryChild(prepare) as child:
        (start,) = child.values
        assert scan(child, start, 16 * PAGE, how) == [(start + 7 * PAGE, 1)]


@HOWS
def test_of_a_private_file_mapping_only_copied_pages_are_stored(how: int, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(bytes(range(256)) * 16 * 8)

    def prepare() -> list[int]:
        fd = os.open(file, os.O_RDONLY)
        start = map_memory(8 * PAGE, PROT_RW, MAP_PRIVATE, fd)
        ctypes.string_at(start, 8 * PAGE)
        fill(start + 2 * PAGE)
        return [start]

    with MemoryChild(prepare) as child:
        (start,) = child.values
        assert scan(child, start, 8 * PAGE, how) == [(start + 2 * PAGE, 1)]


def test_a_reservation_of_a_terabyte_costs_nothing() -> None:
    size = 1 << 40

    def prepare() -> list[int]:
        start = map_memory(size, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE)
        last = start + size - PAGE
        libc.mprotect(last, PAGE, PROT_RW)
        fill(last)
        return [start]

    with MemoryChild(prepare) as child:
        (start,) = child.values
        began = time.thread_time()
        assert scan(child, start, size, memory.IOCTL) == [(start + size - PAGE, 1)]
        assert time.thread_time() - began < 1


def test_a_scan_can_be_cancelled() -> None:
    cancel = Cancel()
    cancel.set()
    with pytest.raises(CancelledError):
        memory.scan(os.getpid(), [area(1 << 20, 1 << 20)], memory.STORED, cancel)


def test_a_task_that_is_gone_is_an_error() -> None:
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    os.waitpid(pid, 0)
    with pytest.raises(CoreError, match="pagemap"):
        memory.scan(pid, [area(1 << 20, 1 << 20)], memory.STORED)


def test_guards_are_found_and_not_stored() -> None:
    def prepare() -> list[int]:
        start = map_memory(16 * PAGE)
        fill(start, 16)
        return [start, libc.madvise(start + 4 * PAGE, 2 * PAGE, vmaflags.MADV_GUARD_INSTALL) + 1]

    with MemoryChild(prepare) as child:
        start, supported = child.values
        if not supported:
            pytest.skip("MADV_GUARD_INSTALL came with Linux 6.13")
        vma = area(start, 16 * PAGE)
        assert list(memory.scan(child.pid, [vma], memory.GUARD)) == [(start + 4 * PAGE, 2)]
        assert list(memory.scan(child.pid, [vma], memory.STORED)) == [(start, 4), (start + 6 * PAGE, 10)]


def address_space(*vmas: pb.vma_entry) -> pb.mm_entry:
    return pb.mm_entry(vmas=vmas)


@pytest.mark.parametrize("jobs", [1, 3])
def test_every_byte_arrives_from_memory_of_every_protection(folder: Path, jobs: int) -> None:
    """More than one chunk, runs of all lengths, pages that their owner may not read."""
    nr_pages = 1700

    def prepare() -> list[int]:
        start = map_memory(nr_pages * PAGE)
        for page in range(nr_pages):
            if page % 7 and page % 13:
                fill(start + page * PAGE)
        libc.mprotect(start + 100 * PAGE, 50 * PAGE, PROT_NONE)
        libc.mprotect(start + 700 * PAGE, 3 * PAGE, PROT_READ)
        libc.mprotect(start + 1000 * PAGE, 600 * PAGE, PROT_NONE)
        return [start]

    with MemoryChild(prepare) as child, ImageWriter(folder / "images") as writer:
        (start,) = child.values
        progress = memory.Progress()
        mm = address_space(area(start, nr_pages * PAGE))
        stored = memory.dump(writer, child.pid, mm, 7, jobs=jobs, progress=progress)
        assert progress.done_bytes == stored.total_bytes
        commit_images(writer)
    with ImageFolder(folder / "images") as images:
        pagemap = read_pagemap(images, "pagemap", child.pid)
        pages = (folder / "images" / "pages-7.img").read_bytes()
    expected = [start + page * PAGE for page in range(nr_pages) if page % 7 and page % 13]
    runs = zip(pagemap.vaddrs, pagemap.nr_pages, strict=True)
    assert [a + i * PAGE for a, n in runs for i in range(n)] == expected
    assert pages == b"".join(map(pattern, expected))


@pytest.mark.parametrize("jobs", [1, 3])
@pytest.mark.parametrize("direct_io", [False, True], ids=["cached", "direct"])
def test_pages_of_zeros_are_not_stored_in_whatever_order_threads_find_them(
    folder: Path, jobs: int, direct_io: bool
) -> None:
    nr_pages = 3000
    zeros = {page for page in range(nr_pages) if page % 3 == 0 or 100 < page < 900 or page > 2900}

    def prepare() -> list[int]:
        start = map_memory(nr_pages * PAGE)
        for page in range(nr_pages):
            fill(start + page * PAGE)
            if page in zeros:
                ctypes.memset(start + page * PAGE, 0, PAGE)
        ctypes.memset(start + 200 * PAGE - 1, 7, 1)  # a single byte, the last of a page
        return [start]

    with MemoryChild(prepare) as child:
        try:
            writer = ImageWriter(folder / "images", direct_io=direct_io)
        except UsageError as error:
            pytest.skip(str(error))
        with writer:
            (start,) = child.values
            mm = address_space(area(start, nr_pages * PAGE))
            stored = memory.dump(writer, child.pid, mm, 7, jobs=jobs)
            commit_images(writer)
    expected = [start + page * PAGE for page in range(nr_pages) if page not in zeros or page == 199]
    assert [a + i * PAGE for a, n in stored for i in range(n)] == expected
    content = b"".join(pattern(page) if page != start + 199 * PAGE else bytes(PAGE - 1) + b"\7" for page in expected)
    assert (folder / "images" / "pages-7.img").read_bytes() == content
    with ImageFolder(folder / "images") as images:
        assert images.verify(everything=True) > len(content)
        assert list(read_pagemap(images, "pagemap", child.pid).vaddrs) == list(stored.vaddrs)


def test_zeros_over_a_file_are_stored(folder: Path) -> None:
    file = folder / "file"
    file.write_bytes(b"x" * PAGE * 8)

    def prepare() -> list[int]:
        start = map_memory(8 * PAGE, PROT_RW, MAP_PRIVATE, os.open(file, os.O_RDONLY))
        ctypes.memset(start + 2 * PAGE, 0, 3 * PAGE)
        return [start]

    with MemoryChild(prepare) as child, ImageWriter(folder / "images") as writer:
        (start,) = child.values
        mm = address_space(area(start, 8 * PAGE, vmaflags.FILE_PRIVATE))
        assert list(memory.dump(writer, child.pid, mm, 1)) == [(start + 2 * PAGE, 3)]


def is_exclusive(address: int) -> bool:
    """Whether a page of ours is mapped by nobody else: bit 56 in Documentation/admin-guide/mm/pagemap.rst."""
    with open("/proc/self/pagemap", "rb", buffering=0) as pagemap:
        return bool(int.from_bytes(os.pread(pagemap.fileno(), 8, address // PAGE * 8), "little") >> 56 & 1)


@pytest.mark.parametrize("jobs", [1, 3])
def test_reading_pages_that_are_shared_since_a_fork_does_not_copy_them(folder: Path, jobs: int) -> None:
    """Shared and own pages in one chunk, in one piece, and in pieces that are far from each other."""
    nr_pages = 3000
    own = {page for page in range(nr_pages) if page % 3 == 0 or 500 < page < 900}
    there = [page for page in range(nr_pages) if not 1200 < page < 2200 and page % 11]
    start = map_memory(nr_pages * PAGE)
    libc.madvise(start, nr_pages * PAGE, 15)  # MADV_NOHUGEPAGE: pages are shared one by one
    for page in there:
        fill(start + page * PAGE)

    def prepare() -> list[int]:
        for page in own.intersection(there):
            ctypes.memset(start + page * PAGE, page % 251 + 1, PAGE)
        return [start]

    with MemoryChild(prepare) as child, ImageWriter(folder / "images") as writer:
        memory.dump(writer, child.pid, address_space(area(start, nr_pages * PAGE)), 7, jobs=jobs)
        shared = [page for page in there if not is_exclusive(start + page * PAGE)]
        commit_images(writer)
    libc.munmap(start, nr_pages * PAGE)
    assert shared == [page for page in there if page not in own]
    content = [bytes([page % 251 + 1]) * PAGE if page in own else pattern(start + page * PAGE) for page in there]
    assert (folder / "images" / "pages-7.img").read_bytes() == b"".join(content)


def test_threads_say_what_they_wrote_and_when(folder: Path) -> None:
    def prepare() -> list[int]:
        start = map_memory(1000 * PAGE)
        fill(start, 1000)
        return [start]

    with MemoryChild(prepare) as child, ImageWriter(folder / "images") as writer:
        progress = memory.Progress()
        pages = memory.PagesFile(writer, 1, 3, None, progress)
        began = time.monotonic_ns()
        pages.add_from_task(child.pid, memory.scan(child.pid, [area(child.values[0], 1000 * PAGE)], memory.STORED))
        assert len(progress.workers) == 3
        assert sum(worker.bytes for worker in progress.workers) == pages.size == 1000 * PAGE
        for worker in progress.workers:
            assert began <= worker.begin_ns <= worker.end_ns <= time.monotonic_ns()


def test_a_full_disk_is_reported_as_such(folder: Path) -> None:
    def prepare() -> list[int]:
        start = map_memory(64 * PAGE)
        fill(start, 64)
        return [start]

    with MemoryChild(prepare) as child, ImageWriter(folder / "images") as writer:
        pages = memory.PagesFile(writer, 1, None, None, None)
        full = os.open("/dev/full", os.O_RDWR)
        os.dup2(full, pages._fd)
        os.close(full)
        runs = memory.scan(child.pid, [area(child.values[0], 64 * PAGE)], memory.STORED)
        with pytest.raises(GpurestoreError, match=r"no space left for pages-1\.img"):
            pages.add_from_task(child.pid, runs)


def test_pages_that_went_away_are_an_error_that_names_the_address(folder: Path) -> None:
    with MemoryChild(lambda: [map_memory(PAGE)]) as child, ImageWriter(folder / "images") as writer:
        pages = memory.PagesFile(writer, 1, None, None, None)
        gone = memory.PageRuns()
        gone.insert(PAGE, 1)
        with pytest.raises(CoreError, match=f"0x1000 of task {child.pid}"):
            pages.add_from_task(child.pid, gone)


def test_writing_pages_can_be_cancelled(folder: Path) -> None:
    cancel = Cancel()
    cancel.set()
    with ImageWriter(folder / "images") as writer, pytest.raises(CancelledError):
        pages = memory.PagesFile(writer, 1, None, cancel, None)
        runs = memory.PageRuns()
        runs.insert(PAGE, 1)
        pages.add_from_task(os.getpid(), runs)


def test_an_object_is_stored_without_its_holes_and_its_last_page_whole(folder: Path) -> None:
    fd = os.memfd_create("object")
    size = 20 * PAGE + 100
    os.ftruncate(fd, size)
    os.pwrite(fd, b"a" * PAGE, 3 * PAGE)
    os.pwrite(fd, b"z" * 100, 20 * PAGE)
    os.pwrite(fd, bytes(PAGE), 5 * PAGE)
    with ImageWriter(folder / "images") as writer:
        assert memory.save_object(writer, 5, fd, size, 2) == 2 * PAGE
        commit_images(writer)
    copy = os.memfd_create("copy")
    os.ftruncate(copy, size)
    with ImageFolder(folder / "images") as images:
        assert list(read_pagemap(images, "pagemap-shmem", 5).vaddrs) == [3 * PAGE, 20 * PAGE]
        memory.fill_file(images, 5, copy, size)
    assert os.pread(copy, size, 0) == os.pread(fd, size, 0)
    assert os.fstat(copy).st_blocks == os.fstat(fd).st_blocks - PAGE // 512
    os.close(fd)
    os.close(copy)
