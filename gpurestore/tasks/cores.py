"""The core image of a process and its threads, put together out of one module per resource.

Dump: :func:`collect`. Restore, in this order: :func:`plan_process` ``early`` in the leader before its mappings,
``late`` in the leader when memory and all threads are there, :func:`plan_thread` in every thread (leaders last), then
:func:`registers` through ptrace. Every plan is pure; what the restorer already has costs no call.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from gpurestore.batch import Call
from gpurestore.errors import Finding, GpurestoreError, ImageError
from gpurestore.images import pb
from gpurestore.tasks import (
    cpu,
    credentials,
    limits,
    prctls,
    procfs,
    pstree,
    scheduling,
    signals,
    threads,
    timers,
)
from gpurestore.tasks import registers as regs
from gpurestore.tasks.calls import Answers, Questions, join
from gpurestore.tasks.facts import ProcessFacts, ThreadFacts
from gpurestore.tasks.mm import plan_dumpable
from gpurestore.tasks.restorer import Restorer

if TYPE_CHECKING:
    from gpurestore.core import ThreadState
    from gpurestore.tasks.frozen import FrozenTask, FrozenThread

_SETTLE_ATTEMPTS = 16


class ProcessPlan(NamedTuple):
    """Calls for the leader: ``early`` before mappings, ``late`` after memory and threads."""

    early: list[Call]
    late: list[Call]


# ---- dump ----


def collect(task: FrozenTask, found: list[Finding]) -> tuple[dict[int, pb.core_entry], dict[str, Any]]:
    """Core entries by thread id, and the process's facts for the manifest's ``tasks`` (see facts.py)."""
    stat = procfs.stat(task.pid)
    if task.zombie:
        if stat.nr_threads > 1:
            why = f"{stat.nr_threads - 1} other threads go on, and such a process cannot be made again"
            found.append(Finding(f"pid {task.pid}", "its first thread has ended", why))
        return {task.pid: _dead(task)}, {}
    facts = ProcessFacts(exit_signal=stat.exit_signal if stat.exit_signal != signals.SIGCHLD else None)
    lines = procfs.timers(task.pid)
    tids = [thread.tid for thread in task.threads]
    found += timers.findings(lines, task.pid, tids)
    online = procfs.online_cpus()
    cores = {}
    for thread in task.threads:
        leader = thread.tid == task.pid
        core = pb.core_entry(mtype=pb.core_entry.X86_64)
        facts.threads[thread.tid] = ThreadFacts()
        asked = _questions(leader)
        answers = _ask(task, asked, thread.tid)
        found += _collect_thread(task, thread, answers, core, facts.threads[thread.tid], online)
        if leader:
            found += _collect_process(task, thread, stat, answers, core, facts)
        cores[thread.tid] = core
    _collect_moving(task, lines, cores)
    return cores, facts.to_json()


def check_agent(task: FrozenTask) -> list[Finding]:
    """What cannot be carried and must be known before the agent runs, because it may trap the agent's calls."""
    found = []
    for tid, state in task.threads:
        where = f"pid {task.pid}" if tid == task.pid else f"pid {task.pid}, thread {tid}"
        if state.dispatches_calls:
            why = "what a dump asks the task would be dispatched, too"
            found.append(Finding(where, "system calls dispatched to user space", why))
        if state.opens_ports:
            found.append(Finding(where, "access to I/O ports", "ioperm is not carried"))
    return found


def _questions(leader: bool) -> Questions:
    asked = threads.questions() | scheduling.questions() | prctls.thread_questions() | credentials.questions()
    return asked | signals.questions() | prctls.process_questions() if leader else asked


def _ask(task: FrozenTask, asked: Questions, tid: int) -> Answers:
    return dict(zip(asked, task.ask(list(asked.values()), tid), strict=True))


def _collect_thread(
    task: FrozenTask,
    thread: FrozenThread,
    answers: Answers,
    core: pb.core_entry,
    facts: ThreadFacts,
    online: frozenset[int],
) -> list[Finding]:
    pid, tid, state = task.pid, thread.tid, thread.state
    where = f"pid {pid}" if tid == pid else f"pid {pid}, thread {tid}"
    status = procfs.status(pid, tid)
    found = prctls.findings(status, where)
    found += regs.collect(state, _reader(task), cpu.xstate_layout(), core, facts)
    threads.collect(answers, procfs.comm(pid, tid), state.rseq, core, facts)
    entry = core.thread_core
    entry.blk_sigset = state.sigmask
    scheduling.collect(answers, entry, facts, online)
    credentials.fill(entry.creds, credentials.collect(status, answers))
    found += prctls.collect_thread(answers, procfs.stat(pid, tid), entry, facts, where)
    facts.personality = procfs.personality(pid, tid)
    label = procfs.security_label(pid, tid)
    if label not in ("", "unconfined", "kernel") and label != procfs.security_label(os.getpid()):
        found.append(Finding(where, f"security label {label}", "it is not ours, and labels are not carried"))
    return found


def _reader(task: FrozenTask) -> Callable[[int, int], bytes]:
    def read(address: int, size: int) -> bytes:
        try:
            return bytes(task.read_memory(address, size))
        except GpurestoreError as error:
            raise OSError(str(error)) from error

    return read


def _collect_process(
    task: FrozenTask,
    leader: FrozenThread,
    stat: procfs.Stat,
    answers: Answers,
    core: pb.core_entry,
    facts: ProcessFacts,
) -> list[Finding]:
    tc = core.tc
    tc.task_state = pstree.TASK_STOPPED if task.stop_signal else pstree.TASK_ALIVE
    if task.stop_signal:
        tc.stop_signo = task.stop_signal
    tc.exit_code = 0
    tc.flags = stat.flags & 0xFFFFFFFF
    tc.personality = facts.threads[task.pid].personality or 0
    tc.comm = core.thread_core.comm
    tc.blk_sigset = leader.state.sigmask
    limits.collect(task.pid, tc)
    signals.collect_actions(answers, tc)
    return prctls.collect_process(answers, task.pid, tc, facts)


def _collect_moving(task: FrozenTask, lines: Sequence[procfs.TimerLine], cores: Mapping[int, pb.core_entry]) -> None:
    """Timers and pending signals. Timers go on while tasks are frozen: an expiry must show up as time left or as a
    signal, not as both and not as neither, so both are read until no signal came in between."""
    asked = timers.questions(lines)
    pending = _pending(task, cores)
    for _ in range(_SETTLE_ATTEMPTS):
        answers = _ask(task, asked, task.pid)
        before, pending = pending, _pending(task, cores)
        if before == pending:
            break
    timers.collect(lines, answers, cores[task.pid].tc.timers)
    signals.collect_pending(pending.pop(0), cores[task.pid].tc.signals_s)
    for tid, infos in zip(cores, pending, strict=True):
        signals.collect_pending(infos, cores[tid].thread_core.signals_p)


def _pending(task: FrozenTask, tids: Iterable[int]) -> list[list[bytes]]:
    return [task.peek_signals(task.pid, shared=True), *(task.peek_signals(tid, shared=False) for tid in tids)]


def _dead(task: FrozenTask) -> pb.core_entry:
    core = pb.core_entry(mtype=pb.core_entry.X86_64)
    core.tc.task_state = pstree.TASK_DEAD
    core.tc.exit_code = task.exit_code & 0xFFFFFFFF
    core.tc.personality = core.tc.flags = core.tc.blk_sigset = 0
    core.tc.comm = procfs.stat(task.pid).comm.decode("utf-8", "replace")
    return core


# ---- restore ----


def plan_process(
    core: pb.core_entry, facts: ProcessFacts, restorer: Restorer, pid: int, *, is_root: bool = True
) -> ProcessPlan:
    """``is_root``: the root of the tree, the only task that is not cloned by another one."""
    tc = core.tc
    oom_score = tc.oom_score_adj if tc.HasField("oom_score_adj") else None
    early = join(
        [
            signals.plan_defaults() if is_root else [],
            limits.plan_room(limits.from_message(tc), restorer.limits),
            limits.plan_proc_files(oom_score, restorer.oom_score_adj, facts.coredump_filter),
            prctls.plan_early(facts),
        ]
    )
    late = join(
        [
            signals.plan_discard_sigchld(),
            prctls.plan_process(tc, facts),
            signals.plan_actions(tc),
            timers.plan_create(tc.timers, restorer.can_choose_timer_ids),
            signals.plan_pending(tc.signals_s, pid, None),
        ]
    )
    return ProcessPlan(early, late)


def plan_thread(
    core: pb.core_entry,
    facts: ProcessFacts,
    restorer: Restorer,
    pid: int,
    tid: int,
    mm: pb.mm_entry | None = None,
    *,
    root: pb.core_entry | None = None,
) -> list[Call]:
    """The last calls of a thread. A leader's (its core has ``tc``) come after those of its other threads: with limits,
    which take rights that its credentials then give up, and with what holds for the whole process at the very end.
    ``mm`` is needed for a leader only: credentials reset its dumpable flag. ``root`` is the leader's core in the tree's
    root, whose parent does not stay."""
    own = facts.thread(tid)
    leader = core.HasField("tc")

    def is_noticed(signal: int) -> bool:
        return root is not None and signals.is_noticed(root.tc, signal)

    plans = [
        regs.plan(own),
        threads.plan(core, own),
        scheduling.plan(core.thread_core, own),
        prctls.plan_thread(own),
        signals.plan_pending(core.thread_core.signals_p, pid, tid),
    ]
    if leader:
        plans.append(limits.plan(limits.from_message(core.tc), restorer.limits))
    personality = own.personality if own.personality is not None else core.tc.personality if leader else None
    if personality is not None:
        plans.append(prctls.plan_personality(personality))
    if core.thread_core.HasField("creds"):
        plans.append(credentials.plan(credentials.from_message(core.thread_core.creds), restorer.credentials))
    plans.append(prctls.plan_after_credentials(core.thread_core, is_noticed))
    if leader:
        if mm is not None:
            plans.append(plan_dumpable(mm))
        plans.append(prctls.plan_last(facts))
        plans.append(timers.plan_arm(core.tc.timers))
    return join(plans)


def registers(core: pb.core_entry, facts: ProcessFacts, tid: int) -> ThreadState:
    """What ptrace gives the thread in the end."""
    from gpurestore.core import Rseq, ThreadState

    entry = core.thread_core
    r = entry.rseq_entry
    rseq = Rseq(r.rseq_abi_pointer, r.rseq_abi_size, r.signature, 0) if r.rseq_abi_pointer else None
    sigmask = entry.blk_sigset if entry.HasField("blk_sigset") else core.tc.blk_sigset
    area = regs.xstate(core, facts.thread(tid), cpu.xstate_layout())
    stop = signals.stop_signal(core) if core.HasField("tc") else 0
    return ThreadState(tid, regs.general(core), area, sigmask, rseq, stop)


def checks(
    entries: Sequence[pb.pstree_entry],
    cores: Mapping[int, pb.core_entry],
    facts: Mapping[int, ProcessFacts],
    restorer: Restorer,
) -> list[Finding]:
    """What stands against a restore and can be known before it. ``cores`` are by thread id. Whether pids are free is
    :func:`pstree.taken`'s."""
    found: list[Finding] = []
    highest = max(tid for e in entries for tid in (e.pid, *e.threads))
    if highest >= restorer.pid_max:
        found.append(Finding(f"pid {highest}", f"at or above pid_max {restorer.pid_max}", "raise kernel.pid_max"))
    if not restorer.may_set_pids:
        why = "choosing pids needs CAP_CHECKPOINT_RESTORE (or CAP_SYS_ADMIN) in the owner of our pid namespace"
        found.append(Finding("restorer", "cannot give tasks their pids", why))
    for entry in entries:
        leader = cores[entry.pid]
        _validate(leader, entry.pid, entry.pid)
        if leader.tc.task_state not in pstree.DEAD:
            found += _check_process(entry, cores, facts.get(entry.pid, ProcessFacts()), restorer)
    return found


def _check_process(
    entry: pb.pstree_entry, cores: Mapping[int, pb.core_entry], facts: ProcessFacts, restorer: Restorer
) -> list[Finding]:
    where, tc = f"pid {entry.pid}", cores[entry.pid].tc
    found = limits.check(limits.from_message(tc), restorer.limits, where, restorer.may("SYS_RESOURCE"))
    if tc.HasField("oom_score_adj"):
        found += limits.check_oom_score(tc.oom_score_adj, restorer.oom_score_adj, where)
    found += timers.check(tc.timers, where, restorer.can_choose_timer_ids, restorer.may("WAKE_ALARM"))
    found += prctls.check(facts, where, restorer.may("SYS_RESOURCE"))
    leader_creds = None
    for tid in entry.threads or (entry.pid,):
        core, own = cores[tid], facts.thread(tid)
        _validate(core, entry.pid, tid)
        place = where if tid == entry.pid else f"{where}, thread {tid}"
        if core.thread_core.seccomp_mode != pb.disabled:
            found.append(Finding(place, "seccomp", "not restored yet"))
        if lacking := regs.missing(core, own, cpu.xstate_layout()):
            found.append(Finding(place, f"registers of {', '.join(lacking)}", "this CPU does not have them"))
        found += scheduling.check(core.thread_core, own, place, restorer.nice, restorer.scheduling)
        creds = credentials.from_message(core.thread_core.creds)
        if creds != leader_creds:
            found += credentials.check(creds, restorer.credentials, place, restorer.setgroups_allowed)
            found += _check_ids(creds, place, restorer)
        if tid == entry.pid:
            leader_creds = creds
    return found


def _validate(core: pb.core_entry, pid: int, tid: int) -> None:
    """Refuse a core image that lacks what every task has: absent parts read as zeroes, which mean root."""
    name = f"core-{tid}.img"
    if core.mtype != pb.core_entry.X86_64:
        raise ImageError(f"{name}: not of an x86-64 task")
    if core.HasField("tc") != (tid == pid):
        raise ImageError(f"{name}: {'not' if tid == pid else 'wrongly'} the image of a whole process")
    if core.HasField("tc"):
        if core.tc.task_state in pstree.DEAD:
            return
        if core.tc.task_state not in (pstree.TASK_ALIVE, pstree.TASK_STOPPED):
            raise ImageError(f"{name}: unknown state {core.tc.task_state} of a process")
        if not core.tc.HasField("timers") or not core.tc.HasField("rlimits"):
            raise ImageError(f"{name}: timers or resource limits are missing")
    if not (core.HasField("thread_info") and core.HasField("thread_core") and core.thread_core.HasField("creds")):
        raise ImageError(f"{name}: registers or credentials are missing")
    if max(core.thread_core.pdeath_sig, core.tc.stop_signo) > signals.NR_SIGNALS:
        raise ImageError(f"{name}: a signal number that does not exist")


def _check_ids(creds: credentials.Credentials, where: str, restorer: Restorer) -> list[Finding]:
    found = []
    own = restorer.credentials
    for kind, ids, mine, ranges in (
        ("user", creds.uids, own.uids, restorer.uid_ranges),
        ("group", (*creds.gids, *creds.groups), (*own.gids, *own.groups), restorer.gid_ranges),
    ):
        for number in sorted(set(ids) - set(mine)):
            if not any(first <= number < first + count for first, count in ranges):
                found.append(Finding(where, f"{kind} id {number}", "it does not exist in this user namespace"))
    return found
