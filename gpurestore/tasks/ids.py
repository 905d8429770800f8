"""What tasks share: kernel objects are told apart by kcmp(2), namespaces by the inode behind /proc/PID/ns.

The images number memory, descriptor tables, fs (cwd, root, umask) and signal actions per task. Sharing any of them
between processes, or not sharing one between the threads of a process, is refused: no restore could tell it apart.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Protocol

from gpurestore.errors import Finding
from gpurestore.images import pb

KCMP_FILE, KCMP_VM, KCMP_FILES, KCMP_FS, KCMP_SIGHAND, KCMP_IO, KCMP_SYSVSEM = range(7)
Compare = Callable[[int, int, int], int]  # (pid1, pid2, kind) -> 0 for the same object

_SHARED = {
    KCMP_VM: "memory (CLONE_VM)",
    KCMP_FILES: "descriptor table (CLONE_FILES)",
    KCMP_FS: "working directory, root and umask (CLONE_FS)",
    KCMP_SIGHAND: "signal actions (CLONE_SIGHAND)",
}
# Ids that stand for the namespaces of the tool itself, in which all tasks must be.
_NAMESPACES = {"pid": 1, "net": 2, "ipc": 3, "uts": 4, "mnt": 5, "user": 6, "cgroup": 7, "time": 8}
_FOR_CHILDREN = ("pid_for_children", "time_for_children")


class ThreadLike(Protocol):
    """What of a FrozenThread is needed here."""

    @property
    def tid(self) -> int: ...


class TaskLike(Protocol):
    """What of a FrozenTask is needed here."""

    @property
    def pid(self) -> int: ...

    @property
    def zombie(self) -> bool: ...

    @property
    def threads(self) -> Sequence[ThreadLike]: ...


def _kcmp(pid1: int, pid2: int, kind: int) -> int:
    from gpurestore import core

    return core.kcmp(pid1, pid2, kind)


def collect(
    tasks: Iterable[TaskLike], findings: list[Finding], compare: Compare = _kcmp
) -> dict[int, pb.task_kobj_ids_entry]:
    """The ids of every living task, by pid."""
    alive = {
        task.pid: [thread.tid for thread in task.threads if thread.tid != task.pid] for task in tasks if not task.zombie
    }
    own = _own_namespaces()
    for pid, threads in alive.items():
        _check_threads(pid, threads, findings, compare)
        for tid in (pid, *threads):
            _check_namespaces(pid, tid, own, findings)
        _check_semaphores(pid, bool(threads), findings, compare)
    _check_sharing(list(alive), findings, compare)
    return {pid: _entry(number) for number, pid in enumerate(alive, start=1)}


def _entry(number: int) -> pb.task_kobj_ids_entry:
    entry = pb.task_kobj_ids_entry(vm_id=number, files_id=number, fs_id=number, sighand_id=number)
    for name, ident in _NAMESPACES.items():
        setattr(entry, f"{name}_ns_id", ident)
    return entry


def memory_is_shared(findings: Iterable[Finding]) -> bool:
    """Whether one of ``findings`` is about processes in one address space: asking one would disturb the other."""
    return any(finding.what == _SHARED[KCMP_VM] for finding in findings)


def root_ids() -> pb.task_kobj_ids_entry:
    """The ids of the tool itself, for the inventory: the same namespaces as the tasks', nothing else shared."""
    return _entry(0x7FFFFFFF)


def _check_threads(pid: int, threads: Iterable[int], findings: list[Finding], compare: Compare) -> None:
    for tid in threads:
        for kind in (KCMP_FILES, KCMP_FS):
            if compare(pid, tid, kind) != 0:
                why = "this thread has its own (unshare), apart from its process"
                findings.append(Finding(f"pid {pid}, thread {tid}", _SHARED[kind], why))


def _check_sharing(pids: Sequence[int], findings: list[Finding], compare: Compare) -> None:
    """kcmp orders objects, so that sorting brings equal ones side by side: n log n calls instead of n squared."""
    for kind, what in _SHARED.items():
        for one, other in _equal_pairs(pids, partial(_compare_as, kind, compare)):
            findings.append(Finding(f"pid {other}", what, f"shared with pid {one}, another process"))


def _compare_as(kind: int, compare: Compare, pid1: int, pid2: int) -> int:
    return compare(pid1, pid2, kind)


def _equal_pairs(pids: Sequence[int], compare: Callable[[int, int], int]) -> list[tuple[int, int]]:
    ordered: list[int] = []
    equal = []
    for pid in pids:
        low, high = 0, len(ordered)
        while low < high:
            middle = (low + high) // 2
            order = compare(pid, ordered[middle])
            if order == 0:
                equal.append((ordered[middle], pid))
                break
            low, high = (low, middle) if order == 1 else (middle + 1, high)
        else:
            ordered.insert(low, pid)
    return equal


def _own_namespaces() -> dict[str, str]:
    links = {}
    for name in _NAMESPACES:
        try:
            links[name] = os.readlink(f"/proc/self/ns/{name}")
        except FileNotFoundError:  # a kernel built without this kind
            continue
    return links


def _check_namespaces(pid: int, tid: int, own: dict[str, str], findings: list[Finding]) -> None:
    base = f"/proc/{pid}/task/{tid}/ns"
    where = f"pid {pid}" if tid == pid else f"pid {pid}, thread {tid}"
    for name in (*own, *_FOR_CHILDREN):
        expected = own.get(name.removesuffix("_for_children"))
        try:
            link = os.readlink(f"{base}/{name}")
        except FileNotFoundError:
            continue
        if expected is not None and link != expected:
            what = f"{name.replace('_', ' ')} namespace {link}"
            findings.append(Finding(where, what, "it is not ours; run gpurestore inside the namespaces of the tree"))


def _check_semaphores(pid: int, threaded: bool, findings: list[Finding], compare: Compare) -> None:
    """SEM_UNDO: a task that never used it has no undo list, like ourselves. Threads always have an (empty) one."""
    if threaded or compare(os.getpid(), pid, KCMP_SYSVSEM) == 0:
        return
    try:
        with open("/proc/sysvipc/sem", encoding="ascii") as file:
            exist = len(file.readlines()) > 1
    except OSError:
        return
    if exist:
        findings.append(Finding(f"pid {pid}", "System V semaphores with SEM_UNDO", "what would be undone is not known"))
