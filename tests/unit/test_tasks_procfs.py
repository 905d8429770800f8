"""Parsers for /proc, on text that has every trap in it and on the live files."""

from __future__ import annotations

import os
import subprocess
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpurestore.errors import ImageError, NoSuchTaskError
from gpurestore.tasks import cpu, procfs
from gpurestore.tasks.facts import ProcessFacts

STAT = (
    b"12976 (a) R (b) T 12966 12960 6848 34816 -1 4194304 102 0 0 0 0 0 0 0 20 -5 3 0 217545 3133440 390 "
    b"18446744073709551615 94898392207360 94898392227241 140732792997568 0 0 0 0 0 0 0 0 0 17 1 0 0 0 0 0 "
    b"94898392243248 94898392244864 94898533457920 140732793002720 140732793002740 140732793002740 140732793004011 9\n"
)
TIMERS = """\
ID: 3
signal: 10/0000000000001234
notify: signal/tid.12974
ClockID: 1
ID: 1
signal: 34/ffffffffffffffff
notify: none/pid.12974
ClockID: -6
"""


def test_a_name_with_brackets_does_not_confuse_stat():
    stat = procfs.parse_stat(STAT)
    assert (stat.comm, stat.state, stat.ppid, stat.pgid, stat.sid) == (b"a) R (b", "T", 12966, 12960, 6848)
    assert (stat.nice, stat.nr_threads, stat.exit_signal, stat.exit_code) == (-5, 3, 17, 9)


def test_timers_are_read_in_the_order_of_their_ids():
    first, second = procfs.parse_timers(TIMERS)
    assert (first.timer_id, first.signal, first.value, first.notify, first.clock) == (1, 34, (1 << 64) - 1, 1, -6)
    assert (second.to_thread, second.target, second.value) == (True, 12974, 0x1234)
    assert procfs.parse_timers("") == []


@given(st.sets(st.integers(0, 500)))
def test_cpu_lists_round_trip(cpus):
    assert procfs.parse_cpu_list(procfs.format_cpu_list(frozenset(cpus))) == cpus


def test_the_live_files_of_this_process_are_understood():
    pid = os.getpid()
    assert procfs.stat(pid).ppid == procfs.status(pid).ppid == os.getppid()
    assert procfs.status(pid).uids[0] == os.getuid()
    assert len(procfs.limits(pid)) == procfs.NR_LIMITS
    assert procfs.comm(pid) == procfs.stat(pid).comm
    assert procfs.personality(pid) >= 0
    assert procfs.online_cpus()
    assert cpu.check(cpu.record()) == []


def test_threads_come_with_the_leader_first_and_children_with_every_thread():
    ready, done = threading.Event(), threading.Event()
    children = []

    def work():
        child = os.fork()
        if child == 0:
            os.read(0, 0)
            signal_wait()
        children.append(child)
        ready.set()
        done.wait()

    def signal_wait():
        import signal

        while True:
            signal.pause()

    thread = threading.Thread(target=work)
    thread.start()
    ready.wait()
    try:
        assert procfs.threads(os.getpid())[0] == os.getpid()
        assert thread.native_id in procfs.threads(os.getpid())
        assert children[0] in procfs.children(os.getpid())
    finally:
        done.set()
        thread.join()
        os.kill(children[0], 9)
        os.waitpid(children[0], 0)


def test_a_process_that_is_gone_is_a_typed_error():
    child = os.fork()
    if child == 0:
        os._exit(0)
    os.waitpid(child, 0)
    with pytest.raises(NoSuchTaskError):
        procfs.stat(child)
    with pytest.raises(NoSuchTaskError):
        procfs.threads(child)


def test_a_feature_that_is_not_here_is_found():
    recorded = cpu.record() | {"features": ["sse2", "amx_quantum"], "name": "a CPU of tomorrow"}
    (found,) = cpu.check(recorded)
    assert "amx_quantum" in str(found)
    assert "sse2" not in str(found)


_KEYS = st.sampled_from(["threads", "1", "22", "xstate", "affinity", "mdwe", "sched", "comm", "x"])
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(_KEYS, inner, max_size=4),
    max_leaves=12,
)


@given(json_values)
def test_any_json_is_facts_or_an_image_error(value):
    try:
        facts = ProcessFacts.from_json(value, "test")
    except ImageError:
        return
    assert ProcessFacts.from_json(facts.to_json(), "test") == facts


def test_a_number_is_found_as_process_group_or_session():
    with subprocess.Popen(["sleep", "60"], start_new_session=True) as leader:
        pid = leader.pid
        try:
            assert [stat.pid for stat in procfs.processes_named({pid})] == [pid]
            assert {stat.pid for stat in procfs.processes_named({os.getpgid(0)})} >= {os.getpid()}
            assert {stat.pid for stat in procfs.processes_named({os.getsid(0)})} >= {os.getpid()}
            leader.kill()
            os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
            assert [stat.state for stat in procfs.processes_named({pid})] == ["Z"]
        finally:
            leader.kill()
    assert list(procfs.processes_named({pid})) == []
