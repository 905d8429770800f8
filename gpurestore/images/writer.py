"""Write a dump: into a temporary sibling folder that becomes the wanted one, whole, by one rename.

    PARENT/.NAME.gpurestore-0123456789ab/   locked (flock) by the tool that lives; removed by the next one when it died
    PARENT/NAME/                            absent or empty before, complete after

Whoever is killed in between leaves a temporary folder and nothing under the wanted name.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import stat
from collections.abc import Sequence
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

from google.protobuf.message import Message

from gpurestore.core import lib, new_error
from gpurestore.errors import CancelledError, GpurestoreError, UsageError
from gpurestore.images import manifest as manifests
from gpurestore.images import stamps
from gpurestore.images.compression import Crew
from gpurestore.images.container import Bytes, encode_image
from gpurestore.images.hashing import Cancel, FileRecord, default_jobs, hash_files, run_in_threads
from gpurestore.images.magic import KINDS
from gpurestore.images.manifest import MANIFEST_NAME, Manifest, PluginRecord

_TEMP = re.compile(r"\..{1,200}\.gpurestore-[0-9a-f]{12}", re.DOTALL)
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC | os.O_NOFOLLOW
_NEW_FILE = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW
# Syncing many small files: the file system joins journal commits of files that are synced at the same time.
_SYNC_THREADS = 8
# What is awaited at once of a large file: a tenth of a second on a slow disk.
_FLUSH_BYTES = 16 << 20


class ImageWriter:
    """A dump folder in the making. Every error and every way out but :meth:`commit` leaves nothing behind.

    ``write`` and ``open_*`` may be called from several threads at once, for different files. Memory images hold
    secrets: files are made for their owner alone, the folder too unless it existed.
    """

    def __init__(self, final_dir: Path, *, direct_io: bool = False) -> None:
        """Raises UsageError when the folder is not empty, is a mount point, or has no parent.

        With ``direct_io`` pages images bypass the page cache; UsageError where the file system cannot do that.
        """
        self.final_dir = Path(os.path.realpath(final_dir))
        self.root_pid = 0
        self.cpu: dict[str, Any] = {}
        self.plugins: list[PluginRecord] = []
        self.extension: dict[str, Any] = {}
        self.crew: Crew | None = None  # who compresses pages; None: they are stored as they are
        self._direct_io = direct_io
        self._fds: dict[str, int] = {}
        self._sums: dict[str, FileRecord] = {}
        self._parent_fd, self._wanted = _open_parent(self.final_dir)
        try:
            _remove_stale(self._parent_fd)
            self._temp_name, self._dir_fd = self._make_temp()
        except BaseException:
            os.close(self._parent_fd)
            raise
        self.path = self.final_dir.parent / self._temp_name
        self._open = True
        if direct_io:
            self._check_direct_io()

    def _make_temp(self) -> tuple[str, int]:
        while True:
            name = f".{self.final_dir.name[:60]}.gpurestore-{os.urandom(6).hex()}"
            try:
                os.mkdir(name, 0o700, dir_fd=self._parent_fd)
            except FileExistsError:
                continue
            except OSError as error:
                raise self._error(error, name, self.final_dir.parent) from error
            fd = _lock(self._parent_fd, name)
            if fd is not None:
                return name, fd
            # Another tool saw the folder before it was locked and took it for a dead one's.

    def _check_direct_io(self) -> None:
        name = "direct-io"
        try:
            os.close(os.open(name, _NEW_FILE | os.O_DIRECT, 0o600, dir_fd=self._dir_fd))
            os.unlink(name, dir_fd=self._dir_fd)
        except OSError as error:
            self.abort()
            raise UsageError(
                f"{self.final_dir}: the file system does not take direct I/O ({error.strerror}); leave out --direct-io"
            ) from error

    def __enter__(self) -> ImageWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.abort()

    @property
    def dir_fd(self) -> int:
        """A descriptor of the temporary folder, for plugins that write files of their own (see ``adopt``)."""
        return self._dir_fd

    def write(
        self, kind: str, messages: Sequence[Message], ident: int | None = None, payloads: Sequence[Bytes] = ()
    ) -> None:
        """Write one image file. ``payloads``: raw bytes behind each record, for pipes-data and fifo-data."""
        image = KINDS[kind]
        data = encode_image(image, messages, payloads)
        self.append(self.open_raw(image.file_name(ident)), data, image.file_name(ident))

    def open_image(self, kind: str, messages: Sequence[Message], ident: int | None = None) -> int:
        """Like :meth:`write`, but leaves the file open, positioned at its end, for a payload (a ghost file's bytes).

        The descriptor stays the writer's: it is closed by commit or abort.
        """
        image = KINDS[kind]
        name = image.file_name(ident)
        fd = self.open_raw(name)
        self.append(fd, encode_image(image, messages), name)
        return fd

    def open_raw(self, name: str) -> int:
        """Create an empty file and return its descriptor, which stays the writer's."""
        return self._create(name, _NEW_FILE)

    def open_pages(self, name: str) -> int:
        """The same for a pages image: whole pages, written from page-aligned memory at page-aligned offsets."""
        return self._create(name, _NEW_FILE | (os.O_DIRECT if self._direct_io else 0))

    def summed(self, name: str, size: int, crc64: int) -> None:
        """Say what a pages image consists of (see gpurestore/images/hashing.py): commit does not read it again."""
        self._sums[name] = FileRecord.of_pages(size, crc64)

    def _create(self, name: str, flags: int) -> int:
        if not manifests.is_plain_name(name) or name == MANIFEST_NAME:
            raise ValueError(f"{name!r} is no name for an image")
        try:
            fd = os.open(name, flags, 0o600, dir_fd=self._dir_fd)
        except FileExistsError as error:
            raise ValueError(f"{name} is written twice") from error
        except OSError as error:
            raise self.disk_error(error, name) from error
        self._fds[name] = fd
        return fd

    def append(self, fd: int, data: Bytes, name: str) -> None:
        """Write ``data`` at the descriptor's position."""
        view = memoryview(data)
        try:
            while view:
                view = view[os.write(fd, view) :]
        except OSError as error:
            raise self.disk_error(error, name, len(view)) from error

    def adopt(self, name: str) -> None:
        """Register a file that somebody else (a plugin) made in the folder."""
        if name not in self._fds:
            flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
            self._fds[name] = os.open(name, flags, dir_fd=self._dir_fd)

    def adopt_all(self) -> None:
        """Register every file that somebody else made in the folder."""
        for name in os.listdir(self._dir_fd):
            self.adopt(name)

    def has_space(self, wanted_bytes: int) -> bool:
        """Whether the file system can take that many bytes more, as far as it tells."""
        return _free_bytes(self._dir_fd) >= wanted_bytes

    def check_space(self, wanted_bytes: int) -> None:
        """Raise GpurestoreError when the file system cannot take that many bytes more."""
        if not self.has_space(wanted_bytes):
            error = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            raise self.disk_error(error, "the images", wanted_bytes)

    def disk_error(self, error: OSError, name: str, wanted_bytes: int = 0) -> GpurestoreError:
        """What to raise when a file of this dump cannot be written; also for errors that the C core reports."""
        return self._error(error, name, self.final_dir, wanted_bytes)

    def _error(self, error: OSError, name: str, folder: Path, wanted_bytes: int = 0) -> GpurestoreError:
        if error.errno in {errno.ENOSPC, errno.EDQUOT}:
            wanted = f"{wanted_bytes} bytes wanted, " if wanted_bytes else ""
            free = _free_bytes(self._parent_fd)
            return GpurestoreError(
                f"{folder}: no space left for {name}: {wanted}{free} bytes free; "
                "make room or dump to another file system"
            )
        return GpurestoreError(f"{folder}: cannot write {name}: {error.strerror}")

    def commit(self, jobs: int | None = None, cancel: Cancel = lambda: False, sync: bool = True) -> Manifest:
        """Sync and hash everything, write ``gpurestore.json``, and rename. On return the dump is there to stay.

        ``cancel`` is polled while files are synced and hashed; once the rename is due it is not asked any more.
        Hashing runs beside syncing, which on a disk takes longer. Without ``sync`` a crash of the machine soon
        afterwards may take the dump.
        """
        assert self._open
        name = "the images"
        try:
            manifest = self._describe(self._settle(jobs, cancel, sync))
            name = MANIFEST_NAME
            self._write_manifest(manifests.encode(manifest), sync)
            name = "the folder"
            self._take_over_mode()
            if sync:
                os.fsync(self._dir_fd)
            os.rename(self._temp_name, self.final_dir.name, src_dir_fd=self._parent_fd, dst_dir_fd=self._parent_fd)
            self._temp_name = ""
            if sync:
                os.fsync(self._parent_fd)
        except OSError as error:
            if error.errno in {errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR, errno.EBUSY}:
                raise UsageError(f"{self.final_dir}: taken by somebody else while the dump was made") from error
            raise self.disk_error(error, name) from error
        self.path = self.final_dir
        self._close()
        return manifest

    def _settle(self, jobs: int | None, cancel: Cancel, sync: bool) -> dict[str, FileRecord]:
        sizes = {name: os.fstat(fd).st_size for name, fd in self._fds.items()}
        for name, record in self._sums.items():
            if sizes[name] != record.bytes:
                raise GpurestoreError(
                    f"{self.final_dir}: {name} has {sizes[name]} bytes, and {record.bytes} were written"
                )
        records = dict(self._sums)

        def hash_all() -> None:
            unread = {name: size for name, size in sizes.items() if name not in self._sums}
            records.update(hash_files(self._dir_fd, unread, jobs or default_jobs(), cancel))

        def sync_all() -> None:
            largest_first = sorted(self._fds, key=lambda name: -sizes[name])
            for name in largest_first:
                if sizes[name] > _FLUSH_BYTES:
                    _flush(self._fds[name], sizes[name], cancel)
            run_in_threads([partial(os.fsync, self._fds[name]) for name in largest_first], _SYNC_THREADS)

        run_in_threads([sync_all, hash_all] if sync else [hash_all], 2)
        for name, stamp in stamps.take(self._fds).items():
            records[name] = records[name]._replace(stamp=stamp)
        return dict(sorted(records.items()))

    def _describe(self, files: dict[str, FileRecord]) -> Manifest:
        from gpurestore import __version__

        system = os.uname()
        return Manifest(
            tool_version=__version__,
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            hostname=system.nodename,
            kernel=system.release,
            machine=system.machine,
            root_pid=self.root_pid,
            files=files,
            machine_id=stamps.this_machine(),
            cpu=self.cpu,
            plugins=tuple(self.plugins),
            extension=self.extension,
        )

    def _write_manifest(self, data: bytes, sync: bool) -> None:
        fd = os.open(MANIFEST_NAME, _NEW_FILE, 0o600, dir_fd=self._dir_fd)
        try:
            self.append(fd, data, MANIFEST_NAME)
            if sync:
                os.fsync(fd)
        finally:
            os.close(fd)

    def _take_over_mode(self) -> None:
        """An empty folder that the user made keeps its owner and mode."""
        if self._wanted is None:
            return
        os.fchmod(self._dir_fd, stat.S_IMODE(self._wanted.st_mode))
        try:
            os.fchown(self._dir_fd, self._wanted.st_uid, self._wanted.st_gid)
        except PermissionError:
            pass  # somebody else's folder that we may write to: then the images are ours

    def abort(self) -> None:
        """Remove whatever was written. Does nothing after commit or abort."""
        if not self._open:
            return
        if self._temp_name:
            _remove_tree(self._parent_fd, self._temp_name)
        self._close()

    def _close(self) -> None:
        self._open = False
        for fd in (*self._fds.values(), self._dir_fd, self._parent_fd):
            os.close(fd)
        self._fds.clear()


def _open_parent(final_dir: Path) -> tuple[int, os.stat_result | None]:
    """A descriptor of the parent, and the state of the folder if it is there already."""
    if not final_dir.name:
        raise UsageError(f"{final_dir}: the images need a folder of their own")
    try:
        parent_fd = os.open(final_dir.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise UsageError(f"{final_dir.parent}: {error.strerror}; make the folder that is to hold the images") from error
    try:
        fd = os.open(final_dir.name, _DIRECTORY, dir_fd=parent_fd)
    except FileNotFoundError:
        return parent_fd, None
    except OSError as error:
        os.close(parent_fd)
        raise UsageError(f"{final_dir}: {error.strerror}") from error
    try:
        _check_usable(final_dir, fd, parent_fd)
        return parent_fd, os.fstat(fd)
    except BaseException:
        os.close(parent_fd)
        raise
    finally:
        os.close(fd)


def _check_usable(final_dir: Path, fd: int, parent_fd: int) -> None:
    if _mount_id(fd) != _mount_id(parent_fd):
        raise UsageError(f"{final_dir}: a mount point cannot be replaced in one step; name a folder below it")
    with os.scandir(fd) as entries:
        first = next(entries, None)
    if first is not None:
        raise UsageError(f"{final_dir}: not empty (it holds {first.name}); name another folder")


def _mount_id(fd: int) -> str:
    with open(f"/proc/self/fdinfo/{fd}") as info:
        return next(line for line in info if line.startswith("mnt_id:"))


def _flush(fd: int, size: int, cancel: Cancel) -> None:
    """Bring a file to the disk in steps that one can stop between; one is always on its way while another is awaited.

    Raises CancelledError. What fails here is left to fsync to tell.
    """
    err = new_error()
    for offset in range(0, size, _FLUSH_BYTES):
        if cancel():
            raise CancelledError("interrupted while the images were brought to the disk")
        if lib.gr_pages_flush(fd, offset + _FLUSH_BYTES, _FLUSH_BYTES, 0, err) < 0:
            return
        if lib.gr_pages_flush(fd, offset, _FLUSH_BYTES, 1, err) < 0:
            return


def _free_bytes(fd: int) -> int:
    system = os.fstatvfs(fd)
    return system.f_bavail * system.f_frsize


def _lock(parent_fd: int, name: str) -> int | None:
    """Open and lock a temporary folder. None: it is another living tool's, or gone."""
    try:
        fd = os.open(name, _DIRECTORY, dir_fd=parent_fd)
    except OSError:
        return None
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.path.samestat(os.fstat(fd), os.stat(name, dir_fd=parent_fd, follow_symlinks=False)):
            return fd
    except OSError:
        pass
    os.close(fd)
    return None


def _remove_stale(parent_fd: int) -> None:
    """Remove temporary folders of ours whose tool is dead."""
    with os.scandir(parent_fd) as entries:
        names = [entry.name for entry in entries if _TEMP.fullmatch(entry.name)]
    for name in names:
        fd = _lock(parent_fd, name)
        if fd is None:
            continue
        try:
            if os.fstat(fd).st_uid == os.geteuid():
                _remove_tree(parent_fd, name)
        finally:
            os.close(fd)


def _remove_tree(parent_fd: int, name: str) -> None:
    import shutil  # brings compressors along, and only a dump that fails needs it

    shutil.rmtree(name, ignore_errors=True, dir_fd=parent_fd)
