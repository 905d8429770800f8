"""A device whose restore takes a given time and no CPU: its hooks only wait, as for a copy that the hardware does.

Options: ``seconds`` of device restore in all; ``late``, the share of it (0 to 1) that RESUME_DEVICES_LATE takes,
divided over ``tasks``, instead of POST_FORKING; ``log``, a file that gets a line for every call.
"""

from __future__ import annotations

import json
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import ClassVar

import trio

from gpurestore.devplugins.api import DevicePlugin, HookContext, Stage


class OverlapDevice(DevicePlugin):
    """Waits, and notes when."""

    name: ClassVar[str] = "overlap_device"
    stages: ClassVar[frozenset[Stage]] = frozenset({Stage.RESTORE})

    def init(self, context: HookContext) -> None:
        """Take the options."""
        options = context.options
        seconds, late = float(options["seconds"] or 0), float(options.get("late") or 0)
        self._early_s = seconds * (1 - late)
        self._late_s = seconds * late / int(options.get("tasks") or 1)
        self._log = open(Path(options["log"] or ""), "a")  # noqa: SIM115 - exit() closes it

    def exit(self, stage: Stage, result: int) -> None:
        """Nothing is left to be noted."""
        self._log.close()

    async def post_forking(self) -> None:
        """Device memory comes back, at the same time as the memory of tasks."""
        async with self._noted("POST_FORKING", 0):
            await trio.sleep(self._early_s)

    async def resume_devices_late(self, pid: int) -> None:
        """What a device can only do when a task's memory is whole."""
        async with self._noted("RESUME_DEVICES_LATE", pid):
            await trio.sleep(self._late_s)

    @asynccontextmanager
    async def _noted(self, hook: str, pid: int) -> AsyncIterator[None]:
        began = time.monotonic()
        yield
        self._log.write(json.dumps({"hook": hook, "pid": pid, "began": began, "ended": time.monotonic()}) + "\n")
