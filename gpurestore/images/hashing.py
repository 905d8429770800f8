"""Checksums of image files, computed by several threads at once. xxhash and reads both let go of the GIL.

A file's xxh3_128 is that of its bytes if it has at most CHUNK_BYTES, else the xxh3_128 of the digests (16 bytes each,
big endian as xxhash prints them) of its chunks in order: so one huge file keeps all threads busy too.

Pages images have a CRC-64/NVME instead, which the threads that write them compute as they go (cext/gr_crc64.h): that of
a whole follows from those of its parts, whatever these are.
"""

from __future__ import annotations

import errno
import os
import stat
import threading
from collections import deque
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import NamedTuple

import xxhash

from gpurestore.core import check, ffi, lib, new_error
from gpurestore.errors import CancelledError, CoreError, ImageError

CHUNK_BYTES = 64 << 20
# Small enough to stay in a core's cache between being read and being hashed.
_READ_BYTES = 256 << 10
# Below this, starting threads costs more than it saves.
_INLINE_BYTES = 8 << 20
# What C reads and sums before anybody asks whether to go on: some milliseconds.
_CRC_BYTES = 16 << 20

Cancel = Callable[[], bool]


class Stamp(NamedTuple):
    """By what a file is known that nobody has written to since (see gpurestore/images/stamps.py)."""

    device: int
    inode: int
    changed_ns: int  # ctime, nanoseconds since 1970


class FileRecord(NamedTuple):
    """What the manifest knows of a file. It has one of the two checksums, in hexadecimal."""

    bytes: int
    xxh3_128: str = ""
    crc64_nvme: str = ""
    stamp: Stamp | None = None

    @property
    def checksum(self) -> str:
        """The checksum, whichever it is."""
        return self.xxh3_128 or self.crc64_nvme

    @classmethod
    def of_pages(cls, size: int, crc64: int) -> FileRecord:
        """The record of a pages image."""
        return cls(size, crc64_nvme=f"{crc64:016x}")


def default_jobs() -> int:
    """As many threads as this process may use cores."""
    return max(1, len(os.sched_getaffinity(0)))


def open_regular(dir_fd: int, name: str) -> int:
    """Open an image for reading; a link, a FIFO or a device in its place is an error and not waited for."""
    try:
        fd = os.open(name, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=dir_fd)
    except OSError as error:
        why = "missing" if error.errno == errno.ENOENT else f"cannot be opened: {error.strerror}"
        raise ImageError(f"{name}: {why}") from error
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise ImageError(f"{name}: not a regular file")
    return fd


def run_in_threads(work: Iterable[Callable[[], None]], jobs: int) -> None:
    """Run every piece of ``work``; on the first exception start no more of them, wait for the rest and raise it."""
    queue = deque(work)
    failures: list[BaseException] = []

    def drain() -> None:
        while not failures:
            try:
                piece = queue.popleft()
            except IndexError:
                return
            try:
                piece()
            except BaseException as error:
                failures.append(error)

    threads = [threading.Thread(target=drain, name="gr-images") for _ in range(min(jobs, len(queue)) - 1)]
    for thread in threads:
        thread.start()
    drain()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]


def _hash_chunk(fd: int, name: str, start: int, size: int, cancel: Cancel) -> bytes:
    digest = xxhash.xxh3_128()
    buffer = memoryview(bytearray(min(size, _READ_BYTES)))
    done = 0
    while done < size:
        if cancel():
            raise CancelledError(f"interrupted while {name} was read")
        try:
            count = os.preadv(fd, [buffer[: size - done]], start + done)
        except OSError as error:
            raise ImageError(f"{name}: cannot be read at byte {start + done}: {error.strerror}") from error
        if count == 0:
            raise ImageError(f"{name}: truncated: it ends at byte {start + done}")
        digest.update(buffer[:count])
        done += count
    return digest.digest()


def _sum_chunk(fd: int, name: str, start: int, size: int, cancel: Cancel) -> bytes:
    err, crc = new_error(), ffi.new("uint64_t *")
    end = start + size
    for at in range(start, end, _CRC_BYTES):
        if cancel():
            raise CancelledError(f"interrupted while {name} was read")
        try:
            check(lib.gr_crc64_file(fd, at, min(_CRC_BYTES, end - at), crc, err), err)
        except CoreError as error:
            if error.errno == errno.ENODATA:
                raise ImageError(f"{name}: truncated: it ends before byte {end}") from error
            raise ImageError(f"{name}: cannot be read at byte {at}: {os.strerror(error.errno)}") from error
    return int(crc[0]).to_bytes(8, "big")


def hash_files(
    dir_fd: int,
    sizes: Mapping[str, int],
    jobs: int | None = None,
    cancel: Cancel = lambda: False,
    summed: Collection[str] = (),
) -> dict[str, FileRecord]:
    """Hash the named files, which have the given sizes; those in ``summed`` get a CRC-64 instead of an XXH3.

    Raises ImageError for a file that is shorter or longer.
    """
    fds: dict[str, int] = {}
    digests: dict[tuple[str, int], bytes] = {}
    try:
        pieces = []
        for name, size in sizes.items():
            fds[name] = fd = open_regular(dir_fd, name)
            found = os.fstat(fd).st_size
            if found != size:
                raise ImageError(f"{name}: {'truncated' if found < size else 'too long'}: {found} bytes, not {size}")
            pieces += [(name, start) for start in range(0, size, CHUNK_BYTES)]

        def piece(name: str, start: int) -> Callable[[], None]:
            def run() -> None:
                length = min(CHUNK_BYTES, sizes[name] - start)
                digest = _sum_chunk if name in summed else _hash_chunk
                digests[name, start] = digest(fds[name], name, start, length, cancel)

            return run

        work = [piece(name, start) for name, start in pieces]
        run_in_threads(work, 1 if sum(sizes.values()) <= _INLINE_BYTES else jobs or default_jobs())
    finally:
        for fd in fds.values():
            os.close(fd)
    records = {}
    for name, size in sizes.items():
        combine = _combine_sums if name in summed else _combine
        records[name] = combine(size, [digests[name, start] for start in range(0, size, CHUNK_BYTES)])
    return records


def _combine(size: int, parts: Sequence[bytes]) -> FileRecord:
    if len(parts) == 1:
        return FileRecord(size, parts[0].hex())
    return FileRecord(size, xxhash.xxh3_128_hexdigest(b"".join(parts)))


def _combine_sums(size: int, parts: Sequence[bytes]) -> FileRecord:
    crc = 0
    for index, part in enumerate(parts):
        length = min(CHUNK_BYTES, size - index * CHUNK_BYTES)
        crc = int(lib.gr_crc64_combine(crc, int.from_bytes(part, "big"), length))
    return FileRecord.of_pages(size, crc)
