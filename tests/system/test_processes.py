"""State that belongs to processes and to the tree as a whole."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
from support.processes import state, wait_until
from support.round_trip import dump, round_trip
from support.tool import Tool
from support.victims import NOBODY, Victims

pytestmark = pytest.mark.usefixtures("rights")


def test_a_tree_keeps_its_pids_parents_groups_sessions_zombies_and_stopped_task(tool: Tool, victims: Victims) -> None:
    round_trip(tool, victims.start("tree"))


def test_signal_actions_and_the_queue_of_pending_signals_survive(tool: Tool, victims: Victims) -> None:
    round_trip(tool, victims.start("signals"))


def test_limits_names_areas_and_other_process_state_survive(tool: Tool, victims: Victims) -> None:
    round_trip(tool, victims.start("process", "an argument", "", "another one"), 2)


def test_timers_keep_their_ids_and_the_time_that_had_run(tool: Tool, victims: Victims) -> None:
    round_trip(tool, victims.start("timers"))


def test_a_tree_that_was_stopped_comes_back_stopped_and_goes_on(tool: Tool, victims: Victims, folder: Path) -> None:
    victim = victims.start("registers")
    os.kill(victim.pid, signal.SIGSTOP)
    wait_until(lambda: state(victim.pid) == "T", "the victim is stopped")
    dump(tool, victim, folder / "images")
    beats = victim.beats()
    tool.restore(folder / "images").expect(0)
    wait_until(lambda: state(victim.pid) == "T", "the tree stops again")  # the signal has to reach it
    assert victim.beats() == beats
    os.kill(victim.pid, signal.SIGCONT)
    victim.expect_running()
    victim.finish()


@pytest.mark.parametrize(("processes", "threads"), [("40", "3"), ("2", "150")])
def test_crowds_of_processes_and_threads_survive(tool: Tool, victims: Victims, processes: str, threads: str) -> None:
    round_trip(tool, victims.start("crowd", processes, threads))


@pytest.mark.usefixtures("real_root")
def test_credentials_of_every_kind_and_a_changed_root_survive(tool: Tool, victims: Victims) -> None:
    round_trip(tool, victims.start("credentials"))


@pytest.mark.usefixtures("real_root")
@pytest.mark.parametrize("name", ["process", "threads", "tree", "shared", "files"])
def test_root_dumps_and_restores_the_tree_of_another_user(tool: Tool, victims: Victims, name: str) -> None:
    round_trip(tool, victims.start(name, user=NOBODY))
