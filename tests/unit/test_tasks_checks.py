"""What is found before a restore touches anything, and what images may do to the planners: nothing but typed errors."""

from __future__ import annotations

import os

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.selfcalls import LAYOUT, SelfTask

from gpurestore.errors import GpurestoreError, ImageError
from gpurestore.images import pb
from gpurestore.tasks import cores, cpu, limits, procfs, pstree, timers
from gpurestore.tasks.credentials import Credentials
from gpurestore.tasks.facts import ProcessFacts, ThreadFacts
from gpurestore.tasks.procfs import UNLIMITED, TimerLine
from gpurestore.tasks.restorer import Restorer

USER = Restorer(Credentials((1000,) * 4, (1000,) * 4, (1000,)), ((UNLIMITED, UNLIMITED),) * 13 + ((0, 0),) * 3)


@pytest.fixture(autouse=True)
def _fixed_cpu(monkeypatch):
    monkeypatch.setattr(cpu, "xstate_layout", lambda: LAYOUT)


@pytest.fixture(scope="module")
def own():
    """Core entry, facts and pid of this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu, "xstate_layout", lambda: LAYOUT)
        task = SelfTask()
        collected, facts = cores.collect(task, [])
        return collected[task.pid], ProcessFacts.from_json(facts, "test"), task.pid


def _checks(core, facts, pid, restorer):
    entry = pb.pstree_entry(pid=pid, ppid=0, pgid=pid, sid=pid, threads=[pid])
    return [str(f) for f in cores.checks([entry], {pid: core}, {pid: facts}, restorer)]


def _copy(core):
    return pb.core_entry.FromString(core.SerializeToString())


def test_nothing_stands_against_restoring_ourselves(own):
    core, facts, pid = own
    here = Restorer.here()._replace(owns_pid_namespace=True)
    capable = here.credentials._replace(effective=here.credentials.effective | 1 << 40)
    assert _checks(core, facts, pid, here._replace(credentials=capable._replace(securebits=0))) == []


def test_all_that_an_ordinary_user_lacks_is_listed_at_once(own):
    core, facts, pid = _copy(own[0]), ProcessFacts(), own[2]
    core.thread_core.sched_nice = -5
    core.thread_core.sched_policy = 1
    core.thread_core.sched_prio = 50
    core.tc.rlimits.rlimits[15].cur = core.tc.rlimits.rlimits[15].max = 77
    core.tc.timers.posix.add(
        it_id=1, clock_id=8, si_signo=1, it_sigev_notify=0, sival_ptr=0, overrun=0, isec=0, insec=0, vsec=0, vnsec=0
    )
    facts.threads[pid] = ThreadFacts(affinity="4000-4001", ioprio=1 << 13, io_flusher=1)
    creds = core.thread_core.creds
    creds.uid = creds.euid = creds.suid = creds.fsuid = 4242
    found = "\n".join(_checks(core, facts, pid, USER._replace(pid_max=2)))
    for word in (
        *("pid_max", "CAP_CHECKPOINT_RESTORE", "nice -5", "real-time priority 50", "RLIMIT_RTTIME is 77"),
        *("CAP_WAKE_ALARM", "CPUs 4000-4001", "I/O priority", "I/O flusher", "user 4242", "CAP_SETUID"),
    ):
        assert word in found


def test_ids_outside_of_the_user_namespace_are_found(own):
    core, facts, pid = own
    restorer = USER._replace(uid_ranges=((0, 1),), gid_ranges=((0, 1),), in_user_namespace=True)
    other = _copy(core)
    other.thread_core.creds.uid = 5
    assert any("user id 5: it does not exist" in f for f in _checks(other, facts, pid, restorer))


@pytest.mark.parametrize(
    "damage",
    [
        lambda c: c.ClearField("tc"),
        lambda c: c.ClearField("thread_core"),
        lambda c: c.ClearField("thread_info"),
        lambda c: c.thread_core.ClearField("creds"),
        lambda c: c.tc.ClearField("timers"),
        lambda c: setattr(c, "mtype", pb.core_entry.ARM),
        lambda c: setattr(c.tc, "task_state", 77),
        lambda c: setattr(c.thread_core, "pdeath_sig", 65),
    ],
)
def test_a_core_image_without_what_every_task_has_is_refused(own, damage):
    core = _copy(own[0])
    damage(core)
    with pytest.raises(ImageError):
        _checks(core, own[1], own[2], USER)


@given(st.data())
def test_whatever_a_core_image_holds_there_are_calls_or_typed_errors(own, data):
    raw = bytearray(own[0].SerializeToString())
    for _ in range(data.draw(st.integers(1, 4))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    core = pb.core_entry()
    try:
        core.ParseFromString(bytes(raw))
    except Exception:  # the reader's error, not ours
        return
    facts, pid = own[1], own[2]
    try:
        _checks(core, facts, pid, USER)
        cores.plan_process(core, facts, USER, pid)
        cores.plan_thread(core, facts, USER, pid, pid)
        cores.registers(core, facts, pid)
        pstree.plan([pb.pstree_entry(pid=pid, ppid=0, pgid=pid, sid=pid, threads=[pid])], {pid: core})
    except GpurestoreError:
        pass


def test_limits_are_lifted_for_the_restore_and_set_at_its_end():
    have = [(10, 100)] * 16
    want = [(5, 100)] * 16
    room = limits.plan_room(want, have)
    assert {call.args[1] for call in room} == {1, 2, 6, 7, 8, 9, 11}
    assert len(limits.plan(want, have)) == 16
    assert limits.plan_room([(100, 100)] * 16, [(100, 100)] * 16) == []
    assert limits.check(want, have, "pid 7", may_raise=False) == []
    assert len(limits.check([(1, 101)] * 16, have, "pid 7", may_raise=False)) == 16


def test_timers_on_clocks_that_cannot_be_named_are_found():
    def line(clock, to_thread=False, target=7):
        return TimerLine(1, 10, 0, 0, target, to_thread, clock)

    other = ~9 << 3 | 6
    assert timers.findings([line(1), line(-6), line(-2)], 7, [7]) == []
    assert len(timers.findings([line(-2)], 7, [7, 8])) == 1
    assert len(timers.findings([line(other)], 7, [7, 8])) == 1
    assert timers.findings([line(other)], 7, [7, 9]) == []
    assert len(timers.findings([line(1, True, 99)], 7, [7])) == 1


def test_a_floor_below_the_own_oom_score_is_tried_and_undone():
    before = procfs.oom_score_adj(os.getpid())
    limits.check_oom_score(before - 1 if before > -1000 else before, before, "pid 7")
    assert procfs.oom_score_adj(os.getpid()) == before


def test_the_root_does_not_die_with_the_restoring_thread(own):
    core, facts, pid = _copy(own[0]), own[1], own[2]

    def death_signal(signal, root):
        core.thread_core.pdeath_sig = signal
        calls = cores.plan_thread(core, facts, USER, pid, pid, root=core if root else None)
        return next(call.args[1] for call in calls if call.what.startswith("parent-death signal"))

    for fatal in (9, 15):
        assert (death_signal(fatal, False), death_signal(fatal, True)) == (fatal, 0)
    settable = [n for n in range(1, 65) if n not in (9, 19)]
    core.tc.sigactions[settable.index(28)].sigaction = 0
    core.tc.sigactions[settable.index(15)].sigaction = 1
    assert [death_signal(n, True) for n in (28, 15)] == [28, 15]  # nothing happens when they come


def test_a_name_that_is_no_valid_text_is_set_as_it_is(own):
    raw = own[0].SerializeToString()
    comm = own[0].thread_core.comm.encode()
    core = pb.core_entry.FromString(raw.replace(comm, b"\xff" * len(comm)))
    calls = cores.plan_thread(core, ProcessFacts(), USER, own[2], own[2])
    assert calls[0].args[1].payload.rstrip(b"\0") == (b"\xff" * len(comm))[:15]
