"""The limits of this machine, measured by perf/floors.c and by fio: what nobody can be faster than."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from measure import MIB, Programs, timed

KINDS = ("small", "huge", "shared", "shared-huge")
DEPTHS = (4, 32)  # of reads from a disk; some are quicker with few reads under way
_MIN_TOUCH = 64 * MIB


def default_threads() -> int:
    """As many as the engine uses for memory."""
    return len(os.sched_getaffinity(0))


@dataclass(frozen=True, slots=True)
class Way:
    """One way to copy: kind of memory, who faults it in, and bytes per read."""

    memory: str
    populate: str
    chunk_bytes: int

    @property
    def options(self) -> list[str]:
        """For the program."""
        return ["--memory", self.memory, "--populate", self.populate, "--chunk", str(self.chunk_bytes)]

    def __str__(self) -> str:
        kind = {"small": "4 KiB pages", "huge": "huge pages", "shared": "shared", "shared-huge": "shared huge pages"}
        how = {"none": "", "ahead": ", populated ahead", "placed": ", placed as whole pages"}
        return f"{kind[self.memory]}{how[self.populate]}, {self.chunk_bytes // 1024} KiB"


# The best of these is the floor of a run: which one wins depends on the machine and changes from run to run.
SMALL_WAYS = (Way("small", "ahead", MIB),)
PRIVATE_WAYS = (*SMALL_WAYS, Way("huge", "none", 4 * MIB), Way("huge", "ahead", 4 * MIB))
SHARED_WAYS = (
    Way("shared", "ahead", MIB),
    Way("shared", "placed", MIB),
    Way("shared-huge", "none", 4 * MIB),
    Way("shared-huge", "ahead", 4 * MIB),
)


class Floors:
    """Runs the program."""

    def __init__(self, programs: Programs) -> None:
        self.program = programs.compiled(Programs.PERF / "floors.c")
        self.fio = shutil.which("fio")

    @property
    def disk_reader(self) -> str:
        """What measures the disk."""
        return "fio, io_uring, 1 MiB" if self.fio else "our O_DIRECT reader, 1 MiB"

    def copy(self, files: Sequence[Path], way: Way, threads: int) -> float:
        """Seconds for reading ``files`` from the page cache into fresh memory."""
        return self._run("copy", "--threads", str(threads), *way.options, *files)[0]

    def write(
        self,
        target: Path,
        nr_bytes: int,
        threads: int,
        *,
        chunk_bytes: int = 4 * MIB,
        direct: bool = False,
        sync: bool = False,
        mapped: bool = False,
    ) -> float:
        """Seconds for writing memory to the new file ``target``, which is removed again."""
        flags = ["--direct"] * direct + ["--sync"] * sync + ["--mapped"] * mapped
        options = ["--memory", "huge", "--bytes", str(nr_bytes), "--threads", str(threads), "--chunk", str(chunk_bytes)]
        try:
            return self._run("write", *options, *flags, target)[0]
        finally:
            target.unlink(missing_ok=True)

    def read_directly(self, file: Path, depth: int, chunk_bytes: int) -> float:
        """Seconds for reading ``file`` past the page cache, by as many threads as ``depth`` says."""
        return self._run("read", "--threads", str(depth), "--chunk", str(chunk_bytes), file)[0]

    def read_disk(self, file: Path, depth: int, chunk_bytes: int = MIB) -> float:
        """The same by fio, where that is installed."""
        if not self.fio:
            return self.read_directly(file, depth, chunk_bytes)
        command = [self.fio, "--name=floor", f"--filename={file}", "--rw=read", "--direct=1", "--ioengine=io_uring"]
        command += [f"--iodepth={depth}", f"--bs={chunk_bytes}", "--readonly", "--output-format=json"]
        job = json.loads(timed(command)[1])["jobs"][0]["read"]
        # fio reads whole blocks only: what is left at the end of the file takes its share.
        return float(job["runtime"]) / 1000 * file.stat().st_size / int(job["io_bytes"])

    def touch(self, nr_bytes: int) -> None:
        """Have the hypervisor back memory that is about to be used: it takes free memory away within seconds."""
        options = ["--threads", str(default_threads()), "--chunk", str(4 * MIB), "--memory", "huge"]
        self._run("touch", *options, "--bytes", str(max(_MIN_TOUCH, nr_bytes)))

    def warm_up(self, nr_bytes: int) -> None:
        """The same for a dump or restore of ``nr_bytes``, with some room for page tables and the tool."""
        self.touch(nr_bytes * 17 // 16)

    def evict(self, files: Sequence[Path]) -> int:
        """Drop files from the page cache; the bytes that stayed there nevertheless."""
        return self._run("evict", *files)[1]

    def _run(self, *arguments: str | Path) -> tuple[float, int]:
        answer = json.loads(timed([self.program, *arguments])[1])
        return float(answer["seconds"]), int(answer["bytes"])
