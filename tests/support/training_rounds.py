"""Starts a training job and dumps and restores it in rounds, at moments drawn from a seed; ends when the job does.

    training_rounds.py FOLDER NR_STEPS NR_ROUNDS SEED

It uses the library, loaded before the first round: a command starts so long that a quick job would end before the last
round. The images go next to FOLDER.
"""

from __future__ import annotations

import logging
import random
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import gpurestore
from support import processes

STEPS_BETWEEN = 120


def start_job(folder: Path, nr_steps: int) -> subprocess.Popen[bytes]:
    """The demonstration's job, detached."""
    folder.mkdir()
    with open(folder / "log", "wb") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "gpurestore.demo.job", "--out", str(folder), "--steps", str(nr_steps)],
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


def one_round(turn: int, pid: int, folder: Path) -> None:
    """Dump and restore."""
    images = folder.parent / f"images.{turn}"
    pids = processes.tree(pid)
    gpurestore.dump_sync(pid, images)
    processes.wait_gone(pids)
    gpurestore.restore_sync(images, detached=True, serial=bool(turn % 2))


def wait_for_step(wanted: int, folder: Path, pid: int) -> None:
    """Until the job is as far as that, or has ended."""
    processes.wait_until(lambda: steps(folder) >= wanted or not processes.alive(pid), f"step {wanted}", 120)


def main() -> None:
    """All rounds."""
    folder, nr_steps, nr_rounds, seed = Path(sys.argv[1]), *map(int, sys.argv[2:5])
    logging.basicConfig(level=logging.DEBUG)
    processes.become_subreaper()
    draw = random.Random(seed)
    job = start_job(folder, nr_steps)
    try:
        for turn in range(nr_rounds):
            wait_for_step(steps(folder) + draw.randrange(1, STEPS_BETWEEN), folder, job.pid)
            assert processes.alive(job.pid), f"the job ended in round {turn}: {(folder / 'log').read_text()}"
            time.sleep(draw.uniform(0, 0.01))  # anywhere inside a step
            one_round(turn, job.pid, folder)
            print(f"round {turn} after step {steps(folder)}", flush=True)
        processes.wait_gone([job.pid], 120)
    finally:
        processes.end_all_below()
        job.poll()


if __name__ == "__main__":
    main()
