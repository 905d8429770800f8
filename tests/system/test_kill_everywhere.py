"""The tool dies or fails at every stage: the tree goes on, images are whole or absent, no half restore is left."""

from __future__ import annotations

import os
import random
import signal
import time
from pathlib import Path

import pytest
from support import processes
from support.faults import DUMP_POINTS, RESTORE_POINTS
from support.round_trip import dump
from support.tool import Tool
from support.victims import Victims

from gpurestore.errors import ImageError, UsageError
from gpurestore.images.folder import ImageFolder

pytestmark = pytest.mark.usefixtures("rights")

SEED = int(os.environ.get("GPURESTORE_TEST_SEED", "20240601"))
NR_RANDOM = 6


def fault(point: str, kind: str) -> dict[str, str]:
    return {"GPURESTORE_FAULT": f"{point}:{kind}"}


def whole(images: Path) -> bool:
    """Images are there, every byte of them; anything between that and absent fails the test."""
    if not images.exists():
        return False
    try:
        with ImageFolder(images) as folder:
            folder.verify(2)
    except (ImageError, UsageError) as error:
        raise AssertionError(f"the images are neither whole nor absent: {error}") from error
    return True


def siblings(folder: Path, images: Path) -> list[str]:
    """What lies next to the images and looks like a part of them."""
    return [
        path.name
        for path in folder.iterdir()
        if images.name in path.name and path != images and "again" not in path.name
    ]


@pytest.mark.parametrize("name", ["blocked", "pipes", "registers"])
def test_a_dump_killed_at_any_stage_leaves_the_tree_running(
    tool: Tool, victims: Victims, folder: Path, name: str
) -> None:
    victim = victims.start(name)
    images = folder / "images"
    # Each dump finds what the one before it left; only after the last point are there images.
    for point in sorted(DUMP_POINTS, key="dump.committed".__eq__):
        outcome = tool.dump(victim.pid, images, env=fault(point, "kill"))
        assert outcome.code == -signal.SIGKILL, f"the fault point was not passed\n{outcome}"
        assert whole(images) == (point == "dump.committed"), str(outcome)
        victim.expect_running()
    tool.dump(victim.pid, folder / "again.images", "-R").expect(0)
    assert siblings(folder, images) == [], "a dead tool's temporary folder was not cleared away"
    processes.kill(victim.pids)
    victim.expect_gone()
    tool.restore(images).expect(0)
    victim.finish()


def test_a_dump_that_fails_at_any_stage_leaves_the_tree_running_and_no_images(
    tool: Tool, victims: Victims, folder: Path
) -> None:
    victim = victims.start("blocked")
    for point in DUMP_POINTS:
        images = folder / f"images.{point}"
        outcome = tool.dump(victim.pid, images, env=fault(point, "fail")).expect(1)
        assert point in outcome.one_line()
        assert whole(images) == (point == "dump.committed"), str(outcome)
        assert siblings(folder, images) == [], "a failed dump left its temporary folder"
        victim.expect_running()
    victim.finish()


@pytest.mark.parametrize("name", ["pipes", "registers"])
def test_a_restore_killed_at_any_stage_leaves_nothing_behind(
    tool: Tool, victims: Victims, folder: Path, name: str
) -> None:
    victim = victims.start(name)
    dump(tool, victim, folder / "images")
    for point in RESTORE_POINTS:
        outcome = tool.restore(folder / "images", env=fault(point, "kill"))
        assert outcome.code == -signal.SIGKILL, f"the fault point was not passed\n{outcome}"
        processes.wait_gone(victim.pids)
    tool.restore(folder / "images").expect(0)
    victim.finish()


@pytest.mark.parametrize("name", ["pipes", "tree"])
def test_a_restore_that_fails_at_any_stage_leaves_nothing_behind(
    tool: Tool, victims: Victims, folder: Path, name: str
) -> None:
    victim = victims.start(name)
    dump(tool, victim, folder / "images")
    for point in RESTORE_POINTS:
        outcome = tool.restore(folder / "images", env=fault(point, "fail")).expect(1)
        assert point in outcome.one_line()
        processes.wait_gone(victim.pids)
    tool.restore(folder / "images").expect(0)
    victim.finish()


def test_ctrl_c_at_any_stage_of_a_dump_is_undone_or_too_late(tool: Tool, victims: Victims, folder: Path) -> None:
    victim = victims.start("pipes")
    for point in DUMP_POINTS:
        images = folder / f"images.{point}"
        outcome = tool.dump(victim.pid, images, "-R", env=fault(point, "interrupt"))
        assert outcome.code in (0, 130), str(outcome)
        assert whole(images) == (outcome.code == 0), str(outcome)
        assert siblings(folder, images) == [], "an interrupted dump left its temporary folder"
        victim.expect_running()
    victim.finish()


def test_ctrl_c_at_any_stage_of_a_restore_is_undone_or_too_late(tool: Tool, victims: Victims, folder: Path) -> None:
    victim = victims.start("pipes")
    dump(tool, victim, folder / "images")
    for point in RESTORE_POINTS:
        outcome = tool.restore(folder / "images", env=fault(point, "interrupt"))
        assert outcome.code in (0, 130), str(outcome)
        if outcome.code == 0:
            victim.expect_running()
            processes.kill(victim.pids)
        processes.wait_gone(victim.pids)
    tool.restore(folder / "images").expect(0)
    victim.finish()


@pytest.mark.parametrize("name", ["blocked", "tree"])
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM], ids=lambda n: n.name)
def test_a_dump_that_is_hit_at_random_moments_leaves_the_tree_running(
    tool: Tool, victims: Victims, folder: Path, number: signal.Signals, name: str
) -> None:
    draw = random.Random(SEED + number)
    victim = victims.start(name)
    whole_run_s = tool.dump(victim.pid, folder / "images", "-R").expect(0).wall_s
    for turn in range(NR_RANDOM):
        images = folder / f"{turn}.images"
        running = tool.start("dump", "-t", str(victim.pid), "-D", images, "-R")
        time.sleep(draw.uniform(0.1, 1.0) * whole_run_s)
        running.signal(number)
        outcome = running.wait()
        allowed = (0, -signal.SIGKILL) if number == signal.SIGKILL else (0, 130, -number)
        assert outcome.code in allowed, str(outcome)
        assert whole(images) or outcome.code != 0
        victim.expect_running()
    victim.finish()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM], ids=lambda n: n.name)
def test_a_restore_that_is_hit_at_random_moments_is_whole_or_gone(
    tool: Tool, victims: Victims, folder: Path, number: signal.Signals
) -> None:
    draw = random.Random(SEED - number)
    victim = victims.start("pipes")
    images = folder / "images"
    dump(tool, victim, images)
    whole_run_s = tool.restore(images).expect(0).wall_s
    victim.expect_running()
    for _ in range(NR_RANDOM):
        processes.kill(victim.pids)
        processes.wait_gone(victim.pids)
        running = tool.start("restore", "-D", images, "-d")
        time.sleep(draw.uniform(0.1, 1.1) * whole_run_s)
        running.signal(number)
        outcome = running.wait()
        if outcome.code != 0 and not processes.alive(victim.pid):
            processes.wait_gone(victim.pids)
        else:
            # It was released before the signal came: then all of it runs.
            victim.expect_running()
    processes.kill(victim.pids)
    processes.wait_gone(victim.pids)
    tool.restore(images).expect(0)
    victim.finish()
