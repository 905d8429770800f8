"""An address space is described as CRIU does, planned as data, and comes back as it was."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from support.agent_child import AgentChild
from support.memory_child import (
    MAP_ANONYMOUS,
    MAP_GROWSDOWN,
    MAP_NORESERVE,
    MAP_PRIVATE,
    MAP_SHARED,
    PAGE,
    PROT_NONE,
    PROT_READ,
    PROT_RW,
    MemoryChild,
    commit_images,
    fill,
    libc,
    map_memory,
)

from gpurestore.batch import Call, CallResult, Data, Out
from gpurestore.core import Region
from gpurestore.errors import Finding, ImageError
from gpurestore.images import pb
from gpurestore.images.folder import ImageFolder
from gpurestore.images.writer import ImageWriter
from gpurestore.syscalls import NR
from gpurestore.tasks import maps, memory, mm, shmem, vdso, vmaflags


class FakeTask:
    """A task that answers what :func:`mm.collect` asks."""

    msync = 0

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.vmas = maps.read(pid)

    def ask(self, calls: Sequence[Call]) -> list[CallResult]:
        heap = next((vma for vma in self.vmas if vma.path == "[heap]"), None)
        answers = {NR.BRK: heap.end if heap else 0x1000000, NR.PRCTL: 1, NR.MINCORE: 0, NR.GET_MEMPOLICY: -errno.ENOSYS}
        answers |= {NR.MMAP: 0x5000, NR.MSYNC: self.msync, NR.MUNMAP: 0}
        return [
            CallResult(
                0 if call.args[0] == 42 else answers[call.nr],
                tuple(b"\1" * arg.size for arg in call.args if isinstance(arg, Out)),
            )
            for call in calls
        ]


class FakeFiles:
    """Files by id; the program is number 1."""

    def __init__(self) -> None:
        self.paths: list[str] = []
        self.fds: dict[int, int] = {}

    def _add(self, path: str) -> int:
        if path not in self.paths:
            self.paths.append(path)
        return self.paths.index(path) + 1

    def add_mapping(self, task: Any, vma: maps.Vma) -> int:
        return self._add(f"{'w' if vma.shared and 'sh' in vma.flags else 'r'}{vma.path}")

    def claim_mapping(self, task: object, vma: maps.Vma, refused: Finding | None) -> int:
        return 0

    def add_exe(self, task: Any) -> int:
        return self._add("r" + os.readlink(f"/proc/{task.pid}/exe"))

    def open_all(self) -> None:
        for number, path in enumerate(self.paths, 1):
            self.fds[number] = os.open(path[1:], os.O_RDWR if path[0] == "w" else os.O_RDONLY)

    def close(self) -> None:
        for fd in self.fds.values():
            os.close(fd)


def shape(vmas: Sequence[maps.Vma]) -> list[tuple[object, ...]]:
    """What must be equal before and after. The kernel is free to join neighbours that are alike."""
    keep = {"gd", "lo", "lf", "nr", "sr", "rr", "dc", "dd", "hg", "nh", "wf", "sh", "mw", "mr", "me"}
    found = []
    for vma in vmas:
        identity = (vma.dev, vma.ino) if vma.path.startswith("/") and not vma.deleted else ()
        facts = (vma.prot, vma.shared, vma.offset, identity, vma.flags & keep)
        if found and vma.ino == 0 and found[-1][1:] == (hex(vma.start), *facts):
            found[-1] = (found[-1][0], hex(vma.end), *facts)
        else:
            found.append((hex(vma.start), hex(vma.end), *facts))
    return found


def prepare_address_space(file: Path, victim_file: Path) -> list[int]:
    """Memory of every kind that a plain child can have."""
    written = map_memory(64 * PAGE)
    fill(written, 64)
    libc.mprotect(written + 16 * PAGE, 8 * PAGE, PROT_READ)
    libc.mprotect(written + 24 * PAGE, 8 * PAGE, PROT_NONE)
    libc.madvise(written + 40 * PAGE, PAGE, vmaflags.MADV_DONTFORK)
    libc.madvise(written + 42 * PAGE, PAGE, vmaflags.MADV_DONTDUMP)
    libc.madvise(written + 44 * PAGE, PAGE, vmaflags.MADV_WIPEONFORK)
    libc.madvise(written + 46 * PAGE, PAGE, vmaflags.MADV_SEQUENTIAL)
    libc.madvise(written + 48 * PAGE, PAGE, vmaflags.MADV_RANDOM)
    locked = map_memory(8 * PAGE)
    fill(locked, 8)
    libc.mlock(locked, 8 * PAGE)
    reserved = map_memory(1 << 39, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE)
    libc.mprotect(reserved + (1 << 38), 2 * PAGE, PROT_RW)
    fill(reserved + (1 << 38), 2)
    stack = map_memory(4 * PAGE, PROT_RW, MAP_PRIVATE | MAP_ANONYMOUS | MAP_GROWSDOWN)
    fill(stack + 2 * PAGE, 2)
    fd = os.open(file, os.O_RDONLY)
    private = map_memory(4 * PAGE, PROT_RW, MAP_PRIVATE, fd, PAGE)
    fill(private + PAGE)
    libc.mprotect(private, 4 * PAGE, PROT_READ)
    victim = os.open(victim_file, os.O_RDWR)
    shared_file = map_memory(4 * PAGE, PROT_RW, MAP_SHARED, victim)
    fill(shared_file + PAGE)
    shared = map_memory(16 * PAGE, PROT_RW, MAP_SHARED | MAP_ANONYMOUS)
    fill(shared + 4 * PAGE, 3)
    libc.mprotect(shared, 2 * PAGE, PROT_READ)
    libc.munmap(shared + 8 * PAGE, PAGE)
    return [written, locked, reserved + (1 << 38), stack, private, shared_file, shared]


@pytest.fixture
def files() -> Iterator[FakeFiles]:
    made = FakeFiles()
    yield made
    made.close()


@pytest.mark.skipif(os.geteuid() != 0, reason="changing the executable takes CAP_CHECKPOINT_RESTORE")
def test_an_address_space_comes_back_as_it_was(folder: Path, files: FakeFiles) -> None:
    """All of it but the threads: strip, map, fill and finish in a child that serves the agent."""
    (folder / "file").write_bytes(bytes(range(256)) * 16 * 8)
    (folder / "shared").write_bytes(bytes(8 * PAGE))
    with MemoryChild(lambda: prepare_address_space(folder / "file", folder / "shared")) as victim:
        task = FakeTask(victim.pid)
        findings: list[Finding] = []
        found = mm.collect(task, files, findings)
        extension = mm.collect_extension(task, observed=False)
        assert findings == []
        objects = shmem.objects({victim.pid: found})
        with ImageWriter(folder / "images") as writer:
            memory.dump(writer, victim.pid, found, 1)
            for number, item in enumerate(objects.values(), 2):
                shmem.dump(writer, item, {victim.pid: task}, number)
            commit_images(writer)
        before = shape(task.vmas)
        shown = [vma for vma in task.vmas for address in victim.values if vma.start <= address < vma.end]
        wanted = {vma.start: memory_of(victim.pid, vma.start, vma.size) for vma in shown}
        auxv = Path(f"/proc/{victim.pid}/auxv").read_bytes()
    files.open_all()
    with ImageFolder(folder / "images") as images:
        after = restore(images, victim.pid, found, extension, files, objects, wanted, auxv)
    assert after == before


def memory_of(pid: int, address: int, size: int) -> bytes:
    with open(f"/proc/{pid}/mem", "rb", buffering=0) as file:
        return os.pread(file.fileno(), size, address)


def restore(
    images: ImageFolder,
    pid: int,
    found: pb.mm_entry,
    extension: dict[str, Any],
    files: FakeFiles,
    objects: dict[int, shmem.SharedObject],
    wanted: dict[int, bytes],
    auxv: bytes,
) -> list[tuple[object, ...]]:
    mm.validate(found, "mm")
    assert mm.check(pid, found) == []
    plan, object_plans = memory.plan_pages(images, pid, found), shmem.plan(images, objects)
    code = next(vma for vma in found.vmas if vma.status & vmaflags.VDSO)
    assert vdso.check(pid, found, memory.read_page_bytes(images, plan.pagemap, code.start, code.end), []) == []
    size = Region.size_for(1)
    _, room = shmem.staging_layout(objects, size)
    start = maps.find_hole([*maps.own_ranges(), *mm.fixed_ranges(found)], room + maps.HUGE_PAGE_BYTES * len(objects))
    addresses, end = shmem.staging_layout(objects, start + size)
    own = vdso.own_layout()
    with Region(start, 1) as region, shmem.Stage(objects, addresses) as stage:
        stage.fill(images, object_plans, addresses)
        with memory.open_pages(images, plan) as pages, AgentChild(region) as child:
            child.forget_rseq()
            child.run(mm.plan_strip(start, end, own, found))
            child.run(mm.plan_mappings(found, files.fds.__getitem__, addresses.__getitem__, plan.filled))
            plan.run(region, memory.Worker(child.pid, 0), pages)
            child.run(mm.plan_finish(found, mm.made_with(found, plan.filled), extension))
            for address, content in wanted.items():
                assert memory_of(child.pid, address, len(content)) == content
            assert Path(f"/proc/{child.pid}/auxv").read_bytes() == auxv
            assert mm._stat_addresses(child.pid) == {n: getattr(found, n) for n in mm._STAT_FIELDS}
            return shape([vma for vma in child.vmas() if not start <= vma.start < end])


def area(start: int, end: int, **more: int) -> pb.vma_entry:
    status = vmaflags.REGULAR | vmaflags.ANON_PRIVATE
    facts = {"pgoff": 0, "shmid": 0, "prot": 3, "flags": 0x22, "status": status, "fd": -1, **more}
    return pb.vma_entry(start=start, end=end, **facts)


def space(*vmas: pb.vma_entry, **more: int) -> pb.mm_entry:
    places = dict.fromkeys((*mm._MM_MAP_FIELDS,), 4096)
    return pb.mm_entry(vmas=vmas, exe_file_id=1, **{**places, **more})


def test_the_data_of_the_vdso_is_one_area_and_pages_kept_by_the_kernel_carry_no_file(files: FakeFiles) -> None:
    with MemoryChild(lambda: [1]) as child:
        found = mm.collect(FakeTask(child.pid), files, [])
    data = [vma for vma in found.vmas if vma.status & vmaflags.VVAR]
    code = next(vma for vma in found.vmas if vma.status & vmaflags.VDSO)
    assert len(data) == 1
    assert data[0].end == code.start
    assert all(vma.fd == -1 for vma in found.vmas)
    assert found.mm_saved_auxv[-2] != 0  # the end mark is the kernel's
    assert files.paths[found.exe_file_id - 1][1:] == os.path.realpath("/proc/self/exe")


def test_names_of_anonymous_memory_and_locks_on_fault_are_kept_beside_the_format() -> None:
    task = FakeTask(os.getpid())
    base = maps.Vma(0x1000, 0x2000, 3, False, 0, (0, 0), 0, "[anon:my arena]", False, frozenset({"lo", "lf"}))
    task.vmas = [base]
    extension = mm.collect_extension(task, observed=False)
    assert extension == {"names": {"1000": "my arena"}, "lock_on_fault": ["1000"]}
    name, lock = mm.plan_finish(space(area(0x1000, 0x2000, flags=0x2022)), {}, extension)
    assert (name.nr, name.args[4], name.may_fail) == (NR.PRCTL, Data(b"my arena\0"), True)
    assert (lock.nr, lock.args, lock.want) == (NR.MLOCK2, (0x1000, 0x1000, 1), 0)


def test_memory_that_is_locked_in_future_is_kept_beside_the_format() -> None:
    task = FakeTask(os.getpid())
    task.msync, task.vmas = -errno.EBUSY, []
    extension = mm.collect_extension(task, observed=False)
    assert extension == {"lock_future": 2}  # MCL_FUTURE: the page was there at once
    (lock,) = mm.plan_finish(space(), (), extension)
    assert (lock.nr, lock.args, lock.want) == (NR.MLOCKALL, (2,), 0)
    with pytest.raises(ImageError, match="none of mlockall's flags"):
        mm.plan_finish(space(), (), {"lock_future": 1})


@pytest.mark.parametrize(
    ("extension", "why"),
    [
        ({"names": []}, r"mm\.names: not an object"),
        ({"names": {"1000": 5}}, r"mm\.names: not a string"),
        ({"names": {"1000": "\ud800"}}, r"mm\.names: not a string of the kernel's"),
        ({"lock_on_fault": {"1000": 1}}, r"mm\.lock_on_fault: not a list"),
    ],
)
def test_facts_of_a_wrong_kind_are_image_errors(extension: dict[str, Any], why: str) -> None:
    with pytest.raises(ImageError, match=why):
        mm.plan_finish(space(area(0x1000, 0x2000)), {}, extension)


def test_stripping_leaves_the_region_and_the_kernels_areas_and_nothing_else() -> None:
    own = vdso.Layout((vdso.Part(0x7000_0000, 0x4000, False), vdso.Part(0x7000_4000, 0x2000, True)))
    kernels = vmaflags.REGULAR | vmaflags.ANON_PRIVATE
    target = space(
        area(0x6000_0000, 0x6000_4000, status=kernels | vmaflags.VVAR),
        area(0x6000_4000, 0x6000_6000, status=kernels | vmaflags.VDSO),
    )
    calls = mm.plan_strip(0x1000_0000, 0x2000_0000, own, target)
    assert [(call.nr, call.args) for call in calls] == [
        (NR.MUNMAP, (0, 0x1000_0000)),
        (NR.MUNMAP, (0x2000_0000, 0x5000_0000)),
        (NR.MUNMAP, (0x7000_6000, maps.TASK_SIZE - 0x7000_6000)),
        (NR.MREMAP, (0x7000_0000, 0x4000, 0x4000, 3, 0x6000_0000)),
        (NR.MREMAP, (0x7000_4000, 0x2000, 0x2000, 3, 0x6000_4000)),
    ]
    moved = vdso.target_layout(own, target)
    assert [call.nr for call in mm.plan_strip(0x1000_0000, 0x2000_0000, moved, target)] == [NR.MUNMAP] * 3


def test_areas_that_would_overlap_on_their_way_are_put_aside_first() -> None:
    own = vdso.Layout((vdso.Part(0x7000_0000, 0x4000, False), vdso.Part(0x7000_4000, 0x2000, True)))
    kernels = vmaflags.REGULAR | vmaflags.ANON_PRIVATE
    target = space(
        area(0x7000_2000, 0x7000_6000, status=kernels | vmaflags.VVAR),
        area(0x7000_6000, 0x7000_8000, status=kernels | vmaflags.VDSO),
    )
    moves = [call.args for call in mm.plan_strip(0x1000_0000, 0x2000_0000, own, target) if call.nr == NR.MREMAP]
    assert [to for *_, to in moves][2:] == [0x7000_2000, 0x7000_6000]
    assert [start for start, *_ in moves][2:] == [to for *_, to in moves][:2]


def test_a_task_without_vdso_gets_none() -> None:
    own = vdso.Layout((vdso.Part(0x7000_0000, 0x2000, True),))
    assert [c.args for c in mm.plan_strip(0x1000, 0x2000, own, space())] == [
        (0, 0x1000),
        (0x2000, maps.TASK_SIZE - 0x2000),
    ]


def test_mappings_are_planned_with_what_each_kind_needs() -> None:
    target = space(
        area(0x10000, 0x20000, prot=0, flags=0x4022),
        area(0x20000, 0x30000, prot=1, flags=0x2122),
        area(0x30000, 0x40000, prot=5, flags=2, status=1 | vmaflags.FILE_PRIVATE, shmid=9, pgoff=0x3000),
        area(0x40000, 0x50000, prot=1, flags=0x21, status=1 | vmaflags.ANON_SHARED, shmid=8, pgoff=0x1000),
        area(0x60000, 0x61000, status=1 | vmaflags.VDSO | vmaflags.ANON_PRIVATE),
        area(0x10000, 0x11000, status=vmaflags.GUARD),
    )
    thp, places, *calls = mm.plan_mappings(target, {1: 100, 9: 109}.__getitem__, {8: 0x900000}.__getitem__, {0x20000})
    assert thp.args == (41, 0, 0, 0, 0)
    assert isinstance(places.args[2], Data) and places.args[2].payload[-4:] == (100).to_bytes(4, "little")
    noreplace = vmaflags.MAP_FIXED_NOREPLACE
    assert [(call.nr, call.args) for call in calls] == [
        (NR.MMAP, (0x10000, 0x10000, 0, 0x4022 | noreplace, -1, 0)),
        (NR.MMAP, (0x20000, 0x10000, 3, 0x122 | noreplace, -1, 0)),
        (NR.MMAP, (0x30000, 0x10000, 5, 2 | noreplace, 109, 0x3000)),
        (NR.MREMAP, (0x901000, 0, 0x10000, 3, 0x40000)),
        (NR.MPROTECT, (0x40000, 0x10000, 1)),
    ]
    assert [(call.nr, call.args) for call in mm.plan_finish(target, mm.made_with(target, {0x20000}))] == [
        (NR.MPROTECT, (0x20000, 0x10000, 1)),
        (NR.MADVISE, (0x10000, 0x1000, vmaflags.MADV_GUARD_INSTALL)),
        (NR.MLOCK2, (0x20000, 0x10000, 0)),
    ]


def test_neighbours_are_protected_in_one_go() -> None:
    vmas = [area(s, s + 0x1000, prot=p) for s, p in ((0x1000, 1), (0x2000, 1), (0x3000, 5), (0x4000, 3), (0x5000, 5))]
    calls = mm.plan_finish(space(*vmas), mm.made_with(space(*vmas), {vma.start for vma in vmas}))
    assert [call.args for call in calls] == [(0x1000, 0x2000, 1), (0x3000, 0x1000, 5), (0x5000, 0x1000, 5)]


@pytest.mark.parametrize(
    ("bad", "why"),
    [
        (space(area(0x1001, 0x2000)), "no range of pages"),
        (space(area(0x2000, 0x2000)), "no range of pages"),
        (space(area(0x2000, 0x4000), area(0x3000, 0x5000)), "overlaps"),
        (space(area(0x3000, 0x4000), area(0x1000, 0x2000)), "out of order"),
        (space(area(maps.TASK_SIZE - PAGE, maps.TASK_SIZE + PAGE)), "outside of the address space"),
        (space(area(0x1000, 0x2000, pgoff=1)), "impossible offset"),
        (space(area(0x1000, 0x2000, prot=8)), "unknown protection"),
        (space(mm_brk=0x500), "mm_start_brk and mm_brk"),
        (space(mm_arg_end=1 << 60), "mm_arg_start and mm_arg_end"),
    ],
)
def test_an_address_space_that_cannot_be_is_refused(bad: pb.mm_entry, why: str) -> None:
    with pytest.raises(ImageError, match=f"mm-1.img: .*{why}"):
        mm.validate(bad, "mm-1.img")


def test_kinds_of_mapping_that_are_not_supported_are_listed() -> None:
    sysv = area(0x1000, 0x2000, status=1 | vmaflags.ANON_SHARED | 1 << 10)
    huge = area(0x2000, 0x3000, flags=0x40022)
    both = area(0x3000, 0x4000, status=1 | vmaflags.ANON_SHARED | vmaflags.ANON_PRIVATE)
    assert [finding.where for finding in mm.check(4, space(sysv, huge, both))] == [
        "pid 4, mapping 1000-2000",
        "pid 4, mapping 2000-3000",
        "pid 4, mapping 3000-4000",
    ]


def test_the_dumpable_flag_is_set_last_and_only_if_it_can_be() -> None:
    assert [call.args for call in mm.plan_dumpable(space(dumpable=0))] == [(4, 0, 0, 0, 0)]
    assert mm.plan_dumpable(space(dumpable=2)) == []
    assert mm.plan_dumpable(space()) == []


def test_the_vdso_of_this_kernel_is_accepted_and_another_is_not() -> None:
    own, code = vdso.own_layout(), vdso.own_code()
    kernels = vmaflags.REGULAR | vmaflags.ANON_PRIVATE
    data_start = min(part.start for part in own.parts)
    at = own.code
    assert at is not None
    same = space(
        area(data_start, data_start + own.data_bytes, status=kernels | vmaflags.VVAR),
        area(at.start, at.end, status=kernels | vmaflags.VDSO),
    )
    assert vdso.check(1, same, code, []) == []
    patched = bytearray(code)
    patched[-1] ^= 1
    assert vdso.check(1, same, bytes(patched), [data_start]) == []
    assert "stopped inside" in vdso.check(1, same, bytes(patched), [at.start + 8])[0].why
    renamed = code.replace(b"__vdso_time", b"__vdso_tide")
    assert "other functions" in vdso.check(1, same, renamed, [])[0].why
    same.vmas[1].end += PAGE
    assert "bytes" in vdso.check(1, same, code, [])[0].why
    assert vdso.check(1, space(), b"", []) == []


@pytest.mark.parametrize("code", [b"", b"\x7fELF\x02", bytes(8192)])
def test_a_damaged_vdso_is_refused(code: bytes) -> None:
    with pytest.raises(ImageError):
        vdso.symbols(code)


def test_shared_memory_is_found_once_however_many_show_it(folder: Path) -> None:
    size = 32 * PAGE
    buffer = mmap.mmap(-1, size)
    buffer[5 * PAGE : 6 * PAGE] = b"x" * PAGE
    buffer[31 * PAGE :] = b"y" * PAGE
    address = ctypes.addressof(ctypes.c_char.from_buffer(buffer))
    shared = [vma for vma in maps.read(os.getpid()) if vma.start == address]
    entry = area(address, address + size, flags=0x21, status=1 | vmaflags.ANON_SHARED, shmid=shared[0].ino)
    half = area(address, address + size // 2, flags=0x21, status=1 | vmaflags.ANON_SHARED, shmid=shared[0].ino)
    (item,) = shmem.objects({os.getpid(): space(half), -1: space(entry)}).values()
    assert (item.size, len(item.views)) == (size, 2)

    class Ourselves:
        def ask(self, calls: Sequence[Call]) -> list[CallResult]:
            ((_, (address, size, out), *_),) = calls
            answer = ctypes.create_string_buffer(out.size)
            assert libc.mincore(ctypes.c_void_p(address), ctypes.c_size_t(size), answer) == 0
            return [CallResult(0, (answer.raw,))]

    tasks = {os.getpid(): Ourselves(), -1: Ourselves()}
    with ImageWriter(folder / "images") as writer:
        views = [shmem.View(os.getpid(), v.address, v.offset, v.size) for v in item.views]
        item.views = views
        pages = memory.PagesFile(writer, 3, None, None, None)
        assert shmem._dump_through_tasks(writer, item, tasks, pages, None) == 2 * PAGE
        commit_images(writer)
    with ImageFolder(folder / "images") as images:
        plans = shmem.plan(images, {item.shmid: item})
        addresses, end = shmem.staging_layout({item.shmid: item}, maps.find_hole(maps.own_ranges(), 1 << 24))
        with shmem.Stage({item.shmid: item}, addresses) as stage:
            assert stage.fill(images, plans, addresses) == 2 * PAGE
            assert end - addresses[item.shmid] == size
            assert ctypes.string_at(addresses[item.shmid], size) == buffer[:]
    assert maps.gaps(maps.own_ranges(), addresses[item.shmid], end) == [(addresses[item.shmid], end)]


def test_views_cover_an_object_once() -> None:
    views = [
        shmem.View(2, 0x9000, 0x1000, 0x4000),
        shmem.View(1, 0x1000, 0, 0x2000),
        shmem.View(3, 0x5000, 0x7000, 0x1000),
    ]
    assert shmem._cover(views) == [
        shmem.View(1, 0x1000, 0, 0x2000),
        shmem.View(2, 0xA000, 0x2000, 0x3000),
        shmem.View(3, 0x5000, 0x7000, 0x1000),
    ]


def test_shared_memory_that_others_have_too_is_named() -> None:
    with mmap.mmap(-1, PAGE) as shared, MemoryChild(lambda: [1]) as child:
        shared[0] = 1
        address = ctypes.addressof(ctypes.c_char.from_buffer(shared))
        ino = next(vma.ino for vma in maps.read(child.pid) if vma.start == address)
        entry = area(address, address + PAGE, flags=0x21, status=1 | vmaflags.ANON_SHARED, shmid=ino)
        found = shmem.objects({child.pid: space(entry)})
        (finding,) = shmem.check_outsiders(found, {child.pid})
        assert f"pid {os.getpid()}, outside of the tree" in finding.why
        assert shmem.check_outsiders(found, {child.pid, os.getpid()}) == []
        del address
