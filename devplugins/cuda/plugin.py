"""The CUDA plugin: lock, checkpoint, restore and unlock through the driver, at the moments that the hooks give.

What was done to a task is never remembered but asked of the driver: whatever failed half-way, giving back starts from
the state that the process is really in.
"""

from __future__ import annotations

import logging
import os
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any, ClassVar, TypeVar

import trio

from gpurestore.devplugins.api import Capability, Declined, DevicePlugin, HookContext, Stage
from gpurestore.devplugins.cuda import IMAGE, gpumap, image, nvml, probe, recognize
from gpurestore.devplugins.cuda.custom import Custom, require
from gpurestore.devplugins.cuda.driver import NOT_READY, Driver, ProcessState, default_library, load
from gpurestore.devplugins.cuda.gpumap import Placement
from gpurestore.devplugins.cuda.guard import Guard, give_back
from gpurestore.devplugins.cuda.image import State, Task
from gpurestore.devplugins.cuda.options import Options
from gpurestore.devplugins.cuda.recognize import Traces
from gpurestore.errors import (
    CudaError,
    Finding,
    GpurestoreError,
    ImageError,
    NeedsPersonError,
    RestoreCheckError,
    UsageError,
)

log = logging.getLogger("gpurestore.cuda")

T = TypeVar("T")
# Locks may wait for one another (NCCL): none may wait for a thread.
_MAX_THREADS = 4096


class CudaPlugin(DevicePlugin):
    """One dump or one restore."""

    name: ClassVar[str] = "cuda"
    needs: ClassVar[Capability] = Capability.RUN_THREAD | Capability.CLEANUP_EXIT
    stages: ClassVar[frozenset[Stage]] = frozenset({Stage.DUMP, Stage.RESTORE})

    def __init__(self) -> None:
        self.used = False
        self._context: HookContext
        self._options: Options
        self._tasks: dict[int, Task] = {}
        self._inventory: nvml.Inventory | None = None
        self._loading = trio.Lock()
        self._threads: trio.CapacityLimiter | None = None
        self._driver: Driver | None = None
        self._given_back = False
        self._guard: Guard | None = None
        self._state: State | None = None
        self._pairs: dict[str, str] = {}
        self._strangers: dict[int, str] = {}
        self.custom: Custom | None = None  # None: the driver's staging

    # ---- the stage

    def init(self, context: HookContext) -> None:
        """Sit out where there is no such device (dump), or nothing of ours in the images (restore)."""
        self._context, self._options = context, Options.read(context.options)
        if context.stage is Stage.RESTORE:
            if not (context.images_dir / IMAGE).exists():
                if self._options.gpu_map:
                    raise UsageError("--gpu-map: the images hold nothing of CUDA")
                raise Declined("the images hold nothing of CUDA")
            self._state = image.decode(_read_image(context))
        elif not probe() and self._options.library == default_library():
            raise Declined("no NVIDIA device here")

    def exit(self, stage: Stage, result: int) -> None:
        """Give back what a failed dump took, where no DUMP_FINISH did."""
        try:
            if stage is Stage.DUMP and not self._given_back and (result != 0 or self._context.tree_goes_on):
                failures = [str(failure) for task in self._tasks.values() if (failure := self._give_back_late(task))]
                if failures:
                    raise NeedsPersonError("; ".join(failures))
        finally:
            if self._guard is not None:
                self._guard.dismiss()
                self._guard = None
            if self.custom is not None:
                self.custom.close()
                self.custom = None

    # ---- dump

    async def pause_devices(self, pid: int) -> None:
        """Lock a process that uses CUDA, unless somebody has locked or checkpointed it already."""
        traces = await self._in_thread(recognize.traces, pid)
        if not traces:
            return
        driver = await self._get_driver()
        driver.require_checkpoint()
        try:
            thread = await self._in_thread(driver.restore_thread, pid)
            state = await self._in_thread(driver.state, pid)
        except CudaError as error:
            # Mapped but never initialised, or a fork of a process that uses CUDA: devices that such a process
            # still holds are refused when its descriptors are looked at.
            log.info("pid %d does not use CUDA itself (%s)", pid, error)
            if traces.devices:
                self._strangers[pid] = str(error)
            return
        await self._take_inventory()
        self._refuse(pid, state)
        await self._choose_storage(driver)
        self._tasks[pid] = task = Task(pid, state, thread, self._gpus_of(pid, traces))
        if state is not ProcessState.CHECKPOINTED:
            await self._watch(task)
        if state is not ProcessState.RUNNING:
            log.info("pid %d: CUDA was %s before this dump and will be left so", pid, state.name.lower())
            return
        try:
            await self._in_thread(driver.lock, pid, self._options.lock_timeout_ms)
        except CudaError as error:
            raise self._no_lock(task, error) from error
        log.info("pid %d: CUDA locked", pid)

    async def _choose_storage(self, driver: Driver) -> None:
        """Custom storage where it is asked for. Made ready before anything is frozen."""
        wanted = self._options.storage
        if wanted == "custom":
            require(driver, "which cuda.storage=custom asks for")
        async with self._loading:
            if self.custom is None and wanted != "driver" and driver.can_use_custom_storage:
                self.custom = Custom(driver, self._context)
                await self._in_thread(self.custom.prepare)

    async def _watch(self, task: Task) -> None:
        async with self._loading:
            if self._guard is None:
                self._guard = await self._in_thread(Guard, self._options.library)
        self._guard.watch(task.pid, task.thread, task.state, custom=self.custom is not None)

    def _no_lock(self, task: Task, error: CudaError) -> CudaError:
        if error.code != NOT_READY:
            return error
        seconds = self._options.lock_timeout_ms / 1000
        return CudaError(
            f"pid {task.pid}: its CUDA work did not come to rest within {seconds:g} s; give it longer with"
            f" --plugin-option cuda.lock-timeout=SECONDS, or dump it at a quieter moment",
            error.code,
        )

    def _refuse(self, pid: int, state: ProcessState) -> None:
        """What the driver cannot carry, as far as it can be known before anything is touched."""
        if state not in (ProcessState.RUNNING, ProcessState.LOCKED, ProcessState.CHECKPOINTED):
            raise CudaError(f"pid {pid}: CUDA is in state {state.name.lower()}: it cannot be dumped like this")
        for use in self._inventory.uses.get(pid, ()) if self._inventory else ():
            if use.mig:
                raise CudaError(
                    f"pid {pid} computes on a MIG instance of {use.uuid}: the driver cannot checkpoint those"
                )
            if use.mps:
                raise CudaError(f"pid {pid} is a client of MPS on {use.uuid}: the driver cannot checkpoint those")

    def _gpus_of(self, pid: int, traces: Traces) -> dict[str, int | None]:
        """GPUs whose files the process has open, and those on which NVML sees it."""
        if self._inventory is None:
            return {}
        used: dict[str, int | None] = {
            gpu.uuid: 0 for gpu in self._inventory.gpus if gpu.minor is not None and gpu.minor in traces.minors
        }
        used.update((use.uuid, use.memory_bytes) for use in self._inventory.uses.get(pid, ()))
        return used

    async def checkpoint_devices(self, pid: int) -> None:
        """Device content into host memory of the process, by its own restore thread; all other threads stay frozen."""
        task = self._tasks.get(pid)
        if task is None:
            return
        self.used = True
        if task.state is ProcessState.CHECKPOINTED:
            return
        driver = await self._get_driver()
        if self.custom is not None:
            # Host memory is read afterwards: the driver works in it until the end.
            async with self._running(pid, task.thread), self._span(task) as span:
                self._tasks[pid] = task = await self._in_thread(self.custom.save, task)
                span(task)
            log.info("pid %d: CUDA checkpointed; content went into images by custom storage", pid)
            return
        async with self._running(pid, task.thread):
            await self._in_thread(driver.checkpoint, pid)
        log.info("pid %d: CUDA checkpointed; content staged by the driver in the process's host memory", pid)

    def dump_ext_file(self, fd: int, ident: int) -> None:
        """Refuse, in words, device files that are still open although all devices were released."""
        self._refuse_left_over(fd, "file")

    def handle_device_vma(self, fd: int, stat: os.stat_result) -> None:
        """Refuse, in words, device mappings that are left over."""
        self._refuse_left_over(fd, "mapping")

    def _refuse_left_over(self, fd: int, what: str) -> None:
        path = recognize.device_path(fd)
        if path is None:
            raise Declined("not NVIDIA's")
        if not self._tasks:
            why = "no task of the tree is one that the driver can checkpoint"
        elif "uvm" in path:
            why = "managed (unified) memory and CUDA IPC leave this behind: allocate without cudaMallocManaged"
        else:
            why = "another process's devices were inherited by fork: start such workers before CUDA, or by 'spawn'"
        strangers = f" (the driver said: {'; '.join(self._strangers.values())})" if self._strangers else ""
        raise CudaError(f"{what} {path} is still there after the driver released the devices: {why}{strangers}")

    async def dump_devices_late(self, pid: int) -> None:
        """Write our image."""
        if not self._tasks:
            return
        await self._in_thread(self._write_image)

    def _write_image(self) -> None:
        inventory, driver = self._inventory, self._driver
        assert driver is not None
        state = State(
            storage=image.CUSTOM if self.custom is not None else image.STAGING,
            driver=driver.branch,
            cuda_version=driver.cuda_version,
            gpus=inventory.gpus if inventory else (),
            topology=inventory.topology if inventory else (),
            tasks=self._tasks,
        )
        data = image.encode(state)
        image.decode(data)  # what NVML or the driver told must not make images that nobody can read
        fd, view = self._context.open_image(IMAGE), memoryview(data)
        while view:
            view = view[os.write(fd, view) :]

    async def dump_finish(self, result: int) -> None:
        """Back to what every process was found in, unless the tree is to die."""
        if not self._tasks or (result == 0 and not self._context.tree_goes_on):
            return
        failures: list[str] = []

        async def give_back(task: Task) -> None:
            try:
                await self._give_back_frozen(task)
            except (GpurestoreError, OSError) as error:
                if recognize.exists(task.pid):
                    failures.append(_stuck(task, error))

        with trio.CancelScope(shield=True):
            async with trio.open_nursery() as nursery:
                for task in self._tasks.values():
                    nursery.start_soon(give_back, task)
        self._given_back = True
        if failures:
            raise NeedsPersonError("; ".join(sorted(failures)))

    async def _give_back_frozen(self, task: Task) -> None:
        # A dump that fails early may not have frozen anything.
        if not recognize.thread_is_stopped(task.pid, task.thread):
            await self._in_thread(self._give_back, task)
            return
        async with self._running(task.pid, task.thread):
            await self._in_thread(self._give_back, task)

    def _give_back(self, task: Task) -> None:
        assert self._driver is not None
        custom = self.custom is not None and self.custom.has(task.pid)
        give_back(self._driver, task.pid, task.state, self.custom.undo if self.custom and custom else None)

    def _give_back_late(self, task: Task) -> str | None:
        """The same from exit, where nobody can let a thread run any more; None, or what went wrong."""
        if not recognize.exists(task.pid):
            return None
        if recognize.thread_is_stopped(task.pid, task.thread):
            return _stuck(task, CudaError("the driver's thread in it is stopped"))
        try:
            self._give_back(task)
        except CudaError as error:
            return _stuck(task, error) if recognize.exists(task.pid) else None
        return None

    # ---- restore

    async def restore_init(self) -> None:
        """Compare what is wanted with what is there, and refuse before anything is created."""
        state = self._get_state()
        try:
            driver = await self._get_driver()
            driver.require_checkpoint()
            if state.storage == image.CUSTOM:
                require(driver, "where the dump put device content")
        except CudaError as error:
            raise RestoreCheckError(
                "these images cannot be restored here, nothing was created",
                [
                    Finding(
                        "GPU",
                        f"the dump used {len(state.used_gpus()) or 'some'} of {state.driver or 'NVIDIA'}",
                        str(error),
                    )
                ],
            ) from error
        if driver.cuda_version < state.cuda_version:
            log.warning("dumped with driver %s, restored with the older %s", state.driver, driver.branch)
        await self._take_inventory()
        placement = self._place(state, driver)
        if placement is None:
            return
        log.info("GPUs wanted and there:\n%s", placement.table())
        if placement.findings:
            log.error("GPUs wanted and there:\n%s", placement.table())
            raise RestoreCheckError("these images cannot be restored here, nothing was created", placement.findings)
        self._pairs = placement.pairs

    def _place(self, state: State, driver: Driver) -> Placement | None:
        named = self._options.gpu_map
        if not state.gpus or self._inventory is None:
            if named and all(gpumap.is_uuid(uuid) for pair in named.items() for uuid in pair):
                self._pairs = dict(named)  # the driver itself checks what it is given
            elif named:
                raise UsageError("--gpu-map: without NVML on both sides only whole UUIDs (GPU-...) can be used")
            log.warning(
                "GPUs were not compared: NVML did not tell about them at %s", "dump" if not state.gpus else "restore"
            )
            return None
        here = self._inventory.gpus
        explicit = {
            gpumap.resolve(old, state.gpus, "at dump"): gpumap.resolve(new, here, "here") for old, new in named.items()
        }
        placement = gpumap.place(state.used_gpus(), here, state.needed_bytes(), explicit, can_map=driver.can_map_gpus)
        self._warn_topology(state, placement)
        return placement

    def _warn_topology(self, state: State, placement: Placement) -> None:
        """Other connections between the GPUs do no harm, but may cost speed."""
        assert self._inventory is not None
        indices = {gpu.uuid: gpu.index for gpu in self._inventory.gpus}
        kinds = {frozenset((link.first, link.second)): link.kind for link in self._inventory.topology}
        moved = {row.old.index: indices[row.new.uuid] for row in placement.rows if row.new is not None}
        for link in state.topology:
            if link.first in moved and link.second in moved:
                now = kinds.get(frozenset((moved[link.first], moved[link.second])))
                if now is not None and now != link.kind:
                    log.warning(
                        "GPUs %d and %d were connected by: %s; now: %s", link.first, link.second, link.kind, now
                    )

    async def post_forking(self) -> None:
        """Attach to the driver, which can take seconds, while tasks get their memory."""
        driver = await self._get_driver()
        await self._in_thread(driver.init)
        if self._get_state().storage == image.STAGING:
            log.info("content comes from the driver's staging in the processes' host memory")
            return
        self.custom = Custom(driver, self._context)
        await self._in_thread(self.custom.begin, list(self._get_state().tasks.values()), self._pairs_of)
        log.info("content comes from images by custom storage, through pinned buffers that are being filled by now")

    async def resume_devices_late(self, pid: int) -> None:
        """Devices and their content back, and the process into the state in which the dump found it."""
        task = self._get_state().tasks.get(pid)
        if task is None:
            return
        if task.state is ProcessState.CHECKPOINTED:
            log.info("pid %d: CUDA was checkpointed when it was dumped and is left so", pid)
            return
        driver = await self._get_driver()
        await self._in_thread(driver.init)
        thread = await self._in_thread(driver.restore_thread, pid)
        if thread != task.thread:
            log.warning("pid %d: the driver's thread is %d, and was %d", pid, thread, task.thread)
        if self._context.running_thread is None and recognize.thread_is_stopped(pid, thread):
            raise CudaError(f"pid {pid}: this host cannot let the driver's thread {thread} run, which does the restore")
        async with self._running(pid, thread):
            await self._bring_back(driver, task)
            if task.state is ProcessState.RUNNING:
                await self._in_thread(driver.unlock, pid)
            state = await self._in_thread(driver.state, pid)
        if state is not task.state:
            raise CudaError(f"pid {pid}: CUDA is {state.name.lower()} after its restore, not {task.state.name.lower()}")
        log.info("pid %d: CUDA is %s again", pid, state.name.lower())

    async def _bring_back(self, driver: Driver, task: Task) -> None:
        if self.custom is None:
            await self._in_thread(driver.restore, task.pid, self._pairs_of(task))
            return
        async with self._span(task) as span:
            await self._in_thread(self.custom.load, task, self._pairs_of(task))
            span(task)

    def _pairs_of(self, task: Task) -> dict[str, str]:
        """The pairs for the GPUs that this process had: all of them, or none where none moved."""
        return {old: new for old, new in self._pairs.items() if not task.gpus or old in task.gpus}

    # ---- below

    def _get_state(self) -> State:
        assert self._state is not None
        return self._state

    async def _get_driver(self) -> Driver:
        async with self._loading:
            if self._driver is None:
                self._driver = await self._in_thread(load, self._options.library)
                log.info("%s", self._driver.name)
            return self._driver

    async def _take_inventory(self) -> None:
        """Ask NVML, once. A dump goes on without it; so does a restore, which then leaves checks to the driver."""
        async with self._loading:
            if self._inventory is not None or not self._options.nvml:
                return
            try:
                self._inventory = await self._in_thread(nvml.read)
            except CudaError as error:
                self._options.nvml = False
                log.warning("GPUs are not recorded or compared: %s", error)

    @asynccontextmanager
    async def _span(self, task: Task) -> AsyncIterator[Callable[[Task], None]]:
        """Show device memory on its way, and in the end how much it was."""
        if self._context.span is None:
            yield lambda _: None
            return
        async with self._context.span("device memory", track=f"plugin {self.name}", pid=task.pid) as span:
            yield lambda moved: span.set(bytes=sum(size for _, size in moved.regions))

    async def _in_thread(self, function: Callable[..., T], *args: Any) -> T:
        """A call that blocks. Never abandoned: the driver must not be left in the middle of one."""
        if self._threads is None:
            self._threads = trio.CapacityLimiter(_MAX_THREADS)
        return await trio.to_thread.run_sync(function, *args, limiter=self._threads)

    @asynccontextmanager
    async def _running(self, pid: int, tid: int) -> AsyncIterator[None]:
        """Let the driver's thread run, where the host can."""
        let_run = self._context.running_thread
        if let_run is None:
            yield
            return
        async with let_run(pid, tid):
            yield


def _stuck(task: Task, error: BaseException) -> str:
    return (
        f"CUDA of pid {task.pid} could not be given back ({error}): its next CUDA call will hang; try"
        f" cuda-checkpoint --action restore and --action unlock with --pid {task.pid}, or end it"
    )


def _read_image(context: HookContext) -> bytes:
    try:
        with open(context.open_image(IMAGE), "rb") as file:
            return file.read(image.MAX_BYTES + 1)
    except OSError as error:
        raise ImageError(f"{IMAGE} cannot be read: {error.strerror}") from error
