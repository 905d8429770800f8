"""eventfd: a counter, and whether reads take one (semaphore) or all of it.

The image entry is CRIU's. It has no field for semaphore mode, so that stands in gpurestore.json.
"""

from __future__ import annotations

import fcntl
import os
import struct
from collections.abc import Container

from gpurestore.images import pb
from gpurestore.tasks.fdinfo import OpenFile

_COUNTER_MAX = (1 << 64) - 2  # what write(2) can bring it to
_SETFL_FLAGS = os.O_NONBLOCK | os.O_APPEND


def collect(file: OpenFile, file_id: int) -> pb.file_entry:
    """The entry of an eventfd; the counter stands in fdinfo, in hex."""
    counter = int(file.info.fields.get("eventfd-count", "0"), 16)
    efd = pb.eventfd_file_entry(id=file_id, flags=file.info.flags, fown=file.fown, counter=counter)
    return pb.file_entry(type=pb.EVENTFD, id=file_id, efd=efd)


def is_semaphore(file: OpenFile) -> bool:
    """Whether it was made with EFD_SEMAPHORE."""
    return file.info.fields.get("eventfd-semaphore", "0") == "1"


def open_entry(entry: pb.eventfd_file_entry, semaphores: Container[int]) -> int:
    """A new eventfd like ``entry``."""
    fd = os.eventfd(0, os.EFD_CLOEXEC | (os.EFD_SEMAPHORE if entry.id in semaphores else 0))
    try:
        if entry.counter:
            os.write(fd, struct.pack("=Q", min(entry.counter, _COUNTER_MAX)))
        fcntl.fcntl(fd, fcntl.F_SETFL, entry.flags & _SETFL_FLAGS)
    except BaseException:
        os.close(fd)
        raise
    return fd
