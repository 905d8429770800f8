"""The device plugins of one operation, as the pipelines see them: moments instead of hooks.

Every moment ends in a hook of the plugins (devplugins/api.py). Without plugins all of this does nothing.
"""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import trio

from gpurestore import core
from gpurestore.devplugins.api import Hook, HookContext, RetryLater, Stage, VmaUpdate
from gpurestore.devplugins.host import PluginHost, UsedPlugin, result_of
from gpurestore.errors import GpurestoreError
from gpurestore.images.folder import ImageFolder
from gpurestore.pipeline.blocking import Blocking
from gpurestore.pipeline.graph import Node, PluginFacts
from gpurestore.pipeline.trace import Span, Trace
from gpurestore.pipeline.walk import Walk
from gpurestore.tasks.external import Claim, Redirect, RetryFile

if TYPE_CHECKING:
    from gpurestore.images.writer import ImageWriter

log = logging.getLogger("gpurestore.plugin")


class PluginSettings(NamedTuple):
    """What the user says about plugins: a folder of them, PLUGIN.NAME[=VALUE] options, a limit for every hook."""

    libdir: Path | None = None
    options: Sequence[str] = ()
    hook_timeout_s: float | None = None


def _running_thread(
    blocking: Blocking, tracers: Sequence[core.Tracer]
) -> Callable[[int, int], AbstractAsyncContextManager[None]]:
    """HookContext.running_thread, by the tracer that is there when it is called."""

    @asynccontextmanager
    async def running_thread(_pid: int, tid: int) -> AsyncIterator[None]:
        tracer = tracers[0]
        await blocking.run(tracer.let_run, tid)
        try:
            yield
        finally:
            with trio.CancelScope(shield=True):
                await blocking.run(tracer.hold, tid)

    return running_thread


def _no_span(*_: object, **__: object) -> AbstractAsyncContextManager[None]:
    """The stage has its span already."""
    return nullcontext()


class _Cancelled:
    """Whether hooks are to end early. Those that undo are not, however the operation ended."""

    def __init__(self, cancel: core.Cancel) -> None:
        self._cancel = cancel
        self.is_undoing = False

    def __call__(self) -> bool:
        return self._cancel.is_set and not self.is_undoing


class Devices:
    """The plugins of a dump or a restore, loaded for its duration by :meth:`session`."""

    def __init__(
        self,
        stage: Stage,
        settings: PluginSettings,
        spans: Trace,
        blocking: Blocking,
        images: ImageWriter | ImageFolder,
        *,
        jobs: int,
        tree_goes_on: bool = False,
    ) -> None:
        """Their images lie beside ours: at dump they write them there, at restore they read what they wrote."""
        self._host = PluginHost(settings.libdir, settings.options, settings.hook_timeout_s)
        self._spans = spans
        self._is_cancelled = _Cancelled(blocking.cancel)
        self._tracers: list[core.Tracer] = []
        self._context = HookContext(
            stage=stage,
            images_dir=images.path,
            images_dir_fd=images.dir_fd,
            open_image=images.open_raw,
            running_thread=_running_thread(blocking, self._tracers),
            span=spans.span,
            is_cancelled=self._is_cancelled,
            tree_goes_on=tree_goes_on,
            jobs=jobs,
        )

    def use_tracer(self, tracer: core.Tracer) -> None:
        """Whoever holds the tasks. A restore has it only after the plugins were loaded."""
        self._tracers[:] = [tracer]

    @asynccontextmanager
    async def session(
        self, needed: Sequence[str] | None = None, stage: AbstractAsyncContextManager[Any] | None = None
    ) -> AsyncIterator[Devices]:
        """Load and initialise, as ``stage``; whatever happens inside, every plugin's exit gets the true result.

        ``needed`` are the plugins that the images name: one that is not there is an error. None: a dump, all take part.
        """
        async with stage or self._spans.span("plugins"):
            await self._host.start(self._context, needed)
        result = -errno.EIO
        try:
            yield self
            result = 0
        except BaseException as error:
            result = result_of(error)
            raise
        finally:
            with trio.CancelScope(shield=True):
                await self._host.stop(result)

    @property
    def inventory_names(self) -> list[str]:
        """Names of the plugins that the images depend on."""
        return self._host.inventory_names

    @property
    def used(self) -> list[UsedPlugin]:
        """The same with versions, for the manifest."""
        return self._host.used

    async def _for_each(self, hook: Hook, pids: Iterable[int]) -> None:
        """One hook for many tasks at once; all run to their end, then the first failure is raised."""
        if not self._host.plugins_with(hook):
            return
        failures: dict[int, GpurestoreError] = {}

        async def one(pid: int) -> None:
            try:
                await self._host.run_all(hook, pid)
            except GpurestoreError as error:
                failures[pid] = error

        async with trio.open_nursery() as nursery:
            for pid in pids:
                nursery.start_soon(one, pid)
        if failures:
            raise failures[min(failures)]

    # ---- dump

    async def pause(self, pids: Iterable[int]) -> None:
        """Tasks that still run stop giving work to their devices."""
        await self._for_each(Hook.PAUSE_DEVICES, pids)

    async def checkpoint(self, pids: Iterable[int]) -> None:
        """The tree is frozen, its memory not read yet."""
        await self._for_each(Hook.CHECKPOINT_DEVICES, pids)

    async def dump_late(self, root_pid: int) -> None:
        """Everything is written, the tree still frozen."""
        await self._host.run_all(Hook.DUMP_DEVICES_LATE, root_pid)

    async def dump_finish(self, result: int) -> None:
        """Before the tree goes on or dies."""
        self._is_cancelled.is_undoing = True
        await self._host.run_all(Hook.DUMP_FINISH, result)

    def claim_file(self, fd: int, ident: int, *, is_unix_socket: bool) -> Claim | None:
        """tasks.external.Claims; called in worker threads."""
        if is_unix_socket and self._host.claim_sync(Hook.DUMP_UNIX_SK, fd, ident) is not None:
            return Claim.UNIX_SOCKET
        return Claim.FILE if self._host.claim_sync(Hook.DUMP_EXT_FILE, fd, ident) is not None else None

    def claim_mapping(self, fd: int, found: os.stat_result) -> bool:
        """tasks.external.Claims."""
        return self._host.claim_sync(Hook.HANDLE_DEVICE_VMA, fd, found) is not None

    # ---- restore

    @property
    def facts(self) -> list[PluginFacts]:
        """The plugins that take part, for the graph."""
        return [PluginFacts(plugin.name, plugin.hooks) for plugin in self._host.plugins]

    async def act(self, node: Node, _: Span | None = None) -> None:
        """The stage of one plugin: a hook, for one task or for all."""
        plugin = next(plugin for plugin in self._host.plugins if plugin.name == node.plugin)
        args = () if node.pid is None else (node.pid,)
        await self._host.run_one(plugin, Hook[node.name], *args, span=_no_span)

    async def restore_init(self, walk: Walk) -> None:
        """All plugins are loaded, nothing was created. All run to their end, then the first failure is raised."""
        nodes = [node for node in walk.graph.nodes if node.name == Hook.RESTORE_INIT.name]
        failures: dict[Node, GpurestoreError] = {}

        async def act(node: Node, _: Span) -> None:
            try:
                await self.act(node)
            except GpurestoreError as error:
                failures[node] = error

        await walk.run(nodes, act)
        raised = [failures[node] for node in nodes if node in failures]
        for error in raised[1:]:
            log.error("%s", error)
        if raised:
            raise raised[0]

    def open_file(self, ident: int, claim: Claim) -> int:
        """tasks.external.Openers; called in a worker thread."""
        hook = Hook.RESTORE_UNIX_SK if claim is Claim.UNIX_SOCKET else Hook.RESTORE_EXT_FILE
        try:
            answer = self._host.claim_sync(hook, ident)
        except RetryLater as later:
            raise RetryFile from later
        if answer is None:
            raise GpurestoreError(f"file {ident} was claimed by a device plugin at dump, and none gives it back")
        return int(answer.value)

    def redirect_mapping(self, path: str, address: int, pgoff: int) -> Redirect | None:
        """tasks.external.Openers."""
        answer = self._host.claim_sync(Hook.UPDATE_VMA_MAP, path, address, pgoff)
        if answer is None or answer.value is None:
            return None
        update: VmaUpdate = answer.value
        return Redirect(update.pgoff, update.fd)
