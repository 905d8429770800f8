"""Compressed images: their size, and what they cost at dump and restore."""

from __future__ import annotations

from contextlib import ExitStack
from functools import partial
from pathlib import Path

from measure import MIB
from subject import subject
from suite import Bench, Contender, Line, Outcome, pages_files
from tools import folder_bytes

from cases.cold import from_cold

NAME = "compressed"
TITLE = "Compressed images"
PLAIN = "plain"
HOW = ("lz4", "zstd")


def run(bench: Bench, outcome: Outcome) -> None:
    """Measure."""
    bench.require("dump", "--compress")
    mib = bench.size(512, 2048, copies=4)
    hot, cold = f"restore of {mib} MiB from the page cache", f"restore of {mib} MiB from the disk"
    from_place(bench, outcome, hot, bench.folder, mib)
    from_place(bench, outcome, cold, bench.disk, mib)
    disk = outcome.line(cold, "floor", f"plain image, {bench.floors.disk_reader}")
    for how in HOW:
        outcome.want_faster(outcome.line(hot, "ours", f"gpurestore, {how}", compared_by="memory"), disk, 1)


def from_place(bench: Bench, outcome: Outcome, what: str, place: Path, mib: int) -> None:
    """Dumps and restores of each kind in one folder."""
    is_cold = place == bench.disk
    with ExitStack() as stack:
        contenders: list[Contender] = []
        for how in (PLAIN, *HOW):
            options = () if how == PLAIN else (f"--compress={how}",)
            enter = subject(bench, outcome, "compressible", mib, where=place, dump_options=options, with_criu=False)
            tree = stack.enter_context(enter)
            name = f"gpurestore, {how}"
            dumped = outcome.line(what.replace("restore of", "dump of").replace("from", "to"), "ours", name, mib * MIB)
            dumped.compared_by = "command"
            dumped.add_run(tree.dumped)
            dumped.add("image", folder_bytes(tree.images) / MIB, "MiB")
            line = outcome.line(what, "ours", name, mib * MIB)
            restore: Contender = partial(tree.restore, line)
            contenders.append(from_cold(bench, [tree.images], restore) if is_cold else restore)
            if how == PLAIN and is_cold:
                (pages,) = pages_files(tree.images)
                floor = outcome.line(what, "floor", f"plain image, {bench.floors.disk_reader}", mib * MIB)
                contenders.append(from_cold(bench, [tree.images], partial(read, bench, floor, pages)))
        bench.in_turns(contenders)


def read(bench: Bench, line: Line, pages: Path) -> None:
    """What the disk gives."""
    line.add("command", bench.floors.read_disk(pages))
