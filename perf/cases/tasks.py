"""Many tasks with little memory each."""

from __future__ import annotations

from floors import PRIVATE_WAYS
from subject import subject
from suite import Bench, Outcome, pages_files

NAME = "tasks"
TITLE = "Restore of many tasks"
NR_TASKS = 64


def run(bench: Bench, outcome: Outcome) -> None:
    """Measure."""
    mib = bench.size(8, 32, copies=3.2 * NR_TASKS)
    what = f"restore of {NR_TASKS} tasks with {mib} MiB"
    with subject(bench, outcome, "holders", NR_TASKS, mib) as tree:
        contenders = tree.contenders(what)
        contenders += bench.copy_floors(outcome, what, pages_files(tree.images), PRIVATE_WAYS)
        bench.in_turns(contenders)
        tree.want_no_growth(5)
    outcome.want_faster(outcome.line(what, "ours", "gpurestore"), outcome.best(what, "criu", "command"), 1)
