"""Lazy restore: how soon the tree runs, and how long it takes until it has seen all of its memory once."""

from __future__ import annotations

import time
from functools import partial

from subject import Subject, subject
from suite import Bench, Contender, Line, Outcome, Who

NAME = "lazy"
TITLE = "Lazy restore"
RESUME_S = 0.2
ORDERS = {"forward": "in order", "random": "without order"}


def run(bench: Bench, outcome: Outcome) -> None:
    """Measure."""
    bench.require("restore", "--lazy")
    mib = bench.size(512, 4096)
    for order, words in ORDERS.items() if bench.is_full else [("random", ORDERS["random"])]:
        what = f"{mib} MiB, pages read {words}"
        with subject(bench, outcome, "pacer", mib, order) as tree:
            contenders: list[Contender] = [
                partial(paced, tree, what, "gpurestore --lazy", ("--lazy",)),
                partial(paced, tree, what, "gpurestore", ()),
            ]
            if bench.gpurestore.has("restore", "--fault-order"):
                recorded = tree.folder / "order"
                tree.victim.go()
                bench.gpurestore.restore(tree.images, "--lazy", "--record-faults", str(recorded))
                tree.verify()
                options = ("--lazy", "--fault-order", str(recorded))
                contenders.append(partial(paced, tree, what, "gpurestore --lazy --fault-order", options))
            if tree.criu:
                contenders += [partial(paced_criu, tree, what), partial(paced_lazy_criu, tree, what)]
            bench.in_turns(contenders)
        lazy = outcome.line(f"{what}: until the tree runs", "ours", "gpurestore --lazy")
        outcome.want_below(f"{what}: the tree runs, time of the engine", RESUME_S, lazy.median("engine"), "s")
    outcome.notes.append("Seconds from the start of the command, by the clock of the restored task itself.")


def paced(tree: Subject, what: str, name: str, options: tuple[str, ...]) -> None:
    """A restore of ours, as the tree itself sees it."""
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


def paced_lazy_criu(tree: Subject, what: str) -> None:
    """The same with its daemon for lazy pages, whose start counts."""
    assert tree.criu
    began_ns = begin(tree)
    daemon = tree.criu.restore_lazily(tree.criu_images)
    note(tree, what, "CRIU --lazy-pages", began_ns, "criu")
    daemon.wait(timeout=60)


def begin(tree: Subject) -> int:
    """The tree shall find, as soon as it runs, that it is to read its memory."""
    for name in ("resumed", "passed"):
        (tree.victim.folder / name).unlink(missing_ok=True)
    tree.warm_up()
    tree.victim.go()
    return time.time_ns()


def note(tree: Subject, what: str, name: str, began_ns: int, who: Who) -> Line:
    """Collect what the tree noted, once it has verified itself; the line of its first step."""
    tree.verify()
    lines = []
    for file, moment in (("resumed", "until the tree runs"), ("passed", "until it has read every page")):
        line = tree.outcome.line(f"{what}: {moment}", who, name, compared_by="command")
        line.add("command", (int((tree.victim.folder / file).read_text()) - began_ns) / 1e9)
        lines.append(line)
    return lines[0]
