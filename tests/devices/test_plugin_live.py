"""C plugins in live dumps and restores: each hook at its moment, claims carried, and crashes that do no harm."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
from support.plugins import PluginFolder
from support.round_trip import dump
from support.tool import Tool
from support.victims import Victims

pytestmark = pytest.mark.usefixtures("rights", "compiler")


@pytest.mark.parametrize("version", ["0x000200", "0x000300"])
def test_c_plugins_see_every_hook_at_its_moment(
    tool: Tool, victims: Victims, folder: Path, lib: PluginFolder, version: str
) -> None:
    calls = folder / "calls"
    for name in ("one", "two"):
        lib.compile("recorder", f'-DNAME="{name}"', f"-DCRIU_PLUGIN_VERSION={version}", to=name)
    options = ("-L", str(lib.path), "--plugin-option", f"one.to={calls}", "--plugin-option", f"two.to={calls}")
    victim = victims.start("tree")
    dump(tool, victim, folder / "images", *options)
    finish = ["DUMP_FINISH 0"] if version == "0x000300" else []
    root = victim.pid
    for name in ("one", "two"):
        seen = [line[5:] for line in calls.read_text().splitlines() if line.startswith(f"{name}: ")]
        phases = [line.split("=")[0].split()[0] for line in seen]
        assert list(dict.fromkeys(phases)) == [
            "init",
            "PAUSE_DEVICES",
            "CHECKPOINT_DEVICES",
            "DUMP_DEVICES_LATE",
            *[line.split()[0] for line in finish],
            "exit",
        ]
        paused = [line for line in seen if line.startswith("PAUSE_DEVICES")]
        assert paused
        assert not any(line.endswith(("state=t", "state=-")) for line in paused)
        frozen = [line for line in seen if line.startswith("CHECKPOINT_DEVICES")]
        assert all(line.endswith("state=t") for line in frozen)
        assert seen[-len(finish) - 2 :] == [f"DUMP_DEVICES_LATE pid={root} state=t", *finish, "exit 0 0"]

    calls.unlink()
    tool.restore(folder / "images", "-d", *options).expect(0)
    for name in ("one", "two"):
        seen = [line[5:] for line in calls.read_text().splitlines() if line.startswith(f"{name}: ")]
        assert seen[:3] == ["init 2", "RESTORE_INIT", "POST_FORKING"]
        assert seen[-1] == "exit 2 0"
        assert f"RESUME_DEVICES_LATE pid={root} state=t" in seen
        assert all(line.endswith("state=t") for line in seen[3:-1])
    victim.finish()


def test_what_a_c_plugin_claims_comes_back_from_it(
    tool: Tool, victims: Victims, folder: Path, lib: PluginFolder
) -> None:
    lib.compile("giver")
    victim = victims.start("claimed")
    dump(tool, victim, folder / "images", "-L", str(lib.path))
    missing = tool.restore(folder / "images", "-d").expect(1)
    assert "the images need plugins that are not there: giver" in missing.one_line()
    tool.restore(folder / "images", "-d", "-L", str(lib.path)).expect(0)
    victim.finish()


def test_a_plugin_from_before_descriptors_sees_its_hooks_and_gives_a_unix_socket_back(
    tool: Tool, victims: Victims, folder: Path, lib: PluginFolder
) -> None:
    lib.compile("older")
    calls = folder / "calls"
    env = {"RECORDER_LOG": str(calls)}
    victim = victims.start("claimed")
    outcome = dump(tool, victim, folder / "images", "-L", str(lib.path), env=env)
    assert "older.so has no descriptor: taken for one of version 0.1.0" in outcome.log
    seen = calls.read_text().splitlines()
    assert seen[0] == "init"
    assert seen[1].startswith(f"pause_devices pid={victim.pid} state=")
    assert not seen[1].endswith("state=t")
    assert seen[2] == f"checkpoint_devices pid={victim.pid} state=t"
    assert sorted(seen[3:-1]) == ["dump_unix_sk", "handle_device_vma"]
    assert seen[-1] == "fini"
    calls.unlink()
    tool.restore(folder / "images", "-d", "-L", str(lib.path), env=env).expect(0)
    seen = calls.read_text().splitlines()
    assert seen[:2] == ["init", "restore_init"]
    assert sorted(seen[2:4]) == ["restore_unix_sk", "update_vma_map"]
    assert seen[4:] == ["post_forking", f"resume_devices_late pid={victim.pid} state=t", "fini"]
    victim.finish()


def test_a_plugin_that_crashes_is_named_and_the_tree_goes_on(
    tool: Tool, victims: Victims, folder: Path, lib: PluginFolder
) -> None:
    lib.compile("crashing", "-DALWAYS")
    victim = victims.start("threads")
    outcome = tool.dump(victim.pid, folder / "images", "-L", str(lib.path)).expect(-signal.SIGSEGV)
    message = f"gpurestore: plugin crashing crashed in CHECKPOINT_DEVICES of pid {victim.pid}: SIGSEGV"
    assert message in outcome.err
    assert message in outcome.log
    assert not (folder / "images").exists()
    victim.expect_running()
    victim.finish()


def test_a_c_hook_that_hangs_is_given_up_and_the_tree_goes_on(
    tool: Tool, victims: Victims, folder: Path, lib: PluginFolder
) -> None:
    lib.compile("slow", "-DALWAYS=20000")
    victim = victims.start("idle")
    outcome = tool.dump(victim.pid, folder / "images", "-L", str(lib.path), "--hook-timeout", "0.3").expect(1)
    assert outcome.one_line() == (
        f"gpurestore: dump: plugin slow: PAUSE_DEVICES of pid {victim.pid} failed: "
        "it did not come back within 0.3 s (--hook-timeout)"
    )
    assert outcome.wall_s < 10
    victim.expect_running()
    victim.finish()


def test_a_plugin_that_cannot_be_loaded_ends_the_dump_before_it_begins(
    tool: Tool, victims: Victims, folder: Path, lib: PluginFolder
) -> None:
    lib.compile("odd", "-DNEEDS=compel_wait_task")
    victim = victims.start("idle")
    outcome = tool.run("dump", "-t", str(victim.pid), "-D", folder / "images", env={"CRIU_LIBS_DIR": str(lib.path)})
    outcome.expect(1)
    assert "it needs the symbol compel_wait_task" in outcome.one_line()
    outcome = tool.run("dump", "-t", str(victim.pid), "-D", folder / "images", "--plugin-option", "gone.x=1").expect(2)
    assert "there is no plugin gone" in outcome.one_line()
    assert not (folder / "images").exists()
    victim.expect_running()
    victim.finish()
