"""What several commands share: options, the log, and how results are printed."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeAlias

from gpurestore.errors import UsageError

Commands: TypeAlias = "argparse._SubParsersAction[Any]"


def add_command(commands: Commands, name: str, summary: str, description: str) -> argparse.ArgumentParser:
    """A parser for one command, the same in style as all others."""
    parser: argparse.ArgumentParser = commands.add_parser(
        name,
        help=summary,
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    return parser


def add_run_options(parser: argparse.ArgumentParser) -> None:
    """Options of the commands that work on a tree."""
    parser.add_argument(
        "--jobs", metavar="N", type=positive, help="how many workers move memory (default: one per allowed core)"
    )
    parser.add_argument("-o", "--log-file", metavar="LOG", type=Path, help="write a log to LOG, in the current folder")
    parser.add_argument(
        "-v", dest="verbose", action="count", default=0, help="say more in the log: -v what is done, -vv every detail"
    )
    parser.add_argument(
        "--trace", metavar="FILE", type=Path, help="write what ran when to FILE, to be opened in ui.perfetto.dev"
    )
    add_json(parser)


def add_json(parser: argparse.ArgumentParser) -> None:
    """``--json``."""
    parser.add_argument("--json", action="store_true", help="print the result as one JSON object")


def positive(text: str) -> int:
    """An argument that must be a whole number from 1 on."""
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return value


def set_up_log(log_file: Path | None, verbose: int) -> None:
    """Send the log to ``log_file``, or to stderr where that is asked for by ``-v``.

    A file gets at least what is done; stderr gets warnings only, unless there is a ``-v``.
    """
    if log_file is None and not verbose:
        return  # warnings still reach stderr through logging's last resort
    import logging

    handler: logging.Handler
    if log_file is None:
        handler = logging.StreamHandler(sys.stderr)
    else:
        try:
            handler = logging.FileHandler(log_file, mode="w")
        except OSError as error:
            raise UsageError(f"cannot write the log {log_file}: {error.strerror}") from error
    handler.setFormatter(logging.Formatter("%(relativeCreated)10.3f ms  %(levelname)-7s  %(message)s"))
    log = logging.getLogger("gpurestore")
    log.setLevel(logging.DEBUG if verbose > 1 else logging.INFO)
    log.propagate = False
    log.addHandler(handler)


def to_data(value: Any) -> Any:
    """A result as plain JSON values: dataclasses become objects, paths and bytes text."""
    import dataclasses

    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: to_data(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): to_data(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [to_data(item) for item in value]
    if isinstance(value, bytes):
        return value.hex()
    if value is None or isinstance(value, bool | int | float | str):
        return value
    return str(value)


def print_json(value: Any) -> None:
    """One JSON object on one line of stdout, complete at once."""
    import json

    sys.stdout.write(json.dumps(to_data(value)) + "\n")
    sys.stdout.flush()
