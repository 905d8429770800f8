"""The restore: check everything, make the tree, fill every task at the same time, let the tree go.

Stages wait for what they need and for nothing else. The first failure, or a cancellation, ends all: whatever was
created is killed and reaped, and the images are never touched.
"""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import trio

from gpurestore import core, faults
from gpurestore.devplugins.api import Stage
from gpurestore.errors import CancelledError
from gpurestore.images.folder import ImageFolder
from gpurestore.images.magic import is_pages_file
from gpurestore.pipeline import graph, load, plan
from gpurestore.pipeline.critical import CriticalStage, critical_stages, describe
from gpurestore.pipeline.devices import Devices, PluginSettings
from gpurestore.pipeline.filling import PagesFiles
from gpurestore.pipeline.lazy import LazyFill, LazyPages, LazySettings
from gpurestore.pipeline.load import LoadedTree
from gpurestore.pipeline.making import Making
from gpurestore.pipeline.operation import operation
from gpurestore.pipeline.plan import RestorePlan
from gpurestore.pipeline.stages import Stages
from gpurestore.pipeline.trace import Trace, summarize
from gpurestore.pipeline.walk import Walk
from gpurestore.tasks import memory, shmem
from gpurestore.tasks.memory import HugePages, Reading, Ways
from gpurestore.tasks.restorer import Restorer

if TYPE_CHECKING:
    from gpurestore.pipeline.progress import Progress

log = logging.getLogger("gpurestore.restore")


@dataclass(frozen=True, slots=True)
class RestoreResult:
    """What a restore did. Times in seconds; the tree runs, its root is a child of this process."""

    root_pid: int
    pids: tuple[int, ...]
    memory_bytes: int
    total_s: float
    stages: tuple[tuple[str, float, int], ...]
    critical_path: tuple[CriticalStage, ...]
    lazy: LazyFill | None = None  # with ``lazy``: the memory that is still to come


async def restore(
    images_dir: Path,
    *,
    serial: bool = False,
    jobs: int | None = None,
    shell_job: bool = False,
    verify: bool = True,
    verify_all: bool = False,
    pidfile: Path | None = None,
    detached: bool = False,
    hugepages: str = HugePages.AUTO,
    reading: str = Reading.AUTO,
    lazy: bool = False,
    fault_order: Path | None = None,
    record_faults: Path | None = None,
    plugins: PluginSettings | None = None,
    trace: Path | None = None,
    progress: Progress | None = None,
) -> RestoreResult:
    """Bring back the tree in ``images_dir``. With ``serial`` the same stages run one at a time.

    ``verify`` checks the images before anything is made; large ones that were left alone since the dump are not read
    for that unless ``verify_all`` says so (docs/images.md). ``hugepages`` is auto, keep or never, ``reading`` is auto,
    cached or direct (docs/architecture.md). ``detached`` says that the caller will not wait for the root task; it makes
    no difference to the restore itself.
    Raises a GpurestoreError, and then nothing is left behind; on cancellation the same.

    With ``lazy`` the tree runs at once, and a process of its own brings its private memory in: when it is touched, and
    the rest in the background. The result's ``lazy`` can be waited for; nobody has to. Pages are not verified before.
    ``record_faults`` is written with the pages that the tree wanted first, ``fault_order`` is such a file of an earlier
    restore. With ``trace`` the return waits for the fill, so that the trace shows its end.
    """
    begin = time.monotonic()
    ways = Ways(HugePages(hugepages), Reading(reading))
    settings = LazySettings(fault_order, record_faults, detached) if lazy else None
    async with operation(progress, trace) as (blocking, spans):
        with ImageFolder(images_dir) as folder:
            nr_jobs = jobs or memory.default_jobs()
            devices = Devices(Stage.RESTORE, plugins or PluginSettings(), spans, blocking, folder, jobs=nr_jobs)
            walk = Walk(spans, graph.head([], verify=verify), serial=serial)
            if progress is not None:
                progress.waiting = walk.waiting
            restoring = _Restore(Stages(blocking, spans, nr_jobs, walk, serial=serial), devices, settings)
            async with devices.session(await blocking.run(load.plugins_of, folder), walk.stage(graph.PLUGINS)):
                tree = await restoring.prepare(folder, shell_job, verify, verify_all, ways)
                fill = await restoring.execute(tree, pidfile)
        path = critical_stages(spans.spans)
        log.info("critical path: %s", describe(path))
        result = _result(tree, spans, path, time.monotonic() - begin, fill)
        if trace is not None and fill is not None:
            async with walk.stage(graph.FILL) as span:
                span.watch(tree.lazy_bytes, lambda: fill.status.done_bytes)
                span.set(bytes=(await fill.wait()).total_bytes)
        return result


def _result(
    tree: LoadedTree, spans: Trace, path: tuple[CriticalStage, ...], total_s: float, fill: LazyFill | None
) -> RestoreResult:
    return RestoreResult(
        root_pid=tree.root_pid,
        pids=tuple(entry.pid for entry in tree.entries),
        memory_bytes=tree.memory_bytes,
        total_s=total_s,
        stages=tuple((s.name, s.wall_s, s.nr_bytes) for s in summarize(spans.spans)),
        critical_path=path,
        lazy=fill,
    )


def restore_sync(images_dir: Path, **options: Any) -> RestoreResult:
    """:func:`restore` for callers without a trio loop."""
    return trio.run(partial(restore, images_dir, **options))


class _Restore:
    """One restore under way."""

    def __init__(self, stages: Stages, devices: Devices, lazy: LazySettings | None) -> None:
        self._stages, self._devices, self._lazy = stages, devices, lazy
        self._run = stages.blocking.run
        self._walk = stages.walk

    async def prepare(
        self, folder: ImageFolder, shell_job: bool, verify: bool, verify_all: bool, ways: Ways
    ) -> LoadedTree:
        """Load, verify and check. Nothing is created."""
        faults.point("restore.start")
        self._walk.extend(graph.head(self._devices.facts, verify=verify))
        if verify:
            # Before anything is read: damage is told by the name of the file, not by what it made of the others.
            async with self._walk.stage(graph.VERIFY) as span:
                # Reading all pages would take as long as a restore that is not lazy.
                leave_out = is_pages_file if self._lazy is not None and not verify_all else None
                check = partial(
                    folder.verify, self._stages.jobs, self._is_cancelled, everything=verify_all, leave_out=leave_out
                )
                span.set(bytes=await self._run(check))
        async with self._walk.stage(graph.LOAD):
            order = await self._run(self._lazy.read_order) if self._lazy is not None else None
            tree = await self._run(load.load, folder, self._devices, ways, order, self._stages.blocking.cancel)
        faults.point("restore.loaded")
        async with self._walk.stage(graph.CHECK):
            self._restorer = await self._run(Restorer.here)
            findings = await self._run(load.check, tree, self._restorer)
            findings += load.check_session(tree, shell_job)
            findings += await self._run(load.await_pids, tree, self._should_stop)
            load.refuse(tree, findings)
        await self._devices.restore_init(self._walk)
        self._walk.extend(graph.restore(graph.facts_of(tree), self._devices.facts, verify=verify))
        faults.point("restore.checked")
        return tree

    def _is_cancelled(self) -> bool:
        return self._stages.blocking.cancel.is_set

    def _should_stop(self) -> None:
        if self._is_cancelled():
            raise CancelledError("cancelled before anything was created")

    async def execute(self, tree: LoadedTree, pidfile: Path | None) -> LazyFill | None:
        """Make the tree and let it go, or leave nothing."""
        reaper = core.set_subreaper(True)
        try:
            async with self._walk.stage(graph.PLACE):
                planned = await self._run(plan.place, tree, self._stages.jobs)
            async with self._walk.stage(graph.OPEN_FILES):
                await self._run(tree.files.open_all, tree.files.keep_from)
            try:
                return await self._make(tree, planned, pidfile)
            except BaseException:
                tree.files.abort()
                raise
        finally:
            core.set_subreaper(reaper)

    async def _make(self, tree: LoadedTree, planned: RestorePlan, pidfile: Path | None) -> LazyFill | None:
        settings = self._lazy or LazySettings()
        # What comes late the handler inherits from this process; of the rest it must not hold on to anything.
        late = {shmid: planned.staging[shmid] for shmid in tree.late_shared}
        others = {shmid: address for shmid, address in planned.staging.items() if shmid not in late}
        with (
            PagesFiles(tree) as pages,
            shmem.Stage(tree.objects, late),
            LazyPages(self._stages, tree, settings) as lazy,
        ):
            async with self._walk.stage(graph.PLAN):
                await self._run(plan.fill, planned, tree, self._restorer)
            faults.point("restore.planned")
            # Before there is a region and all that is staged behind it.
            if graph.LAZY_HANDLER in self._walk.graph.after:
                async with self._walk.stage(graph.LAZY_HANDLER):
                    await self._run(lazy.start, planned.staging)
            with (
                core.Region(planned.region, planned.nr_slots) as region,
                shmem.Stage(tree.objects, others) as stage,
                core.Tracer() as tracer,
            ):
                self._devices.use_tracer(tracer)
                making = Making(self._stages, self._devices, self._restorer, tree, planned, region, tracer, pages, lazy)
                try:
                    await making.run(stage, pidfile)
                except BaseException as error:
                    with trio.CancelScope(shield=True):
                        await self._run(making.undo, error)
                    raise
            return lazy.fill
