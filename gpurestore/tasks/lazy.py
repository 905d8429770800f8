"""Lazy restore: which memory of a tree may come when it runs already, and in which order it is wanted.

Anonymous memory comes late, private and shared. The kernel does not report missing pages of private file mappings;
locked memory, memory that is wiped on fork and memfds, which can be read without being mapped, are filled before the
tree runs. The handler that brings the pages is in :mod:`gpurestore.tasks.memory.lazy`.
"""

from __future__ import annotations

import bisect
from array import array
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import accumulate
from pathlib import Path
from typing import Any, Final, NamedTuple

from gpurestore.errors import GpurestoreError
from gpurestore.images import pb
from gpurestore.images.magic import pages_file_name
from gpurestore.images.pagemap import Pagemap
from gpurestore.tasks import inherited, vmaflags
from gpurestore.tasks.inherited import Inherited, Source
from gpurestore.tasks.maps import PAGE_BYTES
from gpurestore.tasks.memory import PageRuns
from gpurestore.tasks.memory.lazy import LazyPlan, LazyView, Span

FaultOrder = Mapping[int, Sequence[int]]  # addresses by pid

# What a thread needs as soon as it runs: below its stack pointer the red zone, above it some frames.
_STACK_BELOW: Final = PAGE_BYTES
_STACK_ABOVE: Final = 8 * PAGE_BYTES
# One recorded fault stands for the block that came with it.
_FAULT_BYTES: Final = 16 * PAGE_BYTES


class LateMemory(NamedTuple):
    """What of a task's memory comes late: ``later`` are the starts of the mappings that are left out at first.

    ``inherited`` is what is left to have from the parent at birth.
    """

    later: frozenset[int]
    plan: LazyPlan | None
    inherited: Inherited | None


def plan_tree(
    pagemaps: Mapping[int, Pagemap],
    mms: Mapping[int, pb.mm_entry],
    cores: Mapping[int, Sequence[pb.core_entry]],
    heirs: Mapping[int, Inherited],
    fault_order: FaultOrder,
    ancestral: Mapping[int, Pagemap] | None = None,
    used: Mapping[int, Collection[int]] = {},
) -> dict[int, LateMemory]:
    """Decide it for all tasks, parents first. For images that were checked (plan_pages, inherited.load).

    ``pagemaps`` are those of all tasks, with nothing but stored pages, ``ancestral`` those of what a task no longer had
    when it was dumped, but its children. ``used`` are the starts of mappings that were seen in use before the dump.

    A child cannot have from its parent what comes late: it gets pages of its own, from the parent's pages image.
    """
    found: dict[int, LateMemory] = {}
    for pid, mm in mms.items():
        heir = heirs.get(pid)
        from_parent = found[heir.parent].later if heir is not None else frozenset()
        bases = heir.bases if heir is not None else {}
        later = can_come_late(mm) | {start for start, base in bases.items() if base.start in from_parent}
        sources = inherited.resolve(pid, heirs, pagemaps, ancestral) if heir is not None else []
        vmas = [vma for vma in mm.vmas if vma.start in later]
        places = _places(pagemaps[pid], sources)
        plan = _plan(pid, places, vmas, cores[pid], fault_order.get(pid, ()), used.get(pid, ()))
        found[pid] = LateMemory(later, plan, _without(heir, mm, later) if heir is not None else None)
    return found


class LateShared(NamedTuple):
    """Shared anonymous memory that comes late: by shmid what is brought, by pid the mappings that show it."""

    plans: dict[int, LazyPlan]
    views: dict[int, tuple[LazyView, ...]]


def plan_shared(
    pagemaps: Mapping[int, Pagemap],
    sizes: Mapping[int, int],
    mms: Mapping[int, pb.mm_entry],
    cores: Mapping[int, Sequence[pb.core_entry]],
    fault_order: FaultOrder,
) -> LateShared:
    """Decide it for the objects of a tree, whose pagemaps and sizes are given by shmid.

    An object of which any task has locked a part is there before the tree runs.
    """
    shown = {pid: [vma for vma in mm.vmas if vma.status & vmaflags.ANON_SHARED] for pid, mm in mms.items()}
    locked = {vma.shmid for vmas in shown.values() for vma in vmas if vma.flags & vmaflags.MAP_LOCKED}
    late = {shmid for shmid, pagemap in pagemaps.items() if pagemap.nr_pages and shmid not in locked}
    views = {
        pid: tuple(LazyView(vma.start, vma.end, vma.shmid, vma.pgoff) for vma in vmas if vma.shmid in late)
        for pid, vmas in shown.items()
    }
    hot: dict[int, list[Span]] = {shmid: [] for shmid in late}
    recorded: dict[int, list[Span]] = {shmid: [] for shmid in late}
    for pid, own in views.items():
        _add_shown(hot, own, [span for core in cores[pid] for span in _hot(core)])
        _add_shown(recorded, own, [(address, address + _FAULT_BYTES) for address in fault_order.get(pid, ())])
    plans = {}
    for shmid in sorted(late):
        places, size = _places(pagemaps[shmid], []), sizes[shmid]
        plans[shmid] = LazyPlan(
            pid=0,
            ranges=((0, size),),
            order=(*hot[shmid], *recorded[shmid], (0, size)),
            nr_hot=len(hot[shmid]),
            total_bytes=sum(places.nr_pages) * PAGE_BYTES,
            shmid=shmid,
            **places.of_plan(),
        )
    return LateShared(plans, {pid: own for pid, own in views.items() if own})


def _add_shown(found: Mapping[int, list[Span]], views: Iterable[LazyView], spans: Sequence[Span]) -> None:
    """What ``views`` show in ``spans`` of a task, as offsets in the objects."""
    for view in views:
        for start, end in spans:
            low, high = max(start, view.start), min(end, view.end)
            if low < high:
                found[view.shmid].append((low - view.start + view.offset, high - view.start + view.offset))


def with_views(pid: int, plan: LazyPlan | None, views: tuple[LazyView, ...]) -> LazyPlan:
    """The plan of a task that shows shared memory which comes late; ``plan`` is about its own memory."""
    if plan is None:
        nothing = _Places(array("Q"), array("Q"), array("Q"), array("I"), (), array("Q", [0]))
        plan = LazyPlan(pid=pid, ranges=(), order=(), nr_hot=0, total_bytes=0, **nothing.of_plan())
    return replace(plan, views=views)


def _without(heir: Inherited, mm: pb.mm_entry, later: Collection[int]) -> Inherited | None:
    """What a task still has from its parent when some of its mappings come late."""
    bases = {start: base for start, base in heir.bases.items() if start not in later}
    if not bases:
        return None
    kept = PageRuns.of_ranges([(vma.start, vma.end) for vma in mm.vmas if vma.start in bases])
    return Inherited(heir.parent, heir.runs & kept, bases, heir.dropped & kept)


def is_lazy(vma: pb.vma_entry) -> bool:
    """Whether the pages of a mapping may come after the task runs."""
    if not (vmaflags.is_private(vma) and vma.status & vmaflags.ANON_PRIVATE):
        return False
    # A child must find memory that is wiped on fork empty, whatever its parent has there.
    wiped = vma.madv >> vmaflags.MADV_WIPEONFORK & 1
    return not wiped and not vma.flags & (vmaflags.MAP_LOCKED | vmaflags.MAP_DROPPABLE | vmaflags.MAP_HUGETLB)


def can_come_late(mm: pb.mm_entry) -> frozenset[int]:
    """Starts of the mappings whose pages may come after the task runs."""
    return frozenset(vma.start for vma in mm.vmas if is_lazy(vma))


def _plan(
    pid: int,
    places: _Places,
    vmas: Sequence[pb.vma_entry],
    cores: Sequence[pb.core_entry],
    faults: Sequence[int],
    used: Collection[int],
) -> LazyPlan | None:
    def stored(vma: pb.vma_entry) -> int:
        return _up_to(places, vma.end) - _up_to(places, vma.start)

    touched = [vma for vma in vmas if stored(vma)]
    if not touched:
        return None
    hot = [span for core in cores for span in _hot(core)]
    recorded = [(address, address + _FAULT_BYTES) for address in faults]
    return LazyPlan(
        pid=pid,
        ranges=tuple((vma.start, vma.end) for vma in touched),
        order=(*hot, *recorded, *_by_need(touched, cores, used)),
        nr_hot=len(hot),
        total_bytes=sum(map(stored, touched)) * PAGE_BYTES,
        **places.of_plan(),
    )


class _Places(NamedTuple):
    """Where the pages of a task are stored, ascending by address."""

    vaddrs: array[int]
    nr_pages: array[int]
    page_offsets: array[int]
    file_of: array[int]
    pages_ids: Sequence[int]
    before: array[int]  # how many pages lie before each run

    def of_plan(self) -> dict[str, Any]:
        """The fields of a plan that say it."""
        return {
            "files": tuple(pages_file_name(ident) for ident in self.pages_ids),
            "vaddrs": self.vaddrs,
            "nr_pages": self.nr_pages,
            "page_offsets": self.page_offsets,
            "file_of": self.file_of,
        }


def _places(pagemap: Pagemap, sources: Sequence[Source]) -> _Places:
    """Its own pages image, and for what it has from its parent that one's."""
    offsets = array("Q", accumulate(pagemap.nr_pages, initial=0))
    if not sources:
        ours = array("I", bytes(4 * len(pagemap)))
        return _Places(pagemap.vaddrs, pagemap.nr_pages, offsets, ours, (pagemap.pages_id,), offsets)
    own = map(Source, pagemap.vaddrs, pagemap.nr_pages, [pagemap.pages_id] * len(pagemap), offsets)
    both = sorted([*own, *sources])
    idents = sorted({source.pages_id for source in both})
    return _Places(
        array("Q", [source.vaddr for source in both]),
        array("Q", [source.nr_pages for source in both]),
        array("Q", [source.page for source in both]),
        array("I", [idents.index(source.pages_id) for source in both]),
        idents,
        array("Q", accumulate((source.nr_pages for source in both), initial=0)),
    )


def _up_to(places: _Places, address: int) -> int:
    """How many pages are stored below ``address``."""
    at = bisect.bisect(places.vaddrs, address) - 1
    if at < 0:
        return 0
    return places.before[at] + min(places.nr_pages[at], (address - places.vaddrs[at]) // PAGE_BYTES)


def _hot(core: pb.core_entry) -> list[Span]:
    """Memory that a thread, or the kernel on its behalf, touches first.

    The thread's own block must be there also because an exiting thread cannot wait for a page.
    """
    info, thread = core.thread_info, core.thread_core
    regs = info.gpregs
    spans = [(regs.sp - _STACK_BELOW, regs.sp + _STACK_ABOVE)]
    spans += [_page_at(address) for address in (regs.ip, info.clear_tid_addr, thread.futex_rla)]
    spans.append((regs.fs_base - PAGE_BYTES, regs.fs_base + PAGE_BYTES))
    pages = [(start // PAGE_BYTES * PAGE_BYTES, -(-end // PAGE_BYTES) * PAGE_BYTES) for start, end in spans]
    return [(start, end) for start, end in pages if 0 <= start < end < 1 << 63]


def _page_at(address: int) -> Span:
    return address, address + 1


def _by_need(vmas: Sequence[pb.vma_entry], cores: Sequence[pb.core_entry], used: Collection[int]) -> list[Span]:
    """All of the mappings: stacks from their pointers up, the heap, then the others: those in use first, small ones
    first."""
    stacks, heap, others = [], [], []
    pointers = sorted(core.thread_info.gpregs.sp for core in cores)
    for vma in vmas:
        at = bisect.bisect_left(pointers, vma.start)
        if at < len(pointers) and pointers[at] < vma.end:
            stacks.append((pointers[at] // PAGE_BYTES * PAGE_BYTES, vma.end))
            others.append((vma.start, vma.end))
        elif vma.status & vmaflags.HEAP:
            heap.append((vma.start, vma.end))
        else:
            others.append((vma.start, vma.end))
    return stacks + heap + sorted(others, key=lambda span: (span[0] not in used, span[1] - span[0]))


# ---- the order of faults, from one restore to the next


def read_fault_order(path: Path) -> dict[int, list[int]]:
    """What a handler recorded: addresses by pid, in order. Raises GpurestoreError."""
    try:
        lines = path.read_text(encoding="ascii", errors="replace").splitlines()
    except OSError as error:
        raise GpurestoreError(f"cannot read the order of faults {path}: {error.strerror}") from error
    order: dict[int, list[int]] = {}
    for number, line in enumerate(lines, 1):
        try:
            pid, address = line.split()
            order.setdefault(int(pid), []).append(_checked_address(int(address, 16)))
        except ValueError as error:
            raise GpurestoreError(
                f"{path}: line {number} is not the pid and the address of a fault, as --record-faults writes them"
            ) from error
    return order


def _checked_address(address: int) -> int:
    if not 0 <= address < 1 << 63 or address % PAGE_BYTES:
        raise ValueError(f"{address:#x} is no address of a page")
    return address
