"""Memory that tasks share copy-on-write since a fork: right in every task, stored once, and shared again afterwards."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from support import processes
from support.round_trip import dump, round_trip
from support.tool import Tool
from support.victims import Victim, Victims

from gpurestore.images.inspect import summarize
from gpurestore.tasks import inherited

pytestmark = [
    pytest.mark.usefixtures("rights"),
    pytest.mark.skipif(not inherited.can_recognise(), reason="frame numbers are hidden from us"),
]
MIB = 1 << 20


def proportional_bytes(victim: Victim) -> int:
    """The sum of the tree's proportional set sizes."""
    lines = (line for pid in victim.pids for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines())
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:"))


@pytest.mark.parametrize("how", ["--parallel", "--serial"])
def test_what_becomes_of_inherited_memory_is_restored_in_every_task(tool: Tool, victims: Victims, how: str) -> None:
    round_trip(tool, victims.start("heirs"), 2, "-d", how)


def test_dense_memory_between_pages_of_the_parent_comes_in_small_pages(
    tool: Tool, victims: Victims, folder: Path
) -> None:
    victim = victims.start("rewritten")
    dump(tool, victim, folder / "images")
    said = tool.run("restore", "-D", str(folder / "images"), "--dry-run").expect(0).out
    root, child = victim.pids
    assert f"task {child}: cloned by task {root} when its memory is in place" in said
    assert not re.search(rf"^task {child}: \d+ of them into huge pages", said, re.MULTILINE)
    tool.restore(folder / "images").expect(0)
    victim.finish()


def test_memory_that_comes_lazily_comes_to_everybody(tool: Tool, victims: Victims) -> None:
    round_trip(tool, victims.start("heirs"), 1, "-d", "--lazy")


def test_memory_is_stored_once_and_shared_again(tool: Tool, victims: Victims, folder: Path) -> None:
    victim = victims.start("heirs", "64", "6", "2000")
    before = proportional_bytes(victim)
    for turn in ("first", "second"):
        images = folder / turn
        dump(tool, victim, images)
        summary = summarize(images)
        assert summary.stored_bytes < 80 * MIB
        assert sum(task.inherited_bytes > 50 * MIB for task in summary.tasks) == len(victim.pids) - 1
        tool.restore(images).expect(0)
        assert proportional_bytes(victim) < before * 1.05
    victim.expect_running()
    victim.finish()


def test_what_only_siblings_share_is_shared_again(tool: Tool, victims: Victims, folder: Path) -> None:
    """The root wrote one page in sixteen after its workers were born."""
    victim = victims.start("heirs")
    before = proportional_bytes(victim)
    dump(tool, victim, folder / "images")
    assert summarize(folder / "images").stored_bytes < before * 1.1
    tool.restore(folder / "images").expect(0)
    assert proportional_bytes(victim) < before * 1.05
    victim.finish()


def test_compressed_images_share_the_same(tool: Tool, victims: Victims, folder: Path) -> None:
    victim = victims.start("heirs")
    before = proportional_bytes(victim)
    dump(tool, victim, folder / "images", "--compress", "lz4")
    tool.restore(folder / "images").expect(0)
    assert proportional_bytes(victim) < before * 1.05
    victim.finish()


def test_copies_are_stored_for_criu(tool: Tool, victims: Victims, folder: Path) -> None:
    victim = victims.start("heirs", "8", "2", "16")
    dump(tool, victim, folder / "images", "--criu-compatible")
    summary = summarize(folder / "images")
    assert summary.stored_bytes > 3 * 8 * MIB * 0.9
    assert not list((folder / "images").glob("inherited-*"))
    tool.restore(folder / "images").expect(0)
    victim.finish()


def test_a_dry_run_tells_who_waits_for_whose_memory(tool: Tool, victims: Victims, folder: Path) -> None:
    victim = victims.start("heirs", "8", "2", "16")
    dump(tool, victim, folder / "images")
    said = tool.run("restore", "-D", str(folder / "images"), "--dry-run").expect(0).out
    root, first, second = victim.pids
    assert f"stage birth of task {first} after ancestral memory of task {root}" in said
    assert f"stage descriptors of task {second} after birth of task {first}" in said
    assert f"task {root}: while children are born, show them " in said
    assert f"task {first}: cloned by task {root} when its memory is in place, keeps " in said


@pytest.mark.parametrize("action", ["kill", "fail"])
def test_a_restore_that_ends_while_some_are_born_and_some_are_not_leaves_nobody(
    tool: Tool, victims: Victims, folder: Path, action: str
) -> None:
    victim = victims.start("heirs", "8", "3", "16")
    dump(tool, victim, folder / "images")
    # The first that comes to this point is an heir: its parent does when all of them are born.
    outcome = tool.restore(folder / "images", env={"GPURESTORE_FAULT": f"restore.memory:{action}"})
    assert outcome.code != 0
    processes.wait_gone(victim.pids)
    tool.restore(folder / "images").expect(0)
    victim.finish()
