"""``gpurestore dump``: freeze a tree, write its images, then end it or let it go on."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from gpurestore.cli.loading import loading
from gpurestore.cli.options import (
    Commands,
    add_command,
    add_plugin_options,
    add_run_options,
    plugin_settings,
    positive,
    print_json,
    seconds,
    set_up_log,
)

if TYPE_CHECKING:
    from gpurestore.pipeline.dump import DumpResult
    from gpurestore.pipeline.progress import Progress

_DESCRIPTION = """\
Freeze the process PID with all its descendants, write everything they are made of to the folder DIR, and end them.
Whatever goes wrong, and also when this command is killed, the tree runs on and DIR does not appear."""


def add_parser(commands: Commands) -> None:
    """Add the command and its options."""
    parser = add_command(commands, "dump", "freeze a process tree and write it to images", _DESCRIPTION)
    parser.add_argument("-t", "--tree", metavar="PID", type=positive, required=True, help="root of the tree")
    parser.add_argument(
        "-D", "--images-dir", metavar="DIR", type=Path, required=True, help="folder for the images: new, or empty"
    )
    after = parser.add_mutually_exclusive_group()
    after.add_argument("-R", "--leave-running", action="store_true", help="let the tree go on afterwards")
    after.add_argument("-s", "--leave-stopped", action="store_true", help="leave the tree stopped (SIGCONT wakes it)")
    parser.add_argument(
        "-j", "--shell-job", action="store_true", help="accept a tree whose session or group leader is outside of it"
    )
    parser.add_argument(
        "--observe",
        metavar="SECONDS",
        type=seconds,
        default=0.0,
        help="before freezing, watch for so long which memory the tree uses: restore --lazy brings that first",
    )
    parser.add_argument(
        "--criu-compatible",
        action="store_true",
        help="store memory that tasks share since a fork once for each of them, so that CRIU can restore the images",
    )
    parser.add_argument(
        "--compress", metavar="METHOD", help="compress memory: lz4 or zstd[:LEVEL], level 1 to 19; CRIU cannot read it"
    )
    parser.add_argument(
        "--direct-io",
        action="store_true",
        help="write memory to the disk past the page cache, which keeps what it holds (and no page of the images)",
    )
    parser.add_argument(
        "--no-sync",
        action="store_true",
        help="do not wait until the images have reached the disk: a crash of the machine may still take them",
    )
    add_plugin_options(parser)
    add_run_options(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Do it."""
    set_up_log(args.log_file, args.verbose)
    with loading():
        from gpurestore.cli.running import run_operation, show_summary
        from gpurestore.pipeline.dump import dump

    async def operation(progress: Progress | None) -> DumpResult:
        return await dump(
            args.tree,
            args.images_dir,
            leave_running=args.leave_running,
            leave_stopped=args.leave_stopped,
            shell_job=args.shell_job,
            observe_s=args.observe,
            criu_compatible=args.criu_compatible,
            jobs=args.jobs,
            compress=args.compress,
            direct_io=args.direct_io,
            sync=not args.no_sync,
            trace=args.trace,
            progress=progress,
            plugins=plugin_settings(args),
        )

    result = run_operation("dump", operation)
    if args.json:
        print_json(result)
    show_summary("dump", result)
    return 0
