"""The state of one process, collected from ourselves and planned into a forked child of ours."""

from __future__ import annotations

import os
import resource
import signal
import struct

import pytest
from support.selfcalls import LAYOUT, SelfTask, execute, in_child

from gpurestore.batch import Call, Data, InOut
from gpurestore.images import pb
from gpurestore.syscalls import NR
from gpurestore.tasks import cores, cpu, procfs
from gpurestore.tasks.calls import prctl
from gpurestore.tasks.facts import ProcessFacts
from gpurestore.tasks.restorer import Restorer

ROOT = os.geteuid() == 0
BLOCK_ALL = Call(NR.RT_SIGPROCMASK, (2, Data(b"\xff" * 8), 0, 8), want=0)


@pytest.fixture(autouse=True)
def _fixed_cpu(monkeypatch):
    monkeypatch.setattr(cpu, "xstate_layout", lambda: LAYOUT)


def _posix_timer(timer_id, seconds, interval, signo=signal.SIGUSR2, clock=1):
    event = struct.pack("=Qiii", 0x1234, signo, 0, 0).ljust(64, b"\0")
    value = struct.pack("=qqqq", interval, 0, seconds, 500)
    return [
        prctl(77, 1),
        Call(NR.TIMER_CREATE, (clock, Data(event), InOut(struct.pack("=i", timer_id))), want=0),
        prctl(77, 0),
        Call(NR.TIMER_SETTIME, (timer_id, 0, Data(value), 0), want=0),
    ]


def _siginfo(signo, code=-1, rest=b"\1\2\3"):
    return (struct.pack("=iii", signo, 0, code) + b"\0\0\0\0" + rest).ljust(128, b"\0")


def _disturb():
    """Give this process some of everything."""
    execute([BLOCK_ALL])
    action = struct.pack("=QQQQ", 0x7F0000001000, 0x14000004, 0x7F0000002000, 0x200)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 4096))
    resource.setrlimit(resource.RLIMIT_NOFILE, (800, 900))
    os.nice(3)
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    signal.setitimer(signal.ITIMER_REAL, 1000, 7)
    signal.setitimer(signal.ITIMER_PROF, 2000)
    execute(
        [
            Call(NR.RT_SIGACTION, (10, Data(action), 0, 8)),
            Call(NR.RT_SIGACTION, (34, Data(action), 0, 8)),
            Call(NR.RT_SIGACTION, (13, Data(struct.pack("=QQQQ", 1, 0, 0, 0)), 0, 8)),
            prctl(15, Data(b"w\xc3\xb6rker\0")),
            prctl(29, 123456),  # timer slack
            prctl(36, 1),  # subreaper
            Call(NR.PERSONALITY, (0x0040000,)),
            Call(NR.SIGALTSTACK, (Data(struct.pack("=QiiQ", 0x7F0000100000, 0, 0, 65536)), 0)),
            Call(NR.IOPRIO_SET, (1, 0, 3 << 13)),
            Call(NR.MEMBARRIER, (1 << 4, 0, 0)),
            *_posix_timer(3, 1500, 9),
            *_posix_timer(700, 1600, 0, clock=0),
            prctl(1, 10),  # parent-death signal
        ]
    )
    for path, value in (("oom_score_adj", "321"), ("coredump_filter", "0x3f")):
        with open(f"/proc/self/{path}", "w") as file:
            file.write(value)


def _collect(task=None):
    findings = []
    task = task or SelfTask()
    collected, facts = cores.collect(task, findings)
    assert findings == []
    return collected[task.pid], facts


def _restore(raw, facts_json, restorer):
    core = pb.core_entry.FromString(raw)
    facts = ProcessFacts.from_json(facts_json, "test")
    pid = os.getpid()
    facts.threads = {pid: next(iter(facts.threads.values()))}
    execute([BLOCK_ALL])
    plan = cores.plan_process(core, facts, restorer, pid)
    execute(plan.early)
    execute(plan.late)
    execute(cores.plan_thread(core, facts, restorer, pid, pid))
    return sorted(signal.sigpending())


def _comparable(core, facts):
    copy = pb.core_entry()
    copy.CopyFrom(core)
    left = [timer.vsec + timer.vusec / 1e6 for timer in (copy.tc.timers.real, copy.tc.timers.prof)]
    left += [timer.vsec + timer.vnsec / 1e9 for timer in copy.tc.timers.posix]
    for timer in (copy.tc.timers.real, copy.tc.timers.prof):
        timer.vsec = timer.vusec = 0
    for timer in copy.tc.timers.posix:
        timer.vsec = timer.vnsec = 0
        timer.ClearField("notify_thread_id")
    copy.tc.ClearField("signals_s")
    copy.tc.ClearField("flags")
    copy.thread_info.ClearField("clear_tid_addr")
    return copy, left, {**facts, "threads": list(facts["threads"].values())}


def test_a_process_gets_everything_back_that_was_collected():
    def before():
        _disturb()
        core, facts = _collect(SelfTask(pending=[_siginfo(10), _siginfo(40, -2), _siginfo(40, -1)]))
        return core.SerializeToString(), facts

    raw, facts = in_child(before)
    restorer = Restorer.here()

    def after():
        pending = _restore(raw, facts, restorer)
        core, again = _collect()
        return core.SerializeToString(), again, [int(s) for s in pending]

    raw_again, facts_again, pending = in_child(after)
    first, left, first_facts = _comparable(pb.core_entry.FromString(raw), facts)
    second, left_again, second_facts = _comparable(pb.core_entry.FromString(raw_again), facts_again)
    assert second == first
    assert second_facts == first_facts
    assert pending == [10, 40]
    # The kernel rounds timers of processor time up, to its tick.
    assert all(a - 5 <= b <= a + 0.05 for a, b in zip(left, left_again, strict=True))
    assert [t.it_id for t in first.tc.timers.posix] == [3, 700]
    assert first.tc.comm == "wörker"


def test_timer_ids_are_reached_by_counting_where_they_cannot_be_chosen():
    def work():
        entry = pb.task_timers_entry()
        for timer_id in (2, 5):
            entry.posix.add(
                it_id=timer_id,
                clock_id=1,
                si_signo=10,
                it_sigev_notify=0,
                sival_ptr=0,
                overrun=0,
                isec=0,
                insec=0,
                vsec=100,
                vnsec=0,
            )
        for kind in ("real", "virt", "prof"):
            timer = getattr(entry, kind)
            timer.isec = timer.iusec = timer.vsec = timer.vusec = 0
        from gpurestore.tasks import timers

        execute(timers.plan_create(entry, can_choose_ids=False))
        execute(timers.plan_arm(entry))
        return [t.timer_id for t in procfs.timers(os.getpid())]

    assert in_child(work) == [2, 5]


def test_restoring_what_is_there_already_asks_for_no_right():
    def work():
        restorer = Restorer.here()
        core, facts = _collect()
        known = ProcessFacts.from_json(facts, "test")
        plan = cores.plan_process(core, known, restorer, os.getpid())
        last = cores.plan_thread(core, known, restorer, os.getpid(), os.getpid())
        return [call.nr for call in (*plan.early, *plan.late, *last) if not call.may_fail]

    used = set(in_child(work))
    assert not used & {NR.SETGROUPS, NR.SETRESUID, NR.SETRESGID, NR.CAPSET}
    assert NR.RT_SIGACTION in used


def test_an_unprivileged_user_can_run_the_whole_plan():
    if not ROOT:
        pytest.skip("needs root to become somebody else")

    def work():
        os.setgroups([])
        os.setresgid(1234, 1234, 1234)
        os.setresuid(1234, 1234, 1234)
        execute([prctl(4, 1)])  # dumpable again, as after exec
        core, facts = _collect()
        _restore(core.SerializeToString(), facts, Restorer.here())
        return "done"

    assert in_child(work) == "done"


def test_the_facts_of_a_process_survive_json():
    def work():
        _disturb()
        _, facts = _collect()
        return facts

    facts = in_child(work)
    assert ProcessFacts.from_json(facts, "test").to_json() == facts
