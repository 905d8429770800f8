"""The client library of the software accelerator (a stand-in for hardware, not a GPU). Needs nothing but Python.

    with Context(device=0) as context:
        x = context.upload(array("f", [1, -2, 3]))        # anything with the buffer protocol
        y = context.alloc(12)
        context.stream.launch(Kernel.RELU, Type.FLOAT32, y, x, 3)
        context.stream.synchronize()
        print(y.download("f"))

One thread at a time may use a context; threads that want to wait at the same time open one each. A context does not
survive fork: the child has to open its own. Everything that a client has on a device is gone when it ends.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import socket
import threading
import time
from array import array
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from gpurestore.devplugins.softaccel import address, for_kernel
from gpurestore.devplugins.softaccel.protocol import (
    ALL_STREAMS,
    AT_CONTEXT,
    AT_DOORBELL,
    AT_FENCES,
    AT_LOST,
    AT_MAGIC,
    AT_READY,
    MAX_BATCH,
    MAX_REPLY_BYTES,
    PAGE_BYTES,
    PAGE_MAGIC,
    TRANSPOSE_A,
    TRANSPOSE_B,
    VERSION,
    Kernel,
    Op,
    Reply,
    Request,
    Type,
    double_bits,
    unpack_reply,
)


class SoftaccelError(OSError):
    """What the server answered, with its errno."""


class DeviceLostError(SoftaccelError):
    """The device or the server is gone, and everything on it."""


class Context:
    """A connection to the server, and with it everything that this client has on one device."""

    def __init__(self, device: int = 0, server: str | None = None) -> None:
        self.device = device
        self._lock = threading.Lock()
        self._seq = 0
        self._rung = 0
        self._batch: list[Request] | None = None
        self._keep: list[Any] = []  # host memory that a queued copy works on
        self._sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC)
        try:
            where = address(server)
            try:
                self._sock.connect(for_kernel(where))
            except OSError as error:
                text = f"no software accelerator listens at {where}: {os.strerror(error.errno or 0)}"
                raise DeviceLostError(error.errno, text) from error
            self._page = self._open()
        except BaseException:
            self._sock.close()
            raise
        self.uid = self._page.get(AT_CONTEXT)
        self.stream = Stream(self, 0)

    def _open(self) -> Page:
        """Say hello, and map the doorbell page until the server sees what is written there.

        A dump may fall in between, while the page's descriptor lies open like any other; what is restored then is a
        copy that the server does not see.
        """
        inode = os.fstat(self._sock.fileno()).st_ino
        self._send(Request(Op.HELLO, self._next(), (VERSION, self.device, inode)).pack())
        reply, fds = self._receive()
        while True:
            self._check(reply)
            page = _map(fds)
            word = int.from_bytes(os.urandom(7), "little") + 1
            page.set(AT_READY, word)
            self._send(Request(Op.READY, self._next(), (word,)).pack())
            reply, fds = self._receive()
            if reply.errno != errno.EAGAIN:
                self._check(reply)
                return page
            reply = reply._replace(errno=0)
            page.close()

    # ---- messages

    def _next(self) -> int:
        self._seq += 1
        return self._seq

    def _send(self, data: bytes) -> None:
        try:
            self._sock.send(data)
        except OSError as error:
            raise DeviceLostError(errno.ENODEV, "the server of the software accelerator is gone") from error

    def _receive(self) -> tuple[Reply, list[int]]:
        """The reply to the last message; others are stale."""
        while True:
            try:
                data, fds, _, _ = socket.recv_fds(self._sock, MAX_REPLY_BYTES, 1, socket.MSG_CMSG_CLOEXEC)
            except OSError as error:
                raise DeviceLostError(errno.ENODEV, "the server of the software accelerator is gone") from error
            if not data:
                raise DeviceLostError(errno.ENODEV, "the server of the software accelerator is gone")
            reply = unpack_reply(data)
            if reply.seq == self._seq:
                return reply, fds
            for fd in fds:
                os.close(fd)

    def _check(self, reply: Reply) -> tuple[int, ...]:
        if reply.errno == 0:
            return reply.values
        kind = DeviceLostError if reply.errno == errno.ENODEV else SoftaccelError
        raise kind(reply.errno, reply.text)

    def request(self, op: Op, *args: int) -> tuple[int, ...]:
        """Send one request and wait for its reply's values. Raises SoftaccelError."""
        with self._lock:
            return self._exchange([Request(op, 0, args)])

    def _exchange(self, requests: list[Request]) -> tuple[int, ...]:
        seq = self._next()
        self._rung += 1
        self._page.set(AT_DOORBELL, self._rung)
        self._send(b"".join(request._replace(seq=seq).pack() for request in requests))
        reply, _ = self._receive()
        return self._check(reply)

    def command(self, op: Op, *args: int) -> int:
        """Queue a command; its number in its stream, or 0 while commands are gathered (see :meth:`batch`)."""
        with self._lock:
            request = Request(op, 0, args)
            if self._batch is None:
                return self._exchange([request])[0]
            self._batch.append(request)
            if len(self._batch) == MAX_BATCH:
                self._flush()
            return 0

    def _flush(self) -> None:
        if self._batch:
            gathered, self._batch = self._batch, []
            self._exchange(gathered)

    @contextmanager
    def batch(self) -> Iterator[None]:
        """Gather the commands that are queued inside and send them together: fewer messages."""
        with self._lock:
            self._batch = []
        try:
            yield
            with self._lock:
                self._flush()
        finally:
            self._batch = None

    # ---- memory

    def alloc(self, size: int) -> DeviceBuffer:
        """``size`` bytes of device memory, zeros."""
        return DeviceBuffer(self, self.request(Op.ALLOC, size)[0], size)

    def upload(self, data: Any) -> DeviceBuffer:
        """Device memory with a copy of ``data``."""
        buffer = self.alloc(memoryview(data).nbytes)
        buffer.write(data)
        return buffer

    def info(self) -> tuple[int, int, int]:
        """Number of devices; memory and free memory of the one that this context is on."""
        devices, memory, free = self.request(Op.INFO)[:3]
        return devices, memory, free

    # ---- order

    def create_stream(self) -> Stream:
        """A stream of its own: its commands run beside those of others."""
        return Stream(self, self.request(Op.STREAM_CREATE)[0])

    def create_event(self) -> Event:
        """An event, which is done until it is recorded."""
        return Event(self, self.request(Op.EVENT_CREATE)[0])

    def synchronize(self) -> None:
        """Wait for all streams. Raises what went wrong in any of them since the context was opened."""
        self.request(Op.WAIT, ALL_STREAMS)
        self._keep.clear()

    @property
    def lost(self) -> bool:
        """Whether the device is lost, as the doorbell page says."""
        return bool(self.word(AT_LOST))

    def word(self, offset: int) -> int:
        """A word of the doorbell page."""
        return self._page.get(offset)

    def close(self) -> None:
        """Give everything back."""
        self._sock.close()
        self._page.close()

    def __enter__(self) -> Context:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class DeviceBuffer:
    """Device memory. As an argument of a kernel it stands for its address; ``buffer + n`` is the address n bytes on."""

    def __init__(self, context: Context, where: int, size: int) -> None:
        self.context = context
        self.address = where
        self.size = size

    def __index__(self) -> int:
        return self.address

    def __add__(self, offset: int) -> int:
        return self.address + offset

    def write(self, data: Any, offset: int = 0, stream: Stream | None = None) -> None:
        """Copy from the host, behind what is queued in the stream. Returns when it is done."""
        (stream or self.context.stream).copy_in(self.address + offset, data)
        (stream or self.context.stream).synchronize()

    def read(self, size: int | None = None, offset: int = 0, stream: Stream | None = None) -> bytearray:
        """Copy to the host, behind what is queued in the stream."""
        data = bytearray(self.size - offset if size is None else size)
        (stream or self.context.stream).copy_out(data, self.address + offset)
        (stream or self.context.stream).synchronize()
        return data

    def download(self, typecode: str) -> array[Any]:
        """All of it, as an array of that type."""
        return array(typecode, bytes(self.read()))

    def free(self) -> None:
        """Give it back, when everything that was queued is done."""
        self.context.synchronize()
        self.context.request(Op.FREE, self.address)


class Stream:
    """Commands that run in the order in which they were queued."""

    def __init__(self, context: Context, ident: int) -> None:
        self.context = context
        self.ident = ident

    def copy_in(self, to: int, data: Any) -> int:
        """Queue a copy from the host. ``data`` must stay as it is until the stream is synchronized."""
        view = memoryview(data).cast("B")
        self.context._keep.append(data)
        return self.context.command(Op.COPY_IN, self.ident, to, _host_address(view), view.nbytes)

    def copy_out(self, data: Any, source: int) -> int:
        """Queue a copy to the host, into all of ``data``, which must be writable."""
        view = memoryview(data).cast("B")
        self.context._keep.append(data)
        return self.context.command(Op.COPY_OUT, self.ident, _host_address(view), source, view.nbytes)

    def copy(self, to: int | DeviceBuffer, source: int | DeviceBuffer, size: int) -> int:
        """Queue a copy on the device."""
        return self.context.command(Op.COPY, self.ident, int(_index(to)), int(_index(source)), size)

    def launch(self, kernel: Kernel, kind: Type, *parameters: int | float | DeviceBuffer) -> int:
        """Queue a kernel. Buffers stand for their addresses; floats travel as their bits."""
        args = [double_bits(p) if isinstance(p, float) else _index(p) for p in parameters]
        return self.context.command(Op.LAUNCH, self.ident, kernel, kind, *args)

    def matmul(
        self,
        kind: Type,
        out: DeviceBuffer | int,
        a: DeviceBuffer | int,
        b: DeviceBuffer | int,
        shape: tuple[int, int, int],
        *,
        transpose_a: bool = False,
        transpose_b: bool = False,
        alpha: float = 1.0,
        beta: float = 0.0,
    ) -> int:
        """Queue out (m x n) = alpha * a (m x k) @ b (k x n) + beta * out; ``shape`` is (m, n, k)."""
        flags = TRANSPOSE_A * transpose_a | TRANSPOSE_B * transpose_b
        return self.launch(Kernel.MATMUL, kind, out, a, b, *shape, flags, float(alpha), float(beta))

    def record(self, event: Event) -> int:
        """The event is done when everything queued so far is."""
        return self.context.command(Op.EVENT_RECORD, self.ident, event.ident)

    def wait(self, event: Event) -> int:
        """What is queued from now on begins when the event is done."""
        return self.context.command(Op.EVENT_AWAIT, self.ident, event.ident)

    def synchronize(self) -> None:
        """Wait until everything queued so far is done. Raises what went wrong."""
        self.context.request(Op.WAIT, self.ident)
        if self.ident == 0:
            self.context._keep.clear()

    @property
    def completed(self) -> int:
        """The number of the last command that is done, from the doorbell page: no message is needed."""
        return self.context.word(AT_FENCES + 8 * self.ident)

    def spin(self, number: int, timeout_s: float = 60.0) -> None:
        """Wait for a command by looking at the doorbell page again and again."""
        until = time.monotonic() + timeout_s
        while self.completed < number:
            if self.context.lost:
                raise DeviceLostError(errno.ENODEV, f"device {self.context.device} of the software accelerator is lost")
            if time.monotonic() > until:
                raise TimeoutError(f"command {number} of stream {self.ident} is not done after {timeout_s} s")

    def destroy(self) -> None:
        """Wait for it and give it back."""
        self.synchronize()
        self.context.request(Op.STREAM_DESTROY, self.ident)


class Event:
    """A moment in a stream."""

    def __init__(self, context: Context, ident: int) -> None:
        self.context = context
        self.ident = ident

    def query(self) -> bool:
        """Whether it is done."""
        return bool(self.context.request(Op.EVENT_QUERY, self.ident)[0])

    def synchronize(self) -> None:
        """Wait for it."""
        self.context.request(Op.EVENT_WAIT, self.ident)

    def destroy(self) -> None:
        """Give it back."""
        self.context.request(Op.EVENT_DESTROY, self.ident)


def _index(value: int | float | DeviceBuffer) -> int:
    return value.address if isinstance(value, DeviceBuffer) else int(value)


class Page:
    """The doorbell page, mapped here. Python's own mmap would keep a descriptor open, and that a dump would see."""

    def __init__(self, fd: int) -> None:
        base = _libc.mmap(None, PAGE_BYTES, mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_SHARED, fd, 0)
        if base is None or base == _MAP_FAILED:
            number = ctypes.get_errno()
            raise SoftaccelError(number, f"cannot map the doorbell page: {os.strerror(number)}")
        self._base: int | None = base
        self._words = (ctypes.c_uint64 * (PAGE_BYTES // 8)).from_address(base)
        _libc.madvise(base, PAGE_BYTES, mmap.MADV_DONTFORK)

    def get(self, offset: int) -> int:
        """A word."""
        if self._base is None:
            raise SoftaccelError(errno.EBADF, "the context is closed")
        return int(self._words[offset // 8])

    def set(self, offset: int, value: int) -> None:
        """Write a word."""
        if self._base is None:
            raise SoftaccelError(errno.EBADF, "the context is closed")
        self._words[offset // 8] = value

    def close(self) -> None:
        """Unmap it."""
        base, self._base = self._base, None
        if base is not None:
            _libc.munmap(base, PAGE_BYTES)


_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, *(ctypes.c_int,) * 3, ctypes.c_long)
_libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
_libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
_MAP_FAILED = ctypes.c_void_p(-1).value


def _map(fds: list[int]) -> Page:
    """The doorbell page; takes over the descriptor. A fork does not inherit the mapping."""
    if not fds:
        raise SoftaccelError(errno.EPROTO, "the server sent no doorbell page")
    try:
        page = Page(fds[0])
    finally:
        os.close(fds[0])
    if page.get(AT_MAGIC) != PAGE_MAGIC:
        page.close()
        raise SoftaccelError(errno.EPROTO, "the doorbell page is not one")
    return page


class _PyBuffer(ctypes.Structure):
    """Py_buffer, as far as it is looked at, with room for the rest."""

    _fields_ = (("buf", ctypes.c_void_p), ("rest", ctypes.c_byte * 256))


def _host_address(view: memoryview) -> int:
    """Where a buffer lies. Also of a read-only one, which ctypes' own from_buffer refuses."""
    buffer = _PyBuffer()
    ctypes.pythonapi.PyObject_GetBuffer(ctypes.py_object(view), ctypes.byref(buffer), 0)
    where = buffer.buf or 0
    ctypes.pythonapi.PyBuffer_Release(ctypes.byref(buffer))
    return where
