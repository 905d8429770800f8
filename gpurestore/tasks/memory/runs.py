"""What both directions share: runs of pages, counters, and how many threads move them."""

from __future__ import annotations

import bisect
import os
from array import array
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from gpurestore.core import ffi
from gpurestore.tasks.maps import PAGE_BYTES


@dataclass(slots=True)
class PageRuns:
    """Runs of pages, ascending: ``nr_pages[i]`` of them from ``vaddrs[i]`` on."""

    vaddrs: array[int] = field(default_factory=lambda: array("Q"))
    nr_pages: array[int] = field(default_factory=lambda: array("Q"))

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return zip(self.vaddrs, self.nr_pages, strict=True)

    def __len__(self) -> int:
        return len(self.vaddrs)

    @property
    def total_bytes(self) -> int:
        return sum(self.nr_pages) * PAGE_BYTES

    def insert(self, address: int, nr_pages: int) -> None:
        """Add a run at its place; it must not overlap another."""
        at = bisect.bisect(self.vaddrs, address)
        self.vaddrs.insert(at, address)
        self.nr_pages.insert(at, nr_pages)


class Progress:
    """A count of bytes that C threads raise while they work and that anybody may read."""

    def __init__(self) -> None:
        self.counter: Any = ffi.new("uint64_t *")

    @property
    def done_bytes(self) -> int:
        return int(self.counter[0])


def default_jobs() -> int:
    """As many threads as there are processors for us."""
    return len(os.sched_getaffinity(0))


def u64(values: array[int]) -> Any:
    """An array of 'Q' as C sees it."""
    return ffi.from_buffer("uint64_t[]", values)
