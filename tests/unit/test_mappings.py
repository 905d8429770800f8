"""Every kind of mapping is recognised, and what a dump cannot carry is named."""

from __future__ import annotations

from typing import Any

import pytest

from gpurestore.errors import Finding
from gpurestore.tasks import mappings, vmaflags
from gpurestore.tasks.mappings import Kind
from gpurestore.tasks.maps import Vma

REGULAR, PRIVATE, SHARED, ANONYMOUS = (
    vmaflags.REGULAR,
    vmaflags.MAP_PRIVATE,
    vmaflags.MAP_SHARED,
    vmaflags.MAP_ANONYMOUS,
)
DISK = (0xFE, 0)


def vma(path: str = "", *flags: str, shared: bool = False, **more: Any) -> Vma:
    facts: dict[str, Any] = {"offset": 0, "dev": (0, 0), "ino": 0, "deleted": False, "prot": 3, **more}
    return Vma(start=0x1000, end=0x3000, shared=shared, path=path, flags=frozenset(flags), **facts)


def shmem(path: str, *flags: str, shared: bool = True) -> Vma:
    return vma(path, *flags, shared=shared, dev=mappings.shmem_device(), ino=77, deleted=True)


@pytest.mark.parametrize(
    ("found", "status", "flags"),
    [
        (vma(), REGULAR | vmaflags.ANON_PRIVATE, PRIVATE | ANONYMOUS),
        (vma("[heap]"), REGULAR | vmaflags.HEAP | vmaflags.ANON_PRIVATE, PRIVATE | ANONYMOUS),
        (vma("[stack]", "gd"), REGULAR | vmaflags.ANON_PRIVATE, PRIVATE | ANONYMOUS | vmaflags.MAP_GROWSDOWN),
        (vma("[anon:arena]", "nr"), REGULAR | vmaflags.ANON_PRIVATE, PRIVATE | ANONYMOUS | vmaflags.MAP_NORESERVE),
        (vma("", "lo"), REGULAR | vmaflags.ANON_PRIVATE, PRIVATE | ANONYMOUS | vmaflags.MAP_LOCKED),
        (vma("", "dp"), REGULAR | vmaflags.ANON_PRIVATE, vmaflags.MAP_DROPPABLE | ANONYMOUS),
        (vma("[vdso]"), REGULAR | vmaflags.VDSO | vmaflags.ANON_PRIVATE, PRIVATE | ANONYMOUS),
        (vma("[vvar]", "io", "pf"), REGULAR | vmaflags.VVAR | vmaflags.ANON_PRIVATE, PRIVATE | ANONYMOUS),
        (vma("[vvar_vclock]", "io", "pf"), REGULAR | vmaflags.VVAR | vmaflags.ANON_PRIVATE, PRIVATE | ANONYMOUS),
        (vma("[vsyscall]"), vmaflags.VSYSCALL | vmaflags.ANON_PRIVATE, PRIVATE | ANONYMOUS),
        (vma("/lib/x.so", dev=DISK, ino=5), REGULAR | vmaflags.FILE_PRIVATE, PRIVATE),
        (vma("/data", dev=DISK, ino=5, shared=True), REGULAR | vmaflags.FILE_SHARED, SHARED),
        (shmem("/dev/zero"), REGULAR | vmaflags.ANON_SHARED, SHARED | ANONYMOUS),
        (shmem("[anon_shmem:queue]"), REGULAR | vmaflags.ANON_SHARED, SHARED | ANONYMOUS),
        (shmem("/memfd:x"), REGULAR | vmaflags.FILE_SHARED | vmaflags.MEMFD, SHARED),
        (shmem("/memfd:x", shared=False), REGULAR | vmaflags.FILE_PRIVATE | vmaflags.MEMFD, PRIVATE),
    ],
)
def test_every_kind_of_mapping_is_recognised(found: Vma, status: int, flags: int) -> None:
    kind = mappings.classify(1, found)
    assert kind == Kind(status, flags, file=bool(status & (vmaflags.FILE_PRIVATE | vmaflags.FILE_SHARED)))


@pytest.mark.parametrize(
    ("found", "what"),
    [
        (vma("/dev/nvidia0", "io", "pf", shared=True, dev=(0, 6), ino=3), r"device memory \(/dev/nvidia0\)"),
        (vma("", "um"), "userfaultfd"),
        (vma("", "uw"), "userfaultfd"),
        (vma("", "ss"), "shadow stack"),
        (vma("/anon_hugepage", "ht", dev=(0, 15), ino=3), "hugetlbfs"),
        (vma("", "sl"), "mseal"),
        (vma("", pkey=2), "protection key 2"),
        (vma("[uprobes]"), "uprobes"),
        (vma("[something new]"), "unknown kind"),
        (shmem("/SYSV00000001"), "System V"),
        (shmem("/drm mm object"), "unknown kind"),
        (vma("/[aio]", dev=(0, 12), ino=9), "asynchronous I/O"),
        (vma("anon_inode:[io_uring]", shared=True, dev=(0, 13), ino=9), "kernel object"),
        (vma("socket:[123]", shared=True, dev=(0, 8), ino=9), "packet socket"),
        (vma("/secretmem", shared=True, dev=(0, 17), ino=9), "secret memory"),
    ],
)
def test_what_cannot_be_dumped_is_named(found: Vma, what: str) -> None:
    finding = mappings.classify(12, found)
    assert isinstance(finding, Finding)
    assert finding.where == "pid 12, mapping 1000-3000"
    import re

    assert re.search(what, finding.what)


def test_memory_that_may_only_be_executed_has_a_key_of_the_kernels_own() -> None:
    assert isinstance(mappings.classify(1, vma("", pkey=1, prot=4)), Kind)
