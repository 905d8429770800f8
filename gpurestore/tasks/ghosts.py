"""Unlinked files that the tree still holds: their content travels in ghost-file-ID.img.

    head record          ghost_file_entry: owner, mode, times; size and chunks for files worth leaving holes out of
    then, per piece      ghost_chunk_entry {offset, length}, followed by that many bytes
    or, without chunks   all bytes of the file, to the end of the image

At restore the file comes back without a name (O_TMPFILE where the file system can), in the directory where it once was,
so that nothing is left behind however the restore ends. Every description and mapping of it is then opened through
/proc/self/fd.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import stat
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple, Protocol

from gpurestore.errors import Finding, GpurestoreError, ImageError
from gpurestore.images import container, pb
from gpurestore.images.magic import KINDS
from gpurestore.tasks import bulkcopy, fdinfo
from gpurestore.tasks.bulkcopy import Cancelled, Piece, never
from gpurestore.tasks.fdinfo import O_TMPFILE_BIT, OpenFile

if TYPE_CHECKING:
    from gpurestore.images.folder import GhostRun
    from gpurestore.images.writer import ImageWriter

CHUNKS_FROM_BYTES = 3 * 4096  # smaller files are written whole, as CRIU does
_KIND = KINDS["ghost-file"]
_NO_TMPFILE = (errno.EOPNOTSUPP, errno.EISDIR, errno.EINVAL, errno.ENOENT)


class GhostFolder(Protocol):
    """What of an ImageFolder is needed here."""

    def read_ghost(self, ident: int) -> tuple[pb.ghost_file_entry, list[GhostRun]]: ...

    def open_raw(self, name: str) -> int: ...


class _Ghost(NamedTuple):
    ghost_id: int
    fd: int  # of our own, readable
    path: str
    entry: pb.ghost_file_entry


class GhostDump:
    """The unlinked files of a tree, each once, however many descriptions and mappings it has."""

    def __init__(self) -> None:
        self._ghosts: dict[tuple[int, int], _Ghost] = {}
        self._next_id = 1

    def add(self, file: OpenFile) -> int:
        """Note ``file`` and return its ghost id. Raises OSError when its content cannot be opened."""
        ghost = self._ghosts.get(file.key)
        if ghost is None:
            flags = os.O_RDONLY if stat.S_ISREG(file.stat.st_mode) else os.O_PATH
            ghost = self._note(file.key, fdinfo.reopen(file.fd, flags), file.path, _entry(file.stat))
        return ghost.ghost_id

    def find(self, path: str, ino: int) -> int | None:
        """The ghost id of a file that is known already, by what /proc/PID/maps tells of a file."""
        for (_, number), ghost in self._ghosts.items():
            if number == ino and ghost.path == path:
                return ghost.ghost_id
        return None

    def add_copy(self, fd: int, path: str, ino: int, uid: int, gid: int) -> int:
        """Note a file that only ``fd``, a copy of its content, stands for."""
        entry = _entry(os.fstat(fd))
        entry.uid, entry.gid, entry.mode, entry.ino = uid, gid, stat.S_IFREG | 0o600, ino
        return self._note((-1, self._next_id), fdinfo.reopen(fd, os.O_RDONLY), path, entry).ghost_id

    def _note(self, key: tuple[int, int], fd: int, path: str, entry: pb.ghost_file_entry) -> _Ghost:
        ghost = self._ghosts[key] = _Ghost(self._next_id, fd, path, entry)
        self._next_id += 1
        return ghost

    def write(self, writer: ImageWriter, cancelled: Cancelled = never) -> None:
        """Write one image per ghost."""
        for ghost in self._ghosts.values():
            _write_content(writer, ghost, cancelled)

    def close(self) -> None:
        """Drop what is held open."""
        for ghost in self._ghosts.values():
            os.close(ghost.fd)
        self._ghosts.clear()


def _write_content(writer: ImageWriter, ghost: _Ghost, cancelled: Cancelled) -> None:
    entry = ghost.entry
    image = writer.open_image("ghost-file", [entry], ghost.ghost_id)
    size = os.fstat(ghost.fd).st_size if stat.S_ISREG(entry.mode) else 0
    offset = os.fstat(image).st_size
    pieces = []
    try:
        for start, length in bulkcopy.extents(ghost.fd, size) if entry.chunks else ((0, size),):
            if entry.chunks:
                record = container.encode_record(pb.ghost_chunk_entry(off=start, len=length))
                offset += os.pwrite(image, record, offset)
            pieces.append(Piece(ghost.fd, start, image, offset, length))
            offset += length
        bulkcopy.copy(pieces, cancelled)
    except OSError as error:
        raise writer.disk_error(error, _KIND.file_name(ghost.ghost_id), size) from error


def _entry(have: os.stat_result) -> pb.ghost_file_entry:
    entry = pb.ghost_file_entry(
        uid=have.st_uid,
        gid=have.st_gid,
        mode=have.st_mode,
        dev=have.st_dev & 0xFFFFFFFF,
        ino=have.st_ino,
        atim=_timeval(have.st_atime_ns),
        mtim=_timeval(have.st_mtime_ns),
    )
    if stat.S_ISREG(have.st_mode) and have.st_size >= CHUNKS_FROM_BYTES:
        entry.chunks, entry.size = True, have.st_size
    return entry


def _timeval(nanoseconds: int) -> pb.timeval:
    return pb.timeval(tv_sec=nanoseconds // 10**9, tv_usec=nanoseconds % 10**9 // 1000)


# ---- restore ----


class Content(NamedTuple):
    """The head of a ghost image, and where its bytes are."""

    name: str
    entry: pb.ghost_file_entry
    size: int
    runs: list[GhostRun]

    def fill(self, folder: GhostFolder, fd: int, cancelled: Cancelled = never) -> None:
        """Bring the file behind ``fd``, which is empty, to the size and content of the image."""
        image = folder.open_raw(self.name)
        try:
            os.ftruncate(fd, self.size)
            pieces = [Piece(image, run.image_offset, fd, run.file_offset, run.bytes) for run in self.runs]
            bulkcopy.copy(pieces, cancelled)
        finally:
            os.close(image)


def read_content(folder: GhostFolder, ghost_id: int) -> Content:
    """Look through the image of a ghost; raises ImageError where it is not whole."""
    name = _KIND.file_name(ghost_id)
    entry, runs = folder.read_ghost(ghost_id)
    if not entry.chunks:
        return Content(name, entry, sum(run.bytes for run in runs), runs)
    if not entry.HasField("size") or entry.size >= 1 << 63:
        raise ImageError(f"{name}: damaged: a file in chunks without its size")
    if any(run.file_offset + run.bytes > entry.size for run in runs):
        raise ImageError(f"{name}: damaged: a chunk reaches beyond the file's {entry.size} bytes")
    return Content(name, entry, entry.size, runs)


class GhostStage:
    """The ghosts of a folder, brought back nameless, each once."""

    def __init__(self, folder: GhostFolder, cancelled: Cancelled = never) -> None:
        self._folder = folder
        self._cancelled = cancelled
        self._handles: dict[int, int] = {}
        self._given: set[int] = set()
        self._finish: list[Callable[[], None]] = []

    def handle(self, ghost_id: int, path: str, flags: int) -> int:
        """Our handle of ghost ``ghost_id``, once called ``path``; whoever needs a description reopens it.

        ``flags`` are those of the first description: only what was opened with O_TMPFILE may get a name later.
        """
        handle = self._handles.get(ghost_id)
        if handle is None:
            handle = self._handles[ghost_id] = self._make(ghost_id, path, linkable=bool(flags & O_TMPFILE_BIT))
        return handle

    def open(self, ghost_id: int, path: str, flags: int, wanted: int) -> int:
        """A description of the ghost with the ``wanted`` flags, where ``flags`` are those of the image entry.

        What was opened with O_TMPFILE gets the description that made the file, which still shows that flag: a dump of
        the restored task will see it, too.
        """
        handle = self.handle(ghost_id, path, flags)
        own = os.O_TMPFILE | os.O_RDWR
        if flags & own != own or ghost_id in self._given or fcntl.fcntl(handle, fcntl.F_GETFL) & own != own:
            return fdinfo.reopen(handle, wanted)
        self._given.add(ghost_id)
        fcntl.fcntl(handle, fcntl.F_SETFL, wanted)
        return os.dup(handle)

    def _make(self, ghost_id: int, path: str, *, linkable: bool) -> int:
        content = read_content(self._folder, ghost_id)
        mode = content.entry.mode
        if stat.S_ISFIFO(mode):
            handle = _nameless_fifo(_nearest_directory(path))
        elif stat.S_ISREG(mode):
            handle = nameless(_nearest_directory(path), linkable=linkable)
            try:
                content.fill(self._folder, handle, self._cancelled)
            except BaseException:
                os.close(handle)
                raise
        else:
            raise GpurestoreError(
                f"cannot bring back the removed file {path} of mode {mode:#o}: no regular file or FIFO"
            )
        self._finish.append(lambda: apply_metadata(handle, content.entry))
        return handle

    def finish(self) -> None:
        """Give owner, mode and times back; drop the writable handles, which would keep a program from running."""
        for action in self._finish:
            action()
        self.close()

    def close(self) -> None:
        """Drop the handles; a ghost that nothing else holds is gone then."""
        self._finish.clear()
        for handle in self._handles.values():
            os.close(handle)
        self._handles.clear()


def apply_metadata(fd: int, entry: pb.ghost_file_entry) -> None:
    """Owner, mode and times of a carried file. Goes through /proc, because O_PATH handles take no fchmod."""
    link = f"/proc/self/fd/{fd}"
    have = os.stat(link)
    if (have.st_uid, have.st_gid) != (entry.uid, entry.gid):
        os.chown(link, entry.uid, entry.gid)
    os.chmod(link, stat.S_IMODE(entry.mode))
    if entry.HasField("atim") and entry.HasField("mtim"):
        os.utime(link, ns=(_nanoseconds(entry.atim), _nanoseconds(entry.mtim)))


def _nanoseconds(value: pb.timeval) -> int:
    return int(value.tv_sec) * 10**9 + int(value.tv_usec) * 1000


def check_place(where: str, path: str) -> list[Finding]:
    """Whether the file can be made again where it was."""
    directory = _nearest_directory(path)
    if os.access(directory, os.W_OK | os.X_OK, effective_ids=True):
        return []
    why = f"uid {os.geteuid()} may not write to {directory}, where its content is to be put back"
    return [Finding(where, f"removed file {path}", why)]


def _nearest_directory(path: str) -> str:
    """The directory that held ``path``, or the nearest one above that is left."""
    directory = os.path.dirname(path) or "/"
    while directory != "/" and not os.path.isdir(directory):
        directory = os.path.dirname(directory)
    return directory


def nameless(directory: str, *, linkable: bool) -> int:
    """A new empty file in ``directory``'s file system that has no name there."""
    exclusive = 0 if linkable else os.O_EXCL  # without O_EXCL, linkat could give it a name again
    try:
        return os.open(directory, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC | exclusive, 0o600)
    except OSError as error:
        if error.errno not in _NO_TMPFILE:
            raise
    name = os.path.join(directory, f".gpurestore-{os.urandom(8).hex()}")
    fd = os.open(name, os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_CLOEXEC, 0o600)
    os.unlink(name)
    return fd


def _nameless_fifo(directory: str) -> int:
    name = os.path.join(directory, f".gpurestore-{os.urandom(8).hex()}")
    os.mkfifo(name, 0o600)
    try:
        return os.open(name, os.O_PATH | os.O_CLOEXEC)
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name)
