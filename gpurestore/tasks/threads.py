"""What one thread has beside registers: name, alternate stack, robust list, rseq, clear_child_tid."""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

from gpurestore.batch import Call, Data, Out
from gpurestore.errors import ImageError
from gpurestore.syscalls import NR
from gpurestore.tasks.calls import Answers, Questions, prctl, set_name
from gpurestore.tasks.facts import ThreadFacts

if TYPE_CHECKING:
    from gpurestore.core import Rseq
    from gpurestore.images import pb

_STACK = struct.Struct("=QiiQ")  # stack_t
_SS_DISABLE = 2
_SS_KEPT = _SS_DISABLE | 1 << 31  # not SS_ONSTACK, which only tells where the stack pointer is
_ROBUST_LIST_BYTES = 24
_PR_GET_TID_ADDRESS = 40


def questions() -> Questions:
    """What every thread is asked."""
    return {
        "clear tid": prctl(_PR_GET_TID_ADDRESS, Out(8), what="read clear_child_tid"),
        "sigaltstack": Call(NR.SIGALTSTACK, (0, Out(_STACK.size)), "read the alternate stack"),
        "robust list": Call(NR.GET_ROBUST_LIST, (0, Out(8), Out(8)), "read the robust list", may_fail=True),
    }


def collect(answers: Answers, comm: bytes, rseq: Rseq | None, core: pb.core_entry, facts: ThreadFacts) -> None:
    """``rseq`` is what ptrace tells."""
    entry = core.thread_core
    core.thread_info.clear_tid_addr = _u64(answers["clear tid"].outs[0])
    address, flags, _, size = _STACK.unpack(answers["sigaltstack"].outs[0])
    entry.sas.ss_sp, entry.sas.ss_size, entry.sas.ss_flags = address, size, flags & _SS_KEPT
    entry.futex_rla, entry.futex_rla_len = 0, 0
    if answers["robust list"].result == 0:
        head, length = map(_u64, answers["robust list"].outs)
        entry.futex_rla, entry.futex_rla_len = head, length if head else 0
    if rseq is not None:
        entry.rseq_entry.rseq_abi_pointer = rseq.address
        entry.rseq_entry.rseq_abi_size = rseq.size
        entry.rseq_entry.signature = rseq.signature
    try:
        entry.comm = comm.decode()
    except UnicodeDecodeError:
        entry.comm = comm.decode("ascii", "replace")
        facts.comm = comm


def plan(core: pb.core_entry, facts: ThreadFacts) -> list[Call]:
    """In the thread itself."""
    entry = core.thread_core
    calls = [
        set_name(facts.comm if facts.comm is not None else entry.comm or core.tc.comm),
        Call(NR.SET_TID_ADDRESS, (core.thread_info.clear_tid_addr,), "set clear_child_tid"),
    ]
    if entry.futex_rla_len:
        if entry.futex_rla_len != _ROBUST_LIST_BYTES:
            raise ImageError(f"core image: a robust list head of {entry.futex_rla_len} bytes")
        calls.append(Call(NR.SET_ROBUST_LIST, (entry.futex_rla, _ROBUST_LIST_BYTES), "set the robust list", want=0))
    if entry.HasField("sas"):
        calls.append(_plan_stack(entry.sas))
    if entry.rseq_entry.rseq_abi_pointer:
        r = entry.rseq_entry
        args = (r.rseq_abi_pointer, r.rseq_abi_size, 0, r.signature)
        calls.append(Call(NR.RSEQ, args, "register restartable sequences", want=0))
    return calls


def _plan_stack(sas: pb.thread_sas_entry) -> Call:
    flags = sas.ss_flags & _SS_KEPT
    # A thread that never had one reads back as a stack of no bytes.
    stack = (0, _SS_DISABLE, 0) if flags & _SS_DISABLE or not sas.ss_size else (sas.ss_sp, flags, sas.ss_size)
    signed = stack[1] - (1 << 32) if stack[1] >> 31 else stack[1]
    payload = _STACK.pack(stack[0], signed, 0, stack[2])
    return Call(NR.SIGALTSTACK, (Data(payload), 0), "set the alternate stack", want=0)


def _u64(raw: bytes) -> int:
    return int.from_bytes(raw[:8], "little")
