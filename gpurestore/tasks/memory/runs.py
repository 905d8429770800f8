"""What both directions share: runs of pages, counters, and how many threads move them."""

from __future__ import annotations

import bisect
import os
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from gpurestore.core import check, ffi, lib, new_error
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

    @classmethod
    def of_ranges(cls, ranges: Sequence[tuple[int, int]]) -> PageRuns:
        """Runs from ascending ranges of addresses, as start and end."""
        sizes = ((end - start) // PAGE_BYTES for start, end in ranges)
        return cls(array("Q", (start for start, _ in ranges)), array("Q", sizes))

    @classmethod
    def made_by(cls, fill: Callable[[Any, Any], int]) -> PageRuns:
        """What a C function leaves in the ``struct gr_page_runs`` and ``struct gr_error`` that it is given."""
        err, out = new_error(), ffi.new("struct gr_page_runs *")
        check(fill(out, err), err)
        try:
            runs = cls()
            runs.vaddrs.frombytes(ffi.buffer(out.vaddrs, out.nr_runs * 8) if out.nr_runs else b"")
            runs.nr_pages.frombytes(ffi.buffer(out.nr_pages, out.nr_runs * 8) if out.nr_runs else b"")
            return runs
        finally:
            lib.gr_page_runs_destroy(out)

    def view(self) -> tuple[Any, Any]:
        """The runs as C sees them, and what must live as long as that is used."""
        keep = u64(self.vaddrs), u64(self.nr_pages)
        return ffi.new("struct gr_runs_view *", (*keep, len(self))), keep

    def __and__(self, other: PageRuns) -> PageRuns:
        """The pages of both. A run of the result lies in one run of ``self``."""
        return self._combine(other, lib.GR_RUNS_AND)

    def __sub__(self, other: PageRuns) -> PageRuns:
        """The pages that ``other`` lacks. A run of the result lies in one run of ``self``."""
        return self._combine(other, lib.GR_RUNS_MINUS)

    def __or__(self, other: PageRuns) -> PageRuns:
        """The pages of either; runs that touch are joined."""
        return self._combine(other, lib.GR_RUNS_OR)

    def _combine(self, other: PageRuns, op: int) -> PageRuns:
        (ours, _keep), (theirs, _keep_theirs) = self.view(), other.view()
        return self.made_by(lambda out, err: lib.gr_page_runs_combine(ours, theirs, op, out, err))


class WorkerTimes(NamedTuple):
    """What one thread moved, and when, by the monotonic clock."""

    begin_ns: int
    end_ns: int
    bytes: int


class Progress:
    """A count of bytes that C threads raise while they work and that anybody may read; who did what, in the end."""

    def __init__(self) -> None:
        self.counter: Any = ffi.new("uint64_t *")
        self.workers: list[WorkerTimes] = []

    @property
    def done_bytes(self) -> int:
        return int(self.counter[0])


def default_jobs() -> int:
    """As many threads as there are processors for us."""
    return len(os.sched_getaffinity(0))


def u64(values: array[int]) -> Any:
    """An array of 'Q' as C sees it."""
    return ffi.from_buffer("uint64_t[]", values)
