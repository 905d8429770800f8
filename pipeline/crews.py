"""The threads of a task that fill its memory: its own, spare ones where those are too few, and their equipment."""

from __future__ import annotations

import logging

from gpurestore import core
from gpurestore.batch import Call, CallResult
from gpurestore.errors import CallFailedError, GpurestoreError
from gpurestore.pipeline.load import LoadedTask
from gpurestore.pipeline.plan import RestorePlan
from gpurestore.syscalls import NR
from gpurestore.tasks import cloning
from gpurestore.tasks.memory import Worker, hugepages

log = logging.getLogger("gpurestore.restore")

_EEXIST = 17


class Crews:
    """Makes a task's crew and takes it away again. Everything blocks; one thread at a time may do so for a task.

    A crew that is not dismissed, because something failed, ends with its task.
    """

    def __init__(
        self, planned: RestorePlan, pid_max: int, region: core.Region, tracer: core.Tracer, cancel: core.Cancel
    ) -> None:
        self._plan, self._pid_max = planned, pid_max
        self._region, self._tracer, self._cancel = region, tracer, cancel

    def assemble(self, loaded: LoadedTask) -> list[Worker]:
        """The threads that take part, with what they need for huge pages if the kernel has that."""
        nr = self._plan.nr_fillers[loaded.pid]
        servers = [(tid, self._plan.slots[tid]) for tid in loaded.tids]
        servers += [(self._clone_anywhere(loaded.pid, slot), slot) for slot in self._plan.workers[loaded.pid]]
        uffd = self._open_uffd(loaded, nr) if loaded.pages.huge else -1
        first = self._plan.huge_staging
        return [
            Worker(tid, slot, uffd, first + number * hugepages.STAGING_BYTES)
            for number, (tid, slot) in enumerate(servers[:nr])
        ]

    def dismiss(self, loaded: LoadedTask, crew: list[Worker]) -> None:
        """Take everything away again that :meth:`assemble` made."""
        if crew[0].uffd >= 0:
            self._call(loaded, hugepages.plan_end(crew[0].uffd, self._plan.huge_staging, len(crew)))
        for worker in crew:
            if worker.tid not in loaded.cores:
                self._region.post(worker.slot, [Call(NR.EXIT, (0,), "worker ends")])
                self._tracer.await_exit(worker.tid)

    def _call(self, loaded: LoadedTask, calls: list[Call]) -> list[CallResult]:
        return self._region.run(self._plan.slots[loaded.pid], loaded.pid, calls, self._cancel)

    def _open_uffd(self, loaded: LoadedTask, nr_workers: int) -> int:
        """The task's userfaultfd for moving pages; -1, and nothing changed, where that is not to be had."""
        try:
            uffd = self._call(loaded, hugepages.plan_open())[0].result
        except CallFailedError as error:
            log.info("no huge pages: %s", error)
            return -1
        try:
            self._call(loaded, hugepages.plan_begin(uffd, loaded.pages.huge, self._plan.huge_staging, nr_workers))
        except CallFailedError as error:
            log.info("no huge pages: %s", error)
            self._call(loaded, hugepages.plan_end(uffd, self._plan.huge_staging, nr_workers))
            return -1
        return uffd

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
