"""A fork of the test that serves the agent: plans run for real, without any rights and without ptrace."""

from __future__ import annotations

import ctypes
import os
import signal
from collections.abc import Callable, Sequence
from typing import Self

from gpurestore.batch import Call, CallResult
from gpurestore.core import SLOT_BYTES, Region
from gpurestore.syscalls import NR
from gpurestore.tasks import maps
from support.memory_child import MAP_ANONYMOUS, MAP_PRIVATE, libc, map_memory

_ARCH_GET_FS = 0x1003
_RSEQ_UNREGISTER, _RSEQ_SIGNATURE = 1, 0x53053053
# mov rsp, rsi; jmp rdx
_TRAMPOLINE = bytes.fromhex("4889f4ffe2")


class AgentChild:
    """Child process whose only thread runs the agent. Nothing of Python runs in it any more."""

    def __init__(self, region: Region, before: Callable[[], object] = lambda: None) -> None:
        """``before`` runs in the child first, as Python."""
        self.region = region
        self._before = before
        self.pid = 0

    def __enter__(self) -> Self:
        code = map_memory(4096, 7, MAP_PRIVATE | MAP_ANONYMOUS)
        ctypes.memmove(code, _TRAMPOLINE, len(_TRAMPOLINE))
        enter = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p)(code)
        slot = int(self.region.handle.slots)
        self.pid = os.fork()
        if self.pid == 0:
            try:
                self._before()
                enter(slot, slot + SLOT_BYTES, self.region.address)
            finally:
                os._exit(1)
        libc.munmap(code, 4096)
        return self

    def run(self, calls: Sequence[Call]) -> list[CallResult]:
        """Run ``calls`` in the child."""
        return self.region.run(0, self.pid, calls)

    def forget_rseq(self) -> None:
        """Unregister the area that the C library registered: it is about to be unmapped."""
        offset = ctypes.c_long.in_dll(libc, "__rseq_offset").value
        base = ctypes.c_ulong()
        libc.syscall(ctypes.c_long(int(NR.ARCH_PRCTL)), ctypes.c_long(_ARCH_GET_FS), ctypes.byref(base))
        if ctypes.c_uint.in_dll(libc, "__rseq_size").value:
            self.run([Call(NR.RSEQ, (base.value + offset, 32, _RSEQ_UNREGISTER, _RSEQ_SIGNATURE), want=0)])

    def vmas(self) -> list[maps.Vma]:
        return maps.read(self.pid)

    def read(self, address: int, size: int) -> bytes:
        """Memory of the child."""
        with open(f"/proc/{self.pid}/mem", "rb", buffering=0) as memory:
            return os.pread(memory.fileno(), size, address)

    def __exit__(self, *_: object) -> None:
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)
