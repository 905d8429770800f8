"""How memory gets into images."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

import pytest
from support.tool import Tool
from support.victims import Victims

pytestmark = pytest.mark.usefixtures("rights")

MIB = 1 << 20


@pytest.mark.parametrize("options", [(), ("--direct-io", "--no-sync", "--jobs", "3")], ids=["plain", "direct"])
def test_zeros_are_left_out_and_come_back(tool: Tool, victims: Victims, options: tuple[str, ...]) -> None:
    victim = victims.start("zeros")
    images, trace = tool.folder / "images", tool.folder / "trace.json"
    outcome = tool.dump(victim.pid, images, *options, "--json", "--trace", trace)
    if outcome.code == 2 and "does not take direct I/O" in outcome.err:
        pytest.skip(outcome.err)
    result = json.loads(outcome.expect(0).out)
    victim.expect_gone()
    # 3 times 8 MiB were written to; a third of that is not zero, and over a file zeros count.
    assert 12 * MIB < result["memory_bytes"] < 15 * MIB
    assert 0 < result["frozen_s"] < result["total_s"]
    events = json.loads(trace.read_text())["traceEvents"]
    written = sum(event["args"]["bytes"] for event in events if event["name"] == "write")
    assert 8 * MIB < written < result["memory_bytes"]  # by threads that each have a track
    tool.restore(images, "-d", "--verify").expect(0)
    victim.expect_running()
    victim.finish()


def test_direct_io_and_compression_do_not_go_together(tool: Tool, victims: Victims) -> None:
    victim = victims.start("idle")
    outcome = tool.dump(victim.pid, tool.folder / "images", "--direct-io", "--compress", "zstd").expect(2)
    assert "--compress" in outcome.one_line()
    victim.finish()


def memory_use(pids: Iterable[int]) -> tuple[int, int]:
    """Bytes that tasks use, what several of them use counted once, and bytes in huge pages, counted for each."""
    lines = [line.split() for pid in pids for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()]
    used, huge = (sum(int(words[1]) for words in lines if words[0] == name) for name in ("Pss:", "AnonHugePages:"))
    return used * 1024, huge * 1024


@pytest.mark.parametrize("options", [(), ("--criu-compatible",), ("--compress", "lz4")], ids=" ".join)
def test_a_tree_that_goes_on_shares_as_much_memory_and_has_as_many_huge_pages_as_before(
    tool: Tool, victims: Victims, options: tuple[str, ...]
) -> None:
    victim = victims.start("sharers", "64", "3")
    used, huge = memory_use(victim.pids)
    for turn in ("first", "second"):
        tool.dump(victim.pid, tool.folder / turn, "-R", "--no-sync", *options).expect(0)
        used_after, huge_after = memory_use(victim.pids)
        assert used_after < used + 2 * MIB
        assert huge_after == huge
    victim.expect_running()
    victim.finish()
    tool.restore(tool.folder / "second").expect(0)
    victim.process = None
    for name in ("go", "verdict"):
        (victim.folder / name).unlink()
    victim.finish()


def test_memory_that_is_shared_with_a_process_outside_of_the_tree_stays_shared(tool: Tool, victims: Victims) -> None:
    victim = victims.start("sharers", "64", "2", "apart")
    used, huge = memory_use(victim.pids)
    for pid in map(int, (victim.folder / "workers").read_text().split()):
        tool.dump(pid, tool.folder / str(pid), "-R", "--no-sync").expect(0)
        used_after, huge_after = memory_use(victim.pids)
        assert used_after < used + 2 * MIB
        assert huge_after == huge
    victim.finish()
