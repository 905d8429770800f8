"""Memory that tasks share copy-on-write since a fork: recognised at dump, stored once, shared again after a restore.

A page counts as *inherited* if a task and its parent in the tree have the same frame at the same address, in mappings
of one kind. It is stored with the parent only; ``inherited-PID.img`` lists the pages that the child has from there. At
restore such a child, an *heir*, is cloned when its parent's memory is in place, and keeps those mappings instead of
making them anew. Where frames cannot be seen, and for CRIU, everything is stored as copies.

A parent may have written or dropped pages that its children still share with one another. These are *ancestral*: stored
once more, in an image of their own, put over the parent's memory before its children are born, and replaced by what
the parent has itself afterwards.
"""

from __future__ import annotations

import bisect
import logging
from array import array
from collections.abc import Collection, Container, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

from gpurestore.batch import Call
from gpurestore.core import Cancel, check, ffi, lib, new_error
from gpurestore.errors import ImageError
from gpurestore.images import pb
from gpurestore.images.pagemap import PRESENT, Pagemap, read_pagemap, write_pagemap
from gpurestore.syscalls import NR
from gpurestore.tasks import memory, vmaflags
from gpurestore.tasks.maps import PAGE_BYTES
from gpurestore.tasks.memory import PageRuns, Patch, pieces

if TYPE_CHECKING:
    from gpurestore.images.folder import ImageFolder
    from gpurestore.images.writer import ImageWriter

log = logging.getLogger("gpurestore.memory")

# A tree that shares less than this is stored as copies: a restore needs no order then, and CRIU can do it, too.
MIN_SHARED_BYTES = 1 << 20
# Less than this that only siblings share is stored as copies: it costs two more stages.
MIN_ANCESTRAL_BYTES = 1 << 18

_MADV_DONTNEED = 4
# Where a task has its own pages in place of its parent's, runs from this size on are dropped before they are filled.
# Filling over a page that is shared copies it first; for a few that costs less than the system call that avoids it.
_WORTH_DROPPING_PAGES = 16

# What can differ between the mappings of parent and child, because it comes last in a restore.
_CHANGEABLE_FLAGS = vmaflags.MAP_LOCKED
_CHANGEABLE_STATUS = vmaflags.HEAP | vmaflags.STACK
# Advice that is there before the pages and cannot be taken back.
_LASTING_ADVICE = 1 << vmaflags.MADV_HUGEPAGE | 1 << vmaflags.MADV_NOHUGEPAGE


def bases(mm: pb.mm_entry, parent: pb.mm_entry) -> dict[int, pb.vma_entry]:
    """The private mappings of a task that can be parts of mappings of its parent: the latter by the former's start."""
    if mm.exe_file_id != parent.exe_file_id:
        return {}  # a program cannot be changed as long as a part of it is mapped
    theirs = [vma for vma in parent.vmas if not vmaflags.is_guard(vma)]
    starts = [vma.start for vma in theirs]
    found = {}
    for vma in mm.vmas:
        at = bisect.bisect(starts, vma.start) - 1
        if at >= 0 and _is_part(vma, theirs[at]):
            found[vma.start] = theirs[at]
    return found


def _is_part(vma: pb.vma_entry, base: pb.vma_entry) -> bool:
    if not (vmaflags.is_private(vma) and vmaflags.is_private(base)) or vma.flags & vmaflags.MAP_DROPPABLE:
        return False
    if not base.start <= vma.start < vma.end <= base.end or (vma.flags ^ base.flags) & ~_CHANGEABLE_FLAGS:
        return False
    if (vma.status ^ base.status) & ~_CHANGEABLE_STATUS or base.madv & _LASTING_ADVICE & ~vma.madv:
        return False
    same_file = vma.shmid == base.shmid and vma.pgoff - base.pgoff == vma.start - base.start
    return same_file or not vma.status & vmaflags.FILE_PRIVATE


# ---- dump


def can_recognise() -> bool:
    """Whether this process may see which frames the pages of others lie in; logs it if not."""
    err = new_error()
    visible = bool(check(lib.gr_frames_visible(err), err))
    if not visible:
        log.info("frame numbers are hidden from us: memory that tasks share since a fork is stored once for each")
    return visible


def common(pid: int, other: int, runs: PageRuns, cancel: Cancel | None = None) -> PageRuns:
    """Those pages of ``runs`` that two frozen tasks hold in common at the same address."""
    view, _keep = runs.view()
    flag = cancel.flag if cancel else ffi.NULL
    return PageRuns.made_by(lambda out, err: lib.gr_frames_common(pid, other, view, flag, out, err))


def find(
    pid: int, mm: pb.mm_entry, parent_pid: int, parent: pb.mm_entry, stored: PageRuns, cancel: Cancel | None = None
) -> PageRuns:
    """Those pages of ``stored`` (all that a frozen task needs) which it has from its parent, frozen as well."""
    return common(pid, parent_pid, stored & _ranges(mm, bases(mm, parent)), cancel)


class Witness(NamedTuple):
    """A child that still has pages which its parent has not any more; its siblings' are the same frames."""

    pid: int
    runs: PageRuns


class Sharing:
    """What the tasks of one dump share. :meth:`look_at` every task, then :meth:`settle`, before anything is written.

    ``parents``: of each task that may have pages from its parent, the parent's pid; parents come first in ``mms``.
    """

    def __init__(self, mms: Mapping[int, pb.mm_entry], parents: Mapping[int, int]) -> None:
        self._mms, self._parents = mms, parents
        self._stored: dict[int, PageRuns] = {}
        self._inherited: dict[int, PageRuns] = {}
        self.witnesses: dict[int, Witness] = {}  # by parent

    @property
    def shared_bytes(self) -> int:
        """How much of the tree's memory is not stored because another image holds it."""
        spared = sum(runs.total_bytes for runs in self._inherited.values())
        return spared - sum(witness.runs.total_bytes for witness in self.witnesses.values())

    @property
    def is_any(self) -> bool:
        """Whether somebody has pages from its parent."""
        return bool(self._inherited)

    def look_at(self, pid: int, cancel: Cancel | None = None) -> None:
        """Find out which pages of a frozen task must be stored. Blocks; different tasks in any threads."""
        stored = memory.select(pid, self._mms[pid], cancel)
        if (parent := self._parents.get(pid)) is not None:
            found = find(pid, self._mms[pid], parent, self._mms[parent], stored, cancel)
            if len(found):
                self._inherited[pid] = found
        self._stored[pid] = stored

    def settle(self, cancel: Cancel | None = None) -> None:
        """Find what only siblings share, and decide whether all of it is worth an image that only we can restore."""
        children: dict[int, list[int]] = {}
        for pid, parent in self._parents.items():
            children.setdefault(parent, []).append(pid)
        for parent in self._mms:
            if len(children.get(parent, ())) > 1:
                self._look_back(parent, children[parent], cancel)
        if self.shared_bytes < MIN_SHARED_BYTES:
            self._inherited.clear()
            self.witnesses.clear()
        for pid, runs in self._inherited.items():
            self._stored[pid] -= runs

    def _look_back(self, parent: int, children: Sequence[int], cancel: Cancel | None) -> None:
        """Pages that children share without their parent, as the last one has them: it was forked from the newest."""
        rest: dict[int, PageRuns] = {}
        taken = self._inherited.get(parent, PageRuns())
        for pid in children:
            own = self._inherited.get(pid, PageRuns())
            rest[pid] = (self._stored[pid] & _ranges(self._mms[pid], bases(self._mms[pid], self._mms[parent]))) - own
            taken |= own
        witness = next((pid for pid in reversed(children) if len(rest[pid])), children[-1])
        wanted = rest[witness] - taken
        shared = {pid: common(pid, witness, rest[pid] & wanted, cancel) for pid in children if pid != witness}
        together = PageRuns()
        for runs in shared.values():
            together |= runs
        if together.total_bytes < MIN_ANCESTRAL_BYTES:
            return
        self.witnesses[parent] = Witness(witness, together)
        for pid, runs in (*shared.items(), (witness, together)):
            self._inherited[pid] = self._inherited.get(pid, PageRuns()) | runs

    def own(self, pid: int) -> PageRuns:
        """The pages that belong into a task's own pages image."""
        return self._stored[pid]

    def write(self, writer: ImageWriter, stored: Mapping[int, PageRuns], ancestral: Mapping[int, PageRuns]) -> None:
        """Write what is inherited. ``stored`` and ``ancestral``: what the images of all tasks hold in the end.

        A page that was found to hold nothing but zeros may be in none: then heirs get the like from nowhere.
        """
        for pid in self._mms:
            if pid in self._inherited:
                parent = self._parents[pid]
                seen, lost = stored[parent] | self._inherited.get(parent, PageRuns()), PageRuns()
                if parent in self.witnesses:
                    seen |= ancestral[parent]
                    lost = self.witnesses[parent].runs - ancestral[parent]
                self._inherited[pid] = (self._inherited[pid] & seen) - lost
                write(writer, pid, parent, self._inherited[pid])


def _ranges(mm: pb.mm_entry, starts: Container[int]) -> PageRuns:
    return PageRuns.of_ranges([(vma.start, vma.end) for vma in mm.vmas if vma.start in starts])


def write(writer: ImageWriter, pid: int, parent_pid: int, runs: PageRuns) -> None:
    """Write ``inherited-PID.img``: the records of a pagemap, but no pages; the head names the parent."""
    write_pagemap(writer, "inherited", pid, parent_pid, runs.vaddrs, runs.nr_pages, array("I", bytes(4 * len(runs))))


# ---- restore


class Inherited(NamedTuple):
    """What a task has from its parent.

    ``bases``: the parent's mapping around each mapping of the task that is kept, by the latter's start. ``dropped``:
    pages that the parent has in there and the task has not, or has its own of.
    """

    parent: int
    runs: PageRuns
    bases: Mapping[int, pb.vma_entry]
    dropped: PageRuns

    @property
    def kept(self) -> Collection[int]:
        """Starts of the mappings that the task has from its parent instead of making them."""
        return self.bases.keys()

    def protections(self, parents: Mapping[int, int]) -> dict[int, int]:
        """The protection of each kept mapping, given those of the parent's mappings."""
        return {start: parents[base.start] for start, base in self.bases.items()}

    def plan_drop(self) -> list[Call]:
        """Let go of what the parent has in what is kept and the task shall not see: before anything is filled."""
        return _plan_drop(self.dropped)


def _plan_drop(runs: PageRuns) -> list[Call]:
    return [
        Call(NR.MADVISE, (start, nr_pages * PAGE_BYTES, _MADV_DONTNEED), f"dropping {nr_pages} pages at {start:x}", 0)
        for start, nr_pages in runs
    ]


class Ancestral(NamedTuple):
    """Pages that a task has only until its children are born.

    ``before``: what is put over its memory first; ``after``: its own of these pages, put back afterwards. ``dropped``:
    pages to let go in between. ``filled``: starts of the mappings that all this is about.
    """

    runs: PageRuns
    before: Patch
    after: Patch
    dropped: PageRuns
    filled: frozenset[int]

    def plan_drop(self) -> list[Call]:
        """Let go of the pages that were only there for the children."""
        return _plan_drop(self.dropped)


class Shares(NamedTuple):
    """What the tasks of a tree have to do with one another's memory, by pid."""

    inherited: dict[int, Inherited]
    ancestral: dict[int, Ancestral]


class _Pages(NamedTuple):
    """The pages of a task: its own, and those that its children see at their birth."""

    own: PageRuns
    seen: PageRuns


def load(
    folder: ImageFolder,
    parents: Mapping[int, int],
    mms: Mapping[int, pb.mm_entry],
    pagemaps: Mapping[int, Pagemap],
) -> Shares:
    """Read and check what the tasks of a tree have from their parents, which come first in ``mms``.

    Raises ImageError where an image promises what the parent does not have.
    """
    idents = {kind: set(folder.idents(kind)) for kind in ("inherited", "ancestral")}
    for kind, pids in idents.items():
        if unknown := sorted(pids - mms.keys()):
            raise ImageError(f"{folder.path}/{kind}-{unknown[0]}.img: there is no living task {unknown[0]}")
    shares = Shares({}, {})
    pages: dict[int, _Pages] = {}
    for pid in mms if idents["inherited"] else ():
        own = seen = _runs_of(pagemaps[pid], f"{folder.path}/pagemap-{pid}.img")
        if pid in idents["inherited"]:
            found = shares.inherited[pid] = _load_one(folder, pid, parents[pid], mms, pages, own)
            seen |= found.runs
        if pid in idents["ancestral"]:
            old = shares.ancestral[pid] = _load_ancestral(folder, pid, mms[pid], shares.inherited.get(pid))
            seen |= old.runs
        pages[pid] = _Pages(own, seen)
    return shares


def _load_ancestral(folder: ImageFolder, pid: int, mm: pb.mm_entry, found: Inherited | None) -> Ancestral:
    name = f"{folder.path}/ancestral-{pid}.img"
    runs = _runs_of(read_pagemap(folder, "ancestral", pid), name)
    _refuse(name, runs - _ranges(mm, _private(mm)), "not in private memory")
    if found is not None:
        _refuse(name, runs & found.runs, f"which task {pid} has from its parent")
    return _make_ancestral(folder, pid, mm, runs)


def _private(mm: pb.mm_entry) -> set[int]:
    return {vma.start for vma in mm.vmas if vmaflags.is_private(vma)}


def _make_ancestral(folder: ImageFolder, pid: int, mm: pb.mm_entry, runs: PageRuns) -> Ancestral:
    image, pagemap = read_pagemap(folder, "ancestral", pid), read_pagemap(folder, "pagemap", pid)
    if any(flags != PRESENT for flags in (*image.flags, *pagemap.flags)):
        raise ImageError(f"{folder.path}/ancestral-{pid}.img: its pages, or those of task {pid}, are not stored here")
    own = PageRuns(pagemap.vaddrs, pagemap.nr_pages)
    filled = frozenset(vma.start for vma in mm.vmas if vmaflags.is_private(vma) and _touches(vma, runs))
    dropped = (runs - own) | _long_ones(runs & own)
    return Ancestral(runs, Patch(folder, image, runs), Patch(folder, pagemap, runs), dropped, filled)


def limit_ancestral(
    folder: ImageFolder, pid: int, mm: pb.mm_entry, whole: Ancestral, without: Container[int]
) -> Ancestral | None:
    """The same without mappings, by their starts, from which children get nothing at their birth."""
    left = whole.runs & _ranges(mm, {start for start in _private(mm) if start not in without})
    return _make_ancestral(folder, pid, mm, left) if len(left) else None


def _refuse(name: str, wrong: PageRuns, why: str) -> None:
    if len(wrong):
        raise ImageError(f"{name}: damaged: {wrong.nr_pages[0]} pages at {wrong.vaddrs[0]:#x}, {why}")


def _runs_of(pagemap: Pagemap, name: str) -> PageRuns:
    if not pagemap.ascending:
        raise ImageError(f"{name}: its runs of pages are not in order")
    return PageRuns(pagemap.vaddrs, pagemap.nr_pages)


def _load_one(
    folder: ImageFolder,
    pid: int,
    parent: int,
    mms: Mapping[int, pb.mm_entry],
    pages: Mapping[int, _Pages],
    own: PageRuns,
) -> Inherited:
    name = f"{folder.path}/inherited-{pid}.img"
    image = read_pagemap(folder, "inherited", pid)
    runs = _runs_of(image, name)
    if image.pages_id != parent or parent not in pages:
        raise ImageError(f"{name}: made for a child of {image.pages_id}, but task {pid} is one of {parent}")
    parts = bases(mms[pid], mms[parent])
    seen = pages[parent].seen
    _refuse(name, runs - _ranges(mms[pid], parts), f"not in a mapping that task {pid} can have from its parent")
    _refuse(name, runs - seen, f"which its parent {parent} does not have")
    _refuse(name, runs & own, "which it has itself")
    kept = {vma.start: parts[vma.start] for vma in mms[pid].vmas if vma.start in parts and _touches(vma, runs)}
    unwanted = (_ranges(mms[pid], kept) & seen) - runs
    return Inherited(parent, runs, kept, (unwanted - own) | _long_ones(unwanted & own))


def _long_ones(runs: PageRuns) -> PageRuns:
    chosen = [(address, nr_pages) for address, nr_pages in runs if nr_pages >= _WORTH_DROPPING_PAGES]
    return PageRuns(array("Q", (address for address, _ in chosen)), array("Q", (nr_pages for _, nr_pages in chosen)))


def _touches(vma: pb.vma_entry, runs: PageRuns) -> bool:
    after = bisect.bisect(runs.vaddrs, vma.start)
    if after and runs.vaddrs[after - 1] + runs.nr_pages[after - 1] * PAGE_BYTES > vma.start:
        return True
    return after < len(runs) and runs.vaddrs[after] < vma.end


class Source(NamedTuple):
    """Where ``nr_pages`` pages from address ``vaddr`` on are stored: at page ``page`` of pages-PAGES_ID.img."""

    vaddr: int
    nr_pages: int
    pages_id: int
    page: int


def resolve(
    pid: int,
    found: Mapping[int, Inherited],
    pagemaps: Mapping[int, Pagemap],
    ancestral: Mapping[int, Pagemap] | None = None,
) -> list[Source]:
    """Where the bytes lie that a task has from its parent, or that one from its own: for who wants copies of them.

    ``found`` comes from :func:`load`; ``pagemaps`` and ``ancestral`` are those of all tasks. Ascending by address.
    """
    sources: list[Source] = []
    wanted = found[pid].runs
    while len(wanted):
        pid = found[pid].parent
        for pagemap in ((ancestral or {}).get(pid), pagemaps[pid]):
            if pagemap is not None:
                sources += (Source(p.vaddr, p.nr_pages, pagemap.pages_id, p.page) for p in pieces(pagemap, wanted))
                wanted -= PageRuns(pagemap.vaddrs, pagemap.nr_pages)
    return sorted(sources)
