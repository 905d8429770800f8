"""Custom storage (CUDA 13.4): the driver maps a process's device memory into ours, and we move the bytes.

A checkpoint, or a restore, is *begun* by a call that gives one region per GPU, each with a stream of that GPU's primary
context, which we must hold; it is ended by ``cuCheckpointOperationComplete``. In between the process is CHECKPOINTING
or RESTORING, and there is no way to abandon it: what was begun must be completed. Facts: NVIDIA's reference of the
driver interface 13.4, section "CUDA Checkpointing".

Bytes go through pinned buffers, a chunk at a time, by a few threads that each have a stream: one copies while another
reads or writes its file. Device addresses mean nothing to a processor. All calls block.
"""

from __future__ import annotations

import os
import queue
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Self

from gpurestore.devplugins.cuda.driver import CUSTOM_STORAGE_VERSION, Driver, ffi_of_driver, uuid_text
from gpurestore.errors import CancelledError, CudaError, ImageError

CHUNK_BYTES = 32 << 20
BUFFERS_BYTES = 512 << 20  # pinned, of all processes together
THREADS = 4  # more streams at once make copies into such mappings slower, users of this interface report
_PORTABLE, _NON_BLOCKING = 1, 1

# By cuGetProcAddress with the version: plain symbols are those of the oldest interface.
_SIGNATURES = {
    "cuDeviceGetCount": "int (*)(int *)",
    "cuDeviceGet": "int (*)(int *, int)",
    "cuDeviceGetUuid": "int (*)(CUuuid *, int)",
    "cuDevicePrimaryCtxRetain": "int (*)(void **, int)",
    "cuDevicePrimaryCtxRelease": "int (*)(int)",
    "cuCtxSetCurrent": "int (*)(void *)",
    "cuStreamGetCtx": "int (*)(void *, void **, void **)",
    "cuStreamCreate": "int (*)(void **, unsigned int)",
    "cuStreamDestroy": "int (*)(void *)",
    "cuStreamSynchronize": "int (*)(void *)",
    "cuMemHostAlloc": "int (*)(void **, size_t, unsigned int)",
    "cuMemFreeHost": "int (*)(void *)",
    "cuMemcpyDtoHAsync": "int (*)(void *, uint64_t, size_t, void *)",
    "cuMemcpyHtoDAsync": "int (*)(uint64_t, void *, size_t, void *)",
}


@dataclass(frozen=True, slots=True)
class Region:
    """The device memory of a process on one GPU, all of it, at an address of ours."""

    gpu: str
    address: int
    size: int
    context: Any


@dataclass(frozen=True, slots=True)
class Operation:
    """A checkpoint or a restore that was begun."""

    handle: Any
    regions: tuple[Region, ...]


@dataclass(frozen=True, slots=True)
class Chunk:
    """A part of a region, and of its file."""

    region: int
    offset: int
    size: int


@dataclass(slots=True)
class Store:
    """Where the bytes of one process are: in files, a descriptor per region, but for the chunks that are ``kept``."""

    fds: list[int] = field(default_factory=list)
    kept: dict[Chunk, bytes] = field(default_factory=dict)
    regions: tuple[tuple[str, int], ...] = ()  # GPU and bytes

    @classmethod
    def of(cls, operation: Operation) -> Store:
        """For what a checkpoint hands out, of which nothing is stored yet."""
        regions = tuple((region.gpu, region.size) for region in operation.regions)
        return cls([], dict.fromkeys(chunks_of([size for _, size in regions]), b""), regions)

    def close(self) -> None:
        """Close the descriptors, which are ours."""
        while self.fds:
            os.close(self.fds.pop())
        self.kept.clear()


class _Buffer:
    """Pinned host memory."""

    def __init__(self, storage: CustomStorage) -> None:
        out = storage.ffi.new("void **")
        storage.enter()
        storage.call("cuMemHostAlloc", out, CHUNK_BYTES, _PORTABLE)
        self.pointer = out[0]
        self.view = memoryview(storage.ffi.buffer(self.pointer, CHUNK_BYTES))
        self._storage = storage

    def free(self) -> None:
        """Give it back."""
        self.view.release()
        self._storage.enter()
        self._storage.call("cuMemFreeHost", self.pointer)


class CustomStorage:
    """Copies between devices and files, for one operation of ours on any number of processes."""

    def __init__(self, driver: Driver) -> None:
        self._driver = driver
        self.ffi = ffi_of_driver()
        self._calls: dict[str, Any] = {}
        self._gpus: dict[Any, str] = {}  # by the primary context
        self._devices: list[int] = []
        self._lock = threading.Lock()

    # ---- the driver

    def prepare(self) -> None:
        """cuInit and the primary contexts of all GPUs, without which the driver refuses. Takes seconds, once."""
        with self._lock:
            if self._gpus:
                return
            self._driver.init()
            for name, signature in _SIGNATURES.items():
                self._calls[name] = self.ffi.cast(signature, self._driver.address_of(name, CUSTOM_STORAGE_VERSION))
            count = self.ffi.new("int *")
            self.call("cuDeviceGetCount", count)
            for index in range(count[0]):
                self._retain(index)

    def _retain(self, index: int) -> None:
        device, context = self.ffi.new("int *"), self.ffi.new("void **")
        uuid = self.ffi.new("CUuuid *")
        self.call("cuDeviceGet", device, index)
        self.call("cuDeviceGetUuid", uuid, device[0])
        self.call("cuDevicePrimaryCtxRetain", context, device[0])
        self._devices.append(device[0])
        self._gpus[context[0]] = uuid_text(bytes(self.ffi.buffer(uuid)))

    def release(self) -> None:
        """Give the primary contexts back."""
        with self._lock:
            self._gpus.clear()
            while self._devices:
                self.call("cuDevicePrimaryCtxRelease", self._devices.pop())

    def enter(self) -> None:
        """Give this thread a context: pinned memory needs one, any will do."""
        context = next(iter(self._gpus), None)
        if context is None:
            raise CudaError("no GPU is visible here; in a container, pass the devices in")
        self.call("cuCtxSetCurrent", context)

    def call(self, name: str, *args: Any) -> None:
        """One of the plain calls. Raises CudaError."""
        self._driver.check(name, None, self._calls[name](*args))

    def begin_checkpoint(self, pid: int) -> Operation:
        """LOCKED to CHECKPOINTING."""
        self.prepare()
        return self._operation(pid, self._driver.begin_checkpoint(pid))

    def begin_restore(self, pid: int, pairs: Mapping[str, str]) -> Operation:
        """CHECKPOINTED to RESTORING, on other GPUs where ``pairs`` (old: new) says so."""
        self.prepare()
        return self._operation(pid, self._driver.begin_restore(pid, pairs))

    def complete(self, operation: Operation) -> None:
        """To CHECKPOINTED, or LOCKED. The mappings and the handle are gone afterwards, even if it fails."""
        self._driver.complete(operation.handle)

    def _operation(self, pid: int, info: Any) -> Operation:
        regions = []
        for index in range(info.deviceCount):
            item = info.perDeviceData[index]
            context, green = self.ffi.new("void **"), self.ffi.new("void **")
            self.call("cuStreamGetCtx", item.stream, context, green)
            gpu = self._gpus.get(context[0])
            if gpu is None:
                raise CudaError(f"pid {pid}: the driver mapped device memory in a context that is none of ours")
            regions.append(Region(gpu, int(item.devPtr), int(item.size), context[0]))
        return Operation(info.handle, tuple(regions))

    # ---- checkpoint

    def save(self, operation: Operation, store: Store, is_cancelled: Callable[[], bool]) -> None:
        """Device memory into the files of ``store``. If that fails the operation is still to be completed: see keep."""

        def write(chunk: Chunk, view: memoryview) -> None:
            if is_cancelled():
                raise CancelledError("cancelled while device memory was written")
            at, fd = chunk.offset, store.fds[chunk.region]
            while view:
                done = os.pwrite(fd, view, at)
                view, at = view[done:], at + done
            del store.kept[chunk]

        self._out(operation, list(store.kept), write)

    def keep(self, operation: Operation, store: Store) -> None:
        """Take what :meth:`save` did not write into host memory, so that the operation can be completed and undone."""

        def remember(chunk: Chunk, view: memoryview) -> None:
            store.kept[chunk] = bytes(view)

        self._out(operation, list(store.kept), remember)

    def _out(self, operation: Operation, chunks: Sequence[Chunk], take: Callable[[Chunk, memoryview], None]) -> None:
        waiting = queue.SimpleQueue[Chunk]()
        for chunk in chunks:
            waiting.put(chunk)
        failed = threading.Event()

        def work() -> None:
            buffer = _Buffer(self)
            try:
                while not failed.is_set():
                    chunk = waiting.get_nowait()
                    region = operation.regions[chunk.region]
                    self._copy(region, "cuMemcpyDtoHAsync", buffer.pointer, region.address + chunk.offset, chunk.size)
                    take(chunk, buffer.view[: chunk.size])
            except queue.Empty:
                pass
            except BaseException:
                failed.set()
                raise
            finally:
                buffer.free()

        _run_all([work] * min(THREADS, len(chunks)))

    def _copy(self, region: Region, name: str, to: Any, source: Any, size: int) -> None:
        """One copy on a stream of its own, which the driver would not wait for: we do."""
        self.call("cuCtxSetCurrent", region.context)
        stream = self.ffi.new("void **")
        self.call("cuStreamCreate", stream, _NON_BLOCKING)
        try:
            self.call(name, to, source, size, stream[0])
            self.call("cuStreamSynchronize", stream[0])
        finally:
            self.call("cuStreamDestroy", stream[0])

    # ---- restore

    def load(self, operation: Operation, inflow: Inflow, is_cancelled: Callable[[], bool]) -> None:
        """What ``inflow`` brings into device memory."""
        order = inflow.order(operation)

        def work() -> None:
            while (filled := inflow.next()) is not None:
                chunk, buffer = filled
                try:
                    if is_cancelled():
                        raise CancelledError("cancelled while device memory was filled")
                    region = operation.regions[order[chunk.region]]
                    self._copy(region, "cuMemcpyHtoDAsync", region.address + chunk.offset, buffer.pointer, chunk.size)
                except BaseException as error:
                    inflow.fail(error)
                    raise
                finally:
                    inflow.give(buffer)

        _run_all([work] * THREADS)


class Inflow:
    """The device memory of one process on its way from its files through pinned buffers.

    Reading begins at once and goes on until the buffers are full; from then on as fast as copies empty them.
    """

    def __init__(
        self,
        storage: CustomStorage,
        store: Store,
        regions: Sequence[tuple[str, int]],
        buffers_bytes: int = BUFFERS_BYTES,
    ) -> None:
        self._storage, self._store, self._regions = storage, store, regions
        self._chunks = iter(chunks_of([size for _, size in regions]))
        self._taking = threading.Lock()
        self._free = queue.SimpleQueue[_Buffer | None]()
        self._filled = queue.SimpleQueue[tuple[Chunk, _Buffer] | None]()
        self._error: BaseException | None = None
        nr_chunks = len(chunks_of([size for _, size in regions]))
        self._buffers = [_Buffer(storage) for _ in range(min(nr_chunks, max(2, buffers_bytes // CHUNK_BYTES)))]
        for buffer in self._buffers:
            self._free.put(buffer)
        self.read_bytes = 0
        self._readers = [threading.Thread(target=self._read, name="cuda image") for _ in range(min(2, nr_chunks))]
        self._left = len(self._readers)
        for reader in self._readers:
            reader.start()
        if not self._readers:
            self._filled.put(None)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def order(self, operation: Operation) -> list[int]:
        """Which of the driver's regions each of ours belongs into. Raises ImageError where they do not fit."""
        there = {region.gpu: index for index, region in enumerate(operation.regions)}
        wanted = [(gpu, size) for gpu, size in self._regions]
        if sorted(wanted) != sorted((region.gpu, region.size) for region in operation.regions):
            sizes = ", ".join(f"{region.size} bytes on {region.gpu}" for region in operation.regions)
            raise ImageError(f"the images do not hold the device memory that the driver wants: {sizes or 'none'}")
        return [there[gpu] for gpu, _ in wanted]

    def next(self) -> tuple[Chunk, _Buffer] | None:
        """The next chunk in its buffer; None at the end. Raises what reading raised."""
        item = self._filled.get()
        if item is None:
            self._filled.put(None)  # for the others
            if self._error is not None:
                raise self._error
        return item

    def give(self, buffer: _Buffer) -> None:
        """A buffer may be filled again."""
        self._free.put(buffer)

    def fail(self, error: BaseException) -> None:
        """Let all threads end."""
        self._error = self._error or error
        self._filled.put(None)
        self._free.put(None)

    def close(self) -> None:
        """End reading and free the buffers; nothing may copy any more."""
        if self._left:
            self.fail(CancelledError("device memory is not wanted any more"))
        for reader in self._readers:
            reader.join()
        while self._buffers:
            self._buffers.pop().free()

    def _read(self) -> None:
        try:
            while (buffer := self._free.get()) is not None:
                with self._taking:
                    chunk = next(self._chunks, None)
                if chunk is None:
                    break
                self._fill(chunk, buffer.view[: chunk.size])
                self._filled.put((chunk, buffer))
            self._free.put(None)  # for the other one
        except BaseException as error:
            self.fail(error)
        with self._taking:
            self._left -= 1
            if self._left == 0:
                self._filled.put(None)

    def _fill(self, chunk: Chunk, view: memoryview) -> None:
        if (kept := self._store.kept.get(chunk)) is not None:
            view[:] = kept
            return
        at = chunk.offset
        while view:
            done = os.preadv(self._store.fds[chunk.region], [view], at)
            if done == 0:
                raise ImageError(f"the image of device memory {chunk.region} ends at byte {at}")
            view, at = view[done:], at + done
        with self._taking:
            self.read_bytes += chunk.size


def chunks_of(sizes: Sequence[int]) -> list[Chunk]:
    """Regions cut into chunks."""
    return [
        Chunk(index, offset, min(CHUNK_BYTES, size - offset))
        for index, size in enumerate(sizes)
        for offset in range(0, size, CHUNK_BYTES)
    ]


def _run_all(calls: Sequence[Callable[[], None]]) -> None:
    """All at once; all run to their end, then the first failure is raised."""
    if not calls:
        return
    with ThreadPoolExecutor(len(calls), "cuda copy") as pool:
        futures = [pool.submit(call) for call in calls]
    for future in futures:
        future.result()
