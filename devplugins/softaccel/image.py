"""The image of one context: its state, and the content of its buffers in chunks, each with a checksum.

    offset 0      8 bytes   magic, the last two are the version
           8      u64       offset of the state
          16      u64       bytes of the state
          24     16 bytes   xxh3_128 of the state
        4096                chunks of device memory, one behind the other
    at the end              the state, JSON: see context.py; every buffer lists its chunks as
                            [offset in this file, or -1 for zeros; bytes; xxh3_64 in hexadecimal digits]

All numbers are little endian. The head is written last: a file that was not finished has none.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Iterator
from typing import Any

import xxhash

MAGIC = b"SOFTAC\x00\x01"
HEAD = struct.Struct("<8sQQ16s")
DATA_OFFSET = 4096
MAX_STATE_BYTES = 256 << 20
STAND_IN = "software accelerator, a stand-in for hardware, not a GPU"


class BadImageError(ValueError):
    """An image that is not one, or not whole."""


def digest(data: bytes | memoryview) -> str:
    """The checksum of a chunk."""
    return str(xxhash.xxh3_64_hexdigest(data))


def write_state(fd: int, state: dict[str, Any], offset: int) -> int:
    """Finish an image whose chunks end at ``offset``; the bytes of the whole file."""
    data = json.dumps(state, separators=(",", ":")).encode()
    write_all(fd, data, offset)
    head = HEAD.pack(MAGIC, offset, len(data), xxhash.xxh3_128_digest(data))
    write_all(fd, head, 0)
    return offset + len(data)


def write_all(fd: int, data: bytes | memoryview, offset: int) -> None:
    """pwrite until everything is written."""
    view = memoryview(data)
    while view:
        written = os.pwrite(fd, view, offset)
        view, offset = view[written:], offset + written


def read_state(fd: int, name: str) -> dict[str, Any]:
    """The state in an image. Raises BadImageError, naming what is wrong."""
    head = os.pread(fd, HEAD.size, 0)
    if len(head) < HEAD.size or head[:6] != MAGIC[:6]:
        raise BadImageError(f"{name}: not an image of the {STAND_IN}")
    magic, offset, size, expected = HEAD.unpack(head)
    if magic != MAGIC:
        raise BadImageError(f"{name}: of another version")
    if size > MAX_STATE_BYTES or offset + size != os.fstat(fd).st_size:
        raise BadImageError(f"{name}: truncated or too long")
    data = os.pread(fd, size, offset)
    if len(data) != size or xxhash.xxh3_128_digest(data) != expected:
        raise BadImageError(f"{name}: the state is damaged")
    state = json.loads(data)
    if not isinstance(state, dict):
        raise BadImageError(f"{name}: the state is not a mapping")
    return state


def chunks(state: dict[str, Any], name: str) -> Iterator[tuple[int, int, int, str]]:
    """(device address, offset in the file or -1, bytes, checksum) of everything stored, checked against its buffer."""
    for buffer in state["buffers"]:
        address, left = int(buffer["address"]), int(buffer["bytes"])
        for offset, size, checksum in buffer["chunks"]:
            if not 0 < size <= left or (offset != -1 and offset < DATA_OFFSET):
                raise BadImageError(f"{name}: a chunk outside of its buffer")
            yield address, offset, size, checksum
            address, left = address + size, left - size
        if left:
            raise BadImageError(f"{name}: {left} bytes of the buffer at {buffer['address']:#x} are missing")
