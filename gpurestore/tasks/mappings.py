"""What kind of mapping a VMA is, in the words of the image format, and which kinds a dump cannot carry."""

from __future__ import annotations

import mmap
import os
import stat
from functools import cache
from typing import NamedTuple

from gpurestore.errors import Finding
from gpurestore.tasks import vmaflags
from gpurestore.tasks.maps import PROT_EXEC, Vma, parse_maps_line

_WATCHED = (
    "memory watched by userfaultfd",
    "the one who handles its faults cannot be restored; after a lazy restore, wait until all memory is in place",
)
# VmFlags that stand for something which a restore could not make again.
_REFUSED_FLAGS = {
    "io": ("device memory", "its content belongs to a device for which no plugin speaks"),
    "pf": ("device memory", "its content belongs to a device for which no plugin speaks"),
    "um": _WATCHED,
    "uw": _WATCHED,
    "ui": _WATCHED,
    "ss": ("a shadow stack", "shadow stacks are not supported"),
    "ht": ("huge pages of hugetlbfs", "hugetlb memory is not supported; transparent huge pages are"),
    "sl": ("a sealed mapping (mseal)", "seals are not supported"),
}
# Files that are no files: what the kernel shows as the path of such a mapping starts like this.
_REFUSED_PATHS = (
    ("/SYSV", "System V shared memory", "System V IPC is not supported; use mmap, memfd or shm_open"),
    ("/[aio]", "a ring of asynchronous I/O (io_setup)", "asynchronous I/O contexts are not supported"),
    ("anon_inode:", "a mapping of a kernel object", "objects such as io_uring or perf events are not supported"),
    ("/secretmem", "secret memory (memfd_secret)", "nobody but the task can read it"),
    ("socket:", "the ring of a packet socket", "sockets are not supported"),
    ("[uprobes]", "the area of uprobes", "somebody probes this task"),
)
_ANONYMOUS_NAMES = ("[stack]", "[heap]", "[anon:")
_KERNEL_STATUS = {
    "[vdso]": vmaflags.REGULAR | vmaflags.VDSO,
    "[vvar]": vmaflags.REGULAR | vmaflags.VVAR,
    "[vvar_vclock]": vmaflags.REGULAR | vmaflags.VVAR,
    "[vsyscall]": vmaflags.VSYSCALL,
}


class Kind(NamedTuple):
    """How the image describes a mapping. ``file`` says that a file stands behind it, which FILES must record."""

    status: int
    flags: int
    file: bool = False


@cache
def shmem_device() -> tuple[int, int]:
    """Device number of the kernel's internal tmpfs, where memfds and shared anonymous memory live."""
    with mmap.mmap(-1, 4096), open("/proc/self/maps", "rb") as file:
        for line in file:
            vma = parse_maps_line(line.rstrip(b"\n"))
            if vma is not None and vma.path == "/dev/zero" and vma.deleted:
                return vma.dev
    raise AssertionError("a shared anonymous mapping shows up in /proc/self/maps")


def classify(pid: int, vma: Vma) -> Kind | Finding:
    """The kind of a mapping, or why a dump cannot carry it."""
    flags = _map_flags(vma)
    anonymous = flags | vmaflags.MAP_ANONYMOUS
    if vma.path in _KERNEL_STATUS and vma.ino == 0:
        return Kind(_KERNEL_STATUS[vma.path] | vmaflags.ANON_PRIVATE, anonymous)
    refusal = _refusal(pid, vma)
    if refusal is not None:
        return refusal
    if vma.shared and vma.dev == shmem_device() and _is_shared_anonymous(vma):
        return Kind(vmaflags.REGULAR | vmaflags.ANON_SHARED, anonymous)
    if not vma.shared and (vma.ino == 0 or _is_dev_zero(pid, vma)):
        heap = vmaflags.HEAP if vma.path == "[heap]" else 0
        return Kind(vmaflags.REGULAR | heap | vmaflags.ANON_PRIVATE, anonymous)
    memfd = vmaflags.MEMFD if vma.dev == shmem_device() else 0
    status = vmaflags.FILE_SHARED if vma.shared else vmaflags.FILE_PRIVATE
    return Kind(vmaflags.REGULAR | status | memfd, flags, file=True)


def _map_flags(vma: Vma) -> int:
    flags = vmaflags.MAP_SHARED if vma.shared else vmaflags.MAP_PRIVATE
    if "dp" in vma.flags:  # a mapping type of its own for mmap, which shows up as private
        flags = 0
    for name in vma.flags & vmaflags.FLAG_OF_VMFLAG.keys():
        flags |= vmaflags.FLAG_OF_VMFLAG[name]
    return flags


def _refusal(pid: int, vma: Vma) -> Finding | None:
    where = vma.where(pid)
    for start, what, why in _REFUSED_PATHS:
        if vma.path.startswith(start):
            return Finding(where, what, why)
    for flag, (what, why) in _REFUSED_FLAGS.items():
        if flag in vma.flags:
            return Finding(where, f"{what} ({vma.path})" if vma.path else what, why)
    # The kernel itself gives execute-only memory a key; any other was handed out by pkey_alloc.
    if vma.pkey and vma.prot != PROT_EXEC:
        return Finding(where, f"memory under protection key {vma.pkey}", "protection keys are not supported")
    if not _is_known(vma):
        return Finding(where, f"a mapping of an unknown kind ({vma.path})", "nothing here knows how to restore it")
    return None


def _is_known(vma: Vma) -> bool:
    if vma.ino == 0 and not vma.path.startswith("/"):
        return not vma.shared and (not vma.path or vma.path.startswith(_ANONYMOUS_NAMES))
    if vma.dev == shmem_device():
        return vma.path.startswith("/memfd:") or _is_shared_anonymous(vma)
    return vma.path.startswith("/")


def _is_shared_anonymous(vma: Vma) -> bool:
    return (vma.path == "/dev/zero" and vma.deleted) or vma.path.startswith("[anon_shmem:")


def _is_dev_zero(pid: int, vma: Vma) -> bool:
    """A private mapping of /dev/zero is anonymous memory in all but the name that the kernel shows."""
    if vma.path != "/dev/zero":
        return False
    try:
        found = os.stat(f"/proc/{pid}/root/dev/zero")
    except OSError:
        return False
    same = found.st_ino == vma.ino and (os.major(found.st_dev), os.minor(found.st_dev)) == vma.dev
    return same and stat.S_ISCHR(found.st_mode) and found.st_rdev == os.makedev(1, 5)
