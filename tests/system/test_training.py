"""The demonstration's training job, dumped and restored again and again at random moments, learns the same."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from support import processes, training_rounds

pytestmark = [
    pytest.mark.usefixtures("rights"),
    pytest.mark.skipif(
        find_spec("numpy") is None or find_spec("sklearn") is None,
        reason="numpy and scikit-learn are not installed: pip install 'gpurestore[demo]'",
    ),
]

SEED = int(os.environ.get("GPURESTORE_TEST_SEED", "20240603"))
NR_ROUNDS = 10
NR_STEPS = 4000


def test_a_training_job_restored_ten_times_in_a_row_ends_with_the_same_weights(folder: Path) -> None:
    processes.become_subreaper()
    undisturbed = training_rounds.start_job(folder / "undisturbed", NR_STEPS)
    assert undisturbed.wait() == 0, (folder / "undisturbed" / "log").read_text()
    arguments = [folder / "restored", str(NR_STEPS), str(NR_ROUNDS), str(SEED)]
    try:
        rounds = subprocess.run(
            [sys.executable, training_rounds.__file__, *arguments],
            capture_output=True,
            text=True,
            timeout=240,
            check=False,
        )
    finally:
        processes.end_all_below()
    assert rounds.returncode == 0, rounds.stdout + rounds.stderr[-10000:]
    assert rounds.stdout.count("round") == NR_ROUNDS
    for name in ("losses.txt", "weights.bin"):
        same = (folder / "undisturbed" / name).read_bytes() == (folder / "restored" / name).read_bytes()
        assert same, f"{name} differs from that of the undisturbed run\n{rounds.stdout}"
