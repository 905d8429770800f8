"""``gpurestore demo``: see it work."""

from __future__ import annotations

import argparse
from pathlib import Path

from gpurestore.cli.options import Commands, add_command, add_json, positive

_DESCRIPTION = """\
Train a small network twice on the software accelerator (a stand-in for hardware, not a GPU): once undisturbed, once
dumped, killed and restored on the way. Then compare losses and weights bit for bit, show what took how long, and draw
it. Needs the packages of gpurestore[demo]. Without root it runs in a user and pid namespace of its own, where the
kernel allows that."""


def add_parser(commands: Commands) -> None:
    """Add the command and its options."""
    parser = add_command(commands, "demo", "dump, kill and restore a live training job", _DESCRIPTION)
    parser.add_argument("--steps", metavar="N", type=positive, default=1200, help="training steps (default: 1200)")
    parser.add_argument("--keep", metavar="DIR", type=Path, help="keep logs and images in DIR (new or empty)")
    add_json(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Do it."""
    from gpurestore.demo.runner import run_demo

    return run_demo(steps=args.steps, keep=args.keep, as_json=args.json)
