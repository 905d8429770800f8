"""The threads of a task that fill its memory: its own, spare ones where those are too few, and their equipment."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from gpurestore import core
from gpurestore.batch import Call, CallResult
from gpurestore.errors import CallFailedError, CoreError, GpurestoreError
from gpurestore.pipeline.load import LoadedTask
from gpurestore.pipeline.plan import RestorePlan
from gpurestore.syscalls import NR
from gpurestore.tasks import cloning
from gpurestore.tasks.memory import PagesSource, Worker, hugepages, placing, userfaultfd
from gpurestore.tasks.memory.placing import Placing

log = logging.getLogger("gpurestore.restore")

_EEXIST = 17


@dataclass(frozen=True, slots=True)
class Crew:
    """The threads that fill a task's memory, and the ``uffd`` of the task for whole pages, or -1."""

    workers: list[Worker]
    uffd: int
    has_staging: bool
    placing: Placing | None


class Crews:
    """Makes a task's crew and takes it away again. Everything blocks; one thread at a time may do so for a task.

    A crew that is not dismissed, because something failed, ends with its task.
    """

    def __init__(
        self,
        planned: RestorePlan,
        pid_max: int,
        region: core.Region,
        tracer: core.Tracer,
        cancel: core.Cancel,
        pages: Mapping[int, PagesSource],
    ) -> None:
        self._plan, self._pid_max, self._pages = planned, pid_max, pages
        self._region, self._tracer, self._cancel = region, tracer, cancel

    def assemble(self, loaded: LoadedTask) -> Crew:
        """The threads that take part, with what they need for whole pages if the kernel has that."""
        nr = self._plan.nr_fillers[loaded.pid]
        servers = [(tid, self._plan.slots[tid]) for tid in loaded.tids]
        servers += [(self._clone_anywhere(loaded.pid, slot), slot) for slot in self._plan.workers[loaded.pid]]
        uffd, has_staging = self._open_uffd(loaded, nr)
        placer = self._open_placing(loaded, uffd) if uffd >= 0 and _placed(loaded) else None
        first = self._plan.huge_staging
        workers = [
            Worker(tid, slot, uffd if has_staging else -1, first + number * hugepages.STAGING_BYTES, placer)
            for number, (tid, slot) in enumerate(servers[:nr])
        ]
        return Crew(workers, uffd, has_staging, placer)

    def dismiss(self, loaded: LoadedTask, crew: Crew) -> None:
        """Take everything away again that :meth:`assemble` made."""
        if crew.placing is not None:
            crew.placing.close()
        if crew.uffd >= 0:
            self._call(loaded, userfaultfd.plan_close(crew.uffd))
        if crew.has_staging:
            self._call(loaded, hugepages.plan_no_staging(self._plan.huge_staging, len(crew.workers)))
        for worker in crew.workers:
            if worker.tid not in loaded.cores:
                self._region.post(worker.slot, [Call(NR.EXIT, (0,), "worker ends")])
                self._tracer.await_exit(worker.tid)

    def _call(self, loaded: LoadedTask, calls: list[Call]) -> list[CallResult]:
        return self._region.run(self._plan.slots[loaded.pid], loaded.pid, calls, self._cancel)

    def _open_uffd(self, loaded: LoadedTask, nr_workers: int) -> tuple[int, bool]:
        """The task's userfaultfd, -1 where that is of no use or not to be had; and whether there is a staging."""
        staging, small = self._plan.huge_staging, _placed(loaded)
        if loaded.pages.huge:
            both = sorted({*loaded.pages.huge, *small})
            try:
                self._call(loaded, hugepages.plan_staging(staging, nr_workers))
                return self._register(loaded, both, userfaultfd.MOVE), True
            except CallFailedError as error:
                log.info("no huge pages: %s", error)
                self._call(loaded, hugepages.plan_no_staging(staging, nr_workers))
        if small:
            try:
                return self._register(loaded, small, 0), False
            except CallFailedError as error:
                log.info("all pages are read to their places: %s", error)
        return -1, False

    def _register(self, loaded: LoadedTask, ranges: Sequence[tuple[int, int]], features: int) -> int:
        """Make a userfaultfd and register ``ranges``. When it fails there is none."""
        uffd = self._call(loaded, placing.plan_open())[0].result
        try:
            self._call(loaded, placing.plan_register(uffd, ranges, features))
        except CallFailedError:
            self._call(loaded, userfaultfd.plan_close(uffd))
            raise
        return uffd

    def _open_placing(self, loaded: LoadedTask, uffd: int) -> Placing | None:
        try:
            return Placing(loaded.pid, uffd, self._pages[loaded.pid].fd)
        except (CoreError, OSError) as error:
            log.info("all small pages are read to their places: %s", error)
            return None

    def _clone_anywhere(self, pid: int, slot: int) -> int:
        """An extra thread, with an id that nobody will need."""
        # High ids are the least likely to be in use; each slot begins at its own, so that tasks do not compete.
        tid = self._pid_max - 1 - slot
        while tid > 300:
            if tid not in self._plan.slots:
                try:
                    self._region.execute(
                        self._plan.slots[pid], pid, [cloning.thread(tid, self._region.slot_address(slot))], self._cancel
                    )
                    self._tracer.adopt([tid], of=pid)
                    return tid
                except CallFailedError as error:
                    if error.errno != _EEXIST:
                        raise
            tid -= self._plan.nr_slots
        raise GpurestoreError(f"task {pid}: no thread id is free for a memory worker; raise kernel.pid_max")


def _placed(loaded: LoadedTask) -> Sequence[tuple[int, int]]:
    """Mappings for whole small pages; compressed ones come in otherwise."""
    return loaded.pages.placed if loaded.pages.compressed is None else ()
