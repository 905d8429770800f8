"""How long it takes to give up: from SIGINT in the midst of memory until the command has ended and all is undone."""

from __future__ import annotations

import signal
import subprocess
import time
from collections.abc import Callable
from functools import partial

from measure import GPURESTORE, Broken
from subject import Subject, subject
from suite import Bench, Outcome
from support import processes

from cases.cold import from_cold

NAME = "cancel"
TITLE = "Cancellation in the midst of memory"
LIMIT_S = 0.2
_INTERRUPTED = 130
_BEGIN_SHARE, _END_SHARE = 0.1, 0.9  # of the memory in flight when the signal comes


def run(bench: Bench, outcome: Outcome) -> None:
    """Measure."""
    mib = bench.size(1024, 4096, copies=2.2)
    with subject(bench, outcome, "idle", mib, with_criu=False) as tree:
        modes = [(), *bench.variants("restore", [("--verify",), ("--lazy",)])]
        bench.in_turns([partial(of_restore, tree, " ".join(("end of a restore", *mode)), mode) for mode in modes])
        tree.bench.gpurestore.restore(tree.images)
        bench.in_turns([partial(of_dump, tree)])
        tree.verify()
    with subject(bench, outcome, "idle", mib, where=bench.disk, with_criu=False) as tree:
        bench.in_turns([from_cold(bench, [tree.images], partial(of_restore, tree, "end of a cold restore", ()))])
    for options in bench.variants("dump", [("--compress=lz4",)]):
        with subject(bench, outcome, "compressible", mib, dump_options=options, with_criu=False) as tree:
            bench.in_turns([partial(of_restore, tree, "end of a restore of compressed images", ())])
    for line in outcome.lines:
        if line.series:
            outcome.want_below(line.what, LIMIT_S, max(line.series["command"].values), "s")


def of_restore(tree: Subject, what: str, options: tuple[str, ...]) -> None:
    """Interrupt a restore."""
    line = tree.outcome.line(what, "ours", "gpurestore")
    tree.warm_up()
    command = [*GPURESTORE, "restore", "-d", "-D", str(tree.images), *options]
    # A lazy restore moves nothing before it is done: there the signal comes as soon as the task is there.
    least = 0 if "--lazy" in options else _BEGIN_SHARE
    seconds = interrupt(command, lambda: resident_bytes(tree.victim.pid) / tree.nr_bytes, least)
    if seconds is None:
        processes.kill([tree.victim.pid])
        processes.wait_gone([tree.victim.pid])
        tree.outcome.notes.append(f"{line.what}: it was done before the signal came.")
        return
    if processes.alive(tree.victim.pid):
        raise Broken("the restore was interrupted, and the task lives")
    processes.wait_gone([tree.victim.pid])
    line.add("command", seconds)


def of_dump(tree: Subject) -> None:
    """Interrupt a dump; the task goes on."""
    line = tree.outcome.line("end of a dump", "ours", "gpurestore")
    images = tree.folder / "interrupted"

    def share() -> float:
        files = tree.folder.glob(f".{images.name}.gpurestore-*/pages-*.img")
        return sum(file.stat().st_blocks * 512 for file in files) / tree.nr_bytes

    command = [*GPURESTORE, "dump", "-R", "-t", str(tree.victim.pid), "-D", str(images)]
    seconds = interrupt(command, share)
    if seconds is None:
        raise Broken("the dump was done before the signal came")
    if images.exists() or list(tree.folder.glob(f".{images.name}*")):
        raise Broken("the dump was interrupted, and left images behind")
    tree.victim.expect_running()
    line.add("command", seconds)


def interrupt(command: list[str], share: Callable[[], float], least: float = _BEGIN_SHARE) -> float | None:
    """Send SIGINT when a share of the memory has been moved; seconds until the end, None where there was no time."""
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    while process.poll() is None and not least < share() < _END_SHARE:
        time.sleep(0.001)
    began = time.perf_counter()
    process.send_signal(signal.SIGINT)
    said = process.communicate()[1].decode(errors="replace")
    seconds = time.perf_counter() - began
    if process.returncode == 0:
        return None
    if process.returncode != _INTERRUPTED:
        raise Broken(f"{' '.join(command)} ended with {process.returncode} after SIGINT: {said.strip()}")
    return seconds


def resident_bytes(pid: int) -> int:
    """Memory of a task that may not be there yet."""
    try:
        with open(f"/proc/{pid}/statm") as file:
            return int(file.read().split()[1]) * 4096
    except (OSError, IndexError):
        return 0
