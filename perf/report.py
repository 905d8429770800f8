"""Results of the suite as Markdown and JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from measure import digits, markdown_table
from suite import Line, Outcome

CLOCKS = ("command", "engine", "memory", "frozen")
_MORE = ("image", "peak")
_SMALL_BYTES = 16 << 20  # no speed is told of less than this
Facts = Mapping[str, str | int]


def markdown(facts: Facts, outcomes: Sequence[Outcome], notes: Sequence[str]) -> str:
    """The whole report."""
    lines = ["# Benchmarks", "", ", ".join(f"{name} {value}" for name, value in facts.items()) + ".", ""]
    lines += [*notes, ""]
    lines += ["## In short", "", *summary(outcomes), "", "## Goals", "", *goals(outcomes)]
    for outcome in outcomes:
        lines += ["", f"## {outcome.title}", "", *details(outcome)]
    return "\n".join(lines) + "\n"


def summary(outcomes: Sequence[Outcome]) -> list[str]:
    """A line for everything that was compared: the table of the README."""
    rows = [["", "gpurestore", "its memory stage", "floor", "share of the floor", "CRIU", "times as fast"]]
    for outcome in outcomes:
        for what in dict.fromkeys(line.what for line in outcome.lines):
            if row := summary_row(outcome, what):
                rows.append(row)
    return markdown_table(rows) if len(rows) > 1 else ["Nothing was compared."]


def summary_row(outcome: Outcome, what: str) -> list[str] | None:
    """The first line of ours for ``what``, beside the best floor and CRIU; None where there is neither."""
    ours = next((line for line in outcome.lines if (line.what, line.who) == (what, "ours") and line.series), None)
    floor, criu = outcome.best(what, "floor"), outcome.best(what, "criu", "command")
    if ours is None or (floor is None and criu is None):
        return None
    whole = "command" if "command" in ours.series else ours.clock
    return [
        what,
        f"{digits(ours.median(whole))} s",
        f"{digits(ours.median('memory'))} s" if "memory" in ours.series else "",
        f"{digits(floor.median())} s" if floor else "",
        f"{floor.median() / ours.median():.0%}" if floor else "",
        f"{digits(criu.median('command'))} s" if criu else "",
        f"{criu.median('command') / ours.median('command'):.2f}" if criu else "",
    ]


def goals(outcomes: Sequence[Outcome]) -> list[str]:
    """What was demanded, and whether it was reached; and what could not be measured."""
    rows = [["goal", "wanted", "measured", "", "fastest runs"]]
    for outcome in outcomes:
        rows += [
            [goal.what, goal.wanted, goal.measured, "" if goal.is_met else "missed", goal.fastest]
            for goal in outcome.goals
        ]
    lines = markdown_table(rows) if len(rows) > 1 else ["None was measured."]
    left_out = [f"- {outcome.title}: not measured: {outcome.skipped}." for outcome in outcomes if outcome.skipped]
    left_out += [f"- {outcome.title}: FAILED: {outcome.failed}" for outcome in outcomes if outcome.failed]
    return [*lines, *([""] if left_out else []), *left_out]


def details(outcome: Outcome) -> list[str]:
    """All lines of a case."""
    if outcome.skipped:
        return [f"Not measured: {outcome.skipped}."]
    lines = [f"FAILED: {outcome.failed}", ""] if outcome.failed else []
    measured = [line for line in outcome.lines if line.series]
    if measured:
        clocks = [clock for clock in CLOCKS if any(clock in line.series for line in measured)]
        more = [name for name in _MORE if any(name in line.series for line in measured)]
        head = ["", "of", *(f"{clock} s" for clock in clocks), *more, "spread", "GB/s", "of floor", "runs"]
        lines += markdown_table([head, *(detail_row(outcome, line, clocks, more) for line in measured)])
    for note in outcome.notes:
        lines += ["", note]
    return lines


def detail_row(outcome: Outcome, line: Line, clocks: Sequence[str], more: Sequence[str]) -> list[str]:
    """One line. Spread, speed and share are of the clock that is compared with the floor."""
    main = line.clock if line.clock in line.series else next(iter(line.series))
    series = line.series[main]
    floor = outcome.best(line.what, "floor")
    is_timed = series.unit == "s"
    return [
        line.what,
        line.name,
        *(digits(line.series[clock].median) if clock in line.series else "" for clock in clocks),
        *(f"{digits(line.median(name))} {line.series[name].unit}" if name in line.series else "" for name in more),
        series.spread,
        f"{line.nr_bytes / series.median / 1e9:.2f}" if line.nr_bytes > _SMALL_BYTES and is_timed else "",
        f"{floor.median() / series.median:.0%}" if floor and is_timed and line.who != "floor" else "",
        str(len(series.values)),
    ]


def write_json(target: Path, facts: Facts, outcomes: Sequence[Outcome], notes: Sequence[str]) -> None:
    """Every sample."""
    data: dict[str, Any] = {"machine": dict(facts), "notes": list(notes), "cases": [asdict(o) for o in outcomes]}
    target.write_text(json.dumps(data, indent=1) + "\n")
