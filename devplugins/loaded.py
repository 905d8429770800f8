"""A plugin as the host holds it, whatever it is written in."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import trio

from gpurestore.devplugins.api import Capability, Hook, HookContext, Stage
from gpurestore.errors import CancelledError, HookTimeoutError, PluginUnloadError

# Hooks block, and wait for one another's devices: they must never wait for a thread.
_MAX_THREADS = 4096
# Hooks whose first argument is the pid of the task that they are about.
ABOUT_A_TASK = frozenset(
    {Hook.PAUSE_DEVICES, Hook.CHECKPOINT_DEVICES, Hook.RESUME_DEVICES_LATE, Hook.DUMP_DEVICES_LATE}
)


def pid_of(hook: Hook, args: tuple[Any, ...]) -> int | None:
    """The task that a call is about."""
    return int(args[0]) if hook in ABOUT_A_TASK and args else None


class Ticket:
    """One call into a plugin. Whoever stops waiting for it gives it up: it must not begin any more, if it has not."""

    def __init__(self, is_cancelled: Callable[[], bool] = lambda: False) -> None:
        self._is_cancelled = is_cancelled
        self.given_up = False

    def check(self) -> None:
        """Raise CancelledError when nobody waits any more."""
        if self.given_up or self._is_cancelled():
            raise CancelledError("cancelled while waiting for a plugin")


class LoadedPlugin(ABC):
    """Loaded and looked at. The host calls :meth:`init` before any hook and :meth:`exit` once if that succeeded.

    ``used`` is set when the plugin did something that the images need it for.
    """

    kind: str
    name: str
    where: str
    version: tuple[int, int, int]
    hooks: frozenset[Hook]
    stages: frozenset[Stage] = frozenset(Stage)
    needs: Capability = Capability(0)
    aliases: frozenset[str] = frozenset()
    exclusive = False  # only one thread at a time may be inside

    def __init__(self) -> None:
        self.initialised = False
        self._used = False
        self.hung: HookTimeoutError | None = None
        self.turn = trio.Lock()
        self.threads = trio.CapacityLimiter(_MAX_THREADS)
        self._inside = threading.Lock()
        self._running = 0
        self._counting = threading.Lock()

    @property
    def used(self) -> bool:
        """Whether the images need this plugin."""
        return self._used

    @used.setter
    def used(self, value: bool) -> None:
        self._used = value

    @property
    def busy(self) -> bool:
        """Whether a call that was given up is still inside."""
        return self._running > 0

    def enter(self, ticket: Ticket, call: Callable[[], Any]) -> Any:
        """Run ``call`` in this thread, alone inside the plugin where that is asked for."""
        with self._counting:
            self._running += 1
        try:
            if not self.exclusive:
                return call()
            while not self._inside.acquire(timeout=0.02):
                ticket.check()
            try:
                ticket.check()
                return call()
            finally:
                self._inside.release()
        finally:
            with self._counting:
                self._running -= 1

    @abstractmethod
    def negotiate(self, api_version: tuple[int, int, int], offered: Capability) -> None:
        """Let the plugin accept the host; raises what it raises."""

    @abstractmethod
    def is_async(self, what: str) -> bool:
        """Whether ``what`` (a hook's name in lower case, init or exit) is to be awaited instead of run in a thread."""

    @abstractmethod
    def call_init(self, context: HookContext) -> Any:
        """Run init. Raises Declined to sit the stage out."""

    @abstractmethod
    def call_exit(self, stage: Stage, result: int) -> Any:
        """Run exit."""

    @abstractmethod
    def call_hook(self, hook: Hook, args: tuple[Any, ...]) -> Any:
        """Run a hook: its value, or Declined, RetryLater, HookError."""

    @abstractmethod
    def unload(self) -> PluginUnloadError | None:
        """Forget it; an error says that it is still there, which does no harm to anything else."""
