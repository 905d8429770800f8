"""Loading what was found, and saying of each plugin what it is or why it was not loaded."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from gpurestore.devplugins.api import API_VERSION, HOST_CAPABILITIES, NEVER_CALLED, Capability, Declined, Hook
from gpurestore.devplugins.discover import Found, find
from gpurestore.devplugins.loaded import LoadedPlugin
from gpurestore.errors import (
    PluginError,
    PluginLoadError,
    PluginMissingError,
    PluginNameError,
    PluginRefusedError,
    PluginSymbolError,
    PluginUnloadError,
)

log = logging.getLogger("gpurestore.plugin")


@dataclass(slots=True)
class Loaded:
    """What became of everything that was found. ``idle``: name and reason of those that do not matter here."""

    plugins: list[LoadedPlugin] = field(default_factory=list)
    idle: dict[str, str] = field(default_factory=dict)
    names: list[str] = field(default_factory=list)  # all that are there, loaded or idle


def has_c(found: Iterable[Found]) -> bool:
    """Whether loading needs the host of C plugins."""
    return any(item.path is not None and item.path.suffix == ".so" for item in found)


def open_found(item: Found) -> list[LoadedPlugin]:
    """Load one; nothing of it was called yet but its constructors. Raises Declined when it cannot matter here."""
    if item.path is None:
        from gpurestore.devplugins.pyplugin import load_entry_point

        return [load_entry_point(item.name, item.target)]
    if item.path.suffix == ".py":
        from gpurestore.devplugins.pyplugin import load_file

        return list(load_file(item.path))
    from gpurestore.devplugins.cplugin import CPlugin

    return [CPlugin(item.path)]


def negotiate(plugin: LoadedPlugin, offered: Capability) -> None:
    """Offer the host to the plugin. Raises a PluginLoadError that says who minds what."""
    try:
        plugin.negotiate(API_VERSION, offered)
    except PluginError:
        raise
    except Exception as error:
        raise PluginRefusedError(plugin.name, f"it refuses this host: {error or type(error).__name__}") from error


def load_all(
    found: Iterable[Found],
    offered: Capability = HOST_CAPABILITIES,
    needed: Collection[str] | None = None,
) -> Loaded:
    """Load, check names, negotiate. On the first failure what was loaded is unloaded, in reverse, and it is raised.

    ``needed`` are the plugins that the images name, where they say: packages that are not among them stay unloaded.
    """
    loaded = Loaded()
    try:
        for item in found:
            if item.path is None and needed is not None and item.name not in needed:
                loaded.names.append(item.name)
                loaded.idle[item.name] = "the images do not need it"
                continue
            _load_one(item, loaded, offered)
    except BaseException:
        unload_all(loaded.plugins)
        raise
    return loaded


def _load_one(item: Found, loaded: Loaded, offered: Capability) -> None:
    try:
        plugins = open_found(item)
    except Declined as reason:
        loaded.names.append(item.name)
        loaded.idle[item.name] = str(reason) or "it says that it cannot matter here"
        log.debug("plugin %s is not needed here: %s", item.name, loaded.idle[item.name])
        return
    except PluginSymbolError as error:
        if item.asked_for:
            raise
        loaded.idle[item.name] = error.why
        log.warning("%s; passed over", error)
        return
    for plugin in plugins:
        loaded.plugins.append(plugin)
        if plugin.name in loaded.names:
            raise PluginNameError(plugin.name, f"the name is taken twice, the second time by {plugin.where}")
        loaded.names.append(plugin.name)
        negotiate(plugin, offered)
        log.debug("plugin %s: %s, version %s, %d hooks", plugin.name, plugin.kind, plugin.version, len(plugin.hooks))
        for line in never_called(plugin.hooks):
            log.info("plugin %s: %s", plugin.name, line)


def unload_all(plugins: list[LoadedPlugin]) -> list[PluginUnloadError]:
    """Unload in reverse; what refuses is logged and returned."""
    errors = []
    while plugins:
        error = plugins.pop().unload()
        if error is not None:
            log.warning("%s", error)
            errors.append(error)
    return errors


def preview(libdir: Path | None, needed: Collection[str]) -> list[PluginInfo]:
    """The plugins that a restore of images which name ``needed`` would load; none is initialised.

    Raises as the restore would. Whether a C plugin serves images under another name than its own only its init tells.
    """
    found = find(libdir)
    with hosted(found):
        loaded = load_all(found, HOST_CAPABILITIES, needed)
        try:
            rows = [_describe(plugin, False, lambda _: None) for plugin in loaded.plugins]
            there = {name for plugin in loaded.plugins for name in (plugin.name, *plugin.aliases)}
            missing = [name for name in needed if name not in there]
            if missing and not any(plugin.exclusive for plugin in loaded.plugins):
                raise missing_plugins(missing, [plugin.name for plugin in loaded.plugins], loaded.idle)
        finally:
            unload_all(loaded.plugins)
    return rows


def missing_plugins(names: Iterable[str], there: Iterable[str], idle: Mapping[str, str]) -> PluginMissingError:
    """The images need ``names``; ``there`` take part, and ``idle`` says why others do not."""
    reasons = [f"{name} ({idle[name]})" if name in idle else name for name in names]
    return PluginMissingError(
        f"the images need plugins that are not there: {', '.join(reasons)}; there are: {', '.join(there) or 'none'}. "
        "Name their folder with -L, and see 'gpurestore plugins'"
    )


@contextmanager
def hosted(found: Iterable[Found]) -> Iterator[None]:
    """The host of C plugins, where there are any, for plugins that are only looked at."""
    if not has_c(found):
        yield
        return
    from gpurestore.devplugins.cplugin import CHost

    host = CHost()
    host.begin()
    try:
        yield
    finally:
        host.end()


def never_called(hooks: Iterable[Hook]) -> list[str]:
    """In words, which of a plugin's hooks have no moment in this engine."""
    return [
        f"hook {hook.name} is never called: this engine refuses trees with {NEVER_CALLED[hook]}"
        for hook in sorted(hooks)
        if hook in NEVER_CALLED
    ]


@dataclass(frozen=True, slots=True)
class PluginInfo:
    """A line of ``gpurestore plugins``. ``state`` is loaded, idle (cannot matter here) or failed; ``why`` says more.

    ``notes`` say which of its hooks are never called.
    """

    name: str
    kind: str
    where: str
    version: str
    hooks: tuple[str, ...]
    stages: tuple[str, ...]
    needs: tuple[str, ...]
    state: str
    why: str
    error: str  # the class of the failure
    notes: tuple[str, ...] = ()


def survey(libdir: Path | None, offered: Capability = HOST_CAPABILITIES) -> list[PluginInfo]:
    """Load everything that can be found, each for itself, say what it is, and unload it. No init is called."""
    found = find(libdir)
    with hosted(found):
        return _survey(found, offered)


def _survey(found: Iterable[Found], offered: Capability) -> list[PluginInfo]:
    rows: list[PluginInfo] = []
    plugins: list[LoadedPlugin] = []
    for item in found:
        try:
            made = open_found(item)
        except Declined as reason:
            rows.append(_not_loaded(item, "idle", str(reason), ""))
            continue
        except PluginLoadError as error:
            rows.append(_not_loaded(item, "failed", error.why, type(error).__name__))
            continue
        for plugin in made:
            taken = any(plugin.name == other.name for other in plugins)
            plugins.append(plugin)
            rows.append(_describe(plugin, taken, lambda p: negotiate(p, offered)))
    by_name = {error.plugin: error for error in unload_all(plugins)}
    return [_with_unload(row, by_name.get(row.name)) for row in rows]


def _not_loaded(item: Found, state: str, why: str, error: str) -> PluginInfo:
    where = str(item.path) if item.path else f"entry point {item.name} = {item.target}"
    kind = "C" if item.path is not None and item.path.suffix == ".so" else "Python"
    return PluginInfo(item.name, kind, where, "", (), (), (), state, why, error)


def _describe(plugin: LoadedPlugin, taken: bool, check: Callable[[LoadedPlugin], None]) -> PluginInfo:
    state, why, kind = "loaded", "", ""
    try:
        if taken:
            raise PluginNameError(plugin.name, "the name is taken twice")
        check(plugin)
    except PluginLoadError as error:
        state, why, kind = "failed", error.why, type(error).__name__
    return PluginInfo(
        plugin.name,
        plugin.kind,
        plugin.where,
        ".".join(map(str, plugin.version)),
        tuple(hook.name for hook in sorted(plugin.hooks)),
        tuple(stage.name for stage in sorted(plugin.stages)),
        tuple(flag.name or hex(flag) for flag in plugin.needs),
        state,
        why,
        kind,
        tuple(never_called(plugin.hooks)),
    )


def _with_unload(row: PluginInfo, error: PluginUnloadError | None) -> PluginInfo:
    if error is None or row.state == "failed":
        return row
    import dataclasses

    return dataclasses.replace(row, why=error.why, error=type(error).__name__)
