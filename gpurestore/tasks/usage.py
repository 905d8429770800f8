"""Which memory a tree uses: a dump may watch for a while, and a lazy restore brings first what was used.

The kernel notes in each page table entry that it was used, and takes the notes away on request
(``/proc/PID/clear_refs``, Documentation/filesystems/proc.rst). ``/proc/PID/smaps`` adds them up by mapping.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from gpurestore.errors import GpurestoreError, ImageError
from gpurestore.tasks import jsonvalues
from gpurestore.tasks.maps import Vma

_ALL_PAGES = b"1"


def forget(pids: Iterable[int]) -> None:
    """Have the kernel forget what tasks have used so far. Those that have ended meanwhile do not matter."""
    for pid in pids:
        try:
            Path(f"/proc/{pid}/clear_refs").write_bytes(_ALL_PAGES)
        except (FileNotFoundError, ProcessLookupError):
            continue
        except OSError as error:
            raise GpurestoreError(
                f"cannot observe which memory pid {pid} uses: {error.strerror} on /proc/{pid}/clear_refs; leave out"
                " --observe"
            ) from error


def collect(vmas: Sequence[Vma]) -> list[str]:
    """Starts of the private mappings that were used since :func:`forget`, for the extension's member ``used``."""
    return [f"{vma.start:x}" for vma in vmas if vma.referenced_bytes and not vma.shared]


def used(facts: Mapping[str, Any]) -> frozenset[int]:
    """The starts that :func:`collect` noted in a task's facts; empty where nobody watched. Raises ImageError."""
    starts = [jsonvalues.text(start, "mm.used") for start in jsonvalues.sequence(facts.get("used", []), "mm.used")]
    try:
        return frozenset(int(start, 16) for start in starts)
    except ValueError as error:
        raise ImageError("gpurestore.json: mm.used: not a list of addresses") from error
