"""Values out of the member ``extension`` of gpurestore.json: of the kind that is expected, or an ImageError.

Nothing there is trusted. ``where`` says which value it is: the section's name, and the way to it below that.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Callable
from typing import Any, TypeVar

from gpurestore.errors import ImageError

T = TypeVar("T")
Reader = Callable[[object, str], T]

_MAX_TEXT = 1 << 16
_MAX_KEY_DIGITS = 10


def mapping(value: object, where: str) -> dict[str, Any]:
    """An object, whatever is in it."""
    if not isinstance(value, dict):
        raise _wrong(where, "not an object")
    return value


def sequence(value: object, where: str, most: int | None = None) -> list[Any]:
    """A list of at most ``most`` values, whatever they are."""
    if not isinstance(value, list) or (most is not None and len(value) > most):
        raise _wrong(where, "not a list" if most is None else "not a short list")
    return value


def number(value: object, where: str, low: int = 0, high: int = (1 << 64) - 1) -> int:
    """A whole number."""
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise _wrong(where, f"not a whole number from {low} to {high}")
    return value


def text(value: object, where: str) -> str:
    """A string that is not absurdly long."""
    if not isinstance(value, str) or len(value) > _MAX_TEXT:
        raise _wrong(where, "not a string")
    return value


def kernel_text(value: object, where: str) -> bytes:
    """A string as the kernel gave it: what is no text stands there in surrogates."""
    try:
        return text(value, where).encode(errors="surrogateescape")
    except UnicodeEncodeError as error:
        raise _wrong(where, "not a string of the kernel's") from error


def blob(value: object, where: str) -> bytes:
    """Bytes, which stand there in base64."""
    try:
        return base64.b64decode(text(value, where), validate=True)
    except (binascii.Error, ValueError) as error:
        raise _wrong(where, "not base64") from error


def by_number(read: Reader[T]) -> Reader[dict[int, T]]:
    """Reads an object whose keys are numbers (ids, pids) and whose values ``read`` takes."""

    def reader(value: object, where: str) -> dict[int, T]:
        return {_key(key, where): read(item, f"{where}.{key}") for key, item in mapping(value, where).items()}

    return reader


def _key(text: str, where: str) -> int:
    if not text.isascii() or not text.isdigit() or len(text) > _MAX_KEY_DIGITS:
        raise _wrong(where, f"{text[:40]!r} is not a number")
    return int(text)


def _wrong(where: str, what: str) -> ImageError:
    return ImageError(f"gpurestore.json: {where}: {what}")
