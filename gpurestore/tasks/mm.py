"""The address space of a task: its mappings, and the places in it that the kernel knows (heap, arguments, auxv, exe).

Dump: :func:`collect`. Restore: :func:`check`, then the calls of :func:`plan_strip`, :func:`plan_mappings`, the pages
(:mod:`gpurestore.tasks.memory`), :func:`plan_finish`, and, after the credentials, :func:`plan_dumpable`.
"""

from __future__ import annotations

import errno
import os
import resource
import struct
from array import array
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from gpurestore import capabilities
from gpurestore.batch import Call, CallResult, Data, Out, Ref
from gpurestore.errors import Finding, ImageError
from gpurestore.images import pb
from gpurestore.syscalls import NR
from gpurestore.tasks import jsonvalues, mappings, maps, memory, numa, usage, vdso, vmaflags
from gpurestore.tasks.maps import PAGE_BYTES, PROT_WRITE, TASK_SIZE

_PR_GET_DUMPABLE, _PR_SET_DUMPABLE = 3, 4
_PR_SET_THP_DISABLE, _PR_GET_THP_DISABLE = 41, 42
_PR_SET_MM, _PR_SET_MM_MAP = 35, 14
_PR_SET_VMA, _PR_SET_VMA_ANON_NAME = 0x53564D41, 0
_MREMAP_MAYMOVE, _MREMAP_FIXED = 1, 2
_MLOCK_ONFAULT = 1
_MCL_FUTURE, _MCL_ONFAULT = 2, 4
_MS_INVALIDATE = 2
_NO_FD = 0xFFFFFFFF
_STAGED_PROT = maps.PROT_READ | maps.PROT_WRITE
_NAMED = "[anon:"
_KINDS = vmaflags.ANON_PRIVATE | vmaflags.ANON_SHARED | vmaflags.FILE_PRIVATE | vmaflags.FILE_SHARED

# struct prctl_mm_map: eleven addresses, a pointer to the auxv, its size, the descriptor of the executable.
_MM_MAP = struct.Struct("=11QQII")
_MM_MAP_AUXV = 11 * 8
_MM_MAP_FIELDS = (
    "mm_start_code",
    "mm_end_code",
    "mm_start_data",
    "mm_end_data",
    "mm_start_brk",
    "mm_brk",
    "mm_start_stack",
    "mm_arg_start",
    "mm_arg_end",
    "mm_env_start",
    "mm_env_end",
)
# The kernel insists on these.
_ORDERED = (
    ("mm_start_code", "mm_end_code"),
    ("mm_start_data", "mm_end_data"),
    ("mm_start_brk", "mm_brk"),
    ("mm_arg_start", "mm_arg_end"),
    ("mm_env_start", "mm_env_end"),
)
# proc_pid_stat(5), fields counted from 1
_STAT_FIELDS = {
    "mm_start_code": 26,
    "mm_end_code": 27,
    "mm_start_stack": 28,
    "mm_start_data": 45,
    "mm_end_data": 46,
    "mm_start_brk": 47,
    "mm_arg_start": 48,
    "mm_arg_end": 49,
    "mm_env_start": 50,
    "mm_env_end": 51,
}
# AT_VECTOR_SIZE of any x86-64 kernel is below this many 64-bit words.
_MAX_AUXV_WORDS = 64


class Task(Protocol):
    """What this module needs of :class:`gpurestore.tasks.frozen.FrozenTask`."""

    @property
    def pid(self) -> int: ...
    @property
    def pidfd(self) -> int: ...
    @property
    def vmas(self) -> Sequence[maps.Vma]: ...
    def ask(self, calls: Sequence[Call]) -> Sequence[CallResult]: ...
    def read_memory(self, address: int, size: int) -> bytes: ...


class Files(Protocol):
    """What this module needs of :class:`gpurestore.tasks.descriptors.FileTable`."""

    def add_mapping(self, task: Task, vma: maps.Vma) -> int: ...
    def claim_mapping(self, task: Task, vma: maps.Vma, refused: Finding | None) -> int: ...
    def add_exe(self, task: Task) -> int: ...


# ---- dump


def collect(task: Task, files: Files, findings: list[Finding]) -> pb.mm_entry:
    """Describe the address space of a frozen task. What a dump cannot carry is added to ``findings``."""
    brk, dumpable, thp_disabled = (
        answer.result
        for answer in task.ask(
            [
                Call(NR.BRK, (0,), "asking for the end of the heap"),
                Call(NR.PRCTL, (_PR_GET_DUMPABLE, 0, 0, 0, 0), "asking for the dumpable flag"),
                Call(NR.PRCTL, (_PR_GET_THP_DISABLE, 0, 0, 0, 0), "asking whether huge pages are off"),
            ]
        )
    )
    if thp_disabled > 1:
        why = "the image format only knows them on or off"
        findings.append(Finding(f"pid {task.pid}", "huge pages are switched off except where advised", why))
    mm = pb.mm_entry(mm_brk=brk, dumpable=dumpable, thp_disabled=bool(thp_disabled), exe_file_id=files.add_exe(task))
    for name, value in _stat_addresses(task.pid).items():
        setattr(mm, name, value)
    auxv = array("Q", Path(f"/proc/{task.pid}/auxv").read_bytes())
    # Without the pair of zeros at its end, which the kernel puts there anyway: CRIU takes 44 words, no more.
    mm.mm_saved_auxv.extend(auxv[:-2] if auxv[-2:].tolist() == [0, 0] else auxv)
    for vma in task.vmas:
        _collect_vma(task, vma, files, mm, findings)
    private = [vma for vma in mm.vmas if vmaflags.is_private(vma)]
    for start, nr_pages in memory.scan(task.pid, private, memory.GUARD):
        end = start + nr_pages * PAGE_BYTES
        mm.vmas.add(start=start, end=end, pgoff=0, shmid=0, prot=0, flags=0, status=vmaflags.GUARD, fd=-1)
    return mm


def collect_extension(task: Task, observed: bool) -> dict[str, Any]:
    """What CRIU's format has no field for: names of anonymous memory, locks on fault or in future, huge pages, NUMA;
    and which mappings were in use, if that was ``observed``."""
    names = {}
    for vma in task.vmas:
        if vma.path.startswith(_NAMED) and not vma.shared:
            names[f"{vma.start:x}"] = vma.path.removeprefix(_NAMED).removesuffix("]")
    on_fault = [f"{vma.start:x}" for vma in task.vmas if "lf" in vma.flags]
    with_huge = [pb.vma_entry(start=vma.start, end=vma.end) for vma in task.vmas if vma.huge_bytes and not vma.shared]
    huge = memory.hugepages.describe(memory.scan(task.pid, with_huge, memory.HUGE)) if with_huge else []
    found = {"names": names, "lock_on_fault": on_fault, "lock_future": _locks_future(task), "huge": huge}
    found["numa"] = numa.collect(task)
    found["used"] = usage.collect(task.vmas) if observed else []
    return {key: value for key, value in found.items() if value}


def _locks_future(task: Task) -> int:
    """What mlockall(MCL_FUTURE) set, which shows only in what is mapped from then on: msync refuses to invalidate
    memory that is locked, and it is there at once unless it is locked on fault."""
    page, prot, flags = (Ref(0), PAGE_BYTES), maps.PROT_READ | PROT_WRITE, vmaflags.MAP_PRIVATE | vmaflags.MAP_ANONYMOUS
    _, lock, there, _ = task.ask(
        [
            Call(NR.MMAP, (0, PAGE_BYTES, prot, flags, -1, 0), "try a page"),
            Call(NR.MSYNC, (*page, _MS_INVALIDATE), may_fail=True),
            Call(NR.MINCORE, (*page, Out(1)), "look whether the page is there"),
            Call(NR.MUNMAP, page, "give the page back"),
        ]
    )
    if lock.result != -errno.EBUSY:
        return 0
    return _MCL_FUTURE if there.outs[0][0] & 1 else _MCL_FUTURE | _MCL_ONFAULT


def _stat_addresses(pid: int) -> dict[str, int]:
    # The name in parentheses may hold anything, spaces and parentheses too; field 3 follows the last one.
    fields = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
    return {name: int(fields[number - 3]) for name, number in _STAT_FIELDS.items()}


def _collect_vma(task: Task, vma: maps.Vma, files: Files, mm: pb.mm_entry, findings: list[Finding]) -> None:
    kind = mappings.classify(task.pid, vma)
    refused = kind if isinstance(kind, Finding) else None
    if file_id := files.claim_mapping(task, vma, refused):
        mm.vmas.append(_claimed(vma, file_id))
        return
    if isinstance(kind, Finding):
        findings.append(kind)
        return
    if kind.status & vmaflags.VVAR and mm.vmas and mm.vmas[-1].status == kind.status and mm.vmas[-1].end == vma.start:
        mm.vmas[-1].end = vma.end  # the data of the vdso is one area in an image, however many the kernel makes of it
        return
    entry = mm.vmas.add(
        start=vma.start,
        end=vma.end,
        pgoff=vma.offset,
        prot=vma.prot,
        flags=kind.flags,
        status=kind.status,
        fd=-1,
        shmid=0,
    )
    if kind.file:
        entry.shmid = files.add_mapping(task, vma)
        entry.fdflags = _open_flags(task.pid, vma)
    elif kind.status & vmaflags.ANON_SHARED:
        entry.shmid = vma.ino
    else:
        entry.pgoff = 0
    madv = sum(1 << vmaflags.ADVICE_OF_VMFLAG[name] for name in vma.flags & vmaflags.ADVICE_OF_VMFLAG.keys())
    if madv:
        entry.madv = madv


def _claimed(vma: maps.Vma, file_id: int) -> pb.vma_entry:
    """A mapping whose content is a plugin's business."""
    kind = (vmaflags.FILE_SHARED, vmaflags.MAP_SHARED) if vma.shared else (vmaflags.FILE_PRIVATE, vmaflags.MAP_PRIVATE)
    status = vmaflags.REGULAR | vmaflags.EXT_PLUGIN | kind[0]
    entry = pb.vma_entry(
        start=vma.start, end=vma.end, pgoff=vma.offset, prot=vma.prot, flags=kind[1], status=status, fd=-1
    )
    entry.shmid = file_id
    return entry


def _open_flags(pid: int, vma: maps.Vma) -> int:
    """How the file behind a mapping was opened: the permissions of its link in map_files say so."""
    try:
        mode = os.lstat(f"/proc/{pid}/map_files/{vma.start:x}-{vma.end:x}").st_mode
    except OSError:
        return os.O_RDWR if vma.shared and "mw" in vma.flags else os.O_RDONLY
    return {0o200: os.O_WRONLY, 0o600: os.O_RDWR}.get(mode & 0o600, os.O_RDONLY)


# ---- restore


def validate(mm: pb.mm_entry, name: str) -> None:
    """Check what the planning functions rely on. Raises ImageError naming the image ``name``."""
    previous_end = 0
    for vma in mm.vmas:
        words = f"{name}: mapping {vma.start:x}-{vma.end:x}"
        if vma.start % PAGE_BYTES or vma.end % PAGE_BYTES or vma.end <= vma.start:
            raise ImageError(f"{words} is no range of pages")
        if vma.status & vmaflags.VSYSCALL:
            continue
        if vma.end > TASK_SIZE:
            raise ImageError(f"{words} lies outside of the address space")
        if vmaflags.is_guard(vma):
            continue
        if vma.start < previous_end:
            raise ImageError(f"{words} overlaps the one before or is out of order")
        previous_end = vma.end
        if vma.pgoff % PAGE_BYTES or vma.pgoff > (1 << 63) - (vma.end - vma.start):
            raise ImageError(f"{words} has the impossible offset {vma.pgoff:#x}")
        if vma.prot & ~7:
            raise ImageError(f"{words} has the unknown protection {vma.prot:#x}")
    if len(mm.mm_saved_auxv) > _MAX_AUXV_WORDS:
        raise ImageError(f"{name}: an auxiliary vector of {len(mm.mm_saved_auxv)} words")
    for low, high in _ORDERED:
        if not 0 <= getattr(mm, low) <= getattr(mm, high) < TASK_SIZE:
            raise ImageError(f"{name}: {low} and {high} are not in order")


def check(pid: int, mm: pb.mm_entry) -> list[Finding]:
    """What stands against restoring this address space here: kinds that we do not know, missing rights."""
    findings = []
    for vma in mm.vmas:
        where = f"pid {pid}, mapping {vma.start:x}-{vma.end:x}"
        if vma.status & ~vmaflags.KNOWN_STATUS:
            findings.append(Finding(where, f"kind {vma.status:#x}", "this kind of mapping is not supported"))
        elif vma.flags & vmaflags.MAP_HUGETLB:
            findings.append(Finding(where, "huge pages of hugetlbfs", "hugetlb memory is not supported"))
        elif vmaflags.is_ours_to_map(vma) and (vma.status & _KINDS).bit_count() != 1:
            findings.append(Finding(where, f"kind {vma.status:#x}", "it is none or several kinds of mapping at once"))
    locked_bytes = sum(vma.end - vma.start for vma in mm.vmas if vma.flags & vmaflags.MAP_LOCKED)
    limit = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    if locked_bytes and limit not in (resource.RLIM_INFINITY, -1) and locked_bytes > limit and not _may_lock():
        why = f"only {limit} may be locked here: raise RLIMIT_MEMLOCK (ulimit -l) or run with CAP_IPC_LOCK"
        findings.append(Finding(f"pid {pid}", f"{locked_bytes} bytes of locked memory", why))
    return findings


def _may_lock() -> bool:
    """Whether we have CAP_IPC_LOCK where it counts for mlock: in the first user namespace."""
    if Path("/proc/self/uid_map").read_text().split() != ["0", "0", "4294967295"]:
        return False
    return capabilities.holds("IPC_LOCK")


def fixed_ranges(mm: pb.mm_entry) -> list[tuple[int, int]]:
    """The address ranges that must be free for this address space: input for :func:`maps.find_hole`."""
    return [(v.start, v.end) for v in mm.vmas if not vmaflags.is_guard(v) and v.end <= TASK_SIZE]


def plan_strip(
    region_start: int, region_end: int, own: vdso.Layout, mm: pb.mm_entry, kept: Collection[int] = ()
) -> list[Call]:
    """Unmap all but the region (with the staging in it) and bring the kernel's areas to their old places.

    For the root, a fork of this process, ``own`` is :func:`vdso.own_layout`; for a child its parent's
    :func:`vdso.target_layout`. ``kept``: starts of the mappings that an heir has from its parent. The thread that
    runs this must have no rseq area registered: it is unmapped.
    """
    pairs = vdso.moves(own, mm)
    keep = [(region_start, region_end), *((part.start, part.end) for part, _ in pairs)]
    keep += [(vma.start, vma.end) for vma in mm.vmas if vma.start in kept]
    calls = [
        Call(NR.MUNMAP, (start, end - start), "clearing the address space", want=0)
        for start, end in maps.gaps(keep, 0, TASK_SIZE)
    ]
    pairs = [(part, new) for part, new in pairs if part != new]
    if any(_overlap(part, new) for part, _ in pairs for _, new in pairs):
        taken = [*keep, *((new.start, new.end) for _, new in pairs)]
        low = min(part.start for part, _ in pairs)
        park = maps.find_hole(taken, max(part.end for part, _ in pairs) - low) - low
        calls += [_move(part, part.start + park, "putting %s aside") for part, _ in pairs]
        pairs = [(vdso.Part(part.start + park, part.size, part.code), new) for part, new in pairs]
    return calls + [_move(part, new.start, "moving %s to its old place") for part, new in pairs]


def _overlap(a: vdso.Part, b: vdso.Part) -> bool:
    return a.start < b.end and b.start < a.end


def _move(part: vdso.Part, to: int, what: str) -> Call:
    args = (part.start, part.size, part.size, _MREMAP_MAYMOVE | _MREMAP_FIXED, to)
    return Call(NR.MREMAP, args, what % ("the vdso" if part.code else "the vdso's data"), want=to)


def plan_mappings(
    mm: pb.mm_entry,
    fd_of: Callable[[int], int],
    staging: Callable[[int], int],
    filled: Collection[int],
    redirected: Mapping[int, tuple[int, int]] | None = None,
    kept: Collection[int] = (),
    extension: Mapping[str, Any] | None = None,
) -> list[Call]:
    """Make every mapping, empty, in an address space that :func:`plan_strip` cleared.

    ``fd_of``: descriptor, in the task, of a file id. ``staging``: address of a shared object by its shmid. ``filled``:
    starts of the private mappings that pages will be written to (:attr:`memory.PagePlan.filled`); they are made
    writable for as long as that takes. The others get their final protection at once, so that a large reservation
    without access is never counted as memory.

    The executable is changed here, not at the end: the kernel refuses that while the old one is mapped, and "old one"
    is a matter of the path, which may well be the same.

    ``redirected``: (descriptor, offset) to map instead, by the start of a mapping that a plugin claimed. ``kept``:
    starts of the mappings that an heir has from its parent, with the executable.
    """
    redirected = redirected or {}
    policies = numa.of_mappings(extension or {})
    calls = [
        Call(NR.PRCTL, (_PR_SET_THP_DISABLE, int(mm.thp_disabled), 0, 0, 0), "switching huge pages off or on"),
        _set_mm_map(mm, -1 if kept else fd_of(mm.exe_file_id)),
    ]
    for vma in mm.vmas:
        if not vmaflags.is_ours_to_map(vma):
            continue
        if vma.start in kept:
            pass
        elif vma.status & vmaflags.ANON_SHARED:
            calls += _map_staged(vma, staging(vma.shmid))
        elif vma.start in redirected:
            fd, pgoff = redirected[vma.start]
            calls.append(_map(vma, fd, vma.prot, pgoff))
        else:
            fd = fd_of(vma.shmid) if vma.status & (vmaflags.FILE_PRIVATE | vmaflags.FILE_SHARED) else -1
            calls.append(_map(vma, fd, vma.prot | (PROT_WRITE if vma.start in filled else 0)))
        if vma.madv >> vmaflags.MADV_NOHUGEPAGE & 1:  # before the pages come
            calls.append(_advise(vma, vmaflags.MADV_NOHUGEPAGE))
        calls += numa.plan(vma, policies)
    return calls


def _set_mm_map(mm: pb.mm_entry, exe_fd: int) -> Call:
    auxv = array("Q", mm.mm_saved_auxv).tobytes()
    places = [getattr(mm, name) for name in _MM_MAP_FIELDS]
    payload = _MM_MAP.pack(*places, 0, len(auxv), exe_fd if exe_fd >= 0 else _NO_FD)
    argument = Data(payload, ((_MM_MAP_AUXV, Data(auxv)),) if auxv else ())
    what = "setting heap, arguments, auxv and executable"
    return Call(NR.PRCTL, (_PR_SET_MM, _PR_SET_MM_MAP, argument, _MM_MAP.size, 0), what, want=0)


def _map(vma: pb.vma_entry, fd: int, prot: int, pgoff: int | None = None) -> Call:
    flags = vma.flags & ~(vmaflags.MAP_LOCKED | vmaflags.MAP_FIXED) | vmaflags.MAP_FIXED_NOREPLACE
    args = (vma.start, vma.end - vma.start, prot, flags, fd, (vma.pgoff if pgoff is None else pgoff) if fd >= 0 else 0)
    return Call(NR.MMAP, args, f"mapping {vma.start:x}-{vma.end:x}", want=vma.start)


def _map_staged(vma: pb.vma_entry, staged: int) -> list[Call]:
    """An old size of 0 makes mremap map the same shared object once more."""
    flags = _MREMAP_MAYMOVE | _MREMAP_FIXED
    args = (staged + vma.pgoff, 0, vma.end - vma.start, flags, vma.start)
    calls = [Call(NR.MREMAP, args, f"mapping shared memory {vma.start:x}-{vma.end:x}", want=vma.start)]
    if vma.prot != _STAGED_PROT:
        calls.append(_protect(vma.start, vma.end, vma.prot))
    return calls


def _protect(start: int, end: int, prot: int) -> Call:
    return Call(NR.MPROTECT, (start, end - start, prot), f"protecting {start:x}-{end:x}", want=0)


def _advise(vma: pb.vma_entry, advice: int) -> Call:
    # Whether huge pages and page merging exist is a matter of the kernel's configuration; they change no content.
    hint = advice in (vmaflags.MADV_HUGEPAGE, vmaflags.MADV_NOHUGEPAGE, vmaflags.MADV_MERGEABLE)
    args = (vma.start, vma.end - vma.start, advice)
    return Call(NR.MADVISE, args, f"advising {vma.start:x}-{vma.end:x}", want=None if hint else 0, may_fail=hint)


def made_with(mm: pb.mm_entry, filled: Collection[int], kept: Mapping[int, int] | None = None) -> dict[int, int]:
    """The protection of each mapping while it is being filled, by its start; ``kept`` has those of inherited ones."""
    ours = [vma for vma in mm.vmas if vmaflags.is_ours_to_map(vma)]
    made = {vma.start: vma.prot | (PROT_WRITE if vma.start in filled else 0) for vma in ours}
    return made | dict(kept or {})


def plan_finish(mm: pb.mm_entry, made: Mapping[int, int], extension: Mapping[str, Any] | None = None) -> list[Call]:
    """Bring mappings that hold their pages into their final state: protection, advice, guards, names, locks.

    ``made``: the protection that they have now, as :func:`made_with` says.
    """
    extension = extension or {}
    ours = [vma for vma in mm.vmas if vmaflags.is_ours_to_map(vma)]
    calls = [_protect(*run) for run in _protections(ours, made)]
    for vma in ours:
        for advice in vmaflags.ADVICE_OF_VMFLAG.values():
            if vma.madv >> advice & 1 and advice != vmaflags.MADV_NOHUGEPAGE:
                calls.append(_advise(vma, advice))
    calls += [_advise(vma, vmaflags.MADV_GUARD_INSTALL) for vma in mm.vmas if vmaflags.is_guard(vma)]
    names = jsonvalues.mapping(extension.get("names", {}), "mm.names")
    for vma in ours:
        if f"{vma.start:x}" in names:
            name = Data(jsonvalues.kernel_text(names[f"{vma.start:x}"], "mm.names") + b"\0")
            args = (_PR_SET_VMA, _PR_SET_VMA_ANON_NAME, vma.start, vma.end - vma.start, name)
            calls.append(Call(NR.PRCTL, args, f"naming {vma.start:x}-{vma.end:x}", may_fail=True))
    calls += _plan_locks(mm, ours, jsonvalues.sequence(extension.get("lock_on_fault", []), "mm.lock_on_fault"))
    future = extension.get("lock_future", 0)
    if future not in (0, _MCL_FUTURE, _MCL_FUTURE | _MCL_ONFAULT):
        raise ImageError(f"gpurestore.json: mm: lock_future {future!r} is none of mlockall's flags for future mappings")
    return [*calls, Call(NR.MLOCKALL, (future,), "locking what is mapped in future", want=0)] if future else calls


def _protections(ours: Sequence[pb.vma_entry], made: Mapping[int, int]) -> Iterator[tuple[int, int, int]]:
    """Ranges with another protection than they shall have, as those that were filled; neighbours joined."""
    start = end = prot = 0
    for vma in ours:
        if made.get(vma.start, vma.prot) == vma.prot:
            continue
        if vma.start != end or vma.prot != prot:
            if end:
                yield start, end, prot
            start, prot = vma.start, vma.prot
        end = vma.end
    if end:
        yield start, end, prot


def _plan_locks(mm: pb.mm_entry, ours: Sequence[pb.vma_entry], on_fault: Collection[str]) -> list[Call]:
    calls = []
    guards = [vma for vma in mm.vmas if vmaflags.is_guard(vma)]
    for vma in ours:
        if vma.flags & vmaflags.MAP_LOCKED:
            flags = _MLOCK_ONFAULT if f"{vma.start:x}" in on_fault else 0
            # Where pages cannot be touched mlock sets the lock and then complains that it could not fault them in.
            untouchable = not vma.prot or any(g.start < vma.end and vma.start < g.end for g in guards)
            args = (vma.start, vma.end - vma.start, flags)
            what = f"locking {vma.start:x}-{vma.end:x}"
            calls.append(Call(NR.MLOCK2, args, what, want=None if untouchable else 0, may_fail=untouchable))
    return calls


def plan_dumpable(mm: pb.mm_entry) -> list[Call]:
    """Set the dumpable flag, which every change of credentials resets; so this comes after them.

    2 cannot be set: it is what fs.suid_dumpable gives a task that changed its credentials, and gives it again.
    """
    if not mm.HasField("dumpable") or mm.dumpable not in (0, 1):
        return []
    return [Call(NR.PRCTL, (_PR_SET_DUMPABLE, mm.dumpable, 0, 0, 0), "setting the dumpable flag", want=0)]
