"""Pagemap images: which pages a pages image holds, and where they belong. Coded in C; a million entries take a moment.

pagemap_head {pages_id}                                   pages-PAGES_ID.img holds the bytes
pagemap_entry {vaddr, compat_nr_pages, flags, nr_pages}   one per run of pages, in the order of their bytes
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from gpurestore.core import ffi, lib, new_error
from gpurestore.errors import ImageError
from gpurestore.images.container import check_head, encode_head
from gpurestore.images.folder import ImageFolder
from gpurestore.images.magic import KINDS

if TYPE_CHECKING:
    from gpurestore.images.writer import ImageWriter

PARENT = 1  # the bytes are in the parent snapshot
LAZY = 2  # may be brought in when first touched
PRESENT = 4  # the bytes are in the pages image


@dataclass(frozen=True, slots=True)
class Pagemap:
    """Runs of pages: ``nr_pages[i]`` of them from ``vaddrs[i]`` on, what they are in ``flags[i]``.

    Every address is that of a page, no run is empty or wraps around. CRIU may write runs out of order: only if
    ``ascending`` are they sorted and disjoint.
    """

    pages_id: int
    vaddrs: array[int]  # 'Q'
    nr_pages: array[int]  # 'Q'
    flags: array[int]  # 'I'
    present_pages: int
    ascending: bool

    def __len__(self) -> int:
        return len(self.vaddrs)


def encode(pages_id: int, vaddrs: Sequence[int], nr_pages: Sequence[int], flags: Sequence[int]) -> bytes:
    """The records of a pagemap. Raises ValueError for runs that no reader would take: a fault of the caller."""
    nr = len(vaddrs)
    if len(nr_pages) != nr or len(flags) != nr:
        raise ValueError(f"{nr} addresses, {len(nr_pages)} counts, {len(flags)} flags")
    err = new_error()
    out_bytes = ffi.new("uint64_t *")
    arrays = (
        ffi.from_buffer("uint64_t[]", _as("Q", vaddrs)),
        ffi.from_buffer("uint64_t[]", _as("Q", nr_pages)),
        ffi.from_buffer("uint32_t[]", _as("I", flags)),
    )
    if lib.gr_pagemap_encode(pages_id, *arrays, nr, ffi.NULL, 0, out_bytes, err) < 0:
        raise ValueError(_context(err))
    data = bytearray(out_bytes[0])
    if lib.gr_pagemap_encode(pages_id, *arrays, nr, ffi.from_buffer(data), len(data), out_bytes, err) < 0:
        raise ValueError(_context(err))
    return bytes(data)


def decode(data: bytes | memoryview, name: str = "pagemap", offset: int = 0) -> Pagemap:
    """Read the records of a pagemap, which start at ``offset`` of ``data``, the file ``name``."""
    if offset > len(data):
        raise ValueError(f"records at {offset} of {len(data)} bytes")
    err = new_error()
    buffer = ffi.from_buffer("uint8_t[]", data)
    count = ffi.new("uint64_t *")
    if lib.gr_pagemap_count(buffer, offset, len(buffer), count, err) < 0:
        raise ImageError(f"{name}: {_context(err)}")
    nr = count[0]
    vaddrs, nr_pages, flags = array("Q", bytes(8 * nr)), array("Q", bytes(8 * nr)), array("I", bytes(4 * nr))
    out = ffi.new("struct gr_pagemap_summary *")
    result = lib.gr_pagemap_decode(
        buffer,
        offset,
        len(buffer),
        nr,
        ffi.from_buffer("uint64_t[]", vaddrs),
        ffi.from_buffer("uint64_t[]", nr_pages),
        ffi.from_buffer("uint32_t[]", flags),
        out,
        err,
    )
    if result < 0:
        raise ImageError(f"{name}: {_context(err)}")
    return Pagemap(out.pages_id, vaddrs, nr_pages, flags, out.present_pages, bool(out.ascending))


def write_pagemap(
    writer: ImageWriter,
    kind: str,
    ident: int,
    pages_id: int,
    vaddrs: Sequence[int],
    nr_pages: Sequence[int],
    flags: Sequence[int],
) -> None:
    """Write a pagemap image; ``kind`` is ``pagemap`` (of a pid) or ``pagemap-shmem`` (of an object)."""
    name = KINDS[kind].file_name(ident)
    data = encode_head(KINDS[kind]) + encode(pages_id, vaddrs, nr_pages, flags)
    writer.append(writer.open_raw(name), data, name)


def read_pagemap(folder: ImageFolder, kind: str, ident: int) -> Pagemap:
    """Read a pagemap image. Whether its pages image is long enough for it is the reader's to check."""
    image = KINDS[kind]
    name = image.file_name(ident)
    data = folder.load(name)
    return decode(data, f"{folder.path}/{name}", check_head(image, data, f"{folder.path}/{name}"))


def _as(typecode: str, values: Sequence[int]) -> array[int]:
    return values if isinstance(values, array) and values.typecode == typecode else array(typecode, values)


def _context(err: Any) -> str:
    return str(ffi.string(err.context).decode(errors="replace"))
