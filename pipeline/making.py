"""The tasks of a restore, from the first fork to their release.

Each task goes its way at its own pace: descriptors, mappings, threads, memory, state, and then it sits stopped at its
last instruction. Device content comes back at the same time (POST_FORKING), and a task gets its devices as soon as both
are there. Only the release waits for everybody.
"""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

import trio

from gpurestore import core, faults
from gpurestore.batch import Call
from gpurestore.errors import CancelledError, GpurestoreError, NeedsPersonError
from gpurestore.pipeline.devices import Devices
from gpurestore.pipeline.filling import THREAD_FLAGS, Filling
from gpurestore.pipeline.load import LoadedTask, LoadedTree
from gpurestore.pipeline.plan import RestorePlan, TaskPlan
from gpurestore.pipeline.stages import Stages
from gpurestore.syscalls import NR
from gpurestore.tasks import shmem
from gpurestore.tasks.pstree import Birth, Run
from gpurestore.tasks.restorer import Restorer


class Making:
    """The tasks of a restore, from the first fork to their release."""

    def __init__(
        self,
        stages: Stages,
        devices: Devices,
        restorer: Restorer,
        tree: LoadedTree,
        planned: RestorePlan,
        region: core.Region,
        tracer: core.Tracer,
        pages: dict[int, int],
    ) -> None:
        self._stages, self._devices = stages, devices
        self._tree, self._plan = tree, planned
        self._region, self._tracer = region, tracer
        self._filling = Filling(stages, restorer.pid_max, tree, planned, region, tracer, pages)
        self._run = stages.blocking.run
        self._cancel = stages.blocking.cancel
        self._born: list[int] = []
        self._shared_filled = trio.Event()

    async def run(self, stage: shmem.Stage, pidfile: Path | None) -> None:
        """Everything, up to the release of the tree."""
        async with self._stages.stage("fork"):
            await self._run(self._make_tree)
        faults.point("restore.forked")
        # Largest first: the last to end should be a small one.
        by_size = sorted(self._plan.tasks.values(), key=lambda task: -self._tree.tasks[task.pid].pages.total_bytes)
        async with trio.open_nursery() as nursery:
            for plugin in self._devices.post_forking_plugins():
                nursery.start_soon(self._devices.post_forking, plugin)
            nursery.start_soon(self._fill_shared, stage)
            for task in by_size:
                nursery.start_soon(self._restore_task, task)
        faults.point("restore.parked")
        self._tree.files.seal()
        self._tree.files.close()
        if pidfile is not None:
            await self._run(write_pidfile, pidfile, self._tree.root_pid)
        # From here on nobody may interfere: part of a tree must not be left running.
        with trio.CancelScope(shield=True):
            async with self._stages.stage("release"):
                await self._run(self._release)

    async def _restore_task(self, task: TaskPlan) -> None:
        """One task, from its empty address space to its last instruction, at its own pace."""
        await self._build(task)
        async with self._stages.stage("state", task=task.pid):
            await self._run(self._finish_task, task)
        faults.point("restore.finished")
        async with self._stages.stage("park", task=task.pid):
            await self._run(self._park, task)
        # Shared memory is the task's memory, too.
        await self._shared_filled.wait()
        faults.point("restore.resume_devices")
        await self._devices.resume_late(task.pid)

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
        # Children first: a parent that ended before would leave them to somebody else.
        for run in reversed(self._plan.tree.zombies):
            self._end(run.pid, run.calls)

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

    # ---- one task

    async def _build(self, task: TaskPlan) -> None:
        loaded = self._tree.tasks[task.pid]
        async with self._stages.stage("descriptors", task=task.pid):
            await self._run(self._call, task.pid, task.files)
        async with self._stages.stage("mappings", task=task.pid):
            await self._run(self._call, task.pid, task.mappings)
        faults.point("restore.mapped")
        async with self._stages.stage("threads", task=task.pid):
            await self._run(self._make_threads, loaded)
        await self._filling.task(loaded)
        faults.point("restore.memory")
        async with self._stages.stage("protections", task=task.pid):
            await self._run(self._call, task.pid, task.finish)

    def _make_threads(self, loaded: LoadedTask) -> None:
        parent = (loaded.pid, self._plan.slots[loaded.pid])
        for tid in loaded.tids[1:]:
            self._tracer.clone(self._region, parent, tid, self._plan.slots[tid], flags=THREAD_FLAGS)

    async def _fill_shared(self, stage: shmem.Stage) -> None:
        await self._filling.shared(stage)
        self._shared_filled.set()

    def _finish_task(self, task: TaskPlan) -> None:
        self._call(task.pid, task.late)
        for tid, calls in task.threads.items():
            self._call(task.pid, calls, tid)

    # ---- the end

    def _park(self, task: TaskPlan) -> None:
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
