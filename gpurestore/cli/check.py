"""``gpurestore check``: what this kernel, these privileges and these devices allow."""

from __future__ import annotations

import argparse
import sys

from gpurestore.cli.options import Commands, add_command, add_json, print_json

_DESCRIPTION = """\
Try what a dump and a restore need from the kernel, from our privileges and from devices, and say for each thing that
is missing how to get it. The exit code is 1 when something is missing that no dump or restore can do without."""


def add_parser(commands: Commands) -> None:
    """Add the command and its options."""
    parser = add_command(commands, "check", "show what this machine allows", _DESCRIPTION)
    add_json(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Do it."""
    from gpurestore.check import check_all, format_report

    results = check_all()
    ready = all(result.ok or not result.required for result in results)
    if args.json:
        print_json({"ready": ready, "checks": results})
    else:
        sys.stdout.write(format_report(results))
    return 0 if ready else 1
