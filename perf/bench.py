"""The benchmarks of dump and restore, each beside the limit of this machine, and beside CRIU.

    [CRIU=PROGRAM] perf/bench.py [quick|full] [--cases NAME ...] [--runs N] [--list]

Contenders run in turns; medians count, and what was restored verifies itself outside of the timed part. Images lie in
memory (--folder), those of cold restores on a disk (--disk). Before each timed run memory is touched once: a hypervisor
may take free memory away, and the first touch after that is many times slower.

Table, samples and picture go to perf/results (or --results), named after date and machine; the table to stdout, too.
What an engine cannot do yet is left out with the reason. The exit status is 1 when a case failed.
"""

from __future__ import annotations

import argparse
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path

import cases
import plot
import report
from measure import RESULTS, ROOT, Broken, machine, machine_slug, workshop
from suite import Bench, Outcome, Skipped
from tools import Criu

from gpurestore import namespaces

QUICK_RUNS, FULL_RUNS = 3, 5


def main() -> None:
    """The command line."""
    args = parse()
    if args.list:
        for name in cases.NAMES:
            print(f"{name:12} {cases.load(name).TITLE}")
        return
    if not namespaces.may_restore():
        sys.exit(namespaces.run([sys.executable, *sys.argv]))
    began = time.monotonic()
    criu = Criu.named()
    is_full = args.extent == "full"
    with workshop(args.folder) as (programs, folder), workshop(args.disk) as (_, disk):
        bench = Bench(
            is_full, args.runs or (FULL_RUNS if is_full else QUICK_RUNS), programs, folder, disk, criu, say=say
        )
        outcomes = [measure(bench, name) for name in args.cases]
    notes = [
        f"{args.extent.capitalize()}, medians of {bench.runs} runs in turns. Images in {args.folder}, cold ones in"
        f" {args.disk}. Floors with {bench.threads} threads; the disk's by {bench.floors.disk_reader}.",
        f"Reference: {criu.version}." if criu else "Not compared with CRIU: set CRIU=PROGRAM to do that.",
        '"Command" is a whole process with the start of Python, "engine" the operation alone, "memory" the stage that'
        " brings memory in; that one is compared with the floor, and whole commands with CRIU.",
    ]
    if bench.ballast.is_needed:
        notes.append(
            "The hypervisor takes free memory back; so each case left little of it free (perf/ballast.py), and touched"
            " that before each run."
        )
    publish(outcomes, notes, args.results, "" if is_full else "-quick")
    say(f"took {time.monotonic() - began:.0f} s")
    sys.exit(any(outcome.failed for outcome in outcomes))


def parse() -> argparse.Namespace:
    """Arguments."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "extent", nargs="?", choices=("quick", "full"), default="quick", help="how much (default: quick)"
    )
    parser.add_argument("--cases", nargs="+", choices=cases.NAMES, default=list(cases.NAMES), metavar="NAME")
    parser.add_argument("--list", action="store_true", help="say which cases there are")
    parser.add_argument("--runs", type=int, help=f"turns of each (default: {QUICK_RUNS}, full {FULL_RUNS})")
    parser.add_argument("--folder", type=Path, default=Path("/dev/shm"), help="for images (default: /dev/shm)")
    parser.add_argument("--disk", type=Path, default=Path("/var/tmp"), help="for cold images (default: /var/tmp)")
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="DIR", help="default: perf/results")
    return parser.parse_args()


def measure(bench: Bench, name: str) -> Outcome:
    """Run one case; whatever happens in it, the others go on."""
    case = cases.load(name)
    outcome = Outcome(name, case.TITLE)
    began = time.monotonic()
    try:
        case.run(bench, outcome)
    except Skipped as reason:
        outcome.skipped = str(reason)
    except Broken as error:
        outcome.failed = " ".join(str(error).split())
    except Exception as error:
        traceback.print_exc()
        outcome.failed = f"{type(error).__name__}: {error}"
    finally:
        bench.clear()
    result = outcome.failed or outcome.skipped or "done"
    say(f"{name}: {result} ({time.monotonic() - began:.0f} s)")
    return outcome


def publish(outcomes: Sequence[Outcome], notes: Sequence[str], results: Path, suffix: str) -> None:
    """Print the table, and keep everything."""
    facts = machine()
    text = report.markdown(facts, outcomes, notes)
    print(text)
    results.mkdir(parents=True, exist_ok=True)
    target = results / f"{facts['date']}-{machine_slug()}{suffix}"
    target.with_suffix(".md").write_text(text)
    report.write_json(target.with_suffix(".json"), facts, outcomes, notes)
    title = f"gpurestore: dump and restore, {facts['date']}, {facts['cores']} cores"
    plot.draw(outcomes, title, target.with_suffix(".svg"))
    where = target.relative_to(ROOT) if target.is_relative_to(ROOT) else target
    say(f"written: {where}.md, .json, .svg")


def say(text: str) -> None:
    """Progress, apart from the table."""
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
