"""Files and mappings that the engine does not know, and that a device plugin claims instead.

Dump: a descriptor that nothing else here can carry is offered under a number (its file id); a mapping of a device, or
of memory that lies in a memfd, is offered by a descriptor of its file. What is claimed gets an entry, and the plugin
keeps the content. Restore: the plugin gives a descriptor for each number, and may redirect each mapping.
"""

from __future__ import annotations

import enum
import os
import stat
from typing import NamedTuple, Protocol

from gpurestore.errors import Finding, GpurestoreError
from gpurestore.images import pb
from gpurestore.tasks import vmaflags
from gpurestore.tasks.fdinfo import OpenFile
from gpurestore.tasks.maps import Vma


class Claim(enum.Enum):
    """As what a plugin took a descriptor: it will be asked for it as the same."""

    FILE = enum.auto()
    UNIX_SOCKET = enum.auto()


class Claims(Protocol):
    """Who may claim things at dump. ``fd`` is ours, valid during the call; -1 for a mapped memfd out of reach."""

    def claim_file(self, fd: int, ident: int, *, is_unix_socket: bool) -> Claim | None:
        """Whether a plugin takes the file under number ``ident``, and as what."""
        ...

    def claim_mapping(self, fd: int, found: os.stat_result) -> bool:
        """Whether a plugin takes a mapping of this file."""
        ...


class RetryFile(Exception):  # noqa: N818 - an answer, not an error
    """The plugin wants to be asked again when other files are open."""


class Redirect(NamedTuple):
    """Map ``fd`` (ours, to be closed by the caller; -1: the path itself) at offset ``pgoff``."""

    pgoff: int
    fd: int = -1


class Openers(Protocol):
    """Who gives claimed things back at restore."""

    def open_file(self, ident: int, claim: Claim) -> int:
        """A descriptor for the file that was claimed under ``ident``, ours to close. May raise RetryFile."""
        ...

    def redirect_mapping(self, path: str, address: int, pgoff: int) -> Redirect | None:
        """Where a claimed mapping leads now; None: where it led."""
        ...


class Nobody:
    """No plugins: nothing is claimed, nothing can be given back."""

    def claim_file(self, fd: int, ident: int, *, is_unix_socket: bool) -> Claim | None:
        """No."""
        return None

    def claim_mapping(self, fd: int, found: os.stat_result) -> bool:
        """No."""
        return False

    def open_file(self, ident: int, claim: Claim) -> int:
        """Nobody has it."""
        raise GpurestoreError(f"file {ident} was claimed by a device plugin at dump, and none is loaded")

    def redirect_mapping(self, path: str, address: int, pgoff: int) -> Redirect | None:
        """Where it led."""
        return None


# ---- dump


def collect_file(file: OpenFile, ident: int) -> pb.file_entry:
    """The entry of a claimed descriptor. CRIU has the same, without the mark for sockets."""
    return pb.file_entry(type=pb.EXT, id=ident, ext=pb.ext_file_entry(id=ident, fown=file.fown))


def collect_mapped(path: str, ident: int, flags: int, found: os.stat_result) -> pb.file_entry:
    """The entry of the file behind a claimed mapping: a name for the plugin, never opened if it says so."""
    no_owner = pb.fown_entry(uid=0, euid=0, signum=0, pid_type=0, pid=0)
    regular = pb.reg_file_entry(
        id=ident, flags=flags, pos=0, fown=no_owner, name=path, size=found.st_size, mode=found.st_mode
    )
    return pb.file_entry(type=pb.REG, id=ident, reg=regular)


def offer_mapping(claims: Claims, pid: int, vma: Vma, refused: Finding | None) -> os.stat_result | None:
    """Offer a mapping that was refused, or that leads into a memfd. The state of its file if it was claimed."""
    if refused is None and not (vma.shared and vma.path.startswith("/memfd:")):
        return None
    if not vma.path.startswith("/"):
        return None
    fd = _open_mapped(pid, vma)
    if fd is None:
        if refused is not None:
            return None
        # An ordinary user cannot open a memfd that is only mapped: what /proc/PID/maps shows must do.
        mode, dev = stat.S_IFREG | 0o777, os.makedev(*vma.dev)
        found = os.stat_result((mode, vma.ino, dev, 0, 0, 0, vma.offset + vma.size, 0, 0, 0))
        return found if claims.claim_mapping(-1, found) else None
    try:
        found = os.fstat(fd)
        return found if claims.claim_mapping(fd, found) else None
    finally:
        os.close(fd)


def _open_mapped(pid: int, vma: Vma) -> int | None:
    """The file behind a mapping, not opened for use: a device's open may have effects."""
    for path in (f"/proc/{pid}/map_files/{vma.start:x}-{vma.end:x}", vma.path):
        try:
            fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
        except OSError:
            continue
        if os.fstat(fd).st_ino == vma.ino:
            return fd
        os.close(fd)
    return _open_through_descriptor(pid, vma)


def _open_through_descriptor(pid: int, vma: Vma) -> int | None:
    """A file without a name is out of reach for an ordinary user, unless the task holds it open as well."""
    for name in os.listdir(f"/proc/{pid}/fd"):
        try:
            found = os.stat(f"/proc/{pid}/fd/{name}")
            if found.st_ino == vma.ino and os.makedev(*vma.dev) == found.st_dev:
                return os.open(f"/proc/{pid}/fd/{name}", os.O_PATH | os.O_CLOEXEC)
        except OSError:
            continue
    return None


# ---- restore


def is_claimed(vma: pb.vma_entry) -> bool:
    """Whether a plugin claimed the mapping at dump."""
    return bool(vma.status & vmaflags.EXT_PLUGIN)
