"""Locks, shared memory, semaphores, seals, packets: what two processes of Python hold together."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from support.round_trip import dump, round_trip
from support.tool import Tool
from support.victims import Victims

pytestmark = pytest.mark.usefixtures("rights")


def test_what_two_processes_hold_together_survives_two_dumps(tool: Tool, victims: Victims) -> None:
    round_trip(tool, victims.start("held"), 2)


def test_shared_memory_that_was_lost_in_between_is_put_back(tool: Tool, victims: Victims, folder: Path) -> None:
    victim = victims.start("held")
    dump(tool, victim, folder / "images")
    os.unlink(f"/dev/shm/gpurestore-held-{victim.pid}")
    tool.restore(folder / "images").expect(0)
    victim.expect_running()
    victim.finish()


def test_a_file_that_changed_is_named_and_nothing_is_left_of_the_restore(
    tool: Tool, victims: Victims, folder: Path
) -> None:
    victim = victims.start("held")
    dump(tool, victim, folder / "images")
    shared = Path(f"/dev/shm/gpurestore-held-{victim.pid}")
    shared.unlink()
    changed = victim.folder / "position"
    changed.write_bytes(b"another size")
    line = tool.restore(folder / "images", "-d").expect(1).one_line()
    assert f"{changed}: has 12 bytes and had 10 when it was dumped" in line
    assert not shared.exists()
