"""What the kernel tells about one open file description: /proc/PID/fdinfo/N, the link beside it, and fcntl.

Everything here is read from outside the task, through a duplicate of the description (pidfd_getfd), so that nothing of
the task is changed: a duplicate shares position and flags, and reading them moves neither.
"""

from __future__ import annotations

import fcntl
import os
import resource
import struct
from collections.abc import Mapping
from typing import NamedTuple

from gpurestore.images import pb

F_GETOWN_EX = 16
F_SETOWN_EX = 15
F_GETOWNER_UIDS = 17
O_TMPFILE_BIT = 0o20000000  # __O_TMPFILE; O_TMPFILE is this and O_DIRECTORY

_DELETED = " (deleted)"


class LockLine(NamedTuple):
    """One ``lock:`` line: ``kind`` is FLOCK, POSIX, OFDLCK or LEASE; ``end`` is None for "to the end of the file"."""

    kind: str
    write: bool
    owner: int
    start: int
    end: int | None


class FdInfo(NamedTuple):
    """A parsed fdinfo file. ``flags`` are the description's, without the close-on-exec that the kernel mixes in."""

    pos: int
    flags: int
    cloexec: bool
    mnt_id: int
    ino: int
    locks: tuple[LockLine, ...]
    fields: Mapping[str, str]


class OpenFile(NamedTuple):
    """A file that the tree holds, as a dump sees it. ``fd`` is the dump's own duplicate of it."""

    where: str
    fd: int
    stat: os.stat_result
    link: str
    info: FdInfo
    fown: pb.fown_entry

    @property
    def key(self) -> tuple[int, int]:
        """Names the inode."""
        return self.stat.st_dev, self.stat.st_ino

    @property
    def path(self) -> str:
        """The link without the mark that the kernel appends to removed names."""
        return self.link.removesuffix(_DELETED) if self.marked_deleted else self.link

    @property
    def marked_deleted(self) -> bool:
        """Whether the link ends like one of a removed name (a living name may end so, too)."""
        return self.link.endswith(_DELETED)


def parse(text: str) -> FdInfo:
    """Parse the content of a fdinfo file; raises ValueError where it is not one."""
    fields: dict[str, str] = {}
    locks = []
    for line in text.splitlines():
        name, colon, value = line.partition(":")
        if name == "lock":
            locks.append(_parse_lock(value))
        elif colon:
            fields.setdefault(name.strip(), value.strip())
    try:
        flags = int(fields["flags"], 8)
        return FdInfo(
            pos=int(fields["pos"]) & ((1 << 64) - 1),
            flags=flags & ~os.O_CLOEXEC,
            cloexec=bool(flags & os.O_CLOEXEC),
            mnt_id=int(fields.get("mnt_id", "-1")),
            ino=int(fields.get("ino", "0")),
            locks=tuple(locks),
            fields=fields,
        )
    except KeyError as error:
        raise ValueError(f"fdinfo without {error}") from error


def _parse_lock(value: str) -> LockLine:
    """A line as ``1: FLOCK  ADVISORY  WRITE 12 fe:00:34 0 EOF``; blocked requests (``->``) never stand in fdinfo."""
    words = value.split()
    try:
        kind, mode, owner, start, end = words[1], words[3], int(words[4]), int(words[6]), words[7]
        return LockLine(kind, mode == "WRITE", owner, start, None if end == "EOF" else int(end))
    except IndexError as error:
        raise ValueError(f"fdinfo lock line {value!r}") from error


def read(pid: int, fd: int) -> FdInfo:
    """Read /proc/PID/fdinfo/FD."""
    with open(f"/proc/{pid}/fdinfo/{fd}", encoding="ascii", errors="surrogateescape") as file:
        return parse(file.read())


def read_owner(fd: int, flags: int) -> pb.fown_entry:
    """Who gets signals about ``fd`` (F_SETOWN, F_SETSIG). O_PATH descriptions have no such thing."""
    fown = pb.fown_entry(uid=0, euid=0, signum=0, pid_type=0, pid=0)
    if flags & os.O_PATH:
        return fown
    fown.signum = fcntl.fcntl(fd, fcntl.F_GETSIG)
    kind, pid = struct.unpack("=ii", fcntl.fcntl(fd, F_GETOWN_EX, bytes(8)))
    if pid:
        fown.pid_type, fown.pid = kind, pid
        try:
            fown.uid, fown.euid = struct.unpack("=II", fcntl.fcntl(fd, F_GETOWNER_UIDS, bytes(8)))
        except OSError:  # a kernel without CONFIG_CHECKPOINT_RESTORE
            fown.uid, fown.euid = os.getuid(), os.geteuid()
    return fown


def open_file(where: str, fd: int, info: FdInfo, link: str | None = None) -> OpenFile:
    """Describe ``fd``, a descriptor of this process, which the result takes over."""
    target = os.readlink(f"/proc/self/fd/{fd}") if link is None else link
    return OpenFile(where, fd, os.fstat(fd), target, info, read_owner(fd, info.flags))


def raise_limit(needed: int | None = None) -> None:
    """Let this process have as many descriptors as it may, if its soft limit is below ``needed``."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft not in (resource.RLIM_INFINITY, hard) and (needed is None or soft < needed):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def reopen(fd: int, flags: int) -> int:
    """A new description of the inode behind ``fd``, also where no name leads to it any more."""
    return os.open(f"/proc/self/fd/{fd}", flags | os.O_CLOEXEC)
