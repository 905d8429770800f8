"""The benchmark suite itself: what it compares, what it demands, and how it tells that."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from xml.etree import ElementTree

import ballast
import cases
import plot
import pytest
import report
from suite import Outcome
from tools import Gpurestore, read_stats

FACTS = {"cpu": "a processor", "cores": 2}


def sample(outcome: Outcome, who: str, name: str, command: list[float], **clocks: float) -> None:
    line = outcome.line("restore of 1 GiB", who, name, 1 << 30)
    for seconds in command:
        line.add("command", seconds)
    for clock, seconds in clocks.items():
        line.add(clock, seconds)


@pytest.fixture
def outcome() -> Outcome:
    found = Outcome("eager", "Restore of one task")
    sample(found, "ours", "gpurestore", [0.6, 0.5, 0.9], engine=0.4, memory=0.2)
    sample(found, "floor", "plain copy, small pages", [0.3])
    sample(found, "floor", "plain copy, huge pages", [0.16])
    sample(found, "criu", "CRIU", [2.0, 2.4, 1.8])
    return found


def test_memory_counts_against_the_best_floor(outcome: Outcome) -> None:
    outcome.want_share(outcome.lines[0], 0.75)
    (goal,) = outcome.goals
    assert (goal.measured, goal.is_met) == ("80%", True)
    assert "huge pages" in goal.what


def test_whole_commands_count_against_criu_by_their_medians(outcome: Outcome) -> None:
    outcome.want_faster(outcome.lines[0], outcome.best("restore of 1 GiB", "criu", "command"), 5)
    (goal,) = outcome.goals
    assert (goal.measured, goal.is_met) == ("3.33 x", False)


def test_nothing_is_demanded_where_there_is_nothing_to_compare_with(outcome: Outcome) -> None:
    outcome.want_faster(outcome.lines[0], outcome.best("another restore", "criu"), 5)
    assert outcome.goals == []


def test_the_table_names_what_was_missed_left_out_and_broken(outcome: Outcome) -> None:
    outcome.want_faster(outcome.lines[0], outcome.lines[3], 5)
    others = [Outcome("lazy", "Lazy restore", skipped="no --lazy"), Outcome("cold", "Cold", failed="it broke")]
    text = report.markdown(FACTS, [outcome, *others], [])
    cells = ["0.600 s", "0.200 s", "0.160 s", "80%", "2.00 s", "3.33"]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()]
    assert ["restore of 1 GiB", *cells] in rows
    assert "| missed |" in text
    assert "- Lazy restore: not measured: no --lazy." in text
    assert "- Cold: FAILED: it broke" in text


def test_every_sample_is_kept(outcome: Outcome, tmp_path: Path) -> None:
    report.write_json(tmp_path / "out.json", FACTS, [outcome], ["quick"])
    data = json.loads((tmp_path / "out.json").read_text())
    assert data["cases"][0]["lines"][0]["series"]["command"]["values"] == [0.6, 0.5, 0.9]


def test_the_picture_is_svg_with_a_bar_for_each_line(outcome: Outcome, tmp_path: Path) -> None:
    plot.draw([outcome, Outcome("lazy", "Lazy restore", skipped="no --lazy")], "title", tmp_path / "out.svg")
    root = ElementTree.parse(tmp_path / "out.svg").getroot()
    hints = [element.text or "" for element in root.iter("{http://www.w3.org/2000/svg}title")]
    for line in outcome.lines:
        assert any(hint.startswith(f"{line.name}: median") for hint in hints)


@pytest.mark.parametrize("name", cases.NAMES)
def test_every_case_says_what_it_is(name: str) -> None:
    case = cases.load(name)
    assert name == case.NAME
    assert case.TITLE
    assert callable(case.run)


def test_an_option_is_there_when_the_help_names_it() -> None:
    tool = Gpurestore({"dump": "usage: x [--compress=METHOD] [-R | -s] [--jobs N]"})
    assert tool.has("dump", "--compress")
    assert tool.has("dump", "-R")
    assert not tool.has("dump", "--direct-io")


def test_numbers_of_criu_stats_are_read(tmp_path: Path) -> None:
    inner = bytes([0x08, 0x05, 0x10, 0xAC, 0x02])  # field 1 is 5, field 2 is 300
    record = bytes([0x0A, len(inner)]) + inner
    file = tmp_path / "stats-dump"
    file.write_bytes(struct.pack("<III", 0x55105940, 0, len(record)) + record)
    assert read_stats(file) == {1: 5, 2: 300}


def test_memory_is_held_only_where_a_balloon_reports_what_is_free(tmp_path: Path) -> None:
    assert not ballast.is_needed(tmp_path)
    for name, device, features in [("virtio0", "0x0002", "1" * 64), ("virtio1", "0x0005", "000001" + "0" * 58)]:
        (tmp_path / name).mkdir()
        (tmp_path / name / "device").write_text(f"{device}\n")
        (tmp_path / name / "features").write_text(f"{features}\n")
    assert ballast.is_needed(tmp_path)
    (tmp_path / "virtio1" / "features").write_text("1" * 5 + "0" * 59 + "\n")
    assert not ballast.is_needed(tmp_path)
