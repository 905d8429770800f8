"""Memory of all kinds."""

from __future__ import annotations

import pytest
from support.round_trip import round_trip
from support.tool import Tool
from support.victims import Victims

pytestmark = pytest.mark.usefixtures("rights")


@pytest.mark.parametrize("how", ["--parallel", "--serial"])
def test_private_memory_keeps_content_protection_advice_and_locks(tool: Tool, victims: Victims, how: str) -> None:
    round_trip(tool, victims.start("memory"), 1, "-d", how)


def test_file_mappings_keep_copied_and_clean_pages(tool: Tool, victims: Victims) -> None:
    round_trip(tool, victims.start("filemaps"))


def test_shared_memory_stays_shared_between_tasks(tool: Tool, victims: Victims) -> None:
    round_trip(tool, victims.start("shared"))


def test_copy_on_write_pages_are_right_in_parent_and_child(tool: Tool, victims: Victims) -> None:
    round_trip(tool, victims.start("cow"))


def test_memory_is_right_after_a_dump_of_a_restored_tree(tool: Tool, victims: Victims) -> None:
    round_trip(tool, victims.start("shared"), 3)
