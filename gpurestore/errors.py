"""Every error that gpurestore raises on purpose, and the exit code of each.

A message says what failed, where, why and what to do, in one line. The cause is chained.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple


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


class Finding(NamedTuple):
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


class LazyPagesError(GpurestoreError):
    """Memory of a tree that runs already could not be brought in; the message says what became of the tree."""


class CudaError(GpurestoreError):
    """The NVIDIA driver is missing, too old, or refused a call; ``code`` is its CUresult, 0 where no call was made."""

    def __init__(self, message: str, code: int = 0) -> None:
        self.code = code
        super().__init__(message)


class CancelledError(GpurestoreError):
    """The operation was interrupted (Ctrl-C, SIGTERM) and undone."""

    exit_code = 130


class NeedsPersonError(GpurestoreError):
    """Undoing failed as well: the message says what is left and who must do what."""

    exit_code = 3


def leading(group: BaseExceptionGroup[GpurestoreError]) -> GpurestoreError:
    """Of several errors from concurrent stages the one to tell: what needs a person; else the first that is not just
    the echo of another one's failure, a stage that was told to end."""
    leaves: list[GpurestoreError] = []
    for part in group.exceptions:
        leaves.append(leading(part) if isinstance(part, BaseExceptionGroup) else part)
    urgent = [leaf for leaf in leaves if isinstance(leaf, NeedsPersonError)]
    causes = [leaf for leaf in leaves if not isinstance(leaf, CancelledError)]
    return (urgent or causes or leaves)[0]


class PluginError(GpurestoreError):
    """Something about a device plugin; below it one class for each thing to mend."""


class PluginLoadError(PluginError):
    """A plugin could not be loaded. ``plugin`` is its name, or its file where the name is not known yet."""

    def __init__(self, plugin: str, why: str) -> None:
        self.plugin = plugin
        self.why = why
        super().__init__(f"plugin {plugin}: {why}")


class PluginNotFoundError(PluginLoadError):
    """The folder or file that was named is not there."""


class PluginOpenError(PluginLoadError):
    """The file is there, but the dynamic loader or the Python interpreter refuses it."""


class PluginSymbolError(PluginOpenError):
    """It needs a symbol that neither this host nor its libraries have: one from inside of CRIU, most often."""

    def __init__(self, plugin: str, symbol: str) -> None:
        self.symbol = symbol
        super().__init__(
            plugin,
            f"it needs the symbol {symbol}, which this host does not offer; plugins that reach into CRIU beyond its "
            "plugin interface run only there",
        )


class PluginEntryError(PluginLoadError):
    """It was opened, but holds no usable plugin: no descriptor, no class, no name."""


class PluginVersionError(PluginLoadError):
    """It was made for a newer version of the interface."""


class PluginHooksError(PluginLoadError):
    """It has more hooks than its version of the interface knows."""


class PluginFlagsError(PluginLoadError):
    """It needs capabilities that this host does not offer."""


class PluginRefusedError(PluginLoadError):
    """It looked at the host's version and capabilities, and refused."""


class PluginNameError(PluginLoadError):
    """Another plugin has its name already."""


class PluginInitError(PluginLoadError):
    """Its init failed."""


class PluginUnloadError(PluginLoadError):
    """It stays in memory although it was unloaded, or a hook of it never came back."""


class PluginOptionError(PluginError):
    """A --plugin-option that is no option, or is for a plugin that is not there."""

    exit_code = 2


class PluginMissingError(PluginError):
    """The images need plugins that are not there; nothing was created."""


class HookError(PluginError):
    """A hook of a plugin failed. ``pid`` is None for hooks that are about no task."""

    def __init__(self, plugin: str, hook: str, pid: int | None, why: str) -> None:
        self.plugin = plugin
        self.hook = hook
        self.pid = pid
        self.why = why
        about = "" if pid is None else f" of pid {pid}"
        super().__init__(f"plugin {plugin}: {hook}{about} failed: {why}")


class HookTimeoutError(HookError):
    """A hook did not come back in the time that it was given."""
