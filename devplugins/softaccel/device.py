"""Devices of the software accelerator, a stand-in for hardware: memory to hand out, engines that take their time."""

from __future__ import annotations

import ctypes
import errno
import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

_MIN_CHUNK_BYTES = 64 << 10
_MAX_CHUNK_BYTES = 8 << 20
_CHUNK_S = 0.02
_LATE_S = 0.01
PAGE_BYTES = 4096


class AcceleratorError(Exception):
    """A request that cannot be done, with the errno and the sentence that the client gets."""

    def __init__(self, number: int, text: str) -> None:
        self.errno = number
        super().__init__(text)


class StoppedError(AcceleratorError):
    """Whoever a copy was made for is gone."""

    def __init__(self) -> None:
        super().__init__(errno.ECANCELED, "stopped half-way: the other side is gone")


@dataclass(frozen=True, slots=True)
class Config:
    """What a device is like. A bandwidth of 0 means as fast as memory is."""

    memory_bytes: int = 1 << 30
    bandwidth_bytes_per_s: float = 0.0
    latency_s: float = 0.0


class Engine:
    """One DMA engine. Copies that are under way at once share its bandwidth, chunk by chunk, and sleep meanwhile."""

    def __init__(self, config: Config) -> None:
        self._config = config
        self._lock = threading.Lock()
        self._free_at = 0.0

    @property
    def chunk_bytes(self) -> int:
        """How much is moved before it is looked whether to stop."""
        wanted = int(self._config.bandwidth_bytes_per_s * _CHUNK_S) or _MAX_CHUNK_BYTES
        return min(max(wanted, _MIN_CHUNK_BYTES), _MAX_CHUNK_BYTES) // PAGE_BYTES * PAGE_BYTES

    def start(self) -> None:
        """Sleep the time that a copy takes to begin."""
        if self._config.latency_s:
            time.sleep(self._config.latency_s)

    def copy(self, total: int, move: Callable[[int, int], int], stop: Callable[[], bool]) -> int:
        """Call ``move(offset, size)``, which says how much it moved, until all is done; the bytes moved.

        Raises StoppedError when ``stop`` says so between two chunks.
        """
        done = 0
        while done < total:
            if stop():
                raise StoppedError
            size = min(self.chunk_bytes, total - done)
            done_at = self._reserve(size)
            moved = move(done, size)
            done += moved
            if moved < size:
                break
            time.sleep(max(0.0, done_at - time.monotonic()))
        return done

    def _reserve(self, size: int) -> float:
        """When the engine will have moved ``size`` bytes more, behind all that it has to do already."""
        if not self._config.bandwidth_bytes_per_s:
            return 0.0
        with self._lock:
            now = time.monotonic()
            # A thread wakes up late, but the engine it stands for went on: what was slept too long is taken off.
            start = self._free_at if self._free_at > now - _LATE_S else now
            self._free_at = start + size / self._config.bandwidth_bytes_per_s
            return self._free_at


class Device:
    """One device: so much memory, an engine in each direction, alive until it is lost."""

    def __init__(self, index: int, config: Config) -> None:
        self.index = index
        self.config = config
        self.lost = False
        self.copy_in = Engine(config)
        self.copy_out = Engine(config)
        self._lock = threading.Lock()
        self._used_bytes = 0

    @property
    def free_bytes(self) -> int:
        """Memory that nobody has."""
        return self.config.memory_bytes - self._used_bytes

    def take(self, size: int) -> None:
        """Account for ``size`` bytes. Raises AcceleratorError when there are not so many."""
        with self._lock:
            if size > self.free_bytes:
                raise AcceleratorError(
                    errno.ENOMEM,
                    f"device {self.index} has {self.free_bytes} of {self.config.memory_bytes} bytes free, "
                    f"{size} are wanted",
                )
            self._used_bytes += size

    def give_back(self, size: int) -> None:
        """The opposite."""
        with self._lock:
            self._used_bytes -= size

    def check(self) -> None:
        """Raise if the device is lost."""
        if self.lost:
            raise AcceleratorError(errno.ENODEV, f"device {self.index} of the software accelerator is lost")


# ---- the memory of clients


class _IoVec(ctypes.Structure):
    _fields_ = (("base", ctypes.c_void_p), ("len", ctypes.c_size_t))


_libc = ctypes.CDLL(None, use_errno=True)
for _call in (_libc.process_vm_readv, _libc.process_vm_writev):
    _call.restype = ctypes.c_ssize_t
    _call.argtypes = (
        ctypes.c_int,
        ctypes.POINTER(_IoVec),
        ctypes.c_ulong,
        ctypes.POINTER(_IoVec),
        ctypes.c_ulong,
        ctypes.c_ulong,
    )


def read_host(pid: int, host: int, own: int, size: int) -> int:
    """Copy ``size`` bytes from a client's memory to ours; the bytes that were copied."""
    return _transfer(_libc.process_vm_readv, "read", pid, host, own, size)


def write_host(pid: int, host: int, own: int, size: int) -> int:
    """Copy ``size`` bytes from our memory to a client's; the bytes that were copied."""
    return _transfer(_libc.process_vm_writev, "write", pid, host, own, size)


def _transfer(call: Callable[..., int], verb: str, pid: int, host: int, own: int, size: int) -> int:
    moved = call(pid, _IoVec(own, size), 1, _IoVec(host, size), 1, 0)
    if moved < 0:
        number = ctypes.get_errno()
        hint = ""
        if number == errno.EPERM:
            hint = "; the server needs the right to trace its clients (run it as root, or set ptrace_scope to 0)"
        text = f"cannot {verb} {size} bytes at {host:#x} of pid {pid}: {os.strerror(number)}{hint}"
        raise AcceleratorError(number, text)
    return moved
