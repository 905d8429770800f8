"""Device hooks in live dumps and restores: each at its moment, and what a failing one leaves behind."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from support import processes
from support.recorded import Recorded, dumped, restored
from support.tool import Tool, interrupt
from support.victims import Victims

pytestmark = pytest.mark.usefixtures("rights")

DUMP_HOOKS = ("INIT", "PAUSE_DEVICES", "CHECKPOINT_DEVICES", "DUMP_DEVICES_LATE", "DUMP_FINISH")
RESTORE_HOOKS = ("INIT", "RESTORE_INIT", "POST_FORKING", "RESUME_DEVICES_LATE")


@pytest.fixture
def recorded(folder: Path) -> Recorded:
    return Recorded(folder)


def exits(recorded: Recorded) -> list[int]:
    return [call["result"] for call in recorded.calls() if call["hook"] == "EXIT"]


def test_every_hook_of_a_dump_comes_at_its_moment(
    tool: Tool, victims: Victims, folder: Path, recorded: Recorded
) -> None:
    victim = victims.start("tree")
    dumped(tool, victim, folder / "images", recorded)
    assert recorded.names() == [*DUMP_HOOKS, "EXIT"]
    calls = recorded.calls()
    alive = {pid for pid in victim.pids if any(c.get("pid") == pid for c in calls)}
    assert victim.pid in alive
    for call in calls:
        if call["hook"] == "PAUSE_DEVICES":
            assert call["state"] in "RSDTZ", call
        if call["hook"] in ("CHECKPOINT_DEVICES", "DUMP_DEVICES_LATE"):
            assert call["state"] == "t", call
    assert {c["pid"] for c in calls if c["hook"] == "CHECKPOINT_DEVICES"} <= set(victim.pids)
    assert [c["pid"] for c in calls if c["hook"] == "DUMP_DEVICES_LATE"] == [victim.pid]
    assert exits(recorded) == [0]


def test_every_hook_of_a_restore_comes_at_its_moment(
    tool: Tool, victims: Victims, folder: Path, recorded: Recorded
) -> None:
    victim = victims.start("tree")
    dumped(tool, victim, folder / "images", recorded)
    heaps = {c["pid"]: c["heap"] for c in recorded.calls() if c["hook"] == "CHECKPOINT_DEVICES"}
    restored(tool, folder / "images", recorded)
    assert recorded.names() == [*RESTORE_HOOKS, "EXIT"]
    resumed = [c for c in recorded.calls() if c["hook"] == "RESUME_DEVICES_LATE"]
    assert {c["pid"]: c["heap"] for c in resumed} == heaps
    assert {c["state"] for c in resumed} == {"t"}
    assert exits(recorded) == [0]
    victim.finish()


def test_with_serial_the_same_hooks_come(tool: Tool, victims: Victims, folder: Path, recorded: Recorded) -> None:
    victim = victims.start("tree")
    dumped(tool, victim, folder / "images", recorded)
    restored(tool, folder / "images", recorded, "--serial")
    assert set(recorded.names()) == {*RESTORE_HOOKS, "EXIT"}
    victim.finish()


@pytest.mark.parametrize("hook", DUMP_HOOKS)
def test_a_hook_that_fails_in_a_dump_leaves_the_tree_running(
    tool: Tool, victims: Victims, folder: Path, recorded: Recorded, hook: str
) -> None:
    victim = victims.start("idle")
    outcome = tool.dump(victim.pid, folder / "images", *recorded.options, env=recorded.env(FAIL=hook))
    if hook == "DUMP_FINISH":
        # The images are in place by then: they stay, and so does the tree.
        assert outcome.code in (1, 3)
    else:
        outcome.expect(1)
        assert not (folder / "images").exists()
    assert "recorder" in outcome.one_line()
    if hook != "INIT":
        assert hook in outcome.one_line()
        assert len(exits(recorded)) == 1
        assert exits(recorded)[0] < 0
    victim.expect_running()
    victim.finish()


@pytest.mark.parametrize("hook", RESTORE_HOOKS)
def test_a_hook_that_fails_in_a_restore_leaves_nothing(
    tool: Tool, victims: Victims, folder: Path, recorded: Recorded, hook: str
) -> None:
    victim = victims.start("shared")
    dumped(tool, victim, folder / "images", recorded)
    outcome = tool.restore(folder / "images", "-d", *recorded.options, env=recorded.env(FAIL=hook)).expect(1)
    assert "recorder" in outcome.one_line()
    if hook != "INIT":
        assert hook in outcome.one_line()
        assert len(exits(recorded)) == 1
        assert exits(recorded)[0] < 0
    processes.wait_gone(victim.pids)
    restored(tool, folder / "images", recorded)
    victim.finish()


def test_a_plugin_that_a_dump_used_must_be_there_at_restore(
    tool: Tool, victims: Victims, folder: Path, recorded: Recorded
) -> None:
    victim = victims.start("idle")
    dumped(tool, victim, folder / "images", recorded)
    shutil.rmtree(recorded.libdir)
    outcome = tool.restore(folder / "images", env=recorded.env()).expect(1)
    assert "recorder" in outcome.one_line()
    processes.wait_gone(victim.pids)


def test_what_the_engine_does_not_know_is_claimed_and_given_back(
    tool: Tool, victims: Victims, folder: Path, recorded: Recorded
) -> None:
    victim = victims.start("claimed")
    outcome = tool.dump(victim.pid, folder / "images", *recorded.options, env=recorded.env()).expect(1)
    assert "socket" in outcome.one_line()
    victim.expect_running()
    dumped(tool, victim, folder / "images", recorded, CLAIM="1")
    claimed = {call["hook"]: call for call in recorded.calls()}
    assert claimed["DUMP_EXT_FILE"]["link"] == "socket"
    assert claimed["HANDLE_DEVICE_VMA"]["size"] == 4096
    restored(tool, folder / "images", recorded)
    given = {call["hook"]: call for call in recorded.calls()}
    assert given["RESTORE_EXT_FILE"]["ident"] == claimed["DUMP_EXT_FILE"]["ident"]
    assert given["UPDATE_VMA_MAP"]["path"].startswith("/memfd:claimed-page")
    victim.finish()


def test_two_plugins_see_the_same_task(tool: Tool, victims: Victims, folder: Path, recorded: Recorded) -> None:
    recorded.add("second")
    victim = victims.start("idle")
    dumped(tool, victim, folder / "images", recorded)
    assert recorded.names("recorder") == recorded.names("second") == [*DUMP_HOOKS, "EXIT"]
    restored(tool, folder / "images", recorded)
    assert recorded.names("recorder") == recorded.names("second") == [*RESTORE_HOOKS, "EXIT"]
    victim.finish()


def test_all_plugins_run_before_a_failure_is_told(
    tool: Tool, victims: Victims, folder: Path, recorded: Recorded
) -> None:
    recorded.add("second")
    victim = victims.start("idle")
    env = recorded.env(FAIL="CHECKPOINT_DEVICES")
    tool.dump(victim.pid, folder / "images", *recorded.options, env=env).expect(1)
    for plugin in ("recorder", "second"):
        assert "CHECKPOINT_DEVICES" in recorded.names(plugin)
        assert recorded.names(plugin)[-1] == "EXIT"
    victim.expect_running()
    victim.finish()


def test_a_hook_that_hangs_is_given_up(tool: Tool, victims: Victims, folder: Path, recorded: Recorded) -> None:
    victim = victims.start("idle")
    options = (*recorded.options, "--hook-timeout", "0.5")
    outcome = tool.dump(victim.pid, folder / "images", *options, env=recorded.env(HANG="CHECKPOINT_DEVICES")).expect(1)
    line = outcome.one_line()
    assert all(word in line for word in ("recorder", "CHECKPOINT_DEVICES", str(victim.pid)))
    victim.expect_running()
    victim.finish()


def wait_for_call(recorded: Recorded, hook: str) -> Callable[[], bool]:
    return lambda: any(call["hook"] == hook for call in recorded.calls())


def test_ctrl_c_in_a_hook_undoes_everything(tool: Tool, victims: Victims, folder: Path, recorded: Recorded) -> None:
    victim = victims.start("idle")
    env = recorded.env(HANG="CHECKPOINT_DEVICES")
    running = tool.start("dump", "-t", str(victim.pid), "-D", folder / "images", *recorded.options, env=env)
    processes.wait_until(wait_for_call(recorded, "CHECKPOINT_DEVICES"), "the hook is called")
    interrupt(running)
    running.wait(timeout_s=30).expect(130)
    assert not (folder / "images").exists()
    victim.expect_running()
    victim.finish()


def test_a_failing_hook_is_one_line_where_no_log_was_asked_for(
    tool: Tool, victims: Victims, folder: Path, recorded: Recorded
) -> None:
    victim = victims.start("idle")
    env = recorded.env(FAIL="CHECKPOINT_DEVICES")
    outcome = tool.run("dump", "-t", str(victim.pid), "-D", folder / "images", *recorded.options, env=env).expect(1)
    assert "CHECKPOINT_DEVICES was told to fail" in outcome.one_line()
    victim.expect_running()
    victim.finish()
