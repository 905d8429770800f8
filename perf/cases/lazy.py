"""Lazy restore: how soon the tree runs, and how long it takes until it has seen all of its memory once."""

from __future__ import annotations

import time
from functools import partial

from measure import Broken, again
from subject import Subject, subject
from suite import Bench, Contender, Line, Outcome, Who
from support import processes
from tools import Criu

NAME = "lazy"
TITLE = "Lazy restore"
RESUME_S = 0.2
NR_SHARING = 4
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
                contenders += [PacedCriu(tree, what, tree.criu, lazily=lazily) for lazily in (False, True)]
            bench.in_turns(contenders)
        lazy = outcome.line(f"{what}: until the tree runs", "ours", "gpurestore --lazy")
        outcome.want_below(f"{what}: the tree runs, time of the engine", RESUME_S, lazy.median("engine"), "s")
    shared(bench, outcome)
    outcome.notes.append("Seconds from the start of the command, by the clock of the restored task itself.")


def shared(bench: Bench, outcome: Outcome) -> None:
    """The same for memory that tasks share: it must hold up the release no more than private memory does."""
    mib = bench.size(512, 2048)
    what = f"{mib} MiB that {NR_SHARING} tasks share"
    with subject(bench, outcome, "mappers", NR_SHARING, mib, with_criu=False) as tree:
        bench.in_turns(tree.contenders(what, [("--lazy",), ()]))
    lazy = outcome.line(what, "ours", "gpurestore --lazy")
    outcome.want_below(f"{what}: the tree runs, time of the engine", RESUME_S, lazy.median("engine"), "s")


def paced(tree: Subject, what: str, name: str, options: tuple[str, ...]) -> None:
    """A restore of ours, as the tree itself sees it."""
    began_ns = begin(tree)
    run = tree.bench.gpurestore.restore(tree.images, *options)
    line = note(tree, what, name, began_ns, "ours")
    line.add("engine", run.seconds["engine"])


class PacedCriu:
    """The same of CRIU, eager, or lazy with its daemon, whose start counts. What fails is noted and not asked again."""

    def __init__(self, tree: Subject, what: str, criu: Criu, *, lazily: bool) -> None:
        self._tree, self._what, self._criu, self._lazily = tree, what, criu, lazily
        self.name = "CRIU --lazy-pages" if lazily else "CRIU"
        self._is_broken = False

    def __call__(self) -> None:
        """Measure, or do nothing."""
        if self._is_broken:
            return
        try:
            self._measure()
        except Broken as error:
            self._is_broken = True
            self._tree.outcome.notes.append(f"{self._what}: {self.name} does not bring the tree back: {error}")
            victim = self._tree.victim
            processes.kill(victim.pids)
            processes.wait_gone(victim.pids)
            again(victim)

    def _measure(self) -> None:
        tree = self._tree
        began_ns = begin(tree)
        if not self._lazily:
            self._criu.restore(tree.criu_images)
            note(tree, self._what, self.name, began_ns, "criu")
            return
        with self._criu.restored_lazily(tree.criu_images):
            try:
                note(tree, self._what, self.name, began_ns, "criu")
            except Broken:
                processes.kill(tree.victim.pids)  # before its daemon ends: without that it would read zeros
                raise


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
