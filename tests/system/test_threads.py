"""State that belongs to single threads."""

from __future__ import annotations

import pytest
from support.round_trip import round_trip
from support.tool import Tool
from support.victims import Victims, VictimUnavailable

pytestmark = pytest.mark.usefixtures("rights")


def test_every_register_of_spinning_threads_survives(tool: Tool, victims: Victims) -> None:
    round_trip(tool, victims.start("registers"))


def test_registers_survive_a_second_dump_of_the_restored_tree(tool: Tool, victims: Victims) -> None:
    round_trip(tool, victims.start("registers"), 2)


def test_amx_tiles_survive(tool: Tool, victims: Victims) -> None:
    try:
        victim = victims.start("tiles")
    except VictimUnavailable:
        pytest.skip("this CPU or kernel has no AMX")
    round_trip(tool, victim, 2)


def test_thread_attributes_and_pending_signals_survive(tool: Tool, victims: Victims) -> None:
    round_trip(tool, victims.start("threads"))


@pytest.mark.usefixtures("real_root")
def test_a_real_time_thread_keeps_its_policy(tool: Tool, victims: Victims) -> None:
    round_trip(tool, victims.start("threads", "realtime"))


def test_interrupted_system_calls_go_on_as_if_nothing_had_happened(tool: Tool, victims: Victims) -> None:
    round_trip(tool, victims.start("blocked"))


def test_interrupted_system_calls_of_a_tree_that_was_left_running_go_on(tool: Tool, victims: Victims) -> None:
    victim = victims.start("blocked")
    tool.dump(victim.pid, victim.folder.parent / "images", "-R").expect(0)
    victim.expect_running()
    victim.finish()


def test_system_calls_that_were_interrupted_twice_go_on_too(tool: Tool, victims: Victims) -> None:
    victim = victims.start("blocked")
    tool.dump(victim.pid, victim.folder.parent / "images", "-R").expect(0)
    round_trip(tool, victim)
