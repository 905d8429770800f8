"""Making tasks and threads out of a task that serves the agent, with the ids that they shall have."""

from __future__ import annotations

import struct

from gpurestore.batch import Call, Data
from gpurestore.syscalls import NR
from gpurestore.tasks import signals
from gpurestore.tasks.calls import prctl
from gpurestore.tasks.prctls import PR_SET_PDEATHSIG

# clone(2): what makes a thread: VM, FS, FILES, SIGHAND, THREAD, SYSVSEM
THREAD_FLAGS = 0x100 | 0x200 | 0x400 | 0x800 | 0x10000 | 0x40000
# clone_args of 5.5, the first with set_tid: flags, pidfd, child_tid, parent_tid, exit_signal, stack, stack_size, tls,
# set_tid, set_tid_size
_CLONE_ARGS = struct.Struct("=10Q")
_SET_TID_AT = 64


def birth(pid: int, parent: int, slot_address: int, exit_signal: int = signals.SIGCHLD) -> Call:
    """Clone the task ``pid``, for ``parent`` to do; the newborn serves the slot at ``slot_address``.

    It dies with its parent until it does :func:`outlive_parent`.
    """
    return _clone(pid, 0, exit_signal, (slot_address, parent), f"clone task {pid}")


def outlive_parent() -> Call:
    """For a newborn that somebody else looks after."""
    return prctl(PR_SET_PDEATHSIG, 0, what="outlive the parent")


def thread(tid: int, slot_address: int) -> Call:
    """Clone the thread ``tid`` of the task that does this."""
    return _clone(tid, THREAD_FLAGS, 0, (slot_address, 0), f"clone thread {tid}")


def _clone(tid: int, flags: int, exit_signal: int, served: tuple[int, int], what: str) -> Call:
    args = _CLONE_ARGS.pack(flags, 0, 0, 0, exit_signal, 0, 0, 0, 0, 1)
    set_tid = Data(tid.to_bytes(4, "little"))
    return Call(NR.AGENT_CLONE, (Data(args, ((_SET_TID_AT, set_tid),)), len(args), *served), what, want=tid)
