"""What the benchmarks share: victims, timed commands, samples, and how results are printed."""

from __future__ import annotations

import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))  # the tests' victims and process helpers

from support import processes  # noqa: E402
from support.victims import Compiler, Victim  # noqa: E402

GPURESTORE = (sys.executable, "-m", "gpurestore")
GIB = 1 << 30


@dataclass
class Series:
    """Samples of one thing, in seconds, with the dimensions that it was measured under."""

    what: str
    dimensions: dict[str, str | int | float]
    nr_bytes: int = 0
    seconds: list[float] = field(default_factory=list)

    def row(self) -> list[str]:
        """A line of the table: dimensions, median, spread, and GB/s where bytes were moved."""
        median = statistics.median(self.seconds)
        speed = f"{self.nr_bytes / median / 1e9:.2f}" if self.nr_bytes else ""
        spread = f"{min(self.seconds):.3f} to {max(self.seconds):.3f}"
        return [self.what, *map(str, self.dimensions.values()), f"{median:.3f}", spread, speed, str(len(self.seconds))]


def timed(command: Sequence[str | Path]) -> float:
    """Wall seconds of a whole process; a failing one ends the benchmark with what it said."""
    started = time.perf_counter()
    result = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    seconds = time.perf_counter() - started
    if result.returncode:
        sys.exit(f"{' '.join(map(str, command))} ended with {result.returncode}: {result.stderr.strip()[-2000:]}")
    return seconds


@contextmanager
def workshop(where: Path | None) -> Iterator[tuple[Compiler, Path]]:
    """A compiler for victims and a folder; processes and files are cleared away at the end."""
    processes.become_subreaper()
    folder = Path(tempfile.mkdtemp(prefix="gpurestore-perf-", dir=where))
    programs = folder / "programs"
    programs.mkdir()
    try:
        yield Compiler(programs), folder
    finally:
        processes.end_all_below()
        shutil.rmtree(folder, ignore_errors=True)


def again(victim: Victim) -> None:
    """Forget that a victim was told to check itself: it is going to be restored to before that."""
    for name in ("go", "verdict", "wrong"):
        (victim.folder / name).unlink(missing_ok=True)


def machine() -> dict[str, str | int]:
    """Where the figures come from."""
    model = "unknown"
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            model = line.partition(":")[2].strip()
            break
    commit = subprocess.run(
        ["git", "-C", ROOT, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    ).stdout.strip()
    return {
        "cpu": model,
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GIB),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "commit": commit or "unknown",
        "date": time.strftime("%Y-%m-%d"),
    }


def markdown_table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a table whose first row is its header."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in rows
    ]
    return [lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]]


def report(title: str, series: Sequence[Series], notes: Sequence[str], json_file: Path | None) -> None:
    """Print a Markdown table, and write every sample to ``json_file``."""
    facts = machine()
    print(f"## {title}\n")
    print(", ".join(f"{name} {value}" for name, value in facts.items()) + "\n")
    header = ["what", *series[0].dimensions, "median s", "min to max s", "GB/s", "runs"]
    print("\n".join(markdown_table([header, *(entry.row() for entry in series)])))
    for note in notes:
        print(f"\n{note}")
    if json_file is not None:
        data: dict[str, Any] = {"title": title, "machine": facts, "notes": list(notes)}
        data["series"] = [asdict(entry) for entry in series]
        json_file.write_text(json.dumps(data, indent=1) + "\n")
