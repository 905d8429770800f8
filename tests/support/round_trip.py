"""The one thing that most system tests do: dump a victim, restore it, let it verify itself."""

from __future__ import annotations

from pathlib import Path

from support.tool import Tool
from support.victims import Victim


def dump(tool: Tool, victim: Victim, images: Path, *options: str) -> None:
    """Dump and end the victim; its pids are free afterwards."""
    tool.dump(victim.pid, images, *options).expect(0)
    victim.expect_gone()


def restore(tool: Tool, victim: Victim, images: Path, *options: str) -> None:
    """Restore it, detached unless ``options`` say otherwise."""
    tool.restore(images, *(options or ("-d",))).expect(0)
    victim.generation += 1


def round_trip(tool: Tool, victim: Victim, times: int = 1, *options: str) -> None:
    """Dump, end and restore ``victim`` ``times`` times in a row, then demand its verdict."""
    for turn in range(times):
        images = victim.folder.parent / f"{victim.folder.name}.images.{turn}"
        dump(tool, victim, images)
        restore(tool, victim, images, *options)
    victim.expect_running()
    victim.finish()
