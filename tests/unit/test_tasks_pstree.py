"""Trees, sessions and groups: planned, and the plans carried out for real by a small interpreter."""

from __future__ import annotations

import os

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.selfcalls import execute, in_child

from gpurestore.errors import ImageError
from gpurestore.images import pb
from gpurestore.syscalls import NR
from gpurestore.tasks import births, pstree
from gpurestore.tasks.pstree import Birth, Run


def _entry(pid, ppid, pgid, sid, threads=()):
    return pb.pstree_entry(pid=pid, ppid=ppid, pgid=pgid, sid=sid, threads=[pid, *threads])


def _core(exit_code=None):
    core = pb.core_entry(mtype=pb.core_entry.X86_64)
    core.tc.task_state = pstree.TASK_ALIVE if exit_code is None else pstree.TASK_DEAD
    core.tc.exit_code = exit_code or 0
    core.tc.personality = core.tc.flags = core.tc.blk_sigset = 0
    core.tc.comm = "x"
    return core


def _plan(entries, **dead):
    cores = {e.pid: _core(dead.get(f"p{e.pid}")) for e in entries}
    return pstree.plan(entries, cores)


def _simulate(steps, outside=(7, 7)):
    """Sessions and groups by pid as the kernel would have them after the steps; (sid, pgid) outside."""
    state, reaped = {}, []
    for step in steps:
        if isinstance(step, Birth):
            assert step.pid not in state
            state[step.pid] = outside if step.parent is None else state[step.parent]
            continue
        for call in step.calls:
            sid, _ = state[step.pid]
            match call.nr:
                case NR.SETSID:
                    assert step.pid not in {p for _, p in state.values()}
                    state[step.pid] = (step.pid, step.pid)
                case NR.SETPGID:
                    group = call.args[1] or step.pid
                    assert sid != step.pid, "a session leader cannot change its group"
                    assert group == step.pid or (sid, group) in state.values()
                    state[step.pid] = (sid, group)
                case NR.WAIT4:
                    reaped.append(call.args[0])
    for pid in reaped:
        del state[pid]
    return state


def test_a_daemon_like_tree_is_planned_in_an_order_that_works():
    entries = [
        _entry(100, 0, 100, 100),
        _entry(101, 100, 101, 101),  # its own session
        _entry(102, 101, 102, 100),  # born before 101 founded it
        _entry(103, 101, 103, 101),
        _entry(104, 103, 103, 101),
        _entry(105, 100, 103 - 3, 100),
    ]
    planned = _plan(entries)
    assert planned.findings == []
    assert _simulate(planned.steps) == {e.pid: (e.sid, e.pgid) for e in entries}


def test_a_shell_job_stays_in_the_session_and_group_of_the_restorer():
    entries = [_entry(100, 0, 50, 40), _entry(101, 100, 50, 40), _entry(102, 100, 102, 40), _entry(103, 102, 103, 103)]
    assert _simulate(_plan(entries).steps) == {100: (7, 7), 101: (7, 7), 102: (7, 102), 103: (103, 103)}


def test_a_group_whose_leader_is_gone_gets_a_helper_for_a_moment():
    entries = [_entry(100, 0, 100, 100), _entry(102, 100, 101, 100), _entry(103, 100, 101, 100)]
    planned = _plan(entries)
    assert [b.pid for b in planned.births if b.helper] == [101]
    assert _simulate(planned.steps) == {e.pid: (e.sid, e.pgid) for e in entries}


@pytest.mark.parametrize(
    "entries",
    [
        [_entry(100, 0, 100, 100), _entry(101, 100, 101, 101), _entry(102, 100, 101, 101)],  # adopted by 100
        [_entry(100, 0, 100, 100), _entry(101, 100, 99, 99)],  # the leader of its session is gone
        [_entry(100, 0, 100, 100), _entry(101, 100, 101, 101), _entry(102, 101, 100, 100), _entry(103, 102, 98, 98)],
    ],
)
def test_a_session_that_cannot_have_been_inherited_is_found(entries):
    assert _plan(entries).findings


@given(
    st.lists(st.tuples(st.integers(0, 8), st.sampled_from(["same", "group", "session", "old session"])), max_size=12),
    st.sets(st.integers(101, 112)),
)
def test_every_tree_that_forks_could_have_made_is_planned_right(history, heirs):
    """Processes fork, found groups and sessions in any order; what comes out must be possible again."""
    state = {100: (0, (100, 100))}
    for number, (who, kind) in enumerate(history):
        parent = list(state)[who % len(state)]
        pid = 101 + number
        sid, pgid = state[parent][1]
        state[pid] = (parent, (sid, pgid))
        if kind == "group":
            state[pid] = (parent, (sid, pid))
        elif kind == "session":
            state[pid] = (parent, (pid, pid))
        elif kind == "old session" and sid != parent and pgid != parent:
            state[parent] = (state[parent][0], (parent, parent))
    groups = {pid: s for pid, (_, s) in state.items()}
    entries = [_entry(pid, ppid, pgid, sid) for pid, (ppid, (sid, pgid)) in state.items()]
    # A member whose group's leader went into a session of its own is left over: a helper cannot have that pid.
    torn = any(groups[g][0] != sid for sid, g in groups.values())
    planned = _plan(entries)
    if torn:
        assert planned.findings
    else:
        assert planned.findings == []
        assert _simulate(planned.steps) == groups
        late = births.schedule(planned, heirs)
        assert _simulate(_as_late_as_can_be(late)) == groups
        _check_moments(late, planned, heirs & state.keys())


def _as_late_as_can_be(late):
    """An order that obeys the schedule: heirs come when their siblings are there, whoever is free first."""
    done, steps, waiting = set(), list(late.first), dict(late.later)
    done.update(step.pid for step in steps if isinstance(step, Birth))
    while waiting:
        heir = max(h for h, s in waiting.items() if s[0].parent in done and late.previous.get(h, 100) in done | {100})
        steps += waiting.pop(heir)
        done.update(step.pid for step in steps if isinstance(step, Birth))
    return [*steps, *late.last]


def _check_moments(late, planned, heirs):
    """Nobody waits for memory but heirs, their children, and whoever comes behind them for a reason."""
    assert late.later.keys() <= heirs
    for heir, steps in late.later.items():
        assert steps[0].pid == heir
        assert late.with_heir[heir] == heir
    for birth in planned.births:
        with_heir = late.with_heir.get(birth.pid)
        if birth.pid in heirs:
            assert birth in late.later[with_heir]
            assert birth.parent == late.later[with_heir][0].parent
        elif birth.parent is not None and not birth.helper and with_heir is None:
            assert late.with_heir.get(birth.parent) is None
    if not heirs:
        assert late.last == []


def test_children_that_inherit_nothing_do_not_wait_for_those_that_do():
    planned = _plan([_entry(pid, 100 if pid > 100 else 0, 100, 100) for pid in (100, 101, 102, 103)])
    late = births.schedule(planned, {101, 103})
    assert [s.pid for s in late.first if isinstance(s, Birth)] == [100, 102]
    assert (late.with_heir, late.previous, late.last) == ({101: 101, 103: 101}, {}, [])


def test_heirs_of_one_parent_are_born_some_at_a_time():
    pids = range(101, 103 + births.HEIRS_AT_ONCE)
    planned = _plan([_entry(100, 0, 100, 100), *(_entry(pid, 100, 100, 100) for pid in pids)])
    late = births.schedule(planned, set(pids))
    assert {heir: len(steps) for heir, steps in late.later.items()} == {101: births.HEIRS_AT_ONCE, pids[-2]: 2}
    assert late.previous == {pids[-2]: 101}


def test_a_session_is_founded_when_those_who_are_not_in_it_are_born():
    planned = _plan([_entry(100, 0, 100, 100), _entry(101, 100, 101, 101), _entry(102, 101, 102, 100)])
    late = births.schedule(planned, {102})
    assert [type(step) for step in late.later[102]] == [Birth, Run]
    assert late.last[0] == planned.groups[0]


def test_zombies_die_as_soon_as_they_are_born_unless_they_have_groups_to_join():
    entries = [_entry(100, 0, 100, 100), _entry(101, 100, 100, 100), _entry(102, 100, 100, 100)]
    assert births.schedule(_plan(entries, p102=9), {101}).first[-1].exits
    entries[2].pgid = 102
    late = births.schedule(_plan(entries, p102=9), {101})
    assert [step.exits for step in late.last] == [False, True]


@pytest.mark.parametrize("status", [0, 3 << 8, 255 << 8, 9, 15, 6, 11, 34])
def test_a_zombie_gets_its_exit_status_back(status):
    def work():
        (death,) = pstree.plan([_entry(os.getpid(), 0, 1, 1)], {os.getpid(): _core(status)}).zombies
        readable, writable = os.pipe()
        pid = os.fork()
        if pid == 0:
            planned = pstree.plan([_entry(os.getpid(), 0, 1, 1)], {os.getpid(): _core(status)}).zombies[0]
            execute(planned.calls)
            os._exit(99)
        os.close(readable), os.close(writable)
        assert death.exits
        return os.waitpid(pid, 0)[1]

    assert in_child(work) == status


def test_taken_pids_are_named_with_their_owner():
    child = os.fork()
    if child == 0:
        os._exit(0)
    os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)
    try:
        free = 4_000_001
        found = {t.pid: t for t in pstree.taken([_entry(free, 0, free, free), _entry(child, free, free, free)])}
        assert list(found) == [child]
        assert found[child].is_zombie
        assert found[child].of == os.getpid()
        assert f"pid {os.getpid()}" in found[child].description
    finally:
        os.waitpid(child, 0)
    (me,) = pstree.taken([_entry(os.getpid(), 0, os.getpid(), os.getpid())])
    assert not me.is_zombie


def _raw(pid, ppid, threads):
    return pb.pstree_entry(pid=pid, ppid=ppid, pgid=1, sid=1, threads=threads)


@pytest.mark.parametrize(
    "entries",
    [
        [],
        [_raw(0, 0, [0])],
        [_raw(5, 0, [5]), _raw(5, 5, [5])],
        [_raw(5, 0, [5]), _raw(6, 9, [6])],
        [_raw(5, 0, [5]), _raw(6, 0, [6])],
        [_raw(5, 0, [5, 6]), _raw(6, 5, [6])],
        [_raw(5, 0, [5, 6, 6])],
        [_raw(1 << 31, 0, [1 << 31])],
    ],
)
def test_entries_that_are_no_tree_are_refused(entries):
    with pytest.raises(ImageError):
        pstree.checked(entries)


def test_steps_wait_for_a_helper_to_end_before_it_is_reaped():
    planned = _plan([_entry(100, 0, 100, 100), _entry(102, 100, 101, 100)])
    assert [type(s) for s in planned.steps[-2:]] == [Run, Run]
    assert planned.steps[-2].exits
    assert planned.steps[-1].pid == 100


def test_entries_as_criu_writes_them_are_brought_into_our_order():
    leader, zombie = pstree.checked([_raw(5, 0, [6, 5]), _raw(7, 5, [0])])
    assert list(leader.threads) == [5, 6]
    assert list(zombie.threads) == [7]
