"""What happened when: spans of stages, for ``--trace FILE``, the live progress and the table at the end.

A :class:`Trace` collects spans from any number of trio tasks and threads. Times are of the monotonic clock and count
from the moment the trace was made. Use ``async with`` or plain ``with``, whichever the place allows::

    async with trace.span("memory", task=pid, total=nr_bytes, gauge=queue.bytes_done, after=[mapped]) as span:
        ...
        span.set(bytes=nr_bytes)

``after`` names the spans that the stage needed; without it pipeline/critical.py takes the one before it on its track.
A span with ``part_of`` (what one worker does of a stage, say) is shown on its track, and counts as that stage.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Protocol

from gpurestore.errors import GpurestoreError
from gpurestore.units import format_seconds, size_and_speed

Value = int | float | str | bool
MAIN_TRACK = "main"
PLUGIN_TRACK = "plugin "  # and the plugin's name
WORKER_TRACK = " worker "  # between the track of the task and the worker's number

# Kinds of stages, as the pictures colour them.
MEMORY, DEVICE, STATE, CONTROL = KINDS = ("memory", "device", "state", "control")
_MEMORY_STAGES = frozenset({"memory", "shared memory", "pump", "write", "lazy pages", "fill", "device memory"})
_DEVICE_STAGES = frozenset({"plugins", "pause devices", "checkpoint devices", "devices late"})
_CONTROL_STAGES = frozenset(
    {"load", "verify", "check", "place", "plan", "freeze", "thaw", "commit", "kill", "park", "release"}
)
_NS = 1_000_000_000


def kind_of(name: str, track: str) -> str:
    """One of KINDS. Device hooks are named as their plugins' authors know them, in capitals."""
    if track.startswith(PLUGIN_TRACK) or name.isupper() or name in _DEVICE_STAGES:
        return DEVICE
    if name in _MEMORY_STAGES:
        return MEMORY
    return CONTROL if name in _CONTROL_STAGES else STATE


@dataclass(slots=True, eq=False)
class Span:
    """One stage of one track. ``total`` and ``gauge`` (bytes so far) are for the live progress while it runs."""

    name: str
    track: str
    start_ns: int
    end_ns: int | None = None
    args: dict[str, Value] = field(default_factory=dict)
    total: int | None = None
    gauge: Callable[[], int] | None = None
    after: tuple[Span, ...] = ()
    part_of: Span | None = None

    def set(self, **args: Value) -> None:
        """Attach facts that are shown beside the span; ``bytes`` also counts in the table's throughput."""
        self.args.update(args)

    def watch(self, total: int, gauge: Callable[[], int]) -> None:
        """From now on ``gauge`` tells how many of ``total`` bytes are done; for the live progress."""
        self.total, self.gauge = total, gauge

    @property
    def seconds(self) -> float:
        """How long it took; 0 while it still runs."""
        return 0.0 if self.end_ns is None else (self.end_ns - self.start_ns) / _NS

    @property
    def kind(self) -> str:
        """One of KINDS."""
        return kind_of(self.name, self.track)

    @property
    def nr_bytes(self) -> int:
        """Bytes moved by this stage, 0 where that means nothing."""
        value = self.args.get("bytes", 0)
        return value if isinstance(value, int) else 0


class Listener(Protocol):
    """Somebody who watches a trace grow. Called in the task or thread that runs the stage: must be quick."""

    def stage_started(self, span: Span) -> None:
        """``span`` has begun."""

    def stage_ended(self, span: Span) -> None:
        """``span`` is over, with or without success."""


class SpanScope:
    """The ``with`` block of one span."""

    def __init__(self, trace: Trace, span: Span) -> None:
        self._trace = trace
        self._span = span

    def __enter__(self) -> Span:
        self._trace._begin(self._span)
        return self._span

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if kind is not None:
            self._span.args["error"] = kind.__name__
        self._trace._end(self._span)

    async def __aenter__(self) -> Span:
        return self.__enter__()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.__exit__(kind, error, traceback)


class Trace:
    """All spans of one operation."""

    def __init__(self, listener: Listener | None = None, clock: Callable[[], int] = time.monotonic_ns) -> None:
        self.spans: list[Span] = []
        self._listener = listener
        self._clock = clock
        self._zero_ns = clock()

    def span(
        self,
        name: str,
        *,
        task: int | None = None,
        track: str | None = None,
        total: int | None = None,
        gauge: Callable[[], int] | None = None,
        after: Iterable[Span] = (),
        part_of: Span | None = None,
        **args: Value,
    ) -> SpanScope:
        """A scope for the stage ``name`` on the track of ``task`` (a pid), on ``track``, or on the main one."""
        where = track or (MAIN_TRACK if task is None else f"task {task}")
        return SpanScope(self, Span(name, where, 0, None, dict(args), total, gauge, tuple(after), part_of))

    def add(
        self, name: str, track: str, begin_ns: int, end_ns: int, *, part_of: Span | None = None, **args: Value
    ) -> None:
        """Add what somebody else timed, by the monotonic clock; such a span was never shown live."""
        start_ns = begin_ns - self._zero_ns
        self.spans.append(Span(name, track, start_ns, end_ns - self._zero_ns, dict(args), part_of=part_of))

    def now_ns(self) -> int:
        """Nanoseconds since the trace began."""
        return self._clock() - self._zero_ns

    def _begin(self, span: Span) -> None:
        span.start_ns = self.now_ns()
        self.spans.append(span)
        if self._listener is not None:
            self._listener.stage_started(span)

    def _end(self, span: Span) -> None:
        span.end_ns = self.now_ns()
        if self._listener is not None:
            self._listener.stage_ended(span)

    def write(self, path: Path) -> None:
        """Write the spans for chrome://tracing or ui.perfetto.dev; the file is whole or not there."""
        partial = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            partial.write_text(json.dumps(chrome_events(self.spans, self.now_ns()), separators=(",", ":")))
            partial.replace(path)
        except OSError as error:
            partial.unlink(missing_ok=True)
            raise GpurestoreError(f"cannot write the trace to {path}: {error.strerror}") from error


def chrome_events(spans: Sequence[Span], now_ns: int) -> dict[str, object]:
    """The spans as Chrome trace events; one that still runs ends at ``now_ns``."""
    events: list[dict[str, object]] = [
        {"ph": "M", "name": "process_name", "pid": 1, "tid": 0, "args": {"name": "gpurestore"}}
    ]
    tracks = list(dict.fromkeys([MAIN_TRACK, *(span.track for span in spans)]))
    numbers = {id(span): number for number, span in enumerate(spans, 1)}
    tid = 0
    for track in tracks:
        for number, lane in enumerate(_lanes([s for s in spans if s.track == track], now_ns)):
            tid += 1
            name = track if number == 0 else f"{track} ({number + 1})"
            events.append({"ph": "M", "name": "thread_name", "pid": 1, "tid": tid, "args": {"name": name}})
            events.append({"ph": "M", "name": "thread_sort_index", "pid": 1, "tid": tid, "args": {"sort_index": tid}})
            events.extend(_event(span, tid, now_ns, numbers) for span in lane)
    return {"traceEvents": events, "displayTimeUnit": "ms"}


def _event(span: Span, tid: int, now_ns: int, numbers: Mapping[int, int]) -> dict[str, object]:
    """One span. Viewers show ``args``; ``span``, ``after`` and ``part_of`` in it are numbers of spans of this file."""
    end_ns = now_ns if span.end_ns is None else span.end_ns
    args: dict[str, object] = {**span.args, "span": numbers[id(span)]}
    if needed := [numbers[id(other)] for other in span.after if id(other) in numbers]:
        args["after"] = needed
    if span.part_of is not None and id(span.part_of) in numbers:
        args["part_of"] = numbers[id(span.part_of)]
    return {
        "ph": "X",
        "name": span.name,
        "cat": span.kind,
        "pid": 1,
        "tid": tid,
        "ts": span.start_ns / 1000,
        "dur": (end_ns - span.start_ns) / 1000,
        "args": args,
    }


def _lanes(spans: Iterable[Span], now_ns: int) -> list[list[Span]]:
    """Spread spans that overlap without one holding the other over several lanes: viewers only draw nested ones."""
    lanes: list[tuple[list[Span], list[int]]] = []  # the spans, and the ends of those that are open, outermost first
    for span in sorted(spans, key=lambda s: (s.start_ns, -(now_ns if s.end_ns is None else s.end_ns))):
        end_ns = now_ns if span.end_ns is None else span.end_ns
        for place in lanes:
            ends = place[1]
            while ends and ends[-1] <= span.start_ns:
                ends.pop()
            if not ends or end_ns <= ends[-1]:
                break
        else:
            place = ([], [])
            lanes.append(place)
        place[0].append(span)
        place[1].append(end_ns)
    return [lane for lane, _ in lanes]


@dataclass(frozen=True, slots=True)
class StageSummary:
    """All spans of one name: how often, when first, how long the wall clock saw at least one of them, bytes."""

    name: str
    count: int
    start_s: float
    wall_s: float
    nr_bytes: int


def summarize(spans: Iterable[Span]) -> list[StageSummary]:
    """One line per stage, in the order in which they began."""
    by_name: dict[str, list[Span]] = {}
    for span in spans:
        if span.end_ns is not None and span.part_of is None:
            by_name.setdefault(span.name, []).append(span)
    rows = []
    for name, group in by_name.items():
        intervals = sorted((span.start_ns, span.end_ns or span.start_ns) for span in group)
        start_ns = intervals[0][0]
        wall_ns = _union_ns(intervals)
        rows.append(StageSummary(name, len(group), start_ns / _NS, wall_ns / _NS, sum(s.nr_bytes for s in group)))
    return sorted(rows, key=lambda row: row.start_s)


def _union_ns(intervals: Sequence[tuple[int, int]]) -> int:
    total = reach = 0
    for start, end in intervals:
        start = max(start, reach)
        if end > start:
            total += end - start
            reach = end
    return total


def format_table(rows: Iterable[tuple[str, float, int]], title: str = "stage") -> str:
    """A small table of (what, seconds, bytes); bytes of 0 leave size and speed empty."""
    lines = [(title, "time", "size", "speed")]
    for what, seconds, nr_bytes in rows:
        lines.append((what, format_seconds(seconds), *size_and_speed(nr_bytes, seconds)))
    widths = [max(len(line[column]) for line in lines) for column in range(4)]
    rows_text = [
        f"{a:<{widths[0]}}  {b:>{widths[1]}}  {c:>{widths[2]}}  {d:>{widths[3]}}".rstrip() for a, b, c, d in lines
    ]
    rule = "-" * max(map(len, rows_text))
    return "\n".join([rows_text[0], rule, *rows_text[1:]])
