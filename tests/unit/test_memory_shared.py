"""Objects of shared memory are filled as whole pages, straight from the page cache, where the kernel lets us."""

from __future__ import annotations

import ctypes
import fcntl
import mmap
import os
import random
import signal
from array import array
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from support import without_userfaultfd
from support.memory_child import MAP_ANONYMOUS, MAP_SHARED, PAGE, PROT_RW, commit_images, libc, map_memory, pattern

from gpurestore.core import Cancel
from gpurestore.errors import CancelledError, CoreError
from gpurestore.images.folder import ImageFolder
from gpurestore.images.pagemap import PRESENT, write_pagemap
from gpurestore.images.writer import ImageWriter
from gpurestore.tasks import maps, memory
from gpurestore.tasks.memory import PagePlan

# More than one chunk: a dense part, single pages, short runs, and holes between all of them.
RUNS = [(0, 3000), *((page, 1) for page in range(3001, 5000, 2)), *((page, 5) for page in range(5100, 6000, 9))]
NR = 6200
SIZE = NR * PAGE
F_ADD_SEALS, F_SEAL_WRITE = 1033, 8


@pytest.fixture
def start() -> Iterator[int]:
    address = map_memory(SIZE, PROT_RW, MAP_SHARED | MAP_ANONYMOUS)
    yield address
    libc.munmap(address, SIZE)


@pytest.fixture
def found(folder: Path) -> Iterator[ImageFolder]:
    with ImageWriter(folder / "images") as writer:
        vaddrs, nr_pages = array("Q", [page * PAGE for page, _ in RUNS]), array("Q", [nr for _, nr in RUNS])
        write_pagemap(writer, "pagemap-shmem", 1, 4, vaddrs, nr_pages, array("I", [PRESENT] * len(RUNS)))
        content = b"".join(pattern(page * PAGE, nr) for page, nr in RUNS)
        writer.append(writer.open_raw("pages-4.img"), content, "pages-4.img")
        commit_images(writer)
    with ImageFolder(folder / "images") as images:
        yield images


def expected(size: int = SIZE) -> bytes:
    content = bytearray(SIZE)
    for page, nr in RUNS:
        content[page * PAGE : (page + nr) * PAGE] = pattern(page * PAGE, nr)
    return bytes(content[:size])


def fill(found: ImageFolder, start: int, cancel: Cancel | None = None) -> PagePlan:
    """Fill our own memory with two threads; demands that no mapping and no descriptor is left behind."""
    made = memory.plan_object(found, 1, SIZE)
    with memory.open_pages(found, made) as source, nothing_left():
        made.fill(start, SIZE, source, 2, cancel)
    return made


@contextmanager
def nothing_left() -> Iterator[None]:
    before = shown()
    try:
        yield
    finally:
        assert shown() == before


def shown() -> tuple[int, list[str]]:
    """How much of files and shared memory we have mapped, and what is open."""
    shared = [vma for vma in maps.read(os.getpid()) if vma.shared]
    links = (f"/proc/self/fd/{fd}" for fd in os.listdir("/proc/self/fd"))
    return sum(vma.end - vma.start for vma in shared), sorted(
        os.readlink(link) for link in links if os.path.exists(link)
    )


def resident(start: int) -> set[int]:
    """Pages that the object has."""
    answer = (ctypes.c_ubyte * NR)()
    assert libc.mincore(ctypes.c_void_p(start), ctypes.c_size_t(SIZE), answer) == 0
    return {number for number, byte in enumerate(answer) if byte & 1}


def test_all_pages_are_put_in_place_and_holes_stay_holes(found: ImageFolder, start: int) -> None:
    made = fill(found, start)
    assert resident(start) == {page + i for page, nr in RUNS for i in range(nr)}
    assert ctypes.string_at(start, SIZE) == expected()
    counts = made.counts
    assert counts.placed_bytes == counts.done_bytes == counts.total_bytes == sum(nr for _, nr in RUNS) * PAGE


def test_pages_that_are_there_already_get_the_content_of_the_images(found: ImageFolder, start: int) -> None:
    hole = 3000
    for page in (5, hole, 3001):
        ctypes.memset(start + page * PAGE, 77, PAGE)
    made = fill(found, start)
    content = expected()
    assert ctypes.string_at(start, SIZE) == content[: hole * PAGE] + b"M" * PAGE + content[(hole + 1) * PAGE :]
    # What lies elsewhere still went the short way.
    assert 0 < made.counts.placed_bytes < made.total_bytes == made.done_bytes


def test_a_task_that_touches_the_object_meanwhile_waits_for_nothing(found: ImageFolder, start: int) -> None:
    """It touches what is a hole in the images, and what is not, through the mapping that it inherited."""
    ready, told = os.pipe()
    pid = os.fork()
    if pid == 0:
        touched = random.Random(4)
        os.write(told, b"!")
        while True:
            ctypes.string_at(start + touched.randrange(NR) * PAGE, 8)
    try:
        os.read(ready, 1)
        for _ in range(4):
            made = fill(found, start)
            assert ctypes.string_at(start, SIZE) == expected()
            assert made.done_bytes == made.total_bytes
            assert os.waitpid(pid, os.WNOHANG) == (0, 0)
            libc.madvise(start, SIZE, mmap.MADV_REMOVE)
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        os.close(ready)
        os.close(told)


def test_without_userfaultfd_pages_are_read_to_their_places(found: ImageFolder, start: int) -> None:
    pid = os.fork()
    if pid == 0:
        try:
            without_userfaultfd.refuse()
            made = fill(found, start)
            os._exit(7 if made.counts.placed_bytes == 0 and made.done_bytes == made.total_bytes else 8)
        finally:
            os._exit(9)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7
    assert ctypes.string_at(start, SIZE) == expected()


def test_private_memory_is_read_to_its_place(found: ImageFolder) -> None:
    start = map_memory(SIZE)
    made = fill(found, start)
    assert ctypes.string_at(start, SIZE) == expected()
    assert made.counts.placed_bytes == 0
    libc.munmap(start, SIZE)


def test_an_image_that_shrinks_meanwhile_is_an_error(found: ImageFolder, start: int) -> None:
    made = memory.plan_object(found, 1, SIZE)
    with memory.open_pages(found, made) as source, nothing_left():
        os.truncate(found.path / "pages-4.img", 2000 * PAGE)
        with pytest.raises(CoreError, match="of the pages file"):
            made.fill(start, SIZE, source, 2)


def test_filling_can_be_cancelled(found: ImageFolder, start: int) -> None:
    cancel = Cancel()
    cancel.set()
    with pytest.raises(CancelledError):
        fill(found, start, cancel)
    assert resident(start) == set()


def test_a_memfd_of_odd_size_can_be_sealed_afterwards(found: ImageFolder) -> None:
    size = 6000 * PAGE - 100
    fd = os.memfd_create("odd", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, size)
    memory.fill_file(found, 1, fd, size, jobs=2)
    fcntl.fcntl(fd, F_ADD_SEALS, F_SEAL_WRITE)  # refused while anybody could write through a mapping
    assert os.pread(fd, SIZE, 0) == expected(size)
    assert os.fstat(fd).st_blocks * 512 == sum(nr for _, nr in RUNS) * PAGE
    os.close(fd)
