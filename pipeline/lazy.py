"""The lazy part of a restore: a handler process takes over the memory of every task, and goes on when we are done."""

from __future__ import annotations

import logging
import os
import select
import stat
from collections.abc import Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path

import trio

from gpurestore import core
from gpurestore.errors import GpurestoreError, LazyPagesError
from gpurestore.pipeline.load import LoadedTree
from gpurestore.pipeline.plan import RestorePlan
from gpurestore.pipeline.stages import Stages
from gpurestore.tasks.lazy import read_fault_order
from gpurestore.tasks.memory import lazy, userfaultfd
from gpurestore.tasks.memory.lazy import LazyHandler, LazyStatus


@dataclass(frozen=True, slots=True)
class LazySettings:
    """``fault_order``: a file with faults of an earlier restore, to fill in that order. ``record``: one to write."""

    fault_order: Path | None = None
    record: Path | None = None
    detached: bool = False

    def read_order(self) -> dict[int, list[int]]:
        """Faults of an earlier restore, by pid."""
        return {} if self.fault_order is None else read_fault_order(self.fault_order)


@dataclass(frozen=True, slots=True, eq=False)
class LazyFill:
    """The memory of a restored tree that is still to come. The handler needs nobody to wait for it.

    Letting go of this object, or the end of this process, changes nothing for the tree.
    """

    handler_pid: int
    keeper_pid: int
    total_bytes: int
    _handler: LazyHandler = field(repr=False)

    @property
    def status(self) -> LazyStatus:
        """How far it is, in bytes, and who does it."""
        return self._handler.status

    async def wait(self) -> LazyStatus:
        """Wait until all memory is in place, or the tree is gone. Raises LazyPagesError if it had to be killed."""
        await trio.lowlevel.wait_readable(self._handler.fileno())
        return self._ended()

    def wait_sync(self) -> LazyStatus:
        """:meth:`wait` for callers without a trio loop."""
        select.select([self._handler.fileno()], [], [])
        return self._ended()

    def _ended(self) -> LazyStatus:
        status = self.status
        with suppress(ChildProcessError):  # ours only where this process adopts orphans
            os.waitpid(status.handler_pid, os.WNOHANG)
        if status.message:
            raise LazyPagesError(f"lazy restore: {status.message}")
        if not status.ended:
            raise LazyPagesError("lazy restore: the handler and its keeper were both killed; do not trust the tree")
        return status


class LazyPages:
    """The handler during a restore, if some task takes pages lazily.

    A context: left before the release, the handler ends and takes its tasks along.
    """

    def __init__(self, stages: Stages, tree: LoadedTree, settings: LazySettings) -> None:
        self._stages, self._tree, self._settings = stages, tree, settings
        self._plans = {pid: task.lazy for pid, task in tree.tasks.items() if task.lazy is not None}
        self._handler: LazyHandler | None = None
        self._released = False

    def __enter__(self) -> LazyPages:
        return self

    def __exit__(self, *_: object) -> None:
        if self._handler is not None and not self._released:
            self._handler.close()

    def start(self, staging: Mapping[int, int]) -> None:
        """Fork the handler; ``staging`` says where shared memory is mapped in this process. Blocks."""
        with ExitStack() as stack:
            record_fd = -1
            if self._settings.record is not None:
                record_fd = _create(self._settings.record)
                stack.callback(os.close, record_fd)
            self._handler = LazyHandler(
                self._tree.folder,
                [*self._plans.values(), *self._tree.late_shared.values()],
                staging,
                jobs=self._stages.jobs,
                report_fds=[*log_fds(), *stderr_fds(self._settings.detached)] or kernel_log_fds(stack),
                log_fd=next(iter(log_fds()), -1),
                record_fd=record_fd,
            )

    def take(self, pid: int, planned: RestorePlan, region: core.Region) -> None:
        """Hand the memory of a task, which nobody has touched yet, over to the handler. Blocks."""
        assert self._handler is not None
        cancel = self._stages.blocking.cancel
        slot, plan = planned.slots[pid], self._plans[pid]
        fd = region.run(slot, pid, lazy.plan_userfaultfd(), cancel)[0].result
        region.run(slot, pid, lazy.plan_register(fd, plan.watched), cancel)
        uffd = userfaultfd.take(pid, fd)
        try:
            region.run(slot, pid, userfaultfd.plan_close(fd), cancel)
            self._handler.add(pid, uffd, cancel)
        finally:
            os.close(uffd)

    def release(self) -> None:
        """The tree runs. Blocks for a moment."""
        if self._handler is not None:
            self._handler.release()
            self._released = True

    @property
    def fill(self) -> LazyFill | None:
        """What is still to come, once the tree runs; None where there is nothing."""
        if self._handler is None:
            return None
        status = self._handler.status
        return LazyFill(status.handler_pid, status.keeper_pid, status.total_bytes, self._handler)


def _create(path: Path) -> int:
    try:
        return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666)
    except OSError as error:
        raise GpurestoreError(f"cannot write the order of faults {path}: {error.strerror}") from error


def log_fds() -> list[int]:
    """The file of ``-o``, if there is one."""
    handlers = logging.getLogger("gpurestore").handlers
    return [h.stream.fileno() for h in handlers if isinstance(h, logging.FileHandler) and h.stream is not None]


def stderr_fds(detached: bool) -> list[int]:
    """Stderr, for a handler to say that it had to kill the tree.

    A command that ends before the handler does must not leave its pipes open behind it: who reads them waits for their
    end. Then stderr counts only where it is a terminal or a file.
    """
    with suppress(OSError):
        if not detached or stat.S_ISREG(os.fstat(2).st_mode) or os.isatty(2):
            return [2]
    return []


def kernel_log_fds(stack: ExitStack) -> list[int]:
    """The kernel's log, for what nobody else would be told; none where we may not write. Closed with ``stack``."""
    with suppress(OSError):
        fd = os.open("/dev/kmsg", os.O_WRONLY | os.O_CLOEXEC)
        stack.callback(os.close, fd)
        return [fd]
    return []
