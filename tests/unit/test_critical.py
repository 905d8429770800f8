"""The chain of stages that determined the end."""

from __future__ import annotations

import io
import sys

import pytest

from gpurestore.cli.options import to_data
from gpurestore.cli.running import show_summary
from gpurestore.pipeline.critical import critical_path, critical_stages, describe
from gpurestore.pipeline.restore import RestoreResult
from gpurestore.pipeline.trace import Span

MS = 1_000_000


def span(name: str, start_ms: float, end_ms: float | None, track: str = "main", **args: int) -> Span:
    return Span(name, track, int(start_ms * MS), None if end_ms is None else int(end_ms * MS), dict(args))


def names(spans: list[Span]) -> list[str]:
    return [f"{span.name} {span.track}".removesuffix(" main") for span in critical_path(spans)]


def test_nothing_has_no_path() -> None:
    assert critical_path([]) == []
    assert critical_path([span("load", 0, None)]) == []
    assert describe(()) == ""


def test_the_slowest_task_is_on_the_path_with_its_own_stages() -> None:
    spans = [
        span("fork", 0, 10),
        span("mappings", 10.1, 12, "task 1"),
        span("mappings", 10.1, 11, "task 2"),
        span("memory", 12.1, 50, "task 1"),
        span("memory", 11.1, 90, "task 2"),
        span("release", 90.1, 91),
    ]
    assert names(spans) == ["fork", "mappings task 2", "memory task 2", "release"]


def test_a_stage_is_not_explained_by_another_task_that_happened_to_end() -> None:
    spans = [
        span("fork", 0, 10),
        span("mappings", 10, 19.5, "task 1"),
        span("threads", 10, 19.9, "task 2"),
        span("memory", 20, 90, "task 1"),
    ]
    assert names(spans) == ["fork", "mappings task 1", "memory task 1"]


@pytest.mark.parametrize(("memory_ms", "device_ms", "wanted"), [(50, 80, "POST_FORKING"), (80, 50, "memory")])
def test_of_what_a_stage_needed_the_last_to_end_counts(memory_ms: int, device_ms: int, wanted: str) -> None:
    memory = span("memory", 10, memory_ms, "task 1")
    device = span("POST_FORKING", 10, device_ms, "plugin p")
    late = span("RESUME_DEVICES_LATE", 80.1, 85, "task 1")
    late.after = (memory, device)
    path = critical_path([span("fork", 0, 10), memory, device, late])
    assert [s.name for s in path] == ["fork", wanted, "RESUME_DEVICES_LATE"]


def test_a_stage_that_waited_for_its_turn_follows_whoever_had_it() -> None:
    spans = [
        span("fork", 0, 10),
        span("memory", 10, 50, "task 1"),
        span("memory", 50.1, 90, "task 2"),
    ]
    assert names(spans) == ["fork", "memory task 1", "memory task 2"]


def test_a_hook_for_one_task_follows_that_task_or_what_the_plugin_did_for_all() -> None:
    spans = [
        span("fork", 0, 10),
        span("POST_FORKING", 10, 20, "plugin p"),
        span("park", 10, 50, "task 1"),
        span("park", 10, 50.9, "task 2"),
        span("RESUME_DEVICES_LATE", 50.3, 50.8, "plugin p", pid=2),
        span("RESUME_DEVICES_LATE", 50.9, 90, "plugin p", pid=1),
    ]
    assert names(spans) == ["fork", "park task 1", "RESUME_DEVICES_LATE plugin p"]
    assert describe(critical_stages(spans)).endswith("RESUME_DEVICES_LATE of plugin p for task 1 39.1 ms")
    spans[1].end_ns = 50 * MS + MS // 2
    assert names(spans) == ["fork", "POST_FORKING plugin p", "RESUME_DEVICES_LATE plugin p"]


def test_what_workers_did_counts_as_their_stage() -> None:
    memory = span("memory", 0, 50, "task 1")
    pump = span("pump", 1, 50, "task 1 worker 1")
    pump.part_of = memory
    assert critical_path([memory, pump]) == [memory]


def test_stages_without_length_do_not_hold_it_up() -> None:
    spans = [span("a", 0, 0), span("b", 0, 0), span("c", 0, 0, "task 1"), span("d", 0, 1)]
    assert names(spans)[-1] == "d"


def test_a_need_that_ended_later_than_the_stage_began_is_no_reason() -> None:
    late = span("late", 0, 100, "task 2")
    first = span("first", 0, 10, "task 1")
    second = span("second", 10, 101, "task 1")
    second.after = (late, second)
    assert critical_path([late, first, second]) == [first, second]


def test_links_know_their_waits_and_the_line_leaves_short_ones_out() -> None:
    spans = [span("load", 0, 0.5), span("memory", 3, 1003, "task 7", bytes=10**9), span("release", 1003, 1003.2)]
    stages = critical_stages(spans)
    assert [(s.name, s.waited_s) for s in stages] == [("load", 0.0), ("memory", 0.0025), ("release", 0.0)]
    assert describe(stages, 0.001) == "memory of task 7 1.00 s (953.7 MiB, 1.00 GB/s)"
    assert describe(stages).startswith("load 0.5 ms > memory of task 7")


def test_the_longest_link_is_always_named() -> None:
    assert describe(critical_stages([span("load", 0, 0.5)]), 1.0) == "load 0.5 ms"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_is_told_the_critical_path_and_a_file_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    stages = critical_stages([span("load", 0, 0.5), span("memory", 0.5, 1000.5, "task 7", bytes=1 << 30)])
    result = RestoreResult(7, (7, 8), 1 << 30, 1.002, (), stages)
    for stream in (io.StringIO(), Terminal()):
        monkeypatch.setattr(sys, "stderr", stream)
        show_summary("restore", result)
        expected = "restore: 2 tasks, 1.0 GiB of memory, 1.00 s: memory of task 7 1.00 s (1.0 GiB, 1.07 GB/s)\n"
        assert stream.getvalue() == (f"gpurestore {expected}" if stream.isatty() else "")


def test_the_json_of_a_result_has_the_path() -> None:
    result = RestoreResult(7, (7,), 0, 1.0, (), critical_stages([span("load", 0, 500)]))
    assert to_data(result)["critical_path"] == [
        {"name": "load", "track": "main", "start_s": 0.0, "seconds": 0.5, "waited_s": 0.0, "nr_bytes": 0, "pid": None}
    ]
