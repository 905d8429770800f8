"""The restore: check everything, make the tree, fill every task at the same time, let the tree go.

Stages wait for what they need and for nothing else. The first failure, or a cancellation, ends all: whatever was
created is killed and reaped, and the images are never touched.
"""

from __future__ import annotations

import fcntl
import logging
import os
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import trio

from gpurestore import core, faults
from gpurestore.batch import Call
from gpurestore.errors import CancelledError, CoreError, GpurestoreError, NeedsPersonError
from gpurestore.images.folder import ImageFolder
from gpurestore.pipeline import load, plan
from gpurestore.pipeline.blocking import Blocking, blocking_calls
from gpurestore.pipeline.critical import CriticalStage, critical_stages, describe
from gpurestore.pipeline.load import LoadedTask, LoadedTree
from gpurestore.pipeline.plan import RestorePlan, TaskPlan
from gpurestore.pipeline.trace import WORKER_TRACK, Span, Trace, summarize
from gpurestore.syscalls import NR
from gpurestore.tasks import memory, shmem
from gpurestore.tasks.pstree import Birth, Run
from gpurestore.tasks.restorer import Restorer

if TYPE_CHECKING:
    from gpurestore.pipeline.progress import Progress

log = logging.getLogger("gpurestore.restore")

# clone(2): what makes a thread
_THREAD_FLAGS = 0x100 | 0x200 | 0x400 | 0x800 | 0x10000 | 0x40000
_EEXIST = 17


@dataclass(frozen=True, slots=True)
class RestoreResult:
    """What a restore did. Times in seconds; the tree runs, its root is a child of this process."""

    root_pid: int
    pids: tuple[int, ...]
    memory_bytes: int
    total_s: float
    stages: tuple[tuple[str, float, int], ...]
    critical_path: tuple[CriticalStage, ...]


async def restore(
    images_dir: Path,
    *,
    serial: bool = False,
    jobs: int | None = None,
    shell_job: bool = False,
    verify: bool = True,
    pidfile: Path | None = None,
    detached: bool = False,
    trace: Path | None = None,
    progress: Progress | None = None,
) -> RestoreResult:
    """Bring back the tree in ``images_dir``. With ``serial`` the same stages run one at a time.

    ``detached`` says that the caller will not wait for the root task; it makes no difference to the restore itself.
    Raises a GpurestoreError, and then nothing is left behind; on cancellation the same.
    """
    begin = time.monotonic()
    spans = Trace(progress)
    try:
        async with AsyncExitStack() as stack:
            if progress is not None:
                nursery = await stack.enter_async_context(trio.open_nursery())
                stack.callback(nursery.cancel_scope.cancel)
                nursery.start_soon(progress.run)
            blocking = await stack.enter_async_context(blocking_calls())
            folder = stack.enter_context(ImageFolder(images_dir))
            operation = _Restore(blocking, spans, jobs or memory.default_jobs(), serial)
            tree = await operation.prepare(folder, shell_job, verify)
            await operation.execute(tree, pidfile)
    finally:
        if trace is not None:
            spans.write(trace)
    path = critical_stages(spans.spans)
    log.info("critical path: %s", describe(path))
    return RestoreResult(
        root_pid=tree.root_pid,
        pids=tuple(entry.pid for entry in tree.entries),
        memory_bytes=tree.memory_bytes,
        total_s=time.monotonic() - begin,
        stages=tuple((s.name, s.wall_s, s.nr_bytes) for s in summarize(spans.spans)),
        critical_path=path,
    )


def restore_sync(images_dir: Path, **options: Any) -> RestoreResult:
    """:func:`restore` for callers without a trio loop."""
    return trio.run(partial(restore, images_dir, **options))


def plan_text(images_dir: Path, *, shell_job: bool = False, verify: bool = True) -> str:
    """What :func:`restore` would do, in words. Raises as it would, except for pids that are taken."""
    with ImageFolder(images_dir) as folder:
        if verify:
            folder.verify()
        tree = load.load(folder)
        restorer = Restorer.here()
        load.refuse(tree, load.check(tree, restorer) + load.check_session(tree, shell_job))
        planned = plan.place(tree, memory.default_jobs())
        tree.files.assign(tree.files.keep_from)
        plan.fill(planned, tree, restorer)
        return "\n".join(plan.lines(planned, tree)) + "\n"


class _Restore:
    """One restore under way."""

    def __init__(self, blocking: Blocking, spans: Trace, jobs: int, serial: bool) -> None:
        self._blocking, self._spans, self._serial = blocking, spans, serial
        self._jobs = 1 if serial else jobs
        self._memory_workers = trio.CapacityLimiter(self._jobs)
        # --serial: one stage at a time. It is the same graph with this one more edge.
        self._turn = trio.CapacityLimiter(1 if serial else 1 << 20)

    def _should_stop(self) -> None:
        if self._blocking.cancel.is_set:
            raise CancelledError("cancelled before anything was created")

    # ---- before anything is created

    async def prepare(self, folder: ImageFolder, shell_job: bool, verify: bool) -> LoadedTree:
        """Load, verify and check. Nothing is created."""
        faults.point("restore.start")
        run, spans = self._blocking.run, self._spans
        async with spans.span("load"):
            tree = await run(load.load, folder)
        if verify:
            async with spans.span("verify") as span:
                await run(partial(folder.verify, self._jobs, lambda: self._blocking.cancel.is_set))
                span.set(bytes=sum(folder.files().values()))
        faults.point("restore.loaded")
        async with spans.span("check"):
            self._restorer = await run(Restorer.here)
            findings = await run(load.check, tree, self._restorer)
            findings += load.check_session(tree, shell_job)
            findings += await run(load.await_pids, tree, self._should_stop)
            load.refuse(tree, findings)
        faults.point("restore.checked")
        return tree

    # ---- the tree

    async def execute(self, tree: LoadedTree, pidfile: Path | None) -> None:
        """Make the tree and let it go, or leave nothing."""
        run = self._blocking.run
        reaper = core.set_subreaper(True)
        try:
            async with self._spans.span("plan"):
                planned = await run(plan.place, tree, self._jobs)
            async with self._spans.span("open files"):
                await run(tree.files.open_all, tree.files.keep_from)
            try:
                await self._execute(tree, planned, pidfile)
            except BaseException:
                tree.files.abort()
                raise
            tree.files.close()
        finally:
            core.set_subreaper(reaper)

    async def _execute(self, tree: LoadedTree, planned: RestorePlan, pidfile: Path | None) -> None:
        with _PagesFiles(tree) as pages:
            async with self._spans.span("plan"):
                await self._blocking.run(plan.fill, planned, tree, self._restorer)
            faults.point("restore.planned")
            with (
                core.Region(planned.region, planned.nr_slots) as region,
                shmem.Stage(tree.objects, planned.staging) as stage,
                core.Tracer() as tracer,
            ):
                making = _Making(self, tree, planned, region, tracer, pages)
                try:
                    await making.run(stage, pidfile)
                except BaseException as error:
                    with trio.CancelScope(shield=True):
                        await self._blocking.run(making.undo, error)
                    raise

    @asynccontextmanager
    async def stage(self, name: str, **args: Any) -> AsyncIterator[Any]:
        """A stage of the graph: a span, and under --serial its turn."""
        async with self._turn, self._spans.span(name, **args) as span:
            yield span

    @property
    def spans(self) -> Trace:
        """Where spans go that are no stages of the graph."""
        return self._spans

    @property
    def blocking(self) -> Blocking:
        """Where blocking calls go."""
        return self._blocking

    @property
    def jobs(self) -> int:
        """How many memory workers may work at once."""
        return self._jobs

    @property
    def pid_max(self) -> int:
        """Thread ids are below this."""
        return self._restorer.pid_max

    @property
    def memory_workers(self) -> trio.CapacityLimiter:
        """The budget of memory workers, shared by all tasks."""
        return self._memory_workers


class _PagesFiles:
    """The pages files of all tasks, at descriptor numbers that no task needs, for the tasks to inherit."""

    def __init__(self, tree: LoadedTree) -> None:
        self._tree = tree
        self._fds: dict[int, int] = {}

    def __enter__(self) -> dict[int, int]:
        keep_from = self._tree.files.keep_from
        try:
            for pid, task in self._tree.tasks.items():
                if task.pages.total_bytes:
                    with memory.open_pages(self._tree.folder, task.pages) as pages:
                        self._fds[pid] = fcntl.fcntl(pages.fileno(), fcntl.F_DUPFD_CLOEXEC, keep_from)
        except BaseException:
            self.close()
            raise
        return self._fds

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close them here."""
        for fd in self._fds.values():
            os.close(fd)
        self._fds.clear()


class _Making:
    """The tasks of a restore, from the first fork to their release."""

    def __init__(
        self,
        restore: _Restore,
        tree: LoadedTree,
        planned: RestorePlan,
        region: core.Region,
        tracer: core.Tracer,
        pages: dict[int, int],
    ) -> None:
        self._restore, self._tree, self._plan = restore, tree, planned
        self._region, self._tracer, self._pages = region, tracer, pages
        self._run = restore.blocking.run
        self._cancel = restore.blocking.cancel
        self._born: list[int] = []
        self._released = False

    async def run(self, stage: shmem.Stage, pidfile: Path | None) -> None:
        """Everything, up to the release of the tree."""
        tasks = list(self._plan.tasks.values())
        async with self._restore.stage("fork"):
            await self._run(self._make_tree)
        faults.point("restore.forked")
        # Largest first: the last to end should be a small one.
        by_size = sorted(tasks, key=lambda task: -self._tree.tasks[task.pid].pages.total_bytes)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._fill_shared, stage)
            for task in by_size:
                nursery.start_soon(self._build, task)
        faults.point("restore.filled")
        self._tree.files.seal()
        async with self._restore.stage("zombies"):
            await self._run(self._end_zombies)
        async with trio.open_nursery() as nursery:
            for task in tasks:
                nursery.start_soon(self._finish, task)
        faults.point("restore.finished")
        async with self._restore.stage("park"):
            await self._run(self._park_all)
        faults.point("restore.parked")
        if pidfile is not None:
            await self._run(write_pidfile, pidfile, self._tree.root_pid)
        # From here on nobody may interfere: part of a tree must not be left running.
        with trio.CancelScope(shield=True):
            async with self._restore.stage("release"):
                await self._run(self._release)

    # ---- the tree

    def _call(self, pid: int, calls: list[Call], tid: int | None = None) -> None:
        tid = pid if tid is None else tid
        if calls:
            self._region.run(self._plan.slots[tid], tid, calls, self._cancel)

    def _make_tree(self) -> None:
        for step in self._plan.tree.steps:
            if self._cancel.is_set:
                raise CancelledError("cancelled while the tree was made")
            match step:
                case Birth():
                    self._give_birth(step)
                case Run(pid=pid, calls=calls, exits=exits):
                    self._end(pid, calls) if exits else self._call(pid, list(calls))

    def _give_birth(self, birth: Birth) -> None:
        slot = self._plan.slots[birth.pid]
        if birth.parent is None:
            self._tracer.spawn_root(self._region, birth.pid, slot)
            self._born.append(birth.pid)
            # The fork asked to die with us, until the tracer had it.
            self._call(birth.pid, [Call(NR.PRCTL, (1, 0), "outlive the restorer")])
        else:
            parent = (birth.parent, self._plan.slots[birth.parent])
            self._tracer.clone(self._region, parent, birth.pid, slot, exit_signal=birth.exit_signal)
            self._born.append(birth.pid)
        if task := self._plan.tasks.get(birth.pid):
            self._call(birth.pid, task.strip)

    def _end(self, pid: int, calls: tuple[Call, ...]) -> None:
        """Let a task run its last calls and become a zombie of its parent."""
        self._region.post(self._plan.slots[pid], calls)
        self._tracer.await_exit(pid)
        self._born.remove(pid)

    def _end_zombies(self) -> None:
        # Children first: a parent that ended before would leave them to somebody else.
        for run in reversed(self._plan.tree.zombies):
            self._end(run.pid, run.calls)

    # ---- one task

    async def _build(self, task: TaskPlan) -> None:
        loaded = self._tree.tasks[task.pid]
        async with self._restore.stage("descriptors", task=task.pid):
            await self._run(self._call, task.pid, task.files)
        async with self._restore.stage("mappings", task=task.pid):
            await self._run(self._call, task.pid, task.mappings)
        faults.point("restore.mapped")
        async with self._restore.stage("threads", task=task.pid):
            await self._run(self._make_threads, loaded)
        if loaded.pages.total_bytes:
            await self._fill(loaded)
        faults.point("restore.memory")
        async with self._restore.stage("protections", task=task.pid):
            await self._run(self._call, task.pid, task.finish)

    def _make_threads(self, loaded: LoadedTask) -> None:
        parent = (loaded.pid, self._plan.slots[loaded.pid])
        for tid in loaded.tids[1:]:
            self._tracer.clone(self._region, parent, tid, self._plan.slots[tid], flags=_THREAD_FLAGS)

    async def _fill(self, loaded: LoadedTask) -> None:
        """Bring a task's memory in, by threads of the task itself: its own, and workers where those are too few."""
        pages = loaded.pages
        async with self._restore.stage(
            "memory", task=loaded.pid, total=pages.total_bytes, gauge=lambda: pages.done_bytes
        ) as span:
            workers = await self._run(self._make_workers, loaded)
            servers = [(tid, self._plan.slots[tid]) for tid in loaded.tids] + workers
            nr = max(1, min(self._restore.jobs, pages.nr_chunks, len(servers)))
            async with trio.open_nursery() as nursery:
                for number, (tid, slot) in enumerate(servers[:nr], 1):
                    nursery.start_soon(self._pump, loaded, slot, tid, number, span)
            await self._run(self._end_workers, workers)
            span.set(bytes=pages.total_bytes)

    async def _pump(self, loaded: LoadedTask, slot: int, tid: int, number: int, memory_span: Span) -> None:
        track = f"{memory_span.track}{WORKER_TRACK}{number}"
        async with self._restore.memory_workers, self._restore.spans.span("pump", track=track, part_of=memory_span):
            await self._run(loaded.pages.run, self._region, slot, tid, self._pages[loaded.pid], self._cancel)

    def _make_workers(self, loaded: LoadedTask) -> list[tuple[int, int]]:
        """Extra threads, with ids that nobody will need."""
        parent = (loaded.pid, self._plan.slots[loaded.pid])
        workers = []
        for slot in self._plan.workers[loaded.pid]:
            tid = self._clone_anywhere(parent, slot)
            workers.append((tid, slot))
        return workers

    def _clone_anywhere(self, parent: tuple[int, int], slot: int) -> int:
        # High ids are the least likely to be in use; each slot begins at its own, so that tasks do not compete.
        tid = self._restore.pid_max - 1 - slot
        while tid > 300:
            if tid not in self._plan.slots:
                try:
                    self._tracer.clone(self._region, parent, tid, slot, flags=_THREAD_FLAGS)
                    return tid
                except CoreError as error:
                    if error.errno != _EEXIST:
                        raise
            tid -= self._plan.nr_slots
        raise GpurestoreError(f"task {parent[0]}: no thread id is free for a memory worker; raise kernel.pid_max")

    def _end_workers(self, workers: list[tuple[int, int]]) -> None:
        for tid, slot in workers:
            self._region.post(slot, [Call(NR.EXIT, (0,), "worker ends")])
            self._tracer.await_exit(tid)

    async def _fill_shared(self, stage: shmem.Stage) -> None:
        if not self._tree.shared:
            return
        async with self._restore.stage("shared memory") as span:
            fill = partial(
                stage.fill,
                self._tree.folder,
                self._tree.shared,
                self._plan.staging,
                jobs=self._restore.jobs,
                cancel=self._cancel,
            )
            span.set(bytes=await self._run(fill))

    async def _finish(self, task: TaskPlan) -> None:
        async with self._restore.stage("state", task=task.pid):
            await self._run(self._finish_task, task)

    def _finish_task(self, task: TaskPlan) -> None:
        self._call(task.pid, task.late)
        for tid, calls in task.threads.items():
            self._call(task.pid, calls, tid)

    # ---- the end

    def _park_all(self) -> None:
        for task in self._plan.tasks.values():
            self._tracer.park(task.pid, self._plan.region, self._plan.hole_bytes)
            for state in task.states.values():
                self._tracer.write_thread(state)

    def _release(self) -> None:
        faults.point("restore.release")
        self._released = True
        # Children first, so that a parent that looks at once finds them there.
        for task in reversed(self._plan.tasks.values()):
            self._tracer.resume(task.pid, task.stop_signal)

    def undo(self, error: BaseException) -> None:
        """Kill and reap whatever was created."""
        self._tracer.kill(self._born)
        for pid in self._born:
            # A task whose parent died before it became ours, since we are the subreaper.
            with suppress(ChildProcessError):
                os.waitpid(pid, 0)
        left = [pid for pid in self._born if os.path.exists(f"/proc/{pid}")]
        if left and self._released:
            raise NeedsPersonError(
                f"the restore failed ({error}) when the tree was already let go; these tasks are left: "
                f"{', '.join(map(str, left))}; kill them before you try again"
            ) from error


def write_pidfile(path: Path, pid: int) -> None:
    """Write ``pid`` to ``path``, whole or not at all."""
    partial_path = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        partial_path.write_text(f"{pid}\n")
        partial_path.replace(path)
    except OSError as error:
        partial_path.unlink(missing_ok=True)
        raise GpurestoreError(f"cannot write the pid to {path}: {error.strerror}") from error
