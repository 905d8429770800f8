"""``gpurestore inspect``: what is in an image folder."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from gpurestore.cli.loading import loading
from gpurestore.cli.options import Commands, add_command, add_json, print_json

_DESCRIPTION = """\
Show what the images in DIR hold: the tree with its threads, memory by kind, descriptors, plugins, and sizes."""


def add_parser(commands: Commands) -> None:
    """Add the command and its options."""
    parser = add_command(commands, "inspect", "show what is in the images", _DESCRIPTION)
    parser.add_argument("images_dir", metavar="DIR", type=Path, help="folder with the images")
    add_json(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Do it."""
    with loading():
        from gpurestore.images.inspect import format_summary, summarize

    summary = summarize(args.images_dir)
    if args.json:
        print_json(summary)
    else:
        sys.stdout.write(format_summary(summary))
    return 0
