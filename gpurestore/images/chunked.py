"""Compressed pages images, ``pages-N.img.lz4`` and ``pages-N.img.zst``: the bytes of ``pages-N.img`` in chunks.

    head     skippable frame 0: u8[8] magic, u32 algorithm, u32 bytes of the largest chunk
    frames   one per chunk, in the order of the pages
    index    skippable frame 1: per chunk u32 bytes of the frame, u32 bytes of the chunk, u64 XXH3-64 of the frame
    end      skippable frame 2: u64 offset of the index, u64 number of chunks, XXH3-64 of head and entries, u8[8] magic

Little endian. A skippable frame is u32 0x184D2A50 + its number, u32 size, and that many bytes; the standards of both
algorithms have readers skip it, so ``zstd -d`` or ``lz4 -d`` of the whole file give ``pages-N.img`` back.
"""

from __future__ import annotations

import os
import struct
from array import array
from bisect import bisect_right
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, Final

import xxhash

from gpurestore.errors import ImageError
from gpurestore.images.compression import (
    MAX_CHUNK_BYTES,
    MAX_FRAME_EXTRA,
    NUMBERS,
    SUFFIXES,
    Codec,
    codec,
    of_number,
    require,
)
from gpurestore.images.container import Bytes
from gpurestore.images.magic import PAGE_BYTES, pages_file_name

if TYPE_CHECKING:
    from gpurestore.images.folder import ImageFolder

MAGIC: Final = b"GRPAGES\1"
_SKIPPABLE: Final = 0x184D2A50
_FRAME = struct.Struct("<II")
_HEAD = struct.Struct("<8sII")
_ENTRY = struct.Struct("<IIQ")
_END = struct.Struct("<QQQ8s")
HEAD_BYTES: Final = _FRAME.size + _HEAD.size
END_BYTES: Final = _FRAME.size + _END.size


def compressed_name(pages_id: int, algorithm: str) -> str:
    """The file that holds the pages of a pagemap with this ``pages_id``."""
    return pages_file_name(pages_id) + SUFFIXES[algorithm]


def checksum(*parts: Bytes) -> int:
    """XXH3-64 of the parts together, with the GIL released for large ones."""
    digest = xxhash.xxh3_64()
    for part in parts:
        digest.update(part)
    return digest.intdigest()


class IndexWriter:
    """Collects what the index says of each frame. ``head`` is what the file begins with."""

    def __init__(self, algorithm: str, chunk_bytes: int) -> None:
        self.head = _FRAME.pack(_SKIPPABLE, _HEAD.size) + _HEAD.pack(MAGIC, NUMBERS[algorithm], chunk_bytes)
        self._entries = bytearray()
        self._end = HEAD_BYTES

    def add(self, frame_bytes: int, chunk_bytes: int, frame_checksum: int) -> int:
        """Note the next frame; returns the offset at which it has to lie."""
        offset = self._end
        self._entries += _ENTRY.pack(frame_bytes, chunk_bytes, frame_checksum)
        self._end += frame_bytes
        return offset

    def tail(self) -> tuple[int, bytes]:
        """What follows the frames, and at which offset."""
        size = len(self._entries)
        index = _FRAME.pack(_SKIPPABLE + 1, size) + self._entries
        end = _END.pack(self._end, size // _ENTRY.size, checksum(self.head, self._entries), MAGIC)
        return self._end, index + _FRAME.pack(_SKIPPABLE + 2, _END.size) + end


@dataclass(frozen=True, slots=True)
class ChunkIndex:
    """Where every chunk lies: frame i at ``frame_offsets[i]``, its bytes at ``stream_offsets[i]`` of pages-N.img.

    Both have one more element, the end. No chunk is larger than MAX_CHUNK_BYTES, and all frames lie inside of the file.
    """

    name: str
    algorithm: str
    frame_offsets: array[int]
    stream_offsets: array[int]
    checksums: array[int]
    largest_chunk_bytes: int
    largest_frame_bytes: int

    def __len__(self) -> int:
        return len(self.checksums)

    @property
    def stream_bytes(self) -> int:
        """Size of the pages-N.img that this stands for."""
        return self.stream_offsets[-1]

    @property
    def room_bytes(self) -> int:
        """Enough for any frame and the chunk that it becomes."""
        return self.largest_chunk_bytes + self.largest_frame_bytes

    def chunk(self, fd: int, number: int, decoder: Codec, room: bytearray) -> memoryview:
        """Read and decompress a chunk of the file behind ``fd``. Raises ImageError that names the chunk.

        All of it happens in ``room``, of ``room_bytes``, where the chunk stays until the next one is read.
        """
        start, end = self.frame_offsets[number], self.frame_offsets[number + 1]
        chunk_bytes = self.stream_offsets[number + 1] - self.stream_offsets[number]
        view = memoryview(room)
        chunk, frame = view[:chunk_bytes], view[chunk_bytes : chunk_bytes + end - start]
        try:
            _read_into(fd, frame, start)
            if checksum(frame) != self.checksums[number]:
                raise ValueError("its checksum is not the one in the index")
            return decoder.decompress(frame, chunk)
        except (ValueError, OSError) as error:
            raise ImageError(
                f"{self.name}: chunk {number} of {len(self)} (bytes {start} to {end}) is damaged: {error}"
            ) from error

    def read(self, fd: int, offset: int, size: int) -> bytes:
        """``size`` bytes at ``offset`` of the stream, which must be there."""
        decoder, parts, room = codec(self.algorithm), [], bytearray(self.room_bytes)
        number = bisect_right(self.stream_offsets, offset) - 1
        while size:
            skip = offset - self.stream_offsets[number]
            part = bytes(self.chunk(fd, number, decoder, room)[skip : skip + size])
            parts.append(part)
            offset, size, number = offset + len(part), size - len(part), number + 1
        return b"".join(parts)


@dataclass(frozen=True, slots=True)
class PagesImage:
    """The file that holds the pages of a pagemap; ``index`` is None where it is plain."""

    name: str
    stream_bytes: int
    file_bytes: int
    index: ChunkIndex | None = None


def find_pages(folder: ImageFolder, pages_id: int) -> PagesImage:
    """The pages image with this id, plain or compressed. Raises ImageError when it is missing or damaged."""
    plain = pages_file_name(pages_id)
    if not folder.holds(plain):
        for algorithm in SUFFIXES:
            name = compressed_name(pages_id, algorithm)
            if folder.holds(name):
                fd = folder.open_raw(name)
                try:
                    index = read_index(fd, f"{folder.path}/{name}", algorithm)
                    return PagesImage(name, index.stream_bytes, os.fstat(fd).st_size, index)
                finally:
                    os.close(fd)
    fd = folder.open_raw(plain)
    try:
        size = os.fstat(fd).st_size
        return PagesImage(plain, size, size)
    finally:
        os.close(fd)


def read_index(fd: int, name: str, algorithm: str) -> ChunkIndex:
    """Check head, end and index of the file ``name``. Raises ImageError; takes memory in proportion to the file."""
    file_bytes = os.fstat(fd).st_size
    try:
        if file_bytes < HEAD_BYTES + _FRAME.size + END_BYTES:
            raise ValueError(f"{file_bytes} bytes are too few")
        head = _read(fd, 0, HEAD_BYTES)
        largest = _check_head(head, algorithm)
        at, nr, index_checksum = _check_end(_read(fd, file_bytes - END_BYTES, END_BYTES), file_bytes)
        index = _read(fd, at, _FRAME.size + nr * _ENTRY.size)
        if _FRAME.unpack_from(index) != (_SKIPPABLE + 1, nr * _ENTRY.size):
            raise ValueError(f"no index at byte {at}")
        entries = memoryview(index)[_FRAME.size :]
        if checksum(head, entries) != index_checksum:
            raise ValueError("the checksum of its head and index does not fit")
        result = _decode_index(entries, at, largest, name, algorithm)
    except (ValueError, OSError) as error:
        raise ImageError(f"{name}: damaged: {error}") from error
    except ImageError as error:
        raise ImageError(f"{name}: {error}") from error
    require(algorithm, name)
    return result


def _check_head(data: bytes, algorithm: str) -> int:
    magic, number, largest = _HEAD.unpack_from(data, _FRAME.size)
    if _FRAME.unpack_from(data) != (_SKIPPABLE, _HEAD.size) or magic != MAGIC:
        raise ValueError("no head; compressed pages of other tools have no index to find them by: decompress them")
    if of_number(number) != algorithm:
        raise ValueError(f"compressed by {of_number(number)}")
    if not 0 < largest <= MAX_CHUNK_BYTES:
        raise ValueError(f"chunks of {largest} bytes")
    return int(largest)


def _check_end(data: bytes, file_bytes: int) -> tuple[int, int, int]:
    """Offset of the index, number of chunks, checksum."""
    at, nr, index_checksum, magic = _END.unpack_from(data, _FRAME.size)
    if _FRAME.unpack_from(data) != (_SKIPPABLE + 2, _END.size) or magic != MAGIC:
        raise ValueError("truncated: its end is missing")
    if at < HEAD_BYTES or at + _FRAME.size + nr * _ENTRY.size + END_BYTES != file_bytes:
        raise ValueError(f"an index of {nr} chunks at byte {at} of {file_bytes}")
    return at, nr, index_checksum


def _decode_index(entries: memoryview, frames_end: int, largest: int, name: str, algorithm: str) -> ChunkIndex:
    fields = array("I")
    fields.frombytes(entries)
    frames, chunks, low, high = (fields[i::4] for i in range(4))
    for what, values, most in (("chunk", chunks, largest), ("frame", frames, largest + MAX_FRAME_EXTRA)):
        if values and not 0 < min(values) <= max(values) <= most:
            raise ValueError(f"a {what} of {min(values)} or {max(values)} bytes")
    if any(size % PAGE_BYTES for size in chunks):
        raise ValueError("a chunk that is no multiple of a page")
    frame_offsets = array("Q", accumulate(frames, initial=HEAD_BYTES))
    if frame_offsets[-1] != frames_end:
        raise ValueError(f"frames up to byte {frame_offsets[-1]}, but the index is at {frames_end}")
    checksums = array("Q", (a | b << 32 for a, b in zip(low, high, strict=True)))
    stream_offsets = array("Q", accumulate(chunks, initial=0))
    sizes = max(chunks, default=0), max(frames, default=0)
    return ChunkIndex(name, algorithm, frame_offsets, stream_offsets, checksums, *sizes)


def _read(fd: int, offset: int, size: int) -> bytes:
    data = bytearray(size)
    _read_into(fd, memoryview(data), offset)
    return bytes(data)


def _read_into(fd: int, target: memoryview, offset: int) -> None:
    while target:
        count = os.preadv(fd, [target], offset)
        if count == 0:
            raise ValueError(f"the file ends at byte {offset}")
        target, offset = target[count:], offset + count
