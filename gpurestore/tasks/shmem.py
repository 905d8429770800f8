"""Shared anonymous memory: objects that several mappings of several tasks show, each stored and restored once.

Dump: :func:`objects` over all tasks, then :func:`dump` each. Restore: :func:`objects` and :func:`plan` before anything
exists, :func:`staging_layout` to find room next to the region, and a :class:`Stage` in the main process, from which
tasks map what they need (``mremap`` with an old size of 0). memfds are files: :mod:`gpurestore.tasks.memfds`.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Protocol, Self

from gpurestore.batch import Call, CallResult, Out
from gpurestore.core import Cancel, check, lib, new_error
from gpurestore.errors import CancelledError, Finding, ImageError
from gpurestore.images import pb
from gpurestore.syscalls import NR
from gpurestore.tasks import mappings, maps, memory, procfs, vmaflags
from gpurestore.tasks.maps import HUGE_PAGE_BYTES, PAGE_BYTES
from gpurestore.tasks.memory import (
    DEFAULT_WAYS,
    AnyPagesFile,
    PagePlan,
    PageRuns,
    Progress,
    Reading,
    Ways,
    pages_file,
)
from gpurestore.tasks.memory.hugepages import blocks_of_object

if TYPE_CHECKING:
    from gpurestore.images.folder import ImageFolder
    from gpurestore.images.writer import ImageWriter

# Bytes of memory that one mincore asks about: its answer, a byte per page, must fit into a batch.
_MINCORE_PAGES = 65536


class View(NamedTuple):
    """A mapping that shows ``size`` bytes of an object, from ``offset`` on, at ``address`` of task ``pid``."""

    pid: int
    address: int
    offset: int
    size: int


@dataclass(slots=True)
class SharedObject:
    """One object. Its size is what the mappings show of it: nobody can reach more."""

    shmid: int
    size: int = 0
    noreserve: bool = False
    views: list[View] = field(default_factory=list)


class Task(Protocol):
    """What this module needs of :class:`gpurestore.tasks.frozen.FrozenTask`."""

    def ask(self, calls: Sequence[Call]) -> Sequence[CallResult]: ...


def objects(mms: Mapping[int, pb.mm_entry]) -> dict[int, SharedObject]:
    """The shared anonymous objects of a tree, from the address spaces of its tasks; by shmid, ascending."""
    found: dict[int, SharedObject] = {}
    for pid, mm in mms.items():
        for vma in mm.vmas:
            if not vma.status & vmaflags.ANON_SHARED:
                continue
            item = found.setdefault(vma.shmid, SharedObject(vma.shmid))
            size = vma.end - vma.start
            item.views.append(View(pid, vma.start, vma.pgoff, size))
            item.size = max(item.size, vma.pgoff + size)
            item.noreserve |= bool(vma.flags & vmaflags.MAP_NORESERVE)
    return dict(sorted(found.items()))


# ---- dump


def check_outsiders(found: Mapping[int, SharedObject], pids: Collection[int]) -> list[Finding]:
    """Objects that a process outside of the tree shows too: a restored tree would have a copy of its own.

    Costs a look at every process of the machine, and nothing where the tree has no shared anonymous memory.
    """
    findings: list[Finding] = []
    if not found:
        return findings
    for pid in procfs.all_pids():
        if pid in pids:
            continue
        for shmid in _objects_of_process(pid) & found.keys():
            view = found[shmid].views[0]
            where = f"pid {view.pid}, mapping {view.address:x}-{view.address + view.size:x}"
            findings.append(Finding(where, "shared memory", f"pid {pid}, outside of the tree, shares it"))
    return findings


def _objects_of_process(pid: int) -> set[int]:
    """Inodes of the shared anonymous memory that a process has mapped; none if we may not know."""
    try:
        text = Path(f"/proc/{pid}/maps").read_bytes()
    except OSError:
        return set()
    if b"/dev/zero (deleted)" not in text and b"[anon_shmem:" not in text:
        return set()
    vmas = (maps.parse_maps_line(line) for line in text.split(b"\n"))
    return {vma.ino for vma in vmas if vma is not None and vma.shared and vma.dev == mappings.shmem_device()}


def dump(
    writer: ImageWriter,
    item: SharedObject,
    tasks: Mapping[int, Task],
    pages_id: int,
    *,
    jobs: int | None = None,
    cancel: Cancel | None = None,
    progress: Progress | None = None,
) -> int:
    """Write ``pagemap-shmem-SHMID.img`` and its pages while the tree is frozen; returns the bytes stored."""
    fd = _open_object(item)
    if fd is None:
        return _dump_through_tasks(writer, item, tasks, pages_file(writer, pages_id, jobs, cancel, progress), cancel)
    try:
        return memory.save_object(
            writer, item.shmid, fd, item.size, pages_id, jobs=jobs, cancel=cancel, progress=progress
        )
    finally:
        os.close(fd)


def _open_object(item: SharedObject) -> int | None:
    """The object as a file, which only root (of the first user namespace) may have."""
    view = item.views[0]
    try:
        return os.open(
            f"/proc/{view.pid}/map_files/{view.address:x}-{view.address + view.size:x}", os.O_RDONLY | os.O_CLOEXEC
        )
    except OSError:
        return None


def _dump_through_tasks(
    writer: ImageWriter, item: SharedObject, tasks: Mapping[int, Task], pages: AnyPagesFile, cancel: Cancel | None
) -> int:
    stored = PageRuns()
    for view in _cover(item.views):
        if cancel and cancel.is_set:
            raise CancelledError("cancelled: reading shared memory")
        runs = _resident(tasks[view.pid], view)
        for address, nr_pages in pages.add_from_task(view.pid, runs):
            stored.vaddrs.append(address - view.address + view.offset)
            stored.nr_pages.append(nr_pages)
    pages.finish("pagemap-shmem", item.shmid, stored)
    return pages.size


def _cover(views: Iterable[View]) -> list[View]:
    """Parts of views that together show each byte once, ascending by offset."""
    parts: list[View] = []
    at = 0
    for view in sorted(views, key=lambda view: (view.offset, -view.size, view.pid, view.address)):
        skip = max(0, at - view.offset)
        if skip < view.size:
            parts.append(View(view.pid, view.address + skip, view.offset + skip, view.size - skip))
            at = view.offset + view.size
    return parts


def _resident(task: Task, view: View) -> PageRuns:
    """The pages of a view that hold something, at the task's addresses; a page too many costs room, none is missed.

    mincore does not know pages that were swapped out. Where there are any, all pages count, holes too.
    """
    answers = []
    for start in range(0, view.size // PAGE_BYTES, _MINCORE_PAGES):
        nr_pages = min(_MINCORE_PAGES, view.size // PAGE_BYTES - start)
        args = (view.address + start * PAGE_BYTES, nr_pages * PAGE_BYTES, Out(nr_pages))
        call = Call(NR.MINCORE, args, "asking which shared pages are there", want=0)
        answers.append(task.ask([call])[0].outs[0])
    if _swap_is_used():  # asked last: what was swapped out before we asked is seen
        runs = PageRuns()
        runs.insert(view.address, view.size // PAGE_BYTES)
        return runs
    return _runs_of_bytes(view.address, answers)


def _swap_is_used() -> bool:
    """Whether anything at all is swapped out on this machine."""
    values = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
    return int(values["SwapTotal"].split()[0]) > int(values["SwapFree"].split()[0])


def _runs_of_bytes(address: int, answers: Iterable[bytes]) -> PageRuns:
    """Runs of pages whose byte in the answers of mincore has its lowest bit set."""
    flags = b"".join(answers)
    flags = flags.translate(bytes(value & 1 for value in range(256)))
    runs = PageRuns()
    start = flags.find(b"\1")
    while start >= 0:
        end = flags.find(b"\0", start)
        end = len(flags) if end < 0 else end
        runs.vaddrs.append(address + start * PAGE_BYTES)
        runs.nr_pages.append(end - start)
        start = flags.find(b"\1", end)
    return runs


# ---- restore


def plan(folder: ImageFolder, found: Mapping[int, SharedObject], ways: Ways = DEFAULT_WAYS) -> dict[int, PagePlan]:
    """Check the images of all objects. Raises ImageError; changes nothing."""
    plans = {}
    huge = blocks_of_object(ways.hugepages)
    for shmid, item in found.items():
        if item.size >= 1 << 47:
            raise ImageError(f"{folder.path}: shared memory {shmid} has the impossible size {item.size}")
        plans[shmid] = memory.plan_object(folder, shmid, item.size, huge=huge)
    return plans


def staging_layout(found: Mapping[int, SharedObject], start: int) -> tuple[dict[int, int], int]:
    """Where each object is staged if there is room from ``start`` on, and where the last one ends."""
    addresses = {}
    at = start
    for shmid, item in found.items():
        align = HUGE_PAGE_BYTES if item.size >= HUGE_PAGE_BYTES else PAGE_BYTES
        at = -(-at // align) * align
        addresses[shmid] = at
        at += -(-item.size // PAGE_BYTES) * PAGE_BYTES
    return addresses, at


class Stage:
    """All objects of a restore, mapped in this process. Made before the root task is forked, closed when all is done.

    Mapping is cheap and comes first; :meth:`fill` may run while tasks already map the objects.
    """

    def __init__(self, found: Mapping[int, SharedObject], addresses: Mapping[int, int]) -> None:
        self._mapped: list[tuple[int, int]] = []
        try:
            for shmid, address in addresses.items():
                self._map(address, found[shmid])
        except BaseException:
            self.close()
            raise

    def _map(self, address: int, item: SharedObject) -> None:
        err = new_error()
        check(lib.gr_stage_map(address, item.size, int(item.noreserve), err), err)
        self._mapped.append((address, item.size))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def fill(
        self,
        folder: ImageFolder,
        plans: Mapping[int, PagePlan],
        addresses: Mapping[int, int],
        *,
        reading: Reading = Reading.AUTO,
        jobs: int | None = None,
        cancel: Cancel | None = None,
    ) -> int:
        """Bring the content of all objects in; returns the bytes. Blocks: to be called in a worker thread."""
        total = 0
        sizes = dict(self._mapped)
        for shmid, page_plan in plans.items():
            if page_plan.total_bytes:
                address = addresses[shmid]
                with memory.open_pages(folder, page_plan, reading) as source:
                    page_plan.fill(address, sizes[address], source, jobs, cancel)
                total += page_plan.total_bytes
        return total

    def close(self) -> None:
        """Unmap everything here; the tasks keep what they mapped."""
        while self._mapped:
            lib.gr_stage_unmap(*self._mapped.pop())
