"""What NVML tells of a machine, by a fake NVML."""

from __future__ import annotations

import sys

import pytest
from support.fake_cuda import GPU_A, GPU_B, FakeGpu, FakeNvml, process

from gpurestore.devplugins.cuda import nvml
from gpurestore.errors import CudaError


def test_gpus_processes_and_connections_are_read_and_nvml_is_closed() -> None:
    first = FakeGpu(GPU_A, processes=[process(7, 5), process(8, None)], mps=[process(8, None), process(9, 3)])
    fake = FakeNvml(first, FakeGpu(GPU_B, minor=1, mig=True, processes=[process(7, 6, instance=1)]))
    inventory = nvml.read(fake)
    assert fake.open == 0
    assert inventory.driver == "580.65.06"
    assert [(gpu.index, gpu.uuid, gpu.minor, gpu.mig) for gpu in inventory.gpus] == [
        (0, GPU_A, 0, False),
        (1, GPU_B, 1, True),
    ]
    assert inventory.gpus[0].compute_capability == "9.0" and inventory.gpus[0].pci == "00000000:01:00.0"
    assert inventory.topology == (nvml.Link(0, 1, "switches"),)
    assert inventory.uses == {
        7: (nvml.Use(GPU_A, 5), nvml.Use(GPU_B, 6, mig=True)),
        8: (nvml.Use(GPU_A, None, mps=True),),
        9: (nvml.Use(GPU_A, 3, mps=True),),
    }


def test_facts_that_a_gpu_does_not_tell_are_left_out() -> None:
    silent = ("nvmlDeviceGetCudaComputeCapability", "nvmlDeviceGetPciInfo", "nvmlDeviceGetMigMode")
    silent += ("nvmlDeviceGetMinorNumber", "nvmlDeviceGetComputeRunningProcesses")
    silent += ("nvmlDeviceGetMPSComputeRunningProcesses", "nvmlDeviceGetTopologyCommonAncestor")
    inventory = nvml.read(FakeNvml(FakeGpu(GPU_A), FakeGpu(GPU_B), silent=silent))
    gpu = inventory.gpus[0]
    assert (gpu.minor, gpu.pci, gpu.compute_capability, gpu.mig) == (None, None, None, False)
    assert inventory.topology == () and inventory.uses == {}


@pytest.mark.parametrize(
    ("silent", "message"), [("nvmlInit", "NVML cannot be used"), ("nvmlDeviceGetUUID", "NVML does not answer")]
)
def test_an_nvml_that_fails_is_one_error(silent: str, message: str) -> None:
    fake = FakeNvml(FakeGpu(GPU_A), silent=(silent,))
    with pytest.raises(CudaError, match=message):
        nvml.read(fake)
    assert fake.open == 0


def test_without_the_package_the_error_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    with pytest.raises(CudaError, match=r"pip install 'gpurestore\[cuda\]'"):
        nvml.read()


def test_names_come_as_an_image_can_hold_them() -> None:
    assert nvml.read(FakeNvml(FakeGpu(GPU_A, model="NVIDIA\x00 \u00dcber"))).gpus[0].model == "NVIDIA? ?ber"
