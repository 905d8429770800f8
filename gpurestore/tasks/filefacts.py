"""Facts about files that CRIU's messages have no field for. They stand under ``files`` in gpurestore.json.

Nothing here is trusted: :meth:`FileFacts.from_json` takes any value and raises ImageError on a wrong one.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from gpurestore.errors import ImageError

_ID_MAX = (1 << 32) - 1


@dataclass(frozen=True, slots=True)
class PipeOwner:
    """Owner and mode of a pipe's inode, which decide who may open /proc/PID/fd/N."""

    uid: int
    gid: int
    mode: int


@dataclass(slots=True)
class FileFacts:
    """All such facts. File ids and pipe ids are keys."""

    semaphores: list[int] = field(default_factory=list)  # eventfds made with EFD_SEMAPHORE
    rdev: dict[int, int] = field(default_factory=dict)  # device number behind a device node
    tmpfs: dict[int, int] = field(default_factory=dict)  # ghost image with the content of a file on tmpfs
    pipes: dict[int, PipeOwner] = field(default_factory=dict)
    packets: dict[int, list[int]] = field(default_factory=dict)  # lengths of the packets in a pipe
    unix_sockets: list[int] = field(default_factory=list)  # files that a plugin claimed as UNIX sockets

    def to_json(self) -> dict[str, Any]:
        """The value for gpurestore.json; empty parts are left out."""
        return {
            name: value if isinstance(value, list) else {str(key): item for key, item in value.items()}
            for name, value in asdict(self).items()
            if value
        }

    @classmethod
    def from_json(cls, value: object) -> FileFacts:
        """The facts of an extension section (None: images of CRIU)."""
        parts = _object({} if value is None else value)
        return cls(
            semaphores=[_number(item) for item in _list(parts.get("semaphores", []))],
            unix_sockets=[_number(item) for item in _list(parts.get("unix_sockets", []))],
            rdev=_numbers(parts.get("rdev", {}), (1 << 63) - 1),
            tmpfs=_numbers(parts.get("tmpfs", {}), _ID_MAX),
            pipes={_key(key): _owner(item) for key, item in _object(parts.get("pipes", {})).items()},
            packets={
                _key(key): [_number(length) for length in _list(item)]
                for key, item in _object(parts.get("packets", {})).items()
            },
        )


def _owner(value: object) -> PipeOwner:
    parts = _object(value)
    return PipeOwner(*(_number(parts.get(name)) for name in ("uid", "gid", "mode")))


def _numbers(value: object, limit: int) -> dict[int, int]:
    return {_key(key): _number(item, limit) for key, item in _object(value).items()}


def _object(value: object) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise _wrong(value)
    return value


def _list(value: object) -> list[Any]:
    if not isinstance(value, list):
        raise _wrong(value)
    return value


def _key(value: str) -> int:
    if not value.isascii() or not value.isdigit() or len(value) > 10:
        raise _wrong(value)
    return int(value)


def _number(value: object, limit: int = _ID_MAX) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= limit:
        raise _wrong(value)
    return value


def _wrong(value: object) -> ImageError:
    return ImageError(f"gpurestore.json: {str(value)[:40]!r} stands in the section about files, where it cannot be")
