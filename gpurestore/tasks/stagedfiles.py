"""The restore side of files: every description of the images, opened once in the main process ("staged").

Staged descriptors lie above every number that a task needs. Tasks inherit them when they are forked, bring them to
their numbers (descriptors.plan_descriptors), map them, and close the rest. Order of use:

    check()        all that stands in the way; changes nothing
    assign(base)   numbers, without opening: enough for --dry-run
    open_all(base) opens, refills, makes again what is missing
    seal()         when every task has its mappings
    plan_late(pid) runs in each task after plan_close_staged
    close()        before the tree is released: ends of pipes that nobody holds must not stay open here
    abort()        instead, after a failure: also removes what open_all made
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import resource
import stat
import struct
from collections.abc import Container, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from gpurestore.batch import Call, Data
from gpurestore.core import Cancel
from gpurestore.errors import Finding, GpurestoreError, ImageError
from gpurestore.images import pb
from gpurestore.images.folder import ImageFolder
from gpurestore.syscalls import NR
from gpurestore.tasks import eventfds, external, fdinfo, filelocks, fs, ghosts, memfds, pipes, regfiles, tmpfs
from gpurestore.tasks.bulkcopy import Cancelled, never
from gpurestore.tasks.filefacts import FileFacts
from gpurestore.tasks.fileuses import FileUses

if TYPE_CHECKING:
    from gpurestore.tasks.memory import Ways

_SPARE_DESCRIPTORS = 64  # that the tool itself may need on top
_KEEP_ID = 0xFFFFFFFF  # the saved user id stays, so that the way back is open


class StagedFiles:
    """All file descriptions of an image folder."""

    def __init__(
        self,
        folder: ImageFolder,
        openers: external.Openers | None = None,
        ways: Ways | None = None,
        cancel: Cancel | None = None,
        mms: Mapping[int, pb.mm_entry] | None = None,
    ) -> None:
        """Reads the images; raises ImageError where they contradict themselves.

        ``openers`` gives back what device plugins claimed. ``ways`` says how the memory of memfds comes in, ``cancel``
        is polled while contents are copied. ``mms`` are those of all living tasks, for callers that have them.
        """
        self._folder = folder
        self._ways, self._cancel = ways, cancel
        self._cancelled: Cancelled = never if cancel is None else lambda: cancel.is_set
        self._openers = openers
        self._redirects: dict[int, dict[int, tuple[int, int]]] = {}
        self.uses = FileUses(folder, mms)
        extension = folder.manifest.extension if folder.manifest is not None else {}
        self._facts = facts = FileFacts.from_json(extension.get("files"))
        self._pipe_data = pipes.data_by_id(_payloads(folder, "pipes-data"), facts.packets)
        self._fifo_data = pipes.data_by_id(_payloads(folder, "fifo-data"), facts.packets)
        self._remaps: dict[int, pb.remap_file_path_entry] = {r.orig_id: r for r in _messages(folder, "remap-fpath")}
        self._locks: list[pb.file_lock_entry] = _messages(folder, "filelocks")
        self._inodes: list[pb.memfd_inode_entry] = _messages(folder, "memfd")
        self._pipes = pipes.PipeStage(self._pipe_data, facts.pipes)
        self._memfds = memfds.MemfdStage(self._inodes, self._fill_memfd)
        self._ghosts = ghosts.GhostStage(folder, self._cancelled)
        self._fifos_seen: set[int] = set()
        self._put_back: set[int] = set()
        self._created: list[str] = []
        self._numbers: dict[tuple[int, bool], int] = {}
        self._opened: list[int] = []

    def _fill_memfd(self, fd: int, shmid: int, size: int) -> None:
        from gpurestore.tasks import memory

        ways = self._ways or memory.DEFAULT_WAYS
        memory.fill_file(self._folder, shmid, fd, size, ways=ways, cancel=self._cancel)

    def _check_memfd(self, inode: pb.memfd_inode_entry) -> None:
        from gpurestore.tasks import memory

        memory.plan_object(self._folder, inode.shmid, inode.size)

    # ---- checks ----

    def check(self) -> list[Finding]:
        """Everything that would keep the files from being opened. Raises ImageError where the images are damaged."""
        with _only_possible_values():
            return self._check_all()

    def _check_all(self) -> list[Finding]:
        findings = memfds.check(self._inodes) + filelocks.unsupported(self._locks)
        for file_id, for_mapping in self.uses.wanted():
            findings += self._check_one(
                self.uses.entry(file_id), self.uses.flags(file_id, for_mapping), self.uses.where(file_id)
            )
        for pid, entry in self.uses.roots():
            findings += fs.check_root(f"pid {pid}", self._path(entry))
        for inode in self._inodes:
            if inode.size:
                self._check_memfd(inode)
        for data in (*self._pipe_data.values(), *self._fifo_data.values()):
            findings += pipes.check_capacity(data)
        return findings + self._check_limit()

    def _check_one(self, entry: pb.file_entry, flags: int, where: str) -> list[Finding]:
        match entry.type:
            case pb.REG:
                return self._check_regular(entry.reg, flags, where)
            case pb.FIFO:
                return self._check_fifo(entry.fifo, where)
            case pb.PIPE | pb.EVENTFD | pb.MEMFD:
                return []
            case pb.EXT if self._openers is not None:
                return []
            case pb.EXT:
                return [Finding(where, "file of a device plugin", "no plugin is loaded that could give it back")]
        name = pb.fd_types.Name(entry.type)
        return [
            Finding(
                where, f"file of kind {name}", "this version restores files, directories, pipes, eventfds and memfds"
            )
        ]

    def _check_regular(self, entry: pb.reg_file_entry, flags: int, where: str) -> list[Finding]:
        remap = self._remaps.get(entry.id)
        if remap is None:
            carried = entry.id in self._facts.tmpfs
            if carried:
                ghosts.read_content(self._folder, self._facts.tmpfs[entry.id])
                if findings := tmpfs.check(where, regfiles.safe_name(entry)):
                    return findings
            return regfiles.check(entry, flags, where, self._facts.rdev.get(entry.id), carried=carried)
        if remap.remap_type != pb.GHOST:
            kind = pb.remap_type.Name(remap.remap_type).lower()
            return [Finding(where, f"file {entry.name}", f"it was left under another name by CRIU ({kind} remap)")]
        ghosts.read_content(self._folder, remap.remap_id)
        return ghosts.check_place(where, regfiles.safe_name(entry))

    def _check_fifo(self, entry: pb.fifo_entry, where: str) -> list[Finding]:
        regular = self._fifo_file(entry)
        name = regfiles.safe_name(regular)
        if regular.id in self._remaps:
            return self._check_regular(regular, os.O_RDONLY, where)
        try:
            mode = os.stat(name).st_mode
        except OSError as error:
            return [Finding(where, f"FIFO {name}", os.strerror(error.errno or 0))]
        return [] if stat.S_ISFIFO(mode) else [Finding(where, f"FIFO {name}", "is no FIFO any more")]

    def _fifo_file(self, entry: pb.fifo_entry) -> pb.reg_file_entry:
        return self.uses.regular(entry.regf_id if entry.HasField("regf_id") else entry.id)

    def _check_limit(self) -> list[Finding]:
        needed = self.uses.keep_from + len(self.uses.wanted()) + _SPARE_DESCRIPTORS
        hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        if hard == resource.RLIM_INFINITY or needed <= hard:
            return []
        why = f"staging the files takes {needed}; raise the hard limit of the shell that restores (ulimit -Hn)"
        return [Finding("the tool", f"at most {hard} descriptors", why)]

    def _path(self, entry: pb.file_entry) -> str:
        return regfiles.safe_name(entry.reg)

    # ---- numbers ----

    @property
    def keep_from(self) -> int:
        """The lowest number above all that tasks need: where staging may begin."""
        return self.uses.keep_from

    def assign(self, base_fd: int) -> None:
        """Give every staged file a number from ``base_fd`` on."""
        self._numbers = {use: base_fd + index for index, use in enumerate(self.uses.wanted())}
        free = base_fd + len(self._numbers)
        for pid, vmas in self.uses.claimed.items():
            self._redirects[pid] = {vma.start: (free + index, vma.pgoff) for index, vma in enumerate(vmas)}
            free += len(vmas)

    def fd_of(self, file_id: int) -> int:
        """The staged descriptor of a description, a directory, ..."""
        return self._number(file_id, for_mapping=False)

    def fd_of_mapping(self, file_id: int) -> int:
        """The staged descriptor to map, or to give to PR_SET_MM_EXE_FILE."""
        return self._number(file_id, for_mapping=True)

    def _number(self, file_id: int, *, for_mapping: bool) -> int:
        try:
            return self._numbers[file_id, for_mapping]
        except KeyError:
            raise ImageError(f"files.img: no file {file_id}, which another image names") from None

    def redirects_of(self, pid: int) -> dict[int, tuple[int, int]]:
        """Descriptor and offset of every mapping of a task that a device plugin claimed, by its start."""
        return self._redirects.get(pid, {})

    def is_our_root(self, file_id: int) -> bool:
        """Whether ``file_id`` is the root directory that this process has, too."""
        return fs.is_our_root_path(self._path(self.uses.entry(file_id)))

    def entries_of(self, pid: int) -> list[pb.fdinfo_entry]:
        """The descriptor table of a task."""
        return self.uses.tables[pid]

    # ---- opening ----

    def open_all(self, base_fd: int) -> None:
        """Open everything at ``base_fd`` and above. On an error, what was done is undone before it is raised."""
        try:
            with _only_possible_values():
                self._open_all(base_fd)
        except BaseException:
            self.abort()
            raise

    def _open_all(self, base_fd: int) -> None:
        self.assign(base_fd)
        claimed = sum(map(len, self.uses.claimed.values()))
        fdinfo.raise_limit(base_fd + len(self._numbers) + claimed + _SPARE_DESCRIPTORS)
        self._stage_all(self.uses.wanted())
        for pid in self.uses.claimed:
            self._stage_claimed(pid)
        for lock in self._locks:
            self._take_lock(lock)
        self._ghosts.finish()
        self._memfds.finish()
        self._pipes.close()

    def _stage_all(self, uses: list[tuple[int, bool]]) -> None:
        """Stage ``uses``; those of plugins that want to be asked again come once more when the others are there."""
        later: list[tuple[int, bool]] = []
        for file_id, for_mapping in uses:
            try:
                self._stage(file_id, for_mapping)
            except external.RetryFile:
                later.append((file_id, for_mapping))
        if len(later) == len(uses) and later:
            raise GpurestoreError(
                f"{self.uses.where(later[0][0])}: its device plugin waits for other files, but none is left to open"
            )
        if later:
            self._stage_all(later)

    def _stage_claimed(self, pid: int) -> None:
        """Open what the claimed mappings of a task are to lead to."""
        openers = self._openers or external.Nobody()
        for vma in self.uses.claimed[pid]:
            entry = self.uses.regular(vma.shmid)
            path = regfiles.safe_name(entry)
            answer = openers.redirect_mapping(path, vma.start, vma.pgoff) or external.Redirect(vma.pgoff)
            try:
                fd = answer.fd if answer.fd >= 0 else os.open(path, regfiles.open_flags(entry.flags))
                try:
                    number = fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, self._redirects[pid][vma.start][0])
                finally:
                    os.close(fd)
            except OSError as error:
                where = f"pid {pid}, mapping {vma.start:x}-{vma.end:x}"
                raise GpurestoreError(f"{where}: cannot open {path}: {os.strerror(error.errno or 0)}") from error
            self._opened.append(number)
            self._redirects[pid][vma.start] = (number, answer.pgoff)

    def _stage(self, file_id: int, for_mapping: bool) -> None:
        entry = self.uses.entry(file_id)
        wanted = self._numbers[file_id, for_mapping]
        try:
            fd = self._open(entry, self.uses.flags(file_id, for_mapping), for_mapping)
            try:
                if entry.type == pb.REG and not for_mapping and self.uses.is_descriptor(file_id):
                    regfiles.set_position(fd, entry.reg)
                elif entry.type == pb.MEMFD and not for_mapping:
                    os.lseek(fd, entry.memfd.pos, os.SEEK_SET)
                number = fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, wanted)
            finally:
                os.close(fd)
        except OSError as error:
            name = entry.reg.name if entry.type == pb.REG else pb.fd_types.Name(entry.type).lower()
            raise GpurestoreError(
                f"{self.uses.where(file_id)}: cannot open {name}: {os.strerror(error.errno or 0)}"
            ) from error
        self._opened.append(number)
        self._numbers[file_id, for_mapping] = number

    def _open(self, entry: pb.file_entry, flags: int, for_mapping: bool) -> int:
        match entry.type:
            case pb.REG:
                return self._open_regular(entry.reg, flags)
            case pb.PIPE:
                return self._pipes.open(entry.pipe)
            case pb.FIFO:
                return self._open_fifo(entry.fifo)
            case pb.EVENTFD:
                return eventfds.open_entry(entry.efd, self._facts.semaphores)
            case pb.MEMFD:
                return self._memfds.open(entry.memfd.inode_id, flags, for_mapping=for_mapping)
            case pb.EXT if self._openers is not None:
                is_socket = entry.id in self._facts.unix_sockets
                claim = external.Claim.UNIX_SOCKET if is_socket else external.Claim.FILE
                return self._openers.open_file(entry.id, claim)
        raise OSError(errno.EOPNOTSUPP, "")

    def _open_regular(self, entry: pb.reg_file_entry, flags: int) -> int:
        remap = self._remaps.get(entry.id)
        if remap is not None:
            name = regfiles.safe_name(entry)
            return self._ghosts.open(remap.remap_id, name, entry.flags, regfiles.open_flags(flags))
        ghost_id = self._facts.tmpfs.get(entry.id)
        if ghost_id is not None and ghost_id not in self._put_back:
            tmpfs.put_back(self._folder, ghost_id, regfiles.safe_name(entry), self._created, self._cancelled)
            self._put_back.add(ghost_id)
        return regfiles.open_entry(entry, flags)

    def _open_fifo(self, entry: pb.fifo_entry) -> int:
        regular = self._fifo_file(entry)
        path = regfiles.safe_name(regular)
        remap = self._remaps.get(regular.id)
        if remap is not None:
            path = f"/proc/self/fd/{self._ghosts.handle(remap.remap_id, path, regular.flags)}"
        first = entry.pipe_id not in self._fifos_seen
        self._fifos_seen.add(entry.pipe_id)
        return pipes.open_fifo(path, regular.flags, self._fifo_data.get(entry.pipe_id), first=first)

    def _take_lock(self, lock: pb.file_lock_entry) -> None:
        if lock.flag == filelocks.FL_POSIX:
            return
        file_id = self.uses.file_of(lock.pid, lock.fd)
        try:
            filelocks.take(self.fd_of(file_id), lock)
        except OSError as error:
            where = f"pid {lock.pid}, fd {lock.fd}"
            raise GpurestoreError(f"{where}: cannot lock the file again: {os.strerror(error.errno or 0)}") from error

    # ---- after the tree is there ----

    def seal(self) -> None:
        """Put on the seals of memfds that had to wait for the tree's mappings."""
        self._memfds.seal()

    def plan_late(self, pid: int) -> list[Call]:
        """POSIX locks and receivers of signals about descriptors: to run in the task when all tasks are there, after
        plan_close_staged, and before the task gives up the rights that the restore gave it."""
        with _only_possible_values():
            calls = filelocks.plan(self._locks, pid)
            for entry in self.entries_of(pid):
                if self.uses.first_user(entry.id) == (pid, entry.fd):
                    calls += _plan_owner(entry.fd, self.uses.owner(entry.id), self.uses.pids)
            return calls

    def close(self) -> None:
        """Close every staged descriptor of this process."""
        self._pipes.close()
        self._ghosts.close()
        self._memfds.close()
        for fd in self._opened:
            os.close(fd)
        self._opened.clear()

    def abort(self) -> None:
        """Close everything and remove the files that open_all made."""
        self.close()
        for path in self._created:
            with contextlib.suppress(OSError):
                os.unlink(path)
        self._created.clear()


@contextlib.contextmanager
def _only_possible_values() -> Iterator[None]:
    """Numbers out of images go to the kernel through Python, which refuses what does not fit the kernel's types."""
    try:
        yield
    except (OverflowError, struct.error) as error:
        raise ImageError(f"files.img, or one that belongs to it: damaged: an impossible number ({error})") from error


def _plan_owner(fd: int, owner: pb.fown_entry | None, pids: Container[int]) -> list[Call]:
    """F_SETSIG, and F_SETOWN_EX as the user who once said so: the kernel remembers who that was.

    An owner that is neither in the tree nor alive gets no signals, as before.
    """
    if owner is None:
        return []
    calls = []
    if owner.signum:
        calls.append(Call(NR.FCNTL, (fd, fcntl.F_SETSIG, owner.signum), f"signal of descriptor {fd}"))
    if owner.pid and (owner.pid in pids or os.path.exists(f"/proc/{owner.pid}")):
        what = f"owner of descriptor {fd}"
        own = (os.getuid(), os.geteuid())
        other = (owner.uid, owner.euid) != own
        if other:
            calls.append(Call(NR.SETRESUID, (owner.uid, owner.euid, _KEEP_ID), what))
        who = Data(struct.pack("=ii", owner.pid_type, owner.pid))
        calls.append(Call(NR.FCNTL, (fd, fdinfo.F_SETOWN_EX, who), what))
        if other:
            calls.append(Call(NR.SETRESUID, (*own, _KEEP_ID), what))
    return calls


def _messages(folder: ImageFolder, kind: str) -> list[Any]:
    return folder.read(kind) if folder.has(kind) else []


def _payloads(folder: ImageFolder, kind: str) -> list[tuple[Any, bytes]]:
    return folder.read_payloads(kind) if folder.has(kind) else []
