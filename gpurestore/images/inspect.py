"""What is in a dump, in numbers: for ``gpurestore inspect``. Reads everything but the pages themselves."""

from __future__ import annotations

import dataclasses
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

from gpurestore.errors import ImageError
from gpurestore.images import pb
from gpurestore.images.chunked import PagesImage, find_pages
from gpurestore.images.folder import ImageFolder
from gpurestore.images.magic import PAGE_BYTES
from gpurestore.images.pagemap import PRESENT, Pagemap, read_pagemap
from gpurestore.units import format_bytes

_STATES = {1: "alive", 3: "stopped", 6: "zombie"}
# Bits of vma_entry.status, the most telling first.
_VMA_KINDS = (
    (1 << 1, "stack"),
    (1 << 5, "heap"),
    (1 << 3 | 1 << 12, "vdso"),
    (1 << 2, "vsyscall"),
    (1 << 8, "shared anonymous"),  # before memfd: CRIU marks what it keeps in one, too
    (1 << 14, "memfd"),
    (1 << 10, "SysV shared memory"),
    (1 << 13, "AIO ring"),
    (1 << 11, "socket"),
    (1 << 16, "guard"),
    (1 << 9, "private anonymous"),
    (1 << 6, "private file"),
    (1 << 7, "shared file"),
)
_MAP_GROWSDOWN = 0x100
_KIND_NAMES: dict[int, str] = {
    pb.REG: "file",
    pb.PIPE: "pipe",
    pb.FIFO: "FIFO",
    pb.INETSK: "inet socket",
    pb.UNIXSK: "unix socket",
    pb.PACKETSK: "packet socket",
    pb.NETLINKSK: "netlink socket",
    pb.NS: "namespace",
    pb.TUNF: "tun",
    pb.EXT: "external",
    pb.BPFMAP: "BPF map",
}


@dataclass(frozen=True, slots=True)
class MemorySummary:
    """One kind of mapping: how much address space, and how much of it the images hold."""

    kind: str
    mappings: int
    mapped_bytes: int
    stored_bytes: int


@dataclass(frozen=True, slots=True)
class DescriptorSummary:
    """One descriptor of a task. ``target`` is a path, or what else tells it from others."""

    fd: int
    kind: str
    target: str
    close_on_exec: bool


@dataclass(frozen=True, slots=True)
class TaskSummary:
    """One task. A zombie has neither memory nor descriptors. What it inherited is stored with its parent."""

    pid: int
    ppid: int
    pgid: int
    sid: int
    state: str
    comm: str
    threads: tuple[int, ...]
    memory: tuple[MemorySummary, ...]
    stored_bytes: int
    inherited_bytes: int
    descriptors: tuple[DescriptorSummary, ...]


@dataclass(frozen=True, slots=True)
class SharedMemorySummary:
    """An object of anonymous memory that tasks share."""

    shmid: int
    stored_bytes: int


@dataclass(frozen=True, slots=True)
class CompressionSummary:
    """What compression made of the pages images: ``bytes`` became ``file_bytes``."""

    algorithm: str
    bytes: int
    file_bytes: int


@dataclass(frozen=True, slots=True)
class FolderSummary:
    """A whole dump. ``created``, ``hostname`` and ``kernel`` are empty for one that CRIU made."""

    path: str
    tool: str
    created: str
    hostname: str
    kernel: str
    root_pid: int
    tasks: tuple[TaskSummary, ...]
    shared_memory: tuple[SharedMemorySummary, ...]
    plugins: tuple[str, ...]
    files: dict[str, int]
    total_bytes: int
    compressed: CompressionSummary | None = None

    @property
    def stored_bytes(self) -> int:
        """Of memory, private and shared."""
        return sum(t.stored_bytes for t in self.tasks) + sum(s.stored_bytes for s in self.shared_memory)

    def as_dict(self) -> dict[str, Any]:
        """For ``--json``."""
        return dataclasses.asdict(self)


def summarize(path: Path) -> FolderSummary:
    """Summarise the dump at ``path``; see :func:`summarize_folder`."""
    with ImageFolder(path) as folder:
        return summarize_folder(folder)


def summarize_folder(folder: ImageFolder) -> FolderSummary:
    """Summarise a dump. Raises ImageError when an image that it needs is missing or damaged."""
    entries = folder.read("pstree")
    if not entries:
        raise ImageError(f"{folder.path}/pstree.img: damaged: no tasks")
    pages: dict[int, PagesImage] = {}
    files = folder.files()
    described = {entry.id: entry for entry in folder.read("files")} if folder.has("files") else {}
    made_by = folder.manifest
    return FolderSummary(
        path=str(folder.path),
        tool=f"gpurestore {made_by.tool_version}" if made_by else "CRIU",
        created=made_by.created if made_by else "",
        hostname=made_by.hostname if made_by else "",
        kernel=made_by.kernel if made_by else "",
        root_pid=entries[0].pid,
        tasks=tuple(_task(folder, entry, described, pages) for entry in entries),
        shared_memory=tuple(
            SharedMemorySummary(
                shmid, _checked_pagemap(folder, "pagemap-shmem", shmid, pages).present_pages * PAGE_BYTES
            )
            for shmid in folder.idents("pagemap-shmem")
        ),
        plugins=_plugins(folder),
        files=files,
        total_bytes=sum(files.values()),
        compressed=_compression(pages.values()),
    )


def _compression(pages: Iterable[PagesImage]) -> CompressionSummary | None:
    compressed = [(image, image.index) for image in pages if image.index is not None]
    if not compressed:
        return None
    algorithms = sorted({index.algorithm for _, index in compressed})
    sizes = sum(image.stream_bytes for image, _ in compressed), sum(image.file_bytes for image, _ in compressed)
    return CompressionSummary(" and ".join(algorithms), *sizes)


def _plugins(folder: ImageFolder) -> tuple[str, ...]:
    versions = {plugin.name: plugin.version for plugin in folder.manifest.plugins} if folder.manifest else {}
    names = dict.fromkeys((*folder.inventory.plugins_entry.plugins, *versions))
    return tuple(f"{name} {versions[name]}" if name in versions else name for name in names)


def _task(
    folder: ImageFolder, entry: pb.pstree_entry, described: dict[int, pb.file_entry], pages: dict[int, PagesImage]
) -> TaskSummary:
    core: pb.core_entry = folder.read_one("core", entry.pid)
    memory: tuple[MemorySummary, ...] = ()
    descriptors: tuple[DescriptorSummary, ...] = ()
    stored_bytes = inherited_bytes = 0
    if folder.has("mm", entry.pid):
        pagemap = _checked_pagemap(folder, "pagemap", entry.pid, pages)
        memory = _memory(folder.read_one("mm", entry.pid), pagemap)
        stored_bytes = pagemap.present_pages * PAGE_BYTES
        descriptors = _descriptors(folder, entry.pid, core, described)
        if folder.has("inherited", entry.pid):
            inherited_bytes = sum(read_pagemap(folder, "inherited", entry.pid).nr_pages) * PAGE_BYTES
    return TaskSummary(
        pid=entry.pid,
        ppid=entry.ppid,
        pgid=entry.pgid,
        sid=entry.sid,
        state=_STATES.get(core.tc.task_state, f"state {core.tc.task_state}"),
        comm=core.tc.comm,
        threads=tuple(entry.threads),
        memory=memory,
        stored_bytes=stored_bytes,
        inherited_bytes=inherited_bytes,
        descriptors=descriptors,
    )


def _checked_pagemap(folder: ImageFolder, kind: str, ident: int, pages: dict[int, PagesImage]) -> Pagemap:
    """A pagemap whose pages image is long enough; ``pages`` gathers those images by their ids."""
    pagemap = read_pagemap(folder, kind, ident)
    if not pagemap.present_pages:
        return pagemap
    image = pages[pagemap.pages_id] = find_pages(folder, pagemap.pages_id)
    if pagemap.present_pages * PAGE_BYTES > image.stream_bytes:
        raise ImageError(
            f"{folder.path}/{image.name}: truncated: {kind}-{ident}.img counts {pagemap.present_pages} pages of "
            f"{PAGE_BYTES} bytes, the file has {image.stream_bytes} bytes"
        )
    return pagemap


def _pages_below(pagemap: Pagemap) -> Callable[[int], int]:
    """A function that tells how many stored pages lie below an address."""
    runs = zip(pagemap.vaddrs, pagemap.nr_pages, pagemap.flags, strict=True)
    stored: Iterable[tuple[int, int]] = ((vaddr, nr) for vaddr, nr, flags in runs if flags & PRESENT)
    in_order = list(stored) if pagemap.ascending else sorted(stored)
    starts = [vaddr for vaddr, _ in in_order]
    before = [0, *accumulate(nr for _, nr in in_order)]

    def below(address: int) -> int:
        index = bisect_right(starts, address) - 1
        if index < 0:
            return 0
        return before[index] + min(in_order[index][1], (address - starts[index]) // PAGE_BYTES)

    return below


def _vma_kind(vma: pb.vma_entry) -> str:
    if vma.flags & _MAP_GROWSDOWN:
        return "stack"
    return next((name for bits, name in _VMA_KINDS if vma.status & bits), "other")


def _memory(mm: pb.mm_entry, pagemap: Pagemap) -> tuple[MemorySummary, ...]:
    below = _pages_below(pagemap)
    mappings: Counter[str] = Counter()
    mapped: Counter[str] = Counter()
    stored: Counter[str] = Counter()
    for vma in mm.vmas:
        kind = _vma_kind(vma)
        mappings[kind] += 1
        mapped[kind] += max(0, vma.end - vma.start)
        stored[kind] += max(0, below(vma.end) - below(vma.start)) * PAGE_BYTES
    return tuple(MemorySummary(kind, mappings[kind], size, stored[kind]) for kind, size in mapped.most_common())


def _descriptors(
    folder: ImageFolder, pid: int, core: pb.core_entry, described: dict[int, pb.file_entry]
) -> tuple[DescriptorSummary, ...]:
    ids = folder.read_one("ids", pid) if folder.has("ids", pid) else core.ids
    if not folder.has("fdinfo", ids.files_id):
        return ()
    entries = sorted(folder.read("fdinfo", ids.files_id), key=lambda entry: entry.fd)
    return tuple(
        DescriptorSummary(entry.fd, _kind_name(entry.type), _target(described.get(entry.id)), bool(entry.flags & 1))
        for entry in entries
    )


def _kind_name(number: int) -> str:
    return _KIND_NAMES.get(number) or pb.fd_types.DESCRIPTOR.values_by_number[number].name.lower()


def _target(entry: pb.file_entry | None) -> str:
    """What a file description refers to, as far as one word can say it."""
    if entry is None:
        return ""
    if entry.HasField("reg"):
        return str(entry.reg.name)
    if entry.HasField("pipe"):
        return f"pipe {entry.pipe.pipe_id:#x}"
    if entry.HasField("fifo"):
        return f"pipe {entry.fifo.pipe_id:#x}"
    if entry.HasField("memfd"):
        return f"inode {entry.memfd.inode_id:#x}"
    if entry.HasField("efd"):
        return f"counter {entry.efd.counter}"
    if entry.HasField("usk"):
        return str(entry.usk.name.decode(errors="backslashreplace"))
    return ""


def format_summary(summary: FolderSummary) -> str:
    """For people: a few lines about the whole, then each task."""
    made = " ".join(
        part
        for part in (
            summary.tool,
            summary.created and f"at {summary.created}",
            summary.hostname and f"on {summary.hostname}",
            summary.kernel and f"(Linux {summary.kernel})",
        )
        if part
    )
    threads = sum(len(task.threads) for task in summary.tasks)
    lines = [
        f"{summary.path}: dumped by {made}",
        f"  {len(summary.tasks)} tasks, {threads} threads, {format_bytes(summary.stored_bytes)} of memory, "
        f"{format_bytes(summary.total_bytes)} in {len(summary.files)} files",
        f"  plugins: {', '.join(summary.plugins) or 'none'}",
    ]
    if summary.compressed is not None:
        lines.append(f"  {_compressed(summary.compressed)}")
    lines += [f"  shared memory {s.shmid}: {format_bytes(s.stored_bytes)}" for s in summary.shared_memory]
    depths: dict[int, int] = {}
    for task in summary.tasks:
        depths[task.pid] = depths.get(task.ppid, -1) + 1
        lines += _format_task(task, "  " * depths[task.pid])
    return "\n".join(lines) + "\n"


def _compressed(summary: CompressionSummary) -> str:
    plain, compressed = format_bytes(summary.bytes), format_bytes(summary.file_bytes)
    return f"compressed by {summary.algorithm}: {plain} to {compressed} ({summary.bytes / summary.file_bytes:.2f}:1)"


def _format_task(task: TaskSummary, indent: str) -> list[str]:
    lines = [
        "",
        f"{indent}{task.pid} {_shown(task.comm)}: {task.state}, {len(task.threads)} threads, "
        f"group {task.pgid}, session {task.sid}, {format_bytes(task.stored_bytes)} stored"
        + (f", {format_bytes(task.inherited_bytes)} shared with {task.ppid}" if task.inherited_bytes else ""),
    ]
    for memory in task.memory:
        lines.append(
            f"{indent}  {memory.kind:<18} {memory.mappings:>6} mappings {format_bytes(memory.mapped_bytes):>10} "
            f"{format_bytes(memory.stored_bytes):>10} stored"
        )
    for descriptor in task.descriptors:
        lines.append(f"{indent}  fd {descriptor.fd:<4} {descriptor.kind:<10} {_shown(descriptor.target)}".rstrip())
    return lines


def _shown(text: str) -> str:
    """A name out of an image must not steer the terminal."""
    return text if text.isprintable() else ascii(text)
