"""The one thing that most system tests do: dump a victim, restore it, let it verify itself."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from support.tool import Outcome, Tool
from support.victims import Victim


def dump(tool: Tool, victim: Victim, images: Path, *options: str, env: Mapping[str, str] | None = None) -> Outcome:
    """Dump and end the victim; its pids are free afterwards."""
    outcome = tool.dump(victim.pid, images, *options, env=env).expect(0)
    victim.expect_gone()
    return outcome


def round_trip(tool: Tool, victim: Victim, times: int = 1, *options: str) -> None:
    """Dump, end and restore ``victim`` ``times`` times in a row, then demand its verdict."""
    for turn in range(times):
        images = victim.folder.parent / f"{victim.folder.name}.images.{turn}"
        dump(tool, victim, images)
        tool.restore(images, *options).expect(0)
    victim.expect_running()
    victim.finish()
