"""memfd: nameless files in memory, with seals. Content is an object of shared memory (pagemap-shmem-SHMID.img).

Several descriptions and mappings may lead to one inode: the inode has an entry in memfd.img, each description one in
files.img. Seals are put on last: F_SEAL_FUTURE_WRITE only when the tree's own writable mappings are there again.
"""

from __future__ import annotations

import fcntl
import os
import stat
from collections.abc import Callable, Iterable
from typing import NamedTuple

from gpurestore.errors import Finding, GpurestoreError, ImageError
from gpurestore.images import pb
from gpurestore.tasks import fdinfo
from gpurestore.tasks.fdinfo import OpenFile

F_SEAL_SEAL, F_SEAL_FUTURE_WRITE = 0x1, 0x10
_KNOWN_SEALS = 0x3F
_PREFIX = "/memfd:"
_NAME_MAX_BYTES = 249

FillObject = Callable[[int, int, int], None]  # (descriptor, shmid, size): bring the object's content into the file
SaveObject = Callable[[int, int, int], None]  # (shmid, descriptor, size): write the content as a shared memory object


class _Inode(NamedTuple):
    entry: pb.memfd_inode_entry
    fd: int


class MemfdDump:
    """The memfds of a tree, each inode once."""

    def __init__(self) -> None:
        self._inodes: dict[tuple[int, int], _Inode] = {}

    def add(self, file: OpenFile, findings: list[Finding]) -> int:
        """Note the inode behind ``file``; returns its inode id."""
        inode = self._inodes.get(file.key)
        if inode is None:
            inode = _Inode(self._entry(file, findings), fdinfo.reopen(file.fd, os.O_RDONLY))
            self._inodes[file.key] = inode
        return int(inode.entry.inode_id)

    def _entry(self, file: OpenFile, findings: list[Finding]) -> pb.memfd_inode_entry:
        name = file.path.removeprefix(_PREFIX)
        try:
            name.encode()
        except UnicodeEncodeError:
            findings.append(
                Finding(file.where, f"memfd {name!r}", "its name is not UTF-8, which the image format demands")
            )
            name = "?"
        if file.stat.st_ino >= 1 << 32:
            findings.append(Finding(file.where, f"memfd {name}", "its inode number does not fit the image format"))
        return pb.memfd_inode_entry(
            name=name,
            uid=file.stat.st_uid,
            gid=file.stat.st_gid,
            size=file.stat.st_size,
            shmid=file.stat.st_ino & 0xFFFFFFFF,  # as for all shared memory: inode numbers of one internal mount
            seals=_seals(file.fd),
            inode_id=len(self._inodes) + 1,
            mode=file.stat.st_mode,
        )

    def entries(self) -> list[pb.memfd_inode_entry]:
        """The records of memfd.img."""
        return [inode.entry for inode in self._inodes.values()]

    def save(self, save_object: SaveObject) -> None:
        """Hand the content of every inode to ``save_object``."""
        for inode in self._inodes.values():
            save_object(inode.entry.shmid, inode.fd, inode.entry.size)

    def close(self) -> None:
        """Drop what is held open."""
        for inode in self._inodes.values():
            os.close(inode.fd)
        self._inodes.clear()


def _seals(fd: int) -> int:
    own = fdinfo.reopen(fd, os.O_RDONLY)  # an O_PATH handle of a mapping takes no fcntl
    try:
        return fcntl.fcntl(own, fcntl.F_GET_SEALS)
    finally:
        os.close(own)


def collect(file: OpenFile, file_id: int, inode_id: int) -> pb.file_entry:
    """The entry of one description of a memfd."""
    memfd = pb.memfd_file_entry(id=file_id, flags=file.info.flags, pos=file.info.pos, fown=file.fown, inode_id=inode_id)
    return pb.file_entry(type=pb.MEMFD, id=file_id, memfd=memfd)


# ---- restore ----


def check(entries: Iterable[pb.memfd_inode_entry]) -> list[Finding]:
    """What cannot be made again."""
    findings = []
    for entry in entries:
        if len(entry.name.encode()) > _NAME_MAX_BYTES or "\0" in entry.name:
            raise ImageError(f"memfd.img: inode {entry.inode_id} has a name that no memfd can have")
        if entry.size >= 1 << 63:
            raise ImageError(f"memfd.img: inode {entry.inode_id} has {entry.size} bytes, more than any file")
        where = f"memfd {entry.name}"
        if entry.hugetlb_flag:
            findings.append(Finding(where, "huge pages", "reservations of huge pages are not restored yet"))
        if entry.seals & ~_KNOWN_SEALS:
            findings.append(Finding(where, f"seals {entry.seals:#x}", "this version does not know them"))
    return findings


class MemfdStage:
    """memfds being made: each inode once, opened as often as there are descriptions."""

    def __init__(self, entries: Iterable[pb.memfd_inode_entry], fill_object: FillObject) -> None:
        self._entries = {int(entry.inode_id): entry for entry in entries}
        self._fill = fill_object
        self._handles: dict[int, int] = {}
        self._given: set[int] = set()

    def open(self, inode_id: int, flags: int, *, for_mapping: bool = False) -> int:
        """A description of the inode with ``flags``. The first writable one is the memfd's own, as it once was."""
        handle = self._handle(inode_id)
        if flags & os.O_ACCMODE == os.O_RDWR and inode_id not in self._given and not for_mapping:
            self._given.add(inode_id)
            fcntl.fcntl(handle, fcntl.F_SETFL, flags & (os.O_NONBLOCK | os.O_APPEND | os.O_NOATIME))
            return os.dup(handle)
        keep = os.O_ACCMODE | os.O_NONBLOCK | os.O_APPEND | os.O_NOATIME | os.O_PATH
        return fdinfo.reopen(handle, flags & keep)

    def _handle(self, inode_id: int) -> int:
        handle = self._handles.get(inode_id)
        if handle is None:
            entry = self._entries.get(inode_id)
            if entry is None:
                raise ImageError(f"memfd.img: no inode {inode_id}, which files.img names")
            flags = os.MFD_CLOEXEC | (0 if entry.seals == F_SEAL_SEAL else os.MFD_ALLOW_SEALING)
            handle = self._handles[inode_id] = os.memfd_create(entry.name, flags)
            os.ftruncate(handle, entry.size)
            self._fill(handle, entry.shmid, entry.size)
        return handle

    def finish(self) -> None:
        """When all descriptions are open: owner, mode, and the seals that do not disturb the tree's mappings."""
        for inode_id, handle in self._handles.items():
            entry = self._entries[inode_id]
            have = os.fstat(handle)
            if (have.st_uid, have.st_gid) != (entry.uid, entry.gid):
                os.fchown(handle, entry.uid, entry.gid)
            if entry.HasField("mode"):
                os.fchmod(handle, stat.S_IMODE(entry.mode))
            if not entry.seals & F_SEAL_FUTURE_WRITE:
                self._seal(handle, entry, entry.seals)

    def seal(self) -> None:
        """When all mappings of the tree are there: the seals that would have forbidden some of them."""
        for inode_id, handle in self._handles.items():
            entry = self._entries[inode_id]
            if entry.seals & F_SEAL_FUTURE_WRITE:
                self._seal(handle, entry, entry.seals)

    def _seal(self, handle: int, entry: pb.memfd_inode_entry, seals: int) -> None:
        missing = seals & ~fcntl.fcntl(handle, fcntl.F_GET_SEALS)
        if not missing:
            return
        try:
            fcntl.fcntl(handle, fcntl.F_ADD_SEALS, missing)
        except OSError as error:
            raise GpurestoreError(f"cannot seal memfd {entry.name} again: {os.strerror(error.errno or 0)}") from error

    def close(self) -> None:
        """Drop our handles."""
        for handle in self._handles.values():
            os.close(handle)
        self._handles.clear()
