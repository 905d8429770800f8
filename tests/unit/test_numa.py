"""NUMA policies of mappings: asked, planned, and refused where their nodes are not."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpurestore.batch import Call, CallResult, Data, Out
from gpurestore.errors import ImageError
from gpurestore.images import pb
from gpurestore.syscalls import NR
from gpurestore.tasks import maps, numa

BIND, STATIC = 2, 1 << 15
AREA = pb.vma_entry(start=0x2000, end=0x5000, pgoff=0, shmid=0, prot=3, flags=2, status=1, fd=-1)


class FakeTask:
    """A task whose second mapping is bound to nodes 0 and 65."""

    def __init__(self) -> None:
        starts = (0x1000, 0x2000, maps.TASK_SIZE - 0x1000)
        self.vmas = [maps.Vma(at, at + 0x1000, 3, False, 0, (0, 0), 0, "", False) for at in starts]

    def ask(self, calls: list[Call]) -> list[CallResult]:
        return [self._answer(call) for call in calls]

    def _answer(self, call: Call) -> CallResult:
        assert call.nr == NR.GET_MEMPOLICY and call.args[4] == 2
        bound = call.args[3] == 0x2000
        values = [struct.pack("=Q", BIND | STATIC), struct.pack("=16Q", 1, 2, *[0] * 14)]
        outs = [value if bound else bytes(len(value)) for value in values]
        return CallResult(0, tuple(out for out, arg in zip(outs, call.args[:2], strict=True) if isinstance(arg, Out)))


def test_only_mappings_with_a_policy_of_their_own_are_kept_and_get_it_again() -> None:
    kept = numa.collect(FakeTask())
    assert kept == {"2000": [BIND | STATIC, 1, 2, *[0] * 14]}
    (call,) = numa.plan(AREA, numa.of_mappings({"numa": kept}))
    mask = Data(struct.pack("=16Q", 1, 2, *[0] * 14))
    assert (call.nr, call.args, call.want) == (NR.MBIND, (0x2000, 0x3000, BIND | STATIC, mask, 1024, 0), 0)
    assert numa.plan(AREA, numa.of_mappings({})) == []


def test_a_kernel_without_policies_has_none() -> None:
    assert numa.answer(-38, (bytes(8), bytes(128))) is None


def test_nodes_that_are_not_here_are_named() -> None:
    assert numa.check("pid 7", [(BIND, 1), (1, 0), (4,)]) == []
    assert numa.check("pid 7", [(BIND, 1 << 60 | 1)]) == []  # the kernel takes what there is
    (finding,) = numa.check("pid 7", [(BIND, 0, 6 << 50)])
    assert (
        str(finding.where) == "pid 7" and finding.what.endswith("nodes 115-116") and "this machine has" in finding.why
    )


@given(st.recursive(st.none() | st.integers() | st.text(max_size=3), lambda inner: st.lists(inner, max_size=20)))
def test_whatever_an_image_says_is_a_policy_or_an_error(value: object) -> None:
    try:
        policies = numa.of_mappings({"numa": {"2000": value}})
    except ImageError:
        return
    (call,) = numa.plan(AREA, policies)
    assert call.nr == NR.MBIND


def test_an_image_without_an_object_of_policies_is_refused() -> None:
    with pytest.raises(ImageError, match="not an object"):
        numa.of_mappings({"numa": [1]})
