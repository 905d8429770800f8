"""Pages come back to where they were, and nothing that an image says is believed."""

from __future__ import annotations

import ctypes
import os
import threading
import time
from array import array
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.agent_child import AgentChild
from support.memory_child import PAGE, PROT_READ, PROT_RW, commit_images, libc, map_memory, pattern, plan_offsets

from gpurestore.core import Cancel, Region
from gpurestore.errors import CancelledError, CoreError, ImageError, TaskDiedError
from gpurestore.images import pb
from gpurestore.images.folder import ImageFolder
from gpurestore.images.pagemap import LAZY, PARENT, PRESENT, Pagemap, write_pagemap
from gpurestore.images.writer import ImageWriter
from gpurestore.tasks import maps, memory, vmaflags
from gpurestore.tasks.memory import Worker, filling

BASE = 0x10_0000_0000
MIB = 1 << 20


def area(start: int, nr_pages: int, status: int = vmaflags.REGULAR | vmaflags.ANON_PRIVATE) -> pb.vma_entry:
    return pb.vma_entry(
        start=start, end=start + nr_pages * PAGE, pgoff=0, shmid=0, prot=3, flags=0x22, status=status, fd=-1
    )


def images(
    folder: Path, runs: list[tuple[int, int]], *, flags: int = PRESENT, file_pages: int | None = None
) -> ImageFolder:
    """A folder with the pagemap and the pages of task 1, each page holding its address."""
    with ImageWriter(folder / "images") as writer:
        vaddrs, nr_pages = array("Q", [a for a, _ in runs]), array("Q", [n for _, n in runs])
        write_pagemap(writer, "pagemap", 1, 4, vaddrs, nr_pages, array("I", [flags] * len(runs)))
        content = b"".join(pattern(a, n) for a, n in runs)
        if file_pages is not None:
            content = content[: file_pages * PAGE]
        writer.append(writer.open_raw("pages-4.img"), content, "pages-4.img")
        commit_images(writer)
    return ImageFolder(folder / "images")


def plan(folder: Path, runs: list[tuple[int, int]], *vmas: pb.vma_entry, **more: int) -> memory.PagePlan:
    with images(folder, runs, **more) as found:
        return memory.plan_pages(found, 1, pb.mm_entry(vmas=vmas))


def test_the_plan_says_which_mappings_are_written_to(folder: Path) -> None:
    empty, left, right = area(BASE, 4), area(BASE + 8 * PAGE, 4), area(BASE + 12 * PAGE, 4)
    found = plan(folder, [(BASE + 10 * PAGE, 4)], empty, left, right)
    assert found.filled == {left.start, right.start}
    assert found.total_bytes == 4 * PAGE
    assert found.done_bytes == 0


def test_pages_of_the_vdso_are_skipped(folder: Path) -> None:
    vdso = area(BASE, 2, vmaflags.REGULAR | vmaflags.VDSO | vmaflags.ANON_PRIVATE)
    found = plan(folder, [(BASE, 2), (BASE + 2 * PAGE, 1)], vdso, area(BASE + 2 * PAGE, 1))
    assert found.filled == {BASE + 2 * PAGE}
    assert found.total_bytes == PAGE


@pytest.mark.parametrize(
    ("runs", "why"),
    [
        ([(BASE - PAGE, 1)], "outside of every mapping"),
        ([(BASE + 15 * PAGE, 2)], "outside of every mapping"),
        ([(BASE + 64 * PAGE, 1)], "a mapping that has none"),
        ([(BASE + 4 * PAGE, 2), (BASE + 5 * PAGE, 1)], "not behind the entry before"),
        ([(BASE + 4 * PAGE, 1), (BASE, 1)], "not behind the entry before"),
    ],
)
def test_an_entry_at_a_wrong_place_is_refused(folder: Path, runs: list[tuple[int, int]], why: str) -> None:
    shared = area(BASE + 64 * PAGE, 1, vmaflags.REGULAR | vmaflags.ANON_SHARED)
    with pytest.raises(ImageError, match=f"pagemap-1.img: .*{why}"):
        plan(folder, runs, area(BASE, 16), shared)


def test_a_pages_file_that_is_too_short_is_refused(folder: Path) -> None:
    with pytest.raises(ImageError, match="behind the end of a file of 8192 bytes"):
        plan(folder, [(BASE, 3)], area(BASE, 16), file_pages=2)


@pytest.mark.parametrize(("flags", "why"), [(PARENT, "in a parent image"), (LAZY, "are not stored")])
def test_pages_that_are_elsewhere_are_refused(folder: Path, flags: int, why: str) -> None:
    with pytest.raises(ImageError, match=why):
        plan(folder, [(BASE, 3)], area(BASE, 16), flags=flags)


def test_an_object_of_an_impossible_size_is_refused(folder: Path) -> None:
    with images(folder, []) as found, pytest.raises(ImageError, match="impossible size"):
        memory.plan_object(found, 1, 1 << 63)


@pytest.fixture
def region() -> Iterator[Region]:
    size = Region.size_for(2)
    with Region(maps.find_hole(maps.own_ranges(), size), 2) as made:
        yield made


sparse_runs = st.lists(st.tuples(st.integers(0, 3), st.integers(1, 700)), min_size=1, max_size=40)


@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(sparse_runs, st.integers(1, 3 * MIB))
def test_every_page_arrives_at_its_address(
    tmp_path_factory: pytest.TempPathFactory, steps: list[tuple[int, int]], chunk_bytes: int
) -> None:
    runs, at = [], 0
    for gap, nr in steps:
        runs.append((at + gap * PAGE, nr))
        at += (gap + nr) * PAGE
    start = map_memory(at)
    folder = tmp_path_factory.mktemp("pump")
    with images(folder, runs) as found:
        made = plan_offsets(found, at, chunk_bytes=chunk_bytes)
        with memory.open_pages(found, made) as pages:
            made.fill(start, at, pages, jobs=2)
    memory_now = ctypes.string_at(start, at)
    expected = bytearray(at)
    for address, nr in runs:
        expected[address : address + nr * PAGE] = pattern(address, nr)
    assert memory_now == bytes(expected)
    assert made.done_bytes == made.total_bytes == sum(nr for _, nr in runs) * PAGE
    libc.munmap(start, at)


def test_a_task_fills_its_own_memory(folder: Path, region: Region) -> None:
    """Single pages, so that vectors and batches are full, and one large run, both over more than one wake."""
    nr = 6000
    start = map_memory(nr * PAGE)
    runs = [(start + i * PAGE, 1) for i in range(0, 3000, 2)] + [(start + 3000 * PAGE, 3000)]
    with images(folder, runs) as found:
        made = memory.plan_pages(found, 1, pb.mm_entry(vmas=[area(start, nr)]))
        with memory.open_pages(found, made) as pages, AgentChild(region) as child:
            made.run(region, Worker(child.pid, 0), pages)
            content = child.read(start, nr * PAGE)
    for address, count in runs:
        assert content[address - start : address - start + count * PAGE] == pattern(address, count)
    assert content[PAGE : 2 * PAGE] == bytes(PAGE)
    assert made.done_bytes == made.total_bytes
    libc.munmap(start, nr * PAGE)


def test_memory_that_cannot_be_written_is_an_error_that_names_the_address(folder: Path, region: Region) -> None:
    start = map_memory(8 * PAGE)
    libc.mprotect(start + 4 * PAGE, 4 * PAGE, PROT_READ)
    with images(folder, [(start + 4 * PAGE, 4)]) as found:
        made = memory.plan_pages(found, 1, pb.mm_entry(vmas=[area(start, 8)]))
        with memory.open_pages(found, made) as pages, AgentChild(region) as child:
            with pytest.raises(CoreError, match=f"into {start + 4 * PAGE:#x} of task {child.pid}"):
                made.run(region, Worker(child.pid, 0), pages)
    libc.munmap(start, 8 * PAGE)


def test_a_pages_file_that_shrinks_meanwhile_is_an_error(folder: Path, region: Region) -> None:
    start = map_memory(8 * PAGE, PROT_RW)
    with images(folder, [(start, 8)]) as found:
        made = memory.plan_pages(found, 1, pb.mm_entry(vmas=[area(start, 8)]))
        with memory.open_pages(found, made) as pages, AgentChild(region) as child:
            os.truncate(folder / "images" / "pages-4.img", 3 * PAGE)
            with pytest.raises(CoreError, match="only 12288 of 32768 bytes"):
                made.run(region, Worker(child.pid, 0), pages)
    libc.munmap(start, 8 * PAGE)


def test_filling_can_be_cancelled(folder: Path, region: Region) -> None:
    cancel = Cancel()
    cancel.set()
    start = map_memory(8 * PAGE)
    with images(folder, [(start, 8)]) as found:
        made = memory.plan_pages(found, 1, pb.mm_entry(vmas=[area(start, 8)]))
        with memory.open_pages(found, made) as pages, AgentChild(region) as child:
            with pytest.raises(CancelledError):
                made.run(region, Worker(child.pid, 0), pages, cancel)
            with pytest.raises(CancelledError):
                memory.plan_pages(found, 1, pb.mm_entry(vmas=[area(start, 8)])).fill(0, 8 * PAGE, pages, cancel=cancel)
    libc.munmap(start, 8 * PAGE)


def test_a_task_that_dies_meanwhile_is_an_error(folder: Path, region: Region) -> None:
    start = map_memory(8 * PAGE)
    with images(folder, [(start, 8)]) as found:
        made = memory.plan_pages(found, 1, pb.mm_entry(vmas=[area(start, 8)]))
        with memory.open_pages(found, made) as pages, AgentChild(region) as child:
            os.kill(child.pid, 9)
            with pytest.raises(TaskDiedError):
                made.run(region, Worker(child.pid, 0), pages)
    libc.munmap(start, 8 * PAGE)


def test_half_a_million_runs_are_planned_in_well_below_a_second_of_processor_time(folder: Path) -> None:
    nr = 500_000
    with ImageWriter(folder / "images") as writer:
        vaddrs = array("Q", range(BASE, BASE + 2 * nr * PAGE, 2 * PAGE))
        write_pagemap(writer, "pagemap", 1, 4, vaddrs, array("Q", [1]) * nr, array("I", [PRESENT]) * nr)
        os.ftruncate(writer.open_raw("pages-4.img"), nr * PAGE)
        writer.write("inventory", [pb.inventory_entry(img_version=2, fdinfo_per_id=True, ns_per_id=True)])
        began = time.thread_time()
        # read where it is being made: hashing two gigabytes of holes is not what is tested
        with ImageFolder(writer.path) as found:
            made = memory.plan_pages(found, 1, pb.mm_entry(vmas=[area(BASE, 2 * nr)]))
        assert time.thread_time() - began < 0.5
        assert made.total_bytes == nr * PAGE
        assert threading.active_count() < 20


def is_acceptable(entries: list[tuple[int, int, int]], ranges: list[tuple[int, int, int]], file_pages: int) -> bool:
    """What the queue must accept, said as simply as possible; everything is counted in pages."""
    kinds = {page: kind for start, end, kind in ranges for page in range(start, end)}
    at = 0
    for page, nr, flags in entries:
        if nr < 1 or page < at or flags & PARENT or not flags & PRESENT:
            return False
        if any(kinds.get(p, 2) == 2 for p in range(page, page + nr)):
            return False
        at = page + nr
    return sum(nr for _, nr, _ in entries) <= file_pages


@st.composite
def neighbouring_ranges(draw: st.DrawFn) -> list[tuple[int, int, int]]:
    at, found = 0, []
    for gap, size, kind in draw(
        st.lists(st.tuples(st.integers(0, 2), st.integers(1, 6), st.integers(0, 2)), max_size=6)
    ):
        found.append((at + gap, at + gap + size, kind))
        at += gap + size
    return found


some_entries = st.lists(
    st.tuples(st.integers(0, 30), st.integers(0, 8), st.sampled_from([PRESENT] * 6 + [PRESENT | LAZY, PARENT, LAZY])),
    max_size=5,
)


@given(st.one_of(some_entries, some_entries.map(sorted)), neighbouring_ranges(), st.integers(0, 40))
def test_exactly_what_fits_is_accepted(
    entries: list[tuple[int, int, int]], ranges: list[tuple[int, int, int]], file_pages: int
) -> None:
    columns = [array(code, [entry[i] * scale for entry in entries]) for i, code, scale in COLUMNS]
    pagemap = Pagemap(1, *columns, present_pages=0, ascending=False)
    starts, ends = (array("Q", [r[i] * PAGE for r in ranges]) for i in (0, 1))
    kinds = bytes(kind for *_, kind in ranges)
    try:
        filling._create_queue(pagemap, (starts, ends, kinds), None, file_pages * PAGE, PAGE, "pagemap-1.img")
        accepted = True
    except ImageError:
        accepted = False
    assert accepted == is_acceptable(entries, ranges, file_pages)


COLUMNS = ((0, "Q", PAGE), (1, "Q", 1), (2, "I", 1))
any_u64 = st.integers(0, (1 << 64) - 1)


@given(st.lists(st.tuples(any_u64, any_u64), max_size=4), any_u64, any_u64, any_u64)
def test_no_number_makes_the_queue_wrap_around(
    entries: list[tuple[int, int]], end: int, file_bytes: int, chunk_bytes: int
) -> None:
    nr = len(entries)
    vaddrs, nr_pages = array("Q", [a for a, _ in entries]), array("Q", [n for _, n in entries])
    pagemap = Pagemap(1, vaddrs, nr_pages, array("I", [PRESENT] * nr), present_pages=0, ascending=False)
    ranges = array("Q", [0]), array("Q", [end // PAGE * PAGE]), b"\1"
    try:
        filling._create_queue(pagemap, ranges, None, file_bytes, chunk_bytes, "pagemap-1.img")
    except ImageError:
        return
    assert sum(nr_pages) * PAGE <= file_bytes
