"""``gpurestore restore``: bring a tree back, and stay in front of it or leave it to itself."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from gpurestore.cli.loading import loading
from gpurestore.cli.options import (
    Commands,
    add_command,
    add_plugin_options,
    add_run_options,
    plugin_settings,
    print_json,
    set_up_log,
)
from gpurestore.errors import UsageError

if TYPE_CHECKING:
    from gpurestore.pipeline.progress import Progress
    from gpurestore.pipeline.restore import RestoreResult

_DESCRIPTION = """\
Bring back the tree whose images are in the folder DIR. Everything that can be checked is checked first, and all
obstacles are named at once. If it fails half-way nothing is left behind; the images are never touched.

Without -d the command stays in front: signals that it gets are passed on to the tree's root task, and it ends with that
task's exit status."""


def add_parser(commands: Commands) -> None:
    """Add the command and its options."""
    parser = add_command(commands, "restore", "bring a process tree back from its images", _DESCRIPTION)
    parser.add_argument("-D", "--images-dir", metavar="DIR", type=Path, required=True, help="folder with the images")
    parser.add_argument(
        "-d", "--restore-detached", action="store_true", help="leave the tree to itself once it runs, and end"
    )
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--parallel", action="store_true", help="all tasks and devices at the same time (the default)")
    how.add_argument("--serial", action="store_true", help="one stage after the other, to compare with")
    parser.add_argument("--pidfile", metavar="FILE", type=Path, help="write the root task's pid to FILE")
    parser.add_argument(
        "-j", "--shell-job", action="store_true", help="accept a tree whose session or group leader was outside of it"
    )
    checks = parser.add_mutually_exclusive_group()
    checks.add_argument(
        "--verify",
        action="store_true",
        help="read all images to compare their checksums (default: large ones only if they were copied or written to)",
    )
    checks.add_argument("--no-verify", action="store_true", help="trust the images: leave out their checksums")
    _add_memory_options(parser)
    parser.add_argument(
        "--dry-run", action="store_true", help="print plugins, stages and what every task would do, and do nothing"
    )
    parser.add_argument(
        "--graph", metavar="FILE", type=Path, help="with --dry-run: draw the stages into FILE (.svg, .png, .dot)"
    )
    add_lazy_options(parser)
    parser.add_argument(
        "--gpu-map",
        metavar="OLD=NEW",
        action="append",
        help="bring what was on the NVIDIA GPU OLD back on NEW, UUIDs or indices (default: where it was, else on one of"
        " the same model); may be given several times",
    )
    add_plugin_options(parser)
    add_run_options(parser)
    parser.set_defaults(run=run)


def _add_memory_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--hugepages",
        choices=["auto", "keep", "never"],
        default="auto",
        help="which 2 MiB blocks of memory become huge pages: those that were densely populated (the default), only"
        " those that were huge at the dump, or none",
    )
    reading = parser.add_mutually_exclusive_group()
    reading.add_argument(
        "--direct-io",
        dest="reading",
        action="store_const",
        const="direct",
        default="auto",
        help="read pages past the page cache, even what is in it (default: what is not in it)",
    )
    reading.add_argument(
        "--cached", dest="reading", action="store_const", const="cached", help="read pages through the page cache only"
    )


def add_lazy_options(parser: argparse.ArgumentParser) -> None:
    """``--lazy`` and what belongs to it."""
    parser.add_argument(
        "--lazy",
        action="store_true",
        help="let the tree run at once; its memory comes when it is touched, and in the background",
    )
    parser.add_argument(
        "--record-faults", metavar="FILE", type=Path, help="with --lazy: write down which pages were wanted first"
    )
    parser.add_argument(
        "--fault-order", metavar="FILE", type=Path, help="with --lazy: fill in the order that --record-faults wrote"
    )


def run(args: argparse.Namespace) -> int:
    """Do it."""
    set_up_log(args.log_file, args.verbose)
    if not args.lazy and (args.fault_order or args.record_faults):
        raise UsageError("--fault-order and --record-faults are about --lazy: name it, too")
    if args.dry_run:
        return _print_plan(args)
    if args.graph is not None:
        raise UsageError("--graph draws what --dry-run prints: name both, or draw a --trace with 'gpurestore timeline'")
    from gpurestore.namespaces import require_restore_rights

    require_restore_rights()
    with loading():
        from gpurestore.cli.running import run_operation
        from gpurestore.pipeline.restore import restore

    async def operation(progress: Progress | None) -> RestoreResult:
        return await restore(
            args.images_dir,
            serial=args.serial,
            jobs=args.jobs,
            shell_job=args.shell_job,
            verify=not args.no_verify,
            verify_all=args.verify,
            pidfile=args.pidfile,
            detached=args.restore_detached,
            hugepages=args.hugepages,
            reading=args.reading,
            trace=args.trace,
            progress=progress,
            plugins=plugin_settings(args),
            lazy=args.lazy,
            fault_order=args.fault_order,
            record_faults=args.record_faults,
        )

    if args.restore_detached:
        _show(args, run_operation("restore", operation))
        return 0

    from gpurestore.cli.foreground import Foreground

    # Signals count from now on: those that end the restore while it is under way, and all others are kept for the
    # tree until it is there.
    with Foreground() as foreground:
        result = run_operation("restore", operation)
        _show(args, result)
        return foreground.follow(result.root_pid)


def _show(args: argparse.Namespace, result: RestoreResult) -> None:
    if args.json:
        print_json(result)
    from gpurestore.cli.running import show_summary

    show_summary("restore", result)


def _print_plan(args: argparse.Namespace) -> int:
    with loading():
        from gpurestore.pipeline.lazy import LazySettings
        from gpurestore.pipeline.preview import preview

    seen = preview(
        args.images_dir,
        libdir=args.libdir,
        shell_job=args.shell_job,
        verify=not args.no_verify,
        jobs=args.jobs,
        hugepages=args.hugepages,
        reading=args.reading,
        lazy=LazySettings(args.fault_order) if args.lazy else None,
    )
    if args.graph is not None:
        from gpurestore.pipeline.graphdrawing import draw_file

        draw_file(seen.graph, args.graph, f"restore of {args.images_dir}")
    sys.stdout.write(seen.text)
    return 0
