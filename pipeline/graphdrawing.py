"""The picture of a graph of stages: a row per task and plugin, a column per step, lines for what needs what."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from gpurestore.errors import UsageError
from gpurestore.pipeline.drawing import INK, Drawing, Line, Rect, Shape, Text, text_width, to_png, to_svg, write_picture
from gpurestore.pipeline.graph import Graph, Node, to_dot
from gpurestore.pipeline.timeline import COLOURS, EDGES, place_of_track
from gpurestore.pipeline.trace import kind_of
from gpurestore.units import format_bytes

FORMATS = ("svg", "png", "dot")
_MARGIN, _HEAD, _BOX, _STEP, _GUTTER, _PAD = 16.0, 48.0, 22.0, 32.0, 26.0, 8.0
_SIZE, _NAME_SIZE = 11.0, 12.0
_LINE, _STRIPE = "#8a929c", "#f6f7f9"


def draw_file(graph: Graph, target: Path, title: str) -> None:
    """Draw ``graph`` into ``target``, whose ending says how (.dot: for Graphviz). The file is whole or as it was."""
    match target.suffix.lower():
        case ".svg":
            data = to_svg(draw(graph, title)).encode()
        case ".png":
            data = to_png(draw(graph, title))
        case ".dot":
            data = to_dot(graph).encode()
        case _:
            raise UsageError(f"{target}: the name must end in .svg, .png or .dot, to say what to draw")
    write_picture(target, data)


@dataclass(frozen=True, slots=True)
class _Place:
    x: float
    y: float
    width: float

    @property
    def middle(self) -> float:
        return self.y + _BOX / 2


def draw(graph: Graph, title: str) -> Drawing:
    """Lay out everything. A stage stands right of all that it needs."""
    columns = _columns(graph)
    rows = _rows(graph, columns)
    names_width = max((text_width(track, _NAME_SIZE) for track, _, _ in rows), default=0.0)
    lefts, widths = _column_places(graph, columns, _MARGIN + names_width + 20)
    places = {}
    for _, top, levels in rows:
        for node, level in levels.items():
            places[node] = _Place(lefts[columns[node]], top + _PAD + level * _STEP, widths[columns[node]])
    width = lefts[-1] + widths[-1] + _MARGIN if lefts else 200.0
    last = rows[-1] if rows else ("", _HEAD, {})
    height = last[1] + _height(last[2]) + _MARGIN
    shapes: list[Shape] = [Text(_MARGIN, 30, title, 18, bold=True)]
    for number, (track, top, levels) in enumerate(rows):
        if number % 2 == 0:
            shapes.append(Rect(_MARGIN - 6, top, width - 2 * _MARGIN + 12, _height(levels), _STRIPE))
        shapes.append(Text(_MARGIN, top + _PAD + _BOX / 2 + 4, track, _NAME_SIZE))
    for node, needed in graph.after.items():
        for other in needed:
            shapes += _arrow(places[other], places[node])
    for node, place in places.items():
        shapes += _box(graph, node, place)
    return Drawing(math.ceil(width), math.ceil(height), tuple(shapes))


def _columns(graph: Graph) -> dict[Node, int]:
    columns: dict[Node, int] = {}
    for node, needed in graph.after.items():
        columns[node] = max((columns[other] + 1 for other in needed), default=0)
    return columns


def _rows(graph: Graph, columns: Mapping[Node, int]) -> list[tuple[str, float, dict[Node, int]]]:
    """Name, top, and the level of each stage of every row: stages of one column lie below one another."""
    tracks: dict[str, dict[Node, int]] = {}
    used: dict[tuple[str, int], int] = {}
    for node in graph.after:
        at = (node.track, columns[node])
        used[at] = used.get(at, -1) + 1
        tracks.setdefault(node.track, {})[node] = used[at]
    rows = []
    top = _HEAD
    for track in sorted(tracks, key=place_of_track):
        rows.append((track, top, tracks[track]))
        top += _height(tracks[track])
    return rows


def _height(levels: Mapping[Node, int]) -> float:
    return 2 * _PAD + _BOX + max(levels.values(), default=0) * _STEP


def _label(graph: Graph, node: Node) -> str:
    if node.plugin is not None and node.pid is not None:
        return f"{node.name} {node.pid}"
    return f"{node.name} {format_bytes(graph.weights[node])}" if node in graph.weights else node.name


def _column_places(graph: Graph, columns: Mapping[Node, int], left: float) -> tuple[list[float], list[float]]:
    widths = [0.0] * (max(columns.values(), default=-1) + 1)
    for node, column in columns.items():
        widths[column] = max(widths[column], text_width(_label(graph, node), _SIZE) + 14)
    lefts = [left + sum(widths[:column]) + _GUTTER * column for column in range(len(widths))]
    return lefts, widths


def _box(graph: Graph, node: Node, place: _Place) -> Sequence[Shape]:
    kind = kind_of(node.name, node.track)
    hint = "; ".join([str(node), *(f"after {other}" for other in graph.after[node])])
    return [
        Rect(place.x, place.y, place.width, _BOX, COLOURS[kind], EDGES[kind], 1.0, hint),
        Text(place.x + place.width / 2, place.y + _BOX - 7, _label(graph, node), _SIZE, INK, "middle"),
    ]


def _arrow(first: _Place, second: _Place) -> Sequence[Shape]:
    """Along the row of the one to the gutter before the other, there up or down, and in."""
    start, end = first.x + first.width, second.x
    turn = end - _GUTTER / 2
    points = [(start, first.middle), (turn, first.middle), (turn, second.middle), (end, second.middle)]
    head = ((end - 5, second.middle - 3), (end, second.middle), (end - 5, second.middle + 3))
    return [Line(tuple(points), _LINE), Line(head, _LINE, 1.5)]
