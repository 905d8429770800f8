"""What prctl and arch_prctl keep for a thread or a process, and what of it cannot be carried.

Names stand in threads.py, dumpable and huge pages in mm.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from gpurestore.batch import Call, Out
from gpurestore.errors import Finding
from gpurestore.syscalls import NR
from gpurestore.tasks import procfs
from gpurestore.tasks.calls import Answers, Questions, prctl
from gpurestore.tasks.facts import ProcessFacts, ThreadFacts

if TYPE_CHECKING:
    from gpurestore.images import pb

PR_SET_PDEATHSIG, PR_GET_PDEATHSIG = 1, 2
PR_GET_TSC, PR_SET_TSC, _TSC_ENABLE = 25, 26, 1
PR_MCE_KILL, PR_MCE_KILL_GET, _MCE_KILL_SET, _MCE_KILL_DEFAULT = 33, 34, 1, 2
PR_SET_CHILD_SUBREAPER, PR_GET_CHILD_SUBREAPER = 36, 37
PR_GET_SPECULATION_CTRL, PR_SET_SPECULATION_CTRL = 52, 53
PR_SET_IO_FLUSHER = 57
PR_SCHED_CORE = 62
PR_SET_MDWE, PR_GET_MDWE = 65, 66
PR_SET_MEMORY_MERGE = 67
ARCH_GET_CPUID, ARCH_SET_CPUID = 0x1011, 0x1012
ARCH_GET_XCOMP_PERM, ARCH_REQ_XCOMP_PERM = 0x1022, 0x1023
_MEMBARRIER_GET_REGISTRATIONS = 1 << 9
_SPECULATION_KINDS = ("store bypass", "indirect branch", "L1D flush")
_SPEC_PRCTL, _SPEC_RESTRICTED = 1, 0x4 | 0x8 | 0x10  # set by prctl; disabled, for good, or until exec
_XFEATURE_TILEDATA = 18


def thread_questions() -> Questions:
    """What every thread is asked."""
    asked: Questions = {
        "pdeathsig": prctl(PR_GET_PDEATHSIG, Out(8), what="read the parent-death signal"),
        "tsc": prctl(PR_GET_TSC, Out(8), what="read whether rdtsc is allowed"),
        "cpuid": Call(NR.ARCH_PRCTL, (ARCH_GET_CPUID, 0), "read whether cpuid is allowed", may_fail=True),
        "machine check": prctl(PR_MCE_KILL_GET, what="read the machine check policy", may_fail=True),
        "core cookie": prctl(PR_SCHED_CORE, 0, 0, 0, Out(8), what="read the core scheduling cookie", may_fail=True),
    }
    for kind, name in enumerate(_SPECULATION_KINDS):
        asked[f"speculation {kind}"] = prctl(PR_GET_SPECULATION_CTRL, kind, what=f"read {name}", may_fail=True)
    return asked


def process_questions() -> Questions:
    """What only the leader is asked."""
    return {
        "mdwe": prctl(PR_GET_MDWE, what="read memory-deny-write-execute", may_fail=True),
        "subreaper": prctl(PR_GET_CHILD_SUBREAPER, Out(8), what="read child subreaper"),
        "membarrier": Call(
            NR.MEMBARRIER, (_MEMBARRIER_GET_REGISTRATIONS, 0, 0), "read membarrier registrations", may_fail=True
        ),
        "xcomp": Call(NR.ARCH_PRCTL, (ARCH_GET_XCOMP_PERM, Out(8)), "read permitted CPU state", may_fail=True),
        "ldt": Call(NR.MODIFY_LDT, (0, Out(16), 16), "read the local descriptor table", may_fail=True),
    }


def collect_thread(
    answers: Answers, stat: procfs.Stat, entry: pb.thread_core_entry, facts: ThreadFacts, where: str
) -> list[Finding]:
    """A thread's answers; what of them cannot be carried."""
    if signal := _u32(answers["pdeathsig"].outs[0]):
        entry.pdeath_sig = signal
    if (tsc := _u32(answers["tsc"].outs[0])) != _TSC_ENABLE:
        facts.tsc = tsc
    if answers["cpuid"].result == 0:
        facts.cpuid = 0
    if answers["machine check"].result in (0, 1):  # 2 is the default
        facts.machine_check = answers["machine check"].result
    state = tuple(max(0, answers[f"speculation {k}"].result) for k in range(len(_SPECULATION_KINDS)))
    if any(s & _SPEC_PRCTL and s & _SPEC_RESTRICTED for s in state):
        facts.speculation = state
    if stat.flags & procfs.PF_MEMALLOC_NOIO and stat.flags & procfs.PF_LOCAL_THROTTLE:
        facts.io_flusher = 1
    if answers["core cookie"].result == 0 and any(answers["core cookie"].outs[0]):
        return [Finding(where, "core scheduling cookie", "the group that shares it cannot be made again")]
    return []


def _u32(raw: bytes) -> int:
    return int.from_bytes(raw[:4], "little")


def collect_process(answers: Answers, pid: int, entry: pb.task_core_entry, facts: ProcessFacts) -> list[Finding]:
    """The leader's answers; what of them cannot be carried."""
    if answers["mdwe"].result > 0:
        facts.mdwe = answers["mdwe"].result
    if procfs.merges_all_pages(pid):
        facts.memory_merge = 1
    entry.child_subreaper = bool(_u32(answers["subreaper"].outs[0]))
    if answers["membarrier"].result > 0:
        entry.membarrier_registration_mask = answers["membarrier"].result
    if answers["xcomp"].result == 0:
        permitted = int.from_bytes(answers["xcomp"].outs[0], "little")
        if permitted >> _XFEATURE_TILEDATA & 1:
            facts.xcomp_permitted = permitted
    facts.coredump_filter = procfs.coredump_filter(pid)
    if answers["ldt"].result > 0:
        return [Finding(f"pid {pid}", "local descriptor table", "segments of 16 and 32-bit code are not carried")]
    return []


def findings(status: procfs.Status, where: str) -> list[Finding]:
    """What /proc shows that cannot be carried."""
    found = []
    if status.seccomp:
        found.append(Finding(where, "seccomp filter" if status.seccomp == 2 else "strict seccomp", "not carried yet"))
    if "shstk" in status.features:
        found.append(Finding(where, "shadow stack", "not carried yet"))
    if status.untag_mask != procfs.UNLIMITED:
        found.append(Finding(where, "tagged addresses (LAM)", "not carried yet"))
    return found


def plan_early(facts: ProcessFacts) -> list[Call]:
    """Before alternate stacks are set: the permission is refused while one is too small for the state."""
    if facts.xcomp_permitted is None:
        return []
    return [Call(NR.ARCH_PRCTL, (ARCH_REQ_XCOMP_PERM, _XFEATURE_TILEDATA), "ask for AMX tiles", want=0)]


def plan_process(entry: pb.task_core_entry, facts: ProcessFacts) -> list[Call]:
    """In the leader."""
    calls = [prctl(PR_SET_CHILD_SUBREAPER, int(entry.child_subreaper), what="set child subreaper")]
    mask = entry.membarrier_registration_mask
    for bit in (i for i in range(32) if mask >> i & 1):
        calls.append(Call(NR.MEMBARRIER, (1 << bit, 0, 0), "register for membarrier", want=0))
    if facts.memory_merge:
        calls.append(prctl(PR_SET_MEMORY_MERGE, 1, what="let the kernel merge equal pages"))
    return calls


def plan_thread(facts: ThreadFacts) -> list[Call]:
    """In the thread itself."""
    calls = []
    if facts.machine_check is not None:
        args = (_MCE_KILL_SET, facts.machine_check)
        calls.append(prctl(PR_MCE_KILL, *args, what="set the machine check policy"))
    if facts.io_flusher:
        calls.append(prctl(PR_SET_IO_FLUSHER, 1, what="mark as I/O flusher"))
    for kind, state in enumerate(facts.speculation or ()):
        if state & _SPEC_PRCTL and state & _SPEC_RESTRICTED:
            # A CPU without the flaw has nothing to switch off.
            calls.append(prctl(PR_SET_SPECULATION_CTRL, kind, state & ~1, what="restrict speculation", may_fail=True))
    if facts.tsc is not None:
        calls.append(prctl(PR_SET_TSC, facts.tsc, what="forbid rdtsc"))
    if facts.cpuid == 0:
        calls.append(Call(NR.ARCH_PRCTL, (ARCH_SET_CPUID, 0), "forbid cpuid", want=0))
    return calls


def plan_personality(personality: int) -> list[Call]:
    """Late, because READ_IMPLIES_EXEC would change what the mappings of the restore become."""
    return [Call(NR.PERSONALITY, (personality,), f"set personality {personality:#x}")]


def plan_after_credentials(entry: pb.thread_core_entry, is_noticed: Callable[[int], bool]) -> list[Call]:
    """A change of ids clears the parent-death signal, so it comes after. 0 is set too: a restore has one of its own.

    The root's parent is the restoring thread, which ends when the restore does: its signal would come at once. The one
    whose death it was about is outside of the tree, and not there any more. So the root gets only a signal that it does
    not notice; for others ``is_noticed`` says no to every signal.
    """
    signal = 0 if is_noticed(entry.pdeath_sig) else entry.pdeath_sig
    return [prctl(PR_SET_PDEATHSIG, signal, what=f"parent-death signal {signal}", want=0)]


def plan_last(facts: ProcessFacts) -> list[Call]:
    """In the leader when everything else is done: MDWE forbids what a restore does."""
    if not facts.mdwe:
        return []
    return [prctl(PR_SET_MDWE, facts.mdwe, what="deny memory that is writable and executable")]


def check(facts: ProcessFacts, where: str, may_use_resources: bool) -> list[Finding]:
    """What takes CAP_SYS_RESOURCE (``may_use_resources``)."""
    found = []
    if not may_use_resources:
        if facts.memory_merge:
            found.append(Finding(where, "merging of equal pages is on", "switching it on needs CAP_SYS_RESOURCE"))
        if any(t.io_flusher for t in facts.threads.values()):
            found.append(Finding(where, "is an I/O flusher", "becoming one needs CAP_SYS_RESOURCE"))
    return found
