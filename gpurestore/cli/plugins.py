"""``gpurestore plugins``: which device plugins there are, and why one is not loaded."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING

from gpurestore.cli.options import Commands, add_command, add_json, add_libdir, print_json

if TYPE_CHECKING:
    from gpurestore.devplugins.load import PluginInfo

_DESCRIPTION = """\
Load each device plugin that a dump or a restore would find, say what it is, and unload it. They are the *.so and *.py
files in the plugin folder, and those of installed packages (entry points gpurestore.devplugins). No plugin is
initialised. The exit code is 1 when one cannot be loaded."""


def add_parser(commands: Commands) -> None:
    """Add the command and its options."""
    parser = add_command(commands, "plugins", "show which device plugins there are", _DESCRIPTION)
    add_libdir(parser)
    add_json(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Do it."""
    from gpurestore.devplugins.load import survey

    plugins = survey(args.libdir)
    if args.json:
        print_json({"plugins": plugins})
    else:
        sys.stdout.write(format_plugins(plugins))
    return 1 if any(plugin.state == "failed" for plugin in plugins) else 0


def format_plugins(plugins: Iterable[PluginInfo]) -> str:
    """Some lines for each plugin."""
    blocks = [_format(plugin) for plugin in plugins]
    return "\n".join(blocks) if blocks else "no plugins\n"


def _format(plugin: PluginInfo) -> str:
    state = {"loaded": "", "idle": ": not needed here", "failed": ": NOT LOADED"}[plugin.state]
    version = f" {plugin.version}" if plugin.version else ""
    rows = [("from", plugin.where), ("hooks", " ".join(plugin.hooks)), ("stages", " ".join(plugin.stages))]
    rows += [("needs", " ".join(plugin.needs)), ("error", plugin.error), ("why", plugin.why)]
    rows += [("note", note) for note in plugin.notes]
    lines = [f"{plugin.name}{version} ({plugin.kind}){state}"]
    lines += [f"  {title:<7} {text}" for title, text in rows if text]
    return "\n".join(lines) + "\n"
