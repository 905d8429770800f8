"""One task with much private memory, images in the page cache."""

from __future__ import annotations

from floors import PRIVATE_WAYS
from measure import MIB
from subject import subject
from suite import Bench, Outcome, pages_files

NAME = "eager"
TITLE = "Restore of one task from the page cache"
VARIANTS = (("--verify",), ("--hugepages=never",), ("--serial",))


def run(bench: Bench, outcome: Outcome) -> None:
    """Measure."""
    mib = bench.size(1024, 4096)
    what = f"restore of {mib} MiB"
    with subject(bench, outcome, "idle", mib) as tree:
        contenders = tree.contenders(what, [(), *bench.variants("restore", VARIANTS)])
        contenders += bench.copy_floors(outcome, what, pages_files(tree.images), PRIVATE_WAYS)
        bench.in_turns(contenders)
        tree.want_no_growth(2)
    ours = outcome.line(what, "ours", "gpurestore")
    assert ours.nr_bytes >= mib * MIB
    outcome.want_faster(ours, outcome.best(what, "criu", "command"), 5)
    outcome.want_faster(ours, outcome.best(what, "criu", "engine"), 5, "engine")
    outcome.want_share(ours, 0.75)
