"""Dumps: into memory, onto a disk, and of a task that has more address space than memory."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

from floors import default_threads
from measure import MIB, Broken
from suite import Bench, Contender, Outcome, remove, sum_of_pss
from support import processes
from support.victims import Victim
from tools import Criu, Run

NAME = "dump"
TITLE = "Dump of one task"
SPARSE_MIB = 64


def run(bench: Bench, outcome: Outcome) -> None:
    """Measure."""
    # The images of each contender stay until the end, where all of them are verified.
    mib = bench.size(1024, 2048, copies=6.5)
    warm = Dumps(bench, outcome, f"dump of {mib} MiB into memory", "idle", bench.folder, mib)
    floors = [
        partial(warm.floor, "plain copy into a new file"),
        partial(warm.floor, "plain copy into a mapping of a new file", mapped=True),
    ]
    warm.measure([(), *bench.variants("dump", [("--no-sync",)])], floors)
    warm.verify()
    mib = bench.size(256, 2048, copies=6.5)
    disk = Dumps(bench, outcome, f"dump of {mib} MiB onto a disk", "idle", bench.disk, mib)
    floors = [
        partial(disk.floor, "plain copy and fsync", sync=True),
        partial(disk.floor, "O_DIRECT copy and fsync", sync=True, direct=True),
    ]
    disk.measure([(), *bench.variants("dump", [("--no-sync",), ("--direct-io",)])], floors)
    disk.verify()
    what = f"dump of {SPARSE_MIB} MiB among zeros and untouched memory"
    sparse = Dumps(bench, outcome, what, "sparse", bench.folder, SPARSE_MIB)
    sparse.measure([()])
    sparse.verify()
    outcome.want_faster(warm.ours, outcome.best(warm.what, "criu", "command"), 3)
    stored = sparse.ours.median("image") - SPARSE_MIB
    outcome.want_below(f"{sparse.what}: what is stored beside these", 8, stored, "MiB")
    outcome.notes.append(
        "The sparse task maps 64 GiB, and has touched 64 MiB of them and 256 MiB of zeros beside them."
    )


class Dumps:
    """One task that is dumped again and again and goes on in between."""

    def __init__(
        self,
        bench: Bench,
        outcome: Outcome,
        what: str,
        victim: str,
        target: Path,
        mib: int,
        *arguments: int,
        with_criu: bool = True,
    ) -> None:
        """``arguments`` of the victim: ``mib`` where there are none."""
        self.bench, self.outcome, self.what, self.target = bench, outcome, what, target
        self.nr_bytes = mib * MIB
        command = bench.programs.program(victim)
        self.victim = Victim.start(command, target / f"dumped-{victim}", *map(str, arguments or (mib,)))
        self.criu = bench.criu if with_criu else None
        self.pss_growth_percent: list[float] = []
        self.ours = outcome.line(what, "ours", "gpurestore", self.nr_bytes, compared_by="command")
        self.kept: list[tuple[Path, Criu | None]] = []

    def measure(self, variants: Sequence[tuple[str, ...]], floors: Sequence[Contender] = ()) -> None:
        """Dump in turns."""
        contenders: list[Contender] = [partial(self.dump, options) for options in variants]
        if self.criu:
            contenders.append(partial(self.dump_by_criu, self.criu))
        self.bench.in_turns([*contenders, *floors])

    def dump(self, options: tuple[str, ...]) -> None:
        """One dump of ours."""
        name = " ".join(("gpurestore", *options))
        line = self.outcome.line(self.what, "ours", name, self.nr_bytes, compared_by="command")
        images = self._images(name, None)
        before = sum_of_pss(self.victim.pids)
        run = self.bench.gpurestore.dump(self.victim.pid, images, "-R", *options)
        self.pss_growth_percent.append(100 * (sum_of_pss(self.victim.pids) / before - 1))
        line.add_run(run)
        line.add("image", run.facts["image_bytes"] / MIB, "MiB")

    def dump_by_criu(self, criu: Criu) -> None:
        """One dump of CRIU's, which does not sync its files."""
        line = self.outcome.line(self.what, "criu", "CRIU", self.nr_bytes, compared_by="command")
        run: Run = criu.dump(self.victim.pid, self._images("criu", criu), "-R")
        line.add_run(run)

    def floor(self, name: str, **how: bool) -> None:
        """A plain copy of as much memory into a file."""
        line = self.outcome.line(self.what, "floor", name, self.nr_bytes)
        # The program holds as much memory as it writes.
        self.bench.floors.touch(2 * self.nr_bytes)
        line.add("command", self.bench.floors.write(self.target / "floor", self.nr_bytes, default_threads(), **how))

    def verify(self) -> None:
        """What each tool dumped last is restored and verifies itself."""
        processes.kill(self.victim.pids)
        self.victim.expect_gone()
        for images, criu in self.kept:
            if criu:
                criu.restore(images)
            else:
                self.bench.gpurestore.restore(images)
            try:
                self.victim.finish()
            except AssertionError as error:
                raise Broken(f"{images.name} is not what was dumped: {error}") from error
            for name in ("go", "verdict", "wrong"):
                (self.victim.folder / name).unlink(missing_ok=True)
            remove(images)

    def _images(self, name: str, criu: Criu | None) -> Path:
        """A new folder; what the same tool wrote before is gone."""
        images = self.target / f"{self.victim.name}-{name.replace(' ', '')}"
        remove(images)
        if images not in [path for path, _ in self.kept]:
            self.kept.append((images, criu))
        self.bench.floors.warm_up(self.nr_bytes)
        return images
