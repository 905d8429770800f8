"""Restore of a tree whose memory takes M seconds and whose device takes D seconds: in parallel, and serial as control.

    perf/overlap.py [--tasks N ...] [--ratios D/M ...] [--mib MIB] [--runs N] [--late SHARE] [--check] [--full]

M is measured by restores with a device that takes no time, first to set D to a multiple of it, then in every turn. The
device is a plugin, perf/plugins/overlap_device.py, which waits without using the CPU. In every turn each point is
measured in both modes, which take turns in going first. A parallel restore is to take at most 1.1 max(M, D) + 0.2 s;
with --check the exit status says whether it did. After every restore the tasks compare their memory with what it was.

Times are of the operation itself, without the start of Python, and without the checksums of the images (--no-verify):
those are checked before anything is created, and nothing overlaps with that. The table goes to stdout, and with samples
and picture into the folder perf/results (or --results), under names with date and machine.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from floors import Floors
from measure import (
    GPURESTORE,
    MIB,
    RESULTS,
    ROOT,
    Broken,
    Programs,
    Series,
    again,
    machine,
    machine_slug,
    markdown_table,
    timed,
    workshop,
)
from overlap_plot import Panel, Point, draw
from support import processes
from support.victims import Victim

from gpurestore import namespaces

PLUGINS = Path(__file__).resolve().parent / "plugins"
MODES = ("parallel", "serial")
ALONE = "memory alone"
FULL_TASKS, FULL_RATIOS = (1, 2, 4, 8), (0.25, 0.5, 1.0, 2.0, 4.0)
QUICK_TASKS, QUICK_RATIOS = (1, 4), (0.25, 1.0, 4.0)


@dataclass
class Measured:
    """All samples of one point. ``d_s`` is the time of the device alone."""

    tasks: int
    ratio: float
    d_s: float
    series: dict[str, Series] = field(default_factory=dict)

    @property
    def m_s(self) -> float:
        """The time of the memory alone, measured between the other samples."""
        return self.median(ALONE)

    @property
    def limit_s(self) -> float:
        """What a parallel restore may take."""
        return 1.1 * max(self.m_s, self.d_s) + 0.2

    @property
    def is_met(self) -> bool:
        """Whether it did not take longer."""
        return self.median("parallel") <= self.limit_s

    def median(self, mode: str) -> float:
        """Seconds."""
        return self.series[mode].median

    def spread(self, mode: str) -> str:
        """The least and the most."""
        seconds = self.series[mode].values
        return f"{min(seconds):.2f} to {max(seconds):.2f}"

    def row(self) -> list[str]:
        """A line of the table."""
        return [
            str(self.tasks),
            f"{self.ratio:g}",
            f"{self.m_s:.2f}",
            f"{self.d_s:.2f}",
            f"{self.median('parallel'):.2f}",
            self.spread("parallel"),
            f"{self.limit_s:.2f}" + ("" if self.is_met else " (over)"),
            f"{self.median('serial'):.2f}",
            self.spread("serial"),
            f"{self.median('serial') / self.median('parallel'):.2f}",
        ]


HEADER = ("tasks", "D/M", "M s", "D s", "parallel s", "spread", "limit s", "serial s", "spread", "serial/parallel")


class Tree:
    """One tree that was dumped once, and is restored again and again."""

    def __init__(self, programs: Programs, folder: Path, tasks: int, mib: int, late: float) -> None:
        folder.mkdir()
        self.tasks, self.late = tasks, late
        self._floors, self._nr_bytes = Floors(programs), mib * MIB
        self.images, self.log = folder / "images", folder / "calls"
        self.victim = Victim.start(programs.program("holders"), folder / "victim", str(tasks), str(mib // tasks))
        timed([*GPURESTORE, "dump", "-t", str(self.victim.pid), "-D", self.images])
        self.victim.expect_gone()

    def restore(self, mode: str, device_s: float) -> tuple[float, float]:
        """Seconds of the whole operation, and of it those in which memory was restored."""
        self.log.write_text("")
        options = {
            "seconds": f"{device_s:.6f}",
            "late": f"{self.late:g}",
            "tasks": str(self.tasks),
            "log": str(self.log),
        }
        command = [*GPURESTORE, "restore", "-d", "-D", str(self.images), "--json", "--no-verify", f"--{mode}"]
        command += ["-L", str(PLUGINS)]
        for name, value in options.items():
            command += ["--plugin-option", f"overlap_device.{name}={value}"]
        self._floors.warm_up(self._nr_bytes)
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
        if done.returncode:
            raise Broken(f"{' '.join(command)} ended with {done.returncode}: {done.stderr.strip()[-2000:]}")
        result = json.loads(done.stdout)
        self._check_calls(device_s)
        self.victim.finish()
        again(self.victim)
        return result["total_s"], next(seconds for name, seconds, _ in result["stages"] if name == "memory")

    def _check_calls(self, device_s: float) -> None:
        """The device was asked for all that it had to do, once."""
        calls = [json.loads(line) for line in self.log.read_text().splitlines()]
        hooks = sorted(call["hook"] for call in calls)
        if hooks != sorted(["POST_FORKING", *["RESUME_DEVICES_LATE"] * self.tasks]):
            raise Broken(f"the device of a restore of {self.tasks} tasks was called so: {hooks}")
        took_s = sum(call["ended"] - call["began"] for call in calls)
        if took_s < device_s * 0.999:
            raise Broken(f"the device took {took_s:.3f} s instead of {device_s:.3f} s")


def measure(tree: Tree, ratios: Sequence[float], runs: int) -> list[Measured]:
    """All points of one tree, turn by turn."""
    tree.restore("parallel", 0.0)  # warms up
    m_s = statistics.median(tree.restore("parallel", 0.0)[1] for _ in range(runs))
    points = [Measured(tree.tasks, ratio, ratio * m_s) for ratio in ratios]
    for point in points:
        for mode in (ALONE, *MODES):
            point.series[mode] = Series()
    for turn in range(runs):
        for point in points:
            for mode in MODES if turn % 2 == 0 else reversed(MODES):
                point.series[mode].values.append(tree.restore(mode, point.d_s)[0])
            # M once more, at this very time: the machine may have become faster or slower.
            point.series[ALONE].values.append(tree.restore("parallel", 0.0)[1])
    return points


def panels(points: Sequence[Measured]) -> list[Panel]:
    """What the picture shows: a panel for each number of tasks."""
    found = []
    for tasks in dict.fromkeys(point.tasks for point in points):
        own = [point for point in points if point.tasks == tasks]
        samples = [
            Point(p.ratio, max(p.m_s, p.d_s), p.limit_s, p.series["parallel"].values, p.series["serial"].values)
            for p in own
        ]
        m_s = statistics.median(p.m_s for p in own)
        found.append(Panel(f"{tasks} task{'s' if tasks > 1 else ''}, M = {m_s:.2f} s", samples))
    return found


def report(points: Sequence[Measured], notes: Sequence[str], results: Path) -> None:
    """Print the table, and write table, samples and picture."""
    facts = machine()
    name = f"{facts['date']}-{machine_slug()}-overlap"
    lines = ["## Overlap of memory and devices in a restore", "", ", ".join(f"{k} {v}" for k, v in facts.items()), ""]
    lines += markdown_table([HEADER, *(point.row() for point in points)])
    for note in notes:
        lines += ["", note]
    text = "\n".join(lines) + "\n"
    print(text, end="")
    results.mkdir(parents=True, exist_ok=True)
    (results / f"{name}.md").write_text(text)
    data: dict[str, Any] = {"machine": facts, "notes": list(notes)}
    data["points"] = [
        {**asdict(point), "m_s": point.m_s, "limit_s": point.limit_s, "is_met": point.is_met} for point in points
    ]
    (results / f"{name}.json").write_text(json.dumps(data, indent=1) + "\n")
    for path in draw(panels(points), results / name):
        where = path.relative_to(ROOT) if path.is_relative_to(ROOT) else path
        print(f"\nWritten: {where}", end="")
    print()


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", type=int, help=f"tasks in the tree (default: {QUICK_TASKS})")
    parser.add_argument("--ratios", nargs="+", type=float, help=f"D/M (default: {QUICK_RATIOS})")
    parser.add_argument("--mib", type=int, help="memory of the whole tree (default: 512)")
    parser.add_argument("--runs", type=int, help="turns (default: 3)")
    parser.add_argument(
        "--late", type=float, default=0.0, help="share of D that must wait for a task's memory (default: 0)"
    )
    parser.add_argument("--full", action="store_true", help=f"tasks {FULL_TASKS}, D/M {FULL_RATIOS}, 1 GiB, 5 turns")
    parser.add_argument("--check", action="store_true", help="exit status 1 when a parallel restore is over its limit")
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="DIR")
    parser.add_argument("--folder", type=Path, metavar="DIR", help="where images go (default: the temporary folder)")
    args = parser.parse_args()
    if not namespaces.may_restore():
        sys.exit(namespaces.run([sys.executable, *sys.argv]))
    tasks = args.tasks or (FULL_TASKS if args.full else QUICK_TASKS)
    ratios = args.ratios or (FULL_RATIOS if args.full else QUICK_RATIOS)
    mib, runs = args.mib or (1024 if args.full else 512), args.runs or (5 if args.full else 3)
    points: list[Measured] = []
    with workshop(args.folder) as (programs, folder):
        for nr in tasks:
            points += measure(Tree(programs, folder / f"{nr}", nr, mib, args.late), ratios, runs)
            processes.end_all_below()
    notes = [
        f"{mib} MiB of memory in all, images in the page cache; medians of {runs} turns, spread is least to most.",
        "The device waits and uses no CPU; limit is 1.1 max(M, D) + 0.2 s.",
    ]
    if args.late:
        notes.append(f"{args.late:.0%} of D had to wait for the memory of a task: the limit does not apply.")
    report(points, notes, args.results)
    if args.check and not all(point.is_met for point in points):
        sys.exit(1)


if __name__ == "__main__":
    main()
