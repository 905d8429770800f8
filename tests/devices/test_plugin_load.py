"""Loading plugins: three kinds, and every way in which it fails."""

from __future__ import annotations

import errno
import logging
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import trio
from support.plugins import PluginFolder, context_of, with_host
from support.victims import have_compiler

import gpurestore
from gpurestore import errors
from gpurestore.cli import main
from gpurestore.devplugins.api import API_VERSION, CLAIMING, HOST_CAPABILITIES, Capability, Hook, Stage
from gpurestore.devplugins.discover import entry_points
from gpurestore.devplugins.host import PluginHost, result_of
from gpurestore.devplugins.load import survey
from gpurestore.devplugins.options import sort_options

needs_compiler = pytest.mark.skipif(not have_compiler(), reason="no gcc to compile plugins with")


async def names(host: PluginHost) -> list[tuple[str, str, tuple[int, int, int]]]:
    await trio.lowlevel.checkpoint()
    return [(plugin.name, plugin.kind, plugin.version) for plugin in host.plugins]


def load(lib: PluginFolder, **options: Any) -> list[tuple[str, str, tuple[int, int, int]]]:
    found: list[tuple[str, str, tuple[int, int, int]]] = trio.run(lambda: with_host(lib, names, **options))
    return found


# ---- what loads


@needs_compiler
def test_all_three_kinds_load_side_by_side(lib: PluginFolder) -> None:
    lib.compile("criu_style")
    lib.compile("recorder")
    lib.compile("old")
    lib.write("snake", "class Snake(DevicePlugin):\n    def post_forking(self): pass\n")
    assert load(lib) == [
        ("criu_style", "C", (0, 2, 0)),
        ("old", "C, without descriptor", (0, 1, 0)),
        ("recorder", "C", (0, 3, 0)),
        ("snake", "Python", (0, 3, 0)),
    ]
    assert any("has no descriptor: taken for one of version 0.1.0" in message for message in lib.messages())


@needs_compiler
@pytest.mark.parametrize(("version", "nr_hooks"), [("0x000100", 15), ("0x000200", 15), ("0x000300", 17)])
def test_each_version_of_the_interface_loads(lib: PluginFolder, version: str, nr_hooks: int) -> None:
    lib.compile("recorder", f"-DCRIU_PLUGIN_VERSION={version}")

    async def count(host: PluginHost) -> int:
        await trio.lowlevel.checkpoint()
        return len(host.plugins[0].hooks)

    assert trio.run(lambda: with_host(lib, count)) == nr_hooks


@needs_compiler
@pytest.mark.parametrize("nr_hooks", [0, 1, 9, 15])
def test_a_shorter_table_of_hooks_is_not_read_past_its_end(lib: PluginFolder, nr_hooks: int) -> None:
    lib.compile("odd", f"-DMAX_HOOKS={nr_hooks}", "-DTABLE=MAX_HOOKS")
    assert load(lib) == [("odd", "C", (0, 2, 0))]


def test_a_python_file_may_hold_several_plugins(lib: PluginFolder) -> None:
    lib.write(
        "two", "class A(DevicePlugin):\n    name='a'\nclass B(DevicePlugin):\n    name='b'\n    version=(0, 1, 0)\n"
    )
    assert load(lib) == [("a", "Python", (0, 3, 0)), ("b", "Python", (0, 1, 0))]


def test_a_python_file_may_say_that_it_cannot_matter_here(lib: PluginFolder) -> None:
    lib.write("shy", "def plugin():\n    raise Declined('no such device')\n")
    assert load(lib) == []
    rows = survey(lib.path)
    assert [(row.name, row.state, row.why) for row in rows] == [("shy", "idle", "no such device")]


def test_a_plugin_is_told_which_of_its_hooks_are_never_called(
    lib: PluginFolder, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    lib.write(
        "net",
        "class Net(DevicePlugin):\n    def update_inetsk(self, *_): pass\n    def pause_devices(self, pid): pass\n",
    )
    told = "hook UPDATE_INETSK is never called: this engine refuses trees with sockets with addresses"
    with caplog.at_level(logging.INFO, "gpurestore.plugin"):
        load(lib)
    assert caplog.messages == [f"plugin net: {told}"]
    assert [row.notes for row in survey(lib.path)] == [(told,)]
    assert main(["plugins", "-L", str(lib.path)]) == 0
    assert f"note    {told}" in capsys.readouterr().out


def test_files_that_are_no_plugins_are_left_alone(lib: PluginFolder) -> None:
    (lib.path / "notes.txt").write_text("no plugin")
    (lib.path / "_helper.py").write_text("raise SystemError")
    (lib.path / "libx.so.1").write_text("no plugin")
    assert load(lib) == []


def test_the_folder_is_taken_from_the_environment(lib: PluginFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    lib.write("snake", "class Snake(DevicePlugin): pass\n")
    monkeypatch.setenv("CRIU_LIBS_DIR", str(lib.path))
    assert [row.name for row in survey(None)] == ["snake"]


def test_no_plugins_cost_next_to_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lib: PluginFolder) -> None:
    monkeypatch.setattr("gpurestore.devplugins.discover.entry_points", entry_points)
    monkeypatch.setattr("gpurestore.devplugins.discover.GROUP", "gpurestore.no-such-group")
    monkeypatch.delenv("CRIU_LIBS_DIR", raising=False)
    monkeypatch.setattr("gpurestore.devplugins.discover.DEFAULT_FOLDER", tmp_path / "none")

    async def best_of(times: int) -> float:
        spent = []
        for _ in range(times):
            host = PluginHost()
            begin = time.thread_time()
            await host.start(context_of(tmp_path))
            await host.run_all(Hook.PAUSE_DEVICES, 1)
            await host.stop(0)
            spent.append(time.thread_time() - begin)
        return min(spent)

    assert trio.run(best_of, 5) < 0.005


def test_entry_points_are_read_as_importlib_reads_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from importlib.metadata import entry_points as known

    group = "[console_scripts]\ntool = tool:main\n\n[gpurestore.devplugins]\n# a comment\n"
    packages = {
        "one-1.0.dist-info": f"{group}one = one.plugin:Plugin\nuno=one:plugin [extra]\n\n[other]\nx = y:z\n",
        "two_words-2.dist-info": f"{group}two = two\n",
        "three-3.dist-info": "[console_scripts]\nthree = three:main\n",
    }
    for name, text in packages.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name.split('-')[0]}\nVersion: 1\n")
        (tmp_path / name / "entry_points.txt").write_text(text)
    monkeypatch.setattr(sys, "path", [str(tmp_path), str(tmp_path / "none")])
    expected = sorted((p.name, p.value.split(" ")[0]) for p in known(group="gpurestore.devplugins"))
    assert [(found.name, found.target) for found in entry_points()] == expected
    assert len(expected) == 3


def test_out_of_date_metadata_in_a_source_tree_gives_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, target in (("here/one.egg-info", "old:plugin"), ("there/one-1.0.dist-info", "new:plugin")):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "entry_points.txt").write_text(f"[gpurestore.devplugins]\none = {target}\n")
    monkeypatch.setattr(sys, "path", [str(tmp_path / "here"), str(tmp_path / "there")])
    assert [found.target for found in entry_points()] == ["new:plugin"]


def test_a_package_that_the_images_do_not_name_stays_unloaded(
    lib: PluginFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    from gpurestore.devplugins.discover import Found

    monkeypatch.setattr(
        "gpurestore.devplugins.discover.entry_points", lambda: [Found("far", target="no_such_module_at_all:plugin")]
    )
    assert load(lib, stage=Stage.RESTORE, needed=[]) == []
    with pytest.raises(errors.PluginOpenError, match=r"plugin far: cannot be opened .*No module named"):
        load(lib, stage=Stage.RESTORE, needed=["far"])


# ---- what does not


@needs_compiler
@pytest.mark.parametrize(
    ("flags", "error", "message"),
    [
        (["-DVERSION=0x000400"], errors.PluginVersionError, "it is of interface version 0.4.0; this host knows 0.3.0"),
        (["-DVERSION=0x010000"], errors.PluginVersionError, "it is of interface version 1.0.0; this host knows 0.3.0"),
        (["-DMAX_HOOKS=16"], errors.PluginHooksError, "it has 16 hooks; version 0.2.0 has 15"),
        (["-DVERSION=0x000300", "-DMAX_HOOKS=18"], errors.PluginHooksError, "it has 18 hooks; version 0.3.0 has 17"),
        (["-DMAX_HOOKS=400000", "-DTABLE=15"], errors.PluginHooksError, "it has 400000 hooks"),
        (["-DTABLE=3"], errors.PluginEntryError, "CR_PLUGIN_DESC has 56 bytes, too few for 15 hooks"),
        (["-DNAME=NULL"], errors.PluginEntryError, "CR_PLUGIN_DESC has no name"),
        (["-DEMPTY"], errors.PluginEntryError, "neither CR_PLUGIN_DESC nor a function by the name of a hook"),
        (["-DNEEDS=compel_wait_task"], errors.PluginSymbolError, "it needs the symbol compel_wait_task, which this"),
        (["-DINIT_RETURNS=-1"], errors.PluginInitError, "its init returned -1; its own messages are in the log"),
        (["-DINIT_RETURNS=-19"], errors.PluginInitError, r"its init returned -ENODEV \(No such device\)"),
    ],
)
def test_a_c_plugin_that_cannot_be_loaded_says_why(
    lib: PluginFolder, flags: list[str], error: type[errors.PluginLoadError], message: str
) -> None:
    lib.compile("odd", *flags)
    with pytest.raises(error, match=message) as caught:
        load(lib)
    assert type(caught.value) is error
    if error is errors.PluginInitError:
        assert [row.state for row in survey(lib.path)] == ["loaded"]  # only init fails
    else:
        assert [(row.state, row.error) for row in survey(lib.path)] == [("failed", error.__name__)]


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        ("1/0", errors.PluginOpenError, "cannot be opened: ZeroDivisionError: division by zero"),
        ("def (", errors.PluginOpenError, "cannot be opened: SyntaxError"),
        ("import no_such_module", errors.PluginOpenError, "cannot be opened: ModuleNotFoundError"),
        ("x = 1", errors.PluginEntryError, "it defines neither 'plugin' nor a class below gpurestore's DevicePlugin"),
        ("plugin = lambda: 5", errors.PluginEntryError, "gives a int, which is not below gpurestore's DevicePlugin"),
        (
            "class P(DevicePlugin): version = '1'",
            errors.PluginEntryError,
            "its version is '1' instead of three numbers",
        ),
        ("class P(DevicePlugin): version = (0, 4, 0)", errors.PluginVersionError, "interface version 0.4.0; this host"),
        ("class P(DevicePlugin): needs = Capability(1 << 20)", errors.PluginFlagsError, "does not offer: 0x100000"),
        (
            "class P(DevicePlugin):\n    def negotiate(self, version, flags): raise ValueError('too old for me')",
            errors.PluginRefusedError,
            "it refuses this host: too old for me",
        ),
        (
            "class P(DevicePlugin):\n    def init(self, context): raise OSError(19, 'No such device')",
            errors.PluginInitError,
            "its init failed: OSError: .*No such device",
        ),
        (
            "class P(DevicePlugin):\n    async def init(self, context): raise KeyError('gone')",
            errors.PluginInitError,
            "its init failed: KeyError: 'gone'",
        ),
    ],
)
def test_a_python_plugin_that_cannot_be_loaded_says_why(
    lib: PluginFolder, text: str, error: type[errors.PluginLoadError], message: str
) -> None:
    lib.write("odd", text)
    with pytest.raises(error, match=message) as caught:
        load(lib)
    assert type(caught.value) is error
    assert "gpurestore_plugin_odd" not in sys.modules


def test_a_file_that_is_no_shared_object_cannot_be_opened(lib: PluginFolder) -> None:
    (lib.path / "text.so").write_text("this is text")
    with pytest.raises(
        errors.PluginOpenError, match=r"text.so: cannot be opened: .*(file too short|invalid ELF header)"
    ):
        load(lib)


def test_a_folder_or_file_that_is_not_there_is_not_found(lib: PluginFolder) -> None:
    with pytest.raises(errors.PluginNotFoundError, match="there is no such folder"):
        survey(lib.path / "none")
    (lib.path / "dangling.so").symlink_to("nowhere")
    with pytest.raises(errors.PluginNotFoundError, match=r"dangling\.so: there is no such file"):
        load(lib)


@needs_compiler
def test_a_name_that_is_taken_twice_is_refused(lib: PluginFolder) -> None:
    lib.compile("odd")
    lib.write("z", "class P(DevicePlugin):\n    name = 'odd'\n")
    with pytest.raises(
        errors.PluginNameError, match=r"plugin odd: the name is taken twice, the second time by .*z\.py"
    ):
        load(lib)
    assert [row.error for row in survey(lib.path)] == ["", "PluginNameError"]


@needs_compiler
def test_a_plugin_that_refuses_to_unload_is_named_and_does_no_harm(lib: PluginFolder) -> None:
    lib.compile("odd", "-Wl,-z,nodelete")

    async def stop(host: PluginHost) -> list[errors.PluginUnloadError]:
        return await host.stop(0)

    [error] = trio.run(lambda: with_host(lib, stop))
    assert "plugin odd: it stays in memory after dlclose" in str(error)
    assert [(row.state, row.error) for row in survey(lib.path)] == [("loaded", "PluginUnloadError")]


@needs_compiler
def test_a_stranger_in_crius_own_folder_is_passed_over(lib: PluginFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    lib.compile("odd", "-DNEEDS=compel_wait_task")
    lib.write("snake", "class Snake(DevicePlugin): pass\n")
    monkeypatch.delenv("CRIU_LIBS_DIR", raising=False)
    monkeypatch.setattr("gpurestore.devplugins.discover.DEFAULT_FOLDER", lib.path)
    assert load(lib, is_named=False) == [("snake", "Python", (0, 3, 0))]
    assert any("compel_wait_task" in message and "passed over" in message for message in lib.messages())
    with pytest.raises(errors.PluginMissingError, match=r"odd \(it needs the symbol compel_wait_task"):
        load(lib, is_named=False, stage=Stage.RESTORE, needed=["odd"])


@needs_compiler
def test_a_failure_unwinds_what_was_loaded_in_reverse(lib: PluginFolder, tmp_path: Path) -> None:
    calls = tmp_path / "calls"
    for name in ("a", "b"):
        lib.compile("recorder", f'-DNAME="{name}"', to=name)
    lib.compile("odd", "-DINIT_RETURNS=-5", to="c")
    lib.compile("recorder", '-DNAME="d"', to="d")
    with pytest.raises(errors.PluginInitError):
        load(lib, options=[f"{name}.to={calls}" for name in "abd"])
    lines = calls.read_text().splitlines()
    assert lines == ["a: init 0", "b: init 0", f"b: exit 0 -{errno.EIO}", f"a: exit 0 -{errno.EIO}"]


# ---- names in the images


def test_images_that_need_a_plugin_which_is_not_there_are_refused(lib: PluginFolder) -> None:
    lib.write("snake", "class Snake(DevicePlugin):\n    aliases = ('viper',)\n")
    assert len(load(lib, stage=Stage.RESTORE, needed=["snake", "viper"])) == 1
    with pytest.raises(errors.PluginMissingError, match="need plugins that are not there: other; there are: snake"):
        load(lib, stage=Stage.RESTORE, needed=["snake", "other"])


def test_a_plugin_that_sits_out_is_missed_with_its_reason(lib: PluginFolder) -> None:
    lib.write("snake", "class Snake(DevicePlugin):\n    def init(self, context): raise Declined('no device here')\n")
    assert load(lib) == []
    with pytest.raises(errors.PluginMissingError, match=r"snake \(no device here\)"):
        load(lib, stage=Stage.RESTORE, needed=["snake"])


@needs_compiler
def test_a_c_plugin_takes_its_name_off_the_inventory(lib: PluginFolder) -> None:
    lib.compile("criu_style")
    load(lib, stage=Stage.RESTORE, needed=["criu_style"])
    assert "criu_style: needed: 1" in lib.messages()
    load(lib, stage=Stage.RESTORE, needed=[])
    assert "criu_style: needed: 0" in lib.messages()


# ---- negotiation and options


def test_capability_flags_are_distinct_bits_and_all_offered() -> None:
    assert all(flag.bit_count() == 1 for flag in Capability)
    assert len({int(flag) for flag in Capability}) == len(list(Capability))
    assert sum(Capability) == HOST_CAPABILITIES


def test_a_plugin_is_offered_the_hosts_version_and_flags(lib: PluginFolder) -> None:
    lib.write(
        "snake",
        "class Snake(DevicePlugin):\n    needs = Capability.OPTIONS\n"
        "    def negotiate(self, version, flags): raise ValueError(f'{version} {int(flags)}')\n",
    )
    with pytest.raises(errors.PluginRefusedError) as caught:
        load(lib)
    assert str(caught.value).endswith(f"{API_VERSION} {int(HOST_CAPABILITIES)}")


def test_options_go_to_the_plugin_with_the_longest_name_that_fits() -> None:
    sorted_options = sort_options(["a.x=1", "a.b.y", "a.b.z==", "a.x=2"], ["a", "a.b"])
    assert sorted_options == {"a": {"x": "2"}, "a.b": {"y": None, "z": "="}}


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("b.x=1", r"--plugin-option b\.x=1: there is no plugin b; loaded: a"),
        ("x", r"PLUGIN\.NAME\[=VALUE\] is expected"),
        ("a.=1", "NAME is empty"),
        (".x", "is expected"),
        ("", "is expected"),
    ],
)
def test_an_option_for_nobody_is_an_error_of_usage(lib: PluginFolder, option: str, message: str) -> None:
    lib.write("a", "class A(DevicePlugin): pass\n")
    with pytest.raises(errors.PluginOptionError, match=message) as caught:
        load(lib, options=[option])
    assert caught.value.exit_code == 2


def test_a_python_plugin_gets_its_own_options(lib: PluginFolder) -> None:
    lib.write("a", "class A(DevicePlugin):\n    def init(self, context): raise ValueError(dict(context.options))\n")
    lib.write("b", "class B(DevicePlugin): pass\n")
    with pytest.raises(errors.PluginInitError, match=r"\{'x': '1', 'y': None\}"):
        load(lib, options=["a.x=1", "b.z=3", "a.y"])


# ---- the command


@needs_compiler
def test_the_command_lists_plugins_and_failures(lib: PluginFolder) -> None:
    import json

    lib.compile("recorder")
    lib.compile("odd", "-DVERSION=0x000400")
    command = [sys.executable, "-m", "gpurestore", "plugins", "-L", str(lib.path)]
    plain = subprocess.run(command, capture_output=True, text=True, check=False)
    assert plain.returncode == 1, plain.stderr
    assert "odd 0.4.0 (C): NOT LOADED" in plain.stdout
    assert "recorder 0.3.0 (C)" in plain.stdout
    assert "RESUME_DEVICES_LATE" in plain.stdout
    rows = json.loads(subprocess.run([*command, "--json"], capture_output=True, text=True, check=False).stdout)[
        "plugins"
    ]
    by_name = {row["name"]: row for row in rows}
    assert by_name["odd"]["error"] == "PluginVersionError"
    assert len(by_name["recorder"]["hooks"]) == len(Hook)
    assert by_name["recorder"]["stages"] == ["DUMP", "PRE_DUMP", "RESTORE"]


def test_the_command_is_content_without_plugins(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "gpurestore", "plugins", "-L", str(tmp_path / "none")]
    missing = subprocess.run(command, capture_output=True, text=True, check=False)
    assert missing.returncode == 1
    assert missing.stderr.startswith("gpurestore: plugins: plugin ")
    assert missing.stderr.count("\n") == 1


def test_the_header_is_installed_beside_the_package() -> None:
    assert os.path.isfile(os.path.join(gpurestore.include_dir(), "gpurestore-plugin.h"))


@needs_compiler
@pytest.mark.parametrize(
    ("error", "result"),
    [
        (None, 0),
        (errors.CoreError(errno.ENOSPC, "writing"), -errno.ENOSPC),
        (OSError(errno.EPERM, "no"), -errno.EPERM),
        (errors.CancelledError("stop"), -errno.ECANCELED),
        (errors.GpurestoreError("other"), -errno.EIO),
        (BaseExceptionGroup("many", [KeyboardInterrupt()]), -errno.ECANCELED),
    ],
)
def test_exit_is_told_a_negative_errno(error: BaseException | None, result: int) -> None:
    assert result_of(error) == result


def test_the_table_of_hooks_in_the_documentation_is_whole() -> None:
    text = (Path(__file__).parent.parent.parent / "docs" / "plugins.md").read_text()
    rows = [
        line.split("|") for line in text.splitlines() if line.startswith("| ") and line.split("|")[1].strip().isdigit()
    ]
    assert [(int(row[1]), row[2].strip(), row[7].strip()) for row in rows] == [
        (int(hook), hook.name, "yes" if hook in CLAIMING else "") for hook in Hook
    ]
    for error in vars(errors).values():
        if isinstance(error, type) and issubclass(error, errors.PluginError) and error is not errors.PluginError:
            assert error.__name__ in text
