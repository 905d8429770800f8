"""Copying the data of files, holes left out, by several threads at once.

``os.preadv`` and ``os.pwritev`` release the GIL, so threads copy truly in parallel. Both work between any two file
systems, which copy_file_range and sendfile do not.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from gpurestore.errors import CancelledError

CHUNK_BYTES = 4 << 20
_PARALLEL_BYTES = 16 << 20  # below this, starting threads costs more than it brings


Cancelled = Callable[[], bool]


def never() -> bool:
    """For those who are not to be interrupted."""
    return False


class Piece(NamedTuple):
    """``size`` bytes from one descriptor and offset to another."""

    source: int
    source_offset: int
    target: int
    target_offset: int
    size: int


def extents(fd: int, size: int) -> Iterator[tuple[int, int]]:
    """(offset, length) of the data in the first ``size`` bytes of a file; moves the position of ``fd``."""
    offset = 0
    while offset < size:
        try:
            start = os.lseek(fd, offset, os.SEEK_DATA)
            end = os.lseek(fd, start, os.SEEK_HOLE)
        except OSError as error:
            if error.errno == errno.ENXIO:  # nothing but a hole up to the end
                return
            if error.errno in (errno.EINVAL, errno.EOPNOTSUPP):  # a file system that does not know holes
                yield offset, size - offset
                return
            raise
        if start >= size:
            return
        yield start, min(end, size) - start
        offset = end


def copy(pieces: Sequence[Piece], cancelled: Cancelled = never) -> None:
    """Copy all ``pieces``; ``cancelled`` is asked before every chunk.

    Raises OSError (EIO where a source ended before its piece did), or CancelledError.
    """
    chunks = [chunk for piece in pieces for chunk in _cut(piece)]
    total = sum(chunk.size for chunk in chunks)
    count = min(len(os.sched_getaffinity(0)), len(chunks))
    if total < _PARALLEL_BYTES or count < 2:
        for chunk in chunks:
            _copy_chunk(chunk, cancelled)
        return
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(count, thread_name_prefix="bulkcopy") as pool:
        for done in [pool.submit(_copy_chunk, chunk, cancelled) for chunk in chunks]:
            done.result()


def _cut(piece: Piece) -> Iterator[Piece]:
    for start in range(0, piece.size, CHUNK_BYTES):
        size = min(CHUNK_BYTES, piece.size - start)
        yield Piece(piece.source, piece.source_offset + start, piece.target, piece.target_offset + start, size)


def _copy_chunk(piece: Piece, cancelled: Cancelled) -> None:
    if cancelled():
        raise CancelledError("cancelled while files were copied")
    done = 0
    while done < piece.size:
        data = os.pread(piece.source, piece.size - done, piece.source_offset + done)
        if not data:
            raise OSError(errno.EIO, f"file ends {piece.size - done} bytes too early")
        view = memoryview(data)
        while view:
            written = os.pwrite(piece.target, view, piece.target_offset + done)
            done += written
            view = view[written:]
