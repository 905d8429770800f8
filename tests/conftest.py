"""Fixtures of all tests. A failing test that ran the tool shows what the tool said and logged."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from collections.abc import Generator, Iterator
from pathlib import Path

import pytest
from hypothesis import settings
from support import namespaces_probe, processes
from support.tool import Tool
from support.victims import Compiler, Victims, have_compiler

from gpurestore import namespaces
from gpurestore.errors import GpurestoreError

KEEP = "GPURESTORE_KEEP_TEST_FOLDERS"

# How long an example takes says something about the machine, not about the code.
settings.register_profile("gpurestore", deadline=None)
settings.load_profile("gpurestore")


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> int | None:
    """An ordinary user's whole run moves into namespaces of its own, where live trees can be dumped and restored.

    Where the kernel forbids that, the tests that need it are skipped with the reason and the remedy.
    """
    if namespaces.may_restore() or config.option.collectonly:
        return None
    capture = config.pluginmanager.getplugin("capturemanager")
    if capture is not None:
        capture.suspend_global_capture(in_=True)
    try:
        return namespaces.run([sys.executable, "-m", "pytest", *config.invocation_params.args])
    except GpurestoreError:
        if capture is not None:
            capture.resume_global_capture()
        return None


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    tool = getattr(item, "funcargs", {}).get("tool")
    if report.failed and isinstance(tool, Tool) and tool.outcomes:
        report.sections.append(("what gpurestore said", tool.report()))
    return report


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder of its own that every user may enter (pytest's own is closed to others), removed afterwards."""
    path = Path(tempfile.mkdtemp(prefix="gpurestore-test-"))
    path.chmod(0o755)
    yield path
    if KEEP not in os.environ:
        shutil.rmtree(path, ignore_errors=True)


@pytest.fixture(scope="session")
def compiler() -> Iterator[Compiler]:
    """Compiles victims, each once."""
    if not have_compiler():
        pytest.skip("no gcc to compile victims with")
    path = Path(tempfile.mkdtemp(prefix="gpurestore-victims-"))
    path.chmod(0o755)
    yield Compiler(path)
    shutil.rmtree(path, ignore_errors=True)


@pytest.fixture
def victims(compiler: Compiler, folder: Path) -> Iterator[Victims]:
    """Starts victims; whatever is left of them and of the tool is ended afterwards."""
    processes.become_subreaper()
    group = Victims(compiler, folder)
    yield group
    group.end()


@pytest.fixture
def tool(folder: Path) -> Tool:
    """Runs gpurestore as a command."""
    return Tool(folder)


@pytest.fixture
def rights() -> None:
    """Skips a test that works on live trees where this process may not."""
    reason = namespaces_probe.checkpoint_rights()
    if reason:
        pytest.skip(reason)


@pytest.fixture
def real_root() -> None:
    """Skips a test that needs more than one user id."""
    if not namespaces_probe.real_root():
        pytest.skip("needs root outside of a user namespace: other users' ids are not mapped here")
