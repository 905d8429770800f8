"""Which memory a tree uses."""

from __future__ import annotations

import mmap
import os

import pytest

from gpurestore.errors import ImageError
from gpurestore.tasks import maps, usage


def test_memory_counts_as_used_once_it_was_touched_again() -> None:
    with mmap.mmap(-1, 4 << 20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory:
        memory.madvise(mmap.MADV_DONTFORK)  # so that the kernel does not join it with its neighbours
        memory[:] = b"x" * len(memory)

        def is_used() -> bool:
            ours = [vma for vma in maps.read(os.getpid()) if "dc" in vma.flags and vma.rss_bytes == len(memory)]
            assert len(ours) == 1
            return bool(usage.collect(ours))

        usage.forget([os.getpid()])
        assert not is_used()
        assert memory[len(memory) // 2] == ord("x")
        assert is_used()


def test_a_task_that_has_ended_shows_nothing() -> None:
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    os.waitpid(pid, 0)
    usage.forget([pid])


def test_what_was_noted_is_read_again() -> None:
    assert usage.used({"used": ["7f00", "1000"]}) == {0x7F00, 0x1000}
    assert usage.used({}) == frozenset()


@pytest.mark.parametrize("value", [7, [7], ["x"], {"a": 1}, None])
def test_what_is_no_list_of_addresses_is_told(value: object) -> None:
    with pytest.raises(ImageError, match=r"mm\.used"):
        usage.used({"used": value})
