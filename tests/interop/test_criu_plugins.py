"""Plugins are CRIU's: one binary serves both hosts, built with either header, over images of either."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.criu import Criu
from support.plugins import compile_plugin
from support.tool import Tool
from support.victims import Victims

pytestmark = pytest.mark.usefixtures("rights", "real_root")


@pytest.fixture(params=["ours", "criu's"])
def lib(request: pytest.FixtureRequest, criu: Criu, folder: Path) -> Path:
    """A folder with one plugin of interface version 0.2.0, built with our header or with CRIU's."""
    flags = ["-DHEADER=<gpurestore-plugin.h>", "-DCRIU_PLUGIN_VERSION=0x000200"]
    if request.param != "ours":
        header = criu.program.resolve().parent / "include" / "criu-plugin.h"
        if not header.exists():
            pytest.skip("criu's header is not there: name a criu in its source tree with CRIU=PROGRAM")
        flags = [f'-DHEADER="{header}"', "-Wno-unused-parameter"]
    path = folder / "plugins"
    path.mkdir()
    compile_plugin("criu_style", path / "criu_style.so", *flags)
    return path


def paused(images: Path) -> int:
    """The pid that the plugin's PAUSE_DEVICES wrote to the image folder."""
    return int.from_bytes((images / "criu_style.img").read_bytes(), "little")


def test_criu_dumps_with_the_plugin_and_we_restore(
    tool: Tool, victims: Victims, folder: Path, criu: Criu, lib: Path
) -> None:
    victim = victims.start("idle")
    images = folder / "images"
    images.mkdir()
    result = criu.run("dump", images, "-t", str(victim.pid), "-L", str(lib))
    assert result.returncode == 0, result.stdout[-6000:]
    assert paused(images) == victim.pid
    victim.expect_gone()
    tool.run("restore", "-D", str(images), "-d").expect(1)  # the images name the plugin
    tool.run("restore", "-D", str(images), "-d", "-L", str(lib)).expect(0)
    victim.finish()


def test_we_dump_with_the_plugin_and_criu_restores(
    tool: Tool, victims: Victims, folder: Path, criu: Criu, lib: Path
) -> None:
    victim = victims.start("idle")
    images = folder / "images"
    tool.run("dump", "-t", str(victim.pid), "-D", str(images), "-L", str(lib)).expect(0)
    assert paused(images) == victim.pid
    victim.expect_gone()
    (folder / "none").mkdir()
    assert criu.run("restore", images, "-d", "-L", str(folder / "none")).returncode != 0
    result = criu.run("restore", images, "-d", "-L", str(lib))
    assert result.returncode == 0, result.stdout[-6000:]
    victim.finish()
