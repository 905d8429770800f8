"""Images are CRIU's: crit decodes ours, CRIU restores ours, and we restore CRIU's."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest
from support.criu import Crit, Criu
from support.round_trip import dump
from support.tool import Tool
from support.victims import Victims

from gpurestore.images.chunked import read_index
from gpurestore.images.magic import INHERITING_VERSION

NO_HEADER = ("pages-", "ghost-file-")
ARGUMENTS = {"registers": ("no-tiles",)}


@pytest.mark.usefixtures("rights")
@pytest.mark.parametrize(
    "name", ["idle", "threads", "tree", "timers", "memory", "filemaps", "shared", "files", "pipes"]
)
def test_crit_decodes_every_kind_of_image(tool: Tool, victims: Victims, folder: Path, crit: Crit, name: str) -> None:
    victim = victims.start(name)
    tool.dump(victim.pid, folder / "images", "-R").expect(0)
    # One of each kind: crit starts a Python for every file.
    kinds = {re.sub(r"[0-9]+", "", path.name): path for path in sorted((folder / "images").glob("*.img"))}
    images = [path for path in kinds.values() if not path.name.startswith(NO_HEADER)]
    assert len(images) >= 8
    for image in images:
        decoded = crit.decode(image)
        assert decoded["magic"], image.name
        assert decoded["entries"] or image.name.startswith(("fdinfo", "pagemap", "timens")), f"{image.name} is empty"
    tree = crit.decode(folder / "images" / "pstree.img")["entries"]
    assert sorted(int(entry["pid"]) for entry in tree) == sorted(victim.pids)


@pytest.mark.usefixtures("rights", "real_root")
@pytest.mark.parametrize(
    "name", ["idle", "registers", "signals", "tree", "timers", "filemaps", "shared", "cow", "heirs"]
)
def test_criu_restores_our_dump(tool: Tool, victims: Victims, folder: Path, criu: Criu, name: str) -> None:
    victim = victims.start(name, *ARGUMENTS.get(name, ()))
    dump(tool, victim, folder / "images", "--criu-compatible")
    result = criu.run("restore", folder / "images", "-d")
    assert result.returncode == 0, result.stdout[-6000:]
    victim.finish()


@pytest.mark.usefixtures("rights", "real_root")
@pytest.mark.parametrize(
    "name", ["idle", "registers", "signals", "tree", "timers", "filemaps", "shared", "cow", "heirs"]
)
def test_we_restore_a_dump_of_criu(tool: Tool, victims: Victims, folder: Path, criu: Criu, name: str) -> None:
    victim = victims.start(name, *ARGUMENTS.get(name, ()))
    (folder / "images").mkdir()
    result = criu.run("dump", folder / "images", "-t", str(victim.pid))
    assert result.returncode == 0, result.stdout[-6000:]
    victim.expect_gone()
    tool.restore(folder / "images").expect(0)
    victim.finish()


@pytest.mark.usefixtures("rights", "real_root")
@pytest.mark.parametrize("method", ["lz4", "zstd"])
def test_criu_refuses_compressed_images_until_they_are_decompressed(
    tool: Tool, victims: Victims, folder: Path, criu: Criu, method: str
) -> None:
    victim = victims.start("shared")
    images = folder / "images"
    dump(tool, victim, images, f"--compress={method}", "--criu-compatible")
    result = criu.run("restore", images, "-d")
    assert result.returncode != 0, "CRIU restored something from images that it cannot read"
    assert "pages-" in result.stdout and "Error" in result.stdout, result.stdout[-3000:]
    victim.expect_gone()
    for path in images.glob("pages-*.img.*"):
        fd = os.open(path, os.O_RDONLY)
        index = read_index(fd, path.name, method)
        path.with_suffix("").write_bytes(index.read(fd, 0, index.stream_bytes))
        os.close(fd)
    result = criu.run("restore", images, "-d")
    assert result.returncode == 0, result.stdout[-6000:]
    victim.finish()


@pytest.mark.usefixtures("rights", "real_root")
def test_criu_refuses_memory_that_only_we_can_share_again(
    tool: Tool, victims: Victims, folder: Path, criu: Criu
) -> None:
    victim = victims.start("heirs")
    dump(tool, victim, folder / "images")
    result = criu.run("restore", folder / "images", "-d")
    assert result.returncode != 0
    assert f"Not supported images version {INHERITING_VERSION}" in result.stdout
    tool.restore(folder / "images").expect(0)
    victim.finish()


@pytest.mark.usefixtures("rights", "real_root")
def test_criu_restores_a_tree_that_shares_next_to_nothing(
    tool: Tool, victims: Victims, folder: Path, criu: Criu
) -> None:
    victim = victims.start("tree")
    dump(tool, victim, folder / "images")
    result = criu.run("restore", folder / "images", "-d")
    assert result.returncode == 0, result.stdout[-6000:]
    victim.finish()
