"""The plugin's hooks on processes of the fake driver, with a host that is a few lines long. No GPU takes part."""

from __future__ import annotations

import errno
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.cuda_host import Host, driver_here, dump, restore, run, use_nvml
from support.fake_cuda import GPU_A, GPU_B, FakeCuda, FakeGpu, FakeNvml, build, plain, process
from support.processes import wait_until
from support.victims import Compiler

from gpurestore.devplugins.api import Declined, HookContext, Stage
from gpurestore.devplugins.cuda import driver as driver_module
from gpurestore.devplugins.cuda import image, nvml, recognize
from gpurestore.devplugins.cuda.driver import ProcessState
from gpurestore.devplugins.cuda.plugin import CudaPlugin
from gpurestore.errors import CudaError, ImageError, NeedsPersonError, RestoreCheckError, UsageError

RUNNING, LOCKED, CHECKPOINTED, FAILED = "0", "1", "2", "3"


@pytest.fixture
def fake(compiler: Compiler, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeCuda]:
    with driver_here(build(compiler.folder), tmp_path / "driver", monkeypatch, FakeGpu(GPU_A)) as machine:
        yield machine


@pytest.fixture
def host(fake: FakeCuda, tmp_path: Path) -> Iterator[Host]:
    with Host(fake, tmp_path / "images") as one:
        yield one


def test_a_dump_locks_checkpoints_and_lets_only_the_restore_thread_run(fake: FakeCuda, host: Host) -> None:
    pid, other = fake.start(), os.getpid()
    plugin = host.plugin(Stage.DUMP)
    run(dump, plugin, pid, other)
    plugin.exit(Stage.DUMP, 0)
    assert fake.calls() == [("lock", pid, 0), ("checkpoint", pid, 0)]
    thread = fake.thread(pid)
    assert host.let_run == [(pid, thread)]
    assert plugin.used
    state = image.decode((host.images / "cuda.json").read_bytes())
    assert (state.storage, state.cuda_version, [gpu.uuid for gpu in state.gpus]) == ("staging", 13000, [GPU_A])
    assert state.tasks == {pid: image.Task(pid, ProcessState.RUNNING, thread, {})}


def test_a_restore_brings_processes_back_at_the_same_time_and_their_work_goes_on(
    fake: FakeCuda, host: Host, tmp_path: Path
) -> None:
    outs = [tmp_path / f"out-{i}" for i in range(3)]
    pids = [fake.start(steps=300, out=out) for out in outs]
    run(dump, host.plugin(Stage.DUMP), *pids)
    plugin = host.plugin(Stage.RESTORE)
    run(restore, plugin, *pids)
    plugin.exit(Stage.RESTORE, 0)
    for victim in fake.processes:
        assert victim.wait(20) == 0
    assert len({out.read_text() for out in outs}) == 1
    assert fake.calls("init", "restore")[0][0] == "init", "the driver is attached before, while tasks are filled"
    assert sorted(fake.calls("unlock")) == [("unlock", pid, 0) for pid in sorted(pids)]


@pytest.mark.parametrize("found", [LOCKED, CHECKPOINTED])
def test_what_others_locked_or_checkpointed_is_left_so(fake: FakeCuda, host: Host, found: str) -> None:
    host.goes_on = True
    pid = fake.start()
    driver = driver_module.load(str(fake.library))
    driver.lock(pid, 1000)
    if found == CHECKPOINTED:
        driver.checkpoint(pid)
    plugin = host.plugin(Stage.DUMP)
    run(dump, plugin, pid)
    plugin.exit(Stage.DUMP, 0)
    assert fake.state(pid) == found
    assert plugin.used
    if found == LOCKED:
        driver.checkpoint(pid)  # as in the images
    run(restore, host.plugin(Stage.RESTORE), pid)
    assert fake.state(pid) == found
    assert fake.calls("unlock") == []


def test_a_tree_that_goes_on_after_its_dump_gets_its_devices_back(fake: FakeCuda, host: Host) -> None:
    host.goes_on = True
    pid = fake.start()
    run(dump, host.plugin(Stage.DUMP), pid)
    wait_until(lambda: fake.state(pid) == RUNNING, "it runs again")
    assert [name for name, _, code in fake.calls() if not code] == ["lock", "checkpoint", "init", "restore", "unlock"]


def test_a_dump_that_fails_later_gives_devices_back(fake: FakeCuda, host: Host) -> None:
    pids = [fake.start(), fake.start()]
    plugin = host.plugin(Stage.DUMP)
    run(lambda: dump(plugin, *pids, result=-errno.ENOSPC))
    plugin.exit(Stage.DUMP, -errno.ENOSPC)
    assert [fake.state(pid) for pid in pids] == [RUNNING, RUNNING]
    assert len(fake.calls("unlock")) == 2


def test_exit_gives_back_where_nobody_called_dump_finish(fake: FakeCuda, host: Host) -> None:
    pid = fake.start()
    plugin = host.plugin(Stage.DUMP)
    run(plugin.pause_devices, pid)
    assert fake.state(pid) == LOCKED
    plugin.exit(Stage.DUMP, -errno.ECANCELED)
    assert fake.state(pid) == RUNNING


def test_exit_says_so_when_it_cannot_give_back(fake: FakeCuda, host: Host) -> None:
    pid = fake.start()
    plugin = host.plugin(Stage.DUMP)
    run(plugin.pause_devices, pid)
    os.kill(pid, 19)
    wait_until(lambda: recognize.thread_is_stopped(pid, fake.thread(pid)), "its thread is stopped")
    with pytest.raises(NeedsPersonError, match=rf"CUDA of pid {pid} could not be given back.*is stopped"):
        plugin.exit(Stage.DUMP, -1)


def test_a_process_that_died_meanwhile_needs_nothing_back(fake: FakeCuda, host: Host) -> None:
    pid = fake.start()
    plugin = host.plugin(Stage.DUMP)
    run(plugin.pause_devices, pid)
    fake.end()
    run(plugin.dump_finish, -1)
    plugin.exit(Stage.DUMP, -1)
    assert fake.calls() == [("lock", pid, 0)]


@pytest.mark.parametrize(("call", "code"), [("lock", 401), ("checkpoint", 2), ("checkpoint", 801)])
def test_a_refused_call_fails_the_dump_and_leaves_the_process_running(
    fake: FakeCuda, host: Host, monkeypatch: pytest.MonkeyPatch, call: str, code: int
) -> None:
    pid = fake.start()
    plugin = host.plugin(Stage.DUMP)
    monkeypatch.setenv("FAKE_CUDA_FAIL", f"{call}:{code}")
    with pytest.raises(CudaError, match=rf"pid {pid}: cuCheckpointProcess{call.title()}"):
        run(dump, plugin, pid)
    run(plugin.dump_finish, -1)
    plugin.exit(Stage.DUMP, -1)
    assert fake.state(pid) == RUNNING


def test_a_checkpoint_that_ruins_the_process_needs_a_person(
    fake: FakeCuda, host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    pid = fake.start()
    plugin = host.plugin(Stage.DUMP)
    monkeypatch.setenv("FAKE_CUDA_FAIL", "checkpoint:999")
    with pytest.raises(CudaError):
        run(dump, plugin, pid)
    with pytest.raises(NeedsPersonError, match="CUDA is failed, and was running before"):
        run(plugin.dump_finish, -1)
    assert fake.state(pid) == FAILED
    with pytest.raises(CudaError, match="in state failed: it cannot be dumped"):
        run(host.plugin(Stage.DUMP).pause_devices, pid)


def test_work_that_does_not_come_to_rest_ends_the_dump_in_time(fake: FakeCuda, host: Host) -> None:
    pid = fake.start()
    fake.set_busy(pid)
    plugin = host.plugin(Stage.DUMP, lock_timeout="0.05")
    with pytest.raises(CudaError, match=r"did not come to rest within 0.05 s; .*cuda\.lock-timeout"):
        run(plugin.pause_devices, pid)
    plugin.exit(Stage.DUMP, -1)
    assert fake.state(pid) == RUNNING
    assert fake.calls("unlock") == []


def test_a_failing_restore_is_an_error_that_names_pid_and_call(
    fake: FakeCuda, host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    pid = fake.start()
    run(dump, host.plugin(Stage.DUMP), pid)
    monkeypatch.setenv("FAKE_CUDA_FAIL", "restore:2")
    with pytest.raises(CudaError, match=rf"pid {pid}: cuCheckpointProcessRestore: .*make room on the GPU"):
        run(restore, host.plugin(Stage.RESTORE), pid)


def test_a_stopped_restore_thread_is_an_error_and_no_hang(fake: FakeCuda, host: Host) -> None:
    pid = fake.start()
    plugin = host.plugin(Stage.DUMP)
    run(plugin.pause_devices, pid)
    os.kill(pid, 19)
    wait_until(lambda: recognize.thread_is_stopped(pid, fake.thread(pid)), "its thread is stopped")
    with pytest.raises(CudaError, match="cuCheckpointProcessCheckpoint"):
        run(plugin.checkpoint_devices, pid)


def test_gpus_and_bytes_in_use_are_recorded(fake: FakeCuda, host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    pid = fake.start()
    use_nvml(monkeypatch, FakeNvml(FakeGpu(GPU_A, processes=[process(pid, 3 << 30)]), FakeGpu(GPU_B, minor=1)))
    run(dump, host.plugin(Stage.DUMP), pid)
    state = image.decode((host.images / "cuda.json").read_bytes())
    assert state.needed_bytes() == {GPU_A: 3 << 30}


def test_facts_that_no_restore_could_read_end_the_dump(
    fake: FakeCuda, host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    pid = fake.start()
    use_nvml(monkeypatch, FakeNvml(FakeGpu("no uuid at all")))
    with pytest.raises(ImageError, match="uuid"):
        run(dump, host.plugin(Stage.DUMP), pid)
    assert not (host.images / "cuda.json").exists()


@pytest.mark.parametrize("kind", ["mig", "mps"])
def test_mig_and_mps_are_refused_before_anything_is_touched(
    fake: FakeCuda, host: Host, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    pid = fake.start()
    gpu = (
        FakeGpu(GPU_A, processes=[process(pid, 1, instance=1)]) if kind == "mig" else FakeGpu(GPU_A, mps=[process(pid)])
    )
    use_nvml(monkeypatch, FakeNvml(gpu))
    with pytest.raises(CudaError, match=rf"pid {pid} .*{kind.upper()}.* cannot checkpoint"):
        run(host.plugin(Stage.DUMP).pause_devices, pid)
    assert fake.calls() == []


def test_content_comes_back_on_another_gpu_of_the_model(
    fake: FakeCuda, host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    pid = fake.start(gpu=GPU_A)
    use_nvml(monkeypatch, FakeNvml(FakeGpu(GPU_A, processes=[process(pid)])))
    run(dump, host.plugin(Stage.DUMP), pid)
    use_nvml(monkeypatch, FakeNvml(FakeGpu(GPU_B)))
    monkeypatch.setenv("FAKE_CUDA_GPUS", plain(GPU_B))
    run(restore, host.plugin(Stage.RESTORE), pid)
    assert fake.gpu(pid) == plain(GPU_B)
    assert fake.state(pid) == RUNNING


def test_a_map_can_be_asked_for_by_index(fake: FakeCuda, host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    pid = fake.start(gpu=GPU_A)
    use_nvml(monkeypatch, FakeNvml(FakeGpu(GPU_A, processes=[process(pid)])))
    run(dump, host.plugin(Stage.DUMP), pid)
    use_nvml(monkeypatch, FakeNvml(FakeGpu(GPU_A), FakeGpu(GPU_B)))
    run(restore, host.plugin(Stage.RESTORE, gpu_map="0=1"), pid)
    assert fake.gpu(pid) == plain(GPU_B)


@pytest.mark.parametrize(
    ("here", "reason"),
    [
        (FakeGpu(GPU_B, model="NVIDIA A100"), "no free GPU of this model"),
        (FakeGpu(GPU_A, free=1 << 20), "too little memory is free"),
        (FakeGpu(GPU_A, mig=True), "MIG"),
    ],
)
def test_a_machine_that_does_not_fit_is_refused_early_with_a_table(
    fake: FakeCuda,
    host: Host,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    here: FakeGpu,
    reason: str,
) -> None:
    pid = fake.start()
    use_nvml(monkeypatch, FakeNvml(FakeGpu(GPU_A, processes=[process(pid, 8 << 30)])))
    run(dump, host.plugin(Stage.DUMP), pid)
    before = fake.calls()
    use_nvml(monkeypatch, FakeNvml(here))
    with pytest.raises(RestoreCheckError, match=reason):
        run(host.plugin(Stage.RESTORE).restore_init)
    assert "wanted" in caplog.text and "8.0 GiB" in caplog.text and here.uuid.strip() in caplog.text + here.uuid
    assert fake.calls() == before


def test_no_driver_at_restore_is_refused_early(fake: FakeCuda, host: Host, tmp_path: Path) -> None:
    pid = fake.start()
    run(dump, host.plugin(Stage.DUMP), pid)
    with pytest.raises(RestoreCheckError, match="there is no NVIDIA driver here"):
        run(host.plugin(Stage.RESTORE, library=str(tmp_path / "none.so")).restore_init)


def test_too_old_a_driver_is_refused_at_dump_and_at_restore(fake: FakeCuda, host: Host, compiler: Compiler) -> None:
    pid = fake.start()
    old = str(build(compiler.folder, 12040))
    with pytest.raises(CudaError, match="came with driver 570"):
        run(host.plugin(Stage.DUMP, library=old).pause_devices, pid)
    run(dump, host.plugin(Stage.DUMP), pid)
    with pytest.raises(RestoreCheckError, match="came with driver 570"):
        run(host.plugin(Stage.RESTORE, library=old).restore_init)


def test_without_nvml_a_dump_and_a_restore_go_on_and_say_what_they_left_out(
    fake: FakeCuda, host: Host, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def missing() -> Any:
        raise CudaError("nvidia-ml-py is not installed")

    monkeypatch.setattr(nvml, "_pynvml", missing)
    pid = fake.start(gpu=GPU_A)
    run(dump, host.plugin(Stage.DUMP), pid)
    run(restore, host.plugin(Stage.RESTORE, gpu_map=f"{GPU_A}={GPU_B}"), pid)
    assert fake.gpu(pid) == plain(GPU_B)
    assert "not recorded or compared" in caplog.text and "NVML did not tell" in caplog.text
    with pytest.raises(UsageError, match="only whole UUIDs"):
        run(host.plugin(Stage.RESTORE, gpu_map="0=1").restore_init)


def test_a_process_without_cuda_costs_no_driver(fake: FakeCuda, host: Host) -> None:
    plugin = host.plugin(Stage.DUMP)
    victim = fake.start()
    fake.end()
    with subprocess.Popen(["sleep", "60"]) as sleeper:
        try:
            run(dump, plugin, sleeper.pid, victim)
        finally:
            sleeper.kill()
    assert driver_module.load.cache_info().misses == 0
    assert not plugin.used
    assert not (host.images / "cuda.json").exists()


def test_without_a_device_the_plugin_sits_out(host: Host, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("gpurestore.devplugins.cuda._SIGNS", ())
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(Declined):
        CudaPlugin().init(HookContext(Stage.DUMP, empty, host.open_image))
    with pytest.raises(Declined):
        CudaPlugin().init(HookContext(Stage.RESTORE, empty, host.open_image))
    with pytest.raises(UsageError, match="hold nothing of CUDA"):
        CudaPlugin().init(HookContext(Stage.RESTORE, empty, host.open_image, options={"gpu-map": "0=1"}))


def test_a_damaged_image_is_refused_at_once(host: Host) -> None:
    (host.images / "cuda.json").write_text("{}")
    with pytest.raises(ImageError, match=r"cuda\.json"):
        host.plugin(Stage.RESTORE)


@pytest.mark.parametrize(
    "options", [{"other": "1"}, {"lock_timeout": "0"}, {"lock_timeout": "nan"}, {"nvml": "yes"}, {"gpu_map": ""}]
)
def test_odd_options_are_usage_errors(host: Host, options: dict[str, str]) -> None:
    with pytest.raises(UsageError):
        host.plugin(Stage.DUMP, **options)


def test_device_files_that_are_left_over_are_refused_in_words(
    fake: FakeCuda, host: Host, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(recognize, "DEVICE_PREFIX", str(tmp_path / "nvidia"))
    plugin = host.plugin(Stage.DUMP)
    with open(tmp_path / "other", "w") as other, pytest.raises(Declined):
        plugin.dump_ext_file(other.fileno(), 1)
    run(plugin.pause_devices, fake.start())
    with open(tmp_path / "nvidia0", "w") as file:
        with pytest.raises(CudaError, match=r"file .*nvidia0 is still there .*inherited by fork"):
            plugin.dump_ext_file(file.fileno(), 1)
    with open(tmp_path / "nvidia-uvm", "w") as file:
        with pytest.raises(CudaError, match=r"mapping .*nvidia-uvm is still there .*managed"):
            plugin.handle_device_vma(file.fileno(), os.fstat(file.fileno()))
    plugin.exit(Stage.DUMP, -1)
