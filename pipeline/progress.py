"""Live progress on a terminal: one line that says which stages run, how far the bytes are, how fast, and what waits
for what.

The line is redrawn in place with plain ANSI codes and wiped at the end. Where stderr is no terminal nothing is printed.
"""

from __future__ import annotations

import os
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, TextIO

import trio

from gpurestore.pipeline.trace import Span
from gpurestore.units import format_bytes

if TYPE_CHECKING:
    from gpurestore.pipeline.graph import Node

_REFRESH_S = 0.1
_WIPE = "\r\x1b[2K"
_SPEED_WINDOW_S = 1.0
_MAX_WAITS = 2  # as many are named


class Progress:
    """Shows the stages of a trace. Give it to the trace as listener and run :meth:`run` beside the operation."""

    def __init__(
        self,
        title: str,
        stream: TextIO,
        clock: Callable[[], float] = time.monotonic,
        columns: Callable[[], int] | None = None,
    ) -> None:
        self._title = title
        self._stream = stream
        self._clock = clock
        self._columns = columns or _terminal_columns
        self._start = clock()
        # Keyed by identity: the same stage runs for many tasks at once. Dicts keep the order of arrival, and single
        # operations on them are atomic, so that stages may start and end in worker threads.
        self._running: dict[int, Span] = {}
        self._ended_bytes = self._ended_total = 0  # of stages that told their bytes while they ran
        self._samples: deque[tuple[float, int]] = deque()
        self._drawn = False
        # What waits, and for what that runs; whoever walks a graph sets it.
        self.waiting: Callable[[], Iterable[tuple[Node, Sequence[Node]]]] = list

    @classmethod
    def for_terminal(cls, title: str, stream: TextIO) -> Progress | None:
        """A progress display when ``stream`` is a terminal that understands it, else None."""
        try:
            able = stream.isatty() and os.environ.get("TERM", "dumb") != "dumb"
        except ValueError:  # closed
            return None
        return cls(title, stream) if able else None

    def stage_started(self, span: Span) -> None:
        """Listener: show ``span`` from the next refresh on."""
        self._running[id(span)] = span

    def stage_ended(self, span: Span) -> None:
        """Listener: ``span`` is over."""
        if self._running.pop(id(span), None) is not None and span.gauge is not None:
            self._ended_bytes += span.gauge()
            self._ended_total += span.total or 0

    async def run(self) -> None:
        """Redraw until cancelled, then wipe the line."""
        try:
            while True:
                self.draw()
                await trio.sleep(_REFRESH_S)
        finally:
            self.wipe()

    def draw(self) -> None:
        """Draw the line as things stand now."""
        text = self.line()[: max(self._columns() - 1, 10)]
        self._write(f"{_WIPE}{text}")
        self._drawn = True

    def wipe(self) -> None:
        """Leave the terminal as it was."""
        if self._drawn:
            self._write(_WIPE)
            self._drawn = False

    def line(self) -> str:
        """The text of the line, without escape codes."""
        spans = list(self._running.values())
        names = _counted(span.name for span in spans if span.part_of is None)
        stages = ", ".join(names) or "..."
        return f"{self._title} {self._clock() - self._start:5.1f} s{self._bytes(spans)}  {stages}{self._waits()}"

    def _bytes(self, spans: list[Span]) -> str:
        """All bytes so far and the speed of the last second, while anything moves."""
        gauged = [(span, span.gauge()) for span in spans if span.gauge is not None]
        if not gauged:
            self._samples.clear()
            return ""
        done = self._ended_bytes + sum(count for _, count in gauged)
        total = self._ended_total + sum(span.total or 0 for span, _ in gauged)
        text = f"  {format_bytes(done)}"
        if total:
            text += f" of {format_bytes(total)} ({min(100, 100 * done // total)} %)"
        speed = self._speed(done)
        return text + (f", {speed / 1e9:.2f} GB/s" if speed is not None else "")

    def _speed(self, done: int) -> float | None:
        """Bytes per second over the last second, or as long as there are samples."""
        now = self._clock()
        self._samples.append((now, done))
        while len(self._samples) > 2 and now - self._samples[1][0] >= _SPEED_WINDOW_S:
            self._samples.popleft()
        then, before = self._samples[0]
        return (done - before) / (now - then) if now > then else None

    def _waits(self) -> str:
        waits = [(node.name, ", ".join(_shortly(running))) for node, running in self.waiting() if running]
        texts = _counted(f"{name} waits for {for_what}" for name, for_what in waits)
        more = f"; and {len(texts) - _MAX_WAITS} more" if len(texts) > _MAX_WAITS else ""
        return "".join(f"; {text}" for text in texts[:_MAX_WAITS]) + more

    def _write(self, text: str) -> None:
        try:
            self._stream.write(text)
            self._stream.flush()
        except OSError:
            self._running.clear()  # the terminal went away; the operation goes on without a display


def _counted(texts: Iterable[str]) -> list[str]:
    """Each text once, with the number of times that it is there."""
    return [text if count == 1 else f"{text} x{count}" for text, count in Counter(texts).items()]


def _shortly(nodes: Sequence[Node]) -> list[str]:
    return [*map(str, nodes[:_MAX_WAITS]), *([f"{len(nodes) - _MAX_WAITS} more"] if len(nodes) > _MAX_WAITS else [])]


def _terminal_columns() -> int:
    try:
        return os.get_terminal_size(2).columns or 80  # some terminals do not know their size
    except OSError:
        return 80
