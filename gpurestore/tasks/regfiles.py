"""Files that a path leads to: regular files, directories, device nodes.

Dump: find the path under which the file will be found again, and note size and ELF build id, by which a restore notices
that another file lies there now. Restore: check all that first, then open with the flags that had lasting effect.
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import struct
from typing import NamedTuple

from gpurestore.errors import Finding, ImageError
from gpurestore.images import pb
from gpurestore.tasks import chardevs
from gpurestore.tasks.fdinfo import O_TMPFILE_BIT, OpenFile

BUILD_ID_WINDOW_BYTES = 1 << 20  # the notes of an ELF file stand near its start
BUILD_ID_MAX_BYTES = 512
PATH_MAX_BYTES = 4096
NAME_MAX_BYTES = 255
NO_POSITION = (1 << 64) - 1

# Flags that only had a meaning while the file was opened; never given to open again.
_ONCE = os.O_CREAT | os.O_EXCL | os.O_TRUNC | os.O_NOCTTY | os.O_CLOEXEC | os.O_ASYNC
_PT_NOTE = 4
_NT_GNU_BUILD_ID = 3


class Located(NamedTuple):
    """Where a restore will find the file: by ``name``, or nowhere (``ghost``: its content must be carried)."""

    name: str
    ghost: bool = False


def locate(file: OpenFile) -> Located | Finding:
    """The name to store for ``file``, which lies on a mount of ours."""
    path = file.path if file.stat.st_nlink == 0 else file.link
    try:
        path.encode("utf-8")
    except UnicodeEncodeError:
        return Finding(file.where, f"file {path!r}", "its name is not UTF-8, which the image format demands")
    if file.stat.st_nlink == 0:
        if stat.S_ISREG(file.stat.st_mode) or stat.S_ISFIFO(file.stat.st_mode):
            return Located(path, ghost=True)
        kind = "directory" if stat.S_ISDIR(file.stat.st_mode) else "file"
        return Finding(file.where, f"removed {kind} {path}", "only removed regular files and FIFOs are carried along")
    for name in (path, _sibling(file)):
        if name is not None and _leads_to(name, file):
            return Located(name)
    return Finding(file.where, f"file {path}", "its path is gone or leads to another file, and it has a name elsewhere")


def _leads_to(name: str, file: OpenFile) -> bool:
    try:
        have = os.stat(name, follow_symlinks=not stat.S_ISLNK(file.stat.st_mode))
    except OSError:
        return False
    return (have.st_dev, have.st_ino) == file.key


def _sibling(file: OpenFile) -> str | None:
    """Another name of the file in the same directory (a temporary name that was linked to its final one, say)."""
    if not file.marked_deleted or stat.S_ISDIR(file.stat.st_mode):
        return None
    try:
        with os.scandir(os.path.dirname(file.path)) as names:
            return next((item.path for item in names if item.inode() == file.stat.st_ino), None)
    except OSError:
        return None


def collect(file: OpenFile, file_id: int, name: str) -> pb.reg_file_entry:
    """The entry for ``file``, found under ``name``."""
    entry = pb.reg_file_entry(
        id=file_id, flags=file.info.flags, pos=file.info.pos, fown=file.fown, name=name, mode=file.stat.st_mode
    )
    if stat.S_ISREG(file.stat.st_mode) and not _may_grow(file.info.flags):
        entry.size = file.stat.st_size
        build_id = read_build_id(file.fd, file.stat.st_size)
        entry.build_id.extend(pack_build_id(build_id))
    return entry


def _may_grow(flags: int) -> bool:
    """A file that is only appended to, such as a log, may have changed."""
    return flags & os.O_ACCMODE == os.O_WRONLY and bool(flags & os.O_APPEND)


def read_build_id(fd: int, size: int) -> bytes:
    """The GNU build id of the ELF file behind ``fd`` (any kind of descriptor), or nothing."""
    if size < 64:
        return b""
    try:
        own = os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return b""
    try:
        if os.pread(own, 4, 0) != b"\x7fELF":
            return b""
        return parse_build_id(os.pread(own, min(size, BUILD_ID_WINDOW_BYTES), 0))
    except OSError:
        return b""
    finally:
        os.close(own)


def parse_build_id(head: bytes) -> bytes:
    """Find the build id in the first bytes of an ELF file; whatever the bytes, the answer may be "none"."""
    try:
        if head[:4] != b"\x7fELF" or head[5] != 1 or head[4] not in (1, 2):
            return b""
        is64 = head[4] == 2
        phoff = struct.unpack_from("<Q", head, 32)[0] if is64 else struct.unpack_from("<I", head, 28)[0]
        entsize, count = struct.unpack_from("<HH", head, 54 if is64 else 42)
        for index in range(count):
            base = phoff + index * entsize
            if struct.unpack_from("<I", head, base)[0] != _PT_NOTE:
                continue
            start, size = (
                struct.unpack_from("<QxxxxxxxxxxxxxxxxQ", head, base + 8)
                if is64
                else struct.unpack_from("<IxxxxxxxxI", head, base + 4)
            )
            if found := _build_id_of_notes(head[start : start + size]):
                return found
    except (struct.error, IndexError, OverflowError):
        pass
    return b""


def _build_id_of_notes(notes: bytes) -> bytes:
    offset = 0
    while offset + 12 <= len(notes):
        name_size, desc_size, kind = struct.unpack_from("<III", notes, offset)
        start = offset + 12 + (name_size + 3 & ~3)
        if kind == _NT_GNU_BUILD_ID and notes[offset + 12 : offset + 15] == b"GNU":
            build_id = notes[start : start + desc_size]
            return build_id if 0 < desc_size <= BUILD_ID_MAX_BYTES and len(build_id) == desc_size else b""
        offset = start + (desc_size + 3 & ~3)
    return b""


def pack_build_id(build_id: bytes) -> tuple[int, ...]:
    """As the image holds it: 32-bit words, the last one filled up with zeros."""
    padded = build_id + bytes(-len(build_id) % 4)
    return struct.unpack(f"<{len(padded) // 4}I", padded)


# ---- restore ----


def safe_name(entry: pb.reg_file_entry) -> str:
    """The path of an entry, as it comes out of an image that nobody vouches for."""
    name: str = entry.name
    if not name.startswith("/") or "\0" in name:
        raise ImageError(f"files.img: file {entry.id} has the path {name!r}, which is not absolute")
    parts = name.split("/")
    if ".." in parts:
        raise ImageError(f"files.img: file {entry.id} has the path {name!r}, which climbs upwards")
    if len(name.encode()) >= PATH_MAX_BYTES or any(len(part.encode()) > NAME_MAX_BYTES for part in parts):
        raise ImageError(f"files.img: file {entry.id} has a path of {len(name)} characters, longer than any path")
    return name


def open_flags(flags: int) -> int:
    """What to give to open(2) so that the description is as it was, and nothing is created or cut."""
    if flags & O_TMPFILE_BIT:
        flags &= ~(O_TMPFILE_BIT | os.O_DIRECTORY)
    return flags & ~_ONCE | os.O_CLOEXEC | os.O_NOCTTY


def check(entry: pb.reg_file_entry, flags: int, where: str, rdev: int | None, *, carried: bool) -> list[Finding]:
    """What stands in the way of opening ``entry`` with ``flags``; ``carried`` content is put back anyway."""
    name = safe_name(entry)
    if entry.ext:
        return [
            Finding(where, f"external file {name}", "files that were left to a CRIU plugin or option are not restored")
        ]
    follow = not (entry.HasField("mode") and stat.S_ISLNK(entry.mode))
    try:
        have = os.stat(name, follow_symlinks=follow)
    except OSError as error:
        return (
            []
            if carried and error.errno == errno.ENOENT
            else [Finding(where, f"file {name}", os.strerror(error.errno or 0))]
        )
    problem = _kind_mismatch(entry, flags, have, rdev) or _no_access(name, flags)
    if problem is None and not carried:
        problem = _content_mismatch(entry, name, have)
    return [] if problem is None else [Finding(where, f"file {name}", problem)]


def _kind_mismatch(entry: pb.reg_file_entry, flags: int, have: os.stat_result, rdev: int | None) -> str | None:
    if flags & os.O_PATH and not entry.HasField("mode"):
        return None
    if entry.HasField("mode") and stat.S_IFMT(entry.mode) != stat.S_IFMT(have.st_mode):
        return f"is a {_kind(have.st_mode)} now and was a {_kind(entry.mode)}"
    if flags & os.O_PATH:
        return None
    if stat.S_ISCHR(have.st_mode):
        return chardevs.mismatch(have, rdev)
    return None if stat.S_ISREG(have.st_mode) or stat.S_ISDIR(have.st_mode) else f"is a {_kind(have.st_mode)}"


def _no_access(name: str, flags: int) -> str | None:
    if flags & os.O_PATH:
        return None
    want = {os.O_RDONLY: os.R_OK, os.O_WRONLY: os.W_OK}.get(flags & os.O_ACCMODE, os.R_OK | os.W_OK)
    if os.access(name, want, effective_ids=True):
        return None
    return f"may not be {'read' if want == os.R_OK else 'written'} by uid {os.geteuid()} (rights, or a read-only mount)"


def _content_mismatch(entry: pb.reg_file_entry, name: str, have: os.stat_result) -> str | None:
    if not stat.S_ISREG(have.st_mode):
        return None
    if entry.HasField("size") and entry.size != have.st_size:
        return f"has {have.st_size} bytes and had {entry.size} when it was dumped"
    if entry.build_id:
        try:
            fd = os.open(name, os.O_PATH | os.O_CLOEXEC)
        except OSError as error:
            return os.strerror(error.errno or 0)
        try:
            found = pack_build_id(read_build_id(fd, have.st_size))
        finally:
            os.close(fd)
        if found != tuple(entry.build_id):
            return "has another ELF build id than when it was dumped (another build of the program or library)"
    return None


def _kind(mode: int) -> str:
    kinds = {
        stat.S_IFREG: "regular file",
        stat.S_IFDIR: "directory",
        stat.S_IFCHR: "character device",
        stat.S_IFBLK: "block device",
        stat.S_IFIFO: "FIFO",
        stat.S_IFSOCK: "socket",
        stat.S_IFLNK: "symbolic link",
    }
    return kinds.get(stat.S_IFMT(mode), f"file of mode {mode:#o}")


def open_entry(entry: pb.reg_file_entry, flags: int) -> int:
    """Open the path of ``entry`` with ``flags``. O_NONBLOCK keeps a FIFO that took the path since from blocking us."""
    wanted = open_flags(flags)
    fd = os.open(safe_name(entry), wanted | (0 if wanted & os.O_PATH else os.O_NONBLOCK))
    if not wanted & (os.O_NONBLOCK | os.O_PATH):
        fcntl.fcntl(fd, fcntl.F_SETFL, fcntl.fcntl(fd, fcntl.F_GETFL) & ~os.O_NONBLOCK)
    return fd


def set_position(fd: int, entry: pb.reg_file_entry) -> None:
    """Bring the description behind ``fd`` to where it was; devices that cannot seek have no position."""
    if entry.flags & os.O_PATH or entry.pos == NO_POSITION:
        return
    try:
        os.lseek(fd, entry.pos, os.SEEK_SET)
    except OSError as error:
        if error.errno != errno.ESPIPE:
            raise
