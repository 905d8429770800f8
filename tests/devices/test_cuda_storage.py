"""Custom storage (CUDA 13.4) on the fake driver: the sequence of calls, the bytes, and what a failure leaves behind."""

from __future__ import annotations

import ctypes
import errno
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.cuda_host import Host, driver_here, dump, restore, run
from support.fake_cuda import GPU_A, GPU_B, FakeCuda, FakeGpu, build, driver_of, go, plain
from support.processes import wait_until
from support.tool import Tool
from support.victims import Compiler

from gpurestore.devplugins.api import Stage
from gpurestore.devplugins.cuda import storage as storage_module
from gpurestore.errors import (
    CancelledError,
    CudaError,
    ImageError,
    NeedsPersonError,
    RestoreCheckError,
    UsageError,
)

STEPS = 300
CUSTOM = ("--plugin-option", "cuda.storage=custom")


@pytest.fixture
def fake(compiler: Compiler, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeCuda]:
    monkeypatch.setattr(storage_module, "CHUNK_BYTES", 1024)  # a device of the fake has 4096 bytes
    gpus = (FakeGpu(GPU_A), FakeGpu(GPU_B, minor=1))
    with driver_here(build(compiler.folder, 13040), tmp_path / "driver", monkeypatch, *gpus) as machine:
        yield machine


@pytest.fixture
def host(fake: FakeCuda, tmp_path: Path) -> Iterator[Host]:
    with Host(fake, tmp_path / "images") as one:
        yield one
    assert ctypes.CDLL(str(fake.library)).fakePinned() == 0, "pinned buffers are left"


def content(fake: FakeCuda, pid: int) -> bytes:
    return (fake.folder / f"{pid}.device").read_bytes()


def facts(host: Host) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((host.images / "cuda.json").read_text())
    return found


def test_device_memory_goes_into_images_and_comes_back_from_them(fake: FakeCuda, host: Host) -> None:
    pids = [fake.start(), fake.start(gpu=GPU_B)]
    wait_until(lambda: all(any(content(fake, pid)) for pid in pids), "both have computed")
    run(dump, host.plugin(Stage.DUMP, storage="custom"), *pids)
    for pid, gpu in zip(pids, (GPU_A, GPU_B), strict=True):
        assert fake.state(pid) == "2"
        assert not (fake.folder / f"{pid}.device").exists()
        assert (host.images / f"cuda-{pid}-0.img").stat().st_size == 4096
        task = next(task for task in facts(host)["tasks"] if task["pid"] == pid)
        assert task["regions"] == [{"gpu": gpu, "bytes": 4096}]
    assert facts(host)["storage"] == "custom"
    run(restore, host.plugin(Stage.RESTORE), *pids)
    for pid in pids:
        assert content(fake, pid) != bytes(4096)
        assert fake.state(pid) == "0"
        names = [name for name, of, code in fake.calls() if of == pid and not code]
        assert names == ["lock", "checkpoint", "complete", "restore", "complete", "unlock"]


def test_reading_begins_before_a_task_is_there(fake: FakeCuda, host: Host) -> None:
    pid = fake.start()
    run(dump, host.plugin(Stage.DUMP, storage="custom"), pid)
    plugin = host.plugin(Stage.RESTORE)

    async def until_forked() -> None:
        await plugin.restore_init()
        await plugin.post_forking()

    run(until_forked)
    wait_until(lambda: plugin.custom.inflows[pid].read_bytes == 4096, "the image is read")
    assert fake.state(pid) == "2"
    run(plugin.resume_devices_late, pid)
    assert fake.state(pid) == "0"


def test_content_comes_back_on_another_gpu(fake: FakeCuda, host: Host) -> None:
    pid = fake.start()
    run(dump, host.plugin(Stage.DUMP, storage="custom"), pid)
    run(restore, host.plugin(Stage.RESTORE, gpu_map=f"{GPU_A}={GPU_B}"), pid)
    assert fake.gpu(pid) == plain(GPU_B)
    assert fake.state(pid) == "0"


def expected_result(fake: FakeCuda, tmp_path: Path) -> str:
    """What a process computes that nobody stops."""
    fake.start(steps=STEPS, ms=0, out=tmp_path / "undisturbed")
    assert fake.processes[-1].wait(30) == 0
    return (tmp_path / "undisturbed").read_text()


@pytest.mark.parametrize("fault", ["no room", "no file", "cancelled"])
def test_a_dump_that_fails_while_it_writes_gives_every_byte_back(
    fake: FakeCuda, host: Host, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    expected = expected_result(fake, tmp_path)
    pid = fake.start(steps=STEPS, ms=0, out=tmp_path / "out", wait=True)
    plugin = host.plugin(Stage.DUMP, storage="custom")
    run(plugin.pause_devices, pid)
    real = os.pwrite

    def pwrite(fd: int, data: Any, offset: int) -> int:
        if offset >= 2048:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(fd, data, offset)

    def no_file(_: str) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        if fault == "no room":
            patched.setattr("gpurestore.devplugins.cuda.storage.os.pwrite", pwrite)
        elif fault == "no file":
            object.__setattr__(plugin._context, "open_image", no_file)
        host.cancelled = fault == "cancelled"
        with pytest.raises(CancelledError if fault == "cancelled" else OSError):
            run(plugin.checkpoint_devices, pid)
    run(plugin.dump_finish, -errno.EIO)
    names = [name for name, of, code in fake.calls() if of == pid and not code]
    assert names == ["lock", "checkpoint", "complete", "restore", "complete", "unlock"]
    go(tmp_path / "out")
    assert fake.processes[-1].wait(30) == 0
    assert (tmp_path / "out").read_text() == expected


def test_a_tree_that_goes_on_after_its_dump_gets_its_bytes_back_from_the_images(
    fake: FakeCuda, host: Host, tmp_path: Path
) -> None:
    expected, host.goes_on = expected_result(fake, tmp_path), True
    pid = fake.start(steps=STEPS, ms=0, out=tmp_path / "out", wait=True)
    run(dump, host.plugin(Stage.DUMP, storage="custom"), pid)
    go(tmp_path / "out")
    assert fake.processes[-1].wait(30) == 0
    assert (tmp_path / "out").read_text() == expected


def test_bytes_that_can_be_kept_nowhere_need_a_person(
    fake: FakeCuda, host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    pid = fake.start()
    plugin = host.plugin(Stage.DUMP, storage="custom")
    run(plugin.pause_devices, pid)
    monkeypatch.setenv("FAKE_CUDA_FAIL", "out:999")
    with pytest.raises(NeedsPersonError, match=f"device memory of pid {pid} could neither be written nor be kept"):
        run(plugin.checkpoint_devices, pid)


@pytest.mark.parametrize("call", ["checkpoint", "complete"])
def test_a_refused_call_is_an_error_that_names_it(
    fake: FakeCuda, host: Host, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    pid = fake.start()
    plugin = host.plugin(Stage.DUMP, storage="custom")
    run(plugin.pause_devices, pid)
    monkeypatch.setenv("FAKE_CUDA_FAIL", f"{call}:801")
    with pytest.raises(CudaError, match=r"cuCheckpoint(ProcessCheckpoint|OperationComplete): "):
        run(plugin.checkpoint_devices, pid)


@pytest.mark.parametrize(
    "regions",
    [
        [{"gpu": "GPU-1", "bytes": 4096}],
        [{"gpu": GPU_A, "bytes": -1}],
        [{"gpu": GPU_A, "bytes": 1}, {"gpu": GPU_A, "bytes": 1}],
        [{"gpu": GPU_A}],
        [7],
    ],
)
def test_odd_regions_are_refused_at_once(fake: FakeCuda, host: Host, regions: list[Any]) -> None:
    run(dump, host.plugin(Stage.DUMP, storage="custom"), fake.start())
    document = facts(host)
    document["tasks"][0]["regions"] = regions
    (host.images / "cuda.json").write_text(json.dumps(document))
    with pytest.raises(ImageError, match=r"cuda\.json: .*regions"):
        host.plugin(Stage.RESTORE)


def test_images_that_do_not_fit_the_process_are_refused(fake: FakeCuda, host: Host) -> None:
    pid = fake.start()
    run(dump, host.plugin(Stage.DUMP, storage="custom"), pid)
    path = host.images / "cuda.json"
    path.write_text(path.read_text().replace('"bytes": 4096', '"bytes": 2048'))
    with pytest.raises(ImageError, match="do not hold the device memory that the driver wants: 4096 bytes"):
        run(restore, host.plugin(Stage.RESTORE), pid)


def test_a_truncated_image_of_device_memory_is_named(fake: FakeCuda, host: Host) -> None:
    pid = fake.start()
    run(dump, host.plugin(Stage.DUMP, storage="custom"), pid)
    os.truncate(host.images / f"cuda-{pid}-0.img", 3000)
    with pytest.raises(ImageError, match="the image of device memory 0 ends at byte 3000"):
        run(restore, host.plugin(Stage.RESTORE), pid)


def test_the_option_decides_and_an_older_driver_is_refused_or_serves_by_staging(
    fake: FakeCuda, host: Host, compiler: Compiler
) -> None:
    pid = fake.start()
    run(dump, host.plugin(Stage.DUMP, storage="auto"), pid)
    assert facts(host)["storage"] == "custom"
    old = str(build(compiler.folder, 13000))
    with pytest.raises(RestoreCheckError, match="has no custom storage, where the dump put device content: 615"):
        run(host.plugin(Stage.RESTORE, library=old).restore_init)
    with pytest.raises(CudaError, match=r"has no custom storage, which cuda\.storage=custom asks for: 615"):
        run(host.plugin(Stage.DUMP, library=old, storage="custom").pause_devices, fake.start())
    with pytest.raises(UsageError, match=r"cuda\.storage=ram: it is driver, custom, auto"):
        host.plugin(Stage.DUMP, storage="ram")


def test_without_being_asked_for_it_content_goes_the_drivers_way(fake: FakeCuda, host: Host) -> None:
    pid = fake.start()
    run(dump, host.plugin(Stage.DUMP), pid)
    assert facts(host)["storage"] == "staging"
    run(restore, host.plugin(Stage.RESTORE), pid)
    assert fake.calls("complete") == []
    assert fake.state(pid) == "0"


# ---- live


@pytest.mark.usefixtures("rights")
@pytest.mark.parametrize("how", ["kill", "leave running", "fail"])
def test_a_live_job_goes_on_with_the_same_result(compiler: Compiler, tool: Tool, folder: Path, how: str) -> None:
    with driver_of(tool, build(compiler.folder, 13040), folder / "driver") as fake:
        expected, out = expected_result(fake, folder), folder / "out"
        pid = fake.start(steps=STEPS, ms=1, out=out, wait=True)
        options = (*CUSTOM, *(["-R"] if how == "leave running" else []))
        env = {"GPURESTORE_FAULT": "dump.written:fail"} if how == "fail" else {}
        outcome = tool.dump(pid, folder / "images", *options, env=env).expect(1 if how == "fail" else 0)
        assert "content went into images by custom storage" in outcome.log
        if how == "kill":
            fake.processes.pop().wait()
            assert not (fake.folder / f"{pid}.device").exists(), "the device is free"
            go(out)
            assert "by custom storage" in tool.restore(folder / "images", "--parallel").expect(0).log
        else:
            go(out)
            assert fake.processes[-1].wait(30) == 0
        assert out.read_text() == expected
        running = {tuple(line[3:5]) for line in fake.lines() if line[0] == "complete"}
        assert ("running=1", "stopped=1") in running, "only the driver's thread runs while it works"
