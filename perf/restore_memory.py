"""Dump and restore of a task with N GiB of private memory: whole commands, serial and parallel side by side.

    perf/restore_memory.py [GIB ...] [--runs N] [--cold] [--json FILE] [--folder DIR]

Every restored task compares its memory with what it was filled with, outside of the timed part. With CRIU=PROGRAM in
the environment the same is measured with CRIU, turn by turn. --cold empties the page cache before each restore.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from measure import GIB, GPURESTORE, Series, again, report, timed, workshop
from support import processes
from support.victims import Compiler, Victim

from gpurestore import namespaces

MODES: dict[str, tuple[str, ...]] = {
    "serial": ("--serial",),
    "parallel": ("--parallel",),
    "parallel, not verified": ("--parallel", "--no-verify"),
}


class Bench:
    """One size of task; samples collect in ``series``."""

    def __init__(self, compiler: Compiler, folder: Path, gib: float, *, cold: bool, criu: str | None) -> None:
        self.program = compiler.program("idle")
        self.folder = folder
        self.gib = gib
        self.cold = cold
        self.criu = criu
        self.series: dict[tuple[str, str, str], Series] = {}

    def add(self, what: str, tool: str, mode: str, seconds: float) -> None:
        """Note a sample."""
        key = (what, tool, mode)
        dimensions: dict[str, str | int | float] = {"GiB": self.gib, "tool": tool, "mode": mode}
        series = self.series.setdefault(key, Series(what, dimensions, int(self.gib * GIB)))
        series.seconds.append(seconds)

    def run(self, turn: int) -> None:
        """One dump and one restore in every mode, then the same with CRIU."""
        images = self.folder / f"images.{turn}"
        victim = self.start(f"victim.{turn}")
        seconds = timed([*GPURESTORE, "dump", "-t", str(victim.pid), "-D", images])
        self.add("dump", "gpurestore", "default", seconds)
        victim.expect_gone()
        for mode, options in MODES.items():
            self.drop_caches()
            seconds = timed([*GPURESTORE, "restore", "-d", "-D", images, *options])
            self.add("restore", "gpurestore", mode, seconds)
            self.verify(victim)
        remove(images)
        if self.criu:
            self.run_criu(self.criu, turn)

    def run_criu(self, criu: str, turn: int) -> None:
        """The reference."""
        images = self.folder / f"criu.{turn}"
        images.mkdir()
        victim = self.start(f"criu-victim.{turn}")
        self.add("dump", "criu", "default", timed([criu, "dump", "-t", str(victim.pid), "-D", images, "-o", "log"]))
        victim.expect_gone()
        self.drop_caches()
        self.add("restore", "criu", "default", timed([criu, "restore", "-d", "-D", images, "-o", "log"]))
        self.verify(victim)
        remove(images)

    def start(self, name: str) -> Victim:
        """A task that holds the memory."""
        return Victim.start(self.program, self.folder / name, str(int(self.gib * 1024)))

    def verify(self, victim: Victim) -> None:
        """The restored task checks its own memory and ends."""
        victim.finish()
        again(victim)

    def drop_caches(self) -> None:
        """Make the images cold, where that was asked for."""
        if self.cold:
            os.sync()
            Path("/proc/sys/vm/drop_caches").write_text("3")


def remove(folder: Path) -> None:
    """Give the disk back before the next turn."""
    for path in folder.iterdir():
        path.unlink()
    folder.rmdir()


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("gib", nargs="*", type=float, default=[0.25, 1.0], help="sizes of the task (default: 0.25 1)")
    parser.add_argument("--runs", type=int, default=3, help="turns for each size (default: 3)")
    parser.add_argument("--cold", action="store_true", help="empty the page cache before each restore (needs root)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every sample to FILE")
    parser.add_argument(
        "--folder", type=Path, metavar="DIR", help="where the images go (default: the temporary folder)"
    )
    args = parser.parse_args()
    if not namespaces.may_restore():
        sys.exit(namespaces.run([sys.executable, *sys.argv]))
    found: list[Series] = []
    with workshop(args.folder) as (compiler, folder):
        for gib in args.gib:
            place = folder / f"{gib:g}"
            place.mkdir()
            bench = Bench(compiler, place, gib, cold=args.cold, criu=os.environ.get("CRIU"))
            for turn in range(args.runs):
                bench.run(turn)
            found.extend(bench.series.values())
            processes.end_all_below()
    notes = [
        "Whole commands, start-up of Python and fsync of the images included; one task, private anonymous memory.",
        "Images were " + ("not in" if args.cold else "in") + " the page cache before a restore.",
    ]
    report("Dump and restore of memory", found, notes, args.json)


if __name__ == "__main__":
    main()
