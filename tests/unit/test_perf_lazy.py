"""The lazy case of the benchmarks: a CRIU that fails there spoils nothing else."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, cast

import pytest
from cases.lazy import PacedCriu
from measure import Broken
from suite import Outcome
from support.victims import Victim
from tools import Criu

if TYPE_CHECKING:
    from subject import Subject


@pytest.mark.parametrize(("daemon", "why"), [("exit 1", "lazy-pages ended with 1"), ("exec sleep 60", "has not ended")])
def test_a_daemon_for_lazy_pages_that_fails_is_told_and_never_left(tmp_path: Path, daemon: str, why: str) -> None:
    criu = _fake_criu(tmp_path, f"touch lazy-pages.socket; echo $$ > pid; {daemon}")
    with pytest.raises(Broken, match=why), criu.restored_lazily(tmp_path, wait_s=0.1):
        pass
    assert not Path(f"/proc/{(tmp_path / 'pid').read_text().strip()}").exists()


def test_what_criu_cannot_bring_back_is_noted_once_and_the_case_goes_on(tmp_path: Path) -> None:
    outcome = Outcome("lazy", "Lazy restore")
    asked = tmp_path / "asked"
    criu = _fake_criu(tmp_path, f"touch lazy-pages.socket; echo >> {asked}; exit 1")
    tree = SimpleNamespace(
        outcome=outcome, criu_images=tmp_path, victim=Victim("pacer", tmp_path, None, 0), warm_up=lambda: None
    )
    tree.verify = lambda: [(tmp_path / name).write_text("0") for name in ("resumed", "passed")]
    contender = PacedCriu(cast("Subject", tree), "1 MiB", criu, lazily=True)
    contender()
    contender()
    assert asked.read_text() == "\n"
    assert len(outcome.notes) == 1
    assert "1 MiB: CRIU --lazy-pages does not bring the tree back" in outcome.notes[0]
    assert not (tmp_path / "go").exists()


def _fake_criu(folder: Path, daemon: str) -> Criu:
    """A program whose restore does nothing, and whose daemon is a line of shell, run in the images."""
    program = folder / "criu"
    program.write_text(f'#!/bin/sh\ncd "$3"\n[ "$1" = restore ] && exit 0\n{daemon}\n')
    program.chmod(0o755)
    return Criu(str(program))
