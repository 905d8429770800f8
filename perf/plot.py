"""The picture of a run: a panel for each case, in it a bar for each line, with the least and the most."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from measure import digits
from suite import Line, Outcome

from gpurestore.pipeline.drawing import INK, Drawing, Rect, Shape, Text, shorten, text_width, to_svg
from gpurestore.pipeline.drawing import Line as Stroke

WIDTH, ROW, HEAD = 1100, 18, 30
_LABEL, _RIGHT = 420, 90
_COLOURS = {"ours": "#1f6fb2", "criu": "#b0122b", "floor": "#1b8a3d"}
_MEMORY, _GRID, _FAINT = "#134a7a", "#e3e6ea", "#59626d"
_LEGEND = (
    (_COLOURS["ours"], "gpurestore, whole command"),
    (_MEMORY, "of it the memory"),
    (_COLOURS["floor"], "floor"),
    (_COLOURS["criu"], "CRIU"),
)


def draw(outcomes: Sequence[Outcome], title: str, target: Path) -> None:
    """Write an SVG."""
    shapes: list[Shape] = [Text(16, 32, title, 18, bold=True)]
    x = 16.0
    for colour, text in _LEGEND:
        shapes += [Rect(x, 48, 14, 10, colour), Text(x + 20, 58, text, 12)]
        x += 20 + text_width(text, 12) + 18
    top = 84.0
    for outcome in outcomes:
        lines = [line for line in outcome.lines if timed_clock(line)]
        if lines:
            shapes += panel(outcome, lines, top)
            top += HEAD + ROW * (len(lines) + len({line.what for line in lines})) + 22
    target.write_text(to_svg(Drawing(WIDTH, math.ceil(top), tuple(shapes))))


def timed_clock(line: Line) -> str:
    """The clock that a bar shows: the whole command where that was measured; empty for lines without times."""
    names = ("command", line.clock, *line.series)
    return next((name for name in names if name in line.series and line.series[name].unit == "s"), "")


def panel(outcome: Outcome, lines: Sequence[Line], top: float) -> list[Shape]:
    """One case, with an axis of its own."""
    most_s = max(max(line.series[timed_clock(line)].values) for line in lines)
    scale = (WIDTH - _LABEL - _RIGHT) / most_s
    shapes: list[Shape] = [Text(16, top + 14, outcome.title, 13, bold=True)]
    bottom = top + HEAD + ROW * (len(lines) + len({line.what for line in lines}))
    step = round_step(most_s / 6)
    for tick in range(int(most_s / step) + 1):
        x = _LABEL + tick * step * scale
        shapes += [
            Stroke(((x, top + HEAD - 6), (x, bottom)), _GRID),
            Text(x, bottom + 12, f"{tick * step:g}", 10, _FAINT),
        ]
    y = top + HEAD
    for what in dict.fromkeys(line.what for line in lines):
        shapes.append(Text(16, y + 12, shorten(what, 12, _LABEL - 24), 12))
        y += ROW
        for line in lines:
            if line.what == what:
                shapes += bar(line, y, scale)
                y += ROW
    return shapes


def bar(line: Line, y: float, scale: float) -> list[Shape]:
    """One line: its median, its spread, and the part of it that was memory."""
    series = line.series[timed_clock(line)]
    width = series.median * scale
    hint = f"{line.name}: median {digits(series.median)} s, {series.spread}"
    shapes: list[Shape] = [
        Text(_LABEL - 8, y + 12, shorten(line.name, 11, _LABEL - 50), 11, _FAINT, "end"),
        Rect(_LABEL, y + 3, max(1.0, width), ROW - 6, _COLOURS[line.who], hint=hint),
    ]
    if "memory" in line.series and timed_clock(line) == "command":
        share = line.series["memory"].median * scale
        shapes.append(Rect(_LABEL, y + 3, max(1.0, share), ROW - 6, _MEMORY, hint=hint))
    ends = (_LABEL + min(series.values) * scale, _LABEL + max(series.values) * scale)
    shapes.append(Stroke(((ends[0], y + ROW / 2), (ends[1], y + ROW / 2)), INK, 1.5))
    shapes.append(Text(max(ends[1], _LABEL + width) + 6, y + 12, f"{digits(series.median)} s", 11))
    return shapes


def round_step(value: float) -> float:
    """A round number that is not below ``value``."""
    power: float = 10.0 ** math.floor(math.log10(value))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= value)
