"""The demonstration's training job: its result depends on nothing but its arguments."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from gpurestore.demo.runner import _compare
from gpurestore.errors import GpurestoreError

pytest.importorskip("sklearn", reason="the demo's packages are not installed")


def train(folder: Path, steps: int) -> tuple[str, bytes]:
    folder.mkdir()
    command = [sys.executable, "-m", "gpurestore.demo.job", "--out", str(folder), "--steps", str(steps)]
    subprocess.run(command, check=True, stdin=subprocess.DEVNULL, timeout=300)
    return (folder / "losses.txt").read_text(), (folder / "weights.bin").read_bytes()


def test_two_runs_are_equal_bit_for_bit_and_learn(tmp_path: Path) -> None:
    first = train(tmp_path / "a", 60)
    assert train(tmp_path / "b", 60) == first
    losses = [float.fromhex(line.split()[1]) for line in first[0].splitlines()]
    assert len(losses) == 60
    assert losses[-1] < 0.5 * losses[0]
    _compare(tmp_path / "a", tmp_path / "b")


def test_a_difference_is_found_and_named(tmp_path: Path) -> None:
    for name, losses, weights in (("a", "0 x\n1 y\n", b"w"), ("b", "0 x\n1 z\n", b"w"), ("c", "0 x\n1 y\n", b"v")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "losses.txt").write_text(losses)
        (tmp_path / name / "weights.bin").write_bytes(weights)
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "losses.txt").write_text("0 x\n")
    with pytest.raises(GpurestoreError, match="differ from step 1"):
        _compare(tmp_path / "a", tmp_path / "b")
    with pytest.raises(GpurestoreError, match="weights differ"):
        _compare(tmp_path / "a", tmp_path / "c")
    with pytest.raises(GpurestoreError, match="2 steps undisturbed and 1 restored"):
        _compare(tmp_path / "a", tmp_path / "d")
