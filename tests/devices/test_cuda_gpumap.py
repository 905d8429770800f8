"""Where each GPU's content comes back."""

from __future__ import annotations

from dataclasses import replace

import pytest
from support.fake_cuda import GPU_A, GPU_B, GPU_C

from gpurestore.devplugins.cuda import gpumap
from gpurestore.devplugins.cuda.nvml import Gpu
from gpurestore.errors import UsageError

GIB = 1 << 30
H100 = Gpu(0, GPU_A, "NVIDIA H100", 80 * GIB, compute_capability="9.0", free_bytes=79 * GIB)


def gpu(uuid: str, index: int = 0, free: int = 79, model: str = "NVIDIA H100") -> Gpu:
    return replace(H100, uuid=uuid, index=index, free_bytes=free * GIB, model=model)


def place(old: list[Gpu], here: list[Gpu], needed: int | None = 10, explicit=None, can_map=True) -> gpumap.Placement:
    bytes_needed = {g.uuid: None if needed is None else needed * GIB for g in old}
    return gpumap.place(old, here, bytes_needed, explicit or {}, can_map=can_map)


def test_gpus_that_are_still_here_stay_and_no_map_is_given() -> None:
    placement = place([gpu(GPU_A), gpu(GPU_B, 1)], [gpu(GPU_B), gpu(GPU_A, 1), gpu(GPU_C, 2)])
    assert placement.pairs == {}
    assert placement.findings == []


def test_a_gpu_that_is_gone_is_replaced_by_one_of_its_model_and_the_map_names_all() -> None:
    placement = place([gpu(GPU_A), gpu(GPU_B, 1)], [gpu(GPU_A), gpu(GPU_C, 1)])
    assert placement.pairs == {GPU_A: GPU_A, GPU_B: GPU_C}
    assert placement.findings == []


def test_one_with_room_is_taken_before_one_without() -> None:
    assert place([gpu(GPU_A)], [gpu(GPU_B, 0, free=5), gpu(GPU_C, 1)]).pairs == {GPU_A: GPU_C}


def test_the_map_that_is_asked_for_wins() -> None:
    here = [gpu(GPU_A), gpu(GPU_B, 1)]
    placement = place([gpu(GPU_A), gpu(GPU_B, 1)], here, explicit={GPU_A: GPU_B, GPU_B: GPU_A})
    assert placement.pairs == {GPU_A: GPU_B, GPU_B: GPU_A}
    assert place([gpu(GPU_A), gpu(GPU_B, 1)], here, explicit={GPU_A: GPU_B}).pairs == {GPU_A: GPU_B, GPU_B: GPU_A}


@pytest.mark.parametrize(
    ("here", "options", "reason"),
    [
        ([], {}, "no free GPU of this model"),
        ([gpu(GPU_B, model="NVIDIA A100")], {}, "no free GPU of this model"),
        ([gpu(GPU_B, model="NVIDIA A100")], {"explicit": {GPU_A: GPU_B}}, r"another model \(NVIDIA A100\)"),
        ([replace(gpu(GPU_B), compute_capability="8.0")], {"explicit": {GPU_A: GPU_B}}, "another chip"),
        ([replace(gpu(GPU_A), mig=True)], {}, "MIG"),
        ([gpu(GPU_A, free=4)], {}, "6.0 GiB too little memory is free"),
        ([gpu(GPU_B)], {"can_map": False}, "needs driver 580"),
    ],
)
def test_what_cannot_be_is_said_for_each_gpu(here: list[Gpu], options: dict, reason: str) -> None:
    findings = place([gpu(GPU_A)], here, **options).findings
    assert len(findings) == 1
    with pytest.raises(AssertionError, match=reason):
        raise AssertionError(str(findings[0]))


def test_two_gpus_cannot_go_to_one() -> None:
    placement = place([gpu(GPU_A), gpu(GPU_B, 1)], [gpu(GPU_C)], explicit={GPU_A: GPU_C, GPU_B: GPU_C})
    assert all("to go to the same GPU" in str(finding) for finding in placement.findings)
    assert len(placement.findings) == 2


def test_unknown_sizes_are_left_to_the_driver() -> None:
    assert place([gpu(GPU_A)], [gpu(GPU_A, free=0)], needed=None).findings == []
    assert place([gpu(GPU_A)], [replace(gpu(GPU_A), free_bytes=None)]).findings == []


def test_the_table_has_a_line_for_each_gpu() -> None:
    table = place([gpu(GPU_A), gpu(GPU_B, 1)], [gpu(GPU_A)]).table().splitlines()
    assert len(table) == 3
    assert table[0].split()[:2] == ["wanted", "model"]
    assert GPU_A in table[1] and table[1].endswith("ok") and "10.0 GiB" in table[1] and "79.0 GiB" in table[1]
    assert "no free GPU" in table[2]


def test_names_are_uuids_beginnings_of_them_or_indices() -> None:
    gpus = [gpu(GPU_A, 0), gpu(GPU_B, 1)]
    assert gpumap.parse("0=1, GPU-b=GPU-a") == {"0": "1", "GPU-b": "GPU-a"}
    assert gpumap.resolve("1", gpus, "here") == GPU_B
    assert gpumap.resolve("GPU-bb", gpus, "here") == GPU_B
    assert gpumap.resolve("AAAA", gpus, "here") == GPU_A


@pytest.mark.parametrize("text", ["", "0", "0=", "=1", "0=1,", "0=1,0=2", "0:1"])
def test_a_map_that_is_none_is_a_usage_error(text: str) -> None:
    with pytest.raises(UsageError, match="--gpu-map"):
        gpumap.parse(text)


@pytest.mark.parametrize("name", ["7", "GPU-", "GPU-d", "\u0661"])
def test_a_name_that_is_not_one_gpu_is_a_usage_error(name: str) -> None:
    with pytest.raises(UsageError, match=r"names (no|more than one) GPU here"):
        gpumap.resolve(name, [gpu(GPU_A, 0), gpu(GPU_B, 1)], "here")
