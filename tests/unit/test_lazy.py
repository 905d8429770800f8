"""What comes late in a lazy restore, in which order, and the file of recorded faults."""

from __future__ import annotations

from array import array
from pathlib import Path

import pytest
from support.memory_child import PAGE, commit_images, pattern

from gpurestore.errors import GpurestoreError
from gpurestore.images import pb
from gpurestore.images.folder import ImageFolder
from gpurestore.images.pagemap import PRESENT, Pagemap, write_pagemap
from gpurestore.images.writer import ImageWriter
from gpurestore.tasks import lazy, vmaflags
from gpurestore.tasks.inherited import Inherited
from gpurestore.tasks.memory import PageRuns, plan_pages
from gpurestore.tasks.memory.lazy import LazyPlan, LazyView

BASE = 0x10_0000_0000
ANON = vmaflags.REGULAR | vmaflags.ANON_PRIVATE


def area(number: int, nr_pages: int, status: int = ANON, flags: int = 0x22, madv: int = 0) -> pb.vma_entry:
    start = BASE + number * 1024 * PAGE
    entry = pb.vma_entry(start=start, end=start + nr_pages * PAGE, pgoff=0, shmid=0, prot=3, status=status, fd=-1)
    entry.flags = flags
    if madv:
        entry.madv = 1 << madv
    return entry


def core(sp: int = 0, fs_base: int = 0) -> pb.core_entry:
    entry = pb.core_entry()
    entry.thread_info.gpregs.sp, entry.thread_info.gpregs.fs_base = sp, fs_base
    return entry


def images(folder: Path, tasks: dict[int, list[tuple[int, int]]]) -> ImageFolder:
    """Pagemaps and pages of some tasks."""
    with ImageWriter(folder / "images") as writer:
        for pid, runs in tasks.items():
            vaddrs, nr_pages = array("Q", [a for a, _ in runs]), array("Q", [n for _, n in runs])
            write_pagemap(writer, "pagemap", pid, pid + 100, vaddrs, nr_pages, array("I", [PRESENT] * len(runs)))
            content = b"".join(pattern(a, n) for a, n in runs)
            writer.append(writer.open_raw(f"pages-{pid + 100}.img"), content, "pages")
        commit_images(writer)
    return ImageFolder(folder / "images")


@pytest.mark.parametrize(
    ("vma", "late"),
    [
        (area(0, 4), True),
        (area(0, 4, ANON | vmaflags.HEAP), True),
        (area(0, 4, vmaflags.REGULAR | vmaflags.FILE_PRIVATE), False),
        (area(0, 4, vmaflags.REGULAR | vmaflags.ANON_SHARED), False),
        (area(0, 4, ANON | vmaflags.VDSO), False),
        (area(0, 4, flags=0x22 | vmaflags.MAP_LOCKED), False),
        (area(0, 4, flags=0x22 | vmaflags.MAP_DROPPABLE), False),
        (area(0, 4, madv=vmaflags.MADV_WIPEONFORK), False),
        (area(0, 4, madv=vmaflags.MADV_HUGEPAGE), True),
    ],
)
def test_only_private_anonymous_memory_comes_late(vma: pb.vma_entry, late: bool) -> None:
    assert lazy.is_lazy(vma) == late


def late(folder: Path, vmas: list[pb.vma_entry], runs: list[tuple[int, int]], *cores: pb.core_entry) -> LazyPlan:
    mms = {1: pb.mm_entry(vmas=vmas)}
    with images(folder, {1: runs}) as found:
        left = plan_pages(found, 1, mms[1], later=lazy.can_come_late(mms[1]))
        assert left.total_bytes == 0
        planned = lazy.plan_tree({1: left.pagemap}, mms, {1: cores}, {}, {1: [BASE + 5 * PAGE]})[1]
    assert planned.plan is not None
    return planned.plan


def test_hot_pages_then_recorded_faults_then_stacks_then_the_heap_then_small_before_large(folder: Path) -> None:
    large, heap, small, stack, empty = (
        area(0, 64),
        area(1, 16, ANON | vmaflags.HEAP),
        area(2, 8),
        area(3, 32),
        area(4, 9),
    )
    vmas = [large, heap, small, stack, empty]
    sp = stack.start + 20 * PAGE + 8
    runs = [(vma.start, (vma.end - vma.start) // PAGE) for vma in vmas[:-1]]
    plan = late(folder, vmas, runs, core(sp, small.start + 3 * PAGE))
    assert plan.total_bytes == (64 + 16 + 8 + 32) * PAGE
    assert plan.ranges == tuple((vma.start, vma.end) for vma in vmas[:-1])
    hot, rest = plan.order[: plan.nr_hot], plan.order[plan.nr_hot :]
    assert any(start <= sp < end for start, end in hot)
    assert any(start <= small.start + 3 * PAGE < end for start, end in hot)
    assert rest == (
        (BASE + 5 * PAGE, BASE + 21 * PAGE),
        (stack.start + 20 * PAGE, stack.end),
        (heap.start, heap.end),
        (small.start, small.end),
        (stack.start, stack.end),
        (large.start, large.end),
    )


def test_what_was_seen_in_use_comes_before_what_was_not(folder: Path) -> None:
    vmas = [area(0, 64), area(1, 4), area(2, 32), area(3, 8)]
    mms = {1: pb.mm_entry(vmas=vmas)}
    with images(folder, {1: [(vma.start, (vma.end - vma.start) // PAGE) for vma in vmas]}) as found:
        pagemap = plan_pages(found, 1, mms[1], later=lazy.can_come_late(mms[1])).pagemap
    plan = lazy.plan_tree({1: pagemap}, mms, {1: []}, {}, {}, used={1: {vmas[0].start, vmas[3].start}})[1].plan
    assert plan is not None
    assert plan.order == tuple((vma.start, vma.end) for vma in (vmas[3], vmas[0], vmas[1], vmas[2]))


def test_what_a_child_has_from_its_parent_comes_late_from_the_parents_image(folder: Path) -> None:
    program, heap = area(0, 4, vmaflags.REGULAR | vmaflags.FILE_PRIVATE), area(1, 8)
    mm = pb.mm_entry(vmas=[program, heap])
    shared = PageRuns(array("Q", [program.start, heap.start]), array("Q", [4, 6]))
    heir = Inherited(1, shared, {program.start: program, heap.start: heap}, PageRuns())
    stored = {1: [(program.start, 4), (heap.start, 8)], 2: [(heap.start + 6 * PAGE, 2)]}
    with images(folder, stored) as found:
        pagemaps = {pid: plan_pages(found, pid, mm).pagemap for pid in stored}
        child = lazy.plan_tree(pagemaps, {1: mm, 2: mm}, {1: [], 2: []}, {2: heir}, {})[2]
    assert child.later == {heap.start}
    assert child.plan is not None
    assert child.plan.total_bytes == 8 * PAGE
    places = {
        vaddr: (nr, child.plan.files[file], offset)
        for vaddr, nr, file, offset in zip(
            child.plan.vaddrs, child.plan.nr_pages, child.plan.file_of, child.plan.page_offsets, strict=True
        )
    }
    assert places[heap.start] == (6, "pages-101.img", 4)
    assert places[heap.start + 6 * PAGE] == (2, "pages-102.img", 0)
    # What cannot come late is still there from birth.
    assert child.inherited is not None
    assert list(child.inherited.runs) == [(program.start, 4)]
    assert list(child.inherited.kept) == [program.start]


def shared(number: int, nr_pages: int, shmid: int, first_page: int = 0, flags: int = 0x21) -> pb.vma_entry:
    entry = area(number, nr_pages, vmaflags.REGULAR | vmaflags.ANON_SHARED, flags)
    entry.shmid, entry.pgoff = shmid, first_page * PAGE
    return entry


def test_shared_memory_comes_late_but_for_what_is_locked_or_empty() -> None:
    stored = Pagemap(9, array("Q", [2 * PAGE]), array("Q", [4]), array("I", [PRESENT]), 4, True)
    empty = Pagemap(8, array("Q"), array("Q"), array("I"), 0, True)
    window = shared(1, 6, 70, first_page=2)
    mms = {
        1: pb.mm_entry(vmas=[shared(0, 8, 70), shared(3, 2, 71, flags=0x21 | vmaflags.MAP_LOCKED)]),
        2: pb.mm_entry(vmas=[window, shared(2, 4, 72), shared(4, 2, 71)]),
    }
    late = lazy.plan_shared(
        {70: stored, 71: stored, 72: empty},
        dict.fromkeys((70, 71, 72), 8 * PAGE),
        mms,
        {1: [], 2: [core(window.start + 3 * PAGE)]},
        {2: [window.start + PAGE], 1: [BASE - 16 * PAGE]},
    )
    assert late.views == {
        1: (LazyView(BASE, BASE + 8 * PAGE, 70, 0),),
        2: (LazyView(window.start, window.end, 70, 2 * PAGE),),
    }
    (plan,) = late.plans.values()
    assert (plan.pid, plan.shmid, plan.total_bytes, plan.ranges) == (0, 70, 4 * PAGE, ((0, 8 * PAGE),))
    # From below the stack pointer on, as an offset in the object; then what was recorded, then all.
    assert plan.order[: plan.nr_hot] == ((4 * PAGE, 8 * PAGE),)
    assert plan.order[plan.nr_hot :] == ((3 * PAGE, 8 * PAGE), (0, 8 * PAGE))
    task = lazy.with_views(2, None, late.views[2])
    assert (task.total_bytes, task.ranges, task.watched) == (0, (), [(window.start, window.end)])


def test_recorded_faults_are_read_back_in_their_order(folder: Path) -> None:
    file = folder / "faults"
    file.write_text("7 10000\n8 3000\n7 5000\n")
    assert lazy.read_fault_order(file) == {7: [0x10000, 0x5000], 8: [0x3000]}


@pytest.mark.parametrize("line", ["7", "7 10001", "x 1000", "7 -1000", "7 ffffffffffffff000", "7 1000 1", "\xff"])
def test_a_damaged_record_of_faults_is_named_with_its_line(folder: Path, line: str) -> None:
    file = folder / "faults"
    file.write_text(f"7 1000\n{line}\n", encoding="latin-1")
    with pytest.raises(GpurestoreError, match=r"faults: line 2 "):
        lazy.read_fault_order(file)


def test_a_missing_record_of_faults_is_named(folder: Path) -> None:
    with pytest.raises(GpurestoreError, match="faults: No such file"):
        lazy.read_fault_order(folder / "faults")
