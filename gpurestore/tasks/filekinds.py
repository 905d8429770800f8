"""Which kind of file a descriptor is, and in one line why a dump cannot carry it where it cannot."""

from __future__ import annotations

import enum
import os
import re
import socket
import stat
from collections.abc import Mapping
from functools import cache

from gpurestore.errors import Finding
from gpurestore.tasks import chardevs
from gpurestore.tasks.fdinfo import OpenFile
from gpurestore.tasks.mounts import Mount


class FileKind(enum.Enum):
    """The kinds that a dump carries."""

    REGULAR = "regular file"  # and directories, and anything that is only held with O_PATH
    CHARDEV = "character device"
    PIPE = "pipe"
    FIFO = "FIFO"
    EVENTFD = "eventfd"
    MEMFD = "memfd"


_ANON = {
    "[eventpoll]": "epoll set",
    "[signalfd]": "signalfd",
    "[timerfd]": "timerfd",
    "inotify": "inotify queue",
    "[fanotify]": "fanotify group",
    "[pidfd]": "pidfd",
    "[io_uring]": "io_uring",
    "[userfaultfd]": "userfaultfd",
    "[perf_event]": "perf event",
}
_KERNEL_STATE = "its state lives in the kernel and is not carried yet; close it before the dump"
_FAMILIES = {socket.AF_UNIX: "unix", socket.AF_INET: "inet", socket.AF_INET6: "inet6", socket.AF_NETLINK: "netlink"}
_PER_PROCESS = re.compile(r"/proc/(\d+|self|thread-self)(/|$)")


@cache
def shmem_dev() -> int:
    """The device of memfds and of anonymous shared memory: an internal mount with no name."""
    fd = os.memfd_create("gpurestore-probe", os.MFD_CLOEXEC)
    try:
        return os.fstat(fd).st_dev
    finally:
        os.close(fd)


def classify(file: OpenFile, mounts: Mapping[int, Mount]) -> FileKind | Finding:
    """The kind of ``file``, or what stands in the way of dumping it."""
    mode, link = file.stat.st_mode, file.link
    if stat.S_ISSOCK(mode) and link.startswith("socket:"):
        return Finding(file.where, f"{_family(file.fd)} socket {link}", "sockets are not carried yet")
    if link.startswith("anon_inode:"):
        return _anonymous(file)
    if stat.S_ISFIFO(mode) and link.startswith("pipe:"):
        return FileKind.PIPE
    if file.stat.st_dev == shmem_dev() and link.startswith("/memfd:"):
        return FileKind.MEMFD
    return _of_a_mount(file, mounts)


def _anonymous(file: OpenFile) -> FileKind | Finding:
    name = file.link.removeprefix("anon_inode:")
    if name == "[eventfd]":
        return FileKind.EVENTFD
    what = _ANON.get(name) or ("BPF object" if "bpf" in name else f"anonymous file {name}")
    return Finding(file.where, what, _KERNEL_STATE)


def _of_a_mount(file: OpenFile, mounts: Mapping[int, Mount]) -> FileKind | Finding:
    mode, link = file.stat.st_mode, file.link
    if link.startswith("/memfd:") and file.info.mnt_id not in mounts:
        return Finding(file.where, f"memfd {link} in huge pages", "reservations of huge pages are not carried yet")
    if link.startswith("(unreachable)"):
        return Finding(file.where, link, "it lies outside of what this process can reach (another root or mount)")
    if not link.startswith("/"):
        return Finding(file.where, f"file {link}", _KERNEL_STATE)
    mount = mounts.get(file.info.mnt_id)
    if mount is None:
        why = "its mount is not among ours (another mount namespace, or a detached or internal mount)"
        return Finding(file.where, f"file {link}", why)
    if file.info.flags & os.O_PATH:
        return _special_file_system(file, mount) or FileKind.REGULAR
    if stat.S_ISCHR(mode):
        return chardevs.refuse(file) or FileKind.CHARDEV
    if stat.S_ISBLK(mode):
        return Finding(file.where, f"block device {link}", "block devices are not carried")
    finding = _special_file_system(file, mount)
    if finding is not None:
        return finding
    if stat.S_ISFIFO(mode):
        return FileKind.FIFO
    if stat.S_ISREG(mode) or stat.S_ISDIR(mode):
        return FileKind.REGULAR
    return Finding(file.where, f"file {link} of mode {mode:#o}", "this kind is not carried")


def _special_file_system(file: OpenFile, mount: Mount) -> Finding | None:
    if mount.fs_type == "proc" and _PER_PROCESS.match(file.link):
        return Finding(file.where, f"file {file.link}", "files of one process in /proc are not carried yet")
    if mount.fs_type == "hugetlbfs":
        return Finding(file.where, f"file {file.link} in huge pages", "hugetlbfs files are not carried yet")
    if mount.fs_type in ("nsfs", "pidfs", "mqueue", "devpts", "binder", "autofs"):
        return Finding(file.where, f"file {file.link} ({mount.fs_type})", _KERNEL_STATE)
    return None


def is_unix(file: OpenFile) -> bool:
    """Whether it is a UNIX socket."""
    return stat.S_ISSOCK(file.stat.st_mode) and file.link.startswith("socket:") and _family(file.fd) == "unix"


def _family(fd: int) -> str:
    """The address family of a socket in words; asks a duplicate, so that the descriptor stays open."""
    try:
        with socket.socket(fileno=os.dup(fd)) as sock:
            return _FAMILIES.get(sock.family, f"family {int(sock.family)}")
    except OSError:
        return "unknown"
