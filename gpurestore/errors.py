"""Every error that gpurestore raises on purpose, and the exit code of each.

A message says what failed, where, why and what to do, in one line. The cause is chained.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


class GpurestoreError(Exception):
    """Base of all errors: the operation failed and the task tree is as it was before."""

    exit_code = 1


class UsageError(GpurestoreError):
    """The request itself makes no sense: a bad option, a folder that holds no images, pid 0."""

    exit_code = 2


class PrivilegeError(GpurestoreError):
    """A right is missing; the message names it and the way to get it."""


class NoSuchTaskError(GpurestoreError):
    """The pid names no process, or one that cannot be dumped at all (a kernel thread, a zombie)."""


class TracedError(GpurestoreError):
    """Somebody else traces the task already."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One obstacle: where it is (``pid 12, fd 3``), what it is, and why it stands in the way."""

    where: str
    what: str
    why: str

    def __str__(self) -> str:
        return f"{self.where}: {self.what}: {self.why}"


class FindingsError(GpurestoreError):
    """A list of obstacles that were all found before anything was changed."""

    def __init__(self, summary: str, findings: Sequence[Finding]) -> None:
        self.findings = tuple(findings)
        super().__init__("; ".join([summary, *map(str, self.findings)]))


class UnsupportedResourceError(FindingsError):
    """The tree holds resources that a dump cannot carry; nothing was written."""


class RestoreCheckError(FindingsError):
    """The images cannot be restored here (pids taken, files missing, ...); nothing was created."""


class ImageError(GpurestoreError):
    """An image file is missing, damaged, truncated, or of another tool; the message names it."""


class TraceFileError(GpurestoreError):
    """A file is not a trace as ``--trace`` writes it; the message names the file and the place."""


class CoreError(GpurestoreError):
    """A request to the C core failed; ``errno`` is the kernel's, ``context`` what was being done."""

    def __init__(self, errno: int, context: str) -> None:
        import os

        self.errno = errno
        self.context = context
        super().__init__(f"{context}: {os.strerror(errno)}")


class CallFailedError(CoreError):
    """A system call that ran inside a task did not answer as expected."""


class TaskDiedError(GpurestoreError):
    """A task went away while it was worked on (killed from outside, out of memory)."""


class CancelledError(GpurestoreError):
    """The operation was interrupted (Ctrl-C, SIGTERM) and undone."""

    exit_code = 130


class NeedsPersonError(GpurestoreError):
    """Undoing failed as well: the message says what is left and who must do what."""

    exit_code = 3
