"""A host of the CUDA plugin that is a few lines long, and the hooks of a dump and a restore in their order."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import trio

from gpurestore.devplugins.api import HookContext, Stage
from gpurestore.devplugins.cuda import driver, nvml
from gpurestore.devplugins.cuda.plugin import CudaPlugin
from gpurestore.errors import NeedsPersonError
from support.fake_cuda import FakeCuda, FakeGpu, FakeNvml


def use_nvml(monkeypatch: pytest.MonkeyPatch, module: FakeNvml) -> None:
    """Let the plugin find ``module`` for NVML."""
    monkeypatch.setattr(nvml, "_pynvml", lambda: module)


@contextmanager
def driver_here(library: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, *gpus: FakeGpu) -> Iterator[FakeCuda]:
    """The fake driver for plugins of this process, with NVML that shows ``gpus``; whoever computes is ended."""
    folder.mkdir()
    monkeypatch.setenv("FAKE_CUDA_DIR", str(folder))
    use_nvml(monkeypatch, FakeNvml(*gpus))
    driver.load.cache_clear()
    machine = FakeCuda(library, folder)
    yield machine
    machine.end()
    driver.load.cache_clear()


class Host:
    """Makes plugins and their context. ``let_run`` keeps what was let run: (pid, tid)."""

    def __init__(self, fake: FakeCuda, images: Path, goes_on: bool = False) -> None:
        images.mkdir(exist_ok=True)
        self.fake, self.images, self.goes_on = fake, images, goes_on
        self.let_run: list[tuple[int, int]] = []
        self.fds: list[int] = []
        self.plugins: list[CudaPlugin] = []
        self.cancelled = False

    def __enter__(self) -> Host:
        return self

    def __exit__(self, *_: object) -> None:
        for plugin in self.plugins:
            with suppress(NeedsPersonError):
                plugin.exit(Stage.DUMP, 0)
        while self.fds:
            os.close(self.fds.pop())

    @asynccontextmanager
    async def running_thread(self, pid: int, tid: int) -> AsyncIterator[None]:
        self.let_run.append((pid, tid))
        yield

    def open_image(self, name: str) -> int:
        """As the host's: at dump it keeps the descriptor, at restore the plugin closes it."""
        if (self.images / name).exists():
            return os.open(self.images / name, os.O_RDONLY | os.O_CLOEXEC)
        self.fds.append(os.open(self.images / name, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
        return self.fds[-1]

    def plugin(self, stage: Stage, **options: str) -> CudaPlugin:
        plugin = CudaPlugin()
        given = {"library": str(self.fake.library), **{name.replace("_", "-"): v for name, v in options.items()}}
        plugin.init(
            HookContext(
                stage,
                self.images,
                self.open_image,
                options=given,
                running_thread=self.running_thread,
                is_cancelled=lambda: self.cancelled,
                tree_goes_on=self.goes_on,
            )
        )
        self.plugins.append(plugin)
        return plugin


async def dump(plugin: CudaPlugin, *pids: int, result: int = 0) -> None:
    """As the pipeline does it: every hook for all pids at once."""
    for hook in (plugin.pause_devices, plugin.checkpoint_devices):
        async with trio.open_nursery() as nursery:
            for pid in pids:
                nursery.start_soon(hook, pid)
    await plugin.dump_devices_late(pids[0])
    await plugin.dump_finish(result)


async def restore(plugin: CudaPlugin, *pids: int) -> None:
    await plugin.restore_init()
    await plugin.post_forking()
    async with trio.open_nursery() as nursery:
        for pid in pids:
            nursery.start_soon(plugin.resume_devices_late, pid)


def run(function: Callable[..., Any], *args: Any) -> Any:
    """Run, and let a group of one error be that error."""
    try:
        return trio.run(function, *args)
    except BaseExceptionGroup as group:
        (error,) = group.exceptions
        raise error from None
