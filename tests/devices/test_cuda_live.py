"""Whole dumps and restores of processes that use the fake CUDA driver. No GPU takes part.

The fake's restore thread lives in the process and does the driver's work there, so these tests go wrong if it may not
run when it must, if any other thread runs, or if the process's memory is not whole when devices come back.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.fake_cuda import GPU_A, GPU_B, FakeCuda, build, driver_of, go, plain
from support.processes import wait_gone, wait_until
from support.tool import Tool
from support.victims import Compiler

from gpurestore.devplugins.cuda.driver import Driver

pytestmark = pytest.mark.usefixtures("rights")
STEPS = 300


@pytest.fixture
def fake(compiler: Compiler, folder: Path, tool: Tool) -> Iterator[FakeCuda]:
    with driver_of(tool, build(compiler.folder), folder / "driver") as machine:
        yield machine


def undisturbed(fake: FakeCuda, folder: Path) -> str:
    """What a run gives that nobody stops."""
    fake.start(steps=STEPS, ms=0, out=folder / "undisturbed")
    assert fake.processes[-1].wait(30) == 0
    return (folder / "undisturbed").read_text()


def dump(fake: FakeCuda, tool: Tool, pid: int, images: Path) -> None:
    """Dump the process that was started last, or the tree below it, and see it end."""
    tool.dump(pid, images).expect(0)
    fake.processes.pop().wait()


def successful(fake: FakeCuda, pid: int) -> list[str]:
    return [name for name, of, code in fake.calls() if of == pid and not code]


@pytest.mark.parametrize("how", ["--parallel", "--serial"])
def test_a_job_that_was_dumped_and_restored_ends_with_the_same_result(
    fake: FakeCuda, tool: Tool, folder: Path, how: str
) -> None:
    expected, out = undisturbed(fake, folder), folder / "out"
    pid = fake.start(steps=STEPS, ms=1, out=out, wait=True)
    dump(fake, tool, pid, folder / "images")
    assert not (fake.folder / f"{pid}.device").exists(), "the device is free"
    go(out)
    tool.restore(folder / "images", how).expect(0)
    assert out.read_text() == expected
    assert successful(fake, pid) == ["lock", "checkpoint", "restore", "unlock"]


def test_every_process_of_a_tree_that_uses_cuda_comes_back_with_its_device(
    fake: FakeCuda, tool: Tool, folder: Path
) -> None:
    outs = [folder / f"out-{i}" for i in range(3)]
    root = fake.start_tree(*outs, steps=STEPS)
    pids = sorted(int(path.stem) for path in fake.folder.glob("*.state"))
    dump(fake, tool, root, folder / "images")
    for pid in pids:
        os.waitpid(pid, 0)  # orphans come to us
    assert sorted(pid for _, pid, _ in fake.calls("checkpoint")) == pids
    for out in outs:
        go(out)
    tool.restore(folder / "images", "--parallel").expect(0)
    assert len({out.read_text() for out in outs}) == 1
    for pid in pids:
        assert successful(fake, pid) == ["lock", "checkpoint", "restore", "unlock"]


def test_only_the_restore_thread_runs_while_the_driver_works(fake: FakeCuda, tool: Tool, folder: Path) -> None:
    pid = fake.start(steps=STEPS, ms=1, wait=True)
    dump(fake, tool, pid, folder / "images")
    go(fake.folder / "result-0")
    tool.restore(folder / "images", "--parallel").expect(0)
    frozen = [line[3:5] for line in fake.lines() if line[1] == str(pid) and line[0] in ("checkpoint", "restore")]
    assert [threads for threads in frozen if threads[1] != "stopped=0"] == [["running=1", "stopped=1"]] * 2


def test_a_job_goes_on_after_a_dump_that_leaves_it_running(fake: FakeCuda, tool: Tool, folder: Path) -> None:
    expected, out = undisturbed(fake, folder), folder / "out"
    pid = fake.start(steps=STEPS, ms=1, out=out, wait=True)
    tool.dump(pid, folder / "images", "-R").expect(0)
    go(out)
    assert fake.processes[-1].wait(30) == 0
    assert out.read_text() == expected
    assert successful(fake, pid) == ["lock", "checkpoint", "restore", "unlock"]


@pytest.mark.parametrize("call", ["lock", "checkpoint"])
def test_a_dump_that_the_driver_refuses_leaves_the_job_running(
    fake: FakeCuda, tool: Tool, folder: Path, call: str
) -> None:
    expected, out = undisturbed(fake, folder), folder / "out"
    pid = fake.start(steps=STEPS, ms=1, out=out, wait=True)
    outcome = tool.dump(pid, folder / "images", env={"FAKE_CUDA_FAIL": f"{call}:801"}).expect(1)
    assert f"pid {pid}" in outcome.err and f"cuCheckpointProcess{call.title()}" in outcome.err
    assert not (folder / "images").exists()
    go(out)
    assert fake.processes[-1].wait(30) == 0
    assert out.read_text() == expected


@pytest.mark.parametrize("point", ["dump.paused", "dump.frozen", "dump.checkpointed", "dump.written", "dump.committed"])
@pytest.mark.parametrize("fault", ["fail", "interrupt", "kill"])
def test_whatever_ends_a_dump_early_the_job_goes_on_with_its_device(
    fake: FakeCuda, tool: Tool, folder: Path, point: str, fault: str
) -> None:
    out = folder / "out"
    pid = fake.start(steps=STEPS, ms=0, out=out, wait=True)
    tool.dump(pid, folder / "images", env={"GPURESTORE_FAULT": f"{point}:{fault}"})
    go(out)
    if fake.processes[-1].poll() is None and fault != "interrupt":
        wait_until(lambda: fake.state(pid) == "0", "it runs again")
    if fault == "interrupt" and (folder / "images").exists():
        return  # it came too late: the dump is whole
    assert fake.processes[-1].wait(30) == 0
    assert len(out.read_text()) == 17


def test_what_was_locked_before_is_locked_again_when_the_dump_is_killed(
    fake: FakeCuda, tool: Tool, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_CUDA_DIR", str(fake.folder))
    pid = fake.start(steps=STEPS)
    Driver(str(fake.library)).lock(pid, 1000)
    tool.dump(pid, folder / "images", env={"GPURESTORE_FAULT": "dump.checkpointed:kill"})
    wait_until(lambda: "restore" in successful(fake, pid) and fake.state(pid) == "1", "it is locked again")


@pytest.mark.parametrize("call", ["restore", "unlock"])
def test_a_restore_that_the_driver_refuses_leaves_nothing_and_can_be_repeated(
    fake: FakeCuda, tool: Tool, folder: Path, call: str
) -> None:
    expected, out = undisturbed(fake, folder), folder / "out"
    pid = fake.start(steps=STEPS, ms=1, out=out, wait=True)
    dump(fake, tool, pid, folder / "images")
    dumped = (fake.folder / f"{pid}.state").read_text()
    outcome = tool.restore(folder / "images", env={"FAKE_CUDA_FAIL": f"{call}:2"}).expect(1)
    assert f"cuCheckpointProcess{call.title()}" in outcome.err
    wait_gone([pid])
    # What the fake keeps in files is in the process's own memory otherwise, and died with it.
    (fake.folder / f"{pid}.state").write_text(dumped)
    (fake.folder / f"{pid}.device").unlink(missing_ok=True)
    go(out)
    tool.restore(folder / "images", "--parallel").expect(0)
    assert out.read_text() == expected


def test_a_restore_can_be_told_to_use_another_gpu(fake: FakeCuda, tool: Tool, folder: Path) -> None:
    expected, out = undisturbed(fake, folder), folder / "out"
    pid = fake.start(gpu=GPU_A, steps=STEPS, ms=1, out=out, wait=True)
    dump(fake, tool, pid, folder / "images")
    go(out)
    here = {"FAKE_CUDA_GPUS": plain(GPU_B)}
    outcome = tool.restore(folder / "images", "--parallel", "--gpu-map", f"{GPU_A}={GPU_B}", env=here)
    outcome.expect(0)
    assert fake.gpu(pid) == plain(GPU_B)
    assert out.read_text() == expected


def test_an_option_that_the_plugin_does_not_know_fails_before_anything(
    fake: FakeCuda, tool: Tool, folder: Path
) -> None:
    pid = fake.start(gpu=GPU_A)
    outcome = tool.dump(pid, folder / "images", "--plugin-option", "cuda.colour=green").expect(1)
    assert "cuda.colour is no option" in outcome.err
    assert fake.calls() == []
    os.kill(pid, signal.SIGKILL)


def test_images_of_cuda_are_refused_where_there_is_none(fake: FakeCuda, tool: Tool, folder: Path) -> None:
    pid = fake.start(steps=STEPS, ms=1, wait=True)
    dump(fake, tool, pid, folder / "images")
    if Path("/dev/nvidiactl").exists():
        pytest.skip("there is an NVIDIA device here")
    tool.env = {}
    outcome = tool.restore(folder / "images").expect(1)
    assert "cuda" in outcome.err and "no NVIDIA device" in outcome.err
    assert not Path(f"/proc/{pid}").exists()
