"""Small drawings: rectangles, lines and text, written as SVG by ourselves and as PNG through Pillow.

Text is measured by a table that is a little too wide for the usual sans-serif fonts, so that what fits by the
table fits on anybody's screen. The same shapes give the same bytes.
"""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from gpurestore.errors import GpurestoreError, UsageError

if TYPE_CHECKING:
    from PIL.ImageDraw import ImageDraw
    from PIL.ImageFont import FreeTypeFont, ImageFont

INK, PAPER = "#1b1f24", "#ffffff"
_FONTS = "'DejaVu Sans', Verdana, Helvetica, Arial, sans-serif"
_SCALE = 2  # pixels of the PNG per unit, for sharp text

# Widths of characters as parts of the font size.
_NARROW = frozenset(" !'(),-./:;I[\\]fijlrt|")
_WIDE = frozenset("#%&+<=>@MW^mw~")

Anchor = Literal["start", "middle", "end"]


@dataclass(frozen=True, slots=True)
class Rect:
    """A filled rectangle, with a border where ``stroke`` is a colour; ``hint`` appears under the mouse."""

    x: float
    y: float
    width: float
    height: float
    fill: str
    stroke: str | None = None
    stroke_width: float = 1.0
    hint: str = ""


@dataclass(frozen=True, slots=True)
class Line:
    """A line through ``points``."""

    points: tuple[tuple[float, float], ...]
    colour: str
    width: float = 1.0


@dataclass(frozen=True, slots=True)
class Text:
    """One line of text; ``y`` is its base line. A ``halo`` keeps it readable on lines."""

    x: float
    y: float
    text: str
    size: float = 12.0
    colour: str = INK
    anchor: Anchor = "start"
    bold: bool = False
    halo: bool = False


Shape = Rect | Line | Text


@dataclass(frozen=True, slots=True)
class Drawing:
    """Shapes, the later ones above the earlier ones."""

    width: int
    height: int
    shapes: tuple[Shape, ...]


def text_width(text: str, size: float, *, bold: bool = False) -> float:
    """How wide a text is at most."""
    parts = sum(map(_char_width, text))
    return parts * size * (1.1 if bold else 1.0)


def _char_width(char: str) -> float:
    if char in _NARROW:
        return 0.42
    if char in _WIDE or ord(char) > 0x2FF:
        return 1.02
    return 0.79 if char.isupper() else 0.66


def shorten(text: str, size: float, width: float, *, bold: bool = False) -> str:
    """``text``, cut so that it fits."""
    room = width - text_width("...", size, bold=bold)
    used, kept = 0.0, 0
    for number, char in enumerate(text, 1):
        used += text_width(char, size, bold=bold)
        if used <= room:
            kept = number
        elif used > width:
            return text[:kept] + "..." if kept else ""
    return text


def printable(text: str) -> str:
    """``text`` without what neither XML nor a line of text can hold."""
    return "".join(char if char.isprintable() else "?" for char in text)


# ---- SVG


def to_svg(drawing: Drawing, *, standalone: bool = True) -> str:
    """The drawing as an SVG document, or as an element for an HTML page."""
    size = f'viewBox="0 0 {drawing.width} {drawing.height}"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" {size} width="{drawing.width}" height="{drawing.height}"'
    lines = [f'{head} font-family="{_FONTS}">', f'<rect width="100%" height="100%" fill="{PAPER}"/>']
    lines += map(_svg_shape, drawing.shapes)
    lines.append("</svg>\n")
    return ('<?xml version="1.0" encoding="UTF-8"?>\n' if standalone else "") + "\n".join(lines)


def _svg_shape(shape: Shape) -> str:
    match shape:
        case Rect():
            return _svg_rect(shape)
        case Line():
            points = " ".join(f"{_n(x)},{_n(y)}" for x, y in shape.points)
            return f'<polyline points="{points}" fill="none" stroke="{shape.colour}" stroke-width="{_n(shape.width)}"/>'
        case Text():
            return _svg_text(shape)


def _svg_rect(rect: Rect) -> str:
    place = f'x="{_n(rect.x)}" y="{_n(rect.y)}" width="{_n(rect.width)}" height="{_n(rect.height)}"'
    stroke = f' stroke="{rect.stroke}" stroke-width="{_n(rect.stroke_width)}"' if rect.stroke else ""
    head = f'<rect {place} fill="{rect.fill}"{stroke}'
    return f"{head}><title>{escape(printable(rect.hint))}</title></rect>" if rect.hint else f"{head}/>"


def _svg_text(text: Text) -> str:
    extra = "" if text.anchor == "start" else f' text-anchor="{text.anchor}"'
    extra += ' font-weight="bold"' if text.bold else ""
    extra += f' stroke="{PAPER}" stroke-width="3" paint-order="stroke"' if text.halo else ""
    place = f'x="{_n(text.x)}" y="{_n(text.y)}" font-size="{_n(text.size)}" fill="{text.colour}"'
    return f"<text {place}{extra}>{escape(printable(text.text))}</text>"


def _n(value: float) -> str:
    return f"{value:.2f}".rstrip("0").rstrip(".")


# ---- PNG


def to_png(drawing: Drawing) -> bytes:
    """The drawing as a PNG file, twice as fine as its units. Raises UsageError where Pillow is missing."""
    try:
        from PIL import Image, ImageDraw, features
    except ImportError as error:
        raise UsageError(
            "a PNG needs the package Pillow: pip install 'gpurestore[png]', or write .svg or .html instead"
        ) from error
    if not features.check("freetype2"):
        raise UsageError("this Pillow was built without FreeType and cannot write text: write .svg or .html instead")
    image = Image.new("RGB", (drawing.width * _SCALE, drawing.height * _SCALE), PAPER)
    canvas = ImageDraw.Draw(image)
    for shape in drawing.shapes:
        _png_shape(canvas, shape)
    out = io.BytesIO()
    image.save(out, "PNG", optimize=True)
    return out.getvalue()


def _png_shape(canvas: ImageDraw, shape: Shape) -> None:
    match shape:
        case Rect():
            left, top = round(shape.x * _SCALE), round(shape.y * _SCALE)
            right = max(left, round((shape.x + shape.width) * _SCALE) - 1)
            bottom = max(top, round((shape.y + shape.height) * _SCALE) - 1)
            width = round(shape.stroke_width * _SCALE) if shape.stroke else 0
            canvas.rectangle((left, top, right, bottom), shape.fill, shape.stroke, width)
        case Line():
            points = [(round(x * _SCALE), round(y * _SCALE)) for x, y in shape.points]
            canvas.line(points, shape.colour, max(1, round(shape.width * _SCALE)), joint="curve")
        case Text():
            _png_text(canvas, shape)


def _png_text(canvas: ImageDraw, text: Text) -> None:
    anchor = {"start": "ls", "middle": "ms", "end": "rs"}[text.anchor]
    place = (text.x * _SCALE, text.y * _SCALE)
    words, font = printable(text.text), _font(text.size)
    if text.halo:
        canvas.text(place, words, PAPER, font, anchor, stroke_width=2 * _SCALE, stroke_fill=PAPER)
    # The one font that Pillow brings has no bold face: a rim of its own colour does.
    canvas.text(place, words, text.colour, font, anchor, stroke_width=0.6 if text.bold else 0, stroke_fill=text.colour)


@lru_cache(maxsize=16)
def _font(size: float) -> FreeTypeFont | ImageFont:
    from PIL import ImageFont

    return ImageFont.load_default(size * _SCALE)


def label_that_fits(labels: Sequence[str], size: float, width: float) -> str:
    """The first of ``labels``, longest first, that is no wider than ``width``; empty if none."""
    return next((label for label in labels if text_width(label, size) <= width), "")


# ---- files


def write_picture(target: Path, data: bytes) -> None:
    """Write a picture; the file is whole or as it was."""
    partial = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        partial.write_bytes(data)
        partial.replace(target)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise GpurestoreError(f"cannot write the picture to {target}: {error.strerror}") from error
