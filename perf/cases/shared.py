"""Shared anonymous memory that several tasks map: stored once, restored once."""

from __future__ import annotations

from floors import SHARED_WAYS
from measure import MIB, Broken
from subject import subject
from suite import Bench, Outcome, pages_files

NAME = "shared"
TITLE = "Restore of shared memory"
NR_TASKS = 4


def run(bench: Bench, outcome: Outcome) -> None:
    """Measure."""
    mib = bench.size(512, 2048)
    what = f"restore of {mib} MiB that {NR_TASKS} tasks share"
    with subject(bench, outcome, "mappers", NR_TASKS, mib) as tree:
        files = pages_files(tree.images)
        stored = sum(file.stat().st_size for file in files)
        if not mib * MIB <= stored < 1.1 * mib * MIB:
            raise Broken(f"{stored} bytes of pages are stored for {mib} MiB of shared memory")
        contenders = tree.contenders(what)
        contenders += bench.copy_floors(outcome, what, files, SHARED_WAYS)
        bench.in_turns(contenders)
    outcome.want_faster(outcome.line(what, "ours", "gpurestore"), outcome.best(what, "criu", "command"), 1)
    outcome.notes.append(f"The images hold the shared memory once: {stored / MIB:.0f} MiB of pages in all.")
