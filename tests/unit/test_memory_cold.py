"""What is not in the page cache is read past it, and what is in there stays there."""

from __future__ import annotations

import ctypes
import mmap
import os
from array import array
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from support.agent_child import AgentChild
from support.memory_child import (
    MAP_ANONYMOUS,
    MAP_SHARED,
    PAGE,
    PROT_READ,
    PROT_RW,
    commit_images,
    libc,
    map_memory,
    pattern,
)

from gpurestore.core import Region, ffi
from gpurestore.images import pb
from gpurestore.images.folder import ImageFolder
from gpurestore.images.pagemap import PRESENT, write_pagemap
from gpurestore.images.writer import ImageWriter
from gpurestore.tasks import maps, memory, vmaflags
from gpurestore.tasks.memory import PagePlan, PagesSource, Reading, Worker

NR = 12 * 1024  # pages: 48 MiB
SIZE = NR * PAGE


@pytest.fixture
def start() -> Iterator[int]:
    address = map_memory(SIZE, PROT_RW, MAP_SHARED | MAP_ANONYMOUS)
    yield address
    libc.munmap(address, SIZE)


@pytest.fixture
def disk(folder: Path, start: int) -> Path:
    """A folder with images whose pages file is on a disk that can read past its cache, and whose cache is empty."""
    with ImageWriter(folder / "images") as writer:
        nr_pages, flags = array("Q", [NR]), array("I", [PRESENT])
        write_pagemap(writer, "pagemap", 1, 4, array("Q", [start]), nr_pages, flags)
        write_pagemap(writer, "pagemap-shmem", 1, 4, array("Q", [0]), nr_pages, flags)
        writer.append(writer.open_raw("pages-4.img"), pattern(start, NR), "pages-4.img")
        commit_images(writer)
    with memory.open_source(os.open(pages(folder), os.O_RDONLY), Reading.DIRECT) as source:
        if source.direct_fd < 0:
            pytest.skip(f"the file system of {folder} has no O_DIRECT")
    evict(folder)
    if resident(folder):
        pytest.skip(f"the file system of {folder} keeps everything in memory")
    return folder


def pages(folder: Path) -> Path:
    return folder / "images" / "pages-4.img"


def evict(folder: Path) -> None:
    with open(pages(folder), "rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


@contextmanager
def kept_cached(folder: Path, first: int, nr: int) -> Iterator[None]:
    """Pages of the file are in the page cache, and, if we may lock them, stay there when memory is taken back."""
    with open(pages(folder), "rb") as file:
        address = map_memory(nr * PAGE, PROT_READ, MAP_SHARED, file.fileno(), first * PAGE)
    try:
        libc.madvise(address, nr * PAGE, mmap.MADV_RANDOM)  # no neighbours
        ctypes.string_at(address, nr * PAGE)
        libc.mlock(address, nr * PAGE)
        yield
    finally:
        libc.munmap(address, nr * PAGE)


def resident(folder: Path) -> set[int]:
    """The pages of the file that are in the page cache."""
    with open(pages(folder), "rb") as file, mmap.mmap(file.fileno(), SIZE, prot=mmap.PROT_READ) as view:
        answer = (ctypes.c_ubyte * NR)()
        address = int(ffi.cast("uintptr_t", ffi.from_buffer(view)))
        assert libc.mincore(ctypes.c_void_p(address), ctypes.c_size_t(SIZE), answer) == 0
        return {number for number, byte in enumerate(answer) if byte & 1}


def fill(folder: Path, start: int, reading: Reading) -> tuple[PagePlan, PagesSource]:
    """Fill our own memory; the plan afterwards, and the source, closed."""
    with ImageFolder(folder / "images") as found:
        made = memory.plan_object(found, 1, SIZE)
        with memory.open_pages(found, made, reading) as source:
            made.fill(start, SIZE, source, jobs=2)
    assert ctypes.string_at(start, SIZE) == pattern(start, NR)
    return made, source


def test_a_cold_image_is_read_directly_and_stays_cold(disk: Path, start: int) -> None:
    made, _ = fill(disk, start, Reading.AUTO)
    assert made.cold_bytes == SIZE
    assert made.counts.direct_bytes == SIZE
    assert resident(disk) == set()


def test_what_is_cached_is_read_from_there_and_the_rest_directly(disk: Path, start: int) -> None:
    third = NR // 3
    with kept_cached(disk, third, third):
        assert resident(disk) >= set(range(third, 2 * third))
        made, _ = fill(disk, start, Reading.AUTO)
        assert made.counts.direct_bytes == 2 * third * PAGE
        assert resident(disk) == set(range(third, 2 * third))


def test_an_image_in_the_page_cache_needs_no_second_descriptor(disk: Path, start: int) -> None:
    with kept_cached(disk, 0, NR):
        with ImageFolder(disk / "images") as found:
            made = memory.plan_object(found, 1, SIZE)
            with memory.open_pages(found, made) as source:
                assert source.direct_fd == -1
        made, _ = fill(disk, start, Reading.AUTO)
        assert (made.cold_bytes, made.counts.direct_bytes) == (0, 0)


def test_both_ways_can_be_forced(disk: Path, start: int) -> None:
    assert fill(disk, start, Reading.CACHED)[0].counts.direct_bytes == 0
    # Nearly all: a machine that is short of memory may take some back at any time.
    assert len(resident(disk)) > NR // 2
    assert fill(disk, start, Reading.DIRECT)[0].counts.direct_bytes == SIZE
    assert len(resident(disk)) > NR // 2


def test_a_task_reads_directly_into_its_own_memory(disk: Path, start: int) -> None:
    size = Region.size_for(1)
    status = vmaflags.REGULAR | vmaflags.ANON_PRIVATE
    vma = pb.vma_entry(start=start, end=start + SIZE, pgoff=0, shmid=0, prot=3, flags=0x22, status=status, fd=-1)
    with ImageFolder(disk / "images") as found, Region(maps.find_hole(maps.own_ranges(), size), 1) as region:
        made = memory.plan_pages(found, 1, pb.mm_entry(vmas=[vma]))
        with memory.open_pages(found, made) as source, AgentChild(region) as child:
            assert source.direct_fd >= 0
            made.run(region, Worker(child.pid, 0), source)
            assert child.read(start, SIZE) == pattern(start, NR)
    assert made.counts.direct_bytes == SIZE
    assert resident(disk) == set()


def test_where_a_direct_read_fails_after_all_the_cache_serves(disk: Path, start: int) -> None:
    """The descriptor for direct reads is one that cannot be read from at all."""
    with ImageFolder(disk / "images") as found:
        made = memory.plan_object(found, 1, SIZE)
        with memory.open_pages(found, made, Reading.CACHED) as source:
            source.direct_fd, source.always_direct = os.open("/dev/null", os.O_WRONLY), True
            made.fill(start, SIZE, source, jobs=2)
    assert ctypes.string_at(start, SIZE) == pattern(start, NR)
    assert made.counts.direct_bytes == 0
