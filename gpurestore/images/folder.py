"""Read a dump. Nothing in it is trusted: whatever the bytes, an ImageError that names the file, or a valid object."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from gpurestore.errors import ImageError, UsageError
from gpurestore.images import manifest as manifests
from gpurestore.images import stamps
from gpurestore.images.compression import COMPRESSED_SUFFIXES
from gpurestore.images.container import check_head, damaged, decode_image, decode_record, decode_records
from gpurestore.images.hashing import Cancel, FileRecord, hash_files, open_regular
from gpurestore.images.inventory import RUN_ID, check_inventory
from gpurestore.images.magic import KINDS, PAYLOAD_FILE, parse_file_name
from gpurestore.images.manifest import MANIFEST_NAME, MAX_MANIFEST_BYTES

if TYPE_CHECKING:
    from gpurestore.images import pb

# Structured images are read into memory. A thousand times larger than any that was seen.
MAX_IMAGE_BYTES = 1 << 30


class GhostRun(NamedTuple):
    """``bytes`` bytes at ``image_offset`` of a ghost image belong at ``file_offset`` of the file."""

    image_offset: int
    file_offset: int
    bytes: int


class ImageFolder:
    """A dump made by gpurestore or by CRIU; ``manifest`` is None for the latter.

    Opening checks the inventory and, by the manifest, that every file is there with its size. Checksums are
    :meth:`verify`'s. All methods may be called from several threads.
    """

    def __init__(self, path: Path) -> None:
        """Raises UsageError when there are no images at ``path``, ImageError when they are damaged."""
        self.path = Path(path)
        try:
            self._dir_fd = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError as error:
            raise UsageError(f"{self.path}: cannot be read as a folder of images: {error.strerror}") from error
        try:
            with self._named():
                self.manifest = self._read_manifest()
                self._check_files()
            if not self.has("inventory"):
                raise UsageError(f"{self.path}: holds no images: there is no inventory.img")
            self.inventory = self.read_one("inventory")
            with self._named():
                check_inventory(self.inventory)
                if self.manifest is None and self.inventory.dump_criu_run_id == RUN_ID:
                    raise ImageError(
                        f"{MANIFEST_NAME}: missing; it holds checksums, and facts without which a restore errs"
                    )
        except BaseException:
            os.close(self._dir_fd)
            raise

    def __enter__(self) -> ImageFolder:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the folder; descriptors handed out by :meth:`open_raw` stay open."""
        if self._dir_fd >= 0:
            os.close(self._dir_fd)
            self._dir_fd = -1

    @property
    def dir_fd(self) -> int:
        """A descriptor of the folder, for plugins."""
        return self._dir_fd

    @contextmanager
    def _named(self) -> Iterator[None]:
        """Put the folder in front of the file's name."""
        try:
            yield
        except ImageError as error:
            raise ImageError(f"{self.path}/{error}") from error.__cause__

    def _read_manifest(self) -> manifests.Manifest | None:
        if not self._exists(MANIFEST_NAME):
            return None
        return manifests.decode(self._load(MANIFEST_NAME, MAX_MANIFEST_BYTES))

    def _exists(self, name: str) -> bool:
        try:
            os.stat(name, dir_fd=self._dir_fd, follow_symlinks=False)
        except FileNotFoundError:
            return False
        except OSError as error:
            raise ImageError(f"{name}: {error.strerror}") from error
        return True

    def _check_files(self) -> None:
        """By the manifest: every file is there with its size, and no image that is not of this dump."""
        if self.manifest is None:
            return
        found = self.files()
        for name, record in self.manifest.files.items():
            if name not in found:
                raise ImageError(f"{name}: missing")
            if found[name] != record.bytes:
                what = "truncated" if found[name] < record.bytes else "too long"
                raise ImageError(f"{name}: {what}: {found[name]} bytes, not {record.bytes}")
        for name in sorted(found):
            if name.endswith((".img", *COMPRESSED_SUFFIXES)) and name not in self.manifest.files:
                raise ImageError(f"{name}: not part of this dump: {MANIFEST_NAME} does not list it")

    def files(self) -> dict[str, int]:
        """Name and size of every regular file in the folder, the manifest excepted."""
        sizes = {}
        with os.scandir(self._dir_fd) as entries:
            for entry in entries:
                state = entry.stat(follow_symlinks=False)
                if entry.name != MANIFEST_NAME and stat.S_ISREG(state.st_mode):
                    sizes[entry.name] = state.st_size
        return dict(sorted(sizes.items()))

    def idents(self, kind: str) -> list[int]:
        """The pids or ids for which there is an image of this kind, ascending."""
        parsed = (parse_file_name(name) for name in self.files())
        idents = (found[1] for found in parsed if found is not None and found[0].name == kind)
        return sorted(ident for ident in idents if ident is not None)

    def has(self, kind: str, ident: int | None = None) -> bool:
        """Whether there is such an image. CRIU leaves out images that would be empty."""
        with self._named():
            return self._exists(KINDS[kind].file_name(ident))

    def holds(self, name: str) -> bool:
        """Whether there is a file of that name."""
        with self._named():
            return self._exists(name)

    def read(self, kind: str, ident: int | None = None) -> list[Any]:
        """The messages of an image, which must be there."""
        name = KINDS[kind].file_name(ident)
        with self._named():
            return decode_image(KINDS[kind], self._load(name, MAX_IMAGE_BYTES), name)

    def read_one(self, kind: str, ident: int | None = None) -> Any:
        """The only message of an image."""
        messages = self.read(kind, ident)
        if len(messages) != 1:
            name = KINDS[kind].file_name(ident)
            raise ImageError(f"{self.path}/{name}: damaged: {len(messages)} records instead of one")
        return messages[0]

    def read_payloads(self, kind: str, ident: int | None = None) -> list[tuple[Any, bytes]]:
        """The messages of an image with the raw bytes behind each (pipes-data, fifo-data)."""
        name = KINDS[kind].file_name(ident)
        with self._named():
            data = self._load(name, MAX_IMAGE_BYTES)
            return [(message, bytes(payload)) for message, payload in decode_records(KINDS[kind], data, name)]

    def read_ghost(self, ident: int) -> tuple[pb.ghost_file_entry, list[GhostRun]]:
        """The entry of a ghost file, and where its bytes are; they may be too many to read into memory."""
        kind = KINDS["ghost-file"]
        assert kind.payload == PAYLOAD_FILE
        name = kind.file_name(ident)
        with self._named():
            fd = open_regular(self._dir_fd, name)
            try:
                return _ghost_runs(fd, name)
            finally:
                os.close(fd)

    def open_raw(self, name: str) -> int:
        """A descriptor of any file of the folder, read only; the caller closes it."""
        if not manifests.is_plain_name(name):
            raise ValueError(f"{name!r} is no name of an image")
        with self._named():
            return open_regular(self._dir_fd, name)

    def load(self, name: str, max_bytes: int = MAX_IMAGE_BYTES) -> bytes:
        """The bytes of a file. Raises ImageError when there are more than ``max_bytes``."""
        with self._named():
            return self._load(name, max_bytes)

    def _load(self, name: str, max_bytes: int) -> bytes:
        fd = open_regular(self._dir_fd, name)
        try:
            size = os.fstat(fd).st_size
            if size > max_bytes:
                raise ImageError(f"{name}: {size} bytes are too many for such an image")
            return _read_exactly(fd, 0, size, name)
        finally:
            os.close(fd)

    def verify(
        self,
        jobs: int | None = None,
        cancel: Cancel = lambda: False,
        *,
        everything: bool = False,
        leave_out: Callable[[str], bool] | None = None,
    ) -> int:
        """Check the checksum of every file; returns the bytes read. Without a manifest there is nothing to check by.

        Large files that nobody wrote to since the dump are left out unless ``everything`` is asked for. ``leave_out``
        is asked by name about the others.
        """
        if self.manifest is None:
            return 0
        expected = dict(self.manifest.files) if everything else self._changed()
        if leave_out is not None:
            expected = {name: record for name, record in expected.items() if not leave_out(name)}
        summed = {name for name, record in expected.items() if record.crc64_nvme}
        with self._named():
            found = hash_files(self._dir_fd, {name: r.bytes for name, r in expected.items()}, jobs, cancel, summed)
        bad = [name for name, record in expected.items() if found[name].checksum != record.checksum]
        if bad:
            more = f" (and {len(bad) - 1} more files)" if len(bad) > 1 else ""
            raise ImageError(f"{self.path}/{bad[0]}: damaged: its checksum is not the one in {MANIFEST_NAME}{more}")
        return sum(record.bytes for record in expected.values())

    def _changed(self) -> dict[str, FileRecord]:
        """The files that were not left alone since the dump, as far as that is known."""
        assert self.manifest is not None
        files = dict(self.manifest.files)
        if not self.manifest.machine_id or self.manifest.machine_id != stamps.this_machine():
            return files
        states = {name: os.stat(name, dir_fd=self._dir_fd, follow_symlinks=False) for name in files}
        return {name: record for name, record in files.items() if not stamps.is_unchanged(record, states[name])}


def _read_exactly(fd: int, offset: int, size: int, name: str) -> bytes:
    parts = []
    while size > 0:
        try:
            part = os.pread(fd, size, offset)
        except OSError as error:
            raise ImageError(f"{name}: cannot be read at byte {offset}: {error.strerror}") from error
        if not part:
            raise damaged(name, offset, "the file became shorter while it was read")
        parts.append(part)
        offset += len(part)
        size -= len(part)
    return parts[0] if len(parts) == 1 else b"".join(parts)


def _ghost_runs(fd: int, name: str) -> tuple[pb.ghost_file_entry, list[GhostRun]]:
    kind = KINDS["ghost-file"]
    size = os.fstat(fd).st_size
    window = memoryview(_read_exactly(fd, 0, min(size, 1 << 20), name))
    entry, offset = decode_record(kind.message, window, check_head(kind, window, name), name)
    if not entry.chunks:
        return entry, [GhostRun(offset, 0, size - offset)] if size > offset else []
    return entry, list(_ghost_chunks(fd, name, offset, size))


def _ghost_chunks(fd: int, name: str, offset: int, size: int) -> Iterator[GhostRun]:
    from gpurestore.images import pb

    while offset < size:
        # A chunk's head is two varints: 64 bytes hold it with room to spare.
        window = memoryview(_read_exactly(fd, offset, min(64, size - offset), name))
        chunk, length = decode_record(pb.ghost_chunk_entry, window, 0, name)
        offset += length
        if chunk.len == 0 or chunk.len > size - offset or chunk.off + chunk.len >= 1 << 63:
            raise damaged(name, offset, f"a chunk of {chunk.len} bytes, but {size - offset} are left")
        yield GhostRun(offset, chunk.off, chunk.len)
        offset += chunk.len
