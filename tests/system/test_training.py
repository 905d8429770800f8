"""The demonstration's training job, dumped and restored again and again at random moments, learns the same."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import pytest
from support import processes
from support.tool import Tool

pytestmark = [
    pytest.mark.usefixtures("rights"),
    pytest.mark.skipif(
        find_spec("numpy") is None or find_spec("sklearn") is None,
        reason="numpy and scikit-learn are not installed: pip install 'gpurestore[demo]'",
    ),
]

SEED = int(os.environ.get("GPURESTORE_TEST_SEED", "20240603"))
NR_ROUNDS = 10
# A step takes 1 to 2 ms; the job goes on while a dump starts up, and must not end before the last round.
STEPS_BETWEEN = 100
NR_STEPS = 6000


def start_job(folder: Path) -> subprocess.Popen[bytes]:
    folder.mkdir()
    with open(folder / "log", "wb") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "gpurestore.demo.job", "--out", str(folder), "--steps", str(NR_STEPS)],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )


def steps(folder: Path) -> int:
    """Lines of the loss curve so far: one a step."""
    try:
        return (folder / "losses.txt").read_bytes().count(b"\n")
    except FileNotFoundError:
        return 0


def wait_for_step(folder: Path, step: int, pid: int) -> None:
    processes.wait_until(
        lambda: steps(folder) >= step or not processes.alive(pid), f"step {step} of {folder.name}", 120
    )
    assert processes.alive(pid), f"the job ended at step {steps(folder)}: {(folder / 'log').read_text()}"


def test_a_training_job_restored_ten_times_in_a_row_ends_with_the_same_weights(tool: Tool, folder: Path) -> None:
    draw = random.Random(SEED)
    processes.become_subreaper()
    undisturbed = start_job(folder / "undisturbed")
    assert undisturbed.wait() == 0, (folder / "undisturbed" / "log").read_text()
    job = start_job(folder / "restored")
    try:
        step = 0
        for turn in range(NR_ROUNDS):
            step = max(step, steps(folder / "restored")) + draw.randrange(1, STEPS_BETWEEN)
            wait_for_step(folder / "restored", step, job.pid)
            time.sleep(draw.uniform(0, 0.01))  # anywhere inside a step
            pids = processes.tree(job.pid)
            tool.dump(job.pid, folder / f"images.{turn}").expect(0)
            job.poll()
            processes.wait_gone(pids)
            tool.restore(folder / f"images.{turn}", "-d", *(["--serial"] if turn % 2 else [])).expect(0)
        processes.wait_until(lambda: processes.reap(job.pid) is not None, "the restored job ends", 120)
    finally:
        processes.end_all_below()
        job.poll()
    for name in ("losses.txt", "weights.bin"):
        same = (folder / "undisturbed" / name).read_bytes() == (folder / "restored" / name).read_bytes()
        assert same, f"{name} differs from that of the undisturbed run"
