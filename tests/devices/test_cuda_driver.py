"""The driver's calls against the fake library: states, failures, versions. No GPU takes part."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.fake_cuda import GPU_A, GPU_B, FakeCuda, build, plain
from support.victims import Compiler

from gpurestore.check import CheckResult, check_all
from gpurestore.cli import build_parser
from gpurestore.cli.options import plugin_settings
from gpurestore.devplugins.cuda import driver as driver_module
from gpurestore.devplugins.cuda import probe
from gpurestore.devplugins.cuda.driver import Driver, ProcessState, branch, describe
from gpurestore.errors import CudaError


@pytest.fixture
def fake(compiler: Compiler, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeCuda]:
    machine = FakeCuda(build(compiler.folder), tmp_path)
    monkeypatch.setenv("FAKE_CUDA_DIR", str(tmp_path))
    yield machine
    machine.end()


def test_argument_blocks_have_the_size_that_every_driver_expects() -> None:
    ffi = driver_module._ffi()
    sizes = {name: ffi.sizeof(f"CUcheckpoint{name}Args") for name in ("Lock", "Unlock", "Checkpoint", "Restore")}
    assert set(sizes.values()) == {64}
    assert ffi.offsetof("CUcheckpointRestoreArgs", "gpuPairsCount") == 8
    assert ffi.offsetof("CUcheckpointRestoreArgs", "customStorageInfo_out") == 16


def test_a_process_goes_through_all_states_and_on_with_its_work(fake: FakeCuda, tmp_path: Path) -> None:
    out = tmp_path / "undisturbed"
    fake.start(steps=200, out=out)
    disturbed = tmp_path / "disturbed"
    pid = fake.start(steps=200, out=disturbed)
    driver = Driver(str(fake.library))
    assert driver.state(pid) is ProcessState.RUNNING
    driver.lock(pid, 1000)
    assert driver.state(pid) is ProcessState.LOCKED
    driver.checkpoint(pid)
    assert driver.state(pid) is ProcessState.CHECKPOINTED
    assert not (tmp_path / f"{pid}.device").exists()
    driver.restore(pid)
    assert driver.state(pid) is ProcessState.LOCKED
    driver.unlock(pid)
    for process in fake.processes:
        assert process.wait(20) == 0
    assert out.read_text() == disturbed.read_text()


def test_the_driver_initialises_itself_when_a_restore_wants_it(fake: FakeCuda) -> None:
    pid = fake.start()
    driver = Driver(str(fake.library))
    driver.lock(pid, 1000)
    driver.checkpoint(pid)
    assert fake.calls("init") == []
    driver.restore(pid)
    assert [name for name, _, _ in fake.calls()] == ["lock", "checkpoint", "restore", "init", "restore"]


def test_a_call_that_another_threads_initialisation_overtook_is_made_again(
    fake: FakeCuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    pid = fake.start()
    driver = Driver(str(fake.library))
    driver.lock(pid, 1000)
    driver.checkpoint(pid)
    restore = driver._lib.cuCheckpointProcessRestore
    answers = []

    def overtaken(*args: object) -> int:
        answers.append(restore(*args))
        if len(answers) == 1:
            driver.init()
        return answers[-1]

    monkeypatch.setattr(driver, "_lib", _Overlay(driver._lib, cuCheckpointProcessRestore=overtaken))
    driver.restore(pid)
    assert answers == [driver_module.NOT_INITIALIZED, 0]


class _Overlay:
    """A library with some functions of our own."""

    def __init__(self, library: object, **functions: object) -> None:
        self._library = library
        self.__dict__.update(functions)

    def __getattr__(self, name: str) -> object:
        return getattr(self._library, name)


def test_calls_in_the_wrong_state_are_errors_in_words(fake: FakeCuda) -> None:
    pid = fake.start()
    driver = Driver(str(fake.library))
    with pytest.raises(
        CudaError, match=rf"pid {pid}: cuCheckpointProcessCheckpoint: CUDA_ERROR_ILLEGAL_STATE: "
    ) as info:
        driver.checkpoint(pid)
    assert info.value.code == driver_module.ILLEGAL_STATE
    with pytest.raises(CudaError, match="cuCheckpointProcessRestore"):
        driver.restore(pid)
    with pytest.raises(CudaError, match="cuCheckpointProcessGetState"):
        driver.state(1)


def test_an_error_of_unlock_counts_only_if_the_process_does_not_run(
    fake: FakeCuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    pid = fake.start()
    driver = Driver(str(fake.library))
    driver.unlock(pid)  # ILLEGAL_STATE, but it runs
    driver.lock(pid, 1000)
    monkeypatch.setenv("FAKE_CUDA_FAIL", "unlock:1")
    with pytest.raises(CudaError, match="cuCheckpointProcessUnlock"):
        driver.unlock(pid)


def test_a_lock_that_runs_out_of_time_leaves_the_process_running(fake: FakeCuda) -> None:
    pid = fake.start()
    fake.set_busy(pid)
    driver = Driver(str(fake.library))
    with pytest.raises(CudaError) as info:
        driver.lock(pid, 20)
    assert info.value.code == driver_module.NOT_READY
    assert driver.state(pid) is ProcessState.RUNNING


def test_a_process_can_come_back_on_another_gpu(fake: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    pid = fake.start(gpu=GPU_A)
    monkeypatch.setenv("FAKE_CUDA_GPUS", plain(GPU_B))
    driver = Driver(str(fake.library))
    driver.lock(pid, 1000)
    driver.checkpoint(pid)
    with pytest.raises(CudaError, match="cuCheckpointProcessRestore"):
        driver.restore(pid)
    driver.restore(pid, {GPU_A: GPU_B})
    assert fake.gpu(pid) == plain(GPU_B)


def test_an_older_driver_does_not_get_gpu_pairs(compiler: Compiler, fake: FakeCuda) -> None:
    driver = Driver(str(build(compiler.folder, 12080)))
    assert (driver.can_checkpoint, driver.can_map_gpus, driver.can_use_custom_storage) == (True, False, False)
    with pytest.raises(CudaError, match=r"cannot bring processes back on other GPUs; 580"):
        driver.restore(1, {GPU_A: GPU_B})


def test_a_driver_without_the_calls_is_named_with_the_one_that_has_them(compiler: Compiler, fake: FakeCuda) -> None:
    library = str(build(compiler.folder, 12040))
    with pytest.raises(CudaError, match=r"CUDA 12\.4.* has no checkpoint calls; they came with driver 570"):
        Driver(library).state(1)
    facts = describe(library)
    assert facts.problem is not None and "checkpoint calls needs 570" in facts.problem


def test_check_describes_what_the_driver_can_do(compiler: Compiler, fake: FakeCuda) -> None:
    facts = describe(str(fake.library))
    assert facts.problem is None
    assert facts.checkpoint and facts.gpu_pairs and not facts.custom_storage
    assert "CUDA 13.0" in facts.text and "custom storage needs 615" in facts.text
    assert fake.calls() == [], "looking must not initialise anything"


def test_no_driver_and_a_library_that_is_none_are_said(tmp_path: Path) -> None:
    facts = describe(str(tmp_path / "libcuda.so.1"))
    assert facts.problem is not None and "there is no NVIDIA driver here" in facts.problem
    with pytest.raises(CudaError, match=r"libc\.so\.6 is no CUDA driver"):
        Driver("libc.so.6")


def test_the_kernel_modules_version_is_read_from_both_kinds_of_module(tmp_path: Path) -> None:
    file = tmp_path / "version"
    file.write_text("NVRM version: NVIDIA UNIX x86_64 Kernel Module  570.86.15  Thu Jan 23 00:00:00 UTC 2025\nGCC\n")
    assert branch(file) == "570.86.15"
    file.write_text(
        "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  615.71  Release Build\nGCC version 12.2.0\n"
    )
    assert branch(file) == "615.71"
    file.write_text("nothing of that kind\n")
    assert branch(file) == ""
    assert branch(tmp_path / "none") == ""


def test_images_with_our_file_make_the_plugin_matter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gpurestore.devplugins.cuda._SIGNS", ())
    assert not probe(tmp_path)
    (tmp_path / "cuda.json").touch()
    assert probe(tmp_path)


def test_gpurestore_check_says_what_the_driver_can_do(
    compiler: Compiler, fake: FakeCuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    def result() -> CheckResult:
        return next(result for result in check_all() if result.name == "NVIDIA GPU")

    monkeypatch.setenv("GPURESTORE_LIBCUDA", str(fake.library))
    assert result().ok and "checkpoint calls, GPU mapping" in result().detail
    monkeypatch.setenv("GPURESTORE_LIBCUDA", str(build(compiler.folder, 12040)))
    assert not result().ok and "checkpoint calls needs 570" in result().detail
    monkeypatch.delenv("GPURESTORE_LIBCUDA")
    monkeypatch.setattr("gpurestore.devplugins.cuda._SIGNS", ())
    assert not result().ok and "no NVIDIA device" in result().detail


def test_gpu_map_is_an_option_of_restore() -> None:
    args = build_parser().parse_args(["restore", "-D", "images", "--gpu-map", "0=1", "--gpu-map", "1=0"])
    assert plugin_settings(args).options == ("cuda.gpu-map=0=1,1=0",)


def test_a_machine_without_gpus_does_not_even_load_the_plugin() -> None:
    if probe():
        pytest.skip("there is an NVIDIA device here")
    program = """
import sys
from gpurestore.devplugins.api import Declined
from gpurestore.devplugins.cuda import make
try:
    make()
except Declined as reason:
    print(reason, [name for name in sys.modules if name == "cffi" or ".cuda." in name])
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout == "there is no NVIDIA device here (no /dev/nvidiactl) []\n"
