"""A frozen tree: every thread of every task stopped by the tracer, ready to be read and asked."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import NamedTuple

from gpurestore import core
from gpurestore.batch import Call, CallResult
from gpurestore.errors import (
    CoreError,
    Finding,
    GpurestoreError,
    NoSuchTaskError,
    PrivilegeError,
    TaskDiedError,
    TracedError,
)
from gpurestore.tasks import maps, procfs
from gpurestore.tasks.maps import Vma

_EPERM = 1


class FrozenThread(NamedTuple):
    """A stopped thread and its registers."""

    tid: int
    state: core.ThreadState


@dataclass(slots=True)
class FrozenTask:
    """One process of a frozen tree. A zombie has neither threads nor mappings, only ``exit_code`` (as in wait(2))."""

    tracer: core.Tracer
    pid: int
    ppid: int
    pgid: int
    sid: int
    zombie: bool = False
    exit_code: int = 0
    threads: list[FrozenThread] = field(default_factory=list)
    children: list[int] = field(default_factory=list)
    vmas: list[Vma] = field(default_factory=list)
    pidfd: int = -1
    _agent: int | None = None

    @property
    def stop_signal(self) -> int:
        """The signal that had stopped the process before it was frozen, else 0."""
        return self.threads[0].state.stop_signal if self.threads else 0

    def ask(self, calls: Sequence[Call], tid: int | None = None) -> list[CallResult]:
        """Run system calls in a thread of the task, the leader if not said otherwise.

        The first use maps the agent into the task, in a place that none of its mappings is near.
        Raises CallFailedError when a call fails that may not.
        """
        tids = [thread.tid for thread in self.threads]
        if self._agent is None:
            taken = [(vma.start, vma.end) for vma in self.vmas]
            address = maps.find_hole(taken, core.agent_bytes(len(tids)))
            self.tracer.enter(self.pid, address, len(tids))
            self._agent = address
        tid = self.pid if tid is None else tid
        return self.tracer.run(tid, self._agent, tids.index(tid), calls)

    def peek_signals(self, tid: int, *, shared: bool) -> list[bytes]:
        """Pending signals as raw siginfo_t: the thread's own, or with ``shared`` the process's."""
        return self.tracer.peek_signals(tid, shared=shared)

    def read_memory(self, address: int, size: int) -> bytes:
        """``size`` bytes of the task's memory; GpurestoreError when part of it is not mapped."""
        try:
            with open(f"/proc/{self.pid}/mem", "rb", buffering=0) as mem:
                data = os.pread(mem.fileno(), size, address)
        except OSError as error:
            raise GpurestoreError(f"pid {self.pid}: reading {size} bytes at {address:#x}: {error.strerror}") from error
        if len(data) != size:
            raise GpurestoreError(f"pid {self.pid}: only {len(data)} of {size} bytes at {address:#x} can be read")
        return data

    def leave(self) -> None:
        """Take the agent out again; registers are as they were found."""
        if self._agent is not None:
            self._agent = None
            self.tracer.leave(self.pid)

    def close(self) -> None:
        """Close what was opened for this task here."""
        if self.pidfd >= 0:
            os.close(self.pidfd)
            self.pidfd = -1


def tree_of(root: int) -> list[int]:
    """The pids of a running tree as it is just now, parents first."""
    pids = [root]
    for pid in pids:
        with suppress(NoSuchTaskError):
            pids += procfs.children(pid)
    return pids


class FrozenTree:
    """All tasks below a root, frozen; parents come before their children."""

    def __init__(self, tracer: core.Tracer, root: int, findings: list[Finding]) -> None:
        """``findings`` collects what a dump of the tree could not carry."""
        self.tracer = tracer
        self.root = root
        self.findings = findings
        self.tasks: dict[int, FrozenTask] = {}

    def __iter__(self) -> Iterator[FrozenTask]:
        return iter(self.tasks.values())

    @property
    def living(self) -> list[FrozenTask]:
        """The tasks that are not zombies."""
        return [task for task in self if not task.zombie]

    def freeze(self) -> None:
        """Stop the tree. On failure :meth:`thaw` undoes it."""
        fresh = [self.root]
        while fresh:
            fresh = self.seize(fresh)

    def seize(self, pids: Sequence[int], should_stop: Callable[[], None] = lambda: None) -> list[int]:
        """Stop these tasks, the root first of all. Returns those of the tree that still run; none: all of it stands."""
        for pid in pids:
            should_stop()
            self._seize_process(pid)
        return [pid for task in self for pid in procfs.children(task.pid) if pid not in self.tasks]

    def describe(self) -> None:
        """Read what ptrace and procfs tell of the frozen tree. After this its threads may not run any more."""
        for task in self:
            self._describe(task)

    def _seize_process(self, pid: int) -> None:
        try:
            stat = procfs.stat(pid)
            task = FrozenTask(self.tracer, pid, stat.ppid, stat.pgid, stat.sid)
            if stat.state == "Z":
                task.zombie, task.exit_code = True, stat.exit_code
            else:
                task.threads = [FrozenThread(tid, core.ThreadState(tid, {}, b"")) for tid in self._seize(pid)]
        except (NoSuchTaskError, TaskDiedError):
            # A child that ended while its siblings were being stopped is either gone or a zombie by now.
            if pid == self.root:
                raise
            with suppress(NoSuchTaskError):
                if procfs.stat(pid).state == "Z":
                    self._seize_process(pid)
            return
        self.tasks[pid] = task

    def _seize(self, pid: int) -> list[int]:
        try:
            return self.tracer.seize(pid)
        except CoreError as error:
            if error.errno != _EPERM:
                raise
            tracer = procfs.status(pid).tracer
            if tracer:
                raise TracedError(
                    f"pid {pid} is traced by pid {tracer} ({procfs.comm(tracer).decode(errors='replace')}): "
                    "detach that debugger or tracer first"
                ) from error
            if procfs.stat(pid).state in "ZX":  # it ended meanwhile: EPERM is the kernel's answer to that too
                raise TaskDiedError(f"pid {pid} ended while the tree was being stopped") from error
            raise PrivilegeError(
                f"pid {pid} may not be traced by this user: run as its owner or as root (CAP_SYS_PTRACE)"
            ) from error

    def _describe(self, task: FrozenTask) -> None:
        stat = procfs.stat(task.pid)
        # Children that were re-parented while the tree was being stopped belong to whom they have now.
        task.ppid, task.pgid, task.sid = stat.ppid, stat.pgid, stat.sid
        task.children = [pid for pid in procfs.children(task.pid) if pid in self.tasks]
        if task.zombie:
            return
        task.threads = [FrozenThread(t.tid, self.tracer.read_thread(t.tid)) for t in task.threads]
        task.vmas = maps.read(task.pid)
        task.pidfd = os.pidfd_open(task.pid)

    def leave(self) -> None:
        """Take the agent out of every task; the tree stays frozen."""
        for task in self.living:
            task.leave()

    def thaw(self, *, stop: bool = False) -> None:
        """Let every task go on as it was found, or leave it stopped. The tree may be frozen again afterwards."""
        self.leave()
        for task in self.living:
            self.tracer.release(task.pid, stop=stop)
        self.close()
        if not stop:
            self.tasks.clear()

    def kill(self) -> None:
        """Kill every task at once and wait until all are dead."""
        self.tracer.kill([task.pid for task in self.living])
        self.close()

    def close(self) -> None:
        """Close what was opened here; tasks stay as they are."""
        for task in self:
            task.close()
