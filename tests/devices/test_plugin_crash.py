"""A C plugin that dies by a signal takes the tool with it, but not without saying which plugin it was."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest
from support.plugins import compile_plugin
from support.victims import have_compiler

pytestmark = pytest.mark.skipif(not have_compiler(), reason="no gcc to compile plugins with")

SCRIPT = """
import logging, sys, trio
from pathlib import Path
from gpurestore.cli.options import set_up_log
from gpurestore.devplugins.api import Hook, HookContext, Stage
from gpurestore.devplugins.host import PluginHost

async def main(lib, log, pid):
    set_up_log(Path(log), 0)
    host = PluginHost(Path(lib))
    await host.start(HookContext(stage=Stage.DUMP, images_dir=Path(lib), open_image=lambda name: -1))
    await host.run_all(Hook.CHECKPOINT_DEVICES, int(pid))
    await host.stop(0)

trio.run(main, *sys.argv[1:])
"""


def crash(tmp_path: Path, pid: int, *interpreter: str) -> tuple[subprocess.CompletedProcess[str], str]:
    compile_plugin("crashing", tmp_path / "crashing.so")
    log = tmp_path / "log"
    command = [sys.executable, *interpreter, "-c", SCRIPT, str(tmp_path), str(log), str(pid)]
    done = subprocess.run(
        ["/bin/sh", "-c", 'ulimit -c 0; exec "$@"', "sh", *command], capture_output=True, text=True, check=False
    )
    return done, log.read_text()


@pytest.mark.parametrize(
    ("pid", "number", "how"),
    [
        (1, signal.SIGSEGV, "in CHECKPOINT_DEVICES of pid 1: SIGSEGV at address 0x0;"),
        (2, signal.SIGABRT, "in CHECKPOINT_DEVICES of pid 2: SIGABRT;"),
        (3, signal.SIGSEGV, "in CHECKPOINT_DEVICES of pid 3: SIGSEGV at address 0x"),  # no stack left
        (4, signal.SIGFPE, "in CHECKPOINT_DEVICES of pid 4: SIGFPE;"),
        (5, signal.SIGSEGV, "in a thread of its own: SIGSEGV at address 0x0;"),
    ],
)
def test_a_crash_in_a_hook_is_reported_with_plugin_and_hook(
    tmp_path: Path, pid: int, number: signal.Signals, how: str
) -> None:
    done, log = crash(tmp_path, pid)
    assert done.returncode == -number, done.stderr
    message = f"gpurestore: plugin crashing crashed {how}"
    assert message in done.stderr
    assert message in log


def test_pythons_own_report_of_crashes_still_comes(tmp_path: Path) -> None:
    done, _ = crash(tmp_path, 1, "-X", "faulthandler")
    assert done.returncode == -signal.SIGSEGV
    assert "gpurestore: plugin crashing crashed" in done.stderr
    assert "Fatal Python error: Segmentation fault" in done.stderr


def test_a_crash_that_is_no_plugins_fault_is_not_blamed_on_one(tmp_path: Path) -> None:
    compile_plugin("crashing", tmp_path / "crashing.so")
    script = SCRIPT.replace("await host.run_all", "import os, signal; os.kill(os.getpid(), signal.SIGSEGV); #")
    command = [sys.executable, "-c", script, str(tmp_path), str(tmp_path / "log"), "1"]
    done = subprocess.run(
        ["/bin/sh", "-c", 'ulimit -c 0; exec "$@"', "sh", *command], capture_output=True, text=True, check=False
    )
    assert done.returncode == -signal.SIGSEGV
    assert "crashed" not in done.stderr


def test_a_plugin_that_does_not_crash_is_not_mentioned(tmp_path: Path) -> None:
    done, log = crash(tmp_path, 0)
    assert (done.returncode, done.stderr) == (0, "")
    assert "crashed" not in log
