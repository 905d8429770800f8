"""Records of an image file, to bytes and back. Pure; nothing that comes in is trusted."""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from typing import Any

from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import DecodeError, Message

from gpurestore.errors import ImageError
from gpurestore.images.magic import PAYLOAD_FILE, PAYLOAD_RECORD, ImageKind

_U32 = struct.Struct("<I")

Bytes = bytes | bytearray | memoryview


def damaged(name: str, offset: int, why: str) -> ImageError:
    """The error for bytes that cannot be what they should be."""
    return ImageError(f"{name}: damaged at byte {offset}: {why}")


def encode_head(kind: ImageKind) -> bytes:
    """The magic numbers that such a file starts with."""
    return b"".join(_U32.pack(magic) for magic in kind.first_magics)


def _missing_fields(message: Any) -> str:
    return ", ".join(message.FindInitializationErrors()[:3])


def encode_record(message: Message) -> bytes:
    """One record. Raises ValueError when a required field is missing: a fault of the caller, not of an image."""
    if not message.IsInitialized():
        raise ValueError(f"{message.DESCRIPTOR.name} lacks {_missing_fields(message)}")
    body = message.SerializeToString()
    return _U32.pack(len(body)) + body


def encode_image(kind: ImageKind, messages: Sequence[Message], payloads: Sequence[Bytes] = ()) -> bytes:
    """A whole image file. ``payloads`` belong to the records of kinds that carry raw bytes, one for each."""
    if payloads and len(payloads) != len(messages):
        raise ValueError(f"{len(payloads)} payloads for {len(messages)} records")
    parts: list[Bytes] = [encode_head(kind)]
    for index, message in enumerate(messages):
        expected = kind.head if kind.head is not None and index == 0 else kind.message
        if not isinstance(message, expected):
            raise TypeError(f"{kind.name}: record {index} is a {type(message).__name__}, not a {expected.__name__}")
        parts.append(encode_record(message))
        if payloads:
            parts.append(payloads[index])
    return b"".join(parts)


def check_head(kind: ImageKind, data: Bytes, name: str) -> int:
    """Check the magic numbers and return where the records start."""
    offset = 0
    for expected in kind.first_magics:
        if len(data) < offset + 4:
            raise damaged(name, offset, f"the file ends after {len(data)} bytes, inside its magic")
        (found,) = _U32.unpack_from(data, offset)
        if found != expected:
            raise damaged(name, offset, f"magic {found:#010x} where a {kind.name} image has {expected:#010x}")
        offset += 4
    return offset


def decode_record(message_type: type[Message], data: memoryview, offset: int, name: str) -> tuple[Any, int]:
    """The record at ``offset`` and where the next one starts."""
    if len(data) - offset < 4:
        raise damaged(name, offset, f"{len(data) - offset} bytes are left where a record's size should stand")
    (size,) = _U32.unpack_from(data, offset)
    start = offset + 4
    if size > len(data) - start:
        raise damaged(name, offset, f"a record of {size} bytes, but the file ends after {len(data) - start}")
    message = message_type()
    try:
        message.ParseFromString(bytes(data[start : start + size]))
    except (DecodeError, UnicodeDecodeError) as error:
        raise damaged(name, start, f"not a {message_type.DESCRIPTOR.name}") from error
    if not message.IsInitialized():
        raise damaged(name, start, f"{message_type.DESCRIPTOR.name} lacks {_missing_fields(message)}")
    if has_strings(message_type.DESCRIPTOR):
        check_strings(message, name, start)
    return message, start + size


def decode_records(kind: ImageKind, data: Bytes, name: str) -> Iterator[tuple[Any, memoryview]]:
    """Every record with its payload (empty for kinds without). Raises ImageError at the first that is not whole."""
    view = memoryview(data)
    offset = check_head(kind, view, name)
    first = True
    while offset < len(view):
        message_type = kind.head if first and kind.head is not None else kind.message
        message, offset = decode_record(message_type, view, offset, name)
        payload = view[:0]
        if kind.payload == PAYLOAD_RECORD:
            if message.bytes > len(view) - offset:
                raise damaged(name, offset, f"{message.bytes} bytes of data expected, {len(view) - offset} are left")
            payload = view[offset : offset + message.bytes]
        elif kind.payload == PAYLOAD_FILE:
            payload = view[offset:]
        offset += len(payload)
        first = False
        yield message, payload


def decode_image(kind: ImageKind, data: Bytes, name: str) -> list[Any]:
    """The messages of an image file."""
    return [message for message, _ in decode_records(kind, data, name)]


@cache
def has_strings(descriptor: Descriptor) -> bool:
    """Whether a string can stand anywhere in such a message."""
    seen = set()
    todo = [descriptor]
    while todo:
        current = todo.pop()
        if current.full_name in seen:
            continue
        seen.add(current.full_name)
        if any(field.type == FieldDescriptor.TYPE_STRING for field in current.fields):
            return True
        todo.extend(field.message_type for field in current.fields if field.message_type is not None)
    return False


def check_strings(message: Message, name: str, offset: int) -> None:
    """protobuf hands out bytes for a string of proto2 that is not UTF-8; refuse that here, once and for all."""
    for field in message.DESCRIPTOR.fields:
        if field.type == FieldDescriptor.TYPE_STRING:
            value = getattr(message, field.name)
            for text in (value,) if isinstance(value, str | bytes) else value:
                if isinstance(text, bytes) or "\0" in text:
                    where = f"{message.DESCRIPTOR.name}.{field.name}"
                    raise damaged(name, offset, f"{where} is not text: {text[:40]!r}")
        elif field.message_type is not None and has_strings(field.message_type):
            for nested in _nested(message, field):
                check_strings(nested, name, offset)


def _nested(message: Message, field: Any) -> Iterable[Message]:
    value: Message | Iterable[Message] = getattr(message, field.name)
    if isinstance(value, Message):
        return (value,) if message.HasField(field.name) else ()
    return value
