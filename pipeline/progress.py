"""Live progress on a terminal: one line that says which stages run, how far the bytes are, and how fast.

The line is redrawn in place with plain ANSI codes and wiped at the end. Where stderr is no terminal nothing is printed.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import TextIO

import trio

from gpurestore.pipeline.trace import Span, format_bytes

_REFRESH_S = 0.1
_WIPE = "\r\x1b[2K"


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
        self._begun: dict[int, float] = {}
        self._drawn = False

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
        self._begun[id(span)] = self._clock()
        self._running[id(span)] = span

    def stage_ended(self, span: Span) -> None:
        """Listener: ``span`` is over."""
        self._running.pop(id(span), None)
        self._begun.pop(id(span), None)

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
        names: dict[str, int] = {}
        for span in spans:
            names[span.name] = names.get(span.name, 0) + 1
        stages = ", ".join(name if count == 1 else f"{name} x{count}" for name, count in names.items()) or "..."
        return f"{self._title} {self._clock() - self._start:5.1f} s  {stages}{self._bytes(spans)}"

    def _bytes(self, spans: list[Span]) -> str:
        gauged = [(span, span.gauge()) for span in spans if span.gauge is not None]
        if not gauged:
            return ""
        done = sum(count for _, count in gauged)
        total = sum(span.total or 0 for span, _ in gauged)
        text = f"  {format_bytes(done)}"
        if total:
            text += f" of {format_bytes(total)} ({min(100, 100 * done // total)} %)"
        now = self._clock()
        seconds = now - min(self._begun.get(id(span), now) for span, _ in gauged)
        return text + (f", {done / seconds / 1e9:.2f} GB/s" if seconds > 0 else "")

    def _write(self, text: str) -> None:
        try:
            self._stream.write(text)
            self._stream.flush()
        except OSError:
            self._running.clear()  # the terminal went away; the operation goes on without a display


def _terminal_columns() -> int:
    try:
        return os.get_terminal_size(2).columns or 80  # some terminals do not know their size
    except OSError:
        return 80
