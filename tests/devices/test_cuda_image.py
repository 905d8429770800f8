"""cuda.json: what is written is read, and nothing else."""

from __future__ import annotations

import json
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.fake_cuda import GPU_A, GPU_B

from gpurestore.devplugins.cuda import image
from gpurestore.devplugins.cuda.driver import ProcessState
from gpurestore.devplugins.cuda.image import State, Task
from gpurestore.devplugins.cuda.nvml import Gpu, Link
from gpurestore.errors import ImageError

STATE = State(
    storage="staging",
    driver="580.65.06",
    cuda_version=13000,
    gpus=(Gpu(0, GPU_A, "NVIDIA H100", 1 << 36, 0, "00000000:01:00.0", "9.0"), Gpu(1, GPU_B, "NVIDIA H100", 1 << 36)),
    topology=(Link(0, 1, "switches"),),
    tasks={
        12: Task(12, ProcessState.RUNNING, 17, {GPU_A: 1 << 30}),
        13: Task(13, ProcessState.LOCKED, 13, {GPU_A: 5}),
        14: Task(14, ProcessState.CHECKPOINTED, 14, {}),
    },
)


def test_what_is_written_is_read() -> None:
    assert image.decode(image.encode(STATE)) == STATE


def test_needs_of_all_tasks_are_added_and_a_task_without_gpus_may_have_had_any() -> None:
    assert STATE.needed_bytes() == {GPU_A: (1 << 30) + 5}
    assert [gpu.uuid for gpu in STATE.used_gpus()] == [GPU_A]
    task = Task(15, ProcessState.RUNNING, 15, {})
    wider = State(**{**{name: getattr(STATE, name) for name in STATE.__slots__}, "tasks": {15: task}})
    assert wider.needed_bytes() == {GPU_A: None, GPU_B: None}


def change(path: str, value: Any) -> bytes:
    document = json.loads(image.encode(STATE))
    *way, last = path.split("/")
    place: Any = document
    for key in way:
        place = place[int(key) if key.isdigit() else key]
    if value is KeyError:
        del place[last]
    elif isinstance(place, list):
        place[int(last)] = value
    else:
        place[last] = value
    return json.dumps(document).encode()


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("format", 1),
        ("format", True),
        ("extra", 1),
        ("storage", KeyError),
        ("storage", "tape"),
        ("tasks/0/regions", [{"gpu": GPU_A, "bytes": 1}]),  # of staging
        ("driver", 580),
        ("driver", "\x1b[2J"),
        ("cuda_version", 1.5),
        ("cuda_version", True),
        ("cuda_version", -1),
        ("gpus", {}),
        ("gpus/0/uuid", "GPU-1"),
        ("gpus/0/uuid", GPU_B),
        ("gpus/1/index", 0),
        ("gpus/0/memory_bytes", 1 << 70),
        ("gpus/0/mig", 0),
        ("gpus/0/minor", "0"),
        ("topology/0/second", 2),
        ("tasks/0/pid", 0),
        ("tasks/0/pid", 13),
        ("tasks/0/thread", None),
        ("tasks/0/state", "failed"),
        ("tasks/0/state", []),
        ("tasks/0/gpus", []),
        ("tasks/0/gpus", {"GPU-cccccccc-0000-1111-2222-333333333333": 1}),
        ("tasks/0/gpus", {GPU_A: -1}),
        ("tasks/0/regions", {}),
        ("tasks/0", 7),
    ],
)
def test_what_is_odd_is_refused(path: str, value: Any) -> None:
    with pytest.raises(ImageError, match=r"cuda\.json"):
        image.decode(change(path, value))


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"[]",
        b"nothing",
        b"\xff",
        b'{"format": 1}',
        b'{"format": NaN}',
        b'{"format": 1, "format": 1}',
        b"[" * 10**5,
    ],
)
def test_what_is_no_such_file_is_refused(data: bytes) -> None:
    with pytest.raises(ImageError, match=r"cuda\.json"):
        image.decode(data)


def test_a_file_that_is_too_big_is_refused() -> None:
    with pytest.raises(ImageError, match="not ours"):
        image.decode(b" " * (image.MAX_BYTES + 1))


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(), lambda x: st.lists(x) | st.dictionaries(st.text(), x)
    )
)
def test_no_document_at_all_does_worse_than_an_image_error(value: Any) -> None:
    document = json.loads(image.encode(STATE))
    for key in document:
        with suppress(ImageError):
            image.decode(json.dumps({**document, key: value}).encode())
    with suppress(ImageError):
        image.decode(json.dumps(value).encode())
