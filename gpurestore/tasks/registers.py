"""Registers: from ptrace's view to the core image and back.

The image holds CRIU's pieces of the XSAVE area; components that it has no place for (AMX tiles) go to the facts.
Where a component lies differs between CPUs, so the layout of the CPU at hand is a parameter on both ways.

An interrupted system call is set back to its beginning: a restored task has no restart block, so the call starts again
with its own arguments. Nobody sees an EINTR that did not happen.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

from gpurestore.batch import Call
from gpurestore.errors import Finding, ImageError
from gpurestore.images import pb
from gpurestore.syscalls import NR
from gpurestore.tasks.facts import ThreadFacts

if TYPE_CHECKING:
    from collections.abc import Mapping

    from gpurestore.core import ThreadState

_U64 = (1 << 64) - 1
_ERESTARTSYS, _ERESTARTNOINTR, _ERESTARTNOHAND, _ERESTART_RESTARTBLOCK = 512, 513, 514, 516
_EINTR = 4
_SYSCALL_INSN = b"\x0f\x05"
_MOV_EAX = 0xB8
# The calls that continue through restart_syscall and can be begun again from their arguments.
_WITH_RESTART_BLOCK = (NR.POLL, NR.NANOSLEEP, NR.FUTEX, NR.CLOCK_NANOSLEEP)
_CODE_SEARCHED_BYTES = 24
_FUTEX_CLOCK_REALTIME = 256
_PRIVATE_WAITS = (128 | 0, 128 | 9)  # FUTEX_PRIVATE_FLAG with FUTEX_WAIT, FUTEX_WAIT_BITSET
_CS_64 = 0x33
_TILE_DATA = 18

_SAME_NAMES = "r15 r14 r13 r12 r11 r10 r9 r8 cs ss fs_base gs_base ds es fs gs"
_WITHOUT_R = "bp bx ax cx dx si di ip sp"
# ptrace's name -> the image's
_GENERAL = {
    **{name: name for name in _SAME_NAMES.split()},
    **{"r" + name: name for name in _WITHOUT_R.split()},
    "orig_rax": "orig_ax",
    "eflags": "flags",
}

_LEGACY = struct.Struct("=HHHHQQII32I64I")
_LEGACY_BYTES = 512
_HEADER_OFFSET, _HEADER_END = 512, 576
_FP_AND_SSE = 3


class Component(NamedTuple):
    """A part of the XSAVE area that CRIU's message has a field for."""

    field: str
    code: str  # of struct
    bytes: int


_COMPONENTS = {
    2: Component("ymmh_space", "I", 256),
    3: Component("bndreg_state", "Q", 64),
    4: Component("bndcsr_state", "Q", 64),
    5: Component("opmask_reg", "Q", 64),
    6: Component("zmm_upper", "Q", 512),
    7: Component("hi16_zmm", "Q", 1024),
    9: Component("pkru", "I", 8),
}
_NAMES = {2: "AVX", 9: "PKU", 19: "APX", **dict.fromkeys((3, 4), "MPX"), **dict.fromkeys((5, 6, 7), "AVX-512")}
_NAMES |= dict.fromkeys((17, 18), "AMX")


class XstateLayout(NamedTuple):
    """Where a CPU keeps the components of its standard-format XSAVE area, by number: (offset, bytes)."""

    bytes: int
    parts: Mapping[int, tuple[int, int]]


# ---- dump ----


def begin_call_again(regs: Mapping[str, int], read: Callable[[int, int], bytes]) -> dict[str, int]:
    """Registers with an interrupted system call set back to its beginning. ``read`` reads the task's memory."""
    fixed = dict(regs)
    number, answer = regs["orig_rax"], regs["rax"]
    if number >> 63:  # the thread was not in a system call
        return fixed
    error = (1 << 64) - answer
    if error in (_ERESTARTSYS, _ERESTARTNOINTR, _ERESTARTNOHAND, _ERESTART_RESTARTBLOCK):
        fixed["rip"] = regs["rip"] - 2 & _U64
        fixed["rax"] = number
        if number == NR.RESTART_SYSCALL:
            original = _call_before(read, fixed["rip"])
            if original is None and _waits_on_futex(regs):
                original = NR.FUTEX
            if original is None:
                fixed["rip"], fixed["rax"] = regs["rip"], (1 << 64) - _EINTR
            else:
                fixed["rax"] = fixed["orig_rax"] = original
    elif answer == NR.RESTART_SYSCALL and number in _WITH_RESTART_BLOCK and read(regs["rip"], 2) == _SYSCALL_INSN:
        fixed["rax"] = number  # stopped a second time, just before it would have continued the call
    return fixed


def _call_before(read: Callable[[int, int], bytes], address: int) -> int | None:
    """Which call restart_syscall stands for. The kernel forgot its number, the C library's code still loads it."""
    try:
        code = read(address - _CODE_SEARCHED_BYTES, _CODE_SEARCHED_BYTES)
    except OSError:
        return None
    for at in range(len(code) - 5, -1, -1):
        if code[at] == _MOV_EAX:
            (number,) = struct.unpack_from("=I", code, at + 1)
            if number in _WITH_RESTART_BLOCK:
                return int(number)
    return None


def _waits_on_futex(regs: Mapping[str, int]) -> bool:
    """Whether the arguments are those of a private futex wait with a time-out, and so of no other call that restarts.

    Runtimes (C++, Rust) make it through syscall(3), whose code does not load a constant number.
    """
    return regs["rsi"] & ~_FUTEX_CLOCK_REALTIME in _PRIVATE_WAITS and regs["rdi"] % 4 == 0 and regs["r10"] != 0


def collect(
    state: ThreadState, read: Callable[[int, int], bytes], layout: XstateLayout, core: pb.core_entry, facts: ThreadFacts
) -> list[Finding]:
    """Fill ``core.thread_info``; ``clear_tid_addr`` is the threads module's."""
    if state.regs["cs"] != _CS_64:
        return [Finding(f"pid {state.tid}", "runs 32-bit code", "only 64-bit tasks are carried")]
    info = core.thread_info
    for name, value in begin_call_again(state.regs, read).items():
        setattr(info.gpregs, _GENERAL[name], value & _U64)
    info.gpregs.mode = pb.NATIVE
    _collect_legacy(state.xstate, info.fpregs)
    (features,) = struct.unpack_from("=Q", state.xstate, _HEADER_OFFSET)
    xsave = info.fpregs.xsave
    xsave.xstate_bv = features | _FP_AND_SSE
    for number, (offset, size) in layout.parts.items():
        part = state.xstate[offset : offset + size]
        if len(part) < size:
            continue
        component = _COMPONENTS.get(number)
        if component is not None and size == component.bytes:
            count = size // struct.calcsize("=" + component.code)
            getattr(xsave, component.field).extend(struct.unpack(f"={count}{component.code}", part))
        elif features >> number & 1:
            facts.xstate[number] = part
    return []


def _collect_legacy(xstate: bytes, fpregs: pb.user_x86_fpregs_entry) -> None:
    values = _LEGACY.unpack_from(xstate)
    fpregs.cwd, fpregs.swd, fpregs.twd, fpregs.fop, fpregs.rip, fpregs.rdp, fpregs.mxcsr, fpregs.mxcsr_mask = values[:8]
    fpregs.st_space.extend(values[8:40])
    fpregs.xmm_space.extend(values[40:])


# ---- restore ----


def plan(facts: ThreadFacts) -> list[Call]:
    """What the thread itself must do before ptrace can set its registers."""
    if _TILE_DATA not in facts.xstate:
        return []
    return [Call(NR.AGENT_USE_TILES, (), "make room for AMX tiles", want=0)]


def general(core: pb.core_entry) -> dict[str, int]:
    """Registers by ptrace's names."""
    gpregs = core.thread_info.gpregs
    if gpregs.mode != pb.NATIVE:
        raise ImageError("core image: registers of a 32-bit task")
    return {name: getattr(gpregs, field) for name, field in _GENERAL.items()}


def xstate(core: pb.core_entry, facts: ThreadFacts, layout: XstateLayout) -> bytes:
    """The XSAVE area for ptrace; :func:`missing` says beforehand whether this CPU can take it."""
    fpregs = core.thread_info.fpregs
    area = bytearray(layout.bytes)
    legacy = [fpregs.cwd, fpregs.swd, fpregs.twd, fpregs.fop, fpregs.rip, fpregs.rdp, fpregs.mxcsr, fpregs.mxcsr_mask]
    try:
        _LEGACY.pack_into(area, 0, *legacy, *fpregs.st_space, *fpregs.xmm_space)
    except struct.error as error:
        raise ImageError("core image: damaged floating point registers") from error
    present = _FP_AND_SSE
    for number in _used(core, facts):
        offset, size = layout.parts[number]
        part = _part(core, facts, number)
        if len(part) != size:
            raise ImageError(f"core image: CPU state {number} has {len(part)} bytes instead of {size}")
        area[offset : offset + size] = part
        present |= 1 << number
    struct.pack_into("=Q", area, _HEADER_OFFSET, present)
    return bytes(area)


def _part(core: pb.core_entry, facts: ThreadFacts, number: int) -> bytes:
    component = _COMPONENTS.get(number)
    if component is None:
        return facts.xstate[number]
    words = getattr(core.thread_info.fpregs.xsave, component.field)
    return struct.pack(f"={len(words)}{component.code}", *words)


def _used(core: pb.core_entry, facts: ThreadFacts) -> list[int]:
    xsave = core.thread_info.fpregs.xsave
    named = [n for n, c in _COMPONENTS.items() if xsave.xstate_bv >> n & 1 and len(getattr(xsave, c.field))]
    return sorted({*named, *(n for n in facts.xstate if n not in _COMPONENTS)})


def missing(core: pb.core_entry, facts: ThreadFacts, layout: XstateLayout) -> list[str]:
    """Names of the CPU features whose registers the images hold and this CPU lacks."""
    lacking = (n for n in _used(core, facts) if n not in layout.parts)
    return sorted({_NAMES.get(n, f"XSAVE component {n}") for n in lacking})
