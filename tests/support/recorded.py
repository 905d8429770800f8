"""A plugin folder with recorders in it (tests/devices/plugins/recorder.py), and what they wrote down."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from support.round_trip import dump
from support.tool import Tool
from support.victims import Victim

PLUGINS = Path(__file__).parents[1] / "devices" / "plugins"


class Recorded:
    """A plugin folder with recorders in it, and what they wrote down."""

    def __init__(self, folder: Path) -> None:
        self.libdir = folder / "plugins"
        self.libdir.mkdir()
        self.file = folder / "record"
        self.add("recorder")

    def add(self, name: str) -> None:
        """One more plugin of the same kind, under another name."""
        text = (PLUGINS / "recorder.py").read_text()
        (self.libdir / f"{name}.py").write_text(text.replace('name = "recorder"', f'name = "{name}"'))

    def env(self, **more: str) -> Mapping[str, str]:
        """The environment for a run of the tool; what was recorded before is forgotten."""
        self.file.write_text("")
        return {"RECORD": str(self.file), **more}

    @property
    def options(self) -> tuple[str, str]:
        return ("-L", str(self.libdir))

    def calls(self, plugin: str = "recorder") -> list[dict[str, Any]]:
        """What one plugin saw, in order."""
        calls = [json.loads(line) for line in self.file.read_text().splitlines()]
        return [call for call in calls if call["plugin"] == plugin]

    def names(self, plugin: str = "recorder") -> list[str]:
        """The hooks it saw, repetitions (one per task) folded."""
        names = [call["hook"] for call in self.calls(plugin)]
        return [name for index, name in enumerate(names) if index == 0 or names[index - 1] != name]


def dumped(tool: Tool, victim: Victim, images: Path, recorded: Recorded, **env: str) -> None:
    """Dump a victim with the recorders, and see it end."""
    dump(tool, victim, images, *recorded.options, env=recorded.env(**env))


def restored(tool: Tool, images: Path, recorded: Recorded, *options: str) -> None:
    """Restore it with the recorders, detached."""
    tool.restore(images, "-d", *options, *recorded.options, env=recorded.env()).expect(0)
