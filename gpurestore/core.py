"""The C core as Python sees it: the only module that touches ``gpurestore._core``.

Every function that blocks releases the GIL and belongs on a worker thread when called from trio. Any thread may call
into a :class:`Tracer`: requests are carried out one after another by the thread that owns the ptrace relations.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Self

from gpurestore import _core, batch
from gpurestore.batch import Call, CallResult
from gpurestore.errors import CallFailedError, CancelledError, CoreError, TaskDiedError

ffi: Any = _core.ffi
lib: Any = _core.lib

SLOT_BATCH_OFFSET = 64
SLOT_BYTES = 131072
SLOT_BATCH_BYTES = SLOT_BYTES - 8192 - SLOT_BATCH_OFFSET
MAX_THREADS = 32768
SIGINFO_BYTES = 128

_ESRCH, _ECANCELED = 3, 125

# struct user_regs_struct, arch/x86/include/asm/user_64.h
# fmt: off
REGISTERS = (
    "r15", "r14", "r13", "r12", "rbp", "rbx", "r11", "r10", "r9", "r8", "rax", "rcx", "rdx",
    "rsi", "rdi", "orig_rax", "rip", "cs", "eflags", "rsp", "ss", "fs_base", "gs_base", "ds", "es", "fs", "gs",
)
# fmt: on


def new_error() -> Any:
    """A ``struct gr_error *`` for a call whose result goes through :func:`check`."""
    return ffi.new("struct gr_error *")


def check(result: int, err: Any) -> int:
    """The result of a core call, or its error as an exception."""
    if result >= 0:
        return result
    context = ffi.string(err.context).decode(errors="replace")
    if err.code == _ECANCELED:
        raise CancelledError(f"cancelled: {context}")
    if err.code == _ESRCH:
        raise TaskDiedError(context)
    raise CoreError(err.code, context)


class Rseq(NamedTuple):
    """A registered restartable-sequences area (rseq(2))."""

    address: int
    size: int
    signature: int
    flags: int


class ThreadState(NamedTuple):
    """What ptrace knows of a stopped thread.

    ``regs`` are named as in ``struct user_regs_struct`` and stand as the kernel holds them: an interrupted system call
    is still ``-ERESTART*`` in ``rax`` with its number in ``orig_rax``. ``xstate`` is NT_X86_XSTATE, standard format.
    """

    tid: int
    regs: dict[str, int]
    xstate: bytes
    sigmask: int = 0
    rseq: Rseq | None = None
    stop_signal: int = 0
    dispatches_calls: bool = False  # PR_SET_SYSCALL_USER_DISPATCH is on
    opens_ports: bool = False  # ioperm(2)


class Cancel:
    """A flag that core calls poll: setting it ends them within a few milliseconds with CancelledError."""

    def __init__(self) -> None:
        self.flag: Any = ffi.new("int *")

    def set(self) -> None:
        """Cancel every call that was given this flag, now and later."""
        self.flag[0] = 1

    @property
    def is_set(self) -> bool:
        """Whether :meth:`set` was called."""
        return bool(self.flag[0])


class Tracer:
    """The thread that seizes tasks and runs things in them. Closing it lets every seized task go on as it was."""

    def __init__(self) -> None:
        err = new_error()
        out = ffi.new("struct gr_tracer **")
        check(lib.gr_tracer_create(out, err), err)
        self._tracer = out[0]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let go of everything and end the thread. What was spawned and not resumed dies."""
        if self._tracer is not None:
            tracer, self._tracer = self._tracer, None
            lib.gr_tracer_destroy(tracer)

    def seize(self, pid: int) -> list[int]:
        """Stop all threads of ``pid``; their ids, the leader's first."""
        err = new_error()
        tids = ffi.new("int[]", MAX_THREADS)
        nr = check(lib.gr_seize(self._tracer, pid, tids, MAX_THREADS, err), err)
        return sorted(ffi.unpack(tids, nr), key=lambda tid: (tid != pid, tid))

    def read_thread(self, tid: int) -> ThreadState:
        """Registers and what else ptrace tells of a frozen thread."""
        err = new_error()
        out = ffi.new("struct gr_thread_state *")
        check(lib.gr_thread_read(self._tracer, tid, out, err), err)
        rseq = Rseq(out.rseq_address, out.rseq_bytes, out.rseq_signature, out.rseq_flags) if out.rseq_address else None
        return ThreadState(
            tid=tid,
            regs={name: getattr(out.regs, name) for name in REGISTERS},
            xstate=bytes(ffi.buffer(out.xstate, out.xstate_bytes)),
            sigmask=out.sigmask,
            rseq=rseq,
            stop_signal=out.stop_signal,
            dispatches_calls=bool(out.dispatches_calls),
            opens_ports=bool(out.opens_ports),
        )

    def peek_signals(self, tid: int, *, shared: bool) -> list[bytes]:
        """Pending signals, oldest first, as raw siginfo_t of 128 bytes: the thread's own or its process's."""
        chunk = 64
        out = ffi.new("uint8_t[]", chunk * SIGINFO_BYTES)
        signals: list[bytes] = []
        while True:
            err = new_error()
            nr = check(lib.gr_peek_signals(self._tracer, tid, int(shared), len(signals), out, chunk, err), err)
            raw = bytes(ffi.buffer(out, nr * SIGINFO_BYTES))
            signals += [raw[i : i + SIGINFO_BYTES] for i in range(0, len(raw), SIGINFO_BYTES)]
            if nr < chunk:
                return signals

    def enter(self, pid: int, address: int, nr_slots: int) -> None:
        """Map the agent at ``address`` of a frozen task, with a slot for each of ``nr_slots`` threads."""
        err = new_error()
        check(lib.gr_agent_enter(self._tracer, pid, address, nr_slots, err), err)

    def run(self, tid: int, address: int, slot: int, calls: Sequence[Call]) -> list[CallResult]:
        """Run ``calls`` in a thread of a task that :meth:`enter` entered at ``address``; ``slot`` is the thread's."""
        at = lib.gr_agent_batch_address(address, slot)
        results: list[CallResult] = []
        for part in batch.split(calls, SLOT_BATCH_BYTES):
            encoded = batch.encode(part, at, SLOT_BATCH_BYTES)
            raw = ffi.new("uint8_t[]", encoded)
            err = new_error()
            check(lib.gr_agent_run(self._tracer, tid, slot, raw, len(encoded), err), err)
            results += finish(part, bytes(ffi.buffer(raw, len(encoded))), tid)
        return results

    def leave(self, pid: int) -> None:
        """Take the agent out of a frozen task again."""
        err = new_error()
        check(lib.gr_agent_leave(self._tracer, pid, err), err)

    def let_run(self, tid: int) -> None:
        """Let one thread of a frozen task run, its signals blocked, until :meth:`hold`."""
        err = new_error()
        check(lib.gr_thread_let_run(self._tracer, tid, err), err)

    def hold(self, tid: int) -> None:
        """Stop a thread again that :meth:`let_run` set going."""
        err = new_error()
        check(lib.gr_thread_hold(self._tracer, tid, err), err)

    def release(self, pid: int, *, stop: bool = False) -> None:
        """Let a seized task go on as it was found, or with ``stop`` leave it stopped by SIGSTOP."""
        err = new_error()
        check(lib.gr_release(self._tracer, pid, int(stop), err), err)

    def kill(self, pids: Sequence[int]) -> None:
        """Kill traced processes at once and wait until they are dead."""
        err = new_error()
        check(lib.gr_kill(self._tracer, ffi.new("int[]", list(pids)), len(pids), err), err)

    def spawn_root(self, region: Region, pid: int, slot: int) -> None:
        """Fork task ``pid`` out of this process; it serves ``slot`` and dies with the tracer until resumed."""
        err = new_error()
        check(lib.gr_spawn_root(self._tracer, region.handle, pid, slot, err), err)

    def adopt(self, tids: Sequence[int], *, of: int = 0) -> None:
        """Take tasks, or threads of the task ``of``, that an agent cloned: they die with the tracer until resumed."""
        err = new_error()
        check(lib.gr_adopt(self._tracer, of, ffi.new("int[]", list(tids)), len(tids), err), err)

    def park(self, pid: int, address: int, size: int) -> None:
        """Stop all threads of a spawned task for good and unmap the region [address, address + size) from it."""
        err = new_error()
        check(lib.gr_park(self._tracer, pid, address, size, err), err)

    def write_thread(self, state: ThreadState) -> None:
        """Give a parked thread its final registers, extended state and signal mask."""
        err = new_error()
        raw = ffi.new("struct gr_thread_state *")
        raw.tid, raw.sigmask, raw.xstate_bytes = state.tid, state.sigmask, len(state.xstate)
        for name, value in state.regs.items():
            setattr(raw.regs, name, value)
        ffi.memmove(raw.xstate, state.xstate, len(state.xstate))
        check(lib.gr_thread_write(self._tracer, raw, err), err)

    def resume(self, pid: int, stop_signal: int = 0) -> None:
        """Let a parked task go; with ``stop_signal`` it is stopped by that signal before its first instruction."""
        err = new_error()
        check(lib.gr_resume(self._tracer, pid, stop_signal, err), err)

    def await_exit(self, pid: int) -> int:
        """Wait for a spawned task or thread that was told to exit; its wait status (the zombie is its parent's)."""
        err = new_error()
        status = ffi.new("int *")
        check(lib.gr_await_exit(self._tracer, pid, status, err), err)
        return int(status[0])


class Region:
    """Memory that this process shares with all tasks it restores: the agent's code and a slot for every thread."""

    def __init__(self, address: int, nr_slots: int) -> None:
        err = new_error()
        self.handle: Any = ffi.new("struct gr_region *")
        check(lib.gr_region_create(address, nr_slots, self.handle, err), err)
        self.address = address
        self.nr_slots = nr_slots

    @staticmethod
    def size_for(nr_slots: int) -> int:
        """Bytes that a region of ``nr_slots`` slots takes."""
        return int(lib.gr_region_size(nr_slots))

    @property
    def size(self) -> int:
        """Bytes of the whole mapping."""
        return int(self.handle.bytes)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Unmap it here; tasks that still serve it are not affected."""
        lib.gr_region_destroy(self.handle)

    def slot_address(self, slot: int) -> int:
        """Where a slot lies, in every task."""
        return int(self.handle.slots) + slot * SLOT_BYTES

    def _batch_address(self, slot: int) -> int:
        return self.slot_address(slot) + SLOT_BATCH_OFFSET

    def post(self, slot: int, calls: Sequence[Call]) -> None:
        """Start ``calls`` (one batch's worth) and do not wait: for calls that never return."""
        at = self._batch_address(slot)
        encoded = batch.encode(calls, at, SLOT_BATCH_BYTES)
        ffi.memmove(ffi.cast("void *", at), encoded, len(encoded))
        lib.gr_slot_post(self.handle, slot)

    def run(self, slot: int, tid: int, calls: Sequence[Call], cancel: Cancel | None = None) -> list[CallResult]:
        """Run ``calls`` in the thread ``tid`` that serves ``slot``; one caller per slot at a time."""
        results: list[CallResult] = []
        for part in batch.split(calls, SLOT_BATCH_BYTES):
            results += finish(part, self._run_batch(slot, tid, part, cancel), tid)
        return results

    def execute(self, slot: int, tid: int, calls: Sequence[Call], cancel: Cancel | None = None) -> None:
        """The same for calls whose results nobody wants to see, as long as they are the expected ones."""
        for part in batch.split(calls, SLOT_BATCH_BYTES):
            raw = self._run_batch(slot, tid, part, cancel)
            if not batch.is_whole(raw):
                finish(part, raw, tid)

    def _run_batch(self, slot: int, tid: int, calls: Sequence[Call], cancel: Cancel | None) -> memoryview:
        """One batch; its memory as the agent left it, which is the slot's."""
        at = self._batch_address(slot)
        encoded = batch.encode(calls, at, SLOT_BATCH_BYTES)
        raw = memoryview(ffi.buffer(ffi.cast("char *", at), len(encoded)))
        raw[:] = encoded
        err = new_error()
        check(lib.gr_slot_run(self.handle, slot, tid, cancel.flag if cancel else ffi.NULL, err), err)
        return raw


def finish(calls: Sequence[Call], raw: bytes | memoryview, tid: int) -> list[CallResult]:
    """Results of a batch that ran in ``tid``; raises CallFailedError for the call that ended it early."""
    state = batch.decode(calls, raw)
    if state.failed is None:
        return list(state.results)
    call, result = calls[state.failed], state.results[state.failed].result
    where = f"task {tid}: {call.what or call.nr.name}"
    if result >= 0:
        raise CallFailedError(5, f"{where}: {call.nr.name} returned {result:#x}, not {call.want or 0:#x}")
    raise CallFailedError(-result, f"{where}: {call.nr.name}")


def agent_bytes(nr_slots: int) -> int:
    """Bytes that the agent takes in a seized task, with a slot for each of ``nr_slots`` threads."""
    return int(lib.gr_agent_bytes(nr_slots))


def kcmp(pid1: int, pid2: int, kind: int, idx1: int = 0, idx2: int = 0) -> int:
    """kcmp(2): 0 same object, 1 and 2 order two different ones, 3 different without order."""
    err = new_error()
    return check(lib.gr_kcmp(pid1, pid2, kind, idx1, idx2, err), err)


def pidfd_getfd(pidfd: int, fd: int) -> int:
    """A descriptor of ours (close-on-exec) for the description behind ``fd`` of the task."""
    err = new_error()
    return check(lib.gr_pidfd_getfd(pidfd, fd, err), err)


def robust_list(tid: int) -> tuple[int, int]:
    """Head address and length of a thread's robust futex list."""
    err = new_error()
    head, size = ffi.new("uint64_t *"), ffi.new("uint64_t *")
    check(lib.gr_robust_list(tid, head, size, err), err)
    return int(head[0]), int(size[0])


def xstate_layout() -> tuple[int, dict[int, tuple[int, int]]]:
    """Bytes of this CPU's standard-format XSAVE area, and (offset, bytes) of its components by number."""
    size, offsets, sizes = ffi.new("uint32_t *"), ffi.new("uint32_t[64]"), ffi.new("uint32_t[64]")
    filled = int(lib.gr_xstate_layout(size, offsets, sizes))
    return int(size[0]), {i: (offsets[i], sizes[i]) for i in range(64) if filled >> i & 1}


def set_subreaper(on: bool) -> bool:
    """Whether orphans among our descendants become our children (prctl(2)); returns what it was."""
    err = new_error()
    return bool(check(lib.gr_set_subreaper(int(on), err), err))
