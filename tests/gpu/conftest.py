"""What the tests on real GPUs need; each thing that is missing is a reason to skip them."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.gpu_jobs import Jobs
from support.processes import become_subreaper


def missing_gpu() -> str | None:
    """Why nothing can be tried here."""
    if not Path("/dev/nvidiactl").exists():
        return "no NVIDIA GPU here (no /dev/nvidiactl)"
    from gpurestore.devplugins.cuda.driver import describe

    if problem := describe().problem:
        return problem
    if importlib.util.find_spec("torch") is None and importlib.util.find_spec("cupy") is None:
        return "neither PyTorch nor CuPy is installed"
    return None


@pytest.fixture
def jobs(folder: Path, rights: None) -> Iterator[Jobs]:
    """Starts training jobs; whatever is left of them is ended afterwards."""
    if reason := missing_gpu():
        pytest.skip(reason)
    become_subreaper()
    started = Jobs(folder, "torch" if importlib.util.find_spec("torch") else "cupy")
    yield started
    started.end()
