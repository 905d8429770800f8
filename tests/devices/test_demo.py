"""The demonstration, as a user runs it: on the software accelerator, down to the picture."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path

import pytest
from support.tool import Tool

pytestmark = [
    pytest.mark.usefixtures("rights"),
    pytest.mark.skipif(
        find_spec("numpy") is None or find_spec("sklearn") is None,
        reason="numpy and scikit-learn are not installed: pip install 'gpurestore[demo]'",
    ),
]


def test_the_demonstration_ends_with_equal_weights_a_table_and_a_picture(tool: Tool, folder: Path) -> None:
    outcome = tool.run("demo", "--steps", "800", "--json", "--keep", folder / "demo").expect(0)
    result = json.loads(outcome.out)
    assert result["steps"] == 800
    assert 200 <= result["dumped_after_step"] < 800
    timings = {timing["how"]: timing for timing in result["timings"]}
    assert timings.keys() == {"serial", "parallel"}
    for timing in timings.values():
        # Some 58 MiB at 200 MiB a second.
        assert 0.25 < timing["device_memory_s"] < timing["total_s"]
        assert timing["host_memory_s"] > 0
    picture = Path(result["picture"])
    assert picture.parent == folder / "demo"
    text = picture.read_text()
    assert "device memory" in text
    assert "POST_FORKING" in text
    images = list((folder / "demo" / "images").glob("softaccel-????????????????.img"))
    assert len(images) == 1
    assert images[0].stat().st_size > 20 << 20
