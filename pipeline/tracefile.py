"""Reading back what ``--trace`` wrote. Strict: what gpurestore did not write is an error that says where it is odd."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from gpurestore.errors import TraceFileError
from gpurestore.pipeline.trace import KINDS, Span, Value

MAX_FILE_BYTES = 64 << 20
MAX_SPANS = 200_000
_MAX_US = 1e14  # three years
_LANE = re.compile(r" \(\d+\)$")
_REFERENCES = ("span", "after", "part_of")


@dataclass(frozen=True, slots=True)
class TraceFile:
    """The spans of a file; ``rows`` are its lanes in the order of the file: names, and spans by their start."""

    rows: tuple[tuple[str, tuple[Span, ...]], ...]

    @property
    def spans(self) -> list[Span]:
        """All of them, by their start."""
        return sorted((span for _, row in self.rows for span in row), key=lambda span: span.start_ns)


def read_trace(path: Path) -> TraceFile:
    """The trace in the file ``path``. Raises TraceFileError."""
    try:
        with open(path, "rb") as file:
            raw = file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise TraceFileError(f"cannot read the trace {path}: {error.strerror}") from error
    if len(raw) > MAX_FILE_BYTES:
        raise TraceFileError(f"{path} is larger than {MAX_FILE_BYTES >> 20} MiB: this is no trace of gpurestore")
    try:
        data = json.loads(raw, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise TraceFileError(f"{path} is no trace: {error}; dump and restore write one with --trace") from error
    return _Reader(str(path)).read(data)


def _refuse_constant(text: str) -> NoReturn:
    raise ValueError(f"{text} is no number")


class _Reader:
    """One file being read."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._tracks: dict[int, str] = {}
        self._rows: dict[int, list[Span]] = {}
        self._numbers: dict[int, Span] = {}
        self._references: list[tuple[str, Span, dict[str, Any]]] = []

    def _fail(self, where: str, why: str) -> NoReturn:
        raise TraceFileError(f"{self._name}: {where}: {why}; only traces that gpurestore wrote can be drawn")

    def read(self, data: object) -> TraceFile:
        """Everything."""
        events = data.get("traceEvents") if isinstance(data, dict) else None
        if not isinstance(events, list):
            self._fail("the file", "there is no list traceEvents")
        for index, event in enumerate(events):
            self._event(f"event {index}", event)
        if not self._numbers:
            self._fail("the file", "it holds no stages")
        for where, span, args in self._references:
            self._resolve(where, span, args)
        rows = ((name, sorted(self._rows[tid], key=_nesting)) for tid, name in self._tracks.items() if self._rows[tid])
        return TraceFile(tuple((name, tuple(row)) for name, row in rows))

    def _event(self, where: str, event: object) -> None:
        if not isinstance(event, dict) or not isinstance(event.get("args"), dict):
            self._fail(where, "not an object with args")
        match event.get("ph"):
            case "M":
                self._metadata(where, event)
            case "X":
                self._span(where, event)
            case kind:
                self._fail(where, f"ph is {kind!r}, not M or X")

    def _metadata(self, where: str, event: dict[str, Any]) -> None:
        if event.get("name") != "thread_name":
            return
        tid, name = self._whole(where, event, "tid"), self._text(where, event["args"], "name")
        if tid in self._tracks:
            self._fail(where, f"track {tid} has a name already")
        self._tracks[tid] = name
        self._rows[tid] = []

    def _span(self, where: str, event: dict[str, Any]) -> None:
        tid = self._whole(where, event, "tid")
        if tid not in self._tracks:
            self._fail(where, f"track {tid} has no name")
        if self._text(where, event, "cat") not in KINDS:
            self._fail(where, f"cat is {event['cat']!r}, not one of {', '.join(KINDS)}")
        args = event["args"]
        number = self._whole(where, args, "span")
        if number in self._numbers:
            self._fail(where, f"there are two spans {number}")
        if len(self._numbers) >= MAX_SPANS:
            self._fail(where, f"more than {MAX_SPANS} stages")
        start_us, length_us = self._microseconds(where, event, "ts"), self._microseconds(where, event, "dur")
        track = _LANE.sub("", self._tracks[tid])
        span = Span(self._text(where, event, "name"), track, round(start_us * 1000))
        span.end_ns = round((start_us + length_us) * 1000)
        span.args = {key: self._value(where, key, value) for key, value in args.items() if key not in _REFERENCES}
        self._numbers[number] = span
        self._rows[tid].append(span)
        self._references.append((where, span, args))

    def _resolve(self, where: str, span: Span, args: dict[str, Any]) -> None:
        after = args.get("after", [])
        if not isinstance(after, list):
            self._fail(where, "after is not a list")
        span.after = tuple(self._referred(where, number) for number in after)
        if "part_of" in args:
            span.part_of = self._referred(where, args["part_of"])

    def _referred(self, where: str, number: object) -> Span:
        span = self._numbers.get(number) if type(number) is int else None
        if span is None:
            self._fail(where, f"there is no span {number!r}")
        return span

    def _value(self, where: str, key: str, value: object) -> Value:
        if not isinstance(value, int | float | str):  # bool is an int
            self._fail(where, f"{key} is neither a number nor text")
        if key == "bytes" and (type(value) is not int or value < 0):
            self._fail(where, f"bytes is {value!r}")
        return value

    def _whole(self, where: str, event: dict[str, Any], key: str) -> int:
        value = event.get(key)
        if type(value) is not int or value < 0:
            self._fail(where, f"{key} is {value!r}, not a whole number")
        return value

    def _text(self, where: str, event: dict[str, Any], key: str) -> str:
        value = event.get(key)
        if not isinstance(value, str) or not value:
            self._fail(where, f"{key} is {value!r}, not a text")
        return value

    def _microseconds(self, where: str, event: dict[str, Any], key: str) -> float:
        value = event.get(key)
        if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value <= _MAX_US:
            self._fail(where, f"{key} is {value!r}, not a time in microseconds")
        return float(value)


def _nesting(span: Span) -> tuple[int, int]:
    """Sorts outer spans before those inside."""
    return (span.start_ns, -(span.end_ns or 0))
