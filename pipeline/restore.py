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
from gpurestore.errors import CancelledError
from gpurestore.images.folder import ImageFolder
from gpurestore.pipeline import graph, load, plan
from gpurestore.pipeline.critical import CriticalStage, critical_stages, describe
from gpurestore.pipeline.devices import Devices, PluginSettings
from gpurestore.pipeline.filling import PagesFiles
from gpurestore.pipeline.load import LoadedTree
from gpurestore.pipeline.making import Making
from gpurestore.pipeline.operation import operation
from gpurestore.pipeline.plan import RestorePlan
from gpurestore.pipeline.stages import Stages
from gpurestore.pipeline.trace import summarize
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
    """
    begin = time.monotonic()
    ways = Ways(HugePages(hugepages), Reading(reading))
    async with operation(progress, trace) as (blocking, spans):
        with ImageFolder(images_dir) as folder:
            nr_jobs = jobs or memory.default_jobs()
            devices = Devices.for_restore(plugins or PluginSettings(), spans, blocking, folder, jobs=nr_jobs)
            walk = Walk(spans, graph.head([], verify=verify), serial=serial)
            if progress is not None:
                progress.waiting = walk.waiting
            restoring = _Restore(Stages(blocking, spans, nr_jobs, walk, serial=serial), devices)
            async with devices.session(await blocking.run(load.plugins_of, folder), walk.stage(graph.PLUGINS)):
                tree = await restoring.prepare(folder, shell_job, verify, verify_all, ways)
                await restoring.execute(tree, pidfile)
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


class _Restore:
    """One restore under way."""

    def __init__(self, stages: Stages, devices: Devices) -> None:
        self._stages, self._devices = stages, devices
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
                check = partial(folder.verify, self._stages.jobs, self._is_cancelled, everything=verify_all)
                span.set(bytes=await self._run(check))
        async with self._walk.stage(graph.LOAD):
            tree = await self._run(load.load, folder, self._devices, ways)
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

    async def execute(self, tree: LoadedTree, pidfile: Path | None) -> None:
        """Make the tree and let it go, or leave nothing."""
        reaper = core.set_subreaper(True)
        try:
            async with self._walk.stage(graph.PLACE):
                planned = await self._run(plan.place, tree, self._stages.jobs)
            async with self._walk.stage(graph.OPEN_FILES):
                await self._run(tree.files.open_all, tree.files.keep_from)
            try:
                await self._make(tree, planned, pidfile)
            except BaseException:
                tree.files.abort()
                raise
        finally:
            core.set_subreaper(reaper)

    async def _make(self, tree: LoadedTree, planned: RestorePlan, pidfile: Path | None) -> None:
        with PagesFiles(tree) as pages:
            async with self._walk.stage(graph.PLAN):
                await self._run(plan.fill, planned, tree, self._restorer)
            faults.point("restore.planned")
            with (
                core.Region(planned.region, planned.nr_slots) as region,
                shmem.Stage(tree.objects, planned.staging) as stage,
                core.Tracer() as tracer,
            ):
                self._devices.use_tracer(tracer)
                making = Making(self._stages, self._devices, self._restorer, tree, planned, region, tracer, pages)
                try:
                    await making.run(stage, pidfile)
                except BaseException as error:
                    with trio.CancelScope(shield=True):
                        await self._run(making.undo, error)
                    raise
