"""File locks: flock and open-file-description locks belong to a description, POSIX locks to a descriptor table.

The first two are taken again by the main process on the staged description; a POSIX lock must be taken by the task
itself, after its last unneeded descriptor is closed, because closing any descriptor of a file drops the owner's locks
on that file. Leases are refused: breaking one needs the task to answer while it is frozen.
"""

from __future__ import annotations

import fcntl
import struct
from collections.abc import Iterable

from gpurestore.batch import Call, Data
from gpurestore.errors import Finding
from gpurestore.images import pb
from gpurestore.syscalls import NR
from gpurestore.tasks.fdinfo import LockLine, OpenFile

FL_POSIX, FL_FLOCK, FL_OFD = 1, 2, 4
_F_SETLK = 6
_F_OFD_SETLK = 37
_RDLCK, _WRLCK = 0, 1
_KINDS = {"POSIX": FL_POSIX, "FLOCK": FL_FLOCK, "OFDLCK": FL_OFD}
_FLOCK = struct.Struct("=hhxxxxqqixxxx")  # struct flock: type, whence, start, length, pid


class LockDump:
    """The locks of a tree, each once."""

    def __init__(self) -> None:
        self._seen: set[tuple[int, int, LockLine]] = set()
        self.entries: list[pb.file_lock_entry] = []

    def add(self, file: OpenFile, pid: int, fd: int, file_id: int, findings: list[Finding]) -> None:
        """Take the lock lines that fdinfo shows for descriptor ``fd`` of task ``pid``."""
        for line in file.info.locks:
            kind = _KINDS.get(line.kind)
            if kind is None:
                findings.append(Finding(file.where, f"{line.kind.lower()} on {file.path}", "not carried"))
                continue
            holder = pid if kind == FL_POSIX else 0  # the others belong to the description, whoever shows them
            if (holder, file_id, line) not in self._seen:
                self._seen.add((holder, file_id, line))
                self.entries.append(_entry(line, kind, pid, fd))


def _entry(line: LockLine, kind: int, pid: int, fd: int) -> pb.file_lock_entry:
    length = 0 if line.end is None else line.end + 1 - line.start
    lock_type = _WRLCK if line.write else _RDLCK
    return pb.file_lock_entry(flag=kind, type=lock_type, pid=pid, fd=fd, start=line.start, len=length)


def unsupported(entries: Iterable[pb.file_lock_entry]) -> list[Finding]:
    """Locks of foreign images that we cannot take."""
    return [
        Finding(f"pid {entry.pid}, fd {entry.fd}", f"file lock of kind {entry.flag}", "not restored")
        for entry in entries
        if entry.flag not in (FL_POSIX, FL_FLOCK, FL_OFD) or entry.type not in (_RDLCK, _WRLCK)
    ]


def take(fd: int, entry: pb.file_lock_entry) -> None:
    """Take a lock that belongs to the description behind ``fd``. Raises OSError if somebody else holds it."""
    if entry.flag == FL_FLOCK:
        fcntl.flock(fd, (fcntl.LOCK_EX if entry.type == _WRLCK else fcntl.LOCK_SH) | fcntl.LOCK_NB)
    elif entry.flag == FL_OFD:
        fcntl.fcntl(fd, _F_OFD_SETLK, _flock(entry))


def plan(entries: Iterable[pb.file_lock_entry], pid: int) -> list[Call]:
    """The POSIX locks of task ``pid``, to run in it after every unneeded descriptor is closed."""
    return [
        Call(NR.FCNTL, (entry.fd, _F_SETLK, Data(_flock(entry))), f"lock file of descriptor {entry.fd}")
        for entry in entries
        if entry.pid == pid and entry.flag == FL_POSIX
    ]


def _flock(entry: pb.file_lock_entry) -> bytes:
    return _FLOCK.pack(entry.type, 0, entry.start, entry.len, 0)
