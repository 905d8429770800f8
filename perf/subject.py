"""Trees that every tool dumped once, and that are restored again and again."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from measure import Broken, again
from suite import Bench, Contender, Line, Outcome, remove, sum_of_pss
from support import processes
from support.victims import Victim
from tools import Criu, Run

_NUMBERS = itertools.count(1)


class Subject:
    """A tree that every tool dumped once, and that is restored again and again, verifying itself each time."""

    def __init__(
        self,
        bench: Bench,
        outcome: Outcome,
        victim: str,
        *arguments: str | int,
        where: Path | None = None,
        dump_options: Sequence[str] = (),
        with_criu: bool = True,
        copies: int = 1,
    ) -> None:
        """``copies``: how often a restore needs the memory of the tree; two where the page cache takes as much."""
        self.bench, self.outcome, self._copies = bench, outcome, copies
        self.folder = (where or bench.folder) / f"{victim}-{next(_NUMBERS)}"
        self.folder.mkdir()
        self.images, self.criu_images = self.folder / "images", self.folder / "criu"
        self.victim = Victim.start(bench.programs.program(victim), self.folder / "victim", *map(str, arguments))
        self.pss_bytes = sum_of_pss(self.victim.pids)
        self.what = " ".join((victim, *map(str, arguments)))
        self.pss_after: list[int] = []
        self.criu = bench.criu if with_criu else None
        keep = ("-R",) if self.criu else ()
        self.dumped = bench.gpurestore.dump(self.victim.pid, self.images, *keep, *dump_options)
        self.criu_dumped: Run | None = None
        if self.criu:
            self._dump_with_criu(self.criu)
        self.victim.expect_gone()
        self.nr_bytes = int(self.dumped.facts["memory_bytes"])

    def _dump_with_criu(self, criu: Criu) -> None:
        try:
            self.criu_dumped = criu.dump(self.victim.pid, self.criu_images)
        except Broken as error:
            self.outcome.notes.append(f"CRIU does not dump this tree: {error}")
            self.criu = None
            processes.kill(self.victim.pids)

    def restore(self, line: Line, *options: str) -> Run:
        """Restore with gpurestore; the tree checks itself outside of the timed part."""
        self.warm_up()
        run = self.bench.gpurestore.restore(self.images, *options)
        line.add_run(run)
        self.pss_after.append(sum_of_pss(self.victim.pids))
        self.verify()
        return run

    def restore_by_criu(self, line: Line) -> None:
        """The same with CRIU; where it fails that is noted, and it is not asked again."""
        if self.criu is None:
            return
        self.warm_up()
        try:
            line.add_run(self.criu.restore(self.criu_images))
        except Broken as error:
            self.outcome.notes.append(f"CRIU does not restore this tree: {error}")
            self.criu = None
            return
        self.verify()

    def want_no_growth(self, limit_percent: float) -> None:
        """Demand that the tree uses as much memory after our restores as it did before."""
        change = max(abs(after - self.pss_bytes) for after in self.pss_after) / self.pss_bytes
        what = f"{self.what}: change of the memory in use (sum of PSS)"
        self.outcome.want_below(what, limit_percent, 100 * change, "%")

    def warm_up(self) -> None:
        """Touch as much memory as a restore needs."""
        self.bench.floors.warm_up(self._copies * self.nr_bytes)

    def verify(self) -> None:
        """The restored tree checks its memory and ends."""
        try:
            self.victim.finish()
        except AssertionError as error:
            raise Broken(f"what was restored is not what was dumped: {error}") from error
        again(self.victim)

    def contenders(self, what: str, variants: Sequence[tuple[str, ...]] = ((),)) -> list[Contender]:
        """A restore with each of the ``variants`` of options, and one by CRIU."""
        found: list[Contender] = []
        for options in variants:
            line = self.outcome.line(what, "ours", " ".join(("gpurestore", *options)), self.nr_bytes)
            found.append(partial(self.restore, line, *options))
        if self.criu:
            criu_line = self.outcome.line(what, "criu", "CRIU", self.nr_bytes)
            found.append(partial(self.restore_by_criu, criu_line))
        return found


@contextmanager
def subject(
    bench: Bench,
    outcome: Outcome,
    victim: str,
    *arguments: str | int,
    where: Path | None = None,
    dump_options: Sequence[str] = (),
    with_criu: bool = True,
    copies: int = 1,
) -> Iterator[Subject]:
    """A :class:`Subject`; nothing of it is left afterwards, whatever happens."""
    folder = where or bench.folder
    before = set(folder.iterdir())
    try:
        yield Subject(
            bench,
            outcome,
            victim,
            *arguments,
            where=where,
            dump_options=dump_options,
            with_criu=with_criu,
            copies=copies,
        )
    finally:
        processes.end_all_below(keep=bench.ballast.pids)
        for path in set(folder.iterdir()) - before:
            remove(path)
