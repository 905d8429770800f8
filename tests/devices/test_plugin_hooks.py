"""Calling hooks: arguments and answers, and who is asked."""

from __future__ import annotations

import errno
import os
import socket
import stat
from pathlib import Path
from typing import Any

import pytest
from support.plugins import PluginFolder, run_with_host
from support.victims import have_compiler

from gpurestore import errors
from gpurestore.devplugins.api import CLAIMING, Hook, RetryLater, Stage, VmaUpdate
from gpurestore.devplugins.host import PluginHost

needs_compiler = pytest.mark.skipif(not have_compiler(), reason="no gcc to compile plugins with")


@pytest.fixture
def calls(tmp_path: Path) -> Path:
    return tmp_path / "calls"


def lines(calls: Path) -> list[str]:
    return calls.read_text().splitlines()


# ---- what arrives in C, and what comes back

ARGUMENTS: list[tuple[Hook, tuple[Any, ...], str]] = [
    (Hook.DUMP_UNIX_SK, (0, 12), "DUMP_UNIX_SK fd=1 id=12"),
    (Hook.RESTORE_UNIX_SK, (12,), "RESTORE_UNIX_SK id=12"),
    (Hook.DUMP_EXT_FILE, (0, -7), "DUMP_EXT_FILE fd=1 id=-7"),
    (Hook.DUMP_EXT_MOUNT, ("/mnt/ü x", 5), "DUMP_EXT_MOUNT /mnt/ü x id=5"),
    (Hook.RESTORE_EXT_MOUNT, (5, "/mnt", "/old"), "RESTORE_EXT_MOUNT id=5 /mnt /old"),
    (Hook.DUMP_EXT_LINK, (3, 4, "veth"), "DUMP_EXT_LINK index=3 type=4 veth"),
    (Hook.UPDATE_VMA_MAP, ("/dev/x", 0x7F0000001000, 0x2000), "UPDATE_VMA_MAP /dev/x addr=0x7f0000001000 pgoff=0x2000"),
    (
        Hook.UPDATE_INETSK,
        (10, 1, bytearray(range(16)), bytearray(b"\xff" * 16)),
        "UPDATE_INETSK family=10 state=1 0x3020100 0xffffffff",
    ),
    (Hook.POST_FORKING, (), "POST_FORKING"),
    (Hook.RESTORE_INIT, (), "RESTORE_INIT"),
    (Hook.DUMP_FINISH, (-5,), "DUMP_FINISH -5"),
    *[
        (hook, (1,), f"{hook.name} pid=1 state=S")
        for hook in (Hook.PAUSE_DEVICES, Hook.CHECKPOINT_DEVICES, Hook.RESUME_DEVICES_LATE, Hook.DUMP_DEVICES_LATE)
    ],
]


def test_the_list_of_hooks_is_whole() -> None:
    tested = {hook for hook, _, _ in ARGUMENTS} | {Hook.HANDLE_DEVICE_VMA, Hook.RESTORE_EXT_FILE}
    assert tested == set(Hook)


@needs_compiler
@pytest.mark.parametrize(("hook", "args", "line"), ARGUMENTS, ids=[hook.name for hook, _, _ in ARGUMENTS])
def test_a_c_hook_gets_its_arguments(
    lib: PluginFolder, calls: Path, hook: Hook, args: tuple[Any, ...], line: str
) -> None:
    lib.compile("recorder")

    async def use(host: PluginHost) -> None:
        if hook in CLAIMING:
            assert await host.claim(hook, *args) is None
        else:
            await host.run_all(hook, *args)

    run_with_host(lib, use, stage=Stage.RESTORE, options=[f"recorder.to={calls}"], result=-9)
    assert lines(calls) == ["recorder: init 2", f"recorder: {line}", "recorder: exit 2 -9"]


@needs_compiler
def test_a_device_mapping_comes_with_the_status_of_its_file(lib: PluginFolder, calls: Path) -> None:
    lib.compile("recorder")

    async def use(host: PluginHost) -> None:
        for path in ("/dev/null", __file__):
            fd = os.open(path, os.O_RDONLY)
            assert await host.claim(Hook.HANDLE_DEVICE_VMA, fd, os.fstat(fd)) is not None
            os.close(fd)

    run_with_host(lib, use, options=[f"recorder.to={calls}", "recorder.claim=HANDLE_DEVICE_VMA"])
    assert lines(calls)[1:-1] == [
        "recorder: HANDLE_DEVICE_VMA fd=1 device=1",
        "recorder: HANDLE_DEVICE_VMA fd=1 device=0",
    ]


@needs_compiler
def test_what_a_c_hook_writes_comes_back(lib: PluginFolder, calls: Path) -> None:
    lib.compile("recorder")

    async def claim(host: PluginHost, hook: Hook, *args: Any) -> Any:
        result = await host.claim(hook, *args)
        assert result is not None
        assert result.plugin == "recorder"
        return result.value

    def value_of(hook: Hook, *args: Any) -> Any:
        options = [f"recorder.to={calls}", f"recorder.claim={hook.name}"]
        return run_with_host(lib, lambda host: claim(host, hook, *args), stage=Stage.RESTORE, options=options)

    update = value_of(Hook.UPDATE_VMA_MAP, "/dev/x", 0x1000, 0x2000)
    assert isinstance(update, VmaUpdate)
    assert update.pgoff == 0x3000
    assert os.readlink(f"/proc/self/fd/{update.fd}") == "/dev/zero"
    os.close(update.fd)
    fd = value_of(Hook.RESTORE_UNIX_SK, 1)
    assert stat.S_ISCHR(os.fstat(fd).st_mode)
    os.close(fd)
    assert value_of(Hook.RESTORE_EXT_MOUNT, 1, "/a", "/b") is True
    source, destination = bytearray(4), bytearray(b"abcd")
    assert value_of(Hook.UPDATE_INETSK, int(socket.AF_INET), 1, source, destination) is None
    assert (bytes(source), bytes(destination)) == (b"\x7f\0\0\x01", b"abcd")


@needs_compiler
def test_a_file_may_be_restored_at_the_second_asking(lib: PluginFolder, calls: Path) -> None:
    lib.compile("recorder")

    async def use(host: PluginHost) -> None:
        with pytest.raises(RetryLater):
            await host.claim(Hook.RESTORE_EXT_FILE, 7)
        result = await host.claim(Hook.RESTORE_EXT_FILE, 7)
        assert result is not None
        os.close(result.value)

    run_with_host(lib, use, stage=Stage.RESTORE, options=[f"recorder.to={calls}", "recorder.claim=RESTORE_EXT_FILE"])
    assert lines(calls)[1:-1] == ["recorder: RESTORE_EXT_FILE id=7"] * 2


@needs_compiler
def test_a_plugin_with_crius_macros_uses_every_host_symbol(lib: PluginFolder) -> None:
    lib.compile("criu_style")

    async def use(host: PluginHost) -> None:
        await host.run_all(Hook.PAUSE_DEVICES, 4711)
        assert host.inventory_names == ["criu_style"]
        assert [(used.name, used.version) for used in host.used] == [("criu_style", "0.2.0")]
        assert await host.claim(Hook.DUMP_EXT_FILE, 0, 6) is None
        assert await host.claim(Hook.DUMP_EXT_FILE, 0, 7) is not None

    run_with_host(lib, use, result=-3)
    assert int.from_bytes((lib.cache / "criu_style.img").read_bytes(), "little") == 4711
    assert "criu_style: exit 0 -3" in lib.messages()


@needs_compiler
def test_a_plugin_from_before_descriptors_is_called_by_its_functions_names(lib: PluginFolder) -> None:
    lib.compile("old")

    async def use(host: PluginHost) -> None:
        assert host.plugins[0].hooks == {
            Hook.DUMP_EXT_FILE,
            Hook.RESTORE_EXT_FILE,
            Hook.UPDATE_VMA_MAP,
            Hook.RESUME_DEVICES_LATE,
            Hook.POST_FORKING,
        }
        result = await host.claim(Hook.DUMP_EXT_FILE, 0, 3)
        assert result is not None
        assert result.plugin == "old"
        assert await host.claim(Hook.RESTORE_EXT_FILE, 4) is None
        with pytest.raises(errors.HookError, match=r"RESTORE_EXT_FILE failed: it returned -EBADF"):
            await host.claim(Hook.RESTORE_EXT_FILE, 3)
        unchanged = await host.claim(Hook.UPDATE_VMA_MAP, "/x", 1, 2)
        assert unchanged is not None
        assert unchanged.value is None
        await host.run_all(Hook.POST_FORKING)
        await host.run_all(Hook.RESUME_DEVICES_LATE, 12)  # says 5, which is no failure
        with pytest.raises(errors.HookError, match="RESUME_DEVICES_LATE of pid 13 failed: it returned -1"):
            await host.run_all(Hook.RESUME_DEVICES_LATE, 13)

    run_with_host(lib, use, stage=Stage.RESTORE)
    assert [m for m in lib.messages() if m.startswith("old: ")] == ["old: old init", "old: old fini"]


# ---- who is asked


@needs_compiler
def test_a_claim_stops_at_the_first_that_does_not_decline(lib: PluginFolder, calls: Path) -> None:
    for name in ("a", "b", "c"):
        lib.compile("recorder", f'-DNAME="{name}"', to=name)
    options = [f"{name}.to={calls}" for name in "abc"] + ["b.claim=DUMP_EXT_FILE", "c.claim=DUMP_EXT_FILE"]

    async def use(host: PluginHost) -> None:
        first = await host.claim(Hook.DUMP_EXT_FILE, 0, 1)
        assert first is not None
        assert first.plugin == "b"
        named = await host.claim(Hook.DUMP_EXT_FILE, 0, 2, only="c")
        assert named is not None
        assert named.plugin == "c"
        assert await host.claim(Hook.DUMP_EXT_FILE, 0, 3, only="a") is None
        assert [used.name for used in host.used] == ["b", "c"]
        assert host.inventory_names == []  # C plugins name themselves there

    run_with_host(lib, use, options=options)
    asked = [line.replace(" DUMP_EXT_FILE fd=1", "") for line in lines(calls) if "EXT_FILE" in line]
    assert asked == ["a: id=1", "b: id=1", "c: id=2", "a: id=3"]


@needs_compiler
def test_a_claim_that_fails_is_no_claim_declined(lib: PluginFolder, calls: Path) -> None:
    for name in ("a", "b"):
        lib.compile("recorder", f'-DNAME="{name}"', to=name)

    async def use(host: PluginHost) -> None:
        with pytest.raises(errors.HookError, match=r"plugin a: DUMP_EXT_FILE failed: it returned -EIO"):
            await host.claim(Hook.DUMP_EXT_FILE, 0, 1)

    run_with_host(lib, use, options=[f"a.to={calls}", f"b.to={calls}", "a.fail=DUMP_EXT_FILE", "b.claim=DUMP_EXT_FILE"])
    assert not any(line.startswith("b: DUMP") for line in lines(calls))


@needs_compiler
@pytest.mark.parametrize("hook", sorted(set(Hook) - CLAIMING))
def test_a_device_hook_goes_to_all_and_the_first_failure_is_reported(
    lib: PluginFolder, calls: Path, hook: Hook
) -> None:
    for name in ("a", "b", "c"):
        lib.compile("recorder", f'-DNAME="{name}"', to=name)
    options = [f"{name}.to={calls}" for name in "abc"] + [f"b.fail={hook.name}", f"c.fail={hook.name}"]
    args = () if hook in (Hook.POST_FORKING, Hook.RESTORE_INIT) else (1,)

    async def use(host: PluginHost) -> None:
        with pytest.raises(errors.HookError, match=rf"plugin b: {hook.name}.* failed: it returned -EIO") as caught:
            await host.run_all(hook, *args)
        about_a_task = hook not in (Hook.POST_FORKING, Hook.RESTORE_INIT, Hook.DUMP_FINISH)
        assert (caught.value.plugin, caught.value.hook) == ("b", hook.name)
        assert caught.value.pid == (1 if about_a_task else None)

    run_with_host(lib, use, options=options, result=-errno.EIO)
    written = lines(calls)
    assert sorted(line[0] for line in written if hook.name in line) == ["a", "b", "c"]
    assert [line for line in written if "exit" in line] == [f"{name}: exit 0 -5" for name in "cba"]


def test_two_device_plugins_serve_one_task_at_the_same_time(lib: PluginFolder) -> None:
    text = """
        arrived = {list}
        class {name}(DevicePlugin):
            name = '{name}'
            async def pause_devices(self, pid):
                os.environ['MET_{name}'] = '1'
                with trio.fail_after(5):
                    while 'MET_{other}' not in os.environ:
                        await trio.sleep(0.001)
    """
    import textwrap

    for name, other in (("A", "B"), ("B", "A")):
        lib.write(name, textwrap.dedent(text).format(name=name, other=other, list=[]))
    try:
        run_with_host(lib, lambda host: host.run_all(Hook.PAUSE_DEVICES, 1))
    finally:
        os.environ.pop("MET_A", None)
        os.environ.pop("MET_B", None)


# ---- Python


def test_a_python_hook_that_raises_has_failed_with_its_traceback_in_the_log(lib: PluginFolder) -> None:
    lib.write(
        "p",
        "class P(DevicePlugin):\n"
        "    async def pause_devices(self, pid): raise ValueError('broken')\n"
        "    def checkpoint_devices(self, pid): return {}['key']\n"
        "    def dump_ext_file(self, fd, ident): raise OSError(5, 'I/O error')\n"
        "    async def handle_device_vma(self, fd, stat): raise Declined\n",
    )

    async def use(host: PluginHost) -> None:
        with pytest.raises(errors.HookError, match="plugin p: PAUSE_DEVICES of pid 3 failed: ValueError: broken"):
            await host.run_all(Hook.PAUSE_DEVICES, 3)
        with pytest.raises(errors.HookError, match="plugin p: CHECKPOINT_DEVICES of pid 3 failed: KeyError: 'key'"):
            await host.run_all(Hook.CHECKPOINT_DEVICES, 3)
        with pytest.raises(errors.HookError, match=r"plugin p: DUMP_EXT_FILE failed: OSError: .* I/O error"):
            await host.claim(Hook.DUMP_EXT_FILE, 0, 1)
        assert await host.claim(Hook.HANDLE_DEVICE_VMA, 0, os.fstat(0)) is None

    run_with_host(lib, use)
    traced = [record.exc_info[0] for record in lib.records if record.exc_info]
    assert traced == [ValueError, KeyError, OSError]


def test_python_hooks_claim_and_give_descriptors(lib: PluginFolder) -> None:
    lib.write(
        "p",
        "class P(DevicePlugin):\n"
        "    async def dump_ext_file(self, fd, ident):\n        await trio.sleep(0)\n"
        "    def restore_ext_file(self, ident):\n"
        "        if ident == 1: raise RetryLater\n"
        "        return os.open('/dev/null', os.O_RDONLY) if ident == 2 else None\n"
        "    def update_vma_map(self, path, address, pgoff): return VmaUpdate(pgoff + 1)\n",
    )

    async def use(host: PluginHost) -> None:
        assert host.used == []
        claimed = await host.claim(Hook.DUMP_EXT_FILE, 0, 1)
        assert claimed is not None
        assert [(used.name, used.version) for used in host.used] == [("p", "0.3.0")]
        assert host.inventory_names == ["p"]
        with pytest.raises(RetryLater):
            await host.claim(Hook.RESTORE_EXT_FILE, 1)
        given = await host.claim(Hook.RESTORE_EXT_FILE, 2)
        assert given is not None
        os.close(given.value)
        with pytest.raises(errors.HookError, match="it gave None instead of a descriptor"):
            await host.claim(Hook.RESTORE_EXT_FILE, 3)
        moved = await host.claim(Hook.UPDATE_VMA_MAP, "/x", 0, 4)
        assert moved is not None
        assert moved.value == VmaUpdate(5, -1)

    run_with_host(lib, use)


def test_an_error_that_needs_a_person_stays_one(lib: PluginFolder) -> None:
    lib.write(
        "p",
        "from gpurestore.errors import NeedsPersonError\nclass P(DevicePlugin):\n"
        "    def pause_devices(self, pid): raise NeedsPersonError('look at the GPU')\n",
    )

    async def use(host: PluginHost) -> None:
        with pytest.raises(errors.NeedsPersonError, match="look at the GPU"):
            await host.run_all(Hook.PAUSE_DEVICES, 3)

    run_with_host(lib, use)


def test_every_hook_has_a_span_on_its_plugins_track(lib: PluginFolder) -> None:
    from gpurestore.pipeline.trace import Trace

    lib.write("p", "class P(DevicePlugin):\n    def pause_devices(self, pid): pass\n    def post_forking(self): pass\n")
    spans = Trace()

    async def use(host: PluginHost) -> None:
        await host.run_all(Hook.PAUSE_DEVICES, 3, span=spans.span)
        await host.run_all(Hook.POST_FORKING, span=spans.span)

    run_with_host(lib, use)
    seen = [(span.name, span.track, span.args) for span in spans.spans]
    assert seen == [("PAUSE_DEVICES", "plugin p", {"pid": 3}), ("POST_FORKING", "plugin p", {})]
