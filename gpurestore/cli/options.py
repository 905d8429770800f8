"""What several commands share: options, the log, and how results are printed."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from gpurestore.errors import UsageError

if TYPE_CHECKING:
    from gpurestore.pipeline.devices import PluginSettings

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


def add_libdir(parser: argparse.ArgumentParser) -> None:
    """``--libdir``."""
    parser.add_argument(
        "-L",
        "--libdir",
        metavar="DIR",
        type=Path,
        help="folder with device plugins (default: $CRIU_LIBS_DIR, else /usr/lib/criu if it is there)",
    )


def add_plugin_options(parser: argparse.ArgumentParser) -> None:
    """Options about device plugins."""
    add_libdir(parser)
    parser.add_argument(
        "--plugin-option",
        metavar="PLUGIN.NAME[=VALUE]",
        action="append",
        default=[],
        help="an option for a device plugin; may be given several times",
    )
    parser.add_argument(
        "--hook-timeout",
        metavar="SECONDS",
        type=seconds,
        help="how long a plugin's hook may take (default: 60 for PAUSE_DEVICES, no limit for the others)",
    )


def plugin_settings(args: argparse.Namespace) -> PluginSettings:
    """What :func:`add_plugin_options` was given."""
    from gpurestore.pipeline.devices import PluginSettings

    options = list(args.plugin_option)
    if gpu_map := getattr(args, "gpu_map", None):
        options.append(f"cuda.gpu-map={','.join(gpu_map)}")
    return PluginSettings(args.libdir, tuple(options), args.hook_timeout)


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


def seconds(text: str) -> float:
    """An argument that must be a time above 0."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds above 0")
    return value


def set_up_log(log_file: Path | None, verbose: int) -> None:
    """Send the log to ``log_file``, or to stderr where that is asked for by ``-v``.

    A file gets at least what is done; stderr gets warnings only, unless there is a ``-v``, and no traceback: what a
    traceback belongs to is told by the one line with which a command fails.
    """
    import logging

    handler: logging.Handler
    if log_file is None:
        handler = logging.StreamHandler(sys.stderr)
        if not verbose:
            handler.setLevel(logging.WARNING)
            handler.addFilter(lambda record: not record.exc_info)
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
    """A result as plain JSON values: dataclasses and named tuples become objects, paths and bytes text."""
    import dataclasses

    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        names = (field.name for field in dataclasses.fields(value) if not field.name.startswith("_"))
        return {name: to_data(getattr(value, name)) for name in names}
    if hasattr(value, "_asdict"):
        value = value._asdict()
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
