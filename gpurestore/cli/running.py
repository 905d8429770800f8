"""Running an operation from the command line: Ctrl-C undoes it, and it draws its progress on a terminal."""

from __future__ import annotations

import signal
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Protocol, TypeVar

import trio

from gpurestore.errors import CancelledError
from gpurestore.pipeline.critical import CriticalStage, describe
from gpurestore.pipeline.progress import Progress
from gpurestore.units import format_bytes, format_seconds

ENDING_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

_SHOWN_S = 0.001  # stages shorter than this are left to the log and the trace

Result = TypeVar("Result")


class Outcome(Protocol):
    """What the results of all operations have."""

    @property
    def pids(self) -> tuple[int, ...]:
        """The tasks."""

    @property
    def memory_bytes(self) -> int:
        """Bytes of pages moved."""

    @property
    def total_s(self) -> float:
        """How long it took."""

    @property
    def critical_path(self) -> tuple[CriticalStage, ...]:
        """What that was spent on."""


def show_summary(title: str, result: Outcome) -> None:
    """On a terminal say in a line what was done and what determined how long it took; nothing elsewhere."""
    try:
        if not sys.stderr.isatty():
            return
        nr = len(result.pids)
        tasks = "1 task" if nr == 1 else f"{nr} tasks"
        facts = f"{tasks}, {format_bytes(result.memory_bytes)} of memory, {format_seconds(result.total_s)}"
        if (frozen_s := getattr(result, "frozen_s", None)) is not None:
            facts += f" (frozen for {format_seconds(frozen_s)})"
        path = describe(result.critical_path, _SHOWN_S)
        sys.stderr.write(f"gpurestore {title}: {facts}: {path}\n")
    except (OSError, ValueError):
        pass  # the terminal went away


def run_operation(title: str, operation: Callable[[Progress | None], Awaitable[Result]]) -> Result:
    """Run ``operation`` under trio until it is done or one of the ending signals cancels it.

    An operation cleans up after itself when it is cancelled; CancelledError says that it did. One that finished
    although a signal had come has finished: its result is returned.
    """
    return trio.run(_supervised, title, operation, restrict_keyboard_interrupt_to_checkpoints=True)


async def _supervised(title: str, operation: Callable[[Progress | None], Awaitable[Result]]) -> Result:
    progress = Progress.for_terminal(f"gpurestore {title}", sys.stderr)
    scope = trio.CancelScope()
    received: list[signal.Signals] = []
    results: list[Result] = []
    with trio.open_signal_receiver(*ENDING_SIGNALS) as signals:
        async with trio.open_nursery() as helpers:
            helpers.start_soon(_cancel_on_signal, signals, scope, received)
            try:
                with scope:
                    results.append(await operation(progress))
            except* CancelledError:  # from a step that noticed before trio did
                if not received:
                    raise
            finally:
                helpers.cancel_scope.cancel()
    if results:
        return results[0]
    raise CancelledError(f"interrupted by {received[0].name}; everything was put back as it was before")


async def _cancel_on_signal(
    signals: AsyncIterator[int], scope: trio.CancelScope, received: list[signal.Signals]
) -> None:
    async for number in signals:
        received.append(signal.Signals(number))
        scope.cancel()
