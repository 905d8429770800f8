"""``gpurestore inspect``: what is in an image folder."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from gpurestore.cli.options import Commands, add_command, add_json, print_json

if TYPE_CHECKING:
    from gpurestore.images.inspect import FolderSummary, TaskSummary

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
    from gpurestore.images.inspect import summarize

    summary = summarize(args.images_dir)
    if args.json:
        print_json(summary)
    else:
        sys.stdout.write("\n".join(describe(summary)) + "\n")
    return 0


def describe(summary: FolderSummary) -> Iterator[str]:
    """The summary as lines for people."""
    from gpurestore.pipeline.trace import format_bytes

    yield f"images   {summary.path}: {format_bytes(summary.total_bytes)} in {len(summary.files)} files"
    where = f" on {summary.hostname}, kernel {summary.kernel}, {summary.created}" if summary.created else ""
    yield f"made by  {summary.tool}{where}"
    yield f"plugins  {', '.join(summary.plugins) or 'none'}"
    for task, depth in _walk(summary):
        yield ""
        yield from ("  " * depth + line for line in _describe_task(task))
    if summary.shared_memory:
        yield ""
        yield "anonymous memory shared between tasks"
        for shared in summary.shared_memory:
            yield f"  object {shared.shmid}: {format_bytes(shared.stored_bytes)} stored"
    yield ""
    yield "files"
    for name, size in sorted(summary.files.items()):
        yield f"  {format_bytes(size):>10}  {name}"


def _walk(summary: FolderSummary) -> Iterator[tuple[TaskSummary, int]]:
    """The tasks, each below its parent, with its depth in the tree."""
    depths: dict[int, int] = {}
    children: dict[int, list[TaskSummary]] = {}
    for task in summary.tasks:
        children.setdefault(task.ppid, []).append(task)
    known = {task.pid for task in summary.tasks}
    todo = [task for task in reversed(summary.tasks) if task.ppid not in known]
    while todo:
        task = todo.pop()
        if task.pid in depths:
            continue
        depths[task.pid] = depths.get(task.ppid, -1) + 1
        yield task, depths[task.pid]
        todo.extend(reversed(children.get(task.pid, [])))


def _describe_task(task: TaskSummary) -> Iterator[str]:
    from gpurestore.pipeline.trace import format_bytes

    threads = f"{len(task.threads)} thread{'s' if len(task.threads) != 1 else ''}"
    yield f"task {task.pid}  {task.comm}  {task.state}, {threads}, group {task.pgid}, session {task.sid}"
    if len(task.threads) > 1:
        yield f"  threads  {' '.join(map(str, task.threads))}"
    if task.memory:
        yield f"  memory   {format_bytes(task.stored_bytes)} stored"
    for kind in task.memory:
        sizes = f"{format_bytes(kind.mapped_bytes):>10} mapped {format_bytes(kind.stored_bytes):>10} stored"
        yield f"    {kind.kind:<20} {kind.mappings:>4}  {sizes}"
    if task.descriptors:
        yield "  descriptors"
    for descriptor in task.descriptors:
        suffix = "  (close on exec)" if descriptor.close_on_exec else ""
        yield f"    {descriptor.fd:>4}  {descriptor.kind:<10} {descriptor.target}{suffix}"
