"""Loading and checking an image folder: everything that can stand against a restore, found before anything is made."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from gpurestore import core
from gpurestore.errors import Finding, ImageError, RestoreCheckError
from gpurestore.images import pb
from gpurestore.images.folder import ImageFolder
from gpurestore.images.pagemap import Pagemap, read_pagemap
from gpurestore.tasks import (
    births,
    cores,
    cpu,
    inherited,
    jsonvalues,
    lazy,
    memory,
    mm,
    numa,
    pstree,
    shmem,
    usage,
    vdso,
)
from gpurestore.tasks.births import Births
from gpurestore.tasks.external import Openers
from gpurestore.tasks.facts import ProcessFacts
from gpurestore.tasks.facts import load as load_facts
from gpurestore.tasks.inherited import Ancestral, Inherited
from gpurestore.tasks.lazy import FaultOrder
from gpurestore.tasks.memory import PagePlan, Ways, hugepages
from gpurestore.tasks.memory.lazy import LazyPlan, obstacle
from gpurestore.tasks.pstree import TreePlan
from gpurestore.tasks.restorer import Restorer
from gpurestore.tasks.shmem import SharedObject
from gpurestore.tasks.stagedfiles import StagedFiles

# A scheduler's parent may take a moment to reap what it killed.
ZOMBIE_WAIT_S = 5.0
_ZOMBIE_POLL_S = 0.02


@dataclass(slots=True)
class LoadedTask:
    """The images of one living task."""

    entry: pb.pstree_entry
    cores: dict[int, pb.core_entry]  # by thread id, the leader first
    facts: ProcessFacts
    mm: pb.mm_entry
    mm_facts: Mapping[str, Any]
    fs: pb.fs_entry
    pages: PagePlan
    inherited: Inherited | None = None
    lazy: LazyPlan | None = None  # what comes when the task runs already
    ancestral: Ancestral | None = None

    @property
    def pid(self) -> int:
        return int(self.entry.pid)

    @property
    def tids(self) -> list[int]:
        """Thread ids, the leader's first."""
        return list(self.cores)

    @property
    def filled(self) -> frozenset[int]:
        """Starts of the private mappings that pages are written to before they get their final protection."""
        return self.pages.filled | (self.ancestral.filled if self.ancestral else frozenset())


@dataclass(slots=True)
class LoadedTree:
    """The images of a whole tree, checked for sense but not against this machine."""

    folder: ImageFolder
    entries: list[pb.pstree_entry]
    leaders: dict[int, pb.core_entry]  # zombies too
    tasks: dict[int, LoadedTask]
    objects: dict[int, SharedObject]
    shared: dict[int, PagePlan]  # those that come before the tree runs
    files: StagedFiles
    facts: dict[int, ProcessFacts] = field(default_factory=dict)
    ways: Ways = memory.DEFAULT_WAYS
    late_shared: dict[int, LazyPlan] = field(default_factory=dict)  # objects that come when the tree runs already

    @property
    def root_pid(self) -> int:
        return int(self.entries[0].pid)

    def plan_births(self) -> TreePlan:
        """How to make the tree."""
        exit_signals = {pid: task.facts.exit_signal for pid, task in self.tasks.items()}
        return pstree.plan(
            self.entries, self.leaders, {pid: number for pid, number in exit_signals.items() if number is not None}
        )

    def schedule(self) -> Births:
        """When each task is born."""
        return births.schedule(self.plan_births(), [pid for pid, task in self.tasks.items() if task.inherited])

    @property
    def memory_bytes(self) -> int:
        """Bytes of all pages that a restore brings back."""
        private = sum(task.pages.total_bytes for task in self.tasks.values())
        return private + self.lazy_bytes + sum(plan.total_bytes for plan in self.shared.values())

    @property
    def lazy_bytes(self) -> int:
        """Those that come when the tree runs already."""
        late = [*self.late_shared.values(), *(task.lazy for task in self.tasks.values() if task.lazy is not None)]
        return sum(plan.total_bytes for plan in late)


def plugins_of(folder: ImageFolder) -> tuple[str, ...]:
    """The device plugins that the dump used."""
    return tuple(folder.inventory.plugins_entry.plugins)


def load(
    folder: ImageFolder,
    openers: Openers | None = None,
    ways: Ways = memory.DEFAULT_WAYS,
    fault_order: FaultOrder | None = None,
    cancel: core.Cancel | None = None,
) -> LoadedTree:
    """Read every image of a tree. Raises ImageError when one is missing, damaged, or contradicts another.

    ``openers`` gives back the files that device plugins claimed, ``ways`` says how memory shall come in. With a
    ``fault_order``, be it empty, it comes lazily as far as it can. ``cancel`` ends what is copied when files
    are opened.
    """
    entries = pstree.checked(folder.read("pstree"))
    extension = folder.manifest.extension if folder.manifest is not None else {}
    facts = load_facts(extension)
    mm_facts = jsonvalues.mapping(extension.get("mm", {}), "mm")
    leaders = {entry.pid: folder.read_one("core", entry.pid) for entry in entries}
    living = [entry for entry in entries if leaders[entry.pid].tc.task_state not in pstree.DEAD]
    mms = {entry.pid: _read_mm(folder, entry.pid) for entry in living}
    pagemaps = {pid: read_pagemap(folder, "pagemap", pid) for pid in mms}
    shares = inherited.load(folder, {entry.pid: entry.ppid for entry in entries}, mms, pagemaps)
    images = _Images(folder, ways, fault_order is not None, hugepages.anonymous_are_available(), facts, shares)
    tasks = {
        entry.pid: images.task(
            entry,
            leaders[entry.pid],
            mms[entry.pid],
            jsonvalues.mapping(mm_facts.get(str(entry.pid), {}), f"mm.{entry.pid}"),
            pagemaps[entry.pid],
        )
        for entry in living
    }
    if fault_order is not None:
        _make_lazy(folder, tasks, fault_order)
    objects = shmem.objects(mms)
    shared = shmem.plan(folder, objects, ways)
    late_shared = _make_shared_lazy(tasks, objects, shared, fault_order) if fault_order is not None else {}
    return LoadedTree(
        folder,
        entries,
        leaders,
        tasks,
        objects,
        {shmid: plan for shmid, plan in shared.items() if shmid not in late_shared},
        StagedFiles(folder, openers, ways, cancel, mms),
        facts,
        ways,
        late_shared,
    )


def _read_mm(folder: ImageFolder, pid: int) -> pb.mm_entry:
    space: pb.mm_entry = folder.read_one("mm", pid)
    mm.validate(space, f"{folder.path}/mm-{pid}.img")
    return space


class _Images(NamedTuple):
    """What is known of all tasks before each of them is loaded."""

    folder: ImageFolder
    ways: Ways
    is_lazy: bool
    may_be_huge: bool
    facts: Mapping[int, ProcessFacts]
    shares: inherited.Shares

    def task(
        self,
        entry: pb.pstree_entry,
        leader: pb.core_entry,
        space: pb.mm_entry,
        mm_facts: Mapping[str, Any],
        pagemap: Pagemap,
    ) -> LoadedTask:
        pid = int(entry.pid)
        heir = self.shares.inherited.get(pid)
        pages = memory.plan_pages(
            self.folder,
            pid,
            space,
            huge=hugepages.blocks(self.ways.hugepages, mm_facts) if self.may_be_huge else None,
            later=lazy.can_come_late(space) if self.is_lazy else frozenset(),
            kept=heir.kept if heir is not None else (),
            pagemap=pagemap,
        )
        return LoadedTask(
            entry,
            {tid: leader if tid == pid else self.folder.read_one("core", tid) for tid in entry.threads or [pid]},
            self.facts.get(pid, ProcessFacts()),
            space,
            mm_facts,
            self.folder.read_one("fs", pid),
            pages,
            heir,
            ancestral=self.shares.ancestral.get(pid),
        )


def _make_lazy(folder: ImageFolder, tasks: Mapping[int, LoadedTask], fault_order: FaultOrder) -> None:
    """Leave to a handler what can come late."""
    if any(task.pages.compressed is not None for task in tasks.values()):
        raise ImageError(
            f"{folder.path}: compressed pages cannot be restored lazily: leave out --lazy, or dump without --compress"
        )
    late = lazy.plan_tree(
        {pid: task.pages.pagemap for pid, task in tasks.items()},
        {pid: task.mm for pid, task in tasks.items()},
        {pid: list(task.cores.values()) for pid, task in tasks.items()},
        {pid: task.inherited for pid, task in tasks.items() if task.inherited is not None},
        fault_order,
        {pid: read_pagemap(folder, "ancestral", pid) for pid, task in tasks.items() if task.ancestral is not None},
        {pid: usage.used(task.mm_facts) for pid, task in tasks.items()},
    )
    for pid, (later, plan, inherited_part) in late.items():
        task = tasks[pid]
        if later != lazy.can_come_late(task.mm):
            task.pages = memory.plan_pages(folder, pid, task.mm, later=later, pagemap=task.pages.pagemap)
        task.lazy, task.inherited = plan, inherited_part
        if task.ancestral is not None:
            task.ancestral = inherited.limit_ancestral(folder, pid, task.mm, task.ancestral, later)


def _make_shared_lazy(
    tasks: Mapping[int, LoadedTask],
    objects: Mapping[int, SharedObject],
    shared: Mapping[int, PagePlan],
    fault_order: FaultOrder,
) -> dict[int, LazyPlan]:
    """The same for shared memory; the tasks that show it are to be watched."""
    late = lazy.plan_shared(
        {shmid: plan.pagemap for shmid, plan in shared.items() if plan.compressed is None},
        {shmid: item.size for shmid, item in objects.items()},
        {pid: task.mm for pid, task in tasks.items()},
        {pid: list(task.cores.values()) for pid, task in tasks.items()},
        fault_order,
    )
    for pid, views in late.views.items():
        tasks[pid].lazy = lazy.with_views(pid, tasks[pid].lazy, views)
    return late.plans


def check(tree: LoadedTree, restorer: Restorer) -> list[Finding]:
    """All obstacles to restoring ``tree`` here, but for pids that are taken."""
    all_cores = dict(tree.leaders)
    for task in tree.tasks.values():
        all_cores |= task.cores
    findings = cores.checks(tree.entries, all_cores, tree.facts, restorer)
    manifest = tree.folder.manifest
    if manifest is not None:
        findings += cpu.check(manifest.cpu)
    findings += pstree.plan(tree.entries, tree.leaders).findings
    for task in tree.tasks.values():
        findings += mm.check(task.pid, task.mm)
        policies = [*numa.of_mappings(task.mm_facts).values(), *_thread_policies(task.facts)]
        findings += numa.check(f"pid {task.pid}", policies)
        findings += _check_vdso(tree.folder, task)
    if tree.lazy_bytes and (finding := obstacle()):
        findings.append(finding)
    return findings + tree.files.check()


def _thread_policies(facts: ProcessFacts) -> Iterator[Sequence[int]]:
    return (thread.mempolicy for thread in facts.threads.values() if thread.mempolicy)


def _check_vdso(folder: ImageFolder, task: LoadedTask) -> list[Finding]:
    code = vdso.image_layout(task.mm).code
    pagemap = task.pages.pagemap
    dumped = memory.read_page_bytes(folder, pagemap, code.start, code.end) if code is not None else b""
    rips = [core.thread_info.gpregs.ip for core in task.cores.values()]
    return vdso.check(task.pid, task.mm, dumped, rips)


def check_session(tree: LoadedTree, shell_job: bool) -> list[Finding]:
    """Sessions and groups outside of the tree are inherited from the restorer only if the user says so."""
    pids = {entry.pid for entry in tree.entries}
    root = tree.entries[0]
    if shell_job or (root.sid in pids and root.pgid in pids):
        return []
    why = "its leader was outside of the tree; -j (--shell-job) lets the tree join this command's session"
    return [Finding(f"pid {root.pid}", f"session {root.sid}, group {root.pgid}", why)]


def await_pids(tree: LoadedTree, should_stop: Callable[[], None], wait_s: float = ZOMBIE_WAIT_S) -> list[Finding]:
    """Pids that somebody has. Zombies are given a few seconds to be reaped by their parents. Blocks."""
    deadline = time.monotonic() + wait_s
    while True:
        should_stop()
        taken = pstree.taken(tree.entries)
        if not taken:
            return []
        if time.monotonic() > deadline or not all(item.is_zombie for item in taken):
            return [Finding(f"pid {item.pid}", "taken", item.description) for item in taken]
        time.sleep(_ZOMBIE_POLL_S)


def refuse(tree: LoadedTree, findings: list[Finding]) -> None:
    """Raise RestoreCheckError if there is anything in ``findings``."""
    if findings:
        raise RestoreCheckError(f"cannot restore {tree.folder.path} here, nothing was created", findings)
