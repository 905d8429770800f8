"""The host of all plugins of one operation: start, hooks, stop.

Device and global hooks go to every plugin that has them, different plugins at the same time; claiming hooks stop at the
first plugin that does not decline. ``exit`` is called once for everything that was initialised, whatever happens.
"""

from __future__ import annotations

import errno
import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, AsyncExitStack, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import trio

from gpurestore.devplugins.api import CLAIMING, HOST_CAPABILITIES, Capability, Declined, Hook, HookContext, Stage
from gpurestore.devplugins.discover import Found, find
from gpurestore.errors import (
    CancelledError,
    CoreError,
    HookError,
    PluginInitError,
    PluginLoadError,
    PluginUnloadError,
)

if TYPE_CHECKING:
    from gpurestore.devplugins.cplugin import CHost
    from gpurestore.devplugins.loaded import LoadedPlugin

log = logging.getLogger("gpurestore.plugin")

PAUSE_TIMEOUT_S = 60.0
# How long exit waits for a hook that was given up, because it was cancelled or because it ran out of time.
CANCELLED_GRACE_S = 10.0
HUNG_GRACE_S = 1.0


class ClaimResult(NamedTuple):
    """Who claimed a resource, and the hook's value."""

    plugin: str
    value: Any


class UsedPlugin(NamedTuple):
    """A plugin that the images need."""

    name: str
    version: str


def result_of(error: BaseException | None) -> int:
    """What ``exit`` is told: 0, or a negative errno."""
    if error is None:
        return 0
    if isinstance(error, BaseExceptionGroup):
        return result_of(error.exceptions[0])
    if isinstance(error, CoreError | OSError) and error.errno:
        return -error.errno
    if isinstance(error, CancelledError | trio.Cancelled | KeyboardInterrupt):
        return -errno.ECANCELED
    return -errno.EIO


class PluginHost:
    """Plugins of one operation. Start it, run hooks, and always stop it."""

    def __init__(
        self,
        libdir: Path | None = None,
        options: Sequence[str] = (),
        hook_timeout_s: float | None = None,
        log: logging.Logger = log,
        offered: Capability = HOST_CAPABILITIES,
    ) -> None:
        self._libdir, self._options, self._hook_timeout_s = libdir, options, hook_timeout_s
        self._log, self._offered = log, offered
        self._plugins: list[LoadedPlugin] = []
        self._idle: dict[str, str] = {}
        self._c_host: CHost | None = None
        self._context: HookContext | None = None

    # ---- start

    async def start(self, context: HookContext, needed: Sequence[str] | None = None) -> None:
        """Find, load, negotiate and initialise. Raises a PluginError, and then nothing is left loaded.

        ``needed`` are the names in the inventory of images to be restored; :meth:`require` is then called, too.
        """
        self._context = context
        found = find(self._libdir, packages=needed is None or bool(needed or self._options))
        if not found and not self._options and not needed:
            return
        try:
            await self._load(found, context, needed)
            await self._init(context)
            if needed:
                self.require(needed)
        except BaseException as error:
            with trio.CancelScope(shield=True):
                await self.stop(result_of(error))
            raise

    async def _load(self, found: list[Found], context: HookContext, needed: Sequence[str] | None) -> None:
        from gpurestore.devplugins.load import has_c, load_all
        from gpurestore.devplugins.options import sort_options

        if has_c(found):
            from gpurestore.devplugins.cplugin import CHost

            self._c_host = CHost()
            self._c_host.begin(context.images_dir_fd)
            self._c_host.set_needs(needed)
        loaded = await trio.to_thread.run_sync(load_all, found, self._offered, needed)
        self._plugins, self._idle = loaded.plugins, loaded.idle
        options = sort_options(self._options, loaded.names)
        if self._c_host is not None:
            self._c_host.set_options(options)
        self._plugin_options: Mapping[str, Mapping[str, str | None]] = options

    async def _init(self, context: HookContext) -> None:
        for plugin in list(self._plugins):
            if context.stage not in plugin.stages:
                self._idle[plugin.name] = f"it does not take part in {context.stage.name}"
                continue
            own = replace(context, options=self._plugin_options.get(plugin.name, {}))
            try:
                with self._span("init", plugin):
                    await self._call_init(plugin, own)
            except Declined as reason:
                self._idle[plugin.name] = str(reason) or "it sits this stage out"
                self._log.info("plugin %s sits out: %s", plugin.name, self._idle[plugin.name])

    async def _call_init(self, plugin: LoadedPlugin, context: HookContext) -> None:
        from gpurestore.devplugins.calls import in_thread

        def run() -> None:
            plugin.call_init(context)
            plugin.initialised = True  # even if nobody waits any more: exit is called then, too

        try:
            with trio.move_on_after(self._timeout(None)):
                if plugin.is_async("init"):
                    await plugin.call_init(context)
                    plugin.initialised = True
                else:
                    await in_thread(plugin, run, context.is_cancelled)
                return
        except (Declined, PluginLoadError, CancelledError):
            raise
        except Exception as error:
            self._log.error("plugin %s: init failed", plugin.name, exc_info=error)
            raise PluginInitError(plugin.name, f"its init failed: {type(error).__name__}: {error}") from error
        raise PluginInitError(plugin.name, f"its init did not come back within {self._hook_timeout_s:g} s")

    def require(self, names: Sequence[str]) -> None:
        """Raise PluginMissingError unless every plugin of ``names`` is there and takes part."""
        there = {name for plugin in self.plugins for name in (plugin.name, *plugin.aliases)}
        if self._c_host is not None:
            there.update(self._c_host.taken())
        missing = [name for name in names if name not in there]
        if not missing:
            return
        from gpurestore.devplugins.load import missing_plugins

        raise missing_plugins(missing, [plugin.name for plugin in self.plugins], self._idle)

    # ---- what there is

    @property
    def plugins(self) -> list[LoadedPlugin]:
        """The plugins that take part, in the order in which they are asked."""
        return [plugin for plugin in self._plugins if plugin.initialised]

    def plugins_with(self, hook: Hook) -> list[LoadedPlugin]:
        """Those that have ``hook``."""
        return [plugin for plugin in self._plugins if plugin.initialised and hook in plugin.hooks]

    def has(self, hook: Hook) -> bool:
        """Whether anybody has ``hook``."""
        return bool(self.plugins_with(hook))

    @property
    def used(self) -> list[UsedPlugin]:
        """Plugins that the images need, for the manifest. Ask before :meth:`stop`."""
        names = self.inventory_names
        used = dict.fromkeys(names, "")
        for plugin in self._plugins:
            if plugin.used or plugin.name in used:
                used[plugin.name] = ".".join(map(str, plugin.version))
        return [UsedPlugin(name, version) for name, version in used.items()]

    @property
    def inventory_names(self) -> list[str]:
        """Names for inventory.img: Python plugins that were used, and what C plugins put there themselves."""
        names = [plugin.name for plugin in self._plugins if plugin.used and not plugin.exclusive]
        return list(dict.fromkeys([*names, *(self._c_host.added() if self._c_host else ())]))

    # ---- hooks

    def _timeout(self, hook: Hook | None) -> float:
        if self._hook_timeout_s is not None:
            return self._hook_timeout_s
        return PAUSE_TIMEOUT_S if hook is Hook.PAUSE_DEVICES else float("inf")

    def _limit(self, hook: Hook) -> float | None:
        timeout_s = self._timeout(hook)
        return None if timeout_s == float("inf") else timeout_s

    def _is_cancelled(self) -> bool:
        return self._context is not None and self._context.is_cancelled()

    def _span(self, name: str, plugin: LoadedPlugin) -> AbstractContextManager[Any]:
        """What a plugin does outside of stages: init, exit, and answers to claims. A refusal is no failure."""
        if self._context is None or self._context.span is None:
            return nullcontext()
        scope: AbstractContextManager[Any] = self._context.span(name, track=f"plugin {plugin.name}")
        return scope

    async def run_one(
        self, plugin: LoadedPlugin, hook: Hook, *args: Any, span: Callable[..., Any] | None = None
    ) -> Any:
        """Run ``hook`` of one plugin. None when it declines; raises HookError."""
        from gpurestore.devplugins.calls import call_hook
        from gpurestore.devplugins.loaded import pid_of

        span = span or (self._context.span if self._context else None)
        async with AsyncExitStack() as stack:
            if span is not None:
                pid = pid_of(hook, args)
                about = {} if pid is None else {"pid": pid}
                await stack.enter_async_context(span(hook.name, track=f"plugin {plugin.name}", **about))
            self._log.debug("plugin %s: %s%s", plugin.name, hook.name, args)
            try:
                return await call_hook(plugin, hook, args, self._limit(hook), self._is_cancelled)
            except Declined:
                return None

    async def run_all(self, hook: Hook, *args: Any, span: Callable[..., Any] | None = None) -> None:
        """Run a device or global hook of every plugin. All run to their end, then the first failure is raised."""
        plugins = self.plugins_with(hook)
        if not plugins:
            return
        failures: list[tuple[int, Exception]] = []

        async def one(index: int, plugin: LoadedPlugin) -> None:
            try:
                await self.run_one(plugin, hook, *args, span=span)
            except Exception as error:
                failures.append((index, error))

        async with trio.open_nursery() as nursery:
            for index, plugin in enumerate(plugins):
                nursery.start_soon(one, index, plugin)
        failures.sort(key=lambda failure: failure[0])
        for _, error in failures[1:]:
            self._log.error("%s", error)
        if failures:
            raise failures[0][1]

    def claim_sync(self, hook: Hook, *args: Any, only: str | None = None) -> ClaimResult | None:
        """Offer a resource to the plugins (or to the one named ``only``): the first that does not decline has it.

        For worker threads. None: nobody wants it. Raises HookError, and RetryLater for RESTORE_EXT_FILE.
        """
        from gpurestore.devplugins.calls import call_hook_sync

        if hook not in CLAIMING:
            raise ValueError(f"{hook.name} is no hook that claims")
        for plugin in self.plugins_with(hook):
            if only is not None and plugin.name != only and only not in plugin.aliases:
                continue
            if hook is Hook.HANDLE_DEVICE_VMA and plugin.exclusive and args[0] < 0:
                continue  # a file out of reach of an ordinary user; the C ABI knows no mapping without a descriptor
            with self._span(hook.name, plugin):
                try:
                    value = call_hook_sync(plugin, hook, args, self._limit(hook), self._is_cancelled)
                except Declined:
                    continue
            self._check_value(plugin, hook, value)
            plugin.used = True
            self._log.debug("plugin %s: %s%s: claimed", plugin.name, hook.name, args[:2])
            return ClaimResult(plugin.name, value)
        return None

    async def claim(self, hook: Hook, *args: Any, only: str | None = None) -> ClaimResult | None:
        """:meth:`claim_sync` from the loop."""
        return await trio.to_thread.run_sync(lambda: self.claim_sync(hook, *args, only=only))

    @staticmethod
    def _check_value(plugin: LoadedPlugin, hook: Hook, value: Any) -> None:
        if hook in (Hook.RESTORE_EXT_FILE, Hook.RESTORE_UNIX_SK) and not (
            isinstance(value, int) and not isinstance(value, bool) and value >= 0
        ):
            raise HookError(plugin.name, hook.name, None, f"it gave {value!r} instead of a descriptor")

    # ---- stop

    async def stop(self, result: int) -> list[PluginUnloadError]:
        """End the stage: exit of everything initialised, in reverse, then unload. Never raises; a second call is empty.

        ``result`` is the operation's, 0 or a negative errno (:func:`result_of`).
        """
        errors: list[PluginUnloadError] = []
        with trio.CancelScope(shield=True):
            for plugin in reversed(self._plugins):
                await self._call_exit(plugin, result)
            if self._plugins:
                from gpurestore.devplugins.load import unload_all

                errors = unload_all(list(self._plugins))
        if self._c_host is not None:
            self._c_host.end()
            self._c_host = None
        self._plugins = []
        return errors

    async def _call_exit(self, plugin: LoadedPlugin, result: int) -> None:
        await _wait_until_idle(plugin)
        if not plugin.initialised:
            return
        plugin.initialised = False
        if plugin.exclusive and plugin.busy:
            hook = plugin.hung.hook if plugin.hung else "a hook"
            self._log.error("plugin %s: exit was not called: it is still inside %s", plugin.name, hook)
            return
        from gpurestore.devplugins.calls import in_thread

        stage = self._context.stage if self._context else Stage.DUMP
        try:
            with self._span("exit", plugin), trio.move_on_after(self._timeout(None)) as scope:
                if plugin.is_async("exit"):
                    await plugin.call_exit(stage, result)
                else:
                    await in_thread(plugin, lambda: plugin.call_exit(stage, result), lambda: False)
            if scope.cancelled_caught:
                self._log.error("plugin %s: exit did not come back within %g s", plugin.name, self._timeout(None))
        except Exception as error:
            self._log.error("plugin %s: exit failed: %s: %s", plugin.name, type(error).__name__, error)
            self._log.debug("plugin %s: exit failed", plugin.name, exc_info=error)


async def _wait_until_idle(plugin: LoadedPlugin) -> None:
    """Hooks that were given up end sooner or later: a little later they may be waited for no longer."""
    with trio.move_on_after(HUNG_GRACE_S if plugin.hung else CANCELLED_GRACE_S):
        while plugin.busy:  # noqa: ASYNC110 - its thread knows nothing of the loop
            await trio.sleep(0.005)
