"""The mappings of a task as ``/proc/PID/smaps`` shows them, and holes between them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Final, NamedTuple

from gpurestore.errors import NoSuchTaskError

PAGE_BYTES: Final = 4096
HUGE_PAGE_BYTES: Final = 2 << 20

PROT_READ, PROT_WRITE, PROT_EXEC = 1, 2, 4

# 47 bits of address are there on every machine; the last page is kept free by the kernel (TASK_SIZE_MAX).
TASK_SIZE: Final = (1 << 47) - PAGE_BYTES
# vm.mmap_min_addr is at most this on any distribution.
LOWEST_ADDRESS: Final = 65536
# With randomisation, programs and their heap lie below 0x57.., libraries and stacks above 0x7e..: a hole in this part
# of the address space is out of the way of everything that grows.
_QUIET_START, _QUIET_END = 0x1000_0000_0000, 0x5000_0000_0000
# Distance kept to neighbours where there is room: stacks and heaps grow.
_MARGIN: Final = 1 << 30

_HEADER = re.compile(
    rb"([0-9a-f]+)-([0-9a-f]+) ([r-][w-][x-][sp]) ([0-9a-f]+) ([0-9a-f]+):([0-9a-f]+) (\d+) *(.*)", re.DOTALL
)
_DELETED = " (deleted)"


class Vma(NamedTuple):
    """One mapping. ``path`` is what the kernel shows, without the mark of deletion: a path, ``[stack]``, or nothing."""

    start: int
    end: int
    prot: int
    shared: bool
    offset: int
    dev: tuple[int, int]
    ino: int
    path: str
    deleted: bool
    flags: frozenset[str] = frozenset()  # VmFlags, two letters each
    rss_bytes: int = 0
    swap_bytes: int = 0
    locked_bytes: int = 0
    huge_bytes: int = 0  # memory, anonymous or shared, mapped by transparent huge pages
    referenced_bytes: int = 0  # used since /proc/PID/clear_refs was written to
    pkey: int = 0

    @property
    def size(self) -> int:
        """Bytes."""
        return self.end - self.start

    def where(self, pid: int) -> str:
        """The words that a :class:`~gpurestore.errors.Finding` uses for this mapping."""
        return f"pid {pid}, mapping {self.start:x}-{self.end:x}"


def read(pid: int) -> list[Vma]:
    """All mappings of a task, in ascending order, ``[vsyscall]`` included. Needs the right to trace it."""
    try:
        return parse(Path(f"/proc/{pid}/smaps").read_bytes())
    except (FileNotFoundError, ProcessLookupError) as error:
        raise NoSuchTaskError(f"pid {pid}: there is no such process") from error


def parse(smaps: bytes) -> list[Vma]:
    """The mappings in the text of an smaps file."""
    vmas = []
    header: re.Match[bytes] | None = None
    facts: dict[bytes, bytes] = {}
    for line in smaps.split(b"\n"):
        match = _HEADER.fullmatch(line)
        if match is None:
            key, colon, value = line.partition(b":")
            if colon:
                facts[key] = value
            continue
        if header is not None:
            vmas.append(_make(header, facts))
        header, facts = match, {}
    if header is not None:
        vmas.append(_make(header, facts))
    return vmas


def parse_maps_line(line: bytes) -> Vma | None:
    """The mapping that one line of a maps file (or one heading of an smaps file) describes."""
    match = _HEADER.fullmatch(line)
    return None if match is None else _make(match, {})


def _make(header: re.Match[bytes], facts: dict[bytes, bytes]) -> Vma:
    start, end, perms, offset, major, minor, ino, name = header.groups()
    path = name.replace(b"\\012", b"\n").decode(errors="surrogateescape")
    deleted = path.endswith(_DELETED)
    return Vma(
        start=int(start, 16),
        end=int(end, 16),
        prot=PROT_READ * (perms[0:1] == b"r") | PROT_WRITE * (perms[1:2] == b"w") | PROT_EXEC * (perms[2:3] == b"x"),
        shared=perms[3:4] == b"s",
        offset=int(offset, 16),
        dev=(int(major, 16), int(minor, 16)),
        ino=int(ino),
        path=path.removesuffix(_DELETED),
        deleted=deleted,
        flags=frozenset(facts.get(b"VmFlags", b"").decode().split()),
        rss_bytes=_kib(facts, b"Rss"),
        swap_bytes=_kib(facts, b"Swap"),
        locked_bytes=_kib(facts, b"Locked"),
        huge_bytes=_kib(facts, b"AnonHugePages") + _kib(facts, b"ShmemPmdMapped"),
        referenced_bytes=_kib(facts, b"Referenced"),
        pkey=int(facts.get(b"ProtectionKey", b"0")),
    )


def _kib(facts: dict[bytes, bytes], key: bytes) -> int:
    return int(facts[key].split()[0]) * 1024 if key in facts else 0


def own_ranges() -> list[tuple[int, int]]:
    """The address ranges that this process itself occupies."""
    ranges = []
    for line in Path("/proc/self/maps").read_bytes().split(b"\n"):
        start, dash, end = line.partition(b" ")[0].partition(b"-")
        if dash and int(end, 16) <= TASK_SIZE:
            ranges.append((int(start, 16), int(end, 16)))
    return ranges


def gaps(taken: Iterable[tuple[int, int]], low: int, high: int) -> list[tuple[int, int]]:
    """What ``taken`` leaves free between ``low`` and ``high``, ascending. The ranges may overlap and have any order."""
    free = []
    at = low
    for start, end in sorted(taken):
        if start > at:
            free.append((at, min(start, high)))
        at = max(at, end)
        if at >= high:
            return free
    free.append((at, high))
    return free


def find_hole(taken: Sequence[tuple[int, int]], size: int, *, align: int = HUGE_PAGE_BYTES) -> int:
    """An address at which ``size`` bytes are free in all of ``taken`` together; the same answer for the same input.

    The caller passes every address space that matters, its own (:func:`own_ranges`) too. A quiet part of the address
    space and a distance to everything else are preferred. Raises ValueError if there is no such hole.
    """
    for low, high, margin in (
        (_QUIET_START, _QUIET_END, _MARGIN),
        (1 << 32, TASK_SIZE, _MARGIN),
        (LOWEST_ADDRESS, TASK_SIZE, 0),
    ):
        for start, end in gaps(taken, low, high):
            address = -(-(start + margin) // align) * align
            if address + size + margin <= end:
                return address
    raise ValueError(f"no hole of {size} bytes is free in the address space")
