"""Memory of all kinds."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from support import without_userfaultfd
from support.round_trip import dump, round_trip
from support.tool import Tool
from support.victims import Victim, Victims

from gpurestore.tasks import maps, memory
from gpurestore.tasks.memory import Reading, hugepages

pytestmark = pytest.mark.usefixtures("rights")


@pytest.mark.parametrize("how", ["--parallel", "--serial"])
def test_private_memory_keeps_content_protection_advice_and_locks(tool: Tool, victims: Victims, how: str) -> None:
    round_trip(tool, victims.start("memory"), 1, "-d", how)


def test_file_mappings_keep_copied_and_clean_pages(tool: Tool, victims: Victims) -> None:
    round_trip(tool, victims.start("filemaps"))


def test_shared_memory_stays_shared_between_tasks(tool: Tool, victims: Victims) -> None:
    round_trip(tool, victims.start("shared"))


@pytest.mark.parametrize("how", ["placed", "cold", "read"])
def test_shared_memory_of_several_tasks_is_whole_whichever_way_it_came(tool: Tool, victims: Victims, how: str) -> None:
    """Put in place as whole pages; read past the page cache; read through it where userfaultfd is refused."""
    victim = victims.start("onlookers")
    images, trace = victim.folder.parent / "images", victim.folder.parent / "trace"
    dump(tool, victim, images)
    if how == "cold":
        drop_from_cache(images)
    prefix = without_userfaultfd.PREFIX if how == "read" else ()
    tool.start("restore", "-d", "-D", images, f"--trace={trace}", prefix=prefix, log=True).wait().expect(0)
    events = json.loads(trace.read_text())["traceEvents"]
    (args,) = (event["args"] for event in events if event["name"] == "shared memory")
    in_place, direct = args["placed_bytes"], args["direct_bytes"]
    assert args["bytes"] >= 3000 * 4096
    assert (in_place, direct) == {"placed": (args["bytes"], 0), "cold": (0, args["bytes"]), "read": (0, 0)}[how]
    victim.expect_running()
    victim.finish()


@pytest.mark.parametrize("how", ["placed", "read"])
def test_many_small_pages_of_a_task_are_placed_or_read(tool: Tool, victims: Victims, how: str) -> None:
    """Read where userfaultfd is refused."""
    victim = victims.start("idle", "64")
    images, trace = victim.folder.parent / "images", victim.folder.parent / "trace"
    dump(tool, victim, images)
    prefix = without_userfaultfd.PREFIX if how == "read" else ()
    command = ("restore", "-d", "-D", images, "--hugepages=never", "--cached", f"--trace={trace}")
    tool.start(*command, prefix=prefix, log=True).wait().expect(0)
    events = json.loads(trace.read_text())["traceEvents"]
    (args,) = (event["args"] for event in events if event["name"] == "memory")
    assert args["huge_bytes"] == 0
    assert args["placed_bytes"] >= 60 << 20 if how == "placed" else args["placed_bytes"] == 0
    victim.finish()


def test_copy_on_write_pages_are_right_in_parent_and_child(tool: Tool, victims: Victims) -> None:
    round_trip(tool, victims.start("cow"))


@pytest.mark.parametrize("when", ["now", "on-fault"])
def test_policies_of_an_address_space_hold_again(tool: Tool, victims: Victims, when: str) -> None:
    round_trip(tool, victims.start("policies", when), 2)


def test_memory_is_right_after_a_dump_of_a_restored_tree(tool: Tool, victims: Victims) -> None:
    round_trip(tool, victims.start("shared"), 3)


def huge_mib(victim: Victim) -> dict[str, int]:
    """MiB in huge pages of each area of the victim "hugepages"."""
    by_address = {vma.start: vma.huge_bytes >> 20 for vma in maps.read(victim.pid)}
    lines = (victim.folder / "areas").read_text().splitlines()
    return {name: by_address[int(address, 16)] for name, address in map(str.split, lines)}


def kernels_own_doing() -> tuple[int, int]:
    """How often the kernel had no huge page to give, and how many khugepaged made of small ones."""
    counters = dict(line.split() for line in Path("/proc/vmstat").read_text().splitlines())
    collapsed = Path("/sys/kernel/mm/transparent_hugepage/khugepaged/pages_collapsed").read_text()
    return int(counters["thp_fault_fallback"]), int(collapsed)


@pytest.mark.parametrize(
    ("choice", "options"), [("auto", ()), ("keep", ()), ("never", ()), ("auto", ("--compress=lz4",))]
)
def test_huge_pages_come_back_as_asked_and_mappings_as_they_were(
    tool: Tool, victims: Victims, choice: str, options: tuple[str, ...]
) -> None:
    if not hugepages.anonymous_are_available():
        pytest.skip("this machine gives no transparent huge pages")
    victim = victims.start("hugepages")
    undisturbed, before = kernels_own_doing(), huge_mib(victim)
    images = victim.folder.parent / "images"
    dump(tool, victim, images, *options)
    tool.restore(images, "-d", f"--hugepages={choice}").expect(0)
    after = huge_mib(victim)
    if kernels_own_doing() != undisturbed:
        pytest.skip("the kernel was short of huge pages for a moment, or made some by itself")
    if choice == "auto":
        dense = {
            "dense": 8,
            "unaligned": 6,
            "half": 0,
            "partly": 4,
            "nohuge": 0,
            "huge": 8,
            "advised": 0,
            "readonly": 8,
        }
        assert after == dense
    else:
        assert after == (before if choice == "keep" else dict.fromkeys(before, 0))
    assert before["huge"] > 0
    victim.expect_running()
    victim.finish()


def drop_from_cache(images: Path) -> None:
    """Drop the pages images from the page cache; skips where they could not be read past it."""
    for pages in images.glob("pages-*.img"):
        with memory.open_source(os.open(pages, os.O_RDONLY), Reading.DIRECT) as source:
            if source.direct_fd < 0:
                pytest.skip(f"the file system of {images} has no O_DIRECT")
            os.fsync(source.fd)
            os.posix_fadvise(source.fd, 0, 0, os.POSIX_FADV_DONTNEED)


def test_images_that_are_not_cached_are_read_past_the_cache(tool: Tool, victims: Victims) -> None:
    victim = victims.start("idle", "64")
    images, trace = victim.folder.parent / "images", victim.folder.parent / "trace"
    dump(tool, victim, images)
    drop_from_cache(images)
    tool.restore(images, "-d", f"--trace={trace}").expect(0)
    (span,) = (event for event in json.loads(trace.read_text())["traceEvents"] if event["name"] == "memory")
    assert span["args"]["direct_bytes"] >= 64 << 20
    victim.finish()
