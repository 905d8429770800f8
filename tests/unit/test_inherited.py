"""Pages that a task has from its parent: recognised by their frames, and restored as exactly what the dump saw."""

from __future__ import annotations

import ctypes
import mmap
import os
from array import array
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.memory_child import MAP_PRIVATE, PAGE, PROT_READ, MemoryChild, commit_images, fill, libc, map_memory

from gpurestore.batch import Call
from gpurestore.errors import ImageError
from gpurestore.images import pb
from gpurestore.images.folder import ImageFolder
from gpurestore.images.pagemap import PRESENT, read_pagemap, write_pagemap
from gpurestore.images.writer import ImageWriter
from gpurestore.tasks import inherited, vmaflags
from gpurestore.tasks.memory import PageRuns

BASE = 0x10_0000
ANON, FILE = vmaflags.ANON_PRIVATE, vmaflags.FILE_PRIVATE
HUGE, NO_HUGE = 1 << vmaflags.MADV_HUGEPAGE, 1 << vmaflags.MADV_NOHUGEPAGE


def area(first: int, last: int, kind: int = ANON, flags: int = 0x22, **more: int) -> pb.vma_entry:
    """A mapping of the pages ``first`` to ``last``, the latter excluded, counted from BASE."""
    entry = pb.vma_entry(
        start=BASE + first * PAGE, end=BASE + last * PAGE, flags=flags, prot=3, pgoff=0, shmid=0, fd=-1
    )
    entry.status = vmaflags.REGULAR | kind
    for name, value in more.items():
        setattr(entry, name, value)
    return entry


def space(*vmas: pb.vma_entry, exe: int = 1) -> pb.mm_entry:
    return pb.mm_entry(vmas=vmas, exe_file_id=exe)


def runs_of(pages: set[int]) -> PageRuns:
    """Runs of single pages, counted from BASE: as many runs as can be."""
    return PageRuns(array("Q", (BASE + page * PAGE for page in sorted(pages))), array("Q", [1]) * len(pages))


def pages_of(runs: PageRuns) -> set[int]:
    return {(address - BASE) // PAGE + i for address, nr in runs for i in range(nr)}


# ---- which mappings can be kept


@pytest.mark.parametrize(
    ("own", "parents"),
    [
        (area(2, 4), area(2, 4)),
        (area(2, 4), area(0, 9)),
        (area(2, 4, prot=1), area(2, 4, prot=3)),
        (area(2, 4, flags=0x22 | vmaflags.MAP_LOCKED), area(2, 4)),
        (area(2, 4, kind=ANON | vmaflags.HEAP), area(2, 6)),
        (area(2, 4, madv=HUGE), area(2, 4)),
        (area(2, 4), area(2, 4, madv=1 << vmaflags.MADV_DONTFORK)),
        (area(2, 4, kind=FILE, shmid=7, pgoff=2 * PAGE), area(1, 4, kind=FILE, shmid=7, pgoff=PAGE)),
    ],
)
def test_a_part_of_a_mapping_of_the_same_kind_can_be_kept(own: pb.vma_entry, parents: pb.vma_entry) -> None:
    assert inherited.bases(space(own), space(parents)) == {own.start: parents}


@pytest.mark.parametrize(
    ("own", "parents"),
    [
        (area(2, 4), area(5, 9)),
        (area(2, 4), area(2, 3)),
        (area(2, 4), area(3, 9)),
        (area(2, 4, flags=0x22 | vmaflags.MAP_GROWSDOWN), area(2, 4)),
        (area(2, 4), area(2, 4, flags=0x22 | vmaflags.MAP_NORESERVE)),
        (area(2, 4), area(2, 4, madv=HUGE)),
        (area(2, 4, madv=HUGE), area(2, 4, madv=NO_HUGE)),
        (area(2, 4, flags=8), area(2, 4, flags=8)),
        (area(2, 4, kind=FILE, shmid=7), area(2, 4, kind=FILE, shmid=8)),
        (area(2, 4, kind=FILE, shmid=7, pgoff=PAGE), area(2, 4, kind=FILE, shmid=7)),
        (area(2, 4, kind=FILE, shmid=7), area(2, 4)),
        (area(2, 4, kind=vmaflags.ANON_SHARED), area(2, 4, kind=vmaflags.ANON_SHARED)),
        (area(2, 4, kind=ANON | vmaflags.VDSO), area(2, 4, kind=ANON | vmaflags.VDSO)),
        (area(2, 4, kind=ANON | vmaflags.EXT_PLUGIN), area(2, 4, kind=ANON | vmaflags.EXT_PLUGIN)),
        (area(2, 4), area(2, 4, kind=vmaflags.GUARD)),
    ],
)
def test_what_cannot_be_a_part_is_made_anew(own: pb.vma_entry, parents: pb.vma_entry) -> None:
    assert inherited.bases(space(own), space(parents)) == {}


def test_nothing_is_kept_of_another_program() -> None:
    assert inherited.bases(space(area(2, 4)), space(area(2, 4), exe=2)) == {}


# ---- which pages are the same


@pytest.mark.skipif(not inherited.can_recognise(), reason="frame numbers are hidden from us")
def test_pages_are_common_until_one_of_the_two_writes_or_drops_them() -> None:
    size = 4096 * PAGE
    start = map_memory(size)
    libc.madvise(start, size, vmaflags.MADV_NOHUGEPAGE)
    filled = [page for page in range(4096) if page % 50]
    for page in filled:
        fill(start + page * PAGE)

    def change() -> list[int]:
        for page in range(0, 4096, 7):
            fill(start + page * PAGE)
        libc.madvise(start + 100 * PAGE, 10 * PAGE, mmap.MADV_DONTNEED)
        return [1]

    with MemoryChild(change) as child:
        fill(start + 201 * PAGE)
        asked = PageRuns.of_ranges([(start, start + 3000 * PAGE), (start + 3000 * PAGE, start + size)])
        found = inherited.common(child.pid, os.getpid(), asked)
        back = inherited.common(os.getpid(), child.pid, asked)
    expected = [p for p in filled if p % 7 and not 100 <= p < 110 and p != 201]
    assert [(a - start) // PAGE + i for a, n in found for i in range(n)] == expected
    assert list(found) == list(back)
    assert not any(a < start + 3000 * PAGE < a + n * PAGE for a, n in found)
    libc.munmap(start, size)


@pytest.mark.skipif(not inherited.can_recognise(), reason="frame numbers are hidden from us")
def test_pages_of_files_are_nobodys(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"x" * 16 * PAGE)
    with open(tmp_path / "file", "rb") as file:
        start = map_memory(16 * PAGE, PROT_READ, MAP_PRIVATE, file.fileno())

    def read() -> list[int]:
        return [sum(ctypes.string_at(start + page * PAGE, 1)[0] for page in range(16))]

    read()
    with MemoryChild(read) as child:
        asked = PageRuns.of_ranges([(start, start + 16 * PAGE)])
        assert len(inherited.common(child.pid, os.getpid(), asked)) == 0
    libc.munmap(start, 16 * PAGE)


# ---- what a restore makes of it


def write_images(
    path: Path, tasks: dict[int, tuple[int, set[int], set[int]]], heads: dict[int, int] | None = None
) -> None:
    """Pagemaps of tasks: pid: (parent, own pages, pages from the parent)."""
    with ImageWriter(path) as writer:
        for pid, (parent, own, from_parent) in tasks.items():
            runs = runs_of(own)
            flags = array("I", [PRESENT]) * len(runs)
            write_pagemap(writer, "pagemap", pid, pid, runs.vaddrs, runs.nr_pages, flags)
            if from_parent:
                inherited.write(writer, pid, (heads or {}).get(pid, parent), runs_of(from_parent))
        commit_images(writer)


PAGES = 24
CUTS = st.lists(st.integers(0, PAGES), max_size=6, unique=True).map(sorted)


@st.composite
def families(draw: st.DrawFn) -> tuple[dict[int, pb.mm_entry], dict[int, dict[int, int]], dict[int, set[int]]]:
    """Three generations: the mappings, what each task has in its pages (0: nothing), and which pages are its parent's.

    Every content is a number that no other page has, unless a child has it from its parent.
    """
    mms: dict[int, pb.mm_entry] = {}
    contents: dict[int, dict[int, int]] = {}
    shared: dict[int, set[int]] = {}
    for pid in (1, 2, 3):
        cuts = draw(CUTS)
        mms[pid] = space(*(area(a, b) for a, b in zip(cuts[::2], cuts[1::2], strict=False)))
        mapped = {p for v in mms[pid].vmas for p in range((v.start - BASE) // PAGE, (v.end - BASE) // PAGE)}
        own = draw(st.sets(st.sampled_from(sorted(mapped)))) if mapped else set()
        contents[pid] = {page: pid * 1000 + page for page in own}
        if pid > 1:
            parts = inherited.bases(mms[pid], mms[pid - 1])
            possible = {
                p for v in mms[pid].vmas if v.start in parts for p in pages_of(PageRuns.of_ranges([(v.start, v.end)]))
            }
            shared[pid] = {p for p in possible & contents[pid - 1].keys() - own if draw(st.booleans())}
            contents[pid] |= {p: contents[pid - 1][p] for p in shared[pid]}
    return mms, contents, shared


def born(memory: dict[int, int], mm: pb.mm_entry, found: inherited.Inherited | None) -> dict[int, int]:
    """What a task sees of its parent's memory after its birth, having kept, unmapped and dropped what it shall."""
    kept = found.kept if found else ()
    seen = {
        page: content
        for page, content in memory.items()
        for vma in mm.vmas
        if vma.start in kept and vma.start <= BASE + page * PAGE < vma.end
    }
    for call in found.plan_drop() if found else ():
        assert isinstance(call, Call)
        start, size, _ = (int(arg) for arg in call.args if isinstance(arg, int))
        for page in range((start - BASE) // PAGE, (start + size - BASE) // PAGE):
            seen.pop(page, None)
    return seen


@settings(max_examples=150, deadline=None)
@given(families())
def test_every_task_sees_what_the_dump_saw(
    family: tuple[dict[int, pb.mm_entry], dict[int, dict[int, int]], dict[int, set[int]]],
) -> None:
    mms, contents, shared = family
    tasks = {pid: (pid - 1, contents[pid].keys() - shared.get(pid, set()), shared.get(pid, set())) for pid in mms}
    with TemporaryDirectory() as name:
        write_images(Path(name) / "images", tasks)
        with ImageFolder(Path(name) / "images") as folder:
            found = inherited.load(folder, {pid: pid - 1 for pid in mms}, mms)
            pagemaps = {pid: read_pagemap(folder, "pagemap", pid) for pid in mms}
    assert found.keys() == {pid for pid, pages in shared.items() if pages}
    memory: dict[int, int] = {}
    for pid, mm in mms.items():
        memory = born(memory, mm, found.get(pid))
        assert memory.keys() - tasks[pid][1] == shared.get(pid, set())
        memory |= {page: contents[pid][page] for page in tasks[pid][1]}
        assert memory == contents[pid]
    for pid in found:
        sources = inherited.resolve(pid, found, pagemaps)
        got = {
            (s.vaddr - BASE) // PAGE + i: s.pages_id * 1000 + sorted(tasks[s.pages_id][1])[s.page + i]
            for s in sources
            for i in range(s.nr_pages)
        }
        assert got == {page: contents[pid][page] for page in shared[pid]}
        assert [s.vaddr for s in sources] == sorted(s.vaddr for s in sources)


@pytest.mark.parametrize(
    ("own", "from_parent", "head", "why"),
    [
        ({4}, {2, 3}, 1, "1 pages at 0x103000, which its parent 1 does not have"),
        ({1, 2}, {1}, 1, "1 pages at 0x101000, which it has itself"),
        ({4}, {9}, 1, "not in a mapping that task 2 can have from its parent"),
        ({4}, {1}, 7, "made for a child of 7, but task 2 is one of 1"),
    ],
)
def test_an_image_that_promises_what_is_not_there_is_refused(
    tmp_path: Path, own: set[int], from_parent: set[int], head: int, why: str
) -> None:
    write_images(tmp_path / "images", {1: (0, {1, 2, 9}, set()), 2: (1, own, from_parent)}, {2: head})
    mms = {1: space(area(0, 8), area(9, 10)), 2: space(area(0, 6))}
    with ImageFolder(tmp_path / "images") as folder, pytest.raises(ImageError, match=rf"inherited-2\.img: .*{why}"):
        inherited.load(folder, {1: 0, 2: 1}, mms)


def test_an_image_of_a_task_that_is_not_there_is_refused(tmp_path: Path) -> None:
    write_images(tmp_path / "images", {1: (0, {1}, set()), 2: (1, set(), {1})})
    with ImageFolder(tmp_path / "images") as folder, pytest.raises(ImageError, match="there is no living task 2"):
        inherited.load(folder, {1: 0}, {1: space(area(0, 8))})


def test_a_root_inherits_nothing(tmp_path: Path) -> None:
    write_images(tmp_path / "images", {1: (0, set(), {1})})
    with ImageFolder(tmp_path / "images") as folder, pytest.raises(ImageError, match=r"inherited-1\.img"):
        inherited.load(folder, {1: 0}, {1: space(area(0, 8))})


# ---- what a dump makes of it


def test_pages_that_were_stored_nowhere_are_nobodys_in_the_end(tmp_path: Path) -> None:
    """Pages full of zeros, which the parent's pagemap leaves out."""
    sharing = inherited.Sharing({}, {2: 1, 3: 2})
    sharing._inherited = {2: runs_of({1, 2, 3}), 3: runs_of({1, 2, 4})}
    stored = {1: runs_of({1, 3}), 2: runs_of({4}), 3: runs_of(set())}
    with ImageWriter(tmp_path / "images") as writer:
        sharing.write(writer, stored)
        commit_images(writer)
    with ImageFolder(tmp_path / "images") as folder:
        got = {pid: read_pagemap(folder, "inherited", pid) for pid in (2, 3)}
    assert {pid: pages_of(PageRuns(m.vaddrs, m.nr_pages)) for pid, m in got.items()} == {2: {1, 3}, 3: {1, 4}}
    assert {pid: m.pages_id for pid, m in got.items()} == {2: 1, 3: 2}


@pytest.mark.parametrize(("nr_pages", "is_worth_it"), [(255, False), (256, True)])
def test_a_little_is_stored_as_copies_that_criu_can_restore(nr_pages: int, is_worth_it: bool) -> None:
    sharing = inherited.Sharing({}, {2: 1})
    every = set(range(nr_pages + 1))
    sharing._stored = {1: runs_of(every), 2: runs_of(every)}
    sharing._inherited = {2: runs_of(set(range(nr_pages)))}
    sharing.settle()
    assert pages_of(sharing.own(2)) == ({nr_pages} if is_worth_it else every)
    assert (sharing.shared_bytes > 0) == is_worth_it
