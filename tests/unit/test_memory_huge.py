"""Dense blocks become huge pages, mappings do not notice, and where that fails pages come in as they are."""

from __future__ import annotations

import ctypes
import os
from array import array
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.agent_child import AgentChild
from support.memory_child import (
    MAP_ANONYMOUS,
    MAP_PRIVATE,
    MAP_SHARED,
    PAGE,
    PROT_RW,
    commit_images,
    libc,
    map_memory,
    pattern,
    plan_offsets,
)

from gpurestore.batch import Call
from gpurestore.core import Region
from gpurestore.errors import CallFailedError, ImageError
from gpurestore.images import pb
from gpurestore.images.folder import ImageFolder
from gpurestore.images.pagemap import PRESENT, write_pagemap
from gpurestore.images.writer import ImageWriter
from gpurestore.syscalls import NR
from gpurestore.tasks import maps, memory, vmaflags
from gpurestore.tasks.maps import HUGE_PAGE_BYTES as BLOCK
from gpurestore.tasks.memory import HugePages, PagePlan, Worker, hugepages, placing, userfaultfd
from gpurestore.tasks.memory.hugepages import HugeBlocks

Runs = list[tuple[int, int]]
MAP_FIXED = 0x10


@pytest.fixture
def place() -> Iterator[int]:
    """Four blocks of untouched memory, aligned, with room for a staging behind them."""
    size = 4 * BLOCK + hugepages.staging_bytes(1)
    start = map_memory(size + BLOCK)
    aligned = -(-start // BLOCK) * BLOCK
    libc.munmap(aligned + 4 * BLOCK, size + start - aligned - 3 * BLOCK)
    yield aligned
    libc.munmap(start, aligned + 4 * BLOCK - start)


@pytest.fixture
def region() -> Iterator[Region]:
    size = Region.size_for(2)
    with Region(maps.find_hole(maps.own_ranges(), size), 2) as made:
        yield made


def area(start: int, nr_blocks: int = 4) -> pb.vma_entry:
    status = vmaflags.REGULAR | vmaflags.ANON_PRIVATE
    return pb.vma_entry(
        start=start, end=start + nr_blocks * BLOCK, pgoff=0, shmid=0, prot=3, flags=0x22, status=status, fd=-1
    )


def images(folder: Path, runs: Runs) -> ImageFolder:
    with ImageWriter(folder / "images") as writer:
        vaddrs, nr_pages = array("Q", [a for a, _ in runs]), array("Q", [n for _, n in runs])
        write_pagemap(writer, "pagemap", 1, 4, vaddrs, nr_pages, array("I", [PRESENT] * len(runs)))
        writer.append(writer.open_raw("pages-4.img"), b"".join(pattern(a, n) for a, n in runs), "pages-4.img")
        commit_images(writer)
    return ImageFolder(folder / "images")


def plan(found: ImageFolder, start: int, choice: HugePages = HugePages.AUTO, facts: object = ()) -> PagePlan:
    mm = pb.mm_entry(vmas=[area(start)])
    return memory.plan_pages(found, 1, mm, huge=hugepages.blocks(choice, {"huge": facts}))


def huge_bytes(pid: int, start: int) -> int:
    return next(vma.huge_bytes for vma in maps.read(pid) if vma.start <= start < vma.end)


def staging_of(place: int) -> int:
    return place + 5 * BLOCK


def open_uffd(child: AgentChild, made: PagePlan, place: int) -> int:
    """The child's userfaultfd, as a restore sets it up; skips where there is none."""
    if not made.huge:
        pytest.skip("this machine gives no transparent huge pages")
    try:
        uffd = child.run(placing.plan_open())[0].result
        child.run(placing.plan_register(uffd, made.huge, userfaultfd.MOVE))
        child.run(hugepages.plan_staging(staging_of(place), 1))
    except CallFailedError as error:
        pytest.skip(f"this kernel cannot move pages: {error}")
    return uffd


def expect(child: AgentChild, runs: Runs) -> None:
    for start, nr in runs:
        assert child.read(start, nr * PAGE) == pattern(start, nr)


# block 0 whole, block 1 with 32 pages missing in the middle, block 2 with 33 missing, block 3 with one page
def four_blocks(start: int) -> Runs:
    return [
        (start, 512 + 100),
        (start + (512 + 132) * PAGE, 380 + 100),
        (start + (1024 + 133) * PAGE, 379),
        (start + 3 * BLOCK + 7 * PAGE, 1),
    ]


def test_dense_blocks_become_huge_and_the_mapping_stays_as_it_was(folder: Path, region: Region, place: int) -> None:
    runs = four_blocks(place)
    with (
        images(folder, runs) as found,
        memory.open_pages(found, made := plan(found, place)) as source,
        AgentChild(region) as child,
    ):
        before = [vma for vma in child.vmas() if vma.start < place + 4 * BLOCK and vma.end > place]
        uffd = open_uffd(child, made, place)
        made.run(region, Worker(child.pid, 0, uffd, staging_of(place)), source)
        child.run([*userfaultfd.plan_close(uffd), *hugepages.plan_no_staging(staging_of(place), 1)])
        expect(child, runs)
        assert child.read(place + 612 * PAGE, 32 * PAGE) == bytes(32 * PAGE)
        assert huge_bytes(child.pid, place) == 2 * BLOCK
        assert made.counts.moved_bytes == made.counts.huge_bytes == (512 + 480) * PAGE
        assert made.done_bytes == made.total_bytes == sum(nr for _, nr in runs) * PAGE
        after = [vma for vma in child.vmas() if vma.start < place + 4 * BLOCK and vma.end > place]
        assert [(v.start, v.end, v.flags) for v in after] == [(v.start, v.end, v.flags) for v in before]
        assert not [vma for vma in child.vmas() if vma.start == staging_of(place)]


def test_pages_that_are_there_already_stay_and_the_others_come_in_plainly(
    folder: Path, region: Region, place: int
) -> None:
    """As in a child that has memory from its parent: the gap of a dense block is not empty."""
    runs = four_blocks(place)
    gap = place + 620 * PAGE
    ctypes.memset(gap, 77, PAGE)
    with images(folder, runs) as found, memory.open_pages(found, made := plan(found, place)) as source:
        with AgentChild(region) as child:
            uffd = open_uffd(child, made, place)
            made.run(region, Worker(child.pid, 0, uffd, staging_of(place)), source)
            expect(child, runs)
            assert child.read(gap, PAGE) == b"M" * PAGE
            assert child.read(place + 612 * PAGE, 8 * PAGE) == bytes(8 * PAGE)
            assert made.done_bytes == made.total_bytes


def test_huge_pages_are_there_before_anything_is_written_but_not_over_pages_that_were(
    folder: Path, region: Region, place: int
) -> None:
    """As compressed pages need them, which are written from outside."""
    runs = [(place, 4 * 512 - 1)]
    ctypes.memset(place + 2 * BLOCK + 9 * PAGE, 77, PAGE)
    with images(folder, runs) as found, AgentChild(region) as child:
        made = plan(found, place)
        uffd = open_uffd(child, made, place)
        made.populate(region, Worker(child.pid, 0, uffd, staging_of(place)))
        child.run([*userfaultfd.plan_close(uffd), *hugepages.plan_no_staging(staging_of(place), 1)])
        assert child.read(place, 4 * BLOCK) == bytes(2 * BLOCK + 9 * PAGE) + b"M" * PAGE + bytes(2 * BLOCK - 10 * PAGE)
        assert huge_bytes(child.pid, place) >= 2 * BLOCK
        assert made.counts.moved_bytes == 2 * BLOCK
        assert made.done_bytes == 0


def test_nothing_is_populated_where_pages_cannot_be_moved(folder: Path, region: Region, place: int) -> None:
    with images(folder, [(place, 4 * 512)]) as found, memory.open_pages(found, made := plan(found, place)) as source:
        with AgentChild(region) as child:
            map_staging(child, staging_of(place))
            for uffd in (source.fd, -1):
                made.populate(region, Worker(child.pid, 0, uffd, staging_of(place)))
            assert huge_bytes(child.pid, place) == 0
            assert made.counts.moved_bytes == 0


def test_a_descriptor_that_cannot_move_pages_costs_nothing_but_huge_pages(
    folder: Path, region: Region, place: int
) -> None:
    runs = [(place, 4 * 512)]
    with images(folder, runs) as found, memory.open_pages(found, made := plan(found, place)) as source:
        with AgentChild(region) as child:
            map_staging(child, staging_of(place))
            made.run(region, Worker(child.pid, 0, source.fd, staging_of(place)), source)
            expect(child, runs)
            assert huge_bytes(child.pid, place) == 0
            assert made.counts.moved_bytes == 0
            assert made.done_bytes == made.total_bytes


def test_an_object_gets_huge_pages_and_its_mapping_no_flag(folder: Path) -> None:
    if not hugepages.shared_are_available():
        pytest.skip("this machine gives no huge pages to shared memory")
    size, runs = 3 * BLOCK, [(0, 1024), (2 * BLOCK, 100)]
    reserved = map_memory(size + BLOCK)
    start = map_memory(size, PROT_RW, MAP_SHARED | MAP_ANONYMOUS | MAP_FIXED, at=-(-reserved // BLOCK) * BLOCK)
    with images(folder, runs) as found:
        made = plan_offsets(found, size, hugepages.blocks_of_object(HugePages.AUTO))
        with memory.open_pages(found, made) as source:
            made.fill(start, size, source, jobs=2)
    for address, nr in runs:
        assert ctypes.string_at(start + address, nr * PAGE) == pattern(address, nr)
    (vma,) = [vma for vma in maps.read(os.getpid()) if vma.start == start]
    assert "hg" not in vma.flags
    assert vma.huge_bytes == 2 * BLOCK
    assert vma.rss_bytes == 2 * BLOCK + 100 * PAGE
    libc.munmap(reserved, size + BLOCK)


def test_without_a_userfaultfd_everything_is_read_to_its_place(folder: Path, region: Region, place: int) -> None:
    runs = four_blocks(place)
    with images(folder, runs) as found, memory.open_pages(found, made := plan(found, place)) as source:
        with AgentChild(region) as child:
            made.run(region, Worker(child.pid, 0), source)
            expect(child, runs)
            assert huge_bytes(child.pid, place) == 0


def test_what_was_huge_is_kept_and_nothing_else(folder: Path, place: int) -> None:
    with images(folder, [(place, 1024), (place + 2 * BLOCK, 10)]) as found:
        kept = [[f"{place + BLOCK:x}", f"{place + 3 * BLOCK:x}"]]
        assert plan(found, place, HugePages.KEEP).counts.huge_bytes == 0
        assert plan(found, place, HugePages.NEVER).counts.huge_bytes == 0
        if hugepages.anonymous_are_available():
            assert plan(found, place, HugePages.KEEP, kept).counts.huge_bytes == BLOCK + 10 * PAGE
            assert plan(found, place).counts.huge_bytes == 2 * BLOCK


@pytest.mark.parametrize(
    "facts", [5, [["1"]], [["x", "y"]], [[1, 2]], [["2", "1"]], [["4", "8"], ["6", "a"]], [["-4", "8"]]]
)
def test_what_is_no_list_of_ranges_is_refused(facts: object) -> None:
    with pytest.raises(ImageError, match="'huge'"):
        hugepages.blocks(HugePages.KEEP, {"huge": facts})


@pytest.mark.parametrize("bit", [vmaflags.MADV_NOHUGEPAGE, None])
def test_no_huge_pages_where_they_are_switched_off(folder: Path, place: int, bit: int | None) -> None:
    vma = area(place)
    if bit is not None:
        vma.madv = 1 << bit
    with images(folder, [(place, 2048)]) as found:
        mm = pb.mm_entry(vmas=[vma], thp_disabled=bit is None)
        made = memory.plan_pages(found, 1, mm, huge=hugepages.blocks(HugePages.AUTO))
        assert (made.huge, made.counts.huge_bytes) == ((), 0)


some_runs = st.lists(st.tuples(st.sampled_from([0, 1, 3, 40]), st.integers(1, 900)), min_size=1, max_size=20)


@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(some_runs, st.integers(1, 9 << 20), st.integers(1, 512), st.lists(st.integers(0, 12), unique=True))
def test_every_page_arrives_whatever_becomes_huge(
    tmp_path_factory: pytest.TempPathFactory, steps: Runs, chunk_bytes: int, min_pages: int, kept: list[int]
) -> None:
    runs, at = [], 0
    for gap, nr in steps:
        runs.append((at + gap * PAGE, nr))
        at += (gap + nr) * PAGE
    edges = array("Q", [block * BLOCK for block in sorted(kept)])
    blocks = HugeBlocks(min_pages, (edges, array("Q", [edge + BLOCK for edge in edges])) if kept else None)
    start = map_memory(at, PROT_RW, MAP_SHARED | MAP_ANONYMOUS)
    with images(tmp_path_factory.mktemp("pump"), runs) as found:
        made = plan_offsets(found, at, blocks, chunk_bytes)
        with memory.open_pages(found, made) as source:
            made.fill(start, at, source, jobs=2)
    expected = bytearray(at)
    for address, nr in runs:
        expected[address : address + nr * PAGE] = pattern(address, nr)
    assert ctypes.string_at(start, at) == bytes(expected)
    counts = made.counts
    assert counts.done_bytes == counts.total_bytes == sum(nr for _, nr in runs) * PAGE
    assert counts.huge_bytes == dense_bytes(runs, at, min_pages, set(kept))
    libc.munmap(start, at)


def dense_bytes(runs: Runs, size: int, min_pages: int, kept: set[int]) -> int:
    """What must become huge, said as simply as possible."""
    stored: dict[int, int] = {}
    for address, nr in runs:
        for page in range(address // PAGE, address // PAGE + nr):
            stored[page // 512] = stored.get(page // 512, 0) + 1
    chosen = [b for b, nr in stored.items() if nr >= min_pages and (b + 1) * BLOCK <= size and (not kept or b in kept)]
    return sum(stored[b] for b in chosen) * PAGE


def map_staging(child: AgentChild, address: int) -> None:
    flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED
    child.run([Call(NR.MMAP, (address, hugepages.STAGING_BYTES, PROT_RW, flags, -1, 0), want=address)])
