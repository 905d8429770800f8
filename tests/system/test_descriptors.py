"""Descriptors of all kinds that a dump carries."""

from __future__ import annotations

import pytest
from support.round_trip import round_trip
from support.tool import Tool
from support.victims import Victims

pytestmark = pytest.mark.usefixtures("rights")


def test_files_keep_position_flags_and_sharing_of_descriptions(tool: Tool, victims: Victims) -> None:
    round_trip(tool, victims.start("files"))


def test_pipes_and_fifos_keep_the_data_in_flight(tool: Tool, victims: Victims) -> None:
    round_trip(tool, victims.start("pipes"))


def test_file_locks_of_every_kind_are_held_again(tool: Tool, victims: Victims) -> None:
    round_trip(tool, victims.start("locks"))


def test_descriptors_survive_three_dumps_in_a_row(tool: Tool, victims: Victims) -> None:
    round_trip(tool, victims.start("pipes"), 3)
