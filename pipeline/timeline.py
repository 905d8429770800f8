"""The picture of a trace: a row per task, plugin and worker, a bar per stage, and the critical path on top.

Layout is a pure function from spans to shapes; no text lies on another: a label goes into its bar if it fits, else
beside it if nothing is there, else it is left to the hint under the mouse (SVG and HTML).
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape
from itertools import pairwise
from pathlib import Path

from gpurestore.errors import UsageError
from gpurestore.pipeline.critical import CriticalStage, critical_path, critical_stages, describe
from gpurestore.pipeline.drawing import (
    INK,
    Anchor,
    Drawing,
    Line,
    Rect,
    Shape,
    Text,
    label_that_fits,
    printable,
    shorten,
    text_width,
    to_png,
    to_svg,
    write_picture,
)
from gpurestore.pipeline.trace import (
    CONTROL,
    DEVICE,
    KINDS,
    MAIN_TRACK,
    MEMORY,
    PLUGIN_TRACK,
    STATE,
    WORKER_TRACK,
    Span,
    summarize,
)
from gpurestore.pipeline.tracefile import TraceFile, read_trace
from gpurestore.units import format_seconds, size_and_speed

WIDTH = 1200
FORMATS = ("svg", "html", "png")

COLOURS = {MEMORY: "#9cc9ec", DEVICE: "#fdbb6b", STATE: "#b4dca3", CONTROL: "#d5d8dc"}
EDGES = {MEMORY: "#5b9bd0", DEVICE: "#d98c2b", STATE: "#76b15f", CONTROL: "#a3a9b1"}
_MEANINGS = {
    MEMORY: "host memory",
    DEVICE: "devices and plugins",
    STATE: "files and other state of tasks",
    CONTROL: "checks, plan and control",
}
_CRITICAL, _GRID, _STRIPE, _FAINT = "#b0122b", "#e3e6ea", "#f6f7f9", "#59626d"
_MARGIN, _BAR, _STEP, _PAD = 16, 18, 21, 4
_LABEL_SIZE, _NAME_SIZE = 11.0, 12.0
_GAP = 5.0  # around a label
_MIN_BAR = 1.5
_MIN_ALONE = 6.0
_MIN_CUT = 60.0
_MAX_PATH_LINES, _MAX_PATH_CHARS = 3, 4000
_TASK = re.compile(rf"task ([0-9]{{1,12}})(?:{WORKER_TRACK}([0-9]{{1,6}}))?")
_NS = 1_000_000_000
_UNITS = ((_NS, "s"), (1_000_000, "ms"), (1_000, "us"), (1, "ns"))


# ---- files


def draw_file(source: Path, target: Path, title: str | None = None) -> None:
    """Draw the trace in ``source`` into ``target``, whose ending says how. The file is whole or as it was."""
    kind = target.suffix.lower().lstrip(".")
    if kind not in FORMATS:
        raise UsageError(f"{target}: the name must end in .svg, .html or .png, to say what to draw")
    trace = read_trace(source)
    name = printable(title or source.stem)
    if kind == "png":
        data = to_png(draw(trace, name))
    else:
        data = (to_svg(draw(trace, name)) if kind == "svg" else to_html(trace, name)).encode()
    write_picture(target, data)


def to_html(trace: TraceFile, title: str) -> str:
    """One page without anything from elsewhere: the picture, the critical path, and the table of stages."""
    drawing = draw(trace, title)
    stages = [
        (row.name, str(row.count), format_seconds(row.wall_s), *size_and_speed(row.nr_bytes, row.wall_s))
        for row in summarize(trace.spans)
    ]
    path = [
        (s.name, s.track, format_seconds(s.start_s), format_seconds(s.seconds), *size_and_speed(s.nr_bytes, s.seconds))
        for s in critical_stages(trace.spans)
    ]
    return _PAGE.format(
        title=escape(title),
        svg=to_svg(drawing, standalone=False),
        path=_table(("stage", "track", "began", "took", "size", "speed"), path),
        stages=_table(("stage", "times", "took", "size", "speed"), stages),
    )


_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<title>{title}</title>
<style>
body {{ font-family: "DejaVu Sans", Verdana, Helvetica, Arial, sans-serif; font-size: 14px; color: #1b1f24;
  background: #fff; max-width: 1200px; margin: 0 auto; }}
svg {{ max-width: 100%; height: auto; }}
section {{ margin: 1em 16px; }}
h2 {{ font-size: 15px; }}
table {{ border-collapse: collapse; }}
th, td {{ padding: 2px 14px 2px 0; text-align: right; border-bottom: 1px solid #e3e6ea; }}
th:first-child, td:first-child {{ text-align: left; }}
</style>
</head>
<body>
{svg}
<section><h2>Critical path: what determined the end</h2>
{path}</section>
<section><h2>Stages</h2>
{stages}</section>
</body>
</html>
"""


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    def line(cells: Sequence[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{escape(printable(cell))}</{tag}>" for cell in cells) + "</tr>\n"

    return f"<table>\n{line(header, 'th')}{''.join(line(row, 'td') for row in rows)}</table>\n"


# ---- the picture


@dataclass(slots=True)
class _Bar:
    span: Span
    x: float
    y: float
    width: float
    critical: bool


@dataclass(frozen=True, slots=True)
class _Label:
    at: float
    text: str
    inside: bool = False
    anchor: Anchor = "start"

    @property
    def width(self) -> float:
        return text_width(self.text, _LABEL_SIZE)

    @property
    def x(self) -> float:
        return self.at if self.anchor == "start" else self.at - self.width


@dataclass(slots=True)
class _Row:
    name: str
    spans: Sequence[Span]
    y: float = 0.0
    levels: list[int] = field(default_factory=list)  # of each span: how many others it lies in

    @property
    def height(self) -> float:
        return (max(self.levels) + 1) * _STEP + _PAD


@dataclass(frozen=True, slots=True)
class _Scale:
    left: float
    right: float
    end_ns: int

    def x(self, time_ns: int) -> float:
        return self.left + (self.right - self.left) * time_ns / self.end_ns


def draw(trace: TraceFile, title: str) -> Drawing:
    """Lay out everything."""
    spans = trace.spans
    critical = critical_path(spans)
    rows = [
        _Row(name, row, levels=_levels(row)) for name, row in sorted(trace.rows, key=lambda row: place_of_track(row[0]))
    ]
    end_ns = max(1, max(span.end_ns or 0 for span in spans))
    head, y = _head(title, end_ns, critical_stages(spans))
    names_width = min(230.0, max(text_width(row.name, _NAME_SIZE) for row in rows))
    scale = _Scale(_MARGIN + math.ceil(names_width) + 12, WIDTH - _MARGIN - 8, end_ns)
    top = y = y + 32
    for row in rows:
        row.y = y
        y += row.height
    marked = {id(span) for span in critical}
    bars = {row.name: _bars(row, scale, marked) for row in rows}
    shapes = [*head, *_stripes(rows, scale, names_width), *_axis(scale, top, y)]
    shapes += _connectors(critical, [bar for row in bars.values() for bar in row])
    for row in rows:
        shapes += _bar_shapes(bars[row.name])
    for row in rows:
        shapes += _labels(bars[row.name], scale)
    return Drawing(WIDTH, math.ceil(y) + _MARGIN, tuple(shapes))


def place_of_track(name: str) -> tuple[int, int, int]:
    """Sort key of a row: the main one, tasks with their workers behind, plugins, others; else as in the file."""
    if name.split(" (")[0] == MAIN_TRACK:
        return (0, 0, 0)
    if match := _TASK.match(name):
        return (1, int(match[1]), int(match[2] or 0))
    return (2 if name.startswith(PLUGIN_TRACK) else 3, 0, 0)


def _levels(row: Sequence[Span]) -> list[int]:
    open_ends: list[int] = []
    levels = []
    for span in row:
        while open_ends and open_ends[-1] <= span.start_ns:
            open_ends.pop()
        levels.append(len(open_ends))
        open_ends.append(span.end_ns or 0)
    return levels


def _head(title: str, end_ns: int, path: Sequence[CriticalStage]) -> tuple[list[Shape], float]:
    total_s = end_ns / _NS
    room = WIDTH - 2 * _MARGIN
    shapes: list[Shape] = []
    y = 32.0
    took = f": {format_seconds(total_s)}"
    name = shorten(title, 18, room - text_width(took, 18, bold=True), bold=True)
    shapes.append(Text(_MARGIN, y, name + took, 18, bold=True))
    lines = _wrapped("Critical path: " + describe(path, total_s / 100), 12.0, room)
    for text in lines:
        y += 18
        shapes.append(Text(_MARGIN, y + 4, text, 12, _CRITICAL))
    y += 28
    x = float(_MARGIN)
    for kind in KINDS:
        shapes.append(Rect(x, y - 11, 14, 14, COLOURS[kind], EDGES[kind]))
        shapes.append(Text(x + 20, y, _MEANINGS[kind], 12))
        x += 20 + text_width(_MEANINGS[kind], 12) + 18
    shapes.append(Rect(x, y - 11, 14, 14, "#ffffff", _CRITICAL, 2))
    shapes.append(Text(x + 20, y, "on the critical path", 12))
    return shapes, y


def _wrapped(text: str, size: float, width: float) -> list[str]:
    """Lines broken at spaces; what is too much for the picture ends in dots."""
    lines = [""]
    for word in text[:_MAX_PATH_CHARS].split(" "):
        longer = f"{lines[-1]} {word}".lstrip()
        if lines[-1] and text_width(longer, size) > width:
            lines.append(word)
        else:
            lines[-1] = longer
    if len(lines) > _MAX_PATH_LINES:
        lines = [*lines[: _MAX_PATH_LINES - 1], shorten(" ".join(lines[_MAX_PATH_LINES - 1 :]), size, width)]
    return [shorten(line, size, width) for line in lines]


def _stripes(rows: Sequence[_Row], scale: _Scale, names_width: float) -> list[Shape]:
    shapes: list[Shape] = []
    for number, row in enumerate(rows):
        if number % 2 == 0:
            shapes.append(Rect(_MARGIN - 6, row.y, WIDTH - 2 * _MARGIN + 12, row.height, _STRIPE))
        indent = 12 if WORKER_TRACK in row.name else 0
        name = row.name.partition(WORKER_TRACK)[2] if indent else row.name
        name = f"worker {name}" if indent else name
        base = row.y + _PAD / 2 + _BAR - 4
        colour = _FAINT if indent else INK
        shapes.append(Text(_MARGIN + indent, base, shorten(name, _NAME_SIZE, names_width), _NAME_SIZE, colour))
    shapes.append(Line(((scale.left, rows[0].y), (scale.left, rows[-1].y + rows[-1].height)), "#b9bfc7"))
    return shapes


def _axis(scale: _Scale, top: float, bottom: float) -> list[Shape]:
    step_ns = _tick_ns(scale.end_ns)
    shapes: list[Shape] = []
    unit_ns, unit = next(
        (ns, unit) for ns, unit in ((_NS, "s"), (1_000_000, "ms"), (1000, "us"), (1, "ns")) if step_ns >= ns / 10
    )
    digits = 1 if step_ns % unit_ns else 0
    for time_ns in range(0, scale.end_ns + 1, step_ns):
        x = scale.x(time_ns)
        shapes.append(Line(((x, top - 4), (x, bottom)), _GRID))
        text = f"{time_ns / unit_ns:.{digits}f} {unit}"
        at_edge = x + text_width(text, 11) / 2 > WIDTH - 4
        shapes.append(Text(x, top - 8, text, 11, _FAINT, "end" if at_edge else "middle"))
    return shapes


def _tick_ns(end_ns: int, most: int = 11) -> int:
    """A round step, at most ``most`` of which make the whole."""
    power = 1
    while True:
        for factor in (1, 2, 5):
            if factor * power * most >= end_ns:
                return factor * power
        power *= 10


def _bars(row: _Row, scale: _Scale, marked: set[int]) -> list[_Bar]:
    bars: list[_Bar] = []
    last: dict[int, _Bar] = {}  # by level
    for span, level in zip(row.spans, row.levels, strict=True):
        x, end = scale.x(span.start_ns), scale.x(span.end_ns or span.start_ns)
        critical = id(span) in marked
        before = last.get(level)
        if before is not None and end <= before.x + before.width and before.critical >= critical:
            continue  # it would be drawn into the same dot
        bar = _Bar(span, x, row.y + _PAD / 2 + level * _STEP + 1, max(end - x, _MIN_BAR), critical)
        last[level] = bar
        bars.append(bar)
    return bars


def _bar_shapes(bars: Sequence[_Bar]) -> list[Shape]:
    shapes: list[Shape] = []
    for bar in sorted(bars, key=lambda bar: bar.critical):
        kind = bar.span.kind
        stroke = _CRITICAL if bar.critical else EDGES[kind]
        stroke_width = 2.0 if bar.critical and bar.width > 5 else 1.0
        fill = stroke if bar.width <= 3 else COLOURS[kind]
        shapes.append(Rect(bar.x, bar.y, bar.width, _BAR, fill, stroke, stroke_width, _hint(bar.span)))
    return shapes


def _hint(span: Span) -> str:
    facts = [f"{format_seconds(span.seconds)} from {format_seconds(span.start_ns / _NS)} on", *_facts(span)]
    facts += [f"{key} {value}" for key, value in span.args.items() if key not in ("bytes", "error")]
    return f"{span.name} ({span.track}): {', '.join(facts)}"


def _facts(span: Span) -> list[str]:
    facts = [text for text in size_and_speed(span.nr_bytes, span.seconds) if text]
    return [*facts, *([f"failed: {span.args['error']}"] if "error" in span.args else [])]


def _connectors(critical: Sequence[Span], bars: Sequence[_Bar]) -> list[Shape]:
    """Red lines from the end of each link to the beginning of the next, where that is in another row."""
    where = {id(bar.span): bar for bar in bars}
    shapes: list[Shape] = []
    for first, second in pairwise(critical):
        one, two = where.get(id(first)), where.get(id(second))
        if one is None or two is None or one.y == two.y:
            continue
        start_y = one.y + (_BAR if two.y > one.y else 0)
        end_y = two.y + (0 if two.y > one.y else _BAR)
        x1, x2 = one.x + one.width - 1, two.x + 0.5
        middle = start_y + (3 if two.y > one.y else -3)
        shapes.append(Line(((x1, start_y), (x1, middle), (x2, middle), (x2, end_y)), _CRITICAL, 1.5))
    return shapes


def _labels(bars: Sequence[_Bar], scale: _Scale) -> list[Shape]:
    """Labels of one row: what is critical or long chooses first."""
    shapes: list[Shape] = []
    taken: dict[float, list[_Bar | _Label]] = {}
    for bar in bars:
        taken.setdefault(bar.y, []).append(bar)
    for bar in sorted(bars, key=lambda bar: (bar.width < 30, not bar.critical, -bar.width)):
        label = _place_label(bar, [other for other in taken[bar.y] if other is not bar], scale)
        if label is not None:
            taken[bar.y].append(label)
            base = bar.y + _BAR - 5
            shapes.append(Text(label.at, base, label.text, _LABEL_SIZE, INK, label.anchor, halo=not label.inside))
    return shapes


def _place_label(bar: _Bar, others: Sequence[_Bar | _Label], scale: _Scale) -> _Label | None:
    """A label in the bar, else right of it, else left of it, else cut in it, as far as ``others`` leave room."""
    facts = _facts(bar.span)
    name, pid = bar.span.name, bar.span.args.get("pid")
    named = name if pid is None else f"{name} for {pid}"
    texts = [" ".join([named, ", ".join(facts)]).rstrip(), " ".join([named, *facts[-1:]]), named, name]
    end = bar.x + bar.width
    # Bars are at least a dot wide, so neighbours may reach in at both ends.
    center = bar.x + bar.width / 2
    inner_left = max([bar.x, *(o.x + o.width for o in others if o.x < center)])
    inner_right = min([end, *(o.x for o in others if o.x >= center)])
    if text := label_that_fits(texts, _LABEL_SIZE, inner_right - inner_left - 2 * _GAP):
        return _Label(inner_left + _GAP, text, inside=True)
    if bar.width < _MIN_ALONE and any(o.x <= end + 1 and bar.x - 1 <= o.x + o.width for o in others):
        return None  # nobody could tell which dot it names
    if not any(o.x <= end < o.x + o.width for o in others):
        right = min([scale.right + 8, *(o.x for o in others if o.x >= end)])
        if text := label_that_fits(texts, _LABEL_SIZE, right - end - 2 * _GAP):
            return _Label(end + _GAP, text)
    if not any(o.x < bar.x <= o.x + o.width for o in others):
        left = max([scale.left, *(o.x + o.width for o in others if o.x < bar.x)])
        if text := label_that_fits(texts, _LABEL_SIZE, bar.x - left - 2 * _GAP):
            return _Label(bar.x - _GAP, text, anchor="end")
    if inner_right - inner_left >= _MIN_CUT:
        return _Label(inner_left + _GAP, shorten(name, _LABEL_SIZE, inner_right - inner_left - 2 * _GAP), inside=True)
    return None
