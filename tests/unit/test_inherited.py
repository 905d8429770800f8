"""Pages that a task has from its parent: recognised by their frames, and restored as exactly what the dump saw."""

from __future__ import annotations

import ctypes
import dataclasses
import mmap
import os
from array import array
from collections.abc import Collection, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

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
from gpurestore.tasks.memory import PageRuns, Patch

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


class Family(NamedTuple):
    """Three generations, each the only child of the one before.

    Contents are numbers, one per page, that no other page has unless a child has it from its parent.
    """

    mms: dict[int, pb.mm_entry]
    contents: dict[int, dict[int, int]]  # what the dump saw
    shared: dict[int, set[int]]  # pages that a task has from its parent
    ancestral: dict[int, dict[int, int]]  # what a task's child shall see instead of its own content

    def own(self, pid: int) -> set[int]:
        """The pages in a task's own image."""
        return self.contents[pid].keys() - self.shared.get(pid, set())


def write_pages(writer: ImageWriter, kind: str, pid: int, pages_id: int, contents: dict[int, int]) -> None:
    """A pagemap, and its pages, which are full of 16-bit numbers."""
    runs = runs_of(set(contents))
    write_pagemap(writer, kind, pid, pages_id, runs.vaddrs, runs.nr_pages, array("I", [PRESENT]) * len(runs))
    name = f"pages-{pages_id}.img"
    data = b"".join(content.to_bytes(2, "little") * (PAGE // 2) for _, content in sorted(contents.items()))
    writer.append(writer.open_raw(name), data, name)


def write_images(path: Path, family: Family, heads: dict[int, int] | None = None) -> None:
    with ImageWriter(path) as writer:
        for pid in family.mms:
            own = {page: family.contents[pid][page] for page in family.own(pid)}
            write_pages(writer, "pagemap", pid, pid, own)
            if family.ancestral.get(pid):
                write_pages(writer, "ancestral", pid, pid + 10, family.ancestral[pid])
            if family.shared.get(pid):
                inherited.write(writer, pid, (heads or {}).get(pid, pid - 1), runs_of(family.shared[pid]))
        commit_images(writer)


PAGES = 24
CUTS = st.lists(st.integers(0, PAGES), max_size=6, unique=True).map(sorted)


def load(folder: ImageFolder, parents: Mapping[int, int], mms: Mapping[int, pb.mm_entry]) -> inherited.Shares:
    return inherited.load(folder, parents, mms, {pid: read_pagemap(folder, "pagemap", pid) for pid in mms})


def mapped(mm: pb.mm_entry, starts: Collection[int] | None = None) -> list[int]:
    """The pages of some mappings, or of all."""
    chosen = [vma for vma in mm.vmas if starts is None or vma.start in starts]
    return [page for vma in chosen for page in range((vma.start - BASE) // PAGE, (vma.end - BASE) // PAGE)]


@st.composite
def families(draw: st.DrawFn) -> Family:
    family = Family({}, {}, {}, {})
    for pid in (1, 2, 3):
        cuts = draw(CUTS)
        mm = family.mms[pid] = space(*(area(a, b) for a, b in zip(cuts[::2], cuts[1::2], strict=False)))
        pages = mapped(mm)
        own = draw(st.sets(st.sampled_from(pages))) if pages else set()
        family.contents[pid] = {page: pid * 1000 + page for page in own}
        if pid > 1:
            seen = family.contents[pid - 1] | family.ancestral[pid - 1]
            possible = set(mapped(mm, inherited.bases(mm, family.mms[pid - 1]).keys())) & seen.keys() - own
            family.shared[pid] = {page for page in sorted(possible) if draw(st.booleans())}
            family.contents[pid] |= {page: seen[page] for page in family.shared[pid]}
        others = sorted(set(pages) - family.shared.get(pid, set()))
        chosen = draw(st.sets(st.sampled_from(others))) if others else set()
        family.ancestral[pid] = {page: pid * 1000 + 500 + page for page in chosen}
    return family


def dropped(memory: dict[int, int], calls: Collection[Call]) -> dict[int, int]:
    """What is left after madvise(MADV_DONTNEED)."""
    for call in calls:
        start, size, advice = (int(arg) for arg in call.args if isinstance(arg, int))
        assert advice == mmap.MADV_DONTNEED
        gone = range((start - BASE) // PAGE, (start + size - BASE) // PAGE)
        memory = {page: content for page, content in memory.items() if page not in gone}
    return memory


def born(memory: dict[int, int], mm: pb.mm_entry, found: inherited.Inherited | None) -> dict[int, int]:
    """What a task sees of its parent's memory after its birth, having kept, unmapped and dropped what it shall."""
    kept = mapped(mm, found.kept if found else ())
    memory = {page: content for page, content in memory.items() if page in kept}
    return dropped(memory, found.plan_drop() if found else ())


@settings(max_examples=150)
@given(families())
def test_every_task_sees_what_the_dump_saw(family: Family) -> None:
    with TemporaryDirectory() as name:
        write_images(Path(name) / "images", family)
        with ImageFolder(Path(name) / "images") as folder:
            found, ancestral = load(folder, {pid: pid - 1 for pid in family.mms}, family.mms)
            pagemaps = {pid: read_pagemap(folder, "pagemap", pid) for pid in family.mms}
            old = {pid: read_pagemap(folder, "ancestral", pid) for pid in family.mms if family.ancestral[pid]}
    assert found.keys() == {pid for pid, pages in family.shared.items() if pages}
    assert ancestral.keys() == (old.keys() if found else set())
    memory: dict[int, int] = {}
    for pid, mm in family.mms.items():
        memory = born(memory, mm, found.get(pid))
        assert memory.keys() - family.own(pid) == family.shared.get(pid, set())
        memory |= {page: family.contents[pid][page] for page in family.own(pid)}
        assert memory == family.contents[pid]
        if pid in ancestral:
            memory |= family.ancestral[pid]
            after = dropped(dict(memory), ancestral[pid].plan_drop())
            after |= {page: family.contents[pid][page] for page in family.own(pid) & family.ancestral[pid].keys()}
            assert after == family.contents[pid]
    for pid in found:
        sources = inherited.resolve(pid, found, pagemaps, old)
        stored = {n: sorted(family.own(n)) for n in family.mms} | {
            n + 10: sorted(family.ancestral[n]) for n in family.mms
        }
        got = {
            (s.vaddr - BASE) // PAGE + i: (s.pages_id, stored[s.pages_id][s.page + i])
            for s in sources
            for i in range(s.nr_pages)
        }
        numbers = {page: n % 10 * 1000 + n // 10 * 500 + at for page, (n, at) in got.items()}
        assert numbers == {page: family.contents[pid][page] for page in family.shared[pid]}
        assert [s.vaddr for s in sources] == sorted(s.vaddr for s in sources)


def test_a_patch_writes_what_is_wanted_and_nothing_else(folder: Path) -> None:
    wanted = {1, 2, 3, 40, 41, 300, *range(320, 900, 3)}
    contents = {page: 1 + page for page in range(1000) if page % 11}

    def prepare() -> list[int]:
        return [map_memory(1000 * PAGE, at=BASE * 16)]

    with MemoryChild(prepare) as child, ImageWriter(folder / "images") as writer:
        write_pages(writer, "pagemap", 1, 1, contents)
        commit_images(writer)
        with ImageFolder(folder / "images") as images:
            pagemap = read_pagemap(images, "pagemap", 1)
            shift = child.values[0] - BASE
            vaddrs = array("Q", (vaddr + shift for vaddr in pagemap.vaddrs))
            runs = runs_of(wanted)
            runs.vaddrs = array("Q", (vaddr + shift for vaddr in runs.vaddrs))
            patch = Patch(images, dataclasses.replace(pagemap, vaddrs=vaddrs), runs)
            assert patch.total_bytes == len(wanted & contents.keys()) * PAGE
            patch.run(child.pid)
        with open(f"/proc/{child.pid}/mem", "rb", buffering=0) as memory:
            memory.seek(child.values[0])
            got = memory.read(1000 * PAGE)
    for page in range(1000):
        number = contents.get(page, 0) if page in wanted else 0
        assert got[page * PAGE : (page + 1) * PAGE] == number.to_bytes(2, "little") * (PAGE // 2), page


def test_a_patch_of_a_file_that_is_too_short_is_refused(tmp_path: Path) -> None:
    write_images(tmp_path / "images", family_of({1, 2, 3}, set(), set()))
    os.truncate(tmp_path / "images/pages-1.img", 2 * PAGE)
    os.unlink(tmp_path / "images/gpurestore.json")
    with ImageFolder(tmp_path / "images") as folder, pytest.raises(ImageError, match=r"pages-1\.img: truncated"):
        Patch(folder, read_pagemap(folder, "pagemap", 1), runs_of({1}))


def family_of(root: set[int], child: set[int], from_parent: set[int], ancestral: set[int] = frozenset()) -> Family:
    """A parent, and a child with the pages that it has itself and those that its image says are the parent's."""
    return Family(
        {1: space(area(0, 8), area(9, 10)), 2: space(area(0, 6))},
        {1: dict.fromkeys(root, 1), 2: dict.fromkeys(child | from_parent, 2)},
        {2: from_parent},
        {1: dict.fromkeys(ancestral, 3)},
    )


@pytest.mark.parametrize(
    ("from_parent", "head", "why"),
    [
        ({2, 3}, 1, "1 pages at 0x103000, which its parent 1 does not have"),
        ({9}, 1, "not in a mapping that task 2 can have from its parent"),
        ({1}, 7, "made for a child of 7, but task 2 is one of 1"),
    ],
)
def test_an_image_that_promises_what_is_not_there_is_refused(
    tmp_path: Path, from_parent: set[int], head: int, why: str
) -> None:
    family = family_of({1, 2, 9}, {4}, from_parent)
    write_images(tmp_path / "images", family, {2: head})
    with ImageFolder(tmp_path / "images") as folder, pytest.raises(ImageError, match=rf"inherited-2\.img: .*{why}"):
        load(folder, {1: 0, 2: 1}, family.mms)


def test_a_page_is_either_its_own_or_its_parents(tmp_path: Path) -> None:
    family = family_of({1, 2}, set(), {1, 2})
    with ImageWriter(tmp_path / "images") as writer:
        for pid in (1, 2):
            write_pages(writer, "pagemap", pid, pid, dict.fromkeys((1, 2), 7))
        inherited.write(writer, 2, 1, runs_of({1}))
        commit_images(writer)
    with ImageFolder(tmp_path / "images") as folder, pytest.raises(ImageError, match="which it has itself"):
        load(folder, {1: 0, 2: 1}, family.mms)


@pytest.mark.parametrize(("page", "why"), [(8, "not in private memory"), (2, "which task 2 has from its parent")])
def test_ancestral_pages_lie_in_private_memory_that_is_the_tasks_own(tmp_path: Path, page: int, why: str) -> None:
    family = family_of({1, 2}, {4}, {2})
    family.ancestral[2] = {page: 3}
    write_images(tmp_path / "images", family)
    with ImageFolder(tmp_path / "images") as folder, pytest.raises(ImageError, match=rf"ancestral-2\.img: .*{why}"):
        load(folder, {1: 0, 2: 1}, family.mms)


@pytest.mark.parametrize("missing", [1, 2])
def test_an_image_of_a_task_that_is_not_there_is_refused(tmp_path: Path, missing: int) -> None:
    family = family_of({1, 2}, {4}, {2}, {3})
    write_images(tmp_path / "images", family)
    del family.mms[missing]
    with ImageFolder(tmp_path / "images") as folder, pytest.raises(ImageError, match=f"no living task {missing}"):
        load(folder, {1: 0, 2: 1}, family.mms)


def test_a_root_inherits_nothing(tmp_path: Path) -> None:
    family = family_of({1, 2}, {4}, {2})
    write_images(tmp_path / "images", family)
    with ImageFolder(tmp_path / "images") as folder, pytest.raises(ImageError, match=r"inherited-2\.img"):
        load(folder, {2: 0}, {2: family.mms[2]})


# ---- what a dump makes of it


def test_pages_that_were_stored_nowhere_are_nobodys_in_the_end(tmp_path: Path) -> None:
    """Pages full of zeros, which the images leave out."""
    sharing = inherited.Sharing(dict.fromkeys((1, 2, 3), space()), {2: 1, 3: 2})
    sharing._inherited = {2: runs_of({1, 2, 3, 7, 8}), 3: runs_of({1, 2, 4})}
    sharing.witnesses = {1: inherited.Witness(2, runs_of({7, 8}))}
    stored = {1: runs_of({1, 3, 8}), 2: runs_of({4}), 3: runs_of(set())}
    with ImageWriter(tmp_path / "images") as writer:
        sharing.write(writer, stored, {1: runs_of({7})})
        commit_images(writer)
    with ImageFolder(tmp_path / "images") as folder:
        got = {pid: read_pagemap(folder, "inherited", pid) for pid in (2, 3)}
    # Page 8 of task 2 is all zero, though its parent has something there.
    assert {pid: pages_of(PageRuns(m.vaddrs, m.nr_pages)) for pid, m in got.items()} == {2: {1, 3, 7}, 3: {1, 4}}
    assert {pid: m.pages_id for pid, m in got.items()} == {2: 1, 3: 2}


def settled(monkeypatch: pytest.MonkeyPatch, frames: dict[int, dict[int, int]]) -> inherited.Sharing:
    """What is found in a root 1 and its children, given the number of the frame behind each of their pages."""

    def same(pid: int, other: int, runs: PageRuns, cancel: object) -> PageRuns:
        return runs & runs_of({page for page, frame in frames[pid].items() if frames[other].get(page) == frame})

    monkeypatch.setattr(inherited, "common", same)
    sharing = inherited.Sharing(dict.fromkeys(frames, space(area(0, 4000))), {pid: 1 for pid in frames if pid > 1})
    for pid in frames:
        sharing._stored[pid] = runs_of(set(frames[pid]))
        if pid > 1 and len(found := same(pid, 1, sharing._stored[pid], None)):
            sharing._inherited[pid] = found
    sharing.settle()
    return sharing


def test_what_only_siblings_share_is_taken_from_the_last_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    old = {page: page for page in range(1000)}
    frames = {
        1: old | {page: 5000 + page for page in range(300)},  # wrote its own
        2: old | {page: 6000 + page for page in range(10)},
        3: old,
        4: old | {page: 7000 + page for page in range(10, 20)},
    }
    frames[1][999] = 9999  # and so did all but one
    frames[2][999], frames[3][999], frames[4][999] = 9998, 9999, 9998
    sharing = settled(monkeypatch, frames)
    assert sharing.witnesses[1].pid == 4
    assert pages_of(sharing.witnesses[1].runs) == set(range(300)) - set(range(10, 20))
    # What the last one wrote itself is a copy for the others.
    own = {pid: pages_of(sharing.own(pid)) for pid in frames}
    copies = set(range(10, 20))
    assert own == {1: set(range(1000)), 2: set(range(10)) | copies | {999}, 3: copies, 4: copies | {999}}


def test_a_page_that_a_child_still_shares_with_its_parent_stays_the_parents(monkeypatch: pytest.MonkeyPatch) -> None:
    old = {page: page for page in range(1000)}
    new = old | {page: 5000 + page for page in range(300)}
    sharing = settled(monkeypatch, {1: new, 2: old, 3: old, 4: new})
    assert sharing.witnesses == {}
    assert pages_of(sharing.own(2)) == set(range(300))


@pytest.mark.parametrize(("nr_pages", "is_worth_it"), [(255, False), (256, True)])
def test_a_little_is_stored_as_copies_that_criu_can_restore(nr_pages: int, is_worth_it: bool) -> None:
    sharing = inherited.Sharing({}, {2: 1})
    every = set(range(nr_pages + 1))
    sharing._stored = {1: runs_of(every), 2: runs_of(every)}
    sharing._inherited = {2: runs_of(set(range(nr_pages)))}
    sharing.settle()
    assert pages_of(sharing.own(2)) == ({nr_pages} if is_worth_it else every)
    assert (sharing.shared_bytes > 0) == is_worth_it
