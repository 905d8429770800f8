"""Memory that forked workers share with their parent copy-on-write."""

from __future__ import annotations

from functools import partial

from floors import PRIVATE_WAYS
from measure import MIB
from subject import subject
from suite import Bench, Contender, Outcome, Skipped, available_bytes, pages_files

from cases.dump import Dumps

NAME = "forked"
TITLE = "Restore and dump of memory shared by fork"
NR_WORKERS = 8
_PROBE_MIB = 16


def run(bench: Bench, outcome: Outcome) -> None:
    """Measure."""
    probe(bench, outcome)
    mib = bench.size(512, 2048, copies=5.5)
    what, lonely = (
        f"restore of {mib} MiB shared with {NR_WORKERS} forked workers",
        f"restore of {mib} MiB without workers",
    )
    # CRIU stores what the workers share once for each of them.
    has_room = available_bytes() > (NR_WORKERS + 6) * mib * MIB
    if bench.criu and not has_room:
        outcome.notes.append(f"Not compared with CRIU: its images would need {(NR_WORKERS + 1) * mib} MiB.")
    with (
        subject(bench, outcome, "forked", 0, mib, with_criu=False) as alone,
        subject(bench, outcome, "forked", NR_WORKERS, mib, with_criu=has_room) as tree,
    ):
        alone_line = outcome.line(lonely, "ours", "gpurestore", alone.nr_bytes)
        shared_line = outcome.line(what, "ours", "gpurestore", tree.nr_bytes)
        contenders: list[Contender] = [partial(alone.restore, alone_line), partial(tree.restore, shared_line)]
        if tree.criu:
            criu_line = outcome.line(what, "criu", "CRIU", tree.nr_bytes)
            contenders.append(partial(tree.restore_by_criu, criu_line))
        contenders += bench.copy_floors(outcome, what, pages_files(tree.images), PRIVATE_WAYS)
        bench.in_turns(contenders)
        tree.want_no_growth(5)
        before, after = tree.pss_bytes, tree.pss_after[-1]
    ratio = shared_line.median("command") / alone_line.median("command")
    fastest = shared_line.least("command") / alone_line.least("command")
    outcome.want_below(f"{what}, against the same without workers", 1.2, ratio, "x", fastest)
    outcome.notes.append(f"Sum of PSS: {before / MIB:.1f} MiB before the dump, {after / MIB:.1f} MiB after a restore.")
    dump(bench, outcome, mib, has_room)


def dump(bench: Bench, outcome: Outcome, mib: int, has_room: bool) -> None:
    """Dumps of the tree, which goes on and shall share as much as before."""
    what = f"dump of {mib} MiB shared with {NR_WORKERS} forked workers"
    tree = Dumps(bench, outcome, what, "forked", bench.folder, mib, NR_WORKERS, mib, with_criu=has_room)
    tree.measure([()], [partial(tree.floor, "plain copy into a new file")])
    growth = max(tree.pss_growth_percent)
    outcome.want_below(f"{what}: growth of the memory in use (sum of PSS) by a dump with -R", 1, growth, "%")
    tree.verify()


def probe(bench: Bench, outcome: Outcome) -> None:
    """Raise Skipped where shared pages are stored once per task: gigabytes would become tens of gigabytes."""
    with subject(bench, outcome, "forked", NR_WORKERS, _PROBE_MIB, with_criu=False) as small:
        stored = sum(file.stat().st_size for file in pages_files(small.images))
    if stored > 2 * _PROBE_MIB * MIB:
        raise Skipped(
            f"this version of gpurestore stores pages that {NR_WORKERS} workers share with their parent"
            f" {stored / (_PROBE_MIB * MIB):.1f} times"
        )
