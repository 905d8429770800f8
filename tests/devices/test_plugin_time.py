"""How hooks end: time limits, cancellation, plugins that never come back, and exit once for each."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
import trio
from support.plugins import PluginFolder, context_of, run_with_host, with_host
from support.processes import wait_until
from support.victims import have_compiler

from gpurestore import errors
from gpurestore.devplugins.api import Hook
from gpurestore.devplugins.host import PluginHost
from gpurestore.devplugins.loaded import LoadedPlugin

needs_compiler = pytest.mark.skipif(not have_compiler(), reason="no gcc to compile plugins with")


# ---- exit

EXITS = (
    "class P(DevicePlugin):\n"
    "    def init(self, context): self.dir = context.images_dir\n"
    "    def exit(self, stage, result):\n"
    "        with open(self.dir / 'exits', 'a') as file: print(int(stage), result, file=file)\n"
)


def test_exit_is_called_once_however_often_the_host_is_stopped(lib: PluginFolder) -> None:
    lib.write("p", EXITS)

    async def use(host: PluginHost) -> None:
        await host.stop(-7)
        await host.stop(0)

    run_with_host(lib, use)
    assert (lib.cache / "exits").read_text() == "0 -7\n"


def test_exit_of_the_others_is_called_when_one_raises(lib: PluginFolder) -> None:
    lib.write("a", EXITS.replace("class P", "class A"))
    lib.write("b", "class B(DevicePlugin):\n    async def exit(self, stage, result): raise ValueError('no')\n")
    lib.write("c", EXITS.replace("class P", "class C"))
    run_with_host(lib, trio_checkpoint, result=-1)
    assert (lib.cache / "exits").read_text() == "0 -1\n0 -1\n"
    assert "plugin b: exit failed" in lib.messages()


async def trio_checkpoint(_: PluginHost) -> None:
    await trio.lowlevel.checkpoint()


def test_exit_is_called_when_the_operation_is_cancelled(lib: PluginFolder) -> None:
    lib.write("p", EXITS + "    async def post_forking(self): await trio.sleep_forever()\n")

    async def main() -> None:
        with trio.move_on_after(0.1):
            await with_host(lib, lambda host: host.run_all(Hook.POST_FORKING), result=-errno.ECANCELED)

    trio.run(main)
    assert (lib.cache / "exits").read_text() == "0 -125\n"


def test_a_plugin_that_sits_out_or_is_not_for_this_stage_gets_no_exit(lib: PluginFolder) -> None:
    lib.write("p", EXITS.replace("self.dir = context.images_dir", "raise Declined('not today')"))
    lib.write("q", EXITS.replace("class P(DevicePlugin):", "class Q(DevicePlugin):\n    stages = {Stage.RESTORE}"))

    async def use(host: PluginHost) -> None:
        await trio.lowlevel.checkpoint()
        assert host.plugins == []

    run_with_host(lib, use)
    assert not (lib.cache / "exits").exists()


# ---- time


async def until_inside(lib: PluginFolder) -> None:
    await trio.to_thread.run_sync(wait_until, lambda: "slow: in" in lib.messages(), "a thread is in the plugin")


@needs_compiler
def test_one_c_plugin_is_never_entered_by_two_threads(lib: PluginFolder) -> None:
    lib.compile("slow")

    async def use(host: PluginHost) -> None:
        async with trio.open_nursery() as nursery:
            for _ in range(5):
                nursery.start_soon(host.run_all, Hook.PAUSE_DEVICES, 5)
                nursery.start_soon(host.run_all, Hook.CHECKPOINT_DEVICES, 5)
                nursery.start_soon(host.claim, Hook.DUMP_EXT_FILE, 0, 5)

    run_with_host(lib, use)
    assert "slow: exit 0 0, met 0, inside 0" in lib.messages()


@needs_compiler
def test_different_c_plugins_run_at_the_same_time(lib: PluginFolder) -> None:
    for name in ("a", "b", "c", "d"):
        lib.compile("slow", f'-DNAME="{name}"', to=name)
    run_with_host(lib, lambda host: host.run_all(Hook.PAUSE_DEVICES, 300))
    passages = [message.split()[1] for message in lib.messages() if message.endswith((": in", ": out"))]
    assert sorted(passages) == ["in"] * 4 + ["out"] * 4
    assert passages != ["in", "out"] * 4, "one after the other"


@needs_compiler
def test_a_message_from_a_thread_of_the_plugin_carries_its_name(lib: PluginFolder) -> None:
    lib.compile("slow")
    run_with_host(lib, trio_checkpoint)
    assert "slow: from a thread" in lib.messages()


@needs_compiler
def test_a_c_hook_that_hangs_fails_with_plugin_hook_and_pid(lib: PluginFolder) -> None:
    lib.compile("slow")

    async def use(host: PluginHost) -> None:
        with pytest.raises(errors.HookTimeoutError) as caught:
            await host.run_all(Hook.PAUSE_DEVICES, 700)
        assert host.plugins[0].busy, "it was not waited for"
        error = caught.value
        assert (error.plugin, error.hook, error.pid) == ("slow", "PAUSE_DEVICES", 700)
        assert str(error) == (
            "plugin slow: PAUSE_DEVICES of pid 700 failed: it did not come back within 0.2 s (--hook-timeout)"
        )
        with pytest.raises(errors.HookError, match="CHECKPOINT_DEVICES of pid 1 failed: the plugin has not come back"):
            await host.run_all(Hook.CHECKPOINT_DEVICES, 1)

    run_with_host(lib, use, hook_timeout_s=0.2, result=-1)
    # it came back within the time that exit waits
    assert "slow: exit 0 -1, met 0, inside 0" in lib.messages()


@needs_compiler
def test_a_c_plugin_that_never_comes_back_is_not_entered_for_exit(
    lib: PluginFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gpurestore.devplugins.host.HUNG_GRACE_S", 0.1)
    lib.compile("slow")

    async def use(host: PluginHost) -> tuple[LoadedPlugin, list[errors.PluginUnloadError]]:
        with pytest.raises(errors.HookTimeoutError):
            await host.claim(Hook.DUMP_EXT_FILE, 0, 2000)
        return host.plugins[0], await host.stop(-1)

    plugin, [error] = run_with_host(lib, use, hook_timeout_s=0.1)
    assert "a hook of it has not come back, so it stays in memory" in str(error)
    assert "plugin slow: exit was not called: it is still inside DUMP_EXT_FILE" in lib.messages()
    # Its code must not go away beneath it, nor stay in use for the next test.
    wait_until(lambda: not plugin.busy, "it came back after all")


@pytest.mark.parametrize("kind", ["async def", "def"])
def test_a_python_hook_that_hangs_fails(lib: PluginFolder, kind: str) -> None:
    wait = "await trio.sleep_forever()" if kind == "async def" else "time.sleep(0.5)"
    lib.write("p", EXITS + f"    {kind} resume_devices_late(self, pid): {wait}\n")

    async def use(host: PluginHost) -> None:
        with pytest.raises(errors.HookTimeoutError, match=r"plugin p: RESUME_DEVICES_LATE of pid 9 failed: .* 0\.1 s"):
            await host.run_all(Hook.RESUME_DEVICES_LATE, 9)

    run_with_host(lib, use, hook_timeout_s=0.1)
    assert (lib.cache / "exits").read_text() == "0 0\n"


def test_only_pausing_has_a_limit_of_its_own(lib: PluginFolder) -> None:
    host = PluginHost()
    limits = {hook: host._limit(hook) for hook in Hook}
    assert limits.pop(Hook.PAUSE_DEVICES) == 60
    assert set(limits.values()) == {None}
    assert {PluginHost(hook_timeout_s=2)._limit(hook) for hook in Hook} == {2}


@needs_compiler
def test_cancelling_does_not_wait_for_a_c_hook_but_exit_does(lib: PluginFolder) -> None:
    lib.compile("slow")

    async def use(host: PluginHost) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(host.run_all, Hook.PAUSE_DEVICES, 800)
            nursery.start_soon(host.run_all, Hook.CHECKPOINT_DEVICES, 801)
            await until_inside(lib)
            nursery.cancel_scope.cancel()
        assert host.plugins[0].busy

    run_with_host(lib, use, result=-errno.ECANCELED)
    assert lib.messages().count("slow: in") == 1, "what waited for its turn never began"
    assert "slow: exit 0 -125, met 0, inside 0" in lib.messages()


@needs_compiler
def test_a_claim_gives_up_when_the_operation_is_cancelled(lib: PluginFolder, tmp_path: Path) -> None:
    lib.compile("slow")
    cancelled = False

    async def main() -> None:
        nonlocal cancelled
        host, context = PluginHost(lib.path), context_of(tmp_path, is_cancelled=lambda: cancelled)
        await host.start(context)
        try:
            async with trio.open_nursery() as nursery:

                async def claim() -> None:
                    with pytest.raises(errors.CancelledError):
                        await host.claim(Hook.DUMP_EXT_FILE, 0, 900)

                nursery.start_soon(claim)
                await until_inside(lib)
                cancelled = True
            assert host.plugins[0].busy
        finally:
            await host.stop(-125)
            os.close(context.images_dir_fd)

    trio.run(main)
