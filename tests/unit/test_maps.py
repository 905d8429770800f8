"""Reading smaps, and finding room between mappings."""

from __future__ import annotations

import mmap
import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpurestore.errors import NoSuchTaskError
from gpurestore.tasks import maps

SMAPS = b"""\
55d0c0a00000-55d0c0a21000 rw-p 00000000 00:00 0                          [heap]
Size:                132 kB
Rss:                  12 kB
Referenced:            8 kB
Swap:                  4 kB
Locked:                8 kB
VmFlags: rd wr mr mw me ac lo
7f0000000000-7f0000001000 r-xs 00002000 fe:00 338944                     /tmp/a b\\012c (deleted)
Rss:                   0 kB
ProtectionKey:         3
VmFlags: rd ex mr sh
ffffffffff600000-ffffffffff601000 --xp 00000000 00:00 0                  [vsyscall]
VmFlags: ex
"""


def test_every_fact_of_an_smaps_entry_is_read() -> None:
    heap, file, vsyscall = maps.parse(SMAPS)
    assert (heap.start, heap.end, heap.prot, heap.shared) == (0x55D0C0A00000, 0x55D0C0A21000, 3, False)
    assert (heap.path, heap.rss_bytes, heap.swap_bytes, heap.locked_bytes) == ("[heap]", 12288, 4096, 8192)
    assert heap.referenced_bytes == 8192
    assert heap.flags == {"rd", "wr", "mr", "mw", "me", "ac", "lo"}
    assert (file.path, file.deleted, file.shared, file.prot) == ("/tmp/a b\nc", True, True, 5)
    assert (file.offset, file.dev, file.ino, file.pkey) == (0x2000, (0xFE, 0), 338944, 3)
    assert vsyscall.prot == maps.PROT_EXEC
    assert heap.where(12) == "pid 12, mapping 55d0c0a00000-55d0c0a21000"


def test_our_own_mappings_are_found_where_they_are() -> None:
    with mmap.mmap(-1, 3 * 4096) as shared:
        shared[0] = 1
        ours = [vma for vma in maps.read(os.getpid()) if vma.path == "/dev/zero" and vma.size == 3 * 4096]
        assert [vma.shared and vma.deleted and vma.rss_bytes == 4096 for vma in ours] == [True]
        assert (ours[0].start, ours[0].end) in maps.own_ranges()


def test_a_pid_that_is_gone_is_named() -> None:
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    os.waitpid(pid, 0)
    with pytest.raises(NoSuchTaskError, match=f"pid {pid}"):
        maps.read(pid)


def test_gaps_are_what_ranges_leave_free() -> None:
    assert maps.gaps([(10, 20), (15, 30), (40, 50)], 5, 60) == [(5, 10), (30, 40), (50, 60)]
    assert maps.gaps([], 0, 9) == [(0, 9)]
    assert maps.gaps([(0, 100)], 0, 60) == []


def test_a_hole_is_in_the_quiet_part_and_the_same_every_time() -> None:
    taken = [(0x400000, 0x500000), (0x7F0000000000, 0x7F0000100000)]
    first = maps.find_hole(taken, 1 << 30)
    assert first == maps.find_hole(list(reversed(taken)), 1 << 30)
    assert first % maps.HUGE_PAGE_BYTES == 0
    assert 0x1000_0000_0000 <= first < 0x5000_0000_0000


def test_a_full_address_space_has_no_hole() -> None:
    with pytest.raises(ValueError, match="no hole"):
        maps.find_hole([(0, maps.TASK_SIZE)], 4096)


page_ranges = st.tuples(st.integers(16, (1 << 35) - 2), st.integers(1, 1 << 34)).map(
    lambda pair: (pair[0] << 12, min(pair[0] + pair[1], (1 << 35) - 1) << 12)
)


@given(st.lists(page_ranges, max_size=12), st.integers(1, 1 << 40))
def test_a_hole_never_overlaps_anything(taken: list[tuple[int, int]], size: int) -> None:
    try:
        start = maps.find_hole(taken, size)
    except ValueError:
        return
    assert start >= maps.LOWEST_ADDRESS and start + size <= maps.TASK_SIZE
    assert all(start + size <= low or high <= start for low, high in taken)
