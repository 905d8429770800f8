"""Spans, their export, and the tables made of them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import trio

from gpurestore.errors import GpurestoreError
from gpurestore.pipeline.trace import Span, Trace, chrome_events, format_table, summarize


def ticking(step_ns: int = 1_000_000) -> Callable[[], int]:
    """A clock that moves by one step each time somebody looks."""
    now = [5_000_000_000]

    def clock() -> int:
        now[0] += step_ns
        return now[0]

    return clock


def span(name: str, start: int, end: int | None, track: str = "main", **args: int) -> Span:
    return Span(name, track, start, end, dict(args))


def events_of(spans: list[Span], now: int = 10_000) -> list[dict[str, object]]:
    events = chrome_events(spans, now)["traceEvents"]
    assert isinstance(events, list)
    return events


def test_a_span_has_the_times_at_which_it_began_and_ended() -> None:
    trace = Trace(clock=ticking())

    async def main() -> None:
        async with trace.span("memory", task=12, pages=3) as inner:
            inner.set(bytes=4096)

    trio.run(main)
    (only,) = trace.spans
    assert (only.name, only.track) == ("memory", "task 12")
    assert (only.start_ns, only.end_ns) == (1_000_000, 2_000_000)
    assert only.args == {"pages": 3, "bytes": 4096}


def test_a_failed_stage_is_recorded_with_its_error_and_the_error_goes_on() -> None:
    trace = Trace()
    with pytest.raises(KeyError), trace.span("check"):
        raise KeyError("x")
    assert trace.spans[0].args["error"] == "KeyError"
    assert trace.spans[0].end_ns is not None


def test_a_listener_hears_of_start_and_end() -> None:
    heard = []

    class Recorder:
        def stage_started(self, span: Span) -> None:
            heard.append(("start", span.name))

        def stage_ended(self, span: Span) -> None:
            heard.append(("end", span.name))

    with Trace(Recorder()).span("plan"):
        heard.append(("inside", "plan"))
    assert heard == [("start", "plan"), ("inside", "plan"), ("end", "plan")]


def test_the_file_is_valid_chrome_json_in_microseconds(tmp_path: Path) -> None:
    trace = Trace(clock=ticking())
    with trace.span("plan"):
        pass
    path = tmp_path / "trace.json"
    trace.write(path)
    loaded = json.loads(path.read_text())
    (event,) = [e for e in loaded["traceEvents"] if e["ph"] == "X"]
    assert (event["name"], event["ts"], event["dur"]) == ("plan", 1000.0, 1000.0)
    assert list(tmp_path.iterdir()) == [path]


def test_a_trace_that_cannot_be_written_is_a_clear_error(tmp_path: Path) -> None:
    with pytest.raises(GpurestoreError, match=r"cannot write the trace to .*No such file"):
        Trace().write(tmp_path / "none" / "trace.json")


def test_nested_spans_share_a_lane_and_crossing_ones_do_not() -> None:
    nested = events_of([span("outer", 0, 100), span("inner", 10, 90), span("after", 100, 120)])
    assert len({e["tid"] for e in nested if e["ph"] == "X"}) == 1
    crossing = events_of([span("a", 0, 100), span("b", 50, 150)])
    assert len({e["tid"] for e in crossing if e["ph"] == "X"}) == 2
    names = [e["args"]["name"] for e in crossing if e["name"] == "thread_name"]
    assert names == ["main", "main (2)"]


def test_a_span_that_still_runs_ends_now_in_the_export() -> None:
    (event,) = [e for e in events_of([span("a", 1000, None)], now=5000) if e["ph"] == "X"]
    assert event["dur"] == 4.0


def test_the_wall_time_of_a_stage_counts_overlaps_once() -> None:
    second = 1_000_000_000
    rows = summarize(
        [
            span("memory", 0, 2 * second, "task 1", bytes=10),
            span("memory", second, 3 * second, "task 2", bytes=5),
            span("memory", 5 * second, 6 * second, "task 3"),
            span("check", 0, second),
            span("open", 0, None),
        ]
    )
    assert [(r.name, r.count, r.wall_s, r.nr_bytes) for r in rows] == [("memory", 3, 4.0, 15), ("check", 1, 1.0, 0)]


def test_the_table_lines_up_and_shows_speed_only_for_bytes() -> None:
    table = format_table([("freeze", 0.0012, 0), ("memory", 2.0, 3 * 10**9)])
    assert table.splitlines()[2:] == ["freeze  1.2 ms", "memory  2.00 s  2.8 GiB  1.50 GB/s"]
