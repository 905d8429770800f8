"""Huge pages at restore: which blocks of 2 MiB become one, and how a task gets them without a trace on its mappings.

``madvise(MADV_HUGEPAGE)`` would leave a flag that has no neutral reset, and split a mapping that is only partly dense.
So pages are read into a staging mapping of the worker that has the flag, and from there whole page table entries are
moved to where they belong (``UFFDIO_MOVE``, Linux 6.8). Where the kernel does not offer this, what comes in are small
pages.
"""

from __future__ import annotations

from array import array
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any, Final

from gpurestore.batch import Call
from gpurestore.core import lib
from gpurestore.errors import ImageError
from gpurestore.syscalls import NR
from gpurestore.tasks import vmaflags
from gpurestore.tasks.maps import HUGE_PAGE_BYTES, PAGE_BYTES
from gpurestore.tasks.memory.runs import PageRuns

STAGING_BYTES: Final = int(lib.GR_PUMP_STAGING_BYTES)
# Of 512 pages: a huge page then costs at most a fifteenth more than what it replaces.
MIN_PAGES: Final = 480

_THP = Path("/sys/kernel/mm/transparent_hugepage")
_PROT_READ_WRITE = 3
_STAGING_FLAGS = vmaflags.MAP_PRIVATE | vmaflags.MAP_ANONYMOUS | vmaflags.MAP_NORESERVE | vmaflags.MAP_FIXED_NOREPLACE


class HugePages(StrEnum):
    """``--hugepages``: blocks that were densely populated, only those that were huge at the dump, or none."""

    AUTO = "auto"
    KEEP = "keep"
    NEVER = "never"


@dataclass(frozen=True, slots=True)
class HugeBlocks:
    """Which blocks become huge pages: with at least ``min_pages`` stored and, if given, inside of ``ranges``."""

    min_pages: int
    ranges: tuple[array[int], array[int]] | None = None  # starts, ends; ascending and apart


def blocks(choice: HugePages, facts: Mapping[str, Any] = {}) -> HugeBlocks | None:
    """What ``choice`` means for a task whose extension facts are ``facts``; None: no huge pages. Raises ImageError."""
    if choice is HugePages.AUTO:
        return HugeBlocks(MIN_PAGES)
    if choice is HugePages.KEEP:
        return HugeBlocks(1, _kept(facts.get("huge", ())))
    return None


def blocks_of_object(choice: HugePages) -> HugeBlocks | None:
    """The same for shared memory, of which a dump does not tell what was huge: KEEP is AUTO there."""
    return None if choice is HugePages.NEVER else HugeBlocks(MIN_PAGES)


def describe(runs: PageRuns) -> list[list[str]]:
    """Memory in huge pages, as the extension's member ``huge`` holds it: pairs of start and end."""
    return [[f"{start:x}", f"{start + nr_pages * PAGE_BYTES:x}"] for start, nr_pages in runs]


def _kept(value: Any) -> tuple[array[int], array[int]]:
    starts, ends = array("Q"), array("Q")
    try:
        for start, end in value:
            starts.append(int(start, 16))
            ends.append(int(end, 16))
    except (TypeError, ValueError, OverflowError) as error:
        raise ImageError("gpurestore.json: member 'huge' is no list of ranges") from error
    if any(end <= start for start, end in zip(starts, ends, strict=True)) or any(
        start < end for start, end in zip(starts[1:], ends, strict=False)
    ):
        raise ImageError("gpurestore.json: the ranges of member 'huge' are not in order")
    return starts, ends


def anonymous_are_available() -> bool:
    """Whether this machine gives huge pages to anonymous memory that asks for them."""
    own = _choice("hugepages-2048kB/enabled")
    if own is not None and own != "inherit":
        return own in ("always", "madvise")
    return _choice("enabled") in ("always", "madvise")


def shared_are_available() -> bool:
    """The same for shared anonymous memory and memfds."""
    own = _choice("hugepages-2048kB/shmem_enabled")
    if own is not None and own != "inherit":
        return own in ("always", "within_size", "advise")
    return _choice("shmem_enabled") in ("always", "within_size", "advise", "force")


def _choice(name: str) -> str | None:
    """The word in brackets."""
    try:
        text = (_THP / name).read_text()
    except OSError:
        return None
    return text.partition("[")[2].partition("]")[0]


def plan_staging(staging: int, nr_workers: int) -> list[Call]:
    """Map the staging of all workers."""
    return [
        Call(
            NR.MMAP,
            (staging, nr_workers * STAGING_BYTES, _PROT_READ_WRITE, _STAGING_FLAGS, -1, 0),
            "mapping room for huge pages",
            want=staging,
        ),
        Call(
            NR.MADVISE,
            (staging, nr_workers * STAGING_BYTES, vmaflags.MADV_HUGEPAGE),
            "asking for huge pages",
            want=0,
        ),
    ]


def plan_no_staging(staging: int, nr_workers: int) -> list[Call]:
    """Unmap it."""
    return [Call(NR.MUNMAP, (staging, nr_workers * STAGING_BYTES), "unmapping room for huge pages", want=0)]


def staging_bytes(nr_workers: int) -> int:
    """Room for the staging of ``nr_workers`` workers, wherever it begins."""
    return nr_workers * STAGING_BYTES + HUGE_PAGE_BYTES
