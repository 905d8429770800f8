"""Who uses the files of an image folder: descriptors, mappings, programs, directories. Pure reading.

One id may serve several uses that need different flags of open(2) (CRIU shares ids between descriptors and mappings),
so a file is staged once per (id, for_mapping).
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, cast

from gpurestore.errors import ImageError
from gpurestore.images import pb
from gpurestore.images.folder import ImageFolder
from gpurestore.tasks import vmaflags
from gpurestore.tasks.external import is_claimed

MAX_FD = 1 << 30
_FILE_VMA = vmaflags.FILE_SHARED | vmaflags.FILE_PRIVATE
_BODY = {pb.REG: "reg", pb.PIPE: "pipe", pb.FIFO: "fifo", pb.EVENTFD: "efd", pb.MEMFD: "memfd", pb.EXT: "ext"}
_ROOT, _CWD = "root directory", "working directory"


class FileUses:
    """The file ids of a folder and what each is for."""

    def __init__(self, folder: ImageFolder, mms: Mapping[int, pb.mm_entry] | None = None) -> None:
        """``mms`` are those of all living tasks, for callers that have them."""
        self._entries: dict[int, pb.file_entry] = {}
        for entry in folder.read("files") if folder.has("files") else []:
            self._add_entry(entry)
        self.tables: dict[int, list[pb.fdinfo_entry]] = {}
        self._fs: dict[int, pb.fs_entry] = {}
        self._where: dict[int, str] = {}
        self._first: dict[int, tuple[int, int]] = {}
        self._directories: set[int] = set()
        self._mapped: dict[int, int] = {}
        self.claimed: dict[int, list[pb.vma_entry]] = {}  # by pid: mappings that a device plugin speaks for
        self.pids: set[int] = set()  # of processes, threads, groups and sessions
        for item in folder.read("pstree"):
            self.pids |= {item.pid, item.pgid, item.sid, *item.threads}
            self._read_task(folder, item.pid, mms)
        # One more than the largest descriptor number of any task.
        self.keep_from = 1 + max((entry.fd for table in self.tables.values() for entry in table), default=2)

    def _add_entry(self, entry: pb.file_entry) -> None:
        body = _BODY.get(entry.type)
        if body is not None and not entry.HasField(cast(Any, body)):
            raise ImageError(f"files.img: file {entry.id} of kind {pb.fd_types.Name(entry.type)} has no such part")
        if entry.id in self._entries:
            raise ImageError(f"files.img: file {entry.id} stands there twice")
        self._entries[entry.id] = entry

    def _read_task(self, folder: ImageFolder, pid: int, mms: Mapping[int, pb.mm_entry] | None) -> None:
        if pid not in mms if mms is not None else not folder.has("mm", pid):  # a zombie has neither memory nor files
            self.tables[pid] = []
            return
        self.tables[pid] = self._read_table(folder, pid)
        for descriptor in self.tables[pid]:
            self._use(descriptor.id, f"pid {pid}, fd {descriptor.fd}")
            self._first.setdefault(descriptor.id, (pid, descriptor.fd))
        mm = mms[pid] if mms is not None else folder.read_one("mm", pid)
        self._use_mapping(mm.exe_file_id, os.O_RDONLY, f"pid {pid}, program")
        for vma in mm.vmas:
            if is_claimed(vma):
                self.regular(vma.shmid)
                self.claimed.setdefault(pid, []).append(vma)
            elif vma.status & _FILE_VMA:
                shared = vma.status & vmaflags.FILE_SHARED and vma.prot & 2
                guess = os.O_RDWR if shared else os.O_RDONLY
                flags = vma.fdflags if vma.HasField("fdflags") else self._flags_or(vma.shmid, guess)
                self._use_mapping(vma.shmid, flags, f"pid {pid}, mapping {vma.start:x}-{vma.end:x}")
        entry = self._fs[pid] = folder.read_one("fs", pid)
        for file_id, what in ((entry.cwd_id, _CWD), (entry.root_id, _ROOT)):
            self._use(file_id, f"pid {pid}, {what}")
            if self.entry(file_id).type != pb.REG:
                raise ImageError(f"fs-{pid}.img: the {what} is file {file_id}, which is no directory")
            self._directories.add(file_id)

    def _read_table(self, folder: ImageFolder, pid: int) -> list[pb.fdinfo_entry]:
        ids = folder.read_one("ids", pid) if folder.has("ids", pid) else None
        table_id = ids.files_id if ids is not None else pid
        entries: list[pb.fdinfo_entry] = folder.read("fdinfo", table_id) if folder.has("fdinfo", table_id) else []
        numbers = [entry.fd for entry in entries]
        if len(set(numbers)) != len(numbers) or any(number >= MAX_FD for number in numbers):
            raise ImageError(f"fdinfo-{table_id}.img: a descriptor number stands there twice, or is too large")
        return entries

    def _use(self, file_id: int, where: str) -> None:
        self.entry(file_id)
        self._where.setdefault(file_id, where)

    def _use_mapping(self, file_id: int, flags: int, where: str) -> None:
        """Collect what a mapping needs; writing by any of them makes the staged file writable for all."""
        self._use(file_id, where)
        writable = flags & os.O_ACCMODE != os.O_RDONLY or self._mapped.get(file_id) == os.O_RDWR
        self._mapped[file_id] = os.O_RDWR if writable else os.O_RDONLY

    def _flags_or(self, file_id: int, guess: int) -> int:
        """Our own images have an id per kind of access, with the flags in the entry."""
        flags = self._entry_flags(self.entry(file_id))
        return guess if flags is None or self.is_descriptor(file_id) else flags

    @staticmethod
    def _entry_flags(entry: pb.file_entry) -> int | None:
        body = getattr(entry, _BODY[entry.type]) if entry.type in _BODY else None
        return getattr(body, "flags", None)

    def entry(self, file_id: int) -> pb.file_entry:
        """The entry of a file."""
        try:
            return self._entries[file_id]
        except KeyError:
            raise ImageError(f"files.img: no file {file_id}, which another image names") from None

    def regular(self, file_id: int) -> pb.reg_file_entry:
        """The entry of a file with a path."""
        entry = self.entry(file_id)
        if entry.type != pb.REG:
            raise ImageError(f"files.img: file {file_id} has no path, which another entry relies on")
        return entry.reg

    def wanted(self) -> list[tuple[int, bool]]:
        """Everything to stage, in a fixed order: (file id, for mapping)."""
        plain = {(file_id, False) for file_id in (*self._first, *self._directories)}
        return sorted(plain | {(file_id, True) for file_id in self._mapped})

    def flags(self, file_id: int, for_mapping: bool) -> int:
        """What to open a file with."""
        if for_mapping:
            return self._mapped[file_id]
        if file_id not in self._first:
            return os.O_PATH | os.O_DIRECTORY
        return self._entry_flags(self.entry(file_id)) or 0

    def where(self, file_id: int) -> str:
        """The first user of a file, in words."""
        return self._where[file_id]

    def is_descriptor(self, file_id: int) -> bool:
        """Whether a descriptor leads to it."""
        return file_id in self._first

    def first_user(self, file_id: int) -> tuple[int, int]:
        """The (pid, number) that comes first."""
        return self._first[file_id]

    def file_of(self, pid: int, fd: int) -> int:
        """The id behind a descriptor."""
        for entry in self.tables.get(pid, ()):
            if entry.fd == fd:
                return int(entry.id)
        raise ImageError(f"filelocks.img: pid {pid} has no descriptor {fd}")

    def owner(self, file_id: int) -> pb.fown_entry | None:
        """Who gets signals about a description."""
        entry = self.entry(file_id)
        body = getattr(entry, _BODY[entry.type]) if entry.type in _BODY else None
        if entry.type == pb.FIFO:
            body = self.regular(entry.fifo.regf_id if entry.fifo.HasField("regf_id") else entry.id)
        return getattr(body, "fown", None)

    def roots(self) -> list[tuple[int, pb.file_entry]]:
        """The root directory of every task."""
        return [(pid, self.entry(entry.root_id)) for pid, entry in self._fs.items()]

    def fs_of(self, pid: int) -> pb.fs_entry:
        """The fs entry of a task."""
        return self._fs[pid]
