"""System call batches: layout, pointers, references, splitting."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpurestore import batch
from gpurestore.batch import Call, Data, InOut, Out, Ref
from gpurestore.syscalls import NR

BASE = 0x7000_0000_0000
ROOM = 1 << 20


def test_the_layout_is_the_one_that_the_agent_reads() -> None:
    raw = batch.encode([Call(NR.CLOSE, (7,), want=0)], BASE, ROOM)
    assert raw == struct.pack("=IIiI", 1, 0, 0, 0) + struct.pack("=Q6QIIqq", 3, 7, 0, 0, 0, 0, 0, 0, 1, 0, 0)


def test_negative_numbers_are_passed_in_twos_complement() -> None:
    raw = batch.encode([Call(NR.OPENAT, (-100,))], BASE, ROOM)
    assert struct.unpack_from("=Q", raw, batch.HEADER_BYTES + 8)[0] == 2**64 - 100


def test_a_buffer_lies_where_its_pointer_says_aligned_to_16_bytes() -> None:
    raw = batch.encode([Call(NR.WRITE, (1, Data(b"hello"), 5)), Call(NR.READ, (0, Out(3), 3))], BASE, ROOM)
    pointers = [struct.unpack_from("=Q", raw, batch.HEADER_BYTES + i * batch.CALL_BYTES + 16)[0] for i in range(2)]
    assert raw[pointers[0] - BASE :].startswith(b"hello")
    assert all(pointer % 16 == 0 for pointer in pointers)


def test_a_buffer_can_point_to_another_one() -> None:
    inner = Data(b"x" * 20)
    raw = batch.encode([Call(NR.CLONE3, (Data(bytes(24), ((8, inner),)), 24))], BASE, ROOM)
    outer = struct.unpack_from("=Q", raw, batch.HEADER_BYTES + 8)[0] - BASE
    pointed = struct.unpack_from("=Q", raw, outer + 8)[0] - BASE
    assert raw[pointed : pointed + 20] == b"x" * 20


def test_a_reference_forward_is_refused() -> None:
    with pytest.raises(ValueError, match="not before it"):
        batch.encode([Call(NR.CLOSE, (Ref(0),))], BASE, ROOM)


def test_a_batch_that_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="does not fit"):
        batch.encode([Call(NR.WRITE, (1, Data(bytes(100)), 100))], BASE, 150)


def test_results_and_output_buffers_come_back_in_order() -> None:
    calls = [Call(NR.READ, (0, Out(4), 4)), Call(NR.PRCTL, (1, InOut(b"abcd"), Data(b"in")))]
    raw = bytearray(batch.encode(calls, BASE, ROOM))
    for index, value in enumerate((4, -22)):
        struct.pack_into("=q", raw, batch.HEADER_BYTES + (index + 1) * batch.CALL_BYTES - 8, value)
    pointer = struct.unpack_from("=Q", raw, batch.HEADER_BYTES + 16)[0] - BASE
    raw[pointer : pointer + 4] = b"data"
    state = batch.decode(calls, bytes(raw))
    assert [result.result for result in state.results] == [4, -22]
    assert [result.outs for result in state.results] == [(b"data",), (b"abcd",)]
    assert state.failed is None


def test_the_call_that_ended_a_batch_is_told() -> None:
    calls = [Call(NR.GETPID), Call(NR.GETTID)]
    raw = bytearray(batch.encode(calls, BASE, ROOM))
    struct.pack_into("=IIi", raw, 0, 2, 1, 1)
    assert batch.decode(calls, bytes(raw)).failed == 1


CALLS = st.lists(
    st.tuples(st.integers(0, 200), st.booleans()).map(
        lambda drawn: Call(NR.WRITE, (1, Data(bytes(drawn[0])), drawn[0]), may_fail=drawn[1])
    ),
    max_size=60,
)


@given(CALLS, st.integers(500, 3000))
def test_splitting_keeps_every_call_in_order_and_every_batch_fits(calls: list[Call], room: int) -> None:
    parts = batch.split(calls, room)
    assert [call for part in parts for call in part] == calls
    for part in parts:
        batch.encode(part, BASE, room)


def test_linked_calls_stay_together_and_their_references_follow() -> None:
    filler = Call(NR.WRITE, (1, Data(bytes(300)), 300))
    calls = [filler, Call(NR.OPENAT, (-100, Data(b"/\0"))), filler, Call(NR.CLOSE, (Ref(1),))]
    parts = batch.split(calls, 900)
    assert [len(part) for part in parts] == [1, 3]
    assert parts[1][2].args == (Ref(0),)


def test_linked_calls_that_fit_into_no_batch_are_refused() -> None:
    calls = [Call(NR.GETPID), Call(NR.WRITE, (1, Data(bytes(900)), 900)), Call(NR.CLOSE, (Ref(0),))]
    with pytest.raises(ValueError, match="belong together"):
        batch.split(calls, 1000)


def test_a_call_reads_like_one() -> None:
    call = Call(NR.DUP3, (Ref(0), 5, 0x80000), "descriptor 5")
    assert str(call) == "descriptor 5: DUP3(#0, 5, 0x80000)"
