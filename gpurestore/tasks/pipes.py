"""Pipes and FIFOs, with the data in flight.

Dump: every end is a description of its own; ends of one pipe share its inode number. The data is duplicated by tee(2)
into a pipe of ours, so that nothing is consumed. A pipe whose other end is held outside the tree cannot be carried.
Restore: one pipe is made per pipe id, filled, and its ends are opened; a FIFO is opened by its path and filled.

CRIU's images have no field for the bounds of packets (O_DIRECT) and the pipe's owner: they stand in gpurestore.json.
"""

from __future__ import annotations

import array
import errno
import fcntl
import os
import select
import stat
import termios
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from gpurestore import capabilities
from gpurestore.errors import Finding, GpurestoreError, ImageError
from gpurestore.images import pb
from gpurestore.tasks import fdinfo, procfs
from gpurestore.tasks.fdinfo import OpenFile
from gpurestore.tasks.filefacts import PipeOwner
from gpurestore.tasks.rawcalls import tee

PIPE_MAX_BYTES = 1 << 31  # of the kernel, whatever pipe-max-size says
_SETFL_FLAGS = os.O_NONBLOCK | os.O_APPEND | os.O_DIRECT
_LARGEFILE = 0o100000  # open(2) sets it, pipe(2) does not
_READ_BYTES = 1 << 20


@dataclass(slots=True)
class _Pipe:
    """One pipe of the tree. ``read_fd`` and ``write_fd`` are duplicates of some end, where the tree has one."""

    pipe_id: int
    where: str
    name: str
    stat: os.stat_result
    fifo: bool
    read_fd: int = -1
    write_fd: int = -1
    packets: bool = False


@dataclass(slots=True)
class PipeData:
    """What a pipe held: ``chunks`` is one piece, or one per packet."""

    pipe_id: int
    capacity: int | None
    chunks: list[bytes] = field(default_factory=list)
    packets: bool = False


class PipeDump:
    """The pipes and FIFOs of a tree."""

    def __init__(self) -> None:
        self._pipes: dict[tuple[int, int], _Pipe] = {}

    def add(self, file: OpenFile) -> int:
        """Note one end; returns the pipe id."""
        pipe = self._pipes.get(file.key)
        if pipe is None:
            fifo = not file.link.startswith("pipe:")
            pipe = _Pipe(file.stat.st_ino & 0xFFFFFFFF, file.where, file.link, file.stat, fifo)
            self._pipes[file.key] = pipe
        mode = file.info.flags & os.O_ACCMODE
        if mode != os.O_WRONLY and pipe.read_fd < 0:
            pipe.read_fd = os.dup(file.fd)
        if mode != os.O_RDONLY and pipe.write_fd < 0:
            pipe.write_fd = os.dup(file.fd)
        pipe.packets |= mode != os.O_RDONLY and bool(file.info.flags & os.O_DIRECT)
        return pipe.pipe_id

    def finish(self, findings: list[Finding]) -> None:
        """Once all descriptors of the tree are known: pipes that lead out of it, or that cannot be read."""
        for pipe in self._pipes.values():
            what = f"{'FIFO' if pipe.fifo else 'pipe'} {pipe.name}"
            if (outside := _outside_end(pipe)) is not None:
                why = f"its {outside} end is held by a process outside the tree{_holder(pipe)}"
                findings.append(Finding(pipe.where, what, why))
            elif _capacity(pipe) > _our_capacity_limit() and not _may_exceed():
                why = f"it is larger than fs.pipe-max-size ({_our_capacity_limit()} bytes)"
                findings.append(Finding(pipe.where, what, why))

    def data(self, *, fifo: bool) -> list[PipeData]:
        """Duplicate what is in flight."""
        return [_read(pipe) for pipe in self._pipes.values() if pipe.fifo == fifo]

    def owners(self) -> dict[int, PipeOwner]:
        """Owner and mode of the pipes' inodes, by pipe id."""
        return {
            pipe.pipe_id: PipeOwner(pipe.stat.st_uid, pipe.stat.st_gid, stat.S_IMODE(pipe.stat.st_mode))
            for pipe in self._pipes.values()
            if not pipe.fifo
        }

    def close(self) -> None:
        """Drop the duplicates."""
        for pipe in self._pipes.values():
            for fd in (pipe.read_fd, pipe.write_fd):
                if fd >= 0:
                    os.close(fd)
        self._pipes.clear()


def collect(file: OpenFile, file_id: int, pipe_id: int) -> pb.file_entry:
    """The entry of one end of a pipe."""
    pipe = pb.pipe_entry(id=file_id, pipe_id=pipe_id, flags=file.info.flags, fown=file.fown)
    return pb.file_entry(type=pb.PIPE, id=file_id, pipe=pipe)


def collect_fifo(file_id: int, pipe_id: int, regf_id: int) -> pb.file_entry:
    """The entry of an open FIFO; path and flags are in the regular entry ``regf_id``."""
    return pb.file_entry(type=pb.FIFO, id=file_id, fifo=pb.fifo_entry(id=file_id, pipe_id=pipe_id, regf_id=regf_id))


def data_entry(data: PipeData) -> pb.pipe_data_entry:
    """The record of pipes-data.img or fifo-data.img; the bytes follow it."""
    return pb.pipe_data_entry(pipe_id=data.pipe_id, bytes=sum(map(len, data.chunks)), size=data.capacity)


def _outside_end(pipe: _Pipe) -> str | None:
    """Which end is open somewhere although the tree has none: a writer without reader polls as error, and so on."""
    if pipe.read_fd < 0:
        return None if _poll(pipe.write_fd, select.POLLOUT) & select.POLLERR else "reading"
    if pipe.write_fd < 0:
        if _poll(pipe.read_fd, select.POLLIN) & select.POLLHUP:
            return None
        # A FIFO whose reader never saw a writer does not poll as hung up, although nobody is there.
        return None if pipe.fifo and not _holder(pipe) else "writing"
    return None


def _poll(fd: int, events: int) -> int:
    poller = select.poll()
    poller.register(fd, events)
    ready = poller.poll(0)
    return ready[0][1] if ready else 0


def _holder(pipe: _Pipe) -> str:
    """Who outside holds it, for the message: " (pid 12, NAME)", or nothing when it cannot be seen."""
    mode = os.O_WRONLY if pipe.write_fd < 0 else os.O_RDONLY
    for pid in sorted(procfs.all_pids()):
        if pid == os.getpid():
            continue
        try:
            for fd in os.listdir(f"/proc/{pid}/fd"):
                if os.readlink(f"/proc/{pid}/fd/{fd}") != pipe.name:
                    continue
                if fdinfo.read(pid, int(fd)).flags & os.O_ACCMODE in (mode, os.O_RDWR):
                    with open(f"/proc/{pid}/comm", encoding="utf-8", errors="replace") as comm:
                        return f" (pid {pid}, {comm.read().strip()})"
        except (OSError, ValueError):
            continue
    return ""


def _capacity(pipe: _Pipe) -> int:
    return fcntl.fcntl(pipe.read_fd if pipe.read_fd >= 0 else pipe.write_fd, fcntl.F_GETPIPE_SZ)


def _our_capacity_limit() -> int:
    with open("/proc/sys/fs/pipe-max-size", encoding="ascii") as file:
        return int(file.read())


def _may_exceed() -> bool:
    return capabilities.holds("SYS_RESOURCE")


def _pending_bytes(fd: int) -> int:
    count = array.array("i", [0])
    fcntl.ioctl(fd, termios.FIONREAD, count)
    return count[0]


def _read(pipe: _Pipe) -> PipeData:
    """Duplicate the pipe's data into a pipe of ours and read that."""
    held = pipe.read_fd if pipe.read_fd >= 0 else pipe.write_fd
    data = PipeData(pipe.pipe_id, _capacity(pipe), packets=pipe.packets)
    if not _pending_bytes(held):
        return data
    source = held if pipe.read_fd >= 0 else fdinfo.reopen(held, os.O_RDONLY | os.O_NONBLOCK)
    reader, writer = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        fcntl.fcntl(writer, fcntl.F_SETPIPE_SZ, data.capacity or 0)
        tee(source, writer, PIPE_MAX_BYTES - 1)
        os.close(writer)
        writer = -1
        while chunk := os.read(reader, _READ_BYTES):
            data.chunks.append(chunk)
    finally:
        for fd in (reader, writer, source if source != held else -1):
            if fd >= 0:
                os.close(fd)
    if not pipe.packets:
        data.chunks = [b"".join(data.chunks)]
    return data


# ---- restore ----


@dataclass(slots=True)
class _Ends:
    """The two descriptions that pipe2 made, and which of them a task has got already."""

    reader: int
    writer: int
    reader_given: bool = False
    writer_given: bool = False


def check_capacity(data: PipeData) -> list[Finding]:
    """Whether a pipe may be made as large as it was."""
    if data.capacity is not None and data.capacity > PIPE_MAX_BYTES:
        raise ImageError(f"pipe {data.pipe_id:#x} has {data.capacity} bytes of room, more than any pipe")
    limit = _our_capacity_limit()
    if data.capacity is None or data.capacity <= limit or _may_exceed():
        return []
    why = f"a pipe may have {limit} bytes here; raise fs.pipe-max-size"
    return [Finding(f"pipe {data.pipe_id:#x}", f"{data.capacity} bytes of room", why)]


class PipeStage:
    """Pipes being made: each id once, ends handed out as descriptions."""

    def __init__(self, data: dict[int, PipeData], owners: Mapping[int, PipeOwner]) -> None:
        self._data = data
        self._owners = owners
        self._ends: dict[int, _Ends] = {}

    def open(self, entry: pb.pipe_entry) -> int:
        """The end that ``entry`` describes. The first plain one of each side is the pipe's own, others are reopened."""
        ends = self._ends.get(entry.pipe_id)
        if ends is None:
            ends = self._ends[entry.pipe_id] = _Ends(*os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK))
            fill(ends.writer, self._data.get(entry.pipe_id))
            self._own(ends.reader, entry.pipe_id)
        mode = entry.flags & os.O_ACCMODE
        plain = not entry.flags & _LARGEFILE
        if plain and mode == os.O_RDONLY and not ends.reader_given:
            ends.reader_given = True
            return _give(ends.reader, entry.flags)
        if plain and mode == os.O_WRONLY and not ends.writer_given:
            ends.writer_given = True
            return _give(ends.writer, entry.flags)
        return fdinfo.reopen(ends.reader, entry.flags & (os.O_ACCMODE | _SETFL_FLAGS))

    def _own(self, fd: int, pipe_id: int) -> None:
        owner = self._owners.get(pipe_id)
        if owner is None:
            return
        have = os.fstat(fd)
        if (have.st_uid, have.st_gid) != (owner.uid, owner.gid):
            os.fchown(fd, owner.uid, owner.gid)
        if stat.S_IMODE(have.st_mode) != owner.mode:
            os.fchmod(fd, owner.mode)

    def close(self) -> None:
        """Drop our hold of the ends: one that no task has must not stay open here."""
        for ends in self._ends.values():
            os.close(ends.reader)
            os.close(ends.writer)
        self._ends.clear()


def _give(end: int, flags: int) -> int:
    fcntl.fcntl(end, fcntl.F_SETFL, flags & _SETFL_FLAGS)
    return os.dup(end)


def fill(fd: int, data: PipeData | None) -> None:
    """Set the capacity of the pipe behind ``fd``, a writable end that does not block, and put the data back."""
    if data is None:
        return
    total = sum(map(len, data.chunks))
    if data.capacity is not None and fcntl.fcntl(fd, fcntl.F_GETPIPE_SZ) != data.capacity:
        _resize(fd, data.capacity)
    if total > fcntl.fcntl(fd, fcntl.F_GETPIPE_SZ):
        _resize(fd, total)
    if data.packets:
        fcntl.fcntl(fd, fcntl.F_SETFL, fcntl.fcntl(fd, fcntl.F_GETFL) | os.O_DIRECT)
    for chunk in data.chunks:
        if chunk and os.write(fd, chunk) != len(chunk):
            raise GpurestoreError(f"pipe {data.pipe_id:#x} does not take the {total} bytes that it held")
    if data.packets:
        fcntl.fcntl(fd, fcntl.F_SETFL, fcntl.fcntl(fd, fcntl.F_GETFL) & ~os.O_DIRECT)


def _resize(fd: int, capacity: int) -> None:
    try:
        fcntl.fcntl(fd, fcntl.F_SETPIPE_SZ, capacity)
    except OSError as error:
        limit = "; raise fs.pipe-max-size" if error.errno == errno.EPERM else ""
        raise GpurestoreError(
            f"cannot give a pipe its {capacity} bytes: {os.strerror(error.errno or 0)}{limit}"
        ) from error


def open_fifo(path: str, flags: int, data: PipeData | None, *, first: bool) -> int:
    """Open the FIFO ``path`` with ``flags``; the first description of it brings the data back.

    Opening with O_RDWR beforehand keeps an open for one end from waiting for the other.
    """
    helper = os.open(path, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        if not stat.S_ISFIFO(os.fstat(helper).st_mode):
            raise GpurestoreError(f"{path} is not a FIFO any more")
        if first and (used := _pending_bytes(helper)):
            raise GpurestoreError(f"FIFO {path} already holds {used} bytes: some other process uses it")
        keep = flags & (os.O_ACCMODE | _SETFL_FLAGS)
        fd = os.open(path, keep | os.O_CLOEXEC)
        if first:
            fill(helper, data)
        return fd
    finally:
        os.close(helper)


def data_by_id(
    entries: Sequence[tuple[pb.pipe_data_entry, bytes]], packets: Mapping[int, list[int]]
) -> dict[int, PipeData]:
    """Records of pipes-data.img or fifo-data.img, cut into packets where the extension says so."""
    result = {}
    for entry, payload in entries:
        lengths = packets.get(entry.pipe_id, [len(payload)])
        if sum(lengths) != len(payload):
            raise ImageError(f"pipe {entry.pipe_id:#x} has {len(payload)} bytes, but packets of {sum(lengths)}")
        chunks, offset = [], 0
        for length in lengths:
            chunks.append(payload[offset : offset + length])
            offset += length
        capacity = entry.size if entry.HasField("size") else None
        result[entry.pipe_id] = PipeData(entry.pipe_id, capacity, chunks, entry.pipe_id in packets)
    return result
