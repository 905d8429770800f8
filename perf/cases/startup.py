"""What a small process costs: the command line and the Python API."""

from __future__ import annotations

import json
import sys
from functools import partial
from pathlib import Path

from measure import GPURESTORE, timed
from subject import Subject, subject
from suite import Bench, Outcome

NAME = "startup"
TITLE = "Latency of a small process"
API = Path(__file__).resolve().parent.parent / "api_restore.py"
WHAT = "small process"


def run(bench: Bench, outcome: Outcome) -> None:
    """Measure."""
    runs = 15 if bench.is_full else 5
    with subject(bench, outcome, "idle") as tree:
        contenders = tree.contenders("restore of a small process")
        contenders += [
            partial(whole, outcome, "python -c pass", [sys.executable, "-c", "pass"]),
            partial(whole, outcome, "gpurestore --version", [*GPURESTORE, "--version"]),
            partial(by_api, outcome, tree),
        ]
        bench.in_turns(contenders, runs)
    ours = outcome.line("restore of a small process", "ours", "gpurestore")
    outcome.want_below("restore of a small process, whole command", 0.35, ours.median("command"), "s")


def whole(outcome: Outcome, name: str, command: list[str]) -> None:
    """A command that restores nothing."""
    outcome.line("start-up", "floor", name).add("command", timed(command)[0])


def by_api(outcome: Outcome, tree: Subject) -> None:
    """A restore from Python: a new process, and in it the call alone."""
    line = outcome.line("restore of a small process", "ours", "Python API")
    seconds, out = timed([sys.executable, API, str(tree.images)])
    line.add("command", seconds)
    line.add("engine", json.loads(out)["restore_s"])
    tree.verify()
