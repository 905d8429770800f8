"""What plain and compressed pages images in the making have in common."""

from __future__ import annotations

from abc import ABC, abstractmethod
from array import array
from collections.abc import Sequence
from typing import TYPE_CHECKING

from gpurestore.core import Cancel
from gpurestore.images.pagemap import PRESENT, write_pagemap
from gpurestore.tasks.memory.runs import PageRuns, Progress

if TYPE_CHECKING:
    from gpurestore.images.writer import ImageWriter


class AnyPagesFile(ABC):
    """A pages image in the making: runs are written one behind the other, each by several threads.

    ``size`` are the bytes of the pages that it holds.
    """

    def __init__(
        self,
        writer: ImageWriter,
        pages_id: int,
        name: str,
        fd: int,
        cancel: Cancel | None,
        progress: Progress | None,
    ) -> None:
        self._writer, self._pages_id, self._name, self._fd = writer, pages_id, name, fd
        self._cancel, self._progress = cancel, progress
        self.size = 0

    def add_from_task(self, pid: int, runs: PageRuns, kept: Sequence[tuple[int, int]] = ()) -> PageRuns:
        """Append pages of a frozen task; returns those that were stored, without pages of zeros.

        In the ranges ``kept`` (start and end, ascending) these are stored as well.
        """
        return self._add(pid, -1, runs, kept)

    def add_from_file(self, fd: int, runs: PageRuns) -> PageRuns:
        """Append pages of an object, at the offsets that ``runs`` give; returns those that were stored."""
        return self._add(0, fd, runs, ())

    def finish(self, kind: str, ident: int, stored: PageRuns) -> None:
        """Write the pagemap that says where the pages belong: all that were stored, in that order."""
        self._end()
        flags = array("I", [PRESENT]) * len(stored)
        write_pagemap(self._writer, kind, ident, self._pages_id, stored.vaddrs, stored.nr_pages, flags)

    @abstractmethod
    def _add(self, pid: int, fd: int, runs: PageRuns, kept: Sequence[tuple[int, int]]) -> PageRuns:
        """Append pages of the task ``pid``, or (``fd`` not negative) of an object."""

    @abstractmethod
    def _end(self) -> None:
        """All pages are there."""
