"""``cuda.json``: what the plugin keeps in the images. Written once, read strictly: nothing in it is trusted.

    {"format": 2, "storage": "staging", "driver": "580.65.06", "cuda_version": 13000,
     "gpus": [{"index": 0, "uuid": "GPU-...", "model": "NVIDIA H100", "memory_bytes": 85520809984, "minor": 0,
               "pci": "00000000:01:00.0", "compute_capability": "9.0", "mig": false}],
     "topology": [{"first": 0, "second": 1, "kind": "same board"}],
     "tasks": [{"pid": 12, "state": "running", "thread": 17, "gpus": {"GPU-...": 1073741824}, "regions": []}]}

A task's ``state`` is the one it was found in and goes back to; ``gpus`` are those that it had, with the bytes in use
there, or null where NVML did not tell. Lists of GPUs are empty where there was no NVML. With ``storage`` custom a task
has ``regions``, ``{"gpu": "GPU-...", "bytes": 1073741824}``: its device memory on one GPU each, in ``cuda-PID-N.img``.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from gpurestore.devplugins.cuda import IMAGE
from gpurestore.devplugins.cuda.driver import ProcessState
from gpurestore.devplugins.cuda.gpumap import is_uuid
from gpurestore.devplugins.cuda.nvml import Gpu, Link
from gpurestore.errors import ImageError

FORMAT = 2
MAX_BYTES = 16 << 20
STAGING = "staging"  # device content is in the process's own memory
CUSTOM = "custom"  # in files of its own
_MAX_REGIONS = 256
_STATES = {state.name.lower(): state for state in list(ProcessState)[:3]}
_MAX_PID = 1 << 22
_MAX_U64 = (1 << 63) - 1


@dataclass(frozen=True, slots=True)
class Task:
    """A task that uses CUDA."""

    pid: int
    state: ProcessState
    thread: int
    gpus: dict[str, int | None]
    regions: tuple[tuple[str, int], ...] = ()  # GPU and bytes

    def region_name(self, number: int) -> str:
        """The file of a region."""
        return f"cuda-{self.pid}-{number}.img"


@dataclass(frozen=True, slots=True)
class State:
    """All of it."""

    storage: str
    driver: str
    cuda_version: int
    gpus: tuple[Gpu, ...]
    topology: tuple[Link, ...]
    tasks: dict[int, Task]

    def needed_bytes(self) -> dict[str, int | None]:
        """By GPU that some task had: the bytes in use there. Tasks that name none had any of them.

        A task that had none of its devices any more when it was found needs none.
        """
        needed: dict[str, int | None] = {}
        for task in self.tasks.values():
            if task.state is ProcessState.CHECKPOINTED:
                continue
            for uuid, used in (task.gpus or dict.fromkeys(gpu.uuid for gpu in self.gpus)).items():
                before = needed.get(uuid, 0)
                needed[uuid] = None if used is None or before is None else before + used
        return needed

    def used_gpus(self) -> tuple[Gpu, ...]:
        """The GPUs that some task had."""
        needed = self.needed_bytes()
        return tuple(gpu for gpu in self.gpus if gpu.uuid in needed)


def encode(state: State) -> bytes:
    """The file's content."""
    gpus = [{key: value for key, value in asdict(gpu).items() if key != "free_bytes"} for gpu in state.gpus]
    tasks = [
        {
            "pid": task.pid,
            "state": task.state.name.lower(),
            "thread": task.thread,
            "gpus": task.gpus,
            "regions": [{"gpu": gpu, "bytes": size} for gpu, size in task.regions],
        }
        for task in state.tasks.values()
    ]
    document = {
        "format": FORMAT,
        "storage": state.storage,
        "driver": state.driver,
        "cuda_version": state.cuda_version,
        "gpus": gpus,
        "topology": [asdict(link) for link in state.topology],
        "tasks": tasks,
    }
    return json.dumps(document, indent=1).encode() + b"\n"


def decode(data: bytes) -> State:
    """Read it, or raise ImageError that names the place."""
    if len(data) > MAX_BYTES:
        raise ImageError(f"{IMAGE} has {len(data)} bytes: it is not ours")
    try:
        document = json.loads(data, object_pairs_hook=_no_doubles, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise ImageError(f"{IMAGE} is damaged: {error}") from error
    version = document.get("format") if isinstance(document, dict) else None
    if type(version) is not int or version != FORMAT:
        raise ImageError(f"{IMAGE} is not of format {FORMAT}: it was written by another version of gpurestore")
    where = _Object(document, "the top", ("format", "storage", "driver", "cuda_version", "gpus", "topology", "tasks"))
    gpus = tuple(_gpu(item, f"gpus[{i}]") for i, item in enumerate(where.array("gpus")))
    links = tuple(_link(item, f"topology[{i}]", len(gpus)) for i, item in enumerate(where.array("topology")))
    tasks = [_task(item, f"tasks[{i}]", {gpu.uuid for gpu in gpus}) for i, item in enumerate(where.array("tasks"))]
    for name, keys in (
        ("gpus", [g.uuid for g in gpus]),
        ("gpus", [g.index for g in gpus]),
        ("tasks", [t.pid for t in tasks]),
    ):
        if len(set(keys)) != len(keys):
            raise ImageError(f"{IMAGE}: {name} has something twice")
    if where.text("storage") != CUSTOM and any(task.regions for task in tasks):
        raise ImageError(f"{IMAGE}: device memory has regions, although it is in the processes' own memory")
    return State(
        storage=where.text("storage", lambda text: text in (STAGING, CUSTOM)),
        driver=where.text("driver"),
        cuda_version=where.number("cuda_version"),
        gpus=gpus,
        topology=links,
        tasks={task.pid: task for task in tasks},
    )


def _no_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a key stands there twice")
    return result


def _no_constant(text: str) -> Any:
    raise ValueError(f"{text} is no number")


class _Object:
    """A JSON object with exactly the keys that it should have."""

    def __init__(self, value: Any, place: str, keys: tuple[str, ...]) -> None:
        if not isinstance(value, dict) or set(value) != set(keys):
            raise ImageError(f"{IMAGE}: {place} is not an object of {', '.join(keys)}")
        self._value, self._place = value, place

    def _bad(self, key: str, wanted: str) -> ImageError:
        return ImageError(f"{IMAGE}: {key} of {self._place} is not {wanted}")

    def array(self, key: str) -> list[Any]:
        """A list."""
        value = self._value[key]
        if not isinstance(value, list):
            raise self._bad(key, "a list")
        return value

    def mapping(self, key: str) -> dict[str, Any]:
        """An object with keys of its own."""
        value = self._value[key]
        if not isinstance(value, dict):
            raise self._bad(key, "an object")
        return value

    def text(self, key: str, accept: Callable[[str], bool] = lambda _: True) -> str:
        """A string."""
        value = self._value[key]
        if not isinstance(value, str) or not accept(value) or not (value.isprintable() and value.isascii()):
            raise self._bad(key, "a text as it should be there")
        return value

    def number(self, key: str, low: int = 0, high: int = _MAX_U64) -> int:
        """A whole number."""
        value = self._value[key]
        if type(value) is not int or not low <= value <= high:
            raise self._bad(key, f"a whole number from {low} to {high}")
        return value

    def boolean(self, key: str) -> bool:
        """True or false."""
        value = self._value[key]
        if not isinstance(value, bool):
            raise self._bad(key, "true or false")
        return value

    def null(self, key: str) -> bool:
        """Whether nothing is there."""
        return self._value[key] is None


def _gpu(value: Any, place: str) -> Gpu:
    item = _Object(
        value, place, ("index", "uuid", "model", "memory_bytes", "minor", "pci", "compute_capability", "mig")
    )
    return Gpu(
        index=item.number("index"),
        uuid=item.text("uuid", is_uuid),
        model=item.text("model"),
        memory_bytes=item.number("memory_bytes"),
        minor=None if item.null("minor") else item.number("minor"),
        pci=None if item.null("pci") else item.text("pci"),
        compute_capability=None if item.null("compute_capability") else item.text("compute_capability"),
        mig=item.boolean("mig"),
    )


def _link(value: Any, place: str, nr_gpus: int) -> Link:
    item = _Object(value, place, ("first", "second", "kind"))
    first, second = item.number("first", 0, nr_gpus - 1), item.number("second", 0, nr_gpus - 1)
    return Link(first, second, item.text("kind"))


def _task(value: Any, place: str, uuids: set[str]) -> Task:
    item = _Object(value, place, ("pid", "state", "thread", "gpus", "regions"))
    gpus = item.mapping("gpus")
    for uuid, used in gpus.items():
        if uuid not in uuids:
            raise ImageError(f"{IMAGE}: gpus of {place} names a GPU that the file does not list")
        if used is not None and (type(used) is not int or not 0 <= used <= _MAX_U64):
            raise ImageError(f"{IMAGE}: gpus of {place} has a size that is none")
    return Task(
        pid=item.number("pid", 1, _MAX_PID),
        state=_STATES[item.text("state", lambda text: text in _STATES)],
        thread=item.number("thread", 1, _MAX_PID),
        gpus=dict(gpus),
        regions=_regions(item.array("regions"), place),
    )


def _regions(values: list[Any], place: str) -> tuple[tuple[str, int], ...]:
    if len(values) > _MAX_REGIONS:
        raise ImageError(f"{IMAGE}: {place} has {len(values)} regions of device memory")
    items = [_Object(value, f"regions[{i}] of {place}", ("gpu", "bytes")) for i, value in enumerate(values)]
    found = tuple((item.text("gpu", is_uuid), item.number("bytes")) for item in items)
    if len({gpu for gpu, _ in found}) != len(found):
        raise ImageError(f"{IMAGE}: regions of {place} name a GPU twice")
    return found
