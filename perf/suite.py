"""What a case of the suite is made of: lines of samples, goals, and trees that are restored again and again."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Protocol, TypeAlias

from ballast import Ballast
from floors import Floors, Way, default_threads
from measure import GIB, MIB, Broken, Programs, Series
from support import processes
from tools import Criu, Gpurestore, Run

Contender: TypeAlias = Callable[[], object]
_SPARE_BYTES = GIB  # beside what a case works with: page tables, programs, page cache
Who = Literal["ours", "floor", "criu"]


@dataclass
class Line:
    """What one contender was measured at. Lines with the same ``what`` are compared with each other."""

    what: str
    who: Who
    name: str
    nr_bytes: int = 0
    series: dict[str, Series] = field(default_factory=dict)
    compared_by: str = ""  # the clock that counts against a floor; memory where there is one, else the command

    def add(self, clock: str, value: float, unit: str = "s") -> None:
        """Note a sample."""
        self.series.setdefault(clock, Series(unit)).values.append(value)

    def add_run(self, run: Run) -> None:
        """Note all clocks of a run."""
        for clock, seconds in run.seconds.items():
            self.add(clock, seconds)

    @property
    def clock(self) -> str:
        """What is compared with a floor."""
        return self.compared_by or ("memory" if "memory" in self.series else "command")

    def median(self, clock: str | None = None) -> float:
        """Of one clock; of the one that is compared with a floor where none is named."""
        return self.series[clock or self.clock].median

    def least(self, clock: str | None = None) -> float:
        """The same, of the fastest run."""
        return min(self.series[clock or self.clock].values)


@dataclass(frozen=True, slots=True)
class Goal:
    """Something that is demanded, and what was measured."""

    what: str
    wanted: str
    measured: str
    is_met: bool
    fastest: str = ""  # the same of the fastest run of each: what disturbs a run only makes it slower


@dataclass
class Outcome:
    """What a case found."""

    case: str
    title: str
    lines: list[Line] = field(default_factory=list)
    goals: list[Goal] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    skipped: str = ""
    failed: str = ""

    def line(self, what: str, who: Who, name: str, nr_bytes: int = 0, compared_by: str = "") -> Line:
        """The line of that name, made where it is not there yet."""
        for line in self.lines:
            if (line.what, line.name) == (what, name):
                return line
        self.lines.append(Line(what, who, name, nr_bytes, compared_by=compared_by))
        return self.lines[-1]

    def best(self, what: str, who: Who, clock: str | None = None) -> Line | None:
        """The quickest of the lines of one kind that have samples."""
        own = [line for line in self.lines if (line.what, line.who) == (what, who) and line.series]
        return min(own, key=lambda line: line.median(clock), default=None)

    def want_faster(self, ours: Line, other: Line | None, factor: float, clock: str | None = "command") -> None:
        """Demand that ``ours`` is ``factor`` times as fast as ``other``, where that was measured.

        Without ``clock`` each is taken by the clock that counts against a floor.
        """
        if other is not None and other.series and ours.series:
            reached, fastest = other.median(clock) / ours.median(clock), other.least(clock) / ours.least(clock)
            what = f"{ours.what}: {ours.name}, {clock or ours.clock}, against {other.name}"
            wanted, measured = f"at least {factor:g} x", f"{reached:.2f} x"
            self.goals.append(Goal(what, wanted, measured, reached >= factor, f"{fastest:.2f} x"))

    def want_share(self, ours: Line, share: float) -> None:
        """Demand that ``ours`` reaches ``share`` of its floor."""
        floor = self.best(ours.what, "floor")
        if floor is not None and ours.series:
            reached, fastest = floor.median() / ours.median(), floor.least() / ours.least()
            what = f"{ours.what}: {ours.name}, {ours.clock}, against the floor ({floor.name})"
            self.goals.append(Goal(what, f"at least {share:.0%}", f"{reached:.0%}", reached >= share, f"{fastest:.0%}"))

    def want_below(self, what: str, limit: float, value: float, unit: str, fastest: float | None = None) -> None:
        """Demand that a quantity stays below a limit."""
        best = "" if fastest is None else f"{fastest:.3g} {unit}"
        self.goals.append(Goal(what, f"below {limit:.3g} {unit}", f"{value:.3g} {unit}", value < limit, best))


class Skipped(Exception):  # noqa: N818 - not an error
    """Why a case cannot be measured here and now."""


@dataclass
class Bench:
    """What every case works with."""

    is_full: bool
    runs: int
    programs: Programs
    folder: Path  # in memory: what lies here is in the page cache
    disk: Path  # on a disk
    criu: Criu | None
    gpurestore: Gpurestore = field(default_factory=Gpurestore)
    say: Callable[[str], None] = print

    def __post_init__(self) -> None:
        self.floors = Floors(self.programs)
        self.ballast = Ballast(self.floors.program)
        self.needed_bytes = 0  # the most that the case at hand has asked for
        self.threads = default_threads()

    def size(self, quick_mib: int, full_mib: int, copies: float = 3.2) -> int:
        """MiB to work with. Raises Skipped where ``copies`` of that do not fit into memory."""
        mib = full_mib if self.is_full else quick_mib
        need, there = int(mib * MIB * copies), available_bytes() + self.ballast.nr_bytes
        if need > there:
            raise Skipped(f"needs {need / GIB:.1f} GiB of memory, {there / GIB:.1f} GiB are available")
        self.needed_bytes = max(self.needed_bytes, need)
        self.ballast.leave(there, self.needed_bytes + _SPARE_BYTES)
        return mib

    def clear(self) -> None:
        """End what is left of a case, and give back all space."""
        processes.end_all_below(keep=self.ballast.pids)
        self.needed_bytes = 0
        for folder in (self.folder, self.disk):
            for path in folder.iterdir():
                if path != self.programs.folder:
                    remove(path)

    def require(self, command: str, option: str) -> None:
        """Raise Skipped where the tool does not know an option yet."""
        if not self.gpurestore.has(command, option):
            raise Skipped(f"this version of gpurestore {command} has no {option}")

    def variants(self, command: str, wanted: Sequence[tuple[str, ...]]) -> list[tuple[str, ...]]:
        """Those sets of options that the tool knows."""
        return [
            options
            for options in wanted
            if all(self.gpurestore.has(command, option.partition("=")[0]) for option in options)
        ]

    def in_turns(self, contenders: Sequence[Contender], runs: int | None = None) -> None:
        """Run all of them once per turn; another one begins in each turn, so that none always follows the same."""
        for turn in range(runs or self.runs):
            at = turn % len(contenders)
            for contender in [*contenders[at:], *contenders[:at]]:
                contender()

    def copy_floors(self, outcome: Outcome, what: str, files: Sequence[Path], ways: Sequence[Way]) -> list[Contender]:
        """Contenders: a plain copy of ``files`` into fresh memory, each way that may be the best."""
        nr_bytes = sum(file.stat().st_size for file in files)

        def contender(way: Way) -> Contender:
            line = outcome.line(what, "floor", f"plain copy, {way}", nr_bytes)

            def copy() -> None:
                self.floors.touch(nr_bytes)
                line.add("command", self.floors.copy(files, way, self.threads))

            return copy

        return [contender(way) for way in ways]


class Case(Protocol):
    """A module of perf/cases."""

    NAME: str
    TITLE: str

    def run(self, bench: Bench, outcome: Outcome) -> None:
        """Measure; raises Skipped, or Broken."""


def available_bytes() -> int:
    """Memory that the kernel thinks it can give."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    raise Broken("/proc/meminfo does not say what is available")


def sum_of_pss(pids: Sequence[int]) -> int:
    """Bytes of memory that tasks use; what several of them use counts once."""
    total = 0
    for pid in pids:
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                total += int(line.split()[1]) * 1024
    return total


def pages_files(images: Path) -> list[Path]:
    """The memory of a dump."""
    return sorted(images.glob("pages-*.img"))


def remove(folder: Path) -> None:
    """Give the space back."""
    shutil.rmtree(folder, ignore_errors=True)
