"""On which GPU each dumped GPU's content comes back: pure functions over two inventories.

The driver wants every GPU that a process had in the map, a new GPU of the same chip, and enough memory on it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from gpurestore.devplugins.cuda.nvml import Gpu
from gpurestore.errors import Finding, UsageError

_UUID = re.compile(r"GPU-[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", re.ASCII)
_GIB = 1 << 30


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table: a dumped GPU, what it needs, and where it goes."""

    old: Gpu
    needed_bytes: int | None
    new: Gpu | None
    problem: str | None


@dataclass(frozen=True, slots=True)
class Placement:
    """The outcome. ``pairs`` names every dumped GPU, or none where all come back in their places."""

    pairs: dict[str, str]
    rows: tuple[Row, ...]

    @property
    def findings(self) -> list[Finding]:
        """What stands in the way."""
        return [
            Finding(f"GPU {row.old.uuid}", f"{row.old.model}, {size(row.needed_bytes)} in use", row.problem)
            for row in self.rows
            if row.problem is not None
        ]

    def table(self) -> str:
        """Wanted and there, a line each."""
        lines = [("wanted", "model", "in use", "there", "model", "free", "")]
        for row in self.rows:
            there = ("-", "", "") if row.new is None else (row.new.uuid, row.new.model, size(row.new.free_bytes))
            lines.append((row.old.uuid, row.old.model, size(row.needed_bytes), *there, row.problem or "ok"))
        widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
        padded = ("  ".join(f"{c:<{w}}" for c, w in zip(line, widths, strict=True)).rstrip() for line in lines)
        return "\n".join(padded)


def size(nr_bytes: int | None) -> str:
    """Bytes for people."""
    return "unknown memory" if nr_bytes is None else f"{nr_bytes / _GIB:.1f} GiB"


def parse(text: str) -> dict[str, str]:
    """``OLD=NEW[,OLD=NEW...]``: each a UUID, the unique beginning of one, or an index (OLD's at dump, NEW's here)."""
    wanted: dict[str, str] = {}
    for part in text.split(","):
        old, equals, new = (piece.strip() for piece in part.partition("="))
        if not (old and equals and new):
            raise UsageError(f"--gpu-map {part!r}: write OLD=NEW, each a GPU's UUID or index (nvidia-smi -L)")
        if old in wanted:
            raise UsageError(f"--gpu-map: {old} is named twice")
        wanted[old] = new
    return wanted


def resolve(name: str, gpus: Sequence[Gpu], where: str) -> str:
    """The UUID meant by ``name`` among ``gpus``."""
    if name.isascii() and name.isdigit():
        found = [gpu for gpu in gpus if gpu.index == int(name)]
    else:
        short = name.lower().removeprefix("gpu-")
        found = [gpu for gpu in gpus if gpu.uuid.lower().removeprefix("gpu-").startswith(short)]
    if len(found) != 1:
        known = ", ".join(f"{gpu.index}: {gpu.uuid}" for gpu in gpus) or "none"
        trouble = "names more than one GPU" if found else "names no GPU"
        raise UsageError(f"--gpu-map: {name!r} {trouble} {where} ({known})")
    return found[0].uuid


def is_uuid(text: str) -> bool:
    """Whether this is a GPU's UUID as NVML writes it."""
    return _UUID.fullmatch(text) is not None


def place(
    old: Sequence[Gpu],
    here: Sequence[Gpu],
    needed_bytes: Mapping[str, int | None],
    explicit: Mapping[str, str],
    *,
    can_map: bool,
) -> Placement:
    """Find a place for every GPU of ``old``, which are those that the dumped processes had.

    ``explicit`` (UUIDs) wins; a GPU that is still here stays; the others go to free ones of the same model in the order
    of their indices, the neediest first among equals.
    """
    targets = dict(explicit)
    by_uuid = {gpu.uuid: gpu for gpu in here}
    for gpu in old:
        if gpu.uuid not in targets and gpu.uuid in by_uuid and gpu.uuid not in targets.values():
            targets[gpu.uuid] = gpu.uuid
    moved = sorted(
        (gpu for gpu in old if gpu.uuid not in targets), key=lambda gpu: (-(needed_bytes[gpu.uuid] or 0), gpu.index)
    )
    for gpu in moved:
        candidates = [new for new in here if new.uuid not in targets.values() and mismatch(gpu, new) is None]
        if best := _best(candidates, needed_bytes[gpu.uuid]):
            targets[gpu.uuid] = best.uuid
    must_map = any(old_uuid != new for old_uuid, new in targets.items())
    rows = tuple(_row(gpu, by_uuid, targets, needed_bytes[gpu.uuid], can_map) for gpu in old)
    return Placement({gpu.uuid: targets[gpu.uuid] for gpu in old if gpu.uuid in targets} if must_map else {}, rows)


def _best(candidates: Iterable[Gpu], needed: int | None) -> Gpu | None:
    """The first with room, else the one with most: the table then says how much is missing."""
    candidates = list(candidates)
    roomy = [gpu for gpu in candidates if _missing(gpu, needed) == 0]
    return roomy[0] if roomy else max(candidates, key=lambda gpu: gpu.free_bytes or 0, default=None)


def _missing(gpu: Gpu, needed: int | None) -> int:
    if needed is None or gpu.free_bytes is None:
        return 0
    return max(0, needed - gpu.free_bytes)


def mismatch(old: Gpu, new: Gpu) -> str | None:
    """Why ``new`` cannot stand in for ``old``, whatever its memory."""
    if new.mig:
        return (
            "it is split by MIG, which the driver's checkpoint calls cannot handle: switch MIG off (nvidia-smi -mig 0)"
        )
    if new.model != old.model:
        return f"it is another model ({new.model}); the driver wants the same chip"
    if old.compute_capability and new.compute_capability and old.compute_capability != new.compute_capability:
        return f"it is another chip (compute capability {new.compute_capability})"
    return None


def _row(old: Gpu, here: Mapping[str, Gpu], targets: Mapping[str, str], needed: int | None, can_map: bool) -> Row:
    new = here.get(targets.get(old.uuid, ""))
    if new is None:
        return Row(old, needed, None, "there is no free GPU of this model here")
    sharing = sorted(uuid for uuid, target in targets.items() if target == new.uuid and uuid != old.uuid)
    if sharing:
        problem: str | None = f"{', '.join(sharing)} is to go to the same GPU"
    elif new.uuid != old.uuid and not can_map:
        problem = "it would have to move to another GPU, which needs driver 580 or later"
    elif (problem := mismatch(old, new)) is None and (missing := _missing(new, needed)):
        problem = f"{size(missing)} too little memory is free on {new.uuid}: end what runs there (nvidia-smi)"
    return Row(old, needed, new, problem)
