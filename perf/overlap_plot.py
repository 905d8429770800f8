"""The picture of perf/overlap.py: a panel for each number of tasks, seconds over D/M, drawn as timelines are."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from gpurestore.errors import UsageError
from gpurestore.pipeline.drawing import INK, Drawing, Line, Rect, Shape, Text, text_width, to_png, to_svg

WIDTH, PANEL_HEIGHT = 1200, 330
_PARALLEL, _SERIAL, _LIMIT, _BEST = "#1f6fb2", "#6b7280", "#b0122b", "#1b8a3d"
_GRID, _FAINT = "#e3e6ea", "#59626d"
_LEGEND = (
    (_PARALLEL, "parallel"),
    (_SERIAL, "serial"),
    (_BEST, "max(M, D): the best possible"),
    (_LIMIT, "limit: 1.1 max(M, D) + 0.2 s"),
)


@dataclass(frozen=True, slots=True)
class Point:
    """Samples at one D/M."""

    ratio: float
    best_s: float
    limit_s: float
    parallel_s: Sequence[float]
    serial_s: Sequence[float]


@dataclass(frozen=True, slots=True)
class Panel:
    """All points of one tree."""

    title: str
    points: Sequence[Point]


def draw(panels: Sequence[Panel], target: Path) -> list[Path]:
    """Write ``target``.svg, and .png where Pillow is there; what was written."""
    shapes: list[Shape] = [Text(16, 32, "Restore: memory and devices at the same time", 18, bold=True)]
    x = 16.0
    for colour, text in _LEGEND:
        shapes += [Rect(x, 50, 14, 10, colour), Text(x + 20, 60, text, 12)]
        x += 20 + text_width(text, 12) + 18
    columns = 1 if len(panels) == 1 else 2
    width = (WIDTH - 32) / columns
    for number, panel in enumerate(panels):
        shapes += _panel(panel, 16 + number % columns * width, 80 + number // columns * PANEL_HEIGHT, width)
    height = 80 + math.ceil(len(panels) / columns) * PANEL_HEIGHT + 16
    drawing = Drawing(WIDTH, height, tuple(shapes))
    written = [target.with_suffix(".svg")]
    written[0].write_text(to_svg(drawing))
    try:
        png = to_png(drawing)
    except UsageError as error:
        print(f"\nNo PNG: {error}", end="")
    else:
        written.append(target.with_suffix(".png"))
        written[1].write_bytes(png)
    return written


def _panel(panel: Panel, left: float, top: float, width: float) -> list[Shape]:
    x0, x1, y0, y1 = left + 46, left + width - 24, top + PANEL_HEIGHT - 46, top + 34
    logs = [math.log2(point.ratio) for point in panel.points]
    low, high = min(logs) - 0.3, max(logs) + 0.3
    top_s = 1.08 * max(max(*point.serial_s, *point.parallel_s, point.limit_s) for point in panel.points)

    def place_x(ratio: float) -> float:
        return x0 + (x1 - x0) * (math.log2(ratio) - low) / (high - low)

    def place_y(seconds: float) -> float:
        return y0 - (y0 - y1) * seconds / top_s

    shapes: list[Shape] = [Text(x0, top + 18, panel.title, 13, bold=True)]
    step = _round_step(top_s / 6)
    for tick in range(int(top_s / step) + 1):
        y = place_y(tick * step)
        shapes += [Line(((x0, y), (x1, y)), _GRID), Text(x0 - 6, y + 4, f"{tick * step:g}", 11, _FAINT, "end")]
    for point in panel.points:
        shapes.append(Text(place_x(point.ratio), y0 + 16, f"{point.ratio:g}", 11, _FAINT, "middle"))
    shapes.append(Text((x0 + x1) / 2, y0 + 34, "D/M (device seconds over memory seconds)", 11, _FAINT, "middle"))
    shapes.append(Text(x0 - 6, top + 18, "s", 11, _FAINT, "end"))
    shapes += [Line(((x0, y0), (x1, y0)), INK), Line(((x0, y0), (x0, y1)), INK)]
    for colour, value, line_width in (
        (_LIMIT, lambda p: p.limit_s, 1.0),
        (_BEST, lambda p: p.best_s, 1.0),
        (_SERIAL, lambda p: statistics.median(p.serial_s), 2.0),
        (_PARALLEL, lambda p: statistics.median(p.parallel_s), 2.0),
    ):
        shapes += _curve(panel.points, place_x, place_y, colour, value, line_width)
    for point in panel.points:
        shapes += _samples(place_x(point.ratio), place_y, point.serial_s, _SERIAL)
        shapes += _samples(place_x(point.ratio), place_y, point.parallel_s, _PARALLEL)
    return shapes


def _curve(
    points: Sequence[Point],
    place_x: Callable[[float], float],
    place_y: Callable[[float], float],
    colour: str,
    value: Callable[[Point], float],
    width: float,
) -> list[Shape]:
    line = tuple((place_x(point.ratio), place_y(value(point))) for point in points)
    return [Line(line, colour, width)] if len(line) > 1 else []


def _samples(x: float, place_y: Callable[[float], float], seconds: Sequence[float], colour: str) -> list[Shape]:
    """A bar from the least to the most, and a box at the median."""
    middle = place_y(statistics.median(seconds))
    ends = ((x, place_y(min(seconds))), (x, place_y(max(seconds))))
    return [Line(ends, colour, 1.5), Rect(x - 4, middle - 4, 8, 8, colour)]


def _round_step(value: float) -> float:
    power: float = 10.0 ** math.floor(math.log10(value))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= value)
