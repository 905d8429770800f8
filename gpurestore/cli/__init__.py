"""The command line: one module per command, and one place where errors become a line and an exit code.

Exit codes: 0 done; 1 failed, and the tree is as it was before; 2 usage; 3 failed and something needs a person;
130 interrupted and undone. ``gpurestore restore`` in front of a tree ends with the tree's own exit status.

Only what every call needs is imported here: commands import the rest when they run.
"""

from __future__ import annotations

import argparse
import gc
import sys
from collections.abc import Sequence
from contextlib import suppress
from typing import NoReturn

from gpurestore.errors import GpurestoreError, NeedsPersonError, leading

COMMANDS = ("dump", "restore", "inspect", "timeline", "plugins", "check", "demo")  # each a module beside this one

_DESCRIPTION = """\
Freeze a running process tree, write it to images, and bring it back - on this machine or another one."""

_EPILOG = """\
A first look:
  gpurestore check                      what this machine allows
  gpurestore dump -t PID -D images      freeze, write and end the tree of PID
  gpurestore restore -D images          bring it back and stay in front of it
"""


class Parser(argparse.ArgumentParser):
    """An argument parser whose complaint is one line."""

    def error(self, message: str) -> NoReturn:
        """End with exit code 2."""
        name = self.prog.replace(" ", ": ")
        self.exit(2, f"{name}: {message} (see {self.prog} --help)\n")


def build_parser(command: str | None = None) -> Parser:
    """The whole command line, or if ``command`` is one of :data:`COMMANDS` what it takes to parse that."""
    from importlib import import_module

    from gpurestore import __version__

    parser = Parser(
        prog="gpurestore",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"gpurestore {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", dest="command", required=True)
    for name in [command] if command in COMMANDS else COMMANDS:
        import_module(f"gpurestore.cli.{name}").add_parser(commands)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    # Loading modules makes many objects and no garbage; looking for it meanwhile would cost a tenth of the start-up.
    gc.set_threshold(100_000)
    words = sys.argv[1:] if argv is None else argv
    args = build_parser(words[0] if words else None).parse_args(words)
    try:
        return int(args.run(args))
    except BaseException as error:
        return _report(args.command, error)


def command() -> NoReturn:
    """The whole process: run the command line and end. Taking the interpreter apart would take a fifth of a restore's
    time, and would wait for hooks of plugins that hang; everything that must be closed has been closed by then."""
    import os

    from gpurestore.cli.deferred import defer

    defer()
    code = main()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):  # whoever read it is gone
            stream.flush()
    if "logging" in sys.modules:
        sys.modules["logging"].shutdown()
    os._exit(code)


def _report(command: str, error: BaseException) -> int:
    """One line on stderr that says what went wrong, and the exit code for it."""
    cause = _worst(error)
    if isinstance(cause, SystemExit):
        raise cause
    # Python 3.11 wraps what is raised while a class is made, and commands import their parts when they run.
    if isinstance(cause, KeyboardInterrupt) or isinstance(cause.__cause__, KeyboardInterrupt):
        text, code = "interrupted", 130
    elif isinstance(cause, GpurestoreError):
        text, code = str(cause), cause.exit_code
    elif isinstance(cause, BrokenPipeError):
        return _output_gone()
    else:
        text, code = f"internal error, please report it: {type(cause).__name__}: {cause}", 1
        _log_traceback(error)
    sys.stderr.write(f"gpurestore: {command}: {' '.join(text.split())}\n")
    return code


def _worst(error: BaseException) -> BaseException:
    """Of a group of errors from concurrent stages the one to report: what needs a person, else the first of ours."""
    if not isinstance(error, BaseExceptionGroup):
        return error
    leaves = [_worst(part) for part in error.exceptions]
    urgent = [leaf for leaf in leaves if isinstance(leaf, NeedsPersonError)]
    foreign = [leaf for leaf in leaves if not isinstance(leaf, GpurestoreError | KeyboardInterrupt)]
    ours = [leaf for leaf in leaves if isinstance(leaf, GpurestoreError)]
    causes = [leading(ExceptionGroup("", ours))] if ours else []
    return (urgent or foreign or causes or leaves)[0]


def _log_traceback(error: BaseException) -> None:
    import logging

    log = logging.getLogger("gpurestore")
    log.log(logging.ERROR if log.handlers else logging.DEBUG, "internal error", exc_info=error)


def _output_gone() -> int:
    """Whoever read our output closed it (``| head``): end quietly, and let the interpreter's last flush go nowhere."""
    import os

    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 1
