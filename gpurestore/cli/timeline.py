"""``gpurestore timeline``: a picture of what ran when."""

from __future__ import annotations

import argparse
from pathlib import Path

from gpurestore.cli.options import Commands, add_command

_DESCRIPTION = """\
Draw what ran when in a dump or restore: a row for each task, plugin and worker, a bar for each stage, and marked the
critical path that determined the end. FILE was written by dump or restore with --trace. The name after -o says how to
draw: OUT.svg, OUT.html (a page with tables), or OUT.png (needs the package Pillow)."""


def add_parser(commands: Commands) -> None:
    """Add the command and its options."""
    parser = add_command(commands, "timeline", "draw what ran when, from a --trace file", _DESCRIPTION)
    parser.add_argument("trace", metavar="FILE", type=Path, help="the trace to draw")
    parser.add_argument("-o", "--output", metavar="OUT", type=Path, required=True, help="the picture to write")
    parser.add_argument("--title", metavar="TEXT", help="what to write above it (default: the name of FILE)")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Do it."""
    from gpurestore.pipeline.timeline import draw_file

    draw_file(args.trace, args.output, args.title)
    return 0
