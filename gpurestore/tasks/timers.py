"""Interval timers and POSIX timers of a process.

What is kept is the time that was left and the interval. Timers are created early enough for limits and threads to be
right, but armed last, so that little of the restore itself runs off them.
"""

from __future__ import annotations

import struct
from collections.abc import Collection, Iterable, Sequence
from typing import TYPE_CHECKING

from gpurestore.batch import Call, Data, InOut, Out
from gpurestore.errors import Finding, ImageError
from gpurestore.syscalls import NR
from gpurestore.tasks.calls import Answers, Questions, prctl
from gpurestore.tasks.procfs import TimerLine

if TYPE_CHECKING:
    from gpurestore.images import pb

_PAIR = struct.Struct("=qqqq")  # interval and time left, of struct itimerval (us) and itimerspec (ns) alike
_KINDS = ("real", "virt", "prof")  # ITIMER_REAL 0, ITIMER_VIRTUAL 1, ITIMER_PROF 2

SIGEV_SIGNAL, SIGEV_NONE, SIGEV_THREAD, SIGEV_THREAD_ID = 0, 1, 2, 4
_SIGEVENT_BYTES = 64
PR_TIMER_CREATE_RESTORE_IDS, _IDS_OFF, _IDS_ON = 77, 0, 1  # since 6.16
_PROCESS_CLOCK, _THREAD_CLOCK = -6, -2  # CLOCK_PROCESS_CPUTIME_ID and CLOCK_THREAD_CPUTIME_ID as /proc shows them
_ALARM_CLOCKS = (8, 9)
# Without PR_TIMER_CREATE_RESTORE_IDS an id is reached by using up all ids below it.
MOST_IDS_COUNTED = 20_000


def questions(lines: Iterable[TimerLine]) -> Questions:
    """``lines`` are the POSIX timers that /proc shows; the leader is asked how much is left of each."""
    asked: Questions = {
        f"itimer {kind}": Call(NR.GETITIMER, (number, Out(_PAIR.size)), f"read interval timer {kind}")
        for number, kind in enumerate(_KINDS)
    }
    for line in lines:
        n = line.timer_id
        asked[f"timer {n}"] = Call(NR.TIMER_GETTIME, (n, Out(_PAIR.size)), f"read POSIX timer {n}")
        asked[f"overrun {n}"] = Call(NR.TIMER_GETOVERRUN, (n,), f"read the overrun of POSIX timer {n}")
    return asked


def collect(lines: Sequence[TimerLine], answers: Answers, entry: pb.task_timers_entry) -> None:
    """Time left and interval of every timer."""
    for kind in _KINDS:
        timer = getattr(entry, kind)
        timer.isec, timer.iusec, timer.vsec, timer.vusec = _PAIR.unpack(answers[f"itimer {kind}"].outs[0])
    for line in lines:
        isec, insec, vsec, vnsec = _PAIR.unpack(answers[f"timer {line.timer_id}"].outs[0])
        timer = entry.posix.add(
            it_id=line.timer_id,
            clock_id=line.clock & 0xFFFFFFFF,
            si_signo=line.signal,
            it_sigev_notify=line.notify | (SIGEV_THREAD_ID if line.to_thread else 0),
            sival_ptr=line.value,
            overrun=max(0, answers[f"overrun {line.timer_id}"].result),
            isec=isec,
            insec=insec,
            vsec=vsec,
            vnsec=vnsec,
        )
        if line.to_thread:
            timer.notify_thread_id = line.target


def findings(lines: Iterable[TimerLine], pid: int, tids: Collection[int]) -> list[Finding]:
    """Timers on clocks that a restore could not name again."""
    found = []
    for line in lines:
        where = f"pid {pid}, POSIX timer {line.timer_id}"
        if line.to_thread and line.target not in tids:
            found.append(Finding(where, f"notifies thread {line.target}", "that thread is gone"))
        if line.clock >= 0 or line.clock == _PROCESS_CLOCK:
            continue
        if line.clock == _THREAD_CLOCK:
            if len(tids) > 1:
                found.append(Finding(where, "runs on a thread's CPU clock", "the kernel does not tell which thread's"))
        elif (owner := ~(line.clock >> 3)) not in (0, *tids):
            found.append(Finding(where, f"runs on the CPU clock of task {owner}", "that is another process"))
    return found


def plan_create(entry: pb.task_timers_entry, can_choose_ids: bool) -> list[Call]:
    """Create all POSIX timers, disarmed, with their old ids. Runs in the leader, when all threads are there."""
    timers = sorted(entry.posix, key=lambda t: t.it_id)
    if not timers:
        return []
    if can_choose_ids:
        calls = [prctl(PR_TIMER_CREATE_RESTORE_IDS, _IDS_ON, what="choose ids of POSIX timers")]
        calls.extend(_create(t) for t in timers)
        calls.append(prctl(PR_TIMER_CREATE_RESTORE_IDS, _IDS_OFF, what="let the kernel choose ids of POSIX timers"))
        return calls
    # The kernel counts ids up from 0 in a new process.
    calls, next_id = [], 0
    for timer in timers:
        for unused in range(next_id, timer.it_id):
            calls.append(_create_unused(unused))
            calls.append(Call(NR.TIMER_DELETE, (unused,), f"give up POSIX timer {unused}", want=0))
        calls.append(_create(timer))
        next_id = timer.it_id + 1
    return calls


def _create(timer: pb.posix_timer_entry) -> Call:
    event = struct.pack("=Qiii", timer.sival_ptr, timer.si_signo, timer.it_sigev_notify, timer.notify_thread_id).ljust(
        _SIGEVENT_BYTES, b"\0"
    )
    clock = timer.clock_id - (1 << 32) if timer.clock_id >> 31 else timer.clock_id
    args = (clock, Data(event), InOut(struct.pack("=i", timer.it_id)))
    return Call(NR.TIMER_CREATE, args, f"create POSIX timer {timer.it_id}", want=0)


def _create_unused(timer_id: int) -> Call:
    event = struct.pack("=Qiii", 0, 0, SIGEV_NONE, 0).ljust(_SIGEVENT_BYTES, b"\0")
    args = (1, Data(event), InOut(struct.pack("=i", timer_id)))
    return Call(NR.TIMER_CREATE, args, f"use up id {timer_id} of POSIX timers", want=0)


def plan_arm(entry: pb.task_timers_entry) -> list[Call]:
    """Let all timers run; the very last thing that the leader does."""
    calls = []
    for number, kind in enumerate(_KINDS):
        timer = getattr(entry, kind)
        value = (timer.isec, timer.iusec, *_left(timer.vsec, timer.vusec, timer.isec, timer.iusec))
        if any(value):
            calls.append(Call(NR.SETITIMER, (number, Data(_pack(value)), 0), f"arm interval timer {kind}", want=0))
    for posix in sorted(entry.posix, key=lambda t: t.it_id):
        value = (posix.isec, posix.insec, *_left(posix.vsec, posix.vnsec, posix.isec, posix.insec))
        if any(value):
            args = (posix.it_id, 0, Data(_pack(value)), 0)
            calls.append(Call(NR.TIMER_SETTIME, args, f"arm POSIX timer {posix.it_id}", want=0))
    return calls


def _left(seconds: int, fraction: int, interval: int, interval_fraction: int) -> tuple[int, int]:
    # A periodic timer that was read in the instant of its expiry shows no time left; a disarmed one no interval either.
    return (seconds, fraction) if seconds or fraction else (interval, interval_fraction)


def _pack(value: tuple[int, ...]) -> bytes:
    try:
        return _PAIR.pack(*value)
    except struct.error as error:
        raise ImageError("core image: a timer's time does not fit") from error


def check(entry: pb.task_timers_entry, where: str, can_choose_ids: bool, may_wake: bool) -> list[Finding]:
    """Ids that could only be counted up to, and clocks that take CAP_WAKE_ALARM (``may_wake``)."""
    found = []
    highest = max((t.it_id for t in entry.posix), default=0)
    if not can_choose_ids and highest > MOST_IDS_COUNTED:
        found.append(Finding(where, f"POSIX timer id {highest}", "this kernel cannot choose ids (needs 6.16)"))
    if not may_wake and any(t.clock_id in _ALARM_CLOCKS for t in entry.posix):
        found.append(Finding(where, "a timer that wakes the machine", "we lack CAP_WAKE_ALARM"))
    return found
