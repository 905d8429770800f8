"""Long runs of small pages are placed in a task's memory from outside; where that fails the task reads them."""

from __future__ import annotations

import ctypes
import os
import signal
from array import array
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest
from support.agent_child import AgentChild
from support.memory_child import PAGE, commit_images, libc, map_memory, pattern

from gpurestore.core import Cancel, Region
from gpurestore.errors import CallFailedError, CancelledError, TaskDiedError
from gpurestore.images import pb
from gpurestore.images.folder import ImageFolder
from gpurestore.images.pagemap import PRESENT, write_pagemap
from gpurestore.images.writer import ImageWriter
from gpurestore.tasks import maps, memory, vmaflags
from gpurestore.tasks.memory import PagePlan, PagesSource, Worker, placing, userfaultfd
from gpurestore.tasks.memory.placing import Placing

NR = 14000
LONG = [(0, 3000), *((page, 20) for page in range(3005, 5000, 30))]
SHORT = [(page, 5) for page in range(5100, 8000, 9)]
CHUNK = 1 << 20


@pytest.fixture
def start() -> Iterator[int]:
    address = map_memory(NR * PAGE)
    yield address
    libc.munmap(address, NR * PAGE)


@pytest.fixture
def region() -> Iterator[Region]:
    size = Region.size_for(2)
    with Region(maps.find_hole(maps.own_ranges(), size), 2) as made:
        yield made


def area(start: int, nr: int = NR, status: int = vmaflags.ANON_PRIVATE, madv: int = 0) -> pb.vma_entry:
    status |= vmaflags.REGULAR
    return pb.vma_entry(
        start=start, end=start + nr * PAGE, pgoff=0, shmid=0, prot=3, flags=0x22, status=status, fd=-1, madv=madv
    )


@contextmanager
def planned(folder: Path, start: int, runs: list[tuple[int, int]]) -> Iterator[tuple[PagePlan, PagesSource]]:
    """Images with ``runs`` (page, number of pages) of the memory at ``start``, and the plan to fill it."""
    with ImageWriter(folder / "images") as writer:
        vaddrs, nr_pages = array("Q", [start + page * PAGE for page, _ in runs]), array("Q", [nr for _, nr in runs])
        write_pagemap(writer, "pagemap", 1, 4, vaddrs, nr_pages, array("I", [PRESENT] * len(runs)))
        content = b"".join(pattern(start + page * PAGE, nr) for page, nr in runs)
        writer.append(writer.open_raw("pages-4.img"), content, "pages-4.img")
        commit_images(writer)
    with ImageFolder(folder / "images") as found:
        made = memory.plan_pages(found, 1, pb.mm_entry(vmas=[area(start)]), CHUNK)
        with memory.open_pages(found, made) as source:
            yield made, source


@contextmanager
def placer(child: AgentChild, ranges: Sequence[tuple[int, int]], source: PagesSource) -> Iterator[Worker]:
    """A worker that places pages in ``ranges``, as a restore makes it; skips where the kernel does not offer that."""
    try:
        uffd = child.run(placing.plan_open())[0].result
        child.run(placing.plan_register(uffd, ranges))
        made = Placing(child.pid, uffd, source.fd)
    except (CallFailedError, OSError) as error:
        pytest.skip(f"this kernel places no pages: {error}")
    yield Worker(child.pid, 0, placing=made)
    made.close()
    child.run(userfaultfd.plan_close(uffd))


def expect(child: AgentChild, start: int, runs: list[tuple[int, int]]) -> None:
    expected = bytearray(NR * PAGE)
    for page, nr in runs:
        expected[page * PAGE : (page + nr) * PAGE] = pattern(start + page * PAGE, nr)
    assert child.read(start, NR * PAGE) == expected


def test_long_runs_are_placed_and_short_ones_read(folder: Path, region: Region, start: int) -> None:
    with planned(folder, start, LONG + SHORT) as (made, source), AgentChild(region) as child:
        before = [(vma.start, vma.end, vma.flags) for vma in child.vmas()]
        with placer(child, made.placed, source) as worker:
            made.run(region, worker, source)
        expect(child, start, LONG + SHORT)
        assert made.done_bytes == made.total_bytes
        stored = sum(nr for _, nr in LONG) * PAGE
        assert stored - CHUNK < made.placed_bytes < stored + CHUNK
        assert [(vma.start, vma.end, vma.flags) for vma in child.vmas()] == before


def test_a_restored_page_is_the_tasks_own(folder: Path, region: Region, start: int) -> None:
    """It can be written to, and the image does not change with it."""
    with planned(folder, start, LONG) as (made, source), AgentChild(region) as child:
        with placer(child, made.placed, source) as worker:
            made.run(region, worker, source)
        with open(f"/proc/{child.pid}/mem", "r+b", buffering=0) as task:
            os.pwrite(task.fileno(), b"changed", start + 5 * PAGE)
        assert child.read(start + 5 * PAGE, 7) == b"changed"
        assert os.pread(source.fd, PAGE, 5 * PAGE) == pattern(start + 5 * PAGE)


def test_pages_that_are_there_already_are_overwritten_and_gaps_stay(folder: Path, region: Region, start: int) -> None:
    in_run, in_gap = start + 2000 * PAGE, start + 3001 * PAGE
    for address in (in_run, in_gap):
        ctypes.memset(address, 77, PAGE)
    with planned(folder, start, LONG) as (made, source), AgentChild(region) as child:
        with placer(child, made.placed, source) as worker:
            made.run(region, worker, source)
        assert child.read(in_gap, PAGE) == b"M" * PAGE
        assert 0 < made.placed_bytes < made.done_bytes == made.total_bytes
        for page, nr in LONG:
            assert child.read(start + page * PAGE, nr * PAGE) == pattern(start + page * PAGE, nr)


def test_where_nothing_is_registered_everything_is_read(folder: Path, region: Region, start: int) -> None:
    with planned(folder, start, LONG) as (made, source), AgentChild(region) as child:
        with placer(child, (), source) as worker:
            made.run(region, worker, source)
        expect(child, start, LONG)
        assert (made.placed_bytes, made.done_bytes) == (0, made.total_bytes)


def test_placing_ends_when_it_is_cancelled(folder: Path, region: Region, start: int) -> None:
    with planned(folder, start, LONG) as (made, source), AgentChild(region) as child:
        cancel = Cancel()
        with placer(child, made.placed, source) as worker:
            cancel.set()
            with pytest.raises(CancelledError):
                made.run(region, worker, source, cancel)
        assert made.done_bytes == 0


def test_a_task_that_dies_meanwhile_is_an_error(folder: Path, region: Region, start: int) -> None:
    with planned(folder, start, LONG) as (made, source), AgentChild(region) as child:
        with pytest.raises(TaskDiedError), placer(child, made.placed, source) as worker:
            os.kill(child.pid, signal.SIGKILL)
            made.run(region, worker, source)


def test_only_empty_anonymous_memory_with_enough_pages_is_placed(folder: Path, start: int) -> None:
    """Not a little of it, not what a child has from its parent, not a private mapping of a file."""
    edges = [start + page * PAGE for page in (0, 1000, 7000, 8000, 14000)]
    vmas = [
        area(edges[0], 1000),
        area(edges[1], 6000),
        area(edges[2], 1000, vmaflags.FILE_PRIVATE),
        area(edges[3], 6000, madv=1 << vmaflags.MADV_NOHUGEPAGE),
    ]
    runs = [(0, 10), (1000, 5000), (7000, 500), (8000, 5000)]
    with planned(folder, start, runs), ImageFolder(folder / "images") as found:
        mm = pb.mm_entry(vmas=vmas)
        assert memory.plan_pages(found, 1, mm).placed == ((edges[1], edges[2]), (edges[3], edges[4]))
        assert memory.plan_pages(found, 1, mm, kept=[edges[1]]).placed == ((edges[3], edges[4]),)


def test_nothing_is_placed_in_a_small_task(folder: Path, start: int) -> None:
    with planned(folder, start, [(0, 4000)]) as (made, _):
        assert made.placed == ()
