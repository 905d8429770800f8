"""The compressors of pages: LZ4 and Zstandard, through their usual Python packages, which let go of the GIL.

A chunk becomes one *frame*, complete in itself and in the standard form of its algorithm, so that ``lz4`` and ``zstd``
read our files. A chunk that does not shrink is stored as it is, inside of its frame.
"""

from __future__ import annotations

import importlib
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Final, NamedTuple, Protocol

from gpurestore.errors import GpurestoreError, ImageError, UsageError
from gpurestore.images.container import Bytes

# The largest chunk that a reader takes; what we write is smaller (Compression.chunk_bytes).
MAX_CHUNK_BYTES: Final = 4 << 20
# No frame is larger than its chunk by more than this: head and end of an LZ4 frame, heads of Zstandard's raw blocks.
MAX_FRAME_EXTRA: Final = 1 << 10

# What all buffers of a dump, or of a restore, may take together.
BUFFER_BYTES: Final = 32 << 20
_POLL_S = 0.02

LZ4, ZSTD = "lz4", "zstd"
SUFFIXES: Final = {LZ4: ".lz4", ZSTD: ".zst"}
COMPRESSED_SUFFIXES: Final = tuple(f".img{suffix}" for suffix in SUFFIXES.values())
NUMBERS: Final = {LZ4: 1, ZSTD: 2}
_PACKAGES = {LZ4: "cramjam", ZSTD: "zstandard"}
_LEVELS = {LZ4: (0, 0), ZSTD: (1, 19)}
_DEFAULT_LEVELS = {LZ4: 0, ZSTD: 1}
# A chunk is what a cancellation waits for: the more thoroughly Zstandard searches, the smaller. Largest level, bytes.
_CHUNK_BYTES: Final = ((9, 512 << 10), (15, 256 << 10), (19, 128 << 10))

# An LZ4 frame (doc/lz4_Frame_format.md): magic, version 1 with independent blocks of at most 4 MiB, checksum of these
# two bytes; u32 size of a block, the block; u32 0. The highest bit of a size says that the block is stored as it is.
_LZ4_HEAD: Final = bytes.fromhex("04224d18607073")
_LZ4_STORED: Final = 1 << 31
_U32 = struct.Struct("<I")
_LZ4_EXTRA: Final = len(_LZ4_HEAD) + 2 * _U32.size


class Codec(Protocol):
    """One thread's compressor and decompressor."""

    def compress(self, chunk: Bytes) -> Bytes:
        """The frame of ``chunk``."""

    def decompress(self, frame: Bytes, room: memoryview) -> memoryview:
        """The chunk in ``frame``, exactly as large as ``room``, else ValueError.

        It is made in ``room``, without memory of its own, or lies in the frame as it is.
        """


class Compression(NamedTuple):
    """An algorithm of :data:`SUFFIXES` and its level (0: it has none)."""

    algorithm: str
    level: int = 0

    @classmethod
    def parse(cls, text: str) -> Compression:
        """``lz4`` or ``zstd[:LEVEL]``. Raises UsageError."""
        algorithm, colon, level_text = text.partition(":")
        if algorithm not in SUFFIXES:
            raise UsageError(f"compression {text!r}: there are {LZ4} and {ZSTD}[:LEVEL]")
        if not colon:
            return cls(algorithm, _DEFAULT_LEVELS[algorithm])
        low, high = _LEVELS[algorithm]
        if high == 0:
            raise UsageError(f"compression {text!r}: {algorithm} has no levels")
        if not level_text.isascii() or not level_text.isdigit() or not low <= int(level_text[:4]) <= high:
            raise UsageError(f"compression {text!r}: levels of {algorithm} are {low} to {high}")
        return cls(algorithm, int(level_text))

    def __str__(self) -> str:
        return f"{self.algorithm}:{self.level}" if self.level else self.algorithm

    @property
    def chunk_bytes(self) -> int:
        """How much is compressed at once: docs/performance.md has the measurements."""
        return next(size for level, size in _CHUNK_BYTES if self.level <= level)

    @property
    def worker_bytes(self) -> int:
        """Memory that a thread takes which compresses, roughly."""
        own = 2 * self.chunk_bytes + MAX_FRAME_EXTRA
        if self.algorithm == LZ4:
            return own + self.chunk_bytes
        zstandard = load(ZSTD)
        parameters = zstandard.ZstdCompressionParameters.from_level(self.level, source_size=self.chunk_bytes)
        return own + int(parameters.estimated_compression_context_size())

    def codec(self) -> Codec:
        """A compressor for the calling thread. Raises UsageError when the package is missing."""
        return codec(self.algorithm, self.level)


class Crew:
    """How a dump compresses, and the places for threads that do, shared by all files that are written at once."""

    def __init__(self, compression: Compression, jobs: int) -> None:
        """Raises UsageError when the compressor is not installed."""
        load(compression.algorithm)
        self.compression = compression
        self.nr_places = max(1, min(jobs, BUFFER_BYTES // compression.worker_bytes))
        self._places = threading.BoundedSemaphore(self.nr_places)

    @contextmanager
    def place(self, stop: Callable[[], None]) -> Iterator[None]:
        """Wait for a place; ``stop`` may raise meanwhile. A thread that has one never waits for one that has none."""
        while not self._places.acquire(timeout=_POLL_S):
            stop()
        try:
            yield
        finally:
            self._places.release()


def load(algorithm: str) -> Any:
    """The package behind an algorithm. Raises UsageError when it is not installed."""
    package = _PACKAGES[algorithm]
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise UsageError(
            f"{algorithm} needs the Python package {package}: pip install 'gpurestore[compress]'"
        ) from error


def codec(algorithm: str, level: int = 0) -> Codec:
    """The codec of an algorithm."""
    make: Callable[[Any, int], Codec] = _Lz4 if algorithm == LZ4 else _Zstd
    return make(load(algorithm), level)


class _Lz4:
    def __init__(self, package: Any, _level: int) -> None:
        self._lz4, self._error = package.lz4, package.DecompressionError

    def compress(self, chunk: Bytes) -> Bytes:
        block = self._lz4.compress_block(chunk, store_size=False)
        stored = len(block) >= len(chunk)
        size = len(chunk) | _LZ4_STORED if stored else len(block)
        return b"".join((_LZ4_HEAD, _U32.pack(size), chunk if stored else block, bytes(_U32.size)))

    def decompress(self, frame: Bytes, room: memoryview) -> memoryview:
        view = memoryview(frame)
        if len(view) < _LZ4_EXTRA or view[: len(_LZ4_HEAD)] != _LZ4_HEAD or any(view[-_U32.size :]):
            raise ValueError("not an LZ4 frame of one block")
        (size,) = _U32.unpack_from(view, len(_LZ4_HEAD))
        block = view[len(_LZ4_HEAD) + _U32.size : -_U32.size]
        if size & ~_LZ4_STORED != len(block):
            raise ValueError(f"a block of {size & ~_LZ4_STORED} bytes in a frame with room for {len(block)}")
        if size & _LZ4_STORED:
            return _checked(block, len(block), len(room))
        try:
            return _checked(room, self._lz4.decompress_block_into(block, room, len(room)), len(room))
        except self._error as error:
            raise ValueError(f"LZ4: {error}") from error


class _Zstd:
    def __init__(self, package: Any, level: int) -> None:
        self._package = package
        self._compressor = package.ZstdCompressor(level=level, write_checksum=False) if level else None
        self._decompressor = package.ZstdDecompressor()

    def compress(self, chunk: Bytes) -> Bytes:
        assert self._compressor is not None
        frame: bytes = self._compressor.compress(chunk)
        return frame

    def decompress(self, frame: Bytes, room: memoryview) -> memoryview:
        try:
            # A frame that says how much it holds goes straight to the room. Of others a window would have to be kept.
            claimed = self._package.get_frame_parameters(frame).content_size
            if claimed != len(room):
                raise ValueError(f"a frame for {claimed} bytes instead of {len(room)}")
            reader = self._decompressor.stream_reader(frame)
            size = reader.readinto(room)
            if reader.read(1):
                raise ValueError("another frame behind it")
        except self._package.ZstdError as error:
            raise ValueError(f"Zstandard: {error}") from error
        return _checked(room, size, len(room))


def _checked(chunk: memoryview, size: int, expected: int) -> memoryview:
    if size != expected:
        raise ValueError(f"{size} bytes came out instead of {expected}")
    return chunk


def of_number(number: int) -> str:
    """The algorithm that a file names. Raises ImageError for one of a later version."""
    for algorithm, own in NUMBERS.items():
        if own == number:
            return algorithm
    raise ImageError(f"compressed by algorithm {number}, which this version does not know")


def require(algorithm: str, name: str) -> None:
    """Raise GpurestoreError if the package is missing that reads the file ``name``."""
    try:
        load(algorithm)
    except UsageError as error:
        raise GpurestoreError(f"{name}: {error}") from error
