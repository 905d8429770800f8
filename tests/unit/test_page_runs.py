"""The algebra of runs of pages, against sets of page numbers."""

from __future__ import annotations

from array import array
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpurestore.errors import CoreError
from gpurestore.tasks.maps import PAGE_BYTES
from gpurestore.tasks.memory import PageRuns

# Pairs of a gap before a run (0: it touches the one before) and the pages in it.
LISTS = st.lists(st.tuples(st.integers(0, 3), st.integers(1, 4)), max_size=30)


def runs_of(pairs: list[tuple[int, int]]) -> PageRuns:
    runs = PageRuns()
    at = 0
    for gap, nr in pairs:
        runs.vaddrs.append((at + gap) * PAGE_BYTES)
        runs.nr_pages.append(nr)
        at += gap + nr
    return runs


def pages_of(runs: PageRuns) -> list[int]:
    return [address // PAGE_BYTES + i for address, nr in runs for i in range(nr)]


def lies_within(runs: PageRuns, others: PageRuns) -> bool:
    """Every run lies in one run of the others."""
    spans = [(a, a + n * PAGE_BYTES) for a, n in others]
    return all(any(s <= a and a + n * PAGE_BYTES <= e for s, e in spans) for a, n in runs)


@given(LISTS, LISTS)
def test_runs_combine_as_sets_of_pages_do(first: list[tuple[int, int]], second: list[tuple[int, int]]) -> None:
    a, b = runs_of(first), runs_of(second)
    ours, theirs = set(pages_of(a)), set(pages_of(b))
    assert pages_of(a & b) == sorted(ours & theirs)
    assert pages_of(a - b) == sorted(ours - theirs)
    assert pages_of(a | b) == sorted(ours | theirs)
    assert lies_within(a & b, a)
    assert lies_within(a - b, a)


@given(LISTS, LISTS)
def test_a_union_has_no_runs_that_touch(first: list[tuple[int, int]], second: list[tuple[int, int]]) -> None:
    united = list(runs_of(first) | runs_of(second))
    assert all(a + n * PAGE_BYTES < b for (a, n), (b, _) in pairwise(united))


@pytest.mark.parametrize("runs", [[(8, 2), (9, 1)], [(8, 1), (4, 1)], [(8, 0)], [(8, 1 << 52)]])
def test_lists_that_are_none_are_refused(runs: list[tuple[int, int]]) -> None:
    broken = PageRuns(array("Q", (a * PAGE_BYTES for a, _ in runs)), array("Q", (n for _, n in runs)))
    with pytest.raises(CoreError):
        broken & PageRuns()
    with pytest.raises(CoreError):
        PageRuns() - broken


def test_half_a_million_runs_take_no_time_in_python() -> None:
    nr = 500_000
    even = PageRuns(array("Q", range(0, nr * 8192, 8192)), array("Q", [1]) * nr)
    whole = PageRuns.of_ranges([(0, nr * 8192)])
    assert len(whole - even) == nr
    assert (whole & even).total_bytes == (even & whole).total_bytes == nr * PAGE_BYTES
    assert (even | (whole - even)).total_bytes == whole.total_bytes
