"""What the options of dump and restore do to a live tree."""

from __future__ import annotations

import json
import os
import re
import signal
from pathlib import Path

import pytest
from support import processes
from support.round_trip import dump
from support.tool import Tool
from support.victims import Victims

pytestmark = pytest.mark.usefixtures("rights")


def test_a_tree_that_is_left_running_goes_on_and_its_images_can_be_restored(
    tool: Tool, victims: Victims, folder: Path
) -> None:
    victim = victims.start("pipes")
    tool.dump(victim.pid, folder / "images", "--leave-running").expect(0)
    victim.expect_running()
    processes.kill(victim.pids)
    victim.expect_gone()
    tool.restore(folder / "images").expect(0)
    victim.finish()


def test_a_tree_that_is_left_running_can_be_dumped_again_and_again(tool: Tool, victims: Victims, folder: Path) -> None:
    victim = victims.start("registers")
    for turn in range(5):
        tool.dump(victim.pid, folder / f"images.{turn}", "-R").expect(0)
        victim.expect_running()
    victim.finish()


def test_a_tree_that_is_left_stopped_goes_on_after_sigcont(tool: Tool, victims: Victims, folder: Path) -> None:
    victim = victims.start("pipes")
    tool.dump(victim.pid, folder / "images", "--leave-stopped").expect(0)
    processes.wait_until(lambda: {processes.state(pid) for pid in victim.pids} == {"T"}, "every task is stopped")
    for pid in victim.pids:
        os.kill(pid, signal.SIGCONT)
    victim.expect_running()
    victim.finish()


def test_a_restore_in_front_of_the_tree_ends_with_its_exit_status(tool: Tool, victims: Victims, folder: Path) -> None:
    victim = victims.start("idle")
    dump(tool, victim, folder / "images")
    running = tool.start("restore", "-D", folder / "images")
    processes.wait_until(lambda: victim.beats() > 0 and processes.alive(victim.pid), "the tree runs")
    victim.go()
    running.wait().expect(0)
    assert (victim.folder / "verdict").read_text() == "ok\n"
    assert processes.state(victim.pid) is None


def test_a_restore_in_front_of_the_tree_passes_signals_on(tool: Tool, victims: Victims, folder: Path) -> None:
    victim = victims.start("idle")
    dump(tool, victim, folder / "images")
    beats = victim.beats()
    running = tool.start("restore", "-D", folder / "images")
    processes.wait_until(lambda: victim.beats() != beats and processes.alive(victim.pid), "the tree runs")
    running.signal(signal.SIGTERM)
    # It ends as the root task did: a shell shows 128 + 15 for that.
    running.wait().expect(-signal.SIGTERM)
    assert processes.state(victim.pid) is None


def test_the_pid_file_names_the_root_task(tool: Tool, victims: Victims, folder: Path) -> None:
    victim = victims.start("pipes")
    dump(tool, victim, folder / "images")
    tool.restore(folder / "images", "-d", "--pidfile", str(folder / "pid")).expect(0)
    assert int((folder / "pid").read_text()) == victim.pid
    victim.finish()


def test_a_dry_run_prints_the_plan_and_creates_nothing(tool: Tool, victims: Victims, folder: Path) -> None:
    victim = victims.start("tree")
    dump(tool, victim, folder / "images")
    plan = tool.restore(folder / "images", "--dry-run").expect(0).out
    assert all(str(pid) in plan for pid in victim.pids)
    assert "MMAP" in plan
    assert all(processes.state(pid) is None for pid in victim.pids)
    # Only where this command's own vdso lies differs from run to run.
    again = tool.restore(folder / "images", "--dry-run").expect(0).out
    assert re.sub("0x[0-9a-f]+", "", again) == re.sub("0x[0-9a-f]+", "", plan)
    tool.restore(folder / "images").expect(0)
    victim.finish()


def test_a_trace_holds_the_stages_of_both_operations(tool: Tool, victims: Victims, folder: Path) -> None:
    victim = victims.start("idle")
    dump(tool, victim, folder / "images", "--trace", str(folder / "dump.json"))
    tool.restore(folder / "images", "-d", "--trace", str(folder / "restore.json")).expect(0)
    for name in ("dump", "restore"):
        events = json.loads((folder / f"{name}.json").read_text())["traceEvents"]
        assert len([event for event in events if event["ph"] == "X"]) >= 3
    victim.finish()


def test_inspect_shows_the_tree_of_a_real_dump(tool: Tool, victims: Victims, folder: Path) -> None:
    victim = victims.start("pipes")
    dump(tool, victim, folder / "images")
    text = tool.run("inspect", folder / "images").expect(0).out
    assert all(str(pid) in text for pid in victim.pids)
    assert isinstance(json.loads(tool.run("inspect", folder / "images", "--json").expect(0).out), dict)
    tool.restore(folder / "images").expect(0)
    victim.finish()


@pytest.mark.parametrize("how", ["--serial", "--parallel"])
@pytest.mark.parametrize("jobs", ["1", "4"])
def test_any_number_of_jobs_restores_the_same(tool: Tool, victims: Victims, folder: Path, how: str, jobs: str) -> None:
    victim = victims.start("cow")
    dump(tool, victim, folder / "images", "--jobs", jobs)
    tool.restore(folder / "images", "-d", how, "--jobs", jobs).expect(0)
    victim.finish()


def test_a_task_whose_session_leader_is_outside_is_a_shell_job(tool: Tool, victims: Victims, folder: Path) -> None:
    # The root of the tree that is dumped is a child of the victim's first process, which leads the session.
    victim = victims.start("pipes")
    child = victim.pids[1]
    outcome = tool.dump(child, folder / "refused").expect(1)
    assert "--shell-job" in outcome.one_line()
    victim.expect_running()
    victim.finish()


def test_a_dump_of_a_tree_that_is_forking_all_the_time_catches_all_of_it(
    tool: Tool, victims: Victims, folder: Path
) -> None:
    victim = victims.start("forking")
    for turn in range(4):
        tool.dump(victim.pid, folder / f"images.{turn}", "-R").expect(0)
        victim.expect_running()
    tool.dump(victim.pid, folder / "images").expect(0)
    processes.end_all_below()
    victim.expect_gone()
    tool.restore(folder / "images").expect(0)
    victim.expect_running()
    victim.finish()
