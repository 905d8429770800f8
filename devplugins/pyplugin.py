"""Python plugins: a class below DevicePlugin, from an installed package or from a file in the plugin folder."""

from __future__ import annotations

import importlib
import inspect
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from gpurestore.devplugins.api import Capability, Declined, DevicePlugin, Hook, HookContext, Stage
from gpurestore.devplugins.loaded import LoadedPlugin
from gpurestore.errors import (
    PluginEntryError,
    PluginFlagsError,
    PluginNotFoundError,
    PluginOpenError,
    PluginUnloadError,
    PluginVersionError,
)


class PyPlugin(LoadedPlugin):
    """An instance of a plugin's class."""

    kind = "Python"

    def __init__(self, plugin: DevicePlugin, name: str, where: str, module: str | None = None) -> None:
        super().__init__()
        self.plugin = plugin
        self.name = plugin.name or name
        self.where = where
        self._module = module
        version = plugin.version
        if not (isinstance(version, tuple) and len(version) == 3 and all(isinstance(part, int) for part in version)):
            raise PluginEntryError(self.name, f"its version is {version!r} instead of three numbers")
        self.version = version
        self.needs = Capability(plugin.needs)
        self.stages = frozenset(plugin.stages)
        self.hooks = plugin.hooks()
        self.aliases = frozenset(plugin.aliases)

    @property
    def used(self) -> bool:
        return self._used or self.plugin.used

    @used.setter
    def used(self, value: bool) -> None:
        self._used = value

    def negotiate(self, api_version: tuple[int, int, int], offered: Capability) -> None:
        if self.version > api_version:
            mine, yours = (".".join(map(str, v)) for v in (api_version, self.version))
            raise PluginVersionError(self.name, f"it is of interface version {yours}; this host knows {mine}")
        if missing := int(self.needs) & ~int(offered):  # as numbers: ~ of a flag knows only the known
            names = ", ".join(name_of_flag(1 << bit) for bit in range(missing.bit_length()) if missing >> bit & 1)
            raise PluginFlagsError(self.name, f"it needs what this host does not offer: {names}")
        self.plugin.negotiate(api_version, offered)

    def is_async(self, what: str) -> bool:
        return inspect.iscoroutinefunction(getattr(self.plugin, what))

    def call_init(self, context: HookContext) -> Any:
        return self.plugin.init(context)

    def call_exit(self, stage: Stage, result: int) -> Any:
        return self.plugin.exit(stage, result)

    def call_hook(self, hook: Hook, args: tuple[Any, ...]) -> Any:
        return getattr(self.plugin, hook.name.lower())(*args)

    def unload(self) -> PluginUnloadError | None:
        if self._module is not None:
            sys.modules.pop(self._module, None)
        return None


def name_of_flag(bit: int) -> str:
    """Its name, or its number where this host knows none."""
    return Capability(bit).name or hex(bit)


def load_file(path: Path) -> list[PyPlugin]:
    """The plugins in a Python file: what its ``plugin`` makes, or else each plugin class that it defines."""
    name = f"gpurestore_plugin_{path.stem}"
    try:
        source = path.read_bytes()
    except FileNotFoundError as error:
        raise PluginNotFoundError(str(path), "there is no such file") from error
    except OSError as error:
        raise PluginOpenError(str(path), f"cannot be read: {error.strerror}") from error
    module = ModuleType(name)
    module.__file__ = str(path)
    sys.modules[name] = module
    try:
        # Compiled here, not imported: nothing is written beside it, and a changed file counts at once.
        exec(compile(source, os.fspath(path), "exec"), module.__dict__)
        return [PyPlugin(made, path.stem, str(path), name) for made in _make_all(module, path)]
    except (Declined, PluginEntryError):
        sys.modules.pop(name, None)
        raise
    except Exception as error:
        sys.modules.pop(name, None)
        raise PluginOpenError(str(path), f"cannot be opened: {type(error).__name__}: {error}") from error


def _make_all(module: ModuleType, path: Path) -> list[DevicePlugin]:
    maker = getattr(module, "plugin", None)
    if maker is not None:
        return [_make(maker, str(path))]
    classes = [
        value
        for value in vars(module).values()
        if isinstance(value, type) and issubclass(value, DevicePlugin) and value.__module__ == module.__name__
    ]
    if not classes:
        raise PluginEntryError(str(path), "it defines neither 'plugin' nor a class below gpurestore's DevicePlugin")
    return [_make(cls, str(path)) for cls in classes]


def load_entry_point(name: str, target: str) -> PyPlugin:
    """The plugin that a package names as ``module:attribute``. Raises Declined when it cannot matter here."""
    where = f"entry point {name} = {target}"
    module, _, attribute = target.partition(":")
    try:
        value: Any = importlib.import_module(module.strip())
        for part in filter(None, attribute.strip().split(".")):
            value = getattr(value, part)
    except Exception as error:
        raise PluginOpenError(name, f"cannot be opened ({where}): {type(error).__name__}: {error}") from error
    try:
        return PyPlugin(_make(value, where), name, where)
    except (Declined, PluginEntryError):
        raise
    except Exception as error:
        raise PluginOpenError(name, f"cannot be opened ({where}): {type(error).__name__}: {error}") from error


def _make(maker: Callable[[], Any] | DevicePlugin, where: str) -> DevicePlugin:
    made = maker() if callable(maker) else maker
    if not isinstance(made, DevicePlugin):
        raise PluginEntryError(where, f"gives a {type(made).__name__}, which is not below gpurestore's DevicePlugin")
    return made
