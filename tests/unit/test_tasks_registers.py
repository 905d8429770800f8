"""Registers: system calls that begin again, and the XSAVE area through CRIU's message and back."""

from __future__ import annotations

import struct
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.selfcalls import LAYOUT, REGISTERS

from gpurestore.errors import ImageError
from gpurestore.images import pb
from gpurestore.tasks import registers
from gpurestore.tasks.facts import ThreadFacts
from gpurestore.tasks.registers import XstateLayout

MAX = 1 << 64
POLL, RESTART = 7, 219


@dataclass
class State:
    tid: int
    regs: dict
    xstate: bytes


def _regs(**changed):
    return {n: i + 1 for i, n in enumerate(REGISTERS.split())} | {"cs": 0x33, "orig_rax": MAX - 1} | changed


def _nothing(address, size):
    raise OSError


def _code(at, code):
    def read(address, size):
        return bytes(code[i] if 0 <= (i := address + n - at) < len(code) else 0x90 for n in range(size))

    return read


@pytest.mark.parametrize("error", [512, 513, 514, 516])
def test_an_interrupted_call_begins_again(error):
    fixed = registers.begin_call_again(_regs(rax=MAX - error, orig_rax=35, rip=0x1002), _nothing)
    assert (fixed["rip"], fixed["rax"], fixed["rdi"]) == (0x1000, 35, _regs()["rdi"])


@pytest.mark.parametrize("answer", [0, 4, MAX - 4, MAX - 11, MAX - 515, RESTART])
def test_an_answer_that_is_none_of_these_stays(answer):
    regs = _regs(rax=answer, orig_rax=POLL, rip=0x1002)
    assert registers.begin_call_again(regs, _code(0x1000, b"\x0f\x05\x48")) == regs


def test_outside_of_a_call_nothing_is_touched():
    regs = _regs(rax=MAX - 512)
    assert registers.begin_call_again(regs, _nothing) == regs


def test_a_restarted_call_is_recognised_by_the_code_that_made_it():
    read = _code(0x1000, b"\xb8\x07\x00\x00\x00\x0f\x05\xc3")
    fixed = registers.begin_call_again(_regs(rax=MAX - 516, orig_rax=RESTART, rip=0x1007), read)
    assert (fixed["rip"], fixed["rax"], fixed["orig_rax"]) == (0x1005, POLL, POLL)


def test_a_restarted_futex_wait_is_recognised_by_its_arguments():
    regs = _regs(rax=MAX - 516, orig_rax=RESTART, rip=0x1007, rdi=0x7000, rsi=128 | 9 | 256, r10=0x8000)
    fixed = registers.begin_call_again(regs, _nothing)
    assert (fixed["rip"], fixed["rax"], fixed["orig_rax"]) == (0x1005, 202, 202)


def test_a_restarted_call_that_is_not_recognised_is_interrupted():
    fixed = registers.begin_call_again(_regs(rax=MAX - 516, orig_rax=RESTART, rip=0x1007), _nothing)
    assert (fixed["rip"], fixed["rax"]) == (0x1007, MAX - 4)


def test_a_call_that_is_about_to_be_restarted_begins_again():
    read = _code(0x1000, b"\x0f\x05\xc3")
    fixed = registers.begin_call_again(_regs(rax=RESTART, orig_rax=POLL, rip=0x1000), read)
    assert (fixed["rip"], fixed["rax"]) == (0x1000, POLL)


def _area(layout, filled, seed=1):
    area = bytearray((i * seed + i // 251) & 0xFF for i in range(layout.bytes))
    area[416:576] = bytes(160)
    for number, (offset, size) in layout.parts.items():
        if not filled >> number & 1:
            area[offset : offset + size] = bytes(size)
    for start in range(576, layout.bytes):
        if not any(o <= start < o + s for o, s in layout.parts.values()):
            area[start] = 0
    struct.pack_into("=Q", area, 512, filled)
    return bytes(area)


@given(st.sets(st.sampled_from([2, 5, 6, 7, 17, 18])), st.integers(1, 255))
def test_the_whole_area_comes_back(numbers, seed):
    filled = 3 | sum(1 << n for n in numbers)
    area = _area(LAYOUT, filled, seed)
    core, facts = pb.core_entry(mtype=pb.core_entry.X86_64), ThreadFacts()
    assert registers.collect(State(1, _regs(), area), _nothing, LAYOUT, core, facts) == []
    assert bool(registers.plan(facts)) == (18 in numbers)
    again = ThreadFacts.from_json(facts.to_json(), "test")
    core.thread_info.clear_tid_addr = 0
    core = pb.core_entry.FromString(core.SerializeToString())
    assert registers.xstate(core, again, LAYOUT) == area
    assert registers.general(core) == _regs()


def test_another_layout_gets_the_same_registers_at_its_own_places():
    area = _area(LAYOUT, 0b11100111)
    core, facts = pb.core_entry(mtype=pb.core_entry.X86_64), ThreadFacts()
    registers.collect(State(1, _regs(), area), _nothing, LAYOUT, core, facts)
    other = XstateLayout(2440, {2: (576, 256), 5: (832, 64), 6: (896, 512), 7: (1408, 1024), 9: (2432, 8)})
    there = registers.xstate(core, facts, other)
    assert there[1408 : 1408 + 1024] == area[1664 : 1664 + 1024]
    assert registers.missing(core, facts, other) == []
    plain = XstateLayout(832, {2: (576, 256)})
    assert registers.missing(core, facts, plain) == ["AVX-512"]


def test_32_bit_code_is_refused():
    core, facts = pb.core_entry(), ThreadFacts()
    (found,) = registers.collect(State(1, _regs(cs=0x23), b""), _nothing, LAYOUT, core, facts)
    assert "32-bit" in str(found)


def test_damaged_floating_point_registers_are_an_image_error():
    core, facts = pb.core_entry(mtype=pb.core_entry.X86_64), ThreadFacts()
    registers.collect(State(1, _regs(), _area(LAYOUT, 7)), _nothing, LAYOUT, core, facts)
    del core.thread_info.fpregs.xmm_space[3:]
    with pytest.raises(ImageError):
        registers.xstate(core, facts, LAYOUT)
