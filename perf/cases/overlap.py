"""Memory and devices at the same time: perf/overlap.py, which can do more as a command of its own."""

from __future__ import annotations

from overlap import Measured, Tree, measure
from suite import Bench, Outcome
from support import processes

NAME = "overlap"
TITLE = "Overlap of memory and devices"


def run(bench: Bench, outcome: Outcome) -> None:
    """Measure."""
    mib = bench.size(512, 1024, copies=2.2)
    tasks, ratios = ((1, 4, 8), (0.5, 1.0, 2.0)) if bench.is_full else ((4,), (0.5, 2.0))
    for nr in tasks:
        place = bench.folder / f"overlap-{nr}"
        for point in measure(Tree(bench.programs, place, nr, mib, 0.0), ratios, bench.runs):
            note(outcome, point)
        processes.end_all_below(keep=bench.ballast.pids)
    outcome.notes.append(
        "A device that needs D seconds and no CPU, beside memory that alone takes M seconds; the floor is the longer of"
        " both. Times are of the engine, without checksums."
    )


def note(outcome: Outcome, point: Measured) -> None:
    """Lines and goal of one point."""
    what = f"{point.tasks} task{'s' if point.tasks > 1 else ''}, D = {point.ratio:g} M"
    for mode in ("parallel", "serial"):
        line = outcome.line(what, "ours", f"gpurestore --{mode}", compared_by="engine")
        line.series["engine"] = point.series[mode]
    floor = outcome.line(what, "floor", f"max(M, D), M {point.m_s:.3f} s")
    floor.add("engine", max(point.m_s, point.d_s))
    floor.compared_by = "engine"
    outcome.want_below(
        f"{what}: parallel restore against 1.1 max(M, D) + 0.2 s", point.limit_s, point.median("parallel"), "s"
    )
