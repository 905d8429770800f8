"""How memory gets into images."""

from __future__ import annotations

import json

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
