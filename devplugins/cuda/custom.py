"""Device memory in images of its own, as the plugin uses custom storage: one dump's or one restore's.

A checkpoint cannot be abandoned once it has begun. Should writing fail, what is not in the images is kept in memory,
the checkpoint is completed, and giving back is a restore from both. All calls block.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from gpurestore.devplugins.api import HookContext
from gpurestore.devplugins.cuda import IMAGE
from gpurestore.devplugins.cuda.driver import CUSTOM_STORAGE_BRANCH, Driver
from gpurestore.devplugins.cuda.image import Task
from gpurestore.devplugins.cuda.storage import BUFFERS_BYTES, CustomStorage, Inflow, Store
from gpurestore.errors import CudaError, ImageError, NeedsPersonError


class Custom:
    """Custom storage of one operation."""

    def __init__(self, driver: Driver, context: HookContext) -> None:
        self._storage, self._context = CustomStorage(driver), context
        self._stores: dict[int, Store] = {}
        self.inflows: dict[int, Inflow] = {}

    def prepare(self) -> None:
        """Attach to all GPUs, which takes seconds: before anything is frozen."""
        self._storage.prepare()

    def close(self) -> None:
        """Let everything go."""
        for inflow in self.inflows.values():
            inflow.close()
        for store in self._stores.values():
            store.close()
        self.inflows.clear()
        self._stores.clear()
        self._storage.release()

    # ---- dump

    def save(self, task: Task) -> Task:
        """LOCKED to CHECKPOINTED: device memory into images. The task with its regions.

        If it fails the process may be CHECKPOINTED all the same: :meth:`undo` brings it back.
        """
        operation = self._storage.begin_checkpoint(task.pid)
        task = replace(task, regions=tuple((region.gpu, region.size) for region in operation.regions))
        store = self._stores[task.pid] = Store.of(operation)
        try:
            for number in range(len(task.regions)):
                store.fds.append(os.dup(self._context.open_image(task.region_name(number))))
            self._storage.save(operation, store, self._context.is_cancelled)
        except BaseException:
            try:
                self._storage.keep(operation, store)
            except (MemoryError, CudaError) as error:
                raise NeedsPersonError(_lost(task, error)) from error
            self._storage.complete(operation)
            raise
        self._storage.complete(operation)
        return task

    def undo(self, pid: int) -> None:
        """CHECKPOINTED to LOCKED, with all that :meth:`save` took."""
        store = self._stores[pid]
        with Inflow(self._storage, store, store.regions) as inflow:
            self._bring(pid, inflow, {}, lambda: False)

    def has(self, pid: int) -> bool:
        """Whether :meth:`save` began with this process."""
        return pid in self._stores

    # ---- restore

    def begin(self, tasks: Sequence[Task], pairs_of: Callable[[Task], Mapping[str, str]]) -> None:
        """Begin to read device memory while tasks get theirs; copies begin when a task is there."""
        self.prepare()
        mine = [task for task in tasks if task.regions]
        for task in mine:
            store = self._stores[task.pid] = Store()
            for number in range(len(task.regions)):
                store.fds.append(self._context.open_image(task.region_name(number)))
            pairs = pairs_of(task)
            store.regions = tuple((pairs.get(gpu, gpu), size) for gpu, size in task.regions)
            self.inflows[task.pid] = Inflow(self._storage, store, store.regions, BUFFERS_BYTES // len(mine))

    def load(self, task: Task, pairs: Mapping[str, str]) -> None:
        """CHECKPOINTED to LOCKED, from the images."""
        inflow = self.inflows.get(task.pid)
        if inflow is None:
            raise ImageError(f"{IMAGE}: there is no device memory of pid {task.pid}")
        self._bring(task.pid, inflow, pairs, self._context.is_cancelled)

    def _bring(self, pid: int, inflow: Inflow, pairs: Mapping[str, str], is_cancelled: Callable[[], bool]) -> None:
        operation = self._storage.begin_restore(pid, pairs)
        self._storage.load(operation, inflow, is_cancelled)
        self._storage.complete(operation)


def require(driver: Driver, why: str) -> None:
    """Raise CudaError unless the driver has custom storage."""
    if not driver.can_use_custom_storage:
        raise CudaError(f"{driver.name} has no custom storage, {why}: {CUSTOM_STORAGE_BRANCH} and later have")


def _lost(task: Task, error: BaseException) -> str:
    return (
        f"the device memory of pid {task.pid} could neither be written nor be kept in memory"
        f" ({type(error).__name__}: {error}): it is lost, and its next CUDA call will hang; end it"
    )
