"""Removed files that are only mapped, where the right to open them through /proc/PID/map_files is missing.

An ordinary user never has that right (CAP_CHECKPOINT_RESTORE in the first user namespace), yet every semaphore of
Python's multiprocessing is such a file. Its content shows in the task's memory: what the mappings together show becomes
a ghost.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from gpurestore.errors import Finding, GpurestoreError
from gpurestore.images import pb
from gpurestore.tasks.maps import PAGE_BYTES

if TYPE_CHECKING:
    from gpurestore.tasks.ghosts import GhostDump
    from gpurestore.tasks.maps import Vma

_CHUNK_BYTES = 1 << 20


class ReadableTask(Protocol):
    """What of a FrozenTask is needed here."""

    @property
    def pid(self) -> int: ...

    def read_memory(self, address: int, size: int) -> bytes: ...


@dataclass(slots=True)
class _Hidden:
    where: str
    path: str
    ino: int
    ids: dict[int, int] = field(default_factory=dict)  # flags of open -> file id
    views: list[tuple[ReadableTask, Vma]] = field(default_factory=list)


class HiddenFiles:
    """Collects mappings of hidden files, and makes ghosts of them when all mappings are known."""

    def __init__(self) -> None:
        self._files: dict[tuple[tuple[int, int], int, str], _Hidden] = {}

    def add(
        self, task: ReadableTask, vma: Vma, flags: int, append: Callable[[Callable[[int], pb.file_entry]], int]
    ) -> int:
        """Note a mapping; returns the id of its file, for whose entry ``append`` finds a place."""
        hidden = self._files.setdefault((vma.dev, vma.ino, vma.path), _Hidden(vma.where(task.pid), vma.path, vma.ino))
        hidden.views.append((task, vma))
        if flags not in hidden.ids:
            hidden.ids[flags] = append(lambda file_id: _entry(file_id, flags, vma.path))
        return hidden.ids[flags]

    def finish(self, ghosts: GhostDump, findings: list[Finding]) -> list[pb.remap_file_path_entry]:
        """Bring the contents together; returns which file id is which ghost."""
        remaps = []
        for hidden in self._files.values():
            try:
                ghost_id = ghosts.find(hidden.path, hidden.ino) or _copy(hidden, ghosts)
            except (OSError, GpurestoreError) as error:
                why = f"its content cannot be read ({error}); reaching it otherwise takes CAP_CHECKPOINT_RESTORE"
                findings.append(Finding(hidden.where, f"removed file {hidden.path}", why))
                continue
            for file_id in hidden.ids.values():
                remaps.append(pb.remap_file_path_entry(orig_id=file_id, remap_id=ghost_id, remap_type=pb.GHOST))
        return remaps


def _entry(file_id: int, flags: int, path: str) -> pb.file_entry:
    nobody = pb.fown_entry(uid=0, euid=0, signum=0, pid_type=0, pid=0)
    regular = pb.reg_file_entry(id=file_id, flags=flags, pos=0, fown=nobody, name=path)
    return pb.file_entry(type=pb.REG, id=file_id, reg=regular)


def _copy(hidden: _Hidden, ghosts: GhostDump) -> int:
    """Write what the mappings show into a memfd, which then stands for the file. Parts that none shows stay zero."""
    copy = os.memfd_create("gpurestore-hidden", os.MFD_CLOEXEC)
    try:
        for task, vma in hidden.views:
            _copy_view(task, vma, copy)
        owner = os.stat(f"/proc/{hidden.views[0][0].pid}")
        return ghosts.add_copy(copy, hidden.path, hidden.ino, owner.st_uid, owner.st_gid)
    finally:
        os.close(copy)


def _copy_view(task: ReadableTask, vma: Vma, copy: int) -> None:
    for start in range(vma.start, vma.end, _CHUNK_BYTES):
        size = min(_CHUNK_BYTES, vma.end - start)
        offset = vma.offset + start - vma.start
        try:
            os.pwrite(copy, task.read_memory(start, size), offset)
        except GpurestoreError:
            if not _copy_pages(task, start, size, offset, copy):
                return


def _copy_pages(task: ReadableTask, start: int, size: int, offset: int, copy: int) -> bool:
    """Page by page up to the end of the file, behind which a mapping cannot be read. Whether there was no end."""
    for done in range(0, size, PAGE_BYTES):
        try:
            data = task.read_memory(start + done, PAGE_BYTES)
        except GpurestoreError:
            if offset + done == 0:
                raise
            return False
        os.pwrite(copy, data, offset + done)
    return True
