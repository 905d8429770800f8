"""C plugins: shared objects with CRIU's plugin ABI, with a descriptor or from before there were any."""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gpurestore.core import ffi, lib, new_error
from gpurestore.devplugins.api import (
    API_VERSION,
    Capability,
    Declined,
    Hook,
    HookContext,
    RetryLater,
    Stage,
    VmaUpdate,
)
from gpurestore.devplugins.loaded import LoadedPlugin, pid_of
from gpurestore.errors import (
    CoreError,
    HookError,
    PluginEntryError,
    PluginHooksError,
    PluginInitError,
    PluginNotFoundError,
    PluginOpenError,
    PluginSymbolError,
    PluginUnloadError,
    PluginVersionError,
)

log = logging.getLogger("gpurestore.plugin")

# CRIU's levels: message, error, warning, info, debug.
_LEVELS = (logging.INFO, logging.ERROR, logging.WARNING, logging.INFO, logging.DEBUG)
_OLD_HOOKS = 15
_HOOKS_SINCE_0_3 = 17
_NAME_BYTES = 256
# Hooks about one task: CRIU takes a positive answer for success. The global ones must say 0.
_POSITIVE_IS_FINE = frozenset({Hook.PAUSE_DEVICES, Hook.CHECKPOINT_DEVICES, Hook.RESUME_DEVICES_LATE})
_GIVES_DESCRIPTOR = frozenset({Hook.RESTORE_UNIX_SK, Hook.RESTORE_EXT_FILE})


@ffi.def_extern()  # type: ignore[untyped-decorator]
def gr_plugin_log_python(level: int, plugin: Any, text: Any) -> None:
    """A plugin's message, in whatever thread it was made."""
    name = ffi.string(plugin).decode(errors="replace") or "?"
    lines = ffi.string(text).decode(errors="replace").rstrip("\n")
    number = _LEVELS[level] if 0 <= level < len(_LEVELS) else logging.DEBUG
    for line in lines.splitlines() or [""]:
        log.log(number, "%s: %s", name, line)


class CHost:
    """What C plugins call back: open from before the first is loaded until after the last is unloaded."""

    def __init__(self) -> None:
        self._open = False

    def begin(self, images_dir_fd: int = -1) -> None:
        """Make the host's symbols visible; plugins find their images below ``images_dir_fd``, the caller's."""
        err = new_error()
        ret = lib.gr_plugin_host_begin(lib.gr_plugin_log_python, _max_level(), _log_fd(), images_dir_fd, err)
        _check(ret, err)
        self._open = True

    def end(self) -> None:
        """No plugin is loaded any more."""
        if self._open:
            lib.gr_plugin_host_end()
            self._open = False

    def set_options(self, options: Mapping[str, Mapping[str, str | None]]) -> None:
        """The vector that criu_plugin_get_options() gives: all options of all plugins."""
        argv = ["criu-plugin"]
        for plugin, values in options.items():
            argv += [f"--{plugin}.{name}" + ("" if value is None else f"={value}") for name, value in values.items()]
        strings, array = _strings(argv)
        err = new_error()
        _check(lib.gr_plugin_host_options(array, len(strings), err), err)

    def set_needs(self, names: Sequence[str] | None) -> None:
        """What the images name; None where they do not say."""
        strings, array = _strings(names or ())
        err = new_error()
        _check(lib.gr_plugin_host_needs(array, -1 if names is None else len(strings), err), err)

    @staticmethod
    def added() -> list[str]:
        """Names that plugins put into the inventory."""
        return _names(0)

    @staticmethod
    def taken() -> list[str]:
        """Names that plugins found in the inventory and took off."""
        return _names(1)


class CPlugin(LoadedPlugin):
    """A loaded shared object. Only one thread is inside at any time."""

    exclusive = True

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.where = str(path)
        self._handle = ffi.NULL
        out, info, err = ffi.new("struct gr_plugin **"), ffi.new("struct gr_plugin_info *"), new_error()
        if lib.gr_plugin_open(os.fsencode(path), out, info, err) < 0:
            raise _open_error(path, err)
        self._handle = out[0]
        self.name = ffi.string(info.name).decode(errors="replace")
        self.version = (info.version >> 16, info.version >> 8 & 0xFF, info.version & 0xFF)
        self.kind = "C, without descriptor" if info.generated else "C"
        self._max_hooks = int(info.max_hooks)
        self.hooks = frozenset(hook for hook in Hook if info.hooks >> hook & 1)
        if info.generated:
            log.warning("plugin %s has no descriptor: taken for one of version 0.1.0, by its functions' names", path)

    def negotiate(self, api_version: tuple[int, int, int], offered: Capability) -> None:
        """A C plugin states a version and a number of hooks, and has no say."""
        if self.version > api_version:
            raise PluginVersionError(
                self.name, f"it is of interface version {_dots(self.version)}; this host knows {_dots(api_version)}"
            )
        most = _OLD_HOOKS if self.version < (0, 3, 0) else _HOOKS_SINCE_0_3
        if self._max_hooks > most:
            raise PluginHooksError(
                self.name, f"it has {self._max_hooks} hooks; version {_dots(self.version)} has {most}"
            )

    def is_async(self, what: str) -> bool:
        return False

    def call_init(self, context: HookContext) -> None:
        result = lib.gr_plugin_init(self._handle, int(context.stage))
        if result != 0:
            raise PluginInitError(self.name, f"its init {_answer(result)}")

    def call_exit(self, stage: Stage, result: int) -> None:
        lib.gr_plugin_exit(self._handle, int(stage), result)

    def call_hook(self, hook: Hook, args: tuple[Any, ...]) -> Any:
        call = ffi.new("struct gr_plugin_call *")
        kept = _fill(call, hook, args)
        result = int(lib.gr_plugin_hook(self._handle, int(hook), call))
        if hook is Hook.RESTORE_EXT_FILE and call.retry_needed:
            if result >= 0:
                os.close(result)
            raise RetryLater
        if result == -errno.ENOTSUP:
            raise Declined
        if result < 0 or (result > 0 and hook not in _POSITIVE_IS_FINE | _GIVES_DESCRIPTOR | {Hook.UPDATE_VMA_MAP}):
            raise HookError(self.name, hook.name, pid_of(hook, args), f"it {_answer(result)}")
        return _value(call, hook, args, result, kept)

    def unload(self) -> PluginUnloadError | None:
        if self._handle == ffi.NULL:
            return None
        if self.busy:
            return PluginUnloadError(self.name, "a hook of it has not come back, so it stays in memory")
        handle, self._handle = self._handle, ffi.NULL
        err = new_error()
        if lib.gr_plugin_close(handle, err) < 0:
            return PluginUnloadError(self.name, f"{ffi.string(err.context).decode(errors='replace')} ({self.where})")
        return None


def _open_error(path: Path, err: Any) -> Exception:
    context = ffi.string(err.context).decode(errors="replace")
    match err.code:
        case errno.ENOEXEC:
            return PluginSymbolError(str(path), context)
        case errno.ELIBBAD:
            return PluginEntryError(str(path), context)
        case errno.ELIBACC:
            return PluginOpenError(str(path), f"cannot be opened: {context}")
        case errno.ENOENT:
            return PluginNotFoundError(str(path), "there is no such file")
    return PluginOpenError(str(path), f"cannot be opened: {os.strerror(err.code)}")


def _fill(call: Any, hook: Hook, args: tuple[Any, ...]) -> list[Any]:
    """Put the arguments where the core looks for them, by kind and in their order; returns what must stay alive."""
    kept: list[Any] = []
    if hook is Hook.HANDLE_DEVICE_VMA:
        args = args[:1]  # the core asks for the status of the descriptor itself
    numbers = texts = wide = addresses = 0
    for value in args:
        if isinstance(value, bytearray):
            kept.append(ffi.new("uint32_t[4]"))
            ffi.memmove(kept[-1], value, min(len(value), 16))
            call.addresses[addresses] = kept[-1]
            addresses += 1
        elif isinstance(value, str | bytes | os.PathLike):
            kept.append(ffi.new("char[]", os.fsencode(value)))
            call.texts[texts] = kept[-1]
            texts += 1
        elif hook is Hook.UPDATE_VMA_MAP:
            call.wide[wide] = value
            wide += 1
        else:
            call.numbers[numbers] = value
            numbers += 1
    return kept


def _value(call: Any, hook: Hook, args: tuple[Any, ...], result: int, kept: list[Any]) -> Any:
    if hook in _GIVES_DESCRIPTOR:
        return result
    if hook is Hook.UPDATE_VMA_MAP:
        return VmaUpdate(int(call.new_pgoff), int(call.fd)) if result == 1 or call.fd >= 0 else None
    if hook is Hook.RESTORE_EXT_MOUNT:
        return bool(call.is_file)
    if hook is Hook.UPDATE_INETSK:
        for text, raw in zip((a for a in args if isinstance(a, bytearray)), kept, strict=True):
            text[:] = bytes(ffi.buffer(raw))[: len(text)]
    return None


def _answer(result: int) -> str:
    name = errno.errorcode.get(-result)
    if result == -1 or name is None:
        return f"returned {result}; its own messages are in the log"
    return f"returned -{name} ({os.strerror(-result)})"


def _check(result: int, err: Any) -> None:
    if result < 0:
        raise CoreError(err.code, ffi.string(err.context).decode(errors="replace"))


def _strings(texts: Sequence[str]) -> tuple[list[Any], Any]:
    strings = [ffi.new("char[]", os.fsencode(text)) for text in texts]
    return strings, ffi.new("char *[]", strings)


def _names(which: int) -> list[str]:
    out = ffi.new("char[]", _NAME_BYTES)
    names: list[str] = []
    while lib.gr_plugin_host_name(which, len(names), out, _NAME_BYTES):
        names.append(ffi.string(out).decode(errors="replace"))
    return names


def _max_level() -> int:
    """The most talkative level of CRIU's that our log takes."""
    return max((level for level, number in enumerate(_LEVELS) if log.isEnabledFor(number)), default=-1)


def _log_fd() -> int:
    for handler in logging.getLogger("gpurestore").handlers:
        if isinstance(handler, logging.FileHandler) and handler.stream is not None:
            return int(handler.stream.fileno())
    return -1


def _dots(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))


assert API_VERSION == (0, 3, 0), "a newer interface has other hooks than the C core calls"
