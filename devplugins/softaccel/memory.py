"""Device memory of the software accelerator (a stand-in for hardware): the buffers of one context, by address."""

from __future__ import annotations

import bisect
import ctypes
import errno
import mmap
import threading

from gpurestore.devplugins.softaccel.device import PAGE_BYTES, AcceleratorError, Device

FIRST_ADDRESS = 0x7ACC_0000_0000  # device memory; no pointer of a client ever looks like that
ADDRESS_END = 0x7BCC_0000_0000


class Buffer:
    """A piece of device memory. Its address means something on the device only; it lies page by page in ours."""

    def __init__(self, address: int, size: int) -> None:
        self.address = address
        self.size = size
        self.memory = mmap.mmap(-1, max(size, 1), mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self._pin = ctypes.c_char.from_buffer(self.memory)  # keeps the mapping from being closed under us
        self.base = ctypes.addressof(self._pin)

    @property
    def end(self) -> int:
        """The first address behind it."""
        return self.address + self.size


class Memory:
    """What one context has of a device's memory. Any thread may call; every error is an AcceleratorError."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self._lock = threading.RLock()
        self._buffers: dict[int, Buffer] = {}
        self._addresses: list[int] = []

    @property
    def used_bytes(self) -> int:
        """What all buffers take, whole pages each."""
        return sum(_round_up(buffer.size) for buffer in self.buffers())

    def buffers(self) -> list[Buffer]:
        """All of them, by address."""
        with self._lock:
            return [self._buffers[address] for address in self._addresses]

    def find(self, address: int, size: int) -> tuple[Buffer, int]:
        """The buffer that holds these device addresses, and the offset in it."""
        with self._lock:
            index = bisect.bisect_right(self._addresses, address) - 1
            buffer = self._buffers[self._addresses[index]] if index >= 0 else None
        if buffer is None or not 0 <= size <= buffer.end - address:
            raise AcceleratorError(errno.EFAULT, f"{size} bytes at device address {address:#x} lie in no buffer")
        return buffer, address - buffer.address

    def has(self, address: int) -> bool:
        """Whether a buffer begins there."""
        with self._lock:
            return address in self._buffers

    def alloc(self, size: int) -> int:
        """A new buffer where there is room; its address."""
        whole = self._device.config.memory_bytes
        if not 0 < size <= whole:
            raise AcceleratorError(errno.ENOMEM, f"{size} bytes wanted of a device that has {whole}")
        with self._lock:
            address = self._find_hole(_round_up(size))
            self._add(address, size)
        return address

    def place(self, address: int, size: int) -> None:
        """A buffer at the address that it had before a dump."""
        if not FIRST_ADDRESS <= address <= address + size <= ADDRESS_END or size <= 0:
            raise AcceleratorError(errno.EINVAL, f"a buffer of {size} bytes at {address:#x}")
        with self._lock:
            self._add(address, size)

    def free(self, address: int) -> None:
        """Give one back. Nothing may use it any more."""
        with self._lock:
            buffer = self._buffers.pop(address)
            self._addresses.remove(address)
        self._device.give_back(_round_up(buffer.size))

    def free_all(self) -> None:
        """Give everything back. A command that runs keeps its own buffers until it ends."""
        with self._lock:
            self._device.give_back(self.used_bytes)
            self._buffers.clear()
            self._addresses.clear()

    def _find_hole(self, span: int) -> int:
        address = FIRST_ADDRESS
        for start in self._addresses:
            if start - address >= span:
                break
            address = start + _round_up(self._buffers[start].size)
        if address + span > ADDRESS_END:
            raise AcceleratorError(errno.ENOMEM, "no device address is free")
        return address

    def _add(self, address: int, size: int) -> None:
        span = _round_up(size)
        self._device.take(span)
        try:
            self._buffers[address] = Buffer(address, size)
        except (OSError, ValueError, MemoryError) as error:
            self._device.give_back(span)
            raise AcceleratorError(errno.ENOMEM, f"the server has no {size} bytes for a buffer: {error}") from error
        bisect.insort(self._addresses, address)


def _round_up(size: int) -> int:
    return -(-size // PAGE_BYTES) * PAGE_BYTES
