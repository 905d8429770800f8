"""What a device plugin is: hooks, stages, capability flags, and the interface that every kind of plugin has.

Three kinds stand behind :class:`DevicePlugin`: CRIU C plugins with a descriptor, older ones without, and Python
classes. Hook numbers, arguments and moments are CRIU's (include/criu-plugin.h); docs/plugins.md has the whole table.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from enum import IntEnum, IntFlag
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

API_VERSION = (0, 3, 0)


class Stage(IntEnum):
    """What the plugins are loaded for."""

    DUMP = 0
    PRE_DUMP = 1
    RESTORE = 2


class Hook(IntEnum):
    """Hooks by their number in the C ABI."""

    DUMP_UNIX_SK = 0
    RESTORE_UNIX_SK = 1
    DUMP_EXT_FILE = 2
    RESTORE_EXT_FILE = 3
    DUMP_EXT_MOUNT = 4
    RESTORE_EXT_MOUNT = 5
    DUMP_EXT_LINK = 6
    HANDLE_DEVICE_VMA = 7
    UPDATE_VMA_MAP = 8
    RESUME_DEVICES_LATE = 9
    PAUSE_DEVICES = 10
    CHECKPOINT_DEVICES = 11
    POST_FORKING = 12
    RESTORE_INIT = 13
    DUMP_DEVICES_LATE = 14
    UPDATE_INETSK = 15
    DUMP_FINISH = 16


# The first plugin that does not decline has the resource; all other hooks go to every plugin.
CLAIMING = frozenset(
    {
        Hook.DUMP_UNIX_SK,
        Hook.RESTORE_UNIX_SK,
        Hook.DUMP_EXT_FILE,
        Hook.RESTORE_EXT_FILE,
        Hook.DUMP_EXT_MOUNT,
        Hook.RESTORE_EXT_MOUNT,
        Hook.DUMP_EXT_LINK,
        Hook.HANDLE_DEVICE_VMA,
        Hook.UPDATE_VMA_MAP,
        Hook.UPDATE_INETSK,
    }
)
DEVICE_HOOKS = frozenset(Hook) - CLAIMING


# Hooks that are understood, but whose moment never comes: what they are about is refused before anybody is asked.
NEVER_CALLED = {
    Hook.DUMP_EXT_MOUNT: "a mount namespace of their own",
    Hook.RESTORE_EXT_MOUNT: "a mount namespace of their own",
    Hook.DUMP_EXT_LINK: "a network namespace of their own",
    Hook.UPDATE_INETSK: "sockets with addresses",
}


class Capability(IntFlag):
    """What a host can do for a plugin, and what a plugin may need. Distinct bits."""

    CONCURRENT_TASKS = 1 << 0  # per-pid hooks of different tasks may overlap
    POST_FORKING_OVERLAP = 1 << 1  # POST_FORKING runs while tasks are filled
    RUN_THREAD = 1 << 2  # one thread of a frozen task can be let run (HookContext.running_thread)
    EXTERNAL_FILES = 1 << 3
    DEVICE_MAPPINGS = 1 << 4
    CLEANUP_EXIT = 1 << 5  # exit(stage, ret) always runs, with the true result
    OPTIONS = 1 << 6


HOST_CAPABILITIES = Capability(127)


class Declined(Exception):  # noqa: N818 - an answer, not an error
    """A hook's answer "not mine": -ENOTSUP in C."""


class VmaUpdate(NamedTuple):
    """Answer of UPDATE_VMA_MAP: the new offset, and a descriptor to map instead of the path (or -1)."""

    pgoff: int
    fd: int = -1


class RetryLater(Exception):  # noqa: N818 - an answer, not an error
    """Answer of RESTORE_EXT_FILE: ask again when other files are open."""


@dataclass(frozen=True, slots=True)
class HookContext:
    """What a plugin may use of its host. Made once per operation; the same for all hooks but for ``options``, which
    are the plugin's own.

    ``images_dir`` (and a descriptor of it) is where the plugin keeps its image files: ``open_image(name)`` creates one
    at dump, the host keeps that descriptor; at restore it opens one, for the plugin to close. ``running_thread(pid,
    tid)`` lets one thread of a frozen task run inside an ``async with`` block. ``span(name, track=...)`` is a scope
    that shows up in trace and terminal. ``tree_goes_on``: a dump after which the tree is to run on.
    """

    stage: Stage
    images_dir: Path
    open_image: Callable[[str], int]
    images_dir_fd: int = -1
    options: Mapping[str, str | None] = field(default_factory=dict)
    running_thread: Callable[[int, int], AbstractAsyncContextManager[None]] | None = None
    span: Callable[..., Any] | None = None
    is_cancelled: Callable[[], bool] = lambda: False
    tree_goes_on: bool = False
    jobs: int = 1


class DevicePlugin:
    """Base of Python plugins, and what the host sees of every plugin.

    A plugin overrides the hooks that it has; the host asks :meth:`hooks` which. A hook may be ``async``; one that is
    not runs in a thread. Returning None is success; raise :class:`Declined` for "not mine", anything else is a failure.
    """

    name: ClassVar[str] = ""
    version: ClassVar[tuple[int, int, int]] = API_VERSION
    needs: ClassVar[Capability] = Capability(0)
    stages: ClassVar[frozenset[Stage]] = frozenset(Stage)
    aliases: ClassVar[frozenset[str]] = frozenset()  # other names in an inventory that it serves

    # Set by a plugin whose work at dump makes images that need it; claiming something does so by itself.
    used: bool = False

    def negotiate(self, api_version: tuple[int, int, int], offered: Capability) -> None:
        """Accept the host, or raise with the reason. Called first."""

    def init(self, context: HookContext) -> None:
        """The stage begins. Raise Declined to sit it out (no device here, say)."""

    def exit(self, stage: Stage, result: int) -> None:
        """The stage is over: 0, or a negative errno. Called once for everything that was initialised."""

    def hooks(self) -> frozenset[Hook]:
        """The hooks that this plugin has: those that it overrides."""
        return frozenset(
            hook
            for hook in Hook
            if getattr(type(self), hook.name.lower()) is not getattr(DevicePlugin, hook.name.lower())
        )

    # ---- dump, in the order in which they come

    def pause_devices(self, pid: int) -> Any:
        """The task still runs: keep it from starting new work on its devices."""

    def checkpoint_devices(self, pid: int) -> Any:
        """The whole tree is frozen, memory not yet read: take device state out of the task."""

    def dump_unix_sk(self, fd: int, ident: int) -> Any:
        """Claim a UNIX socket. ``fd`` is the host's duplicate."""

    def dump_ext_file(self, fd: int, ident: int) -> Any:
        """Claim a descriptor that the host does not know, under number ``ident``."""

    def dump_ext_mount(self, mountpoint: str, ident: int) -> Any:
        """Claim a mount."""

    def dump_ext_link(self, index: int, kind_number: int, kind: str) -> Any:
        """Claim a network link."""

    def handle_device_vma(self, fd: int, stat: os.stat_result) -> Any:
        """Claim a mapping of a device file, or of a memfd; its content is then the plugin's business. ``fd`` is -1 for
        a memfd that this user cannot open: ``stat`` holds its inode and device all the same."""

    def dump_devices_late(self, pid: int) -> Any:
        """Everything is dumped, the tree is still frozen. ``pid`` is the root task's."""

    def dump_finish(self, result: int) -> Any:
        """Before the tree is let go or killed: ``result`` is the dump's. Give devices back unless it is to die."""

    # ---- restore

    def restore_init(self) -> Any:
        """All plugins are loaded and the inventory was checked."""

    def restore_unix_sk(self, ident: int) -> Any:
        """The descriptor for a claimed socket (int); the host takes it over."""

    def restore_ext_file(self, ident: int) -> Any:
        """The descriptor for a claimed file (int), which the host takes over; raise RetryLater to be asked again."""

    def restore_ext_mount(self, ident: int, mountpoint: str, old_root: str) -> Any:
        """Mount it; True if it is a file."""

    def update_vma_map(self, path: str, address: int, old_pgoff: int) -> Any:
        """A :class:`VmaUpdate` where a claimed mapping must be mapped otherwise, None to leave it."""

    def update_inetsk(self, family: int, state: int, source: bytearray, destination: bytearray) -> Any:
        """Rewrite a socket's addresses in place."""

    def post_forking(self) -> Any:
        """The tree is forked; tasks are being filled at this very time. Bring device content back."""

    def resume_devices_late(self, pid: int) -> Any:
        """The task sits stopped at its last instruction, memory whole: give it its devices."""
