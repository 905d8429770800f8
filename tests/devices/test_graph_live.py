"""The graph that --dry-run prints is the one that a restore walks: its trace is held against it, edge by edge."""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path
from typing import Any

import pytest
from support import processes
from support.recorded import Recorded, dumped, restored
from support.round_trip import dump
from support.tool import Tool
from support.victims import Victims

pytestmark = pytest.mark.usefixtures("rights")
_STAGE = re.compile(r"stage (.+?)(?: \([0-9.]+ (?:B|[KMGT]iB)\))?(?: after (.+))?")


def printed(text: str) -> dict[str, list[str]]:
    """Stages and what each comes after, read back from the output of --dry-run."""
    stages = {}
    for line in text.splitlines():
        if line.startswith("stage "):
            match = _STAGE.fullmatch(line)
            assert match, line
            stages[match[1]] = match[2].split(", ") if match[2] else []
    return stages


def happened(trace: Path) -> dict[str, tuple[float, float]]:
    """Begin and end of each stage in a trace, by the names that --dry-run uses."""
    events: list[dict[str, Any]] = json.loads(trace.read_text())["traceEvents"]
    tracks = {e["tid"]: re.sub(r" \([0-9]+\)$", "", e["args"]["name"]) for e in events if e["name"] == "thread_name"}
    found = {}
    for event in events:
        if event["ph"] != "X" or "part_of" in event["args"] or event["name"] in ("init", "exit"):
            continue
        name, track = event["name"], tracks[event["tid"]]
        if track.startswith("plugin "):
            about = f" for task {event['args']['pid']}" if "pid" in event["args"] else ""
            name = f"{name} of {track.removeprefix('plugin ')}{about}"
        elif track != "main":
            name = f"{name} of {track}"
        assert name not in found, f"{name} ran twice"
        found[name] = (event["ts"], event["ts"] + event["dur"])
    return found


@pytest.mark.parametrize(("name", "how"), [("shared", "--parallel"), ("shared", "--serial"), ("tree", "--lazy")])
def test_a_restore_keeps_to_every_edge_of_the_graph_that_a_dry_run_prints(
    tool: Tool, victims: Victims, folder: Path, name: str, how: str
) -> None:
    recorded = Recorded(folder)
    recorded.add("second")
    victim = victims.start(name)
    dumped(tool, victim, folder / "images", recorded)
    mode = () if how == "--serial" else (how,)
    plan = tool.restore(folder / "images", "--dry-run", *mode, *recorded.options, env=recorded.env()).expect(0).out
    assert recorded.calls() == []
    assert "plugin recorder 0.3.0 (Python), the images name it" in plan
    restored(tool, folder / "images", recorded, how, "--trace", str(folder / "trace.json"))
    stages, spans = printed(plan), happened(folder / "trace.json")
    assert set(stages) == set(spans)
    also = {"shared": "shared memory", "tree": "fill"}[name]
    assert {"POST_FORKING of second", also, f"RESUME_DEVICES_LATE of recorder for task {victim.pid}"} <= set(stages)
    for stage, needed in stages.items():
        for other in needed:
            assert spans[other][1] <= spans[stage][0], f"{stage} began before {other} had ended"
    if how == "--serial":
        in_order = sorted(spans.values())
        assert all(first[1] <= second[0] for first, second in itertools.pairwise(in_order))
    victim.finish()


def test_a_dry_run_draws_the_graph_and_says_which_plugin_is_missing(tool: Tool, victims: Victims, folder: Path) -> None:
    recorded = Recorded(folder)
    victim = victims.start("idle")
    dumped(tool, victim, folder / "images", recorded)
    outcome = tool.restore(folder / "images", "--dry-run").expect(1)
    assert "the images need plugins that are not there: recorder" in outcome.one_line()
    options = (*recorded.options, "--graph", str(folder / "graph.svg"))
    tool.restore(folder / "images", "--dry-run", *options, env=recorded.env()).expect(0)
    assert "POST_FORKING of recorder" in (folder / "graph.svg").read_text()
    assert processes.state(victim.pid) is None
    tool.restore(folder / "images", "-d", "--graph", str(folder / "graph.svg")).expect(2)


def test_a_trace_has_a_track_for_every_task_plugin_and_worker(tool: Tool, victims: Victims, folder: Path) -> None:
    recorded = Recorded(folder)
    victim = victims.start("tree")
    options = (*recorded.options, "--trace", str(folder / "dump.json"))
    dump(tool, victim, folder / "images", *options, env=recorded.env())
    restored(tool, folder / "images", recorded, "--trace", str(folder / "restore.json"))
    for name, part in (("dump", "write"), ("restore", "pump")):
        tracks, moved = read_tracks(folder / f"{name}.json")
        assert {"main", "plugin recorder", f"task {victim.pid}", f"task {victim.pid} worker 1"} <= tracks.keys()
        assert part in tracks[f"task {victim.pid} worker 1"]
        assert {"init", "exit"} <= set(tracks["plugin recorder"])
        if name == "dump":
            assert moved["write"] == moved["memory"] > 0
    victim.finish()


def read_tracks(trace: Path) -> tuple[dict[str, list[str]], dict[str, int]]:
    """The stages of each track, and the bytes that each kind of stage moved."""
    events: list[dict[str, Any]] = json.loads(trace.read_text())["traceEvents"]
    names = {e["tid"]: re.sub(r" \([0-9]+\)$", "", e["args"]["name"]) for e in events if e["name"] == "thread_name"}
    tracks: dict[str, list[str]] = {}
    moved: dict[str, int] = {}
    for event in events:
        if event["ph"] == "X":
            tracks.setdefault(names[event["tid"]], []).append(event["name"])
            moved[event["name"]] = moved.get(event["name"], 0) + int(event["args"].get("bytes", 0))
    return tracks, moved
