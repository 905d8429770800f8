"""CRIU and crit, for the tests that hold us against them; where there is none they are skipped."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.criu import Crit, Criu, find_crit, find_criu


@pytest.fixture(scope="module")
def criu() -> Criu:
    found = find_criu()
    if found is None:
        pytest.skip("no criu that passes its own check: name one with CRIU=PROGRAM")
    return found


@pytest.fixture(scope="module")
def crit() -> Iterator[Crit]:
    folder = Path(tempfile.mkdtemp(prefix="gpurestore-crit-"))
    found = find_crit(folder)
    if found is None:
        pytest.skip("no crit: name one with CRIT=PROGRAM, or a criu in its built source tree with CRIU=PROGRAM")
    yield found
    shutil.rmtree(folder, ignore_errors=True)
