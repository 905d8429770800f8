"""What the numbers in a ``vma_entry`` mean, and the few questions that everybody asks of one."""

from __future__ import annotations

from typing import Final

from gpurestore.images import pb

# status: what kind of area it is
REGULAR: Final = 1 << 0
VSYSCALL: Final = 1 << 2
VDSO: Final = 1 << 3
HEAP: Final = 1 << 5
FILE_PRIVATE: Final = 1 << 6
FILE_SHARED: Final = 1 << 7
ANON_SHARED: Final = 1 << 8
ANON_PRIVATE: Final = 1 << 9
VVAR: Final = 1 << 12
MEMFD: Final = 1 << 14
GUARD: Final = 1 << 16  # no mapping: the extent of pages under MADV_GUARD_INSTALL, behind all real entries
EXT_PLUGIN: Final = 1 << 27  # claimed by a device plugin: it keeps the content and says what to map
STACK: Final = 1 << 1  # written by old versions of CRIU, without a meaning for a restore
_KERNELS: Final = VDSO | VVAR | VSYSCALL
_MAPPED: Final = FILE_PRIVATE | FILE_SHARED | ANON_SHARED | ANON_PRIVATE
KNOWN_STATUS: Final = REGULAR | STACK | HEAP | MEMFD | GUARD | EXT_PLUGIN | _KERNELS | _MAPPED

# flags: as for mmap(2)
MAP_SHARED: Final = 0x01
MAP_PRIVATE: Final = 0x02
MAP_DROPPABLE: Final = 0x08
MAP_FIXED: Final = 0x10
MAP_ANONYMOUS: Final = 0x20
MAP_GROWSDOWN: Final = 0x100
MAP_LOCKED: Final = 0x2000
MAP_NORESERVE: Final = 0x4000
MAP_HUGETLB: Final = 0x40000
MAP_FIXED_NOREPLACE: Final = 0x100000

# madv: bit n says that madvise(n) holds
MADV_RANDOM: Final = 1
MADV_SEQUENTIAL: Final = 2
MADV_DONTFORK: Final = 10
MADV_MERGEABLE: Final = 12
MADV_HUGEPAGE: Final = 14
MADV_NOHUGEPAGE: Final = 15
MADV_DONTDUMP: Final = 16
MADV_WIPEONFORK: Final = 18
MADV_GUARD_INSTALL: Final = 102

# VmFlags of smaps -> bit of `flags`, advice of `madv`
FLAG_OF_VMFLAG: Final = {
    "gd": MAP_GROWSDOWN,
    "lo": MAP_LOCKED,
    "nr": MAP_NORESERVE,
    "ht": MAP_HUGETLB,
    "dp": MAP_DROPPABLE,
}
ADVICE_OF_VMFLAG: Final = {
    "sr": MADV_SEQUENTIAL,
    "rr": MADV_RANDOM,
    "dc": MADV_DONTFORK,
    "dd": MADV_DONTDUMP,
    "mg": MADV_MERGEABLE,
    "hg": MADV_HUGEPAGE,
    "nh": MADV_NOHUGEPAGE,
    "wf": MADV_WIPEONFORK,
}


def is_kernels(vma: pb.vma_entry) -> bool:
    """Whether the kernel itself provides the area: vdso, vvar, vsyscall."""
    return bool(vma.status & _KERNELS)


def is_guard(vma: pb.vma_entry) -> bool:
    """Whether the entry is the extent of guard pages and no mapping."""
    return bool(vma.status & GUARD)


def is_private(vma: pb.vma_entry) -> bool:
    """Whether the area has pages of its own in the task's pagemap and is mapped by us."""
    mapped_by_us = not vma.status & (_KERNELS | GUARD | EXT_PLUGIN)
    return bool(vma.status & (ANON_PRIVATE | FILE_PRIVATE)) and mapped_by_us


def is_ours_to_map(vma: pb.vma_entry) -> bool:
    """Whether a restore makes this mapping."""
    return not is_kernels(vma) and not is_guard(vma)
