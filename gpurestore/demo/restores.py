"""The demonstration's restores: in front of the tree, ended again, serial against parallel."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpurestore import core
from gpurestore.errors import GpurestoreError

COMMAND = (sys.executable, "-m", "gpurestore")
NR_ROUNDS = 3
_GONE_S = 20.0


@dataclass(frozen=True, slots=True)
class Timing:
    """One way to restore: the fastest of some rounds. Seconds in all, and of moving memory."""

    how: str
    total_s: float
    host_memory_s: float
    device_memory_s: float
    rounds: int


@dataclass(slots=True)
class Restored:
    """A restored tree and the command in front of it."""

    process: subprocess.Popen[bytes]
    result: dict[str, Any]
    seconds: float

    def stage_s(self, name: str) -> float:
        """How long a stage took."""
        return sum(float(stage[1]) for stage in self.result["stages"] if stage[0] == name)


def adopt_orphans() -> None:
    """Let processes whose parents were killed become ours, to be waited for: their pids are wanted again."""
    core.set_subreaper(True)


@contextmanager
def restored(images: Path, kill: Callable[[], None], *options: str) -> Iterator[Restored]:
    """A tree, restored from ``images``; what is left of it in the end is killed, and waited for."""
    started = time.monotonic()
    process = subprocess.Popen(
        [*COMMAND, "restore", "-D", str(images), "--json", *options],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
    )
    assert process.stdout is not None
    pids: list[int] = []
    try:
        line = process.stdout.readline()  # the result, printed as soon as the tree runs
        seconds = time.monotonic() - started
        if not line:
            raise GpurestoreError(f"the restore failed with status {process.wait()}")
        result = json.loads(line)
        pids = [int(pid) for pid in result["pids"]]
        yield Restored(process, result, seconds)
    finally:
        kill()
        if process.poll() is None and not pids:
            process.terminate()
        process.wait()
        process.stdout.close()
        wait_gone(pids)


def wait_gone(pids: list[int]) -> None:
    """Wait until no process has these pids, also as a zombie."""
    until = time.monotonic() + _GONE_S
    for pid in pids:
        while True:
            try:
                os.waitpid(pid, os.WNOHANG)
            except ChildProcessError:
                pass
            if not os.path.exists(f"/proc/{pid}"):
                break
            if time.monotonic() > until:
                raise GpurestoreError(f"pid {pid} does not go away")
            time.sleep(0.005)


def compare(images: Path, kill: Callable[[], None], put_back: Callable[[], None]) -> list[Timing]:
    """Restore, and end again, some times each way. ``put_back`` undoes what the tree wrote to its files meanwhile."""
    timings: dict[str, Timing] = {}
    for _ in range(NR_ROUNDS):
        for how in ("serial", "parallel"):
            with restored(images, kill, f"--{how}") as tree:
                total = float(tree.result["total_s"])
                if how not in timings or total < timings[how].total_s:
                    parts = tree.stage_s("memory"), tree.stage_s("device memory")
                    timings[how] = Timing(how, total, *parts, NR_ROUNDS)
            put_back()
    return list(timings.values())


def table(timings: list[Timing]) -> str:
    """Serial against parallel."""
    lines = ["restore       in all   host memory   device memory"]
    for timing in timings:
        parts = f"{timing.total_s:7.3f} s     {timing.host_memory_s:7.3f} s       {timing.device_memory_s:7.3f} s"
        lines.append(f"{timing.how:<10} {parts}")
    return "\n".join(lines)
