"""What starting the tool costs: ``gpurestore --version``, and the restore of a small process as a whole process.

perf/startup.py [--runs N] [--json FILE]
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from measure import GPURESTORE, Series, again, report, timed, workshop
from support.victims import Victim

from gpurestore import namespaces


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=15, help="how often each is run (default: 15)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every sample to FILE")
    args = parser.parse_args()
    if not namespaces.may_restore():
        sys.exit(namespaces.run([sys.executable, *sys.argv]))
    python, version = Series("python -c pass", {}), Series("gpurestore --version", {})
    dump, restore = Series("gpurestore dump", {}), Series("gpurestore restore -d", {})
    with workshop(None) as (compiler, folder):
        victim = Victim.start(compiler.program("idle"), folder / "victim")
        for turn in range(args.runs):
            python.seconds.append(timed([sys.executable, "-c", "pass"]))
            version.seconds.append(timed([*GPURESTORE, "--version"]))
            images = folder / f"images.{turn}"
            dump.seconds.append(timed([*GPURESTORE, "dump", "-t", str(victim.pid), "-D", images]))
            victim.expect_gone()
            restore.seconds.append(timed([*GPURESTORE, "restore", "-d", "-D", images]))
        victim.finish()
        again(victim)
    notes = ["Whole processes; the task that is dumped and restored has one thread and 1 MiB of filled memory."]
    report("Start-up", [python, version, dump, restore], notes, args.json)


if __name__ == "__main__":
    main()
