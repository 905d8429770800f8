"""How memory comes in: private memory by threads of each task, shared memory by threads of this process."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial

import trio

from gpurestore import core
from gpurestore.pipeline.crews import Crews
from gpurestore.pipeline.load import LoadedTask, LoadedTree
from gpurestore.pipeline.plan import RestorePlan
from gpurestore.pipeline.stages import Stages
from gpurestore.pipeline.trace import WORKER_TRACK, Span
from gpurestore.tasks import memory, shmem
from gpurestore.tasks.memory import PagesSource, Worker


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
        self._stages, self._tree, self._plan = stages, tree, planned
        self._region, self._pages = region, pages
        self._run = stages.blocking.run
        self._cancel = stages.blocking.cancel
        self._crews = Crews(planned, pid_max, region, tracer, self._cancel, pages)
        if any(source.direct_fd >= 0 for source in pages.values()) and stages.jobs > 1:
            # Most of them only wait for the disk.
            stages.memory_workers.total_tokens = max(stages.jobs, memory.COLD_WORKERS)

    async def task(self, loaded: LoadedTask, span: Span) -> None:
        """Bring a task's memory in, by threads of the task itself: its own, and workers where those are too few."""
        pages = loaded.pages
        span.watch(pages.total_bytes, lambda: pages.done_bytes)
        if pages.compressed is not None:
            if pages.huge:
                await self._populate_all(loaded, span)
            await self._decompress_all(loaded.pid, pages.compressed, span)
            span.set(bytes=pages.total_bytes, huge_bytes=pages.counts.moved_bytes)
            return
        crew = await self._run(self._crews.assemble, loaded)
        async with trio.open_nursery() as nursery:
            for number, worker in enumerate(crew.workers, 1):
                nursery.start_soon(self._pump, loaded, worker, number, span)
        await self._run(self._crews.dismiss, loaded, crew)
        _tell(span, pages)

    def work(self, loaded: LoadedTask) -> Callable[[Span], None] | None:
        """The same for a task that one thread fills; None where there are more."""
        if loaded.pages.compressed is not None or self._plan.nr_fillers[loaded.pid] != 1:
            return None
        return partial(self._fill_alone, loaded)

    def _fill_alone(self, loaded: LoadedTask, span: Span) -> None:
        """Whoever calls has a place in the budget."""
        pages = loaded.pages
        span.watch(pages.total_bytes, lambda: pages.done_bytes)
        crew = self._crews.assemble(loaded)
        with self._stages.spans.span("pump", track=_worker_track(span, 1), part_of=span):
            self._fill(loaded, crew.workers[0])
        self._crews.dismiss(loaded, crew)
        _tell(span, pages)

    async def _pump(self, loaded: LoadedTask, worker: Worker, number: int, memory_span: Span) -> None:
        async with self._working("pump", number, memory_span):
            await self._run(self._fill, loaded, worker)

    def _fill(self, loaded: LoadedTask, worker: Worker) -> None:
        loaded.pages.run(self._region, worker, self._pages[loaded.pid], self._cancel)

    @asynccontextmanager
    async def _working(self, what: str, number: int, memory_span: Span) -> AsyncIterator[None]:
        """A place in the budget, and a span for what is done there."""
        track = _worker_track(memory_span, number)
        async with self._stages.memory_workers, self._stages.spans.span(what, track=track, part_of=memory_span):
            yield

    async def _populate_all(self, loaded: LoadedTask, span: Span) -> None:
        """Put huge pages where compressed pages are to be written: only a task's own threads can do that."""
        crew = await self._run(self._crews.assemble, loaded)
        if crew.has_staging:
            async with trio.open_nursery() as nursery:
                for number, worker in enumerate(crew.workers, 1):
                    nursery.start_soon(self._populate, loaded, worker, number, span)
        await self._run(self._crews.dismiss, loaded, crew)

    async def _populate(self, loaded: LoadedTask, worker: Worker, number: int, memory_span: Span) -> None:
        async with self._working("populate", number, memory_span):
            await self._run(loaded.pages.populate, self._region, worker, self._cancel)

    async def _decompress_all(self, pid: int, chunks: memory.CompressedPages, span: Span) -> None:
        """The same for compressed pages, by threads of this process."""
        async with trio.open_nursery() as nursery:
            for number in range(1, chunks.nr_workers(self._stages.jobs) + 1):
                nursery.start_soon(self._decompress, pid, chunks, number, span)

    async def _decompress(self, pid: int, chunks: memory.CompressedPages, number: int, memory_span: Span) -> None:
        async with self._working("decompress", number, memory_span):
            await self._run(chunks.run, pid, 0, self._pages[pid].fd, self._cancel)

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
        span.set(
            placed_bytes=sum(plan.placed_bytes for plan in plans),
            direct_bytes=sum(plan.counts.direct_bytes for plan in plans),
        )


def _worker_track(memory_span: Span, number: int) -> str:
    return f"{memory_span.track}{WORKER_TRACK}{number}"


def _tell(span: Span, pages: memory.PagePlan) -> None:
    """What became of the memory of a task."""
    counts = pages.counts
    span.set(
        bytes=pages.total_bytes,
        huge_bytes=counts.moved_bytes,
        placed_bytes=counts.placed_bytes,
        direct_bytes=counts.direct_bytes,
    )
