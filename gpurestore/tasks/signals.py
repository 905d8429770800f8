"""Signal actions of a process and the signals that wait, for it or for one of its threads.

At restore every thread serves its agent with all signals blocked, so a signal that is queued stays queued. Actions
are set before: setting one to "ignore" afterwards would throw the queued signal away.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from gpurestore.batch import Call, Data, Out
from gpurestore.errors import ImageError
from gpurestore.syscalls import NR
from gpurestore.tasks.calls import Answers, Questions

if TYPE_CHECKING:
    from gpurestore.images import pb

SIGKILL, SIGCHLD, SIGCONT, SIGSTOP, NR_SIGNALS = 9, 17, 18, 19, 64
SIGINFO_BYTES = 128
_ACTION = struct.Struct("=QQQQ")  # handler, flags, restorer, mask, as the system call takes them
_DEFAULT = bytes(_ACTION.size)
_MASK_BYTES = 8
_TASK_STOPPED = 3
_SIG_SETMASK = 2
_SIG_DFL, _SIG_IGN = 0, 1
_IGNORED_BY_DEFAULT = (17, 18, 23, 28)  # CHLD, CONT, URG, WINCH
_SETTABLE = tuple(n for n in range(1, NR_SIGNALS + 1) if n not in (SIGKILL, SIGSTOP))


def questions() -> Questions:
    """The leader is asked for every action that can be set."""
    return {
        f"sigaction {n}": Call(NR.RT_SIGACTION, (n, 0, Out(_ACTION.size), _MASK_BYTES), f"read action of signal {n}")
        for n in _SETTABLE
    }


def collect_actions(answers: Answers, entry: pb.task_core_entry) -> None:
    """Of all signals but SIGKILL and SIGSTOP, in the order of their numbers."""
    for n in _SETTABLE:
        handler, flags, restorer, mask = _ACTION.unpack(answers[f"sigaction {n}"].outs[0])
        entry.sigactions.add(sigaction=handler, flags=flags, restorer=restorer, mask=mask, compat_sigaction=False)


def collect_pending(infos: Iterable[bytes], queue: pb.signal_queue_entry) -> None:
    """Raw siginfos, oldest first."""
    queue.SetInParent()  # CRIU looks for the queue, even for an empty one
    for info in infos:
        queue.signals.add(siginfo=info)


def plan_actions(entry: pb.task_core_entry) -> list[Call]:
    """Those that are not the default ones, which a tree has from :func:`plan_defaults`."""
    if len(entry.sigactions) not in (0, len(_SETTABLE)):
        raise ImageError(f"core image: {len(entry.sigactions)} signal actions instead of {len(_SETTABLE)}")
    actions = zip(_SETTABLE, map(_action, entry.sigactions), strict=False)
    return [_set_action(n, action, f"set the action of signal {n}") for n, action in actions if action != _DEFAULT]


def _action(sa: pb.sa_entry) -> bytes:
    return _ACTION.pack(sa.sigaction, sa.flags, sa.restorer, sa.mask)


def _set_action(signal: int, action: bytes, what: str) -> Call:
    return Call(NR.RT_SIGACTION, (signal, Data(action), 0, _MASK_BYTES), what, want=0)


def default_action(signal: int) -> Call:
    """Set the action to SIG_DFL."""
    return _set_action(signal, _DEFAULT, f"default action of signal {signal}")


def plan_defaults() -> list[Call]:
    """For the root of a tree, which has them from us; all others inherit them from it before it sets its own.

    Among them SIGCHLD: ignored, it would reap zombies before their time.
    """
    return [default_action(signal) for signal in _SETTABLE]


def plan_discard_sigchld() -> list[Call]:
    """Throw away what the exit of zombies and helpers sent during the restore; the images say what is to be pending."""
    mask, at_once = Data(struct.pack("=Q", 1 << SIGCHLD - 1)), Data(bytes(16))
    call = Call(NR.RT_SIGTIMEDWAIT, (mask, 0, at_once, _MASK_BYTES), "discard SIGCHLD of the restore", may_fail=True)
    return [call]


def plan_pending(queue: pb.signal_queue_entry, pid: int, tid: int | None) -> list[Call]:
    """Queue signals again: for thread ``tid``, which must run this itself, or (None) for the process, in its leader.

    The kernel takes a siginfo with a kernel-made si_code only from the very task that it is for. SIGSTOP cannot wait
    behind a mask: it is turned into the task's stopped state by :func:`stop_signal`.
    """
    if not queue.signals:
        return []
    # Our C library blocks all but two signals that it wants for itself; those two must wait like the others.
    everything = Data(b"\xff" * _MASK_BYTES)
    calls = [Call(NR.RT_SIGPROCMASK, (_SIG_SETMASK, everything, 0, _MASK_BYTES), "block every signal", want=0)]
    for info in queue.signals:
        signal = _signal_of(info.siginfo)
        if signal in (SIGKILL, SIGSTOP):
            continue
        what = f"queue signal {signal}"
        if tid is None:
            calls.append(Call(NR.RT_SIGQUEUEINFO, (pid, signal, Data(info.siginfo)), what, want=0))
        else:
            calls.append(Call(NR.RT_TGSIGQUEUEINFO, (pid, tid, signal, Data(info.siginfo)), what, want=0))
    return calls


def _signal_of(info: bytes) -> int:
    if len(info) != SIGINFO_BYTES:
        raise ImageError(f"core image: a siginfo of {len(info)} bytes instead of {SIGINFO_BYTES}")
    (signal,) = struct.unpack_from("=i", info)
    if not 1 <= signal <= NR_SIGNALS:
        raise ImageError(f"core image: pending signal {signal}")
    return int(signal)


def is_noticed(entry: pb.task_core_entry, signal: int) -> bool:
    """Whether the process does anything at all when it gets ``signal`` with the actions of the image."""
    if signal not in _SETTABLE or not entry.sigactions:
        return signal in (SIGKILL, SIGSTOP)
    handler = entry.sigactions[_SETTABLE.index(signal)].sigaction
    return handler != _SIG_IGN and not (handler == _SIG_DFL and signal in _IGNORED_BY_DEFAULT)


def stop_signal(core: pb.core_entry, threads: Sequence[pb.core_entry] = ()) -> int:
    """The signal that the restored task is to be left stopped with, or 0. ``threads`` are its other threads."""
    if core.tc.task_state == _TASK_STOPPED:
        return core.tc.stop_signo or SIGSTOP
    queues = [core.tc.signals_s, *(c.thread_core.signals_p for c in (core, *threads))]
    waiting = {_signal_of(info.siginfo) for queue in queues for info in queue.signals}
    return SIGSTOP if SIGSTOP in waiting else 0
