"""An ordinary user dumps and restores in namespaces of their own: the system tests themselves, run by another user."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from support import without_rights

TESTS = Path(__file__).parent
CHOSEN = (
    "test_threads.py::test_every_register_of_spinning_threads_survives",
    "test_threads.py::test_thread_attributes_and_pending_signals_survive",
    "test_processes.py::test_a_tree_keeps_its_pids_parents_groups_sessions_zombies_and_stopped_task",
    "test_processes.py::test_limits_names_areas_and_other_process_state_survive",
    "test_processes.py::test_timers_keep_their_ids_and_the_time_that_had_run",
    "test_memory.py::test_private_memory_keeps_content_protection_advice_and_locks[--parallel]",
    "test_memory.py::test_file_mappings_keep_copied_and_clean_pages",
    "test_memory.py::test_shared_memory_stays_shared_between_tasks",
    "test_memory.py::test_copy_on_write_pages_are_right_in_parent_and_child",
    "test_descriptors.py::test_files_keep_position_flags_and_sharing_of_descriptions",
    "test_descriptors.py::test_pipes_and_fifos_keep_the_data_in_flight",
    "test_unsupported.py::test_all_obstacles_of_a_tree_are_named_in_one_line",
)


@pytest.mark.usefixtures("real_root", "compiler")
def test_an_ordinary_user_passes_the_system_tests_in_a_namespace_of_their_own(folder: Path) -> None:
    environment = {**os.environ, "TMPDIR": str(folder)}

    def run(arguments: list[str], timeout_s: float) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*without_rights.PREFIX, sys.executable, "-m", *arguments],
            cwd=TESTS.parent.parent,
            env=environment,
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
        )

    probe = run(["gpurestore.namespaces", "--", "true"], 20)
    if probe.returncode:
        pytest.skip(f"an ordinary user cannot enter a namespace of their own here: {probe.stderr.strip()}")
    chosen = [str(TESTS / name) for name in CHOSEN]
    result = run(["pytest", "-p", "no:cacheprovider", "-q", "--tb=short", *chosen], 300)
    assert result.returncode == 0, result.stdout[-20000:] + result.stderr[-4000:]
    assert re.search(r"\b\d+ passed", result.stdout)
    assert "skipped" not in result.stdout.splitlines()[-1], result.stdout[-3000:]
