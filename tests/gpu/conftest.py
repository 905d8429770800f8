"""What the tests on real GPUs need; each thing that is missing is a reason to skip them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from support.gpu_jobs import Jobs, library, missing_gpu
from support.processes import become_subreaper


@pytest.fixture
def jobs(folder: Path, rights: None) -> Iterator[Jobs]:
    """Starts training jobs; whatever is left of them is ended afterwards."""
    if reason := missing_gpu():
        pytest.skip(reason)
    become_subreaper()
    started = Jobs(folder, library())
    yield started
    started.end()
