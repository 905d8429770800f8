"""Lazy restore: how soon the tree runs, and how long it takes until it has seen all of its memory once."""

from __future__ import annotations

import time
from functools import partial

from subject import Subject, subject
from suite import Bench, Line, Outcome, Who

NAME = "lazy"
TITLE = "Lazy restore"
RESUME_S = 0.2


def run(bench: Bench, outcome: Outcome) -> None:
    """Measure."""
    bench.require("restore", "--lazy")
    mib = bench.size(1024, 4096)
    for order in ("forward", "random"):
        with subject(bench, outcome, "pacer", mib, order) as tree:
            what = f"{mib} MiB, pages read {'in order' if order == 'forward' else 'without order'}"
            contenders = [partial(paced, tree, what, options) for options in (("--lazy",), ())]
            if tree.criu:
                contenders.append(partial(paced_criu, tree, what))
            bench.in_turns(contenders)
        lazy = outcome.line(f"{what}: until the tree runs", "ours", "gpurestore --lazy")
        small = engine_s(bench, outcome)
        outcome.want_below(f"{what}: the tree runs, in the engine", RESUME_S, lazy.median("engine"), "s")
    outcome.notes.append(f"An eager restore of a small process takes {small:.3f} s in the engine.")


def engine_s(bench: Bench, outcome: Outcome) -> float:
    """Seconds that a restore without memory takes."""
    with subject(bench, outcome, "idle", with_criu=False) as tree:
        run = bench.gpurestore.restore(tree.images)
        tree.verify()
    return run.seconds["engine"]


def paced(tree: Subject, what: str, options: tuple[str, ...]) -> None:
    """A restore of ours, as the tree itself sees it."""
    name = " ".join(("gpurestore", *options))
    began_ns = begin(tree)
    run = tree.bench.gpurestore.restore(tree.images, *options)
    line = note(tree, what, name, began_ns, "ours")
    line.add("engine", run.seconds["engine"])


def paced_criu(tree: Subject, what: str) -> None:
    """The same of CRIU, which is eager here."""
    assert tree.criu
    began_ns = begin(tree)
    tree.criu.restore(tree.criu_images)
    note(tree, what, "CRIU", began_ns, "criu")


def begin(tree: Subject) -> int:
    """The tree shall find, as soon as it runs, that it is to read its memory."""
    for name in ("resumed", "passed"):
        (tree.victim.folder / name).unlink(missing_ok=True)
    tree.warm_up()
    tree.victim.go()
    return time.monotonic_ns()


def note(tree: Subject, what: str, name: str, began_ns: int, who: Who) -> Line:
    """Collect what the tree noted, once it has verified itself; the line of its first step."""
    tree.verify()
    lines = []
    for file, moment in (("resumed", "until the tree runs"), ("passed", "until it has read every page")):
        line = tree.outcome.line(f"{what}: {moment}", who, name, compared_by="command")
        line.add("command", (int((tree.victim.folder / file).read_text()) - began_ns) / 1e9)
        lines.append(line)
    return lines[0]
