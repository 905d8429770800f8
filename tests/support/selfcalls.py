"""Runs batches of system calls in this very process, as the agent would in a task: plans tried without ptrace."""

from __future__ import annotations

import ctypes
import mmap
import os
import pickle
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from gpurestore import batch
from gpurestore.batch import Call, CallResult
from gpurestore.tasks import procfs
from gpurestore.tasks.registers import XstateLayout

T = TypeVar("T")
_BYTES = 1 << 17
REGISTERS = "r15 r14 r13 r12 rbp rbx r11 r10 r9 r8 rax rcx rdx rsi rdi rip eflags rsp ss fs_base gs_base ds es fs gs"

# A CPU with AVX-512 and AMX, as Intel lays it out.
LAYOUT = XstateLayout(
    11008, {2: (576, 256), 5: (1088, 64), 6: (1152, 512), 7: (1664, 1024), 17: (2752, 64), 18: (2816, 8192)}
)


class CallError(Exception):
    """A call did not answer as expected."""


def execute(calls: Sequence[Call]) -> list[CallResult]:
    """Run calls as the agent does and return their results; raises CallError where the agent would stop."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.syscall.restype = ctypes.c_long
    results: list[CallResult] = []
    with mmap.mmap(-1, _BYTES) as memory:
        anchor = ctypes.c_char.from_buffer(memory)
        base = ctypes.addressof(anchor)
        for part in batch.split(calls, _BYTES):
            encoded = bytearray(batch.encode(part, base, _BYTES))
            memory[: len(encoded)] = bytes(encoded)
            done: list[int] = []
            for index, call in enumerate(part):
                done.append(_one(libc, memory, index, done, call))
                batch._CALL.pack_into(
                    memory, batch.HEADER_BYTES + batch.CALL_BYTES * index, *_fields(memory, index)[:-1], done[-1]
                )
            results += batch.decode(part, memory[: len(encoded)]).results
        del anchor
    return results


def _fields(memory: mmap.mmap, index: int) -> tuple[int, ...]:
    return batch._CALL.unpack_from(memory, batch.HEADER_BYTES + batch.CALL_BYTES * index)


def _one(libc: ctypes.CDLL, memory: mmap.mmap, index: int, done: list[int], call: Call) -> int:
    number, *args, refs, expect, want, _ = _fields(memory, index)
    args = [done[a] if refs >> i & 1 else a for i, a in enumerate(args)]
    ctypes.set_errno(0)
    result = libc.syscall(ctypes.c_long(number), *(ctypes.c_ulong(a & (1 << 64) - 1) for a in args))
    if result == -1 and ctypes.get_errno():
        result = -ctypes.get_errno()
    if (expect == batch.EXPECT_OK and result < 0) or (expect == batch.EXPECT_EXACT and result != want):
        raise CallError(f"{call}: {result}")
    return int(result)


def in_child(work: Callable[[], T]) -> T:
    """The result of ``work`` in a forked child, which may ruin itself."""
    readable, writable = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            outcome: tuple[bool, object] = (True, work())
        except BaseException:
            outcome = (False, traceback.format_exc())
        with os.fdopen(writable, "wb") as file:
            pickle.dump(outcome, file)
        os._exit(0)
    os.close(writable)
    with os.fdopen(readable, "rb") as file:
        raw = file.read()
    os.waitpid(pid, 0)
    assert raw, "the child died"
    good, value = pickle.loads(raw)
    assert good, value
    result: T = value
    return result


@dataclass
class SelfState:
    """Stands for core.ThreadState without the compiled core."""

    tid: int
    regs: dict[str, int]
    xstate: bytes
    sigmask: int = 0
    rseq: None = None


@dataclass
class SelfThread:
    tid: int
    state: SelfState


@dataclass
class SelfTask:
    """This process as a frozen task: questions are answered by asking ourselves."""

    pid: int = field(default_factory=os.getpid)
    zombie: bool = False
    stop_signal: int = 0
    exit_code: int = 0
    pending: list[bytes] = field(default_factory=list)

    @property
    def threads(self) -> list[SelfThread]:
        regs = dict.fromkeys(REGISTERS.split(), 7) | {"orig_rax": (1 << 64) - 1, "cs": 0x33}
        return [
            SelfThread(self.pid, SelfState(self.pid, regs, bytes(LAYOUT.bytes), procfs.status(self.pid).sig_blocked))
        ]

    def ask(self, calls: Sequence[Call], tid: int | None = None) -> list[CallResult]:
        return execute(calls)

    def peek_signals(self, tid: int, shared: bool) -> list[bytes]:
        return self.pending if shared else []

    def read_memory(self, address: int, size: int) -> bytes:
        with open("/proc/self/mem", "rb") as memory:
            memory.seek(address)
            return memory.read(size)
