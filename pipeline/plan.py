"""The restore plan: what every task will do, as data. Made from images alone; printed by ``--dry-run``.

One hole of the address space, free in every task and in this process, takes the region (agent and slots) and behind it
the staged shared memory. Every thread has a slot; tasks that have memory to fill get slots for extra workers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

from gpurestore import core
from gpurestore.batch import Call
from gpurestore.core import ThreadState
from gpurestore.pipeline.load import LoadedTask, LoadedTree
from gpurestore.tasks import cloning, cores, fs, maps, memory, mm, pstree, shmem, vdso
from gpurestore.tasks.births import Births
from gpurestore.tasks.descriptors import plan_close_staged, plan_descriptors
from gpurestore.tasks.maps import HUGE_PAGE_BYTES
from gpurestore.tasks.memory import Reading, hugepages
from gpurestore.tasks.pstree import TreePlan
from gpurestore.tasks.restorer import Restorer

_LARGE_BYTES = 64 << 20
_MIN_COLD_BYTES = 16 << 20


@dataclass(slots=True)
class TaskPlan:
    """The batches of one task, in the order in which they run. ``threads`` has the leader's last."""

    pid: int
    strip: list[Call]
    files: list[Call]
    mappings: list[Call]
    finish: list[Call]
    late: list[Call]
    threads: dict[int, list[Call]]
    states: dict[int, ThreadState]
    stop_signal: int


@dataclass(slots=True)
class RestorePlan:
    """The whole plan. Slots are numbered over all tasks; ``workers`` gives each task its spare ones.

    ``nr_fillers`` threads of a task fill its memory: its own, then spare ones. ``huge_staging`` is where each task may
    map room for its workers' huge pages (:mod:`gpurestore.tasks.memory.hugepages`).
    """

    region: int
    hole_bytes: int
    nr_slots: int
    slots: dict[int, int]
    workers: dict[int, list[int]]
    nr_fillers: dict[int, int]
    staging: dict[int, int]
    huge_staging: int
    tree: TreePlan
    births: Births
    tasks: dict[int, TaskPlan] = field(default_factory=dict)

    @property
    def hole_end(self) -> int:
        return self.region + self.hole_bytes


def place(tree: LoadedTree, jobs: int) -> RestorePlan:
    """Find a place for the region and the staging, and give out slots."""
    births = tree.plan_births()
    slots: dict[int, int] = {}
    for birth in births.births:
        slots[birth.pid] = len(slots)
    for task in tree.tasks.values():
        for tid in task.tids:
            slots.setdefault(tid, len(slots))
    nr_slots = len(slots)
    total_bytes = sum(task.pages.total_bytes for task in tree.tasks.values())
    nr_fillers = {
        pid: _nr_fillers(task.pages, _depth(task.pages, tree.ways.reading, jobs), total_bytes)
        for pid, task in tree.tasks.items()
    }
    workers = {}
    for pid, task in tree.tasks.items():
        nr_workers = max(0, nr_fillers[pid] - len(task.tids))
        workers[pid] = list(range(nr_slots, nr_slots + nr_workers))
        nr_slots += nr_workers
    region_bytes = core.Region.size_for(nr_slots)
    _, staging_end = shmem.staging_layout(tree.objects, region_bytes)
    huge_offset = -(-staging_end // HUGE_PAGE_BYTES) * HUGE_PAGE_BYTES
    # A multiple of the size of a huge page, so that the hole's start is one of theirs too.
    hole_bytes = huge_offset + max(nr_fillers.values(), default=0) * hugepages.STAGING_BYTES + HUGE_PAGE_BYTES
    taken = maps.own_ranges()
    for task in tree.tasks.values():
        taken += mm.fixed_ranges(task.mm)
    region = maps.find_hole(taken, hole_bytes)
    staging, _ = shmem.staging_layout(tree.objects, region + region_bytes)
    huge_staging = region + huge_offset
    return RestorePlan(
        region, hole_bytes, nr_slots, slots, workers, nr_fillers, staging, huge_staging, births, tree.schedule()
    )


def _depth(pages: memory.PagePlan, reading: Reading, jobs: int) -> int:
    """How many workers may read an image at once: ``jobs`` of them, or what keeps a disk busy. One means one."""
    if pages.compressed is not None:
        return jobs
    direct = reading is Reading.DIRECT or (reading is Reading.AUTO and pages.cold_bytes >= _MIN_COLD_BYTES)
    return max(jobs, memory.COLD_WORKERS) if direct and jobs > 1 else jobs


def _nr_fillers(pages: memory.PagePlan, jobs: int, total_bytes: int) -> int:
    """How many threads of a task fill its memory, where all tasks together have ``total_bytes``.

    Work cannot go over to another task, so a large task may use all workers. To a small one that is one of many an
    extra thread costs more than it gives.
    """
    if not pages.total_bytes or (pages.compressed is not None and not pages.huge):
        return 0
    if pages.total_bytes < _LARGE_BYTES:
        jobs = -(-jobs * pages.total_bytes // total_bytes)
    return min(jobs, pages.nr_chunks)


def fill(plan: RestorePlan, tree: LoadedTree, restorer: Restorer) -> None:
    """Plan every task. The files have their numbers (StagedFiles.assign or open_all)."""
    layouts: dict[int | None, vdso.Layout] = {None: vdso.own_layout()}
    made: dict[int, Mapping[int, int]] = {}  # by pid, the protection of its mappings while they are filled
    for birth in plan.tree.births:
        own = layouts[birth.parent]
        task = tree.tasks.get(birth.pid)
        if task is None:
            layouts[birth.pid] = own
            continue
        layouts[birth.pid] = vdso.target_layout(own, task.mm)
        kept = task.inherited.protections(made[task.inherited.parent]) if task.inherited else {}
        made[birth.pid] = mm.made_with(task.mm, task.filled, kept)
        plan.tasks[birth.pid] = _plan_task(plan, tree, task, own, restorer, made[birth.pid])


def _plan_task(
    plan: RestorePlan,
    tree: LoadedTree,
    task: LoadedTask,
    own: vdso.Layout,
    restorer: Restorer,
    made: Mapping[int, int],
) -> TaskPlan:
    pid, files = task.pid, tree.files
    leader = task.cores[pid]
    process = cores.plan_process(leader, task.facts, restorer, pid, is_root=pid == tree.root_pid)
    order = [tid for tid in task.tids if tid != pid] + [pid]
    states = {tid: cores.registers(task.cores[tid], task.facts, tid) for tid in order}
    kept = task.inherited.kept if task.inherited else ()
    mappings = mm.plan_mappings(
        task.mm,
        files.fd_of_mapping,
        plan.staging.__getitem__,
        task.filled,
        files.redirects_of(pid),
        kept,
        task.mm_facts,
    )
    return TaskPlan(
        pid=pid,
        strip=[
            *process.early,
            cloning.outlive_parent(),
            *mm.plan_strip(plan.region, plan.hole_end, own, task.mm, kept),
        ],
        files=[
            *plan_descriptors(files.entries_of(pid), files.fd_of, files.keep_from),
            *fs.plan(task.fs, files.fd_of, _is_root_at_birth(tree, task)),
        ],
        mappings=[*(task.inherited.plan_drop() if task.inherited else []), *mappings],
        finish=mm.plan_finish(task.mm, made, task.mm_facts),
        late=[*plan_close_staged(files.keep_from), *files.plan_late(pid), *process.late],
        threads={
            tid: cores.plan_thread(
                task.cores[tid], task.facts, restorer, pid, tid, task.mm, root=leader if pid == tree.root_pid else None
            )
            for tid in order
        },
        states=states,
        stop_signal=states[pid].stop_signal,
    )


def _is_root_at_birth(tree: LoadedTree, task: LoadedTask) -> Callable[[int], bool]:
    """Which root directory a task has from birth: ours, or that of the parent, who has gone to its own by then."""
    if task.inherited is None:
        return tree.files.is_our_root
    root = tree.tasks[task.inherited.parent].fs.root_id
    return lambda file_id: file_id == root


def lines(plan: RestorePlan, tree: LoadedTree) -> Iterator[str]:
    """The plan for people."""
    yield f"region at {plan.region:#x}, {plan.nr_slots} slots, {plan.hole_bytes} bytes with staged shared memory"
    for shmid, address in plan.staging.items():
        late = tree.late_shared.get(shmid)
        what = f"{late.total_bytes} bytes to come lazily" if late else f"{tree.shared[shmid].total_bytes} bytes to read"
        yield f"shared memory {shmid} staged at {address:#x}, {what}"
    for step in plan.tree.steps:
        match step:
            case pstree.Birth(pid=pid) if pid in tree.tasks and tree.tasks[pid].inherited is not None:
                yield _birth_of_heir(tree.tasks[pid])
            case pstree.Birth(pid=pid, parent=None):
                yield f"task {pid}: forked by this command"
            case pstree.Birth(pid=pid, parent=parent, helper=helper):
                yield f"task {pid}: cloned by task {parent}{' (a helper)' if helper else ''}"
            case pstree.Run(pid=pid, calls=calls):
                yield from (f"task {pid}: {call}" for call in calls)
    for pid, task in plan.tasks.items():
        yield from (f"task {pid}: {call}" for call in [*task.strip, *task.files, *task.mappings])
        pages = tree.tasks[pid].pages
        yield f"task {pid}: read {pages.total_bytes} bytes of {pages.pages_name} in {pages.nr_chunks} pieces"
        if pages.huge:
            yield f"task {pid}: {pages.counts.huge_bytes} of them into huge pages"
        if (lazy := tree.tasks[pid].lazy) is not None and lazy.ranges:
            yield f"task {pid}: leave {lazy.total_bytes} bytes of {len(lazy.ranges)} mappings to come lazily"
        if ancestral := tree.tasks[pid].ancestral:
            what = f"{ancestral.before.total_bytes} old bytes, then put back {ancestral.after.total_bytes}"
            yield f"task {pid}: while children are born, show them {what}"
            yield from (f"task {pid}: {call}" for call in ancestral.plan_drop())
        yield from (f"task {pid}: {call}" for call in [*task.finish, *task.late])
        for tid, last in task.threads.items():
            yield from (f"thread {tid}: {call}" for call in last)
    for run in plan.tree.zombies:
        yield from (f"task {run.pid}: {call}" for call in run.calls)
    yield f"task {tree.root_pid} and its tree: take registers, go on"


def _birth_of_heir(task: LoadedTask) -> str:
    assert task.inherited is not None
    pid, runs, parent = task.pid, task.inherited.runs, task.inherited.parent
    return f"task {pid}: cloned by task {parent} when its memory is in place, keeps {runs.total_bytes} bytes of it"
