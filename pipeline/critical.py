"""The critical path: the chain of stages that determined when an operation ended.

It is found backwards from the stage that ended last: what made a stage begin is, of those that it needed, the one that
ended last. Where nothing says what a stage needed, it is the stage before it on its track (for a hook called for one
task: also on that task's), or for a stage of the main track, which waits for everybody, the one before it anywhere. A
stage that began later still than all it needed had to wait for its turn (a worker, ``--serial``); then it is whatever
ended in between.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from gpurestore.pipeline.trace import MAIN_TRACK, Span
from gpurestore.units import format_seconds, size_and_speed

# Between two stages lie the switch of a trio task and a line of Python or two.
_SLACK_NS = 1_000_000
_NS = 1_000_000_000


@dataclass(frozen=True, slots=True)
class CriticalStage:
    """One link of the chain. ``waited_s`` is the time before it in which no stage of the chain ran.

    ``pid`` is the task that a plugin's hook was called for.
    """

    name: str
    track: str
    start_s: float
    seconds: float
    waited_s: float
    nr_bytes: int
    pid: int | None = None


def critical_path(spans: Iterable[Span]) -> list[Span]:
    """The chain, first stage first. Spans that still run, and parts of others, do not count."""
    ended = sorted((s for s in spans if s.end_ns is not None and s.part_of is None), key=_order)
    if not ended:
        return []
    chain = _Chain(ended)
    path = [ended[-1]]
    while (before := chain.before(path[-1])) is not None:
        path.append(before)
    return path[::-1]


def critical_stages(spans: Iterable[Span]) -> tuple[CriticalStage, ...]:
    """The chain as plain facts."""
    stages = []
    reached = 0
    for span in critical_path(spans):
        waited_s = max(0, span.start_ns - reached) / _NS
        start_s, pid = span.start_ns / _NS, span.args.get("pid")
        task = pid if isinstance(pid, int) else None
        stages.append(CriticalStage(span.name, span.track, start_s, span.seconds, waited_s, span.nr_bytes, task))
        reached = span.end_ns or span.start_ns
    return tuple(stages)


def describe(stages: Sequence[CriticalStage], shown_s: float = 0.0) -> str:
    """The chain on one line: ``check 10.0 ms > memory of task 12 1.20 s (1.0 GiB, 0.89 GB/s) > ...``.

    Stages shorter than ``shown_s`` are left out, but for the longest one.
    """
    longest = max((stage.seconds for stage in stages), default=0.0)
    return " > ".join(_words(stage) for stage in stages if stage.seconds >= min(shown_s, longest))


def _words(stage: CriticalStage) -> str:
    where = "" if stage.track == MAIN_TRACK else f" of {stage.track}"
    where += f" for task {stage.pid}" if stage.pid is not None else ""
    text = f"{stage.name}{where} {format_seconds(stage.seconds)}"
    size, speed = size_and_speed(stage.nr_bytes, stage.seconds)
    return f"{text} ({size}, {speed})" if speed else text


def _order(span: Span) -> tuple[int, int]:
    return (span.end_ns or 0, span.start_ns)


class _Chain:
    """Finished spans in the order of their ends, and steps from one back to what it waited for."""

    def __init__(self, ended: Sequence[Span]) -> None:
        self._ended = ended
        self._ends = [span.end_ns or 0 for span in ended]

    def before(self, span: Span) -> Span | None:
        """What made ``span`` begin when it did; None for the first."""
        needed = self._last([s for s in span.after if _is_before(s, span)]) or self._by_track(span)
        latest = self._latest_before(span)
        if needed is None or latest is None:
            return needed or latest
        waited_ns = span.start_ns - (needed.end_ns or 0)
        return latest if waited_ns > _SLACK_NS and _order(latest) > _order(needed) else needed

    def _by_track(self, span: Span) -> Span | None:
        """Without explicit needs: the one before on the track, or a later stage of the main one."""
        if span.track == MAIN_TRACK:
            return self._latest_before(span)
        pid = span.args.get("pid")
        tracks = {MAIN_TRACK, span.track, f"task {pid}"}
        # What a plugin does for one task waits for that task and for what it does for all, not for the other tasks.
        return self._latest_before(span, lambda s: s.track in tracks and (pid is None or s.args.get("pid", pid) == pid))

    def _latest_before(self, span: Span, fits: Callable[[Span], bool] = lambda _: True) -> Span | None:
        for index in range(bisect_right(self._ends, span.start_ns) - 1, -1, -1):
            found = self._ended[index]
            if _is_before(found, span) and fits(found):
                return found
        return None

    @staticmethod
    def _last(spans: Sequence[Span]) -> Span | None:
        return max(spans, key=_order, default=None)


def _is_before(first: Span, second: Span) -> bool:
    """Whether one had ended when the other began. Beginnings differ too, so that every step leads back in time."""
    return first.end_ns is not None and first.end_ns <= second.start_ns and _begun(first) < _begun(second)


def _begun(span: Span) -> tuple[int, int]:
    return (span.start_ns, span.end_ns or 0)
