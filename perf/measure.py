"""What the benchmarks share: victims, timed commands, samples, the machine's description, tables."""

from __future__ import annotations

import os
import platform
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))  # the tests' victims and process helpers

from support import processes  # noqa: E402
from support.victims import CFLAGS, SOURCES, Compiler, Victim  # noqa: E402

GPURESTORE = (sys.executable, "-m", "gpurestore")
RESULTS = ROOT / "perf" / "results"
MIB, GIB = 1 << 20, 1 << 30


class Broken(Exception):  # noqa: N818 - what failed is the thing measured
    """A command failed, or what it restored is not what was dumped."""


@dataclass
class Series:
    """Samples of one quantity; of seconds unless ``unit`` says otherwise."""

    unit: str = "s"
    values: list[float] = field(default_factory=list)

    @property
    def median(self) -> float:
        """The middle sample."""
        return statistics.median(self.values)

    @property
    def spread(self) -> str:
        """The least and the most."""
        low, high = min(self.values), max(self.values)
        return f"{digits(low)} to {digits(high)}" if len(self.values) > 1 else ""


def digits(value: float) -> str:
    """Three digits that count, and not more than three behind the point."""
    return f"{value:.3f}" if value < 1 else f"{value:.2f}" if value < 100 else f"{value:.0f}"


@dataclass
class Programs(Compiler):
    """Compiles victims, those of the benchmarks and those of the tests, and other programs of the suite."""

    PERF: ClassVar[Path] = ROOT / "perf"

    def program(self, name: str) -> list[str]:
        """The command for victim ``name``."""
        source = self.PERF / "victims" / f"{name}.c"
        return [str(self.compiled(source))] if source.exists() else super().program(name)

    def compiled(self, source: Path) -> Path:
        """The program made of one C file."""
        if source.stem not in self.done:
            target = self.folder / source.stem
            command: list[str | Path] = ["gcc", "-std=gnu11", *CFLAGS, "-O2", "-I", SOURCES, "-o", target, source]
            result = subprocess.run(command, capture_output=True, text=True, check=False)
            if result.returncode:
                raise Broken(f"{source.name} does not compile: {result.stderr}")
            self.done[source.stem] = target
        return self.done[source.stem]


def timed(command: Sequence[str | Path]) -> tuple[float, str]:
    """Wall seconds of a whole process and what it wrote to stdout; a failing one raises Broken with what it said."""
    started = time.perf_counter()
    result = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    seconds = time.perf_counter() - started
    if result.returncode:
        said = (result.stderr.strip() or result.stdout.strip())[-1000:]
        raise Broken(f"{' '.join(map(str, command))} ended with {result.returncode}: {said}")
    return seconds, result.stdout


@contextmanager
def workshop(where: Path | None) -> Iterator[tuple[Programs, Path]]:
    """A compiler for victims and a folder; processes and files are cleared away at the end."""
    processes.become_subreaper()
    # An interrupted run clears away what it made, too: that may be gigabytes.
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    folder = Path(tempfile.mkdtemp(prefix="gpurestore-perf-", dir=where))
    programs = folder / "programs"
    programs.mkdir()
    try:
        yield Programs(programs), folder
    finally:
        processes.end_all_below()
        shutil.rmtree(folder, ignore_errors=True)


def again(victim: Victim) -> None:
    """Forget that a victim was told to check itself: it is going to be restored to before that."""
    for name in ("go", "verdict", "wrong"):
        (victim.folder / name).unlink(missing_ok=True)


def machine() -> dict[str, str | int]:
    """Where the figures come from."""
    commit = subprocess.run(
        ["git", "-C", ROOT, "describe", "--always", "--dirty"], capture_output=True, text=True, check=False
    ).stdout.strip()
    thp = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    chosen = re.search(r"\[(\w+)\]", thp.read_text()) if thp.exists() else None
    return {
        "cpu": _cpu_line("model name") or "unknown",
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GIB),
        "virtual": "yes" if _is_virtual() else "no",
        "kernel": platform.release(),
        "huge_pages": chosen[1] if chosen else "none",
        "python": platform.python_version(),
        "commit": commit or "unknown",
        "date": time.strftime("%Y-%m-%d"),
    }


def machine_slug() -> str:
    """The machine in a few letters, for names of files."""
    return f"{len(os.sched_getaffinity(0))}core-{'vm' if _is_virtual() else 'host'}"


def _is_virtual() -> bool:
    return "hypervisor" in _cpu_line("flags").split()


def _cpu_line(name: str) -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.split("\t")[0] == name:
            return line.partition(":")[2].strip()
    return ""


def markdown_table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a table whose first row is its header."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in rows
    ]
    return [lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]]
