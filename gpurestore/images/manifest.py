"""``gpurestore.json``: who made a dump, where, with what, and the size and checksum of every file in it.

It is one JSON object. A reader takes unknown members as absent, so adding one needs no new format; a change that an old
reader would get wrong does. ``seal`` is a checksum of all the rest, so that damage to the manifest shows too. Format 2
has CRC-64 checksums and stamps of pages images; format 1 has neither.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, NoReturn, TypeVar

import xxhash

from gpurestore.errors import ImageError
from gpurestore.images.hashing import CHUNK_BYTES, FileRecord, Stamp

MANIFEST_NAME = "gpurestore.json"
FORMAT = 2
# A manifest is small: about 100 bytes per file. More than this is not one.
MAX_MANIFEST_BYTES = 64 << 20

_HEX_DIGITS = frozenset("0123456789abcdef")
_T = TypeVar("_T")


class PluginRecord(NamedTuple):
    """A device plugin that the dump used."""

    name: str
    version: str


class Manifest(NamedTuple):
    """The content of ``gpurestore.json``. ``extension`` holds facts that CRIU's messages have no field for."""

    tool_version: str
    created: str  # UTC, ISO 8601
    hostname: str
    kernel: str
    machine: str
    root_pid: int
    files: Mapping[str, FileRecord]
    cpu: Mapping[str, Any]
    plugins: tuple[PluginRecord, ...]
    extension: Mapping[str, Any]
    machine_id: str = ""  # of the machine on which stamps of files count (gpurestore/images/stamps.py)

    @property
    def total_bytes(self) -> int:
        """Of all image files together."""
        return sum(record.bytes for record in self.files.values())


def is_plain_name(name: str) -> bool:
    """Whether ``name`` names a file in a folder and nothing else."""
    return (
        0 < len(name) <= 255 and "/" not in name and "\0" not in name and name not in {".", ".."} and name.isprintable()
    )


def check_plain_json(value: object, where: str = "extension") -> None:
    """Refuse what would not come back from JSON as it went in. Raises TypeError: a fault of the caller."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            if not isinstance(key, str):
                raise TypeError(f"{where}: key {key!r} is not a string")
            check_plain_json(item, f"{where}.{key}")
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            check_plain_json(item, f"{where}[{index}]")
    elif not (value is None or isinstance(value, str | int) or (isinstance(value, float) and math.isfinite(value))):
        raise TypeError(f"{where}: {type(value).__name__} does not fit into JSON")


def _seal(document: Mapping[str, Any]) -> str:
    """Of the members, not of the bytes: pretty-printing does no harm."""
    rest = {key: value for key, value in document.items() if key != "seal"}
    text = json.dumps(rest, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
    return str(xxhash.xxh3_128_hexdigest(text.encode()))


def encode(manifest: Manifest) -> bytes:
    """The file's bytes; the same manifest always gives the same."""
    check_plain_json(manifest.extension)
    check_plain_json(manifest.cpu, "cpu")
    document: dict[str, Any] = {
        "format": FORMAT,
        "tool": "gpurestore",
        "tool_version": manifest.tool_version,
        "created": manifest.created,
        "hostname": manifest.hostname,
        "kernel": manifest.kernel,
        "machine": manifest.machine,
        "root_pid": manifest.root_pid,
        "cpu": dict(manifest.cpu),
        "plugins": [{"name": plugin.name, "version": plugin.version} for plugin in manifest.plugins],
        "chunk_bytes": CHUNK_BYTES,
        "machine_id": manifest.machine_id,
        "files": {name: _encode_file(record) for name, record in sorted(manifest.files.items())},
        "extension": dict(manifest.extension),
    }
    document["seal"] = _seal(document)
    return json.dumps(document, indent=1, allow_nan=False).encode() + b"\n"


def _encode_file(record: FileRecord) -> dict[str, Any]:
    value: dict[str, Any] = {"bytes": record.bytes}
    if record.xxh3_128:
        value["xxh3_128"] = record.xxh3_128
    else:
        value["crc64_nvme"] = record.crc64_nvme
    if record.stamp is not None:
        value["stamp"] = record.stamp._asdict()
    return value


def _bad(why: str) -> NoReturn:
    raise ImageError(f"{MANIFEST_NAME}: damaged: {why}")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        _bad("a member stands there twice")
    return result


def decode(data: bytes) -> Manifest:
    """Read a manifest. Raises ImageError unless every member has its type and the seal fits."""
    if len(data) > MAX_MANIFEST_BYTES:
        _bad(f"{len(data)} bytes are too many")
    try:
        document = json.loads(data.decode("utf-8"), object_pairs_hook=_unique, parse_constant=lambda text: _bad(text))
        sealed = isinstance(document, dict) and document.get("seal") == _seal(document)
    except (ValueError, RecursionError) as error:
        # ValueError covers bytes that are no UTF-8, text that is no JSON, and numbers with absurdly many digits.
        raise ImageError(f"{MANIFEST_NAME}: damaged: {error}") from error
    if not isinstance(document, dict):
        _bad("not an object")
    _check_format(document)
    if not sealed:
        _bad("its seal does not fit its content")
    if _get(document, "chunk_bytes", int) != CHUNK_BYTES:
        _bad("chunk_bytes is not that of any format")
    return Manifest(
        tool_version=_get(document, "tool_version", str),
        created=_get(document, "created", str),
        hostname=_get(document, "hostname", str),
        kernel=_get(document, "kernel", str),
        machine=_get(document, "machine", str),
        root_pid=_get(document, "root_pid", int),
        files=_files(_get(document, "files", dict)),
        machine_id=_get(document, "machine_id", str) if document["format"] > 1 else "",
        cpu=_get(document, "cpu", dict),
        plugins=_plugins(_get(document, "plugins", list)),
        extension=_get(document, "extension", dict),
    )


def _check_format(document: Mapping[str, Any]) -> None:
    version = _get(document, "format", int)
    if version > FORMAT:
        tool = document.get("tool_version")
        raise ImageError(
            f"{MANIFEST_NAME}: format {version} is newer than {FORMAT}, the newest that this gpurestore reads; "
            f"restore with version {tool if isinstance(tool, str) else 'that made it'} or later"
        )
    if version < 1:
        _bad(f"format {version}")


def _get(document: Mapping[str, Any], key: str, kind: type[_T]) -> _T:
    value = document.get(key)
    if not isinstance(value, kind) or (kind is int and not _is_count(value)):
        _bad(f"member {key!r} is not a proper {kind.__name__}")
    return value


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _files(document: Mapping[str, Any]) -> dict[str, FileRecord]:
    files = {}
    for name, value in document.items():
        if not is_plain_name(name) or name == MANIFEST_NAME or not isinstance(value, dict):
            _bad(f"{name[:64]!r} is no name of an image")
        files[name] = _file(name, value)
    return files


def _file(name: str, value: Mapping[str, Any]) -> FileRecord:
    key, digits = ("crc64_nvme", 16) if "crc64_nvme" in value and "xxh3_128" not in value else ("xxh3_128", 32)
    checksum = _get(value, key, str)
    if len(checksum) != digits or not _HEX_DIGITS.issuperset(checksum):
        _bad(f"checksum of {name}")
    stamp = None
    if "stamp" in value:
        numbers = _get(value, "stamp", dict)
        stamp = Stamp(_get(numbers, "device", int), _get(numbers, "inode", int), _get(numbers, "changed_ns", int))
    size = _get(value, "bytes", int)
    return FileRecord(size, checksum, stamp=stamp) if digits == 32 else FileRecord(size, "", checksum, stamp)


def _plugins(values: Sequence[Any]) -> tuple[PluginRecord, ...]:
    plugins = []
    for value in values:
        if not isinstance(value, dict):
            _bad("a plugin is not an object")
        plugins.append(PluginRecord(_get(value, "name", str), _get(value, "version", str)))
    return tuple(plugins)
