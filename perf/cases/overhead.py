"""How much memory the restoring process itself needs, whatever the size of the images."""

from __future__ import annotations

import json
import sys

from measure import MIB, timed
from subject import subject
from suite import Bench, Outcome

from cases.startup import API

NAME = "overhead"
TITLE = "Memory of the restoring process"
LIMIT_MIB = 64


def run(bench: Bench, outcome: Outcome) -> None:
    """Measure."""
    mib = bench.size(1024, 4096, copies=2.2)
    runs = bench.size(64, 1953, copies=2.2) * 256
    trees: list[tuple[str, str, tuple[int, ...]]] = [
        ("a small process", "idle", ()),
        (f"one task of {mib} MiB", "idle", (mib,)),
        (f"{runs} runs of one page", "fragmented", (runs,)),
    ]
    peaks = []
    for what, victim, arguments in trees:
        line = outcome.line(f"restore of {what}", "ours", "gpurestore")
        with subject(bench, outcome, victim, *arguments, with_criu=False) as tree:
            for _ in range(2):
                answer = json.loads(timed([sys.executable, API, str(tree.images)])[1])
                line.add("peak", answer["peak_bytes"] / MIB, "MiB")
                tree.verify()
        peaks.append(line.median("peak"))
        if len(peaks) > 1:
            outcome.want_below(f"peak over that of a small process: {what}", LIMIT_MIB, peaks[-1] - peaks[0], "MiB")
