"""Facts about tasks that CRIU's messages have no field for. They live under ``tasks`` in gpurestore.json.

None means unknown: images written by CRIU hold none of this, and a plan then leaves the kernel's state as it is.
Nothing here is trusted: :meth:`ProcessFacts.from_json` takes any value and raises ImageError on a wrong one.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, TypeVar

from gpurestore.tasks import jsonvalues

ALL_CPUS = "all"


@dataclass(slots=True)
class ThreadFacts:
    """What one thread has beside its core entry."""

    comm: bytes | None = None  # only when it is not valid text
    affinity: str | None = None  # a CPU list, or ALL_CPUS
    ioprio: int | None = None
    timer_slack_ns: int | None = None
    # flags, runtime, deadline, period (ns), least and greatest utilization, as in struct sched_attr
    sched: tuple[int, ...] | None = None
    mempolicy: tuple[int, ...] | None = None  # mode, then the words of the node mask
    personality: int | None = None
    speculation: tuple[int, ...] | None = None  # answers of PR_GET_SPECULATION_CTRL, one per kind
    machine_check: int | None = None
    tsc: int | None = None
    cpuid: int | None = None
    io_flusher: int | None = None
    xstate: dict[int, bytes] = field(default_factory=dict)  # components that the core entry has no place for

    def to_json(self) -> dict[str, Any]:
        """What is known."""
        return _to_json(self, ThreadFacts())

    @classmethod
    def from_json(cls, raw: object, where: str) -> ThreadFacts:
        """Raises ImageError; ``where`` says which value it is."""
        return _from_json(cls(), raw, where)


@dataclass(slots=True)
class ProcessFacts:
    """What one process has beside its core entry, and the facts of its threads by thread id."""

    mdwe: int | None = None
    memory_merge: int | None = None
    coredump_filter: int | None = None
    xcomp_permitted: int | None = None
    exit_signal: int | None = None
    threads: dict[int, ThreadFacts] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """What is known."""
        return _to_json(self, ProcessFacts())

    @classmethod
    def from_json(cls, raw: object, where: str) -> ProcessFacts:
        """Raises ImageError; ``where`` says which value it is."""
        return _from_json(cls(), raw, where)

    def thread(self, tid: int) -> ThreadFacts:
        """Facts of a thread; all unknown where there are none."""
        return self.threads.get(tid, ThreadFacts())


def load(extension: Mapping[str, Any]) -> dict[int, ProcessFacts]:
    """The facts of every process in a manifest's extension; empty for images without them."""
    return jsonvalues.by_number(ProcessFacts.from_json)(extension.get("tasks", {}), "tasks")


def _to_json(facts: ThreadFacts | ProcessFacts, unknown: ThreadFacts | ProcessFacts) -> dict[str, Any]:
    known = ((f.name, getattr(facts, f.name)) for f in fields(facts))
    return {name: _value(value) for name, value in known if value != getattr(unknown, name)}


def _value(value: Any) -> Any:
    match value:
        case bytes():
            return base64.b64encode(value).decode()
        case tuple():
            return list(value)
        case dict():
            return {str(k): _value(v) for k, v in value.items()}
        case ThreadFacts():
            return value.to_json()
    return value


def _int(value: object, where: str) -> int:
    return jsonvalues.number(value, where, low=-(1 << 63))


def _ints(value: object, where: str) -> tuple[int, ...]:
    return tuple(_int(item, where) for item in jsonvalues.sequence(value, where, most=64))


_READERS: dict[str, jsonvalues.Reader[Any]] = {
    "comm": jsonvalues.blob,
    "affinity": jsonvalues.text,
    "sched": _ints,
    "mempolicy": _ints,
    "speculation": _ints,
    "xstate": jsonvalues.by_number(jsonvalues.blob),
    "threads": jsonvalues.by_number(ThreadFacts.from_json),
}

F = TypeVar("F", ThreadFacts, ProcessFacts)


def _from_json(facts: F, raw: object, where: str) -> F:
    known = jsonvalues.mapping(raw, where)
    for f in fields(facts):
        if f.name in known:
            setattr(facts, f.name, _READERS.get(f.name, _int)(known[f.name], f"{where}.{f.name}"))
    return facts
