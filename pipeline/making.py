"""The tasks of a restore, from the first fork to their release.

What happens when is in the graph (pipeline/graph.py): each task goes its way at its own pace - descriptors, mappings,
threads, memory, state - and then sits stopped at its last instruction. Here is what each stage does.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from itertools import groupby
from pathlib import Path

import trio

from gpurestore import core, faults
from gpurestore.batch import Call
from gpurestore.errors import CancelledError, GpurestoreError, NeedsPersonError
from gpurestore.pipeline.devices import Devices
from gpurestore.pipeline.filling import Filling
from gpurestore.pipeline.graph import FORK, RELEASE, Node
from gpurestore.pipeline.lazy import LazyPages
from gpurestore.pipeline.load import LoadedTree
from gpurestore.pipeline.plan import RestorePlan, TaskPlan
from gpurestore.pipeline.stages import Stages
from gpurestore.pipeline.trace import Span
from gpurestore.pipeline.walk import Work
from gpurestore.tasks import cloning, memory, shmem
from gpurestore.tasks.calls import join
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
        pages: dict[int, memory.PagesSource],
        lazy: LazyPages,
    ) -> None:
        self._stages, self._devices, self._lazy = stages, devices, lazy
        self._tree, self._plan = tree, planned
        self._region, self._tracer = region, tracer
        self._filling = Filling(stages, restorer.pid_max, tree, planned, region, tracer, pages)
        self._run = stages.blocking.run
        self._cancel = stages.blocking.cancel
        self._born: list[int] = []  # or about to be
        self._stripped: set[int] = set()
        self._released = False
        self._of_task: dict[str, Callable[[TaskPlan], None]] = {
            "descriptors": self._give_descriptors,
            "mappings": self._map,
            "threads": self._make_threads,
            "ancestral memory": self._put_ancestral,
            "own memory": self._put_own,
            "protections": self._protect,
            "state": self._finish_task,
            "park": self._park,
        }

    async def run(self, shared: shmem.Stage, pidfile: Path | None) -> None:
        """Everything, up to the release of the tree."""
        self._shared = shared
        walk = self._stages.walk
        nodes = walk.graph.nodes
        await walk.run(nodes[nodes.index(FORK) : nodes.index(RELEASE)], self._act, self)
        faults.point("restore.parked")
        self._tree.files.seal()
        self._tree.files.close()
        if pidfile is not None:
            await self._run(write_pidfile, pidfile, self._tree.root_pid)
        # From here on nobody may interfere: part of a tree must not be left running.
        with trio.CancelScope(shield=True):
            async with walk.stage(RELEASE):
                await self._run(self._release)

    async def _act(self, node: Node, span: Span) -> None:
        """One stage of the graph that does more than to block, when all that it needs is there."""
        match node:
            case Node(plugin=str()):
                await self._devices.act(node)
            case Node(name="memory", pid=int(pid)):
                await self._filling.task(self._tree.tasks[pid], span)
            case Node(name="shared memory"):
                await self._filling.shared(self._shared, span)
            case _:
                raise ValueError(f"nobody knows how to do the stage {node}")

    # ---- pipeline/walk.py: Threads

    def work(self, node: Node) -> Work | None:
        """The stages that do nothing but block."""
        match node:
            case Node(plugin=str()) | Node(name="shared memory"):
                return None
            case Node(name="memory", pid=int(pid)):
                return self._filling.work(self._tree.tasks[pid])
            case Node(name="lazy pages", pid=int(pid)):
                return lambda _: self._lazy.take(pid, self._plan, self._region)
            case Node(name="fork"):
                return lambda _: self._make_tree()
            case Node(name="birth", pid=int(pid)):
                return lambda _: self._walk_tree(self._plan.births.later[pid])
            case Node(name="groups"):
                return lambda _: self._walk_tree(self._plan.births.last)
            case Node(name=name, pid=int(pid)) if stage := self._of_task.get(name):
                return lambda _: stage(self._plan.tasks[pid])
        return None

    def place(self, chain: Sequence[Node]) -> trio.CapacityLimiter:
        """Memory has its budget; it is held for the chain, whose other stages are short."""
        has_memory = any(node.name == "memory" for node in chain)
        return self._stages.memory_workers if has_memory else self._stages.short_chains

    async def run_in_thread(self, call: Callable[..., None], *args: object) -> None:
        """One chain."""
        await self._run(call, *args)

    def check(self) -> None:
        """Raise when the restore was cancelled."""
        if self._cancel.is_set:
            raise CancelledError("cancelled while the tree was made")

    # ---- the tree

    def _call(self, pid: int, calls: list[Call], tid: int | None = None) -> None:
        tid = pid if tid is None else tid
        if calls:
            self._region.execute(self._plan.slots[tid], tid, calls, self._cancel)

    def _make_tree(self) -> None:
        self._walk_tree(self._plan.births.first)
        faults.point("restore.forked")

    def _walk_tree(self, steps: Iterable[Birth | Run]) -> None:
        """Births of one parent that follow each other are one batch."""
        for parent, group in groupby(steps, lambda step: step.parent if isinstance(step, Birth) else None):
            self.check()
            if parent is not None:
                self._give_births(parent, [step for step in group if isinstance(step, Birth)])
                continue
            for step in group:
                match step:
                    case Birth(pid=pid):
                        self._fork_root(pid)
                    case Run(pid=pid, calls=calls, exits=exits):
                        self._end(pid, calls) if exits else self._call(pid, list(calls))

    def _fork_root(self, pid: int) -> None:
        self._tracer.spawn_root(self._region, pid, self._plan.slots[pid])
        self._born.append(pid)

    def _give_births(self, parent: int, births: list[Birth]) -> None:
        """What the parent need not have any more its children need not have copies of."""
        self._strip(parent)
        pids = [birth.pid for birth in births]
        self._born += pids
        self._call(parent, [cloning.birth(b.pid, parent, self._slot_of(b.pid), b.exit_signal) for b in births])
        self._tracer.adopt(pids)

    def _slot_of(self, tid: int) -> int:
        """The address of the slot that a thread serves."""
        return self._region.slot_address(self._plan.slots[tid])

    def _strip(self, pid: int) -> None:
        """What a task does before anything else. From then on it dies with the tracer, not with its parent."""
        if task := self._plan.tasks.get(pid):
            self._call(pid, self._first_calls(task))

    def _first_calls(self, task: TaskPlan) -> list[Call]:
        """Its strip, once."""
        if task.pid in self._stripped:
            return []
        self._stripped.add(task.pid)
        return task.strip

    def _end(self, pid: int, calls: tuple[Call, ...]) -> None:
        """Let a task run its last calls and become a zombie of its parent."""
        self._region.post(self._plan.slots[pid], calls)
        self._tracer.await_exit(pid)
        self._born.remove(pid)

    # ---- one task

    def _give_descriptors(self, task: TaskPlan) -> None:
        self._call(task.pid, join([self._first_calls(task), task.files]))

    def _map(self, task: TaskPlan) -> None:
        self._call(task.pid, task.mappings)
        faults.point("restore.mapped")

    def _make_threads(self, task: TaskPlan) -> None:
        if tids := self._tree.tasks[task.pid].tids[1:]:
            self._call(task.pid, [cloning.thread(tid, self._slot_of(tid)) for tid in tids])
            self._tracer.adopt(tids, of=task.pid)

    def _put_ancestral(self, task: TaskPlan) -> None:
        """Show the children what the task has not any more."""
        if ancestral := self._tree.tasks[task.pid].ancestral:
            ancestral.before.run(task.pid, self._cancel)

    def _put_own(self, task: TaskPlan) -> None:
        """Now that they have it, bring back what the task has itself."""
        if ancestral := self._tree.tasks[task.pid].ancestral:
            self._call(task.pid, ancestral.plan_drop())
            ancestral.after.run(task.pid, self._cancel)

    def _protect(self, task: TaskPlan) -> None:
        faults.point("restore.memory")
        self._call(task.pid, task.finish)

    def _finish_task(self, task: TaskPlan) -> None:
        *others, leader = task.threads
        if others:
            self._call(task.pid, task.late)
            for tid in others:
                self._call(task.pid, task.threads[tid], tid)
            self._call(task.pid, task.threads[leader])
        else:
            self._call(task.pid, join([task.late, task.threads[leader]]))
        faults.point("restore.finished")

    # ---- the end

    def _park(self, task: TaskPlan) -> None:
        self._tracer.park(task.pid, self._plan.region, self._plan.hole_bytes)
        for state in task.states.values():
            self._tracer.write_thread(state)
        faults.point("restore.resume_devices")

    def _release(self) -> None:
        faults.point("restore.release")
        self._released = True
        # Children first, so that a parent that looks at once finds them there.
        for task in reversed(self._plan.tasks.values()):
            self._tracer.resume(task.pid, task.stop_signal)
        self._lazy.release()

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
