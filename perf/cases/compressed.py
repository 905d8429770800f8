"""Compressed images: their size, and what they cost at dump and restore."""

from __future__ import annotations

from contextlib import ExitStack
from functools import partial
from pathlib import Path

from measure import MIB
from subject import subject
from suite import Bench, Contender, Line, Outcome, pages_files

from cases.cold import disk_floors, from_cold
from cases.dump import Dumps

NAME = "compressed"
TITLE = "Compressed images"
PLAIN = "plain"
HOW = ("lz4", "zstd")


def run(bench: Bench, outcome: Outcome) -> None:
    """Measure."""
    bench.require("dump", "--compress")
    mib = bench.size(256, 2048, copies=4)
    dumps(bench, outcome, mib)
    hot, cold = f"restore of {mib} MiB from the page cache", f"restore of {mib} MiB from the disk"
    restores(bench, outcome, hot, bench.folder, mib)
    restores(bench, outcome, cold, bench.disk, mib)
    disk = outcome.best(cold, "floor")
    # That the slower one is as fast as the disk would be without compression is what is wanted of both.
    ours = [outcome.line(hot, "ours", f"gpurestore, {how}") for how in HOW]
    outcome.want_faster(max(ours, key=Line.median), disk, 1, clock=None)


def dumps(bench: Bench, outcome: Outcome, mib: int) -> None:
    """How long it takes, and how small it gets."""
    made = Dumps(bench, outcome, f"dump of {mib} MiB into memory", "compressible", bench.folder, mib)
    bench.in_turns([partial(made.dump, options_for(how)) for how in (PLAIN, *HOW)])
    made.verify()


def options_for(how: str) -> tuple[str, ...]:
    """For a dump."""
    return () if how == PLAIN else (f"--compress={how}",)


def restores(bench: Bench, outcome: Outcome, what: str, place: Path, mib: int) -> None:
    """Restores of each kind from one folder. From a disk nothing is verified: that would read everything before."""
    is_cold = place == bench.disk
    with ExitStack() as stack:
        contenders: list[Contender] = []
        for how in (PLAIN, *HOW):
            tree = stack.enter_context(
                subject(
                    bench,
                    outcome,
                    "compressible",
                    mib,
                    where=place,
                    dump_options=options_for(how),
                    with_criu=False,
                )
            )
            line = outcome.line(what, "ours", f"gpurestore, {how}", mib * MIB)
            if not is_cold:
                contenders.append(partial(tree.restore, line))
                continue
            contenders.append(from_cold(bench, [tree.images], partial(tree.restore, line, "--no-verify")))
            if how == PLAIN:
                (pages,) = pages_files(tree.images)
                floors = disk_floors(bench, outcome, what, pages)
                contenders += [from_cold(bench, [tree.images], floor) for floor in floors]
        bench.in_turns(contenders)
