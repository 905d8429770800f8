"""What several tests of devices need."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from support.plugins import PluginFolder, plugin_folder


@pytest.fixture
def lib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[PluginFolder]:
    """An empty folder for plugins; those that are installed with gpurestore are not found in this process."""
    monkeypatch.setattr("gpurestore.devplugins.discover.entry_points", list)
    with plugin_folder(tmp_path) as folder:
        yield folder
