"""The progress line: what it says, and that it stays away where there is no terminal."""

from __future__ import annotations

import io

import pytest
import trio
import trio.testing

from gpurestore.pipeline.graph import Graph, Node
from gpurestore.pipeline.progress import Progress
from gpurestore.pipeline.trace import Trace
from gpurestore.pipeline.walk import Walk


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def make(columns: int = 200) -> tuple[Progress, Terminal, list[float]]:
    now = [100.0]
    terminal = Terminal()
    return Progress("restore", terminal, lambda: now[0], lambda: columns), terminal, now


def test_there_is_no_progress_without_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    assert Progress.for_terminal("dump", io.StringIO()) is None
    assert Progress.for_terminal("dump", Terminal()) is not None
    monkeypatch.setenv("TERM", "dumb")
    assert Progress.for_terminal("dump", Terminal()) is None


def test_the_line_names_the_stages_that_run() -> None:
    progress, _, now = make()
    trace = Trace(progress)
    with trace.span("descriptors", task=1), trace.span("memory", task=1), trace.span("memory", task=2):
        now[0] += 2.5
        assert progress.line() == "restore   2.5 s  descriptors, memory x2"
    assert progress.line() == "restore   2.5 s  ..."


def test_bytes_and_speed_come_from_the_gauges() -> None:
    progress, _, now = make()
    done = [0]
    with Trace(progress).span("memory", task=1, total=4 << 30, gauge=lambda: done[0]):
        assert progress.line() == "restore   0.0 s  0 B of 4.0 GiB (0 %)  memory"
        now[0] += 0.5
        done[0] = 1 << 30
        assert progress.line() == "restore   0.5 s  1.0 GiB of 4.0 GiB (25 %), 2.15 GB/s  memory"


def test_the_speed_is_that_of_the_last_second() -> None:
    progress, _, now = make()
    done = [0]
    with Trace(progress).span("memory", task=1, gauge=lambda: done[0]):
        for step in (1_000_000_000, 1_000_000_000, 0, 0):
            progress.line()
            now[0] += 1.0
            done[0] += step
        assert progress.line().endswith("0.00 GB/s  memory")


def test_bytes_of_stages_that_have_ended_still_count() -> None:
    progress, _, now = make()
    trace = Trace(progress)
    with trace.span("memory", task=1, total=1 << 30, gauge=lambda: 1 << 30):
        with trace.span("memory", task=2, total=1 << 30, gauge=lambda: 1 << 30):
            now[0] += 0.5
        assert "  2.0 GiB of 2.0 GiB (100 %)" in progress.line()


def test_the_line_says_what_waits_for_what() -> None:
    progress, _, _ = make()
    content, one, two = Node("POST_FORKING", plugin="cuda"), Node("memory", 1), Node("memory", 2)
    late = [(Node("RESUME_DEVICES_LATE", pid, "cuda"), [content]) for pid in (5, 6)]
    progress.waiting = lambda: [*late, (Node("release"), [content, one, two])]
    assert progress.line().endswith(
        "; RESUME_DEVICES_LATE waits for POST_FORKING of cuda x2"
        "; release waits for POST_FORKING of cuda, memory of task 1, 1 more"
    )


def test_what_holds_a_stage_up_is_what_runs() -> None:
    first, second, third, last = Node("a"), Node("b"), Node("c"), Node("last")

    async def main() -> None:
        walk = Walk(Trace(), Graph({first: (), second: (), third: (second,), last: (first, third)}))
        assert walk.waiting() == []
        async with walk.stage(first):
            pass
        async with walk.stage(second):
            assert walk.waiting() == [(last, [second])]

    trio.run(main)


def test_the_line_is_cut_at_the_width_of_the_terminal_and_wiped_at_the_end() -> None:
    progress, terminal, _ = make(columns=12)
    progress.draw()
    progress.wipe()
    progress.wipe()
    assert terminal.getvalue() == "\r\x1b[2Krestore   0\r\x1b[2K"


def test_it_runs_until_cancelled_and_leaves_a_clean_line() -> None:
    progress, terminal, _ = make()

    async def main() -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(progress.run)
            await trio.sleep(0.95)
            nursery.cancel_scope.cancel()

    trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))
    assert terminal.getvalue().count("restore") == 10
    assert terminal.getvalue().endswith("\r\x1b[2K")


def test_a_terminal_that_goes_away_does_not_end_the_operation() -> None:
    class Gone(Terminal):
        def write(self, text: str) -> int:
            raise OSError(5, "Input/output error")

    Progress("dump", Gone(), lambda: 0.0, lambda: 80).draw()
