"""How memory comes in: private memory by threads of each task, shared memory by threads of this process."""

from __future__ import annotations

import logging
from functools import partial

import trio

from gpurestore import core
from gpurestore.batch import Call, CallResult
from gpurestore.errors import CallFailedError, CoreError, GpurestoreError
from gpurestore.pipeline.load import LoadedTask, LoadedTree
from gpurestore.pipeline.plan import RestorePlan
from gpurestore.pipeline.stages import Stages
from gpurestore.pipeline.trace import WORKER_TRACK, Span
from gpurestore.syscalls import NR
from gpurestore.tasks import memory, shmem
from gpurestore.tasks.memory import PagesSource, Worker, hugepages

log = logging.getLogger("gpurestore.restore")

# clone(2): what makes a thread
THREAD_FLAGS = 0x100 | 0x200 | 0x400 | 0x800 | 0x10000 | 0x40000
_EEXIST = 17


class PagesFiles:
    """The pages files of all tasks, at descriptor numbers that no task needs, for the tasks to inherit."""

    def __init__(self, tree: LoadedTree) -> None:
        self._tree = tree
        self._sources: dict[int, PagesSource] = {}

    def __enter__(self) -> dict[int, PagesSource]:
        try:
            for pid, task in self._tree.tasks.items():
                if task.pages.total_bytes:
                    source = memory.open_pages(self._tree.folder, task.pages, self._tree.ways.reading)
                    self._sources[pid] = source
                    source.move_above(self._tree.files.keep_from)
        except BaseException:
            self.close()
            raise
        return self._sources

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close them here."""
        for source in self._sources.values():
            source.close()
        self._sources.clear()


class Filling:
    """The memory of a restore. A budget of workers is shared by all tasks."""

    def __init__(
        self,
        stages: Stages,
        pid_max: int,
        tree: LoadedTree,
        planned: RestorePlan,
        region: core.Region,
        tracer: core.Tracer,
        pages: dict[int, PagesSource],
    ) -> None:
        self._stages, self._pid_max, self._tree, self._plan = stages, pid_max, tree, planned
        self._region, self._tracer, self._pages = region, tracer, pages
        self._run = stages.blocking.run
        self._cancel = stages.blocking.cancel
        if any(source.direct_fd >= 0 for source in pages.values()) and stages.jobs > 1:
            # Most of them only wait for the disk.
            stages.memory_workers.total_tokens = max(stages.jobs, memory.COLD_WORKERS)

    async def task(self, loaded: LoadedTask, span: Span) -> None:
        """Bring a task's memory in, by threads of the task itself: its own, and workers where those are too few."""
        pages = loaded.pages
        span.watch(pages.total_bytes, lambda: pages.done_bytes)
        if pages.compressed is not None:
            await self._decompress_all(loaded.pid, pages.compressed, span)
            span.set(bytes=pages.total_bytes)
            return
        workers = await self._run(self._make_workers, loaded)
        fillers = await self._run(self._make_fillers, loaded, workers)
        async with trio.open_nursery() as nursery:
            for number, filler in enumerate(fillers, 1):
                nursery.start_soon(self._pump, loaded, filler, number, span)
        await self._run(self._end_fillers, loaded, fillers)
        await self._run(self._end_workers, workers)
        counts = pages.counts
        span.set(bytes=pages.total_bytes, huge_bytes=counts.moved_bytes, direct_bytes=counts.direct_bytes)

    async def _pump(self, loaded: LoadedTask, filler: Worker, number: int, memory_span: Span) -> None:
        track = f"{memory_span.track}{WORKER_TRACK}{number}"
        async with self._stages.memory_workers, self._stages.spans.span("pump", track=track, part_of=memory_span):
            await self._run(loaded.pages.run, self._region, filler, self._pages[loaded.pid], self._cancel)

    # ---- the threads of a task that fill it

    def _make_fillers(self, loaded: LoadedTask, workers: list[tuple[int, int]]) -> list[Worker]:
        """The threads that take part, with what they need for huge pages if the kernel has that."""
        nr = self._plan.nr_fillers[loaded.pid]
        servers = [*((tid, self._plan.slots[tid]) for tid in loaded.tids), *workers][:nr]
        uffd = self._open_uffd(loaded, nr) if loaded.pages.huge else -1
        first = self._plan.huge_staging
        return [
            Worker(tid, slot, uffd, first + number * hugepages.STAGING_BYTES)
            for number, (tid, slot) in enumerate(servers)
        ]

    def _open_uffd(self, loaded: LoadedTask, nr_fillers: int) -> int:
        """The task's userfaultfd for moving pages; -1, and nothing changed, where that is not to be had."""
        try:
            uffd = self._call(loaded, hugepages.plan_open())[0].result
        except CallFailedError as error:
            log.info("no huge pages: %s", error)
            return -1
        try:
            self._call(loaded, hugepages.plan_begin(uffd, loaded.pages.huge, self._plan.huge_staging, nr_fillers))
        except CallFailedError as error:
            log.info("no huge pages: %s", error)
            self._call(loaded, hugepages.plan_end(uffd, self._plan.huge_staging, nr_fillers))
            return -1
        return uffd

    def _end_fillers(self, loaded: LoadedTask, fillers: list[Worker]) -> None:
        if fillers[0].uffd >= 0:
            self._call(loaded, hugepages.plan_end(fillers[0].uffd, self._plan.huge_staging, len(fillers)))

    def _call(self, loaded: LoadedTask, calls: list[Call]) -> list[CallResult]:
        return self._region.run(self._plan.slots[loaded.pid], loaded.pid, calls, self._cancel)

    async def _decompress_all(self, pid: int, chunks: memory.CompressedPages, span: Span) -> None:
        """The same for compressed pages, by threads of this process."""
        async with trio.open_nursery() as nursery:
            for number in range(1, chunks.nr_workers(self._stages.jobs) + 1):
                nursery.start_soon(self._decompress, pid, chunks, number, span)

    async def _decompress(self, pid: int, chunks: memory.CompressedPages, number: int, memory_span: Span) -> None:
        track = f"{memory_span.track}{WORKER_TRACK}{number}"
        async with self._stages.memory_workers, self._stages.spans.span("decompress", track=track, part_of=memory_span):
            await self._run(chunks.run, pid, 0, self._pages[pid].fd, self._cancel)

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
        tid = self._pid_max - 1 - slot
        while tid > 300:
            if tid not in self._plan.slots:
                try:
                    self._tracer.clone(self._region, parent, tid, slot, flags=THREAD_FLAGS)
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

    async def shared(self, stage: shmem.Stage, span: Span) -> None:
        """Bring the content of all shared anonymous objects in, in this process."""
        plans = self._tree.shared.values()
        span.watch(sum(plan.total_bytes for plan in plans), lambda: sum(plan.done_bytes for plan in plans))
        fill = partial(
            stage.fill,
            self._tree.folder,
            self._tree.shared,
            self._plan.staging,
            reading=self._tree.ways.reading,
            jobs=self._stages.jobs,
            cancel=self._cancel,
        )
        span.set(bytes=await self._run(fill))
