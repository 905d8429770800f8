"""Descriptor tables: what every number stands for, and which descriptors share one file description.

Dump: FileTable looks at every descriptor of every task once, gives each description, mapped file, program and directory
an id, and writes files.img with all that belongs to it. Restore: see stagedfiles.py for the descriptions; here are the
plans that bring them to their numbers.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from gpurestore.batch import Call
from gpurestore.errors import CoreError, Finding, ImageError
from gpurestore.images import pb
from gpurestore.syscalls import NR
from gpurestore.tasks import eventfds, external, fdinfo, filelocks, memfds, mounts, pipes, regfiles, tmpfs
from gpurestore.tasks.bulkcopy import Cancelled, never
from gpurestore.tasks.fdinfo import FdInfo, OpenFile
from gpurestore.tasks.filefacts import FileFacts
from gpurestore.tasks.filekinds import FileKind, classify, is_unix
from gpurestore.tasks.ghosts import GhostDump
from gpurestore.tasks.hiddenfiles import HiddenFiles

if TYPE_CHECKING:
    from gpurestore.images.writer import ImageWriter
    from gpurestore.tasks.maps import Vma

FD_CLOEXEC = 1
KCMP_FILE = 0
MAX_FD = 1 << 30
_U32_MAX = (1 << 32) - 1


class TaskLike(Protocol):
    """What of a FrozenTask is needed here."""

    @property
    def pid(self) -> int: ...

    @property
    def pidfd(self) -> int: ...

    def read_memory(self, address: int, size: int) -> bytes: ...


class Kernel(Protocol):
    """The two questions that only system calls answer; core.py answers them, tests may too."""

    def kcmp(self, pid1: int, pid2: int, kind: int, idx1: int, idx2: int) -> int: ...

    def pidfd_getfd(self, pidfd: int, fd: int) -> int: ...


class _Descriptions:
    """Which descriptors share a description. Only such that agree in inode, flags and position are compared at all."""

    def __init__(self, kernel: Kernel) -> None:
        self._kernel = kernel
        self._groups: dict[tuple[int, ...], list[tuple[int, int, int]]] = {}

    def find(self, pid: int, fd: int, file: OpenFile) -> tuple[int, Callable[[int], None]]:
        """The id of a known description, or 0; and what to call with the id if it is new. kcmp gives an order."""
        key = (*file.key, file.info.mnt_id, file.info.flags, file.info.pos)
        group = self._groups.setdefault(key, [])
        low, high = 0, len(group)
        while low < high:
            middle = (low + high) // 2
            other_pid, other_fd, file_id = group[middle]
            order = self._kernel.kcmp(pid, other_pid, KCMP_FILE, fd, other_fd)
            if order == 0:
                return file_id, lambda _: None
            low, high = (low, middle) if order == 1 else (middle + 1, high)
        return 0, lambda new_id: group.insert(low, (pid, fd, new_id))


class FileTable:
    """The files of a tree at dump. Order of use: add_* for all tasks, finish, write if nothing was found, close."""

    def __init__(
        self, findings: list[Finding], kernel: Kernel | None = None, claims: external.Claims | None = None
    ) -> None:
        """``claims`` is offered what nothing here can carry."""
        if kernel is None:
            from gpurestore import core

            kernel = core
        fdinfo.raise_limit()
        self._kernel = kernel
        self._claims = claims or external.Nobody()
        self._findings = findings
        self._mounts = mounts.read()
        self._entries: list[pb.file_entry] = []
        self._remaps: list[pb.remap_file_path_entry] = []
        self._next_id = 1
        self._descriptions = _Descriptions(kernel)
        self._specials: dict[tuple[Any, ...], int] = {}
        self._facts = FileFacts()
        self._hidden = HiddenFiles()
        self._ghosts, self._pipes = GhostDump(), pipes.PipeDump()
        self._memfds, self._locks = memfds.MemfdDump(), filelocks.LockDump()

    # ---- what the tree holds ----

    def add_descriptors(self, task: TaskLike) -> list[pb.fdinfo_entry]:
        """The descriptor table of ``task``, for fdinfo-FILES_ID.img."""
        numbers = sorted(int(name) for name in os.listdir(f"/proc/{task.pid}/fd"))
        entries = (self._add_descriptor(task, fd) for fd in numbers)
        return [entry for entry in entries if entry is not None]

    def _add_descriptor(self, task: TaskLike, fd: int) -> pb.fdinfo_entry | None:
        where = f"pid {task.pid}, fd {fd}"
        try:
            own = self._kernel.pidfd_getfd(task.pidfd, fd)
        except (CoreError, OSError) as error:
            self._findings.append(Finding(where, "descriptor", f"cannot be looked at: {error}"))
            return None
        try:
            info = fdinfo.read(task.pid, fd)
            file = fdinfo.open_file(where, own, info)
            file_id, remember = self._descriptions.find(task.pid, fd, file)
            if not file_id:
                file_id = self._add_file(file, may_claim=True)
                remember(file_id)
            if not file_id:
                return None
            self._locks.add(file, task.pid, fd, file_id, self._findings)
            kind = self._entries_by_id(file_id).type
            return pb.fdinfo_entry(id=file_id, flags=FD_CLOEXEC if info.cloexec else 0, type=kind, fd=fd)
        finally:
            os.close(own)

    def add_mapping(self, task: TaskLike, vma: Vma) -> int:
        """The id of the file behind a mapping; 0 when it cannot be dumped (a finding says so)."""
        writable = vma.shared and "sh" in vma.flags  # else the file was opened for reading only
        where = vma.where(task.pid)
        flags = os.O_RDWR if writable else os.O_RDONLY
        link = f"/proc/{task.pid}/map_files/{vma.start:x}-{vma.end:x}"
        try:
            own = os.open(link, os.O_PATH | os.O_CLOEXEC)
        except PermissionError:
            return self._add_mapping_by_path(task, vma, where, flags)
        except OSError as error:
            return self._refuse(where, f"mapped file {vma.path}", f"cannot be looked at: {error.strerror}")
        return self._add_special(where, own, flags)

    def _add_mapping_by_path(self, task: TaskLike, vma: Vma, where: str, flags: int) -> int:
        """Without CAP_CHECKPOINT_RESTORE map_files stays closed: the path must do, if it leads to the same inode."""
        if not vma.deleted:
            try:
                own = os.open(vma.path, os.O_PATH | os.O_CLOEXEC)
            except OSError as error:
                return self._refuse(where, f"mapped file {vma.path}", error.strerror or "cannot be opened")
            if os.fstat(own).st_ino == vma.ino:
                return self._add_special(where, own, flags)
            os.close(own)
        return self._hidden.add(task, vma, flags, self._append)

    def claim_mapping(self, task: TaskLike, vma: Vma, refused: Finding | None) -> int:
        """The id of the file behind a mapping that a plugin claims; 0 when none does."""
        found = external.offer_mapping(self._claims, task.pid, vma, refused)
        if found is None:
            return 0
        flags = os.O_RDWR if vma.shared and "mw" in vma.flags else os.O_RDONLY
        key = ("claimed", found.st_dev, found.st_ino, flags)
        if key not in self._specials:
            self._specials[key] = self._append(lambda i: external.collect_mapped(vma.path, i, flags, found))
        return self._specials[key]

    def add_exe(self, task: TaskLike) -> int:
        """The id of the program that ``task`` runs."""
        return self._add_link(task, "exe", os.O_RDONLY)

    def add_directory(self, task: TaskLike, which: str) -> int:
        """The id of the directory behind /proc/PID/cwd or root. Searching it is enough: no right to read is needed."""
        return self._add_link(task, which, os.O_PATH | os.O_DIRECTORY)

    def _add_link(self, task: TaskLike, which: str, flags: int) -> int:
        where = f"pid {task.pid}, {which}"
        try:
            own = os.open(f"/proc/{task.pid}/{which}", os.O_PATH | os.O_CLOEXEC)
        except OSError as error:
            return self._refuse(where, "file", f"cannot be looked at: {error.strerror}")
        return self._add_special(where, own, flags)

    # ---- one file ----

    def _add_special(self, where: str, own: int, flags: int) -> int:
        """A file that is held without a descriptor; takes over ``own``, an O_PATH handle."""
        try:
            handle = fdinfo.read(os.getpid(), own)
            info = FdInfo(0, flags, cloexec=False, mnt_id=handle.mnt_id, ino=handle.ino, locks=(), fields={})
            link = os.readlink(f"/proc/self/fd/{own}")
            no_owner = pb.fown_entry(uid=0, euid=0, signum=0, pid_type=0, pid=0)
            file = OpenFile(where, own, os.fstat(own), link, info, no_owner)
            key = (*file.key, handle.mnt_id, link, flags)
            if key not in self._specials:
                self._specials[key] = self._add_file(file)
            return self._specials[key]
        finally:
            os.close(own)

    def _add_file(self, file: OpenFile, *, may_claim: bool = False) -> int:
        """Give ``file`` an id and an entry; 0 when it is refused. Only descriptors can be claimed by plugins."""
        kind = classify(file, self._mounts)
        if isinstance(kind, Finding):
            claim = self._claims.claim_file(file.fd, self._next_id, is_unix_socket=is_unix(file)) if may_claim else None
            if claim is not None:
                if claim is external.Claim.UNIX_SOCKET:
                    self._facts.unix_sockets.append(self._next_id)
                return self._append(lambda i: external.collect_file(file, i))
            self._findings.append(kind)
            return 0
        match kind:
            case FileKind.REGULAR | FileKind.CHARDEV:
                return self._add_regular(file)
            case FileKind.FIFO:
                regular = self._add_regular(file)
                pipe_id = self._pipes.add(file) if regular else 0
                return self._append(lambda i: pipes.collect_fifo(i, pipe_id, regular)) if regular else 0
            case FileKind.PIPE:
                pipe_id = self._pipes.add(file)
                return self._append(lambda i: pipes.collect(file, i, pipe_id))
            case FileKind.EVENTFD:
                file_id = self._append(lambda i: eventfds.collect(file, i))
                if eventfds.is_semaphore(file):
                    self._facts.semaphores.append(file_id)
                return file_id
            case FileKind.MEMFD:
                inode_id = self._memfds.add(file, self._findings)
                return self._append(lambda i: memfds.collect(file, i, inode_id))

    def _append(self, make: Callable[[int], pb.file_entry]) -> int:
        file_id = self._next_id
        self._next_id += 1
        self._entries.append(make(file_id))
        return file_id

    def _entries_by_id(self, file_id: int) -> pb.file_entry:
        return self._entries[file_id - 1]

    def _add_regular(self, file: OpenFile) -> int:
        located = regfiles.locate(file)
        if isinstance(located, Finding):
            self._findings.append(located)
            return 0
        file_id = self._append(lambda i: pb.file_entry(type=pb.REG, id=i, reg=regfiles.collect(file, i, located.name)))
        if file.stat.st_rdev and not file.info.flags & os.O_PATH:
            self._facts.rdev[file_id] = file.stat.st_rdev
        writable = file.info.flags & os.O_ACCMODE != os.O_RDONLY
        try:
            if located.ghost:
                ghost_id = self._ghosts.add(file)
                remap = pb.remap_file_path_entry(orig_id=file_id, remap_id=ghost_id, remap_type=pb.GHOST)
                self._remaps.append(remap)
            elif tmpfs.is_volatile(file, self._mounts, writable=writable):
                self._facts.tmpfs[file_id] = self._ghosts.add(file)
        except OSError as error:
            return self._refuse(file.where, f"file {located.name}", f"its content cannot be read: {error.strerror}")
        return file_id

    def _refuse(self, where: str, what: str, why: str) -> int:
        self._findings.append(Finding(where, what, why))
        return 0

    # ---- out ----

    def finish(self) -> None:
        """Look at what only shows when everything was added; findings go where all others went."""
        self._remaps += self._hidden.finish(self._ghosts, self._findings)
        self._pipes.finish(self._findings)

    def write(self, writer: ImageWriter, save_object: memfds.SaveObject, cancelled: Cancelled = never) -> None:
        """Write files.img and what belongs to it. The tree must still be frozen: contents are read now."""
        writer.write("files", self._entries)
        if self._remaps:
            writer.write("remap-fpath", self._remaps)
        if self._locks.entries:
            writer.write("filelocks", self._locks.entries)
        for kind, fifo in (("pipes-data", False), ("fifo-data", True)):
            data = self._pipes.data(fifo=fifo)
            self._facts.packets |= {p.pipe_id: [len(chunk) for chunk in p.chunks] for p in data if p.packets}
            if data:
                writer.write(
                    kind, [pipes.data_entry(pipe) for pipe in data], payloads=[b"".join(p.chunks) for p in data]
                )
        self._ghosts.write(writer, cancelled)
        if inodes := self._memfds.entries():
            writer.write("memfd", inodes)
            self._memfds.save(save_object)
        self._facts.pipes = self._pipes.owners()
        writer.extension["files"] = self._facts.to_json()

    def close(self) -> None:
        """Drop every duplicate. To be called however the dump ends, before the tree goes on."""
        for part in (self._ghosts, self._pipes, self._memfds):
            part.close()


# ---- restore ----


def plan_descriptors(entries: Sequence[pb.fdinfo_entry], fd_of: Callable[[int], int], keep_from: int) -> list[Call]:
    """Bring the staged descriptions to their numbers and close everything else below ``keep_from``."""
    ordered = sorted(entries, key=lambda entry: entry.fd)
    calls = []
    free = 0
    for entry in ordered:
        if entry.fd < free or entry.fd >= keep_from:
            raise ImageError(f"fdinfo image: descriptor {entry.fd} twice, or beyond {keep_from - 1}")
        if entry.fd > free:
            calls.append(_close(free, entry.fd - 1))
        cloexec = os.O_CLOEXEC if entry.flags & FD_CLOEXEC else 0
        calls.append(Call(NR.DUP3, (fd_of(entry.id), entry.fd, cloexec), f"descriptor {entry.fd}", want=entry.fd))
        free = entry.fd + 1
    if free < keep_from:
        calls.append(_close(free, keep_from - 1))
    return calls


def plan_close_staged(keep_from: int) -> list[Call]:
    """Close every staged descriptor of a task, when nothing needs them any more."""
    return [_close(keep_from, _U32_MAX)]


def _close(first: int, last: int) -> Call:
    return Call(
        NR.CLOSE_RANGE,
        (first, last, 0),
        f"close descriptors {first} to {last}" if last < _U32_MAX else f"close descriptors from {first}",
    )
