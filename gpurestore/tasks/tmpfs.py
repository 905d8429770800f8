"""Files on /dev/shm and other tmpfs: their content lives in memory only, so a dump carries it along.

A file there is saved when the tree could have written it (or it lies on /dev/shm at all), in the format of ghost files
under an id of its own, named in gpurestore.json. At restore it is made again where it is missing, and its content is
put back where it differs; a file that is as it was stays untouched.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Mapping

from gpurestore.errors import Finding, GpurestoreError
from gpurestore.tasks import ghosts
from gpurestore.tasks.bulkcopy import Cancelled, never
from gpurestore.tasks.fdinfo import OpenFile
from gpurestore.tasks.mounts import Mount

_ALWAYS = "/dev/shm"
_COMPARE_BYTES = 1 << 20


def is_volatile(file: OpenFile, mounts: Mapping[int, Mount], *, writable: bool) -> bool:
    """Whether the content of ``file`` must be carried; ``writable``: the tree holds it open or mapped for writing."""
    mount = mounts.get(file.info.mnt_id)
    if mount is None or mount.fs_type not in ("tmpfs", "ramfs") or not stat.S_ISREG(file.stat.st_mode):
        return False
    return file.stat.st_nlink > 0 and (writable or mount.mountpoint == _ALWAYS)


def check(where: str, path: str) -> list[Finding]:
    """Whether the file can be made again, should it be missing or different."""
    if os.path.lexists(path):
        problem = None if os.access(path, os.R_OK | os.W_OK, effective_ids=True) else "may not be written"
    elif not os.path.isdir(os.path.dirname(path)):
        problem = f"is gone, and so is its directory {os.path.dirname(path)}"
    else:
        may = os.access(os.path.dirname(path), os.W_OK | os.X_OK, effective_ids=True)
        problem = None if may else f"is gone, and uid {os.geteuid()} may not make it again"
    return [] if problem is None else [Finding(where, f"file {path}", problem)]


def put_back(
    folder: ghosts.GhostFolder, ghost_id: int, path: str, created: list[str], cancelled: Cancelled = never
) -> None:
    """Make the file at ``path`` what the image says. Appends to ``created`` what was not there before."""
    content = ghosts.read_content(folder, ghost_id)
    if not stat.S_ISREG(content.entry.mode):
        raise GpurestoreError(f"{content.name}: the image of {path} is not that of a regular file")
    fd = _open_or_create(path, created)
    try:
        if path not in created and not _differs(folder, content, fd):
            return
        os.ftruncate(fd, 0)
        content.fill(folder, fd, cancelled)
        ghosts.apply_metadata(fd, content.entry)
    finally:
        os.close(fd)


def _open_or_create(path: str, created: list[str]) -> int:
    flags = os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
    try:
        fd = os.open(path, flags)
    except FileNotFoundError:
        fd = os.open(path, flags | os.O_CREAT | os.O_EXCL, 0o600)
        created.append(path)
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise OSError(errno.EINVAL, f"{path} is not a regular file any more")
    return fd


def _differs(folder: ghosts.GhostFolder, content: ghosts.Content, fd: int) -> bool:
    """Compare byte by byte: a store through a mapping changes no time stamp on tmpfs."""
    if os.fstat(fd).st_size != content.size:
        return True
    image = folder.open_raw(content.name)
    try:
        end = 0
        for run in sorted(content.runs, key=lambda run: run.file_offset):
            if not _zeros(fd, end, run.file_offset) or not _same(
                image, run.image_offset, fd, run.file_offset, run.bytes
            ):
                return True
            end = run.file_offset + run.bytes
        return not _zeros(fd, end, content.size)
    finally:
        os.close(image)


def _same(image: int, image_offset: int, fd: int, offset: int, size: int) -> bool:
    for done in range(0, size, _COMPARE_BYTES):
        length = min(_COMPARE_BYTES, size - done)
        if os.pread(image, length, image_offset + done) != os.pread(fd, length, offset + done):
            return False
    return True


def _zeros(fd: int, start: int, end: int) -> bool:
    for offset in range(start, end, _COMPARE_BYTES):
        length = min(_COMPARE_BYTES, end - offset)
        if os.pread(fd, length, offset).count(0) != length:
            return False
    return True
