"""The code and data that the kernel maps into every task: vdso, vvar, vvar_vclock.

A restored task gets the running kernel's own, moved to where the dumped task had them, because its program remembers
the addresses. That is right as long as the functions lie at the same offsets, which is checked before a restore.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import NamedTuple

from gpurestore.errors import Finding, ImageError
from gpurestore.images import pb
from gpurestore.tasks import maps, vmaflags

_OWN_NAMES = (b"[vdso]", b"[vvar]", b"[vvar_vclock]")
_ELF_HEADER = struct.Struct("<16sHHIQQQIHHHHHH")
_SECTION = struct.Struct("<IIQQQQIIQQ")
_SYMBOL = struct.Struct("<IBBHQQ")
_SHT_DYNSYM = 11
_MAX_SECTIONS = 256
_MAX_SYMBOLS = 4096


class Part(NamedTuple):
    """One mapping that the kernel made. ``code`` is true for the vdso itself."""

    start: int
    size: int
    code: bool

    @property
    def end(self) -> int:
        """The first address behind it."""
        return self.start + self.size


class Layout(NamedTuple):
    """Where a task has its parts, in ascending order. Empty for a task that unmapped them."""

    parts: tuple[Part, ...] = ()

    @property
    def data_bytes(self) -> int:
        """All but the vdso itself."""
        return sum(part.size for part in self.parts if not part.code)

    @property
    def code(self) -> Part | None:
        """The vdso itself."""
        return next((part for part in self.parts if part.code), None)


@cache  # nobody moves them in a process that runs
def own_layout() -> Layout:
    """The layout of this process, which every restored task starts with."""
    parts = []
    for line in Path("/proc/self/maps").read_bytes().split(b"\n"):
        if line.endswith(_OWN_NAMES) and (vma := maps.parse_maps_line(line)) is not None:
            parts.append(Part(vma.start, vma.size, vma.path == "[vdso]"))
    return Layout(tuple(parts))


def own_code() -> bytes:
    """The bytes of this process's vdso."""
    code = own_layout().code
    if code is None:
        return b""
    with open("/proc/self/mem", "rb", buffering=0) as memory:
        memory.seek(code.start)
        return memory.read(code.size)


def image_layout(mm: pb.mm_entry) -> Layout:
    """The layout that a dumped task had. The image merges neighbouring data areas into one."""
    return Layout(
        tuple(
            Part(vma.start, vma.end - vma.start, bool(vma.status & vmaflags.VDSO))
            for vma in mm.vmas
            if vma.status & (vmaflags.VDSO | vmaflags.VVAR)
        )
    )


def moves(own: Layout, mm: pb.mm_entry) -> list[tuple[Part, Part]]:
    """Each part of ``own`` that the task of ``mm`` has, and what it has to become; the others are to be unmapped.

    Raises ImageError where the shapes differ; :func:`check` reports that beforehand in friendlier words.
    """
    target = image_layout(mm)
    pairs: list[tuple[Part, Part]] = []
    for code in (False, True):
        mine = [part for part in own.parts if part.code == code]
        theirs = [part for part in target.parts if part.code == code]
        if not theirs:
            continue
        if len(theirs) > 1 or sum(part.size for part in mine) != theirs[0].size:
            raise ImageError("the images have areas of the kernel (vdso, vvar) that this kernel cannot provide")
        at = theirs[0].start
        for part in mine:
            pairs.append((part, part._replace(start=at)))
            at += part.size
    return pairs


def target_layout(own: Layout, mm: pb.mm_entry) -> Layout:
    """The layout after the moves: what a child that is cloned then starts with."""
    return Layout(tuple(sorted((new for _, new in moves(own, mm)), key=lambda part: part.start)))


def symbols(code: bytes) -> dict[str, int]:
    """Offsets of the functions that a vdso exports. Raises ImageError if ``code`` is not a whole ELF image."""
    try:
        return _symbols(code)
    except (struct.error, IndexError, ValueError) as error:
        raise ImageError("the vdso in the images is damaged") from error


def _symbols(code: bytes) -> dict[str, int]:
    header = _ELF_HEADER.unpack_from(code, 0)
    if header[0][:5] != b"\x7fELF\x02":
        raise ImageError("the vdso in the images is not a 64-bit ELF file")
    table_at, entry_size, nr_sections = header[6], header[11], min(header[12], _MAX_SECTIONS)
    sections = [_SECTION.unpack_from(code, table_at + i * entry_size) for i in range(nr_sections)]
    found = {}
    for section in sections:
        if section[1] != _SHT_DYNSYM:
            continue
        _, _, _, _, at, size, link, *_ = section
        names_at = sections[link][4]
        for i in range(1, min(size // _SYMBOL.size, _MAX_SYMBOLS)):
            name_at, _, _, _, value, _ = _SYMBOL.unpack_from(code, at + i * _SYMBOL.size)
            end = code.index(b"\0", names_at + name_at)
            found[code[names_at + name_at : end].decode()] = value
    return found


def check(pid: int, mm: pb.mm_entry, dumped_code: bytes, rips: Iterable[int]) -> list[Finding]:
    """Why the running kernel's vdso cannot stand in for the dumped one. ``rips``: where the threads will go on."""
    target, own = image_layout(mm), own_layout()
    where = f"pid {pid}, vdso"
    what = "the images come from another kernel"
    if target.code is None and not target.data_bytes:
        return []
    if len(target.parts) > 2:
        return [Finding(where, "its areas are scattered", "this kernel keeps vvar and vdso in one piece each")]
    code = own.code
    if code is None or (target.code is not None and target.code.size != code.size):
        ours, theirs = code.size if code else 0, target.code.size if target.code else 0
        return [Finding(where, what, f"its vdso has {theirs} bytes and this kernel's {ours}")]
    if target.data_bytes and target.data_bytes != own.data_bytes:
        return [Finding(where, what, f"its vvar has {target.data_bytes} bytes and this kernel's {own.data_bytes}")]
    if target.code is None:
        return []
    if target.data_bytes and _distance(target) != _distance(own):
        return [Finding(where, what, "vvar and vdso lie at another distance here")]
    return _check_code(where, target.code, dumped_code, rips)


def _distance(layout: Layout) -> int:
    """From the data to the code, which reads it at a fixed offset."""
    code = layout.code
    data = next(part for part in layout.parts if not part.code)
    return code.start - data.start if code is not None else 0


def _check_code(where: str, target: Part, dumped_code: bytes, rips: Iterable[int]) -> list[Finding]:
    ours = own_code()
    if ours == dumped_code:
        return []
    what = "the images come from another kernel"
    if symbols(ours) != symbols(dumped_code):
        return [Finding(where, what, "its vdso has other functions, or has them at other places")]
    if any(target.start <= rip < target.end for rip in rips):
        return [Finding(where, what, "its vdso has other code, and a thread was stopped inside")]
    return []
