"""Batches of system calls: the data that a restore plan is made of.

A planner returns a list of :class:`Call`. :func:`encode` lays the list out in the memory that the agent reads
(``cext/gr_agent.h``), with every pointer already absolute; :func:`decode` reads results and output buffers back.
Everything here is pure, so that plans can be tested, printed and compared without privileges.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from gpurestore.syscalls import NR

_HEADER = struct.Struct("=IIiI")  # nr_calls, next, status, reserved
_CALL = struct.Struct("=Q6QIIqq")  # nr, args, refs, expect, want, result
HEADER_BYTES = _HEADER.size
CALL_BYTES = _CALL.size
_CALL_WORDS = CALL_BYTES // 8
_ALIGN = 16
_U64 = (1 << 64) - 1

EXPECT_OK, EXPECT_EXACT, EXPECT_ANY = 0, 1, 2


class Data(NamedTuple):
    """A pointer to a copy of ``payload``. ``pointers`` are (offset, target): 8 bytes there point to another buffer."""

    payload: bytes
    pointers: tuple[tuple[int, Buffer], ...] = ()


class Out(NamedTuple):
    """A pointer to ``size`` zeroed bytes whose content after the call comes back in :class:`CallResult`."""

    size: int


class InOut(NamedTuple):
    """A pointer to a copy of ``payload`` whose content after the call comes back in :class:`CallResult`."""

    payload: bytes


@dataclass(frozen=True, slots=True)
class Ref:
    """The result of an earlier call of the same batch, by its index."""

    index: int


Buffer = Data | Out | InOut
Arg = int | Buffer | Ref
_PLAIN = (int, Ref)  # what needs no room behind the calls


class Call(NamedTuple):
    """One system call for the agent.

    ``what`` says in words what it is for: it is shown by ``--dry-run`` and stands in front of the errno on failure.
    By default a result below zero ends the batch; ``want`` demands one exact result, ``may_fail`` accepts any.
    """

    nr: NR
    args: tuple[Arg, ...] = ()
    what: str = ""
    want: int | None = None
    may_fail: bool = False

    def __str__(self) -> str:
        return f"{self.what or self.nr.name}: {self.nr.name}({', '.join(map(_show, self.args))})"


class CallResult(NamedTuple):
    """``result`` is the raw return value (negative errno on failure), ``outs`` the Out/InOut buffers in order."""

    result: int
    outs: tuple[bytes, ...]


class BatchState(NamedTuple):
    """What the agent left behind: ``failed`` is the index of the call that ended the batch early, or None."""

    results: tuple[CallResult, ...]
    failed: int | None


def _show(arg: Arg) -> str:
    match arg:
        case Ref(index):
            return f"#{index}"
        case Data(payload):
            return f"&{payload[:24].hex()}{'..' if len(payload) > 24 else ''}"
        case Out(size):
            return f"&out[{size}]"
        case InOut(payload):
            return f"&inout[{len(payload)}]"
    return hex(arg) if abs(arg) > 4096 else str(arg)


class _Layout:
    """Gives every buffer of a batch its place behind the calls, in one deterministic walk used by encode and decode."""

    def __init__(self, nr_calls: int) -> None:
        self.end = HEADER_BYTES + CALL_BYTES * nr_calls
        self.end += -self.end % _ALIGN

    def place(self, buffer: Buffer) -> int:
        """The offset of ``buffer``, behind which comes what it points to."""
        offset = self.end
        size = buffer.size if isinstance(buffer, Out) else len(buffer.payload)
        self.end = offset + size + -size % _ALIGN
        return offset


def encode(calls: Sequence[Call], base: int, capacity_bytes: int) -> bytes:
    """The agent's batch for ``calls`` when it is to lie at address ``base``.

    Raises ValueError when it does not fit into ``capacity_bytes`` or a Ref points forward.
    """
    layout = _Layout(len(calls))
    words: list[int] = []
    payloads: list[tuple[int, bytes]] = []
    for index, (nr, given, _, want, may_fail) in enumerate(calls):
        refs = 0
        args = [0, 0, 0, 0, 0, 0]
        for i, arg in enumerate(given):
            if isinstance(arg, int):
                args[i] = arg & _U64
            elif isinstance(arg, Ref):
                if not 0 <= arg.index < index:
                    raise ValueError(f"call {index} refers to call {arg.index}, which is not before it")
                refs |= 1 << i
                args[i] = arg.index
            else:
                args[i] = base + _lay_out(arg, base, layout, payloads)
        if want is None:
            words += (nr, *args, refs | (EXPECT_ANY if may_fail else EXPECT_OK) << 32, 0, 0)
        else:
            words += (nr, *args, refs | (EXPECT_ANY if may_fail else EXPECT_EXACT) << 32, want & _U64, 0)
    if layout.end > capacity_bytes:
        raise ValueError(f"batch of {layout.end} bytes does not fit into {capacity_bytes}")
    blob = bytearray(layout.end)
    _HEADER.pack_into(blob, 0, len(calls), 0, 0, 0)
    struct.pack_into(f"={len(words)}Q", blob, HEADER_BYTES, *words)
    for offset, payload in payloads:
        blob[offset : offset + len(payload)] = payload
    return bytes(blob)


def _lay_out(buffer: Buffer, base: int, layout: _Layout, payloads: list[tuple[int, bytes]]) -> int:
    """Place a buffer and what it points to; its content, with pointers set, is added to ``payloads``."""
    offset = layout.place(buffer)
    if isinstance(buffer, Out):
        return offset
    if not isinstance(buffer, Data) or not buffer.pointers:
        payloads.append((offset, buffer.payload))
        return offset
    content = bytearray(buffer.payload)
    for where, target in buffer.pointers:
        struct.pack_into("=Q", content, where, base + _lay_out(target, base, layout, payloads))
    payloads.append((offset, bytes(content)))
    return offset


def is_whole(raw: bytes | memoryview) -> bool:
    """Whether a batch ran to its end, every call with a result that was expected; ``raw`` is as for :func:`decode`."""
    return not _HEADER.unpack_from(raw, 0)[2]


def decode(calls: Sequence[Call], raw: bytes | memoryview) -> BatchState:
    """Results of a batch that ran; ``raw`` is its memory after the run, laid out by :func:`encode`."""
    nr_calls, next_index, status, _ = _HEADER.unpack_from(raw, 0)
    if nr_calls != len(calls):
        raise ValueError(f"batch of {nr_calls} calls read back for {len(calls)}")
    layout = _Layout(len(calls))
    values = struct.unpack_from(f"={len(calls) * _CALL_WORDS}q", raw, HEADER_BYTES)[_CALL_WORDS - 1 :: _CALL_WORDS]
    results = [CallResult(value, _outs(call, layout, raw)) for call, value in zip(calls, values, strict=True)]
    return BatchState(tuple(results), next_index if status else None)


def _outs(call: Call, layout: _Layout, raw: bytes | memoryview) -> tuple[bytes, ...]:
    """What a call left in its buffers."""
    outs = []
    for arg in call.args:
        if isinstance(arg, _PLAIN):
            continue
        offset = layout.place(arg)
        if isinstance(arg, Out):
            outs.append(bytes(raw[offset : offset + arg.size]))
        elif isinstance(arg, InOut):
            outs.append(bytes(raw[offset : offset + len(arg.payload)]))
        else:
            _skip_targets(arg, layout)
    return tuple(outs)


def _skip_targets(data: Data, layout: _Layout) -> None:
    for _, target in data.pointers:
        layout.place(target)
        if isinstance(target, Data):
            _skip_targets(target, layout)


def split(calls: Sequence[Call], capacity_bytes: int) -> list[list[Call]]:
    """Cut ``calls`` into batches that fit; a call never leaves the batch of those it refers to.

    Ref indices are relative to the whole list and come back relative to their batch.
    Raises ValueError when a single linked group is larger than the capacity.
    """
    room = capacity_bytes - HEADER_BYTES - _ALIGN
    if sum(map(_call_bytes, calls)) <= room:
        return [list(calls)] if calls else []
    batches: list[list[Call]] = []
    start, used = 0, 0
    for first, end in _linked_groups(calls):
        size = sum(map(_call_bytes, calls[first:end]))
        if size > room:
            raise ValueError(f"calls {first}..{end - 1} belong together and do not fit into one batch")
        if used + size > room:
            batches.append([_rebase(c, start) for c in calls[start:first]])
            start, used = first, 0
        used += size
    if start < len(calls):
        batches.append([_rebase(c, start) for c in calls[start:]])
    return batches


def _linked_groups(calls: Sequence[Call]) -> list[tuple[int, int]]:
    """Half-open ranges of calls between which no Ref reaches across."""
    ends = list(range(len(calls)))
    for index, call in enumerate(calls):
        for arg in call.args:
            if isinstance(arg, Ref):
                ends[arg.index] = max(ends[arg.index], index)
    groups, first, reach = [], 0, 0
    for index, end in enumerate(ends):
        reach = max(reach, end)
        if reach == index:
            groups.append((first, index + 1))
            first = index + 1
    return groups


def _call_bytes(call: Call) -> int:
    size = CALL_BYTES
    for arg in call.args:
        if not isinstance(arg, _PLAIN):
            size += _buffer_bytes(arg)
    return size


def _buffer_bytes(buffer: Buffer) -> int:
    size = buffer.size if isinstance(buffer, Out) else len(buffer.payload)
    size += -size % _ALIGN
    if isinstance(buffer, Data):
        size += sum(_buffer_bytes(target) for _, target in buffer.pointers)
    return size


def _rebase(call: Call, start: int) -> Call:
    args = tuple(Ref(a.index - start) if isinstance(a, Ref) else a for a in call.args)
    return Call(call.nr, args, call.what, call.want, call.may_fail)
