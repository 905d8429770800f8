"""The command line: options, exit codes, and one clear line for whatever goes wrong."""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import threading
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import trio
from support.processes import wait_until

import gpurestore
from gpurestore.cli import COMMANDS, build_parser, main
from gpurestore.cli.options import to_data
from gpurestore.errors import Finding, GpurestoreError, NeedsPersonError, RestoreCheckError, UsageError
from gpurestore.pipeline.devices import PluginSettings
from gpurestore.pipeline.graph import Graph, Node


@dataclass(frozen=True)
class Result:
    root_pid: int
    images: Path


class FakePipeline:
    """Stands for a pipeline module: records the call, then returns, raises or waits."""

    def __init__(self, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
        self.error: BaseException | None = None
        self.wait_forever = False
        self.cleaned = False
        module = ModuleType(f"gpurestore.pipeline.{name}")
        setattr(module, name, self.run)
        monkeypatch.setitem(sys.modules, module.__name__, module)

    async def run(self, *args: Any, **kwargs: Any) -> Result:
        self.calls.append((args, kwargs))
        if self.error is not None:
            raise self.error
        if self.wait_forever:
            try:
                await trio.sleep_forever()
            finally:
                self.cleaned = True
        await trio.lowlevel.checkpoint()
        return Result(4321, Path("/images"))


@pytest.fixture
def dump(monkeypatch: pytest.MonkeyPatch) -> FakePipeline:
    return FakePipeline("dump", monkeypatch)


@pytest.fixture
def restore(monkeypatch: pytest.MonkeyPatch) -> FakePipeline:
    monkeypatch.setattr("gpurestore.capabilities.effective", lambda: (1 << 64) - 1)
    return FakePipeline("restore", monkeypatch)


def exit_code_of(argv: list[str]) -> int:
    with pytest.raises(SystemExit) as caught:
        main(argv)
    assert isinstance(caught.value.code, int)
    return caught.value.code


def test_dump_hands_every_option_to_the_pipeline(dump: FakePipeline) -> None:
    method = ["--observe", "0.5", "--compress", "zstd:3", "--criu-compatible", "--direct-io", "--no-sync"]
    plugins = ["-L", "lib", "--plugin-option", "a.b=c", "--plugin-option", "a.d", "--hook-timeout", "2.5"]
    assert (
        main(["dump", "-t", "12", "-D", "dir", "-R", "-j", "--jobs", "3", "--trace", "t.json", *method, *plugins]) == 0
    )
    args, kwargs = dump.calls[0]
    assert args == (12, Path("dir"))
    assert kwargs == {
        "leave_running": True,
        "leave_stopped": False,
        "shell_job": True,
        "observe_s": 0.5,
        "criu_compatible": True,
        "jobs": 3,
        "compress": "zstd:3",
        "direct_io": True,
        "sync": False,
        "trace": Path("t.json"),
        "progress": None,
        "plugins": PluginSettings(Path("lib"), ("a.b=c", "a.d"), 2.5),
    }


def test_restore_is_parallel_and_verified_unless_told_otherwise(restore: FakePipeline) -> None:
    assert main(["restore", "-D", "dir", "-d"]) == 0
    assert main(["restore", "-D", "dir", "-d", "--serial", "--no-verify", "--pidfile", "p"]) == 0
    first, second = restore.calls[0][1], restore.calls[1][1]
    assert (first["serial"], first["verify"], first["pidfile"], first["detached"]) == (False, True, None, True)
    assert (second["serial"], second["verify"], second["pidfile"]) == (True, False, Path("p"))


def test_what_belongs_to_a_lazy_restore_is_refused_without_it(
    restore: FakePipeline, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["restore", "-D", "dir", "-d", "--lazy", "--fault-order", "f", "--record-faults", "g"]) == 0
    options = restore.calls[0][1]
    assert (options["lazy"], options["fault_order"], options["record_faults"]) == (True, Path("f"), Path("g"))
    assert main(["restore", "-D", "dir", "-d", "--fault-order", "f"]) == 2
    assert "--lazy" in capsys.readouterr().err
    assert len(restore.calls) == 1


@pytest.fixture
def previewed(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Path, dict[str, Any]]]:
    """Calls of the preview, which is a fake."""
    calls: list[tuple[Path, dict[str, Any]]] = []

    def preview(folder: Path, **options: Any) -> SimpleNamespace:
        calls.append((folder, options))
        return SimpleNamespace(text=f"plan of {folder}\n", graph=Graph({Node("fork"): ()}))

    module = ModuleType("gpurestore.pipeline.preview")
    monkeypatch.setattr(module, "preview", preview, raising=False)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return calls


@pytest.mark.usefixtures("previewed")
def test_restore_without_the_right_says_which_and_how_to_get_it(
    restore: FakePipeline, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("gpurestore.capabilities.effective", lambda: 0)
    assert main(["restore", "-D", "dir", "-d"]) == 1
    assert "needs CAP_CHECKPOINT_RESTORE" in capsys.readouterr().err
    assert restore.calls == []
    assert main(["restore", "-D", "dir", "--dry-run"]) == 0


def test_json_is_one_object_on_one_line(restore: FakePipeline, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["restore", "-D", "dir", "-d", "--json"]) == 0
    out = capsys.readouterr().out
    assert out.count("\n") == 1
    assert json.loads(out) == {"root_pid": 4321, "images": "/images"}


def test_a_dry_run_prints_the_plan_and_restores_nothing(
    restore: FakePipeline, previewed: list[tuple[Path, dict[str, Any]]], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["restore", "-D", "dir", "--dry-run", "-L", "plugins", "--jobs", "3"]) == 0
    assert capsys.readouterr().out == "plan of dir\n"
    assert restore.calls == []
    ((folder, options),) = previewed
    assert folder == Path("dir")
    wanted = {"libdir": Path("plugins"), "shell_job": False, "verify": True, "jobs": 3, "lazy": None}
    assert {name: options[name] for name in wanted} == wanted


@pytest.mark.usefixtures("previewed")
def test_the_graph_is_drawn_only_by_a_dry_run(
    restore: FakePipeline, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    picture = tmp_path / "graph.dot"
    assert main(["restore", "-D", "dir", "-d", "--graph", str(picture)]) == 2
    assert "--graph draws what --dry-run prints" in capsys.readouterr().err
    assert restore.calls == []
    assert main(["restore", "-D", "dir", "--dry-run", "--graph", str(picture)]) == 0
    assert "fork" in picture.read_text()


@pytest.mark.parametrize(
    ("argv", "complaint"),
    [
        (["dump", "-D", "d"], "gpurestore: dump: the following arguments are required: -t/--tree"),
        (["dump", "-t", "-5", "-D", "d"], "gpurestore: dump: argument -t/--tree: "),
        (["dump", "-t", "0", "-D", "d"], "gpurestore: dump: argument -t/--tree: '0' is not a whole number above 0"),
        (["dump", "-t", "1x", "-D", "d"], "gpurestore: dump: argument -t/--tree: '1x' is not a whole number above 0"),
        (["dump", "-t", "1", "-D", "d", "-R", "-s"], "gpurestore: dump: argument -s/--leave-stopped: not allowed with"),
        (["restore", "-D", "d", "--parallel", "--serial"], "gpurestore: restore: argument --serial: not allowed with"),
        (["restore", "-D", "d", "--jobs", "0"], "gpurestore: restore: argument --jobs: '0' is not a whole number"),
        (["dump", "-t", "1", "-D", "d", "--hook-timeout", "0"], "gpurestore: dump: argument --hook-timeout: "),
        (["fly"], "gpurestore: argument COMMAND: invalid choice: 'fly'"),
        ([], "gpurestore: the following arguments are required: COMMAND"),
    ],
)
def test_wrong_usage_is_one_line_and_exit_code_2(
    argv: list[str], complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert exit_code_of(argv) == 2
    err = capsys.readouterr().err
    assert err.startswith(complaint)
    assert err.count("\n") == 1


def caused_by(error: BaseException, cause: BaseException) -> BaseException:
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("error", "line", "code"),
    [
        (GpurestoreError("no space left\nin /x"), "gpurestore: dump: no space left in /x\n", 1),
        (UsageError("not empty"), "gpurestore: dump: not empty\n", 2),
        (NeedsPersonError("kill 12"), "gpurestore: dump: kill 12\n", 3),
        (RestoreCheckError("bad", [Finding("pid 1", "a", "b")]), "gpurestore: dump: bad; pid 1: a: b\n", 1),
        (KeyboardInterrupt(), "gpurestore: dump: interrupted\n", 130),
        (
            caused_by(RuntimeError("Error calling __set_name__"), KeyboardInterrupt()),
            "gpurestore: dump: interrupted\n",
            130,
        ),
        (ExceptionGroup("g", [GpurestoreError("first"), GpurestoreError("second")]), "gpurestore: dump: first\n", 1),
        (
            ExceptionGroup("g", [GpurestoreError("a"), ExceptionGroup("h", [NeedsPersonError("b")])]),
            "gpurestore: dump: b\n",
            3,
        ),
        (
            ExceptionGroup("g", [GpurestoreError("a"), ValueError("b")]),
            "gpurestore: dump: internal error, please report it: ValueError: b\n",
            1,
        ),
    ],
)
def test_every_failure_is_one_line_with_its_exit_code(
    error: BaseException, line: str, code: int, dump: FakePipeline, capsys: pytest.CaptureFixture[str]
) -> None:
    dump.error = error
    assert main(["dump", "-t", "12", "-D", "dir"]) == code
    assert capsys.readouterr().err == line


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_cancels_the_operation_after_its_cleanup(
    number: signal.Signals, dump: FakePipeline, capsys: pytest.CaptureFixture[str]
) -> None:
    dump.wait_forever = True

    def interrupt() -> None:
        wait_until(lambda: bool(dump.calls), "the operation is under way")
        os.kill(os.getpid(), number)

    helper = threading.Thread(target=interrupt)
    helper.start()
    code = main(["dump", "-t", "12", "-D", "dir"])
    helper.join()
    assert code == 130
    assert dump.cleaned
    err = capsys.readouterr().err
    assert err == f"gpurestore: dump: interrupted by {number.name}; everything was put back as it was before\n"


def test_the_log_goes_to_a_file_in_the_current_folder(
    dump: FakePipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import logging

    monkeypatch.chdir(tmp_path)
    log = logging.getLogger("gpurestore")
    monkeypatch.setattr(log, "handlers", [])
    assert main(["dump", "-t", "12", "-D", "dir", "-o", "dump.log", "-vv"]) == 0
    log.debug("every detail")
    for handler in log.handlers:
        handler.close()
    assert "DEBUG    every detail" in (tmp_path / "dump.log").read_text()


def test_a_log_that_cannot_be_written_is_a_usage_error(
    dump: FakePipeline, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["dump", "-t", "12", "-D", "dir", "-o", str(tmp_path / "none" / "log")]) == 2
    assert "cannot write the log" in capsys.readouterr().err
    assert dump.calls == []


def test_results_become_plain_json_values() -> None:
    assert to_data(
        {"a": (Path("/x"), b"\x01", {1: Result(1, Path("y"))}, None, 1.5), "b": Finding("here", "it", "no")}
    ) == {
        "a": ["/x", "01", {"1": {"root_pid": 1, "images": "y"}}, None, 1.5],
        "b": {"where": "here", "what": "it", "why": "no"},
    }


def test_the_public_names_are_there_and_others_are_not() -> None:
    assert gpurestore.GpurestoreError is GpurestoreError
    assert "dump" in dir(gpurestore)
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = gpurestore.nothing


def test_one_commands_parser_is_that_of_the_whole_command_line() -> None:
    for name in COMMANDS:
        whole, alone = (_commands_of(build_parser(word)) for word in (None, name))
        assert tuple(whole) == COMMANDS and tuple(alone) == (name,)
        assert whole[name].format_help() == alone[name].format_help()
    assert tuple(_commands_of(build_parser("--version"))) == COMMANDS


def _commands_of(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    return next(action.choices for action in parser._actions if isinstance(action.choices, dict))


def test_the_version_loads_nothing_heavy() -> None:
    code = (
        "import sys; before = set(sys.modules)\n"
        "from gpurestore.cli import main\n"
        "try: main(['--version'])\n"
        "except SystemExit: pass\n"
        "print(sorted({m.split('.')[0] for m in set(sys.modules) - before} & "
        "{'trio', 'cffi', 'google', 'xxhash', 'logging', 'json', 'subprocess', 'numpy', 'asyncio'}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == f"gpurestore {gpurestore.__version__}\n[]\n"


def test_python_dash_m_is_the_same_command() -> None:
    done = subprocess.run([sys.executable, "-m", "gpurestore", "fly"], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("gpurestore: argument COMMAND")
