"""Dumps: into memory, onto a disk, and of a task that has more address space than memory."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from floors import default_threads
from measure import MIB, Broken
from suite import Bench, Outcome, available_bytes, remove
from support import processes
from support.victims import Victim
from tools import Criu, Run

NAME = "dump"
TITLE = "Dump of one task"


def run(bench: Bench, outcome: Outcome) -> None:
    """Measure."""
    mib = bench.size(1024, 4096, copies=2.3)
    place = bench.folder / "dump"
    place.mkdir()
    try:
        warm = Dumps(bench, outcome, f"dump of {mib} MiB into memory", "idle", place, place, mib)
        warm.measure([()])
        floor = partial(warm.floor, "plain copy into a new file")
        bench.in_turns([floor])
        warm.verify()
        disk = Dumps(bench, outcome, f"dump of {mib} MiB onto a disk", "idle", place, bench.disk, mib)
        has_direct = bench.gpurestore.has("dump", "--direct-io")
        disk.measure([(), ("--direct-io",)] if has_direct else [()])
        bench.in_turns([partial(disk.floor, "plain copy and fsync", sync=True)])
        bench.in_turns([partial(disk.floor, "O_DIRECT copy and fsync", sync=True, direct=True)])
        disk.verify()
        if not has_direct:
            outcome.notes.append("This version of gpurestore dump has no --direct-io.")
        sparse = Dumps(bench, outcome, "dump of 64 MiB among zeros and untouched memory", "sparse", place, place, 64)
        sparse.measure([()])
        sparse.verify()
    finally:
        processes.end_all_below()
        remove(place)
    outcome.want_faster(warm.ours, outcome.best(warm.what, "criu", "command"), 3)
    outcome.notes.append("The sparse task maps 64 GiB and has touched 64 MiB of it, and 256 MiB of zeros beside them.")


class Dumps:
    """One task that is dumped again and again and goes on in between."""

    def __init__(
        self, bench: Bench, outcome: Outcome, what: str, victim: str, place: Path, target: Path, mib: int
    ) -> None:
        self.bench, self.outcome, self.what, self.target = bench, outcome, what, target
        self.nr_bytes = mib * MIB
        self.place = place / victim / target.name
        self.place.mkdir(parents=True)
        self.victim = Victim.start(bench.programs.program(victim), self.place / "victim", str(mib))
        self.ours = outcome.line(what, "ours", "gpurestore", self.nr_bytes, compared_by="command")
        self.kept: list[tuple[Path, Criu | None]] = []

    def measure(self, variants: list[tuple[str, ...]]) -> None:
        """Dump in turns."""
        contenders = [partial(self.dump, options) for options in variants]
        if self.bench.criu:
            contenders.append(partial(self.dump_by_criu, self.bench.criu))
        self.bench.in_turns(contenders)

    def dump(self, options: tuple[str, ...]) -> None:
        """One dump of ours."""
        name = " ".join(("gpurestore", *options))
        line = self.outcome.line(self.what, "ours", name, self.nr_bytes, compared_by="command")
        images = self._images(name, None)
        line.add_run(self.bench.gpurestore.dump(self.victim.pid, images, "-R", *options))
        self._check_size(images)

    def dump_by_criu(self, criu: Criu) -> None:
        """One dump of CRIU's, which does not sync its files."""
        line = self.outcome.line(self.what, "criu", "CRIU", self.nr_bytes, compared_by="command")
        run: Run = criu.dump(self.victim.pid, self._images("criu", criu), "-R")
        line.add_run(run)

    def floor(self, name: str, *, sync: bool = False, direct: bool = False) -> None:
        """A plain copy of as much memory into a file."""
        line = self.outcome.line(self.what, "floor", name, self.nr_bytes)
        # The program holds as much memory as it writes.
        self.bench.floors.touch(2 * self.nr_bytes)
        target = self.target / "floor"
        line.add("command", self.bench.floors.write(target, self.nr_bytes, default_threads(), direct=direct, sync=sync))

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
        images = self.target / f"{self.place.parent.name}-{name.replace(' ', '')}"
        remove(images)
        if images not in [path for path, _ in self.kept]:
            self.kept.append((images, criu))
        self.bench.floors.touch(min(self.nr_bytes, available_bytes() // 2))
        return images

    def _check_size(self, images: Path) -> None:
        stored = sum(path.stat().st_size for path in images.glob("pages-*.img"))
        if stored < self.nr_bytes:
            raise Broken(f"{images} holds {stored} bytes of pages, not {self.nr_bytes}")
