"""Facts about files that CRIU's messages have no field for. They stand under ``files`` in gpurestore.json.

Nothing here is trusted: :meth:`FileFacts.from_json` takes any value and raises ImageError on a wrong one.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from gpurestore.tasks import jsonvalues

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
        facts = cls()
        for name, part in jsonvalues.mapping({} if value is None else value, "files").items():
            if name in _READERS:
                setattr(facts, name, _READERS[name](part, f"files.{name}"))
        return facts


def _id(value: object, where: str) -> int:
    return jsonvalues.number(value, where, high=_ID_MAX)


def _ids(value: object, where: str) -> list[int]:
    return [_id(item, where) for item in jsonvalues.sequence(value, where)]


def _device(value: object, where: str) -> int:
    return jsonvalues.number(value, where, high=(1 << 63) - 1)


def _owner(value: object, where: str) -> PipeOwner:
    parts = jsonvalues.mapping(value, where)
    return PipeOwner(*(_id(parts.get(name), f"{where}.{name}") for name in ("uid", "gid", "mode")))


_READERS: dict[str, jsonvalues.Reader[Any]] = {
    "semaphores": _ids,
    "unix_sockets": _ids,
    "rdev": jsonvalues.by_number(_device),
    "tmpfs": jsonvalues.by_number(_id),
    "pipes": jsonvalues.by_number(_owner),
    "packets": jsonvalues.by_number(_ids),
}
