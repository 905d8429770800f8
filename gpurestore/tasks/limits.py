"""Resource limits, the out-of-memory score and the core dump filter of a process."""

from __future__ import annotations

import os
import struct
from collections.abc import Sequence
from typing import TYPE_CHECKING

from gpurestore.batch import Call, Data
from gpurestore.errors import Finding, ImageError
from gpurestore.syscalls import NR
from gpurestore.tasks import procfs
from gpurestore.tasks.calls import join, write_file

if TYPE_CHECKING:
    from gpurestore.images import pb

_NAMES = "CPU FSIZE DATA STACK CORE RSS NPROC NOFILE MEMLOCK AS LOCKS SIGPENDING MSGQUEUE NICE RTPRIO RTTIME"
RLIMITS = tuple(_NAMES.split())
_NUMBER = {name: number for number, name in enumerate(RLIMITS)}
# A restore itself runs into these, whatever the task's own values are.
_IN_THE_WAY = ("NOFILE", "MEMLOCK", "AS", "DATA", "SIGPENDING", "NPROC", "FSIZE")

Limits = Sequence[tuple[int, int]]


def collect(pid: int, entry: pb.task_core_entry) -> None:
    """The limits and the out-of-memory score."""
    for soft, hard in procfs.limits(pid):
        entry.rlimits.rlimits.add(cur=soft, max=hard)
    entry.oom_score_adj = procfs.oom_score_adj(pid)


def from_message(entry: pb.task_core_entry) -> list[tuple[int, int]]:
    """(soft, hard) by RLIMIT_ number; shorter than ours where an older kernel knew fewer."""
    limits = [(r.cur, r.max) for r in entry.rlimits.rlimits]
    if len(limits) > procfs.NR_LIMITS or any(soft > hard for soft, hard in limits):
        raise ImageError("core image: resource limits that no kernel has")
    return limits


def plan_room(want: Limits, have: Limits) -> list[Call]:
    """Before anything is restored: lift what would be in the way, as far as both we and the images allow."""
    return [
        _prlimit(number, lifted, lifted, "make room: ")
        for number, lifted in _lifted(want, have).items()
        if (lifted, lifted) != have[number]
    ]


def _lifted(want: Limits, have: Limits) -> dict[int, int]:
    numbers = [_NUMBER[name] for name in _IN_THE_WAY]
    return {n: max(have[n][1], want[n][1] if n < len(want) else 0) for n in numbers}


def plan(want: Limits, have: Limits) -> list[Call]:
    """After everything is restored that limits could be in the way of."""
    now = list(have)
    for number, lifted in _lifted(want, have).items():
        now[number] = (lifted, lifted)
    return [_prlimit(n, *limit) for n, limit in enumerate(want) if limit != now[n]]


def _prlimit(number: int, soft: int, hard: int, prefix: str = "") -> Call:
    value = Data(struct.pack("=QQ", soft, hard))
    return Call(NR.PRLIMIT64, (0, number, value, 0), f"{prefix}set RLIMIT_{RLIMITS[number]}", want=0)


def plan_proc_files(oom_score_adj: int | None, own_score_adj: int, coredump_filter: int | None) -> list[Call]:
    """Early, while the task may still write its own files in /proc."""
    plans = []
    if oom_score_adj is not None and oom_score_adj != own_score_adj:
        plans.append(write_file("/proc/self/oom_score_adj", str(oom_score_adj), "set oom_score_adj"))
    if coredump_filter is not None:
        plans.append(write_file("/proc/self/coredump_filter", hex(coredump_filter), "set the core dump filter"))
    return join(plans)


def check(want: Limits, have: Limits, where: str, may_raise: bool) -> list[Finding]:
    """Hard limits above ours, which only ``may_raise`` (CAP_SYS_RESOURCE) lets a task have."""
    if may_raise:
        return []
    found = []
    for (_, hard), (_, ours), name in zip(want, have, RLIMITS, strict=False):
        if hard > ours:
            why = f"ours is {_show(ours)}, and raising it needs CAP_SYS_RESOURCE"
            found.append(Finding(where, f"hard limit RLIMIT_{name} is {_show(hard)}", why))
    return found


def _show(limit: int) -> str:
    return "unlimited" if limit == procfs.UNLIMITED else str(limit)


def check_oom_score(want: int, own: int, where: str) -> list[Finding]:
    """Lowering is allowed down to a floor that the kernel does not show: try it on ourselves, and go back."""
    if want >= own:
        return []
    try:
        fd = os.open("/proc/self/oom_score_adj", os.O_WRONLY | os.O_CLOEXEC)
        try:
            os.write(fd, str(want).encode())
            os.pwrite(fd, str(own).encode(), 0)  # raising is always allowed
        finally:
            os.close(fd)
    except OSError:
        return [Finding(where, f"oom_score_adj is {want}", f"ours is {own}, and lowering it needs CAP_SYS_RESOURCE")]
    return []
