"""How a thread is scheduled: policy, nice, CPU affinity, timer slack, I/O priority, NUMA policy."""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

from gpurestore.batch import Call, Data, Out
from gpurestore.errors import Finding, ImageError
from gpurestore.syscalls import NR
from gpurestore.tasks import numa, procfs
from gpurestore.tasks.calls import Answers, Questions, prctl
from gpurestore.tasks.facts import ALL_CPUS, ThreadFacts

if TYPE_CHECKING:
    from gpurestore.images import pb

PR_SET_TIMERSLACK, PR_GET_TIMERSLACK = 29, 30
SCHED_FIFO, SCHED_RR, SCHED_DEADLINE = 1, 2, 6
_POLICIES = {0: "other", 1: "fifo", 2: "rr", 3: "batch", 5: "idle", 6: "deadline", 7: "ext"}
_RESET_ON_FORK_IN_POLICY, _RESET_ON_FORK = 0x40000000, 0x01
_UTIL_CLAMP = 0x60
_UNCLAMPED = ((0, 0), (0, 1024))
_ATTR = struct.Struct("=IIQiIQQQII")  # struct sched_attr: size, policy, flags, nice, priority, 3 times, 2 clamps
_CPU_BYTES = 1024
_IOPRIO_WHO_PROCESS = 1
_IOPRIO_CLASS_RT = 1


def questions() -> Questions:
    """What every thread is asked."""
    return {
        "sched": Call(NR.SCHED_GETATTR, (0, Out(_ATTR.size), _ATTR.size, 0), "read scheduling attributes"),
        "nice": Call(NR.GETPRIORITY, (0, 0), "read nice"),
        "affinity": Call(NR.SCHED_GETAFFINITY, (0, _CPU_BYTES, Out(_CPU_BYTES)), "read CPU affinity"),
        "ioprio": Call(NR.IOPRIO_GET, (_IOPRIO_WHO_PROCESS, 0), "read I/O priority", may_fail=True),
        "timer slack": prctl(PR_GET_TIMERSLACK, what="read timer slack", may_fail=True),
        "mempolicy": numa.ask(),
    }


def collect(answers: Answers, entry: pb.thread_core_entry, facts: ThreadFacts, online: frozenset[int]) -> None:
    """``online`` are the machine's CPUs: a thread that may run on all of them may do so anywhere."""
    attr = _ATTR.unpack(answers["sched"].outs[0])
    _, policy, flags, _, priority, runtime, deadline, period, util_min, util_max = attr
    entry.sched_policy = policy | (_RESET_ON_FORK_IN_POLICY if flags & _RESET_ON_FORK else 0)
    entry.sched_nice = 20 - answers["nice"].result  # getpriority is the one call that tells nice under every policy
    if policy in (SCHED_FIFO, SCHED_RR):
        entry.sched_prio = priority
    clamped = policy not in (SCHED_FIFO, SCHED_RR) and (util_min, util_max) not in _UNCLAMPED
    if policy == SCHED_DEADLINE or clamped:
        times = (runtime, deadline, period) if policy == SCHED_DEADLINE else (0, 0, 0)
        facts.sched = (flags | (_UTIL_CLAMP if clamped else 0), *times, util_min, util_max)
    mask = int.from_bytes(answers["affinity"].outs[0], "little")
    cpus = frozenset(i for i in range(mask.bit_length()) if mask >> i & 1)
    facts.affinity = ALL_CPUS if cpus >= online else procfs.format_cpu_list(cpus)
    if answers["ioprio"].result >= 0:
        facts.ioprio = answers["ioprio"].result
    if answers["timer slack"].result > 0:  # 0: a real-time thread, which has none
        facts.timer_slack_ns = answers["timer slack"].result
    facts.mempolicy = numa.answer(answers["mempolicy"].result, answers["mempolicy"].outs)


def plan(entry: pb.thread_core_entry, facts: ThreadFacts) -> list[Call]:
    """In the thread itself, while it still has the restorer's rights."""
    calls = []
    if facts.timer_slack_ns:
        calls.append(prctl(PR_SET_TIMERSLACK, facts.timer_slack_ns, what="set timer slack"))
    if facts.ioprio is not None:
        calls.append(Call(NR.IOPRIO_SET, (_IOPRIO_WHO_PROCESS, 0, facts.ioprio), "set I/O priority", want=0))
    if facts.affinity is not None:
        calls.append(_plan_affinity(facts.affinity))
    if facts.mempolicy:
        calls.append(Call(NR.SET_MEMPOLICY, numa.argument(facts.mempolicy), "set NUMA policy", want=0))
    if entry.HasField("sched_policy"):
        calls.extend(_plan_policy(entry, facts))
    return calls


def _plan_affinity(affinity: str) -> Call:
    if affinity == ALL_CPUS:
        mask = b"\xff" * _CPU_BYTES  # the kernel cuts it down to what there is
    else:
        cpus = _cpus(affinity)
        mask = sum(1 << cpu for cpu in cpus).to_bytes(_CPU_BYTES, "little")
    return Call(NR.SCHED_SETAFFINITY, (0, len(mask), Data(mask)), f"bind to CPUs {affinity}", want=0)


def _cpus(text: str) -> frozenset[int]:
    try:
        if len(text) <= 1024 * 8 and all(int(n) < _CPU_BYTES * 8 for n in text.replace("-", ",").split(",")):
            return procfs.parse_cpu_list(text)
    except ValueError:
        pass
    raise ImageError(f"gpurestore.json: {text[:40]!r} is no list of CPUs")


def _plan_policy(entry: pb.thread_core_entry, facts: ThreadFacts) -> list[Call]:
    calls = []
    policy = entry.sched_policy & ~_RESET_ON_FORK_IN_POLICY
    flags = _RESET_ON_FORK if entry.sched_policy & _RESET_ON_FORK_IN_POLICY else 0
    extra = facts.sched or (0, 0, 0, 0, 0, 0)
    if len(extra) != 6:
        raise ImageError("gpurestore.json: scheduling attributes of a wrong length")
    flags |= extra[0]
    if policy in (SCHED_FIFO, SCHED_RR, SCHED_DEADLINE):  # these keep a nice value that shows when they end
        calls.append(Call(NR.SETPRIORITY, (0, 0, entry.sched_nice), f"set nice {entry.sched_nice}", want=0))
    clamps = extra[4:] if flags & _UTIL_CLAMP else (0, 0)
    try:
        attr = _ATTR.pack(_ATTR.size, policy, flags, entry.sched_nice, entry.sched_prio, *extra[1:4], *clamps)
    except struct.error as error:
        raise ImageError("core image: scheduling attributes that no kernel has") from error
    what = f"schedule as {_POLICIES.get(policy, policy)}, nice {entry.sched_nice}"
    calls.append(Call(NR.SCHED_SETATTR, (0, Data(attr), 0), what, want=0))
    return calls


def check(entry: pb.thread_core_entry, facts: ThreadFacts, where: str, own_nice: int, rights: Rights) -> list[Finding]:
    """An unknown policy, and priorities or CPUs that ``rights`` do not give."""
    found = []
    policy = entry.sched_policy & ~_RESET_ON_FORK_IN_POLICY
    if policy not in _POLICIES:
        found.append(Finding(where, f"scheduling policy {policy}", "not known"))
    if not rights.any_priority:
        if entry.sched_nice < own_nice and 20 - entry.sched_nice > rights.nice_limit:
            found.append(Finding(where, f"nice {entry.sched_nice}", f"ours is {own_nice}, and we lack CAP_SYS_NICE"))
        if policy in (SCHED_FIFO, SCHED_RR) and entry.sched_prio > rights.realtime_limit:
            found.append(Finding(where, f"real-time priority {entry.sched_prio}", "we lack CAP_SYS_NICE"))
        if policy == SCHED_DEADLINE:
            found.append(Finding(where, "scheduled by deadline", "we lack CAP_SYS_NICE"))
        if facts.ioprio is not None and facts.ioprio >> 13 == _IOPRIO_CLASS_RT:
            found.append(Finding(where, "real-time I/O priority", "we lack CAP_SYS_NICE"))
    if facts.affinity not in (None, ALL_CPUS) and not _cpus(facts.affinity or "") & rights.cpus:
        found.append(Finding(where, f"bound to CPUs {facts.affinity}", "none of them is here"))
    return found


class Rights:
    """What the restorer may do to its own scheduling."""

    def __init__(self, any_priority: bool, nice_limit: int, realtime_limit: int, cpus: frozenset[int]) -> None:
        self.any_priority = any_priority
        self.nice_limit = nice_limit
        self.realtime_limit = realtime_limit
        self.cpus = cpus
