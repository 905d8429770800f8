"""Training on a real GPU, dumped and restored. Skipped, with the reason, where there is no GPU to try it on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from support.gpu_jobs import STEPS, Jobs
from support.tool import Tool

from gpurestore.devplugins.cuda import nvml
from gpurestore.devplugins.cuda.driver import ProcessState, default_library, describe, load
from gpurestore.errors import CudaError


@pytest.fixture
def expected(jobs: Jobs) -> list[str]:
    """The losses of a run that nobody stops."""
    _, out = jobs.start("undisturbed", wait=False)
    losses = jobs.losses(out)
    assert len(losses) == STEPS
    return losses


@pytest.mark.parametrize("how", ["--parallel", "--serial"])
def test_training_that_was_dumped_and_restored_has_the_losses_of_one_that_was_not(
    jobs: Jobs, tool: Tool, folder: Path, expected: list[str], how: str
) -> None:
    pid, out = jobs.start("job")
    tool.dump(pid, folder / "images").expect(0)
    jobs.reap(pid)
    jobs.go(out)
    tool.restore(folder / "images", how).expect(0)
    assert jobs.losses(out) == expected


def test_training_goes_on_after_a_dump_that_leaves_it_running(
    jobs: Jobs, tool: Tool, folder: Path, expected: list[str]
) -> None:
    pid, out = jobs.start("job")
    tool.dump(pid, folder / "images", "-R").expect(0)
    assert load(default_library()).state(pid) is ProcessState.RUNNING
    jobs.go(out)
    assert jobs.losses(out) == expected


def test_a_dump_that_fails_after_the_checkpoint_gives_the_gpu_back(
    jobs: Jobs, tool: Tool, folder: Path, expected: list[str]
) -> None:
    pid, out = jobs.start("job")
    tool.dump(pid, folder / "images", env={"GPURESTORE_FAULT": "dump.checkpointed:fail"}).expect(1)
    assert load(default_library()).state(pid) is ProcessState.RUNNING
    jobs.go(out)
    assert jobs.losses(out) == expected


def test_what_was_locked_before_stays_locked(jobs: Jobs, tool: Tool, folder: Path) -> None:
    pid, _ = jobs.start("job")
    driver = load(default_library())
    driver.lock(pid, 10_000)
    tool.dump(pid, folder / "images", "-R").expect(0)
    assert driver.state(pid) is ProcessState.LOCKED
    driver.unlock(pid)


def test_the_images_name_gpu_and_memory(jobs: Jobs, tool: Tool, folder: Path) -> None:
    pytest.importorskip("pynvml", reason="nvidia-ml-py is not installed")
    pid, _ = jobs.start("job")
    tool.dump(pid, folder / "images").expect(0)
    jobs.reap(pid)
    facts = json.loads((folder / "images" / "cuda.json").read_text())
    assert facts["gpus"] and facts["tasks"][0]["pid"] == pid
    assert any(facts["tasks"][0]["gpus"].values()), "no memory in use was seen"


def test_training_moves_to_another_gpu_of_the_same_model(
    jobs: Jobs, tool: Tool, folder: Path, expected: list[str]
) -> None:
    try:
        gpus = nvml.read().gpus
    except CudaError as error:
        pytest.skip(str(error))
    if len(gpus) < 2 or gpus[0].model != gpus[1].model:
        pytest.skip("there are no two GPUs of one model")
    if not describe().gpu_pairs:
        pytest.skip("the driver cannot map GPUs (580 and later can)")
    pid, out = jobs.start("job")
    tool.dump(pid, folder / "images").expect(0)
    jobs.reap(pid)
    jobs.go(out)
    tool.restore(folder / "images", "--parallel", "--gpu-map", "0=1", "--gpu-map", "1=0").expect(0)
    assert jobs.losses(out) == expected
