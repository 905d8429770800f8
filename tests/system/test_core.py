"""The tracer and the agent in live processes: what they do to a task, and what is left of it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from support import hold_agent, processes

from gpurestore import core
from gpurestore.batch import Call, Data, Out
from gpurestore.errors import CallFailedError, CoreError, TaskDiedError
from gpurestore.syscalls import NR
from gpurestore.tasks import cloning, maps
from gpurestore.tasks.frozen import FrozenTree

pytestmark = pytest.mark.usefixtures("rights")

# Sleeps a relative time in the kernel (a restart block), and computes with the FPU all the while in other threads.
SLEEPER = """
import ctypes, math, sys, threading, time
libc = ctypes.CDLL(None)
stop, bad = [], []
def work(seed):
    want = sum(math.sin(seed + i) for i in range(2000))
    while not stop:
        if sum(math.sin(seed + i) for i in range(2000)) != want: bad.append(seed)
threads = [threading.Thread(target=work, args=(n,)) for n in range(3)]
for t in threads: t.start()
print("ready", flush=True)
begin = time.monotonic()
class timespec(ctypes.Structure): _fields_ = [("s", ctypes.c_long), ("ns", ctypes.c_long)]
result = libc.nanosleep(ctypes.byref(timespec(2, 0)), None)
slept = time.monotonic() - begin
stop.append(1)
for t in threads: t.join()
print("slept", result, round(slept, 2), "bad", bad, flush=True)
sys.stdin.read()
"""
_RESTART_SYSCALL = 219
_SLEEPING = (35, 230)  # nanosleep, clock_nanosleep


@contextmanager
def running(code: str) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def in_call(pid: int) -> int | None:
    """The system call in which a task waits; None while it runs."""
    number = Path(f"/proc/{pid}/syscall").read_text().split()[0]
    return int(number) if number.isdigit() else None


def verdict(process: subprocess.Popen[str]) -> tuple[int, float, str]:
    assert process.stdout is not None
    words = process.stdout.readline().split(maxsplit=4)
    return int(words[1]), float(words[2]), words[4].strip()


def test_a_task_that_hosted_the_agent_goes_on_as_if_nothing_had_happened() -> None:
    with running(SLEEPER) as process:
        before = Path(f"/proc/{process.pid}/maps").read_text()
        for _ in range(5):
            with core.Tracer() as tracer:
                tree = FrozenTree(tracer, process.pid, [])
                tree.freeze()
                tree.describe()
                for thread in tree.tasks[process.pid].threads:
                    tree.tasks[process.pid].ask([Call(NR.SCHED_YIELD)], thread.tid)
                tree.thaw()
        assert [line.split()[0] for line in Path(f"/proc/{process.pid}/maps").read_text().splitlines()] == [
            line.split()[0] for line in before.splitlines()
        ]
        result, slept, bad = verdict(process)
        assert (result, bad) == (0, "[]")
        assert slept >= 2.0


def test_an_interrupted_sleep_keeps_its_end() -> None:
    with running(SLEEPER) as process, core.Tracer() as tracer:
        processes.wait_until(lambda: in_call(process.pid) in _SLEEPING, "it sleeps")
        tree = FrozenTree(tracer, process.pid, [])
        tree.freeze()
        tree.describe()
        tree.tasks[process.pid].ask([Call(NR.GETPID)])
        tree.thaw()
        # Not its own call begun anew: the kernel goes on with the time that was left.
        processes.wait_until(lambda: in_call(process.pid) == _RESTART_SYSCALL, "the rest of the sleep")
        result, slept, _ = verdict(process)
        assert result == 0
        assert slept >= 2.0


@pytest.mark.parametrize("how", ["killed", "closed"])
def test_a_tracer_that_goes_away_leaves_every_thread_where_it_was(how: str) -> None:
    with running(SLEEPER) as process:
        holder = subprocess.Popen(
            [sys.executable, hold_agent.__file__, str(process.pid)], stdout=subprocess.PIPE, text=True
        )
        assert holder.stdout is not None
        assert holder.stdout.readline() == "inside\n"
        holder.send_signal(signal.SIGKILL if how == "killed" else signal.SIGINT)
        holder.wait()
        holder.stdout.close()
        result, _, bad = verdict(process)
        assert (result, bad) == (0, "[]")


def test_a_call_that_fails_is_named_and_the_task_is_whole() -> None:
    with running(SLEEPER) as process, core.Tracer() as tracer:
        tree = FrozenTree(tracer, process.pid, [])
        tree.freeze()
        tree.describe()
        task = tree.tasks[process.pid]
        with pytest.raises(CallFailedError, match="looking for it: OPENAT: No such file"):
            task.ask([Call(NR.OPENAT, (-100, Data(b"/nonexistent\0"), 0), "looking for it"), Call(NR.GETPID)])
        assert task.ask([Call(NR.OPENAT, (-100, Data(b"/nonexistent\0"), 0), may_fail=True)])[0].result == -2
        assert task.ask([Call(NR.PRCTL, (16, Out(16)))])[0].outs[0].startswith(b"python")
        tree.thaw()
        assert verdict(process)[0] == 0


def test_a_task_that_is_killed_while_frozen_is_an_error_and_no_hang() -> None:
    with running(SLEEPER) as process, core.Tracer() as tracer:
        tree = FrozenTree(tracer, process.pid, [])
        tree.freeze()
        tree.describe()
        os.kill(process.pid, signal.SIGKILL)
        with pytest.raises((TaskDiedError, CoreError)):
            tree.tasks[process.pid].ask([Call(NR.GETPID)])


@pytest.fixture
def region() -> Iterator[core.Region]:
    nr_slots = 4
    with core.Region(maps.find_hole(maps.own_ranges(), core.Region.size_for(nr_slots)), nr_slots) as made:
        yield made


def free_pid() -> int:
    """A pid that is free, and so are the two below it."""
    pid = int(Path("/proc/sys/kernel/pid_max").read_text()) - 100
    while any(os.path.exists(f"/proc/{pid - n}") for n in range(3)):
        pid -= 1
    return pid


def test_tasks_and_threads_are_born_with_the_ids_that_were_asked_for(region: core.Region) -> None:
    first = free_pid()
    with core.Tracer() as tracer:
        tracer.spawn_root(region, first, 0)
        region.execute(0, first, [cloning.birth(first - 1, first, region.slot_address(1))])
        region.execute(1, first - 1, [cloning.thread(first - 2, region.slot_address(2))])
        tracer.adopt([first - 1])
        tracer.adopt([first - 2], of=first - 1)
        ask = [Call(NR.GETPID), Call(NR.GETTID), Call(NR.GETPPID)]
        assert [r.result for r in region.run(1, first - 1, ask)] == [first - 1, first - 1, first]
        assert [r.result for r in region.run(2, first - 2, ask)] == [first - 1, first - 2, first]
        with pytest.raises(CallFailedError, match=f"clone task {os.getpid()}: AGENT_CLONE: File exists"):
            region.execute(0, first, [cloning.birth(os.getpid(), first, region.slot_address(3))])
        tracer.kill([first, first - 1])


@pytest.mark.parametrize("is_adopted", [True, False])
def test_spawned_tasks_die_with_their_maker(is_adopted: bool) -> None:
    first = free_pid()
    code = f"""
import os, signal
from gpurestore import core
from gpurestore.tasks import cloning, maps
region = core.Region(maps.find_hole(maps.own_ranges(), core.Region.size_for(2)), 2)
tracer = core.Tracer()
tracer.spawn_root(region, {first}, 0)
region.execute(0, {first}, [cloning.birth({first - 1}, {first}, region.slot_address(1))])
if {is_adopted}:
    tracer.adopt([{first - 1}])
os.kill(os.getpid(), signal.SIGKILL)
"""
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == -signal.SIGKILL
    processes.wait_until(lambda: not any(map(processes.alive, (first, first - 1))), "the spawned tasks are dead")


def test_a_task_that_nobody_adopted_dies_with_its_parent(region: core.Region) -> None:
    first = free_pid()
    with core.Tracer() as tracer:
        tracer.spawn_root(region, first, 0)
        region.execute(0, first, [cloning.birth(first - 1, first, region.slot_address(1))])
        tracer.kill([first, first - 1])
        processes.wait_until(lambda: not processes.alive(first - 1), "the child is dead")


def test_a_waiter_is_cancelled_while_its_batch_runs(region: core.Region) -> None:
    pid = free_pid()
    cancel = core.Cancel()
    cancel.set()
    with core.Tracer() as tracer:
        tracer.spawn_root(region, pid, 0)
        with pytest.raises(core.CancelledError):
            region.run(0, pid, [Call(NR.PAUSE)], cancel)
        tracer.kill([pid])
