"""A pagemap of very many runs: every second page of a mapping was touched."""

from __future__ import annotations

from floors import SMALL_WAYS
from subject import subject
from suite import Bench, Outcome, pages_files

NAME = "fragmented"
TITLE = "Restore of fragmented memory"


def run(bench: Bench, outcome: Outcome) -> None:
    """Measure."""
    # A run is one page; pages of memory between them stay free.
    runs = bench.size(488, 1953) * 256 // 1000 * 1000
    what = f"restore of {runs} runs of one page"
    with subject(bench, outcome, "fragmented", runs) as tree:
        contenders = tree.contenders(what)
        contenders += bench.copy_floors(outcome, what, pages_files(tree.images), SMALL_WAYS)
        bench.in_turns(contenders)
        tree.want_no_growth(2)
    ours = outcome.line(what, "ours", "gpurestore")
    outcome.want_faster(ours, outcome.best(what, "criu", "command"), 3)
    outcome.want_faster(ours, outcome.best(what, "criu", "engine"), 3, "engine")
    outcome.notes.append(
        "The floor of the fragmented restore is a copy into contiguous memory: fewer and longer reads."
    )
