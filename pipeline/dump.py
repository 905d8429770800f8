"""The dump: freeze the tree, collect what it is made of, write it, and end the tree or let it go on.

Nothing is written before everything was collected and found to be restorable, and until the images are in place the
tree can go on as if nothing had happened: whatever fails, it does.
"""

from __future__ import annotations

import enum
import logging
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

import trio

from gpurestore import core, faults
from gpurestore.devplugins.api import Stage
from gpurestore.devplugins.host import result_of
from gpurestore.errors import (
    CancelledError,
    Finding,
    GpurestoreError,
    NeedsPersonError,
    NoSuchTaskError,
    UnsupportedResourceError,
    UsageError,
)
from gpurestore.images import pb
from gpurestore.images.compression import Compression, Crew
from gpurestore.images.inventory import build_inventory
from gpurestore.images.manifest import PluginRecord
from gpurestore.images.writer import ImageWriter
from gpurestore.pipeline.blocking import Blocking
from gpurestore.pipeline.collect import Collected, collect, write_state
from gpurestore.pipeline.critical import CriticalStage, critical_stages, describe
from gpurestore.pipeline.devices import Devices, PluginSettings
from gpurestore.pipeline.operation import operation
from gpurestore.pipeline.trace import WORKER_TRACK, Trace, summarize
from gpurestore.tasks import ids, inherited, memory, procfs, shmem, usage
from gpurestore.tasks.descriptors import FileTable
from gpurestore.tasks.frozen import FrozenTree, tree_of

if TYPE_CHECKING:
    from gpurestore.pipeline.progress import Progress

log = logging.getLogger("gpurestore.dump")


@dataclass(frozen=True, slots=True)
class DumpResult:
    """What a dump did. Times in seconds; ``memory_bytes`` are the pages stored, ``image_bytes`` all files together."""

    root_pid: int
    pids: tuple[int, ...]
    images_dir: str
    memory_bytes: int
    image_bytes: int
    frozen_s: float
    total_s: float
    stages: tuple[tuple[str, float, int], ...]
    critical_path: tuple[CriticalStage, ...]


async def dump(
    pid: int,
    images_dir: Path,
    *,
    leave_running: bool = False,
    leave_stopped: bool = False,
    shell_job: bool = False,
    observe_s: float = 0.0,
    criu_compatible: bool = False,
    jobs: int | None = None,
    compress: str | None = None,
    direct_io: bool = False,
    sync: bool = True,
    plugins: PluginSettings | None = None,
    trace: Path | None = None,
    progress: Progress | None = None,
) -> DumpResult:
    """Dump the tree of ``pid`` into ``images_dir`` (new or empty), then kill it unless told otherwise.

    ``compress`` is ``lz4`` or ``zstd[:LEVEL]``.
    For ``observe_s`` seconds the running tree is watched, so that a lazy restore brings first what it uses.
    With ``criu_compatible`` memory that tasks share since a fork is stored for each of them, as CRIU needs it.
    ``direct_io`` writes memory past the page cache; without ``sync`` the images are not waited for to reach the disk.
    Raises a GpurestoreError, and then the tree goes on and the folder is as it was; on cancellation the same.
    """
    _check_request(pid)
    if direct_io and compress is not None:
        raise UsageError("--direct-io writes memory as it is: it does not go together with --compress")
    after = _After.RUN if leave_running else _After.STOP if leave_stopped else _After.KILL
    nr_jobs = jobs or memory.default_jobs()
    crew = Crew(Compression.parse(compress), nr_jobs) if compress is not None else None
    async with operation(progress, trace) as (blocking, spans):
        storage = _Storage(criu_compatible, crew, direct_io, sync)
        dumping = _Dump(pid, spans, nr_jobs, shell_job, observe_s, after, storage)
        return await dumping.run(blocking, images_dir, plugins or PluginSettings())


def dump_sync(pid: int, images_dir: Path, **options: Any) -> DumpResult:
    """:func:`dump` for callers without a trio loop."""
    return trio.run(partial(dump, pid, images_dir, **options))


def _check_request(pid: int) -> None:
    try:
        stat = procfs.stat(pid)
    except GpurestoreError as error:
        raise NoSuchTaskError(f"pid {pid}: there is no such process; see ps -e for those there are") from error
    if stat.flags & procfs.PF_KTHREAD:
        raise NoSuchTaskError(f"pid {pid} ({stat.comm.decode(errors='replace')}) is a kernel thread: it has no memory")
    if stat.state in "ZX":
        raise NoSuchTaskError(f"pid {pid} is a zombie: there is nothing left to dump")
    if procfs.status(pid).tgid != pid:
        raise NoSuchTaskError(f"pid {pid} is a thread of process {procfs.status(pid).tgid}: dump that process")
    own = os.getpid()
    while own > 0:
        if own == pid:
            raise UsageError(f"pid {pid} is this command or one that it runs under: a tree cannot dump itself")
        own = procfs.stat(own).ppid


class _After(enum.Enum):
    """What becomes of the tree."""

    KILL = enum.auto()
    RUN = enum.auto()
    STOP = enum.auto()


@dataclass(frozen=True, slots=True)
class _Storage:
    """In which form images are written, and how they reach the disk."""

    criu_compatible: bool
    crew: Crew | None
    direct_io: bool
    sync: bool


class _Dump:
    """One dump under way."""

    def __init__(
        self,
        pid: int,
        spans: Trace,
        jobs: int,
        shell_job: bool,
        observe_s: float,
        after: _After,
        storage: _Storage,
    ) -> None:
        self._pid, self._spans, self._jobs, self._shell_job, self._after = pid, spans, jobs, shell_job, after
        self._observe_s, self._storage = observe_s, storage
        self._shares_memory = False
        self._findings: list[Finding] = []
        self._pages_ids = count(1)
        self._memory_bytes = 0
        self._pids: tuple[int, ...] = ()
        self._frozen_at = 0.0
        self._frozen_s = 0.0

    async def run(self, blocking: Blocking, images_dir: Path, plugins: PluginSettings) -> DumpResult:
        begin = time.monotonic()
        faults.point("dump.start")
        with core.Tracer() as tracer, ImageWriter(images_dir, direct_io=self._storage.direct_io) as writer:
            writer.root_pid = self._pid
            writer.crew = self._storage.crew
            goes_on = self._after is not _After.KILL
            devices = Devices(Stage.DUMP, plugins, self._spans, blocking, writer, jobs=self._jobs, tree_goes_on=goes_on)
            devices.use_tracer(tracer)
            async with devices.session():
                image_bytes = await self._dump(blocking, tracer, writer, devices)
        path = critical_stages(self._spans.spans)
        log.info("critical path: %s", describe(path))
        return DumpResult(
            root_pid=self._pid,
            pids=self._pids,
            images_dir=str(writer.final_dir),
            memory_bytes=self._memory_bytes,
            image_bytes=image_bytes,
            frozen_s=self._frozen_s,
            total_s=time.monotonic() - begin,
            stages=tuple((s.name, s.wall_s, s.nr_bytes) for s in summarize(self._spans.spans)),
            critical_path=path,
        )

    async def _dump(self, blocking: Blocking, tracer: core.Tracer, writer: ImageWriter, devices: Devices) -> int:
        tree = FrozenTree(tracer, self._pid, self._findings)
        if self._observe_s:
            await self._observe(blocking)
        try:
            await self._freeze(blocking, tree, devices)
            table = FileTable(self._findings, claims=devices)
            try:
                collected = await self._collect(blocking, tree, table)
                await self._write(blocking, tree, table, collected, writer)
            finally:
                table.close()
            await self._finish_images(blocking, writer, devices)
            return await self._settle(blocking, tree, writer, devices)
        except BaseException as error:
            with trio.CancelScope(shield=True):
                await self._give_back(blocking, tree, devices, error)
            raise

    async def _observe(self, blocking: Blocking) -> None:
        """Let the tree show which memory it uses. Tasks that are born meanwhile show it anyway."""
        async with self._spans.span("observe"):
            pids = await blocking.run(tree_of, self._pid)
            await blocking.run(usage.forget, pids)
            await trio.sleep(self._observe_s)

    async def _freeze(self, blocking: Blocking, tree: FrozenTree, devices: Devices) -> None:
        """Pause the devices of all tasks while they run, then freeze from the root down. A task that was born meanwhile
        is paused before it is stopped, too."""
        async with self._spans.span("pause devices"):
            paused = set(await blocking.run(tree_of, self._pid))
            await devices.pause(sorted(paused))
        faults.point("dump.paused")
        async with self._spans.span("freeze"):
            self._frozen_at = time.monotonic()
            fresh = [self._pid]
            while fresh:
                await devices.pause([pid for pid in fresh if pid not in paused])
                paused.update(fresh)
                fresh = await blocking.run(tree.seize, fresh, partial(_stop_if, blocking.cancel))
        log.info("frozen: %d tasks", len(tree.tasks))
        faults.point("dump.frozen")
        async with self._spans.span("checkpoint devices"):
            await devices.checkpoint([task.pid for task in tree.living])
        faults.point("dump.checkpointed")
        await blocking.run(tree.describe)
        self._pids = tuple(tree.tasks)

    async def _collect(self, blocking: Blocking, tree: FrozenTree, table: FileTable) -> Collected:
        async with self._spans.span("collect"):
            collected = await blocking.run(collect, tree, table, self._shell_job, self._observe_s > 0)
        faults.point("dump.collected")
        if self._findings:
            raise UnsupportedResourceError(
                f"cannot dump the tree of pid {self._pid}, it goes on as before", self._findings
            )
        return collected

    async def _write(
        self, blocking: Blocking, tree: FrozenTree, table: FileTable, collected: Collected, writer: ImageWriter
    ) -> None:
        faults.point("dump.write")
        sharing = await self._find_pages(blocking, collected)
        stored = {pid: sharing.own(pid) for pid in collected.mms}
        await blocking.run(self._check_space, writer, collected.mms, stored, blocking.cancel)
        jobs = _shares(self._jobs, {pid: runs.total_bytes for pid, runs in stored.items()})
        objects = shmem.objects(collected.mms)
        tasks = {task.pid: task for task in tree.living}
        calls: list[Callable[[], object]] = [partial(self._write_state, collected, writer)]
        for pid in sorted(jobs, key=lambda pid: -jobs[pid]):
            entry = collected.mms[pid]
            calls.append(partial(self._write_memory, writer, pid, entry, stored, jobs[pid], blocking.cancel))
        ancestral = {pid: witness.runs for pid, witness in sharing.witnesses.items()}
        for pid, witness in sharing.witnesses.items():
            entry = collected.mms[witness.pid]
            calls.append(partial(self._write_ancestral, writer, pid, witness.pid, entry, ancestral, blocking.cancel))
        for item in objects.values():
            calls.append(partial(self._write_shared, writer, item, tasks, blocking.cancel))
        await blocking.all(calls, self._jobs)
        await blocking.run(sharing.write, writer, stored, ancestral)
        async with self._spans.span("files"):
            await blocking.run(table.write, writer, partial(self._save_object, writer, blocking.cancel))
        faults.point("dump.written")

    def _write_state(self, collected: Collected, writer: ImageWriter) -> None:
        with self._spans.span("state"):
            write_state(collected, writer)

    async def _find_pages(self, blocking: Blocking, collected: Collected) -> inherited.Sharing:
        """Which pages must be stored, and which of them are a parent's as well."""
        sees_frames = not self._storage.criu_compatible and len(collected.mms) > 1 and inherited.can_recognise()
        sharing = inherited.Sharing(collected.mms, collected.parents if sees_frames else {})
        async with self._spans.span("find pages"):
            await blocking.all([partial(sharing.look_at, pid, blocking.cancel) for pid in collected.mms], self._jobs)
            await blocking.run(sharing.settle, blocking.cancel)
        self._shares_memory = sharing.is_any
        log.info("memory shared since a fork and stored once: %d bytes", sharing.shared_bytes)
        return sharing

    def _check_space(
        self,
        writer: ImageWriter,
        mms: Mapping[int, pb.mm_entry],
        pages: Mapping[int, memory.PageRuns],
        cancel: core.Cancel,
    ) -> None:
        """Tell of a full disk now and not after minutes of writing. Nobody knows what compressed pages will take."""
        if self._storage.crew is not None:
            return
        if writer.has_space(sum(runs.total_bytes for runs in pages.values())):
            return
        # It may fit all the same: pages of zeros are not stored, and to know them takes reading all.
        writer.check_space(
            sum(memory.weigh(pid, mms[pid], runs, jobs=self._jobs, cancel=cancel) for pid, runs in pages.items())
        )

    def _write_memory(
        self,
        writer: ImageWriter,
        pid: int,
        entry: pb.mm_entry,
        runs: dict[int, memory.PageRuns],
        jobs: int,
        cancel: core.Cancel,
    ) -> None:
        """Write the pages of a task that are its own; ``runs`` then has what really got into its pagemap."""
        done = memory.Progress()
        with self._spans.span("memory", task=pid, gauge=lambda: done.done_bytes) as span:
            runs[pid] = memory.dump(
                writer,
                pid,
                entry,
                next(self._pages_ids),
                jobs=jobs,
                cancel=cancel,
                progress=done,
                runs=runs[pid],
            )
            span.set(bytes=runs[pid].total_bytes)
            what = "compress" if writer.crew else "write"
            for number, worker in enumerate(done.workers, 1):
                track = f"{span.track}{WORKER_TRACK}{number}"
                self._spans.add(what, track, worker.begin_ns, worker.end_ns, part_of=span, bytes=worker.bytes)
            self._memory_bytes += runs[pid].total_bytes

    def _write_ancestral(
        self,
        writer: ImageWriter,
        pid: int,
        witness: int,
        entry: pb.mm_entry,
        runs: dict[int, memory.PageRuns],
        cancel: core.Cancel,
    ) -> None:
        """Write pages that the children of a task share without it, as one of them has them."""
        with self._spans.span("ancestral memory", task=pid) as span:
            runs[pid] = memory.dump(
                writer,
                witness,
                entry,
                next(self._pages_ids),
                jobs=self._jobs,
                cancel=cancel,
                runs=runs[pid],
                kind="ancestral",
                ident=pid,
            )
            span.set(bytes=runs[pid].total_bytes)
            self._memory_bytes += runs[pid].total_bytes

    def _write_shared(
        self, writer: ImageWriter, item: shmem.SharedObject, tasks: Mapping[int, shmem.Task], cancel: core.Cancel
    ) -> None:
        with self._spans.span("shared memory") as span:
            size = shmem.dump(writer, item, tasks, next(self._pages_ids), jobs=self._jobs, cancel=cancel)
            span.set(bytes=size)
            self._memory_bytes += size

    def _save_object(self, writer: ImageWriter, cancel: core.Cancel, shmid: int, fd: int, size: int) -> None:
        stored = memory.save_object(writer, shmid, fd, size, next(self._pages_ids), jobs=self._jobs, cancel=cancel)
        self._memory_bytes += stored

    async def _finish_images(self, blocking: Blocking, writer: ImageWriter, devices: Devices) -> None:
        """What the plugins add in the end, and the inventory, which names them."""
        async with self._spans.span("devices late"):
            await devices.dump_late(self._pid)
        await blocking.run(writer.adopt_all)
        inventory = build_inventory(
            ids.root_ids(), devices.inventory_names, inheriting=self._shares_memory, dump_uptime=_uptime_us()
        )
        writer.write("inventory", [inventory])
        writer.plugins += [PluginRecord(record.name, record.version) for record in devices.used]
        faults.point("dump.late")

    async def _settle(self, blocking: Blocking, tree: FrozenTree, writer: ImageWriter, devices: Devices) -> int:
        """Put the images in place and decide about the tree: nothing may fail once it is killed."""
        if self._after is not _After.KILL:
            # A plugin may let a thread of the task run to give devices back, and then it must be its own self.
            await blocking.run(tree.leave)
        if self._after is _After.RUN:
            await devices.dump_finish(0)
            await self._thaw(blocking, tree, stop=False)
        async with self._spans.span("commit"):
            commit = partial(writer.commit, self._jobs, lambda: blocking.cancel.is_set, self._storage.sync)
            manifest = await blocking.run(commit)
        faults.point("dump.committed")
        if self._after is not _After.RUN:
            await devices.dump_finish(0)
        if self._after is _After.STOP:
            await self._thaw(blocking, tree, stop=True)
        elif self._after is _After.KILL:
            with trio.CancelScope(shield=True):
                async with self._spans.span("kill"):
                    await blocking.run(tree.kill)
            self._frozen_s = time.monotonic() - self._frozen_at
        return manifest.total_bytes

    async def _thaw(self, blocking: Blocking, tree: FrozenTree, *, stop: bool) -> None:
        with trio.CancelScope(shield=True):
            async with self._spans.span("thaw"):
                await blocking.run(partial(tree.thaw, stop=stop))
        self._frozen_s = time.monotonic() - self._frozen_at

    async def _give_back(self, blocking: Blocking, tree: FrozenTree, devices: Devices, error: BaseException) -> None:
        """Let the tree go on after a failure, with its devices."""
        failures: list[BaseException] = []
        finish = partial(devices.dump_finish, result_of(error))
        for step in (partial(blocking.run, tree.leave), finish, partial(blocking.run, tree.thaw)):
            try:
                await step()
            except* GpurestoreError as group:
                failures += group.exceptions
        if failures:
            raise NeedsPersonError(
                f"the dump failed ({error}), and then tasks of the tree of pid {self._pid} could not be let go on as "
                f"they were ({'; '.join(map(str, failures))}): look at them with ps, and end or continue them by hand"
            ) from error


def _shares(jobs: int, sizes: Mapping[int, int]) -> dict[int, int]:
    """How many of ``jobs`` workers each task gets, by its bytes: at least one, together at most twice as many."""
    total = max(1, sum(sizes.values()))
    return {pid: max(1, -(-jobs * size // total)) for pid, size in sizes.items()}


def _stop_if(cancel: core.Cancel) -> None:
    if cancel.is_set:
        raise CancelledError("cancelled while the tree was being stopped")


def _uptime_us() -> int:
    return time.monotonic_ns() // 1000
