"""NUMA policies of mappings: on which nodes of the machine their pages are to lie (mbind(2)).

They decide about pages that come from then on, so a restore sets them before the pages. Threads have theirs in
scheduling.py. A policy is its mode, with the flags in it, and the words of its mask of nodes.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from gpurestore.batch import Call, CallResult, Data, Out
from gpurestore.errors import Finding, ImageError
from gpurestore.images import pb
from gpurestore.syscalls import NR
from gpurestore.tasks import jsonvalues, maps, procfs

MASK_WORDS = 16
_MASK_BITS = MASK_WORDS * 64
_MPOL_F_ADDR = 2


class Task(Protocol):
    """What this module needs of :class:`gpurestore.tasks.frozen.FrozenTask`."""

    @property
    def vmas(self) -> Sequence[maps.Vma]: ...
    def ask(self, calls: Sequence[Call]) -> Sequence[CallResult]: ...


def ask(address: int | None = None) -> Call:
    """Ask a task for the policy of the mapping at ``address``, or of the thread itself."""
    where = (0, 0) if address is None else (address, _MPOL_F_ADDR)
    return Call(NR.GET_MEMPOLICY, (Out(8), Out(MASK_WORDS * 8), _MASK_BITS, *where), "read NUMA policy", may_fail=True)


def answer(result: int, outs: Sequence[bytes]) -> tuple[int, ...] | None:
    """The policy that :func:`ask` found; None for the kernel's own, to take pages from where the thread runs."""
    mode = int.from_bytes(outs[0][:4], "little")
    return (mode, *struct.unpack(f"={MASK_WORDS}Q", outs[1])) if result == 0 and mode else None


def argument(policy: Sequence[int]) -> tuple[int, Data | int, int]:
    """Mode, mask and bits in the mask, as mbind and set_mempolicy take them."""
    mode, *words = policy
    return mode, Data(struct.pack(f"={len(words)}Q", *words)) if words else 0, len(words) * 64


def collect(task: Task) -> dict[str, list[int]]:
    """The policies of a frozen task's mappings, by start address in hexadecimal digits."""
    starts = [vma.start for vma in task.vmas if vma.end <= maps.TASK_SIZE]
    modes = task.ask([Call(NR.GET_MEMPOLICY, (Out(8), 0, 0, at, _MPOL_F_ADDR), may_fail=True) for at in starts])
    bound = [at for at, found in zip(starts, modes, strict=True) if found.result == 0 and any(found.outs[0])]
    answers = task.ask([ask(at) for at in bound])
    policies = ((at, answer(found.result, found.outs)) for at, found in zip(bound, answers, strict=True))
    return {f"{at:x}": list(policy) for at, policy in policies if policy}


def of_mappings(extension: Mapping[str, Any]) -> Mapping[str, Sequence[int]]:
    """What :func:`collect` found, out of an image. Raises ImageError."""
    policies = jsonvalues.mapping(extension.get("numa", {}), "mm.numa")
    return {start: _checked(policy) for start, policy in policies.items()}


def plan(vma: pb.vma_entry, policies: Mapping[str, Sequence[int]]) -> list[Call]:
    """Give the mapping, which holds no pages yet, its policy."""
    policy = policies.get(f"{vma.start:x}")
    if policy is None:
        return []
    what = f"NUMA policy of {vma.start:x}-{vma.end:x}"
    return [Call(NR.MBIND, (vma.start, vma.end - vma.start, *argument(policy), 0), what, want=0)]


def check(where: str, policies: Iterable[Sequence[int]]) -> list[Finding]:
    """Policies that name only nodes that this machine does not have: the kernel would refuse them."""
    here = _mask_of_nodes()
    masks = {sum(word << 64 * i for i, word in enumerate(_checked(policy)[1:])) for policy in policies}
    return [
        Finding(where, f"memory on the NUMA nodes {_nodes(mask)}", f"this machine has {_nodes(here)}")
        for mask in sorted(masks)
        if mask and not mask & here
    ]


def _mask_of_nodes() -> int:
    """Nodes with memory; a kernel without NUMA has none."""
    try:
        text = Path("/sys/devices/system/node/has_memory").read_text()
    except OSError:
        return 0
    return sum(1 << node for node in procfs.parse_cpu_list(text))


def _nodes(mask: int) -> str:
    return procfs.format_cpu_list(frozenset(i for i in range(mask.bit_length()) if mask >> i & 1)) or "none"


def _checked(policy: object) -> Sequence[int]:
    if (
        isinstance(policy, list | tuple)
        and 1 <= len(policy) <= MASK_WORDS + 1
        and all(isinstance(word, int) and 0 <= word < 1 << 64 for word in policy)
        and policy[0] < 1 << 31
    ):
        return policy
    raise ImageError("gpurestore.json: mm: not a NUMA policy")
