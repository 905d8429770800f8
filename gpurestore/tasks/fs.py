"""Working directory, root and umask of a task."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TYPE_CHECKING

from gpurestore import capabilities
from gpurestore.batch import Call, Data
from gpurestore.errors import Finding, ImageError
from gpurestore.images import pb
from gpurestore.syscalls import NR

if TYPE_CHECKING:
    from gpurestore.tasks.descriptors import FileTable, TaskLike


def collect(task: TaskLike, table: FileTable) -> pb.fs_entry:
    """The entry of fs-PID.img; directories that are gone or out of reach become findings of ``table``."""
    cwd = table.add_directory(task, "cwd")
    root = table.add_directory(task, "root")
    return pb.fs_entry(cwd_id=cwd, root_id=root, umask=_umask(task.pid))


def _umask(pid: int) -> int:
    with open(f"/proc/{pid}/status", encoding="utf-8", errors="replace") as file:
        for line in file:
            if line.startswith("Umask:"):
                return int(line.split()[1], 8)
    return 0o022  # a kernel before 4.7


def plan(entry: pb.fs_entry, fd_of: Callable[[int], int], is_our_root: Callable[[int], bool]) -> list[Call]:
    """Go to the root and the working directory through their staged descriptors, and set the umask.

    ``is_our_root`` says whether a file id stands for the root that the task has anyway: leaving it needs no right.
    """
    calls = []
    if not is_our_root(entry.root_id):
        calls.append(Call(NR.FCHDIR, (fd_of(entry.root_id),), "enter the root directory"))
        calls.append(Call(NR.CHROOT, (Data(b".\0"),), "make it the root"))
    calls.append(Call(NR.FCHDIR, (fd_of(entry.cwd_id),), "enter the working directory"))
    if entry.HasField("umask"):
        if entry.umask & ~0o777:
            raise ImageError(f"fs image: umask {entry.umask:#o} is none")
        calls.append(Call(NR.UMASK, (entry.umask,), "set the umask"))
    return calls


def check_root(where: str, path: str) -> list[Finding]:
    """Whether we may chroot to ``path`` if it is another root than ours."""
    if is_our_root_path(path):
        return []
    if capabilities.holds("SYS_CHROOT"):
        return []
    return [Finding(where, f"root directory {path}", "changing the root needs CAP_SYS_CHROOT")]


def is_our_root_path(path: str) -> bool:
    """Whether ``path``, as we see it, is the root that we have ourselves."""
    try:
        return os.path.samestat(os.stat(path), os.stat("/"))
    except OSError:
        return False
